"""Addresses of devices: `ssh://user@host:port/folder` and `adb:serial/folder`. Nothing that a shell reads as more than names."""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgewise.errors import InputError

_SSH = re.compile(
    r"ssh://(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9._-]*)@)?"
    r"(?:(?P<host>[A-Za-z0-9][A-Za-z0-9._-]*)|\[(?P<ip>[0-9A-Fa-f:.]+(?:%[A-Za-z0-9]+)?)\])"
    r"(?::(?P<port>[0-9]{1,5}))?(?P<folder>/[A-Za-z0-9._/+@-]*)?"
)
_ADB = re.compile(r"adb(?::(?P<serial>[A-Za-z0-9][A-Za-z0-9.:_-]*))?(?P<folder>/[A-Za-z0-9._/+@-]*)?")


@dataclass(frozen=True)
class SshAddress:
    """A device over SSH. `folder`: where edgewise keeps its things there; None: below the user's cache."""

    host: str
    user: str | None = None
    port: int | None = None
    folder: str | None = None


@dataclass(frozen=True)
class AdbAddress:
    """A device over adb; `serial` None: the only one that is connected. `folder`: as for SSH; None: `/data/local/tmp/edgewise`, if
    it can be."""

    serial: str | None = None
    folder: str | None = None


def parse_address(text: str) -> SshAddress | AdbAddress:
    """Read an address. Raises `InputError` if it is none."""
    adb, ssh = _ADB.fullmatch(text), _SSH.fullmatch(text)
    port = int(ssh["port"]) if ssh and ssh["port"] else None
    found = adb or ssh
    if found is None or (port is not None and not 0 < port < 65536):
        raise InputError(
            f"{text!r} is no address of a device: write ssh://user@host, ssh://user@host:port/folder, adb, or adb:serial/folder"
        )
    folder = (found["folder"] or "").rstrip("/") or None
    if folder is not None and ".." in folder.split("/"):
        raise InputError(f"{text!r}: the folder on the device must be written without '..'")
    if ssh is None:
        return AdbAddress(found["serial"], folder)
    return SshAddress(ssh["host"] or ssh["ip"], ssh["user"], port, folder)
