"""`benchmarks/overhead.py`: what it measures is what it says, and its figures follow from what was found."""

import ast
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from baselines.fedavg import FedAvg
from benchmarks import overhead
from benchmarks.overhead_bare import export, train, training_of
from benchmarks.overhead_bench import Bench, Sample, finished, flower_python, grown_mb, heard, imports_mb, peak_mb
from benchmarks.overhead_cases import (
    BATCH,
    MEGABYTES_40,
    NEVER,
    SHARD,
    TESTED,
    WORKERS,
    NoOp,
    bulk,
    mixed,
    noop,
    nothing,
    population,
    small_images,
    with_vit,
    without_model,
    work,
    write_images,
)
from benchmarks.overhead_figures import figures_of, lines_of, table_of
from benchmarks.overhead_ours import chosen, timed
from fedsim import load
from fedsim.core.seeding import generator
from fedsim.data.source import load as load_data
from fedsim.experiment import Experiment, load_experiments
from fedsim.models import get_family
from fedsim.runtime import Choice
from tests.support.small_federation import LOCAL, TARGET, Federation, assert_same_bits, weights_of, without_counting


KEYS = {  # other people's scripts read these
    *("noop_seconds", "noop_flower_seconds", "bulk_seconds", "bulk_flower_seconds", "bulk_driver_mb"),
    *("bulk_aggregator_mb", "work_seconds", "work_bare_seconds", "work_flower_seconds", "first_round_seconds"),
    *("population_ratio", "two_nodes_same_bits"),
}


# what is measured -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images of 8x8 pixels."""
    folder = tmp_path_factory.mktemp("overhead") / "small"
    write_images(folder, 40, 8, 1)
    return folder


