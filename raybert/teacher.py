"""Making saved predictions: what a teacher says of every row, computed once for every student.

Shards are written beside and renamed, under names that carry their checksum, so that the work can
be interrupted, or done by several processes at once, and goes on where it was. Nothing here knows
Ray; `raybert.run` shares the shards out.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from raybert.compressed import longest_input
from raybert.data import META as PREPARED
from raybert.data import MODEL_INPUTS, TaskData, load_prepared
from raybert.errors import TransientError, UserError
from raybert.first_token import first_token_only
from raybert.folders import write_whole
from raybert.models import PROBLEMS, check_head, load_for_task, read_config, revision_of
from raybert.places import local, uri_of
from raybert.predictions import FORMAT, META, SHARD, check_shard, key_of, read_meta
from raybert.scale import prediction_bytes
from raybert.storage import arrived, check_writable, entries, held, pull, push, remove
from raybert.surgery import encoder_layers, model_inputs
from raybert.trust import check_weights

SHARD_ROWS, MOST_SHARDS = 1024, 256
"""Rows of a shard, more of them where there would be too many files to keep open."""


# -- what is asked for -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """Predictions that are wanted, and where they are kept.

    Attributes:
        teacher: hub name or folder of a fine-tuned model.
        data: folder of the prepared data.
        split: whose rows.
        kind: the task's.
        cls: whether the [CLS] states of every layer are wanted beside the logits.
        folder: where the shards and ``meta.json`` are.
        identity: digests of the teacher and of the data, the split and the format; predictions of
            another identity are never used.
        rows: how many.
        shard_rows: rows of a shard; row i is in shard i // shard_rows.
        row_bytes: bytes of a row, roughly.
        batch_size: rows of a forward pass.
    """

    teacher: str
    data: Path
    split: str
    kind: str
    cls: bool
    folder: Path
    identity: dict[str, Any]
    rows: int
    shard_rows: int
    row_bytes: int
    batch_size: int

    @property
    def key(self) -> str:
        """The digest of the identity."""
        return key_of(self.identity)

    @property
    def shards(self) -> int:
        """How many shards the rows fill."""
        return -(-self.rows // self.shard_rows)

    def positions(self, shard: int) -> np.ndarray:
        """The rows of a shard."""
        first = shard * self.shard_rows
        return np.arange(first, min(first + self.shard_rows, self.rows))

    def rows_of(self, shards: Sequence[int]) -> int:
        """How many rows these shards hold."""
        return sum(len(self.positions(shard)) for shard in shards)

    def on(self, root: Path) -> Request:
        """The request on this machine, which another has made: what it reads of object storage is
        brought here.

        Args:
            root: of that machine's mirrors.

        Raises:
            UserError: it cannot be brought.
        """
        uri = uri_of(self.folder, root)
        return replace(
            self,
            teacher=arrived(self.teacher, root),
            data=Path(arrived(str(self.data), root, PREPARED)),
            folder=local(uri) if uri else self.folder,
        )


def request_for(
    teacher: str,
    data: TaskData,
    split: str,
    *,
    cls: bool,
    batch_size: int,
    cache: Path,
    out: Path | None = None,
) -> Request:
    """What to keep of a teacher's predictions on a split.

    Args:
        teacher: hub name or folder of a model with the task's head.
        data: the prepared task.
        cls: whether [CLS] states are wanted.
        batch_size: rows of a forward pass.
        cache: they are kept in ``cache/teacher/KEY``.
        out: keeps them in this folder instead.

    Raises:
        UserError: the split is not there, the teacher does not fit, or the task is mlm.
    """
    if data.task.kind == "mlm":
        raise UserError(
            "task mlm masks other tokens in every epoch, so there are no predictions to save. "
            "Distil with a live teacher: kd.predictions=live."
        )
    if split not in data.splits:
        raise UserError(
            f"task {data.task.name} has no {split} rows here; there are {', '.join(data.splits)}."
        )
    config = read_config(teacher)
    check_weights(teacher)
    check_head(teacher, config, data.task)
    lengths = data.lengths(split)
    if lengths.max() > longest_input(config):
        raise UserError(
            f"{teacher} reads {longest_input(config)} tokens and the rows have up to "
            f"{lengths.max()}; use data.max_length={longest_input(config)}."
        )
    identity = identity_of(data, split) | {"teacher": teacher_digest(teacher)}
    outputs = 2 * lengths.mean() if data.task.kind == "qa" else config.num_labels
    layers = config.num_hidden_layers if cls else 0
    rows = len(lengths)
    return Request(
        teacher=teacher,
        data=data.folder,
        split=split,
        kind=data.task.kind,
        cls=cls,
        folder=out or cache / "teacher" / key_of(identity),
        identity=identity,
        rows=rows,
        shard_rows=max(SHARD_ROWS, -(-rows // MOST_SHARDS)),
        row_bytes=prediction_bytes(1, outputs, layers, config.hidden_size),
        batch_size=batch_size,
    )


def identity_of(data: TaskData, split: str) -> dict[str, Any]:
    """All that decides about predictions but the teacher."""
    return {"format": FORMAT, "data": data.key, "split": split}


def teacher_digest(name: str) -> str:
    """The SHA-256 of a model's config and weight files; of a hub model, its name and revision."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        revision = revision_of(name)
        return hashlib.sha256(f"{name}@{revision}".encode()).hexdigest()
    files = [folder / "config.json", *sorted(folder.glob("model*.safetensors"))]
    stats = [file.stat() for file in files]
    return _digest(tuple((f, s.st_size, s.st_mtime_ns) for f, s in zip(files, stats, strict=True)))


