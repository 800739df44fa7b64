"""Options of `load_target` that every command and configuration takes; so little is loaded."""

from typing import Any

from pydantic import Field

from specdec.common.config import Config


class Placement(Config):
    """Which files of a model are loaded, and where to."""

    device: str | None = Field(
        default=None, description="cpu, cuda or cuda:1; CUDA if there is one"
    )
    device_map: str | dict[str, Any] | None = Field(
        default=None, description="auto, or another map of transformers, to spread it over devices"
    )
    quantization: str | None = Field(default=None, description="8bit or 4bit, through bitsandbytes")
    revision: str | None = Field(default=None, description="revision of a hub id")
    trust_remote_code: bool = Field(
        default=False, description="run Python code that the model brings"
    )
    attn_implementation: str | None = Field(
        default=None, description="attention of transformers, as sdpa or eager"
    )
