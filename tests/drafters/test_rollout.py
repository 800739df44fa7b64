"""The training-time test sees what drafting sees: a chain behind every place of a text."""

import pytest
import torch
from scripted import DRAFTERS, VOCAB, lively_head, slow_head, small_target, true_features
from slow_heads import Continuation

from specdec import SamplingConfig
from specdec.drafters.tree_growth import TreeShape
from specdec.engine.interfaces import TargetOutput
from specdec.sampling.sampler import Sampler

TEXTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [8, 8, 0, 16, 7, 0, 0, 3, 2]]
LENGTH, NUM_STEPS = len(TEXTS[0]), 4
NORMED = {"norm_output": True, "norm_before_residual": True}
MIXED = "mixture_of_attentions"
HEADS = {
    **{"eagle": ("eagle", {}), "eagle3": ("eagle3", {}), "eagle3, normed": ("eagle3", NORMED)},
    **{"eagle3, deep": ("eagle3", {"num_layers": 2}), "peagle": ("peagle", {})},
    **{"mtp": ("mtp", {}), MIXED: (MIXED, {})},
    "mtp modules": ("mtp", {"num_modules": NUM_STEPS}),
    f"{MIXED}, own tokens": (MIXED, {"cross_attention": False}),
    f"{MIXED}, target layers": (MIXED, {"target_layers": 2}),
}


def places(step):
    """Places whose pair at this step has a token: t_{i + 1 + step}."""
    return range(LENGTH - 1 - step)


@pytest.mark.parametrize(("kind", "options"), HEADS.values(), ids=HEADS)
def test_rollout_equals_drafted_chain_behind_every_place(kind, options):
    target = small_target()
    head = lively_head(kind, target, **options)
    with torch.no_grad():
        tokens = torch.tensor(TEXTS)
        rows = [true_features(target, [*text, 0], head.taps) for text in TEXTS]
        hidden = {tap: torch.stack([row[tap] for row in rows]) for tap in head.taps}
        outputs = list(head.rollout(tokens, head.fuse(hidden), NUM_STEPS))
    flags = options if kind in ("eagle3", MIXED) else {}
    slow = slow_head(kind, head, target, **flags)
    for row, text in enumerate(TEXTS):
        features = slow.fuse({tap: states[row] for tap, states in hidden.items()})
        for place in places(0):
            shown = place + 1 + len(features) - LENGTH
            chain = Continuation(slow, text[: place + 2], features[:shown])
            for step in range(min(NUM_STEPS, LENGTH - 1 - place)):
                expected = chain.output(tuple(text[place + 2 : place + 2 + step])).float()
                found = outputs[step][row, place]
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    # A drafter that begins at every place, and whose head then says what the text says.
    prompts = [text[: place + 2] for text in TEXTS for place in places(0)]
    longer = [[*text, *[0] * NUM_STEPS] for text in TEXTS]  # past its end it may say anything
    heard = []

    def say_what_the_text_says(states):
        all_said = []
        for column in states.unbind(1):
            all_said.append(
                [text[place + 2 + len(heard)] for text in longer for place in places(0)]
            )
            heard.append(column.view(len(TEXTS), LENGTH - 1, -1))
        return torch.nn.functional.one_hot(torch.tensor(all_said).T, VOCAB).float()

    head.logits = say_what_the_text_says
    drafter = DRAFTERS[kind](head, VOCAB, TreeShape(depth=NUM_STEPS, width=1))
    begun = {tap: each.repeat_interleave(LENGTH - 1, 0)[:, :-1] for tap, each in hidden.items()}
    sampler = Sampler([SamplingConfig()] * len(prompts), VOCAB, None, prompts, ())
    with torch.inference_mode():
        drafter.begin(prompts, TargetOutput(torch.empty(0), begun), sampler)
        root = torch.tensor([prompt[-1] for prompt in prompts])
        drafter.propose(root, [NUM_STEPS] * len(prompts), sampler)
    assert len(heard) == NUM_STEPS
    for step, drafted in enumerate(heard):
        shown = slice(LENGTH - 1 - step)
        expected = outputs[step][:, shown]
        newest = drafted[:, shown, : expected.shape[-1]]  # modules give all their outputs
        torch.testing.assert_close(newest, expected, atol=1e-5, rtol=1e-4)
