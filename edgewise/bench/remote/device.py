"""A device that Python runs on, whatever the way to it: the agent is sent there with one request, and answers in lines of JSON.

The command that the device's shell reads is the same for everything: Python with a line of constant text. All names go through its
stdin.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from edgewise.bench.remote import agent
from edgewise.errors import InputError

_BOOT = "import sys; i=sys.stdin.buffer; exec(compile(i.read(int(i.readline())),'agent','exec'))"
_LONGEST_LINE = 256 * 2**20
_LONGEST_TEXT = 500


class Device(ABC):
    """Calls to one device. `name`: its name in messages; `python`: the interpreter there; `folder`: that of its address."""

    def __init__(self, name: str, python: str, folder: str | None) -> None:
        self.name, self.python, self.folder = name, python, folder

    @abstractmethod
    def _command(self, there: str) -> list[str]:
        """The command here that has the device's shell run `there`, with stdin and stdout of its own."""

    @abstractmethod
    def _lost(self, code: int, errors: str) -> str:
        """What to tell the user where the command ended without an answer, with what it said on stderr."""

    @abstractmethod
    def copy(self, files: Mapping[str, Path], there: Mapping[str, int], folder: str, *, rsync: bool) -> None:
        """Copy files to `folder` there, under the digests that they are given by. `there`: bytes that are there already of each,
        `rsync`: whether it is there.

        Raises `InputError` if the copy fails; what has arrived stays, for the next try.
        """

    def ask(self, request: Mapping[str, Any], progress: Callable[[str], None]) -> Any:
        """Run the agent there with a request, and give its result. Raises `InputError` with what went wrong, there or on the
        way."""
        source = Path(agent.__file__).read_bytes()
        text = b"%d\n%b%b\n" % (len(source), source, json.dumps(request).encode())
        command = self._command(shlex.join([self.python, "-c", _BOOT]))
        with tempfile.TemporaryFile() as errors:
            running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
            assert running.stdin is not None and running.stdout is not None
            try:
                with suppress(BrokenPipeError):  # what it writes on stderr says more
                    running.stdin.write(text)
                    running.stdin.flush()
                # Its stdin stays open: the agent takes its end for that of the connection.
                for message in messages(running.stdout, self.name):
                    if "progress" in message:
                        progress(plain(message["progress"]))
                    elif "error" in message:
                        raise InputError(f"{self.name}: {plain(message['error'], lines=True)}")
                    elif "result" in message:
                        return message["result"]
            finally:
                with suppress(BrokenPipeError):
                    running.stdin.close()
                running.stdout.close()
                try:
                    code = running.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    running.kill()
                    code = running.wait()
            errors.seek(0)
            raise InputError(self._told(code, errors.read(1 << 16).decode("utf-8", "replace")))

    def _told(self, code: int, errors: str) -> str:
        if code == 127:
            said = plain(errors.strip(), lines=True)
            return f"{self.name} has no {self.python}: install Python 3.10 or newer there, or give --remote-python ({said})"
        return self._lost(code, errors)

    def _cut(self, code: int, said: str, program: str) -> str:
        """The connection was lost."""
        return f"the connection to {self.name} was lost ({said or f'{program} ended with {code}'}); nothing was written here"


def messages(stream: IO[bytes], name: str) -> Iterator[dict[str, Any]]:
    """The lines of JSON that a device says. It may say anything: what is none is passed over, as a greeting of its shell."""
    while line := stream.readline(_LONGEST_LINE):
        if len(line) >= _LONGEST_LINE:
            raise InputError(f"{name} says more than a benchmark has to say")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(message, dict):
            yield message


def plain(text: object, *, lines: bool = False) -> str:
    """What a device says, as text that does nothing to a terminal."""
    kept = "".join(c for c in str(text) if c.isprintable() or (lines and c == "\n"))
    return kept if len(kept) <= _LONGEST_TEXT else kept[-_LONGEST_TEXT:]
