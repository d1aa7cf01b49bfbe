"""One export on its way: what its steps hand on, and the rungs that they climb."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from edgewise.calibration.pixels import Pixels
from edgewise.errors import CheckFailed
from edgewise.exporter.cache import Cache
from edgewise.exporter.digest import Weights
from edgewise.exporter.precisions import DEFAULT
from edgewise.exporter.quantise import Check, Data, Wish, with_classes
from edgewise.exporter.recipe import Recipe
from edgewise.exporter.run import Outputs
from edgewise.exporter.sources import Source
from edgewise.targets import Target
from edgewise.targets.base import Quantiser
from edgewise.verify import ladder
from edgewise.verify.bundle import batched
from edgewise.verify.ladder import Rung

if TYPE_CHECKING:
    from edgewise.exporter.lowering import Lowered

Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and what is done now."""


@dataclass
class Later:
    """Artifacts that wait to be quantised: they lie in `place`; with the inputs that they were verified on, and the data."""

    place: Path
    lowered: list[Lowered] = field(default_factory=list)
    samples: list[dict[str, Tensor]] = field(default_factory=list)
    data: Data | None = None


@dataclass
class Job:
    """One export on its way: everything that the steps hand on."""

    recipe: Recipe
    source: Source
    chosen: list[Target]
    progress: Progress | None = None
    cache: Cache | None = None
    weights: Weights = field(default_factory=Weights)
    rungs: list[Rung] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    wish: Wish = field(default_factory=Wish)
    precision: str = DEFAULT
    """Of the component that is built."""
    leaders: dict[str, Quantiser] = field(default_factory=dict)
    pixels: Pixels | None = None
    check: Check = with_classes
    """What its data is checked for."""
    later: Later | None = None
    """Set, if what is to be quantised is left as it was lowered, for whoever quantises all components together."""
    done: int = 0

    def step(self, text: str) -> None:
        self.tell(text)
        self.done += 1

    def tell(self, text: str) -> None:
        """Say what is done now, within a step."""
        if self.progress is not None:
            self.progress(self.done, 5 + len(self.chosen), text)

    @property
    def halves(self) -> bool:
        """Whether weights are rounded to half precision: what a quantised artifact does not quantise is stored in it, too."""
        return self.precision == "fp16" or any(self.precision in target.quantises for target in self.chosen)

    def lowered_precision(self, target: Target) -> str:
        """What a program is lowered at; a quantised artifact is made of the lowered one."""
        return target.quantises_from if self.precision in target.quantises else self.precision

    def judge(self, *args: Any, **kwargs: Any) -> None:
        """Compare, and add the rung."""
        self.add(judge(*args, **kwargs))

    def add(self, rung: Rung) -> None:
        """Add a rung; a failed one ends the export, and nothing is published."""
        self.rungs.append(rung)
        if rung.passed is False:
            worst = max(rung.outputs.items(), key=lambda kv: float("inf") if kv[1].relative is None else kv[1].relative)
            found = "not finite" if not worst[1].finite else f"relative error {worst[1].relative}"
            raise CheckFailed(
                f"{rung.kind} check failed: {rung.name} against {rung.against}, output {worst[0]!r}: {found}, "
                f"allowed {rung.threshold:g}. Nothing was written"
            )


def judge(name: str, against: str, kind: ladder.Kind, reference: Outputs, value: Outputs, **known: Any) -> Rung:
    """A rung of outputs stacked over samples. Samples count as rows of the batch, so that class scores stay a matrix."""
    return ladder.judge(name, against, kind, batched(reference), batched(value), **known)
