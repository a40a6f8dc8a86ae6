"""`fedsim doctor`: what would make a run fail, here and on every node of a cluster, each with its remedy.

A finding is a *problem* if something would fail, a *warning* if something would be slower or not repeatable.
"""

import dataclasses
import functools
import os
import secrets
import stat
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from fedsim.core import environment
from fedsim.core.numerics import PORTABLE
from fedsim.core.terminal import say
from fedsim.results.machine import Facts, facts
from fedsim.runtime.base import Runtime
from fedsim.storage.place import Place, Remote, delete, write_atomically


OK, WARNING, PROBLEM = "ok", "warning", "problem"
GIGABYTE = 2**30
ENOUGH_FILES = 65536  # Ray keeps a few descriptors a worker and connection; its own documents recommend this
FULL_BYTES = 2 * GIGABYTE  # a disk with less is about to be full: Ray's logs, spilled objects, temporary files
SKEW_SECONDS = 30.0  # signatures of requests to object stores are refused from 15 minutes on
LITTLE_MEMORY = 1 * GIGABYTE
SAME_MODEL = ("cpu", "gpu models")  # checks of what has to be alike for the same bits


@dataclasses.dataclass(frozen=True)
class Finding:
    """`check`: what was looked at. `node`: its address, empty if it is about all. `remedy`: empty if all is well."""

    level: str
    check: str
    node: str
    text: str
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class Seen:
    """One node: what was found out, when it was asked and answered by this machine's clock, what Ray counts of it."""

    facts: Facts | str
    asked: float
    answered: float
    counted: Mapping[str, float] = dataclasses.field(default_factory=dict)


def examine(runtime: Runtime, out: Place | None) -> list[Finding]:
    """Look at every machine the runtime has.

    - `out`: where results would go: it is written and read from every node.
    """
    here, secret, server = facts(), secrets.token_hex(8), runtime.job_server()
    findings, probe = of_token(), functools.partial(facts, job_server=server)
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_atomically(out / f"check.{secret}", b"")
            probe = functools.partial(probe, str(out.absolute()), secret)
        except OSError as error:
            findings.append(_storage(out, "", str(error)))
    asked = time.time()
    try:
        answers = runtime.everywhere(probe)
        answered, counted = time.time(), runtime.capacities()
    finally:
        if out is not None:
            findings += _forget(out, secret)
    nodes = {name: Seen(answer, asked, answered, counted.get(name, {})) for name, answer in answers.items()}
    if out is not None and probe.args:
        findings += [
            Finding(OK, "storage", name, f"{out} can be read and written")
            if seen.facts.storage is None
            else _storage(out, name, seen.facts.storage)
            for name, seen in nodes.items()
            if isinstance(seen.facts, Facts)
        ]
    return findings + compared(here, nodes) + of_job_server(nodes, runtime.joined)


def check_nodes(runtime: Runtime, out: Place) -> list[Finding]:
    """Before a run on a cluster that was there already: refuse nodes on which it would fail, or give other bits.

    **Returns:** warnings. **Raises:** `ValueError` naming the node and the remedy.
    """
    if not runtime.joined:
        return []
    findings = examine(runtime, out)
    for found in findings:
        if found.level == PROBLEM:
            where = f" on node {found.node}" if found.node else ""
            raise ValueError(f"{found.check}{where}: {found.text}: {found.remedy}")
    portable = runtime.numerics == PORTABLE
    if portable and (unfit := [found for found in findings if found.check == "numerics" and found.level == WARNING]):
        raise ValueError(f"--numerics=portable on node {unfit[0].node}: {unfit[0].text}: {unfit[0].remedy}")
    matters = SAME_MODEL[1:] if portable else SAME_MODEL
    return [found for found in findings if found.level == WARNING and found.check in matters]


# checks ------------------------------------------------------------------------------------------------------------


