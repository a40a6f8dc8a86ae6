"""`fedsim submit`: the same words as for a run here, on a cluster elsewhere: sent, followed, stopped, and fetched."""

import argparse
import dataclasses
import functools
import secrets
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from fedsim.cluster import cluster_file
from fedsim.cluster.cluster_file import ClusterFile
from fedsim.cluster.doctor import OK, PROBLEM, Finding, of_token, print_findings
from fedsim.core.fields import path_of
from fedsim.core.terminal import say
from fedsim.engine.cohort import tiers_of
from fedsim.experiment import Experiment
from fedsim.results.provenance import git_commit
from fedsim.runtime import submission
from fedsim.runtime.base import Resources
from fedsim.runtime.submission import LOST, JobServer, NoHead
from fedsim.storage.place import Remote, download, place


LEFT_OUT = (".git", ".venv", "/results", "__pycache__", ".ruff_cache", ".pytest_cache", ".hypothesis", "*.egg-info")
SECRET = ("TOKEN", "SECRET", "PASSWORD", "KEY", "CREDENTIAL")
TABLES = ("runs", "rounds", "clients", "profile", "report.html", "report.md", "report_figures")
WAIT_MINUTES = 20.0  # for nodes of a cloud to come up and install what they need
STOPPING = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "30"}  # as Ctrl-C here


def submit(options: argparse.Namespace, console: Console, wanted: Callable[[], Sequence[Experiment]]) -> int:
    """The command. Exit status: the job's own; 130 if it was stopped.

    - `wanted`: makes the experiments that the job will run; what it raises is found before anything is sent.
    """
    cluster = cluster_file.read(options.cluster) if options.cluster else None
    if cluster is None and not (options.address or "").startswith(("http://", "https://")):
        raise ValueError(
            f"--address={options.address!r}: must be http://HOST:PORT of a job server; or give --cluster FILE"
        )
    with JobServer(cluster.path if cluster is not None else options.address) as link:
        where = ("--cluster", options.cluster) if cluster is not None else ("--address", options.address)
        for option in ("stop", "attach"):
            if (id_ := getattr(options, option)) and not submission.known(link, id_):
                raise ValueError(f"--{option}={id_!r}: the cluster has no such job")
        if options.stop:
            return 0 if stop(link, Job(options.stop, where), console) else 1
        if options.attach:
            to = _checked(_fetched_to(options))
            job = Job(options.attach, where, cluster, place(options.out) if options.out else None, to)
            return follow(link, job, console)
        job = send(link, options, Job("", where, cluster), console, wanted)
        return 0 if options.detach else follow(link, job, console)


@dataclasses.dataclass(frozen=True)
class Job:
    """A job that was sent.

    - `where`: words that lead to its cluster. - `out`: where its results go; None: not known, or it has none.
    - `to`: the folder here into which they are copied.
    """

    id: str
    where: tuple[str, ...]
    cluster: ClusterFile | None = None
    out: Path | Remote | None = None
    to: Path = Path()

    def again(self, option: str) -> str:
        """What to type to follow it, or to stop it."""
        out = ["--out", str(self.out), "--fetch", str(self.to)] if option == "--attach" and self.out else []
        return shlex.join(["fedsim", "submit", *self.where, option, self.id, *out])


