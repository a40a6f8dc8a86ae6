"""Results -> one self-contained HTML page, and the same as Markdown.

Nothing is fetched and nothing runs in the page: tables, figures (embedded), the machines, the commands, every run's
config.
"""

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from fedsim.report.comparison import reference_of
from fedsim.report.figures import (
    MOST_LINES,
    accuracy_figure,
    difference_figure,
    labels_figure,
    savings_figure,
    shown_methods,
    spread_figure,
    svg,
    time_figure,
)
from fedsim.report.page import (
    Block,
    Bullets,
    Code,
    Grid,
    Heading,
    Paragraph,
    Picture,
    as_html,
    as_markdown,
    write_figures,
)
from fedsim.report.readings import WORST_SHARE, Readings, by_method, by_setting, read, records
from fedsim.report.tables import (
    COMPACT,
    COMPARED,
    COSTS,
    DIFFERENCES,
    TARGETS,
    cells,
    notes,
    percent,
    significant,
    summary,
)
from fedsim.results.tables import Results, load
from fedsim.storage.place import Place, sent, write_atomically


Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Row], str]]

SUMMARY: Columns = COMPACT | {
    "own labels, %": lambda row: percent(row["accuracy_local"]),
    "loss": lambda row: significant(row["loss"]),
    "rounds": lambda row: f"{row['rounds']:.0f}",
    "seeds": lambda row: str(row["seeds"]),
    "sd over seeds": lambda row: percent(row["accuracy_seed_std"]),
}
PER_SEED: Columns = (
    {"method": COMPACT["method"], "seed": lambda row: str(row["seed"])}
    | {heading: cell for heading, cell in COMPACT.items() if heading != "method"}
    | {"run": lambda row: row["run_id"][:16], "last state": lambda row: row["state_sha256"][:12]}
)

INTRODUCTION = (
    "**Federated learning** trains one model for many participants without collecting their data: in each round "
    "participants train at home and send only numbers, which an aggregator averages. Usually everybody must be able "
    "to train the whole large model, and sends all of it.",
    "**Fed-Grow** turns this around. Each participant owns a *small* transformer that it could afford to train by "
    "itself, and these may differ in size. Together they learn how to *grow* small transformers into a large one. A "
    "growth operator (LiGO) computes the weights of a larger model from those of a smaller one. Each participant has "
    "two: **Local-LiGO** grows its own small form to an intermediate form that is the same for everybody, and stays "
    "private; **Global-LiGO** grows the intermediate form to the large target, and is **the only thing that is sent** "
    "and averaged. The small models, the data and the grown models never leave their owners.",
)
HOW_TO_READ = (
    "**Accuracy** is that of the model each participant would deploy, on the common test set: the mean over "
    "participants, ± the spread between them (sd), and the worst participant; *own labels* is the same model's "
    "accuracy weighted by the participant's own mix of labels. *Trainable* counts the parameters that a participant "
    "trains, *saved* compares one upload with FedAvg's, which sends the whole target. 1 MB is 10^6 bytes; megabytes in "
    "total are what all participants sent and received.",
    "**Three budgets.** A method that sends fifty times as much should not be compared round by round alone. Each is "
    "read after its last round (*equal rounds*); at the last evaluated round at which it had sent and received no more "
    "than the *reference* did in its whole run (*equal bytes*; of several such runs, the one that sent least); and "
    "likewise for what participants computed (*equal FLOPs*). No test score decides where a method is read. *Best "
    "validated round* is the test accuracy at the round with the highest validation accuracy.",
)
COMPARISON = (
    f"Mean over seeds ± half of a 95 % confidence interval (Student's t). *Bottom 10 %* is the mean accuracy of the "
    f"{100 * WORST_SHARE:.0f} % of participants, at least one, that are worst off."
)
PAIRED = (
    "Differences are percentage points against the *reference* (Fed-Grow, unless another was named; of several rows, "
    "the one with the best validation accuracy): "
    "seed by seed, as all methods meet the same federation, with a 95 % interval and the p-value of a paired t-test, "
    "adjusted by Holm over the methods of the table. A few seeds can only show large differences: what is not "
    "significant is not thereby equal."
)
TAKES = (
    "*Global* is the server's own model, where the method has one. FLOPs are forward and backward passes of all "
    "participants in all rounds. *Held* is what the participant with most has to keep (its private state and what it "
    "receives); *peak* is its memory in a training step: that state, trained tensors with gradients and AdamW's "
    "moments, and what waits for the backward pass. All are counts. *Covered* is the share of the target's parameters "
    "that anybody has trained, *least covered* the same of the matrix with the smallest share; empty where every round "
    "trains all."
)
TO_TARGET = (
    "What it took to reach a target accuracy, a constant for each data set (`TARGET_ACCURACY`): the median over "
    "seeds at the first evaluated round that reached it. `>`: half of the seeds or more never did, and would have "
    "needed more than all they spent; in brackets, how many seeds got there."
)
FIGURES = {
    "MB": "Accuracy against what had to be sent for it. Further left is cheaper.",
    "rounds": "Accuracy against federated rounds.",
    "FLOPs": "Accuracy against what participants had to compute for it.",
}


