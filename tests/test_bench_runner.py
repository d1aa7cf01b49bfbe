from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_programs
import torch
from bundle_helpers import ROLE
from rich.console import Console
from tiny_bundles import make

from edgewise.bench import Comparison, Host, Latency, Record, bench, compare, host, json_schema, probe, runner, table
from edgewise.bench.statistics import summarise
from edgewise.bundle import Bundle
from edgewise.errors import InputError
from edgewise.targets import Session, load
from edgewise.verify import Rung

OPENVINO, ONNXRUNTIME = f"openvino/{ROLE}/fp32", f"onnxruntime/{ROLE}/fp32"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    torch.manual_seed(0)
    return make(tmp_path_factory.mktemp("bench") / "bundle", tiny_programs.block())


@pytest.fixture(scope="module")
def record(bundle: Bundle) -> Record:
    return bench(bundle, samples=12, seconds=0.05, warmup=1, threads=1)


def test_the_record_holds_what_was_measured(record: Record, bundle: Bundle) -> None:
    assert [one.artifact for one in record.measurements] == [OPENVINO, ONNXRUNTIME]
    assert (record.model, record.compress, record.skipped) == ("demo:tiny", ("tome:r=8",), {})
    assert record.protocol.interleaved
    assert (record.protocol.samples, record.protocol.seconds, record.protocol.threads) == (12, 0.05, 1)
    for one in record.measurements:
        assert one.latency is not None
        assert one.latency.n == len(one.latency.samples_ms) >= 12
        assert sum(one.latency.samples_ms) >= 50
        assert one.cold_load_ms and one.warm_load_ms and one.peak_memory_bytes
        assert one.accuracy is not None and one.accuracy.passed
        assert [(site.tokens_in, site.tokens_out) for site in one.sites] == [(17, 9)]
        assert one.runtime_versions.keys() == {one.target}
        assert one.stages is None and one.unknown["stages"] == "the artifact is a single graph"
        assert one.stand_in is None and one.artifact_bytes and one.flops == 60
    first, second = record.measurements
    assert first.speedup is None and second.speedup is not None and second.speedup > 0
    assert second.speedup_interval is not None
    assert second.speedup_interval.low <= second.speedup <= second.speedup_interval.high
    for one in record.measurements:
        assert one.placement is not None and set(one.placement) == {"CPU"} and one.placement["CPU"] > 10
    assert first.artifact_digest != second.artifact_digest
    # Interleaved: each artifact is run as often as the other.
    assert len({one.latency.n for one in record.measurements if one.latency}) == 1


def test_a_record_survives_json_and_holds_no_zero_for_unknown(record: Record) -> None:
    text = record.model_dump_json()
    assert Record.model_validate_json(text) == record
    for one in json.loads(text)["measurements"]:
        for key in ("placement", "cold_load_ms", "peak_memory_bytes", "power_watts", "temperature_celsius", "quality", "stages"):
            assert (one[key] is None) == (key in one["unknown"]), key


def test_cold_loads_and_memory_are_of_a_process_of_its_own(record: Record) -> None:
    """This process holds torch and both runtimes, and more memory than either runtime alone."""
    ours = host.peak_memory()
    for one in record.measurements:
        assert one.cold_load_ms is not None and one.warm_load_ms is not None and one.peak_memory_bytes and ours
        assert one.peak_memory_bytes < ours
        assert one.cold_load_ms > one.warm_load_ms


def test_what_was_left_out_has_a_reason(bundle: Bundle) -> None:
    one = bench(bundle, ["openvino"], samples=1, seconds=0, warmup=0, cold=False).measurements[0]
    assert one.cold_load_ms is None and one.peak_memory_bytes is None
    assert one.unknown["cold_load_ms"] == one.unknown["peak_memory_bytes"] == "not measured: it was left out"


def test_a_process_that_fails_is_a_reason_and_no_error(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.sys, "executable", "/no/such/python")
    one = bench(bundle, ["openvino"], samples=1, seconds=0, warmup=0).measurements[0]
    assert one.cold_load_ms is None and "No such file" in one.unknown["cold_load_ms"]


