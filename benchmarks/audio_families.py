"""Whether bundles of audio-language models generate what the models do, for every family that was tried.

    python benchmarks/audio_families.py [FAMILY ...] [--method divprune|visionzip]

Random weights at small configurations with the structure of the real ones; OpenVINO and ONNX Runtime at fp32; two prompts, 32
tokens each, greedy, compared with the model in transformers. With `--method`, DivPrune or VisionZip leaves 9 tokens behind the
projector and FastV 5 inside of the decoder, and the model's features are replaced and its layers hooked. Prints a line for each
family (VisionZip: those whose projectors keep the encoder's tokens apart), and stops where a token differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
warnings.simplefilter("ignore")

from audio_families import FAMILIES, STACKED, check  # noqa: E402

TARGETS = ("openvino", "onnxruntime")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--method", choices=("divprune", "visionzip"), default="")
    args = parser.parse_args()
    for name in args.families or (STACKED if args.method == "visionzip" else FAMILIES):
        with tempfile.TemporaryDirectory() as folder:
            about = check(name, args.method, Path(folder) / "b", TARGETS).manifest.pipeline
        assert about is not None
        media = [cache.media for cache in about.caches]
        print(f"{name}: {about.stages[0].tokens_before} audio tokens, {media} in the caches, all equal", flush=True)


if __name__ == "__main__":
    main()
