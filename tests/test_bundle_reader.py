from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from bundle_helpers import ROLE, edit, list_file, make
from safetensors.numpy import save

from edgewise.bundle import Bundle
from edgewise.errors import InputError

GOLDEN = f"golden/{ROLE}.safetensors"
WEIGHTS = f"openvino/{ROLE}.bin"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_a_whole_bundle_opens(path: Path) -> None:
    names: list[str] = []
    bundle = Bundle.open(path, progress=names.append)
    assert sorted(names) == [GOLDEN, WEIGHTS, "recipe.yaml"]
    assert bundle.file(WEIGHTS).read_bytes() == b"weights"
    with pytest.raises(InputError, match=r"did you mean 'recipe.yaml'"):
        bundle.file("recipe.yml")


def test_golden_tensors_by_sample(path: Path) -> None:
    golden = Bundle.open(path).golden(ROLE)
    assert golden.samples == 3
    assert golden.feeds(1)["x"].tolist() == [[2.0, 3.0]]
    assert golden.outputs["y"][1].tolist() == [[4.0, 6.0]]
    assert golden.references["y"].shape == (3, 1, 2)
    with pytest.raises(InputError, match="unknown golden role"):
        Bundle.open(path).golden("decode")


def test_a_bundle_may_be_moved(path: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "b"
    shutil.copytree(path, moved)
    shutil.rmtree(path)
    assert Bundle.open(moved).golden(ROLE).samples == 3


def test_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("none", "does not exist"),
        ("file", "not a folder"),
        ("empty", "no manifest.json"),
    ):
        with pytest.raises(InputError, match=message):
            Bundle.open(tmp_path / name)


@pytest.mark.parametrize("name", [GOLDEN, WEIGHTS, "recipe.yaml"])
def test_a_missing_file(path: Path, name: str) -> None:
    (path / name).unlink()
    with pytest.raises(InputError, match=f"{name}.* is missing"):
        Bundle.open(path)


@pytest.mark.parametrize("name", [GOLDEN, WEIGHTS, "recipe.yaml"])
def test_a_truncated_file(path: Path, name: str) -> None:
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[:-1])
    with pytest.raises(InputError, match=f"{name} is truncated"):
        Bundle.open(path)


@pytest.mark.parametrize("name", [GOLDEN, WEIGHTS, "recipe.yaml"])
def test_one_flipped_bit(path: Path, name: str) -> None:
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(InputError, match=f"{name} was altered"):
        Bundle.open(path)


def test_a_longer_file(path: Path) -> None:
    with open(path / WEIGHTS, "ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match="is altered"):
        Bundle.open(path)


@pytest.mark.parametrize("name", ["extra.txt", "golden/extra", "deep/er/x"])
def test_an_unlisted_file(path: Path, name: str) -> None:
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_text("x")
    with pytest.raises(InputError, match="is not listed"):
        Bundle.open(path)


def test_a_link_instead_of_a_file(path: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"weights")
    (path / WEIGHTS).unlink()
    (path / WEIGHTS).symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="is a link"):
        Bundle.open(path)


def test_a_link_instead_of_a_folder(path: Path, tmp_path: Path) -> None:
    shutil.move(path / "golden", tmp_path / "outside")
    (path / "golden").symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="is a link"):
        Bundle.open(path)


def test_a_link_instead_of_the_manifest(path: Path, tmp_path: Path) -> None:
    shutil.move(path / "manifest.json", tmp_path / "outside")
    (path / "manifest.json").symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="is a link"):
        Bundle.open(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_and_sockets_do_not_block(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path / WEIGHTS).unlink()
    os.mkfifo(path / WEIGHTS)
    with pytest.raises(InputError, match="not a plain file"):
        Bundle.open(path)
    (path / WEIGHTS).unlink()
    monkeypatch.chdir(path / "openvino")  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{ROLE}.bin")
        with pytest.raises(InputError, match="not a plain file"):
            Bundle.open(path)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "a/../../outside", "..\\outside", "C:/outside"]
)
def test_names_that_leave_the_bundle(path: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").write_text("x")
    entry = {"sha256": "0" * 64, "bytes": 1}
    edit(path, lambda document: document["files"].update({name: entry}))
    with pytest.raises(InputError, match="not allowed in a bundle"):
        Bundle.open(path)


def test_a_path_without_a_digest(path: Path) -> None:
    edit(path, lambda document: document["targets"][0].update(files=["openvino/other.bin"]))
    with pytest.raises(InputError, match="gives no digest"):
        Bundle.open(path)


def test_a_manifest_of_another_bundle(path: Path, tmp_path: Path) -> None:
    make(tmp_path / "other", fill=b"another")
    shutil.copy(tmp_path / "other" / "manifest.json", path)
    with pytest.raises(InputError, match="was altered"):
        Bundle.open(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04K\x01.",  # a pickle
        b"\xff" * 64,
        (2**63).to_bytes(8, "little") + b"{}",
        save({"surprise": np.ones(3)}),
        save({"output.y": np.ones(3)[:0]}),
        save({"input.x": np.ones((2, 1)), "output.y": np.ones((3, 1))}),
        save({"input.x": np.ones((2, 1))}),
        save({"output.y": np.array(1.0)}),
        save({"output.": np.ones(3)}),
    ],
)
def test_golden_files_that_are_none(path: Path, data: bytes) -> None:
    (path / GOLDEN).write_bytes(data)
    list_file(path, GOLDEN)
    bundle = Bundle.open(path)
    with pytest.raises(InputError, match=f"{ROLE}.safetensors"):
        bundle.golden(ROLE)


def test_golden_files_are_checked_again_when_used(path: Path) -> None:
    bundle = Bundle.open(path)
    (path / GOLDEN).write_bytes((path / GOLDEN).read_bytes() + b" ")
    with pytest.raises(InputError, match="was altered"):
        bundle.golden(ROLE)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(path: Path) -> None:
    (path / WEIGHTS).chmod(0)
    with pytest.raises(InputError, match="cannot read"):
        Bundle.open(path)
