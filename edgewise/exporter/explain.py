"""Explain a compressed model on one input: which tokens every site kept, and what it merged into what.

The compressed graph runs on the input. What every step was given there is handed to the step's method once more,
outside of the graph, which also says where each token went; both must have kept the same tokens.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from edgewise.document import readable
from edgewise.errors import CheckFailed, InputError, Refused, extras_named
from edgewise.exporter.capture import capture, from_exported
from edgewise.exporter.matrix import read_recipe
from edgewise.exporter.run import Runner
from edgewise.exporter.sources import Source, load_source
from edgewise.passes.insert import Insert, Tap
from edgewise.passes.plan import parse_spec
from edgewise.passes.program import Program, compress
from edgewise.passes.step import reduced

if TYPE_CHECKING:
    from edgewise.calibration.media import Kind, Media
    from edgewise.exporter.draw import Group, Panel

FILE = "explain.json"
OVERVIEW = "overview.png"
_FORMAT = "edgewise explanation"


@dataclass(frozen=True)
class Layer:
    """What one method did at one site, to one input.

    `assignment (tokens_in,)`: the output that each token of the site went to, -1 where dropped. `kept (tokens_out,)`:
    the token of the site that each output is or is represented by, -1 where it is none; None where tokens were pooled.
    `origin (tokens of the stream,)` and `heads (tokens_out,)` say the same of the stream's original tokens, over all
    sites so far. `grid` is the shape of those that are not `protected`.
    """

    site: str
    method: str
    stream: str
    tokens_in: int
    tokens_out: int
    assignment: np.ndarray
    kept: np.ndarray | None
    origin: np.ndarray
    heads: np.ndarray | None
    protected: int
    grid: tuple[int, ...] | None

    def groups(self) -> dict[int, list[int]]:
        """The original tokens that are not protected, by the output that they are in."""
        found: dict[int, list[int]] = {}
        for token in range(self.protected, len(self.origin)):
            if self.origin[token] >= 0:
                found.setdefault(int(self.origin[token]), []).append(token)
        return found


@dataclass(frozen=True)
class Explanation:
    """What was written: the document of `explain.json`, and the folder."""

    document: dict[str, Any]
    folder: Path


def decisions(program: Program, inputs: Mapping[str, Tensor]) -> list[Layer]:
    """What every step of a compressed program does to `inputs`, by the names of the program's inputs; of a batch the
    first sample.

    Raises Refused where one sample's tokens lie in several rows, CheckFailed if a step that is run again keeps other
    tokens than the graph does.
    """
    exported, taps = _tapped(program)
    made = {node.name for node in exported.graph.nodes}
    observer = _Observer(replace(program, exported=exported), {node.name for tap in taps for node in _nodes(tap)})
    observer(inputs)

    def value(node: fx.Node | None) -> Tensor | None:
        # What the graph does not hold any more was of no use to what is left of it, and any value will do.
        if node is None or node.name in made:
            return None if node is None else observer.seen[node.name]
        known: Tensor = node.meta["val"]
        return torch.zeros(known.shape, dtype=known.dtype)

    batch = {len(tensor) for tensor in inputs.values() if tensor.ndim}
    layers: list[Layer] = []
    for tap in taps:
        given = {name: value(node) for name, node in tap.given.items()}
        with torch.no_grad():
            result = reduced(tap.step, tap.anchor, tap.stream, given, [_known(value(node)) for node in tap.crossed])
            assignment = result.assignment()
        if len(assignment) > 1 and len(assignment) not in batch:
            raise Refused(
                f"its tokens lie in {len(assignment)} rows for {max(batch)} samples: each row is only a part of an "
                "input, and has no grid of its own",
                method=tap.step.method.name,
            )
        kept = result.kept if tap.step.method.represented else None
        graph = observer.seen.get(tap.kept.name) if tap.kept is not None else None
        if kept is not None and graph is not None and not torch.equal(kept.expand_as(graph), graph):
            raise CheckFailed(
                f"{tap.step.method.name} at {tap.step.place.name} kept other tokens when it was run again"
            )
        layers.append(_layer(tap, assignment[0].numpy(), None if kept is None else kept[0].numpy(), layers))
    return layers


class _Observer(Runner):
    """Runs a program, and keeps the values of some nodes."""

    def __init__(self, program: Program, wanted: set[str]) -> None:
        super().__init__(program.exported, program.output_names)
        self._wanted = wanted
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._wanted:
            self.seen[n.name] = value
        return value


def _tapped(program: Program) -> tuple[Any, list[Tap]]:
    """The compressed graph once more, and where its steps are."""
    exported, taps = program.base, []
    for stream in program.analysis.streams:
        names = {place.name for place in stream.places}
        steps = [step for step in program.steps if step.place.name in names]
        if steps:
            insert = Insert(stream, steps, program.analysis.engine)
            exported = insert(exported).program
            taps += insert.taps
    return exported, taps


def _nodes(tap: Tap) -> Iterator[fx.Node]:
    yield from (node for node in (*tap.given.values(), *tap.crossed, tap.kept) if node is not None)


def _known(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _layer(tap: Tap, assignment: np.ndarray, kept: np.ndarray | None, layers: Sequence[Layer]) -> Layer:
    """One step, composed with those before it in the same stream."""
    step, stream, lost = tap.step, tap.stream, tap.step.place.lost
    before = next((layer for layer in reversed(layers) if layer.stream == stream.name), None)
    already = 0
    if before is not None:
        already = next(place.lost for place in stream.places if place.name == before.site)
    origin = np.arange(stream.tokens) if before is None else before.origin
    heads = np.arange(stream.tokens) if before is None else before.heads
    # Tokens that lead the stream and are cut off before this site.
    gone = lost - already
    origin = np.where(origin < gone, -1, origin - gone)
    heads = None if heads is None else heads[gone:]
    return Layer(
        site=step.place.name,
        method=step.method.name,
        stream=stream.name,
        tokens_in=step.tokens_in,
        tokens_out=step.tokens_out,
        assignment=assignment,
        kept=kept,
        origin=np.where(origin < 0, -1, assignment[origin]),
        heads=None if heads is None or kept is None else np.where(kept < 0, -1, heads[kept]),
        protected=stream.protected,
        grid=stream.grid,
    )


@dataclass(frozen=True)
class Asked:
    """The one input to explain: a file of a `kind`, or the sample of that number of the source's own split."""

    kind: Kind | None = None
    path: Path | None = None
    sample: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of `load_source`."""


def explain(
    model: str, out: str | os.PathLike[str], asked: Asked, compression: Sequence[str] = (), progress: Any = None
) -> Explanation:
    """Draw what compression does to one input into the folder `out`: each site, `overview.png`, and `explain.json`.

    `model` is what MODEL may be on the command line, or the folder of a bundle, whose recipe then says what to
    compress. `out` may be absent, empty, or a folder that this wrote before, which is replaced. Raises InputError,
    Refused or CheckFailed, and then nothing is written.
    """
    place = Path(os.path.abspath(out))
    _check_place(place)
    for spec in compression:
        parse_spec(spec)
    step = progress or (lambda done, total, text: None)
    step(0, 4, "load the model")
    source, specs = _source(model, compression, asked.options)
    step(1, 4, "capture and compress")
    program = _program(source, specs)
    step(2, 4, "read the input and run")
    with extras_named():
        from edgewise.exporter import draw  # noqa: F401  # Pillow is there, or it is said what to install
    name, media = _media(program, source, asked)
    layers = decisions(program, _feeds(program, name, media))
    shown = [layer for layer in layers if layer.grid is not None]
    notes = [*source.notes, *program.notes, *media.notes]
    notes += [
        f"{layer.site}: its tokens lie on no grid that is known, and are not drawn"
        for layer in layers
        if layer.grid is None
    ]
    if not shown:
        raise Refused(
            f"the tokens of {layers[0].stream} lie on no grid that is known (they come from no convolution over the "
            "input), so that they have no place in a picture",
            method=layers[0].method,
        )
    document: dict[str, Any] = {
        "format": _FORMAT,
        "model": source.name,
        "compress": list(specs),
        "input": {"name": name, "kind": media.kind, "of": str(asked.path) if asked.path else f"sample {asked.sample}"},
        "bundle": None if compression else str(model),
        "notes": notes,
    }
    step(3, 4, "draw")
    with _written(place) as folder:
        files = _draw(folder, source.name, media, shown)
        document["sites"] = [_described(layer, files.get(id(layer))) for layer in layers]
        document["overview"] = OVERVIEW
        document["files"] = sorted([*files.values(), OVERVIEW, FILE])
        (folder / FILE).write_text(readable(json.dumps(document, indent=1, ensure_ascii=False)) + "\n", "utf-8")
    return Explanation(document, place)


def _source(model: str, specs: Sequence[str], options: Mapping[str, Any]) -> tuple[Source, tuple[str, ...]]:
    """The model and the specs; those of a bundle come from its recipe."""
    from edgewise.bundle.manifest import MANIFEST_NAME

    if not (Path(model) / MANIFEST_NAME).exists():
        if not specs:
            raise InputError("nothing to explain: give --compress SPEC, for example --compress tome:keep=0.5")
        return load_source(model, **options), tuple(specs)
    from edgewise.bundle import Bundle

    if specs:
        raise InputError(f"{model} is a bundle, and was compressed as its recipe says: leave --compress out")
    Bundle.open(model)  # checks every digest, that of the recipe too
    recipe = read_recipe(model)
    if not recipe.compress:
        raise InputError(f"{model} was exported without compression: there is nothing to explain")
    given: dict[str, Any] = {"input_shapes": recipe.input_shapes, "seed": recipe.seed} | {
        k: v for k, v in options.items() if v
    }
    try:
        return load_source(recipe.model, **given), recipe.compress
    except InputError as error:
        raise InputError(f"{model} was made of {recipe.model}, which cannot be loaded here: {error}") from error


def _program(source: Source, specs: Sequence[str]) -> Program:
    if source.exported is not None:
        program = from_exported(source.exported)
    else:
        assert source.module is not None
        program = capture(source.module, source.args, source.kwargs)
    program = compress(program, *specs)
    if not program.steps:
        raise InputError(f"{', '.join(specs)} keeps every token of {source.name}: there is nothing to explain")
    if any(isinstance(one.text, int) for one in program.steps):
        raise InputError(
            "the method takes a text, which decides what is kept: give its embedding as text=FILE in the spec"
        )
    return program


def _media(program: Program, source: Source, asked: Asked) -> tuple[str, Media]:
    """The input's name, and what to feed."""
    from edgewise.calibration import media

    inputs = {n: tuple(t.shape) for n, t in program.inputs.items() if t.is_floating_point() and n not in program.added}
    kinds = {n: media.kind_of(shape) for n, shape in inputs.items()}
    takes = (
        ", ".join(f"{n} {list(s)}" + (f" ({kinds[n]})" if kinds[n] else "") for n, s in inputs.items())
        or "no such input"
    )
    if asked.sample is not None:
        name = next((n for n in inputs if n in source.samples), None)
        if name is None:
            raise InputError(
                f"{source.name} has no samples of its own, as a demo has: give --image, --audio or --video FILE"
            )
        samples = source.samples[name]
        if not 0 <= asked.sample < len(samples):
            raise InputError(f"--sample {asked.sample}: {source.name} has samples 0 to {len(samples) - 1}")
        if samples.shape[1:] != inputs[name][1:]:
            raise InputError(
                f"the samples of {source.name} are {list(samples.shape[1:])}, and the program takes {takes}"
            )
        kind = kinds[name]
        assert kind is not None
        return name, media.from_array(kind, samples[asked.sample], source.preprocessing)
    assert asked.kind is not None and asked.path is not None
    name = next((n for n, kind in kinds.items() if kind == asked.kind), None)
    if name is None:
        raise InputError(f"{source.name} takes no {asked.kind}: it takes {takes}")
    load = {"image": media.load_image, "video": media.load_video, "audio": media.load_audio}[asked.kind]
    return name, load(asked.path, inputs[name][1:], source.preprocessing)


