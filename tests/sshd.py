"""A real OpenSSH server on a high port of this machine, with keys of its own, for tests."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

SSHD = next(
    (path for path in ("/usr/sbin/sshd", "/usr/local/sbin/sshd", shutil.which("sshd") or "") if os.path.exists(path)),
    None,
)
LACKS = next((name for name, found in (("sshd", SSHD), ("ssh", shutil.which("ssh"))) if not found), None)
needs_sshd = pytest.mark.skipif(LACKS is not None, reason=f"there is no {LACKS} here: apt install openssh-server")


@dataclass(frozen=True)
class Server:
    """`config`: for the client; it knows the host key and has the user's key. `pid` of the server."""

    port: int
    folder: Path
    config: Path
    pid: int

    def address(self, folder: Path) -> str:
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}{folder}"


@contextmanager
def serving(folder: Path, env: Mapping[str, str], before: Callable[[], None] | None = None) -> Iterator[Server]:
    """Serve until the block ends. `env`: variables of every session; `before`: called in the server's process before it begins."""
    assert SSHD is not None
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "authorized").write_text((folder / "user.pub").read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sets = " ".join(f'"{key}={value}"' for key, value in env.items())
    (folder / "sshd_config").write_text(
        f"""ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/authorized
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
SetEnv {sets}
"""
    )
    (folder / "known").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    config = folder / "client"
    config.write_text(
        f"Host *\n  IdentityFile {folder}/user\n  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known\n"
    )
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", exist_ok=True)
    log = open(folder / "log", "wb")  # noqa: SIM115 - as long as the server
    command = [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")]
    running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=before)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert running.poll() is None, (folder / "log").read_text()
            time.sleep(0.05)
        yield Server(port, folder, config, running.pid)
    finally:
        running.terminate()
        running.wait()
        log.close()
