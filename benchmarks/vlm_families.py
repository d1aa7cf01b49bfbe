"""Whether bundles of vision-language models generate what the models do, for every family that was tried.

    python benchmarks/vlm_families.py [FAMILY ...] [--images 2 | --video] [--compressed | --compress SPEC]

Random weights at small configurations with the structure of the real ones; OpenVINO and ONNX Runtime at fp32; three prompts, 32
tokens each, greedy. Prints a line for each family: how many of the texts are equal, and how many kinds of tokens they hold. About
20 seconds a family on an idle core. `--images 2`: prompts with two images, and text between them. `--video`: with a video of four
frames, for the families that take such, and not with --compressed.

With `--compressed`, tokens are taken out in front of the decoder (VisionZip; where the projector reads a grid, behind it) and
inside of it (FastV), and two texts are compared with the model in transformers, whose features are replaced, whose positions in
rows are gathered and whose layers are hooked. With `--compress` there is no reference: the two targets are
compared with one another.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
warnings.simplefilter("ignore")

from vlm_families import FAMILIES, VIDEOS, make, make_video, noise  # noqa: E402
from vlm_pruned import check_compressed  # noqa: E402
from vlm_reference import IMAGE, VIDEO, greedy_of_several  # noqa: E402

import edgewise  # noqa: E402
from edgewise.errors import EdgewiseError  # noqa: E402

PROMPTS = {
    1: [[[1, 5, 6], [7, 8, 9]], [[], [4]], [[2] * 6, [3, 4, 5, 6, 7, 8]]],
    2: [[[1, 5, 6], [7, 8], [9, 3]], [[], [2], [4]], [[2] * 4, [3, 4, 5, 6], [7, 8, 9, 10]]],
}
"""Texts before, between and behind the images, by the number of images."""
TARGETS = ("openvino", "onnxruntime")
NEW = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--images", type=int, choices=PROMPTS, default=1)
    parser.add_argument("--video", action="store_true")
    parser.add_argument("--compressed", action="store_true")
    parser.add_argument("--compress", action="append", default=[])
    args = parser.parse_args()
    if args.video and (args.compressed or args.images > 1):
        parser.error("--video goes with --compress alone")
    for name in args.families or (VIDEOS if args.video else FAMILIES):
        try:
            found = compressed(name, args.images) if args.compressed else measure(name, args.images, args.video, args.compress)
            print(name, found, flush=True)
        except EdgewiseError as error:
            print(name, "refused:", str(error).splitlines()[0], flush=True)


def compressed(name: str, images: int) -> str:
    """Compare one family, compressed, with the reference of the tests, which raises where a token differs."""
    with tempfile.TemporaryDirectory() as folder:
        return f"{check_compressed(name, Path(folder) / 'b', TARGETS, images)} in the caches, all equal"


def measure(name: str, images: int, video: bool, specs: list[str]) -> str:
    """Export one family and compare what it generates."""
    model, example = make_video(name) if video else make(name, images)
    argument, media, given = ("pixel_values_videos", VIDEO, "video") if video else ("pixel_values", IMAGE, "images")
    with tempfile.TemporaryDirectory() as folder:
        bundle = edgewise.export(
            model,
            Path(folder) / "b",
            example=example,
            targets=TARGETS,
            compress=specs,
            images=images,
            prompt_tokens=12,
            new_tokens=NEW,
            cache=False,
        )
        pipeline = bundle.manifest.pipeline
        assert pipeline is not None
        pixels = noise(*example[argument].shape, seed=5)
        others = {k: v for k, v in example.items() if k != argument}
        texts: dict[str, list[list[int]]] = {}
        for target in TARGETS:
            with edgewise.load(bundle, target=target) as loaded:
                asked = [[*prompt[0], *(token for text in prompt[1:] for token in (media, *text))] for prompt in PROMPTS[images]]
                texts[target] = [loaded.generate(input_ids=ids, **{given: pixels.numpy()}).ids for ids in asked]
        if specs:
            wanted = texts["onnxruntime"]
        else:
            count = pipeline.media_tokens
            wanted = [greedy_of_several(model, pixels, p, count, NEW, video=video, **others) for p in PROMPTS[images]]
        equal = ", ".join(f"{t} {sum(a == b for a, b in zip(texts[t], wanted, strict=True))} of 3 equal" for t in TARGETS)
        kinds = [len(set(text)) for text in wanted]
        kept = [cache.media for cache in pipeline.caches]
        return f"{images} x {pipeline.media_tokens} visual tokens, {kept} in the caches; {equal}; kinds of tokens {kinds}"


if __name__ == "__main__":
    main()
