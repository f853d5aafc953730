"""`raybert::linear_int8` in ONNX: integer matrix products with the learned scales.

Activations are quantised to unsigned bytes around 128 and weights are signed: kernels for that pair
are the fast ones (two signed operands were slower than float32 on AVX2). A value that several
products read under one scale, such as what queries, keys and values are made of, is quantised once.

- ``fused``: ``QuantizeLinear``, then ``com.microsoft.MatMulIntegerToFloat``, which multiplies in
  integers and applies scale and bias in one pass over the result. Runs in any ONNX Runtime.
- ``qdq``: standard operators alone. A ``QuantizeLinear`` - ``DequantizeLinear`` pair with the
  learned scale in front of a ``MatMul`` whose weights are dequantised from int8; runtimes recognise
  the pattern and multiply in integers as far as they can.

On a CPU with AVX2 and no VNNI instructions, ONNX Runtime's unsigned-by-signed kernels add pairs of
products in 16 bits, which saturate when both activations and both weights are near their largest.
Where that changes logits by more than rounding, the parity check of `raybert.export` refuses such a
model there; the export notes on any machine that its products may.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.fx import Node

from raybert.grid import FLOOR, levels
from raybert.onnx_graph import CONTRIB, Graph, Translation, dims_of

SIGNED, UNSIGNED = np.uint8(128), np.uint8(0)
"""Zero points of what stands on the left of a product."""

RIGHT = np.int8(0)
"""That of what stands on the right."""

# -- values as integers ----------------------------------------------------------------------------

SAME = {
    "aten.view.default",
    "aten.reshape.default",
    "aten.dropout.default",
    "aten.contiguous.default",
    "aten.clone.default",
}


def number(t: Translation, node: Any) -> np.float32:
    """A scale that is known."""
    return np.float32(t.known[node].float().item())


def quantised(t: Translation, node: Node, scale: np.float32, zero: Any) -> str:
    """A value's levels, bytes with this zero point, made as early as can be.

    What moves bytes moves the same numbers: so values are quantised before they are transposed,
    padded or masked, and a ReLU before an unsigned level is the end of its range.
    """
    key = (node, float(scale), zero.dtype.char, int(zero))
    if key not in t.levels:
        t.levels[key] = _quantised(t, node, scale, zero)
    return t.levels[key]


def _quantised(t: Translation, node: Node, scale: np.float32, zero: Any) -> str:
    graph, kind, args = t.graph, str(node.target), node.args
    source: Any = args[0] if args else None
    dims = dims_of(node.meta["val"])
    low = graph.constant(zero, zero.dtype)
    if t.grids.get(node, ())[1:] == (scale, zero) and zero.dtype == np.uint8:
        return t.grids[node][0]
    if kind in SAME:
        return quantised(t, source, scale, zero)
    if kind == "aten.relu.default" and zero.dtype == np.uint8 and zero == UNSIGNED:
        return quantised(t, source, scale, zero)
    if kind == "aten.mul.Tensor" and isinstance(args[1], float) and args[1] > 0:
        return quantised(t, source, np.float32(scale / np.float32(args[1])), zero)
    if kind == "aten.where.ScalarOther" and args[2] == 0:
        moved: Any = args[1]
        whole = graph.shaped(quantised(t, moved, scale, zero), dims_of(moved.meta["val"]))
        return graph.mark(graph.add("Where", [t.full(args[0]), whole, low]), dims)  # type: ignore[arg-type]
    if kind == "aten.pad.default":
        whole = graph.shaped(quantised(t, source, scale, zero), dims_of(source.meta["val"]))
        return graph.mark(graph.add("Pad", [whole, pads(t, node), low]), dims)
    if kind == "aten.transpose.int" and not _as_it_comes(node):
        return _transposed(t, node, scale, zero)
    parts = [origin(part) for part in args] if kind == "aten.add.Tensor" else []
    if parts and t.int8 == "fused" and all(part in t.grids for part in parts):
        sides = [_side(graph, *t.grids[part]) for part in parts]
        sides[1][0] = graph.shaped(sides[1][0], graph.dims(sides[0][0]))
        to = [graph.constant(scale, np.float32), low]
        name = graph.add(f"{CONTRIB}.QLinearAdd", [*sides[0], *sides[1], *to])
        return graph.mark(name, graph.dims(sides[0][0]))
    rows = t.rows(node)
    # ONNX Runtime has its own for longer than ONNX's of this opset: since 1.23.
    op = f"{CONTRIB}.QuantizeLinear" if t.int8 == "fused" else "QuantizeLinear"
    name = graph.once(op, [rows, graph.constant(scale, np.float32), low])
    return graph.mark(name, graph.dims(rows))


def _as_it_comes(node: Node) -> bool:
    """Whether a transposition is the one after attention, which the graph's operator spares."""
    source: Any = node.args[0]
    axes = {axis % 4 for axis in node.args[1:3] if isinstance(axis, int)}
    return str(source.target) == "aten.scaled_dot_product_attention.default" and axes == {1, 2}


