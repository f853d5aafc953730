"""The last layer of a classifier, computed for the one token that its head reads.

A head on [CLS] leaves every other token of the last layer unused, but for its keys and values. So
queries, output projection and feed-forward of that layer are computed for the first token alone:
the same logits and gradients, for a model of L layers at about 1 / L less work. Exported graphs do
the same (`raybert.onnx_first`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.distilbert.modeling_distilbert import TransformerBlock
from transformers.models.roberta.modeling_roberta import RobertaLayer

from raybert.attention import PROJECTED, attend
from raybert.int8 import Int8Linear
from raybert.surgery import after_attention, encoder_layers, ffn_block, self_attention

LAYERS = (BertLayer, RobertaLayer, TransformerBlock)
"""The stock layers whose steps are known here."""


@contextlib.contextmanager
def first_token_only(model: nn.Module) -> Iterator[None]:
    """Inside the context, the encoder's last layer gives [B, 1, H]: the first token's output.

    A last layer that is not stock, or whose attention a method has made its own (but for other
    projections), stays as it is; so does one whose inputs are scaled by all tokens together.

    Args:
        model: with a head that reads the first token.
    """
    known = {*PROJECTED, *PROJECTED.values()}
    chosen: list[Any] = [
        layer
        for layer in _stock_layers(encoder_layers(model)[-1])
        if type(self_attention(layer)) in known
        and "forward" not in vars(layer)
        and not any(_of_all_tokens(module) for module in layer.modules())
    ]
    for layer in chosen:
        layer.forward = functools.partial(_forward, layer)
    try:
        yield
    finally:
        for layer in chosen:
            del layer.forward


def _of_all_tokens(module: nn.Module) -> bool:
    """Whether a linear layer scales its inputs by the largest of all tokens."""
    return isinstance(module, Int8Linear) and module.scheme.inputs == "dynamic"


def _stock_layers(module: nn.Module) -> list[nn.Module]:
    """The module, or of a container that holds alternatives, the last layer of each."""
    if type(module) in LAYERS:
        return [module]
    children = list(module.children())
    if isinstance(module, nn.ModuleList):
        children = children[-1:]
    return [layer for child in children for layer in _stock_layers(child)]


def _forward(
    layer: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any, **kwargs: Any
) -> Tensor:
    """hidden_states [B, T, H] -> [B, 1, H]. An encoder's layer has no use for what else it gets."""
    attention: Any = self_attention(layer)
    first = hidden_states[:, :1]
    stock = PROJECTED.get(type(attention))
    if stock is None:
        query, key, value = attention.project(hidden_states)
        query = query[:, :1]
    else:
        query, key, value = (attention.get_submodule(name) for name in stock.dense)
        query, key, value = query(first), key(hidden_states), value(hidden_states)
    size = attention.attention_head_size
    qkv = [part.unflatten(-1, (-1, size)).transpose(1, 2) for part in (query, key, value)]
    mask = None if attention_mask is None else attention_mask[:, :, :1]
    context, _ = attend(attention, qkv, mask, **kwargs)  # [B, 1, A, D]
    return ffn_block(layer, after_attention(layer, context.flatten(2), first))