def blocks_of(results: Results, readings: Readings, commands: Sequence[str]) -> list[Block]:
    """What the page says, in order."""
    table = records(summary(readings))
    settings = by_setting(table)
    said = notes(results, readings)
    alarming = frozenset(note for note in said if _is_alarming(note))
    blocks: list[Block] = [*map(Paragraph, INTRODUCTION), Heading("Results")]
    if not settings:
        blocks.append(Paragraph("**No run has finished.**"))
    for number, (setting, rows) in enumerate(settings.items()):
        blocks += [Heading(setting, 3), Paragraph(_in_short(rows)), _grid(rows, SUMMARY), *_savings(rows, number)]
    blocks += [Heading("How to read this", 3), *map(Paragraph, HOW_TO_READ), Bullets(said, alarming)]
    of_setting = by_setting(readings.runs)
    for number, (setting, rows) in enumerate(settings.items()):
        runs = of_setting[setting]
        blocks += [Heading(setting), Heading("Accuracy", 3), *_curves(runs, readings, number)]
        blocks += [Heading("What the seeds say", 3), Paragraph(COMPARISON), _grid(rows, COMPARED)]
        blocks += [Paragraph(PAIRED), _grid(rows, DIFFERENCES), *_differences(rows, number)]
        blocks += _spread(runs, results, number)
        blocks += [Heading("What it takes", 3), Paragraph(TAKES), _grid(rows, COSTS)]
        if any(row["target"] == row["target"] for row in rows):
            blocks += [Paragraph(TO_TARGET), _grid(rows, TARGETS)]
        blocks += [*_times(rows, number), *_labels(runs, number)]
        blocks += [Heading("Seed by seed", 3), _grid(runs, PER_SEED, reference_of(runs, readings.reference))]
    return [*blocks, *_provenance(results, commands), *_configs(results)]


def _in_short(rows: Sequence[Row]) -> str:
    """The three things most readers look for, from the numbers alone."""
    parts = []
    for column, where in (("accuracy", "after the last round"), ("equal_bytes_accuracy", "at equal bytes")):
        known = [row for row in rows if row[column] == row[column]]
        if known:
            best = max(known, key=lambda row: row[column])
            parts.append(f"{where} **{best['method']}** is best ({percent(best[column])} %)")
    by_name = {row["method"]: row for row in rows}
    reference = by_name.get(rows[0]["reference"])
    if reference:
        figures = [f"{percent(reference['accuracy'])} % after the last round"]
        if reference["saved"] == reference["saved"]:
            figures.append(f"{percent(reference['saved'])} % of FedAvg's upload saved")
        parts.append(f"the reference, **{reference['method']}**: {', '.join(figures)}")
        alone = by_name.get(reference["method"].replace("fedgrow (", "fedgrow_no_federation ("))
        if alone and alone is not reference:
            parts.append(f"the same without federation: {percent(alone['accuracy'])} %")
    text = "; ".join(parts)
    return f"In short: {text}." if text else "In short: nothing was evaluated."


def _grid(rows: Sequence[Row], columns: Columns, named: str | None = None) -> Grid:
    reference = named or next((row.get("reference") for row in rows), None)
    return Grid(list(columns), cells(rows, columns), frozenset({reference} if reference else set()))


def _curves(runs: Sequence[Row], readings: Readings, number: int) -> Iterable[Block]:
    by_seed = {run["seed"]: run for run in runs}.values()
    budgets = {
        "MB": [run["budget_mb"] for run in by_seed if run["budget_method"]],
        "FLOPs": [run["budget_flops"] for run in by_seed if run["flops_method"]],
    }
    hidden = len(by_method(runs)) - len(shown_methods(runs))
    left_out = f" The {hidden} least accurate methods are left out (at most {MOST_LINES} lines)." if hidden else ""
    seeds = len(by_seed)
    band = " Lines are means over seeds, bands 95 % confidence intervals." if seeds > 1 else " One seed: no band."
    for against, caption in FIGURES.items():
        budget = budgets.get(against)
        figure = accuracy_figure(
            runs, readings.rounds, against=against, budget=sum(budget) / len(budget) if budget else None
        )
        yield Picture(f"{number}-accuracy-{against.lower()}", svg(figure), caption + band + left_out)


