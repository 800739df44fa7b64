"""What was measured, in one line."""

from pathlib import Path
from typing import Any


def results_title(results: dict[str, Any]) -> str:
    """Model, machine and settings; paths are cut to their last part."""
    where = results["provenance"]
    config = where["config"]
    return (
        f"{_name(config['target']['path'])} on {where['device']}, {where['dtype']}, batch "
        f"{config['batch_size']}, T = {config['sampling']['temperature']:g}, "
        f"{results['arms'][0]['prompts']} {_name(config['prompts']['source'])} prompts"
    )


def _name(path: str) -> str:
    return Path(path).name if path.count("/") != 1 or path[0] in "./~" else path
