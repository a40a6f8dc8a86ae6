"""Results -> one self-contained HTML page:  python benchmarks/report.py DIR [--out FILE.html]

Nothing is fetched and nothing runs in the page: tables, figures (embedded), the machines, and every run's config.
"""

import argparse
import html
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


if __package__ in (None, ""):  # run as a script: the packages lie beside this folder, not in it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.figures import accuracy_figure, data_uri, labels_figure
from benchmarks.tables import (
    COMPACT,
    COSTS,
    by_setting,
    cells,
    finished_runs,
    histories,
    markdown,
    notes,
    percent,
    print_summary,
    readings,
    records,
    significant,
    summary,
)
from fedsim.results import Results, load


__all__ = ["html_report", "main", "markdown", "notes", "print_summary", "readings", "summary", "write_report"]

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

INTRODUCTION = """
<p><b>Federated learning</b> trains one model for many participants without collecting their data: in each round
participants train at home and send only numbers, which an aggregator averages. Usually everybody must be able to train
the whole large model, and sends all of it.</p>
<p><b>Fed-Grow</b> turns this around. Each participant owns a <i>small</i> transformer that it could afford to train
by itself, and these may differ in size. Together they learn how to <i>grow</i> small transformers into a large one.
A growth operator (LiGO) computes the weights of a larger model from those of a smaller one. Each participant has two:
<b>Local-LiGO</b> grows its own small form to an intermediate form that is the same for everybody, and stays private;
<b>Global-LiGO</b> grows the intermediate form to the large target, and is <b>the only thing that is sent</b> and
averaged. The small models, the data and the grown models never leave their owners.</p>
<p><b>How to read the numbers.</b> Accuracy is that of the model each participant would deploy, on the common test set:
the mean over participants, ± the spread between them, and the worst participant; <i>own labels</i> is the same model's
accuracy weighted by the participant's own mix of labels. Each method is read twice: after its last round (equal
rounds), and where it had sent no more than Fed-Grow did in its whole run (equal bytes), since a method that sends
fifty times as much should not be compared round by round alone. <i>Trainable</i> counts the parameters that a
participant trains, <i>saved</i> compares one upload with FedAvg's, which sends the whole target. 1 MB is 10<sup>6</sup>
bytes; megabytes in total are what all participants sent and received.</p>
<p><b>What it takes.</b> <i>Global</i> is the server's own model, where the method has one. FLOPs are forward and
backward passes of all participants in all rounds. <i>Held</i> is what the participant with most has to keep (its
private state and what it receives); <i>peak</i> is its memory in a training step: that state, trained tensors with
gradients and AdamW's moments, and what waits for the backward pass. All are counts. <i>Covered</i> is the share of the
target's parameters that anybody has trained, <i>least covered</i> the same of the matrix with the smallest share; empty
where every round trains all.</p>
"""

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 72rem; margin: 2rem auto;
       padding: 0 1rem; }
