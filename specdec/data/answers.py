"""Answers on the disk: dialogues as token ids, marked where the target wrote them."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator

from specdec.checkpoints import TargetIdentity
from specdec.checkpoints.identity import differences
from specdec.common.config import Config, Count, model_bytes, read_model, validated
from specdec.common.files import parse_json, replace_files
from specdec.common.provenance import CodeProvenance, MachineProvenance
from specdec.sampling.config import SamplingConfig

MANIFEST, FAILED, JOURNAL = "answers.json", "failed.jsonl", "journal.jsonl"


@dataclass(frozen=True)
class AnswerRow:
    """One dialogue as drafters learn from it; `answers` are [start, end) spans of its tokens."""

    tokens: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]
    id: str = ""
    domain: str = ""
    temperature: float | None = None

    @property
    def num_answer_tokens(self) -> int:
        return sum(end - start for start, end in self.answers)

    def cut(self, max_len: int) -> "AnswerRow":
        spans = ((start, min(end, max_len)) for start, end in self.answers if start < max_len)
        return replace(self, tokens=self.tokens[:max_len], answers=tuple(spans))


class _Line(Config, extra="ignore"):
    """A line as far as it is read; its other keys may hold anything."""

    tokens: list[int]
    answers: list[Annotated[list[int], Field(min_length=2, max_length=2)]] = Field(min_length=1)
    id: Any = None
    domain: Any = ""
    temperature: float | None = None

    @model_validator(mode="after")
    def _check_spans(self) -> "_Line":
        before = 0
        for start, end in self.answers:
            if not before <= start < end <= len(self.tokens):
                place = f"behind the one before and within the row's {len(self.tokens)} tokens"
                raise ValueError(f"answer {[start, end]} must be a non-empty span {place}")
            before = end
        return self


def read_rows(path: Path, vocab_size: int, max_rows: int | None = None) -> Iterator[AnswerRow]:
    """Read rows of a JSONL file, each `{"tokens": [...], "answers": [[start, end), ...]}`."""
    if not path.is_file():
        raise FileNotFoundError(
            f"data.path {str(path)!r} is neither a folder of specdec regenerate nor a JSONL file"
        )
    with path.open("rb") as lines:
        for number, text in enumerate(lines, 1):
            if max_rows is not None and number > max_rows:
                return
            try:
                line = validated(_Line, parse_json(text), noun="row")
                if wrong := [token for token in line.tokens if not 0 <= token < vocab_size]:
                    what = f"is outside the target's vocabulary of {vocab_size}; use its tokenizer"
                    raise ValueError(f"token id {wrong[0]} {what}")
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            name = f"line {number}" if line.id is None else str(line.id)
            spans = tuple((start, end) for start, end in line.answers)
            yield AnswerRow(tuple(line.tokens), spans, name, str(line.domain), line.temperature)


class AnswerSettings(Config):
    """Settings that decide the answers."""

    temperatures: list[float] = Field(
        default=[0.0], min_length=1, description="each query gets one of them, by hash of its id"
    )
    top_p: float = 1.0
    max_new_tokens: int = Field(default=512, ge=1, description="limit of an answer")
    turns: Literal["last", "all"] = Field(
        default="last",
        description="the last user turn as recorded, or all after the target's own answers",
    )
    seed: int = Field(default=0, description="of temperatures and samples")

    @model_validator(mode="after")
    def _check_sampling(self) -> "AnswerSettings":
        for temperature in self.temperatures:
            SamplingConfig(temperature, top_p=self.top_p, seed=self.seed)
        return self


class AskedEndpoint(Config):
    """The server that answered."""

    url: str
    model: str
    api: Literal["chat", "completion"]


class SplitCounts(Config):
    """Every query is a row or a failure: queries = rows + failed."""

    queries: Count
    rows: Count
    failed: Count


class AllCounts(Config):
    """Counts by split."""

    train: SplitCounts
    held_out: SplitCounts


class SessionFigures(Config):
    """Speed of the last command that decoded anything; a resumed run did more before."""

    tokens: Count
    seconds: float = Field(ge=0)
    tokens_per_s: float | None
    tau: float | None = Field(description="tokens per forward of a row; None behind an endpoint")
    batch_size: int = Field(ge=1, description="rows decoded together, or dialogues asked at once")


class AnswersManifest(Config, extra="ignore"):
    """The content of `answers.json`, which is written last."""

    schema_: Literal["specdec-answers-1"] = Field(default="specdec-answers-1", alias="schema")
    target: TargetIdentity = Field(description="who wrote the answers, as far as it is known")
    endpoint: AskedEndpoint | None = Field(description="None if the target answered in process")
    identity: dict[str, JsonValue] = Field(description="must be the same for a run to resume")
    settings: AnswerSettings
    counts: AllCounts
    answers: Count
    unanswered_turns: Count = Field(description="of rows that ended before their last user turn")
    retokenized_answers: Count = Field(description="tokens were made from a server's text")
    answer_tokens: Count
    tokens: Count = Field(description="prompts included")
    finish_reasons: dict[str, Count] = Field(description="answers by how they ended")
    temperatures: dict[str, Count] = Field(description="rows by temperature")
    session: SessionFigures
    provenance: MachineProvenance | CodeProvenance


def load_answers(folder: Path) -> AnswersManifest:
    """Read the manifest of a folder that `specdec regenerate` has finished, and count its rows."""
    if not (folder / MANIFEST).is_file():
        unfinished = (folder / JOURNAL).is_file()
        fix = (
            "give the command that made it again, to finish it"
            if unfinished
            else "make it with specdec regenerate"
        )
        raise FileNotFoundError(f"{str(folder)!r} holds no finished answers ({MANIFEST}); {fix}")
    manifest = read_model(AnswersManifest, folder / MANIFEST)
    for split, counts in manifest.counts:
        path = folder / f"{split}.jsonl"
        found = sum(1 for _ in path.open("rb")) if path.is_file() else 0
        if found != counts.rows:
            fix = f"{MANIFEST} counts {counts.rows}; give the command that made it again"
            raise ValueError(f"{str(path)!r} has {found} rows but {fix}")
    return manifest


def check_answers_target(manifest: AnswersManifest, identity: TargetIdentity) -> None:
    """Refuse answers that another target wrote; what either does not know is not compared."""
    known = manifest.target
    for fact, wrote, given in differences(known, identity):
        raise ValueError(
            f"the answers were written by target {known.name!r} with {fact} {wrote}, but "
            f"{identity.name!r} has {given}; use that target, or regenerate them with this one"
        )


def write_answers(
    folder: Path,
    rows: Mapping[str, Iterable[Mapping[str, Any]]],
    failed: Iterable[Mapping[str, Any]],
    manifest: AnswersManifest | None,
) -> None:
    """Replace all files of a folder; the manifest goes first and comes last."""
    given = {**{f"{split}.jsonl": each for split, each in rows.items()}, FAILED: failed}
    files: dict[str, Iterable[bytes]] = {
        name: (json.dumps(row).encode() + b"\n" for row in each) for name, each in given.items()
    }
    if manifest:
        files[MANIFEST] = [model_bytes(manifest)]
    replace_files(folder, files, private=True)
