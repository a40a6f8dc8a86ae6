"""`gpu_fraction="auto"`: how much of a GPU a participant of a tier needs, measured on one.

A participant without data builds what the method asks of it and takes training steps on full batches of zeros. What its
process then holds on the device, with a margin, says how many of them fit side by side, and each gets that fraction.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from fedsim.core.fields import refuse
from fedsim.devices import MEBIBYTE
from fedsim.engine.cost import DryRun
from fedsim.experiment import Experiment, Tier, of_tier


MARGIN = 0.1  # part of the device that is left free: fragments, and what only real data take
SMALLEST = 1e-4  # the finest fraction that Ray tells apart


def with_gpu_fractions(experiment: Experiment, probe: Callable[[Callable[[], Any]], Any]) -> Experiment:
    """The experiment with `num_gpus` in place of every `gpu_fraction="auto"`; 0 where there is no GPU.

    - `probe`: makes a call where it has a GPU to itself (`Runtime.probe`).

    **Raises:** `ValueError` for a tier of which not one participant fits on a GPU, with both numbers.
    """
    if all(tier.gpu_fraction is None for tier in experiment.tiers):
        return experiment
    tiers = []
    for tier in experiment.tiers:
        if tier.gpu_fraction is not None:
            measured = probe(functools.partial(bytes_on_gpu, experiment, tier))
            fraction = 0.0 if measured is None else fraction_for(tier.name, *measured)
            tier = dataclasses.replace(tier, gpu_fraction=None, num_gpus=fraction)
        tiers.append(tier)
    return dataclasses.replace(experiment, tiers=tuple(tiers))


def bytes_on_gpu(experiment: Experiment, tier: Tier, device: str = "cuda") -> tuple[int, int]:
    """Bytes that the process of one participant of a tier takes on a GPU at most, and those that the GPU has."""
    torch.cuda.init()
    torch.cuda.reset_peak_memory_stats(device)
    alone = dataclasses.replace(experiment, tiers=(tier,))
    dry_run = DryRun(alone, {}, device)
    start, _ = dry_run.begin(timed=(tier.name,))
    dry_run.train(start, experiment.rounds, timed=(tier.name,))
    free, total = torch.cuda.mem_get_info(device)
    context = total - free - torch.cuda.memory_reserved(device)  # of this process alone: it has the device to itself
    return context + torch.cuda.max_memory_reserved(device), total


def fraction_for(tier: str, needed: int, total: int) -> float:
    """The largest fraction 1/n of a GPU such that n participants fit on it, rounded down to what Ray tells apart.

    **Raises:** `ValueError` if not one fits, with both numbers.
    """
    fit = math.floor(total * (1 - MARGIN) / needed)
    if fit < 1:
        with of_tier(tier):
            have = f"{total * (1 - MARGIN) / MEBIBYTE:.0f} MB of a GPU (of {total / MEBIBYTE:.0f} with a margin)"
            refuse(
                "gpu_fraction",
                "auto",
                f"left out: a participant needs {needed / MEBIBYTE:.0f} MB, which is more than {have}",
            )
    return max(SMALLEST, math.floor(1 / fit / SMALLEST) * SMALLEST)
