"""The recipe: one validated, frozen description of a run.

A recipe is YAML on disk, pydantic in memory and dotted ``key=value`` on the command line. What it
does not know it refuses, naming the nearest key. Every run folder holds the resolved recipe, and
a recipe loaded from there describes the same run again.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from raybert.errors import UserError
from raybert.explain import explain, nearest
from raybert.method import MethodConfig, Section
from raybert.places import CACHE, checked_uri, is_uri, local

KEPT_SHARE = "kept share"
"""Title of facts, ``layer N part`` -> share of the part that rows keep, of which reports make a
picture."""


def _checked_place(text: str) -> str:
    """A path, a URI of object storage, or a name that stands where one may."""
    try:
        text.encode()
        if "\0" in text:
            raise ValueError(f"{text!r} holds a character that no path has")
        if is_uri(text):
            return checked_uri(text)
        Path(text).expanduser()
    except UnicodeEncodeError:
        raise ValueError(f"{text!r} is not UTF-8 text") from None
    except RuntimeError:
        raise ValueError(f"{text!r} names the home folder of a user who is not here") from None
    return text


Place = Annotated[str, AfterValidator(_checked_place)]
"""A path or name, whose ``~`` can be followed; or a URI such as ``s3://bucket/run``."""

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class DataConfig(Section):
    """Where the rows come from and how they become tokens.

    ``data=PATH`` on the command line is short for ``data.source=PATH``.
    """

    source: Place | None = Field(
        default=None,
        description="A Hugging Face Hub data set, a GLUE or aclImdb folder, a SQuAD json folder, "
        "or a folder of files. "
        "Nothing: the task's own Hub data set, or the generated rows of the demo task.",
    )
    train: Place | None = Field(
        default=None,
        description="File (csv, tsv, jsonl, parquet, json, txt), or split, to train on.",
    )
    dev: Place | None = Field(default=None, description="File, or split, to evaluate on.")
    test: Place | None = Field(
        default=None, description="File, or split, without labels, to write predictions for."
    )
    subset: str | None = Field(default=None, description="The Hub data set's configuration name.")
    text: str | None = Field(
        default=None, description="Column of the (first) text; for QA, the question."
    )
    text_pair: str | None = Field(
        default=None, description="Column of the second text; for QA, the context."
    )
    label: str | None = Field(default=None, description="Column of the label; for QA, the answers.")
    labels: tuple[str, ...] | None = Field(
        default=None, description="Label names in id order; nothing: those found, sorted."
    )
    separator: str = Field(
        default=",",
        min_length=1,
        description="What separates several labels in one cell of a multi-label file.",
    )
    metric: str | None = Field(
        default=None, description="The metric that ranks models; nothing: the task's own."
    )
    max_length: PositiveInt = Field(default=128, description="Tokens a row at most.")
    stride: NonNegativeInt = Field(
        default=64, description="QA: tokens by which the windows over a long context overlap."
    )
    max_answer: PositiveInt = Field(default=30, description="QA: tokens an answer at most.")
    n_best: PositiveInt = Field(
        default=20, description="QA: start and end candidates weighed for each window."
    )
    mask: Share = Field(default=0.15, description="MLM: share of tokens masked.")
    limit: PositiveInt | None = Field(
        default=None, description="Use only so many training rows, drawn with a fixed seed."
    )
    cache: Place | None = Field(
        default=None,
        description="Folder of the tokenised data; nothing: $RAYBERT_CACHE or ~/.cache/raybert.",
    )

    @property
    def cache_folder(self) -> Path:
        """The folder that tokenised data is kept in, shared by all runs."""
        try:
            return local(self.cache or os.environ.get("RAYBERT_CACHE") or CACHE)
        except ValueError as error:  # a recipe's own was checked
            raise UserError(f"RAYBERT_CACHE: {error}.") from None


