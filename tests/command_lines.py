"""Command lines in documents, read as the program reads them."""

import json
import shlex
from pathlib import Path

import typer

from specdec.bench.config import load_cells
from specdec.cli import app
from specdec.drafters.options import describe_options
from specdec.train.config import load_train_config

ROOT = Path(__file__).parents[1]


def commands(text):
    """Lines that are commands, as words behind `specdec`; a backslash or an open quote goes on."""
    found, lines = [], iter(text.replace("\\\n", " ").splitlines())
    for line in lines:
        if line.lstrip().startswith("specdec "):
            while (words := split(line)) is None:
                line += "\n" + next(lines)
            found.append(words[1:])
    return found


def split(line):
    """Words as a shell splits them; None where a quote is open."""
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return None


def parse(words):
    """Read a command line as the program does, and its configuration, but run nothing."""
    command = typer.main.get_command(app)
    context = command.make_context("specdec", list(words))
    while hasattr(command, "commands"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    given = context.params
    if name == "train":
        load_train_config(str(ROOT / given["config"]), given["overrides"] or [])
    if name in ("bench", "analyze", "plan") and not given.get("roofline"):
        load_cells(given["config"], given["overrides"] or [])
    if str(given.get("drafter")).startswith("{"):
        options = json.loads(given["drafter"])
        known = [option.name for option in describe_options(options.pop("type"))]
        assert set(options) <= set(known), f"{given['drafter']}: {known}"
    return name
