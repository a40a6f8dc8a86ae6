"""Where runs are computed. `make_runtime` is the only place that chooses, and Ray is imported only when chosen."""

from collections.abc import Callable

from fedsim.runtime.base import Runtime


RUNTIMES = ("ray", "inline")


def make_runtime(
    name: str,
    *,
    address: str | None = None,
    hosts: int | None = None,
    gpus: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Runtime:
    """A runtime by name; `address`, `hosts` and `gpus` (logical GPUs of a private Ray) concern Ray alone."""
    if name == "inline":
        from fedsim.runtime.inline import InlineRuntime

        return InlineRuntime()
    from fedsim.runtime.ray_runtime import RayRuntime

    return RayRuntime(address=address, hosts=hosts, num_gpus=gpus, say=say)
