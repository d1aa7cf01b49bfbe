"""Text to tokens and back, by the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgewise.errors import InputError, extras_named


class Tokenizer:
    """A tokenizer file (`tokenizer.json`)."""

    def __init__(self, path: Path) -> None:
        with extras_named():
            import tokenizers
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a plain Exception
            raise InputError(f"{path} is no tokenizer that can be read: {error}") from error

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text. `special`: with the tokens that the model wants around it."""
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def id_of(self, token: str) -> int | None:
        """The id of a token by its own text; None if there is no such token."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found


class TextStream:
    """The text of tokens as they come: what is given out never changes later (a character may take several tokens)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = ""

    def add(self, token: int) -> str:
        """What `token` adds to the text; may be empty."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        # A character that is not complete yet decodes to the replacement character.
        return "" if text.endswith("\N{REPLACEMENT CHARACTER}") else self._give(text)

    def end(self) -> str:
        """What is left when no more tokens come."""
        return self._give(self._tokenizer.decode(self._ids))

    def _give(self, text: str) -> str:
        more = text[len(self._given) :] if text.startswith(self._given) else ""
        self._given += more
        return more
