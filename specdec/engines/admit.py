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
from specdec.common.config import Config, Count, read_model, write_model
from specdec.common.files import Journal
from specdec.common.provenance import CodeProvenance, code
from specdec.engine.decode import generate, generate_baseline
from specdec.engine.metrics import AcceptanceStats
from specdec.engines.counters import Counters, read_counters
from specdec.engines.export import RECORD, Exported, export, find_drafter
from specdec.engines.launch import start, without_drafter
from specdec.registry import strategy
from specdec.targets.load import load_target

FILE, JOURNAL = "admission.json", "admission.jsonl"
# How those who own a served model, by its entry in /v1/models, count (`AcceptanceStats.as_engine`).
_COUNTING = {"vllm": "vllm", "llamacpp": "llamacpp"}
_BATCH = 8
Show = Callable[[int, int, str], None]


class AdmitConfig(Config):
    """The engine, and what it is asked."""

    engine: str = Field(description="vllm or llama.cpp, or the URL of a server that runs, with /v1")
    target: str | None = Field(None, description="folder or hub id of the target")
    prompts: str = Field("demo", description="sources of prompts as in a bench, commas between")
    num: int = Field(20, ge=1, description="prompts of each source")
    max_new_tokens: int = Field(64, ge=2, description="tokens of each answer")
    num_tokens: int = Field(5, ge=1, description="tokens drafted in a step")
    plain: bool = Field(True, description="also hold the engine without the drafter against ours")
    python: str | None = Field(None, description="Python of the engine's environment")
    max_wait_s: float = Field(600.0, gt=0, description="seconds for its start, and for an answer")


class Difference(Config):
    """A text of the engine that is not ours: the first token that differs, None behind an end."""

    prompt: str
    position: int
    ours: int | None
    engine: int | None


class Texts(Config):
    """Greedy answers of the engine, of which `equal` are those of our plain decoding."""

    equal: int
    differences: list[Difference]


class Counts(Config):
    """Drafts, their tokens, and those accepted, also at position 1, 2, ..., as the engine counts."""

    drafts: Count
    drafted: Count
    accepted: Count
    by_position: list[Count]


class Admission(Config):
    """What an engine did with a drafter, and what our loop did.

    Counts are None where the server has none, or counts by rules that we do not know.
    """

    schema_: Literal["specdec-admission-1"] = Field(default="specdec-admission-1", alias="schema")
    drafter: str
    kind: str
    target: str
    engine: str
    version: str
    served: str
    asked: AdmitConfig
    num_tokens: Count
    prompts: Count
    texts: dict[str, Texts]
    ours: Counts
    theirs: Counts | None
    other_prompts: list[str]
    provenance: CodeProvenance

    @property
    def is_equal(self) -> bool:
        """All texts are ours, and all counts that there are."""
        same = all(not texts.differences for texts in self.texts.values())
        return same and (self.theirs is None or self.ours == self.theirs)

    @property
    def verdict(self) -> str:
        """One line, as a card has it."""
        found = self.theirs or self.ours
        counted = f"{found.accepted} of {found.drafted} accepted"
        texts = self.texts["drafter"]
        what = "equal at every position" if self.is_equal else f"{self.ours.accepted} in our loop"
        if self.theirs is None:
            what = "in our loop, the server has no counts to compare"
        verb = "admitted" if self.is_equal else "not admitted"
        same = f"{texts.equal} of {self.prompts} texts equal"
        return f"{verb} by {self.engine} {self.version}: {counted}, {what}; {same}"


