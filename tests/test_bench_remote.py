"""Benchmarks over SSH, by a real server on this machine: copied, prepared, run, and what goes wrong on the way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_programs
import torch
from bundle_helpers import ROLE, snapshot
from conftest import Cli
from devices import without_openvino, workers
from sshd import Server, needs_sshd, serving
from tiny_bundles import make

from edgewise.bench import remote
from edgewise.bench.record import Comparison, Record, read
from edgewise.bench.remote import SshAddress, parse_address
from edgewise.bench.remote.ssh import Ssh
from edgewise.bundle import Bundle

pytestmark = needs_sshd
HOW = ("--samples", "3", "--seconds", "0", "--warmup", "1", "--threads", "1", "--no-cold")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return make(tmp_path_factory.mktemp("remote") / "bundle", tiny_programs.block()).path


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A machine that has all packages but OpenVINO, as its system's, and no package index."""
    folder = tmp_path_factory.mktemp("board")
    with serving(folder / "server", without_openvino(folder / "packages")) as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder on the device, which keeps its environment from test to test."""
    return tmp_path_factory.mktemp("device")


@pytest.fixture
def bench(board: Server, folder: Path, bundle: Path, cli: Cli) -> Cli:
    def run(*args: object, **changes: object) -> object:
        where = changes.get("server", board)
        assert isinstance(where, Server)
        on = changes.get("on", where.address(Path(str(changes.get("folder", folder)))))
        python = changes.get("python", sys.executable)
        given = changes.get("bundle", bundle)
        return cli("bench", given, "--on", on, "--ssh-config", where.config, "--remote-python", python, *HOW, *args)

    return run  # type: ignore[return-value]


def test_a_bundle_is_measured_there_and_the_record_comes_back(
    bench: Cli, bundle: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "record.json"
    said = bench("-o", out)
    assert said.code == 0, said.err
    record = read(out)
    assert isinstance(record, Record)
    assert [one.artifact for one in record.measurements] == [f"onnxruntime/{ROLE}/fp32"]
    # The runtime that the device has not and cannot get is no error while another runs.
    assert "cannot install openvino>=" in record.skipped[f"openvino/{ROLE}/fp32"]
    for line in (
        "copy",
        "make a virtual environment",
        "install onnxruntime",
        f"load onnxruntime/{ROLE}/fp32",
        "measure",
    ):
        assert line in said.err
    # No torch, no exporter and no command line went there.
    (package,) = [tree for tree in (folder / "trees").iterdir() if (tree / "edgewise").is_dir()]
    assert {path.name for path in (package / "edgewise").iterdir() if path.is_dir()} == set(remote._PARTS)

    # Once more: nothing is copied, made or installed, but the runtime that lacks is tried again.
    before = snapshot(folder / "store")
    again = bench("--target", "onnxruntime")
    assert again.code == 0, again.err
    assert not any(word in again.err for word in ("copy", "virtual environment", "install"))
    assert snapshot(folder / "store") == before


def test_bundles_are_measured_there_in_turn(bench: Cli, bundle: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = make(tmp_path / "other", tiny_programs.block()).path
    out = tmp_path / "comparison.json"
    said = bench("--compare", other, bundle, "-o", out)
    assert said.code == 0, said.err
    found = read(out)
    assert isinstance(found, Comparison)
    # Called by their places here, and each with its own digest: the first and the third are the same bundle.
    assert found.bundles == (str(bundle), str(other), str(bundle))
    first, second, third = found.records
    assert first.bundle_digest == third.bundle_digest != second.bundle_digest
    label = f"onnxruntime/{ROLE}/fp32"
    assert [(one.bundle, one.artifact, one.baseline) for one in found.ratios] == [(1, label, label), (2, label, label)]
    assert {one.measurements[0].latency.n for one in found.records if one.measurements[0].latency} == {3}
    for record in found.records:
        assert "cannot install openvino>=" in record.skipped[f"openvino/{ROLE}/fp32"]
    alone = bench("--compare")
    assert alone.code == 2 and "two bundles or more" in alone.err


def test_only_what_changed_is_copied(bench: Cli, bundle: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = make(tmp_path / "other", tiny_programs.block(), kinds=[("onnxruntime", "fp32")], shift=1e-9).path
    assert bench().code == 0
    said = bench(bundle=other)
    assert said.code == 0, said.err
    # The manifest and the golden outputs are others; the artifact, the recipe and edgewise are the same.
    assert "copy 2 of" in said.err


class Copy:
    """The files of a bundle by their digests, on their way to a folder of the device; without what comes behind it."""

    def __init__(self, server: Server, folder: Path, bundle: Path) -> None:
        address = parse_address(server.address(folder))
        assert isinstance(address, SshAddress)
        self.device = Ssh(address, config=server.config, python=sys.executable)
        self.folder = folder
        self.sources = {info.sha256: bundle / name for name, info in Bundle.open(bundle).manifest.files.items()}

    def missing(self) -> dict[str, int]:
        sizes = {name: path.stat().st_size for name, path in self.sources.items()}
        answer = self.device.ask({"verb": "hello", "folder": str(self.folder), "files": sizes}, print)
        return dict(answer["missing"])

    def copy(self, missing: dict[str, int], rsync: bool) -> None:
        wanted = {name: self.sources[name] for name in missing}
        self.device.copy(wanted, missing, f"{self.folder}/incoming", rsync=rsync)


@pytest.mark.parametrize("program", ["rsync", "sftp"])
def test_a_copy_that_was_cut_goes_on(board: Server, bundle: Path, tmp_path: Path, program: str) -> None:
    """Half of two files is there: of one as it is in the bundle, of the other something else."""
    if shutil.which(program) is None:
        pytest.skip(f"there is no {program} here")
    copy = Copy(board, tmp_path / "device", bundle)
    incoming, store = tmp_path / "device" / "incoming", tmp_path / "device" / "store"
    incoming.mkdir(parents=True)
    right, wrong = sorted(copy.sources, key=lambda name: -copy.sources[name].stat().st_size)[:2]
    for name in (right, wrong):
        data = copy.sources[name].read_bytes()
        (incoming / name).write_bytes(data[: len(data) // 2] if name == right else b"\0" * (len(data) // 2))
    missing = copy.missing()
    assert {name for name, there in missing.items() if there} == {right, wrong}
    copy.copy(missing, rsync=program == "rsync")
    # rsync begins anew; sftp goes on, and a half that was wrong is thrown away when its digest is seen.
    left = copy.missing()
    assert left == ({} if program == "rsync" else {wrong: 0})
    if left:
        copy.copy(left, rsync=False)
        assert copy.missing() == {}
    assert {path.name: path.read_bytes() for path in store.iterdir()} == {
        name: path.read_bytes() for name, path in copy.sources.items()
    }
    assert not list(incoming.iterdir())


def test_damaged_files_there_are_copied_again(bench: Cli, folder: Path) -> None:
    assert bench("--target", "onnxruntime").code == 0
    victim = max((folder / "store").iterdir(), key=lambda path: path.stat().st_size)
    victim.chmod(0o600)
    victim.write_bytes(b"\0" * victim.stat().st_size)
    said = bench("--target", "onnxruntime")
    assert said.code == 0 and "copy 1 of" in said.err


def test_a_cut_connection(bench: Cli, board: Server, tmp_path: Path, folder: Path) -> None:
    """The server's process for this connection is killed in the middle of the measurement."""
    out = tmp_path / "record.json"
    assert not workers(folder)
    cuts: list[str] = []

    def cut() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for pid in workers(folder):
                time.sleep(1)
                # Up to the server's process of this connection, whose parent is the server.
                while (parent := parent_of(pid)) not in (board.pid, 1):
                    pid = parent
                os.kill(pid, signal.SIGKILL)
                cuts.append(str(pid))
                return
            time.sleep(0.1)

    thread = threading.Thread(target=cut)
    thread.start()
    said = bench("--target", "onnxruntime", "--seconds", 120, "-o", out)
    thread.join()
    assert cuts
    said.refused("was lost")
    assert not out.exists() and list(tmp_path.iterdir()) == []
    # What ran on the device has ended too, and the lock is free.
    for _ in range(100):
        if not workers(folder):
            break
        time.sleep(0.1)
    assert not workers(folder)
    assert bench("--target", "onnxruntime").code == 0


