"""A build on a Ray cluster of two nodes, one of which is lost in the middle: nothing is lost, and nothing is there twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

import edgewise

pytest.importorskip("ray", reason="needs the extra `ray`")

DRIVER = """
import json, os, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from edgewise.builder import cluster as ours
from edgewise.builder.build import build, plan
from edgewise.builder.key import Keys
from edgewise.builder.task import build_one
from edgewise.exporter.matrix import read_recipes

log = Path("log")
log.mkdir()
entries = read_recipes("recipe.yaml").entries
# The head builds nothing, and so cannot be the one that is lost; both others are.
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 << 20})
nodes = [cluster.add_node(num_cpus=1, object_store_memory=80 << 20) for _ in range(2)]
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False)
killed = []

def kill():
    # As soon as a second bundle is begun, while the first may be under way on the other node.
    while len(list(log.iterdir())) < 2:
        time.sleep(0.05)
    cluster.remove_node(nodes[0], allow_graceful=False)
    killed.append(sorted(path.name for path in log.iterdir()))

thread = threading.Thread(target=kill)
thread.start()
out = Path("out")
given = []
def tell(name, total, text):
    given.append(text)
outcomes = build(plan(entries, out, keys=Keys()), out, engine=ours.engine(None), jobs=2, progress=tell)
thread.join()
again = build(plan(entries, out, keys=Keys()), out, engine=ours.engine(None), jobs=2)
ray.shutdown()
cluster.shutdown()
reference = Path("reference")
os.environ["EDGEWISE_CACHE"] = os.path.abspath("other")
build(plan(entries, reference, keys=Keys()), reference, engine=lambda tasks, jobs, tell: map(build_one, tasks))
print(json.dumps({
    "killed": killed,
    "begun": sorted(path.read_text() for path in log.iterdir()),
    "first": {one.name: one.status for one in outcomes},
    "messages": [one.message for one in outcomes],
    "again": [one.status for one in again],
    "said": [text for text in given if text.endswith("built")],
}))
"""

# The factory says when a build of it begins in another process than the driver.
LOGGING = TINY + """
import os, pathlib, uuid
def logged():
    if os.environ.get("RAY_WORKER_ID") or "default_worker" in " ".join(__import__("sys").argv):
        pathlib.Path("log", uuid.uuid4().hex).write_text(str(os.getpid()))
    return make()
"""


def test_a_lost_node_loses_nothing(tmp_path: Path) -> None:
    import json

    (tmp_path / "tiny_models.py").write_text(LOGGING)
    specs = "[null, 'tome:r=1', 'tome:r=2']"
    (tmp_path / "recipe.yaml").write_text(f"model: py:tiny_models:logged\ntargets: onnxruntime\nmatrix: {{compress: {specs}}}\n")
    path = [str(Path(edgewise.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "EDGEWISE_CACHE": str(tmp_path / "cache"),
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
        },
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    names = ["plain", "tome-r=1", "tome-r=2"]
    assert found["killed"], "no node was lost"
    assert found["first"] == dict.fromkeys(names, "built"), found
    assert found["again"] == ["current"] * 3
    assert sorted(found["said"]) == [f"{name}: built" for name in names]
    out, reference = tmp_path / "out", tmp_path / "reference"
    assert sorted(p.name for p in out.iterdir()) == names
    files = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert files == {p.relative_to(reference): p.read_bytes() for p in reference.rglob("*") if p.is_file()}
