"""Of which of an encoder's tokens those behind a projector are made, and VisionZip that asks these.

The reference of groups is the derivative: a token is made of those that it changes with. That of VisionZip is `vlm_zipped.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from audio_families import STACKED, watched, zip_audio
from audio_families import make as make_audio
from torch import Tensor, nn
from torch.nn import functional as F
from vlm_families import FAMILIES, make, noise
from vlm_pruned import IN_FRONT
from vlm_zipped import zipped_behind

import edgewise
from edgewise.errors import InputError
from edgewise.exporter.capture import capture
from edgewise.exporter.pipeline import media
from edgewise.exporter.pipeline.vision_language import VisionEncoder
from edgewise.passes.program import Program

WIDTH, HEADS = 16, 2


class Tower(nn.Module):
    """Attention among all tokens of a sample `(B, N, C)`, and then what is given as the projector."""

    def __init__(self, project: Callable[[Tensor], Tensor], fused: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.project, self.fused = project, fused

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return q, k, v

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        q, k, v = self.parts(x)
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).softmax(dim=-1) @ v
        return {"tokens": self.project(x + out.transpose(1, 2).flatten(2))}


def square(x: Tensor) -> Tensor:
    return x.transpose(1, 2).unflatten(2, (-1, int(x.shape[1] ** 0.5)))


def cut(x: Tensor) -> Tensor:
    """Pooled by two; the last row and column of an odd count are lost."""
    return F.avg_pool2d(square(x), 2).flatten(2).transpose(1, 2)


def rounded(x: Tensor) -> Tensor:
    """Pooled by two; the last row and column of an odd count are pooled alone."""
    return F.avg_pool2d(square(x), 2, ceil_mode=True).flatten(2).transpose(1, 2)


def overlapping(x: Tensor) -> Tensor:
    return F.avg_pool2d(square(x), 3, stride=2, padding=1).flatten(2).transpose(1, 2)


def adaptive(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(square(x), 3).flatten(2).transpose(1, 2)


def shuffled(x: Tensor) -> Tensor:
    return F.pixel_unshuffle(F.pad(square(x), (0, 1, 0, 1)), 2).flatten(2).transpose(1, 2)


def newlines(x: Tensor) -> Tensor:
    """The end of each row is marked."""
    grid = square(x)
    return torch.cat([grid, grid.new_ones(1).expand(*grid.shape[:3], 1)], dim=-1).flatten(2).transpose(1, 2)


def turned(x: Tensor) -> Tensor:
    order = torch.arange(x.shape[1]).flip(0)
    return x[:, order] * 2


def convolved(x: Tensor) -> Tensor:
    weight = torch.full((WIDTH, WIDTH, 3), 0.1)
    return F.conv1d(x.transpose(1, 2), weight, stride=2).transpose(1, 2)


def weighted(x: Tensor) -> Tensor:
    """By a constant matrix over tokens, zero at some."""
    matrix = torch.eye(x.shape[1])[:7] + 0.5 * torch.eye(x.shape[1]).roll(3, 1)[:7]
    return matrix @ x


def joined(x: Tensor) -> Tensor:
    """The two samples of a batch in one."""
    return x.flatten(0, 1)[None]


def program_of(project: Callable[[Tensor], Tensor], x: Tensor, fused: bool = True) -> tuple[Tower, Program]:
    tower = Tower(project, fused).eval()
    return tower, capture(tower, (x,)).with_role(tokens="tokens")


def made_of(project: Callable[[Tensor], Tensor], shape: tuple[int, int]) -> list[list[list[int]]]:
    """By derivatives: those of the attention's tokens `(B * N)` that each one behind `project` changes with."""
    x = noise(*shape, WIDTH, seed=1).requires_grad_()
    out = project(x)
    found = []
    for sample in range(len(out)):
        rows = []
        for token in range(out.shape[1]):
            (grad,) = torch.autograd.grad(out[sample, token].sum(), x, retain_graph=True)
            rows.append(grad.abs().sum(dim=-1).flatten().nonzero().flatten().tolist())
        found.append(rows)
    return found


CASES = [
    *((p, (1, 25)) for p in (cut, rounded, overlapping, adaptive, shuffled, newlines, turned, convolved, weighted)),
    (cut, (2, 16)),
    (newlines, (3, 9)),
    (joined, (2, 9)),
]


