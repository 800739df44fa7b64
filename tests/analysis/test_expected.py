"""Expected steps against enumeration: every draft, every verdict, on laws over three tokens."""

from itertools import product

import pytest
from toy import VOCAB, ToyDrafter, ToyLoop, ToyTarget, law, top_p

from specdec import SamplingConfig
from specdec.analysis.expected import Expected, expect
from specdec.analysis.predict import Predictor
from specdec.analysis.teacher_forced import gather_evidence
from specdec.analysis.texts import Text

PROMPT = [0, 1]
CHAIN = [(0,), (0, 0), (0, 0, 0)]
SHAPES = {
    "one token": CHAIN[:1],
    "chain of 2": CHAIN[:2],
    "chain of 3": CHAIN,
    "three siblings": [(0,), (1,), (2,)],
    "tree": [(0,), (1,), (0, 0), (1, 0)],
    "deep tree": [(0,), (1,), (0, 0), (0, 0, 0)],
}
# (new tokens, max_tokens): the budget ends the first, an end of sequence the second.
ENDS = [(4, 4), (3, 6)]


def texts(length, limit):
    """All of a length that start with token 0."""
    rests = product(range(VOCAB), repeat=length - 1)
    return [Text(PROMPT, [0, *rest], limit) for rest in rests]


def prediction(drafter, given, sampling, width=3):
    evidence = gather_evidence(ToyTarget(), drafter, given, sampling, 3, width)
    sampled = drafter.children != "top"
    return expect(evidence, drafter.fixed_shape, sampled=sampled)


def assert_enumerated(drafter, given, sampling, process=lambda probs: probs):
    found, loop = prediction(drafter, given, sampling), ToyLoop(drafter.fixed_shape, process)
    for index, text in enumerate(given):
        steps, nodes = loop.expected(text)
        assert found.steps[index] == pytest.approx(steps, abs=1e-5), text
        if found.drafted_is_exact:
            assert found.drafted[index] == pytest.approx(nodes, abs=1e-4), text
    return found


@pytest.mark.parametrize("children", ["with_replacement", "top"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("length", "limit"), ENDS)
def test_expected_steps_are_those_of_every_run_that_emits_the_text(shape, children, length, limit):
    drafter = ToyDrafter(SHAPES[shape], children)
    given = texts(length, limit)[::4]
    assert_enumerated(drafter, given, SamplingConfig(temperature=1))


@pytest.mark.parametrize("shape", ["chain of 3", "three siblings"])
def test_filtered_laws_are_compared_as_they_are_sampled(shape):
    def process(probs):
        return top_p(probs, 0.7)

    possible = [
        text
        for text in texts(4, 6)
        if all(
            process(law("p", (*PROMPT, *text.tokens[:n])))[text.tokens[n]] > 0 for n in range(1, 4)
        )
    ]
    assert 1 < len(possible) < 27
    drafter = ToyDrafter(SHAPES[shape])
    assert_enumerated(drafter, possible, SamplingConfig(temperature=1, top_p=0.7), process)


@pytest.mark.parametrize("threshold", [0.3, 0.45, 0.7])
def test_a_threshold_ends_chains_where_the_loop_does(threshold):
    drafter = ToyDrafter(CHAIN, threshold=threshold)
    given = texts(4, 6)[::3]
    found = assert_enumerated(drafter, given, SamplingConfig(temperature=1))
    assert not found.drafted_is_exact
    longest = prediction(ToyDrafter(CHAIN), given, SamplingConfig(temperature=1))
    assert sum(found.steps) > sum(longest.steps)


def test_expected_steps_weighted_by_the_texts_are_those_of_the_loop():
    """The tower rule over all texts: nothing is lost by looking at one text at a time."""
    drafter, given = ToyDrafter(SHAPES["tree"]), texts(4, 4)
    found = prediction(drafter, given, SamplingConfig(temperature=1))
    weights = [1.0] * len(given)
    for index, text in enumerate(given):
        for n in range(1, 4):
            weights[index] *= law("p", (*PROMPT, *text.tokens[:n]))[text.tokens[n]]
    assert sum(weights) == pytest.approx(1)
    loop = ToyLoop(drafter.fixed_shape)
    whole = sum(loop._from(text, 1)[1] for text in given)
    ours = sum(w * s for w, s in zip(weights, found.steps, strict=True))
    assert ours == pytest.approx(whole, abs=1e-5)


def test_at_temperature_0_only_the_likeliest_token_is_accepted():
    text = [0]
    for _ in range(4):
        probs = law("p", (*PROMPT, *text))
        text.append(probs.index(max(probs)))
    drafter = ToyDrafter(CHAIN)
    evidence = gather_evidence(
        ToyTarget(), drafter, [Text(PROMPT, text, 9)], SamplingConfig(), 3, 1
    )
    known = evidence.valid
    is_best = (evidence.rank == 0)[known]
    assert set(evidence.accept[..., 0][known].tolist()) <= {0.0, 1.0}
    assert (evidence.accept[..., 0][known] == is_best).all()
    assert (evidence.overlap[known] == is_best).all()


def test_figures_add_up_over_prompts():
    given = texts(4, 6)
    found = prediction(ToyDrafter(CHAIN), given, SamplingConfig(temperature=1))
    accepted = sum(found.tokens) - len(given) - sum(found.steps)
    assert found.tau == pytest.approx(1 + accepted / sum(found.steps))
    assert sum(map(sum, found.accepted_at)) == pytest.approx(accepted)
    low, high = found.tau_interval()
    assert low < found.tau < high
    first, second, third = found.conditional_acceptance_at_depth
    assert 0 < second < first < 1
    assert third == 0, "the last token of a text is its step's own"


def test_a_text_of_one_token_has_no_step():
    found = prediction(
        ToyDrafter(CHAIN), [Text(PROMPT, [0], 4), Text(PROMPT, [0, 1], 4)], SamplingConfig()
    )
    assert found.steps == [0.0, 1.0]
    alone = prediction(ToyDrafter(CHAIN), [Text(PROMPT, [0], 4)], SamplingConfig())
    assert (alone.tau, alone.tau_interval()) == (1.0, None)
    assert Expected.from_records([[]]).tau == 1.0


def test_more_than_the_drafter_has_is_never_accepted(monkeypatch):
    monkeypatch.setattr("specdec.analysis.predict.load_drafter", lambda options, target: shallow)
    shallow = ToyDrafter(CHAIN)
    deep = shallow.forced
    shallow.forced = lambda tokens, hidden, depth, first: deep(tokens, hidden, min(depth, 2), first)
    given, sampling = texts(4, 6), SamplingConfig(temperature=1)
    found = Predictor(ToyTarget(), given, sampling).predict({"type": "toy"})
    assert sum(row[1] for row in found.accepted_at) > 0
    assert sum(row[2] for row in found.accepted_at) == 0
