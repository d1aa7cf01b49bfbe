"""Run a program's graph on arrays, for the verification ladder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from edgewise.ops.greedy import farthest, most_determinant, pick_rows
from edgewise.ops.match import similarity
from edgewise.passes.graph import parameters_of, user_inputs
from edgewise.passes.legalise import is_compression_op, op_name
from edgewise.passes.realisations import REALISATIONS, SCATTER
from edgewise.verify.metrics import Errors, compare, worst

Outputs = dict[str, np.ndarray]
Choice = Tensor | list[Tensor | None]
"""What a selection or matching gives: indices, or several of them, without those that nothing uses."""


class Runner(fx.Interpreter):
    """Runs a program.

    `decisions` holds what each selection or matching kept in the last run, by node name. With `realised` (by label, a
    function for each compression op), every compression op is also computed by these on the values that it really gets:
    `checked` holds the worst errors over all runs, of a realisation against the op itself, by label, op and output.
    """

    def __init__(
        self,
        exported: ExportedProgram,
        output_names: tuple[str, ...],
        realised: Mapping[str, Mapping[str, Callable[..., Any]]] | None = None,
    ) -> None:
        super().__init__(exported.graph_module, garbage_collect_values=True)
        self._weights = parameters_of(exported)
        self._inputs = [n.name for n in user_inputs(exported)]
        self._placeholders = [n.name for n in exported.graph.nodes if n.op == "placeholder"]
        self._names = output_names
        self._written = len(exported.graph_signature.buffers_to_mutate)
        self._realised = dict(realised or {})
        self.decisions: dict[str, np.ndarray] = {}
        self.margin = float("inf")
        """The smallest difference between two scores whose order decided something, over all runs; exact ties, which go to
        the lowest index everywhere, are left out."""
        self.checked: dict[str, dict[str, Errors]] = {}
        self._forced: Mapping[str, Choice] = {}

    def __call__(self, inputs: Mapping[str, Tensor], forced: Mapping[str, Choice] | None = None) -> Outputs:
        """Run once; gives the named outputs as arrays. `forced`: what selections and matchings give, by node name, instead of
        what they would choose."""
        self.decisions, self._forced = {}, forced or {}
        values = [inputs[name] if name in inputs else self._weights[name] for name in self._placeholders]
        with torch.no_grad():
            flat = self.run(*values)[self._written :]  # what states hold afterwards comes first
        return {
            name: as_array(value) for name, value in zip(self._names, flat, strict=True) if isinstance(value, Tensor)
        }

    def run_node(self, n: fx.Node) -> Any:
        # As the base does, and with the function behind a compression op, but without what torch keeps in globals meanwhile (the
        # node that runs, annotations): another thread may be rewriting graphs.
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.name in self._forced:
            return self._forced[n.name]
        if is_compression_op(n):
            value = REALISATIONS[op_name(n)][SCATTER](*args, **kwargs)
        else:
            value = getattr(self, n.op)(n.target, args, kwargs)
        if is_compression_op(n):
            self.margin = min(self.margin, _margin(op_name(n), args))
            self._check(n, value)
        if is_compression_op(n) and op_name(n) in DECIDING:
            kept = value[0] if isinstance(value, (tuple, list)) else value
            self.decisions[n.name] = kept.numpy()
        return value

    def _check(self, n: fx.Node, value: Any) -> None:
        op = op_name(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        for label, functions in self._realised.items():
            other = functions[op](*args, **kwargs)
            pairs = zip(value, other, strict=True) if isinstance(value, (tuple, list)) else [(value, other)]
            for i, (ours, theirs) in enumerate(pairs):
                errors = compare(as_array(ours).reshape(1, 1, -1), as_array(theirs).reshape(1, 1, -1))
                known = self.checked.setdefault(label, {})
                known[f"{op}.{i}"] = worst([known[f"{op}.{i}"], errors] if f"{op}.{i}" in known else [errors])


DECIDING = ("bipartite_match", "top_tokens", "order_tokens", "farthest_points", "determinantal")


def _margin(op: str, args: Any) -> float:
    """How close the nearest decision of a compression op was: a difference of scores below it would change the result."""
    if op == "bipartite_match":
        metric, r, protected, *padding = args
        scores = similarity(metric, protected, *padding)
        best = scores.amax(-1).sort(dim=-1, descending=True).values
        gaps = [best[:, :-1] - best[:, 1:] if not protected else best[:, r - 1] - best[:, r]]
        pair = scores.topk(min(2, scores.shape[-1]), dim=-1).values
        gaps.append(pair[:, :, 0] - pair[:, :, -1])
    elif op == "top_tokens":
        score, keep, protected = args
        ranked = _ranked(score[:, protected:])
        gaps = [ranked[:, keep - 1] - ranked[:, keep]] if keep < ranked.shape[1] else []
    elif op == "order_tokens":
        score, keep = args
        ranked = _ranked(score)
        gaps = [ranked[:, :-1][:, :keep] - ranked[:, 1:][:, :keep]]
    elif op in _GREEDY:
        gaps = []
        _GREEDY[op](*args, pick_rows, lambda score: gaps.append(_lead(score)))
    else:
        gaps = []
    gaps = [g[(g > 0) & g.isfinite()] for g in gaps]
    return min((float(g.min()) for g in gaps if g.numel()), default=float("inf"))


_GREEDY: dict[str, Callable[..., Tensor]] = {"farthest_points": farthest, "determinantal": most_determinant}


def _ranked(score: Tensor) -> Tensor:
    """Scores in descending order, in units of the largest."""
    finite = torch.where(score.isfinite(), score, 0.0).abs().amax()
    return score.sort(dim=-1, descending=True).values / finite.clamp_min(torch.finfo(score.dtype).tiny)


def _lead(score: Tensor) -> Tensor:
    """How far the largest score is ahead of the next, in units of the largest."""
    return -_ranked(score)[:, :2].diff(dim=-1)


def as_array(value: Tensor) -> np.ndarray:
    """A tensor as a NumPy array of its own memory."""
    return value.detach().cpu().contiguous().numpy().copy()
