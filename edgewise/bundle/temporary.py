"""Temporary folders beside the place that they are made for, each with a lock that says that its writer lives.

Beside a folder `name`, its writer keeps `.name.TOKEN.lock`, `.name.TOKEN.tmp` and, where the system cannot swap two names,
`.name.TOKEN.old.tmp`. What a killed writer leaves is known by its lock, which nobody holds.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"
TMP = ".tmp"
OLD = ".old.tmp"
_TOKEN = 12
_FOLDERS = re.compile(rf"\..+\.[0-9a-f]{{{_TOKEN}}}({re.escape(OLD)}|{re.escape(TMP)})")
_LOCKS = re.compile(rf"\.(?P<name>.+)\.[0-9a-f]{{{_TOKEN}}}{re.escape(LOCK)}")


@contextmanager
def temporary(place: Path) -> Iterator[Path]:
    """An empty folder beside `place`, for as long as it is needed; it may be renamed. Raises OSError if it cannot be made."""
    held = None
    while held is None:  # a sweep may take the lock of a name in the moment between its making and its locking
        stem = f".{place.name}.{uuid.uuid4().hex[:_TOKEN]}"
        lock = place.with_name(stem + LOCK)
        held = hold(lock)
    folder = place.with_name(stem + TMP)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)
        lock.unlink(missing_ok=True)


def hold(lock: Path, *, create: bool = True) -> int | None:
    """Lock a file for as long as this process lives. None if another process holds it."""
    descriptor = os.open(lock, os.O_RDWR | (os.O_CREAT if create else 0), 0o644)
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def sweep(parent: Path, name: str | None = None) -> None:
    """Remove what dead writers of the folder `name`, or of any, left in `parent`. A living writer holds its lock."""
    for lock in sorted(parent.iterdir()):
        match = _LOCKS.fullmatch(lock.name)
        if match is None or name not in (None, match["name"]):
            continue
        try:
            held = hold(lock, create=False)
        except FileNotFoundError:  # its writer ended just now
            continue
        if held is None:
            continue
        try:
            place, stem = parent / match["name"], lock.name.removesuffix(LOCK)
            old = parent / (stem + OLD)
            if old.is_dir() and not os.path.lexists(place):
                os.rename(old, place)  # a writer without exchange died between its two renames
            for left in (old, parent / (stem + TMP)):
                if left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(held)
        lock.unlink(missing_ok=True)


def is_abandoned(folder: Path) -> bool:
    """Whether this is a writer's folder that has no lock: a sweep cannot know whether its writer lives."""
    if _FOLDERS.fullmatch(folder.name) is None:
        return False
    return not folder.with_name(folder.name.removesuffix(OLD).removesuffix(TMP) + LOCK).exists()
