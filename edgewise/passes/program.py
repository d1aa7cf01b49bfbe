"""A program: a captured `ExportedProgram` plus what is known of it, and its compression."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from edgewise.passes.analysis import Analysis, Stream, analyse, with_output
from edgewise.passes.cleanup import clean_up
from edgewise.passes.insert import Insert, Tap
from edgewise.passes.plan import Spec, Step, make_plan, parse_spec, tokens_at_start


@dataclass(frozen=True)
class Site:
    """A place where compression may go: its token count before and after, by what, and what stands in the way."""

    name: str
    tokens_in: int
    tokens_out: int
    methods: tuple[str, ...] = ()
    side_values: tuple[str, ...] = ()
    refused: str | None = None


@dataclass(frozen=True)
class Program:
    """One captured component.

    `exported` is the graph as it is now; `base` the cleaned uncompressed one; `inputs` example tensors by name, and
    `expected` what the eager model gave on them (empty for a program that came without its model);
    `output_names` the names of the flat outputs; `notes` what was adjusted on the way.
    """

    exported: ExportedProgram
    base: ExportedProgram
    inputs: dict[str, Tensor]
    output_names: tuple[str, ...]
    role: str = "encoder"
    specs: tuple[Spec, ...] = ()
    steps: tuple[Step, ...] = ()
    notes: tuple[str, ...] = ()
    expected: dict[str, Tensor] = field(default_factory=dict)
    added: tuple[str, ...] = ()
    """Inputs that the compression added: text embeddings, the number of real tokens."""
    order: tuple[str, ...] = ()
    """Of a decoder whose tokens are not in the order of the sequence: the inputs `(B, N)` (or `(B, rows, N)`, whose first row
    counts) that, one behind the other, say where each is; -1: it only fills up."""

    @cached_property
    def analysis(self) -> Analysis:
        return analyse(self.base)

    @property
    def sites(self) -> list[Site]:
        """Every site in graph order, with its token counts in this program."""
        sites = []
        for stream in self.analysis.streams:
            count = tokens_at_start(stream, self.steps)
            for place in stream.places:
                steps = [s for s in self.steps if s.place.name == place.name]
                here = count - place.lost
                after = steps[-1].tokens_out if steps else here
                sites.append(Site(place.name, here, after, tuple(s.method.name for s in steps), place.side_values,
                                  place.refused))
                count = after + place.lost
        return sites

    def module(self) -> torch.nn.Module:
        """The program as a module, callable like the model."""
        return self.exported.module()

    def with_role(self, role: str | None = None, tokens: str | None = None, grid: tuple[int, ...] | None = None,
                  **known: Any) -> Program:
        """The same, `known` fields replaced, with this role, or that of its only stream of tokens (`model`: it has several or
        none). `tokens`: the output that holds tokens `(B, N, C)`, however they are made; `grid`: their shape, if they have one,
        such as `(frames, H, W)`."""
        if role is None:
            roles = [s.role for s in self.analysis.streams]
            role = roles[0] if len(roles) == 1 else "model"
        named = replace(self, role=role, **known)
        analysis = self.analysis
        if tokens is not None:
            analysis = with_output(analysis, self.base, self.output_names.index(tokens), grid)
        named.__dict__["analysis"] = analysis
        return named

    def uncompressed(self) -> Program:
        """The program as captured and cleaned."""
        inputs = {k: v for k, v in self.inputs.items() if k not in self.added}
        return replace(self, exported=self.base, inputs=inputs, added=(), specs=(), steps=(), notes=())


def make_program(captured: ExportedProgram, inputs: dict[str, Tensor], output_names: Sequence[str],
                 **known: Any) -> Program:
    """Clean a captured program up."""
    clean = clean_up(captured)
    return Program(clean, clean, inputs, tuple(output_names), **known)


def compress(program: Program, *specs: str) -> Program:
    """Insert compression, for example `compress(program, "tome:keep=0.5")`.

    Specs add to those that the program already has; the whole plan is made anew from the uncompressed graph. Raises
    InputError for a spec that makes no sense for this model, Refused where the graph cannot be proven right.
    """
    parsed = (*program.specs, *(parse_spec(s) for s in specs))
    if not parsed:
        return program
    return insert_plan(program, parsed, *make_plan(program.analysis, parsed))[0]


def insert_plan(program: Program, specs: tuple[Spec, ...], plan: Sequence[tuple[Stream, list[Step]]],
                notes: Sequence[str]) -> tuple[Program, list[Tap]]:
    """Insert the steps that were planned for `specs`, from the uncompressed graph; gives back where they are, too."""
    exported, inputs = program.base, {k: v for k, v in program.inputs.items() if k not in program.added}
    added: dict[str, Tensor] = {}
    taps: list[Tap] = []
    for stream, planned in plan:
        insert = Insert(stream, planned, program.analysis.engine, program.order)
        exported = insert(exported).program
        added |= insert.added
        taps += insert.taps
    steps = tuple(step for _, planned in plan for step in planned)
    compressed = replace(program, exported=exported, specs=specs, steps=steps, notes=tuple(notes),
                         inputs=inputs | added, added=tuple(added))
    # The analysis is of the uncompressed graph, which is the same: do not make it twice.
    compressed.__dict__["analysis"] = program.analysis
    return compressed, taps
