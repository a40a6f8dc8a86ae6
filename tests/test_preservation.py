"""What growth does to a trained model before any further training."""

import pytest

from benchmarks.preservation import measured
from fedsim.models import Form


@pytest.fixture(scope="module")
def rows():
    return {row["preset"]: row for row in measured(Form(32, 2), epochs=6)}


def test_the_small_model_has_learned_something_to_preserve(rows):
    assert rows["preserving"]["accuracy_small"] > 0.8


def test_preserving_keeps_the_small_models_accuracy_within_a_point(rows):
    row = rows["preserving"]
    assert abs(row["accuracy_intermediate"] - row["accuracy_small"]) < 0.01
    assert abs(row["accuracy_target"] - row["accuracy_small"]) < 0.01
    assert row["largest_change_of_a_logit"] < 1e-3


def test_paper_starts_near_chance(rows):
    assert rows["paper"]["accuracy_target"] < 0.25, "chance is 0.10"
    assert rows["paper"]["largest_change_of_a_logit"] > 1
