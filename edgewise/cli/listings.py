"""The listings: `edgewise methods`, `targets`, `models` and `sys`."""

from __future__ import annotations

import json as decoder
import platform
import struct
from importlib import metadata
from math import prod
from typing import Annotated, Any

import typer

from edgewise.cli import options
from edgewise.cli.screen import Result, Screen, row, table
from edgewise.errors import MissingExtra, unknown
from edgewise.version import __version__

_PACKAGES = (
    "numpy",
    "pydantic",
    "rich",
    "safetensors",
    "typer",
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
)


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show all of one method.")] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> Result:
    """List the compression methods, or show one with its parameters."""
    from edgewise.ops import METHODS

    screen = Screen(json, quiet)
    if name is not None and name not in METHODS:
        raise unknown("method", name, METHODS)
    found = {entry.name: _method(entry) for entry in METHODS.values() if name in (None, entry.name)}
    if name is None:
        made = table("methods", "method", "what it does", "mechanism", "sites", "needs")
        for one in found.values():
            row(
                made,
                one["name"],
                one["summary"],
                one["mechanism"],
                ", ".join(one["sites"]),
                ", ".join(one["needs"]) or None,
            )
        screen.show(made)
    else:
        one = found[name]
        screen.show(f"{name}: {one['summary']}")
        for key in ("mechanism", "modalities", "sites", "needs", "paper", "limits"):
            text = one[key] if isinstance(one[key], str) else ", ".join(one[key])
            if text:
                screen.show(f"{key}: {text}")
        made = table("parameters", "parameter", "default", "choices", "meaning")
        for parameter in one["parameters"]:
            choices = ", ".join(parameter["choices"] or ()) or None
            row(made, parameter["name"], parameter["default"], choices, parameter["help"])
        screen.show(made)
    return Result({"methods": list(found.values())})


def _method(entry: Any) -> dict[str, Any]:
    plain = ("name", "summary", "mechanism", "paper", "limits", "every_block", "merges", "keeps_order")
    lists = ("modalities", "sites", "needs")
    return {
        **{key: getattr(entry, key) for key in plain},
        **{key: list(getattr(entry, key)) for key in lists},
        "parameters": [
            {
                "name": one.name,
                "default": one.default,
                "help": one.help,
                "choices": list(one.choices) if one.choices else None,
            }
            for one in entry.parameters
        ],
    }


