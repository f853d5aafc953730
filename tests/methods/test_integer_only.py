"""MA-BERT and Q8BERT to integers alone: the graph, its numbers, and training that sees them."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import VOCAB
from methods.test_conformance import method_of, predecessor
from onnx import TensorProto
from test_export import difference, operators, padded

from raybert.compressed import mark_compressed
from raybert.errors import UserError
from raybert.fake_quant import FakeQuantLinear
from raybert.integer import (
    FakeQuantNorm,
    FakeQuantProduct,
    Int8Norm,
    Int8Product,
    norm_int8,
    norms_of,
    product_int8,
    set_units,
)
from raybert.methods.ma_bert import softmax_nets
from raybert.methods.q8bert import Q8BERT
from raybert.onnx_trace import to_onnx
from raybert.phase import At, Outputs, Taps
from raybert.power_norm import PowerNorm
from raybert.surgery import encoder_layers, matrices

LENGTH = 24
MATRIX = {"name": "ma_bert", "length": LENGTH, "fit_steps": 40}
INTEGER = {"name": "q8bert", "integer_only": True}
SHAPES = ((2, 9), (1, 1), (3, LENGTH))


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, len(VOCAB), (6, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(LENGTH) < torch.tensor([24, 20, 15, 24, 9, 3])[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def settled(chain: list[dict[str, Any]], family: str = "bert", kind: str = "qa") -> Any:
    """A toy model after surgery, fitted and calibrated, but not trained: its values stay small."""
    return copy.deepcopy(_settled(json.dumps(chain), family, kind))


@functools.cache
def _settled(words: str, family: str, kind: str) -> Any:
    return gone_through(predecessor(family, kind), json.loads(words))


def gone_through(model: Any, chain: list[dict[str, Any]]) -> Any:
    """The model after the methods' surgery."""
    for case in chain:
        method = method_of(case).resolve(model.config)
        for phase in method.phases():
            phase.initialise(model, [batch()])
            phase.prepare(model)
            phase.finish(model)
        mark_compressed(model, method)
    return model.eval()


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


# -- operators, in NumPy's integers ----------------------------------------------------------------


def levels(x: np.ndarray, scale: float, low: int = -128, high: int = 127) -> np.ndarray:
    return np.clip(np.rint(x / np.float32(scale)), low, high).astype(np.int64)


@pytest.mark.parametrize(("unsigned", "bits"), [(False, 8), (True, 8), (True, 7)])
def test_a_product_of_activations_is_that_of_integers(unsigned, bits):
    draw = np.random.default_rng(0)
    a = draw.normal(0, 1, (2, 3, 5, 8)).astype(np.float32)
    b = draw.normal(0, 1, (2, 3, 8, 7)).astype(np.float32)
    a[0, 0, 0, :2] = 1e6, -1e6
    bias = draw.normal(0, 1, 7).astype(np.float32)
    low, high = (0, 255) if unsigned else (-128, 127)
    ends = (-128, 127) if bits == 8 else (-64, 63)
    sums = levels(a, 0.01, low, high) @ levels(b, 0.02, *ends)
    scale = np.float32(0.01) * np.float32(0.02)
    wanted = sums.astype(np.float32) * scale + bias
    found = product_int8(
        torch.from_numpy(a),
        torch.from_numpy(b),
        torch.tensor(0.01),
        torch.tensor(0.02),
        torch.from_numpy(bias),
        unsigned,
        bits,
    )
    assert np.array_equal(found.numpy(), wanted)


def test_a_norm_is_one_of_integers():
    draw = np.random.default_rng(0)
    x = draw.normal(0, 1, (4, 6)).astype(np.float32)
    weight = draw.integers(-127, 128, (6, 1)).astype(np.int8)
    scale = draw.uniform(0.001, 0.1, 6).astype(np.float32)
    bias = draw.integers(-9000, 9000, 6).astype(np.int32)
    sums = levels(x, 0.02) * weight[:, 0] + bias
    factor = np.float32(0.02) * scale / np.float32(0.05)
    wanted = np.clip(np.rint(sums.astype(np.float32) * factor), -128, 127) * np.float32(0.05)
    given = [torch.from_numpy(array) for array in (x, weight, scale, bias)]
    found = norm_int8(*given, torch.tensor(0.02), torch.tensor(0.05))
    assert np.array_equal(found.numpy(), wanted)


