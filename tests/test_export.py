"""The exported folder: the model's own numbers, whole or not at all, and run without raybert."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import GOOD, VOCAB, make_tokenizer, toy_encoder
from methods.test_conformance import CASES, finished
from torch import nn
from transformers import AutoModelForSequenceClassification

import raybert.export as export_module
from raybert import parity
from raybert.cli import main
from raybert.errors import UserError
from raybert.export import export
from raybert.folders import owned
from raybert.grid import may_saturate
from raybert.int8 import Int8Linear, Scheme, backend
from raybert.models import HEADS, load, write_probe
from raybert.onnx_first import keep_first
from raybert.onnx_trace import input_names, to_onnx, trace, translate
from raybert.recipe_file import load_recipe, recipe_from
from raybert.results import read_run
from raybert.run import compress

FAMILIES = ("bert", "roberta", "distilbert")
KINDS = ("classification", "qa", "mlm")
SHAPES = ((2, 9), (1, 1), (1, 7), (5, 1), (3, 40))


def toy(family: str, kind: str, **config: Any) -> Any:
    """A random model with a head."""
    settings = toy_encoder(family).config
    for key, value in config.items():
        setattr(settings, key, value)
    torch.manual_seed(1)
    return HEADS[kind].from_config(settings).eval()


def padded(model: Any, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random rows, each shorter than the one before, and two kinds of tokens."""
    draw = torch.Generator().manual_seed(batch * 100 + length)
    ids = torch.randint(5, len(VOCAB), (batch, length), generator=draw)
    own = (length - 2 * torch.arange(batch)).clamp(min=1)[:, None]
    mask = (torch.arange(length) < own).long()
    types = (torch.arange(length) >= length // 2).long().expand_as(ids)
    inputs = {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": types.contiguous()}
    return {name: inputs[name] for name in input_names(model)}


def session(graph: Any) -> Any:
    """Without products that the processor cuts off, as those do that lack VNNI instructions."""
    options = onnxruntime.SessionOptions()
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer]
    matrices = [torch.from_numpy(a).T for a in arrays if a.dtype == np.int8 and a.ndim == 2]
    if backend() == "float" and any(may_saturate(matrix) for matrix in matrices):
        if any(node.domain for node in graph.graph.node):
            options.add_session_config_entry("session.x64quantprecision", "1")
        else:  # ONNX Runtime cannot do both here; as it is written, the graph multiplies floats
            level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.graph_optimization_level = level
    return onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def differences(model: Any, graph: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The largest difference of a logit of real tokens, for each row, ascending: [batch]."""
    with torch.no_grad():
        wanted = [value for value in model(**inputs).values() if isinstance(value, torch.Tensor)]
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    found = session(graph).run(None, arrays)
    mask = inputs["attention_mask"]
    worst = torch.zeros(len(mask))
    for expected, array in zip(wanted, found, strict=True):
        assert array.shape == tuple(expected.shape)
        apart = (torch.from_numpy(array) - expected).abs()
        if expected.dim() == 3:
            apart = apart.amax(2)
        if expected.dim() == 3 or len(wanted) == 2:
            apart = apart * mask
        worst = worst.maximum(apart.amax(1))
    return worst.sort().values


def difference(model: Any, graph: Any, inputs: dict[str, torch.Tensor]) -> float:
    return differences(model, graph, inputs)[-1].item()


def operators(graph: Any) -> list[str]:
    return [node.op_type for node in graph.graph.node]


# -- the graph -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_for_any_shape(family: str, kind: str) -> None:
    model = toy(family, kind)
    graph = to_onnx(model)
    onnx.checker.check_model(graph)
    for shape in SHAPES:
        assert difference(model, graph, padded(model, *shape)) < 1e-5
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast", "gelu_accurate", "quick_gelu"])
def test_activations_of_other_models(name: str) -> None:
    config = toy("bert", "classification").config
    config.hidden_act = name
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert difference(model, to_onnx(model), padded(model, 2, 9)) < 1e-5


def test_graph_holds_what_it_needs_and_no_more() -> None:
    model = toy("bert", "mlm")
    graph = to_onnx(model)
    kinds = operators(graph)
    assert not {"If", "Loop", "Scan", "Transpose"} & set(kinds)
    assert kinds.count("Attention") == 4
    assert kinds.count("Gemm") == 4 * 6 + 2
    names = [tensor.name for tensor in graph.graph.initializer]
    tied = {"cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"}
    assert len(tied & set(names)) == 1
    assert len(names) == len(set(names))
    text = graph.SerializeToString().decode("latin-1")
    for place in (str(Path.cwd()), str(Path.home()), ".py", "stack_trace"):
        assert place not in text
    assert not graph.graph.value_info


def test_operator_that_has_no_translation_is_named() -> None:
    model = toy("bert", "classification")

    class Odd(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(hidden)

    model.dropout = Odd()
    with pytest.raises(UserError, match="bessel_j0"):
        to_onnx(model)


def test_finalisers_of_other_libraries_stay_out_of_the_graph() -> None:
    model = toy("bert", "classification")
    tensor, looked = torch.ones(2), []

    class Engine:
        def __init__(self) -> None:
            self.itself = self  # left to the collector

        def __del__(self) -> None:
            looked.append(tensor.is_pinned())

    class Head(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            Engine()
            return hidden

    model.dropout = Head()
    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        graph = trace(model).graph
        assert gc.isenabled()
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    assert looked
    assert "is_pinned" not in str(graph)


@pytest.mark.parametrize("family", FAMILIES)
def test_last_layer_of_a_classifier_is_computed_for_one_token(family: str) -> None:
    def ranks(kind: str) -> list[int]:
        graph = trace(toy(family, kind)).graph
        keep_first(graph)
        linear = [node for node in graph.nodes if "linear" in str(node.target)]
        return [node.meta["val"].dim() for node in linear]

    found = ranks("classification")
    assert found.count(3) == 3 * 6 + 2  # the last layer's keys and values
    assert found.count(2) == 4 + 2  # and the rest of it, pooler and classifier
    assert set(ranks("qa")) == {3}


@pytest.mark.parametrize("number", range(len(CASES)))
def test_every_method_exports(number: int) -> None:
    family = FAMILIES[number % 3]
    kind = ("classification", "qa", "classification", "mlm")[number % 4]
    model = finished([CASES[number]], family, kind).model.eval()
    inputs = padded(model, 4, 10)
    program = trace(model)
    for int8 in ("fused", "qdq") if CASES[number]["name"] == "q8bert" else ("fused",):
        graph = translate(program, int8=int8)
        onnx.checker.check_model(graph)
        apart = differences(model, graph, inputs)
        # A number half-way between two levels of a range may go to either, in one row.
        between = CASES[number]["name"] == "q8bert"
        assert apart[-2] < 1e-4
        assert apart[-1] < (0.05 if between else 1e-4)
        if int8 == "qdq":
            assert {node.domain for node in graph.graph.node} == {""}


def test_whole_chain_exports() -> None:
    chain = [{"name": name} for name in ("theseus", "lobert", "q8bert")]
    model = finished(chain, "bert", "classification").model.eval()
    graph = to_onnx(model)
    assert operators(graph).count("Attention") == 2
    assert difference(model, graph, padded(model, 3, 12)) < 1e-4


# -- integers --------------------------------------------------------------------------------------


class OneLayer(nn.Module):
    """A table of floats, and an integer layer on top."""

    def __init__(self, layer: Int8Linear, table: torch.Tensor) -> None:
        super().__init__()
        self.table, self.layer = nn.Parameter(table, requires_grad=False), layer

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.layer(nn.functional.embedding(input_ids, self.table))


def one_layer(scheme: Scheme, most: int = 127) -> tuple[OneLayer, torch.Tensor]:
    """Scales that are powers of 2, so that float32 loses nothing, and inputs beyond the range."""
    draw = torch.Generator().manual_seed(3)
    layer = Int8Linear(24, 16, scheme)
    scale = torch.full((16 if scheme.per_row else 1,), 2.0**-6)
    if scheme.per_row:
        scale[::2] /= 4
    whole = torch.randint(-most, most + 1, (16, 24), generator=draw)
    layer.fill(whole * scale[:, None], scale)
    if scheme.inputs == "static":
        layer.input_scale = torch.tensor(2.0**-5)
    layer.fill_bias(torch.randn(16, generator=draw), scale)
    table = torch.randn(30, 24, generator=draw) * 2
    table[0, :3] = torch.tensor([2.5, -0.5, 1.5]) * 2.0**-5  # halves round to even
    return OneLayer(layer, table).eval(), whole


@pytest.mark.parametrize("int8", ["fused", "qdq"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("ranges", ["static", "dynamic", "asymmetric"])
def test_integer_products_are_numpys(ranges: Any, per_row: bool, int8: Any) -> None:
    asymmetric = ranges == "asymmetric"
    inputs: Any = "static" if asymmetric else ranges
    scheme = Scheme(inputs=inputs, per_row=per_row, asymmetric=asymmetric)
    # Scales that are no powers of 2 need integer products, which 7 bits allow on any processor.
    module, whole = one_layer(scheme, 63 if (inputs, int8) == ("dynamic", "qdq") else 127)
    layer, zero = module.layer, 128
    if asymmetric:
        zero = 41
        layer.input_zero.fill_(zero)
    ids = torch.arange(30).view(5, 6)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    program = torch.export.export(module, (ids,), dynamic_shapes={"input_ids": sizes})
    graph = translate(program, int8=int8)
    (found,) = session(graph).run(None, {"input_ids": ids.numpy()})

    x = module.table.numpy()[ids]
    static = inputs == "static"
    scale = np.float32(layer.input_scale if static else np.abs(x).max() / np.float32(127))
    q = np.clip(np.rint(x / scale), -zero, 255 - zero).astype(np.int32)  # [5, 6, 24]
    product = q @ whole.numpy().T.astype(np.int32)
    factor = scale * layer.weight_scale.numpy()
    assert layer.bias is not None
    bias = layer.bias.numpy() * factor if static else layer.bias.numpy()
    wanted = product.astype(np.float32) * factor + bias
    if static:
        assert (q == -zero).any()
        assert np.array_equal(found, wanted)
    else:
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found, module(ids).detach().numpy(), rtol=1e-6, atol=1e-6)


def test_integer_weights_stay_bytes_and_values_are_quantised_once() -> None:
    model = finished([{"name": "q8bert"}], "bert", "mlm").model.eval()
    graph = to_onnx(model)
    floats = [t for t in graph.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert all(len(tensor.dims) < 2 for tensor in floats)
    bytes_ = [t for t in graph.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert sum(tensor.dims == [len(VOCAB), 32] for tensor in bytes_) == 1  # words and decoder
    kinds = operators(graph)
    assert kinds.count("MatMulIntegerToFloat") == 4 * 6 + 2
    assert kinds.count("QuantizeLinear") == 4 * 4 + 2  # queries, keys and values share one
    assert kinds.count("Transpose") == 1  # the table, for the decoder


# -- parity ----------------------------------------------------------------------------------------


class Wrong(nn.Module):
    """A graph that gives the model's logits, and something more."""

    def __init__(self, model: Any, shift: Any, turn: float = 1.0) -> None:
        super().__init__()
        self.model, self.shift, self.turn = model, shift, turn

    def forward(self, **inputs: torch.Tensor) -> Any:
        with torch.no_grad():
            out = self.model(**{k: v for k, v in inputs.items() if k != "labels"})
        out["logits"] = out["logits"] * self.turn + self.shift
        return out


def test_logits_that_differ_are_refused() -> None:
    model = toy("bert", "classification")
    batches = [padded(model, 2, 8)]
    report = parity.logit_parity(model, Wrong(model, 1e-5), batches, integer=False)
    assert report["largest_difference"] == pytest.approx(1e-5, rel=0.1)
    assert report["shapes"] == [[2, 8], [1, 1]]
    assert parity.logit_parity(model, Wrong(model, 0.01), batches, integer=True)
    for shift in (0.01, float("nan")):
        with pytest.raises(UserError, match=r"other logits .* Nothing was written"):
            parity.logit_parity(model, Wrong(model, shift), batches, integer=False)


def test_a_gate_that_rounding_tips_over_in_few_rows_refuses_no_export() -> None:
    def compared(model: Any, shift: float, rows: int) -> dict[str, Any]:
        tipped = (torch.arange(8) < rows)[:, None]
        graph = Wrong(model, 0.0)
        graph.forward = lambda **x: Wrong(model, shift * tipped[: len(x["input_ids"])])(**x)
        return parity.logit_parity(model, graph, [padded(model, 8, 9)] * 2, integer=False)

    gated = finished([{"name": "ebert"}], "bert", "classification").model.eval()
    report = compared(gated, 0.01, 1)  # of 17 rows, counting the one that is always added
    assert report["tipped"] == 3
    assert report["largest_difference"] == pytest.approx(0.01, rel=0.1)
    plain = toy("bert", "classification")
    assert compared(plain, 1e-5, 8)["tipped"] == 0
    for model, shift, rows in ((plain, 0.01, 1), (gated, 0.01, 2), (gated, 0.1, 1)):
        with pytest.raises(UserError, match="other logits"):
            compared(model, shift, rows)


def test_score_that_differs_is_refused(teacher: Path) -> None:
    model = load(teacher)
    data = export_module._rows(
        load_recipe(str(teacher / "recipe.yaml")),
        export_module.load_tokenizer(str(teacher / "model")),
    )
    assert data is not None
    same = parity.metric_parity(model, Wrong(model, 0.0), data, 16, integer=False)
    assert same["torch"] == same["onnx"]
    assert same["rows"] == 41
    with pytest.raises(UserError, match="on the dev rows"):
        parity.metric_parity(model, Wrong(model, 0.0, turn=-1), data, 16, integer=False)
    parity.metric_parity(model, Wrong(model, 0.0, turn=-1), data, 16, integer=True)  # is reported


# -- the folder ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy teacher, exported by the command line against itself."""
    out = tmp_path_factory.mktemp("exported") / "onnx"
    words = ["measure.batches=[1]", "measure.length=8", "measure.seconds=0.02"]
    argv = ["export", str(teacher), *words, "--out", str(out), "--against", str(teacher)]
    assert main([*argv, "--threads", "1"]) == 0
    return out


def test_folder_is_complete_and_its_report_true(exported: Path, teacher: Path) -> None:
    names = {"model.onnx", "tokenizer.json", "config.json", "inference.py", "export.json"}
    assert names | {"README.md"} <= {path.name for path in exported.iterdir()}
    report = json.loads((exported / "export.json").read_text(encoding="utf-8"))
    assert report["metrics"]["torch"] == report["metrics"]["onnx"]
    assert report["parity"]["largest_difference"] < 1e-4
    assert len({tuple(shape) for shape in report["parity"]["shapes"]}) >= 4
    assert report["bytes"] == (exported / "model.onnx").stat().st_size
    assert [row["model"] for row in report["latency"]] == ["model", "teacher"]
    assert [row["model"] for row in report["speedup"]] == ["model"]
    for file in exported.iterdir():
        assert str(teacher).encode() not in file.read_bytes()
    assert [path.name for path in exported.parent.iterdir()] == ["onnx"]


def run_plainly(folder: Path, *words: str) -> Any:
    """`inference.py` where importing torch, transformers or raybert fails."""
    block = "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'raybert')))\n"
    code = f"{block}sys.argv = {['inference.py', *words]!r}\n" + (
        "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_script_needs_neither_torch_nor_raybert(exported: Path, teacher: Path) -> None:
    text = f"the film was {GOOD[0]}"
    model: Any = load(teacher)
    tokenizer = make_tokenizer()
    with torch.no_grad():
        scores = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
    answer = run_plainly(exported, text, "--threads", "1")
    assert answer["label"] == model.config.id2label[int(scores.argmax())]
    assert list(answer["scores"].values()) == pytest.approx(scores.tolist(), abs=1e-5)


def test_what_is_there_is_not_overwritten(exported: Path, teacher: Path, capsys, tmp_path) -> None:
    argv = ["export", str(teacher), "--no-latency", "--out"]
    before = (exported / "export.json").read_bytes()
    assert main([*argv, str(exported)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (exported / "export.json").read_bytes() == before
    (tmp_path / "mine.txt").write_text("mine")
    assert main([*argv, str(tmp_path), "--overwrite"]) == 2
    assert "is not an exported model" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


class Broken(parity.OnnxModel):
    """A graph that gives other logits."""

    def forward(self, **inputs: torch.Tensor) -> Any:
        out = super().forward(**inputs)
        out["logits"] = out["logits"] + 1
        return out


def test_failed_check_leaves_nothing_and_keeps_what_was(
    teacher: Path, tmp_path: Path, monkeypatch
) -> None:
    out = tmp_path / "onnx"
    export(teacher / "model", out=out, time=False, tell=lambda text: None)
    before = (out / "model.onnx").stat().st_mtime_ns

    monkeypatch.setattr(export_module, "OnnxModel", Broken)
    with pytest.raises(UserError, match="other logits"):
        export(teacher / "model", out=out, time=False, overwrite=True, tell=lambda text: None)
    assert (out / "model.onnx").stat().st_mtime_ns == before
    assert os.listdir(tmp_path) == ["onnx"]


def test_run_whose_export_fails_is_reported_without(
    toy: Any, teacher: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    method = [{"name": "q8bert", "weight_bits": 7}]
    keys: Any = {"teacher": str(teacher), "method": method, "train": {"max_steps": 1}}
    recipe = toy(tmp_path / "run", export="onnx", **keys)
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "OnnxModel", Broken)
        with pytest.raises(UserError, match=r"finished and its report written.*other logits"):
            compress(recipe, tell=lambda text: None)
    assert read_run(tmp_path / "run").report.onnx is None
    compress(recipe, tell=lambda text: None)  # exports what is finished, and trains nothing
    assert read_run(tmp_path / "run").report.onnx is not None


def test_products_that_some_processors_cut_off_are_told() -> None:
    model = finished([{"name": "q8bert", "weight_bits": 7}], "bert", "classification").model
    assert export_module.saturating(model) == []
    layer = model.bert.encoder.layer[0].output.dense
    layer.weight[0, :2] = 100
    (said,) = export_module.saturating(model)
    assert "1 of 26 matrices" in said
    assert "weight_bits=7" in said


@pytest.mark.parametrize("kind", ["classification", "qa", "mlm"])
@pytest.mark.parametrize("bits", [7, 8])
def test_products_of_activations_are_cut_off_nowhere_where_one_has_seven_bits(kind, bits) -> None:
    chain = [{"name": "ma_bert"}, {"name": "q8bert", "weight_bits": bits, "integer_only": True}]
    model = finished(chain, "bert", kind).model
    said = export_module.saturating(model)
    assert any("Products of two activations" in text for text in said) == (bits == 8)
    if bits == 7:  # on any processor that these tests run on
        assert difference(model, to_onnx(model), padded(model, 3, 9)) < 1e-4


def test_inputs_that_stay_floats_are_cut_off_nowhere() -> None:
    model = finished([{"name": "q8bert", "mode": "none"}], "bert", "classification").model
    model.bert.encoder.layer[0].output.dense.weight[0, :2] = 100
    assert export_module.saturating(model) == []


def test_only_what_it_is_is_told_of_a_metric() -> None:
    metrics = {"f1": 0.8214, "best_f1_threshold": -1.5, "perplexity": 12.25}
    found = {
        "parity": {"largest_difference": 1e-6, "shapes": [[1, 1]], "scale": 2.0},
        "model": {"kind": "qa"},
        "int8": None,
        "bytes": 1000,
        "notes": [],
        "metrics": {"rows": 7, "torch": metrics, "onnx": {**metrics, "perplexity": 12.5}},
        "latency": [],
    }
    cells = [line.split("|")[1:-1] for line in export_module.format_export(found).splitlines()]
    rows = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells if row}
    assert rows["f1"] == ["0.821", "0.821"]
    assert rows["best_f1_threshold"] == ["-1.500", "-1.500"]
    assert rows["perplexity"] == ["12.250", "12.500"]


@pytest.mark.parametrize(
    ("changes", "int8", "said"),
    [
        ({}, None, ('inference.py "a text"\n', "onnxruntime>=1.23", "up to 64 tokens")),
        ({"pairs": True, "longest": 512}, "qdq", ('"a second text"', "1.24", "up to 512 tokens")),
        ({"kind": "qa", "pairs": True}, None, ('inference.py "a text" "a context"\n',)),
        ({"kind": "mlm", "mask": "<mask>"}, None, ('"a text with <mask> in it"\n',)),
    ],
)
def test_the_folder_says_how_it_is_run(changes, int8, said) -> None:
    found = {
        "parity": {"largest_difference": 1e-6, "shapes": [[1, 1]], "scale": 2.0},
        "model": {"kind": "classification", "max_length": 64, **changes},
        **{"int8": int8, "bytes": 1000, "notes": [], "metrics": None, "latency": []},
    }
    text = export_module._readme(found)
    assert all(words in text for words in said)


def test_what_was_stored_in_half_precision_is_exported_in_float32(tmp_path: Path) -> None:
    model = toy("bert", "classification").bfloat16()
    saved(tmp_path, model.float())
    model.bfloat16().save_pretrained(tmp_path)
    out = export(tmp_path, time=False, tell=lambda text: None)
    (logits,) = onnxruntime.InferenceSession(str(out / "model.onnx")).get_outputs()
    assert logits.type == "tensor(float)"


def test_model_without_a_task_says_what_was_not_checked(teacher: Path, tmp_path: Path) -> None:
    folder = export(teacher / "model", out=tmp_path / "a", time=False, tell=lambda text: None)
    report = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    assert report["metrics"] is None
    assert "no metric" in report["notes"][0]
    assert report["model"]["kind"] == "classification"
    assert report["latency"] == []


def test_missing_packages_are_named(teacher: Path, tmp_path: Path, monkeypatch) -> None:
    find = export_module.importlib.util.find_spec
    monkeypatch.setattr(
        export_module.importlib.util,
        "find_spec",
        lambda name: None if name == "onnx" else find(name),
    )
    with pytest.raises(UserError, match=r'needs onnx; run: pip install "raybert\[onnx\]"'):
        export(teacher, out=tmp_path / "onnx", tell=lambda text: None)


@pytest.mark.parametrize(("int8", "taken"), [("fused", True), ("qdq", False)])
def test_a_runtime_that_is_too_old_is_refused_before_anything(int8, taken, monkeypatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    refused = pytest.raises(UserError, match=r"onnxruntime is 1\.23\.2, and 1\.24 is the first")
    with contextlib.nullcontext() if taken else refused:
        export_module.need_packages(int8)


def test_a_graph_that_the_runtime_does_not_load_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(UserError, match="does not load the exported graph"):
        parity.OnnxModel(tmp_path / "model.onnx")


def copied_run(teacher: Path, folder: Path) -> Path:
    """A run of the toy task, to be exported into."""
    shutil.copytree(teacher, folder)
    return folder


def test_an_export_beside_another_teacher_leaves_the_runs_report(
    teacher: Path, tmp_path: Path, capsys
) -> None:
    run = copied_run(teacher, tmp_path / "run")
    before = (run / "report.json").read_bytes()
    words = ["measure.batches=[1]", "measure.length=8", "measure.seconds=0.02"]
    assert main(["export", str(run), *words, "--against", str(teacher)]) == 0
    assert (run / "report.json").read_bytes() == before
    assert "the run's own report is left as it was" in "".join(capsys.readouterr())
    assert main(["export", str(run), *words, "--overwrite"]) == 0
    assert read_run(run).report.onnx is not None


def test_two_exports_of_a_run_are_not_made_at_once(
    teacher: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("raybert.folders.PATIENCE", 0.1)
    run = copied_run(teacher, tmp_path / "run")
    with owned(run):
        assert main(["export", str(run), "--no-latency"]) == 2
    assert "another process is working in" in "".join(capsys.readouterr())
    assert not (run / "onnx").exists()


# -- inference.py for every kind -------------------------------------------------------------------


def saved(folder: Path, model: Any) -> Path:
    """A model folder as a run leaves it."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    write_probe(model, folder, padded(model, 2, 6))
    return folder


def script(folder: Path, **recipe: Any) -> tuple[Any, Any]:
    """An exported model as its `inference.py` gives it, and its settings."""
    out = export(
        folder, recipe_from(recipe) if recipe else None, time=False, tell=lambda text: None
    )
    space: dict[str, Any] = {"__name__": "inference", "__file__": str(out / "inference.py")}
    exec((out / "inference.py").read_text(encoding="utf-8"), space)
    return space["Model"](threads=1), space


def test_several_labels(tmp_path: Path) -> None:
    names = {0: "one", 1: "two", 2: "three"}
    model = toy(
        "bert",
        "multilabel",
        num_labels=3,
        id2label=names,
        problem_type="multi_label_classification",
    )
    run, _ = script(saved(tmp_path / "m", model))
    texts = ["good film", "the plot was bad and the actor was very poor"]
    batch = make_tokenizer()(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = model(**batch).logits.sigmoid()
    for answer, wanted in zip(run(texts), scores.tolist(), strict=True):
        assert list(answer["scores"].values()) == pytest.approx(wanted, abs=1e-5)
        assert answer["labels"] == [names[i] for i in range(3) if wanted[i] > 0.5]


def test_numbers_of_pairs(tmp_path: Path) -> None:
    model = toy("roberta", "regression", num_labels=1, problem_type="regression")
    run, _ = script(saved(tmp_path / "m", model))
    texts, pairs = ["good film"] * 20, ["a plot", "the actor was weak"] * 10
    batch = make_tokenizer(types=False)(texts, pairs, padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = model(**batch).logits[:, 0]
    found = [answer["score"] for answer in run(texts, pairs)]
    assert found == pytest.approx(scores.tolist(), abs=1e-5)
    with pytest.raises(ValueError, match="one for each"):
        run(texts, pairs[:1])


def test_masked_words(tmp_path: Path) -> None:
    model = toy("distilbert", "mlm")
    run, _ = script(saved(tmp_path / "m", model))
    text = "the [MASK] was very [MASK]"
    batch = make_tokenizer()(text, return_tensors="pt")
    with torch.no_grad():
        scores = model(**batch).logits.softmax(-1)[0]
    places = [2, 5]
    answer = run([text])[0]["tokens"]
    for found, place in zip(answer, places, strict=True):
        best = scores[place].topk(5)
        assert [VOCAB[word] for word in found] == best.indices.tolist()
        assert list(found.values()) == pytest.approx(best.values.tolist(), abs=1e-5)
    with pytest.raises(ValueError, match="MASK"):
        run(["the film"])
    out = tmp_path / "m" / "onnx"
    assert 'inference.py "a text with [MASK] in it"' in (out / "README.md").read_text()
    refused = subprocess.run(
        [sys.executable, "inference.py", "the film"], cwd=out, capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "error: no [MASK] in the text" in refused.stderr


def test_answers_are_raybert_s(tmp_path: Path) -> None:
    from raybert.checkpoint import World
    from raybert.evaluate import predict
    from raybert.metrics import predictions

    contexts = [
        "the film was good and " * 9 + "the actor was weak",
        "a plot , but not a great film",
    ]
    rows = [
        {
            "id": str(n),
            "question": "was the film very good",
            "context": context,
            "answers": {"text": ["film"], "answer_start": [context.index("film")]},
        }
        for n, context in enumerate(contexts)
    ]
    for name in ("train", "dev"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "dev")}
    data = {**files, "max_length": 32, "stride": 8, "cache": str(tmp_path / "cache"), "n_best": 32}
    recipe = {"task": "qa", "data": data}
    model = toy("bert", "qa")
    run, _ = script(saved(tmp_path / "m", model), **recipe)
    prepared = export_module._rows(recipe_from(recipe), make_tokenizer())
    assert prepared is not None
    assert len(prepared.splits["dev"]) > 2
    world = World(0, 1, torch.device("cpu"))
    index, outputs = predict(model, prepared, "dev", world, 4)
    wanted = [answer for _, answer in predictions(prepared.task, prepared, "dev", index, outputs)]
    answers = run([row["question"] for row in rows], contexts)
    assert [answer["answer"] for answer in answers] == wanted
    for answer, context in zip(answers, contexts, strict=True):
        assert context[answer["start"] :].startswith(answer["answer"])
    assert json.dumps(run(["was it"], [""]), allow_nan=False)
