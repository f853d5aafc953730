"""The worker's loop: every phase of a recipe, on one of N workers, resumable at each checkpoint.

Reads from top to bottom: `run` sets a worker up, `Trainer.run` goes through the phases, and
`Trainer._train` is the loop over steps. Nothing here knows Ray; `raybert.run` starts it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

from raybert.checkpoint import (
    Position,
    World,
    find_last_good,
    load_weights,
    read_position,
    restore,
    save,
    save_weights,
)
from raybert.config import MethodConfig, Recipe, UserError
from raybert.data import (
    MODEL_INPUTS,
    TaskData,
    load_prepared,
    prefetch,
    steps_per_epoch,
    train_steps,
)
from raybert.engine import (
    autocast,
    fill_gradients,
    gathered,
    make_engine,
    precision_for,
    seed_everything,
    set_rate,
)
from raybert.evaluate import evaluate
from raybert.metrics import floor
from raybert.metrics_log import MetricsLog
from raybert.models import load_for_task, load_tokenizer, mark_compressed, write_probe
from raybert.phase import (
    At,
    Distillation,
    Outputs,
    Phase,
    Taps,
    check_layer_map,
    even_layer_map,
)
from raybert.surgery import encoder_layers

logger = logging.getLogger("raybert")

FINAL = "final"
"""The folder, among a run's checkpoints, of the finished model and its dev metrics."""

LOG_EVERY = 10
"""Steps between log lines; losses are read back from the device, and checked, only then."""


class Hooks(Protocol):
    """What the loop tells the outside while it runs."""

    def report(self, metrics: dict[str, Any]) -> None:
        """New dev metrics; called on every worker."""
        ...

    def progress(self, total: int, label: str) -> Any:
        """A progress bar with ``update(n)``, ``set_postfix_str(text)`` and ``close()``."""
        ...

    def note(self, text: str) -> None:
        """A warning for the user; called on the first worker."""
        ...


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know.

    Attributes:
        recipe: the resolved recipe.
        data: folder of the prepared data.
        start: hub name or folder that the student starts from.
        teacher: folder of the fine-tuned teacher; ``None`` when a teacher is being fine-tuned.
        keep_head: whether a head that does not fit the task is an error.
        precision: ``fp32``, ``bf16`` or ``fp16``; ``auto`` is settled by the worker's device.
    """

    recipe: Recipe
    data: Path
    start: str
    teacher: str | None
    keep_head: bool


@dataclass(frozen=True)
class PhaseOf:
    """A phase, the method it belongs to, and whether it is that method's last."""

    phase: Phase
    method: MethodConfig | None
    last: bool


def phases_of(recipe: Recipe, model_config: Any) -> list[PhaseOf]:
    """The recipe's phases in order; without methods, one plain phase."""
    if not recipe.method:
        return [PhaseOf(Phase(), None, True)]
    chain = []
    for method in resolve_chain(recipe, model_config):
        phases = method.phases()
        chain += [PhaseOf(p, method, p is phases[-1]) for p in phases]
    return chain


def resolve_chain(recipe: Recipe, model_config: Any) -> list[MethodConfig]:
    """Every method resolved against the model that the one before it leaves."""
    resolved = []
    for method in recipe.method:
        method = method.resolve(model_config)
        model_config = method.student_config(model_config)
        resolved.append(method)
    return resolved


