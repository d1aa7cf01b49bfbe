"""Files that a verb writes: whole or not at all, and with nothing beside them, whoever was killed before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import edgewise
from edgewise.cli.files import whole, write_text
from edgewise.errors import InputError

KILLED = """
import os, signal, sys
from pathlib import Path
from edgewise.cli.files import whole
with whole(Path(sys.argv[1])) as part:
    part.write_text("half of i")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    write_text(out, "before")
    path = os.pathsep.join([str(Path(edgewise.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", KILLED, str(out)], env={**os.environ, "PYTHONPATH": path})
        assert done.returncode == -signal.SIGKILL
        assert out.read_text() == "before" and len(list(tmp_path.iterdir())) == 3  # a lock and a folder
    write_text(out, "after")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"page.html": "after"}


def test_a_writer_that_lives_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    with whole(out) as part:
        part.write_text("the first to begin is the last to end")
        write_text(out, "another")
        assert part.exists() and out.read_text() == "another"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"page.html": "the first to begin is the last to end"}


def test_what_fails_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    out.write_text("before")
    with pytest.raises(ZeroDivisionError), whole(out) as part:
        part.write_text("after")
        raise ZeroDivisionError
    with pytest.raises(InputError, match="cannot write"):
        write_text(tmp_path / "none" / "page.html", "after")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"page.html": "before"}
