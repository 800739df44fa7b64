"""Hold a drafter in a serving engine against our own loop: the same texts, the same counts."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from specdec.bench.config import SamplingOptions, TargetConfig
from specdec.bench.prompts import encode_prompts, load_prompts
from specdec.bench.workloads import Request
from specdec.checkpoints import head_of
from specdec.checkpoints.find import find_drafter
from specdec.common.config import Config, read_model, validated, write_model
from specdec.common.files import Journal, file_hash
from specdec.common.provenance import CodeProvenance, code
from specdec.engine.decode import generate, generate_baseline
from specdec.engine.metrics import AcceptanceStats
from specdec.engines.config import AdmitConfig
from specdec.engines.counters import read_counters
from specdec.engines.endpoints import EndpointArm, ServedTarget, shown
from specdec.engines.export import RECORD, Exported, export
from specdec.engines.launch import EXACT, start, without_drafter
from specdec.engines.results import EndpointConfig
from specdec.registry import strategy
from specdec.targets.load import load_target

FILE, JOURNAL = "admission.json", "admission.jsonl"
_ROWS = 8  # of our own batches


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
    ours: Counter[str]
    theirs: Counter[str] | None
    provenance: CodeProvenance

    @property
    def is_equal(self) -> bool:
        """All texts, and all counts that there are."""
        return not self.differences and self.theirs in (None, self.ours)

    @property
    def verdict(self) -> str:
        """One line, as a card has it."""
        found, verb = self.theirs or self.ours, "admitted" if self.is_equal else "not admitted"
        how = "equal at every position" if self.is_equal else f"{self.ours['accepted']} here"
        how = how if self.theirs else "counted here alone"
        return (
            f"{verb} by {self.engine} {self.version}: {found['accepted']} of {found['drafted']} "
            f"accepted, {how}; {self.equal_texts['drafter']} of {self.num_prompts} texts equal"
        )


def admit(
    drafter: str, asked: AdmitConfig, out: Path, show: Callable[[int, int, str], None]
) -> Admission:
    """Decode prompts in an engine and in our loop, and compare texts and counts of drafts.

    The engine's answers are kept in `out` one by one; the same call goes on where it ended.

    Raises:
        ValueError: input that cannot work, or a server of another model.
        RuntimeError: the engine does not start, or answers no more.
    """
    is_started, limit = "://" not in asked.engine, asked.max_new_tokens
    if is_started and asked.engine not in EXACT:
        known = f"{' or '.join(EXACT)}, or the URL of a server that runs"
        raise ValueError(f"engine is {asked.engine!r} but must be {known}")
    options, head = find_drafter(drafter)
    num_tokens = min(asked.num_tokens, (head and head_of(head).max_depth) or asked.num_tokens)
    options |= _as_chain(options["type"], num_tokens)
    path = asked.target or (head and head.target and head.target.name) or "demo"
    path = "demo" if path == "target" else path  # as embedded heads name it
    target = load_target(path, dtype="float32")
    sources = asked.prompts.split(",")
    prompts = [each for source in sources for each in load_prompts(source.strip(), asked.num)]
    ids = encode_prompts(prompts, target)
    max_len = max(map(len, ids)) + limit + 2 * num_tokens
    if max_len > target.max_context_len:
        what = f"max_new_tokens is {limit}, but with them and two drafts the longest prompt has"
        raise ValueError(f"{what} {max_len} tokens, the context {target.max_context_len}")
    weights = sorted(Path(options.get("path", "-")).glob("*.safetensors"))
    identity = {"drafter": options, "weights": [file_hash(each) for each in weights]}
    arms = ["plain", "drafter"] if is_started and asked.plain else ["drafter"]
    with Journal(out / JOURNAL, {**identity, **asked.model_dump()}) as journal:
        rows = {(row["arm"], row["prompt"]): row for row in journal.entries}
        for arm in arms:
            left = [i for i in range(len(ids)) if (arm, i) not in rows]
            if not left:
                continue
            show(left[0], len(ids), f"{asked.engine}, {arm}")
            requests = [Request(prompts[i].id, "", ids[i], limit, 0) for i in left]
            with _served(asked, options, arm, max_len, out) as url:
                for i, answer in zip(left, _answers(url, requests, path), strict=True):
                    rows[arm, i] = {"arm": arm, "prompt": i, **answer}
                    journal.append(rows[arm, i])
                    show(i + 1, len(ids), f"{asked.engine}, {arm}")
    show(0, 1, "our own loop")
    plain = generate_baseline(target, ids, max_new_tokens=limit, batch_size=_ROWS)
    # Drafts are whole up to the limit, as vLLM's are.
    ours = generate(target, options, ids, max_new_tokens=limit + num_tokens, batch_size=_ROWS)
    show(1, 1, "our own loop")
    differences = []
    for (arm, i), row in sorted(rows.items()):
        for place, (mine, other) in enumerate(zip_longest(plain[i].tokens, row["tokens"])):
            if mine != other:
                found = {"position": place, "ours": mine, "engine": other}
                differences.append(Difference(arm=arm, prompt=prompts[i].id, **found))
                break
    wrong = Counter(each.arm for each in differences)
    drafted = [rows["drafter", i] for i in range(len(ids))]
    facts, log = dict(drafted[-1]["server"]), out / "drafter.log"
    if log.exists() and (said := re.match(r"xllamacpp (\S+)", log.read_text())):
        facts["version"] = said[1]
    if wrong["drafter"] == len(ids):
        raise ValueError(
            f"{facts['model']!r} gives none of the {len(ids)} texts of {path!r}: it is another "
            f"model, or does not run in float32; its answers are in {out}"
        )
    facts["model"] = shown(facts["model"])
    theirs = sum((Counter[str](row["counts"]) for row in drafted), Counter[str]())
    is_known = facts["engine"] in ("vllm", "llama.cpp") and bool(theirs)
    rules = facts["engine"].replace(".", "") if is_known else "vllm"
    stats = (AcceptanceStats.as_engine(rules, each.records, limit) for each in ours)
    admission = Admission(
        **{"drafter": drafter, "kind": options["type"], "asked": asked, **facts},
        target=shown(path),
        num_tokens=num_tokens,
        num_prompts=len(ids),
        equal_texts={arm: len(ids) - wrong[arm] for arm in arms},
        differences=differences,
        ours=sum(map(_named, stats), Counter[str]()),
        theirs=theirs if is_known else None,
        provenance=CodeProvenance(**code()),
    )
    write_model(out / FILE, admission)
    return admission


def _as_chain(kind: str, num_tokens: int) -> dict[str, Any]:
    """Options that make a strategy draft chains of this length, and forget earlier answers."""
    shape = strategy(kind).shape_options
    if "depth" in shape.names:
        return {shape.names["depth"]: num_tokens, shape.names["width"]: 1}
    if "choices" in shape.fixed:
        return {"choices": [[0] * level for level in range(1, num_tokens + 1)]}
    # An engine's rows never see the end of an answer, so they cannot remember the same.
    remembers = "num_remembered" in signature(strategy(kind)).parameters
    memory = {"num_remembered": 0} if remembers else {}
    return {**dict.fromkeys(shape.names.values(), num_tokens), **memory}


def _named(stats: AcceptanceStats) -> Counter[str]:
    places = {f"accepted at {place}": num for place, num in enumerate(stats.accepted_at, start=1)}
    totals = {"drafts": stats.num_steps, "drafted": stats.num_drafted}
    return Counter({**totals, "accepted": stats.num_accepted, **places})


def _served(
    asked: AdmitConfig, options: Mapping[str, Any], arm: str, max_len: int, out: Path
) -> AbstractContextManager[str]:
    """The URL of the server that runs, or of one that is started, with or without drafter."""
    if "://" in asked.engine:
        return nullcontext(asked.engine)
    folder = out.resolve() / "export"
    if (folder / RECORD).exists():
        made = read_model(Exported, folder / RECORD)
    else:
        made = export(options, asked.engine, folder, asked.target, asked.num_tokens, "float32")
    launch = [*made.launch, *EXACT[asked.engine], str(max_len)]
    launch = launch if arm == "drafter" else without_drafter(launch)
    return start(launch, engine=asked.engine, log=out / f"{arm}.log", env=made.environment)


def _answers(url: str, requests: Sequence[Request], target: str) -> Iterator[dict[str, Any]]:
    """Let the engine answer greedily; yields tokens, counts and what it is."""
    served = ServedTarget(TargetConfig(path=target))
    arm = EndpointArm(validated(EndpointConfig, {"url": url}), url, SamplingOptions(), served)
    for request in requests:
        [run] = arm([request], lambda: None)
        if isinstance(run, str):
            raise RuntimeError(f"{url}, prompt {request.id!r}: {run}; the same command goes on")
        counters = read_counters(url)
        engine = counters.engine.replace("llamacpp", "llama.cpp") if counters else url
        facts = {"engine": engine, "model": arm.model}
        facts["version"] = arm.version or "?"
        yield {"tokens": run.tokens, "counts": run.counted and _named(run.counted), "server": facts}
