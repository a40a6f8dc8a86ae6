"""The weights of an encoder that was exported to ONNX, under the names they had in torch."""

import importlib
from pathlib import Path
from typing import Any

import torch

from fedsim.core.tree import Tree


def reader() -> Any:
    """The package `onnx`. **Raises:** `ValueError` if it is not installed."""
    try:
        return importlib.import_module("onnx")
    except ImportError as error:
        raise ValueError(
            "the weights are an ONNX file, which the package onnx reads: pip install 'fedsim[models]'"
        ) from error


def weights_of(path: Path, prefix: str) -> Tree:
    """The initialisers of a graph whose names begin with `prefix`, without it.

    An export keeps the names of biases, embeddings and normalisations, but folds the transposition of a linear layer's
    weight into an anonymous initialiser, `(in, out)`. That one belongs to the bias which is added to its product.

    **Raises:** `ValueError` for a product with an anonymous initialiser to which no named bias is added.
    """
    onnx = reader()
    graph = onnx.load(str(path)).graph
    held = {each.name: each for each in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(onnx.numpy_helper.to_array(held[name]).copy())

    found = {name.removeprefix(prefix): tensor(name) for name in held if name.startswith(prefix)}
    for node in graph.node:
        anonymous = [name for name in node.input if name in held and not name.startswith(prefix)]
        if node.op_type != "MatMul" or not anonymous:
            continue
        added = [name for add in readers.get(node.output[0], ()) if add.op_type == "Add" for name in add.input]
        biases = [name for name in added if name.startswith(prefix) and name.endswith(".bias")]
        if len(biases) != 1 or anonymous != [node.input[1]]:
            raise ValueError(
                f"{path.name}: {node.name!r} multiplies with {anonymous[0]!r}, to which no one bias is added"
            )
        found[f"{biases[0].removeprefix(prefix).removesuffix('.bias')}.weight"] = tensor(anonymous[0]).T.contiguous()
    return found
