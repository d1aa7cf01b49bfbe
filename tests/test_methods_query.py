"""Query methods against NumPy, in graphs, and with files that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build
from method_graphs import EVERY, check_graph
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

import edgewise
from edgewise import targets
from edgewise.errors import InputError
from edgewise.ops import apply

WIDTH, COUNT = 24, 17


def learner(keep: int, hidden: int | None) -> dict[str, Tensor]:
    weights = {"out.weight": torch.randn(keep, hidden or WIDTH)}
    if hidden:
        weights |= {"in.weight": torch.randn(hidden, WIDTH) / 4, "in.bias": torch.randn(hidden), "out.bias": torch.randn(keep),
                    "norm.weight": torch.rand(WIDTH) + 0.5, "norm.bias": torch.randn(WIDTH)}
    return weights


def resampler(keep: int, full: bool, width: int = 16) -> dict[str, Tensor]:
    weights = {"queries": torch.randn(keep, width), "out.weight": torch.randn(WIDTH, width)}
    weights |= {f"{n}.weight": torch.randn(width, WIDTH) / 4 for n in "kv"}
    if full:
        weights |= {"q.weight": torch.randn(width, width) / 4, "norm.weight": torch.rand(WIDTH) + 0.5}
        weights |= {f"{n}.bias": torch.randn(width) for n in "qkv"} | {"out.bias": torch.randn(WIDTH)}
    return weights


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def normed(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    if "norm.weight" not in w:
        return x
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return y * w["norm.weight"] + w.get("norm.bias", 0)


def np_learner(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    h = normed(x, w)
    if "in.weight" in w:
        h = torch.nn.functional.gelu(torch.from_numpy(h @ w["in.weight"].T + w["in.bias"])).numpy()
    return softmax((h @ w["out.weight"].T + w.get("out.bias", 0)).T) @ x


def np_resampler(x: np.ndarray, w: dict[str, np.ndarray], heads: int) -> np.ndarray:
    x = normed(x, w)
    q = w["queries"]
    if "q.weight" in w:
        q = q @ w["q.weight"].T + w["q.bias"]
    k, v = (x @ w[f"{n}.weight"].T + w.get(f"{n}.bias", 0) for n in "kv")
    size = q.shape[1] // heads
    parts = []
    for h in range(heads):
        own = slice(h * size, (h + 1) * size)
        parts.append(softmax(q[:, own] @ k[:, own].T / size**0.5) @ v[:, own])
    return np.concatenate(parts, -1) @ w["out.weight"].T + w.get("out.bias", 0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("protected", [0, 1, 2])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", ["token-learner", "resampler"])
def test_against_numpy(name: str, full: bool, protected: int, padded: bool) -> None:
    torch.manual_seed(1)
    x = torch.randn(3, COUNT, WIDTH, dtype=torch.float64)
    weights = learner(5, 12 if full else None) if name == "token-learner" else resampler(5, full)
    length = torch.tensor([COUNT, 9, 4]) if padded else None
    more = {"heads": 4} if name == "resampler" else {}
    made = apply(name, x, keep=5, weights=weights, protected=protected, length=length, **more)
    assert made.tokens.shape == (3, protected + 5, WIDTH)
    torch.testing.assert_close(made.tokens[:, :protected], x[:, :protected])
    w = {k: v.double().numpy() for k, v in weights.items()}
    for b in range(3):
        real = x[b, protected : COUNT if length is None else int(length[b])].numpy()
        wanted = np_learner(real, w) if name == "token-learner" else np_resampler(real, w, 4)
        np.testing.assert_allclose(made.tokens[b, protected:], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["token-learner", "resampler"])
def test_in_a_model(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32,
                       patch_size=8, initializer_range=0.3)
    model = ViTModel(config, add_pooling_layer=False).eval()
    weights = learner(5, 12) if name == "token-learner" else resampler(5, True)
    save_file(weights, tmp_path / "w.safetensors")
    image = torch.randn(2, 3, 32, 32)
    spec = f"{name}@encoder.out:keep=5,weights={tmp_path / 'w.safetensors'}"
    bundle = edgewise.export(model, tmp_path / "b", example={"pixel_values": image}, targets=["openvino", "onnxruntime"],
                             compress=spec, cache=False)
    lowered = [r for r in bundle.manifest.verification if r.kind == "lowering"]
    assert len(lowered) == 2 and all(r.passed for r in lowered)
    program = edgewise.compress(edgewise.capture(model, (), {"pixel_values": image}), spec)
    with torch.no_grad():
        found = program.module()(pixel_values=image).last_hidden_state
        wanted = apply(name, model(image).last_hidden_state, keep=5, weights=weights, protected=1)
    torch.testing.assert_close(found, wanted.tokens, rtol=1e-4, atol=1e-5)


# -- each frame or window for itself

PARTS: dict[str, tuple[int, dict[str, Any], list[slice]]] = {
    "frames": (20, {"frames": 4}, [slice(5 * i, 5 * i + 5) for i in range(4)]),
    "one frame": (7, {"frames": 1}, [slice(0, 7)]),
    "windows": (20, {"window": 5}, [slice(5 * i, 5 * i + 5) for i in range(4)]),
    "windows and a rest": (23, {"window": 5}, [slice(5 * i, 5 * i + 5) for i in range(4)]),
    "the rest as a window": (23, {"window": 5, "tail": "pad"}, [slice(5 * i, 5 * i + 5) for i in range(5)]),
    "one window": (9, {"window": 9, "tail": "pad"}, [slice(0, 9)]),
}


def named(parts: str) -> str:
    return "frame-resampler" if "frame" in parts else "window-resampler"


def each(parts: str) -> str:
    return "per_" + named(parts).removesuffix("-resampler")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("protected", [0, 1])
@pytest.mark.parametrize("kind", ["random", "ties", "half"])
@pytest.mark.parametrize("parts", PARTS)
def test_parts_against_numpy(parts: str, kind: str, protected: int, padded: bool) -> None:
    torch.manual_seed(2)
    count, known, where = PARTS[parts]
    queries, total = 3, protected + count
    x = torch.randn(3, total, WIDTH, dtype=torch.float64)
    if kind == "ties":
        x = x[:, :1].round().expand(-1, total, -1)
    weights = resampler(queries, full=protected == 1)
    if kind == "half":
        x, weights = x.half(), {k: v.half() for k, v in weights.items()}
    # The second has a part that is only begun, and the third none but the first, begun with one token.
    length = torch.tensor([total, protected + count // 2, protected + 1])
    size = torch.randint(1, 5, (3, total, 1)).to(x.dtype)
    given: dict[str, Any] = {**known, "size": size, "heads": 4, "protected": protected} | ({"length": length} if padded else {})
    made = apply(named(parts), x, keep=len(where) * queries, weights=weights, **given)
    again = apply(named(parts), x, weights=weights, **{each(parts): queries}, **given)
    assert torch.equal(made.tokens, again.tokens) and made.tokens.dtype == x.dtype
    assert made.tokens.shape == (3, protected + len(where) * queries, WIDTH)
    assert torch.equal(made.tokens[:, :protected], x[:, :protected])
    w = {k: v.double().numpy() for k, v in weights.items()}
    tolerance = 0.03 if kind == "half" else 1e-9
    for b in range(3):
        free = x[b, protected : int(length[b]) if padded else total].double().numpy()
        for i, part in enumerate(where):
            seen, own = free[part], slice(protected + i * queries, protected + (i + 1) * queries)
            wanted = np_resampler(seen, w, 4) if len(seen) else np.zeros((queries, WIDTH))
            np.testing.assert_allclose(made.tokens[b, own].double(), wanted, rtol=tolerance, atol=tolerance)
            share = size[b, protected:][part].double().sum() / queries
            np.testing.assert_allclose(made.size[b, own, 0].double(), share.expand(queries), rtol=1e-3)
    assert torch.equal(made.size[:, :protected], size[:, :protected])
    assert bool((made.kept == -1).all())
    assert made.assignment.tolist() == [[*range(protected), *[-1] * count]] * 3


@pytest.mark.parametrize("name", ["token-learner", "resampler", "frame-resampler", "window-resampler"])
def test_a_sample_that_is_padding_alone_gives_zeros(name: str) -> None:
    weights = learner(6, 12) if name == "token-learner" else resampler(6 if name == "resampler" else 3, True)
    more = {"frame-resampler": {"frames": 2}, "window-resampler": {"window": 6}}.get(name, {})
    x = torch.randn(2, 13, WIDTH)
    heads = {} if name == "token-learner" else {"heads": 4}
    out = apply(name, x, keep=6, weights=weights, protected=1, length=torch.tensor([13, 1]), **heads, **more).tokens
    assert bool(out.isfinite().all()) and not out[1, 1:].any() and bool(out[0].any())


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("parts", ["frames", "windows and a rest", "the rest as a window"])
def test_parts_in_a_graph(parts: str, target: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    count, known, where = PARTS[parts]
    known = {**known, each(parts): 2, "heads": 4, "weights": resampler(2, True)}
    check_graph(named(parts), known, target, tmp_path, protected=1, count=count, batches=(2,), width=WIDTH)

    class Call(nn.Module):
        def forward(self, x: Tensor, length: Tensor) -> Tensor:
            return apply(named(parts), x, protected=1, length=length, **known).tokens

    x, length = torch.randn(3, 1 + count, WIDTH), torch.tensor([1, 8, 1 + count])
    exported = torch.export.export(Call(), (x, length), strict=False)
    files = targets.get(target).lower(exported, tmp_path, "padded", precision="fp32", input_names=["x", "length"],
                                      output_names=["y"])  # fmt: skip
    with targets.get(target).load(files, threads=1) as session:
        got = session.run({"x": x.numpy(), "length": length.numpy()})["y"]
    assert got.shape == (3, 1 + 2 * len(where), WIDTH)
    np.testing.assert_allclose(got, Call()(x, length), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "name", "keep", "options", "known"),
    [
        ("videomae", "token-learner", 5, {}, {}),  # learns where to look in time as well: the tokens are those of all frames
        ("videomae", "frame-resampler", 6, {"per_frame": 3}, {"frames": 2}),
        ("whisper", "window-resampler", 8, {"tail": "pad", "per_window": 2, "length": True}, {}),
    ],
)
def test_video_and_audio_models(
    family: str, name: str, keep: int, options: dict[str, Any], known: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(4)
    model, inputs = build(family, small=True)
    rows = keep if name == "token-learner" else int(options.get("per_frame", options.get("per_window", 1)))
    weights = learner(rows, None) if name == "token-learner" else resampler(rows, False)
    weights = {k: torch.randn(*(32 if n == WIDTH else n for n in v.shape)) * 0.3 for k, v in weights.items()}
    save_file(weights, tmp_path / "w.safetensors")
    text = ",".join(f"{k}={str(v).lower()}" for k, v in options.items())
    spec = f"{name}@encoder.out:weights={tmp_path / 'w.safetensors'}" + (f",{text}" if text else "")
    spec += f",keep={keep}" if name == "token-learner" else ""
    bundle = edgewise.export(model, tmp_path / "b", example=inputs, targets=EVERY, compress=spec, cache=False)
    assert bundle.manifest.components[0].sites[-1].tokens_out == keep
    lowered = [r for r in bundle.manifest.verification if r.kind == "lowering"]
    assert {r.name.split("/")[0] for r in lowered} == set(EVERY) and all(r.passed for r in lowered)
    given = {k: v for k, v in options.items() if k != "length"}
    program = edgewise.compress(edgewise.capture(model, (), inputs), spec)
    with torch.no_grad():
        tokens = model(**inputs).last_hidden_state
        for count in (tokens.shape[1], tokens.shape[1] // 3)[: 1 + ("length" in options)]:
            length = {"length": torch.full((len(tokens),), count)} if "length" in options else {}
            found = program.module()(**inputs, **{k: v.to(torch.int64) for k, v in length.items()}).last_hidden_state
            wanted = apply(name, tokens, keep=keep, weights=weights, **length, **given, **known).tokens
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "known", "message"),
    [
        ("frame-resampler", {"keep": 6, "frames": 4}, r"cannot keep 6 of 20 tokens: it can keep 4 \(per_frame=1\), 8"),
        ("frame-resampler", {"per_frame": 6, "frames": 4}, "per_frame=6 is out of range: 1 to 5"),
        ("frame-resampler", {"per_frame": 0, "frames": 4}, "per_frame=0 is out of range: at least 1"),
        ("frame-resampler", {"keep": 8, "frames": 4}, r"for keep=12 \(3 for each of 4 parts\), and keep=8"),
        ("frame-resampler", {"frames": 4}, "trained for keep=12 .*, and keep=4 is asked for"),
        ("frame-resampler", {"keep": 12, "frames": 4, "heads": 3}, "heads=3"),
        ("frame-resampler", {"keep": 12, "frames": 3}, "do not fall into 3 equal frames"),
        ("frame-resampler", {"keep": 12}, "needs frames"),
        ("window-resampler", {}, "trained for keep=3, and keep=1 is asked for"),
        ("window-resampler", {"window": 21}, "window=21 is out of range: 1 to 20"),
        ("window-resampler", {"window": 0}, "window=0 is out of range: at least 1"),
        ("window-resampler", {"window": 2, "per_window": 3}, "per_window=3 is out of range: 1 to 2"),
        ("window-resampler", {"window": 19, "per_window": 11, "tail": "pad"}, "per_window=11 is out of range: 1 to 10"),
        ("window-resampler", {"window": 6, "keep": 7}, r"cannot keep 7 of 20 tokens: it can keep 3 \(per_window=1\), 6"),
        ("window-resampler", {"tail": "keep"}, "tail='keep': one of drop, pad"),
        ("window-resampler", {"weights": None, "per_window": 3}, "window-resampler needs weights=FILE"),
    ],
)
def test_bad_parameters_of_parts(name: str, known: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply(name, torch.randn(1, 20, WIDTH), **{"weights": resampler(3, False), "heads": 4, **known})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 4}, "trained for keep=5"),
        ({"drop": "v.weight"}, "missing: v.weight"),
        ({"add": "gate"}, "not understood: gate"),
        ({"heads": 3}, "heads=3"),
        ({"width": 8}, "tokens of 24 features, and these have 8"),
    ],
)
def test_files_that_do_not_fit(change: dict[str, object], message: str) -> None:
    weights = resampler(5, False)
    weights.pop(str(change.get("drop")), None)
    if "add" in change:
        weights[str(change["add"])] = torch.zeros(1)
    x = torch.randn(1, COUNT, int(str(change.get("width", WIDTH))))
    with pytest.raises(ValueError, match=message):
        apply("resampler", x, keep=int(str(change.get("keep", 5))), weights=weights, heads=int(str(change.get("heads", 4))))


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"not weights")
    model = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16,
                               patch_size=8), add_pooling_layer=False).eval()
    program = edgewise.capture(model, (), {"pixel_values": torch.randn(1, 3, 16, 16)})
    for path, message in ((tmp_path / "w.safetensors", "cannot be read"), (tmp_path / "no.safetensors", "there is no file")):
        with pytest.raises(InputError, match=message):
            edgewise.compress(program, f"token-learner:keep=2,weights={path}")
    with pytest.raises(InputError, match="needs weights=FILE"):
        edgewise.compress(program, "token-learner:keep=2")
