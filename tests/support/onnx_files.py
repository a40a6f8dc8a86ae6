"""An encoder as torch's exporter writes it to ONNX, made by hand."""

import importlib
from typing import Any

from torch import nn


def onnx_of(model: nn.Module, prefix: str) -> bytes:
    """Linear weights transposed and without names, their biases on either side of the sum; no pooler."""
    onnx: Any = importlib.import_module("onnx")
    array = onnx.numpy_helper.from_array
    held, nodes, last = [], [], "input"
    for number, (name, module) in enumerate(model.named_modules()):
        own = {key: tensor.detach().numpy() for key, tensor in module.named_parameters(recurse=False)}
        if name.startswith("pooler"):
            continue
        if not isinstance(module, nn.Linear):
            held += [array(value, f"{prefix}{name}.{key}") for key, value in own.items()]
            continue
        weight, bias, product = f"onnx::MatMul_{number}", f"{prefix}{name}.bias", f"{number}.product"
        held += [array(own["weight"].T.copy(), weight), array(own["bias"], bias)]
        nodes.append(onnx.helper.make_node("MatMul", [last, weight], [product], name=name))
        last = f"{number}.sum"
        nodes.append(onnx.helper.make_node("Add", [bias, product] if number % 2 else [product, bias], [last]))
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "encoder", [], [], held)).SerializeToString()