class TrainConfig(Section):
    """How each phase is trained. Batch sizes are global: summed over workers and accumulation."""

    epochs: NonNegativeFloat = Field(
        default=3.0, description="Passes over the training rows, in each phase."
    )
    max_steps: PositiveInt | None = Field(
        default=None, description="Optimiser steps at most, in each phase."
    )
    batch_size: PositiveInt = Field(
        default=32, description="Rows an optimiser step, over all workers."
    )
    accumulation: PositiveInt = Field(
        default=1, description="Forward passes that one optimiser step is split into."
    )
    lr: PositiveFloat = Field(default=2e-5, description="Peak learning rate.")
    rates: dict[str, float] = Field(
        default_factory=dict,
        description="Learning rates by parameter name pattern; the first match wins, 0 keeps a "
        "parameter as it is.",
    )
    weight_decay: NonNegativeFloat = Field(
        default=0.01, description="AdamW's, off biases and norms."
    )
    warmup: Share = Field(
        default=0.1, description="Share of a phase's steps in which the rate rises from 0."
    )
    schedule: Literal["linear", "constant"] = Field(
        default="linear", description="What the rate does after the warm-up."
    )
    clip: NonNegativeFloat = Field(
        default=1.0, description="Largest gradient norm; 0 does not clip."
    )
    dropout: Share | None = Field(
        default=None,
        description="Dropout while training, which the finished model keeps; nothing: "
        "the model's own.",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="auto: bf16 where the device computes it natively, else fp32."
    )
    zero: Literal[0, 1, 2, 3] = Field(default=0, description="DeepSpeed ZeRO stage.")
    eval_every: PositiveInt | Literal["epoch"] = Field(
        default="epoch", description="Steps between evaluations, or epoch."
    )
    save_every: PositiveInt | Literal["epoch"] = Field(
        default="epoch", description="Steps between checkpoints, or epoch."
    )
    eval_batch_size: PositiveInt = Field(
        default=64, description="Rows an evaluation forward pass, on each worker."
    )
    keep: Literal["best", "last"] = Field(
        default="best", description="Which weights a phase ends with."
    )
    seed: NonNegativeInt = Field(
        default=42,
        le=2**32 - 1,
        description="Of the data order, dropout, new weights and the methods' draws.",
    )


class KDConfig(Section):
    """What the student learns from its teacher beside the labels; all zero is no distillation."""

    alpha: Share = Field(
        default=0.0, description="Share of the loss that comes from the teacher's logits."
    )
    temperature: PositiveFloat = Field(default=5.0, description="Of the logits.")
    form: Literal["kl", "soft_ce"] = Field(
        default="kl", description="kl: T^2 KL, batch mean; soft_ce: cross-entropy, no T^2."
    )
    cls: NonNegativeFloat = Field(
        default=0.0, description="Weight of the [CLS] vectors of matched layers (patient KD)."
    )
    normalize: bool = Field(
        default=True, description="Compare [CLS] vectors at unit length, as PKD does."
    )
    hidden: NonNegativeFloat = Field(
        default=0.0, description="Weight of the hidden states of matched layers."
    )
    attention: NonNegativeFloat = Field(
        default=0.0, description="Weight of the attention of matched layers."
    )
    embeddings: bool = Field(
        default=False, description="Hidden states: compare what enters the first layer too."
    )
    over_layers: Literal["mean", "sum"] = Field(
        default="mean", description="What becomes of matched layers' hidden and attention terms."
    )
    layer_map: tuple[PositiveInt, ...] | None = Field(
        default=None,
        description="For each student layer the teacher layer (from 1) it is matched with; "
        "nothing: evenly spaced.",
    )
    predictions: Place = Field(
        default="auto",
        description="live: the teacher runs beside the student; saved: its logits and [CLS] states "
        "are computed once and kept in data.cache; FOLDER: those that `raybert predict-teacher "
        "--out FOLDER` wrote; auto: saved where alpha and cls are all that is asked for and every "
        "row is seen at least once, else live.",
    )

    @property
    def predictions_folder(self) -> Path | None:
        """The folder of saved predictions that is named, if one is."""
        if self.predictions in ("auto", "live", "saved"):
            return None
        return local(self.predictions)

    @property
    def active(self) -> bool:
        """Whether any term asks for a teacher."""
        return bool(self.alpha or self.cls or self.hidden or self.attention)


