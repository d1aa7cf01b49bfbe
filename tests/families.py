"""Model families at their published sizes, and small variants of them for quick tests. Random weights from fixed seeds,
real ones where `shared/models` has them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

SHARED = Path(__file__).parents[2] / "shared"


@dataclass(frozen=True)
class Family:
    """`make(small)` gives a model in eval mode and its keyword arguments. `tokens` is the count of the real size,
    `protected` the leading constant tokens, `layers` the path of the stack of blocks in the model."""

    name: str
    make: Callable[[bool], tuple[nn.Module, dict[str, Tensor]]]
    tokens: int
    protected: int
    layers: str
    has_class: bool = True
    site: str = "encoder"
    refused: str | None = None
    small: bool = True


FAMILIES: dict[str, Family] = {}


def family(tokens: int, protected: int, layers: str, **known: Any) -> Callable[[Any], Any]:
    def register(make: Any) -> Any:
        known.setdefault("has_class", protected > 0)
        FAMILIES[make.__name__] = Family(make.__name__, make, tokens, protected, layers, **known)
        return make

    return register


def build(name: str, small: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model and inputs of a family, the same at every call."""
    torch.manual_seed(0)
    model, inputs = FAMILIES[name].make(small)
    return model.eval().requires_grad_(False), inputs


def shared(path: str) -> Path:
    """A folder of real weights; skips the test where it is absent."""
    folder = SHARED / "models" / path
    if not folder.exists():
        pytest.skip(f"{folder} is absent")
    return folder


def spread(model: nn.Module) -> nn.Module:
    """Random weights as a trained model might have them: at the published initial scale of 0.02 all tokens are nearly
    alike after a few blocks, and every choice between them is a tie."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2 and "embed" not in name and "token" not in name:
                nn.init.normal_(p, std=1.2 / p[0].numel() ** 0.5)
            elif p.ndim >= 2:
                nn.init.normal_(p, std=0.5)
            elif "lambda" in name or "layer_scale" in name:
                nn.init.uniform_(p, 0.2, 0.8)
    return model


SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
IMAGE = {"image_size": 48, "patch_size": 8}


def image(small: bool, side: int = 224, batch: int = 1) -> dict[str, Tensor]:
    side = 48 if small else side
    return {"pixel_values": torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(3))}


@family(197, 1, "layers")
def vit(small: bool) -> Any:
    from transformers import ViTConfig, ViTModel

    return spread(ViTModel(ViTConfig(**SMALL, **IMAGE) if small else ViTConfig())), image(small)


@family(197, 1, "vit.layers")
def vit_classifier(small: bool) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**SMALL, **IMAGE, num_labels=10) if small else ViTConfig(num_labels=1000)
    return spread(ViTForImageClassification(config)), image(small)


@family(198, 2, "deit.layers")
def deit_distilled(small: bool) -> Any:
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    config = (
        DeiTConfig(**SMALL, **IMAGE, num_labels=10)
        if small
        else DeiTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000)
    )
    return spread(DeiTForImageClassificationWithTeacher(config)), image(small)


@family(257, 1, "encoder.layer")
def dinov2(small: bool) -> Any:
    from transformers import Dinov2Config, Dinov2Model

    if small:
        return spread(
            Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, **IMAGE))
        ), image(True)
    return Dinov2Model.from_pretrained(shared("dinov2_small_saliency"), dtype=torch.float32), image(False)


@family(261, 5, "encoder.layer")
def dinov2_registers(small: bool) -> Any:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    sizes: Any = (
        {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, **IMAGE}
        if small
        else {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
    )
    return spread(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=4))), image(small)


@family(50, 1, "vision_model.encoder.layers")
def clip_vision(small: bool) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**SMALL, **IMAGE, projection_dim=16) if small else CLIPVisionConfig()
    return spread(CLIPVisionModelWithProjection(config)), image(small)


@family(50, 1, "vision_model.encoder.layers")
def clip(small: bool) -> Any:
    from transformers import CLIPConfig, CLIPModel

    config = (
        CLIPConfig(
            text_config={
                **SMALL,
                "vocab_size": 99,
                "max_position_embeddings": 12,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 0,
            },
            vision_config={**SMALL, **IMAGE},
            projection_dim=16,
        )
        if small
        else CLIPConfig()
    )
    words = 12 if small else 77
    ids = torch.randint(3, 90, (2, words), generator=torch.Generator().manual_seed(4))
    ids[:, -1] = config.text_config.eos_token_id
    return spread(CLIPModel(config)), {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image(small)}


@family(196, 0, "encoder.layers")
def siglip(small: bool) -> Any:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return spread(SiglipVisionModel(SiglipVisionConfig(**SMALL, **IMAGE) if small else SiglipVisionConfig())), image(
        small
    )


@family(1214, 2, "audio_spectrogram_transformer.layers")
def ast(small: bool) -> Any:
    from transformers import ASTConfig, ASTForAudioClassification

    config = (
        ASTConfig(
            **SMALL, max_length=64, num_mel_bins=32, patch_size=8, frequency_stride=6, time_stride=6, num_labels=5
        )
        if small
        else ASTConfig(num_labels=527)
    )
    return spread(ASTForAudioClassification(config)), {
        "input_values": torch.randn(
            1, config.max_length, config.num_mel_bins, generator=torch.Generator().manual_seed(5)
        )
    }


@family(1500, 0, "layers")
def whisper(small: bool) -> Any:
    from transformers import WhisperConfig, WhisperModel

    if small:
        model = spread(
            WhisperModel(
                WhisperConfig(
                    d_model=32,
                    encoder_layers=3,
                    decoder_layers=1,
                    encoder_attention_heads=2,
                    decoder_attention_heads=2,
                    encoder_ffn_dim=48,
                    decoder_ffn_dim=48,
                    max_source_positions=60,
                    num_mel_bins=20,
                    vocab_size=64,
                    pad_token_id=0,
                    bos_token_id=1,
                    eos_token_id=2,
                    decoder_start_token_id=1,
                )
            )
        )
        return model.get_encoder(), {"input_features": torch.randn(1, 20, 120)}
    model = WhisperModel.from_pretrained(shared("whisper_tiny_en"), dtype=torch.float32)
    return model.get_encoder(), {"input_features": torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(6))}


def speech(config: Any, small: bool) -> dict[str, Tensor]:
    return {"input_values": torch.randn(1, 8000 if small else 16000, generator=torch.Generator().manual_seed(7))}


SPEECH = {**SMALL, "conv_dim": (16,) * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}


@family(49, 0, "encoder.layers")
def wav2vec2(small: bool) -> Any:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(**SPEECH) if small else Wav2Vec2Config()
    return spread(Wav2Vec2Model(config)), speech(config, small)


@family(49, 0, "encoder.layers")
def wav2vec2_large(small: bool) -> Any:
    """The pre-norm variant (`do_stable_layer_norm`), at 6 of its 24 blocks."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    stable = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}
    config = (
        Wav2Vec2Config(**SPEECH, **stable)
        if small
        else Wav2Vec2Config(
            hidden_size=1024, num_attention_heads=16, intermediate_size=4096, num_hidden_layers=6, **stable
        )
    )
    return spread(Wav2Vec2Model(config)), speech(config, small)


