"""Texts that a model is held to: how two are compared, and the tables that they are read from."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from edgewise.errors import InputError


def plain(text: str) -> str:
    """A text as it is compared: lower case, words apart by one blank, no marks but the apostrophes within words."""
    text = re.sub(r"[’ʼ]", "'", text.lower())
    return " ".join(word for word in (w.strip("'") for w in re.sub(r"[^\w']|_", " ", text).split()) if word)


def read_rows(path: Path, columns: tuple[str, ...], what: str) -> list[dict[str, str]]:
    """The rows of a table (`.tsv`, or `.csv`) that holds `what` in these `columns`; every cell of a row that lacks one is "".
    Raises InputError for a table that cannot be read or lacks a column."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="," if path.suffix.lower() == ".csv" else "\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    missing = [column for column in columns if column not in (rows[0] if rows else ())]
    if missing:
        raise InputError(
            f"{path} has no column {' and no column '.join(missing)}: {what} are a table (.tsv or .csv) with the columns "
            f"{', '.join(columns[:-1])} and {columns[-1]}"
        )
    if (wide := next((number for number, row in enumerate(rows, 2) if None in row), None)) is not None:
        raise InputError(f"{path}, row {wide}: it has more columns than the first; text with a comma in it needs quotes")
    return [{column: row[column] or "" for column in columns} for row in rows]
