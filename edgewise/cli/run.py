"""`edgewise run`: run one artifact of a bundle, or a Core ML package, once; or generate text with a whole bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from edgewise.bundle.manifest import Component
from edgewise.bundle.reader import read_manifest
from edgewise.calibration.pixels import is_of_images
from edgewise.cli import options
from edgewise.cli.files import whole
from edgewise.cli.screen import Result, Screen, number, row, table
from edgewise.errors import InputError
from edgewise.targets import Session, choose
from edgewise.verify.data import load_data, load_feeds

_TOP = 5
_PACKAGE = ".mlpackage"


def run(
    bundle: Annotated[
        Path,
        typer.Argument(
            metavar="BUNDLE", help="The folder that `edgewise export` wrote, or any Core ML package, NAME.mlpackage."
        ),
    ],
    inputs: Annotated[
        str | None,
        typer.Option("--inputs", "-i", metavar="SRC", help="An .npz or .safetensors file, or demo:NAME[index]."),
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", metavar="FILE", help="An image: for an artifact of one, or with --prompt.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The question. The model's template goes around it.")
    ] = None,
    video: Annotated[
        Path | None, typer.Option("--video", metavar="FILE", help="A video, or a folder of its frames: with --prompt.")
    ] = None,
    audio: Annotated[
        Path | None, typer.Option("--audio", metavar="FILE", help="A recording: to write down what is said, or with --prompt.")
    ] = None,
    language: Annotated[
        str | None, typer.Option("--language", metavar="NAME", help="That is spoken: en, or english. Default: it is detected.")
    ] = None,
    task: Annotated[str | None, typer.Option("--task", metavar="NAME", help="Of a speech model: transcribe, translate.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", metavar="N", help="Stop after N tokens. Default: as many as have room.")
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", help="0: the likeliest token. Above: draw, the flatter the higher.")
    ] = 0.0,
    top_k: Annotated[int | None, typer.Option("--top-k", metavar="N", help="Draw from the N likeliest tokens only.")] = None,
    top_p: Annotated[
        float, typer.Option("--top-p", metavar="P", help="Draw from the likeliest tokens that have this probability together.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of drawing: the same seed gives the same text.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE.npz", help="Write the outputs here.")] = None,
    target: Annotated[str | None, typer.Option("--target", help="Default: the first that can run here.")] = None,
    role: Annotated[
        str | None, typer.Option("--role", help="Which component, or function of a package. Default: the first.")
    ] = None,
    function: options.Function = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> Result:
    """Run one artifact of BUNDLE on arrays, and show what comes out; or generate text with all of it (--prompt, --audio)."""
    from edgewise.bundle import Bundle
    from edgewise.runtime import load_session

    screen = Screen(json, quiet)
    words = {"prompt": prompt, "video": video, "audio": audio, "language": language, "task": task}
    given: dict[str, Any] = {name: value for name, value in words.items() if value is not None}
    if image:
        given["image"] = image[0] if len(image) == 1 else image
    picture = image[0] if image and len(image) == 1 and len(given) == 1 and _of_one_graph(bundle) else None
    if picture is not None and inputs is not None:
        raise InputError("--inputs and --image both say what to run: give one of them")
    if given and picture is None:
        if inputs is not None or out is not None or role is not None or function is not None:
            raise InputError(
                "--inputs, --role, --function and -o are for one artifact, --image, --video, --prompt and --audio for the whole "
                "model: give either"
            )
        from edgewise.cli.generate import generate
        from edgewise.runtime import Sampling

        sampling = Sampling(temperature, top_k, top_p, seed)
        return generate(screen, Bundle.open(bundle), given, max_new_tokens, sampling, target, threads)
    if inputs is None and picture is None:
        raise InputError(
            "give --inputs SRC or --image FILE to run one artifact, or --image FILE --prompt TEXT, --video FILE "
            "--prompt TEXT, or --audio FILE, for a generative model"
        )
    if out is not None and out.suffix != ".npz":
        raise InputError(f"-o {out}: outputs are written as .npz")
    if role is not None and function is not None:
        raise InputError("--role and --function say which artifact to run: give one of them")
    if bundle.suffix == _PACKAGE:
        if inputs is None:
            raise InputError(f"{bundle} is a package, which does not say how an image is resized: give --inputs")
        session, role = _package(bundle, target, function or role, threads)
        feeds = load_data(inputs).inputs
    else:
        opened = Bundle.open(bundle)
        if function is not None:
            role = choose(opened, [target] if target else None, function)[0].role
        role = role or opened.manifest.components[0].role
        component, known = opened.manifest.component(role), opened.manifest.preprocessing
        if picture is not None:
            feeds = _pictured(picture, component, known)
        else:
            assert inputs is not None
            feeds = load_feeds(inputs, component, known)
        session = load_session(opened, target, role, threads=threads)
    with session:
        outputs = session.run(feeds)
    found = {name: _summary(array) for name, array in outputs.items()}
    made = table("outputs", "output", "shape", "dtype", "min", "max", f"top {_TOP} classes", right=("min", "max"))
    for name, about in found.items():
        classes = [" ".join(f"{one['index']} ({one['score']:.3g})" for one in best) for best in about["top"] or ()]
        row(
            made,
            name,
            "x".join(map(str, about["shape"])) or "scalar",
            about["dtype"],
            number(about["min"], ".4g"),
            number(about["max"], ".4g"),
            "\n".join(classes) or None,
        )
    screen.show(made)
    if out is not None:
        _write(out, outputs)
        screen.say(f"wrote {out}")
    return Result({"bundle": str(bundle), "role": role, "outputs": found, "out": str(out) if out else None})


def _of_one_graph(bundle: Path) -> bool:
    """Whether this runs an artifact, and generates nothing."""
    return bundle.suffix == _PACKAGE or read_manifest(bundle).pipeline is None


def _pictured(path: Path, component: Component, preprocessing: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """An image file as the only input of a component."""
    if len(component.inputs) != 1:
        names = ", ".join(one.name for one in component.inputs)
        raise InputError(f"{component.role} takes {names}, which are more than an image: give --inputs")
    from edgewise.runtime.images import load_pixels

    if not is_of_images(preprocessing):
        raise InputError("the bundle does not say what the model's processor does to images: give --inputs")
    (info,) = component.inputs
    return {info.name: load_pixels(path, info.shape, preprocessing)}


def _package(path: Path, target: str | None, function: str | None, threads: int | None) -> tuple[Session, str]:
    """A session of a Core ML package, whoever made it, and the function that it runs."""
    from edgewise.targets import get

    if target not in (None, "coreml"):
        raise InputError(f"{path} is a Core ML package and runs as --target coreml, not {target}")
    get("coreml").check(runtime_only=True)
    from edgewise.targets.coreml.session import InterpreterSession

    session = InterpreterSession(path, function=function, threads=threads)
    return session, session.function


def _summary(array: np.ndarray) -> dict[str, Any]:
    """What is said of one output. `top`: for each row of class scores, the best classes and their scores."""
    numbers = array.size > 0 and array.dtype.kind in "biuf"
    scores = array.ndim == 2 and array.shape[1] > 1 and np.issubdtype(array.dtype, np.floating)
    return {
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "min": _plain(array.min()) if numbers else None,
        "max": _plain(array.max()) if numbers else None,
        "top": [_top(line) for line in array] if scores and np.isfinite(array).all() else None,
    }


def _top(scores: np.ndarray) -> list[dict[str, Any]]:
    best = np.argsort(-scores, kind="stable")[:_TOP]
    return [{"index": int(index), "score": float(scores[index])} for index in best]


def _plain(value: Any) -> float | int | bool | None:
    plain: float | int | bool = value.item()
    return plain if np.isfinite(plain) else None


def _write(out: Path, outputs: dict[str, np.ndarray]) -> None:
    """Write the outputs whole or not at all."""
    with whole(out) as part, open(part, "wb") as file:
        np.savez(file, **outputs)  # type: ignore[arg-type]
