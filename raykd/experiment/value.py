"""What the fields of an experiment have in common."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Dtype = Literal["float32", "bfloat16"]


class Value(BaseModel):
    """Frozen, and without fields that nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")
