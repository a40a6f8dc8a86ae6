"""Bad values are named, cut where they are long, and have limits."""

import dataclasses
import math
from pathlib import Path

import pytest

from fedsim.core.fields import MANY, WHOLE, check_types, matches, path_of, refuse, shown


@dataclasses.dataclass(frozen=True)
class Example:
    count: int = 1
    maybe: int | None = None
    seed: int = dataclasses.field(default=0, metadata={"most": WHOLE})
    rate: float = 0.5

    def __post_init__(self) -> None:
        check_types(self, "example")


@pytest.mark.parametrize("value", [MANY, -MANY])
def test_whole_numbers_within_their_limits(value: int) -> None:
    assert Example(count=value, maybe=value, seed=WHOLE, rate=value)


@pytest.mark.parametrize(
    "field, value",
    [
        ("count", MANY + 1),
        ("count", 10**20),
        ("count", -(10**400)),
        ("maybe", MANY + 1),
        ("maybe", 10**19),
        ("seed", WHOLE + 1),
        ("seed", int("f" * 5000, 16)),
        ("rate", 10**20),
        ("rate", math.nan),
        ("rate", True),
    ],
    ids=shown,
)
def test_others_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^example\.{field}=.+: must be ") as refusal:
        Example(**{field: value})  # type: ignore[arg-type]
    assert len(str(refusal.value)) < 400


def test_a_float_may_be_large_but_no_whole_number_without_end() -> None:
    assert matches(1e300, float) and matches(math.inf, float) and matches(3, float)
    assert not matches(10**300, float)


@pytest.mark.parametrize("value", ["x" * 10**6, [["x"] * 100] * 100, 10**5000, b"y" * 9999], ids=shown)
def test_what_is_long_is_cut(value: object) -> None:
    assert len(shown(value)) < 250
    with pytest.raises(ValueError, match="must be short") as refusal:
        refuse("field", value, "short")
    assert len(str(refusal.value)) < 300


def test_home_is_meant_by_a_tilde_in_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_of("~/x", "--out") == tmp_path / "x"
    assert path_of(Path("a/~"), "--out") == Path("a/~")


@pytest.mark.parametrize("text", ["", " ", "\n", "a\0b"])
def test_what_can_be_no_path(text: str) -> None:
    with pytest.raises(ValueError, match=r"^--to=.*must be a path"):
        path_of(text, "--to")
