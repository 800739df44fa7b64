"""The embedded models, prompts and bench configuration."""

from importlib.resources import files
from pathlib import Path

from specdec.common.distribution import DISTRIBUTION

MODELS = ("dflash", "draft", "eagle", "eagle3", "medusa", "mtp", "target")


def demo_path(name: str) -> Path:
    """Path of an embedded file or folder: "target", "draft", "prompts.jsonl", "bench.yaml".

    Raises:
        FileNotFoundError: there is none of that name, or this installation does not hold it.
    """
    path = Path(str(files(__name__))) / name
    if not path.exists():
        fix = f"reinstall {DISTRIBUTION}, or train the models with scripts/train_demo.py"
        if "." not in name and name not in MODELS:
            fix = f"embedded are {', '.join(MODELS)}; give a folder or hub id for others"
        raise FileNotFoundError(f"the embedded {name!r} is missing at {path}; {fix}")
    return path


def unpacked(path: str) -> str:
    """The folder that "demo/NAME" stands for, and any other path as it is."""
    name = path.removeprefix("demo/")
    return str(demo_path(name)) if name != path and not Path(path).exists() else path
