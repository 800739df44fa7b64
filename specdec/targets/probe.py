"""A few short forwards at load that show whether a model can be a target at all.

Modeling code may look at a key's slot instead of its position (ALiBi), make masks of its own or
drop an argument without a word. Only its logits tell, so they are compared with those of the
model's own forward, for all that the loop asks of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from specdec.common.files import first_line
from specdec.engine.scheduler import is_out_of_memory
from specdec.targets.attention import use_grouped_attention
from specdec.verify import Draft

# A window is narrowed to so many tokens, or else no short text would reach it: the first prompt
# ends behind its edge, the second one's text crosses it.
_WINDOW, _PROMPT_LENS = 4, (6, 2)
# Behind every root, so many siblings that slots lie far from positions, and then the right path.
_NUM_SIBLINGS, _PATH_LEN = 4, 3
_TEXT_LEN = max(_PROMPT_LENS) + _PATH_LEN + 4  # the root, the path, and three tokens behind it
# Windows of modeling code's own, counted in slots and too wide for a short text to tell.
_OWN_WINDOWS = ("window_size", "keep_window_size", "attention_window", "index_topk")
# The largest error of a row of logits, relative to its spread.
_EXACT, _ROUNDED = 1e-3, 0.1


def check_target(target: Any) -> None:
    """Refuse a model whose logits through a new `HFTarget`'s cache are not its own.

    It also calls `use_grouped_attention`, after the model's own forward.
    """
    model, config = target.model, target.config
    name = f"{type(model).__name__} with {getattr(config, '_attn_implementation', None)} attention"
    for field in _OWN_WINDOWS:
        reach = getattr(config, field, None)
        if isinstance(reach, int) and 0 < reach < target.max_context_len:
            raise ValueError(
                f"{name} makes masks of its own behind {reach} tokens ({field}), which would be "
                "wrong for trees and ragged rows; use another model"
            )
    if target.max_context_len < _TEXT_LEN:
        use_grouped_attention(model)
        return
    try:
        with torch.no_grad(), _narrow_window(target):
            stages = list(_compare(target))
    except Exception as error:  # whatever modeling code raises
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"{name} does not run with specdec's cache and 4D masks ({type(error).__name__}: "
            f"{first_line(error)}); use another model"
        ) from error
    is_exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    is_exact = is_exact and torch.get_float32_matmul_precision() == "highest"
    for stage, ours, own in stages:
        real = own.isfinite()  # some models bar ids by -inf; of NaN the loop will tell
        ours, own = (logits.float().where(real, 0) for logits in (ours, own))
        errors = (ours - own).square().mean(-1).sqrt() / own.std(-1).clamp(min=1e-9)
        # Rounding may change the experts of single tokens, but not of most.
        off = float(errors.max() if is_exact else errors.median())
        if not off <= (_EXACT if is_exact else _ROUNDED):
            raise ValueError(
                f"{name} gives other logits {stage} than in its own forward, off by {off:.2g} of "
                "their spread: it does not keep to masks and positions given (ALiBi, masks of its "
                "own), or is not in eval mode; use another model"
            )


def _compare(target: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Ask several things; yields each, the target's logits [..., V] for it, and the model's own."""
    model, device, num_rows = target.model, target.device, len(_PROMPT_LENS)
    num_ids = min(target.vocab_size, model.get_input_embeddings().weight.shape[0])
    # From the middle of the vocabulary, because special ids stand at its ends.
    ids = torch.arange(num_rows * _TEXT_LEN, device=device) * 7 + num_ids // 2
    texts = (ids % num_ids).view(num_rows, -1)
    places = torch.arange(_TEXT_LEN, device=device)
    ones, positions = torch.ones_like(texts), places.expand(num_rows, -1)  # as `generate` has them
    own = model(
        input_ids=texts, attention_mask=ones, position_ids=positions, use_cache=False
    ).logits
    use_grouped_attention(model)
    rows = torch.arange(num_rows, device=device).unsqueeze(1)
    roots = torch.tensor(_PROMPT_LENS, device=device).unsqueeze(1)

    def at(states: Tensor, first: int, end: int) -> Tensor:
        """Places [first, end) of every row, counted from its root."""
        return states[rows, roots + torch.arange(first, end, device=device)]

    prompts = [text[:n].tolist() for text, n in zip(texts, _PROMPT_LENS, strict=True)]
    yield "after ragged prompts", target.prefill(prompts).logits, at(own, -1, 0)
    later = _PATH_LEN + 1
    siblings = at(texts, later, later + 1).expand(-1, _NUM_SIBLINGS)
    nodes = torch.cat([siblings, at(texts, 1, later)], 1)
    path = torch.arange(_NUM_SIBLINGS, nodes.shape[1], device=device).expand(num_rows, -1)
    parents = torch.cat([torch.full_like(siblings, -1), path - 1], 1)
    parents[:, _NUM_SIBLINGS] = -1
    lengths = torch.full_like(roots[:, 0], nodes.shape[1])
    draft = Draft.tree(nodes, parents, lengths, depth=_PATH_LEN)
    logits = target.score(at(texts, 0, 1)[:, 0], draft).logits
    wanted = torch.cat([logits[:, :1], logits[:, 1 + _NUM_SIBLINGS :]], 1)
    yield "in a tree", wanted, at(own, 0, later)
    target.cache.gather_path(path)
    target.cache.extend([later] * num_rows)
    logits = target.feed(at(texts, later, later + 2), [2] * num_rows)
    yield "behind an accepted path", logits, at(own, later + 1, later + 2)[:, 0]
    target.reorder(rows[0])
    logits = target.feed(at(texts, later + 2, later + 3)[:1], [1])
    yield "for a single token", logits, at(own, later + 2, later + 3)[:1, 0]


@contextmanager
def _narrow_window(target: Any) -> Iterator[None]:
    """Make sliding layers slide within the first tokens: transformers asks the config each time."""
    window = target._masks.window
    found = [getattr(module, "config", None) for module in target.model.modules() if window]
    configs: list[Any] = [each for each in found if getattr(each, "sliding_window", 0) == window]

    def resize(size: int) -> None:
        target._masks.window = size
        for config in configs:
            config.sliding_window = size

    try:
        resize(min(window, _WINDOW))
        yield
    finally:
        resize(window)
