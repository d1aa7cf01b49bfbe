"""Export of an encoder-decoder speech model: what its decoder begins with and may not say, and its components."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewise.bundle.manifest import Manifest
from edgewise.bundle.pipeline import CacheLayer, Pipeline, Stage
from edgewise.errors import InputError
from edgewise.exporter.capture import evaluating, quiet
from edgewise.exporter.job import Job
from edgewise.exporter.pipeline.language import eos_ids, write_tokenizer
from edgewise.exporter.pipeline.parts import Build, cache_layers, flops_of, run, source_of
from edgewise.exporter.pipeline.speech import AudioEncoder, Decode, Prefill
from edgewise.exporter.sources import Source
from edgewise.runtime.mel import DEFAULTS
from edgewise.verify.ladder import Rung, judge

ORDER = ("audio_encoder", "prefill", "decode")
THRESHOLD = 1e-4
"""Largest relative error of the components, joined, against the whole model."""

_FEATURES = "input_features"
_CROSS = ("cross_key", "cross_value")
_STEPS = 3
"""New tokens whose logits are compared with those of the whole model."""


def speech_model(source: Source) -> Any:
    """The speech model of a source that its encoder and its decoder make together; None if it is no such model: one that takes
    audio features, generates text, and is told the positions of its tokens."""
    model: Any = source.whole if source.whole is not None else source.module
    if model is None or not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    needed = ("get_encoder", "get_decoder", "get_output_embeddings", "can_generate", "generate")
    if getattr(model, "main_input_name", "") != _FEATURES or not all(
        callable(getattr(model, name, None)) for name in needed
    ):
        return None
    takes = inspect.signature(model.get_decoder().forward).parameters
    whole = model.can_generate() and {"position_ids", "encoder_hidden_states", "past_key_values"} <= set(takes)
    return model if whole and model.get_output_embeddings() is not None else None


def is_pipeline(source: Source) -> bool:
    """Whether a model is one that writes down what is said."""
    return speech_model(source) is not None


def build_pipeline(job: Job, folder: Path) -> Manifest:
    """Build all of a bundle but its manifest file."""
    return _Build(job, folder).build()


class _Build(Build):
    kind = "speech"

    @property
    def order(self) -> tuple[str, ...]:
        return ORDER

    def run(self) -> Manifest:
        model = speech_model(self.job.source)
        features = self._example(model)
        self.job.source = source = replace(
            self.job.source,
            module=model,
            class_name=type(model).__name__,
            notes=(),
            preprocessing=self._preprocessing(features),
        )
        begin = beginning(model)
        start = [begin["start_ids"][0], *_between(begin["settings"]), *begin["start_ids"][1:]]
        longest, most = len(begin["start_ids"]) + _most_between(begin["settings"]), begin["settings"]["positions"]
        bucket, room = self._sizes(longest, most - min(len(start), longest))
        self.job.step("run the whole model")
        rung = compare_whole(model, features, start, bucket)
        program = self.component(
            "audio_encoder",
            Source("", "", module=AudioEncoder(model), args=(features,), samples=source.samples),
            self.job.recipe.compress,
        )
        some = [{_FEATURES: one} for one in (features, _noise(features, self.job.recipe.seed))]
        encoded = [_listed(run(program, one), "cross_") for one in some]
        feeds = [{**prompt(ids, bucket), **encoded[i % 2]} for i, ids in enumerate((start, start[:1]))]
        program = self.component("prefill", source_of(Prefill(model), feeds))
        steps = [_decode_inputs(run(program, one), one, room, step) for one, step in zip(feeds, (0, 2), strict=True)]
        self.component("decode", source_of(Decode(model, bucket), steps), room=room)
        layers = cache_layers(self.parts[2], bucket, room)
        pipeline = Pipeline(
            kind="speech",
            order=ORDER,
            prompt_tokens=bucket,
            new_tokens=room,
            media_tokens=encoded[0]["cross_key"][0].shape[2],
            eos_ids=eos_ids(model),
            caches=layers,
            stages=self._stages(model, features, layers, feeds[0], steps[0], bucket),
            tokenizer=write_tokenizer(source, self.folder),
            **begin,
        )
        return self.joined(rung, pipeline, model)

    def _stages(
        self,
        model: Any,
        features: Tensor,
        layers: tuple[CacheLayer, ...],
        feeds: dict[str, Any],
        step: dict[str, Any],
        bucket: int,
    ) -> tuple[Stage, ...]:
        """What compression makes of each component: `feeds` and `step` are the inputs of prefill and decode, with its tokens. All
        read what cross-attention keeps of the encoder's tokens, and the decoder has its own caches besides."""
        with evaluating(model), quiet():
            whole = _listed(AudioEncoder(model)(features), "cross_")
        parts = [part.components[0] for part in self.parts]
        every, left = (cross["cross_key"][0].shape[2] for cross in (whole, feeds))
        before = [one.flops_before for one in parts]
        if every != left:
            before[1] = flops_of(Prefill(model), {**feeds, **whole})
            before[2] = flops_of(Decode(model, bucket), {**step, **whole})
        bytes_whole, bytes_left = (sum(t.nbytes for one in _CROSS for t in cross[one]) for cross in (whole, feeds))
        own = [0, *[sum(layer.bytes for layer in layers)] * 2]
        return tuple(
            Stage(
                role=one.role,
                tokens_before=every,
                tokens=left,
                flops_before=count,
                flops=one.flops_after,
                cache_bytes_before=bytes_whole + held,
                cache_bytes=bytes_left + held,
            )
            for one, count, held in zip(parts, before, own, strict=True)
        )

    def _example(self, model: Any) -> Tensor:
        given = self.job.source.kwargs or dict(zip((_FEATURES,), self.job.source.args, strict=False))
        features = given.get(_FEATURES)
        if features is None or features.ndim != 3:
            raise InputError(
                f"{type(model).__name__} takes audio as {_FEATURES} (1, bins, frames): give an example "
                f"(example={{'{_FEATURES}': tensor}}), or --input-shapes {_FEATURES}=1xBxF"
            )
        if features.shape[0] != 1:
            raise InputError(
                f"a speech model is exported for one recording at a time: batch={features.shape[0]}, give 1"
            )
        return features  # type: ignore[no-any-return]

    def _preprocessing(self, features: Tensor) -> dict[str, Any]:
        """The constants of the processor; those of Whisper's where the model comes without."""
        return {**DEFAULTS, "feature_size": features.shape[1], **self.job.source.preprocessing}

    def _sizes(self, longest: int, room: int) -> tuple[int, int]:
        """The prompt's bucket, and the room for new tokens."""
        recipe = self.job.recipe
        if recipe.prompt_tokens is not None and recipe.prompt_tokens < longest:
            raise InputError(
                f"--prompt-tokens {recipe.prompt_tokens}: this model's decoder begins with up to {longest} tokens"
            )
        if recipe.new_tokens is not None and recipe.new_tokens > room:
            raise InputError(f"--new-tokens {recipe.new_tokens}: this model has positions for {room} new tokens")
        return recipe.prompt_tokens or longest, recipe.new_tokens or room


