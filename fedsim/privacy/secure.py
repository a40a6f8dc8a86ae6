"""Pairs around methods that average: the aggregator gets a sum of fixed-point numbers, and sees no client's own.

    client   x_k = w_k * round(2**fraction * clip(update_k)), and w_k
    server   sum of x_k, and of w_k, modulo 2**bits: what the method takes its mean of

`FixedPointSum` sends x_k as it is; `SecureSum` under masks, which are lifted from the sum alone. With equal `numbers`
both give the same bits, whoever drops out. A round of `SecureSum` has four exchanges (`fedsim.privacy.secure_sum`):
keys and shares of them before the payload is sent, the update, and shares of those who stayed.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithm import (
    Algorithm,
    ClientContext,
    ClientInfo,
    ClientUpdate,
    Partial,
    Payload,
    ServerContext,
    State,
)
from fedsim.core import tree as trees
from fedsim.core.fields import check_range, check_types, refuse
from fedsim.experiment import Experiment
from fedsim.privacy.fixed_point import FixedPoint
from fedsim.privacy.graph import least_threshold
from fedsim.privacy.masks import SECRET, add_mask, derived
from fedsim.privacy.pair import CUT, Arriving, Pair
from fedsim.privacy.secure_sum import Client, Keys, Masked, Question, Sealed, Server, Share


T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class WordSum(Pair):
    """What both pairs have in common: updates are sent as words, and only a sum of them can be read.

    - `numbers`: what is added up.
    """

    numbers: FixedPoint = FixedPoint()

    def __post_init__(self) -> None:
        check_types(self, "pair")

    @property
    def each(self) -> bool:
        return True

    @property
    def hides(self) -> bool:
        return True

    def check(self, algorithm: Algorithm, participants: int) -> None:
        check_averages(algorithm)
        self.numbers.check(participants)


@dataclasses.dataclass(frozen=True)
class FixedPointSum(WordSum):
    """The encoding of `SecureSum` without its masks: what it costs in accuracy. The last of a method's pairs."""

    def begin(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> State:
        return {"clients": torch.tensor([client.id for client in cohort])}

    def sent(self, state: State, ctx: ServerContext) -> State:
        return state

    def client(self, update: ClientUpdate, payload: Payload, sent: State, ctx: ClientContext) -> ClientUpdate:
        return encoded(update, self.numbers, len(sent.get("clients", [0])))

    def server(self, updates: Arriving, state: State, payload: Any, ctx: ServerContext) -> tuple[Arriving, State]:
        total = np.zeros((), self.numbers.word)

        def add(client: int, words: np.ndarray) -> None:
            nonlocal total
            total = total + words

        others, like = read(updates, add)
        return [*others, *([decoded(total, like, self.numbers)] if like else [])], {}


@dataclasses.dataclass(frozen=True)
class SecureSum(WordSum):
    """Secure aggregation (`fedsim.privacy.secure_sum`). The last of a method's pairs.

    - `degree`: neighbours of each client, an even number; None: all others.
    - `threshold`: share of the neighbours, more than half of them, who lift a client's masks together. Where fewer stay
      the sum is refused, and the run ends; where so many help the server, it can look into an update.
    - `deployable`: keys come from the operating system. Else from the seed, which the server knows, so that nothing is
      secret; sums are the same.
    """

    degree: int | None = None
    threshold: float = 2 / 3
    deployable: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "pair", "degree", least=2)
        check_range(self, "pair", "threshold", least=0.5, most=1)
        if self.degree is not None and self.degree % 2:
            refuse("pair.degree", self.degree, "even: half of the neighbours are on each side in a ring")

    # at the aggregator ----------------------------------------------------------------------------------------------

    def check_experiment(self, experiment: Experiment) -> None:
        if experiment.sampling == "poisson":
            refuse("sampling", experiment.sampling, "'fixed' with SecureSum: a round may be of one, who has no mask")

    def begin(self, state: State, cohort: Sequence[ClientInfo], ctx: ServerContext) -> State:
        """Steps 0 and 1."""
        if not cohort:
            return {}
        assert ctx.ask is not None
        session = self._drawn(ctx)
        answers = ctx.ask({client.id: {"session": session} for client in cohort})
        keys = [key for answer in answers.values() for key in unpacked(Keys, answer)]
        keys = [keys[place] for place in np.random.default_rng(session.numpy()).permutation(len(keys))]  # the ring
        server = self._server(keys)
        asked = {key.client: {"session": session, "keys": packed(Keys, server.keys_for(key.client))} for key in keys}
        sealed = [text for answer in ctx.ask(asked).values() for text in unpacked(Sealed, answer)]
        return {"session": session, "keys": packed(Keys, keys), "sealed": packed(Sealed, sealed)}

    def sent(self, state: State, ctx: ServerContext) -> State:
        """Step 2, asked."""
        if not state:
            return {}
        sharers = torch.unique(state["sealed"]["sender"])
        return {"session": state["session"], "keys": state["keys"], "sharers": sharers}

    def server(self, updates: Arriving, state: State, payload: Any, ctx: ServerContext) -> tuple[Arriving, State]:
        """Step 2, answered, and step 3."""
        if not state:  # of a round without a cohort, or of a run that is only being counted
            others, like = read(updates, lambda client, words: None)
            assert not like or ctx.ask is None, "an update of a round that had not begun"
            return others, {}
        assert ctx.ask is not None
        server = self._server(unpacked(Keys, state["keys"]))
        server.relay(unpacked(Sealed, state["sealed"]))
        others, like = read(updates, lambda client, words: server.add(Masked(client, words)))
        if not like:
            return others, {}
        asked = {
            client: {
                "session": state["session"],
                "keys": packed(Keys, server.keys_for(client)),
                "stayed": torch.tensor(question.stayed, dtype=torch.int64),
                "left": torch.tensor(question.left, dtype=torch.int64),
                "sealed": packed(Sealed, question.sealed),
            }
            for client, question in server.questions().items()
        }
        shares = [share for answer in ctx.ask(asked).values() for share in unpacked(Share, answer)]
        return [*others, decoded(server.total(shares), like, self.numbers)], {}

    def _server(self, keys: Sequence[Keys]) -> Server:
        if len(keys) < 2:
            refuse("participants of a secure sum", len(keys), "at least 2: a sum of one is no secret")
        degree = len(keys) - 1 if self.degree is None else min(self.degree, len(keys) - 1)
        return Server(keys, least_threshold(self.threshold, degree), self.degree)

    # at a participant -----------------------------------------------------------------------------------------------

    def keeps(self, ctx: ClientContext) -> State:
        return {"secret": self._drawn(ctx)} if self.deployable else {}

    def answer(self, question: Payload, kept: State, ctx: ClientContext) -> State:
        """Steps 0, 1 and 3, by what the question holds. Nothing is remembered between them: it all follows from the
        client's secret and the server's session, so that a process that was lost can be replaced."""
        if "keys" not in question:
            return packed(Keys, [self._client(question, kept, (), ctx).advertise()])
        client = self._client(question, kept, unpacked(Keys, question["keys"]), ctx)
        if "sealed" not in question:
            return packed(Sealed, client.share())
        stayed, left = (tuple(question[name].tolist()) for name in ("stayed", "left"))
        return packed(Share, client.lift(Question(stayed, left, tuple(unpacked(Sealed, question["sealed"])))))

    def client(self, update: ClientUpdate, payload: Payload, sent: State, ctx: ClientContext) -> ClientUpdate:
        """Step 2."""
        counted = "keys" not in sent
        update = encoded(update, self.numbers, 1 if counted else len(sent["keys"]["client"]))
        if not update.tree:
            return update
        words = words_of(update.tree)
        if counted:  # of a run that is only being counted: nobody can lift this mask
            add_mask(words, _text(self._drawn(ctx)), 1)
            return dataclasses.replace(update, tree=filled(update.tree, words))
        keys = {each.client: each for each in unpacked(Keys, sent["keys"])}
        if ctx.info.id not in keys:
            refuse("keys", sorted(keys), f"of client {ctx.info.id}, too, which did not answer when they were asked for")
        others = self._server([*keys.values()]).neighbours[ctx.info.id]
        client = self._client(sent, sent, [keys[other] for other in others], ctx)
        masked = client.mask(words, {*sent["sharers"].tolist()}.intersection(others))
        return dataclasses.replace(update, tree=filled(update.tree, masked.numbers))

    def _client(self, question: Payload, kept: State, keys: Sequence[Keys], ctx: ClientContext) -> Client:
        """The protocol's client, as it stands once it knows its neighbours' keys."""
        secret = kept["secret"] if self.deployable else self._drawn(ctx)
        seed = derived(_text(secret), b"session " + _text(question["session"]))
        client = Client(ctx.info.id, seed, least_threshold(self.threshold, len(keys)))
        if keys:
            client.meet(keys)
        return client

    def _drawn(self, ctx: ClientContext | ServerContext) -> Tensor:
        """32 bytes that nobody else has, or in a simulation those of a stream."""
        if self.deployable:
            return _bytes(os.urandom(SECRET))
        return torch.randint(256, (SECRET,), generator=ctx.generator("secure sum"), dtype=torch.uint8)


