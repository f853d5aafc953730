"""Phase: one optimiser's lifetime, and the distillation losses that every phase has by default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raybert import losses
from raybert.config import KDConfig
from raybert.errors import UserError
from raybert.surgery import encoder_layers, self_attention


class At(NamedTuple):
    """Where a phase stands: optimiser steps done and in all, forward passes done, the seed, and the
    indices [B] of the rows that this worker's next forward pass is about to see."""

    step: int
    total: int
    forward: int
    seed: int
    rows: Tensor | None = None


@dataclass
class Outputs:
    """What one forward pass gave, as far as the losses asked for it.

    ``hidden[i]`` is the output [B, T, H] of layer i, counted from 1; ``hidden[0]`` is what enters
    layer 1. ``attention[i - 1]`` is the attention [B, A, T, T] of layer i.
    """

    model: Any
    hidden: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)

    def logits(self) -> list[Tensor]:
        """The head's outputs: one tensor, or start and end for question answering."""
        # In float32: what autocast leaves in half precision is too coarse to be compared.
        if "start_logits" in self.model:
            return [self.model.start_logits.float(), self.model.end_logits.float()]
        return [self.model.logits.float()]


class Phase:
    """One optimiser's lifetime. Override what differs from plain fine-tuning.

    Attributes:
        name: what logs and reports call the phase.
        epochs: passes over the rows; ``None`` is the recipe's ``train.epochs``.
        lr: peak learning rate; ``None`` is the recipe's ``train.lr``.
        rates: learning rates by parameter name pattern; the first match wins, 0 keeps a parameter
            out of the optimiser, ``None`` is the phase's own rate. ``train.rates`` is asked first.
        layer_map: teacher layer (from 1) of each student layer; ``None`` is evenly spaced.
        every_token: whether it looks at tokens that a classifier's head does not read; the last
            layer then computes them too.
        calibration: training rows that `initialise` wants to see.
        examined: dev rows that `facts` wants to see.
    """

    name = "finetune"
    epochs: float | None = None
    lr: float | None = None
    rates: dict[str, float | None] = {}  # noqa: RUF012 (never written to)
    layer_map: tuple[int, ...] | None = None
    every_token: bool = False
    calibration: int = 0
    examined: int = 0

    def initialise(
        self, model: nn.Module, batches: list[dict[str, Tensor]]
    ) -> dict[str, dict[str, float]]:
        """Before `prepare`, only where the phase begins: what depends on weights or rows.

        A phase that is replayed, or continued from a checkpoint, gets its weights from there, and
        this is not called.

        Args:
            model: as the phase before left it, in evaluation mode.
            batches: `calibration` training rows, on the model's device; the same on every worker.

        Returns:
            What the report should tell: title -> name -> number.
        """
        return {}

    def prepare(self, model: nn.Module) -> None:
        """Surgery and initialisation, before the engine exists. Structure from shapes alone."""

    def on_step(self, model: nn.Module, at: At) -> None:
        """Before each forward pass: set attributes or buffers, never structure."""

    def losses(
        self, model: nn.Module, out: Outputs, teacher: Outputs | None, batch: dict, kd: Distillation
    ) -> dict[str, Tensor]:
        """Named, weighted terms; the loop sums and logs them."""
        return kd.losses(out, teacher, batch)

    def may_end(self, step: int) -> bool:
        """Whether the weights of now may be those that the phase ends with: with
        ``train.keep=best``, the best are chosen from such steps; if there is none, the last stay.
        """
        return step > 0

    def unreached(self) -> str:
        """What the last step's weights have not come to, for the report, where `may_end` does not
        take them and they stay all the same."""
        return ""

    def warnings(self, total: int) -> list[str]:
        """Sentences for the user, before training, when ``total`` steps do not suit the phase."""
        return []

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Extra numbers for logs and reports."""
        return {}

    def facts(
        self, model: nn.Module, batches: list[dict[str, Tensor]]
    ) -> dict[str, dict[str, float]]:
        """What the report should tell of the finished model, title -> name -> number; asked of a
        phase that has rows `examined`.

        Args:
            model: after the last phase of all, in evaluation mode.
            batches: `examined` dev rows, on the model's device; the same on every worker.
        """
        return {}

    def finish(self, model: nn.Module) -> None:
        """Drop scaffolding, fuse: the model becomes what is deployed, its logits unchanged."""


class Taps:
    """Records layers' outputs by forward hooks.

    Transformers records hidden states with hooks that it installs once per model, so a layer that
    was swapped in later gives none; these hooks are put on the layers as they are now.
    """

    def __init__(self, model: nn.Module, *, hidden: bool, attention: bool) -> None:
        self._hidden: dict[int, Tensor] = {}
        self._attention: dict[int, Tensor] = {}
        self._handles = []
        layers = encoder_layers(model)
        self._depth = len(layers)
        for index, layer in enumerate(layers):
            if hidden:
                self._handles.append(
                    layer.register_forward_hook(self._keep_hidden(index), with_kwargs=True)
                )
            if attention:
                for module in _attentions(layer):
                    self._handles.append(module.register_forward_hook(self._keep_attention(index)))

    def _keep_hidden(self, index: int):
        def hook(_module, args, kwargs, output):
            if index == 0:
                self._hidden[0] = args[0] if args else kwargs["hidden_states"]
            self._hidden[index + 1] = output

        return hook

    def _keep_attention(self, index: int):
        def hook(_module, _args, output):
            # Of several layers that stand in one place, the last that ran counts.
            self._attention[index] = output[1]

        return hook

    def collect(self, model_output: Any) -> Outputs:
        """The outputs of the forward pass that just ended; forgets them."""
        hidden = [self._hidden[i].float() for i in sorted(self._hidden)]
        attention = [self._attention[i] for i in sorted(self._attention)]
        if any(a is None for a in attention):
            raise RuntimeError("attention was not recorded: the model must run eager attention")
        self._hidden, self._attention = {}, {}
        return Outputs(model_output, hidden, [a.float() for a in attention])

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def _attentions(layer: nn.Module) -> list[nn.Module]:
    """Self-attention modules in a layer, or in each of the layers that a container holds."""
    if "attention" in dict(layer.named_children()):
        return [self_attention(layer)]
    return [a for child in layer.children() for a in _attentions(child)]


def even_layer_map(student: int, teacher: int) -> tuple[int, ...]:
    """For each student layer the evenly spaced teacher layer, both counted from 1; last to last."""
    return tuple(-(-(i + 1) * teacher // student) for i in range(student))


def check_layer_map(layer_map: tuple[int, ...], student: int, teacher: int) -> None:
    """Refuse a map that does not name one existing teacher layer for each student layer.

    Raises:
        UserError: wrong length, or a layer that the teacher does not have.
    """
    if len(layer_map) != student:
        raise UserError(
            f"kd.layer_map has {len(layer_map)} entries for a student of {student} layers; give "
            f"one teacher layer for each, for example {list(even_layer_map(student, teacher))}."
        )
    outside = [layer for layer in layer_map if not 1 <= layer <= teacher]
    if outside:
        raise UserError(
            f"kd.layer_map names teacher layer {outside[0]}; the teacher's layers are 1 to "
            f"{teacher}."
        )


PREDICTED = ("task", "kd_logits")
"""The terms that are means over predictions: of a language model, over masked tokens."""


class Distillation:
    """The task loss plus whatever distillation terms have a weight.

    Args:
        kd: the weights.
        kind: the task's kind, which decides how logits are compared.
        layer_map: for each student layer its teacher layer, counted from 1.
    """

    def __init__(self, kd: KDConfig, kind: str, layer_map: tuple[int, ...]) -> None:
        self.kd, self.kind, self.layer_map = kd, kind, layer_map

    def losses(
        self, out: Outputs, teacher: Outputs | None, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Weighted terms: ``(1 - alpha) * task``, ``alpha * logits``, and the matched layers'."""
        kd = self.kd
        terms = {"task": out.model.loss}
        if teacher is None:
            return terms
        if kd.alpha:
            terms["task"] = (1 - kd.alpha) * out.model.loss
            terms["kd_logits"] = kd.alpha * self._logits(out, teacher, batch)
        mask = batch["attention_mask"]
        if kd.cls or kd.hidden:
            student_hidden = out.hidden[1:]
            teacher_hidden = [teacher.hidden[t] for t in self.layer_map]
        if kd.cls:
            terms["kd_cls"] = kd.cls * losses.cls_mse(student_hidden, teacher_hidden, kd.normalize)
        if kd.hidden:
            if kd.embeddings:
                student_hidden = [out.hidden[0], *student_hidden]
                teacher_hidden = [teacher.hidden[0], *teacher_hidden]
            size = self._over(student_hidden)
            mse = losses.hidden_mse(student_hidden, teacher_hidden, mask)
            terms["kd_hidden"] = kd.hidden * size * mse
        if kd.attention:
            matched = [teacher.attention[t - 1] for t in self.layer_map]
            size = self._over(matched)
            mse = losses.attention_mse(out.attention, matched, mask)
            terms["kd_attention"] = kd.attention * size * mse
        return terms

    def _over(self, layers: list[Tensor]) -> int:
        """What a mean over layers is multiplied by."""
        return len(layers) if self.kd.over_layers == "sum" else 1

    def _logits(self, out: Outputs, teacher: Outputs, batch: dict[str, Tensor]) -> Tensor:
        kd = self.kd
        pairs = list(zip(out.logits(), teacher.logits(), strict=True))
        if self.kind == "regression":
            return losses.logits_mse(*pairs[0])
        if self.kind == "multilabel":
            return losses.logits_bce(*pairs[0], kd.temperature)
        if self.kind == "mlm":  # only where a token was masked: the rest is not predicted
            masked = batch["labels"] != -100
            pairs = [(s[masked], t[masked]) for s, t in pairs]
        elif self.kind == "qa":  # padding is no position an answer could be at
            pad = batch["attention_mask"] == 0
            floor = torch.finfo(pairs[0][0].dtype).min / 1e4
            pairs = [(s.masked_fill(pad, floor), t.masked_fill(pad, floor)) for s, t in pairs]
        compare = losses.logits_kl if kd.form == "kl" else losses.logits_soft_ce
        return torch.stack([compare(s, t, kd.temperature) for s, t in pairs]).mean()
