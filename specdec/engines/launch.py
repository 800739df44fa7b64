"""Engines in a process of their own: started, waited for, and stopped whatever happens."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

# Flags for exact answers, one after the other; the length of the context goes behind them.
EXACT = {
    "vllm": ["--no-enable-prefix-caching", "--enforce-eager", "--max-model-len"],
    "llama.cpp": [
        *("--parallel", "1", "--flash-attn", "off", "-ctk", "f32", "-ctv", "f32"),
        *("-ctkd", "f32", "-ctvd", "f32", "--ctx-size"),
    ],
}
# Flags that give a server its drafter, each with its value, in words that \0 separates.
_OF_DRAFTER = re.compile(
    r"\0(--speculative-config|--model-draft|-md|-ctkd|-ctvd|--spec-[^=\0]+)[=\0][^\0]*"
)
# What begins an error: a Python exception's name, or the level of a line of llama.cpp.
_ERROR = re.compile(r"\b\w*(?:Error|Exception): .*|^[\d.]+ E (.*)|\berror: .*")


def server_command(launch: Sequence[str], engine: str) -> list[str]:
    """Turn an engine's launch line as people type it into the command that runs here.

    Raises:
        FileNotFoundError: the engine is not installed.
        ValueError: the line of another program.
    """
    program, *flags = launch
    if program == "specdec":
        return [sys.executable, "-m", "specdec", *flags]
    if program == "llama-server" and shutil.which(program):
        return [program, *flags]
    folder, home = engine.replace(".", ""), os.environ.get("SPECDEC_ENGINES_DIR", ".engines")
    variable = f"SPECDEC_{folder.upper()}_PYTHON"
    python = os.environ.get(variable) or os.path.abspath(f"{home}/{folder}/bin/python")
    if shutil.which(python) is None:
        script = f"run `bash scripts/engines.sh {folder}`, or " if engine in EXACT else ""
        fix = f"{script}give {variable}, or another launch line"
        raise FileNotFoundError(f"{engine} is not installed: {python!r} is no Python; {fix}")
    if program == "llama-server":
        return [python, str(Path(__file__).with_name("llamacpp_server.py")), *flags]
    if program == "vllm":
        # The wheel for CPUs has no `vllm serve`: the command wants a package of its own name.
        return [python, "-m", "vllm.entrypoints.openai.api_server", "--model", *flags[1:]]
    if program.startswith("python"):
        return [python, *flags]
    raise ValueError(f"the launch line begins with {program!r}, which is not {engine}'s server")


def without_drafter(launch: Sequence[str]) -> list[str]:
    """Leave out of a launch line what gives the server its drafter."""
    return _OF_DRAFTER.sub("", "\0".join(launch)).split("\0")


@contextmanager
def start(
    launch: Sequence[str],
    *,
    engine: str,
    log: Path,
    env: Mapping[str, str] | None = None,
    max_wait_s: float = 600.0,
) -> Iterator[str]:
    """Run a server on a free port of this machine, and yield its URL, with /v1, once it answers.

    Args:
        launch: the launch line, as `Exported.launch` has it.
        engine: its name; .engines has a folder of that name, without points.
        log: file for all that the server says; made anew.
        env: variables besides those of this process.
        max_wait_s: seconds until it must answer.

    Raises:
        FileNotFoundError: the engine is not installed.
        RuntimeError: it ended, or did not answer in time; says the engine's own reason.
    """
    command = server_command(launch, engine)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # vLLM on a CPU would take nine tenths of the memory for its cache: a gigabyte is enough here.
    defaults = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONUNBUFFERED": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as opened:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=opened,
            stderr=subprocess.STDOUT,
            env={**defaults, **os.environ, **(env or {})},
            start_new_session=True,  # a group of its own, which is stopped as one
        )
    # A command that is told to end stops its engine first, as by Ctrl-C.
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if is_main else None
    try:
        url, ends_at = f"http://127.0.0.1:{port}/v1", time.monotonic() + max_wait_s
        while not _answers(url):
            reason = f"does not answer after {max_wait_s:.0f} s"
            if process.poll() is not None:
                reason = f"ended with status {process.returncode} before it answered"
            elif time.monotonic() < ends_at:
                time.sleep(0.2)
                continue
            raise RuntimeError(f"{engine} {reason}: {last_error(log)} (all of it: {log})")
        yield url
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, sign)
                process.wait(10)


def _answers(url: str) -> bool:
    # Not every server has /health, and llama.cpp lists its models before it has read them.
    with suppress(httpx.HTTPError):
        health = httpx.get(url.replace("/v1", "/health"), timeout=5.0).status_code
        return health in (200, 404) and httpx.get(f"{url}/models", timeout=5.0).is_success
    return False


def last_error(log: Path) -> str:
    """Find what a server complained of: its first error, which later ones follow from."""
    lines = [line for line in log.read_text(errors="replace").split("\n") if line.strip()]
    errors = filter(None, (_ERROR.search(line) for line in lines if " WARNING " not in line))
    said = [*(error[1] or error[0] for error in errors), *lines[-1:], "it said nothing"]
    return said[0].strip()[:500]
