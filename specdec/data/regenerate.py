"""The target answers collected queries itself: what drafters are trained on."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.checkpoints import identify_target
from specdec.checkpoints.head import TargetIdentity
from specdec.checkpoints.identity import TARGET, as_json, check_resumed, hash_of_vocabulary
from specdec.common.files import Journal
from specdec.common.provenance import code, machine
from specdec.data.answers import (
    SCHEMA,
    AnswerSettings,
    failures,
    finish,
    finished_manifest,
    run_identity,
    summary,
    template_hash,
    write_failed,
)
from specdec.data.conversation import Query
from specdec.data.dialogue import Chat, Dialogue, Progress, Session, plan_dialogues
from specdec.data.local_answers import LocalAnswers
from specdec.engine.interfaces import Drafter
from specdec.targets.hf import HFTarget

if TYPE_CHECKING:  # httpx and tenacity are extras
    from specdec.data.endpoint import Endpoint

JOURNAL = "journal.jsonl"


def _ignore(done: int, total: int, text: str) -> None:
    """Show no progress."""


def regenerate(
    queries: dict[str, list[Query]],
    out: Path,
    target: HFTarget,
    settings: AnswerSettings,
    drafter: Drafter | None = None,
    batch_size: int = 32,
    progress: Progress = _ignore,
) -> dict[str, Any]:
    """Answer queries in this process, or go on where a killed run of the same ones stopped.

    A run that was killed and resumed writes the tokens that an undisturbed one writes, whatever
    the batch size and the drafter, as far as the target's logits do not depend on the batch.

    Args:
        queries: split -> queries, see `read_query_splits`.
        out: for the journal, `train.jsonl`, `held_out.jsonl`, `failed.jsonl` and `answers.json`.
        target: with a tokenizer.
        settings: what decides the answers.
        drafter: speeds it up; the answers stay the same.
        batch_size: rows decoded together.
        progress: called with dialogues done, dialogues in all, and a text.

    Returns:
        The content of `answers.json`.

    Raises:
        ValueError: bad input, or a folder of another run.
        RuntimeError: not a single query could be answered.
        OSError: the folder cannot be written or is full; what was answered is kept.
    """
    _check_tokenizer(target.tokenizer, queries)
    where = machine(target)  # as it is now: the code may be another when the run ends
    known, session = identify_target(target), Session(progress)
    identity = {
        **run_identity(queries, settings),
        "target_weights": known.weights,
        "target_tokenizer": known.tokenizer,
        TARGET: as_json(known),
        "chat_template": template_hash(target.tokenizer),
        "dtype": where["dtype"],
        "quantized": where["quantized"],
    }
    answers = LocalAnswers(
        target, drafter, settings.top_p, settings.max_new_tokens, batch_size, session
    )
    dialogues = plan_dialogues(queries, settings.temperatures, settings.seed, settings.turns)
    journal = Journal(out / JOURNAL, identity, {TARGET: partial(check_resumed, out)}, private=True)
    try:
        _replay(answers, dialogues, journal)
        answers.run(dialogues, journal)
    finally:
        journal.close()
    facts = {
        "target": asdict(known),
        "endpoint": None,
        "identity": identity,
        "settings": settings.values(),
        "session": {**session.values(), "batch_size": batch_size},
        "provenance": where,
    }
    return _written(out, dialogues, facts, target.tokenizer)


def regenerate_from_endpoint(
    queries: dict[str, list[Query]],
    out: Path,
    endpoint: "Endpoint",
    chat: Chat,
    settings: AnswerSettings,
    api: str = "chat",
    concurrency: int = 16,
    progress: Progress = _ignore,
) -> dict[str, Any]:
    """Let a server answer queries, or go on where a run of the same ones stopped.

    Args:
        queries: split -> queries.
        out: as in `regenerate`.
        endpoint: serves the target.
        chat: the target's tokenizer and the tokens that end its answers.
        settings: what decides the answers.
        api: "chat" or "completion", see `EndpointAnswers`.
        concurrency: dialogues asked at once.
        progress: as in `regenerate`.

    Returns:
        The content of `answers.json`.

    Raises:
        ValueError: bad input, a folder of another run, or a server that refuses every query.
        EndpointDownError: the server answers no more; what it answered is kept, and the rest is
            listed in `failed.jsonl`.
        RuntimeError: not a single query could be answered.
        OSError: the folder cannot be written or is full; what was answered is kept.
    """
    from specdec.data.endpoint import EndpointAnswers, EndpointDownError

    _check_tokenizer(chat.tokenizer, queries)
    where, session = code(("specdec", "transformers", "tokenizers", "httpx")), Session(progress)
    known = dict.fromkeys(field.name for field in fields(TargetIdentity))
    known |= {"name": endpoint.model, "tokenizer": hash_of_vocabulary(chat.tokenizer)}
    identity = {
        **run_identity(queries, settings),
        "endpoint": endpoint.url,
        "model": endpoint.model,
        "api": api,
        "target_tokenizer": known["tokenizer"],
        "chat_template": template_hash(chat.tokenizer),
    }
    answers = EndpointAnswers(
        endpoint, chat, api, settings.top_p, settings.max_new_tokens, concurrency, session
    )
    dialogues = plan_dialogues(queries, settings.temperatures, settings.seed, settings.turns)
    journal = Journal(out / JOURNAL, identity, private=True)
    try:
        _replay(answers, dialogues, journal)
        asyncio.run(answers.run(dialogues, journal))
    except EndpointDownError:
        for dialogue in dialogues:
            if not dialogue.is_done:
                dialogue.failure = "not answered yet: the endpoint answers no more"
        write_failed(out, failures(dialogues))
        raise
    finally:
        journal.close()
    facts = {
        "target": known,
        "endpoint": {"url": endpoint.url, "model": endpoint.model, "api": api},
        "identity": identity,
        "settings": settings.values(),
        "session": {**session.values(), "batch_size": concurrency},
        "provenance": where,
    }
    return _written(out, dialogues, facts, chat.tokenizer)


def _replay(answers: Any, dialogues: Sequence[Dialogue], journal: Journal) -> None:
    try:
        answers.replay(dialogues, journal.entries)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"a line of {str(journal.path)!r} holds no answer of this run ({error}); remove the "
            "line, or the folder"
        ) from error
    journal.entries.clear()


def _written(
    out: Path, dialogues: Sequence[Dialogue], facts: dict[str, Any], tokenizer: Any
) -> dict[str, Any]:
    """Write the folder, unless it is whole already and this session has added nothing."""
    known = finished_manifest(out)
    if known and not facts["session"]["tokens"]:
        return known
    manifest = {"schema": SCHEMA, **facts, **summary(dialogues)}
    return finish(out, dialogues, manifest, tokenizer)


def _check_tokenizer(tokenizer: Any, queries: dict[str, list[Query]]) -> None:
    if tokenizer is None:
        raise ValueError("the target has no tokenizer; put its tokenizer files beside its weights")
    has_chat = any(query.messages for members in queries.values() for query in members)
    if has_chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the queries are chats but the target's tokenizer has no chat template; give the "
            "instruction-tuned target, or put its chat_template.jinja beside its tokenizer"
        )
