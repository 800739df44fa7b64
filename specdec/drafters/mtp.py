"""Multi-token prediction (MTP): decoder layers on the target's last state.

The state is the target's behind its final norm, where the target's own projection reads it, and so
is what a layer feeds back or passes on. One layer serves every step, its keys of the context those
of the first one, as in engines; training that recomputes the context at every step differs behind
it. Or step k has a module of its own, which reads module k - 1 at the token before: then a token
has an entry in the cache of every module, and what is drafted at step k in those from k on.

Source: DeepSeek-V3, arXiv 2412.19437, section 2.2; one layer for all steps: FastMTP, 2509.18362.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from specdec.checkpoints.folder import own_folder
from specdec.common.config import Config
from specdec.drafters.feature_head import Backbone, DraftLayer, FeatureDrafter, FeatureHead, norm
from specdec.drafters.heads import Size
from specdec.drafters.training import LossOutput, TrainingBatch, chain_loss, shifted
from specdec.drafters.tree_growth import Choices, TreeShape


class MtpOptions(Config):
    """The options of an MTP head."""

    backbone: Backbone = Backbone()
    num_modules: Size = 1  # one is used for every level, several for one each


class MtpHead(FeatureHead):
    """The head. Its parameters are named as speculators names them."""

    Options = MtpOptions

    def __init__(self, options: Mapping[str, Any], target_config: Any, *parts: Any) -> None:
        super().__init__(options, target_config, *parts)
        self.taps = (target_config.num_hidden_layers,)
        num, size = self.options.num_modules, self.config.hidden_size
        self.max_depth = num if num > 1 else None
        self.num_layers, self.output_size = num, num * size
        self.mtp_layers = nn.ModuleList()
        for index in range(num):
            layer = DraftLayer(self.config, size, layer_idx=index)
            layer.token_layernorm, layer.hidden_layernorm = norm(self.config), norm(self.config)
            layer.input_proj = nn.Linear(2 * size, size, bias=False)
            layer.input_layernorm, layer.final_layernorm = norm(self.config), norm(self.config)
            self.mtp_layers.append(layer)

    def fuse(self, hidden: dict[int, Tensor]) -> Tensor:
        return hidden[self.taps[0]]

    def resumed(self, features: Tensor, outputs: Tensor) -> Tensor:
        if not self.max_depth:
            return features
        before = pad(self.carry(outputs), (0, 0, 0, features.shape[1] - 1))
        return torch.cat([features, before], -1)

    def forward(
        self, tokens: Tensor, features: Tensor, positions: Tensor, mask: Any, cache: Any
    ) -> Tensor:
        """Run as many of the last modules as there are features [B, n, modules * H].

        Where these are all, tokens follow each other, and only the first column of features behind
        the target's is read.
        """
        given, outputs = features.split(self.config.hidden_size, -1), list[Tensor]()
        first = self.num_layers - len(given)
        for module, states in enumerate(given, first):
            if outputs and not first:
                states = states + pad(outputs[-1], (0, 0, 1, -1))
            shown = mask
            if module:  # a module has no entry for tokens before its place in the chain
                seen = mask[:, 0].cumsum(-1)  # each token sees all before it, in their order
                places = positions.unsqueeze(-1) - seen[..., -1:] + seen
                shown = mask & ((places >= module) | (positions < module).unsqueeze(-1))[:, None]
            outputs.append(self._run(module, tokens, states, positions, shown, cache))
        return torch.cat(outputs, -1)

    def _run(
        self, module: int, tokens: Tensor, states: Tensor, positions: Tensor, mask: Any, cache: Any
    ) -> Tensor:
        layer: Any = self.mtp_layers[module]
        embedded = layer.token_layernorm(self._target_parts[0](tokens))
        states = layer.input_proj(torch.cat([embedded, layer.hidden_layernorm(states)], -1))
        rotary = self.rotary(states, positions)
        return layer.final_layernorm(
            layer(layer.input_layernorm(states), states, rotary, mask, cache)
        )

    def logits(self, outputs: Tensor) -> Tensor:
        return self._target_parts[1](outputs[..., : self.config.hidden_size])

    def carry(self, outputs: Tensor) -> Tensor:
        return outputs[..., : -self.config.hidden_size] if self.max_depth else outputs

    def rollout(
        self, tokens: Tensor, features: Tensor, num_steps: int, window: int | None = None
    ) -> Iterator[Tensor]:
        if not self.max_depth:
            yield from super().rollout(tokens, features, num_steps, window)
            return
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        behind = places[0].unsqueeze(1) - places[0]
        for module in range(min(num_steps, self.num_layers)):
            mask = (behind >= 0) & (behind < (window or tokens.shape[1]) + module)
            shown = shifted(tokens, 1 + module), features, places, mask[None, None], None
            features = self._run(module, *shown)
            yield features

    def loss(  # type: ignore[override]
        self,
        batch: TrainingBatch,
        num_steps: int = 3,
        decay: float = 0.6,
        objective: str = "soft_cross_entropy",
        weighting: str = "decay",
    ) -> LossOutput:
        """An objective of every drafted step, of all modules; decay as in FastMTP."""
        num_steps = self.max_depth or num_steps
        return chain_loss(self.levels(batch, num_steps, objective), objective, decay, weighting)


class MtpDrafter(FeatureDrafter):
    """Drafts trees with an MTP layer, used once for every level, or with a module for each.

    The layer is trained, or it is the target's own: without a path, that of the target's checkpoint
    is read, if it has plain attention. Of several modules there is one a level, and no level more.
    """

    kind, title, head_class = "mtp", "MTP layer", MtpHead

    @classmethod
    def load(
        cls,
        target: Any,
        path: str | None = None,
        depth: int = 3,
        width: int = 8,
        max_nodes: int = 24,
        choices: Choices | None = None,
        children: str = "top",
        window: int | None = None,
        compile: bool | str | None = None,
        force: bool = False,
    ) -> Self:
        """Load a layer for a target; options from depth to children are those of `TreeShape`.

        Args:
            path: folder or hub id in any known layout, or of a target that ships the layer; None
                for the target's own.
        """
        if path is None:
            config = getattr(target, "ends", target).model.config
            path = own_folder(config._name_or_path, getattr(config, "_commit_hash", None))
        shape = depth, width, max_nodes, choices, children
        return super().load(target, path, *shape, window, compile, force)

    def __init__(self, head: MtpHead, vocab_size: int, shape: TreeShape, *rest: Any) -> None:
        # Compiled pieces feed back what the last layer says, so modules keep only the window.
        super().__init__(head, vocab_size, shape, *rest[: 1 if head.max_depth else None])
        self._masks.may_be_none &= not head.max_depth
