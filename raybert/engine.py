"""The DeepSpeed engine: how it is made, and how full weights are read from it. Sole importer of
deepspeed."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import random
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d

from raybert.config import Recipe
from raybert.errors import UserError
from raybert.workers import workers

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, by their names in its state."""


def precision_for(precision: str, device: torch.device) -> str:
    """Settle ``auto``: bf16 where the device computes it natively, else fp32.

    Raises:
        UserError: fp16 on a CPU, which has no such arithmetic.
    """
    if precision == "fp16" and device.type == "cpu":
        raise UserError("train.precision fp16 needs a GPU; use auto, fp32 or bf16 on a CPU.")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which forward passes run; weights stay in float32."""
    dtype = {"fp32": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def seed_everything(seed: int, rank: int) -> None:
    """Seed every generator that a model or library may draw from; each worker its own."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed * 1009 + rank)


def make_engine(
    model: nn.Module, groups: list[dict[str, Any]], recipe: Recipe, precision: str
) -> Any:
    """A DeepSpeed engine around a model, with AdamW over the given parameter groups.

    Args:
        model: on its device already, float32.
        groups: optimiser groups with ``params``, ``lr``, ``peak_lr`` and ``weight_decay``.
        recipe: gives ZeRO stage, accumulation and clipping.
        precision: ``fp32``, ``bf16`` or ``fp16``.
    """
    deepspeed = import_deepspeed()
    # torch's own AdamW, fused: it needs no compiler, and took 0.84 of the default one's step.
    optimizer = torch.optim.AdamW(groups, fused=True)
    train = recipe.train
    size = workers()
    chunk = max(1, train.batch_size // (train.accumulation * size))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": chunk,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.clip,
        "zero_optimization": {"stage": train.zero},
        "steps_per_print": None,
    }
    if precision != "fp32":
        config["torch_autocast"] = {
            "enabled": True,
            "dtype": {"bf16": "bfloat16", "fp16": "float16"}[precision],
        }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if size == 1 and not train.zero:
        # Nobody to average with: flattening and copying all gradients took a seventh of a step.
        engine.enable_backward_allreduce = False
    return engine


def fill_gradients(model: nn.Module) -> None:
    """Give trained parameters that a step did not reach a gradient of zero.

    So does averaging over workers; without it one worker's optimiser would pass such parameters by
    where several workers' would let their moments decay.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def import_deepspeed() -> Any:
    """DeepSpeed, quiet, and without compiling anything on a CPU.

    Imported late: it decides on an accelerator, and parses the environment, when it is imported.
    """
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def init_distributed(device: torch.device, timeout: float) -> None:
    """Set torch.distributed up for DeepSpeed, from the environment's RANK, WORLD_SIZE and so on.

    Once a process: DeepSpeed holds on to the groups that it finds first.

    Args:
        device: that this process computes on.
        timeout: minutes after which a worker that waits for another one fails.
    """
    deepspeed = import_deepspeed()
    # DeepSpeed trains in groups of its own, which it makes with torch's defaults.
    waits = timedelta(minutes=timeout)
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = waits
    if device.type == "cpu":
        # Said outright, because on a machine with GPUs DeepSpeed would move the model to one.
        from deepspeed.accelerator import set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        set_accelerator(CPU_Accelerator())
        # An extension for inference only, whose compilation takes a minute and a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=waits)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """The variables that torch.distributed and DeepSpeed ask for, for a group of one process.

    The group, once there, is left when the interpreter exits: its threads were seen to abort one.
    """
    atexit.unregister(_leave)
    atexit.register(_leave)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    values = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def set_rate(engine: Any, share: float) -> None:
    """Give every parameter group its peak learning rate times ``share``."""
    for group in engine.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share


def whole_state(engine: Any) -> dict[str, Any]:
    """AdamW's state as a plain optimiser's ``state_dict``, whatever workers and ZeRO stage (to 2)
    keep parts of it; all workers call this.

    Parameters are numbered as `make_engine` was given them, group after group.
    """
    if not engine.zero_optimization_stage():
        return engine.optimizer.state_dict()
    utils, zero = import_deepspeed().utils, engine.optimizer
    state: dict[int, dict[str, torch.Tensor]] = {}
    groups, first = [], 0
    for group, part, params in _zero_groups(zero):
        numbers = list(range(first, first + len(params)))
        first += len(params)
        groups.append({**{k: v for k, v in group.items() if k != "params"}, "params": numbers})
        if part not in zero.optimizer.state:  # no step was made yet
            continue
        # DeepSpeed itself does so after the first group's first step, when others have none yet.
        utils.lazy_init_hp_params_optimizer_state(params, part, zero.optimizer.state)
        for number, param in zip(numbers, params, strict=True):
            moments = {key: utils.safe_get_full_optimizer_state(param, key) for key in MOMENTS}
            # A count of its own each: one tensor for all would be loaded as one, and count for all.
            state[number] = {"step": zero.optimizer.state[part]["step"].clone(), **moments}
    return {"state": state, "param_groups": groups}


def load_whole_state(engine: Any, whole: dict[str, Any]) -> None:
    """Give each worker its part of what `whole_state` returned, and of the model's weights, which
    are there already."""
    if not engine.zero_optimization_stage():
        engine.optimizer.load_state_dict(whole)
        return
    utils, zero = import_deepspeed().utils, engine.optimizer
    for (group, part, params), saved in zip(_zero_groups(zero), whole["param_groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})
        states = [whole["state"].get(number) for number in saved["params"]]
        there = [(p, s) for p, s in zip(params, states, strict=True) if s]
        if there:
            # One count for the part; parameters that no step reached have none of their own.
            steps = max(state["step"] for _, state in there).to(part.device, copy=True)
            zeros = {key: torch.zeros_like(part) for key in MOMENTS}
            zero.optimizer.state[part] = {"step": steps, **zeros}
            utils.lazy_init_hp_params_optimizer_state(params, part, zero.optimizer.state)
        for param, state in there:
            for key in MOMENTS:
                utils.safe_set_full_optimizer_state(param, state[key].to(param.device), key)
    zero.refresh_fp32_params()


def _zero_groups(zero: Any) -> Iterator[tuple[dict[str, Any], torch.Tensor, list[nn.Parameter]]]:
    """Of ZeRO 1 and 2: each optimiser group, this worker's part of it, and its parameters."""
    parts, params = zero.single_partition_of_fp32_groups, zero.bit16_groups
    return zip(zero.optimizer.param_groups, parts, params, strict=True)


def scaler_of(engine: Any) -> Any:
    """The loss scaler of fp16; ``None`` with other numbers."""
    if engine.zero_optimization_stage():
        return engine.optimizer.torch_autocast_gradscaler
    return engine.torch_autocast_z0_gradscaler


@contextlib.contextmanager
def gathered(model: nn.Module, stage: int, *, writes: bool = False) -> Iterator[None]:
    """Full weights inside the context, also where ZeRO 3 keeps them in parts; all workers enter."""
    if stage < 3:
        yield
        return
    zero = import_deepspeed().zero
    with zero.GatheredParameters(list(model.parameters()), modifier_rank=0 if writes else None):
        yield
