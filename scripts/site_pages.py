"""Parts of the site that are made of the code; mkdocs calls `on_page_markdown` for every page.

A page asks for one by a comment, as in `<!-- commands -->`.
"""

import inspect
import json
import re
from pathlib import Path

from typer.main import get_command_name
from typer.models import OptionInfo

from specdec.cli.app import app
from specdec.drafters.options import describe_options
from specdec.registry import DRAFTERS, strategy
from specdec.report.tables import words

NOTEBOOK = Path(__file__).parents[1] / "docs/first-hour.ipynb"


def on_page_markdown(markdown: str, **_: object) -> str:
    """Fill in what the page asks for."""
    for name in PARTS:
        if (mark := f"<!-- {name} -->") in markdown:
            markdown = markdown.replace(mark, PARTS[name]())
    return markdown


def table(heading: str, rows: list[tuple[str, ...]]) -> str:
    """A table of Markdown under headings with commas."""
    lines = [tuple(heading.split(",")), ("---",) * (1 + heading.count(",")), *rows]
    escaped = [[re.sub(r"(?<!\\)\|", r"\|", cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped) + "\n"


def code(text: str) -> str:
    """Text as code; nothing for none."""
    return f"`{text}`" if text else ""


def terms() -> str:
    """The terms that reports define."""
    return table("term,meaning", [tuple(term) for term in words()["terms"].values()])


def commands() -> str:
    """All commands with their options."""
    groups = [
        ("", app),
        *((f"{group.name} ", group.typer_instance) for group in app.registered_groups),
    ]
    return "\n".join(
        command(f"specdec {prefix}{each.name or get_command_name(each.callback.__name__)}", each)
        for prefix, group in groups
        for each in group.registered_commands
    )


def command(name: str, info: object) -> str:
    """A command: its line, what it does, and its options."""
    arguments, rows = [], []
    for each in inspect.signature(info.callback).parameters.values():
        given, kind = each.default, inspect.formatannotation(each.annotation)
        is_needed = given.default is ...
        default = (
            ""
            if is_needed or given.default in (None, [])
            else json.dumps(given.default, default=str)
        )
        shown = each.name.upper() if is_needed else f"[{each.name}]"
        if isinstance(given, OptionInfo):
            shown = " ".join(given.param_decls or [f"--{each.name.replace('_', '-')}"])
        else:
            arguments.append(shown)
        kind = re.sub(r"\b(?:\w+\.)+|list\[|\]| \| None", "", kind)
        meaning = f"{'**needed**; ' if is_needed else ''}{given.help or ''}"
        rows.append((code(shown), kind, code(default), meaning))
    line = " ".join([name, *arguments])
    heading = f"## {name}\n\n{inspect.getdoc(info.callback)}\n\n    {line} [options]\n"
    return f"{heading}\n{table('option,type,default,meaning', rows)}"


def drafters() -> str:
    """All strategies with their options."""
    parts = []
    for kind in DRAFTERS:
        found, title = strategy(kind), strategy(kind).title or kind
        said = inspect.getdoc(found).split("\n\n")[0].replace("\n", " ")
        rows = [
            (code(o.name), code(o.type), code(o.default) or "**needed**", o.meaning)
            for o in describe_options(kind)
        ]
        parts.append(
            f"## {kind}\n\n{title}. {said}\n\n{table('option,type,default,meaning', rows)}"
        )
    return "\n".join(parts)


def notebook() -> str:
    """The cells of the notebook."""
    cells = [
        (cell["cell_type"], "".join(cell["source"]))
        for cell in json.loads(NOTEBOOK.read_text())["cells"]
    ]
    return "\n\n".join(
        text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in cells
    )


PARTS = {each.__name__: each for each in (terms, commands, drafters, notebook)}
