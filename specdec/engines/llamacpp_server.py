"""llama.cpp's server from the wheel xllamacpp, which has no binary, under llama-server's own flags.

Run by the Python of llama.cpp's environment: it imports nothing of ours.
"""

import argparse
import os
import signal
from functools import partial, reduce
from typing import Any

import xllamacpp


def _one_of(values: Any, prefix: str, text: str) -> Any:
    text = {"on": "enabled", "off": "disabled"}.get(text, text)
    return values[prefix + text.upper().replace("-", "_")]


_CACHE_TYPE = partial(_one_of, xllamacpp.ggml_type, "GGML_TYPE_")
_ATTENTION = partial(_one_of, xllamacpp.llama_flash_attn_type, "LLAMA_FLASH_ATTN_TYPE_")
_DRAFTING = partial(_one_of, xllamacpp.common_speculative_type, "COMMON_SPECULATIVE_TYPE_")
# Flags of llama-server, the place of the value in xllamacpp's parameters, and its type.
_FLAGS: list[tuple[str, str, Any]] = [
    ("--model -m", "model.path", str),
    ("--ctx-size -c", "n_ctx", int),
    ("--parallel -np", "n_parallel", int),
    ("--threads -t", "cpuparams.n_threads", int),
    ("--host", "hostnames", lambda text: [text]),
    ("--port", "port", int),
    ("--cache-type-k -ctk", "cache_type_k", _CACHE_TYPE),
    ("--cache-type-v -ctv", "cache_type_v", _CACHE_TYPE),
    ("--flash-attn -fa", "flash_attn_type", _ATTENTION),
    ("--spec-type", "speculative.types", lambda text: [_DRAFTING(text)]),
    ("--spec-draft-model --model-draft -md", "speculative.draft.mparams.path", str),
    ("--spec-draft-type-k -ctkd", "speculative.draft.cache_type_k", _CACHE_TYPE),
    ("--spec-draft-type-v -ctvd", "speculative.draft.cache_type_v", _CACHE_TYPE),
    ("--spec-draft-n-max", "speculative.draft.n_max", int),
    ("--spec-draft-p-min --draft-p-min", "speculative.draft.p_min", float),
]


def parameters() -> Any:
    """Read the command line into the parameters of a server."""
    parser = argparse.ArgumentParser("llama-server", description=__doc__, allow_abbrev=False)
    for names, place, kind in _FLAGS:
        parser.add_argument(*names.split(), dest=place, type=kind)
    parser.add_argument("--metrics", dest="endpoint_metrics", action="store_true")
    # Threads that wait by spinning are slow where others have the cores.
    if threads := os.environ.get("OMP_NUM_THREADS"):
        parser.set_defaults(**{"cpuparams.n_threads": int(threads)})
    params = xllamacpp.CommonParams()
    for place, value in vars(parser.parse_args()).items():
        if value is not None:
            *owners, name = place.split(".")
            setattr(reduce(getattr, owners, params), name, value)
    return params


if __name__ == "__main__":
    print(f"xllamacpp {xllamacpp.__version__}", flush=True)
    server = xllamacpp.Server(parameters())  # returns when it listens
    signal.pause()
