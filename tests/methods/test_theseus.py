"""BERT-of-Theseus: schedules and draws by hand, what is mixed, trained and left over."""

from __future__ import annotations

import copy
import fnmatch
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCAB, toy_encoder
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from raybert.errors import UserError
from raybert.methods.theseus import Replace, SuccessorFinetune, Theseus, TheseusModule
from raybert.models import load_for_task
from raybert.phase import At
from raybert.plan import make_plan, resolve_paths
from raybert.recipe_file import recipe_from
from raybert.run import _fit
from raybert.surgery import attention_block, encoder_layers, ffn_block
from raybert.tasks import TASKS

FAMILIES = ("bert", "roberta", "distilbert")


def classifier(name: str = "bert", layers: int = 4) -> Any:
    """A toy classifier without dropout, so that training mode computes like evaluation."""
    torch.manual_seed(1)
    config = copy.deepcopy(toy_encoder(name, layers).config)
    model = AutoModelForSequenceClassification.from_config(config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def theseus(**keys: Any) -> Theseus:
    return Theseus(**keys)


def modules_of(model: Any) -> list[TheseusModule]:
    """The encoder's layers while they are being replaced."""
    modules = [module for module in encoder_layers(model) if isinstance(module, TheseusModule)]
    assert len(modules) == len(encoder_layers(model))
    return modules


def prepared(model: Any, **keys: Any) -> Replace:
    """The replacing phase of a resolved method, its surgery done; successors get other weights."""
    phase = theseus(**keys).resolve(model.config).phases()[0]
    assert isinstance(phase, Replace)
    phase.prepare(model)
    return phase


def apart(model: Any) -> None:
    """Move successors away from their predecessors, so that it shows which of them runs."""
    torch.manual_seed(2)
    with torch.no_grad():
        for module in modules_of(model):
            for parameter in module.successor.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))


def rows() -> dict[str, Tensor]:
    ids = torch.randint(5, len(VOCAB), (3, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2, 6:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**rows()).logits


def draws(phase: Replace, model: Any, forward: int, seed: int = 7, step: int = 0) -> list:
    phase.on_step(model, At(step=step, total=100, forward=forward, seed=seed))
    return [module.replaced for module in modules_of(model)]


# -- schedules -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "total", "wanted"),
    [
        # p rises by (1 - 0.3) / 50 a step and is 1 from half of the steps on.
        ({}, 100, {0: 0.3, 1: 0.314, 25: 0.65, 49: 0.986, 50: 1.0, 99: 1.0}),
        ({"replacing_rate": 0.5, "k": 0.001}, 100, {0: 0.5, 100: 0.6, 499: 0.999, 501: 1.0}),
        ({"replacing_rate": 0.0, "replacing_share": 1.0}, 10, {0: 0.0, 5: 0.5, 9: 0.9, 10: 1.0}),
        ({"replacing_share": 0.0}, 10, {0: 0.3, 1: 1.0}),
        ({"replacing_rate": 1.0}, 10, {0: 1.0, 9: 1.0}),
        ({"schedule": "constant"}, 100, {0: 0.3, 49: 0.3, 50: 1.0}),
        ({"schedule": "constant", "replacing_share": 0.2}, 100, {19: 0.3, 20: 1.0}),
        ({"schedule": "constant", "steps_for_replacing": 7}, 100, {0: 0.3, 6: 0.3, 7: 1.0}),
        ({"schedule": "constant", "replacing_share": 1.0}, 10, {9: 0.3, 10: 1.0}),
    ],
)
def test_schedules_by_hand(keys, total, wanted):
    method = theseus(**keys)
    for step, rate in wanted.items():
        assert method.rate(step, total) == pytest.approx(rate), step


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_the_rate_never_falls_and_ends_at_one(schedule):
    rates = [theseus(schedule=schedule).rate(step, 37) for step in range(37)]
    assert rates == sorted(rates)
    assert rates[0] == 0.3
    assert rates[-1] == 1.0


@pytest.mark.parametrize(
    ("keys", "wants"),
    [
        ({"steps_for_replacing": 9}, "schedule=constant"),
        ({"schedule": "constant", "k": 0.1}, "schedule=linear"),
        ({"finetune_lr": 1e-4}, "finetune_epochs above 0"),
        ({"finetune_all": True}, "finetune_epochs above 0"),
    ],
)
def test_settings_that_do_nothing_are_refused(keys, wants):
    with pytest.raises(ValidationError, match=f"{list(keys)[-1]} does nothing without {wants}"):
        theseus(**keys)


def test_no_steps_have_no_last_rate():
    (phase,) = theseus(layers=2).resolve(classifier().config).phases()
    assert phase.warnings(0) == []


