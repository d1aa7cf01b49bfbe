"""An audio-language model: a recording and a prompt to text."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.bundle import Bundle
from edgewise.errors import InputError
from edgewise.runtime.audio import read_audio, resample
from edgewise.runtime.generate import Generation
from edgewise.runtime.mel import DEFAULTS, check_extractor, log_mel, made_here
from edgewise.runtime.pipeline import OnText
from edgewise.runtime.sampling import Sampling
from edgewise.runtime.vision_language import MediaLanguage, check_count


class AudioLanguage(MediaLanguage):
    """`audio_encoder`, `prefill` and `decode` as one model.

    `settings` of the pipeline: `frames`, how many frames of the features are real, where a waveform is made into these here. A
    recording that is shorter is filled up with silence until there.
    """

    kind = "audio-language"
    noun, tokens = "recording", "audio"

    @staticmethod
    def check(bundle: Bundle) -> None:
        """Raise InputError if the bundle holds no pipeline, or one whose settings or constants are wrong."""
        MediaLanguage.check(bundle)
        manifest = bundle.manifest
        assert manifest.pipeline is not None
        shape = manifest.component(manifest.pipeline.order[0]).inputs[0].shape
        if made_here(shape, manifest.preprocessing):
            check_count(bundle, "frames", manifest.pipeline.settings.get("frames"), shape[2])
            for name in ("sampling_rate", "hop_length"):
                check_count(bundle, name, manifest.preprocessing.get(name, DEFAULTS[name]))

    def generate(
        self,
        prompt: str | None = None,
        audio: str | os.PathLike[str] | np.ndarray | None = None,
        *,
        input_ids: Sequence[int] | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        on_text: OnText | None = None,
    ) -> Generation:
        """Generate text for a recording and a prompt.

        Args:
            prompt: the question; the model's template goes around it, unless it holds the recording's placeholder itself.
            audio: a file, a waveform `(samples,)` at the model's rate, or the features that the encoder takes. What is shorter than
                the bundle's length is filled up with silence.
            input_ids: the prompt as token ids instead, with one placeholder.
            max_new_tokens: by default as many as the bundle has room for.
            on_text: called with each piece of the text as soon as it is known.

        Raises InputError for a prompt without a placeholder, with several, or longer than the bucket, and for audio that cannot be
        read, or is longer than the bundle takes.
        """

        def feeds(into: Generation) -> dict[str, np.ndarray]:
            start = time.perf_counter()
            features = self._features(audio)
            into.timed("features", start)
            return {self._input.name: features}

        return self._answer(feeds, prompt, input_ids, max_new_tokens, sampling, on_text)

    @property
    def _input(self) -> Any:
        return self.sessions["audio_encoder"].inputs[0]

    def _features(self, audio: str | os.PathLike[str] | np.ndarray | None) -> np.ndarray:
        about, shape = self.bundle.manifest.preprocessing, self._input.shape
        if audio is None:
            raise InputError("no recording: this model answers questions about one; give --audio FILE (audio=...)")
        if isinstance(audio, np.ndarray) and audio.dtype.kind not in "biuf":
            raise InputError(f"the audio is an array of {audio.dtype}, and no numbers")
        if isinstance(audio, np.ndarray) and audio.shape == shape:
            return audio.astype(self._input.dtype)  # type: ignore[no-any-return]
        check_extractor(about)
        if not made_here(shape, about):
            raise InputError(
                f"the model takes recordings as features {list(shape)}, and its bundle does not say how these are made: give the "
                "array (audio=...), and no file or waveform"
            )
        rate, hop = (int(about.get(name, DEFAULTS[name])) for name in ("sampling_rate", "hop_length"))
        if isinstance(audio, np.ndarray):
            if audio.ndim != 1 or not audio.size:
                raise InputError(
                    f"the audio has shape {audio.shape}: give a waveform (samples,) at {rate} Hz, features {shape}, or a file"
                )
            if not np.isfinite(audio).all():
                raise InputError("the waveform holds values that are not finite")
            wave = audio
        elif isinstance(audio, (str, os.PathLike)):
            wave = resample(*read_audio(Path(audio)), rate)
        else:
            many = "several recordings are given, and the prompt has one placeholder: " if isinstance(audio, (list, tuple)) else ""
            raise InputError(f"{many}give one recording, as a file or an array, and no {type(audio).__name__}")
        most = int(self.description.settings["frames"]) * hop
        if len(wave) > most:
            raise InputError(
                f"the recording has {len(wave) / rate:.4g} seconds, and this bundle takes {most / rate:.4g}: give a part of it, or "
                "export with more frames (--input-shapes)"
            )
        return log_mel(wave, shape[1], shape[2], about).astype(self._input.dtype)
