"""How many hosts there are and what each asks for: by hand, and refused with both numbers."""

import pytest

from fedsim.runtime.base import Resources
from fedsim.runtime.placement import Capacity, largest, part_of, plan


FARM = Resources(custom=(("farm", 1.0),))


def test_a_host_asks_for_the_most_that_any_of_its_participants_asks_for() -> None:
    several = [Resources(1.0, 0.5, 100.0), Resources(2.0, custom=(("rack", 1.0),)), FARM]
    one = largest(several)
    assert one == Resources(2.0, 0.5, 100.0, (("farm", 1.0), ("rack", 1.0)))
    assert all(one.covers(each) for each in several)


def test_custom_resources_decide_how_many_hosts_fit() -> None:
    four, there = dict.fromkeys(range(4), FARM), Capacity(8.0, [], 1e5, {"farm": 2.0, "CPU": 8.0})
    fits = plan(four, None, there, 8)
    assert fits.groups == ((0, 1), (2, 3)) and all(request.custom == FARM.custom for request in fits.requests)
    with pytest.raises(ValueError, match=r"4 hosts ask for 4 of the resource 'farm', but there are 2"):
        plan(four, 4, there, 8)


def test_resources_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 hosts ask for 1 of the resource 'farm', but there are 0"):
        plan({0: FARM}, 1, Capacity(None, [], 1e5), 2)


def test_several_runs_share_them() -> None:
    part = part_of(Capacity(None, [], 1e5, {"farm": 2.0}), 2)
    assert part.custom == {"farm": 1.0}
    with pytest.raises(ValueError, match=r"'farm', but there are 1 for each of 2 jobs"):
        plan(dict.fromkeys(range(2), FARM), 2, part, 2)


@pytest.mark.ray
def test_hosts_that_do_not_come_are_waited_for_once(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from fedsim.runtime import Choice, ray_runtime

    for name, seconds in (("START_SECONDS", 2.0), ("SOON_SECONDS", 0.2), ("TELL_SECONDS", 0.2)):
        monkeypatch.setattr(ray_runtime, name, seconds)
    told: list[str] = []
    address = ray.get_runtime_context().gcs_address
    runtime = ray_runtime.RayRuntime(address=address, hosts=2, wait=1.0, say=told.append)
    for waited in ("2", "0.2"):
        runtime.start(lambda call: None, {0: object, 1: object}, dict.fromkeys(range(2), FARM), 1)
        with pytest.raises(RuntimeError, match=rf"^0 of 2 hosts started within {waited} s; the cluster has "):
            runtime.ask("anything")
    assert told[0] == "0 of 2 hosts are up; waiting for the cluster to bring the others"
    runtime.close()
    for arguments in ({"hosts": 2, "wait": 1.0}, {"address": address, "wait": 1.0}):
        with pytest.raises(ValueError, match=r"--wait=0\.0166667: needs --hosts, and a cluster to join"):
            Choice("ray", **arguments)


class Counting:
    """A participant that answers with its own number."""

    def __init__(self, id_: int) -> None:
        self.id, self.nbytes = id_, 0

    def tell(self, round: int, payload: object) -> int:
        return self.id


@pytest.mark.ray
@pytest.mark.parametrize("own", [False, True])
def test_a_host_that_is_gone_when_an_aggregator_begins_is_given_nothing(
    cluster: None, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    """As when one machine had both, and does not come back. `own`: every participant had a host to itself."""
    import functools

    import ray

    from fedsim.runtime import ray_call
    from fedsim.runtime.actors import Host, remote

    monkeypatch.setattr(ray_call, "MEET_SECONDS", 5.0)
    there = remote(Host).options(num_cpus=0.5).remote()
    gone = remote(Host).options(num_cpus=0.5, resources={"farm": 1}).remote()
    ray.get(there.ready.remote())
    factories = ray.put({id_: functools.partial(Counting, id_) for id_ in range(2)})
    alone = {0: 0, 1: 1} if own else {}
    call = ray_call.RayCall(
        "token", [there, gone], [Resources()] * 2, dict.fromkeys(range(2), Resources()), factories, 1, alone, 60.0, 60.0
    )
    for round in range(2):
        assert [*call("tell", round, {0: {}, 1: {}})] == [[(0, 0)], [(1, 1)]]
        assert call.unmet == {1} and [*call.returning.values()] == [1]
    assert call.retries() == 0
    actors: list = [there, gone]
    for actor in actors:
        ray.kill(actor)
