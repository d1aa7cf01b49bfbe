"""Files that a verb writes besides bundles: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from edgewise.errors import InputError


def write_text(out: Path, text: str) -> None:
    """Write a file whole or not at all. Raises `InputError` if it cannot be written."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.write_text(text, "utf-8")
        os.replace(part, out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def append_text(out: Path, text: str) -> None:
    """Append to a file, which others write to as well. Raises `InputError` if it cannot be written."""
    try:
        with open(out, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error
