from __future__ import annotations

import json

import jsonschema
import pytest
import yaml

from raybert.errors import UserError
from raybert.methods import METHODS
from raybert.recipe_file import RECIPES, dump_recipe, load_recipe, recipe_from, recipe_schema


def test_overrides_reach_every_depth_and_numbers_without_a_dot_are_numbers():
    recipe = load_recipe(None, ["train.lr=3e-5", "method=theseus", "method.theseus.layers=2"])
    assert recipe.train.lr == 3e-5
    assert recipe.method[0].model_dump()["layers"] == 2


def test_a_part_given_before_its_whole_is_not_lost():
    words = ["method.theseus.layers=2", "method=theseus,q8bert", "train.lr=2e-5"]
    recipe = load_recipe(None, [*words, "train={epochs: 2}"])
    assert [method.name for method in recipe.method] == ["theseus", "q8bert"]
    assert recipe.method[0].model_dump()["layers"] == 2
    assert (recipe.train.epochs, recipe.train.lr) == (2, 2e-5)


def test_data_may_be_a_single_word_and_keep_its_other_keys():
    recipe = load_recipe(None, ["data=glue/MRPC", "data.max_length=64"])
    assert (recipe.data.source, recipe.data.max_length) == ("glue/MRPC", 64)
    recipe = load_recipe(None, ["data.max_length=64", "data=glue/MRPC"])
    assert (recipe.data.source, recipe.data.max_length) == ("glue/MRPC", 64)


@pytest.mark.parametrize(
    "method",
    [
        "theseus",
        ["theseus"],
        [{"name": "theseus"}],
        [{"theseus": {"layers": None}}],
        {"theseus": None},
    ],
)
def test_methods_are_named_in_any_form(method):
    assert [m.name for m in recipe_from({"method": method}).method] == ["theseus"]


def test_a_dumped_recipe_is_the_same_recipe():
    recipe = load_recipe(None, ["method.theseus.groups=[1,2,3]", "kd.alpha=0.5", "out=x/y"])
    assert recipe_from(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_a_range_of_workers_is_the_most_and_the_fewest():
    recipe = load_recipe(None, ["workers=2-4", "resources.cpus=3"])
    assert (recipe.workers, recipe.fewest, recipe.resources.cpus) == (4, 2, 3)
    assert recipe_from(yaml.safe_load(dump_recipe(recipe))) == recipe
    assert load_recipe(None, ["workers=4"]).fewest == 4
    jsonschema.validate({"workers": "2-4"}, json.loads(recipe_schema()))
    with pytest.raises(UserError, match=r"workers=2 are fewer than resources\.min_workers=4"):
        load_recipe(None, ["workers=4-2"])
    for wrong in ("0-2", "1-", "two", "1-2-3"):
        with pytest.raises(UserError, match="workers"):
            load_recipe(None, [f"workers={wrong}"])
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"workers": wrong}, json.loads(recipe_schema()))


def test_a_recipe_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(None).train.lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trian.lr=1"], "did you mean 'train'"),
        (["train.learning_rate=1"], "unknown key `train.learning_rate`"),
        (["train.bach_size=1"], "did you mean 'train.batch_size'"),
        (["lr=1"], "did you mean 'train.lr'"),
        (["method.theseus.layer=3"], "did you mean 'layers'"),
        (["method=thesus"], "did you mean 'theseus'"),
        (["train.epochs=many"], "`train.epochs`"),
        (["train.zero=7"], "`train.zero`"),
        (["kd.alpha=1.5"], "`kd.alpha`"),
        (["name=../../etc"], "plain folder name"),
        (["train.lr"], "no recipe 'train.lr'"),
        (["=3"], "not an override"),
    ],
)
def test_what_a_recipe_does_not_know_it_refuses(words, told):
    name = next((w for w in words if "=" not in w), None)
    with pytest.raises(UserError) as error:
        load_recipe(name, [w for w in words if "=" in w])
    assert told in str(error.value)


def test_a_shipped_name_never_leaves_the_package(tmp_path):
    (tmp_path / "secret.yaml").write_text("task: rte")
    with pytest.raises(UserError, match="no recipe"):
        load_recipe(f"../../../../../../..{tmp_path}/secret")


@pytest.mark.parametrize("text", ["[1, 2]", "a: b: c", "\x00"])
def test_a_file_that_is_no_recipe_is_named(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="recipe"):
        load_recipe(str(path))


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid_and_fit_the_schema(path):
    recipe = load_recipe(path.relative_to(RECIPES).with_suffix("").as_posix())
    assert recipe.method[0].name == path.parent.name
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads(recipe_schema()))


def test_the_schema_refuses_what_the_recipe_refuses():
    schema = json.loads(recipe_schema())
    for name in METHODS:
        jsonschema.validate({"method": name}, schema)
        jsonschema.validate({"method": [{"name": name}]}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"train": {"learning_rate": 1}}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"method": [{"name": "theseus", "layer": 3}]}, schema)


def test_no_longer_rows_are_measured_than_are_read():
    assert recipe_from({}).measure.length == 128
    assert recipe_from({"data": {"max_length": 384}}).measure.length == 128
    short = recipe_from({"data": {"max_length": 64}, "measure": {"seconds": 1.0}})
    assert (short.measure.length, short.measure.seconds) == (64, 1.0)
    asked = recipe_from({"data": {"max_length": 64}, "measure": {"length": 96}})
    assert asked.measure.length == 96
