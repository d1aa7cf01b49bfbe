"""The verification ladder: one rung for each step from the model to the artifact that runs.

Errors of different kinds are kept apart. The **compression** error (compressed against uncompressed) and the **quantisation** error
(an artifact against itself before it was quantised) are intended, and have no threshold. Every other rung compares two forms of
the same program, so that an error above its threshold is a defect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from edgewise.errors import InputError
from edgewise.schema import Strict
from edgewise.verify.metrics import Errors, compare

Kind = Literal["capture", "compression", "legalisation", "precision", "lowering", "quantisation"]


class Rung(Strict):
    """One step of the ladder, judged.

    - `name`: what was checked (`openvino/vision_encoder/fp16`), `against`: what it was compared with.
    - `outputs`: the errors of each output, by name.
    - `threshold`: the greatest `relative` error that passes; None: there is nothing to pass.
    - `passed`: None if there is no threshold, or if the step was skipped; `note` then says why.
    - `kept_overlap`: mean Jaccard index of the kept tokens, for hard decisions.
    """

    name: str
    against: str
    kind: Kind
    outputs: dict[str, Errors] = {}
    threshold: float | None = None
    passed: bool | None = None
    kept_overlap: float | None = None
    note: str = ""


def judge(
    name: str,
    against: str,
    kind: Kind,
    reference: Mapping[str, np.ndarray],
    value: Mapping[str, np.ndarray],
    *,
    threshold: float | None = None,
    kept_overlap: float | None = None,
    note: str = "",
) -> Rung:
    """Compare two sets of named outputs and make the rung.

    A rung with a threshold passes if every output is finite and its relative error is at most the threshold.
    A compression rung has no threshold. Raises `InputError` if the names or shapes of the two sets differ, or
    there are none.
    """
    if kind in ("compression", "quantisation") and threshold is not None:
        raise InputError(f"rung '{name}' is of kind {kind}, which has no threshold")
    if not reference or set(reference) != set(value):
        raise InputError(
            f"rung '{name}' has outputs {sorted(value)} and its reference '{against}' has {sorted(reference)}"
        )
    outputs = {key: compare(reference[key], value[key]) for key in reference}
    return Rung(
        name=name,
        against=against,
        kind=kind,
        outputs=outputs,
        threshold=threshold,
        passed=None if threshold is None else all(within(errors, threshold) for errors in outputs.values()),
        kept_overlap=kept_overlap,
        note=note,
    )


def within(errors: Errors, threshold: float) -> bool:
    """Whether an output is finite and its relative error is known and at most `threshold`."""
    return errors.finite and errors.relative is not None and errors.relative <= threshold
