"""Who may import whom, and the other rules about the tree that a program can check."""

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fedsim", "fedgrow_algo", "baselines", "benchmarks")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def module_of(path: Path) -> str:
    """`fedsim/data/__init__.py` -> `fedsim.data`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Dotted names of everything a file imports, wherever in the file, for type checkers alone or through `importlib`;
    `from a import b` counts as `a.b` if that is a module of ours, else as `a`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in inner}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return names


MODULES = {module_of(path) for path in FILES}
IMPORTS = {module_of(path): imports_of(path) for path in FILES}

# Room -> the rooms it may import from, besides itself. A room of `fedsim` is a folder, or a file of the top level.
CORE = "core"
LEARNED = f"{CORE} data models learning"
ROOMS = {
    "core": "",
    "storage": CORE,
    "data": CORE,
    "models": f"{CORE} data",
    "learning": f"{CORE} data models",
    "contexts": LEARNED,
    "algorithm": f"{LEARNED} contexts",
    "devices": CORE,
    "experiment": f"{LEARNED} algorithm devices",
    "runtime": CORE,
    "engine": f"{LEARNED} algorithm devices experiment storage runtime.base",
    "results": f"{LEARNED} algorithm experiment storage runtime.base engine",
    "simulation": f"{LEARNED} experiment storage runtime.base engine results",
    "testing": f"{LEARNED} algorithm",
    "privacy": f"{LEARNED} algorithm experiment storage runtime.base engine results",
    "cluster": f"{CORE} experiment storage runtime engine results",
    "report": f"{CORE} experiment storage results",
    "sweeps": f"{LEARNED} devices experiment storage runtime engine results simulation cluster",
    "cli": f"{LEARNED} devices experiment storage runtime engine results simulation cluster report sweeps privacy",
    "__init__": "core data models learning.task experiment storage results report sweeps",  # what a notebook needs
    "__main__": "cli core",
    "fedgrow_algo": f"{LEARNED} algorithm",
    "baselines": f"{LEARNED} algorithm fedgrow_algo",
    "benchmarks": "fedsim fedgrow_algo baselines",
}


def room_of(module: str) -> str:
    """`fedsim.engine.cost` -> `engine`, `fedsim` -> `__init__`, `baselines.fedavg` -> `baselines`."""
    package, _, rest = module.partition(".")
    return package if package != "fedsim" else (rest or "__init__").partition(".")[0]


def reaching(module: str, forbidden: Iterable[str]) -> set[str]:
    """What a module imports of, or below, the forbidden ones."""
    return {name for name in IMPORTS[module] for top in forbidden if name == top or name.startswith(top + ".")}


def below(*packages: str) -> list[str]:
    return [name for name in IMPORTS if any(name == top or name.startswith(top + ".") for top in packages)]


def test_every_room_has_a_row_and_every_row_a_room() -> None:
    assert {room_of(module) for module in IMPORTS} == ROOMS.keys()


@pytest.mark.parametrize("module", IMPORTS)
def test_rooms_import_one_way(module: str) -> None:
    allowed = ROOMS[room_of(module)].split()
    for name in reaching(module, PACKAGES):
        inner = name.removeprefix("fedsim.")
        same = room_of(name) == room_of(module)
        names = [f"{spelling}." for spelling in (name, inner)]
        assert same or any(each.startswith(f"{allow}.") for each in names for allow in allowed), f"imports {name}"


def test_imports_are_seen_wherever_they_are(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden.py"
    hidden.write_text(
        "import importlib\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fedsim.engine import cost\n"
        "def later():\n    import ray\n    importlib.import_module('benchmarks.suites')\n"
    )
    assert imports_of(hidden) >= {"fedsim.engine.cost", "ray", "benchmarks.suites"}


@pytest.mark.parametrize("module", IMPORTS)
def test_ray_is_imported_by_runtime_and_cluster_only(module: str) -> None:
    if module == "fedsim.runtime.ray_runtime":
        assert reaching(module, ["ray"])
    elif room_of(module) not in ("runtime", "cluster", "benchmarks"):
        assert not reaching(module, ["ray"])


def test_the_inline_runtime_and_ray_do_not_know_each_other() -> None:
    assert not reaching("fedsim.runtime.inline", ["ray", "fedsim.runtime.ray_runtime", "fedsim.runtime.placement"])
    assert not reaching("fedsim.runtime.ray_runtime", ["fedsim.runtime.inline"])


COMMON = ("baselines.sub_models", "baselines.private_models")  # what some have in common


@pytest.mark.parametrize("module", below("baselines"))
def test_baselines_do_not_know_each_other(module: str) -> None:
    assert {*reaching(module, ["baselines"])} <= {module, *COMMON}
    operators = tuple(f"fedgrow_algo.{name}" for name in ("ligo", "low_rank", "presets", "dual_ligo", "pretrain"))
    growth = reaching(module, ["fedgrow_algo"])
    assert all(name.startswith(operators) for name in growth), "growth operators, no algorithm"


@pytest.mark.parametrize(
    "module", ["fedgrow_algo.ligo", "fedgrow_algo.sizes", "fedgrow_algo.low_rank", "fedgrow_algo.presets"]
)
def test_the_growth_operator_knows_named_axes_and_trees_only(module: str) -> None:
    assert reaching(module, ["fedsim"]) <= {"fedsim.core.submodel", "fedsim.core.tree"}


def test_modules_of_one_room_import_without_a_circle() -> None:
    TopologicalSorter({name: reaching(name, PACKAGES) - {name} for name in IMPORTS}).prepare()


def test_ray_stays_out_until_it_is_chosen() -> None:
    program = (
        "import sys, fedgrow_algo.fedgrow, baselines.fedavg, fedsim.cli.commands, fedsim.simulation; "
        "import benchmarks.suites; "
        "from fedsim.runtime import Choice; Choice('inline')().close(); "
        "sys.exit('ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


# the tree -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*FILES, *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_decorated_as_an_actor(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        for decorator in getattr(node, "decorator_list", []):
            assert not ast.unparse(decorator).startswith(("ray.remote", "remote"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_short_and_say_what_they_are(path: Path) -> None:
    text = path.read_text()
    lines = len(text.splitlines())
    assert lines <= 350
    if path.parent.name == "baselines":
        assert lines < 150
    if path.name == "inline.py":
        assert lines <= 80
    assert path.stem not in ("utils", "helpers", "common", "misc")
    if text.strip():
        assert ast.get_docstring(ast.parse(text))


def test_test_files_are_short() -> None:
    assert {str(path.relative_to(ROOT)) for path in TESTS if len(path.read_text().splitlines()) > 500} == set()


# The second hands a worker, whole, what Ray started it with, and imports nothing of fedsim before it does.
READ_ENVIRONMENT = (Path("fedsim/core/environment.py"), Path("fedsim/runtime/forks.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_environment_variables_are_read_in_one_place(path: Path) -> None:
    names = {"environ", "environb", "getenv", "getenvb", "putenv"}
    for node in ast.walk(ast.parse(path.read_text())):
        reads = isinstance(node, ast.Attribute) and node.attr in names
        imported = isinstance(node, ast.ImportFrom) and any(alias.name in names for alias in node.names)
        assert not (reads or imported) or path.relative_to(ROOT) in READ_ENVIRONMENT


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_changes_what_its_module_holds(path: Path) -> None:
    assert not any(isinstance(node, ast.Global) for node in ast.walk(ast.parse(path.read_text())))


def is_frozen_dataclass(node: ast.ClassDef) -> bool:
    return any(
        ast.unparse(decorator).replace(" ", "") in ("dataclasses.dataclass(frozen=True)", "dataclass(frozen=True)")
        for decorator in node.decorator_list
    )


@pytest.mark.parametrize("module", below("fedgrow_algo", "baselines"))
def test_algorithms_are_frozen_and_set_nothing_on_themselves(module: str) -> None:
    path = ROOT / (module.replace(".", "/") + ".py")
    if not path.exists():
        path = ROOT / module.replace(".", "/") / "__init__.py"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            assert is_frozen_dataclass(node), node.name
            bases = [ast.unparse(base) for base in node.bases]
            abstract = ([], ["Algorithm"], ["LocalTraining"], ["Averaging"], ["Start"], ["Sizes"])
            shared = (["SubModels"], ["PrivateModels"], ["Prototypes"])  # what some baselines have in common
            variants = (["FedGrow"], ["FedGrowJoint"])  # of the project's own: Fed-Grow but for what they say
            assert bases in abstract + shared + variants, node.name
            for inner in ast.walk(node):
                targets = getattr(inner, "targets", [getattr(inner, "target", None)])
                assert not any(
                    isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self" for target in targets
                )


def test_the_platform_never_asks_which_algorithm_it_runs() -> None:
    for path in (ROOT / "fedsim").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "hasattr"):
                subject = ast.unparse(node.args[0])
                assert not subject.endswith(("algorithm", "runtime")), f"{path}: {ast.unparse(node)}"
            if isinstance(node, ast.Compare):
                assert not ast.unparse(node.left).endswith("algorithm.name"), f"{path}: {ast.unparse(node)}"


def test_no_other_distribution_has_packages_of_our_names() -> None:
    """Opacus 1.6 has: it brings a package `benchmarks`, and site-packages come before a checkout."""
    brought = importlib.metadata.packages_distributions()
    assert {name: {*brought.get(name, ["fedsim"])} for name in PACKAGES} == {name: {"fedsim"} for name in PACKAGES}
