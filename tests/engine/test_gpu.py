"""`gpu_fraction="auto"`: from what was measured to what is asked for."""

import dataclasses
import functools

import pytest
import torch

from fedsim.engine.gpu import MARGIN, bytes_on_gpu, fraction_for, with_gpu_fractions
from fedsim.experiment import Experiment, Tier, with_settings
from fedsim.models import Form
from fedsim.runtime.inline import InlineRuntime


def auto(experiment: Experiment) -> Experiment:
    return with_settings(experiment, ["tiers.1.gpu_fraction=auto"])


def test_fraction_by_hand() -> None:
    """9 GB of 10 may be used: four participants of 2 GB fit, or two of 4 GB, or one of 9."""
    assert fraction_for("t", 2000, 10_000) == pytest.approx(0.25)
    assert fraction_for("t", 4000, 10_000) == pytest.approx(0.5)
    assert fraction_for("t", 9000, 10_000) == 1.0
    assert fraction_for("t", 3000, 10_000) == pytest.approx(0.3333) and 3 * fraction_for("t", 3000, 10_000) <= 1
    assert MARGIN == 0.1


def test_a_participant_that_does_not_fit_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"tier 'phone': .*needs 9537 MB, which is more than 8583 MB"):
        fraction_for("phone", 10_000_000_000, 10_000_000_000)


def test_only_the_tiers_that_ask_are_measured(tiny_experiment: Experiment) -> None:
    asked = []

    def probe(call):
        asked.append(call.args[1].name)
        return 1000, 10_000

    measured = with_gpu_fractions(auto(tiny_experiment), probe)
    assert asked == [tiny_experiment.tiers[1].name]
    assert [tier.num_gpus for tier in measured.tiers] == [0, pytest.approx(1 / 9, abs=1e-4), 0]
    assert measured.run_id == tiny_experiment.run_id, "where it runs is not what it is"
    assert with_gpu_fractions(tiny_experiment, probe) is tiny_experiment and len(asked) == 1


def test_without_a_gpu_none_is_asked_for(tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runtime = InlineRuntime()
    measured = with_gpu_fractions(auto(tiny_experiment), runtime.probe)
    runtime.close()
    assert [tier.num_gpus for tier in measured.tiers] == [0, 0, 0]
    assert not any(tier.gpu_fraction for tier in measured.tiers)


def test_fraction_and_number_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"num_gpus=0.5: must be left out where gpu_fraction='auto'"):
        Tier("t", Form(8, 1, heads=2), num_gpus=0.5, gpu_fraction="auto")


@pytest.mark.parametrize("resources", [(("", 1.0),), (("GPU", 1.0),), (("farm", 0.0),)])
def test_custom_resources_are_checked(resources: tuple) -> None:
    with pytest.raises(ValueError, match="resources"):
        Tier("t", Form(8, 1, heads=2), resources=resources)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_measured(tiny_experiment: Experiment) -> None:
    needed, total = bytes_on_gpu(tiny_experiment, tiny_experiment.tiers[0])
    assert 2**20 < needed < total == torch.cuda.mem_get_info()[1]
    larger = dataclasses.replace(tiny_experiment, target=Form(256, 6, heads=4), intermediate=Form(128, 4, heads=4))
    runtime = InlineRuntime()
    more = runtime.probe(functools.partial(bytes_on_gpu, larger, larger.tiers[0]))
    runtime.close()
    assert more[0] >= needed
