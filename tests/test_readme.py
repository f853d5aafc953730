"""The README says what is true: its tables are the result files', and its commands parse."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from raybert.arguments import parse
from raybert.recipe_file import RECIPES, load_recipe

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
TABLES = ROOT / "tests" / "benchmarks" / "tables.py"

if not README.is_file():
    pytest.skip("there is no README.md", allow_module_level=True)

TEXT = README.read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELLS = ("", "sh", "bash", "shell", "console")
BEFORE = {None, "&&", "||", ";", "|", "do", "then", "time", "-m"}
"""What may stand before ``raybert`` where it is a command."""


def words_after_raybert(line: str) -> list[str] | None:
    """The words of the ``raybert`` command in a line of shell, if there is one."""
    line = re.sub(r"\$\{?\w+\}?", "1", line.removeprefix("$ "))
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # prose with an apostrophe, not a command
        return None
    for place, word in enumerate(words):
        before = words[place - 1] if place else None
        if word == "raybert" and (before in BEFORE or "=" in str(before)):
            rest = words[place + 1 :]
            ends = [i for i, w in enumerate(rest) if set(w) <= set("|&;<>()")]
            return rest[: ends[0]] if ends else rest
    return None


def commands() -> list[str]:
    """Every command in a block of shell, and every one in running text that has more words than
    its name."""
    lines = []
    for language, block in FENCE.findall(TEXT):
        if language in SHELLS:
            lines += re.sub(r"\\\n\s*", "", block).splitlines()
    inline = re.findall(r"`([^`\n]+)`", FENCE.sub("", TEXT))
    lines += [code for code in inline if re.match(r"(python -m )?raybert \S+ \S", code)]
    found = [words_after_raybert(line) for line in lines]
    return list(dict.fromkeys(shlex.join(words) for words in found if words))


def test_tables_are_those_of_the_result_files():
    done = subprocess.run(
        [sys.executable, str(TABLES), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_commands():
    assert commands()


@pytest.mark.parametrize("command", commands())
def test_command_parses(command):
    """The subcommand exists, its options are known, and so are the recipe's keys."""
    typed = [word for word in shlex.split(command) if word not in ("...", "…")]
    if {"--help", "--version"} & set(typed):
        with pytest.raises(SystemExit) as stop:
            parse(typed)
        assert stop.value.code == 0
        return
    words = vars(parse(typed)).get("words", [])
    names = [word for word in words if "=" not in word]
    assert len(names) <= 1, f"one recipe at a time: {names}"
    for name in names:
        if "/" in name and Path(name).suffix not in (".yaml", ".yml"):
            assert (RECIPES / f"{name}.yaml").is_file(), f"no recipe {name} ships with raybert"
    load_recipe(None, [word for word in words if "=" in word and word != "key=value"])


@pytest.mark.parametrize("name", re.findall(r"tests/benchmarks/(\w+\.py)", TEXT))
def test_benchmark_exists(name):
    assert (TABLES.parent / name).is_file()
