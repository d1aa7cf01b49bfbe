"""How far the outputs of a compressed program are from those of the uncompressed one: one number, 0 where they are equal.

Class scores by the Kullback-Leibler divergence of their softmax, in nats; outputs of the same shape by the squared error, and
tokens, of which fewer come out, by that of each to the nearest that is left, both in units of the variance over the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from edgewise.calibration.metric import class_scores
from edgewise.errors import InputError
from edgewise.exporter.objective import Cover, Match
from edgewise.passes.step import batch_first

Outputs = Mapping[str, np.ndarray]
SCORES = "logits"


@dataclass(frozen=True)
class _Scores:
    """Mean KL divergence of class scores `(batch, classes)`."""

    def __call__(self, value: Tensor, target: Tensor) -> Tensor:
        # In double: what fp32 leaves of a small divergence is its rounding, which may be below zero.
        own, wanted = (log_softmax(x.double(), -1) for x in (value, target))
        return kl_div(own, wanted, reduction="batchmean", log_target=True).clamp_min(0)


@dataclass(frozen=True)
class _Nearest:
    """The mean squared distance of each of the full tokens to the nearest that is left; protected ones are held to themselves.
    Unlike `Cover`, which teaches by a smooth reading, it is 0 where all tokens are there."""

    cover: Cover

    def __call__(self, value: Tensor, target: Tensor) -> Tensor:
        few, all_ = (batch_first(t.float(), self.cover.axis) for t in (value, target))
        x, z = (tokens[:, self.cover.protected :] / self.cover.scale for tokens in (all_, few))
        distance = torch.cdist(x, z).amin(-1).square().mean() / x.shape[-1]
        if self.cover.kept is None:
            return distance
        return (distance + self.cover.kept(few[:, : self.cover.protected], all_[:, : self.cover.protected])) / 2


@dataclass(frozen=True)
class Divergence:
    """One term for each output that can be compared; their mean counts. `scores` is the output of class scores, if there is one."""

    terms: Mapping[str, _Scores | Match | _Nearest]
    scores: str | None

    @staticmethod
    def of(targets: Sequence[Outputs], found: Outputs, protected: int, labelled: bool, batch: int) -> Divergence:
        """From what the uncompressed program gives on each batch, and the compressed one on the first. Raises `InputError` if
        there is nothing to compare."""
        scores = SCORES if SCORES in found and found[SCORES].ndim == 2 else None
        if labelled and scores is None:
            try:
                scores = class_scores({k: (v.shape, str(v.dtype)) for k, v in found.items()}, batch)
            except InputError:
                scores = None  # labels of something else: the outputs are compared as if there were none
        terms: dict[str, _Scores | Match | _Nearest] = {}
        for name, value in found.items():
            if value.ndim == 0 or not np.issubdtype(value.dtype, np.floating):
                continue
            wanted = [torch.from_numpy(target[name]) for target in targets]
            axes = [i for i, (a, b) in enumerate(zip(value.shape, wanted[0].shape, strict=True)) if a != b]
            if name == scores:
                terms[name] = _Scores()
            elif not axes:
                match = Match.to(wanted, batch)
                if match is not None:
                    terms[name] = match
            elif len(axes) == 1 and value.ndim in (2, 3) and not (value.ndim == 3 and axes[0] == 0):
                terms[name] = _Nearest(Cover.of(wanted, axes[0], protected, batch))
        if not terms:
            shapes = ", ".join(f"{k} {v.shape}" for k, v in found.items())
            raise InputError(f"no output of the model can be compared with the uncompressed one, or all are constant: {shapes}")
        return Divergence(terms, scores)

    def __call__(self, found: Outputs, wanted: Outputs) -> float:
        with torch.no_grad():
            parts = [term(torch.from_numpy(found[name]), torch.from_numpy(wanted[name])) for name, term in self.terms.items()]
            return float(torch.stack([part.double() for part in parts]).mean())
