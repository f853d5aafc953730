"""Attention whose softmax is a network of two linear layers over the keys (MA-BERT, section 3.1).

The network reads the scores of one query, a vector of a fixed length N, and gives that query's
attention. A shorter input counts as padded with zeros up to N inside the network, and what it gives
for those places is cut off. Scores of padding are multiplied by 0 before it, and so is what padding
would contribute after it; both is done on keys and values, which are smaller than the scores.

Where nobody reads the attention itself, the network is multiplied into keys and values first,
``W1 (Q K') = Q (K' W1)`` and ``W2' V``: two products of [N, T] by [T, D] for a head where scores of
[T, T] would go through two matrices of [N, N]. A head's width D is a half or a quarter of N, and so
is the work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.distilbert.modeling_distilbert import DistilBertSelfAttention
from transformers.models.roberta.modeling_roberta import RobertaSelfAttention

from raybert.attention import (
    QKV,
    ProjectedAttention,
    ProjectedBertAttention,
    ProjectedDistilBertAttention,
    ProjectedRobertaAttention,
)
from raybert.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self


class SoftmaxNet(nn.Module):
    """``Linear(N, N) -> ReLU -> Linear(N, N)`` over the last axis. Made of zeros, to be filled."""

    def __init__(self, length: int, like: Tensor) -> None:
        super().__init__()
        self.length = length
        place: Any = {"device": like.device, "dtype": like.dtype}
        self.hidden: Any = nn.utils.skip_init(nn.Linear, length, length, **place)
        self.out: Any = nn.utils.skip_init(nn.Linear, length, length, **place)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, scores: Tensor) -> Tensor:
        """Scores [..., T] of T <= N keys, 0 where there is padding -> attention [..., T].

        Quantised layers take scores of N keys.

        Raises:
            UserError: T > N.
        """
        hidden, out = self.hidden, self.out
        if not self.plain():
            return out(F.relu(hidden(scores)))  # of N keys
        first = self.first(scores.shape[-1], scores)
        # Weights that zeros would be multiplied by are left out, and so is what would be cut.
        inner = F.relu(F.linear(scores, hidden.weight.index_select(1, first), hidden.bias))
        weight, bias = out.weight.index_select(0, first), out.bias.index_select(0, first)
        return F.linear(inner, weight, bias)

    def plain(self) -> bool:
        """Whether weights can be sliced and multiplied into keys and values: nothing is
        quantised."""
        return isinstance(self.hidden, nn.Linear) and isinstance(self.out, nn.Linear)

    def regroup(self) -> None:
        """Become what multiplies keys and values for good, to be trained as such.

        Two matrices [N + 1, N] on keys and on values, and a bias [N + 1] for scores. The unit that
        is one more is always 1: through it the last bias reaches every query.
        """
        hidden, out = self.hidden, self.out
        weight, zeros = hidden.weight.detach(), torch.zeros_like(hidden.weight[:1]).detach()
        shape = self.length, self.length + 1
        place: Any = {"device": weight.device, "dtype": weight.dtype}
        self.keys = nn.utils.skip_init(nn.Linear, *shape, bias=False, **place)
        self.values = nn.utils.skip_init(nn.Linear, *shape, bias=False, **place)
        self.keys.weight.data = torch.cat([weight, zeros])
        self.values.weight.data = torch.cat([out.weight.detach().T, out.bias.detach()[None]])
        self.bias = nn.Parameter(torch.cat([hidden.bias.detach(), zeros[0, :1] + 1]))
        del self.hidden, self.out

    @property
    def regrouped(self) -> bool:
        """Whether it multiplies keys and values, and there is no attention to be read."""
        return "keys" in self._modules

    def into(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Multiply the network into keys and values, each [B, T, H].

        ``relu(s + b) = max(s, -b) + b``, so that of both biases one vector is left, which meets the
        values alone.

        Returns:
            N keys and N values, [B, N, H]; the least [N] that scores of such keys count as; and
            what is added to the context, [B, 1, H].

        Raises:
            UserError: T > N.
        """
        first = self.first(key.shape[1], key)
        hidden, out = self.hidden, self.out
        constant = F.linear(hidden.bias, out.weight, out.bias).index_select(0, first)  # [T]
        before = hidden.weight.index_select(1, first)  # [N, T]
        after = out.weight.transpose(0, 1).index_select(1, first)
        return before @ key, after @ value, -hidden.bias, (constant @ value).unsqueeze(1)

    def first(self, keys: int, like: Tensor) -> Tensor:
        """Places of T <= N keys; a slice could not be traced for any T."""
        if keys > self.length:
            raise UserError(
                f"a sequence of {keys} tokens is longer than ma_bert.length, {self.length}, which "
                "is the most that this model's softmax nets read. Cut it off there, or train with "
                "a larger ma_bert.length."
            )
        return torch.arange(keys, device=like.device)

    def extra_repr(self) -> str:
        """What printing shows."""
        return f"length={self.length}"


def real_tokens(mask: Tensor | None) -> Tensor | None:
    """True for real tokens and false for padding, [B, T, 1], of what transformers made of the mask.

    Args:
        mask: [B, 1, T or 1, T]: true for real keys, or a float that is added to scores, 0 for real
            keys; nothing: all are real.
    """
    if mask is None:
        return None
    keys = mask[:, 0, :1].transpose(1, 2)
    return keys if keys.dtype == torch.bool else keys == 0


