"""`specdec analyze`: what it writes, what it refuses, and how it goes on after a kill."""

import json
from dataclasses import replace

import pytest
import torch
from checkpoints import save_checkpoint
from safetensors.numpy import load_file
from tiny_heads import save_tiny_head
from tiny_models import perturbed, tiny_llama, tiny_target
from typer.testing import CliRunner

from specdec import SamplingConfig, load_drafter
from specdec.analysis import run
from specdec.analysis.describe import describe, gather_facts
from specdec.analysis.predict import Predictor
from specdec.analysis.results import Analysis
from specdec.analysis.run import run_analysis
from specdec.analysis.texts import Text, target_answers
from specdec.bench.config import load_config
from specdec.cli import app
from specdec.targets.load import load_target

ARMS = """
  - {name: lookup, type: ngram, options: {min_ngram: 1}}
  - {name: draft, type: draft_model, options: {path: DRAFT, num_draft_tokens: 3}}
  - {name: tree, type: draft_model, options: {path: DRAFT, num_draft_tokens: 3, width: 2}}
"""
WARM = SamplingConfig(temperature=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A target and a draft model with one letter a token."""
    folder = tmp_path_factory.mktemp("models")
    save_checkpoint(folder / "target")
    save_checkpoint(folder / "draft", perturbed(tiny_llama(), 0.1))
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


def analyze(tmp_path, *arguments):
    """Run the command; the result, and the analysis that it wrote."""
    command = ["analyze", *map(str, arguments), "--out", str(tmp_path / "out")]
    done, file = CliRunner().invoke(app, command), tmp_path / "out" / "analysis.json"
    return done, Analysis.read(json.loads(file.read_text())) if file.exists() else None


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_figures_of_an_analysis_agree(config, tmp_path, temperature):
    settings = load_config(config, [f"sampling.temperature={temperature}"])
    analysis = run_analysis(settings, tmp_path / "out")
    assert Analysis.read(json.loads((tmp_path / "out" / "analysis.json").read_text())) == analysis
    lookup, draft, tree = analysis.drafters
    assert (lookup.method, draft.method, tree.method) == ("replay", "evidence", "evidence")
    assert draft.alpha == tree.alpha > 0.3
    assert lookup.alpha is None
    chains = [row.tau for row in draft.expected.chains]
    assert chains == sorted(chains)
    assert chains[2] == pytest.approx(draft.configured.tau)
    assert draft.expected.trees == []
    thresholds = [row.tau for row in draft.expected.thresholds]
    assert thresholds == sorted(thresholds, reverse=True)
    evidence = load_file(tmp_path / "out" / "evidence.safetensors")
    assert evidence["draft/rank"].shape == (3, 11, 10)
    valid = evidence["draft/target_prob"][:, :, 0] > 0
    assert evidence["draft/overlap"][:, :, 0][valid].mean() == pytest.approx(draft.alpha)
    for each in analysis.drafters:
        counts = [sum(row.count for row in rows) for rows in (each.entropy_bins, each.positions)]
        assert counts[0] == counts[1] > 0
        found = each.configured
        assert found.tau == pytest.approx(1 + sum(found.accepted_at) / sum(found.steps))
    for each in draft.hardest:
        assert each.drafted != [each.target]
        assert each.p > each.q or temperature
        assert each.before
    if not temperature:  # overlaps are all 0 there
        surprises = [each.q for each in draft.hardest]
        assert surprises == sorted(surprises) != []


def test_a_killed_analysis_goes_on(config, tmp_path, monkeypatch):
    real, described = run.describe, []

    def killed_at_the_second(predictor, facts, name, options):
        described.append(name)
        if len(described) == 2:
            raise KeyboardInterrupt
        return real(predictor, facts, name, options)

    monkeypatch.setattr(run, "describe", killed_at_the_second)
    assert analyze(tmp_path, config)[0].exit_code == 130
    done, resumed = analyze(tmp_path, config)
    assert done.exit_code == 0, done.stderr
    assert described == ["lookup", "draft", "draft", "tree"]
    assert resumed.drafters == run_analysis(load_config(config), tmp_path / "other").drafters
    evidence = [tmp_path / name / "evidence.safetensors" for name in ("out", "other")]
    assert evidence[0].read_bytes() == evidence[1].read_bytes()
    last = json.loads(done.stdout.splitlines()[-1])
    assert [each["name"] for each in last["drafters"]] == ["lookup", "draft", "tree"]
    done, _ = analyze(tmp_path, config, "max_new_tokens=9")
    assert done.exit_code == 2
    assert "configuration with its texts is" in done.stderr
    identify = run.identify_target
    monkeypatch.setattr(run, "identify_target", lambda t: replace(identify(t), weights="others"))
    done, _ = analyze(tmp_path, config)
    assert done.exit_code == 2
    assert "another target: weights" in done.stderr


def test_more_answers_have_seeds_of_their_own(config, tmp_path):
    warm = load_config(config, ["sampling.temperature=1"])
    once = run_analysis(warm, tmp_path / "once")
    thrice = run_analysis(warm, tmp_path / "thrice", answers=3)
    assert [prompt.id for prompt in thrice.prompts] == [prompt.id for prompt in once.prompts] * 3
    steps = [each.drafters[1].configured.steps for each in (once, thrice)]
    assert steps[1][:3] == pytest.approx(steps[0])
    assert steps[1][3:6] != pytest.approx(steps[0])
    cold = run_analysis(load_config(config), tmp_path / "cold", answers=3)
    assert len(cold.prompts) == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.repetition_penalty=1.2", "penalties, a bias, bad words or min_new_tokens"),
        ("sampling.min_new_tokens=3", "penalties, a bias, bad words or min_new_tokens"),
        ("rule=typical", "above temperature 0 acceptance is worked out for rule 'token'"),
        ("arms=[]", "config arms holds no drafter"),
    ],
)
def test_settings_that_are_not_covered_are_refused(config, tmp_path, override, message):
    done, _ = analyze(tmp_path, config, "sampling.temperature=0.7", override)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_given_texts_are_walked_along(config, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox")
    done, analysis = analyze(tmp_path, config, "--text", tmp_path / "text.txt")
    assert done.exit_code == 0, done.stderr
    assert analysis.provenance.text.endswith("text.txt")
    assert analysis.drafters[1].impossible > 0.5  # the target would never have written it


@pytest.mark.parametrize("broken", ["target", "drafter"])
def test_nan_is_told_with_its_place(broken, models, monkeypatch):
    target = load_target(str(models / "target"))
    options = {"type": "draft_model", "path": str(models / "draft")}
    predictor = Predictor(
        target, target_answers(target, [[5, 6, 7]], SamplingConfig(), 6), SamplingConfig()
    )
    drafter = load_drafter(options, target)
    monkeypatch.setattr("specdec.analysis.predict.load_drafter", lambda *given: drafter)
    model = target.model if broken == "target" else drafter.model.model
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match=f"text 0, new token 1: the {broken}'s logits"):
        predictor.predict(options)


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def head(target, tmp_path_factory):
    return save_tiny_head(tmp_path_factory.mktemp("head"), "eagle", target)


@pytest.fixture(scope="module")
def texts(target):
    return target_answers(target, [[1, 2, 3], [4, 5], [6, 7, 8, 9]], WARM, 10)


def described(target, head, texts, rule="token", **options):
    predictor = Predictor(target, texts, WARM, rule=rule)
    options = {"type": "eagle", "path": head, **options}
    found, _ = describe(predictor, gather_facts(target, texts), "mine", options)
    return found


def first_token(found):
    """The chance over all places that a draft's first token is taken."""
    rows = [row for row in found.positions if row.count]
    return sum(r.count * r.acceptance for r in rows) / sum(r.count for r in rows)


@pytest.mark.parametrize(
    ("rule", "width", "children", "reason", "has_chains"),
    [
        ("match", 1, "with_replacement", "rule is 'match'", False),
        ("token", 3, "without_replacement", "such siblings depends on what was drawn", True),
    ],
)
def test_an_unknown_draft_leaves_other_figures(
    target, head, texts, rule, width, children, reason, has_chains
):
    found = described(target, head, texts, rule, width=width, children=children)
    assert reason in found.not_configured_because
    assert {found.configured, *(row.acceptance for row in found.positions)} == {None}
    assert found.alpha > 0
    assert found.coverage
    assert found.expected.trees
    assert bool(found.expected.chains) == has_chains


def test_the_first_token_counts_all_siblings(target, head, texts):
    """More siblings than a pass looks at by itself."""
    drawn = {"children": "with_replacement"}
    narrow, wide = (
        first_token(described(target, head, texts, choices=[[n] for n in range(width)], **drawn))
        for width in (1, 7)
    )
    assert wide > narrow + 0.02


def test_answers_to_one_prompt_narrow_no_interval(target, head, texts):
    """Had every prompt been answered alike four times, nothing more would be known."""
    options = {"width": 1, "depth": 2, "children": "with_replacement"}
    once = described(target, head, texts, **options)
    often = described(target, head, list(texts) * 4, **options)
    assert often.configured.tau_ci == pytest.approx(once.configured.tau_ci)
    assert often.alpha_ci == pytest.approx(once.alpha_ci)


def test_a_drafter_of_another_vocabulary_is_refused(tmp_path):
    head = save_tiny_head(tmp_path / "head", "eagle", tiny_target(vocab_size=50))
    predictor = Predictor(tiny_target(), [Text([1], [2, 3], 4)], SamplingConfig())
    with pytest.raises(ValueError, match="vocab_size"):
        predictor.predict({"type": "eagle", "path": head})
