"""`specdec collect`, `regenerate` and `features`: from what users asked to what drafters learn."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from specdec.cli.app import (
    DATA,
    DRAFTER,
    DTYPE,
    TARGET,
    app,
    argument,
    command,
    option,
    progress_bar,
    quiet_transformers,
    tell,
    warn,
)
from specdec.cli.models import load_strategy
from specdec.common.config import validated
from specdec.common.distribution import install
from specdec.common.files import locked
from specdec.data.config import CollectSettings, FeatureOptions
from specdec.proxy.records import ProxyConfig
from specdec.report.tables import Column, Table, print_tables
from specdec.targets.options import Placement

if TYPE_CHECKING:
    from specdec.data.collect import CollectReport


class SourcesFirst(TyperGroup):
    """A group in which sources may follow at once, in place of the command `from`.

    A source that is called as a subcommand is reached by its path (`./proxy`).
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        is_named = bool(args) and args[0] in self.commands
        return super().parse_args(ctx, args if is_named else ["from", *args])


collect_app = typer.Typer(
    cls=SourcesFirst, help="Collect queries from logs, files and data sets, or by recording them."
)
app.add_typer(collect_app, name="collect", rich_help_panel=DATA)


def _require(what: str, *modules: str) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        raise ValueError(f"{what} needs {names}; install with: {install('collect')}")


@command(DATA, "from", group=collect_app, tells=True)
def collect(
    settings: CollectSettings,
    sources: list[str] = argument(
        "files, folders, data sets of the hub, or known ones as gsm8k, sgd and banking77"
    ),
    out: Path = option(..., "folder for the queries"),
    append: bool = option(False, "add to the queries in the folder", "--append"),
) -> None:
    """Collect what was asked into a folder; `specdec collect proxy` records it."""
    _require("collecting", "datasets", "datasketch", "phonenumbers", "py3langid", "stdnum")
    from datasets.utils.logging import disable_progress_bar

    from specdec.common.records import DATA_DIR_VARIABLE
    from specdec.data.collect import collect as collect_queries

    disable_progress_bar()
    given = os.environ.get(DATA_DIR_VARIABLE)
    data_dir = Path(given) if given else None
    where = out.resolve()
    lock = where.with_name(f".{where.name}.lock")  # the folder itself is replaced
    with locked(out, lock), progress_bar() as show:
        report = collect_queries(
            sources, out, settings, append=append, data_dir=data_dir, show=show
        )
    print_tables(_table(report))
    for warning in report.warnings:
        warn(warning)
    typer.echo(f"Queries: {out}\nCard: {out / 'README.md'}")
    facts = report.model_dump(by_alias=True, include={"schema_", "fingerprint", "kept", "domains"})
    dropped = {name: drop.count for name, drop in report.dropped.items() if drop.count}
    tell({"out": str(out), **facts, "dropped": dropped})


def _table(report: "CollectReport") -> Table:
    """Show what was kept and dropped, with an example of each kind."""
    from specdec.data.collect import REASONS

    rows: list[tuple[str, int, str]] = []
    for domain, counts in report.domains.items():
        rows += [(f"kept: {split} {domain}".rstrip(), count, "") for split, count in counts]
    for name, drop in report.dropped.items():
        shown = " ".join(f"{each.where} {each.quote}" for each in drop.examples[:1]).strip()
        rows += [(f"dropped: {REASONS[name]}", drop.count, shown)] if drop.count else []
    rows += [(f"masked: {mask}", count, "") for mask, count in report.masked.items() if count]
    columns = [
        Column("fate", ""),
        Column("queries", "queries", 0),
        Column("example", "for example"),
    ]
    named = [{"fate": f, "queries": n, "example": e} for f, n, e in rows]
    return Table("collection", "", named, columns)


@command(DATA, "proxy", group=collect_app, watch="proxy")
def proxy(config: ProxyConfig) -> None:
    """Record requests and answers on their way to an OpenAI-compatible server."""
    _require("the proxy", "starlette", "uvicorn", "httpx")
    from specdec.proxy.server import serve

    serve(config, say=warn)