def send(
    link: JobServer, options: argparse.Namespace, job: Job, console: Console, wanted: Callable[[], Sequence[Experiment]]
) -> Job:
    """Check what can be checked here, then send it. **Raises:** `ValueError`."""
    cluster = job.cluster
    if (options.target is None) == (options.suite is None):
        raise ValueError(f"--suite={options.suite}: give either MODULE:FUNCTION or --suite")
    if not options.out:
        raise ValueError("--out: must say where results go: s3://BUCKET/PREFIX, gs://..., or a folder all nodes share")
    out = place(options.out)
    if isinstance(out, Path) and not out.is_absolute():
        raise ValueError(
            f"--out={str(out)!r}: must be an absolute path there, or s3://BUCKET/PREFIX, gs://BUCKET/PREFIX"
        )
    variables = _variables(options.env) | STOPPING | {"PYTHONUNBUFFERED": "1"}
    if commit := git_commit():
        variables["FEDSIM_GIT_COMMIT"] = commit
    experiments, hosts, wait = wanted(), options.hosts, options.wait
    if cluster is not None:
        hosts = cluster_file.hosts_for(cluster, [asked_by(each) for each in experiments], hosts)
        wait = WAIT_MINUTES if wait is None and hosts is not None else wait
        if hosts is None and cluster.grows:
            raise ValueError(f"--hosts: say how many, for {options.cluster!r} does not say what its nodes have")
    if wait and hosts is None:
        raise ValueError(f"--wait={wait:g}: needs --hosts")
    words = entrypoint(options, hosts, wait or 0.0)
    name = options.target.partition(":")[2] if options.target else "-".join(options.suite)
    job = dataclasses.replace(
        job, id=f"fedsim-{name}-{secrets.token_hex(4)}", out=out, to=_checked(_fetched_to(options))
    )
    submission.send(link, job.id, shlex.join(words), Path.cwd(), [*LEFT_OUT, *options.exclude], variables)
    say(console, f"job {job.id}: {shlex.join(words)}")
    say(console, f"follow it: {job.again('--attach')}")
    say(console, f"stop it:   {job.again('--stop')}")
    return job


def examine(options: argparse.Namespace, console: Console) -> int:
    """`fedsim doctor --cluster FILE`: the file, and the nodes if they are up. **Returns:** 1 for a problem, else 0."""
    cluster = cluster_file.read(options.cluster)
    nodes = ", ".join(f"{kind.most} x {kind.name} {dict(kind.resources)}" for kind in cluster.nodes) or "does not say"
    findings = [Finding(OK, "nodes", "", nodes), *of_token()]
    findings += [Finding(PROBLEM, check, "", text, remedy) for check, text, remedy in cluster_file.faults(cluster)]
    print_findings(findings, console)
    if any(found.level == PROBLEM for found in findings):
        return 1
    words = ["python", "-m", "fedsim", "doctor", "--address", "auto", *(["--out", options.out] if options.out else [])]
    with JobServer(cluster.path) as link:
        try:
            link.first()
        except NoHead as error:
            say(console, f"not looked at any node: {error}")
            return 0
        except ValueError as error:
            print_findings([Finding(PROBLEM, "head", "", str(error))], console)
            return 1
        job = Job(f"fedsim-doctor-{secrets.token_hex(4)}", ("--cluster", options.cluster))
        submission.send(link, job.id, shlex.join(words), Path.cwd(), LEFT_OUT, {"PYTHONUNBUFFERED": "1"})
        return follow(link, job, console)


def entrypoint(options: argparse.Namespace, hosts: int | None, wait: float) -> list[str]:
    """What is run on the head."""
    words = ["python", "-m"]
    words += ["fedsim", "run", options.target] if options.target else ["benchmarks.sweep", "--suite", *options.suite]
    words += ["--address", "auto", "--out", options.out]
    words += ["--hosts", str(hosts)] if hosts is not None else []
    words += ["--wait", f"{wait:g}"] if wait and hosts is not None else []
    words += ["--resume"] if options.resume and options.target else []
    words += ["--profile"] if options.profile else []
    words += ["--keep-updates"] if options.keep_updates else []
    words += ["--publish"] if options.publish else []
    words += ["--numerics", options.numerics] if options.numerics else []
    words += ["--resume-anywhere"] if options.resume_anywhere else []
    for name in ("seeds", "only", "data", "scale"):
        given = getattr(options, name)
        if given is not None and options.target:
            raise ValueError(f"--{name}: only with --suite")
        words += [f"--{name}", *map(str, given if isinstance(given, list) else [given])] if given is not None else []
    words += ["--set", *options.settings] if options.settings else []
    return words


