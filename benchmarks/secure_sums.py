"""Seconds and bytes of a secure sum, on one core. `python -m benchmarks.secure_sums [CLIENTS [SIZE]]`"""

import itertools
import os
import sys
import time
from collections.abc import Sequence

import numpy as np

from fedsim.privacy.fixed_point import FixedPoint
from fedsim.privacy.graph import least_threshold, neighbours
from fedsim.privacy.secure_sum import Client, Server


def measured(clients: int, size: int, numbers: FixedPoint, degree: int | None, left: Sequence[int]) -> str:
    """One sum, of which some clients leave after they have shared. **Returns:** a row of a table."""
    rng = np.random.default_rng(0)
    vectors = [rng.normal(size=size) for _ in range(clients)]
    seconds, threshold = [time.perf_counter()], least_threshold(0.5, len(neighbours(range(clients), degree)[0]))
    everyone = [Client(id_, os.urandom(32), threshold) for id_ in range(clients)]
    keys = [client.advertise() for client in everyone]
    server = Server(keys, threshold, degree)
    sealed = []
    for client in everyone:
        client.meet(server.keys_for(client.id))
        sealed.append(client.share())
        server.relay(sealed[-1])
    seconds.append(time.perf_counter())
    stayed = [client for client in everyone if client.id not in left]
    for client in stayed:
        words = numbers.encode(vectors[client.id])
        server.add(client.mask(words, server.sharers_for(client.id)))
    seconds.append(time.perf_counter())
    shares = [share for id_, question in server.questions().items() for share in everyone[id_].lift(question)]
    total = server.total(shares)
    seconds.append(time.perf_counter())
    plain = sum(numbers.encode(vectors[client.id]) for client in stayed)
    assert np.array_equal(total, plain), "not the plain sum"
    vector, texts, lifted = size * numbers.bits // 8, sum(len(each.text) for each in sealed[0]), len(shares) * 33
    parts = [f"{after - before:.2f}" for before, after in itertools.pairwise(seconds)]
    sent = [f"{count:,}" for count in (vector, 64, texts, lifted // len(stayed))]
    return row(clients, f"{size:,}", numbers.bits, degree or "all", len(left), *parts, *sent)


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    clients, size = (int(word) for word in (*sys.argv[1:], *("20", "1000000")[len(sys.argv) - 1 :]))
    sizes = "clients", "numbers", "bits", "degree", "left"
    print(
        row(*sizes, "keys and shares, s", "vectors, s", "lifting, s", "vector, B", "keys, B", "shares, B", "lifting, B")
    )
    print(row(*["---:"] * 12))
    for numbers in (FixedPoint(8.0, 24, 64), FixedPoint(8.0, 16, 32)):
        for degree, left in itertools.product((None, 10), ((), range(0, clients, 5))):
            print(measured(clients, size, numbers, degree, left))
