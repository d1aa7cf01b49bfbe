"""An interpreter of ML Programs on numpy: it checks and rounds every value as declared."""

from edgewise.targets.coreml.interpreter import ops as _ops  # fills the table of ops
from edgewise.targets.coreml.interpreter.machine import MAX_BYTES, MAX_STEPS, Machine, State, Watch
from edgewise.targets.coreml.interpreter.program import Program, compile_function
from edgewise.targets.coreml.interpreter.registry import OPS
from edgewise.targets.coreml.interpreter.values import OtherType, StateType, TensorType, Type

assert _ops

__all__ = [
    "MAX_BYTES",
    "MAX_STEPS",
    "OPS",
    "Machine",
    "OtherType",
    "Program",
    "State",
    "StateType",
    "TensorType",
    "Type",
    "Watch",
    "compile_function",
]
