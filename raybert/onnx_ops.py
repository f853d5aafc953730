"""PyTorch's operators, as `torch.export` traces them, in ONNX's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from raybert import onnx_int8, onnx_skip
from raybert.onnx_graph import TYPES, Dims, Translation, dims_of
from raybert.onnx_int8 import pads

Handler = Callable[[Translation, Node], None]


def argument(node: Node, place: int, name: str, default: Any = None) -> Any:
    """An argument of a traced call, wherever it was given."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _node(value: Any) -> Node:
    assert isinstance(value, Node)
    return value


# -- values that stay what they are ----------------------------------------------------------------


def _nothing(t: Translation, node: Node) -> None:
    """A check, or a size, which shapes know of."""


def _same(t: Translation, node: Node) -> None:
    """The same elements in the same order, under any shape."""
    t.alias(node, _node(node.args[0]))


def _cast(t: Translation, node: Node) -> None:
    source = _node(node.args[0])
    wanted = node.meta["val"].dtype
    if source.meta["val"].dtype == wanted:
        t.alias(node, source)
    else:
        name = t.graph.add("Cast", [t.name(source)], to=TYPES[wanted])
        t.set(node, name, t.stored(source))


def _expand(t: Translation, node: Node) -> None:
    source, dims = _node(node.args[0]), dims_of(node.meta["val"])
    if dims_of(source.meta["val"]) == dims:
        t.alias(node, source)
    else:
        t.set(node, t.graph.add("Expand", [t.full(source), t.graph.sizes(dims)]))


# -- element by element ----------------------------------------------------------------------------


def _unary(op: str, **attributes: Any) -> Handler:
    def handler(t: Translation, node: Node) -> None:
        source = _node(node.args[0])
        t.set(node, t.graph.add(op, [t.name(source)], **attributes), t.stored(source))

    return handler


def _gelu(t: Translation, node: Node) -> None:
    form = argument(node, 1, "approximate", "none")
    _unary("Gelu", approximate=form)(t, node)


def _silu(t: Translation, node: Node) -> None:
    """``x * sigmoid(x)``: ONNX has no operator of this opset for it."""
    name = t.name(_node(node.args[0]))
    product = t.graph.add("Mul", [name, t.graph.add("Sigmoid", [name])])
    t.set(node, product, t.graph.dims(name))


def _typed(t: Translation, value: Any, name: str, dtype: torch.dtype) -> str:
    """A tensor in another type, where it has not got it."""
    if value.meta["val"].dtype == dtype:
        return name
    return t.graph.mark(t.graph.once("Cast", [name], to=TYPES[dtype]), t.graph.dims(name))


def pair(t: Translation, node: Node, a: Any, b: Any, dtype: torch.dtype) -> tuple[str, str, Dims]:
    """Two operands that broadcast against each other, and the shape of the result as stored."""
    if not isinstance(a, Node):
        name, other, dims = pair(t, node, b, a, dtype)
        return other, name, dims
    if not isinstance(b, Node):
        scalar = t.graph.constant(b, np.dtype(str(dtype).removeprefix("torch.")))
        return _typed(t, a, t.name(a), dtype), scalar, t.stored(a)
    if len(dims_of(a.meta["val"])) < len(dims_of(b.meta["val"])):
        other, name, dims = pair(t, node, b, a, dtype)
        return name, other, dims
    own, theirs = dims_of(a.meta["val"]), dims_of(b.meta["val"])
    if own == theirs:
        dims = t.stored(a)
        names = t.name(a), t.graph.shaped(t.name(b), dims)
    elif theirs in ((), (1,), own[-1:]) and t.stored(a)[-1:] == own[-1:]:
        dims = t.stored(a)  # a vector for every row, or one number
        names = t.name(a), t.full(b)
    else:
        dims = dims_of(node.meta["val"])
        names = t.full(a), t.full(b)
    return _typed(t, a, names[0], dtype), _typed(t, b, names[1], dtype), dims


def _binary(op: str) -> Handler:
    def handler(t: Translation, node: Node) -> None:
        a, b = node.args[:2]
        assert node.kwargs.get("alpha", 1) == 1
        x, y, dims = pair(t, node, a, b, node.meta["val"].dtype)
        t.set(node, t.graph.add(op, [x, y]), dims)

    return handler