class Product(nn.Module):
    """The product of two activations, in a place of its own: q8bert quantises both."""

    def forward(self, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """a [..., M, K], b [..., K, N] and bias [N] -> [..., M, N]."""
        return a @ b if bias is None else a @ b + bias


class MatrixAttention(ProjectedAttention):
    """Self-attention with a network in softmax's place, on whatever makes queries and keys."""

    num_attention_heads: int
    softmax_net: nn.Module
    scores: nn.Module
    context: nn.Module

    @classmethod
    def of(cls, attention: nn.Module, net: nn.Module) -> Self:
        """The attention with another softmax.

        A ``net`` that all layers share has its place elsewhere, see `share`.
        """
        new = cls.adopting(attention)
        new.add_module("softmax_net", net)
        new.add_module("scores", Product())
        new.add_module("context", Product())
        return new

    def share(self) -> MatrixAttention:
        """Leave the net to its owner, so that every parameter has one name and one place."""
        self.shared = (self._modules.pop("softmax_net"),)
        return self

    @property
    def net(self) -> Any:
        """The network, its own or the shared one."""
        return self.softmax_net if "softmax_net" in self._modules else self.shared[0]

    shared: tuple[Any, ...] = ()

    def project(self, hidden: Tensor) -> QKV:
        """hidden_states [B, T, H] -> queries, keys and values, each [B, T, H]."""
        if "projection" in self._modules:
            return self.projection(hidden)
        query, key, value = (self.get_submodule(name) for name in self.dense)
        return query(hidden), key(hidden), value(hidden)

    def masked(self, hidden: Tensor, mask: Tensor | None) -> QKV:
        """hidden_states [B, T, H] -> scaled queries, keys and values, each [B, T, H].

        All three are 0 for padding. With such keys, scores are as if multiplied by the mask, and
        with such values, padding adds nothing. Queries too: what padding would attend to, nothing
        bounds, and it could grow until it is no number.
        """
        query, key, value = self.project(hidden)
        if self.scaling != 1.0:  # an exported model's queries are scaled already
            query = query * self.scaling
        real = real_tokens(mask)
        if real is None:
            return query, key, value
        return torch.where(real, query, 0), torch.where(real, key, 0), torch.where(real, value, 0)

    def heads(self, hidden: Tensor, mask: Tensor | None) -> QKV:
        """hidden_states [B, T, H] -> as ``masked``, each [B, A, T, D]."""
        query, key, value = (self.apart(part) for part in self.masked(hidden, mask))
        return query, key, value

    def apart(self, x: Tensor) -> Tensor:
        """Heads side by side [B, T, H] -> [B, A, T, D]."""
        return x.view(*x.shape[:-1], -1, self.attention_head_size).transpose(1, 2)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, T, H] -> context [B, T, H], and the attention [B, A, T, T].

        As with other attention, it is there to be read in training and under ``eager`` alone.
        """
        net, shape = self.net, hidden_states.shape[:-1]
        query, key, value = self.masked(hidden_states, attention_mask)
        first = net.first(shape[1], key)
        if net.regrouped:
            context, weights = self._through(query, key, value), None
        elif not self.training and self.config._attn_implementation != "eager" and net.plain():
            keys, values, least, shift = net.into(key, value)
            scores = self.apart(query) @ self.apart(keys).transpose(2, 3)  # [B, A, T, N]
            context = torch.maximum(scores, least) @ self.apart(values)
            joined = context.transpose(1, 2).reshape(*shape, -1)
            return self.output(joined + shift), None
        else:
            if not net.plain():
                key, value = self._filled(key), self._filled(value)
            weights = net(self.scores(self.apart(query), self.apart(key).transpose(2, 3)))
            context = self.context(self.dropout(weights), self.apart(value))
            weights = weights if net.plain() else weights.index_select(-1, first)
        return self.output(context.transpose(1, 2).reshape(*shape, -1)), weights

    def _filled(self, x: Tensor) -> Tensor:
        """[B, T, H] with zeros up to [B, N, H]; less to fill up than scores and attention."""
        return F.pad(x, (0, 0, 0, self.net.length - x.shape[1]))

    def _through(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """By a regrouped net: three [B, T, H] -> the context [B, A, T, D]."""
        net = self.net
        keys, values = (
            matrix(self.apart(self._filled(part)).transpose(2, 3))  # [B, A, D, N + 1]
            for matrix, part in ((net.keys, key), (net.values, value))
        )
        hidden = F.relu(self.scores(self.apart(query), keys, net.bias))  # [B, A, T, N + 1]
        return self.context(self.dropout(hidden), values.transpose(2, 3))


class MatrixBertAttention(MatrixAttention, ProjectedBertAttention):
    """BERT's."""


class MatrixRobertaAttention(MatrixAttention, ProjectedRobertaAttention):
    """RoBERTa's."""


class MatrixDistilBertAttention(MatrixAttention, ProjectedDistilBertAttention):
    """DistilBERT's, which holds the output projection as well."""


MATRIX: dict[type[nn.Module], type[MatrixAttention]] = {
    BertSelfAttention: MatrixBertAttention,
    ProjectedBertAttention: MatrixBertAttention,
    RobertaSelfAttention: MatrixRobertaAttention,
    ProjectedRobertaAttention: MatrixRobertaAttention,
    DistilBertSelfAttention: MatrixDistilBertAttention,
    ProjectedDistilBertAttention: MatrixDistilBertAttention,
}
"""Hugging Face class, or lobert's -> the class that takes its place."""


def matrix(attention: nn.Module, net: nn.Module) -> MatrixAttention:
    """A self-attention module with its softmax replaced by a network."""
    return MATRIX[type(attention)].of(attention, net)
