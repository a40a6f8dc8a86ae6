"""Secure aggregation: a server gets the sum of its clients' vectors, and sees none of them.

    k, t         neighbours of a client; how many of them can lift its masks together
    0 keys       u -> server   c_u^PK, s_u^PK                                two key pairs, new in every round
    1 shares     u -> v        Enc(c_uv, share_v(s_u^SK), share_v(b_u))      by the server, for neighbours v
    2 masked     u -> server   y_u = x_u + PRG(b_u) + sum_v +-PRG(s_uv)      + if u < v, else -; of v that had shared
    3 lifted     v -> server   share_v(b_u) of a u that stayed, share_v(s_u^SK) of one that left, never both

    sum of x_u = sum of y_u - PRG(b_u) -+ PRG(s_uv)                          u stayed, v left; modulo 2**bits

SecAgg (Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning", Figure 4), for a
server that follows the protocol and tries to learn from what it sees ("semi-honest"), so without signatures and
consistency check; among the neighbours in a k-regular graph instead of everybody (SecAgg+: Bell et al. 2020, "Secure
Single-Server Aggregation with (Poly)Logarithmic Overhead", a Harary graph of a random order). Here encrypted shares
wait at the server until step 3. Enc is ChaCha20-Poly1305; the rest is in `fedsim.privacy.masks`.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from fedsim.core.fields import refuse
from fedsim.privacy.graph import check_threshold, neighbours
from fedsim.privacy.masks import (
    PRIME,
    SECRET,
    add_mask,
    agreed,
    bytes_from,
    decrypted,
    encrypted,
    joined,
    public_of,
    sign_of,
    split,
)


SHARE, DRAWN = 33, 48  # bytes: of a share; of a coefficient's draw, so many that the remainder is uniform


# messages -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Keys:
    """0: a client's public keys: for what it encrypts, and for masks."""

    client: int
    cipher: bytes
    mask: bytes


@dataclasses.dataclass(frozen=True)
class Sealed:
    """1: shares of both secrets of `sender`, which `receiver` alone can read."""

    sender: int
    receiver: int
    text: bytes


@dataclasses.dataclass(frozen=True)
class Masked:
    """2: a client's vector under its masks, in words."""

    client: int
    numbers: np.ndarray


@dataclasses.dataclass(frozen=True)
class Question:
    """3, asked: which of a client's neighbours stayed, which left after they had shared; and what they had sent it."""

    stayed: tuple[int, ...]
    left: tuple[int, ...]
    sealed: tuple[Sealed, ...]


@dataclasses.dataclass(frozen=True)
class Share:
    """3, answered: what `holder` has of a secret of `owner`: of its key (`of_key` 1), or of its own mask's seed (0)."""

    holder: int
    owner: int
    of_key: int
    value: bytes


# the two roles --------------------------------------------------------------------------------------------------------


