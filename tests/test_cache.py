"""The user's cache: what leaves it, and that nobody who reads it meanwhile gets a part of an entry."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from bundle_helpers import make, names, snapshot

from edgewise.builder.store import Store
from edgewise.bundle import Bundle
from edgewise.bundle.temporary import hold
from edgewise.errors import InputError
from edgewise.exporter.cache import DEFAULT_LIMIT, GRACE, Cache, limit, tidy

DAY = 24 * 3600


def key(letter: str) -> str:
    return letter * 64


def entry(root: Path, name: str, size: int, days: float) -> Path:
    """A folder of `size` bytes that was used `days` ago."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "artifact").write_bytes(b"x" * size)
    then = time.time() - days * DAY
    os.utime(folder, (then, then))
    return folder


def maker(content: bytes) -> Callable[[Path], list[Path]]:
    def make(folder: Path) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("a", "b"):
            (folder / name).write_bytes(content)
        return [folder / "a", folder / "b"]

    return make


def test_what_was_not_used_for_longest_leaves_first(tmp_path: Path) -> None:
    for letter, days in (("a", 9), ("b", 3), ("c", 5), ("d", 0.5)):
        entry(tmp_path, key(letter), 100, days)
    entry(tmp_path / "bundles", key("e"), 100, 7)
    tidy(tmp_path, 500)
    assert names(tmp_path) == sorted([*(key(letter) for letter in "abcd"), "bundles"])
    tidy(tmp_path, 300)
    assert names(tmp_path) == sorted([*(key(letter) for letter in "bcd"), "bundles"]) and names(tmp_path / "bundles") == []
    # What was used in the last day stays, whatever the limit.
    tidy(tmp_path, 0)
    assert names(tmp_path) == sorted([key("d"), "bundles"])


def test_use_is_noted(tmp_path: Path) -> None:
    cache, content = Cache(tmp_path / "cache"), b"x" * 100
    for letter in "ab":
        cache.fetch(key(letter), tmp_path / letter, maker(content))
    store = Store(tmp_path / "cache")
    bundle = make(tmp_path / "bundle")
    for letter in "cd":
        store.remember(key(letter), bundle)
    folders = {letter: cache.root / key(letter) for letter in "ab"} | {letter: store.root / key(letter) for letter in "cd"}
    for folder in folders.values():
        os.utime(folder, (0, 0))
    assert cache.fetch(key("a"), tmp_path / "again", maker(b""))[1]
    assert store.fetch(key("c"), tmp_path / "copy") is not None
    tidy(cache.root, 0)
    assert [letter for letter, folder in folders.items() if folder.exists()] == ["a", "c"]


def test_what_killed_writers_left_leaves_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    dead, alive, lost = (f".{key(letter)}.0123456789ab" for letter in "abc")
    for folder in (tmp_path, tmp_path / "bundles"):
        for name in (f"{dead}.tmp", f"{alive}.tmp"):
            entry(folder, name, 10, 9)
        for name in (dead, alive):
            (folder / f"{name}.lock").touch()
    entry(tmp_path, f"{lost}.tmp", 10, 9)
    entry(tmp_path, f"{lost}.old.tmp", 10, 0.5)
    entry(tmp_path, ".new-old", 10, 9)
    entry(tmp_path, ".new-young", 10, 0.5)
    others = [".git", "thesis", ".notes.tmp", "A" * 64, "0" * 63, "scores"]
    for name in others:
        entry(tmp_path, name, 10, 9)
    held = [hold(folder / f"{alive}.lock") for folder in (tmp_path, tmp_path / "bundles")]
    tidy(tmp_path, 0)
    for descriptor in held:
        assert descriptor is not None
        os.close(descriptor)
    kept = [f"{alive}.tmp", f"{alive}.lock"]
    assert names(tmp_path) == sorted([*kept, f"{lost}.old.tmp", ".new-young", "bundles", *others])
    assert names(tmp_path / "bundles") == sorted(kept)
    tidy(tmp_path, 0)
    assert names(tmp_path) == sorted([f"{lost}.old.tmp", ".new-young", "bundles", *others])


def test_links_are_left_alone(tmp_path: Path) -> None:
    outside = entry(tmp_path, "outside", 10, 9)
    before = snapshot(outside)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / key("a")).symlink_to(outside)
    (tmp_path / "cache" / f".{key('a')}.0123456789ab.tmp").symlink_to(outside)
    tidy(tmp_path / "cache", 0, now=time.time() + 2 * GRACE)
    assert snapshot(outside) == before


def test_readers_beside_a_tidy_get_whole_entries(tmp_path: Path) -> None:
    """Entries leave while others copy them, and are made anew: whoever asks has all of one entry."""
    cache, store = Cache(tmp_path / "cache"), Store(tmp_path / "cache")
    bundle = make(tmp_path / "bundle")
    want, faults, done = snapshot(bundle.path), list[str](), threading.Event()

    def read(number: int) -> None:
        try:
            for turn in range(60):
                content = bytes([turn % 5]) * 50_000
                files, _ = cache.fetch(key(str(turn % 5)), tmp_path / f"{number}-{turn}", maker(content))
                if [path.read_bytes() for path in files] != [content, content]:
                    faults.append(f"artifact {turn}")
                store.remember(key("b"), bundle)
                copied = store.fetch(key("b"), tmp_path / f"bundle-{number}")
                if copied is not None and snapshot(Bundle.open(copied.path).path) != want:
                    faults.append(f"bundle {turn}")
        except Exception as error:
            faults.append(repr(error))

    def sweep() -> None:
        while not done.is_set():
            tidy(cache.root, 0, now=time.time() + 2 * GRACE)

    readers = [threading.Thread(target=read, args=(number,)) for number in range(3)]
    sweeper = threading.Thread(target=sweep)
    for thread in (*readers, sweeper):
        thread.start()
    for thread in readers:
        thread.join()
    done.set()
    sweeper.join()
    assert not faults
    tidy(cache.root, 0, now=time.time() + 2 * GRACE)
    assert names(cache.root) == ["bundles"] and names(store.root) == []


@pytest.mark.parametrize(("text", "size"), [("", DEFAULT_LIMIT), ("8 GiB", 8 << 30), ("1.5kB", 1500), ("0 B", 0)])
def test_the_limit_is_read(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEWISE_CACHE_LIMIT", text)
    assert limit() == size


@pytest.mark.parametrize("text", ["much", "5 parsecs", "-1 GiB", "1.2.3 GiB", "nan"])
def test_a_limit_that_is_no_size_is_refused(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEWISE_CACHE_LIMIT", text)
    with pytest.raises(InputError, match=r"EDGEWISE_CACHE_LIMIT is .* give bytes"):
        Cache(tmp_path)