def _feeds(program: Program, name: str, media: Media) -> dict[str, Tensor]:
    """The inputs of the program, with the media in every row of the batch."""
    example = program.inputs[name]
    given = torch.from_numpy(np.ascontiguousarray(media.array)).to(example.dtype)
    if tuple(given.shape) != tuple(example.shape[1:]):
        raise InputError(f"the input is {list(given.shape)}, and {name} takes {list(example.shape[1:])}")
    return {**program.inputs, name: given.expand_as(example).contiguous()}


def _described(layer: Layer, file: str | None) -> dict[str, Any]:
    """One site in `explain.json`."""
    return {
        "site": layer.site,
        "method": layer.method,
        "stream": layer.stream,
        "tokens_in": layer.tokens_in,
        "tokens_out": layer.tokens_out,
        "protected": layer.protected,
        "grid": None if layer.grid is None else list(layer.grid),
        "assignment": layer.assignment.tolist(),
        "kept": None if layer.kept is None else layer.kept.tolist(),
        "original_assignment": layer.origin.tolist(),
        "original_kept": None if layer.heads is None else layer.heads.tolist(),
        "file": file,
    }


def panels(media: Media, grid: Sequence[int]) -> list[Panel]:
    """The input in parts, with the places of the tokens of `grid` over each.

    A grid `(rows, columns)` lies over an image or, whichever way round fits its sides better, over a spectrogram;
    `(frames, rows, columns)` over the frames of a video; `(steps,)` along the time of audio. Long audio is cut into
    strips. Raises Refused where a grid does not go with the input.
    """
    from edgewise.exporter.draw import Panel

    cells = np.arange(int(np.prod(grid))).reshape(tuple(grid))
    views = media.views
    if media.kind == "image" and cells.ndim == 2:
        return [Panel(views[0], cells)]
    if media.kind == "video" and cells.ndim == 3:
        # One token may span several frames; the middle one stands for them.
        middle = [int((i + 0.5) * len(views) / len(cells)) for i in range(len(cells))]
        return [Panel(views[m], cells[i], f"frame {m}") for i, m in enumerate(middle)]
    if media.kind == "audio" and cells.ndim <= 2:
        return _strips(media, cells)
    raise Refused(f"the tokens lie on a grid {tuple(grid)}, which has no place over this {media.kind}")


