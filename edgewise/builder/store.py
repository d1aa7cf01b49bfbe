"""Bundles by key: what was built once is copied, and not built again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from edgewise.bundle import Bundle, Manifest, write_bundle
from edgewise.bundle.manifest import MANIFEST_NAME, dump
from edgewise.bundle.reader import read_manifest
from edgewise.errors import InputError
from edgewise.exporter.cache import BUNDLES, default_root, limit, tidy, touch


class Store:
    """A folder of bundles, each in a folder named by its key, published whole; every digest is checked when one is used."""

    def __init__(self, root: Path | None = None) -> None:
        self.cache = root or default_root()
        self.root = self.cache / BUNDLES
        self.limit = limit()

    def knows(self, key: str) -> Manifest | None:
        """The manifest of the bundle with this key, as far as it can be read."""
        try:
            manifest = read_manifest(self.root / key)
        except InputError:
            return None
        touch(self.root / key)
        return manifest

    def fetch(self, key: str, out: Path) -> Bundle | None:
        """Copy the bundle with this key to `out`; None if there is none, or it is damaged."""
        try:
            touch(self.root / key)
            bundle = Bundle.open(self.root / key)
        except InputError:
            return None
        try:
            return copy(bundle, out)
        except FileNotFoundError:  # another process took the entry away meanwhile
            return None

    def remember(self, key: str, bundle: Bundle) -> None:
        """Keep a bundle. Having no room or no permission for it is no reason to fail."""
        try:
            tidy(self.cache, self.limit)
            copy(bundle, self.root / key)
        except (InputError, OSError):
            return


def copy(bundle: Bundle, out: Path) -> Bundle:
    """Write a copy of an opened bundle, whole or not at all. Raises InputError if it was changed since it was opened."""

    def build(folder: Path) -> Manifest:
        for name in bundle.manifest.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / name, folder / name)
        return bundle.manifest

    made = write_bundle(out, build)
    if made.manifest != bundle.manifest:
        shutil.rmtree(out)
        raise InputError(f"{bundle.path} was changed while it was copied; build again")
    return made


def is_current(manifest: Manifest, out: Path) -> bool:
    """Whether `out` holds the bundle of this manifest, whole and unaltered."""
    try:
        if not os.path.isdir(out) or (out / MANIFEST_NAME).read_bytes() != dump(manifest):
            return False
        Bundle.open(out)
    except (InputError, OSError):
        return False
    return True
