"""What protects participants, what attacks them, and what either costs: pairs around any method that averages."""

from fedsim.privacy.accounting import delta, epsilon, noise_multiplier


__all__ = ["delta", "epsilon", "noise_multiplier"]
