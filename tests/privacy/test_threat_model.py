"""The drawn threat model has every method in the row that it names itself, and a cell for everybody."""

import typing
from pathlib import Path

from benchmarks.methods import named as named_methods
from benchmarks.threat_model import LEGEND, WATCHERS, figure, main, seen
from fedsim.algorithm import Leaves


def test_every_kind_of_method_has_a_row_with_a_cell_for_everybody(tmp_path: Path) -> None:
    kinds = {method.leaves for method in named_methods().values()}
    (axes,) = figure().axes
    texts = {text.get_text() for text in axes.texts}
    assert kinds <= texts and len(axes.patches) == len(kinds) * len(WATCHERS)
    assert any("local_only" in text for text in texts)
    for leaves in typing.get_args(Leaves):
        assert len(seen(leaves)) == len(WATCHERS) and {cell.how for cell in seen(leaves)} <= LEGEND.keys()
    assert main([str(tmp_path / "x.svg")]) == 0 and (tmp_path / "x.svg").read_text().startswith("<?xml")
