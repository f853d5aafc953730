"""Ranks: what each way of factorising costs, which ranks save anything, and ranks for a budget.

A *mode* factorises the queries, keys and values of all layers, or their feed-forward matrices. It
counts weights and multiply-adds from shapes alone. Biases stay as they are and are not counted.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch

from raybert.errors import UserError
from raybert.surgery import sizes

Rank = int | tuple[int, ...]


class Shape(NamedTuple):
    """An encoder's size: layers L, width H and the feed-forward's inner width I."""

    layers: int
    hidden: int
    inner: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """The sizes of a Hugging Face config."""
        known = sizes(config)
        return cls(known["layers"], known["hidden"], known["inner"])

    def matrix(self, name: str) -> tuple[int, int]:
        """[out, in] of one of a layer's matrices."""
        outer = self.inner if name == "intermediate" else self.hidden
        return outer, self.inner if name == "output" else self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the dense encoder's layers: six matrices, their biases and two norms."""
        h, i = self.hidden, self.inner
        return self.layers * (4 * h * h + 2 * h * i + 4 * h + i + h + 4 * h)


def saving_rank(outer: int, inner: int) -> int:
    """The largest rank at which two factors are smaller than their matrix [outer, inner]."""
    return (outer * inner - 1) // (outer + inner)


LANES = 16
"""Ranks that are chosen are multiples of it where matrices are large enough: kernels compute so
many columns at a time, and take as long for fewer. At half the parameters, ranks 96 and 128 were
1.66 times as fast as the dense model, and 88 and 136 1.56 times (ONNX Runtime, AVX2, batch 8)."""


def ranks_to(most: int) -> list[int]:
    """The ranks up to ``most`` to choose from, rising."""
    if most < 8 * LANES:
        return list(range(1, most + 1))
    return [*range(1, LANES), *range(LANES, most + 1, LANES)]


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}M" if count >= 1e5 else f"{count:,}"


@dataclass(frozen=True)
class Svd:
    """Each matrix by truncated SVD; the rank is one number, or one for each layer.

    Attributes:
        matrices: the factorised ones of a layer.
        released: the released default rank, at width 768.
        shared: whether layers share parameters.
    """

    matrices: tuple[str, ...]
    released: int
    shared: bool = False

    def default(self, shape: Shape) -> int:
        """The released default at the model's width."""
        return max(1, round(shape.hidden * self.released / 768))

    def dense(self, shape: Shape) -> int:
        """Weights that are factorised."""
        return shape.layers * sum(prod(shape.matrix(name)) for name in self.matrices)

    def parameters(self, shape: Shape, rank: Rank) -> int:
        """Weights of the factors, in all layers."""
        a_rank = sum(sum(shape.matrix(name)) for name in self.matrices)
        return a_rank * sum((rank,) * shape.layers if isinstance(rank, int) else rank)

    multiply_adds = parameters

    def rungs(self, shape: Shape) -> list[int]:
        """Ranks that save, rising."""
        return ranks_to(min(saving_rank(*shape.matrix(n)) for n in self.matrices))

    def check(self, shape: Shape, rank: Rank, key: str) -> None:
        """Refuse what does not fit or saves nothing.

        Raises:
            UserError: as said.
        """
        ranks = (rank,) if isinstance(rank, int) else rank
        if not isinstance(rank, int) and len(rank) != shape.layers:
            raise UserError(
                f"lobert.{key} has {len(rank)} ranks; an SVD mode takes one number, or one for "
                f"each of the {shape.layers} layers."
            )
        outer, inner = min((shape.matrix(n) for n in self.matrices), key=prod)
        saving = saving_rank(outer, inner)
        for one in ranks:
            if one > min(outer, inner):
                raise UserError(
                    f"lobert.{key} {one} is above what a {outer}x{inner} matrix can have; use rank "
                    f"<= {saving}."
                )
            if one > saving:
                raise UserError(
                    f"lobert.{key} {one} saves nothing on a {outer}x{inner} matrix (break-even "
                    f"{saving + 1}); use rank <= {saving}."
                )


