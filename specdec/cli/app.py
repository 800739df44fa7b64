"""The command itself, and what its parts share: exit statuses and progress."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

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
