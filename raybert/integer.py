"""What an integer-only model computes besides linear layers: products of activations, and norms.

Such a model has been through `ma_bert`: between its embeddings and its head there are matrix
products, ReLU, additions and affine norms, and all of them are done on integers. Every value lies
on a grid, ``scale * level`` with levels -128 ... 127, or 0 ... 255 behind a ReLU:

- the two sides of each product of activations, scores and context, have learned ranges;
- so has what a linear layer adds to the residual stream, the sum, and what a norm makes of it. What
  reads the stream next takes it as it is: the linear layers behind a norm have no range of their
  own;
- a norm multiplies each channel's level by an 8-bit weight, adds a 32-bit bias and rescales.

A few channels of a BERT's stream are many times larger than the rest, which one grid for all would
round to nothing. So each channel gets a unit of its own (`set_units`): the stream holds
``x / unit``, and the unit is multiplied into the norms and matrices around it, which changes
nothing but where levels are spent (as Xiao et al., SmoothQuant, ICML 2023, do for the inputs of
linear layers).

Each comes twice, as it is trained and as the integers that are left; see `raybert.fake_quant`. The
operators compute in PyTorch with whole numbers in float32, and are integer ones in ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from raybert.fake_quant import Range, nearest, weight_levels
from raybert.grid import BIAS_LIMIT, bias_levels, largest, levels, to_levels
from raybert.grid import weight_scale_of as row_scales
from raybert.int8 import Quantised, Scaled
from raybert.power_norm import AffineNorm, PowerNorm
from raybert.softmax_net import SoftmaxNet
from raybert.surgery import encoder_layers, matrices, model_inputs, self_attention

LOW, HIGH = levels(8)


# -- operators -------------------------------------------------------------------------------------


@torch.library.custom_op("raybert::product_int8", mutates_args=())
def product_int8(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    unsigned: bool,
    bits: int,
) -> Tensor:
    """``(q(a) @ q(b)) * (a_scale * b_scale) + bias``, the product in whole numbers.

    Args:
        a: [..., M, K], floating point.
        b: [..., K, N].
        a_scale: float32 scalar.
        b_scale: float32 scalar.
        bias: float32 [N].
        unsigned: whether levels of ``a`` are 0 ... 255.
        bits: of a level of ``b``.

    Returns:
        [..., M, N] of ``a``'s type.
    """
    # Sums of fewer than 512 products of bytes are exact in float32.
    left = to_levels(a, a_scale, *levels(8, unsigned))
    with torch.autocast(a.device.type, enabled=False):  # which would round them
        out = (left @ to_levels(b, b_scale, *levels(bits))) * (a_scale * b_scale)
    return (out if bias is None else out + bias).to(a.dtype)


@product_int8.register_fake
def _(a, b, a_scale, b_scale, bias, unsigned, bits):
    return a.new_empty((*a.shape[:-1], b.shape[-1]))


@register_flop_formula(torch.ops.raybert.product_int8)
def _product_flops(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(a) * b[-1]


@torch.library.custom_op("raybert::norm_int8", mutates_args=())
def norm_int8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    input_scale: Tensor,
    output_scale: Tensor,
) -> Tensor:
    """``s' * clamp(round((q(x) * weight + bias) * (s * weight_scale / s')))`` for each channel.

    Args:
        x: [..., H], floating point.
        weight: int8 [H, 1].
        weight_scale: float32 [H].
        bias: int32 [H], at the scale of the product.
        input_scale: s, float32 scalar.
        output_scale: s', float32 scalar.

    Returns:
        [..., H] of ``x``'s type.
    """
    sums = to_levels(x, input_scale, LOW, HIGH) * weight.flatten() + bias
    rescaled = sums * (input_scale * weight_scale / output_scale)
    return (rescaled.round_().clamp_(LOW, HIGH) * output_scale).to(x.dtype)


@norm_int8.register_fake
def _(x, weight, weight_scale, bias, input_scale, output_scale):
    return torch.empty_like(x)


# -- products of two activations -------------------------------------------------------------------


class FakeQuantProduct(nn.Module):
    """``a @ b + bias`` that computes as the `Int8Product` it will become.

    ``unsigned``: ``a`` comes from a ReLU. ``bits``: of a level of ``b``, which stands where kernels
    have weights: of 7 no two products leave 16 bits (see `raybert.grid.may_saturate`).
    """

    def __init__(self, unsigned: bool, bits: int = 8) -> None:
        super().__init__()
        self.bits = bits
        self.left_range, self.right_range = Range(8, True, unsigned), Range(bits, True)
        self.active = True

    def forward(self, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """a [..., M, K], b [..., K, N] and bias [N] -> [..., M, N]."""
        left, right = self.left_range.grid(a), self.right_range.grid(b)
        if self.training and not self.active:
            out = a @ b
        else:
            with torch.autocast(a.device.type, enabled=False):  # half precision cannot hold sums
                out = (nearest(a, *left) @ nearest(b, *right)) * (left.scale * right.scale)
        return out if bias is None else out + bias

    def finished(self) -> Int8Product:
        """The product of integers."""
        new = Int8Product(self.left_range.unsigned, self.bits)
        new.left_scale = self.left_range.average.scale
        new.right_scale = self.right_range.average.scale
        return new


class Int8Product(Scaled):
    """``a @ b + bias`` in integers, by learned ranges of both."""

    left_scale: Tensor
    right_scale: Tensor

    def __init__(self, unsigned: bool, bits: int = 8) -> None:
        super().__init__()
        self.unsigned, self.bits = unsigned, bits
        self.register_buffer("left_scale", torch.ones(()))
        self.register_buffer("right_scale", torch.ones(()))
        self._scales += ["left_scale", "right_scale"]

    def forward(self, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """a [..., M, K], b [..., K, N] and bias [N] -> [..., M, N]."""
        scales = self.left_scale, self.right_scale
        return product_int8(a, b, *scales, bias, self.unsigned, self.bits)


def products_may_saturate(model: nn.Module) -> bool:
    """Whether sums of two integer products of activations can leave 16 bits."""
    return any(isinstance(module, Int8Product) and module.bits > 7 for module in model.modules())


# -- norms -----------------------------------------------------------------------------------------


class FakeQuantNorm(AffineNorm):
    """An affine norm that computes as the `Int8Norm` it will become. Adopts what a PowerNorm has.

    Its ``output_range`` is that of the residual stream, for all that read it; ``unit`` [H] is what
    its outputs are counted in, 1 unless `set_units` said otherwise.
    """

    unit: Tensor

    def __init__(self, norm: PowerNorm) -> None:
        # Integers have one grid for all channels, which ends at what was seen within the bounds;
        # in units of the bounds, that is each channel's own.
        bound = None if norm.bound is None else norm.bound.max()
        super().__init__(norm.weight, norm.bias, norm.eps, norm.running_phi, bound)
        self.register_buffer("unit", torch.ones_like(norm.running_phi))
        self.input_range, self.output_range = Range(8, True), Range(8, True)
        self.active = True

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H] -> [B, T, H]."""
        factor, shift = self.affine()
        grid = self.input_range.grid(x)
        if self.training and not self.active:
            out = self.bounded(torch.addcmul(shift, x, factor))
            self.output_range.observe(out)
            return out
        rows = row_scales(factor.unsqueeze(1), 8, True)  # [H]
        scale = grid.scale * rows
        weight = weight_levels(factor.unsqueeze(1), rows, 8).flatten()
        bias = nearest(shift, scale, -BIAS_LIMIT, BIAS_LIMIT)
        out = (nearest(x, *grid) * weight + bias) * scale
        end = self.output_range.grid(self.bounded(out))
        return nearest(out, *end) * end.scale

    def finished(self) -> Int8Norm:
        """The norm of integers."""
        factor, shift = (part.detach() for part in self.affine())
        rows = row_scales(factor.unsqueeze(1), 8, True)
        new = Int8Norm(len(factor))
        new.fill(factor.unsqueeze(1), rows)
        new.input_scale = self.input_range.average.scale
        new.output_scale = self.output_range.average.scale
        new.bias = bias_levels(shift, new.input_scale * rows)
        return new


