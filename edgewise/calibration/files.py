"""Samples in files: a folder, a folder for each class, or a manifest."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgewise.calibration.data import Ports, Sample, Source, class_number, fitted
from edgewise.calibration.media import AUDIO, IMAGES, VIDEOS, Kind, kind_of, load_audio, load_image, load_video
from edgewise.errors import InputError, unknown
from edgewise.rows import read_table

_SUFFIXES: dict[Kind, tuple[str, ...]] = {"image": IMAGES, "audio": AUDIO, "video": VIDEOS}
_COLUMNS = ("file", "path", "image", "audio", "video")
MANIFESTS = (".csv", ".tsv", ".jsonl")
_MOST_BYTES = 1 << 28
Names = Mapping[str, int | None]
"""The numbers of classes by their names in the model; None for a name that several have."""


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
    unlabelled: str = Source.unlabelled
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
        except (OSError, ValueError) as error:  # the latter for names that no file can have
            raise InputError(f"cannot read {item.path}: {getattr(error, 'strerror', None) or error}") from error
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
    counts = Counter(str(name) for name in (classes or {}).values())
    names = {str(v): int(k) if counts[str(v)] == 1 else None for k, v in (classes or {}).items()}
    notes: tuple[str, ...] = ()
    lacks = Source.unlabelled
    if path.is_dir():
        items, notes, lacks = _folder(path, kind, names)
    elif path.suffix.lower() in MANIFESTS:
        items = tuple(_manifest(path, names))
    else:
        raise InputError(f"{path}: data is read from folders, {', '.join(MANIFESTS)}, .npz and .safetensors files")
    once, said = _once(items)
    return Files(str(path), once, kind, ports, preprocessing, (*notes, *said), lacks)


def _folder(path: Path, kind: Kind, names: Names) -> tuple[tuple[Item, ...], tuple[str, ...], str]:
    """The items, what was odd, and what they lack to have labels."""
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    own = [entry for entry in entries if _is_media(entry, kind)]
    folders = [entry for entry in entries if entry.is_dir() and entry not in own]
    inside = {folder: [one for one in sorted(folder.iterdir()) if _is_media(one, kind)] for folder in folders}
    inside = {folder: found for folder, found in inside.items() if found}
    if not own and not inside:
        raise InputError(f"{path} holds no {kind} files ({', '.join(_SUFFIXES[kind])}), nor folders of them by class")
    if own and inside:
        raise InputError(
            f"{path} holds {kind} files ({own[0].name}, ...) and folders of them by class ({next(iter(inside)).name}, ...): give "
            "one or the other"
        )
    if own:
        left = len(entries) - len(own)
        notes = (f"{left} other files in {path} were left out",) if left else ()
        return tuple(Item(entry) for entry in own), notes, Source.unlabelled
    labels, note = _numbers([folder.name for folder in inside], names, path)
    return tuple(Item(one, labels[folder.name]) for folder, found in inside.items() for one in found), (note,), note


def _once(items: tuple[Item, ...]) -> tuple[tuple[Item, ...], tuple[str, ...]]:
    """Each file once, so that none is among those of the statistics and the held-out ones too; with several questions, each. Raises
    `InputError` for a file with two labels."""
    known: dict[tuple[Path, str | None], Item] = {}
    for item in items:
        first = known.setdefault((_same(item.path), item.question), item)
        if first.label != item.label:
            raise InputError(f"{item.path} has the labels {first.label} and {item.label}: give it one")
        if first.text != item.text:
            raise InputError(f"{item.path} has the texts {first.text!r} and {item.text!r}: give it one")
    left = len(items) - len(known)
    return tuple(known.values()), (f"{left} samples are of files that were there before, and were left out",) if left else ()


def _same(path: Path) -> Path:
    """What a file is known by. One that cannot be read is counted among those when it is."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):
        return path.absolute()


