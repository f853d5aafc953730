"""EBERT: its loss by hand, gates that padding does not reach, and skipping equal to masking."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import one_and_two, toy_encoder
from safetensors.torch import load_file
from test_conformance import At, predecessor, rows
from torch import Tensor, nn

import raybert
from raybert import skipping
from raybert.compressed import mark_compressed
from raybert.config import KEPT_SHARE, KDConfig
from raybert.errors import UserError
from raybert.gates import Gate, Shape, WorkersBatchNorm, flops_loss, summary, uniform
from raybert.kept import layer_flops
from raybert.methods.ebert import EBERT, FrozenGates, TrainGates, gated
from raybert.methods.lobert import LoBERT
from raybert.methods.q8bert import Q8BERT
from raybert.phase import Distillation, Outputs
from raybert.recipe_file import recipe_from
from raybert.results import read_run
from raybert.run import compress, finetune
from raybert.skipping import Units, _scratch, plan

FAMILIES = ("bert", "roberta", "distilbert")
every_family = pytest.mark.parametrize("family", FAMILIES)


def made(family: str = "bert", **keys: Any) -> tuple[Any, EBERT, TrainGates]:
    """A toy model with gates, undecided enough to keep about half of all units."""
    model = predecessor(family)
    method = EBERT.model_validate({"gate_start": 0.0, **keys}).resolve(model.config)
    torch.manual_seed(5)
    phase = method.phases()[0]
    assert isinstance(phase, TrainGates)
    phase.prepare(model)
    for _, block in gated(model):
        nn.init.normal_(block.gate.score.weight)
    return model, method, phase


def finished(family: str = "bert", **keys: Any) -> tuple[Any, EBERT]:
    model, method, phase = made(family, **keys)
    phase.finish(model)
    return model.eval(), method


def inputs(count: int = 5, length: int = 12, padding: int = 0) -> dict[str, Tensor]:
    """Rows of several lengths, and so many columns of nothing but padding."""
    ids = torch.randint(5, 25, (count, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row in range(1, count):
        mask[row, length - row :] = 0
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    return {k: nn.functional.pad(v, (0, padding)) for k, v in batch.items()}


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


# -- gates -----------------------------------------------------------------------------------------


def test_loss_against_a_case_by_hand():
    shape = Shape(layers=2, hidden=4, heads=2, inner=3)
    tokens = torch.tensor([3, 5])
    kept = [
        torch.tensor([[1.0, 0.0], [1.0, 1.0]]),  # heads of layer 0, of two rows
        torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        torch.tensor([[0.0, 0.0], [0.0, 1.0]]),
        torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]),
    ]
    # Of a head of width 2: 4 x 2 x 4 multiply-adds a token and 2 x 2 a pair; of a neuron 2 x 4.
    head = {3: 32 * 3 + 4 * 9, 5: 32 * 5 + 4 * 25}
    neuron = {3: 8 * 3, 5: 8 * 5}
    gates = 2 * (2 * 4 * 64 + 64 * (2 + 3))
    cost = (1 * head[3] + 4 * neuron[3]) + (3 * head[5] + 2 * neuron[5]) + 2 * gates
    dense = sum(2 * (2 * head[n] + 3 * neuron[n]) for n in (3, 5))
    saved = 1 - cost / dense
    dropped = [1 / 4, 5 / 6, 3 / 4, 1 / 6]
    wanted = (saved - 0.6) ** 2 + 5 / 2 * sum((0.6 - d) ** 2 for d in dropped)
    loss, share = flops_loss(shape, kept, tokens, target=0.4, weight=5.0)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    assert share.item() == pytest.approx(1 - saved, rel=1e-6)


def test_a_training_step_adds_lambda_times_that_loss():
    model, method, phase = made(target_flops_ratio=0.3)
    batch = rows("classification")
    kd = Distillation(KDConfig(), "classification", ())
    model.train()
    phase.on_step(model, At(step=0, total=4, forward=0, seed=1, rows=torch.arange(4)))
    out = Outputs(model(**batch))
    blocks: Any = [block for _, block in gated(model)]
    kept = [block.gate.kept for block in blocks]
    assert method.shape is not None
    tokens = batch["attention_mask"].sum(1)
    wanted, share = flops_loss(method.shape, kept, tokens, target=0.3, weight=5.0)
    terms = phase.losses(model, out, None, batch, kd)
    assert terms["flops"].item() == pytest.approx(4 * wanted.item())
    assert terms["task"].item() == pytest.approx(out.model.loss.item())
    assert phase.metrics(model) == {"flops_share": pytest.approx(share.item())}
    terms["flops"].backward()
    assert all(b.gate.score.weight.grad.abs().sum() > 0 for b in blocks)


def test_decisions_are_hard_and_their_gradient_is_that_of_the_sigmoid():
    gate = Gate(8, 6, number=0, top=None, start=0.0, temperature=2.0).train()
    first = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    gate.draw = (1, 2, torch.arange(16))
    kept = gate(first)
    noise = uniform(1, 2, 0, torch.arange(16), 6)
    soft = torch.sigmoid((gate.logits(first) + torch.log(noise / (1 - noise))) / 2.0)
    assert torch.equal(kept.detach(), (soft > 0.5).float())
    assert 0 < kept.mean() < 1
    (given,) = torch.autograd.grad(kept.sum(), gate.score.bias)
    assert given == pytest.approx((soft * (1 - soft) / 2.0).sum(0).detach(), rel=1e-4)
    gate.eval()
    assert torch.equal(gate(first), gate.logits(first) >= 0)


def test_topk_keeps_a_fixed_number_in_training_and_after():
    model, method, phase = made(masks="topk", target_flops_ratio=0.6)
    wanted = [max(1, round(method.kept * n)) for n in (2, 64)] * 4
    model.train()
    batch = rows("classification")
    phase.on_step(model, At(step=0, total=4, forward=0, seed=1, rows=torch.arange(4)))
    model(**batch)
    blocks: Any = [block for _, block in gated(model)]
    assert [set(b.gate.kept.sum(1).tolist()) for b in blocks] == [{n} for n in wanted]
    kd = Distillation(KDConfig(), "classification", ())
    assert set(phase.losses(model, Outputs(model(**batch)), None, batch, kd)) == {"task"}
    phase.finish(model)
    assert [b.gate(torch.randn(1, 32)).sum().item() for b in blocks] == wanted


def test_a_row_draws_the_same_wherever_it_stands():
    whole = uniform(7, 3, 1, torch.tensor([4, 9, 2]), 50)
    assert torch.equal(uniform(7, 3, 1, torch.tensor([2]), 50)[0], whole[2])
    others = [uniform(*a, torch.tensor([4]), 50)[0] for a in ((7, 4, 1), (7, 3, 2), (8, 3, 1))]
    assert not any(torch.equal(other, whole[0]) for other in others)
    many = uniform(0, 0, 0, torch.arange(2000), 64)
    assert many.min() > 0
    assert many.max() < 1
    assert many.mean().item() == pytest.approx(0.5, abs=0.005)
    assert many.var().item() == pytest.approx(1 / 12, abs=0.002)
    assert torch.corrcoef(many[:, :2].T)[0, 1].abs() < 0.06
    assert torch.corrcoef(many[:2])[0, 1].abs() < 0.4


@every_family
def test_padding_reaches_no_decision_no_statistic_and_no_share(family):
    seen = []
    for padding in (0, 7):
        model, _, phase = made(family)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        batch = {**inputs(padding=padding), "labels": torch.tensor([0, 1, 1, 0, 1])}
        model.train()
        phase.on_step(model, At(step=0, total=4, forward=0, seed=1, rows=torch.arange(5)))
        out = Outputs(model(**batch))
        blocks: Any = [block for _, block in gated(model)]
        drawn = [block.gate.kept.detach() for block in blocks]
        phase.losses(model, out, None, batch, Distillation(KDConfig(), "classification", ()))
        moments = [block.gate.norm.running_var for _, block in gated(model)]
        model.eval()
        decided: list[Tensor] = []
        for _, block in gated(model):
            block.gate.register_forward_hook(lambda _m, _a, keep, into=decided: into.append(keep))
        logits(model, inputs(padding=padding))
        seen.append((drawn, moments, decided, phase.share))
    (drawn, moments, decided, share), again = seen
    assert all(torch.equal(a, b) for a, b in zip(drawn, again[0], strict=True))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(moments, again[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(decided, again[2], strict=True))
    assert 0 < torch.cat([d.float().flatten() for d in decided]).mean() < 1
    assert share == again[3]


def test_the_first_gate_sees_the_mean_over_real_tokens():
    hidden = torch.randn(2, 4, 3)
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    wanted = torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0)])
    boolean = real[:, None, None, :].expand(2, 1, 4, 4)
    added = torch.zeros(2, 1, 4, 4).masked_fill(~boolean, torch.finfo(torch.float32).min)
    for mask in (boolean, added):
        assert torch.allclose(summary(hidden, mask, mean=True), wanted)
    assert torch.equal(summary(hidden, None, mean=True), hidden.mean(1))
    assert torch.equal(summary(hidden, boolean, mean=False), hidden[:, 0])


def test_normalisation_of_one_worker_is_torch_s():
    ours, theirs = WorkersBatchNorm(4).train(), nn.BatchNorm1d(4).train()
    for seed in range(3):
        x = torch.randn(9, 4, generator=torch.Generator().manual_seed(seed)) * 2 + 1
        assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    for name, buffer in theirs.named_buffers():
        assert torch.allclose(ours.get_buffer(name).float(), buffer.float(), atol=1e-6), name
    before = ours.running_var.clone()
    assert torch.isfinite(ours(torch.randn(1, 4))).all()
    assert torch.equal(ours.running_var, before), "one row has no variance"


STEP = """
from raybert.gates import Gate, Shape, flops_loss

