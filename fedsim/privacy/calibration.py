"""How much noise participant-level privacy takes in an experiment: from epsilon to `ParticipantDP`."""

import dataclasses
from typing import Any

from fedsim.core.fields import refuse
from fedsim.experiment import Experiment
from fedsim.privacy import accounting
from fedsim.privacy.dp import ParticipantDP, expected, sampling_of, shared_rounds
from fedsim.privacy.pairs import Around


def calibrated(
    experiment: Experiment,
    *,
    clip: float,
    delta: float,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    **fields: Any,
) -> Experiment:
    """The same experiment with a `ParticipantDP` around its method, for its rounds, cohort and sampling.

    **Arguments:**

    - `epsilon`: after the last round; the noise is solved for. - `noise_multiplier`: the noise; epsilon is in the
      tables. One of them. - `delta`: with either. - `clip`, `fields`: further fields of the pair.

    **Raises:** `ValueError` for both or neither, and where no theorem holds.
    """
    if (epsilon is None) == (noise_multiplier is None):
        refuse("epsilon, noise_multiplier", (epsilon, noise_multiplier), "one of them given, the other solved for")
    known = {"cohort": expected(experiment), "sampling": sampling_of(experiment), "delta": delta}
    pair = ParticipantDP(clip, 1.0 if noise_multiplier is None else noise_multiplier, **known, **fields)
    if epsilon is not None:
        promised = pair.promised(experiment)
        factor, steps = promised.pop("factor"), shared_rounds(experiment, experiment.rounds)
        sigma = accounting.noise_multiplier(epsilon=epsilon, delta=delta, steps=steps, **promised) / factor
        if pair.noise == "skellam":  # takes a little more than Gaussian noise

            def enough(sigma: float) -> bool:
                return dataclasses.replace(pair, noise_multiplier=sigma).spent_in(experiment, steps) <= epsilon

            sigma = accounting.least(enough, sigma)
        pair = dataclasses.replace(pair, noise_multiplier=sigma)
    method = experiment.algorithm
    inner, others = (method.method, method.pairs) if isinstance(method, Around) else (method, ())
    return dataclasses.replace(experiment, algorithm=Around(inner, (pair, *others)))