class Twice(Session):
    """Two stages, the second of which runs twice: each is the real session of an artifact."""

    def __init__(self, session: Session) -> None:
        self.session, self.inputs, self.outputs = session, session.inputs, session.outputs
        self.spent: dict[str, tuple[float, ...]] = {}

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            outputs = self.session.run(feeds)
            times.append(time.perf_counter() - start)
        self.spent = {"prefill": tuple(times[:1]), "decode": tuple(times[1:])}
        return outputs

    def stages(self) -> dict[str, tuple[float, ...]]:
        return self.spent

    def close(self) -> None:
        self.session.close()


def test_stages_of_a_pipeline(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "load", lambda *args, **named: Twice(load(*args, **named)))
    one = bench(bundle, ["openvino"], samples=4, seconds=0, warmup=1, cold=False).measurements[0]
    assert one.stages is not None and one.latency is not None
    assert {name: stage.n for name, stage in one.stages.items()} == {"prefill": 4, "decode": 8}
    assert sum(sum(stage.samples_ms) for stage in one.stages.values()) <= sum(one.latency.samples_ms)


def test_bundles_against_one_another(bundle: Bundle, tmp_path: Path) -> None:
    """A bundle against itself, and against one with an artifact that has no companion of its name."""
    torch.manual_seed(0)
    other = make(tmp_path / "other", tiny_programs.block(), kinds=[("openvino", "fp16")])
    found = compare([bundle, bundle, other], samples=30, seconds=0.1, warmup=1, threads=1, cold=False)
    assert [len(record.measurements) for record in found.records] == [2, 2, 1]
    pairs = [(one.bundle, one.artifact, one.baseline) for one in found.ratios]
    assert pairs == [
        *((1, OPENVINO, OPENVINO), (1, ONNXRUNTIME, ONNXRUNTIME)),
        (2, f"openvino/{ROLE}/fp16", OPENVINO),
    ]
    counts = {one.latency.n for record in found.records for one in record.measurements if one.latency}
    assert len(counts) == 1
    for one in found.ratios:
        assert one.interval.low <= one.ratio <= one.interval.high
        times = [
            next(m.latency.p50_ms for m in found.records[number].measurements if m.artifact == label and m.latency)
            for number, label in ((one.bundle, one.artifact), (one.baseline_bundle, one.baseline))
        ]
        assert one.ratio == pytest.approx(times[0] / times[1])
    assert Comparison.model_validate_json(found.model_dump_json()) == found
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(found))
    assert f"[2] openvino/{ROLE}/fp16" in console.export_text()


def test_one_bundle_is_no_comparison(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="two bundles"):
        compare([bundle])


def test_what_stands_in_for_a_runtime_is_said() -> None:
    judged, reasons = runner.judge_validity(steady(), GOOD, 0.0, stand_in="the interpreter")
    assert judged == "semivalid" and "the interpreter" in reasons[0]


def test_the_schema_is_json_and_closed() -> None:
    schema = json_schema()
    json.dumps(schema)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["additionalProperties"] is False
    assert schema["properties"]["schema_version"]["enum"] == [1, 2, 3]


def test_one_target_has_no_companion(bundle: Bundle) -> None:
    lines: list[str] = []
    record = bench(bundle, ["openvino"], samples=2, seconds=0, warmup=0, cold=False, progress=lines.append)
    assert not record.protocol.interleaved
    assert [one.latency.n for one in record.measurements if one.latency] == [2]
    assert lines == [f"load {OPENVINO}", "measure"]


