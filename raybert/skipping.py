"""Blocks of a layer that compute only the units that each sample keeps.

A block is a layer's attention or feed-forward with its output projection. Its weights lie unit by
unit, the output matrix transposed, so that picking units copies whole stretches of memory, and the
units likeliest to be kept come first, so that of those there is nothing to be copied. Where a
sample keeps few units their weights are gathered and the product is smaller; where it keeps most,
the whole product is cheaper, and what is not kept is multiplied by zero.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.distilbert.modeling_distilbert import DistilBertSelfAttention
from transformers.models.roberta.modeling_roberta import RobertaSelfAttention

from raybert import kept_operators
from raybert.attention import ProjectedAttention
from raybert.gates import Gate, summary

GATHER = 14
"""What gathering a unit's weights costs, in tokens that the unit could be computed for meanwhile.
Measured on two AVX2 cores, for heads; it puts the end of gathering at 0.9 kept of 128 tokens. For
neurons whose weights come from memory it is 20 to 30."""

CALL = 2_000_000
"""What one more group of samples costs, in multiply-adds that could be done meanwhile."""


@dataclass(frozen=True)
class Group:
    """Samples of a batch that are computed together.

    Attributes:
        rows: their places in the batch [b].
        units: the units that any of them keeps, by number; ``None``: all, nothing is gathered.
        exact: whether each of them keeps all of these, so that nothing is to be masked.
        prefix: how many of the first units are computed where they lie, kept or not; only the rest
            is gathered.
    """

    rows: np.ndarray
    units: np.ndarray | None
    exact: bool
    prefix: int = 0


_FIRST = np.zeros(1, int)


def plan(keep: np.ndarray, tokens: int, unit: int, *, slices: bool) -> list[Group]:
    """Put the samples of a batch into groups, by what their products and gathers would cost.

    Each sample joins the group where it adds the least cost, or starts one: samples that keep
    nearly the same units share one gather, others have their own, and those for which gathering
    does not pay are computed whole.

    Args:
        keep: [B, N], whether the sample keeps the unit.
        tokens: T, a sample's.
        unit: multiply-adds of a unit for a token.
        slices: whether the first units can be computed where they lie.
    """
    units, call = keep.shape[1], CALL / unit
    extra = call if slices else math.inf
    if len(keep) == 1:  # where each microsecond tells
        found = np.flatnonzero(keep[0])
        if len(found) * (GATHER + tokens) < units * tokens:
            return [Group(_FIRST, found, True, _prefix(found, tokens, extra))]
        return [Group(_FIRST, None, len(found) == units)]
    order = np.argsort(-keep.sum(1), kind="stable")
    unions = np.zeros((0, units), dtype=bool)
    members: list[list[int]] = []
    whole: list[int] = []
    for row in order.tolist():
        # A group of its own, or with those computed whole: in tokens times units.
        costs = [keep[row].sum() * (GATHER + tokens) + call, units * tokens]
        if members:
            sizes = np.array([len(group) for group in members])
            now, then = unions.sum(1), (unions | keep[row]).sum(1)
            joined = then * (GATHER + tokens * (sizes + 1)) - now * (GATHER + tokens * sizes)
            costs.append(joined.min())
        best = int(np.argmin(costs))
        if best == 0:
            members.append([row])
            unions = np.concatenate([unions, keep[row : row + 1]])
        elif best == 1:
            whole.append(row)
        else:
            place = int(joined.argmin())
            members[place].append(row)
            unions[place] |= keep[row]
    groups = [
        _gathering(keep, group, union, tokens, extra)
        for group, union in zip(members, unions, strict=True)
    ]
    if whole:
        groups.append(Group(np.array(whole), None, bool(keep[whole].all())))
    return groups


def _gathering(
    keep: np.ndarray, rows: list[int], union: np.ndarray, tokens: int, extra: float
) -> Group:
    """Some samples' group: of the units that any of them keeps."""
    found = np.flatnonzero(union)
    prefix = _prefix(found, tokens * len(rows), extra)
    return Group(np.array(rows), found, bool((keep[rows] == union).all()), prefix)


