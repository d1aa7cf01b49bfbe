"""Train the `demo:speech` model: a small Audio Spectrogram Transformer that recognises spoken digits.

Data: the Free Spoken Digit Dataset (Zohar Jackson et al.), 3,000 recordings of the digits 0 to 9 by six
speakers at 8 kHz. Licence: CC BY-SA 4.0. `--data` is the dataset as a zip file (the `recordings/*.wav` of the
repository Jakobovski/free-spoken-digit-dataset); nothing is downloaded.

The test split is the customary one, recordings 0 to 4 of every speaker and digit (300 clips). It takes no
part in training and is saved with the model as log-mel features. These come from the numpy code of
`ASTFeatureExtractor`, which runs where torchaudio is not installed: windows of 400 samples, one every 160.

    python examples/train_speech.py --data fsdd.zip --out edgewise/demos/speech
"""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import soundfile
import torch
from torch import Tensor, nn
from torch.nn import functional
from training import LABELS, PatchDropout, accuracy, fit, save_split
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification
from transformers.utils import is_speech_available

RATE, MELS, FRAMES, PATCH, FREQUENCY_STRIDE, TIME_STRIDE = 8000, 64, 128, 8, 8, 4


def load_clips(path: Path) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """The waveforms, their labels, and whether each belongs to the test split."""
    clips, labels, is_test = [], [], []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith(".wav"):
                continue
            waveform, rate = soundfile.read(io.BytesIO(archive.read(name)), dtype="float32")
            if rate != RATE or waveform.ndim != 1:
                raise ValueError(f"{name}: expected mono audio at {RATE} Hz")
            digit, _, index = PurePosixPath(name).stem.split("_")
            clips.append(waveform)
            labels.append(int(digit))
            is_test.append(int(index) < 5)
    return clips, np.array(labels), np.array(is_test)


def perturb(waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random speed, gain, background noise and start of one clip."""
    speed = rng.uniform(0.85, 1.15)
    positions = np.arange(0, len(waveform) - 1, speed)
    result = np.interp(positions, np.arange(len(waveform)), waveform)
    start = rng.integers(-480, 121)
    result = result[start:] if start > 0 else np.pad(result, (-start, 0))
    level = np.sqrt(np.mean(result**2)) * 10 ** rng.uniform(-3, -1)
    result = result + level * rng.standard_normal(len(result))
    return (result * 10 ** rng.uniform(-0.4, 0.4)).astype(np.float32)


def spoken(inputs: Tensor) -> Tensor:
    """Which frames hold sound, not padding (constant over the mel bins): (N, frames), 0 or 1."""
    return (inputs.amax(dim=2) > inputs.amin(dim=2)).float()


def patch_importance(inputs: Tensor) -> Tensor:
    """Patches with sound stay in patch dropout more often than padding: (N, patches)."""
    times = functional.max_pool1d(spoken(inputs).unsqueeze(1), PATCH, TIME_STRIDE)
    rows = (MELS - PATCH) // FREQUENCY_STRIDE + 1
    return 0.5 * times.repeat(1, rows, 1).flatten(1)


def mask_bands(inputs: Tensor) -> Tensor:
    """SpecAugment: blank one random band of mel bins and one of frames in the sound of every clip."""
    sound = spoken(inputs)
    lengths = torch.stack((torch.full((len(inputs),), float(MELS)), sound.sum(1)))
    widths = (torch.rand(2, len(inputs)) * torch.tensor([[12.0], [4.0]])).round()
    begins = (torch.rand(2, len(inputs)) * (lengths - widths)).floor()
    mels, frames = (
        (place >= begin[:, None]) & (place < (begin + width)[:, None])
        for place, begin, width in zip((torch.arange(MELS), torch.arange(FRAMES)), begins, widths, strict=True)
    )
    return inputs.masked_fill((mels[:, None, :] | frames[:, :, None]) & (sound[:, :, None] > 0), 0.0)


@torch.no_grad()
def start_embeddings(embeddings: nn.Module) -> None:
    """Start the position embeddings as waves over mel bins and time (the class starts them at zero)."""
    rows, columns = embeddings.get_shape(embeddings.config)
    width = embeddings.config.hidden_size
    frequency = 30.0 ** -torch.linspace(0, 1, width // 4)

    def waves(count: int) -> Tensor:
        phase = torch.arange(count).unsqueeze(1) * frequency
        return torch.cat((phase.sin(), phase.cos()), dim=1)

    across = waves(rows).unsqueeze(1).expand(-1, columns, -1)
    along = waves(columns).unsqueeze(0).expand(rows, -1, -1)
    embeddings.position_embeddings[0, 2:] = 0.5 * torch.cat((across, along), dim=2).flatten(0, 1)
    nn.init.normal_(embeddings.cls_token, std=0.1)
    nn.init.normal_(embeddings.distillation_token, std=0.1)


def main() -> None:
    """Train, save the model with its test split, and print the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the Free Spoken Digit Dataset as a zip file")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its test split")
    parser.add_argument("--epochs", type=int, default=45)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if is_speech_available():
        # with torchaudio the extractor cuts 8 kHz audio into other frames than its own numpy code does
        raise SystemExit("train this model in an environment without torchaudio: its features differ")
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    clips, labels, is_test = load_clips(args.data)
    train = [clip for clip, test in zip(clips, is_test, strict=True) if not test]
    options = {"sampling_rate": RATE, "num_mel_bins": MELS, "max_length": FRAMES}
    raw = ASTFeatureExtractor(do_normalize=False, **options)
    frames = np.concatenate([x[x.any(1)] for x in raw(train, RATE)["input_values"]])
    # the extractor divides by twice the standard deviation
    mean, std = round(float(frames.mean()), 4), round(float(frames.std()), 4)
    extractor = ASTFeatureExtractor(mean=mean, std=std, **options)

    def features(waveforms: list[np.ndarray]) -> np.ndarray:
        return np.stack(extractor(waveforms, RATE)["input_values"]).astype(np.float32)

    def epoch_inputs() -> Tensor:
        return mask_bands(torch.from_numpy(features([perturb(clip, rng) for clip in train])))

    targets = torch.from_numpy(labels[~is_test])

    config = ASTConfig(
        num_mel_bins=MELS,
        max_length=FRAMES,
        patch_size=PATCH,
        frequency_stride=FREQUENCY_STRIDE,
        time_stride=TIME_STRIDE,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        initializer_range=0.1,
        id2label=LABELS,
        label2id={name: index for index, name in LABELS.items()},
    )
    model = ASTForAudioClassification(config)
    embeddings = model.audio_spectrogram_transformer.embeddings
    start_embeddings(embeddings)
    fit(
        model,
        embeddings,
        PatchDropout(special=2, keep=(0.25, 0.5), importance=patch_importance),
        lambda epoch: (epoch_inputs(), targets),
        epochs=args.epochs,
        batch_size=48,
        learning_rate=1.5e-3,
        full_epochs=0.15,
    )

    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    extractor.save_pretrained(args.out)
    test_x = features([clip for clip, test in zip(clips, is_test, strict=True) if test])
    save_split(args.out, model.main_input_name, test_x, labels[is_test])
    print(f"test accuracy {accuracy(ASTForAudioClassification, args.out):.4f} on {is_test.sum()} clips")


if __name__ == "__main__":
    main()
