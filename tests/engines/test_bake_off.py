"""Bake-offs against fake servers: figures, refusals, and what is kept of them."""

import json
from contextlib import contextmanager

import pytest
from fake_endpoint import FakeEndpoint, letters
from tiny_chat import letter_tokenizer, lines_of, spelled
from tiny_suites import calls_of, killed
from tokenizers import decoders
from typer.testing import CliRunner

from specdec.cli import app
from specdec.engines import bake_off, launch
from specdec.engines.bake_off import check_bake_off, load_bake_off, run_bake_off
from specdec.engines.export import Exported
from specdec.engines.results import BakeOffResults

TEXTS = ("abcdefghij", "hello you there", "xyxyxyxyxy")  # ten, fifteen and ten letters


@pytest.fixture
def servers():
    """Fake servers: a plain one that gives ids, and one that drafts and gives text alone."""
    plain, drafting = FakeEndpoint(), FakeEndpoint()
    drafting.step, drafting.drafts, drafting.gives_ids = 3, [0] * 7, False
    yield plain, drafting
    plain.close()
    drafting.close()


@pytest.fixture
def asked(tmp_path, servers, monkeypatch):
    """A configuration of both servers; `asked(more, key=value)` loads it with more endpoints."""
    monkeypatch.setenv("SPECDEC_LOG", str(tmp_path / "log.jsonl"))
    tokenizer = letter_tokenizer(None)
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()  # no blanks between letters
    tokenizer.save_pretrained(tmp_path / "target")
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS) + "\n")

    def load(*more, **keys):
        plain, drafting = servers
        both = [
            {"name": "plain", "engine": "a", "url": plain.url, "model": "m"},
            {"name": "drafting", "engine": "b", "url": drafting.url, "model": "m", "drafter": "x"},
        ]
        given = {
            "target": {"path": str(tmp_path / "target"), "dtype": "float32"},
            "prompts": {"source": str(tmp_path / "prompts.txt")},
            **{"max_new_tokens": 12, "repeats": 2, "endpoints": [*both, *more], **keys},
        }
        (tmp_path / "bake-off.yaml").write_text(json.dumps(given))
        return load_bake_off(str(tmp_path / "bake-off.yaml"))

    return load


def by_name(results):
    return {arm.name: arm for arm in results.arms}


def test_arms_are_told_by_their_own_counters_and_texts(asked, servers, tmp_path):
    down = {"name": "down", "url": "http://127.0.0.1:9/v1"}
    results = run_bake_off(asked(down), tmp_path / "out")
    assert BakeOffResults.read(json.loads((tmp_path / "out/bake-off.json").read_text())) == results
    plain, drafting, failed = results.arms
    # Letters of all answers, and the end of the two that are shorter than 12.
    assert plain.tokens == drafting.tokens == 11 + 12 + 11
    assert (plain.tau, plain.speedup_vs_plain, plain.mismatches) == (None, 1.0, 0)
    # Behind the first chunk: 3 + 3 + 1 letters, 3 + 3 + 3, and 3 + 3 + 1; in two repeats.
    assert drafting.acceptance_rate == pytest.approx((4 + 6 + 4) / (4 * 9))
    assert drafting.tau == pytest.approx(1 + (4 + 6 + 4) / 9)
    assert drafting.per_depth == pytest.approx([7 / 9, 7 / 9, 0])
    assert drafting.mismatches == 0
    assert drafting.speedup_vs_engine_plain is None  # its engine has no plain arm
    assert "answers as token ids" in plain.served
    assert "answers as text" in drafting.served
    assert (results.baseline, failed.failed) == ("plain", 3)
    assert "does not answer" in failed.failures[0].reason
    assert set(results.choice) <= {"plain", "drafting"}
    with pytest.raises(RuntimeError, match="every request of the arm 'down' failed"):
        check_bake_off(results)
    (line,) = lines_of(tmp_path / "log.jsonl")
    assert [arm["tau"] for arm in line["arms"]] == [arm.tau for arm in results.arms]


def test_chunks_and_sampling_are_those_of_the_stream(asked, servers, tmp_path):
    run_bake_off(asked(sampling={"temperature": 0.5, "top_k": 3}, repeats=1), tmp_path / "out")
    rows = {call["arm"]: call["rows"][0] for call in calls_of(tmp_path / "out") if not call["call"]}
    assert rows["plain"]["chunk_tokens"] == [1] * 11
    assert rows["drafting"]["chunk_tokens"] == [3, 3, 3, 1, 1]
    assert rows["plain"]["tokens"] == rows["drafting"]["tokens"]
    for server in servers:
        body = server.requests[-1]
        assert (body["temperature"], body["top_k"], body["top_p"]) == (0.5, 3, 1.0)
        assert body["prompt"] == letters(TEXTS[2])


def refuse_fields(number, body):
    return (400, {}, {"error": "cache_salt is not known"}) if "cache_salt" in body else None


def refuse_ids(number, body):
    return (422, {}, {}) if isinstance(body["prompt"], list) else None


