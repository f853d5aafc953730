"""MA-BERT: PowerNorm against its formulas, softmax nets, masks, folding, export, both stages."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import OTHER, make_tokenizer, one_and_two
from methods.test_conformance import finished, outputs, predecessor, rows
from test_export import difference, operators, padded
from torch import nn
from transformers import BertConfig

import raybert
from raybert import checks, warm_start
from raybert.checks import check_memory, memory_needed
from raybert.cli import main
from raybert.compressed import longest_input
from raybert.config import KDConfig
from raybert.errors import UserError
from raybert.fold import Affine, Within, folded
from raybert.import_ma_bert import import_ma_bert
from raybert.int8 import check_trainable
from raybert.methods.ma_bert import MABERT, exchange, power_norms, softmax_nets
from raybert.onnx_trace import to_onnx, trace, translate
from raybert.phase import At, Distillation, Taps
from raybert.plan import describe, make_plan, resolve_paths
from raybert.power_norm import PowerNorm, RealTokens
from raybert.recipe_file import recipe_from
from raybert.run import compress
from raybert.softmax_net import MatrixAttention, SoftmaxNet, real_tokens
from raybert.surgery import encoder_layers, model_inputs, self_attention
from raybert.warm_start import Queries, fit_net, net_error, put, random_net

FAMILIES = ("bert", "roberta", "distilbert")
every_family = pytest.mark.parametrize("family", FAMILIES)
CASE = {"name": "ma_bert", "length": 24, "fit_steps": 4, "layer_steps": 2}
FORBIDDEN = {"Softmax", "Gelu", "Erf", "Exp", "Sqrt", "Div", "LayerNormalization", "Attention"}


# -- PowerNorm -------------------------------------------------------------------------------------


class Reading:
    """PowerNorm as the formulas say it, for one optimiser step of several passes."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray, eps: float) -> None:
        self.weight, self.bias, self.eps = weight, bias, eps
        self.phi, self.nu, self.updates = np.ones_like(weight), np.zeros_like(weight), 0

    def step(self, passes: list[tuple[np.ndarray, ...]], warmup: int, alpha: float) -> list:
        """Passes of x, mask and dL/dy -> y, dL/dx, dL/dweight and dL/dbias of each."""
        found, squares, tokens, gz, zz = [], 0.0, 0.0, 0.0, 0.0
        for x, mask, grad in passes:
            real = mask[..., None]
            moment = (x**2 * real).sum((0, 1)) / real.sum()
            psi = np.sqrt((moment if self.updates < warmup else self.phi) + self.eps)
            z = x / psi
            g = grad * self.weight
            dx = (g - self.nu * z * real) / psi
            found.append(
                (self.weight * z + self.bias, dx, (grad * z).sum((0, 1)), grad.sum((0, 1)))
            )
            squares, tokens = squares + (x**2 * real).sum((0, 1)), tokens + real.sum()
            gz, zz = gz + (g * z * real).sum((0, 1)), zz + (z**2 * real).sum((0, 1))
        self.updates += 1
        share = 1 / self.updates if self.updates <= warmup else 1 - alpha
        self.phi = self.phi + share * (squares / tokens - self.phi)
        self.nu = self.nu * (1 - (1 - alpha) * zz / tokens) + (1 - alpha) * gz / tokens
        return found


def test_power_norm_is_what_the_formulas_say():
    draw = np.random.default_rng(0)
    layer = nn.LayerNorm(5, eps=1e-3)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(draw.normal(size=5)))
        layer.bias.copy_(torch.from_numpy(draw.normal(size=5)))
    norm, real = PowerNorm(layer), RealTokens()
    reading = Reading(
        layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy(), 1e-3
    )
    norm.observe(real)
    norm.warmup = 3
    for step in range(6):
        passes = []
        for number in range(2):
            mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, number, 0, 0]])
            x = draw.normal(loc=0.5, scale=step + 1, size=(3, 4, 5))
            passes.append((x, mask, draw.normal(size=x.shape) * mask[..., None]))
        wanted = reading.step(passes, 3, 0.8)
        for (x, mask, grad), expected in zip(passes, wanted, strict=True):
            given = torch.tensor(x, dtype=torch.float32, requires_grad=True)
            real.mask = torch.from_numpy(mask)
            norm.zero_grad()
            out = norm(given)
            out.backward(torch.tensor(grad, dtype=torch.float32))
            assert given.grad is not None
            found: tuple[Any, ...] = (
                *(out.detach(), given.grad),
                *(norm.weight.grad, norm.bias.grad),
            )
            for one, two in zip(found, expected, strict=True):
                np.testing.assert_allclose(one.numpy(), two, rtol=2e-4, atol=2e-5)
        norm.update(0.8)
        np.testing.assert_allclose(norm.running_phi.numpy(), reading.phi, rtol=1e-4)
        np.testing.assert_allclose(norm.nu.numpy(), reading.nu, rtol=1e-3, atol=1e-5)
        assert norm.updates == step + 1
    assert reading.nu.any()
    phi = norm.running_phi.clone()
    norm.update(0.8)  # nothing was seen since
    assert torch.equal(norm.running_phi, phi)
    assert norm.updates == 6
    norm.settle()
    x = torch.randn(2, 3, 5)
    scale = norm.weight / (phi + 1e-3).sqrt()
    for training in (True, False):
        torch.testing.assert_close(norm.train(training)(x), x * scale + norm.bias)
    assert set(norm.state_dict()) == {"weight", "bias", "running_phi", "nu", "updates"}