# -- what is trained is what is left ---------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 7])
def test_a_trained_product_and_its_integers_agree(bits):
    torch.manual_seed(0)
    one = FakeQuantProduct(True, bits).train()
    a, b, bias = torch.randn(2, 5, 8).relu(), torch.randn(2, 8, 7), torch.randn(7)
    one(a, b)
    for grid in (one.left_range, one.right_range):
        grid.ema.copy_(grid.seen)
    a, b = a.requires_grad_(), b.requires_grad_()
    out = one.eval()(a, b, bias)
    assert torch.equal(one.finished()(a, b, bias), out)
    assert (out - (a @ b + bias)).abs().max() < 0.1
    out.sum().backward()
    assert a.grad is not None
    assert (a.grad - b.detach().sum(2).unsqueeze(1)).abs().max() < 0.1


def test_a_trained_norm_and_its_integers_agree():
    torch.manual_seed(0)
    norm = PowerNorm(torch.nn.LayerNorm(8))
    with torch.no_grad():
        norm.weight.uniform_(-2, 2)
        norm.bias.normal_()
    x = torch.randn(3, 5, 8)
    one = FakeQuantNorm(norm).train()
    one(x)
    for grid in (one.input_range, one.output_range):
        grid.ema.copy_(grid.seen)
    out = one.eval()(x)
    assert torch.equal(one.finished()(x), out)
    assert (out - norm.eval()(x)).abs().max() < 0.1
    assert len(out.unique()) <= 256
    out.sum().backward()
    assert norm.weight.grad is not None
    assert (norm.weight.grad - x.sum((0, 1))).abs().max() < 1


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_finished_model_computes_what_was_trained(family):
    model = settled([MATRIX], family)
    (phase,) = method_of(INTEGER).resolve(model.config).phases()
    float_logits = logits(model, batch())
    phase.initialise(model, [batch()])
    phase.prepare(model)
    trained = logits(model, batch())
    model.train()
    phase.on_step(model, At(step=0, total=2, forward=0, seed=0, rows=torch.arange(6)))
    loss = model(
        **batch(), start_positions=torch.ones(6).long(), end_positions=torch.ones(6).long()
    )
    loss.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    model.eval()
    layers = encoder_layers(model)
    norms = [module for module in model.modules() if isinstance(module, FakeQuantNorm)]
    for index, layer in enumerate(layers):
        for name in ("query", "key", "value"):
            assert matrices(layer)[name].incoming is norms[2 * index].output_range
    phase.finish(model)
    assert not [m for m in model.modules() if isinstance(m, (FakeQuantLinear, FakeQuantNorm))]
    done = logits(model, batch())
    real = batch()["attention_mask"].bool()
    spread = float_logits[real].std()
    apart = ((done - trained).abs() * real).amax(1).sort().values / spread  # of each row
    assert apart[-2] < 0.02
    assert apart[-1] < 0.15  # in one, a number between two levels may go to the other, as below
    assert (done - float_logits)[real].abs().mean() < 0.3 * spread


# -- units of the residual stream ------------------------------------------------------------------


