"""Counting by hand against counting by machine; turns, and what happens when a child fails."""

from __future__ import annotations

import os
import queue
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from raybert import latency as latency_module
from raybert import timer
from raybert.bench import bench, disk_bytes, flops, format_bench, hardware, parameters
from raybert.errors import UserError
from raybert.latency import ROUNDS, Child, ForkServer, alternate, latency, speedups
from raybert.models import PROBE
from raybert.timer import token_ids

HIDDEN, INNER, VOCAB, POSITIONS = 32, 64, 101, 64


def tiny(layers: int = 2, attention: str = "sdpa") -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=INNER,
        vocab_size=VOCAB,
        max_position_embeddings=POSITIONS,
    )
    config._attn_implementation = attention
    return BertForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name, layers in (("deep", 4), ("flat", 2)):
        tiny(layers).save_pretrained(root / name)
    return {"deep": root / "deep", "flat": root / "flat"}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the least ONNX graph that takes a model's inputs: it adds them."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, integer = onnx.helper, onnx.TensorProto.INT64
    names = ["input_ids", "attention_mask"]
    body = helper.make_graph(
        [helper.make_node("Add", names, ["sum"])],
        "sum",
        [helper.make_tensor_value_info(name, integer, ["b", "t"]) for name in names],
        [helper.make_tensor_value_info("sum", integer, ["b", "t"])],
    )
    opsets = [helper.make_opsetid("", 17)]
    folder = tmp_path_factory.mktemp("graph")
    onnx.save(helper.make_model(body, opset_imports=opsets, ir_version=9), folder / "model.onnx")
    tiny().config.save_pretrained(folder)
    return folder


def layer_flops(length: int) -> int:
    """One encoder layer, one row: six linear layers, and scores and context of the attention."""
    linear = 2 * length * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * INNER)
    return linear + 2 * (2 * length * length * HIDDEN)


