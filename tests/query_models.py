"""Encoders with a query module behind them: those of Hugging Face, and a TokenPacker written in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from families import spread
from torch import Tensor, nn

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
IMAGE = {"image_size": 32, "patch_size": 8}


def qformer_config(width: int, **known: Any) -> Any:
    from transformers import Blip2QFormerConfig

    return Blip2QFormerConfig(
        hidden_size=24, num_attention_heads=2, intermediate_size=48, encoder_hidden_size=width, vocab_size=50, **known
    )


class QFormer(nn.Module):
    """CLIP's tower, then BLIP-2's Q-Former of four layers, every other with cross-attention, and a projector."""

    def __init__(self, queries: int = 6) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel
        from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

        self.tower = CLIPVisionModel(CLIPVisionConfig(**SIZES, **IMAGE))
        self.qformer = Blip2QFormerModel(qformer_config(32, num_hidden_layers=4, cross_attention_frequency=2))
        self.queries, self.project = nn.Parameter(torch.randn(1, queries, 24)), nn.Linear(24, 40)

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens = self.tower(pixel_values).last_hidden_state
        queries = self.queries.expand(len(pixel_values), -1, -1)
        return self.project(self.qformer(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state)


class Perceiver(nn.Module):
    """SigLIP's tower, then the resampler of Idefics2."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import SiglipVisionConfig, SiglipVisionModel
        from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverConfig, Idefics2PerceiverResampler

        self.tower = SiglipVisionModel(SiglipVisionConfig(**SIZES, **IMAGE, vision_use_head=False))
        config = Idefics2PerceiverConfig(
            hidden_size=32, resampler_n_latents=5, resampler_depth=2, resampler_n_heads=2, resampler_head_dim=16,
            num_key_value_heads=1,
        )  # fmt: skip
        self.resampler = Idefics2PerceiverResampler(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens = self.tower(pixel_values).last_hidden_state
        return self.resampler(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))


class WindowQFormer(nn.Module):
    """Whisper's encoder, then the projector of Granite Speech: a Q-Former over windows of 15 frames."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GraniteConfig, GraniteSpeechConfig, WhisperConfig, WhisperModel
        from transformers.models.granite_speech.modeling_granite_speech import GraniteSpeechEncoderProjector

        self.tower = WhisperModel(
            WhisperConfig(
                d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=50, num_mel_bins=8, vocab_size=60,
                pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            )
        ).get_encoder()  # fmt: skip
        text = GraniteConfig(hidden_size=40, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                             intermediate_size=64, vocab_size=60)  # fmt: skip
        config = GraniteSpeechConfig(
            projector_config=qformer_config(32, num_hidden_layers=2, cross_attention_frequency=1),
            text_config=text, window_size=15, downsample_rate=5,
        )  # fmt: skip
        self.projector = GraniteSpeechEncoderProjector(config)

    def forward(self, input_features: Tensor) -> Tensor:
        return self.projector(self.tower(input_features).last_hidden_state)


class TokenPacker(nn.Module):
    """CLIP's tower; every token of the grid shrunk by `side` reads the `side x side` tokens that it stands for."""

    def __init__(self, side: int = 2) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel

        self.side = side
        self.tower = CLIPVisionModel(CLIPVisionConfig(**SIZES, **IMAGE))
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, pixel_values: Tensor) -> Tensor:
        fine = self.tower(pixel_values).last_hidden_state[:, 1:]
        batch, count, width = fine.shape
        side, cells = self.side, int(count**0.5) // self.side
        image = fine.transpose(1, 2).reshape(batch, width, cells * side, cells * side)
        coarse = nn.functional.interpolate(image, size=(cells, cells), mode="bilinear").flatten(2).transpose(1, 2)
        windows = fine.reshape(batch, cells, side, cells, side, width).permute(0, 1, 3, 2, 4, 5)
        windows = windows.reshape(batch * cells * cells, side * side, width)
        q, k, v = (
            linear(x).reshape(batch * cells * cells, -1, 2, 16).transpose(1, 2)
            for linear, x in ((self.query, coarse), (self.key, windows), (self.value, windows))
        )
        read = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, -1, width)
        return coarse + self.out(read)


MODELS = {"qformer": QFormer, "perceiver": Perceiver, "window": WindowQFormer, "packer": TokenPacker}


def build(name: str, batch: int = 1) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with spread-out random weights, and its inputs."""
    torch.manual_seed(0)
    model = spread(MODELS[name]()).eval().requires_grad_(False)
    if name == "window":
        return model, {"input_features": torch.randn(batch, 8, 100)}
    return model, {"pixel_values": torch.randn(batch, 3, 32, 32)}


def make_qformer() -> Any:
    return build("qformer")


def make_perceiver() -> Any:
    return build("perceiver")


def make_window() -> Any:
    return build("window")


def make_packer() -> Any:
    return build("packer")
