from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundle_helpers import build, edit, make, manifest, names, snapshot

from edgewise.bundle import Bundle, Manifest, write_bundle, writer
from edgewise.bundle.temporary import hold
from edgewise.errors import InputError

HERE = Path(__file__).parent


def test_a_bundle_is_written_and_opens(tmp_path: Path) -> None:
    bundle = make(tmp_path / "a" / "b")
    assert Bundle.open(bundle.path).manifest == bundle.manifest
    assert names(tmp_path / "a") == ["b"]


def test_two_builds_are_byte_identical(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b")
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_a_relative_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("out"))
    assert Bundle.open("out").manifest.files


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    make(tmp_path / "out")
    assert Bundle.open(tmp_path / "out").manifest.files


@pytest.mark.parametrize("exchange", [True, False])
def test_a_bundle_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(writer, "_exchange", lambda first, second: False)
    make(tmp_path / "out", fill=b"old")
    bundle = make(tmp_path / "out", fill=b"new")
    assert Bundle.open(bundle.path).file("openvino/vision_encoder.bin").read_bytes() == b"new"
    assert names(tmp_path) == ["out"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="renameat2 is Linux's")
def test_exchange_swaps_two_folders(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not writer._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange names")
    assert (names(tmp_path / "a"), names(tmp_path / "b")) == (["b"], ["a"])


def test_a_damaged_or_newer_bundle_is_replaced(tmp_path: Path) -> None:
    out = make(tmp_path / "out").path
    edit(out, lambda document: document.update(schema_version=99))
    (out / "recipe.yaml").unlink()
    make(out)
    assert Bundle.open(out).manifest.files


@pytest.mark.parametrize("data", [b"{}", b"[" * 100_000, b"\xff", b'{"format": "other"}', b""])
def test_a_folder_that_is_no_bundle_is_not_touched(tmp_path: Path, data: bytes) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_bytes(data)
    (out / "thesis.tex").write_text("years of work")
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="exists and is not a bundle"):
        make(out)
    assert snapshot(tmp_path) == before


def test_a_file_of_the_user_inside_a_bundle_is_not_lost(tmp_path: Path) -> None:
    out = make(tmp_path / "out").path
    (out / "notes.txt").write_text("years of work")
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=r"also holds 'notes.txt'"):
        make(out)
    assert snapshot(tmp_path) == before


