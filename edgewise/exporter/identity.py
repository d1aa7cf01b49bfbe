"""What a model source is made of, as a digest that is there before anything is captured; most need no torch."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import sys
import sysconfig
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from edgewise import demos
from edgewise.calibration.files import MANIFESTS
from edgewise.errors import InputError, extras_named

_CHUNK = 1 << 20


@cache
def code_digest() -> str:
    """SHA-256 of edgewise's own code: its version alone does not tell one checkout from the next."""
    root = Path(__file__).parents[1]
    return _digest({str(path.relative_to(root)): file_digest(path) for path in sorted(root.rglob("*.py"))})


def file_digest(path: Path) -> str:
    """SHA-256 of a file; links are followed. Raises InputError if it cannot be read."""
    sha256 = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                sha256.update(chunk)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    return sha256.hexdigest()


def path_digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder: the names and digests of all files below it."""
    if not path.is_dir():
        return file_digest(path)
    files = sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return _digest({p.relative_to(path).as_posix(): file_digest(p) for p in files})


def model_digest(model: str, input_shapes: Any = None, seed: int = 0, *, trust_remote_code: bool = False) -> str:
    """SHA-256 of all that a MODEL is made of: its files; the revision of a Hugging Face id; what a Python factory returns, its
    code, and the files that it opens.

    Raises InputError where the model is not there.
    """
    if model.startswith("demo:"):
        name = model.removeprefix("demo:")
        if name in demos.names():
            return path_digest(demos.folder(name))
    if model.startswith("py:"):
        return _factory_digest(model, input_shapes, seed)
    if Path(model).exists():
        return path_digest(Path(model))
    return _hub_digest(model, trust_remote_code)


def values_digest(values: Any) -> dict[str, str]:
    """Digests of the files, folders and demos that values of a recipe name, those in specs (`weights=FILE`) too."""
    found = {}
    for text in _texts(values):
        for word in {text, *(part.partition("=")[2] for part in text.replace(":", ",").split(","))} - {""}:
            demo = word.removeprefix("demo:") if word.startswith("demo:") else None
            if demo in demos.names():
                found[word] = path_digest(demos.folder(str(demo)))
            elif len(word) < 4096 and Path(word).is_file():
                found[word] = file_digest(Path(word))
            elif os.sep in word and Path(word).is_dir():
                found[word] = path_digest(Path(word))
    return dict(sorted(found.items()))


def data_digest(data: str | None) -> dict[str, str]:
    """The digest of the data of this name. A manifest names files beside it, so that its whole folder counts."""
    if data is None or data.startswith("demo:") or not Path(data).exists():
        return values_digest(data)
    path = Path(data)
    return {data: path_digest(path.absolute().parent if path.suffix.lower() in MANIFESTS else path)}


def _texts(values: Any) -> Iterator[str]:
    if isinstance(values, str):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _texts(value)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _texts(value)


def _hub_digest(model: str, trust_remote_code: bool) -> str:
    """The commit of a Hugging Face id: the hub's own address of a content."""
    with extras_named():
        import transformers
    from edgewise.exporter.sources import load_config

    commit = getattr(load_config(model, trust_remote_code=trust_remote_code), "_commit_hash", None)
    if not commit:
        raise InputError(f"{model} has no revision that a build could be keyed by: download it, and give its folder")
    return _digest({"commit": commit, "transformers": transformers.__version__})


_opened: dict[str, set[Path]] = {}
_listening: set[Path] | None = None
_thread = 0


