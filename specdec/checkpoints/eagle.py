"""Layouts of heads of Llama layers: EAGLE-1, EAGLE-3, and EAGLE-3 as speculators writes it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import AliasChoices, AliasPath, Field, model_validator
from torch import Tensor

from specdec.checkpoints.folder import RawFiles
from specdec.checkpoints.foreign import ForeignConfig, Layout
from specdec.checkpoints.head import Count, HeadCheckpoint, TargetIdentity
from specdec.registry import head_class

# Facts that every layout but our own must state.
FACTS = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings", "vocab_size"),
    "rope_parameters",
)
FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
IDS = "eagle_aux_hidden_state_layer_ids"
# Old transformers saved a buffer of the rotary embedding; it follows from the config.
_BUFFERS = tuple(f"{layer}.self_attn.rotary_emb.inv_freq" for layer in ("layers.0", "midlayer"))
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
Positive = Annotated[float, Field(gt=0)]
One = Annotated[float, Field(ge=1, le=1)]
Layers = Annotated[list[int], Field(min_length=1)]


class LlamaLayer(ForeignConfig):
    """A Llama `config.json` of transformers 4 or 5, whose own defaults fill what it leaves out."""

    hidden_size: Count
    intermediate_size: Count
    num_attention_heads: Count
    vocab_size: Count
    num_key_value_heads: Count = 0
    head_dim: Count = 0
    max_position_embeddings: Count = 2048
    hidden_act: str = "silu"
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    # With these values alone our layer computes the same.
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    logit_scale: One = 1
    partial_rotary_factor: One = 1

    @model_validator(mode="after")
    def _fill(self) -> Self:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        new, scaling = self.rope_parameters or {}, self.rope_scaling or {}
        theta = self.rope_theta
        rope = _plain_rope(new or scaling, theta)
        base = rope["rope_theta"]
        if new and (scaling or theta) and rope != (old := _plain_rope(scaling, theta or base)):
            raise ValueError(
                f"contradicts itself: rope_parameters say {rope}, rope_theta and rope_scaling say "
                f"{old}; delete the wrong ones"
            )
        if rope["rope_type"] not in _ROPE_TYPES or rope.get("partial_rotary_factor", 1) != 1:
            raise ValueError(
                f"has the rotary parameters {rope}, but rope_type must be one of "
                f"{', '.join(_ROPE_TYPES)}, and all of a head is rotated"
            )
        if type(base) not in (int, float) or not 0 < base < 1e38:
            raise ValueError(f"has rope_theta {base!r} but must have a number above 0")
        self.rope_parameters = rope | {"rope_theta": float(base)}
        return self

    def backbone(self) -> dict[str, Any]:
        return self.model_dump(include={*FACTS})


def _plain_rope(rope: dict[str, Any], theta: float | None = None) -> dict[str, Any]:
    """Name rotary parameters as transformers 5 does, with type and theta."""
    kept = {name: value for name, value in rope.items() if name != "type"}
    kept["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    kept["rope_theta"] = rope.get("rope_theta") or theta or 10000.0
    return dict(sorted(kept.items()))


def llama_config(backbone: dict[str, Any]) -> dict[str, Any]:
    """Make a one-layer Llama `config.json`, its rotary part in both spellings."""
    rope = _plain_rope(backbone["rope_parameters"])
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {
        **{name: backbone[name] for name in FACTS},
        "model_type": "qwen3" if backbone.get("qk_norm") else "llama",
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "rope_parameters": rope,
    }


def qk_norm(files: RawFiles) -> dict[str, bool]:
    """Tell Qwen3's norms of queries and keys by their tensors."""
    normed = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
    return {"qk_norm": True} if any(name.endswith(normed) for name in files.tensors) else {}


