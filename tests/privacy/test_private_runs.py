"""Whole runs with differential privacy: bit for bit those without where nothing is asked, repeatable, resumable."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import fedsim
from fedsim.engine.cohort import cohort_of
from fedsim.experiment import Experiment
from fedsim.privacy import Around, ParticipantDP, calibrated
from fedsim.runtime.inline import InlineRuntime
from fedsim.sweeps.runner import run_all
from tests.support.inline_runs import Cut, Interrupted, assert_same_numbers, inline


HASH = "state_sha256"


def around(experiment: Experiment, *pairs: ParticipantDP) -> Experiment:
    return dataclasses.replace(experiment, algorithm=Around(experiment.algorithm, pairs))


def adaptive(experiment: Experiment) -> Experiment:
    settings: dict[str, Any] = {"clip": 0.5, "noise_multiplier": 0.5, "delta": 1e-5, "clipping": "adaptive"}
    return calibrated(experiment, **settings)


def test_without_clip_and_noise_every_round_has_the_bits_of_the_run_without(
    tiny_experiment: Experiment, tiny_run: Path, tmp_path: Path
) -> None:
    inline(around(tiny_experiment, ParticipantDP()), tmp_path)
    plain, private = fedsim.load(tiny_run).rounds, fedsim.load(tmp_path).rounds
    assert private[HASH].tolist() == plain[HASH].tolist()
    assert len({*plain[HASH].tolist()}) == 3
    for rounds in (plain, private):
        for name in ("epsilon", "delta", "noise_multiplier", "clipped_share"):
            assert rounds[name].isna().tolist() == [True] * len(rounds)


def test_a_clip_that_nothing_reaches_changes_no_bit_and_one_that_all_reach_does(
    tiny_experiment: Experiment, tiny_run: Path, tmp_path: Path
) -> None:
    plain, found = fedsim.load(tiny_run).rounds, {}
    for clip in (1e3, 1e-3):
        inline(around(tiny_experiment, ParticipantDP(clip)), tmp_path / str(clip))
        found[clip] = fedsim.load(tmp_path / str(clip)).rounds
    assert found[1e3][HASH].tolist() == plain[HASH].tolist()
    assert found[1e3].clipped_share.tolist()[1:] == [0.0, 0.0]
    assert found[1e-3][HASH].tolist()[1] != plain[HASH].tolist()[1]
    assert found[1e-3].clipped_share.tolist()[1:] == [1.0, 1.0]


@pytest.mark.ray
def test_noise_and_its_absence_have_the_same_bits_on_ray(on_hosts, tiny_experiment: Experiment, tmp_path: Path) -> None:
    experiments = [around(tiny_experiment, ParticipantDP(1e3)), adaptive(tiny_experiment)]
    hashes = []
    for name, runtime in (("here", InlineRuntime), ("there", on_hosts(2))):
        assert run_all(experiments, out=tmp_path / name, make_runtime=runtime) == []
        hashes.append(fedsim.load(tmp_path / name).rounds.set_index(["run_id", "round"])[HASH].to_dict())
    assert hashes[0] == hashes[1] and len({*hashes[0].values()}) == 6


@pytest.mark.parametrize("after", [0, 1])
def test_an_adaptive_clip_goes_on_after_a_cut(tiny_experiment: Experiment, after: int, tmp_path: Path) -> None:
    experiment = adaptive(tiny_experiment)
    inline(experiment, tmp_path / "whole")
    with pytest.raises(Interrupted):
        inline(experiment, tmp_path / "cut", progress=Cut(after))
    inline(experiment, tmp_path / "cut", resume=True)
    assert_same_numbers(tmp_path / "whole", tmp_path / "cut")


def test_the_tables_say_what_was_spent(tiny_experiment: Experiment, tmp_path: Path) -> None:
    experiment = calibrated(tiny_experiment, clip=0.5, epsilon=8.0, delta=1e-3, accountant="pld")
    inline(experiment, tmp_path)
    rounds = fedsim.load(tmp_path).rounds
    spent = [experiment.algorithm.spent(experiment, round) for round in range(3)]
    for name in ("epsilon", "delta", "noise_multiplier"):
        assert rounds[name].tolist() == [each[name] for each in spent]
    assert rounds.epsilon[0] == 0 and 7.9 < rounds.epsilon[2] <= 8
    assert rounds.clipped_share[1:].between(0, 1).all()


def test_a_round_of_nobody_leaves_the_plain_state_as_it_was_and_noises_the_private_one(
    tiny_experiment: Experiment, tmp_path: Path
) -> None:
    few = dataclasses.replace(tiny_experiment, cohort=1, sampling="poisson", rounds=3, seed=8)
    sizes = [len(cohort_of(few, round)) for round in (1, 2, 3)]
    assert sizes.count(0) == 1 and sizes[0], sizes  # by the coins of this seed
    empty = sizes.index(0) + 1
    for name, experiment in (("plain", few), ("private", calibrated(few, clip=0.5, epsilon=8.0, delta=1e-3))):
        inline(experiment, tmp_path / name)
    plain, private = (fedsim.load(tmp_path / name).rounds for name in ("plain", "private"))
    assert plain.participants.tolist()[1:] == private.participants.tolist()[1:] == sizes
    (before, after), (noised_before, noised_after) = (
        rounds[HASH].tolist()[empty - 1 : empty + 1] for rounds in (plain, private)
    )
    assert after == before and noised_after != noised_before
    assert private.clipped_share.isna().tolist() == [True, *(size == 0 for size in sizes)]
