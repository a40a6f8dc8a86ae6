"""What protects participants, what attacks them, and what either costs: pairs around any method that averages."""

from fedsim.privacy.robust import robust_mean


__all__ = ["robust_mean"]
