"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raybert import folders
from raybert.errors import UserError
from raybert.folders import owned, write_whole


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


def test_two_processes_do_not_work_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "PATIENCE", 0.1)
    code = "import sys\nfrom pathlib import Path\nfrom raybert.folders import owned\n"
    code += "with owned(Path(sys.argv[1])):\n    print('mine', flush=True)\n    sys.stdin.read()"
    words = [sys.executable, "-c", code, str(tmp_path / "run")]
    other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "mine\n"
    with (
        pytest.raises(UserError, match=r"another process is working in .*run"),
        owned(tmp_path / "run"),
    ):
        pass
    other.kill()  # whatever became of it: what it held is free
    other.communicate()
    with owned(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


def test_storage_without_locks_is_worked_in_all_the_same(tmp_path, monkeypatch):
    def none(*_: object, **__: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(folders.FileLock, "acquire", none)
    done = []
    with owned(tmp_path / "run"):
        done.append(True)
    assert done