def _prefix(found: np.ndarray, tokens: int, extra: float) -> int:
    """The prefix that saves most, if it saves more than ``extra``: of the units in it that are kept
    the gathering, at the price of computing those that are not."""
    if len(found) * GATHER <= extra:  # none could
        return 0
    count = np.arange(len(found))
    gain = (count + 1) * GATHER - (found - count) * tokens
    best = int(gain.argmax())
    return int(found[best]) + 1 if gain[best] > extra else 0


class _Scratch(threading.local):
    """One buffer a thread, device and type, that gathered weights are put into, one after another.

    Memory that is new each time has to be cleared by the system, which took longer than copying.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def take(self, shape: list[int], like: Tensor) -> Tensor:
        key, size = (like.device, like.dtype), math.prod(shape)
        if key not in self.buffers or self.buffers[key].numel() < size:
            with torch.inference_mode(False):  # else it could not be written to outside that mode
                self.buffers[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return self.buffers[key][:size].view(shape)


_scratch = _Scratch()


def gathered(weight: Tensor, axis: int, units: Tensor) -> Tensor:
    """A weight of some units, good until the next is gathered; ``axis`` is 0 or 1."""
    if weight.is_meta:
        return weight.index_select(axis, units)
    shape = list(weight.shape)
    shape[axis] = len(units)
    out = _scratch.take(shape, weight)
    parts, rows = math.prod(weight.shape[:axis]), units
    if parts > 1:
        starts = torch.arange(0, parts * weight.shape[axis], weight.shape[axis], device=rows.device)
        rows = (starts[:, None] + units).flatten()
    # As rows of a matrix, which are copied in half the time.
    flat = weight.detach().flatten(0, axis).flatten(1)
    torch.index_select(flat, 0, rows, out=out.view(parts * len(units), -1))
    return out


Chosen = Tensor | int | None
"""Units by number, so many of the first, or all."""


class Units(nn.Module):
    """Weights of N units, each with P x D rows of the matrices that come in, and D that go out.

    ``weight`` [P, N, D, H], ``bias`` [P, N, D], ``out`` [N, D, H], ``out_bias`` [H]: a head has the
    three projections (P = 3) of its width D, a neuron one row (P = 1, D = 1).
    """

    def __init__(self, inward: list[nn.Linear], outward: nn.Linear, count: int) -> None:
        super().__init__()
        self.whole = count  # before any were removed
        width = outward.in_features // count
        weights = [linear.weight.detach().view(count, width, -1) for linear in inward]
        biases = [linear.bias.detach().view(count, width) for linear in inward]
        self.weight = nn.Parameter(torch.stack(weights))
        self.bias = nn.Parameter(torch.stack(biases))
        turned = outward.weight.detach().t().contiguous()
        self.out = nn.Parameter(turned.view(count, width, -1).clone())
        self.out_bias = nn.Parameter(outward.bias.detach().clone())

    @property
    def count(self) -> int:
        """N."""
        return self.out.shape[0]

    @property
    def multiply_adds(self) -> int:
        """Of a unit's products, for a token."""
        parts, _, width, hidden = self.weight.shape
        return (parts + 1) * width * hidden

    def inward(self, x: Tensor, units: Chosen = None) -> Tensor:
        """[B, T, H] -> [B, T, P * n * D], for n units or all."""
        weight, bias = self.weight, self.bias
        if isinstance(units, int):
            weight, bias = weight[:, :units], bias[:, :units]
        elif units is not None:
            weight, bias = gathered(weight, 1, units), bias.index_select(1, units)
        return F.linear(x, weight.flatten(0, 2), bias.flatten())

    def outward(self, y: Tensor, units: Chosen = None, *, bias: bool = True) -> Tensor:
        """[B, T, n * D] -> [B, T, H], for n units or all."""
        if isinstance(units, int):
            out = self.out[:units]
        else:
            out = self.out if units is None else gathered(self.out, 0, units)
        return F.linear(y, out.flatten(0, 1).t(), self.out_bias if bias else None)

    def sort(self, order: Tensor) -> None:
        """Put the units in another order."""
        with torch.no_grad():
            for name, axis in (("weight", 1), ("bias", 1), ("out", 0)):
                weight = self.get_parameter(name)
                weight.copy_(weight.index_select(axis, order))

    def narrow(self, kept: Tensor | None, count: int) -> None:
        """Keep ``count`` units, those named; ``None`` leaves their values open."""
        for name, axis in (("weight", 1), ("bias", 1), ("out", 0)):
            old = self.get_parameter(name).detach()
            shape = list(old.shape)
            shape[axis] = count
            new = old.new_empty(shape) if kept is None else old.index_select(axis, kept)
            self.register_parameter(name, nn.Parameter(new))


