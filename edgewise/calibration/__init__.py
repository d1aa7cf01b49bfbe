"""Calibration: data for statistics and for metrics, and what keeps the accuracy of quantised artifacts. Imports no torch."""

from edgewise.calibration.data import Port, Ports, Sample, Source, open_source
from edgewise.calibration.samples import Samples, survey

__all__ = ["Port", "Ports", "Sample", "Samples", "Source", "open_source", "survey"]
