"""Where the time of a round went, and what TensorBoard is told."""

import dataclasses
import importlib.util
import io
import re
import time
import urllib.request
from pathlib import Path

import pytest
import ray
from rich.console import Console

import fedsim
from fedsim.cli import main
from fedsim.experiment import Experiment
from fedsim.runtime.inline import InlineRuntime
from fedsim.sweeps.profile import print_profile
from fedsim.sweeps.progress import overview_for
from fedsim.sweeps.runner import run_all
from fedsim.sweeps.tensorboard import SCALARS, Boards
from tests.support.disturbed import small
from tests.support.manifests import rewrite


PHASES = [f"{phase}_seconds" for phase in ("broadcast", "compute", "sum", "write", "idle")]


@pytest.fixture(scope="module")
def observed(tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder of a run that was asked for everything there is."""
    out, console = tmp_path_factory.mktemp("observed"), Console(quiet=True)
    overview = Boards(overview_for(console), out)
    assert run_all([tiny_experiment], out=out, make_runtime=InlineRuntime, profile=True, overview=overview) == []
    return out


def test_every_second_of_a_round_is_somewhere(observed: Path) -> None:
    results = fedsim.load(observed)
    profile = results.profile
    assert profile.groupby("round").place.apply(list).tolist() == [["driver", "aggregator", "host 0"]] * 3
    assert (profile[PHASES].to_numpy() >= 0).all()
    total = profile.assign(total=profile[PHASES].sum(axis=1)).groupby("round").total
    assert (total.max() - total.min()).max() < 1e-6, "every place saw the whole round"
    assert (total.max() >= results.rounds.set_index("round").wall_seconds).all(), "with what is written after it"
    host = profile[profile.place == "host 0"].set_index("round")
    busy = results.clients.groupby("round").train_seconds.sum()
    assert (host.compute_seconds >= busy).all(), "training, and scoring"


def test_a_profile_goes_on_where_a_run_was_cut(observed: Path, tiny_experiment: Experiment, tmp_path: Path) -> None:
    import shutil

    from fedsim.core.numerics import NATIVE, in_force
    from fedsim.results.store import RunStore
    from fedsim.storage.checkpoint import Versions

    out = tmp_path / "out"
    shutil.copytree(observed, out)
    run_id = tiny_experiment.run_id
    (out / "runs" / f"{run_id}.parquet").unlink()
    manifest = out / "checkpoints" / run_id / "manifest.json"
    rewrite(manifest, round=1)
    assert Versions(manifest.parent, "server").load(before=2) is not None
    assert RunStore(out, run_id, "").open(resume=True, numerics=in_force(NATIVE)) == 2
    assert run_all([tiny_experiment], out=out, make_runtime=InlineRuntime, profile=True) == []
    assert fedsim.load(out).profile["round"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_run_that_was_not_asked_has_no_profile(tiny_run: Path) -> None:
    assert fedsim.load(tiny_run).profile.empty and not (tiny_run / "profile").exists()


def test_the_profile_is_printed(observed: Path) -> None:
    console = Console(record=True, width=100, file=io.StringIO())
    print_profile(fedsim.load(observed).profile, console)
    text = console.export_text()
    assert "seconds of round 0" in text and "seconds of a round, on average" in text
    assert text.count("aggregator") == text.count("host 0") == 2


def test_the_command_prints_and_writes_both(tiny_settings: list[str], tmp_path: Path, capsys) -> None:
    words = ["run", "benchmarks.suites:tiny", "--runtime", "inline", "--out", str(tmp_path), "--set", *tiny_settings]
    assert main([*words, "--profile", "--tensorboard"]) == 0
    assert "seconds of a round" in capsys.readouterr().out
    assert len(list((tmp_path / "tensorboard").glob("*/events*"))) == 1


def told_to_ray() -> dict[str, dict[str, float]]:
    """What this machine's Ray exports for Prometheus of runs, by process: each of its series, and its value."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    told: dict[str, dict[str, float]] = {}
    for name, labels, value in re.findall(r"^ray_fedsim_(\w+)\{(.*)\} (\S+)$", "\n".join(lines), re.MULTILINE):
        known = dict(re.findall(r'(\w+)="(.*?)"', labels))
        series = "_".join(filter(None, (name, known.get("direction"))))
        told.setdefault(known["WorkerId"], {})[series] = float(value)
    return told


@pytest.mark.ray
def test_ray_is_told_of_rounds_bytes_and_how_busy_hosts_were(cluster: None, tmp_path: Path) -> None:
    # Ray exports late what other servers told, so this run has a server of its own, which is not there yet.
    from fedsim.runtime.ray_runtime import RayRuntime

    others, experiment = set(told_to_ray()), dataclasses.replace(small(), rounds=5)
    assert run_all([experiment], out=tmp_path, make_runtime=lambda: RayRuntime(hosts=1)) == []
    end, wanted, told = time.monotonic() + 600, experiment.rounds + 1, dict[str, float]()
    while told.get("rounds_total") != wanted and time.monotonic() < end:
        time.sleep(0.2)
        ours = (series for process, series in told_to_ray().items() if process not in others)
        told = next((series for series in ours if series.get("rounds_total") == wanted), {})
    assert told, f"no process told of {wanted} rounds"
    rounds = fedsim.load(tmp_path).rounds
    assert told["bytes_total_up"] == rounds.bytes_up.sum() > 0
    assert told["bytes_total_down"] == rounds.bytes_down.sum() > 0
    assert told["bytes_moved_total"] == rounds.bytes_moved.sum()
    assert "retries_total" not in told
    assert 0 < told["utilisation"] <= 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_the_figures_of_the_rounds(observed: Path, tiny_experiment: Experiment) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (observed / "tensorboard").iterdir()
    assert folder.name == f"fedgrow (paper), seed 0, {tiny_experiment.run_id}"
    events = EventAccumulator(str(folder)).Reload()
    rounds = fedsim.load(observed).rounds
    for column, tag in SCALARS.items():
        known = rounds[rounds[column].notna()]
        told = {event.step: event.value for event in events.Scalars(tag)} if len(known) else {}
        assert told == pytest.approx(dict(zip(known["round"], known[column], strict=True))), column


def test_tensorboard_that_is_not_there_is_said(
    tiny_settings: list[str], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else found(name))
    words = ["run", "benchmarks.suites:tiny", "--runtime", "inline", "--out", str(tmp_path / "out"), "--tensorboard"]
    assert main(words) == 2
    assert "'.[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
