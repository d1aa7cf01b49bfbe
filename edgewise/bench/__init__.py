"""The benchmark runner and its record. Runs on the device and needs no torch."""

from edgewise.bench.record import Host, Latency, Measurement, Protocol, Record, json_schema
from edgewise.bench.runner import bench
from edgewise.bench.table import table

__all__ = ["Host", "Latency", "Measurement", "Protocol", "Record", "bench", "json_schema", "table"]