@command(DATA, watch="loop", tells=True, threads=True)
def regenerate(
    placement: Placement,
    queries: Path = argument("a folder that collect wrote, or a JSONL file"),
    out: Path = option(..., "folder for the answers; a killed run resumes in it"),
    target: str | None = option(None, TARGET[0]),
    drafter: str = option("none", f"{DRAFTER}; it changes the speed alone"),
    temperature: list[float] = option(
        [], "temperature of the answers, 0 by default; give several for a mix"
    ),
    top_p: float = option(1.0, "sample from the likeliest tokens of this probability"),
    max_new_tokens: int = option(512, "tokens of an answer, at most"),
    turns: str = option(
        "last", "user turns to answer: 'last', or 'all', each after the target's own answers"
    ),
    seed: int = option(0, "seed of the samples"),
    batch_size: int = option(32, "rows decoded together"),
    dtype: str | None = option(None, DTYPE),
    endpoint: str | None = option(None, "ask a server instead, such as http://localhost:8000/v1"),
    model: str | None = option(
        None, "same as --target; with --endpoint the server's name of the model"
    ),
    tokenizer: str | None = option(
        None, "tokenizer of the model that a server runs; --target will do as well"
    ),
    api: str = option("chat", "kind of requests to the server: 'chat' or 'completion'"),
    concurrency: int = option(16, "queries asked at once"),
    attempts: int = option(6, "attempts at a query, the first included"),
    timeout: float = option(600.0, "seconds to wait for an answer"),
    api_key_variable: str = option("SPECDEC_API_KEY", "environment variable with the server's key"),
) -> None:
    """Let the target answer the queries itself; the same command resumes and retries failures."""
    from specdec.data.answers import AnswerSettings
    from specdec.data.dialogue import load_chat
    from specdec.data.queries import read_query_splits
    from specdec.data.regenerate import Answerer, LocalAnswers
    from specdec.data.regenerate import regenerate as answer
    from specdec.targets.load import load_target

    given = {"temperatures": temperature or [0.0], "top_p": top_p, "turns": turns, "seed": seed}
    given |= {"max_new_tokens": max_new_tokens}
    settings = validated(AnswerSettings, given, noun="option")
    if endpoint is None and target is None:
        target, model = model, None
    _check_source(target, endpoint, model, tokenizer)
    found = read_query_splits(queries)  # wrong ones are told before a target is loaded
    quiet_transformers()
    answers: Answerer
    with progress_bar() as show:
        if endpoint is None:
            loaded = load_target(str(target), dtype=dtype, **placement.model_dump())
            strategy = load_strategy(drafter, loaded)
            answers = LocalAnswers(loaded, settings, strategy, batch_size)
        else:
            from specdec.data.endpoint import Endpoint, EndpointAnswers

            key = os.environ.get(api_key_variable, "")
            server = Endpoint(endpoint, str(model), key, attempts, timeout, concurrency)
            chat = load_chat(str(tokenizer or target))
            answers = EndpointAnswers(server, chat, settings, api)
        manifest = answer(found, out, answers, show)
    counts = manifest.counts
    failed = counts.train.failed + counts.held_out.failed
    if failed:
        total = counts.train.queries + counts.held_out.queries
        warn(f"{failed} of {total} queries failed: {out / 'failed.jsonl'}")
    keys = {"counts", "answers", "answer_tokens", "unanswered_turns", "retokenized_answers"}
    rate = manifest.session.tokens_per_s
    brief = {**manifest.model_dump(include=keys), "tokens_per_s": rate}
    typer.echo(f"Answers: {out}, {counts.train.rows + counts.held_out.rows} queries")
    tell({"answers_folder": str(out), **brief})


def _check_source(
    target: str | None, endpoint: str | None, model: str | None, tokenizer: str | None
) -> None:
    """Refuse options that do not say who answers."""
    if endpoint is None and target is None:
        raise ValueError("--target is missing; give 'demo', a folder or a hub id")
    if endpoint is None and (model or tokenizer) is not None:
        raise ValueError("--model and --tokenizer belong to --endpoint; give it, or drop them")
    if endpoint is None:
        return
    if model is None:
        raise ValueError("--endpoint needs --model: the target, as the server calls it")
    if target is None and tokenizer is None:
        raise ValueError(
            "--endpoint needs --tokenizer: a folder or hub id with the target's tokenizer and chat "
            "template"
        )
    _require("--endpoint", "httpx", "tenacity")


@command(DATA, watch="loop", tells=True, threads=True)
def features(
    placement: Placement,
    options: FeatureOptions,
    answers: Path = argument("a folder that regenerate wrote, or a JSONL file; see --check"),
    target: str | None = option(None, *TARGET),
    out: Path | None = option(None, "folder of the store; a killed run resumes"),
    target_dtype: str | None = option(None, DTYPE),
    dry_run: bool = option(False, "only say how much disk it would take", "--dry-run"),
    check: bool = option(
        False, "take ANSWERS for a store, and compare the hashes of its files", "--check"
    ),
) -> None:
    """Store what the target makes of its answers, for training without it."""
    if check:
        from specdec.data.feature_store import FeatureStore

        store = FeatureStore.open(answers)
        store.verify()
        sizes = {name: split.rows for name, split in store.index.splits.items()}
        typer.echo(f"All files of {answers} are as they were written; rows: {sizes}")
        tell({"store": str(answers), "rows": sizes, "ok": True})
        return
    if target is None or (out is None and not dry_run):
        raise ValueError("--target and --out must be given (--dry-run needs no --out)")
    from specdec.data.features import FeaturePlan, extract_features, free_bytes
    from specdec.targets.load import load_ends, load_target

    quiet_transformers()
    if dry_run:
        where = {"device": placement.device, "revision": placement.revision}
        ends = load_ends(target, dtype=target_dtype, **where)
        plan = FeaturePlan(answers, ends, options)
        per_token, free = plan.num_bytes / plan.num_tokens, free_bytes(out or Path())
        size = {"bytes_per_token": round(per_token, 2), "bytes": plan.num_bytes, "free_bytes": free}
        typer.echo(f"{plan.num_bytes:,} bytes for {plan.num_tokens:,} tokens; {free:,} are free")
        tell({**size, "tokens": plan.num_tokens})
        return
    assert out is not None
    with locked(out):
        model = load_target(target, dtype=target_dtype, **placement.model_dump())
        plan = FeaturePlan(answers, model, options)
        with progress_bar() as show:
            summary = extract_features(plan, model, out, show)
    typer.echo(f"Store: {out}")
    tell({"store": str(out), **summary})
