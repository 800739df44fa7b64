"""Draft strategies: ours by name, installed ones by an entry point, any by `pkg.module:Class`."""

import inspect
import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from operator import attrgetter
from typing import Any

from specdec.common.arguments import fit, merged, nearest
from specdec.common.files import parse_json
from specdec.engine.interfaces import Drafter, Target

DRAFTERS = {
    "dflash": "specdec.drafters.dflash:DFlashDrafter",
    "draft_model": "specdec.drafters.draft_model:DraftModel",
    "eagle": "specdec.drafters.eagle:EagleDrafter",
    "eagle3": "specdec.drafters.eagle3:Eagle3Drafter",
    "hybrid": "specdec.drafters.hybrid:HybridDrafter",
    "medusa": "specdec.drafters.medusa:MedusaDrafter",
    "mixture_of_attentions": "specdec.drafters.mixture_of_attentions:MixtureDrafter",
    "mtp": "specdec.drafters.mtp:MtpDrafter",
    "ngram": "specdec.drafters.ngram:NgramDrafter",
    "peagle": "specdec.drafters.peagle:PeagleDrafter",
    "suffix": "specdec.drafters.suffix:SuffixDrafter",
}
GROUP = "specdec.drafters"  # of entry points, whose names are strategies like those above
_ADDRESS = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


@cache
def _installed() -> dict[str, str]:
    return {each.name: f"{each.module}:{each.attr}" for each in entry_points(group=GROUP)}


def addresses() -> dict[str, str]:
    """Name to `pkg.module:Class`; no installed package replaces a strategy of ours."""
    return {**_installed(), **DRAFTERS}


def closest(name: str, known: Mapping[str, Any] | list[str]) -> str:
    """The end of an error message: the nearest known name, and all of them."""
    near = nearest(name, known)
    hint = f"; did you mean {near!r}?" if near else ""
    return f"known: {', '.join(sorted(known)) or 'none'}{hint}"


def is_kind(kind: str) -> bool:
    """Say if a text is a strategy's name, or written like the address of a class."""
    return kind in addresses() or bool(_ADDRESS.fullmatch(kind))


def strategy(kind: Any, *, typed: bool = False) -> Any:
    """The class of a strategy, a `specdec.drafters.base.BaseDrafter`.

    Code of a class that is not installed as a drafter runs where the user `typed` its address, in a
    command, a configuration or a call: a file that names it cannot make it run.
    """
    known, told = addresses(), f"drafter type is {kind!r}"
    where = known.get(kind, kind) if isinstance(kind, str) else ""
    if not _ADDRESS.fullmatch(where):
        hint = closest(str(kind), known)
        raise ValueError(f"{told} but must be registered, or pkg.module:Class; {hint}")
    module, _, name = where.partition(":")
    if where not in known.values():
        if not typed and module not in sys.modules:
            typed_now = f'\'{{"type": "{kind}", "path": ...}}\''
            raise ValueError(
                f"{told}, which a file names, and its code is not run for that; give the type as "
                f"well, {typed_now}, or install it with an entry point in the group {GROUP}"
            )
        if typed and not {"", os.getcwd()} & {*sys.path}:
            sys.path.insert(0, os.getcwd())  # an installed command does not look there
    try:
        loaded = import_module(module)
    except ImportError as error:
        is_absent = f"{module}.".startswith(f"{error.name}.")
        fix = "start in its folder, or install it" if is_absent else "repair that module"
        raise ValueError(f"{told} but must be importable ({error}); {fix}") from error
    try:
        found = attrgetter(name)(loaded)
    except AttributeError as error:
        names = [key for key, value in vars(loaded).items() if _is_drafter(value)]
        raise ValueError(f"{told} but {module} has no {name}; {closest(name, names)}") from error
    if not _is_drafter(found):
        rule = "a class with `propose`, derived from specdec.BaseDrafter"
        raise ValueError(f"{told} but must be {rule}")
    return found


def _is_drafter(found: Any) -> bool:
    needed = ("propose", "shape_options", "head_class", "trained_as")  # as BaseDrafter has them
    return isinstance(found, type) and all(hasattr(found, name) for name in needed)


def trainable_kinds() -> tuple[str, ...]:
    """Names of strategies that `specdec train` trains."""
    return _names_with("trained_as")


def head_kinds() -> tuple[str, ...]:
    """Names of strategies with a draft head."""
    return _names_with("head_class")


