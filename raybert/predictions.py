"""Saved predictions as they lie on disk: whose they are, whether they are whole, and reading them.

A folder holds the rows in shards, Arrow files whose names carry their checksum, and ``meta.json``,
written last, which says whose predictions they are. `raybert.teacher` makes them.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers.modeling_outputs import QuestionAnsweringModelOutput, SequenceClassifierOutput

from raybert.config import KDConfig
from raybert.errors import UserError
from raybert.phase import Outputs
from raybert.storage import pull

FORMAT = 1
"""Raised when what is kept on disk changes, so that older folders are made anew."""

META = "meta.json"

SHARD = re.compile(r"(\d{5})-(logits|cls)-([0-9a-f]{8})\.arrow")
"""A shard's name: nothing that leads out of its folder."""

NUMBERS = ("rows", "layers", "hidden", "shard_rows", "cls")

Build = Callable[..., dict[str, Tensor]]
"""What makes the batch of some rows: ``build(positions, epoch=0)``."""


def takes_saved(kd: KDConfig, kind: str, passes: float) -> bool:
    """Whether the student learns from saved predictions instead of a teacher that runs beside it.

    Args:
        kd: what the student learns.
        kind: the task's kind.
        passes: how often the student sees every row; below 1, ``auto`` is cheaper live.

    Raises:
        UserError: saved predictions were asked for where only a live teacher will do.
    """
    if not kd.active:
        if kd.predictions_folder is not None:
            raise UserError(
                f"kd.predictions names {kd.predictions} and nothing is learnt from it; give "
                "kd.alpha or kd.cls a weight, or leave kd.predictions out."
            )
        return False
    needs = {
        "kd.hidden compares every token's states": kd.hidden > 0,
        "kd.attention compares attention": kd.attention > 0,
        "task mlm masks other tokens in every epoch": kind == "mlm",
    }
    found = [text for text, needed in needs.items() if needed]
    if kd.predictions == "live" or (kd.predictions == "auto" and (found or passes < 1)):
        return False
    if found:
        raise UserError(
            f"kd.predictions={kd.predictions} has only logits and [CLS] states to offer, for "
            f"kd.alpha and kd.cls; {' and '.join(found)}, which needs a live teacher. Use "
            "kd.predictions=live, or leave it out."
        )
    return True


# -- what is there ---------------------------------------------------------------------------------


def key_of(identity: dict[str, Any]) -> str:
    """The digest that names a set of predictions."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def read_meta(folder: Path) -> dict[str, Any]:
    """What a folder of predictions says of itself.

    Raises:
        ValueError: it says nothing, or what another format says; the message tells.
    """
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if meta["format"] != FORMAT or key_of(meta["identity"]) != meta["key"]:
            raise ValueError(f"{META} is of another format")
        for shard in meta["shards"]:
            if not SHARD.fullmatch(shard["file"]) or type(shard["bytes"]) is not int:
                raise ValueError(f"{META} names {shard['file']!r}, which is no shard")
        for key, kind in {"identity": dict, "kind": str, **dict.fromkeys(NUMBERS, int)}.items():
            if not isinstance(meta[key], kind):
                raise ValueError(f"{META} has a {key} of {meta[key]!r}")
        return meta
    except FileNotFoundError:
        raise ValueError(f"{META} is not there: they were not all made") from None
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{META} is damaged ({type(error).__name__})") from None


def fault(folder: Path, identity: dict[str, Any], *, cls: bool, check: bool = True) -> str | None:
    """Why a folder's predictions cannot be used, or nothing when they can.

    Args:
        identity: what is wanted; the digest of the teacher may be left out while it is unknown.
        cls: whether [CLS] states are wanted.
        check: compare every shard's checksum, not only its size.
    """
    try:
        meta = read_meta(folder)
    except ValueError as error:
        return str(error)
    whose = {
        "teacher": "they are another teacher's",
        "data": "they are of other rows, or of another tokenizer or length",
        "split": f"they are of the {meta['identity'].get('split')} rows",
    }
    for part, text in whose.items():
        if part in identity and meta["identity"].get(part) != identity[part]:
            return text
    if cls and not meta["cls"]:
        return "they hold no [CLS] states, which kd.cls compares"
    for shard in meta["shards"]:
        try:
            check_shard(folder / shard["file"], shard["bytes"], check)
        except (OSError, ValueError) as error:
            return f"{shard['file']} {error if type(error) is ValueError else 'is missing'}"
    return None


def check_shard(path: Path, size: int | None, check: bool) -> None:
    """Refuse a shard whose size, or the checksum in its name, is not its content's."""
    found = path.stat().st_size
    if size is not None and found != size:
        raise ValueError(f"has {found} bytes instead of {size}")
    if check and f"{zlib.crc32(path.read_bytes()):08x}" != path.stem.rpartition("-")[2]:
        raise ValueError("has another checksum than when it was written")


