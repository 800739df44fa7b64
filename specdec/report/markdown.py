"""A report as Markdown, with its pictures beside it."""

import re

from specdec.report.blocks import Context, Section, Table
from specdec.report.definitions import DEFINITIONS
from specdec.report.document import Document


def markdown(document: Document) -> str:
    """The text; pictures are files named after their id."""
    parts = [f"# {escape(document.title)}"]
    parts += [f"> **Note:** {escape(warning)}" for warning in document.warnings]
    parts += [_section(section) for section in document.sections]
    lines = [
        f'- <a id="def-{term}"></a>**{escape(name)}**: {escape(meaning)}'
        for term, (name, meaning) in DEFINITIONS.items()
    ]
    parts.append("## Definitions\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Text that Markdown shows as it is: no tag, no emphasis, no end of a cell, one line."""
    text = text.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([|*_`~\[\]#])", r"\\\1", text).replace("\n", " ")


def _section(section: Section) -> str:
    parts = [f"## {escape(section.title)}", *map(escape, section.text)]
    for figure in section.figures:
        parts.append(f"![{escape(figure.alt)}]({figure.id}.png)\n\n{escape(figure.caption)}")
    parts += [_table(table) for table in section.tables]
    parts += [_context(context) for context in section.contexts]
    parts += [escape(reason) for reason in section.missing]
    return "\n\n".join(parts)


def _table(table: Table) -> str:
    headings = [
        f"[{escape(c.title)}](#def-{c.term})" if c.term else escape(c.title) for c in table.columns
    ]
    rules = ["---" if column.digits is None else "---:" for column in table.columns]
    rows = [[escape(cell) for cell in row] for row in table.cells()]
    lines = ["| " + " | ".join(row) + " |" for row in (headings, rules, *rows)]
    return f"**{escape(table.caption)}**\n\n" + "\n".join(lines)


def _context(context: Context) -> str:
    drafted = f"<del>{escape(context.rejected)}</del>"
    return (
        f"{escape(context.drafter)}, {escape(context.where)}\n\n"
        f"> {escape(context.before)}{drafted} **{escape(context.target)}**\n\n"
        f"{escape(context.note)}"
    )
