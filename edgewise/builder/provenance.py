"""Where a bundle comes from: an in-toto statement with SLSA provenance, without times.

The formats are those of https://in-toto.io/Statement/v1 and https://slsa.dev/provenance/v1.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgewise.builder.sbom import purl
from edgewise.bundle import Manifest
from edgewise.bundle.manifest import MANIFEST_NAME, dump
from edgewise.version import __version__

BUILD_TYPE = "urn:edgewise:build:1"


def provenance(
    name: str, manifest: Manifest, parts: Mapping[str, Any], packages: Mapping[str, str], checkout: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The statement of a bundle. `parts`: what its key is made of; `packages`: versions; `checkout`: see `source`."""
    digests = {MANIFEST_NAME: hashlib.sha256(dump(manifest)).hexdigest(), **{k: v.sha256 for k, v in manifest.files.items()}}
    files = {**parts["files"], **parts["data"]}
    given = [
        {"uri": manifest.model.source, "digest": {"sha256": parts["model"]}, "name": "model"},
        *({"uri": file, "digest": {"sha256": digest}, "name": "file"} for file, digest in files.items()),
        {"uri": f"pkg:pypi/edgewise@{__version__}", "digest": {"sha256": parts["code"]}, "name": "edgewise"},
        *({"uri": purl(package, version)} for package, version in sorted(packages.items())),
    ]
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": f"{name}/{file}", "digest": {"sha256": digests[file]}} for file in sorted(digests)],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"recipe": parts["recipe"], "flags": parts["flags"]},
                "internalParameters": {"machine": parts["machine"], "python": parts["tools"]["python"]},
                "resolvedDependencies": [*([dict(checkout)] if checkout is not None else []), *given],
            },
            "runDetails": {"builder": {"id": f"urn:edgewise:{__version__}"}},
        },
    }


def source(folder: Path) -> dict[str, Any] | None:
    """The commit that `folder` is checked out at, whether tracked files differ, and where it is from; None outside of git."""
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    remote = re.sub(r"//[^/@]*@", "//", _git(folder, "config", "--get", "remote.origin.url") or "")  # without a password
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    where = f"git+{remote}" if "://" in remote else f"git+ssh://{remote.replace(':', '/', 1)}" if remote else "git+file:."
    return {"uri": where, "digest": {"gitCommit": commit}, "name": "source", "annotations": {"changed": bool(changed)}}


def _git(folder: Path, *args: str) -> str | None:
    try:
        # Settings of a checkout may name programs to run; this one is not needed.
        command = ["git", "-c", "core.fsmonitor=false", *args]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