p, ul { max-width: 52rem; } h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; } img { max-width: 100%; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; text-align: right; border-bottom: 1px solid #ddd; }
th { vertical-align: bottom; border-bottom: 2px solid #888; } td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
pre { background: #f5f5f5; padding: .7rem; overflow-x: auto; font-size: .8rem; } summary { cursor: pointer; }
figure { margin: 1rem 0; } figcaption { color: #555; font-size: .9rem; max-width: 52rem; } .failed { color: #a00; }
"""


def html_report(results: Results, title: str) -> str:
    """The whole page as text."""
    settings = by_setting(records(summary(results)))
    runs = readings(results)
    rounds = histories(results)
    said = "".join(f"<li{_failed(note)}>{html.escape(note)}</li>" for note in notes(results))
    parts = [f"<h1>{html.escape(title)}</h1>", INTRODUCTION, "<h2>Summary</h2>"]
    if not settings:
        parts.append("<p class='failed'>No run has finished.</p>")
    for setting, rows in settings.items():
        parts += [f"<h3>{html.escape(setting)}</h3>", _table(rows, SUMMARY), _table(rows, COSTS)]
    parts.append(f"<ul>{said}</ul>")
    for setting in settings:
        of_setting = [run for run in runs if run["setting"] == setting]
        parts += [f"<h2>{html.escape(setting)}</h2>", *_figures(of_setting, rounds), *_labels(results, setting)]
        parts += ["<h3>Seed by seed</h3>", _table(of_setting, PER_SEED)]
    parts += [*_provenance(results), *_configs(results)]
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><style>{STYLE}</style>"
    start = f"<!doctype html>\n<html lang='en'><head>{head}<title>{html.escape(title)}</title></head>\n<body>"
    return "\n".join([start, *parts, "</body></html>\n"])


def write_report(directory: Path, out: Path | None = None, results: Results | None = None) -> Path:
    """Write the page of a results folder, by default `report.html` in it, and return where. Replaces it atomically."""
    path = out or directory / "report.html"
    page = html_report(results or load(directory), f"fedsim: {directory.resolve().name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def _table(rows: Iterable[Row], columns: Columns) -> str:
    heading = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in cells(rows, columns)]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class='wide'><table>\n<thead><tr>{heading}</tr></thead>\n<tbody>{body}</tbody></table></div>"


def _figures(runs: Sequence[Row], rounds: Mapping[str, Sequence[Row]]) -> Iterable[str]:
    budgets = [run["budget_mb"] for run in {run["seed"]: run for run in runs}.values() if run["budget_method"]]
    budget = sum(budgets) / len(budgets) if budgets else None
    band = "Lines are means over seeds, bands reach from the lowest to the highest seed."
    sent = accuracy_figure(runs, rounds, against="MB", budget_mb=budget)
    yield _figure(sent, f"Accuracy against what had to be sent for it. Further left is cheaper. {band}")
    yield _figure(accuracy_figure(runs, rounds, against="rounds"), f"Accuracy against federated rounds. {band}")


def _labels(results: Results, setting: str) -> Iterable[str]:
    for run in finished_runs(results):
        if run["setting"] == setting and run["labels"]:
            figure = labels_figure(json.loads(run["labels"]))
            yield _figure(
                figure, f"Who holds which examples (seed {run['seed']}): one bar a participant, a colour a class."
            )
            return


def _figure(figure: Any, caption: str) -> str:
    text = html.escape(caption)
    return f"<figure><img alt='{text}' src='{data_uri(figure)}'><figcaption>{text}</figcaption></figure>"


def _failed(note: str) -> str:
    return " class='failed'" if note.startswith(("Failed", "Not")) else ""


def _provenance(results: Results) -> Iterable[str]:
    yield "<h2>Where and with what</h2>"
    for heading, column in (("Git commit", "git_commit"), ("fedsim's sources (SHA-256)", "code_sha256")):
        found = sorted({run[column] or "unknown" for run in records(results.runs)})
        yield f"<p>{html.escape(heading)}: {', '.join(f'<code>{html.escape(value)}</code>' for value in found)}</p>"
    for heading, column in (("Hardware", "hardware"), ("Versions", "versions")):
        yield f"<h3>{heading}</h3>"
        for text in sorted(set(results.runs[column])):
            yield f"<pre>{html.escape(_pretty(text))}</pre>"


def _configs(results: Results) -> Iterable[str]:
    yield "<h2>Every run's config</h2>"
    for run in records(results.runs):
        title = f"{run['algorithm']} {run['preset']} seed {run['seed']}: run {run['run_id']}, {run['status']}"
        config = html.escape(_pretty(run["config"]))
        yield f"<details><summary>{html.escape(title)}</summary><pre>{config}</pre></details>"


def _pretty(text: str) -> str:
    return json.dumps(json.loads(text), indent=2, ensure_ascii=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="report.py", description="Turn a results folder into one HTML page.")
    parser.add_argument("directory", type=Path, metavar="DIR", help="a folder written by sweep.py or `fedsim run`")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="default: DIR/report.html")
    arguments = parser.parse_args(argv)
    try:
        results = load(arguments.directory)
    except ValueError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    try:
        print(write_report(arguments.directory, arguments.out, results))
    except OSError as error:
        print(f"report.py: the report could not be written: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
