"""Speculative decoding for research: one proven verifier, one batched loop, honest numbers."""

from importlib import import_module
from typing import Any

# Resolved on first use, so that `import specdec` stays as light as torch.
_PUBLIC = {
    "AcceptanceStats": "specdec.engine.metrics",
    "BaseDrafter": "specdec.drafters.base",
    "Chunk": "specdec.engine.engine",
    "Draft": "specdec.verify",
    "Drafter": "specdec.engine.interfaces",
    "Engine": "specdec.engine.engine",
    "OnlineController": "specdec.engine.draft_length",
    "Result": "specdec.engine.request",
    "SamplingConfig": "specdec.sampling.config",
    "Schedule": "specdec.engine.draft_length",
    "StepRecord": "specdec.engine.metrics",
    "Target": "specdec.engine.interfaces",
    "TargetOutput": "specdec.engine.interfaces",
    "Verdict": "specdec.verify",
    "generate": "specdec.engine.decode",
    "generate_baseline": "specdec.engine.decode",
    "load_drafter": "specdec.registry",
    "load_target": "specdec.targets.load",
    "match": "specdec.verify",
    "stream": "specdec.engine.decode",
    "verify": "specdec.verify",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("specdec.common.distribution").installed_version()
    if name not in _PUBLIC:
        raise AttributeError(f"module 'specdec' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
