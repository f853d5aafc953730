"""Object storage behind the folders that mirror it: pull what is read, push what is whole.

On a path that mirrors no URI nothing here does anything. The bucket is the truth: pulling removes
from a mirror what is not there. A bucket knows no rename, so a folder is whole once its marker is
there, the file that is sent last.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from pyarrow import fs

from raybert.buckets import settings, tried
from raybert.errors import TransientError, UserError
from raybert.places import HIDDEN, local, mirrors, uri_of

BLOCK = 1 << 24

AT_ONCE = 8
"""Files on their way at the same time."""

# -- what is there ---------------------------------------------------------------------------------


def entries(path: Path) -> list[str]:
    """Names of what lies in a folder, in its storage; a file's own; none where nothing is.

    Raises:
        UserError: the storage does not answer.
    """
    uri = uri_of(path)
    if uri is not None:
        return list(dict.fromkeys(name.partition("/")[0] or path.name for name in _listed(uri)))
    if path.is_dir():
        return [entry.name for entry in path.iterdir()]
    return [path.name] if path.exists() else []


def check_writable(path: Path) -> None:
    """Refuse storage that cannot be written to, by writing a small file and removing it again.

    Raises:
        UserError: no such bucket, no credentials, no permission, or no network.
    """
    uri = uri_of(path)
    if uri is not None:
        _check_writable(uri, settings())


@functools.lru_cache
def _check_writable(uri: str, settings: tuple[str, ...]) -> None:
    """Once a process: the samples of a search have one storage."""

    name = f"{HIDDEN}{uuid.uuid4().hex}"  # the same one when it is tried again

    def probe(store: fs.FileSystem, key: str) -> None:
        with store.open_output_stream(f"{key}/{name}") as file:
            file.write(b"raybert")
        _gone(fs.FileSystem.delete_file, store, f"{key}/{name}")

    tried("written to", uri, probe)


def _listed(uri: str) -> dict[str, fs.FileInfo]:
    """The files below a URI by their names from there; one that is a file has the name ``""``.

    Of folders only files can tell: some buckets have objects that stand for folders, most have not.
    """

    def look(store: fs.FileSystem, key: str) -> dict[str, fs.FileInfo]:
        below = store.get_file_info(fs.FileSelector(key, recursive=True, allow_not_found=True))
        found = {info.path[len(key) + 1 :]: info for info in below if info.is_file}
        if not found and (own := store.get_file_info(key)).is_file:
            return {"": own}
        # A key may hold anything; as a path it must not lead out of the mirror.
        return {n: i for n, i in found.items() if not {"", ".", ".."} & set(n.split("/"))}

    return tried("read", uri, look)


# -- pull ------------------------------------------------------------------------------------------


def pull(path: Path, marker: str | None = None, *, deep: bool = True) -> bool:
    """Make a mirror hold what its storage does; what is not there, or not whole, goes from it.

    Processes of one machine that want the same wait for the one that brings it.

    Args:
        path: a file or folder.
        marker: the file without which the folder is not whole.
        deep: False leaves folders in it alone.

    Returns:
        Whether something is there now.

    Raises:
        UserError: the storage does not answer, or the mirror cannot be written.
    """
    uri = uri_of(path)
    if uri is None:
        return path.exists()
    with held(path), _here(path):
        found = _listed(uri)
        if marker is not None and marker not in found:
            found = {}
        found = {name: info for name, info in found.items() if deep or "/" not in name}
        stale = {name: info for name, info in found.items() if not _same(path / name, info)}
        _all(lambda item: _bring(f"{uri}/{item[0]}".rstrip("/"), path / item[0], item[1]), stale)
        _drop(path, found, deep)
    return bool(found)


def fetch(place: str | Path) -> Path:
    """The path of what is read, brought here first where it is in object storage.

    Raises:
        UserError: nothing is there, or the storage does not answer.
    """
    path = path_of(place)
    if uri_of(path) is not None and not pull(path):
        raise nothing_at(path)
    return path


def path_of(place: str | Path) -> Path:
    """A place as a path: the mirror's of a URI, else its own.

    Raises:
        UserError: a URI that cannot be used.
    """
    try:
        return local(place) if is_mirrored(place) else Path(place).expanduser()
    except ValueError as error:
        raise UserError(f"{error}.") from None


def is_mirrored(place: str | Path) -> bool:
    """Whether a place is a URI, or the path of a mirror."""
    return "://" in str(place) or uri_of(Path(place).expanduser()) is not None


def nothing_at(path: Path) -> UserError:
    """The error of a URI that names nothing."""
    return UserError(
        f"there is nothing at {path}: no file, and no folder that holds one. Look for it with the "
        "tools of that storage, and mend the bucket or the name."
    )


def arrived(place: str, root: Path, marker: str | None = None) -> str:
    """A place that another machine has named, as it is here; what it reads of storage is brought.

    Args:
        place: a path there, or a name that is no path.
        root: of the mirrors there.
        marker: as for `pull`.

    Raises:
        UserError: as `pull`, or nothing is there.
    """
    uri = uri_of(place, root)
    if uri is None:
        return place
    path = local(uri)
    if not pull(path, marker):
        raise nothing_at(path)
    return str(path)


def _bring(uri: str, target: Path, info: fs.FileInfo) -> None:
    partial = mirrors() / f".partial-{uuid.uuid4().hex}"

    def copy(store: fs.FileSystem, key: str) -> None:
        here = fs.LocalFileSystem()
        fs.copy_files(
            key,
            str(partial),
            source_filesystem=store,
            destination_filesystem=here,
            chunk_size=BLOCK,
        )
        if partial.stat().st_size != info.size:
            raise OSError(f"{partial.stat().st_size} bytes came instead of {info.size}")

    try:
        tried("read", uri, copy)
        _stamp(partial, info)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _drop(path: Path, found: Iterable[str], deep: bool) -> None:
    """Remove from a mirror what its storage does not hold."""
    if path.is_dir():
        for file in path.rglob("*") if deep else path.iterdir():
            name = file.relative_to(path)
            if file.is_file() and name.as_posix() not in found and not _stays(name):
                file.unlink(missing_ok=True)
        if not found and deep:
            _remove_empty(path)
    elif not found:
        path.unlink(missing_ok=True)


def _remove_empty(folder: Path) -> None:
    """Remove a folder and those in it, as far as no file lies in them."""
    below = sorted((entry for entry in folder.rglob("*") if entry.is_dir()), reverse=True)
    for entry in (*below, folder):
        with suppress(OSError):
            entry.rmdir()


def _same(file: Path, info: fs.FileInfo) -> bool:
    """Whether a mirror's file is the one in its storage: it has that one's time since it came."""
    if not file.is_file():
        return False
    there = file.stat()
    return there.st_size == info.size and there.st_mtime_ns == (info.mtime_ns or 0)


def _stamp(file: Path, info: fs.FileInfo) -> None:
    os.utime(file, ns=(info.mtime_ns or 0, info.mtime_ns or 0))


# -- push ------------------------------------------------------------------------------------------


def push(path: Path, last: str | None = None) -> None:
    """Send a mirror's file, or the files of its folder that storage has not, to storage.

    Args:
        path: a file or folder; names that begin with a dot stay here.
        last: the folder's marker. Readers see the folder whole or not at all, and of what was
            there before nothing is left.

    Raises:
        UserError: storage refused; without ``last`` there, the folder is not whole.
    """
    uri = uri_of(path)
    if uri is None:
        return
    with held(path):
        _push(path, uri, last)


def _push(path: Path, uri: str, last: str | None) -> None:
    there = _listed(uri)
    files = {"": path} if path.is_file() else _own_files(path)
    new = [n for n, file in files.items() if n not in there or not _same(file, there[n])]
    if last is not None:
        gone = [name for name in there if name not in files]
        if last in there and (new or gone):
            _delete(f"{uri}/{last}")
            new = list(dict.fromkeys([*new, last]))
        _all(lambda name: _delete(f"{uri}/{name}"), gone)
    first = [name for name in new if name != last]
    _all(lambda name: _send(files[name], f"{uri}/{name}".rstrip("/")), first)
    if last in new:
        _send(files[last], f"{uri}/{last}")
    if new:  # what was sent need not come again
        for name, info in _listed(uri).items():
            if name in new and files[name].stat().st_size == info.size:
                _stamp(files[name], info)


def remove(path: Path) -> None:
    """Remove a file or folder, in its storage too.

    Raises:
        UserError: the storage does not let it go.
    """
    uri = uri_of(path)
    if uri is not None:
        found = _listed(uri)
        work = fs.FileSystem.delete_file if "" in found else fs.FileSystem.delete_dir
        if found:
            tried("removed", uri, functools.partial(_gone, work))
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _own_files(folder: Path) -> dict[str, Path]:
    files = {file.relative_to(folder): file for file in folder.rglob("*") if file.is_file()}
    return {name.as_posix(): file for name, file in sorted(files.items()) if not _stays(name)}


def _stays(name: Path) -> bool:
    """Whether a mirror's file, by its name in its folder, is of this machine alone."""
    return any(part.startswith(".") for part in name.parts)