def test_artifacts_take_turns(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    once = runner._Run.once

    def spy(run: runner._Run) -> None:
        order.append(run.artifact.target)
        once(run)

    monkeypatch.setattr(runner._Run, "once", spy)
    bench(bundle, samples=3, seconds=0, warmup=0, cold=False)
    assert order == ["openvino", "onnxruntime"] * 3


@pytest.mark.parametrize(("stand_in", "seconds"), [("something else", 1.0), (None, 125.0)])
def test_who_keeps_others_waiting_leaves(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, stand_in: str | None, seconds: float
) -> None:
    """A stand-in when it has enough, and what is slower by orders. The others go on, and ratios are of the rounds of both."""
    turns: list[str] = []
    once, prepared = runner._Run.once, runner._prepared

    def spy(run: runner._Run) -> None:
        turns.append(run.artifact.target)
        run.spent += seconds if run.artifact.target == "onnxruntime" else 0.25
        once(run)

    def prepare(*args: Any) -> runner._Run:
        run = prepared(*args)
        if run.artifact.target == "onnxruntime":
            run.session.stand_in = stand_in
        return run

    monkeypatch.setattr(runner._Run, "once", spy)
    monkeypatch.setattr(runner, "_prepared", prepare)
    record = bench(bundle, samples=2, seconds=2.0, warmup=0, cold=False)
    first, second = record.measurements
    assert turns == ["openvino", "onnxruntime"] * 2 + ["openvino"] * (len(turns) - 4) and 4 < len(turns) <= 10
    assert first.latency and second.latency and (first.latency.n, second.latency.n) == (len(turns) - 2, 2)
    # The median of two samples, of the nearest rank, is the lower one.
    shared = [min(one.latency.samples_ms[:2]) for one in record.measurements if one.latency]
    assert second.speedup_interval is not None and second.speedup == pytest.approx(shared[0] / shared[1])


@pytest.mark.parametrize(
    "bad", [{"samples": 0}, {"seconds": -1.0}, {"seconds": float("nan")}, {"warmup": -1}, {"threads": 0}]
)
def test_bad_arguments(bundle: Bundle, bad: dict[str, float]) -> None:
    with pytest.raises(InputError):
        bench(bundle, **bad)  # type: ignore[arg-type]


def test_statistics_by_hand() -> None:
    latency = summarise([0.004, 0.001, 0.003, 0.002])
    assert latency.n == 4
    assert latency.samples_ms == pytest.approx((4, 1, 3, 2))
    assert (latency.mean_ms, latency.min_ms, latency.max_ms) == pytest.approx((2.5, 1, 4))
    assert (latency.p50_ms, latency.p90_ms, latency.p99_ms) == pytest.approx((2, 4, 4))
    assert latency.cv == pytest.approx((5 / 3) ** 0.5 / 2.5)
    assert summarise([0.001]).cv is None


def steady(n: int = 100, milliseconds: float = 20.0, jitter: float = 0.0) -> Latency:
    return summarise([(milliseconds + jitter * (-1) ** number) / 1e3 for number in range(n)])


GOOD = Rung(name="a", against="b", kind="lowering", threshold=0.1, passed=True)


def rising(n: int = 100) -> Latency:
    """Steady but for a rise of 6 % in the last fifth, which the coefficient of variation does not show."""
    return summarise([0.02 * (1.06 if number >= n - n // 5 else 1.0) for number in range(n)])


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"busy_cores": 0.1}, None),
        ({"busy_cores": 0.7}, "other processes kept 0.7 cores busy"),
        ({"throttling": ["package 0"]}, "throttling: package 0"),
    ],
)
def test_validity_by_what_the_system_shows(more: dict[str, object], reason: str | None) -> None:
    # With the cores known, the load average says nothing: it may be of this process.
    judged, reasons = runner.judge_validity(steady(), GOOD, 5.0 if "busy_cores" in more else 0.0, **more)  # type: ignore[arg-type]
    assert (judged, len(reasons)) == (("valid", 0) if reason is None else ("semivalid", 1))
    assert reason is None or reason in reasons[0]


