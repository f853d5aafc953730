"""LoBERT: what each mode computes, which ranks it takes, and what it refuses."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest
import torch
from conftest import VOCAB, toy_encoder
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification, BertConfig

import raybert
from raybert.bench import flops, parameters
from raybert.compressed import mark_compressed
from raybert.errors import UserError
from raybert.factorise import error, error_on_data, low_rank
from raybert.factors import Layout, build, dense_matrices, factorise
from raybert.lowrank import LowRankLinear, LowRankProjection, SharedLinear, SharedProjection
from raybert.method import MethodConfig
from raybert.methods.lobert import LoBERT, LowRank
from raybert.methods.theseus import Theseus
from raybert.models import blank
from raybert.moments import second_moments
from raybert.phase import Taps
from raybert.plan import make_plan, resolve_paths
from raybert.ranks import (
    ATTENTION,
    FFN,
    Shape,
    Svd,
    Tucker,
    even_ranks,
    ranks_by_energy,
    ranks_to,
    saving_rank,
    spend,
)
from raybert.recipe_file import RECIPES, load_recipe, recipe_from
from raybert.run import _fit
from raybert.surgery import (
    MATRICES,
    attention_block,
    encoder_layers,
    ffn_block,
    layer_holder,
    self_attention,
)

FAMILIES = ("bert", "roberta", "distilbert")
SHAPE = Shape(4, 32, 64)
FULL: dict[str, Any] = {
    "self_svd": 32,
    "self_tucker_layer": (3, 32, 32),
    "self_falcon_layer": 3,
    "self_tucker_vertical": (4, 32, 32),
    "self_falcon_vertical": 4,
    "self_tucker_4d": (3, 4, 32, 32),
    "self_falcon_4d": 3,
    "ffn_svd": 32,
    "ffn_tucker": (4, 64, 32),
}
"""Each mode's largest rank on a toy encoder: nothing is lost, and nothing saved."""

SHARED = ("self_tucker_vertical", "self_falcon_vertical", "self_tucker_4d", "ffn_tucker")

PAIRS = list(itertools.product([None, *ATTENTION], [None, *FFN]))[1:]
"""Any one attention mode with any one feed-forward mode."""

every_pair = pytest.mark.parametrize(("attention", "ffn"), PAIRS)
every_family = pytest.mark.parametrize("family", FAMILIES)


def classifier(family: str = "bert", layers: int = 4, attention: str = "sdpa") -> Any:
    """A toy classifier whose biases are not zero, so that it shows where they go."""
    torch.manual_seed(1)
    config: Any = copy.deepcopy(toy_encoder(family, layers).config)
    config._attn_implementation = attention
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model.eval()