def _is_media(entry: Path, kind: Kind) -> bool:
    if kind == "video" and entry.is_dir():  # of frames
        return any(one.suffix.lower() in IMAGES for one in entry.iterdir())
    return entry.is_file() and entry.suffix.lower() in _SUFFIXES[kind]


def _meant(found: Iterable[str], names: Names) -> Names:
    """The names by which classes are meant: a number is a name only where all are names, as it could be that of another class."""
    if all(name in names for name in found):
        return names
    return {name: number for name, number in names.items() if not name.isdecimal()}


def _named(name: str, names: Names, where: object) -> int:
    number = names[name]
    if number is None:
        raise InputError(f"{where}: the model has several classes named {name!r}: give the number of the one that is meant")
    return number


def _numbers(found: list[str], names: Names, path: Path) -> tuple[dict[str, int | None], str]:
    """The number of each class, its name's in the model or the name itself if it is a number, and how it was found. None where the
    model knows none of the names: their order is not guessed."""
    names = _meant(found, names)
    strange = [name for name in found if name not in names and not name.isdecimal()]
    if not strange:
        numbers: dict[str, int | None] = {name: _named(name, names, path) if name in names else int(name) for name in found}
        named = sum(name in names for name in found)
        return numbers, f"{named} folders of {path} are classes by their names in the model, {len(found) - named} by number"
    if any(name in names for name in found):
        raise unknown(f"class in {path}", strange[0], names)
    knows = f"its first ones are {', '.join(list(names)[:3])}" if names else "it comes with no names of classes"
    return dict.fromkeys(found), (
        f"the classes of {path} ({', '.join(strange[:3])}, ...) are not known to the model by name ({knows}): name the "
        "folders as the model does or by its numbers (0, 1, ...), or give a manifest with the columns file and label"
    )


def _manifest(path: Path, names: Names) -> Iterator[Item]:
    """The items of a manifest; files are relative to its folder."""
    if path.stat().st_size > _MOST_BYTES:
        raise InputError(f"{path} has more than {_MOST_BYTES} bytes, and is no manifest")
    rows = list(_json_lines(path)) if path.suffix.lower() == ".jsonl" else read_table(path)
    if not rows:
        raise InputError(f"{path} lists no samples")
    column = next((c for c in _COLUMNS if c in rows[0][1]), None)
    if column is None:
        raise InputError(f"{path} has no column 'file'; it has: {', '.join(rows[0][1]) or 'nothing'}")
    labelled = any(row.get("label") not in (None, "") for _, row in rows)
    names = _meant((row["label"] for _, row in rows if isinstance(row.get("label"), str)), names)
    for line, row in rows:
        where = f"{path}, line {line}"
        if labelled and row.get("label") in (None, ""):
            raise InputError(f"{where}: there is no label, and other lines have one")
        if not row.get(column):
            raise InputError(f"{where}: there is no {column}")
        question = _words(row, ("question",), where)
        said = _words(row, ("answer", "text") if question else ("text", "answer"), where)
        yield Item(path.parent / str(row[column]), _label(row.get("label"), names, where), said, question)


def _words(row: Mapping[str, Any], columns: tuple[str, ...], where: str) -> str | None:
    """What the first of these columns that a row has says; one that is not empty, if there is one."""
    held = [name for name in columns if row.get(name) is not None]
    if not held:
        return None
    column = next((name for name in held if row[name] != ""), held[0])
    if not isinstance(row[column], str):
        raise InputError(f"{where}: the {column} {row[column]!r} is no string")
    return str(row[column])


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
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


def _label(value: Any, names: Names, where: str) -> int | None:
    if value is None or value == "":
        return None
    if isinstance(value, str) and value in names:
        return _named(value, names, where)
    try:
        if isinstance(value, str) and not re.fullmatch(r"\s*-?[0-9]+\s*", value):  # int() takes 1_0 as well
            raise ValueError(value)
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        raise unknown(f"class at {where}:", value, names) from None
    if isinstance(value, (bool, float)):
        raise InputError(f"{where}: the label {value!r} is no class number of 0 or more")
    return class_number(number, where)
