"""How variants are written: `[NAME=]SPEC [+ SPEC ...]`, or `[NAME=]none` for no compression.

NAME is that of the function in the artifact; without one it is made of the specs: `tome:keep=0.5` is `tome_keep_0_5`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from edgewise.errors import InputError
from edgewise.passes.plan import parse_spec

MAIN = "main"
"""The function that the specs of the bundle itself become."""
NONE = "none"

_MISNAMED = re.compile(r"([^:@=]*)=")
_NAMED = re.compile(r"([A-Za-z_]\w*)=(.*)", re.ASCII | re.DOTALL)


def parse_variants(main: Sequence[str], texts: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
    """The specs of every function by name, `main` first.

    Raises `InputError` for what is misspelt, two functions of one name, and the same specs twice.
    """
    found = {MAIN: tuple(main)}
    for text in texts:
        named = _NAMED.fullmatch(text.strip())
        if named is None and (misnamed := _MISNAMED.match(text)):
            name = misnamed[1].strip()
            raise InputError(f"unknown variant {text!r}: the name {name!r} is not of letters, digits and _, a letter or _ first")
        rest = named[2].strip() if named else text.strip()
        specs = () if rest == NONE else tuple(re.split(r"\s+\+\s+", rest))
        for spec in specs:
            try:
                parse_spec(spec)
            except InputError as error:
                raise InputError(f"unknown variant {text!r}: {error}") from error
        name = named[1] if named else _name(rest)
        for other, theirs in found.items():
            if _meant(specs) == _meant(theirs):
                raise InputError(f"the variant {text!r} is the same compression as {other!r}, {_told(theirs)}: leave it out")
            if name.casefold() == other.casefold():
                mend = "give it another name: NAME=SPEC"
                raise InputError(f"two compressions are called {name!r}, {_told(theirs)} and {_told(specs)}: {mend}")
        found[name] = specs
    return found


def _meant(specs: Sequence[str]) -> list[tuple[Any, ...]]:
    return [(one.method.name, one.site, one.parameters) for one in map(parse_spec, specs)]


def _told(specs: Sequence[str]) -> str:
    return " + ".join(specs) or NONE


def _name(text: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")
    return plain if plain[:1].isalpha() else f"_{plain}"
