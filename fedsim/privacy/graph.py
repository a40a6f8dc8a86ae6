"""Who shares secrets with whom in a secure sum, how many of them give one back, and what can go wrong with how many.

    ring     clients in a random order: each has the k/2 next to it on either side as neighbours (a Harary graph)
    refused  some client has fewer than t neighbours that stay
    seen     some client has t neighbours that help the server, or the ring falls into parts, each summed by itself

Bell et al. 2020, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", section 3 (its properties of good
graphs), here with union bounds over the clients.
"""

import math
from collections.abc import Sequence

from scipy.stats import hypergeom

from fedsim.core.fields import refuse


def neighbours(ring: Sequence[int], degree: int | None = None) -> dict[int, tuple[int, ...]]:
    """Of each client the `degree` next to it in a ring, half of them on each side; None, or too few: all others."""
    size = len(ring)
    reach = size // 2 if degree is None else degree // 2
    steps = [step for step in range(-reach, reach + 1) if step]
    return {
        client: tuple(sorted({ring[(place + step) % size] for step in steps} - {client}))
        for place, client in enumerate(ring)
    }


def least_threshold(share: float, degree: int) -> int:
    """The least number of neighbours that is this share of them, and more than half."""
    return max(degree // 2 + 1, math.ceil(round(share * degree, 9)))


def check_threshold(threshold: int, degree: int) -> None:
    """More than half: else a server that tells two halves of the neighbours unlike things gets both of a client's
    secrets."""
    if not degree // 2 < threshold <= degree:
        refuse("threshold", threshold, f"above half of degree={degree}, and at most all of it")


def odds(clients: int, degree: int | None, threshold: float, left: int, helpers: int) -> tuple[float, float]:
    """Upper bounds of the probabilities that a sum is refused, and that a vector or a part of the sum is seen.

    - `degree`, `threshold`: as in `SecureSum`. - `left`: of the clients leave. - `helpers`: of them tell the server all
      they know. Who does either has nothing to do with the ring.
    """
    for name, value in (("left", left), ("helpers", helpers)):
        if not 0 <= value <= clients:
            refuse(name, value, f"from 0 to clients={clients}")
    k = clients - 1 if degree is None else min(degree, clients - 1)
    t = least_threshold(threshold, k)
    refused = clients * hypergeom.sf(k - t, clients - 1, left, k)
    seen = clients * hypergeom.sf(t - 1, clients - 1, helpers, k)
    if k < clients - 1:  # apart: some k/2 in a row that left or help
        gone = left + helpers
        seen += clients * math.prod(max(gone - i, 0) / (clients - i) for i in range(k // 2))
    return min(1.0, float(refused)), min(1.0, float(seen))
