"""Drafts in the layouts of serving engines: flat as in vLLM, padded trees as in SGLang.

Nothing here reads a tensor back to the host, as long as the caller gives the sizes it knows.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.verify.draft import Draft, Verdict


def _flat_index(cu_counts: Tensor, width: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Locate each padded entry in the flat tensor: index [B, width], is_real, counts [B]."""
    counts = torch.diff(cu_counts, prepend=cu_counts.new_zeros(1)).long()
    if width is None:
        width = int(counts.amax()) if len(counts) else 0
    columns = torch.arange(width, device=cu_counts.device)
    is_real = columns < counts.unsqueeze(1)
    starts = (cu_counts - counts).unsqueeze(1)
    return (starts + columns).masked_fill(~is_real, 0), is_real, counts


def from_flat(
    tokens: Tensor,
    cu_num_draft_tokens: Tensor,
    *,
    max_len: int | None = None,
    probs: Tensor | None = None,
) -> Draft:
    """Build chains from draft tokens that stand one after another, vLLM's layout.

    Args:
        tokens: [sum k] token ids.
        cu_num_draft_tokens: [B] cumulative counts k, without a leading zero.
        max_len: N, at least the largest k; None reads it from the device, a host synchronization.
        probs: [sum k, V] the q of each token.
    """
    index, is_real, counts = _flat_index(cu_num_draft_tokens, max_len)
    if tokens.shape[0] == 0:
        return Draft.chain(torch.full_like(index, -1), counts)
    padded = tokens.long()[index].masked_fill(~is_real, -1)
    return Draft.chain(padded, counts, None if probs is None else probs[index])


def target_from_flat(
    target_probs: Tensor, cu_num_draft_tokens: Tensor, max_len: int, *, bonus: Tensor | bool = True
) -> Tensor:
    """Pad flat target rows to [B, max_len + 1, V]; padding repeats some other row, or is 0.

    Args:
        target_probs: [sum (k + 1), V], each chain's bonus row last, as in vLLM's second runner
            (`cu_num_logits[1:]` = `cu_num_draft_tokens` + 1 .. B); else [sum k, V] without these.
        cu_num_draft_tokens: [B] cumulative counts k, without a leading zero.
        max_len: N, at least the largest k.
        bonus: True if `target_probs` holds the bonus rows; these rows [B, V] if they stand apart;
            False if there are none, as for `verify(bonus_tokens=)` in vLLM's first runner.
    """
    rows = torch.arange(cu_num_draft_tokens.shape[0], device=cu_num_draft_tokens.device)
    ends = cu_num_draft_tokens + (rows + 1 if bonus is True else 0)
    index, _, counts = _flat_index(ends, max_len + 1)
    padded = _take(target_probs, index)
    if isinstance(bonus, Tensor):
        padded[rows, counts] = bonus.to(padded.dtype)
    return padded


def uniforms_from_flat(uniforms: Tensor, cu_num_draft_tokens: Tensor, max_len: int) -> Tensor:
    """Pad uniforms [sum k], vLLM's layout, to [B, max_len]; arguments as in `target_from_flat`."""
    return _take(uniforms, _flat_index(cu_num_draft_tokens, max_len)[0])


def _take(flat: Tensor, index: Tensor) -> Tensor:
    return flat[index] if len(flat) else flat.new_zeros(*index.shape, *flat.shape[1:])


