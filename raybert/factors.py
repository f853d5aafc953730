"""A model's matrices as factors: their values from dense weights, and the layers that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from raybert.attention import projected
from raybert.factorise import error, error_of_projection, error_on_data
from raybert.lowrank import (
    PARTS,
    FalconParts,
    FalconProjection,
    FalconWhole,
    LowRankLinear,
    LowRankProjection,
    SharedLinear,
    SharedParts,
    SharedProjection,
    SharedTucker,
    SharedTucker4d,
    TuckerProjection,
    Values,
    fill,
)
from raybert.surgery import encoder_layers, layer_holder, matrices, self_attention, swap

Key = tuple[int, str]
"""A matrix: its layer, from 0, and its name in `raybert.surgery.MATRICES`."""

WITHIN: dict[str, Any] = {
    "self_tucker_layer": TuckerProjection,
    "self_falcon_layer": FalconProjection,
    "self_falcon_4d": FalconWhole,
}
"""Attention modes whose parameters belong to a layer -> its projection."""

ACROSS: dict[str, Any] = {
    "self_tucker_vertical": SharedParts,
    "self_falcon_vertical": FalconParts,
    "self_tucker_4d": SharedTucker4d,
}
"""Attention modes whose parameters belong to all layers -> their owner."""

OWNER = "lobert"
"""What the owners of shared parameters are called, beside the encoder's layers."""


@dataclass(frozen=True)
class Layout:
    """What is factorised, and how.

    Attributes:
        svd: for each layer the SVD rank by matrix; 0 stays dense.
        attention: a mode of `WITHIN` or `ACROSS` for queries, keys and values, or none.
        attention_rank: its rank.
        ffn_rank: Tucker ranks (layers, inner, hidden) of the feed-forward, or none.
    """

    svd: list[dict[str, int]]
    attention: str | None = None
    attention_rank: Any = None
    ffn_rank: tuple[int, int, int] | None = None

    @property
    def stacks(self) -> dict[str, tuple[int, int, int]]:
        """Feed-forward matrices that are a stack over all layers -> (layers, out, in) ranks."""
        if self.ffn_rank is None:
            return {}
        depth, inner, hidden = self.ffn_rank
        return {"intermediate": (depth, inner, hidden), "output": (depth, hidden, inner)}


@dataclass
class Factors:
    """Factors computed from dense weights.

    Attributes:
        values: new parameters' values by matrix, by (layer, ``attention``), or by owner.
        errors: relative Frobenius error of each matrix.
        on_data: the same of what it makes of calibration rows, where there were any.
    """

    values: dict[Any, Values] = field(default_factory=dict)
    errors: dict[Key, float] = field(default_factory=dict)
    on_data: dict[Key, float] = field(default_factory=dict)


def dense_matrices(model: nn.Module) -> dict[Key, nn.Linear]:
    """Every matrix of a dense model's layers."""
    return {
        (number, name): dense
        for number, layer in enumerate(encoder_layers(model))
        for name, dense in matrices(layer).items()
    }


# -- values ----------------------------------------------------------------------------------------


def factorise(model: nn.Module, layout: Layout, moments: Mapping[Key, Tensor]) -> Factors:
    """Compute all factors.

    Args:
        model: a dense model.
        layout: what is factorised.
        moments: for data-aware factors those of the matrices that are weighed, as
            `raybert.factorise.low_rank` takes them; else empty.
    """
    weights = {key: dense.weight.detach() for key, dense in dense_matrices(model).items()}
    layers = range(len(encoder_layers(model)))
    found = Factors()
    for layer, ranks in enumerate(layout.svd):
        _add_svd(found, weights, layer, ranks, moments)

    def stack(name: str) -> Tensor:  # [L, out, in]
        return torch.stack([weights[layer, name] for layer in layers])

    def note(layer: int, name: str, approximation: Tensor) -> None:
        key = (layer, name)
        found.errors[key] = error(weights[key], approximation)
        if key in moments:
            found.on_data[key] = error_on_data(weights[key], approximation, moments[key])

    if layout.attention in WITHIN:
        for layer in layers:
            parts = torch.stack([weights[layer, name] for name in PARTS])
            made = WITHIN[layout.attention].factorise(
                parts, layout.attention_rank, moments.get((layer, PARTS[0]))
            )
            found.values[layer, "attention"], approximation = made
            for name, one in zip(PARTS, approximation, strict=True):
                note(layer, name, one)
    elif layout.attention:
        parts = torch.stack([stack(name) for name in PARTS], dim=1)  # [L, 3, H, H]
        made = ACROSS[layout.attention].factorise(
            parts, layout.attention_rank, _shared_moment(moments, PARTS[0])
        )
        found.values["attention"], approximations = made
        for layer in layers:
            for name, one in zip(PARTS, approximations[layer], strict=True):
                note(layer, name, one)
    for name, ranks in layout.stacks.items():
        moment = _shared_moment(moments, name)
        found.values[name], approximations = SharedTucker.factorise(stack(name), ranks, moment)
        for layer in layers:
            note(layer, name, approximations[layer])
    return found


