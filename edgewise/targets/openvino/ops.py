"""The ops of an OpenVINO IR, read from its XML: no OpenVINO is needed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from xml.parsers import expat

from edgewise.errors import InputError


def ops(path: Path) -> dict[str, int]:
    """How many layers of each type an IR has, bodies of loops included. Raises InputError if it is no XML, or has a DOCTYPE."""
    found: Counter[str] = Counter()
    parser = expat.ParserCreate()

    def start(name: str, attributes: dict[str, str]) -> None:
        if name == "layer" and "type" in attributes:
            found[attributes["type"]] += 1

    def doctype(*_: object) -> None:
        # Entities may stand for one another without end.
        raise InputError(f"{path} is no OpenVINO IR: it has a DOCTYPE")

    parser.StartElementHandler, parser.StartDoctypeDeclHandler = start, doctype
    try:
        with open(path, "rb") as file:
            parser.ParseFile(file)
    except (expat.ExpatError, OSError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    return dict(sorted(found.items()))