# -- draws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("modules", ["layer", "sublayer"])
def test_draws_depend_on_seed_and_forward_alone(modules):
    model = classifier(layers=8)
    phase = prepared(model, modules=modules, schedule="constant", replacing_rate=0.5)
    torch.manual_seed(1)
    np.random.seed(1)
    first = [draws(phase, model, f) for f in range(20)]
    torch.manual_seed(2)
    np.random.seed(2)
    before = torch.get_rng_state()
    assert [draws(phase, model, f) for f in range(20)] == first
    assert torch.equal(torch.get_rng_state(), before), "torch's generator was not drawn from"
    other = classifier(layers=8)
    rank = prepared(other, modules=modules, schedule="constant", replacing_rate=0.5)
    assert [draws(rank, other, f) for f in range(20)] == first
    assert len({tuple(d) for d in first}) > 10
    assert [draws(phase, model, f, seed=8) for f in range(20)] != first


@pytest.mark.parametrize("rate", [0.3, 0.8])
def test_modules_are_replaced_as_often_as_the_rate_says(rate):
    model = classifier()
    keys = {"schedule": "constant", "modules": "sublayer", "replacing_rate": rate}
    phase = prepared(model, **keys)
    drawn = np.array([draws(phase, model, forward) for forward in range(1500)])  # [N, S, 2]
    assert drawn.shape == (1500, 2, 2)
    assert np.abs(drawn.mean(0) - rate).max() < 0.05
    flat = drawn.reshape(1500, 4).astype(float)
    between = np.corrcoef(flat.T) - np.eye(4)
    assert np.abs(between).max() < 0.1, "modules are drawn independently"


def test_layers_are_drawn_whole_and_sublayers_apart():
    model = classifier()
    phase = prepared(model, schedule="constant", replacing_rate=0.5)
    whole = [pair for f in range(60) for pair in draws(phase, model, f)]
    assert set(whole) == {(True, True), (False, False)}
    model = classifier()
    phase = prepared(model, schedule="constant", replacing_rate=0.5, modules="sublayer")
    split = [pair for f in range(60) for pair in draws(phase, model, f)]
    assert set(split) == {(a, b) for a in (True, False) for b in (True, False)}


@pytest.mark.parametrize(("rate", "wanted"), [(0.0, False), (1.0, True)])
def test_certain_rates_leave_nothing_to_chance(rate, wanted):
    model = classifier()
    phase = prepared(model, schedule="constant", replacing_rate=rate)
    assert {pair for f in range(50) for pair in draws(phase, model, f)} == {(wanted, wanted)}
    assert phase.metrics(model) == {"replacing_rate": rate}
    assert {pair for f in range(50) for pair in draws(phase, model, f, step=50)} == {(True, True)}
    assert phase.metrics(model) == {"replacing_rate": 1.0}


# -- what runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_none_replaced_is_the_predecessor_and_all_replaced_the_successor(name):
    whole = logits(classifier(name))
    model = classifier(name)
    phase = prepared(model)
    apart(model)
    model.train()
    for module in modules_of(model):
        module.replaced = (False, False)
    assert torch.equal(logits(model), whole)
    for module in modules_of(model):
        module.replaced = (True, True)
    replaced = logits(model)
    assert not torch.allclose(replaced, whole, atol=1e-3)
    model.eval()
    for module in modules_of(model):
        module.replaced = (False, False)
    assert torch.equal(logits(model), replaced), "evaluation always runs successors"
    phase.finish(model)
    assert torch.equal(logits(model), replaced)
    assert len(encoder_layers(model)) == model.config.num_hidden_layers == 2


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("feed_forward", [True, False])
def test_groups_of_sublayers_are_mixed_as_by_hand(name, attention, feed_forward):
    model = classifier(name, layers=3)
    prepared(model, groups=(3,), modules="sublayer")
    apart(model)
    (module,) = modules_of(model)
    model.train()
    one, two, three = module.predecessors
    successor = module.successor
    hidden = torch.randn(2, 7, 32)
    mask = torch.zeros(2, 1, 7, 7)
    mask[1, :, :, 4:] = torch.finfo(torch.float32).min
    with torch.no_grad():
        if attention:
            inside = attention_block(successor, hidden, mask)
        else:
            inside = attention_block(three, two(one(hidden, mask), mask), mask)
        wanted = ffn_block(successor if feed_forward else three, inside)
        module.replaced = (attention, feed_forward)
        assert torch.equal(module(hidden, mask), wanted)
        assert torch.equal(module(hidden, attention_mask=mask), wanted)