@pytest.mark.parametrize(("project", "shape"), CASES, ids=[f"{p.__name__}-{s}" for p, s in CASES])
@pytest.mark.parametrize("fused", [True, False])
def test_groups_are_what_tokens_change_with(
    project: Callable[[Tensor], Tensor], shape: tuple[int, int], fused: bool
) -> None:
    _, program = program_of(project, noise(*shape, WIDTH), fused)
    stream = program.analysis.streams[-1]
    assert stream.origin is not None and stream.origin.refused is None
    groups, count = stream.origin.groups, shape[0] * shape[1]
    found = [[sorted(n for n in group if n < count) for group in row] for row in groups.index.tolist()]
    wanted = made_of(project, shape)
    assert found == wanted
    assert groups.size.tolist() == [[max(1, len(group)) for group in row] for row in wanted]
    empty = torch.tensor([[not group for group in row] for row in wanted])
    assert torch.equal(groups.none, empty) if groups.none is not None else not empty.any()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("project", "shape"), CASES, ids=[f"{p.__name__}-{s}" for p, s in CASES])
def test_topk_keeps_what_its_groups_are_given(
    project: Callable[[Tensor], Tensor], shape: tuple[int, int], fused: bool
) -> None:
    x = noise(*shape, WIDTH)
    tower, program = program_of(project, x, fused)
    other, groups = noise(*shape, WIDTH, seed=7), made_of(project, shape)
    with torch.no_grad():
        q, k, _ = tower.parts(other)
        weights = (q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).softmax(dim=-1).mean(dim=1)
        whole = tower(other)["tokens"]
        used = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
        used[[n for row in groups for group in row for n in group]] = True
        asked = used.reshape(shape)
        received = torch.cat([w[rows].mean(dim=0) for w, rows in zip(weights, asked, strict=True)])
        wanted = []
        for sample, row in zip(whole, groups, strict=True):
            score = [float(received[group].mean()) if group else -1.0 for group in row]
            wanted.append(sample[sorted(sorted(range(len(row)), key=lambda i: -score[i])[:3])])
        made = edgewise.compress(program, "topk@projector.out:keep=3").module()(other)["tokens"]
    torch.testing.assert_close(made, torch.stack(wanted), rtol=1e-4, atol=1e-5)


class Queries(nn.Module):
    """Two queries for each window of eight tokens: both are made of all eight."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(noise(1, HEADS, 2, WIDTH // HEADS))

    def forward(self, x: Tensor) -> Tensor:
        windows = x.reshape(-1, 8, HEADS, WIDTH // HEADS).transpose(1, 2)
        out = F.scaled_dot_product_attention(self.queries.expand(len(windows), -1, -1, -1), windows, windows)
        return out.transpose(1, 2).reshape(len(x), -1, WIDTH)


@pytest.mark.parametrize(
    ("project", "message"),
    [
        (Queries(), "needs attention and keys of each token, and tokens 0 and 1 are made of the same 8 of the encoder's: use "),
        (lambda x: x.cumsum(dim=1), r"the same 16 of the encoder's, mixed by .*cumsum"),
        (lambda x: F.layer_norm(x, x.shape[1:]), "tokens 0 and 1 are made of the same 16"),
        (lambda x: x.mean(dim=1, keepdim=True) + torch.arange(4.0)[:, None], "tokens 0 and 1 are made of the same 16"),
    ],
)
def test_tokens_that_are_made_of_the_same_are_refused(project: Callable[[Tensor], Tensor], message: str) -> None:
    _, program = program_of(project, noise(1, 16, WIDTH))
    with pytest.raises(InputError, match=message):
        edgewise.compress(program, "visionzip@projector.out:keep=2,context=1")
    few = edgewise.compress(program, "divprune@projector.out:keep=2").module()(noise(1, 16, WIDTH))["tokens"]
    assert few.shape == (1, 2, WIDTH)


def test_granite_speech_is_refused_for_what_its_queries_read() -> None:
    model, example = make_audio("granite-speech")
    features = example.pop("input_features")
    encoder = media.AUDIO.encoder(model, media.AUDIO.settled(model, features, example), None, 1)
    program = capture(encoder, (features,)).with_role(tokens=media.AUDIO.tokens)
    # Windows of ten, and two more by a convolution over five.
    with pytest.raises(InputError, match="tokens 0 and 1 are made of the same 12 of the encoder's: use "):
        edgewise.compress(program, "visionzip@projector.out:keep=4,context=2")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in IN_FRONT])
def test_visionzip_behind_projectors_of_vision_language_models(name: str) -> None:
    """Two images of one prompt, each by itself, and what is kept of them for others than the captured ones."""
    model, example = make(name, 2)
    pixels = example.pop("pixel_values")
    settled = media.IMAGE.settled(model, pixels, example)
    program = capture(VisionEncoder(model, settled, None, 2), (pixels,)).with_role(tokens="visual")
    few = edgewise.compress(program, "visionzip:keep=5,context=3")
    assert any("projector.out: the number of tokens cannot change before it" in note for note in few.notes)
    other = noise(*pixels.shape, seed=3)
    with torch.no_grad():
        made = few.module()(other)["visual"]
    tiles = 1 if name in ("idefics3", "smolvlm") else 0
    parts = [dict(zip(example, one, strict=True)) for one in zip(*(v.chunk(2) for v in example.values()), strict=True)]
    model, _ = make(name, 2)
    for n, one in enumerate(other.chunk(2, tiles)):
        wanted, _ = zipped_behind(name, model, one, 5, 3, **(parts[n] if parts else {}))
        torch.testing.assert_close(made[n], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STACKED)
def test_visionzip_behind_projectors_of_audio_language_models(name: str) -> None:
    """Of a recording shorter than the features."""
    model, example = make_audio(name)
    features = example.pop("input_features")
    encoder = media.AUDIO.encoder(model, media.AUDIO.settled(model, features, example), None, 1)
    program = capture(encoder, (features,)).with_role(tokens=media.AUDIO.tokens)
    few = edgewise.compress(program, "visionzip:keep=4,context=2")
    other = noise(*features.shape, seed=3)
    with torch.no_grad(), watched(model) as seen:
        wanted = zip_audio(encoder(other)[media.AUDIO.tokens][0], STACKED[name], seen, 4, 2)
        made = few.module()(other)[media.AUDIO.tokens]
    torch.testing.assert_close(made[0], wanted, rtol=1e-4, atol=1e-5)


class Twice(nn.Module):
    """One tower for each half of the tokens, as models loop over tiles, or two that are trained apart."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.one = Tower(cut)
        self.other = Tower(cut) if apart else self.one

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        halves = [tower(part)["tokens"] for tower, part in zip((self.one, self.other), x.chunk(2, dim=1), strict=True)]
        return {"tokens": torch.cat(halves, dim=1)}


