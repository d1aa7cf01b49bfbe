"""The pass contract: `requires`, `call`, `ensures`, and a small result."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch.export import ExportedProgram


@dataclass(frozen=True)
class PassResult:
    """What a pass gives back: the program, whether it was changed, and what a user should know of it."""

    program: ExportedProgram
    modified: bool
    notes: tuple[str, ...] = field(default=())


class PassError(RuntimeError):
    """A pass broke its own contract: a defect of ours, not of the user's input. Names the pass and those before it."""


class Pass(ABC):
    """One rewrite of a program. Calling it checks `requires`, runs `call`, checks `ensures`."""

    name: ClassVar[str]

    def requires(self, program: ExportedProgram) -> None:
        """Raise if the program is not what this pass takes."""

    @abstractmethod
    def call(self, program: ExportedProgram) -> PassResult:
        """Rewrite. The given program is never changed: a pass that modifies works on a copy of the graph."""

    def ensures(self, program: ExportedProgram) -> None:
        """Raise if the rewritten program is not what this pass promises."""

    def __call__(self, program: ExportedProgram) -> PassResult:
        self.requires(program)
        result = self.call(program)
        if result.modified:
            result.program.graph.lint()
            self.ensures(result.program)
        return result


class Sequential(Pass):
    """Passes one after the other."""

    name = "sequential"

    def __init__(self, passes: Sequence[Pass]) -> None:
        self.passes = tuple(passes)

    def call(self, program: ExportedProgram) -> PassResult:
        modified = False
        notes: list[str] = []
        ran: list[str] = []
        for step in self.passes:
            try:
                result = step(program)
            except (AssertionError, RuntimeError) as error:
                raise PassError(f"Pass developer: {step.name} failed after {', '.join(ran) or 'no other pass'}: "
                                f"{error}") from error
            ran.append(step.name)
            program, modified = result.program, modified or result.modified
            notes += result.notes
        return PassResult(program, modified, tuple(notes))
