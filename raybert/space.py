"""Search spaces: dotted recipe keys and the ray.tune distributions that their values come from.

    SPACE = {"train.lr": tune.loguniform(1e-5, 1e-4), "method.lobert.share": tune.uniform(0.3, 0.8)}

A space is a dictionary in a Python module, a YAML file, or one that ships in `tune_spaces`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune
from ray.tune.search.sample import Categorical, Domain, Float, Function, Integer, Normal

from raybert.config import KDConfig, Recipe, TrainConfig
from raybert.errors import UserError
from raybert.explain import nearest
from raybert.methods import METHODS
from raybert.recipe_file import recipe_from
from raybert.tables import shown
from raybert.yaml_file import read_yaml

SHIPPED = "tune_spaces"
"""The package of the spaces that ship, one module a method."""

DISTRIBUTIONS = (
    *("uniform", "quniform", "loguniform", "qloguniform", "randint", "qrandint", "lograndint"),
    *("qlograndint", "choice"),
)
"""ray.tune's distributions that a YAML file may name; ``grid`` is its grid_search."""

SECTIONS: dict[str, Any] = {"train": TrainConfig, "kd": KDConfig}
"""Sections of the recipe that may be searched, beside ``method``: the rest all trials share."""

Values = dict[str, Any]
"""One sample: dotted recipe keys and their values."""


@dataclass(frozen=True)
class Space:
    """A checked space.

    Attributes:
        name: where it came from.
        axes: dotted recipe keys, with a ray.tune distribution, ``grid_search`` or fixed value each.
    """

    name: str
    axes: Mapping[str, Any]

    @property
    def text(self) -> dict[str, str]:
        """Every key with what it is searched over, in words."""
        return {key: describe(axis) for key, axis in self.axes.items()}


def is_grid(axis: Any) -> bool:
    """Whether an axis is ``tune.grid_search``."""
    return isinstance(axis, dict) and set(axis) == {"grid_search"}


def is_fixed(axis: Any) -> bool:
    """Whether an axis is one value."""
    return not is_grid(axis) and not isinstance(axis, Domain)


def listed(axis: Any) -> list[Any] | None:
    """The values of a grid or choice; None for a distribution of numbers."""
    if is_grid(axis):
        return list(axis["grid_search"])
    return list(axis.categories) if isinstance(axis, Categorical) else None


def describe(axis: Any) -> str:
    """An axis in words: ``loguniform 1e-05 to 0.0001``, or ``1, 2 or 4``."""
    values = listed(axis)
    if values is not None:
        return "one of " + ", ".join(json.dumps(value) for value in values)
    if is_fixed(axis):
        return json.dumps(axis)
    sampler: Any = axis.get_sampler()
    inner: Any = vars(sampler).get("sampler", sampler)
    step = f" in steps of {_number(sampler.q)}" if inner is not sampler else ""
    if isinstance(inner, Normal):
        return f"normal of mean {_number(inner.mean)} and deviation {_number(inner.sd)}{step}"
    bounds: Any = axis
    kind = type(inner).__name__.strip("_").lower()
    return f"{kind} {_number(bounds.lower)} to {_number(bounds.upper)}{step}"


def _number(value: float) -> str:
    """Six digits, or all of them where six are not the number but for rounding, as of 0.1 + 0.2: a
    search that goes on compares spaces by their words."""
    short = f"{value:g}"
    return short if math.isclose(float(short), value) else str(value)


# -- reading ---------------------------------------------------------------------------------------


def read_space(name: str, recipe: Recipe) -> Space:
    """A space by its name, checked.

    Args:
        name: ``FILE.py`` or ``FILE.yaml``, or the name of a shipped one such as ``lobert``;
            ``:NAME`` behind it takes another dictionary of a module than ``SPACE``.
        recipe: what all trials share.

    Raises:
        UserError: there is none, or a key of it is no recipe key.
    """
    place, _, variable = name.partition(":")
    path = Path(place).expanduser()
    if path.suffix in (".yaml", ".yml"):
        axes = _read_yaml(path)
    else:
        module = _load(path) if path.suffix == ".py" else _shipped(place)
        found = {key: value for key, value in vars(module).items() if key.isupper()}
        axes = found.get(variable or "SPACE")
        if not isinstance(axes, dict):
            raise UserError(
                f"{place} defines no space {variable or 'SPACE'}"
                f"{nearest(variable or 'SPACE', found)}; it is a dictionary of dotted recipe keys "
                "and ray.tune distributions."
            )
    return make_space(axes, name, recipe)


