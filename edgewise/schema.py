"""The base of every record that edgewise writes to disk: strict, frozen, and free of NaN."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A frozen record that refuses keys it does not know, and NaN and infinity where a number is meant."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