torch.manual_seed(0)
gate = Gate(8, 6, number=0, top=None, start=0.0, temperature=1.0).train()
heads = torch.nn.Parameter(torch.full((12, 2), 0.5))
own = torch.arange(12) if workers == 1 else torch.arange(8) if rank == 0 else torch.arange(8, 12)
first = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))[own]
gate.draw = (1, 2, own)
kept = gate(first)
shape = Shape(layers=1, hidden=8, heads=2, inner=6)
loss, share = flops_loss(shape, [heads[own], kept], own + 3, target=0.3, weight=5.0)
# As the loop does: every worker's mean, weighted by its rows, averaged over workers.
((loss + kept.square().sum(1).mean()) * len(own) * workers / 12).backward()
grads = {f"{n}.grad": p.grad for n, p in [*gate.named_parameters(), ("heads", heads)]}
if workers > 1:
    for grad in grads.values():
        dist.all_reduce(grad)
        grad /= workers
statistics = {"mean": gate.norm.running_mean, "var": gate.norm.running_var}
found = {**statistics, **grads, "share": share, "loss": loss.detach()}
"""


def test_two_workers_have_the_statistics_and_gradients_of_one(tmp_path: Path):
    one, two, _ = one_and_two(STEP, tmp_path)
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.allclose(value, two[key], atol=1e-6), key
    assert one["reduce.weight.grad"].abs().sum() > 0


# -- frozen gates and removal ----------------------------------------------------------------------


def test_train_mode_does_not_unfreeze_a_gate():
    model, _ = finished()
    batch, before = inputs(), copy.deepcopy(model.state_dict())
    wanted = logits(model, batch)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for _ in range(3):
        out = model(**batch, labels=torch.tensor([0, 1, 1, 0, 1]))
        assert torch.allclose(out.logits, wanted, atol=1e-5)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (".gate." in name), name
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_freezing_folds_the_normalisation_exactly():
    gate: Any = Gate(8, 50, number=0, top=None, start=0.0, temperature=1.0)
    nn.init.uniform_(gate.norm.weight, 0.5, 2.0)
    nn.init.normal_(gate.norm.bias)
    gate.train()
    for seed in range(20):
        gate.norm(torch.randn(9, 64, generator=torch.Generator().manual_seed(seed)) * 3 + 1)
    first = torch.randn(7, 8)
    gate.eval()
    wanted = gate.logits(first)
    gate.freeze()
    assert torch.allclose(gate.logits(first), wanted, atol=1e-5)


@every_family
def test_removal_takes_away_what_no_row_keeps_and_nothing_else(family, tmp_path):
    model, method = finished(family, remove=True)
    batch = inputs()
    for number, (_, block) in enumerate(gated(model)):  # a third of all units are never kept
        block.gate.score.bias.data[number % 3 :: 3] -= 100.0
    wanted, before = logits(model, batch), sum(p.numel() for p in model.parameters())
    method = method.settle(model, [batch])
    phase = method.phases()[1]
    assert isinstance(phase, FrozenGates)
    told = phase.initialise(model, [batch])["left after removal"]
    phase.prepare(model)
    phase.finish(model)
    assert torch.allclose(logits(model, batch), wanted, atol=1e-5)
    assert method.heads is not None
    assert method.neurons is not None
    assert max(method.neurons) <= 43
    assert told["layer 1 neurons"] == method.neurons[1]
    blocks = [block for _, block in gated(model)]
    assert [b.units.count for b in blocks[1::2]] == list(method.neurons)
    assert [b.gate.score.out_features for b in blocks[::2]] == list(method.heads)
    assert sum(p.numel() for p in model.parameters()) < before
    assert method.settle(model, [batch]) == method
    mark_compressed(model, method)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(raybert.load(tmp_path), batch), logits(model, batch))


# -- skipping --------------------------------------------------------------------------------------


@pytest.fixture
def eager_to_skip(monkeypatch):
    """Gathering and groups cost nothing, so that toy models too are computed in parts."""
    monkeypatch.setattr(skipping, "GATHER", 0)
    monkeypatch.setattr(skipping, "CALL", 0)


@every_family
@pytest.mark.parametrize("keys", [{}, {"masks": "topk", "target_flops_ratio": 0.6}])
def test_skipping_gives_what_masking_gives(eager_to_skip, family, keys):
    model, _ = finished(family, **keys)
    for count in (1, 5):
        for padding in (0, 3):
            batch = inputs(count, padding=padding)
            skipped, flops = logits(model, batch), layer_flops(model, batch)
            for _, block in gated(model):
                block.skips = False
            masked, dense = logits(model, batch), layer_flops(model, batch)
            for _, block in gated(model):
                block.skips = True
            assert torch.allclose(skipped, masked, atol=1e-5)
            assert flops < 0.9 * dense


def test_groups_are_computed_under_autocast(eager_to_skip):
    model, _ = finished()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model(**inputs(5)).logits
    assert half.float() == pytest.approx(logits(model, inputs(5)), abs=0.1)


def test_a_trace_is_of_whole_products(eager_to_skip):
    """For it serves other samples than the one that it was made with."""
    model, _ = finished()
    model.config.return_dict = False
    rows = inputs(3)
    first, other = ([rows[key][[row]] for key in ("input_ids", "attention_mask")] for row in (0, 2))
    with torch.no_grad():
        traced = torch.jit.trace(model, first)
        assert isinstance(traced, torch.jit.ScriptModule)
        assert torch.allclose(traced(*other)[0], model(*other)[0], atol=1e-5)


def test_the_room_for_gathers_serves_in_and_outside_inference_mode(eager_to_skip):
    model, _ = finished()
    _scratch.buffers.clear()
    with torch.inference_mode():
        first = model(**inputs(1)).logits
    assert torch.equal(first, logits(model, inputs(1)))


def test_a_block_of_which_nothing_or_all_is_kept(eager_to_skip):
    model, _ = finished()
    blocks = [block for _, block in gated(model)]
    for bias, kept in ((-100.0, 0), (100.0, 1)):
        for block in blocks:
            block.gate.score.bias.data.fill_(bias)
        skipped = logits(model, inputs(2))
        for block in blocks:
            block.skips = False
        assert torch.allclose(skipped, logits(model, inputs(2)), atol=1e-5)
        for block in blocks:
            block.skips = True
        hidden = torch.randn(1, 4, 32)
        with torch.no_grad():
            out = blocks[1].run(hidden)[0]
        bare = blocks[1].units.out_bias.expand_as(hidden)
        assert torch.equal(out, bare) == (kept == 0)


def test_gradients_and_readable_attention_come_from_whole_products(eager_to_skip):
    model, _ = finished()
    batch = inputs(2)
    model(**batch).logits.sum().backward()
    units: Any = gated(model)[1][1].units
    assert units.weight.grad.abs().sum() > 0
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**batch, output_attentions=True, output_hidden_states=True)
    assert [a.shape for a in out.attentions] == [(2, 2, 12, 12)] * 4
    assert len(out.hidden_states) == 5


def test_units_lie_one_after_the_other():
    query, key, value, joined = (nn.Linear(6, 6) for _ in range(4))
    units = Units([query, key, value], joined, 3)
    assert units.weight.shape == (3, 3, 2, 6)
    assert all(p.is_contiguous() for p in units.parameters())
    x = torch.randn(1, 4, 6)
    q, _, v = units.inward(x).chunk(3, -1)
    assert torch.allclose(q, query(x), atol=1e-6)
    assert torch.allclose(v, value(x), atol=1e-6)
    assert torch.allclose(units.outward(x), joined(x), atol=1e-6)
    with torch.no_grad():
        two = torch.tensor([0, 2])
        assert torch.allclose(
            units.inward(x, two).chunk(3, -1)[1], key(x)[..., [0, 1, 4, 5]], atol=1e-6
        )


def test_groups_cover_every_row_once_and_all_it_keeps():
    draw = torch.Generator().manual_seed(0)
    for share in (0.1, 0.5, 0.95):
        keep = (torch.rand(9, 400, generator=draw) < share).numpy()
        keep[3] = keep[7]
        groups = plan(keep, 16, 2000, slices=True)
        assert sorted(row for group in groups for row in group.rows.tolist()) == list(range(9))
        for group in groups:
            rows_ = keep[group.rows]
            if group.units is not None:
                assert not rows_[:, [u for u in range(400) if u not in group.units]].any()
            else:
                assert rows_.mean() > 0.4
    assert len(plan(keep[[3, 7]], 128, 2000, slices=True)) == 1


def test_groups_share_gathers_only_where_that_is_cheaper():
    keep = torch.zeros(4, 1000, dtype=torch.bool)
    keep[:2, :300] = True
    keep[1, 299] = False  # nearly the same
    keep[2:, 600:800] = True
    found = plan(keep.numpy(), 128, 10**6, slices=False)
    assert sorted(sorted(group.rows.tolist()) for group in found) == [[0, 1], [2, 3]]
    exact = {len(group.units): group.exact for group in found if group.units is not None}
    assert exact == {300: False, 200: True}
    keep[:] = True
    keep[:, :30] = False
    (whole,) = plan(keep.numpy(), 128, 10**6, slices=False)
    assert whole.units is None
    assert not whole.exact
    (alone,) = plan(
        keep[:1, :].numpy() & (torch.arange(1000) < 500).numpy(), 128, 10**6, slices=False
    )
    assert alone.units is not None
    assert alone.exact


def test_units_kept_by_most_are_computed_where_they_lie(monkeypatch):
    keep = torch.zeros(1, 1000, dtype=torch.bool)
    keep[0, :400] = keep[0, 700:720] = True
    keep[0, 17] = False
    group: Any
    (group,) = plan(keep.numpy(), 128, 10**6, slices=True)
    assert (group.prefix, len(group.units)) == (400, 419)
    keep[0, :400:2] = False
    (group,) = plan(keep.numpy(), 128, 10**6, slices=True)
    assert group.prefix == 0
    monkeypatch.setattr(skipping, "CALL", 0)
    monkeypatch.setattr(skipping, "GATHER", 4)
    model, _ = finished()
    block: Any = gated(model)[3][1]
    block.gate.score.weight.data.zero_()
    hidden = torch.randn(3, 12, 32)
    for kept in ([*range(30)], [*range(20), 40, 41], [*range(1, 24)]):
        block.gate.score.bias.data.fill_(-1.0)
        block.gate.score.bias.data[kept] = 1.0
        with torch.no_grad():
            decided = block.gate(hidden[:, 0]).numpy()
            found = plan(decided, 12, block.units.multiply_adds, slices=True)
            assert [group.prefix > 0 for group in found] == [True]
            skipped = block.run(hidden)[0]
            block.skips = False
            assert torch.allclose(skipped, block.run(hidden)[0], atol=1e-5)
            block.skips = True


def test_the_likeliest_units_come_first_and_nothing_else_changes():
    model, _, phase = made()
    block: Any = gated(model)[1][1]
    batch = {**inputs(8), "labels": torch.zeros(8, dtype=torch.long)}
    phase.on_step(model, At(step=0, total=4, forward=0, seed=1, rows=torch.arange(8)))
    for _ in range(40):  # until the averages are there
        model.train()(**batch)
    model.eval()
    before = logits(model, inputs())
    phase.finish(model)
    assert torch.allclose(logits(model, inputs()), before, atol=1e-5)
    seen: list[Any] = []
    block.gate.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    logits(model, inputs(8))
    means = block.gate.logits(seen[0]).mean(0).detach()
    assert means[:16].mean() > means[16:48].mean() > means[48:].mean()


# -- what is told ----------------------------------------------------------------------------------


def test_facts_are_those_of_the_rows(eager_to_skip):
    model, method = finished()
    batch = inputs(6)
    facts = method.phases()[0].facts(model, [batch, inputs(3, 8)])
    shares = facts[KEPT_SHARE]
    assert list(shares)[:3] == ["layer 0 heads", "layer 0 neurons", "layer 1 heads"]
    decided: list[Any] = []
    gated(model)[3][1].gate.register_forward_hook(lambda _m, _a, keep: decided.append(keep))
    logits(model, batch)
    logits(model, inputs(3, 8))
    assert shares["layer 1 neurons"] == pytest.approx(torch.cat(decided).float().mean().item())
    flops = facts["share of the layers' FLOPs"]
    assert flops["least of a row"] < flops["50% of rows at most"] < flops["most of a row"]
    # Where every unit that is kept is gathered, torch counts what the formula says.
    assert flops["9 rows, as torch counts"] == pytest.approx(flops["9 rows, by formula"], rel=1e-4)
    assert flops["9 rows, by formula"] == pytest.approx(flops["all rows, by formula"])


def test_flops_are_those_of_the_finished_model_if_attention_was_learned(eager_to_skip):
    model, method = finished()
    facts = [method.phases()[0].facts(model, [inputs(6)])]
    model.set_attn_implementation("eager")  # as kd.attention has it
    facts.append(method.phases()[0].facts(model, [inputs(6)]))
    assert model.config._attn_implementation == "eager"
    assert facts[0] == facts[1]


def test_rows_dealt_out_otherwise_decide_alike():
    model, _, phase = made()
    model.train()
    block = gated(model)[1][1]
    block.gate.norm.eval()  # its statistics are those of all workers
    first = torch.randn(4, 32)
    drawn = []
    for part in ([0, 1, 2, 3], [2, 3]):
        at = At(step=5, total=9, forward=5, seed=1, rows=torch.tensor(part) + 100)
        phase.on_step(model, at)
        drawn.append(block.gate(first[part]).detach())
    assert torch.equal(drawn[0][2:], drawn[1])
    assert not torch.equal(drawn[0][:2], drawn[1])


@pytest.mark.distributed
def test_two_workers_train_like_one(toy, teacher, tmp_path):
    runs = []
    for workers in (1, 2):
        recipe = toy(
            tmp_path / str(workers),
            teacher=str(teacher),
            method=[{"name": "ebert", "gate_start": 0.5, "remove": True, "report_rows": 8}],
            kd={"alpha": 0.5},
            workers=workers,
            train={"epochs": 1, "dropout": 0.0, "precision": "fp32", "keep": "last"},
        )
        runs.append(compress(recipe, tell=lambda text: None))
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").open()] for run in runs]
    for key in ("loss", "loss/flops", "flops_share"):
        one, two = ([line[key] for line in log if line["kind"] == "train"] for log in logs)
        assert one == pytest.approx(two, rel=1e-3), key
    # Sums over workers round otherwise: a neuron whose gate is at its threshold may go either way.
    one, two = (read_run(run).report for run in runs)
    assert one.facts["frozen_gates"] == {
        title: {
            key: pytest.approx(value, abs=1 if _counts_neurons(title, key) else 0.02)
            for key, value in table.items()
        }
        for title, table in two.facts["frozen_gates"].items()
    }


def _counts_neurons(title: str, key: str) -> bool:
    return title == "left after removal" and key.endswith("neurons")


# -- refusals --------------------------------------------------------------------------------------


def test_bad_input_is_refused_before_training():
    config = predecessor("bert").config
    with pytest.raises(UserError, match=r"target_flops_ratio 0.001 is out of reach.*cost 0\.\d+"):
        EBERT(target_flops_ratio=0.001).resolve(config)
    pruned = EBERT().resolve(config).student_config(config)
    with pytest.raises(UserError, match="ebert cannot follow ebert"):
        EBERT().resolve(pruned)
    with pytest.raises(UserError, match="q8bert cannot follow ebert"):
        Q8BERT().resolve(pruned)
    with pytest.raises(UserError, match="lobert cannot follow ebert"):
        LoBERT().resolve(pruned)
    factors = LoBERT().resolve(config)
    with pytest.raises(UserError, match="ebert cannot follow lobert"):
        EBERT().resolve(factors.student_config(config))
    chunked = copy.deepcopy(toy_encoder().config)
    chunked.chunk_size_feed_forward = 16
    with pytest.raises(UserError, match="chunk_size_feed_forward=0"):
        EBERT().resolve(chunked)
    with pytest.raises(UserError, match="frozen_lr is given and"):
        recipe_from({"method": [{"name": "ebert", "frozen_lr": 1e-5}]})
    with pytest.raises(UserError, match="found no calibration rows"):
        FrozenGates(EBERT(remove=True).resolve(config)).initialise(predecessor("bert"), [])


def test_weights_that_are_hardly_pruned_are_not_the_best_ones():
    phase = TrainGates(EBERT.model_validate({"target_flops_ratio": 0.5}))
    assert not phase.may_end(0)
    assert not phase.may_end(10)  # nothing is known to be left out
    phase.share = torch.tensor(0.56)
    assert not phase.may_end(10)
    phase.share = torch.tensor(0.54)
    assert phase.may_end(10)
    fixed = TrainGates(EBERT.model_validate({"masks": "topk"}))
    assert fixed.may_end(1)


def test_a_run_whose_target_is_never_reached_keeps_its_last_weights(toy, teacher, tmp_path):
    keys = {"target_flops_ratio": 0.3, "gate_lr": 1e-9}  # gates that stay where they start
    train = {"epochs": 2, "eval_every": 3, "keep": "best"}
    recipe = toy(tmp_path / "run", teacher=str(teacher), method=[{"name": "ebert", **keys}],
                 train=train)  # fmt: skip
    run = compress(recipe, tell=lambda text: None)
    held = json.loads((run / "checkpoints" / "final" / "result.json").read_text())["position"]
    assert held["best_step"] == held["steps"] > 3
    (note,) = [text for text in held["notes"] if text.startswith("ebert: the last step's rows")]
    assert "more than the target of 30%: train longer" in note
    # And who trains it on leaves the gates, which are frozen, as they are.
    more = finetune(toy(tmp_path / "more", model=str(run), train={"epochs": 1}), tell=print)
    before, after = (load_file(place / "model" / "model.safetensors") for place in (run, more))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert any(name.endswith(".units.weight") for name in changed)
    assert not [name for name in changed if ".gate." in name]


def test_passes_of_too_few_rows_are_refused():
    for train, advice in (
        ({"batch_size": 8, "accumulation": 8}, r"1 are too few.*train\.accumulation=1\."),
        ({"batch_size": 32, "accumulation": 5}, r"6 are too few.*train\.accumulation=4\."),
        ({"batch_size": 4}, r"train\.accumulation=1 and train\.batch_size=8"),
    ):
        recipe = recipe_from({"method": ["ebert"], "train": train})
        with pytest.raises(UserError, match=advice):
            recipe.method[0].bind(recipe)


def test_what_removal_settles_cannot_be_asked_for():
    counts = {"heads": [1, 1, 1, 1], "neurons": [9, 9, 9, 9]}
    recipe = recipe_from({"method": [{"name": "ebert", **counts}]})
    with pytest.raises(UserError, match=r"Leave them out, and say method\.ebert\.remove=true"):
        recipe.method[0].bind(recipe)


def test_gates_that_are_not_trained_are_warned_of():
    phase = TrainGates(EBERT())
    assert phase.warnings(100) == []
    assert "whatever the target is" in phase.warnings(0)[0]
    assert TrainGates(EBERT(masks="topk")).warnings(0) == []


def test_a_worker_that_found_other_units_has_the_first_ones_sizes():
    """Its weights come from there."""
    model, method = finished(remove=True, frozen_epochs=1.0)
    shape = {"heads": [1, 2, 1, 2], "neurons": [7, 8, 9, 10]}
    phase = FrozenGates(method.model_copy(update=shape))
    phase.used = [torch.arange(2), torch.arange(8)] * 4
    phase.prepare(model)
    counts = [block.units.count for _, block in gated(model)]
    assert counts == [1, 7, 2, 8, 1, 9, 2, 10]


def test_heads_that_are_gone_have_no_attention_to_learn():
    keys = {"name": "ebert", "remove": True, "frozen_epochs": 1.0}
    recipe = recipe_from({"method": [keys], "kd": {"attention": 1.0}})
    with pytest.raises(UserError, match=r"ebert\.remove takes heads away.*kd\.attention=0"):
        recipe.method[0].bind(recipe)
    for change in ({"remove": False}, {"frozen_epochs": 0.0}):
        method = EBERT.model_validate({**keys, **change})
        assert method.bind(recipe) is method
