"""Integer arithmetic: the int8 matrix product, and the modules of a quantised model.

The modules here only compute; training with quantisation in mind is ``raybert.methods.q8bert``'s.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from raybert.errors import UserError
from raybert.grid import (
    Grid,
    bias_levels,
    column,
    largest,
    levels,
    pack,
    scale_of,
    to_levels,
    unpack,
    width_of,
)

BLOCK_ROWS = 128
"""Rows, for each thread, that a CPU quantises at a time, so that what lies between stays in cache;
1.3 to 2 times faster at 1024 x 1536."""


# -- the product -----------------------------------------------------------------------------------


@torch.library.custom_op("raybert::linear_int8", mutates_args=())
def linear_int8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    unsigned: bool = False,
    zero: Tensor | None = None,
) -> Tensor:
    """``(q(x) @ weight.T) * (input_scale * weight_scale) + bias``, the product in whole numbers.

    ``q(x) = clamp(round_half_even(x / input_scale), -128, 127)``; or from 0 to 255, or from
    ``-zero`` to ``255 - zero``.

    Args:
        x: [..., K], floating point.
        weight: int8 [N, K].
        weight_scale: float32 [1] or [N].
        input_scale: float32 scalar; nothing: ``max|x| / 127`` over all of ``x``.
        bias: float32 [N].
        unsigned: whether levels are 0 ... 255.
        zero: another zero point, a float32 scalar that holds 0 to 255.

    Returns:
        [..., N] of ``x``'s type.
    """
    # Autocast would take whole numbers for floats that may be rounded.
    with torch.autocast(x.device.type, enabled=False):
        return _linear_int8(x, weight, weight_scale, input_scale, bias, unsigned, zero)


@linear_int8.register_fake
def _(x, weight, weight_scale, input_scale, bias, unsigned=False, zero=None):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_int8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    unsigned: bool,
    zero: Tensor | None,
) -> Tensor:
    if input_scale is None:
        input_scale = scale_of(largest(x), 8)
    rows = x.reshape(-1, x.shape[-1])  # [M, K]
    scale = input_scale * weight_scale
    low, high = levels(8, unsigned)
    grid = Grid(input_scale, low, high) if zero is None else Grid(input_scale, -zero, 255 - zero)
    sums, missing = _sums(rows, weight, grid)
    # In the same memory: a second result of this size would cost as much as a quarter of the work.
    out = sums.view(torch.float32)
    for part, whole in zip(_blocks(out), _blocks(sums), strict=True):
        part.copy_(whole if missing is None else whole.add_(missing)).mul_(scale)
        if bias is not None:
            part.add_(bias)
    return out.view(*x.shape[:-1], -1).to(x.dtype)


@register_flop_formula(torch.ops.raybert.linear_int8)
def _linear_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def _sums(rows: Tensor, weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """q(rows) [M, K] @ weight.T [K, N]: int32, or float32 that holds the same numbers; and int32
    [N] that is missing from each row of it, if anything is."""
    kind, many = backend(rows.device.type), rows.shape[0]
    if kind == "float":
        # Whole numbers below 2^24 are exact in float32, and so are sums that stay below it, as all
        # but those of inputs at their ends throughout do.
        return to_levels(rows, *grid) @ weight.float().T, None
    shift = 128 + grid.low  # kernels take signed bytes
    same = not isinstance(shift, Tensor) and shift == 0
    quantised = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    for part, real in zip(_blocks(quantised), _blocks(rows), strict=True):
        whole = to_levels(real, *grid)
        part.copy_(whole if same else whole.sub_(shift))
    count, padded = weight.shape[0], weight
    if kind == "cuda":  # its kernel wants more than 16 rows, and eights of the other two
        across, down = -weight.shape[1] % 8, -count % 8
        quantised = F.pad(quantised, (0, across, 0, 32 - many if many <= 16 else 0))
        padded = F.pad(weight, (0, across, 0, down)) if across or down else weight
    sums = torch._int_mm(quantised, padded.t())[:many, :count].contiguous()
    if same:
        return sums, None
    shift = torch.as_tensor(shift, dtype=torch.int32, device=rows.device)
    return sums, weight.sum(1, dtype=torch.int32) * shift


@torch.library.custom_op("raybert::on_grid", mutates_args=())
def on_grid(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """``clamp(round_half_even(x / scale), low, high) * scale``, of ``x``'s shape and type."""
    return (to_levels(x, scale, low, high) * scale).to(x.dtype)


@on_grid.register_fake
def _(x, scale, low, high):
    return torch.empty_like(x)


