"""Whether a graph computes what its model does: logits on real rows, and the task's metric."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
)

from raybert.checkpoint import World
from raybert.compressed import finished
from raybert.data import TaskData
from raybert.errors import UserError
from raybert.evaluate import predict
from raybert.metrics import score
from raybert.surgery import model_inputs
from raybert.trust import first_sentence

Batch = dict[str, Tensor]

FLOAT = 1e-3
"""Largest difference of logits, as a share of their size, that rounding of float32 explains."""

INTEGER = 0.1
"""The same of int8 models, where a rounding difference moves a value by a whole step now and
then."""

TIPPED = 0.25
"""Largest share of rows in which rounding may tip a decision over, of models that decide by the
sample: by less, `MethodConfig.rounding`, their logits may then differ."""

SATURATED = (
    "On a CPU without VNNI instructions pairs of integer products saturate where weights are "
    "large: those of method.q8bert.weight_bits=7 never do. Train with that, or export and run on "
    "another machine."
)

OTHER_VERSION = "Another version of torch or onnxruntime may help."

POINTS = 0.1
"""Largest difference of a float32 model's metric, in points of 100."""


class OnnxModel(nn.Module):
    """An ONNX file that is called as its model would be.

    Args:
        file: a graph of `raybert.onnx_trace`.
        threads: CPU threads; nothing: all cores.
    """

    def __init__(self, file: Path, threads: int | None = None) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        try:
            self.session = onnxruntime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"]
            )
        # It raises a dozen types of its own.
        except Exception as error:
            raise UserError(
                f"onnxruntime {onnxruntime.__version__} does not load the exported graph: "
                f"{first_sentence(error)} A newer one may."
            ) from None
        self.names = [entry.name for entry in self.session.get_inputs()]

    def forward(self, **inputs: Tensor) -> Any:
        """The outputs for input_ids, attention_mask and, if any, token_type_ids, [B, T]; other
        inputs are left."""
        types = {"token_type_ids": torch.zeros_like(inputs["input_ids"])}
        arrays = {name: ({**types, **inputs})[name].numpy() for name in self.names}
        found = [torch.from_numpy(np.asarray(o)) for o in self.session.run(None, arrays)]
        if len(found) == 2:
            return QuestionAnsweringModelOutput(start_logits=found[0], end_logits=found[1])  # pyright: ignore[reportArgumentType]
        return SequenceClassifierOutput(logits=found[0])  # pyright: ignore[reportArgumentType]


def real_batches(data: TaskData, split: str) -> list[Batch]:
    """Rows of a split in batches of several sizes and lengths, with and without padding."""
    batcher = data.batcher(split)
    by_length = np.argsort(batcher.lengths, kind="stable")
    count = len(by_length)
    spread = by_length[np.linspace(0, count - 1, min(16, count)).astype(int)]
    chosen = [by_length[:1], by_length[-1:], by_length[-4:], spread[::5], spread]
    return [batcher(positions) for positions in chosen]


def probe_batches(probe: Batch) -> list[Batch]:
    """Stored inputs whole, row by row, and cut short."""
    inputs = {k: v for k, v in probe.items() if k != "expected"}
    rows = len(inputs["input_ids"])
    one = [{k: v[row : row + 1] for k, v in inputs.items()} for row in range(rows)]
    short = max(1, inputs["input_ids"].shape[1] // 2)
    return [inputs, *one, {k: v[:, :short] for k, v in inputs.items()}]


def token_batch(model: PreTrainedModel, batches: Iterable[Batch]) -> Batch:
    """The shortest input that there is: one row of one token."""
    first = model_inputs(model, next(iter(batches)))
    return {name: values[:1, :1] for name, values in first.items()}


def logit_parity(
    model: PreTrainedModel, exported: nn.Module, batches: list[Batch], *, integer: bool
) -> dict[str, Any]:
    """Compare logits.

    Args:
        model: in evaluation mode, on the CPU.
        exported: its graph, as `OnnxModel`.
        batches: rows, and one of a single token is added.
        integer: whether the model multiplies in integers.

    Returns:
        ``largest_difference`` over all logits of real tokens, ``scale`` (the largest logit),
        ``allowed``, how many rows are ``tipped`` beyond that, and the ``shapes`` that were
        compared.

    Raises:
        UserError: they differ by more than rounding explains.
    """
    rows: list[float] = []
    shapes, scale = [], 0.0
    for batch in [*batches, token_batch(model, batches)]:
        inputs = model_inputs(model, batch)
        with torch.inference_mode():
            wanted = model(**inputs)
        apart, largest = _apart(exported(**inputs), wanted, inputs["attention_mask"].bool())
        rows += apart.tolist()
        scale = max(scale, largest)
        shapes.append(list(inputs["input_ids"].shape))
    size = max(1.0, scale)
    rounding = max([0.0, *(method.rounding for method in finished(model.config))])
    allowed = size * (max(INTEGER, rounding) if integer else FLOAT)
    most = size * max(FLOAT, rounding)
    tipped = sum(apart > allowed for apart in rows)
    if tipped and (integer or tipped > TIPPED * len(rows) or max(rows) > most):
        raise UserError(
            f"the exported graph gives other logits than the model: they differ by "
            f"{max(rows):.2g}, at most {allowed:.2g} is rounding (logits reach {scale:.2g}). "
            "Nothing was written. " + (SATURATED if integer else OTHER_VERSION)
        )
    return {
        "largest_difference": max(rows),
        "scale": scale,
        "allowed": allowed,
        "tipped": tipped,
        "shapes": shapes,
    }


def _apart(found: Any, wanted: Any, mask: Tensor) -> tuple[Tensor, float]:
    """The largest difference of each row's logits [B], those of padding apart, and the largest
    logit; ``mask`` [B, T]."""
    rows, largest = torch.zeros(len(mask)), 0.0
    for key, value in found.items():
        each = key != "logits" or value.dim() == 3  # a number, or a vocabulary's, for a token
        real = mask.view(*mask.shape, *[1] * (value.dim() - 2)) if each else torch.tensor(True)
        reference = torch.where(real, wanted[key].float(), 0.0)
        difference = (torch.where(real, value, 0.0) - reference).abs().nan_to_num(nan=torch.inf)
        rows = torch.maximum(rows, difference.flatten(1).amax(1))
        largest = max(largest, float(reference.abs().max()))
    return rows, largest


def metric_parity(
    model: PreTrainedModel, exported: nn.Module, data: TaskData, batch_size: int, *, integer: bool
) -> dict[str, Any]:
    """Score model and graph on the dev rows.

    Returns:
        ``split``, ``rows``, ``metric`` (the main one), and the metrics by ``torch`` and ``onnx``.

    Raises:
        UserError: a float32 graph's main metric differs by more than 0.1 point.
    """
    world = World(0, 1, torch.device("cpu"))
    scores: dict[str, dict[str, float]] = {}
    rows = 0
    for name, network in (("torch", model), ("onnx", exported)):
        index, outputs = predict(network, data, "dev", world, batch_size)
        scores[name] = score(data.task, data, "dev", index, outputs)
        rows = len(index)
    main = data.task.main
    points = 100 * abs(scores["onnx"][main] - scores["torch"][main])
    if not integer and points > POINTS:
        raise UserError(
            f"the exported graph scores {100 * scores['onnx'][main]:.2f} {main} on the dev rows "
            f"and the model {100 * scores['torch'][main]:.2f}; at most {POINTS} point apart was "
            f"wanted. Nothing was written. {OTHER_VERSION}"
        )
    return {"split": "dev", "rows": rows, "metric": main, **scores}