def asked_by(experiment: Experiment) -> dict[int, Resources]:
    """What every participant asks for. Where the fraction of a GPU is to be measured, it is at most a whole one."""
    return {
        id_: Resources(tier.num_cpus, 1.0 if tier.gpu_fraction else tier.num_gpus, tier.memory_mb, tier.resources)
        for id_, tier in enumerate(tiers_of(experiment))
    }


def follow(link: JobServer, job: Job, console: Console) -> int:
    """Print what the job prints, then copy its results."""
    try:
        details = submission.follow(
            link, job.id, lambda text: print(text, end="", flush=True), functools.partial(say, console)
        )
    except KeyboardInterrupt:
        say(console, f"stopping job {job.id}")
        ended = stop(link, job, console)
        if ended and job.out is not None:
            fetch(job, console)
        return 130 if ended else 1
    except ConnectionError as error:
        say(console, f"{error}; to look again: {job.again('--attach')}")
        return 1
    status = details.driver_exit_code
    if status is None:  # it was not the command itself that ended it
        say(console, f"job {job.id} {str(details.status).lower()}: {' '.join((details.message or '').split())}")
        status = 130 if str(details.status) == "STOPPED" else 1
    if job.out is None or status == 2:
        return status
    copied = fetch(job, console)
    return status or copied


def fetch(job: Job, console: Console) -> int:
    """Copy tables and report; checkpoints stay where they are. **Returns:** an exit status."""
    if isinstance(job.out, Remote):
        try:
            count = download(job.out, job.to, leave_out=("checkpoints/", ".lock"))
        except OSError as error:
            say(console, f"results are at {job.out}; they could not be copied from there: {error}")
            return 1
        say(console, f"results: {job.out}; {count} files copied to {job.to}")
        return 0
    if job.cluster is None:
        say(console, f"results: {job.out} on the head")
        return 0
    failed = {}
    for name in TABLES:
        slash = "" if "." in name else "/"
        reason = submission.fetch(job.cluster.path, f"{job.out}/{name}{slash}", job.to / name if slash else job.to)
        if reason is not None:
            failed[name] = reason
    missing = [name for name in ("runs", "rounds", "clients") if name in failed]
    if missing:
        say(console, f"results are at {job.out} on the head; they could not be copied: {failed[missing[0]]}")
        return 1
    say(console, f"results: {job.out} on the head; copied to {job.to}")
    return 0


def stop(link: JobServer, job: Job, console: Console) -> bool:
    """End a job. **Returns:** whether it has ended; if not, it is said how to try again."""
    try:
        details = submission.stop(link, job.id)
    except (ValueError, *LOST) as error:
        say(console, f"{error}\njob {job.id} may go on; to stop it: {job.again('--stop')}")
        return False
    if details is None:
        say(console, f"job {job.id} has not ended yet; once more: {job.again('--stop')}")
        return False
    say(console, f"job {job.id} {str(details.status).lower()}; every finished round is in its results folder")
    return True


def _variables(given: Sequence[str]) -> dict[str, str]:
    found = {}
    for each in given:
        name, separator, value = each.partition("=")
        if not separator or not name.isidentifier():
            raise ValueError(f"--env={name!r}: must be NAME=VALUE")
        if any(word in name.upper() for word in SECRET):
            raise ValueError(
                f"--env: {name}: looks like a secret, and what is set here can be read by all who use the cluster: put "
                "it into a file that the launcher carries to the nodes (file_mounts), or use the machines' roles"
            )
        found[name] = value
    return found


def _fetched_to(options: argparse.Namespace) -> Path:
    name = options.target.partition(":")[2] if options.target else "+".join(options.suite or ["job"])
    return Path("results", "fetched", name) if options.fetch is None else path_of(options.fetch, "--fetch")


def _checked(to: Path) -> Path:
    """**Raises:** `ValueError` for a folder whose runs could not be gone on with if others were copied over them."""
    if (to / "checkpoints").exists():
        raise ValueError(f"--fetch={str(to)!r}: holds runs that were computed here: give another folder")
    return to
