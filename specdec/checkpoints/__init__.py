"""Checkpoints of draft heads, in the layouts of the field and in our own."""

from specdec.checkpoints.head import HeadCheckpoint, TargetIdentity, head_of
from specdec.checkpoints.identity import check_target, identify_target
from specdec.checkpoints.layouts import LAYOUTS, read_head, write_head

__all__ = [
    "LAYOUTS",
    "HeadCheckpoint",
    "TargetIdentity",
    "check_target",
    "head_of",
    "identify_target",
    "read_head",
    "write_head",
]
