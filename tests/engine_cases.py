"""What the tests of the engine share: prompts, drafters of every kind, and how they are run."""

from tiny_heads import tiny_head
from tiny_models import perturbed, tiny_llama

from specdec import SamplingConfig, generate_baseline
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.eagle3 import Eagle3Drafter
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.tree_growth import TreeShape
from specdec.targets.hf import HFTarget

PROMPTS = [[5, 6, 7, 8], [9] * 30, [1], list(range(20, 60)), [3] * 12]


def plain_tokens(target, prompt, count, sampling=SamplingConfig()):  # noqa: B008 (frozen)
    return generate_baseline(target, [prompt], sampling, max_new_tokens=count)[0].tokens


def breaking(monkeypatch, owner, name, call, error, *, done):
    """Let one call of a method raise, before its work or with all of it done."""
    whole, calls = getattr(owner, name), []

    def method(*args, **kwargs):
        calls.append(name)
        found = whole(*args, **kwargs) if done or len(calls) != call else None
        if len(calls) == call:
            raise error
        return found

    monkeypatch.setattr(owner, name, method)


def run(engine):
    """Step until nothing is left; the chunks, in order."""
    chunks = []
    while engine.num_waiting or engine.num_running:
        chunks += engine.step()
    return chunks


class Cases:
    """Drafters with caches of every kind, and one without."""

    NAMES = ("none", "draft_model", "tree of a draft model", "eagle3", "eagle3 chain", "hybrid")

    @staticmethod
    def build(name, target):
        draft = HFTarget(perturbed(tiny_llama(), 0.15), None)
        top = target.config.num_hidden_layers
        shape = TreeShape(depth=3, width=1 if name.endswith("chain") else 4, max_nodes=6)

        def head():
            return Eagle3Drafter(
                tiny_head("eagle3", target, taps=[0, top // 2, top]), target.vocab_size, shape
            )

        if name == "none":
            return None
        if name == "draft_model":
            return DraftModel(draft, target.vocab_size, 4)
        if name == "tree of a draft model":
            return DraftModel(draft, target.vocab_size, 3, width=3, max_nodes=4)
        if name == "hybrid":
            return HybridDrafter([NgramDrafter(), head()], max_nodes=5)
        return head()
