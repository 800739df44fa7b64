"""What a trained draft model remembers of its training, beside its weights."""

import json
from pathlib import Path
from typing import Any

from specdec.files import replace_file


def write_training(folder: Path, training: dict[str, Any]) -> None:
    """Write `training.json`."""
    text = json.dumps(training, indent=1, allow_nan=False) + "\n"
    replace_file(folder / "training.json", text.encode())