def to_flat(
    draft: Draft, *, total: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Write chains one after another, vLLM's layout.

    Args:
        draft: a chain.
        total: sum of `draft.lengths`; None reads it from the device, a host synchronization.

    Returns:
        tokens [total], cu_num_draft_tokens [B] int32, probs [total, V] or None, and the indices
        [total] of the flat entries in the padded [B * N] layout.

    Raises:
        ValueError: the draft is a tree.
    """
    if draft.parents is not None:
        raise ValueError("parents: the flat layout has no place for a tree; build a chain")
    ends = draft.lengths.cumsum(0)
    total = int(ends[-1]) if total is None else total
    real = draft.real_nodes()
    columns = torch.arange(draft.num_nodes, device=real.device)
    target = ((ends - draft.lengths).unsqueeze(1) + columns).masked_fill(~real, total)
    source = torch.arange(real.numel(), device=real.device)
    index = source.new_zeros(total + 1).scatter(0, target.flatten(), source)[:total]
    probs = None if draft.probs is None else draft.probs.flatten(0, 1)[index]
    return draft.tokens.flatten()[index], ends.int(), probs, index


def from_retrieve(
    candidates: Tensor, retrieve_next_token: Tensor, retrieve_next_sibling: Tensor, depth: int
) -> Draft:
    """Build trees from first-child and next-sibling links, SGLang's layout.

    Slot 0 is the root, so SGLang's `target_probs` [B, n, V] serve `verify` as they are.

    Args:
        candidates: [B, n] tokens, the root's in slot 0.
        retrieve_next_token: [B, n] the slot of a slot's first child, -1 for none.
        retrieve_next_sibling: [B, n] the slot of the next sibling, -1 for none. Siblings must be
            linked in slot order, as SGLang's tree builder does: node order is judging order.
        depth: at least the longest path.
    """
    num_slots = candidates.shape[1]
    slots = torch.arange(num_slots, device=candidates.device).expand_as(candidates)

    def linked_from(links: Tensor) -> Tensor:
        # The slot that points here, -1 for none; links of -1 are written to a spare column.
        back = torch.full_like(candidates[:, :1], -1).repeat(1, num_slots + 1)
        target = links.long() % (num_slots + 1)
        return back.scatter(1, target, slots)[:, :num_slots]

    parent = linked_from(retrieve_next_token)
    elder = linked_from(retrieve_next_sibling)
    hops = torch.where(elder >= 0, elder, slots)
    for _ in range((num_slots - 1).bit_length()):  # doubles the distance to the eldest sibling
        hops = hops.gather(1, hops)
    parents = parent.gather(1, hops)[:, 1:] - 1
    return Draft.tree(candidates[:, 1:].long(), parents, depth=depth)


def to_retrieve(draft: Draft, root: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write drafts as candidates and links, SGLang's layout.

    Args:
        draft: chains or trees; padding becomes slots that nothing links to.
        root: [B] the last committed tokens.

    Returns:
        candidates, retrieve_index, retrieve_next_token and retrieve_next_sibling, all [B, N + 1].
    """
    batch_size, num_nodes = draft.tokens.shape
    real, rows = draft.real_nodes(), draft.explicit_parents() + 1
    none = num_nodes + 1
    slots = torch.arange(1, none, device=rows.device)
    own = torch.where(real, slots, none)
    first = own.new_full((batch_size, none), none).scatter_reduce(1, rows, own, "amin")
    same = (rows.unsqueeze(2) == rows.unsqueeze(1)) & real.unsqueeze(1) & real.unsqueeze(2)
    later = torch.where(same.triu(1), slots, none)  # [B, N, N]
    following = pad(pad(later, (0, 1), value=none).amin(2), (1, 0), value=none)
    index = torch.arange(batch_size * none, device=rows.device).view(batch_size, -1)
    candidates = torch.cat((root.unsqueeze(1), draft.tokens), 1)
    first, following = (links.masked_fill(links == none, -1) for links in (first, following))
    return candidates, index, first, following


def verdict_to_retrieve(verdict: Verdict, draft: Draft) -> tuple[Tensor, Tensor, Tensor]:
    """Write a verdict as SGLang's `predicts` [B * n], `accept_index` [B, D + 1] and counts [B].

    `accept_index` holds flat slots, the root's first, -1 padded; `predicts` holds the token that
    follows each of these slots, 0 elsewhere; the counts exclude the bonus or corrected token.
    """
    batch_size, num_slots = draft.batch_size, draft.num_nodes + 1
    start = torch.arange(batch_size, device=verdict.path.device).unsqueeze(1) * num_slots
    slots = pad(verdict.path + 1, (1, 0))  # [B, D + 1], 0 also for padding
    is_real = verdict.tokens >= 0
    accept_index = (slots + start).masked_fill(~is_real, -1)
    total = batch_size * num_slots
    predicts = verdict.tokens.new_zeros(total + 1)
    predicts = predicts.scatter(0, (accept_index % (total + 1)).flatten(), verdict.tokens.flatten())
    return predicts[:total], accept_index, verdict.num_accepted
