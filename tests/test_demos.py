"""The demo models keep their accuracy: over the whole test split, in torch and on every target."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COMPRESS, Cli

import edgewise
from edgewise import demos
from edgewise.exporter.sources import load_source

LEAST = {"digits": 0.97, "speech": 0.95, "motion": 0.9}
CLASSES = {"digits": 10, "speech": 10, "motion": 16}
PROTECTED = {"digits": 1, "speech": 2, "motion": 0}
MOST_LOST = 0.01
BATCH = 20


def split(name: str) -> demos.Split:
    if name not in demos.names():
        pytest.skip(f"demo:{name} is not there")
    found = demos.split(name)
    assert found is not None
    return found


def uncompressed(name: str) -> float:
    """Accuracy of the model itself in torch."""
    data, source = split(name), load_source(f"demo:{name}")
    assert source.module is not None
    hits = 0
    with torch.no_grad():
        for start in range(0, len(data.labels), BATCH):
            feeds = {key: torch.from_numpy(value[start : start + BATCH]) for key, value in data.inputs.items()}
            hits += int((source.module(**feeds).logits.argmax(-1).numpy() == data.labels[start : start + BATCH]).sum())
    return hits / len(data.labels)


def compressed(name: str) -> float:
    """Accuracy of the compressed program in torch."""
    data, source = split(name), load_source(f"demo:{name}", batch=BATCH)
    assert source.module is not None
    program = edgewise.compress(edgewise.capture(source.module, source.args, source.kwargs), COMPRESS)
    module, logits = program.module(), []
    assert len(data.labels) % BATCH == 0
    with torch.no_grad():
        for start in range(0, len(data.labels), BATCH):
            feeds = {key: torch.from_numpy(value[start : start + BATCH]) for key, value in data.inputs.items()}
            logits.append(module(**feeds).logits.numpy())
    return float((np.concatenate(logits).argmax(-1) == data.labels).mean())


@pytest.mark.parametrize("name", LEAST)
def test_accuracy_over_the_whole_split(name: str, cli: Cli, request: pytest.FixtureRequest) -> None:
    data = split(name)
    assert len(data.labels) >= 300 and len(set(data.labels.tolist())) == CLASSES[name]
    full = uncompressed(name)
    less = compressed(name)
    assert full >= LEAST[name]
    assert less >= full - MOST_LOST
    bundle: Path = request.getfixturevalue(name)
    scores = cli("verify", bundle, "--data", f"demo:{name}", "--json").document["accuracy"]
    assert {score["artifact"].split("/")[0] for score in scores} == {"openvino", "onnxruntime"}
    for score in scores:
        assert score["samples"] == len(data.labels)
        assert score["top1"] >= full - MOST_LOST
        # The artifacts compute what the compressed program computes; a sample at a tie may fall either way.
        assert abs(score["top1"] - less) <= 1 / len(data.labels)


@pytest.mark.parametrize("name", LEAST)
def test_half_of_the_tokens_are_gone(name: str, request: pytest.FixtureRequest) -> None:
    split(name)
    (component,) = edgewise.Bundle.open(request.getfixturevalue(name)).manifest.components
    first, last = component.sites[0], component.sites[-1]
    protected = PROTECTED[name]
    assert last.tokens_out - protected == (first.tokens_in - protected) // 2
    assert component.flops_after < 0.8 * component.flops_before
