"""Where BERT, RoBERTa and DistilBERT keep their parts, and how to exchange them.

Methods reach into a model through these functions alone, so a new model family is taught here once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

FAMILIES = {"bert": "bert", "roberta": "roberta", "distilbert": "distilbert"}
"""Hugging Face ``model_type`` -> name of the backbone inside a model with a head."""

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""What a model reads of a batch, each [B, T]; not every model has the last."""

COMPRESSED_PREFIX = "raybert_"
"""What the ``model_type`` of a compressed class begins with."""


def family(config: Any) -> str:
    """The family of a Hugging Face config, compressed or not (``bert``, ``roberta``,
    ``distilbert``)."""
    return config.model_type.removeprefix(COMPRESSED_PREFIX)


def compressed_by(config: Any) -> list[dict[str, Any]]:
    """The methods that changed the structure of a config's model, as they were saved, in order."""
    return list(vars(config).get("compression") or [])


def takes_token_types(config: Any) -> bool:
    """Whether a config's model reads which part of a pair a token belongs to: DistilBERT does not,
    and where there is one type alone, all tokens are of it."""
    return family(config) != "distilbert" and config.type_vocab_size > 1


def model_inputs(
    model: Any, batch: Mapping[str, Any], names: Sequence[str] = INPUTS
) -> dict[str, Any]:
    """What a model reads of a batch, by default without labels.

    A batch may hold more: teacher and student read the same one, and one of them may take
    token_type_ids.
    """
    types = takes_token_types(model.config)
    wanted = [name for name in names if name in batch]
    return {name: batch[name] for name in wanted if types or name != "token_type_ids"}


def sizes(config: Any) -> dict[str, int]:
    """Layers, width, heads and the feed-forward's inner width of a Hugging Face config."""
    distil = family(config) == "distilbert"
    return {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "inner": config.hidden_dim if distil else config.intermediate_size,
    }


def swap(
    model: nn.Module,
    select: Callable[[str, nn.Module], bool],
    make: Callable[[str, nn.Module], nn.Module],
) -> int:
    """Put another module in the place of every one that is selected.

    Hooks on the old module are carried over, since transformers installs its own but once a model.
    What stands below a module that was exchanged is left to ``make``. A module that stands in
    several places is exchanged for one.

    Args:
        model: where to look.
        select: whether the module of this name is exchanged.
        make: the new module, made of the old one and its name; it adopts children and parameters.

    Returns:
        How many were exchanged.

    Raises:
        ValueError: none was selected.
    """
    made: dict[int, nn.Module] = {}

    def visit(parent: nn.Module, path: str) -> None:
        for key, child in list(parent.named_children()):
            name = f"{path}.{key}" if path else key
            if id(child) in made:
                setattr(parent, key, made[id(child)])
            elif select(name, child):
                made[id(child)] = new = make(name, child)
                new._forward_hooks = child._forward_hooks
                new._forward_hooks_with_kwargs = child._forward_hooks_with_kwargs
                new._forward_hooks_always_called = child._forward_hooks_always_called
                new.train(child.training)
                setattr(parent, key, new)
            else:
                visit(child, name)

    visit(model, "")
    if not made:
        raise ValueError("no module was selected to be exchanged")
    return len(made)


def backbone(model: nn.Module) -> nn.Module:
    """The encoder below the head: the module that holds ``embeddings`` and the layers."""
    return model.get_submodule(FAMILIES[family(model.config)])


def embeddings(model: nn.Module) -> nn.Module:
    """The embeddings of a model with a head."""
    return backbone(model).get_submodule("embeddings")


def layer_holder(model: nn.Module) -> nn.Module:
    """The module that holds the encoder's layers, and what is theirs in common."""
    distil = family(model.config) == "distilbert"
    return backbone(model).get_submodule("transformer" if distil else "encoder")


def encoder_layers(model: nn.Module) -> nn.ModuleList:
    """The encoder's layers in order; each maps hidden_states [B, T, H] to [B, T, H]."""
    layers = layer_holder(model).get_submodule("layer")
    assert isinstance(layers, nn.ModuleList)
    return layers