def run(job: Job, world: World, hooks: Hooks, threads: int | None = None) -> dict[str, Any]:
    """Train, or go on training, all phases of a recipe.

    Args:
        job: what to do.
        world: this worker; torch.distributed is already set up.
        hooks: whom to tell.
        threads: CPU threads of this worker.

    Returns:
        ``{}`` when the finished model lies in ``checkpoints/final``, or ``{"error": text}`` for
        what the user can mend: raised on every worker alike, such an error must not look like a
        crash that a restart could cure.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if threads:
        torch.set_num_threads(threads)
    trainer = Trainer(job, world, hooks)
    try:
        trainer.run()
    except UserError as error:
        return {"error": str(error)}
    finally:
        trainer.log.close()
    return {}


class Trainer:
    """One run on one worker."""

    def __init__(self, job: Job, world: World, hooks: Hooks) -> None:
        self.job, self.world, self.hooks = job, world, hooks
        self.recipe = job.recipe
        self.folder = self.recipe.folder / "checkpoints"
        self.data: TaskData = load_prepared(job.data)
        self.lengths = self.data.lengths("train")
        self.precision = precision_for(self.recipe.train.precision, world.device)
        self.log = MetricsLog(self.recipe.folder, writes=world.rank == 0)
        self.notes: list[str] = []
        self.position = Position()

    # -- phases ------------------------------------------------------------------------------------

    def run(self) -> None:
        """Go through the phases, from the last good checkpoint on."""
        checkpoint, passed_over = find_last_good(self.folder)
        for text in passed_over:
            self._note(text)
        if checkpoint is not None:
            self.position = read_position(checkpoint)[0]
        self.log.rewind(self.position.log_lines)
        first = self.position.phase
        model, phases = self._build(first)
        teacher = self._load_teacher()
        for index in range(first, len(phases)):
            model = self._run_phase(index, phases[index], model, teacher, checkpoint)
            checkpoint = None
        self._finish(model, teacher)

    def _build(self, upto: int) -> tuple[Any, list[PhaseOf]]:
        """The model as it is before phase ``upto``; earlier phases' surgery is replayed."""
        model, new = load_for_task(
            self.job.start,
            self.data.task,
            seed=self.recipe.train.seed,
            attention=self._attention(),
            dropout=self.recipe.train.dropout,
            new_head=not self.job.keep_head,
        )
        phases = phases_of(self.recipe, model.config)
        if new and upto == 0:
            logger.info("new weights, not in %s: %s", self.job.start, ", ".join(new))
        for entry in phases[:upto]:
            entry.phase.prepare(model)
            self._finish_phase(entry, model)
        if upto:
            load_weights(model, self.folder / f"phase{upto - 1}.safetensors")
        return model, phases

    def _attention(self) -> str:
        # Only eager attention can be read, and only then is its slowness worth paying for.
        return "eager" if self.recipe.kd.attention else "sdpa"

    def _finish_phase(self, entry: PhaseOf, model: Any) -> None:
        entry.phase.finish(model)
        if entry.last and entry.method is not None and entry.method.leaves_trace:
            mark_compressed(model, entry.method)

    def _load_teacher(self) -> Any:
        if not (self.job.teacher and self.recipe.kd.active):
            return None
        return self._teacher_model()

    def _teacher_model(self) -> Any:
        teacher, _ = load_for_task(
            self.job.teacher,
            self.data.task,
            seed=0,
            attention=self._attention(),
            new_head=False,
        )
        return teacher.requires_grad_(False).to(self.world.device)

    def _run_phase(
        self, index: int, entry: PhaseOf, model: Any, teacher: Any, checkpoint: Path | None
    ) -> Any:
        phase, train = entry.phase, self.recipe.train
        total = self.steps(phase)
        if total == 0:
            phase.prepare(model)
            self._finish_phase(entry, model)
            return model
        phase.prepare(model)
        # Each phase draws its own random numbers, whatever came before it.
        seed_everything(train.seed + 7919 * index, self.world.rank)
        model.to(self.world.device)
        engine = make_engine(model, self._groups(phase, model), self.recipe, self.precision)
        if checkpoint is not None:
            self.position = restore(checkpoint, engine, self.world, train.zero)
            logger.info("continuing %s at step %d", phase.name, self.position.step)
        else:
            self.position = Position(
                phase=index,
                log_lines=self.log.lines,
                seconds=self.position.seconds,
                tokens=self.position.tokens,
                steps=self.position.steps,
                finished=self.position.finished,
            )
            if teacher is not None or self.recipe.method:
                self._evaluate(engine, phase, total)
        self._train(engine, phase, total, teacher)
        return self._end_phase(index, entry, engine)

    def _end_phase(self, index: int, entry: PhaseOf, engine: Any) -> Any:
        """The model as the phase leaves it, also written for a run that is continued later."""
        stage, weights = self.recipe.train.zero, self.folder / f"phase{index}.safetensors"
        model = engine.module
        if self.recipe.train.keep == "best":
            self.world.barrier()
            with gathered(model, stage, writes=True):
                load_weights(model, self._best())
        if stage == 3:  # the module's weights stay in parts, so it is made anew from the file
            with gathered(model, stage):
                self._on_first(lambda: save_weights(model, weights))
            engine.destroy()
            model, _ = self._build(index + 1)
        else:
            engine.destroy()
            self._finish_phase(entry, model)
            self._on_first(lambda: save_weights(model, weights))
        spent = self.position.seconds - sum(done["seconds"] for done in self.position.finished)
        self.position.finished.append(
            {"name": entry.phase.name, "steps": self.position.step, "seconds": round(spent, 3)}
        )
        return model

    def _on_first(self, write: Callable[[], None]) -> None:
        """Let the first worker write, and all of them learn whether it could."""
        problem = ""
        if self.world.rank == 0:
            try:
                write()
            except UserError as error:
                problem = str(error)
        problem = self.world.gather(problem)[0]
        if problem:
            raise UserError(problem)

    def steps(self, phase: Phase) -> int:
        """Optimiser steps of a phase."""
        train = self.recipe.train
        epochs = train.epochs if phase.epochs is None else phase.epochs
        return min(round(self._steps_per_epoch() * epochs), train.max_steps or 10**12)

    def _groups(self, phase: Phase, model: nn.Module) -> list[dict[str, Any]]:
        """Optimiser groups by learning rate and weight decay; rate 0 takes a parameter out."""
        base = phase.lr or self.recipe.train.lr
        patterns = {**self.recipe.train.rates, **phase.rates}
        norms = {
            f"{name}.{key}" if name else key
            for name, module in model.named_modules()
            if isinstance(module, nn.LayerNorm)
            for key, _ in module.named_parameters(recurse=False)
        }
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            rate = next((r for p, r in patterns.items() if fnmatch.fnmatchcase(name, p)), None)
            rate = base if rate is None else rate
            parameter.requires_grad_(rate > 0)
            if rate > 0:
                plain = name in norms or name.endswith("bias")
                decay = 0.0 if plain else self.recipe.train.weight_decay
                groups.setdefault((rate, decay), []).append(parameter)
        if not groups:
            raise UserError(f"train.rates leaves phase {phase.name} nothing to train.")
        return [
            {"params": params, "lr": rate, "peak_lr": rate, "weight_decay": decay}
            for (rate, decay), params in groups.items()
        ]

    # -- steps -------------------------------------------------------------------------------------

    def _train(self, engine: Any, phase: Phase, total: int, teacher: Any) -> None:
        train, position = self.recipe.train, self.position
        each = self._steps_per_epoch()
        eval_every = each if train.eval_every == "epoch" else train.eval_every
        save_every = each if train.save_every == "epoch" else train.save_every
        distil = _Distiller(self, engine, phase, teacher)
        bar = self.hooks.progress(total, phase.name)
        bar.update(position.step)
        recent = _Recent(self.world, train.accumulation)
        engine.train()
        with contextlib.closing(distil), contextlib.closing(bar):
            for micro, rows in self._batches(position.step, total, recent):
                began = time.perf_counter()
                set_rate(engine, self.rate(position.step, total))
                for chunk, batch in enumerate(micro):
                    forward = position.step * train.accumulation + chunk
                    phase.on_step(engine.module, At(position.step, total, forward, train.seed))
                    recent.add(distil.forward_backward(batch, rows), batch["input_ids"].numel())
                    engine.step()  # DeepSpeed counts: only a step's last chunk changes weights
                position.step += 1
                position.steps += 1
                position.seconds += time.perf_counter() - began
                bar.update(1)
                ends = position.step == total
                evaluates = position.step % eval_every == 0 or ends
                saves = position.step % save_every == 0 or ends
                if evaluates or saves or position.step % LOG_EVERY == 0:
                    self._log_train(engine, phase, total, recent, bar)
                if evaluates:
                    self._evaluate(engine, phase, total)
                if saves:
                    position.log_lines = self.log.lines
                    save(self.folder, engine, position, self.world, train.zero)

    def _batches(
        self, start: int, total: int, recent: _Recent
    ) -> Iterator[tuple[list[dict[str, torch.Tensor]], int]]:
        """From step ``start`` on: this worker's batches of a step, and the step's rows over all."""
        train, each = self.recipe.train, self._steps_per_epoch()
        batcher = self.data.batcher("train", train.seed)
        for epoch in range(start // each, -(-total // each)):
            plan = train_steps(
                self.lengths,
                batch_size=train.batch_size,
                accumulation=train.accumulation,
                world_size=self.world.size,
                seed=train.seed,
                epoch=epoch,
            )[max(0, start - epoch * each) : total - epoch * each]
            mine = [turn[self.world.rank] for step in plan for turn in step]
            pin = self.world.device.type == "cuda"
            with contextlib.closing(prefetch(batcher, mine, epoch=epoch, pin=pin)) as batches:
                groups = _grouped(batches, train.accumulation)
                for step in plan:
                    micro = next(groups)
                    recent.waited += batches.waited
                    batches.waited = 0.0
                    yield micro, sum(len(part) for turn in step for part in turn)

    def _steps_per_epoch(self) -> int:
        train = self.recipe.train
        return steps_per_epoch(
            len(self.lengths), train.batch_size, train.accumulation, self.world.size
        )

    def rate(self, step: int, total: int) -> float:
        """The share of the peak learning rate at a step: linear warm-up, then the schedule."""
        warmup = round(self.recipe.train.warmup * total)
        if step < warmup:
            return (step + 1) / warmup
        if self.recipe.train.schedule == "constant":
            return 1.0
        return max(0.0, (total - step) / max(1, total - warmup))

    # -- bookkeeping -------------------------------------------------------------------------------

    def _log_train(self, engine: Any, phase: Phase, total: int, recent: _Recent, bar: Any) -> None:
        position = self.position
        losses, tokens, bad = recent.read(position.step)
        if bad is not None:
            raise UserError(
                f"the loss became {bad[1]} at step {bad[0]} of phase {phase.name}. Nothing was "
                "saved since; the last good checkpoint is kept. Try a lower train.lr, "
                "train.clip=1, or "
                "train.precision=fp32, in a new run folder or after removing this one."
            )
        position.tokens += tokens
        line = {
            "loss": sum(losses.values()),
            **{f"loss/{name}": value for name, value in losses.items()},
            "lr": engine.optimizer.param_groups[0]["lr"],
            "tokens": position.tokens,
            "seconds": round(position.seconds, 3),
            "waited": round(recent.waited, 4),
            **phase.metrics(engine.module),
        }
        norm = engine.get_global_grad_norm()
        if norm is not None:
            line["grad_norm"] = float(norm)
        self._write("train", phase, total, line)
        bar.set_postfix_str(f"loss {line['loss']:.4f}")

    def _evaluate(self, engine: Any, phase: Phase, total: int) -> None:
        train, position, task = self.recipe.train, self.position, self.data.task
        with autocast(self.precision, self.world.device):
            metrics = evaluate(engine.module, self.data, "dev", self.world, train.eval_batch_size)
        self._write("eval", phase, total, metrics)
        score = metrics[task.main]
        if position.step == 0 and score <= floor(task, self.data, "dev")[task.main]:
            self._note(
                f"phase {phase.name} starts at chance ({task.main} {score:.3f}): its student has "
                "everything to learn, so give it steps enough"
            )
        if position.step and (position.best is None or score > position.best):
            position.best, position.best_step = score, position.step
            if train.keep == "best":
                self._save_best(engine)
        self.hooks.report({**metrics, "phase": phase.name, "step": position.steps})

    def _best(self) -> Path:
        return self.folder / f"phase{self.position.phase}-best.safetensors"

    def _save_best(self, engine: Any) -> None:
        with gathered(engine.module, self.recipe.train.zero):
            self._on_first(lambda: save_weights(engine.module, self._best()))

    def _write(self, kind: str, phase: Phase, total: int, values: dict[str, Any]) -> None:
        position = self.position
        place = {"kind": kind, "phase": phase.name, "phase_index": position.phase}
        self.log.write({**place, "step": position.step, "total": total, **values}, position.steps)

    def _note(self, text: str) -> None:
        self.notes.append(text)
        if self.world.rank == 0:
            self.hooks.note(text)

    def _finish(self, model: Any, teacher: Any) -> None:
        """Evaluate what came out, beside its teacher, and write the finished model."""
        rows, world = self.recipe.train.eval_batch_size, self.world
        model.to(world.device).eval()
        student_metrics = evaluate(model, self.data, "dev", world, rows)
        teacher_metrics = None
        if self.job.teacher:
            teacher = teacher if teacher is not None else self._teacher_model()
            teacher_metrics = evaluate(teacher, self.data, "dev", world, rows)
        result = {
            "student": student_metrics,
            "teacher": teacher_metrics,
            "position": asdict(self.position),
            "precision": self.precision,
            "notes": self.notes,
        }
        self._on_first(lambda: self._write_final(model, result))

    def _write_final(self, model: Any, result: dict[str, Any]) -> None:
        final, partial = self.folder / FINAL, self.folder / f".partial-{FINAL}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            model.save_pretrained(partial)
            load_tokenizer(self.job.start).save_pretrained(partial)
            rows = np.arange(min(4, len(self.data.splits["dev"])))
            write_probe(model, partial, self.data.batcher("dev")(rows))
            (partial / "result.json").write_text(json.dumps(result))
            os.replace(partial, final)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the finished model could not be written to {final}: {error}. Make room, or "
                f"mend the "
                "storage, and start the same command again."
            ) from None