def test_files_and_links_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    make(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    before = snapshot(tmp_path)
    for name in ("file", "link", "dangling"):
        with pytest.raises(InputError, match="exists and is not a bundle"):
            make(tmp_path / name)
    with pytest.raises(InputError, match="cannot write"):
        make(tmp_path / "file" / "below")
    assert snapshot(tmp_path) == before
    assert (tmp_path / "link").is_symlink()


def test_what_appears_during_the_build_is_not_replaced(tmp_path: Path) -> None:
    def slow(folder: Path) -> Manifest:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("years of work")
        return build()(folder)

    with pytest.raises(InputError, match="exists and is not a bundle"):
        write_bundle(tmp_path / "out", slow)
    assert names(tmp_path / "out") == ["thesis.tex"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("old", [True, False])
def test_a_build_that_fails_changes_nothing(tmp_path: Path, old: bool) -> None:
    if old:
        make(tmp_path / "out", fill=b"old")
    before = snapshot(tmp_path)

    def fails(folder: Path) -> Manifest:
        build()(folder)
        raise ZeroDivisionError("the model is at fault")

    with pytest.raises(ZeroDivisionError):
        write_bundle(tmp_path / "out", fails)
    assert snapshot(tmp_path) == before
    assert names(tmp_path) == (["out"] if old else [])


def fails(folder: Path) -> Manifest:
    build()(folder)
    raise InputError("refused")


@pytest.mark.parametrize("error", [InputError, KeyboardInterrupt])
def test_parents_made_for_a_refused_bundle_are_removed(tmp_path: Path, error: type[BaseException]) -> None:
    def stops(folder: Path) -> Manifest:
        build()(folder)
        assert names(tmp_path / "mine") == ["a"]
        raise error("refused")

    (tmp_path / "mine").mkdir()
    with pytest.raises(error):
        write_bundle(tmp_path / "mine" / "a" / "b" / "out", stops)
    assert names(tmp_path / "mine") == []


def test_parents_that_others_use_stay(tmp_path: Path) -> None:
    def meanwhile(folder: Path) -> Manifest:
        (tmp_path / "a" / "notes.txt").write_text("years of work")
        return fails(folder)

    with pytest.raises(InputError, match="refused"):
        write_bundle(tmp_path / "a" / "b" / "c" / "out", meanwhile)
    assert names(tmp_path / "a") == ["notes.txt"]
    with pytest.raises(InputError, match="refused"):
        write_bundle(tmp_path / "a" / "out", fails)
    assert names(tmp_path / "a") == ["notes.txt"]


def test_parents_that_cannot_all_be_made_are_removed(tmp_path: Path) -> None:
    out = tmp_path / "a" / ("x" * 300) / "b" / "out"
    with pytest.raises(InputError, match="cannot write"):
        write_bundle(out, fails)
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    with pytest.raises(InputError, match="cannot write"):
        write_bundle(tmp_path / "dangling" / "b" / "out", fails)
    assert names(tmp_path) == ["dangling"]


def test_errors_of_the_build_about_other_files_are_passed_on(tmp_path: Path) -> None:
    def fails(folder: Path) -> Manifest:
        (tmp_path / "model.pt2").read_bytes()
        raise AssertionError

    with pytest.raises(FileNotFoundError):
        write_bundle(tmp_path / "out", fails)


def test_the_manifest_must_fit_the_files(tmp_path: Path) -> None:
    def forgets(folder: Path) -> Manifest:
        result = build()(folder)
        (folder / "recipe.yaml").unlink()
        return result

    def meddles(folder: Path) -> Manifest:
        (folder / "manifest.json").write_text("{}")
        return build()(folder)

    def links(folder: Path) -> Manifest:
        (folder / "link").symlink_to("/etc/hostname")
        return build()(folder)

    def misnames(folder: Path) -> Manifest:
        (folder / "a\nb").write_text("x")
        return build()(folder)

    for bad, message in (
        (forgets, "did not write"),
        (meddles, "written last"),
        (links, "is a link"),
        (misnames, "not allowed"),
    ):
        with pytest.raises(InputError, match=message):
            write_bundle(tmp_path / "out", bad)
        assert names(tmp_path) == []


def test_left_overs_of_dead_writers_are_removed(tmp_path: Path) -> None:
    dead, alive = ".out.0123456789ab", ".out.ba9876543210"
    for stem in (dead, alive):
        (tmp_path / f"{stem}.tmp" / "x").mkdir(parents=True)
        (tmp_path / f"{stem}.lock").touch()
    unrelated = [".out.notes.tmp", ".out.0123456789ab.txt", ".other.0123456789ab.lock", ".out.short.lock"]
    for name in unrelated:
        (tmp_path / name).touch()
    held = hold(tmp_path / f"{alive}.lock")
    assert held is not None
    make(tmp_path / "out")
    os.close(held)
    assert names(tmp_path) == sorted([*unrelated, f"{alive}.tmp", f"{alive}.lock", "out"])


def test_a_bundle_set_aside_by_a_dead_writer_comes_back(tmp_path: Path) -> None:
    make(tmp_path / "out", fill=b"old")
    (tmp_path / "out").rename(tmp_path / ".out.0123456789ab.old.tmp")
    (tmp_path / ".out.0123456789ab.lock").touch()

    def fails(folder: Path) -> Manifest:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_bundle(tmp_path / "out", fails)
    assert Bundle.open(tmp_path / "out").file("openvino/vision_encoder.bin").read_bytes() == b"old"
    assert names(tmp_path) == ["out"]


WRITER = """
import sys
sys.path[:0] = [{here!r}, {root!r}]
from pathlib import Path
from bundle_helpers import build
from edgewise.bundle import write_bundle
print("ready", flush=True)
for number in range(10_000):
    write_bundle(Path({out!r}), build(fill=bytes([number % 251]) * 300_000))
"""


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is POSIX's")
def test_killed_at_any_moment_there_is_a_whole_bundle_or_none(tmp_path: Path) -> None:
    generator = random.Random(0)
    out = tmp_path / "out"
    code = WRITER.format(here=str(HERE), root=str(HERE.parent), out=str(out))
    seen = 0
    for _ in range(12):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(generator.uniform(0, 0.08))
            process.send_signal(signal.SIGKILL)
        if out.exists():
            data = Bundle.open(out).file("openvino/vision_encoder.bin").read_bytes()
            assert len(data) == 300_000 and len(set(data)) == 1
            seen += 1
    assert seen > 0
    make(out)
    assert names(tmp_path) == ["out"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if (
        not sys.platform.startswith("linux")
        or os.geteuid() != 0
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    make(small_disk / "out", fill=b"old")
    with pytest.raises(InputError, match=r"No space left.*MiB were written.*make room"):
        make(small_disk / "out", fill=b"x" * 500_000)
    assert names(small_disk) == ["out"]
    assert Bundle.open(small_disk / "out").file("openvino/vision_encoder.bin").read_bytes() == b"old"


def test_a_read_only_disk(small_disk: Path) -> None:
    make(small_disk / "out")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for out in (small_disk / "out", small_disk / "new", small_disk / "deep" / "new"):
        with pytest.raises(InputError, match=r"cannot write .*: Read-only file system"):
            make(out)
    assert Bundle.open(small_disk / "out").manifest.files


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(InputError, match="make room"):
            make(tmp_path / "out", fill=b"x" * 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert names(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(InputError, match="Permission denied"):
        make(tmp_path / "closed" / "out")


def test_nothing_says_when_or_where_it_was_built(tmp_path: Path) -> None:
    text = (make(tmp_path / "out").path / "manifest.json").read_text()
    assert str(tmp_path) not in text
    assert manifest().model_dump().keys() == Bundle.open(tmp_path / "out").manifest.model_dump().keys()
