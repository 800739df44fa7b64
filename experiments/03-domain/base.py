"""A draft model that knows nothing yet: the demo target's embedding and two of its layers.

python experiments/03-domain/base.py runs/domain/base
"""

from pathlib import Path

import torch
import typer
from transformers import LlamaForCausalLM

from specdec import load_target

LAYERS = (0, 15)  # the first one, and the one that the vocabulary projection reads


def main(out: Path) -> None:
    target = load_target("demo", device="cpu")
    config = type(target.model.config).from_dict(target.model.config.to_dict())
    config.num_hidden_layers = len(LAYERS)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: len(LAYERS)]
    draft = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in draft.state_dict().items():
            parts = name.split(".")
            if "layers" in parts:
                place = parts.index("layers") + 1
                parts[place] = str(LAYERS[int(parts[place])])
            weight.copy_(target.model.state_dict()[".".join(parts)])
    draft.save_pretrained(out)
    target.tokenizer.save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
