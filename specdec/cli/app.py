"""The command itself, and what its parts share: exit statuses and progress."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args, get_origin

import typer

from specdec.common.config import Config, validated

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Speculative decoding: generate text, measure draft strategies, train and convert heads.",
)


BAD_INPUT = (ValueError, FileNotFoundError, PermissionError, NotADirectoryError)
FAILURES = (RuntimeError, MemoryError, FloatingPointError, OSError)


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
        task = progress.add_task("loading", total=None)

        def show(done: int, total: int, text: str) -> None:
            progress.update(task, completed=done, total=total, description=text)

        yield show


def options_from(model: type[Config], parameter: str) -> Callable[[Callable[..., None]], Any]:
    """Give a command an option for each field of a config, which it gets as one argument.

    Args:
        model: the descriptions of its fields are the help; it checks the values.
        parameter: name of the command's argument that takes the config.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            fields = {name: given.pop(name) for name in model.model_fields}
            command(**given, **{parameter: validated(model, fields, "option")})

        own = inspect.signature(command, eval_str=True).parameters
        options = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=typer.Option(
                    ... if field.is_required() else field.default, help=field.description
                ),
                annotation=_plain_type(field.annotation),
            )
            for name, field in model.model_fields.items()
        ]
        kept = [
            each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, each in own.items()
            if name != parameter
        ]
        run.__signature__ = inspect.Signature([*kept, *options])  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in (*kept, *options)}
        return run

    return decorate


def _plain_type(annotation: Any) -> Any:
    """The type of a field as typer takes it: the config checks the choices."""
    if get_origin(annotation) is Literal:
        return str
    kinds = [_plain_type(kind) for kind in get_args(annotation)]
    return functools.reduce(lambda one, other: one | other, kinds) if kinds else annotation
