"""The record that the Swift benchmark writes: its template and its keys are those of our schema. Swift itself is not run here."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from edgewise.bench.record import Record, parse
from edgewise.bundle.manifest import Artifact, FileInfo, Manifest, ModelInfo
from edgewise.errors import InputError

SOURCES = Path(__file__).parents[1] / "examples" / "apple-bench" / "Sources" / "edgewise-bench"
TEMPLATE = json.loads((SOURCES / "Resources" / "record.json").read_text("utf-8"))
TEXT = {path.name: path.read_text("utf-8") for path in SOURCES.glob("*.swift")}


def filled() -> dict[str, Any]:
    """The template with a value for each key that the tool fills, as it does after a run."""
    made = copy.deepcopy(TEMPLATE)
    times = [1.5, 2.0, 1.0]
    (one,) = made["measurements"]
    one |= {"artifact": "coreml/vision_encoder/fp16", "artifact_digest": "a" * 64, "artifact_bytes": 7, "target": "coreml"}
    one |= {"role": "vision_encoder", "precision": "fp16", "runtime_versions": {"system": "Version 27"}, "warm_load_ms": 3.5}
    one |= {"placement": {"CPU": 1, "Neural Engine": 12}, "reasons": ["inputs are zeros"], "unknown": {}}
    one["latency"] |= {"n": 3, "mean_ms": 1.5, "min_ms": 1.0, "max_ms": 2.0, "cv": 0.33, "samples_ms": times}
    one["latency"] |= {"p50_ms": 1.5, "p90_ms": 2.0, "p95_ms": 2.0, "p99_ms": 2.0}
    made["host"] |= {"os": "Version 27", "cores_logical": 10, "memory_bytes": 2**34, "power_mode": "usual"}
    made["protocol"] |= {"warmup": 10, "samples": 3, "seconds": 0.0}
    made |= {"edgewise_version": "0.1", "bundle_digest": "b" * 64, "model": "m", "measured_at": "2026-11-28T00:00:00Z"}
    return made


def test_a_filled_template_is_a_record() -> None:
    record = parse(json.dumps(filled()).encode(), "record.json")
    assert isinstance(record, Record)
    assert record.measurements[0].placement == {"CPU": 1, "Neural Engine": 12}
    wrong = filled()
    wrong["measurements"][0]["latencies"] = 1
    with pytest.raises(InputError):
        parse(json.dumps(wrong).encode(), "record.json")


def _keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {key for one in value.values() for key in _keys(one)}
    return {key for one in value for key in _keys(one)} if isinstance(value, list) else set()


def test_the_tool_fills_keys_of_the_template_alone() -> None:
    free = {"system", "placement", "all", "cpu", "cpu-gpu", "cpu-ane"}  # of maps with keys of any name, and of its options
    written = set(re.findall(r'"([a-z0-9][a-z0-9_-]*)":', TEXT["main.swift"] + TEXT["Samples.swift"]))
    written |= set(re.findall(r'values\["(\w+)"\]', TEXT["main.swift"]))
    assert len(written) > 25
    assert written - free <= _keys(TEMPLATE)


def test_it_reads_what_manifests_hold() -> None:
    text = TEXT["Manifest.swift"]
    own = {re.search(r'edgewiseVersion = "(\w+)"', text)[1], "model", "compress", "targets", "files"}  # type: ignore[index]
    assert own <= set(Manifest.model_fields) and "case model, compress, targets, files" in text
    for swift, model in (("Model", ModelInfo), ("Digested", FileInfo), ("Artifact", Artifact)):
        body = re.search(rf"struct {swift}: Decodable \{{(.*?)\}}", text, re.S)
        assert body is not None
        names = re.findall(r"let (\w+):", body[1])
        assert names and set(names) <= set(model.model_fields), swift
