"""Q8BERT against its formulas worked out by hand, and what its finished models are."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCAB, one_and_two
from safetensors.torch import load_file, save_file
from test_conformance import finished, outputs, predecessor, rows
from test_export import difference, padded
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

import raybert
from raybert.bench import flops, parameters
from raybert.config import KDConfig
from raybert.errors import UserError
from raybert.fake_quant import FakeQuantEmbedding, FakeQuantLinear, product
from raybert.int8 import Int8Embedding, Int8Linear, Scheme
from raybert.methods.q8bert import Q8BERT, Quantise, calibrate, learned_ranges, selected
from raybert.models import PROBE, verify_probe
from raybert.onnx_trace import to_onnx
from raybert.phase import At, Distillation, Outputs
from raybert.plan import make_plan, resolve_paths
from raybert.recipe_file import recipe_from
from raybert.results import read_run
from raybert.run import compress

NO_KD = Distillation(KDConfig.model_validate({}), "classification", ())


def method(**keys: Any) -> Q8BERT:
    return Q8BERT.model_validate(keys)


def prepared(model: Any, **keys: Any) -> Quantise:
    """A phase that has begun on a model, with its rows for calibration."""
    (phase,) = method(**keys).resolve(model.config).phases()
    assert isinstance(phase, Quantise)
    phase.initialise(model, [rows("classification")] if phase.calibration else [])
    phase.prepare(model)
    return phase


# -- forward and backward by hand ------------------------------------------------------------------


def layer_and_rows(scheme: Scheme, ema: float) -> tuple[FakeQuantLinear, torch.Tensor]:
    torch.manual_seed(0)
    layer = FakeQuantLinear(nn.Linear(6, 4), scheme)
    if scheme.inputs == "static":
        layer.input_range.ema.fill_(ema)
    return layer.train(), torch.randn(5, 6, requires_grad=True)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("inputs", ["static", "dynamic"])
def test_forward_and_backward_are_the_formulas(bits, per_row, inputs):
    scheme = Scheme(bits, bits, inputs, per_row)
    layer, x = layer_and_rows(scheme, ema=1.2)  # below the largest input, which is cut off
    assert layer.bias is not None
    out = layer(x)
    upstream = torch.randn(5, 4)
    out.backward(upstream)

    f32 = np.float32
    weight, bias, given = (t.detach().numpy() for t in (layer.weight, layer.bias, x))
    top = f32(2 ** (bits - 1) - 1)
    s_w = np.abs(weight).max(axis=1 if per_row else None, keepdims=per_row) / top  # [4, 1] or []
    s_x = (f32(1.2) if inputs == "static" else np.abs(given).max()) / top
    w_int = np.rint(weight / s_w)
    x_int = np.clip(np.rint(given / s_x), -top - 1, top)
    assert np.abs(w_int).max() == top
    assert (inputs == "dynamic") == (np.abs(given / s_x).max() <= top + 1e-4)
    steps = (s_x * s_w).reshape(-1)  # of the product
    b = np.rint(bias / steps) * steps if inputs == "static" else bias
    assert np.array_equal(out.detach().numpy(), (x_int @ w_int.T).astype(f32) * steps + b)

    # The rounding is passed as if it were not there, inside the range and outside.
    g = upstream.numpy()
    wanted = (g @ (w_int * s_w), g.T @ (x_int * s_x), g.sum(0))
    for tensor, value in zip((x, layer.weight, layer.bias), wanted, strict=True):
        assert tensor.grad is not None
        np.testing.assert_allclose(tensor.grad, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_an_asymmetric_range_has_a_zero_point(bits):
    layer, x = layer_and_rows(Scheme(8, bits, asymmetric=True), ema=0)
    layer.input_range.start(torch.tensor([0.2, 1.4]))  # below 0, above it: both are passed by
    out = layer(x)
    upstream = torch.randn(5, 4)
    out.backward(upstream)

    f32 = np.float32
    assert layer.bias is not None
    weight, bias, given = (t.detach().numpy() for t in (layer.weight, layer.bias, x))
    s_w = np.abs(weight).max() / f32(127)
    s_x = (f32(0.2) + f32(1.4)) / f32(2**bits - 1)
    zero = np.rint(f32(0.2) / s_x)
    assert zero == {8: 32, 4: 2}[bits]
    x_int = np.clip(np.rint(given / s_x) + zero, 0, 2**bits - 1) - zero
    assert {x_int.min(), x_int.max()} == {-zero, 2**bits - 1 - zero}
    w_int = np.rint(weight / s_w)
    wanted = (x_int @ w_int.T).astype(f32) * (s_x * s_w) + np.rint(bias / (s_x * s_w)) * (s_x * s_w)
    assert np.array_equal(out.detach().numpy(), wanted)
    assert x.grad is not None
    np.testing.assert_allclose(x.grad, upstream.numpy() @ (w_int * s_w), rtol=1e-5, atol=1e-6)
    integers = layer.finished(None)
    assert integers.input_zero.item() == zero
    assert torch.equal(integers(x), out)


def test_an_asymmetric_range_that_ends_at_zero_keeps_that_end():
    layer, x = layer_and_rows(Scheme(8, 8, asymmetric=True), ema=0)
    layer.input_range.start(torch.tensor([0.0, 2.0]))
    plain, _ = layer_and_rows(Scheme(8, 8, unsigned=True), ema=2.0)
    assert torch.equal(layer.eval()(x), plain.eval()(x))
    assert x.min() < 0


def test_weights_alone_are_quantised_where_inputs_are_not():
    layer, x = layer_and_rows(Scheme(3, 8, "float"), ema=0)
    scale = layer.weight.abs().max() / 3
    weight = torch.round(layer.weight / scale) * scale
    assert torch.allclose(layer(x), nn.functional.linear(x, weight, layer.bias), atol=1e-6)


@pytest.mark.parametrize("inputs", ["static", "dynamic"])
def test_outputs_are_put_on_a_grid_of_their_own(inputs):
    layer, x = layer_and_rows(Scheme(8, 3, inputs, requantise=True), ema=2.0)
    plain, _ = layer_and_rows(Scheme(8, 3, inputs), ema=2.0)
    out, before = layer(x), plain(x)
    step = before.abs().max() / 3  # nothing observed: its own range
    assert torch.allclose(out, torch.round(before / step).clamp(-4, 3) * step, atol=1e-6)
    if inputs == "static":
        layer.output_range.ema.fill_(0.3)
        assert layer(x).unique().tolist() == pytest.approx(
            [-0.4, -0.3, -0.2, -0.1, 0, 0.1, 0.2, 0.3]
        )


@pytest.mark.parametrize("per_row", [False, True])
def test_an_embedding_is_rounded_and_its_gradient_passes(per_row):
    torch.manual_seed(0)
    table = nn.Embedding(9, 5, padding_idx=0)
    fake = FakeQuantEmbedding(table, 4, per_row)
    ids = torch.tensor([[1, 8, 8], [0, 3, 0]])
    out = fake(ids)
    weight = table.weight.detach()
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-4) if per_row else weight.abs().max()
    assert torch.allclose(out, (torch.round(weight / scale * 7) * scale / 7)[ids], atol=1e-6)
    out.sum().backward()
    assert table.weight.grad is not None
    assert torch.allclose(table.weight.grad.sum(1), torch.tensor([0, 5, 0, 5, 0, 0, 0, 0, 10.0]))


def test_sums_of_levels_stay_in_the_range_of_half_precision():
    x = torch.full((2, 1024), 127.0)
    with torch.autocast("cpu", dtype=torch.float16):
        found = product(x, x)
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.tensor(1024.0 * 127**2), rtol=1e-3)


# -- ranges ----------------------------------------------------------------------------------------


def test_moving_averages_start_from_calibration_rows():
    model = predecessor("bert")
    batches = [rows("classification"), {k: v[:1, :4] for k, v in rows("qa").items() if v.dim() > 1}]
    inputs: list[list[float]] = []
    dense = model.bert.encoder.layer[1].output.dense
    hook = dense.register_forward_hook(
        lambda _, args, out: inputs.append([args[0].abs().max().item(), out.abs().max().item()])
    )
    (phase,) = method(requantise=True).phases()
    facts = phase.initialise(model, batches)
    hook.remove()
    assert len(inputs) == 2
    mean = np.mean(inputs, axis=0)
    name = "bert.encoder.layer.1.output.dense"
    (told,) = facts.values()
    assert told[name] == pytest.approx(mean[0])
    phase.prepare(model)
    layer = model.get_submodule(name)
    assert [layer.input_range.ema.item(), layer.output_range.ema.item()] == pytest.approx(mean)
    assert not any(len(m._forward_hooks) for m in model.modules() if isinstance(m, nn.Linear))


def test_both_ends_of_asymmetric_ranges_start_from_calibration_rows_and_move():
    model, batch = predecessor("bert"), rows("classification")
    ends: list[list[float]] = []
    name = "bert.encoder.layer.1.output.dense"
    hook = model.get_submodule(name).register_forward_hook(
        lambda _, args, out: ends.append([-args[0].min().item(), args[0].max().item()])
    )
    phase = prepared(model, asymmetric=True, ema_decay=0.75)
    hook.remove()
    one = model.get_submodule(name).input_range
    assert one.ema.tolist() == pytest.approx(ends[0])
    assert one.ema[0] < 0.2 < one.ema[1]  # GELU's
    before = one.ema.clone()
    model.train()
    phase.on_step(model, At(step=0, total=2, forward=0, seed=1))
    phase.losses(model, Outputs(model(**batch)), None, batch, NO_KD)
    seen = one.seen.clone()
    assert (seen > 0).all()
    phase.on_step(model, At(step=1, total=2, forward=1, seed=1))
    assert torch.allclose(one.ema, 0.75 * before + 0.25 * seen)


def test_a_layer_that_runs_several_times_has_one_range_for_all():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    x = torch.randn(3, 4)

    class Model(nn.Module):
        config = predecessor("bert").config

        def forward(self, input_ids):
            return model(input_ids)

    found = calibrate(Model(), {"0": shared}, [{"input_ids": x}])
    biggest = max(x.abs().max().item(), model[:2](x).abs().max().item())
    assert found["0"]["input"].item() == pytest.approx(biggest)


def test_the_average_moves_once_a_step_by_the_most_that_was_seen_in_it():
    model = predecessor("bert").train()
    phase = prepared(model, ema_decay=0.75)
    ranges = learned_ranges(model)
    start = [one.ema.item() for one in ranges]
    seen: list[list[float]] = []
    for forward, scale in enumerate((1.0, 3.0, 0.5)):  # two passes in step 0, one in step 1
        phase.on_step(model, At(step=forward // 2, total=2, forward=forward, seed=1))
        with torch.no_grad():
            model.bert.embeddings.LayerNorm.weight.fill_(scale)
        batch = rows("classification")
        phase.losses(model, Outputs(model(**batch)), None, batch, NO_KD)
        seen.append([one.seen.item() for one in ranges])
    # `seen` holds the most of a step until the next one begins.
    assert all(b >= a for a, b in zip(seen[0], seen[1], strict=True))
    assert any(b > a for a, b in zip(seen[0], seen[1], strict=True))
    moved = [0.75 * a + 0.25 * b for a, b in zip(start, seen[1], strict=True)]
    assert [one.ema.item() for one in ranges] == pytest.approx(moved)
    phase.on_step(model, At(step=2, total=3, forward=4, seed=1))
    again = [0.75 * a + 0.25 * b for a, b in zip(moved, seen[2], strict=True)]
    assert [one.ema.item() for one in ranges] == pytest.approx(again)
    assert all(one.seen.item() == 0 for one in ranges)


def test_evaluation_leaves_ranges_alone():
    model = predecessor("bert")
    phase = prepared(model)
    before = copy.deepcopy(model.state_dict())
    outputs(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert phase.metrics(model)["activation_range"] > 0


def test_training_sees_quantised_values_from_the_start_step_on():
    batch = rows("classification")
    dense = predecessor("bert")
    for part in dense.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    model = copy.deepcopy(dense)
    phase = prepared(model, weight_bits=3, activation_bits=3, start_step=2)
    dense.train()
    model.train()
    for step, same in enumerate((True, True, False)):
        phase.on_step(model, At(step, 4, step, 1))
        assert torch.allclose(model(**batch).logits, dense(**batch).logits, atol=1e-5) == same
    assert all(one.seen.item() > 0 for one in learned_ranges(model)), "observed all along"
    phase.on_step(model, At(0, 4, 0, 1))
    assert not torch.allclose(outputs(model)[0], outputs(dense)[0], atol=1e-3), "evaluated as it is"


RANGES = """
from transformers import BertConfig, BertForSequenceClassification
from raybert.config import KDConfig
from raybert.methods.q8bert import Q8BERT, learned_ranges
from raybert.phase import At, Distillation, Outputs

