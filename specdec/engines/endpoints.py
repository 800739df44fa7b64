"""An arm over HTTP: streams of an OpenAI-compatible server, timed where they arrive."""

import json
import os
import time
import uuid
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import torch

from specdec.bench.config import SamplingOptions, TargetConfig
from specdec.bench.figures import Table, runs_of
from specdec.bench.measure import Requests, Run
from specdec.bench.workloads import Request
from specdec.checkpoints import TargetIdentity
from specdec.checkpoints.identity import hash_of_vocabulary
from specdec.data.dialogue import load_chat
from specdec.data.endpoint import Refused, Unavailable, checked_url, raise_refusal
from specdec.demo import demo_path
from specdec.engine.metrics import AcceptanceStats
from specdec.engine.text import encode
from specdec.engines.counters import Counters, read_counters
from specdec.engines.results import EndpointConfig
from specdec.targets.hf import max_context_len

# Fields that OpenAI does not have: ids of the answer's tokens, as vLLM and llama.cpp call them, and
# no prompt out of a cache. A server that refuses them is asked without, at last by text.
_MORE = {"return_token_ids": True, "verbose": True, "return_tokens": True, "cache_prompt": False}
_FORMS: list[tuple[bool, dict[str, Any]]] = [(True, _MORE), (True, {}), (False, {})]


def shown(model: str) -> str:
    """Shorten a folder or file to its name, so that results tell no paths; a hub id stays."""
    return Path(model).name if model[0] in "./" else model


class ServedTarget:
    """A target of which only the tokenizer is here; `answers` is what a server gives."""

    device = torch.device("cpu")
    answers: Callable[[Sequence[Any], int], list[str]]

    def __init__(self, config: TargetConfig) -> None:
        from transformers import AutoConfig

        chat, folder = load_chat(config.path), Path(config.path)
        folder = demo_path("target") if config.path == "demo" else folder
        self.tokenizer, self.eos_token_ids = chat.tokenizer, sorted(chat.ends)
        self.model = SimpleNamespace(dtype=config.dtype or "unknown")
        self.max_context_len, self.vocab_size = 2**31, len(self.tokenizer)
        if (folder / "config.json").is_file():
            found = AutoConfig.from_pretrained(folder).get_text_config()
            self.max_context_len, self.vocab_size = max_context_len(found), found.vocab_size
        vocabulary = hash_of_vocabulary(self.tokenizer)
        self.identity = TargetIdentity(folder.name, None, tokenizer=vocabulary, facts={})

    def text(self, tokens: Sequence[int], *, whole: bool = False) -> str:
        """Decode tokens; special ones, as at the end of an answer, are left out if not `whole`."""
        options = {"skip_special_tokens": not whole, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(tokens, **options))

    def as_text(self, table: Table) -> Table:
        """Put characters in place of tokens, which not every server gives."""

        def spelled(run: Run) -> Run:
            return replace(run, tokens=[*map(ord, self.text(run.tokens))])

        return [[row if isinstance(row, str) else spelled(row) for row in rows] for rows in table]


