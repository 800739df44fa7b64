"""The command itself, and what its parts share: options, exit statuses, progress."""

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from contextvars import ContextVar
from pkgutil import resolve_name
from typing import Any, Literal, get_args, get_origin

import typer

from specdec.common.config import Config, validated

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Speculative decoding: generate text, measure draft strategies, train and hand over.",
)
BAD_INPUT = (ValueError, FileNotFoundError, PermissionError, NotADirectoryError)
FAILURES = (RuntimeError, MemoryError, FloatingPointError, OSError)
_OBSERVED = {"loop": "specdec.engine.engine:Engine", "proxy": "specdec.proxy.recorder:Recorder"}
_metrics: ContextVar[Any] = ContextVar("metrics", default=None)
# Standard output of a command with --json, whose own words go to standard error.
_machine: ContextVar[Any] = ContextVar("machine", default=None)
TARGET = ("model that verifies: 'demo', a folder or a hub id", "--target", "--model")
DRAFTER = "'none', a name of specdec drafters, pkg.module:Class, or JSON with options"
DTYPE = "dtype of the weights: float32, bfloat16, float16 or auto; on a CPU float32 by default"
COMPILE = "compiled code: true, false, graphs (CUDA graphs) or auto"
MEASURE, DATA = "Measure", "Data and training"
CHECKPOINTS, ENGINES = "Checkpoints", "Engines"


def argument(text: str, default: Any = ...) -> Any:
    return typer.Argument(default, help=_sentence(text))


def option(default: Any, text: str, *flags: str) -> Any:
    """An option, which is needed where its default is `...`."""
    return typer.Option(default, *flags, help=_sentence(text))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def command(
    panel: str,
    name: str | None = None,
    *,
    group: typer.Typer = app,
    watch: str = "",
    tells: bool = False,
    threads: bool = False,
) -> Callable[..., Any]:
    """Register a command, whose expected errors end with an exit status.

    A parameter that is a config becomes an option for each of its fields. One that can be watched
    has --metrics-port; `watch` says what the metrics observe, "loop" or "proxy". One that `tells`
    machines what it found has --json, and one without a config of a run may have --threads.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(function, eval_str=True).parameters.values()
        configs = {each.name: each.annotation for each in parameters if _is_config(each)}

        @functools.wraps(function)
        def run(**given: Any) -> None:
            as_json = given.pop("json", False)
            with exit_statuses(), _for_machines() if as_json else nullcontext():
                _show_metrics(watch, given.pop("metrics_port", None))
                _set_threads(given.pop("threads", None))
                for parameter, model in configs.items():
                    fields = {field: given.pop(field) for field in model.model_fields}
                    given[parameter] = validated(model, fields, "option")
                function(**given)

        found = [each for each in parameters if each.name not in configs]
        found += [option for model in configs.values() for option in _options(model)]
        found += _shared_options(bool(watch), tells, threads)
        found = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in found]
        run.__signature__ = inspect.Signature(found)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in found}
        return group.command(name, rich_help_panel=panel)(run)

    return register


def _shared_options(is_watched: bool, tells: bool, threads: bool) -> Iterator[inspect.Parameter]:
    """Options that commands have in common, as far as a command has them."""
    shared = {
        "metrics_port": (is_watched, int, "local port for Prometheus; 0 finds a free one"),
        "json": (tells, bool, "print one JSON object and nothing else on standard output"),
        "threads": (threads, int, "threads of the CPU; all cores if it is not given"),
    }
    for name, (is_there, kind, text) in shared.items():
        if is_there:
            given = option(False, text, "--json") if kind is bool else option(None, text)
            annotation = kind if kind is bool else kind | None
            place = inspect.Parameter.KEYWORD_ONLY
            yield inspect.Parameter(name, place, default=given, annotation=annotation)


@contextmanager
def _for_machines() -> Iterator[None]:
    token = _machine.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _machine.reset(token)


def tell(found: Mapping[str, Any], *, only_asked: bool = False) -> None:
    """Print one line of JSON, where --json or a reader that is no terminal asks for it."""
    if (asked := _machine.get()) is not None or not (only_asked or sys.stdout.isatty()):
        typer.echo(json.dumps(found), file=asked)


def _set_threads(count: int | None) -> None:
    if count is not None:
        if count < 1:
            raise ValueError(f"--threads is {count} but must be at least 1")
        import torch

        torch.set_num_threads(count)


def _show_metrics(watch: str, port: int | None) -> None:
    if port is None or os.environ.get("RANK", "0") != "0":  # of a training's processes one tells
        return
    from specdec.common.metrics import serve_metrics

    metrics, port = serve_metrics(port)
    warn(f"metrics: http://127.0.0.1:{port}/metrics")
    _metrics.set(metrics)
    with suppress(ImportError):  # the command itself says what is missing
        resolve_name(_OBSERVED[watch]).observer = metrics


def _is_config(parameter: inspect.Parameter) -> bool:
    return inspect.isclass(parameter.annotation) and issubclass(parameter.annotation, Config)


def _options(model: type[Config]) -> Iterator[inspect.Parameter]:
    for name, field in model.model_fields.items():
        default = ... if field.is_required() else field.default
        kind, annotation = inspect.Parameter.KEYWORD_ONLY, _plain_type(field.annotation)
        # A flag that is off needs no second name that turns it off.
        flags = [f"--{name.replace('_', '-')}"] if default is False else []
        given = option(default, field.description or name.replace("_", " "), *flags)
        yield inspect.Parameter(name, kind, default=given, annotation=annotation)


def _plain_type(annotation: Any) -> Any:
    """The type of a field as typer takes it: the config checks the choices."""
    if get_origin(annotation) is Literal:
        return str
    kinds = [_plain_type(kind) for kind in get_args(annotation) if get_origin(kind) is not dict]
    return functools.reduce(lambda one, other: one | other, kinds) if kinds else annotation


@contextmanager
def exit_statuses() -> Iterator[None]:
    """Turn errors that are expected into a message and an exit status: 2 for bad input, else 1."""
    try:
        yield
    except BAD_INPUT as error:
        message, status = str(error), 2
    except FAILURES as error:
        message, status = f"the run failed: {_reason(error)}", 1
    except KeyboardInterrupt as error:
        message = str(error) or "interrupted; the same command resumes it"
        status = getattr(error, "status", 130)
    else:
        return
    typer.echo(f"specdec: {message}", err=True)
    raise typer.Exit(status)


def _reason(error: Exception) -> str:
    """The error's message; what torch says when memory runs out is put in words."""
    from specdec.engine.scheduler import is_out_of_memory

    if isinstance(error, MemoryError) or not is_out_of_memory(error):
        return str(error) or type(error).__name__
    return (
        f"out of memory ({str(error).splitlines()[0]}); give a shorter prompt or fewer new tokens, "
        "or load with a smaller dtype, quantization or on another device"
    )


def quiet_transformers() -> None:
    """Turn off what transformers and bitsandbytes say while they load."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # peft asks transformers for what it calls otherwise now.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error; what is yielded shows things done, things in all, and a text."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (BarColumn(), MofNCompleteColumn(), Remaining(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task, metrics = progress.add_task("loading", total=None), _metrics.get()

        def show(done: int, total: int, text: str) -> None:
            progress.update(task, completed=done, total=total, description=text)
            if metrics:
                metrics.done.set(done)
                metrics.total.set(total)

        yield show


def warn(text: str) -> None:
    typer.echo(f"specdec: {text}", err=True)
