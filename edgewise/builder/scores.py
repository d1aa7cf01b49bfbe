"""Accuracies that were measured already, by all that they hang on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import uuid

from edgewise import targets
from edgewise.bundle import Manifest
from edgewise.bundle.manifest import dump
from edgewise.exporter.cache import default_root
from edgewise.exporter.identity import code_digest, data_digest


class Scores:
    """The accuracy of the artifacts of a bundle on `most` samples of `data`: by the bundle's bytes, the data's, the versions of the
    runtimes, their threads, and edgewise's own code."""

    def __init__(self, manifest: Manifest, data: str, most: int | None, threads: int | None) -> None:
        named = sorted({artifact.target for artifact in manifest.targets})
        parts = {
            "bundle": hashlib.sha256(dump(manifest)).hexdigest(),
            "data": [data, data_digest(data)],
            "runtimes": {name: targets.get(name).versions(runtime_only=True) for name in named},
            "samples": most,
            "threads": threads,
            "code": code_digest(),
            "machine": platform.machine(),
        }
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        self._path = default_root() / "scores" / f"{key}.json"

    def read(self) -> dict[str, float] | None:
        """Accuracy by artifact; None if it was not measured, or what was kept is damaged."""
        try:
            document = json.loads(self._path.read_text("utf-8"))
            return {str(name): float(value) for name, value in document.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return None

    def write(self, scores: dict[str, float]) -> None:
        """Keep it. Having no room or no permission for it is no reason to fail."""
        part = self._path.with_suffix(f".{uuid.uuid4().hex}.part")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(scores), "utf-8")
            os.replace(part, self._path)
        except OSError:
            return
