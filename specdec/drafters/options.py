"""The options of draft strategies, read from their classes: type, default and meaning."""

import inspect
import re
from typing import Any, NamedTuple

from specdec.drafters.tree_growth import TreeShape
from specdec.registry import strategy

_SECTION = re.compile(r"^(?:Args|Attributes):\n((?: {4}.*\n?|\n)+)", re.M)
_ENTRY = re.compile(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", re.M)


class Option(NamedTuple):
    """One option of a strategy; the meaning is empty where no docstring tells it."""

    name: str
    type: str
    default: str  # as Python writes it; empty where the option must be given
    meaning: str


def describe_options(kind: str) -> list[Option]:
    """Describe what `load_drafter` takes for a strategy.

    Meanings come from `load` and its class, and from `TreeShape` where `load` refers to it.
    """
    drafter_class: Any = strategy(kind)
    build = getattr(drafter_class, "load", drafter_class)
    loads = [base.load for base in reversed(drafter_class.__mro__) if hasattr(base, "load")]
    sources = [drafter_class, drafter_class.__init__, *loads]
    if "`TreeShape`" in (build.__doc__ or ""):
        sources.insert(0, TreeShape)
    said = {name: text for each in sources for name, text in _arguments(each).items()}
    return [
        Option(name, _type_name(each), _default(each), said.get(name, ""))
        for name, each in inspect.signature(build).parameters.items()
        if name != "target"
    ]


def _arguments(documented: Any) -> dict[str, str]:
    """The entries of a docstring's sections, each on one line."""
    sections = _SECTION.findall(inspect.getdoc(documented) or "")
    entries = [entry for section in sections for entry in _ENTRY.findall(section)]
    return {name: " ".join(text.split()) for name, text in entries}


def _type_name(parameter: inspect.Parameter) -> str:
    if parameter.annotation is parameter.empty:
        return ""
    return re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", inspect.formatannotation(parameter.annotation))


def _default(parameter: inspect.Parameter) -> str:
    return "" if parameter.default is parameter.empty else repr(parameter.default)
