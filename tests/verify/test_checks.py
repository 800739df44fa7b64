"""Bad input is refused by argument, row, value and rule."""

from dataclasses import replace

import pytest
import torch

from specdec.verify import Draft, match, verify


def _good() -> dict:
    rows = torch.softmax(torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)), 2)
    tokens = torch.tensor([[1, 2, 3], [0, 4, -1]])
    parents = torch.tensor([[-1, -1, 0], [-1, 0, -1]])
    draft = Draft(tokens, torch.tensor([3, 2]), parents, rows[:, :3].clone(), 2)
    return {
        "target_probs": rows,
        "draft": draft,
        "uniforms": torch.full((2, 3), 0.5),
        "noise": torch.ones(2, 5),
    }


def _set(tensor: torch.Tensor, index: tuple, value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed[index] = value
    return changed


def _with_target(arguments: dict, index: tuple, value: float) -> dict:
    return arguments | {"target_probs": _set(arguments["target_probs"], index, value)}


def _with_draft(arguments: dict, name: str, index: tuple, value: float) -> dict:
    draft = arguments["draft"]
    return arguments | {"draft": replace(draft, **{name: _set(getattr(draft, name), index, value)})}


def _with_flat_row_0(arguments: dict, depth: int) -> dict:
    parents = arguments["draft"].parents.clone()
    parents[0] = -1
    return arguments | {"draft": replace(arguments["draft"], parents=parents, depth=depth)}


BAD_VALUES = {
    "negative target": ("target_probs", lambda a: _with_target(a, (1, 2, 0), -0.1)),
    "NaN target": ("target_probs", lambda a: _with_target(a, (1, 2, 0), torch.nan)),
    "infinite target": ("target_probs", lambda a: _with_target(a, (1, 2, 0), torch.inf)),
    "target sum": ("target_probs", lambda a: _with_target(a, (1, 2), 0.3)),
    "token too large": ("tokens", lambda a: _with_draft(a, "tokens", (1, 1), 5)),
    "token negative": ("tokens", lambda a: _with_draft(a, "tokens", (1, 1), -1)),
    "length too large": ("lengths", lambda a: _with_draft(a, "lengths", (1,), 4)),
    "length negative": ("lengths", lambda a: _with_draft(a, "lengths", (1,), -1)),
    "parent not topological": ("parents", lambda a: _with_draft(a, "parents", (1, 1), 1)),
    "parent below -1": ("parents", lambda a: _with_draft(a, "parents", (1, 1), -2)),
    "depth too small": ("parents", lambda a: _with_flat_row_0(a, depth=1)),
    "probs negative": ("probs", lambda a: _with_draft(a, "probs", (1, 1, 0), -0.1)),
    "probs NaN": ("probs", lambda a: _with_draft(a, "probs", (1, 1, 0), torch.nan)),
    "probs sum": ("probs", lambda a: _with_draft(a, "probs", (1, 1), 0.4)),
    "uniform of one": ("uniforms", lambda a: a | {"uniforms": _set(a["uniforms"], (1, 1), 1.0)}),
    "uniform NaN": ("uniforms", lambda a: a | {"uniforms": _set(a["uniforms"], (1, 1), torch.nan)}),
    "noise negative": ("noise", lambda a: a | {"noise": _set(a["noise"], (1, 1), -1.0)}),
    "noise NaN": ("noise", lambda a: a | {"noise": _set(a["noise"], (1, 1), torch.nan)}),
}


@pytest.mark.parametrize("rule", ["token", "traversal"])
@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_value_names_argument_row_and_rule(name, rule):
    argument, spoil = BAD_VALUES[name]
    with pytest.raises(ValueError, match=rf"^{argument}: row 1.*rule '{rule}'"):
        verify(**spoil(_good()), rule=rule)


def test_the_good_arguments_are_accepted():
    assert verify(**_good()).tokens.shape == (2, 3)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("target_probs", {"target_probs": torch.ones(2, 3, 5) / 5}),
        ("target_probs", {"target_probs": torch.ones(4, 5) / 5}),
        ("target_probs", {"target_probs": torch.ones(2, 4, 0)}),
        ("uniforms", {"uniforms": torch.zeros(2, 4)}),
        ("noise", {"noise": torch.ones(2, 4)}),
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_wrong_shape_is_refused_without_value_checks(argument, change, check):
    with pytest.raises(ValueError, match=f"{argument}.*rule 'token'"):
        verify(**_good() | change, check=check)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lengths", torch.tensor([3])),
        ("parents", torch.tensor([[-1, 0]])),
        ("probs", torch.ones(2, 3, 4) / 4),
        ("depth", -1),
    ],
)
def test_a_wrong_shape_inside_the_draft_is_refused(field, value):
    arguments = _good()
    with pytest.raises(ValueError, match=f"{field}.*rule 'token'"):
        verify(**arguments | {"draft": replace(arguments["draft"], **{field: value})})


def test_a_wrong_dtype_is_a_type_error():
    arguments = _good()
    with pytest.raises(TypeError, match="target_probs"):
        verify(**arguments | {"target_probs": torch.ones(2, 4, 5, dtype=torch.long)})
    draft = replace(arguments["draft"], tokens=arguments["draft"].tokens.float())
    with pytest.raises(TypeError, match="tokens"):
        verify(**arguments | {"draft": draft})
    with pytest.raises(TypeError, match="sampled"):
        match(torch.zeros(2, 4), arguments["draft"])


def test_token_outside_its_distribution_is_refused():
    arguments = _good()
    probs = arguments["draft"].probs.clone()
    probs[0, 1] = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="probs: row 0, entry 1 has 0"):
        verify(**arguments | {"draft": replace(arguments["draft"], probs=probs)})


@pytest.mark.parametrize("name", ["uniforms", "noise"])
def test_missing_randomness_needs_one_hot_rows(name):
    with pytest.raises(ValueError, match=f"{name}: row 0.*None"):
        verify(**_good() | {name: None})


def test_block_refuses_branches_but_not_chains():
    arguments = _good()
    with pytest.raises(ValueError, match=r"parents: row 0, entry 1 .*'block'"):
        verify(**arguments, rule="block")
    chain = torch.tensor([[-1, 0, 1], [-1, 0, -1]])
    draft = replace(arguments["draft"], parents=chain, depth=3)
    verdict = verify(**arguments | {"draft": draft}, rule="block")
    expected = verify(**arguments | {"draft": replace(draft, parents=None)}, rule="block")
    assert torch.equal(verdict.tokens, expected.tokens)


def test_unknown_rule_suggests_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'traversal'"):
        verify(**_good(), rule="traversel")
    with pytest.raises(ValueError, match=r"verify\.match\(sampled, draft\)"):
        verify(**_good(), rule="match")


def test_sampled_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match="sampled has shape"):
        match(torch.zeros(2, 3, dtype=torch.long), _good()["draft"])


def test_padding_may_hold_anything():
    arguments = _good()
    draft = arguments["draft"]
    clean = verify(**arguments)
    draft = replace(
        draft,
        tokens=_set(draft.tokens, (1, 2), 99),
        parents=_set(draft.parents, (1, 2), 77),
        probs=_set(draft.probs, (1, 2), torch.nan),
    )
    dirty = verify(**_with_target(arguments, (1, 3), torch.nan) | {"draft": draft})
    assert torch.equal(clean.tokens, dirty.tokens)
