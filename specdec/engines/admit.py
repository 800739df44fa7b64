"""Hold a drafter in a serving engine against our own loop: the same texts, the same counts."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import httpx
from pydantic import Field

from specdec.bench.prompts import encode_prompts, load_prompts
from specdec.checkpoints import head_of
from specdec.common.config import Config, read_model, write_model
from specdec.common.files import Journal, file_hash
from specdec.common.provenance import CodeProvenance, code
from specdec.engine.decode import generate, generate_baseline
from specdec.engine.metrics import AcceptanceStats
from specdec.engines.config import AdmitConfig
from specdec.engines.counters import Counters, read_counters
from specdec.engines.export import RECORD, Exported, export, find_drafter
from specdec.engines.launch import start, without_drafter
from specdec.registry import strategy
from specdec.targets.load import load_target

FILE, JOURNAL = "admission.json", "admission.jsonl"
# Owners of models in /v1/models whose counting we know, see `AcceptanceStats.as_engine`.
_CONVENTIONS = ("vllm", "llamacpp")
_ROWS = 8  # of our own batches
_FLAGS = {
    "vllm": ["--no-enable-prefix-caching", "--enforce-eager", "--max-model-len"],
    "llama.cpp": [
        *("--parallel", "1", "--flash-attn", "off", "-ctk", "f32", "-ctv", "f32"),
        *("-ctkd", "f32", "-ctvd", "f32", "--ctx-size"),
    ],
}
Show = Callable[[int, int, str], None]


class Difference(Config):
    """The first token of a text that differs; None behind a text's end."""

    arm: str
    prompt: str
    position: int
    ours: int | None
    engine: int | None


class Admission(Config):
    """Texts and counts of an engine beside ours.

    `equal_texts` are those of the engine, by arm, that our plain decoding gives too. Counts are as
    the engine counts; `theirs` is None where it counts nothing, or by rules that we do not know.
    """

    schema_: Literal["specdec-admission-1"] = Field(default="specdec-admission-1", alias="schema")
    drafter: str
    kind: str
    target: str
    engine: str
    version: str
    model: str
    asked: AdmitConfig
    num_tokens: int
    num_prompts: int
    equal_texts: dict[str, int]
    differences: list[Difference]
    ours: Counters
    theirs: Counters | None
    other_counts: list[str]
    provenance: CodeProvenance

    @property
    def is_equal(self) -> bool:
        """All texts, and all counts that there are."""
        return not self.differences and self.theirs in (None, self.ours)

    @property
    def verdict(self) -> str:
        """One line, as a card has it."""
        found, verb = self.theirs or self.ours, "admitted" if self.is_equal else "not admitted"
        how = "equal at every position" if self.is_equal else f"{self.ours.num_accepted} here"
        how = how if self.theirs else "counted here alone"
        return (
            f"{verb} by {self.engine} {self.version}: {found.num_accepted} of {found.num_drafted} "
            f"accepted, {how}; {self.equal_texts['drafter']} of {self.num_prompts} texts equal"
        )