@pytest.mark.parametrize(("respond", "sent"), [(refuse_fields, list), (refuse_ids, str)])
def test_server_is_asked_as_it_allows(asked, servers, tmp_path, respond, sent):
    servers[1].respond = respond
    if sent is str:  # the fake one reads ids alone
        answer = servers[1].answer

        def read(path, body):
            return answer(path, {**body, "prompt": letters(body["prompt"])})

        servers[1].answer = read
    results = run_bake_off(asked(), tmp_path / "out")
    check_bake_off(results)
    assert isinstance(servers[1].requests[-1]["prompt"], sent)
    assert f"prompts as {'text' if sent is str else 'token ids'}" in results.arms[1].served


def broken(*events):
    return lambda server: setattr(server, "events", lambda found: [*found[:2], *events])


def answers(*reply):
    return lambda server: setattr(server, "respond", lambda number, body: reply)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda server: setattr(server, "models", ["other"]), "serves other, not 'm'"),
        (answers(401, {}, "wrong key"), "refuses model 'm' (HTTP 401: wrong key)"),
        (answers(404, {}, "no path"), "refuses model 'm' (HTTP 404: no path)"),
        (answers(400, {}, "too long"), "HTTP 400: too long"),
        (answers(500, {}, "oh"), "HTTP 500: oh"),
        (answers(200, {}, {"choices": []}), "does not stream"),
        (broken("drop"), "the stream broke off after 2 events"),
        (broken({"error": "out of memory"}), "the stream holds an error: out of memory"),
        (
            lambda server: setattr(
                server, "events", lambda found: [*found[:-2], {"usage": {"prompt_tokens": 1}}]
            ),
            "the server read 1 tokens of prompt, not 10: it has another tokenizer",
        ),
    ],
)
def test_fault_of_a_server_is_its_arms_reason(asked, servers, tmp_path, fault, reason):
    fault(servers[1])
    results = run_bake_off(asked(), tmp_path / "out")
    plain, drafting = results.arms
    assert (plain.failed, drafting.failed) == (0, 3)
    assert reason in drafting.failures[0].reason
    assert results.choice == ["plain"]


def test_server_that_goes_away_is_asked_again_for_what_is_missing(asked, servers, tmp_path):
    plain, drafting = servers
    drafting.respond = lambda number, body: setattr(drafting, "is_down", number == 4)
    results = run_bake_off(asked(), tmp_path / "out")
    assert "does not answer" in by_name(results)["drafting"].failures[0].reason
    assert by_name(results)["plain"].failed == 0
    drafting.is_down, drafting.respond = False, lambda number, body: None
    num_plain, num_drafting = len(plain.requests), len(drafting.requests)
    check_bake_off(run_bake_off(asked(), tmp_path / "out"))
    assert len(plain.requests) == num_plain
    assert len(drafting.requests) - num_drafting == 1 + 4  # a warm-up, and what was missing


def test_restarted_server_or_one_without_counters_has_no_tau(asked, servers, tmp_path):
    servers[1].drafts = [10**6] * 7
    servers[1].events = lambda found: setattr(servers[1], "drafts", [0] * 7) or found
    assert by_name(run_bake_off(asked(repeats=1), tmp_path / "out"))["drafting"].tau is None
    servers[1].drafts = None
    assert by_name(run_bake_off(asked(repeats=1), tmp_path / "2"))["drafting"].tau is None


def test_interrupted_run_goes_on_call_by_call(asked, servers, tmp_path):
    config = asked()
    killed(lambda done, text: done == 7, run_bake_off, config, tmp_path / "out")
    before = [len(server.requests) for server in servers]
    assert len(calls_of(tmp_path / "out")) == 7
    results = run_bake_off(config, tmp_path / "out")
    check_bake_off(results)
    assert sum(len(server.requests) for server in servers) - sum(before) == 12 - 7 + 2
    assert run_bake_off(config, tmp_path / "out") == results
    with pytest.raises(ValueError, match=r"config\.max_new_tokens is 12 there, not 9"):
        run_bake_off(asked(max_new_tokens=9), tmp_path / "out")


@pytest.mark.parametrize("num_other", [1, 3])
def test_other_texts_fail_the_run_and_another_model_is_told(asked, servers, tmp_path, num_other):
    others = sorted(TEXTS)[:num_other]
    servers[1].spell = lambda text: text.upper() if text[::-1] in others else text
    results = run_bake_off(asked(), tmp_path / "out")
    assert by_name(results)["drafting"].mismatches == num_other
    assert by_name(results)["drafting"].differences[0].position == 0
    said = "outputs differ at temperature 0" if num_other == 1 else "most greedy texts of drafting"
    with pytest.raises(RuntimeError, match=said):
        check_bake_off(results)
    assert ("drafting" in results.choice) <= (num_other == 1)