class LlamaLayout(Layout):
    """A layout that states every fact of the head's layer, and no others."""

    more: ClassVar[tuple[str, ...]] = ()  # fields of a backbone that it may state besides

    @classmethod
    def write(cls, checkpoint: HeadCheckpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
        given = head_class(checkpoint.kind).given(checkpoint.options).backbone
        backbone = given.model_dump(exclude_none=True)
        if missing := [name for name in FACTS if name not in backbone]:
            raise ValueError(
                f"the layout {cls.name!r} states every fact, but the head's options leave backbone."
                f"{', '.join(missing)} to the target; make it whole (specdec export --to specdec "
                "--target)"
            )
        known = (*FACTS, *cls.more)
        if extra := [name for name in sorted(backbone) if backbone[name] and name not in known]:
            raise cls.cannot_hold(f"the option backbone.{extra[0]}")
        return super().write(checkpoint)


class Eagle(LlamaLayout, LlamaLayer):
    """EAGLE-1 and EAGLE-2 as SafeAILab/EAGLE publishes them; tensors have our own names."""

    name, kind, engines = "eagle", "eagle", ("vllm",)
    # Copies of parts of the target, which the head never trained; it uses the target's own.
    carried = ("embed_tokens.weight", "lm_head.weight", *_BUFFERS)
    bias: bool = True
    qkv_bias: bool = False

    @staticmethod
    def matches(files: RawFiles) -> bool:
        return any(name.startswith(("layers.0.", "fc.")) for name in files.tensors)

    def parse(self, files: RawFiles) -> HeadCheckpoint:
        options = {"backbone": self.backbone(), "bias": self.bias, "qkv_bias": self.qkv_bias}
        target = TargetIdentity(None, self.hidden_size, self.vocab_size)
        return HeadCheckpoint(self.kind, options, files.tensors, target=target)

    @classmethod
    def config(cls, checkpoint: HeadCheckpoint, options: Any) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            **llama_config(checkpoint.options["backbone"]),
            **{"bias": options.bias, "qkv_bias": options.qkv_bias},
        }