@pytest.mark.parametrize(
    ("latency", "accuracy", "load", "validity", "reason"),
    [
        (steady(), GOOD, 0.2, "valid", None),
        (steady(), GOOD, None, "valid", None),
        (steady(29, 100), GOOD, 0.2, "semivalid", "29 samples"),
        (steady(100, 1), GOOD, 0.2, "semivalid", "less than 1 s"),
        (rising(), GOOD, 0.2, "semivalid", "rose by 6.0%"),
        (steady(jitter=1), GOOD, 0.2, "semivalid", "variation is 5.0%, above 2.5%"),
        (steady(), GOOD, 3.0, "semivalid", "busy"),
        (steady(), None, 0.2, "semivalid", "not checked"),
        (steady(), GOOD.model_copy(update={"passed": None}), 0.2, "semivalid", "not checked"),
        (
            steady(),
            GOOD.model_copy(update={"passed": False}),
            0.2,
            "invalid",
            "differ from the golden outputs",
        ),
    ],
)
def test_validity(latency: Latency, accuracy: Rung, load: float, validity: str, reason: str | None) -> None:
    judged, reasons = runner.judge_validity(latency, accuracy, load)
    assert judged == validity
    assert len(reasons) == (0 if reason is None else 1)
    assert reason is None or reason in reasons[0]


def test_wrong_outputs_make_a_measurement_invalid(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wrong = make(tmp_path / "wrong", tiny_programs.block(), kinds=[("openvino", "fp32")], shift=1.0)
    one = bench(wrong, samples=2, seconds=0, warmup=0, cold=False).measurements[0]
    assert one.validity == "invalid"
    assert "differ" in one.reasons[0]


def test_the_table(record: Record) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(record.model_copy(update={"skipped": {"coreml/x/fp16": "not on a Mac"}})))
    text = console.export_text()
    for part in (OPENVINO, ONNXRUNTIME, "17 > 9", "MiB", "coreml/x/fp16: skipped, not on a Mac"):
        assert part in text


@pytest.mark.parametrize("width", [60, 100])
def test_a_narrow_table_loses_nothing(record: Record, width: int) -> None:
    label = "onnxruntime/vision_language_projector_and_encoder/fp16"
    one = record.measurements[0].model_copy(update={"artifact": label, "peak_memory_bytes": 123456 * 2**20})
    changed = {"measurements": (one,), "compress": ("topk@encoder.block[1]:keep=0.5",)}
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table(record.model_copy(update=changed)))
    lines = console.export_text().splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    columns = ["".join(column) for column in zip(*cells, strict=True)]
    assert columns[0] == label and "123456MiB" in [column.replace(" ", "") for column in columns]
    assert "…" not in "".join(lines)
    assert "block[1]" in "".join(line.strip() for line in lines)


def test_a_table_of_unknowns_has_dashes(record: Record) -> None:
    unknown = record.measurements[0].model_copy(
        update={
            "latency": None,
            "peak_memory_bytes": None,
            "accuracy": None,
            "sites": (),
            "cold_load_ms": None,
            "speedup": None,
        }
    )
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(record.model_copy(update={"measurements": (unknown,)})))
    row = next(line for line in console.export_text().splitlines() if OPENVINO in line)
    assert row.count(" - ") == 10


CPUINFO = """processor : 0
model name\t: Fast CPU @ 3 GHz
physical id\t: 0
core id\t\t: 0

processor : 1
model name\t: Fast CPU @ 3 GHz
physical id\t: 0
core id\t\t: 0

processor : 2
physical id\t: 0
core id\t\t: 1
"""


def test_the_host_from_proc() -> None:
    assert host.cpu_name(CPUINFO) == "Fast CPU @ 3 GHz"
    assert host.physical_cores(CPUINFO) == 2
    assert host.physical_cores("processor : 0\n") is None
    assert host.memory("MemTotal:  2048 kB\nMemFree: 1 kB\n") == 2048 * 1024
    assert host.memory("") is None


def test_the_host_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "text", lambda path: None)
    monkeypatch.setattr(host.platform, "processor", lambda: "")
    described = host.describe()
    assert (described.cpu, described.cores_physical, described.memory_bytes, described.governor) == (
        None,
    ) * 4
    assert described.kernel and described.python
    assert host.peak_memory() is None or host.peak_memory() > 0  # type: ignore[operator]


def test_this_host() -> None:
    described = host.describe()
    assert isinstance(described, Host)
    assert described.cores_logical and described.cores_logical > 0
