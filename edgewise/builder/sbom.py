"""The software bill of materials of a bundle: CycloneDX 1.6, without times, so that the same bundle has the same one.

The format is that of https://cyclonedx.org/docs/1.6/json/.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from edgewise.bundle import Manifest
from edgewise.bundle.manifest import MANIFEST_NAME, dump
from edgewise.version import __version__

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "urn:edgewise:bundle")


def sbom(name: str, manifest: Manifest, packages: Mapping[str, str]) -> dict[str, Any]:
    """The bill of a bundle: the model, every file with its digest, and the packages that took part (`packages`: versions)."""
    digest = hashlib.sha256(dump(manifest)).hexdigest()
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": manifest.model.source,
        "description": f"{manifest.model.class_name}, {manifest.model.parameters} parameters",
        "properties": [{"name": "edgewise:weights_digest", "value": manifest.model.weights_digest}],
    }
    digests = {MANIFEST_NAME: digest, **{file: info.sha256 for file, info in manifest.files.items()}}
    files = [
        {"type": "file", "bom-ref": f"file:{file}", "name": file, "hashes": [{"alg": "SHA-256", "content": digests[file]}]}
        for file in sorted(digests)
    ]
    libraries = [
        {"type": "library", "bom-ref": purl(package, version), "name": package, "version": version, "purl": purl(package, version)}
        for package, version in sorted(packages.items())
    ]
    components: list[dict[str, Any]] = [model, *files, *libraries]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, digest + repr(sorted(packages.items())))}",
        "version": 1,
        "metadata": {
            "tools": {"components": [{"type": "application", "name": "edgewise", "version": __version__}]},
            "component": {"type": "data", "bom-ref": "bundle", "name": name, "hashes": [{"alg": "SHA-256", "content": digest}]},
        },
        "components": components,
        "dependencies": [
            {"ref": "bundle", "dependsOn": [component["bom-ref"] for component in components]},
            *({"ref": component["bom-ref"]} for component in components),
        ],
    }


def purl(package: str, version: str) -> str:
    """The package URL of a Python package."""
    return f"pkg:pypi/{quote(package.lower().replace('_', '-'), safe='')}@{quote(version, safe='')}"
