"""A cache of lowered artifacts, addressed by everything that they are made of, and how large the user's cache grows."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from edgewise.bundle.manifest import path_fault
from edgewise.bundle.reader import digest
from edgewise.bundle.temporary import is_abandoned, sweep, temporary
from edgewise.errors import InputError
from edgewise.exporter.recipe import bytes_of

INDEX = "digests.json"
BUNDLES = "bundles"
"""The folder of whole bundles in the cache."""

_KEY = re.compile(r"[0-9a-f]{64}")
_BEFORE = ".new-"
"""How earlier versions named the folders of entries that were not yet whole, and had no lock."""

DEFAULT_LIMIT = 20 << 30
GRACE = 24 * 3600.0
"""Seconds. What was used since then is never removed, so that no build loses what it just made."""


def default_root() -> Path:
    """`$EDGEWISE_CACHE`, or the user's cache folder."""
    given = os.environ.get("EDGEWISE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgewise" / "artifacts"


def limit() -> int:
    """Bytes that the cache may grow to: `$EDGEWISE_CACHE_LIMIT` (`8 GiB`), or 20 GiB. Raises InputError if that is no size."""
    given = os.environ.get("EDGEWISE_CACHE_LIMIT")
    if not given:
        return DEFAULT_LIMIT
    try:
        return int(bytes_of(given))
    except ValueError as error:
        raise InputError(f"EDGEWISE_CACHE_LIMIT is {given!r}: give bytes, as in '8 GiB' or '0' ({error})") from None


class Cache:
    """Artifacts by key. An entry is published whole, and every file's digest is checked when it is used."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()
        self.limit = limit()

    def fetch(self, key: str, folder: Path, make: Callable[[Path], list[Path]]) -> tuple[list[Path], bool]:
        """The files of an artifact in `folder` or below it, copied from the cache, or made there by `make` and remembered.

        Gives the files, and whether they came from the cache. A damaged entry is made anew.
        """
        names = self._fetched(self.root / key, folder)
        if names is not None:
            return [folder / name for name in names], True
        made = make(folder)
        self._remember(key, folder, made)
        return made, False

    def _fetched(self, entry: Path, folder: Path) -> list[str] | None:
        index = entry / INDEX
        if not index.is_file():
            return None
        touch(entry)
        try:
            digests = json.loads(index.read_text("utf-8"))
            names = list(digests)
            if any(path_fault(n) or digest(entry / n) != digests[n] for n in names):
                return None
            for name in names:
                _copy(entry / name, folder / name)
            # Another process may have taken the entry away, or changed it, meanwhile.
            return names if all(digest(folder / n) == digests[n] for n in names) else None
        except (InputError, ValueError, OSError, TypeError, AttributeError):
            return None

    def _remember(self, key: str, folder: Path, made: list[Path]) -> None:
        """Publish an entry by one rename. Having no room or no permission for a cache is no reason to fail."""
        entry = self.root / key
        with contextlib.suppress(OSError):
            self.root.mkdir(parents=True, exist_ok=True)
            tidy(self.root, self.limit)
            with temporary(entry) as new:
                names = [path.relative_to(folder).as_posix() for path in made]
                for name in names:
                    _copy(folder / name, new / name)
                (new / INDEX).write_text(json.dumps({name: digest(folder / name) for name in names}), "utf-8")
                if entry.exists():
                    _take_away(entry)
                os.rename(new, entry)


def touch(entry: Path) -> None:
    """Note that an entry is in use. A cache that cannot be written is never tidied either."""
    with contextlib.suppress(OSError):
        os.utime(entry)


def tidy(root: Path, most: int, now: float | None = None) -> None:
    """Remove from the cache at `root` what killed writers left, and, while it holds more than `most` bytes, the entries that were
    not used for longest. What was used in the last day stays.

    Safe beside other processes: an entry leaves by one rename, and whoever reads it then finds that it is gone and makes it anew.
    """
    old = (time.time() if now is None else now) - GRACE
    entries: list[tuple[float, int, Path]] = []
    for folder in (root, root / BUNDLES):
        with contextlib.suppress(OSError):
            sweep(folder)
            for path in folder.iterdir():
                with contextlib.suppress(OSError):  # another process took it away
                    used = path.lstat().st_mtime
                    if _KEY.fullmatch(path.name) and path.is_dir():
                        entries.append((used, _size(path), path))
                    elif used < old and (path.name.startswith(_BEFORE) or is_abandoned(path)):
                        shutil.rmtree(path)
    total = sum(size for _, size, _ in entries)
    for used, size, path in sorted(entries):
        if total <= most or used >= old:
            return
        with contextlib.suppress(OSError):
            if path.stat().st_mtime == used:  # else it came into use meanwhile
                _take_away(path)
                total -= size


def _take_away(entry: Path) -> None:
    """Remove an entry by one rename, so that nobody meets a part of it."""
    with temporary(entry) as aside:
        os.rename(entry, aside / entry.name)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
