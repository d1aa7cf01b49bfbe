"""Verify the artifacts of a bundle on this machine against its golden outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from edgewise.bundle.manifest import Artifact, Manifest
from edgewise.bundle.reader import Bundle, Golden
from edgewise.errors import InputError
from edgewise.targets import Session, Tolerance, choose, load, runnable
from edgewise.verify.ladder import Rung, judge

AGAINST = "golden outputs"
SAME_CHOICES = ", same choices"
"""Behind an artifact's label: the rung that judges it against the program that keeps the same tokens."""
OTHER_CHOICES = 10.0
OTHER_PROCESSOR = 2.0
"""Times the quantisation error at export: what a quantised artifact is held to. Processors round products of 8 bits differently."""


def verify_bundle(
    bundle: Bundle,
    targets: Sequence[str] | None = None,
    *,
    function: str | None = None,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Rung]:
    """Run every artifact whose runtime is installed on all golden samples, and judge it.

    Gives one rung of kind `lowering` for each artifact, under its label, at the threshold that the manifest's
    own rung of that name holds (see `threshold`). An artifact that cannot run here has `passed` None, and `note` says why; so
    has one without a threshold. `function`: only this one, of artifacts that hold several. `progress` is called with each label.
    Raises `MissingExtra` if no artifact
    can run here, and `InputError` if a target is unknown or the golden tensors do not fit.
    """
    artifacts = choose(bundle, targets, function)
    _, reasons = runnable(artifacts)
    rungs = []
    for artifact in artifacts:
        if progress is not None:
            progress(artifact.label)
        if artifact.label in reasons:
            note = f"skipped: {reasons[artifact.label]}"
            rungs.append(Rung(name=artifact.label, against=AGAINST, kind="lowering", note=note))
            continue
        golden = bundle.golden(artifact.role)
        with load(bundle, artifact, threads=threads) as session:
            rungs.append(check(artifact, session, golden, threshold(bundle.manifest, artifact)))
    return rungs


def check(artifact: Artifact, session: Session, golden: Golden, limit: float | None) -> Rung:
    """Run a session on all golden samples and judge it against the golden outputs."""
    return judge(
        artifact.label,
        AGAINST,
        "lowering",
        batched(golden.outputs),
        batched(run_all(session, golden)),
        threshold=limit,
        note="" if limit is not None else "the manifest has no threshold for this artifact",
    )


def threshold(manifest: Manifest, artifact: Artifact) -> float | None:
    """The threshold of the artifact's `lowering` rung in the manifest; None if there is none.

    An artifact that chose other tokens than torch between near ties was judged at its own choices, and the golden outputs are of
    torch's. On another processor it may choose differently again: it is held to `OTHER_CHOICES` times the error that it had.
    """
    quantised = next((r for r in manifest.verification if (r.name, r.kind) == (artifact.label, "quantisation")), None)
    if quantised is not None:
        return OTHER_PROCESSOR * max(errors.relative or 0.0 for errors in quantised.outputs.values()) + Tolerance().relative
    rungs = {rung.name: rung for rung in manifest.verification if rung.kind == "lowering"}
    own = rungs.get(artifact.label)
    if own is None or own.threshold is not None or artifact.label + SAME_CHOICES not in rungs:
        return None if own is None else own.threshold
    return OTHER_CHOICES * max(errors.relative or 0.0 for errors in own.outputs.values())


def run_all(session: Session, golden: Golden) -> dict[str, np.ndarray]:
    """Outputs of a session on all golden samples, stacked on a new leading axis."""
    if not golden.inputs:
        raise InputError("the golden tensors hold no inputs; export the model again")
    results = [session.run_anew(golden.feeds(sample)) for sample in range(golden.samples)]
    return {name: np.stack([result[name] for result in results]) for name in results[0]}


def batched(stacked: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Join the axis of samples with the batch axis, so that class scores are a matrix of rows again."""
    return {
        name: value.reshape(-1, *value.shape[2:]) if value.ndim >= 3 else value
        for name, value in stacked.items()
    }
