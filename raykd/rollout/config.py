"""What one vLLM engine is told: the experiment's settings, and what follows from the models."""

from pydantic import Field

from raykd.experiment import EngineConfig


class EngineSettings(EngineConfig):
    """One inference engine, on GPU or CPU."""

    max_length: int = Field(default=512, ge=2)
    """Longest prompt and response together."""
    vocab_size: int | None = Field(default=None, ge=2)
    """True vocabulary; rows of the model past it are padding and are never sampled. None: the model has no padding."""
    seed: int = Field(default=0, ge=0)
    sleep: bool = False
    """Whether it can give its GPU memory back for a while."""
