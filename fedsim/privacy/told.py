"""What updates tell of a participant's data, next to the truth: how often labels are there, tokens, images."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from fedsim.algorithm import Training
from fedsim.core.seeding import generator, numpy_generator
from fedsim.core.submodel import ParamSpec
from fedsim.core.tree import PATH, Tree, flat
from fedsim.data.source import Split
from fedsim.data.vision import floats
from fedsim.learning.task import Task
from fedsim.learning.training import train
from fedsim.privacy.attacks import properties, reconstruction
from fedsim.privacy.attacks.replay import Replay, change, gradient, seen_by
from fedsim.privacy.kept import Run
from fedsim.privacy.measures import Told, Value, nearest, psnr, share, ssim


SEARCH = reconstruction.Inversion(starts=2, iterations=40)  # of one image a run, round and level
SEARCH_UPDATE = reconstruction.Inversion(starts=1, iterations=20)  # of several at once, from a whole update
READS = "<embed"  # how a family declares the dimension of a weight that reads the residual stream
OF_A_CLASS = 16  # test examples, of the gradient of a class
PLACES = 32  # of a text, the first so many are looked at
IMAGES = 4  # that are looked for in an update
PUBLIC = 2000  # images nobody trained on: of their mean


def labels(found: Tensor, there: Tensor) -> dict[str, Value]:
    """How well a shard's histogram of labels `(classes,)` is told; `_chance`: by one who says that all are alike."""
    truth = torch.bincount(there, minlength=len(found)).double() / len(there)
    even = torch.full_like(truth, 1 / len(found))
    correlation = torch.corrcoef(torch.stack([found, truth]))[0, 1].nan_to_num()
    distances = {"distance": properties.distance(found, truth), "distance_chance": properties.distance(even, truth)}
    return {"correlation": Value(float(correlation))} | {name: Value(value) for name, value in distances.items()}


def gradients_of_classes(task: Task, asked: Training, names: list[str]) -> Tensor:
    """Of the objective at the start, on some of the test set's examples of each class: `(classes, size)`."""
    assert task.dataset is not None
    test, found = task.dataset.test, []
    size = sum(flat(asked.start)[name].numel() for name in names)
    for label in range(task.inputs.num_classes):
        places = (test.labels == label).nonzero().flatten()[:OF_A_CLASS]
        found.append(gradient(asked, names, task.batch(test, places)) if len(places) else torch.zeros(size))
    return torch.stack(found)


def tokens(task: Task, embedding: Tensor, shard: Split) -> dict[str, Value]:
    """Which of a shard's tokens are told by the rows that changed."""
    batch = task.batch(shard, torch.arange(len(shard)))
    there = {*batch["input_ids"][batch["attention_mask"] > 0].tolist()}
    found = {*reconstruction.tokens_there(embedding).tolist()}
    values = {"token_recall": share(len(found & there), len(there))}
    return values | ({"token_precision": share(len(found & there), len(found))} if found else {})


def image(run: Run, replay: Replay, asked: Training) -> Iterator[tuple[str, dict[str, Value]]]:
    """One of the participant's images, from what it would have sent of it alone."""
    own, asked, moved = of_one_step(run, replay, asked)
    truth = run.task.batch(own, torch.arange(1))["pixel_values"]
    low, high, span = bounds(run.task, truth.shape[1:])

    def compared(image: Tensor) -> Told:
        values = {"psnr": Value(psnr(image, truth, span)), "ssim": Value(ssim(image[0], truth[0], span))}
        true, found = (((each[0] - low) / (high - low)).clamp(0, 1) for each in (truth, image))
        return Told(values, images=(true, found))

    stream, shape = stream_of(run, replay, "audit/invert"), tuple(truth.shape[1:])
    found = reconstruction.invert(asked, moved, 1, own.labels, shape, (low, high), stream, SEARCH)
    yield "inversion", compared(found)
    if (patches := reconstruction.patches(moved)) is not None:
        image = reconstruction.patches_to_images(reconstruction.inputs(*patches), shape)
        yield "inputs", compared(torch.minimum(torch.maximum(image, low), high))


