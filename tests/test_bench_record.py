"""Records as documents: the published schemas, records of before, and records that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edgewise.bench import record as records
from edgewise.bench import runner
from edgewise.bench.record import Comparison, Record
from edgewise.bundle import Bundle
from edgewise.errors import InputError

SCHEMAS = Path(records.__file__).with_name("schemas")


@pytest.fixture(scope="module")
def measured(digits: Path) -> Comparison:
    bundle = Bundle.open(digits)
    return runner.compare([bundle, bundle], samples=6, seconds=0, warmup=0, threads=1, cold=False)


def schema(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((SCHEMAS / name).read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(found)
    return found


@pytest.mark.parametrize("name", sorted(records.SCHEMAS))
def test_the_published_schemas_are_in_step(name: str) -> None:
    """Mend with: python -c "from edgewise.bench.record import write_schemas; write_schemas()"."""
    assert schema(name) == records.json_schema(records.SCHEMAS[name])


def test_records_validate_against_the_schemas(measured: Comparison) -> None:
    jsonschema.validate(measured.model_dump(mode="json"), schema("comparison.json"))
    for record in measured.records:
        jsonschema.validate(record.model_dump(mode="json"), schema("record.json"))


def test_the_schema_refuses_what_is_no_record(measured: Comparison) -> None:
    for key, value in (("surprise", 1), ("host", None), ("schema_version", 4), ("measurements", {})):
        document = {**measured.records[0].model_dump(mode="json"), key: value}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(document, schema("record.json"))


def test_what_is_written_is_read(measured: Comparison, tmp_path: Path) -> None:
    for found in (measured, measured.records[0]):
        (tmp_path / "r.json").write_text(found.model_dump_json(indent=1), "utf-8")
        assert records.read(tmp_path / "r.json") == found


def test_a_record_of_version_1_is_read(measured: Comparison, tmp_path: Path) -> None:
    """With the keys that version 1 had, and no others."""
    document = measured.records[0].model_dump(mode="json")
    for key in ("measured_at", "verification"):
        del document[key]
    for key in ("power_sensor", "temperature_sensor"):
        del document["host"][key]
    for key in ("busy_cores", "throttling"):
        del document["protocol"][key]
    for one in document["measurements"]:
        for key in ("artifact_bytes", "flops", "stand_in", "units", "speedup_interval", "quality", "unknown"):
            del one[key]
    document["schema_version"] = 1
    (tmp_path / "r.json").write_text(json.dumps(document), "utf-8")
    read = records.read(tmp_path / "r.json")
    assert isinstance(read, Record) and read.schema_version == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "Upgrade edgewise"),
        ({"schema_version": "2"}, "schema_version"),
        ({"schema_version": True}, "schema_version"),
        ({"format": "edgewise-bundle"}, "no benchmark record"),
        ({"format": None}, "no benchmark record"),
        ({"format": ["edgewise-benchmark"]}, "no benchmark record"),
        ({"model": 7}, "model"),
        ({"surprise": 1}, "surprise"),
        ({"measurements": [{}]}, "measurements.0"),
    ],
)
def test_records_that_do_not_fit(measured: Comparison, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    document = {**measured.records[0].model_dump(mode="json"), **change}
    (tmp_path / "r.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(InputError, match=message):
        records.read(tmp_path / "r.json")


def test_counts_that_are_not_true(measured: Comparison, tmp_path: Path) -> None:
    for n in (0, 10**18, 10**400):
        document = measured.records[0].model_dump(mode="json")
        document["measurements"][0]["latency"]["n"] = n
        (tmp_path / "r.json").write_text(json.dumps(document), "utf-8")
        with pytest.raises(InputError, match=r"latency"):
            records.read(tmp_path / "r.json")


def test_ratios_of_bundles_that_are_not_there(measured: Comparison, tmp_path: Path) -> None:
    document = measured.model_dump(mode="json")
    document["ratios"][0]["bundle"] = 2
    (tmp_path / "r.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(InputError, match="ratios"):
        records.read(tmp_path / "r.json")