def parent_of(pid: int) -> int:
    return int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])


def test_two_at_a_time_are_refused(bench: Cli, folder: Path) -> None:
    import fcntl

    assert bench("--target", "onnxruntime").code == 0
    with open(folder / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        bench().refused("another edgewise bench works on this device")


def test_a_full_disk(bench: Cli, tmp_path: Path, bundle: Path) -> None:
    """On a small file system where one may be mounted."""
    small = tmp_path / "small"
    small.mkdir()
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size // 2 // 4096 * 4096}", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        bench(folder=small / "device").refused("MiB left", "are to be copied")
        assert not list((small / "device" / "store").iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_file_that_may_not_grow(board: Server, bench: Cli, bundle: Path, tmp_path: Path) -> None:
    """A quota, which free space does not show: files of the session end at 16 KiB."""
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, 1 << 14))

    with serving(tmp_path / "server", {"PIP_NO_INDEX": "1"}, before=limit) as server:
        device = tmp_path / "device"
        bench(server=server, folder=device).refused("room on the device")
    # What arrived whole is used by the next try, with the quota gone.
    copy = Copy(board, device, bundle)
    missing = copy.missing()
    assert set(missing) <= set(copy.sources)
    copy.copy(missing, rsync=False)
    assert copy.missing() == {}


def test_a_device_without_packages(bench: Cli, tmp_path: Path) -> None:
    with serving(tmp_path / "server", {"PIP_NO_INDEX": "1"}) as server:
        bench(server=server, folder=tmp_path / "device").refused("cannot install numpy", "on the device")


def test_no_python_there(bench: Cli) -> None:
    bench(python="python9.9").refused("has no python9.9", "--remote-python")


def test_names_are_no_commands(bench: Cli, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    for name in (
        f"python; touch {trap}",
        f"$(touch {trap})",
        f"`touch {trap}`",
        f"'; touch {trap} '",
        f"x\ntouch {trap}",
    ):
        assert bench(python=name).code == 2
    assert not trap.exists()


def test_host_keys_are_checked(bench: Cli, board: Server, tmp_path: Path) -> None:
    config = tmp_path / "config"
    known = board.folder / "known"
    for content in ("", known.read_text().replace(known.read_text().split()[2][40:60], "A" * 20)):
        (tmp_path / "known").write_text(content)
        config.write_text(board.config.read_text().replace(str(known), str(tmp_path / "known")))
        strange = Server(board.port, board.folder, config, board.pid)
        bench(server=strange).refused("host key is not known")
        assert (tmp_path / "known").read_text() == content


def test_a_key_that_is_not_let_in(bench: Cli, board: Server, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True)
    config = tmp_path / "config"
    config.write_text(board.config.read_text().replace(f"{board.folder}/user", f"{tmp_path}/other"))
    bench(server=Server(board.port, board.folder, config, board.pid)).refused("does not let us in")


def test_nobody_there(bench: Cli) -> None:
    bench(on="ssh://127.0.0.1:9").refused("was lost", "refused")
