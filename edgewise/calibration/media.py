"""Input files: an image, a recording or a video as the array that a model takes, and as a picture of that array."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from edgewise.errors import InputError
from edgewise.runtime.audio import read_audio, resample
from edgewise.runtime.images import check_scale, opaque, shortest_edge
from edgewise.runtime.images import constants as _constants
from edgewise.runtime.images import fitted as _fitted
from edgewise.runtime.images import normalised as _normalised
from edgewise.runtime.images import open_image as _open
from edgewise.runtime.video import IMAGES as IMAGES
from edgewise.runtime.video import read_frames

Kind = Literal["image", "video", "audio"]
Shape = tuple[int, ...]
AUDIO = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au")
VIDEOS = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".mpg", ".mpeg")


@dataclass(frozen=True)
class Media:
    """One input of a model, without its batch dimension, and pictures of it: of an image one, of a video one for each
    frame, of audio a spectrogram with time to the right and low frequencies first (at the top)."""

    kind: Kind
    array: np.ndarray
    views: tuple[Image.Image, ...]
    seconds: float | None = None
    notes: tuple[str, ...] = ()


def kind_of(shape: Shape) -> Kind | None:
    """What an input `(batch, ...)` holds, by its shape; None where it is none of the three."""
    if len(shape) == 5 and (shape[1] in (1, 3) or shape[2] in (1, 3)):
        return "video"
    if len(shape) == 4 and shape[1] in (1, 3):
        return "image"
    return "audio" if len(shape) in (2, 3) else None


def load_image(path: Path, shape: Shape, preprocessing: Mapping[str, Any]) -> Media:
    """An image file as `shape (C, H, W)`: resized, cropped and normalised with the constants of the processor."""
    return load_picture(_open(path), shape, preprocessing)


def load_picture(picture: Image.Image, shape: Shape, preprocessing: Mapping[str, Any]) -> Media:
    """As `load_image`, of a picture that is there already."""
    array, notes = _pixels([picture], shape[0], shape[-2:], preprocessing)
    return Media("image", array[0], (_shown(array[0], preprocessing),), notes=notes)


def load_video(path: Path, shape: Shape, preprocessing: Mapping[str, Any]) -> Media:
    """A folder of frames, or a video file, as `shape (T, C, H, W)` or `(C, T, H, W)`: frames at equal distances."""
    first = shape[1] in (1, 3)
    count, channels = (shape[0], shape[1]) if first else (shape[1], shape[0])
    array, notes = _pixels(read_frames(path, count), channels, shape[-2:], preprocessing)
    views = tuple(_shown(frame, preprocessing) for frame in array)
    return Media("video", array if first else array.swapaxes(0, 1), views, notes=notes)


def load_audio(path: Path, shape: Shape, preprocessing: Mapping[str, Any]) -> Media:
    """A recording as features, by the model's own extractor, or as a waveform; cut or padded to `shape`."""
    wave, rate = read_audio(path)
    wanted = int(preprocessing.get("sampling_rate", 16000))
    rated = () if rate == wanted else (f"resampled from {rate} to {wanted} Hz",)
    wave = resample(wave, rate, wanted)
    extractor = preprocessing.get("feature_extractor_type")
    if len(shape) == 1:
        notes = rated if len(wave) <= shape[0] else (*rated, f"only the first {shape[0] / wanted:.2f} seconds fit")
        wave = _waveform(wave[: shape[0]], shape[0], preprocessing)
        return from_array("audio", wave.astype(np.float32), preprocessing, notes)
    if extractor is None:
        raise InputError(
            f"the model takes audio features {list(shape)}, and comes without a preprocessor_config.json that says how "
            "they are made of a recording"
        )
    import transformers

    cls = getattr(transformers, str(extractor), None)
    if cls is None:
        raise InputError(f"transformers has no {extractor}, which the model's preprocessor_config.json names")
    try:
        made = cls.from_dict(dict(preprocessing))(wave, sampling_rate=wanted, return_tensors="np")
    except Exception as error:
        raise InputError(f"{extractor} cannot make features of {path}: {' '.join(str(error).split())}") from error
    array = next((v[0] for v in made.values() if v[0].shape == shape), None)
    if array is None:
        got = ", ".join(f"{k} {list(v[0].shape)}" for k, v in made.items())
        raise InputError(f"{extractor} makes {got} of {path}, and the model takes {list(shape)}")
    return from_array("audio", array.astype(np.float32), preprocessing, rated)


def _waveform(wave: np.ndarray, length: int, preprocessing: Mapping[str, Any]) -> np.ndarray:
    """A waveform filled up to a length, as transformers' `Wav2Vec2FeatureExtractor` does: one that returns a mask normalises the
    recording and not what it is filled up with."""
    own = len(wave) if preprocessing.get("return_attention_mask") else length
    value = float(preprocessing.get("padding_value") or 0)
    wave = np.pad(wave, (0, length - len(wave)), constant_values=value)
    if preprocessing.get("do_normalize"):
        wave = (wave - wave[:own].mean()) / np.sqrt(wave[:own].var() + 1e-7)
        wave[own:] = value
    return wave