def _send(file: Path, uri: str) -> None:
    here = fs.LocalFileSystem()
    tried(
        "written",
        uri,
        lambda store, key: fs.copy_files(
            str(file), key, source_filesystem=here, destination_filesystem=store, chunk_size=BLOCK
        ),
    )


def _delete(uri: str) -> None:
    tried("removed", uri, functools.partial(_gone, fs.FileSystem.delete_file))


def _gone(work: Callable[..., None], store: fs.FileSystem, key: str) -> None:
    # What somebody else removed is gone too; and Google's library misses, when all else of a folder
    # is removed, the object that would stand for the folder.
    with suppress(FileNotFoundError):
        work(store, key)


def _all(work: Callable[[Any], None], items: Any) -> None:
    """Do it for all, some at once; the first error is raised."""
    items = list(items.items() if isinstance(items, dict) else items)
    if items:
        with ThreadPoolExecutor(min(AT_ONCE, len(items))) as threads:
            list(threads.map(work, items))


# -- this machine's side --------------------------------------------------------------------------


@contextmanager
def _here(path: Path) -> Iterator[None]:
    """Failures of this machine's disk, told as such."""
    try:
        mirrors().mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise TransientError(
            f"what {path} holds cannot be kept in {mirrors().parent} "
            f"({os.strerror(error.errno or errno.EIO)}); make room, or choose another folder for "
            "caches with RAYBERT_CACHE."
        ) from None


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Other processes wait with what they want of a mirror's file or folder: what is made there is
    not gone from it again before it was sent. Whoever holds it may do so once more."""
    uri = uri_of(path)
    if uri is None:
        yield
        return
    name = hashlib.sha256(uri.encode()).hexdigest()[:32]
    with _here(path):
        locks = mirrors() / ".locks"
        locks.mkdir(exist_ok=True)
        lock = FileLock(locks / name, is_singleton=True).acquire()
    with lock:
        yield
