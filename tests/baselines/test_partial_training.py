"""Methods of partial training: who trains what, what the server makes of it, and when it is FedAvg."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fedsim.testing
from baselines.fedavg import FedAvg
from baselines.fedbrb_like import FedBRBLike
from baselines.federated_dropout import FederatedDropout
from baselines.fedrolex import FedRolex
from baselines.fjord import FjORD
from baselines.heterofl import HeteroFL, heterofl_clean
from benchmarks.suites import tiny
from fedsim.algorithm import Algorithm, ClientUpdate
from fedsim.core.submodel import Cut, ScatterMean, join_fused, split_fused, split_specs
from fedsim.core.tree import Tree, nbytes, numel, sha256
from fedsim.data.config import Split, digits
from fedsim.data.text import BYTE_END, BYTE_MASK, BYTE_PADDING, IGNORED
from fedsim.engine.cohort import cohort_of, federation_sha256, members
from fedsim.learning.coverage import covered_of, model_of, start
from fedsim.learning.meter import StepCost
from fedsim.learning.rates import cut_at, sub_form
from fedsim.learning.server_opt import AVERAGE
from fedsim.learning.task import Batch, Task, TaskConfig, load_task, subset
from fedsim.models import Form
from tests.support.clients import asked_of
from tests.support.cutting import Kept, assert_aligned, kept_by, shapes_of
from tests.support.family_rows import ROWS, batch_of, examples, random_tree


VIT = TaskConfig(digits(limit=36), patch_size=4)
TARGET = Form(16, 2, heads=2, mlp=24)
RATES = (1.0, 1 / 2, 1 / 4)
LOCAL: dict[str, Any] = {"lr": 1e-2, "epochs": 1, "batch_size": 8, "rates": RATES}


def local(**changes: Any) -> dict[str, Any]:
    """Fields of local training."""
    return LOCAL | changes


METHODS: dict[str, Algorithm] = {
    "heterofl": HeteroFL(**LOCAL),
    "heterofl_clean": heterofl_clean(**LOCAL),
    "fedrolex": FedRolex(**LOCAL),
    "fedrolex-back": FedRolex(**LOCAL, step=-3, by_examples=True),
    "fjord": FjORD(**LOCAL),
    "federated_dropout": FederatedDropout(**LOCAL),
    "federated_dropout-half": FederatedDropout(**LOCAL, keep=0.5),
    "fedbrb_like": FedBRBLike(**LOCAL),
    "fedbrb_like-spread": FedBRBLike(**LOCAL, clock="spread", broadcast=0.0),
}


@pytest.fixture(autouse=True)
def _uncounted(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting a step takes longer than these trainings do."""
    monkeypatch.setattr(StepCost, "measured", staticmethod(lambda *arguments: StepCost((0, 0), (1, 1))))


class Federation(fedsim.testing.Federation):
    """Participants of some rates, whose own forms are those of their sub-models. Shards of 6, 12, 18 digits in turn."""

    def __init__(
        self,
        algorithm: Algorithm,
        rates: Sequence[float] = RATES,
        task: Task | None = None,
        target: Form = TARGET,
        shards: Sequence[Split] | None = None,
        seed: int = 0,
    ) -> None:
        task = task or load_task(VIT, None)
        self.rates, self.forms = rates, [sub_form(task, target, rate) for rate in rates]
        shards = shards or shards_of_digits(task, len(rates))
        super().__init__(algorithm, self.forms, target, target, task=task, shards=shards, seed=seed)

    def payloads(self, round: int, cohort: Sequence[int] | None = None, state: Tree | None = None) -> dict[int, Tree]:
        chosen = [self.clients[id_] for id_ in (range(len(self.clients)) if cohort is None else cohort)]
        server = self.server if state is None else state
        sent = self.algorithm.server_broadcast(server, chosen, self.at_server(round))
        return {id_: dict(payload) for id_, payload in sent.items()}

    def model(self) -> Tree:
        return model_of(self.server)

    def kept(self, round: int, client: int) -> Kept:
        """Which coordinates a client has in a round, read off what it is sent."""
        form = sub_form(self.task, self.target, self.rate(client))
        extract = lambda tree: self.payloads(round, [client], start(tree, AVERAGE))[client]  # noqa: E731
        return kept_by(self.task, self.target, form, extract)

    def rate(self, client: int) -> float:
        keep = getattr(self.algorithm, "keep", None)
        return self.rates[client] if keep is None else keep

    def form(self, client: int) -> Form:
        return sub_form(self.task, self.target, self.rate(client))

    def pretend(self, round: int, values: Mapping[int, float]) -> None:
        """A round in which all that a client sends is one number."""
        sent = self.payloads(round, [*values])
        trees = {id_: {name: torch.full_like(t, values[id_]) for name, t in sent[id_].items()} for id_ in values}
        self.server = self.aggregate(round, [ClientUpdate(id_, trees[id_], self.weight(id_)) for id_ in values])

    def weight(self, client: int) -> int:
        """In a mean: examples, but for the methods whose papers count participants."""
        return self.clients[client].num_examples if getattr(self.algorithm, "by_examples", True) else 1

    def pretended_coverage(self, rounds: int) -> list[Tree]:
        """What was trained in each round, where everyone takes part and trains all it has."""
        state, covered = self.server, []
        for round in range(1, rounds + 1):
            updates = [ClientUpdate(id_, tree, 1.0) for id_, tree in self.payloads(round).items()]
            covered.append(covered_of(self.algorithm.server_aggregate(state, iter(updates), self.at_server(round))))
        return covered


def shards_of_digits(task: Task, number: int) -> list[Split]:
    assert task.dataset is not None
    index = torch.arange(36).numpy()
    parts = (index[:6], index[6:18], index[18:])
    return [subset(task.dataset.train, parts[id_ % 3]) for id_ in range(number)]


def of_row(name: str, algorithm: Algorithm, rates: Sequence[float] = RATES, **fields: Any) -> Federation:
    """A federation of a row of families, in which everyone has the row's examples."""
    row = ROWS[name]
    shards = fields.pop("shards", [examples(row.task)] * len(rates))
    return Federation(algorithm, rates, row.task, fields.pop("target", row.larger), shards, **fields)


def parts(task: Task, form: Form, tree: Mapping[str, Tensor]) -> Tree:
    return split_fused(tree, task.specs(form), form.axes)


def index_of(kept: Kept, name: str, dimensions: int) -> tuple[Tensor, ...]:
    """The index of a sub-model's part of a parameter in the whole one."""
    lists = [torch.tensor(kept[name, d]) for d in range(dimensions)]
    return tuple(torch.meshgrid(*lists, indexing="ij"))


def close(left: Mapping[str, Tensor], right: Mapping[str, Tensor], atol: float, but: str = " ") -> bool:
    assert left.keys() == right.keys()
    return all(torch.allclose(left[n], right[n], rtol=0, atol=atol) for n in left if but not in n)


# who trains what ------------------------------------------------------------------------------------------------------


# In the families that have least in common, no more: what others show of the method says enough.
VARIANTS = ("heterofl_clean", "fedrolex-back", "federated_dropout-half", "fedbrb_like-spread")
IN_FAMILIES = [(r, m) for r in ROWS for m in METHODS if m not in VARIANTS or r in ("vit", "gpt2-lm", "llama-text")]


