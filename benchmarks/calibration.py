"""What calibration costs and what it is worth, on OpenVINO: accuracy and size, time against NNCF alone, and speed.

    python benchmarks/calibration.py [demos] [vit] [dinov2] [whisper] [--samples 128] [--models FOLDER] [--speech DATA.tsv]

Accuracy is of `tome:keep=0.5` + `w8a8` against the same compression at `fp32`; speed is of interleaved runs, one thread. `dinov2`
needs the folder `dinov2_small_saliency` of weights in `--models`, and is left out where that is absent.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import edgewise
from edgewise.cli.tables import artifact_sizes
from edgewise.exporter.compare import interleaved
from edgewise.passes.legalise import Legalise
from edgewise.targets import get
from edgewise.verify.data import accuracy
from edgewise.verify.wer import read_spoken, word_errors

KEEP, TARGET = "keep=0.5", "openvino"
COMPRESS = f"tome:{KEEP}"


def size(bundle: edgewise.Bundle, suffix: str = "") -> int:
    """Bytes of the only artifact, or of its files of a suffix."""
    if not suffix:
        return sum(artifact_sizes(bundle).values())
    return sum(info.bytes for name, info in bundle.manifest.files.items() if name.endswith(suffix))


def demos(place: Path) -> None:
    print("| demo | accuracy fp32 | accuracy w8a8 | bytes | share of fp32 | weights' share |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in ("digits", "speech"):
        made = {}
        for precision in ("fp32", "w8a8"):
            made[precision] = edgewise.export(
                f"demo:{name}", place / name / precision, targets=[TARGET], compress=COMPRESS, precision=precision, cache=False
            )
        a, b = (accuracy(made[p], f"demo:{name}")[0]["top1"] for p in ("fp32", "w8a8"))
        whole, weights = (size(made["w8a8"], s) / size(made["fp32"], s) for s in ("", ".bin"))
        print(f"| {name} | {a:.2%} | {b:.2%} | {size(made['w8a8'])} | {whole:.1%} | {weights:.1%} |", flush=True)


class Images:
    """Seeded noise of an image model's shape."""

    def __init__(self, name: str, count: int, edge: int) -> None:
        self.name, self.count, self.edge = name, count, edge

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        for i in range(self.count):
            yield {self.name: np.random.default_rng(i).standard_normal((1, 3, self.edge, self.edge)).astype(np.float32)}


def lower(program, place: Path) -> list[Path]:
    place.mkdir(parents=True)
    legal = Legalise(get(TARGET).realisations)(program.exported).program
    names = {"input_names": list(program.inputs), "output_names": list(program.output_names)}
    return get(TARGET).lower(legal, place, "model", precision="fp32", **names)


