"""Query methods against NumPy, in graphs, and with files that do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import ViTConfig, ViTModel

import edgewise
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
