"""What runs on a device before edgewise is there: Python 3.10 and its standard library.

Its text is sent over the connection, followed by one JSON request. It answers with lines of JSON: `progress`, and at the end
`result` or `error`. When the connection ends, so does it, and all that it started.

The device's folder:

    incoming/DIGEST         files on their way, named by their SHA-256
    store/DIGEST            files that have arrived and were checked
    trees/DIGEST/           bundles, and edgewise itself, linked from the store
    env-VERSION/            the virtual environment, and `installed.json` on what is in it
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
from typing import Any

_DIGEST = re.compile(r"[0-9a-f]{64}")
ANDROID = "/data/local/tmp"
_OUT = sys.stdout


class Stop(Exception):
    """An error for the user."""


def say(**message: Any) -> None:
    _OUT.write(json.dumps(message) + "\n")
    _OUT.flush()


def end_with_the_connection() -> None:
    """End this process and its children when nobody is at the other end of stdin any more."""
    with contextlib.suppress(OSError):  # it leads its group already
        os.setpgid(0, 0)

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def folder_of(name: str | None) -> str:
    """The device's folder, made for this user alone. Without a name: where adb may write on Android, else in the user's cache."""
    if name is None and os.access(ANDROID, os.W_OK):
        name = os.path.join(ANDROID, "edgewise")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.path.abspath(name or os.path.join(cache, "edgewise", "device"))
    for part in ("incoming", "store", "trees"):
        os.makedirs(os.path.join(folder, part), mode=0o700, exist_ok=True)
    return folder


def lock(folder: str) -> None:
    """Hold the folder for as long as this process, or what it becomes, lives."""
    import fcntl

    file = os.open(os.path.join(folder, "lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise Stop("another edgewise bench works on this device: wait until it is done") from None
    os.set_inheritable(file, True)


def digest(path: str) -> str:
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while True:
            chunk = file.read(1 << 20)
            if not chunk:
                return sha256.hexdigest()
            sha256.update(chunk)


def take_in(folder: str, digests: Any) -> dict[str, int]:
    """Move what has arrived whole into the store. Gives the digests that lack, each with the bytes that are there of it."""
    missing = {}
    for name in digests:
        if not _DIGEST.fullmatch(name):
            raise Stop(f"{name!r} is no digest")
        kept, arrived = (os.path.join(folder, part, name) for part in ("store", "incoming"))
        if os.path.isfile(kept) and digest(kept) == name:
            continue
        if os.path.isfile(arrived):
            if digest(arrived) == name:
                os.chmod(arrived, 0o400)
                os.replace(arrived, kept)
                continue
            missing[name] = os.path.getsize(arrived)
        else:
            missing[name] = 0
    return missing


def hello(request: dict[str, Any]) -> dict[str, Any]:
    if sys.version_info < (3, 10):  # noqa: UP036 - the device's own
        raise Stop(
            f"Python is {platform.python_version()} there, and 3.10 is needed: give another one with --remote-python"
        )
    folder = folder_of(request["folder"])
    lock(folder)
    sizes = request["files"]
    missing = take_in(folder, sizes)
    for name in list(missing):
        if missing[name] >= sizes[name]:  # as long as it should be and another: nothing of it is of use
            os.unlink(os.path.join(folder, "incoming", name))
            missing[name] = 0
    free = shutil.disk_usage(folder).free
    needed = sum(sizes[name] - there for name, there in missing.items())
    if needed > free:
        raise Stop(
            f"the device has {free / 2**20:.1f} MiB left in {folder}, and {needed / 2**20:.1f} MiB are to be copied"
        )
    return {
        "folder": folder,
        "missing": missing,
        "rsync": shutil.which("rsync") is not None,
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


def plant(folder: str, name: str, files: dict[str, str]) -> str:
    """Make the folder `trees/NAME` of files in the store, whole or not at all. Gives its path."""
    if not _DIGEST.fullmatch(name):
        raise Stop(f"{name!r} is no digest")
    tree = os.path.join(folder, "trees", name)
    # Only what is there whole was renamed to its name; but someone may have changed it since.
    shutil.rmtree(tree, ignore_errors=True)
    part = tree + ".part"
    shutil.rmtree(part, ignore_errors=True)
    for path, of in files.items():
        parts = path.split("/")
        if not _DIGEST.fullmatch(of) or any(word in ("", ".", "..") or "\0" in word for word in parts):
            raise Stop(f"{path!r} is no path of a bundle")
        place = os.path.join(part, *parts)
        os.makedirs(os.path.dirname(place), exist_ok=True)
        kept = os.path.join(folder, "store", of)
        try:
            os.link(kept, place)
        except OSError:  # some file systems, as those of memory cards, have no links
            shutil.copyfile(kept, place)
    os.rename(part, tree)
    return tree


def environment(folder: str, request: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The virtual environment with all that can be installed. Gives its Python, and why a target lacks its runtime."""
    key = hashlib.sha256(json.dumps([sys.executable, request["base"]]).encode()).hexdigest()[:8]
    place = os.path.join(folder, f"env-{sys.version_info[0]}.{sys.version_info[1]}-{key}")
    python, note = os.path.join(place, "bin", "python"), os.path.join(place, "installed.json")
    try:
        with open(note) as file:
            installed = json.load(file)
    except (OSError, ValueError):  # none, or one that was not finished
        shutil.rmtree(place, ignore_errors=True)
        say(progress="make a virtual environment")
        done = run([sys.executable, "-m", "venv", "--system-site-packages", place])
        if done.returncode:
            shutil.rmtree(place, ignore_errors=True)
            hint = "on Debian and Ubuntu: apt install python3-venv"
            raise Stop(f"cannot make a virtual environment on the device ({hint}):\n{last(done)}") from None
        installed = []
    lacks = {}
    for target, wanted in (("", []), *request["runtimes"].items()):
        requirements = [*request["base"], *wanted]
        if all(one in installed for one in requirements):
            continue
        say(progress="install {}".format(" ".join(wanted or request["base"])))
        done = run(
            [
                python,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--no-input",
                "--only-binary",
                ":all:",
                *requirements,
            ]
        )
        if done.returncode:
            reason = "cannot install {} on the device:\n{}".format(" ".join(wanted or requirements), last(done))
            if not target:
                raise Stop(reason)
            lacks[target] = reason
            continue
        installed += [one for one in requirements if one not in installed]
        with open(note + ".part", "w") as file:
            json.dump(installed, file)
        os.replace(note + ".part", note)
    return python, lacks


