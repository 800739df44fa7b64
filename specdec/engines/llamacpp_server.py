"""llama.cpp's server from the wheel xllamacpp, which has no binary, under llama-server's own flags.

Run by the Python of llama.cpp's environment: it imports nothing of ours.
"""

import argparse
import os
import signal
from operator import attrgetter
from typing import Any

# Flags of llama-server, and the place of the value in xllamacpp's parameters.
_PLACES = {
    ("-m", "--model"): "model.path",
    ("-c", "--ctx-size"): "n_ctx",
    ("-np", "--parallel"): "n_parallel",
    ("-t", "--threads"): "cpuparams.n_threads",
    ("-ngl", "--gpu-layers"): "n_gpu_layers",
    ("--port",): "port",
    ("-ctk", "--cache-type-k"): "cache_type_k",
    ("-ctv", "--cache-type-v"): "cache_type_v",
    ("-fa", "--flash-attn"): "flash_attn_type",
    ("-md", "--model-draft", "--spec-draft-model"): "speculative.draft.mparams.path",
    ("-ctkd", "--spec-draft-type-k"): "speculative.draft.cache_type_k",
    ("-ctvd", "--spec-draft-type-v"): "speculative.draft.cache_type_v",
    ("--spec-draft-n-max",): "speculative.draft.n_max",
    ("--spec-draft-n-min",): "speculative.draft.n_min",
    ("--spec-draft-p-min", "--draft-p-min"): "speculative.draft.p_min",
}


def parameters(flags: list[str] | None = None) -> Any:
    """Read the flags into the parameters of a server."""
    import xllamacpp

    attention = xllamacpp.llama_flash_attn_type
    words = {
        "flash_attn_type": {
            "on": attention.LLAMA_FLASH_ATTN_TYPE_ENABLED,
            "off": attention.LLAMA_FLASH_ATTN_TYPE_DISABLED,
            "auto": attention.LLAMA_FLASH_ATTN_TYPE_AUTO,
        }
    }
    caches = {kind: xllamacpp.ggml_type[f"GGML_TYPE_{kind.upper()}"] for kind in ("f32", "f16")}
    params = xllamacpp.CommonParams()
    # Threads that wait by spinning are slow where others have the cores.
    params.cpuparams.n_threads = int(
        os.environ.get("OMP_NUM_THREADS") or params.cpuparams.n_threads
    )
    parser = argparse.ArgumentParser("llama-server", description=__doc__, allow_abbrev=False)
    for names, place in _PLACES.items():
        name = place.rpartition(".")[2]
        known = caches if name.startswith("cache_type") else words.get(name)
        kind = type(attrgetter(place)(params))
        parser.add_argument(*names, dest=place, type=str if known else kind, choices=known)
    parser.add_argument("-a", "--alias")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--metrics", action="store_true")
    parser.add_argument("--spec-type", choices=["draft-simple", "draft-eagle3"])
    given = vars(parser.parse_args(flags))

    for place in _PLACES.values():
        owner, _, name = place.rpartition(".")
        known = caches if name.startswith("cache_type") else words.get(name, {})
        if given[place] is not None:
            value = known.get(given[place], given[place])
            setattr(attrgetter(owner)(params) if owner else params, name, value)
    params.hostnames, params.endpoint_metrics = [given["host"]], given["metrics"]
    if given["alias"]:
        params.model_alias = {given["alias"]}
    if given["spec_type"]:
        method = f"COMMON_SPECULATIVE_TYPE_{given['spec_type'].upper().replace('-', '_')}"
        params.speculative.types = [xllamacpp.common_speculative_type[method]]
    return params


if __name__ == "__main__":
    import xllamacpp

    print(f"xllamacpp {xllamacpp.__version__}", flush=True)
    server = xllamacpp.Server(
        parameters()
    )  # returns when the model is loaded and the server listens
    print(f"listening on {server.listening_address}", flush=True)
    signal.pause()
