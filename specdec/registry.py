"""Draft strategies by name. A new strategy is one file and one line here."""

import difflib
import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from specdec.common.arguments import fit
from specdec.engine.interfaces import Drafter, Target

DRAFTERS = {
    "draft_model": "specdec.drafters.draft_model:DraftModel",
    "eagle": "specdec.drafters.eagle:EagleDrafter",
    "eagle3": "specdec.drafters.eagle3:Eagle3Drafter",
    "hybrid": "specdec.drafters.hybrid:HybridDrafter",
    "medusa": "specdec.drafters.medusa:MedusaDrafter",
    "ngram": "specdec.drafters.ngram:NgramDrafter",
    "suffix": "specdec.drafters.suffix:SuffixDrafter",
}


def closest(name: str, known: Mapping[str, Any] | list[str]) -> str:
    """The end of an error message: the nearest known name, and all of them."""
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"known: {', '.join(sorted(known))}{hint}"


def strategy(kind: Any) -> Any:
    """The registered class of a strategy, a `specdec.drafters.base.BaseDrafter`."""
    if not isinstance(kind, str) or kind not in DRAFTERS:
        raise ValueError(
            f"drafter type is {kind!r} but must be registered; {closest(str(kind), list(DRAFTERS))}"
        )
    module, attribute = DRAFTERS[kind].split(":")
    return getattr(import_module(module), attribute)


def trainable_kinds() -> tuple[str, ...]:
    """Strategies that `specdec train` trains."""
    return tuple(kind for kind in DRAFTERS if strategy(kind).trained_as)


def head_kinds() -> tuple[str, ...]:
    """Strategies with a draft head."""
    return tuple(kind for kind in DRAFTERS if strategy(kind).head_class)


def head_class(kind: Any) -> Any:
    """The `specdec.drafters.heads.Head` of a strategy."""
    found = strategy(kind).head_class if kind in DRAFTERS else None
    if found is None:
        raise ValueError(f"head kind is {kind!r} but must be one of {', '.join(head_kinds())}")
    return found


def is_registered(drafter: Any) -> bool:
    """Say if a drafter is of a registered class, and so are those inside of it."""
    name = f"{type(drafter).__module__}:{type(drafter).__qualname__}"
    return name in DRAFTERS.values() and all(map(is_registered, getattr(drafter, "drafters", ())))


def load_target(path: str) -> Target:
    """Load the target that a name or a path stands for, with the default options."""
    return import_module("specdec.targets.load").load_target(path)


def load_drafter(options: Mapping[str, Any] | str, target: Target | None) -> Drafter:
    """Build a drafter for a target.

    Args:
        options: `{"type": name, **options of that strategy}`, or just the name. A class that
            has a `load` classmethod is given the target as well. An option "drafters" holds a list
            of such options, one for each drafter inside.
        target: the model that will verify; None if the drafter's `needs_target` is False (`ngram`,
            `suffix`, and a `hybrid` of them).

    Raises:
        ValueError: no such strategy, or an option that it does not have, needs, or cannot use.
    """
    if not isinstance(options, str | Mapping):
        raise ValueError(f"drafter is {options!r:.80} but must be a name, or a mapping with a type")
    settings: dict[str, Any] = {"type": options} if isinstance(options, str) else dict(options)
    name = settings.pop("type", None)
    drafter_class = strategy(name)
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
