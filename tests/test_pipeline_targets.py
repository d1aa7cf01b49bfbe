"""Generative models on targets whose artifacts are not run on the device they are for: half precision, engines, states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto
from tiny_speech import BINS, FRAMES, tiny_speech

import edgewise
from edgewise.targets.tensorrt import rtx
from edgewise.verify.bundle import verify_bundle

NEW = 24


def features(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, BINS, FRAMES, generator=torch.Generator().manual_seed(seed))


def check_likely(model: Any, x: torch.Tensor, begin: list[int], made: list[int], within: float) -> None:
    """Every token that was generated is, behind those before it, the model's likeliest but for `within` of its largest logit:
    rounding may only turn a near tie."""
    with torch.no_grad():
        logits = model(input_features=x, decoder_input_ids=torch.tensor([[*begin, *made[:-1]]])).logits[0, len(begin) - 1 :]
    logits[:, model.generation_config.suppress_tokens] = -torch.inf
    logits[0, model.generation_config.begin_suppress_tokens] = -torch.inf
    chosen = logits.gather(1, torch.tensor(made)[:, None])[:, 0]
    assert (logits.amax(dim=1) - chosen <= within * logits[logits.isfinite()].abs().max()).all()


def test_half_precision_engines_and_states(tmp_path: Path) -> None:
    """Each component at its precision; where NVIDIA's tools are, built for a device that is not here; caches as states."""
    model = tiny_speech()
    devices = ["sm86"] if rtx.installed() else []
    bundle = edgewise.export(
        model, tmp_path / "b", example={"input_features": features()}, targets=["tensorrt", "coreml-ios18"],
        precision="fp16,audio_encoder=fp32", devices=devices, new_tokens=NEW, cache=False,
    )  # fmt: skip
    assert all(rung.passed is not False for rung in bundle.manifest.verification)
    parts = [[a for a in bundle.manifest.targets if a.target == name] for name in ("tensorrt", "coreml-ios18")]
    for artifact in parts[0]:
        stored = {one.data_type for one in onnx.load(bundle.file(artifact.files[0])).graph.initializer if len(one.raw_data) > 1024}
        assert stored == {TensorProto.FLOAT if artifact.role == "audio_encoder" else TensorProto.FLOAT16}, artifact.label
        assert [Path(file).name for file in artifact.files[1:]] == [
            f"{artifact.role}.{device}.engine{end}" for device in devices for end in ("", ".json")
        ]
        for device in devices:
            rtx.check_engine(bundle.file(artifact.files[1]), device, bundle.file(artifact.files[0]))
    caches = tuple(f"past_{kind}_{layer}" for kind in ("key", "value") for layer in range(2))
    assert {a.role: a.states for a in parts[1]} == {"audio_encoder": (), "prefill": (), "decode": caches}
    assert not any(a.states for a in parts[0]) and set(caches) < {one.name for one in bundle.manifest.component("decode").inputs}
    assert all(outcome.passed for outcome in verify_bundle(bundle))
    assert bundle.manifest.pipeline is not None
    begin = list(bundle.manifest.pipeline.start_ids)
    for target in ("tensorrt", "coreml-ios18"):
        with edgewise.load(bundle, target) as speech:
            assert [info.name for info in speech.sessions["decode"].kept] == list(parts[target != "tensorrt"][2].states)
            for seed in range(2):
                made = speech.generate(features(seed).numpy())
                assert len(made.ids) > 8
                check_likely(model, features(seed), begin, made.ids, 1e-2)
