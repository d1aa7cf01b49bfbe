"""The methods: one entry each, over the parts of the algebra. Importing this package registers them all."""
from edgewise.ops.catalogue import attention, baseline, decoder, similarity, transformation

__all__ = ["attention", "baseline", "decoder", "similarity", "transformation"]
