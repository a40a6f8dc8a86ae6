"""A results folder that somebody sends is data: reading it runs no code of theirs, fetches nothing, and never hangs."""

import copy
import dataclasses
import hashlib
import importlib
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fedsim
from fedsim.cli import main
from fedsim.core import canonical
from fedsim.core.canonical import class_known, parsed, revived
from fedsim.experiment import Experiment
from fedsim.results.tables import read_table, rows_of, write_table
from tests.support.inline_runs import inline
from tests.support.manifests import rewrite


EVIL = 'from pathlib import Path\nPath("ran").touch()\nFAMILY = None\ndef call(**fields): Path("ran").touch()\n'
MINE = """
import dataclasses
from fedsim.algorithm import Algorithm, ClientUpdate, weighted_mean
@dataclasses.dataclass(frozen=True)
class Mine(Algorithm):
    extra: int = 1
    @property
    def name(self): return "mine"
    def server_init(self, ctx): return ctx.task.fresh(ctx.target, ctx.derive("start"))
    def server_broadcast(self, state, cohort, ctx): return {c.id: state for c in cohort}
    def server_aggregate(self, state, updates, ctx): return weighted_mean(updates, state)
    def client_update(self, payload, state, ctx): return ClientUpdate(ctx.info.id, dict(payload), 1.0), state
    def client_model(self, payload, state, ctx): return ctx.task.module(ctx.target, payload)
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where the command is typed, there lies a module that leaves a trace when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "evil.py").write_text(EVIL)
    (tmp_path / "sent_mine.py").write_text(MINE)
    yield
    for name in ("evil", "sent_mine"):
        sys.modules.pop(name, None)


def sent(tiny_run: Path, config: Any) -> Path:
    """A results folder with this config, whose id and manifest are right."""
    out = Path("out").absolute()
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(tiny_run, out)
    text = config if isinstance(config, str) else json.dumps(config, sort_keys=True)
    run_id = hashlib.sha256(text.encode()).hexdigest()[:16]
    (row,) = rows_of(read_table(out, "runs"), "runs")
    old = row["run_id"]
    (out / "checkpoints" / old).rename(out / "checkpoints" / run_id)
    rewrite(out / "checkpoints" / run_id / "manifest.json", run_id=run_id, files={})
    for table in ("rounds", "clients"):
        rows = [each | {"run_id": run_id} for each in rows_of(read_table(out, table), table)]
        (out / table / f"{old}.parquet").unlink()
        write_table(out, table, run_id, rows)
    (out / "runs" / f"{old}.parquet").unlink()
    write_table(out, "runs", run_id, [row | {"run_id": run_id, "config": text}])
    return out


def exported(out: Path, *words: str) -> int:
    return main(["export", str(out), "--participant", "0", "--to", "model", *words])


def config_of(experiment: Experiment) -> dict[str, Any]:
    return json.loads(experiment.canonical_json())


CALLABLES = [
    "os.system",
    "builtins.eval",
    "builtins.exec",
    "subprocess.Popen",
    "evil.call",
    "evil.Anything",
    "pathlib.Path",
    "fedsim.results.store.clean",
    "fedsim.storage.place.Remote",  # a frozen dataclass, but no algorithm
    "fedsim.simulation.run",
    "baselines.evil.Evil",
    "baselines..fedavg.FedAvg",
    "fedsim.experiment.Experiment",
    "importlib.import_module",
    "torch.hub.load",
    "__main__.Mine",
    "",
    "x",
    ".",
    "fedsim",
    "é.é",
    "a" * 10_000,
]


@pytest.mark.parametrize("name", CALLABLES, ids=lambda name: repr(name[:30]))
@pytest.mark.parametrize("field", [("algorithm",), ("task",), ("task", "data"), ("tiers", 0), ("tiers", 0, "form"), ()])
def test_a_class_that_is_none_of_ours_is_neither_imported_nor_called(
    name: str, field: tuple, tiny_experiment: Experiment
) -> None:
    config = config_of(tiny_experiment)
    part: Any = config
    for step in field:
        part = part[step]
    part["class"] = name
    part["command"] = "touch ran"
    with pytest.raises(ValueError, match=r"^config") as error:
        revived(parsed(json.dumps(config)), Experiment)
    assert not Path("ran").exists() and "\n" not in str(error.value)


def test_export_and_report_of_such_a_folder_run_nothing(
    tiny_run: Path, tiny_experiment: Experiment, capsys: pytest.CaptureFixture
) -> None:
    for algorithm in ({"class": "evil.call"}, {"class": "os.system", "command": "touch ran"}):
        out = sent(tiny_run, config_of(tiny_experiment) | {"algorithm": algorithm})
        assert exported(out) == 2
        said = capsys.readouterr().err
        assert "--import" in said and said.count("\n") == 1 and f"run {next(out.glob('runs/*')).stem}" in said
        assert main(["report", str(out)]) == 0  # which shows what is in the tables
        assert fedsim.load(out).table() is not None
    family = config_of(tiny_experiment)
    family["task"]["family"] = "evil"
    assert exported(sent(tiny_run, family)) == 2
    family["task"]["family"] = "evil.x"
    assert exported(sent(tiny_run, family)) == 2 and "task.family='evil.x'" in capsys.readouterr().err
    assert not Path("ran").exists() and "evil" not in sys.modules


def test_a_module_in_the_folder_of_the_command_does_not_pass_for_one_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Path("fedgrow_algo")
    own.mkdir()
    (own / "__init__.py").touch()
    (own / "sent.py").write_text(EVIL)
    assert class_known("fedgrow_algo.sent.call") is None and not Path("ran").exists()
    monkeypatch.setattr(canonical, "PACKAGES", ("fedsim", "evil"))
    assert class_known("evil.call") is None and not Path("ran").exists()


@pytest.mark.parametrize("written", ["sent_mine.Mine", "__main__.Mine"])
def test_a_class_of_the_user_is_found_in_the_module_that_the_user_names(
    written: str, tmp_path: Path, tiny_experiment: Experiment, capsys: pytest.CaptureFixture
) -> None:
    """Also one of a script, which configs say to be of `__main__`; the rest is as for any other class."""
    mine = importlib.import_module("sent_mine").Mine(extra=2)
    inline(dataclasses.replace(tiny_experiment, algorithm=mine, rounds=1), tmp_path / "mine")
    sys.modules.pop("sent_mine")
    config = config_of(tiny_experiment) | {"algorithm": {"class": written, "extra": 2}, "rounds": 1}
    out = sent(tmp_path / "mine", config)
    assert exported(out) == 2 and f"config.algorithm={written!r}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        exported(out, "--import")
    assert exported(out, "--import", "nowhere_to_be_found") == 2
    capsys.readouterr()
    assert exported(out, "--import", "sent_mine") == 0
    run_id = next(out.glob("runs/*")).stem
    assert f"Run `{run_id}`" in Path("model/README.md").read_text() and Path("model/model.safetensors").exists()


# values ---------------------------------------------------------------------------------------------------------------

ODD: list[Any] = [None, True, "x", "", -1, 0, 10**12, 1e300, 0.5, [], [[]], {}, {"class": 3}, ["x"], "a" * 5000]
SIZES = {"width", "depth", "heads", "mlp", "kv_heads", "head_dim", "participants", "rounds", "image_size", "channels"}


def leaves(value: Any, path: tuple = ()) -> Iterator[tuple]:
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, dict | list) and item:
            yield from leaves(item, (*path, key))
        yield (*path, key)


def test_any_value_of_any_field_is_taken_or_refused_with_the_field(tiny_experiment: Experiment) -> None:
    plain = config_of(tiny_experiment)
    for path in leaves(plain):
        for value in ODD:
            if path[-1] in SIZES and value == 10**12:
                continue  # as of any experiment
            config: Any = copy.deepcopy(plain)
            part = config
            for step in path[:-1]:
                part = part[step]
            part[path[-1]] = value
            try:
                revived(parsed(json.dumps(config)), Experiment)
            except ValueError as error:
                named = [str(step) for step in path if isinstance(step, str) and step != "class"]
                assert any(name in str(error) for name in (*named, "config")), (path, value, error)


TEXTS = [
    "[" * 100_000,
    "[" * 500 + "]" * 500,
    '{"class": ' * 200 + "1" + "}" * 200,
    "NaN",
    '{"algorithm": Infinity}',
    '{"algorithm": 1e999}',
    '{"rounds": 1' + "0" * 4000 + "}",
    '{"rounds": 1' + "0" * 30 + "}",
    '{"x": "' + "a" * 2**21 + '"}',
    "",
    "{",
    "\x00",
    '"text"',
    "null",
    "[]",
    "{}",
    '{"class": "fedsim.experiment.Experiment"}',
    '{"class": null}',
]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:20]))
def test_a_text_that_is_no_config_is_refused_at_once(text: str, tiny_run: Path, capsys: pytest.CaptureFixture) -> None:
    out, started = sent(tiny_run, text), time.monotonic()
    for words in (["export", str(out), "--participant", "0", "--to", "model"], ["report", str(out)]):
        status = main(words)
        said = capsys.readouterr().err
        assert status in ((0, 2) if words[0] == "report" else (2,)), (
            said
        )  # a page needs no more than a name of each part
        assert said.count("\n") <= 1 and len(said) < 2000
    assert time.monotonic() - started < 20


def test_bytes_flipped_in_a_config_end_in_a_message(tiny_experiment: Experiment) -> None:
    """Three hundred texts, of which most are JSON still."""
    draw, plain, refused = random.Random(7), tiny_experiment.canonical_json(), list[str]()
    for _ in range(300):
        at = draw.randrange(len(plain))
        text = plain[:at] + chr(draw.randrange(32, 127)) + plain[at + 1 :]
        try:
            revived(parsed(text), Experiment)
        except ValueError as error:
            refused.append(str(error))
    assert 150 < len(refused) < 300 and not [text for text in refused if len(text) > 1000]


def test_a_config_that_is_not_the_runs_own_is_refused(tiny_run: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(tiny_run, tmp_path / "out")
    (row,) = rows_of(read_table(tmp_path / "out", "runs"), "runs")
    changed = json.loads(row["config"]) | {"seed": 5}
    write_table(tmp_path / "out", "runs", row["run_id"], [row | {"config": json.dumps(changed)}])
    assert exported(tmp_path / "out") == 2
    assert f"the config is not that of run {row['run_id']}" in capsys.readouterr().err


def test_nothing_is_fetched_because_a_config_says_so(
    tiny_run: Path, tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import socket

    def refuse(*arguments: Any, **fields: Any) -> None:
        Path("ran").touch()
        raise OSError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    config = config_of(tiny_experiment)
    data = config["task"]["data"] | {"objective": "next_token", "hub": True, "tokenizer": "somebody/tokens"}
    config["task"] |= {"data": data | {"name": "somebody/texts", "text": ["text"]}, "family": "gpt2"}
    assert exported(sent(tiny_run, config)) == 2
    assert "somebody/tokens" in capsys.readouterr().err and not Path("ran").exists()
