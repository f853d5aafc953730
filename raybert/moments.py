"""Second moments of what linear layers see, from a calibration pass over real tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from raybert.surgery import backbone, model_inputs

Key = TypeVar("Key")


def second_moments(
    model: nn.Module, layers: Mapping[Key, nn.Linear], batches: Sequence[Mapping[str, Any]]
) -> dict[Key, Tensor]:
    """The moment that `raybert.factorise.low_rank` takes for each layer's weight.

    Padding is left out: its vectors mean nothing and would count as much as words.

    Args:
        model: in evaluation mode; it is left as it was.
        layers: linear layers of its encoder.
        batches: rows on the model's device, with ``attention_mask``.

    Returns:
        Means over real tokens, float64: of x x^T [in, in] over inputs x, or, where out < in, of
        y y^T [out, out] over outputs y = W x without bias.

    Raises:
        ValueError: there are no rows.
    """
    moments: dict[Key, Tensor] = {}
    real = torch.empty(0)
    count = 0

    def hook(key: Key):
        def add(layer: nn.Linear, args: Any, output: Tensor) -> None:
            if layer.out_features < layer.in_features:
                seen = output if layer.bias is None else output - layer.bias
            else:
                seen = args[0]
            seen = seen[real].double()  # [real tokens, in or out]
            moments[key] = moments.get(key, 0.0) + seen.T @ seen

        return add

    handles = [layer.register_forward_hook(hook(key)) for key, layer in layers.items()]
    try:
        for batch in batches:
            real = batch["attention_mask"].bool()  # [B, T]
            count += int(real.sum())
            with torch.no_grad():
                backbone(model)(**model_inputs(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise ValueError("no calibration rows")
    return {key: moment / count for key, moment in moments.items()}
