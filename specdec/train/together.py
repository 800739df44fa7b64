"""What one process does for all of them."""

from collections.abc import Callable

from accelerate import PartialState
from accelerate.utils import broadcast_object_list


def in_first_process(act: Callable[[], None]) -> None:
    """Run it in the first process; the others wait, and get the `OSError` that it raises."""
    errors: list[OSError | None] = [None]
    if PartialState().is_main_process:
        try:
            act()
        except OSError as error:
            errors = [error]
    broadcast_object_list(errors)
    if errors[0] is not None:
        raise errors[0]
