"""Every algorithm keeps the contract: each check below runs on each row of one table (`tests/support/contract.py`)."""

import dataclasses
import hashlib
import inspect
import pickle
import statistics
from typing import Any

import pytest
import torch
from torch import nn

import fedsim.learning.steps
from fedgrow_algo.core import FedGrowCore
from fedgrow_algo.dual_ligo import of_rank
from fedsim.algorithm import ClientContext, ClientUpdate
from fedsim.core.tree import State, clone, flat, nbytes, numel, sha256, tensors
from fedsim.data.dataset import Split
from fedsim.engine.cost import cost_of
from fedsim.learning.meter import StepCost
from fedsim.learning.training import Trained, Training, train
from fedsim.privacy import Around, ExampleDP
from tests.support.clients import client_init, client_update
from tests.support.contract import ALSO, CLIENTS, METHODS, PROMISED_NAMES, SEED, TABLE, TASKS, Case


@pytest.fixture(scope="module")
def counts() -> tuple[dict[tuple, StepCost], dict[tuple, StepCost]]:
    """Counting is most of what this module costs: rows share it, as the runs of a sweep do."""
    return {}, {}


@pytest.fixture(scope="module", params=TABLE, ids=lambda row: "-".join(row))
def case(request: pytest.FixtureRequest, counts: tuple[dict, dict]) -> Case:
    method, task = request.param
    return Case((METHODS | ALSO)[method], TASKS[task], *counts)


@pytest.fixture(autouse=True)
def _calm(one_thread: None) -> None:
    """Models this small only lose time to a second thread."""


def bits(outcome: tuple[ClientUpdate, State]) -> str:
    """What an outcome of `client_update` is made of: what is sent and what is kept."""
    update, state = outcome
    return sha256(update.tree) + sha256(state)


def memory(tree: State) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors(tree) if tensor.numel()}


