"""Tables in text files, read strictly: a cell that is lost, or in another column, is an error that names the line."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from edgewise.errors import InputError


def read_table(path: Path) -> list[tuple[int, dict[str, str]]]:
    """The rows of a `.csv` (cells with a comma are in quotes), or else of a table with tabs (quotes are text there), by the
    names in the first line, with their line numbers. Raises InputError."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if path.suffix.lower() == ".csv":
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    else:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    rows: list[tuple[int, dict[str, str]]] = []
    names: list[str] | None = None
    try:
        for cells in reader:
            if not cells:
                continue
            if names is None:
                names = [cell.strip() for cell in cells]
                twice = next((name for name in names if names.count(name) > 1), None)
                if twice is not None:
                    raise InputError(f"{path} has the column {twice!r} more than once")
            elif len(cells) != len(names):
                raise InputError(
                    f"{path}, line {reader.line_num}: it has {len(cells)} columns, and the first line {len(names)}; "
                    "text with a comma in a .csv needs quotes"
                )
            else:
                rows.append((reader.line_num, dict(zip(names, cells, strict=True))))
    except csv.Error as error:
        raise InputError(f"cannot read {path}, line {reader.line_num}: {error}") from error
    return rows
