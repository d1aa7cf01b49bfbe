"""What `explain` says of every token, against the eager methods, and the pictures that it draws."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from torch import nn
from torch.fx import Interpreter

import edgewise
from edgewise.errors import Refused
from edgewise.exporter.capture import capture
from edgewise.exporter.explain import decisions, panels
from edgewise.exporter.export import export
from edgewise.exporter.sources import load_source
from edgewise.passes.graph import parameters_of
from edgewise.passes.program import Program, compress

Image = pytest.importorskip("PIL.Image")

from edgewise.calibration import media  # noqa: E402
from edgewise.exporter import draw  # noqa: E402


class Patches(nn.Module):
    """A stream of tokens from a convolution, whose output is all read."""

    def __init__(self, grid: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 32, 8, 8) if grid else nn.Linear(24, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.grid = grid

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        return self.blocks(x.flatten(2).transpose(1, 2) if self.grid else x)


def patches() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A factory for `py:`."""
    return Patches(), (torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(1)),)


def demo(name: str, *specs: str) -> Program:
    source = load_source(f"demo:{name}")
    assert source.module is not None
    return compress(capture(source.module, (), source.kwargs), *specs)


class Spy(Interpreter):
    """Runs a graph, and keeps what its selections and matchings were given."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.exported.graph_module)
        self.program = program
        self.given: list[tuple[str, tuple[Any, ...]]] = []

    def run_node(self, n: torch.fx.Node) -> Any:
        name = str(n.target)
        if name.startswith("edgewise.") and ("bipartite_match" in name or "top_tokens" in name):
            self.given.append((name, self.fetch_args_kwargs_from_env(n)[0]))
        return super().run_node(n)

    def watch(self) -> list[tuple[str, tuple[Any, ...]]]:
        values = {**parameters_of(self.program.exported), **self.program.inputs}
        with torch.no_grad():
            self.run(*(values[n.name] for n in self.program.exported.graph.nodes if n.op == "placeholder"))
        return self.given


def by_hand(program: Program) -> list[tuple[list[int], list[int]]]:
    """Where each original token went and what represents each output, at every site: `edgewise.ops.apply`, composed."""
    where = list(range(program.analysis.streams[0].tokens))
    heads = list(where)
    made = []
    for name, (values, count, protected, *_) in Spy(program).watch():
        if "bipartite_match" in name:
            one = edgewise.ops.apply("tome", values, keys=values, r=count, protected=protected)
        else:
            rows = values[:, None, None]
            tokens = values[:, :, None]
            # The score is all that the selection sees: any attention of one head and row that is equal to it.
            one = edgewise.ops.apply("topk", tokens, attention=rows, keep=count, protected=protected, score="class")
        where = [-1 if w < 0 else int(one.assignment[0, w]) for w in where]
        heads = [heads[int(k)] for k in one.kept[0]]
        made.append((list(where), list(heads)))
    return made


@pytest.mark.parametrize(
    ("name", "specs"),
    [
        ("digits", ["tome:keep=0.5"]),
        ("digits", ["topk:keep=0.3"]),
        ("digits", ["tome@encoder.block[0,1]:r=40", "topk@encoder.block[2]:keep=50"]),
        ("digits", ["tofu:keep=0.4"]),
        ("speech", ["tome:r=31"]),
    ],
)
def test_assignments_are_those_of_the_eager_methods_composed(name: str, specs: list[str]) -> None:
    program = demo(name, *specs)
    layers = decisions(program, program.inputs)
    wanted = by_hand(program)
    assert len(layers) == len(wanted) == len(program.steps)
    for layer, (where, heads) in zip(layers, wanted, strict=True):
        assert layer.origin.tolist() == where
        assert layer.heads is not None and layer.heads.tolist() == heads
        assert sorted({w for w in where if w >= 0}) == list(range(layer.tokens_out))
        # Whatever represents an output is in it.
        assert [where[h] for h in heads] == list(range(layer.tokens_out))


def test_the_first_site_sees_what_the_model_sees() -> None:
    """Against the keys of the model in PyTorch: no graph is asked."""
    program = demo("digits", "tome@encoder.block[0]:r=60")
    source = load_source("demo:digits")
    assert source.module is not None
    keys: list[torch.Tensor] = []
    ends = ("layer.0.attention.attention.key", "0.attention.k_proj")
    (hooked,) = [module for name, module in source.module.named_modules() if name.endswith(ends)]
    hooked.register_forward_hook(lambda _module, _inputs, output: keys.append(output))
    with torch.no_grad():
        source.module(**source.kwargs)
    averaged = keys[0].reshape(1, 197, 4, 24).mean(2)
    wanted = edgewise.ops.apply("tome", averaged, keys=averaged, r=60, protected=1)
    (layer,) = decisions(program, program.inputs)
    assert layer.origin.tolist() == wanted.assignment[0].tolist()


@pytest.mark.parametrize(
    "spec",
    [
        "pool",
        "merge-grid:side=3",
        "dpcknn@encoder.block[1]:keep=9",
        "divprune:keep=5",
        "visionzip:keep=6,context=3",
        "random:keep=7",
    ],
)
def test_every_kind_of_method(spec: str) -> None:
    module, inputs = patches()
    program = compress(capture(module, inputs), spec)
    (layer,) = decisions(program, program.inputs)
    assert layer.grid == (4, 6) and len(layer.origin) == 24
    assert set(layer.origin.tolist()) - {-1} == set(range(layer.tokens_out))
    if spec == "pool":
        assert layer.heads is None and layer.origin.tolist() == [
            r // 2 * 3 + c // 2 for r in range(4) for c in range(6)
        ]
    if spec.startswith("random"):
        assert (layer.origin < 0).sum() == 24 - 7


class Projected(nn.Module):
    """Patches and a class token, which is cut off before a projector."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Patches()
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.projector = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner.embed(x).flatten(2).transpose(1, 2)
        x = self.inner.blocks(torch.cat([self.token, x], 1))
        return self.projector(x[:, 1:])  # type: ignore[no-any-return]