STATISTICS = """
from torch import nn
from raybert.power_norm import PowerNorm, RealTokens

torch.manual_seed(0)
norm, real = PowerNorm(nn.LayerNorm(4)), RealTokens()
norm.observe(real)
norm.warmup = 2
rows, goal = torch.randn(5, 4, 3, 4), torch.randn(4, 3, 4)
mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
grads = []
for x in rows:
    norm.update(0.5)
    given = x[rank::workers].clone().requires_grad_()
    real.mask = mask[rank::workers]
    kept = (norm(given) - goal[rank::workers]) * real.mask.unsqueeze(-1)
    kept.square().sum((1, 2)).mean().backward()
    whole = torch.zeros_like(x)
    whole[rank::workers] = given.grad / workers
    if workers > 1:
        dist.all_reduce(whole)
    grads.append(whole)
norm.update(0.5)
found = {"phi": norm.running_phi, "nu": norm.nu, "grads": torch.stack(grads)}
"""


def test_two_workers_take_the_statistics_that_one_takes(tmp_path):
    one, two, three = one_and_two(STATISTICS, tmp_path)
    for key in one:
        assert torch.equal(two[key], three[key])
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-6)
    assert one["nu"].abs().min() > 0


# -- softmax nets and masks ------------------------------------------------------------------------


