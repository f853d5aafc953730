"""Imports flow one way; the table here is the map of the rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "raybert"
FILES = sorted(PACKAGE.rglob("*.py"))

SEARCH = {"space.py", "draws.py", "steering.py", "trial.py", "tuning.py", "loggers.py"}
"""The rooms of `raybert tune` that are written in Ray Tune's words."""

ONLY_HERE = {"ray": {"cluster.py", "network.py", "room.py", *SEARCH}, "deepspeed": {"engine.py"}}

LAYERS = [
    {
        "templates",
        "machine",
        "onnx_graph",
        "onnx_first",
        "kept_operators",
        "workers",
        "explain",
        "progress",
        "grid",
    },
    {"places"},
    {"errors", "method"},
    {"config", "losses", "demo_task", "factorise", "attention", "int8", "network"},
    {"buckets"},
    {
        "ledger",
        "shares",
        "loggers",
        "folders",
        "storage",
        "yaml_file",
        "surgery",
        "tasks",
        "readers",
        "timer",
    },
    {"lowrank", "fake_quant", "gates", "metrics_log", "arguments", "loggers"},
    {"skipping", "power_norm", "softmax_net", "onnx_int8", "onnx_skip"},
    {"onnx_ops", "rows", "phase", "results", "latency", "factors", "moments", "ranks", "kept"},
    {"first_token", "integer"},
    {"warm_start", "fold"},
    {"features", "sources", "groups", "rates", "methods", "predictions", "objectives"},
    {"qa", "batches", "tables", "compressed", "recipe_file"},
    {"space", "finalists"},
    {"draws"},
    {"trust"},
    {"data", "models", "bench", "plots", "card", "pages"},
    {"scale"},
    {"metrics", "checkpoint", "engine", "views", "job", "teacher", "onnx_trace", "import_ma_bert"},
    {"evaluate", "inputs", "report", "step"},
    {"train", "parity"},
    {"export"},
    {"checks"},
    {"plan"},
    {"steering", "cluster"},
    {"artifact", "room"},
    {"side_by_side"},
    {"run"},
    {"compare", "trial", "search_results"},
    {"tuning", "search_plots"},
    {"search_page", "search_plan"},
    {"search"},
    {"demo"},
    {"cli"},
]
"""Lowest first: a room imports from its own layer and those below."""


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


@pytest.mark.parametrize("package", ONLY_HERE)
def test_only_one_room_imports(package):
    importers = {p.name for p in FILES if any(n.split(".")[0] == package for n in imported(p))}
    assert importers == ONLY_HERE[package]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_flow_one_way(path):
    if path.name in ("__init__.py", "__main__.py") and path.parent == PACKAGE:
        return
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    own = room(path)
    used = {n.split(".")[1] for n in imported(path) if n.startswith("raybert.") and "." in n}
    assert own in level, "a new room: give it its place in LAYERS"
    used = {name for name in used if name in level} - {own}
    if own == "config":
        used -= {"methods"}  # the registry, read when a recipe names a method
    if own == "timer":
        used -= {"models", "compressed", "methods"}  # in the child process that times one
    too_high = {name for name in used if level[name] > level[own]}
    assert not too_high


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "methods").glob("[a-z]*.py")), ids=lambda p: p.stem
)
def test_a_method_knows_no_other_method(path):
    rooms = {n.split(".")[1] for n in imported(path) if n.startswith("raybert.")}
    layers = {"factorise", "factors", "moments", "ranks", "fake_quant", "int8", "grid"}
    layers |= {"gates", "skipping", "kept", "kept_operators", "integer"}
    layers |= {"lowrank", "power_norm", "softmax_net", "warm_start"}
    base = {"config", "errors", "losses", "method", "phase", "surgery", "workers"}
    assert rooms <= base | layers


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from raybert.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'ray', 'datasets', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
