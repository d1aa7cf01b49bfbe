"""The daemon that adb talks to on a device, as far as edgewise needs it, for tests: the adb program and its server are real.

It answers `shell` with a command of this machine's shell (stdin, exit code and stderr apart, as since Android 7), and `push`
with files on this machine's disk. The protocol is that of Android's `packages/modules/adb`: protocol.txt, OVERVIEW.TXT, SYNC.TXT
and shell_protocol.h.
"""

from __future__ import annotations

import os
import queue
import shutil
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

needs_adb = pytest.mark.skipif(shutil.which("adb") is None, reason="there is no adb here: apt install adb")

_MOST = 1 << 18
_STDIN, _STDOUT, _STDERR, _EXIT, _CLOSE_STDIN = range(5)


class Stream:
    """One service on a connection: what the host sends comes by `read`; `write` waits until the host has taken what it sent."""

    def __init__(self, connection: Connection, ours: int, theirs: int) -> None:
        self._connection, self._ours, self.theirs = connection, ours, theirs
        self._came: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._ready = threading.Semaphore(0)
        self._rest = b""
        self.open = True

    def came(self, data: bytes) -> None:
        self._came.put(data)

    def taken(self) -> None:
        self._ready.release()

    def ended(self) -> None:
        self.open = False
        self._came.put(b"")
        self._ready.release()

    def read(self, size: int) -> bytes:
        """Exactly so many bytes. Raises EOFError if the stream ends before."""
        while len(self._rest) < size:
            data = self._came.get()
            if not data:
                raise EOFError
            self._rest += data
            self._connection.send(b"OKAY", self._ours, self.theirs)
        found, self._rest = self._rest[:size], self._rest[size:]
        return found

    def write(self, data: bytes) -> None:
        for start in range(0, len(data), _MOST):
            if not self.open:
                raise EOFError
            self._connection.send(b"WRTE", self._ours, self.theirs, data[start : start + _MOST])
            self._ready.acquire()

    def close(self) -> None:
        self._connection.send(b"CLSE", self._ours, self.theirs)


class Connection:
    """A connection of the adb server to this daemon."""

    def __init__(self, device: Adbd, link: socket.socket) -> None:
        self._device, self._link = device, link
        self._sending = threading.Lock()
        self._streams: dict[int, Stream] = {}

    def send(self, command: bytes, first: int, second: int, data: bytes = b"") -> None:
        number = int.from_bytes(command, "little")
        head = struct.pack("<6I", number, first, second, len(data), sum(data) & 0xFFFFFFFF, number ^ 0xFFFFFFFF)
        with self._sending, suppress(OSError):
            self._link.sendall(head + data)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self._link.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def serve(self) -> None:
        try:
            while True:
                number, first, second, size, _, _ = struct.unpack("<6I", self._exactly(24))
                self._handle(number.to_bytes(4, "little"), first, second, self._exactly(size))
        except (EOFError, OSError):
            pass
        finally:
            self._link.close()
            for stream in list(self._streams.values()):
                stream.ended()

    def _handle(self, command: bytes, first: int, second: int, data: bytes) -> None:
        if command in (b"CNXN", b"AUTH"):
            if self._device.authorized:
                self.send(b"CNXN", 0x01000001, _MOST, b"device::ro.product.name=test;features=shell_v2,cmd")
            else:  # whatever key the host shows, another token is wanted
                self.send(b"AUTH", 1, 0, os.urandom(20))
        elif command == b"OPEN":
            ours = len(self._streams) + 1
            stream = self._streams[ours] = Stream(self, ours, first)
            self.send(b"OKAY", ours, first)
            name = data.rstrip(b"\0").decode()
            service = self._device.sync if name == "sync:" else self._device.shell if name.startswith("shell") else None
            threading.Thread(target=self._run, args=(service, stream, name), daemon=True).start()
        elif second in self._streams:
            stream = self._streams[second]
            if command == b"WRTE":
                stream.came(data)
            elif command == b"OKAY":
                stream.taken()
            elif command == b"CLSE":
                stream.ended()

    @staticmethod
    def _run(service: Callable[[Stream, str], None] | None, stream: Stream, name: str) -> None:
        with suppress(EOFError):
            if service is not None:
                service(stream, name)
        stream.close()

    def cut(self) -> None:
        with suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)


