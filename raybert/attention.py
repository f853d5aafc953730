"""Self-attention of BERT, RoBERTa and DistilBERT in three steps that a method can change.

The classes here are the Hugging Face classes, so that transformers knows them for what they are;
``forward`` is theirs too, written once as project, attend, output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import BertSelfAttention, eager_attention_forward
from transformers.models.distilbert.modeling_distilbert import DistilBertSelfAttention
from transformers.models.roberta.modeling_roberta import RobertaSelfAttention

if TYPE_CHECKING:
    from typing_extensions import Self

QKV = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, each [B, T, H]."""


def attend(attention: Any, qkv: Sequence[Tensor], mask: Tensor | None, **kwargs: Any):
    """Three [B, A, T, D] -> the context [B, T, A, D], and the attention [B, A, T, T] or None.

    Args:
        attention: a self-attention module, whose implementation, dropout and scaling are used.
        qkv: queries, keys and values; there may be fewer queries than keys.
        mask: what transformers makes of attention_mask for the implementation in use.
    """
    name = attention.config._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
    dropout = attention.dropout.p if attention.training else 0.0
    return function(attention, *qkv, mask, dropout=dropout, scaling=attention.scaling, **kwargs)


class ProjectedAttention(nn.Module):
    """Self-attention whose queries, keys and values come from one module, ``projection``.

    That module maps hidden_states [B, T, H] to three tensors [B, T, H]. Subclasses also derive from
    a Hugging Face class, whose sizes, dropout and config they keep.
    """

    dense: tuple[str, str, str] = ("query", "key", "value")
    """What the Hugging Face class calls the three linear maps that `projection` stands for."""

    projection: Any
    # Of the Hugging Face class.
    config: Any
    dropout: nn.Dropout
    scaling: float
    attention_head_size: int

    @classmethod
    def adopting(cls, attention: nn.Module, *without: str) -> Self:
        """The attention as this class; all that it holds is adopted, hooks included, but for the
        modules named."""
        new = cls.__new__(cls)
        new.__dict__.update(vars(attention))
        new._modules = {k: v for k, v in attention._modules.items() if k not in without}
        return new

    @classmethod
    def of(cls, attention: nn.Module, projection: nn.Module) -> Self:
        """The attention with other projections."""
        new = cls.adopting(attention, *cls.dense)
        new.add_module("projection", projection)
        return new

    def project(self, hidden: Tensor) -> QKV:
        """hidden_states [B, T, H] -> queries, keys and values, each [B, T, H]."""
        return self.projection(hidden)

    def attend(self, qkv: Sequence[Tensor], mask: Tensor | None, **kwargs: Any):
        """See the function `attend`."""
        return attend(self, qkv, mask, **kwargs)

    def output(self, context: Tensor) -> Tensor:
        """What becomes of the heads' joined context [B, T, H]."""
        return context

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, T, H] -> context [B, T, H], and the attention [B, A, T, T] or None.

        An encoder keeps no keys or values from one pass to the next: ``past_key_values`` is None.
        """
        shape = hidden_states.shape[:-1]
        heads = (*shape, -1, self.attention_head_size)
        qkv = [part.view(heads).transpose(1, 2) for part in self.project(hidden_states)]
        context, weights = self.attend(qkv, attention_mask, **kwargs)
        return self.output(context.reshape(*shape, -1)), weights


class ProjectedBertAttention(ProjectedAttention, BertSelfAttention):
    """BERT's."""


class ProjectedRobertaAttention(ProjectedAttention, RobertaSelfAttention):
    """RoBERTa's."""


class ProjectedDistilBertAttention(ProjectedAttention, DistilBertSelfAttention):
    """DistilBERT's, which holds the output projection as well."""

    dense = ("q_lin", "k_lin", "v_lin")

    def output(self, context: Tensor) -> Tensor:
        """The joined context through the output projection. [B, T, H] -> [B, T, H]."""
        return self.out_lin(context)


PROJECTED: dict[type[nn.Module], type[ProjectedAttention]] = {
    BertSelfAttention: ProjectedBertAttention,
    RobertaSelfAttention: ProjectedRobertaAttention,
    DistilBertSelfAttention: ProjectedDistilBertAttention,
}
"""Hugging Face class -> the class that takes its place."""


def projected(attention: nn.Module, projection: nn.Module) -> ProjectedAttention:
    """A stock self-attention module with its three projections replaced by one module."""
    return PROJECTED[type(attention)].of(attention, projection)
