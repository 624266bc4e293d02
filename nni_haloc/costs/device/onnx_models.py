"""ONNX models of layers and of a network, with random weights, for `OnnxRuntime` to time."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nni_haloc.costs.device.spec import Entry, Specification
from nni_haloc.costs.device.torch_runtime import layer_spec
from nni_haloc.space.layers import LayerSpec
from nni_haloc.space.modules import copy_of
from nni_haloc.utils.errors import needs

with needs("onnx", what="ONNX models of layers", install="nni-haloc[onnx]"):
    import onnx
    from onnx import TensorProto, helper

_OPSET = 20
_SHAPE = "/shape"
"""Ending of the name of a constant's shape."""
_SCOPES = "pkg.torch.onnx.name_scopes"
"""Key under which torch's exporter notes a node's modules, as the text of a Python list."""


def with_onnx(spec: Specification, model: nn.Module) -> Specification:
    """Return the specification with ONNX models of every entry and of the network.

    Raises:
        MissingPackage: if ONNX Script is not installed, which torch's exporter needs.
        ValueError: if a layer has no ONNX form here, or is not found in the network's model.
    """
    entries = tuple(replace(e, onnx=_entry(e)) for e in spec.entries)
    x = torch.randn(spec.input)
    exporting = needs("onnxscript", what="export to ONNX", install="nni-haloc[onnx]")
    with exporting, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Not optimised, because batch normalisation would be folded into convolutions that are to
        # be replaced; ONNX Runtime folds it itself.
        exported = torch.onnx.export(
            copy_of(model).eval(),
            (x,),
            dynamo=True,
            verbose=False,
            optimize=False,
            opset_version=_OPSET,
        )
    assert exported is not None
    network = exported.model_proto
    for layer in spec.layers:
        _nodes_of(network, layer)
    _without_made_biases(
        network,
        [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.bias is None],
    )
    return replace(spec, entries=entries, onnx=_weightless(network).SerializeToString())


def with_layers(spec: Specification, choice: Mapping[str, str]) -> bytes:
    """Return the network's ONNX model with the candidates of ``choice`` in it."""
    network = onnx.load_from_string(spec.onnx or b"")
    for layer, candidate in choice.items():
        entry = spec.entries[spec.layers[layer][candidate]]
        for call, node in enumerate(_nodes_of(network, layer) if entry.rank is not None else []):
            at = list(network.graph.node).index(node)
            new = _nodes(
                layer_spec(layer, entry.layer),
                entry.rank,
                node.input[0],
                node.output[0],
                f"{layer}/{call}/",
            )
            network.graph.node.remove(node)
            for offset, added in enumerate(new):
                network.graph.node.insert(at + offset, added)
    return network.SerializeToString()


def with_initializers(model: bytes) -> Any:
    """Return an `onnx.ModelProto` whose constants are initializers, computed where need be.

    Programs such as nn-Meter look for weights there, and take every node for work.
    """
    from onnx import numpy_helper
    from onnx.reference import ReferenceEvaluator

    result = onnx.load_from_string(model)
    graph = result.graph
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in list(graph.node):
        drawn = node.op_type.startswith("Random") or node.op_type == "Bernoulli"
        if not drawn and all(name in known for name in node.input):
            inputs = {name: known[name] for name in node.input}
            values = ReferenceEvaluator(node).run(None, inputs)
            known |= dict(zip(node.output, values, strict=True))
            graph.node.remove(node)
    used = _used(graph)
    del graph.initializer[:]
    graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in known.items() if name in used
    )
    return result


def _entry(entry: Entry) -> bytes:
    layer = layer_spec("", entry.layer)
    nodes, inputs, outputs = [], [], []
    for i, shape in enumerate(layer.input_shapes):
        nodes += _nodes(layer, entry.rank, f"x{i}", f"y{i}", f"{i}/")
        inputs.append(helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, shape))
        outputs.append(
            helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, layer.output_shape(shape))
        )
    graph = helper.make_graph(nodes, "layer", inputs, outputs)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=10
    ).SerializeToString()


