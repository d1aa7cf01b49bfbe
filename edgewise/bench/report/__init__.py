"""Benchmark records as one self-contained page, for people."""

from edgewise.bench.report.page import page

__all__ = ["page"]
