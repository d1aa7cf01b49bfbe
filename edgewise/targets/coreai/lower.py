"""Lower an exported program to a Core AI model, a folder."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewise.errors import InputError
from edgewise.targets.coreml.ports import METADATA_KEY, dump, ports
from edgewise.targets.program import prepare

if TYPE_CHECKING:
    from torch.export import ExportedProgram

METADATA = "metadata.json"
_BITS = {"w8a16": 8, "w4a16": 4}


def lower(
    exported: ExportedProgram,
    folder: Path,
    stem: str,
    precision: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> list[Path]:
    """Write `stem.aimodel`; see `Target.lower`. The main file is the folder's `metadata.json`."""
    program = prepare(exported, "coreai", input_names, output_names)
    with _quiet():
        import torch
        from coreai_torch import TorchConverter, get_decomp_table
        from coreai_torch.debugging.debug_info import strip_debug_info

        from edgewise.targets.coreai.half import halved
        from edgewise.targets.coreai.weights import in_bits

        inputs, outputs = ports(program, input_names, output_names, half=precision != "fp32")
        if precision in _BITS:
            program = in_bits(program, _BITS[precision])
        if precision != "fp32":
            program = halved(program)
        program = program.run_decompositions({**get_decomp_table(), **_variances()})
        for node in program.graph.nodes:
            if node.target is torch.ops.aten.isnan.default:
                # The one number that is not itself.
                node.target, node.args = torch.ops.aten.ne.Tensor, (node.args[0], node.args[0])
        try:
            converter = TorchConverter(mode=TorchConverter.Mode.RELEASE)
            converter.add_exported_program(
                program,
                input_names=[port.feature for port in inputs],
                output_names=list(dict.fromkeys(port.feature for port in outputs)),
            )
            with _repeatable():
                model = converter.to_coreai()
            strip_debug_info(model)  # it numbers ops by what was converted before
            place = Path(folder) / f"{stem}.aimodel"
            shutil.rmtree(place, ignore_errors=True)
            place.parent.mkdir(parents=True, exist_ok=True)
            asset = model.save_asset(place)
            asset.update_metadata(lambda data: data.set_custom(METADATA_KEY, dump(inputs, outputs)))
        except (ValueError, NotImplementedError, TypeError, RuntimeError) as error:
            first = str(error).strip().splitlines()[:1]
            raise InputError(
                f"target coreai cannot lower this program: coreai-torch says: {type(error).__name__}: {''.join(first)}"
            ) from error
    _undated(place / METADATA)
    files = sorted(path for path in place.rglob("*") if path.is_file())
    return sorted(files, key=lambda path: path != place / METADATA)


def _variances() -> dict[Any, Any]:
    """What takes apart the ops that give a variance."""
    import torch

    def with_mean(x: Any, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
        mean = x.mean(list(dim) if dim else list(range(x.ndim)), keepdim=keepdim)
        return _variance(x, dim, correction=correction, keepdim=keepdim), mean

    return {torch.ops.aten.var.correction: _variance, torch.ops.aten.var_mean.correction: with_mean}


def _variance(x: Any, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    """What `var` computes, for which coreai-torch has no rule."""
    axes = list(dim) if dim else list(range(x.ndim))
    centred = x - x.mean(axes, keepdim=True)
    count = math.prod(x.shape[axis] for axis in axes)
    return (centred * centred).sum(axes, keepdim=keepdim) / (count - (1 if correction is None else correction))


@contextlib.contextmanager
def _repeatable() -> Iterator[None]:
    """The names of functions, which coreai draws at random, drawn the same way each time.

    The compiler names weights by hashes that it seeds anew in each process: bytes are the same in one process only.
    """
    from coreai.authoring import func, graph_builder

    drawn: Any = (func, graph_builder)
    kept = [module.choice for module in drawn]
    for module in drawn:
        module.choice = random.Random(0).choice
    try:
        yield
    finally:
        for module, choice in zip(drawn, kept, strict=True):
            module.choice = choice


def _undated(metadata: Path) -> None:
    """Take the date out of a model's metadata, so that the same program gives the same bytes."""
    document = json.loads(metadata.read_text("utf-8"))
    document["creationDate"] = "19700101T000000Z"
    metadata.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", "utf-8")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep coreai-torch's bars, and its note that it was not tested with a build of torch for CPUs, from the user."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