def origin(value: Any) -> Any:
    """What a value has the elements of."""
    while isinstance(value, Node) and str(value.target) in SAME:
        value = value.args[0]
    return value


def _side(graph: Graph, name: str, scale: np.float32, zero: Any) -> list[str]:
    """Levels, scale and zero point."""
    return [name, graph.constant(scale, np.float32), graph.constant(zero, zero.dtype)]


def _transposed(t: Translation, node: Node, scale: np.float32, zero: Any) -> str:
    """Two transpositions, one after the other, are one."""
    order = list(range(len(dims_of(node.meta["val"]))))
    source: Any = node
    while str(source.target) == "aten.transpose.int":
        first, second = (axis % len(order) for axis in source.args[1:3])
        turn = list(range(len(order)))
        turn[first], turn[second] = second, first
        order = [turn[axis] for axis in order]
        source = source.args[0]
    whole = quantised(t, source, scale, zero)
    name = t.graph.shaped(whole, dims_of(source.meta["val"]))
    if order != sorted(order):
        name = t.graph.once("Transpose", [name], perm=order)
    return t.graph.mark(name, dims_of(node.meta["val"]))


def pads(t: Translation, node: Node) -> str:
    """What ``Pad`` takes for zeros behind one axis, up to a fixed size."""
    source: Any = node.args[0]
    ends: Any = node.args[1]  # before and behind each axis, the last one first
    rank, graph = len(dims_of(source.meta["val"])), t.graph
    axis = rank - len(ends) // 2
    assert all(end == 0 for end in ends[:-1])
    own, size = dims_of(source.meta["val"])[axis], dims_of(node.meta["val"])[axis]
    room = graph.once("Sub", [graph.constant([size]), graph.sizes((own,))])
    before = graph.constant([0] * (rank + axis))
    parts = [before, room, *([graph.constant([0] * (rank - axis - 1))] if axis < rank - 1 else [])]
    return graph.once("Concat", parts, axis=0)


def give_grid(t: Translation, node: Node, name: str, scale: np.float32) -> None:
    """A value is on a grid, these its levels; as a float it is there for whoever asks."""
    t.grids[node] = (name, scale, SIGNED)
    dims = t.graph.dims(name)
    t.set(node, t.graph.add("DequantizeLinear", _side(t.graph, name, scale, SIGNED)), dims)


# -- operators -------------------------------------------------------------------------------------