def rows() -> dict[str, Tensor]:
    ids = torch.randint(5, len(VOCAB), (4, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2, 6:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**rows()).logits


def lobert(**keys: Any) -> LoBERT:
    return LoBERT.model_validate(keys)


def student(model: Any, **keys: Any) -> LoBERT:
    """Take a model through the method up to training."""
    method = lobert(**keys).resolve(model.config).settle(model, [rows()])
    for phase in method.phases():
        phase.initialise(model, [rows()])
        phase.prepare(model)
        phase.finish(model)
    mark_compressed(model, method)
    return method


def layout_of(attention: str | None, ffn: str | None, ranks: dict[str, Any]) -> Layout:
    """A layout at any ranks, those that save nothing included."""
    svd: dict[str, Any] = {}
    for mode in (attention, ffn):
        known = {**ATTENTION, **FFN}.get(mode or "")
        if isinstance(known, Svd):
            svd |= dict.fromkeys(known.matrices, int(ranks[mode or ""] or 0))
    stacked = attention if attention != "self_svd" else None
    tucker = ranks["ffn_tucker"] if ffn == "ffn_tucker" else None
    return Layout([svd] * 4, stacked, ranks[stacked] if stacked else None, tucker)


# -- what is computed ------------------------------------------------------------------------------


@every_family
@every_pair
def test_full_rank_is_the_dense_model(family, attention, ffn):
    model = classifier(family)
    wanted = logits(model)
    layout = layout_of(attention, ffn, FULL)
    factors = factorise(model, layout, {})
    assert max(factors.errors.values()) < 1e-4
    build(model, layout, factors.values)
    assert torch.allclose(logits(model), wanted, atol=1e-4)


@every_family
@pytest.mark.parametrize("attention", ATTENTION)
def test_every_projection_keeps_its_own_bias(family, attention):
    """The released code gives the keys the values' bias."""
    model = classifier(family)
    before = {
        name: dense.bias.detach().clone()
        for (i, name), dense in dense_matrices(model).items()
        if not i
    }
    student(model, attention=attention, ffn=None)
    nothing = torch.zeros(1, 3, 32)
    attention_module: Any = self_attention(encoder_layers(model)[0])
    found = attention_module.project(nothing)
    for name, part in zip(("query", "key", "value"), found, strict=True):
        assert torch.allclose(part, before[name].expand(1, 3, 32), atol=1e-6), name
    assert not torch.allclose(before["key"], before["value"], atol=0.1)


@every_family
@pytest.mark.parametrize("attention", ATTENTION)
def test_a_projection_is_what_its_reported_weights_say(family, attention):
    model = classifier(family)
    dense = {key: layer.weight.detach().clone() for key, layer in dense_matrices(model).items()}
    method = lobert(attention=attention, ffn="ffn_tucker").resolve(model.config)
    (phase,) = method.phases()
    facts = phase.initialise(model, [])["reconstruction error"]
    phase.prepare(model)
    eye = torch.eye(32)[None]
    for number, layer in enumerate(encoder_layers(model)):
        module: Any = self_attention(layer)
        zero = module.project(torch.zeros(1, 1, 32))
        parts = [(p - z)[0].T for p, z in zip(module.project(eye), zero, strict=True)]
        for name, part in zip(("query", "key", "value"), parts, strict=True):
            told = facts[f"layer {number} {name}"]
            assert error(dense[number, name], part.detach()) == pytest.approx(told, abs=1e-4)
            assert 0 < told < 1
    for number, layer in enumerate(encoder_layers(model)):
        linears = [m for m in layer.modules() if isinstance(m, SharedLinear)]
        for name, linear in zip(("intermediate", "output"), linears, strict=True):
            weight = dense[number, name]
            found = (linear(torch.eye(weight.shape[1])) - linear.bias).T.detach()
            told = facts[f"layer {number} {name}"]
            assert error(weight, found) == pytest.approx(told, abs=1e-4)


@every_family
def test_no_weight_of_a_matrixs_size_is_left_or_made(family):
    model = classifier(family)
    student(model, attention="self_tucker_4d", ffn="ffn_tucker", share=0.4)
    holder: Any = layer_holder(model)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    made: set[tuple[int, ...]] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in weights:
                made.add(tuple(out.shape))
            return out

    with torch.no_grad(), Watch():
        model(**rows())
    dense = {(32, 32), (32, 64), (64, 32)}
    assert (4, 10, 32) in made
    assert not dense & made
    sizes = {tuple(p.shape) for p in holder.lobert.parameters()}
    assert not dense & sizes


@every_family
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_recorded_and_masked_as_in_the_stock_model(family, attention):
    model = classifier(family, attention=attention)
    wanted = logits(model)
    with torch.no_grad():
        stock = model(**rows(), output_attentions=attention == "eager", output_hidden_states=True)
    layout = layout_of("self_svd", None, FULL)
    build(model, layout, factorise(model, layout, {}).values)
    with torch.no_grad():
        out = model(**rows(), output_attentions=attention == "eager", output_hidden_states=True)
    assert torch.allclose(out.logits, wanted, atol=1e-4)
    assert len(out.hidden_states) == 5
    for one, two in zip(out.hidden_states, stock.hidden_states, strict=True):
        assert torch.allclose(one, two, atol=1e-4)
    if attention == "eager":
        assert len(out.attentions) == 4
        taps = Taps(model, hidden=True, attention=True)
        seen = taps.collect(model(**rows()))
        for one, two, three in zip(out.attentions, stock.attentions, seen.attention, strict=True):
            assert torch.allclose(one, two, atol=1e-4)
            assert torch.allclose(one, three, atol=1e-5)
        taps.remove()
    changed = {**rows(), "input_ids": rows()["input_ids"].clone()}
    changed["input_ids"][2, 6:] = 7  # masked
    with torch.no_grad():
        assert torch.allclose(model(**changed).logits, wanted, atol=1e-4)


def test_halves_of_a_layer_are_still_a_layer():
    for family in FAMILIES:
        model = classifier(family)
        student(model)
        layer = encoder_layers(model)[1]
        hidden = torch.randn(2, 5, 32)
        with torch.no_grad():
            whole = layer(hidden)
            halves = ffn_block(layer, attention_block(layer, hidden))
        assert torch.allclose(whole, halves, atol=1e-6)


def test_queries_keys_and_values_share_one_product():
    model = classifier()
    student(model, attention_rank=5, ffn=None)
    projection: Any = self_attention(encoder_layers(model)[0]).get_submodule("projection")
    assert isinstance(projection, LowRankProjection)
    assert projection.reduce.weight.shape == (15, 32)
    assert [projection.get_submodule(n).weight.shape for n in ("query", "key", "value")] == [
        (32, 5)
    ] * 3
    model = classifier()
    student(model, attention="self_falcon_layer", falcon_rank=2, ffn=None)
    projection = self_attention(encoder_layers(model)[0]).get_submodule("projection")
    assert projection.reduce.weight.shape == (64, 32)
    assert projection.scale.shape == (3, 2, 32)


def test_the_output_projection_is_factorised_on_request():
    for family in FAMILIES:
        model = classifier(family)
        dense = dense_matrices(model)[0, "attention_output"]
        student(model, attention_output=True, ffn=None, attention_rank=6)
        low = [m for m in encoder_layers(model)[0].modules() if isinstance(m, LowRankLinear)]
        assert len(low) == 1
        wanted = low_rank(dense.weight.detach(), 6)
        expand: Any = low[0].expand
        assert torch.allclose(expand.weight, wanted[0])
        assert expand.bias is dense.bias, "adopted, not copied"


def test_of_parts_some_stay_dense():
    model = classifier()
    ranks = [(0, 4, 0, 7, 0)] * 3 + [(0, 0, 0, 0, 5)]
    wanted = {
        key: dense.weight.detach().clone() for key, dense in dense_matrices(classifier()).items()
    }
    student(model, ranks=ranks)
    first: Any = self_attention(encoder_layers(model)[0]).get_submodule("projection")
    assert torch.equal(first.query.weight, wanted[0, "query"])
    assert first.key.weight.shape == (32, 4)
    hidden = torch.randn(2, 5, 32)
    query, key, _ = first(hidden)
    assert torch.allclose(query, first.query(hidden))
    left, right = low_rank(wanted[0, "key"], 4)
    assert torch.allclose(key, hidden @ (left @ right).T + first.key.bias, atol=1e-5)
    last = self_attention(encoder_layers(model)[3])
    assert "projection" not in dict(last.named_children()), "left alone"


# -- parameters shared by layers -------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("attention", [m for m in SHARED if m in ATTENTION])
def test_shared_parameters_have_one_name_and_survive_everything(tmp_path, family, attention):
    model = classifier(family)
    method = student(model, attention=attention, ffn="ffn_tucker")
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)) == len(model.state_dict())
    assert len({id(p) for p in model.parameters()}) == len(names)
    holder: Any = layer_holder(model)
    assert set(holder.lobert) == {"attention", "intermediate", "output"}

    def owners(of: Any) -> set[int]:
        kinds = (SharedProjection, SharedLinear)
        found = [m for m in of.modules() if isinstance(m, kinds)]
        assert len(found) == 12
        return {id(m.owner[0]) for m in found}

    assert owners(model) == {id(m) for m in holder.lobert.values()}
    wanted = logits(model)
    twin = copy.deepcopy(model)
    twin_holder: Any = layer_holder(twin)
    assert owners(twin) == {id(m) for m in twin_holder.lobert.values()}
    assert not owners(twin) & owners(model)
    with torch.no_grad():
        for parameter in twin_holder.lobert.parameters():
            parameter.mul_(1.5)
    assert torch.equal(logits(model), wanted), "the copy shares nothing with the original"
    assert not torch.allclose(logits(twin), wanted, atol=1e-3)
    model.save_pretrained(tmp_path)
    again = raybert.load(tmp_path)
    assert torch.equal(logits(again), wanted)
    again_holder: Any = layer_holder(again)
    assert owners(again) == {id(m) for m in again_holder.lobert.values()}
    double = copy.deepcopy(model).to(torch.float64)
    assert {p.dtype for p in double.parameters()} == {torch.float64}
    assert torch.allclose(logits(double).float(), wanted, atol=1e-4)
    empty = blank(classifier(family).config, "classification", [method])
    assert parameters(empty) == parameters(model)