@pytest.mark.parametrize("apart", [False, True])
def test_towers_side_by_side_are_all_asked(apart: bool) -> None:
    model, x = Twice(apart).eval(), noise(1, 32, WIDTH)
    program = capture(model, (x,)).with_role(tokens="tokens")
    origin = program.analysis.streams[-1].origin
    assert origin is not None and origin.groups.none is None
    assert [sorted(group) for group in origin.groups.index[0].tolist()] == made_of(
        lambda x: torch.cat([cut(part) for part in x.chunk(2, dim=1)], dim=1), (1, 32)
    )[0]
    scores = []
    for tower, part in zip((model.one, model.other), x.chunk(2, dim=1), strict=True):
        q, k, _ = tower.parts(part)
        received = (q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).softmax(dim=-1).mean(dim=(1, 2))
        scores.append(cut(received[..., None])[0, :, 0])
    best = torch.cat(scores).topk(3).indices.sort().values
    made = edgewise.compress(program, "topk@projector.out:keep=3").module()(x)["tokens"]
    torch.testing.assert_close(made[0], model(x)["tokens"][0, best])


def test_tokens_of_nothing_are_padding() -> None:
    """Rows of zeros in a constant matrix."""
    matrix = torch.zeros(6, 16)
    for row, start in ((1, 0), (2, 4), (4, 8), (5, 12)):
        matrix[row, start : start + 4] = 0.25
    for seed in range(5):
        _, program = program_of(lambda x: matrix @ x, noise(1, 16, WIDTH, seed=seed))
        made = edgewise.compress(program, "topk@projector.out:keep=4").module()(noise(1, 16, WIDTH, seed=seed))["tokens"]
        assert made.abs().sum(dim=-1).gt(0).all()


def test_tokens_that_were_taken_out_of_the_encoder_are_refused() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = Tower(lambda x: x)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"tokens": self.tower(x)["tokens"] * 2}

    program = capture(Plain().eval(), (noise(1, 16, WIDTH),)).with_role(tokens="tokens")
    with pytest.raises(InputError, match="tokens were taken out of the encoder"):
        edgewise.compress(program, "topk@encoder.block[0]:keep=12", "topk@projector.out:keep=3")
