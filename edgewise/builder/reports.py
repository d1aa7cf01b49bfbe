"""A build's record for other programs: JUnit XML, and the Markdown of a GitHub step summary."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from edgewise.builder.gates import BuildRecord, Verdict


def junit(record: BuildRecord) -> str:
    """JUnit XML: a suite for each bundle, with a case for its build and one for each gate of each artifact. No times are in it."""
    root = ElementTree.Element("testsuites", name="edgewise build")
    for outcome in record.outcomes:
        suite = ElementTree.SubElement(root, "testsuite", name=_xml(outcome.name))
        case = ElementTree.SubElement(suite, "testcase", classname=_xml(outcome.name), name="build")
        failures, skipped = 0, 0
        if outcome.status == "failed":
            ElementTree.SubElement(case, "error", type=outcome.kind, message=_xml(outcome.message))
        for verdict in record.verdicts:
            if verdict.bundle != outcome.name:
                continue
            name = f"{outcome.name}.{verdict.artifact}"
            case = ElementTree.SubElement(suite, "testcase", classname=_xml(name), name=_xml(verdict.wanted))
            if verdict.passed is None:
                skipped += 1
                ElementTree.SubElement(case, "skipped", message=_xml(verdict.note))
            elif not verdict.passed:
                failures += 1
                ElementTree.SubElement(case, "failure", type="gate", message=_xml(f"{verdict.gate} is {_value(verdict)}"))
        errors = int(outcome.status == "failed")
        counts = {"tests": len(suite), "failures": failures, "errors": errors, "skipped": skipped}
        suite.attrib |= {key: str(count) for key, count in counts.items()}
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def summary(record: BuildRecord) -> str:
    """Markdown for `$GITHUB_STEP_SUMMARY`: what came of each bundle, figures, and gates, the missed ones first."""
    failed = sum(outcome.status == "failed" for outcome in record.outcomes)
    missed = sum(verdict.passed is False for verdict in record.verdicts)
    head = "all is well" if not failed and not missed else f"{failed} not built, {missed} gates missed"
    parts = [f"## edgewise build: {len(record.outcomes)} bundles, {head}\n"]
    parts.append(_table(("bundle", "result", ""), [(o.name, o.status, o.message) for o in record.outcomes]))
    if record.figures:
        columns = ("size", "tokens", "lowering_error", "accuracy", "latency_ratio")
        rows = [(f.bundle, f.artifact, *(number(getattr(f, name)) for name in columns)) for f in record.figures]
        parts.append(_table(("bundle", "artifact", *columns), rows))
    if record.verdicts:
        results = {True: "passed", False: "**missed**", None: "not compared"}
        ordered = sorted(record.verdicts, key=lambda verdict: verdict.passed is not False)
        found = [(v.bundle, v.artifact, v.wanted, _value(v), results[v.passed]) for v in ordered]
        parts.append(_table(("bundle", "artifact", "gate", "value", "result"), found))
    return "\n".join(parts)


def number(value: float | None) -> str:
    """A figure for people; a dash if it is unknown."""
    return "-" if value is None else f"{value:.10g}" if float(value).is_integer() else f"{value:.4g}"


def _value(verdict: Verdict) -> str:
    return f"unknown: {verdict.note}" if verdict.value is None else number(verdict.value)


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join("| " + " | ".join(_cell(cell) for cell in line) + " |\n" for line in lines)


def _cell(text: str) -> str:
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\|`*_\[\]])", r"\\\1", text) if text not in ("**missed**", "---") else text


def _xml(text: str) -> str:
    """Text without the characters that XML cannot hold."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)
