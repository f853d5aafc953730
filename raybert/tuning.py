"""Trials on Ray Tune: one Tuner over a ledger, and the scribe that keeps the ledger.

Ray's own record of an experiment is not read again. A search that was interrupted is a new
experiment whose searcher first goes through the ledger: what was finished is told to the search
algorithm, and what was running runs on in its own run folder.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ray import tune
from ray.tune import TuneError
from ray.tune.search import Searcher

from raybert.cluster import last_line
from raybert.draws import SKIPS, Check, Draws, Source, config_of
from raybert.errors import TransientError, UserError
from raybert.ledger import DONE, Ledger, Trial
from raybert.shares import Shares
from raybert.space import Space
from raybert.steering import make_scheduler, remember
from raybert.trial import Work, number_of, run_trial

Tell = Callable[[str], None]

HEAD = "node:__internal_head__"
"""A resource of the machine that the search runs on, 1 in all. Where CPUs do not say how many
trials run at once, each takes its part of this: those of several workers only watch them, and
would hold the CPUs that these need; a population is told of all its trials, and not counted."""


class Scribe(tune.Callback):
    """Keeps the ledger as Tune reports; tells the search algorithm and the user.

    Args:
        ledger: what is kept.
        total: trials in all, for what is told.
        cores: CPU cores that a trial holds.
        gpus: GPUs that a trial holds.
        told: hears of each trial that has ended.
        tell: gets a line for it.
        deadline: of the search; what it cuts short is not stopped, but goes on another time.
    """

    def __init__(
        self,
        ledger: Ledger,
        total: int,
        cores: float,
        gpus: float,
        told: Callable[[Trial], None],
        tell: Tell,
        deadline: float,
    ) -> None:
        self.ledger, self.total = ledger, total
        self.cores, self.gpus = cores, gpus
        self.told, self.tell, self.deadline = told, tell, deadline
        self.stamps: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles what it is given, for a restore that never comes."""
        return {}

    def _of(self, trial: Any) -> Trial:
        number, seed = number_of(trial.config, trial.trial_id), trial.config["seed"]
        known = self.ledger.get(number, seed)
        return known or Trial(number, dict(trial.config["values"]), seed=seed)

    def _counted(self, trial: Any) -> Trial:
        """A trial with the time that it has taken since it was last counted."""
        own, now = self._of(trial), time.time()
        seconds = now - self.stamps.get(trial.trial_id, now)
        own.seconds += seconds
        own.cores = self.cores
        own.core_seconds += seconds * self.cores
        own.gpu_seconds += seconds * self.gpus
        self.stamps[trial.trial_id] = now
        return own

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """A trial starts, or goes on after a pause or a crash."""
        self.stamps[trial.trial_id] = time.time()

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict, **info: Any
    ) -> None:
        """An evaluation, or the end."""
        own = self._counted(trial)
        self.ledger.spend("trials")  # a search that is killed has counted so far
        own.values = dict(result.get("values", own.values))
        if "failed" in result:
            own.state, own.reason = "failed", result["failed"]
        else:
            # Not finished any more where Tune lets it train on from another's checkpoint.
            own.state = "finished" if result.get("finished") else "running"
            skipped = ("values", "config")
            own.results = {
                key: float(value)
                for key, value in result.items()
                if key not in skipped and type(value) in (int, float) and key not in _TUNES_OWN
            }
            if not own.curve or own.curve[-1][0] < result["percent"]:
                own.curve.append([result["percent"], result["score"]])
                own.points.append(own.results)
        self.ledger.write(own)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """A trial has ended, or was stopped."""
        own = self._of(trial)
        if own.state == "running":
            if time.time() >= self.deadline:
                return
            own.state = "stopped"
        self._ended(own)

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """A trial crashed and will be tried again."""
        self.ledger.write(self._counted(trial))

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """A trial crashed as often as it may."""
        own = self._counted(trial)
        error = trial.get_error()
        reason = last_line(error) if error else "it crashed"
        own.state, own.reason = "failed", reason.removeprefix(_AS_A_CRASH)
        self._ended(own)

    def _ended(self, own: Trial) -> None:
        self.ledger.write(own)
        if own.state == "stopped":
            self.ledger.remove_checkpoints()
        self.told(own)
        done = self.ledger.ended
        shown = ", ".join(
            f"{key} {value:.4g}" for key, value in own.results.items() if key in ("score", "bytes")
        )
        what = {"stopped": "stopped early", "failed": f"failed: {own.reason}"}
        place = f" ({done} of {self.total})" if own.seed is None else ""
        self.tell(f"trial {own.name} {what.get(own.state, own.state)}; {shown}{place}")


