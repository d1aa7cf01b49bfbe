"""Recordings on a device: features, resampling and cutting, against transformers and against what is known in closed form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from edgewise.errors import InputError
from edgewise.runtime.audio import pieces, read_audio, resample
from edgewise.runtime.mel import log_mel

SPEECH = Path(__file__).parents[2] / "shared" / "data" / "speech_en"


def waves() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    time = np.arange(40000) / 16000
    return {
        "noise": rng.normal(size=100_000).astype(np.float32) * 0.1,
        "loud": rng.normal(size=16_000).astype(np.float32) * 50,
        "silence": np.zeros(1000, np.float32),
        "constant": np.full(480_000, 0.3, np.float32),
        "three samples": rng.normal(size=3).astype(np.float32),
        "chirp": np.sin(2 * np.pi * (50 + 1500 * time) * time).astype(np.float32),
    }


@pytest.mark.parametrize("bins", [80, 128])
@pytest.mark.parametrize("name", list(waves()))
def test_log_mel_is_that_of_transformers(name: str, bins: int) -> None:
    wave, theirs = waves()[name], WhisperFeatureExtractor(feature_size=bins)
    ours = log_mel(wave, bins, 3000, theirs.to_dict())
    assert ours.shape == (1, bins, 3000) and ours.dtype == np.float32
    # Its NumPy path computes in double precision, as we do; its torch path in single precision.
    exact = theirs._np_extract_fbank_features(np.pad(wave, (0, 480_000 - len(wave)))[None], "cpu")
    assert np.abs(ours - exact).max() < 1e-6
    single = theirs(wave, sampling_rate=16000, return_tensors="np").input_features
    assert np.abs(ours - single).max() < 1e-4


def test_log_mel_of_other_constants() -> None:
    theirs = WhisperFeatureExtractor(feature_size=40, hop_length=80, chunk_length=2, n_fft=256, padding_value=0.01)
    wave = waves()["chirp"][:20_000]
    ours = log_mel(wave, 40, 400, theirs.to_dict())
    assert np.abs(ours - theirs(wave, sampling_rate=16000, return_tensors="np").input_features).max() < 1e-4


def test_log_mel_of_real_speech() -> None:
    soundfile = pytest.importorskip("soundfile")
    if not SPEECH.is_dir():
        pytest.skip("no recordings here")
    for file in ("jfk.flac", "LJ001-0002.flac", "libri_198-209-0000.flac"):
        wave = soundfile.read(SPEECH / file, dtype="float32")[0]
        theirs = WhisperFeatureExtractor()
        ours = log_mel(wave, 80, 3000, theirs.to_dict())
        assert np.abs(ours - theirs(wave, sampling_rate=16000, return_tensors="np").input_features).max() < 1e-4


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="takes up to 1600 samples"):
        log_mel(np.zeros(1601), 80, 10, {})
    with pytest.raises(InputError, match="made by Speech2TextFeatureExtractor"):
        log_mel(np.zeros(10), 80, 10, {"feature_extractor_type": "Speech2TextFeatureExtractor"})


RATES = [(44100, 16000), (48000, 16000), (8000, 16000), (11025, 16000), (22050, 16000), (16010, 16000), (16000, 44100)]


@pytest.mark.parametrize(("rate", "wanted"), RATES)
def test_resampled_tones_stay_and_others_go(rate: int, wanted: int) -> None:
    lower = min(rate, wanted) / 2
    time, after = np.arange(rate) / rate, np.arange(wanted) / wanted
    inner = slice(wanted // 5, -wanted // 5)
    for hertz in (0.0, 50.0, 0.5 * lower, 0.88 * lower):
        tone = resample(np.cos(2 * np.pi * hertz * time + 0.3).astype(np.float32), rate, wanted)
        assert len(tone) == wanted and tone.dtype == np.float32
        assert np.abs(tone - np.cos(2 * np.pi * hertz * after + 0.3))[inner].max() < 1e-5
    for hertz in (1.01 * lower, 1.2 * lower, 1.9 * lower):
        if hertz < rate / 2:
            assert np.abs(resample(np.sin(2 * np.pi * hertz * time), rate, wanted))[inner].max() < 1e-4


def test_resampling_has_no_delay_and_rounds_lengths_up() -> None:
    for rate, wanted, count in ((44100, 16000, 1), (44100, 16000, 1000), (8000, 16000, 7), (16000, 44100, 5)):
        impulse = np.zeros(count, np.float32)
        impulse[0] = 1
        made = resample(impulse, rate, wanted)
        assert len(made) == -(-count * wanted // rate) and made.argmax() == 0
    wave = np.arange(4, dtype=np.float32)
    assert resample(wave, 16000, 16000) is wave


def test_pieces_are_cut_in_pauses_and_lose_nothing() -> None:
    rng = np.random.default_rng(1)
    wave = rng.normal(size=95_000).astype(np.float32)
    wave[27_000:28_000] = 0  # a pause in the last five seconds of the first piece
    parts = list(pieces(wave, 30_000, 1000))
    assert np.array_equal(np.concatenate(parts), wave)
    assert all(0 < len(part) <= 30_000 for part in parts) and 27_000 < len(parts[0]) < 28_000
    assert [len(part) for part in pieces(wave[:30_000], 30_000, 1000)] == [30_000]
    # Very small windows still go forward.
    assert sum(len(part) for part in pieces(wave[:50], 3, 1000)) == 50


def test_files(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    stereo = np.stack([np.full(100, 0.5), np.full(100, -0.25)], axis=1)
    soundfile.write(tmp_path / "stereo.wav", stereo, 8000, subtype="FLOAT")
    wave, rate = read_audio(tmp_path / "stereo.wav")
    assert rate == 8000 and wave.shape == (100,) and np.allclose(wave, 0.125)
    (tmp_path / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 8000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 8000, subtype="FLOAT")
    for name, fault in {
        "text.wav": "no audio that can be read",
        "empty.wav": "is empty",
        "nan.wav": "not finite",
        "absent.wav": "does not exist",
        ".": "is a folder",
    }.items():
        with pytest.raises(InputError, match=fault):
            read_audio(tmp_path / name)
