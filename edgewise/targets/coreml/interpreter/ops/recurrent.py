"""Recurrent layers, step by step: `x (steps, batch, in)`, states `(batch, hidden)`, weights of the gates below one another.

A layer of the direction `reverse` tells its states in the order in which it makes them, the last step of `x` first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edgewise.errors import InputError
from edgewise.targets.coreml.interpreter.ops.special import sigmoid
from edgewise.targets.coreml.interpreter.registry import Out, op, text

Activation = Callable[[np.ndarray], np.ndarray]
_ACTIVATIONS: dict[str, Activation] = {
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "linear": lambda x: x,
}


def _activation(name: Any) -> Activation:
    if text(name) not in _ACTIVATIONS:
        raise InputError(f"a recurrent layer with the activation '{text(name)}', whose parameters are not documented")
    return _ACTIVATIONS[text(name)]


def _gates(x: np.ndarray, weight: np.ndarray, bias: Any, count: int) -> list[np.ndarray]:
    """What `x (..., in)` gives to each of the gates, `(..., hidden)`."""
    total = x @ weight.T if bias is None else x @ weight.T + bias
    return np.split(total, count, axis=-1)


def _order(steps: int, direction: str) -> range:
    if direction not in ("forward", "reverse"):
        raise InputError(f"a recurrent layer with direction '{direction}'")
    return range(steps) if direction == "forward" else range(steps - 1, -1, -1)


def _sequence(states: list[np.ndarray], whole: Any, out: Out) -> np.ndarray:
    """All states in the order in which they were made, or the last one: `(steps or 1, batch, hidden)`."""
    kept = states if bool(whole) else states[-1:]
    out.promise((len(kept), *kept[0].shape))
    return np.stack(kept)


@op("rnn")
def rnn(
    x: np.ndarray,
    initial_h: np.ndarray,
    weight_ih: np.ndarray,
    weight_hh: np.ndarray,
    bias: Any = None,
    direction: Any = "forward",
    output_sequence: Any = False,
    activation: Any = "tanh",
    *,
    out: Out,
) -> tuple[np.ndarray, np.ndarray]:
    act, h, states = _activation(activation), initial_h, []
    for step in _order(x.shape[0], text(direction)):
        (one,), (other,) = _gates(x[step], weight_ih, bias, 1), _gates(h, weight_hh, None, 1)
        h = act(one + other)
        states.append(h)
    return _sequence(states, output_sequence, out), h


@op("gru")
def gru(
    x: np.ndarray,
    initial_h: np.ndarray,
    weight_ih: np.ndarray,
    weight_hh: np.ndarray,
    bias: Any = None,
    direction: Any = "forward",
    output_sequence: Any = False,
    recurrent_activation: Any = "sigmoid",
    activation: Any = "tanh",
    reset_after: Any = False,
    input_bias: Any = None,
    *,
    out: Out,
) -> tuple[np.ndarray, np.ndarray]:
    """Gates in the order reset, output, update. The reset gate acts on the state, or with `reset_after` on its product."""
    gate, act, h, states = _activation(recurrent_activation), _activation(activation), initial_h, []
    for step in _order(x.shape[0], text(direction)):
        inputs = _gates(x[step], weight_ih, input_bias, 3)
        hidden = _gates(h, weight_hh, bias, 3)
        reset, update = gate(inputs[0] + hidden[0]), gate(inputs[2] + hidden[2])
        product = reset * hidden[1] if bool(reset_after) else _gates(reset * h, weight_hh, bias, 3)[1]
        h = (1 - update) * act(inputs[1] + product) + update * h
        states.append(h)
    return _sequence(states, output_sequence, out), h


@op("lstm")
def lstm(
    x: np.ndarray,
    initial_h: np.ndarray,
    initial_c: np.ndarray,
    weight_ih: np.ndarray,
    weight_hh: np.ndarray,
    bias: Any = None,
    peephole: Any = None,
    weight_ih_back: Any = None,
    weight_hh_back: Any = None,
    bias_back: Any = None,
    peephole_back: Any = None,
    direction: Any = "forward",
    output_sequence: Any = False,
    recurrent_activation: Any = "sigmoid",
    cell_activation: Any = "tanh",
    activation: Any = "tanh",
    clip: Any = None,
    *,
    out: Out,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gates in the order input, forget, output, cell. Of two directions the results lie side by side."""
    if peephole is not None or peephole_back is not None or clip is not None:
        raise InputError("an LSTM with peepholes or a clipped cell, which this interpreter does not know")
    acts = (_activation(recurrent_activation), _activation(cell_activation), _activation(activation))
    way = text(direction)
    passes = [(weight_ih, weight_hh, bias, "forward" if way == "bidirectional" else way)]
    if way == "bidirectional":
        if weight_ih_back is None or weight_hh_back is None:
            raise InputError("an LSTM of two directions with the weights of one")
        passes.append((weight_ih_back, weight_hh_back, bias_back, "reverse"))
    results = []
    starts = zip(np.split(initial_h, len(passes), -1), np.split(initial_c, len(passes), -1), strict=True)
    for (w_in, w_hidden, offset, each), (h, c) in zip(passes, starts, strict=True):
        results.append(_lstm(x, h, c, w_in, w_hidden, offset, each, acts))
    last_h, last_c = (np.concatenate([one[k] for one in results], -1) for k in (1, 2))
    if not bool(output_sequence):
        return _sequence([last_h], False, out), last_h, last_c
    sequences = [one[0] for one in results]
    if way == "bidirectional":
        sequences[1] = sequences[1][::-1]  # side by side, both are told in the order of time
    states = [np.concatenate(both, -1) for both in zip(*sequences, strict=True)]
    return _sequence(states, True, out), last_h, last_c


def _lstm(
    x: np.ndarray, h: np.ndarray, c: np.ndarray, w_in: Any, w_hidden: Any, bias: Any, direction: str, acts: Any
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    gate, cell, outer = acts
    states = []
    for step in _order(x.shape[0], direction):
        one, other = _gates(x[step], w_in, bias, 4), _gates(h, w_hidden, None, 4)
        i, forget, o = (gate(one[k] + other[k]) for k in range(3))
        c = forget * c + i * cell(one[3] + other[3])
        h = o * outer(c)
        states.append(h)
    return states, h, c
