"""Open a bundle and refuse anything that is not exactly what its manifest says.

A bundle may come from anywhere. Every file is checked against its digest before it is used, nothing outside
the folder is read, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from edgewise.bundle.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, parse, path_fault
from edgewise.errors import InputError, unknown

_CHUNK = 1 << 20
_MEND = "Copy the bundle again, or export the model again."


class Bundle:
    """A bundle that was opened and checked: `path` is its folder, `manifest` what it says of itself."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, progress: Callable[[str], None] | None = None) -> Bundle:
        """Open the bundle in the folder `path` and check all of it: schema, file names, sizes and digests.

        `progress`, if given, is called with the name of each file before it is checked. Raises `InputError`,
        naming the file and how to mend it, if anything is missing, altered, unlisted, a link, or outside of
        the folder.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        present = set(walk(folder))
        listed = {MANIFEST_NAME, *manifest.files}
        for name in sorted(listed - present):
            raise InputError(f"{folder / name} is listed in {MANIFEST_NAME} and is missing. {_MEND}")
        for name in sorted(present - listed):
            raise InputError(
                f"{folder / name} is not listed in {MANIFEST_NAME}: the folder holds more than the bundle. "
                f"Move that file away, or copy the bundle again."
            )
        for name in manifest.listed_paths():
            if name not in manifest.files:
                raise InputError(
                    f"{folder / MANIFEST_NAME} uses '{name}' and gives no digest for it. {_MEND}"
                )
        for name, info in sorted(manifest.files.items()):
            if progress is not None:
                progress(name)
            _check_file(folder / name, info.bytes, info.sha256)
        return cls(folder, manifest)

    def file(self, name: str) -> Path:
        """The path of a file of the bundle. Raises `InputError` if the manifest does not list it."""
        if name not in self.manifest.files:
            raise unknown("file", name, self.manifest.files)
        return self.path / name

    def golden(self, role: str) -> Golden:
        """The golden tensors of a component. Raises `InputError` if it has none or they cannot be read."""
        if role not in self.manifest.golden:
            raise unknown("golden role", role, self.manifest.golden)
        name = self.manifest.golden[role]
        info = self.manifest.files[name]
        data = read_bytes(self.file(name), info.bytes)
        # The file may have been changed since the bundle was opened: check what is used.
        if hashlib.sha256(data).hexdigest() != info.sha256:
            raise InputError(
                f"{self.path / name} was altered: its SHA-256 differs from the manifest. {_MEND}"
            )
        try:
            tensors = load_tensors(data)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path / name} is not a safetensors file: {error}. {_MEND}") from error
        return Golden.from_tensors(tensors, str(self.path / name))


class Golden:
    """Inputs and expected outputs of a component, stacked over samples.

    `inputs[name]`, `outputs[name]` and `references[name]` have shape `(samples, *shape)`. `outputs` come from
    the compressed program, `references` from the uncompressed one.
    """

    def __init__(
        self,
        inputs: dict[str, np.ndarray],
        outputs: dict[str, np.ndarray],
        references: dict[str, np.ndarray],
        samples: int,
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.references = references
        self.samples = samples

    @classmethod
    def from_tensors(cls, tensors: dict[str, np.ndarray], where: str) -> Golden:
        """Sort tensors by the prefixes `input.`, `output.` and `reference.` of their keys."""
        groups: dict[str, dict[str, np.ndarray]] = {"input": {}, "output": {}, "reference": {}}
        for key, value in sorted(tensors.items()):
            group, dot, name = key.partition(".")
            if group not in groups or not dot or not name or value.ndim == 0:
                raise InputError(f"{where} has a tensor '{key}' that is no golden tensor. {_MEND}")
            groups[group][name] = value
        counts = {value.shape[0] for value in tensors.values()}
        if len(counts) != 1 or 0 in counts or not groups["output"]:
            raise InputError(
                f"{where} needs the same number of samples, one or more, in every tensor. {_MEND}"
            )
        return cls(groups["input"], groups["output"], groups["reference"], counts.pop())

    def feeds(self, sample: int) -> dict[str, np.ndarray]:
        """The inputs of one sample, without the leading axis."""
        return {name: value[sample] for name, value in self.inputs.items()}


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json` of a bundle, and no other file. Raises `InputError`."""
    with _explained(folder):
        if not folder.exists():
            raise InputError(f"{folder} does not exist. Give the folder that `edgewise export` wrote.")
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder. Give the folder that `edgewise export` wrote.")
    path = folder / MANIFEST_NAME
    with _explained(path):
        if not os.path.lexists(path):
            if folder.suffix == ".mlpackage":
                raise InputError(f"{folder} is a Core ML package, and not a bundle: `edgewise run` runs it, no other verb does.")
            raise InputError(f"{folder} is not a bundle: it has no {MANIFEST_NAME}.")
    return parse(read_bytes(path, MAX_MANIFEST_BYTES), str(path))


def digest(path: Path) -> str:
    """SHA-256 of a regular file, hexadecimal. Raises `InputError` if it cannot be read."""
    with _regular(path) as file:
        return _digest(file)


def _digest(file: int) -> str:
    sha256 = hashlib.sha256()
    while chunk := os.read(file, _CHUNK):
        sha256.update(chunk)
    return sha256.hexdigest()


def _check_file(path: Path, size: int, sha256: str) -> None:
    with _regular(path) as file:
        actual = os.fstat(file).st_size
        if actual != size:
            what = "truncated" if actual < size else "altered"
            raise InputError(f"{path} is {what}: it has {actual} bytes, the manifest says {size}. {_MEND}")
        if _digest(file) != sha256:
            raise InputError(f"{path} was altered: its SHA-256 differs from the manifest. {_MEND}")


def read_bytes(path: Path, limit: int) -> bytes:
    """Read at most one byte more than `limit`, so that the caller sees that a file is too long."""
    with _regular(path) as file, _explained(path):
        chunks = []
        left = limit + 1
        while left > 0 and (chunk := os.read(file, min(left, _CHUNK))):
            chunks.append(chunk)
            left -= len(chunk)
        return b"".join(chunks)


@contextmanager
def _regular(path: Path) -> Iterator[int]:
    """Open a regular file for reading: no link, no pipe, no device."""
    with _explained(path):
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            raise InputError(f"{path} is a link; a bundle holds plain files only. {_MEND}")
        if not stat.S_ISREG(mode):
            raise InputError(f"{path} is not a plain file. {_MEND}")
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        # Without O_NONBLOCK, a pipe that was swapped in since the check above would block for ever.
        file = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    try:
        yield file
    finally:
        os.close(file)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an `OSError` into an `InputError` that names the path."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error


def walk(folder: Path) -> Iterator[str]:
    """Names of all files below `folder`, with forward slashes. A link or a special file is refused."""
    pending = [""]
    while pending:
        prefix = pending.pop()
        with _explained(folder / prefix), os.scandir(folder / prefix) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = prefix + entry.name
                path = folder / name
                if entry.is_symlink():
                    raise InputError(f"{path} is a link; a bundle holds plain files only. {_MEND}")
                if entry.is_dir(follow_symlinks=False):
                    pending.append(name + "/")
                elif not entry.is_file(follow_symlinks=False):
                    raise InputError(f"{path} is not a plain file. {_MEND}")
                elif fault := path_fault(name):
                    raise InputError(f"{path} is not allowed in a bundle: {fault}.")
                else:
                    yield name
