"""Audio-language models of several families, small and with the structure of the real ones, with random weights; and compression in
them as research code does it. The reference shares nothing with edgewise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from vlm_families import noise
from vlm_pruned import divprune, fastv
from vlm_reference import IMAGE as MARK
from vlm_reference import text_config
from vlm_zipped import zip_tokens

import edgewise

BINS, FRAMES, REAL = 16, 100, 80
"""Of the features: bins, frames, and how many of these are of the recording, for families that are told it."""
_TOWER = {"num_mel_bins": BINS, "max_source_positions": FRAMES // 2, "initializer_range": 0.2}
_NAMED = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, **_TOWER}


def _qwen2_audio() -> Any:
    from transformers.models.qwen2_audio.configuration_qwen2_audio import Qwen2AudioEncoderConfig

    tower = Qwen2AudioEncoderConfig(d_model=32, encoder_layers=4, encoder_attention_heads=2, encoder_ffn_dim=64, **_TOWER)
    config = hf.Qwen2AudioConfig(
        audio_config=tower, text_config=text_config(hf.Qwen2Config), audio_token_id=MARK, audio_token_index=MARK
    )
    return hf.Qwen2AudioForConditionalGeneration(config)


def _audioflamingo3() -> Any:
    tower = {**_NAMED, "intermediate_size": 64}
    config = hf.AudioFlamingo3Config(
        audio_config=tower, text_config=text_config(hf.Qwen2Config).to_dict(), audio_token_id=MARK
    )
    return hf.AudioFlamingo3ForConditionalGeneration(config)


def _voxtral() -> Any:
    # Two tokens of the tower are one of the decoder.
    tower = {**_NAMED, "intermediate_size": 64}
    config = hf.VoxtralConfig(audio_config=tower, text_config=text_config().to_dict(), audio_token_id=MARK)
    return hf.VoxtralForConditionalGeneration(config)


def _glmasr() -> Any:
    tower = {**_NAMED, "intermediate_size": 128}
    tower["max_position_embeddings"] = tower.pop("max_source_positions") + 14
    config = hf.GlmAsrConfig(audio_config=tower, text_config=text_config().to_dict(), audio_token_id=MARK)
    return hf.GlmAsrForConditionalGeneration(config)


def _granite_speech() -> Any:
    tower = {"input_dim": 2 * BINS, "hidden_dim": 32, "num_layers": 2, "num_heads": 2, "dim_head": 16, "output_dim": 20}
    tower |= {"context_size": 20, "conv_kernel_size": 5, "max_pos_emb": 32, "feedforward_mult": 2}
    # Queries read windows of ten of the tower's tokens.
    queries = {"model_type": "blip_2_qformer", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    queries |= {"intermediate_size": 64, "encoder_hidden_size": 32, "initializer_range": 0.2}
    config = hf.GraniteSpeechConfig(
        encoder_config=tower,
        text_config=text_config(hf.GraniteConfig).to_dict(),
        projector_config=queries,
        audio_token_index=MARK,
        has_lora_adapter=False,
        window_size=10,
        downsample_rate=2,
    )
    return hf.GraniteSpeechForConditionalGeneration(config)


FAMILIES: dict[str, tuple[Callable[[], Any], str | None]] = {
    "qwen2-audio": (_qwen2_audio, "feature_attention_mask"),
    "audioflamingo3": (_audioflamingo3, "input_features_mask"),
    "voxtral": (_voxtral, None),
    "glmasr": (_glmasr, "input_features_mask"),
    "granite-speech": (_granite_speech, None),
}


def make(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A model in evaluation mode, the same every time, and its example inputs; a mask of frames is as long as the recording."""
    torch.manual_seed(0)
    build, mask = FAMILIES[name]
    frames = 96 if name == "glmasr" else FRAMES  # its projector reads the tower's tokens in fours
    masks = {mask: torch.ones(1, REAL, dtype=torch.int64)} if mask else {}
    shape = (1, FRAMES, 2 * BINS) if name == "granite-speech" else (1, BINS, frames)
    return build().eval(), {"input_features": noise(*shape), **masks}


def greedy(model: Any, features: Tensor, before: list[int], after: list[int], count: int, new: int, mask: str | None) -> list[int]:
    """What the model itself generates, told of its tokens and frames what the model's processor would say."""
    ids = torch.tensor([[*before, *[MARK] * count, *after]])
    model.generation_config.eos_token_id = None
    masks = {mask: (torch.arange(features.shape[-1]) < REAL).long()[None]} if mask else {}
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "input_features": features, **masks}
    with torch.no_grad():
        made = model.generate(**given, max_new_tokens=new, do_sample=False)
    return made[0, ids.shape[1] :].tolist()