class Adbd:
    """`env`: of every shell; `authorized`: whether it lets the host in; `commands`: what its shell was given."""

    def __init__(self, env: Mapping[str, str], authorized: bool = True) -> None:
        self.env, self.authorized = {**os.environ, **env}, authorized
        self.commands: list[str] = []
        self.room: int | None = None
        """Bytes that may still be pushed; None: no limit."""
        self._connections: list[Connection] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def serial(self) -> str:
        return f"127.0.0.1:{self.port}"

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection = Connection(self, self._listening.accept()[0])
                self._connections.append(connection)
                threading.Thread(target=connection.serve, daemon=True).start()

    def cut(self) -> None:
        """Pull the cable."""
        for connection in self._connections:
            connection.cut()

    def close(self) -> None:
        self._listening.close()
        self.cut()

    def shell(self, stream: Stream, name: str) -> None:
        command = name.partition(":")[2]
        self.commands.append(command)
        pipe = subprocess.PIPE
        running = subprocess.Popen(
            ["sh", "-c", command], stdin=pipe, stdout=pipe, stderr=pipe, env=self.env, start_new_session=True, bufsize=0
        )
        assert running.stdin and running.stdout and running.stderr
        sending = threading.Lock()

        def tell(kind: int, data: bytes) -> None:
            with sending:
                stream.write(struct.pack("<BI", kind, len(data)) + data)

        def pump(kind: int, pipe: object) -> None:
            with suppress(EOFError):
                while data := os.read(pipe.fileno(), 1 << 14):  # type: ignore[attr-defined]
                    tell(kind, data)

        def feed() -> None:
            with suppress(EOFError, OSError, ValueError):
                while True:
                    kind, size = struct.unpack("<BI", stream.read(5))
                    data = stream.read(size)
                    if kind == _STDIN:
                        running.stdin.write(data)  # type: ignore[union-attr]
                    elif kind == _CLOSE_STDIN:
                        running.stdin.close()  # type: ignore[union-attr]
            if not stream.open:  # the host is gone, and so is what it started
                with suppress(OSError):
                    os.killpg(running.pid, signal.SIGHUP)
                with suppress(OSError, ValueError):
                    running.stdin.close()  # type: ignore[union-attr]

        pumps = [threading.Thread(target=pump, args=pair) for pair in ((_STDOUT, running.stdout), (_STDERR, running.stderr))]
        threading.Thread(target=feed, daemon=True).start()
        for one in pumps:
            one.start()
        for one in pumps:
            one.join()
        code = running.wait()
        tell(_EXIT, bytes([code if code >= 0 else 128 - code]))

    def sync(self, stream: Stream, name: str) -> None:
        while True:
            kind, size = struct.unpack("<4sI", stream.read(8))
            if kind == b"QUIT":
                return
            path = stream.read(size).decode()
            if kind == b"STAT":
                try:
                    found = os.stat(path)
                except OSError:
                    found = None
                figures = (found.st_mode, found.st_size & 0xFFFFFFFF, int(found.st_mtime)) if found else (0, 0, 0)
                stream.write(struct.pack("<4s3I", b"STAT", *figures))
            elif kind == b"SEND":
                self._receive(stream, path.rpartition(",")[0])
            else:
                raise EOFError

    def _receive(self, stream: Stream, path: str) -> None:
        fault = ""
        try:
            file = open(path, "wb")  # noqa: SIM115
        except OSError as error:
            file, fault = open(os.devnull, "wb"), f"couldn't create file: {error.strerror}"  # noqa: SIM115
        with file:
            while True:
                kind, size = struct.unpack("<4sI", stream.read(8))
                if kind == b"DONE":
                    break
                data = stream.read(size)
                if self.room is not None:
                    fault = fault or ("write failed: No space left on device" if len(data) > self.room else "")
                    data = data[: self.room]
                    self.room -= len(data)
                file.write(data)
        text = fault.encode()
        stream.write(struct.pack("<4sI", b"FAIL" if fault else b"OKAY", len(text)) + text)


@contextmanager
def adb_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Adbd]]:
    """A real adb server of its own port and keys, which ends with the block. Gives a function that connects a device to it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    for key, value in (("ANDROID_ADB_SERVER_PORT", str(port)), ("ADB_MDNS", "0"), ("HOME", str(folder))):
        monkeypatch.setenv(key, value)
    for key in ("ANDROID_SERIAL", "ADB_TRACE", "ADB_VENDOR_KEYS"):
        monkeypatch.delenv(key, raising=False)
    devices: list[Adbd] = []

    def connect(env: Mapping[str, str] | None = None, *, authorized: bool = True) -> Adbd:
        device = Adbd(env or {}, authorized)
        devices.append(device)
        subprocess.run(["adb", "connect", device.serial], check=True, capture_output=True, timeout=60)
        return device

    try:
        subprocess.run(["adb", "start-server"], check=True, capture_output=True, timeout=60)
        yield connect
    finally:
        subprocess.run(["adb", "kill-server"], capture_output=True, timeout=60)
        for device in devices:
            device.close()