def admit(drafter: str, asked: AdmitConfig, out: Path, show: Show) -> Admission:
    """Decode prompts in an engine and in our loop, and compare texts and counts of drafts.

    The engine's answers are kept in `out` one by one; the same call goes on where it ended.

    Raises:
        ValueError: input that cannot work, or a server of another model.
        RuntimeError: the engine does not start, or answers no more.
    """
    if asked.engine not in _FLAGS and "://" not in asked.engine:
        known = f"{' or '.join(_FLAGS)}, or the URL of a server that runs"
        raise ValueError(f"engine is {asked.engine!r} but must be {known}")
    options, head = find_drafter(drafter)
    depth = head_of(head).max_depth if head else None
    num_tokens, limit = min(asked.num_tokens, depth or asked.num_tokens), asked.max_new_tokens
    options |= _as_chain(options["type"], num_tokens)
    name = asked.target or (head.target.name if head and head.target else None) or "demo"
    target = load_target("demo" if name == "target" else name, dtype="float32")
    sources = asked.prompts.split(",")
    prompts = [each for source in sources for each in load_prompts(source.strip(), asked.num)]
    names, ids = [prompt.id for prompt in prompts], encode_prompts(prompts, target)
    max_len = max(map(len, ids)) + limit + 2 * num_tokens
    if max_len > target.max_context_len:
        raise ValueError(
            f"max_new_tokens is {limit}, but with them and two drafts the longest prompt has "
            f"{max_len} tokens, and the context {target.max_context_len}; ask for fewer"
        )
    weights = sorted(Path(str(options.get("path", "-"))).glob("*.safetensors"))
    identity = {"drafter": options, "weights": [file_hash(path) for path in weights]}
    identity |= asked.model_dump(exclude={"max_wait_s", "python"})
    with Journal(out / JOURNAL, identity) as journal:
        asking = (asked, options, target.eos_token_ids, max_len, num_tokens)
        facts = _ask_engine(ids, *asking, out, journal, show)
        rows = {(row["arm"], row["prompt"]): row for row in journal.rows() if "arm" in row}
    show(0, 2, "our own loop")
    plain = generate_baseline(target, ids, max_new_tokens=limit, batch_size=_ROWS)
    show(1, 2, "our own loop")
    # Drafts are whole up to the limit, as vLLM's are.
    ours = generate(target, options, ids, max_new_tokens=limit + num_tokens, batch_size=_ROWS)

    differences, equal = [], dict.fromkeys((arm for arm, i in rows), len(ids))
    for (arm, i), row in sorted(rows.items()):
        pairs = enumerate(zip_longest(plain[i].tokens, row["tokens"]))
        for place, (mine, other) in pairs:
            if mine != other:
                found = {"position": place, "ours": mine, "engine": other}
                differences.append(Difference(arm=arm, prompt=names[i], **found))
                equal[arm] -= 1
                break
    if not equal["drafter"]:
        raise ValueError(
            f"{facts['model']!r} gives none of the {len(ids)} texts of {name!r}: it is another "
            f"model, or does not run in float32; its answers are in {out}"
        )
    is_known = facts["owner"] in _CONVENTIONS
    convention = facts["owner"] if is_known else "vllm"
    stats = [AcceptanceStats.as_engine(convention, each.records, limit) for each in ours]
    expected = [
        _row(Counters(s.num_steps, s.num_drafted, s.num_accepted, s.accepted_at), num_tokens)
        for s in stats
    ]
    others = [rows["drafter", i]["counts"] for i in range(len(ids))]
    is_known = is_known and all(others)
    wrong_counts = [
        name for name, one, two in zip(names, expected, others, strict=True) if one != two
    ]
    admission = Admission(
        drafter=drafter,
        kind=options["type"],
        target=name,
        engine=facts["engine"],
        version=facts["version"],
        model=facts["model"],
        asked=asked,
        num_tokens=num_tokens,
        num_prompts=len(ids),
        equal_texts=equal,
        differences=differences,
        ours=_sum(expected),
        theirs=_sum(others) if is_known else None,
        other_counts=wrong_counts if is_known else [],
        provenance=CodeProvenance(**code()),
    )
    write_model(out / FILE, admission)
    return admission


def _as_chain(kind: str, num_tokens: int) -> dict[str, Any]:
    """Options that make a strategy draft chains of this length, and forget earlier answers."""
    drafter, names = strategy(kind), strategy(kind).shape_options.names
    options: dict[str, Any] = dict.fromkeys(names.values(), num_tokens)
    if "depth" in names:
        options = {names["depth"]: num_tokens, names["width"]: 1}
    elif "choices" in drafter.shape_options.fixed:
        options = {"choices": [[0] * level for level in range(1, num_tokens + 1)]}
    # An engine's rows never see the end of an answer, so they cannot remember the same.
    forgets = "num_remembered" in signature(drafter).parameters
    return {**options, "num_remembered": 0} if forgets else options


def _row(counts: Counters, num_tokens: int) -> list[int]:
    """Three counts, and one for each position."""
    totals = [counts.num_drafts, counts.num_drafted or 0, counts.num_accepted or 0]
    places = counts.accepted_per_position
    return [*totals, *places, *[0] * (num_tokens - len(places))]


def _sum(rows: Sequence[Sequence[int]]) -> Counters:
    drafts, drafted, accepted, *places = map(sum, zip(*rows, strict=True))
    return Counters(drafts, drafted, accepted, tuple(places))