def test_all_layers_train_what_they_share():
    model = classifier()
    student(model, attention="self_tucker_vertical", ffn="ffn_tucker")
    holder: Any = layer_holder(model)
    model(**rows(), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    for name, parameter in holder.lobert.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith("mix"):
            assert (parameter.grad.abs().sum(1) > 0).all(), "a row for each layer"


# -- ranks -----------------------------------------------------------------------------------------


def test_released_ranks_at_the_models_width():
    base, mini = Shape.of(BertConfig()), Shape(6, 384, 1536)
    wanted = {
        "self_svd": (192, 96),
        "self_tucker_layer": ((2, 384, 384), (2, 192, 192)),
        "self_tucker_vertical": ((8, 576, 576), (4, 288, 288)),
        "self_tucker_4d": ((2, 8, 576, 576), (2, 4, 288, 288)),
        "ffn_svd": (306, 153),
        "ffn_tucker": ((8, 4 * 492, 492), (4, 4 * 246, 246)),
    }
    for name, (at_base, at_mini) in wanted.items():
        mode: Any = {**ATTENTION, **FFN}[name]
        assert mode.default(base) == at_base, name
        assert mode.default(mini) == at_mini, name
        mode.check(base, at_base, "rank")
        mode.check(mini, at_mini, "rank")


def test_break_even_by_hand():
    assert saving_rank(768, 768) == 383
    assert saving_rank(768, 3072) == 614  # 614 * 3840 is 1,536 less than 768 * 3072
    for outer, inner in itertools.product((5, 32, 33, 64), repeat=2):
        most = saving_rank(outer, inner)
        assert most * (outer + inner) < outer * inner <= (most + 1) * (outer + inner)


@every_pair
def test_predicted_parameters_are_those_of_the_student(attention, ffn):
    model = classifier()
    layers: Any = encoder_layers(model)
    dense = sum(p.numel() for p in layers.parameters())
    assert Shape.of(model.config) == SHAPE
    assert SHAPE.parameters == dense
    head = parameters(model)["total"] - dense
    method = lobert(attention=attention, ffn=ffn).resolve(model.config)
    modes = method.modes
    saved = sum(
        mode.dense(SHAPE) - mode.parameters(SHAPE, method.rank(part))
        for part, mode in modes.items()
    )
    assert saved > 0
    empty = blank(model.config, "classification", [method])
    assert parameters(empty)["total"] == head + dense - saved


@pytest.mark.parametrize(
    ("attention", "ffn"), [pair for pair in PAIRS if pair[1] or "falcon" not in str(pair[0])]
)
@pytest.mark.parametrize("share", [0.45, 0.7])
def test_a_share_is_met_and_cannot_be_met_more_closely(attention, ffn, share):
    model = classifier()
    total = parameters(model)["total"]
    method = lobert(attention=attention, ffn=ffn, share=share)
    if share < 0.5 and not (attention and ffn):  # one part alone cannot save so much
        with pytest.raises(UserError, match="cannot be reached"):
            method.resolve(model.config)
        return
    method = method.resolve(model.config)
    assert method.share is None

    def kept(of: LoBERT) -> float:
        made = parameters(blank(model.config, "classification", [of]))["total"]
        return (made - total + SHAPE.parameters) / SHAPE.parameters

    assert kept(method) <= share
    for part, mode in method.ranked.items():
        ladder = mode.rungs(SHAPE)
        at = ladder.index(method.rank(part))
        if at + 1 < len(ladder):
            more = method.model_copy(update={f"{part}_rank": ladder[at + 1]})
            assert kept(more) > share, "maximal within the budget"


def test_an_even_share_spreads_over_the_modes():
    shape = Shape.of(BertConfig())
    modes: Any = [ATTENTION["self_svd"], FFN["ffn_svd"]]
    budget = sum(mode.dense(shape) for mode in modes) // 2
    attention, ffn = even_ranks(shape, modes, budget)
    assert attention == pytest.approx(192, abs=8)
    assert ffn == pytest.approx(307, abs=8)
    spent = modes[0].parameters(shape, attention) + modes[1].parameters(shape, ffn)
    assert 0 <= budget - spent < 8 * 12 * 3 * 2 * 768


def test_chosen_ranks_are_multiples_of_16_where_matrices_are_wide():
    assert ranks_to(127) == list(range(1, 128))
    assert ranks_to(150) == [*range(1, 16), 16, 32, 48, 64, 80, 96, 112, 128, 144]
    shape = Shape.of(BertConfig())
    modes: Any = [ATTENTION["self_tucker_layer"], FFN["ffn_svd"]]
    found: Any = even_ranks(shape, modes, sum(mode.dense(shape) for mode in modes) // 2)
    attention, ffn = found
    assert attention[1] % 16 == attention[2] % 16 == ffn % 16 == 0
    falling = torch.linspace(1, 0, 300, dtype=torch.float64)
    spectra = {"flat": torch.ones(300, dtype=torch.float64), "steep": falling**8}
    sizes = dict.fromkeys(spectra, (300, 300))
    exact = int((falling.pow(8).cumsum(0) / falling.pow(8).sum() < 0.9).sum()) + 1
    ranks = ranks_by_energy(spectra, sizes, 0.9)
    assert ranks == {"flat": 0, "steep": -(-exact // 16) * 16}
    assert exact % 16
    spent = spend(spectra, sizes, 600 * 64)
    assert all(rank % 16 == 0 for rank in spent.values())
    assert 600 * 48 < 600 * sum(spent.values()) <= 600 * 64


def test_a_share_out_of_reach_names_what_can_be_had():
    config = classifier().config
    for share in (0.05, 0.99):
        with pytest.raises(UserError, match=r"cannot be reached.*between [\d.]+ and [\d.]+"):
            lobert(attention="self_falcon_layer", share=share).resolve(config)
    text = ""
    try:
        lobert(ffn=None, share=0.05).resolve(config)
    except UserError as problem:
        text = str(problem)
    least, most = (float(w) for w in text.split("between ")[1].split(" of the")[0].split(" and "))
    for share in (least, most):
        assert lobert(ffn=None, share=share).resolve(config).attention_rank


@pytest.mark.parametrize("data_aware", [False, True])
def test_ranks_by_energy_are_the_smallest_that_keep_it(data_aware):
    model = classifier()
    weights = {key: dense.weight.detach() for key, dense in dense_matrices(model).items()}
    method = lobert(energy=0.55, attention_output=True, data_aware=data_aware)
    method = method.resolve(model.config).settle(model, [rows()])
    assert method.energy is None
    assert method.ranks is not None
    assert len(method.ranks) == 4
    kept_dense = 0
    for layer, row in enumerate(method.ranks):
        for name, rank in zip(MATRICES, row, strict=True):
            singular = torch.linalg.svdvals(weights[layer, name].double()) ** 2
            if data_aware:
                continue
            share = singular.cumsum(0) / singular.sum()
            needed = int((share < 0.55).sum()) + 1
            saves = needed <= saving_rank(*weights[layer, name].shape)
            assert rank == (needed if saves else 0)
            kept_dense += not rank
    plain = lobert(energy=0.55, attention_output=True).resolve(model.config)
    assert data_aware == (plain.settle(model, []).ranks != method.ranks)


def test_a_matrix_whose_rank_would_save_nothing_stays_dense():
    model = classifier()
    with torch.no_grad():  # the first key has one direction; other matrices need most of theirs
        key = dense_matrices(model)[0, "key"].weight
        key.copy_(torch.outer(torch.randn(32), torch.randn(32)))
    method = lobert(energy=0.999).resolve(model.config).settle(model, [])
    assert method.ranks is not None
    assert method.ranks[0] == (0, 1, 0, 0, 0)
    assert set(method.ranks[1:]) == {(0, 0, 0, 0, 0)}
    with pytest.raises(UserError, match="save nothing in any matrix"):
        lobert(energy=1 - 1e-9, attention=None).resolve(model.config).settle(model, [])


@pytest.mark.parametrize("data_aware", [False, True])
def test_a_budget_is_spent_where_it_keeps_most(data_aware):
    model = classifier()
    with torch.no_grad():  # a layer that needs little
        for name in ("query", "key"):
            weight = dense_matrices(model)[2, name].weight
            weight.copy_(torch.outer(torch.randn(32), torch.randn(32)))
    keys: dict[str, Any] = {"share": 0.5, "data_aware": data_aware}
    even = lobert(**keys).resolve(model.config)
    method = lobert(**keys, allocate="energy").resolve(model.config)
    assert method.share == 0.5, "waits for weights"
    assert method.bound_to_depth
    method = method.settle(model, [rows()])
    assert method.share is None
    assert method.ranks is not None
    assert method.ranks[2][:2] == (1, 1)
    total = parameters(model)["total"]
    made = parameters(blank(model.config, "classification", [method]))["total"]
    kept = (made - total + SHAPE.parameters) / SHAPE.parameters
    assert 0.49 < kept <= 0.5
    if not data_aware:
        errors = []
        for one in (even, method):
            (phase,) = one.phases()
            assert isinstance(phase, LowRank)
            facts = phase.initialise(model, [])["reconstruction error"]
            errors.append(sum(e**2 for e in facts.values()))
        assert errors[1] < errors[0]
    again = lobert(**json.loads(method.model_dump_json()))
    assert again == method == method.resolve(model.config)


def test_spending_by_hand():
    spectra = {"a": torch.tensor([8.0, 1.0, 1.0, 0.0]), "b": torch.tensor([4.0, 3.0, 2.0, 1.0])}
    sizes = {"a": (4, 4), "b": (4, 4)}  # 8 weights a rank, 16 dense; only rank 1 saves
    assert spend(spectra, sizes, 16) == {"a": 1, "b": 1}
    assert spend(spectra, sizes, 23) == {"a": 1, "b": 1}
    assert spend(spectra, sizes, 24) == {"a": 1, "b": 0}, "b lacks 6 of 10, a 2 of 10"
    assert spend(spectra, sizes, 32) == {"a": 0, "b": 0}


def test_a_budget_beside_tucker_leaves_it_its_even_ranks():
    model = classifier()
    keys: dict[str, Any] = {"attention": "self_tucker_4d", "share": 0.5}
    even = lobert(**keys).resolve(model.config)
    method = lobert(**keys, allocate="energy").resolve(model.config).settle(model, [])
    assert method.attention_rank == even.attention_rank
    assert isinstance(even.attention_rank, tuple)
    assert method.ranks is not None
    assert {len(row) for row in method.ranks} == {2}
    made = [parameters(blank(model.config, "classification", [m]))["total"] for m in (even, method)]
    assert made[1] == pytest.approx(made[0], rel=0.02)


# -- data-aware ------------------------------------------------------------------------------------


@every_family
def test_moments_are_those_of_real_tokens(family):
    model = classifier(family)
    batch, seen = rows(), {}
    dense = dense_matrices(model)
    picked = {k: dense[k] for k in ((1, "query"), (2, "intermediate"), (3, "output"))}
    handles = [
        layer.register_forward_hook(lambda _, args, out, k=k: seen.update({k: (args[0], out)}))
        for k, layer in picked.items()
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    found = second_moments(model, picked, [batch, batch])
    real = batch["attention_mask"].bool()
    assert int(real.sum()) == 36
    for key, (taken, made) in seen.items():
        rows_ = taken[real] if key[1] != "output" else made[real] - picked[key].bias
        wanted = rows_.double().T @ rows_.double() / 36
        assert torch.allclose(found[key], wanted, rtol=1e-5, atol=1e-6)
    assert not any(module._forward_hooks for module in picked.values())


@every_family
def test_data_aware_is_never_worse_on_activations(family):
    batch = rows()
    inputs: dict[Any, Tensor] = {}
    model = classifier(family)
    dense = dense_matrices(model)
    for key, layer in dense.items():
        layer.register_forward_hook(lambda _, args, out, k=key: inputs.update({k: args[0]}))
    logits(model)
    real = batch["attention_mask"].bool()
    factors = {}
    for aware in (False, True):
        twin = classifier(family)
        (phase,) = lobert(data_aware=aware, attention_output=True).resolve(model.config).phases()
        assert phase.calibration == (256 if aware else 0)
        facts = phase.initialise(twin, [batch] if aware else [])
        assert isinstance(phase, LowRank)
        factors[aware] = phase.values, facts
    told = factors[True][1]["reconstruction error on activations"]
    assert set(told) == set(factors[True][1]["reconstruction error"])
    assert "reconstruction error on activations" not in factors[False][1]

    def missed(aware: bool, key: Any) -> float:
        values = factors[aware][0]
        x, weight = inputs[key][real], dense[key].weight.detach()
        if key[1] in ("query", "key", "value"):
            joined = values[key[0], "attention"]
            at = ("query", "key", "value").index(key[1]) * 8
            right = joined["reduce.weight"][at : at + 8]
            left = joined[f"{key[1]}.weight"]
        else:
            left, right = values[key]["expand.weight"], values[key]["reduce.weight"]
        return error(x @ weight.T, x @ (left @ right).T)

    better = 0
    for key in dense:
        aware, plain = missed(True, key), missed(False, key)
        assert aware <= plain + 1e-5, key
        assert aware == pytest.approx(told[f"layer {key[0]} {key[1]}"], abs=1e-3)
        better += aware < 0.9 * plain
    assert better > len(dense) / 2


@pytest.mark.parametrize("attention", list(ATTENTION)[1:])
def test_stacks_are_data_aware_too(attention):
    told = {}
    for aware in (False, True):
        method = lobert(attention=attention, ffn="ffn_tucker", data_aware=aware)
        model = classifier()
        (phase,) = method.resolve(model.config).phases()
        dense = {k: layer.weight.detach().clone() for k, layer in dense_matrices(model).items()}
        moments = lobert(data_aware=True).moments(model, [rows()])
        facts = phase.initialise(model, [rows()] if aware else [])
        phase.prepare(model)
        errors = []
        for number, layer in enumerate(encoder_layers(model)):
            module: Any = self_attention(layer)
            zero = module.project(torch.zeros(1, 1, 32))
            made = module.project(torch.eye(32)[None])
            for name, p, z in zip(("query", "key", "value"), made, zero, strict=True):
                key = (number, name)
                errors.append(error_on_data(dense[key], (p - z)[0].T.detach(), moments[key]))
        told[aware] = errors, facts
    assert sum(told[True][0]) < 0.95 * sum(told[False][0])
    reported = told[True][1]["reconstruction error on activations"]
    assert {name.split()[-1] for name in reported} == {"query", "key", "value", "intermediate"}
    names = [f"layer {i} {name}" for i in range(4) for name in ("query", "key", "value")]
    assert [reported[name] for name in names] == pytest.approx(told[True][0], abs=1e-3)


# -- cost ------------------------------------------------------------------------------------------


@every_pair
def test_counted_operations_are_the_predicted_ones(attention, ffn):
    config = classifier().config
    method = lobert(attention=attention, ffn=ffn).resolve(config)
    chains: list[list[MethodConfig]] = [[], [method]]
    length = 12
    found = [flops(blank(config, "classification", chain), 1, length) for chain in chains]
    difference = 0
    for part, mode in method.modes.items():
        rank = method.rank(part)
        now = mode.multiply_adds(SHAPE, rank)
        if attention and "falcon" in attention and part == "attention":
            now -= SHAPE.layers * 3 * SHAPE.hidden  # scaling is no matrix product
        difference += now - mode.dense(SHAPE)
        if isinstance(mode, Tucker) and mode.shared:  # the mix goes into the core once a pass
            once = {
                "self_tucker_vertical": lambda r: 3 * r[0] * r[1] * r[2],
                "self_tucker_4d": lambda r: r[0] * r[1] * r[2] * r[3],
                "ffn_tucker": lambda r: 2 * r[0] * r[1] * r[2],
            }[vars(method)[part]](rank)
            difference += SHAPE.layers * once / length
    assert found[1] - found[0] == pytest.approx(2 * length * difference)


def test_what_saves_no_time_is_said():
    config = BertConfig()

    def told(**keys: Any) -> list[str]:
        (phase,) = lobert(**keys).resolve(config).phases()
        return phase.warnings(100)

    assert told() == []
    assert told(attention="self_falcon_layer") == []
    assert told(attention="self_tucker_layer") == []
    (text,) = told(attention="self_tucker_vertical")
    # 12 layers x 3 x (768 x 576 + 576 x 576 + 576 x 768) against 12 x 3 x 768 x 768.
    assert "self_tucker_vertical saves bytes and not time: 43.8 million" in text
    assert "in place of 21.2" in text
    assert len(told(attention="self_falcon_vertical", ffn="ffn_tucker")) == 2
    assert told(attention="self_tucker_vertical", attention_rank=(8, 200, 200)) == []


@pytest.mark.parametrize(("kd", "said"), [({}, 1), ({"alpha": 0.5}, 0), ({"cls": 10.0}, 0)])
def test_a_student_that_learns_from_labels_alone_is_told_of(kd, said):
    recipe = recipe_from({"method": ["lobert"], "kd": kd})
    assert len(recipe.method[0].advice(recipe, None)) == said


def test_a_narrow_feed_forward_needs_no_moment_that_tucker_cannot_use():
    config = BertConfig(
        vocab_size=30,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    model = AutoModelForSequenceClassification.from_config(config).eval()
    batch = {"input_ids": torch.arange(5, 25).view(2, 10)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    keys = {"attention": None, "ffn": "ffn_tucker", "ffn_rank": (2, 6, 6), "data_aware": True}
    (phase,) = lobert(**keys).resolve(config).phases()
    assert phase.initialise(model, [batch])


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"attention": None, "ffn": None}, "leaves nothing to factorise"),
        ({"share": 0.5, "energy": 0.5}, "share and energy are ways of giving ranks"),
        ({"share": 0.5, "attention_rank": 8}, "attention_rank and lobert.share both"),
        ({"share": 0.5, "ffn_rank": 8}, "ffn_rank and lobert.share both"),
        ({"energy": 0.5, "ffn_rank": 8}, "ffn_rank and lobert.energy both"),
        ({"ranks": [[4] * 5] * 4, "ffn_rank": 8}, "ffn_rank and lobert.ranks both"),
        ({"attention": None, "attention_rank": 8}, "lobert.attention is null"),
        ({"ffn": None, "ffn_rank": 8}, "lobert.ffn is null"),
        ({"attention": "self_falcon_4d", "attention_rank": 1}, "give lobert.falcon_rank"),
        ({"falcon_rank": 2}, "falcon_rank is the rank of FALCON modes"),
        ({"attention": "self_falcon_4d", "ffn": None, "share": 0.8}, "no rank to find"),
        ({"attention": "self_tucker_4d", "ffn": None, "energy": 0.5}, "there is none"),
        (
            {"attention": "self_tucker_layer", "energy": 0.5},
            "energy gives ranks of SVD modes alone; give lobert.attention_rank too",
        ),
        ({"ffn": "ffn_tucker", "ranks": [[4] * 3] * 4}, "give lobert.ffn_rank too"),
        ({"allocate": "energy"}, "give lobert.share"),
        ({"allocate": "energy", "energy": 0.5}, "give lobert.share"),
        (
            {"attention": "self_tucker_4d", "ffn": None, "share": 0.8, "allocate": "energy"},
            "chooses SVD ranks",
        ),
        ({"attention_output": True, "attention": None}, "attention=self_svd only"),
        ({"data_aware": True, "calibration_rows": 0}, "nothing to look at"),
        ({"attention": "self_svt"}, "attention"),
        ({"share": 1.0}, "share"),
        ({"share": 0.0}, "share"),
        ({"energy": 1.0}, "energy"),
        ({"attention_rank": 0}, "attention_rank"),
        ({"falcon_rank": 0}, "falcon_rank"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(keys, text):
    with pytest.raises(ValidationError, match=text):
        lobert(**keys)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (
            {"attention_rank": 400},
            r"lobert.attention_rank 400 saves nothing on a 768x768 matrix \(break-even 384\); "
            "use rank <= 383",
        ),
        ({"attention_rank": 384}, "use rank <= 383"),
        ({"attention_rank": 800}, "above what a 768x768 matrix can have"),
        ({"ffn_rank": 615}, "saves nothing on a 3072x768 matrix .* use rank <= 614"),
        ({"ffn_rank": 3072}, "above what"),
        ({"attention_rank": [100] * 6}, "6 ranks; an SVD mode takes one number, or one for each"),
        ({"attention_rank": [*[100] * 11, 500]}, "attention_rank 500 saves nothing"),
        ({"attention": "self_tucker_layer", "attention_rank": 192}, "192 is not 3 ranks"),
        ({"attention": "self_tucker_layer", "attention_rank": [2, 384]}, "is not 3 ranks"),
        ({"attention": "self_tucker_4d", "attention_rank": [8, 576, 576]}, "is not 4 ranks"),
        ({"attention": "self_tucker_layer", "attention_rank": [4, 384, 384]}, r"\(4 > 3\)"),
        ({"attention": "self_tucker_layer", "attention_rank": [3, 700, 700]}, "saves nothing"),
        (
            {"ffn": "ffn_tucker", "ffn_rank": [12, 3072, 768]},
            "saves nothing: 76.68M parameters in place of 56.62M",
        ),
        ({"ffn": "ffn_tucker", "ffn_rank": [8, 492, 1968]}, r"\(1968 > 768\)"),
        ({"attention": "self_falcon_layer", "falcon_rank": 3}, "use at most 2"),
        ({"attention": "self_falcon_vertical", "falcon_rank": 12}, "use at most 11"),
        ({"ranks": [[4] * 5] * 4}, "give one for each of the 12 layers, with 5 ranks: query"),
        ({"ranks": [[4] * 4] * 12}, "with 5 ranks"),
        ({"ranks": [[4, 4, 390, 4, 4]] * 12}, "390 for layer 0's value saves nothing"),
        ({"ranks": [[0] * 5] * 12}, "leaves every matrix dense"),
    ],
)
def test_ranks_that_do_not_fit_are_refused_before_any_training(keys, text):
    with pytest.raises(UserError, match=text):
        lobert(**keys).resolve(BertConfig())


def test_without_calibration_rows_nothing_is_weighed():
    model = classifier()
    method = lobert(data_aware=True).resolve(model.config)
    (phase,) = method.phases()
    with pytest.raises(UserError, match="no calibration rows"):
        phase.initialise(model, [])
    with pytest.raises(ValueError, match="no calibration rows"):
        second_moments(model, dense_matrices(model), [])


@pytest.mark.parametrize("before", ["lobert", "q8bert"])
def test_lobert_wants_a_dense_model(before):
    config: Any = classifier().config
    config.compression = [{"name": before}]
    with pytest.raises(UserError, match=f"lobert cannot follow {before}"):
        lobert().resolve(config)


# -- before Theseus --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {"attention": "self_tucker_4d"},
        {"attention": "self_falcon_vertical", "ffn": None},
        {"ffn": "ffn_tucker", "attention": None},
        {"attention_rank": [4, 5, 6, 7]},
        {"energy": 0.6},
        {"share": 0.5, "allocate": "energy"},
    ],
)
def test_theseus_refuses_layers_that_are_bound_together(keys):
    model = classifier()
    method = lobert(**keys).resolve(model.config)
    assert method.bound_to_depth
    config = method.student_config(model.config)
    with pytest.raises(UserError, match="theseus cannot follow lobert"):
        Theseus().resolve(config)


@every_family
@pytest.mark.parametrize(
    "keys",
    [{}, {"attention": "self_tucker_layer"}, {"attention": "self_falcon_4d"}, {"share": 0.5}],
)
def test_theseus_takes_layers_of_their_own(tmp_path, family, keys):
    model = classifier(family)
    method = student(model, **keys)
    assert not method.bound_to_depth
    for phase in Theseus().resolve(model.config).phases():
        phase.prepare(model)
        phase.finish(model)
    assert len(encoder_layers(model)) == model.config.num_hidden_layers == 2
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(raybert.load(tmp_path)), wanted)


@every_family
def test_it_follows_theseus(family):
    model = classifier(family)
    for phase in Theseus().resolve(model.config).phases():
        phase.prepare(model)
        phase.finish(model)
    method = student(model, share=0.5)
    assert method.shape is not None
    assert method.shape.layers == 2
    assert not any(isinstance(m, nn.Linear) and m.weight.shape == (64, 32) for m in model.modules())


# -- whole runs ------------------------------------------------------------------------------------


def test_parameters_that_layers_share_train_alike_under_zero(toy, teacher, tmp_path):
    weights = []
    for stage in (0, 2):
        recipe = toy(
            tmp_path / str(stage),
            teacher=str(teacher),
            method=[{"name": "lobert", "attention": "self_tucker_4d", "ffn": "ffn_tucker"}],
            train={"epochs": 1, "zero": stage},
            kd={"alpha": 0.5, "cls": 1.0},
        )
        plan = make_plan(resolve_paths(recipe))
        _fit(plan, plan.recipe.teacher, None)
        final = plan.recipe.folder / "checkpoints" / "final" / "model.safetensors"
        weights.append(load_file(final))
    assert weights[0].keys() == weights[1].keys()
    assert sum(".lobert." in name for name in weights[0]) == 13
    for name, tensor in weights[0].items():
        assert torch.allclose(weights[1][name], tensor, atol=1e-4), name


@pytest.mark.parametrize("path", sorted((RECIPES / "lobert").glob("*.yaml")), ids=lambda p: p.stem)
def test_paper_recipes_are_the_released_settings(path):
    recipe = load_recipe(f"lobert/{path.stem}")
    (method,) = recipe.method
    assert isinstance(method, LoBERT)
    assert recipe.task == path.stem
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.train.lr) == (4, 32, 2e-5)
    assert recipe.data.max_length == 128
    assert (recipe.kd.alpha, recipe.kd.temperature, recipe.kd.cls) == (0.5, 10, 100)
    resolved = method.resolve(BertConfig())
    assert (resolved.attention_rank, resolved.ffn_rank) == (192, 306)
