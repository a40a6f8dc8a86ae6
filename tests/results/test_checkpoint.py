"""Checkpoints are complete or absent, hold the bits they were given, and keep what a repeated round needs."""

import json
import os
from pathlib import Path

import pytest
import torch

from fedsim.core.tree import Tree, flat, ordered, sha256
from fedsim.storage.checkpoint import Versions
from fedsim.storage.place import write_atomically


def tree(value: float) -> Tree:
    return {"w": torch.full((2, 3), value), "b": torch.tensor(value)}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_nested_state_comes_back_in_the_order_it_had(tmp_path: Path) -> None:
    """Sums over parts go by their order: "1" before "10", as in memory, and not as the names in the file."""
    state = ordered({"last": {str(n): tree(n) for n in range(12)}, "a": tree(1), "a.c": torch.ones(1), "n": {"m": {}}})
    versions = Versions(tmp_path, "server")
    versions.save(0, state)
    found = versions.load(before=1)
    assert found is not None and list(flat(found[1])) == list(flat(state)) and sha256(found[1]) == sha256(state)
    assert list(found[1]["last"]) == list(state["last"])


def test_parts_that_are_one_in_memory_are_two_in_the_file(tmp_path: Path) -> None:
    model = tree(3.0)
    versions = Versions(tmp_path, "server")
    versions.save(0, {"model": model, "first": model, "row": model["w"][1], "both": model["w"]})
    found = versions.load(before=1)
    assert found is not None and torch.equal(found[1]["row"], model["w"][1])
    assert sha256(found[1]["model"]) == sha256(found[1]["first"]) == sha256(model)


# versions -------------------------------------------------------------------------------------------------------------


def test_a_version_and_the_newest_before_it_are_kept(tmp_path: Path) -> None:
    versions = Versions(tmp_path, "server")
    kept = []
    for version in (0, 1, 2, 7, 8):
        versions.save(version, tree(version))
        kept.append(versions.stored())
    assert kept == [[0], [0, 1], [1, 2], [2, 7], [7, 8]]
    assert files(tmp_path) == ["server.7.safetensors", "server.8.safetensors"]


def test_saving_a_version_again_replaces_it_and_loses_none(tmp_path: Path) -> None:
    versions = Versions(tmp_path, "server")
    for version in (0, 1, 1):
        versions.save(version, tree(10 + version))
    versions.save(1, tree(5))
    assert versions.stored() == [0, 1]
    found = versions.load(before=2)
    assert found is not None and found[1]["b"].item() == 5


def test_repeating_an_older_round_keeps_what_it_starts_from(tmp_path: Path) -> None:
    versions = Versions(tmp_path, "server")
    for version in (0, 1, 2):
        versions.save(version, tree(version))
    versions.save(2, tree(99))
    assert versions.stored() == [1, 2]
    found = versions.load(before=2)
    assert found is not None and found[0] == 1


def test_load_gives_the_newest_that_is_older(tmp_path: Path) -> None:
    versions = Versions(tmp_path, "3")
    assert versions.load(before=10) is None
    versions.save(2, tree(2.0), {"note": "two"})
    versions.save(9, tree(9.0), {"note": "nine"})
    assert versions.load(before=2) is None
    for before, expected in ((3, 2), (9, 2), (10, 9), (1000, 9)):
        found = versions.load(before)
        assert found is not None
        version, loaded, metadata, _ = found
        assert (version, loaded["b"].item()) == (expected, float(expected))
        assert metadata == {"note": {2: "two", 9: "nine"}[expected]}


def test_names_do_not_meet(tmp_path: Path) -> None:
    one, eleven = Versions(tmp_path, "1"), Versions(tmp_path, "11")
    one.save(1, tree(1.0))
    eleven.save(2, tree(2.0))
    Versions(tmp_path, "1.1").save(3, tree(3.0))
    assert (one.stored(), eleven.stored()) == ([1], [2])
    one.save(5, tree(5.0))
    one.save(6, tree(6.0))
    assert eleven.stored() == [2]


def test_bits_are_equal_after_a_round_trip(tmp_path: Path) -> None:
    special = torch.tensor([0.1, -0.0, float("inf"), float("nan"), 1e-45, 3.4e38])
    saved = {
        "float32": special,
        "float64": special.double() / 3,
        "int64": torch.tensor([2**62, -1]),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(0.3),
        "none of it": torch.zeros(0, 4),
        "transposed": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).T,
        "half": torch.randn(9, generator=torch.Generator().manual_seed(1))[1::2],
        "with gradient": torch.ones(2, requires_grad=True),
    }
    versions = Versions(tmp_path, "server")
    versions.save(0, saved)
    found = versions.load(before=1)
    assert found is not None
    loaded = found[1]
    assert sha256(loaded) == sha256(saved)
    assert {name: (t.dtype, t.shape) for name, t in loaded.items()} == {n: (t.dtype, t.shape) for n, t in saved.items()}
    assert list(loaded) == sorted(saved)
    assert not any(tensor.requires_grad for tensor in loaded.values())


def test_loaded_tensors_may_be_written_to(tmp_path: Path) -> None:
    versions = Versions(tmp_path, "server")
    versions.save(0, tree(1.0))
    for _ in range(2):
        found = versions.load(before=1)
        assert found is not None
        assert found[1]["w"].sum() == 6
        found[1]["w"].zero_()


def test_empty_tree(tmp_path: Path) -> None:
    versions = Versions(tmp_path, "0")
    versions.save(4, {}, {"private": "{}"})
    assert versions.load(before=5) == (4, {}, {"private": "{}"}, sha256({}))


# accidents ------------------------------------------------------------------------------------------------------------


def test_a_stray_temporary_file_is_ignored(tmp_path: Path) -> None:
    versions = Versions(tmp_path, "server")
    versions.save(1, tree(1.0))
    (tmp_path / ".server.2.safetensors.4711.tmp").write_bytes(b"half a fi")
    (tmp_path / "server.3.safetensors.tmp").write_bytes(b"half a fi")
    assert versions.stored() == [1]
    found = versions.load(before=10)
    assert found is not None and found[0] == 1


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    versions = Versions(tmp_path, "server")
    versions.save(1, tree(1.0))
    path = versions.path(1)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a readable checkpoint") as error:
        versions.load(before=2)
    assert str(path) in str(error.value)


def test_a_failed_save_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = Versions(tmp_path, "server")
    versions.save(1, tree(1.0))
    before = versions.path(1).read_bytes()

    def full(source: str, destination: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    for version in (1, 2):
        with pytest.raises(OSError, match="No space left") as error:
            versions.save(version, tree(2.0))
        assert str(versions.path(version)) in str(error.value)
    assert files(tmp_path) == ["server.1.safetensors"]
    assert versions.path(1).read_bytes() == before


def test_atomic_write_replaces_or_leaves_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "manifest.json"
    write_atomically(path, b'{"round": 1}')
    write_atomically(path, b'{"round": 2}')
    assert json.loads(path.read_text()) == {"round": 2}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_atomically(path, b'{"round": 3}')
    assert str(path) in str(error.value)
    assert json.loads(path.read_text()) == {"round": 2}
    assert files(tmp_path) == ["manifest.json"]


def test_a_state_without_tensors_is_a_version_too(tmp_path: Path) -> None:
    versions = Versions(tmp_path, "nothing")
    versions.save(0, {})
    assert versions.load(before=1) == (0, {}, {}, sha256({}))
