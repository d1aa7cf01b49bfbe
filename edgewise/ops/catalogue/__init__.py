"""The methods: one entry each, over the parts of the algebra. Importing this package registers them all."""
from edgewise.ops.catalogue import (
    attention,
    audio,
    baseline,
    context,
    decoder,
    diversity,
    query,
    similarity,
    temporal,
    transformation,
)

__all__ = ["attention", "audio", "baseline", "context", "decoder", "diversity", "query", "similarity", "temporal", "transformation"]
