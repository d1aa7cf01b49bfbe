"""Recipe files: one recipe, or a matrix of them, with gates; read with the lines that faults are on."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from edgewise.bundle.manifest import path_fault
from edgewise.errors import InputError, unknown
from edgewise.exporter.lines import Document, Where, in_folder, read_yaml
from edgewise.exporter.recipe import FILE, Gates, Recipe, Regressions
from edgewise.schema import Strict

MOST_ENTRIES = 10_000
_MATRIX_KEYS = ("matrix", "exclude", "name", "gates", "regressions")
_Model = TypeVar("_Model", bound=Strict)


@dataclass(frozen=True)
class Entry:
    """One bundle of a build: its name (a folder's), its recipe, and what it is held to."""

    name: str
    recipe: Recipe
    gates: Gates


@dataclass(frozen=True)
class RecipeFile:
    """A recipe file: all bundles that it asks for."""

    path: Path
    entries: tuple[Entry, ...]
    regressions: Regressions | None = None


@dataclass(frozen=True)
class _Choice:
    """One value of an axis of the matrix: the keys that it sets, and its part of the name."""

    sets: Mapping[str, Any]
    label: str
    gates: Mapping[str, Any]
    where: Where


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read the recipe of one bundle from its file, or from the folder of a bundle.

    Raises InputError if it cannot be read, a value has the wrong type, a key is unknown (with the nearest key), or there are
    several recipes in it.
    """
    entries = read_recipes(path).entries
    if len(entries) != 1:
        raise InputError(f"{path} is a matrix of {len(entries)} recipes: `edgewise build {path}` makes all of their bundles")
    return entries[0].recipe


def read_recipes(path: str | os.PathLike[str]) -> RecipeFile:
    """Read a recipe file and expand its matrix. Raises InputError with the line of what is wrong, and the nearest key."""
    document = read_yaml(in_folder(path, FILE))
    data = dict(document.data)
    _known(document, (), data, (*Recipe.model_fields, *_MATRIX_KEYS))
    matrix, excludes = data.pop("matrix", None), data.pop("exclude", None)
    name, gates, regressions = data.pop("name", None), data.pop("gates", None), data.pop("regressions", None)
    _partial(document, (), data)
    base = _fields(document, ("gates",), gates, Gates)
    axes = _axes(document, matrix)
    excluded = _excludes(document, excludes)
    limits = None if regressions is None else _checked(document, ("regressions",), regressions, Regressions)
    made = _expand(document, data, base, axes, excluded, name)
    _check_gates(document, made, limits)
    return RecipeFile(document.path, tuple(made), limits)


def _expand(
    document: Document,
    defaults: Mapping[str, Any],
    gates: Mapping[str, Any],
    axes: Mapping[str, list[_Choice]],
    excludes: list[tuple[Where, Mapping[str, Any]]],
    name: Any,
) -> list[Entry]:
    count = 1
    for axis in axes.values():
        count *= len(axis)
    if count > MOST_ENTRIES:
        raise InputError(f"{document.at(('matrix',))}: the matrix has {count} entries; {MOST_ENTRIES} are the most")
    entries: list[Entry] = []
    used: set[int] = set()
    names: dict[str, str] = {}
    for choices in itertools.product(*axes.values()):
        recipe = _recipe(document, defaults, choices)
        hits = [i for i, (_, one) in enumerate(excludes) if all(getattr(recipe, k) == v for k, v in one.items())]
        used.update(hits)
        if hits:
            continue
        own = dict(gates)
        for choice in choices:
            own |= choice.gates
        parts = [choice.label for choice, axis in zip(choices, axes.values(), strict=True) if len(axis) > 1 or not choice.label]
        title = _name(document, name, recipe, parts)
        if title.casefold() in names:
            raise InputError(f"{document.path}: two entries have the name {title!r}: give the values of the matrix a `name` each")
        names[title.casefold()] = title
        entries.append(Entry(title, recipe, _checked(document, ("gates",), own, Gates)))
    for i, (where, _) in enumerate(excludes):
        if i not in used:
            raise InputError(f"{document.at(where)}: this excludes nothing: no entry of the matrix has these values")
    if not entries:
        raise InputError(f"{document.path}: nothing is left to build: every entry is excluded")
    return entries


def _recipe(document: Document, defaults: Mapping[str, Any], choices: Iterable[_Choice]) -> Recipe:
    values, by = dict(defaults), dict[str, _Choice]()
    for choice in choices:
        for key, value in choice.sets.items():
            if key in by and values[key] != value:
                raise InputError(
                    f"{document.at((*choice.where, key))}: {key} is also set by {document.at((*by[key].where, key))}: "
                    "leave one of them out"
                )
            values[key], by[key] = value, choice
    return _checked(document, (), values, Recipe)


def _axes(document: Document, matrix: Any) -> dict[str, list[_Choice]]:
    if matrix is None:
        return {}
    at = ("matrix",)
    if not isinstance(matrix, dict):
        raise InputError(f"{document.at(at)}: the matrix is a mapping of keys to lists of values")
    _known(document, at, matrix, Recipe.model_fields)
    axes = {}
    for key, values in matrix.items():
        where = (*at, key)
        if not isinstance(values, list) or not values:
            raise InputError(f"{document.at(where)}: matrix.{key} is a list of one value or more")
        axes[key] = [_choice(document, (*where, i), key, value, matrix) for i, value in enumerate(values)]
    return axes


def _choice(document: Document, where: Where, axis: str, value: Any, matrix: Mapping[str, Any]) -> _Choice:
    """A value of an axis: as it stands, or a mapping that gives it a name, gates of its own, and other keys of the recipe."""
    if not isinstance(value, dict):
        sets = {axis: value}
        parsed = _partial(document, where, sets, place=where)
        return _Choice(sets, _label(axis, parsed[axis]), {}, where)
    sets = dict(value)
    _known(document, where, sets, (*Recipe.model_fields, "name", "gates"))
    name, gates = sets.pop("name", None), sets.pop("gates", None)
    if axis not in sets:
        raise InputError(f"{document.at(where)}: a mapping here must have the key {axis!r}, besides what it overrides")
    for key in sets:
        if key != axis and key in matrix:
            raise InputError(
                f"{document.at((*where, key))}: {key} is an axis of the matrix, so that it cannot be overridden here; use `exclude`"
            )
    parsed = _partial(document, where, sets)
    label = _label(axis, parsed[axis]) if name is None else _title(document, (*where, "name"), name)
    return _Choice(sets, label, _fields(document, (*where, "gates"), gates, Gates), where)


def _excludes(document: Document, excludes: Any) -> list[tuple[Where, Mapping[str, Any]]]:
    if excludes is None:
        return []
    if not isinstance(excludes, list) or not all(isinstance(one, dict) and one for one in excludes):
        raise InputError(f"{document.at(('exclude',))}: exclude is a list of mappings of keys to values")
    made: list[tuple[Where, Mapping[str, Any]]] = []
    for i, one in enumerate(excludes):
        _known(document, ("exclude", i), one, Recipe.model_fields)
        made.append((("exclude", i), _partial(document, ("exclude", i), one)))
    return made


def _check_gates(document: Document, entries: list[Entry], limits: Regressions | None) -> None:
    """A gate that lacks what it is measured with or against would be passed by everything."""
    names, where = [entry.name for entry in entries], document.at(("gates",))
    later = limits or Regressions(record="")
    for gates in (entry.gates for entry in entries):
        if gates.baseline is None and _any(gates.accuracy_drop, gates.latency_ratio, later.latency_ratio):
            raise InputError(f"{where}: accuracy_drop and latency_ratio need a `baseline`: the name of one of {', '.join(names)}")
        if gates.baseline is not None and gates.baseline not in names:
            raise unknown(f"baseline in {where}:", gates.baseline, names)
        if gates.data is None and _any(gates.accuracy, gates.accuracy_drop, later.accuracy_drop):
            raise InputError(f"{where}: accuracy and accuracy_drop need `data`: demo:NAME, or an .npz of inputs and labels")


def _any(*limits: float | None) -> bool:
    return any(limit is not None for limit in limits)


def _fields(document: Document, where: Where, data: Any, model: type[Strict]) -> dict[str, Any]:
    """Some fields of a model, checked, as they stand."""
    if data is None:
        return {}
    _checked(document, where, data, model)
    return dict(data)


def _partial(document: Document, where: Where, data: Mapping[str, Any], place: Where | None = None) -> dict[str, Any]:
    """Some fields of a recipe, checked and normalised. `place`: where all of them are, if not below `where`."""
    whole = {"model": "-", "targets": ("-",), **data}
    made = _checked(document, where, whole, Recipe, place)
    return {key: getattr(made, key) for key in data}


def _checked(document: Document, where: Where, data: Any, model: type[_Model], place: Where | None = None) -> _Model:
    """A record of the data at `where`. Raises InputError with the line of the first fault."""
    if not isinstance(data, Mapping):
        keys = ", ".join(model.model_fields)
        raise InputError(f"{document.at(where)}: {'.'.join(map(str, where))} is a mapping with the keys {keys}")
    _known(document, where, data, model.model_fields)
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        at = place if place is not None else (*where, *fault["loc"])
        if fault["type"] == "missing":
            raise InputError(f"{document.at(where)}: the key '{fault['loc'][-1]}' is missing") from error
        key = ".".join(str(part) for part in fault["loc"] if not str(part).startswith("function-"))
        text = fault["msg"].removeprefix("Value error, ")
        raise InputError(f"{document.at(at)}: {key}: {text}, not {fault['input']!r}") from error


def _known(document: Document, where: Where, data: Mapping[str, Any], known: Iterable[str]) -> None:
    names = list(known)
    for key in data:
        if key not in names:
            raise unknown(f"key in {document.at((*where, key))}:", key, names)


def _label(axis: str, value: Any) -> str:
    """The part of a name that says which value of an axis it is."""
    if axis == "model":
        return _slug(re.split(r"[:/]", value.removesuffix(".pt2"))[-1])
    if axis == "compress" and not value:
        return "plain"
    if isinstance(value, dict):
        return _slug("-".join("x".join(map(str, shape)) for shape in value.values()))
    text = "-".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return _slug(f"{axis}{text}" if isinstance(value, int) else text)


def _slug(text: str) -> str:
    return re.sub(r"-+", "-", re.sub(r"[^\w.=+-]", "-", text, flags=re.ASCII)).strip("-. ") or "x"


def _name(document: Document, name: Any, recipe: Recipe, parts: list[str]) -> str:
    own = None if name is None else _title(document, ("name",), name)
    model = [] if parts else [_label("model", recipe.model)]
    return "-".join([*([own] if own else model), *parts])


def _title(document: Document, where: Where, name: Any) -> str:
    if not isinstance(name, str) or not name or _slug(name) != name or path_fault(name):
        raise InputError(f"{document.at(where)}: name: {name!r} is no name of a folder: give letters, digits, '-', '_', '.', '='")
    return name
