"""Vision-language models of many families, small and with the structure of the real ones, with random weights.

Each gives a model and the example inputs that describe one image. Weights are large, so that texts are no loops of a few tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from vlm_reference import IMAGE, VIDEO, llava, text_config, vision_config

Family = tuple[Any, dict[str, Any]]
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
MARKS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 97, "vision_end_token_id": 96}
TILES = [[32, 64], [64, 32], [64, 64]]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def siglip() -> Any:
    return vision_config(hf.SiglipVisionConfig)


def _llava() -> Family:
    return llava(), {"pixel_values": noise(1, 3, 32, 32)}


def _paligemma() -> Family:
    text = text_config(hf.GemmaConfig, head_dim=12, tie_word_embeddings=False)
    config = hf.PaliGemmaConfig(
        vision_config=siglip().to_dict() | {"projection_dim": 48},
        text_config=text.to_dict(),
        image_token_id=IMAGE,
        projection_dim=48,
        hidden_size=48,
        tie_word_embeddings=False,
    )
    return hf.PaliGemmaForConditionalGeneration(config), {"pixel_values": noise(1, 3, 32, 32)}


def _gemma3() -> Family:
    kinds = ["sliding_attention", "full_attention"] * 2
    text = text_config(hf.Gemma3TextConfig, head_dim=12, sliding_window=512, layer_types=kinds, tie_word_embeddings=False)
    config = hf.Gemma3Config(
        vision_config=siglip().to_dict(),
        text_config=text.to_dict(),
        mm_tokens_per_image=16,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    return hf.Gemma3ForConditionalGeneration(config), {"pixel_values": noise(1, 3, 32, 32)}


def _internvl() -> Family:
    vision = vision_config(hf.InternVLVisionConfig, image_size=[32, 32], patch_size=[4, 4])
    config = hf.InternVLConfig(
        vision_config=vision.to_dict(), text_config=text_config(hf.Qwen2Config).to_dict(), image_token_id=IMAGE
    )
    return hf.InternVLForConditionalGeneration(config), {"pixel_values": noise(1, 3, 32, 32)}


def _idefics3() -> Family:
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig

    config = hf.Idefics3Config(
        vision_config=vision_config(Idefics3VisionConfig).to_dict(), text_config=text_config(), image_token_id=IMAGE, scale_factor=2
    )
    return hf.Idefics3ForConditionalGeneration(config), {"pixel_values": noise(1, 2, 3, 32, 32)}


def _smolvlm() -> Family:
    from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

    config = hf.SmolVLMConfig(
        vision_config=vision_config(SmolVLMVisionConfig).to_dict(), text_config=text_config(), image_token_id=IMAGE, scale_factor=2
    )
    return hf.SmolVLMForConditionalGeneration(config), {"pixel_values": noise(1, 2, 3, 32, 32)}


def _tiled() -> dict[str, Any]:
    return {"pixel_values": noise(1, 5, 3, 32, 32), "image_sizes": torch.tensor([[60, 50]])}


def _llava_next() -> Family:
    config = hf.LlavaNextConfig(
        vision_config=vision_config(), text_config=text_config(), image_token_id=IMAGE, image_grid_pinpoints=TILES
    )
    return hf.LlavaNextForConditionalGeneration(config), _tiled()


def _llava_onevision() -> Family:
    config = hf.LlavaOnevisionConfig(
        vision_config=siglip(),
        text_config=text_config(hf.Qwen2Config),
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=TILES,
    )
    return hf.LlavaOnevisionForConditionalGeneration(config), _tiled()


def _patches() -> dict[str, Any]:
    return {"pixel_values": noise(64, 3 * 2 * 16), "image_grid_thw": torch.tensor([[1, 8, 8]])}


_VISION = {"depth": 4, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


def _qwen2_vl() -> Family:
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig

    text = text_config(Qwen2VLTextConfig, rope_parameters=ROPE).to_dict()
    vision = {**_VISION, "embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}
    model = hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(vision_config=vision, text_config=text, **MARKS))
    return model, _patches()


def _qwen2_5_vl() -> Family:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

    text = text_config(Qwen2_5_VLTextConfig, rope_parameters=ROPE).to_dict()
    vision = {
        **_VISION,
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 48,
        "window_size": 16,
        "fullatt_block_indexes": [1, 3],
    }
    model = hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **MARKS))
    return model, _patches()


def hunyuan_vl() -> Family:
    """Of a kind that no pipeline takes: an image's tokens have places that do not move with text. Its patches lie row by row."""
    from transformers.models.hunyuan_vl.configuration_hunyuan_vl import HunYuanVLTextConfig, HunYuanVLVisionConfig

    text = text_config(HunYuanVLTextConfig, head_dim=12, rope_parameters=ROPE)
    vision = vision_config(HunYuanVLVisionConfig, patch_size=4, out_hidden_size=48, text_hidden_size=48)
    marks = {"image_token_id": IMAGE, "im_start_id": 97, "im_end_id": 96, "im_newline_id": 95}
    config = hf.HunYuanVLConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), **marks)
    torch.manual_seed(0)
    model = hf.HunYuanVLForConditionalGeneration(config).eval()
    return model, {"pixel_values": noise(24, 3 * 16), "image_grid_thw": torch.tensor([[1, 4, 6]])}


def deepseek_vl() -> Family:
    """What makes features of an image is a method of the model without a head."""
    vision = vision_config(hf.SiglipVisionConfig, vision_use_head=False)
    config = hf.DeepseekVLConfig(vision_config=vision.to_dict(), text_config=text_config().to_dict(), image_token_id=IMAGE)
    torch.manual_seed(0)
    return hf.DeepseekVLForConditionalGeneration(config).eval(), {"pixel_values": noise(1, 3, 32, 32)}


def blip2() -> Family:
    """Of a kind that no pipeline takes: the whole model runs on no embedded tokens alone."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    queries = hf.Blip2QFormerConfig(**sizes, encoder_hidden_size=32, cross_attention_frequency=1)
    config = hf.Blip2Config(
        vision_config=vision_config(hf.Blip2VisionConfig).to_dict(),
        qformer_config=queries.to_dict(),
        text_config=text_config().to_dict(),
        num_query_tokens=8,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
    )
    torch.manual_seed(0)
    return hf.Blip2ForConditionalGeneration(config).eval(), {"pixel_values": noise(1, 3, 32, 32)}


FAMILIES: dict[str, Callable[[], Family]] = {
    "llava": _llava,
    "llava-next": _llava_next,
    "llava-onevision": _llava_onevision,
    "paligemma": _paligemma,
    "gemma3": _gemma3,
    "internvl": _internvl,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "qwen2-vl": _qwen2_vl,
    "qwen2.5-vl": _qwen2_5_vl,
}


def make(name: str, images: int = 1) -> Family:
    """A model in evaluation mode, the same every time, and its example inputs, for prompts with so many images."""
    torch.manual_seed(0)
    model, example = FAMILIES[name]()
    tiles = name in ("idefics3", "smolvlm")  # of all images one behind the other
    return model.eval(), {k: torch.cat([v] * images, int(tiles and k == "pixel_values")) for k, v in example.items()}


def make_video(name: str) -> Family:
    """The same with an example of a video of four frames."""
    model, _ = make(name)
    if name == "llava-onevision":
        return model, {"pixel_values_videos": noise(1, 4, 3, 32, 32)}
    return model, {"pixel_values_videos": noise(2 * 64, 3 * 2 * 16), "video_grid_thw": torch.tensor([[2, 8, 8]])}


VIDEOS = ("llava-onevision", "qwen2-vl", "qwen2.5-vl")