def vit(place: Path, samples: int) -> None:
    """ViT-B/16 with random weights: time of the calibration, and speed."""
    import nncf
    import openvino
    import transformers

    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(), add_pooling_layer=False).eval()
    program = edgewise.capture(model, (), {"pixel_values": torch.randn(1, 3, 224, 224)})
    files = {"plain": lower(program, place / "plain"), "half": lower(edgewise.compress(program, COMPRESS), place / "half")}
    images = Images("pixel_values", samples, 224)
    start = time.perf_counter()
    nncf.quantize(
        openvino.Core().read_model(files["plain"][0]), nncf.Dataset(images), model_type=nncf.ModelType.TRANSFORMER,
        subset_size=samples,
    )  # fmt: skip
    alone = time.perf_counter() - start
    start = time.perf_counter()
    files["half int8"] = get(TARGET).quantiser(files["half"], "w8a8", images).write(place / "half8", "model")
    ours = time.perf_counter() - start
    print(f"calibration of {samples} images: {ours:.1f} s; NNCF alone on the uncompressed model: {alone:.1f} s")
    print(f"ratio {ours / alone:.2f}", flush=True)
    files["int8"] = get(TARGET).quantiser(files["plain"], "w8a8", Images("pixel_values", 8, 224)).write(place / "plain8", "model")
    sessions = {name: get(TARGET).load(one, threads=1) for name, one in files.items()}
    feed = next(iter(images))
    speed = {}
    for name in ("half", "int8", "half int8"):
        latency = interleaved(sessions["plain"], sessions[name], feed, feed)
        speed[name] = 1 / latency.ratio
        print(f"{name}: {speed[name]:.2f} times as fast as fp32 with all tokens ({latency.runs} runs)", flush=True)
    print(f"both over the product of each: {speed['half int8'] / (speed['half'] * speed['int8']):.2f}")


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def encoder(folder: Path, place: Path, output: str, feeds: list[np.ndarray]) -> None:
    """Size and similarity of what an encoder gives at `w8a8`, against the same compression at `fp32`."""
    made, results = {}, {}
    name = "pixel_values"
    for precision in ("fp32", "w8a8"):
        calibration = [{name: one} for one in feeds[: len(feeds) // 2]] if precision == "w8a8" else None
        made[precision] = edgewise.export(
            str(folder), place / folder.name / precision, targets=[TARGET], compress=COMPRESS, precision=precision,
            calibration=calibration, input_shapes={name: feeds[0].shape}, cache=False,
        )  # fmt: skip
        with edgewise.load(made[precision]) as session:
            key = output if output in [o.name for o in session.outputs] else session.outputs[0].name
            results[precision] = [session.run({name: one})[key] for one in feeds[len(feeds) // 2 :]]
    near = [cosine(a, b) for a, b in zip(results["fp32"], results["w8a8"], strict=True)]
    share = size(made["w8a8"]) / size(made["fp32"])
    print(f"{folder.name}: {share:.1%} of fp32's bytes")
    print(f"cosine to fp32: mean {statistics.mean(near):.4f}, least {min(near):.4f}", flush=True)


def whisper(folder: Path, data: Path, place: Path, clips: int) -> None:
    """Word errors with the encoder at `w8a8`, in front of the same decoder, against the same compression at `fp32`: of the first
    `clips` recordings; the statistics are of the last ones, as many."""
    spoken = read_spoken(data)
    bundle = edgewise.export(folder.as_posix(), place / "whisper", targets=[TARGET], compress=f"tome@encoder.block[0:4]:{KEEP}")
    artifact = next(one for one in bundle.manifest.targets if one.role == "audio_encoder")
    files = [bundle.path / file for file in artifact.files]
    with edgewise.load(bundle, TARGET, threads=1) as speech:
        name = speech.sessions["audio_encoder"].inputs[0].name
        feeds = [{name: speech._features(wave)} for one in spoken[-clips:] for wave in speech._waves(one.file)]
        quantised = get(TARGET).quantiser(files, "w8a8", feeds).write(place / "encoder8", "model")
        share = sum(f.stat().st_size for f in quantised) / sum(f.stat().st_size for f in files)
        print(f"whisper: the encoder has {share:.1%} of fp32's bytes", flush=True)
        for precision in ("fp32", "w8a8"):
            if precision == "w8a8":
                speech.sessions["audio_encoder"].close()
                speech.sessions["audio_encoder"] = get(TARGET).load(quantised, threads=1)
            texts = [speech.generate(one.file).text for one in spoken[:clips]]
            errors = word_errors([one.text for one in spoken[:clips]], texts)
            print(f"word error rate with the encoder at {precision}: {errors.rate:.2%} ({clips} recordings)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["demos", "vit"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--speech", type=Path, default=Path("speech_en/manifest.tsv"))
    parser.add_argument("--clips", type=int, default=13)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if "demos" in options.parts:
            demos(place)
        if "vit" in options.parts:
            vit(place / "vit", options.samples)
        if "whisper" in options.parts:
            whisper(options.models / "whisper_tiny_en", options.speech, place, options.clips)
        if "dinov2" in options.parts and (options.models / "dinov2_small_saliency").is_dir():
            from sklearn.datasets import load_sample_images

            pictures = [np.asarray(p, np.float32) / 255 for p in load_sample_images().images]
            generator = np.random.default_rng(0)
            crops = []
            for i in range(24):
                picture = pictures[i % len(pictures)]
                top, left = (int(generator.integers(0, n - 224)) for n in picture.shape[:2])
                crop = picture[top : top + 224, left : left + 224]
                crops.append(((crop - 0.45) / 0.225).transpose(2, 0, 1)[None].astype(np.float32))
            # Of the class token: where tokens are merged otherwise, the others come in another order.
            encoder(options.models / "dinov2_small_saliency", place, "pooler_output", crops)


if __name__ == "__main__":
    main()
