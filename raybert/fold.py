"""Affine norms folded into the linear maps around them, residual connections included.

A finished PowerNorm is ``h' = s * (h + f(h)) + t``. Writing the stream of hidden states in another
basis, ``h = D u + c`` with a diagonal D, turns that into ``u' = u + f / D`` with ``D' = s D`` and
``c' = s c + t``: the residual connection is a plain addition, D and c go into the matrices that
read the stream, 1 / D into those that write to it, and the norm is gone. Only the last one is left,
for whatever head reads the model. Where a norm has a bound, cutting off is what is left of it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from raybert.power_norm import PowerNorm
from raybert.softmax_net import MatrixAttention
from raybert.surgery import encoder_layers, matrices, self_attention

LARGEST = 1e12
"""The largest factor, or its inverse, in D; beyond it a norm is kept and D is 1 again."""


class Affine(nn.Module):
    """``x * scale + shift`` with constants [H]."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H] -> [B, T, H]."""
        return torch.addcmul(self.shift, x, self.scale)


class Within(nn.Module):
    """Cuts each channel off at constants [H]."""

    least: Tensor
    most: Tensor

    def __init__(self, one: Tensor, other: Tensor) -> None:
        super().__init__()
        self.register_buffer("least", torch.minimum(one, other))
        self.register_buffer("most", torch.maximum(one, other))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H] -> [B, T, H]."""
        return x.clamp(self.least, self.most)


@torch.no_grad()
def folded(model: Any) -> Any:
    """A model for inference that computes the same with fewer steps; the given one is left alone.

    Models without affine norms, or with matrices that are not plain linear layers, come back as
    they are.
    """
    norms = [module for module in model.modules() if isinstance(module, PowerNorm)]
    layers = list(encoder_layers(model))
    if not norms or not all(_plain(layer) for layer in layers):
        return model
    model = copy.deepcopy(model)
    stream = _Stream(model)
    stream.norm()
    for layer in encoder_layers(model):
        parts, attention = matrices(layer), self_attention(layer)
        for name in ("query", "key", "value"):
            stream.read_by(parts[name])
        _scale(parts["query"], attention)
        stream.written_by(parts["attention_output"])
        stream.norm()
        stream.read_by(parts["intermediate"])
        stream.written_by(parts["output"])
        stream.norm()
    return model


def _plain(layer: Any) -> bool:
    attention = self_attention(layer)
    if not isinstance(attention, MatrixAttention) or "projection" in attention._modules:
        return False
    return all(isinstance(part, nn.Linear) for part in matrices(layer).values())


def _scale(query: nn.Linear, attention: Any) -> None:
    """Let the queries' weights do what attention would multiply its scores by."""
    query.weight *= attention.scaling
    query.bias *= attention.scaling
    attention.scaling = 1.0


class _Stream:
    """What hidden states are at a point of the model: ``h = factor * u + offset``."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = [n for n, m in model.named_modules() if isinstance(m, PowerNorm)]
        width = len(model.get_submodule(self.names[0]).get_buffer("nu"))
        self.ones = torch.ones(width, dtype=torch.float64)
        self.factor, self.offset = self.ones, 0 * self.ones

    def read_by(self, linear: nn.Linear) -> None:
        """A linear map of the stream: it gets u."""
        weight = linear.weight.double()
        linear.bias.copy_(linear.bias + weight @ self.offset)
        linear.weight.copy_(weight * self.factor)

    def written_by(self, linear: nn.Linear) -> None:
        """A linear map whose result is added to the stream: to u."""
        linear.weight.copy_(linear.weight.double() / self.factor.unsqueeze(1))
        linear.bias.copy_(linear.bias.double() / self.factor)

    def norm(self) -> None:
        """The next norm: taken into the basis, or kept where that grows too far or all ends."""
        name = self.names.pop(0)
        parent = self.model.get_submodule(name.rpartition(".")[0])
        norm: Any = self.model.get_submodule(name)
        scale, shift = (part.double() for part in norm.affine())
        factor, offset = scale * self.factor, scale * self.offset + shift
        far = ((factor.abs() > LARGEST) | (factor.abs() < 1 / LARGEST)).any()
        if far or not self.names:
            kept: list[nn.Module] = [Affine(factor.float(), offset.float())]
            factor, offset = self.ones, 0 * self.ones
        else:
            kept = []
        if norm.bound is not None:
            ends = [(sign * norm.bound.double() - offset) / factor for sign in (-1, 1)]
            kept.append(Within(*(end.float() for end in ends)))
        setattr(parent, name.rpartition(".")[2], nn.Sequential(*kept))
        self.factor, self.offset = factor, offset
