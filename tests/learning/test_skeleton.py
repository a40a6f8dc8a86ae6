"""Running a module with other parameters: what `torch.func.functional_call` gives, and the module as it was."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedsim.learning.skeleton import called_with


class Tied(nn.Module):
    """One matrix in two places, as in a language model's embeddings and head, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3, bias=False)
        self.outer = nn.Linear(3, 3)
        self.outer.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        if x.isnan().any():
            raise ArithmeticError("not a number")
        return self.outer(torch.tanh(self.inner(x)))


@pytest.fixture
def module() -> Tied:
    return Tied().requires_grad_(False)


@pytest.fixture
def tree(module: Tied) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    return {name: torch.randn(shape, generator=random).requires_grad_() for name, shape in shapes.items()}


def test_values_and_gradients_are_those_of_torchs_own_way(module: Tied, tree: dict[str, Tensor]) -> None:
    x = torch.arange(6.0).reshape(2, 3) / 3
    assert [*tree] == ["inner.weight", "outer.bias"]  # the tied one is in both places
    ways = [called_with(module, tree, {"x": x}), functional_call(module, tree, kwargs={"x": x})]
    assert torch.equal(*ways)
    assert not torch.equal(ways[0], module(x))
    for ours, torchs in zip(*(torch.autograd.grad(way.sum(), [*tree.values()]) for way in ways), strict=True):
        assert torch.equal(ours, torchs)
        assert ours.any()


def test_the_module_is_as_it_was_also_after_an_error(module: Tied, tree: dict[str, Tensor]) -> None:
    own = {name: (parameter, parameter.clone()) for name, parameter in module.named_parameters()}
    called_with(module, tree, {"x": torch.ones(3)})
    with pytest.raises(ArithmeticError):
        called_with(module, tree, {"x": torch.full((3,), torch.nan)})
    for name, parameter in module.named_parameters():
        assert parameter is own[name][0]
        assert torch.equal(*own[name])
    assert module.outer.weight is module.inner.weight


def test_parameters_that_are_not_named_stay_the_modules_own(module: Tied, tree: dict[str, Tensor]) -> None:
    some, x = {"outer.bias": tree["outer.bias"]}, torch.ones(3)
    assert torch.equal(called_with(module, some, {"x": x}), functional_call(module, some, kwargs={"x": x}))


def test_a_name_that_the_module_does_not_have_is_an_error(module: Tied, tree: dict[str, Tensor]) -> None:
    with pytest.raises(KeyError, match=r"outer\.other"):
        called_with(module, tree | {"outer.other": torch.ones(3)}, {"x": torch.ones(3)})