def test_mixed_draws_run_what_was_drawn():
    model = classifier()
    prepared(model)
    apart(model)
    model.train()
    one, two = modules_of(model)
    one.replaced, two.replaced = (True, True), (False, False)
    mixed = logits(model)
    by_hand = classifier(layers=3)
    by_hand.load_state_dict(
        {k: v for k, v in classifier().state_dict().items() if ".layer.3." not in k}
    )
    layers = encoder_layers(by_hand)
    layers[0].load_state_dict(one.successor.state_dict())
    for layer, source in zip(layers[1:], two.predecessors, strict=True):
        layer.load_state_dict(source.state_dict())
    assert torch.allclose(logits(by_hand), mixed, atol=1e-6)


# -- structure -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "sources"),
    [
        ({"layers": 2}, [0, 1]),
        ({"layers": 2, "initialise": "spaced"}, [1, 3]),
        ({"groups": (1, 2, 1)}, [0, 1, 2]),
        ({"groups": (1, 2, 1), "initialise": "spaced"}, [0, 2, 3]),
        ({"groups": (3, 1), "initialise": "spaced"}, [2, 3]),
        ({"layers": 1, "initialise": "spaced"}, [3]),
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_successors_start_from_the_right_layers(name, keys, sources):
    model = classifier(name)
    with torch.no_grad():
        for parameter in encoder_layers(model).parameters():
            parameter.add_(torch.randn_like(parameter))
    layers = [copy.deepcopy(layer.state_dict()) for layer in encoder_layers(model)]
    before = list(encoder_layers(model))
    phase = prepared(model, **keys)
    groups = keys.get("groups") or (4 // keys["layers"],) * keys["layers"]
    adopted = [list(m.predecessors) for m in modules_of(model)]
    assert [len(group) for group in adopted] == list(groups)
    assert [layer for group in adopted for layer in group] == before
    assert phase.layer_map == tuple(np.cumsum(groups))
    phase.finish(model)
    for layer, source in zip(encoder_layers(model), sources, strict=True):
        for key, tensor in layer.state_dict().items():
            assert torch.equal(tensor, layers[source][key]), key
    owned = {p.data_ptr() for layer in before for p in layer.parameters()}
    assert not owned & {p.data_ptr() for p in encoder_layers(model).parameters()}


def test_resolving_settles_layers_and_groups():
    config = classifier(layers=4).config
    assert theseus().resolve(config).groups == (2, 2)
    assert theseus(layers=1).resolve(config).groups == (4,)
    assert theseus(groups=(1, 3)).resolve(config).layers == 2
    settled = theseus(groups=(1, 3)).resolve(config)
    assert settled.resolve(config) == settled
    assert theseus().student_config(config).num_hidden_layers == 2
    assert config.num_hidden_layers == 4


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"layers": 3}, r"does not divide the predecessor's 4 layers; use one of \[1, 2\]"),
        ({"layers": 4}, "does not make a model of 4 layers smaller; use 1 to 3"),
        ({"layers": 9}, "use 1 to 3"),
        ({"groups": (2, 3)}, "adds up to 5 layers; the predecessor has 4"),
        ({"groups": (1, 1, 1, 1)}, "makes nothing smaller"),
    ],
)
def test_what_does_not_fit_the_predecessor_is_refused(keys, told):
    with pytest.raises(UserError, match=told):
        theseus(**keys).resolve(classifier(layers=4).config)


def test_the_groups_that_an_error_proposes_fit():
    with pytest.raises(UserError) as error:
        theseus(layers=3).resolve(classifier(layers=4).config)
    groups = json.loads("[" + str(error.value).rpartition("[")[2].rstrip("."))
    assert theseus(groups=groups).resolve(classifier(layers=4).config).layers == 3


@pytest.mark.parametrize(
    "keys",
    [
        {"layers": 0},
        {"groups": [2, 0]},
        {"layers": 2, "groups": [1, 2, 1]},
        {"replacing_rate": 1.1},
        {"k": 0},
        {"schedule": "cosine"},
        {"finetune_epochs": -1},
    ],
)
def test_values_out_of_range_are_refused(keys):
    with pytest.raises(UserError, match="theseus"):
        recipe_from({"method": [{"name": "theseus", **keys}]})


def test_phases_are_as_many_as_there_are_epochs_for():
    config = classifier().config
    assert [p.name for p in theseus().resolve(config).phases()] == ["replace"]
    one, two = theseus(finetune_epochs=1.5, finetune_lr=1e-4).resolve(config).phases()
    assert (one.name, one.epochs, one.lr) == ("replace", None, None)
    assert isinstance(two, SuccessorFinetune)
    assert (two.name, two.epochs, two.lr) == ("successor_finetune", 1.5, 1e-4)
    assert one.layer_map == two.layer_map == (2, 4)


# -- training --------------------------------------------------------------------------------------