@pytest.mark.parametrize("row, method", IN_FAMILIES)
def test_sub_models_are_networks_in_every_family_and_round(row: str, method: str) -> None:
    """What meets in a sub-model is one coordinate of the model, and it is the one that goes back to its place."""
    federation = of_row(row, METHODS[method], (1 / 4, 1 / 2))
    task, target = federation.task, federation.target
    for round in (0, 1, 7):
        for client in (0, 1):
            form, kept = federation.form(client), federation.kept(round, client)
            assert {n: t.shape for n, t in federation.payloads(round)[client].items()} == shapes_of(task, form)
            assert_aligned(task, target, form, kept)


@pytest.mark.parametrize("row, method", IN_FAMILIES)
def test_a_round_in_every_family_is_the_mean_of_each_coordinate(row: str, method: str) -> None:
    """The server changes, to the mean computed by hand from what was sent, wherever somebody vouches for it."""
    algorithm: Any = METHODS[method]
    if isinstance(algorithm, FedBRBLike):
        algorithm = dataclasses.replace(algorithm, broadcast=0.0)
    shards = [examples(ROWS[row].task, size) for size in (3, 5)]
    federation = of_row(row, algorithm, (1 / 2, 1 / 4), shards=shards)
    task, target = federation.task, federation.target
    before = federation.model()
    updates = federation.run(3)
    unweighted = method in ("heterofl", "fedrolex")
    assert [update.weight for update in updates] == ([1, 1] if unweighted else [3, 5])

    sums = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in parts(task, target, before).items()}
    weights, specs = {name: torch.zeros_like(tensor) for name, tensor in sums.items()}, split_specs(task.specs(target))
    for client, update in enumerate(updates):
        rows = update.tree.get("rows", {})
        assert bool(rows) == (method == "heterofl")
        tree = {name: tensor for name, tensor in update.tree.items() if name != "rows"}
        kept = federation.kept(3, client)
        for name, tensor in parts(task, federation.form(client), tree).items():
            weight = torch.full_like(tensor, update.weight, dtype=torch.float64)
            for d, text in enumerate(specs[name].dims):
                if text.removeprefix("=") in rows and text.startswith("="):
                    vouched = rows[text.removeprefix("=")].double()
                    weight = (weight.movedim(d, -1) * vouched).movedim(-1, d)
            at = index_of(kept, name, tensor.ndim)
            sums[name].index_put_(at, weight * tensor.double(), accumulate=True)
            weights[name].index_put_(at, weight, accumulate=True)
    old, covered = parts(task, target, before), covered_of(federation.server)
    expected = {n: torch.where(weights[n] > 0, sums[n] / weights[n], old[n].double()).float() for n in sums}
    joined = join_fused(expected, task.specs(target))
    assert close(federation.model(), joined, atol=1e-7)
    assert all(
        torch.equal(covered[n], m)
        for n, m in join_fused({n: w > 0 for n, w in weights.items()}, task.specs(target)).items()
    )
    for name, tensor in federation.model().items():
        assert torch.equal(tensor[~covered[name]], before[name][~covered[name]]), "nobody has it: as it was"
    moved = [n for n, tensor in federation.model().items() if not torch.equal(tensor, before[n])]
    still = {*before} - {*moved}
    assert all("bias" in name or "type" in name or "position" in name for name in still), still


@pytest.mark.parametrize("method", ["heterofl", "heterofl_clean", "fjord"])
def test_windows_that_stay_are_nested_prefixes(method: str) -> None:
    federation = Federation(METHODS[method])
    large, middle, little = (federation.kept(1, client) for client in range(3))
    assert federation.kept(9, 2) == little
    for key, coordinates in little.items():
        assert {*coordinates} <= {*middle[key]} <= {*large[key]}
    fc1 = "vit.layers.1.mlp.fc1.weight"
    assert (little[fc1, 0], little[fc1, 1]) == ([*range(6)], [*range(4)])
    assert middle["vit.layers.0.attention.q_proj.bias", 0] == [0, 1, 2, 3, 8, 9, 10, 11], "half of each head"