class Plain(nn.Module):
    """A linear layer that is not one, as a quantised layer is none."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.linear = [linear]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear[0](x)


def test_a_shorter_input_counts_as_padded_with_zeros():
    net = SoftmaxNet(7, torch.empty(0))
    put(net, random_net(7, 3))
    scores = torch.randn(2, 2, 5, 5)
    whole = torch.zeros(2, 2, 5, 7)
    whole[..., :5] = scores
    wanted = net.out(torch.relu(net.hidden(whole)))[..., :5]
    torch.testing.assert_close(net(scores), wanted)
    with pytest.raises(UserError, match=r"8 tokens is longer than ma_bert.length, 7"):
        net(torch.randn(1, 1, 8, 8))
    net.hidden, net.out = Plain(net.hidden), Plain(net.out)
    torch.testing.assert_close(net(whole)[..., :5], wanted)


def test_every_form_of_a_mask_says_which_tokens_are_real():
    kept = torch.tensor([[1, 1, 1], [1, 0, 0]])
    wanted = kept[..., None].bool()
    boolean = kept.bool()[:, None, None]
    added = torch.zeros(2, 1, 3, 3).masked_fill(~boolean, torch.finfo(torch.float32).min)
    for mask in (boolean, boolean.expand(2, 1, 3, 3), added):
        found = real_tokens(mask)
        assert found is not None
        assert torch.equal(found, wanted)
    assert real_tokens(None) is None


@every_family
def test_padding_changes_nothing(family):
    done = finished([CASE], family, "classification")
    inputs = {k: v for k, v in rows("classification").items() if k != "labels"}
    wider = {
        k: nn.functional.pad(v, (0, 9), value=7 * (k == "input_ids")) for k, v in inputs.items()
    }
    for attention in ("sdpa", "eager"):
        done.model.set_attn_implementation(attention)
        with torch.no_grad():
            one, two = (done.model(**each).logits for each in (inputs, wider))
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@every_family
def test_padding_changes_no_statistic(family):
    found = []
    for extra in (0, 6):
        model = predecessor(family)
        phase = MABERT(length=24, warm_start=False, warmup=1).phases()[0]
        phase.initialise(model, [])
        phase.prepare(model)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        batch = rows("classification")
        batch |= {
            key: nn.functional.pad(batch[key], (0, extra))
            for key in ("input_ids", "attention_mask")
        }
        for step in range(3):
            phase.on_step(model, At(step, 3, step, 0))
            model.zero_grad()
            model(**batch).loss.backward()
        phase.on_step(model, At(3, 3, 3, 0))
        norms = power_norms(model)
        found.append([(norm.running_phi, norm.nu, norm.weight.grad) for norm in norms])
        assert all(norm.updates == 3 for norm in norms)
        assert len(norms) == 1 + 2 * len(encoder_layers(model))
    for one, two in zip(*found, strict=True):
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-5)


def test_a_student_without_softmax_distils_its_nets_outputs():
    model, teacher = predecessor("bert"), predecessor("bert")
    teacher.set_attn_implementation("eager")
    model.set_attn_implementation("eager")
    phase = MABERT(length=24, fit_steps=2).phases()[0]
    batch = rows("classification")
    phase.initialise(model, [batch])
    phase.prepare(model)
    taps = [Taps(each, hidden=True, attention=True) for each in (model, teacher)]
    out, taught = (
        tap.collect(each(**batch)) for tap, each in zip(taps, (model, teacher), strict=True)
    )
    kd = KDConfig(
        alpha=0.9, temperature=15, form="soft_ce", hidden=1, attention=100, embeddings=True,
        over_layers="sum",
    )  # fmt: skip
    terms = Distillation(kd, "classification", (1, 2, 3, 4)).losses(out, taught, batch)
    mask = batch["attention_mask"].bool()
    pairs = mask[:, None, :, None] & mask[:, None, None]
    wanted = 0.0
    for a, b in zip(out.attention, taught.attention, strict=True):
        square = ((a - b) ** 2 * pairs).sum((1, 2, 3)) / (pairs.sum((1, 2, 3)) * a.shape[1])
        wanted += 100 * square.mean().item()
    assert terms["kd_attention"].item() == pytest.approx(wanted, rel=1e-4)
    hidden = 0.0
    for a, b in zip(out.hidden, taught.hidden, strict=True):
        square = ((a - b) ** 2 * mask[..., None]).sum((1, 2)) / (mask.sum(1) * a.shape[-1])
        hidden += square.mean().item()
    assert len(out.hidden) == 5
    assert terms["kd_hidden"].item() == pytest.approx(hidden, rel=1e-4)


# -- the start -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_the_fit_comes_closer_to_the_model_than_no_fit(shared):
    model, many = predecessor("bert"), padded(predecessor("bert"), 12, 24)
    calibration = [many, padded(model, 11, 23), padded(model, 10, 22)]
    phase = MABERT(length=24, fit_steps=60, shared=shared).phases()[0]
    facts = phase.initialise(model, calibration)
    for what, count in (("softmax nets", 4), ("norms", 9), ("layers", 4)):
        before, after = (
            facts[f"relative error of {what} {when} the fit"] for when in ("before", "after")
        )
        assert len(before) == len(after) == count
        assert all(after[name] < before[name] for name in after)
        assert all(0 < error < 1 for error in after.values())
    own, inputs = copy.deepcopy(model), model_inputs(model, many)
    with torch.no_grad():
        wanted = own(**inputs, output_hidden_states=True).hidden_states[-1]
    distances = []
    for steps in (0, 60):
        other = copy.deepcopy(model)
        phase = MABERT(length=24, fit_steps=60, layer_steps=steps, shared=shared).phases()[0]
        facts = phase.initialise(other, calibration)
        assert ("relative error of layers after the fit" in facts) == (steps > 0)
        phase.prepare(other)
        assert len(softmax_nets(other)) == (1 if shared else 4)
        with torch.no_grad():
            found = other.eval()(**inputs, output_hidden_states=True).hidden_states[-1]
        real = inputs["attention_mask"].bool()
        distances.append((found - wanted)[real].norm().item())
    assert distances[1] < 0.8 * distances[0]
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), model.parameters(), strict=True))


def test_a_net_that_exists_is_found_again():
    draw = torch.Generator().manual_seed(1)
    scores = torch.randn(3000, 6, generator=draw)
    real = torch.ones_like(scores, dtype=torch.bool)
    queries = Queries(scores, scores.softmax(-1), real)
    values = fit_net(queries, 300, 0)
    assert net_error(queries, values) < 0.3 < net_error(queries, random_net(6, 0))


# -- folding and export ----------------------------------------------------------------------------


def shaken(model: Any) -> Any:
    """Statistics and weights that no norm would hide."""
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for norm in power_norms(model):
            norm.running_phi.copy_(torch.rand(norm.nu.shape, generator=draw) * 3 + 0.2)
            norm.bias.copy_(torch.randn(norm.nu.shape, generator=draw) * 0.3)
            norm.weight[0] = -norm.weight[0]
    return model


@every_family
def test_folded_equals_unfolded(family):
    model = shaken(finished([CASE], family, "qa").model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = folded(model)
    for one, two in zip(outputs(model), outputs(other), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert not power_norms(other)
    assert sum(isinstance(module, Affine) for module in other.modules()) == 1
    assert sum(isinstance(module, Within) for module in other.modules()) == len(power_norms(model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), "the model itself is left alone"


def test_bounds_hold_whatever_comes_and_in_the_graph_too():
    model = shaken(finished([CASE], "bert", "classification").model)
    inputs = padded(model, 3, 24)
    free = outputs(model)
    for norm in power_norms(model):
        norm.get_buffer("bound").uniform_(0.2, 0.9)
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    for norm, state in zip(power_norms(model)[::2], states, strict=True):
        largest = state[inputs["attention_mask"].bool()].abs().amax(0)
        assert (largest <= norm.get_buffer("bound")).all()
        assert (largest == norm.get_buffer("bound")).any(), "and it is reached"
    assert not torch.allclose(outputs(model)[0], free[0], atol=1e-2)
    other = folded(model)
    for one, two in zip(outputs(model), outputs(other), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    graph = to_onnx(model)
    assert operators(graph).count("Min") == len(power_norms(model))
    for shape in ((2, 9), (1, 1), (3, 24)):
        assert difference(model, graph, padded(model, *shape)) < 1e-4


def test_bounds_are_what_the_calibration_rows_reach_and_stay_with_the_model(tmp_path):
    run = finished([CASE], "bert", "classification")
    bounds = [norm.get_buffer("bound") for norm in power_norms(run.model)]
    assert all(bound.shape == (32,) and bound.isfinite().all() for bound in bounds)
    entry = run.model.config.compression[0]
    assert entry["bounded"] is True
    config = copy.deepcopy(run.model.config)
    assert MABERT().resolve(config).bounded is True, "training on, they are there"
    with pytest.raises(UserError, match=r"bounded=false is not what this model was made with"):
        MABERT(bounded=False).resolve(config)
    alone = finished([{**CASE, "warm_start": False}], "bert", "classification").model
    assert all(norm.bound is None for norm in power_norms(alone))
    with pytest.raises(UserError, match=r"ma_bert\.bounded needs ma_bert\.warm_start"):
        MABERT(bounded=True, warm_start=False).resolve(predecessor("bert").config)
    del config.compression[0]["bounded"]  # a model of an earlier version
    assert not MABERT().resolve(config).bounded


def test_calibration_rows_go_through_attention_a_few_at_a_time(monkeypatch):
    """And the fit is the same."""
    model, batch = predecessor("bert"), padded(predecessor("bert"), 12, 24)
    found = []
    for count in (1000, 5):
        monkeypatch.setattr(warm_start, "ROWS", count)
        phase = MABERT(length=24, fit_steps=20, layer_steps=0).phases()[0]
        facts = phase.initialise(model, [batch])
        found.append([value for part in facts.values() for value in part.values()])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_calibration_that_memory_has_no_room_for_is_refused_before_training(monkeypatch, tmp_path):
    encoder = BertConfig(num_hidden_layers=12)
    needs = {
        rows: MABERT(calibration_rows=rows).calibration_bytes(encoder, 128) for rows in (256, 4096)
    }
    # What the layers give of all rows alone.
    assert needs[256] > 12 * 256 * 128 * 768 * 4
    assert needs[4096] > 10 * needs[256]
    assert MABERT(warm_start=False).calibration_bytes(encoder, 128) == 0
    counted = {"parameters": {"total": 10**6}}
    recipe = recipe_from({"method": [{"name": "ma_bert", "calibration_rows": 4096}]})
    needed = memory_needed(recipe, encoder, counted, counted)
    assert needed > needs[4096]
    monkeypatch.setattr(checks, "own_memory", lambda: (needed - 1, needed - 1))
    with pytest.raises(UserError, match=r"Use a smaller calibration_rows or train\.batch_size"):
        check_memory(needed, recipe, alone=True)


def test_moments_that_are_known_need_no_warm_up():
    cases: list[tuple[dict[str, Any], int]] = [({}, 0), ({"warm_start": False}, 50)]
    for given, wanted in [*cases, ({"warmup_share": 0.5}, 25)]:
        phase = MABERT(**given).resolve(predecessor("bert").config).phases()[0]
        model = predecessor("bert")
        phase.prepare(model)
        phase.on_step(model, At(0, 50, 0, 0))
        assert {norm.warmup for norm in power_norms(model)} == {wanted}


def test_a_warm_up_is_of_the_phase_that_it_is_asked_for_in():
    model = finished([CASE], "bert", "classification").model
    for norm in power_norms(model):
        norm.updates.fill_(1000)
    phase = MABERT(warmup=2).resolve(model.config).phases()[0]
    assert phase.initialise(model, []) == {}
    phase.prepare(model)
    model.train()
    phase.on_step(model, At(0, 50, 0, 0))
    norm = power_norms(model)[0]
    assert norm.real is not None
    norm.real.mask = None
    sizes = []
    for step in (1, 2, 3):
        norm(torch.full((2, 5, 32), float(step)))
        phase.on_step(model, At(step, 50, step, 0))
        sizes.append(norm.running_phi.mean().item())
    # A plain average of what was seen, then the running one.
    assert sizes == pytest.approx([1.0, 2.5, 0.9 * 2.5 + 0.1 * 9.0])
    assert norm.updates == 3


def test_a_norm_that_would_stretch_the_basis_too_far_is_kept():
    model = finished([CASE], "bert", "classification").model
    with torch.no_grad():
        power_norms(model)[3].weight[5] = 0.0
    other = folded(model)
    for one, two in zip(outputs(model), outputs(other), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert sum(isinstance(module, Affine) for module in other.modules()) == 2


@pytest.mark.parametrize(("family", "shared"), [("bert", False), ("distilbert", True)])
def test_nets_in_keys_and_values_give_what_attention_gives(family, shared):
    model = shaken(finished([{**CASE, "shared": shared}], family, "classification").model)
    for net in softmax_nets(model):
        with torch.no_grad():
            net.get_parameter("hidden.bias").normal_()
            net.get_parameter("out.bias").normal_()
    for shape in ((3, 24), (2, 7), (1, 1)):
        inputs = padded(model, *shape)
        found = {}
        for way in ("sdpa", "eager"):
            model.set_attn_implementation(way)
            with torch.no_grad():
                found[way] = model(**inputs, output_attentions=way == "eager")
        assert len(found["eager"].attentions) == 4
        one, two = found["sdpa"].logits, found["eager"].logits
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_factors_of_lobert_are_left_as_they_are():
    model = finished([{"name": "lobert"}, CASE], "bert", "classification").model
    assert folded(model) is model


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize(
    ("family", "shared"), [("bert", False), ("roberta", True), ("distilbert", False)]
)
def test_graph_is_matrix_arithmetic_alone(family, shared, start):
    case = {**CASE, "shared": shared, "warm_start": start}
    model = shaken(finished([case], family, "classification").model)
    program = trace(folded(model))
    graph = translate(program)
    kinds = set(operators(graph))
    assert not kinds & FORBIDDEN
    assert ("Min" in kinds) == start  # the norms' bounds
    assert kinds <= {
        "Min",
        *("MatMul", "Gemm", "Add", "Mul", "Relu", "Max"),  # arithmetic; Max is ReLU with a bias
        *("Reshape", "Transpose", "Slice", "Gather", "Concat", "Shape", "Cast", "Identity"),
        "Where",  # the mask: zeros for padding
        *("CumSum", "Equal", "Not", "Tanh"),  # RoBERTa's positions, and the pooler's
        *("Expand", "GatherElements"),  # RoBERTa's one type, for every token
    }
    for shape in ((2, 9), (1, 1), (3, 24)):
        assert difference(model, graph, padded(model, *shape)) < 1e-4
    if shared:
        assert [list(tensor.dims) for tensor in graph.graph.initializer].count([24, 24]) == 2
    # The last layer's keys and values are of all tokens, the rest of it of the first alone.
    linear = [n.meta["val"] for n in program.graph.nodes if "linear" in str(n.target)]
    ranks = [value.dim() for value in linear]
    assert (ranks.count(3), ranks.count(2)) == (3 * 6 + 2, 4 + 2)
    products = [n.meta["val"] for n in program.graph.nodes if "matmul" in str(n.target)]
    queries = [isinstance(value.shape[2], int) for value in products if value.dim() == 4]
    assert queries == [False] * 6 + [True] * 2
    scores = [value for value in products if value.dim() == 4][::2]
    assert {value.shape[3] for value in scores} == {24}, "N, whatever the length is"


@every_family
def test_a_language_models_head_alone_keeps_other_functions(family):
    kinds = operators(to_onnx(finished([CASE], family, "mlm").model.eval()))
    assert sorted(kind for kind in kinds if kind in FORBIDDEN) == ["Gelu", "LayerNormalization"]


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_integers_after_ma_bert(family):
    model = finished([CASE, {"name": "q8bert"}], family, "classification").model
    graph = to_onnx(model)
    kinds = operators(graph)
    assert not set(kinds) & FORBIDDEN
    assert "Gemm" not in kinds
    assert kinds.count("MatMulIntegerToFloat") == 4 * 8 + 2  # softmax nets' too
    for shape in ((2, 9), (1, 1), (3, 24)):
        assert difference(model, graph, padded(model, *shape)) < 0.05
    with pytest.raises(UserError, match="inference only"):
        check_trainable(model)


# -- mistakes --------------------------------------------------------------------------------------


def test_rows_longer_than_the_nets_are_refused_before_training(toy, teacher, tmp_path):
    keys = {"teacher": str(teacher), "method": [{"name": "ma_bert", "length": 24}]}
    with pytest.raises(UserError, match=r"data.max_length 32 is more than ma_bert.length 24"):
        make_plan(resolve_paths(toy(tmp_path / "a", **keys)))
    plan = make_plan(resolve_paths(toy(tmp_path / "b", **{**keys, "method": ["ma_bert"]})))
    assert plan.recipe.method[0].model_dump()["length"] == 32
    assert "of 32 tokens" in describe(plan)
    longer = toy(tmp_path / "d", **{**keys, "method": ["ma_bert"], "measure": {"length": 48}})
    plan = make_plan(resolve_paths(longer))
    assert [note for note in plan.notes if "rows of 32, not of measure.length=48" in note]
    assert "of 32 tokens" in describe(plan)
    keys["train"] = {"precision": "fp16"}
    with pytest.raises(UserError, match="fp16"):
        make_plan(resolve_paths(toy(tmp_path / "c", **{**keys, "method": ["ma_bert"]})))


@pytest.mark.parametrize(("dropout", "advised"), [(None, True), (0.2, True), (0.0, False)])
def test_dropout_is_advised_against(toy, teacher, tmp_path, dropout, advised):
    keys = {"teacher": str(teacher), "method": ["ma_bert"], "train": {"dropout": dropout}}
    notes = make_plan(resolve_paths(toy(tmp_path / "run", **keys))).notes
    assert any("train.dropout=0 trains better" in note for note in notes) == advised


@pytest.mark.parametrize("before", ["q8bert", "ebert"])
def test_models_that_it_cannot_follow_are_named(before):
    config = predecessor("bert").config
    config.compression = [{"name": before}]
    with pytest.raises(UserError, match=f"ma_bert cannot follow {before}"):
        MABERT().resolve(config)


def test_a_larger_length_for_an_ma_bert_is_refused():
    config = finished([CASE], "bert", "classification").model.config
    assert longest_input(config) == 24
    for method in (MABERT(), MABERT(length=16)):
        assert method.resolve(config).continues
        assert method.resolve(config).length == 24
    for wrong in (MABERT(length=32), MABERT(shared=True)):
        with pytest.raises(UserError, match=r"ma_bert cannot follow ma_bert.*length 24"):
            wrong.resolve(config)


# -- both stages -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Recipe keys of plain text, and the folder of a model with a masked-language head."""
    folder = tmp_path_factory.mktemp("text")
    draw = np.random.default_rng(0)
    for name, count in (("train", 40), ("dev", 12)):
        lines = [" ".join(draw.choice(OTHER, 8)) for _ in range(count)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    predecessor("bert", "mlm").save_pretrained(folder / "bert")
    make_tokenizer().save_pretrained(folder / "bert")
    return {"train": str(folder / "train.txt"), "dev": str(folder / "dev.txt")}


def transfer(text: dict[str, str], out: Path, teacher: str) -> Any:
    return recipe_from(
        {
            "task": "mlm",
            "data": {**text, "max_length": 32, "cache": str(out.parent / "cache")},
            "teacher": teacher,
            "method": [{"name": "ma_bert", "fit_steps": 4}],
            "kd": {"alpha": 0.9, "form": "soft_ce", "hidden": 1.0, "attention": 100.0},
            "train": {"epochs": 1, "batch_size": 4},
            "measure": {"batches": []},
            "out": str(out),
        }
    )


def test_what_transfer_on_text_leaves_is_a_start_for_a_task(text, toy, teacher, tmp_path):
    masked = str(Path(text["train"]).parent / "bert")
    stage_a = compress(transfer(text, tmp_path / "a", masked), tell=lambda _: None)
    facts = json.loads((stage_a / "report.json").read_text())["facts"]["transfer"]
    assert len(facts["relative error of softmax nets after the fit"]) == 4
    keys: dict[str, Any] = {"model": str(stage_a), "teacher": str(teacher)}
    method = [{"name": "ma_bert", "epochs": 0}]
    untrained = compress(toy(tmp_path / "b", method=method, **keys), tell=lambda _: None)
    start, went_on = raybert.load(stage_a), raybert.load(untrained)
    assert [entry["name"] for entry in went_on.config.compression] == ["ma_bert"]
    assert type(went_on).__name__ == "CompressedBertForSequenceClassification"
    found = went_on.state_dict()
    body = {name: t for name, t in start.state_dict().items() if name.startswith("bert.")}
    assert len(body) > 100
    for name, tensor in body.items():
        if not name.endswith(".updates"):  # they are of the phase
            assert torch.equal(found[name], tensor), name
    kd = {"alpha": 0.9, "form": "soft_ce", "hidden": 1.0, "attention": 100.0, "embeddings": True}
    # Its rows are shorter than those of stage (a).
    keys |= {"data": {"max_length": 12}, "method": ["ma_bert"], "kd": kd}
    trained = compress(toy(tmp_path / "c", train={"epochs": 1}, **keys), tell=lambda _: None)
    assert longest_input(raybert.load(trained).config) == 32
    norms = power_norms(raybert.load(trained))
    assert all(norm.updates > 0 for norm in norms)
    # A language model has no pooler: the task's is the teacher's, and the head that knows it.
    knows = raybert.load(teacher).state_dict()
    lent = [name for name in found if ".pooler." in name or name.startswith("classifier.")]
    assert len(lent) == 4
    assert all(torch.equal(found[name], knows[name]) for name in lent)


def test_text_without_a_masked_language_head_is_refused(text, encoder, tmp_path):
    recipe = transfer(text, tmp_path / "run", str(encoder))
    with pytest.raises(UserError, match=r"BertModel: it was not fine-tuned for mlm"):
        make_plan(resolve_paths(recipe))
    alone = {"teacher": None, "model": str(encoder)}
    with pytest.raises(UserError, match=r"BertModel: it has no masked-language head.*finetune"):
        make_plan(resolve_paths(recipe.model_copy(update=alone)))
    plain = {**alone, "method": (), "kd": KDConfig.model_validate({})}
    plan = make_plan(resolve_paths(recipe.model_copy(update=plain)))
    assert any("head is new, and learns from nothing" in note for note in plan.notes)
    headed = {**plain, "model": str(Path(text["train"]).parent / "bert")}
    assert not make_plan(resolve_paths(recipe.model_copy(update=headed))).notes


def test_an_ma_bert_is_not_its_own_teacher(toy, tmp_path):
    made = finished([CASE], "bert", "mlm").model
    made.save_pretrained(tmp_path / "a")
    make_tokenizer().save_pretrained(tmp_path / "a")
    keys = {"model": str(tmp_path / "a"), "data": {"max_length": 24}, "method": ["ma_bert"]}
    with pytest.raises(UserError, match=r"has been through ma_bert already.*teacher="):
        make_plan(resolve_paths(toy(tmp_path / "run", **keys)))
    assert make_plan(resolve_paths(toy(tmp_path / "run", **{**keys, "method": []})))
    assert make_plan(resolve_paths(toy(tmp_path / "run", **{**keys, "method": ["q8bert"]})))


# -- the authors' checkpoints ----------------------------------------------------------------------


def upstream(model: Any, family: str, shared: bool) -> dict[str, torch.Tensor]:
    """A finished masked-language model's weights as the authors' code would name them."""
    found = {f"{family}.embeddings.position_ids": torch.arange(160)[None]}
    holder = "transformer" if family == "distilbert" else "encoder"
    inner = "attention" if family == "distilbert" else "attention.self"
    for name, value in model.state_dict().items():
        key = name
        for ours, theirs in (("hidden", "0"), ("out", "2")):
            key = key.replace(f"softmax_net.{ours}", f"softmax.linear_relu_stack.{theirs}")
        if shared and key.startswith(f"{family}.{holder}.softmax."):
            own = key.replace(f"{holder}.", "", 1)
            found[own] = value
            for layer in range(4):
                tail = own.removeprefix(f"{family}.")
                found[f"{family}.{holder}.layer.{layer}.{inner}.{tail}"] = value
            continue
        if key.endswith("running_phi"):
            found[key.replace("running_phi", "accumulated_var")] = torch.zeros(1, 32, 1, 1)
            value = value.view(1, -1, 1, 1)
        elif key.endswith(".nu"):
            key, value = key.replace(".nu", ".ema_gz"), value.view(1, -1, 1, 1) / 0.1
        elif key.endswith(".updates"):
            key, value = key.replace(".updates", ".iters"), value.view(1)
        found[key] = value
    return found


@pytest.mark.parametrize(
    ("family", "shared"), [("bert", False), ("bert", True), ("distilbert", False)]
)
def test_the_authors_checkpoints_are_imported(tmp_path, family, shared, capsys):
    case = {**CASE, "shared": shared, "bounded": False}
    model = shaken(finished([case], family, "mlm").model)
    base = tmp_path / "base"
    predecessor(family, "mlm").save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    torch.save(upstream(model, family, shared), tmp_path / "ckpt.pt")
    words = ["import-ma-bert", str(tmp_path / "ckpt.pt"), "--model", str(base)]
    assert main([*words, "--out", str(tmp_path / "made")]) == 0
    made = raybert.load(tmp_path / "made")
    for one, two in zip(outputs(made), outputs(model), strict=True):
        torch.testing.assert_close(one, two)
    state = made.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(state[name], tensor)
    assert made.config.compression[0]["shared"] is shared
    assert longest_input(made.config) == 24
    assert main([*words, "--out", str(tmp_path / "made")]) == 2
    assert "exists" in capsys.readouterr().err


def test_checkpoints_that_do_not_fit_are_listed(tmp_path):
    base = tmp_path / "base"
    predecessor("bert", "mlm").save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    good = upstream(finished([{**CASE, "bounded": False}], "bert", "mlm").model, "bert", False)
    file = tmp_path / "ckpt.pt"

    def refused(state: Any) -> str:
        torch.save(state, file)
        with pytest.raises(UserError) as error:
            import_ma_bert(file, str(base), tmp_path / "made")
        assert not (tmp_path / "made").exists()
        return str(error.value)

    odd = dict(good)
    del odd["bert.encoder.layer.1.output.LayerNorm.running_phi"]
    odd["bert.pooler.dense.weight"] = torch.zeros(32, 32)
    odd["bert.encoder.layer.0.output.dense.weight"] = torch.zeros(3, 3)
    text = refused(odd)
    for part in (
        "missing: bert.encoder.layer.1.output.LayerNorm.running_phi",
        "unexpected: bert.pooler.dense.weight",
        "bert.encoder.layer.0.output.dense.weight [3, 3], not [32, 64]",
    ):
        assert part in text
    assert "no softmax nets" in refused({k: v for k, v in good.items() if "relu_stack" not in k})
    name = "bert.encoder.layer.0.attention.self.softmax.linear_relu_stack.0.weight"
    for wrong in (torch.zeros(9, 24), torch.zeros(()), torch.zeros(24)):
        assert f"[24, 24]: {name} {list(wrong.shape)};" in refused({**good, name: wrong})
    name = "bert.encoder.layer.1.output.LayerNorm.iters"
    text = refused({**good, name: torch.zeros(2)})
    assert "of another shape: bert.encoder.layer.1.output.LayerNorm.updates [2], not []" in text
    assert "no state dict" in refused([1, 2])
    assert "cannot be read" in refused({"a": Path("x")})
    with pytest.raises(UserError, match="cannot be read"):
        import_ma_bert(tmp_path / "none.pt", str(base), tmp_path / "made")


# -- a model folder --------------------------------------------------------------------------------


def test_structure_is_as_the_paper_has_it():
    model = predecessor("bert")
    exchange(model, 12, shared=False)
    layers: list[Any] = list(encoder_layers(model))
    for layer in layers:
        attention = self_attention(layer)
        assert isinstance(attention, MatrixAttention)
        assert isinstance(layer.intermediate.intermediate_act_fn, nn.ReLU)
        shapes = {tuple(p.shape) for p in attention.net.parameters()}
        assert shapes == {(12, 12), (12,)}
    kinds = [type(module).__name__ for module in model.modules()]
    assert kinds.count("PowerNorm") == 9
    assert "LayerNorm" not in kinds
