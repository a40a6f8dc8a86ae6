"""What code a run was computed by: files, and classes that have none."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsim.results.provenance import code_sha256


CELL = """
import dataclasses, functools, torch
from fedsim.algorithm import Algorithm
RATE = 3
TABLE = {"a": [1, 2.5]}
def inner(x): return x + RATE
def helper(x): return x in {"a", "b", "c"} or TABLE[x] or inner(x)
class Base(Algorithm):
    def more(self): return torch.ones(3)
@dataclasses.dataclass(frozen=True)
class Mine(Base):
    lr: float = 1e-3
    name = "mine"
    @functools.cached_property
    def cached(self): return 5
    @staticmethod
    def still(): return 6
    def server_init(self, ctx): return helper(RATE)
    def server_broadcast(self, state, cohort, ctx): return {c.id: (lambda: helper(c)) for c in cohort}
    def server_aggregate(self, state, updates, ctx, some=7): return [helper(u) for u in updates]
    def client_update(self, payload, state, ctx): yield 1
    def client_model(self, payload, state, ctx): return 3
"""


def typed(text: str) -> Any:
    """The algorithm of a cell."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(text, names)
    return names["Mine"]()


@pytest.fixture(autouse=True)
def _no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)


def test_a_class_without_a_file_is_the_same_in_every_process() -> None:
    program = f"{CELL}\nfrom fedsim.results.provenance import code_sha256\nprint(code_sha256(Mine()))"
    run = [sys.executable, "-c", program]
    others = [subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() for _ in range(2)]
    assert [code_sha256(typed(CELL))] * 2 == others


@pytest.mark.parametrize(
    "old, new",
    [
        ("RATE = 3", "RATE = 4"),
        ("2.5", "2.6"),
        ('"b"', '"x"'),
        ("ones(3)", "ones(4)"),
        ("return 5", "return 7"),
        ("return 6", "return None"),
        ("return 3", "return 1"),
        ("yield 1", "yield 3"),
        ("x + RATE", "x - RATE"),
        ("some=7", "some=8"),
        ("helper(u)", "inner(u)"),
        ('name = "mine"', 'name = "other"'),
        ("lambda: helper(c)", "lambda: inner(c)"),
    ],
)
def test_a_change_in_the_cell_or_in_what_it_names_is_another_code(old: str, new: str) -> None:
    assert CELL.count(old) == 1
    assert code_sha256(typed(CELL.replace(old, new))) != code_sha256(typed(CELL))


@pytest.mark.parametrize("change", [lambda text: f"unused = 1\n{text}", lambda text: text.replace("\n", "\n\n", 5)])
def test_what_it_does_not_name_is_not(change: Callable[[str], str]) -> None:
    assert code_sha256(typed(change(CELL))) == code_sha256(typed(CELL))


VALUES = {
    "array": ("np.array([1, 2])", "np.array([1, 3])"),
    "tensor": ("torch.ones(2)", "torch.zeros(2)"),
    "set": ("{'a', 'b'}", "{'a', 'c'}"),
    "object": ("Point(1)", "Point(2)"),
    "namespace": ("types.SimpleNamespace(a=1)", "types.SimpleNamespace(a=2)"),
    "partial": ("functools.partial(inner, 1)", "functools.partial(inner, 2)"),
    "partial of another": ("functools.partial(inner, 1)", "functools.partial(helper, 1)"),
    "module": ("torch.nn.Linear(1, 1).requires_grad_(False).apply(lambda m: m.weight.fill_(1) + m.bias.fill_(1))",
               "torch.nn.Linear(1, 1).requires_grad_(False).apply(lambda m: m.weight.fill_(2) + m.bias.fill_(1))"),
    "complex": ("1 + 2j", "1 + 3j"),
    "dtype": ("torch.float32", "torch.float64"),
    "builtin": ("max", "min"),
    "imported": ("json.dumps", "json.loads"),
    "imported module": ("json", "types"),
    "cached": ("functools.lru_cache(inner)", "functools.lru_cache(helper)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", VALUES)
def test_whatever_kind_of_value_a_method_names_counts(kind: str) -> None:
    imports = "import functools, json, types\nimport numpy as np, torch\n"
    imports += "class Point:\n    def __init__(self, x): self.x = x\n"
    first, second = (
        imports + CELL.replace("ctx): return helper(RATE)", "ctx): return NAMED") + f"\nNAMED = {value}\n"
        for value in VALUES[kind]
    )
    assert code_sha256(typed(first)) == code_sha256(typed(first)) != code_sha256(typed(second))


def test_a_value_that_cannot_be_compared_is_refused() -> None:
    cell = (
        CELL.replace("ctx): return helper(RATE)", "ctx): return LOCK") + "\nimport threading\nLOCK = threading.Lock()\n"
    )
    with pytest.raises(ValueError, match="a global of type lock, which cannot be compared"):
        code_sha256(typed(cell))


def test_sources_beside_an_algorithm_and_a_family_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine_helper.py").write_text("def rate(): return 1\n")
    (tmp_path / "mine_base.py").write_text("class Base: pass\n")
    (tmp_path / "mine_pack").mkdir()
    (tmp_path / "mine_pack" / "family.py").write_text("FAMILY = 1\n")
    (tmp_path / "mine_unused.py").write_text("")
    (tmp_path / "mine_method.py").write_text(
        "import json, numpy\nfrom mine_helper import rate\nfrom mine_base import Base\nclass Mine(Base): pass\n"
    )
    method = importlib.import_module("mine_method").Mine()
    importlib.import_module("mine_pack.family")
    found = {code_sha256(method), code_sha256(method, "mine_pack.family"), code_sha256(method, "vit")}
    assert len(found) == 2, "a family of fedsim's is among its sources"
    for changed in ("mine_helper", "mine_base", "mine_pack/family", "mine_method"):
        with (tmp_path / f"{changed}.py").open("a") as file:
            file.write("# another line\n")
        found.add(code_sha256(method, "mine_pack.family"))
    assert len(found) == 6
    (tmp_path / "mine_unused.py").write_text("# another line")
    assert code_sha256(method, "mine_pack.family") in found