def _addcmul(t: Translation, node: Node) -> None:
    total, one, factor = node.args[:3]
    assert node.kwargs.get("value", 1) == 1
    x, y, dims = pair(t, node, one, factor, node.meta["val"].dtype)
    product = t.graph.mark(t.graph.add("Mul", [x, y]), dims)
    start = _node(total)
    vector = len(dims_of(start.meta["val"])) == 1
    other = t.full(start) if vector else t.graph.shaped(t.name(start), dims)
    t.set(node, t.graph.add("Add", [product, other]), dims)


def _clamp(t: Translation, node: Node) -> None:
    source = _node(node.args[0])
    wanted = node.meta["val"].dtype
    kind = np.dtype(str(wanted).removeprefix("torch."))
    given = [argument(node, place, name) for place, name in ((1, "min"), (2, "max"))]
    name = _typed(t, source, t.name(source), wanted)
    if any(isinstance(bound, Node) and dims_of(bound.meta["val"]) for bound in given):
        for op, bound in zip(("Max", "Min"), given, strict=True):  # Clip takes scalars alone
            name = t.graph.add(op, [name, t.name(_node(bound))])
        t.set(node, name, t.stored(source))
        return
    bounds = []
    for bound in given:
        if isinstance(bound, Node):
            bounds.append(t.graph.shaped(t.name(bound), ()))
        else:
            bounds.append("" if bound is None else t.graph.constant(bound, kind))
    t.set(node, t.graph.add("Clip", [name, *bounds]), t.stored(source))


def _reduce(op: str) -> Handler:
    def handler(t: Translation, node: Node) -> None:
        source, axes = _node(node.args[0]), argument(node, 1, "dim", ())
        keep = int(argument(node, 2, "keepdim", False))
        inputs = [t.full(source), t.graph.constant(axes)] if axes else [t.name(source)]
        t.set(node, t.graph.add(op, inputs, keepdims=keep if axes else 0))

    return handler


def _shift(t: Translation, node: Node) -> None:
    x, y, dims = pair(t, node, node.args[0], node.args[1], node.meta["val"].dtype)
    t.set(node, t.graph.add("BitShift", [x, y], direction="RIGHT"), dims)


def _not_equal(t: Translation, node: Node) -> None:
    source = _node(node.args[0])
    x, y, dims = pair(t, node, source, node.args[1], source.meta["val"].dtype)
    t.set(node, t.graph.add("Not", [t.graph.add("Equal", [x, y])]), dims)


def _at_least(t: Translation, node: Node) -> None:
    a, b = node.args[:2]
    x, y, dims = pair(t, node, a, b, _node(a).meta["val"].dtype)
    t.set(node, t.graph.add("GreaterOrEqual", [x, y]), dims)


# -- matrix products, norms, attention -------------------------------------------------------------


def _linear(t: Translation, node: Node) -> None:
    source, weight = _node(node.args[0]), _node(node.args[1])
    bias = argument(node, 2, "bias")
    inputs = [t.rows(source), t.full(weight)] + ([t.full(bias)] if bias is not None else [])
    dims = dims_of(node.meta["val"])
    # The weight stays [out, in], as the model has it: a tied one is stored once.
    product = t.graph.add("Gemm", inputs, transB=1)
    t.set(node, product, dims if len(dims) <= 2 else (-1, dims[-1]))


def _layer_norm(t: Translation, node: Node) -> None:
    source, shape = _node(node.args[0]), node.args[1]
    assert isinstance(shape, (list, tuple))
    assert len(shape) == 1
    weights = [t.full(_node(node.args[place])) for place in (2, 3)]
    epsilon = argument(node, 4, "eps", 1e-5)
    name = t.graph.add("LayerNormalization", [t.rows(source), *weights], epsilon=epsilon, axis=-1)
    t.set(node, name, t.graph.dims(t.rows(source)))


def _softmax(t: Translation, node: Node) -> None:
    t.set(node, t.graph.add("Softmax", [t.full(_node(node.args[0]))], axis=node.args[1]))


def _matmul(t: Translation, node: Node) -> None:
    a, b = _node(node.args[0]), _node(node.args[1])
    t.set(node, t.graph.add("MatMul", [t.full(a), t.full(b)]))


