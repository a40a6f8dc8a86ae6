"""Workers of a private Ray are forked from a process that has imported what they need, and nothing else."""

import json
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from fedsim.runtime import forks


ROOT = Path(__file__).resolve().parents[2]
NEEDLESS = (
    "ray",
    "transformers",
    "pandas",
    "rich",
    "jinja2",
    "matplotlib",
    "datasets",
    "sklearn",
    "scipy",
    "torchvision",
)


def said_by(program: str) -> str:
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_nothing_is_imported_that_a_host_without_models_does_not_use() -> None:
    program = (
        f"import importlib, sys; [importlib.import_module(name) for name in {forks.MODULES}]; "
        f"print([name for name in {NEEDLESS} if name in sys.modules], 'torch' in sys.modules)"
    )
    assert said_by(program) == "[] True\n"


def test_a_host_itself_adds_ray_alone() -> None:
    program = (
        f"import sys, fedsim.simulation, fedsim.runtime.actors; "
        f"print([name for name in {NEEDLESS} if name in sys.modules])"
    )
    assert said_by(program) == "['ray']\n"


def test_asking_for_a_fork_imports_nothing_slow() -> None:
    program = "import sys; from fedsim.runtime import forks; print('ray' in sys.modules or 'numpy' in sys.modules)"
    assert said_by(program) == "False\n"


@pytest.mark.parametrize(
    "module, told",
    [
        ("fedsim.models.vit", True),
        ("transformers.models.vit.modeling_vit", True),
        ("fedsim.simulation", False),
        ("transformers", False),
    ],
)
def test_models_that_the_driver_imports_are_told(module: str, told: bool) -> None:
    name = uuid.uuid4().hex
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"\0{name}")
        listening.listen()
        listening.setblocking(False)
        forks.Mirror(name).find_spec(module)
        if not told:
            with pytest.raises(BlockingIOError):
                listening.accept()
            return
        connection, _ = listening.accept()
        with connection:
            assert json.loads(connection.makefile("rb").read()) == {"module": module}


def test_where_nobody_listens_nothing_is_told() -> None:
    forks.Mirror(uuid.uuid4().hex).find_spec("fedsim.models.vit")


WORKERS = """
import os, sys, time
import psutil
from fedsim.runtime import forks, private_ray

def look():
    import os, sys
    import numpy
    import psutil
    forked = any(word.endswith("forks.py") for word in psutil.Process().parent().cmdline())
    loaded, group = "fedsim.simulation" in sys.modules, os.getpgid(0) == os.getpid()
    return forked, loaded, group, os.nice(0), os.environ["RAY_JOB_ID"], int(numpy.random.randint(2**31)), os.getpid()

if __name__ == "__main__":
    private_ray.connect_private(2, 0)
    import ray
    asked = ray.remote(max_calls=1)(look)
    first, second = ray.get([asked.remote(), asked.remote()])
    (server,) = [p for p in psutil.Process().children() if any(word.endswith("forks.py") for word in p.cmdline())]
    server.kill()
    server.wait()
    others = (ray.get(asked.remote()) for _ in range(20))  # the first may have been forked before
    third = next(found for found in others if not found[1])
    private_ray.end_private()
    left = [type(finder).__name__ for finder in sys.meta_path if isinstance(finder, forks.Mirror)]
    print(first[:5] == second[:5], first[:3], third[:3], first[3:5] == third[3:5], first[5] != second[5], left)
"""


@pytest.mark.slow
def test_a_worker_is_the_one_that_ray_would_have_started() -> None:
    """Its priority, its group and its variables are those of one that is started where nobody can be forked."""
    found = said_by(WORKERS)
    assert found == "True (True, True, True) (False, False, True) True True []\n"
