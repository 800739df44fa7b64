"""Layout "speculators": EAGLE-3 as vLLM's speculators library writes it.

Its `config.json` nests the layer's config, names the target, and says how it normalises.

Source: vllm-project/speculators, `Eagle3SpeculatorConfig`.
"""

from typing import Any

from torch import Tensor

from specdec.checkpoints.backbone_config import backbone_of, config_of
from specdec.checkpoints.eagle3 import FLAGS, dtype_name, head_options, head_tensors, shared_config
from specdec.checkpoints.folder import RawFiles
from specdec.checkpoints.head import (
    HeadCheckpoint,
    TargetIdentity,
    count,
    flag,
    section,
    text,
    whole_options,
)

NAME, KIND, WEIGHTS = "speculators", "eagle3", "model.safetensors"
# Of the library whose layout this is; it wants the key and compares nothing.
VERSION = "0.9.0"
# vLLM wants a number here; users set their own when they serve.
SPECULATIVE_TOKENS = 5


def matches(files: RawFiles) -> bool:
    """Whether these are the files of this layout."""
    return "speculators_model_type" in files.config or "speculators_config" in files.config


def read(files: RawFiles) -> HeadCheckpoint:
    """Read a head.

    Raises:
        ValueError: another algorithm, a part that our head does not have, or wrong tensors.
    """
    config, where = files.config, files.config_path
    if config.get("speculators_model_type") != "eagle3":
        raise ValueError(
            f"{where!r} has speculators_model_type {config.get('speculators_model_type')!r}; only "
            "'eagle3' can be read"
        )
    if config.get("norm_before_residual") is None:
        raise ValueError(
            f"{where!r} lacks norm_before_residual, which vLLM then takes for true and speculators "
            "for false; add the one that the head was trained with"
        )
    layer = section(config, "transformer_layer_config", where)
    if not layer:
        raise ValueError(f"{where!r} lacks transformer_layer_config")
    flags = {name: flag(config, name, False, where) for name in FLAGS}
    backbone = backbone_of(layer, f"{where}, transformer_layer_config")
    options = head_options(config, backbone, flags, files)
    verifier = section(section(config, "speculators_config", where), "verifier", where)
    name = text(verifier, "name_or_path", where)
    identity = TargetIdentity(name, options["target_hidden_size"], backbone["vocab_size"])
    training = {}
    if layer.get("layer_types") == ["sliding_attention"]:
        training["sliding_window"] = count(layer, "sliding_window", where)
    tensors = head_tensors(options, files)
    return HeadCheckpoint(KIND, options, tensors, target=identity, training=training, layout=NAME)


def write(checkpoint: HeadCheckpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a head.

    Raises:
        ValueError: no name of the target, or taps that engines cannot capture.
    """
    options = whole_options(KIND, checkpoint.options, NAME)
    target = checkpoint.target
    if target is None or target.name is None:
        raise ValueError(
            f"the layout {NAME!r} names its target, which this checkpoint does not know; give the "
            "target too (specdec convert --target)"
        )
    layer = config_of(options["backbone"])
    if window := checkpoint.training.get("sliding_window"):
        layer |= {"sliding_window": window, "layer_types": ["sliding_attention"]}
    method = {
        "proposal_type": "greedy",
        "speculative_tokens": SPECULATIVE_TOKENS,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    config = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [method],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": target.name, "architectures": []},
        },
        "transformer_layer_config": layer,
        **shared_config(options, target, NAME),
        **{name: options[name] for name in FLAGS},
        "fc_norm": False,
        "embed_requires_grad": options["own_embedding"],
        "tie_word_embeddings": False,
        "torch_dtype": dtype_name(checkpoint.tensors),
    }
    renamed = {name.replace("midlayer.", "layers.0."): t for name, t in checkpoint.tensors.items()}
    return config, renamed
