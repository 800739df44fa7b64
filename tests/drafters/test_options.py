"""Every option of every strategy is described from its class."""

import pytest

from specdec import registry
from specdec.drafters.base import BaseDrafter
from specdec.drafters.options import describe_options


@pytest.mark.parametrize("kind", registry.DRAFTERS)
def test_every_option_has_type_and_meaning(kind):
    options = describe_options(kind)
    assert options
    assert "target" not in [option.name for option in options]
    for option in options:
        assert option.type not in ("", "Any"), option
        assert len(option.meaning) > 8, option
        assert " see " not in f" {option.meaning}", option


def test_option_is_told_as_its_class_tells_it():
    told = {option.name: option for option in describe_options("eagle3")}
    assert told["choices"][1:3] == ("Sequence[Sequence[int]] | Mapping[str, int] | None", "None")
    assert told["width"].meaning.endswith("1 makes a chain.")
    assert told["depth"].default == "5"
    needed = {option.name: option for option in describe_options("draft_model")}
    assert needed["path"].default == ""
    assert needed["num_draft_tokens"].meaning == "levels of the draft, at least 1."
    assert needed["dtype"].type == "str | torch.dtype | None"


def test_option_without_words_is_empty(monkeypatch):
    class Silent(BaseDrafter):
        def __init__(self, width=3) -> None: ...

    monkeypatch.setattr("specdec.drafters.options.strategy", lambda kind: Silent)
    assert [tuple(option) for option in describe_options("silent")] == [("width", "", "3", "")]
