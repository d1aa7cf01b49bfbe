"""A device over SSH, by the OpenSSH client: the user's configuration, keys and known hosts hold, and host keys are checked.

The command that a remote shell reads is the same for everything: Python with a line of constant text. All names go through its
stdin.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from edgewise.bench.remote import agent
from edgewise.bench.remote.address import SshAddress
from edgewise.errors import InputError, MissingExtra

_OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": "15",
    "ServerAliveInterval": "10",
    "ServerAliveCountMax": "3",
    "ClearAllForwardings": "yes",
    "LogLevel": "ERROR",
}
_BOOT = "import sys; i=sys.stdin.buffer; exec(compile(i.read(int(i.readline())),'agent','exec'))"
_LONGEST_LINE = 256 * 2**20
_LONGEST_TEXT = 500


class Ssh:
    """Calls to one device. `config`: a configuration file in the place of the user's, `python`: the interpreter there."""

    def __init__(self, address: SshAddress, *, config: Path | None = None, python: str = "python3") -> None:
        if shutil.which("ssh") is None:
            raise MissingExtra("there is no ssh here: install the OpenSSH client (Debian: apt install openssh-client)")
        if config is not None and not config.is_file():
            raise InputError(f"{config} is no file: give a configuration of ssh")
        self.address = address
        self._config = config
        self._python = python
        name = address.host if address.port is None else f"{address.host}:{address.port}"
        self.name = name if address.user is None else f"{address.user}@{name}"

    def ask(self, request: Mapping[str, Any], progress: Callable[[str], None]) -> Any:
        """Run the agent there with a request, and give its result. Raises `InputError` with what went wrong, there or on the
        way."""
        source = Path(agent.__file__).read_bytes()
        text = b"%d\n%b%b\n" % (len(source), source, json.dumps(request).encode())
        command = [*self._client("ssh", "-T", "-p", "-l"), "--", self.address.host]
        command.append(shlex.join([self._python, "-c", _BOOT]))
        with tempfile.TemporaryFile() as errors:
            running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
            assert running.stdin is not None and running.stdout is not None
            try:
                with suppress(BrokenPipeError):  # what it writes on stderr says more
                    running.stdin.write(text)
                    running.stdin.flush()
                # Its stdin stays open: the agent takes its end for that of the connection.
                for message in _messages(running.stdout, self.name):
                    if "progress" in message:
                        progress(_plain(message["progress"]))
                    elif "error" in message:
                        raise InputError(f"{self.name}: {_plain(message['error'], lines=True)}")
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
            raise InputError(self._lost(code, errors.read(1 << 16).decode("utf-8", "replace")))

    def copy(self, files: Mapping[str, Path], there: Mapping[str, int], folder: str, *, rsync: bool) -> None:
        """Copy files to `folder` there, under the digests that they are given by. `there`: bytes that are there already of each.

        Raises `InputError` if the copy fails; what has arrived stays, for the next try.
        """
        with tempfile.TemporaryDirectory(prefix="edgewise-") as staging:
            for digest, path in files.items():
                Path(staging, digest).symlink_to(path.resolve())
            if rsync and shutil.which("rsync"):
                self._rsync(staging, sorted(files), folder)
            else:
                self._sftp(staging, [("reput" if there[digest] else "put", digest) for digest in sorted(files)], folder)

    def _sftp(self, staging: str, steps: Sequence[tuple[str, str]], folder: str) -> None:
        host = self.address.host
        host = f"[{host}]" if ":" in host else host
        where = host if self.address.user is None else f"{self.address.user}@{host}"
        batch = "".join(f"{verb} {digest} {folder}/{digest}\n" for verb, digest in steps)
        self._transfer([*self._client("sftp", "-P"), "-q", "-b", "-", "--", where], staging, batch)

    def _rsync(self, staging: str, names: Sequence[str], folder: str) -> None:
        host = self.address.host
        host = f"[{host}]" if ":" in host else host
        shell = shlex.join(self._client("ssh", "-p", "-l"))
        options = ["--copy-links", "--inplace", "--partial", "--whole-file", "--timeout=60", "--files-from=-"]
        self._transfer(["rsync", *options, "-e", shell, "--", "./", f"{host}:{folder}/"], staging, "\n".join(names))

    def _transfer(self, command: Sequence[str], folder: str, given: str) -> None:
        done = subprocess.run(command, cwd=folder, input=given, capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            said = done.stderr.strip() or done.stdout.strip()
            raise InputError(
                f"{self.name}: the files were not copied whole: {_plain(said, lines=True) or 'the connection was lost'}\n"
                f"is there room on the device? the same command goes on from where it stopped"
            )

    def _client(self, program: str, *flags: str) -> list[str]:
        command = [program]
        if self._config is not None:
            command += ["-F", str(self._config.resolve())]
        for key, value in _OPTIONS.items():
            command += ["-o", f"{key}={value}"]
        for flag in flags:
            if flag in ("-p", "-P"):
                command += [flag, str(self.address.port)] if self.address.port is not None else []
            elif flag == "-l":
                command += [flag, self.address.user] if self.address.user is not None else []
            else:
                command.append(flag)
        return command

    def _lost(self, code: int, errors: str) -> str:
        said = _plain(errors.strip(), lines=True)
        if "Host key verification failed" in errors or "host key is known" in errors:
            return (
                f"{self.name}: its host key is not known, or is another than it was; connect once with ssh and compare "
                f"the fingerprint with the device's ({said})"
            )
        if "Permission denied" in errors:
            return f"{self.name} does not let us in; edgewise asks for no password: give ssh a key ({said})"
        if code == 127:
            return f"{self.name} has no {self._python}: install Python 3.10 or newer there, or give --remote-python ({said})"
        if code == 255 or not said:
            return (
                f"the connection to {self.name} was lost ({said or f'ssh ended with {code}'}); nothing was written here"
            )
        return f"{self.name}: the benchmark ended with {code}: {said}"


def _messages(stream: IO[bytes], name: str) -> Iterator[dict[str, Any]]:
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


def _plain(text: object, *, lines: bool = False) -> str:
    """What a device says, as text that does nothing to a terminal."""
    kept = "".join(c for c in str(text) if c.isprintable() or (lines and c == "\n"))
    return kept if len(kept) <= _LONGEST_TEXT else kept[-_LONGEST_TEXT:]
