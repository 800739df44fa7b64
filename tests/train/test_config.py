"""Wrong configurations of a training are named before anything is loaded."""

from dataclasses import fields

import pytest
from transformers import TrainingArguments

from specdec.train.config import TrainingConfig, load_train_config

GOOD = "drafter: {kind: eagle3}\ndata: {path: a.jsonl}\n"


def load(tmp_path, *overrides):
    path = tmp_path / "train.yaml"
    path.write_text(GOOD)
    return load_train_config(str(path), overrides)


def test_overrides_reach_head_loss_and_arguments(tmp_path):
    options = ["drafter.options.taps=[1,2,3]", "loss.num_steps=2"]
    config = load(tmp_path, *options, "training.learning_rate=3e-4")
    assert config.drafter.options == {"taps": [1, 2, 3]}
    assert config.loss == {"num_steps": 2}
    assert config.training.learning_rate == 3e-4


def test_training_arguments_have_transformers_names():
    known = {field.name for field in fields(TrainingArguments)}
    assert set(TrainingConfig.model_fields) <= known


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("training.batch_size=1", r"batch_size does not exist; .*per_device_train_batch_size"),
        ("training.learningrate=1", "did you mean training.learning_rate"),
        ("lr=1e-3", "key lr does not exist"),
        ("data.pth=x", "did you mean data.path"),
        ("drafter.kind=eagel", "drafter type is 'eagel' .*; did you mean 'eagle'"),
        ("drafter.kind=ngram", "drafter.kind is 'ngram' but must be one of dflash, draft_model"),
        ("drafter.width=2 drafter.options.width=3", "'width' is given twice"),
        ("drafter.knd=eagle", "did you mean drafter.kind"),
        ("drafter.options=3", "drafter.options is 3 but must be a mapping"),
        ("loss=[1]", "loss is .* must be a mapping"),
        ("data.path=''", "data.path is '' but must be not empty"),
        ("training.learning_rate=0", r"learning_rate is 0.* but must be above 0"),
        ("training.learning_rate=.nan", "learning_rate is nan"),
        ("training.max_grad_norm=-1", "max_grad_norm is -1"),
        ("training.per_device_train_batch_size=0", "is 0 but must be at least 1"),
        ("training.max_steps=0", "max_steps is 0"),
        ("data.max_len=2", "data.max_len is 2 but must be at least 3"),
        ("data.validation_fraction=1.0", "validation_fraction is 1"),
        ("data.num_validation=0", "num_validation is 0"),
        ("training.adam_beta2=1.0", "adam_beta2 is 1"),
        ("training.bf16=int8", "bf16 is 'int8' but must be true or false"),
        ("target.device=cuda:1", "target.device is 'cuda:1' but must be one of 'cpu' or 'cuda'"),
        ("threads=many", "threads"),
        ("training.num_train_epochs=1 training.max_steps=5", "max_steps are both given"),
        ("data.num_validation=1 data.validation_fraction=0.5", "both given; remove one"),
        ("training.push_to_hub=true", "needs training.hub_model_id"),
        ("data.pack_len=40", "pack_len is for draft models"),
        ("drafter.kind=draft_model drafter.init=x", "drafter.init is for heads"),
        ("drafter.kind=draft_model draft_vocab_size=9", "draft_vocab_size is for heads"),
    ],
)
def test_wrong_value_is_named(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, *overrides.split(" "))


def test_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"'none.yaml' is not a file"):
        load_train_config("none.yaml")
