"""The target answers collected queries itself: what drafters are trained on."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from specdec.checkpoints.identity import TARGET, check_resumed, hash_of_vocabulary
from specdec.common.files import Journal
from specdec.common.messages import Query
from specdec.data.answers import (
    JOURNAL,
    AllCounts,
    AnswererFacts,
    AnswerLine,
    AnswerSettings,
    AnswersManifest,
    Failure,
    SessionFigures,
    SplitCounts,
    load_answers,
    write_answers,
    write_failed,
)
from specdec.data.dialogue import (
    Answer,
    Chat,
    Dialogue,
    EndpointDownError,
    Progress,
    Session,
    plan_dialogues,
)
from specdec.data.queries import SPLITS


class Answerer(Protocol):
    """`LocalAnswers` or `EndpointAnswers`."""

    chat: Chat
    settings: AnswerSettings
    batch_size: int

    def facts(self) -> AnswererFacts:
        """Say who answers."""

    def replay(self, dialogues: Sequence[Dialogue], entries: Iterable[dict[str, Any]]) -> None:
        """Bring the dialogues to where the journal ends."""

    def run(self, dialogues: Sequence[Dialogue], journal: Journal, session: Session) -> None:
        """Answer all that can be answered."""


def regenerate(
    queries: Mapping[str, list[Query]],
    out: Path,
    answers: Answerer,
    progress: Progress = lambda done, total, text: None,
) -> AnswersManifest:
    """Answer queries, or resume a killed run of the same ones."""
    tokenizer, settings = answers.chat.tokenizer, answers.settings
    _check_tokenizer(tokenizer, queries)
    facts = answers.facts()  # as it is now: the code may be another when the run ends
    template = getattr(tokenizer, "chat_template", None)
    identity = {
        **{f"{split}_queries": _query_hash(queries[split]) for split in SPLITS},
        **settings.model_dump(),
        "target_tokenizer": hash_of_vocabulary(tokenizer),
        "chat_template": _short_hash([json.dumps(template).encode()]) if template else None,
        **facts.identity,
    }
    checks = {TARGET: partial(check_resumed, out)} if TARGET in identity else {}
    dialogues = plan_dialogues(queries, settings.temperatures, settings.seed, settings.turns)
    session = Session(progress)
    with Journal(out / JOURNAL, identity, checks, private=True) as journal:
        _replay(answers, dialogues, journal)
        try:
            answers.run(dialogues, journal, session)
        except EndpointDownError:
            for dialogue in dialogues:
                if not dialogue.is_done:
                    dialogue.failure = "not answered yet: the endpoint answers no more"
            write_failed(out, _failures(dialogues))
            raise
    if not session.tokens and (known := _finished(out)):
        return known  # the folder is whole already, and nothing was added
    manifest = _manifest(dialogues, answers, facts, identity, session)
    rows = {split: _lines(dialogues, split, tokenizer) for split in SPLITS}
    failed = _failures(dialogues)
    write_answers(out, rows, failed, manifest)
    if len(failed) == len(dialogues):
        raise RuntimeError(f"every query failed: {failed[0].reason}")
    return manifest


def _check_tokenizer(tokenizer: Any, queries: Mapping[str, list[Query]]) -> None:
    if tokenizer is None:
        raise ValueError("the target has no tokenizer; put its tokenizer files beside its weights")
    has_chat = any(query.messages for members in queries.values() for query in members)
    if has_chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the queries are chats but the target's tokenizer has no chat template; give the "
            "instruction-tuned target, or put its chat_template.jinja beside its tokenizer"
        )


def _query_hash(queries: Iterable[Query]) -> str:
    return _short_hash(json.dumps([q.id, q.messages, q.text]).encode() + b"\n" for q in queries)


def _short_hash(pieces: Iterable[bytes]) -> str:
    whole = hashlib.sha256()
    for piece in pieces:
        whole.update(piece)
    return whole.hexdigest()[:16]


def _replay(answers: Answerer, dialogues: Sequence[Dialogue], journal: Journal) -> None:
    try:
        answers.replay(dialogues, journal.entries)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"a line of {str(journal.path)!r} holds no answer of this run ({error}); remove the "
            "line, or the folder"
        ) from error
    journal.entries.clear()


def _manifest(
    dialogues: Sequence[Dialogue],
    answers: Answerer,
    facts: AnswererFacts,
    identity: dict[str, Any],
    session: Session,
) -> AnswersManifest:
    done = [dialogue for dialogue in dialogues if not dialogue.failure]
    kept = [answer for dialogue in done for answer in dialogue.kept]
    return AnswersManifest(
        target=facts.target,
        endpoint=facts.endpoint,
        identity=identity,
        settings=answers.settings,
        counts=AllCounts(**{split: _counts(dialogues, split) for split in SPLITS}),
        answers=len(kept),
        unanswered_turns=sum(dialogue.num_unanswered for dialogue in done),
        retokenized_answers=sum(answer.is_retokenized for answer in kept),
        answer_tokens=sum(len(answer.tokens) for answer in kept),
        tokens=sum(len(d.kept[-1].prompt) + len(d.kept[-1].tokens) for d in done),
        finish_reasons=dict(Counter(answer.finish_reason for answer in kept)),
        temperatures={str(t): n for t, n in Counter(d.temperature for d in done).items()},
        session=SessionFigures(
            tokens=session.tokens,
            seconds=session.seconds,
            tokens_per_s=session.tokens_per_s,
            tau=session.tau,
            batch_size=answers.batch_size,
        ),
        provenance=facts.provenance,
    )


def _finished(out: Path) -> AnswersManifest | None:
    """Read the manifest of a folder that is whole; None where something must be written again."""
    try:
        return load_answers(out).manifest
    except (FileNotFoundError, ValueError):
        return None


def _counts(dialogues: Iterable[Dialogue], split: str) -> SplitCounts:
    members = [dialogue for dialogue in dialogues if dialogue.split == split]
    failed = sum(bool(dialogue.failure) for dialogue in members)
    rows = sum(not dialogue.failure and dialogue.is_done for dialogue in members)
    assert rows + failed == len(members), "a query is neither answered nor listed as failed"
    return SplitCounts(queries=len(members), rows=rows, failed=failed)


def _failures(dialogues: Iterable[Dialogue]) -> list[Failure]:
    return [
        Failure(id=d.query.id, split=d.split, domain=d.query.domain, reason=d.failure)
        for d in dialogues
        if d.failure
    ]


def _lines(dialogues: Iterable[Dialogue], split: str, tokenizer: Any) -> Iterator[AnswerLine]:
    """Make the rows of a split while they are written."""
    for dialogue in dialogues:
        if dialogue.split == split and not dialogue.failure:
            yield _line(dialogue, tokenizer)


def _line(dialogue: Dialogue, tokenizer: Any) -> AnswerLine:
    query, kept = dialogue.query, dialogue.kept
    return AnswerLine(
        id=query.id,
        domain=query.domain,
        language=query.language,
        tokens=kept[-1].prompt + kept[-1].tokens,
        answers=[[len(each.prompt), len(each.prompt) + len(each.tokens)] for each in kept],
        temperature=dialogue.temperature,
        seed=dialogue.seed,
        finish_reason=dialogue.ended_by or dialogue.answers[-1].finish_reason,
        text="\n".join(_text(answer, tokenizer) for answer in kept),
        retokenized=True if any(answer.is_retokenized for answer in kept) else None,
    )


def _text(answer: Answer, tokenizer: Any) -> str:
    if answer.text is not None:
        return answer.text
    return str(tokenizer.decode(answer.tokens, skip_special_tokens=True))
