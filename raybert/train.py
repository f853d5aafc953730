"""The worker's loop: every phase of a recipe, on one of N workers, resumable at each checkpoint.

Reads from top to bottom: `run` sets a worker up, `Trainer.run` goes through the phases, and
`Trainer._train` is the loop over steps. Nothing here knows Ray; `raybert.run` starts it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

from raybert.checkpoint import (
    MANIFEST,
    Position,
    World,
    bring,
    bring_back_best,
    find_last_good,
    load_shared,
    load_weights,
    read_position,
    restore,
    save,
    save_weights,
    send,
)
from raybert.compressed import longest_input, mark_compressed
from raybert.data import (
    TaskData,
    load_prepared,
    prefetch,
    steps_per_epoch,
    train_steps,
)
from raybert.engine import (
    gathered,
    make_engine,
    precision_for,
    seed_everything,
    set_rate,
)
from raybert.errors import TransientError, UserError
from raybert.evaluate import evaluate
from raybert.features import batched
from raybert.job import Hooks, Job, PhaseOf, phase_steps, phases_of
from raybert.metrics import floor
from raybert.metrics_log import MetricsLog
from raybert.models import load_for_task, load_tokenizer, take_head, write_probe
from raybert.phase import At, Phase
from raybert.places import uri_of
from raybert.predictions import Predictions
from raybert.rates import parameter_groups, rate_share, unmatched
from raybert.step import Distiller, Place, Recent, not_a_number
from raybert.storage import pull, push
from raybert.tasks import IGNORED

logger = logging.getLogger("raybert")

FINAL = "final"
"""The folder, among a run's checkpoints, of the finished model and its dev metrics."""

RESULT = "result.json"
"""Its metrics; in object storage, what says that the folder is whole."""

LOG_EVERY = 10
"""Steps between log lines; losses are read back from the device, and checked, only then."""


