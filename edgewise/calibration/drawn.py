"""The pictures and questions of `demo:vqa`: drawn when they are read, and put through the model's processor."""

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
    """Scenes of the training split, so that no answer of the test split is measured on pictures that statistics saw; `apart` are
    scenes with the seeds behind those of the test split, so that it has not been measured on before, either."""

    name: str
    ports: Ports
    preprocessing: Mapping[str, Any]
    held_out: bool = False
    notes: tuple[str, ...] = ()
    labelled: bool = False
    texts: bool = True
    questions: bool = True
    unlabelled = "it has questions, which a model that answers them is measured on"

    def __post_init__(self) -> None:
        if len(self.ports) != 1 or any(kind_of(port.shape) != "image" for port in self.ports.values()):
            raise InputError(f"{self.name} has images, and the model takes {', '.join(self.ports)}: give an .npz of arrays by name")
        self.apart = None if self.held_out else Scenes(self.name, self.ports, self.preprocessing, held_out=True)

    def __len__(self) -> int:
        return scenes.TEST

    def where(self, index: int) -> str:
        return f"scene {index} of {self.name}"

    def _read(self, index: int) -> Sample:
        ((name, port),) = self.ports.items()
        asked = scenes.example("test", scenes.TEST + index) if self.held_out else scenes.example("train", index)
        media = load_picture(Image.fromarray(asked.image), port.shape[1:], self.preprocessing)
        where = self.where(index)
        array = fitted(media.array, name, port, where)
        return Sample({name: array}, None, asked.answer, where, media.notes, asked.question)
