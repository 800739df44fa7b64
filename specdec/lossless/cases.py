"""Drafters to check, and the tiny checkpoints that they are loaded with."""

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specdec.common.arguments import merged
from specdec.lossless.models import perturbed, save_tiny_head
from specdec.registry import drafter_options, load_drafter, strategy

SMALL_VOCAB = 5  # of the target whose distributions are enumerated


@dataclass(frozen=True)
class Case:
    """A drafter to check.

    Attributes:
        options: of `load_drafter`; tiny random checkpoints stand for paths that are left out.
        forget: options that keep past outputs from changing later drafts.
        promises: what must be seen and not just may: that something is "accepted", also under the
            rule "match" ("matched"), that drafts are three levels "deep", and that those of a row
            are "alone", whatever rows are beside it.
    """

    options: Mapping[str, Any]
    forget: Mapping[str, Any] = field(default_factory=dict)
    promises: Collection[str] = ()

    def require(self, promise: str, is_kept: bool, otherwise: str) -> None:
        """Fail where a promise is not kept; without a promise the check showed nothing."""
        if not is_kept:
            import pytest  # an extra of the package

            (pytest.fail if promise in self.promises else pytest.skip)(otherwise)

    def build(self, target: Any, folder: Path, options: Mapping[str, Any] | None = None) -> Any:
        return load_drafter(_with_paths(options or self.options, target, folder), target)


def case_of(text: str) -> Case:
    """The case of a type, or of JSON with options."""
    return Case(drafter_options(text))


def _with_paths(options: Mapping[str, Any], target: Any, folder: Path) -> dict[str, Any]:
    options = {"type": options} if isinstance(options, str) else merged(options)
    kind = options.get("type")
    drafter = strategy(kind, typed=True)
    parameters = inspect.signature(getattr(drafter, "load", drafter)).parameters
    if "path" in parameters and "path" not in options:
        options["path"] = str(folder / str(kind))
        if (folder / str(kind)).exists():
            pass
        elif drafter.head_class:
            save_tiny_head(options["path"], str(kind), target)
        else:
            amount = 0.3 if target.vocab_size == SMALL_VOCAB else 0.15
            perturbed(target.model, amount).save_pretrained(options["path"])
    if "drafters" in options:
        options["drafters"] = [_with_paths(each, target, folder) for each in options["drafters"]]
    return options
