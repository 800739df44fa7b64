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
    ("--port",): "port",
    ("-ctk", "--cache-type-k"): "cache_type_k",
    ("-ctv", "--cache-type-v"): "cache_type_v",
    ("-fa", "--flash-attn"): "flash_attn_type",
    ("--spec-type",): "speculative.types",
    ("-md", "--model-draft", "--spec-draft-model"): "speculative.draft.mparams.path",
    ("-ctkd", "--spec-draft-type-k"): "speculative.draft.cache_type_k",
    ("-ctvd", "--spec-draft-type-v"): "speculative.draft.cache_type_v",
    ("--spec-draft-n-max",): "speculative.draft.n_max",
    ("--spec-draft-p-min", "--draft-p-min"): "speculative.draft.p_min",
    ("--spec-ngram-simple-size-n",): "speculative.ngram_simple.size_n",
    ("--spec-ngram-simple-size-m",): "speculative.ngram_simple.size_m",
}
_ATTENTION = {"on": "ENABLED", "off": "DISABLED", "auto": "AUTO"}


def parameters(flags: list[str] | None = None) -> Any:
    """Read the flags into the parameters of a server."""
    import xllamacpp

    def value_of(place: str, text: str) -> Any:
        if "cache_type" in place:
            return xllamacpp.ggml_type[f"GGML_TYPE_{text.upper()}"]
        if place == "flash_attn_type":
            return xllamacpp.llama_flash_attn_type[f"LLAMA_FLASH_ATTN_TYPE_{_ATTENTION[text]}"]
        if place == "speculative.types":
            name = f"COMMON_SPECULATIVE_TYPE_{text.upper().replace('-', '_')}"
            return [xllamacpp.common_speculative_type[name]]
        return type(attrgetter(place)(params))(text)

    params = xllamacpp.CommonParams()
    # Threads that wait by spinning are slow where others have the cores.
    params.cpuparams.n_threads = int(
        os.environ.get("OMP_NUM_THREADS") or params.cpuparams.n_threads
    )
    parser = argparse.ArgumentParser("llama-server", description=__doc__, allow_abbrev=False)
    for names, place in _PLACES.items():
        parser.add_argument(*names, dest=place)
    parser.add_argument("-a", "--alias")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--metrics", action="store_true")
    given = vars(parser.parse_args(flags))
    for place in _PLACES.values():
        if (text := given[place]) is not None:
            owner, _, name = place.rpartition(".")
            setattr(attrgetter(owner)(params) if owner else params, name, value_of(place, text))
    params.hostnames, params.endpoint_metrics = [given["host"]], given["metrics"]
    if given["alias"]:
        params.model_alias = {given["alias"]}
    return params


if __name__ == "__main__":
    import xllamacpp

    print(f"xllamacpp {xllamacpp.__version__}", flush=True)
    server = xllamacpp.Server(parameters())  # returns when it listens
    signal.pause()
