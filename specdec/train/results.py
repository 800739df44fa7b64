"""The content of `results.json`, which every reader of a training run goes by."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from specdec.checkpoints import TargetIdentity
from specdec.common.config import Config
from specdec.common.provenance import MachineProvenance
from specdec.train.config import Count, TrainConfig

Whole = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Tau = Annotated[float, Field(ge=1)]
ByDepth = list[Share | None]  # of the chains that got so far; None where none did
Alpha = dict[Literal["0", "1"], Share]  # temperature -> share of single drafted tokens accepted


class Acceptance(Config):
    """Offline acceptance on held-out rows; docs/training.md defines it.

    Attributes:
        tau: expected tokens a target forward of a greedy chain.
        acceptance: share of tested chains that match, per depth.
    """

    tau: Tau
    acceptance: ByDepth
    alpha: Alpha | None


class DomainAcceptance(Acceptance):
    """Offline acceptance on the held-out rows of one domain."""

    rows: Count


class Evaluation(Acceptance):
    """Loss and offline acceptance on all held-out rows.

    Attributes:
        validation_loss: mean over the answers' tokens.
        acceptance_by_rank: per depth and rank, how often the target takes the candidate of this
            rank, where it took one of the candidates at every depth above.
        domains: the same by domain, for rows that have one.
    """

    validation_loss: float
    acceptance_by_rank: list[list[Share]]
    domains: dict[str, DomainAcceptance]


class DraftVocabulary(Config):
    """Size of a reduced draft vocabulary, and shares of the answers' tokens that it holds."""

    size: Count
    training_coverage: Share
    validation_coverage: Share | None


class FeatureCheck(Config):
    """A store against what the target gives on a few of its rows.

    Attributes:
        differences: medians over tokens of the relative difference, by tap and of the largest
            logits.
        max_difference: a larger one fails.
    """

    num_rows: Count
    differences: dict[str, Annotated[float, Field(ge=0)]]
    max_difference: float
    passed: bool


class Parity(Config):
    """Decoding with the exported drafter against what the drafter in memory predicts, at T = 0.

    Attributes:
        shape: the drafts, in words.
        predicted_tau: None where every output differs.
        predicted_acceptance: share of the steps that judged a token at a depth and took it.
        relative_difference: |measured / predicted - 1|; more than `max_difference` fails.
        mismatches: prompts whose output is not that of plain decoding; left out of the comparison,
            and a failure in float32.
        features: None where the target ran beside the drafter.
    """

    shape: str
    num_prompts: Count
    max_new_tokens: Count
    predicted_tau: Tau | None
    predicted_tau_ci: tuple[float, float] | None
    predicted_acceptance: ByDepth
    measured_tau: Tau | None
    measured_tau_ci: tuple[float, float] | None
    measured_acceptance: ByDepth
    relative_difference: float | None
    max_difference: float
    mismatches: Whole
    features: FeatureCheck | None = None
    passed: bool


class TrainProvenance(MachineProvenance):
    """The machine and the code when the run was started, and its configuration."""

    config: TrainConfig


class TrainResults(Config):
    """A finished run.

    Attributes:
        target: whose answers were learned.
        drafter: options of `load_drafter` for what was trained.
        rows: trained on.
        dropped_rows: left out because no answer of two tokens fits into `data.max_len`.
        tokens: read in all steps, without padding; `answer_tokens` of them the target wrote.
        seconds: duration of all sessions, evaluation and saving included.
        tokens_per_s: `tokens` over the seconds of the training steps alone.
        parameters: trained weights.
        loss: the newest logged loss.
        before: offline acceptance at step 0; None where nothing was held out.
        parity: None where no gate was run.
    """

    FILE: ClassVar[str] = "results.json"
    schema_: Literal["specdec-train-3"] = Field("specdec-train-3", alias="schema")
    provenance: TrainProvenance
    target: TargetIdentity
    drafter: dict[str, Any]
    steps: Count
    steps_per_epoch: Count
    rows: Count
    validation_rows: Whole
    dropped_rows: Whole
    tokens: Count
    answer_tokens: Count
    seconds: float
    tokens_per_s: float
    num_processes: Count
    parameters: Count
    loss: float
    validation_loss: float | None
    offline_tau: Tau | None
    offline_acceptance: ByDepth | None
    alpha: Alpha | None
    acceptance_by_rank: list[list[Share]] | None
    domains: dict[str, DomainAcceptance] | None
    draft_vocabulary: DraftVocabulary | None
    before: Acceptance | None = None
    parity: Parity | None = None

    def remembered(self) -> dict[str, Any]:
        """Collect what the drafter says of its training, JSON values."""
        keys = ("steps", "tokens", "seconds", "loss", "validation_loss", "offline_tau", "alpha")
        lists = ("offline_acceptance", "acceptance_by_rank", "domains", "draft_vocabulary")
        kept = self.model_dump(mode="json", include={*keys, *lists})
        if self.parity is not None:
            figures = {"shape", "num_prompts", "measured_tau", "measured_tau_ci", "passed"}
            kept["parity"] = self.parity.model_dump(mode="json", include=figures)
        config = self.provenance.config
        return {"data": Path(config.data.path).name, **kept, "loss_options": config.loss}
