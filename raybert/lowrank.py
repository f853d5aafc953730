"""Layers that stand for dense ones by small factors. Activations go through the factors: no weight
[out, in] is ever put together again in a forward pass.

Each class has ``factorise``, which computes its new parameters' values from dense weights, and a
constructor that builds it on a dense layer with zeros in their place: structure from shapes
alone. Biases are adopted. `fill` brings the two together.

Parameters shared by layers have one owner, registered once beside the layers; a layer's module
refers to it without registering it, so that every parameter has one name and one place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from raybert.attention import QKV
from raybert.factorise import falcon, falcon_product, low_rank, tucker, tucker_product

Values = dict[str, Tensor]
"""Parameter name, below its module -> value."""

PARTS = ("query", "key", "value")


def fill(module: nn.Module, values: Values) -> None:
    """Copy values into a module's parameters."""
    with torch.no_grad():
        for name, value in values.items():
            module.get_parameter(name).copy_(value)


def _linear(inputs: int, outputs: int, like: nn.Linear, bias: nn.Parameter | None = None):
    """A linear layer of zeros where ``like`` is; drawing random weights would be for nothing."""
    place = {"device": like.weight.device, "dtype": like.weight.dtype}
    new: Any = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False, **place)
    nn.init.zeros_(new.weight)
    new.bias = bias
    return new


def _zeros(like: nn.Linear, *shape: int) -> nn.Parameter:
    return nn.Parameter(like.weight.new_zeros(shape))


# -- one matrix ------------------------------------------------------------------------------------


class LowRankLinear(nn.Module):
    """A linear layer [in -> out] as two, [in -> rank -> out]."""

    def __init__(self, dense: nn.Linear, rank: int) -> None:
        super().__init__()
        self.reduce = _linear(dense.in_features, rank, dense)
        self.expand = _linear(rank, dense.out_features, dense, dense.bias)

    @staticmethod
    def factorise(weight: Tensor, rank: int, moment: Tensor | None = None) -> Values:
        """Values for a weight [out, in]; see `raybert.factorise.low_rank`."""
        left, right = low_rank(weight, rank, moment)
        return {"reduce.weight": right, "expand.weight": left}

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.expand(self.reduce(hidden))


# -- queries, keys and values of one layer ---------------------------------------------------------


class LowRankProjection(nn.Module):
    """Queries, keys and values by truncated SVD; the three inputs share one product.

    A part of rank 0 stays dense.
    """

    def __init__(self, dense: Sequence[nn.Linear], ranks: Sequence[int]) -> None:
        super().__init__()
        self.ranks = list(ranks)
        self.reduce = _linear(dense[0].in_features, sum(ranks), dense[0])
        for name, part, rank in zip(PARTS, dense, ranks, strict=True):
            low = _linear(rank, part.out_features, part, part.bias) if rank else part
            self.add_module(name, low)

    @staticmethod
    def join(parts: Mapping[str, Values]) -> Values:
        """Values from those of `LowRankLinear` for each part that does not stay dense."""
        reduce = torch.cat([parts[name]["reduce.weight"] for name in PARTS if name in parts])
        expand = {f"{name}.weight": part["expand.weight"] for name, part in parts.items()}
        return {"reduce.weight": reduce, **expand}

    def forward(self, hidden: Tensor) -> QKV:
        """[B, T, H] -> three [B, T, H]."""
        # In two dimensions a slice of columns still goes into a fused product with bias; in three
        # the bias would cost a pass of its own.
        flat = hidden.flatten(0, -2)  # [B * T, H]
        reduced = self.reduce(flat).split(self.ranks, dim=-1)
        query, key, value = (
            self.get_submodule(name)(small if rank else flat).view(*hidden.shape[:-1], -1)
            for name, small, rank in zip(PARTS, reduced, self.ranks, strict=True)
        )
        return query, key, value