def admit(drafter: str, asked: AdmitConfig, out: Path, show: Show) -> Admission:
    """Decode prompts in an engine and in our loop, and compare texts and counts of drafts.

    The engine's answers are kept in `out` one by one; the same call goes on where it ended.

    Raises:
        ValueError: input that cannot work, or a server of another model.
        RuntimeError: the engine does not start, or answers no more.
    """
    options, head = find_drafter(drafter)
    kind, depth = options["type"], head_of(head).max_depth if head else None
    num_tokens = min(asked.num_tokens, depth or asked.num_tokens)
    options |= _as_chain(kind, num_tokens)
    name = asked.target or (head.target.name if head and head.target else None) or "demo"
    target = load_target("demo" if name == "target" else name, dtype="float32")
    sources = asked.prompts.split(",")
    prompts = [each for source in sources for each in load_prompts(source.strip(), asked.num)]
    ids, limit = encode_prompts(prompts, target), asked.max_new_tokens
    longest = max(map(len, ids)) + limit + 2 * num_tokens
    if longest > target.max_context_len:
        raise ValueError(
            f"max_new_tokens is {limit}, but the longest prompt with them and two drafts has "
            f"{longest} tokens and the target's context {target.max_context_len}; ask for fewer"
        )
    show(0, 2, "our own loop")
    plain = generate_baseline(target, ids, max_new_tokens=limit, batch_size=_BATCH)
    show(1, 2, "our own loop")
    # So long that vLLM's drafts, which are whole up to the limit, are whole here too.
    ours = generate(target, options, ids, max_new_tokens=limit + num_tokens, batch_size=_BATCH)
    identity = {"drafter": options, "asked": asked.model_dump(exclude={"max_wait_s", "python"})}
    with Journal(out / JOURNAL, identity) as journal:
        facts = _ask_engine(asked, options, ids, target.eos_token_ids, longest, out, journal, show)
        rows = {(row["arm"], row["prompt"]): row for row in journal.rows() if "arm" in row}
    texts = {
        arm: _compare([rows[arm, i]["tokens"] for i in range(len(ids))], plain, prompts)
        for arm in ("plain", "drafter")
        if (arm, 0) in rows
    }
    if not texts["drafter"].equal and not any(row.error for row in plain):
        raise ValueError(
            f"{facts['served']!r} gives none of the {len(ids)} texts of {name!r}: it serves another "
            f"model, or not in float32 (the answers are kept: {out})"
        )
    convention = _COUNTING.get(facts["owner"], "llamacpp")
    expected = [_counts([each], convention, limit) for each in ours]
    found = [rows["drafter", i]["counts"] for i in range(len(ids))]
    theirs = None
    if all(found) and facts["owner"] in _COUNTING:
        theirs = Counts(**{key: _total(row[key] for row in found) for key in Counts.model_fields})
    admission = Admission(
        drafter=drafter,
        kind=kind,
        target=name,
        engine=facts["engine"],
        version=facts["version"],
        served=facts["served"],
        asked=asked,
        num_tokens=num_tokens,
        prompts=len(ids),
        texts=texts,
        ours=_counts(ours, convention, limit),
        theirs=theirs,
        other_prompts=[
            prompt.id
            for prompt, one, other in zip(prompts, expected, found, strict=True)
            if theirs and one != Counts(**other)
        ],
        provenance=CodeProvenance(**code()),
    )
    write_model(out / FILE, admission)
    return admission


def _as_chain(kind: str, num_tokens: int) -> dict[str, Any]:
    """Options that make a strategy draft chains of this length, and forget earlier answers."""
    drafter, chain = strategy(kind), [[0] * level for level in range(1, num_tokens + 1)]
    names = drafter.shape_options.names
    if "depth" in names:
        options = {names["depth"]: num_tokens, names["width"]: 1}
    elif "choices" in drafter.shape_options.fixed:
        options = {"choices": chain}
    else:
        options = {part: num_tokens for part in names.values()}
    # An engine's rows never see the end of an answer, so they cannot remember the same.
    forgets = "num_remembered" in signature(drafter).parameters
    return {**options, "num_remembered": 0} if forgets else options


def _counts(results: Sequence[Any], convention: str, limit: int) -> Counts:
    records = [record for result in results for record in result.records]
    found = AcceptanceStats.as_engine(convention, records, limit)
    accepted = [count for count in found.accepted_at if count]
    return Counts(
        drafts=found.num_steps,
        drafted=found.num_drafted,
        accepted=found.num_accepted,
        by_position=accepted,
    )


def _total(values: Iterator[Any]) -> Any:
    first, *others = values
    if isinstance(first, int):
        return first + sum(others)
    return [sum(each) for each in zip_longest(first, *others, fillvalue=0)]


def _compare(tokens: Sequence[list[int]], plain: Sequence[Any], prompts: Sequence[Any]) -> Texts:
    found = []
    for theirs, ours, prompt in zip(tokens, plain, prompts, strict=True):
        pairs = list(zip_longest(ours.tokens, theirs))
        wrong = [place for place, (one, other) in enumerate(pairs) if one != other]
        if wrong:
            one, other = pairs[wrong[0]]
            found.append(Difference(prompt=prompt.id, position=wrong[0], ours=one, engine=other))
    return Texts(equal=len(tokens) - len(found), differences=found)


# --- The engine ---