def trained(phase: Any, model: Any) -> set[str]:
    """Names of the parameters whose first matching pattern is not 0."""
    names = set()
    for name, _ in model.named_parameters():
        rate = next((r for p, r in phase.rates.items() if fnmatch.fnmatchcase(name, p)), None)
        if rate != 0.0:
            names.add(name)
    return names


@pytest.mark.parametrize("name", FAMILIES)
def test_only_successors_are_trained(name):
    model = classifier(name)
    phase = prepared(model)
    by_place = {id(p) for m in modules_of(model) for p in m.successor.parameters()}
    wanted = {key for key, p in model.named_parameters() if id(p) in by_place}
    assert wanted
    assert trained(phase, model) == wanted
    phase.finish(model)
    inside = {id(p) for p in encoder_layers(model).parameters()}
    successor = {key for key, p in model.named_parameters() if id(p) in inside}
    assert trained(SuccessorFinetune(theseus(finetune_epochs=1)), model) == successor
    everything = SuccessorFinetune(theseus(finetune_epochs=1, finetune_all=True))
    assert trained(everything, model) == {key for key, _ in model.named_parameters()}


@pytest.fixture(scope="module")
def student(toy, teacher, tmp_path_factory) -> Path:
    """The finished model of a short run, not measured; and its recipe's other phase."""
    return fit(
        toy(
            tmp_path_factory.mktemp("theseus") / "run",
            teacher=str(teacher),
            method=[{"name": "theseus", "finetune_epochs": 1}],
            train={"epochs": 1},
        )
    )


def fit(recipe: Any) -> Path:
    """Train a recipe's phases, without measuring what comes out."""
    plan = make_plan(resolve_paths(recipe))
    _fit(plan, plan.recipe.teacher, None)
    return plan.recipe.folder / "checkpoints" / "final"


def test_training_with_no_successor_drawn_runs_and_changes_nothing(toy, teacher, tmp_path):
    method = {"name": "theseus", "schedule": "constant", "replacing_rate": 0.0}
    final = fit(
        toy(
            tmp_path / "run",
            teacher=str(teacher),
            method=[{**method, "replacing_share": 1.0}],
            train={"epochs": 1, "weight_decay": 0.0},
        )
    )
    old, new = (load_file(f / "model.safetensors") for f in (teacher / "model", final))
    kept = {key for key in old if ".layer.2." not in key and ".layer.3." not in key}
    assert new.keys() == kept
    for key, tensor in new.items():
        assert torch.equal(tensor, old[key]), key
    logged = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rates = [line["replacing_rate"] for line in map(json.loads, logged) if line["kind"] == "train"]
    assert rates
    assert set(rates) == {0.0}


def test_the_finished_model_is_plain_and_needs_no_raybert(student):
    config = json.loads((student / "config.json").read_text())
    assert config["model_type"] == "bert"
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["num_hidden_layers"] == 2
    assert "compression" not in config
    ids = rows()["input_ids"].tolist()
    code = (
        "import json, sys, torch\n"
        "sys.modules['raybert'] = sys.modules['deepspeed'] = sys.modules['ray'] = None\n"
        "from transformers import AutoModelForSequenceClassification as A\n"
        f"model, info = A.from_pretrained({str(student)!r}, output_loading_info=True)\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'], info\n"
        "with torch.inference_mode():\n"
        f"    out = model.eval()(input_ids=torch.tensor({ids}))\n"
        "print(json.dumps(out.logits.tolist()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    model = AutoModelForSequenceClassification.from_pretrained(student).eval()
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor(ids)).logits
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    assert torch.allclose(found, wanted, atol=1e-6)


def test_the_successor_starts_another_task(student, toy, tmp_path):
    model, new = load_for_task(str(student), TASKS["regression"], seed=0)
    assert new == ["classifier.bias", "classifier.weight"]
    assert model.config.num_labels == 1
    assert len(encoder_layers(model)) == 2
    old = load_file(student / "model.safetensors")
    for key, tensor in model.state_dict().items():
        if key not in new:
            assert torch.equal(tensor, old[key]), key

    scores = tmp_path / "scores.csv"
    lines = [f"the film was {'good' if i % 2 else 'bad'},{i % 2 + i / 100}" for i in range(24)]
    scores.write_text("\n".join(["text,label", *lines]))
    data = {"train": str(scores), "dev": str(scores)}
    recipe = toy(
        tmp_path / "run", model=str(student), task="regression", data=data, train={"epochs": 20}
    )
    final = fit(recipe)
    result = json.loads((final / "result.json").read_text())
    assert result["student"]["pearson"] > 0.5
    assert len(load_file(final / "model.safetensors")["classifier.bias"]) == 1