class Biased(nn.Module):
    """Keeps the three dense layers' own biases."""

    def __init__(self, dense: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.query_bias, self.key_bias, self.value_bias = (part.bias for part in dense)

    def biased(self, parts: Iterable[Tensor]) -> QKV:
        """Three [B, T, H], each with its bias added."""
        query, key, value = parts
        return query + self.query_bias, key + self.key_bias, value + self.value_bias


def _mixed(mix: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Combinations of parts: mix [3, R], parts R x [B, T, H] -> [3, B, T, H]."""
    together = torch.stack(list(parts))  # [R, B, T, H]
    return (mix @ together.flatten(1)).view(-1, *together.shape[1:])


class TuckerProjection(Biased):
    """The stack [3, H, H] of a layer by Tucker ranks (R1, R2, R3).

    The core is applied once for all three; R1 outputs are made and mixed into three at the end.
    """

    def __init__(self, dense: Sequence[nn.Linear], ranks: Sequence[int]) -> None:
        super().__init__(dense)
        first = dense[0]
        self.ranks = parts, outer, inner = tuple(ranks)
        self.reduce = _linear(first.in_features, inner, first)
        self.core = _linear(inner, parts * outer, first)
        self.expand = _linear(outer, first.out_features, first)
        self.mix = _zeros(first, len(PARTS), parts)

    @staticmethod
    def factorise(
        weights: Tensor, ranks: Sequence[int], moment: Tensor | None = None
    ) -> tuple[Values, Tensor]:
        """Values for weights [3, H, H], and the weights that they stand for.

        Here and below, ``moment`` is the second moment of the inputs, or none.
        """
        core, factors = tucker(weights, ranks, moment)  # core [R1, R2, R3]
        mix, outer, inner = factors
        values = {"mix": mix, "expand.weight": outer, "reduce.weight": inner.T}
        return {**values, "core.weight": core.flatten(0, 1)}, tucker_product(core, factors)

    def forward(self, hidden: Tensor) -> QKV:
        """[B, T, H] -> three [B, T, H]."""
        parts = self.core(self.reduce(hidden)).split(self.ranks[1], dim=-1)  # R1 x [B, T, R2]
        return self.biased(_mixed(self.mix, [self.expand(part) for part in parts]))


def _scaled(bases: Tensor, scale: Tensor) -> Tensor:
    """The sum of scaled bases: bases [B, T, k * H], scale [k, H] or [k, 1] -> [B, T, H]."""
    first, *others = bases.chunk(len(scale), dim=-1)
    total = first * scale[0]
    for one, factor in zip(others, scale[1:], strict=True):
        total = torch.addcmul(total, one, factor)
    return total


class FalconProjection(Biased):
    """The stack [3, H, H] of a layer as k shared bases [H, H], scaled row by row."""

    rows: ClassVar[bool] = True

    def __init__(self, dense: Sequence[nn.Linear], rank: int) -> None:
        super().__init__(dense)
        first = dense[0]
        width = first.out_features
        self.reduce = _linear(first.in_features, rank * width, first)
        self.scale = _zeros(first, len(PARTS), rank, width if self.rows else 1)

    @classmethod
    def factorise(
        cls, weights: Tensor, rank: int, moment: Tensor | None = None
    ) -> tuple[Values, Tensor]:
        """Values for weights [3, H, H], and the weights that they stand for."""
        scales, bases = falcon(weights, rank, rows=cls.rows, moment=moment)
        values = {"scale": scales, "reduce.weight": bases.flatten(0, 1)}
        return values, falcon_product(scales, bases)

    def forward(self, hidden: Tensor) -> QKV:
        """[B, T, H] -> three [B, T, H]."""
        bases = self.reduce(hidden)
        return self.biased(_scaled(bases, scale) for scale in self.scale)


class FalconWhole(FalconProjection):
    """Bases [H, H] of a layer, each scaled as a whole by one number."""

    rows = False


# -- shared by all layers --------------------------------------------------------------------------


class SharedTucker(nn.Module):
    """One matrix of every layer, the stack [L, out, in], by Tucker ranks (R1, R2, R3)."""

    def __init__(self, dense: nn.Linear, layers: int, ranks: Sequence[int]) -> None:
        super().__init__()
        depth, self.outer, inner = ranks
        self.reduce = _linear(dense.in_features, inner, dense)
        self.core = _zeros(dense, depth, self.outer * inner)
        self.expand = _linear(self.outer, dense.out_features, dense)
        self.mix = _zeros(dense, layers, depth)

    @staticmethod
    def factorise(
        weights: Tensor, ranks: Sequence[int], moment: Tensor | None = None
    ) -> tuple[Values, Tensor]:
        """Values for weights [L, out, in], and the weights that they stand for."""
        core, factors = tucker(weights, ranks, moment)
        mix, outer, inner = factors
        values = {"mix": mix, "expand.weight": outer, "reduce.weight": inner.T}
        return {**values, "core": core.flatten(1)}, tucker_product(core, factors)

    def forward(self, hidden: Tensor, layer: int) -> Tensor:
        """What a layer's matrix makes of hidden [..., in]: [..., out]."""
        # A layer's mix goes into the small core once, not into every token's activations.
        core = (self.mix[layer] @ self.core).view(self.outer, -1)  # [R2, R3]
        return self.expand(linear(self.reduce(hidden), core))


class SharedFalcon(nn.Module):
    """One matrix of every layer, the stack [L, H, H], as k shared bases scaled row by row."""

    def __init__(self, dense: nn.Linear, layers: int, rank: int) -> None:
        super().__init__()
        self.reduce = _linear(dense.in_features, rank * dense.out_features, dense)
        self.scale = _zeros(dense, layers, rank, dense.out_features)

    @staticmethod
    def factorise(
        weights: Tensor, rank: int, moment: Tensor | None = None
    ) -> tuple[Values, Tensor]:
        """Values for weights [L, H, H], and the weights that they stand for."""
        scales, bases = falcon(weights, rank, moment=moment)
        values = {"scale": scales, "reduce.weight": bases.flatten(0, 1)}
        return values, falcon_product(scales, bases)

    def forward(self, hidden: Tensor, layer: int) -> Tensor:
        """What a layer's matrix makes of hidden [..., H]: [..., H]."""
        return _scaled(self.reduce(hidden), self.scale[layer])


class SharedParts(nn.Module):
    """Queries, keys and values, each by an owner of its own."""

    kind: ClassVar[Any] = SharedTucker

    def __init__(self, dense: Sequence[nn.Linear], layers: int, rank: Any) -> None:
        super().__init__()
        self.query, self.key, self.value = (self.kind(part, layers, rank) for part in dense)

    @classmethod
    def factorise(
        cls, weights: Tensor, rank: Any, moment: Tensor | None = None
    ) -> tuple[Values, Tensor]:
        """Values for weights [L, 3, H, H], and the weights that they stand for."""
        values: Values = {}
        found = []
        for number, name in enumerate(PARTS):
            own, approximation = cls.kind.factorise(weights[:, number].contiguous(), rank, moment)
            values |= {f"{name}.{key}": value for key, value in own.items()}
            found.append(approximation)
        return values, torch.stack(found, dim=1)

    def forward(self, hidden: Tensor, layer: int) -> QKV:
        """[B, T, H] -> a layer's three [B, T, H]."""
        return self.query(hidden, layer), self.key(hidden, layer), self.value(hidden, layer)


class FalconParts(SharedParts):
    """Each by a `SharedFalcon`."""

    kind = SharedFalcon


class SharedTucker4d(nn.Module):
    """All queries, keys and values, the stack [3, L, H, H], by Tucker ranks (R1, R2, R3, R4)."""

    def __init__(self, dense: Sequence[nn.Linear], layers: int, ranks: Sequence[int]) -> None:
        super().__init__()
        first = dense[0]
        parts, depth, self.outer, inner = ranks
        self.reduce = _linear(first.in_features, inner, first)
        self.core = _zeros(first, depth, parts * self.outer * inner)
        self.expand = _linear(self.outer, first.out_features, first)
        self.layer_mix = _zeros(first, layers, depth)
        self.mix = _zeros(first, len(PARTS), parts)

    @staticmethod
    def factorise(
        weights: Tensor, ranks: Sequence[int], moment: Tensor | None = None
    ) -> tuple[Values, Tensor]:
        """Values for weights [L, 3, H, H], and the weights that they stand for."""
        core, factors = tucker(weights.transpose(0, 1).contiguous(), ranks, moment)
        mix, layer_mix, outer, inner = factors
        values = {"mix": mix, "layer_mix": layer_mix}
        values |= {"expand.weight": outer, "reduce.weight": inner.T}
        values["core"] = core.transpose(0, 1).flatten(1)  # [R2, R1 * R3 * R4]
        return values, tucker_product(core, factors).transpose(0, 1)

    def forward(self, hidden: Tensor, layer: int) -> Tensor:
        """[B, T, H] -> a layer's three [B, T, H], stacked."""
        reduced = self.reduce(hidden)  # [B, T, R4]
        core = (self.layer_mix[layer] @ self.core).view(-1, reduced.shape[-1])  # [R1 * R3, R4]
        parts = linear(reduced, core).split(self.outer, dim=-1)  # R1 x [B, T, R3]
        return _mixed(self.mix, [self.expand(part) for part in parts])


class SharedProjection(Biased):
    """A layer's queries, keys and values from the owner that all layers share."""

    def __init__(self, dense: Sequence[nn.Linear], owner: nn.Module, layer: int) -> None:
        super().__init__(dense)
        self.owner, self.layer = (owner,), layer  # in a tuple: not registered a second time

    def forward(self, hidden: Tensor) -> QKV:
        """[B, T, H] -> three [B, T, H]."""
        return self.biased(self.owner[0](hidden, self.layer))


class SharedLinear(nn.Module):
    """A layer's linear map from the owner that all layers share."""

    def __init__(self, dense: nn.Linear, owner: nn.Module, layer: int) -> None:
        super().__init__()
        self.bias = dense.bias
        self.owner, self.layer = (owner,), layer  # in a tuple: not registered a second time

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.owner[0](hidden, self.layer) + self.bias
