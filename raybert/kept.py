"""What a model's gates decide on rows, and what those rows then cost by torch's own count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from raybert.surgery import attending, layer_holder, model_inputs


def kept_units(
    model: nn.Module, gates: list[Any], batches: list[dict[str, Tensor]]
) -> list[Tensor]:
    """Each gate's decisions on rows.

    Args:
        model: in evaluation mode.
        gates: modules whose output is [B, N], 0 or 1.
        batches: of rows.

    Returns:
        For each gate [rows, N], bool.
    """
    found: list[list[Tensor]] = [[] for _ in gates]
    handles = [
        gate.register_forward_hook(lambda _m, _a, keep, into=into: into.append(keep))
        for gate, into in zip(gates, found, strict=True)
    ]
    with torch.no_grad():
        for batch in batches:
            model(**model_inputs(model, batch))
    for handle in handles:
        handle.remove()
    return [torch.cat(parts) for parts in found]


def spread_rows(
    model: nn.Module, batches: list[dict[str, Tensor]], count: int
) -> list[tuple[int, dict[str, Tensor]]]:
    """At most so many rows, evenly spread, as the model reads them: each alone and without padding,
    with its place."""
    total = sum(len(batch["attention_mask"]) for batch in batches)
    count = min(count, total)
    wanted = {round(i * (total - 1) / max(1, count - 1)) for i in range(count)}
    found, place = [], 0
    for batch in batches:
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            if place in wanted:
                read = model_inputs(model, batch)
                found.append((place, {k: v[row : row + 1, :length] for k, v in read.items()}))
            place += 1
    return found


def layer_flops(model: Any, batch: dict[str, Tensor]) -> int:
    """Floating-point operations of the encoder's layers on one batch, as torch counts them.

    A multiply-add counts as 2; element-wise work is not counted. Whatever attention the model was
    trained with, counted is SDPA, which a finished model is loaded with: eager attention computes
    all heads, to be read.
    """
    holder = layer_holder(model)
    name = next(name for name, module in model.named_modules() if module is holder)
    counter = FlopCounterMode(display=False)
    # The counter does not know the CPU's fused attention.
    with attending(model, "sdpa"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(**model_inputs(model, batch))
    return sum(counter.get_flop_counts()[f"{type(model).__name__}.{name}"].values())
