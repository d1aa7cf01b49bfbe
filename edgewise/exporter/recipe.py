"""The resolved recipe: all that is needed to make a bundle again."""
from __future__ import annotations

import yaml

from edgewise.schema import Strict


class Recipe(Strict):
    """What was asked of an export. `input_shapes` by input name."""

    model: str
    compress: tuple[str, ...] = ()
    targets: tuple[str, ...]
    precision: str = "fp32"
    input_shapes: dict[str, tuple[int, ...]] = {}
    batch: int = 1
    seed: int = 0

    def to_yaml(self) -> str:
        """The recipe as YAML, with sorted keys: the same recipe gives the same text."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=True, allow_unicode=True)
