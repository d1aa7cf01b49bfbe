"""The precision of each component: one word for all of them, or `w4a16,vision_encoder=w8a8`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from edgewise.errors import InputError, unknown

DEFAULT = "fp32"


@dataclass(frozen=True)
class Precisions:
    """`default` of the components that `named` does not name by their roles."""

    default: str
    named: dict[str, str]

    @property
    def all(self) -> tuple[str, ...]:
        """Every precision that was asked for, once."""
        return tuple(dict.fromkeys((self.default, *self.named.values())))

    def of(self, role: str) -> str:
        return self.named.get(role, self.default)

    def check(self, roles: Collection[str]) -> None:
        """Raise `InputError` if a precision is given for a component that is not there."""
        for role in self.named:
            if role not in roles:
                raise unknown("component", role, roles)


def parse_precisions(text: str) -> Precisions:
    """Read `P`, `ROLE=P,...` or `P,ROLE=P,...`. Raises `InputError` for anything else; whether a target has P is not looked at."""
    default, named = None, dict[str, str]()
    for part in text.split(","):
        role, equals, precision = (word.strip() for word in part.partition("="))
        if not equals:
            role, precision = "", role
        if not precision or (equals and not role):
            raise InputError(f"precision {text!r}: give P, or P for a component by its role: fp16,vision_encoder=w8a8")
        if role in named or (not equals and default is not None):
            raise InputError(f"precision {text!r}: there are two for {role or 'all components'}")
        if equals:
            named[role] = precision
        else:
            default = precision
    return Precisions(default or DEFAULT, named)
