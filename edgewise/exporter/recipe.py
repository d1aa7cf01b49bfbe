"""The resolved recipe: all that is needed to make a bundle again."""

from __future__ import annotations

import os
from pathlib import Path

import yaml
from pydantic import ValidationError

from edgewise.errors import InputError, unknown
from edgewise.schema import Strict

FILE = "recipe.yaml"
_MOST_BYTES = 1 << 20


class Recipe(Strict):
    """What was asked of an export. `input_shapes` by input name; `devices` that artifacts are built for ahead of time."""

    model: str
    compress: tuple[str, ...] = ()
    targets: tuple[str, ...]
    precision: str = "fp32"
    devices: tuple[str, ...] = ()
    input_shapes: dict[str, tuple[int, ...]] = {}
    batch: int = 1
    seed: int = 0

    def to_yaml(self) -> str:
        """The recipe as YAML, with sorted keys: the same recipe gives the same text."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=True, allow_unicode=True))


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe from its file, or from the folder of a bundle.

    Raises InputError if it cannot be read, a value has the wrong type, or a key is unknown (with the nearest key).
    """
    place = Path(path)
    if place.is_dir():
        place = place / FILE
    try:
        with open(place, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise InputError(f"{place} is no recipe: it has more than {_MOST_BYTES} bytes")
        document = yaml.safe_load(data)
    except OSError as error:
        raise InputError(f"cannot read {place}: {error.strerror or error}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{place} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise InputError(f"{place} is no recipe: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    for key in document:
        if key not in Recipe.model_fields:
            raise unknown(f"key in {place}", key, Recipe.model_fields)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_url=False)]
        raise InputError(f"{place} is no valid recipe: {'; '.join(faults[:5])}") from error