class ResourcesConfig(Section):
    """What each worker gets."""

    cpus: PositiveInt | None = Field(
        default=None, description="CPU cores a worker; nothing: the machine's, shared out."
    )
    gpu: bool | None = Field(
        default=None, description="One GPU a worker; nothing: when there are enough."
    )
    min_workers: PositiveInt | None = Field(
        default=None,
        description="Workers that are enough to begin, or to go on, while the others' machines are "
        "missing; nothing: all of them. `workers=1-4` is short for 4 and 1 here.",
    )
    resize_every: PositiveFloat = Field(
        default=1.0,
        description="Minutes between looks at whether more of a range of workers can run. All "
        "begin again at the last checkpoint then, so it also is the least time between two such "
        "restarts.",
    )
    max_failures: NonNegativeInt = Field(
        default=3, description="How often dead workers are replaced before giving up."
    )
    timeout: PositiveFloat = Field(
        default=10.0,
        description="Minutes that workers wait for one that hangs before all are restarted.",
    )
    wait: NonNegativeFloat = Field(
        default=0.0,
        description="Minutes to wait for machines that a cluster starts on demand; 0: those that "
        "are there must do.",
    )


MEASURED = 128
"""Tokens of the rows that models are measured on."""


class MeasureConfig(Section):
    """What the finished model is timed at, beside its teacher."""

    batches: tuple[PositiveInt, ...] = Field(
        default=(1, 8), description="Batch sizes; none: latency is not measured."
    )
    length: PositiveInt = Field(
        default=MEASURED,
        description="Tokens a row; FLOPs are stated at it too. Where data.max_length is less, that "
        "is the default, so that all methods are measured alike.",
    )
    seconds: PositiveFloat = Field(
        default=2.0, description="Timed seconds for each batch size and model."
    )


Workers = Annotated[
    PositiveInt,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "exclusiveMinimum": 0},
                {"type": "string", "pattern": r"^[1-9]\d*-[1-9]\d*$"},
            ]
        }
    ),
]
"""How many; a range such as ``1-4`` is taken apart before it is looked at."""


