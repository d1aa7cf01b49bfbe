"""Whole models, converted by coremltools without anything of ours: the interpreter's result against PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from coreml_packages import ct, from_torch
from torch import nn

from edgewise.targets.coreml.session import InterpreterSession

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


class Hidden(nn.Module):
    """A model as a function of its one input."""

    def __init__(self, model: nn.Module, argument: str) -> None:
        super().__init__()
        self.model = model.eval()
        self.argument = argument

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(**{self.argument: x})[0]


def vision(config: type, model: type, **options: Any) -> tuple[nn.Module, torch.Tensor]:
    return Hidden(model(config(**SMALL, image_size=32, patch_size=8, **options)), "pixel_values"), torch.randn(
        2, 3, 32, 32
    )


def ast() -> tuple[nn.Module, torch.Tensor]:
    config = hf.ASTConfig(**SMALL, max_length=64, num_mel_bins=32)
    return Hidden(hf.ASTModel(config), "input_values"), torch.randn(2, 64, 32)


def whisper() -> tuple[nn.Module, torch.Tensor]:
    layers = {
        f"{part}_{what}": n
        for part in ("encoder", "decoder")
        for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128))
    }
    config = hf.WhisperConfig(d_model=64, **layers, num_mel_bins=16, max_source_positions=40)
    model = hf.WhisperModel(config).encoder
    return Hidden(model, "input_features"), torch.randn(2, 16, 80)


def videomae() -> tuple[nn.Module, torch.Tensor]:
    config = hf.VideoMAEConfig(**SMALL, image_size=32, patch_size=16, num_frames=4, use_mean_pooling=False)
    return Hidden(hf.VideoMAEModel(config), "pixel_values"), torch.randn(1, 4, 3, 32, 32)


class Patterns(nn.Module):
    """What the models above do not have: convolutions that are grouped, dilated and over one and three axes, pools, top-k, gathers,
    scatters, comparisons, cumulative sums and a batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(8, 16, 3, 2, 1, groups=8)
        self.dilated = nn.Conv2d(16, 12, 3, padding=2, dilation=2, groups=4)
        self.norm = nn.BatchNorm2d(12)
        self.line = nn.Conv1d(12, 8, 3, 2)
        self.volume = nn.Conv3d(1, 2, (2, 3, 1), padding=(1, 0, 0))
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.norm(self.dilated(nn.functional.silu(self.depthwise(x))))
        pooled = nn.functional.max_pool2d(y, 2, 2) + nn.functional.avg_pool2d(y, 2, 2)
        tokens = self.line(pooled.flatten(2)).transpose(1, 2)
        cube = self.volume(pooled[:, None])
        scores = tokens.norm(dim=-1)
        kept = scores.topk(3, -1).indices
        picked = tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))
        merged = torch.zeros_like(tokens[:, :2]).scatter_add(1, (kept % 2)[..., None].expand_as(picked), picked)
        band = torch.where(scores[:, :, None] > scores[:, None, :], scores[:, None, :], -scores[:, :, None]).cumsum(-1)
        return cube, picked, merged, band


def patterns() -> tuple[nn.Module, torch.Tensor]:
    return Patterns().eval(), torch.randn(2, 8, 16, 16)


MODELS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "vit": lambda: vision(hf.ViTConfig, hf.ViTModel),
    "clip": lambda: vision(hf.CLIPVisionConfig, hf.CLIPVisionModel),
    # The frontend takes the tanh approximation of GELU for the exact one, which is not what is tested here.
    "siglip": lambda: vision(hf.SiglipVisionConfig, hf.SiglipVisionModel, hidden_act="gelu"),
    "ast": ast,
    "whisper": whisper,
    "videomae": videomae,
    "patterns": patterns,
}


@pytest.mark.parametrize("name", list(MODELS))
def test_a_model_gives_what_pytorch_gives(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = MODELS[name]()
    with torch.no_grad():
        wanted = module(x)
    references = [one.numpy() for one in (wanted if isinstance(wanted, tuple) else (wanted,))]
    for half in (False, True):
        session = InterpreterSession(from_torch(tmp_path, module, (x,), half=half, name=f"half{half}"))
        outputs = session.run({"x0": x.numpy().astype(session.inputs[0].dtype)})
        assert len(outputs) == len(references)
        for got, reference in zip(outputs.values(), references, strict=True):
            assert got.shape == reference.shape and got.dtype == (np.float16 if half else np.float32)
            scale = float(np.abs(reference).max())
            if half:
                relative = np.linalg.norm(got.astype(np.float64) - reference) / np.linalg.norm(reference)
                assert relative < 3e-3, (name, relative)
            else:
                assert float(np.abs(got - reference).max()) < 1e-5 * scale, name


class Cache(hf.Cache):
    """A cache of static length in buffers of a module: what is written is blended in where a mask is one."""

    def __init__(self, owner: nn.Module, place: torch.Tensor) -> None:
        self.owner, self.place = owner, place
        super().__init__(layers=[])

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, ...]:
        found = []
        for name, new in ((f"k{layer_idx}", key), (f"v{layer_idx}", value)):
            buffer = getattr(self.owner, name)
            buffer.copy_(buffer * (1 - self.place) + new * self.place)
            found.append(buffer)
        return tuple(found)


class Step(nn.Module):
    """One decoding step of a causal language model; keys and values are buffers, which Core ML keeps as states."""

    def __init__(self, model: nn.Module, length: int) -> None:
        super().__init__()
        self.model = model
        config = model.config
        for layer in range(config.num_hidden_layers):
            for name in ("k", "v"):
                size = (1, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
                self.register_buffer(f"{name}{layer}", torch.zeros(size))

    def forward(
        self, ids: torch.Tensor, position: torch.Tensor, place: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        cache = Cache(self, place)
        out = self.model(
            input_ids=ids, position_ids=position, attention_mask=mask, past_key_values=cache, use_cache=True
        )
        return out.logits


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_a_decoder_with_states_gives_what_the_whole_forward_gives(half: bool, tmp_path: Path) -> None:
    """Eight steps of a Llama of two layers with grouped heads, against one forward over the eight tokens."""
    torch.manual_seed(0)
    length = 8
    config = hf.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=50, max_position_embeddings=32)
    model = hf.LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 50, (1, length))
    with torch.no_grad():
        wanted = model(tokens).logits[0].numpy()
    example = (
        torch.zeros(1, 1, dtype=torch.int64),
        torch.zeros(1, 1, dtype=torch.int64),
        torch.zeros(1, 1, length, 1),
        torch.zeros(1, 1, 1, length),
    )
    path = from_torch(tmp_path, Step(model, length), example, half=half, target=ct.target.iOS18)
    session = InterpreterSession(path)
    assert len(session.states) == 4
    dtype = np.float16 if half else np.float32
    for step in range(length):
        place = np.zeros((1, 1, length, 1), dtype)
        place[:, :, step] = 1
        mask = np.where(np.arange(length) <= step, 0, -1e4).astype(dtype).reshape(1, 1, 1, length)
        feeds = {
            "x0": tokens[:, step : step + 1].numpy().astype(np.int32),
            "x1": np.full((1, 1), step, np.int32),
            "x2": place,
            "x3": mask,
        }
        (logits,) = session.run(feeds).values()
        # The states are half precision in both.
        np.testing.assert_allclose(logits[0, 0].astype(np.float32), wanted[step], rtol=0, atol=1e-3)
