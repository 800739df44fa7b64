"""Options of `load_target` that every command and configuration takes; so little is loaded."""

from typing import Any

from pydantic import Field

from specdec.common.config import Config


class Placement(Config):
    """Files of a model that are loaded, and the devices they go to."""

    device: str | None = Field(
        default=None, description="device: cpu, cuda or cuda:1; CUDA by default"
    )
    device_map: str | dict[str, Any] | None = Field(
        default=None, description="map of transformers that spreads the model over devices, as auto"
    )
    quantization: str | None = Field(
        default=None, description="weights in 8bit or 4bit, by bitsandbytes"
    )
    revision: str | None = Field(default=None, description="revision of a hub id")
    trust_remote_code: bool = Field(
        default=False, description="run Python code that the model brings"
    )
    attn_implementation: str | None = Field(
        default=None, description="attention of transformers, as sdpa or eager"
    )
    cache: str = Field(
        default="none", description="keys and values in fp8, int8, int6 or int4, or none of these"
    )
