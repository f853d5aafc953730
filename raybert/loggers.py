"""Ray Tune's callbacks for MLflow and Weights & Biases, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from raybert.errors import UserError

LOGGERS = ("mlflow", "wandb")
"""Loggers by name, which is that of the package and of the extra that each needs."""


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

        # Where: MLFLOW_TRACKING_URI, as MLflow itself has it. It refuses a second value of a
        # parameter, which would end the search: of those that change, the last ones are logged.
        found.append(
            MLflowLoggerCallback(experiment_name=folder.name, log_params_on_trial_end=changing)
        )
    if "wandb" in names:
        from ray.air.integrations.wandb import WandbLoggerCallback

        callback = WandbLoggerCallback(project=folder.name)
        try:
            callback.setup()  # as Tune does when trials start: it looks for the key
        except ValueError:
            raise UserError(
                "nobody is logged in to Weights & Biases: run `wandb login`, or set WANDB_API_KEY; "
                "WANDB_MODE=offline keeps the logs here. Or leave --log wandb out."
            ) from None
        found.append(callback)
    return found