def from_array(kind: Kind, array: np.ndarray, preprocessing: Mapping[str, Any], notes: tuple[str, ...] = ()) -> Media:
    """Media of an array that is ready for the model."""
    if kind == "image":
        return Media(kind, array, (_shown(array, preprocessing),), notes=notes)
    if kind == "video":
        frames = array if array.shape[1] in (1, 3) else array.swapaxes(0, 1)
        return Media(kind, array, tuple(_shown(frame, preprocessing) for frame in frames), notes=notes)
    rate = preprocessing.get("sampling_rate")
    if array.ndim == 1:
        seconds = None if rate is None else len(array) / int(rate)
        return Media(kind, array, (_stretched(_spectrogram(array)),), seconds, notes)
    bins = preprocessing.get("num_mel_bins", preprocessing.get("feature_size"))
    # Time is the axis that is not the bins, where those are known, else the longer one.
    time_first = array.shape[0] != bins and (array.shape[1] == bins or array.shape[0] >= array.shape[1])
    hop = preprocessing.get("hop_length")
    frames = array.shape[0] if time_first else array.shape[1]
    seconds = None if rate is None or hop is None else frames * int(hop) / int(rate)
    return Media(kind, array, (_stretched(array.T if time_first else array),), seconds, notes)


def _pixels(
    pictures: list[Image.Image], channels: int, size: Shape, preprocessing: Mapping[str, Any]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Pictures as arrays `(n, channels, H, W)`, and what had to be assumed: by the model's own processor, or by its constants where
    it makes another size, or is not installed."""
    pictures = [opaque(picture) for picture in pictures]
    made = _by_processor(pictures, channels, size, preprocessing)
    if made is not None:
        return made, ()
    return _normalised([_fitted(picture, size, preprocessing) for picture in pictures], channels, preprocessing)


def _by_processor(
    pictures: list[Image.Image], channels: int, size: Shape, preprocessing: Mapping[str, Any]
) -> np.ndarray | None:
    """What the Pillow form of the model's processor makes of pictures; None where it cannot make this shape."""
    name = str(preprocessing.get("image_processor_type") or preprocessing.get("feature_extractor_type") or "")
    name = name.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    if channels != 3 or not name.endswith("ImageProcessor") or importlib.util.find_spec("transformers") is None:
        return None
    import transformers

    cls = getattr(transformers, name + "Pil", None)
    if cls is None:
        return None
    edge = shortest_edge(preprocessing)
    for picture in pictures:
        if edge is not None:
            check_scale(picture, edge / min(picture.size))
    try:
        made = cls(**{k: v for k, v in preprocessing.items() if not k.endswith("_type")})(pictures, return_tensors="np")
    except Exception as error:  # processors refuse pictures, and constants, with nearly anything
        raise InputError(f"{name} cannot make pixels of it: {' '.join(str(error).split()) or type(error).__name__}") from error
    array = np.asarray(made.get("pixel_values"), np.float32)
    wanted = (len(pictures), channels, *size)
    return array.reshape(wanted) if array.shape in (wanted, (1, *wanted)) else None


def _shown(array: np.ndarray, preprocessing: Mapping[str, Any]) -> Image.Image:
    """An input `(C, H, W)` as a picture, normalisation undone."""
    mean, std = _constants(preprocessing, len(array))
    pixels = array.transpose(1, 2, 0) * std + mean
    if not preprocessing.get("do_rescale", True):
        pixels = pixels / 255
    if pixels.min() < -0.1 or pixels.max() > 1.1:  # not of this normalisation
        pixels = (pixels - pixels.min()) / max(float(np.ptp(pixels)), 1e-12)
    return _picture(pixels)


def _picture(pixels: np.ndarray) -> Image.Image:
    whole = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(np.repeat(whole, 3, axis=2) if whole.shape[2] == 1 else whole)


def _stretched(array: np.ndarray) -> Image.Image:
    """Any matrix as a grey picture. The extremes are cut off: a few values would leave all others black."""
    low, high = np.percentile(array, (1, 99.5))
    return _picture(((array - low) / max(float(high - low), 1e-12))[:, :, None])


def _spectrogram(wave: np.ndarray, size: int = 400, hop: int = 160) -> np.ndarray:
    """Log power `(frequency, time)` of a waveform."""
    padded = np.pad(wave, (0, max(0, size - len(wave))))
    starts = np.arange(0, len(padded) - size + 1, hop)
    frames = padded[starts[:, None] + np.arange(size)] * np.hanning(size)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    return np.log(power + 1e-6 * max(float(power.max()), 1e-12)).T[: size // 2]
