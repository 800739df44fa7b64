"""Greedy outputs that differ: an error in float32, a near tie to report in half precision."""

import json

import pytest
import torch
from checkpoints import save_checkpoint
from tiny_models import tiny_target
from typer.testing import CliRunner

from specdec import SamplingConfig, generate_baseline, load_target
from specdec.bench import arms
from specdec.bench.config import BenchConfig, SamplingOptions
from specdec.bench.store import Run
from specdec.bench.summary import find_differences
from specdec.cli import app

IDS = [[3, 4, 5], [8, 9]]


def tables(target, config, change):
    """Runs of three arms, where `change` alters the tokens of the last one."""
    sampling = SamplingConfig(**vars(config.sampling))
    rows = generate_baseline(target, IDS, sampling, max_new_tokens=8)
    runs = [[Run(row.tokens, 1, 0.1, 0.1)] for row in rows]
    return {
        "plain": runs,
        "hf_generate": runs,
        "ngram": [[Run(change(i, run.tokens), 1, 0.1, 0.1)] for i, (run,) in enumerate(runs)],
    }


def gap_by_hand(target, ids):
    logits = target.model(torch.tensor([ids])).logits[0, -1]
    best = logits.topk(2).values
    return float(best[0] - best[1])


def test_equal_outputs_have_no_differences():
    target, config = tiny_target(), BenchConfig()
    found = find_differences(config, tables(target, config, lambda i, t: t), target, IDS)
    assert found == {"plain": [], "hf_generate": [], "ngram": []}


def test_a_difference_names_prompt_baseline_position_and_the_gap_of_the_logits_there():
    target, config = tiny_target(), BenchConfig()

    def change(index, tokens):
        return tokens if index == 0 else [*tokens[:5], (tokens[5] + 1) % 97, *tokens[6:]]

    runs = tables(target, config, change)
    found = find_differences(config, runs, target, IDS)
    assert found["plain"] == found["hf_generate"] == []
    (difference,) = found["ngram"]
    gap = difference.pop("top2_gap")
    assert difference == {"prompt": 1, "against": "plain", "position": 5}
    with torch.no_grad():
        expected = gap_by_hand(target, IDS[1] + runs["plain"][1][0].tokens[:5])
    assert gap == pytest.approx(expected, rel=1e-4)


def test_an_output_that_ends_early_differs_where_it_ends():
    target, config = tiny_target(), BenchConfig()
    runs = tables(target, config, lambda i, tokens: tokens[: 3 + i])
    found = find_differences(config, runs, target, IDS)["ngram"]
    assert [(d["prompt"], d["position"]) for d in found] == [(0, 3), (1, 4)]


def test_the_gap_is_that_of_the_penalised_logits():
    target = tiny_target()
    plain = BenchConfig()
    penalised = BenchConfig(sampling=SamplingOptions(presence_penalty=-50.0))
    runs = tables(target, penalised, lambda i, tokens: [*tokens[:4], 0])
    with_penalty = find_differences(penalised, runs, target, IDS)["ngram"][0]["top2_gap"]
    without = find_differences(plain, runs, target, IDS)["ngram"][0]["top2_gap"]
    assert with_penalty != pytest.approx(without)


def test_sampled_outputs_are_not_compared():
    target = tiny_target()
    config = BenchConfig(sampling=SamplingOptions(temperature=1.0))
    runs = tables(target, config, lambda i, tokens: [0])
    assert find_differences(config, runs, target, IDS)["ngram"] == []


@pytest.mark.parametrize(("dtype", "status"), [("float32", 1), ("bfloat16", 0), ("float16", 0)])
def test_only_in_float32_do_differences_fail_the_run(tmp_path, monkeypatch, dtype, status):
    save_checkpoint(tmp_path / "target")
    (tmp_path / "prompts.txt").write_text("abcabc\nhello\n")
    (tmp_path / "bench.yaml").write_text(
        f"target: {{path: {tmp_path / 'target'}, dtype: {dtype}}}\n"
        f"prompts: {{source: {tmp_path / 'prompts.txt'}}}\n"
        "max_new_tokens: 6\nrepeats: 1\nthreads: 1\n"
    )
    cut = arms._HFArm._cut
    monkeypatch.setattr(arms._HFArm, "_cut", lambda self, tokens: [*cut(self, tokens)[:4], 1, 2])
    arguments = ["bench", str(tmp_path / "bench.yaml"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == status, done.stderr
    plain = json.loads((tmp_path / "out" / "results.json").read_text())["arms"][0]
    assert plain["mismatches"] == len(plain["differences"]) == 2
    for difference in plain["differences"]:
        assert (difference["against"], difference["position"]) == ("hf_generate", 4)
        assert difference["top2_gap"] >= 0
    if status:
        assert "outputs differ at temperature 0 in float32" in done.stderr
        assert "prompt 0 from output token 4 on (top-2 logit gap" in done.stderr


def test_half_precision_loads_as_asked(tmp_path):
    target = load_target(str(save_checkpoint(tmp_path)), dtype="bfloat16")
    assert target.model.dtype == torch.bfloat16