def compared(here: Facts, nodes: Mapping[str, Seen]) -> list[Finding]:
    """Every node by itself, against the machine of the driver, and against the others."""
    findings = []
    for name, seen in nodes.items():
        if isinstance(seen.facts, str):
            missing = "ModuleNotFoundError" in seen.facts or "ImportError" in seen.facts
            text = f"fedsim cannot be called there: {seen.facts}"
            remedy = "install it there with the same constraints.txt, or send it along: `fedsim submit`"
            lost = "`ray status`, and that node's /tmp/ray/session_latest/logs, may say why"
            findings.append(Finding(PROBLEM, "versions", name, text, remedy if missing else lost))
            continue
        findings += [*of_versions(here, name, seen.facts), *of_machine(name, seen)]
    idle = {name for name, seen in nodes.items() if not seen.counted.get("CPU", 1) and not seen.counted.get("GPU", 0)}
    facts_of = {name: seen.facts for name, seen in nodes.items() if isinstance(seen.facts, Facts)}
    return findings + of_processors({name: there for name, there in facts_of.items() if name not in idle})


def of_versions(here: Facts, name: str, there: Facts) -> list[Finding]:
    """Packages and sources of a node against the driver's."""
    others = {
        package: (there.versions.get(package, "not installed"), version)
        for package, version in here.versions.items()
        if there.versions.get(package) != version
    }
    if others:
        text = ", ".join(f"{package} {theirs} (the driver has {ours})" for package, (theirs, ours) in others.items())
        remedy = "run the setup commands again (`ray up`), on all nodes with the same constraints.txt"
        return [Finding(PROBLEM, "versions", name, text, remedy)]
    if there.code_sha256 != here.code_sha256:
        text, remedy = (
            "other sources of fedsim than the driver's",
            "send them along: `fedsim submit`, or `ray up` again",
        )
        return [Finding(PROBLEM, "versions", name, text, remedy)]
    text = f"Python {here.versions['python']}, Ray {here.versions['ray']}, torch {here.versions['torch']}, same sources"
    return [Finding(OK, "versions", name, text)]


def of_machine(name: str, seen: Seen) -> list[Finding]:
    """Memory, disk, limits and clock of one node."""
    there = seen.facts
    assert isinstance(there, Facts)
    gpus = ", ".join(f"{gpu.name} {gpu.bytes / GIGABYTE:.0f} GB (driver {gpu.driver})" for gpu in there.gpus) or "none"
    findings = [Finding(OK, "gpus", name, gpus)]
    memory = f"{there.memory_free / GIGABYTE:.1f} of {there.memory / GIGABYTE:.1f} GB free, {there.cores} cores"
    if there.memory_free < LITTLE_MEMORY:
        findings.append(Finding(PROBLEM, "memory", name, memory, "end what uses it, or take a larger machine"))
    else:
        findings.append(Finding(OK, "memory", name, memory))
    if (store := seen.counted.get("object_store_memory")) is not None:
        size = f"{store / GIGABYTE:.1f} GB"
        if there.shared_memory < store:
            text = f"{size}, but /dev/shm has {there.shared_memory / GIGABYTE:.1f} GB: Ray uses the disk instead"
            remedy = "make /dev/shm larger (Docker: --shm-size; Kubernetes: an emptyDir with medium Memory)"
            findings.append(Finding(WARNING, "object store", name, text, remedy))
        else:
            findings.append(Finding(OK, "object store", name, size))
    disk = f"{there.disk_free / GIGABYTE:.1f} GB free on {there.disk}"
    if there.disk_free < FULL_BYTES:
        remedy = "delete old sessions under /tmp/ray, or start Ray with --temp-dir on a larger disk"
        findings.append(Finding(PROBLEM, "disk", name, disk, remedy))
    else:
        findings.append(Finding(OK, "disk", name, disk))
    if 0 <= there.open_files < ENOUGH_FILES:
        text = f"{there.open_files} open files allowed"
        findings.append(Finding(WARNING, "limits", name, text, f"`ulimit -n {ENOUGH_FILES}` before `ray start`"))
    else:
        findings.append(Finding(OK, "limits", name, f"open files {there.open_files}, processes {there.processes}"))
    early, late = seen.asked - there.clock, there.clock - seen.answered
    if (skew := max(early, late)) > SKEW_SECONDS:
        text = f"at least {skew:.0f} s {'behind' if early > late else 'ahead of'} the driver"
        findings.append(Finding(PROBLEM, "clock", name, text, "set it by NTP (chrony, systemd-timesyncd)"))
    else:
        findings.append(Finding(OK, "clock", name, "agrees with the driver's"))
    return findings


