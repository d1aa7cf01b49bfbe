"""Recordings: files as waveforms, at the rate that a model wants, in pieces that fit into it."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, gcd
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.errors import InputError, extras_named


def read_audio(path: Path) -> tuple[np.ndarray, int]:
    """The waveform `(samples,)` of a recording, its channels averaged, and its sampling rate in Hz.

    Raises InputError for a file that is absent, no audio, empty, or holds values that are not finite.
    """
    if not path.is_file():
        raise InputError(
            f"{path} does not exist" if not path.is_dir() else f"{path} is a folder, and one recording is needed"
        )
    with extras_named():
        import soundfile
    try:
        made: tuple[Any, int] = soundfile.read(str(path), dtype="float32", always_2d=True)
    except Exception as error:  # damaged files raise nearly anything
        raise InputError(f"{path} is no audio that can be read: {str(error) or type(error).__name__}") from error
    wave, rate = made
    if not len(wave):
        raise InputError(f"{path} is empty")
    if not np.isfinite(wave).all():
        raise InputError(f"{path} holds values that are not finite")
    return wave.mean(axis=1), int(rate)


_ZEROS, _BETA, _ROLLOFF = 64, 12.0, 0.95
"""Of the low-pass filter: zero crossings on each side, the Kaiser window's parameter (stop band below -110 dB), and the cutoff in
shares of the lower Nyquist frequency, so that the transition ends there."""


def resample(wave: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """A waveform at another sampling rate, as float32: of `samples * wanted / rate`, rounded up.

    Interpolated by a sinc under a Kaiser window, one set of taps for each phase between two samples: no delay, unit gain, and
    nothing above half of the lower rate is left. In front of the first sample and behind the last there is silence.
    """
    if rate == wanted:
        return wave.astype(np.float32, copy=False)
    up, down = wanted // gcd(rate, wanted), rate // gcd(rate, wanted)
    cutoff = _ROLLOFF * min(1.0, up / down)
    half = ceil(_ZEROS / cutoff)
    count = ceil(len(wave) * up / down)
    padded = np.pad(wave.astype(np.float64), half)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    near = np.arange(-half, half + 1)
    out = np.empty(count, np.float32)
    # Every `up`-th output lies at the same distance behind an input, its phase, and `down` inputs further on.
    phases, rounds = min(up, count), ceil(count / up)
    together = max(1, _AT_ONCE // (rounds * len(near)))
    for start in range(0, phases, together):
        phase = np.arange(start, min(start + together, phases))
        at = near - (phase * down % up / up)[:, None]
        taps = np.sinc(cutoff * at) * np.i0(_BETA * np.sqrt(np.clip(1 - (at / half) ** 2, 0, None)))
        taps /= taps.sum(axis=1, keepdims=True)
        number = phase[:, None] + up * np.arange(rounds)
        behind = np.minimum(number * down // up, len(windows) - 1)
        made = (windows[behind] @ taps[:, :, None])[:, :, 0]
        out[number[number < count]] = made[number < count]
    return out


_AT_ONCE = 1 << 20
"""Values that are gathered at once."""


def pieces(wave: np.ndarray, most: int, rate: int, search: float = 5.0, quiet: float = 0.2) -> Iterator[np.ndarray]:
    """A waveform in pieces of at most `most` samples, cut in the middle of the quietest `quiet` seconds of the last `search`
    seconds that fit, so that no word is cut in two where there is a pause."""
    within = max(1, min(int(search * rate), most // 2))
    span = max(1, min(int(quiet * rate), within // 2))
    while len(wave) > most:
        power = np.cumsum(np.pad(np.square(wave[most - within : most], dtype=np.float64), (1, 0)))
        energy = power[span:] - power[:-span]
        cut = max(1, most - within + int(energy.argmin()) + span // 2)
        yield wave[:cut]
        wave = wave[cut:]
    yield wave
