"""What machines that stand in for devices have in common, whatever the way to them."""

from __future__ import annotations

import contextlib
import os
import site
from pathlib import Path


def without_openvino(packages: Path) -> dict[str, str]:
    """The environment of a device that has all packages but OpenVINO, as its system's, and no package index. `packages`: a folder
    that is made for them."""
    packages.mkdir()
    for entry in Path(site.getsitepackages()[0]).iterdir():
        if not entry.name.startswith(("openvino", "edgewise", "__editable")):
            (packages / entry.name).symlink_to(entry)
    return {"PYTHONPATH": str(packages), "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1"}


def workers(folder: Path) -> list[int]:
    """Processes that measure on the device with this folder."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0") if process.name.isdigit() else []
            if words[1:] and words[0].startswith(os.fsencode(folder)) and b"edgewise.bench.remote.worker" in words:
                found.append(int(process.name))
    return found
