"""Drafters to check, and the tiny checkpoints that they are loaded with."""

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
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
        alone: those with which past outputs do not change later drafts, if it has such options: as
            drafts differ, so do the random numbers used.
        narrow: those with trees that a small vocabulary fills, three levels deep within 12 nodes.
        promises: what must be seen and not just may: that something is "accepted", also under the
            rule "match" ("matched"), that drafts are three levels "deep", and that those of a row
            are "alone", whatever rows are beside it.
    """

    options: Mapping[str, Any]
    alone: Mapping[str, Any] | None = None
    narrow: Mapping[str, Any] | None = None
    promises: Collection[str] = ()

    def require(self, promise: str, is_kept: bool, otherwise: str) -> None:
        """Fail where a promise is not kept; without a promise the check showed nothing."""
        if not is_kept:
            import pytest  # an extra of the package

            (pytest.fail if promise in self.promises else pytest.skip)(otherwise)

    def build(self, target: Any, folder: Path, options: Mapping[str, Any] | None = None) -> Any:
        return load_drafter(with_paths(options or self.options, target, folder), target)


def case_of(text: str) -> Case:
    """The case of a type, or of JSON with options."""
    return Case(drafter_options(text))


def with_paths(options: Mapping[str, Any], target: Any, folder: Path) -> dict[str, Any]:
    options = {"type": options} if isinstance(options, str) else merged(options)
    kind = options.get("type")
    drafter = strategy(kind, typed=True)
    parameters = inspect.signature(getattr(drafter, "load", drafter)).parameters
    if "path" in parameters and "path" not in options:
        path = folder / str(kind)
        options["path"] = str(path)
        if drafter.head_class and not path.exists():
            save_tiny_head(path, str(kind), target)
        elif not path.exists():
            amount = 0.3 if target.vocab_size == SMALL_VOCAB else 0.15
            perturbed(target.model, amount).save_pretrained(path)
    if "drafters" in options:
        options["drafters"] = [with_paths(each, target, folder) for each in options["drafters"]]
    return options
