"""What fitted tokens are held to: the outputs of the uncompressed model, or, where tokens are what comes out, those tokens.

Every error is in units of the variance over the calibration data, feature by feature, so that 1 is as bad as the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgewise.passes.step import batch_first

LEAST_VARIANCE = 1e-2
"""Of a feature, as a share of the mean over all: those that hardly vary do not count for more than those that do."""
SHARPNESS = 4.0
"""Of the attention that reconstructs tokens: what a mean squared distance of 1 a feature takes off its logits, times a half."""


@dataclass(frozen=True)
class Match:
    """The mean squared error against targets of the same shape, features last (regression on the teacher's outputs: Ba and Caruana,
    arXiv 1312.6184)."""

    variance: Tensor

    @staticmethod
    def to(targets: Sequence[Tensor], batch: int) -> Match | None:
        """`targets` are those of each batch, samples first if their first dimension is `batch`; None where all are the same."""
        stacked = torch.stack([target.float() for target in targets])
        samples = (0, 1) if stacked.ndim > 2 and stacked.shape[1] == batch else (0,)
        around = stacked - stacked.mean(dim=samples, keepdim=True)
        variance = around.square().flatten(0, -2).mean(0) if around.ndim > 1 else around.square().mean(0, keepdim=True)
        mean = float(variance.mean())
        scale = float(stacked.square().mean())
        if not mean > 1e-10 * scale:
            return None
        return Match(variance.clamp_min(LEAST_VARIANCE * mean))

    def __call__(self, value: Tensor, target: Tensor) -> Tensor:
        return ((value.float() - target.float()).square() / self.variance).mean()


@dataclass(frozen=True)
class Cover:
    """How well fewer tokens stand for all: each of the full tokens, as a query, attends to the fitted ones, by distance, and is
    compared with what it reads. Values are the fitted tokens themselves and nothing in this decoder is learned, so that they
    stay tokens as later layers know them, and two sets of tokens can be compared by it. Besides, the mean token and the protected
    ones are matched. (An attention that reads tokens back: Perceiver IO, arXiv 2107.14795; by distance it is soft k-means.)"""

    axis: int
    protected: int
    scale: Tensor
    mean: Match | None
    kept: Match | None

    @staticmethod
    def of(targets: Sequence[Tensor], axis: int, protected: int, batch: int) -> Cover:
        """`targets` are the full tokens of each batch, as the model gives them."""
        whole = [batch_first(target.float(), axis) for target in targets]
        sums = torch.stack([torch.stack([t.double().mean((0, 1)), t.double().square().mean((0, 1))])
                            for t in (tokens[:, protected:] for tokens in whole)]).mean(0)
        variance = (sums[1] - sums[0].square()).float()
        scale = variance.clamp_min(LEAST_VARIANCE * float(variance.mean())).clamp_min(1e-12).sqrt()
        mean = Match.to([tokens[:, protected:].mean(1) for tokens in whole], whole[0].shape[0])
        kept = Match.to([tokens[:, :protected] for tokens in whole], whole[0].shape[0]) if protected else None
        return Cover(axis, protected, scale, mean, kept)

    def __call__(self, value: Tensor, target: Tensor) -> Tensor:
        few, all_ = (batch_first(t.float(), self.axis) for t in (value, target))
        x, z = all_[:, self.protected:] / self.scale, few[:, self.protected:] / self.scale
        logits = x @ z.transpose(1, 2) - z.square().sum(-1)[:, None] / 2
        read = (logits * (SHARPNESS / x.shape[-1])).softmax(-1) @ z
        errors = [(x - read).square().mean()]
        if self.mean is not None:
            errors.append(self.mean(few[:, self.protected:].mean(1), all_[:, self.protected:].mean(1)))
        if self.kept is not None:
            errors.append(self.kept(few[:, :self.protected], all_[:, :self.protected]))
        return torch.stack(errors).mean()


@dataclass(frozen=True)
class Objective:
    """One error for each output, of which the mean counts. Raises KeyError for outputs that are not there."""

    terms: Mapping[str, Match | Cover]

    @staticmethod
    def of(targets: Sequence[Mapping[str, Tensor]], found: Mapping[str, Tensor], free: int, batch: int) -> Objective:
        """From the outputs of the uncompressed model on each batch, and those of the compressed one on the first. Outputs
        without gradient, constant ones, and those whose shapes differ by more than a count of tokens have no term."""
        terms: dict[str, Match | Cover] = {}
        for name, value in found.items():
            wanted = [target[name] for target in targets]
            if not value.is_floating_point() or not value.requires_grad or value.ndim == 0:
                continue
            if value.shape == wanted[0].shape:
                match = Match.to(wanted, batch)
                if match is not None:
                    terms[name] = match
            elif value.ndim == wanted[0].ndim and value.ndim in (2, 3):
                axes = [i for i, (a, b) in enumerate(zip(value.shape, wanted[0].shape, strict=True)) if a != b]
                if len(axes) == 1 and not (value.ndim == 3 and axes[0] == 0):
                    protected = max(0, wanted[0].shape[axes[0]] - free)
                    terms[name] = Cover.of(wanted, axes[0], protected, batch)
        return Objective(terms)

    def __call__(self, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([term(found[name], wanted[name]) for name, term in self.terms.items()]).mean()
