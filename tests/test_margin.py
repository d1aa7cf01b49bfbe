"""How near a decision was to another one: what the ladder asks before it calls an artifact wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgewise.exporter.run import _margin

SCORE = torch.tensor([[4.0, 1.0, 3.0, 3.0 - 1e-6, 3.0, -torch.inf]])


def farthest(gap: float) -> torch.Tensor:
    """Three points on a line, of which the last is the farthest from the others by the gap."""
    place = torch.tensor([0.0, 10.0, 20.0 + gap])
    return (place[:, None] - place).abs()[None]


@pytest.mark.parametrize(
    ("op", "args", "expected"),
    [
        ("top_tokens", (SCORE, 1, 0), 1 / 4),
        ("top_tokens", (SCORE, 3, 0), 1e-6 / 4),
        ("top_tokens", (SCORE, 2, 0), float("inf")),  # an exact tie, which goes to the lowest index everywhere
        ("top_tokens", (SCORE, 2, 1), 1e-6 / 3),
        ("order_tokens", (SCORE, 1), 1 / 4),
        ("order_tokens", (SCORE, 5), 1e-6 / 4),
        ("take", (SCORE,), float("inf")),
    ],
)
def test_margin(op: str, args: Any, expected: float) -> None:
    assert _margin(op, args) == pytest.approx(expected, rel=0.2)


def test_margin_of_greedy_picks() -> None:
    assert 0 < _margin("farthest_points", (farthest(1e-4), 3)) < 1e-4
    assert _margin("farthest_points", (farthest(3.0), 2)) > 1e-2
    near = torch.diag(torch.tensor([1.0, 2.0, 2.0 + 1e-5, 0.5]))[None]
    assert 0 < _margin("determinantal", (near, 1)) < 1e-5
    assert _margin("determinantal", (torch.diag(torch.tensor([1.0, 2.0, 4.0]))[None], 2)) == pytest.approx(0.5)
