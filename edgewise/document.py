"""JSON from anywhere: read strictly, and refused before it can cost anything."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from edgewise.errors import InputError

MAX_DEPTH = 64
"""Of nesting. Parsers recurse, and none of edgewise's documents is half as deep."""

Model = TypeVar("Model", bound=BaseModel)


def parse(data: bytes, where: str, what: str, *, limit: int, mend: str) -> dict[str, Any]:
    """The JSON object in `data`. `where` names the file, `what` its kind ("manifest"), `mend` says what to do about it.

    Raises `InputError` if the bytes are more than `limit`, not JSON or no object, nested deeper than `MAX_DEPTH`, name a key
    twice, or hold NaN, infinity or text that is none.
    """
    if len(data) > limit:
        raise InputError(f"{where} has {len(data)} bytes; a {what} has at most {limit}. {mend}")
    _check_depth(data, where, mend)
    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
        # Lone surrogates are JSON and not text: no file and no terminal takes them.
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    except (UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{where} is not a {what}: {error}. {mend}") from error
    if not isinstance(document, dict):
        raise InputError(f"{where} is not a {what}: it lacks a JSON object. {mend}")
    return document


def validate(model: type[Model], data: bytes, where: str, what: str, mend: str) -> Model:
    """The record of class `model` in `data`. Raises `InputError` that names the first keys that do not fit."""
    try:
        return model.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise InputError(f"{where} does not fit the {what}'s schema:\n{_faults(error)}\n{mend}") from error


def readable(text: str) -> str:
    """The text with U+FFFD in place of what is none: lone surrogates, which Python has for bytes of a name that are not UTF-8."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def _faults(error: ValidationError, most: int = 5) -> str:
    faults = error.errors(include_url=False, include_input=False)
    lines = [f"  {'.'.join(str(part) for part in fault['loc']) or 'document'}: {fault['msg']}" for fault in faults]
    if len(lines) > most:
        lines[most:] = [f"  and {len(lines) - most} more"]
    return "\n".join(lines)


def _check_depth(data: bytes, where: str, mend: str) -> None:
    """Refuse deep nesting before the JSON parser, which recurses, sees it."""
    depth = 0
    in_string = False
    for token in re.finditer(rb'\\.|["\[\]{}]', data, re.DOTALL):
        mark = token.group()
        if mark == b'"':
            in_string = not in_string
        elif in_string or len(mark) > 1:
            continue
        elif mark in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise InputError(f"{where} is nested deeper than {MAX_DEPTH} levels. {mend}")
        else:
            depth -= 1


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"key {', '.join(map(repr, twice))} is there more than once")
    return document


def _no_constants(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
