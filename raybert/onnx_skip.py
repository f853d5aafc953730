"""EBERT's blocks in ONNX: only the units that samples keep are computed.

The rows of the weights that belong to those units are gathered, and the products are smaller. A
batch is computed in whichever of three ways costs least, which is decided as the graph runs; the
others take no time:

- together, of all units that one of its samples keeps; what another does not keep is multiplied by
  zero;
- sample by sample, each of its own units;
- whole, where gathering would cost more than it saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto
from torch.fx import Node

from raybert.onnx_graph import Graph, Translation, dims_of

GATHER = 32
"""What gathering a unit's weights costs in ONNX Runtime, in tokens that the unit could be computed
for meanwhile. Measured on two AVX2 cores: with 0.8 of the neurons kept, 128 tokens take as long
either way."""

CALL = 2_000_000
"""What one more sample by itself costs, in multiply-adds that could be done meanwhile."""

ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "Gelu": ("Gelu", {}),
    "GeluTanh": ("Gelu", {"approximate": "tanh"}),
    "Relu": ("Relu", {}),
    "Tanh": ("Tanh", {}),
}
"""What `raybert.skipping.ACTIVATIONS` are in ONNX: operator and attributes."""


@dataclass(frozen=True)
class _Part:
    """Samples that are computed together, and the units they are computed for: names in the graph.

    Attributes:
        sources: what the block reads, each as rows [b * T, H].
        lead: for each, b and T.
        keep: what each sample keeps, as floats [b, N].
        mask: which keys are real, [b, 1, T', T]; empty for all.
        size: n, the number of units, [1].
        chosen: their numbers [n]; ``None`` for all.
    """

    graph: Graph
    sources: list[str]
    lead: list[str]
    keep: str
    mask: str
    size: str
    chosen: str | None = None

    def weight(self, name: str, axis: int, shape: tuple[int, ...]) -> str:
        """A weight of the units, in another shape."""
        if self.chosen is None:
            rest = math.prod(size for size in self.graph.dims(name) if isinstance(size, int))
            known = -math.prod(shape)
            return self.graph.shaped(name, tuple(rest // known if n < 0 else n for n in shape))
        part = self.graph.add("Gather", [name, self.chosen], axis=axis)
        return self.graph.add("Reshape", [part, self.graph.constant(shape)])

    def apart(self, rows: str, width: int, source: int = 0) -> str:
        """[b * T, n * D] as [b, T, n, D]."""
        parts = [self.lead[source], self.size, self.graph.constant([width])]
        shape = self.graph.once("Concat", parts, axis=0)
        return self.graph.add("Reshape", [rows, shape])

    def masked(self, y: str) -> str:
        """[b, T, n, D], multiplied by what each sample keeps."""
        graph, keep = self.graph, self.keep
        if self.chosen is not None:
            keep = graph.once("Gather", [keep, self.chosen], axis=1)
        keep = graph.once("Unsqueeze", [keep, graph.constant([1, 3])])
        return graph.add("Mul", [y, keep])


Block = Callable[[_Part], str]
"""Adds a block for some samples and units; returns its output, [b * T, H]."""


def _chosen(graph: Graph, some: str, count: int) -> str:
    """The numbers of the units whose entry in [N] is not zero; the first one where all are, which
    is then multiplied by zero: products of no unit are nothing that every runtime can do."""
    none = graph.add("Equal", [graph.add("ReduceMax", [some], keepdims=0), _number(graph, 0)])
    first = graph.constant(np.arange(count) == 0, np.float32)
    places = graph.add("NonZero", [graph.add("Where", [none, first, some])])
    return graph.add("Reshape", [places, graph.constant([-1])])


def _number(graph: Graph, value: float) -> str:
    return graph.constant(value, np.float32)


def _floats(graph: Graph, start: int, end: int) -> str:
    """The size of the batch, its length, or both multiplied."""
    size = graph.once("Shape", ["input_ids"], start=start, end=end)
    if end - start > 1:
        size = graph.once("ReduceProd", [size])
    return graph.once("Cast", [size], to=TensorProto.FLOAT)


def _add(
    t: Translation,
    node: Node,
    keep: Node,
    values: list[Node],
    mask: Node | None,
    unit: int,
    block: Block,
) -> None:
    """Add a block in all three ways.

    Args:
        keep: bool [B, N].
        values: what the block reads, each [B, T, H], or [B, H] for the first token alone.
        unit: multiply-adds of a unit for a token.
    """
    graph = t.graph
    count, size = dims_of(keep.meta["val"])[1], dims_of(node.meta["val"])[-1]
    assert isinstance(count, int)
    assert isinstance(size, int)
    short = [len(dims_of(value.meta["val"])) == 2 for value in values]
    shape, ones = graph.once("Shape", ["input_ids"]), graph.constant([-1, 1])
    kept = graph.add("Cast", [t.full(keep)], to=TensorProto.FLOAT)
    length = dims_of(values[-1].meta["val"])[1]
    whole = _Part(
        graph,
        [t.rows(value) for value in values],
        [ones if alone else shape for alone in short],
        kept,
        "" if mask is None else t.for_each_query(mask, 1 if short[0] else length),
        graph.constant([count]),
    )
    if all(short):  # of one row each, gathering never pays
        t.set(node, block(whole), (-1, size))
        return

    some = graph.add("ReduceMax", [kept, graph.constant([0])], keepdims=0)
    chosen = _chosen(graph, some, count)
    number = graph.add("Shape", [chosen])
    together = _Part(graph, whole.sources, whole.lead, kept, whole.mask, number, chosen)
    # What the ways cost, in units times tokens.
    batch, tokens = _floats(graph, 0, 1), _floats(graph, 0, 2)
    gather, call = _number(graph, GATHER), _number(graph, CALL / unit)
    dear = graph.once("Add", [tokens, gather])
    joint = graph.add("Mul", [graph.add("Cast", [number], to=TensorProto.FLOAT), dear])
    dear = graph.once("Add", [_floats(graph, 1, 2), gather])
    own = graph.add("Mul", [graph.add("ReduceSum", [kept], keepdims=0), dear])
    each = graph.add("Add", [own, graph.once("Mul", [batch, call])])
    all_units = graph.once("Mul", [tokens, _number(graph, count)])
    scalar = graph.constant([], np.int64)
    pays = graph.add("Less", [graph.add("Min", [joint, each]), all_units])
    joins = graph.add("LessOrEqual", [joint, each])
    pays, joins = (graph.add("Reshape", [name, scalar]) for name in (pays, joins))
    apart = [
        graph.shaped(name, dims_of(value.meta["val"]))
        for name, value in zip(whole.sources, values, strict=True)
    ]

    def sample(index: str) -> str:
        def one(name: str, axes: int) -> str:
            """Of a tensor its entry for this sample, with its axis or without."""
            place = index if not axes else graph.once("Reshape", [index, graph.constant([1])])
            return graph.add("Gather", [name, place], axis=0)

        row = one(kept, 1)
        found = _chosen(graph, graph.add("Reshape", [row, graph.constant([-1])]), count)
        tokens = graph.once("Shape", ["input_ids"], start=1, end=2)
        long = graph.once("Concat", [graph.constant([1]), tokens], axis=0)
        part = _Part(
            graph,
            [one(name, alone) for name, alone in zip(apart, short, strict=True)],
            [graph.constant([1, 1]) if alone else long for alone in short],
            row,
            whole.mask and one(whole.mask, 1),
            graph.add("Shape", [found]),
            found,
        )
        return block(part)

    def skipping(holds: bool) -> str:
        if holds:
            return block(together)
        rows = graph.loop(graph.once("Shape", ["input_ids"], start=0, end=1), sample, 2)
        return graph.add("Reshape", [rows, graph.constant([-1, size])])

    dims = (-1, size)
    name = graph.choice(
        pays,
        lambda holds: graph.choice(joins, skipping, dims) if holds else block(whole),
        dims,
    )
    t.set(node, name, dims)


def kept_feed_forward(t: Translation, node: Node) -> None:
    """`raybert.skipping.kept_feed_forward`."""
    values: Any = node.args
    hidden, keep, *weights, activation = values
    inward, bias, outward, last = (t.full(value) for value in weights)
    size, graph = dims_of(node.meta["val"])[-1], t.graph
    assert isinstance(size, int)
    operator, attributes = ACTIVATIONS[activation]

    def block(part: _Part) -> str:
        pair = [part.weight(inward, 0, (-1, size)), part.weight(bias, 0, (-1,))]
        y = graph.add("Gemm", [part.sources[0], *pair], transB=1)
        y = part.masked(part.apart(graph.add(operator, [y], **attributes), 1))
        y = graph.add("Flatten", [y], axis=2)
        return graph.add("Gemm", [y, part.weight(outward, 0, (-1, size)), last])

    _add(t, node, keep, [hidden], None, 2 * size, block)


def kept_attention(t: Translation, node: Node) -> None:
    """`raybert.skipping.kept_attention`."""
    values: Any = node.args
    queries, hidden, keep, mask, weight, bias, out, out_bias, scale = values
    _, width, size = dims_of(out.meta["val"])
    assert isinstance(width, int)
    assert isinstance(size, int)
    graph, outward, last = t.graph, t.full(out), t.full(out_bias)
    # Queries, keys and values in one product, if they are made of the same.
    spans = [(0, 3)] if queries is hidden else [(0, 1), (1, 3)]
    inward = [[_span(t, value, *span) for value in (weight, bias)] for span in spans]

    def block(part: _Part) -> str:
        qkv: list[str] = []
        for place, (names, (start, end)) in enumerate(zip(inward, spans, strict=True)):
            pair = [part.weight(names[0], 1, (-1, size)), part.weight(names[1], 1, (-1,))]
            y = graph.add("Gemm", [part.sources[place], *pair], transB=1)
            parts = [y]
            if end - start > 1:
                parts = graph.add(
                    "Split", [y], outputs=end - start, axis=1, num_outputs=end - start
                )
            qkv += [part.apart(one, width, place) for one in parts]
        qkv[2] = part.masked(qkv[2])  # a head's output is a mean of its values
        qkv = [graph.add("Transpose", [one], perm=[0, 2, 1, 3]) for one in qkv]
        inputs = [*qkv, part.mask] if part.mask else qkv
        context = graph.add("Attention", inputs, scale=scale)
        context = graph.add("Transpose", [context], perm=[0, 2, 1, 3])
        context = graph.add("Flatten", [context], axis=2)
        return graph.add("Gemm", [context, part.weight(outward, 0, (-1, size)), last])

    sources = [hidden] if queries is hidden else [queries, hidden]
    _add(t, node, keep, sources, mask, 4 * width * size, block)


def _span(t: Translation, value: Node, start: int, end: int) -> str:
    """Some of the matrices that lie in one weight."""
    if (start, end) == (0, 3):
        return t.full(value)
    array = t.known[value][start:end].detach().cpu().numpy()
    return t.graph.mark(t.graph.weight(f"{t.label(value)}.{start}", array), array.shape)
