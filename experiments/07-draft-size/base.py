"""An untrained draft model: the demo target's embedding and some of its layers, evenly spread.

python experiments/07-draft-size/base.py 4 runs/size/base-4
"""

from pathlib import Path

import torch
import typer
from transformers import LlamaForCausalLM

from specdec import load_target


def chosen_layers(num_layers: int, num_target_layers: int) -> list[int]:
    """The first layer, the last one, and those between them at equal distances; of one, the first.

    Raises:
        ValueError: num_layers is not within 1 and the target's number.
    """
    if not 1 <= num_layers <= num_target_layers:
        raise ValueError(
            f"num_layers is {num_layers} but must be within 1 and the target's {num_target_layers}"
        )
    step = (num_target_layers - 1) / max(num_layers - 1, 1)
    return [round(index * step) for index in range(num_layers)]


def main(num_layers: int, out: Path) -> None:
    target = load_target("demo", device="cpu")
    config = type(target.model.config).from_dict(target.model.config.to_dict())
    layers = chosen_layers(num_layers, config.num_hidden_layers)
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    draft = LlamaForCausalLM(config)
    theirs = target.model.state_dict()
    with torch.no_grad():
        for name, weight in draft.state_dict().items():
            parts = name.split(".")
            if "layers" in parts:
                place = parts.index("layers") + 1
                parts[place] = str(layers[int(parts[place])])
            weight.copy_(theirs[".".join(parts)])
    draft.save_pretrained(out)
    target.tokenizer.save_pretrained(out)
    print(f"{out}: {draft.num_parameters():,} parameters, layers {layers} of the target")


if __name__ == "__main__":
    typer.run(main)
