"""What a process may have of its machine, read from made-up control groups."""

import resource
from pathlib import Path

import psutil
import pytest

from fedsim.core.limits import limits, memory_bytes, memory_free


TOTAL = psutil.virtual_memory().total
MB = 2**20


def groups(folder: Path, own: str, **files: str) -> dict[str, Path]:
    """A folder of control groups, and what a process is told of those it is in. `__` in a name stands for `/`."""
    (folder / "own").write_text(own)
    for name, text in files.items():
        path = folder / "cgroup" / name.replace("__", "/").replace("_max", ".max").replace("_current", ".current")
        path = path.with_name(path.name.replace("limit_in", "memory.limit_in").replace("usage_in", "memory.usage_in"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return {"cgroups": folder / "cgroup", "own": folder / "own"}


@pytest.mark.parametrize(
    "own, files, expected",
    [
        ("0::/\n", {"memory_max": str(600 * MB)}, 600 * MB),
        ("0::/\n", {"memory_max": "max"}, TOTAL),
        ("0::/\n", {"memory_max": str(2 * TOTAL)}, TOTAL),
        ("0::/\n", {}, TOTAL),
        ("", {"memory_max": str(600 * MB)}, TOTAL),
        ("0::/a/b\n", {"a__memory_max": str(700 * MB), "a__b__memory_max": "max"}, 700 * MB),
        ("0::/a/b\n", {"a__memory_max": str(700 * MB), "a__b__memory_max": str(500 * MB)}, 500 * MB),
        ("0::/../../a\n", {"a__memory_max": str(400 * MB)}, 400 * MB),
        ("4:memory:/docker/x\n0::/\n", {"memory__limit_in_bytes": str(300 * MB)}, 300 * MB),
        ("4:cpu,memory:/x\n", {"memory__x__limit_in_bytes": str(200 * MB)}, 200 * MB),
        ("4:memory:/x\n", {"memory__x__limit_in_bytes": "9223372036854771712"}, TOTAL),
        ("4:cpu:/x\n", {"memory__x__limit_in_bytes": str(200 * MB)}, TOTAL),
    ],
)
def test_memory_is_the_least_that_any_group_around_a_process_may_have(tmp_path, own, files, expected) -> None:
    assert memory_bytes(**groups(tmp_path, own, **files)) == expected


def test_what_is_free_is_what_nobody_of_the_group_uses(tmp_path) -> None:
    made = groups(tmp_path, "0::/\n", memory_max=str(600 * MB), memory_current=str(500 * MB))
    assert memory_free(**made) == 100 * MB
    made = groups(tmp_path, "0::/\n", memory_max=str(600 * MB), memory_current=str(700 * MB))
    assert memory_free(**made) == 0


def test_limits_are_named_with_what_they_are(tmp_path, monkeypatch) -> None:
    made = groups(tmp_path, "0::/\n")
    soft = {resource.RLIMIT_AS: 6 * 2**30, resource.RLIMIT_NPROC: 100, resource.RLIMIT_NOFILE: 10**6}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft[which], resource.RLIM_INFINITY))
    hard, tight = limits(**made)
    assert hard == ["processes and threads (ulimit -u): 100"]
    assert tight == ["memory that a process may address (ulimit -v): 6,144 MB"]
    soft = dict.fromkeys(soft, resource.RLIM_INFINITY)
    assert limits(**made) == ([], [])
    assert limits(**groups(tmp_path, "0::/\n", memory_max=str(512 * MB)))[0] == [
        "memory of this container (cgroup): 512 MB"
    ]