def space_of_methods(recipe: Recipe, *, schedules: bool = False) -> Space:
    """The shipped space of the recipe's methods: of several, what the space of chains has for
    them, the chain itself being settled; of none, the space of chains.

    Args:
        recipe: what all trials share.
        schedules: whether only what may change while a trial trains.

    Raises:
        UserError: schedules are asked for and there is no method.
    """
    chain = [method.name for method in recipe.method]
    if not schedules and len(chain) < 2:
        return read_space(chain[0] if chain else "chains", recipe)
    if not chain:
        raise UserError(
            "population-based training changes what a chain learns from on the way, so it must be "
            "settled: give method=, for example method=lobert, or a --space."
        )
    if schedules:
        axes = {key: axis for name in chain for key, axis in _shipped(name).SCHEDULES.items()}
        return make_space(axes, f"{','.join(chain)}:SCHEDULES", recipe)
    axes = {key: axis for key, axis in _shipped("chains").SPACE.items() if key != "method"}
    return make_space(used(recipe, axes), ",".join(chain), recipe)


def make_space(axes: Mapping[str, Any], name: str, recipe: Recipe) -> Space:
    """A space from its dictionary, checked against the recipe that all trials share.

    Raises:
        UserError: it is empty, names what is no recipe key or cannot differ between trials, or has
            an axis that no value can be drawn of.
    """
    if not axes:
        raise UserError(f"space {name} is empty; give it dotted recipe keys and distributions.")
    axes = {
        str(key): _as_list(f"space {name}: `{key}`", axis) if is_grid(axis) else axis
        for key, axis in axes.items()
    }
    for key, axis in axes.items():
        _check_key(name, key)
        _check_axis(f"space {name}: `{key}`", axis)
    axes = {key: _as_json(axis) for key, axis in axes.items()}
    chains = [entry.name for entry in recipe.method]
    own = {key.split(".")[1] for key in axes if key.startswith("method.")}
    used = _methods_in(axes.get("method"), chains)
    for unknown in sorted(used - {*METHODS, ""}):
        raise UserError(
            f"space {name}: `method` names an unknown method {unknown!r}"
            f"{nearest(unknown, METHODS)}; known: {', '.join(METHODS)}."
        )
    if idle := sorted(own - used):
        raise UserError(
            f"space {name} has parameters of {' and '.join(idle)}, which no trial uses: the recipe "
            f"has {', '.join(chains) or 'no method'}. Add method={','.join([*chains, *idle])}, or "
            "give the space a key `method` with the chains to choose from."
        )
    return Space(name, axes)


def _methods_in(axis: Any, default: Sequence[str]) -> set[str]:
    if axis is None:
        return set(default)
    values = listed(axis) or [axis]
    return {name.strip() for value in values for name in str(value).split(",")}


def _check_key(space: str, key: str) -> None:
    """Refuse a key that the recipe does not know, or that all trials share."""
    first, *rest = key.split(".")
    if first == "method" and not rest:
        return
    if first == "method" and len(rest) == 2:
        if rest[0] not in METHODS:
            raise UserError(
                f"space {space}: `{key}` names an unknown method{nearest(rest[0], METHODS)}; "
                f"known: {', '.join(METHODS)}."
            )
        fields = list(METHODS[rest[0]].model_fields)
    elif first in SECTIONS and len(rest) == 1:
        fields = list(SECTIONS[first].model_fields)
    else:
        hint = "it is the same for all trials" if first in Recipe.model_fields else "no such key"
        raise UserError(
            f"space {space}: `{key}` cannot be searched ({hint}). Keys are method, "
            "method.NAME.PARAMETER, train.KEY and kd.KEY."
        )
    if rest[-1] not in fields or rest[-1] == "name":
        stem = key.rpartition(".")[0]
        raise UserError(
            f"space {space}: unknown key `{key}`{nearest(rest[-1], fields)}; known in {stem}: "
            f"{', '.join(fields)}."
        )


def _as_list(what: str, grid: Any) -> dict[str, list[Any]]:
    """A grid with its values as a list: they may be any iterable, perhaps one that can be read only
    once."""
    values = grid["grid_search"]
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise UserError(f"{what} is a grid of {values!r}; give it a list, as in [{values!r}].")
    return {"grid_search": list(values)}


def _check_axis(what: str, axis: Any) -> None:
    """Refuse what no value can be drawn of."""
    if listed(axis) == []:
        kind = "grid" if is_grid(axis) else "choice"
        raise UserError(f"{what} is a {kind} of nothing; give it the values to choose from.")
    if isinstance(axis, Function):
        raise UserError(
            f"{what} is tune.sample_from: a function has no bounds to show, and a search that goes "
            "on could not tell it from another. Use tune.choice, or a distribution such as "
            "tune.loguniform."
        )
    bounds: Any = axis
    if isinstance(axis, (Float, Integer)) and not bounds.lower <= bounds.upper:
        raise UserError(
            f"{what} goes from {bounds.lower:g} to {bounds.upper:g}; give the lower bound first, "
            f"as in [{bounds.upper:g}, {bounds.lower:g}]."
        )
    try:
        if isinstance(axis, Domain):
            axis.sample(random_state=np.random.RandomState(0))
        describe(axis)
    except Exception as error:  # the sampler's own, whatever it is
        raise UserError(
            f"{what}: no value can be drawn of {axis!r} ({error}). Give a number, a word, or one "
            f"of ray.tune's {', '.join(DISTRIBUTIONS)} and grid_search."
        ) from None