@pytest.fixture(scope="module")
def no_ops(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Results of five rounds of twelve no-op participants, and what was found."""
    out = tmp_path_factory.mktemp("results")
    experiment = nothing(images, 12, rounds=5, chunk=5, algorithm=NoOp(100))
    return out, timed(experiment, out, Choice("inline"))


def test_images_are_as_many_and_as_large_as_asked_for(images: Path) -> None:
    data = load_data(small_images(images, 30), None)
    assert data.train.inputs["pixel_values"].shape == (30, 1, 8, 8)
    assert len(data.test.labels) == TESTED
    assert len(np.unique(data.train.inputs["pixel_values"].numpy())) > 200, "noise"


def test_an_encoded_image_is_read_as_it_was_drawn(tmp_path: Path) -> None:
    write_images(tmp_path / "large", 3, 32, 3)
    drawn = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    read = load_data(work(tmp_path / "large").task.data, None).train.inputs["pixel_values"]
    assert np.array_equal(read.numpy(), drawn.transpose(0, 3, 1, 2))


def test_no_op_participants_send_back_what_they_received(no_ops: tuple[Path, dict[str, Any]]) -> None:
    rounds = load(no_ops[0]).rounds.sort_values("round")
    assert len({*rounds["state_sha256"]}) == 1, "a mean of equal trees is that tree, bit by bit"
    for way in ("bytes_up", "bytes_down"):
        assert rounds[way].tolist() == [0, *[12 * 100 * 4] * 5]


def test_only_the_first_and_the_last_round_are_scored(no_ops: tuple[Path, dict[str, Any]]) -> None:
    rounds = load(no_ops[0]).rounds.sort_values("round")
    assert rounds["accuracy_mean"].notna().tolist() == [True, False, False, False, False, True]


def test_a_round_lasts_until_it_is_on_disk(no_ops: tuple[Path, dict[str, Any]]) -> None:
    found = no_ops[1]
    whole, rows = overhead.steady(found), overhead.rows(found)
    assert whole is not None and len(found["finished"]) == len(found["wall_seconds"]) == 6
    assert len(whole) == len(rows) == 3
    assert all(everything > row > 0 for everything, row in zip(whole, rows, strict=True))


def test_the_aggregator_leaves_word_of_its_process(images: Path, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    timed(nothing(images, 3, rounds=2, algorithm=NoOp(10, str(witness))), tmp_path / "out", Choice("inline"))
    word = "with" if "transformers" in sys.modules else "without"
    assert witness.read_text() == f"round 2: {word} transformers"


def test_nothing_of_hugging_face_is_imported_without_a_model(images: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from benchmarks.overhead_cases import nothing; "
        "from benchmarks.overhead_ours import timed; from fedsim.runtime import Choice; "
        "timed(nothing(Path(sys.argv[1]), 3, rounds=1), Path(sys.argv[2]), Choice('inline')); "
        "assert 'transformers' not in sys.modules"
    )
    finished([sys.executable, "-c", program, str(images), str(tmp_path / "out")], tmp_path / "log", {})


@pytest.mark.parametrize(
    "experiment, participants, cohort, numel",
    [
        (noop(Path("small")), 1000, 1000, 2_560),
        (bulk(Path("small")), 20, 20, 10_000_000),
        (population(Path("small"), 100), 100, 100, 2_560),
        (population(Path("small"), 10_000), 10_000, 100, 2_560),
    ],
)
def test_sizes_are_those_of_the_table(experiment: Experiment, participants: int, cohort: int, numel: int) -> None:
    assert experiment.participants == participants
    assert (experiment.cohort or participants) == cohort
    assert isinstance(experiment.algorithm, NoOp) and experiment.algorithm.numel == numel
    assert experiment.eval_every == NEVER > experiment.rounds
    shards = experiment.partition.split(np.zeros(experiment.task.data.limit or 0), None, participants, 0)
    assert {len(shard) for shard in shards} == {2}
    assert 4 * MEGABYTES_40 == 40_000_000


def test_the_work_is_twenty_steps_each() -> None:
    experiment = work(Path("large"))
    shards = experiment.partition.split(np.zeros(WORKERS * SHARD), None, experiment.participants, 0)
    assert {len(shard) for shard in shards} == {640} and len(shards) == 50
    assert isinstance(experiment.algorithm, FedAvg)
    assert training_of(experiment)["batch_size"] == BATCH == 32
    assert training_of(experiment)["epochs"] * SHARD // BATCH == 20
    assert (experiment.target.depth, experiment.target.width) == (6, 128)


def test_the_commands_measured_name_experiments() -> None:
    for function, made in (("without_model", without_model()), ("with_vit", with_vit())):
        assert load_experiments(f"benchmarks.overhead_cases:{function}") == [made]
    assert mixed().participants >= 4 and all(tier.num_cpus == 1 for tier in mixed().tiers)


def test_bare_training_takes_the_same_steps(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    without_counting(monkeypatch)
    federation = Federation(FedAvg(**LOCAL, clip=None))
    start, shard, task = federation.payload(1, 2), federation.shards[2], federation.task
    trained = federation.update(1, 2).tree
    model = get_family("vit").build(TARGET, task.inputs)
    train(model, start, task, shard, generator(0, "target/order", 1, 2), weight_decay=0.0, **LOCAL)
    assert_same_bits(weights_of(model), {name: trained[name] for name in weights_of(model)})


def test_what_is_trained_without_fedsim_is_what_participants_hold(tmp_path: Path) -> None:
    write_images(tmp_path / "large", 2 * WORKERS, 32, 3)
    export(work(tmp_path / "large"), tmp_path / "work")
    about = json.loads((tmp_path / "work" / "work.json").read_text())
    assert about["bounds"] == list(range(0, 2 * WORKERS + 1, 2))
    assert about["config"]["hidden_size"] == 128 and about["config"]["num_hidden_layers"] == 6
    assert about["training"] == training_of(work(tmp_path / "large"))
    exported = np.load(tmp_path / "work" / "images.npy")
    held = load_data(work(tmp_path / "large").task.data, None).train.inputs["pixel_values"].numpy()
    assert sorted(image.tobytes() for image in exported) == sorted(image.tobytes() for image in held)
    start = np.load(tmp_path / "work" / "start.npz")
    assert all(torch.from_numpy(start[name]).isfinite().all() for name in start.files)


def test_what_runs_in_flowers_environment_imports_nothing_of_fedsim() -> None:
    tree = ast.parse((Path(overhead.__file__).parent / "overhead_flower.py").read_text())
    names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    ours = {name for name in names if name.split(".")[0] in ("fedsim", "benchmarks", "baselines", "fedgrow_algo")}
    assert ours <= {"benchmarks"}, "the module itself, by its name"


# processes ------------------------------------------------------------------------------------------------------------


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_memory_is_watched_from_outside(tmp_path: Path) -> None:
    program = "import time; time.sleep(0.4); held = bytearray(b'1') * 50_000_000; time.sleep(0.4)"
    below = f"exec -a ray::Server {sys.executable} -c 'import time; time.sleep(1)' & {sys.executable} -c \"{program}\""
    samples = finished(["bash", "-c", below], tmp_path / "log", {}, {"aggregator": "ray::Server"})
    assert samples["aggregator"] and peak_mb(samples["aggregator"])["anonymous"] < 40
    samples = finished(python(program), tmp_path / "log", {}, {})
    assert 45 < grown_mb(samples["driver"], samples["driver"][1].at)["anonymous"] < 80


def test_somebody_with_a_role_must_be_seen(tmp_path: Path) -> None:
    with pytest.raises(ChildProcessError, match="no aggregator was seen"):
        finished(python("import time; time.sleep(0.2)"), tmp_path / "log", {}, {"aggregator": "no such title"})
    with pytest.raises(ChildProcessError, match="0 times before the first round, 1 after"):
        grown_mb([Sample(1.0, 1, 1, 1)], 0.5)


def test_growth_is_from_what_was_held_right_before() -> None:
    series = [Sample(at, held * 10**6, 0, 0) for at, held in ((0, 900), (1, 100), (2, 150), (3, 400), (4, 200))]
    assert grown_mb(series, 2.0)["anonymous"] == 300
    assert peak_mb(series)["anonymous"] == 900


def test_memory_of_imports_is_that_of_a_fresh_process() -> None:
    assert 0 < imports_mb(["json"])["anonymous"] < 40
    with pytest.raises(ChildProcessError, match="import no_such_module"):
        imports_mb(["no_such_module"])


def test_what_a_command_says_is_timed() -> None:
    program = "import time; print('round 0/1', flush=True); time.sleep(0.3); print('round 1/1')"
    zero, one = heard(python(program), {}, ["round 0/", "round 1/"])
    assert 0 < zero < one - 0.2


@pytest.mark.parametrize(
    "program", ["print('round 0/'); raise SystemExit('the last words')", "print('the last words')"]
)
def test_a_command_that_fails_is_quoted(program: str, tmp_path: Path) -> None:
    with pytest.raises(ChildProcessError, match="the last words"):
        heard(python(program), {}, ["round 0/", "round 1/"])
    if "exit" in program.lower():
        with pytest.raises(ChildProcessError, match=r"status 1:\n(.*\n)*the last words"):
            finished(python(program), tmp_path / "log", {})


def test_variables_are_set_and_unset(tmp_path: Path) -> None:
    program = "import os; print(os.environ.get('FLWR_TELEMETRY_ENABLED'), os.environ.get('HOME'))"
    finished(python(program), tmp_path / "log", {"FLWR_TELEMETRY_ENABLED": "0", "HOME": None})
    assert (tmp_path / "log").read_text().split() == ["0", "None"]


def test_a_folder_that_holds_something_else_is_no_environment(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match=r"--flower-env=.*: must be a virtual environment, or a folder that is not"):
        flower_python(tmp_path, lambda text: None)


# figures --------------------------------------------------------------------------------------------------------------


def process(peak: float, grown: float, imports: float = 0.0) -> dict[str, Any]:
    """What a part finds of a process; USS is twice what it holds for itself, RSS is three times that."""

    def measures(value: float) -> dict[str, float]:
        return {"anonymous": value, "uss": 2 * value, "rss": 3 * value}

    return {"peak": measures(peak), "grown": measures(grown), "imports": measures(imports)}


def measured() -> dict[str, list[dict[str, Any]]]:
    """What two repetitions of some parts, and one of others, could have found: every aim is reached."""
    bits = {way: ["a", "b"] for way in ("two nodes", "one host", "inline")}
    few = {"of_100": [1.0, 1.0], "of_10000": [1.0, 1.1], "last": 9.0, "witness": "round 14: without transformers"}
    memory = {"driver": process(300, 60, 200), "aggregator": process(250, 90, 170), "flower": process(3000, 2800)}
    return {
        "noop": [
            {"ours": [0.08, 0.09], "rows": [0.07], "flower": [9.0, 10.0]},
            {"ours": [0.10, 0.11], "rows": [0.07], "flower": [11.0]},
        ],
        "bulk": [
            {"ours": [0.5], "rows": [0.4], "flower": [4.0], "memory": memory},
            {"ours": [0.5], "rows": [0.4], "flower": [4.0], "memory": memory | {"driver": process(310, 80, 200)}},
        ],
        "work": [{"ours": [10.4], "bare": [10.0], "flower": [12.0]}],
        "first": [{"ours": [5.0, 6.0], "vit": [8.0, 9.0], "flower": 7.0}],
        "population": [few | {"memory": {"driver": process(300, 0, 200), "aggregator": process(200, 0, 170)}}],
        "nodes": [bits],
    }


def without_flower(found: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    for repetitions in found.values():
        for each in repetitions:
            if "flower" in each:
                each["flower"] = None
            if "memory" in each:
                each["memory"] = {role: held for role, held in each["memory"].items() if role != "flower"}
    return found


def test_figures_are_medians_of_times_and_the_highest_of_memory() -> None:
    figures = figures_of(measured())
    assert figures["noop_seconds"] == pytest.approx(0.095)
    assert figures["noop_flower_seconds"] == 10.0
    assert figures["bulk_driver_mb"] == 80 and figures["bulk_aggregator_mb"] == 90
    assert (figures["bulk_driver_uss_mb"], figures["bulk_driver_rss_mb"]) == (160, 240)
    assert figures["bulk_flower_driver_mb"] == 2800 and figures["bulk_flower_driver_peak_mb"] == 3000
    assert figures["bulk_driver_above_imports_mb"] == 110
    assert (figures["work_seconds"], figures["work_bare_seconds"], figures["work_flower_seconds"]) == (10.4, 10, 12)
    assert (figures["first_round_seconds"], figures["first_round_vit_seconds"]) == (6, 9)
    assert figures["population_ratio"] == pytest.approx(1.05)
    assert (figures["population_driver_mb"], figures["population_aggregator_mb"]) == (100, 30)
    assert figures["population_aggregator_imports_transformers"] is False
    assert figures["two_nodes_same_bits"] is True


def test_every_figure_is_there_whatever_was_measured() -> None:
    everything = figures_of(measured())
    assert {*everything} >= KEYS and None not in everything.values()
    for found in ({}, {part: [] for part in overhead.PARTS}):
        nothing_at_all = figures_of(found)
        assert nothing_at_all.keys() == everything.keys() and {*nothing_at_all.values()} == {None}
    alone = figures_of(without_flower(measured()))
    assert {key for key, value in alone.items() if value is None} == {key for key in alone if "flower" in key}


def test_one_hash_that_differs_is_enough() -> None:
    found = measured()
    found["nodes"].append({"two nodes": ["a", "c"], "one host": ["a", "b"], "inline": ["a", "b"]})
    assert figures_of(found)["two_nodes_same_bits"] is False


def test_an_aggregator_that_has_imported_transformers_is_told_of() -> None:
    found = measured()
    found["population"][0]["witness"] = "round 14: with transformers"
    figures = figures_of(found)
    assert figures["population_aggregator_imports_transformers"] is True
    assert [line.met for line in lines_of(figures) if "aggregator above its imports" in line.what] == [False]


def test_aims_are_met_missed_or_not_known() -> None:
    assert all(line.met for line in lines_of(figures_of(measured())))
    assert {line.met for line in lines_of(figures_of({}))} == {None}
    unknown = [line.what for line in lines_of(figures_of(without_flower(measured()))) if line.met is None]
    assert [what.split(":")[0] for what in unknown] == [
        "1,000 participants x 10 KB",
        "20 participants x 40 MB",
        "50 participants x 20 steps",
        "command to first round, no model",
        "command to first round, ViT",
    ]


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"noop_seconds": 0.12}, 0),
        ({"noop_flower_seconds": 8.5}, 0),
        ({"bulk_seconds": 0.58}, 1),
        ({"bulk_flower_seconds": 3.4}, 1),
        ({"bulk_driver_mb": 211}, 2),
        ({"work_bare_seconds": 9.9}, 3),
        ({"work_flower_seconds": 10.3}, 3),
        ({"first_round_seconds": 7.1}, 4),
        ({"first_round_vit_seconds": 10.6}, 5),
        ({"population_ratio": 1.06}, 6),
        ({"population_driver_mb": 151}, 7),
        ({"population_aggregator_mb": 151}, 8),
        ({"two_nodes_same_bits": False}, 9),
    ],
)
def test_each_aim_can_be_missed(changes: dict[str, Any], line: int) -> None:
    figures = figures_of(measured()) | {"noop_seconds": 0.095, "population_ratio": 1.05}
    assert [each.met for each in lines_of(figures)] == [True] * 10
    assert [number for number, each in enumerate(lines_of(figures | changes)) if each.met is False] == [line]


def test_the_table_shows_how_many_times_ours_the_others_take() -> None:
    table = table_of(lines_of(figures_of(measured())))
    cells = [[*column.cells] for column in table.columns]
    assert cells[1][3] == "10.4" and cells[2][3] == "12 (1.15x)" and cells[3][3] == "10 (0.962x)"
    assert cells[1][9] == "yes" and cells[2][9] == ""
    assert [*table_of(lines_of(figures_of({}))).columns[1].cells] == ["-"] * 10


# the command ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (["--only", "noop", "everything"], "--only='everything': must be one of noop, bulk, work, first, population"),
        (["--repeat", "0"], "--repeat=0: must be at least 1"),
        (["--json", "no/such/folder/figures.json"], "--json='no/such/folder/figures.json': must be a file in a folder"),
    ],
)
def test_bad_arguments_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert overhead.main([*words, "--without-flower"]) == 2
    assert message in capsys.readouterr().err


def test_a_part_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Bench] = []

    def fails(bench: Bench) -> dict[str, Any]:
        raise ChildProcessError("no luck")

    def works(bench: Bench) -> dict[str, Any]:
        asked.append(bench)
        return measured()["bulk"][0]

    monkeypatch.setattr(overhead, "PARTS", {"noop": fails, "bulk": works})
    words = ["--only", "noop", "bulk", "--repeat", "2", "--without-flower", "--json", str(tmp_path / "figures.json")]
    assert overhead.main(words) == 1
    assert "noop: no luck" in capsys.readouterr().err
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["noop_seconds"] is None and figures["bulk_seconds"] == 0.5
    assert {*figures} >= KEYS | {"versions", "hardware", "git_commit", "found"}
    assert len(asked) == 2 and all(bench.flower is None and not bench.folder.exists() for bench in asked)


def test_every_part_asks_for_an_experiment_that_there_is() -> None:
    for part in ("noop", "bulk", "work", "population", "mixed"):
        options = type("Options", (), {"part": part, "data": Path("images"), "participants": 100, "witness": ""})
        assert isinstance(chosen(options()), Experiment)  # pyright: ignore[reportArgumentType]
