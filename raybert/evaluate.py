"""Score a model on rows, exactly, whatever the number of workers: no row counted twice or
dropped."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from raybert.checkpoint import World
from raybert.data import MODEL_INPUTS, TaskData, eval_batches
from raybert.metrics import score
from raybert.surgery import model_inputs
from raybert.tasks import row_outputs


def predict(
    model: nn.Module, data: TaskData, split: str, world: World, batch_size: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Run a model over a split, shared out over the workers.

    Args:
        model: the model or its engine; put in evaluation mode, and back as it was.
        data: the prepared task.
        split: ``train``, ``dev`` or ``test``.
        world: this worker.
        batch_size: rows a forward pass.

    Returns:
        On every worker, for all rows: their index [N], and arrays [N, ...] of what the task keeps.
    """
    batcher = data.batcher(split)
    lengths = batcher.lengths
    own = eval_batches(lengths, batch_size, world.size, world.rank)
    rounds = max(
        len(eval_batches(lengths, batch_size, world.size, rank)) for rank in range(world.size)
    )
    was_training = model.training
    model.eval()
    parts: list[dict[str, np.ndarray]] = []
    for turn in range(rounds):
        # ZeRO 3 gathers weights in every forward pass, so all workers must run the same number.
        rows = own[turn] if turn < len(own) else np.array([0])
        batch = batcher(rows)
        out = forward(model, batch, world.device)
        if turn < len(own):
            parts.append({"index": batch["index"].numpy(), **row_outputs(data.task, out, batch)})
    model.train(was_training)
    gathered = [part for worker in world.gather(parts) for part in worker]
    joined = {key: np.concatenate([part[key] for part in gathered]) for key in gathered[0]}
    order = np.argsort(joined["index"], kind="stable")
    joined = {key: value[order] for key, value in joined.items()}
    return joined.pop("index"), joined


def forward(model: nn.Module, batch: dict[str, torch.Tensor], device: torch.device) -> Any:
    """One forward pass without gradients; outputs come back in float32 on the CPU."""
    if isinstance(model, PreTrainedModel):
        read = model_inputs(model, batch, MODEL_INPUTS)
    else:  # an exported graph takes what it needs
        read = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    inputs = {name: values.to(device) for name, values in read.items()}
    with torch.no_grad():
        out = model(**inputs)
    for key, value in out.items():
        if isinstance(value, torch.Tensor):
            out[key] = value.float().cpu()
    return out


def evaluate(
    model: nn.Module, data: TaskData, split: str, world: World, batch_size: int
) -> dict[str, float]:
    """A model's metrics on a split, the same on every worker."""
    index, outputs = predict(model, data, split, world, batch_size)
    return score(data.task, data, split, index, outputs)
