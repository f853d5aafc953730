"""MA-BERT and Q8BERT to integers alone: the graph, its numbers, and training that sees them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCAB
from methods.test_conformance import finished, method_of, predecessor
from onnx import TensorProto, helper, numpy_helper, shape_inference
from test_export import difference, operators, padded

from raybert.compressed import mark_compressed
from raybert.config import UserError
from raybert.fake_quant import FakeQuantLinear
from raybert.int8 import Int8Linear
from raybert.integer import (
    FakeQuantNorm,
    FakeQuantProduct,
    Int8Norm,
    Int8Product,
    norm_int8,
    product_int8,
)
from raybert.methods.ma_bert import softmax_nets
from raybert.methods.q8bert import Q8BERT
from raybert.onnx_trace import to_onnx
from raybert.phase import At
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
    model = predecessor(family, kind)
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


@pytest.mark.parametrize("unsigned", [False, True])
def test_a_product_of_activations_is_that_of_integers(unsigned):
    draw = np.random.default_rng(0)
    a = draw.normal(0, 1, (2, 3, 5, 8)).astype(np.float32)
    b = draw.normal(0, 1, (2, 3, 8, 7)).astype(np.float32)
    a[0, 0, 0, :2] = 1e6, -1e6
    bias = draw.normal(0, 1, 7).astype(np.float32)
    low, high = (0, 255) if unsigned else (-128, 127)
    sums = levels(a, 0.01, low, high) @ levels(b, 0.02)
    scale = np.float32(0.01) * np.float32(0.02)
    wanted = sums.astype(np.float32) * scale + bias
    found = product_int8(
        torch.from_numpy(a),
        torch.from_numpy(b),
        torch.tensor(0.01),
        torch.tensor(0.02),
        torch.from_numpy(bias),
        unsigned,
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


def test_a_trained_product_and_its_integers_agree():
    torch.manual_seed(0)
    one = FakeQuantProduct(True).train()
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
    loss = model(**batch(), start_positions=torch.ones(6).long(), end_positions=torch.ones(6).long())
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
    torch.testing.assert_close(done[real], trained[real], rtol=0, atol=0.02 * float(spread))
    assert (done - float_logits)[real].abs().mean() < 0.3 * spread
