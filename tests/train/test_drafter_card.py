"""The card in a drafter's folder says what was measured, and disturbs no reader of the folder."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml
from tiny_models import tiny_llama
from tiny_training import known_rows, write_run
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from specdec.checkpoints import read_head
from specdec.cli import app
from specdec.common.config import read_model
from specdec.registry import load_drafter
from specdec.report.cards import drafter_card
from specdec.targets.load import load_target
from specdec.train.results import Parity, TrainResults

pytestmark = pytest.mark.slow


def trained(folder, **settings):
    """Results and card of a run on rows of two domains."""
    rows = known_rows()
    rows = [{**row, "domain": "ab"[n % 2]} for n, row in enumerate(rows)]
    path = write_run(folder, rows, max_steps=2, eval_depth=2, **settings)
    done = CliRunner().invoke(app, ["train", str(path), "--out", str(folder / "out")])
    assert done.exit_code == 0, done.output
    results = read_model(TrainResults, folder / "out" / "results.json")
    return results, (folder / "out" / "drafter" / "README.md").read_text()


def header(card):
    return yaml.safe_load(card.split("---")[1])


def test_head_card_tells_target_and_measurements(tmp_path):
    results, card = trained(tmp_path, drafter={"kind": "eagle3"}, draft_vocab_size=40)
    assert header(card) == {
        "library_name": "specdec",
        "pipeline_tag": "text-generation",
        "tags": ["specdec", "speculative-decoding", "eagle3"],
    }
    assert card.count("\n# EAGLE-3 head for target\n") == 1
    assert results.target.weights[:16] in card
    domains = {name: (each.rows, each.tau) for name, each in results.domains.items()}
    assert set(domains) == {"a", "b"}
    for name, (rows, tau) in {**domains, "all": (5, results.offline_tau)}.items():
        assert f"| {name} | {rows} | {tau:.3f} |" in card
    assert f"{results.parity.measured_tau:.3f}" in card
    assert "Parity gate passed" in card
    assert card.index("Parity gate passed") < card.index("## Offline acceptance")
    known = read_head(str(tmp_path / "out" / "drafter")).training["parity"]
    assert known["measured_tau"] == results.parity.measured_tau
    assert str(tmp_path) not in card  # a path of this machine helps nobody
    folder = str(tmp_path / "out" / "drafter")
    assert read_head(folder).kind == "eagle3"
    done = CliRunner().invoke(app, ["inspect", folder])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("export", ["merged", "adapter"])
def test_draft_model_card_tells_other_engines(tmp_path, export):
    tiny_llama(num_layers=1, seed=5).save_pretrained(tmp_path / "draft")
    options = {"path": str(tmp_path / "draft"), "method": "lora", "export": export}
    results, card = trained(tmp_path, drafter={"kind": "draft_model", "options": options})
    is_merged = export == "merged"
    assert header(card)["library_name"] == ("transformers" if is_merged else "peft")
    assert ("vllm serve target --speculative-config" in card) == is_merged
    assert str(tmp_path) not in card
    target = load_target(results.provenance.config.target.path, device="cpu")
    assert load_drafter(results.drafter, target).num_draft_tokens == 5
    if is_merged:
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "drafter")


def test_card_tells_gaps_and_failures(tmp_path):
    given = {"kind": "medusa"}
    results, card = trained(tmp_path, drafter=given, data={"num_validation": None})
    assert "no rows were held out" in card
    assert "the parity gate was not run" in card
    found = {"shape": "chain of 5 tokens", "num_prompts": 3, "mismatches": 3, "passed": False}
    found |= {"predicted_tau": 2.5, "predicted_tau_ci": (2.0, 3.0), "predicted_acceptance": [0.5]}
    parity = Parity.model_construct(**dict.fromkeys(Parity.model_fields) | found)
    config = results.provenance.config
    config.target.path = "owner/model"
    changed = {"parity": parity, "target": replace(results.target, name="owner/model")}
    answers = SimpleNamespace(settings=SimpleNamespace(temperatures=[0.0, 0.8]))
    card = drafter_card(results.model_copy(update=changed), answers)
    assert "Parity gate **failed**: do not use it" in card
    assert "predicts 2.500 [2.000, 3.000]" in card
    assert header(card)["base_model"] == "owner/model"
    assert "--target owner/model" in card
    assert "answers regenerated at temperature 0, 0.8" in card
