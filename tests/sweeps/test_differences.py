"""In which fields two experiments differ."""

from dataclasses import replace

import pytest

from baselines.fedavg import FedAvg
from benchmarks.suites import tiny
from fedsim.experiment import with_settings
from fedsim.sweeps.differences import differences, told


@pytest.mark.parametrize(
    "settings, found",
    [
        ([], {}),
        (["rounds=20"], {"rounds": (3, 20)}),
        (["tiers.1.form.width=16"], {"tiers.1.form.width": (24, 16)}),
        (["algorithm.lr=1e-2", "task.data.limit=99"], {"algorithm.lr": (3e-3, 1e-2), "task.data.limit": (None, 99)}),
        (["algorithm.optimizer=sgd"], {"algorithm.optimizer": ("its default", "sgd")}),
    ],
)
def test_each_field_that_differs_is_found(settings: list[str], found: dict[str, tuple]) -> None:
    assert differences(tiny().canonical_json(), with_settings(tiny(), settings).canonical_json()) == found


def test_they_are_told_in_words_the_first_few() -> None:
    here = with_settings(tiny(), [f"{name}=2" for name in ("rounds", "seed", "chunk", "eval_every", "cohort")])
    assert told(tiny().canonical_json(), with_settings(tiny(), ["rounds=2"]).canonical_json()) == (
        "rounds: 3 there, 2 here"
    )
    assert told(tiny().canonical_json(), replace(here, algorithm=FedAvg()).canonical_json()) == (
        "algorithm: FedGrow there, FedAvg here; cohort: None there, 2 here; eval_every: 1 there, 2 here; "
        "rounds: 3 there, 2 here; seed: 0 there, 2 here"
    )
    longer = replace(here, algorithm=FedAvg(), participants=4)
    assert told(tiny().canonical_json(), longer.canonical_json()).endswith("; and 1 more")
