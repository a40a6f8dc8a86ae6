"""An experiment for every method, and for other data, whose fields requests change: `tests.fuzz.experiments:NAME`."""

import functools
from collections.abc import Callable
from dataclasses import replace

from benchmarks.federations import on_digits
from benchmarks.methods import DIGITS, methods
from benchmarks.suites import tiny
from fedsim.data.config import pydoc
from fedsim.devices import Conditions
from fedsim.experiment import Experiment, with_settings
from fedsim.learning.task import TaskConfig
from tests.support.disturbed import TINY_SETTINGS


def on_texts() -> Experiment:
    """Language modelling, with devices and conditions."""
    base = with_settings(tiny(), [each for each in TINY_SETTINGS if not each.startswith("task.")])
    tiers = tuple(replace(tier, device="phone") for tier in base.tiers)
    task = TaskConfig(pydoc(limit=64, max_length=12), "gpt2")
    return replace(base, task=task, tiers=tiers, conditions=Conditions(deadline=1e6))


METHODS = {f"{each.name}_{each.preset_name}".strip("_"): each for each in methods(DIGITS)}


def _with_method(name: str) -> Experiment:
    return with_settings(
        replace(on_digits(), algorithm=METHODS[name]), ["task.data.limit=600", "partition.min_size=10", "rounds=2"]
    )


def __getattr__(name: str) -> Callable[[], Experiment]:
    if name not in METHODS:
        raise AttributeError(name)
    return functools.partial(_with_method, name)


TARGETS = ("on_texts", *METHODS)
