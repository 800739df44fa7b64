"""A report as one HTML page and as Markdown."""

import re
from base64 import b64encode
from functools import cache
from importlib.resources import files

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from specdec.report.document import Context, Report, Section
from specdec.report.tables import Table


@cache
def definitions() -> dict[str, tuple[str, str]]:
    """Read the terms that a report defines: key -> (name, meaning)."""
    text = files("specdec.report").joinpath("templates/definitions.yaml").read_text()
    return {key: (name, meaning) for key, (name, meaning) in yaml.safe_load(text).items()}


def html_page(report: Report) -> str:
    """Write the page, with its pictures inside."""
    environment = Environment(
        loader=PackageLoader("specdec.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = lambda png: f"data:image/png;base64,{b64encode(png).decode()}"
    template = environment.get_template("page.html.jinja")
    return template.render(report=report, definitions=definitions())


def markdown(report: Report) -> str:
    """Write the text; pictures are files beside it."""
    parts = [f"# {escape(report.title)}"]
    parts += [f"> **Note:** {escape(warning)}" for warning in report.warnings]
    parts += [_section(section) for section in report.sections]
    lines = [
        f'- <a id="def-{term}"></a>**{escape(name)}**: {escape(meaning)}'
        for term, (name, meaning) in definitions().items()
    ]
    parts.append("## Definitions\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Make text that Markdown shows as it is: no tag, emphasis or end of a cell, one line."""
    text = text.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([|*_`~\[\]#])", r"\\\1", text).replace("\n", " ")


def _section(section: Section) -> str:
    parts = [f"## {escape(section.title)}", *map(escape, section.text)]
    for figure in section.figures:
        parts.append(f"![{escape(figure.alt)}]({figure.file})\n\n{escape(figure.caption)}")
    parts += [f"**{escape(t.caption)}**\n\n{markdown_table(t)}" for t in section.tables]
    parts += [_context(context) for context in section.contexts]
    parts += [escape(reason) for reason in section.missing]
    return "\n\n".join(parts)


def markdown_table(table: Table) -> str:
    """Write the columns and rows of a table."""
    headings = [
        f"[{escape(column.heading)}](#def-{column.term})" if column.term else escape(column.heading)
        for column in table.columns
    ]
    rules = ["---" if column.digits is None else "---:" for column in table.columns]
    rows = [[escape(cell) for cell in row] for row in table.cells()]
    return "\n".join("| " + " | ".join(row) + " |" for row in (headings, rules, *rows))


def _context(context: Context) -> str:
    drafted = f"<del>{escape(context.rejected)}</del>"
    return (
        f"{escape(context.drafter)}, {escape(context.where)}\n\n"
        f"> {escape(context.before)}{drafted} **{escape(context.target)}**\n\n"
        f"{escape(context.note)}"
    )