def _optional(figure: Figure | None, name: str, caption: str) -> list[Block]:
    return [] if figure is None else [Picture(name, svg(figure), caption)]


def _savings(rows: Sequence[Row], number: int) -> list[Block]:
    caption = (
        "What each method saves against FedAvg of the target: bytes of one upload, and parameters a participant "
        "trains. Dashed: what Fed-Grow's abstract states (73.01 % and 59.25 %)."
    )
    return _optional(savings_figure(rows), f"{number}-savings", caption)


def _differences(rows: Sequence[Row], number: int) -> list[Block]:
    caption = (
        "Difference to the reference at equal bytes, with 95 % intervals; filled where it is significant after Holm's "
        "correction."
    )
    figure = difference_figure(rows, "equal_bytes_accuracy")
    return _optional(figure, f"{number}-differences", caption)


def _spread(runs: Sequence[Row], results: Results, number: int) -> list[Block]:
    caption = (
        "Who is left behind: accuracy of the model every participant ends up with, all seeds together, sorted; the "
        "colour is the participant's class of device."
    )
    return _optional(spread_figure(runs, results.deployed), f"{number}-participants", caption)


def _times(rows: Sequence[Row], number: int) -> list[Block]:
    caption = "Where the time went. Comparable only among runs that were computed alone on one machine."
    return _optional(time_figure(rows), f"{number}-time", caption)


def _labels(runs: Sequence[Row], number: int) -> Iterable[Block]:
    for run in runs:
        if run["labels"]:
            caption = (
                f"Who holds which examples (seed {run['seed']}): one bar a participant, a colour a class. Every method "
                "meets this federation."
            )
            yield Picture(f"{number}-data", svg(labels_figure(json.loads(run["labels"]))), caption)
            return


def _is_alarming(note: str) -> bool:
    return note.startswith(("Failed", "Not ")) or ": Not " in note


def _provenance(results: Results, commands: Sequence[str]) -> Iterable[Block]:
    yield Heading("Where and with what")
    typed = dict.fromkeys(run["command"] for run in records(results.runs) if run["command"])
    yield Paragraph("These commands computed the runs and wrote this page; started again, they skip what is finished.")
    yield Code("\n".join([*typed, *commands]))
    for heading, column in (("Git commit", "git_commit"), ("fedsim's sources (SHA-256)", "code_sha256")):
        found = sorted({run[column] or "unknown" for run in records(results.runs)})
        yield Paragraph(f"{heading}: {', '.join(f'`{value}`' for value in found)}")
    for heading, column in (("Hardware", "hardware"), ("Versions", "versions")):
        yield Heading(heading, 3)
        for text in sorted(set(results.runs[column])):
            yield Code(_pretty(text))


def _configs(results: Results) -> Iterable[Block]:
    yield Heading("Every run's config")
    for run in records(results.runs):
        title = f"{run['algorithm']} {run['preset']} seed {run['seed']}: run {run['run_id']}, {run['status']}"
        yield Code(_pretty(run["config"]), title)


def _pretty(text: str) -> str:
    return json.dumps(json.loads(text), indent=2, ensure_ascii=False)


def html_report(results: Results, title: str) -> str:
    """The whole page as HTML."""
    return as_html(title, blocks_of(results, read(results), []))


def write_report(
    directory: Place, out: Place | None = None, results: Results | None = None, reference: str | None = None
) -> Place:
    """Write the page of a results folder and return where: by default `report.html` in it.

    Beside it, under the same name, the same as Markdown (`.md`, with a folder of figures). Each is replaced atomically.

    - `results`: what the page is about; None: what lies in the folder.
    - `reference`: see `fedsim.report.readings.read`.

    **Raises:** `ValueError` for a reference that no finished run has.
    """
    path = out or directory / "report.html"
    results = results or load(directory)
    words = ["fedsim", "report", *map(str, results.directories), *(["--out", str(path)] if out else [])]
    command = shlex.join([*words, *(["--reference", reference] if reference else [])])
    names = " + ".join(each.resolve().name for each in results.directories)
    title, blocks = f"fedsim: {names}", blocks_of(results, read(results, reference=reference), [command])
    with sent(path.parent) as folder:
        figures = folder / f"{path.stem}_figures"
        write_figures(figures, blocks)
        write_atomically(folder / f"{path.stem}.md", as_markdown(title, blocks, figures.name).encode())
        write_atomically(folder / path.name, as_html(title, blocks).encode())
    return path