def test_later_turns_follow_the_first_endpoints_answers(asked, servers, tmp_path):
    keys = {"suite": "multi_turn", "turns": 2, "conversations": 2, "repeats": 1}
    config = asked(**keys)
    results = run_bake_off(config, tmp_path / "out")
    check_bake_off(results)
    assert [group.name for group in results.groups] == ["turn 1", "turn 2"]
    assert servers[0].requests[0]["temperature"] == 0
    later = spelled(max((body["prompt"] for body in servers[1].requests), key=len))
    first = next(text for text in TEXTS if later.startswith(text))
    assert later[len(first) + 1 :].startswith(first[::-1][:12])
    num = len(servers[0].requests)
    run_bake_off(config, tmp_path / "out")
    assert len(servers[0].requests) == num  # nor are they asked for again


def test_engines_are_started_in_turn_and_one_that_fails_is_told(
    asked, servers, tmp_path, monkeypatch
):
    said = []

    @contextmanager
    def start(words, *, engine, log, env):
        said.append((words, env["OMP_NUM_THREADS"]))
        if engine == "llama.cpp":
            raise RuntimeError("llama.cpp ended with status 1")
        yield servers[1].url if "--speculative-config" in words else servers[0].url
        said.append("stopped")

    def export(drafter, engine, out, target, num_tokens, dtype):
        words = ["vllm", "serve", target, "--dtype", dtype, "--speculative-config", f"{num_tokens}"]
        about = {"kind": "x", "method": "x", "drafter": drafter, "target": target, "folder": ""}
        return Exported(engine=engine, num_tokens=num_tokens, dtype=dtype, launch=words, **about)

    monkeypatch.setattr(launch, "start", start)
    monkeypatch.setattr("specdec.engines.export.export", export)
    engines = [
        {"engine": "vllm", "model": "m", "flags": ["--seed", "1"]},
        {"engine": "vllm", "model": "m", "drafter": "head", "num_draft_tokens": 4},
        {"engine": "llama.cpp", "launch": ["llama-server"]},
        {"engine": "sglang"},
    ]
    results = run_bake_off(asked(endpoints=engines, threads=3), tmp_path / "out")
    serve = ["vllm", "serve", str(tmp_path / "target"), "--dtype", "float32"]
    drafts = [*serve, "--speculative-config", "4"]
    plain = ([*serve, "--seed", "1"], "3")
    assert said == [plain, "stopped", (drafts, "3"), "stopped", (["llama-server"], "3")]
    arms = by_name(results)
    assert list(arms) == ["vllm", "vllm head", "llama.cpp", "sglang"]
    assert arms["vllm head"].speedup_vs_engine_plain == arms["vllm head"].speedup_vs_plain > 0
    assert "ended with status 1" in arms["llama.cpp"].failures[0].reason
    assert "give launch" in arms["sglang"].failures[0].reason


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"suite": "concurrent"}, "measure its load by GuideLLM"),
        ({"batch_size": 2}, "measure its load by GuideLLM"),
        ({"endpoints": []}, "endpoints"),
        ({"endpoints": [{"name": "a"}]}, "neither url"),
        ({"endpoints": [{"engine": "vllm"}, {"engine": "vllm"}]}, "'vllm' is used twice"),
    ],
)
def test_what_no_bake_off_can_be_is_refused(asked, keys, message):
    with pytest.raises(ValueError, match=message):
        asked(**keys)


# --- Load, log and command ---


def guidellm():
    """A report with the keys that GuideLLM 0.8.1 writes and we read."""

    def metric(mean):
        ends = {f"p{n}": mean * n / 50 for n in (50, 95, 99)}
        return {"successful": {"mean": mean, "percentiles": ends}}

    keys = {"time_to_first_token_ms": 20.0, "inter_token_latency_ms": 3.0, "request_latency": 0.5}
    metrics = {key: metric(mean) for key, mean in keys.items()}
    metrics["output_tokens_per_second"] = metric(380.0)
    metrics["request_totals"] = {"successful": 4, "errored": 1, "incomplete": 0, "total": 5}
    strategy = {"type_": "concurrent", "streams": 2}
    return {"benchmarks": [{"config": {"strategy": strategy}, "metrics": metrics, "requests": {}}]}


def test_load_of_a_report_stands_beside_the_arms(servers, asked, tmp_path):
    asked()
    (tmp_path / "report.json").write_text(json.dumps(guidellm()))
    options = ["--endpoint", servers[1].url, "--model", "m", "--out", str(tmp_path / "out")]
    config = json.loads((tmp_path / "bake-off.yaml").read_text())
    del config["endpoints"]
    (tmp_path / "one.yaml").write_text(json.dumps(config))
    command = [
        "bench",
        str(tmp_path / "one.yaml"),
        *options,
        "--load",
        str(tmp_path / "report.json"),
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    results = bake_off.BakeOffResults.read(json.loads((tmp_path / "out/bake-off.json").read_text()))
    (row,), (arm,) = results.loads, results.arms
    assert (row.load, row.requests, row.failed, row.tokens_per_s) == ("concurrent 2", 5, 1, 380.0)
    assert row.ttft_s["p50"], row.latency_s["p95"] == (0.02, 0.95)
    assert (arm.name, arm.tau, results.baseline) == ("endpoint", pytest.approx(1 + 14 / 9), None)
    (tmp_path / "report.json").write_text('{"benchmarks": [{}]}')
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "no report of GuideLLM" in done.stderr
