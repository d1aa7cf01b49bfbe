"""A speech model: a recording to its text."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edgewise.bundle.manifest import TensorInfo
from edgewise.errors import InputError, unknown
from edgewise.runtime.audio import pieces, read_audio, resample
from edgewise.runtime.generate import Generation
from edgewise.runtime.mel import log_mel
from edgewise.runtime.pipeline import GenerativePipeline, OnText
from edgewise.runtime.sampling import Sampling

Outputs = dict[str, np.ndarray]


class Speech(GenerativePipeline):
    """`audio_encoder`, `prefill` and `decode` as one model.

    The decoder begins with the pipeline's `start_ids`, behind the first of which stand the language and the task where the model
    knows several. `settings` of the pipeline: `positions` (the most tokens of prompt and text together), `text_ids` (ids from
    there on are no text), `languages` and `tasks` (names to ids), `language_names` (in English, to those of `languages`), and the
    defaults `language` (None: it is detected) and `task` (None: left out).
    """

    kind = "speech"

    def generate(
        self,
        audio: str | os.PathLike[str] | np.ndarray,
        *,
        language: str | None = None,
        task: str | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        on_text: OnText | None = None,
    ) -> Generation:
        """Write down what is said in a recording.

        Args:
            audio: a file, a waveform `(samples,)` at the model's rate, or the features that the encoder takes. What is longer than
                the model's window is cut at quiet places, and every part is transcribed alone.
            language, task: for a model that knows several: `en` or `english`; `transcribe` or `translate`.
            max_new_tokens: of each part; by default as many as the bundle has room for.
            on_text: called with each piece of the text as soon as it is known.

        Raises InputError for audio that cannot be read, and for a language or task that the model does not know.
        """
        between = self._between(language, task)
        whole = Generation(stopped="eos")
        for wave in self._waves(audio):
            part = Generation(seconds=whole.seconds)
            self._transcribe(wave, between, max_new_tokens, sampling or Sampling(), _behind(whole.text, on_text), part)
            whole.ids += part.ids
            whole.text = " ".join(filter(None, (whole.text, part.text)))
            whole.stopped = part.stopped if whole.stopped == "eos" else whole.stopped
        return whole

    def _transcribe(
        self,
        wave: np.ndarray,
        between: list[int | None],
        most: int | None,
        sampling: Sampling,
        on_text: OnText | None,
        into: Generation,
    ) -> None:
        about = self.description
        start = time.perf_counter()
        features = self._features(wave)
        into.timed("features", start)
        start = time.perf_counter()
        cross = self.sessions["audio_encoder"].run({self._input.name: features})
        into.timed("audio_encoder", start)
        ids = [
            about.start_ids[0],
            *(self._language(cross, into) if i is None else i for i in between),
            *about.start_ids[1:],
        ]
        room = int(about.settings["positions"]) - len(ids)
        tokens = self.decoder.tokens(
            self._prompt(ids, cross),
            length=len(ids),
            position=len(ids),
            sampling=sampling,
            most=min(about.new_tokens, room) if most is None else min(most, room),
            into=into,
            held=cross,
        )
        self._collect(tokens, into, on_text)
        into.text = into.text.strip()

    def _is_text(self, token: int) -> bool:
        return super()._is_text(token) and token < self.description.settings["text_ids"]

    # -- what is said before the text

    def _between(self, language: str | None, task: str | None) -> list[int | None]:
        """Ids of the language and the task; None for a language that is to be detected."""
        settings = self.description.settings
        languages, tasks = settings["languages"], settings["tasks"]
        if not languages and (language is not None or task is not None):
            raise InputError("this model knows one language and one task: leave out language and task")
        named = language is not None
        language = settings["language"] if language is None else language.lower().strip("<|>")
        language = settings["language_names"].get(language, language)
        if language is not None and language not in languages:
            raise unknown("language", language, [*languages, *settings["language_names"]])
        task = task or settings["task"] or ("transcribe" if named and tasks else None)
        if task is not None and task not in tasks:
            raise unknown("task", task, tasks)
        first = [None if language is None else languages[language]] if languages else []
        return [*first, *([] if task is None else [tasks[task]])]

    def _language(self, cross: Outputs, into: Generation) -> int:
        """The likeliest language, by what the decoder expects behind its first token."""
        start = time.perf_counter()
        logits = (
            self.sessions["prefill"].run(self._prompt([self.description.start_ids[0]], cross))["logits"].reshape(-1)
        )
        into.timed("language", start)
        ids = sorted(self.description.settings["languages"].values())
        return int(ids[int(logits[ids].argmax())])

    def _prompt(self, ids: list[int], cross: Outputs) -> Outputs:
        """The inputs of prefill: the bucket is filled from its end."""
        bucket = self.description.prompt_tokens
        padded, position = np.zeros((1, bucket), np.int64), np.full((1, bucket), -1, np.int64)
        padded[0, -len(ids) :], position[0, -len(ids) :] = ids, np.arange(len(ids))
        return {"input_ids": padded, "position": position, **cross}

    # -- sound

    @property
    def _input(self) -> TensorInfo:
        return self.sessions["audio_encoder"].inputs[0]

    def _waves(self, audio: str | os.PathLike[str] | np.ndarray) -> Iterator[np.ndarray]:
        """A recording in parts that fit; features are one part as they are."""
        preprocessing = self.bundle.manifest.preprocessing
        rate, hop = int(preprocessing["sampling_rate"]), int(preprocessing["hop_length"])
        if isinstance(audio, np.ndarray):
            if audio.shape == self._input.shape:
                yield audio.astype(self._input.dtype)
                return
            if audio.ndim != 1 or not audio.size:
                raise InputError(
                    f"the audio has shape {audio.shape}: give a waveform (samples,) at {rate} Hz, features "
                    f"{self._input.shape}, or a file"
                )
            if not np.isfinite(audio).all():
                raise InputError("the waveform holds values that are not finite")
            wave = audio
        else:
            wave = resample(*read_audio(Path(audio)), rate)
        yield from pieces(wave, self._input.shape[-1] * hop, rate)

    def _features(self, wave: np.ndarray) -> np.ndarray:
        if wave.ndim > 1:
            return wave
        bins, frames = self._input.shape[1:]
        return log_mel(wave, bins, frames, self.bundle.manifest.preprocessing).astype(self._input.dtype)


def _behind(before: str, on_text: OnText | None) -> OnText | None:
    """Gives pieces of text on, without the space that they begin with, and with one behind the text of before."""
    if on_text is None:
        return None
    begun = False

    def give(piece: str) -> None:
        nonlocal begun
        piece = piece if begun else piece.lstrip()
        if piece:
            on_text(piece if begun or not before else " " + piece)
            begun = True

    return give