def images_of_update(run: Run, replay: Replay, asked: Training, moved: Tree) -> dict[str, Value]:
    """Some images of the shard, from all local steps: what was sent is taken for one step on these images alone.

    Of plain SGD it is lr x steps times a mean gradient, and a cosine sees neither factor. Geiping et al. 2020, section
    6, go through the single steps, which takes knowing the batches. Labels are those of as many examples.

    **Returns:** means over the images, each with the shard's nearest one; `_chance`: of the mean image of the test set.
    """
    assert run.task.dataset is not None
    shard, test = run.shard(replay.exchange.client), run.task.dataset.test
    truth = run.task.batch(shard, torch.arange(len(shard)))["pixel_values"]
    even = run.task.batch(test, torch.arange(min(len(test), PUBLIC)))["pixel_values"].mean(0, keepdim=True)
    low, high, span = bounds(run.task, truth.shape[1:])
    stream, shape = stream_of(run, replay, "audit/invert_update"), tuple(truth.shape[1:])
    known = shard.labels[torch.randperm(len(shard), generator=stream)[:IMAGES]]
    found = reconstruction.invert(asked, moved, 1, known, shape, (low, high), stream, SEARCH_UPDATE)
    chance = {f"{name}_chance": value for name, value in nearest(even, truth, span).items()}
    return nearest(found, truth, span) | chance


def tokens_of_step(run: Run, replay: Replay, asked: Training) -> dict[str, Value] | None:
    """Which token stood at which place of one text, from what would have been sent of it alone: DAGER's span test.

    The first block's projections of queries, keys and values read what a token and its place say alone, so that every
    token at every place can be tested. None where these are not among what is sent. How long the text is, is known.
    """
    own, start, moved = of_one_step(run, replay, asked)
    specs, weights = run.task.specs(run.experiment.target), flat(start.start)
    found = [(name, spec) for name in moved if (spec := specs.get(name.rpartition(PATH)[2])) and projects(spec)]
    if not found or not replay.sends_what_it_receives:
        return None
    model = replay.model(replay.exchange.received)
    # Parts of an adapter bear the name of the weight that they are added to.
    whole = {name: model.get_parameter(name.rpartition(PATH)[2]).shape for name, _ in found}
    found = [(name, spec) for name, spec in found if moved[name].shape == whole[name]]
    if not found:
        return None
    layer = model.get_submodule(found[0][0].rpartition(PATH)[2].rpartition(".")[0])
    rows, before = (
        torch.cat([tree[name].T if spec.dims[0] == READS else tree[name] for name, spec in found])
        for tree in (moved, weights)
    )
    ids = torch.arange(run.task.inputs.vocab_size or 0)[:, None]

    def candidates(place: int) -> Tensor:
        at = {"attention_mask": torch.ones_like(ids), "position_ids": torch.tensor([[place]])}
        return seen_by(layer, model, {"input_ids": ids, **at})[:, 0]

    text = own.examples(torch.arange(1))
    there = text["input_ids"][text["attention_mask"] > 0][:PLACES].tolist()
    said = reconstruction.tokens_in_span(rows, candidates, len(there), reconstruction.rounding_of(before))
    hits, of = sum(token in each for token, each in zip(there, said, strict=True)), sum(map(len, said))
    return {"token_recall": share(hits, len(there))} | ({"token_precision": share(hits, of)} if of else {})


# parts --------------------------------------------------------------------------------------------------------------


def of_one_step(run: Run, replay: Replay, asked: Training) -> tuple[Split, Training, Tree]:
    """One of the participant's examples, that step, and the change (start - sent) it would have sent of it alone.

    It trains from its true private state, whatever the attacker takes for that, and as pairs around the method have it
    train; what they do to the update afterwards is left out.
    """
    client = replay.exchange.client
    shard = run.shard(client)
    own = shard.select(numpy_generator(run.experiment.seed, "audit/image", client=client).integers(len(shard), size=1))
    truly = dataclasses.replace(replay, state=run.replays(replay.exchange.round, client).popitem()[1].state)
    trained = truly.asked()
    assert trained is not None
    step = {"epochs": 1, "batch_size": 1, "accumulate": 1}
    ctx, private = dataclasses.replace(replay.ctx, train=own), dataclasses.replace(trained, **step)
    for pair in getattr(run.experiment.algorithm, "pairs", ()):
        private = pair.training(private, ctx)
    done = train(ctx, private)
    start, end = flat(trained.start), flat(done.parameters)
    names = change(asked, replay.exchange.sent) or {}
    return own, dataclasses.replace(asked, **step), {name: start[name] - end[name] for name in names}


def projects(spec: ParamSpec) -> bool:
    """Whether this is a weight of the first block that makes queries, keys or values of the residual stream."""
    made = any(text.startswith(("query:", "key:", "value:")) for text in spec.dims)
    return spec.layer == 0 and made and READS in spec.dims


def bounds(task: Task, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, float]:
    """The least and the largest value of pixels, `(C, 1, 1)` each, and how far apart they are at most."""
    low, high = (
        floats(torch.full((1, *shape), edge, dtype=torch.uint8), task.config.data)[0, :, :1, :1] for edge in (0, 255)
    )
    return low, high, float((high - low).max())


def stream_of(run: Run, replay: Replay, purpose: str) -> torch.Generator:
    return generator(run.experiment.seed, purpose, replay.exchange.round, replay.exchange.client)
