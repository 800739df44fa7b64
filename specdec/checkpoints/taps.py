"""Taps as the engines count layers; our own count is that of HF `hidden_states`.

vLLM counts as we do, SGLang one less (the layer whose output it is), and both capture a layer
once, in ascending order, and before the target's final norm.
"""

from typing import Any

from specdec.checkpoints.config_fields import section
from specdec.checkpoints.head import TargetIdentity

IDS = "eagle_aux_hidden_state_layer_ids"


def taps_of(config: dict[str, Any], where: str) -> list[int] | None:
    """Taps that a config names: vLLM's key at the top, SGLang's inside `eagle_config`.

    Returns:
        None where it names none: the taps that EAGLE-3 was published with are meant.

    Raises:
        ValueError: no list of layers, or the two keys do not mean the same.
    """
    inner = section(config, "eagle_config", where).get(IDS)
    top = _checked(config.get(IDS), where)
    nested = _checked(inner, where)
    shifted = None if nested is None else [layer + 1 for layer in nested]
    if top is not None and shifted is not None and top != shifted:
        raise ValueError(
            f"{where!r} contradicts itself: {IDS} is {top} at the top, where vLLM reads it, and "
            f"{nested} in eagle_config, where SGLang reads it and counts from one less; it must be "
            f"{[tap - 1 for tap in top]} there, or be deleted"
        )
    return shifted if top is None else top


def _checked(layers: Any, where: str) -> list[int] | None:
    if layers is None:
        return None
    if not isinstance(layers, list) or not all(type(each) is int for each in layers) or not layers:
        raise ValueError(f"{where!r}: {IDS} is {layers!r} but must be a list of layers")
    return list(layers)


def check_taps(taps: list[int], target: TargetIdentity | None, layout: str) -> None:
    """Refuse taps that the engines cannot capture.

    Raises:
        ValueError: a layer twice, out of order, or the state behind the target's final norm.
    """
    if sorted(set(taps)) != list(taps):
        raise ValueError(
            f"the layout {layout!r} cannot hold the taps {taps}: engines capture a layer once and "
            "in ascending order; train a head on distinct layers"
        )
    num_layers = target.num_layers if target else None
    if num_layers is not None and taps[-1] >= num_layers:
        raise ValueError(
            f"the layout {layout!r} cannot hold the tap {taps[-1]} of a target with {num_layers} "
            "layers: engines capture before the final norm, hidden_states[-1] is behind it; train "
            f"a head on layers up to {num_layers - 1}"
        )


def are_published(taps: list[int], target: TargetIdentity | None) -> bool:
    """Whether these are the taps that every engine takes when a config names none."""
    num_layers = target.num_layers if target else None
    return num_layers is not None and taps == [2, num_layers // 2, num_layers - 3]
