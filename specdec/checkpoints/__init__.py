"""Checkpoints of draft heads, in the layouts of the field and in our own words."""

from specdec.checkpoints.head import KINDS, HeadCheckpoint, TargetIdentity, resolved_options
from specdec.checkpoints.identity import check_target, identify_target
from specdec.checkpoints.layouts import LAYOUTS, read_head, write_head

__all__ = [
    "KINDS",
    "LAYOUTS",
    "HeadCheckpoint",
    "TargetIdentity",
    "check_target",
    "identify_target",
    "read_head",
    "resolved_options",
    "write_head",
]
