"""Bad input is refused by argument, row, value and rule."""

from dataclasses import replace

import pytest
import torch

from specdec.verify import Draft, match, verify


def good():
    rows = torch.softmax(torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)), 2)
    tokens = torch.tensor([[1, 2, 3], [0, 4, -1]])
    parents = torch.tensor([[-1, -1, 0], [-1, 0, -1]])
    draft = Draft(tokens, torch.tensor([3, 2]), parents, rows[:, :3].clone(), 2)
    uniforms, noise = torch.full((2, 3), 0.5), torch.ones(2, 5)
    return {"target_probs": rows, "draft": draft, "uniforms": uniforms, "noise": noise}


def with_(name, value, index=None):
    """The good arguments with one of them, or a part of the draft, changed at an index."""
    arguments = good()
    inside = name in vars(arguments["draft"])
    if index is not None:
        changed = (vars(arguments["draft"]) if inside else arguments)[name].clone()
        changed[index] = torch.as_tensor(value)
        value = changed
    if inside:
        name, value = "draft", replace(arguments["draft"], **{name: value})
    return arguments | {name: value}


BAD_VALUES = [
    ("target_probs", (1, 2, 0), [-0.1, torch.nan, torch.inf]),
    ("target_probs", (1, 2), [0.3]),
    ("tokens", (1, 1), [5, -1]),
    ("lengths", (1,), [4, -1]),
    ("parents", (1, 1), [1, -2]),
    ("probs", (1, 1, 0), [-0.1, torch.nan]),
    ("probs", (1, 1), [0.4, [0.5, 0.5, 0.0, 0.0, 0.0]]),
    ("uniforms", (1, 1), [1.0, torch.nan]),
    ("noise", (1, 1), [-1.0, torch.nan]),
]


@pytest.mark.parametrize("rule", ["token", "traversal"])
@pytest.mark.parametrize(("name", "index", "values"), BAD_VALUES)
def test_bad_value_names_argument_row_and_rule(name, index, values, rule):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name}: row 1.*rule '{rule}'"):
            verify(**with_(name, value, index), rule=rule)


@pytest.mark.parametrize(
    ("changed", "options", "error", "message"),
    [
        (with_("target_probs", torch.ones(2, 3, 5) / 5), {}, ValueError, "target_probs.*'token'"),
        (with_("target_probs", torch.ones(4, 5) / 5), {}, ValueError, "target_probs.*'token'"),
        (with_("target_probs", torch.ones(2, 4, 0)), {}, ValueError, "target_probs.*'token'"),
        (with_("uniforms", torch.zeros(2, 4)), {}, ValueError, "uniforms.*'token'"),
        (with_("noise", torch.ones(2, 4)), {}, ValueError, "noise.*'token'"),
        (with_("lengths", torch.tensor([3])), {}, ValueError, "lengths.*'token'"),
        (with_("parents", torch.tensor([[-1, 0]])), {}, ValueError, "parents.*'token'"),
        (with_("probs", torch.ones(2, 3, 4) / 4), {}, ValueError, "probs.*'token'"),
        (with_("depth", -1), {}, ValueError, "depth is -1.*'token'"),
        (with_("target_probs", torch.ones(2, 4, 5).long()), {}, TypeError, "target_probs"),
        (with_("tokens", torch.ones(2, 3)), {}, TypeError, "tokens"),
        (with_("draft", None), {}, TypeError, "NoneType"),
        (good(), {"rule": "traversel"}, ValueError, "did you mean 'traversal'"),
        (good(), {"rule": "match"}, ValueError, r"verify\.match\(sampled, draft\)"),
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_wrong_kind_or_shape_is_refused_without_value_checks(
    changed, options, error, message, check
):
    with pytest.raises(error, match=message):
        verify(**changed, **options, check=check)


@pytest.mark.parametrize(
    ("changed", "rule", "message"),
    [
        (with_("depth", 1), "token", "parents: row 0, entry 2 has 0, but depth is only 1"),
        (with_("uniforms", None), "token", "uniforms: row 0.*None"),
        (with_("noise", None), "token", "noise: row 0.*None"),
        (good(), "block", r"parents: row 0, entry 1 .*'block'"),
    ],
)
def test_what_does_not_go_together_is_refused(changed, rule, message):
    with pytest.raises(ValueError, match=message):
        verify(**changed, rule=rule)


def test_block_takes_a_chain_that_parents_spell():
    assert verify(**good()).tokens.shape == (2, 3)
    draft = replace(good()["draft"], parents=torch.tensor([[-1, 0, 1], [-1, 0, -1]]), depth=3)
    verdict = verify(**good() | {"draft": draft}, rule="block")
    expected = verify(**good() | {"draft": replace(draft, parents=None)}, rule="block")
    assert torch.equal(verdict.tokens, expected.tokens)


def test_sampled_of_the_wrong_kind_is_refused():
    with pytest.raises(ValueError, match="sampled has shape"):
        match(torch.zeros(2, 3, dtype=torch.long), good()["draft"])
    with pytest.raises(TypeError, match="sampled"):
        match(torch.zeros(2, 4), good()["draft"])
