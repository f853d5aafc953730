"""What Tune does with trials as they run: ASHA, median stopping, and population-based training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
)
from ray.tune.search.sample import Domain, Integer

from raybert.data import steps_per_epoch
from raybert.errors import UserError
from raybert.ledger import Trial
from raybert.method import MethodConfig
from raybert.methods import METHODS
from raybert.objectives import Objective, front
from raybert.plan import Plan
from raybert.space import Space, is_fixed, listed

SCHEDULERS = ("none", "asha", "median", "pbt")

TIME = "percent"
"""What schedulers count in: percent of a trial's own steps, over all phases."""

GRACE = 15
"""Percent that every trial is given before it may be stopped: the warm-up, and half as much."""

THINNING = 3
"""ASHA: of the trials that reached a rung, one in so many goes on; rungs are at 15 and 45."""

PERTURB = 20
"""Population-based training: percent between looks at the population."""


class _Sparing(FIFOScheduler):
    """Goes by the score, and spares trials that no other beats in all objectives.

    Among models of all sizes the score alone would stop the small ones, which a search is for.

    Attributes:
        objectives: what trials are judged by; the score alone spares none.
        curves: what each trial has reported.
    """

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.objectives: Sequence[Objective] = ()
        self.curves: dict[str, list[dict[str, Any]]] = {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """The scheduler's decision, unless the trial is on the front of those that came as far."""
        if result.get(TIME) == 0:  # what it starts as, it does not end as
            return self.CONTINUE
        decision = super().on_trial_result(tune_controller, trial, result)
        if TIME not in result:  # it has failed
            return decision
        self.curves.setdefault(trial.trial_id, []).append(result)
        if decision != self.STOP or len(self.objectives) < 2:
            return decision
        rivals = [
            [point for point in curve if point[TIME] <= result[TIME]][-1:]
            for name, curve in self.curves.items()
            if name != trial.trial_id
        ]
        rows = [result, *(point for points in rivals for point in points)]
        return self.CONTINUE if front(rows, self.objectives)[0] else decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """A trial that has failed has no curve to compare others with."""
        if TIME in result:
            super().on_trial_complete(tune_controller, trial, result)


class Asha(_Sparing, AsyncHyperBandScheduler):
    """Asynchronous successive halving: a rung knows each trial by its first score between there
    and the next. The end is no rung."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """The rule, for a trial that has not come to its end: that one's model is written."""
        if result.get(TIME, 0) >= 100:
            return self.CONTINUE
        return super().on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Ray's rule would put its last score down for a rung that it was not seen on."""


class Median(_Sparing, MedianStoppingRule):
    """Stops what does worse than the median of what others did on the way."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """The rule, for a trial that may have been spared, or have gone on in its time."""
        decision = super().on_trial_result(tune_controller, trial, result)
        self._stopped_trials.discard(trial)  # Ray's rule takes it that such a trial never comes
        return decision


class Population(PopulationBasedTraining):
    """Population-based training that leaves alone what has come to its end."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """A finished trial is not made to go on from another's checkpoint."""
        if result.get(TIME, 0) >= 100:
            return self.CONTINUE
        return super().on_trial_result(tune_controller, trial, result)


def make_scheduler(name: str, space: Space, objectives: Sequence[Objective]) -> Any:
    """A Tune scheduler by its name; all go by the dev score."""
    shared: dict[str, Any] = {"time_attr": TIME, "metric": "score", "mode": "max"}
    if name == "asha":
        # Unless the last trials are let go on, Ray's rule puts a later score down for a lower rung,
        # which a trial that was first seen on a higher one has passed.
        rungs = {"max_t": 100, "grace_period": GRACE, "reduction_factor": THINNING}
        asha = Asha(**shared, **rungs, stop_last_trials=False)
        asha.objectives = objectives
        return asha
    if name == "median":
        # Endless: a trial is never set aside for others to start, which would cost it its place
        # since the last checkpoint.
        median = Median(
            **shared, grace_period=GRACE, min_samples_required=3, min_time_slice=float("inf")
        )
        median.objectives = objectives
        return median
    if name == "pbt":
        return Population(
            **shared,
            perturbation_interval=PERTURB,
            require_attrs=False,  # a trial that has failed has none
            hyperparam_mutations={"values": mutable(space)},
            custom_explore_fn=_Inside(space),
            log_config=False,
        )
    return FIFOScheduler()


def mutable(space: Space) -> dict[str, Any]:
    """The axes that population-based training changes, as it wants them."""
    return {
        key: listed(axis) or axis  # a list is stepped through, a distribution multiplied
        for key, axis in space.axes.items()
        if not is_fixed(axis)
    }


class _Inside:
    """Keeps numbers that population-based training has changed by a fifth inside the space."""

    def __init__(self, space: Space) -> None:
        self.bounds = {
            key: _bounds(axis)
            for key, axis in space.axes.items()
            if isinstance(axis, Domain) and listed(axis) is None
        }

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        values = dict(config["values"])
        for key, (low, high) in self.bounds.items():
            values[key] = min(max(values[key], low), high)
        return {**config, "values": values}


def _bounds(axis: Any) -> tuple[float, float]:
    """The least and the greatest value of a distribution of numbers: Ray leaves the upper bound of
    integers out, unless they go in steps."""
    without = isinstance(axis, Integer) and getattr(axis.get_sampler(), "q", 1) == 1
    return axis.lower, axis.upper - without


def check_schedules(space: Space, plans: Sequence[Plan]) -> None:
    """Refuse a space for population-based training whose trials could not take over from each
    other.

    Args:
        space: the space.
        plans: those of several samples.

    Raises:
        UserError: samples differ in structure or in steps, or a method settles what is searched
            when its phase begins.
    """
    if "method" in space.axes:
        raise UserError(
            f"population-based training changes recipes while they run, and space {space.name} "
            "chooses the methods. Search chains with another scheduler."
        )
    settles = {name for name, kind in METHODS.items() if kind.settle is not MethodConfig.settle}
    for key in space.axes:
        if key.startswith("method.") and key.split(".")[1] in settles:
            raise UserError(
                f"population-based training cannot change `{key}`: {key.split('.')[1]} settles its "
                "parameters when its phase begins. Use train.* and kd.* keys, or another scheduler."
            )
    shapes = {str((plan.phases, plan.after)) for plan in plans}
    if len(shapes) > 1:
        raise UserError(
            f"population-based training moves weights from trial to trial, and samples of space "
            f"{space.name} differ in structure or steps. Give it a space of rates and weights, "
            "such as that of --space lobert:SCHEDULES, or use scheduler asha."
        )
    if not any(_is_watched(plan, PERTURB) for plan in plans):
        raise UserError(
            "population-based training compares trials at evaluations, and these have none between "
            f"{PERTURB} % of their steps and their end. Give train.eval_every, for example a tenth "
            "of the steps."
        )


def check_stopping(
    scheduler: str, objectives: Sequence[Objective], plans: Sequence[Plan]
) -> list[str]:
    """Refuse objectives by which early stopping cannot spare a trial.

    Args:
        scheduler: ``asha`` or ``median``; others stop nothing.
        objectives: what trials are judged by.
        plans: those of several samples.

    Returns:
        What the user should know: that nothing will be stopped.

    Raises:
        UserError: running trials do not know one of the objectives.
    """
    if scheduler not in ("asha", "median"):
        return []
    for objective in objectives:
        if not objective.while_running:
            raise UserError(
                f"objective {objective.name!r} is known only when a trial has ended, so that "
                f"scheduler {scheduler} would stop what is good in it. Use --scheduler none, or "
                "objectives of score, retained, bytes, parameters, flops, latency and seconds."
            )
    if any(_is_watched(plan, GRACE) for plan in plans):
        return []
    return [
        f"scheduler {scheduler} can stop nothing: trials have no evaluation between {GRACE} % of "
        "their steps and their end; give train.eval_every, for example a tenth of the steps"
    ]


def _is_watched(plan: Plan, percent: float) -> bool:
    """Whether a trial is evaluated before its end, and after so many percent of its steps."""
    train, rows = plan.recipe.train, len(plan.data.splits["train"])
    every = train.eval_every
    if every == "epoch":
        workers = plan.recipe.workers
        every = steps_per_epoch(rows, train.batch_size, train.accumulation, workers)
    total, before = sum(steps for _, steps in plan.phases), 0
    for _, steps in plan.phases:
        # The phase's own evaluations, and the one at its end.
        last = before + (steps - 1) // every * every
        if any(percent * total <= 100 * step < 100 * total for step in (last, before + steps)):
            return True
        before += steps
    return False


@dataclass(eq=False)
class _Before:
    """A trial of before the interruption, as schedulers know trials."""

    trial_id: str


def remember(scheduler: Any, trials: Sequence[Trial]) -> None:
    """Show a scheduler the curves of trials that ended before the search was interrupted."""
    if not isinstance(scheduler, _Sparing):
        return
    for trial in trials:
        stub: Any = _Before(f"before-{trial.name}")
        controller: Any = None
        scheduler.on_trial_add(controller, stub)
        # A ledger of before has no points: what does not change on the way, as a size, holds.
        points = trial.points or [trial.results] * len(trial.curve)
        for (percent, score), point in zip(trial.curve, points, strict=False):
            result = {**point, TIME: percent, "score": score}
            scheduler.on_trial_result(controller, stub, result)