class Int8Norm(Quantised):
    """``x * weight + bias`` for each channel, in integers, onto the residual stream's grid."""

    bias: Tensor
    input_scale: Tensor
    output_scale: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 1, 8, per_row=True)
        self.register_buffer("bias", torch.zeros(channels, dtype=torch.int32))
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("output_scale", torch.ones(()))
        self._scales += ["input_scale", "output_scale"]

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H] -> [B, T, H]."""
        return norm_int8(
            x, self.weight, self.weight_scale, self.bias, self.input_scale, self.output_scale
        )


# -- the model -------------------------------------------------------------------------------------


def roles(model: Any) -> dict[nn.Module, dict[str, bool]]:
    """What sets linear layers and products apart, as fields of `Scheme`: inputs that come from a
    ReLU, outputs that are added to the residual stream."""
    found: dict[nn.Module, dict[str, bool]] = {}
    for layer in encoder_layers(model):
        parts = matrices(layer)
        found[parts["attention_output"]] = {"requantise": True}
        found[parts["output"]] = {"requantise": True, "unsigned": True}
        found[self_attention(layer).get_submodule("context")] = {"unsigned": True}
    return found


def norms_of(model: nn.Module) -> list[AffineNorm]:
    """The norms along the residual stream: behind the embeddings, then two for each layer."""
    return [module for module in model.modules() if isinstance(module, AffineNorm)]


def stream(model: Any) -> Iterator[tuple[Any, list[Any], Any]]:
    """Along the residual stream: each norm but the last, the linear layers that read what it gives,
    and the one that adds to it."""
    norms = norms_of(model)
    for index, layer in enumerate(encoder_layers(model)):
        parts = matrices(layer)
        readers = [parts[name] for name in ("query", "key", "value")]
        yield norms[2 * index], readers, parts["attention_output"]
        yield norms[2 * index + 1], [parts["intermediate"]], parts["output"]


@torch.no_grad()
def set_units(model: Any, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Count each channel of the residual stream in a unit of its own, wherever a layer reads and
    adds to it: how large it may become (its norm's bound), or became on these rows.

    The model computes the same as before. What the last norm gives keeps its unit, for the head.

    Args:
        model: after `ma_bert`, in evaluation mode; its weights are changed.
        batches: calibration rows.

    Returns:
        The units [H] of each norm's outputs, by the norm's name.
    """
    names = {module: name for name, module in model.named_modules()}
    sizes = _sizes(model, batches)
    following: Any = norms_of(model)[1:]
    found = {}
    for (norm, readers, adding), after in zip(stream(model), following, strict=True):
        whole = sizes[norm].clamp(min=1e-3)
        unit = whole / whole.log().mean().exp()  # the geometric mean stays where it was
        for reader in readers:
            reader.weight *= unit
        after.weight *= unit
        for value in (norm.weight, norm.bias, norm.bound, adding.bias):
            if value is not None:
                value /= unit
        adding.weight /= unit.unsqueeze(1)
        found[names[norm]] = unit
    return found


