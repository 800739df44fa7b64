"""The training-time test sees what drafting sees: a chain behind every place of a text."""

import pytest
import torch
from scripted import DRAFTERS, TAPS, VOCAB, lively_head, small_target
from slow_heads import Continuation, SlowEagle, SlowEagle3

from specdec import SamplingConfig
from specdec.drafters.tree_growth import TreeShape
from specdec.engine.interfaces import TargetOutput
from specdec.sampling.sampler import Sampler

TEXTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [8, 8, 0, 16, 7, 0, 0, 3, 2]]
LENGTH, NUM_STEPS = len(TEXTS[0]), 4
HEADS = {
    "eagle": ("eagle", {}),
    "eagle3": ("eagle3", {}),
    "eagle3, normed output": ("eagle3", {"norm_output": True, "norm_before_residual": True}),
}


def rolled_out(kind, options):
    """A head, the target's hidden states by tap [B, L, H], and the outputs of every step."""
    target = small_target()
    head = lively_head(kind, target, **options)
    with torch.no_grad():
        tokens = torch.tensor(TEXTS)
        states = target.model(input_ids=tokens, output_hidden_states=True).hidden_states
        hidden = {tap: states[tap] for tap in head.taps}
        outputs = list(head.rollout(tokens, head.fuse(hidden), NUM_STEPS))
    return target, head, hidden, outputs


def places(step):
    """Places whose pair at this step has a token: t_{i + 1 + step}."""
    return range(LENGTH - 1 - step)


@pytest.mark.parametrize("name", HEADS)
def test_rollout_equals_chain_behind_every_place(name):
    kind, options = HEADS[name]
    target, head, hidden, outputs = rolled_out(kind, options)
    slow = (
        SlowEagle(head, target.model)
        if kind == "eagle"
        else SlowEagle3(head, target.model, TAPS, **options)
    )
    for row, text in enumerate(TEXTS):
        features = slow.fuse({tap: states[row] for tap, states in hidden.items()})
        for place in places(0):
            chain = Continuation(slow, text[: place + 2], features[: place + 1])
            for step in range(NUM_STEPS):
                if place in places(step):
                    path = tuple(text[place + 2 : place + 2 + step])
                    expected = chain.output(path).float()
                    torch.testing.assert_close(
                        outputs[step][row, place], expected, atol=1e-4, rtol=1e-4
                    )


@pytest.mark.parametrize("name", HEADS)
def test_drafter_equals_rollout_on_own_tokens(name):
    kind, options = HEADS[name]
    _, head, hidden, outputs = rolled_out(kind, options)
    prompts = [text[: place + 2] for text in TEXTS for place in places(0)]
    heard = []

    def say_what_the_text_says(states):
        """Logits [B, 1, V] that are certain of the text's next token."""
        level = len(heard)
        longer = [[*text, *[0] * NUM_STEPS] for text in TEXTS]  # past its end it may say anything
        said = [text[place + 2 + level] for text in longer for place in places(0)]
        heard.append(states[:, 0])
        return torch.nn.functional.one_hot(torch.tensor(said), VOCAB)[:, None].float()

    head.logits = say_what_the_text_says
    drafter = DRAFTERS[kind](head, VOCAB, TreeShape(depth=NUM_STEPS, width=1))
    by_prompt = {
        tap: torch.cat([states[row : row + 1].expand(LENGTH - 1, -1, -1) for row in range(2)])
        for tap, states in hidden.items()
    }
    sampler = Sampler([SamplingConfig()] * len(prompts), VOCAB, None, prompts, ())
    with torch.inference_mode():
        longest = max(map(len, prompts)) - 1
        states = {tap: rows[:, :longest] for tap, rows in by_prompt.items()}
        drafter.begin(prompts, TargetOutput(torch.empty(0), states), sampler)
        root = torch.tensor([prompt[-1] for prompt in prompts])
        drafter.propose(root, [NUM_STEPS] * len(prompts), sampler)
    assert len(heard) == NUM_STEPS
    for step, drafted in enumerate(heard):
        drafted = drafted.view(len(TEXTS), LENGTH - 1, -1)
        for place in places(step):
            torch.testing.assert_close(
                drafted[:, place], outputs[step][:, place], atol=1e-5, rtol=1e-4
            )