def run(job: Job, world: World, hooks: Hooks, threads: int | None = None) -> dict[str, Any]:
    """Train, or go on training, all phases of a recipe.

    Args:
        job: what to do.
        world: this worker; torch.distributed is already set up.
        hooks: whom to tell.
        threads: CPU threads of this worker.

    Returns:
        ``{}`` when the finished model lies in ``checkpoints/final``, or ``{"error": UserError}``
        for what the user can mend: raised on every worker alike, such an error must not look like a
        crash that a restart could cure.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    trainer = None
    try:
        trainer = world.agreed(lambda: Trainer(job, world, hooks))
        trainer.run()
    except UserError as error:
        return {"error": error.with_traceback(None)}  # which would hold the model
    finally:
        torch.set_num_threads(before)  # this may be the user's own process
        if trainer is not None:
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
        self.kind = self.data.task.kind
        cls = self.recipe.kd.cls > 0
        self.saved = Predictions(job.predictions, cls=cls) if job.predictions else None
        self.log = MetricsLog(self.recipe.folder, writes=world.rank == 0)
        self.position = Position(most=self.recipe.workers)
        self.kept: dict[str, float] | None = None
        """Dev metrics of the weights that the phase keeps, as far as this process evaluated them
        and the finished model is the one that was evaluated."""

    # -- phases ------------------------------------------------------------------------------------

    def run(self) -> None:
        """Go through the phases, from the last good checkpoint on."""
        world = self.world
        # One worker looks: on network storage two might see different folders, or chips compute
        # different precisions, and both must be the same everywhere.
        name, passed_over = world.on_first(self._find_last_good)
        checkpoint = self.folder / name if name else None
        if checkpoint is not None:
            world.agreed(functools.partial(pull, checkpoint, MANIFEST))
        precisions = set(world.gather(self.precision))
        self.precision = precisions.pop() if len(precisions) == 1 else "fp32"
        workers = self.recipe.workers
        if checkpoint is not None:
            self.position, workers, _ = read_position(checkpoint)
            self._check_workers()
        for text in passed_over:
            self._note(text)
        if world.size != workers:
            step = self.position.steps
            self._note(f"{world.size} worker(s) from step {step} on, not {workers}")
        self.log.rewind(self.position.log_lines)
        first = self.position.phase
        model, phases = world.agreed(lambda: self._build(first))
        teacher = world.agreed(self._load_teacher)
        for index in range(first, len(phases)):
            if checkpoint is None:
                phases = world.agreed(functools.partial(self._begin, index, phases, model))
            model = self._run_phase(index, phases[index], model, teacher, checkpoint)
            checkpoint = None
        self._finish(model, teacher, [entry.phase for entry in phases])

    def _check_workers(self) -> None:
        """Refuse a number of workers with which epochs have other steps: the place in the data
        would not be kept. A last batch of fewer rows than forward passes is left out."""
        train, before, now = self.recipe.train, self.position.most, self.recipe.workers
        rows = len(self.lengths)
        each = {
            workers: steps_per_epoch(rows, train.batch_size, train.accumulation, workers)
            for workers in range(1, max(before, now) + 1)
        }
        if before and each[now] != each[before]:
            fits = [workers for workers, steps in each.items() if steps == each[before]]
            raise UserError(
                f"this run was begun with workers={before}, where an epoch has {each[before]} "
                f"steps; with workers={now} it has {each[now]}, because the last batch has too few "
                f"rows for {now * train.accumulation} forward passes. Continue with "
                f"{fits[0]} to {fits[-1]} workers."
            )

    def _find_last_good(self) -> tuple[str | None, list[str]]:
        bring(self.folder)
        pull(self.log.path)
        found, passed_over = find_last_good(self.folder)
        return found and found.name, passed_over

    def _build(self, upto: int) -> tuple[Any, list[PhaseOf]]:
        """The model as it is before phase ``upto``, as to structure: earlier surgery is replayed.

        The weights that earlier phases trained come from the checkpoint that is restored next.
        """
        model, new = load_for_task(
            self.job.start,
            self.data.task,
            seed=self.recipe.train.seed,
            attention=self._attention(),
            dropout=self.recipe.train.dropout,
            new_head=not self.job.keep_head,
        )
        if self.job.teacher and (lent := take_head(model, new, self.job.teacher, self.data.task)):
            new = [name for name in new if name not in lent]
            if upto == 0:
                logger.info("from the teacher, not in %s: %s", self.job.start, ", ".join(lent))
        self.start_config = copy.deepcopy(model.config)
        phases = phases_of(self.recipe, self.start_config, self.position.settled)
        if new and upto == 0:
            logger.info("new weights, not in %s: %s", self.job.start, ", ".join(new))
        for entry in phases[:upto]:
            entry.phase.prepare(model)
            self._finish_phase(entry, model)
        return model, phases

    def _begin(self, index: int, phases: list[PhaseOf], model: Any) -> list[PhaseOf]:
        """Let a phase that begins, and its method, see weights and calibration rows.

        Returns:
            The run's phases, those of the method made anew if it was settled.
        """
        entry, position = phases[index], self.position
        position.phase, position.step = index, 0
        # Each phase draws its own random numbers, whatever came before it.
        seed_everything(self.recipe.train.seed + 7919 * index, 0)
        model.to(self.world.device).eval()
        batches = self._sample("train", entry.phase.calibration, index)
        if batches and self.world.rank == 0:  # fitting parts to them may take minutes
            rows = sum(len(batch["input_ids"]) for batch in batches)
            logger.info("%s: initialising from %d rows", entry.phase.name, rows)
        if entry.method is not None:
            # Sums of floats differ between kinds of processors, and structure must not.
            method, world = entry.method, self.world
            settled = world.agreed(lambda: method.settle(model, batches))
            found = world.gather(settled.model_dump(mode="json"))[0]
            if found != entry.method.model_dump(mode="json"):
                position.settled[str(entry.place)] = found
                phases = phases_of(self.recipe, self.start_config, position.settled)
        facts = phases[index].phase.initialise(model, batches)
        if facts:
            position.facts[phases[index].phase.name] = facts
        return phases

    def _sample(self, split: str, rows: int, index: int) -> list[dict[str, torch.Tensor]]:
        """Rows drawn for a phase, batched by length; the same on every worker."""
        if not rows:
            return []
        train, lengths = self.recipe.train, self.data.lengths(split)
        draw = np.random.default_rng([train.seed, index, rows])
        chosen = draw.permutation(len(lengths))[:rows]
        chosen = chosen[np.argsort(lengths[chosen], kind="stable")]
        batcher = self.data.batcher(split, train.seed)
        batches = [
            batcher(chosen[at : at + train.eval_batch_size])
            for at in range(0, len(chosen), train.eval_batch_size)
        ]
        return [{k: v.to(self.world.device) for k, v in batch.items()} for batch in batches]

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
        return self._teacher_model() if self.saved is None else self.saved

    def _teacher_model(self) -> Any:
        teacher: Any
        teacher, _ = load_for_task(
            self.job.teacher or "",
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
        total = phase_steps(self.recipe, phase, len(self.lengths))
        self.kept = None
        if total == 0:
            phase.prepare(model)
            self._finish_phase(entry, model)
            self.position.finished.append({"name": phase.name, "steps": 0, "seconds": 0.0})
            return model
        phase.prepare(model)
        # Each phase draws its own random numbers, whatever came before it.
        seed_everything(train.seed + 7919 * index, self.world.rank)
        model.to(self.world.device)
        if phase.calibration and checkpoint is None:
            # Sums of floats differ between kinds of processors; the engine sees to parameters.
            self.world.share(model.buffers())
        for pattern, known in unmatched(model, train):
            self._note(
                f"train.rates names {pattern!r}, which no parameter of phase {phase.name} is "
                f"called; they are called like {known!r}"
            )
        groups = parameter_groups(model, phase, train)
        engine = make_engine(model, groups, self.recipe, self.precision)
        if checkpoint is not None:
            notes = self.position.notes
            self.position = restore(checkpoint, engine, self.world, train.zero)
            self.position.notes = notes
            self.world.on_first(lambda: bring_back_best(checkpoint, self._best()))
            logger.info("continuing %s at step %d", phase.name, self.position.step)
        else:
            fresh = {"phase": index, "step": 0, "best": None, "best_step": 0}
            self.position = replace(self.position, **fresh, log_lines=self.log.lines)
            if teacher is not None or self.recipe.method:
                self._evaluate(engine, phase, total)
        self._train(engine, phase, total, teacher)
        return self._end_phase(index, entry, engine)

    def _end_phase(self, index: int, entry: PhaseOf, engine: Any) -> Any:
        """The model as the phase leaves it, with its best weights or its last."""
        stage = self.recipe.train.zero
        model = engine.module
        if self.recipe.train.keep == "best":
            with gathered(model, stage, writes=True):
                load_shared(model, self._best(), self.world)
        if stage == 3:  # the module's weights stay in parts, so it is made anew from the file
            weights = self.folder / f"phase{index}.safetensors"
            with gathered(model, stage):
                self.world.on_first(lambda: save_weights(engine.module, weights))
            engine.destroy()
            model, _ = self.world.agreed(lambda: self._build(index + 1))
            load_weights(model, weights)
        else:
            engine.destroy()
            self._finish_phase(entry, model)
        if stage == 3 or type(entry.phase).finish is not Phase.finish:
            self.kept = None  # it is another model now
        spent = self.position.seconds - sum(done["seconds"] for done in self.position.finished)
        self.position.finished.append(
            {"name": entry.phase.name, "steps": self.position.step, "seconds": round(spent, 3)}
        )
        return model

    # -- steps -------------------------------------------------------------------------------------

    def _train(self, engine: Any, phase: Phase, total: int, teacher: Any) -> None:
        train, position = self.recipe.train, self.position
        each = self._steps_per_epoch()
        eval_every = each if train.eval_every == "epoch" else train.eval_every
        save_every = each if train.save_every == "epoch" else train.save_every
        distil = self.distiller(engine, phase, teacher)
        bar = self.hooks.progress(total, phase.name)
        bar.update(position.step)
        recent = Recent(self.world, train.accumulation)
        engine.train()
        with contextlib.closing(distil), contextlib.closing(bar):
            for micro, rows in self._batches(position.step, total, recent):
                began = time.perf_counter()
                self.step(distil, total, micro, rows, recent)
                bar.update(1)
                ends = position.step == total
                evaluates = position.step % eval_every == 0 or ends
                saves = position.step % save_every == 0 or ends
                if evaluates or saves or position.step % LOG_EVERY == 0:
                    position.tokens += recent.settle(position.step, phase.name)
                position.seconds += time.perf_counter() - began
                if not recent.rows:
                    self._log_train(engine, phase, total, recent, bar)
                if evaluates or saves:
                    self._check_weights(engine, phase)
                if evaluates:
                    self._evaluate(engine, phase, total)
                if saves:
                    position.log_lines = self.log.lines
                    place = (self.world, train.zero, self._best())
                    self._keep(save(self.folder, engine, position, *place))

    def _keep(self, checkpoint: Path) -> None:
        """A checkpoint is written: it goes where the run's files belong, and is told of."""
        if uri_of(checkpoint) is not None:
            self.world.on_first(self.log.send)
            self.world.on_first(lambda: send(checkpoint))
        self.hooks.saved(checkpoint)

    def distiller(self, engine: Any, phase: Phase, teacher: Any) -> Distiller:
        """What runs the phase's forward and backward passes."""
        place = Place(self.world.device, self.precision)
        return Distiller(engine, phase, teacher, self.recipe.kd, self.kind, place)

    def step(
        self,
        distil: Distiller,
        total: int,
        micro: list[dict[str, torch.Tensor]],
        rows: int,
        recent: Recent,
    ) -> None:
        """One optimiser step.

        Args:
            distil: holds the engine and the phase.
            total: the phase's steps.
            micro: this worker's batch of each forward pass.
            rows: the step's rows over all workers and passes.
            recent: notes the losses.
        """
        position, train = self.position, self.recipe.train
        engine, phase = distil.engine, distil.phase
        set_rate(engine, rate_share(train, position.step, total))
        for chunk, (batch, share, of_rows) in enumerate(self._shares(micro, rows)):
            forward = position.step * train.accumulation + chunk
            at = At(position.step, total, forward, train.seed, batch["index"])
            phase.on_step(engine.module, at)
            terms = distil.forward_backward(batch, share, of_rows)
            recent.add(terms, batch["input_ids"].numel())
            engine.step()  # DeepSpeed counts: only a step's last chunk changes weights
        position.step += 1
        position.steps += 1

    def _shares(
        self, micro: list[dict[str, torch.Tensor]], rows: int
    ) -> list[tuple[dict[str, torch.Tensor], float, float]]:
        """Each chunk with the factors that make averaging over chunks and workers exact: of losses
        of what is predicted, and of others.

        Losses are means over a chunk's rows (what masked language modelling predicts: over masked
        tokens), and chunks are not quite of one size.
        """
        chunks = self.world.size * len(micro)
        of_rows = [len(batch["index"]) * chunks / rows for batch in micro]
        shares = of_rows
        if self.kind == "mlm":
            own = [int((batch["labels"] != IGNORED).sum()) for batch in micro]
            total = torch.tensor(float(sum(own)), device=self.world.device)
            whole = self.world.mean(total).item() * self.world.size
            shares = [n * chunks / whole for n in own]
        return list(zip(micro, shares, of_rows, strict=True))

    def _check_weights(self, engine: Any, phase: Phase) -> None:
        """Refuse to keep weights that are no numbers: a gradient can be bad where no loss is."""
        trained = [p.detach() for p in engine.module.parameters() if p.requires_grad]
        good = all(torch.isfinite(p).all().item() for p in trained)
        if not self.world.all_true(good):
            raise not_a_number("a weight", self.position.step, phase.name)

    def _batches(
        self, start: int, total: int, recent: Recent
    ) -> Iterator[tuple[list[dict[str, torch.Tensor]], int]]:
        """From step ``start`` on: this worker's batches of a step, and the step's rows over all."""
        train, each = self.recipe.train, self._steps_per_epoch()
        batcher = self.data.batcher("train", train.seed)
        if self.saved is not None:
            batcher = self.saved.beside(batcher)
        for epoch in range(start // each, -(-total // each)):
            plan = train_steps(
                self.lengths,
                batch_size=train.batch_size,
                accumulation=train.accumulation,
                world_size=self.world.size,
                most=self.recipe.workers,
                seed=train.seed,
                epoch=epoch,
            )[max(0, start - epoch * each) : total - epoch * each]
            mine = [turn[self.world.rank] for step in plan for turn in step]
            pin = self.world.device.type == "cuda"
            with contextlib.closing(prefetch(batcher, mine, epoch=epoch, pin=pin)) as batches:
                groups = batched(batches, train.accumulation)
                for step in plan:
                    micro = next(groups)
                    recent.waited += batches.waited
                    batches.waited = 0.0
                    yield micro, sum(len(part) for turn in step for part in turn)

    def _steps_per_epoch(self) -> int:
        train = self.recipe.train
        return steps_per_epoch(
            len(self.lengths), train.batch_size, train.accumulation, self.recipe.workers
        )

    # -- bookkeeping -------------------------------------------------------------------------------

    def _log_train(self, engine: Any, phase: Phase, total: int, recent: Recent, bar: Any) -> None:
        position, losses = self.position, recent.means
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
        # In float32, as the finished model is scored: integers' sums do not fit half precision.
        metrics = evaluate(engine.module, self.data, "dev", self.world, train.eval_batch_size)
        self._write("eval", phase, total, metrics)
        score = metrics[task.main]
        if position.step == 0 and score <= floor(task, self.data, "dev")[task.main]:
            self._note(
                f"phase {phase.name} starts at chance ({task.main} {score:.3f}): its student has "
                "everything to learn, so give it steps enough"
            )
        first = position.best is None
        may_end, ends = phase.may_end(position.step), position.step == total
        if ends and not may_end and (first or train.keep == "last") and phase.unreached():
            self._note(phase.unreached())
        counts = may_end or (first and ends)
        if counts and (position.best is None or score > position.best):
            position.best, position.best_step = score, position.step
            self.kept = metrics
            if train.keep == "best":
                self._save_best(engine)
        if train.keep == "last":
            self.kept = metrics
        spent = {"seconds": position.seconds, "tokens": position.tokens}
        self.hooks.report({**metrics, **spent, "phase": phase.name, "step": position.steps})

    def _best(self) -> Path:
        return self.folder / f"phase{self.position.phase}-best.safetensors"

    def _save_best(self, engine: Any) -> None:
        with gathered(engine.module, self.recipe.train.zero):
            self.world.on_first(lambda: save_weights(engine.module, self._best()))

    def _write(self, kind: str, phase: Phase, total: int, values: dict[str, Any]) -> None:
        position = self.position
        place = {"kind": kind, "phase": phase.name, "phase_index": position.phase}
        self.log.write({**place, "step": position.step, "total": total, **values}, position.steps)

    def _note(self, text: str) -> None:
        if text in self.position.notes:  # said before an interruption
            return
        self.position.notes.append(text)
        if self.world.rank == 0:
            self.hooks.note(text)

    def _finish(self, model: Any, teacher: Any, phases: list[Phase]) -> None:
        """Evaluate what came out, unless it just was, beside its teacher; write the finished
        model."""
        rows, world = self.recipe.train.eval_batch_size, self.world
        model.to(world.device).eval()
        student_metrics = self.kept or evaluate(model, self.data, "dev", world, rows)
        teacher_metrics = self.job.teacher_metrics
        if self.job.teacher and teacher_metrics is None:
            if not isinstance(teacher, nn.Module):
                teacher = world.agreed(self._teacher_model)
            teacher_metrics = evaluate(teacher, self.data, "dev", world, rows)
        for index, phase in enumerate(phases):
            if phase.examined:
                told = phase.facts(model, self._sample("dev", phase.examined, index))
                facts = self.position.facts
                facts[phase.name] = {**facts.get(phase.name, {}), **told}
        result = {
            "student": student_metrics,
            "teacher": teacher_metrics,
            "position": asdict(self.position),
            "precision": self.precision,
            "notes": self.position.notes,
        }
        self.world.on_first(lambda: self._write_final(model, result))

    def _write_final(self, model: Any, result: dict[str, Any]) -> None:
        final, partial = self.folder / FINAL, self.folder / f".partial-{FINAL}"
        try:
            for leftover in (partial, final):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)
            model.save_pretrained(partial)
            tokenizer = load_tokenizer(self.job.start)
            longest = longest_input(model.config)
            tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
            tokenizer.save_pretrained(partial)
            rows = np.arange(min(4, len(self.data.splits["dev"])))
            write_probe(model, partial, self.data.batcher("dev")(rows))
            (partial / RESULT).write_text(json.dumps(result))
            os.replace(partial, final)
        except (OSError, SafetensorError) as error:
            raise TransientError(
                f"the finished model could not be written to {final}: {error}. Make room, or "
                f"mend the "
                "storage, and start the same command again."
            ) from None
        self.log.send()
        push(final, last=RESULT)
