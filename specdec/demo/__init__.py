"""The embedded models, prompts and bench configuration."""

from importlib.resources import files
from pathlib import Path

from specdec.common.distribution import DISTRIBUTION


def demo_path(name: str) -> Path:
    """Path of an embedded file or folder: "target", "draft", "prompts.jsonl", "bench.yaml".

    Raises:
        FileNotFoundError: this installation does not hold it.
    """
    path = Path(str(files(__name__))) / name
    if not path.exists():
        raise FileNotFoundError(
            f"the embedded {name!r} is missing at {path}; reinstall {DISTRIBUTION}, or train the "
            "models with scripts/train_demo.py"
        )
    return path
