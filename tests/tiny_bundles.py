"""A real bundle of a tiny program, with artifacts that run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from bundle_helpers import ROLE, component, manifest
from safetensors.numpy import save_file
from tiny_programs import Case

from edgewise import targets
from edgewise.bundle import Artifact, Bundle, Manifest, TensorInfo, write_bundle
from edgewise.verify import Rung


def infos(arrays: dict[str, np.ndarray]) -> tuple[TensorInfo, ...]:
    return tuple(
        TensorInfo(name=name, shape=value.shape, dtype=value.dtype.name) for name, value in arrays.items()
    )


def build(
    one: Case,
    kinds: Sequence[tuple[str, str]] = (("openvino", "fp32"), ("onnxruntime", "fp32")),
    *,
    threshold: float | None = 1e-4,
    shift: float = 0.0,
) -> Callable[[Path], Manifest]:
    """Two samples of the program's own inputs; `shift` makes the golden outputs wrong by as much."""

    def run(folder: Path) -> Manifest:
        artifacts, rungs = [], []
        for target, precision in kinds:
            place = folder / target
            place.mkdir(exist_ok=True)
            files = targets.get(target).lower(
                one.exported,
                place,
                f"{ROLE}.{precision}",
                precision=precision,
                input_names=one.input_names,
                output_names=one.output_names,
            )
            artifact = Artifact(
                target=target,
                role=ROLE,
                precision=precision,
                files=tuple(path.relative_to(folder).as_posix() for path in files),
                threads=1,
            )
            artifacts.append(artifact)
            rungs.append(
                Rung(name=artifact.label, against="compressed", kind="lowering", threshold=threshold)
            )
        (folder / "golden").mkdir()
        tensors = {f"input.{name}": np.stack([value] * 2) for name, value in one.feeds.items()}
        tensors |= {f"output.{name}": np.stack([value] * 2) + shift for name, value in one.expected.items()}
        save_file(
            {key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / f"golden/{ROLE}.st"
        )
        (folder / "recipe.yaml").write_text("model: tiny\n")
        return manifest(
            components=(component(inputs=infos(one.feeds), outputs=infos(one.expected)),),
            golden={ROLE: f"golden/{ROLE}.st"},
            targets=tuple(artifacts),
            verification=tuple(rungs),
        )

    return run


def make(out: Path, one: Case, **options: object) -> Bundle:
    return write_bundle(out, build(one, **options))  # type: ignore[arg-type]