def _joined(t: Translation, value: Node) -> str:
    """[B, A, T, D] as [B, T, A * D], which it mostly was before."""
    batch, heads, length, width = dims_of(value.meta["val"])
    if value in t.swapped:
        name = t.swapped[value]
    else:
        name = t.graph.once("Transpose", [t.full(value)], perm=[0, 2, 1, 3])
        t.graph.mark(name, (batch, length, heads, width))
    assert isinstance(heads, int)
    assert isinstance(width, int)
    return t.graph.shaped(name, (batch, length, heads * width))


def _attention(t: Translation, node: Node) -> None:
    query, key, value = (_node(arg) for arg in node.args[:3])
    mask, scale = argument(node, 3, "attn_mask"), node.kwargs.get("scale")
    batch, heads, length, width = dims_of(query.meta["val"])
    assert isinstance(heads, int)
    assert isinstance(width, int)
    inputs = [_joined(t, part) for part in (query, key, value)]
    if mask is not None:
        inputs.append(t.for_each_query(mask, length))
    out = t.graph.add(
        "Attention",
        inputs,
        q_num_heads=heads,
        kv_num_heads=heads,
        scale=width**-0.5 if scale is None else scale,
    )
    t.graph.mark(out, (batch, length, heads * width))
    t.swapped[node] = out
    apart = t.graph.shaped(out, (batch, length, heads, width))
    t.set(node, t.graph.add("Transpose", [apart], perm=[0, 2, 1, 3]))


def _transpose(t: Translation, node: Node) -> None:
    source = _node(node.args[0])
    rank = len(dims_of(source.meta["val"]))
    first, second = (int(axis) % rank for axis in node.args[1:3])  # type: ignore[call-overload]
    order = list(range(rank))
    order[first], order[second] = second, first
    if {first, second} == {1, 2} and source in t.swapped:
        t.set(node, t.swapped[source], t.graph.dims(t.swapped[source]))
        return
    if {first, second} == {2, 3} and source in t.swapped:  # both at once
        parts = dims_of(source.meta["val"])
        name = t.graph.shaped(t.swapped[source], (parts[0], parts[2], parts[1], parts[3]))
        t.set(node, t.graph.add("Transpose", [name], perm=[0, 2, 3, 1]))
        return
    if {first, second} == {1, 2} and rank == 4:
        t.swapped[node] = t.name(source)
    t.set(node, t.graph.add("Transpose", [t.full(source)], perm=order))


# -- parts and wholes ------------------------------------------------------------------------------


def _topk(t: Translation, node: Node) -> None:
    source, count, axis = _node(node.args[0]), node.args[1], argument(node, 2, "dim", -1)
    assert isinstance(count, int)
    inputs = [t.full(source), t.graph.constant([count])]
    _give(t, node, t.graph.add("TopK", inputs, outputs=2, axis=axis), rows=False)


def _embedding(t: Translation, node: Node) -> None:
    table, ids = _node(node.args[0]), _node(node.args[1])
    t.set(node, t.graph.add("Gather", [t.full(table), t.full(ids)]))


def _gather(t: Translation, node: Node) -> None:
    source, axis, index = _node(node.args[0]), int(argument(node, 1, "dim")), _node(node.args[2])
    t.set(node, t.graph.add("GatherElements", [t.full(source), t.full(index)], axis=axis))


def _index(t: Translation, node: Node) -> None:
    table, indices = _node(node.args[0]), node.args[1]
    assert isinstance(indices, (list, tuple))
    (ids,) = indices
    t.set(node, t.graph.add("Gather", [t.full(table), t.full(_node(ids))]))


def _select(t: Translation, node: Node) -> None:
    source, axis, index = _node(node.args[0]), node.args[1], node.args[2]
    place = t.graph.constant(index)
    held = t.grids.get(onnx_int8.origin(source))
    if held is None:
        t.set(node, t.graph.add("Gather", [t.full(source), place], axis=axis))
        return
    levels, scale, _ = held  # picked as integers, so that it stays on its grid
    name = t.graph.add(
        "Gather", [t.graph.shaped(levels, dims_of(source.meta["val"])), place], axis=axis
    )
    onnx_int8.give_grid(t, node, t.graph.mark(name, dims_of(node.meta["val"])), scale)