@functools.lru_cache(maxsize=8)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Of files as they are, by path, size and time of change: a run asks for its teacher's twice,
    and a search's trials in one process share it."""
    digest = hashlib.sha256()
    for file, size, _ in files:
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            while block := opened.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def check_out(request: Request) -> None:
    """Refuse to write into a folder that holds anything but this request's own predictions.

    Raises:
        UserError: the folder is not to be touched.
    """
    folder = request.folder
    check_writable(folder)
    names = [name for name in entries(folder) if not name.startswith(".")]
    if folder.is_file():
        raise UserError(f"{folder} is a file; choose another --out.")
    strange = [name for name in names if name != META and not SHARD.fullmatch(name)]
    if strange:
        raise UserError(
            f"{folder} holds {strange[0]}, which is no teacher's prediction; nothing in it is "
            "touched. Choose another --out."
        )
    pull(folder)
    keys = {_key_in(folder / name) for name in names} - {None}
    if keys - {request.key}:
        raise UserError(
            f"{folder} holds predictions of another teacher, of other rows or of another split; "
            "they are not overwritten. Choose another --out."
        )


def _key_in(path: Path) -> str | None:
    """The key that a file of a predictions folder carries; nothing where it cannot be read."""
    try:
        if path.name == META:
            return read_meta(path.parent)["key"]
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).schema.metadata[b"key"].decode()
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None


# -- making them -----------------------------------------------------------------------------------


def find_shards(request: Request) -> dict[int, str]:
    """Shards of this request that were made before and are whole; damaged ones are removed.

    Returns:
        Shard number -> file name.
    """
    found: dict[int, str] = {}
    if not request.folder.is_dir():
        return found
    for path in sorted(request.folder.iterdir()):
        match = SHARD.fullmatch(path.name)
        if match is None or (request.cls and match[2] != "cls"):
            continue
        try:
            check_shard(path, None, True)
            with pa.memory_map(str(path)) as source:
                metadata = pa.ipc.open_file(source).schema.metadata
            whole = metadata == _metadata(request, int(match[1]))
        except (OSError, ValueError, pa.ArrowException):
            whole = False
        if whole:
            found[int(match[1])] = path.name
        else:
            remove(path)
    return found


def _metadata(request: Request, shard: int) -> dict[bytes, bytes]:
    first = shard * request.shard_rows
    rows = f"{first} to {min(first + request.shard_rows, request.rows) - 1}"
    return {b"key": request.key.encode(), b"rows": rows.encode()}


