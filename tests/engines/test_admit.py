"""`specdec admit` against a server that is played: what it is given it serves, as vLLM would."""

import pytest
from fake_endpoint import FakeEndpoint
from typer.testing import CliRunner

from specdec import generate, load_target
from specdec.bench.prompts import encode_prompts, load_prompts
from specdec.cli import app
from specdec.common.config import read_model
from specdec.engine.metrics import AcceptanceStats
from specdec.engines.admit import FILE, Admission
from specdec.report.cards import add_to_card

NUM, LIMIT, K = 3, 20, 3


@pytest.fixture(scope="module")
def answers():
    """Tokens and counts of every prompt, as vLLM has them."""
    target, found = load_target("demo", dtype="float32"), {}
    prompts = encode_prompts(load_prompts("demo", NUM), target)
    ngram = {"type": "ngram", "num_draft_tokens": K}
    for result in generate(target, ngram, prompts, max_new_tokens=LIMIT + K):
        stats = AcceptanceStats.as_engine("vllm", result.records, LIMIT)
        totals = [stats.num_steps, stats.num_drafted, stats.num_accepted]
        counts = [*totals, *stats.accepted_at, *[0] * K][: 3 + K]
        found[tuple(result.prompt_tokens)] = result.tokens[:LIMIT], counts
    return found


@pytest.fixture
def server(answers):
    """Serves these answers, and counts their drafts, as vLLM would."""
    fake = FakeEndpoint()
    fake.models, fake.drafts, fake.answers = ["served"], [0] * (3 + K), dict(answers)

    def stream(path, body):
        asked = [body[key] for key in ("temperature", "return_token_ids", "max_tokens")]
        assert asked == [0, True, LIMIT]
        tokens, counts = fake.answers.get(tuple(body["prompt"]), (None, ()))
        if tokens is None:
            return ["drop"]
        fake.drafts = [a + b for a, b in zip(fake.drafts, counts, strict=True)]
        return [{"choices": [{"text": "", "token_ids": tokens, "finish_reason": "length"}]}]

    fake.stream = stream
    yield fake
    fake.close()


def invoke(url, out, limit=LIMIT):
    options = {"engine": url, "num": NUM, "max-new-tokens": limit, "num-tokens": K, "out": out}
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return CliRunner().invoke(app, ["admit", "ngram", *flags])


def test_equal_server_is_admitted_and_its_answers_are_kept(server, answers, tmp_path):
    server.answers.popitem()  # it breaks off at the last prompt
    broken = invoke(server.url, tmp_path)
    assert broken.exit_code == 1
    assert "the stream broke off after 0 events; the same command goes on" in broken.stderr
    server.answers = {k: v for k, v in answers.items() if k not in server.answers}
    done = invoke(server.url, tmp_path)
    assert done.exit_code == 0, done.stderr
    found = read_model(Admission, tmp_path / FILE)
    assert found.is_equal
    assert found.equal_texts == {"drafter": NUM}
    assert found.theirs == found.ours
    accepted, drafted = (sum(counts[i] for _, counts in answers.values()) for i in (2, 1))
    assert accepted
    verdict = f"admitted by vllm ?: {accepted} of {drafted} accepted, equal at every position"
    assert f"{verdict}; 3 of 3 texts equal" in done.stdout


def test_other_token_and_other_count_are_told_with_their_place(server, tmp_path):
    first, second, _ = server.answers
    tokens, counts = server.answers[first]
    server.answers[first] = [*tokens[:5], 7, *tokens[6:]], counts
    tokens, counts = server.answers[second]
    more = [1, K, 1, 0, 1, 0]
    server.answers[second] = tokens, [a + b for a, b in zip(counts, more, strict=True)]
    done = invoke(server.url, tmp_path)
    assert done.exit_code == 1
    assert "failed" not in done.stderr
    found, ids = read_model(Admission, tmp_path / FILE), [p.id for p in load_prompts("demo", NUM)]
    [wrong] = found.differences
    assert (wrong.arm, wrong.prompt, wrong.position, wrong.engine) == ("drafter", ids[0], 5, 7)
    assert found.theirs["accepted at 2"] == found.ours["accepted at 2"] + 1
    assert f"not admitted by vllm ?: {found.theirs['accepted']} of" in done.stdout

    card = tmp_path / "README.md"
    card.write_text(
        "# Mine\n\n## In serving engines\n\n- admitted by sglang 1: x\n- by vllm 0.1: y\n"
    )
    assert add_to_card(tmp_path, found) == card
    text = card.read_text()
    assert text.startswith(
        "# Mine\n\n## In serving engines\n\n- admitted by sglang 1: x\n- not adm"
    )
    assert "vllm 0.1" not in text


def test_server_that_cannot_be_compared_is_refused(server, answers, tmp_path):
    def refused(message, status=2, limit=LIMIT, url=server.url):
        done = invoke(url, tmp_path / str(len(message)), limit)
        assert done.exit_code == status
        assert message in " ".join(done.stderr.split())

    refused("with them and two drafts the longest prompt has", limit=5000)
    server.answers = {prompt: ([3, 3], counts) for prompt, (_, counts) in answers.items()}
    refused("'served' gives none of the 3 texts of 'demo': it is another model, or does not run in")
    server.answers = {prompt: ([], counts) for prompt, (_, counts) in answers.items()}
    refused("the answer is empty; the same command goes on", status=1)
    server.models = []
    refused("serves does not say which models, not None; give one as model")
    refused("does not answer (ConnectError", status=1, url="http://127.0.0.1:9/v1")
    refused("engine is 'tgi' but must be vllm or llama.cpp, or the URL of a server", url="tgi")
