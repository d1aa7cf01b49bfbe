"""Query modules are recognised by what attends to what, and compression in front of them equals an eager run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Cli
from query_models import build
from reference import Eager, patched, relative_error
from test_families import capture, captured, eager_plan

import edgewise
from edgewise.errors import Refused
from edgewise.passes.program import compress

KNOWN = {
    "qformer": ("Q-Former", 6, 17, 1, 6, 2),
    "perceiver": ("Perceiver resampler", 5, 16, 1, 2, 2),
    "window": ("window Q-Former", 3, 15, 4, 4, 2),
    "packer": ("TokenPacker", 1, 4, 4, 1, 1),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", KNOWN)
def test_recognised(name: str, batch: int) -> None:
    analysis = capture(*build(name, batch)).analysis
    (module,) = analysis.modules
    found = (module.kind, module.queries, module.keys, module.windows, len(module.anchors), len(module.cross))
    assert found == KNOWN[name] and module.source == "encoder"
    assert module.tokens_out == module.queries * module.windows
    assert [s.name for s in analysis.streams if s.of_media] == ["encoder"]


@pytest.mark.parametrize("name", ["siglip", "vit", "clip", "swin", "videomae"])
def test_only_what_is_one(name: str) -> None:
    kinds = [module.kind for module in captured(name, True)[2].analysis.modules]
    assert kinds == (["attention pooling"] if name == "siglip" else [])


@pytest.mark.parametrize("spec", ["tome:keep=0.5", "topk@encoder.out:keep=7", "tome@encoder.block[1]:r=3"])
@pytest.mark.parametrize("name", ["qformer", "perceiver"])
def test_compression_in_front_equals_eager(name: str, spec: str) -> None:
    model, inputs = build(name, batch=2)
    program = compress(capture(model, inputs), spec)
    prefix = 1 if name == "qformer" else 0
    state = Eager(eager_plan(program, "encoder"), prefix, prefix > 0)
    path = "tower.vision_model.encoder.layers" if hasattr(model.tower, "vision_model") else "tower.encoder.layers"
    end = "tower.vision_model.post_layernorm" if hasattr(model.tower, "vision_model") else "tower.post_layernorm"
    with torch.no_grad(), patched(model, path, state, end if name == "perceiver" else None):
        theirs = model(**inputs)
    assert relative_error(program.module()(**inputs), theirs) < 1e-5
    assert state.counts[-1] < program.analysis.streams[0].tokens


@pytest.mark.parametrize("name", ["window", "packer"])
def test_windows_need_their_tokens(name: str) -> None:
    with pytest.raises(Refused, match=r"windows|grid"):
        compress(capture(*build(name)), "tome:keep=0.5")


@pytest.mark.parametrize("name", KNOWN)
def test_inspect_tells(name: str, cli: Cli) -> None:
    model = f"py:query_models:make_{name}"
    said = cli("inspect", model, "--json")
    assert said.code == 0, said
    (module,) = said.document["query_modules"]
    kind, queries, keys, windows, attentions, cross = KNOWN[name]
    assert module.pop("node").startswith("node scaled_dot_product_attention")
    assert module == {
        "kind": kind, "reads": "encoder", "queries": queries, "windows": windows, "keys": keys,
        "tokens_out": queries * windows, "attentions": attentions, "cross_attentions": cross,
    }  # fmt: skip
    assert kind in cli("inspect", model).out


@pytest.mark.parametrize("name", ["qformer", "perceiver"])
def test_exports(name: str, tmp_path: Path) -> None:
    model, inputs = build(name)
    bundle = edgewise.export(model, tmp_path / "b", example=inputs, targets=["openvino", "onnxruntime"], compress="tome:keep=0.5")
    lowered = [r for r in bundle.manifest.verification if r.kind == "lowering"]
    assert len(lowered) == 2 and all(e.relative < 1e-4 for r in lowered for e in r.outputs.values())
