"""Every method's graph on one target: the tests of the methods, with that target in the place of those that they run on.

    python benchmarks/target_methods.py coreml [PYTEST OPTIONS ...]

The tests compare the artifact of each method with its eager call. After them comes the largest error of each, relative to the
largest value.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import method_graphs
import numpy as np
import pytest

TESTS = Path(__file__).parents[1] / "tests"


_IN_THIS_PROCESS = ("-n", "0") if importlib.util.find_spec("xdist") else ()


def main(target: str, options: list[str]) -> int:
    method_graphs.EVERY = (target,)
    errors: dict[str, float] = {}
    compare = np.testing.assert_allclose

    def measured(got: Any, expected: Any, **limits: float) -> None:
        name = str(method_graphs.current)
        scale = np.abs(expected).max() or 1.0
        errors[name] = max(errors.get(name, 0.0), float(np.abs(got - expected).max() / scale))
        compare(got, expected, **limits)

    graph = method_graphs.check_graph

    def named(method: str, *args: Any, **kwargs: Any) -> None:
        method_graphs.current = method  # type: ignore[attr-defined]
        np.testing.assert_allclose = measured
        try:
            graph(method, *args, **kwargs)
        finally:
            np.testing.assert_allclose = compare

    method_graphs.check_graph = named
    files = sorted(str(path) for path in TESTS.glob("test_methods_*.py"))
    status = pytest.main(
        [*files, "-k", f"({target}) and (graph or lower or model)", "-q", "--tb=line", *_IN_THIS_PROCESS, *options]
    )
    print("| method | largest relative error |\n|---|---|")
    for name, error in sorted(errors.items()):
        print(f"| {name} | {error:.1e} |")
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
