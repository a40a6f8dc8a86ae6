"""Who may import whom, and the other rules about the tree that a program can check."""

import ast
import subprocess
import sys
from collections.abc import Iterable
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
    """Dotted names of everything a file imports, wherever in the file; `from a import b` counts as `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


IMPORTS = {module_of(path): imports_of(path) for path in FILES}


def reaching(module: str, forbidden: Iterable[str]) -> set[str]:
    """What a module imports of, or below, the forbidden ones."""
    return {name for name in IMPORTS[module] for top in forbidden if name == top or name.startswith(top + ".")}


def below(*packages: str) -> list[str]:
    return [name for name in IMPORTS if any(name == top or name.startswith(top + ".") for top in packages)]


def test_the_tree_is_where_it_is_looked_for() -> None:
    assert {"fedsim.algorithm", "fedsim.runtime.ray_runtime", "fedgrow_algo.ligo", "baselines.fedavg"} <= set(IMPORTS)
    assert "fedsim.seeding" in IMPORTS["fedsim.algorithm"]
    assert reaching("fedsim.runtime.ray_runtime", ["ray"])


@pytest.mark.parametrize("module", below("fedsim"))
def test_the_platform_knows_no_algorithm(module: str) -> None:
    assert not reaching(module, ["fedgrow_algo", "baselines", "benchmarks", "tests"])


@pytest.mark.parametrize("module", IMPORTS)
def test_ray_is_imported_under_runtime_only(module: str) -> None:
    if module == "fedsim.runtime.ray_runtime":
        assert reaching(module, ["ray"])
    elif not module.startswith(("fedsim.runtime.", "benchmarks.")):
        assert not reaching(module, ["ray"])


@pytest.mark.parametrize("module", below("fedsim.runtime"))
def test_runtimes_know_neither_algorithm_nor_participant(module: str) -> None:
    deciding = ["algorithm", "participant", "aggregator", "simulation", "experiment", "cohort", "task", "training"]
    assert not reaching(module, [f"fedsim.{name}" for name in [*deciding, "results", "store", "cli", "rows", "runner"]])
    others = {name for name in reaching(module, ["fedsim"]) if not name.startswith("fedsim.runtime")}
    others -= {name for name in others if name == "fedsim" or name.startswith("fedsim.numerics")}
    assert not others, "runtimes import nothing of fedsim but one another"


@pytest.mark.parametrize("module", below("fedsim.runtime"))
def test_the_inline_runtime_and_ray_do_not_know_each_other(module: str) -> None:
    if module == "fedsim.runtime.inline":
        assert not reaching(module, ["ray", "fedsim.runtime.ray_runtime", "fedsim.runtime.placement"])
    if module == "fedsim.runtime.ray_runtime":
        assert not reaching(module, ["fedsim.runtime.inline"])


@pytest.mark.parametrize("module", below("fedgrow_algo", "baselines"))
def test_algorithms_know_nothing_of_where_they_run(module: str) -> None:
    platform = ["runtime", "results", "store", "simulation", "aggregator", "participant", "experiment", "runner", "cli"]
    assert not reaching(
        module, ["ray", "benchmarks", *(f"fedsim.{name}" for name in [*platform, "rows", "checkpoint"])]
    )


@pytest.mark.parametrize("module", below("baselines"))
def test_baselines_do_not_know_each_other(module: str) -> None:
    assert not {name for name in reaching(module, ["baselines"]) if name != module}
    growth = reaching(module, ["fedgrow_algo"])
    operators = tuple(f"fedgrow_algo.{name}" for name in ("ligo", "presets", "dual_ligo", "pretrain"))
    assert all(name.startswith(operators) for name in growth - {"fedgrow_algo"}), "growth operators, no algorithm"


@pytest.mark.parametrize("module", ["fedgrow_algo.ligo", "fedgrow_algo.presets"])
def test_the_growth_operator_knows_named_axes_and_trees_only(module: str) -> None:
    own = {name for name in reaching(module, ["fedsim"]) if name.count(".") == 1}
    assert own <= {"fedsim.submodel", "fedsim.tree"}


@pytest.mark.parametrize(
    "module, allowed",
    [
        ("fedsim.tree", set()),
        ("fedsim.seeding", set()),
        ("fedsim.submodel", {"tree", "seeding"}),
        ("fedsim.algorithm", {"tree", "seeding", "task", "models", "data", "training", "pretrained"}),
        ("fedsim.task", {"data", "models", "tree", "submodel", "seeding", "fields", "entities", "masking"}),
        ("fedsim.training", {"algorithm", "task", "data", "models", "tree", "fields"}),
    ],
)
def test_inner_modules_import_inwards(module: str, allowed: set[str]) -> None:
    reached = {name.split(".")[1] for name in reaching(module, ["fedsim"]) if "." in name}
    assert reached <= allowed


@pytest.mark.parametrize("module", ["fedsim.participant", "fedsim.aggregator"])
def test_roles_know_the_seam_but_no_runtime(module: str) -> None:
    runtime = {name for name in reaching(module, ["fedsim.runtime"]) if name != "fedsim.runtime"}
    assert all(name.startswith("fedsim.runtime.base") for name in runtime)


def test_ray_stays_out_until_it_is_chosen() -> None:
    program = (
        "import sys, fedgrow_algo.fedgrow, baselines.fedavg, fedsim.commands, fedsim.simulation, benchmarks.suites; "
        "from fedsim.runtime import make_runtime; make_runtime('inline').close(); "
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
    assert lines <= 400
    if path.parent.name == "baselines":
        assert lines < 150
    if path.name == "inline.py":
        assert lines <= 80
    assert path.stem not in ("utils", "helpers", "common", "misc")
    if text.strip():
        assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_environment_variables_are_read_in_one_place(path: Path) -> None:
    names = {"environ", "environb", "getenv", "getenvb", "putenv"}
    for node in ast.walk(ast.parse(path.read_text())):
        reads = isinstance(node, ast.Attribute) and node.attr in names
        imported = isinstance(node, ast.ImportFrom) and any(alias.name in names for alias in node.names)
        assert not (reads or imported) or path.relative_to(ROOT) == Path("fedsim/environment.py")


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
            assert [ast.unparse(base) for base in node.bases] in ([], ["Algorithm"]), f"{node.name} is a subclass"
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