_STRIP = 125
"""Most tokens side by side in a strip of audio."""


def _strips(media: Media, cells: np.ndarray) -> list[Panel]:
    from PIL.Image import Resampling, Transpose

    from edgewise.exporter.draw import Panel

    view = media.views[0]
    if cells.ndim == 1:
        cells = cells[None]
    else:
        shape = np.log(view.height / view.width)
        upright, turned = (abs(np.log(a / b) - shape) for a, b in (cells.shape, cells.shape[::-1]))
        cells = cells if upright <= turned else cells.T
    # Low frequencies are drawn at the bottom.
    view, cells = view.transpose(Transpose.FLIP_TOP_BOTTOM), cells[::-1]
    rows, columns = cells.shape
    count = -(-columns // _STRIP)
    long = -(-columns // count)
    made = []
    for start in range(0, columns, long):
        part = cells[:, start : start + long]
        left, right = (view.width * n / columns for n in (start, start + part.shape[1]))
        # Square cells, or a strip of one row that is high enough to see something.
        size = (part.shape[1] * 8, rows * 8 if rows > 1 else 48)
        piece = view.resize(size, Resampling.BICUBIC, (left, 0, right, view.height))
        label = ""
        if media.seconds is not None:
            label = (
                f"{media.seconds * start / columns:.2f} to {media.seconds * (start + part.shape[1]) / columns:.2f} s"
            )
        elif count > 1:
            label = f"steps {start} to {start + part.shape[1] - 1}"
        made.append(Panel(piece, part, label))
    return made


def _draw(folder: Path, model: str, media: Media, layers: Sequence[Layer]) -> dict[int, str]:
    """Draw every site and the overview; gives the file of each layer by its identity."""
    from edgewise.exporter import draw

    files: dict[int, str] = {}
    tiles = []
    coloured: dict[str, dict[Group, Any]] = {}
    for number, layer in enumerate(layers, 1):
        assert layer.grid is not None
        parts = panels(media, layer.grid)
        found = {output: frozenset(t - layer.protected for t in tokens) for output, tokens in layer.groups().items()}
        several = [group for group in found.values() if len(group) > 1]
        colours = draw.colour_groups(several, coloured.get(layer.stream, {}), parts)
        coloured[layer.stream] = colours
        free = range(layer.protected, len(layer.origin))
        gone = frozenset(t - layer.protected for t in free if layer.origin[t] < 0)
        heads = frozenset() if layer.heads is None else frozenset(int(h) - layer.protected for h in layer.heads)
        marks = draw.Marks(colours, gone, heads)
        caption = _caption(number, layer, several, len(gone))
        widest = max(part.tokens.shape[1] for part in parts)
        across, small_across = _across(media, len(parts))
        name = f"{number:02d}-{_slug(layer.site)}-{layer.method}.png"
        total = {"image": 640, "video": 1120, "audio": 1250}[media.kind]
        cell = max(6, min(40, total // (widest * across)))
        draw.draw(parts, marks, caption, cell=cell, across=across).save(folder / name)
        total = {"image": 370, "video": 900, "audio": 900}[media.kind]
        cell = max(6, min(28, total // (widest * small_across)))
        tiles.append(draw.draw(parts, marks, caption, cell=cell, across=small_across, legend=False))
        files[id(layer)] = name
    draw.overview(tiles, model).save(folder / OVERVIEW)
    return files


def _across(media: Media, count: int) -> tuple[int, int]:
    """Panels side by side: of a site, and in the overview."""
    return (min(4, count), min(4, count)) if media.kind == "video" else (1, 1)


def _caption(number: int, layer: Layer, several: Sequence[Group], gone: int) -> str:
    done = [f"{len(several)} groups"] if several else []
    done += [f"{gone} dropped"] if gone else []
    protected = int((layer.origin[: layer.protected] >= 0).sum())
    apart = f", {protected} of them protected" if protected else ""
    return (
        f"{number}. {layer.site} {layer.method}: {layer.tokens_in} -> {layer.tokens_out} tokens{apart}; so far of "
        f"{len(layer.origin)}: {', '.join(done) or 'all kept'}"
    )


def _slug(site: str) -> str:
    return site.replace("[", "").replace("]", "")


# -- the folder


def _check_place(place: Path) -> None:
    """Refuse a place that holds anything but what this wrote before."""
    wrong = InputError(
        f"{place} exists and holds no explanation, so it was left alone. Give another folder, or move it away."
    )
    if not os.path.lexists(place):
        return
    if place.is_symlink() or not place.is_dir():
        raise wrong
    there = set(os.listdir(place))
    if not there:
        return
    try:
        document = json.loads((place / FILE).read_text("utf-8"))
        files = set(document["files"]) if document["format"] == _FORMAT else set()
    except (OSError, ValueError, KeyError, TypeError):
        raise wrong from None
    if not there <= files:
        raise wrong


@contextmanager
def _written(place: Path) -> Iterator[Path]:
    """A new folder beside `place`, which takes its place when all is written; after an error nothing is left of it."""
    made = [parent for parent in (place.parent, *place.parent.parents) if not parent.exists()]
    token = uuid.uuid4().hex[:12]
    part, old = place.with_name(f".{place.name}.{token}.part"), place.with_name(f".{place.name}.{token}.old")
    done = False
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        yield part
        _check_place(place)
        if place.exists():
            place.rename(old)
        try:
            part.rename(place)
        except OSError:
            if old.exists():
                old.rename(place)
            raise
        done = True
    except OSError as error:
        reason = "there is no room" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise InputError(f"cannot write {place}: {reason}") from error
    finally:
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)
        if not done:
            for parent in made:
                try:
                    parent.rmdir()
                except OSError:
                    break


__all__ = ["Asked", "Explanation", "Layer", "decisions", "explain", "panels"]