def test_a_token_that_is_cut_off_shifts_the_others() -> None:
    program = capture(Projected(), patches()[1])
    first, last = decisions(
        compress(program, "topk@encoder.block[0]:keep=12", "topk@projector.in:keep=5"), program.inputs
    )
    assert first.kept is not None and last.kept is not None and last.heads is not None
    assert (first.tokens_in, first.tokens_out, last.tokens_in, last.tokens_out) == (25, 13, 12, 5)
    # Place 0 of the projector is what was place 1 behind the class token.
    assert last.heads.tolist() == [int(first.kept[1 + place]) for place in last.kept]
    assert last.origin[0] == -1 and [int(last.origin[head]) for head in last.heads] == list(range(5))


def test_files_and_document(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "new" / "explained"
    said = cli("explain", "demo:digits", "--compress", "tome:keep=0.5", "--sample", 3, "-o", out, "--json")
    assert said.code == 0, said.err
    document = said.document
    written = json.loads((out / "explain.json").read_text("utf-8"))
    assert {"folder": str(out), **written} == document
    assert sorted(path.name for path in out.iterdir()) == document["files"]
    assert [(s["tokens_in"], s["tokens_out"]) for s in document["sites"]] == [
        (197, 173),
        (173, 148),
        (148, 123),
        (123, 99),
    ]
    for site in document["sites"]:
        assert len(site["assignment"]) == site["tokens_in"] and len(site["original_assignment"]) == 197
        picture = Image.open(out / site["file"])
        assert min(picture.size) > 300
    assert Image.open(out / "overview.png").width > 700
    # Once more, into the same folder, which is replaced.
    again = cli("explain", "demo:digits", "--compress", "topk:keep=0.5", "--sample", 3, "-o", out)
    assert again.code == 0 and "encoder.block[1]" in again.out
    assert sorted(path.name for path in out.iterdir()) == ["01-encoder.block1-topk.png", "explain.json", "overview.png"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["explained"]


def test_an_image_file_goes_through_the_processor(cli: Cli, tmp_path: Path) -> None:
    """The sample, written as a PNG, is the same input again."""
    source = load_source("demo:digits")
    sample = source.samples["pixel_values"][3]
    pixels = ((sample[0] * 0.5 + 0.5) * 255).round().astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "three.png")
    made = media.load_image(tmp_path / "three.png", (1, 56, 56), source.preprocessing)
    assert np.abs(made.array - sample).max() < 0.01
    assert np.array_equal(np.asarray(made.views[0])[:, :, 0], pixels)
    args = ("explain", "demo:digits", "--compress", "tome:keep=0.5", "--json", "-o", tmp_path / "out")
    by_file = cli(*args, "--image", tmp_path / "three.png").document
    assert by_file["input"] == {"name": "pixel_values", "kind": "image", "of": str(tmp_path / "three.png")}
    assert by_file["notes"] == []


def test_crop_and_constants_of_a_processor(tmp_path: Path) -> None:
    """As CLIP has them: the shorter edge is fitted, the centre cut out, each channel normalised by itself."""
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = (255, 128, 0)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    known = {
        "size": {"shortest_edge": 20},
        "crop_size": {"height": 20, "width": 20},
        "do_center_crop": True,
        "resample": 0,
        "image_mean": [0.5, 0.25, 0.0],
        "image_std": [0.5, 0.5, 2.0],
    }
    made = media.load_image(tmp_path / "wide.png", (3, 20, 20), known)
    assert np.allclose(made.array, np.array([1.0, (128 / 255 - 0.25) / 0.5, 0.0])[:, None, None], atol=1e-6)
    assert np.asarray(made.views[0])[10, 10].tolist() == [255, 128, 0]


def test_audio(cli: Cli, tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    time = np.arange(16000) / 16000
    soundfile.write(tmp_path / "tone.wav", 0.3 * np.sin(2 * np.pi * 900 * time), 16000)
    args = ("demo:speech", "--compress", "topk:keep=0.5", "-o", tmp_path / "out")
    said = cli("explain", *args, "--audio", tmp_path / "tone.wav", "--json")
    assert said.code == 0, said.err
    (site,) = said.document["sites"]
    assert site["grid"] == [8, 31] and (tmp_path / "out" / site["file"]).is_file()
    halved = media.resample(np.sin(2 * np.pi * 900 * time).astype(np.float32), 16000, 8000)
    wanted = np.sin(2 * np.pi * 900 * np.arange(8000) / 8000)
    assert np.abs(halved - wanted)[100:-100].max() < 1e-5  # around it is silence


def test_panels_of_a_spectrogram_and_of_a_wave() -> None:
    features = np.arange(128 * 64, dtype=np.float32).reshape(128, 64)
    made = media.from_array("audio", features, {"num_mel_bins": 64})
    assert made.views[0].size == (128, 64)
    (strip,) = panels(made, (8, 31))
    # Frequency 0 is the first row of the grid, and is drawn at the bottom.
    assert strip.tokens.shape == (8, 31) and strip.tokens[-1, 0] == 0 and strip.tokens[-1, 1] == 1
    (turned,) = panels(made, (31, 8))
    assert turned.tokens.shape == (8, 31) and turned.tokens[-1, 1] == 8
    wave = media.from_array("audio", np.sin(np.arange(48000) / 9).astype(np.float32), {"sampling_rate": 16000})
    strips = panels(wave, (150,))
    assert [s.tokens.shape for s in strips] == [(1, 75), (1, 75)] and strips[1].label == "1.50 to 3.00 s"


def test_frames_of_a_video(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    for i in range(6):
        Image.new("RGB", (40, 30), (40 * i, 0, 0)).save(frames / f"{i}.png")
    made = media.load_video(frames, (4, 3, 16, 16), {})
    assert made.array.shape == (4, 3, 16, 16) and [np.asarray(v)[0, 0, 0] // 40 for v in made.views] == [0, 2, 3, 5]
    assert np.array_equal(media.load_video(frames, (3, 4, 16, 16), {}).array, made.array.swapaxes(0, 1))
    parts = panels(made, (2, 4, 4))
    assert [p.label for p in parts] == ["frame 1", "frame 3"] and parts[1].tokens[0, 0] == 16
    (tmp_path / "clips.py").write_text(
        "import torch\n"
        "from transformers import VideoMAEConfig, VideoMAEModel\n"
        "def make():\n"
        "    config = VideoMAEConfig(image_size=32, patch_size=16, num_frames=4, hidden_size=32, num_hidden_layers=2,\n"
        "                            num_attention_heads=2, intermediate_size=64)\n"
        "    return VideoMAEModel(config), {'pixel_values': torch.zeros(1, 4, 3, 32, 32)}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    said = cli("explain", "py:clips:make", "--compress", "evs:keep=4", "--video", "frames", "-o", "out", "--json")
    assert said.code == 0, said.err
    assert said.document["sites"][0]["grid"] == [2, 2, 2] and "scaled to -1 to 1" in said.document["notes"][0]


def test_a_bundle_brings_model_and_specs(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    bundle = tmp_path / "bundle"
    export("demo:digits", bundle, compress="tome:keep=0.5", targets=["onnxruntime"])
    said = cli("explain", bundle, "--sample", 0, "-o", tmp_path / "out", "--json")
    assert said.code == 0, said.err
    assert said.document["model"] == "demo:digits" and said.document["compress"] == ["tome:keep=0.5"]
    assert said.document["bundle"] == str(bundle)
    refused = cli("explain", bundle, "--compress", "tome:r=8", "--sample", 0, "-o", tmp_path / "other")
    refused.refused("is a bundle", "leave --compress out")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["demo:digits", "--compress", "tome:keep=0.5", "-o", "{out}"], ["give one input"]),
        (
            ["demo:digits", "--compress", "tome:keep=0.5", "-o", "{out}", "--sample", "1", "--image", "x"],
            ["give one input"],
        ),
        (["demo:digits", "--compress", "tome:keep=0.5", "--sample", "1"], ["-o FOLDER"]),
        (["demo:digits", "-o", "{out}", "--sample", "1"], ["give --compress"]),
        (["demo:digits", "--compress", "tome:keep=1.0", "-o", "{out}", "--sample", "1"], ["keeps every token"]),
        (["demo:digits", "--compress", "tone:keep=1", "-o", "{out}", "--sample", "1"], ["did you mean 'tome'"]),
        (["demo:digits", "--compress", "tome:keep=0.5", "-o", "{out}", "--sample", "360"], ["0 to 359"]),
        (["demo:digits", "--compress", "tome:keep=0.5", "-o", "{out}", "--sample", "-1"], ["0 to 359"]),
        (["demo:digits", "--compress", "tome:keep=0.5", "-o", "{out}", "--image", "{none}"], ["does not exist"]),
        (
            ["demo:digits", "--compress", "tome:keep=0.5", "-o", "{out}", "--image", "{text}"],
            ["no image that can be read"],
        ),
        (["demo:digits", "--compress", "tome:keep=0.5", "-o", "{out}", "--image", "{folder}"], ["one image is needed"]),
        (
            ["demo:digits", "--compress", "tome:keep=0.5", "-o", "{out}", "--audio", "{text}"],
            ["takes no audio", "pixel_values"],
        ),
        (["demo:digits", "--compress", "tome:keep=0.5", "-o", "{out}", "--video", "{folder}"], ["takes no video"]),
        (["demo:digits", "--compress", "tome:keep=0.5", "-o", "{folder}", "--sample", "1"], ["left alone"]),
        (["demo:digits", "--compress", "tome:keep=0.5", "-o", "{text}", "--sample", "1"], ["left alone"]),
        (["demo:digits", "--compress", "text-topk:keep=0.5", "-o", "{out}", "--sample", "1"], ["text=FILE"]),
        (["demo:speech", "--compress", "tome:keep=0.5", "-o", "{out}", "--audio", "{text}"], ["audio"]),
    ],
)
def test_bad_input(cli: Cli, tmp_path: Path, args: list[str], words: list[str]) -> None:
    folder, text = tmp_path / "folder", tmp_path / "notes.txt"
    folder.mkdir()
    text.write_text("no picture")
    (folder / "keep.txt").write_text("mine")
    places = {"out": tmp_path / "a" / "out", "none": tmp_path / "none.png", "text": text, "folder": folder}
    said = cli("explain", *(arg.format(**places) for arg in args))
    said.refused(*(word.format(**places) for word in words))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "notes.txt"]
    assert (folder / "keep.txt").read_text() == "mine" and text.read_text() == "no picture"


def test_tokens_without_a_grid_are_refused(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain.py").write_text(
        "import torch\nfrom test_explain import Patches\n"
        "def make():\n    return Patches(grid=False), (torch.randn(1, 400),)\n"
        "class Wave(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.inner = Patches(grid=False)\n"
        "    def forward(self, wave):\n        return self.inner(wave[:, :384].reshape(1, 16, 24))\n"
        "def wave():\n    return Wave(), (torch.randn(1, 400),)\n"
    )
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "tone.wav", np.sin(np.arange(400) / 5), 16000)
    monkeypatch.chdir(tmp_path)
    said = cli("explain", "py:plain:wave", "--compress", "tome:keep=0.5", "--audio", "tone.wav", "-o", tmp_path / "out")
    said.refused("no grid that is known")
    assert not (tmp_path / "out").exists()
    with pytest.raises(Refused, match="no place over this image"):
        panels(media.from_array("image", np.zeros((3, 8, 8), np.float32), {}), (2, 2, 2))


def test_colours_and_marks() -> None:
    panel = draw.Panel(Image.new("RGB", (60, 60), (200, 180, 160)), np.arange(36).reshape(6, 6))
    first = [frozenset({0, 1}), frozenset({14, 15}), frozenset({20, 21})]
    before = draw.colour_groups(first, {}, [panel])
    assert len(set(before.values())) == 3
    grown = [frozenset({0, 1, 6}), frozenset({14, 15, 20, 21}), frozenset({34, 35})]
    after = draw.colour_groups(grown, before, [panel])
    assert after[grown[0]] == before[first[0]] and after[grown[1]] == before[first[1]]
    assert len(set(after.values())) == 3
    many = [frozenset({2 * i, 2 * i + 1}) for i in range(18)]
    assert len(set(draw.colour_groups(many, {}, [panel]).values())) == 18
    marks = draw.Marks(after, frozenset({30}), frozenset({0}))
    pixels = np.asarray(draw.draw([panel], marks, "a caption", cell=20, across=1, legend=False))
    top, left = pixels.shape[0] - 12 - 120, 12

    def at(token: int, x: int, y: int) -> list[int]:
        return pixels[top + 20 * (token // 6) + y, left + 20 * (token % 6) + x].tolist()

    assert at(0, 0, 10) == list(after[grown[0]]) and at(0, 19, 10) != list(after[grown[0]])  # outlined, but not inside
    assert at(28, 10, 10) == [200, 180, 160]  # kept: as it is
    assert max(at(30, 4, 4)) < 150 and at(31, 0, 10) == [
        255,
        255,
        255,
    ]  # dropped, and the edge of what is kept beside it
