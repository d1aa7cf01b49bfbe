"""Benchmarks over adb, by its real program and server, with a daemon of the tests in the place of a device's."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_programs
import torch
from adbd import Adbd, adb_server, needs_adb
from bundle_helpers import ROLE
from conftest import Cli
from devices import without_openvino, workers
from tiny_bundles import make

from edgewise.bench.record import Comparison, Record, read
from edgewise.bench.remote import AdbAddress, reach
from edgewise.bench.remote.adb import _chosen
from edgewise.bundle import Bundle
from edgewise.errors import InputError, MissingExtra

HOW = ("--samples", "3", "--seconds", "0", "--warmup", "1", "--threads", "1", "--no-cold")
LABEL = f"onnxruntime/{ROLE}/fp32"
Connect = Callable[..., Adbd]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return make(tmp_path_factory.mktemp("adb") / "bundle", tiny_programs.block()).path


@pytest.fixture(scope="module")
def connect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connect]:
    with pytest.MonkeyPatch.context() as patch, adb_server(tmp_path_factory.mktemp("server"), patch) as connect:
        yield connect


@pytest.fixture(scope="module")
def phone(tmp_path_factory: pytest.TempPathFactory, connect: Connect) -> Adbd:
    return connect(without_openvino(tmp_path_factory.mktemp("phone") / "packages"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder on the device, which keeps its environment from test to test."""
    return tmp_path_factory.mktemp("device")


@pytest.fixture
def bench(phone: Adbd, folder: Path, bundle: Path, cli: Cli) -> Cli:
    def run(*args: object, on: object = None, python: str = sys.executable) -> object:
        on = on or f"adb:{phone.serial}{folder}"
        return cli("bench", bundle, "--on", on, "--remote-python", python, *HOW, *args)

    return run  # type: ignore[return-value]


@needs_adb
def test_a_bundle_is_measured_there_and_the_record_comes_back(bench: Cli, phone: Adbd, bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    said = bench("-o", out)
    assert said.code == 0, said.err
    record = read(out)
    assert isinstance(record, Record) and [one.artifact for one in record.measurements] == [LABEL]
    assert "cannot install openvino>=" in record.skipped[f"openvino/{ROLE}/fp32"]
    for line in (f"connect to {phone.serial}", "copy", "make a virtual environment", f"load {LABEL}", "measure"):
        assert line in said.err
    # Once more, against itself: nothing is copied, made or installed.
    again = bench("--target", "onnxruntime", "--compare", bundle, "-o", out)
    assert again.code == 0, again.err
    assert not any(word in again.err for word in ("copy", "virtual environment", "install"))
    found = read(out)
    assert isinstance(found, Comparison) and [one.bundle for one in found.ratios] == [1]
    # The device's shell has read nothing but Python and its line of constant text.
    assert len(set(phone.commands)) == 1 and str(bundle) not in phone.commands[0]


@needs_adb
def test_a_cable_that_is_pulled(bench: Cli, phone: Adbd, folder: Path, tmp_path: Path) -> None:
    """In the middle of the measurement; what ran on the device ends too, and the next benchmark goes on."""
    out = tmp_path / "record.json"
    assert bench("--target", "onnxruntime").code == 0
    pulled: list[int] = []

    def pull() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not pulled:
            pulled.extend(workers(folder))
            time.sleep(0.1)
        phone.cut()

    thread = threading.Thread(target=pull)
    thread.start()
    said = bench("--target", "onnxruntime", "--seconds", 120, "-o", out)
    thread.join()
    assert pulled
    said.refused("was lost", "nothing was written here")
    assert list(tmp_path.iterdir()) == []
    deadline = time.monotonic() + 60
    while workers(folder):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@needs_adb
def test_no_room_there(bundle: Path, tmp_path: Path, connect: Connect) -> None:
    """A quota, which free space does not show. What arrived whole is used by the next try."""
    full = connect()
    device = reach(AdbAddress(full.serial), python=sys.executable)
    sources = {info.sha256: bundle / name for name, info in Bundle.open(bundle).manifest.files.items()}
    sizes = {name: path.stat().st_size for name, path in sources.items()}

    def missing() -> dict[str, int]:
        return dict(device.ask({"verb": "hello", "folder": str(tmp_path / "device"), "files": sizes}, print)["missing"])

    def copy() -> None:
        there = missing()
        device.copy({name: sources[name] for name in there}, there, f"{tmp_path}/device/incoming", rsync=True)

    full.room = sum(sizes.values()) - sizes[max(sizes)]  # adb sends them in this order
    with pytest.raises(InputError, match=r"not copied whole(.|\n)*No space left on device(.|\n)*room on the device"):
        copy()
    assert set(missing()) == {max(sizes)}
    full.room = None
    copy()
    assert missing() == {}
    assert {path.name: path.read_bytes() for path in (tmp_path / "device" / "store").iterdir()} == {
        name: path.read_bytes() for name, path in sources.items()
    }


@needs_adb
def test_names_are_no_commands(bench: Cli, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    for name in (f"python; touch {trap}", f"$(touch {trap})", f"`touch {trap}`", f"'; touch {trap} '", f"x\ntouch {trap}"):
        assert bench(python=name).code == 2
    assert not trap.exists()


@needs_adb
def test_no_python_there(bench: Cli) -> None:
    bench(python="python9.9").refused("has no python9.9", "--remote-python")


@needs_adb
def test_devices_that_cannot_be_used(
    bundle: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None, one that is not there, one that does not let this computer in, and two of which none is named."""
    with adb_server(tmp_path / "server", monkeypatch) as connect:
        cli("bench", bundle, "--on", "adb").refused("adb sees no device", "USB debugging")
        first = connect()
        cli("bench", bundle, "--on", "adb:emulator-5554").refused(
            "no device 'emulator-5554'", f"choose adb:{first.serial}"
        )
        cli("bench", bundle, "--on", "adb", "--ssh-config", tmp_path / "x").refused("leave --ssh-config out")
        strange = connect(authorized=False)
        cli("bench", bundle, "--on", f"adb:{strange.serial}").refused("authoriz", "accept the computer's key")
        cli("bench", bundle, "--on", "adb").refused("several devices", f"adb:{first.serial}", f"adb:{strange.serial}")
        monkeypatch.setenv("ANDROID_SERIAL", strange.serial)
        cli("bench", bundle, "--on", "adb").refused("authoriz")


def test_no_adb_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingExtra, match="there is no adb here"):
        reach(AdbAddress())


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ("offline", "does not answer"),
        ("no permissions (user in plugdev group; are your udev rules wrong?)", "may not use it"),
        ("recovery", "start its system"),
        ("something new", "not ready"),
        ("", "in no state"),
    ],
)
def test_states(state: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        _chosen({"0123456789ABCDEF": state}, None)


@pytest.mark.parametrize("serial", ["-x", "a b", "a;b", "$(x)", "a\x1b[2J", "(no serial number)"])
def test_serial_numbers_that_are_no_names(serial: str) -> None:
    with pytest.raises(InputError):
        _chosen({serial: "device"}, None)
