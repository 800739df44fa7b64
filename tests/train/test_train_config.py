"""Wrong configurations of a training are named before anything is loaded."""

import pytest

from specdec.train.config import load_train_config

GOOD = "drafter: {kind: eagle3}\ndata: {path: a.jsonl}\n"


def load(tmp_path, *overrides):
    path = tmp_path / "train.yaml"
    path.write_text(GOOD)
    return load_train_config(str(path), overrides)


def test_overrides_reach_options_of_head_and_loss(tmp_path):
    config = load(tmp_path, "drafter.options.taps=[1,2,3]", "loss.num_steps=2", "lr=3e-4")
    assert config.drafter.options == {"taps": [1, 2, 3]}
    assert config.loss == {"num_steps": 2}
    assert config.lr == 3e-4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batchsize=1", "batchsize does not exist; did you mean batch_size"),
        ("data.pth=x", "did you mean data.path"),
        ("drafter.kind=eagel", "drafter.kind is 'eagel' but must be one of medusa, eagle, eagle3"),
        (
            "drafter.options=3",
            "drafter.options is 3 but must be a mapping of the drafter's options",
        ),
        ("loss=[1]", "loss is .* must be a mapping of the loss's options"),
        ("data.path=''", "data.path is empty"),
        ("lr=0", "lr is 0.0 but must be above 0"),
        ("lr=.nan", "lr is nan"),
        ("max_grad_norm=-1", "max_grad_norm is -1.0"),
        ("batch_size=0", "batch_size is 0 but must be at least 1"),
        ("max_steps=0", "max_steps is 0"),
        ("data.max_len=2", "data.max_len is 2 but must be at least 3"),
        ("data.validation_fraction=1.0", "validation_fraction is 1.0"),
        ("data.num_validation=0", "num_validation is 0"),
        ("betas=[0.9]", "betas"),
        ("betas=[0.9,1.0]", "betas"),
        ("log_with=wandb", "log_with is 'wandb' but must be one of none, tensorboard"),
        ("mixed_precision=int8", "mixed_precision is 'int8'"),
        ("sharding=fsdp", "sharding is 'fsdp' but must be one of none, fsdp2"),
        ("target.device=cuda:1", "target.device is 'cuda:1' but must be one of cpu, cuda"),
        ("threads=many", "threads"),
    ],
)
def test_a_wrong_value_is_named(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, override)


def test_epochs_and_steps_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="num_epochs and max_steps are both given"):
        load(tmp_path, "num_epochs=1", "max_steps=5")
    with pytest.raises(ValueError, match=r"num_validation and data.validation_fraction"):
        load(tmp_path, "data.num_validation=1", "data.validation_fraction=0.5")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'none.yaml' is not a file"):
        load_train_config("none.yaml")
