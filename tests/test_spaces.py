"""The spaces that ship, and how they are read: every key, every sample, every released default."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray import tune
from ray.tune.search.sample import Domain
from transformers import BertConfig

from raybert.draws import Plain, make_source
from raybert.errors import UserError
from raybert.job import resolve_chain
from raybert.methods import METHODS
from raybert.objectives import parse_objectives
from raybert.recipe_file import RECIPES, load_recipe, recipe_from
from raybert.space import (
    apply,
    describe,
    listed,
    make_space,
    read_space,
    space_of_methods,
    used,
    values_of,
)

SAMPLES = 40


def contains(axis: Any, value: Any) -> bool:
    """Whether a value lies inside what an axis covers."""
    values = listed(axis)
    if values is not None:
        return value in values
    return axis.is_valid(value) if isinstance(axis, Domain) else value == axis


def recipe_of(*methods):
    return recipe_from({"teacher": "teacher", "method": list(methods)})


def base_of(module: str):
    return recipe_of() if module == "chains" else recipe_of(module)


def shipped() -> list[str]:
    names = []
    for module in [*METHODS, "chains"]:
        found = vars(importlib.import_module(f"tune_spaces.{module}"))
        names += [f"{module}:{key}" for key, value in found.items() if isinstance(value, dict)]
    return [name for name in names if name.rpartition(":")[2].isupper()]


def test_every_method_has_a_space_and_a_grid():
    for module in [*METHODS, "chains"]:
        assert {f"{module}:SPACE", f"{module}:PAPER"} <= set(shipped())
        assert importlib.import_module(f"tune_spaces.{module}").__doc__


@pytest.mark.parametrize("name", shipped())
def test_every_sample_is_a_recipe(name):
    base = base_of(name.partition(":")[0])
    space = read_space(name, base)  # which refuses keys that are no recipe keys
    source = Plain(space, seed=0)
    for number in range(SAMPLES):
        values = source.ask(number)
        if values is None:
            assert number == len(source.grid)
            break
        assert all(contains(space.axes[key], value) for key, value in values.items())
        recipe = apply(base, values)
        for key, value in values_of(recipe, list(used(base, values))).items():
            assert value == values[key]
        bound = tuple(method.bind(recipe) for method in recipe.method)
        # What cannot follow what is refused here.
        resolve_chain(recipe.model_copy(update={"method": bound}), BertConfig())


def test_the_space_of_chains_has_every_method_and_its_own_keys():
    space = read_space("chains", recipe_of())
    chains = [chain.split(",") for chain in listed(space.axes["method"]) or []]
    assert {name for chain in chains for name in chain} == set(METHODS)
    assert {key.split(".")[1] for key in space.axes if key.startswith("method.")} == set(METHODS)


@pytest.mark.parametrize("chains", [False, True])
@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda p: p.parent.name)
def test_released_recipes_lie_inside(path: Path, chains: bool):
    recipe = load_recipe(str(path))
    method = path.parent.name
    axes = dict(read_space("chains" if chains else method, recipe_of(method)).axes)
    axes.pop("method", None)  # MA-BERT alone is no chain that saves anything
    if recipe.kd == recipe_of(method).kd:  # no distillation released: its weights have no default
        axes = {key: axis for key, axis in axes.items() if key[:3] != "kd."}
    for key, value in values_of(recipe, list(axes)).items():
        # Nothing: the method finds it by itself, as LoBERT its ranks.
        assert value is None or contains(axes[key], value), (key, value)


@pytest.mark.parametrize("chains", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_defaults_of_methods_lie_inside(method, chains):
    recipe = recipe_of(method)
    axes = read_space("chains" if chains else method, recipe).axes
    keys = [key for key in axes if key.startswith("method.")]
    for key, value in values_of(recipe, keys).items():
        assert value is None or contains(axes[key], value), (key, value)


def test_the_released_grid_of_lobert_has_24_points():
    assert len(Plain(read_space("lobert:PAPER", recipe_of("lobert")), 0).grid) == 24


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({}, "is empty"),
        ({"train.lrr": 1}, r"unknown key `train\.lrr` \(did you mean 'lr'"),
        ({"method.lobert.shore": 1}, "did you mean 'share'"),
        ({"method.lobart.share": 1}, "unknown method .*did you mean 'lobert'"),
        ({"method": tune.choice(["lobert", "lobert,q8bart"])}, "'q8bart' .*did you mean 'q8bert'"),
        ({"method": "theseus,q8bart"}, "names an unknown method 'q8bart'"),
        ({"method.theseus.layers": 2}, "parameters of theseus, which no trial uses"),
        ({"method.lobert.name": "x"}, "unknown key"),
        ({"data.max_length": 64}, "the same for all trials"),
        ({"teacher": "x"}, "the same for all trials"),
        ({"rate": 1}, "no such key"),
    ],
)
def test_keys_that_cannot_be_searched_are_refused(axes, message):
    with pytest.raises(UserError, match=message):
        make_space(axes, "mine", recipe_of("lobert"))


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        (tune.uniform(0.8, 0.2), r"goes from 0\.8 to 0\.2; give the lower bound first"),
        (tune.quniform(0.8, 0.2, 0.1), r"goes from 0\.8 to 0\.2"),
        (tune.randint(5, 5), "no value can be drawn"),
        (tune.choice([]), "choice of nothing"),
        (tune.grid_search([]), "grid of nothing"),
        ({"grid_search": 5}, r"grid of 5; give it a list, as in \[5\]"),
        ({"grid_search": "even"}, "grid of 'even'; give it a list"),
        (tune.sample_from(lambda spec: 1 / 0), r"sample_from.*Use tune\.choice"),
        (tune.uniform, "no value can be drawn"),
    ],
)
def test_axes_of_which_nothing_can_be_drawn_are_refused(axis, message):
    with pytest.raises(UserError, match=rf"space mine: `train\.lr`.*{message}"):
        make_space({"train.lr": axis}, "mine", recipe_of("lobert"))


def test_what_optuna_cannot_sample_is_refused():
    space = make_space({"train.lr": tune.randn(1e-3, 1e-4)}, "mine", recipe_of("lobert"))
    with pytest.raises(UserError, match=r"mine has what Optuna cannot sample.*--algorithm random"):
        make_source("optuna", space, recipe_of("lobert"), (), 0)


def test_a_space_in_yaml_is_the_one_in_python(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "train.lr: {loguniform: [1e-5, 1.0e-4]}\n"
        "method.lobert.allocate: {choice: [even, energy]}\n"
        "method.lobert.share: {quniform: [0.2, 0.8, 0.1]}\n"
        "kd.cls: {grid: [0.0, 10.0]}\n"
        "kd.alpha: 0.5\n"
    )
    axes = {
        "train.lr": tune.loguniform(1e-5, 1e-4),
        "method.lobert.allocate": tune.choice(["even", "energy"]),
        "method.lobert.share": tune.quniform(0.2, 0.8, 0.1),
        "kd.cls": tune.grid_search([0.0, 10.0]),
        "kd.alpha": 0.5,
    }
    found = read_space(str(file), recipe_of("lobert"))
    assert found.text == make_space(axes, "mine", recipe_of("lobert")).text
    assert found.text["train.lr"] == "loguniform 1e-05 to 0.0001"
    assert found.text["method.lobert.share"] == "uniform 0.2 to 0.8 in steps of 0.1"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "train.lr: {lognormal: [1, 2]}", "did you mean|of uniform"),
        ("a.yaml", "train.lr: {uniform: 3}", "with a list"),
        ("a.yaml", "train.lr: {loguniform: [0, 1]}", "loguniform"),
        ("a.yaml", "train.lr: {quniform: [0.2, 0.8, 0]}", r"quniform\(0\.2, 0\.8, 0\): .*zero"),
        ("a.yaml", "train.lr: {uniform: [0.8, 0.2]}", "lower bound first, as in .0.2, 0.8."),
        ("a.yaml", "train.lr: {choice: []}", "choice of nothing"),
        ("a.yaml", "train.lr: {grid: []}", "grid of nothing"),
        ("a.yaml", "- 1", "is no space"),
        ("a.yaml", "train.lr: [", "not readable as YAML: line 1"),
        ("a.yaml", "train.lr: 2026-13-01", "not readable as YAML: month"),
        ("a.py", "SPACES = {}", "did you mean 'SPACES'"),
        ("a.py", "1/0", "ZeroDivisionError"),
        ("absent.py", None, "no such file"),
        ("absent.yaml", None, "no space"),
        ("lobart", None, "did you mean 'lobert'"),
        ("lobert:PAPERS", None, "did you mean 'PAPER'"),
    ],
)
def test_spaces_that_cannot_be_read_say_why(tmp_path, monkeypatch, name, text, message):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_space(name, recipe_of("lobert"))


def test_a_users_module_is_read(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from ray import tune\nSPACE = {'train.lr': tune.uniform(0.1, 0.2)}\n"
        "WIDE = {'train.lr': tune.uniform(0.1, 0.9)}\n"
    )
    recipe = recipe_of("lobert")
    assert describe(read_space(str(file), recipe).axes["train.lr"]) == "uniform 0.1 to 0.2"
    assert describe(read_space(f"{file}:WIDE", recipe).axes["train.lr"]) == "uniform 0.1 to 0.9"


def test_without_a_name_the_methods_decide():
    assert space_of_methods(recipe_of("q8bert")).name == "q8bert"
    assert "method" in space_of_methods(recipe_of()).axes
    chain = space_of_methods(recipe_of("theseus", "q8bert"))
    assert {key.split(".")[1] for key in chain.axes if key.startswith("method.")} == {
        "theseus", "q8bert",
    }  # fmt: skip
    assert {"train.lr", "kd.alpha"} <= chain.axes.keys()
    assert "method" not in chain.axes, "the chain that was asked for is the one that is searched"
    with pytest.raises(UserError, match="parameters of lobert, which no trial uses"):
        read_space("lobert", recipe_of("theseus"))


def test_a_sample_takes_only_what_its_chain_has():
    base = recipe_of({"name": "theseus", "schedule": "constant"})
    values = {
        "method": "theseus,q8bert",
        "method.theseus.layers": 3,
        "method.lobert.share": 0.5,
        "train.lr": 1e-4,
    }
    recipe = apply(base, values, out="elsewhere", measure={"batches": []})
    assert [entry.name for entry in recipe.method] == ["theseus", "q8bert"]
    theseus = recipe.method[0].model_dump()
    assert (theseus["layers"], theseus["schedule"]) == (3, "constant"), "the base's is kept"
    assert recipe.train.lr == 1e-4
    assert recipe.measure.batches == ()
    assert recipe.measure.length == base.measure.length
    assert list(used(base, values)) == ["method", "method.theseus.layers", "train.lr"]
    assert recipe_from(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))) == recipe


@pytest.mark.parametrize(
    ("axis", "text"),
    [
        (tune.loguniform(1e-5, 2e-4), "loguniform 1e-05 to 0.0002"),
        (tune.loguniform(1.2345678e-5, 2e-4), "loguniform 1.2345678e-05 to 0.0002"),
        (tune.quniform(0.2, 0.8, 0.1), "uniform 0.2 to 0.8 in steps of 0.1"),
        (tune.uniform(0.1 + 0.2, 1), "uniform 0.3 to 1"),
        (tune.randint(2, 9), "uniform 2 to 9"),
        (tune.randint(2, 1234567), "uniform 2 to 1234567"),
        (tune.randn(1e-3, 1e-4), "normal of mean 0.001 and deviation 0.0001"),
        (tune.qrandn(5, 1, 0.5), "normal of mean 5 and deviation 1 in steps of 0.5"),
    ],
)
def test_axes_that_differ_have_different_words(axis, text):
    """And those of before have the words of before: search folders are known by them."""
    assert describe(axis) == text


def test_axes_know_their_values():
    assert listed(tune.grid_search([1, 2])) == [1, 2]
    assert listed(tune.choice(["a"])) == ["a"]
    assert listed(tune.uniform(0, 1)) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("scor", "did you mean 'score'"),
        ("score,score", "one twice"),
        ("", "name none"),
        ("up:student.score", "neither max: nor min:"),
        ("max:student.metrics.recall", "has no 'recall'.*it has f1, accuracy"),
        ("max:student.metric", "did you mean 'metrics'"),
        ("max:student", "is no number"),
        ("max:name", "is no number"),
        ("max:student.score.mean", "has no 'mean'"),
        ("max:hardware.accuracy", "hardware has no 'accuracy'.*nothing to go by"),
        ("min:facts.f1", "facts has no 'f1'"),
    ],
)
def test_objectives_that_no_report_has_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        parse_objectives(words, ("f1", "accuracy"))