class EndpointArm:
    """Asks one server one request after the other; nobody else may ask it meanwhile.

    Raises:
        ValueError: the server refuses key or model, or does not stream.
        ConnectionError: it does not answer, or no more.
    """

    cache_bytes: int | None = None
    compile_mode = "eager"

    def __init__(
        self, each: EndpointConfig, url: str, sampling: SamplingOptions, target: ServedTarget
    ) -> None:
        self._target: Any = target
        self.url, self._forms, self._gives_ids = checked_url(url), _FORMS, True
        self._key = os.environ.get(each.api_key_variable, "")
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(each.timeout_s, connect=min(each.timeout_s, 10.0)),
            limits=httpx.Limits(max_keepalive_connections=0),  # llama.cpp ends them as it likes
        )
        # Greedy decoding asks for nothing that is off: not every server knows all fields.
        given = sampling.model_dump(exclude_defaults=not sampling.temperature)
        given["repeat_penalty"] = given.get("repetition_penalty")  # llama.cpp's name
        given["min_tokens"] = given.pop("min_new_tokens", 0) or None
        self._sampling = {"temperature": 0.0} | {k: v for k, v in given.items() if v is not None}
        listed = [str(one["id"]) for one in self._get(f"{self.url}/models").get("data") or ()]
        self.model = each.model or (listed[0] if len(listed) == 1 else "")
        if not self.model or (listed and self.model not in listed):
            known = ", ".join(listed) or "does not say which models"
            raise ValueError(f"{self.url} serves {known}, not {each.model!r}; give one as model")
        self.version = self._get(f"{self.url.removesuffix('/v1')}/version").get("version", "")

    @property
    def served(self) -> str:
        """The server in words."""
        is_ids = self._forms[0][0], self._gives_ids
        sent, came = ("token ids" if each else "text" for each in is_ids)
        name = f"{shown(self.model)} {self.version}".strip()
        return f"{name}, prompts as {sent}, answers as {came}"

    def __call__(self, requests: Requests, after_step: Callable[[], None]) -> list[Run | str]:
        """Ask one after the other."""
        return [self._ask(request) for request in requests]

    def answers(self, prompts: Sequence[Any], limit: int) -> list[str]:
        """Texts of the answers to prompts; a `RuntimeError` if there is one without."""
        ids = [encode(each, self._target, place) for place, each in enumerate(prompts)]
        rows = [self._ask(Request("", "", each, limit, 0)) for each in ids]
        if failed := [row for row in rows if isinstance(row, str)]:
            raise RuntimeError(f"{self.url} gives no answers for later turns: {failed[0]}")
        return [self._target.text(run.tokens) for run in runs_of(rows)]

    def _get(self, address: str) -> dict[str, Any]:
        """The object at an address; empty where there is none."""
        try:
            reply = self._client.get(address, timeout=10.0)
        except httpx.HTTPError as error:
            what = f"does not answer ({type(error).__name__} {error}); is the server up?"
            raise ConnectionError(f"{self.url} {what}") from error
        if reply.status_code in (401, 403):
            what = f"refuses the key (HTTP {reply.status_code}); check its variable"
            raise ValueError(f"{self.url} {what}")
        with suppress(ValueError, TypeError):
            return dict(reply.json()) if reply.is_success else {}
        return {}

    def _ask(self, request: Request) -> Run | str:
        refused, bos, before = "", self._target.tokenizer.bos_token_id, self._count()
        body = {"model": self.model, "max_tokens": request.max_new_tokens, "seed": request.seed}
        body |= {"stream": True, "stream_options": {"include_usage": True}, **self._sampling}
        for place, (is_ids, more) in enumerate(self._forms):
            prompt: Any = request.prompt
            if not is_ids:  # the server puts the first token there itself
                prompt = self._target.text(prompt[prompt[0] == bos :], whole=True)
            salt = {"cache_salt": uuid.uuid4().hex} if more else {}
            try:
                run = self._stream(request, {**body, "prompt": prompt, **more, **salt})
            except Refused as error:
                refused = refused or str(error)
            except (httpx.HTTPError, json.JSONDecodeError, RuntimeError, Unavailable) as error:
                self._get(f"{self.url}/models")  # this request alone fails, or the server is gone
                return f"{type(error).__name__}: {error}"
            else:
                self._forms = self._forms[place:]
                return self._counted(run, before)
        return refused

    def _stream(self, request: Request, body: dict[str, Any]) -> Run:
        # Seconds after sending, text, and token ids or None.
        events, usage, finish = list[tuple[float, str, Any]](), dict[str, Any](), ""
        started = time.perf_counter()
        with self._client.stream("POST", f"{self.url}/completions", json=body) as reply:
            if not reply.is_success:
                reply.read()
                raise_refusal(reply, self.url, self.model, self._key)
            if "event-stream" not in reply.headers.get("content-type", ""):
                raise ValueError(f"{self.url} does not stream, so that there is nothing to time")
            for line in reply.iter_lines():
                now_s = time.perf_counter() - started
                if not line.startswith("data:") or line.endswith("[DONE]"):
                    continue
                event = json.loads(line[5:]) or {}  # llama.cpp begins some streams by null
                if error := event.get("error"):
                    raise RuntimeError(f"the stream holds an error: {error!s:.300}")
                usage = event.get("usage") or usage
                for choice in event.get("choices", ()):
                    ids = choice.get("token_ids", event.get("__verbose", {}).get("tokens"))
                    events.append((now_s, choice.get("text") or "", ids))
                    finish = choice.get("finish_reason") or finish
        if not finish:
            raise RuntimeError(f"the stream broke off after {len(events)} events")
        if usage.get("prompt_tokens") not in (None, request.num_tokens):
            read = f"{usage['prompt_tokens']} tokens of prompt, not {request.num_tokens}"
            raise RuntimeError(f"the server read {read}: it has another tokenizer, or adds tokens")
        if finish not in ("stop", "length"):
            raise RuntimeError(f"the answer ended by {finish!r}, not by the target's own end")
        times, texts, ids = zip(*events, strict=True)
        self._gives_ids = any(ids)
        if self._gives_ids:
            tokens = [token for some in ids for token in some or ()]
            ends = [*accumulate(len(some or ()) for some in ids)]
        else:
            options = {"add_special_tokens": False, "return_offsets_mapping": True}
            found = self._target.tokenizer("".join(texts), **options)
            tokens, places = found["input_ids"], [end for _, end in found["offset_mapping"]]
            ends = [bisect_right(places, end) for end in accumulate(map(len, texts))]
        if finish == "stop" and usage.get("completion_tokens") == len(tokens) + 1:
            tokens, ends[-1] = [*tokens, self._target.eos_token_ids[0]], ends[-1] + 1
        sizes = (now - then for then, now in pairwise([0, *ends]))
        chunks = [(when, size) for when, size in zip(times, sizes, strict=True) if size]
        if not chunks:
            raise RuntimeError("the answer is empty")
        when, num = (list(each) for each in zip(*chunks, strict=True))
        return Run(tokens, num[0], when[0], when[-1] - when[0], chunk_s=when, chunk_tokens=num)

    def _count(self) -> Counters | None:
        with suppress(RuntimeError, ValueError):  # nobody, or another page
            return read_counters(self.url, self._client)
        return None

    def _counted(self, run: Run, before: Counters | None) -> Run:
        """Add the server's counts; none without counters or drafts, nor after a restart."""
        after = self._count()
        found = after - before if after else None
        if found is None or found.num_drafts < 1:
            return run
        depths, accepted = found.accepted_per_position, found.num_accepted
        if accepted is None:  # SGLang; every other token is a step's own
            accepted = len(run.tokens) - 1 - found.num_drafts
        tested = tuple(num for num in (found.num_drafts, *depths) if num > 0)[: len(depths)]
        counts = found.num_drafts, found.num_drafted or 0, accepted, depths[: len(tested)], tested
        return replace(run, counted=AcceptanceStats(*counts))
