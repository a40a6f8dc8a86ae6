"""Which processor instructions the numerical libraries use: `portable`, the same bits on any x86-64 processor with
AVX2, or `native`, whatever they choose on the processor they find.

ATen, oneDNN and MKL pick their kernels by instruction set, so the order of their sums differs between processors. Each
reads an environment variable when it computes for the first time in a process, and never again. `docs/determinism.md`
has what was compared, and why numpy, the C library and OpenBLAS need no setting.
"""

import ctypes
import functools
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedsim.core import environment


PORTABLE, NATIVE = NUMERICS = ("portable", "native")
SETTINGS = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ONEDNN_DEFAULT_FPMATH_MODE": "STRICT",
    "MKL_CBWR": "COMPATIBLE",
}
NEEDED = ("avx2", "fma")  # the C library chooses `exp`, `log` and `pow` by FMA
IN_FORCE = {"aten": "AVX2", "mkl": "COMPATIBLE"}  # what the libraries then answer; oneDNN cannot be asked
MKL_BRANCHES = {1: "OFF", 2: "AUTO", 3: "COMPATIBLE"}  # `mkl_serv_cbwr_get`; more in mkl_types.h


def use(name: str) -> None:
    """Set what this process, and those it starts, compute with. It must come before torch computes for the first time;
    `check` tells whether it did.

    **Raises:** `ValueError` for an unknown name, or a processor that has not what `portable` needs.
    """
    if name not in NUMERICS:
        raise ValueError(f"numerics={name!r}: must be one of {', '.join(NUMERICS)}")
    if name == PORTABLE:
        if missing := lacking():
            raise ValueError(
                f"numerics='portable': needs an x86-64 processor with AVX2 and FMA, and this one has no "
                f"{' and no '.join(missing)}; numerics='native' computes on any processor"
            )
        environment.set_variables(SETTINGS)


def check(name: str) -> None:
    """**Raises:** `ValueError` if this process was to compute with portable numerics and does not."""
    found = libraries()
    wrong = [f"{library} uses {found[library]}" for library, wanted in IN_FORCE.items() if found[library] != wanted]
    if name == PORTABLE and wrong:
        raise ValueError(
            f"numerics='portable': {', '.join(wrong)} in this process, for torch had computed before, or was not built "
            "with MKL: start a new process and run there before anything is computed; or let hosts of their own "
            "compute (runtime='ray'); or say numerics='native'"
        )


def settle(name: str | None, *, here: bool, say: Callable[[str], None]) -> str:
    """Use `name` from now on. None: `FEDSIM_NUMERICS`, else portable if that can be had; if not, `say` is told why.

    - `here`: this process itself will compute, not others that it starts.

    **Raises:** `ValueError` as `use` and `check` do, with the environment as it was.
    """
    name, before = name or environment.numerics(), environment.variables(SETTINGS)
    try:
        use(name or PORTABLE)
        if here and "torch" in sys.modules:  # else nothing can have computed, and the runtime checks
            check(name or PORTABLE)
    except ValueError as error:
        environment.set_variables(before)
        if name is not None:
            raise
        say(f"computing with native numerics. {error}")
        return NATIVE
    return name or PORTABLE


def lacking() -> list[str]:
    """What portable numerics need and this processor has not."""
    return [flag for flag in NEEDED if flag not in processor_flags()]


@functools.cache
def processor_flags() -> frozenset[str]:
    """What the processor can do, as Linux names it; nothing elsewhere."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    except OSError:  # not Linux
        return frozenset()
    return frozenset()


def libraries() -> dict[str, str]:
    """What the libraries in this process compute with, from now on if they had not decided: asking makes them."""
    import torch

    try:
        mkl = ctypes.CDLL(str(Path(torch.__path__[0], "lib", "libtorch_cpu.so"))).mkl_serv_cbwr_get(1)
    except (OSError, AttributeError):
        mkl = 0
    return {
        "aten": torch.backends.cpu.get_cpu_capability(),
        "mkl": MKL_BRANCHES.get(mkl, str(mkl)) if mkl else "no MKL",
    }


def in_force(name: str) -> dict[str, Any]:
    """What is written down with a run whose hosts compute with `name`: what the libraries use, and the bits they give.

    Hosts refuse to start without what `portable` needs; this process may have computed with something else before, and
    then cannot say which bits they give (`fingerprint` None).
    """
    use(name)
    found, variables = libraries(), environment.variables(SETTINGS)
    if found == IN_FORCE and variables == SETTINGS:
        name = PORTABLE  # whatever was asked for
    elif name == PORTABLE:
        return {"name": PORTABLE, **IN_FORCE, "variables": SETTINGS, "fingerprint": None}
    known = {variable: value for variable, value in variables.items() if value is not None}
    return {"name": name, **found, "variables": known, "fingerprint": fingerprint()}


@functools.cache
def fingerprint() -> str:
    """Hash of what a small computation gives in this process: a transformer's operations, forward and backward."""
    import torch
    from torch.nn import functional

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    image, patches = torch.randn(2, 3, 16, 16, generator=random), torch.randn(48, 3, 4, 4, generator=random)
    weights = [torch.randn(48, 48, generator=random).requires_grad_() for _ in range(4)]
    x = functional.conv2d(image, patches, stride=4).flatten(2).mT
    query, key, value = (functional.linear(x, weight).unflatten(-1, (4, 12)).transpose(1, 2) for weight in weights[:3])
    x = x + functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    x = functional.gelu(functional.linear(functional.layer_norm(x, (48,)), weights[3]))
    loss = functional.cross_entropy(x.mean(1), torch.tensor([3, 7]))
    results = [loss, *torch.autograd.grad(loss, weights)]
    torch.set_num_threads(threads)
    return hashlib.sha256(b"".join(each.detach().numpy().tobytes() for each in results)).hexdigest()[:16]