def _sizes(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[AffineNorm, Tensor]:
    """How large each channel [H] of what norms give may become: the bound, where a norm has one for
    every channel, else the largest magnitude over the rows' real tokens."""
    sizes: dict[AffineNorm, Tensor] = {}
    handles = []
    real = torch.empty(0)

    def note(norm: Any, _args: Any, output: Tensor) -> None:
        now = largest((output * real[:, : output.shape[1]]).flatten(0, 1), 0).float()
        sizes[norm] = torch.maximum(sizes[norm], now) if norm in sizes else now

    for norm in norms_of(model):
        if norm.bound is not None and norm.bound.isfinite().all():
            sizes[norm] = norm.bound
        else:
            handles.append(norm.register_forward_hook(note))
    try:
        for batch in batches if handles else ():
            real = batch["attention_mask"].unsqueeze(-1)  # [B, T, 1]
            model(**model_inputs(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    return sizes


def regroup(model: nn.Module) -> None:
    """Let softmax nets that do not yet do so multiply keys and values: a quarter of the work."""
    for module in model.modules():
        if isinstance(module, SoftmaxNet) and not module.regrouped:
            module.regroup()


def join(model: Any) -> None:
    """Let linear layers behind a norm read the residual stream as it is."""
    for norm, readers, _ in stream(model):
        for reader in readers:
            reader.read(norm.output_range)