def content(tensor: torch.Tensor) -> str:
    """Hash of a tensor's bits, whatever its shape."""
    return hashlib.sha256(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


# what an algorithm object is ------------------------------------------------------------------------------------------


def test_pickles_to_an_equal_object(case: Case) -> None:
    revived = pickle.loads(pickle.dumps(case.algorithm))
    assert revived == case.algorithm
    assert type(revived) is type(case.algorithm)
    assert hash(revived) == hash(case.algorithm)


def test_is_frozen(case: Case) -> None:
    fields = dataclasses.fields(case.algorithm)  # type: ignore[arg-type]
    assert fields
    for field in fields:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(case.algorithm, field.name, getattr(case.algorithm, field.name))
    assert set(vars(case.algorithm)) == {field.name for field in fields}, "state beside the hyperparameters"


def test_has_a_promised_name(case: Case) -> None:
    assert case.algorithm.name in PROMISED_NAMES
    assert isinstance(case.algorithm.preset_name, str)


def test_a_round_sets_nothing_on_the_object(case: Case) -> None:
    before = dict(vars(case.algorithm))
    assert case.first and case.server_state is not None
    assert vars(case.algorithm) == before


# at the aggregator ----------------------------------------------------------------------------------------------------


def test_first_server_state_depends_on_the_seed_alone(case: Case) -> None:
    state = case.algorithm.server_init(case.server(round=0))
    assert sha256(case.algorithm.server_init(case.server(round=0))) == sha256(state)
    if state and case.row.drawn and case.row.trains and case.algorithm.preset_name != "preserving":  # not drawn
        assert sha256(case.algorithm.server_init(case.server(round=0, seed=SEED + 1))) != sha256(state)


def test_broadcast_gives_each_client_of_the_cohort_a_payload_and_equal_forms_the_same_object(case: Case) -> None:
    before = sha256(case.server_state)
    payloads = case.algorithm.server_broadcast(case.server_state, case.clients, case.server())
    assert sorted(payloads) == [0, 1]
    assert len({id(payload) for payload in payloads.values()}) == (1 if case.row.one_payload else CLIENTS)
    assert list(case.algorithm.server_broadcast(case.server_state, case.clients[1:], case.server())) == [1]
    assert sha256(case.server_state) == before


def test_aggregation_leaves_its_arguments_alone(case: Case) -> None:
    updates = [dataclasses.replace(case.first[0], client=client) for client in range(CLIENTS)]
    before = sha256(case.server_state), [sha256(one.tree) for one in updates]
    state = case.algorithm.server_aggregate(case.server_state, iter(updates), case.server())
    described = [{n: (t.shape, t.dtype) for n, t in flat(tree).items()} for tree in (state, case.server_state)]
    assert (described[0] == described[1]) == case.row.keeps_shapes
    for tensor in tensors(state):
        tensor.copy_(~tensor if tensor.dtype == torch.bool else tensor + 1)
    assert (sha256(case.server_state), [sha256(one.tree) for one in updates]) == before


def test_a_round_changes_the_server_state(case: Case) -> None:
    state = case.algorithm.server_aggregate(case.server_state, iter([case.first[0]]), case.server())
    assert (sha256(state) != sha256(case.server_state)) == bool(case.server_state)


def test_server_model_is_what_the_row_says_or_none(case: Case) -> None:
    model = case.algorithm.server_model(case.server_state, case.server())
    assert (model is not None) == (case.row.serves is not None)
    if model is not None and case.row.serves is not None:
        assert not model.training
        assert {n: tuple(p.shape) for n, p in model.named_parameters()} == case.shapes(case.row.serves)


# at a participant -----------------------------------------------------------------------------------------------------


def test_private_state_is_reproducible_and_its_clients_own(case: Case) -> None:
    again = client_init(case.algorithm, case.client(round=0))
    assert sha256(again) == sha256(case.private[0])
    if again:
        assert (sha256(case.private[1]) == sha256(case.private[0])) == case.row.same_start


def test_neither_payload_nor_private_state_is_written_to(case: Case) -> None:
    payload, state = clone(case.payload()), clone(case.private[0])
    before = sha256(payload), sha256(state)
    client_update(case.algorithm, payload, state, case.client())
    assert (sha256(payload), sha256(state)) == before
    case.algorithm.client_model(payload, state, case.client())
    assert (sha256(payload), sha256(state)) == before


def test_same_context_gives_the_same_bits(case: Case) -> None:
    again = client_update(case.algorithm, case.payload(), case.private[0], case.client())
    assert bits(again) == bits(case.first)
    assert again[0].client == 0
    assert (again[0].weight == len(case.shard(0))) == case.row.by_examples


def test_torchs_global_stream_is_neither_read_nor_moved(case: Case) -> None:
    torch.manual_seed(12345)
    before = torch.random.get_rng_state()
    again = client_update(case.algorithm, case.payload(), case.private[0], case.client())
    assert bits(again) == bits(case.first)
    assert sha256(client_init(case.algorithm, case.client(round=0))) == sha256(case.private[0])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_another_round_gives_another_outcome(case: Case) -> None:
    other = client_update(case.algorithm, case.payload(), case.private[0], case.client(round=2))
    assert (bits(other) != bits(case.first)) == case.row.trains


def test_another_client_gives_another_outcome_on_the_same_data(case: Case) -> None:
    context = case.client(info=dataclasses.replace(case.clients[0], id=1))
    other = client_update(case.algorithm, case.payload(), case.private[0], context)
    assert (bits(other) != bits(case.first)) == case.row.trains
    assert other[0].client == 1


def test_update_is_on_the_cpu_detached_and_shares_no_memory(case: Case) -> None:
    payload, state = case.payload(), case.private[0]
    zero = case.with_lr_zero()
    for update, _ in (case.first, client_update(zero.algorithm, payload, state, zero.client())):
        for tensor in tensors(update.tree):
            assert tensor.device.type == "cpu"
            assert not tensor.requires_grad and tensor.grad_fn is None
            assert tensor.is_contiguous()
        assert not memory(update.tree) & memory(payload)
        assert not memory(update.tree) & memory(state)


def test_client_model_is_what_the_row_says_in_evaluation_mode(case: Case) -> None:
    before = case.algorithm.client_model(case.payload(), case.private[0], case.client())
    assert isinstance(before, nn.Module)
    assert not any(module.training for module in before.modules())
    shapes = case.shapes(case.row.deploys)
    assert {name: tuple(parameter.shape) for name, parameter in before.named_parameters()} == shapes
    server = case.algorithm.server_aggregate(case.server_state, iter([case.first[0]]), case.server())
    payload = case.algorithm.server_broadcast(server, case.clients[:1], case.server())[0]
    after = case.algorithm.client_model(payload, case.first[1], case.client())
    changed = [not torch.equal(one, other) for one, other in zip(after.parameters(), before.parameters(), strict=True)]
    assert any(changed), "training does not reach the model that is scored"


def test_zero_learning_rate_is_a_fixed_point(case: Case) -> None:
    zero = case.with_lr_zero()
    updates = []
    for client in range(CLIENTS):
        payload, private = case.payload(client), case.private[client]
        update, state = client_update(zero.algorithm, payload, private, zero.client(1, client))
        assert sha256(state) == sha256(case.private[client] if not case.row.first_mean else {})
        updates.append(update)
    before = sha256(fixed_part(case, case.server_state))
    after = zero.algorithm.server_aggregate(case.server_state, iter(updates), zero.server())
    assert (sha256(fixed_part(case, after)) == before) == case.row.fixed_point
    combined = zero.algorithm.combine(updates)
    assert (combined is not None) == case.row.combines
    if combined is not None:
        after = zero.algorithm.server_aggregate(case.server_state, iter([combined]), zero.server())
        assert (sha256(fixed_part(case, after)) == before) == case.row.fixed_point


def fixed_part(case: Case, state: State) -> State:
    """The server's state without what is made anew in every round from the rest of it, and notes of what was done."""
    made_anew = {
        "everything": ("target",),
        "adapters": ("stack", "since"),
        "operator and sums": ("head", "g", "h"),
    }.get(case.row.uploads, ())
    return {name: part for name, part in state.items() if name not in (*made_anew, "covered")}


def test_training_loss_falls(case: Case) -> None:
    server, private, losses = case.server_state, dict(case.private), []
    for round in range(1, case.row.rounds + 1):
        payloads = case.algorithm.server_broadcast(server, case.clients, case.server(round))
        updates, total = [], 0.0
        for client in range(CLIENTS):
            context = case.client(round, client)
            update, private[client] = client_update(case.algorithm, payloads[client], private[client], context)
            if not case.row.trains:
                assert context.meter.work == []
                return
            assert context.meter.loss is not None
            total += context.meter.loss * case.clients[client].num_examples
            updates.append(update)
        server = case.algorithm.server_aggregate(server, iter(updates), case.server(round))
        losses.append(total / sum(info.num_examples for info in case.clients))
    # The median of three: one round whose loss jumps, as rounding has it, is not what is asked about.
    assert statistics.median(losses[-3:]) < losses[0] - 0.05, losses


def test_a_client_without_data_trains_nothing(case: Case) -> None:
    nothing = Split({}, torch.zeros(0, dtype=torch.long))
    context = case.client(train=nothing)
    update, state = client_update(case.algorithm, case.payload(), case.private[0], context)
    if case.row.uploads not in ("adapters", "more", "operator and class means"):
        assert sha256(fixed_part(case, update.tree)) == sha256(fixed_part(case, case.payload()))
    assert sha256(state) == sha256(case.private[0] if not case.row.first_mean else {})
    assert context.meter.flops == 0 and context.meter.loss is None


# what travels ---------------------------------------------------------------------------------------------------------


def test_bytes_are_as_predicted_without_data(case: Case) -> None:
    (predicted,) = cost_of(case.experiment(), case.predicted).participants
    update, _ = case.first
    assert (predicted.upload_bytes, predicted.upload_params) == (nbytes(update.tree), numel(update.tree))
    assert predicted.download_bytes == (nbytes(case.payload()) if not case.row.first_mean else 0)
    assert predicted.private_bytes == nbytes(case.private[0])
    context = case.client()
    client_update(case.algorithm, case.payload(), case.private[0], context)
    assert bool(context.meter.work) == case.row.trains
    for work in context.meter.work:
        assert predicted.trainable[work.purpose] == work.trainable
        assert predicted.flops_per_step[work.purpose] == work.flops_per_step > 0


def expected_update(case: Case) -> dict[str, tuple[int, ...]]:
    """Names and shapes, from the method's definition."""
    if case.row.uploads == "model":
        return case.shapes(case.row.deploys)
    if case.row.uploads == "nothing":
        return {}
    target = case.shapes("target")
    preset, rank = case.algorithm.preset_name, getattr(case.algorithm, "rank", None)
    operator = of_rank(rank, preset, case.task, case.setting.forms[1], case.target)
    if case.row.uploads == "operator":
        return operator.shapes
    if case.row.uploads == "operator and class means":
        classes, width = case.task.inputs.num_classes, case.target.width
        maps = {f"global.{name}": shape for name, shape in operator.shapes.items()}
        return maps | {"sums": (classes, width), "shares": (classes,)}
    if case.row.uploads == "residual operator":
        own = "width.query", "width.key", "width.value", "width.mlp", "width.pooled"
        return {name: shape for name, shape in operator.shapes.items() if name not in own}
    if case.row.uploads == "operator and sums":
        d, classes = 1 + case.target.width, case.task.inputs.num_classes
        return {**operator.shapes, "g": (d, d), "h": (d, classes)}
    middle = operator.stack(case.task.fresh(case.setting.forms[1], 0))
    parts = {"middle": {name: tuple(t.shape) for name, t in middle.items()}, "target": target}
    parts["global"] = operator.shapes
    return {f"{part}.{name}": shape for part, shapes in parts.items() for name, shape in shapes.items()}


def test_an_update_holds_exactly_what_the_method_says(case: Case) -> None:
    update, _ = case.first
    if case.row.uploads in ("adapters", "more"):  # names and shapes are looked at in the methods' own tests
        numbers = torch.float32 if case.row.trains else torch.float64
        assert update.tree and all(tensor.dtype in (numbers, torch.bool) for tensor in tensors(update.tree))
        return
    sent = flat(update.tree, ".")
    assert {name: tuple(tensor.shape) for name, tensor in sent.items()} == expected_update(case)
    dtypes = {name: torch.float64 if name in ("g", "h") else torch.float32 for name in sent}
    assert {name: tensor.dtype for name, tensor in sent.items()} == dtypes


def test_nothing_private_is_in_an_update(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a name nor values of the small model, the local operator, the intermediate model, the target or data.

    What holds for every method but the one that is there to show what the released code does.
    """
    trained: dict[str, State] = {}

    def recorded(ctx: ClientContext, asked: Training) -> Trained:
        answer = train(ctx, asked)
        trained[asked.purpose] = answer.parameters
        return answer

    monkeypatch.setattr(fedsim.learning.steps, "train", recorded)
    state = client_init(case.algorithm, case.client(round=0))
    if not case.algorithm.name.startswith("fedgrow") or isinstance(case.algorithm, FedGrowCore):
        update, kept = client_update(case.algorithm, case.payload(), state, case.client())
        data = case.shard(0)
        held = [*([] if case.row.reveals else [state, kept]), data.inputs, {"labels": data.labels}]
        private = {content(tensor) for tree in held for tensor in tensors(tree) if tensor.any()}
        assert private.isdisjoint(content(tensor) for tensor in tensors(update.tree) if tensor.any())
        return
    joint = case.algorithm.name in ("fedgrow_joint", "fedgrow_anchored")
    assert set(trained) == ({"pretrain"} if joint else {"pretrain", "local"})

    update, kept = client_update(case.algorithm, case.payload(), state, case.client())
    rounds: State = trained["joint" if joint else "global"]
    shared = rounds.get("global", rounds)  # alone, or beside what else is trained
    local = trained["joint"]["local"] if joint else trained["local"]
    target = dict(
        case.algorithm.client_model({**case.payload(), **update.tree}, kept, case.client()).named_parameters()
    )
    data = case.shard(0)
    trees = [trained["pretrain"], local, state, kept, target, data.inputs, {"labels": data.labels}]
    private = {content(tensor) for tree in trees for tensor in tensors(tree)}
    names = {*trained["pretrain"], *flat(state, "."), *flat(kept, "."), *target}
    found = {name for name, tensor in flat(update.tree, ".").items() if name in names or content(tensor) in private}
    assert len(private) > 40
    if case.row.uploads == "everything":
        assert {f"target.{name}" for name in target} <= found
        return
    assert not found, "private tensors, by name or by value"
    operator = update.tree.get("global", update.tree)  # class means may stand beside it, or sums in it
    assert not {"g", "h"} & shared.keys()
    named = {name.removeprefix("global.") for name in expected_update(case)} - {"sums", "shares", "g", "h"}
    sent = [content(tensor) for name, tensor in operator.items() if name not in ("g", "h")]
    assert sorted(sent) == sorted(content(shared[name]) for name in named)


@pytest.mark.parametrize("case", [row for row in TABLE if row[0].startswith("fedgrow")], ids="-".join, indirect=True)
def test_growth_keeps_what_is_private_as_it_is(case: Case) -> None:
    _, state = case.first
    frozen = {"middle", "small"} | ({"model", "a", "b"} if isinstance(case.algorithm, FedGrowCore) else set())
    before, after = ({name: part for name, part in one.items() if name in frozen} for one in (case.private[0], state))
    if case.row.first_mean:
        assert state == {}, "all a participant holds is what the server sends"
        return
    assert sha256(before) == sha256(after)
    parts = {
        "fedgrow_no_federation": "global",
        "fedgrow_residual": "global",
        "fedgrow_joint": "local",
        "fedgrow_anchored": "local",
        "fedgrow_fused": "gate",
    }
    own = parts.get(case.algorithm.name)
    trained = state[own] if own else {}
    assert set(state) == set(after) | ({own} if own else set())
    assert bool(trained) == (own is not None)
    if own:
        assert any(not torch.equal(trained[name], t) for name, t in case.private[0][own].items())


def test_a_round_in_which_nobody_takes_part_changes_nothing(case: Case) -> None:
    """All participants of a cohort may be away, too late or too small."""
    assert dict(case.algorithm.server_broadcast(case.server_state, [], case.server())) == {}
    after = case.algorithm.server_aggregate(clone(case.server_state), iter(()), case.server())
    assert sha256(after) == sha256(case.server_state)


# what private steps do not protect ------------------------------------------------------------------------------------


def untrained(context: ClientContext, result: object, asked_with: list[str]) -> Any:
    """The result of a client's method whose trainings change nothing: what is left of data is what no step put there.

    - `asked_with`: hashes of what its objectives read go here.
    """
    if not inspect.isgenerator(result):
        return result
    asking: Any = result
    try:
        asked = next(asking)
        while True:
            asked_with.append(sha256(asked.frozen))
            asked = asking.send(Trained(clone(asked.start), 3, 0.5))
    except StopIteration as end:
        return end.value


def test_only_a_method_that_says_so_uses_more_of_data_than_its_steps_do(case: Case) -> None:
    """Shards of equal size and other content: with steps that do nothing, updates and what objectives read are equal to
    the bit, or the method `sends_statistics`, and is then refused with private steps."""
    split = case.shard(1)
    by_label = split.labels.reshape(len(split.labels), -1)[:, 0].argsort(stable=True).numpy()
    used: list[list[str]] = []
    for shard in (by_label[:8], by_label[-8:]):  # of other labels, too
        context, found = case.client(train=split.select(shard)), []
        begun = dataclasses.replace(context, round=0)
        state = untrained(begun, case.algorithm.client_init(begun), found)
        payload = {} if case.row.first_mean else clone(case.payload())
        update, _ = untrained(context, case.algorithm.client_update(payload, clone(state), context), found)
        used.append([*found, sha256(update.tree)])
    assert (used[0] != used[1]) == case.algorithm.sends_statistics
    if case.algorithm.sends_statistics:
        with pytest.raises(ValueError, match=r"algorithm.method=.*no statistics of data"):
            Around(case.algorithm, (ExampleDP(1.0, 1.0, 1e-5),)).check_cohort(CLIENTS)
