"""Parts of the site that are made of the code; mkdocs calls `on_page_markdown` for every page.

A page asks for one by a comment, as in `<!-- commands -->`.
"""

import inspect
import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.main import get_command_name
from typer.models import OptionInfo

from specdec.cli.app import app
from specdec.drafters.options import describe_options
from specdec.registry import DRAFTERS, strategy
from specdec.report.tables import words

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs/first-hour.ipynb"


def is_shown(path: Path) -> bool:
    """Tell if a file of an experiment is on the site: results and configurations are not."""
    return path.name == "README.md" or path.suffix == ".png"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the experiments, which lie beside the documents."""
    for path in sorted(filter(is_shown, (ROOT / "experiments").rglob("*"))):
        name, to = str(path.relative_to(ROOT)), config.site_dir
        files.append(File(name, str(ROOT), to, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Fill in what the page asks for, and link the experiments that it names."""
    if page.file.src_uri.startswith("experiments/"):
        link = partial(link_of_site, Path(page.file.src_uri).parent)
        return re.sub(r"\[([^]]+)\]\(([^)#]+)(#[^)]*)?\)", link, markdown)
    for name in PARTS:
        if (mark := f"<!-- {name} -->") in markdown:
            markdown = markdown.replace(mark, PARTS[name]())
    named = r"`(?:experiments/)?(\d\d-[a-z-]+)`"
    return re.sub(named, r"[`\1`](experiments/\1/README.md)", markdown)


def link_of_site(folder: Path, link: re.Match[str]) -> str:
    """A link between files of the repository as one between pages, or its text alone."""
    text, target, anchor = link.groups()
    found = Path(os.path.normpath(folder / target))
    if found.parts[0] == "docs":
        page = os.path.relpath(found.relative_to("docs"), folder)
        return f"[{text}]({page}{anchor or ''})"
    is_page = "://" in target or (found.parts[0] == "experiments" and is_shown(found))
    return link[0] if is_page else text


def table(heading: str, rows: list[tuple[str, ...]]) -> str:
    """A table of Markdown under headings with commas."""
    lines = [tuple(heading.split(",")), ("---",) * (1 + heading.count(",")), *rows]
    # Code needs no escape, and would show it.
    escaped = [[c if c[:1] == "`" else c.replace("|", r"\|") for c in line] for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped) + "\n"


def option(name: str, kind: str, default: str | None, meaning: str) -> tuple[str, str, str]:
    """A row of a table of options; None is the default of one that is needed."""
    value = f"`{kind} = {default}`" if default else f"`{kind}`"
    return f"`{name}`", value, meaning if default is not None else f"**needed**; {meaning}"


def terms() -> str:
    """The terms that reports define."""
    return table("term,meaning", [tuple(term) for term in words()["terms"].values()])


def commands() -> str:
    """All commands with their options."""
    groups = [("", app), *((f"{g.name} ", g.typer_instance) for g in app.registered_groups)]
    return "\n".join(
        command(f"specdec {prefix}{each.name or get_command_name(each.callback.__name__)}", each)
        for prefix, group in groups
        for each in group.registered_commands
    )


def command(name: str, info: Any) -> str:
    """A command: its line, its purpose, and its options."""
    line, rows = name, []
    for each in inspect.signature(info.callback).parameters.values():
        given, is_needed = each.default, each.default.default is ...
        if isinstance(given, OptionInfo):
            shown = " ".join(given.param_decls or [f"--{each.name.replace('_', '-')}"])
        else:
            shown = each.name.upper() if is_needed else f"[{each.name}]"
            line += f" {shown}"
        kind = re.sub(r"\b(?:\w+\.)+| \| None", "", inspect.formatannotation(each.annotation))
        is_empty = given.default in (None, [])
        default = "" if is_empty else json.dumps(given.default, default=str)
        rows.append(option(shown, kind, None if is_needed else default, given.help or ""))
    heading = f"## {name}\n\n{inspect.getdoc(info.callback)}\n\n    {line} [options]\n"
    return f"{heading}\n{table('option,type,meaning', rows)}"


def drafters() -> str:
    """All strategies with their options."""
    parts = []
    for kind in DRAFTERS:
        said = inspect.getdoc(strategy(kind)).split("\n\n")[0].replace("\n", " ")
        rows = [
            option(o.name, o.type, o.default or None, o.meaning) for o in describe_options(kind)
        ]
        parts.append(f"## {kind}\n\n{said}\n\n{table('option,type,meaning', rows)}")
    return "\n".join(parts)


def notebook() -> str:
    """The cells of the notebook."""
    texts = []
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        text = "".join(cell["source"])
        texts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(texts)


PARTS = {each.__name__: each for each in (terms, commands, drafters, notebook)}
