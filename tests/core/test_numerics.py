"""Portable numerics: the same bits whatever the processor, said and refused where they cannot be had."""

import dataclasses
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import fedsim
import fedsim.cluster.doctor
import fedsim.results.store
from benchmarks import sweep
from fedsim.cli import main
from fedsim.cluster.doctor import OK, WARNING, check_nodes, compared
from fedsim.core import environment, numerics
from fedsim.core.numerics import NATIVE, PORTABLE, SETTINGS, in_force, settle
from fedsim.experiment import Experiment
from fedsim.results.machine import Different, Facts, SameEnvironment, facts
from fedsim.runtime import Choice
from fedsim.runtime.inline import InlineRuntime
from fedsim.simulation import run
from fedsim.sweeps.runner import run_all
from tests.support.manifests import rewrite
from tests.support.other_processors import ELSEWHERE, needs_avx2


TINY = "benchmarks.suites:tiny"
# `tiny` under portable numerics, round 0 to 3, found on an Intel Xeon (AVX-512, AMX) and on an AMD EPYC (AVX2).
GOLDEN = [
    "19816d3faf1c05bc1eadf530f0504c5e71a87465d66757e2345605294742c708",
    "434af0ab9f439b4c3115147cf493e0bfbe4dded6a3efde90f712b123e871bdb1",
    "877f3551ccec6dc7250d06f03dff03b022a9a718c8423f1475b70c3a4a7451ca",
    "8f750ac476f0e160508f7bb178c15a0062b067fc8001fb3cfa24e5bb4e505caa",
]


@pytest.fixture(autouse=True)
def _environment_put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FEDSIM_NUMERICS")
    before = environment.variables(SETTINGS)
    yield
    environment.set_variables(before)


