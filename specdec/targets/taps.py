"""Reading hidden states by hooks that stay, and reading a whole text.

transformers' own `output_hidden_states` patches every module anew at each forward, which costs
several percent of a small model's step. A few hooks read the same tensors for nothing; the first
forward that asks for a tap proves it, and where a model is built otherwise, its own way is kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from specdec.engine.interfaces import KEYS_VALUES, Target, claimed
from specdec.engine.kv_cache import key_values
from specdec.verify import Draft, match

# Long texts are scored in chunks, which bounds the memory of masks and activations.
CHUNK = 512


class TapReader:
    """Runs forwards of a causal LM and hands out taps, HF `hidden_states` indices."""

    def __init__(self, model: Any, num_layers: int) -> None:
        self._num_layers = num_layers
        self._decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else None
        children = [] if self._decoder is None else self._decoder.children()
        found = [m for m in children if isinstance(m, nn.ModuleList) and len(m) == num_layers]
        # Untrusted where layers cannot be told from other lists of modules.
        self._is_trusted = len(found) == 1
        self.layers: Any = found[0] if self._is_trusted else None
        self._hooked: set[int] = set()
        self._proven: set[int] = set()
        self._seen: dict[int, Tensor] | None = None  # while a forward is watched

    def run(
        self, forward: Callable[[bool], Any], taps: Sequence[int]
    ) -> tuple[Any, dict[int, Tensor]]:
        """Return the output of a forward, which is given `output_hidden_states`, and its taps."""
        if not taps:
            return forward(False), {}
        if not self._is_trusted:
            out = forward(True)
            return out, {tap: out.hidden_states[tap] for tap in taps}
        is_proof = not self._proven.issuperset(taps)
        for tap in set(taps) - self._hooked:
            self._hooked.add(tap)
            self._hook(tap)
        seen: dict[int, Tensor] = {}
        self._seen = seen
        try:
            out = forward(is_proof)
        finally:
            self._seen = None
        if not is_proof:
            return out, {tap: seen[tap] for tap in taps}
        # One difference from the model's own record ends the use of hooks.
        own = {tap: out.hidden_states[tap] for tap in taps}
        self._is_trusted = all(
            tap in seen and own[tap].device == seen[tap].device and torch.equal(own[tap], seen[tap])
            for tap in taps
        )
        self._proven.update(taps)
        return out, own

    def _hook(self, tap: int) -> None:
        def keep(states: Any) -> None:
            if self._seen is not None and isinstance(states, Tensor):
                self._seen[tap] = states

        def keep_input(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keep(args[0] if args else kwargs.get("hidden_states"))

        def keep_output(module: Any, args: Any, output: Any) -> None:
            keep(getattr(output, "last_hidden_state", None))

        if tap == self._num_layers:
            self._decoder.register_forward_hook(keep_output)
        else:
            self.layers[tap].register_forward_pre_hook(keep_input, with_kwargs=True)


def key_value_sizes(config: Any) -> tuple[int, int, int]:
    """Width of a layer's part of the tap `KEYS_VALUES`, by a text config, its heads and theirs."""
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * shared * head_dim, shared, head_dim


def run_whole(target: Any, taps: Sequence[int], **inputs: Any) -> tuple[Any, dict[int, Tensor]]:
    """Run an `HFTarget`'s model over whole texts; its output, and its taps [B, L, ...]."""
    # Made without the config, for layers that slide would drop what a head is to read.
    cache = DynamicCache() if KEYS_VALUES in taps else None
    given = {} if cache is None else {target.cache_name: cache}
    states = tuple(tap for tap in taps if tap != KEYS_VALUES)
    use = {"output_hidden_states": bool(states), "use_cache": cache is not None}
    out = target.model(**inputs, **given, **use)
    hidden = {tap: out.hidden_states[tap] for tap in states}
    if cache is not None:
        keys, values = ([getattr(each, n) for each in cache.layers] for n in ("keys", "values"))
        hidden[KEYS_VALUES] = key_values(torch.stack(keys), torch.stack(values))
    return out, hidden


@dataclass(frozen=True, eq=False)
class Reading:
    """One text as a model sees it, L tokens of which the last P were looked at."""

    logits: Tensor  # [P, V]; each row predicts the token behind its own
    hidden: dict[int, Tensor]  # tap -> [L, H]


@torch.inference_mode()
def read_text(
    target: Target, tokens: Sequence[int], first: int, taps: Sequence[int] = ()
) -> Reading:
    """Teacher-force a text; the batch that the model was decoding is forgotten.

    Logits are wanted from the token at `first` on, which is in [1, L).
    """
    with claimed(target):
        output = target.prefill([tokens[:first]], taps)
        logits, hidden = [], [output.hidden]
        for start in range(first, len(tokens), CHUNK):
            root, *rest = tokens[start : start + CHUNK]
            draft = Draft.chain(torch.tensor([rest], dtype=torch.long, device=target.device))
            output = target.score(torch.tensor([root], device=target.device), draft, taps)
            logits.append(output.logits[0])
            hidden.append(output.hidden)
            accepted = torch.tensor([[*rest, 0]], device=target.device)
            target.commit(match(accepted, draft), [len(rest)])
    states = {tap: torch.cat([part[tap][0] for part in hidden]) for tap in taps}
    return Reading(torch.cat(logits), states)
