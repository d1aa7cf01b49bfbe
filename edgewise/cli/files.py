"""Files that a verb writes besides bundles: whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgewise.bundle.temporary import sweep, temporary
from edgewise.document import readable
from edgewise.errors import InputError


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A place to write a file; it becomes `out` when the block ends, and not if that fails. What killed writers left beside `out`
    goes. Raises `InputError` if it cannot be written."""
    try:
        sweep(out.parent, out.name)
        with temporary(out) as folder:
            part = folder / out.name
            yield part
            os.replace(part, out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error


def check_file(out: Path | None) -> None:
    """Raise `InputError` if a file cannot be written there, before the work is done that makes it."""
    if out is None:
        return
    if out.is_dir():
        raise InputError(f"cannot write {out}: it is a folder")
    if not out.parent.is_dir():
        raise InputError(f"cannot write {out}: there is no folder {out.parent}")
    if not os.access(out.parent, os.W_OK):
        raise InputError(f"cannot write {out}: no permission in {out.parent}")


def write_text(out: Path, text: str) -> None:
    """Write a file whole or not at all. Raises `InputError` if it cannot be written."""
    with whole(out) as part:
        part.write_text(readable(text), "utf-8")


def append_text(out: Path, text: str) -> None:
    """Append to a file, which others write to as well. Raises `InputError` if it cannot be written."""
    try:
        with open(out, "a", encoding="utf-8") as file:
            file.write(readable(text))
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error
