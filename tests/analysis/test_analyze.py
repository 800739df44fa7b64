"""`specdec analyze`: what it writes, what it refuses, and how it goes on after a kill."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from json_schema import violations
from safetensors.numpy import load_file
from tiny_models import perturbed, tiny_llama, tiny_target
from typer.testing import CliRunner

from specdec import SamplingConfig
from specdec.analysis.predict import Predictor
from specdec.analysis.run import run_analysis
from specdec.analysis.teacher_forced import CLASSES, classify, reliability
from specdec.analysis.texts import Text, read_texts, target_answers
from specdec.bench.config import load_config
from specdec.cli import app
from specdec.targets.load import load_target

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "analyze.schema.json").read_text())
ARMS = """
  - {name: lookup, type: ngram, options: {min_ngram: 1}}
  - {name: draft, type: draft_model, options: {path: DRAFT, num_draft_tokens: 3}}
  - {name: tree, type: draft_model, options: {path: DRAFT, num_draft_tokens: 3, width: 2}}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A target and a draft model with one letter a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models")
    inner = Tokenizer(models.WordLevel({chr(32 + i): i for i in range(97)}, unk_token="~"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="~")
    for name, model in (("target", tiny_llama()), ("draft", perturbed(tiny_llama(), 0.1))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def config(models, tmp_path):
    """The path of a bench's YAML."""
    (tmp_path / "prompts.txt").write_text("abcabc\nhello hello\nx y z 1 2 3\n")
    path = tmp_path / "bench.yaml"
    path.write_text(
        f"target: {{path: {models / 'target'}}}\n"
        f"prompts: {{source: {tmp_path / 'prompts.txt'}}}\n"
        "max_new_tokens: 12\nthreads: 1\narms:" + ARMS.replace("DRAFT", str(models / "draft"))
    )
    return str(path)


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_the_analysis_follows_its_schema_and_says_what_it_is_made_of(config, tmp_path, temperature):
    settings = load_config(config, [f"sampling.temperature={temperature}"])
    analysis = run_analysis(settings, tmp_path / "out")
    assert violations(analysis, SCHEMA) == []
    assert json.loads((tmp_path / "out" / "analysis.json").read_text()) == analysis
    lookup, draft, tree = analysis["drafters"]
    assert (lookup["method"], draft["method"], tree["method"]) == ("replay", "evidence", "evidence")
    assert draft["alpha"] == tree["alpha"] > 0.3
    assert lookup["alpha"] is None
    chains = [row["tau"] for row in draft["expected"]["chains"]]
    assert chains == sorted(chains)
    assert chains[2] == pytest.approx(draft["configured"]["tau"])
    thresholds = [row["tau"] for row in draft["expected"]["thresholds"]]
    assert thresholds == sorted(thresholds, reverse=True)
    evidence = load_file(tmp_path / "out" / "evidence.safetensors")
    assert evidence["draft/rank"].shape == (3, 11, 10)
    valid = evidence["draft/target_prob"][:, :, 0] > 0
    assert evidence["draft/overlap"][:, :, 0][valid].mean() == pytest.approx(draft["alpha"])
    for each in analysis["drafters"]:
        counts = [sum(row["count"] for row in each[key]) for key in ("entropy_bins", "positions")]
        assert counts[0] == counts[1] > 0
        steps = sum(each["configured"]["steps"])
        accepted = sum(each["configured"]["accepted_at"])
        assert each["configured"]["tau"] == pytest.approx(1 + accepted / steps)


def test_hardest_contexts_are_mistakes_with_their_text(config, tmp_path):
    analysis = run_analysis(load_config(config), tmp_path / "out")
    hardest = analysis["drafters"][1]["hardest"]
    assert hardest
    for each in hardest:
        assert each["drafted"] != [each["target"]]
        assert each["p"] > each["q"]
        assert each["before"]
    surprises = [each["q"] for each in hardest]
    assert surprises == sorted(surprises)


def test_a_killed_analysis_goes_on_with_the_next_drafter(config, tmp_path, monkeypatch):
    from specdec.analysis import run

    real, described = run.describe, []

    def killed_at_the_second(predictor, facts, name, options):
        described.append(name)
        if len(described) == 2:
            raise KeyboardInterrupt
        return real(predictor, facts, name, options)

    monkeypatch.setattr(run, "describe", killed_at_the_second)
    assert invoke("analyze", config, "--out", tmp_path / "out").exit_code == 130
    done = invoke("analyze", config, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert described == ["lookup", "draft", "draft", "tree"]
    whole = run_analysis(load_config(config), tmp_path / "other")
    resumed = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert resumed["drafters"] == whole["drafters"]
    last = json.loads(done.stdout.splitlines()[-1])
    assert [each["name"] for each in last["drafters"]] == ["lookup", "draft", "tree"]


def test_more_answers_to_a_prompt_are_drawn_with_other_seeds(config, tmp_path):
    warm = load_config(config, ["sampling.temperature=1"])
    once = run_analysis(warm, tmp_path / "once")
    thrice = run_analysis(warm, tmp_path / "thrice", answers=3)
    assert [prompt["id"] for prompt in thrice["prompts"]] == [
        prompt["id"] for prompt in once["prompts"]
    ] * 3
    steps = [each["drafters"][1]["configured"]["steps"] for each in (once, thrice)]
    assert steps[1][:3] == pytest.approx(steps[0])
    assert steps[1][3:6] != pytest.approx(steps[0])
    cold = run_analysis(load_config(config), tmp_path / "cold", answers=3)
    assert len(cold["prompts"]) == 3


def test_a_folder_of_another_configuration_is_refused(config, tmp_path):
    run_analysis(load_config(config), tmp_path / "out")
    done = invoke("analyze", config, "max_new_tokens=9", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "another configuration or of other texts" in done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.repetition_penalty=1.2", "penalties, a bias, bad words or min_new_tokens"),
        ("sampling.min_new_tokens=3", "penalties, a bias, bad words or min_new_tokens"),
        ("rule=typical", "above temperature 0 acceptance is worked out for rule 'token'"),
        ("arms=[]", "config arms holds no drafter"),
    ],
)
def test_what_is_not_covered_is_refused_before_anything_is_loaded(
    config, tmp_path, override, message
):
    done = invoke(
        "analyze", config, "sampling.temperature=0.7", override, "--out", tmp_path / "out"
    )
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_draft_that_is_not_worked_out_leaves_the_other_figures(models, tmp_path):
    from tiny_heads import save_tiny_head

    target = load_target(str(models / "target"))
    head = save_tiny_head(tmp_path / "head", "eagle", target)
    (tmp_path / "prompts.txt").write_text("abcabc\nhello hello\n")
    (tmp_path / "bench.yaml").write_text(
        f"target: {{path: {models / 'target'}}}\n"
        f"prompts: {{source: {tmp_path / 'prompts.txt'}}}\n"
        "max_new_tokens: 8\nthreads: 1\nsampling: {temperature: 1}\narms:\n"
        f"  - {{type: eagle, options: {{path: {head}, children: without_replacement}}}}\n"
    )
    done = invoke("analyze", tmp_path / "bench.yaml", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "such siblings depends on what was drawn" in done.stderr
    (drafter,) = json.loads((tmp_path / "out" / "analysis.json").read_text())["drafters"]
    assert drafter["configured"] is None
    assert drafter["alpha"] > 0
    assert drafter["expected"]["trees"]


TEXT = "abcabc hello"


@pytest.mark.parametrize(
    ("name", "content", "sizes"),
    [
        ("a.txt", TEXT, [(1, 8), (9, 3)]),
        ("a.jsonl", json.dumps({"prompt": "ab", "answer": "0123456789"}) + "\n", [(2, 8)]),
        (
            "b.jsonl",
            json.dumps({"tokens": [1, 2, 3, 4, 5], "answers": [[0, 1], [2, 5]]}) + "\n",
            [(2, 3)],
        ),
    ],
)
def test_given_texts_are_cut_into_prompt_and_answer(models, tmp_path, name, content, sizes):
    (tmp_path / name).write_text(content)
    target = load_target(str(models / "target"))
    texts = read_texts(tmp_path / name, target, 5, 8)
    assert [(len(text.prompt), len(text.tokens)) for text in texts] == sizes
    assert {text.max_tokens for text in texts} == {8}


def test_given_texts_are_walked_along_and_what_the_target_never_says_is_counted(config, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox")
    done = invoke("analyze", config, "--text", tmp_path / "text.txt", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    analysis = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert violations(analysis, SCHEMA) == []
    assert analysis["provenance"]["text"].endswith("text.txt")
    assert analysis["drafters"][1]["impossible"] > 0.5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "x", "holds no text of at least one token behind a prompt"),
        ("a.jsonl", '{"prompt": "a"}\n', 'must be an object with "prompt" and "answer"'),
        ("a.jsonl", '{"tokens": [500], "answers": [[0, 1]]}\n', "outside the target's vocabulary"),
        ("gone.jsonl", None, "is not there"),
        ("folder", None, "give a folder that specdec regenerate wrote"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(config, tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    elif name == "folder":
        path.mkdir()
    done = invoke("analyze", config, "--text", path, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (Text([], [1], 4), "0 prompt tokens"),
        (Text([1], [], 4), "and 0 new ones"),
        (Text([1], [2, 3], 1), "was allowed 1"),
        (Text([1], [2] * 256, 256), "the target's context holds 256"),
        (Text([1], [2, 97], 4), "holds token 97"),
    ],
)
def test_texts_that_the_target_cannot_have_written_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Predictor(tiny_target(), [text], SamplingConfig())


def test_a_drafter_of_another_vocabulary_is_refused(models, tmp_path):
    from tiny_heads import save_tiny_head

    head = save_tiny_head(tmp_path / "head", "eagle", tiny_target(vocab_size=50))
    predictor = Predictor(tiny_target(), [Text([1], [2, 3], 4)], SamplingConfig())
    with pytest.raises(ValueError, match="vocab_size"):
        predictor.predict({"type": "eagle", "path": head})


@pytest.mark.parametrize("broken", ["target", "draft"])
def test_nan_is_told_with_its_place(broken, models):
    target = load_target(str(models / "target"))
    options = {"type": "draft_model", "path": str(models / "draft")}
    texts = target_answers(target, [[5, 6, 7]], SamplingConfig(), 6)
    predictor = Predictor(target, texts, SamplingConfig())
    if broken == "target":
        with torch.no_grad():
            target.model.lm_head.weight[3] = float("nan")
        with pytest.raises(FloatingPointError, match="text 0, new token 1: the target's logits"):
            predictor.predict(options)
        return
    from specdec.analysis import predict

    drafter = predict.load_drafter(options, target)
    with torch.no_grad():
        drafter.model.model.lm_head.weight[3] = float("nan")
    shape = drafter.fixed_shape
    with pytest.raises(FloatingPointError, match="the drafter's logits"):
        predictor.expect(options, drafter, shape)


def test_a_draft_models_short_context_ends_its_drafts_as_in_the_loop():
    from specdec import generate
    from specdec.analysis.expected import expect
    from specdec.analysis.teacher_forced import gather_evidence
    from specdec.drafters.draft_model import DraftModel
    from specdec.targets.hf import HFTarget

    target = tiny_target()
    model = HFTarget(perturbed(target.model, 0.1))
    model.max_context_len = 14
    drafter = DraftModel(model, target.vocab_size, num_draft_tokens=4)
    prompt = [5, 6, 7, 8, 5, 6, 7]
    (result,) = generate(target, drafter, [prompt], max_new_tokens=20)
    text = Text(prompt, result.tokens, 20)
    evidence = gather_evidence(target, drafter, [text], SamplingConfig(), 4)
    found = expect(evidence, drafter.fixed_shape, sampled=False)
    assert result.stats.num_accepted > 0
    assert found.steps == [result.stats.num_steps]


def test_calibration_is_the_gap_between_confidence_and_acceptance():
    confidence = np.array([0.05, 0.55, 0.55, 0.95, 1.0])
    taken = np.array([False, True, False, True, True])
    found = reliability(confidence, taken)
    assert [row["count"] for row in found["bins"]] == [1, 0, 0, 0, 0, 2, 0, 0, 0, 2]
    assert found["ece"] == pytest.approx((0.05 + 2 * 0.05 + 2 * 0.025) / 5)
    assert reliability(np.array([]), np.array([])) is None


def test_token_classes_tell_words_from_pieces():
    tokenizer = load_target("demo").tokenizer
    ids = tokenizer("A zebra-like 42,\n\n", add_special_tokens=False)["input_ids"]
    ids = [*ids, tokenizer.all_special_ids[0]]
    said = [
        (tokenizer.decode([i]), CLASSES[c])
        for i, c in zip(ids, classify(ids, tokenizer), strict=True)
    ]
    assert said[0] == ("A", "word_start")
    assert said[-1][1] == "special"
    found = {text.strip() or text[:1]: name for text, name in said}
    assert found["-"] == "punctuation"
    assert found["\n"] == "newline"
    assert "digit" in found.values()
    assert "word_piece" in found.values()
