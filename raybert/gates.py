"""Gates: small networks that decide, for each sample, which of a block's units are computed
(EBERT, Liu et al., Findings of ACL 2021).

A unit is a head of attention or a neuron of the feed-forward. In training a gate's decision is
drawn (Gumbel-sigmoid, hard at 0.5, straight-through) and its normalisation sees all workers' rows;
once frozen it decides by the sign of its logits, whatever mode the model is in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from raybert.workers import workers

INNER = 64
"""Width of a gate's hidden layer."""


class Shape(NamedTuple):
    """What a layer's cost depends on: its width H, heads A of D, and inner width I."""

    layers: int
    hidden: int
    heads: int
    inner: int

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads

    @property
    def predictors(self) -> int:
        """Multiply-adds of a layer's two gates, for a sample of any length."""
        return 2 * self.hidden * INNER + INNER * (self.heads + self.inner)

    def head_cost(self, tokens: Any) -> Any:
        """Multiply-adds of one head over so many real tokens: four projections, and attention."""
        return 4 * self.head * self.hidden * tokens + 2 * self.head * tokens * tokens

    def neuron_cost(self, tokens: Any) -> Any:
        """Multiply-adds of one feed-forward neuron over so many real tokens."""
        return 2 * self.hidden * tokens

    def dense_cost(self, tokens: Any) -> Any:
        """Multiply-adds of all layers, ungated, over so many real tokens."""
        layer = self.heads * self.head_cost(tokens) + self.inner * self.neuron_cost(tokens)
        return self.layers * layer

    def cost(self, heads: Any, neurons: Any, tokens: Any) -> Any:
        """Multiply-adds over so many real tokens.

        Args:
            heads, neurons: how many are kept, all layers together.
            tokens: of the sample.
        """
        kept = heads * self.head_cost(tokens) + neurons * self.neuron_cost(tokens)
        return kept + self.layers * self.predictors


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def all_sum(x: Tensor) -> Tensor:
    """The sum over workers; its gradient too is that of all workers' losses."""
    if workers() == 1:
        return x
    total: Any = _AllSum.apply(x)
    return total


class WorkersBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of [B, F] whose statistics in training are those of all workers' rows."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """[B, F] -> [B, F]."""
        if not self.training:
            return super().forward(input)
        own = input.new_full((1,), len(input))
        sums = all_sum(torch.cat([input.sum(0), own]))
        mean, count = sums[:-1] / sums[-1], sums[-1].detach()
        var = all_sum((input - mean).square().sum(0)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            # Of a single row there is no variance to be learned.
            step = 0.1 * (count > 1)
            self.running_mean += step * (mean - self.running_mean)
            unbiased = var * count / (count - 1).clamp(min=1)
            self.running_var += step * (unbiased - self.running_var)
        return (input - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias


def uniform(seed: int, step: int, gate: int, rows: Tensor, count: int) -> Tensor:
    """Numbers in (0, 1) that depend on the arguments alone, whoever draws them.

    Args:
        seed, step, gate: of the run, its optimiser step, and which gate draws.
        rows: the samples' indices [B].
        count: numbers a row.

    Returns:
        [B, count], float32.
    """
    key = _mix(torch.tensor(seed * 1_000_003 + step, device=rows.device) * 8191 + gate)
    units = torch.arange(count, device=rows.device)
    mixed = _mix(_mix(rows.long() + key)[:, None] + units)
    drawn = (((mixed >> 40) & 0xFFFFFF).float() + 0.5) / 2**24
    return drawn.clamp(max=1 - 2**-24)  # the largest is rounded up to 1


def _mix(x: Tensor) -> Tensor:
    """Scramble 64-bit integers (the finaliser of SplitMix64; Steele et al., OOPSLA 2014)."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))


def _signed(value: int) -> int:
    return value - 2**64


class Gate(nn.Module):
    """Linear(H, 64), batch normalisation, ReLU, Linear(64, N): one logit for each unit.

    Args:
        hidden: H.
        units: N.
        number: the gate's place in the model, for its draws.
        top: ``None``: kept where the logit is not negative; else the number of units that are kept,
            those of the largest logits.
        start: the logits' first value, about.
        temperature: of the Gumbel-sigmoid.

    Attributes:
        kept: the decisions of the last forward pass in training [B, N], 0 or 1.
        frozen: whether it no longer draws, and is a plain function of its input.
    """

    def __init__(
        self,
        hidden: int,
        units: int,
        *,
        number: int,
        top: int | None,
        start: float,
        temperature: float,
    ) -> None:
        super().__init__()
        self.reduce = nn.Linear(hidden, INNER)
        self.norm: nn.Module = WorkersBatchNorm(INNER)
        self.score = nn.Linear(INNER, units)
        nn.init.constant_(self.score.bias, start)
        self.number, self.top, self.temperature = number, top, temperature
        self.frozen = False
        self.draw: tuple[int, int, Tensor] | None = None  # seed, step, rows [B]
        self.kept: Tensor | None = None

    def logits(self, first: Tensor) -> Tensor:
        """[B, H] -> [B, N]."""
        reduce, score = self.reduce, self.score
        if self.frozen:  # of small rows a module's call takes as long as its product
            inner = F.linear(first, reduce.weight, reduce.bias).relu()
            return F.linear(inner, score.weight, score.bias)
        return score(torch.relu(self.norm(reduce(first))))

    def forward(self, first: Tensor) -> Tensor:
        """What each sample's vector [B, H] decides for the block's units.

        Returns:
            [B, N]; bool, and in training float, 0 or 1, with the gradient of the logits.
        """
        if torch.is_autocast_enabled(first.device.type):  # too coarse for decisions
            with torch.autocast(first.device.type, enabled=False):
                return self(first)
        first = first.to(self.reduce.weight.dtype)
        logits = self.logits(first)
        if self.frozen or not self.training:
            return self.hard(logits)
        if self.top is None:
            logits = (logits + self._noise(logits)) / self.temperature
        soft = torch.sigmoid(logits)
        self.kept = self.hard(logits).to(soft.dtype) + (soft - soft.detach())
        return self.kept

    def decided(self) -> Tensor:
        """The decisions of the last forward pass in training [B, N]; forgets them, since they hold
        its graph."""
        assert self.kept is not None
        kept, self.kept = self.kept, None
        return kept

    def hard(self, logits: Tensor) -> Tensor:
        """The decision that logits [B, N] stand for, bool; of equal ones all are kept."""
        if self.top is None:
            return logits >= 0
        return logits >= logits.topk(self.top, dim=-1).values.amin(-1, keepdim=True)

    def _noise(self, logits: Tensor) -> Tensor:
        """The difference of two Gumbel variables, which is logistic."""
        assert self.draw is not None, "a gate in training draws for the rows that on_step names"
        seed, step, rows = self.draw
        u = uniform(seed, step, self.number, rows.to(logits.device), logits.shape[-1])
        return torch.log(u) - torch.log1p(-u)

    def freeze(self) -> None:
        """Fold the normalisation into the first layer; from now on nothing is drawn."""
        norm, reduce = self.norm, self.reduce
        if isinstance(norm, WorkersBatchNorm):
            with torch.no_grad():
                scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
                reduce.weight.mul_(scale[:, None])
                reduce.bias.copy_((reduce.bias - norm.running_mean) * scale + norm.bias)
        self.norm, self.frozen = nn.Identity(), True
        # A later phase that trains the gates' blocks leaves the gates alone.
        self.requires_grad_(False)
        self.kept = self.draw = None

    def likeliest(self) -> Tensor:
        """The units by their expected logits, the largest first [N].

        What comes out of the normalisation has the mean and deviation that its parameters say; it
        is taken for normal.
        """
        norm = self.norm
        assert isinstance(norm, WorkersBatchNorm)
        mean, deviation = norm.bias.detach(), norm.weight.detach().abs().clamp(min=1e-6)
        z = mean / deviation
        density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
        active = mean * torch.special.ndtr(z) + deviation * density  # after ReLU
        expected = self.score.weight.detach() @ active + self.score.bias.detach()
        return torch.argsort(expected, descending=True, stable=True)

    def sort(self, order: Tensor) -> None:
        """Put the units in another order."""
        with torch.no_grad():
            self.score.weight.copy_(self.score.weight[order])
            self.score.bias.copy_(self.score.bias[order])

    def narrow(self, kept: Tensor | None, count: int) -> None:
        """Keep the logits of ``count`` units, those named; ``None`` leaves their values open."""
        device = self.score.weight.device
        new = nn.Linear(INNER, count, device=device)
        if kept is not None:
            with torch.no_grad():
                new.weight.copy_(self.score.weight[kept])
                new.bias.copy_(self.score.bias[kept])
        self.score = new
        self.top = None if self.top is None else min(self.top, count)


def flops_loss(
    shape: Shape, kept: Sequence[Tensor], tokens: Tensor, *, target: float, weight: float
) -> tuple[Tensor, Tensor]:
    """``(s - s*)^2 + weight / L * (sum of (s* - s_l)^2 over attentions, and over feed-forwards)``.

    s is the share of FLOPs saved, of all layers and real tokens, the gates' own cost taken off;
    s_l the share of a layer's heads or neurons that are dropped; s* = 1 - target. All are of the
    rows of all workers together.

    Args:
        shape: of the model.
        kept: each gate's decisions [B, N], heads and neurons in turns.
        tokens: real tokens of each row [B].
        target: the share of FLOPs to be left.
        weight: of the layers' own distances; the paper's is 5.

    Returns:
        The loss, and the share of FLOPs that is left, detached.
    """
    goal = 1.0 - target
    length = tokens.to(kept[0].dtype)
    counts = torch.stack([keep.sum(1) for keep in kept])  # [2 L, B]
    cost = shape.cost(counts[::2].sum(0), counts[1::2].sum(0), length)  # [B]
    unit = shape.dense_cost(1)  # sums stay of a size that float32 is exact for
    ends = [cost.sum() / unit, shape.dense_cost(length).sum() / unit, torch.ones_like(length).sum()]
    totals = all_sum(torch.cat([counts.sum(1), torch.stack(ends)]))
    left = totals[-3] / totals[-2]
    units = totals.new_tensor([shape.heads, shape.inner]).repeat(shape.layers)
    dropped = 1.0 - totals[:-3] / (units * totals[-1])  # [2 L]
    layers = (goal - dropped).square().sum() * weight / shape.layers
    return (1.0 - left - goal).square() + layers, left.detach()


def summary(hidden: Tensor, mask: Tensor | None, *, mean: bool) -> Tensor:
    """What a gate looks at: each sample's first token, or the mean over its real tokens.

    Args:
        hidden: [B, T, H].
        mask: what transformers makes of attention_mask for the attention in use: none, or
            [B, 1, 1 or T, T], true or zero where a key is real.
        mean: which of the two.

    Returns:
        [B, H].
    """
    if not mean:
        return hidden[:, 0]
    if mask is None:
        return hidden.mean(1)
    first = mask[:, 0, 0, :]
    real = (first if first.dtype == torch.bool else first == 0).to(hidden.dtype)[:, :, None]
    return (hidden * real).sum(1) / real.sum(1)
