"""A traced model as an ONNX graph: tensors, their shapes, and nodes as they are added.

raybert writes graphs itself, because what they look like decides how fast ONNX Runtime is. Three
things matter on a CPU, beside leaving out what computes nothing:

- Tokens are rows. Between attention blocks hidden states are [batch * length, H], so that a linear
  layer is one ``Gemm`` with its bias, and ONNX Runtime does not fuse residuals and norms into
  ``SkipLayerNormalization``, whose scalar loop costs four times what it replaces.
- Attention is one ``Attention`` node (opset 23) on [B, T, H]: nothing is transposed.
- A reshaped tensor is the same tensor under another shape: it costs a node only where an operator
  asks for the other shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.fx import Node

OPSET = 23
"""The first with ``Attention``; ONNX Runtime has it on the CPU since 1.23."""

CONTRIB = "com.microsoft"
"""The domain of operators that every build of ONNX Runtime has and ONNX does not."""

TYPES: dict[torch.dtype, int] = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}

Dims = tuple[int | str, ...]
"""A shape: numbers, and symbols for what a batch decides; -1 for all that is left."""


def dims_of(value: Any) -> Dims:
    """The shape of a traced tensor."""
    return tuple(size if isinstance(size, int) else str(size) for size in value.shape)


class Graph:
    """Nodes and weights in order, and which name holds which shape of which tensor.

    Args:
        axes: symbol -> the axis of ``input_ids`` that it is the size of.
    """

    def __init__(self, axes: dict[str, int]) -> None:
        self.axes = axes
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, TensorProto] = {}
        self._shapes: dict[str, Dims] = {}
        self._made: dict[Any, str] = {}
        self._constants: dict[Any, str] = {}
        self._number = 0

    # -- nodes and weights ---------------------------------------------------------------------

    def add(self, op: str, inputs: Sequence[str], *, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node.

        Args:
            op: the operator, with its domain and a dot before it where it is not ONNX's own.
            inputs: names; empty for one that is left out.
            outputs: how many.

        Returns:
            The output's name, or a list of them when there are more.
        """
        domain, _, kind = op.rpartition(".")
        number = self._number
        self._number += 1
        names = [f"{kind}_{number}" + (f"_{i}" if outputs > 1 else "") for i in range(outputs)]
        node = helper.make_node(
            kind, list(inputs), names, name=f"{kind}_{number}", domain=domain, **attributes
        )
        self.nodes.append(node)
        return names if outputs > 1 else names[0]

    def weight(self, name: str, array: np.ndarray) -> str:
        """A weight under its name in the model; the same name is stored once."""
        if name not in self.weights:
            tensor = numpy_helper.from_array(np.asarray(array, order="C"), name)
            self.weights[name] = tensor
        assert tuple(self.weights[name].dims) == array.shape, f"{name} in two shapes"
        return name

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """A small constant, stored once however often it is asked for."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = self.weight(name, array)
        return self._constants[key]

    def once(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """As ``add``, but a node that is there already is used again."""
        key = (op, tuple(inputs), str(sorted(attributes.items())))
        if key not in self._made:
            self._made[key] = self.add(op, inputs, **attributes)
        return self._made[key]

    def choice(
        self, condition: str, one: Callable[[], str], other: Callable[[], str], dims: Dims
    ) -> str:
        """One of two floats of the same shape, and only that is computed.

        Args:
            condition: a boolean, decided as the graph runs.
            one, other: add what the value is made of where it holds, and where it does not.
            dims: the value's shape.
        """
        branches = [self._inner(make, len(dims)) for make in (one, other)]
        name = self.add("If", [condition], then_branch=branches[0], else_branch=branches[1])
        return self.mark(name, dims)

    def loop(self, count: str, make: Callable[[str], str], rank: int) -> str:
        """Floats that are made one after the other, along a new first axis.

        Args:
            count: how many.
            make: adds what the one is made of whose number it is given.
            rank: axes of each.
        """
        index, goes_on = f"index_{self._number}", f"goes_on_{self._number}"
        value = functools.partial(helper.make_tensor_value_info, shape=[])
        inputs = [value(index, TensorProto.INT64), value(goes_on, TensorProto.BOOL)]
        again = value(f"{goes_on}_again", TensorProto.BOOL)

        def body() -> str:
            same = helper.make_node("Identity", [goes_on], [again.name], name=again.name)
            self.nodes.append(same)
            return make(index)

        graph = self._inner(body, rank)
        graph.input.extend(inputs)
        graph.output.insert(0, again)
        return self.add("Loop", [count, ""], body=graph)

    def _inner(self, make: Callable[[], str], rank: int) -> onnx.GraphProto:
        """A graph inside this one: of what was made before it can use everything, and what is made
        inside is known nowhere else."""
        nodes, made = self.nodes, self._made
        self.nodes, self._made = [], dict(made)
        try:
            name = make()
            value = helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank)
            return helper.make_graph(self.nodes, f"inside_{self._number}", [], [value])
        finally:
            self.nodes, self._made = nodes, made

    # -- shapes --------------------------------------------------------------------------------

    def mark(self, name: str, dims: Dims) -> str:
        """Note which shape a tensor is stored in."""
        self._shapes[name] = dims
        return name

    def dims(self, name: str) -> Dims:
        """The shape that a tensor is stored in."""
        return self._shapes[name]

    def shaped(self, name: str, dims: Dims) -> str:
        """The same tensor in another shape of as many elements."""
        if self._shapes[name] == dims:
            return name
        # One unknown size follows from the others.
        unknown = sum(not isinstance(size, int) or size < 0 for size in dims)
        target = tuple(-1 if isinstance(size, str) else size for size in dims)
        shape = self.constant(target) if unknown <= 1 else self.sizes(dims)
        return self.mark(self.once("Reshape", [name, shape]), dims)

    def sizes(self, dims: Dims) -> str:
        """A shape as a tensor of integers."""
        symbols = sorted(self.axes, key=lambda symbol: self.axes[symbol])
        parts: list[str] = []
        rest = list(dims)
        while rest:
            if rest[:2] == symbols:
                parts.append(self.once("Shape", ["input_ids"]))
                del rest[:2]
            elif isinstance(rest[0], int):
                run = 1
                while run < len(rest) and isinstance(rest[run], int):
                    run += 1
                parts.append(self.constant(rest[:run]))
                del rest[:run]
            else:
                axis = self.axes[str(rest.pop(0))]
                parts.append(self.once("Shape", ["input_ids"], start=axis, end=axis + 1))
        return parts[0] if len(parts) == 1 else self.once("Concat", parts, axis=0)

    # -- the whole -----------------------------------------------------------------------------

    def model(
        self, inputs: Sequence[str], outputs: dict[str, tuple[str, Dims]], producer: str
    ) -> onnx.ModelProto:
        """The finished model; nodes and weights that no output needs are left out.

        Args:
            inputs: names of [batch, length] int64 tensors.
            outputs: name -> the float tensor that it is, and its shape.
            producer: what the file says it was written by.
        """
        for name, (inner, dims) in outputs.items():
            self.nodes.append(
                helper.make_node("Identity", [self.shaped(inner, dims)], [name], name=name)
            )
        nodes = _needed(self.nodes, set(outputs))
        used = {name for node in nodes for name in _read(node)}
        shown = {symbol: ("batch", "length")[axis] for symbol, axis in self.axes.items()}
        graph = helper.make_graph(
            nodes,
            "model",
            [
                helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"])
                for name in inputs
            ],
            [
                helper.make_tensor_value_info(
                    name, TensorProto.FLOAT, [shown.get(str(size), size) for size in dims]
                )
                for name, (_, dims) in outputs.items()
            ],
            [tensor for name, tensor in self.weights.items() if name in used],
        )
        opsets = [helper.make_opsetid("", OPSET)]
        if any(node.domain == CONTRIB for node in nodes):
            opsets.append(helper.make_opsetid(CONTRIB, 1))
        return helper.make_model(
            graph,
            opset_imports=opsets,
            producer_name=producer,
            ir_version=helper.find_min_ir_version_for([opsets[0]]),
        )


def _needed(nodes: Sequence[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """The nodes that the wanted names depend on, in order."""
    kept = []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= set(_read(node))
            kept.append(node)
    return kept[::-1]


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """The names that a node reads, those in its branches too."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _read(inner)


