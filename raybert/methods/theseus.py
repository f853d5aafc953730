"""BERT-of-Theseus: compress by progressive module replacing (Xu et al., EMNLP 2020, arXiv
2002.02925).

    raybert compress method=theseus task=mrpc data=GLUE/MRPC teacher=runs/mrpc-finetuned

The fine-tuned model (predecessor, L layers) is divided into S groups of consecutive layers, and
each group gets one successor layer, initialised from the predecessor's first S layers. In every
training forward pass each group is replaced by its successor with probability p, so that
successors learn to work among the predecessor's layers; p rises to 1, and what is left is an
ordinary BERT of S layers. Only successors are trained, by the task loss alone unless distillation
is asked for.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import nn

from raybert.config import Share
from raybert.errors import UserError
from raybert.method import MethodConfig
from raybert.phase import At, Phase
from raybert.surgery import (
    attention_block,
    compressed_by,
    encoder_layers,
    ffn_block,
    set_depth,
    set_encoder_layers,
)


class Theseus(MethodConfig):
    """Parameters of BERT-of-Theseus; section numbers are the paper's."""

    name: Literal["theseus"] = "theseus"
    layers: PositiveInt | None = Field(
        default=None, description="Successor layers S; nothing: half the predecessor's."
    )
    groups: tuple[PositiveInt, ...] | None = Field(
        default=None,
        description="Predecessor layers that each successor stands for; nothing: equal groups.",
    )
    modules: Literal["layer", "sublayer"] = Field(
        default="layer", description="sublayer: attention and feed-forward are drawn apart."
    )
    initialise: Literal["first", "spaced"] = Field(
        default="first",
        description="Successors start from the predecessor's first S layers (the paper), or from "
        "the last layer of each group.",
    )
    schedule: Literal["linear", "constant"] = Field(
        default="linear",
        description="How p rises: min(1, k * step + b), or constant and then 1 (3.3).",
    )
    replacing_rate: Share = Field(default=0.3, description="p at first: b of the linear schedule.")
    k: PositiveFloat | None = Field(
        default=None,
        description="Rise of p a step; nothing: p is 1 after `replacing_share` of the steps.",
    )
    steps_for_replacing: PositiveInt | None = Field(
        default=None,
        description="Constant schedule: steps until p is 1; nothing: by `replacing_share`.",
    )
    replacing_share: Share = Field(
        default=0.5, description="Share of the steps after which p is 1, where steps are not given."
    )
    finetune_epochs: NonNegativeFloat = Field(
        default=0.0,
        description="Epochs of a further fine-tuning of the successor, with a fresh optimiser.",
    )
    finetune_lr: PositiveFloat | None = Field(
        default=None, description="Its peak learning rate; nothing: `train.lr`."
    )
    finetune_all: bool = Field(
        default=False, description="That fine-tuning trains embeddings, pooler and classifier too."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Theseus:
        idle = {
            "steps_for_replacing": (self.steps_for_replacing, "schedule=constant"),
            "k": (self.k, "schedule=linear"),
            "finetune_lr": (self.finetune_lr, "finetune_epochs above 0"),
            "finetune_all": (self.finetune_all or None, "finetune_epochs above 0"),
        }
        used = {f"schedule={self.schedule}", "finetune_epochs above 0" * bool(self.finetune_epochs)}
        for key, (value, wants) in idle.items():
            if value is not None and wants not in used:
                raise ValueError(f"theseus.{key} does nothing without {wants}; leave one out")
        if self.groups and self.layers and len(self.groups) != self.layers:
            raise ValueError(
                f"theseus.groups names {len(self.groups)} groups and theseus.layers is "
                f"{self.layers}; "
                "they must agree, or leave one out"
            )
        return self

    def resolve(self, model_config: Any) -> Theseus:
        """Settle the number of successor layers and the groups.

        Raises:
            UserError: the groups do not add up, or S does not divide L.
        """
        for entry in compressed_by(model_config):
            # A method says so where its layers can be trained on and any of them left out.
            if entry.get("bound_to_depth", True):
                raise UserError(
                    f"theseus cannot follow {entry['name']} here: its successors cannot stand for "
                    "layers that share parameters, differ in rank, hold gates or are no longer "
                    "trained. Put "
                    f"theseus before {entry['name']}."
                )
        depth = model_config.num_hidden_layers
        groups = self.groups
        if groups is None:
            layers = self.layers or depth // 2
            if not 1 <= layers < depth:
                raise UserError(
                    f"theseus.layers {layers} does not make a model of {depth} layers smaller; "
                    f"use 1 to {depth - 1}."
                )
            if depth % layers:
                divisors = [d for d in range(1, depth) if depth % d == 0]
                raise UserError(
                    f"theseus.layers {layers} does not divide the predecessor's {depth} layers; "
                    f"use one of {divisors}, or give theseus.groups, for example "
                    f"{_uneven(depth, layers)}."
                )
            groups = (depth // layers,) * layers
        elif sum(groups) != depth:
            raise UserError(
                f"theseus.groups {list(groups)} adds up to {sum(groups)} layers; the predecessor "
                f"has {depth}."
            )
        elif len(groups) == depth:
            raise UserError("theseus.groups has one group a layer, which makes nothing smaller.")
        return self.model_copy(update={"layers": len(groups), "groups": groups})

    def student_config(self, model_config: Any) -> Any:
        """The predecessor's config with S layers."""
        config = copy.deepcopy(model_config)
        config.num_hidden_layers = self.resolve(model_config).layers
        return config

    def phases(self) -> list[Phase]:
        """Module replacing, and the successor's fine-tuning if there are epochs for it."""
        phases: list[Phase] = [Replace(self)]
        if self.finetune_epochs:
            phases.append(SuccessorFinetune(self))
        return phases

    def rate(self, step: int, total: int) -> float:
        """The replacing probability p at an optimiser step of ``total`` (section 3.3)."""
        last = max(1, round(self.replacing_share * total))
        if self.schedule == "constant":
            return self.replacing_rate if step < (self.steps_for_replacing or last) else 1.0
        k = self.k or (1.0 - self.replacing_rate) / last
        return min(1.0, k * step + self.replacing_rate)


def _uneven(depth: int, layers: int) -> list[int]:
    small, more = divmod(depth, layers)
    return [small] * (layers - more) + [small + 1] * more


class TheseusModule(nn.Module):
    """A group of predecessor layers and the successor that stands for it.

    In training it runs whichever ``replaced`` says, in evaluation always the successor. With
    sublayers, the successor's attention stands for everything up to and including the group's last
    attention, and its feed-forward for the group's last feed-forward.
    """

    def __init__(self, predecessors: list[nn.Module], successor: nn.Module) -> None:
        super().__init__()
        self.predecessors = nn.ModuleList(predecessors)
        self.successor = successor
        self.replaced: tuple[bool, bool] = (True, True)  # attention, feed-forward

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """hidden_states [B, T, H] -> [B, T, H]."""
        attention, feed_forward = self.replaced if self.training else (True, True)
        if attention and feed_forward:
            return self.successor(hidden_states, *args, **kwargs)
        *earlier, last = self.predecessors
        if attention:
            hidden_states = attention_block(self.successor, hidden_states, *args, **kwargs)
        else:
            for layer in earlier:
                hidden_states = layer(hidden_states, *args, **kwargs)
            if not feed_forward:
                return last(hidden_states, *args, **kwargs)
            hidden_states = attention_block(last, hidden_states, *args, **kwargs)
        return ffn_block(self.successor if feed_forward else last, hidden_states)


class Replace(Phase):
    """Train successors among predecessors; at the end only successors are left."""

    name = "replace"
    rates = {"*.successor.*": None, "*": 0.0}  # noqa: RUF012 (never written to)

    def __init__(self, method: Theseus) -> None:
        self.method = method
        self.epochs, self.lr = method.epochs, method.lr
        self.probability = method.replacing_rate
        groups = method.groups or ()
        self.layer_map = tuple(sum(groups[: i + 1]) for i in range(len(groups)))

    def prepare(self, model: nn.Module) -> None:
        """Wrap each group of layers together with its successor."""
        layers = list(encoder_layers(model))
        groups = self.method.resolve(model.config).groups or ()
        modules, first = [], 0
        for index, size in enumerate(groups):
            source = (
                layers[index] if self.method.initialise == "first" else layers[first + size - 1]
            )
            modules.append(TheseusModule(layers[first : first + size], copy.deepcopy(source)))
            first += size
        set_encoder_layers(model, modules)

    def on_step(self, model: nn.Module, at: At) -> None:
        """Draw which modules are replaced: the same on every rank, whatever else used
        randomness."""
        self.probability = self.method.rate(at.step, at.total)
        modules: Any = encoder_layers(model)
        draws = np.random.default_rng([at.seed, at.forward]).random((len(modules), 2))  # [S, 2]
        replaced = (draws < self.probability).tolist()
        for module, (attention, feed_forward) in zip(modules, replaced, strict=True):
            apart = self.method.modules == "sublayer"
            module.replaced = (attention, feed_forward if apart else attention)

    def warnings(self, total: int) -> list[str]:
        """Says so when the replacing rate does not reach 1."""
        if not total:
            return []
        last = self.method.rate(total - 1, total)
        if last == 1.0:
            return []
        return [
            f"theseus replaces with a rate of only {last:.2f} in the last of {total} steps, so its "
            "successors never train on their own; give more steps, or leave k and "
            "steps_for_replacing out"
        ]

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """The replacing probability."""
        return {"replacing_rate": self.probability}

    def finish(self, model: nn.Module) -> None:
        """Keep the successors: a plain model of S layers."""
        modules: Any = encoder_layers(model)
        set_encoder_layers(model, [module.successor for module in modules])
        set_depth(model)


class SuccessorFinetune(Phase):
    """Fine-tune the finished successor with a fresh optimiser (section 3.2)."""

    name = "successor_finetune"

    def __init__(self, method: Theseus) -> None:
        self.epochs = method.finetune_epochs
        self.lr = method.finetune_lr
        groups = method.groups or ()
        self.layer_map = tuple(sum(groups[: i + 1]) for i in range(len(groups)))
        if not method.finetune_all:
            self.rates = {"*.layer.*": None, "*": 0.0}