@family(49, 0, "encoder.layers")
def hubert(small: bool) -> Any:
    from transformers import HubertConfig, HubertModel

    config = HubertConfig(**SPEECH) if small else HubertConfig()
    return spread(HubertModel(config)), speech(config, small)


def video(frames: int, side: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, frames, 3, side, side, generator=torch.Generator().manual_seed(8))}


VIDEO = {"image_size": 32, "patch_size": 8, "num_frames": 4}


@family(1568, 0, "encoder.layer")
def videomae(small: bool) -> Any:
    """At 4 of its 12 blocks, to save time."""
    from transformers import VideoMAEConfig, VideoMAEModel

    config = VideoMAEConfig(**SMALL, **VIDEO) if small else VideoMAEConfig(num_hidden_layers=4)
    return spread(VideoMAEModel(config)), video(config.num_frames, config.image_size)


@family(1568, 0, "videomae.encoder.layer")
def videomae_classifier(small: bool) -> Any:
    """At 3 of its 12 blocks, to save time."""
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    config = (
        VideoMAEConfig(**SMALL, **VIDEO, num_labels=5) if small else VideoMAEConfig(num_labels=400, num_hidden_layers=3)
    )
    return spread(VideoMAEForVideoClassification(config)), video(config.num_frames, config.image_size)


@family(3137, 1, "layers")
def vivit(small: bool) -> Any:
    """At 2 of its 12 blocks: attention maps of 12 heads x 3137 x 3137 in the eager reference take 470 MB a block."""
    from transformers import VivitConfig, VivitModel

    config = (
        VivitConfig(**SMALL, **{k: v for k, v in VIDEO.items() if k != "patch_size"}, tubelet_size=[2, 8, 8])
        if small
        else VivitConfig(num_hidden_layers=2)
    )
    return spread(VivitModel(config)), video(config.num_frames, config.image_size)


@family(1569, 1, "", refused="part of the tokens")
def timesformer(small: bool) -> Any:
    from transformers import TimesformerConfig, TimesformerModel

    config = TimesformerConfig(**SMALL, **VIDEO) if small else TimesformerConfig(num_hidden_layers=2)
    return spread(TimesformerModel(config)), video(config.num_frames, config.image_size)


@family(99, 1, "b", small=False)
def kwt1(small: bool) -> Any:
    path = shared("kwt1") / "kwt.py"
    spec = importlib.util.spec_from_file_location("kwt", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(), {"x": torch.randn(2, 98, 40, generator=torch.Generator().manual_seed(9))}


@family(197, 1, "layers")
def beit(small: bool) -> Any:
    from transformers import BeitConfig, BeitModel

    options = {"use_relative_position_bias": True, "use_absolute_position_embeddings": False, "use_mean_pooling": True}
    config = BeitConfig(**SMALL, **IMAGE, **options) if small else BeitConfig(**options)
    return spread(BeitModel(config)), image(small)


@family(201, 5, "model.layer")
def dinov3(small: bool) -> Any:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    sizes: Any = (
        {**SMALL, **IMAGE}
        if small
        else {
            "hidden_size": 384,
            "num_attention_heads": 6,
            "intermediate_size": 1536,
            "num_hidden_layers": 12,
            "image_size": 224,
        }
    )
    return spread(DINOv3ViTModel(DINOv3ViTConfig(**sizes, num_register_tokens=4))), image(small)


@family(3136, 0, "", refused="part of the tokens")
def swin(small: bool) -> Any:
    from transformers import SwinConfig, SwinModel

    config = (
        SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4)
        if small
        else SwinConfig(depths=[2, 2, 2, 2])
    )
    side = config.image_size
    return spread(SwinModel(config)), {"pixel_values": torch.randn(1, 3, side, side)}


@family(0, 0, "", refused="no attention")
def convnext(small: bool) -> Any:
    from transformers import ConvNextConfig, ConvNextModel

    config = ConvNextConfig(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1]) if small else ConvNextConfig()
    return spread(ConvNextModel(config)), {
        "pixel_values": torch.randn(1, 3, 64 if small else 224, 64 if small else 224)
    }


@family(0, 0, "", refused="no attention")
def resnet(small: bool) -> Any:
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return spread(ResNetModel(config)), {"pixel_values": torch.randn(1, 3, 64, 64)}
