"""EBERT's graphs: the model's own logits, whichever way a batch is computed, and no unit touched
that no sample keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from test_ebert import inputs, logits
from test_export import differences, toy
from torch import nn

from raybert import onnx_skip
from raybert.kept import kept_units
from raybert.methods.ebert import EBERT, gated
from raybert.onnx_trace import input_names, to_onnx, trace

WAYS = {
    "together": {"GATHER": 0, "CALL": 10**9},
    "each": {"GATHER": 0, "CALL": -(10**9)},
    "whole": {"GATHER": 10**9, "CALL": 10**9},
}
"""Costs that leave one of the ways."""


def leave(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are computed this way alone from now on."""
    for name, value in WAYS[way].items():
        monkeypatch.setattr(onnx_skip, name, value)


@pytest.fixture(params=WAYS)
def way(request: Any, monkeypatch) -> str:
    leave(request.param, monkeypatch)
    return request.param


def skipping(family: str = "bert", kind: str = "classification", **config: Any) -> Any:
    """A toy model that keeps about half of its units, others for each sample."""
    model = toy(family, kind, **{"num_hidden_layers": 2, **config})
    method = EBERT(gate_start=0.0).resolve(model.config)
    torch.manual_seed(5)
    for phase in method.phases():
        phase.prepare(model)
        for _, block in gated(model):
            nn.init.normal_(block.gate.score.weight)
        phase.finish(model)
    return model.eval()


def ran(graph: onnx.ModelProto, batch: dict[str, torch.Tensor]) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    given = {value.name: batch[value.name].numpy() for value in session.get_inputs()}
    found: Any = session.run(None, given)[0]
    return found


def choices(graph: onnx.ModelProto) -> int:
    return sum(node.op_type == "If" for node in graph.graph.node)


def batch_of(model: Any, rows: slice) -> dict[str, torch.Tensor]:
    batch = inputs(5, 12)
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    return {name: batch[name][rows] for name in input_names(model)}


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("bert", "classification"),
        ("bert", "qa"),
        ("roberta", "classification"),
        ("distilbert", "classification"),
    ],
)
def test_logits_are_the_models_in_every_way(way: str, family: str, kind: str) -> None:
    model = skipping(family, kind, num_attention_heads=8)
    graph = to_onnx(model)
    onnx.checker.check_model(graph, full_check=True)
    # Each block once; the last feed-forward of a classifier is of one token.
    layers = model.config.num_hidden_layers
    assert choices(graph) == 2 * layers - (kind == "classification")
    for rows in (slice(0, 1), slice(4, 5), slice(0, 5)):
        assert differences(model, graph, batch_of(model, rows)).max() < 1e-5


def poisoned(model: Any, kept: list[torch.Tensor]) -> None:
    """Make the weights of all other units such that touching them shows."""
    for (_, block), keep in zip(gated(model), kept, strict=True):
        lost = ~keep
        with torch.no_grad():
            block.units.weight[:, lost] = torch.nan
            block.units.bias[:, lost] = torch.nan
            block.units.out[lost] = torch.nan


@pytest.mark.parametrize("rows", [slice(2, 3), slice(0, 2)])
def test_units_that_no_sample_keeps_are_not_touched(way: str, rows: slice) -> None:
    # The last layer of a classifier would be of one token, and its feed-forward computed whole.
    model = skipping("bert", "qa", num_attention_heads=8)
    batch = batch_of(model, rows)
    kept = kept_units(model, [block.gate for _, block in gated(model)], [batch])
    wanted = ran(to_onnx(model), batch)
    left = [keep.any(0) for keep in kept]
    assert all(0 < keep.sum() < len(keep) for keep in left)
    poisoned(model, left)
    found = ran(to_onnx(model), batch)
    if way == "whole":
        assert np.isnan(found).all()
    else:
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_a_sample_computes_no_unit_of_another(monkeypatch) -> None:
    """Sample by sample, a batch is as many batches of one."""
    model = skipping("bert", "qa")
    batch = batch_of(model, slice(0, 2))
    leave("each", monkeypatch)
    _, (_, block), *_ = gated(model)
    (keep,) = kept_units(model, [block.gate], [batch])
    mine = keep[0] & ~keep[1]
    assert mine.any()
    wanted = ran(to_onnx(model), batch)
    with torch.no_grad():
        block.units.weight[:, mine] = torch.nan
        block.units.out[mine] = torch.nan
    found = ran(to_onnx(model), batch)
    assert np.isnan(found[0]).all()
    np.testing.assert_allclose(found[1], wanted[1], rtol=0, atol=1e-6)


