"""The verifier: which draft tokens a target keeps. Needs nothing but torch.

Another engine imports this package alone; `docs/verify.md` is its manual.
"""

from specdec.verify.draft import Draft, Verdict
from specdec.verify.layouts import (
    from_flat,
    from_retrieve,
    target_from_flat,
    to_flat,
    to_retrieve,
    uniforms_from_flat,
    verdict_to_retrieve,
)
from specdec.verify.path import match
from specdec.verify.rules import RULES, Rule, get_rule, typical, verify
from specdec.verify.tree import (
    Selection,
    StaticTree,
    ancestor_mask,
    ancestors,
    best_first,
    best_static_tree,
    delayed_tree,
    from_choices,
    node_depths,
    node_paths,
    path_tokens,
)

__all__ = [
    "RULES",
    "Draft",
    "Rule",
    "Selection",
    "StaticTree",
    "Verdict",
    "ancestor_mask",
    "ancestors",
    "best_first",
    "best_static_tree",
    "delayed_tree",
    "from_choices",
    "from_flat",
    "from_retrieve",
    "get_rule",
    "match",
    "node_depths",
    "node_paths",
    "path_tokens",
    "target_from_flat",
    "to_flat",
    "to_retrieve",
    "typical",
    "uniforms_from_flat",
    "verdict_to_retrieve",
    "verify",
]
