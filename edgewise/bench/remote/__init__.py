"""Benchmarks on another machine: copy bundles there, prepare it, run, and bring the record back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import edgewise
from edgewise.bench.record import Comparison, Record, parse
from edgewise.bench.remote.adb import Adb
from edgewise.bench.remote.address import AdbAddress, SshAddress, parse_address
from edgewise.bench.remote.device import Device
from edgewise.bench.remote.ssh import Ssh
from edgewise.bundle.manifest import MANIFEST_NAME, dump
from edgewise.bundle.reader import Bundle, digest
from edgewise.errors import InputError
from edgewise.targets import choose, get

DEPENDENCIES = ("numpy>=1.26,<2.4", "pydantic>=2.7,<3", "rich>=13.7,<16", "safetensors>=0.4.3,<1")
"""What edgewise needs there, besides a runtime: its own dependencies, without those of the command line."""

_PARTS = ("bench", "bundle", "targets", "verify")
"""The parts of edgewise that run on a device, besides its single modules. What makes artifacts stays here."""


def reach(address: SshAddress | AdbAddress, *, config: Path | None = None, python: str = "python3") -> Device:
    """The device at an address. `config`: for ssh instead of the user's own; `python`: the interpreter there.

    Raises `InputError` if the program that connects is not here, or, over adb, if it is not clear which device is meant.
    """
    if isinstance(address, SshAddress):
        return Ssh(address, config=config, python=python)
    if config is not None:
        raise InputError("a configuration of ssh says nothing of a device over adb: leave --ssh-config out")
    return Adb(address, python=python)


def bench_on(
    device: Device,
    bundle: Bundle,
    targets: Sequence[str] | None = None,
    *,
    progress: Callable[[str], None] | None = None,
    **how: Any,
) -> Record:
    """Measure `bundle` on another machine, as `edgewise.bench.bench` with the arguments `how` would there.

    Copies the files of the bundle and of edgewise that the machine has not, each checked by its digest there; makes a virtual
    environment or takes the one that it made before, and installs the runtimes of the bundle's targets that lack.

    Raises `InputError` if the machine cannot be reached, is not who it was, has no room, or cannot run any artifact. Nothing is
    written here; what has arrived there is used by the next try.
    """
    found = _measured_there(device, [bundle], targets, progress, how)
    if not isinstance(found, Record):
        raise InputError("the device sent a comparison, and one bundle was to be measured")
    return found


def compare_on(
    device: Device,
    bundles: Sequence[Bundle],
    targets: Sequence[str] | None = None,
    *,
    progress: Callable[[str], None] | None = None,
    **how: Any,
) -> Comparison:
    """Measure several bundles on another machine in turn, as `edgewise.bench.compare` with the arguments `how` would there.

    Arguments and errors are those of `bench_on`; the bundles are called by their places here.
    """
    if len(bundles) < 2:
        raise InputError("a comparison needs two bundles or more")
    found = _measured_there(device, bundles, targets, progress, how)
    if not isinstance(found, Comparison):
        raise InputError("the device sent one record, and bundles were to be compared")
    return found.model_copy(update={"bundles": tuple(str(bundle.path) for bundle in bundles)})


def _measured_there(
    device: Device,
    bundles: Sequence[Bundle],
    targets: Sequence[str] | None,
    progress: Callable[[str], None] | None,
    how: dict[str, Any],
) -> Record | Comparison:
    """The record of one bundle, or the comparison of several."""
    tell = progress or (lambda line: None)
    artifacts = [artifact for bundle in bundles for artifact in choose(bundle, targets)]
    trees = [package_files(), *(_files_of(bundle) for bundle in bundles)]
    digests = [{name: digest(path) for name, path in files.items()} for files in trees]
    sources = {found[name]: path for found, files in zip(digests, trees, strict=True) for name, path in files.items()}
    package, *names = [_tree_name(found) for found in digests]
    tell(f"connect to {device.name}")
    sizes = {name: path.stat().st_size for name, path in sources.items()}
    found = device.ask({"verb": "hello", "folder": device.folder, "files": sizes}, tell)
    folder, missing = _answer(found, sources)
    if missing:
        size = sum(sizes[name] - there for name, there in missing.items())
        tell(f"copy {len(missing)} of {len(sources)} files, {size / 2**20:.1f} MiB")
        wanted = {name: sources[name] for name in missing}
        device.copy(wanted, missing, f"{folder}/incoming", rsync=found.get("rsync") is True)
    order = {"bundles": names, "targets": list(targets) if targets else None, "how": how}
    result = device.ask(
        {
            "verb": "go",
            "folder": device.folder,
            "trees": dict(zip([package, *names], digests, strict=True)),
            "package": package,
            "base": list(DEPENDENCIES),
            "runtimes": {target: _requirements(target) for target in dict.fromkeys(one.target for one in artifacts)},
            "order": order,
        },
        tell,
    )
    return _checked(result, bundles, device.name)


def _files_of(bundle: Bundle) -> dict[str, Path]:
    return {MANIFEST_NAME: bundle.path / MANIFEST_NAME, **{name: bundle.file(name) for name in bundle.manifest.files}}


def package_files() -> dict[str, Path]:
    """The files of edgewise that a device needs, by their path below the folder that holds the package."""
    root = Path(edgewise.__file__).parent
    files = [
        *root.glob("*.py"),
        *(path for part in _PARTS for path in (root / part).rglob("*") if path.suffix in (".py", ".json")),
    ]
    return {f"edgewise/{path.relative_to(root).as_posix()}": path for path in sorted(files)}


def _tree_name(digests: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _requirements(target: str) -> list[str]:
    return [f"{one.package}>={one.minimum}" for one in get(target).requirements if one.runtime]


def _answer(found: Any, sources: dict[str, Path]) -> tuple[str, dict[str, int]]:
    """The folder and the missing files in a device's answer, which may be anything."""
    folder = found.get("folder") if isinstance(found, dict) else None
    missing = found.get("missing") if isinstance(found, dict) else None
    if not isinstance(folder, str) or not isinstance(missing, dict) or not set(missing) <= set(sources):
        raise InputError("the device's answer cannot be read: is another edgewise at work there?")
    if not all(isinstance(size, int) and size >= 0 for size in missing.values()):
        raise InputError("the device's answer cannot be read: is another edgewise at work there?")
    # The folder is written into commands of sftp and rsync: only what an address may hold.
    if parse_address(f"ssh://device{folder}") != SshAddress("device", folder=folder):
        raise InputError(
            f"the folder {folder!r} on the device has characters that edgewise does not send: name another one"
        )
    return folder, missing


def _checked(result: Any, bundles: Sequence[Bundle], name: str) -> Record | Comparison:
    """The record or the comparison in a device's answer, checked as one from anywhere."""
    found = parse(json.dumps(result).encode(), f"the record of {name}")
    records = found.records if isinstance(found, Comparison) else (found,)
    ours = [hashlib.sha256(dump(bundle.manifest)).hexdigest() for bundle in bundles]
    if [record.bundle_digest for record in records] != ours:
        raise InputError(f"{name} sent the record of another bundle")
    return found


__all__ = [
    "DEPENDENCIES",
    "AdbAddress",
    "Device",
    "SshAddress",
    "bench_on",
    "compare_on",
    "package_files",
    "parse_address",
    "reach",
]