class Client:
    """One client in one sum.

    - `seed`: 32 bytes from which all is drawn that is random; of no other sum. - `threshold`: of shares that give a
      secret.
    """

    def __init__(self, id: int, seed: bytes, threshold: int) -> None:
        self.id, self.threshold = id, threshold
        size = 3 * SECRET + 2 * (threshold - 1) * DRAWN
        drawn = bytes_from(seed, size)
        self.cipher, self.mask_key, self.self_mask = (drawn[i * SECRET : (i + 1) * SECRET] for i in range(3))
        numbers = [int.from_bytes(drawn[i : i + DRAWN], "big") % PRIME for i in range(3 * SECRET, size, DRAWN)]
        self.coefficients = numbers[: threshold - 1], numbers[threshold - 1 :]
        self.keys: dict[int, Keys] = {}
        self.sharers: set[int] | None = None
        self.answered: Question | None = None

    def advertise(self) -> Keys:
        """Step 0."""
        return Keys(self.id, public_of(self.cipher), public_of(self.mask_key))

    def meet(self, keys: Sequence[Keys]) -> None:
        """Learn its neighbours' keys. **Raises:** `ValueError` for keys that are not theirs alone, or too few."""
        check_threshold(self.threshold, len(keys))
        seen = {key for each in (*keys, self.advertise()) for key in (each.cipher, each.mask)}
        if len(seen) < 2 * (len(keys) + 1) or len({self.id, *(each.client for each in keys)}) < len(keys) + 1:
            refuse("keys", [each.client for each in keys], f"of clients other than {self.id}, none of them twice")
        self.keys = {each.client: each for each in keys}

    def share(self) -> list[Sealed]:
        """Step 1."""
        points = [other + 1 for other in self.keys]
        secrets = self.mask_key, self.self_mask
        shares = [
            split(int.from_bytes(secret, "big"), coefficients, points)
            for secret, coefficients in zip(secrets, self.coefficients, strict=True)
        ]
        return [self._sealed(other, [of_secret[other + 1] for of_secret in shares]) for other in self.keys]

    def mask(self, numbers: np.ndarray, sharers: Collection[int]) -> Masked:
        """Step 2, once. `numbers`: words. `sharers`: who of its neighbours has shared."""
        if self.sharers is not None:
            refuse("masked", self.id, "a client that has masked nothing yet: the same masks twice would tell")
        if strangers := sorted({*sharers} - self.keys.keys()):
            refuse("sharers", strangers, f"neighbours of client {self.id}")
        if len({*sharers}) < self.threshold:
            refuse("sharers", len({*sharers}), f"at least threshold={self.threshold}")
        self.sharers = {*sharers}
        hidden = numbers.copy()
        add_mask(hidden, self.self_mask, 1)
        for other in sorted(self.sharers):
            key = agreed(self.mask_key, self.keys[other].mask, "mask", other)
            add_mask(hidden, key, sign_of(self.id, other))
        return Masked(self.id, hidden)

    def lift(self, question: Question) -> list[Share]:
        """Step 3. **Raises:** `ValueError`, before it says anything, for a question that would reveal a client's vector
        (both of its secrets), that is not about those it has masked with, or that is another than the first; and for a
        text that was changed, or is not from whom it is said to be."""
        stayed, left = set(question.stayed), set(question.left)
        if both := sorted(stayed & left):
            refuse("question.left", both, "clients that did not stay: both secrets of one would reveal its vector")
        if self.sharers is not None and stayed | left != self.sharers:
            refuse("question", sorted(stayed | left), f"about those client {self.id} shares masks with, all of them")
        if len(stayed) < self.threshold:
            refuse("question.stayed", len(stayed), f"at least threshold={self.threshold}")
        if self.answered is not None and (set(self.answered.stayed), set(self.answered.left)) != (stayed, left):
            refuse("question", sorted(stayed), f"the one that was answered, {sorted(self.answered.stayed)}")
        found = []
        for sealed in question.sealed:
            key, seed = self._opened(sealed)
            gone = sealed.sender in left
            found.append(Share(self.id, sealed.sender, int(gone), key if gone else seed))
        if sorted(share.owner for share in found) != sorted(stayed | left):
            refuse("question.sealed", [each.sender for each in question.sealed], "one of each, stayed or left")
        self.answered = question
        return found

    def _sealed(self, other: int, shares: Iterable[int]) -> Sealed:
        text = b"".join(share.to_bytes(SHARE, "big") for share in shares)
        return Sealed(self.id, other, encrypted(self._key(other), self.id, other, text))

    def _opened(self, sealed: Sealed) -> tuple[bytes, bytes]:
        if sealed.receiver != self.id or sealed.sender not in self.keys:
            refuse("sealed", (sealed.sender, sealed.receiver), f"from a neighbour of client {self.id}, to it")
        text = decrypted(self._key(sealed.sender), sealed.sender, self.id, sealed.text)
        return text[:SHARE], text[SHARE:]

    def _key(self, other: int) -> bytes:
        return agreed(self.cipher, self.keys[other].cipher, "shares", other)


