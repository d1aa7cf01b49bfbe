"""A matching and its merges as one, by the place of each token, against the compression ops themselves."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from edgewise.ops.match import bipartite_match, max_merges
from edgewise.ops.reduce import merge
from edgewise.passes.legalise import Legalise
from edgewise.passes.place_realisations import MOST_TOKENS, PLACES, match_places, merge_places


def metrics(batch: int, count: int) -> dict[str, Tensor]:
    drawn = torch.randn(batch, count, 6)
    equal = torch.zeros_like(drawn)
    equal[:, ::3] = 1
    return {"drawn": drawn, "tied": drawn.sign()[..., :2], "zeros and ones": equal, "zeros": torch.zeros_like(drawn)}


@pytest.mark.parametrize("protected", range(6))
def test_places_are_those_of_the_ops(protected: int) -> None:
    torch.manual_seed(protected)
    for count, batch in itertools.product((2, 3, 8, 13, 16), (1, 3)):
        x, size = torch.randn(batch, count, 5), torch.randint(1, 5, (batch, count, 1)).float()
        for r in range(1, max_merges(count, protected) + 1):
            for kind, metric in metrics(batch, count).items():
                wanted = bipartite_match(metric, r, protected)
                *found, place = match_places(metric, r, protected)
                assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True)), (count, r, kind)
                for sizes in (None, size):
                    tokens, total = merge_places(x, sizes, place, count - r)
                    expected, weight = merge(x, sizes, *wanted)
                    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-6)
                    assert torch.equal(total, weight)


class Merging(nn.Module):
    def __init__(self, r: int, also_kept: bool = False) -> None:
        super().__init__()
        self.r, self.also_kept = r, also_kept

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        kept, src, into = bipartite_match(x, self.r, 1)
        merged = merge(x, None, kept, src, into)
        return (*merged, kept) if self.also_kept else merged


@pytest.mark.parametrize(
    ("count", "r", "joined"), [(17, 4, True), (17, 8, True), (17, 0, False), (MOST_TOKENS, 9, True), (MOST_TOKENS + 1, 9, False)]
)
@pytest.mark.parametrize("also_kept", [False, True])
def test_legalisation_joins_a_matching_and_its_merge(count: int, r: int, joined: bool, also_kept: bool) -> None:
    """Where a merge takes a matching as it is, tokens are few and something merges: no row is gathered then."""
    x = torch.randn(2, count, 7)
    model = Merging(r, also_kept)
    exported = torch.export.export(model, (x,), strict=False)
    legal = Legalise({"bipartite_match": (PLACES,), "merge": (PLACES,)})(exported).program
    gathers = {torch.ops.aten.index_select.default, torch.ops.aten.gather.default}
    assert any(node.target in gathers for node in legal.graph.nodes) is not joined
    for found, expected in zip(legal.module()(x), model(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_merge_of_what_no_matching_gave_is_left_to_the_others() -> None:
    class Behind(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            kept, src, into = bipartite_match(x[:, 1:], 3, 0)
            return merge(x, None, torch.cat([torch.zeros_like(kept[:, :1]), kept + 1], 1), src + 1, into + 1)

    class Given(nn.Module):
        def forward(self, x: Tensor, kept: Tensor, src: Tensor, into: Tensor) -> tuple[Tensor, ...]:
            return merge(x, None, kept, src, into)

    x = torch.randn(2, 13, 6)
    for module, inputs in ((Behind(), (x,)), (Given(), (x, *bipartite_match(x, 3, 0)))):
        exported = torch.export.export(module, inputs, strict=False)
        legal = Legalise(dict.fromkeys(("bipartite_match", "merge"), (PLACES,)))(exported).program
        for made, wanted in zip(legal.module()(*inputs), module(*inputs), strict=True):
            torch.testing.assert_close(made, wanted)
