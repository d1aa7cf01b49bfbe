"""A device over SSH, by the OpenSSH client: the user's configuration, keys and known hosts hold, and host keys are checked."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgewise.bench.remote.address import SshAddress
from edgewise.bench.remote.device import Device, plain
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


class Ssh(Device):
    """Calls to one device. `config`: a configuration file in the place of the user's, `python`: the interpreter there."""

    def __init__(self, address: SshAddress, *, config: Path | None = None, python: str = "python3") -> None:
        if shutil.which("ssh") is None:
            raise MissingExtra("there is no ssh here: install the OpenSSH client (Debian: apt install openssh-client)")
        if config is not None and not config.is_file():
            raise InputError(f"{config} is no file: give a configuration of ssh")
        self.address = address
        self._config = config
        name = address.host if address.port is None else f"{address.host}:{address.port}"
        super().__init__(name if address.user is None else f"{address.user}@{name}", python, address.folder)

    def _command(self, there: str) -> list[str]:
        return [*self._client("ssh", "-T", "-p", "-l"), "--", self.address.host, there]

    def copy(self, files: Mapping[str, Path], there: Mapping[str, int], folder: str, *, rsync: bool) -> None:
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
                f"{self.name}: the files were not copied whole: {plain(said, lines=True) or 'the connection was lost'}\n"
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
        said = plain(errors.strip(), lines=True)
        if "Host key verification failed" in errors or "host key is known" in errors:
            return (
                f"{self.name}: its host key is not known, or is another than it was; connect once with ssh and compare "
                f"the fingerprint with the device's ({said})"
            )
        if "Permission denied" in errors:
            return f"{self.name} does not let us in; edgewise asks for no password: give ssh a key ({said})"
        if code == 255 or not said:
            return self._cut(code, said, "ssh")
        return f"{self.name}: the benchmark ended with {code}: {said}"
