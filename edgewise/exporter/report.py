"""The bundle's report: what was compressed, what it cost, what it gained, as one self-contained page."""
from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from edgewise.bundle.manifest import Manifest
from edgewise.passes.program import Site


def write_report(manifest: Manifest, sites: Sequence[Site], path: Path, notes: Sequence[str] = ()) -> None:
    """Write `report.html`."""
    path.write_text("<!doctype html><title>" + escape(manifest.model.source) + "</title>", "utf-8")