def _nodes(
    layer: LayerSpec, rank: tuple[int, ...] | None, x: str, y: str, prefix: str
) -> list[Any]:
    """Make the nodes of a layer at a rank, from tensor ``x`` to ``y``.

    The weights are constant nodes, so that the model stays small. Nodes have names and convolutions
    all their attributes: not every program fills in what the standard leaves out.
    """
    if layer.padding_mode != "zeros":
        raise ValueError(
            f"layer {layer.name!r}: padding mode {layer.padding_mode!r} has no ONNX form here"
        )
    built = layer.build(rank)
    parts = list(built.children()) if rank is not None else [built]
    nodes: list[Any] = []
    for i, part in enumerate(parts):
        source = x if i == 0 else f"{prefix}t{i}"
        target = y if i == len(parts) - 1 else f"{prefix}t{i + 1}"
        assert isinstance(part, (nn.Conv2d, nn.Linear))
        names = [source]
        # One node, as torch's exporter writes it; a linear layer of more dimensions needs two.
        whole = isinstance(part, nn.Conv2d) or all(len(shape) == 2 for shape in layer.input_shapes)
        for key, value in (("weight", part.weight), ("bias", part.bias)):
            if value is not None:
                shape = value.T.shape if key == "weight" and not whole else value.shape
                nodes += _constant(f"{prefix}{i}.{key}", list(shape))
                names.append(f"{prefix}{i}.{key}")
        name = f"{prefix}{i}"
        if isinstance(part, nn.Conv2d):
            nodes.append(helper.make_node("Conv", names, [target], name, **_attributes(part)))
        elif whole:
            nodes.append(helper.make_node("Gemm", names, [target], name, transB=1))
        elif part.bias is None:
            nodes.append(helper.make_node("MatMul", names, [target], name))
        else:
            product = f"{name}.product"
            nodes.append(helper.make_node("MatMul", names[:2], [product], name))
            nodes.append(helper.make_node("Add", [product, names[2]], [target], f"{name}.add"))
    return nodes


def _attributes(conv: nn.Conv2d) -> dict[str, Any]:
    (top, bottom), (left, right) = LayerSpec.of("", conv).padded
    return {
        "kernel_shape": list(conv.kernel_size),
        "group": conv.groups,
        "strides": list(conv.stride),
        "dilations": list(conv.dilation),
        "pads": [top, left, bottom, right],
    }


def _constant(name: str, shape: list[int], value: float = 0.01) -> list[Any]:
    """Make a tensor of one value; ONNX Runtime turns it into a weight when it loads the model."""
    given = helper.make_tensor("", TensorProto.INT64, [len(shape)], shape)
    filled = helper.make_tensor("", TensorProto.FLOAT, [1], [value])
    return [
        helper.make_node("Constant", [], [name + _SHAPE], name + _SHAPE, value=given),
        helper.make_node("ConstantOfShape", [name + _SHAPE], [name], name, value=filled),
    ]


def _weightless(network: Any) -> Any:
    """Replace float weights by constant nodes and drop the exporter's notes: a small file."""
    kept, nodes = [], []
    for tensor in network.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims):
            nodes += _constant(tensor.name, list(tensor.dims))
        else:
            kept.append(tensor)
    names = {name for node in nodes for name in node.output}
    del network.graph.initializer[:]
    network.graph.initializer.extend(kept)
    values = [v for v in network.graph.value_info if v.name not in names]
    del network.graph.value_info[:]
    network.graph.value_info.extend(values)
    for node in network.graph.node:
        scopes = [p for p in node.metadata_props if p.key == _SCOPES]
        del node.metadata_props[:]
        node.metadata_props.extend(scopes)
    for i, node in enumerate(nodes):
        network.graph.node.insert(i, node)
    return network


def _without_made_biases(network: Any, layers: Collection[str]) -> None:
    """Take off the zero biases that the exporter adds to convolutions without bias.

    They are computed at run time, which keeps ONNX Runtime from folding the batch normalisation
    that follows.
    """
    for node in network.graph.node:
        if node.op_type == "Conv" and len(node.input) == 3 and set(layers) & set(_scopes(node)):
            del node.input[2]
    before = None
    while before != len(network.graph.node):  # also drop nodes whose results nobody uses any more
        before = len(network.graph.node)
        used = _used(network.graph)
        for node in [node for node in network.graph.node if not used & set(node.output)]:
            network.graph.node.remove(node)


def _used(graph: Any) -> set[str]:
    """Return the names of the tensors that a graph's nodes take, or that are its outputs."""
    within = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    inputs = {name for node in graph.node for name in node.input}
    return inputs.union({value.name for value in graph.output}, *map(_used, within))


def _nodes_of(network: Any, layer: str) -> list[Any]:
    """Return the nodes that the calls of a layer have become; ValueError if there is none."""
    nodes = [
        n
        for n in network.graph.node
        if n.op_type in ("Conv", "Gemm", "MatMul") and layer in _scopes(n)
    ]
    if not nodes:
        raise ValueError(f"layer {layer!r}: not found in the ONNX model")
    return nodes


def _scopes(node: Any) -> list[str]:
    import ast

    text = next((p.value for p in node.metadata_props if p.key == _SCOPES), "[]")
    return list(ast.literal_eval(text))
