"""The word error rate of transcripts, and the recordings with known texts that it is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgewise.errors import InputError, extras_named
from edgewise.verify.texts import plain, read_rows


@dataclass(frozen=True)
class Spoken:
    """A recording, and what is said in it."""

    file: Path
    text: str


@dataclass(frozen=True)
class WordErrors:
    """Words of the references, and how many of them the transcripts replaced, left out and added."""

    words: int
    substitutions: int
    deletions: int
    insertions: int

    @property
    def rate(self) -> float:
        """The word error rate: all errors for each word of the references."""
        return (self.substitutions + self.deletions + self.insertions) / self.words


def read_spoken(path: Path) -> list[Spoken]:
    """The rows of a table (`.tsv`, or `.csv`) with the columns `file`, from its folder on, and `text`; rows without a text are left
    out. Raises InputError for a table that cannot be read or has no such rows."""
    rows = read_rows(path, ("file", "text"), "recordings with known texts")
    found = [Spoken(path.parent / row["file"], row["text"]) for row in rows if row["file"] and plain(row["text"])]
    if not found:
        raise InputError(f"{path} has no row with a text")
    return found


def word_errors(references: Sequence[str], transcripts: Sequence[str]) -> WordErrors:
    """The errors of transcripts against what was said, by the alignment with the fewest; texts are compared as `plain`."""
    with extras_named():
        import jiwer
    made = jiwer.process_words([plain(text) for text in references], [plain(text) for text in transcripts])
    words = made.hits + made.substitutions + made.deletions
    return WordErrors(words, made.substitutions, made.deletions, made.insertions)
