"""Sub-models of partial training: who trains what, how much is ever trained, and that each is a network of its own."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.fedbrb_like import FedBRBLike
from baselines.federated_dropout import FederatedDropout
from baselines.fedrolex import FedRolex
from baselines.fjord import FjORD
from baselines.heterofl import HeteroFL
from benchmarks.suites import tiny
from fedsim.core.submodel import Cut, join_fused, split_fused, split_specs
from fedsim.core.tree import Tree, sha256
from fedsim.engine.cohort import cohort_of, federation_sha256, members
from fedsim.learning.coverage import covered_of, start
from fedsim.learning.rates import sub_form
from fedsim.learning.server_opt import AVERAGE
from fedsim.learning.task import Batch, Task, load_task
from fedsim.models import Form
from tests.support.cutting import Kept, assert_aligned, shapes_of
from tests.support.family_rows import ROWS, batch_of, examples, random_tree
from tests.support.sub_models import FEDAVG, LOCAL, METHODS, Federation, close, masks_of, of_row


def parts(task: Task, form: Form, tree: Mapping[str, Tensor]) -> Tree:
    return split_fused(tree, task.specs(form), form.axes)


def index_of(kept: Kept, name: str, dimensions: int) -> tuple[Tensor, ...]:
    """The index of a sub-model's part of a parameter in the whole one."""
    lists = [torch.tensor(kept[name, d]) for d in range(dimensions)]
    return tuple(torch.meshgrid(*lists, indexing="ij"))


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
        if method.startswith("federated_dropout") or method == "heterofl":
            continue  # divided as in training: `test_sub_model_training.py` says by what
        assert sha256(weights) == sha256(payload)
    server = federation.algorithm.server_model(federation.server, federation.at_server(1))
    assert server is not None and sha256(dict(server.named_parameters())) == sha256(federation.model())


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
