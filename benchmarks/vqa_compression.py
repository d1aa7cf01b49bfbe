"""What each method costs `demo:vqa` in accuracy, measured on what an export writes.

    python benchmarks/vqa_compression.py [--questions N] [--keep K] [--target T] [NAME ...]

NAME is one of the methods below, or specs joined by `+` (`tofu:keep={keep}+fastv@decoder.block[1]:keep=33`).

Every method is exported (`edgewise.export`: vision encoder, prefill and decode, compressed), and the bundle answers the first N
questions of the test split, as `edgewise verify BUNDLE --data demo:vqa --data-samples N` does. Of the 196 visual tokens 98, 49 and
22 are kept, or the nearest number that a method has. Nothing is trained again. Left out is what needs weights of its own
(`token-learner`, `resampler`) or the embedding of a text in the space of the image (`cdpruner`, `trim`, `text-topk`).

Most stand behind the tower. `tome` and `tofu` merge inside of it, in each of its four blocks. `fastv` keeps as many in front of the
decoder's second block, and so do `pyramiddrop`, `sparsevlm` and `dart`; that is less compression, and the tokens that layers of the
decoder see are printed with it. `A+fastv` leaves half as many again behind the tower, and drops so many more in front of the second
block that the mean over the layers is the budget.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

warnings.simplefilter("ignore")

import edgewise  # noqa: E402
from edgewise.demos import scenes  # noqa: E402
from edgewise.verify.questions import exact_match  # noqa: E402

ALL, LAYERS = 196, 4
BUDGETS = (98, 49, 22)
Specs = Callable[[int], tuple[str, ...]]


def plain(name: str) -> Specs:
    """A method behind the tower."""
    return lambda keep: (f"{name}@encoder.out:keep={keep}",)


def square(name: str, more: str = "") -> Specs:
    """A grid of about as many."""
    return lambda keep: (f"{name}@encoder.out:{more}side={round(math.sqrt(keep))}",)


def context(keep: int) -> tuple[str, ...]:
    """A fifth of the tokens hold the others, as nearly in VisionZip's own setting (54 and 10)."""
    return (f"visionzip@encoder.out:keep={keep - keep // 5},context={keep // 5}",)


def merged(name: str) -> Specs:
    return lambda keep: (f"{name}:keep={keep}",)


def pruned(name: str) -> Specs:
    """A method inside of the decoder."""
    return lambda keep: (f"{name}@decoder.block[1]:keep={keep}",)


def both(name: str) -> Specs:
    """A method behind the tower, and one inside of the decoder: the mean over its layers is `keep`."""

    def specs(keep: int) -> tuple[str, ...]:
        first = keep * 3 // 2
        return (f"{name}@encoder.out:keep={first}", f"fastv@decoder.block[1]:keep={(LAYERS * keep - first) // (LAYERS - 1)}")

    return specs


METHODS: dict[str, Specs] = {
    "random": plain("random"),
    "pool": square("pool", "kind=adaptive,"),
    "merge-grid": square("merge-grid"),
    "topk": plain("topk"),
    "fastervlm": plain("fastervlm"),
    "vispruner": plain("vispruner"),
    "visionzip": context,
    "prumerge": plain("prumerge"),
    "dpcknn": plain("dpcknn"),
    "divprune": plain("divprune"),
    "tome": merged("tome"),
    "tofu": merged("tofu"),
    **{name: pruned(name) for name in ("fastv", "pyramiddrop", "sparsevlm", "dart")},
    **{f"{name}+fastv": both(name) for name in ("topk", "vispruner", "divprune")},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="NAME", default=list(METHODS))
    parser.add_argument("--keep", type=int, action="append", help="Only this budget. Repeatable.")
    parser.add_argument("--questions", type=int, default=scenes.TEST)
    parser.add_argument("--target", default="openvino")
    args = parser.parse_args()
    budgets = args.keep or BUDGETS
    full, _ = measure((), args.target, args.questions)
    print(f"{args.questions} questions, {args.target}, uncompressed ({ALL} tokens): {full:.1%}\n")
    print("| method | " + " | ".join(f"{keep / ALL:.0%}" for keep in budgets) + " |", flush=True)
    print("|---" * (len(budgets) + 1) + "|")
    for name in args.methods:
        cells = []
        for keep in budgets:
            specs = METHODS[name](keep) if name in METHODS else tuple(name.format(keep=keep).split("+"))
            found, tokens = measure(specs, args.target, args.questions)
            cells.append(f"{found:.1%} ({tokens})" + ("*" if found >= full - 0.02 else ""))
        print(f"| `{name}` | " + " | ".join(cells) + " |", flush=True)
    print("\nIn brackets: visual tokens that are left. *: within 2 points of uncompressed.")


def measure(specs: tuple[str, ...], target: str, questions: int) -> tuple[float, str]:
    """The share of right answers of a bundle, and how many visual tokens the decoder's layers see, the first ones first."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "b"
        bundle = edgewise.export(
            "demo:vqa", out, targets=[target], compress=specs, prompt_tokens=32, new_tokens=4, cache=False
        )
        (score,) = exact_match(bundle, "demo:vqa", threads=1, most=questions)
        assert bundle.manifest.pipeline is not None
        media = [cache.media for cache in bundle.manifest.pipeline.caches]
    return score["exact_match"], "/".join(map(str, dict.fromkeys(media)))


if __name__ == "__main__":
    main()
