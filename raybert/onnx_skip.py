"""EBERT's blocks in ONNX: only the units that samples keep are computed.

The rows of the weights that belong to those units are gathered, and the products are smaller. A
batch is computed in whichever of three ways costs least by estimate, which is decided as the graph
runs; the others take no time:

- together, of all units that one of its samples keeps; what another does not keep is multiplied by
  zero;
- sample by sample, each of its own units;
- whole, where gathering would cost more than it saves. So is the last feed-forward of a classifier,
  which is of one token a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from onnx import TensorProto
from torch.fx import Node

from raybert.onnx_graph import Graph, Translation, dims_of

GATHER = 40
"""What gathering weights costs in ONNX Runtime, in tokens that they could be multiplied with
meanwhile. Measured on two AVX2 cores, whole models: as long either way take 128 tokens with 0.77 of
the units kept, which makes it 38, and 64 tokens with 0.58, which makes it 46."""

CALL = 2_000_000
"""What one more sample by itself costs, in multiply-adds that could be done meanwhile."""


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

    def weight(self, name: str, *shape: int) -> str:
        """A weight [P, N, ...] of the units, or [N, ...], in another shape."""
        dims = self.graph.dims(name)
        if self.chosen is not None:
            name = self.graph.add("Gather", [name, self.chosen], axis=int(len(dims) > len(shape)))
        if len(dims) == len(shape):
            return name
        return self.graph.once("Reshape", [name, self.graph.constant(shape)])

    def product(self, rows: str, weight: str, bias: str, width: int) -> str:
        """Rows [R, H] times weights [P, N, D, H], or [N, H], of the units: [R, P * n * D]."""
        pair = [self.weight(weight, -1, width), self.weight(bias, -1)]
        return self.graph.add("Gemm", [rows, *pair], transB=1)

    def outward(self, y: str, weight: str, bias: str, width: int) -> str:
        """[b, T, n, D] times weights [1, N, D, H], or [N, H], of the units: [b * T, H]."""
        rows = self.graph.add("Flatten", [y], axis=2)
        return self.graph.add("Gemm", [rows, self.weight(weight, -1, width), bias])

    def apart(self, rows: str, width: int, source: int = 0) -> str:
        """[b * T, n * D] as [b, T, n, D]."""
        parts = [self.lead[source], self.size, self.graph.constant([width])]
        return self.graph.add("Reshape", [rows, self.graph.once("Concat", parts, axis=0)])

    def masked(self, y: str) -> str:
        """[b, T, n, D], multiplied by what each sample keeps."""
        graph, keep = self.graph, self.keep
        if self.chosen is not None:
            keep = graph.once("Gather", [keep, self.chosen], axis=1)
        return graph.add("Mul", [y, graph.once("Unsqueeze", [keep, graph.constant([1, 3])])])


def kept_feed_forward(t: Translation, node: Node) -> None:
    """`raybert.kept_operators.kept_feed_forward`."""
    values: Any = node.args
    hidden, keep, weight, bias, out, last, activation = values
    sizes: Any = dims_of(out.meta["val"])
    count, _, size = sizes
    inward = _weight(t, weight, (count, size)), _weight(t, bias, (count,))
    outward = _weight(t, out, (count, size)), t.full(last)
    operator: str = activation
    attributes: dict[str, Any] = {}
    if activation == "GeluTanh":
        operator, attributes = "Gelu", {"approximate": "tanh"}

    def block(part: _Part) -> str:
        y = part.product(part.sources[0], *inward, size)
        y = t.graph.add(operator, [y], **attributes)
        return part.outward(part.masked(part.apart(y, 1)), *outward, size)

    _add(t, node, block, keep, [hidden], copied=2 * size, product=2 * size)


def kept_attention(t: Translation, node: Node) -> None:
    """`raybert.kept_operators.kept_attention`."""
    values: Any = node.args
    queries, hidden, keep, mask, weight, bias, out, last, scale = values
    sizes: Any = dims_of(out.meta["val"])
    count, width, size = sizes
    outward = _weight(t, out, (1, count, width, size)), t.full(last)
    # Queries, keys and values are one product if they are made of the same.
    alone = queries is hidden
    spans = [(0, 3)] if alone else [(0, 1), (1, 3)]
    inward = [(_weight(t, weight, span=span), _weight(t, bias, span=span)) for span in spans]

    def block(part: _Part) -> str:
        graph, qkv = t.graph, []
        for place, (start, end) in enumerate(spans):
            y = part.product(part.sources[place], *inward[place], size)
            number = end - start
            parts = [y]
            if number > 1:
                parts = graph.add("Split", [y], outputs=number, axis=1, num_outputs=number)
            qkv += [part.apart(one, width, place) for one in parts]
        qkv[2] = part.masked(qkv[2])  # a head's output is a mean of its values
        more = [part.mask] if part.mask else []
        if part.chosen is None:  # the operator takes a fixed number of heads as they lie
            joined = graph.constant([0, 0, count * width])
            inputs = [graph.add("Reshape", [one, joined]) for one in qkv]
            heads = {"q_num_heads": count, "kv_num_heads": count}
            context = graph.add("Attention", [*inputs, *more], scale=scale, **heads)
        else:
            inputs = [graph.add("Transpose", [one], perm=[0, 2, 1, 3]) for one in qkv]
            context = graph.add("Attention", [*inputs, *more], scale=scale)
            context = graph.add("Transpose", [context], perm=[0, 2, 1, 3])
        return part.outward(context, *outward, size)

    sources = [hidden] if alone else [queries, hidden]
    # Of one token's queries there is no more to be multiplied than keys and values.
    copied = 4 * width * size
    product = copied if alone else 2 * width * size
    _add(t, node, block, keep, sources, mask, copied=copied, product=product)


def _weight(
    t: Translation, value: Node, shape: Any = None, span: tuple[int, int] | None = None
) -> str:
    """A weight in another shape, or some of the matrices in it."""
    name, array = t.label(value), t.known[value].detach().cpu().numpy()
    if span is not None and span != (0, len(array)):
        name, array = f"{name}.{span[0]}", array[slice(*span)]
    array = array if shape is None else array.reshape(shape)
    return t.graph.mark(t.graph.weight(name, array), array.shape)


def _add(
    t: Translation,
    node: Node,
    block: Callable[[_Part], str],
    keep: Node,
    values: list[Node],
    mask: Node | None = None,
    *,
    copied: int,
    product: int,
) -> None:
    """Add a block in all three ways.

    Args:
        block: adds it for some samples and units; returns its output, [b * T, H].
        keep: bool [B, N].
        values: what the block reads, each [B, T, H], or [B, H] for the first token alone.
        mask: of keys [B, 1, 1, T].
        copied: weights of a unit.
        product: multiply-adds of a unit for a token.
    """
    graph = t.graph
    count, size = dims_of(keep.meta["val"])[1], dims_of(node.meta["val"])[-1]
    assert isinstance(count, int)
    assert isinstance(size, int)
    dims = (-1, size)
    short = [len(dims_of(value.meta["val"])) == 2 for value in values]
    shape = graph.once("Shape", ["input_ids"])
    kept = graph.add("Cast", [t.full(keep)], to=TensorProto.FLOAT)
    length = dims_of(values[-1].meta["val"])[1]
    whole = _Part(
        graph,
        [t.rows(value) for value in values],
        [graph.constant([-1, 1]) if one else shape for one in short],
        kept,
        "" if mask is None else t.for_each_query(mask, 1 if short[0] else length),
        graph.constant([count]),
    )
    if all(short):
        t.set(node, block(whole), dims)
        return
    some = graph.add("ReduceMax", [kept, graph.constant([0])], keepdims=0)
    total = graph.add("ReduceSum", [kept], keepdims=0)
    chosen = _chosen(graph, some, total, count)
    together = replace(whole, chosen=chosen, size=graph.add("Shape", [chosen]))
    samples = _Samples(graph, [t.full(value) for value in values], short, kept, whole.mask, count)
    costs = _Costs(graph, count, copied, product)

    def skipping() -> str:
        joins = costs.joins(together.size, total)
        return graph.choice(joins, lambda: block(together), lambda: samples.each(block, size), dims)

    pays = costs.pays(together.size, total)
    t.set(node, graph.choice(pays, skipping, lambda: block(whole), dims), dims)


@dataclass(frozen=True)
class _Samples:
    """The samples of a batch, to be computed one after the other.

    Attributes:
        values: what the block reads, each [B, T, H], or [B, H] where ``short`` says so.
        keep: what they keep, as floats [B, N].
        mask: of keys, [B, 1, T', T]; empty for all.
        count: N.
    """

    graph: Graph
    values: list[str]
    short: list[bool]
    keep: str
    mask: str
    count: int

    def part(self, index: str) -> _Part:
        """One sample, by its number."""
        graph = self.graph
        place = graph.once("Reshape", [index, graph.constant([1])])
        keep = graph.add("Gather", [self.keep, place], axis=0)
        number = graph.add("ReduceSum", [keep], keepdims=0)
        flat = graph.add("Reshape", [keep, graph.constant([-1])])
        chosen = _chosen(graph, flat, number, self.count)
        tokens = graph.once("Shape", ["input_ids"], start=1, end=2)
        long = graph.once("Concat", [graph.constant([1]), tokens], axis=0)
        return _Part(
            graph,
            [
                graph.add("Gather", [name, place if first else index], axis=0)
                for name, first in zip(self.values, self.short, strict=True)
            ],
            [graph.constant([1, 1]) if first else long for first in self.short],
            keep,
            self.mask and graph.add("Gather", [self.mask, place], axis=0),
            graph.add("Shape", [chosen]),
            chosen,
        )

    def each(self, block: Callable[[_Part], str], size: int) -> str:
        """A block's output for all of them, [B * T, H], H being the size."""
        graph = self.graph
        batch = graph.once("Shape", ["input_ids"], start=0, end=1)
        rows = graph.loop(batch, lambda index: block(self.part(index)), rank=2)
        return graph.add("Reshape", [rows, graph.constant([-1, size])])


def _chosen(graph: Graph, some: str, total: str, count: int) -> str:
    """The numbers of the units whose entry in [N] is not zero; the first one where their sum is,
    which is then multiplied by zero: products of no unit are nothing that every runtime can do."""
    none = graph.add("Equal", [total, graph.constant(0, np.float32)])
    first = graph.constant(np.arange(count) == 0, np.float32)
    places = graph.add("NonZero", [graph.add("Where", [none, first, some])])
    return graph.add("Reshape", [places, graph.constant([-1])])


class _Costs:
    """What a block costs, in units times tokens.

    Of n units for all samples together ``n * (B * T + gather)``; of m units in all for each sample
    alone ``m * (T + gather) + B * call``; whole ``N * B * T``.
    """

    def __init__(self, graph: Graph, count: int, copied: int, product: int) -> None:
        self.graph = graph
        self.gather = self._number(GATHER * copied / product)
        batch, length = (
            self._float(graph.once("Shape", ["input_ids"], start=axis, end=axis + 1))
            for axis in (0, 1)
        )
        tokens = graph.once("Mul", [batch, length])
        self.call = graph.once("Mul", [batch, self._number(CALL / product)])
        self.whole = graph.once("Mul", [tokens, self._number(count)])
        self.together = graph.once("Add", [tokens, self.gather])
        self.alone = graph.once("Add", [length, self.gather])

    def _number(self, value: float) -> str:
        return self.graph.constant(value, np.float32)

    def _float(self, name: str) -> str:
        return self.graph.once("Cast", [name], to=TensorProto.FLOAT)

    def pays(self, size: str, total: str) -> str:
        """Whether either way of skipping costs less than the whole.

        Args:
            size: n, [1].
            total: m.
        """
        graph = self.graph
        # What does not depend on the gates is worked out once for all blocks.
        most = graph.once("Div", [self.whole, self.together])
        rest = graph.once("Sub", [self.whole, self.call])
        least = graph.once("Div", [rest, self.alone])
        found = graph.add("Less", [self._float(size), most])
        return graph.add("Or", [found, graph.add("Less", [total, least])])

    def joins(self, size: str, total: str) -> str:
        """Whether all together cost no more than each alone."""
        graph = self.graph
        alone = graph.add("Add", [graph.add("Mul", [total, self.alone]), self.call])
        joint = graph.add("Mul", [self._float(size), self.together])
        return graph.add("LessOrEqual", [joint, alone])
