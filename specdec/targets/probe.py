"""A few short forwards at load that show whether a model can be a target at all.

Modeling code may look at a key's slot instead of its position (ALiBi), share keys between layers,
make masks of its own or drop an argument without a word. Only its logits tell, so they are compared
with those of the model's own forward, for all that the loop asks of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from specdec.targets.attention import use_grouped_attention
from specdec.targets.memory import is_out_of_memory
from specdec.verify import Draft, Verdict

# A window is narrowed to so many tokens, or else no short text would reach it: the first prompt
# begins behind its edge, the second one's text crosses it.
_WINDOW = 4
_PROMPT_LENS = (6, 2)
# Behind every root: enough siblings that slots lie far from positions, and a chain, accepted later.
_PARENTS = [-1, -1, -1, -1, -1, 4, 5]
_PATH = [4, 5, 6]
_NUM_LATER = 3  # tokens behind the path
_LONGEST = max(_PROMPT_LENS) + 1 + len(_PATH) + _NUM_LATER
# Largest error of a logit row, relative to the row's spread.
_EXACT, _ROUNDED = 1e-3, 0.1


def check_target(target: Any) -> None:
    """Refuse a model whose logits through the target's cache are not its own.

    Also switches the model's attention, see `use_grouped_attention`.

    Args:
        target: an `HFTarget` that has just been built; its batch is forgotten.

    Raises:
        ValueError: the model's class, what was asked of it, and how far off its answer is.
    """
    model = target.model
    if target.max_context_len < _LONGEST:
        use_grouped_attention(model)
        return
    name = type(model).__name__
    try:
        with torch.no_grad(), _narrow_window(target):
            stages = _compare(target)
    except Exception as error:  # anything that modeling code raises
        if is_out_of_memory(error):
            raise
        text = str(error).splitlines()[0] if str(error) else ""
        raise ValueError(
            f"{name} does not run with specdec's cache and 4D masks ({type(error).__name__}: "
            f"{text}); use another model"
        ) from error
    is_exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    is_exact = is_exact and torch.get_float32_matmul_precision() == "highest"
    for stage, ours, own in stages:
        error = (ours - own).square().mean(-1).sqrt() / own.std(-1)
        # Rounding may change the experts of single tokens, but not of most.
        off = float(error.max() if is_exact else error.median())
        if off > (_EXACT if is_exact else _ROUNDED):  # no NaN is: the loop will say it
            raise ValueError(
                f"{name} gives other logits {stage} than in its own forward, off by {off:.2g} of "
                "their spread: its attention does not keep to the masks and positions it is given "
                "(ALiBi, layers that share keys, masks of its own), or it is not in eval mode; use "
                "another model"
            )


def _compare(target: Any) -> list[tuple[str, Tensor, Tensor]]:
    """What is asked, the target's logits [..., V] for it, and the model's own."""
    model, device = target.model, target.device
    batch, num_nodes = len(_PROMPT_LENS), len(_PARENTS)
    num_ids = min(target.vocab_size, model.get_input_embeddings().weight.shape[0])
    # From the middle of the vocabulary, because special ids stand at its ends.
    ids = (torch.arange(batch * (_LONGEST + num_nodes), device=device) * 7 + num_ids // 2) % num_ids
    texts, nodes = ids.view(batch, -1).split([_LONGEST, num_nodes], 1)
    texts = texts.clone()
    siblings = texts.clone()
    for row, length in enumerate(_PROMPT_LENS):
        texts[row, length + 1 : length + 1 + len(_PATH)] = nodes[row, _PATH]
        siblings[row, length + 1] = nodes[row, 0]
    both = torch.cat([texts, siblings])
    positions = torch.arange(_LONGEST, device=device).expand(len(both), -1)
    own = model(
        input_ids=both,
        attention_mask=torch.ones_like(both),  # as `generate` calls it
        position_ids=positions,
        use_cache=False,
    ).logits.float()
    use_grouped_attention(model)

    rows = torch.arange(batch, device=device)
    ends = torch.tensor(_PROMPT_LENS, device=device)  # the roots' places
    path_len = len(_PATH)

    def behind(first: int, count: int) -> Tensor:
        """The model's own logits [B, count, V] at so many places from `first` behind the root."""
        return own[rows[:, None], ends[:, None] + first + torch.arange(count, device=device)]

    def token(place: int) -> Tensor:
        return texts[rows, ends + place]

    prompts = [texts[row, :length].tolist() for row, length in enumerate(_PROMPT_LENS)]
    stages = [("after ragged prompts", target.prefill(prompts).logits, behind(-1, 1))]
    parents = torch.tensor([_PARENTS] * batch, device=device)
    lengths = torch.full((batch,), num_nodes, device=device)
    tree = target.score(token(0), Draft.tree(nodes, parents, lengths, depth=path_len)).logits
    sibling = own[batch + rows, ends + 1]
    wanted = torch.cat([behind(0, 1), sibling[:, None], behind(1, path_len)], 1)
    stages.append(("in a tree", tree[:, [0, 1, *(node + 1 for node in _PATH)]], wanted))
    path = torch.tensor([_PATH] * batch, device=device)
    target.commit(Verdict(path, lengths, path, parents == parents), [path_len] * batch)
    chain = Draft.chain(token(path_len + 2)[:, None])
    chained = target.score(token(path_len + 1), chain).logits
    stages.append(("behind an accepted path", chained, behind(path_len + 1, 2)))
    target.commit(Verdict(path, lengths, path, parents == parents), [1] * batch)
    target.reorder(rows[:1])
    single = target.score(token(path_len + 3)[:1], Draft.empty(1, device)).logits
    stages.append(("for a single token", single, behind(path_len + 3, 1)[:1]))
    return [(stage, ours.float(), theirs) for stage, ours, theirs in stages]


@contextmanager
def _narrow_window(target: Any) -> Iterator[None]:
    """Make sliding layers slide within the first tokens: transformers asks the config each time."""
    window = target._masks.window
    modules = (getattr(module, "config", None) for module in target.model.modules())
    configs = {id(config): config for config in (target.config, *modules)}
    if not window:
        configs.clear()
    narrowed = [each for each in configs.values() if getattr(each, "sliding_window", 0) == window]
    narrowed = narrowed if window else []
    try:
        for config in narrowed:
            config.sliding_window = _WINDOW
        target._masks.window = _WINDOW if window else 0
        yield
    finally:
        for config in narrowed:
            config.sliding_window = window
        target._masks.window = window