def linear_int8(t: Translation, node: Node) -> None:
    """``raybert::linear_int8(x, weight, weight_scale, input_scale, bias, unsigned, zero)``; see
    `raybert.int8`.

    Activations are [N, K] bytes, weights [K, N] int8.
    """
    arguments: tuple[Any, ...] = (*node.args, *[None] * (7 - len(node.args)))
    x, weight, weight_scale, input_scale, bias, unsigned, learned = arguments
    graph, kind = t.graph, UNSIGNED if unsigned else SIGNED
    if learned is not None:
        kind = np.uint8(number(t, learned))
    zero = graph.constant(kind, np.uint8)
    if input_scale in t.known:
        own = number(t, input_scale)
        name, scale = quantised(t, x, own, kind), graph.constant(own, np.float32)
        whole = dims_of(x.meta["val"])
        quantised_rows = graph.shaped(name, whole if len(whole) <= 2 else (-1, whole[-1]))
    else:
        scale = _scale(t, t.rows(x), input_scale)
        op = f"{CONTRIB}.QuantizeLinear" if t.int8 == "fused" else "QuantizeLinear"
        quantised_rows = graph.once(op, [t.rows(x), scale, zero])
        graph.mark(quantised_rows, graph.dims(t.rows(x)))
    fused = t.int8 == "fused"
    dims = (*graph.dims(quantised_rows)[:-1], len(t.known[weight]))
    own = t.known[weight_scale].float().flatten().cpu().numpy()  # [1] or [N]
    product = _fused if fused else _standard
    name = product(
        graph,
        (quantised_rows, scale, zero),
        (_turned(t, weight), own[0] if len(own) == 1 else own),
        t.full(bias) if bias is not None else "",
    )
    t.set(node, graph.shaped(graph.mark(name, dims if fused else (1, *dims)), dims), dims)


def on_grid(t: Translation, node: Node) -> None:
    """``raybert::on_grid(x, scale, low, high)``; see `raybert.int8`."""
    x, scale, low, high = node.args
    if scale in t.known and (low, high) == (-128, 127):
        own = number(t, scale)
        give_grid(t, node, quantised(t, x, own, SIGNED), own)  # type: ignore[arg-type]
        return
    graph, source = t.graph, t.name(x)  # type: ignore[arg-type]
    step = graph.shaped(t.name(scale), ())  # type: ignore[arg-type]
    ends = [graph.constant(end, np.float32) for end in (low, high)]
    level = graph.add("Clip", [graph.add("Round", [graph.add("Div", [source, step])]), *ends])
    t.set(node, graph.add("Mul", [level, step]), t.stored(x))  # type: ignore[arg-type]


def product_int8(t: Translation, node: Node) -> None:
    """``raybert::product_int8(a, b, a_scale, b_scale, bias, unsigned, bits)``; see
    `raybert.integer`."""
    graph, sides = t.graph, []
    parts: Any = node.args
    left = UNSIGNED if parts[5] else SIGNED
    for value, scale, zero in ((parts[0], parts[2], left), (parts[1], parts[3], RIGHT)):
        own = number(t, scale)
        name = graph.shaped(quantised(t, value, own, zero), dims_of(value.meta["val"]))
        if zero is RIGHT and parts[6] < 8:
            ends = [graph.constant(end, np.int8) for end in levels(parts[6])]
            name = graph.mark(graph.once("Clip", [name, *ends]), dims_of(value.meta["val"]))
        sides.append(_side(graph, name, own, zero))
    (a, a_scale, a_zero), (b, b_scale, b_zero) = sides
    if t.int8 == "fused":
        inputs = [a, b, a_scale, b_scale, a_zero, b_zero]
        bias = [t.full(parts[4])] if parts[4] is not None else []
        name = graph.add(f"{CONTRIB}.MatMulIntegerToFloat", inputs + bias)
    else:
        name = graph.add("MatMul", [graph.add("DequantizeLinear", side) for side in sides])
        name = name if parts[4] is None else graph.add("Add", [name, t.full(parts[4])])
    t.set(node, name)


