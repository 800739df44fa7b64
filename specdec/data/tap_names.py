"""Which hidden states a store is to hold, by the names of the heads that read them."""

from collections.abc import Callable

from specdec.drafters.eagle3 import default_taps

TAP_CONVENTION = "index into Hugging Face hidden_states: 0 embeddings, L after the final norm"

_READ_BY: dict[str, Callable[[int], tuple[int, ...]]] = {
    "eagle3": default_taps,
    "eagle": lambda num_layers: (num_layers,),
    "medusa": lambda num_layers: (num_layers,),
    "none": lambda num_layers: (),
}
TAP_NAMES = tuple(_READ_BY)


def resolve_taps(names: str, num_layers: int) -> tuple[int, ...]:
    """Taps, ascending, of names and numbers.

    Args:
        names: separated by commas: "eagle3", "eagle" and "medusa" stand for the taps that a new
            head of the kind reads, "none" for no taps.
        num_layers: L of the target.

    Raises:
        ValueError: neither a name nor a tap of this target.
    """
    taps: set[int] = set()
    for name in (part.strip() for part in names.split(",")):
        if name in _READ_BY:
            taps.update(_READ_BY[name](num_layers))
        elif name.isascii() and name.isdigit() and int(name) <= num_layers:
            taps.add(int(name))
        else:
            raise ValueError(
                f"tap {name!r} does not exist; give {', '.join(TAP_NAMES)} or a number from 0 "
                f"(the embeddings) to {num_layers} (after the target's final norm)"
            )
    return tuple(sorted(taps))