def test_blocks_of_which_nothing_or_all_is_kept(way: str) -> None:
    model = skipping()
    for place, (_, block) in enumerate(gated(model)):
        nn.init.zeros_(block.gate.score.weight)
        nn.init.constant_(block.gate.score.bias, -1.0 if place % 3 else 1.0)
    for rows in (slice(0, 1), slice(0, 5)):
        assert differences(model, to_onnx(model), batch_of(model, rows)).max() < 1e-5


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("gelu", True),
        ("gelu_new", True),
        ("gelu_pytorch_tanh", True),
        ("relu", True),
        ("tanh", True),
        ("silu", False),
        ("sigmoid", False),
    ],
)
def test_activations(name: str, known: bool) -> None:
    """Of one that is not known all neurons are computed, and the export says so."""
    model = skipping(hidden_act=name)
    graph = to_onnx(model)
    assert differences(model, graph, batch_of(model, slice(0, 3))).max() < 1e-5
    layers = model.config.num_hidden_layers
    assert choices(graph) == (2 * layers - 1 if known else layers)
    remarks = EBERT().graph_remarks(model)
    assert any("Simulated in part" in remark for remark in remarks) != known


@pytest.mark.parametrize(("length", "gathers"), [(32, False), (48, True)])
def test_few_tokens_are_computed_whole(length: int, gathers: bool) -> None:
    """Of half the units, as long as gathering costs what another half would."""
    model = skipping("bert", "qa")
    for _, block in gated(model):
        half = torch.arange(block.units.count) % 2 == 0
        with torch.no_grad():
            block.gate.score.weight.zero_()
            block.gate.score.bias.copy_(half.float() - 0.5)
    poisoned(model, [torch.arange(block.units.count) % 2 == 0 for _, block in gated(model)])
    ids = torch.full((1, length), 7)
    kinds = torch.zeros_like(ids)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": kinds}
    assert np.isfinite(ran(to_onnx(model), batch)).all() == gathers


@pytest.mark.parametrize("alike", [True, False])
def test_samples_that_keep_nearly_the_same_are_computed_together(alike: bool, monkeypatch) -> None:
    """And others each alone: what only the other keeps is then not touched."""
    monkeypatch.setattr(onnx_skip, "CALL", 1000)
    model = skipping("bert", "qa")
    ids = torch.stack([torch.full((128,), 7), torch.full((128,), 8)])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["token_type_ids"] = torch.zeros_like(ids)
    block: Any = gated(model)[1][1]
    seen: list[torch.Tensor] = []
    handle = block.gate.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    own = torch.arange(block.units.count) < block.units.count // 2
    other = own.clone() if alike else ~own
    other[-1] = True
    between, middle = seen[0][0] - seen[0][1], seen[0].mean(0)
    with torch.no_grad():  # one hidden unit of the gate is positive for each sample
        for parameter in block.gate.parameters():
            parameter.zero_()
        for place, (units, sign) in enumerate(((own, 1), (other, -1))):
            block.gate.reduce.weight[place] = sign * between
            block.gate.reduce.bias[place] = -sign * (between @ middle)
            block.gate.score.weight[:, place] = units.float() * 1e4
        block.gate.score.bias.fill_(-1e-3)
    (keep,) = kept_units(model, [block.gate], [batch])
    assert torch.equal(keep, torch.stack([own, other]))
    wanted = ran(to_onnx(model), batch)
    with torch.no_grad():
        block.units.bias[:, other & ~own] = torch.nan
    found = ran(to_onnx(model), batch)
    assert np.isnan(found[1]).all()
    if alike:
        assert np.isnan(found[0]).all()
    else:
        np.testing.assert_allclose(found[0], wanted[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["gelu_10", "prelu"])
def test_activations_that_are_nearly_another_are_not_taken_for_it(name: str) -> None:
    with torch.device("meta"):
        model = skipping(hidden_act=name)
    assert {block.activation_name for _, block in gated(model)[1::2]} == {None}


def test_the_operators_compute_the_same_and_are_in_no_trace_but_raybert_s() -> None:
    model = skipping(num_attention_heads=8)
    batch = batch_of(model, slice(0, 3))
    program = trace(model)
    names = {str(node.target) for node in program.graph.nodes}
    assert {"raybert.kept_feed_forward.default", "raybert.kept_attention.default"} <= names
    own = {name: batch[name] for name in input_names(model)}
    torch.testing.assert_close(program.module()(**own).logits, logits(model, batch))
    plain = torch.export.export(model, (), batch, strict=False)
    assert not any("raybert" in str(node.target) for node in plain.graph.nodes)
    torch.testing.assert_close(plain.module()(**batch).logits, logits(model, batch))
