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

    upstream: Annotated[str, Field(description="root of the server, as http://127.0.0.1:8000")]
    out: Annotated[Path, Field(description="folder for requests-00001.jsonl and so on")]
    upstream_key_env: Annotated[
        str | None,
        Field(
            description="environment variable with the server's key, or user:password, that is "
            "sent where the client sends none"
        ),
    ] = None
    host: Annotated[str, Field(description="address to listen on")] = "127.0.0.1"
    port: Annotated[
        int, Field(ge=0, le=65535, description="port to listen on; 0 takes a free one")
    ] = 8800
    sample: Annotated[
        float, Field(ge=0, le=1, description="share of requests to record, 0 to 1")
    ] = 1.0
    max_body: Annotated[
        Size, Field(description="larger requests and answers are served, not recorded")
    ] = "8M"
    max_file: Annotated[Size, Field(description="size at which the next file begins")] = "256M"
    max_total: Annotated[
        Size, Field(description="size of all files at which recording stops; serving goes on")
    ] = "10G"
    connect_timeout: Annotated[
        float, Field(gt=0, description="longest wait for a connection to the server, in seconds")
    ] = 10.0
    drain: Annotated[
        int, Field(ge=0, description="longest wait for running answers at the end, in seconds")
    ] = 30
