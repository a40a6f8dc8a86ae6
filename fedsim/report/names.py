"""What settings and methods are called: in words, and only as many as tell them apart."""

import dataclasses
import functools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fedsim.core.canonical import class_known


AROUND = "around"  # what stands around a method: pairs of `fedsim.privacy`
NOT_A_VARIANT = {"seed", "name", "suite"}  # what may differ between two configs of the same variant

Row = Mapping[str, Any]
Runs = Sequence[Row]


def method_names(runs: Runs) -> list[str]:
    """What the method of each run is called. `runs` have their `setting`."""
    return _in_groups(runs, _methods)


def variant_names(runs: Runs) -> list[str]:
    """As `method_names`, but runs that differ in learning rates alone have one name."""
    return _in_groups(runs, functools.partial(_methods, rates=False))


def settings_of(runs: Runs) -> list[str]:
    """What each run is compared within; small models are named where runs that look alike differ in them."""
    labels = [_setting(run) for run in runs]
    forms = [small_forms(run["parsed"]) for run in runs]
    several = {label for label in labels if len({f for of, f in zip(labels, forms, strict=True) if of == label}) > 1}
    return [f"{label}, {form}" if label in several else label for label, form in zip(labels, forms, strict=True)]


def _setting(run: Row) -> str:
    alpha = "" if math.isnan(run["alpha"]) else f" (alpha {run['alpha']:g})"
    cohort = "" if run["cohort"] == run["participants"] else f", {run['cohort']} a round"
    data = f"{run['dataset']}, {run['family']}, {run['partition']}{alpha}"
    return f"{run['suite']}: {data}, {run['participants']} participants{cohort}{begun_with(run['parsed'])}"


def begun_with(config: Mapping[str, Any]) -> str:
    """Which public models a run begins with: runs that begin with others are not compared."""
    named = [tier["checkpoint"] for tier in config.get("tiers", ()) if tier.get("checkpoint")]
    start = config.get("start") or {}
    named += start.get("checkpoints", ())
    names = sorted({str(checkpoint["path"]).rstrip("/").rpartition("/")[2] for checkpoint in named})
    grown = f", grown by {start['preset']}" if "preset" in start else ""
    return f", from {', '.join(names)}{grown}" if names else ""


def small_forms(config: Mapping[str, Any]) -> str:
    def named(form: Mapping[str, Any]) -> str:
        mlp = f" (mlp {form['mlp']})" if form.get("mlp") else ""
        return f"{form['width']}x{form['depth']}{mlp}"

    return "small models " + ", ".join(named(tier["form"]) for tier in config.get("tiers", ()))


def method_name(run: Row) -> str:
    return f"{run['algorithm']} ({run['preset']})" if run["preset"] else run["algorithm"]


def _in_groups(runs: Runs, names_of: Callable[[Runs], list[str]]) -> list[str]:
    """A name for each run, from those of one setting, algorithm and preset together."""
    alike = defaultdict(list)
    for run in runs:
        alike[run["setting"], run["algorithm"], run["preset"]].append(run)
    named = {id(run): name for group in alike.values() for run, name in zip(group, names_of(group), strict=True)}
    return [named[id(run)] for run in runs]


def _methods(runs: Runs, *, rates: bool = True) -> list[str]:
    """The names of runs of one algorithm and preset. Those that differ in more than the seed are told apart by what.

    A field is left out where it has the value that goes without saying: the default of its class if any of the runs
    has that, else the one that more runs have than any other. Learning rates, which are tuned for each variant, are
    named only where nothing else tells two variants apart; without `rates` not even there.
    """
    runs = [{**run, "parsed": _unwrapped(run["parsed"])} for run in runs]
    configs = [_flat(run["parsed"]) for run in runs]
    fields = dict.fromkeys(field for config in configs for field in config if field not in NOT_A_VARIANT)
    differing = [field for field in fields if len({config.get(field) for config in configs}) > 1]
    usual = {field: _usual(field, runs, configs) for field in differing}
    names = _named(runs, configs, [field for field in differing if not _is_rate(field)], usual)
    variants = {tuple(config.get(field) for field in differing) for config in configs}
    return names if len({*names}) == len(variants) or not rates else _named(runs, configs, differing, usual)


def _named(
    runs: Runs, configs: Sequence[Mapping[str, str]], fields: Sequence[str], usual: Mapping[str, str | None]
) -> list[str]:
    return [
        " ".join(
            [method_name(run)]
            + [
                f"{_short(f)}={config.get(f, '-')}"
                for f in fields
                if usual[f] is None or config.get(f, "-") != usual[f]
            ]
        )
        for run, config in zip(runs, configs, strict=True)
    ]


def _unwrapped(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same with a method as if nothing were around it, and what is, by its settings, as one more field."""
    method = config.get("algorithm")
    if not isinstance(method, dict) or not isinstance(method.get("method"), dict):
        return config
    pairs = method.get("pairs")
    around = ", ".join(_pair(pair) for pair in pairs if isinstance(pair, dict)) if isinstance(pairs, list) else ""
    return {**config, "algorithm": method["method"] | ({AROUND: around} if around else {})}


def _pair(pair: Mapping[str, Any]) -> str:
    """`ExampleDP(clip=1, noise_multiplier=2)`: what has its default goes without saying."""
    kind = str(pair.get("class", ""))
    defaults = _defaults(kind)
    told = [f"{n}={_text(v)}" for n, v in pair.items() if n != "class" and defaults.get(n) != _text(v)]
    return f"{kind.rpartition('.')[2]}({', '.join(told)})"


def _is_rate(field: str) -> bool:
    return field.rpartition(".")[2] == "lr"


def _short(field: str) -> str:
    """A field by its last name, and what it is a part of, unless that is the algorithm."""
    parent, _, name = field.rpartition(".")
    of = parent.rpartition(".")[2]
    return f"{of}.{name}" if of and of != "algorithm" else name


def _usual(field: str, runs: Runs, configs: Sequence[Mapping[str, str]]) -> str | None:
    found = Counter(config.get(field, "-") for config in configs)
    if field == f"algorithm.{AROUND}":
        return "-"
    default = _default(runs[0]["parsed"], field)
    if default in found:
        return default
    (most, count), *others = found.most_common(2)
    return most if not others or count > others[0][1] else None


def _default(config: Any, field: str) -> str | None:
    """The default of a field by dotted path, as text; None if its class gives none, or is not known here."""
    *path, name = field.split(".")
    for part in path:
        config = config[int(part)] if isinstance(config, list) else config.get(part)
        if config is None:
            return None
    default = _defaults(str(config.get("class", ""))).get(name) if isinstance(config, dict) else None
    return default


@functools.lru_cache(maxsize=256)
def _defaults(class_name: str) -> Mapping[str, str]:
    kind = class_known(class_name)
    fields = () if kind is None else dataclasses.fields(kind)  # somebody's own, not here: nothing goes without saying
    return {f.name: _text(f.default) for f in fields if f.default is not dataclasses.MISSING and _is_leaf(f.default)}


def _is_leaf(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _flat(config: Any, path: str = "") -> dict[str, str]:
    """The leaves of a JSON document by dotted path, as text."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(config, dict):
        items = config.items()
    elif isinstance(config, list):
        items = enumerate(config)
    if not items or (isinstance(config, dict | list) and not config):
        return {path: _text(config)}
    found: dict[str, str] = {}
    for key, value in items:
        found |= _flat(value, f"{path}.{key}" if path else str(key))
    return found
