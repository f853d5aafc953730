"""Where trials come from: grid, random and Optuna's samples, and the searcher that skips what
cannot save anything before it costs a start-up."""

from __future__ import annotations

import importlib.util
import itertools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from ray.tune.search import Searcher
from ray.tune.search.sample import Domain

from raybert.config import Recipe
from raybert.errors import UserError
from raybert.ledger import DONE, Ledger, Trial
from raybert.objectives import Objective
from raybert.space import Space, Values, chain_of, is_grid, listed, used

ALGORITHMS = ("random", "grid", "optuna")

SKIPS = 20
"""Samples in a row that may be skipped before a search gives up."""

OWN = 3
"""Samples in place of a repeat that are Optuna's own; then random ones: it proposes the likeliest
point, and that a trial of it failed changes nothing."""

FAILS = 5
"""Failed trials, and none that was evaluated, after which no more are started."""

REPEATS = 100
"""Samples in a row that may repeat recipes that were drawn, before a space counts as exhausted."""


class Source(Protocol):
    """A search algorithm: asked for samples, and told what became of them.

    Attributes:
        ends: whether there are so many samples and no more, as of a grid.
    """

    ends: bool

    def ask(self, number: int, again: int = 0) -> Values | None:
        """The sample of that number; None when there are no more.

        Args:
            number: of the trial.
            again: above 0, another one in its place, so many times already; a source that ends has
                none.
        """
        ...

    def remember(self, number: int, values: Values) -> None:
        """A sample that was drawn before the search was interrupted."""
        ...

    def tell(self, number: int, results: dict[str, float] | None) -> None:
        """What a sample has come to; None: nothing."""
        ...


class Plain:
    """Random samples, and all combinations of what is given as a grid.

    A number's sample depends on it, the seed and ``again`` alone, so that nothing need be
    remembered.
    """

    def __init__(self, space: Space, seed: int) -> None:
        self.space, self.seed = space, seed
        grids = {key: axis["grid_search"] for key, axis in space.axes.items() if is_grid(axis)}
        self.grid = [
            dict(zip(grids, point, strict=True)) for point in itertools.product(*grids.values())
        ]
        self.ends = bool(grids)

    def ask(self, number: int, again: int = 0) -> Values | None:
        if self.ends and (again or number >= len(self.grid)):
            return None
        draw = np.random.RandomState([self.seed, number, *([again] if again else [])])
        fixed = self.grid[number % len(self.grid)]
        return {
            key: fixed[key] if key in fixed else _sample(axis, draw)
            for key, axis in self.space.axes.items()
        }

    def remember(self, number: int, values: Values) -> None:
        """Samples are drawn by number."""

    def tell(self, number: int, results: dict[str, float] | None) -> None:
        """Samples do not depend on results."""


def _sample(axis: Any, draw: np.random.RandomState) -> Any:
    value = axis.sample(random_state=draw) if isinstance(axis, Domain) else axis
    return value.item() if isinstance(value, np.generic) else value


def as_grid(space: Space) -> Space:
    """A space whose choices are a grid too, for every combination to be tried.

    Raises:
        UserError: a distribution has no end.
    """
    endless = [key for key, axis in space.axes.items() if isinstance(axis, Domain)]
    endless = [key for key in endless if listed(space.axes[key]) is None]
    if endless:
        raise UserError(
            f"space {space.name} has no grid: {', '.join(endless)} can be any number. Use "
            "algorithm random or optuna, or tune.grid_search in the space."
        )
    axes = {
        key: {"grid_search": values} if (values := listed(axis)) else axis
        for key, axis in space.axes.items()
    }
    return Space(space.name, axes)