def _slice(t: Translation, node: Node) -> None:
    source, axis = _node(node.args[0]), argument(node, 1, "dim", 0)
    start, end = argument(node, 2, "start") or 0, argument(node, 3, "end")
    dims = dims_of(node.meta["val"])
    if dims == dims_of(source.meta["val"]):
        t.alias(node, source)
        return
    assert (argument(node, 4, "step", 1), start) == (1, 0)
    assert end is not None
    graph = t.graph
    bounds = [graph.constant([0]), graph.sizes((dims[axis],)), graph.constant([axis])]
    t.set(node, graph.add("Slice", [t.full(source), *bounds]))


def _first_of(t: Translation, node: Node) -> None:
    """``index_select`` of the first entries along an axis."""
    source, axis, index = _node(node.args[0]), int(argument(node, 1, "dim")), _node(node.args[2])
    assert str(index.target) == "aten.arange.default"
    graph = t.graph
    bounds = [graph.constant([0]), graph.sizes(dims_of(index.meta["val"])), graph.constant([axis])]
    t.set(node, graph.once("Slice", [t.full(source), *bounds]))


def _pad(t: Translation, node: Node) -> None:
    """Zeros behind one axis, up to a fixed size."""
    assert argument(node, 3, "value", 0.0) in (None, 0.0)
    t.set(node, t.graph.add("Pad", [t.full(_node(node.args[0])), pads(t, node)]))


def _where(t: Translation, node: Node) -> None:
    kept, value, other = node.args[:3]
    scalar = t.graph.constant(other, np.dtype(str(node.meta["val"].dtype).removeprefix("torch.")))
    t.set(node, t.graph.add("Where", [t.full(_node(kept)), t.full(_node(value)), scalar]))


def _split(t: Translation, node: Node) -> None:
    source, axis = _node(node.args[0]), argument(node, 2, "dim", 0)
    parts = node.meta["val"]
    rank = len(dims_of(source.meta["val"]))
    last = axis % rank == rank - 1
    name = t.rows(source) if last else t.full(source)
    sizes = t.graph.constant([part.shape[axis] for part in parts])
    names = t.graph.add(
        "Split", [name, sizes], outputs=len(parts), axis=-1 if last else axis % rank
    )
    _give(t, node, names if len(parts) > 1 else [names], rows=last)


def _give(t: Translation, node: Node, names: list[str], *, rows: bool) -> None:
    """Hand the parts to the values that pick them."""
    for user in node.users:
        place = user.args[1]
        assert isinstance(place, int)
        dims = dims_of(user.meta["val"])
        t.set(user, names[place], (-1, dims[-1]) if rows and len(dims) > 2 else dims)


def _unbind(t: Translation, node: Node) -> None:
    source, axis = _node(node.args[0]), argument(node, 1, "dim", 0)
    names = [
        t.graph.add("Gather", [t.full(source), t.graph.constant(place)], axis=axis)
        for place in range(len(node.meta["val"]))
    ]
    _give(t, node, names, rows=False)


def _stack(t: Translation, node: Node) -> None:
    values, axis = node.args[0], argument(node, 1, "dim", 0)
    dims = list(dims_of(node.meta["val"]))
    dims[axis] = 1
    assert isinstance(values, (list, tuple))
    names = [t.graph.shaped(t.name(_node(value)), tuple(dims)) for value in values]
    t.set(node, t.graph.add("Concat", names, axis=axis))


def _concat(t: Translation, node: Node) -> None:
    values, axis = node.args[0], argument(node, 1, "dim", 0)
    assert isinstance(values, (list, tuple))
    t.set(node, t.graph.add("Concat", [t.full(_node(value)) for value in values], axis=axis))


def _cumsum(t: Translation, node: Node) -> None:
    source = _node(node.args[0])
    name = _typed(t, source, t.full(source), node.meta["val"].dtype)
    t.set(node, t.graph.add("CumSum", [name, t.graph.constant(node.args[1])]))


