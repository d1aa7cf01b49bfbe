"""What a compression op computes: reference semantics in plain torch.

The algebra (score, select, reduce) lives in `score`, `select`, `match`, `pool` and `reduce`. `catalogue` joins the parts into
named methods (`methods` says what a method is), and `apply` calls one of them eagerly. The decisions and reductions that a
target may want in another form (`bipartite_match`, `top_tokens`, `take`, `merge`) are registered as `torch.library` ops
`edgewise::*`, so that a captured program keeps them as one node until a target chooses a realisation.
"""
from edgewise.ops import catalogue as _catalogue  # noqa: F401 (it registers the methods)
from edgewise.ops.apply import Compressed, apply
from edgewise.ops.greedy import determinantal, farthest_points
from edgewise.ops.match import bipartite_match
from edgewise.ops.methods import METHODS, Method, Parameter, Reduced, Tokens, method
from edgewise.ops.order import order_tokens
from edgewise.ops.reduce import merge, take
from edgewise.ops.select import top_tokens

__all__ = [
    "METHODS", "Compressed", "Method", "Parameter", "Reduced", "Tokens", "apply", "bipartite_match", "determinantal",
    "farthest_points", "merge", "method", "order_tokens", "take", "top_tokens",
]