# -- what is said before the text, and never


def beginning(model: Any) -> dict[str, Any]:
    """The fields of `Pipeline` that say how the model's own `generate` begins a transcript, and what it suppresses.

    The source is the generation configuration: `forced_decoder_ids` of older models, or `language` and `task`; no timestamps.
    """
    config: Any = model.generation_config
    languages = {name.strip("<|>"): i for name, i in (getattr(config, "lang_to_id", None) or {}).items()}
    tasks = dict(getattr(config, "task_to_id", None) or {}) if languages else {}
    language, task = getattr(config, "language", None), getattr(config, "task", None)
    start, no_times = [int(config.decoder_start_token_id)], getattr(config, "no_timestamps_token_id", None)
    forced = getattr(config, "forced_decoder_ids", None) or getattr(model.config, "forced_decoder_ids", None) or ()
    named = {i: name for known in (languages, tasks) for name, i in known.items()}
    for _, token in forced if language is None and task is None else ():
        if token in languages.values():
            language = named[token]
        elif token in tasks.values():
            task = named[token]
        elif token is not None:
            start.append(int(token))
    if no_times is not None and start[-1] != no_times:
        start.append(int(no_times))
    names = _language_names(languages)
    language = None if language is None else names.get(language.lower(), language.lower().strip("<|>"))
    return {
        "start_ids": tuple(start),
        "suppress_ids": tuple(config.suppress_tokens or ()),
        "suppress_first_ids": tuple(config.begin_suppress_tokens or ()),
        "settings": {
            "languages": languages,
            "language_names": names,
            "language": language,
            "tasks": tasks,
            "task": task if task is not None or language is None or not tasks else "transcribe",
            "positions": _positions(model),
            "text_ids": int(model.get_output_embeddings().weight.shape[0]) if no_times is None else int(no_times) + 1,
        },
    }


def _language_names(languages: Mapping[str, int]) -> dict[str, str]:
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    return {name: code for name, code in TO_LANGUAGE_CODE.items() if code in languages}


def _positions(model: Any) -> int:
    """The most tokens that the decoder has positions for."""
    config = model.get_decoder().config
    for name in ("max_target_positions", "max_position_embeddings"):
        found = getattr(config, name, None)
        if found is not None:
            return int(found)
    raise InputError(f"{type(model).__name__} does not say how many positions its decoder has (max_target_positions)")