class SglangEagle(Eagle):
    """EAGLE-1 as SGLang loads it: `fc` always has a bias, and `bias` is that of the attention."""

    name, engines = "sglang-eagle", ("sglang",)

    @staticmethod
    def matches(files: RawFiles) -> bool:
        return files.config.get("architectures") == ["LlamaForCausalLMEagle"]

    def parse(self, files: RawFiles) -> HeadCheckpoint:
        found, bias = super().parse(files), files.tensors.get("fc.bias")
        is_biased = True  # zeros stand in place of none
        if bias is not None and bias.shape == (self.hidden_size,) and bias.is_floating_point():
            is_biased = bool(bias.any())
        left = {name: t for name, t in files.tensors.items() if is_biased or name != "fc.bias"}
        return replace(found, options={**found.options, "bias": is_biased}, tensors=left)

    @classmethod
    def write(cls, checkpoint: HeadCheckpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config, tensors = super().write(checkpoint)
        weight = tensors["fc.weight"]
        tensors.setdefault("fc.bias", weight.new_zeros(len(weight)))
        return config | {"architectures": ["LlamaForCausalLMEagle"], "bias": False}, tensors


def _flag(name: str) -> Any:
    """Make the field of a flag, which SGLang and vLLM look for in two places."""
    return Field(None, validation_alias=AliasChoices(AliasPath("eagle_config", name), name))


class _Eagle3Layout(LlamaLayout):
    """Keys that all layouts of EAGLE-3 and EAGLE-3.1 share."""

    kind, carried = "eagle3", _BUFFERS
    target_hidden_size: Count | None = None
    draft_vocab_size: Count | None = None
    norm_before_residual: bool | None = _flag("norm_before_residual")
    norm_before_fc: bool | None = _flag("norm_before_fc")
    norm_output: bool | None = _flag("norm_output")
    eagle_config: dict[str, Any] | None = None
    taps: Layers | None = Field(None, validation_alias=IDS)
    sglang_taps: Layers | None = Field(None, validation_alias=AliasPath("eagle_config", IDS))
    fc_norm: bool | None = _flag("fc_norm")
    use_aux_norm: Literal[False] = False
    use_aux_hidden_state: Literal[True] = Field(
        True, validation_alias=AliasPath("eagle_config", "use_aux_hidden_state")
    )

    @property
    def layer(self) -> Any:
        return self

    def parse(self, files: RawFiles) -> HeadCheckpoint:
        layer, taps = self.layer, self.taps
        if self.sglang_taps:
            shifted = [tap + 1 for tap in self.sglang_taps]
            if taps not in (None, shifted):
                raise ValueError(
                    f"{files.config_path!r} contradicts itself: {IDS} is {taps} at the top and "
                    f"{self.sglang_taps} in eagle_config, where SGLang counts from one less; it "
                    f"must be {[tap - 1 for tap in taps or ()]} there, or be deleted"
                )
            taps = shifted
        options: dict[str, Any] = {
            "backbone": layer.backbone() | qk_norm(files),
            "target_hidden_size": self.target_hidden_size or layer.hidden_size,
            "draft_vocab_size": self.draft_vocab_size or layer.vocab_size,
            **{flag: getattr(self, flag) is True for flag in FLAGS},
            # A copy of the target's is kept too: only its trainer knows that it is one.
            "own_embedding": "embed_tokens.weight" in files.tensors,
            **({"taps": taps} if taps else {}),
        }
        tensors = _with_whole_maps(files.tensors, options["draft_vocab_size"], layer.vocab_size)
        target = TargetIdentity(None, options["target_hidden_size"], layer.vocab_size)
        return HeadCheckpoint(self.kind, options, tensors, target=target)

    @classmethod
    def config(cls, checkpoint: HeadCheckpoint, options: Any) -> dict[str, Any]:
        """Make the keys that all layouts share, layers counted as vLLM does."""
        config = {"draft_vocab_size": options.draft_vocab_size}
        if options.target_hidden_size != options.backbone.hidden_size:
            config["target_hidden_size"] = options.target_hidden_size
        taps, target = checkpoint.options.get("taps"), checkpoint.target
        if taps is None:
            return config
        if sorted(set(taps)) != taps:
            raise cls.cannot_hold(
                f"the taps {taps}: engines capture a layer once and in ascending order",
                "train a head on distinct layers",
            )
        if target and target.num_layers and taps[-1] >= target.num_layers:
            raise cls.cannot_hold(
                f"the tap {taps[-1]} of a target with {target.num_layers} layers, which is behind "
                "the final norm",
                "train a head on lower layers",
            )
        return config | {IDS: taps}


def _with_whole_maps(
    given: dict[str, Tensor], num_drafted: int, vocab_size: int
) -> dict[str, Tensor]:
    """Keep both token maps, or none where the vocabularies are one.

    No engine reads `t2d`, so some checkpoints leave it out; others ship maps that change nothing.
    """
    d2t, t2d = given.get("d2t"), given.get("t2d")
    if d2t is None or d2t.dtype not in (torch.int64, torch.int32):
        return given
    if num_drafted != vocab_size:
        ids = (d2t.long() + torch.arange(len(d2t))).clamp(0, vocab_size - 1)
        made = torch.zeros(vocab_size, dtype=torch.bool).index_fill(0, ids, True)
        return {**given, "d2t": d2t.long(), "t2d": made if t2d is None else t2d}
    if d2t.any() or not (t2d is None or t2d.all()):
        return given
    return {name: tensor for name, tensor in given.items() if name not in ("d2t", "t2d")}


class Eagle3(_Eagle3Layout, LlamaLayer):
    """EAGLE-3 as SafeAILab/EAGLE published it; `LlamaForCausalLMEagle3` of vLLM and SGLang read it.

    Layers are counted as vLLM does at the top level, which is as we do, and one less inside
    `eagle_config`, which is as SGLang does.
    """

    name = "eagle3"
    engines = ("vllm", "sglang", "tensorrt-llm", "llama.cpp")

    @staticmethod
    def matches(files: RawFiles) -> bool:
        return "draft_vocab_size" in files.config or any(
            name.startswith("midlayer.") or name.endswith("hidden_norm.weight")
            for name in files.tensors
        )

    @classmethod
    def naming(cls, checkpoint: HeadCheckpoint) -> Callable[[str], str]:
        is_ours = any(name.startswith("midlayer.") for name in checkpoint.tensors)
        return str if is_ours else Speculators.naming(checkpoint)

    @classmethod
    def config(cls, checkpoint: HeadCheckpoint, options: Any) -> dict[str, Any]:
        fix = "use the layout 'speculators'"
        if options.norm_before_residual:
            raise cls.cannot_hold("norm_before_residual=true, which only vLLM reads there", fix)
        if options.num_layers > 1:
            raise cls.cannot_hold(f"num_layers={options.num_layers}, which SGLang refuses", fix)
        if options.fc_norm:
            raise cls.cannot_hold("fc_norm=true, which no engine is known to read there", fix)
        config = {
            "architectures": ["LlamaForCausalLMEagle3"],
            **llama_config(checkpoint.options["backbone"]),
            **super().config(checkpoint, options),
            **{flag: True for flag in FLAGS if getattr(options, flag)},
        }
        taps, target = config.get(IDS), checkpoint.target
        num_layers = (target and target.num_layers) or 0
        if num_layers and taps == [2, num_layers // 2, num_layers - 3]:
            # Engines find these by themselves, for all targets and without counting differently.
            del config[IDS]
        elif taps:
            config["eagle_config"] = {IDS: [tap - 1 for tap in taps], "use_aux_hidden_state": True}
        return config


class _WindowedLayer(LlamaLayer):
    num_hidden_layers: Count = 1
    sliding_window: Count | None = None
    layer_types: list[str] | None = None


class Speculators(_Eagle3Layout):
    """EAGLE-3 as vllm-project/speculators writes it, `Eagle3SpeculatorConfig`."""

    name, engines, dtype_key = "speculators", ("vllm", "llama.cpp"), "dtype"
    more = ("qk_norm",)
    speculators_model_type: Literal["eagle3"]
    speculators_config: dict[str, Any] | None = None
    verifier: str | None = Field(
        None, validation_alias=AliasPath("speculators_config", "verifier", "name_or_path")
    )
    transformer_layer_config: _WindowedLayer

    @property
    def layer(self) -> _WindowedLayer:
        return self.transformer_layer_config

    @staticmethod
    def matches(files: RawFiles) -> bool:
        return "speculators_model_type" in files.config or "speculators_config" in files.config

    def parse(self, files: RawFiles) -> HeadCheckpoint:
        if self.norm_before_residual is None:
            raise ValueError(
                f"{files.config_path!r} lacks norm_before_residual, which vLLM then takes for true "
                "and speculators for false; add the one that the head was trained with"
            )
        found, layer = super().parse(files), self.layer
        kinds = {*(layer.layer_types or ())}
        if len(kinds) > 1:
            raise ValueError(
                f"{files.config_path!r} has layer_types {layer.layer_types}, but a window bounds "
                "all layers of a head, or none"
            )
        is_windowed = kinds == {"sliding_attention"}
        training = {"sliding_window": layer.sliding_window} if is_windowed else {}
        options = {**found.options, "num_layers": layer.num_hidden_layers}
        target = replace(found.target or TargetIdentity(None, None), name=self.verifier)
        return replace(found, options=options, target=target, training=training)

    @classmethod
    def naming(cls, checkpoint: HeadCheckpoint) -> Callable[[str], str]:
        return lambda name: name.replace("midlayer.", "layers.0.")

    @classmethod
    def config(cls, checkpoint: HeadCheckpoint, options: Any) -> dict[str, Any]:
        count = {"num_hidden_layers": options.num_layers}
        layer = llama_config(checkpoint.options["backbone"]) | count
        if window := checkpoint.training.get("sliding_window"):
            layer |= {
                "sliding_window": window,
                "layer_types": ["sliding_attention"] * options.num_layers,
            }
        return {
            "architectures": ["Eagle3Speculator"],
            "auto_map": {"": "config.Eagle3SpeculatorConfig"},
            **speculators_keys(cls.name, checkpoint.target, "eagle3"),
            "transformer_layer_config": layer,
            **super().config(checkpoint, options),
            **{flag: getattr(options, flag) for flag in FLAGS},
            "embed_requires_grad": options.own_embedding,
            "tie_word_embeddings": False,
        }


class SpeculatorsPeagle(Speculators):
    """P-EAGLE as vllm-project/speculators writes it, `PEagleSpeculatorConfig`."""

    name, kind = "speculators-peagle", "peagle"
    engines = ()  # type: ignore[assignment]
    speculators_model_type: Literal["peagle"]  # type: ignore[assignment]
    mask_token_id: Annotated[int, Field(ge=0)]
    num_depths: Count = Field(
        validation_alias=AliasPath(
            "speculators_config", "proposal_methods", 0, "speculative_tokens"
        )
    )

    @staticmethod
    def matches(files: RawFiles) -> bool:
        return files.config.get("speculators_model_type") == "peagle"

    def parse(self, files: RawFiles) -> HeadCheckpoint:
        found, own = super().parse(files), self.model_dump(include={"mask_token_id", "num_depths"})
        return replace(found, options={**found.options, **own})

    @classmethod
    def config(cls, checkpoint: HeadCheckpoint, options: Any) -> dict[str, Any]:
        made = super().config(checkpoint, options)
        made["speculators_config"]["algorithm"] = "peagle"
        made["speculators_config"]["proposal_methods"][0]["speculative_tokens"] = options.num_depths
        return made | {
            "architectures": ["PEagleDraftModel"],
            "auto_map": {"": "config.PEagleSpeculatorConfig"},
            "speculators_model_type": "peagle",
            "mask_token_id": options.mask_token_id,
        }


def speculators_keys(layout: str, target: TargetIdentity | None, algorithm: str) -> dict[str, Any]:
    """Make the keys that all heads of speculators have."""
    if target is None or target.name is None:
        raise ValueError(
            f"the layout {layout!r} names its target, which this checkpoint does not know; "
            "give the target too (specdec export --target)"
        )
    architectures = (target.facts or {}).get("architectures") or []
    # vLLM wants a number of tokens; users set their own when they serve.
    method = {"proposal_type": "greedy", "speculative_tokens": 5}
    method |= {"verifier_accept_k": 1, "accept_tolerance": 0.0}
    return {
        "speculators_model_type": algorithm,
        "speculators_version": "0.9.0",  # the library wants the key and compares nothing
        "speculators_config": {
            "algorithm": algorithm,
            "proposal_methods": [method],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": target.name, "architectures": architectures},
        },
    }