_AS_A_CRASH = f"{TransientError.__module__}.{TransientError.__name__}: "
"""What a traceback puts before an error that was raised for Tune to try the trial again."""

_TUNES_OWN = {
    *("timestamp", "time_this_iter_s", "time_total_s", "time_since_restore", "pid", "finished"),
    *("training_iteration", "iterations_since_restore", "done", "should_checkpoint", "percent"),
    *("step",),
}
"""Numbers that Tune adds to results, and those that are kept elsewhere."""


class Listed(Searcher):
    """Gives Tune trials from a list."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        super().__init__()
        self.waiting = list(trials)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles what it is given, for a restore that never comes."""
        return {}

    def suggest(self, trial_id: str) -> Any:
        """The next; see `Searcher.suggest`."""
        if not self.waiting:
            return Searcher.FINISHED
        return config_of(self.waiting.pop(0))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing depends on it."""

    def save(self, checkpoint_path: str) -> None:
        """The ledger is what a search goes on from."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""


class Ending(tune.Stopper):
    """Ends trials in order, when the time is over or on the first Ctrl-C: an interruption that went
    through Tune would leave its actors at work on a Ray that others started.

    Args:
        deadline: `time.time()` at which it ends.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline, self.interrupted = deadline, False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial ends alone."""
        return False

    def stop_all(self) -> bool:
        """Whether all end."""
        return self.interrupted or time.time() >= self.deadline

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hears Ctrl-C, and raises it at the end; a second one does not wait."""
        before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or before == signal.SIG_IGN:
            yield
            return

        def note(*_: object) -> None:
            self.interrupted = True
            signal.signal(signal.SIGINT, before)

        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
        if self.interrupted:
            raise KeyboardInterrupt


class Runner:
    """Runs the trials of one search.

    Args:
        work: what trials are told.
        shares: what each gets.
        ledger: what is known of them.
        retries: how often one that crashed is tried again.
        deadline: `time.time()` after which nothing more is trained.
        last_start: after which no more of the search's own trials start, to leave finalists time.
        loggers: Tune callbacks beside the scribe.
        tell: gets a line for each trial.
    """

    def __init__(
        self,
        work: Work,
        shares: Shares,
        ledger: Ledger,
        *,
        retries: int,
        deadline: float,
        last_start: float,
        loggers: Sequence[Any],
        tell: Tell,
    ) -> None:
        self.work, self.shares, self.ledger, self.tell = work, shares, ledger, tell
        self.retries, self.deadline, self.loggers = retries, deadline, loggers
        self.last_start = last_start

    def search(
        self, source: Source, check: Check, limit: int, scheduler: str, space: Space
    ) -> None:
        """Run the search's own trials, as far as they have not been run.

        Raises:
            UserError: hardly a sample can be run, and none has.
        """
        recipe = self.work.recipe
        if scheduler == "pbt":
            self._population(source, check, limit, space)
            return
        draws = Draws(source, self.ledger, recipe, check, limit, self.tell, self.last_start)
        steering = make_scheduler(scheduler, space, self.work.objectives)
        remember(steering, [t for t in self.ledger.trials if t.state in ("finished", "stopped")])
        if time.time() < self.deadline and draws.has_next():
            scribe = self._scribe(limit, draws.told)
            self._fit({}, scribe, limit, search_alg=draws, scheduler=steering)
        if draws.hopeless:
            last = [t for t in self.ledger.trials if t.state == "skipped"][-1]
            why = f"{SKIPS} samples in a row were skipped; the last: {last.reason}"
            if not any(t.state == "finished" for t in self.ledger.trials):
                raise UserError(f"{why} Make the space smaller.")
            self.tell(f"note: {why} The search ends with the trials that it has.")

    def repeat(self, trials: Sequence[Trial]) -> None:
        """Run finalists with other seeds, as far as they have not been run."""
        waiting = []
        for trial in trials:
            known = self.ledger.get(trial.number, trial.seed) or trial
            self.ledger.write(known)
            waiting += [known] if known.state not in DONE else []
        if waiting and time.time() < self.deadline:
            scribe = self._scribe(len(waiting), _nobody)
            self._fit({}, scribe, len(waiting), search_alg=Listed(waiting))

    def _population(self, source: Source, check: Check, limit: int, space: Space) -> None:
        """Population-based training: Tune's own variant generator is the only one it takes."""
        draws = Draws(source, self.ledger, self.work.recipe, check, limit, self.tell)
        found: dict[int, dict[str, Any]] = {}
        while (config := draws.suggest("")) != Searcher.FINISHED:
            found[config["number"]] = config["values"]
        if not found or time.time() >= self.deadline:
            return
        space_of_numbers = {
            "number": tune.grid_search(list(found)),
            "population": list(found),
            "seed": None,
            "values": tune.sample_from(lambda config: dict(found[config["number"]])),
        }
        scheduler = make_scheduler("pbt", space, self.work.objectives)
        self._fit(space_of_numbers, self._scribe(limit, _nobody), 1, scheduler=scheduler)

    def _scribe(self, total: int, told: Callable[[Trial], None]) -> Scribe:
        shares, workers = self.shares, self.work.recipe.workers
        cores, gpus = shares.cpus * workers, shares.gpu * workers
        return Scribe(self.ledger, total, cores, gpus, told, self.tell, self.deadline)

    def _fit(self, axes: dict[str, Any], scribe: Scribe, samples: int, **how: Any) -> None:
        alone = self.work.recipe.workers == 1
        trainable = tune.with_resources(
            tune.with_parameters(run_trial, work=self.work), self.resources()
        )
        place = self.work.folder / "ray"
        ending = Ending(self.deadline)
        tuner = tune.Tuner(
            trainable,
            param_space=axes,
            tune_config=tune.TuneConfig(
                num_samples=samples,
                # A population waits in turns: what Tune holds back by a number is not part of it.
                max_concurrent_trials=None if self.work.hands_over else self.shares.concurrent,
                # An actor of its own a trial costs the seconds of importing torch; one worker's
                # loop leaves nothing behind in its process.
                reuse_actors=alone,
                **how,
            ),
            run_config=tune.RunConfig(
                name=f"tune-{time.time_ns()}",
                storage_path=str(place),
                callbacks=[scribe, *self.loggers],
                failure_config=tune.FailureConfig(max_failures=self.retries),
                # Of a population: one that is taken over must not be gone by then.
                checkpoint_config=tune.CheckpointConfig(num_to_keep=4),
                verbose=0,
                stop=ending,
            ),
        )
        try:
            with _quiet(), ending.listening():
                tuner.fit()
        except TuneError as error:  # a callback's: the ledger's disk is full, a tracker is away
            raise TransientError(
                f"the search ended before its time: {last_line(error)}. What was found is "
                "kept; mend that, and the same command goes on."
            ) from error
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def resources(self) -> dict[str, float] | tune.PlacementGroupFactory:
        """What Tune sets aside for a trial."""
        shares = self.shares
        turn = {HEAD: part_of_head(shares.concurrent)}
        if self.work.recipe.workers > 1:
            return {"CPU": 0, **turn}
        own = {"CPU": shares.cpus, **({"GPU": shares.gpu} if shares.gpu else {})}
        # Two bundles: the trial runs in the first, on any machine.
        return tune.PlacementGroupFactory([own, turn]) if self.work.hands_over else own


def part_of_head(concurrent: int) -> float:
    """A trial's part of `HEAD`, of which so many fit and no more; Ray counts ten-thousandths, which
    is exact for 99 at most."""
    return round(1 / (concurrent + 0.5), 4)


def _nobody(trial: Trial) -> None:
    """Nobody waits for it."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Tune without its files and tables; an interruption is `Ending`'s to see."""
    settings = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        # A trial that has failed has no score; the others go on.
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
    }
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
