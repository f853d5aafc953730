"""What every compression method is: its parameters in a recipe, and the phases they stand for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat

ROUNDING = 1e-3
"""How far float32 rounding may move a plain model's outputs, relative to the largest of them."""


class Section(BaseModel):
    """A part of a recipe: frozen, and unknown keys are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


class MethodConfig(Section):
    """One compression method's parameters; the base class of every entry of
    ``raybert.methods.METHODS``."""

    leaves_trace: ClassVar[bool] = False
    """Whether the finished structure is one that only raybert's classes can build."""

    simulated: ClassVar[bool] = False
    """Whether what comes out only computes like the compressed model, at the full model's cost."""

    name: str
    epochs: NonNegativeFloat | None = Field(
        default=None,
        description="Epochs of each of the method's phases; nothing: `train.epochs`; 0: it is "
        "applied without training.",
    )
    lr: PositiveFloat | None = Field(
        default=None, description="Their peak learning rate; nothing: `train.lr`."
    )

    def bind(self, recipe: Any) -> MethodConfig:
        """Take what is left open, and what must agree, from the rest of the recipe; comes first.

        Raises:
            UserError: the recipe asks for what the method cannot do.
        """
        return self

    def resolve(self, model_config: Any) -> MethodConfig:
        """Settle every ``None``, ratio or share against the model's Hugging Face config; refuse
        what does not fit.

        Args:
            model_config: the Hugging Face config of the model that the method starts from.

        Returns:
            The same method with plain numbers everywhere; this is what is saved with the model.

        Raises:
            UserError: the method cannot be applied to this model.
        """
        raise NotImplementedError

    def settle(self, model: Any, batches: list[dict[str, Any]]) -> MethodConfig:
        """Settle what depends on weights, where each of the method's phases begins; see
        `Phase.initialise`.

        Args:
            model: as the phase finds it, in evaluation mode.
            batches: the phase's calibration rows.

        Returns:
            The method as it goes on, and as it is saved with the model.
        """
        return self

    def advice(self, recipe: Any, model_config: Any) -> list[str]:
        """What the user should know before training, of settings that work against the method."""
        return []

    def calibration_bytes(self, model_config: Any, length: int) -> int:
        """What calibration holds beside the weights, of rows of ``length`` tokens, where it is more
        than a batch's."""
        return 0

    def check_model(self, make: Callable[[], Any]) -> None:
        """Refuse settings that name parts which the model has not.

        Args:
            make: makes the model that the method will get, without values.
        """

    def remarks(self) -> list[str]:
        """What the reports should note of the finished model."""
        return []

    def graph_remarks(self, model: Any) -> list[str]:
        """What should be noted of the finished model as an ONNX graph."""
        return []

    def phases(self) -> list[Any]:
        """The phases that carry the method out, in order (``raybert.phase.Phase``)."""
        raise NotImplementedError

    @property
    def longest(self) -> int | None:
        """Tokens that a row of the finished model has at most; nothing: as many as before."""
        return None

    @property
    def rounding(self) -> float:
        """How far float32 rounding may move the finished model's outputs, relative to the largest
        of them."""
        return ROUNDING

    def student_config(self, model_config: Any) -> Any:
        """The Hugging Face config that the finished model will have, from the one that the method
        starts from: one that leaves a trace is listed in its ``compression``."""
        config = copy.deepcopy(model_config)
        if self.leaves_trace:
            done = vars(config).get("compression") or []
            config.compression = [*done, self.model_dump(mode="json")]
        return config
