"""Data: what an experiment names (`DataConfig`), what it gets (`Dataset`), and how it is dealt (`Partition`)."""

from fedsim.data.config import DataConfig, cifar10, digits, fashion_mnist, pydoc, sst2
from fedsim.data.dataset import Dataset, Split
from fedsim.data.frames import from_frame
from fedsim.data.partition import Partition, train_validation
from fedsim.data.source import load


__all__ = [
    "DataConfig",
    "Dataset",
    "Partition",
    "Split",
    "cifar10",
    "digits",
    "fashion_mnist",
    "from_frame",
    "load",
    "pydoc",
    "sst2",
    "train_validation",
]
