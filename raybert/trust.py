"""What a model folder may say: checked before anything is built of it, since it may be anybody's.

Nothing here, and nothing that raybert calls, runs code that a folder brings: no pickle is read, no
custom class (``auto_map``) and no kernel is fetched, and shards lie in the folder itself.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.activations import ACT2FN

from raybert.compressed import finished
from raybert.errors import UserError
from raybert.surgery import family, sizes

SHARD = re.compile(r"model[\w.-]*\.safetensors")
"""A weights file's name: nothing that leads out of its folder."""

MOST = {"layers": 1000}
"""Numbers above which a structure would take for ever to be built; 2^24 for all others."""


def first_sentence(error: BaseException) -> str:
    """The beginning of a library's message, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].rstrip(".")[:300] + "."


def checked_config(name: str, config: Any) -> Any:
    """A Hugging Face config of a known family as a forward pass can rely on it.

    Args:
        name: what to call the model.
        config: of BERT, RoBERTa or DistilBERT, compressed or not.

    Returns:
        The same, with the settings at raybert's own that only change how a forward pass is carried
        out (attention kernels) or what it hands back.

    Raises:
        UserError: a number, a label or a method in it makes no sense.
    """
    problem = _fault(config)
    if problem is not None:
        raise UserError(
            f"the config.json of {name} has {problem}. Copy it again from the model's source."
        )
    config.output_attentions = config.output_hidden_states = False
    config.return_dict = True
    config._attn_implementation = "sdpa"  # a config may name a kernel to be fetched and run
    return config


def _fault(config: Any) -> str | None:
    numbers = {
        **sizes(config),
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
    }
    for key, value in numbers.items():
        most = MOST.get(key, 2**24)
        if type(value) is not int or not 0 < value <= most:
            return f"{key} {value!r}, which must be a number from 1 to {most}"
    if numbers["hidden"] % numbers["heads"]:
        return f"{numbers['hidden']} hidden units that {numbers['heads']} heads cannot share"
    act = config.activation if family(config) == "distilbert" else config.hidden_act
    if not isinstance(act, str) or act not in ACT2FN:
        return f"an unknown activation {act!r}"
    pad = config.pad_token_id
    known = type(pad) is int and 0 <= pad < config.vocab_size
    if not known and (pad is not None or family(config) == "roberta"):
        return f"pad_token_id {pad!r}, which is no token of its {config.vocab_size}"
    heads = config.architectures
    if heads is not None and not (
        isinstance(heads, list) and all(isinstance(head, str) for head in heads)
    ):
        return f"architectures {heads!r}, which must be a list of names"
    if set(config.id2label) != set(range(config.num_labels)):
        return f"{config.num_labels} labels and names for {sorted(config.id2label)[:5]}"
    return _compression_fault(config)


def _compression_fault(config: Any) -> str | None:
    try:
        finished(config)
    except KeyError as error:
        return f"a compression method {error} that this raybert does not know"
    # Pydantic's own is a ValueError.
    except (TypeError, ValueError, AttributeError) as error:
        return f"a compression that cannot be read ({first_sentence(error).rstrip('.')})"
    return None


def check_weights(name: str) -> None:
    """Refuse a local model folder whose weights are pickled, missing or cut short, or lie outside
    it; a hub name passes.

    Raises:
        UserError: no safetensors file, one whose size is not what its header says, or an index
            that names anything but such files.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        return
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise UserError(
            f"{name} holds no weights as safetensors. Pickled ones (pytorch_model.bin) are not "
            "read, since they can run any code: load them once with transformers, where you trust "
            "them, and write them again with save_pretrained."
        )
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{file} is damaged ({first_sentence(error).rstrip('.')}); copy or make it again."
            ) from None
    _check_index(path / "model.safetensors.index.json")


def _check_index(index: Path) -> None:
    if not index.is_file():
        return
    try:
        names = {str(n) for n in json.loads(index.read_text("utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{index} is damaged ({first_sentence(error).rstrip('.')}); copy it again."
        ) from None
    strange = sorted(n for n in names if not SHARD.fullmatch(n) or not (index.parent / n).is_file())
    if strange:
        raise UserError(
            f"{index} names the weights file {strange[0]!r}, which is no safetensors file of its "
            "folder. Copy the whole model again."
        )