def _factory_digest(model: str, input_shapes: Any, seed: int) -> str:
    """What a factory gives may hang on anything that its code does, so that it is called: weights, buffers, example inputs and the
    module's own description are part of the digest, and so are its code and every file that was opened from Python."""
    import torch

    from edgewise.exporter.digest import tensor_digest
    from edgewise.exporter.sources import load_source

    with _Listening(model):
        source = load_source(model, input_shapes=input_shapes, seed=seed)
    assert source.module is not None
    leaves, _ = torch.utils._pytree.tree_flatten_with_path((source.args, source.kwargs))
    tensors = [*source.module.named_parameters(), *source.module.named_buffers(), *((str(k), v) for k, v in leaves)]
    made = [[k, tensor_digest(v) if isinstance(v, torch.Tensor) else repr(v)] for k, v in tensors]
    files = {*_code_of(model.split(":")[1]), *(p for p in _opened[model] if p.is_file())}
    return _digest({"made": made, "is": repr(source.module), "files": {_place(p): file_digest(p) for p in sorted(files)}})


def _place(path: Path) -> str:
    """A path that stays the same when the current folder, and what is below it, is moved."""
    here = Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else str(path)


class _Listening:
    """Notes every file that this thread opens for reading meanwhile, and every module that is imported, but those of installed
    packages. What happens when a module is imported happens once in a process, and is kept for the next time."""

    def __init__(self, model: str) -> None:
        self._files = _opened.setdefault(model, set())
        self._modules = set(sys.modules)

    def __enter__(self) -> None:
        global _listening, _thread
        _hook()
        _thread = threading.get_ident()
        _listening = self._files

    def __exit__(self, *_: object) -> None:
        global _listening
        _listening = None
        for name in set(sys.modules) - self._modules:
            file = getattr(sys.modules[name], "__file__", None)
            if file and not name.startswith("edgewise.") and not _installed(os.path.realpath(file)):
                self._files.add(Path(os.path.realpath(file)))


@cache
def _hook() -> None:
    """Audit hooks stay for good: there is one, which listens only sometimes."""
    # These read code, and whether they do hangs on what the process has compiled before.
    readers = {"_frozen_importlib_external", "importlib._bootstrap_external", "linecache", "tokenize", "inspect"}
    aside = (str(Path(__file__).parents[1]), "/proc/", "/sys/", "/dev/")

    def heard(event: str, args: tuple[Any, ...]) -> None:
        if _listening is None or event != "open" or not isinstance(args[0], (str, bytes)) or _thread != threading.get_ident():
            return
        mode, flags = args[1], args[2]
        if (mode is not None and set(mode) & set("wax")) or (mode is None and flags & (os.O_WRONLY | os.O_CREAT)):
            return  # what is written is no part of what the model is made of
        path = os.path.realpath(os.fsdecode(args[0]))
        reader = sys._getframe(1).f_globals.get("__name__")
        if reader not in readers and not path.startswith(aside) and not _installed(path):
            _listening.add(Path(path))

    sys.addaudithook(heard)


@cache
def _roots() -> tuple[str, ...]:
    """Folders of the standard library and of installed packages."""
    paths = sysconfig.get_paths()
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    return tuple(os.path.realpath(paths[kind]) + os.sep for kind in kinds if paths.get(kind))


def _installed(path: str) -> bool:
    return path.startswith(_roots())


def _code_of(name: str) -> set[Path]:
    """The source files of a module and of all that it imports, directly or not, but installed packages and edgewise."""
    files: set[Path] = set()
    pending, seen = [name], {"edgewise"}
    while pending:
        name = pending.pop()
        parent = name.rpartition(".")[0]
        if name in seen or name.partition(".")[0] == "edgewise":
            continue
        seen.add(name)
        if parent:
            pending.append(parent)
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError, AttributeError):  # a name inside of a module, or one that is not there
            continue
        if spec is None or not spec.has_location or spec.origin is None or _installed(os.path.realpath(spec.origin)):
            continue
        path = Path(os.path.realpath(spec.origin))
        files.add(path)
        if path.suffix == ".py":
            package = name if spec.submodule_search_locations is not None else parent
            pending += _imports(path, package)
    return files


def _imports(path: Path, package: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*up, *filter(None, [node.module])])
            if base:
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names)


def _digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
