"""A finished model as an ONNX graph: traced by `torch.export`, written by `raybert.onnx_ops`."""

from __future__ import annotations

import gc
import logging
from typing import Any, Literal

import onnx
import torch
from torch.export.graph_signature import InputKind
from torch.fx import Node, map_arg
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from raybert import __version__
from raybert.compressed import longest_input
from raybert.errors import UserError
from raybert.fold import folded
from raybert.kept_operators import blocks_as_operators
from raybert.onnx_first import keep_first
from raybert.onnx_graph import Graph, Translation, dims_of
from raybert.onnx_ops import HANDLERS
from raybert.surgery import INPUTS, attending, takes_token_types
from raybert.timer import LONGEST

Int8 = Literal["fused", "qdq"]

TRACED = "raybert_traced"
"""The attention that models are traced with."""

LARGEST_BATCH = 2**20


def _mask(attention_mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor | None:
    """The padding mask as it is, [B, 1, 1, T], in place of the index arithmetic of the others."""
    return None if attention_mask is None else attention_mask[:, None, None, :]


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Fused attention, always: no choice that the trace would have to take. [B, A, T, D]."""
    context = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling
    )
    return context.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(TRACED, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(TRACED, _mask)


def input_names(model: PreTrainedModel) -> list[str]:
    """What the model's graph takes, each [batch, length]."""
    return [name for name in INPUTS if name != "token_type_ids" or takes_token_types(model.config)]


def to_onnx(model: PreTrainedModel, *, int8: Int8 = "fused") -> onnx.ModelProto:
    """A model in evaluation mode as ONNX, for any batch size and length.

    Args:
        model: on the CPU; its attention implementation is left as it was.
        int8: how integer products are written; see `raybert.onnx_int8`.

    Returns:
        A graph with the inputs of ``input_names`` ([batch, length], int64) and the outputs
        ``logits``, or for question answering ``start_logits`` and ``end_logits``, float32.

    Raises:
        UserError: the model computes something that has no translation.
    """
    graph = translate(trace(folded(model)), int8=int8)
    graph.metadata_props.add(key=LONGEST, value=str(longest_input(model.config)))
    return graph


def translate(program: torch.export.ExportedProgram, *, int8: Int8 = "fused") -> onnx.ModelProto:
    """A traced program as ONNX.

    Args:
        program: is changed. Its inputs are [batch, length], one of them ``input_ids``; it has one
            output, or two, which are the logits of starts and ends.
        int8: see `to_onnx`.

    Raises:
        UserError: see `to_onnx`.
    """
    keep_first(program.graph)
    nodes = {node.name: node for node in program.graph.nodes}
    symbols = dims_of(nodes["input_ids"].meta["val"])
    graph = Graph({str(symbol): axis for axis, symbol in enumerate(symbols)})
    translation = Translation(graph, int8)
    stored = {**program.state_dict, **program.constants}
    signature = program.graph_signature
    kinds = {spec.arg.name: spec for spec in signature.input_specs}
    inputs = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = kinds[node.name]
            if spec.kind == InputKind.USER_INPUT:
                inputs.append(node.name)
                translation.set(node, node.name)
            else:
                assert spec.target is not None
                translation.set_known(node, stored[spec.target], spec.target)
        elif node.op == "call_function":
            _translate(translation, node)
    found = [nodes[str(name)] for name in signature.user_outputs]
    names = ("logits",) if len(found) == 1 else ("start_logits", "end_logits")
    outputs = {
        name: (translation.name(node), dims_of(node.meta["val"]))
        for name, node in zip(names, found, strict=True)
    }
    return graph.model(inputs, outputs, f"raybert {__version__}")


def trace(model: PreTrainedModel) -> torch.export.ExportedProgram:
    """The operators of a model in evaluation mode, with sizes that stand for any batch and
    length."""
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    length = torch.export.Dim("length", min=1, max=longest_input(model.config))
    names = input_names(model)
    # Sizes of 0 and 1 would be traced as such.
    inputs = {name: torch.ones(2, 3, dtype=torch.long) for name in names}
    quiet = logging.getLogger("torch.export")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    # What a finaliser does to tensors would be recorded in the graph: DeepSpeed's engines ask
    # theirs whether they are pinned, whenever the collector comes to them.
    collects = gc.isenabled()
    gc.disable()
    try:
        with attending(model, TRACED), torch.no_grad(), blocks_as_operators():
            return torch.export.export(
                model,
                (),
                inputs,
                dynamic_shapes={name: {0: batch, 1: length} for name in names},
                strict=False,
            )
    finally:
        if collects:
            gc.enable()
        quiet.setLevel(level)


def _translate(translation: Translation, node: Node) -> None:
    """One operator: computed here if no input changes it, else added to the graph."""
    known, target = translation.known, node.target
    inputs = node.all_input_nodes
    if callable(target) and all(value in known for value in inputs):
        args, kwargs = map_arg((node.args, dict(node.kwargs)), known.__getitem__)
        with torch.no_grad():
            value = target(*args, **kwargs)
        if not _unpacks(value, [known[source] for source in inputs]):
            translation.set_known(node, value)
            return
    if str(target) in HANDLERS:
        HANDLERS[str(target)](translation, node)
    elif "getitem" not in str(target):
        raise UserError(
            f"this model cannot be exported: it computes {target}, which raybert does not "
            f"translate to ONNX. Known are the operators of raybert's methods on BERT, RoBERTa and "
            "DistilBERT."
        )


def _unpacks(value: Any, sources: list[Any]) -> bool:
    """Whether a matrix of integers would become one of floats, four times the size in the file."""
    tensors = [source for source in sources if isinstance(source, torch.Tensor)]
    whole = any(not source.is_floating_point() for source in tensors)
    matrix = isinstance(value, torch.Tensor) and value.dim() >= 2
    return matrix and whole and value.is_floating_point()