def _as_json(axis: Any) -> Any:
    """An axis with its values as the ledger will give them back: lists for tuples."""
    values = listed(axis)
    if values is None:
        return axis if isinstance(axis, Domain) else json.loads(json.dumps(axis))
    values = json.loads(json.dumps(values))
    return tune.grid_search(values) if is_grid(axis) else tune.choice(values)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = read_yaml(path, "space")
    except OSError as error:
        raise UserError(f"no space {path}: {error.strerror or error}.") from None
    return {str(key): _axis(path, str(key), value) for key, value in data.items()}


def _axis(path: Path, key: str, value: Any) -> Any:
    """An axis as YAML has it: ``{loguniform: [1e-5, 1e-4]}``, ``{grid: [1, 2]}``, or a value."""
    if not isinstance(value, dict):
        return value
    ((name, arguments),) = value.items() if len(value) == 1 else [("", None)]
    if name == "grid" and isinstance(arguments, list):
        return tune.grid_search(arguments)
    if name not in DISTRIBUTIONS or not isinstance(arguments, list):
        raise UserError(
            f"{path}: `{key}` is {value!r}; write {{loguniform: [1.0e-5, 1.0e-4]}}, with a list, "
            f"of {', '.join(DISTRIBUTIONS)} or grid{nearest(name, DISTRIBUTIONS)}."
        )
    try:
        # YAML 1.1 reads 1e-5 as text.
        numbers = [float(a) if isinstance(a, str) and name != "choice" else a for a in arguments]
        make = vars(tune)[name]
        return make(numbers) if name == "choice" else make(*numbers)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{path}: `{key}`: {name}{tuple(arguments)!r}: {error}.") from None


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"raybert_space_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"no space {path}: there is no such file.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code
        raise UserError(f"{path} fails as it is read: {type(error).__name__}: {error}") from error
    return module


def _shipped(name: str) -> Any:
    if name.isidentifier() and importlib.util.find_spec(f"{SHIPPED}.{name}"):
        return importlib.import_module(f"{SHIPPED}.{name}")
    package = importlib.util.find_spec(SHIPPED)
    folders = list(package.submodule_search_locations or ()) if package else []
    names = sorted(p.stem for folder in folders for p in Path(folder).glob("[a-z]*.py"))
    raise UserError(
        f"no space {name!r}{nearest(name, names)}; shipped: {', '.join(names)}, or give a file "
        "ending in .py or .yaml."
    )


# -- samples ---------------------------------------------------------------------------------------


def sample_text(values: Mapping[str, Any]) -> str:
    """A sample in one line, as overrides of a recipe are written: ``train.lr=3e-05, kd.cls=10``."""
    return ", ".join(f"{key}={shown(value)}" for key, value in values.items())


def chain_of(recipe: Recipe, values: Mapping[str, Any]) -> list[str]:
    """The names of the methods that a sample uses."""
    if "method" not in values:
        return [entry.name for entry in recipe.method]
    return [name.strip() for name in str(values["method"]).split(",") if name.strip()]


def used(recipe: Recipe, values: Mapping[str, Any]) -> Values:
    """A sample without the parameters of methods that its chain does not have."""
    chain = chain_of(recipe, values)
    return {
        key: value
        for key, value in values.items()
        if not key.startswith("method.") or key.split(".")[1] in chain
    }


def apply(recipe: Recipe, values: Mapping[str, Any], **keys: Any) -> Recipe:
    """A recipe with a sample put over it.

    Args:
        recipe: what all trials share; a chain's methods keep the parameters that it gives them.
        values: the sample; parameters of methods outside its chain are left out.
        keys: other recipe keys, such as ``out``; a dictionary is put over the section it names.

    Raises:
        UserError: the recipe is not valid.
    """
    data = recipe.model_dump(mode="json")
    own = {entry["name"]: entry for entry in data["method"]}
    data["method"] = [own.get(name, {"name": name}) for name in chain_of(recipe, values)]
    named = {entry["name"]: entry for entry in data["method"]}
    for key, value in used(recipe, values).items():
        first, *rest = key.split(".")
        if len(rest) == 2:
            named[rest[0]][rest[1]] = value
        elif rest:
            data[first][rest[0]] = value
    for key, value in keys.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) else value
    return recipe_from(data, "trial")


def values_of(recipe: Recipe, keys: Sequence[str]) -> Values:
    """What a recipe has at the keys of a space; methods that it does not use are left out."""
    data = recipe.model_dump(mode="json")
    named = {entry["name"]: entry for entry in data["method"]}
    found: Values = {}
    for key in keys:
        first, *rest = key.split(".")
        if len(rest) == 2:
            if rest[0] in named:
                found[key] = named[rest[0]][rest[1]]
        else:
            found[key] = data[first][rest[0]] if rest else ",".join(named)
    return found
