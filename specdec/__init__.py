"""Speculative decoding for research: one proven verifier, one batched loop, honest numbers."""

from importlib import import_module
from typing import Any

# Resolved on first use, so that `import specdec` stays as light as torch.
_PUBLIC = {
    "AcceptanceStats": "specdec.metrics",
    "Chunk": "specdec.engine",
    "Draft": "specdec.verify",
    "Drafter": "specdec.interfaces",
    "Engine": "specdec.engine",
    "OnlineController": "specdec.draft_length",
    "Result": "specdec.request",
    "SamplingConfig": "specdec.sampling_config",
    "Schedule": "specdec.draft_length",
    "StepRecord": "specdec.metrics",
    "Target": "specdec.interfaces",
    "TargetOutput": "specdec.interfaces",
    "Verdict": "specdec.verify",
    "generate": "specdec.decode",
    "generate_baseline": "specdec.decode",
    "load_drafter": "specdec.registry",
    "load_target": "specdec.targets.load",
    "match": "specdec.verify",
    "stream": "specdec.decode",
    "verify": "specdec.verify",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'specdec' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