torch.manual_seed(0)
sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
model = BertForSequenceClassification(BertConfig(vocab_size=30, **sizes))
model.eval()  # dropout would differ from worker to worker
rows = {"input_ids": torch.randint(30, (4, 6)), "labels": torch.tensor([0, 1, 1, 0])}
phase = Q8BERT(ema_decay=0.5).phases()[0]
phase.initialise(model, [{"input_ids": rows["input_ids"] // 2}])
phase.prepare(model)
batch = {key: value[rank::workers] for key, value in rows.items()}
kd = Distillation(KDConfig(), "classification", ())
for step in range(3):
    phase.on_step(model, At(step, 3, step, 1))
    for one in learned_ranges(model):
        one.train()
    phase.losses(model, Outputs(model(**batch)), None, batch, kd)
found = torch.stack([t for one in learned_ranges(model) for t in (one.ema, one.seen)])
"""


def test_two_workers_see_what_one_sees(tmp_path):
    one, two, three = one_and_two(RANGES, tmp_path)
    assert torch.equal(two, three)
    assert torch.allclose(one, two, rtol=1e-5)
    assert one.min() > 0


# -- the finished model ----------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "share"), [(8, 0.25), (4, 0.125), (2, 0.0625)])
def test_it_takes_a_share_of_the_bytes(bits, share):
    config = BertConfig(
        vocab_size=500,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model = BertForSequenceClassification(config).eval()
    dense = {name: t.numel() * 4 for name, t in model.state_dict().items()}
    before = parameters(model)
    phase = prepared(model, weight_bits=bits)
    phase.finish(model)
    saved = {name: t.numel() * t.element_size() for name, t in model.state_dict().items()}
    for part in ("", "encoder"):
        ratio, whole = (
            sum(size for name, size in sizes.items() if part in name) for sizes in (saved, dense)
        )
        assert share <= ratio / whole < share + 0.02  # biases and norms keep their 32 bits
    assert parameters(model) == before, "as many weights as ever"


def test_every_linear_layer_and_embedding_is_quantised_and_norms_are_not():
    done = finished([{"name": "q8bert"}], "bert", "classification")
    kinds = [type(module) for module in done.model.modules()]
    assert kinds.count(Int8Linear) == 4 * 6 + 2
    assert kinds.count(Int8Embedding) == 3
    assert nn.Linear not in kinds
    assert nn.Embedding not in kinds
    assert {p.dtype for p in done.model.parameters()} == {torch.float32}
    assert all("LayerNorm" in name for name, _ in done.model.named_parameters())
    assert flops(done.model, length=16) == flops(predecessor("bert"), length=16)


def test_patterns_leave_modules_as_they_are():
    case = {"name": "q8bert", "skip": ["classifier", "*.layer.3.*", "*.position_embeddings"]}
    model = finished([case], "bert", "classification").model
    assert isinstance(model.classifier, nn.Linear)
    assert isinstance(model.bert.encoder.layer[3].output.dense, nn.Linear)
    assert isinstance(model.bert.encoder.layer[2].output.dense, Int8Linear)
    assert isinstance(model.bert.embeddings.position_embeddings, nn.Embedding)
    with pytest.raises(UserError, match="leaves nothing"):
        selected(predecessor("bert"), method(skip=["*"]))
    with pytest.raises(UserError, match=r"'clasifier' matches no layer .* classifier"):
        method(skip=["*.layer.3.*", "clasifier"]).check_model(lambda: predecessor("bert"))
    method(skip=["*.layer.3.*"]).check_model(lambda: predecessor("bert"))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_tied_decoder_shares_the_integers_of_the_embeddings(tmp_path, family, per_channel):
    case = {"name": "q8bert", "per_channel": per_channel, "embedding_bits": 4, "weight_bits": 8}
    model = finished([case], family, "mlm").model
    words, decoder = model.get_input_embeddings(), model.get_output_embeddings()
    assert decoder.matrix()[0] is words.integers()
    tables = [k for k, v in model.state_dict().items() if len(VOCAB) in v.shape and v.dim() == 2]
    assert len(tables) == 1
    assert parameters(model)["total"] == parameters(predecessor(family, "mlm"))["total"]

    taken: dict[str, torch.Tensor] = {}
    decoder.register_forward_hook(lambda _, args, out: taken.update(x=args[0], out=out))
    outputs(model)
    x, scale = taken["x"], decoder.input_scale
    table = words.integers().double() * words.weight_scale.double().view(-1, 1)
    bias = decoder.bias.double() * scale.double() * words.weight_scale.double()
    wanted = torch.round(x / scale).clamp(-128, 127).double() * scale.double() @ table.T + bias
    assert torch.allclose(taken["out"].double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keys", [{"embeddings": False}, {"skip": ["cls.predictions.decoder"]}])
def test_tied_weights_stay_floats_together(keys):
    model = finished([{"name": "q8bert", **keys}], "bert", "mlm").model
    assert isinstance(model, BertForMaskedLM)
    words, decoder = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(decoder, nn.Linear)
    assert decoder.weight is words.weight
    assert isinstance(model.cls.predictions.transform.dense, Int8Linear)


def test_training_mode_is_refused_before_anything_changes(tmp_path):
    done = finished([{"name": "q8bert"}], "bert", "classification")
    done.model.save_pretrained(tmp_path)
    for model in (done.model, raybert.load(tmp_path)):
        with pytest.raises(UserError, match=r"inference only.*quantised from"):
            model.train()
        assert not any(module.training for module in model.modules())
        assert model.eval() is model
        assert model.train(False) is model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_loads_in_half_precision_with_its_scales_whole(tmp_path, dtype):
    done = finished([{"name": "q8bert"}], "bert", "classification")
    done.model.save_pretrained(tmp_path)
    again = type(done.model).from_pretrained(tmp_path, dtype=dtype)
    assert again.dtype == dtype
    held, found = done.model.state_dict(), again.state_dict()
    for name, tensor in found.items():
        if name.endswith(("_scale", "dense.bias")):
            assert tensor.dtype == held[name].dtype, name
            assert torch.equal(tensor, held[name]), name
    moved = (outputs(again)[0] - outputs(done.model)[0]).abs().max()
    assert moved < 0.2 * outputs(done.model)[0].abs().max()


@pytest.mark.parametrize("bits", [3, 8])
def test_integers_stored_beside_half_precision_load_as_they_are(tmp_path, bits):
    case = {"name": "q8bert", "weight_bits": bits}
    model = finished([case], "bert", "classification").model.bfloat16()
    model.save_pretrained(tmp_path)
    again = raybert.load(tmp_path)
    held, found = model.state_dict(), again.state_dict()
    for name, tensor in found.items():
        if held[name].dtype == torch.bfloat16:
            assert tensor.dtype == torch.float32, name
        else:
            assert tensor.dtype == held[name].dtype, name
            assert torch.equal(tensor, held[name]), name
    assert {tensor.dtype for tensor in held.values()} >= {torch.bfloat16, torch.float32}
    assert outputs(again)[0].dtype == torch.float32


def test_what_runs_in_floats_is_called_simulated(monkeypatch):
    for name, real in (("onednn", True), ("float", False)):
        monkeypatch.setattr("raybert.methods.q8bert.backend", lambda device, name=name: name)
        assert method().simulated is not real
        assert method(mode="none").simulated
        assert any("float32" in text for text in method().remarks()) is not real
    stored = {8: "", 7: "a byte there", 4: "packed on disk"}
    for bits, said in stored.items():
        found = [text for text in method(weight_bits=bits).remarks() if "save no time" in text]
        assert len(found) == (bits < 8)
        assert said in " ".join(found)
    (found,) = (text for text in method(activation_bits=7).remarks() if "save no time" in text)
    assert "disk" not in found
    assert "there" not in found


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        *(({f"{part}_bits": 1}, f"{part}_bits.*2.*found 1") for part in ("weight", "activation")),
        ({"embedding_bits": 9}, "embedding_bits.*8.*found 9"),
        ({"calibration_rows": 0}, "calibration_rows is 0.*mode=dynamic"),
        ({"mode": "none", "requantise": True}, "requantise.*mode=ema or dynamic"),
        ({"mode": "static"}, "mode.*found 'static'"),
        ({"ema_decay": 1.0}, "ema_decay.*less than 1"),
        ({"mode": "dynamic", "asymmetric": True}, "asymmetric.*mode=dynamic.*mode=ema"),
    ],
)
def test_bad_parameters_are_refused(keys, said):
    with pytest.raises(UserError, match=said):
        recipe_from({"method": [{"name": "q8bert", **keys}]})


def test_calibration_without_rows_is_refused():
    (phase,) = method().phases()
    with pytest.raises(UserError, match="calibration rows"):
        phase.initialise(predecessor("bert"), [])


def test_a_start_step_beyond_the_end_is_told():
    (phase,) = method(start_step=100).phases()
    assert any("start_step 100" in text for text in phase.warnings(50))
    assert phase.warnings(200) == []


@pytest.fixture(scope="module")
def quantised(toy, teacher, tmp_path_factory) -> Path:
    """A run folder of a student that was only calibrated and trained a step."""
    folder = tmp_path_factory.mktemp("quantised") / "run"
    recipe = toy(folder, teacher=str(teacher), method="q8bert", train={"max_steps": 1})
    return compress(recipe, tell=lambda text: None)


def test_a_quantised_model_is_not_trained_or_compressed_again(toy, quantised, tmp_path):
    for keys, said in (
        ({"model": str(quantised)}, "cannot be trained"),
        ({"teacher": str(quantised), "method": "q8bert"}, "cannot be compressed again"),
        ({"teacher": str(quantised), "method": "theseus"}, "cannot be compressed again"),
    ):
        with pytest.raises(UserError, match=said):
            make_plan(resolve_paths(toy(tmp_path / "run", **keys)))


def test_a_quantised_model_can_teach(toy, quantised, teacher, tmp_path):
    keys = {"model": str(teacher), "teacher": str(quantised), "kd": {"alpha": 1.0, "cls": 1.0}}
    recipe = toy(tmp_path / "run", **keys, train={"max_steps": 2})
    folder = compress(recipe, tell=lambda text: None)
    assert (folder / "model" / "model.safetensors").is_file()


def test_a_level_more_or_less_is_no_damage(quantised):
    folder = quantised / "model"
    model = raybert.load(folder)
    stored = load_file(folder / PROBE)
    for noise, fits in ((0.03, True), (0.5, False)):
        moved = {**stored, "expected": stored["expected"] + noise}
        save_file(moved, folder / PROBE)
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="other outputs"):
            verify_probe(model, folder)
    save_file(stored, folder / PROBE)


def test_without_epochs_it_is_calibrated_and_no_more(toy, teacher, tmp_path):
    case = {"name": "q8bert", "epochs": 0, "embeddings": False}
    folder = compress(toy(tmp_path / "run", teacher=str(teacher), method=[case]), tell=print)
    report = json.loads((folder / "report.json").read_text())
    (phase,) = report["training"]["phases"]
    assert phase["steps"] == 0
    loaded: list[Any] = [raybert.load(run) for run in (teacher, folder)]
    taught, found = (model.classifier for model in loaded)
    off = found.weight * found.weight_scale - taught.weight
    assert off.abs().max() <= 0.51 * found.weight_scale
    assert 0.005 < found.input_scale < 0.01, "the pooler's outputs, below 1, in 127 levels"


def test_training_that_only_harms_leaves_the_calibrated_model(toy, teacher, tmp_path):
    keys = {"teacher": str(teacher), "method": "q8bert"}
    still = {"epochs": 1, "lr": 1e-12, "keep": "last"}
    harmed = {"epochs": 1, "lr": 1.0, "warmup": 0.0}
    found = {}
    for name, train in {
        "still": still,
        "harmed": harmed,
        "last": {**harmed, "keep": "last"},
    }.items():
        run = compress(toy(tmp_path / name, train=train, **keys), tell=lambda text: None)
        found[name] = read_run(run).report.student.score
    assert found["harmed"] == pytest.approx(found["still"], abs=0.03)  # one row of 41
    assert found["last"] < found["still"] - 0.1


def test_integers_alone_learn_no_attention():
    chain = [{"name": "ma_bert"}, {"name": "q8bert", "integer_only": True}]
    recipe = recipe_from({"method": chain, "kd": {"attention": 100.0}})
    with pytest.raises(UserError, match=r"kd\.attention cannot be learned\. Use two runs"):
        recipe.method[1].bind(recipe)
    untrained = method(integer_only=True, epochs=0)
    assert untrained.bind(recipe) is untrained
    assert recipe.method[1].bind(recipe_from({"method": chain, "kd": {"hidden": 1.0}}))


@pytest.mark.parametrize(
    ("modes", "left"),
    [
        ({}, ()),
        ({"attention": "self_tucker_layer", "attention_rank": [2, 12, 10], "ffn": None}, ()),
        ({"attention": "self_tucker_4d", "share": 0.8, "ffn": None}, ("self_tucker_4d",)),
        (
            {"attention": "self_tucker_vertical", "ffn": "ffn_tucker"},
            ("self_tucker_vertical", "ffn_tucker"),
        ),
    ],
)
def test_cores_that_layers_share_stay_floats_and_that_is_said(tmp_path, modes, left):
    # 7 bits are exact on every processor. For 8 on one without VNNI instructions ONNX Runtime would
    # have to turn weights unsigned, which it fails at where two products share one.
    last = {"name": "q8bert", "weight_bits": 7}
    done = finished([{"name": "lobert", **modes}, last], "bert", "classification")
    last = done.chain[-1]
    assert isinstance(last, Q8BERT)
    assert last.floats == left
    cores = [name for name, _ in done.model.named_parameters() if name.endswith(".core")]
    assert bool(cores) == bool(left)
    said = [text for text in last.remarks() if "stay float32" in text]
    done.model.eval().save_pretrained(tmp_path)
    again = raybert.load(tmp_path)
    for one, other in zip(outputs(again), outputs(done.model), strict=True):
        torch.testing.assert_close(one, other)
    assert difference(again, to_onnx(again), padded(again, 2, 9)) < 1e-3
    assert len(said) == bool(left)
    assert all(mode in said[0] for mode in left)