@pytest.mark.parametrize("step", [1, 5, -1])
def test_windows_that_roll_are_of_one_piece_and_begin_alike(step: int) -> None:
    federation = Federation(FedRolex(**LOCAL, step=step))
    fc1 = "vit.layers.0.mlp.fc1.weight"
    for round in (1, 2, 8, 30):
        first = step * (round - 1)
        for client, sizes in enumerate([(24, 16), (12, 8), (6, 4)]):
            kept = federation.kept(round, client)
            assert kept[fc1, 0] == [(first + i) % 24 for i in range(sizes[0])]
            assert kept[fc1, 1] == [(first + i) % 16 for i in range(sizes[1])]
            head = [(first + i) % 8 for i in range(sizes[1] // 2)]
            assert kept["vit.layers.1.attention.k_proj.weight", 0] == head + [8 + i for i in head]
    assert federation.kept(0, 2) == federation.kept(1, 2), "what is scored first is what is trained first"


@pytest.mark.parametrize("method", METHODS)
def test_participants_of_one_rate_have_one_sub_model_unless_it_is_drawn_or_spread(method: str) -> None:
    federation = Federation(METHODS[method], (1 / 2, 1 / 2, 1 / 4))
    sent = federation.algorithm.server_broadcast(federation.server, federation.clients, federation.at_server(2))
    assert (sent[0] is sent[1]) == (method not in ("federated_dropout", "federated_dropout-half", "fedbrb_like-spread"))
    assert {n: t.shape for n, t in sent[0].items()} == {n: t.shape for n, t in sent[1].items()}
    assert sha256(federation.payloads(2)[0]) == sha256(dict(sent[0])), "as often as it is asked"


def test_dropout_draws_for_each_participant_round_and_block() -> None:
    federation = Federation(METHODS["federated_dropout"], (1 / 2, 1 / 2))
    fc1, query = "vit.layers.{}.mlp.fc1.bias", "vit.layers.{}.attention.q_proj.bias"
    one, again, other, later = (federation.kept(*at) for at in ((1, 0), (1, 0), (1, 1), (2, 0)))
    assert one == again != other
    for lists in (other, later):
        for name in (fc1.format(0), query.format(1), "vit.layernorm.weight"):
            assert lists[name, 0] != one[name, 0]
    assert one[fc1.format(0), 0] != one[fc1.format(1), 0], "each block has a list of its own"
    assert one[query.format(0), 0] != one[query.format(1), 0]
    assert all(coordinates == sorted(coordinates) for coordinates in one.values())
    assert Federation(METHODS["federated_dropout"], (1 / 2, 1 / 2), seed=1).kept(1, 0) != one


# how much of the model is ever trained --------------------------------------------------------------------------------


def share(masks: Sequence[Tree], name: str) -> float:
    return float(torch.stack([mask[name] for mask in masks]).any(0).double().mean())


def test_rolling_in_lock_step_never_covers_a_matrix() -> None:
    """256 coordinates, windows of 16: a weight is trained if its coordinates lie less than 16 apart: 31 of 256."""
    target = Form(256, 1, heads=1, mlp=256, head_dim=2)
    federation = Federation(FedRolex(rates=(1 / 16,)), (1 / 16,), target=target)
    covered = federation.pretended_coverage(256)
    fc1 = torch.stack([mask["vit.layers.0.mlp.fc1.weight"] for mask in covered]).any(0)
    assert float(fc1.double().mean()) == 0.12109375 == (2 * 16 - 1) / 256
    apart = (torch.arange(256)[:, None] - torch.arange(256)).abs()
    assert torch.equal(fc1, torch.minimum(apart, 256 - apart) < 16)
    assert share(covered, "vit.layers.0.mlp.fc1.bias") == 1.0
    assert share(covered, "classifier.weight") == 1.0


@pytest.mark.parametrize("rate", [1 / 2, 1 / 4])
def test_windows_that_stay_cover_the_square_of_the_largest_rate(rate: float) -> None:
    federation = Federation(METHODS["heterofl_clean"], (rate, 1 / 4))
    covered = federation.pretended_coverage(3)
    for name in ("mlp.fc1.weight", "mlp.fc2.weight", "attention.q_proj.weight", "attention.o_proj.weight"):
        assert share(covered, f"vit.layers.1.{name}") == rate**2
    assert share(covered, "vit.layernorm.weight") == rate
    assert share(covered, "classifier.bias") == 1.0


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("row", ["vit", "bert-text", "gpt2-text", "llama-lm"])
def test_rolling_blocks_cover_everything_equally_often(row: str, n: int) -> None:
    """In n^2 rounds: n^2 visits of what has no width, n of each block of vectors, one of each block of matrices."""
    heads = Form(24, 1, heads=2, mlp=36) if row != "llama-lm" else Form(48, 1, heads=12, kv_heads=12, mlp=36)
    federation = of_row(row, FedBRBLike(rates=(1 / n,), broadcast=0.0), (1 / n,), target=heads)
    visits: Tree = {}
    for mask in federation.pretended_coverage(n * n):
        visits = {name: visits.get(name, torch.zeros(())) + covered.int() for name, covered in mask.items()}
    dimensions = {
        name: [dim for dim in spec.dims if dim[:1] not in ("", "=")]
        for name, spec in federation.task.specs(heads).items()
    }
    for name, counts in visits.items():
        width = len(dimensions[name])
        assert (counts == n ** (2 - width)).all(), name
    assert {len(dims) for dims in dimensions.values()} >= {1, 2}
    if row == "bert-text":
        assert dimensions["bert.pooler.dense.weight"] == ["pooled:embed", "<embed"]


def test_blocks_of_a_matrix_before_a_tied_head_are_in_lock_step() -> None:
    """What BERT's transform makes is compared with token embeddings coordinate by coordinate."""
    n, form = 3, Form(24, 1, heads=2, mlp=36)
    federation = of_row("bert-mlm", FedBRBLike(rates=(1 / n,), broadcast=0.0), (1 / n,), target=form)
    covered = federation.pretended_coverage(n * n)
    assert share(covered, "cls.predictions.transform.dense.weight") == 1 / n
    assert share(covered, "bert.encoder.layer.0.intermediate.dense.weight") == 1.0
    for round in range(1, n * n + 1):
        kept = federation.kept(round, 0)
        of_stream = kept["bert.embeddings.word_embeddings.weight", 1]
        assert kept["cls.predictions.transform.dense.weight", 0] == of_stream


def test_blocks_of_a_spread_clock_are_apart() -> None:
    federation = Federation(FedBRBLike(rates=(1 / 2,), clock="spread"), (1 / 2,) * 5)
    fc1 = "vit.layers.0.mlp.fc1.weight"
    blocks = [(kept[fc1, 1][0] // 8, kept[fc1, 0][0] // 12) for kept in (federation.kept(1, i) for i in range(5))]
    assert blocks == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 0)], "in block, out block"
    sent = federation.algorithm.server_broadcast(federation.server, federation.clients, federation.at_server(1))
    assert sent[0] is sent[4], "equal blocks are one payload"


def test_dropout_covers_more_and_more() -> None:
    """A weight of a matrix is kept with probability 1/16: after T rounds, 1 - (15/16)^T of them are expected."""
    federation = Federation(FederatedDropout(rates=(1 / 4,)), (1 / 4,))
    covered = federation.pretended_coverage(160)
    fc1 = "vit.layers.0.mlp.fc1.weight"
    shares = [share(covered[:rounds], fc1) for rounds in (1, 10, 40, 160)]
    assert shares[0] == 1 / 16
    assert shares == sorted(shares)
    assert shares[1] == pytest.approx(1 - (15 / 16) ** 10, abs=0.12)
    assert shares[2] == pytest.approx(1 - (15 / 16) ** 40, abs=0.06)
    assert shares[3] > 0.999


@pytest.mark.parametrize("method", METHODS)
def test_coverage_is_kept_from_round_to_round_and_only_grows(method: str) -> None:
    federation = Federation(METHODS[method], (1 / 4, 1 / 4))
    assert not any(mask.any() for mask in covered_of(federation.server).values())
    last = -1
    for round in (1, 2, 3):
        federation.pretend(round, {0: 1.0})
        covered = federation.algorithm.server_covered(federation.server)
        assert covered is not None and all(mask.dtype == torch.bool for mask in covered.values())
        count = sum(int(mask.sum()) for mask in covered.values())
        stays = method in ("heterofl", "heterofl_clean", "fjord")
        assert count > last if round == 1 or not stays else count == last
        last = count


# a sub-model is a network of its own ----------------------------------------------------------------------------------


def masks_of(cut: Cut, tree: Mapping[str, Tensor]) -> Tree:
    """1 where the sub-model has a coordinate, 0 elsewhere."""
    mean = ScatterMean(tree, cut.specs, cut.axes)
    mean.add(cut, cut.extract(tree), 1.0)
    return {name: mask.double() for name, mask in mean.covered().items()}


def sgd(forward: Any, tree: Tree, batch: Batch, task: Task, decay: float = 0.0, steps: int = 3) -> Tree:
    """Plain steps of SGD with momentum and coupled weight decay."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tree.items()}
    optimizer = torch.optim.SGD([*leaves.values()], lr=0.1, momentum=0.9, weight_decay=decay)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=False)
        task.loss(forward(leaves), batch).backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in leaves.items()}


def inner_cut(name: str) -> tuple[Task, Form, Form, Cut]:
    """A row's larger form, less half of its MLP, and in rotary families half of its heads; the stream is whole."""
    task, target = ROWS[name].task, ROWS[name].larger
    lists, fields = {"mlp": torch.arange(20, 46)}, {"mlp": 26}
    if name == "llama-lm":
        lists["kv_head"], fields = torch.tensor([1, 3]), fields | {"kv_heads": 2, "heads": 6}
    whole = sub_form(task, target, 1.0)
    return task, whole, dataclasses.replace(whole, **fields), Cut(task.specs(target), target.axes, lists)


@pytest.mark.parametrize("row", ["vit", "gpt2-lm", "llama-lm"])
def test_training_a_slice_is_training_under_a_mask(row: str) -> None:
    """Of heads and MLP, with SGD: a dropped unit gives nothing and has no gradient. Weight decay tells them apart."""
    task, target, small, cut = inner_cut(row)
    tree, batch = random_tree(task, target), batch_of(task)
    mask = masks_of(cut, tree)
    masked = lambda leaves: task.forward(target, {n: t * mask[n] for n, t in leaves.items()}, batch)  # noqa: E731
    sliced = lambda leaves: task.forward(small, leaves, batch)  # noqa: E731
    assert torch.allclose(masked(tree), sliced(cut.extract(tree)), rtol=0, atol=1e-11)
    for decay in (0.0, 0.1):
        whole, part = sgd(masked, tree, batch, task, decay), sgd(sliced, cut.extract(tree), batch, task, decay)
        assert close(cut.extract(whole), part, atol=1e-10)
        assert not close(part, cut.extract(tree), atol=1e-3), "something was learned"
        drift = max(float(((whole[n] - tree[n]) * (1 - mask[n])).abs().max()) for n in tree)
        assert drift == 0 if not decay else drift > 1e-2


def test_a_mask_on_the_residual_stream_is_no_slice() -> None:
    """Normalisations take their statistics over what is there, zeros included."""
    task, target = ROWS["vit"].task, ROWS["vit"].larger
    cut = Cut(task.specs(target), target.axes, {"embed": torch.arange(24)})
    small = dataclasses.replace(sub_form(task, target, 1.0), width=24)
    tree, batch = random_tree(task, target), batch_of(task)
    mask = masks_of(cut, tree)
    masked = task.forward(target, {name: tensor * mask[name] for name, tensor in tree.items()}, batch)
    sliced = task.forward(small, cut.extract(tree), batch)
    assert float((masked - sliced).abs().max()) > 0.1


@pytest.mark.parametrize("kept", [3, 12])
def test_attention_is_divided_by_the_root_of_what_a_head_has_left(kept: int) -> None:
    """A slice of heads of 12 to `kept` is the masked model with queries times sqrt(12 / kept), and not without that."""
    task, target = ROWS["vit"].task, sub_form(ROWS["vit"].task, ROWS["vit"].larger, 1.0)
    cut = Cut(task.specs(target), target.axes, {"head_dim": torch.arange(kept)})
    tree, batch = random_tree(task, target), batch_of(task)
    mask = masks_of(cut, tree)
    sliced = task.forward(dataclasses.replace(target, head_dim=kept), cut.extract(tree), batch)

    def masked(scale: float) -> Tensor:
        scaled = {n: t * mask[n] * (scale if ".q_proj." in n else 1.0) for n, t in tree.items()}
        return task.forward(target, scaled, batch)

    assert torch.allclose(sliced, masked(math.sqrt(12 / kept)), rtol=0, atol=1e-10)
    assert torch.allclose(sliced, masked(1.0), rtol=0, atol=1e-3) == (kept == 12)


def test_a_rolled_window_as_wide_as_the_model_computes_the_same() -> None:
    """It is the model with its coordinates in another order."""
    for row in ("vit", "gpt2-lm", "bert-mlm", "llama-lm-tied"):
        federation = of_row(row, FedRolex(rates=(1.0,)), (1.0,))
        task, target, batch = federation.task, federation.target, batch_of(federation.task)
        tree = random_tree(task, target)
        expected = task.forward(target, tree, batch)
        for round in (1, 2, 6, 50):
            permuted = federation.payloads(round, state=start(tree, AVERAGE))[0]
            assert (sha256(permuted) == sha256(tree)) == (round == 1)
            logits = task.forward(federation.form(0), permuted, batch)
            exact = 1e-4 if row == "llama-lm-tied" else 1e-10  # its norms compute in fp32, whatever comes in
            assert torch.allclose(logits, expected, rtol=0, atol=exact), (row, round)


@pytest.mark.parametrize("method", METHODS)
def test_deployed_models_are_what_was_sent(method: str) -> None:
    federation = Federation(METHODS[method])
    federation.run(1)
    for client in range(3):
        payload = federation.payloads(1)[client]
        model = federation.algorithm.client_model(payload, {}, federation.at_client(1, client))
        assert not model.training
        weights = dict(model.named_parameters())
        assert {n: t.shape for n, t in weights.items()} == shapes_of(federation.task, federation.form(client))
        if not method.startswith("federated_dropout"):  # whose model divides what it reads
            assert sha256(weights) == sha256(payload)
    server = federation.algorithm.server_model(federation.server, federation.at_server(1))
    assert server is not None and sha256(dict(server.named_parameters())) == sha256(federation.model())


# when it is FedAvg ----------------------------------------------------------------------------------------------------

EQUAL = {
    "heterofl_clean": heterofl_clean(**LOCAL),
    "heterofl-unmasked-by-examples": HeteroFL(**LOCAL, masks=False, by_examples=True),
    "fjord": FjORD(**local(rates=(1.0,))),
    "federated_dropout": FederatedDropout(**LOCAL),
    "federated_dropout-all": FederatedDropout(**LOCAL, keep=1.0),
    "fedbrb_like": FedBRBLike(**LOCAL),
    "fedbrb_like-all": FedBRBLike(**LOCAL, broadcast=1.0),
    "fedbrb_like-changes": FedBRBLike(**LOCAL, broadcast=0.5, mode="changes", clock="spread", decay=2.0),
}
FEDAVG = FedAvg(**{name: value for name, value in LOCAL.items() if name != "rates"})


@functools.cache
def fedavg_after(rounds: int, row: str | None = None) -> Tree:
    federation = Federation(FEDAVG, (1.0,) * 3) if row is None else unequal(row, FEDAVG)
    for round in range(1, rounds + 1):
        federation.run(round, [0, 2] if round == 2 else None)
    return federation.server


def unequal(row: str, algorithm: Algorithm) -> Federation:
    return of_row(row, algorithm, (1.0,) * 3, shards=[examples(ROWS[row].task, size) for size in (2, 3, 5)])


@pytest.mark.parametrize("method", EQUAL)
def test_where_everyone_has_everything_it_is_fedavg_bit_by_bit(method: str) -> None:
    """Also where a round averages some of them: the denominator is theirs."""
    federation = Federation(EQUAL[method], (1.0,) * 3)
    for round in (1, 2):
        federation.run(round, [0, 2] if round == 2 else None)
    assert sha256(federation.model()) == sha256(fedavg_after(2))
    assert all(mask.all() for mask in covered_of(federation.server).values())


@pytest.mark.parametrize("method", ["heterofl_clean", "fjord", "federated_dropout", "fedbrb_like-all"])
def test_it_is_fedavg_where_weights_are_tied_and_fused(method: str) -> None:
    federation = unequal("gpt2-lm", EQUAL[method])
    federation.run(1)
    assert sha256(federation.model()) == sha256(fedavg_after(1, "gpt2-lm"))


def test_full_windows_that_roll_are_fedavg_in_every_round() -> None:
    """Coordinates come in another order, so sums are rounded otherwise; keys' biases have no gradient but rounding."""
    rolling, plain = (Federation(a, (1.0,) * 3) for a in (FedRolex(**LOCAL, by_examples=True), FEDAVG))
    for round in range(1, 5):
        rolling.server = start(plain.server, AVERAGE)
        rolling.run(round)
        plain.run(round)
        assert close(rolling.model(), plain.server, atol=2e-4, but="k_proj.bias"), round


@pytest.mark.parametrize(
    "algorithm, equal",
    [
        (HeteroFL(**LOCAL), False),
        (HeteroFL(**LOCAL, by_examples=True), False),
        (HeteroFL(**LOCAL, masks=False), False),
        (FedRolex(**LOCAL), False),
        (HeteroFL(**LOCAL, masks=False, by_examples=True), True),
    ],
    ids=["as published", "masks", "by participants", "fedrolex", "neither"],
)
def test_as_published_it_is_not_fedavg(algorithm: Algorithm, equal: bool) -> None:
    """Its mean does not count examples, and classes that a participant lacks are left out of it."""
    federation = Federation(algorithm, (1.0,) * 3)
    federation.run(1)
    assert close(federation.model(), fedavg_after(1), atol=1e-6) == equal


@pytest.mark.parametrize("algorithm", [HeteroFL(**LOCAL, masks=False), FedRolex(**LOCAL)], ids=["heterofl", "fedrolex"])
def test_plain_means_are_fedavg_where_all_have_as_many_examples(algorithm: Algorithm) -> None:
    task = load_task(VIT, None)
    shards = [shards_of_digits(task, 3)[2]] * 3
    one, other = (Federation(a, (1.0,) * 3, task, shards=shards) for a in (algorithm, FEDAVG))
    one.run(1)
    other.run(1)
    assert sha256(one.model()) == sha256(other.server)


def test_small_sub_models_are_not_fedavg() -> None:
    """Else what is compared above would not depend on rates at all."""
    for method in ("heterofl_clean", "fjord", "federated_dropout", "fedbrb_like"):
        federation = Federation(METHODS[method])
        federation.run(1)
        assert not close(federation.model(), fedavg_after(1), atol=1e-4), method


# what the server makes of it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, both", [("heterofl", 3.0), ("heterofl_clean", 10 / 3), ("fedrolex", 3.0), ("fjord", 10 / 3)]
)
def test_a_round_that_a_person_can_check(method: str, both: float) -> None:
    """A, who has all and 6 examples, sends twos; B, who has half and 12, fours: 3, or (6 x 2 + 12 x 4) / 18."""
    federation = Federation(METHODS[method], (1.0, 1 / 2))
    fc1 = "vit.layers.0.mlp.fc1.weight"
    before = federation.model()[fc1]
    federation.pretend(1, {0: 2.0, 1: 4.0})
    expected = torch.full((24, 16), 2.0)
    expected[:12, :8] = both
    assert torch.equal(federation.model()[fc1], expected)

    alone = Federation(METHODS[method], (1.0, 1 / 2))
    alone.pretend(1, {1: 4.0})
    expected = before.clone()
    expected[:12, :8] = 4.0
    assert torch.equal(alone.model()[fc1], expected)


@pytest.mark.parametrize("method", METHODS)
def test_with_a_learning_rate_of_0_nothing_changes(method: str) -> None:
    """But for broadcasts, of which the next test tells."""
    algorithm: Any = dataclasses.replace(METHODS[method], lr=0.0)  # type: ignore[type-var]
    if isinstance(algorithm, FedBRBLike):
        algorithm = dataclasses.replace(algorithm, broadcast=0.0)
    federation = Federation(algorithm)
    before = sha256(federation.model())
    federation.run(1)
    federation.run(2, [1, 2])
    assert sha256(federation.model()) == before


@pytest.mark.parametrize("decay", [None, 4.0])
def test_a_broadcast_moves_the_others_towards_the_trained_block(decay: float | None) -> None:
    """One participant with halves, learning rate 0, round 2: in block 1, out block 0; lam_2 = lam / (1 + 2 / 4)."""
    federation = Federation(FedBRBLike(**local(lr=0.0), broadcast=0.3, decay=decay), (1 / 2,))
    lam = 0.3 if decay is None else 0.3 / 1.5
    before = federation.model()
    federation.run(2)
    after = federation.model()
    fc1, norm, bias = "vit.layers.0.mlp.fc1.weight", "vit.layernorm.weight", "classifier.bias"
    block = before[fc1][:12, 8:].double()
    expected = (1 - lam) * before[fc1].double() + lam * block.repeat(2, 2)
    expected[:12, 8:] = block
    assert torch.allclose(after[fc1].double(), expected, rtol=0, atol=1e-7)
    assert torch.equal(after[fc1][:12, 8:], before[fc1][:12, 8:])
    assert torch.equal(after[norm], before[norm]), "its blocks are equal: all ones"
    assert torch.equal(after[bias], before[bias]), "it has no blocks"


def blocks(tree: Mapping[str, Tensor], name: str, n: int) -> list[Tensor]:
    """Blocks of a weight of the MLP."""
    rows, columns = tree[name].shape
    split = [part.split(columns // n, 1) for part in tree[name].split(rows // n, 0)]
    return [block for row in split for block in row]


FC1 = "vit.layers.1.mlp.fc1.weight"


@pytest.mark.parametrize("n", [2, 4])
def test_a_broadcast_of_weight_1_makes_all_blocks_equal(n: int) -> None:
    federation = Federation(FedBRBLike(**local(rates=(1 / n,)), broadcast=1.0), (1 / n, 1 / n))
    federation.run(1)
    for name, tensor in federation.model().items():
        if "mlp.fc" in name and name.endswith("weight"):
            first, *others = blocks(federation.model(), name, n)
            assert all(torch.equal(first, other) for other in others)
            assert first.unique().numel() == first.numel(), "a block is no constant"
        elif "q_proj.weight" in name:  # halves of each head, not of the axis of all heads
            heads = tensor.reshape(2, n, 8 // n, n, 16 // n)
            assert torch.equal(heads, heads[:, :1, :, :1].expand_as(heads))
    before = sha256(federation.model())
    trained = federation.payloads(2)
    updates = [ClientUpdate(id_, tree, 1.0) for id_, tree in trained.items()]
    federation.server = federation.aggregate(2, updates)
    assert sha256(federation.model()) == before, "broadcasting equal blocks changes nothing"


@pytest.mark.parametrize("lam", [0.3, 0.5])
def test_equal_blocks_stay_equal_under_any_broadcast(lam: float) -> None:
    """Bit by bit, and where participants of halves and of quarters broadcast together."""
    made = Federation(FedBRBLike(**LOCAL, broadcast=1.0), (1 / 4,))
    made.run(1)
    federation = Federation(FedBRBLike(**LOCAL, broadcast=lam, clock="spread"), (1 / 4, 1 / 4, 1 / 2, 1 / 4))
    federation.server = made.server
    sent = [ClientUpdate(id_, tree, 1.0) for id_, tree in federation.payloads(3).items()]
    federation.server = federation.aggregate(3, sent)
    assert sha256(federation.model()) == sha256(made.model())


def test_without_a_broadcast_other_blocks_are_untouched() -> None:
    federation = Federation(FedBRBLike(**LOCAL, broadcast=0.0), (1 / 2,))
    before = federation.model()
    federation.run(1)
    old, new = blocks(before, FC1, 2), blocks(federation.model(), FC1, 2)
    assert [torch.equal(a, b) for a, b in zip(old, new, strict=True)] == [False, True, True, True]


def test_blocks_after_a_broadcast_are_the_predicted_mixture() -> None:
    """Two participants on a spread clock train two of nine blocks; the seven others move to the mean of these two."""
    target = Form(24, 1, heads=1, mlp=36, head_dim=6)
    federation = Federation(FedBRBLike(rates=(1 / 3,), broadcast=0.25, clock="spread"), (1 / 3, 1 / 3), target=target)
    name = "vit.layers.0.mlp.fc1.weight"
    before = [block.double() for block in blocks(federation.model(), name, 3)]
    federation.pretend(1, {0: 10.0, 1: 20.0})
    after = [block.double() for block in blocks(federation.model(), name, 3)]
    assert (after[0] == 10.0).all() and (after[1] == 20.0).all()
    for old, new in zip(before[2:], after[2:], strict=True):
        assert torch.allclose(new, 0.75 * old + 0.25 * 15.0, rtol=0, atol=1e-6)
    mean = (10.0 + 20.0 + sum(0.75 * old.mean() + 0.25 * 15.0 for old in before[2:])) / 9
    assert float(torch.stack(after).mean()) == pytest.approx(float(mean), abs=1e-6)
    bias = "vit.layers.0.mlp.fc1.bias"  # one clock alone: both trained its first block, which counts once
    trained = (6 * 10.0 + 12 * 20.0) / 18
    assert torch.allclose(federation.model()[bias][:12], torch.full((12,), trained))
    assert torch.allclose(federation.model()[bias][12:], torch.full((24,), 0.25 * trained))


def test_a_block_of_a_vector_counts_once_however_many_trained_it() -> None:
    """Of three participants on a spread clock, times 0, 1 and 3: stream blocks 0, 1 and 0."""
    target = Form(24, 1, heads=1, mlp=36, head_dim=6)
    federation = Federation(FedBRBLike(rates=(1 / 3,), broadcast=1.0, clock="spread"), (1 / 3,) * 4, target=target)
    federation.pretend(1, {0: 10.0, 1: 20.0, 3: 10.0})
    assert federation.model()["vit.layernorm.bias"].tolist() == [10.0] * 8 + [20.0] * 8 + [15.0] * 8


def test_a_broadcast_of_changes_adds_how_the_block_changed() -> None:
    federation = Federation(FedBRBLike(**LOCAL, broadcast=0.5, mode="changes"), (1 / 2,))
    before = federation.model()
    (update,) = federation.run(1)
    change = update.tree[FC1].double() - blocks(before, FC1, 2)[0].double()
    old, new = blocks(before, FC1, 2), blocks(federation.model(), FC1, 2)
    assert torch.equal(new[0], update.tree[FC1])
    for was, is_ in zip(old[1:], new[1:], strict=True):
        assert torch.allclose(is_.double(), was.double() + 0.5 * change, rtol=0, atol=1e-6)


def test_participants_of_different_blocks_broadcast_the_mean_of_both() -> None:
    """Halves train (0, 0) of four blocks, quarters (0, 0) of sixteen: the last corner is in neither."""
    federation = Federation(FedBRBLike(**LOCAL, broadcast=0.4), (1 / 2, 1 / 4))
    before = federation.model()[FC1].double()
    federation.pretend(1, {0: 6.0, 1: 12.0})
    after = federation.model()[FC1].double()
    inside = (6 * 6.0 + 12 * 12.0) / 18
    assert torch.allclose(after[:6, :4], torch.full((6, 4), inside, dtype=torch.float64))
    assert (after[6:12, :8] == 6.0).all() and (after[:6, 4:8] == 6.0).all()
    of_halves = torch.full((12, 8), 6.0, dtype=torch.float64)
    of_halves[:6, :4] = inside
    aim = (of_halves + inside) / 2
    assert torch.allclose(after[12:, 8:], 0.6 * before[12:, 8:] + 0.4 * aim, rtol=0, atol=1e-5)


# labels and tokens ----------------------------------------------------------------------------------------------------


def of_classes(task: Task, *classes: int) -> Split:
    assert task.dataset is not None
    labels = task.dataset.train.labels
    return subset(task.dataset.train, torch.isin(labels, torch.tensor(classes)).nonzero()[:, 0].numpy())


def test_classes_that_nobody_has_stay_and_others_are_of_those_who_have_them() -> None:
    task = load_task(VIT, None)
    shards = [of_classes(task, 0, 1), of_classes(task, 1, 2)]
    federation = Federation(HeteroFL(**LOCAL, weight_decay=0.5), (1.0, 1.0), task, shards=shards)
    before = federation.model()
    one, two = federation.run(1)
    after = federation.model()
    assert one.tree["rows"]["class"].tolist() == [True, True] + [False] * 8
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(after[name][3:], before[name][3:])
        assert torch.equal(after[name][0], one.tree[name][0])
        assert torch.equal(after[name][2], two.tree[name][2])
        assert torch.allclose(after[name][1], (one.tree[name][1] + two.tree[name][1]) / 2, rtol=0, atol=1e-7)
    assert not torch.equal(one.tree["classifier.weight"][3:], before["classifier.weight"][3:]), "decayed, not vouched"
    covered = federation.algorithm.server_covered(federation.server)
    assert covered is not None and covered["classifier.bias"].tolist() == [True] * 3 + [False] * 7


@pytest.mark.parametrize("row", ["gpt2-lm", "bert-mlm", "bert-text", "llama-lm", "gpt2-text", "bert-tokens"])
def test_tokens_that_nobody_has_stay_and_special_ones_are_trained(row: str) -> None:
    task = ROWS[row].task
    shards = [examples(task, size) for size in (7, 4)]
    federation = of_row(row, HeteroFL(**LOCAL, weight_decay=0.5), (1 / 2, 1 / 2), shards=shards)
    before, updates = federation.model(), federation.run(1)
    after = federation.model()
    seen = torch.cat([shard.inputs["input_ids"].flatten() for shard in shards]).unique().tolist()
    special = [BYTE_PADDING, BYTE_END, *([BYTE_MASK] if row == "bert-mlm" else [])]
    names = [n for n, spec in task.specs(federation.target).items() if spec.dims[0] == "=token"]
    assert names
    for name in names:
        unseen = torch.ones(len(after[name]), dtype=torch.bool)
        unseen[[*seen, *special]] = False
        assert unseen.sum() > 100
        assert torch.equal(after[name][unseen], before[name][unseen])
        assert not torch.equal(updates[0].tree[name][unseen], federation.payloads(1)[0][name][unseen]) or "bias" in name
    table, covered = names[0], covered_of(federation.server)
    assert covered[table][special].any(1).all(), "the row of padding too, though it may have no gradient"
    for id_ in special[1:]:
        assert not torch.equal(after[table][id_], before[table][id_]), id_
    for shard, update in zip(shards, updates, strict=True):
        mine = {*shard.inputs["input_ids"].flatten().tolist(), *special}
        assert {*update.tree["rows"]["token"].nonzero()[:, 0].tolist()} == mine
    if row == "bert-tokens":
        labels = shards[0].inputs["labels"]
        assert {*updates[0].tree["rows"]["class"].nonzero()[:, 0].tolist()} == {*labels[labels != IGNORED].tolist()}


@pytest.mark.parametrize("masks", [True, False])
def test_the_logit_of_an_absent_class_is_exactly_0(masks: bool) -> None:
    """It still counts as exp(0) in what probabilities are divided by."""
    task = load_task(VIT, None)
    shard = of_classes(task, 3, 5)
    algorithm = HeteroFL(**local(lr=0.0, batch_size=64), masks=masks)
    federation = Federation(algorithm, (1.0,), task, shards=[shard])
    for name in ("classifier.weight", "classifier.bias"):
        federation.server["model"][name] = 3 * torch.randn(
            federation.model()[name].shape, generator=torch.Generator().manual_seed(0)
        )
    federation.update(1, 0)
    batch = task.batch(shard, torch.arange(len(shard)))
    logits = task.forward(TARGET, federation.model(), batch).double()
    if masks:
        partition = logits[:, 3].exp() + logits[:, 5].exp() + 8 * math.exp(0)
        expected = (partition.log() - logits.gather(1, batch["labels"][:, None])[:, 0]).mean()
    else:
        expected = F.cross_entropy(logits, batch["labels"])
    assert federation.work[0].work[-1].loss == pytest.approx(float(expected), abs=1e-5)


def test_label_sets_are_counted_in_bytes() -> None:
    federation = of_row("bert-text", METHODS["heterofl"], (1 / 2,))
    clean = of_row("bert-text", METHODS["heterofl_clean"], (1 / 2,))
    with_sets, without = federation.update(1, 0).tree, clean.update(1, 0).tree
    assert {tensor.dtype for tensor in with_sets["rows"].values()} == {torch.bool}
    inputs = federation.task.inputs
    assert nbytes(without) == 4 * numel(federation.payloads(1)[0])
    assert nbytes(with_sets) - nbytes(without) == len(with_sets["rows"]["token"]) + inputs.num_classes
    assert {*with_sets} - {*without} == {"rows"} and {*with_sets["rows"]} == {"token", "class"}
    assert numel(with_sets) == numel(without), "they are no parameters"


# how participants train -----------------------------------------------------------------------------------------------


def forwarded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Form, Tree]]:
    """Every model that is run from here on: its form and parameters."""
    runs: list[tuple[Form, Tree]] = []
    real = Task.forward

    def noted(task: Task, form: Form, tree: Mapping[str, Tensor], batch: Batch) -> Tensor:
        runs.append((form, {name: tensor.detach().clone() for name, tensor in tree.items()}))
        return real(task, form, tree, batch)

    monkeypatch.setattr(Task, "forward", noted)
    return runs


@pytest.mark.parametrize("row", ["vit", "gpt2-lm", "gpt2-text", "bert-mlm", "llama-lm", "llama-lm-tied"])
def test_the_scaler_divides_what_width_layers_compute(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training alone; not norms, not heads: a head that is the embedding has it back from the norm before it."""
    federation = of_row(row, HeteroFL(**LOCAL), (1 / 4,))
    payload, runs = federation.payloads(1)[0], forwarded(monkeypatch)
    federation.update(1, 0)
    form, first = runs[0]
    specs = federation.task.specs(form)
    factors: dict[str, float] = {}
    for name, tensor in payload.items():
        texts = " ".join(specs[name].dims)
        own = [text for text in specs[name].dims if text and text[0] not in "<*+="]
        back = "*<" in texts or "+<" in texts
        factors[name] = 0.25 if back else 4.0 if own else 1.0
        assert torch.allclose(first[name], factors[name] * tensor, rtol=1e-6, atol=0), name
    tied = row in ("gpt2-lm", "bert-mlm", "llama-lm-tied")
    assert {*factors.values()} == ({0.25, 1.0, 4.0} if tied else {1.0, 4.0})
    heads = [n for n, spec in specs.items() if spec.dims[0] in ("=class", "=token") and "<" in "".join(spec.dims)]
    assert all(factors[name] == 1.0 for name in heads)
    if tied:
        (table,) = [n for n, spec in specs.items() if spec.dims == ("=token", "embed")]
        assert factors[table] == 4.0
    model = federation.algorithm.client_model(payload, {}, federation.at_client(1, 0))
    assert sha256(dict(model.named_parameters())) == sha256(payload), "scored as it is"


def test_the_scaler_divides_the_output_of_each_layer() -> None:
    """`(W / r) x + b / r = (W x + b) / r`, and at rate 1 nothing happens, bit by bit."""
    scaled, plain = (Federation(HeteroFL(**LOCAL, scaler=s, masks=False), (1.0, 1 / 2)) for s in (True, False))
    assert sha256(scaled.update(1, 0).tree) == sha256(plain.update(1, 0).tree)
    assert sha256(scaled.update(1, 1).tree) != sha256(plain.update(1, 1).tree)


@pytest.mark.parametrize("row", ["vit", "gpt2-lm", "bert-text", "bert-mlm", "llama-lm", "llama-lm-tied"])
def test_dropout_divides_what_is_read_by_the_share_kept(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and where it is deployed: weights by the share of what they read, biases and embeddings by 1."""
    federation = of_row(row, METHODS["federated_dropout"], (1 / 4,))
    payload, runs = federation.payloads(1)[0], forwarded(monkeypatch)
    federation.update(1, 0)
    form, first = runs[0]
    for name, spec in federation.task.specs(form).items():
        reads = any(text[0] == "<" or text[:2] in ("*<", "+<") for text in " + ".join(spec.dims).split(" + ") if text)
        assert torch.allclose(first[name], payload[name] * (4.0 if reads else 1.0), rtol=1e-6, atol=0), name
    model = federation.algorithm.client_model(payload, {}, federation.at_client(1, 0))
    assert close(dict(model.named_parameters()), first, atol=0.0)


@pytest.mark.parametrize("distillation", [True, False])
def test_ordered_dropout_draws_among_the_rates_up_to_its_own(
    distillation: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All alike, as a function of the seed."""
    algorithm = FjORD(**local(epochs=12, batch_size=4), distillation=distillation)
    runs = forwarded(monkeypatch)

    def drawn(seed: int, client: int, round: int = 1) -> list[int]:
        """The width of the sub-model of each step."""
        federation = Federation(algorithm, seed=seed)
        runs.clear()
        federation.update(round, client)
        widths = [form.width for form, _ in runs]
        whole, steps = federation.form(client).width, []
        while widths:
            first = widths.pop(0)
            taught = distillation and first == whole and widths and widths[0] != whole  # the teacher is run first
            steps.append(widths.pop(0) if taught else first)
        return steps

    middle = drawn(0, 1)
    assert drawn(0, 1) == middle, "the seed decides"
    assert len(middle) == 12 * 3 and {*middle} == {8, 4}
    assert 10 <= middle.count(8) <= 26
    assert middle not in (drawn(1, 1), drawn(0, 1, round=2))
    largest = drawn(0, 0)
    assert len(largest) == 12 * 2 and {*largest} == {16, 8, 4}
    assert {*drawn(0, 2)} == {4}


def objectives_of(federation: Federation, client: int) -> list:
    """What a client asks to be trained."""
    context = federation.at_client(1, client)
    return list(asked_of(federation.algorithm, federation.payloads(1, [client])[client], {}, context).objectives)


def test_distillation_leaves_the_teacher_alone() -> None:
    """Beyond the student's coordinates the gradient is that of the teacher's own loss."""
    federation = of_row("gpt2-text", FjORD(**LOCAL), (1 / 2,))
    task, form, batch = federation.task, federation.form(0), batch_of(federation.task)
    own, student = objectives_of(federation, 0)
    tree = {n: t.float() for n, t in random_tree(task, form).items()}

    def gradient(objective: Any) -> Tree:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tree.items()}
        objective(leaves, {}, batch).backward()
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    alone, with_student = gradient(own), gradient(student)
    cut = cut_at(task, federation.target, 1 / 4)  # the quarter of the target is the first half of the half
    inside = Cut(task.specs(form), form.axes, {axis: kept for axis, kept in cut.lists.items()})
    mask = masks_of(inside, {name: tensor.double() for name, tensor in tree.items()})
    outside = max(float(((alone[n] - with_student[n]) * (1 - mask[n])).abs().max()) for n in tree)
    within = max(float(((alone[n] - with_student[n]) * mask[n]).abs().max()) for n in tree)
    assert outside < 1e-6
    assert within > 1e-2

    small = sub_form(task, federation.target, 1 / 4)
    teacher = task.forward(form, tree, batch).double()
    logits = task.forward(small, inside.extract(tree), batch).double()
    soft = -(teacher.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    expected = F.cross_entropy(teacher, batch["labels"]) + soft
    assert float(student(tree, {}, batch)) == pytest.approx(float(expected), abs=1e-5)


def test_without_distillation_a_step_is_the_loss_of_the_sub_model_alone() -> None:
    federation = of_row("gpt2-text", FjORD(**LOCAL, distillation=False), (1 / 2,))
    task, form, batch = federation.task, federation.form(0), batch_of(federation.task)
    _, student = objectives_of(federation, 0)
    tree = {n: t.float() for n, t in random_tree(task, form).items()}
    small = cut_at(task, federation.target, 1 / 4)
    inside = Cut(task.specs(form), form.axes, small.lists)
    logits = task.forward(sub_form(task, federation.target, 1 / 4), inside.extract(tree), batch)
    assert float(student(tree, {}, batch)) == float(task.loss(logits, batch))


# the federation is the same -------------------------------------------------------------------------------------------


def test_methods_do_not_change_who_takes_part_nor_what_they_hold() -> None:
    base = dataclasses.replace(tiny(), cohort=2, rounds=6)
    population = members(base, load_task(base.task, None))
    hashes, cohorts = set(), set()
    for algorithm in (FEDAVG, HeteroFL(), FedRolex(), FjORD(), FederatedDropout(), FedBRBLike(rates=(1.0,))):
        experiment = dataclasses.replace(base, algorithm=algorithm)
        hashes.add(federation_sha256(experiment, members(experiment, load_task(base.task, None))))
        cohorts.add(tuple(cohort_of(experiment, round) for round in range(7)))
    assert len(hashes) == len(cohorts) == 1
    assert len({*next(iter(cohorts))}) > 1
    assert federation_sha256(dataclasses.replace(base, seed=1), population) not in hashes


# what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [HeteroFL, FedRolex, FjORD, FederatedDropout, FedBRBLike])
@pytest.mark.parametrize("rates", [(), (0.5, 1.0), (1.0, 1.0, 0.5), (1.0, 0.0), (1.5, 1.0), (1.0, -0.5)])
def test_rates_out_of_order_or_range_are_refused(method: Any, rates: tuple[float, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"^algorithm\.rates=\(.*\): must be fractions of the target .*, largest first"
    ):
        method(rates=rates)


@pytest.mark.parametrize(
    "method, fields, text",
    [
        (FedRolex, {"step": 0}, r"algorithm\.step=0: must be a whole number other than 0"),
        (FederatedDropout, {"keep": 0.0}, r"algorithm\.keep=0\.0: must be above 0 and at most 1"),
        (FederatedDropout, {"keep": 1.5}, r"algorithm\.keep=1\.5: must be above 0 and at most 1"),
        (FedBRBLike, {"broadcast": 1.5}, r"algorithm\.broadcast=1\.5: must be at most 1"),
        (FedBRBLike, {"broadcast": -0.1}, r"algorithm\.broadcast=-0\.1: must be at least 0"),
        (FedBRBLike, {"decay": 0.0}, r"algorithm\.decay=0\.0: must be greater than 0"),
        (FedBRBLike, {"mode": "both"}, r"algorithm\.mode='both': must be one of 'parameters', 'changes'"),
        (HeteroFL, {"scaler": 1}, r"algorithm\.scaler=1: must be true or false"),
        (FjORD, {"rates": [1.0]}, r"algorithm\.rates=\[1\.0\]: must be a tuple"),
    ],
)
def test_bad_fields_are_refused_by_name(method: Any, fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}"):
        method(**fields)


@pytest.mark.parametrize("method", [HeteroFL, FedRolex, FjORD, FederatedDropout, FedBRBLike])
def test_a_rate_without_a_model_is_refused_with_the_rate_and_the_target(method: Any) -> None:
    """GPT-2's heads share the width among them: at 1/8, heads of 12 have 2 left, which is 8 in all, and 6 is wide."""
    task, target = ROWS["gpt2-lm"].task, ROWS["gpt2-lm"].larger
    text = (
        r"^the sub-model at rate 0\.125 of the target 48x3: form\.head_dim=2: must be form\.width / form\.heads = 6 / 4"
    )
    with pytest.raises(ValueError, match=text):
        method(rates=(1.0, 1 / 8)).check(task, [Form(16, 1, heads=2)], target, target)
    method(rates=(1.0, 1 / 4)).check(task, [Form(16, 1, heads=2)], target, target)


def test_a_share_that_everyone_keeps_is_checked() -> None:
    task, target = ROWS["gpt2-lm"].task, ROWS["gpt2-lm"].larger
    with pytest.raises(ValueError, match=r"^the sub-model at rate 0\.125 of the target 48x3: form\.head_dim=2"):
        FederatedDropout(keep=1 / 8).check(task, [target], target, target)


def test_ordered_dropout_needs_every_rate_up_to_the_largest() -> None:
    """A participant that holds the half trains the eighth too."""
    task, target = ROWS["gpt2-lm"].task, ROWS["gpt2-lm"].larger
    half = sub_form(task, target, 1 / 2)
    algorithm = FjORD(rates=(1.0, 1 / 2, 1 / 8))
    with pytest.raises(ValueError, match=r"^the sub-model at rate 0\.125 of the target 48x3"):
        algorithm.check(task, [half], target, target)
    HeteroFL(rates=algorithm.rates).check(task, [half], target, target)
    algorithm.check(task, [], target, target)


@pytest.mark.parametrize(
    "target, rate, text",
    [
        (
            Form(48, 1, heads=2, mlp=50),
            1 / 4,
            "0.25: must be rates 1/n whose n divides axis 'mlp', 50 in the target 48x1",
        ),
        (
            Form(48, 1, heads=4, mlp=48),
            1 / 8,
            "0.125: must be rates 1/n whose n divides axis 'head_dim', 12 in the target",
        ),
        (Form(30, 1, heads=2, mlp=32), 1 / 4, "0.25: must be rates 1/n whose n divides axis 'embed', 30 in the target"),
        (
            Form(40, 1, heads=2, mlp=40),
            0.4,
            "0.4: must be rates 1/n whose n divides axis 'embed', 40 in the target 40x1",
        ),
    ],
)
def test_blocks_must_divide_every_axis(target: Form, rate: float, text: str) -> None:
    task = Task(VIT)
    with pytest.raises(ValueError, match=f"^algorithm.rates={text}"):
        FedBRBLike(rates=(1.0, rate)).check(task, [Form(8, 1, heads=2)], target, target)
    FedBRBLike(rates=(1.0, rate)).check(task, [target], target, target)  # nobody is at the rate that will not do


def test_thirds_are_blocks_though_no_float_is_a_third() -> None:
    FedBRBLike(rates=(1 / 3, 1 / 49)).check(
        Task(VIT), [Form(8, 1, heads=2)], Form(147, 1, heads=1), Form(147, 1, heads=1)
    )
