"""Engines beside a note that says what each is for: it runs there, with this version, for this file, and nowhere else."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path


def note_of(path: Path) -> Path:
    """The file beside an engine that says what it is for."""
    return path.with_name(path.name + ".json")


def write(path: Path, plan: bytes, facts: Mapping[str, str]) -> None:
    """Write an engine and its note. Whoever reads at that moment finds a pair that does not fit, or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    said = {**facts, "engine": hashlib.sha256(plan).hexdigest()}
    for file, data in ((note_of(path), (json.dumps(said, indent=1, sort_keys=True) + "\n").encode()), (path, plan)):
        new = file.with_name(f"{file.name}.{os.getpid()}")
        new.write_bytes(data)
        os.replace(new, file)


def fault(path: Path, facts: Mapping[str, str]) -> str | None:
    """Why an engine is not the one for these facts: another device, version or model, or damage. None: it is."""
    try:
        said = json.loads(note_of(path).read_text("utf-8"))
        known = {key: str(said[key]) for key in (*facts, "engine")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{note_of(path)} does not say what {path.name} is for ({error})"
    for key, here in facts.items():
        if known[key] != here:
            if key == "onnx":
                return f"{path} was built from another model"
            return f"{path} was built for {key} {known[key]}, and here is {here}"
    return None if known["engine"] == digest(path) else f"{path} is damaged"


def digest(path: Path) -> str:
    """SHA-256 of a file, and of the file of weights beside it if there is one."""
    sha256 = hashlib.sha256()
    for one in (path, path.with_name(path.name + ".data")):
        if one.exists():
            with open(one, "rb") as file:
                while chunk := file.read(1 << 22):
                    sha256.update(chunk)
    return sha256.hexdigest()


def folder() -> Path:
    """Where engines are kept on a device: `engines` in `$EDGEWISE_CACHE`, or in the user's cache folder."""
    given = os.environ.get("EDGEWISE_CACHE")
    root = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgewise"
    return root / "engines"
