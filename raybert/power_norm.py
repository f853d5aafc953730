"""PowerNorm over real tokens: normalisation by running second moments, an affine map once trained.

Shen et al., "PowerNorm: Rethinking Batch Normalization in Transformers", ICML 2020, algorithm 2.
Each channel is divided by a running average of its root mean square; gradients pass through an
approximate backward step with running statistics of their own. In evaluation, and wherever nothing
is observed, it is ``scale * x + shift`` with constants.

Unlike LayerNorm's, such an output has no bound: a token far from the rest stays as far, and grows
from layer to layer where others are multiplied with it. A bound cuts it off.

Statistics are of real tokens alone, of all workers, and of all forward passes of an optimiser step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raybert.workers import workers

PENDING = ("seen_moment", "seen_tokens", "seen_gz", "seen_zz")
"""Buffers that exist only while statistics are taken: sums since the last update."""


class RealTokens:
    """Which tokens of the forward pass under way are real; set once, read by every norm."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    def weight(self, x: Tensor) -> Tensor:
        """1 for real tokens of x [B, T, H] and 0 for padding, [B, T, 1]."""
        if self.mask is None:
            return x.new_ones(*x.shape[:-1], 1)
        return self.mask.to(x.dtype).unsqueeze(-1)


def summed(*parts: Tensor) -> list[Tensor]:
    """Vectors added up over all workers, in one message."""
    if workers() == 1:
        return list(parts)
    packed = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(packed)
    pieces = packed.split([part.numel() for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]


class _Divide(torch.autograd.Function):
    """``z = x / psi``, backwards with the running statistic nu of the gradients.

    ``dL/dx = (dL/dz - nu * z) / psi``, where ordinary normalisation would have the batch's own mean
    of ``dL/dz * z`` in nu's place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, psi: Tensor, real: Tensor, norm: PowerNorm) -> Tensor:
        """x [B, T, H], psi [H], real [B, T, 1]; the norm gets the statistics."""
        z = x / psi
        ctx.save_for_backward(z, psi, real)
        ctx.norm = norm
        return z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Of the four inputs, x alone has a gradient."""
        z, psi, real = ctx.saved_tensors
        (grad,) = grads
        norm, size = ctx.norm, workers()
        known = z * real
        # A worker's gradient is of its own mean loss; that of all workers together is their mean.
        gz, zz = summed((grad * known).sum((0, 1)) / size, (known * z).sum((0, 1)))
        norm.seen_gz += gz
        norm.seen_zz += zz
        return (grad - size * norm.nu * known) / psi, None, None, None


class AffineNorm(nn.Module):
    """A norm that in evaluation is an affine map of each channel, by a running second moment.

    Buffers: ``running_phi`` [H], that moment; ``bound`` [H] or [], where there is one: the largest
    size of what comes out.
    """

    running_phi: Tensor
    bound: Tensor | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter,
        eps: float,
        running_phi: Tensor,
        bound: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = weight, bias, eps
        self.register_buffer("running_phi", running_phi)
        self.register_buffer("bound", bound)

    def affine(self) -> tuple[Tensor, Tensor]:
        """The scale and shift [H] that this is in evaluation."""
        return self.weight * torch.rsqrt(self.running_phi + self.eps), self.bias

    def bounded(self, x: Tensor) -> Tensor:
        """x of any shape, cut off at the bound."""
        return x if self.bound is None else x.clamp(-self.bound, self.bound)


class PowerNorm(AffineNorm):
    """Normalises the channels of [B, T, H]; takes a LayerNorm's place and adopts its parameters.

    With ``bounded`` each channel has a bound, infinite until it is set.

    Buffers: ``running_phi`` [H], the running second moment psi^2; ``nu`` [H], the running statistic
    of the gradients; ``updates``, how often both were moved in the phase that trained them last.
    """

    nu: Tensor
    updates: Tensor
    seen_moment: Tensor
    seen_tokens: Tensor
    seen_gz: Tensor
    seen_zz: Tensor

    def __init__(self, norm: nn.LayerNorm, *, bounded: bool = False) -> None:
        zeros = torch.zeros_like(norm.weight, dtype=torch.float32).detach()
        bound = torch.full_like(zeros, torch.inf) if bounded else None
        super().__init__(norm.weight, norm.bias, norm.eps, torch.ones_like(zeros), bound)
        self.register_buffer("nu", zeros)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long, device=zeros.device))
        self.real: RealTokens | None = None
        self.warmup = 0
        """Updates during which a forward pass is normalised by its own moment."""

    # -- what the loop switches ----------------------------------------------------------------

    def observe(self, real: RealTokens) -> None:
        """From now on, take statistics wherever the module is in training mode."""
        self.real = real
        zeros = torch.zeros_like(self.nu)
        for name in PENDING:
            start = zeros.new_zeros(()) if name == "seen_tokens" else zeros.clone()
            self.register_buffer(name, start)

    def settle(self) -> None:
        """Take no more statistics: from now on this is an affine map."""
        self.real = None
        for name in PENDING:
            delattr(self, name)

    def update(self, alpha: float) -> None:
        """Move the running statistics by what was seen since the last time; if nothing, not at all.

        ``alpha`` is the weight of the past: psi^2 by a cumulative average for the first ``warmup``
        updates, then ``alpha psi^2 + (1 - alpha) moment``; nu by
        ``nu (1 - (1 - alpha) mean(z^2)) + (1 - alpha) mean(g z)``.
        """
        fresh = self.seen_tokens > 0
        tokens = self.seen_tokens.clamp(min=1)
        count = self.updates + 1
        share = torch.where(count <= self.warmup, 1.0 / count, 1.0 - alpha)
        phi = self.running_phi.lerp(self.seen_moment / tokens, share.to(self.running_phi))
        gamma, lam = self.seen_zz / tokens, self.seen_gz / tokens
        nu = self.nu * (1 - (1 - alpha) * gamma) + (1 - alpha) * lam
        self.running_phi.copy_(torch.where(fresh, phi, self.running_phi))
        self.nu.copy_(torch.where(fresh, nu, self.nu))
        self.updates += fresh
        for name in PENDING:
            self.get_buffer(name).zero_()

    # -- computing -----------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H] -> [B, T, H]."""
        if self.real is None or not self.training:
            scale, shift = self.affine()
            # Statistics are float32 whatever type the model is loaded in.
            return self.bounded(torch.addcmul(shift, x, scale)).to(x.dtype)
        x = x.float()  # sums of squares leave half precision's range
        psi, real = self._observed(x)
        z: Any = _Divide.apply(x, psi, real, self)
        return self.bounded(z * self.weight + self.bias)

    @torch.no_grad()
    def _observed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Note a pass's second moments; what it is divided by [H], and which tokens are real."""
        assert self.real is not None
        real = self.real.weight(x)
        moment, tokens = summed((x * x * real).sum((0, 1)), real.sum())
        self.seen_moment += moment
        self.seen_tokens += tokens
        own = moment / tokens.clamp(min=1)
        phi = torch.where(self.updates < self.warmup, own, self.running_phi)
        return torch.sqrt(phi + self.eps), real

    def extra_repr(self) -> str:
        """What printing shows."""
        return f"{len(self.nu)}, eps={self.eps}"
