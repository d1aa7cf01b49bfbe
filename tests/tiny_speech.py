"""A small speech model with random weights, of the structure of Whisper, as a folder that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS, END, START, LANGUAGES, TASKS = (
    80,
    80,
    81,
    {"<|en|>": 82, "<|de|>": 83, "<|fr|>": 84},
    {"translate": 85, "transcribe": 86},
)
PREVIOUS, NO_TIMES, VOCABULARY = 87, 89, 100
SOON = 64
"""A token that is said often."""
TIMES = range(NO_TIMES + 1, VOCABULARY)
"""Suppressed, as transformers goes on in the recording where a time is said."""
POSITIONS, FRAMES, BINS = 40, 100, 16


def tiny_speech(multilingual: bool = False, **config: Any) -> Any:
    """The model. Its weights are spread so that it does not say the same for every sound."""
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

    sizes = {"encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 2}
    sizes |= {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "num_mel_bins": BINS}
    sizes |= {"max_source_positions": FRAMES // 2, "max_target_positions": POSITIONS, "vocab_size": VOCABULARY}
    tokens = {"pad_token_id": END, "bos_token_id": END, "eos_token_id": END, "decoder_start_token_id": START}
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **tokens, **config)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and name != "model.encoder.embed_positions.weight":
                # Positions and sounds weigh more than the last token, or it would be said again and again.
                spread = 0.1 if "embed_tokens" in name else 1.0 if "embed_positions" in name else 0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
    known: dict[str, Any] = {
        "is_multilingual": multilingual,
        "no_timestamps_token_id": NO_TIMES,
        "max_length": POSITIONS,
    }
    known |= {
        "prev_sot_token_id": PREVIOUS,
        "suppress_tokens": [3, 5, START, PREVIOUS, *TIMES],
        "begin_suppress_tokens": [7, END],
    }
    if multilingual:
        known |= {"lang_to_id": LANGUAGES, "task_to_id": TASKS}
        tokens["eos_token_id"] = SOON  # so that texts end
    model.generation_config = GenerationConfig(**tokens, **known)
    return model


def tiny_speech_folder(folder: Path, multilingual: bool = False) -> Path:
    """The model in a folder, with its tokenizer and the constants of its features (one second of sound)."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

    tiny_speech(multilingual).save_pretrained(folder)
    words = {f"w{i}": i for i in range(WORDS)}
    special = [
        "<|endoftext|>",
        "<|startoftranscript|>",
        *LANGUAGES,
        *(f"<|{t}|>" for t in TASKS),
        "<|startofprev|>",
        "<|nospeech|>",
    ]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens([*special, "<|notimestamps|>"])
    made.add_tokens([f"<|{i / 50:.2f}|>" for i in range(VOCABULARY - NO_TIMES - 1)])
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token=special[0]).save_pretrained(folder)
    constants = {"feature_size": BINS, "chunk_length": 1, "sampling_rate": 16000, "hop_length": 160, "n_fft": 400}
    WhisperFeatureExtractor(**constants).save_pretrained(folder)
    assert json.loads((folder / "preprocessor_config.json").read_text())["hop_length"] == 160
    return folder
