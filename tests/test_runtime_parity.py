"""The same experiment gives the same bits inline and on Ray, on any number of hosts."""

import dataclasses

import pytest
import ray

import fedsim
from fedsim.experiment import Experiment
from fedsim.results import Results
from fedsim.runner import run_all
from fedsim.runtime.inline import InlineRuntime
from fedsim.runtime.ray_runtime import RayRuntime
from tests.disturbed import small, without_federation


pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster():
    """One private Ray for the module, with more logical CPUs and GPUs than the machine has."""
    ray.init(address="local", num_cpus=8, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Rounds of both experiments, computed inline."""
    out = tmp_path_factory.mktemp("inline")
    return results_of([small(), without_federation()], out, InlineRuntime)


def results_of(experiments: list[Experiment], out, make_runtime) -> Results:
    assert run_all(experiments, out=out, make_runtime=make_runtime) == []
    return fedsim.load(out)


def sha256s(results) -> dict:
    return results.rounds.set_index(["run_id", "round"]).state_sha256.to_dict()


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_state_is_equal_bit_by_bit_in_every_round(cluster, reference, tmp_path, hosts):
    results = results_of([small(), without_federation()], tmp_path, lambda: RayRuntime(hosts=hosts))
    assert sha256s(results) == sha256s(reference)
    assert len(sha256s(results)) == 8
    assert results.clients.host.nunique() == hosts
    same = ["accuracy", "accuracy_local", "accuracy_val", "loss", "train_loss", "bytes_up", "bytes_down", "flops"]
    keys = ["run_id", "round", "client"]
    left, right = (r.clients.set_index(keys).sort_index()[same] for r in (results, reference))
    assert left.equals(right)


def test_hash_is_not_blind(reference):
    """Every round of either method has a hash of its own: equality above means something."""
    hashes = list(sha256s(reference).values())
    assert len(set(hashes)) == len(hashes)


def test_runtime_counts_the_bytes_that_participants_count(reference):
    rounds = reference.rounds
    assert (rounds.bytes_up == rounds.seam_bytes_up).all() and (rounds.bytes_down == rounds.seam_bytes_down).all()
    assert rounds[(rounds.algorithm == "fedgrow") & (rounds["round"] > 0)].bytes_up.gt(0).all()
    assert rounds[rounds.algorithm == "fedgrow_no_federation"].bytes_up.eq(0).all()


def test_participants_are_actors_with_a_fraction_of_a_gpu(cluster, tmp_path):
    tiers = tuple(dataclasses.replace(tier, num_gpus=0.5) for tier in small().tiers)
    experiment = dataclasses.replace(small(), tiers=tiers, participants=3, rounds=1)
    free = []

    class Watching(RayRuntime):
        def ask(self, *args, **kwargs):
            free.append(ray.available_resources().get("GPU", 0.0))
            return super().ask(*args, **kwargs)

    results = results_of([experiment], tmp_path, Watching)
    assert results.clients.host.nunique() == 3, "three halves fit on two logical GPUs: one actor a participant"
    assert free[0] == pytest.approx(2 - 3 * 0.5)


def test_what_does_not_fit_is_refused_with_both_numbers_before_anything_starts(cluster, tmp_path):
    experiment = small()
    tiers = tuple(dataclasses.replace(tier, num_gpus=0.75) for tier in experiment.tiers)
    experiment = dataclasses.replace(experiment, tiers=tiers)
    with pytest.raises(ValueError, match=r"4 hosts ask for 3 GPUs.*there are 2"):
        run_all([experiment], out=tmp_path, make_runtime=lambda: RayRuntime(hosts=4))
    assert not list(tmp_path.iterdir())


def test_participants_share_hosts_when_they_do_not_all_fit(cluster, tmp_path):
    tiers = tuple(dataclasses.replace(tier, num_gpus=1.0) for tier in small().tiers)
    experiment = dataclasses.replace(small(), tiers=tiers, rounds=1)
    said = []
    results = results_of([experiment], tmp_path, lambda: RayRuntime(say=said.append))
    assert results.clients.host.nunique() == 2, "two whole GPUs, two hosts"
    assert said == ["6 participants share 2 hosts, up to 3 on each"]
