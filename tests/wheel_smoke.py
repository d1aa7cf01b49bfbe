"""Install the wheel in fresh environments, one for each extra alone, and use it: `python tests/wheel_smoke.py [EXTRA ...]`.

Takes half an hour, most of it for the extras that have torch, and 3 GB below `--place`. The source distribution is built first, and
the wheel from it, so that both are whole. The bundles that devices run are made by the environment that runs this script. Every
command says what its exit code must be; one that needs what is not installed must end with 2, and name the extra.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUNTIMES = {"openvino": "openvino", "onnxruntime": "onnxruntime", "coreml": "coreml", "coreai": "coreai"}
"""Targets whose artifacts run here, by the extra."""



@dataclass(frozen=True)
class Use:
    """A command line of edgewise, its exit code, and words that it must say."""

    line: str
    code: int = 0
    says: str = ""


def lacks(line: str, extra: str) -> Use:
    return Use(line, 2, f"edgewise[{extra}]")


EVERYWHERE = [
    Use("--version", says="edgewise"),
    *(Use(line) for line in ("targets", "models", "sys", "inspect {all}", "diff {all} {vqa}", "report {record} -o page.html")),
]
EXPORT = "export demo:digits -o out --compress tome:keep=0.5 --target"


def of_runtime(extra: str) -> list[Use]:
    bundle = "{" + extra + "}"
    uses = [f"run {bundle} --inputs demo:digits[0] -o out.npz", f"bench {bundle} --samples 3 --seconds 0.1 -o r.json"]
    # Core ML packages run by our interpreter wherever there is protobuf, which ONNX Runtime brings.
    able = {extra, *(["coreml"] if extra == "onnxruntime" else [])}
    others = [name for name in RUNTIMES.values() if name not in able]
    return [
        Use(f"verify {bundle}"),
        Use(f"verify {{all}} --target {extra}"),
        *(Use(line) for line in uses),
        *(lacks(f"run {{{other}}} --inputs demo:digits[0]", other) for other in others),
        lacks(f"{EXPORT} {extra}", "export"),
    ]


USES = {
    "": [
        *(lacks(f"{verb} {{openvino}}", "openvino") for verb in ("verify", "bench", "run --inputs demo:digits[0]")),
        *(lacks(line, "export") for line in ("methods", f"{EXPORT} openvino", "inspect demo:digits", "build {recipe}")),
    ],
    **{extra: of_runtime(extra) for extra in RUNTIMES},
    # A bundle that generates: the runtime comes from another extra.
    "generate": [lacks("run {vqa} --image {image} --prompt x", "onnxruntime")],
    "generate,onnxruntime": [Use("run {vqa} --image {image} --prompt 'which color is the circle?'"), Use("verify {vqa}")],
    "export": [
        Use("methods"),
        Use("inspect demo:digits"),
        *(lacks(f"{EXPORT} {name}", extra) for extra, name in RUNTIMES.items()),
    ],
    "export,openvino": [
        Use(f"{EXPORT} openvino"),
        Use("verify out"),
        Use("lint demo:digits --target openvino"),
        lacks("export demo:digits -o out --precision w8a8 --target openvino", "calibration"),
    ],
    "export,onnxruntime": [
        Use(f"{EXPORT} onnxruntime"),
        Use("verify out"),
        Use("build {recipe} -o built --jobs 1"),
        lacks("build {recipe} -o built --engine ray", "ray"),
    ],
    "export,coreml": [Use(f"{EXPORT} coreml"), Use("verify out")],
    "coreai-export": [Use(f"{EXPORT} coreai"), Use("verify out")],
    "tensorrt-rtx": [Use("inspect {all}"), lacks("verify {tensorrt} --target tensorrt", "onnxruntime")],
    "export,tensorrt-rtx,onnxruntime": [Use(f"{EXPORT} tensorrt"), Use(f"{EXPORT} tensorrt --device sm86"), Use("verify out")],
    "calibration,export,openvino": [Use("export demo:digits -o out --precision w8a8 --target openvino --calib demo:digits")],
    "metrics": [lacks("verify {speech} --data demo:speech", "onnxruntime")],
    "metrics,generate,onnxruntime": [Use("verify {speech}")],
    "export,report,onnxruntime": [Use("compare demo:digits --calib demo:digits --method tome --keep 0.5 --samples 8 -o compared")],
    "ray,export,onnxruntime": [Use("build {recipe} -o built --engine ray --jobs 1")],
    "all": [Use(f"{EXPORT} openvino --target onnxruntime --target coreml --target tensorrt"), Use("verify out"), Use("bench out")],
}


def bundles(place: Path) -> dict[str, str]:
    """What the command lines name: bundles of every target, a recipe, a picture and a record."""
    import numpy as np
    from PIL import Image

    import edgewise
    from edgewise.bench import bench

    names = {extra: place / f"bundle-{extra}" for extra in (*RUNTIMES, "tensorrt", "all", "vqa", "speech")}
    for extra, path in names.items():
        targets = [*RUNTIMES.values(), "tensorrt"] if extra == "all" else [RUNTIMES.get(extra, "onnxruntime")]
        targets = ["tensorrt"] if extra == "tensorrt" else targets
        model = {"vqa": "demo:vqa", "speech": "demo:speech"}.get(extra, "demo:digits")
        compress = None if model != "demo:digits" else "tome:keep=0.5"
        print(f"make {path.name}", flush=True)
        edgewise.export(model, path, targets=targets, compress=compress)
    files = {"recipe": place / "recipe.yaml", "image": place / "image.png", "record": place / "record.json"}
    files["recipe"].write_text("model: demo:digits\ntargets: onnxruntime\ncompress: tome:keep=0.5\n")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(files["image"])
    record = bench(edgewise.Bundle.open(names["onnxruntime"]), samples=3, seconds=0.1)
    files["record"].write_text(record.model_dump_json())
    return {name: str(path) for name, path in {**names, **files}.items()}


def build(place: Path) -> Path:
    """The wheel, made from the source distribution."""
    tools = environment(place / "tools", "build")
    subprocess.run([tools, "-m", "build", "-o", place / "dist", ROOT], check=True, capture_output=True)
    (wheel,) = (place / "dist").glob("*.whl")
    return wheel


def environment(place: Path, package: str) -> Path:
    """A fresh virtual environment with one package; gives its Python."""
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    python = place / "bin" / "python"
    done = subprocess.run([python, "-m", "pip", "install", "-q", package], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"pip install {package}: {done.stderr[-2000:]}")
    return python


def smoke(extra: str, wheel: Path, place: Path, files: dict[str, str]) -> list[str]:
    """Install an extra, use it, and remove it; what was wrong."""
    start = time.perf_counter()
    python = environment(place / "venv", f"{wheel}[{extra}]" if extra else str(wheel))
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True)
    packages = {entry["name"].lower() for entry in json.loads(listed.stdout)}
    faults = [f"installs {name}" for name in sorted(packages) if name.startswith("nvidia-") or name == "triton"]
    work = place / "work"
    for use in [*EVERYWHERE, *USES[extra]]:
        if "-o out" in use.line or use is EVERYWHERE[0]:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
        # One process a command, with nothing of this one's in its environment.
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "EDGEWISE"))}
        clean |= {"EDGEWISE_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        line = use.line.format(**files)
        done = subprocess.run(f"{python.parent}/edgewise {line}", shell=True, cwd=work, env=clean, capture_output=True, text=True)
        said = " ".join((done.stdout + done.stderr).split())
        if done.returncode != use.code or use.says not in said or "Traceback" in said:
            faults.append(f"edgewise {use.line}: code {done.returncode}, not {use.code} {use.says}: {said[-600:]}")
    seconds = time.perf_counter() - start
    counts = f"{len(packages)} packages, {len(USES[extra])} uses, {seconds:.0f} s, {len(faults)} faults"
    print(f"{extra or '(none)'}: {counts}", *(f"  {fault}" for fault in faults), sep="\n", flush=True)
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("extras", nargs="*", default=list(USES), metavar="EXTRA", help=f"any of: {' '.join(filter(None, USES))}")
    parser.add_argument("--place", type=Path, help="keep bundles here, and take those that are there")
    given = parser.parse_args()
    for extra in given.extras:
        if extra not in USES:
            parser.error(f"no such extra: {extra}")
    with tempfile.TemporaryDirectory() as temporary:
        place = given.place or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        known = place / "files.json"
        if not known.exists():
            known.write_text(json.dumps(bundles(place)))
        files = json.loads(known.read_text())
        shutil.rmtree(place / "dist", ignore_errors=True)
        wheel = build(place)
        found = [smoke(extra, wheel, place, files) for extra in given.extras]
    return int(any(found))


if __name__ == "__main__":
    raise SystemExit(main())
