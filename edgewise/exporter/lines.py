"""YAML with the line of every value, so that a fault in a recipe is said with its place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewise.document import readable
from edgewise.errors import InputError

if TYPE_CHECKING:
    import yaml

MOST_BYTES = 1 << 20
_MOST_NODES = 20_000
_MOST_DEPTH = 20

Where = tuple[str | int, ...]
"""The way to a value: keys and indices from the top of the document."""


@dataclass(frozen=True)
class Document:
    """A YAML mapping from `path`, and the line on which each of its values begins."""

    path: Path
    data: dict[str, Any]
    lines: dict[Where, int]

    def at(self, where: Where) -> str:
        """`recipe.yaml:12`, of a value or else of what is around it."""
        while where not in self.lines:
            where = where[:-1]
        return f"{self.path}:{self.lines[where]}"


def read_yaml(path: Path) -> Document:
    """Read a mapping from a YAML file of at most 1 MiB. Raises InputError, with the line."""
    import yaml

    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > MOST_BYTES:
        raise InputError(f"{path} is no recipe: it has more than {MOST_BYTES} bytes")
    try:
        loader = yaml.SafeLoader(data)
        root = loader.get_single_node()
        lines: dict[Where, int] = {(): 1}
        for where, node in _nodes(root, path):
            lines[where] = node.start_mark.line + 1
        document = None if root is None else loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark, said = error.problem_mark, " ".join(filter(None, (error.context, error.problem)))
        hint = "; text with brackets or a comma in it needs quotes in a list" if mark else ""
        raise InputError(f"{path}{f':{mark.line + 1}' if mark else ''} is not YAML: {said}{hint}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path} is no recipe: a recipe is a mapping, such as `model: demo:digits`")
    return Document(path, document, lines)


def _nodes(root: yaml.Node | None, path: Path) -> Iterator[tuple[Where, yaml.Node]]:
    """Every node with the way to it. A key that is there twice is an error: YAML would forget the first."""
    import yaml

    pending: list[tuple[Where, yaml.Node]] = [] if root is None else [((), root)]
    count = 0
    while pending:
        where, node = pending.pop()
        count += 1
        # Aliases may stand for one another without end.
        if count > _MOST_NODES or len(where) > _MOST_DEPTH:
            raise InputError(f"{path} is no recipe: it has more than {_MOST_NODES} values, or is nested too deeply")
        if isinstance(node, yaml.ScalarNode) and readable(node.value) != node.value:
            raise InputError(f"{path}:{node.start_mark.line + 1}: the text {readable(node.value)!r} holds half of a character")
        yield where, node
        if isinstance(node, yaml.SequenceNode):
            pending += [((*where, i), child) for i, child in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                    raise InputError(f"{path}:{line}: a key must be a word; put it in quotes")
                if key.value in seen:
                    raise InputError(f"{path}:{line}: the key '{key.value}' is there already, on line {seen[key.value]}")
                seen[key.value] = line
                pending.append(((*where, key.value), value))
                # An error names the line of the key, above a long value.
                value.start_mark.line = key.start_mark.line


def in_folder(path: str | os.PathLike[str], name: str) -> Path:
    """`path`, or the file `name` in it where it is a folder."""
    place = Path(path)
    return place / name if place.is_dir() else place
