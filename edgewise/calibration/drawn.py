"""The pictures of `demo:vqa`: drawn when they are read, and put through the model's processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from edgewise.calibration.data import Ports, Sample, Source, fitted
from edgewise.calibration.media import kind_of, load_picture
from edgewise.demos import scenes
from edgewise.errors import InputError


@dataclass
class Scenes(Source):
    """Scenes of the training split, so that no answer of the test split is measured on pictures that statistics saw."""

    name: str
    ports: Ports
    preprocessing: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    labelled: bool = False
    texts: bool = False
    unlabelled = "it has questions, which a model that answers them is measured on"

    def __post_init__(self) -> None:
        if len(self.ports) != 1 or any(kind_of(port.shape) != "image" for port in self.ports.values()):
            raise InputError(f"{self.name} has images, and the model takes {', '.join(self.ports)}: give an .npz of arrays by name")

    def __len__(self) -> int:
        return scenes.TEST

    def where(self, index: int) -> str:
        return f"scene {index} of {self.name}"

    def _read(self, index: int) -> Sample:
        ((name, port),) = self.ports.items()
        media = load_picture(Image.fromarray(scenes.scene("train", index)[2]), port.shape[1:], self.preprocessing)
        where = self.where(index)
        return Sample({name: fitted(media.array, name, port, where)}, None, None, where, media.notes)
