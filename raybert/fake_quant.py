"""Layers that are trained as the integers they will become (`raybert.int8`).

Weights and activations are rounded to levels, gradients pass through the rounding. The product is
that of the levels themselves, as float32 numbers, and is scaled afterwards: its gradients are
those of the textbook form, which multiplies rounded reals, and since whole numbers below 2^24 are
exact in float32, the finished model says bit for bit what the training one said.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raybert.grid import (
    BIAS_LIMIT,
    Grid,
    asymmetric_grid,
    column,
    largest,
    levels,
    reach_of,
    scale_of,
    to_levels,
    weight_scale_of,
)
from raybert.int8 import Int8Embedding, Int8Linear, Scheme, TiedInt8Linear


class Levels(torch.autograd.Function):
    """The level nearest to ``x / scale``; a float that holds a whole number.

    The gradient passes as if this were a plain division, everywhere: also, as in the released code,
    where a value lies outside the range and is cut off.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Any, high: Any) -> Tensor:
        """x of any shape; scale that divides it; the lowest and highest level."""
        ctx.save_for_backward(scale)
        ctx.dtype = x.dtype
        return to_levels(x, scale, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Of the four inputs, x alone has a gradient."""
        (scale,) = ctx.saved_tensors
        return (grads[0] / scale).to(ctx.dtype), None, None, None


def nearest(x: Tensor, scale: Tensor, low: Any, high: Any) -> Tensor:
    """See `Levels`; for the type's sake."""
    found: Any = Levels.apply(x, scale, low, high)
    return found


def weight_levels(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """A matrix [N, K] in levels, given its scale [1] or [N]."""
    top = 2 ** (bits - 1) - 1
    return nearest(weight, column(scale), -top, top)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] and weight [N, K], both in levels -> [..., N]."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
        # Sums of levels leave half precision's range; a power of two changes no digit.
        return F.linear(x / 128, weight / 128).float() * 128**2
    return F.linear(x, weight)


class Range(nn.Module):
    """The range of one activation, and the grid that it gives.

    ``ema`` is the moving average of the largest magnitude, 0 before anything was seen; ``seen`` the
    largest in the step under way. An asymmetric range has two of each: how far values go below 0,
    and above.
    """

    ema: Tensor
    seen: Tensor

    def __init__(
        self, bits: int, learned: bool, unsigned: bool = False, asymmetric: bool = False
    ) -> None:
        super().__init__()
        self.bits, self.learned, self.unsigned = bits, learned, unsigned
        self.asymmetric = asymmetric
        if learned:
            shape = (2,) if asymmetric else ()
            self.register_buffer("ema", torch.zeros(shape))
            self.register_buffer("seen", torch.zeros(shape))

    def size(self, x: Tensor) -> Tensor:
        """How far values of ``x`` go."""
        x = x.detach()
        return reach_of(x) if self.asymmetric else largest(x).float()

    def observe(self, x: Tensor) -> Tensor:
        """Note how far ``x`` goes when training; returns it."""
        now = self.size(x)
        if self.learned and self.training:
            self.seen.copy_(torch.maximum(self.seen, now))
        return now

    def start(self, size: Tensor) -> None:
        """Let the moving average start from how far values went: a reach [2], or a magnitude."""
        self.ema.copy_(size if self.asymmetric else size.max())

    @property
    def average(self) -> Grid:
        """The grid of the moving average, which the finished model keeps."""
        return self.grid_of(self.ema)

    def grid(self, x: Tensor) -> Grid:
        """The grid; that of ``x`` itself while there is no average."""
        return self._grid(self.observe(x))

    def settled(self, x: Tensor) -> Grid:
        """The grid for what is on it already: that teaches nothing about the range."""
        return self._grid(self.size(x))

    def _grid(self, now: Tensor) -> Grid:
        if self.learned:
            now = torch.where(self.ema.amax() > 0, self.ema, now)
        return self.grid_of(now)

    def grid_of(self, size: Tensor) -> Grid:
        """The grid of a range, as ``ema`` has it."""
        if self.asymmetric:
            return asymmetric_grid(size, self.bits)
        return Grid(scale_of(size, self.bits, self.unsigned), *levels(self.bits, self.unsigned))

    def snap(self, x: Tensor) -> Tensor:
        """``x`` with every value moved to the nearest on the grid."""
        grid = self.grid(x)
        return nearest(x, *grid) * grid.scale


class FakeQuantLinear(nn.Module):
    """A linear layer that computes as the `Int8Linear` it will become. Adopts the parameters.

    ``tied``: the weight is an embedding table's, and stays with it.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, scheme: Scheme, tied: bool = False) -> None:
        super().__init__()
        self.scheme, self.tied = scheme, tied
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        learned = scheme.inputs == "static"
        if scheme.inputs != "float":
            self.input_range = Range(
                scheme.activation_bits, learned, scheme.unsigned, scheme.asymmetric
            )
        if scheme.requantise:
            self.output_range = Range(scheme.activation_bits, learned)
        self.active = True

    def read(self, grid: Range) -> None:
        """Inputs come on this grid from now on, and have no range of their own."""
        del self.input_range
        self.grid = (grid,)  # in a tuple, so that it is not a module of this one

    grid: tuple[Range, ...] = ()

    @property
    def incoming(self) -> Range:
        """The range of inputs."""
        return self.grid[0] if self.grid else self.input_range

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        scheme = self.scheme
        if self.training and not self.active:
            out = F.linear(x, self.weight, self.bias)
            if scheme.inputs != "float" and not self.grid:
                self.input_range.observe(x)
            if scheme.requantise:
                self.output_range.observe(out)
            return out
        scale = weight_scale_of(self.weight, scheme.weight_bits, scheme.per_row)
        weight = weight_levels(self.weight, scale, scheme.weight_bits)
        if scheme.inputs == "float":
            return F.linear(x, weight * column(scale), self.bias)
        grid = self.incoming.settled(x) if self.grid else self.incoming.grid(x)
        scale = grid.scale * scale
        out = product(nearest(x, *grid), weight) * scale
        if self.bias is not None:
            out = out + self._bias(self.bias, scale)
        if scheme.requantise:
            out = self.output_range.snap(out)
        return out

    def _bias(self, bias: Tensor, scale: Tensor) -> Tensor:
        """The bias [N] in whole steps of the product's scale, where that is not each batch's."""
        if self.scheme.inputs == "dynamic":
            return bias
        return nearest(bias, scale, -BIAS_LIMIT, BIAS_LIMIT) * scale

    def finished(self, table: Int8Embedding | None) -> Int8Linear:
        """The integer layer; ``table`` is that of a tied one."""
        scheme, bias = self.scheme, self.bias
        scale = weight_scale_of(self.weight, scheme.weight_bits, scheme.per_row)
        if self.tied:
            assert table is not None
            new: Int8Linear = TiedInt8Linear(table, scheme, bias is not None)
        else:
            rows, columns = self.weight.shape
            new = Int8Linear(columns, rows, scheme, bias is not None)
            new.fill(self.weight, scale)
        if scheme.inputs == "static":
            grid = self.incoming.average
            new.input_scale = grid.scale
            if scheme.asymmetric:
                new.input_zero = grid.zero
            if scheme.requantise:
                new.output_scale = self.output_range.average.scale
        if bias is not None:
            new.fill_bias(bias, scale)
        return new


class FakeQuantEmbedding(nn.Module):
    """An embedding that gives what the `Int8Embedding` it will become gives. Adopts the table."""

    def __init__(self, embedding: nn.Embedding, bits: int, per_row: bool) -> None:
        super().__init__()
        self.weight, self.padding_idx = embedding.weight, embedding.padding_idx
        self.bits, self.per_row = bits, per_row
        self.active = True

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., H]."""
        rows = F.embedding(ids, self.weight, self.padding_idx)
        if self.training and not self.active:
            return rows
        scale = weight_scale_of(self.weight, self.bits, self.per_row)
        each = scale[ids] if self.per_row else scale
        return weight_levels(rows, each, self.bits) * column(each)

    def finished(self) -> Int8Embedding:
        """The table of integers."""
        rows, columns = self.weight.shape
        new = Int8Embedding(rows, columns, self.bits, self.per_row)
        new.fill(self.weight, weight_scale_of(self.weight, self.bits, self.per_row))
        return new
