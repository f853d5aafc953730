"""Recipes as text: YAML files, shipped recipes, dotted ``key=value`` words, JSON Schema."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from raybert.config import Recipe, as_list
from raybert.errors import UserError
from raybert.explain import explain, nearest
from raybert.places import is_uri, named
from raybert.storage import fetch
from raybert.yaml_file import NOT_YAML, parse_yaml, read_yaml

RECIPES = Path(__file__).parent / "recipes"
"""The paper recipes that ship inside the package, ``<method>/<task>.yaml``."""


def recipe_from(data: dict[str, Any], origin: str = "recipe") -> Recipe:
    """Validate nested recipe data.

    Args:
        data: the mapping, as YAML gives it.
        origin: what to call the mapping in an error, for example the file's path.

    Raises:
        UserError: an unknown key (with the nearest known one), a wrong type, or a value out of
            range.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(explain(error, Recipe, prefix=f"{origin}: ")) from None


def load_recipe(name: str | None, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """A recipe from a YAML file or a shipped recipe's name, with dotted overrides on top.

    Args:
        name: path of a YAML file, the name of a shipped recipe (``theseus/mrpc``), or nothing.
        overrides: ``key=value`` words; the value is read as YAML, the key may be dotted.

    Raises:
        UserError: the file is missing or not YAML, or the recipe is not valid.
    """
    data: dict[str, Any] = {}
    origin = "recipe"
    if name is not None:
        path = recipe_path(name)
        origin = str(path)
        data = read_yaml(path)
    given: list[tuple[list[str], Any]] = []
    for word in overrides:
        key, found, value = word.partition("=")
        if not found or not key:
            raise UserError(
                f"`{word}` is not an override; write it as key=value, for example train.lr=3e-5."
            )
        given.append((key.split("."), _parse_value(value)))
    # A whole goes before its parts, in whatever order they came: `method=` would end what
    # `method.theseus.layers=` before it had begun.
    for keys, value in sorted(given, key=lambda one: len(one[0])):
        _put(data, keys, value)
    named = {keys[0] for keys, _ in given if len(keys) == 1}
    if "teacher" in named and "model" not in named:
        # A file's `model` is what its teacher would be fine-tuned from; this one is there already.
        data.pop("model", None)
    return recipe_from(data, origin)


def recipe_path(name: str) -> Path:
    """The file of a recipe given as a path, a URI or as the name of a shipped one."""
    if is_uri(name):
        return fetch(name)
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = RECIPES / f"{name}.yaml"
    # A shipped name never leaves the package: `..` would name any file on the machine.
    if shipped.is_file() and shipped.resolve().is_relative_to(RECIPES.resolve()):
        return shipped
    names = sorted(
        p.relative_to(RECIPES).with_suffix("").as_posix() for p in RECIPES.rglob("*.yaml")
    )
    raise UserError(
        f"no recipe {name!r}: neither a file nor a shipped recipe{nearest(name, names)}. "
        f"Shipped: {', '.join(names)}. "
        "Overrides are written key=value."
    )


def _parse_value(text: str) -> Any:
    try:
        value = parse_yaml(text)
    except NOT_YAML:
        return text
    # YAML 1.1 reads 3e-5 as a string for want of a dot.
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


def _put(data: dict[str, Any], keys: list[str], value: Any) -> None:
    """Set a dotted key. ``method.theseus.layers=3`` reaches into the chain, adding the method
    when absent."""
    if keys[0] == "method" and len(keys) == 3:
        try:
            held = as_list(data.get("method"))
        except ValueError as error:
            raise UserError(f"{error}.") from None
        chain: list[dict[str, Any]] = [
            dict(e) if isinstance(e, dict) else {"name": e} for e in held
        ]
        entry: dict[str, Any] | None = next(
            (e for e in chain if e.get("name") == keys[1] or keys[1] in e), None
        )
        if entry is None:
            entry = dict[str, Any](name=keys[1])
            chain.append(entry)
        if "name" in entry:
            entry[keys[2]] = value
        else:
            there = entry[keys[1]]
            entry[keys[1]] = {**(there if isinstance(there, dict) else {}), keys[2]: value}
        data["method"] = chain
        return
    section: dict[str, Any] = data
    for key in keys[:-1]:
        inner: Any = section.get(key)
        if isinstance(inner, str) and key == "data":
            inner = {"source": inner}
        section[key] = inner = dict(inner) if isinstance(inner, dict) else {}
        section = inner
    last = keys[-1]
    if last == "data" and isinstance(section.get("data"), dict) and isinstance(value, str):
        section["data"] = {**section["data"], "source": value}
    else:
        section[last] = value


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    data = portable(recipe).model_dump(mode="json")
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def portable(recipe: Recipe) -> Recipe:
    """The recipe as other machines can read it: what lies in object storage by its URI."""
    places = {key: getattr(recipe, key) for key in ("out", "model", "teacher")}
    changes: dict[str, Any] = {key: named(value) for key, value in places.items() if value}
    predictions = {"predictions": named(recipe.kd.predictions)}
    return recipe.model_copy(update={**changes, "kd": recipe.kd.model_copy(update=predictions)})


def recipe_schema() -> str:
    """JSON Schema of the recipe, for editors, with each method's parameters spelled out."""
    from raybert.methods import METHODS

    schema = Recipe.model_json_schema(mode="validation")
    definitions = schema.setdefault("$defs", {})
    definitions.pop("MethodConfig", None)
    choices: list[dict[str, Any]] = [
        {"type": "string", "description": "Names of methods, separated by commas."}
    ]
    for name, method in METHODS.items():
        own = method.model_json_schema(mode="validation")
        definitions.update(own.pop("$defs", {}))
        own["required"] = ["name"]
        own["properties"]["name"] = {"const": name}
        definitions[method.__name__] = own
        choices.append({"$ref": f"#/$defs/{method.__name__}"})
    entry = {"anyOf": choices}
    described = schema["properties"]["method"].get("description", "")
    schema["properties"]["method"] = {
        "description": described,
        "anyOf": [*choices, {"type": "array", "items": entry}],
    }
    data = schema["properties"]["data"]
    schema["properties"]["data"] = {
        "anyOf": [{"type": "string"}, {"$ref": data.get("$ref", "#/$defs/DataConfig")}]
    }
    return json.dumps(
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "raybert recipe",
            **schema,
        }
    )
