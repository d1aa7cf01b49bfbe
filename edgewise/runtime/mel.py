"""Whisper's log-mel spectrogram, in NumPy (Radford et al. 2022, arXiv:2212.04356, section 2.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from edgewise.errors import InputError

EXTRACTOR = "WhisperFeatureExtractor"
DEFAULTS = {"feature_extractor_type": EXTRACTOR, "sampling_rate": 16000, "hop_length": 160, "n_fft": 400}
"""The constants of Whisper's own processor."""
_FLOOR, _RANGE = 1e-10, 8.0
_HIGHEST = 8000.0
"""Hz: where the highest mel band ends, whatever the sampling rate."""


def log_mel(wave: np.ndarray, bins: int, frames: int, preprocessing: Mapping[str, Any]) -> np.ndarray:
    """Features `(1, bins, frames)` of a waveform `(samples,)` at the model's rate, which is padded with silence to `frames` hops.

    `preprocessing` are the constants of the model's processor (`n_fft`, `hop_length`, `sampling_rate`, `padding_value`). Raises
    InputError for a waveform that is longer, and for a processor that makes other features.
    """
    check_extractor(preprocessing)
    size, hop = int(preprocessing.get("n_fft", 400)), int(preprocessing.get("hop_length", 160))
    rate = int(preprocessing.get("sampling_rate", 16000))
    room = frames * hop - len(wave)
    if wave.ndim != 1 or room < 0:
        raise InputError(f"a waveform of shape {wave.shape} does not fit: the model takes up to {frames * hop} samples")
    padded = np.pad(wave.astype(np.float64), (0, room), constant_values=float(preprocessing.get("padding_value", 0.0)))
    around = np.pad(padded, size // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(around, size)[::hop][:frames]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    power = np.abs(np.fft.rfft(windows * hann, axis=1)) ** 2
    bands = np.log10(np.maximum(power @ mel_filters(size // 2 + 1, bins, rate), _FLOOR)).T
    return ((np.maximum(bands, bands.max() - _RANGE) + 4) / 4).astype(np.float32)[None]


def check_extractor(preprocessing: Mapping[str, Any]) -> None:
    """Raise InputError for a processor that makes other features."""
    kind = preprocessing.get("feature_extractor_type", EXTRACTOR)
    if kind != EXTRACTOR:
        raise InputError(f"the model's features are made by {kind}, and only those of {EXTRACTOR} are known here")


def made_here(shape: Sequence[int], preprocessing: Mapping[str, Any]) -> bool:
    """Whether features of a shape are `(1, bins, frames)` as `log_mel` makes them with the constants of a processor. Of the layout
    only these tell: there are models whose features are `(1, frames, bins)`."""
    whisper = preprocessing.get("feature_extractor_type", EXTRACTOR) == EXTRACTOR
    return whisper and len(shape) == 3 and shape[0] == 1 and preprocessing.get("feature_size") == shape[1]


@lru_cache(maxsize=4)
def mel_filters(frequencies: int, bins: int, rate: int) -> np.ndarray:
    """Triangular filters `(frequencies, bins)` on Slaney's mel scale (Auditory Toolbox, 1998), each of unit area in Hz: linear up
    to 1 kHz, 15 mel, then 27 mel for every factor of 6.4."""
    edges = _hertz(np.linspace(0.0, _mel(_HIGHEST), bins + 2))
    hertz = np.linspace(0.0, rate // 2, frequencies)[:, None]
    rising = (hertz - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - hertz) / np.diff(edges)[1:]
    return np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (edges[2:] - edges[:-2]))


def _mel(hertz: float) -> float:
    return 15.0 + np.log(hertz / 1000.0) * 27.0 / np.log(6.4)


def _hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15.0, mel * 200.0 / 3.0, 1000.0 * np.exp((mel - 15.0) * np.log(6.4) / 27.0))
