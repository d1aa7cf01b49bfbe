"""Texts that a model is held to: how two are compared, and the tables that they are read from."""

from __future__ import annotations

import re
from pathlib import Path

from edgewise.errors import InputError
from edgewise.rows import read_table


def plain(text: str) -> str:
    """A text as it is compared: lower case, words apart by one blank, no marks but the apostrophes within words."""
    text = re.sub(r"[’ʼ]", "'", text.lower())
    return " ".join(word for word in (w.strip("'") for w in re.sub(r"[^\w']|_", " ", text).split()) if word)


def read_rows(path: Path, columns: tuple[str, ...], what: str) -> list[dict[str, str]]:
    """The rows of a table (`.tsv`, or `.csv`) that holds `what` in these `columns`.
    Raises InputError for a table that cannot be read strictly or lacks a column."""
    rows = [row for _, row in read_table(path)]
    missing = [column for column in columns if column not in (rows[0] if rows else ())]
    if missing:
        raise InputError(
            f"{path} has no column {' and no column '.join(missing)}: {what} are a table (.tsv or .csv) with the columns "
            f"{', '.join(columns[:-1])} and {columns[-1]}"
        )
    return [{column: row[column] for column in columns} for row in rows]
