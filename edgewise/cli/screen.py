"""What a verb says, and where it says it.

Results go to stdout, messages and progress to stderr. With `--json` stdout holds one document and nothing
else, so that results for people go to stderr too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

Step = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and what is done now."""

_LOG_WIDTH = 140


@dataclass(frozen=True)
class Result:
    """What a verb gives back: the document that `--json` prints (None: there is none) and the exit code."""

    document: dict[str, Any] | None
    code: int = 0


class Screen:
    """Where one verb prints."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self._quiet = quiet
        self._silent = as_json and quiet
        self._err = _console(sys.stderr)
        self._out = self._err if as_json else _console(sys.stdout)

    def show(self, *parts: RenderableType) -> None:
        """Print a result for people."""
        if not self._silent:
            for part in parts:
                # Lines are not folded: a command in one can then be copied.
                self._out.print(Text(part) if isinstance(part, str) else part, soft_wrap=isinstance(part, str))

    def stream(self, text: str) -> None:
        """Print a piece of a result for people as soon as it is known; the caller ends the line."""
        if not self._silent:
            self._out.print(Text(text), end="", soft_wrap=True)
            self._out.file.flush()

    def say(self, text: str) -> None:
        """Print a message that is no result."""
        if not self._quiet:
            self._err.print(Text(text), soft_wrap=True)

    @contextmanager
    def progress(self) -> Iterator[Step]:
        """Show the steps of some work: a bar on a terminal, else a line for each."""
        if self._quiet:
            yield lambda done, total, text: None
        elif not self._err.is_terminal:
            yield self._line
        else:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            with Progress(*columns, console=self._err, transient=True) as bar:
                task = bar.add_task("", total=None)

                def step(done: int, total: int, text: str) -> None:
                    bar.update(task, completed=done, total=total or None, description=text)

                yield step

    @contextmanager
    def counter(self, text: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show how far a count has come, which is too fast for a line each: a bar on a terminal, else one line."""
        bar = self._err.is_terminal
        with self.progress() as step:
            step(0, total if bar else 0, text)
            yield lambda done: step(done, total, text) if bar else None

    def _line(self, done: int, total: int, text: str) -> None:
        self._err.print(Text(f"[{done + 1}/{total}] {text}" if total else text), soft_wrap=True)


class ReaderGone(Exception):
    """Whoever reads what is printed has closed it, as in `edgewise methods | head -1`."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise ReaderGone


def _console(stream: Any) -> Console:
    # Rich takes anything that is no terminal to be 80 columns wide, and would fold the tables of every log.
    width = None if stream.isatty() or "COLUMNS" in os.environ else _LOG_WIDTH
    return _Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table; the columns in `right` hold numbers."""
    made = Table(title=Text(title), title_justify="left", title_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def row(into: Table, *cells: object) -> None:
    """Add a row. What is None is unknown, and becomes a dash."""
    into.add_row(*(cell if isinstance(cell, Text) else Text("-" if cell is None else str(cell)) for cell in cells))


def flops(count: int | None) -> str:
    """A number of operations for people: `234.5 MFLOPs`."""
    if count is None:
        return "-"
    value, unit = float(count), ""
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000 or unit == "T":
            break
        value /= 1000
    return f"{value:.4g} {unit}FLOPs"


def size(count: int) -> str:
    """A number of bytes for people: `1.9 MiB`."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def number(value: float | None, form: str = ".2e") -> str:
    """A measured number for people; a dash if it is unknown."""
    return "-" if value is None else format(value, form)
