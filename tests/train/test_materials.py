"""A run takes its rows from a file, a folder of answers or a feature store, to the same end."""

import json
import shutil
from dataclasses import replace

import pytest
from tiny_features import extract, write_folder
from tiny_models import tiny_llama
from tiny_training import known_rows, logged, tiny_config

from specdec.common.files import read_json
from specdec.data.feature_store import FeatureStore
from specdec.targets.load import load_target
from specdec.train.acceptance import ParityError
from specdec.train.run import run_training

pytestmark = pytest.mark.slow

RUN = {"max_steps": 3, "learning_rate": 1e-2, "eval_depth": 3, "eval_strategy": "no"}
MEDUSA = {"kind": "medusa", "options": {"num_heads": 3}}
KINDS = {
    "eagle3": {"drafter": {"kind": "eagle3"}, "draft_vocab_size": 40},
    "eagle": {"drafter": {"kind": "eagle"}},
    "mixture_of_attentions": {"drafter": {"kind": "mixture_of_attentions"}},
    "medusa": {"drafter": MEDUSA, "loss": {"objective": "forward_kl"}, "draft_vocab_size": 40},
    "draft_model": {},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Answers of a tiny target, and a store that holds everything of it."""
    folder = tmp_path_factory.mktemp("made")
    rows = [
        {**row, "id": f"q{number}", "domain": "ab"[number % 2]}
        for number, row in enumerate(known_rows())
    ]
    write_folder(folder / "answers", rows[:15], rows[15:])
    tiny_llama(num_layers=3).save_pretrained(folder / "target")
    tiny_llama(num_layers=1, seed=5).save_pretrained(folder / "draft")
    target = load_target(str(folder / "target"), device="cpu")
    whole = {"taps": "keys_values,0,1,2,3", "dtype": "float32", "top_k": target.vocab_size}
    extract(folder / "answers", target, folder / "store", **whole)
    return folder


def config_of(made, folder, kind, path, **more):
    options = {"method": "full", "path": str(made / "draft")}
    settings = {"drafter": {"kind": kind, "options": options}} | RUN | KINDS[kind] | more
    data = {"path": str(path), "num_validation": None}
    return tiny_config(folder, **settings, data=data, target={"path": str(made / "target")})


@pytest.mark.parametrize("kind", KINDS)
def test_store_trains_what_the_target_trains(made, tmp_path, kind, monkeypatch):
    online = run_training(config_of(made, tmp_path, kind, made / "answers"), tmp_path / "online")
    loaded = []
    monkeypatch.setattr(
        "specdec.train.data.load_target",
        lambda *args, **kw: loaded.append(1) or load_target(*args, **kw),
    )
    stored = run_training(config_of(made, tmp_path, kind, made / "store"), tmp_path / "stored")
    for ours, theirs in zip(logged(tmp_path / "stored"), logged(tmp_path / "online"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert stored.offline_tau == pytest.approx(online.offline_tau)
    assert stored.domains.keys() == online.domains.keys() == {"a", "b"}
    assert stored.validation_rows == online.validation_rows == 5
    assert stored.parity.passed
    assert max(stored.parity.features.differences.values()) < 1e-5
    assert online.parity.features is None
    assert loaded == [1]  # for the gate alone


@pytest.mark.parametrize(
    ("kind", "said"),
    [("eagle3", "differs by .* in tap [12]"), ("draft_model", "differs by .* in logits")],
)
def test_lying_store_fails_the_gate(made, tmp_path, kind, said, monkeypatch):
    get = FeatureStore.get

    def lying(self, row_id, taps=None, max_len=None):
        row = get(self, row_id, None, max_len)
        hidden = {tap: row.hidden[max(tap - 1, 0)] for tap in taps}
        moved = replace(row.logits, values=row.logits.values.roll(1, 0))
        return replace(row, hidden=hidden, logits=row.logits if taps else moved)

    monkeypatch.setattr(FeatureStore, "get", lying)
    more = {"drafter": {"kind": kind, "options": {"taps": [1, 2]}}} if kind == "eagle3" else {}
    with pytest.raises(ParityError, match=said) as caught:
        run_training(config_of(made, tmp_path, kind, made / "store", **more), tmp_path / "out")
    parity = caught.value.results.parity
    assert parity.measured_tau == parity.predicted_tau
    assert not parity.passed


def test_data_of_another_target_is_refused(made, tmp_path):
    tiny_llama(num_layers=3, seed=3).save_pretrained(tmp_path / "other")
    given = {"name": "theirs", "hidden_size": 32, "weights": "ab" * 32, "vocab_size": 97}
    shutil.copytree(made / "answers", tmp_path / "answers")
    manifest = read_json(tmp_path / "answers" / "answers.json") | {"target": given}
    (tmp_path / "answers" / "answers.json").write_text(json.dumps(manifest))
    extract(made / "answers", load_target(str(made / "target"), device="cpu"), tmp_path, taps="3")
    for kind, target, path, message in (
        ("medusa", tmp_path / "other", made / "store", "holds the features of another target"),
        ("eagle3", made / "target", tmp_path, r"holds the taps \[3\] but not"),
        (
            *("medusa", made / "target", tmp_path / "answers"),
            "were written by target 'theirs' with weights abababab",
        ),
    ):
        config = config_of(made, tmp_path, kind, path)
        config.target.path = str(target)
        with pytest.raises(ValueError, match=message):
            run_training(config, tmp_path / "out")


def test_head_goes_on_from_another_one(made, tmp_path):
    first = config_of(made, tmp_path, "eagle3", made / "answers")
    before = run_training(first, tmp_path / "first")
    init = str(tmp_path / "first" / "drafter")
    more = {"drafter": {"kind": "eagle3", "init": init}, "draft_vocab_size": None}
    config = config_of(made, tmp_path, "eagle3", made / "answers", **more)
    after = run_training(config, tmp_path / "second")
    assert after.validation_loss < before.validation_loss
    assert after.draft_vocabulary is None
    for change, message in (
        ({"kind": "eagle"}, r"holds a head of the kind 'eagle3', not 'eagle'"),
        ({"options": {"taps": [1, 2, 3]}}, r"\['taps'\] are not those of drafter.init"),
    ):
        wrong_head = more | {"drafter": more["drafter"] | change}
        wrong = config_of(made, tmp_path, "eagle3", made / "answers", **wrong_head)
        with pytest.raises(ValueError, match=message):
            run_training(wrong, tmp_path / "third")
