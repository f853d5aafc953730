"""The MA-BERT authors' checkpoints as model folders: a start like what a run on text leaves.

    raybert import-ma-bert ma_bert_mlm_ckpt.pt --model bert-base-uncased --out ma-bert

Their files are PyTorch state dicts of a masked-language model (MA-BERT, with one softmax net a
layer or one for all, and MA-DistilBERT). They are read without running any code in them. The model
that they were made of gives sizes and tokenizer. What comes out differs from the authors' code in
one thing: the attention that their nets gave to padding is left out.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raybert.compressed import longest_input, mark_compressed
from raybert.errors import UserError
from raybert.folders import whole
from raybert.methods.ma_bert import MABERT
from raybert.models import FAMILIES, HEADS, load_tokenizer, read_config, write_probe
from raybert.surgery import compressed_by, family

STACK = "softmax.linear_relu_stack."
"""What the authors call a softmax net, with 0 for its first linear layer and 2 for its second."""

LEFT_OUT = ("embeddings.position_ids", "accumulated_var")
"""Ends of names that hold nothing learned."""

ALPHA = 0.9
"""The weight of the past in the authors' running statistics."""


def import_ma_bert(file: str | Path, model: str, out: str | Path) -> Path:
    """Make a model folder of an authors' checkpoint.

    Args:
        file: the state dict, as `torch.save` wrote it.
        model: hub name or folder of the BERT or DistilBERT that it was made of.
        out: the folder to write; must not exist.

    Returns:
        The folder: `model=FOLDER` of a recipe, or `raybert.load`, reads it.

    Raises:
        UserError: the file is no state dict, or not of such a model; unexpected, missing and
            misshapen names are listed.
    """
    target = Path(out).expanduser()
    if target.exists():
        raise UserError(f"{target} exists; nothing in it is touched. Choose another --out.")
    config = read_config(model)
    if family(config) not in ("bert", "distilbert") or compressed_by(config):
        raise UserError(
            f"{model} is a {config.model_type!r} model; the authors' checkpoints were made of "
            "bert-base-uncased and distilbert-base-uncased. Name that one with --model."
        )
    tokenizer = load_tokenizer(model)
    state = read_state(file)
    network = _network(config, *structure_of(state, file))
    fill(network, renamed(state, family(config)), file)
    _write(network.eval(), tokenizer, target)
    return target


def read_state(file: str | Path) -> dict[str, Tensor]:
    """A state dict, without running anything in the file.

    Raises:
        UserError: there is no such file, or it holds anything but named tensors.
    """
    try:
        state = torch.load(Path(file).expanduser(), map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        text = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise UserError(
            f"{file} cannot be read as a PyTorch state dict: {text}. Give the authors' checkpoint "
            "as it was downloaded."
        ) from None
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{file} is no state dict: it must hold nothing but tensors by name.")
    return dict(state)


def structure_of(state: Mapping[str, Tensor], file: str | Path) -> tuple[int, bool]:
    """N, and whether one softmax net serves all layers.

    Raises:
        UserError: there are no softmax nets, or they are not N x N.
    """
    first = [name for name in state if name.endswith(f"{STACK}0.weight")]
    if not first:
        raise UserError(
            f"{file} holds no softmax nets (...{STACK}0.weight): it is not an MA-BERT checkpoint."
        )
    shapes = {name: list(state[name].shape) for name in first}
    length = max((size for shape in shapes.values() for size in shape), default=0)
    odd = [f"{name} {s}" for name, s in shapes.items() if s != [length, length] or not length]
    if odd:
        raise UserError(
            f"{file} has softmax nets of other shapes than [{length}, {length}]: {', '.join(odd)}; "
            "raybert knows those with as many hidden units as keys, all of one size."
        )
    return length, any(".layer." not in name for name in first)


def renamed(state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The authors' names and shapes as raybert's.

    Args:
        state: the checkpoint.
        kind: ``bert`` or ``distilbert``.
    """
    inner = FAMILIES[kind]
    holder = f"{inner}.{'transformer' if kind == 'distilbert' else 'encoder'}."
    shared = any(name.startswith(f"{inner}.{STACK}") for name in state)
    found = {}
    for name, value in state.items():
        copy_of_shared = shared and STACK in name and ".layer." in name
        if copy_of_shared or name.endswith(LEFT_OUT):
            continue
        new = name.replace(f"{inner}.{STACK}", f"{holder}{STACK}", 1)
        for number, layer in (("0", "hidden"), ("2", "out")):
            new = new.replace(f"{STACK}{number}.", f"softmax_net.{layer}.")
        if new.endswith(".ema_gz"):  # theirs is a sum; the paper's nu is (1 - alpha) of it
            new, value = new.removesuffix("ema_gz") + "nu", (1 - ALPHA) * value.flatten()
        elif new.endswith(".running_phi"):
            value = value.flatten()
        elif new.endswith(".iters"):
            new = new.removesuffix("iters") + "updates"
            value = value.reshape(()) if value.numel() == 1 else value  # else it is refused
        found[new] = value
    return found


def _network(config: Any, length: int, shared: bool) -> Any:
    """The masked-language model that the checkpoint is of."""
    if length > longest_input(config):
        raise UserError(
            f"the checkpoint's softmax nets read {length} tokens and the model only "
            f"{longest_input(config)}: they do not belong together."
        )
    network = HEADS["mlm"].from_config(config)
    method = MABERT(length=length, shared=shared, bounded=False).resolve(config)
    for phase in method.phases():
        phase.prepare(network)
        phase.finish(network)
    mark_compressed(network, method)
    return network


def fill(network: Any, state: dict[str, Tensor], file: str | Path) -> None:
    """Copy a state dict into a model; every name and shape must agree.

    Raises:
        UserError: they do not; all that differ are listed.
    """
    own = network.state_dict()
    tied = set(network.all_tied_weights_keys)
    faults = {
        "missing": sorted(own.keys() - state.keys() - tied),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [
            f"{name} {list(state[name].shape)}, not {list(own[name].shape)}"
            for name in sorted(own.keys() & state.keys())
            if state[name].shape != own[name].shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{what}: {', '.join(names)}" for what, names in faults.items() if names)
        raise UserError(
            f"{file} is not of this model. {listed}. Name the model that it was made of with "
            "--model."
        )
    network.load_state_dict(state, strict=False)
    network.tie_weights()


def _write(network: Any, tokenizer: Any, target: Path) -> None:
    with whole(target) as partial:
        network.save_pretrained(partial)
        longest = longest_input(network.config)
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
        tokenizer.save_pretrained(partial)
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(network.config.vocab_size, (2, 16), generator=draw)
        write_probe(network, partial, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
