"""The sweep: what it lists and refuses, and that it computes what is missing and nothing else."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from baselines.fedavg import FedAvg
from benchmarks import suites, sweep
from fedgrow_algo.fedgrow import FedGrow
from fedsim.cli import main as fedsim
from fedsim.cli import parser
from fedsim.cli import sweep as cli
from fedsim.experiment import Experiment
from fedsim.results.tables import load
from fedsim.sweeps.suites import arguments_of, experiments_of, suites_in


# What every experiment of `quick` has, made small; shapes are those of the tiny experiment.
DEMO = [("fedgrow", "paper"), ("fedgrow", "preserving"), ("fedavg", "")]
SHRUNKEN = [
    "rounds=1",
    "participants=3",
    "algorithm.batch_size=16",
    "task.data.limit=90",
    "task.patch_size=4",
    "partition.min_size=5",
    "tiers.0.form.width=8",
    "tiers.1.form.width=8",
    "tiers.1.form.depth=1",
    "tiers.2.form.width=8",
    "tiers.2.form.depth=1",
    "intermediate.width=12",
    "intermediate.depth=1",
    "target.width=16",
    "target.depth=2",
]


def refused(capsys: pytest.CaptureFixture, *words: str) -> str:
    assert sweep.main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.out == ""
    return captured.err


# words ----------------------------------------------------------------------------------------------------------------


def test_list_prints_plain_lines(capsys: pytest.CaptureFixture) -> None:
    assert sweep.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {"suite", "algorithm"}
    assert all(len(line.split()) == 2 for line in lines)
    assert len(lines) == len(set(lines))
    assert {"suite quick", "algorithm fedgrow", "algorithm fedgrow_no_federation", "algorithm fedavg"} <= set(lines)
    assert not {"suite tiny", "suite released_ladder", "suite replace"} & set(lines), "not lists of experiments"


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--suite", "quik"], ["--suite='quik'", "did you mean quick"]),
        (["--suite", "tiny"], ["--suite='tiny'", "quick"]),
        (["--suite", "quick", "nothing"], ["--suite='nothing'"]),
        (["--only", "fedgrwo"], ["--only='fedgrwo'", "'quick'", "fedgrow"]),
        (["--only", "fedavg", "fedsgd"], ["--only='fedsgd'", "fedavg"]),
        (["--set", "roundz=1"], ["'quick'", "roundz", "did you mean rounds"]),
        (["--set", "rounds=0"], ["'quick'", "rounds=0"]),
        (["--set", "algorithm.local_epochs=1"], ["'quick'", "algorithm.local_epochs", "fedavg"]),
        (["--only", "fedavg", "--set", "algorithm.preset=paper"], ["algorithm.preset", "fedavg"]),
        (["--seeds", "-1"], ["--seeds=-1"]),
    ],
)
@pytest.mark.parametrize("dry", [["--dry-run"], []], ids=["dry", "wet"])
def test_a_sweep_that_makes_no_sense_is_refused(
    words: list[str], expected: list[str], dry: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    message = refused(capsys, *words, *dry, "--runtime", "inline", "--out", str(tmp_path / "out"))
    for word in expected:
        assert word in message
    assert not (tmp_path / "out").exists()


def test_a_number_of_hosts_below_one_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "--hosts=0" in refused(capsys, "--hosts", "0", "--runtime", "inline", "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_seeds_are_whole_numbers(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        sweep.main(["--seeds", "one"])
    assert stopped.value.code == 2
    assert "--seeds" in capsys.readouterr().err


def test_no_suite_holds_an_experiment_twice() -> None:
    for name, make in suites_in(suites).items():
        if name in ("checkpoints", "gates", "study-grid"):  # need public models: `test_suites.py` makes them
            continue
        experiments = make(**arguments_of(make, cli.LISTED))
        assert len({experiment.run_id for experiment in experiments}) == len(experiments)


def test_only_and_seeds_choose_experiments() -> None:
    words = ["--only", "fedavg", "fedgrow", "--seeds", "4", "7", "4", "--set", "rounds=2"]
    chosen = experiments_of(suites_in(suites), "quick", parser().parse_args(["sweep", *words]))
    assert [(one.seed, one.algorithm.name, one.algorithm.preset_name) for one in chosen] == [
        (seed, *algorithm)
        for seed in (4, 7)
        for algorithm in (*DEMO, *DEMO[1:])  # from scratch, and from a public model
    ]
    assert {one.rounds for one in chosen} == {2}


def test_the_demo_compares_both_presets_with_fedavg_at_ffn_ratio_one() -> None:
    experiments = suites.quick()
    assert {(one.algorithm.name, one.algorithm.preset_name) for one in experiments} >= {
        ("fedgrow", "paper"),
        ("fedgrow", "preserving"),
        ("fedavg", ""),
    }
    for one in (*experiments, suites.tiny()):
        assert all(form.inner == form.width for form in (*one.forms, one.middle, one.target))
    tiny = suites.tiny()
    assert (tiny.participants, tiny.rounds, len({*tiny.forms})) == (3, 3, 3)


# work -----------------------------------------------------------------------------------------------------------------


def one_suite(*experiments: Experiment) -> Callable[[], list[Experiment]]:
    def small() -> list[Experiment]:
        return list(experiments)

    small.__module__ = suites.__name__
    return small


def test_dry_run_prints_what_would_be_run(
    tmp_path: Path, tiny_experiment: Experiment, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suites, "small", one_suite(tiny_experiment), raising=False)
    monkeypatch.setattr(cli, "run_all", lambda *_, **__: pytest.fail("a dry run computes nothing"))
    out = tmp_path / "out"
    assert sweep.main(["--suite", "small", "--seeds", "0", "5", "--dry-run", "--out", str(out)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "suite small: 2 runs"
    for seed in (0, 5):
        run_id = dataclasses.replace(tiny_experiment, seed=seed).run_id
        assert [line for line in lines if run_id in line and f"seed {seed}" in line]
    # Global grows 16x2 into 20x3. One map of the residual axis, a map for each of two blocks of queries, keys, values
    # and the MLP, and a 3x2 table for each of a block's eight modules; 4 bytes, down and up, 3 participants, 4 rounds.
    operator = 20 * 16 + 4 * 2 * 20 * 16 + 8 * 3 * 2
    (row,) = [line.split() for line in lines if line.startswith(" fedgrow ")]
    assert row[5:8] == ["2", "4", f"{operator * 4 * 2 * 3 * 4 / 1e6:.1f}"]
    assert not out.exists()


def test_a_sweep_computes_reports_and_the_second_time_computes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--only", "fedbrb_like", "--seeds", "0", "1", "--runtime", "inline", "--out", str(tmp_path)]
    words += ["--set", *SHRUNKEN]
    assert sweep.main(words) == 0
    said = capsys.readouterr().out
    assert "fedbrb_like" in said and str(tmp_path / "report.html") in said.replace("\n", "")
    assert "<html" in (tmp_path / "report.html").read_text()
    results = load(tmp_path)
    assert sorted(zip(results.runs.seed, results.runs.status, results.runs.suite, strict=True)) == [
        (0, "finished", "quick"),
        (1, "finished", "quick"),
    ]
    assert len(results.rounds) == 4

    monkeypatch.setattr("fedsim.sweeps.runner.run", lambda *_, **__: pytest.fail("computed again"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")}
    assert sweep.main(words) == 0
    assert capsys.readouterr().out.count("finished before") == 2
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")} == before


def test_an_interrupted_sweep_computes_only_what_is_missing(
    tmp_path: Path, tiny_experiment: Experiment, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [dataclasses.replace(tiny_experiment, rounds=1), dataclasses.replace(tiny_experiment, rounds=1, seed=9)]
    assert isinstance(tiny_experiment.algorithm, FedGrow)
    monkeypatch.setattr(suites, "small", one_suite(both[0]), raising=False)
    words = ["--suite", "small", "--runtime", "inline", "--out", str(tmp_path), "--seeds", "0", "9"]
    real, done = cli.run_all, []

    def interrupted(experiments: list[Experiment], **fields) -> list:
        done.extend(real(experiments[:1], **fields))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cli, "run_all", interrupted)
        assert sweep.main(words) == 130
    assert load(tmp_path).runs.run_id.tolist() == [both[0].run_id]
    capsys.readouterr()
    assert sweep.main(words) == 0
    said = capsys.readouterr().out
    assert f"finished before, run {both[0].run_id}" in said and f"run {both[1].run_id}" not in said
    assert set(load(tmp_path).runs.run_id) == {one.run_id for one in both}


def test_a_run_that_fails_is_named_and_the_others_are_reported(
    tmp_path: Path, tiny_experiment: Experiment, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = dataclasses.replace(tiny_experiment, rounds=1)
    bad = dataclasses.replace(good, algorithm=FedAvg(lr=1e-3))
    monkeypatch.setattr(suites, "small", one_suite(bad, good), raising=False)
    monkeypatch.setattr(FedAvg, "server_aggregate", lambda *_: 1 / 0)
    words = ["--suite", "small", "--runtime", "inline", "--out", str(tmp_path), "--seeds", "0"]
    assert sweep.main(words) == 1
    said = capsys.readouterr().out
    assert f"run {bad.run_id} failed: ZeroDivisionError: division by zero" in said
    assert f"go on with: fedsim sweep {' '.join(words)}" in said
    assert load(tmp_path).runs.set_index("run_id").status.to_dict() == {bad.run_id: "failed", good.run_id: "finished"}
    assert (tmp_path / "report.html").exists()


def test_a_suite_of_ones_own_is_swept_by_its_name(
    tmp_path: Path, tiny_settings: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_study.py").write_text(
        "from dataclasses import replace\n"
        "from baselines.fedavg import FedAvg\n"
        "from benchmarks.suites import tiny\n"
        "def my_suite(scale=1.0):\n"
        "    return [replace(tiny(), rounds=round(2 * scale)), replace(tiny(), rounds=1, algorithm=FedAvg())]\n"
        "def one(): return tiny()\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ["sweep", "my_study:my_suite", "--only", "fedavg", "--seeds", "0", "1", "--runtime", "inline"]
    settings = [setting for setting in tiny_settings if not setting.startswith("rounds=")]
    settings = [setting for setting in settings if not setting.startswith("algorithm.") or "batch_size" in setting]
    assert fedsim([*words, "--set", *settings]) == 0
    runs = load(tmp_path / "results" / "my-suite").runs
    assert sorted(zip(runs.algorithm, runs.seed, strict=True)) == [("fedavg", 0), ("fedavg", 1)]
    assert set(runs.suite) == {"my-suite"} and "my_study:my_suite" in runs.command[0]
    capsys.readouterr()
    assert fedsim([*words, "--scale", "2"]) == 2 and "--scale=2.0" in capsys.readouterr().err
    assert fedsim(["sweep", "my_study:my_sweet"]) == 2 and "my_suite" in capsys.readouterr().err
    runs_before = set(load(tmp_path / "results" / "my-suite").runs.run_id)
    assert fedsim([*words, "--seeds", "2", "--reference", "typo", "--set", *settings]) == 2
    assert "--reference='typo': must be one of fedavg" in capsys.readouterr().err
    assert set(load(tmp_path / "results" / "my-suite").runs.run_id) == runs_before, "refused before anything starts"
    assert fedsim(["sweep"]) == 2 and "--suite NAME" in capsys.readouterr().err
    assert fedsim(["sweep", "my_study:one", "my_study:one"]) == 2 and "two suites" in capsys.readouterr().err
