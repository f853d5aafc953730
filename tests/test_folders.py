"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raybert.folders import write_whole


def test_a_file_is_replaced_and_readable_like_any_other(tmp_path):
    file, other = tmp_path / "new" / "notes.txt", tmp_path / "other.txt"
    other.write_text("")
    write_whole(file, "first: ¼")
    write_whole(file, "second: ½")
    assert file.read_bytes() == "second: ½".encode()
    assert file.stat().st_mode == other.stat().st_mode
    assert os.listdir(file.parent) == [file.name]


def test_storage_that_refuses_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "notes.txt"
    file.write_text("old")

    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as out:
            out.write(data[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, b"new")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == [file.name]