class Optuna:
    """Optuna's tree-structured Parzen estimator, for one objective or several.

    Parameters of a method are asked for only where the chain has that method.
    """

    def __init__(
        self, space: Space, recipe: Recipe, objectives: Sequence[Objective], seed: int
    ) -> None:
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.ends = False
        self.space, self.recipe, self.objectives = space, recipe, objectives
        domains = {key: axis for key, axis in space.axes.items() if isinstance(axis, Domain)}
        try:
            self.distributions = OptunaSearch.convert_search_space(domains)
        except ValueError as error:
            raise UserError(
                f"space {space.name} has what Optuna cannot sample: {error} Use --algorithm random."
            ) from None
        self.failed = optuna.trial.TrialState.FAIL
        self.study = optuna.create_study(
            directions=["maximize" if o.sign > 0 else "minimize" for o in objectives],
            sampler=optuna.samplers.TPESampler(seed=seed),
        )
        self.asked: dict[int, Any] = {}
        self.plain = Plain(space, seed)

    def ask(self, number: int, again: int = 0) -> Values | None:
        if again:
            self.tell(number, None)
        if again > OWN:
            self._enqueue(self.plain.ask(number, again) or {})
        trial = self.asked[number] = self.study.ask()
        values: Values = {}
        # The chain first: it decides which parameters there are.
        for key in sorted(self.space.axes, key=lambda key: key != "method"):
            axis = self.space.axes[key]
            unused = key.startswith("method.") and key.split(".")[1] not in chain_of(
                self.recipe, values
            )
            if not unused:
                values[key] = (
                    _suggest(trial, key, self.distributions[key])
                    if key in self.distributions
                    else axis
                )
        return values

    def remember(self, number: int, values: Values) -> None:
        self._enqueue(values)
        self.ask(number)

    def _enqueue(self, values: Values) -> None:
        self.study.enqueue_trial({k: v for k, v in values.items() if k in self.distributions})

    def tell(self, number: int, results: dict[str, float] | None) -> None:
        known = results or {}
        numbers = [known[o.name] for o in self.objectives if o.name in known]
        if len(numbers) < len(self.objectives):
            self.study.tell(self.asked[number], state=self.failed)
        else:
            self.study.tell(self.asked[number], numbers)


def _suggest(trial: Any, key: str, kind: Any) -> Any:
    """A value of one of Optuna's distributions."""
    if type(kind).__name__ == "CategoricalDistribution":
        return trial.suggest_categorical(key, kind.choices)
    ask = trial.suggest_int if type(kind).__name__ == "IntDistribution" else trial.suggest_float
    return ask(key, kind.low, kind.high, step=kind.step, log=kind.log)


def has_optuna() -> bool:
    """Whether the extra is installed."""
    return importlib.util.find_spec("optuna") is not None


def make_source(
    algorithm: str, space: Space, recipe: Recipe, objectives: Sequence[Objective], seed: int
) -> Source:
    """A search algorithm by its name.

    Raises:
        UserError: it does not go with the space, or is not installed.
    """
    if algorithm != "optuna":
        return Plain(as_grid(space) if algorithm == "grid" else space, seed)
    if not has_optuna():
        raise UserError(
            'Optuna is not installed: pip install "raybert[tune]", or use algorithm random.'
        )
    if grids := [key for key, axis in space.axes.items() if is_grid(axis)]:
        raise UserError(
            f"space {space.name} has a grid for {', '.join(grids)}, which Optuna cannot sample; "
            "use algorithm grid, or tune.choice in the space."
        )
    return Optuna(space, recipe, objectives, seed)


def cut_grid(source: Source, recipe: Recipe, trials: int) -> list[str]:
    """That a grid has more points than there are to be trials, where it has."""
    count = different_points(source, recipe)
    if count is None or count <= trials:
        return []
    return [
        f"the grid has {count} points, of which the first {trials} that can be run are tried; "
        f"--trials {count} tries all"
    ]


def different_points(source: Source, recipe: Recipe) -> int | None:
    """How many recipes a grid comes to; nothing for what is no grid. Points that differ in
    parameters of methods outside their chain are one."""
    if not (isinstance(source, Plain) and source.ends):
        return None
    points = [source.ask(number) for number in range(len(source.grid))]
    return len({_same(used(recipe, point)) for point in points if point is not None})


def is_walked(source: Source, ledger: Ledger) -> bool:
    """Whether every point of a grid was drawn, and none need be run again; no for what is no
    grid."""
    if not (isinstance(source, Plain) and source.ends):
        return False
    points = [ledger.get(number) for number in range(len(source.grid))]
    return all(trial is not None and trial.state in DONE for trial in points)


def _same(values: Values) -> str:
    """What samples of the same recipe have in common."""
    return json.dumps(values, sort_keys=True)


Check = Callable[[Values], str]
"""Why a sample is not worth a start-up; nothing where it is."""


