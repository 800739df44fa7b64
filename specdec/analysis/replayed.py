"""What a replay shows beside its steps."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from specdec.analysis.calibration import reliability
from specdec.analysis.first_tokens import FirstTokens
from specdec.verify import Draft, Verdict


@dataclass
class ReplayNotes:
    """Takes notes of every step; `note` is what `replay` calls."""

    text: list[int] = field(default_factory=list)
    step: list[int] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    taken: list[bool] = field(default_factory=list)

    def note(self, text: int, num_done: int, draft: Draft, verdict: Verdict) -> None:
        """One step; a step without a draft accepts nothing."""
        self.text.append(text)
        self.step.append(num_done - 1)
        self.accepted.append(bool(verdict.num_accepted[0] > 0))
        if draft.confidence is not None and draft.num_nodes:
            self._note_confidence(draft, draft.confidence, verdict)

    def _note_confidence(self, draft: Draft, confidence: Tensor, verdict: Verdict) -> None:
        path = set(verdict.path[0].tolist())
        parents = draft.explicit_parents()[0].tolist()
        whole = confidence[0].tolist()
        for node in range(int(draft.lengths[0])):
            parent = parents[node]
            above = whole[parent] if parent >= 0 else 1.0
            # Judged or not: had the step come this far, this child would be the text's or not.
            if (parent < 0 or parent in path) and above > 0:
                self.confidence.append(min(1.0, whole[node] / above))
                self.taken.append(node in path)

    def first_tokens(self) -> FirstTokens:
        """The places where steps started."""
        accepted = np.array(self.accepted, dtype=np.float64)
        steps = np.array(self.step, dtype=np.int64)
        return FirstTokens(np.array(self.text, dtype=np.int64), steps, accepted, None)

    def calibration(self) -> dict[str, Any] | None:
        """Of the conditional confidence of all nodes whose parent was taken; None without any."""
        return reliability(np.array(self.confidence), np.array(self.taken, dtype=bool))
