"""Expected steps against enumeration: every draft, every verdict, three tokens in all."""

from itertools import product

import numpy as np
import pytest
from toy import VOCAB, ToyDrafter, ToyLoop, ToyTarget, law, top_p

from specdec import SamplingConfig, load_target
from specdec.analysis.describe import CLASSES, classify, reliability
from specdec.analysis.predict import Expected, Predictor, expect
from specdec.analysis.teacher_forced import gather_evidence
from specdec.analysis.texts import Text

PROMPT = [0, 1]
WARM = SamplingConfig(temperature=1)
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


def likelihood(text, process=lambda probs: probs):
    chances = [
        process(law("p", (*PROMPT, *text.tokens[:n])))[text.tokens[n]]
        for n in range(1, len(text.tokens))
    ]
    return float(np.prod(chances))


def prediction(drafter, given, sampling=WARM, width=3):
    evidence = gather_evidence(ToyTarget(), drafter, given, sampling, 3, width)
    return expect(evidence, drafter.fixed_shape, sampled=drafter.children != "top")


def assert_enumerated(drafter, given, sampling=WARM, process=lambda probs: probs):
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
def test_expected_steps_are_those_of_every_run(shape, children, length, limit):
    assert_enumerated(ToyDrafter(SHAPES[shape], children), texts(length, limit)[::4])


@pytest.mark.parametrize("shape", ["chain of 3", "three siblings"])
def test_filtered_distributions_are_compared_as_sampled(shape):
    def process(probs):
        return top_p(probs, 0.7)

    possible = [text for text in texts(4, 6) if likelihood(text, process) > 0]
    assert 1 < len(possible) < 27
    sampling = SamplingConfig(temperature=1, top_p=0.7)
    assert_enumerated(ToyDrafter(SHAPES[shape]), possible, sampling, process)


@pytest.mark.parametrize("threshold", [0.3, 0.45, 0.7])
def test_a_threshold_ends_chains_like_the_loop(threshold):
    given = texts(4, 6)[::3]
    found = assert_enumerated(ToyDrafter(CHAIN, threshold=threshold), given)
    assert not found.drafted_is_exact
    assert sum(found.steps) > sum(prediction(ToyDrafter(CHAIN), given).steps)


def test_steps_weighted_by_texts_are_the_loops():
    """The tower rule over all texts: nothing is lost by looking at one text at a time."""
    drafter, given = ToyDrafter(SHAPES["tree"]), texts(4, 4)
    weights = [likelihood(text) for text in given]
    assert sum(weights) == pytest.approx(1)
    loop = ToyLoop(drafter.fixed_shape)
    whole = sum(loop._from(text, 1)[1] for text in given)
    ours = sum(w * s for w, s in zip(weights, prediction(drafter, given).steps, strict=True))
    assert ours == pytest.approx(whole, abs=1e-5)


def test_greedy_drafts_accept_only_the_likeliest_token():
    text = [0]
    for _ in range(4):
        text.append(int(np.argmax(law("p", (*PROMPT, *text)))))
    given = [Text(PROMPT, text, 9)]
    evidence = gather_evidence(ToyTarget(), ToyDrafter(CHAIN), given, SamplingConfig(), 3, 1)
    is_best = (evidence.rank == 0)[evidence.valid]
    assert set(evidence.accept[..., 0][evidence.valid].tolist()) <= {0.0, 1.0}
    assert (evidence.accept[..., 0][evidence.valid] == is_best).all()
    assert (evidence.overlap[evidence.valid] == is_best).all()


def test_figures_add_up_over_prompts():
    given = texts(4, 6)
    found = prediction(ToyDrafter(CHAIN), given)
    accepted = sum(found.tokens) - len(given) - sum(found.steps)
    assert found.tau == pytest.approx(1 + accepted / sum(found.steps))
    assert sum(map(sum, found.accepted_at)) == pytest.approx(accepted)
    low, high = found.tau_interval()
    assert low < found.tau < high
    first, second, third = found.conditional_acceptance_at_depth
    assert 0 < second < first < 1
    assert third == 0, "the last token of a text is its step's own"


def test_a_text_of_one_token_has_no_step():
    one, two = Text(PROMPT, [0], 4), Text(PROMPT, [0, 1], 4)
    found = prediction(ToyDrafter(CHAIN), [one, two], SamplingConfig())
    assert found.steps == [0.0, 1.0]
    alone = prediction(ToyDrafter(CHAIN), [one], SamplingConfig())
    assert (alone.tau, alone.tau_interval()) == (1.0, None)
    assert Expected.from_records([[]]).tau == 1.0


def test_levels_the_drafter_lacks_are_never_accepted(monkeypatch):
    shallow = ToyDrafter(CHAIN)
    deep = shallow.forced
    shallow.forced = lambda tokens, hidden, depth, first: deep(tokens, hidden, min(depth, 2), first)
    monkeypatch.setattr("specdec.analysis.predict.load_drafter", lambda options, target: shallow)
    found = Predictor(ToyTarget(), texts(4, 6), WARM).predict({"type": "toy"})
    assert sum(row[1] for row in found.accepted_at) > 0
    assert sum(row[2] for row in found.accepted_at) == 0


def test_calibration_is_confidence_against_acceptance():
    confidence = np.array([0.05, 0.55, 0.55, 0.95, 1.0])
    taken = np.array([False, True, False, True, True])
    found = reliability(confidence, taken)
    assert [row.count for row in found.bins] == [1, 0, 0, 0, 0, 2, 0, 0, 0, 2]
    assert found.ece == pytest.approx((0.05 + 2 * 0.05 + 2 * 0.025) / 5)
    assert reliability(np.array([]), np.array([])) is None


def test_token_classes_tell_words_from_pieces():
    tokenizer = load_target("demo").tokenizer
    ids = tokenizer("A zebra-like 42,\n\n", add_special_tokens=False)["input_ids"]
    ids = [*ids, tokenizer.all_special_ids[0]]
    names = [CLASSES[c] for c in classify(ids, tokenizer)]
    assert (tokenizer.decode(ids[0]), names[0], names[-1]) == ("A", "word_start", "special")
    found = {
        tokenizer.decode([i]).strip() or tokenizer.decode([i])[:1]: name
        for i, name in zip(ids, names, strict=True)
    }
    assert (found["-"], found["\n"]) == ("punctuation", "newline")
    assert {"digit", "word_piece"} <= set(found.values())
