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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

_ENGINES = {"vllm": "vllm", "llama.cpp": "llamacpp"}  # and their folders under .engines
# Flags that give a server its drafter; each has one value.
_OF_DRAFTER = re.compile(r"(--speculative-config|--model-draft|-md|-ctkd|-ctvd|--spec-[^=]+)(=.*)?")
# What begins an error: a Python exception's name, or the level of a line of llama.cpp.
_ERROR = re.compile(r"\b\w*(?:Error|Exception): .*|^[\d.]+ E (.*)|\berror: .*")


def server_command(launch: Sequence[str], engine: str, python: str | None = None) -> list[str]:
    """Turn an engine's launch line as people type it into the command that runs here.

    Raises:
        ValueError: an engine that is not started from here, or the line of another one.
        FileNotFoundError: it is not installed.
    """
    program, *flags = launch
    if program == "specdec":
        return [sys.executable, "-m", "specdec", *flags]
    if program == "llama-server" and not python and shutil.which(program):
        return [program, *flags]
    if engine not in _ENGINES:
        raise ValueError(f"engine is {engine!r} but must be {' or '.join(_ENGINES)}, or a URL")
    folder = _ENGINES[engine]
    home, variable = os.environ.get("SPECDEC_ENGINES_DIR", ".engines"), folder.upper()
    variable = f"SPECDEC_{variable}_PYTHON"
    found = python or os.environ.get(variable) or os.path.abspath(f"{home}/{folder}/bin/python")
    if shutil.which(found) is None:
        fix = f"run `bash scripts/engines.sh {folder}`, or give --python or {variable}"
        raise FileNotFoundError(f"{engine} is not installed: {found!r} is no Python; {fix}")
    if program == "llama-server":
        return [found, str(Path(__file__).with_name("llamacpp_server.py")), *flags]
    if program == "vllm":
        # The wheel for CPUs has no `vllm serve`: the command wants a package of its own name.
        return [found, "-m", "vllm.entrypoints.openai.api_server", "--model", *flags[1:]]
    if program.startswith("python"):
        return [found, *flags]
    raise ValueError(f"the launch line begins with {program!r}, which is not {engine}'s server")


def without_drafter(launch: Sequence[str]) -> list[str]:
    """Leave out of a launch line what gives the server its drafter."""
    kept, words = list[str](), iter(launch)
    for word in words:
        if not (found := _OF_DRAFTER.fullmatch(word)):
            kept.append(word)
        elif not found[2]:
            next(words, "")  # its value
    return kept


@contextmanager
def start(
    launch: Sequence[str],
    *,
    engine: str,
    log: Path,
    python: str | None = None,
    env: Mapping[str, str] | None = None,
    max_wait_s: float = 600.0,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[str]:
    """Run a server on a free port of this machine, and yield its URL, with /v1, once it answers.

    Args:
        launch: the launch line, as `Exported.launch` has it.
        engine: "vllm", "llama.cpp" or "specdec".
        log: file for all that the server says; made anew.
        python: Python of the engine's environment; None finds it.
        env: variables besides those of this process.
        max_wait_s: seconds until it must answer.
        progress: told every few seconds what is waited for.

    Raises:
        FileNotFoundError: the engine is not installed.
        RuntimeError: it ended, or did not answer in time; says the engine's own reason.
    """
    command = server_command(launch, engine, python)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    # vLLM on a CPU would take nine tenths of the memory for its cache: a gigabyte is enough here.
    defaults = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONUNBUFFERED": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as opened:
        process = subprocess.Popen(
            command,
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
        url = f"http://127.0.0.1:{port}/v1"
        started = told = time.monotonic()
        while not _answers(url):
            waited, reason = time.monotonic() - started, ""
            if process.poll() is not None:
                reason = f"ended with status {process.returncode} before it answered"
            elif waited > max_wait_s:
                reason = f"does not answer after {max_wait_s:.0f} s"
            if reason:
                raise RuntimeError(f"{engine} {reason}: {last_error(log)} (all of it: {log})")
            if time.monotonic() - told > 5:
                told = time.monotonic()
                progress(f"{engine} is starting, {waited:.0f} s, at most {max_wait_s:.0f}")
            time.sleep(0.2)
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
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    errors = [_ERROR.search(line) for line in lines if " WARNING " not in line]
    found = [error[1] or error[0] for error in errors if error]
    return (found or [line for line in lines if line][-1:] or ["it said nothing"])[0][:500]
