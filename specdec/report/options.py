"""The options of a drafter with its defaults filled in: two ways to say the same are one."""

import inspect
import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from specdec.registry import DRAFTERS


def with_defaults(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a registered strategy; of an unknown one what was given."""
    found = {**_defaults(kind), **options}
    given = found.get("drafters", ())
    inner = [{"type": each} if isinstance(each, str) else each for each in given]
    if inner:
        found["drafters"] = [
            {"type": each["type"], **with_defaults(each["type"], each)} for each in inner
        ]
    return found


def same_key(kind: str, options: Mapping[str, Any]) -> str:
    """A text that two arms share when they are the same strategy."""
    return json.dumps([kind, with_defaults(kind, options)], sort_keys=True, default=str)


def _defaults(kind: str) -> dict[str, Any]:
    if kind not in DRAFTERS:
        return {}
    module, name = DRAFTERS[kind].split(":")
    drafter = getattr(import_module(module), name)
    parameters = inspect.signature(getattr(drafter, "load", drafter)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
