"""What protects participants, what attacks them, and what either costs: pairs around any method that averages."""

from fedsim.privacy.accounting import delta, epsilon, noise_multiplier
from fedsim.privacy.dp import ParticipantDP, calibrated
from fedsim.privacy.example_dp import ExampleDP
from fedsim.privacy.pairs import Around, Pair


__all__ = ["Around", "ExampleDP", "Pair", "ParticipantDP", "calibrated", "delta", "epsilon", "noise_multiplier"]
