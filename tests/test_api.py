"""Arguments of callers are taken in every plain form, or refused by name at the edge."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_target

from specdec import (
    Engine,
    OnlineController,
    SamplingConfig,
    Schedule,
    generate,
    load_drafter,
    load_target,
)
from specdec.drafters.ngram import NgramDrafter
from specdec.targets.hf import HFTarget

NAN, INF = float("nan"), float("inf")
CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def target():
    return load_target("demo")


def ids(target, text):
    return target.tokenizer(text)["input_ids"]


# What is given as prompts, and the prompts that it is.
PROMPTS = [
    (lambda t: "Hi", lambda t: [ids(t, "Hi")]),
    (lambda t: ("Hi", [3, 4]), lambda t: [ids(t, "Hi"), [3, 4]]),
    (lambda t: [3, np.int64(4), torch.tensor(5)], lambda t: [[3, 4, 5]]),
    (lambda t: np.array([3, 4]), lambda t: [[3, 4]]),
    (lambda t: torch.tensor([[3, 4], [5, 6]]), lambda t: [[3, 4], [5, 6]]),
    (lambda t: [torch.tensor([3, 4]), np.array([5])], lambda t: [[3, 4], [5]]),
    (
        lambda t: {"input_ids": [torch.tensor([3, 4])], "attention_mask": [torch.tensor([0, 1])]},
        lambda t: [[4]],
    ),
    (lambda t: t.tokenizer("Hi"), lambda t: [ids(t, "Hi")]),
    (lambda t: [t.tokenizer("Hi", return_tensors="pt")], lambda t: [ids(t, "Hi")]),
    (
        lambda t: t.tokenizer(["Hi you", "Hi"], padding=True, return_tensors="pt"),
        lambda t: [ids(t, "Hi you"), ids(t, "Hi")],
    ),
    (lambda t: CHAT, lambda t: [t.tokenizer.apply_chat_template(CHAT, return_dict=False)]),
]


@pytest.mark.parametrize(("given", "expected"), PROMPTS)
def test_prompts_are_taken_in_every_form(target, given, expected):
    results = generate(target, None, given(target), max_new_tokens=1)
    # A chat's prompt ends with the opening of the answer.
    for result, prompt in zip(results, expected(target), strict=True):
        assert result.prompt_tokens[: len(prompt)] == prompt


def test_short_forms_equal_long_ones(target):
    expected = generate(target, NgramDrafter(), ["Hi, hi, hi, hi,"], max_new_tokens=9)[0]
    for options in (
        {"target": "demo", "drafter": "ngram", "sampling": None},
        {"drafter": {"type": "ngram"}, "sampling": {"temperature": 0}, "stop": "\0"},
        {"drafter": "ngram", "max_new_tokens": np.int64(9), "draft_length": 8, "batch_size": 99},
        {"drafter": NgramDrafter(), "draft_length": {1: 8}, "max_new_tokens": torch.tensor([9])},
    ):
        given = {"target": target, "prompts": ["Hi, hi, hi, hi,"], "max_new_tokens": 9, **options}
        assert generate(**given)[0].tokens == expected.tokens
    limited = generate(target, MODEL, "Hi", max_new_tokens=9, draft_length=1)[0]
    assert max(record.num_drafted for record in limited.records) == 1
    seeded = SamplingConfig(temperature=1, seed=np.int64(2**63 - 1))
    assert len(generate(target, None, [[3], [4]], seeded, max_new_tokens=2)) == 2


# Options of `generate`, what they are given, and what the refusal says.
REFUSED = [
    ("target", [None, 5, HFTarget, NgramDrafter()], "target is"),
    ("target", [lambda t: t.model], "HFTarget"),
    ("drafter", [5, False, ["ngram"], NgramDrafter, lambda t: t], "drafter is"),
    ("drafter", [{}, {"type": None}], "drafter type is"),
    ("drafter", [{"type": "draft_model"}], "needs the option 'path'"),
    ("drafter", [{"type": "ngram", "max_ngram": "wide"}], "max_ngram='wide'"),
    ("drafter", ["ngramm"], "did you mean 'ngram'"),
    ("drafter", [{"type": "ngram", "max_ngrams": 3}], "did you mean 'max_ngram'"),
    ("prompts", [[]], "prompts is empty"),
    ("prompts", [[[]], [""]], "prompt 0 is empty"),
    ("prompts", [[[3], [1] * 10**4]], r"prompt 1 has 10000 tokens .* shorten"),
    ("prompts", [[[1, 10**4]]], "token 10000"),
    ("max_new_tokens", [[3, 4]], "max_new_tokens has 2 entries"),
    ("sampling", [[None, None]], "sampling has 2 entries"),
    ("prompts", [None, 5, b"a", {"Hi"}, {"a": 1}, (x for x in "a"), np.array(3)], "prompts is"),
    ("prompts", [[None], [5.0], [b"a"], np.array([True]), torch.rand(2)], "prompt 0 is"),
    ("prompts", [[[1.0]], [[True]], [["a"]], [[3, "a"]], [[{"role": "user"}]]], "prompt 0 holds"),
    ("prompts", [[*CHAT, "a"], [CHAT, *CHAT]], "prompts mixes"),
    (
        "prompts",
        [{"input_ids": [[3, 4]], "attention_mask": each} for each in ([1], [[1]], [[1, 1]] * 2, 5)],
        "attention_mask",
    ),
    ("prompts", ["\ud800"], "prompt 0 cannot be tokenized"),
    ("sampling", [5, "greedy", True, SamplingConfig, [5], {"temprature": 1}], "sampling is"),
    ("sampling", [{"temperature": True}], "temperature is"),
    ("max_new_tokens", [0, -1, True, "5", 2.0, NAN, None, ["2"], [True]], "max_new_tokens is"),
    ("stop", [[""], ""], "stop is .* an empty string"),
    ("stop", [[1], 5, b"a", {"a"}], "stop is"),
    ("max_time_s", [NAN, INF, "1", 0, True, 10**400], "max_time_s is"),
    ("batch_size", [0, True, "1", 1.0], "batch_size is"),
    ("rule", [None, "Token", [], 5], "rule is"),
    ("draft_length", [True, 2.5, "auto", object(), [3], Schedule], "draft_length is"),
    ("draft_length", [-1, {2: 3}, {1: 2.5}, {True: 3}], "batch size|nodes is"),
    ("check", [1, "yes", None], "check is"),
]


@pytest.mark.parametrize(("name", "values", "message"), REFUSED)
def test_impossible_argument_is_refused_by_name(target, name, values, message):
    for value in values:
        value = value(target) if getattr(value, "__name__", "") == "<lambda>" else value
        given = {"target": target, "drafter": None, "prompts": "Hi", "max_new_tokens": 2}
        with pytest.raises((ValueError, TypeError), match=message):
            generate(**{**given, name: value})


MODEL = {"type": "draft_model", "path": "demo"}
HYBRID = {"type": "hybrid", "drafters": ["ngram", "suffix"]}
CALLS = [
    (lambda t: Engine(t, max_rows=1.5), "max_rows is 1.5"),
    (lambda t: Engine(t, max_rows=0), "max_rows is 0"),
    (lambda t: Engine(t, {**MODEL, "width": 2}, rule="block"), "rule 'block' judges chains only"),
    (lambda t: Engine(t, join_chunk=0), "join_chunk is 0"),
    (lambda t: Engine(t, max_cache_bytes="1"), "max_cache_bytes is '1'"),
    (lambda t: Engine(t).submit("Hi", {"logit_bias": {9999: 1.0}}), "token 9999"),
    (lambda t: Engine(t).submit("Hi", {"bad_words": [[9999]]}), "token 9999"),
    (lambda t: Engine(t).submit([[3], [4]]), r"prompt 0 holds \[3\]"),
    (lambda t: Engine(t).result(True), "index is True"),
    (lambda t: SamplingConfig(presence_penalty=1e300), r"presence_penalty is 1e\+300"),
    (lambda t: SamplingConfig(min_new_tokens=10**30), "min_new_tokens is 1"),
    (lambda t: OnlineController({1: {0: 1.0, 1: NAN}}), "step_s is"),
    (lambda t: OnlineController({1: {0: 1.0, 10**9: 2.0}}), r"nodes \[0, 1000000000\] but must"),
    (lambda t: Schedule(None), "nodes is None"),
    (lambda t: load_target(None), "path is None"),
    (lambda t: load_target("demo", dtype=5), "dtype is 5"),
    (lambda t: load_target("demo", quantization="3bit"), "quantization is '3bit'"),
    (lambda t: load_target("demo", device=[]), r"device is \[\]"),
    (lambda t: load_target("demo", trust_remote_code="no"), "trust_remote_code is 'no'"),
    (lambda t: HFTarget("demo"), "model is a str"),
    (lambda t: load_drafter(5, t), "drafter is 5"),
    (lambda t: load_drafter("eagle", None), "target is None"),
    (lambda t: load_drafter({"type": "hybrid", "drafters": "ngram"}, t), "drafters is 'ngram'"),
    (lambda t: load_drafter({**HYBRID, "enough": "x"}, t), "enough is 'x'"),
]
# Options of drafters that no value below fits.
CALLS += [
    (lambda t, o=option, v=value: load_drafter({**o[0], o[1]: v}, t), option[1])
    for option in (
        ({"type": "ngram"}, "max_ngram"),
        ({"type": "suffix"}, "factor"),
        (HYBRID, "max_nodes"),
        (HYBRID, "calibrate"),
        (MODEL, "num_draft_tokens"),
        ({"type": "medusa"}, "choices"),
        ({"type": "eagle"}, "depth"),
        ({"type": "eagle3"}, "force"),
    )
    for value in ("x", NAN, -1, {}, [0.5], 10**9 if option[1] != "factor" else INF)
]


def test_other_entrances_refuse_by_name(target):
    for call, message in CALLS:
        with pytest.raises((ValueError, TypeError), match=message):
            call(target)


def test_target_without_tokenizer_refuses_text():
    for prompt in ("Hi", CHAT):
        with pytest.raises(ValueError, match="no tokenizer"):
            generate(tiny_target(), None, prompt)


def test_wrong_draft_length_answer_is_refused(target, monkeypatch):
    for answer in (-1, True, 2.5, "3"):
        monkeypatch.setattr(Schedule, "choose", lambda self, size, answer=answer: answer)
        with pytest.raises(ValueError, match="draft_length chose"):
            generate(target, "ngram", "Hi", draft_length=4)


BLOCK = r"```python\n(.*?)```"
DOCS = Path(__file__).parent.parent / "docs"
EXAMPLES = [
    pytest.param(block, expected, id=f"{page} {number}")
    for page, outputs in (("engine", ["length"]), ("verify", ["tensor([[", "engine: passed"]))
    for number, (block, expected) in enumerate(
        zip(re.findall(BLOCK, (DOCS / f"{page}.md").read_text(), re.S), outputs, strict=True)
    )
]


@pytest.mark.parametrize(("block", "expected"), EXAMPLES)
def test_example_of_a_manual_runs(block, expected, capsys):
    exec(compile(block, "example", "exec"), {})
    assert expected in capsys.readouterr().out