def _shared_moment(moments: Mapping[Key, Tensor], name: str) -> Tensor | None:
    """The mean over layers of the moments of one matrix's inputs, none of them louder than others.

    Factors that layers share can fit but one.
    """
    own = [moment / moment.trace() for (_, which), moment in moments.items() if which == name]
    return torch.stack(own).mean(0) if own else None


def _add_svd(
    found: Factors,
    weights: Mapping[Key, Tensor],
    layer: int,
    ranks: Mapping[str, int],
    moments: Mapping[Key, Tensor],
) -> None:
    """One layer's matrices by SVD; queries, keys and values together, in one module's values."""
    parts: dict[str, Values] = {}
    for name, rank in ranks.items():
        if rank:
            key = (layer, name)
            parts[name] = LowRankLinear.factorise(weights[key], rank, moments.get(key))
            left, right = parts[name]["expand.weight"], parts[name]["reduce.weight"]
            found.errors[key] = error(weights[key], left @ right)
            if key in moments:
                found.on_data[key] = error_of_low_rank(weights[key], left, right, moments[key])
    if attention := [name for name in PARTS if name in parts]:
        found.values[layer, "attention"] = LowRankProjection.join(
            {name: parts.pop(name) for name in attention}
        )
    found.values |= {(layer, name): values for name, values in parts.items()}


def error_of_low_rank(weight: Tensor, left: Tensor, right: Tensor, moment: Tensor) -> float:
    """The relative error of SVD factors' outputs on data, whichever side the moment is of."""
    if weight.shape[0] < weight.shape[1]:
        return error_of_projection(left, moment)
    return error_on_data(weight, left @ right, moment)


# -- structure -------------------------------------------------------------------------------------


def build(model: nn.Module, layout: Layout, values: Mapping[Any, Values]) -> None:
    """Put the layers that hold factors in the place of dense ones.

    Args:
        model: a dense model, on the meta device too.
        layout: what is factorised.
        values: `Factors.values`; what it lacks is zero, to be filled from a checkpoint.
    """
    layers = list(encoder_layers(model))
    dense = [matrices(layer) for layer in layers]
    owners = _owners(layout, dense)
    for name, owner in owners.items():
        fill(owner, values.get(name, {}))
    if owners:
        layer_holder(model).add_module(OWNER, nn.ModuleDict(owners))

    made: dict[int, nn.Module] = {}
    for number, named in enumerate(dense):
        for name, rank in layout.svd[number].items():
            if rank and name not in PARTS:
                made[id(named[name])] = low = LowRankLinear(named[name], rank)
                fill(low, values.get((number, name), {}))
        for name in layout.stacks:
            made[id(named[name])] = SharedLinear(named[name], owners[name], number)
    _exchange(model, made)

    made = {}  # afterwards: DistilBERT's attention holds the output projection, changed above
    for number, (layer, named) in enumerate(zip(layers, dense, strict=True)):
        projection = _projection(layout, number, [named[name] for name in PARTS], owners)
        if projection is not None:
            fill(projection, values.get((number, "attention"), {}))
            attention = self_attention(layer)
            made[id(attention)] = projected(attention, projection)
    _exchange(model, made)


def _exchange(model: nn.Module, made: Mapping[int, nn.Module]) -> None:
    if made:
        swap(model, lambda _, old: id(old) in made, lambda _, old: made[id(old)])


def _owners(layout: Layout, dense: list[dict[str, nn.Linear]]) -> dict[str, nn.Module]:
    """The modules that hold what all layers share: ``attention``, ``intermediate``, ``output``."""
    found: dict[str, nn.Module] = {}
    if layout.attention in ACROSS:
        first = [dense[0][name] for name in PARTS]
        kind = ACROSS[layout.attention]
        found["attention"] = kind(first, len(dense), layout.attention_rank)
    for name, ranks in layout.stacks.items():
        found[name] = SharedTucker(dense[0][name], len(dense), ranks)
    return found


def _projection(
    layout: Layout, number: int, dense: list[nn.Linear], owners: Mapping[str, nn.Module]
) -> nn.Module | None:
    """What makes a layer's queries, keys and values, or nothing where they stay dense."""
    if layout.attention in WITHIN:
        return WITHIN[layout.attention](dense, layout.attention_rank)
    if layout.attention in ACROSS:
        return SharedProjection(dense, owners["attention"], number)
    ranks = [layout.svd[number].get(name, 0) for name in PARTS]
    return LowRankProjection(dense, ranks) if any(ranks) else None