def config_of(trial: Trial) -> dict[str, Any]:
    """What a trial's actor is told."""
    return {
        "number": trial.number,
        "population": None,
        "seed": trial.seed,
        "values": trial.values,
    }


class Draws(Searcher):
    """Gives Tune one legal trial after the other, those of an interrupted search first.

    Args:
        source: the search algorithm.
        ledger: what was drawn before; it is written as trials are drawn.
        recipe: what all trials share.
        check: looks at each sample first.
        limit: trials in all, skipped ones not counted.
        tell: hears of samples that are skipped.
        until: `time.time()` after which no more trials start.
    """

    def __init__(
        self,
        source: Source,
        ledger: Ledger,
        recipe: Recipe,
        check: Check,
        limit: int,
        tell: Callable[[str], None],
        until: float = float("inf"),
    ) -> None:
        super().__init__()
        self.source, self.ledger, self.recipe = source, ledger, recipe
        self.check, self.limit, self._say = check, limit, tell
        self.until = until
        self.number = self.count = self.skipped = self.failed = 0
        self.ahead: list[dict[str, Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles what it is given, for a restore that never comes."""
        return {}

    def suggest(self, trial_id: str) -> Any:
        """The next trial's config; see `Searcher.suggest`."""
        if self.ahead:
            return self.ahead.pop()
        while self.count < self.limit and not self._ends and time.time() < self.until:
            known = self.ledger.get(self.number)
            if known is None:
                known = self._draw()
            else:
                self.source.remember(self.number, known.values)
            if known is None:
                break
            self.number += 1
            self.skipped = self.skipped + 1 if known.state == "skipped" else 0
            self.count += known.state != "skipped"
            if known.state not in DONE:
                return config_of(known)
            results = known.results if known.state in ("finished", "stopped") else None
            self.source.tell(known.number, results)
        return Searcher.FINISHED

    @property
    def hopeless(self) -> bool:
        """Whether hardly a sample can be run. A grid is walked to its end: its mistakes lie side by
        side."""
        return self.skipped >= SKIPS and not self.source.ends

    @property
    def broken(self) -> bool:
        """Whether it is hardly the samples' fault: several trials have failed, and none, of this
        start or an earlier one, was ever evaluated."""
        return self.failed >= FAILS and not any(trial.curve for trial in self.ledger.trials)

    @property
    def _ends(self) -> bool:
        return self.hopeless or self.broken

    def has_next(self) -> bool:
        """Whether there is anything to run: Tune does without a search that has not."""
        found = self.suggest("")
        self.ahead = [] if found == Searcher.FINISHED else [found]
        return bool(self.ahead)

    def _draw(self) -> Trial | None:
        """The next trial, which repeats none; None where there are no more."""
        drawn = {_same(trial.values): trial for trial in reversed(self.ledger.trials)}
        for again in range(REPEATS):
            values = self.source.ask(self.number, again)
            if values is None:
                return None
            values = used(self.recipe, values)
            twin = drawn.get(_same(values))
            # A grid's numbers are its points: one that repeats another keeps its own.
            if twin is None or self.source.ends:
                reason = f"the same as trial {twin.name}." if twin else self.check(values)
                return self._noted(values, reason)
        self._say(
            f"note: {REPEATS} samples in a row were of recipes that were drawn before; the space "
            f"has hardly more than these {len(drawn)}"
        )
        return None

    def _noted(self, values: Values, reason: str) -> Trial:
        """A trial as it goes into the ledger; with a reason not to run, skipped."""
        trial = Trial(self.number, values, "skipped" if reason else "running", reason)
        self.ledger.write(trial)
        if reason:
            self._say(f"trial {trial.name} skipped: {reason}")
        return trial

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell the algorithm; the ledger was written before (`raybert.search.Scribe`)."""

    def told(self, trial: Trial) -> None:
        """A trial has ended."""
        if trial.state == "failed":
            self.failed += 1
            if self.failed == FAILS and self.broken:
                self._say(
                    f"note: {FAILS} trials have failed before any was evaluated, so that no more "
                    "are started; mend the reason, and the same command goes on (--retry-failed: "
                    "with these too)"
                )
        results = trial.results if trial.state in ("finished", "stopped") else None
        self.source.tell(trial.number, results)

    def save(self, checkpoint_path: str) -> None:
        """The ledger is what a search goes on from."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""