def norm_int8(t: Translation, node: Node) -> None:
    """``raybert::norm_int8(x, weight, weight_scale, bias, input_scale, output_scale)``; see
    `raybert.integer`. A multiplication by channel is a convolution of one place, channels last."""
    parts: Any = node.args
    x, weight, weight_scale, bias, input_scale, output_scale = parts
    graph, own, to = t.graph, number(t, input_scale), number(t, output_scale)
    levels = quantised(t, x, own, SIGNED)
    rows, channels = graph.dims(levels), len(t.known[weight])
    if t.int8 == "fused":
        kernel = t.known[weight].cpu().numpy().reshape(channels, 1, 1)
        scales = t.known[weight_scale].float().cpu().numpy()
        inputs = [
            *_side(graph, graph.shaped(levels, (1, -1, channels)), own, SIGNED),
            graph.weight(f"{t.label(weight)}.kernel", kernel),
            graph.constant(scales, np.float32),
            graph.constant(np.zeros(channels), np.int8),
            *_side(graph, "", to, SIGNED)[1:],
            t.full(bias),
        ]
        name = graph.add(
            f"{CONTRIB}.QLinearConv", inputs, channels_last=1, group=channels, kernel_shape=[1]
        )
        graph.mark(name, (1, -1, channels))
    else:
        factor = t.known[weight_scale].float() * t.known[weight].flatten()
        shift = t.known[bias] * (t.known[input_scale] * t.known[weight_scale])
        real = graph.add("DequantizeLinear", _side(graph, levels, own, SIGNED))
        product = graph.add("Mul", [real, graph.constant(factor.cpu().numpy(), np.float32)])
        total = graph.add("Add", [product, graph.constant(shift.cpu().numpy(), np.float32)])
        name = graph.add("QuantizeLinear", [total, *_side(graph, "", to, SIGNED)[1:]])
        graph.mark(name, rows)
    give_grid(t, node, graph.shaped(name, rows), to)


def _turned(t: Translation, weight: Node) -> str:
    """int8 [K, N], as the kernels read it; of a table that embeds tokens too, [N, K] is stored."""
    if len(weight.users) > 1:
        return t.graph.once("Transpose", [t.full(weight)], perm=[1, 0])
    return t.graph.weight(f"{t.label(weight)}.T", t.known[weight].T.contiguous().cpu().numpy())


def _scale(t: Translation, rows: str, input_scale: Any) -> str:
    """The activations' scale, made of this very batch."""
    graph = t.graph
    if input_scale is not None:
        return graph.shaped(t.name(input_scale), ())
    highest = graph.once("ReduceMax", [rows], keepdims=0)
    lowest = graph.once("Neg", [graph.once("ReduceMin", [rows], keepdims=0)])
    largest = graph.once("Max", [highest, lowest, graph.constant(FLOOR, np.float32)])
    return graph.once("Div", [largest, graph.constant(127, np.float32)])


def _fused(graph: Graph, x: tuple[str, str, str], weight: tuple[str, Any], bias: str) -> str:
    """[N, K] -> [N, out], from bytes, their scale and zero point; int8 and its scale; and bias."""
    name, scale, zero = x
    inputs = [name, weight[0], scale, graph.constant(weight[1], np.float32), zero]
    return graph.add(f"{CONTRIB}.MatMulIntegerToFloat", [*inputs, *(["", bias] if bias else [])])


def _standard(graph: Graph, x: tuple[str, str, str], weight: tuple[str, Any], bias: str) -> str:
    """The same with standard operators, [N, K] -> [1, N, out]."""
    name, scale, zero = x
    # Of three axes, since ONNX Runtime makes a Gemm of a product of two and a bias, before it looks
    # for products to be done in integers, and then it multiplies floats.
    name = graph.shaped(name, (1, *graph.dims(name)))
    activations = graph.once("DequantizeLinear", [name, scale, zero])
    factors = graph.constant(weight[1], np.float32)
    zeros = graph.constant(np.zeros_like(weight[1]), np.int8)
    weights = graph.once("DequantizeLinear", [weight[0], factors, zeros], axis=1)
    product = graph.add("MatMul", [activations, weights])
    return graph.add("Add", [product, bias]) if bias else product