def of_processors(nodes: Mapping[str, Facts]) -> list[Finding]:
    """Native numerics give the same bits on processors of one model, as GPUs do; portable ones on any with AVX2.

    - `nodes`: those on which participants compute.
    """
    remedy = "take machines with AVX2, or compute with --numerics native"
    findings = [
        Finding(WARNING, "numerics", name, f"{there.cpu} has no {' and no '.join(there.lacking)}", remedy)
        for name, there in nodes.items()
        if there.lacking
    ] or [Finding(OK, "numerics", "", "portable ones can be had everywhere")]
    models = ([there.cpu for there in nodes.values()], [gpu.name for there in nodes.values() for gpu in there.gpus])
    for check, found in zip(SAME_MODEL, models, strict=True):
        counts = Counter(found)
        if len(counts) > 1:
            text = "; ".join(f"{model} on {count}" for model, count in counts.most_common())
            remedy = "the same bits are promised on one model only: take machines of one type"
            if check == "cpu":
                remedy = "--numerics native is not bitwise here, --numerics portable (the default) is"
            findings.append(Finding(WARNING, check, "", text, remedy))
        elif counts:
            findings.append(Finding(OK, check, "", f"{next(iter(counts))} everywhere"))
    return findings


def of_token() -> list[Finding]:
    """The token this user has."""
    named = environment.ray_token_file()
    make = "`(umask 077; ray get-auth-token --generate > /dev/null)` makes one; every node needs it (docs/cluster.md)"
    if named is None:
        return [Finding(OK, "token", "", "in RAY_AUTH_TOKEN")]
    if not os.path.exists(named):
        return [Finding(WARNING, "token", "", f"none in {named}: a cluster that asks for one cannot be joined", make)]
    if not os.path.getsize(named):
        return [Finding(PROBLEM, "token", "", f"{named} is empty", make)]
    if stat.S_IMODE(os.stat(named).st_mode) & 0o077:
        return [Finding(WARNING, "token", "", f"others may read {named}", f"chmod 600 {named}")]
    return [Finding(OK, "token", "", f"in {named}, for this user only")]


def of_job_server(nodes: Mapping[str, Seen], joined: bool) -> list[Finding]:
    """Whether the cluster's job server, which runs what it is sent, refuses who brings no token."""
    statuses = {name: seen.facts.unasked for name, seen in nodes.items() if isinstance(seen.facts, Facts)}
    answered = {name: status for name, status in statuses.items() if status in (200, 401, 403)}
    if not joined or not answered:
        return []
    for name, status in answered.items():
        if status == 200:
            text = "the job server answers without a token: whoever reaches it runs programs as you"
            remedy = "start Ray with RAY_AUTH_MODE=token on every node (cluster.yaml does)"
            return [Finding(PROBLEM, "token", name, text, remedy)]
    return [Finding(OK, "token", "", f"the job server refuses who brings none ({next(iter(answered.values()))})")]


def _storage(out: Place, node: str, reason: str) -> Finding:
    if isinstance(out, Remote):
        remedy = "give that machine's role, or its configuration files, the right to read, write, list and delete there"
    else:
        remedy = "give --out s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, or a folder that all nodes share"
    return Finding(PROBLEM, "storage", node, f"--out={str(out)!r}: {reason}", remedy)


def _forget(out: Place, secret: str) -> list[Finding]:
    """Delete what was written to try a results folder, as a run deletes old checkpoints."""
    try:
        for path in out.glob(f"check.{secret}*"):
            path.unlink(missing_ok=True)
        if isinstance(out, Remote) and not out.files():
            delete(out)  # an empty object that stands for a folder
    except OSError as error:
        return [_storage(out, "", f"what was written cannot be deleted: {error}")]
    return []


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "problems": sum(found.level == PROBLEM for found in findings),
        "warnings": sum(found.level == WARNING for found in findings),
        "findings": [dataclasses.asdict(found) for found in findings],
    }


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """One line a finding, what is wrong last; then how much of it there is."""
    order = (OK, WARNING, PROBLEM)
    for found in sorted(findings, key=lambda found: order.index(found.level)):
        where = f" {found.node}" if found.node else ""
        say(console, f"{found.level:<8}{found.check}{where}: {found.text}")
        if found.remedy:
            say(console, f"        -> {found.remedy}")
    counts = Counter(found.level for found in findings)
    say(console, f"{counts[PROBLEM]} problems, {counts[WARNING]} warnings")
