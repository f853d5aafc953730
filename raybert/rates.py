"""Which learning rate and weight decay each parameter has, and the rate's way over the steps."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from typing import Any

from torch import nn

from raybert.config import TrainConfig
from raybert.errors import UserError
from raybert.gates import Gate
from raybert.phase import Phase
from raybert.power_norm import AffineNorm


def parameter_groups(model: nn.Module, phase: Phase, train: TrainConfig) -> list[dict[str, Any]]:
    """Optimiser groups by peak learning rate and weight decay.

    A parameter has the rate of the first pattern that its name fits, of ``train.rates`` and then
    the phase's. Rate 0 takes it out of training; frozen gates are out of it.

    Args:
        model: as the phase trains it; its parameters are told whether they need gradients.
        phase: whose rates, if it has any.
        train: the recipe's section.

    Raises:
        UserError: nothing is left to train.
    """
    base = phase.lr or train.lr
    patterns = [*train.rates.items(), *phase.rates.items()]
    norms = set(_norm_parameters(model))
    gates = [module for module in model.modules() if isinstance(module, Gate)]
    frozen = {id(p) for gate in gates if gate.frozen for p in gate.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in frozen:
            continue
        rate = next((r for p, r in patterns if fnmatch.fnmatchcase(name, p)), None)
        rate = base if rate is None else rate
        parameter.requires_grad_(rate > 0)
        if rate > 0:
            plain = name in norms or name.endswith("bias")
            decay = 0.0 if plain else train.weight_decay
            groups.setdefault((rate, decay), []).append(parameter)
    if not groups:
        raise UserError(f"train.rates leaves phase {phase.name} nothing to train.")
    return [
        {"params": params, "lr": rate, "peak_lr": rate, "weight_decay": decay}
        for (rate, decay), params in groups.items()
    ]


def _norm_parameters(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm1d, AffineNorm)):
            for key, _ in module.named_parameters(recurse=False):
                yield f"{name}.{key}" if name else key


def unmatched(model: nn.Module, train: TrainConfig) -> Iterator[tuple[str, str]]:
    """Patterns of ``train.rates`` that no parameter fits, each with a name that there is.

    Not an error: a name of one phase need not be one of the next.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in train.rates:
        if not fnmatch.filter(names, pattern):
            yield pattern, names[len(names) // 2]


def rate_share(train: TrainConfig, step: int, total: int) -> float:
    """The share of the peak learning rate at a step: linear warm-up, then the schedule.

    Args:
        train: the recipe's section.
        step: from 0.
        total: the phase's steps.
    """
    warmup = round(train.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    if train.schedule == "constant":
        return 1.0
    return max(0.0, (total - step) / max(1, total - warmup))
