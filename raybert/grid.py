"""Grids: which integers numbers stand for, and how integers of few bits lie in bytes.

A number x stands for the integer ``round(x / scale)`` (half to even), the scale being the largest
magnitude over the largest level. Weights use the levels -(2^(b-1) - 1) ... 2^(b-1) - 1. Activations
have one level more, down to -2^(b-1): with 128 added, 8 bits of them are exactly the unsigned bytes
that kernels such as ONNX Runtime's multiply by signed weights. Asymmetric ones are the levels
-z ... 2^b - 1 - z of a zero point z, which is added instead (Jacob et al., CVPR 2018, eq. 1).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = 1e-4
"""Smallest magnitude that a scale is made for. What is smaller everywhere (a row of zeros, say) is
nothing beside its neighbours, and a bias at the scale of their product would leave int32."""

BIAS_LIMIT = 2.0**31 - 128
"""The largest float32 that an int32 can hold."""


def scale_of(magnitude: Tensor, bits: int, unsigned: bool = False) -> Tensor:
    """The scale, of the same shape, at which a magnitude is the highest level."""
    return magnitude.float().clamp(min=FLOOR) / levels(bits, unsigned)[1]


def levels(bits: int, unsigned: bool = False) -> tuple[int, int]:
    """The lowest and highest level of an activation; ``unsigned``: of one that is never below 0."""
    return (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


class Grid(NamedTuple):
    """The numbers ``scale * level`` for whole levels from ``low`` to ``high``, 0 among them.

    All are float32 scalars, or plain numbers.
    """

    scale: Tensor
    low: Any
    high: Any

    @property
    def zero(self) -> Any:
        """The zero point: the byte that stands for level 0, ``low`` being byte 0."""
        return -self.low


def asymmetric_grid(reach: Tensor, bits: int) -> Grid:
    """The grid whose ends are the nearest to a range's.

    Args:
        reach: [2], how far values go below 0 and above it, neither negative.
        bits: of a level.
    """
    most = 2**bits - 1
    scale = reach.sum().float().clamp(min=FLOOR) / most
    zero = (reach[0] / scale).round()
    return Grid(scale, -zero, most - zero)


def to_levels(x: Tensor, scale: Tensor, low: Any, high: Any) -> Tensor:
    """The levels nearest to ``x / scale``, half to even and cut off at the ends: whole numbers in
    float32, of ``x``'s shape."""
    return (x.float() / scale).round_().clamp_(low, high)


def reach_of(x: Tensor) -> Tensor:
    """How far values of any shape go below 0 and above it: float32 [2]."""
    return torch.stack([-x.amin(), x.amax()]).float().clamp(min=0)


def largest(x: Tensor, dim: int | None = None) -> Tensor:
    """The largest magnitude, a scalar, or that along one dimension."""
    # Two reductions, where abs() would write all of x down again.
    over = () if dim is None else dim
    return torch.maximum(x.amax(over), -x.amin(over))


def weight_scale_of(weight: Tensor, bits: int, per_row: bool) -> Tensor:
    """The scale [1] of a matrix [N, K], or the scales [N] of its rows."""
    size = largest(weight.detach(), 1 if per_row else None)
    return scale_of(size if per_row else size.reshape(1), bits)


def bias_levels(bias: Tensor, scale: Tensor) -> Tensor:
    """A bias [N] as int32, at the scale of the product that it is added to."""
    return to_levels(bias.detach(), scale, -BIAS_LIMIT, BIAS_LIMIT).to(torch.int32)


def column(scale: Tensor) -> Tensor:
    """A scale [1] or [N] as it multiplies the rows of a matrix: [1, 1] or [N, 1]."""
    return scale.unsqueeze(-1)


def may_saturate(weight: Tensor) -> bool:
    """Whether two neighbours of a row of int8 [N, K], multiplied by unsigned bytes and added, can
    leave 16 bits: instructions before VNNI (``vpmaddubsw``) then cut the sum off. 7 bits cannot."""
    pairs = F.pad(weight.to(torch.int16), (0, weight.shape[1] % 2)).unflatten(1, (-1, 2))
    furthest = torch.stack([pairs.clamp(min=0).sum(-1), -pairs.clamp(max=0).sum(-1)]).amax()
    return 255 * int(furthest) > 2**15 - 1


def pack(values: Tensor, bits: int) -> Tensor:
    """Put several integers into each byte.

    Args:
        values: int8 [N, K], each of ``bits`` bits.
        bits: 2 (four integers a byte), 3 or 4 (two).

    Returns:
        uint8 [N, ceil(K / integers a byte)]; the first integer is in the lowest bits.
    """
    width = width_of(bits)
    each = 8 // width
    padded = F.pad(values.to(torch.int16) + 2 ** (width - 1), (0, -values.shape[-1] % each))
    parts = padded.unflatten(-1, (-1, each))  # [N, bytes, each]
    shifts = torch.arange(0, 8, width, dtype=torch.int16, device=values.device)
    return (parts << shifts).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The int8 [..., columns] that `pack` made uint8 [..., bytes] of."""
    width = width_of(bits)
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    parts = (packed.unsqueeze(-1) >> shifts) & (2**width - 1)  # [..., bytes, each]
    return (parts.flatten(-2)[..., :columns].to(torch.int8)) - 2 ** (width - 1)


def width_of(bits: int) -> int:
    """Bits that an integer takes up on disk: 2, 4 or 8."""
    return 2 if bits == 2 else 4 if bits <= 4 else 8
