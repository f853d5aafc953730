"""Ray Tune's callbacks for MLflow and Weights & Biases, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from raybert.errors import UserError

LOGGERS = ("mlflow", "wandb")
"""Loggers by name, which is that of the package and of the extra that each needs."""

WANDB = "wandb"
"""The folder that Weights & Biases makes of its own files, in the search folder."""

UPLOAD = 120
"""Seconds that the end of a search waits for Weights & Biases to upload what it was told."""


class _EndsRuns:
    """Put before one of Ray's loggers: ends also the runs of trials that a search stops with. Ray
    tells no logger of these, and waits half an hour for Weights & Biases to end them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.begun: set[Any] = set()

    def log_trial_start(self, trial: Any) -> None:
        super().log_trial_start(trial)  # pyright: ignore[reportAttributeAccessIssue]
        self.begun.add(trial)

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        self.begun.discard(trial)
        super().log_trial_end(trial, failed)  # pyright: ignore[reportAttributeAccessIssue]

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        for trial in list(self.begun):
            self.log_trial_end(trial, failed=True)
        super().on_experiment_end(trials, **info)  # pyright: ignore[reportAttributeAccessIssue]


def make_loggers(names: Sequence[str], folder: Path, changing: bool = False) -> list[Any]:
    """Tune's callbacks.

    Args:
        names: some of `LOGGERS`.
        folder: the search folder, whose name the experiment or project gets.
        changing: whether trials change their parameters on the way, as a population's do.

    Raises:
        UserError: a package is not installed, or Weights & Biases does not know who logs.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f'{name} is not installed: pip install "raybert[{name}]", or leave --log {name} '
                "out."
            )
    found: list[Any] = []
    if "mlflow" in names:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        class MLflow(_EndsRuns, MLflowLoggerCallback): ...

        # Where: MLFLOW_TRACKING_URI, as MLflow itself has it. It refuses a second value of a
        # parameter, which would end the search: of those that change, the last ones are logged.
        found.append(MLflow(experiment_name=folder.name, log_params_on_trial_end=changing))
    if "wandb" in names:
        from ray.air.integrations.wandb import WandbLoggerCallback

        class Wandb(_EndsRuns, WandbLoggerCallback): ...

        # Its own choice would be a folder of Ray's, which is gone after the search.
        callback = Wandb(project=folder.name, upload_timeout=UPLOAD, dir=str(folder))
        try:
            callback.setup()  # as Tune does when trials start: it looks for the key
        except ValueError:
            raise UserError(
                "nobody is logged in to Weights & Biases: run `wandb login`, or set WANDB_API_KEY; "
                f"WANDB_MODE=offline keeps the logs in {folder / WANDB}. Or leave --log wandb out."
            ) from None
        found.append(callback)
    return found
