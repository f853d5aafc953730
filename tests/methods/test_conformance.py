"""What every method must hold to. A new method is run through all of it by its line in METHODS.

One worker against two, and runs killed from outside, are in ``tests/test_train.py``.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB, toy_encoder
from safetensors.torch import load_file
from torch import Tensor, nn

import raybert
import raybert.train
from raybert.bench import parameters
from raybert.compressed import mark_compressed
from raybert.config import KDConfig
from raybert.errors import UserError
from raybert.method import MethodConfig
from raybert.methods import METHODS
from raybert.models import COMPRESSED_PREFIX, HEADS, PROBLEMS, blank
from raybert.phase import At, Distillation, Outputs, Phase
from raybert.plan import make_plan, resolve_paths
from raybert.recipe_file import recipe_from
from raybert.results import read_run
from raybert.run import _fit, compress

FAMILIES = ("bert", "roberta", "distilbert")
KINDS = ("classification", "qa", "mlm")

TOYS: dict[str, list[dict[str, Any]]] = {
    "theseus": [
        {},
        {"modules": "sublayer", "groups": [1, 2, 1], "finetune_epochs": 1, "finetune_all": True},
    ],
    "lobert": [
        {},
        {"share": 0.6, "allocate": "energy", "data_aware": True, "attention_output": True},
        {"energy": 0.6, "lr": 1e-4},
        {"attention": "self_tucker_layer", "attention_rank": [2, 12, 10], "ffn": None},
        {"attention": "self_falcon_layer", "falcon_rank": 2},
        {"attention": "self_falcon_4d", "share": 0.6},
        {"attention": "self_tucker_vertical", "ffn": "ffn_tucker"},
        {"attention": "self_falcon_vertical", "ffn": "ffn_tucker", "ffn_rank": [2, 30, 15]},
        {"attention": "self_tucker_4d", "share": 0.5},
    ],
    "ebert": [
        {},
        {"masks": "topk", "target_flops_ratio": 0.7},
        {"remove": True, "frozen_epochs": 1, "gate_start": 0.0, "gate_lr": 0.1},
    ],
    "ma_bert": [
        {"fit_steps": 4, "layer_steps": 2, "length": 32},
        {"length": 32, "shared": True, "warm_start": False, "warmup": 2},
    ],
    "q8bert": [
        {},
        {"mode": "dynamic"},
        {"mode": "none", "embeddings": False},
        {"per_channel": True, "requantise": True, "start_step": 2, "asymmetric": True},
        {"weight_bits": 4, "activation_bits": 6, "embedding_bits": 2, "asymmetric": True},
        {"mode": "dynamic", "requantise": True, "weight_bits": 3, "activation_bits": 4},
    ],
}
"""Parameters under which a method fits a toy model of 4 layers of 32; nothing: its own."""

CASES = [{"name": name, **toys} for name in METHODS for toys in TOYS.get(name, [{}])]
IDS = [f"{case['name']}{i}" for i, case in enumerate(CASES)]
GROWING = {"ebert", "ma_bert"}
"""Methods that make a model cheaper to compute, and not smaller."""

WHOLE = {"lobert": (2, 6), "q8bert": (0, 3), "ebert": (2,)}
"""Toys that go through whole runs, where not all do: each that has a state of its own to resume."""

RUNS = {
    **{
        f"{name}{number}": [{"name": name, **toys}]
        for name in METHODS
        for number, toys in enumerate(TOYS.get(name, [{}]))
        if number in WHOLE.get(name, (number,))
    },
    "integers alone": [
        {"name": "ma_bert", **TOYS["ma_bert"][0]},
        {"name": "q8bert", "integer_only": True},
    ],
}
every_run = pytest.mark.parametrize("chain", RUNS.values(), ids=RUNS)
every_case = pytest.mark.parametrize("case", CASES, ids=IDS)
every_family = pytest.mark.parametrize("family", FAMILIES)


def _squares() -> Iterator[Any]:
    """Every case with every family and every kind, a third of all three together; the rest takes
    minutes, and is marked so."""
    for number, case in enumerate(CASES):
        for turn, family in enumerate(FAMILIES):
            for place, kind in enumerate(KINDS):
                more = [] if (number + turn + place) % len(KINDS) == 0 else [pytest.mark.long]
                name = f"{kind}-{family}-{IDS[number]}"
                yield pytest.param(case, family, kind, marks=more, id=name)


every_square = pytest.mark.parametrize(("case", "family", "kind"), list(_squares()))


def method_of(case: dict[str, Any]) -> MethodConfig:
    return METHODS[case["name"]].model_validate(case)


def predecessor(family: str, kind: str = "classification") -> Any:
    torch.manual_seed(1)
    config: Any = copy.deepcopy(toy_encoder(family).config)
    if kind == "classification":
        config.problem_type = PROBLEMS[kind]
    return HEADS[kind].from_config(config).eval()


def rows(kind: str) -> dict[str, Tensor]:
    ids = torch.randint(5, len(VOCAB), (4, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2, 6:] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if kind == "qa":
        places = {"start_positions": torch.tensor([1, 2, 3, 4])}
        return {**inputs, **places, "end_positions": torch.tensor([2, 3, 4, 5])}
    labels = torch.where(ids % 5 == 0, ids, -100) if kind == "mlm" else torch.tensor([0, 1, 1, 0])
    return {**inputs, "labels": labels}


def outputs(model: Any) -> list[Tensor]:
    model.eval()
    with torch.no_grad():
        out = model(**{k: v for k, v in rows("qa").items() if "position" not in k})
    return Outputs(out).logits()


def loaded(folder: Path) -> Any:
    """A saved model, each tensor in memory of its own: where a file happens to place them, some
    processors' products differ in their last bit."""
    model = raybert.load(folder)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model