def with_outliers(family: str, bounded: bool) -> Any:
    """A model after MA-BERT in whose residual stream two channels are a hundred times the rest."""
    model = settled([{**MATRIX, "bounded": bounded}], family)
    norms = norms_of(model)
    with torch.no_grad():
        for place, norm in enumerate(norms[:-1]):
            layer: Any = matrices(encoder_layers(model)[place // 2])
            adding = layer["output" if place % 2 else "attention_output"]
            for value in (norm.weight, norm.bias, norm.bound, adding.weight, adding.bias):
                if value is not None:
                    value[3:5] *= 100
            for name in ("intermediate",) if place % 2 else ("query", "key", "value"):
                layer[name].weight[:, 3:5] /= 100
            norms[place + 1].weight[3:5] /= 100
    return model


@pytest.mark.parametrize(
    ("family", "bounded"),
    [("bert", True), ("bert", False), ("roberta", True), ("distilbert", True)],
)
def test_units_change_nothing_but_what_the_stream_is_counted_in(family, bounded):
    model = with_outliers(family, bounded)
    before = logits(model, batch())
    norms = norms_of(model)
    biases = [norm.bias.clone() for norm in norms]
    model.set_attn_implementation("eager")
    units = set_units(model, [batch()])
    assert len(units) == len(norms) - 1
    for norm, unit, bias in zip(norms, units.values(), biases, strict=False):
        assert unit[3] > 20 * unit.median()
        torch.testing.assert_close(norm.bias * unit, bias)
    if bounded:  # one end of the grid is every channel's own
        ends: Any = norms[0].bound
        torch.testing.assert_close(ends, ends[:1].expand_as(ends))
    torch.testing.assert_close(logits(model, batch()), before, rtol=1e-4, atol=1e-4)


def test_units_keep_what_large_channels_would_round_away():
    def error(units: bool) -> float:
        model = with_outliers("bert", True)
        wanted = logits(model, batch())
        (phase,) = method_of(INTEGER).resolve(model.config).phases()
        with pytest.MonkeyPatch.context() as patch:
            if not units:
                patch.setattr("raybert.methods.q8bert.set_units", lambda *_: {})
            phase.initialise(model, [batch()])
        phase.prepare(model)
        real = batch()["attention_mask"].bool()
        return float((logits(model, batch()) - wanted)[real].abs().mean())

    assert error(True) < 0.5 * error(False)


def test_hidden_states_are_compared_in_the_teachers_unit():
    model = with_outliers("bert", True)
    taps = Taps(model, hidden=True, attention=False)
    model(**batch())
    wanted = taps.collect(None).hidden
    taps.remove()
    (phase,) = method_of(INTEGER).resolve(model.config).phases()
    phase.initialise(model, [batch()])
    phase.prepare(model)
    taps = Taps(model, hidden=True, attention=False)
    model(**batch())
    found: list[Outputs] = []

    class Kept:
        def losses(self, out: Outputs, *_: Any) -> dict[str, torch.Tensor]:
            found.append(out)
            return {}

    phase.losses(model, taps.collect(None), None, batch(), cast(Any, Kept()))
    for one, other in zip(found[0].hidden, wanted, strict=True):
        assert (one - other).abs().mean() < 0.2 * other.abs().mean()


# -- the graph -------------------------------------------------------------------------------------

PRODUCTS = {"MatMulIntegerToFloat"}
MOVES = {"Reshape", "Transpose", "Pad", "Where", "Gather"}
ON_INTEGERS = {"QLinearAdd", "QLinearConv"}
SHAPE_ARITHMETIC = {"Shape", "Slice", "Concat", "Sub"}


def between(graph: Any) -> list[Any]:
    """Nodes that hang on a product and that a product hangs on, without the head's own."""
    nodes = list(graph.graph.node)
    behind: set[str] = set()
    for node in nodes:
        if node.op_type in PRODUCTS or behind & set(node.input):
            behind |= set(node.output)
    before: set[str] = set()
    for node in reversed(nodes):
        if node.op_type in PRODUCTS or before & set(node.output):
            before |= set(node.input)
    return [n for n in nodes if behind & set(n.output) and before & set(n.output)]


def kinds_of(graph: Any) -> dict[str, int]:
    """The element type of every tensor."""
    known = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    known |= {value.name: value.type.tensor_type.elem_type for value in graph.graph.input}
    for node in graph.graph.node:
        kind = node.op_type
        if kind == "QuantizeLinear":
            found = known[node.input[2]]
        elif kind in ("MatMulIntegerToFloat", "DequantizeLinear"):
            found = TensorProto.FLOAT
        elif kind in ON_INTEGERS:
            found = TensorProto.UINT8
        elif kind == "Where":
            found = known[node.input[1]]
        elif kind == "Shape":
            found = TensorProto.INT64
        elif kind == "Cast":
            found = next(entry.i for entry in node.attribute if entry.name == "to")
        else:
            found = known[node.input[0]]
        known |= dict.fromkeys(node.output, found)
    return known


@pytest.mark.parametrize("kind", ["qa", "classification"])
@pytest.mark.parametrize(
    ("family", "shared"), [("bert", False), ("roberta", True), ("distilbert", False)]
)
def test_nothing_is_computed_in_floats_between_products(family, shared, kind):
    # ONNX Runtime's way around products that are cut off does not know of shared weights.
    integer = {**INTEGER, "weight_bits": 7 if shared else 8}
    model = settled([{**MATRIX, "shared": shared}, integer], family, kind)
    graph = to_onnx(model)
    types, nodes = kinds_of(graph), between(graph)
    users: dict[str, list[Any]] = {}
    for node in graph.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    assert [n.op_type for n in nodes].count("QLinearAdd") == 2 * 4
    assert [n.op_type for n in nodes].count("QLinearConv") == 2 * 4  # the first is before all
    # A classifier's head counts the first token anew, and has one function of floats.
    head = [node for node in nodes if node.op_type in ("DequantizeLinear", "Tanh", "Relu")]
    function = "Relu" if family == "distilbert" else "Tanh"
    wanted = ["DequantizeLinear", function] if kind == "classification" else []
    assert [node.op_type for node in head] == wanted
    seen = set()
    for node in (node for node in nodes if node not in head):
        seen.add(node.op_type)
        if node.op_type in PRODUCTS:  # its sums leave it rescaled, for one rounding
            left, right = (types[name] for name in node.input[:2])
            assert (left, right) == (TensorProto.UINT8, TensorProto.INT8)
            rounding = [user for name in node.output for user in _after_reshape(users, name)]
            if rounding == head[1:]:
                rounding = users[head[1].output[0]]
            assert {user.op_type for user in rounding} == {"QuantizeLinear"}
        elif node.op_type != "Reshape":
            assert types[node.output[0]] in (TensorProto.UINT8, TensorProto.INT8)
    ends = {"Clip"} if shared else set()  # of levels of 7 bits, in bytes
    assert seen <= PRODUCTS | MOVES | ON_INTEGERS | ends | {"QuantizeLinear"}
    check_same(model, graph)


def check_same(model: Any, graph: Any) -> None:
    """The graph's logits are the model's, but for a number that lies between two integers: the
    last bit of a factor rounds it to one or the other, and all that follows is a step off."""
    found = sorted(difference(model, graph, padded(model, *shape)) for shape in SHAPES)
    assert found[-2] < 1e-3
    assert found[-1] < 0.05


def _after_reshape(users: dict[str, list[Any]], name: str) -> list[Any]:
    found = []
    for user in users.get(name, []):
        found += _after_reshape(users, user.output[0]) if user.op_type == "Reshape" else [user]
    return found


def test_standard_operators_give_the_same():
    model = settled([MATRIX, INTEGER])
    graph = to_onnx(model, int8="qdq")
    assert {entry.domain for entry in graph.opset_import} == {""}
    check_same(model, graph)


def test_classifiers_need_the_first_token_alone_in_the_last_layer():
    model = settled([MATRIX, INTEGER], kind="classification")
    graph = to_onnx(model)
    assert operators(graph).count("Tanh") == 1  # the pooler's, between two products of the head
    for shape in SHAPES:
        assert difference(model, graph, padded(model, *shape)) < 0.05  # a level of tanh


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_tied_decoder_keeps_its_bias(per_channel):
    model = predecessor("bert", "mlm")
    bias = torch.randn(len(VOCAB), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.get_output_embeddings().bias.copy_(bias)
        model.get_input_embeddings().weight[7] *= 5  # one scale for all is that of this row
    gone_through(model, [MATRIX, {**INTEGER, "per_channel": per_channel}])
    decoder = model.get_output_embeddings()
    step = decoder.input_scale * decoder.matrix()[1]
    assert (decoder.bias * step - bias).abs().le(step).all()


def test_it_is_saved_and_loaded(tmp_path):
    model = settled([{**MATRIX, "shared": True}, INTEGER])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(model, batch()), logits(again, batch()))
    kinds = [type(module) for module in again.modules()]
    assert (kinds.count(Int8Product), kinds.count(Int8Norm)) == (2 * 4, 9)
    assert len(softmax_nets(again)) == 1
    cast = copy.deepcopy(again).to(torch.bfloat16)
    products = [module for module in cast.modules() if isinstance(module, Int8Product)]
    assert {module.left_scale.dtype for module in products} == {torch.float32}


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [[], ["lobert", "ma_bert"]])
def test_models_with_other_arithmetic_are_refused(before):
    config = predecessor("bert").config
    config.compression = [{"name": name} for name in before]
    with pytest.raises(UserError, match=r"as ma_bert makes it.*method=\[ma_bert,q8bert\]"):
        Q8BERT(integer_only=True).resolve(config)


@pytest.mark.parametrize(
    "wrong", [{"mode": "dynamic"}, {"activation_bits": 4}, {"skip": ("*pooler*",)}]
)
def test_settings_that_leave_floats_are_refused(wrong):
    with pytest.raises(ValueError, match="integer_only settles where ranges of 8 bits"):
        Q8BERT.model_validate({"integer_only": True, **wrong})
