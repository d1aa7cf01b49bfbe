"""What tuning a schedule is worth: the tuned one against the usual ones at the same budget, on data that the tuning did not see.

    python benchmarks/tune.py [digits] [speech] [motion] [dinov2] [whisper] [--models FOLDER] [--speech DATA.tsv]

`dinov2` (the feature of the class token, of crops of two photographs) and `whisper` (the encoder, on recordings) need the folders
`dinov2_small_saliency` and `whisper_tiny_en` of weights in `--models`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgewise import targets
from edgewise.exporter.recipe import Recipe
from edgewise.exporter.sources import Source, load_source
from edgewise.exporter.tune import parse_budget, tune

DEMOS = ("digits", "speech", "motion")
ALL = (*DEMOS, "dinov2", "whisper")


class Feature(nn.Module):
    """The class token behind the last norm, as an image's embedding."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).pooler_output


def crops(count: int, edge: int) -> np.ndarray:
    """Random crops of the photographs that scikit-learn ships, some of them mirrored, `(count, 3, edge, edge)`."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    generator, made = np.random.default_rng(0), []
    photographs = load_sample_images().images
    for i in range(count):
        picture = photographs[i % len(photographs)]
        size = int(generator.integers(120, 420))
        top, left = (int(generator.integers(0, n - size)) for n in picture.shape[:2])
        crop = Image.fromarray(picture[top : top + size, left : left + size]).resize((edge, edge), Image.Resampling.BILINEAR)
        values = (np.asarray(crop, np.float32) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        made.append((values[:, ::-1] if generator.random() < 0.5 else values).transpose(2, 0, 1).astype(np.float32))
    return np.stack(made)


def case(name: str, models: Path, speech: Path) -> tuple[Source, Any, int, int]:
    """A model, its data, and how many samples to tune with, and to hold out."""
    if name in DEMOS:
        return load_source(f"demo:{name}", batch=16), f"demo:{name}", 64, 256
    if name == "dinov2":
        loaded = load_source(str(models / "dinov2_small_saliency"), batch=8, input_shapes={"pixel_values": (8, 3, 224, 224)})
        feature = Feature(loaded.module)
        return Source(name, "Feature", module=feature, kwargs=loaded.kwargs), {"pixel_values": crops(48, 224)}, 16, 32
    return load_source(str(models / "whisper_tiny_en")), str(speech), 4, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=ALL)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--speech", type=Path, default=Path("speech_en/manifest.tsv"))
    parser.add_argument("--budget", default="tokens=0.5")
    parser.add_argument("--trials", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | schedule | tokens | FLOPs | divergence | of constant | accuracy | loss of constant's | seconds |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in options.parts:
        start = time.perf_counter()
        source, data, samples, held_out = case(name, options.models, options.speech)
        with tempfile.TemporaryDirectory() as folder:
            found = tune(
                source, data, Path(folder) / "tuned.yaml", target=targets.get("openvino"), budget=parse_budget(options.budget),
                samples=samples, held_out=held_out, trials=options.trials, recipe=Recipe(model=name, targets=("openvino",)),
            )  # fmt: skip
        constant = next(row.divergence for row in found.rows if row.name == "constant")
        scores = {row.name: row.accuracy for row in found.rows}
        lost = None if scores["constant"] is None else scores["uncompressed"] - scores["constant"]
        for row in found.rows:
            share = "-" if not lost else f"{(scores['uncompressed'] - row.accuracy) / lost:.0%}"
            accuracy = "-" if row.accuracy is None else f"{row.accuracy:.2%}"
            counts = " ".join(map(str, row.counts))
            print(f"| {name} | {row.name}: {counts} | {row.tokens:.3f} | {row.flops:.3f} | {row.divergence:.4g} | "
                  f"{row.divergence / constant:.0%} | {accuracy} | {share} | {time.perf_counter() - start:.0f} |", flush=True)


if __name__ == "__main__":
    main()
