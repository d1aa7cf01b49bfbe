"""A cache of lowered artifacts, addressed by everything that they are made of."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from edgewise.bundle.manifest import path_fault
from edgewise.bundle.reader import digest
from edgewise.errors import InputError

INDEX = "digests.json"


def default_root() -> Path:
    """`$EDGEWISE_CACHE`, or the user's cache folder."""
    given = os.environ.get("EDGEWISE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgewise" / "artifacts"


class Cache:
    """Artifacts by key. An entry is published whole, and every file's digest is checked when it is used."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()

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
        temporary = None
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=self.root))
            names = [path.relative_to(folder).as_posix() for path in made]
            for name in names:
                _copy(folder / name, temporary / name)
            (temporary / INDEX).write_text(json.dumps({name: digest(folder / name) for name in names}), "utf-8")
            if (self.root / key).exists():
                shutil.rmtree(self.root / key)
            os.replace(temporary, self.root / key)
            temporary = None
        except OSError:
            return
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
