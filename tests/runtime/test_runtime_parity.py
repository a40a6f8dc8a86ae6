"""The same experiment gives the same bits inline and on Ray, on any number of hosts."""

import dataclasses

import pytest
import ray

import fedsim
from benchmarks.suites import quick
from fedsim.experiment import Experiment, with_settings
from fedsim.learning.augmentation import Augmentation
from fedsim.results.tables import Results
from fedsim.runtime.inline import InlineRuntime
from fedsim.runtime.ray_runtime import RayRuntime
from fedsim.sweeps.runner import run_all
from tests.support.disturbed import Disturbed, marks, small, without_federation


pytestmark = pytest.mark.ray


def results_of(experiments: list[Experiment], out, make_runtime) -> Results:
    assert run_all(experiments, out=out, make_runtime=make_runtime) == []
    return fedsim.load(out)


def sha256s(results) -> dict:
    return results.rounds.set_index(["run_id", "round"]).state_sha256.to_dict()


@pytest.fixture(scope="module")
def inline(reference) -> Results:
    """Rounds of both experiments, computed inline."""
    return fedsim.load(reference)


def test_models_of_hugging_face_give_the_same_bits_too(on_hosts, tmp_path):
    experiment = dataclasses.replace(small("vit"), rounds=2)
    here = results_of([experiment], tmp_path / "here", InlineRuntime)
    there = results_of([experiment], tmp_path / "there", on_hosts(2))
    assert sha256s(here) == sha256s(there) and len(sha256s(there)) == 3


def test_augmented_images_and_dropout_give_the_same_bits_too_and_after_a_kill(on_hosts, tmp_path):
    augmentation = Augmentation(crop=(0.3, 1.0), flip=0.5, randaugment=2, erase=0.25, mixup=0.8, cutmix=1.0)
    words = ["task.label_smoothing=0.1", "task.dropout=0.1", "algorithm.schedule=cosine", "algorithm.lr_warmup=0.1"]
    plain = with_settings(small("vit"), ["rounds=2", "algorithm.accumulate=2", "algorithm.drop_last=true", *words])
    experiment = dataclasses.replace(plain, task=dataclasses.replace(plain.task, augmentation=augmentation))
    here = results_of([experiment], tmp_path / "here", InlineRuntime)
    dying = dataclasses.replace(experiment, algorithm=Disturbed(experiment.algorithm, "die", str(tmp_path), round=1))
    there = results_of([dying], tmp_path / "there", on_hosts(2))
    assert all(mark.exists() for mark in marks(tmp_path)), "a host was killed in round 1"
    assert here.rounds.state_sha256.tolist() == there.rounds.state_sha256.tolist()
    assert here.rounds.state_sha256.nunique() == 3
    assert here.rounds.train_loss.tolist() == there.rounds.train_loss.tolist()


def test_models_grown_of_a_public_checkpoint_give_the_same_bits_too(on_hosts, tmp_path):
    """What grows is a product of transposed matrices: strides, which messages forget, decide how it multiplies."""
    experiment = next(each for each in quick() if each.start is not None and each.algorithm.name == "fedavg")
    experiment = dataclasses.replace(experiment, rounds=1)
    here = results_of([experiment], tmp_path / "here", InlineRuntime)
    there = results_of([experiment], tmp_path / "there", on_hosts(1))
    assert sha256s(here) == sha256s(there) and len(sha256s(there)) == 2


@pytest.mark.parametrize("hosts", [2, 4, 1])
def test_state_is_equal_bit_by_bit_in_every_round(on_hosts, inline, tmp_path, hosts):
    results = results_of([small(), without_federation()], tmp_path, on_hosts(hosts))
    assert sha256s(results) == sha256s(inline)
    assert len(sha256s(results)) == 8
    assert results.clients.host.nunique() == hosts
    same = ["accuracy", "accuracy_local", "accuracy_val", "loss", "train_loss", "bytes_up", "bytes_down", "flops"]
    keys = ["run_id", "round", "client"]
    left, right = (r.clients.set_index(keys).sort_index()[same] for r in (results, inline))
    assert left.equals(right)


def test_hash_is_not_blind(inline):
    """Every round of either method has a hash of its own: equality above means something."""
    hashes = list(sha256s(inline).values())
    assert len(set(hashes)) == len(hashes) == 8


def test_runtime_counts_the_bytes_that_participants_count(inline):
    rounds = inline.rounds
    assert (rounds.bytes_up == rounds.seam_bytes_up).all() and (rounds.bytes_down == rounds.seam_bytes_down).all()
    assert rounds[(rounds.algorithm == "fedgrow") & (rounds["round"] > 0)].bytes_up.gt(0).all()
    assert rounds[rounds.algorithm == "fedgrow_no_federation"].bytes_up.eq(0).all()


def test_batched_participants_give_equal_bits_everywhere_and_the_others_to_rounding(on_hosts, tmp_path):
    alike = dataclasses.replace(small("vit"), tiers=small().tiers[:1], chunk=3, rounds=2)
    together = dataclasses.replace(alike, batched=True)
    apart = results_of([alike], tmp_path / "apart", InlineRuntime).rounds
    here = results_of([together], tmp_path / "here", InlineRuntime)
    there = results_of([together], tmp_path / "there", on_hosts(2))
    assert sha256s(here) == sha256s(there)
    assert not set(here.rounds.state_sha256) & set(apart.state_sha256)
    assert here.rounds.train_loss.tolist() == pytest.approx(apart.train_loss.tolist(), rel=1e-3)
    assert here.rounds.flops.tolist() == apart.flops.tolist()
    assert here.clients.train_seconds.sum() <= here.rounds.wall_seconds.sum(), "a second is counted once"


def test_participants_are_actors_with_a_fraction_of_a_gpu_and_share_hosts_when_they_do_not_all_fit(cluster, tmp_path):
    """One sweep of two experiments: what each asks of Ray decides where its participants are, not what ran before."""
    halves, wholes = (
        tuple(dataclasses.replace(tier, num_gpus=num_gpus) for tier in small().tiers) for num_gpus in (0.5, 1.0)
    )
    three = dataclasses.replace(small(), tiers=halves, participants=3, rounds=1)
    six = dataclasses.replace(small(), tiers=wholes, participants=6, rounds=1)
    free, said = [], []

    class Watching(RayRuntime):
        def ask(self, *args, **kwargs):
            answer = super().ask(*args, **kwargs)
            free.append(ray.available_resources().get("GPU", 0.0))
            return answer

    results = results_of([three, six], tmp_path, lambda: Watching(say=said.append))
    hosts = results.clients.groupby("run_id").host.nunique()
    assert hosts[three.run_id] == 3, "three halves fit on two logical GPUs: one actor a participant"
    assert free[0] == pytest.approx(2 - 3 * 0.5)
    assert hosts[six.run_id] == 2, "two whole GPUs, two hosts"
    assert free[-1] == pytest.approx(2 - 2 * 1.0)
    assert said == ["6 participants share 2 hosts, up to 3 on each"]


def test_what_does_not_fit_is_refused_with_both_numbers_before_anything_starts(cluster, tmp_path):
    experiment = small()
    tiers = tuple(dataclasses.replace(tier, num_gpus=0.75) for tier in experiment.tiers)
    experiment = dataclasses.replace(experiment, tiers=tiers)
    with pytest.raises(ValueError, match=r"4 hosts ask for 3 GPUs.*there are 2"):
        run_all([experiment], out=tmp_path, make_runtime=lambda: RayRuntime(hosts=4))
    assert not list(tmp_path.iterdir())
