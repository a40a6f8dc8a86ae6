"""Options that several commands share, what is made of them, and exit statuses."""

import argparse
import functools
import gc
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console

from fedsim.core import environment
from fedsim.core.numerics import NUMERICS, settle
from fedsim.core.terminal import say
from fedsim.core.text import cut
from fedsim.runtime import RUNTIMES, Choice


if TYPE_CHECKING:
    from fedsim.simulation import RunFailed


SUITES = "benchmarks.suites"  # where --suite NAME is looked up, as if MODULE:FUNCTION had been typed


CLEANING = r"`(fedsim data clean \w+)`"  # in the message of a run whose prepared data are damaged
LONGEST = 2000  # characters of a message


class Words(argparse.ArgumentParser):
    """A parser whose messages are cut as all are."""

    def error(self, message: str) -> NoReturn:
        super().error(cut(message, LONGEST))


def exit_status(command: Callable[[], int], console: Console) -> int:
    """Run a command; turn what it raises into a message and an exit status."""
    try:
        return command()
    except (ValueError, OSError, MemoryError) as error:
        say(Console(stderr=True), f"error: {cut(str(error), LONGEST) or 'this machine has too little memory'}")
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        say(console, "interrupted: every finished round is on disk")
        gc.freeze()  # or Python takes seconds, as it ends, to collect what torch and transformers are made of
        return 130


def add_experiment(command: argparse.ArgumentParser) -> None:
    command.add_argument("target", metavar="MODULE:FUNCTION", help="a function that returns an Experiment")
    add_settings(command)


def add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        dest="settings",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field; dotted paths reach inside",
    )


def add_runtime(command: argparse.ArgumentParser) -> None:
    command.add_argument("--runtime", choices=RUNTIMES, default="ray")
    command.add_argument("--address", metavar="auto|HOST:PORT", help="Ray cluster to join (default: RAY_ADDRESS)")
    command.add_argument("--hosts", type=int, metavar="N", help="host processes (default: one a participant that fits)")
    command.add_argument(
        "--gpus", type=int, metavar="N", help="logical GPUs of a private Ray (default: those there are)"
    )
    command.add_argument(
        "--wait",
        type=float,
        default=0.0,
        metavar="MINUTES",
        help="for a cluster that grows to bring what --hosts ask for",
    )
    add_numerics(command)
    command.add_argument("--tensorboard", action="store_true", help="also write DIR/tensorboard")
    command.add_argument("--profile", action="store_true", help="also write and print where every round's time went")
    add_privacy(command)


def add_privacy(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--keep-updates", action="store_true", help="keep what participants receive and send, for `fedsim audit`"
    )
    command.add_argument("--publish", action="store_true", help="tables without what tells of participants' data")


def add_import(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--import",
        dest="modules",
        nargs="+",
        action="extend",
        default=[],
        metavar="MODULE",
        help="modules of your own in which the runs' classes lie, also those of a script",
    )


def add_numerics(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--numerics",
        choices=NUMERICS,
        help="portable: the same bits on any x86-64 processor with AVX2 (default where there is one); native: faster "
        "for wide models on a CPU",
    )


def add_reference(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--reference", metavar="METHOD", help="what others are compared with (default: fedgrow, or the first there is)"
    )


def add_resume_anywhere(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--resume-anywhere",
        action="store_true",
        help="go on with a run also where its rounds to come have other bits: other numerics, another processor",
    )


def choose_numerics(options: argparse.Namespace, console: Console) -> None:
    """Settle `options.numerics`, before torch computes for the first time."""
    here = getattr(options, "runtime", "inline") == "inline" and getattr(options, "jobs", 1) == 1
    options.numerics = settle(options.numerics, here=here, say=functools.partial(say, console))


def runtime_maker(options: argparse.Namespace, console: Console) -> Choice:
    """What makes the runtime the options ask for, when it is needed."""
    return Choice(
        options.runtime,
        address=address_of(options),
        hosts=options.hosts,
        gpus=options.gpus,
        say=functools.partial(say, console),
        wait=60 * options.wait,
        numerics=options.numerics,
    )


def address_of(options: argparse.Namespace) -> str | None:
    """The Ray cluster to join, if there is one; this user's token then goes with every request."""
    address = options.address or environment.ray_address()
    if address is not None:
        environment.use_ray_token()
    return address


def report_failures(failures: Sequence["RunFailed"], command: str, console: Console) -> None:
    """Which runs failed, why, and how to go on: after what they say is to be done first."""
    for failure in failures:
        say(console, str(failure))
    first = dict.fromkeys(found for failure in failures for found in re.findall(CLEANING, str(failure)))
    if failures:
        say(console, f"go on with: {' && '.join([*first, command])}")
