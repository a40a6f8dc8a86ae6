"""What protects participants, what attacks them, and what either costs: pairs around any method that averages."""

from fedsim.privacy.accounting import delta, epsilon, noise_multiplier
from fedsim.privacy.calibration import calibrated
from fedsim.privacy.dp import ParticipantDP
from fedsim.privacy.example_dp import ExampleDP
from fedsim.privacy.hostile import Hostile
from fedsim.privacy.pair import Pair
from fedsim.privacy.pairs import Around
from fedsim.privacy.robust import Robust, robust_mean


__all__ = [
    "Around",
    "ExampleDP",
    "Hostile",
    "Pair",
    "ParticipantDP",
    "Robust",
    "calibrated",
    "delta",
    "epsilon",
    "noise_multiplier",
    "robust_mean",
]