def targets(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show all of one target.")] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> Result:
    """List the targets: what each needs, what is installed, and what it can do."""
    from edgewise import targets as registry

    screen = Screen(json, quiet)
    found = [_target(registry.get(one)) for one in ((name,) if name is not None else registry.names())]
    made = table("targets", "target", "what it is", "precisions", "exports here", "runs here")
    for one in found:
        export, run = ("yes" if one[key] is None else "no" for key in ("export_lacks", "run_lacks"))
        row(made, one["name"], one["description"], ", ".join(one["precisions"]), export, run)
    screen.show(made)
    for one in found:
        for lack in sorted({one[key] for key in ("export_lacks", "run_lacks") if one[key]}):
            screen.show(f"{one['name']}: {lack}")
        if name is not None:
            packages = table("packages", "package", "needed to", "least", "tested", "installed")
            for need in one["requirements"]:
                kind = "run and export" if need["runtime"] else "export"
                row(packages, need["package"], kind, need["minimum"], need["tested"], need["installed"])
            realisations = table("realisations, fastest first", "op", "realisations")
            for op, names in one["realisations"].items():
                row(realisations, op, ", ".join(names))
            screen.show(packages, realisations)
    return Result({"targets": found})


def _target(target: Any) -> dict[str, Any]:
    lacks: dict[str, str | None] = {}
    for key, runtime_only in (("export_lacks", False), ("run_lacks", True)):
        try:
            target.check(runtime_only=runtime_only)
            lacks[key] = None
        except MissingExtra as missing:
            lacks[key] = str(missing)
    return {
        "name": target.name,
        "description": target.description,
        "precisions": list(target.precisions),
        "files": list(target.suffixes),
        "requirements": [
            {
                "package": one.package,
                "minimum": one.minimum,
                "tested": one.tested,
                "installed": one.installed,
                "extra": one.extra,
                "runtime": one.runtime,
            }
            for one in target.requirements
        ],
        "realisations": {op: list(names) for op, names in target.realisations.items()},
        **lacks,
    }


_FORMS = {
    "demo:NAME": "a small trained model that comes with edgewise, with its test split",
    "ORG/NAME": "a Hugging Face id, with safetensors weights",
    "FOLDER": "a local folder of a Hugging Face model",
    "py:package.module:factory": "a function that returns a torch.nn.Module, or (module, example inputs)",
    "FILE.pt2": "a program saved with torch.export.save",
}


def models(
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> Result:
    """List the demo models, and what MODEL may be."""
    from edgewise import demos

    screen = Screen(json, quiet)
    forms = table("MODEL is one of", "form", "what it is")
    for form, meaning in _FORMS.items():
        row(forms, form, meaning)
    found = [_demo(name) for name in demos.names()]
    numbers = ("parameters", "tokens", "classes", "test samples")
    made = table("demo models", "model", "kind", "input", *numbers, right=numbers)
    for one in found:
        shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in one["inputs"].items())
        counts = (one["parameters"], one["tokens"], one["classes"], one["test_samples"])
        row(made, one["model"], one["architecture"], shapes, *counts)
    screen.show(forms, made)
    screen.show("accuracy: edgewise verify BUNDLE --data demo:NAME measures it on the whole test split")
    return Result({"models": found, "forms": _FORMS})


def _demo(name: str) -> dict[str, Any]:
    """What the files of a demo model say of it. Nothing is loaded."""
    from edgewise import demos

    folder, (inputs, samples) = demos.folder(name), demos.outline(name)
    config = decoder.loads((folder / "config.json").read_text("utf-8"))
    return {
        "model": f"demo:{name}",
        "architecture": (config.get("architectures") or [None])[0],
        "inputs": {key: [1, *shape] for key, shape in inputs.items()},
        "parameters": _parameters(folder / "model.safetensors"),
        "tokens": _tokens(config),
        "classes": len(config.get("id2label") or {}) or None,
        "test_samples": samples,
    }


def _tokens(config: dict[str, Any]) -> int | None:
    """Tokens of the encoder, special ones included, for the architectures that the demos have."""
    if config.get("model_type") == "llava":
        return _tokens(config["vision_config"])
    patch = config.get("patch_size")
    if config.get("model_type") in ("vit", "clip_vision_model"):
        return (config["image_size"] // patch) ** 2 + 1
    if config.get("model_type") == "videomae":
        return (config["image_size"] // patch) ** 2 * (config["num_frames"] // config["tubelet_size"])
    if config.get("model_type") == "audio-spectrogram-transformer":
        bins = (config["num_mel_bins"] - patch) // config["frequency_stride"] + 1
        frames = (config["max_length"] - patch) // config["time_stride"] + 1
        return bins * frames + 2
    return None


def _parameters(path: Any) -> int:
    """Number of weights in a safetensors file, read from its header."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = decoder.loads(file.read(length))
    return sum(prod(entry["shape"]) for key, entry in header.items() if key != "__metadata__")


def system(
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> Result:
    """Show this machine and the versions of all that edgewise uses."""
    from edgewise import targets as registry
    from edgewise.bench import host

    screen = Screen(json, quiet)
    here = host.describe().model_dump(mode="json")
    packages = {name: _version(name) for name in _PACKAGES}
    able = {name: _target(registry.get(name)) for name in registry.names()}
    document = {
        "edgewise": __version__,
        "python": platform.python_version(),
        "host": here,
        "packages": packages,
        "targets": {
            name: {"exports": one["export_lacks"] is None, "runs": one["run_lacks"] is None}
            for name, one in able.items()
        },
    }
    made = table("system", "what", "value")
    row(made, "edgewise", __version__)
    for key, value in here.items():
        if key == "memory_bytes" and value is not None:
            value = f"{value / 2**30:.1f} GiB"
        row(made, key.removesuffix("_bytes").replace("_", " "), value)
    for package, version in packages.items():
        row(made, package, version or "not installed")
    for name, one in able.items():
        lack = one["run_lacks"] or one["export_lacks"]
        what = "runs and exports" if lack is None else "runs" if one["run_lacks"] is None else "not available"
        row(made, f"target {name}", what if lack is None else f"{what}: {lack}")
    screen.show(made)
    return Result(document)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
