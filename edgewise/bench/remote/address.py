"""Addresses of devices: `ssh://user@host:port/folder` and `adb:serial`. Nothing that a shell would read as more than a name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgewise.errors import InputError

_SSH = re.compile(
    r"ssh://(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9._-]*)@)?"
    r"(?:(?P<host>[A-Za-z0-9][A-Za-z0-9._-]*)|\[(?P<ip>[0-9A-Fa-f:.]+(?:%[A-Za-z0-9]+)?)\])"
    r"(?::(?P<port>[0-9]{1,5}))?(?P<folder>/[A-Za-z0-9._/+@-]*)?"
)
_ADB = re.compile(r"adb(?::(?P<serial>[A-Za-z0-9][A-Za-z0-9.:_-]*))?")


@dataclass(frozen=True)
class SshAddress:
    """A device over SSH. `folder`: where edgewise keeps its things there; None: below the user's cache."""

    host: str
    user: str | None = None
    port: int | None = None
    folder: str | None = None


@dataclass(frozen=True)
class AdbAddress:
    """An Android device; `serial` None: the only one that is connected."""

    serial: str | None = None


def parse_address(text: str) -> SshAddress | AdbAddress:
    """Read an address. Raises `InputError` if it is none."""
    if found := _ADB.fullmatch(text):
        return AdbAddress(found["serial"])
    found = _SSH.fullmatch(text)
    port = int(found["port"]) if found and found["port"] else None
    if found is None or (port is not None and not 0 < port < 65536):
        raise InputError(
            f"{text!r} is no address of a device: write ssh://user@host, ssh://user@host:port/folder, or adb:serial"
        )
    folder = (found["folder"] or "").rstrip("/") or None
    if folder is not None and ".." in folder.split("/"):
        raise InputError(f"{text!r}: the folder on the device must be written without '..'")
    return SshAddress(found["host"] or found["ip"], found["user"], port, folder)