class Server:
    """The server in one sum: it passes on what it cannot read, and adds up what is masked.

    - `keys`: of those who take part, in the order of the ring. - `degree`: neighbours of each; None: all others.
    """

    def __init__(self, keys: Sequence[Keys], threshold: int, degree: int | None = None) -> None:
        self.keys, self.threshold = {each.client: each for each in keys}, threshold
        self.neighbours = neighbours([*self.keys], degree)
        for others in self.neighbours.values():
            check_threshold(threshold, len(others))
        self.sealed: dict[int, dict[int, Sealed]] = {client: {} for client in self.keys}  # by receiver and sender
        self.sharers: set[int] = set()
        self.stayed: list[int] = []
        self.sum: np.ndarray | None = None

    def keys_for(self, client: int) -> list[Keys]:
        """Step 1, asked: the keys of a client's neighbours."""
        return [self.keys[other] for other in self.neighbours[client]]

    def relay(self, sealed: Iterable[Sealed]) -> None:
        """Step 1, answered."""
        for each in sealed:
            self.sealed[each.receiver][each.sender] = each
            self.sharers.add(each.sender)

    def sharers_for(self, client: int) -> tuple[int, ...]:
        """Step 2, asked: those of a client's neighbours that have shared."""
        return tuple(other for other in self.neighbours[client] if other in self.sharers)

    def add(self, masked: Masked) -> None:
        """Step 2, answered."""
        if masked.client in self.stayed or masked.client not in self.sharers:
            refuse("masked", masked.client, "a client that has shared, once")
        self.stayed.append(masked.client)
        if self.sum is None:
            self.sum = masked.numbers.copy()
        elif len(masked.numbers) != len(self.sum):
            refuse(f"masked of client {masked.client}", len(masked.numbers), f"{len(self.sum)} numbers, as of others")
        else:
            self.sum += masked.numbers

    def questions(self) -> dict[int, Question]:
        """Step 3, asked: of everybody who stayed. **Raises:** `ValueError` if too few stayed: then nobody is asked."""
        stayed, found = set(self.stayed), {}
        for client in self.sharers:
            there = len(stayed.intersection(self.neighbours[client]))
            if there < self.threshold and (client in stayed or there):
                self._refuse_few(client, there)
        for client in self.stayed:
            of_it = self.sharers_for(client)
            found[client] = Question(
                tuple(other for other in of_it if other in stayed),
                tuple(other for other in of_it if other not in stayed),
                tuple(self.sealed[client][other] for other in of_it),
            )
        return found

    def total(self, shares: Iterable[Share]) -> np.ndarray:
        """The sum of those who stayed. **Raises:** `ValueError` if a mask cannot be lifted with these shares."""
        assert self.sum is not None
        held: dict[tuple[int, int], dict[int, int]] = {}
        for share in shares:
            value = int.from_bytes(share.value, "big")
            held.setdefault((share.owner, share.of_key), {})[share.holder + 1] = value
        total, stayed = self.sum.copy(), set(self.stayed)
        for client in sorted(self.sharers):
            there = stayed.intersection(self.neighbours[client])
            if client in stayed:
                add_mask(total, self._secret(client, held.get((client, 0), {})), -1)
            elif there:
                key = self._secret(client, held.get((client, 1), {}))
                if public_of(key) != self.keys[client].mask:
                    refuse(f"the key of client {client}", "what shares give", "the private key of its public one")
                for other in there:
                    add_mask(total, agreed(key, self.keys[other].mask, "mask", other), sign_of(client, other))
        return total

    def _secret(self, client: int, shares: Mapping[int, int]) -> bytes:
        if len(shares) < self.threshold:
            self._refuse_few(client, len(shares))
        places = sorted(shares)
        one, other = (
            joined({point: shares[point] for point in some})
            for some in (places[: self.threshold], places[-self.threshold :])
        )
        if one != other or one >= 2 ** (8 * SECRET):
            refuse(f"shares of client {client}", len(shares), "of one secret: at least one was changed")
        return one.to_bytes(SECRET, "big")

    def _refuse_few(self, client: int, there: int) -> None:
        accepted = f"at least threshold={self.threshold}: too many have left, and nothing is summed up"
        refuse(f"neighbours of client {client} that stayed", there, accepted)
