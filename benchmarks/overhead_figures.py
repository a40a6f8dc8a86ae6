"""From what `overhead.py` found to its figures, and to its table: numbers in, numbers and text out."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table


POPULATIONS = (100, 10_000)

Found = dict[str, Any]  # what one repetition of a part found
Figures = dict[str, Any]  # the JSON object's numbers, by name


def figures_of(found: Mapping[str, Sequence[Found]]) -> Figures:
    """The figures from all repetitions of each part: medians of times, highest of memory; None: not measured."""

    def pooled(part: str, name: str) -> float | None:
        return middle([value for each in found.get(part, ()) for value in each[name] or ()])

    def single(part: str, pick: Callable[[Found], float | None]) -> float | None:
        return middle([value for each in found.get(part, ()) if (value := pick(each)) is not None])

    def highest(part: str, role: str, pick: Callable[[Found], float]) -> float | None:
        processes = [each["memory"][role] for each in found.get(part, ()) if role in each["memory"]]
        return max(map(pick, processes), default=None)

    def above_imports(process: Found) -> float:
        return process["peak"]["anonymous"] - process["imports"]["anonymous"]

    few, many = (pooled("population", f"of_{size}") for size in POPULATIONS)
    figures: Figures = {f"{part}_seconds": pooled(part, "ours") for part in ("noop", "bulk", "work")}
    figures |= {f"{part}_flower_seconds": pooled(part, "flower") for part in ("noop", "bulk", "work")}
    figures |= {f"{part}_rows_seconds": pooled(part, "rows") for part in ("noop", "bulk")}
    figures |= {
        "work_bare_seconds": pooled("work", "bare"),
        "first_round_seconds": single("first", lambda each: each["ours"][1]),
        "first_round_vit_seconds": single("first", lambda each: each["vit"][1]),
        "first_round_flower_seconds": single("first", lambda each: each["flower"]),
        "round_zero_seconds": single("first", lambda each: each["ours"][0]),
        "round_zero_vit_seconds": single("first", lambda each: each["vit"][0]),
        "population_ratio": ratio(many, few),
        "population_last_round_seconds": single("population", lambda each: each["last"]),
        "population_aggregator_imports_transformers": imports_transformers(found.get("population", ())),
        "two_nodes_same_bits": same_bits(found.get("nodes", ())),
    }
    for role, key in (("driver", "bulk_driver"), ("aggregator", "bulk_aggregator"), ("flower", "bulk_flower_driver")):
        for measure, ending in (("anonymous", "mb"), ("uss", "uss_mb"), ("rss", "rss_mb")):
            figures[f"{key}_{ending}"] = highest("bulk", role, lambda process, of=measure: process["grown"][of])
            figures[f"{key}_peak_{ending}"] = highest("bulk", role, lambda process, of=measure: process["peak"][of])
    for role in ("driver", "aggregator"):
        figures[f"bulk_{role}_above_imports_mb"] = highest("bulk", role, above_imports)
        figures[f"population_{role}_mb"] = highest("population", role, above_imports)
    return figures


def middle(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def total(*values: float | None) -> float | None:
    return None if None in values else sum(value for value in values if value is not None)


def imports_transformers(found: Sequence[Found]) -> bool | None:
    """Whether the aggregator had imported transformers by the last round."""
    return any("without" not in each["witness"] for each in found) if found else None


def same_bits(found: Sequence[Found]) -> bool | None:
    """Whether every round had the same hash in every run, however it was computed."""
    runs = [run for each in found for run in each.values()]
    return all(run == runs[0] for run in runs) if runs else None


# the table ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of the table. `met`: whether the aim was reached; None: not enough was measured to say."""

    what: str
    ours: float | bool | None
    flower: float | None
    bare: float | None
    aim: str
    met: bool | None


def lines_of(figures: Figures) -> list[Line]:
    """What was measured, beside what it is measured against and what is aimed at."""
    noop, noop_flower = figures["noop_seconds"], figures["noop_flower_seconds"]
    bulk, bulk_flower = figures["bulk_seconds"], figures["bulk_flower_seconds"]
    ours, bare, flower = (figures[f"work_{name}seconds"] for name in ("", "bare_", "flower_"))
    held = total(figures["bulk_driver_mb"], figures["bulk_aggregator_mb"])
    first, first_flower = figures["first_round_seconds"], figures["first_round_flower_seconds"]
    vit, population = figures["first_round_vit_seconds"], figures["population_ratio"]
    driver, aggregator = figures["population_driver_mb"], figures["population_aggregator_mb"]
    loaded, same = figures["population_aggregator_imports_transformers"], figures["two_nodes_same_bits"]
    lean = all_of(at_most(aggregator, 150), None if loaded is None else not loaded)
    few, many = POPULATIONS
    return [
        Line(
            "1,000 participants x 10 KB: s a round",
            noop,
            noop_flower,
            None,
            "1/90 of Flower",
            at_most(ratio(noop, noop_flower), 1 / 90),
        ),
        Line(
            "20 participants x 40 MB: s a round",
            bulk,
            bulk_flower,
            None,
            "1/7 of Flower",
            at_most(ratio(bulk, bulk_flower), 1 / 7),
        ),
        Line(
            "driver and aggregator above idle: MB",
            held,
            figures["bulk_flower_driver_mb"],
            None,
            "300",
            at_most(held, 300),
        ),
        Line(
            "50 participants x 20 steps: s a round",
            ours,
            flower,
            bare,
            "1.05 of bare, Flower",
            all_of(at_most(ratio(ours, bare), 1.05), at_most(ratio(ours, flower), 1.0)),
        ),
        Line(
            "command to first round, no model: s",
            first,
            first_flower,
            None,
            "Flower",
            at_most(ratio(first, first_flower), 1.0),
        ),
        Line(
            "command to first round, ViT: s",
            vit,
            first_flower,
            None,
            "1.5 of Flower without",
            at_most(ratio(vit, first_flower), 1.5),
        ),
        Line(f"a round, {many:,} : {few} participants", population, None, None, "1.05", at_most(population, 1.05)),
        Line("its driver above its imports: MB", driver, None, None, "150", at_most(driver, 150)),
        Line("its aggregator above its imports: MB", aggregator, None, None, "150, no transformers", lean),
        Line("same bits on 2 nodes, 1 host, inline", same, None, None, "yes", same),
    ]


def at_most(value: float | None, limit: float) -> bool | None:
    return None if value is None else value <= limit


def all_of(*conditions: bool | None) -> bool | None:
    """False if one is false; None if otherwise one is not known."""
    if any(condition is False for condition in conditions):
        return False
    return None if None in conditions else True


def table_of(lines: Sequence[Line]) -> Table:
    """The table; beside what ours is measured against, how many times ours that is."""
    table = Table("", "fedsim", "Flower", "bare PyTorch", "at most", "met")
    for column in table.columns[1:4]:
        column.justify = "right"
    for line in lines:
        beside = (against(line.flower, line.ours), against(line.bare, line.ours))
        table.add_row(line.what, cell(line.ours), *beside, line.aim, cell(line.met))
    return table


def cell(value: float | bool | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def against(value: float | None, ours: float | bool | None) -> str:
    times = ratio(value, ours)
    return "" if value is None else cell(value) if times is None else f"{cell(value)} ({times:.3g}x)"