def check_named(folder: Path, identity: dict[str, Any], *, cls: bool) -> None:
    """Refuse a folder that ``kd.predictions`` names unless it can be used as it is.

    Raises:
        UserError: it is not there, not whole, or another teacher's or other rows'.
    """
    if not (pull(folder, META) and folder.is_dir()):
        raise UserError(
            f"kd.predictions={folder} is neither auto, live, saved nor a folder; write one with "
            "`raybert predict-teacher ... --out FOLDER`."
        )
    reason = fault(folder, identity, cls=cls)
    if reason is not None:
        raise UserError(
            f"the predictions in {folder} cannot be used: {reason}. Make them with `raybert "
            "predict-teacher`, the same teacher, task and data, the same model where the student "
            "starts from another than its teacher, and another --out; or use kd.predictions=auto."
        )


# -- reading ---------------------------------------------------------------------------------------


class Predictions:
    """Saved predictions, mapped from disk.

    Attributes:
        layers: the teacher's depth.
        rows: how many rows there are.
        bytes: of all shards.
    """

    def __init__(self, folder: Path, *, cls: bool) -> None:
        """Open a folder whose checksums `fault` has seen.

        Args:
            cls: whether [CLS] states are wanted.

        Raises:
            UserError: it is not whole.
        """
        reason = fault(folder, {}, cls=cls, check=False)
        if reason is not None:
            raise UserError(
                f"the teacher's predictions in {folder} cannot be used: {reason}. Start the same "
                "command again; it makes them anew."
            )
        meta = read_meta(folder)
        self.layers, self.rows, self.qa = meta["layers"], meta["rows"], meta["kind"] == "qa"
        self.bytes = sum(shard["bytes"] for shard in meta["shards"])
        self.shards = len(meta["shards"])
        self._width, self._shard_rows, self._cls = meta["hidden"], meta["shard_rows"], cls
        self._columns = [self._open(folder / shard["file"]) for shard in meta["shards"]]

    def _open(self, path: Path) -> dict[str, np.ndarray]:
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        names = ["start_logits", "end_logits"] if self.qa else ["logits"]
        columns: dict[str, np.ndarray] = {}
        for name in [*names, *(["cls"] if self._cls else [])]:
            column: Any = batch.column(name)
            columns[name] = column.flatten().to_numpy()
            if self.qa and name != "cls":
                columns["offsets"] = column.offsets.to_numpy()
            elif name == "cls":
                columns[name] = columns[name].reshape(len(column), self.layers, self._width)
            else:
                columns[name] = columns[name].reshape(len(column), -1)
        return columns

    def beside(self, batcher: Build) -> Build:
        """A batcher whose batches hold the teacher's predictions too, for `outputs`."""

        def build(positions: np.ndarray, *, epoch: int = 0) -> dict[str, Tensor]:
            batch = batcher(positions, epoch=epoch)
            return {**batch, **self.read(positions, batch["input_ids"].shape[1])}

        return build

    def read(self, positions: np.ndarray, width: int) -> dict[str, Tensor]:
        """The predictions of some rows.

        Args:
            positions: of the rows, [B].
            width: tokens T that a batch is padded to, at least the rows' own.

        Returns:
            ``teacher_logits`` [B, C], or ``teacher_start_logits`` and ``teacher_end_logits``
            [B, T] with zeros for padding; ``teacher_cls`` [B, L, H] in float16 if opened with it.
        """
        found: dict[str, np.ndarray] = {}
        owners, places = np.divmod(np.asarray(positions), self._shard_rows)
        for shard in np.unique(owners):
            mine = owners == shard
            for name, values in self._rows(self._columns[shard], places[mine], width).items():
                if name not in found:
                    found[name] = np.empty((len(owners), *values.shape[1:]), values.dtype)
                found[name][mine] = values
        return {f"teacher_{name}": torch.from_numpy(values) for name, values in found.items()}

    def _rows(
        self, columns: dict[str, np.ndarray], places: np.ndarray, width: int
    ) -> dict[str, np.ndarray]:
        if not self.qa:
            return {name: values[places] for name, values in columns.items()}
        first, last = columns["offsets"][places], columns["offsets"][places + 1]
        tokens = first[:, None] + np.arange(width)  # [b, T]
        real = tokens < last[:, None]
        tokens = np.where(real, tokens, 0)
        found = {
            name: np.where(real, columns[name][tokens], np.float32(0))
            for name in ("start_logits", "end_logits")
        }
        return {**found, "cls": columns["cls"][places]} if self._cls else found

    def outputs(self, batch: dict[str, Tensor]) -> Outputs:
        """A batch's predictions in the shape of a forward pass; hidden states hold [CLS] alone.

        ``hidden[i]`` is [B, 1, H] for layer i, counted from 1. What enters layer 1 was not kept:
        ``hidden[0]`` has no token at all, so that nobody compares it unawares.
        """
        if self.qa:
            start, end = batch["teacher_start_logits"], batch["teacher_end_logits"]
            model: Any = QuestionAnsweringModelOutput(start_logits=start, end_logits=end)  # pyright: ignore[reportArgumentType]
        else:
            model = SequenceClassifierOutput(logits=batch["teacher_logits"])  # pyright: ignore[reportArgumentType]
        if not self._cls:
            return Outputs(model)
        states = batch["teacher_cls"].float()  # [B, L, H]
        return Outputs(model, [states[:, :0], *states.split(1, dim=1)])
