"""What `train_vqa.py` trains: the LLaVA and its processor."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from edgewise.demos import scenes
from edgewise.demos.drawing import SHAPES

PATCH = 8
GRID = scenes.SIZE // PATCH

CHAT = (
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A new LLaVA: a CLIP vision tower of 196 patches and a Llama decoder, four layers each."""
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    vision = CLIPVisionConfig(
        image_size=scenes.SIZE,
        patch_size=PATCH,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        projection_dim=96,
        initializer_range=0.06,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=256,
        max_position_embeddings=512,
        initializer_range=0.06,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=GRID**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        **special,
    )
    model = LlavaForConditionalGeneration(config)
    embeddings = next(m for name, m in model.model.vision_tower.named_modules() if name.endswith("embeddings"))
    with torch.no_grad():
        embeddings.position_embedding.weight[1:] = 0.3 * waves(vision.hidden_size)
    for name, value in special.items():
        setattr(model.generation_config, name, value)
    return model


def waves(width: int) -> Tensor:
    """Where each patch is, `(patches, width)`, as waves over columns and rows: a start for embeddings of position, with
    which near patches find each other soon."""
    phase = torch.arange(GRID).unsqueeze(1) * 20.0 ** -torch.linspace(0, 1, width // 4)
    along = torch.cat((phase.sin(), phase.cos()), dim=1)
    return torch.cat((along.repeat(GRID, 1), along.repeat_interleave(GRID, 0)), dim=1)


def make_processor(folder: Path | None = None) -> LlavaProcessor:
    """The processor that is saved in `folder`, or a new one."""
    if folder is not None:
        return AutoProcessor.from_pretrained(folder)
    size = {"height": scenes.SIZE, "width": scenes.SIZE}
    images = CLIPImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        images,
        make_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words, in lower case: all that a question or an answer may hold."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>"]
    fixed = [
        "user",
        "assistant",
        ":",
        "?",
        "what",
        "colour",
        "shape",
        "is",
        "the",
        "how",
        "many",
        "are",
        "there",
        "where",
        "thing",
        "things",
        "yes",
        "no",
    ]
    fixed += ["top", "bottom", "left", "right", "of", "above", "below", "larger", "smaller", "than", "more", "fewer"]
    shapes = [word for shape in SHAPES for word in (shape, scenes.plural(shape))]
    words = [*special, *fixed, *shapes, *scenes.COLOURS, *scenes.RADII, *scenes.NUMBERS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", words.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
    )