def check_room(request: Request, shards: int) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        UserError: so many shards need more than is free, or the folder cannot be made.
    """
    try:
        request.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(request.folder).free
    except OSError as error:
        raise _cannot_keep(request.folder, error) from None
    needed = shards * request.shard_rows * request.row_bytes
    if needed > free:
        raise UserError(
            f"the teacher's predictions need about {needed / 2**30:.1f} GiB and {request.folder} "
            f"has {free / 2**30:.1f} GiB free. Make room, choose another folder with data.cache, "
            "or use kd.predictions=live."
        )


def _cannot_keep(folder: Path, error: OSError) -> TransientError:
    return TransientError(
        f"the teacher's predictions cannot be kept in {folder} ({error.strerror or error}); make "
        "room or choose another folder with data.cache, and start the same command again: what "
        "was written is kept."
    )


class Predictor:
    """A teacher, loaded once, that writes one shard after the other."""

    def __init__(self, request: Request, device: torch.device) -> None:
        self.request, self.device = request, device
        data = load_prepared(request.data)
        self.batcher = data.batcher(request.split)
        model: Any = load_for_task(request.teacher, data.task, seed=0, new_head=False)[0]
        self.model = model.requires_grad_(False).to(device).eval()
        self.states: list[Tensor] = []  # [B, H] of each layer, as the last forward pass left them
        if request.cls:
            for layer in encoder_layers(self.model):
                layer.register_forward_hook(self._keep)
        self.narrowed = contextlib.ExitStack()
        if request.kind in PROBLEMS:
            self.narrowed.enter_context(first_token_only(self.model))

    def _keep(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self.states.append(output[:, 0].clone())  # a view would hold on to every token

    def write(self, shard: int) -> str:
        """Compute and keep a shard; its file's name.

        Raises:
            UserError: the teacher's outputs are no numbers, or storage refused.
        """
        request = self.request
        columns = self.columns(request.positions(shard))
        names = list(columns)
        batch = pa.RecordBatch.from_arrays([columns[name] for name in names], names)
        batch = batch.replace_schema_metadata(_metadata(request, shard))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        content = sink.getvalue()
        kind = "cls" if request.cls else "logits"
        name = f"{shard:05d}-{kind}-{zlib.crc32(content):08x}.arrow"
        with held(request.folder):
            _write(request.folder / name, content)
            push(request.folder / name)
        return name

    def columns(self, positions: np.ndarray) -> dict[str, pa.Array]:
        """What is kept of these rows: ``index``; ``logits`` [C], or ``start_logits`` and
        ``end_logits`` [tokens]; ``cls`` [L * H]."""
        lengths = self.batcher.lengths[positions]
        order = np.argsort(-lengths, kind="stable")  # rows of like length share a forward pass
        parts: dict[str, list[np.ndarray]] = {}
        for at in range(0, len(order), self.request.batch_size):
            found = self._forward(positions[order[at : at + self.request.batch_size]])
            for name, values in found.items():
                parts.setdefault(name, []).append(values)
        back = np.argsort(order)  # order[back] is 0, 1, 2, ...
        columns = {"index": pa.array(positions)}
        for name, values in parts.items():
            if self.request.kind == "qa" and name != "cls":
                columns[name] = _ragged(values, lengths, back)
            else:
                joined = np.concatenate(values)[back]
                flat = pa.array(joined.ravel())
                columns[name] = pa.FixedSizeListArray.from_arrays(flat, joined[0].size)
        return columns

    def _forward(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        batch = self.batcher(positions)
        read = model_inputs(self.model, batch, MODEL_INPUTS)
        inputs = {name: values.to(self.device) for name, values in read.items()}
        self.states.clear()
        with torch.inference_mode():
            out = self.model(**inputs)
        heads = ("start_logits", "end_logits") if self.request.kind == "qa" else ("logits",)
        found = {name: out[name].float().cpu().numpy() for name in heads}
        if self.request.cls:
            found["cls"] = torch.stack(self.states, 1).half().cpu().numpy()  # [B, L, H]
        for name, values in found.items():
            if not np.isfinite(values).all():
                raise UserError(
                    f"teacher {self.request.teacher} gives {name} that are no numbers, or too "
                    f"large to be kept, in rows {positions.min()} to {positions.max()} of "
                    f"{self.request.split}. Check its weights; kd.predictions=live trains "
                    "without saving them."
                )
        return found


def _ragged(values: list[np.ndarray], lengths: np.ndarray, back: np.ndarray) -> pa.Array:
    """Batches of padded rows [B, T] as one list a row, in the dataset's order."""
    rows = [row for batch in values for row in batch]
    flat = np.concatenate([rows[i][:n] for i, n in zip(back, lengths, strict=True)])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat))


def _write(path: Path, content: Any) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        raise _cannot_keep(path.parent, error) from None


def seal(request: Request, files: dict[int, str]) -> None:
    """Write ``meta.json``: from now on the predictions are there.

    Args:
        files: name of every shard's file.

    Raises:
        UserError: a shard is not where the workers wrote it, or storage refused.
    """
    shards = []
    for shard in range(request.shards):
        path = request.folder / files[shard]
        if not path.is_file():
            raise UserError(
                f"the workers predicted, and {path} is not here: data.cache must be on storage "
                "that all machines share."
            )
        entry = {"file": path.name, "rows": len(request.positions(shard))}
        crc = path.stem.rpartition("-")[2]
        shards.append({**entry, "bytes": path.stat().st_size, "crc32": crc})
    config = read_config(request.teacher)
    meta = {
        "format": FORMAT,
        "key": request.key,
        "identity": request.identity,
        "kind": request.kind,
        "cls": request.cls,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "rows": request.rows,
        "shard_rows": request.shard_rows,
        "shards": shards,
    }
    _write(request.folder / META, json.dumps(meta, indent=1))
    push(request.folder / META)
