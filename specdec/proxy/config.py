"""Settings of the recording proxy; the options of `specdec collect proxy` come from them."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from specdec.common.config import Config

_UNITS = {unit: 1024**power for power, unit in enumerate(("", "k", "m", "g", "t"))}


def parse_size(text: str) -> int:
    """Bytes from "4096", "512K", "8M", "256MiB" or "1.5G"; units are powers of 1024.

    Raises:
        ValueError: no such size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise ValueError(f"{text!r} is no size; give bytes, at least 1, or 8M, 256MiB or 1.5G")
    return size


def _checked_size(text: str) -> str:
    parse_size(text)
    return text


Size = Annotated[str, AfterValidator(_checked_size)]


class ProxyConfig(Config):
    """How to reach the server, where to listen, and what to record."""

    upstream: str = Field(description="root of the server, as http://127.0.0.1:8000")
    out: Path = Field(description="folder for requests-00001.jsonl and so on")
    upstream_key_env: str | None = Field(
        None, description="environment variable with a key or user:password"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8800, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    sample: float = Field(1.0, ge=0, le=1, description="share of requests to record, 0 to 1")
    max_body: Size = Field("8M", description="larger bodies are served, not recorded")
    max_file: Size = Field("256M", description="size at which the next file begins")
    max_total: Size = Field("10G", description="size of all files at which recording stops")
    connect_timeout: float = Field(10.0, gt=0, description="seconds to wait for a connection")
    drain: int = Field(30, ge=0, description="seconds that answers may go on at the end")
