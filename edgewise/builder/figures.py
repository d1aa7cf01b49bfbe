"""The figures of built artifacts: what their manifests say, and what gates need that is measured here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgewise.bench import compare
from edgewise.bench.ratios import nearest
from edgewise.bench.record import Interval
from edgewise.builder.scores import Scores
from edgewise.bundle import Artifact, Bundle, Manifest
from edgewise.bundle.manifest import Digest
from edgewise.errors import MissingExtra
from edgewise.exporter.matrix import Entry
from edgewise.exporter.recipe import Gates, Regressions
from edgewise.schema import Strict
from edgewise.targets import joined_labels
from edgewise.verify.bundle import SAME_CHOICES
from edgewise.verify.data import accuracy
from edgewise.verify.questions import answers_questions, exact_match

Tell = Callable[[str], None]


class Figures(Strict):
    """The figures of one artifact of the bundle `bundle`. What is unknown, or was not asked for, is null.

    - `size`: bytes of its files. `digest`: over them, see `edgewise bench`. `tokens`: behind the last site.
    - `lowering_error`: greatest relative error against its program.
    - `accuracy`: top-1 on the labelled data, or exact match of answers. `accuracy_drop`: that of the baseline's artifact less this
      one's.
    - `latency_ratio`: median time / that of the baseline's artifact, with its 95% confidence interval.
    - `notes`: why something could not be measured.
    """

    bundle: str
    artifact: str
    digest: Digest
    size: int
    tokens: int | None = None
    lowering_error: float | None = None
    accuracy: float | None = None
    accuracy_drop: float | None = None
    latency_ratio: float | None = None
    latency_interval: Interval | None = None
    notes: tuple[str, ...] = ()


def measure(
    entries: Sequence[Entry], out: Path, limits: Regressions | None = None, tell: Tell | None = None, *, cache: bool = True
) -> list[Figures]:
    """Figures of every artifact of the built bundles `out / name`; only what a gate or `limits` need is measured. `cache`: accuracy
    that was measured before, of the same bundle on the same data, is not measured again.

    Raises InputError if a bundle or the data cannot be read.
    """
    say = tell or (lambda text: None)
    bundles = {entry.name: Bundle.open(out / entry.name) for entry in entries}
    scores: dict[tuple[str, str, int | None, int | None], dict[str, float] | str] = {}

    def score(name: str, gates: Gates) -> dict[str, float] | str:
        """Accuracy by artifact, or why it cannot be measured here."""
        source = str(gates.data)
        how = (source, gates.data_samples, gates.threads)
        key = (name, *how)
        if key not in scores:
            known = Scores(bundles[name].manifest, *how) if cache else None
            earlier = known.read() if known is not None else None
            if earlier is not None:
                scores[key] = earlier
                return earlier
            say(f"{name}: accuracy on {source}")
            try:
                measured = _accuracy(bundles[name], *how)
            except MissingExtra as missing:
                scores[key] = str(missing)
            else:
                scores[key] = measured
                if known is not None:
                    known.write(measured)
        return scores[key]

    made = []
    for entry in entries:
        bundle, gates, base = bundles[entry.name], entry.gates, bundles.get(entry.gates.baseline or "")
        own = score(entry.name, gates) if gates.data is not None else {}
        before = score(str(gates.baseline), gates) if gates.data is not None and base is not None else {}
        timed = gates.latency_ratio is not None or (limits is not None and limits.latency_ratio is not None)
        times: Mapping[str, tuple[float, Interval]] | str = {}
        if timed and base is not None and entry.name != gates.baseline:
            say(f"{entry.name}: latency against {gates.baseline}")
            times = _times(base, bundle, gates)
        for artifact in bundle.manifest.targets:
            notes = [found for found in (own, before, times) if isinstance(found, str)]
            if gates.baseline is not None and base is None:
                notes.append(f"its baseline {gates.baseline} was not built")
            top1 = own.get(artifact.label) if isinstance(own, dict) else None
            drop = None
            if base is not None and isinstance(before, dict) and top1 is not None:
                other = nearest(artifact, base.manifest.targets)
                if other is not None and other.label in before:
                    drop = before[other.label] - top1
            timing = None if isinstance(times, str) else times.get(artifact.label)
            made.append(
                Figures(
                    **_known(entry.name, bundle.manifest, artifact),
                    accuracy=top1,
                    accuracy_drop=drop,
                    latency_ratio=timing[0] if timing else None,
                    latency_interval=timing[1] if timing else None,
                    notes=tuple(dict.fromkeys(notes)),
                )
            )
    return made


def _accuracy(bundle: Bundle, source: str, most: int | None, threads: int | None) -> dict[str, float]:
    """By artifact; the components of a model that answers questions have the exact match of its answers."""
    if not answers_questions(bundle):
        return {one["artifact"]: one["top1"] for one in accuracy(bundle, source, threads=threads, most=most)}
    matches = {one["artifact"]: one["exact_match"] for one in exact_match(bundle, source, threads=threads, most=most)}
    wholes = joined_labels(bundle.manifest.targets)
    labels = {artifact.label: wholes[artifact.target] for artifact in bundle.manifest.targets}
    return {label: matches[whole] for label, whole in labels.items() if whole in matches}


def _known(name: str, manifest: Manifest, artifact: Artifact) -> dict[str, Any]:
    """What the manifest says."""
    files = [manifest.files[file] for file in artifact.files]
    sites = manifest.component(artifact.role).sites
    rungs = {rung.name: rung for rung in manifest.verification if rung.kind == "lowering"}
    # An artifact that keeps other tokens than torch is judged against the program that keeps the same.
    rung = rungs.get(artifact.label + SAME_CHOICES) or rungs.get(artifact.label)
    errors = [error.relative for error in rung.outputs.values()] if rung is not None else []
    known = [error for error in errors if error is not None]
    return {
        "bundle": name,
        "artifact": artifact.label,
        "digest": hashlib.sha256("".join(file.sha256 for file in files).encode()).hexdigest(),
        "size": sum(file.bytes for file in files),
        "tokens": sites[-1].tokens_out if sites else None,
        "lowering_error": max(known) if known and len(known) == len(errors) else None,
    }


def _times(base: Bundle, bundle: Bundle, gates: Gates) -> dict[str, tuple[float, Interval]] | str:
    """Ratio and interval by artifact, measured in turns with the baseline; or why they cannot be measured here."""
    try:
        found = compare([base, bundle], samples=gates.samples, seconds=gates.seconds, threads=gates.threads, cold=False)
    except MissingExtra as missing:
        return str(missing)
    return {one.artifact: (one.ratio, one.interval) for one in found.ratios}