@dataclass(frozen=True)
class Tucker:
    """Stacks of matrices by Tucker; the rank has a number for each of a stack's dimensions.

    Attributes:
        stack: the stack's dimensions.
        copies: how many such stacks (or transposed ones) there are.
        released: the released default ranks as shares of the dimensions.
        token: multiply-adds of one token in one layer.
        shared: whether layers share parameters.
    """

    stack: Callable[[Shape], tuple[int, ...]]
    copies: Callable[[Shape], int]
    released: tuple[float, ...]
    token: Callable[..., int]
    shared: bool = True

    def _scaled(self, shape: Shape, scale: float) -> tuple[int, ...]:
        """The stack's last two ranks, out and in, as a share of their dimensions."""
        *small, outer, inner = self.stack(shape)
        shares = self.released[: len(small)]
        ranks = [max(1, round(d * share)) for d, share in zip(small, shares, strict=True)]
        return (*ranks, max(1, round(outer * scale)), max(1, round(inner * scale)))

    def default(self, shape: Shape) -> tuple[int, ...]:
        """The released default at the model's width and depth."""
        return self._scaled(shape, self.released[-1])

    def dense(self, shape: Shape) -> int:
        """Weights that are factorised."""
        return self.copies(shape) * prod(self.stack(shape))

    def parameters(self, shape: Shape, rank: Any) -> int:
        """Weights of core and factors, in all layers."""
        factors = sum(d * r for d, r in zip(self.stack(shape), rank, strict=True))
        return self.copies(shape) * (prod(rank) + factors)

    def multiply_adds(self, shape: Shape, rank: Any) -> int:
        """Of one token, in all layers."""
        return shape.layers * self.token(shape, *rank)

    def rungs(self, shape: Shape) -> list[tuple[int, ...]]:
        """Ranks that save, rising: those of the matrices, the stack's others as released."""
        all_ = (self._scaled(shape, r / shape.hidden) for r in ranks_to(shape.hidden))
        return [rank for rank in all_ if self.parameters(shape, rank) < self.dense(shape)]

    def check(self, shape: Shape, rank: Rank, key: str) -> None:
        """Refuse what does not fit or saves nothing.

        Raises:
            UserError: as said.
        """
        stack, saving = list(self.stack(shape)), self.rungs(shape)
        example = f"use for example {list(saving[-1])}" if saving else "this mode cannot save here"
        if isinstance(rank, int) or len(rank) != len(stack):
            raise UserError(
                f"lobert.{key} {rank if isinstance(rank, int) else list(rank)} is not {len(stack)} "
                f"ranks, one for each dimension of the stack {stack}; give for example "
                f"{list(self.default(shape))}."
            )
        for one, size in zip(rank, stack, strict=True):
            if one > size:
                raise UserError(
                    f"lobert.{key} {list(rank)} has a rank above its dimension of the stack "
                    f"{stack} ({one} > {size}); {example}."
                )
        dense, now = self.dense(shape), self.parameters(shape, rank)
        if now >= dense:
            raise UserError(
                f"lobert.{key} {list(rank)} saves nothing: {_millions(now)} parameters in place of "
                f"{_millions(dense)}; {example}."
            )


