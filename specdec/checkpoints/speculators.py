"""Layout "speculators": EAGLE-3 as vLLM's speculators library writes it.

Its `config.json` nests the layer's config, names the target, and says how it normalizes.

Source: vllm-project/speculators, `Eagle3SpeculatorConfig`.
"""

from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from specdec.checkpoints.eagle3 import FLAGS, Eagle3Keys, head_of_keys, shared_config
from specdec.checkpoints.folder import RawFiles, dtype_name
from specdec.checkpoints.head import Count, HeadCheckpoint
from specdec.checkpoints.llama_config import ForeignConfig, backbone_of, config_of, whole_options
from specdec.common.config import validated

NAME, KIND, WEIGHTS = "speculators", "eagle3", "model.safetensors"
# Version of the library whose layout this is; it wants the key and compares nothing.
VERSION = "0.9.0"
# vLLM wants a number here; users set their own when they serve.
SPECULATIVE_TOKENS = 5


class _Verifier(ForeignConfig):
    name_or_path: str | None = None


class _Speculators(ForeignConfig):
    verifier: _Verifier | None = None


class _Keys(Eagle3Keys):
    speculators_model_type: Literal["eagle3"]
    speculators_config: _Speculators | None = None
    transformer_layer_config: dict[str, Any]


class _Window(ForeignConfig):
    sliding_window: Count | None = None


def matches(files: RawFiles) -> bool:
    """Tell if these are the files of this layout."""
    return "speculators_model_type" in files.config or "speculators_config" in files.config


def read(files: RawFiles) -> HeadCheckpoint:
    """Read a head."""
    where = files.config_path
    keys = validated(_Keys, files.config, repr(where))
    if keys.norm_before_residual is None:
        raise ValueError(
            f"{where!r} lacks norm_before_residual, which vLLM then takes for true and speculators "
            "for false; add the one that the head was trained with"
        )
    layer = keys.transformer_layer_config
    inside = f"{where}, transformer_layer_config"
    found = head_of_keys(keys, backbone_of(layer, inside), files, NAME)
    training = {}
    if layer.get("layer_types") == ["sliding_attention"]:
        training = validated(_Window, layer, repr(inside)).model_dump()
    verifier = keys.speculators_config.verifier if keys.speculators_config else None
    assert found.target is not None
    target = replace(found.target, name=verifier.name_or_path if verifier else None)
    return replace(found, target=target, training=training)


def write(checkpoint: HeadCheckpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a head."""
    options = whole_options(checkpoint, NAME)
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
