"""Recurrent layers against PyTorch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreml_packages import ct, from_mil, mb
from torch import nn

from edgewise.errors import InputError
from edgewise.targets.coreml.session import InterpreterSession

TESTED = {"gru", "lstm", "rnn"}
STEPS, BATCH, IN, HIDDEN = 5, 3, 4, 6


def run(folder: Path, build: Any, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    return list(InterpreterSession(from_mil(folder, build, arrays)).run(arrays).values())


def gates(weight: torch.Tensor, order: list[int]) -> np.ndarray:
    """Weights or biases of gates in another order."""
    parts = weight.detach().chunk(len(order))
    return torch.cat([parts[one] for one in order]).numpy()


def parameters(layer: nn.Module, order: list[int], suffix: str = "") -> dict[str, np.ndarray]:
    get = lambda name: gates(getattr(layer, f"{name}_l0{suffix}"), order)  # noqa: E731
    return {
        "weight_ih": get("weight_ih"),
        "weight_hh": get("weight_hh"),
        "in": get("bias_ih"),
        "hidden": get("bias_hh"),
    }


def arrays(*states: str, directions: int = 1) -> dict[str, np.ndarray]:
    torch.manual_seed(1)
    found = {"x": torch.randn(STEPS, BATCH, IN).numpy()}
    return {**found, **{name: torch.randn(BATCH, directions * HIDDEN).numpy() for name in states}}


def by_layer(state: np.ndarray, directions: int = 1) -> torch.Tensor:
    """`(batch, directions * hidden)` as `(directions, batch, hidden)`."""
    return torch.from_numpy(state).reshape(BATCH, directions, HIDDEN).transpose(0, 1).contiguous()


def flat(state: torch.Tensor) -> np.ndarray:
    return state.detach().transpose(0, 1).reshape(BATCH, -1).numpy()


@pytest.mark.parametrize("whole", [True, False], ids=["sequence", "last"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_lstm(direction: str, whole: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    both = direction == "bidirectional"
    layer = nn.LSTM(IN, HIDDEN, bidirectional=both)
    feeds = arrays("initial_h", "initial_c", directions=1 + both)
    x = torch.from_numpy(feeds["x"])
    states = tuple(by_layer(feeds[name], 1 + both) for name in ("initial_h", "initial_c"))
    wanted, (h, c) = layer(x.flip(0) if direction == "reverse" else x, states)
    order = [0, 1, 3, 2]
    p = parameters(layer, order)
    given = {"weight_ih": p["weight_ih"], "weight_hh": p["weight_hh"], "bias": p["in"] + p["hidden"]}
    if both:
        back = parameters(layer, order, "_reverse")
        given |= {
            "weight_ih_back": back["weight_ih"],
            "weight_hh_back": back["weight_hh"],
            "bias_back": back["in"] + back["hidden"],
        }

    def build(x: Any, initial_h: Any, initial_c: Any) -> Any:
        return mb.lstm(
            x=x, initial_h=initial_h, initial_c=initial_c, direction=direction, output_sequence=whole, **given
        )

    got = run(tmp_path, build, feeds)
    last = flat(h)[None]
    for one, other in zip(got, (wanted.detach().numpy() if whole else last, flat(h), flat(c)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_rnn(activation: str, direction: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.RNN(IN, HIDDEN, nonlinearity=activation)
    feeds = arrays("initial_h")
    x = torch.from_numpy(feeds["x"])
    wanted, h = layer(x.flip(0) if direction == "reverse" else x, by_layer(feeds["initial_h"]))
    p = parameters(layer, [0])

    def build(x: Any, initial_h: Any) -> Any:
        weights = {"weight_ih": p["weight_ih"], "weight_hh": p["weight_hh"], "bias": p["in"] + p["hidden"]}
        return mb.rnn(
            x=x, initial_h=initial_h, direction=direction, output_sequence=True, activation=activation, **weights
        )

    for one, other in zip(run(tmp_path, build, feeds), (wanted.detach().numpy(), flat(h)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_gru_with_the_reset_after_the_product(tmp_path: Path) -> None:
    """As PyTorch has it."""
    torch.manual_seed(0)
    layer = nn.GRU(IN, HIDDEN)
    feeds = arrays("initial_h")
    wanted, h = layer(torch.from_numpy(feeds["x"]), by_layer(feeds["initial_h"]))
    p = parameters(layer, [0, 2, 1])

    def build(x: Any, initial_h: Any) -> Any:
        weights = {"weight_ih": p["weight_ih"], "weight_hh": p["weight_hh"], "bias": p["hidden"], "input_bias": p["in"]}
        return mb.gru(x=x, initial_h=initial_h, output_sequence=True, reset_after=True, **weights)

    for one, other in zip(run(tmp_path, build, feeds), (wanted.detach().numpy(), flat(h)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_gru_with_the_reset_before_the_product(tmp_path: Path) -> None:
    """Core ML's own form: the state is reset, then multiplied."""
    torch.manual_seed(0)
    layer = nn.GRU(IN, HIDDEN)
    feeds = arrays("initial_h")
    p = parameters(layer, [0, 2, 1])
    (w_r, w_o, w_z), (u_r, u_o, u_z), (b_r, b_o, b_z) = (
        np.split(p[name], 3) for name in ("weight_ih", "weight_hh", "in")
    )
    h, wanted = feeds["initial_h"].astype(np.float64), []
    sigmoid = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
    for x in feeds["x"]:
        r, z = sigmoid(x @ w_r.T + h @ u_r.T + b_r), sigmoid(x @ w_z.T + h @ u_z.T + b_z)
        h = (1 - z) * np.tanh(x @ w_o.T + (r * h) @ u_o.T + b_o) + z * h
        wanted.append(h)

    def build(x: Any, initial_h: Any) -> Any:
        weights = {"weight_ih": p["weight_ih"], "weight_hh": p["weight_hh"], "bias": p["in"]}
        return mb.gru(x=x, initial_h=initial_h, output_sequence=True, **weights)

    for one, other in zip(run(tmp_path, build, feeds), (np.stack(wanted), h), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_what_is_not_documented_is_refused(tmp_path: Path) -> None:
    feeds = arrays("initial_h")

    def build(x: Any, initial_h: Any) -> Any:
        weights = {"weight_ih": np.ones((HIDDEN, IN), np.float32), "weight_hh": np.ones((HIDDEN, HIDDEN), np.float32)}
        return mb.rnn(x=x, initial_h=initial_h, activation="scaled_tanh", **weights)

    with pytest.raises(InputError, match=r"\(rnn 'rnn_0_0'\): .* activation 'scaled_tanh'"):
        run(tmp_path, build, feeds)


def test_a_gru_that_the_frontend_makes_a_loop_of(tmp_path: Path) -> None:
    """coremltools writes PyTorch's GRU as a loop over the steps."""
    torch.manual_seed(0)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(IN, HIDDEN)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x, torch.zeros(1, BATCH, HIDDEN))[0]

    module, x = Last().eval(), torch.randn(STEPS, BATCH, IN)
    model = ct.convert(
        torch.jit.trace(module, (x,)),
        inputs=[ct.TensorType(name="x", shape=x.shape)],
        minimum_deployment_target=ct.target.iOS17,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    path = tmp_path / "gru.mlpackage"
    model.save(str(path))
    session = InterpreterSession(path)
    assert "while_loop" in {step.kind for step in session.program.block.steps}
    np.testing.assert_allclose(session.run({"x": x.numpy()}).popitem()[1], module(x).detach().numpy(), atol=1e-6)