class Recipe(Section):
    """One run. ``method`` empty: fine-tune ``model``; otherwise compress ``teacher``."""

    model: Place | None = Field(
        default=None, description="Hub name or folder of the encoder to start from."
    )
    task: str = Field(default="demo", description="A task's name; see `raybert tasks`.")
    data: DataConfig = DataConfig()
    teacher: Place | None = Field(
        default=None, description="Run or model folder; nothing: fine-tuned first from `model`."
    )
    method: tuple[SerializeAsAny[MethodConfig], ...] = Field(
        default=(), description="The chain of compression methods."
    )
    finetune: TrainConfig = Field(
        default=TrainConfig(),
        description="How the teacher is fine-tuned when `teacher` is not given.",
    )
    train: TrainConfig = TrainConfig()
    kd: KDConfig = KDConfig()
    measure: MeasureConfig = MeasureConfig()
    export: Literal["onnx"] | None = Field(
        default=None, description="onnx: also write the finished model for plain ONNX Runtime."
    )
    workers: Workers = Field(
        default=1,
        description="Processes that train side by side; 1-4: as many of them as there are "
        "machines for, at any time.",
    )
    resources: ResourcesConfig = ResourcesConfig()
    name: str | None = Field(
        default=None, description="The run's name; nothing: from the task and the methods."
    )
    out: Place | None = Field(default=None, description="The run folder; nothing: runs/<name>.")

    @field_validator("data", mode="before")
    @classmethod
    def _data_shorthand(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @field_validator("method", mode="before")
    @classmethod
    def _methods(cls, value: Any) -> Any:
        return tuple(_method(entry) for entry in as_list(value))

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError(
                "is not a plain folder name; use letters, digits, dot, dash and underscore"
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _take_range_apart(cls, data: Any) -> Any:
        """``workers: 1-4`` is 4 of which 1 is enough."""
        if not (isinstance(data, dict) and isinstance(data.get("workers"), str)):
            return data
        ends = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", data["workers"])
        if ends is None:
            return data
        resources = data.get("resources") or {}
        if isinstance(resources, ResourcesConfig):
            resources = resources.model_dump()
        if not isinstance(resources, dict):
            return data
        fewest = {"min_workers": int(ends[1])}
        return {**data, "workers": int(ends[2]), "resources": {**resources, **fewest}}

    @model_validator(mode="before")
    @classmethod
    def _measure_no_longer_rows_than_are_read(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        rows, measure = data.get("data"), data.get("measure") or {}
        longest = rows.get("max_length") if isinstance(rows, dict) else None
        if not isinstance(measure, dict) or "length" in measure:
            return data
        if not isinstance(longest, int) or not 0 < longest < MEASURED:
            return data
        return {**data, "measure": {**measure, "length": longest}}

    @model_validator(mode="after")
    def _range_is_one(self) -> Recipe:
        if self.fewest > self.workers:
            raise ValueError(
                f"workers={self.workers} are fewer than resources.min_workers="
                f"{self.resources.min_workers}; a range is written workers=1-4"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _fill_name_and_out(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        filled = dict(data)
        if not filled.get("name"):
            if filled.get("out"):
                stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(str(filled["out"])).name).lstrip(".-_")
                filled["name"] = stem or "run"
            else:
                methods = [
                    m.name for m in (_method(entry) for entry in as_list(filled.get("method")))
                ]
                filled["name"] = "-".join(
                    [str(filled.get("task", "demo")), *(methods or ["finetuned"])]
                )
        filled["out"] = str(filled.get("out") or Path("runs") / str(filled["name"]))
        return filled

    @property
    def fewest(self) -> int:
        """Workers that are enough to train."""
        return self.resources.min_workers or self.workers

    @property
    def folder(self) -> Path:
        """The run folder as an absolute path, in object storage its mirror's."""
        return local(self.out or "")


def as_list(value: Any) -> list[Any]:
    """The entries of a recipe's ``method``, however it was written."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, (dict, MethodConfig)):
        return [value]
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"method {value!r} is not a name, names with commas, or mappings")
    return list(value)


def _method(entry: Any) -> MethodConfig:
    """A method from its name, a ``{name: ..., parameter: ...}`` mapping, or ``{theseus:
    {...}}``."""
    # The registry imports torch; the recipe's own module must not, so that the command line
    # answers at once.
    from raybert.methods import METHODS

    if isinstance(entry, MethodConfig):
        return entry
    if not isinstance(entry, (str, dict)):
        raise ValueError(
            f"method {entry!r} is not a name or a mapping; known: {', '.join(METHODS)}"
        )
    data = {"name": entry} if isinstance(entry, str) else dict(entry)
    if "name" not in data and len(data) == 1:
        name, parameters = next(iter(data.items()))
        if not isinstance(parameters, (dict, type(None))):
            raise ValueError(
                f"method parameters are written method.NAME.{name}={parameters}, and NAME is one "
                f"of "
                f"{', '.join(METHODS)}"
            )
        data = {"name": name, **(parameters or {})}
    name = data.get("name")
    if not isinstance(name, str) or name not in METHODS:
        hint = nearest(str(name), METHODS)
        raise ValueError(f"unknown method {name!r}{hint}; known: {', '.join(METHODS)}")
    try:
        return METHODS[name].model_validate(data)
    except ValidationError as error:
        raise ValueError(explain(error, METHODS[name], prefix=f"method {name}: ")) from None
