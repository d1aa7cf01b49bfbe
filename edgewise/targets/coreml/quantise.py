"""Quantise a program to eight bits: the inputs of its layers, and their weights, and nothing else.

Statistics are of the compressed program itself, run by torch. What PT2E makes of it is lowered as every program is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgewise.targets.base import Feeds, Quantiser
from edgewise.targets.coreml.convert import quiet

if TYPE_CHECKING:
    from edgewise.targets.base import Lowering, Target


class CoreMLQuantiser(Quantiser):
    """See `Target.quantiser`."""

    def __init__(self, target: Target, made_of: Lowering, feeds: Feeds) -> None:
        with quiet():
            from edgewise.passes.layers import layers
            from edgewise.targets.coreml.pt2e import observe

            every = dict.fromkeys(layers(made_of.exported).values())
            largest = observe(made_of.exported, feeds, made_of.input_names)
        self._target, self._made_of = target, made_of
        self._largest = {layer: seen for layer, seen in largest.items() if seen.any()}
        self._smooth: dict[tuple[str, ...], np.ndarray] = {}
        self.layers = tuple(dict.fromkeys(layer.name for layer in self._largest))
        silent = [layer.name for layer in largest if layer not in self._largest]
        found = {layer.name for layer in largest}
        left = [name for name in every if name not in found]
        why = "are small, products that are no linear layers, or have weights too small for 8 bits with scales in half precision"
        self.notes = (
            *([f"the inputs of {_told(silent)} are zero on all samples, and stay in floating point"] if silent else []),
            *([f"{_told(left)} stay in floating point: they {why}"] if left else []),
        )

    def follow(self, other: Quantiser) -> None:
        assert isinstance(other, CoreMLQuantiser)
        self._smooth = other._smooth

    def write(self, folder: Path, stem: str, floating: Collection[str] = ()) -> list[Path]:
        with quiet():
            from edgewise.targets.coreml.pt2e import quantised

            chosen = {layer: seen for layer, seen in self._largest.items() if layer.name not in floating}
            program = quantised(self._made_of.exported, chosen, self._smooth) if chosen else self._made_of.exported
            return self._target.lower(
                program, folder, stem, precision=self._target.quantises_from,
                input_names=self._made_of.input_names, output_names=self._made_of.output_names,
            )


def _told(names: Sequence[str]) -> str:
    return f"{len(names)} layers ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
