"""Gates: figures against the limits of a recipe, and against those of an earlier record."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from edgewise.builder.figures import Figures
from edgewise.builder.task import Outcome
from edgewise.bundle.reader import read_bytes
from edgewise.document import parse, validate
from edgewise.exporter.matrix import Entry
from edgewise.exporter.recipe import Gates, Regressions
from edgewise.schema import Strict
from edgewise.version import __version__

MOST_BYTES = 64 << 20
_MEND = "Give what `edgewise build --record FILE` wrote."


class Verdict(Strict):
    """One gate of one artifact: its figure, the limit, and whether it passed. None: there is nothing to compare with, see `note`.

    `gate` is the name of the limit; of a regression, with `regression.` in front.
    """

    bundle: str
    artifact: str
    gate: str
    value: float | None
    limit: float
    passed: bool | None
    note: str = ""

    @property
    def wanted(self) -> str:
        """The limit in words: `size <= 2097152`."""
        return f"{self.gate} {'>=' if self.gate == 'accuracy' else '<='} {self.limit:.10g}"


class BuildRecord(Strict):
    """What a build made and measured: the baseline of later builds."""

    format: Literal["edgewise-build"] = "edgewise-build"
    schema_version: Literal[1] = 1
    edgewise_version: str = __version__
    outcomes: tuple[Outcome, ...] = ()
    figures: tuple[Figures, ...] = ()
    verdicts: tuple[Verdict, ...] = ()

    @property
    def code(self) -> int:
        """The exit code: of the worst failure, or 1 if a gate was missed."""
        missed = any(verdict.passed is False for verdict in self.verdicts)
        return max([1 if missed else 0, *(outcome.code for outcome in self.outcomes)])


def read_record(path: Path) -> BuildRecord:
    """Read the record of an earlier build. Raises InputError if it is none."""
    data = read_bytes(path, MOST_BYTES)
    parse(data, str(path), "build record", limit=MOST_BYTES, mend=_MEND)
    return validate(BuildRecord, data, str(path), "build record", _MEND)


def judge(entries: Iterable[Entry], figures: Sequence[Figures]) -> list[Verdict]:
    """Every figure against the gates of its entry. A figure that is unknown passes nothing; the baseline is held to no gate that
    compares with it, nor to one of tokens where it is not compressed."""
    gates = {entry.name: entry.gates for entry in entries}
    return [verdict for one in figures for verdict in _judged(one, gates[one.bundle])]


def _judged(one: Figures, gates: Gates) -> Iterable[Verdict]:
    for name in ("size", "tokens", "lowering_error", "accuracy", "accuracy_drop", "latency_ratio"):
        limit, value = getattr(gates, name), getattr(one, name)
        base = one.bundle == gates.baseline
        if limit is None or (base and (name in ("accuracy_drop", "latency_ratio") or (name == "tokens" and value is None))):
            continue
        passed = value is not None and (value >= limit if name == "accuracy" else value <= limit)
        why = "; ".join(one.notes) or ("it is not compressed" if name == "tokens" else "it is unknown")
        note = "" if value is not None else why
        yield Verdict(bundle=one.bundle, artifact=one.artifact, gate=name, value=value, limit=limit, passed=passed, note=note)


def regressions(figures: Sequence[Figures], earlier: BuildRecord, limits: Regressions) -> list[Verdict]:
    """Every figure against that of the same artifact in an earlier record."""
    then = {(one.bundle, one.artifact): one for one in earlier.figures}
    made = []
    for one in figures:
        before = then.get((one.bundle, one.artifact))
        for name in ("size", "tokens", "lowering_error", "latency_ratio", "accuracy_drop"):
            allowed = getattr(limits, name)
            if allowed is None:
                continue
            figure = "accuracy" if name == "accuracy_drop" else name
            now, old = getattr(one, figure), None if before is None else getattr(before, figure)
            value, note, passed = None, "", None
            if old is None:
                note = f"the earlier record has no {figure} of it"
            elif now is None:
                note, passed = "; ".join(one.notes) or "it is unknown now", False
            elif name == "accuracy_drop":
                value = old - now
            else:
                # Nothing that becomes something has no ratio.
                value = now / old if old else 1.0 if not now else None
                note = "" if value is not None else f"it was 0 and is {now:g}"
                passed = None if value is not None else False
            if value is not None:
                passed = value <= allowed
            made.append(
                Verdict(
                    bundle=one.bundle,
                    artifact=one.artifact,
                    gate=f"regression.{name}",
                    value=value,
                    limit=allowed,
                    passed=passed,
                    note=note,
                )
            )
    return made