# updates as words -----------------------------------------------------------------------------------------------------


def check_averages(algorithm: Algorithm) -> None:
    """Refuse a method whose server needs more than the weighted sum of what clients send."""
    if type(algorithm).combine is Algorithm.combine or algorithm.updates_vary:
        refuse("algorithm", algorithm.name, "a method that averages: only a sum of updates is known, of equal shapes")


def encoded(update: ClientUpdate, numbers: FixedPoint, clients: int) -> ClientUpdate:
    """`{"weight": w, "numbers": w * update}` in words, of weight 1; what holds no tensors stays as it is.

    **Raises:** `ValueError` for what is not floats, of a whole weight, and if a sum of `clients` alike may overflow.
    """
    if not update.tree:
        return update
    weight = int(update.weight)
    if weight != update.weight:
        refuse(f"the weight of client {update.client}", update.weight, "a whole number")
    numbers.check(weight * clients)
    tree, beyond = {}, 0
    for name, tensor in trees.flat(update.tree).items():
        if not tensor.is_floating_point():
            refuse(f"ClientUpdate.tree[{name!r}]", tensor.dtype, "of floats")
        values = tensor.detach().cpu().double().numpy()
        beyond += int((np.abs(values) > numbers.clip).sum())
        tree[name] = _tensor(numbers.encode(values, weight))
    sent = {"weight": _tensor(np.array([weight], numbers.word)), "numbers": trees.nested(tree)}
    metrics = {**update.metrics, CUT: beyond / max(trees.numel(update.tree), 1)}
    return ClientUpdate(update.client, sent, 1, metrics)


