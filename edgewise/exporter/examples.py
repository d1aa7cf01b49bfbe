"""The inputs that a program is verified with."""

from __future__ import annotations

import torch
from torch import Tensor

from edgewise.exporter.job import Job
from edgewise.passes.program import Program


def take_samples(job: Job, program: Program, attempt: int = 0) -> list[dict[str, Tensor]]:
    """Inputs to verify with: the program's examples, and others that the source has at hand; for a later attempt, others.

    A program that is told how many tokens are real is verified with padding, too."""
    captured = {k: v for k, v in program.inputs.items() if k not in program.added}
    image = job.pixels.name if job.pixels is not None else None
    generator = torch.Generator().manual_seed(job.recipe.seed + attempt)
    real, size = job.source.samples, next(iter(captured.values())).shape[0]
    if real and set(real) == set(captured):
        count = len(next(iter(real.values())))
        # Spread over the split, which may be sorted by label. The first is the example already.
        starts = list(dict.fromkeys((attempt + i * (count - size) // 3) % (count - size + 1) for i in range(4)))
        samples = [{k: torch.from_numpy(real[k][s : s + size].copy()) for k in real} for s in starts]
        samples = samples if attempt else [captured, *samples[1:]]
    else:
        samples = [{k: _noise(v, generator) for k, v in captured.items()} if attempt else captured]
        samples = [{k: v.round().clamp(0, 255) if k == image else v for k, v in one.items()} for one in samples]
        if any(not program.inputs[k].is_floating_point() for k in program.added):
            samples.append(samples[0])
    added = [{k: program.inputs[k] for k in program.added}]
    for _ in samples[1:]:
        added.append(
            {k: _noise(v, generator) if v.is_floating_point() else _fewer(v, generator) for k, v in added[0].items()}
        )
    return [{**sample, **more} for sample, more in zip(samples, added, strict=True)]


def _noise(value: Tensor, generator: torch.Generator) -> Tensor:
    """Another value of the same spread; what is no floating-point number may be an index, and stays."""
    if not value.is_floating_point() or value.numel() < 2:
        return value
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float32)
    return (noise * value.float().std() + value.float().mean()).to(value.dtype)


def _fewer(count: Tensor, generator: torch.Generator) -> Tensor:
    """From half of a count up to all of it."""
    return (count * (0.5 + 0.5 * torch.rand(count.shape, generator=generator))).to(count.dtype)
