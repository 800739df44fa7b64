"""A report as one HTML page that needs nothing else: no network, no script, no other file."""

from base64 import b64encode

from jinja2 import Environment, PackageLoader, StrictUndefined

from specdec.report.blocks import Figure
from specdec.report.definitions import DEFINITIONS
from specdec.report.document import Document


def html_page(document: Document) -> str:
    """The page, with its pictures inside."""
    environment = Environment(
        loader=PackageLoader("specdec.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    template = environment.get_template("page.html.jinja")
    return template.render(document=document, definitions=DEFINITIONS)


def _data_uri(figure: Figure) -> str:
    return f"data:image/png;base64,{b64encode(figure.png).decode()}"