def decoded(total: np.ndarray, like: State, numbers: FixedPoint) -> Partial:
    """The sum that a method sees."""
    tree = filled(like, total)
    return Partial(
        {
            name: torch.from_numpy(numbers.decode(tensor.numpy().view(numbers.word)))
            for name, tensor in trees.flat(tree["numbers"]).items()
        },
        int(tree["weight"]),
    )


def words_of(tree: State) -> np.ndarray:
    """All words in one vector, in order of name."""
    parts = [tensor.numpy().reshape(-1) for _, tensor in sorted(trees.flat(tree).items())]
    return np.concatenate([part.view(f"<u{part.itemsize}") for part in parts])


def filled(like: State, words: np.ndarray) -> State:
    """A state of the names and shapes of another, and of these words."""
    tree, start = {}, 0
    for name, tensor in sorted(trees.flat(like).items()):
        tree[name] = _tensor(words[start : start + tensor.numel()].reshape(tensor.shape))
        start += tensor.numel()
    return trees.nested(tree)


def read(updates: Arriving, add: Callable[[int, np.ndarray], None]) -> tuple[list[ClientUpdate], State]:
    """Have the words of every update added. **Returns:** updates without any; and one that had them, if there is."""
    others, like = [], {}
    for update in updates:
        assert isinstance(update, ClientUpdate), "a sum cannot be masked"
        if not update.tree:
            others.append(update)
            continue
        add(update.client, words_of(update.tree))
        like = update.tree
    return others, like


def _tensor(words: np.ndarray) -> Tensor:
    """Words as they are sent: torch adds signed ones."""
    return torch.from_numpy(words.view(f"<i{words.itemsize}").copy())


# messages as tensors --------------------------------------------------------------------------------------------------


def packed(kind: type, records: Sequence[Any]) -> State:
    """Messages of one kind as int64 and, of their bytes, uint8 tensors, by name of field."""
    columns = {}
    for field in dataclasses.fields(kind):
        values = [getattr(record, field.name) for record in records]
        columns[field.name] = (
            _bytes(b"".join(values)).reshape(len(values), -1)
            if values and field.type is bytes
            else torch.tensor(values, dtype=torch.int64)
        )
    return columns


def unpacked(kind: type[T], tree: Mapping[str, Any]) -> list[T]:
    columns = [tree[field.name].cpu() for field in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]
    rows = [[row.numpy().tobytes() for row in col] if col.dtype is torch.uint8 else col.tolist() for col in columns]
    return [kind(*row) for row in zip(*rows, strict=True)]


def _text(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
