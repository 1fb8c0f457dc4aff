"""What all bodies of the API have in common: types are strict, fields that nobody knows are let pass."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, populate_by_name=True)