class Translation:
    """What stands for each value of a traced model in the graph that is being written.

    Attributes:
        graph: the graph.
        int8: ``fused`` or ``qdq``; see `raybert.onnx_int8`.
        known: values that no input changes -> the tensor; they are computed here and now.
        swapped: values whose axes 1 and 2 are exchanged -> the tensor before that.
        levels: value, scale, type and zero point -> the tensor of its levels.
        grids: values that are on a grid -> the tensor of their levels, the scale, the zero point.
    """

    def __init__(self, graph: Graph, int8: str) -> None:
        self.graph, self.int8 = graph, int8
        self.known: dict[Node, Any] = {}
        self.swapped: dict[Node, str] = {}
        self.levels: dict[tuple[Node, float, str, int], str] = {}
        self.grids: dict[Node, tuple[str, np.float32, Any]] = {}
        self._names: dict[Node, str] = {}
        self._weights: dict[Node, str] = {}
        self._computed: set[Node] = set()

    def set(self, node: Node, name: str, dims: Dims | None = None) -> None:
        """A value is this tensor, stored in this shape; nothing: in its own."""
        self._names[node] = name
        self.graph.mark(name, dims_of(node.meta["val"]) if dims is None else dims)

    def alias(self, node: Node, source: Node) -> None:
        """A value has the elements of another, in the same order."""
        self._names[node] = self.name(source)

    def set_known(self, node: Node, value: Any, name: str | None = None) -> None:
        """A value that no input changes; ``name`` is what the model calls it."""
        self.known[node] = value
        self._weights[node] = name or node.name
        if name is None:
            self._computed.add(node)

    def label(self, node: Node) -> str:
        """What the model calls a weight."""
        return self._weights[node]

    def name(self, node: Node) -> str:
        """The tensor of a value, in whatever shape it is stored."""
        if node not in self._names:
            tensor = self.known[node].detach()
            array = tensor.cpu().numpy()
            if node in self._computed:  # of weights that layers share, each layer makes the same
                name = self.graph.constant(array, array.dtype)
            else:
                name = self.graph.weight(self._weights[node], array)
            self._names[node] = self.graph.mark(name, tuple(tensor.shape))
        return self._names[node]

    def full(self, node: Node) -> str:
        """The tensor of a value in the value's own shape."""
        return self.graph.shaped(self.name(node), dims_of(node.meta["val"]))

    def rows(self, node: Node) -> str:
        """The tensor of a value [..., X] as [N, X]."""
        dims = dims_of(node.meta["val"])
        return self.graph.shaped(self.name(node), dims if len(dims) <= 2 else (-1, dims[-1]))

    def for_each_query(self, mask: Node, queries: int | str) -> str:
        """A mask of keys [B, 1, 1, T] with a row for every query, which ONNX Runtime wants."""
        _, _, _, keys = dims_of(mask.meta["val"])
        return self.graph.once("Expand", [self.full(mask), self.graph.sizes((1, 1, queries, keys))])

    def stored(self, node: Node) -> Dims:
        """The shape that a value is stored in."""
        return self.graph.dims(self.name(node))