HANDLERS: dict[str, Handler] = {
    "aten.sym_size.int": _nothing,
    "aten.arange.default": _nothing,
    "<built-in function sub>": _nothing,
    "aten._assert_tensor_metadata.default": _nothing,
    "aten.dropout.default": _same,
    "aten.contiguous.default": _same,
    "aten.clone.default": _same,
    "aten.alias.default": _same,
    "aten.lift_fresh_copy.default": _same,
    "aten.detach.default": _same,
    "aten.view.default": _same,
    "aten._unsafe_view.default": _same,
    "aten.reshape.default": _same,
    "aten.flatten.using_ints": _same,
    "aten.squeeze.dim": _same,
    "aten.unsqueeze.default": _same,
    "aten.view_as.default": _same,
    "aten.to.device": _cast,
    "aten.to.dtype": _cast,
    "aten.to.dtype_layout": _cast,
    "aten._to_copy.default": _cast,
    "aten.type_as.default": _cast,
    "aten.expand.default": _expand,
    "aten.relu.default": _unary("Relu"),
    "aten.tanh.default": _unary("Tanh"),
    "aten.sigmoid.default": _unary("Sigmoid"),
    "aten.silu.default": _silu,
    "aten.erf.default": _unary("Erf"),
    "aten.exp.default": _unary("Exp"),
    "aten.sqrt.default": _unary("Sqrt"),
    "aten.abs.default": _unary("Abs"),
    "aten.neg.default": _unary("Neg"),
    "aten.round.default": _unary("Round"),
    "aten.gelu.default": _gelu,
    "aten.clamp.default": _clamp,
    "aten.clamp.Tensor": _clamp,
    "aten.amax.default": _reduce("ReduceMax"),
    "aten.amin.default": _reduce("ReduceMin"),
    "aten.sum.dim_IntList": _reduce("ReduceSum"),
    "aten.add.Tensor": _binary("Add"),
    "aten.add.Scalar": _binary("Add"),
    "aten.sub.Tensor": _binary("Sub"),
    "aten.pow.Tensor_Scalar": _binary("Pow"),
    "aten.mul.Tensor": _binary("Mul"),
    "aten.mul.Scalar": _binary("Mul"),
    "aten.div.Tensor": _binary("Div"),
    "aten.div.Scalar": _binary("Div"),
    "aten.maximum.default": _binary("Max"),
    "aten.bitwise_and.Scalar": _binary("BitwiseAnd"),
    "aten.__and__.Scalar": _binary("BitwiseAnd"),
    "aten.__rshift__.Tensor": _shift,
    "aten.bitwise_right_shift.Tensor": _shift,
    "aten.addcmul.default": _addcmul,
    "aten.ne.Scalar": _not_equal,
    "aten.ge.Scalar": _at_least,
    "aten.ge.Tensor": _at_least,
    "aten.topk.default": _topk,
    "aten.linear.default": _linear,
    "aten.layer_norm.default": _layer_norm,
    "aten.softmax.int": _softmax,
    "aten.matmul.default": _matmul,
    "aten.bmm.default": _matmul,
    "aten.mm.default": _matmul,
    "aten.scaled_dot_product_attention.default": _attention,
    "aten.transpose.int": _transpose,
    "aten.embedding.default": _embedding,
    "aten.gather.default": _gather,
    "aten.index.Tensor": _index,
    "aten.select.int": _select,
    "aten.slice.Tensor": _slice,
    "aten.index_select.default": _first_of,
    "aten.pad.default": _pad,
    "aten.split.Tensor": _split,
    "aten.split_with_sizes.default": _split,
    "aten.chunk.default": _split,
    "aten.unbind.int": _unbind,
    "aten.stack.default": _stack,
    "aten.cat.default": _concat,
    "aten.cumsum.default": _cumsum,
    "aten.where.ScalarOther": _where,
    "raybert.kept_feed_forward.default": onnx_skip.kept_feed_forward,
    "raybert.kept_attention.default": onnx_skip.kept_attention,
    "raybert.linear_int8.default": onnx_int8.linear_int8,
    "raybert.on_grid.default": onnx_int8.on_grid,
    "raybert.product_int8.default": onnx_int8.product_int8,
    "raybert.norm_int8.default": onnx_int8.norm_int8,
}
"""Traced operator -> what adds it to the graph."""
