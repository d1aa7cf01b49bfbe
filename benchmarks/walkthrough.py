"""The whole way of a new user, from the documentation alone: `python benchmarks/walkthrough.py [--place FOLDER] [--venv FOLDER]`.

Takes the files and the commands of docs/walkthrough.md as they stand, and runs them in an empty folder with a fresh virtual
environment, and with an OpenSSH server on loopback in the place of the board. Says how long each took, and ends with 1 at the first
that fails. Then the report is looked at: at the width of a desk and of a phone, in a headless Chromium where there is one.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "walkthrough.md"
BOARD = "ssh://me@board.lan"


def steps(page: Path) -> tuple[dict[str, str], list[str]]:
    """The files that a page names, and its commands, in their order."""
    files, commands = {}, []
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        if language == "yaml":
            files[re.match(r"# (\S+)\n", text)[1]] = text  # type: ignore[index]
        else:
            commands += text.splitlines()
    return files, commands


def run(commands: list[str], folder: Path, environment: dict[str, str]) -> None:
    """One command after the other, in one shell each. Raises SystemExit at the first that fails."""
    for command in commands:
        start = time.perf_counter()
        done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
        print(f"{time.perf_counter() - start:7.1f} s  {command}", flush=True)
        if done.returncode or "Traceback" in done.stderr:
            raise SystemExit(f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}\nexit code {done.returncode}")


def look(report: Path) -> None:
    """Pictures of the report beside it. Raises SystemExit if the browser complains of anything."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        print("there is no Chromium here: the report was not looked at")
        return
    for name, width in (("desk", 1280), ("phone", 390)):
        # The window of a headless Chromium has a least width, and a frame has none.
        frame = report.with_name(f"{name}.html")
        frame.write_text(
            f'<body style="margin:0"><iframe src="{report.name}" style="border:0;width:{width}px;height:9000px"></iframe>'
        )
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--v=0"]
        picture = report.with_name(f"{name}.png")
        done = subprocess.run(
            [browser, *options, f"--window-size={width},9000", f"--screenshot={picture}", f"file://{frame}"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        if done.returncode or complaints or not picture.exists():
            raise SystemExit("\n".join(complaints) or done.stderr)
        print(f"looked at {report.name} as on a {name}: {picture}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--place", type=Path, help="keep what is made here")
    parser.add_argument("--venv", type=Path, help="an environment that is there already, in the place of a fresh one")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from sshd import LACKS, serving

    if LACKS:
        raise SystemExit(f"there is no {LACKS} here")
    files, commands = steps(PAGE)
    with tempfile.TemporaryDirectory() as temporary:
        place = (given.place or Path(temporary)).resolve()
        folder = place / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text)
        venv = (given.venv or folder / "venv").resolve()
        # Nothing of this process's environment is seen there; what `activate` does is done for every command.
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "EDGEWISE"))}
        environment = kept | {"EDGEWISE_CACHE": str(place / "cache"), "PATH": f"{venv}/bin{os.pathsep}{os.environ['PATH']}"}
        environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}
        installs = [one for one in commands if one.startswith(("python3 -m venv", "pip install"))]
        rest = [one for one in commands if one not in installs and not one.startswith((". ", "python "))]
        start = time.perf_counter()
        if given.venv is None:
            run([one.replace('".[', f'"{ROOT}[') for one in installs], folder, environment)
        with serving(place / "server", {"OMP_NUM_THREADS": "1"}) as server:
            config = f" --ssh-config {server.config}"
            board = server.address(place / "device")
            run([one.replace(BOARD, board) + (config if BOARD in one else "") for one in rest], folder, environment)
        look(folder / "report.html")
        print(f"{time.perf_counter() - start:7.1f} s in all")


if __name__ == "__main__":
    main()