@dataclass(frozen=True)
class Falcon:
    """Shared bases and scales; the rank is the number of bases.

    Attributes:
        slices: slices that share bases.
        scales: scales of a slice and basis.
        bases: stacks that have bases of their own.
        products: products [H, H] of a token in one layer, for each basis.
        shared: whether layers share parameters.
    """

    slices: Callable[[Shape], int]
    scales: Callable[[Shape], int]
    bases: Callable[[Shape], int]
    products: int
    shared: bool = False

    def dense(self, shape: Shape) -> int:
        """Weights that are factorised."""
        return 3 * shape.layers * shape.hidden**2

    def parameters(self, shape: Shape, rank: Any) -> int:
        """Weights of bases and scales, in all layers."""
        a_basis = shape.hidden**2 + self.slices(shape) * self.scales(shape)
        return self.bases(shape) * rank * a_basis

    def multiply_adds(self, shape: Shape, rank: Any) -> int:
        """Of one token, in all layers."""
        return shape.layers * rank * (self.products * shape.hidden**2 + 3 * shape.hidden)

    def check(self, shape: Shape, rank: Any, key: str) -> None:
        """Refuse what does not fit or saves nothing.

        Raises:
            UserError: as said.
        """
        dense, one = self.dense(shape), self.parameters(shape, 1)
        if one * rank >= dense:
            most = (dense - 1) // one
            mend = f"use at most {most}" if most else "this mode cannot save here"
            raise UserError(
                f"lobert.{key} {rank} saves nothing: {_millions(one * rank)} parameters in place "
                f"of {_millions(dense)}; {mend}."
            )


Ranked = Svd | Tucker
"""Modes that have ranks to be found."""

Mode = Ranked | Falcon


def _within_layer(s: Shape, parts: int, outer: int, inner: int) -> int:
    return (
        s.hidden * inner + parts * outer * inner + parts * outer * s.hidden + 3 * parts * s.hidden
    )


def _one_by_one(s: Shape, _depth: int, outer: int, inner: int) -> int:
    return 3 * (s.hidden * inner + outer * inner + outer * s.hidden)


def _all_at_once(s: Shape, parts: int, _depth: int, outer: int, inner: int) -> int:
    return _within_layer(s, parts, outer, inner)


def _feed_forward(s: Shape, _depth: int, outer: int, inner: int) -> int:
    return 2 * (s.hidden * inner + outer * inner + outer * s.inner)


ATTENTION: dict[str, Mode] = {
    "self_svd": Svd(("query", "key", "value"), 192),
    "self_tucker_layer": Tucker(
        lambda s: (3, s.hidden, s.hidden),
        lambda s: s.layers,
        (2 / 3, 1 / 2, 1 / 2),
        _within_layer,
        shared=False,
    ),
    "self_falcon_layer": Falcon(lambda s: 3, lambda s: s.hidden, lambda s: s.layers, 1),
    "self_tucker_vertical": Tucker(
        lambda s: (s.layers, s.hidden, s.hidden), lambda s: 3, (2 / 3, 3 / 4, 3 / 4), _one_by_one
    ),
    "self_falcon_vertical": Falcon(
        lambda s: s.layers, lambda s: s.hidden, lambda s: 3, 3, shared=True
    ),
    "self_tucker_4d": Tucker(
        lambda s: (3, s.layers, s.hidden, s.hidden),
        lambda s: 1,
        (2 / 3, 2 / 3, 3 / 4, 3 / 4),
        _all_at_once,
    ),
    "self_falcon_4d": Falcon(lambda s: 3, lambda s: 1, lambda s: s.layers, 1),
}
"""The attention modes; default ranks are the released ones, scaled to the model."""

OUTPUT = "attention_output"

WITH_OUTPUT = Svd(("query", "key", "value", OUTPUT), 192)
"""``self_svd`` with the attention's output projection."""

FFN: dict[str, Mode] = {
    "ffn_svd": Svd(("intermediate", "output"), 306),
    "ffn_tucker": Tucker(
        lambda s: (s.layers, s.inner, s.hidden),
        lambda s: 2,
        (2 / 3, 492 / 768, 492 / 768),
        _feed_forward,
    ),
}
"""The feed-forward modes."""


def ladders(shape: Shape, modes: Sequence[Ranked]) -> list[list[tuple[int, Rank]]]:
    """For each mode its weights and rank, rising, at every rank that saves."""
    return [[(mode.parameters(shape, rank), rank) for rank in mode.rungs(shape)] for mode in modes]