def _ask_engine(
    prompts: Sequence[list[int]],
    asked: AdmitConfig,
    options: Mapping[str, Any],
    ends: Sequence[int],
    max_len: int,
    num_tokens: int,
    out: Path,
    journal: Journal,
    show: Show,
) -> dict[str, str]:
    """Let the engine answer what it has not answered yet; returns what it is."""
    facts: dict[str, str] = next(
        (row["server"] for row in reversed(journal.entries) if "server" in row), {}
    )
    done = {(row["arm"], row["prompt"]) for row in journal.entries if "arm" in row}
    for arm in ["plain", "drafter"] if asked.plain and "://" not in asked.engine else ["drafter"]:
        left = [i for i in range(len(prompts)) if (arm, i) not in done]
        if not left:
            continue
        with _served(asked, options, arm, max_len, out, show) as url:
            server = Server(url, asked.max_wait_s)
            said = out / f"{arm}.log"  # of one that was started here
            if said.exists() and (version := re.match(r"xllamacpp (\S+)", said.read_text())):
                server.facts["version"] = version[1]
            facts = {"engine": server.facts["owner"] if "://" in asked.engine else asked.engine}
            facts |= server.facts
            journal.append({"server": facts})
            for i in left:
                show(i, len(prompts), f"{facts['engine']}, {arm}")
                before = read_counters(url)
                tokens = server.complete(prompts[i], asked.max_new_tokens, ends)
                after = read_counters(url)
                counts = None
                if after is not None and after.num_drafted is not None:
                    counts = _row(after - before, num_tokens)
                journal.append({"arm": arm, "prompt": i, "tokens": tokens, "counts": counts})
    return facts


@contextmanager
def _served(
    asked: AdmitConfig, options: Mapping[str, Any], arm: str, max_len: int, out: Path, show: Show
) -> Iterator[str]:
    """Yield the URL of the server that runs, or of one that is started, with or without drafter."""
    if "://" in asked.engine:
        yield asked.engine.rstrip("/")
        return
    folder = out.resolve() / "export"
    if (folder / RECORD).exists():
        made = read_model(Exported, folder / RECORD)
    else:
        show(0, 1, f"export to {asked.engine}")
        made = export(options, asked.engine, folder, asked.target, asked.num_tokens, "float32")
    launch = [*made.launch, *_FLAGS[asked.engine], str(max_len)]
    with start(
        launch if arm == "drafter" else without_drafter(launch),
        engine=asked.engine,
        log=out / f"{arm}.log",
        python=asked.python,
        env=made.environment,
        max_wait_s=asked.max_wait_s,
        progress=lambda text: show(0, 1, text),
    ) as url:
        yield url


class Server:
    """Answers token ids with token ids, as vLLM and llama.cpp do.

    Attributes:
        facts: its model's name and owner, and its version.
    """

    def __init__(self, url: str, max_wait_s: float) -> None:
        self._url, root = url, url.removesuffix("/v1")
        self._client = httpx.Client(timeout=httpx.Timeout(max_wait_s, connect=10.0))
        model = self._ask("GET", f"{url}/models", lambda reply: reply["data"][0])
        self.facts = {"model": model["id"], "owner": model.get("owned_by", ""), "version": "?"}
        path, key = {"vllm": ("version",) * 2}.get(self.facts["owner"], ("props", "build_info"))
        reply = self._client.get(f"{root}/{path}")
        if reply.is_success:
            self.facts["version"] = str(reply.json().get(key, "?"))

    def complete(self, prompt: list[int], num: int, ends: Sequence[int]) -> list[int]:
        """Answer greedily, with the token that ended the answer."""
        body: dict[str, Any] = {"prompt": prompt, "temperature": 0}
        if self.facts["owner"] == "llamacpp":
            body |= {"n_predict": num, "return_tokens": True, "cache_prompt": False}
            path = f"{self._url.removesuffix('/v1')}/completion"
            return self._ask("POST", path, lambda reply: reply["tokens"] or None, body)
        body |= {"model": self.facts["model"], "max_tokens": num, "return_token_ids": True}
        body |= {"stop_token_ids": list(ends)}
        path = f"{self._url}/completions"
        return self._ask("POST", path, lambda reply: reply["choices"][0]["token_ids"] or None, body)

    def _ask(self, method: str, url: str, wanted: Callable[[Any], Any], body: Any = None) -> Any:
        try:
            reply = self._client.request(method, url, json=body)
        except httpx.HTTPError as error:
            what = f"{type(error).__name__} {error}".strip()
            raise RuntimeError(
                f"{url} does not answer ({what}); is the server up? The same command goes on"
            ) from error
        said = " ".join(reply.text.split())[:300]
        if not reply.is_success:
            raise ValueError(f"{url} refuses, HTTP {reply.status_code}: {said}")
        try:
            if (found := wanted(reply.json())) is not None:
                return found
        except (ValueError, TypeError, LookupError):
            pass
        raise ValueError(
            f"{url} gives no model or no token ids: {said!r}; give the URL up to and with /v1 of "
            "vLLM from 0.32 or of llama.cpp, whose answers hold ids"
        )