class Stack(nn.Module):
    """Two linear layers on an embedding; the second is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.config = BertConfig(vocab_size=11)
        self.embed = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.out(self.inner(self.embed(input_ids)))


def test_flops_of_a_known_stack() -> None:
    assert flops(Stack(), batch=3, length=5) == 2 * 3 * 5 * (6 * 6 + 6 * 11)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_flops_count_attention_whatever_computes_it(attention: str) -> None:
    head = 2 * (HIDDEN * HIDDEN + HIDDEN * 2)  # pooler and classifier see one token
    for length in (8, 32):
        assert flops(tiny(attention=attention), length=length) == 2 * layer_flops(length) + head


def test_flops_grow_with_depth_and_batch_and_leave_the_model_alone() -> None:
    model = tiny(4).train()
    assert flops(model, length=16) - flops(tiny(2), length=16) == 2 * layer_flops(16)
    assert flops(model, batch=3, length=16) == 3 * flops(model, length=16)
    assert model.training


def test_flops_count_integer_products() -> None:
    class Integer(Stack):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            left = torch.ones(32, 16, dtype=torch.int8)
            return torch._int_mm(left, torch.ones(16, 8, dtype=torch.int8))

    assert flops(Integer()) == 2 * 32 * 16 * 8


def test_parameters_count_tied_weights_once() -> None:
    assert parameters(Stack()) == {"total": 66 + 42, "embeddings": 66, "rest": 42}


def test_parameters_count_integer_weights_but_no_positions_or_counters() -> None:
    model = Stack()
    model.register_buffer("weight", torch.zeros(5, 4, dtype=torch.int8))
    model.register_buffer("step", torch.tensor(0, dtype=torch.int32))
    model.register_buffer("position_ids", torch.arange(9))
    model.register_buffer("scratch", torch.zeros(7, dtype=torch.int8), persistent=False)
    assert parameters(model)["rest"] == 42 + 20


def test_twice_as_deep_has_twice_the_layers_parameters() -> None:
    layer = 4 * (HIDDEN**2 + HIDDEN) + 2 * HIDDEN * INNER + INNER + HIDDEN + 4 * HIDDEN
    deep, flat = parameters(tiny(4)), parameters(tiny(2))
    assert deep["rest"] - flat["rest"] == 2 * layer
    assert deep["embeddings"] == flat["embeddings"] == (VOCAB + POSITIONS + 2) * HIDDEN


def test_disk_bytes_tell_weights_from_the_rest(tmp_path: Path) -> None:
    tables = {"bert.embeddings.word_embeddings.weight": torch.zeros(5, 4, dtype=torch.int8)}
    first, second = tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors"
    save_file({**tables, "bert.pooler.dense.weight": torch.zeros(2, 3)}, first)
    save_file({"classifier.bias": torch.zeros(7)}, second)
    (tmp_path / "config.json").write_text("{}")
    save_file({"input_ids": torch.zeros(2, 2)}, tmp_path / PROBE)
    probe = (tmp_path / PROBE).stat().st_size
    weights = first.stat().st_size + second.stat().st_size
    found = disk_bytes(tmp_path)
    assert found == {"weights": weights, "embeddings": 20, "total": weights + probe + 2}
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        disk_bytes(tmp_path / "nowhere")


def test_hardware_names_no_machine_user_or_folder() -> None:
    text = str(hardware())
    assert torch.__version__.split("+")[0] in text
    for secret in (os.uname().nodename, str(Path.home()), str(Path.cwd())):
        assert secret not in text


class Recorder:
    """Takes turns and writes them down; its passes take as long as they are told to."""

    def __init__(self, name: str, ms: float, turns: list[tuple[str, int]]) -> None:
        self.name, self.ms, self.turns = name, ms, turns

    def turn(self, batch: int, length: int, repeats: int, warmup: int) -> dict[str, Any]:
        self.turns.append((self.name, repeats))
        return {"ms": [self.ms] * repeats, "peak_memory_mb": 1.0}


def test_turns_alternate_and_fill_the_time() -> None:
    turns: list[tuple[str, int]] = []
    children = {"a": Recorder("a", 1.0, turns), "b": Recorder("b", 50.0, turns)}
    result = alternate(children, (1, 8), repeats=None, warmup=2, seconds=1.0)
    assert [name for name, _ in turns] == ["a", "b"] * (ROUNDS + 1)
    assert len(result["a"]["ms"]) == 1000
    assert len(result["b"]["ms"]) == 20


def test_slow_models_get_ten_passes_and_asked_for_numbers_are_kept() -> None:
    slow = {"slow": Recorder("slow", 9000.0, [])}
    assert len(alternate(slow, (1, 8), None, 1, seconds=1.0)["slow"]["ms"]) == 10
    assert len(alternate(slow, (1, 8), 4, 1, seconds=1.0)["slow"]["ms"]) == 4


def test_statistics_by_hand() -> None:
    found = latency_module._statistics([float(n) for n in range(1, 101)], batch=4)
    assert found["p50_ms"] == 50.5
    assert found["p95_ms"] == 95.0
    assert found["mean_ms"] == 50.5
    assert found["throughput"] == round(4000 / 50.5, 2)


def row(model: str, p50: float, batch: int = 1, backend: str = "torch") -> dict[str, Any]:
    return {"model": model, "backend": backend, "batch": batch, "length": 8, "p50_ms": p50}


def test_speedups_compare_equal_shapes_and_backends() -> None:
    rows = [row("t", 10), row("s", 4), row("t", 90, batch=8), row("s", 60, batch=8)]
    found = speedups(rows, "t")
    assert [(r["model"], r["batch"], r["speedup"]) for r in found] == [("s", 1, 2.5), ("s", 8, 1.5)]
    with pytest.raises(UserError, match="onnx at batch 1"):
        speedups([*rows, row("s", 3, backend="onnx")], "t")


def test_token_ids_are_reproducible_and_inside_the_vocabulary() -> None:
    ids = torch.tensor(token_ids(3, 50, 17))
    assert ids.shape == (3, 50)
    assert 0 <= int(ids.min()) <= int(ids.max()) < 17
    assert token_ids(3, 50, 17) == ids.tolist()


def test_bench_measures_two_folders_in_their_own_processes(folders: dict[str, Path]) -> None:
    result = bench(
        folders["flat"],
        folders["deep"],
        names=("student", "teacher"),
        shapes=[(1, 8), (2, 16)],
        threads=1,
        device="cpu",
        repeats=7,
    )
    assert [(r["model"], r["batch"], r["repeats"]) for r in result["latency"]] == [
        ("student", 1, 7),
        ("teacher", 1, 7),
        ("student", 2, 7),
        ("teacher", 2, 7),
    ]
    for timed in result["latency"]:
        assert 0 < timed["p50_ms"] <= timed["p95_ms"]
        assert timed["peak_memory_mb"] > 10
    assert [r["model"] for r in result["speedup"]] == ["student", "student"]
    assert result["models"]["teacher"]["flops"] == flops(tiny(4), length=8)
    assert result["models"]["student"]["parameters"] == parameters(tiny(2))
    text = format_bench(result)
    assert "student" in text
    assert "1 x 8" in text
    assert not psutil.Process().children()


def test_failing_child_is_a_user_error_and_leaves_no_process(graph: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    (tmp_path / "config.json").write_bytes((graph / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"bad: .* cannot be timed with onnx"):
        latency({"good": graph, "bad": tmp_path}, [(1, 8)], backend="onnx", threads=1, repeats=1)
    assert not psutil.Process().children()


def test_too_long_a_row_names_the_limit(folders: dict[str, Path]) -> None:
    job = {"path": str(folders["flat"]), "backend": "torch", "threads": 1, "device": "cpu"}
    inbox: queue.Queue[dict[str, Any]] = queue.Queue()
    answers: list[dict[str, Any]] = []
    for length in (POSITIONS, POSITIONS + 1):
        inbox.put({"batch": 1, "length": length, "repeats": 2, "warmup": 0})
    inbox.queue.appendleft(job)
    with pytest.raises(UserError, match=f"length 65 is more than its {POSITIONS} positions"):
        timer._serve(inbox, answers.append)
    with pytest.raises(UserError, match="length 65 is more"):
        flops(tiny(), length=POSITIONS + 1)
    assert [len(answer.get("ms", [])) for answer in answers] == [0, 2]


def test_killed_child_is_a_user_error(graph: Path) -> None:
    with Child("graph", graph, "onnx", 1, None) as child:
        assert child.process is not None
        os.kill(child.process.pid, signal.SIGKILL)
        with pytest.raises(UserError, match="Perhaps it was killed"):
            child.ready()
    assert not psutil.Process().children()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every model loads the libraries")
def test_forked_children_end_with_their_parent_and_their_server(folders: dict[str, Path]) -> None:
    me = psutil.Process()
    path = folders["flat"]
    with ForkServer(1) as server, Child("flat", path, "torch", 1, "cpu", server) as first:
        assert first.ready() == "cpu"
        (forked,) = me.children(recursive=True)[1:]
        with Child("flat", path, "torch", 1, "cpu", server) as second:
            assert second.ready() == "cpu"
            assert len(second.turn(1, 4, repeats=2, warmup=0)["ms"]) == 2
        assert len(first.turn(1, 4, repeats=3, warmup=0)["ms"]) == 3, "the other's end is its own"
        os.kill(forked.pid, signal.SIGKILL)
        with pytest.raises(UserError, match="ended"):
            first.turn(1, 4, repeats=1, warmup=0)
        server.process.kill()
        server.process.wait()
        with (
            pytest.raises(UserError, match="gone: the process timing"),
            Child("gone", path, "torch", 1, "cpu", server) as third,
        ):
            third.ready()
    assert not me.children(recursive=True)


def test_child_ends_with_its_parent(graph: Path) -> None:
    with Child("graph", graph, "onnx", 1, None) as child:
        assert child.process is not None
        child.ready()
        child._asks.close()  # what the system does when a parent dies
        assert child.process.wait(timeout=60) == 0


def test_bad_arguments_start_no_process(folders: dict[str, Path]) -> None:
    models = {"flat": folders["flat"]}
    with pytest.raises(UserError, match="no model at"):
        latency({"gone": Path("nowhere")}, [(1, 8)])
    with pytest.raises(UserError, match="holds no token"):
        latency(models, [(0, 8)])
    with pytest.raises(UserError, match="no backend"):
        latency(models, [(1, 8)], backend="tf")  # pyright: ignore[reportArgumentType]


def test_onnx_backend_takes_a_folder_or_a_file(graph: Path) -> None:
    models = {"folder": graph, "file": graph / "model.onnx"}
    rows = latency(models, [(2, 8)], backend="onnx", threads=1, repeats=2)
    assert [(r["model"], r["backend"], r["device"]) for r in rows] == [
        ("folder", "onnx", "cpu"),
        ("file", "onnx", "cpu"),
    ]


def test_onnx_backend_wants_the_vocabulary(graph: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes((graph / "model.onnx").read_bytes())
    with pytest.raises(UserError, match=r"config\.json"):
        latency({"alone": tmp_path}, [(2, 8)], backend="onnx", threads=1, repeats=2)
