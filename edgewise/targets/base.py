"""What a target is, and what a session is."""

from __future__ import annotations

import copy
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from edgewise.bundle.manifest import TensorInfo
from edgewise.errors import InputError, MissingExtra, unknown

if TYPE_CHECKING:
    from torch.export import ExportedProgram


@dataclass(frozen=True)
class Requirement:
    """A package that a target needs: the least version that works, the version that was tested, and the extra
    of edgewise that installs it. `runtime`: it is needed to run an artifact, and not only to make one."""

    package: str
    minimum: str
    tested: str
    extra: str
    runtime: bool = True

    @property
    def installed(self) -> str | None:
        """The installed version, or None. The package is not imported."""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None

    def check(self) -> str | None:
        """A warning if the installed version is not the tested one, else None.

        Raises `MissingExtra` if the package is absent or older than `minimum`.
        """
        version = self.installed
        mend = f'install it with: pip install "edgewise[{self.extra}]"'
        if version is None:
            raise MissingExtra(f"{self.package} is not installed; {mend}")
        if release(version) < release(self.minimum):
            raise MissingExtra(
                f"{self.package} {version} is older than {self.minimum}, the least that works; {mend}"
            )
        if release(version) != release(self.tested):
            return f"{self.package} {version} is installed; edgewise was tested with {self.tested}"
        return None


@dataclass(frozen=True)
class Cache:
    """An input of a program that is a cache, `(batch, heads, slots, size)`, and the output that gives the one token
    `(batch, heads, 1, size)` which a run adds to it, at the slot `first` plus the number in the input `step (1)`."""

    input: str
    output: str
    step: str
    first: int


@dataclass(frozen=True)
class Tolerance:
    """How far the outputs of a right artifact may be from those of its program.

    `relative`: the largest relative error (see `edgewise.verify.metrics`). `near_tie`: how close two scores may be before
    rounding errors alone decide which of two tokens is kept.
    """

    relative: float = 1e-4
    near_tie: float = 1e-5


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version before any suffix, without trailing zeros: `1.31.0rc1+cpu` is (1, 31)."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in match.group().split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