class Gated(nn.Module):
    """What both blocks have in common.

    Attributes:
        gate: decides.
        units: the weights.
        mean: whether the gate looks at the mean over tokens, in place of the first.
        skips: whether what a sample does not keep is left out, rather than multiplied by zero.
        expected: the share of units that is taken for kept where there are no values to decide by.
    """

    gate: Gate
    units: Units
    mean: bool
    skips: bool
    expected: float

    def within(
        self, y: Tensor, mask: Tensor | None, keep: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """What happens between the two products: [B, T, P * n * D] -> [B, T, n * D], and more.

        ``keep`` [B, n] is multiplied with what the units give.
        """
        raise NotImplementedError

    def as_operator(self, hidden: Tensor, mask: Tensor | None, keep: Tensor) -> Tensor | None:
        """The block as one operator, for a traced model: [B, T, H] -> [B, T, H]; ``None``: there is
        none for this block, whose units are all computed, and multiplied by zero."""
        raise NotImplementedError

    def run(self, hidden: Tensor, mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Any]:
        """hidden_states [B, T, H] -> [B, T, H], and the attention where there is one."""
        first = summary(hidden, mask, mean=self.mean)
        if hidden.is_meta:
            self.gate.logits(first)  # to be counted
            count = max(1, min(self.units.count, round(self.expected * self.units.whole)))
            units = torch.arange(count, device=hidden.device)
            return self._part(hidden, mask, units, None, **kwargs)
        keep = self.gate(first)
        if self.skips and kept_operators.wanted():
            operator = self.as_operator(hidden, mask, keep)
            if operator is not None:
                return operator, None
        if not self._skipping():
            return self._part(hidden, mask, None, keep, **kwargs)
        unit, slices = self.units.multiply_adds, self.slices
        groups = plan(keep.cpu().numpy(), hidden.shape[1], unit, slices=slices)
        if len(groups) == 1:
            return self._group(groups[0], hidden, mask, keep, **kwargs)
        out = torch.empty_like(hidden)
        for group in groups:
            rows = torch.from_numpy(group.rows).to(hidden.device)
            masked = None if mask is None else mask[rows]
            part = self._group(group, hidden[rows], masked, keep[rows], **kwargs)
            out[rows] = part[0].to(out.dtype)  # under autocast it is of another type
        return out, None

    def _skipping(self) -> bool:
        if not self.skips or self.training:
            return False
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # for other samples too
            return False
        # Gathered weights are overwritten before gradients could be taken.
        return not torch.is_grad_enabled()

    def _group(
        self, group: Group, hidden: Tensor, mask: Tensor | None, keep: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        if group.units is None:
            return self._part(hidden, mask, None, None if group.exact else keep, **kwargs)
        prefix, inside, out = group.prefix, 0, None
        if prefix:
            inside = int(np.searchsorted(group.units, prefix))
            all_kept = group.exact and inside == prefix
            part = self._part(hidden, mask, prefix, None if all_kept else keep[:, :prefix])
            if inside == len(group.units):
                return part
            out = part[0]
        if not len(group.units):
            return torch.zeros_like(hidden) + self.units.out_bias, None
        units = torch.from_numpy(group.units[inside:]).to(hidden.device)
        masks = None if group.exact else keep.index_select(1, units)
        rest, more = self._part(hidden, mask, units, masks, bias=out is None, **kwargs)
        return (rest if out is None else out + rest), more

    @property
    def slices(self) -> bool:
        """Whether the first units can be computed where they lie: they have one matrix."""
        return self.units.weight.shape[0] == 1

    def sort(self) -> None:
        """Put the units that the gate is likeliest to keep first, where that is of use."""
        if self.slices:  # and heads keep their places, to be compared with a teacher's
            order = self.gate.likeliest()
            self.gate.sort(order)
            self.units.sort(order)

    def _part(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        units: Chosen,
        keep: Tensor | None,
        bias: bool = True,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """Of some units, or all."""
        y, more = self.within(self.units.inward(hidden, units), mask, keep, **kwargs)
        return self.units.outward(y, units, bias=bias), more


class GatedFeedForward(Gated):
    """A feed-forward whose units are its neurons, output projection included."""

    def __init__(self, inward: nn.Linear, outward: nn.Linear, activation: Any, gate: Gate) -> None:
        super().__init__()
        self.units = Units([inward], outward, inward.out_features)
        self.gate, self.activation = gate, activation
        self.mean = self.skips = False
        self.expected = 1.0

    def within(
        self, y: Tensor, mask: Tensor | None, keep: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """[B, T, n] -> [B, T, n]."""
        y = self.activation(y)
        return y if keep is None else y * keep.to(y.dtype)[:, None, :], None

    def as_operator(self, hidden: Tensor, mask: Tensor | None, keep: Tensor) -> Tensor | None:
        """[B, T, H] -> [B, T, H]."""
        units, name = self.units, self.activation_name
        if name is None:
            return None
        weights = units.weight, units.bias, units.out, units.out_bias
        return kept_operators.kept_feed_forward(hidden, keep, *weights, name)

    @property
    def activation_name(self) -> str | None:
        """Of the activation in ``ACTIVATIONS``, if it is there."""
        return kept_operators.ACTIVATION_OF.get(type(self.activation).__name__)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, H] -> [B, T, H]."""
        return self.run(hidden_states)[0]


class GatedAttention(Gated, ProjectedAttention):
    """Self-attention whose units are its heads, output projection included."""

    @classmethod
    def gated(
        cls, attention: nn.Module, matrices: list[nn.Linear], gate: Gate, *, mean: bool
    ) -> GatedAttention:
        """The attention behind a gate.

        Args:
            attention: the stock module, whose sizes, dropout, config and hooks are adopted.
            matrices: its query, key, value and output projections.
            gate: of its heads.
            mean: see `Gated`.
        """
        new = cls.adopting(attention, *cls.dense)
        heads = matrices[0].out_features // new.attention_head_size
        new.add_module("units", Units(matrices[:3], matrices[3], heads))
        new.add_module("gate", gate)
        new.mean, new.skips, new.expected = mean, False, 1.0
        return new

    def within(
        self, y: Tensor, mask: Tensor | None, keep: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """[B, T, 3 * n * D] -> [B, T, n * D], and the attention [B, n, T, T] or None."""
        heads = (*y.shape[:-1], -1, self.attention_head_size)
        query, key, value = (part.view(heads) for part in y.chunk(3, -1))
        if keep is not None:
            # A head's output is a mean of its values: without them it gives nothing.
            value = value * keep.to(y.dtype)[:, None, :, None]
        qkv = [part.transpose(1, 2) for part in (query, key, value)]
        context, weights = self.attend(qkv, mask, **kwargs)
        return context.reshape(*y.shape[:-1], -1), weights

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, T, H] -> [B, T, H], and the attention [B, A, T, T] or None."""
        return self.run(hidden_states, attention_mask, **kwargs)

    def as_operator(self, hidden: Tensor, mask: Tensor | None, keep: Tensor) -> Tensor | None:
        """[B, T, H] -> [B, T, H]."""
        units = self.units
        weights = units.weight, units.bias, units.out, units.out_bias
        return kept_operators.kept_attention(hidden, hidden, keep, mask, *weights, self.scaling)

    def _skipping(self) -> bool:
        # Eager attention is there to be read, of all heads.
        return super()._skipping() and self.config._attn_implementation != "eager"


class GatedBertAttention(GatedAttention, BertSelfAttention):
    """BERT's."""


class GatedRobertaAttention(GatedAttention, RobertaSelfAttention):
    """RoBERTa's."""


class GatedDistilBertAttention(GatedAttention, DistilBertSelfAttention):
    """DistilBERT's."""

    dense = ("q_lin", "k_lin", "v_lin", "out_lin")  # type: ignore[assignment]


GATED: dict[type[nn.Module], type[GatedAttention]] = {
    BertSelfAttention: GatedBertAttention,
    RobertaSelfAttention: GatedRobertaAttention,
    DistilBertSelfAttention: GatedDistilBertAttention,
}
"""Hugging Face class -> the class that takes its place."""