def _ask_engine(
    asked: AdmitConfig,
    options: dict[str, Any],
    prompts: Sequence[list[int]],
    ends: Sequence[int],
    max_len: int,
    out: Path,
    journal: Journal,
    show: Show,
) -> Mapping[str, str]:
    """Let the engine answer what it has not yet, and return what it is."""
    is_url = "://" in asked.engine
    arms = ["plain", "drafter"] if asked.plain and not is_url else ["drafter"]
    done = {(row["arm"], row["prompt"]) for row in journal.entries if "arm" in row}
    facts = next((row["server"] for row in journal.entries if "server" in row), {})
    for arm in arms:
        left = [i for i in range(len(prompts)) if (arm, i) not in done]
        if not left:
            continue
        with _served(asked, options, arm, max_len, out, show) as url:
            server = Server(url, asked.max_wait_s)
            facts = {**server.facts, "engine": server.facts["owner"] if is_url else asked.engine}
            if not is_url and facts["owner"] == "llamacpp":
                # The wheel's server does not know its version; its first line says it.
                said = re.search(r"^xllamacpp (\S+)", (out / f"{arm}.log").read_text())
                facts["version"] = said[1] if said else facts["version"]
            journal.append({"server": facts})
            for i in left:
                show(i, len(prompts), f"{facts['engine']}, {arm}")
                before = read_counters(url)
                tokens = server.complete(prompts[i], asked.max_new_tokens, ends)
                after = read_counters(url)
                counts = after and _as_counts(after - before)
                journal.append({"arm": arm, "prompt": i, "tokens": tokens, "counts": counts})
    return facts


def _as_counts(found: Counters) -> dict[str, Any] | None:
    if found.num_drafted is None:
        return None
    return {
        "drafts": found.num_drafts,
        "drafted": found.num_drafted,
        "accepted": found.num_accepted,
        "by_position": list(found.accepted_per_position),
    }


@contextmanager
def _served(
    asked: AdmitConfig, options: dict[str, Any], arm: str, max_len: int, out: Path, show: Show
) -> Iterator[str]:
    """A server that runs, or one that is started with the drafter or without."""
    if "://" in asked.engine:
        yield asked.engine.rstrip("/")
        return
    folder = (out / "export").resolve()
    if (folder / RECORD).exists():
        made = read_model(Exported, folder / RECORD)
    else:
        show(0, 1, f"export to {asked.engine}")
        made = export(options, asked.engine, folder, asked.target, asked.num_tokens, "float32")
    flags = {
        "vllm": [
            *("--max-model-len", str(max_len), "--no-enable-prefix-caching", "--enforce-eager"),
        ],
        "llama.cpp": [
            *("--ctx-size", str(max_len), "--parallel", "1", "--flash-attn", "off"),
            *("-ctk", "f32", "-ctv", "f32", "-ctkd", "f32", "-ctvd", "f32"),
        ],
    }
    launch = [*made.launch, *flags[asked.engine]]
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
    """A server that answers token ids with token ids, as vLLM and llama.cpp do.

    Attributes:
        facts: its model's name and owner, and its version.
    """

    def __init__(self, url: str, max_wait_s: float) -> None:
        self._url, self._root = url, url.removesuffix("/v1")
        self._client = httpx.Client(timeout=httpx.Timeout(max_wait_s, connect=10.0))
        models = self._ask("GET", f"{url}/models").get("data")
        if not models:
            raise ValueError(f"{url}/models names no model; give the URL up to and with /v1")
        self.facts = {
            "served": models[0]["id"],
            "owner": models[0].get("owned_by", "unknown"),
            "version": self._version(),
        }

    def complete(self, prompt: list[int], num: int, ends: Sequence[int]) -> list[int]:
        """Answer greedily, the token that ended the answer included."""
        if self.facts["owner"] == "llamacpp":
            body = {"prompt": prompt, "n_predict": num, "return_tokens": True}
            reply = self._ask("POST", f"{self._root}/completion", {**body, "cache_prompt": False})
            tokens = reply.get("tokens")
        else:
            body = {"model": self.facts["served"], "prompt": prompt, "max_tokens": num}
            body |= {"return_token_ids": True, "stop_token_ids": list(ends)}
            reply = self._ask("POST", f"{self._url}/completions", body)
            tokens = reply["choices"][0].get("token_ids")
        if not tokens:
            raise ValueError(
                f"{self._url} gives no token ids with its answers, so they cannot be compared: "
                "vLLM 0.32 and llama.cpp of 2026 do"
            )
        return list(tokens)

    def _ask(self, method: str, url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            content = None if body is None else {**body, "temperature": 0}
            reply = self._client.request(method, url, json=content)
            if not reply.is_success:
                said = " ".join(reply.text.split())[:300]
                raise ValueError(f"{url} refuses, HTTP {reply.status_code}: {said}")
            return dict(reply.json())
        except httpx.HTTPError as error:
            what = f"{type(error).__name__} {error}".strip()
            raise RuntimeError(f"{url} does not answer ({what}); is the server up?") from error
        except (TypeError, KeyError) as error:
            raise ValueError(f"{url} gives an answer of another form: {reply.text[:200]!r}") from error

    def _version(self) -> str:
        for path, key in (("version", "version"), ("props", "build_info")):
            reply = self._client.get(f"{self._root}/{path}")
            if reply.is_success:
                return str(reply.json().get(key, "unknown"))
        return "unknown"
