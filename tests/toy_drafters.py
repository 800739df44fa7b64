"""A trained drafter in one file outside the package: a head with its loss, and its drafts."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import cross_entropy

from specdec.common.config import Config
from specdec.drafters.base import BaseDrafter
from specdec.drafters.heads import Head, load_head
from specdec.drafters.training import LossOutput, shifted
from specdec.verify import Draft


class ToyOptions(Config):
    bias: bool = Field(True, description="a bias of its own")


class ToyHead(Head):
    """One linear layer on the target's last state guesses one token."""

    Options = ToyOptions
    max_depth = 1

    def __init__(self, options, target_config, embedding=None, vocab_head=None):
        super().__init__(options, target_config, embedding, vocab_head)
        self.options = self.given(options)
        self.taps = (target_config.num_hidden_layers,)
        size = target_config.hidden_size
        self.linear = nn.Linear(size, size, bias=self.options.bias)

    def forward(self, feature):
        return self._target_parts[1](feature + self.linear(feature))

    def loss(self, batch, weight: float = 1.0):
        places = shifted(batch.loss_mask, 2)
        logits = self(batch.hidden[self.taps[0]][places])
        value = weight * cross_entropy(logits.float(), shifted(batch.tokens, 2)[places])
        return LossOutput(value, {"toy": value.detach()})

    def candidates(self, batch, depth, width):
        return self(batch.hidden[self.taps[0]]).topk(width, -1).indices.unsqueeze(2)

    def guesses(self, batch, mask):
        return self(batch.hidden[self.taps[0]][mask])


class ToyDrafter(BaseDrafter):
    """Drafts the head's likeliest token."""

    title, head_class, trained_as = "Toy head", ToyHead, "head"
    max_nodes = 1

    @classmethod
    def load(cls, target, path: str, choices: Sequence[Sequence[int]] | None = None):
        return cls(load_head(cls, target, path)[0])

    def __init__(self, head):
        self.head, self.taps = head, head.taps

    def begin(self, prompts, output, sampler, *, join=False):
        rows, lengths = range(len(prompts)), [len(prompt) - 2 for prompt in prompts]
        feature = output.hidden[self.taps[0]][list(rows), lengths]
        self.feature = torch.cat([self.feature, feature]) if join else feature

    def propose(self, root, budget, sampler):
        tokens = self.head(self.feature).argmax(-1, keepdim=True)
        lengths = torch.tensor(budget).clamp(max=1)
        return Draft.chain(tokens.masked_fill(lengths.unsqueeze(1) == 0, -1), lengths)

    def observe(self, verdict, committed, hidden):
        states = hidden[self.taps[0]]
        self.feature = states[torch.arange(len(states)), verdict.num_accepted]

    def reorder(self, rows):
        self.feature = self.feature[rows]
