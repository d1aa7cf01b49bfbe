"""The benchmark runner and its record. Runs on the device and needs no torch."""

from edgewise.bench.record import Comparison, Host, Latency, Measurement, Protocol, Ratio, Record, json_schema
from edgewise.bench.runner import bench, compare
from edgewise.bench.table import table

__all__ = [
    "Comparison",
    "Host",
    "Latency",
    "Measurement",
    "Protocol",
    "Ratio",
    "Record",
    "bench",
    "compare",
    "json_schema",
    "table",
]