def run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def last(done: subprocess.CompletedProcess[bytes], lines: int = 4) -> str:
    text = done.stdout.decode("utf-8", "replace").strip().splitlines()
    return "\n".join("  " + line.strip() for line in text[-lines:])


def go(request: dict[str, Any]) -> None:
    """Plant the trees, prepare the environment, and become the worker, which answers in the place of this."""
    folder = folder_of(request["folder"])
    lock(folder)
    wanted = sorted({of for files in request["trees"].values() for of in files.values()})
    missing = take_in(folder, wanted)
    if missing:
        raise Stop(f"{len(missing)} files did not arrive whole: run the command again")
    trees = {name: plant(folder, name, files) for name, files in request["trees"].items()}
    python, lacks = environment(folder, request)
    order = {**request["order"], "bundles": [trees[name] for name in request["order"]["bundles"]], "lacks": lacks}
    path = os.pathsep.join([trees[request["package"]], *filter(None, [os.environ.get("PYTHONPATH")])])
    here = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "EDGEWISE_ORDER": json.dumps(order)}
    os.chdir(folder)
    os.execve(python, [python, "-m", "edgewise.bench.remote.worker"], here)


def main(request: dict[str, Any]) -> None:
    end_with_the_connection()
    try:
        if request["verb"] == "hello":
            say(result=hello(request))
        else:
            go(request)
    except Stop as stop:
        say(error=str(stop))
    except OSError as error:
        hint = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = ": make room on the device, or name another folder (ssh://user@host/folder)"
        say(error=f"{error.strerror or error} ({error.filename}){hint}")


if __name__ == "__main__":
    main(json.loads(sys.stdin.buffer.readline()))
