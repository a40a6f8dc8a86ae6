"""Suites: functions that return lists of experiments, by name or as MODULE:FUNCTION, and what is chosen of them."""

import argparse
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType

from fedsim.core.fields import WHOLE, refuse
from fedsim.core.modules import called
from fedsim.experiment import Experiment, experiments_from, function_at, nearest, with_settings
from fedsim.sweeps.progress import label_of


SMALLEST_SCALE = 0.001  # below, everything is at its smallest already
Suites = Mapping[str, Callable[..., list[Experiment]]]


def suites_of(module_name: str) -> Suites:
    """`suites_in` a module. **Raises:** `ValueError` if it cannot be imported."""
    return suites_in(called(lambda: importlib.import_module(module_name), f"--suite: looked up in {module_name}"))


def suites_in(module: ModuleType) -> Suites:
    """Name -> function, for every function of a module that returns a list of experiments unasked.

    Names have hyphens where those of functions have underscores (`spelled`).
    """
    return {
        spelled(name): function
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if not name.startswith("_") and _is_suite(inspect.signature(function))
    }


def _is_suite(signature: inspect.Signature) -> bool:
    optional = all(parameter.default is not inspect.Parameter.empty for parameter in signature.parameters.values())
    return optional and signature.return_annotation == list[Experiment]


def suite_at(target: str) -> tuple[str, Callable[..., list[Experiment]]]:
    """The suite that MODULE:FUNCTION names, and what it is called in results.

    **Raises:** `ValueError` saying which part of `target` does not lead anywhere.
    """
    function = function_at(target)

    @functools.wraps(function)
    def make(**arguments: float) -> list[Experiment]:
        return experiments_from(target, functools.partial(function, **arguments))

    return spelled(target.partition(":")[2]), make


def spelled(name: str) -> str:
    """How a suite is called in results, whichever way it was typed: `paper-cv`."""
    return name.replace("_", "-")


def experiments_of(known: Suites, name: str, options: argparse.Namespace) -> list[Experiment]:
    """The experiments of a suite for all seeds, with `--scale`, `--only`, `--data` and `--set` applied.

    **Raises:** `ValueError` for an unknown suite, algorithm or data set, for a scale that the suite does not take, and
    for a setting that one of the experiments refuses.
    """
    suite = spelled(name)
    if suite not in known:
        raise ValueError(f"--suite={name!r}: no such suite{nearest(suite, list(known))}")
    base = _chosen(known[suite](**_given_scale(known, suite, options.scale)), suite, options)
    experiments = []
    for seed in dict.fromkeys(options.seeds):
        if not 0 <= seed <= WHOLE:
            refuse("--seeds", seed, "at least 0 and below 2**63")
        for experiment in base:
            try:
                experiments.append(with_settings(replace(experiment, seed=seed), options.settings))
            except ValueError as error:
                raise ValueError(f"suite {suite!r}, {label_of(experiment)}: {error}") from error
    return experiments


def _chosen(base: list[Experiment], suite: str, options: argparse.Namespace) -> list[Experiment]:
    """What `--only` and `--data` leave of a suite."""
    for option, asked, names in (
        ("--only", options.only, [experiment.algorithm.name for experiment in base]),
        ("--data", options.data, [experiment.task.data.name for experiment in base]),
    ):
        for each in asked or ():
            if each not in names:
                raise ValueError(f"{option}={each!r}: not in suite {suite!r}{nearest(each, [*dict.fromkeys(names)])}")
    named = [(experiment, experiment.algorithm.name, experiment.task.data.name) for experiment in base]
    left = [
        experiment
        for experiment, method, data in named
        if method in (options.only or [method]) and data in (options.data or [data])
    ]
    if not left:
        raise ValueError(f"--only={options.only}, --data={options.data}: suite {suite!r} has no such experiment")
    return left


def _given_scale(known: Suites, suite: str, scale: float | None) -> dict[str, float]:
    """The arguments of a suite's function, where `--scale` may be given or not."""
    if scale is None:
        return {}
    if not SMALLEST_SCALE <= scale <= 1:
        refuse("--scale", scale, f"at least {SMALLEST_SCALE} and at most 1")
    arguments = arguments_of(known[suite], scale)
    if not arguments:
        others = ", ".join(name for name, each in known.items() if arguments_of(each, scale))
        elsewhere = f"; scales are for {others}" if others else ""
        raise ValueError(f"--scale={scale}: suite {suite!r} has one size only{elsewhere}")
    return arguments


def arguments_of(make: Callable[..., list[Experiment]], scale: float) -> dict[str, float]:
    """The arguments of a suite's function; none where it takes no scale."""
    return {"scale": scale} if "scale" in inspect.signature(make).parameters else {}