def _names_with(fact: str) -> tuple[str, ...]:
    found = []
    for kind in addresses():
        with suppress(ValueError):  # an installed one that is broken says so where it is used
            found += [kind] if getattr(strategy(kind), fact) else []
    return tuple(found)


def head_class(kind: Any) -> Any:
    """The `specdec.drafters.heads.Head` of a strategy that a checkpoint names."""
    found = strategy(kind).head_class if is_kind(kind) else None
    if found is None:
        known = ", ".join(head_kinds())
        raise ValueError(f"head kind is {kind!r} but must be one of {known}, or installed")
    return found


def is_registered(drafter: Any) -> bool:
    """Say if a drafter is of a class of ours, and so are those inside of it: they are trusted."""
    name = f"{type(drafter).__module__}:{type(drafter).__qualname__}"
    return name in DRAFTERS.values() and all(map(is_registered, getattr(drafter, "drafters", ())))


def drafter_options(text: str) -> dict[str, Any]:
    """Read a drafter as a command is given it: a type, or a JSON object with options."""
    try:
        return merged(parse_json(text)) if text.startswith("{") else {"type": text}
    except ValueError as error:
        raise ValueError(
            f"drafter is {text!r} but must be a name or a JSON object ({error})"
        ) from error


def load_target(path: str) -> Target:
    """Load the target that a name or a path stands for, with the default options."""
    return import_module("specdec.targets.load").load_target(path)


def load_drafter(options: Mapping[str, Any] | str, target: Target | None) -> Drafter:
    """Build a drafter for a target.

    Args:
        options: `{"type": name, **options of that strategy}`, `{"type": name, "options": {...}}` or
            just the name; the name may be `pkg.module:Class`. A folder or hub id of a trained
            drafter will do as well. A class that has a `load` classmethod is given the target as
            well. An option "drafters" holds a list of such options, one for each drafter inside.
        target: the model that will verify; None if the drafter's `needs_target` is False (`ngram`,
            `suffix`, and a `hybrid` of them).

    Raises:
        ValueError: no such strategy, or an option that it does not have, needs, or cannot use.
    """
    if not isinstance(options, str | Mapping):
        raise ValueError(f"drafter is {options!r:.80} but must be a name, or a mapping with a type")
    if isinstance(options, str):
        is_path = "/" in options or os.path.isdir(options) or options.startswith("hub:")
        find = import_module("specdec.checkpoints.find").find_drafter if is_path else None
        options = find(options)[0] if find else {"type": options}
    settings: dict[str, Any] = merged(options)
    if "type" not in settings and (said := next(iter({"method", "kind"} & {*settings}), None)):
        raise ValueError(
            f"drafter has a {said} but no type; did you mean {{type: {settings[said]}}}?"
        )
    name = settings.pop("type", None)
    drafter_class = strategy(name, typed=True)
    build = getattr(drafter_class, "load", drafter_class)
    parameters = inspect.signature(build).parameters
    accepted = [p for p in parameters if p != "target"]
    for option, value in settings.items():
        if option not in accepted:
            raise ValueError(
                f"drafter {name!r} has no option {option!r}; {closest(str(option), accepted)}"
            )
        try:
            settings[option] = fit(option, value, parameters[option].annotation)
        except ValueError as error:
            raise ValueError(f"drafter {name!r}: {error}; {_given(settings)}") from error
    for option in accepted:
        if option not in settings and parameters[option].default is inspect.Parameter.empty:
            raise ValueError(f"drafter {name!r} needs the option {option!r}; {_given(settings)}")
    if "drafters" in settings:
        if not isinstance(settings["drafters"], list | tuple):
            raise ValueError(f"drafters is {settings['drafters']!r:.80} but must be a list")
        settings["drafters"] = [load_drafter(inner, target) for inner in settings["drafters"]]
    if hasattr(drafter_class, "load"):
        if not hasattr(target, "vocab_size"):
            raise TypeError(
                f"target is {target!r:.80} but must be what the drafter is to draft for"
            )
        settings["target"] = target
    try:
        drafter: Drafter = build(**settings)
    except TypeError as error:
        settings.pop("target", None)
        raise ValueError(
            f"drafter {name!r} cannot use its options ({error}); {_given(settings)}"
        ) from error
    if target is None and getattr(drafter, "needs_target", True):
        raise ValueError(f"target is None but drafter {name!r} needs one (`needs_target`)")
    return drafter


def _given(settings: Mapping[str, Any]) -> str:
    return "given: " + (", ".join(f"{k}={v!r}" for k, v in settings.items()) or "nothing")