def _between(settings: Mapping[str, Any]) -> list[int]:
    """Example ids of the language and the task that a transcript begins with."""
    if not settings["languages"]:
        return []
    language = settings["language"] or next(iter(settings["languages"]))
    return [settings["languages"][language], *([settings["tasks"][settings["task"]]] if settings["task"] else [])]


def _most_between(settings: Mapping[str, Any]) -> int:
    return bool(settings["languages"]) + bool(settings["tasks"])


# -- inputs


def prompt(ids: Sequence[int], bucket: int) -> dict[str, Tensor]:
    """Inputs of prefill besides the encoder's: the bucket is filled from its end."""
    padded, position = torch.zeros(1, bucket, dtype=torch.int64), torch.full((1, bucket), -1)
    padded[0, bucket - len(ids) :], position[0, bucket - len(ids) :] = torch.tensor(ids), torch.arange(len(ids))
    return {"input_ids": padded, "position": position}


def compare_whole(model: Any, features: Tensor, start: list[int], bucket: int) -> Rung:
    """Compare the components, joined, with the whole model, over a few tokens.

    Raises InputError if they differ: the model is of a kind that this pipeline does not know.
    """
    ids = [*start, *(i % model.config.vocab_size for i in range(7, 7 + _STEPS))]
    with evaluating(model), quiet():
        wanted = model(input_features=features, decoder_input_ids=torch.tensor([ids])).logits[0, len(start) - 1 :]
        try:
            found = _joined(model, features, start, ids[len(start) :], bucket)
        except (TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise InputError(f"{type(model).__name__} cannot be split into {', '.join(ORDER)}: {error}") from error
    rung = judge(
        "components, joined",
        "whole model",
        "capture",
        {"logits": wanted.numpy()},
        {"logits": found.numpy()},
        threshold=THRESHOLD,
    )
    if not rung.passed:
        raise InputError(
            f"{type(model).__name__} cannot be split: {', '.join(ORDER)}, joined, give other logits than the whole model "
            f"(relative error {rung.outputs['logits'].relative:.1e}); export its encoder alone (example=..., model.get_encoder())"
        )
    return rung


def _joined(model: nn.Module, features: Tensor, start: Sequence[int], more: Sequence[int], bucket: int) -> Tensor:
    """Logits `(tokens, V)` of the last token of `start` and of every one of `more`."""
    cross = _listed(AudioEncoder(model)(features), "cross_")
    feeds = {**prompt(start, bucket), **cross}
    made = Prefill(model)(**feeds)
    logits, room = [made["logits"]], len(more)
    state = _decode_inputs(made, feeds, room, 0)
    for step, token in enumerate(more):
        state |= {
            "input_ids": torch.tensor([[token]]),
            "position": torch.tensor([[len(start) + step]]),
            "step": torch.tensor([step]),
        }
        made = Decode(model, bucket)(**state)
        logits.append(made["logits"])
        for kind in ("key", "value"):
            for i, cache in enumerate(state[f"past_{kind}"]):
                cache[:, :, bucket + step] = made[f"{kind}_{i}"][:, :, 0]
    return torch.cat(logits)


def _listed(outputs: Mapping[str, Tensor], prefix: str = "") -> dict[str, list[Tensor]]:
    """`prefix + key_i`, `prefix + value_i` as two lists."""
    count = sum(name.startswith(f"{prefix}key_") for name in outputs)
    return {f"{prefix}{kind}": [outputs[f"{prefix}{kind}_{i}"] for i in range(count)] for kind in ("key", "value")}


def _decode_inputs(made: Mapping[str, Tensor], feeds: Mapping[str, Any], room: int, step: int) -> dict[str, Any]:
    """Inputs of decode behind what prefill made of `feeds`, with copies of the last token as the first `step` new ones."""
    step = min(step, room - 1)
    length = int((feeds["position"] >= 0).sum())
    past = {
        f"past_{kind}": [
            torch.cat(
                [t, t[:, :, -1:].expand(-1, -1, step, -1), t.new_zeros(*t.shape[:2], room - step, t.shape[3])], dim=2
            )
            for t in tensors
        ]
        for kind, tensors in _listed(made).items()
    }
    return {
        "input_ids": feeds["input_ids"][:, -1:],
        "position": torch.tensor([[length + step]]),
        "length": torch.tensor([length]),
        "step": torch.tensor([step]),
        **{name: feeds[name] for name in _CROSS},
        **past,
    }


def _noise(features: Tensor, seed: int) -> Tensor:
    """Other features of the same spread."""
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(seed + 1))
    return noise * features.std() + features.mean()
