"""Damage copies of Core ML packages and run them: nothing but an `EdgewiseError` may come out.

    python coreml_fuzz.py SEED COUNT PACKAGE...

Runs in a process of its own, with a limit on its memory and on the time of each package. Every file that is opened meanwhile must
lie in the package. Prints how many packages were refused and how many ran; ends with exit code 1 at the first fault, and says how
to repeat it.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.errors import EdgewiseError
from edgewise.targets.coreml.schema import Model
from edgewise.targets.coreml.session import InterpreterSession, functions

SECONDS = 20
MAX_BYTES = 64 << 20
MAX_STEPS = 10_000
NUMBERS = [
    0,
    1,
    2,
    3,
    5,
    7,
    63,
    64,
    65,
    127,
    255,
    256,
    1 << 15,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    1 << 32,
    (1 << 62),
    (1 << 63) - 1,
    -1,
    -2,
    -(1 << 31),
]
NAMES = [
    "",
    "x",
    "main",
    "..",
    "/etc/passwd",
    "@model_path/../../../Manifest.json",
    "@model_path/weights/weight.bin",
    "@model_path//etc/passwd",
    "softmax",
    "const",
    "valid",
    "same",
]


class Fault(BaseException):
    """What must not happen, and what no `except Exception` may hide."""


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip bits, cut, splice, repeat or overwrite."""
    new = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        if not new:
            break
        at, length = rng.randrange(len(new)), rng.choice([1, 2, 4, 8, 64])
        kind = rng.randrange(7)
        if kind <= 1:
            new[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del new[at:]
        elif kind == 3:
            new[at : at + length] = rng.randbytes(length)
        elif kind == 4:
            del new[at : at + length]
        elif kind == 5:
            new[at:at] = new[rng.randrange(len(new)) :][:length]
        else:
            new[at : at + length] = rng.choice([b"\xff", b"\x00", b"\x7f", b"\x80"]) * length
    return bytes(new)


def fields(message: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every field that is set in a message, with the message that it is in."""
    for field, value in message.ListFields():
        found.append((message, field))
        if field.message_type is not None:
            if field.message_type.GetOptions().map_entry:
                inner = [one for one in value.values() if hasattr(one, "ListFields")]
            else:
                inner = list(value) if field.is_repeated else [value]
            for one in inner:
                fields(one, found)
    return found


def damage_model(data: bytes, rng: random.Random) -> bytes:
    """Change fields of the message, so that what comes out can still be parsed."""
    model = Model()
    model.ParseFromString(data)
    every = fields(model, [])
    words = [
        name
        for message, field in every
        if field.name in ("name", "type")
        for name in [getattr(message, field.name)]
        if isinstance(name, str)
    ]
    for _ in range(rng.choice([1, 1, 2, 3])):
        message, field = rng.choice(every)
        value = getattr(message, field.name)
        try:
            if field.message_type is not None and field.message_type.GetOptions().map_entry:
                key = rng.choice(sorted(value))
                other = rng.choice(sorted(value))
                if rng.random() < 0.3:
                    del value[key]
                elif hasattr(value[key], "CopyFrom"):
                    value[rng.choice([*sorted(value), rng.choice(words)])].CopyFrom(value[other])
            elif field.is_repeated:
                kind = rng.randrange(3)
                at = rng.randrange(len(value))
                if kind == 0:
                    del value[at]
                elif field.message_type is not None:
                    value.add().CopyFrom(value[at])
                else:
                    value[at] = changed(value[at], words, rng)
            elif field.message_type is not None:
                message.ClearField(field.name)
            else:
                setattr(message, field.name, changed(value, words, rng))
        except (ValueError, IndexError):  # beyond the range of its field, or gone with one of the changes before
            continue
    return bytes(model.SerializeToString())


def changed(value: Any, words: list[str], rng: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return rng.choice([rng.choice(words), rng.choice(NAMES), value + "x"])
    if isinstance(value, bytes):
        return damage_bytes(value, rng)
    if isinstance(value, float):
        return rng.choice([0.0, -1.0, 1e30, float("inf"), float("nan")])
    return rng.choice([*NUMBERS, value + 1, value - 1])


def damage_manifest(data: bytes, rng: random.Random) -> bytes:
    manifest = json.loads(data)
    entries = manifest["itemInfoEntries"]
    entry = entries[rng.choice(sorted(entries))]
    choice = rng.randrange(5)
    if choice == 0:
        entry["path"] = rng.choice(
            ["../model.mlmodel", "/etc/passwd", "com.apple.CoreML/../../../x", "", 5, None, "com.apple.CoreML", "a\0b"]
        )
    elif choice == 1:
        manifest["rootModelIdentifier"] = rng.choice(["none", 3, None, ["a"], {}])
    elif choice == 2:
        manifest["itemInfoEntries"] = rng.choice([[], {}, None, "text"])
    elif choice == 3:
        return b"[" * rng.choice([10, 100_000])
    else:
        del manifest[rng.choice(sorted(manifest))]
    return json.dumps(manifest).encode()


def damage(package: Path, rng: random.Random) -> str:
    """Damage one file of a package, and say which and how."""
    model = package / "Data/com.apple.CoreML/model.mlmodel"
    weights = package / "Data/com.apple.CoreML/weights/weight.bin"
    ways = [
        (model, damage_model),
        (model, damage_model),
        (model, damage_bytes),
        (weights, damage_bytes),
        (package / "Manifest.json", damage_bytes),
        (package / "Manifest.json", damage_manifest),
    ]
    path, how = rng.choice([one for one in ways if one[0].exists()])
    path.write_bytes(how(path.read_bytes(), rng))
    return f"{how.__name__} of {path.name}"


def use(package: Path) -> str:
    """Open every function of a package and run it, where its inputs are not too large to be made."""
    for name in functions(package):
        session = InterpreterSession(package, function=name, max_bytes=MAX_BYTES, max_steps=MAX_STEPS)
        feeds = {}
        for info in session.inputs:
            if np.prod(info.shape, dtype=object) < 1 << 16:
                feeds[info.name] = np.ones(info.shape, info.dtype)
        for _ in range(2):
            session.run(feeds)
    return "ran"


def main() -> int:
    seed, count, packages = int(sys.argv[1]), int(sys.argv[2]), [Path(one) for one in sys.argv[3:]]
    resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
    signal.signal(signal.SIGALRM, _too_long)
    results: Counter[str] = Counter()
    allowed = {"root": ""}

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        inside = (
            isinstance(arguments[0], int) or str(arguments[0]).startswith(allowed["root"]) if event == "open" else True
        )
        if not inside:
            raise Fault(f"opened {arguments[0]!r}, which is not in the package")

    for package in packages:
        use(package)  # so that everything is imported
    sys.addaudithook(audit)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.mlpackage"
        for number in range(count):
            rng = random.Random(f"{seed}-{number}")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(rng.choice(packages), copy)
            how = damage(copy, rng)
            signal.alarm(SECONDS)
            try:
                allowed["root"] = str(copy)
                results[use(copy)] += 1
            except EdgewiseError as error:
                assert str(error).strip()
                results["refused"] += 1
            except BaseException:
                allowed["root"] = ""
                traceback.print_exc()
                kept = Path(tempfile.mkdtemp()) / "fault.mlpackage"
                shutil.copytree(copy, kept)
                print(f"fault at seed {seed}, number {number}, by {how}; the package is in {kept}", file=sys.stderr)
                return 1
            finally:
                allowed["root"] = ""
                signal.alarm(0)
    print(json.dumps(results))
    return 0


def _too_long(*_: Any) -> None:
    raise Fault(f"a package took more than {SECONDS} s")


if __name__ == "__main__":
    sys.exit(main())
