"""The command `specdec`. Bad input ends with status 2 and a message, a failed run with 1.

A command is one file here and one line below.
"""

from specdec.cli import (  # noqa: F401 (they register themselves)
    analyze,
    bench,
    collect,
    features,
    generate,
    heads,
    plan,
    regenerate,
    report,
    train,
)
from specdec.cli.app import app


def main() -> None:
    """Entry point of the command."""
    app()


__all__ = ["app", "main"]
