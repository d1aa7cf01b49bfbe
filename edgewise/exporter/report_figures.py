"""The figures of a bundle's report as one document: errors by kind, the ladder, layers, and tokens by site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgewise.bundle.manifest import Manifest
from edgewise.passes.program import Site
from edgewise.verify.ladder import Rung
from edgewise.verify.metrics import Errors, worst

INTENDED = ("compression", "precision", "quantisation")
"""Kinds of error that are meant: of fewer tokens, of weights in half precision, of layers in few bits. Others would be defects."""


def figures(manifest: Manifest, sites: Sequence[Sequence[Site]]) -> dict[str, Any]:
    """As JSON. `errors` holds the worst of each kind that was measured, apart from one another; `ladder` every rung; `tokens` those
    of every site of each component, compressed or not; `quantisation` what is known of the layers of each artifact."""
    kinds = dict.fromkeys(rung.kind for rung in manifest.verification)
    return {
        "model": manifest.model.model_dump(mode="json"),
        "compress": list(manifest.compress),
        "tokens": {
            component.role: [
                {"site": site.name, "in": site.tokens_in, "out": site.tokens_out, "methods": list(site.methods)} for site in own
            ]
            for component, own in zip(manifest.components, sites, strict=True)
        },
        "flops": {c.role: {"before": c.flops_before, "after": c.flops_after} for c in manifest.components},
        "errors": {kind: _worst([rung for rung in manifest.verification if rung.kind == kind]) for kind in kinds},
        "ladder": [
            {
                "rung": rung.name,
                "against": rung.against,
                "kind": rung.kind,
                **_errors(combined(rung)),
                "threshold": rung.threshold,
                "passed": rung.passed,
                "kept_overlap": rung.kept_overlap,
            }
            for rung in manifest.verification
        ],
        "quantisation": {
            artifact.label: artifact.quantisation.model_dump(mode="json")
            for artifact in manifest.targets
            if artifact.quantisation is not None
        },
    }


def combined(rung: Rung) -> Errors | None:
    """The worst errors over the outputs of a rung; None where none was compared."""
    return worst(rung.outputs.values()) if rung.outputs else None


def _worst(rungs: Sequence[Rung]) -> dict[str, Any]:
    known = [errors for errors in map(combined, rungs) if errors is not None]
    return _errors(worst(known) if known else None)


def _errors(errors: Errors | None) -> dict[str, Any]:
    return {key: None if errors is None else getattr(errors, key) for key in ("relative", "sqnr_db", "cosine", "top1")}
