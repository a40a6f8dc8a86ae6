"""Rates, fields and targets that methods of partial training refuse, by name."""

from typing import Any

import pytest

from baselines.fedbrb_like import FedBRBLike
from baselines.federated_dropout import FederatedDropout
from baselines.fedrolex import FedRolex
from baselines.fjord import FjORD
from baselines.heterofl import HeteroFL
from fedsim.learning.rates import sub_form
from fedsim.learning.task import Task
from fedsim.models import Form
from tests.support.family_rows import ROWS
from tests.support.sub_models import VIT


@pytest.mark.parametrize("method", [HeteroFL, FedRolex, FjORD, FederatedDropout, FedBRBLike])
@pytest.mark.parametrize("rates", [(), (0.5, 1.0), (1.0, 1.0, 0.5), (1.0, 0.0), (1.5, 1.0), (1.0, -0.5)])
def test_rates_out_of_order_or_range_are_refused(method: Any, rates: tuple[float, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"^algorithm\.rates=\(.*\): must be fractions of the target .*, largest first"
    ):
        method(rates=rates)


@pytest.mark.parametrize(
    "method, fields, text",
    [
        (FedRolex, {"step": 0}, r"algorithm\.step=0: must be a whole number other than 0"),
        (FederatedDropout, {"keep": 0.0}, r"algorithm\.keep=0\.0: must be above 0 and at most 1"),
        (FederatedDropout, {"keep": 1.5}, r"algorithm\.keep=1\.5: must be above 0 and at most 1"),
        (FedBRBLike, {"broadcast": 1.5}, r"algorithm\.broadcast=1\.5: must be at most 1"),
        (FedBRBLike, {"broadcast": -0.1}, r"algorithm\.broadcast=-0\.1: must be at least 0"),
        (FedBRBLike, {"decay": 0.0}, r"algorithm\.decay=0\.0: must be greater than 0"),
        (FedBRBLike, {"mode": "both"}, r"algorithm\.mode='both': must be one of 'parameters', 'changes'"),
        (HeteroFL, {"scaler": 1}, r"algorithm\.scaler=1: must be true or false"),
        (FjORD, {"rates": [1.0]}, r"algorithm\.rates=\[1\.0\]: must be a tuple"),
    ],
)
def test_bad_fields_are_refused_by_name(method: Any, fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}"):
        method(**fields)


@pytest.mark.parametrize("method", [HeteroFL, FedRolex, FjORD, FederatedDropout, FedBRBLike])
def test_a_rate_without_a_model_is_refused_with_the_rate_and_the_target(method: Any) -> None:
    """GPT-2's heads share the width among them: at 1/8, heads of 12 have 2 left, which is 8 in all, and 6 is wide."""
    task, target = ROWS["gpt2-lm"].task, ROWS["gpt2-lm"].larger
    text = (
        r"^the sub-model at rate 0\.125 of the target 48x3: form\.head_dim=2: must be form\.width / form\.heads = 6 / 4"
    )
    with pytest.raises(ValueError, match=text):
        method(rates=(1.0, 1 / 8)).check(task, [Form(16, 1, heads=2)], target, target)
    method(rates=(1.0, 1 / 4)).check(task, [Form(16, 1, heads=2)], target, target)


def test_a_share_that_everyone_keeps_is_checked() -> None:
    task, target = ROWS["gpt2-lm"].task, ROWS["gpt2-lm"].larger
    with pytest.raises(ValueError, match=r"^the sub-model at rate 0\.125 of the target 48x3: form\.head_dim=2"):
        FederatedDropout(keep=1 / 8).check(task, [target], target, target)


def test_ordered_dropout_needs_every_rate_up_to_the_largest() -> None:
    """A participant that holds the half trains the eighth too."""
    task, target = ROWS["gpt2-lm"].task, ROWS["gpt2-lm"].larger
    half = sub_form(task, target, 1 / 2)
    algorithm = FjORD(rates=(1.0, 1 / 2, 1 / 8))
    with pytest.raises(ValueError, match=r"^the sub-model at rate 0\.125 of the target 48x3"):
        algorithm.check(task, [half], target, target)
    HeteroFL(rates=algorithm.rates).check(task, [half], target, target)
    algorithm.check(task, [], target, target)


@pytest.mark.parametrize(
    "target, rate, text",
    [
        (
            Form(48, 1, heads=2, mlp=50),
            1 / 4,
            "0.25: must be rates 1/n whose n divides axis 'mlp', 50 in the target 48x1",
        ),
        (
            Form(48, 1, heads=4, mlp=48),
            1 / 8,
            "0.125: must be rates 1/n whose n divides axis 'head_dim', 12 in the target",
        ),
        (Form(30, 1, heads=2, mlp=32), 1 / 4, "0.25: must be rates 1/n whose n divides axis 'embed', 30 in the target"),
        (
            Form(40, 1, heads=2, mlp=40),
            0.4,
            "0.4: must be rates 1/n whose n divides axis 'embed', 40 in the target 40x1",
        ),
    ],
)
def test_blocks_must_divide_every_axis(target: Form, rate: float, text: str) -> None:
    task = Task(VIT)
    with pytest.raises(ValueError, match=f"^algorithm.rates={text}"):
        FedBRBLike(rates=(1.0, rate)).check(task, [Form(8, 1, heads=2)], target, target)
    FedBRBLike(rates=(1.0, rate)).check(task, [target], target, target)  # nobody is at the rate that will not do


def test_thirds_are_blocks_though_no_float_is_a_third() -> None:
    FedBRBLike(rates=(1 / 3, 1 / 49)).check(
        Task(VIT), [Form(8, 1, heads=2)], Form(147, 1, heads=1), Form(147, 1, heads=1)
    )