def _grouped(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


class _Distiller:
    """One forward and backward pass, the teacher's beside it where one is asked for."""

    def __init__(self, trainer: Trainer, engine: Any, phase: Phase, teacher: Any) -> None:
        self.trainer, self.engine, self.phase = trainer, engine, phase
        kd = trainer.recipe.kd
        self.teacher = teacher if kd.active else None
        depth = len(encoder_layers(engine.module))
        layer_map: tuple[int, ...] = ()
        self.taps: list[Taps] = []
        if self.teacher is not None and (kd.cls or kd.hidden or kd.attention):
            teacher_depth = len(encoder_layers(self.teacher))
            layer_map = kd.layer_map or phase.layer_map or even_layer_map(depth, teacher_depth)
            check_layer_map(layer_map, depth, teacher_depth)
            wants = {"hidden": bool(kd.cls or kd.hidden), "attention": bool(kd.attention)}
            self.taps = [Taps(engine.module, **wants), Taps(self.teacher, **wants)]
        self.distillation = Distillation(kd, trainer.data.task.kind, layer_map)
        self.anchor = next(p for p in engine.module.parameters() if p.requires_grad)

    def forward_backward(
        self, batch: dict[str, torch.Tensor], rows: int
    ) -> dict[str, torch.Tensor]:
        """Run one chunk.

        Args:
            batch: this worker's chunk.
            rows: rows of the whole optimiser step, over all workers and chunks.

        Returns:
            The loss terms, detached, each times this chunk's share of the rows.
        """
        trainer = self.trainer
        batch = {k: v.to(trainer.world.device, non_blocking=True) for k, v in batch.items()}
        inputs = {k: batch[k] for k in MODEL_INPUTS if k in batch}
        out = self._outputs(self.engine(**inputs), 0)
        taught = None
        if self.teacher is not None:
            with torch.no_grad(), autocast(trainer.precision, trainer.world.device):
                taught = self._outputs(self.teacher(**inputs), 1)
        terms = self.phase.losses(self.engine.module, out, taught, batch, self.distillation)
        # Gradients are averaged over workers and chunks; uneven chunks must weigh by their rows.
        chunks = trainer.world.size * trainer.recipe.train.accumulation
        share = len(batch["index"]) * chunks / rows
        loss = torch.stack([term.float() for term in terms.values()]).sum() * share
        if not loss.requires_grad:
            # A draw that runs only frozen modules; every worker draws the same, so none waits.
            loss = loss + 0.0 * self.anchor.sum()
        self.engine.backward(loss)
        if not self.engine.enable_backward_allreduce:
            fill_gradients(self.engine.module)
        return {name: term.detach().float() * share for name, term in terms.items()}

    def _outputs(self, model_output: Any, which: int) -> Outputs:
        return self.taps[which].collect(model_output) if self.taps else Outputs(model_output)

    def close(self) -> None:
        """Take the hooks off."""
        for taps in self.taps:
            taps.remove()


class _Recent:
    """Loss terms since the last log line, kept on the device until they are read."""

    def __init__(self, world: World, accumulation: int) -> None:
        self.world, self.accumulation = world, accumulation
        self.names: list[str] = []
        self.rows: list[torch.Tensor] = []  # one [terms] a forward pass
        self.tokens = 0
        self.waited = 0.0  # seconds that the loop has waited for batches since the phase began

    def add(self, terms: dict[str, torch.Tensor], tokens: int) -> None:
        """Note one forward pass."""
        self.names = list(terms)
        self.rows.append(torch.stack(list(terms.values())))
        self.tokens += tokens

    def read(self, step: int) -> tuple[dict[str, float], int, tuple[int, float] | None]:
        """The mean of each term over the steps noted, tokens over all workers, and what went bad.

        Args:
            step: the step that the last noted one ended.

        Returns:
            Means by name; tokens; and (step, loss) of the first loss that was not a number, if any.
        """
        values = torch.stack(self.rows)  # [forward passes, terms]
        values = values.unflatten(0, (-1, self.accumulation)).mean(1)  # [steps, terms]
        packed = torch.cat([values.flatten(), values.new_tensor([float(self.tokens)])])
        packed = self.world.mean(packed).cpu()
        values = packed[:-1].view(values.shape)
        totals = values.sum(1)
        bad = None
        for i, total in enumerate(totals.tolist()):
            if not math.isfinite(total):
                bad = (step - len(totals) + 1 + i, total)
                break
        tokens = round(packed[-1].item() * self.world.size)
        means = dict(zip(self.names, values.mean(0).tolist(), strict=True))
        self.rows, self.tokens = [], 0
        return means, tokens, bad
