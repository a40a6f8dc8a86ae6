"""2,000 wrong requests: each is answered with a status, the field's name, and no traceback, before anything starts."""

from collections.abc import Iterator

import hypothesis
import pytest

from fedsim.experiment import Experiment
from tests.fuzz.answers import answer, before_anything_starts, fault
from tests.fuzz.requests import Request, requests, workspace


@pytest.fixture(scope="module", autouse=True)
def _workspace(tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("requests") / "here"
    folder.mkdir()
    workspace(folder, tiny_experiment)
    with pytest.MonkeyPatch.context() as patched, before_anything_starts():
        patched.chdir(folder)
        patched.setenv("HOME", str(folder / "home"))
        yield


@hypothesis.settings(
    max_examples=2000,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(requests())
def test_a_wrong_request_is_answered(request: Request) -> None:
    given = answer(request)
    assert fault(request, given) is None, given.said
