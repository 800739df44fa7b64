"""`specdec collect`: a folder of queries from what users asked, or by recording it."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from specdec.cli.app import app, exit_statuses

DEFAULT_COMMAND = "from"


class DefaultCommandGroup(TyperGroup):
    """A group whose first word may be left out: sources follow `collect` at once.

    A source that is called as a subcommand is reached by its path (`./proxy`).
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default command before arguments that name no other one."""
        if not args or args[0] not in self.commands:
            args = [DEFAULT_COMMAND, *args]
        return super().parse_args(ctx, args)


collect_app = typer.Typer(cls=DefaultCommandGroup)
app.add_typer(
    collect_app,
    name="collect",
    help="Collect queries from logs, files and data sets, or by recording them.",
)


@collect_app.command(DEFAULT_COMMAND)
@exit_statuses()
def collect(
    sources: Annotated[list[str], typer.Argument(help="files, folders or names of data sets")],
    out: Annotated[Path, typer.Option(help="folder for the queries")],
) -> None:
    """Collect queries into a folder; `specdec collect proxy` records them."""
    raise RuntimeError(f"collecting {sources} into {out} is not written yet")