def _blocks(rows: Tensor) -> tuple[Tensor, ...]:
    """Views of consecutive rows."""
    size = BLOCK_ROWS * torch.get_num_threads()
    whole = len(rows) <= size or rows.device.type != "cpu"
    return (rows,) if whole else rows.split(size)


Backend = Literal["onednn", "cuda", "float"]


@functools.cache
def backend(device: str = "cpu") -> Backend:
    """What multiplies int8 on this machine's ``cpu`` or ``cuda``.

    ``onednn`` and ``cuda`` are integer products. ``float`` computes the same numbers in float32, at
    float32's cost: so it is on processors without VNNI, where oneDNN's product of bytes is no
    faster than float32's and its pairs of products overflow 16 bits.
    """
    if device == "cuda":
        return "cuda" if _multiplies(device) else "float"
    able = torch.cpu.get_capabilities()
    fast = any(able.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    return "onednn" if device == "cpu" and fast and _multiplies(device) else "float"


def _multiplies(device: str) -> bool:
    """Whether `torch._int_mm` is there and right at the ends of the range."""
    weight = torch.full((64, 64), 127, dtype=torch.int8, device=device)
    rows = weight.clone()
    rows[::2] = -128
    try:
        product = torch._int_mm(rows, weight.t())
    except (RuntimeError, NotImplementedError):
        return False
    return torch.equal(product.cpu().double(), (rows.double() @ weight.double().T).cpu())


# -- modules ---------------------------------------------------------------------------------------


Inputs = Literal["static", "dynamic", "float"]


@dataclass(frozen=True)
class Scheme:
    """How one linear layer is quantised.

    Attributes:
        weight_bits: 2 to 8.
        activation_bits: of inputs, and of outputs if they are quantised too.
        inputs: scaled by a learned range, by each batch's own, or not quantised at all.
        per_row: a scale for each output instead of one for the matrix.
        requantise: whether outputs are put on their own grid.
        unsigned: whether inputs are never negative, and their levels neither.
        asymmetric: whether the learned range of inputs has two ends of its own, and a zero point.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    inputs: Inputs = "static"
    per_row: bool = False
    requantise: bool = False
    unsigned: bool = False
    asymmetric: bool = False


class Scaled(nn.Module):
    """A module of a quantised model, whose scales stay float32 whatever the model is cast to: half
    precision has 8 to 11 bits."""

    def __init__(self) -> None:
        super().__init__()
        self._scales: list[str] = []

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = {name: self._buffers[name] for name in self._scales}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class Quantised(Scaled):
    """A matrix [rows, columns] of integers with its scale; for inference only.

    Up to 4 bits its buffer ``weight`` is packed, uint8 [rows, bytes]; otherwise it is int8.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, rows: int, columns: int, bits: int, per_row: bool) -> None:
        super().__init__()
        self.rows, self.columns, self.bits = rows, columns, bits
        width = width_of(bits)
        held = -(-columns * width // 8)
        kind = torch.int8 if width == 8 else torch.uint8
        self.register_buffer("weight", torch.zeros(rows, held, dtype=kind))
        self.register_buffer("weight_scale", torch.ones(rows if per_row else 1))
        self._scales.append("weight_scale")
        self._unpacked: tuple[Any, Tensor] | None = None
        self.training = False

    def fill(self, weight: Tensor, scale: Tensor) -> None:
        """Take over a float matrix.

        Args:
            weight: [rows, columns].
            scale: [1] or [rows].
        """
        whole = torch.round(weight.detach() / column(scale)).to(torch.int8)
        self.weight = whole if width_of(self.bits) == 8 else pack(whole, self.bits)
        self.weight_scale = scale.detach().clone()

    def integers(self) -> Tensor:
        """The integers, int8 [rows, columns]; packed ones are unpacked once."""
        if width_of(self.bits) == 8:
            return self.weight
        if torch.compiler.is_compiling() or self.weight.is_inference() or self.weight.is_meta:
            return unpack(self.weight, self.bits, self.columns)
        key = (self.weight.data_ptr(), self.weight._version)
        if self._unpacked is None or self._unpacked[0] != key:
            self._unpacked = key, unpack(self.weight, self.bits, self.columns)
        return self._unpacked[1]

    def train(self, mode: bool = True) -> Quantised:
        """Refuse training mode.

        Raises:
            UserError: ``mode`` is true.
        """
        if mode:
            check_trainable(self)
        return super().train(False)


def check_trainable(model: nn.Module) -> None:
    """Refuse a model that holds integers.

    Raises:
        UserError: it does.
    """
    if any(isinstance(module, Quantised) for module in model.modules()):
        raise UserError(
            "this model's weights are integers: it is for inference only and cannot be put in "
            "training mode. Train the model that it was quantised from, and quantise that again."
        )


class Int8Embedding(Quantised):
    """An embedding table of integers; ``weight[ids] * weight_scale``."""

    def __init__(self, rows: int, columns: int, bits: int = 8, per_row: bool = False) -> None:
        super().__init__(rows, columns, bits, per_row)
        self.dtype = torch.get_default_dtype()  # of what comes out

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., columns]."""
        found = F.embedding(ids, self.weight)  # six times as fast as indexing
        if width_of(self.bits) < 8:
            found = unpack(found, self.bits, self.columns)
        scale = self.weight_scale
        each = column(scale[ids]) if len(scale) > 1 else scale
        return (found.float() * each).to(self.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Embedding:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        """What printing shows."""
        return f"{self.rows}, {self.columns}, bits={self.bits}"


class Int8Linear(Quantised):
    """``x @ W.T + b`` with W in integers, and x too unless the scheme leaves inputs float.

    Args:
        inputs: K.
        outputs: N.
        scheme: how it is quantised.
        bias: whether there is one: int32 at the scale of the product where inputs have a learned
            range, float32 otherwise.
    """

    def __init__(self, inputs: int, outputs: int, scheme: Scheme, bias: bool = True) -> None:
        super().__init__(outputs, inputs, scheme.weight_bits, scheme.per_row)
        self.scheme = scheme
        self.bias: Tensor | None
        self.input_scale: Tensor
        self.input_zero: Tensor
        self.output_scale: Tensor
        static = scheme.inputs == "static"
        if static:
            self._scales.append("input_scale")
            self.register_buffer("input_scale", torch.ones(()))
        if static and scheme.asymmetric:
            self._scales.append("input_zero")
            self.register_buffer("input_zero", torch.zeros(()))
        if static and scheme.requantise:
            self._scales.append("output_scale")
            self.register_buffer("output_scale", torch.ones(()))
        if bias and static:
            self.register_buffer("bias", torch.zeros(outputs, dtype=torch.int32))
        else:
            empty = nn.Parameter(torch.zeros(outputs), requires_grad=False)
            self.register_parameter("bias", empty if bias else None)

    def fill_bias(self, bias: Tensor, weight_scale: Tensor) -> None:
        """Take over a float bias [N], once the scales of inputs and weights [1] or [N] are set."""
        if self.scheme.inputs == "static":
            self.bias = bias_levels(bias, self.input_scale * weight_scale)
        else:
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)

    def matrix(self) -> tuple[Tensor, Tensor]:
        """int8 [N, K] and its scale."""
        return self.integers(), self.weight_scale

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        weight, weight_scale = self.matrix()
        scheme, bias = self.scheme, self.bias
        if scheme.inputs == "float":
            return F.linear(x, (weight * column(weight_scale)).to(x.dtype), bias)
        low, high = levels(scheme.activation_bits, scheme.unsigned)
        input_scale = zero = None
        if scheme.inputs == "static":
            input_scale = self.input_scale
            if scheme.asymmetric:
                zero = self.input_zero
                low, high = -zero, 2**scheme.activation_bits - 1 - zero
            if bias is not None:
                bias = bias * (input_scale * weight_scale)
            if scheme.activation_bits < 8:
                x = x.clamp(low * input_scale, high * input_scale)
        elif scheme.activation_bits < 8:
            input_scale = scale_of(largest(x), scheme.activation_bits)
        if bias is not None:
            bias = bias.float()
        out = linear_int8(x, weight, weight_scale, input_scale, bias, scheme.unsigned, zero)
        if scheme.requantise:
            static = scheme.inputs == "static"
            step = self.output_scale if static else scale_of(largest(out), scheme.activation_bits)
            out = on_grid(out, step, *levels(scheme.activation_bits))
        return out

    def extra_repr(self) -> str:
        """What printing shows."""
        return f"{self.columns}, {self.rows}, {self.scheme}"


class TiedInt8Linear(Int8Linear):
    """A decoder over the vocabulary whose matrix is the embedding table's, held there alone."""

    def __init__(self, table: Int8Embedding, scheme: Scheme, bias: bool = True) -> None:
        super().__init__(table.columns, table.rows, scheme, bias)
        del self.weight, self.weight_scale
        self._scales.remove("weight_scale")
        self._table = (table,)  # in a tuple, so that it is not a module of this one

    def matrix(self) -> tuple[Tensor, Tensor]:
        """int8 [V, H] and its scale."""
        table = self._table[0]
        return table.integers(), table.weight_scale
