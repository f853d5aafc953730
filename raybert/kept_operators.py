"""EBERT's blocks as one operator each, for raybert's own traces.

`raybert.onnx_skip` writes them such that units which no sample keeps are left out; run in PyTorch
they compute all and multiply by zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Any] = {
    "Gelu": F.gelu,
    "GeluTanh": lambda x: F.gelu(x, approximate="tanh"),
    "Relu": F.relu,
    "Tanh": torch.tanh,
}
"""Those that a feed-forward can have which is one operator of a traced model."""

ACTIVATION_OF = {
    "GELUActivation": "Gelu",
    "NewGELUActivation": "GeluTanh",
    "GELUTanh": "GeluTanh",
    "FastGELUActivation": "GeluTanh",
    "AccurateGELUActivation": "GeluTanh",
    "ReLU": "Relu",
    "Tanh": "Tanh",
}
"""Class of an activation as transformers makes it -> its name in ``ACTIVATIONS``."""

_tracing: ContextVar[bool] = ContextVar("tracing", default=False)


@contextlib.contextmanager
def blocks_as_operators() -> Iterator[None]:
    """Inside the context, blocks that skip are one operator each, for `raybert.onnx_skip`; other
    traces are of operators that everyone knows, and multiply by zero."""
    token = _tracing.set(True)
    try:
        yield
    finally:
        _tracing.reset(token)


def wanted() -> bool:
    """Whether a trace is under way that knows these operators."""
    return _tracing.get()


@torch.library.custom_op("raybert::kept_feed_forward", mutates_args=())
def kept_feed_forward(
    hidden: Tensor,
    keep: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    out_bias: Tensor,
    activation: str,
) -> Tensor:
    """A feed-forward of the neurons that each sample keeps, as it stands in a traced model.

    Args:
        hidden: [B, T, H].
        keep: [B, N].
        weight, bias: of the N neurons [1, N, 1, H], [1, N, 1].
        out, out_bias: [N, 1, H], [H].
        activation: a name in ``ACTIVATIONS``.

    Returns:
        [B, T, H].
    """
    y = ACTIVATIONS[activation](F.linear(hidden, weight.flatten(0, 2), bias.flatten()))
    return F.linear(y * keep.to(y.dtype)[:, None, :], out.flatten(0, 1).t(), out_bias)


@torch.library.custom_op("raybert::kept_attention", mutates_args=())
def kept_attention(
    queries: Tensor,
    hidden: Tensor,
    keep: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    out_bias: Tensor,
    scale: float,
) -> Tensor:
    """Attention of the heads that each sample keeps, as it stands in a traced model.

    Args:
        queries: what queries are made of [B, T', H].
        hidden: what keys and values are made of [B, T, H].
        keep: [B, N].
        mask: [B, 1, 1, T], true where a key is real.
        weight, bias: queries, keys and values of the N heads [3, N, D, H], [3, N, D].
        out, out_bias: [N, D, H], [H].
        scale: of the scores.

    Returns:
        [B, T', H].
    """
    count, width = out.shape[:2]
    sources = (queries, hidden, hidden)
    parts = [
        F.linear(source, weight[part].flatten(0, 1), bias[part].flatten())
        .unflatten(-1, (count, width))
        .transpose(1, 2)
        for part, source in enumerate(sources)
    ]
    context = F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale)
    context = (context * keep.to(context.dtype)[:, :, None, None]).transpose(1, 2).flatten(2)
    return F.linear(context, out.flatten(0, 1).t(), out_bias)


@kept_feed_forward.register_fake
def _(hidden: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(hidden)


@kept_attention.register_fake
def _(queries: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(queries)