@contextmanager
def behind_projector(model: Any, real: int, choose: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While this holds, the decoder is given what `choose` leaves of the recording's `real` tokens `(real, C)`."""

    def fewer(module: Any, args: Any, out: Tensor) -> Tensor:
        few = choose(out.reshape(-1, out.shape[-1])[:real])
        return few if out.ndim == 2 else few[None]

    parts = dict(model.model.named_children())
    handle = parts.get("multi_modal_projector", parts.get("projector")).register_forward_hook(fewer)
    try:
        yield
    finally:
        handle.remove()


STACKED = {"qwen2-audio": 2, "audioflamingo3": 2, "voxtral": 2, "glmasr": 4}
"""Of how many of the encoder's tokens one behind the projector is made."""


@contextmanager
def watched(model: Any) -> Iterator[dict[str, Tensor]]:
    """While this holds, the attention maps `(1, heads, N, N)` and keys of the audio encoder's last layer, as it last ran."""
    seen: dict[str, Tensor] = {}
    run, last = ALL_ATTENTION_FUNCTIONS["sdpa"], model.model.audio_tower.layers[-1].self_attn
    model.model.audio_tower.set_attn_implementation("sdpa")

    def spy(
        module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None = None, **given: Any
    ) -> tuple[Tensor, Tensor | None]:
        if module is last:
            logits = q @ k.transpose(-1, -2) * given["scaling"]
            if attention_mask is not None:
                masked = attention_mask.dtype == torch.bool
                logits = logits.masked_fill(~attention_mask, -torch.inf) if masked else logits + attention_mask
            seen.update(maps=logits.softmax(dim=-1), keys=k)
        return run(module, q, k, v, attention_mask, **given)  # type: ignore[no-any-return]

    ALL_ATTENTION_FUNCTIONS["sdpa"] = spy
    try:
        yield seen
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = run


def zip_audio(tokens: Tensor, stacked: int, seen: dict[str, Tensor], dominant: int, context: int) -> Tensor:
    """VisionZip of tokens `(real, C)` that are each made of `stacked` of the encoder's; what is behind the recording's end is in
    none, and asks for none."""
    count = len(tokens) * stacked
    score = seen["maps"][0].mean(dim=0)[:count].mean(dim=0)[:count].reshape(-1, stacked).mean(dim=1)
    keys = seen["keys"][0].mean(dim=0)[:count].reshape(len(tokens), stacked, -1).mean(dim=1)
    return zip_tokens(tokens, score, keys, dominant, context)[0]


BLOCK, KEEP, CONTEXT, FAST, NEW = 2, 9, 3, 5, 32
PROMPTS = [([1, 5, 6], [7, 8, 9]), ([], [4])]


def check(name: str, method: str, out: Path, targets: tuple[str, ...]) -> edgewise.Bundle:
    """Export a family, plain (""), or with DivPrune or VisionZip behind the projector and FastV inside of the decoder, and compare
    every token that it generates with the model in transformers, whose features are replaced and whose layers are hooked."""
    model, example = make(name)
    ahead = {"divprune": f"divprune@projector.out:keep={KEEP}", "visionzip": f"visionzip:keep={KEEP - CONTEXT},context={CONTEXT}"}
    specs = [ahead[method], f"fastv@decoder.block[{BLOCK}]:keep={FAST}"] if method else []
    bundle = edgewise.export(
        model, out, example=example, targets=targets, compress=specs, prompt_tokens=10, new_tokens=NEW, cache=False
    )
    about = bundle.manifest.pipeline
    assert about is not None and about.kind == "audio-language"
    real, count = about.stages[0].tokens_before, about.media_tokens
    assert [cache.media for cache in about.caches] == ([KEEP] * BLOCK + [FAST] * (4 - BLOCK) if method else [real] * 4)
    # Of Granite's tokens for seed 6, the two farthest from all are nearest to one another: DivPrune's first pick would be a tie.
    seed = 7 if name == "granite-speech" else 6
    features, mask, wanted = noise(*example["input_features"].shape, seed=seed), FAMILIES[name][1], []
    for before, after in PROMPTS:
        model, _ = make(name)
        with ExitStack() as stack:
            if method:
                stack.enter_context(fastv(model, BLOCK, FAST, range(len(before), len(before) + KEEP)))
            if method == "divprune":
                stack.enter_context(behind_projector(model, real, lambda x: x[divprune(x, KEEP)]))
            if method == "visionzip":
                how = {"stacked": STACKED[name], "seen": stack.enter_context(watched(model))}
                zipped = partial(zip_audio, **how, dominant=KEEP - CONTEXT, context=CONTEXT)
                stack.enter_context(behind_projector(model, real, zipped))
            wanted.append(greedy(model, features, before, after, count, NEW, mask))
        assert len(set(wanted[-1])) > 8
    for target in targets:
        with edgewise.load(bundle, target=target) as loaded:
            for (before, after), ids in zip(PROMPTS, wanted, strict=True):
                assert loaded.generate(input_ids=[*before, MARK, *after], audio=features.numpy()).ids == ids, (name, target)
    return bundle
