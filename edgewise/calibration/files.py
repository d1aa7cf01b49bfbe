"""Samples in files: a folder, a folder for each class, or a manifest."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgewise.calibration.data import Ports, Sample, Source, class_number, fitted
from edgewise.calibration.media import AUDIO, IMAGES, VIDEOS, Kind, kind_of, load_audio, load_image, load_video
from edgewise.errors import InputError, unknown

_SUFFIXES: dict[Kind, tuple[str, ...]] = {"image": IMAGES, "audio": AUDIO, "video": VIDEOS}
_COLUMNS = ("file", "path", "image", "audio", "video")
MANIFESTS = (".csv", ".tsv", ".jsonl")
_MOST_BYTES = 1 << 28


@dataclass(frozen=True)
class Item:
    """A file (of a video: or a folder of frames), its class or its text, and what is asked about it."""

    path: Path
    label: int | None = None
    text: str | None = None
    question: str | None = None


@dataclass
class Files(Source):
    """Files that are decoded, and put through the model's processor, when they are read."""

    name: str
    items: tuple[Item, ...]
    kind: Kind
    ports: Ports
    preprocessing: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    labelled: bool = field(init=False)
    texts: bool = field(init=False)
    questions: bool = field(init=False)

    def __post_init__(self) -> None:
        self.labelled = all(item.label is not None for item in self.items)
        self.texts = all(item.text is not None for item in self.items)
        self.questions = all(item.question for item in self.items)

    def __len__(self) -> int:
        return len(self.items)

    def where(self, index: int) -> str:
        return str(self.items[index].path)

    def _read(self, index: int) -> Sample:
        item = self.items[index]
        load = {"image": load_image, "audio": load_audio, "video": load_video}[self.kind]
        ((name, port),) = self.ports.items()
        try:
            media = load(item.path, port.shape[1:], self.preprocessing)
        except InputError as error:
            named = str(item.path) in str(error)
            raise error if named else InputError(f"{item.path}: {error}") from error
        except OSError as error:
            raise InputError(f"cannot read {item.path}: {error.strerror or error}") from error
        array = fitted(media.array, name, port, str(item.path))
        return Sample({name: array}, item.label, item.text, str(item.path), media.notes, item.question)


def open_files(path: Path, ports: Ports, preprocessing: Mapping[str, Any], classes: Mapping[int, str] | None) -> Source:
    """See `open_source`: a folder or a manifest."""
    if not path.exists():
        raise InputError(
            f"{path} does not exist: give demo:NAME, a folder of files, a manifest ({', '.join(MANIFESTS)}), an .npz or a "
            ".safetensors file"
        )
    if len(ports) != 1:
        raise InputError(
            f"{path}: files hold one input, and the model has {len(ports)} ({', '.join(ports)}): give an .npz of arrays by name"
        )
    ((name, port),) = ports.items()
    kind = kind_of(port.shape)
    if kind is None or not port.dtype.startswith("float"):
        takes = f"{name} {list(port.shape)} of {port.dtype}"
        raise InputError(f"{path}: the input {takes} is no image, video or audio: give an .npz of arrays")
    names = {str(v): int(k) for k, v in (classes or {}).items()}
    notes: tuple[str, ...] = ()
    if path.is_dir():
        items, notes = _folder(path, kind, names)
    elif path.suffix.lower() in MANIFESTS:
        items = tuple(_manifest(path, names))
    else:
        raise InputError(f"{path}: data is read from folders, {', '.join(MANIFESTS)}, .npz and .safetensors files")
    return Files(str(path), items, kind, ports, preprocessing, notes)


def _folder(path: Path, kind: Kind, names: Mapping[str, int]) -> tuple[tuple[Item, ...], tuple[str, ...]]:
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    own = [entry for entry in entries if _is_media(entry, kind)]
    folders = [entry for entry in entries if entry.is_dir() and entry not in own]
    inside = {folder: [one for one in sorted(folder.iterdir()) if _is_media(one, kind)] for folder in folders}
    inside = {folder: found for folder, found in inside.items() if found}
    if not own and not inside:
        raise InputError(f"{path} holds no {kind} files ({', '.join(_SUFFIXES[kind])}), nor folders of them by class")
    if own:
        left = len(entries) - len(own)
        return tuple(Item(entry) for entry in own), (f"{left} other files in {path} were left out",) if left else ()
    labels, notes = _numbers([folder.name for folder in inside], names, path)
    return tuple(Item(one, labels[folder.name]) for folder, found in inside.items() for one in found), notes


def _is_media(entry: Path, kind: Kind) -> bool:
    if kind == "video" and entry.is_dir():  # of frames
        return any(one.suffix.lower() in IMAGES for one in entry.iterdir())
    return entry.is_file() and entry.suffix.lower() in _SUFFIXES[kind]


def _numbers(found: list[str], names: Mapping[str, int], path: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """The number of each class: its name's in the model, the name itself if it is a number, or else its place in the alphabet."""
    if all(name in names for name in found):
        return {name: names[name] for name in found}, ()
    if all(name.isdecimal() for name in found):
        return {name: class_number(int(name), str(path / name)) for name in found}, ()
    if names and any(name in names for name in found):
        raise unknown(f"class in {path}", next(name for name in found if name not in names), names)
    listed = {name: number for number, name in enumerate(sorted(found))}
    return listed, (f"the classes of {path} are not known to the model by name, and were numbered in alphabetical order",)


def _manifest(path: Path, names: Mapping[str, int]) -> Iterator[Item]:
    """The items of a manifest; files are relative to its folder."""
    if path.stat().st_size > _MOST_BYTES:
        raise InputError(f"{path} has more than {_MOST_BYTES} bytes, and is no manifest")
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    rows = list(_json_lines(path, text) if path.suffix.lower() == ".jsonl" else _table(path, text))
    if not rows:
        raise InputError(f"{path} lists no samples")
    column = next((c for c in _COLUMNS if c in rows[0][1]), None)
    if column is None:
        raise InputError(f"{path} has no column 'file'; it has: {', '.join(rows[0][1]) or 'nothing'}")
    for line, row in rows:
        where = f"{path}, line {line}"
        if not row.get(column):
            raise InputError(f"{where}: there is no {column}")
        said, question = (_words(row, columns, where) for columns in (("text", "answer"), ("question",)))
        yield Item(path.parent / str(row[column]), _label(row.get("label"), names, where), said, question)


def _words(row: Mapping[str, Any], columns: tuple[str, ...], where: str) -> str | None:
    """What the first of these columns that a row has says."""
    column = next((name for name in columns if row.get(name) is not None), None)
    if column is None:
        return None
    if not isinstance(row[column], str):
        raise InputError(f"{where}: the {column} {row[column]!r} is no string")
    return str(row[column])


def _table(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise InputError(f"{path}, line {reader.line_num}: the line has another number of columns than the first")
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}") from error


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number} is no JSON object")
        yield number, row


def _label(value: Any, names: Mapping[str, int], where: str) -> int | None:
    if value is None or value == "":
        return None
    if isinstance(value, str) and value in names:
        return names[value]
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        raise unknown(f"class at {where}:", value, names) from None
    if isinstance(value, (bool, float)):
        raise InputError(f"{where}: the label {value!r} is no class number of 0 or more")
    return class_number(number, where)