class Session(ABC):
    """A loaded component that runs numpy arrays. Use it as a context manager, or call `close`."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    kept: tuple[TensorInfo, ...] = ()
    """States that it keeps from run to run, and may be given: what is fed to `run` under its name is written before the run, and
    what is left out is as the last run left it."""
    stand_in: str | None = None
    """What runs the artifact, where it is not the runtime that the artifact is for: then its times say nothing of a device."""
    units: str | None = None
    """The compute units that it may use, where the runtime lets one choose."""
    no_placement: str = "this version of the runtime does not tell it"
    """Why `placement` gave None."""

    @cached_property
    def _expected(self) -> list[tuple[str, tuple[int, ...], np.dtype[Any]]]:
        return [(info.name, info.shape, np.dtype(info.dtype)) for info in self.inputs]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the component once.

        `feeds` holds one array for each input, of its exact shape and dtype, and may hold those of states. Gives the outputs by
        name, in order; the arrays are the caller's. Raises `InputError` if a name, shape or dtype is wrong, before anything runs.
        """
        return self._run(self._taken(feeds))

    def run_anew(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`run` after `reset`."""
        self.reset()
        return self.run(feeds)

    def reset(self) -> None:
        """Begin anew: what the component keeps from run to run, a cache say, is as it was when it was loaded. Most keep nothing."""
        return

    def bound(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], dict[str, np.ndarray]]:
        """`run` on these arrays, checked once: for whoever runs the same ones again and again, and leaves them as they are.

        Raises InputError as `run` does.
        """
        checked = self._taken(feeds)
        return lambda: self._run(checked)

    def _taken(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inputs, checked. What is fed to states is written once all that is fed is known to be right."""
        if not self.kept:
            return self._checked(feeds)
        given = {info.name: _checked_array(info, feeds[info.name], "state") for info in self.kept if info.name in feeds}
        checked = self._checked({name: array for name, array in feeds.items() if name not in given})
        if given:
            self._write(given)
        return checked

    def _write(self, states: dict[str, np.ndarray]) -> None:
        """Write checked arrays to states. A session with states has its own."""
        raise NotImplementedError

    def _checked(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        # What fits as it is, which is the rule, must cost next to nothing: a small model takes less than a millisecond.
        if len(feeds) == len(self._expected):
            found = {}
            for name, shape, dtype in self._expected:
                array = feeds.get(name)
                if type(array) is not np.ndarray or array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
                    break
                found[name] = array
            else:
                return found
        names = [info.name for info in self.inputs]
        for name in feeds:
            if name not in names:
                raise unknown("input", name, names)
        checked = {}
        for info in self.inputs:
            if info.name not in feeds:
                raise InputError(f"input '{info.name}' is missing; the inputs are: {', '.join(names)}")
            checked[info.name] = _checked_array(info, feeds[info.name])
        return checked

    @abstractmethod
    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run checked feeds."""

    def placement(self) -> dict[str, int] | None:
        """Number of graph nodes by the unit that the target's runtime runs them on. None: it does not say, see `no_placement`."""
        return None

    def stages(self) -> dict[str, tuple[float, ...]] | None:
        """Seconds that each stage of the last run took, by name in order, a number for each time that the stage ran. None: this is
        a single graph."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Free the component. Afterwards `run` raises `InputError`. May be called twice."""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _checked_array(info: TensorInfo, array: Any, kind: str = "input") -> np.ndarray:
    if not isinstance(array, np.ndarray):
        raise InputError(f"{kind} '{info.name}' is a {type(array).__name__}; give a numpy array (numpy.asarray makes one)")
    if array.shape != info.shape:
        raise InputError(
            f"{kind} '{info.name}' has shape {array.shape}; this artifact has the static shape {info.shape}"
        )
    if array.dtype.newbyteorder("=") != np.dtype(info.dtype):
        raise InputError(
            f"{kind} '{info.name}' has dtype {array.dtype} and must be {info.dtype}; "
            f"convert it with .astype('{info.dtype}')"
        )
    # Runtimes read a plain buffer, and take strides or the other byte order for data.
    return np.ascontiguousarray(array, dtype=np.dtype(info.dtype)).reshape(info.shape)


class Feeds(Protocol):
    """Inputs of a component by name, one batch after the other; they can be gone through several times."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]: ...


Ranges = Mapping[str, np.ndarray]
"""The largest absolute value of each channel `(inputs,)` of what a layer reads, by the layer's name."""


@dataclass(frozen=True)
class Lowering:
    """What an artifact was lowered of, see `Target.lower`."""

    exported: ExportedProgram
    input_names: Sequence[str]
    output_names: Sequence[str]


class Quantiser(ABC):
    """A lowered artifact whose layers can be quantised, all of them or some."""

    layers: tuple[str, ...]
    """Names of the layers (see `edgewise.passes.layers`), in the order of the graph. Nothing else is ever quantised."""
    notes: tuple[str, ...] = ()
    """What was odd about the data."""

    def follow(self, other: Quantiser) -> None:
        """Fold into weights what `other` folds into them, which quantises another compression of the same model: so that equal
        weights stay equal, and an artifact of both holds them once. Most fold nothing that depends on data."""
        return

    @abstractmethod
    def write(self, folder: Path, stem: str, floating: Collection[str] = ()) -> list[Path]:
        """Write the artifact, as `Target.lower` does, with the layers `floating` left in floating point. May be called again with
        others; the statistics are gathered once. The same layers give the same bytes."""


LAYER = "layer/"
"""In front of the name of a node that computes a layer, in artifacts that can be quantised."""


def layer_name(layer: str, number: int) -> str:
    """The name of the node that computes a layer; of the second, third, ... one with the same weights."""
    return LAYER + layer + (f"#{number}" if number > 1 else "")


def layer_of(node_name: str) -> str | None:
    """The layer that a node computes, by the node's name; None: none."""
    return node_name.removeprefix(LAYER).partition("#")[0] if node_name.startswith(LAYER) else None


class Target(ABC):
    """A place where programs run: what it needs, what it can do, how to lower to it and how to run on it."""

    name: ClassVar[str]
    description: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    requirements: ClassVar[tuple[Requirement, ...]]
    precisions: ClassVar[tuple[str, ...]]
    # For every compression op, the realisations that the target can run, fastest first.
    realisations: ClassVar[dict[str, tuple[str, ...]]]
    quantises: ClassVar[tuple[str, ...]] = ()
    """Those precisions that are made of the lowered artifact (`quantiser`), and not by `lower`."""
    quantises_from: ClassVar[str] = "fp32"
    """The precision of the lowered artifact that these are made of."""
    quantiser_requirements: ClassVar[tuple[Requirement, ...]] = ()
    """Packages that `quantiser` needs besides the others."""
    has_ranges: ClassVar[bool] = False
    """Whether artifacts that share weights can be quantised alike (`ranges`)."""
    ahead_of_time: ClassVar[bool] = False
    """Whether it can build for a device that is not there (`for_devices`)."""
    devices: tuple[str, ...] = ()
    """What it also builds for."""
    images: Mapping[str, str] = {}
    """Inputs of what it lowers that take images, and their colours (`for_images`)."""
    has_units: ClassVar[bool] = False
    """Whether its runtime lets one choose the compute units that it uses (`for_units`)."""
    units: str | None = None
    """Those that were chosen."""
    functions: bool = False
    """Whether what it lowers will be one of several functions of an artifact (`for_functions`)."""
    caches: tuple[Cache, ...] = ()
    """Inputs of what it lowers that the artifact keeps as states (`for_caches`)."""

    def check(self, *, runtime_only: bool = False, precision: str | None = None) -> list[str]:
        """Warnings about packages whose version was not tested.

        Raises `MissingExtra`, which says what to install, if a package is absent or too old. `runtime_only`
        leaves out what is needed to make artifacts and not to run them. `precision`: with what it needs to quantise to
        this one. Nothing is imported.
        """
        return [warning for one in self._needs(runtime_only, precision) if (warning := one.check()) is not None]

    def versions(self, *, runtime_only: bool = False, precision: str | None = None) -> dict[str, str]:
        """Installed versions of the required packages. A package that is not installed is left out."""
        needs = self._needs(runtime_only, precision)
        return {one.package: one.installed for one in needs if one.installed is not None}

    def _needs(self, runtime_only: bool, precision: str | None) -> list[Requirement]:
        needs = [one for one in self.requirements if one.runtime or not runtime_only]
        return [*needs, *self.quantiser_requirements] if precision in self.quantises else needs

    def check_precision(self, precision: str) -> None:
        """Raise `InputError` with the nearest name if the target has no such precision."""
        if precision not in self.precisions:
            raise unknown(f"precision of target {self.name}", precision, self.precisions)

    def for_devices(self, devices: Sequence[str]) -> Target:
        """The target that also builds what runs on these devices and nowhere else. Raises `InputError` for an unknown device, and
        where the target builds nothing ahead of time, as here."""
        raise InputError(f"target {self.name} builds nothing for a device ahead of time: leave out {', '.join(devices)}")

    def for_no_device(self) -> Target:
        """The same target that builds nothing ahead of time."""
        made = copy.copy(self)
        made.devices = ()
        return made

    def for_functions(self) -> Target:
        """The target whose artifacts can be joined (`join`). Raises `InputError` where an artifact holds one program, as here."""
        raise InputError(
            f"target {self.name} has no artifacts of several functions: export a bundle for each compression; coreml has them"
        )

    def for_units(self, units: str) -> Target:
        """The target whose sessions use these compute units alone. Raises `InputError` for unknown ones, and where there is nothing
        to choose, as here, and `MissingExtra` on a machine where there is not."""
        raise InputError(f"target {self.name} has no compute units to choose")

    def for_caches(self, caches: Sequence[Cache]) -> Target:
        """The target for a program with these caches. Where it keeps them as states, the artifact writes them itself, and takes
        them as inputs no more; here they stay inputs and outputs."""
        return self

    def for_images(self, images: Mapping[str, str]) -> Target:
        """The target whose artifacts take images (`RGB` or `grayscale`, pixels from 0 to 255) as these inputs. Raises `InputError`
        where artifacts take arrays alone, as here."""
        raise InputError(f"target {self.name} takes arrays, and no images: leave --image-input out, or take target coreml")

    def join(self, parts: Mapping[str, Sequence[Path]], folder: Path, stem: str) -> list[Path]:
        """Write artifacts, by the name that each gets as a function, to one that holds equal weights once, the first the default;
        `parts` were lowered by `for_functions`. Gives its files, as `lower` does."""
        raise NotImplementedError(f"target {self.name} joins nothing")

    def tolerance(self, precision: str) -> Tolerance:
        """What artifacts of this precision are held to. Here: of single-precision arithmetic, whatever the storage."""
        return Tolerance()

    @abstractmethod
    def lower(
        self,
        exported: ExportedProgram,
        folder: Path,
        stem: str,
        *,
        precision: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
    ) -> list[Path]:
        """Write the artifact of a program to `folder / stem` with the target's suffixes.

        `exported` holds ATen ops only and has static shapes. The artifact's inputs and outputs have exactly
        the given names, in this order. The same program gives the same bytes. Gives the files, the main one
        first. With `fp16`, large tensors that half precision holds exactly are stored in it (see
        `edgewise.targets.half`); rounding them is the caller's. Raises `InputError` if the names do not fit or
        the target cannot lower the program.
        """

    def quantiser(
        self,
        files: Sequence[Path],
        precision: str,
        feeds: Feeds | None,
        ranges: Ranges | None = None,
        made_of: Lowering | None = None,
    ) -> Quantiser:
        """What quantises an artifact of this target, lowered at `quantises_from`, to one of `quantises`.

        `feeds`: what statistics are gathered of; `w8a16` and `w4a16` need none. `ranges`: of all artifacts that share the weights
        of linear layers (see `ranges`), which are smoothed by these, and so are quantised to the same in each. `made_of`: what the
        artifact was lowered of, which some targets quantise in its place. Raises `InputError`.
        """
        raise InputError(f"target {self.name} does not quantise to {precision}")

    def ranges(self, files: Sequence[Path], feeds: Feeds) -> Ranges:
        """Of the linear layers of a lowered artifact, over all feeds. Only where `has_ranges`. Raises `InputError` for values that
        are not finite."""
        raise NotImplementedError(f"target {self.name} gathers no ranges")

    def finish(self, files: Sequence[Path]) -> list[Path]:
        """What is done with a quantised artifact that will be shipped, and not with those that are only tried: checks, and what is
        built ahead of time. Gives all files, the main one first. Raises `InputError` if the artifact does not pass."""
        return list(files)

    @abstractmethod
    def load(self, files: Sequence[Path], *, threads: int | None = None) -> Session:
        """Load an artifact, the main file first. `threads`: of the runtime; None is the runtime's own choice.

        Raises `MissingExtra` if the runtime is absent, `InputError` if the files cannot be loaded.
        """

    def load_function(self, files: Sequence[Path], function: str | None, *, threads: int | None = None) -> Session:
        """Load one of several functions of an artifact; None: the default. Raises as `load` does."""
        if function is not None:
            raise InputError(f"target {self.name} has no artifacts of several functions, and so none called {function}")
        return self.load(files, threads=threads)

    def rehearse(self, files: Sequence[Path], function: str | None = None) -> Session:
        """Load an artifact where it is made, to verify it: as `load_function`, but with nothing built for a device."""
        return self.load_function(files, function)

    def command(self, files: Sequence[Path]) -> str | None:
        """A command of the runtime's own tools that builds and times an artifact, the main file first. None: there is none."""
        return None

    def ops(self, files: Sequence[Path]) -> dict[str, int] | None:
        """How many nodes of each op an artifact has, bodies of loops included, the main file first; without running it. None: it
        cannot be told here. Raises `InputError` if the files cannot be read."""
        return None

    def lint(self, exported: ExportedProgram, precision: str = "fp32") -> list[str]:
        """What would fail, or be slow, on this target at a precision that it has; one line each, which begins with `slow: ` if it
        would run all the same, and with `note: ` if it is good to know and no fault. An empty list: nothing is known."""
        from edgewise.passes.lint import data_dependent

        return data_dependent(exported)


def check_threads(threads: int | None) -> None:
    """Raise `InputError` unless `threads` is None or a number of one or more that this machine has some use for."""
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise InputError(f"threads is {threads!r}; give a whole number of 1 or more")
    most = max(64, 4 * (os.cpu_count() or 1))
    if threads is not None and threads > most:
        raise InputError(f"threads is {threads}; at most {most} are started here, where there are {os.cpu_count()} logical CPUs")
