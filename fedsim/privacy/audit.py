"""`fedsim audit DIR`: attacks on what the participants of finished runs have sent, and on what they deploy.

    of every run              the experiment and its data, each round's exchanges, private states, the last checkpoint
    first and last round      membership, labels and reconstruction, of a few participants, at each level of knowledge
    runs of three seeds       membership, by models that have seen an example and others that have not
    all rounds                which participant an update came from
    the last checkpoint       membership, of the models that are deployed

Only runs with `--keep-updates` can be audited. What is measured: docs/audits.md.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.algorithm import State
from fedsim.core.fields import refuse
from fedsim.core.tree import PATH, Tree, flat
from fedsim.privacy import online, told
from fedsim.privacy.attacks import membership, properties
from fedsim.privacy.attacks.replay import (
    INTERMEDIATE,
    SHARED,
    Replay,
    change,
    vector,
)
from fedsim.privacy.evidence import Evidence, curves, pictures
from fedsim.privacy.kept import Run, opened_run
from fedsim.privacy.measures import Told, Value, mean, share
from fedsim.privacy.pairs import bare, hidden
from fedsim.results.columns import row_of
from fedsim.results.export import deployed
from fedsim.results.pictures import write_pictures
from fedsim.results.records import AttackRecord
from fedsim.results.store import runs_in
from fedsim.results.tables import write_table
from fedsim.storage.place import Place


PARTICIPANTS = 6  # of a run are attacked one by one
EXAMPLES, GRADIENTS = 2000, 32  # pairs of a member and another: where each costs a forward pass, or a gradient

UNBOUNDED = ("psnr", "ssim", "correlation")  # all others are shares

Say = Callable[[str], None]


def audit(
    directory: Place, run_id: str | None, data_dir: str | None, modules: Sequence[ModuleType] = (), say: Say = print
) -> dict[str, list[dict[str, Any]]]:
    """Attack the finished runs of a folder, or one of them, and write the tables `attacks` and `roc`, and images that
    were found (`fedsim.results.pictures`).

    - `modules`: where classes of a run's config may lie, as of `export`. - `say`: is told which run is next.

    **Returns:** the rows of each run. **Raises:** `ValueError` for a run that did not finish, did not keep its updates,
    or was computed from other sources or data; nothing is attacked then.
    """
    runs = runs_in(directory)
    chosen = [run_id] if run_id is not None else [*runs.run_id[runs.status == "finished"]]
    if not chosen:
        refuse("DIR", str(directory), "a folder with a finished run")
    opened = [opened_run(directory, id_, data_dir, modules) for id_ in chosen]
    found: dict[str, list[dict[str, Any]]] = {}
    by_seed = across_seeds(opened)
    for run in opened:
        say(f"{run.method}, seed {run.experiment.seed}: run {run.run_id}")
        if hidden(run.experiment.algorithm):
            say("  what was sent are words of a secure sum: only what is deployed is attacked")
        evidence = list[Evidence]()
        found[run.run_id] = [
            row_of("attacks", record) for record in records(run, by_seed.get(run.run_id, {}), evidence)
        ]
        write_table(directory, "attacks", run.run_id, found[run.run_id])
        write_table(directory, "roc", run.run_id, [row_of("roc", record) for record in curves(run, evidence)])
        write_pictures(directory, run.run_id, pictures(evidence))
    return found


# what is measured ---------------------------------------------------------------------------------------------------


Attacked = tuple[str, str, int | None, dict[str, Value]]  # attack, knowledge, participant, values by metric
Found = Iterator[Attacked]


def records(run: Run, by_seed: Mapping[int, list[Attacked]], evidence: list[Evidence]) -> Iterator[AttackRecord]:
    """Every value that is measured on a run; of what is measured of several participants, the mean as well.

    - `by_seed`: what other seeds help to find, by round. - `evidence`: receives what the values were measured of.
    """
    whole = SimpleNamespace(run_id=run.run_id, experiment=run.experiment, method=run.method)
    attacked = [(round, itertools.chain(of_round(run, round), by_seed.get(round, ()))) for round in ends(run)]
    last = ends(run)[-1]
    for round, found in (*attacked, (last, on_deployed(run)), (last, attribution(run))):
        several: dict[tuple[str, str, str], list[float]] = {}
        for attack, level, client, values in found:
            if isinstance(values, Told):
                evidence.append(Evidence(round, attack, level, client, values))
            for metric, value in values.items():
                yield AttackRecord(whole, attack, level, round, client, metric, *value)
                if client is not None:
                    several.setdefault((attack, level, metric), []).append(value.value)
        for (attack, level, metric), each in several.items():
            yield AttackRecord(
                whole,
                attack,
                level,
                round,
                None,
                metric,
                *(mean(each) if metric.removesuffix("_chance") in UNBOUNDED else mean(each, 0.0, 1.0)),
            )


def ends(run: Run) -> list[int]:
    """The first and the last round."""
    return [*dict.fromkeys((min(run.rounds), max(run.rounds)))]


def across_seeds(opened: Sequence[Run]) -> dict[str, dict[int, list[Attacked]]]:
    """What runs that differ in their seed alone tell of each other, by run and round."""
    alike, found = dict[str, list[Run]](), dict[str, dict[int, list[Attacked]]]()
    for run in opened:
        alike.setdefault(dataclasses.replace(run.experiment, seed=0).run_id, []).append(run)
    for runs in alike.values():
        for round in ends(runs[0]):
            for run_id, values in online.across_seeds(runs, round, PARTICIPANTS, EXAMPLES):
                found.setdefault(run_id, {}).setdefault(round, []).append(values)
    return found


def of_round(run: Run, round: int) -> Found:
    """Attacks on the updates of one round."""
    clients = run.rounds[round]
    sent = {client: run.exchange(round, client).sent for client in clients}
    for client in clients[:PARTICIPANTS]:
        for level, replay in run.replays(round, client).items():
            others = [each for other, each in sent.items() if other != client]
            for attack, values in on_update(run, replay, others, examples=client == clients[0]):
                yield attack, level, client, values


def on_update(
    run: Run, replay: Replay, others: Sequence[State], examples: bool
) -> Iterator[tuple[str, dict[str, Value]]]:
    """Attacks on one update, at one level of knowledge.

    - `others`: what others sent in the same round. - `examples`: whether to reconstruct any.
    """
    client = replay.exchange.client
    many, few = run.pairs(client, EXAMPLES), run.pairs(client, GRADIENTS)
    if replay.sends_what_it_receives and flat(replay.exchange.sent) and many:
        target = [membership.confidences(run.task, replay.model(replay.exchange.sent), split) for split in many]
        yield "loss", membership.readings(target[0][:, 0], target[1][:, 0])
        if len(others) > 1:
            out = [[membership.confidences(run.task, replay.model(s), split)[:, 1] for s in others] for split in many]
            scores = [membership.likelihood_ratio(t[:, 1], np.stack(o)) for t, o in zip(target, out, strict=True)]
            yield "likelihood", membership.readings(*scores)
    asked = replay.asked()
    moved = change(asked, replay.exchange.sent) if asked else None
    if asked is None or moved is None or not any(tensor.any() for tensor in moved.values()):
        return
    if few:
        yield "alignment", membership.readings(*(membership.alignment(asked, moved, run.task, each) for each in few))
        if layer := layer_of_low_rank(replay, moved):
            model, name, rows = layer
            seen = [membership.inputs_of(model, name, run.task, each) for each in few]
            yield "residual", membership.readings(*(membership.residual(rows, each) for each in seen))
    if (bias := of_axis(run, moved, "=class", 1)) is not None:
        yield "labels", told.labels(properties.histogram(bias), run.shard(client).labels)
    if run.task.inputs.kind in ("image", "text"):
        names = sorted(moved)
        mix = properties.mix(told.gradients_of_classes(run.task, asked, names), vector(moved, names))
        yield "labels_by_gradients", told.labels(mix, run.shard(client).labels)
    if (embedding := of_axis(run, moved, "=token", 2)) is not None:
        yield "tokens", told.tokens(run.task, embedding, run.shard(client))
    if not examples:
        return
    if run.task.inputs.kind == "image":
        yield from told.image(run, replay, asked)
        yield "inversion_update", told.images_of_update(run, replay, asked, moved)
    elif values := told.tokens_of_step(run, replay, asked):
        yield "dager", values


def on_deployed(run: Run) -> Found:
    """Membership by the loss of what participants deploy after the last round; what making it takes is its level."""
    for client in sorted({id_ for ids in run.rounds.values() for id_ in ids})[:PARTICIPANTS]:
        if (both := run.pairs(client, EXAMPLES)) is None:
            continue
        model, made_of = deployed(run.directory, dict(run.row), run.experiment, client)
        scores = [membership.confidences(run.task, model, split)[:, 0] for split in both]
        yield "loss_deployed", INTERMEDIATE if made_of.private else SHARED, client, membership.readings(*scores)


def attribution(run: Run) -> Found:
    """Who sent an update, by who had sent the most alike one the last time that all of its round took part."""
    hits = of = 0
    before: Tensor | None = None
    known: Sequence[int] = ()
    for round, clients in run.rounds.items():
        changes = [moved for client in clients if (moved := sent_change(run, round, client)) is not None]
        if len(changes) < len(clients) or len(clients) < 2:
            return
        names = sorted(changes[0])
        if any(sorted(each) != names or each[n].shape != changes[0][n].shape for each in changes for n in names):
            return
        rows = torch.stack([vector(each, names) for each in changes])
        rows = rows - rows.mean(0)
        if before is not None and set(clients).issubset(known):
            said = [known[place] for place in properties.nearest(rows, before).tolist()]
            hits += sum(one == other for one, other in zip(said, clients, strict=True))
            of += len(clients)
            chance = 1 / len(known)
        before, known = rows, clients
    if of:
        yield "attribution", SHARED, None, {"top1": share(hits, of), "top1_chance": Value(chance)}


# parts --------------------------------------------------------------------------------------------------------------


def sent_change(run: Run, round: int, client: int) -> Tree | None:
    """What was received less what was sent; None where these are not of the same names."""
    found = run.exchange(round, client)
    _, received = bare(run.experiment.algorithm, found.received)
    one, other = flat(received), flat(found.sent)
    return {n: one[n] - other[n] for n in other} if one.keys() == other.keys() and one else None


def of_axis(run: Run, moved: Tree, axis: str, dims: int) -> Tensor | None:
    """The change of the tensor of so many dimensions whose first is this one, if there is one alone."""
    specs = run.task.specs(run.experiment.target)
    named = {name: specs.get(name.rpartition(PATH)[2]) for name in moved}
    found = [moved[n] for n, spec in named.items() if spec and spec.dims[0] == axis and len(spec.dims) == dims]
    return found[0] if len(found) == 1 else None


def layer_of_low_rank(replay: Replay, moved: Tree) -> tuple[nn.Module, str, Tensor] | None:
    """The model before the round, and the linear layer of it whose change, which it returns as well, `(rows, in)`, has
    the fewest directions for its inputs; None where none leaves any out."""
    if not replay.sends_what_it_receives:
        return None
    model, found = replay.model(replay.exchange.received), list[tuple[float, str, Tensor]]()
    layers = {name: each.in_features for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    for name, tensor in moved.items():
        layer, _, kind = name.rpartition(PATH)[2].rpartition(".")
        if kind == "weight" and tensor.dim() == 2 and tensor.shape[1] == layers.get(layer) and tensor.any():
            found.append((membership.rank(tensor) / tensor.shape[1], layer, tensor))
    if not found or min(found, key=lambda each: each[0])[0] >= 1:
        return None
    _, layer, tensor = min(found, key=lambda each: each[0])
    return model, layer, tensor
