"""What a file of fitted weights says of itself, and the check that it is used for what it was fitted for."""
from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from safetensors import SafetensorError, safe_open

KEY = "edgewise"
"""Of the metadata of the file: one entry, as the order of several is not the same every time."""


@dataclass(frozen=True)
class Record:
    """`model` and `data_digest` are SHA-256 of all weights, and of the calibration inputs; `samples` were fitted on, `held_out`
    others measured the loss `before` (at the start) and `after`; `width` features have the tokens at the site."""

    method: str
    site: str
    keep: int
    parameters: dict[str, Any]
    width: int
    model: str
    data: str
    data_digest: str
    samples: int
    held_out: int
    seed: int
    steps: int
    before: float
    after: float

    @property
    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def metadata(self) -> dict[str, str]:
        """As the metadata of a `.safetensors` file."""
        return {KEY: json.dumps(self.document, sort_keys=True)}

    def check(self, method: str, site: str, parameters: Mapping[str, Any]) -> None:
        """Raise ValueError if this is not what the weights were fitted for. (Their width and count the method checks.)"""
        if method != self.method:
            raise ValueError(f"the file was fitted for {self.method}, and this is {method}")
        if site != self.site:
            raise ValueError(f"the file was fitted for {self.site}: say {method}@{self.site}, or fit one for {site}")
        for key, value in self.parameters.items():
            if parameters.get(key, value) != value:
                raise ValueError(f"the file was fitted for {key}={value}, and {key}={parameters[key]} is asked for")

    def note(self, model: str) -> str:
        """In words, for a bundle of the model with the digest `model`."""
        other = "" if model == self.model else "; the model that they were fitted for had other weights"
        return (f"{self.method} at {self.site}: weights fitted on {self.samples} samples of {self.data} "
                f"(SHA-256 {self.data_digest[:12]}), {self.steps} steps, seed {self.seed}; loss on {self.held_out} others "
                f"{self.before:.4g} -> {self.after:.4g}{other}")


_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "dict[str, Any]": (dict,)}


def read_record(path: str | os.PathLike[str]) -> Record | None:
    """The record of a readable `.safetensors` file; None where it has none, or is of another kind. Raises ValueError if the
    record is damaged."""
    if not str(path).endswith(".safetensors"):
        return None
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KEY)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if text is None:
        return None
    try:
        known = json.loads(text)
        made = Record(**known)
        for field in fields(Record):
            if not isinstance(known[field.name], _TYPES[str(field.type)]):
                raise TypeError(f"{field.name} is {known[field.name]!r}")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: what it says of its fit cannot be read: {error}") from error
    return made
