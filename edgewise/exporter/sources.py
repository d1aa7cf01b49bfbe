"""Model sources: what MODEL on the command line means, and how it becomes a module with example inputs."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from edgewise import demos
from edgewise.errors import InputError, extras_named, unknown
from edgewise.exporter.processors import kind_of, preprocessing


@dataclass
class Source:
    """A loaded model: `module` or an `exported` program, example inputs by position or name, what the processor does to
    raw data, and real `samples` of the inputs where the source has them (shape `(n, *input)`). `role`: of the program, where it is
    known and not to be found from the graph. `whole`: the model that generates, where `module` is its encoder. `order`: see
    `Program.order`; `tokens`, `grid`: see `Program.with_role`."""

    name: str
    class_name: str
    module: nn.Module | None = None
    exported: ExportedProgram | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    preprocessing: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    role: str | None = None
    whole: nn.Module | None = None
    order: tuple[str, ...] = ()
    tokens: str | None = None
    grid: tuple[int, ...] | None = None


def load_source(
    model: str,
    *,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    batch: int = 1,
    seed: int = 0,
    trust_remote_code: bool = False,
    weights_only: bool = False,
) -> Source:
    """Load what MODEL names: a Hugging Face id or local folder, `py:package.module:factory`, a `.pt2` file, `demo:NAME`.

    Args:
        input_shapes: shapes by input name, where the model's or processor's defaults are not wanted.
        batch: first dimension of the default shapes.
        trust_remote_code: run Python code that comes with a Hugging Face model.
        weights_only: accept pickled weights too, loaded with torch's `weights_only`; otherwise safetensors alone.

    Raises InputError where the model is unknown or cannot be loaded safely.
    """
    shapes = dict(input_shapes or {})
    if model.startswith("demo:"):
        name = model.removeprefix("demo:")
        if name not in demos.names():
            raise unknown("demo model", name, demos.names())
        source = _hugging_face(str(demos.folder(name)), shapes, batch, seed, False, False)
        source.name = model
        split = demos.split(name)
        if split is None:
            return source
        source.samples = dict(split.inputs)
        for strange in source.kwargs.keys() - split.inputs.keys():
            raise unknown(f"input of {model}", strange, split.inputs)
        # Real examples, where the default shapes are wanted: the split has exactly those.
        fits = all(
            tuple(v.shape[1:]) == split.inputs[k].shape[1:] for k, v in source.kwargs.items() if k in split.inputs
        )
        if fits:
            source.kwargs = {
                k: torch.from_numpy(split.inputs[k][: v.shape[0]].copy()) for k, v in source.kwargs.items()
            }
        return source
    if model.startswith("py:"):
        if batch != 1:
            raise InputError(f"--batch {batch} is for models with default shapes, and {model} has none: give --input-shapes")
        return _python(model, shapes, seed)
    if model.endswith(".pt2"):
        if shapes or batch != 1:
            raise InputError(f"the shapes of {model} were settled as it was exported: leave out --input-shapes and --batch")
        return _pt2(model)
    return _hugging_face(model, shapes, batch, seed, trust_remote_code, weights_only)


def parse_shapes(texts: list[str]) -> dict[str, tuple[int, ...]]:
    """Parse `--input-shapes`, given as `name=1x3x224x224`. Raises InputError."""
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts:
        for part in text.split(","):
            name, equals, sizes = part.strip().partition("=")
            numbers = sizes.lower().split("x")
            if not equals or not name or not all(re.fullmatch("[0-9]{1,12}", n) and int(n) > 0 for n in numbers):
                raise InputError(f"--input-shapes {part!r} is not NAME=AxBxC, for example pixel_values=1x3x224x224")
            shapes[name] = tuple(int(n) for n in numbers)
    return shapes


def _python(model: str, shapes: dict[str, tuple[int, ...]], seed: int) -> Source:
    try:
        _, module_name, factory_name = model.split(":")
    except ValueError:
        raise InputError(f"{model!r} is not py:package.module:factory") from None
    if not all(part.isidentifier() for part in (*module_name.split("."), factory_name)):
        raise InputError(f"{model!r} is not py:package.module:factory, of names as Python has them")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        package = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{model}: cannot import {module_name!r} ({error}); run from the folder that holds it, or install it"
        ) from error
    factory = getattr(package, factory_name, None)
    if factory is None:
        raise unknown(f"factory in {module_name}", factory_name, [n for n in dir(package) if not n.startswith("_")])
    try:
        made = factory()
    except Exception as error:
        raise InputError(f"{model} raised {type(error).__name__}: {error}") from error
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(made, tuple):
        made, example = made
        args, kwargs = (
            ((), dict(example))
            if isinstance(example, Mapping)
            else ((example if isinstance(example, tuple) else (example,)), {})
        )
    if not isinstance(made, nn.Module):
        raise InputError(
            f"{model} returned {type(made).__name__}: a factory returns a torch.nn.Module, or (module, inputs)"
        )
    if shapes:
        args, kwargs = (), {name: random_input(shape, torch.float32, seed) for name, shape in shapes.items()}
    if not args and not kwargs:
        raise InputError(
            f"{model} gives no example inputs: let the factory return (module, inputs), or give --input-shapes "
            "NAME=AxBxC with the argument names of its forward"
        )
    return Source(model, type(made).__name__, module=made, args=args, kwargs=kwargs)


def _pt2(model: str) -> Source:
    path = Path(model)
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        exported = torch.export.load(str(path))
    except Exception as error:
        raise InputError(f"{path} is not a program saved with torch.export.save: {error}") from error
    return Source(model, "ExportedProgram", exported=exported)


def _hugging_face(
    model: str, shapes: dict[str, tuple[int, ...]], batch: int, seed: int, remote: bool, pickled: bool
) -> Source:
    with extras_named():
        import transformers

    from edgewise.exporter.capture import quiet

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    local = Path(model)
    if local.suffix == ".mlpackage" and local.exists():
        raise InputError(f"{local} is a Core ML package, and no model to export: `edgewise run` runs it")
    if local.exists() and not (local / "config.json").is_file():
        raise InputError(f"{local} holds no config.json: give the folder of a Hugging Face model, or a .pt2 file")
    if not local.exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise InputError(f"{model} does not exist")
    options: dict[str, Any] = {"trust_remote_code": remote}
    if local.exists():
        options["local_files_only"] = True
        if not pickled and not any(local.glob("*.safetensors")):
            raise InputError(
                f"{local} holds no .safetensors weights; pickled weights can run code when they are loaded. "
                "Convert them, or pass --weights-only to load them with torch's restricted unpickler"
            )
    config = load_config(model, **options)
    names = list(getattr(config, "architectures", None) or [])
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None and not remote:
        cls = transformers.AutoModel
    try:
        with quiet():
            module = (cls or transformers.AutoModel).from_pretrained(
                model, use_safetensors=None if pickled else True, dtype=torch.float32, **options
            )
    except Exception as error:
        raise InputError(f"cannot load the weights of {model}: {str(error).splitlines()[0]}") from error
    notes: tuple[str, ...] = ()
    whole = None
    if getattr(config, "is_encoder_decoder", False) and hasattr(module, "get_encoder"):
        notes = (f"{type(module).__name__} generates text; its encoder is exported",)
        whole = module.eval()
        module = module.get_encoder()
    module.eval()
    constants = preprocessing(local, kind_of(shapes or [getattr(module, "main_input_name", "")])) if local.exists() else {}
    kwargs = example_inputs(module, config, constants, shapes, batch, seed)
    source = Source(model, type(module).__name__, module=module, kwargs=kwargs, preprocessing=constants, notes=notes)
    source.whole = whole
    return source


def load_config(model: str, **options: Any) -> Any:
    """The configuration of a Hugging Face id or folder; `options` of `from_pretrained`. Raises InputError."""
    with extras_named():
        import transformers

    from edgewise.exporter.capture import quiet

    try:
        with quiet():
            return transformers.AutoConfig.from_pretrained(model, **options)
    except Exception as error:
        raise InputError(_hub_error(model, error)) from error


def _hub_error(model: str, error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    text = f"unknown model {model!r}: {first}"
    if ":" in model:
        kinds = ["demo", "py"]
        text += f" (a prefix is one of {', '.join(k + ':' for k in kinds)})"
    return (
        text
        + ". MODEL is a Hugging Face id or local folder, py:package.module:factory, a .pt2 file, or demo:"
        + "|".join(demos.names())
    )


def example_inputs(
    module: nn.Module,
    config: Any,
    preprocessing: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    batch: int,
    seed: int,
) -> dict[str, Tensor]:
    """Example inputs for a Hugging Face model: its main input and, for two-tower models, the text that goes with it.

    Shapes come from `shapes`, else from the configuration, else from the processor.
    """
    main = getattr(module, "main_input_name", "input_ids")
    wanted = dict(shapes)
    if not wanted:
        wanted[main] = _default_shape(main, config, preprocessing, batch, module)
        if hasattr(config, "text_config") and hasattr(config, "vision_config") and main == "input_ids":
            wanted["pixel_values"] = _default_shape("pixel_values", config, preprocessing, batch, module)
        elif hasattr(config, "text_config") and hasattr(config, "audio_config") and main == "input_ids":
            wanted["input_features"] = _default_shape("input_features", config, preprocessing, batch, module)
    inputs: dict[str, Tensor] = {}
    for name, shape in wanted.items():
        if name.endswith("_ids") or name.endswith("mask"):
            text = getattr(config, "text_config", config)
            inputs[name] = (
                torch.ones(shape, dtype=torch.int64)
                if name.endswith("mask")
                else random_ids(shape, int(getattr(text, "vocab_size", 2)), seed)
            )
        else:
            inputs[name] = random_input(shape, torch.float32, seed)
    return inputs


def _default_shape(
    name: str, config: Any, preprocessing: Mapping[str, Any], batch: int, module: nn.Module
) -> tuple[int, ...]:
    vision = getattr(config, "vision_config", config)
    if name in ("pixel_values", "pixel_values_videos"):
        size = getattr(vision, "image_size", None) or _processor_size(preprocessing)
        channels = getattr(vision, "num_channels", 3)
        frames = getattr(vision, "num_frames", None)
        if size is not None:
            height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
            return (batch, *((frames,) if frames else ()), channels, height, width)
    if name == "input_features":
        audio = getattr(config, "audio_config", config)
        bins, positions = getattr(audio, "num_mel_bins", None), getattr(audio, "max_source_positions", None)
        frames = 2 * positions if positions else preprocessing.get("nb_max_frames")
        if bins and frames:
            return (batch, bins, int(frames))
    if name == "input_values":
        bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
        if bins and frames:
            return (batch, frames, bins)
        return (batch, int(preprocessing.get("sampling_rate", 16000)))
    if name == "input_ids":
        text = getattr(config, "text_config", config)
        positions = getattr(text, "max_position_embeddings", None)
        if positions:
            return (batch, min(int(positions), 128))
    raise InputError(
        f"no default shape is known for the input {name!r} of {type(module).__name__}: give --input-shapes {name}=AxBxC"
    )


def _processor_size(preprocessing: Mapping[str, Any]) -> Any:
    size = preprocessing.get("crop_size") or preprocessing.get("size")
    if isinstance(size, Mapping):
        if "height" in size:
            return (size["height"], size["width"])
        # Of processors that cut patches and merge them, the edges are limits of an area.
        return None if "merge_size" in preprocessing else size.get("shortest_edge")
    return size


def random_input(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Seeded normal noise, as normalised media have it."""
    try:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    except (RuntimeError, MemoryError) as error:  # as torch says that there is not so much memory
        wanted = "x".join(map(str, shape))
        raise InputError(f"an example of the shape {wanted} cannot be made here: it takes too much memory") from error


def random_ids(shape: tuple[int, ...], vocabulary: int, seed: int) -> Tensor:
    """Seeded token ids; the last of each row is the highest, as an end-of-text token is in CLIP."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(min(3, vocabulary - 1), max(4, vocabulary - 1), shape, generator=generator)
    ids[..., -1] = vocabulary - 1
    return ids
