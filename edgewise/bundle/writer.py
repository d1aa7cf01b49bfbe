"""Write a bundle whole or not at all, whatever happens in between.

The bundle is built in a temporary folder beside its place, every file and folder is flushed to the disk, and
one rename publishes it. A reader sees the old bundle, the new one, or none; never a part of one.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from edgewise.bundle.manifest import FORMAT, MANIFEST_NAME, MAX_MANIFEST_BYTES, FileInfo, Manifest, dump
from edgewise.bundle.reader import Bundle, digest, read_bytes, walk
from edgewise.bundle.temporary import OLD, TMP, sweep, temporary
from edgewise.document import readable
from edgewise.errors import InputError


def write_bundle(out: str | os.PathLike[str], build: Callable[[Path], Manifest]) -> Bundle:
    """Write a bundle to the folder `out` and give it back, opened.

    `build(folder)` writes every file but `manifest.json` below `folder` and returns the manifest; its `files`
    are filled in here. If `build` raises, nothing is published and nothing is left behind, parents made for `out`
    included.

    `out` may be absent (its parents are made), an empty folder, or an edgewise bundle, which is replaced
    atomically. Raises `InputError` if it is anything else, and nothing of it is touched; also if there is no
    room or no permission.
    """
    place = Path(os.path.abspath(out))
    _check_place(place)
    with _parents(place):
        with _explained(place.parent):
            sweep(place.parent, place.name)
        manifest = _build(place, build)
    return Bundle(place, manifest)


def _build(place: Path, build: Callable[[Path], Manifest]) -> Manifest:
    """Build beside `place`, seal and publish."""
    with ExitStack() as stack:
        with _explained(place):
            folder = stack.enter_context(temporary(place))
        with _explained(place, folder, only_ours=True):
            manifest = build(folder)
        with _explained(place, folder):
            manifest = _sealed(manifest, folder)
            _write(folder / MANIFEST_NAME, dump(manifest))
            _sync_folders(folder)
        # Something may have been put there while the bundle was built.
        _check_place(place)
        with _explained(place, folder):
            _publish(folder, place)
    return manifest


def _check_place(place: Path) -> None:
    """Refuse a place that holds anything but an edgewise bundle, or whose name the runtimes cannot be told."""
    if readable(str(place)) != str(place):
        raise InputError(f"{readable(str(place))} is not UTF-8, which the runtimes take: give another name")
    with _explained(place):
        if not os.path.lexists(place):
            return
        if place.is_symlink() or not place.is_dir():
            raise InputError(f"{place} exists and is not a bundle. Give another folder, or move it away.")
        if not os.listdir(place):
            return
    _check_old(place)


def _check_old(place: Path) -> None:
    """Refuse to replace a folder that is not a bundle, or that holds files which are not the bundle's.

    Only the format's mark and the list of files are read: a damaged bundle, or one of another version, is
    replaced.
    """
    try:
        document = json.loads(read_bytes(place / MANIFEST_NAME, MAX_MANIFEST_BYTES))
        ours = isinstance(document, dict) and document.get("format") == FORMAT
    except (InputError, ValueError, RecursionError):
        ours = False
    if not ours:
        raise InputError(
            f"{place} exists and is not a bundle, so it was left alone. Give another folder, or move it away."
        )
    listed = document.get("files")
    known = {MANIFEST_NAME, *(listed if isinstance(listed, dict) else ())}
    foreign = sorted(name for name in walk(place) if name not in known)
    if foreign:
        raise InputError(
            f"{place} is a bundle and also holds '{foreign[0]}', which is not the bundle's, so it was left "
            f"alone. Move that file away, or give another folder."
        )


def _sealed(manifest: Manifest, folder: Path) -> Manifest:
    """Flush every file to the disk, and give the manifest with their digests and sizes."""
    files = {}
    for name in sorted(walk(folder)):
        if name == MANIFEST_NAME:
            raise InputError(f"the build wrote {MANIFEST_NAME}, which is written last and by the writer only")
        path = folder / name
        _sync(path)
        files[name] = FileInfo(sha256=digest(path), bytes=path.stat().st_size)
    for name in manifest.listed_paths():
        if name not in files:
            raise InputError(f"the bundle's manifest uses '{name}', which the build did not write")
    # Validated again, and not only copied: the names of the files have rules too.
    return Manifest.model_validate({**manifest.model_dump(), "files": files})


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder, and flushes renames by itself.
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folders(folder: Path) -> None:
    for current, _, _ in os.walk(folder, topdown=False):
        _sync(Path(current))


def _publish(folder: Path, place: Path) -> None:
    """Put `folder` at `place` by one rename; what was there before is removed afterwards."""
    old: Path | None = None
    if place.exists() and os.listdir(place):
        # After an exchange, the temporary name holds the old bundle.
        if _exchange(folder, place):
            old = folder
        else:
            # No exchange on this system: between the two renames there is no bundle at `place`, never a part.
            old = folder.with_name(folder.name.removesuffix(TMP) + OLD)
            os.rename(place, old)
            try:
                os.rename(folder, place)
            except OSError:
                os.rename(old, place)
                raise
    else:
        if place.exists() and os.name == "nt":  # POSIX renames over an empty folder, Windows does not.
            place.rmdir()
        os.rename(folder, place)
    _sync(place.parent)
    if old is not None:
        shutil.rmtree(old)


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step (Linux `renameat2`). False if the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:  # glibc before 2.28
        return False
    status = renameat2(
        _AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), ctypes.c_uint(_RENAME_EXCHANGE)
    )
    if status == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


@contextmanager
def _parents(place: Path) -> Iterator[None]:
    """Make the parents of `place`. If what follows fails, those made here are removed again, as far as they are empty."""
    made: list[Path] = []
    try:
        with _explained(place.parent):
            missing = list(itertools.takewhile(lambda parent: not parent.exists(), place.parents))
            for parent in reversed(missing):
                try:
                    parent.mkdir()
                except FileExistsError:  # another writer was faster, and it is not ours to remove
                    if not parent.is_dir():
                        raise
                else:
                    made.append(parent)
        yield
    except BaseException:
        with suppress(OSError):
            for parent in reversed(made):
                parent.rmdir()
        raise


_NO_SPACE = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def _explained(place: Path, folder: Path | None = None, *, only_ours: bool = False) -> Iterator[None]:
    """Turn an `OSError` into an `InputError` that names the path and, where it matters, the space.

    With `only_ours`, an error about a file outside of `folder` is passed on as it is: it has its own story.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _NO_SPACE:
            written = _size(folder) if folder is not None else 0
            free = shutil.disk_usage(place.parent).free
            raise InputError(
                f"cannot write {place}: {reason}. {_mib(written)} were written before it failed and "
                f"{_mib(free)} were left; make room beside {place}, or give a folder on another disk."
            ) from error
        if only_ours and not str(error.filename).startswith(str(folder)):
            raise
        if error.errno in _NOT_ALLOWED:
            raise InputError(
                f"cannot write {place}: {reason}. Give a folder that you may write, or change permissions."
            ) from error
        raise InputError(f"cannot write {place}: {reason}.") from error


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
