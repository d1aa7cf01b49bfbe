"""A device over adb, by the Android SDK's own program: its keys hold, and a device that does not know this computer is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from edgewise.bench.remote.address import AdbAddress, parse_address
from edgewise.bench.remote.device import Device, plain
from edgewise.errors import InputError, MissingExtra

_AT_ONCE = 200
"""Files in one call, as a command line has an end."""
_KEY = "it does not let this computer in: unlock it and accept the computer's key, and connect it anew if it does not ask"
_STATES = {
    "unauthorized": _KEY,
    "authorizing": _KEY,
    "offline": "it does not answer: connect it anew",
    "no permissions": "this user may not use it: see what `adb devices` says",
    "recovery": "it is in recovery: start its system",
    "sideload": "it waits for a system to be installed: start its system",
    "bootloader": "it is in the bootloader: start its system",
}


class Adb(Device):
    """Calls to one device that adb sees. `python`: the interpreter there, which adb's shell must be able to run.

    Raises `InputError` if adb sees no such device, or several and the address names none.
    """

    def __init__(self, address: AdbAddress, *, python: str = "python3") -> None:
        program = shutil.which("adb")
        if program is None:
            raise MissingExtra("there is no adb here: install the Android SDK's platform tools (Debian: apt install adb)")
        self._program = program
        self._serial = _chosen(self._devices(), address.serial or os.environ.get("ANDROID_SERIAL"))
        super().__init__(self._serial, python, address.folder)

    def copy(self, files: Mapping[str, Path], there: Mapping[str, int], folder: str, *, rsync: bool) -> None:
        with tempfile.TemporaryDirectory(prefix="edgewise-") as staging:
            for digest, path in files.items():
                Path(staging, digest).symlink_to(path.resolve())
            names = sorted(files)
            for start in range(0, len(names), _AT_ONCE):
                command = ["push", *(f"./{name}" for name in names[start : start + _AT_ONCE]), f"{folder}/"]
                done = subprocess.run(self._adb(*command), cwd=staging, stdin=subprocess.DEVNULL, capture_output=True)
                if done.returncode != 0:
                    said = (done.stderr.strip() or done.stdout.strip()).decode("utf-8", "replace")
                    raise InputError(
                        f"{self.name}: the files were not copied whole: {plain(said, lines=True) or 'the connection was lost'}\n"
                        f"is there room on the device? the same command goes on from where it stopped"
                    )

    def _adb(self, *words: str) -> list[str]:
        return [self._program, "-s", self._serial, *words]

    def _command(self, there: str) -> list[str]:
        # Without a terminal, so that bytes stay as they are.
        return self._adb("shell", "-T", there)

    def _lost(self, code: int, errors: str) -> str:
        said = plain(errors.strip(), lines=True)
        if not said or said.startswith(("adb: ", "error: ")):
            return self._cut(code, said, "adb")
        return f"{self.name}: the benchmark ended with {code}: {said}"

    def _devices(self) -> dict[str, str]:
        """The state of every device, by its serial number."""
        try:
            command = [self._program, "devices"]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise InputError(f"adb does not answer: {error}") from error
        if done.returncode != 0:
            raise InputError(f"adb does not answer: {plain(done.stderr.decode('utf-8', 'replace').strip(), lines=True)}")
        lines = [line.partition("\t") for line in done.stdout.decode("utf-8", "replace").splitlines()]
        return {serial: plain(state.strip()) for serial, tab, state in lines if tab}


def _chosen(devices: Mapping[str, str], wanted: str | None) -> str:
    """The serial number of the device to use. Raises `InputError` if it is not clear, or not ready."""
    if not devices:
        raise InputError("adb sees no device: connect one, and allow USB debugging in its settings")
    if wanted is None and len(devices) > 1:
        raise InputError(f"adb sees several devices: choose {_named(devices)}")
    serial = next(iter(devices)) if wanted is None else wanted
    if serial not in devices:
        raise InputError(f"adb sees no device {plain(serial)!r}: choose {_named(devices)}")
    # Whatever adb calls it, it is written into a command.
    address = parse_address(f"adb:{plain(serial)}")
    if not isinstance(address, AdbAddress) or address.serial != serial:
        raise InputError(f"adb calls a device {plain(serial)!r}, which edgewise does not write into commands")
    state = devices[serial]
    if state != "device":
        why = next((text for name, text in _STATES.items() if state.startswith(name)), "it is not ready")
        raise InputError(f"{serial} is {state or 'in no state'}: {why}")
    return serial


def _named(devices: Iterable[str]) -> str:
    return " or ".join(f"adb:{plain(serial)}" for serial in devices)
