"""What is refused before a run begins: by its recipe, its folder, the machine and its models."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
import yaml

from raybert.config import Recipe
from raybert.engine import precision_for
from raybert.errors import UserError
from raybert.explain import short
from raybert.machine import cluster_address, own_cores, own_memory
from raybert.models import load_tokenizer, read_config
from raybert.places import HIDDEN, uri_of
from raybert.recipe_file import dump_recipe, load_recipe
from raybert.storage import entries, pull
from raybert.surgery import compressed_by
from raybert.trust import check_weights
from raybert.yaml_file import read_yaml

FREE_TO_DIFFER = ("resources", "measure", "export", "workers", "out", "name")
"""Recipe keys that a continued run may give other values."""


def check_command(recipe: Recipe, command: str) -> None:
    """Refuse a recipe that is not for this command.

    Raises:
        UserError: ``finetune`` with a method, or ``compress`` with nothing to compress with.
    """
    if command == "finetune" and recipe.method:
        raise UserError("finetune takes no method; use `raybert compress` to apply one.")
    taught = recipe.teacher and recipe.model and recipe.kd.active
    if command == "compress" and not recipe.method and not taught:
        raise UserError(
            "nothing to compress with: give method=theseus, or a smaller `model` with a `teacher` "
            "and kd.alpha above 0."
        )


def check_folder(recipe: Recipe) -> bool:
    """Whether the output folder holds this very run already, to be continued.

    Raises:
        UserError: it holds another run, or anything else.
    """
    folder = recipe.folder
    # A file that tried whether storage can be written to, or a lock, is nobody's run.
    if not [name for name in entries(folder) if not name.startswith(HIDDEN)]:
        return False
    held = folder / "recipe.yaml"
    if not pull(held):
        raise UserError(
            f"{folder} exists and is not a run folder; nothing in it is touched. Choose another "
            f"out=."
        )
    try:
        there = read_yaml(held)
    except UserError:
        raise UserError(
            f"{held} is no recipe, so {folder} is not a run folder; nothing in it is touched. "
            "Choose another out=."
        ) from None
    with suppress(UserError):  # an earlier version's lacks keys that have come since
        there = yaml.safe_load(dump_recipe(load_recipe(str(held))))
    here = yaml.safe_load(dump_recipe(recipe))
    for one in (there, here):
        for key in FREE_TO_DIFFER:
            one.pop(key, None)
        if isinstance(one.get("train"), dict):
            one["train"].pop("zero", None)  # a checkpoint knows whether it can be continued
        if isinstance(one.get("data"), dict):
            one["data"].pop("cache", None)  # where rows are kept, and not which
    differing = _differences(there, here)
    if differing:
        raise UserError(
            f"{folder} holds another run: {'; '.join(differing[:5])}. Choose another out=, or "
            "remove that run first, as --overwrite does for commands that have it."
        )
    return True


def _differences(there: Any, here: Any, path: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [*there, *(key for key in here if key not in there)]
        return [
            text
            for key in keys
            for text in _differences(there.get(key), here.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if there == here else [f"{path} is {short(there)} there and {short(here)} here"]


def check_resources(recipe: Recipe) -> None:
    """Refuse more workers than this machine has cores or GPUs, unless a cluster is named."""
    train = recipe.train
    if any(part.startswith("_ray_pkg_") for part in recipe.folder.parts):
        raise UserError(
            f"{recipe.folder} is in the copy of a working folder that Ray removes after the job; "
            "give out= a place on storage that stays, for example out=/mnt/raybert/runs/NAME."
        )
    if train.precision == "fp16" and train.zero:
        # DeepSpeed's stages clip gradients before they are unscaled, and never lower the scale.
        raise UserError(
            f"train.precision fp16 does not go with train.zero {train.zero}; use train.zero=0, or "
            "train.precision=bf16 (fp32 on GPUs without it)."
        )
    if train.zero == 3 and (recipe.method or recipe.kd.active):
        raise UserError(
            "train.zero 3 is for fine-tuning alone: methods change weights that stage 3 keeps in "
            "parts. Use train.zero 0, 1 or 2 to compress."
        )
    if train.zero == 3 and uri_of(recipe.folder) and cluster_address():
        raise UserError(
            "train.zero 3 keeps parts of a checkpoint on every machine, and object storage gets "
            f"its files from one. Use train.zero 0, 1 or 2 for out={recipe.out}, or an `out` on "
            "storage that is mounted on all machines."
        )
    chunks = recipe.workers * train.accumulation
    if train.batch_size < chunks:
        raise UserError(
            f"train.batch_size {train.batch_size} cannot be split over {recipe.workers} workers "
            f"and {train.accumulation} forward passes; use at least {chunks}."
        )
    if cluster_address():
        return
    cores = own_cores()
    needed = recipe.fewest * (recipe.resources.cpus or 1)
    if needed > cores:
        raise UserError(
            f"{recipe.fewest} workers of {recipe.resources.cpus or 1} CPUs need {needed} cores; "
            f"this machine has {cores}. Use workers={cores // (recipe.resources.cpus or 1)}, or "
            "set RAY_ADDRESS to a cluster."
        )
    gpus = torch.cuda.device_count()
    if recipe.resources.gpu and recipe.fewest > gpus:
        raise UserError(f"{recipe.fewest} workers want a GPU each; this machine has {gpus}.")
    device = torch.device("cuda" if gpus and recipe.resources.gpu is not False else "cpu")
    precision_for(train.precision, device)


def check_trainable(config: Any, source: str, recipe: Recipe) -> None:
    """Refuse to train integers."""
    if any(entry["name"] == "q8bert" for entry in compressed_by(config)):
        what = "compressed again" if recipe.method else "trained"
        raise UserError(
            f"{source} was quantised by q8bert: its weights are integers, for inference only, and "
            f"cannot be {what}. Start from the model that it was made of."
        )


def check_vocabulary(tokenizer: Any, config: Any, source: str) -> None:
    """Refuse a tokenizer with tokens that its model does not embed."""
    tokens = max(tokenizer.get_vocab().values()) + 1
    if tokens > config.vocab_size:
        raise UserError(
            f"the tokenizer of {source} has {tokens} tokens and the model embeds "
            f"{config.vocab_size}: "
            "they do not belong together. Give the tokenizer that the model was trained with."
        )


def _check_layers(recipe: Recipe, config: Any, student: Any) -> None:
    """Refuse to compare layers with what compression has made incomparable."""
    kd, made = recipe.kd, [compressed_by(one) for one in (student, config)]
    if kd.attention:
        left = [next((e.get("heads") for e in one if e["name"] == "ebert"), None) for one in made]
        if left[0] != left[1]:
            raise UserError(
                "kd.attention compares heads one by one, and ebert has removed some of "
                f"{recipe.model if left[0] else recipe.teacher}'s. Use kd.attention=0."
            )
    asked = [name for name in ("cls", "hidden", "attention") if getattr(kd, name)]
    if asked and any(entry.get("integer_only") for entry in made[1]):
        raise UserError(
            f"kd.{asked[0]} compares layers, and those of teacher {recipe.teacher} compute "
            "integers, each channel in a unit of its own. Use kd.alpha alone, or the model that it "
            "was made of as the teacher."
        )


def check_teacher(recipe: Recipe, tokenizer: Any) -> None:
    """Check the teacher beside its student, and let rows have what the teacher reads of them."""
    assert recipe.teacher is not None
    config = read_config(recipe.teacher)
    check_weights(recipe.teacher)
    if recipe.model:
        taught_by = load_tokenizer(recipe.teacher)
        # A BERT tells the parts of a pair apart, its DistilBERT student does not.
        names = [*tokenizer.model_input_names, *taught_by.model_input_names]
        tokenizer.model_input_names = list(dict.fromkeys(names))
        if taught_by.get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"teacher {recipe.teacher} and model {recipe.model} have different vocabularies "
                f"({len(taught_by.get_vocab())} and {len(tokenizer.get_vocab())} tokens), so "
                f"they cannot "
                "read the same rows. Use a student of the teacher's family, or leave `model` out "
                "to start from the teacher."
            )
        student = read_config(recipe.model)
        if (recipe.kd.cls or recipe.kd.hidden) and student.hidden_size != config.hidden_size:
            raise UserError(
                f"kd.cls and kd.hidden compare vectors of one width; the student's have "
                f"{student.hidden_size} and the teacher's {config.hidden_size}. Use kd.alpha alone."
            )
        if recipe.kd.attention and student.num_attention_heads != config.num_attention_heads:
            raise UserError(
                f"kd.attention compares heads one by one; the student has "
                f"{student.num_attention_heads} "
                f"and the teacher {config.num_attention_heads}. Use kd.alpha alone."
            )
        _check_layers(recipe, config, student)


def memory_needed(recipe: Recipe, config: Any, before: dict, after: dict) -> int:
    """Bytes a worker needs, roughly.

    Weights, gradients and Adam's two moments; the teacher's weights; activations, and with them
    eager attention's maps and the logits over a vocabulary, where there are any. Calibration comes
    before gradients and moments, and may hold more than they do.
    """
    train, length = recipe.train, recipe.data.max_length
    trained = max(before["parameters"]["total"], after["parameters"]["total"])
    beside = recipe.method or (recipe.teacher and recipe.kd.active)
    taught = 4 * before["parameters"]["total"] if beside else 0
    calibration = [method.calibration_bytes(config, length) for method in recipe.method]
    rows = -(-train.batch_size // (recipe.fewest * train.accumulation))
    a_token = config.num_hidden_layers * 22 * config.hidden_size
    if recipe.kd.attention:
        a_token += config.num_hidden_layers * 4 * config.num_attention_heads * length
    if recipe.task == "mlm":
        a_token += 3 * config.vocab_size
    training = 12 * trained + rows * length * a_token * 4
    return 4 * trained + taught + max(training, *calibration, 0)


def check_memory(memory: int, recipe: Recipe, alone: bool) -> None:
    """Refuse a run of so many bytes a worker that this machine has no room for; ``alone``: among
    what else runs on it."""
    if cluster_address():
        return
    workers, gpus = recipe.fewest, torch.cuda.device_count()
    free, total = own_memory()
    if gpus >= workers and recipe.resources.gpu is not False:
        free, total = (gpus * size for size in torch.cuda.mem_get_info())
    room, there = (free, "are free") if alone else (total, "are all there is")
    if memory * workers > room:
        calibrated = "calibration_rows or " if recipe.method else ""
        raise UserError(
            f"this run needs about {memory * workers / 2**30:.1f} GiB and {room / 2**30:.1f} GiB "
            f"{there}. Use a smaller {calibrated}train.batch_size, a larger train.accumulation, or "
            "train.zero 1 or 2 on several workers."
        )