def set_encoder_layers(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Put other layers in the encoder. The modules are adopted, not copied, hooks included."""
    layer_holder(model).layer = nn.ModuleList(layers)


def set_depth(model: Any) -> None:
    """Make the config, and what the layers know of their place, agree with the layers there are."""
    layers = encoder_layers(model)
    model.config.num_hidden_layers = len(layers)  # DistilBERT maps this name to its own
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if "layer_idx" in vars(module):
                vars(module)["layer_idx"] = index


MATRICES = ("query", "key", "value", "attention_output", "intermediate", "output")
"""A layer's six weight matrices, as raybert calls them in every family."""


def matrices(layer: Any) -> dict[str, nn.Linear]:
    """The linear maps of a stock layer, by their names in `MATRICES`."""
    if "sa_layer_norm" in dict(layer.named_children()):  # DistilBERT
        attention, ffn = layer.attention, layer.ffn
        found = (attention.q_lin, attention.k_lin, attention.v_lin, attention.out_lin)
        return dict(zip(MATRICES, (*found, ffn.lin1, ffn.lin2), strict=True))
    own, joined = layer.attention.self, layer.attention.output.dense
    found = (own.query, own.key, own.value, joined, layer.intermediate.dense, layer.output.dense)
    return dict(zip(MATRICES, found, strict=True))


def self_attention(layer: Any) -> nn.Module:
    """The module of a layer whose output is (context [B, T, H], attention [B, A, T, T] or None)."""
    attention = layer.get_submodule("attention")
    return attention if "sa_layer_norm" in dict(layer.named_children()) else attention.self


@contextmanager
def attending(model: Any, implementation: str) -> Iterator[None]:
    """Inside the context a model attends otherwise: ``eager``, ``sdpa`` or what is registered."""
    before = model.config._attn_implementation or "sdpa"
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attention_block(layer: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any):
    """The first half of a layer: attention, residual and norm. [B, T, H] -> [B, T, H]."""
    if "sa_layer_norm" in dict(layer.named_children()):  # DistilBERT
        context, _ = layer.attention(hidden, *args, **kwargs)
        return layer.sa_layer_norm(context + hidden)
    return layer.attention(hidden, *args, **kwargs)[0]


def after_attention(layer: Any, context: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The heads' joined context through the output projection, residual and norm. All [B, T, H]."""
    if "sa_layer_norm" in dict(layer.named_children()):  # DistilBERT
        return layer.sa_layer_norm(layer.attention.out_lin(context) + hidden)
    return layer.attention.output(context, hidden)


def ffn_block(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The second half of a layer: feed-forward, residual and norm. [B, T, H] -> [B, T, H]."""
    if "sa_layer_norm" in dict(layer.named_children()):  # DistilBERT
        return layer.output_layer_norm(layer.ffn(hidden) + hidden)
    return layer.feed_forward_chunk(hidden)


def activation(layer: Any) -> Any:
    """The function between the two matrices of a stock layer's feed-forward."""
    if "sa_layer_norm" in dict(layer.named_children()):  # DistilBERT
        return layer.ffn.activation
    return layer.intermediate.intermediate_act_fn


def set_blocks(layer: Any, attention: nn.Module, feed_forward: nn.Module) -> None:
    """Put others in the place of a stock layer's attention and feed-forward.

    Each holds its output projection. Residuals, norms and dropouts stay the layer's.

    Args:
        layer: of any family.
        attention: its forward is the stock one's, but that it maps to [B, T, H] through the output
            projection; an instance of the stock class, whose hooks it has.
        feed_forward: maps [B, T, H] to [B, T, H].
    """
    if "sa_layer_norm" in dict(layer.named_children()):  # DistilBERT
        dropout = layer.ffn.dropout
        layer.attention, layer.ffn = attention, nn.Sequential(feed_forward, dropout)
        return
    layer.attention.self, layer.attention.output.dense = attention, nn.Identity()
    layer.intermediate, layer.output.dense = feed_forward, nn.Identity()


def set_activation(layer: Any, function: nn.Module) -> None:
    """Put another function between the two linear maps of a layer's feed-forward block."""
    if "sa_layer_norm" in dict(layer.named_children()):  # DistilBERT
        layer.ffn.activation = function
    else:
        layer.intermediate.intermediate_act_fn = function
