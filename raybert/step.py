"""One forward and backward pass, the teacher's beside it, and the losses noted along the way."""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
from torch import nn

from raybert.checkpoint import World
from raybert.config import KDConfig
from raybert.data import MODEL_INPUTS
from raybert.engine import autocast, fill_gradients
from raybert.errors import UserError
from raybert.first_token import first_token_only
from raybert.models import PROBLEMS
from raybert.phase import (
    PREDICTED,
    Distillation,
    Outputs,
    Phase,
    Taps,
    check_layer_map,
    even_layer_map,
)
from raybert.predictions import Predictions
from raybert.surgery import encoder_layers, model_inputs


class Place(NamedTuple):
    """Where, and how precisely, a worker computes."""

    device: torch.device
    precision: str


class Distiller:
    """One forward and backward pass, the teacher's beside it where one is asked for.

    The teacher is a model, or `Predictions` that the batches hold already.
    """

    def __init__(
        self, engine: Any, phase: Phase, teacher: Any, kd: KDConfig, kind: str, place: Place
    ) -> None:
        self.engine, self.phase, self.place = engine, phase, place
        self.teacher = teacher if kd.active else None
        depth = len(encoder_layers(engine.module))
        layer_map: tuple[int, ...] = ()
        self.taps: list[Taps] = []
        if self.teacher is not None and (kd.cls or kd.hidden or kd.attention):
            live = not isinstance(self.teacher, Predictions)
            teacher_depth = len(encoder_layers(self.teacher)) if live else self.teacher.layers
            layer_map = kd.layer_map or phase.layer_map or even_layer_map(depth, teacher_depth)
            if not kd.layer_map:  # a phase's own map counts its start's layers, not the teacher's
                layer_map = tuple(-(-t * teacher_depth // layer_map[-1]) for t in layer_map)
            check_layer_map(layer_map, depth, teacher_depth)
            wants = {"hidden": bool(kd.cls or kd.hidden), "attention": bool(kd.attention)}
            tapped = [engine.module, self.teacher] if live else [engine.module]
            self.taps = [Taps(model, **wants) for model in tapped]
        self.distillation = Distillation(kd, kind, layer_map)
        self.narrowed = contextlib.ExitStack()
        if kind in PROBLEMS and not phase.every_token and not (kd.hidden or kd.attention):
            self.narrowed.enter_context(first_token_only(engine.module))
            if isinstance(self.teacher, nn.Module):
                self.narrowed.enter_context(first_token_only(self.teacher))
        self.anchor = next(p for p in engine.module.parameters() if p.requires_grad)

    def forward_backward(
        self, batch: dict[str, torch.Tensor], share: float, of_rows: float
    ) -> dict[str, torch.Tensor]:
        """Run one chunk.

        Args:
            batch: this worker's chunk.
            share: this chunk's weight in the mean over all workers' chunks, in losses of what is
                predicted.
            of_rows: the same in others, which are means over rows in every task.

        Returns:
            The loss terms, detached, each times its weight.
        """
        batch = {k: v.to(self.place.device, non_blocking=True) for k, v in batch.items()}
        # The teacher first: what the student's forward leaves in the caches, its backward reads.
        taught = self._taught(batch)
        out = self._outputs(self.engine(**model_inputs(self.engine.module, batch, MODEL_INPUTS)), 0)
        terms = self.phase.losses(self.engine.module, out, taught, batch, self.distillation)
        terms = {
            name: term.float() * (share if name in PREDICTED else of_rows)
            for name, term in terms.items()
        }
        loss = torch.stack(list(terms.values())).sum()
        if not loss.requires_grad:
            # A draw that runs only frozen modules; every worker draws the same, so none waits.
            loss = loss + 0.0 * self.anchor.sum()
        self.engine.backward(loss)
        if not self.engine.enable_backward_allreduce:
            fill_gradients(self.engine.module)
        return {name: term.detach() for name, term in terms.items()}

    def _taught(self, batch: dict[str, torch.Tensor]) -> Outputs | None:
        if self.teacher is None:
            return None
        if isinstance(self.teacher, Predictions):
            return self.teacher.outputs(batch)
        inputs = model_inputs(self.teacher, batch, MODEL_INPUTS)
        with torch.no_grad(), autocast(self.place.precision, self.place.device):
            return self._outputs(self.teacher(**inputs), 1)

    def _outputs(self, model_output: Any, which: int) -> Outputs:
        return self.taps[which].collect(model_output) if self.taps else Outputs(model_output)

    def close(self) -> None:
        """Leave the models as they were."""
        self.narrowed.close()
        for taps in self.taps:
            taps.remove()


class Recent:
    """Loss terms since the last log line, kept on the device until they are read."""

    def __init__(self, world: World, accumulation: int) -> None:
        self.world, self.accumulation = world, accumulation
        self.names: list[str] = []
        self.means: dict[str, float] = {}
        self.rows: list[torch.Tensor] = []  # one [terms] a forward pass
        self.tokens = 0
        self.waited = 0.0  # seconds that the loop has waited for batches since the phase began

    def add(self, terms: dict[str, torch.Tensor], tokens: int) -> None:
        """Note one forward pass."""
        self.names = list(terms)
        self.rows.append(torch.stack(list(terms.values())))
        self.tokens += tokens

    def settle(self, step: int, phase: str) -> int:
        """Read what was noted, over all workers: sets ``means`` by name, and forgets it.

        Args:
            step: the step that the last noted one ended.
            phase: its phase, for the error.

        Returns:
            Tokens over all workers.

        Raises:
            UserError: a loss was not a number.
        """
        values = torch.stack(self.rows)  # [forward passes, terms]
        values = values.unflatten(0, (-1, self.accumulation)).mean(1)  # [steps, terms]
        packed = torch.cat([values.flatten(), values.new_tensor([float(self.tokens)])])
        packed = self.world.mean(packed).cpu()
        values = packed[:-1].view(values.shape)
        totals = values.sum(1).tolist()
        for i, total in enumerate(totals):
            if not math.isfinite(total):
                raise not_a_number("the loss", step - len(totals) + 1 + i, phase)
        tokens = round(packed[-1].item() * self.world.size)
        self.means = dict(zip(self.names, values.mean(0).tolist(), strict=True))
        self.rows, self.tokens = [], 0
        return tokens


def not_a_number(what: str, step: int, phase: str) -> UserError:
    """The error of a run that has diverged; nothing was saved since."""
    return UserError(
        f"{what} stopped being a number at step {step} of phase {phase}. Nothing was saved since; "
        "the last good checkpoint is kept. Try a lower train.lr, train.clip=1, or "
        "train.precision=fp32, in a new run folder or with --overwrite."
    )
