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
The parity check of `raybert.export` sees such a model and refuses it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.fx import Node

from raybert.int8 import FLOOR
from raybert.onnx_graph import CONTRIB, Graph, Translation


def linear_int8(t: Translation, node: Node) -> None:
    """``raybert::linear_int8(x, weight, weight_scale, input_scale, bias)``; see `raybert.int8`.

    Activations are [N, K] bytes, weights [K, N] int8.
    """
    arguments: tuple[Any, ...] = (*node.args, *[None] * (5 - len(node.args)))
    x, weight, weight_scale, input_scale, bias = arguments
    graph, rows = t.graph, t.rows(x)
    dims = (*graph.dims(rows)[:-1], len(t.known[weight]))
    scale, zero = _scale(t, rows, input_scale), graph.constant(128, np.uint8)
    fused = t.int8 == "fused"
    # ONNX Runtime has its own for longer than ONNX's of this opset: since 1.23.
    op = f"{CONTRIB}.QuantizeLinear" if fused else "QuantizeLinear"
    quantised = graph.mark(graph.once(op, [rows, scale, zero]), graph.dims(rows))
    own = t.known[weight_scale].float().flatten().cpu().numpy()  # [1] or [N]
    product = _fused if fused else _standard
    name = product(
        graph,
        (quantised, scale, zero),
        (_turned(t, weight), own[0] if len(own) == 1 else own),
        t.full(bias) if bias is not None else "",
    )
    t.set(node, graph.shaped(graph.mark(name, dims if fused else (1, *dims)), dims), dims)


def _turned(t: Translation, weight: Node) -> str:
    """int8 [K, N], as the kernels read it; of a table that embeds tokens too, [N, K] is stored."""
    if len(weight.users) > 1:
        return t.graph.once("Transpose", [t.full(weight)], perm=[1, 0])
    return t.graph.weight(f"{t.label(weight)}.T", t.known[weight].T.contiguous().cpu().numpy())


def _scale(t: Translation, rows: str, input_scale: Any) -> str:
    """The activations' scale: the learned one, or made of this very batch."""
    graph = t.graph
    if input_scale in t.known:
        return graph.constant(t.known[input_scale].float().reshape(()).cpu().numpy(), np.float32)
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
