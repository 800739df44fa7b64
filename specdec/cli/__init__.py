"""The command `specdec`. Bad input ends with status 2 and a message, a failed run with 1."""

from specdec.cli import about, check, data, engines, measure, models  # noqa: F401 (their commands register themselves)
from specdec.cli.app import app


def main() -> None:
    """Entry point of the command."""
    app()


__all__ = ["app", "main"]