@pytest.fixture
def late() -> None:
    """This process has computed, and not with portable numerics."""
    torch.mm(torch.ones(2, 2), torch.ones(2, 2))
    if numerics.libraries() == numerics.IN_FORCE:
        pytest.skip("the libraries of this process were told to compute with what portable numerics use")


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without AVX2."""
    monkeypatch.setattr(numerics, "processor_flags", lambda: frozenset({"sse4_2", "fma"}))


def in_another_process(*words: str) -> subprocess.CompletedProcess:
    """A command where the libraries are told to compute in another way."""
    return subprocess.run(
        [sys.executable, "-m", "fedsim", *words], env=ELSEWHERE, capture_output=True, text=True, check=True
    )


def hashes(out: Path) -> list[str]:
    return fedsim.load(out).rounds.sort_values("round").state_sha256.tolist()


# the same bits --------------------------------------------------------------------------------------------------------


@needs_avx2
def test_tiny_has_the_same_hashes_on_every_processor(tmp_path: Path) -> None:
    said = in_another_process("run", TINY, "--runtime", "inline", "--out", str(tmp_path))
    assert "numerics" not in said.stdout + said.stderr, "portable ones are the default"
    assert hashes(tmp_path) == GOLDEN
    found = json.loads(fedsim.load(tmp_path).runs.hardware[0])["numerics"]
    assert found["name"] == PORTABLE and found["variables"] == SETTINGS
    assert (found["aten"], found["mkl"], found["before"]) == ("AVX2", "COMPATIBLE", [])


@needs_avx2
@pytest.mark.ray
@pytest.mark.usefixtures("cluster", "late")
def test_hosts_compute_portably_for_a_process_that_cannot(
    tiny_experiment: Experiment, tiny_settings: list[str], tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    in_another_process("run", TINY, "--runtime", "inline", "--out", str(here), "--set", *tiny_settings)
    hosts = fedsim.run(tiny_experiment, out=there, runtime="ray", hosts=2, numerics=PORTABLE)
    assert hashes(there) == hashes(here)
    found = json.loads(hosts.runs.hardware[0])["numerics"]
    assert (found["name"], found["fingerprint"]) == (PORTABLE, None)


def test_other_instructions_give_other_bits() -> None:
    program = "from fedsim.core.numerics import fingerprint, use; import sys; use(sys.argv[1]); print(fingerprint())"
    found = {
        name: subprocess.run(
            [sys.executable, "-c", program, name], env=ELSEWHERE, capture_output=True, text=True
        ).stdout
        for name in (NATIVE, *([] if numerics.lacking() else [PORTABLE]))
    }
    assert all(found.values()) and len({*found.values()}) == len(found)


# refused, or said -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [main, sweep.main], ids=["fedsim run", "sweep.py"])
def test_an_unknown_name_is_refused(command, capsys: pytest.CaptureFixture) -> None:
    words = ["run", TINY] if command is main else []
    with pytest.raises(SystemExit) as ended:
        command([*words, "--numerics", "exact"])
    assert ended.value.code == 2
    assert "--numerics: invalid choice: 'exact' (choose from" in capsys.readouterr().err
    with pytest.raises(ValueError, match="numerics='exact': must be one of portable, native"):
        numerics.use("exact")


@pytest.mark.usefixtures("old")
def test_a_processor_without_avx2_is_refused_what_it_cannot_do(
    tiny_experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["--runtime", "inline", "--numerics", "portable", "--out", str(tmp_path / "out")]
    reason = "numerics='portable': needs an x86-64 processor with AVX2 and FMA, and this one has no avx2; numerics="
    assert main(["run", TINY, *words]) == 2
    assert reason in capsys.readouterr().err
    assert sweep.main(["--suite", "quick", *words]) == 2
    assert reason in capsys.readouterr().err
    with pytest.raises(ValueError, match="this one has no avx2"):
        fedsim.run(tiny_experiment, out=tmp_path / "out", numerics=PORTABLE)
    assert not (tmp_path / "out").exists()
    said: list[str] = []
    assert settle(None, here=True, say=said.append) == NATIVE
    assert len(said) == 1 and said[0].startswith("computing with native numerics. numerics='portable': needs an x86-64")


@needs_avx2
@pytest.mark.usefixtures("late")
def test_a_process_that_has_computed_is_refused_what_is_too_late(
    tiny_experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = environment.variables(SETTINGS)
    with pytest.raises(ValueError, match=r"numerics='portable': .* uses .* torch had computed before.* new process"):
        fedsim.run(tiny_experiment, out=tmp_path / "out", numerics=PORTABLE)
    assert main(["run", TINY, "--runtime", "inline", "--numerics", "portable", "--out", str(tmp_path / "out")]) == 2
    assert "torch had computed before" in capsys.readouterr().err
    with pytest.raises(ValueError, match="torch had computed before"):
        InlineRuntime(PORTABLE)
    assert not (tmp_path / "out").exists()
    environment.set_variables(before)
    said: list[str] = []
    assert settle(None, here=True, say=said.append) == NATIVE
    assert "torch had computed before" in said[0]
    assert environment.variables(SETTINGS) == before, "what this process starts does not compute portably either"
    assert settle(None, here=False, say=said.append) == PORTABLE, "others will compute"
    assert settle(NATIVE, here=True, say=said.append) == NATIVE and len(said) == 1


def test_a_library_without_mkl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "libraries", lambda: {"aten": "AVX2", "mkl": "no MKL"})
    numerics.check(NATIVE)
    with pytest.raises(ValueError, match="mkl uses no MKL in this process"):
        numerics.check(PORTABLE)


# written down, and compared -------------------------------------------------------------------------------------------


@pytest.fixture
def cut(tiny_run: Path, tiny_experiment: Experiment, tmp_path: Path) -> Path:
    """A results folder whose run was cut after round 1."""
    out, run_id = tmp_path / "cut", tiny_experiment.run_id
    shutil.copytree(tiny_run, out)
    (out / "runs" / f"{run_id}.parquet").unlink()
    manifest = out / "checkpoints" / run_id / "manifest.json"
    rewrite(manifest, round=1)
    return out


def changed(out: Path, **numerics: str | None) -> None:
    """What the finished rounds of a cut run were computed with."""
    (manifest,) = out.glob("checkpoints/*/manifest.json")
    *before, last = json.loads(manifest.read_text())["numerics"]
    rewrite(manifest, numerics=[*before, last | numerics])


def test_a_run_goes_on_where_nothing_has_changed(cut: Path, tiny_experiment: Experiment, tiny_run: Path) -> None:
    assert run_all([tiny_experiment], out=cut, make_runtime=Choice("inline")) == []
    assert hashes(cut) == hashes(tiny_run)
    assert json.loads(fedsim.load(cut).runs.hardware[0])["numerics"]["before"] == []


@pytest.mark.parametrize(
    "different, reason",
    [
        ({"cpu": "another"}, "computed with native numerics on another; here they would be native on "),
        ({"name": PORTABLE}, "computed with portable numerics on .*; here they would be native on "),
        ({"fingerprint": "feed"}, "computed with native numerics with bits feed; here they are "),
    ],
    ids=["processor", "numerics", "bits"],
)
def test_a_run_does_not_go_on_with_other_bits_unless_told(
    cut: Path, tiny_experiment: Experiment, different: dict[str, str], reason: str
) -> None:
    if in_force(NATIVE)["name"] == PORTABLE:
        pytest.skip("this process computes portably")
    changed(cut, **different)
    for compute in (
        lambda: run_all([tiny_experiment], out=cut, make_runtime=Choice("inline")),
        lambda: run(tiny_experiment, out=cut, runtime=InlineRuntime(), resume=True),
    ):
        with pytest.raises(ValueError, match=rf"rounds up to 1 were {reason}.*--resume-anywhere"):
            compute()
    assert run_all([tiny_experiment], out=cut, make_runtime=Choice("inline"), resume_anywhere=True) == []
    found = json.loads(fedsim.load(cut).runs.hardware[0])["numerics"]
    assert found["name"] == NATIVE
    assert len(found["before"]) == 1 and found["before"][0].items() >= different.items()


def test_portable_bits_go_on_on_another_processor(cut: Path, tiny_experiment: Experiment) -> None:
    changed(cut, name=PORTABLE, cpu="another", fingerprint=None)
    store = fedsim.results.store.RunStore(cut, tiny_experiment.run_id, "")
    store.check_numerics({"name": PORTABLE, "fingerprint": "feed"})
    with pytest.raises(ValueError, match="here they would be native"):
        store.check_numerics({"name": NATIVE, "fingerprint": "feed"})


def test_finished_runs_of_other_numerics_are_kept_and_a_message_says_so(
    tiny_run: Path, tiny_experiment: Experiment, tmp_path: Path
) -> None:
    shutil.copytree(tiny_run, tmp_path / "out")
    said = io.StringIO()
    choice = Choice("inline", numerics=PORTABLE if in_force(NATIVE)["name"] == NATIVE else NATIVE)
    assert (
        run_all([tiny_experiment], out=tmp_path / "out", make_runtime=choice, console=Console(file=said, width=200))
        == []
    )
    assert f"not computed with {choice.numerics} numerics, kept as they are: 1" in said.getvalue()


def test_a_host_with_other_portable_bits_is_refused(tmp_path: Path) -> None:
    elsewhere = dataclasses.replace(SameEnvironment.here(str(tmp_path), "feed"), driver=("elsewhere", 1))
    with pytest.raises(Different, match=r"gives other bits under portable numerics than the driver: \w+, not feed"):
        elsewhere.check()
    dataclasses.replace(elsewhere, fingerprint=numerics.fingerprint()).check()


# a cluster ------------------------------------------------------------------------------------------------------------


class Mixed(InlineRuntime):
    """A cluster of two machines with different processors."""

    @property
    def joined(self) -> bool:
        return True

    def __init__(self) -> None:
        super().__init__()
        self.others: dict[str, Any] = {}

    def everywhere(self, call):
        return {"a": call(), "b": dataclasses.replace(call(), **self.others)}


def test_a_cluster_of_several_models_is_bitwise_with_portable_numerics_only(tmp_path: Path) -> None:
    runtime = Mixed()
    runtime.others = {"cpu": "another"}
    (found,) = check_nodes(runtime, tmp_path)
    assert (found.check, found.remedy) == (
        "cpu",
        "--numerics native is not bitwise here, --numerics portable (the default) is",
    )
    runtime.numerics = PORTABLE
    assert check_nodes(runtime, tmp_path) == []
    runtime.others = {"lacking": ("avx2",)}
    with pytest.raises(ValueError, match=r"--numerics=portable on node b: .* has no avx2: take machines with AVX2"):
        check_nodes(runtime, tmp_path)
    runtime.numerics = NATIVE
    assert check_nodes(runtime, tmp_path) == []


def test_doctor_says_who_cannot_compute_portably() -> None:
    here = facts()
    levels = {}
    for name, lacking in (("fit", ()), ("unfit", ("avx2", "fma"))):
        there: Facts = dataclasses.replace(here, lacking=lacking)
        seen = fedsim.cluster.doctor.Seen(there, 0.0, 0.0)
        (found,) = [each for each in compared(here, {"a": seen}) if each.check == "numerics"]
        levels[name] = found.level
    assert levels == {"fit": OK, "unfit": WARNING}
    assert "has no avx2 and no fma" in found.text


def test_export_computes_with_what_it_is_told(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["export", str(tiny_run), "--participant", "0", "--to", str(tmp_path / "grown"), "--numerics"]
    if in_force(NATIVE)["name"] == NATIVE and not numerics.lacking():
        assert main([*words, PORTABLE]) == 2 and "torch had computed before" in capsys.readouterr().err
    assert main([*words, NATIVE]) == 0


def test_submit_passes_it_on() -> None:
    from fedsim.cli import parser
    from fedsim.cluster.submit import entrypoint

    words = ["submit", TINY, "--address", "http://a:1", "--out", "/there"]
    assert "--numerics" not in entrypoint(parser().parse_args(words), None, 0.0)
    chosen = entrypoint(parser().parse_args([*words, "--numerics", "native", "--resume-anywhere"]), None, 0.0)
    assert chosen[-3:] == ["--numerics", "native", "--resume-anywhere"]