def even_ranks(shape: Shape, modes: Sequence[Ranked], budget: int) -> list[Rank]:
    """Ranks within a budget of weights, spread evenly and maximal.

    Every mode keeps about the same share of its own weights, and none could go a step further
    within the budget.

    Args:
        shape: the encoder.
        modes: what is factorised.
        budget: weights of all factors; the smallest ranks fit in it.
    """
    steps = ladders(shape, modes)
    at = [0] * len(modes)
    dense = [mode.dense(shape) for mode in modes]
    left = budget - sum(ladder[0][0] for ladder in steps)
    assert left >= 0

    def more(which: int) -> int:
        return steps[which][at[which] + 1][0] - steps[which][at[which]][0]

    while True:  # the mode that keeps least of its own takes the next step
        open_ = [w for w in range(len(at)) if at[w] + 1 < len(steps[w]) and more(w) <= left]
        if not open_:
            return [ladder[step][1] for ladder, step in zip(steps, at, strict=True)]
        least = min(open_, key=lambda w: steps[w][at[w]][0] / dense[w])
        left -= more(least)
        at[least] += 1


def ranks_by_energy(
    spectra: Mapping[Any, torch.Tensor], sizes: Mapping[Any, tuple[int, int]], energy: float
) -> dict[Any, int]:
    """The smallest rank of each matrix that keeps a share of its squared singular values.

    Args:
        spectra: squared singular values, falling, by matrix.
        sizes: [out, in] of each matrix.
        energy: the share.

    Returns:
        The rank of each matrix, 0 where it stays dense since such a rank would save nothing.
    """
    found = {}
    for key, values in spectra.items():
        kept = values.cumsum(0) / values.sum().clamp(min=1e-30)
        least = int((kept < energy - 1e-9).sum()) + 1
        choice = ranks_to(saving_rank(*sizes[key]))
        found[key] = next((rank for rank in choice if rank >= least), 0)
    return found


def spend(
    spectra: Mapping[Any, torch.Tensor], sizes: Mapping[Any, tuple[int, int]], budget: int
) -> dict[Any, int]:
    """Spend a budget of weights on singular values, the largest gain for each weight first.

    A singular value's gain is the share that its square has of its matrix's. Beyond the last rank
    to choose, a matrix may stay dense: that gains all it still lacks.

    Args:
        spectra: squared singular values, falling, by matrix.
        sizes: [out, in] of each matrix.
        budget: weights; at least one rank of every matrix fits in it.

    Returns:
        The rank of each matrix, 0 where it stays dense.
    """
    shares = {k: (v / v.sum().clamp(min=1e-30)).tolist() for k, v in spectra.items()}
    rungs = {key: ranks_to(saving_rank(*sizes[key])) for key in spectra}
    ranks = {key: choice[0] for key, choice in rungs.items()}
    left = budget - sum(sum(sizes[key]) for key in ranks)
    order = {key: number for number, key in enumerate(ranks)}  # equal gains: first come

    def step(key: Any) -> tuple[float, int, Any, int, int]:
        rank = ranks[key]
        becomes = next((one for one in rungs[key] if one > rank), 0)
        if becomes:
            cost, gain = (becomes - rank) * sum(sizes[key]), sum(shares[key][rank:becomes])
        else:
            cost = prod(sizes[key]) - rank * sum(sizes[key])
            gain = sum(shares[key][rank:])
        return -gain / cost, order[key], key, cost, becomes

    heap = [step(key) for key in ranks]
    heapq.heapify(heap)
    while heap:
        _, _, key, cost, becomes = heapq.heappop(heap)
        if cost > left:
            continue  # smaller matrices may still have a step that fits
        left -= cost
        ranks[key] = becomes
        if becomes:
            heapq.heappush(heap, step(key))
    return ranks
