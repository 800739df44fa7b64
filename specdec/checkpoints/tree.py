"""The static tree that a head may bring along."""

from typing import Any

from specdec.verify.tree import from_choices


def check_tree(tree: Any, where: str) -> None:
    """Refuse what is no tree.

    Args:
        tree: one list of ranks for each node, or None.
        where: the file, for messages.

    Raises:
        ValueError: it is no list of such lists, or a node is there twice or without its parent.
    """
    if tree is None:
        return
    is_list = isinstance(tree, list) and all(isinstance(node, list) for node in tree)
    if not is_list or not all(type(rank) is int for node in tree for rank in node):
        raise ValueError(
            f"{where!r}: the tree is {str(tree)[:60]} but must be a list with one list of ranks "
            "for each node, as [[0], [1], [0, 0]]"
        )
    try:
        from_choices(tree)
    except ValueError as error:
        raise ValueError(f"{where!r}: no tree ({error})") from error