def trained(phase: Phase, model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a phase leaves in the optimiser."""
    found = {}
    for name, parameter in model.named_parameters():
        rate = next((r for p, r in phase.rates.items() if fnmatch.fnmatchcase(name, p)), None)
        if rate is None or rate > 0:
            found[name] = parameter
    return found


@dataclass
class Finished:
    """A finished model, and what was seen while its phases went by."""

    model: Any
    chain: list[MethodConfig]  # resolved and settled
    config: Any  # of the predecessor
    losses: list[float]
    without_gradient: list[str]
    moved: list[float]
    """For each phase the largest change of a logit by `finish`."""


def finished(chain: list[dict[str, Any]], family: str, kind: str) -> Finished:
    """Take a toy model through methods' phases, a few steps each, as the loop does."""
    model = predecessor(family, kind)
    result = Finished(model, [], copy.deepcopy(model.config), [], [], [])
    for case in chain:
        method = method_of(case).resolve(model.config)
        method = go_through(method, kind, result)
        if method.leaves_trace:
            mark_compressed(model, method)
        result.chain.append(method)
    return result


def go_through(method: MethodConfig, kind: str, result: Finished) -> MethodConfig:
    """One method's phases; the method as it was settled."""
    model = result.model
    distillation = Distillation(KDConfig.model_validate({}), kind, ())
    for number in range(len(method.phases())):
        model.eval()
        method = method.settle(model, [rows(kind)])
        phase = method.phases()[number]
        phase.initialise(model, [rows(kind)])
        phase.prepare(model)
        mine = trained(phase, model)
        assert mine, f"{phase.name} trains nothing"
        optimizer = torch.optim.AdamW(mine.values(), lr=1e-2)
        model.train()
        total = 4
        for step in range(total):
            batch = rows(kind)
            places = torch.arange(len(batch["input_ids"]))
            phase.on_step(model, At(step=step, total=total, forward=step, seed=3, rows=places))
            terms = phase.losses(model, Outputs(model(**batch)), None, batch, distillation)
            loss = torch.stack(list(terms.values())).sum()
            result.losses.append(loss.item())
            if loss.requires_grad:
                loss.backward()
                optimizer.step()
        result.without_gradient += [
            name
            for name, parameter in mine.items()
            if parameter.grad is None or not torch.isfinite(parameter.grad).all()
        ]
        assert all(math.isfinite(value) for value in phase.metrics(model).values())
        before = outputs(model)
        phase.finish(model)
        after = outputs(model)
        result.moved.append(
            max((a - b).abs().max().item() for a, b in zip(before, after, strict=True))
        )
    return method


@pytest.fixture(scope="module")
def made():
    """Finished models, each made once."""
    kept: dict[tuple[str, str, str], Finished] = {}

    def make(
        chain: dict[str, Any] | list[dict[str, Any]], family: str, kind: str = "classification"
    ) -> Finished:
        chain = [chain] if isinstance(chain, dict) else chain
        key = (json.dumps(chain), family, kind)
        if key not in kept:
            kept[key] = finished(chain, family, kind)
        return kept[key]

    return make


@every_case
@every_family
def test_resolving_is_done_once_and_survives_json(case, family):
    config = predecessor(family).config
    before = config.to_dict()
    method = method_of(case).resolve(config)
    assert method.resolve(config) == method
    again = METHODS[method.name].model_validate(json.loads(method.model_dump_json()))
    assert again == method
    assert config.to_dict() == before, "the config that it was shown is left as it was"
    assert method.student_config(config).to_dict() != before or type(method).leaves_trace
    assert config.to_dict() == before


@pytest.mark.parametrize("name", METHODS)
def test_unknown_parameters_are_refused(name):
    with pytest.raises(UserError, match="unknown key `nonsense`"):
        recipe_from({"method": [{"name": name, "nonsense": 1}]})


@every_square
def test_losses_are_finite_and_all_that_is_trained_gets_a_gradient(made, case, family, kind):
    done = made(case, family, kind)
    assert all(math.isfinite(loss) and loss > 0 for loss in done.losses)
    unused = "pooler"  # a head for tokens does not read the pooler
    assert [name for name in done.without_gradient if unused not in name] == []


@every_case
@every_family
def test_finishing_does_not_change_what_the_model_says(made, case, family):
    done = made(case, family)
    assert len(done.moved) == len(done.chain[0].phases())
    assert max(done.moved) < 1e-5


@every_case
@every_family
def test_the_finished_model_has_the_config_that_was_announced(made, case, family):
    done = made(case, family)
    told = done.chain[0].student_config(done.config).to_dict()
    found = done.model.config.to_dict()
    for key in set(told) - {"model_type", "architectures", "compression", "transformers_version"}:
        assert found[key] == told[key], key
    if case["name"] not in GROWING:
        assert parameters(done.model)["total"] <= parameters(predecessor(family))["total"]


@every_square
def test_its_structure_is_replayed_from_the_config_alone(made, case, family, kind):
    done = made(case, family, kind)
    empty = blank(done.config, kind, done.chain)
    assert all(tensor.is_meta for tensor in empty.parameters())
    shapes = {k: (v.shape, v.dtype) for k, v in done.model.state_dict().items()}
    assert {k: (v.shape, v.dtype) for k, v in empty.state_dict().items()} == shapes
    names = [name for name, _ in empty.named_parameters()]
    assert names == [name for name, _ in done.model.named_parameters()]


@every_square
def test_it_is_saved_and_loaded_bit_for_bit(made, tmp_path, case, family, kind):
    done = made(case, family, kind)
    done.model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert type(again) is type(done.model)
    compressed = again.config.model_type.startswith(COMPRESSED_PREFIX)
    assert compressed == done.chain[0].leaves_trace
    assert not any(t.is_meta for t in [*again.parameters(), *again.buffers()])
    for one, two in zip(outputs(again), outputs(done.model), strict=True):
        assert torch.equal(one, two)


@every_case
@every_family
def test_it_runs_in_half_precision_and_under_autocast(made, tmp_path, case, family):
    done = made(case, family)
    done.model.save_pretrained(tmp_path)
    inputs = {name: tensor for name, tensor in rows("classification").items() if name != "labels"}
    half = type(done.model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        logits = half(**inputs).logits
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(loaded(tmp_path).eval()(**inputs).logits).all()


# -- chains ----------------------------------------------------------------------------------------

LEGAL = {
    ("theseus", "lobert"),
    ("theseus", "ma_bert"),
    ("theseus", "q8bert"),
    ("lobert", "theseus"),
    ("lobert", "ma_bert"),
    ("lobert", "q8bert"),
    ("ma_bert", "q8bert"),
    ("theseus", "lobert", "ma_bert"),
    ("theseus", "lobert", "q8bert"),
    ("theseus", "ma_bert", "q8bert"),
    ("lobert", "theseus", "ma_bert"),
    ("lobert", "theseus", "q8bert"),
    ("theseus", "ebert"),
    ("lobert", "ma_bert", "q8bert"),
    ("theseus", "lobert", "ma_bert", "q8bert"),
    ("lobert", "theseus", "ma_bert", "q8bert"),
}
"""Orders that methods can be chained in; every other is refused by name."""

CONTINUING = {"ma_bert"}
"""Methods that, where a model has their structure already, train it on."""

ORDERS = [
    order
    for n in range(2, len(METHODS) + 1)
    for order in permutations(METHODS, n)
    if n == 2 or order in LEGAL
]
"""All pairs, and what is legal of longer ones: any other holds a pair that is refused."""


def cases_of(order: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{"name": name, **TOYS.get(name, [{}])[0]} for name in order]


def resolved(chain: list[dict[str, Any]], config: Any) -> None:
    for case in chain:
        config = method_of(case).resolve(config).student_config(config)


@pytest.mark.parametrize("order", ORDERS, ids=",".join)
@every_family
def test_a_legal_chain_ends_in_a_model_that_loads(made, tmp_path, order, family):
    if order not in LEGAL:
        with pytest.raises(UserError) as refused:  # before anything is trained
            resolved(cases_of(order), predecessor(family).config)
        assert sum(name in str(refused.value) for name in order) >= 2
        return
    done = made(cases_of(order), family)
    assert max(done.moved) < 1e-5
    assert all(math.isfinite(loss) for loss in done.losses)
    empty = blank(done.config, "classification", done.chain)
    shapes = {k: (v.shape, v.dtype) for k, v in done.model.state_dict().items()}
    assert {k: (v.shape, v.dtype) for k, v in empty.state_dict().items()} == shapes
    done.model.save_pretrained(tmp_path)
    for one, two in zip(outputs(loaded(tmp_path)), outputs(done.model), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_not_applied_twice(name):
    if not METHODS[name].leaves_trace:
        return  # what it leaves is a plain model, like any other
    if name in CONTINUING:
        method = finished(cases_of((name, name)), "bert", "classification").model.config.compression
        assert [entry["name"] for entry in method] == [name], "trained on, not changed again"
        return
    with pytest.raises(UserError, match=rf"{name}.*{name}"):
        finished(cases_of((name, name)), "bert", "classification")


# -- whole runs ------------------------------------------------------------------------------------


def fit(recipe: Any) -> dict[str, Tensor]:
    """Train a recipe's phases without measuring; the finished weights."""
    plan = make_plan(resolve_paths(recipe))
    _fit(plan, plan.recipe.teacher, None)
    return load_file(plan.recipe.folder / "checkpoints" / "final" / "model.safetensors")


@every_run
def test_a_resumed_run_equals_the_uninterrupted(toy, teacher, tmp_path, monkeypatch, chain):
    keys = {"teacher": str(teacher), "method": chain, "train": {"epochs": 1, "save_every": 2}}
    save, saves, stop = raybert.train.save, [], 0

    def interrupted(*args: Any) -> Path:
        saves.append(save(*args))
        if len(saves) == stop:
            raise KeyboardInterrupt
        return saves[-1]

    monkeypatch.setattr(raybert.train, "save", interrupted)
    whole = fit(toy(tmp_path / "whole", **keys))
    # In the middle of the last phase, and where the first of several phases has just ended.
    for stop in {len(saves) - 2, len(saves) // 2}:
        saves.clear()
        recipe = toy(tmp_path / str(stop), **keys)
        with pytest.raises(KeyboardInterrupt):
            fit(recipe)
        assert not (recipe.folder / "checkpoints" / "final").exists()
        again = fit(recipe)
        assert again.keys() == whole.keys()
        for name, tensor in whole.items():
            assert torch.equal(again[name], tensor), name


@every_run
def test_a_run_ends_in_a_model_and_a_full_report(
    toy, teacher, tmp_path, monkeypatch, caplog, chain
):
    def rows(paths, shapes, **_):  # two child processes would take longer than the run
        fixed = {"backend": "torch", "device": "cpu", "p50_ms": 1.0, "p95_ms": 1.0, "mean_ms": 1.0}
        fixed |= {"throughput": 1.0, "repeats": 1, "threads": 1, "peak_memory_mb": 1.0}
        return [{"model": m, "batch": b, "length": n, **fixed} for m in paths for b, n in shapes]

    monkeypatch.setattr("raybert.bench.latency", rows)
    recipe = toy(
        tmp_path / "run",
        teacher=str(teacher),
        method=chain,
        kd={"alpha": 0.5, "cls": 1.0},
        train={"epochs": 1},
        measure={"batches": [1, 8]},
    )
    with caplog.at_level("INFO", logger="raybert"):
        folder = compress(recipe, tell=lambda text: None)
    expected = {"theseus": False, "q8bert": True}.get(chain[0]["name"])
    assert expected in (None, "initialising from" in caplog.text)
    data = json.loads((folder / "report.json").read_text())
    for key in ("task", "metric", "floor", "retained", "ratio", "latency", "simulated", "speedup"):
        assert key in data, key
    taught = json.loads((teacher / "report.json").read_text())["student"]
    student, model = data["student"], raybert.load(folder)
    assert data["teacher"]["metrics"] == pytest.approx(taught["metrics"])
    for part in (student, data["teacher"]):
        assert part["score"] == part["metrics"][data["metric"]]
        assert part["flops"] > 0
        assert part["bytes"]["weights"] > 0
    assert student["parameters"] == parameters(model)
    weights = (folder / "model" / "model.safetensors").stat().st_size
    assert student["bytes"]["weights"] == pytest.approx(weights, abs=weights * 0.2)
    assert data["ratio"] == pytest.approx(student["score"] / data["teacher"]["score"])
    above = data["teacher"]["score"] - data["floor"]
    assert data["retained"] == pytest.approx((student["score"] - data["floor"]) / above)
    config, methods = predecessor("bert").config, []
    for case in chain:
        methods.append(method_of(case).resolve(config))
        config = methods[-1].student_config(config)
    assert data["simulated"] is all(method.simulated for method in methods)
    assert data["simulated_methods"] == [method.name for method in methods if method.simulated]
    phases = [phase.name for method in methods for phase in method.phases()]
    assert [phase["name"] for phase in data["training"]["phases"]] == phases
    assert {row["batch"] for row in data["latency"]} == {1, 8}
    for name in ("report.html", "recipe.yaml", "metrics.jsonl", "model/README.md"):
        assert (folder / name).stat().st_size > 0, name
    assert read_run(folder).report.student.score == student["score"]
    held = raybert.load_recipe(str(folder / "recipe.yaml")).method
    assert held[0] == held[0].resolve(predecessor("bert").config), "the resolved method is kept"
