"""Verification: error metrics and the ladder of rungs. Numpy only.

`edgewise.verify.bundle` runs the artifacts of a bundle; it is imported by itself, since a bundle's manifest
is made of rungs.
"""

from edgewise.verify.ladder import Rung, judge
from edgewise.verify.metrics import Errors, compare, overlap, worst

__all__ = ["Errors", "Rung", "compare", "judge", "overlap", "worst"]
