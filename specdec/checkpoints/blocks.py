"""Layouts of heads that draft whole blocks: z-lab, transformers, DeepSpec and speculators.

Slot k of a block speaks of the token k places behind the root, or k + 1 where the root's own slot
guesses too (`sample_from_anchor`); layers are counted from the embedding's output as we do, or one
less. Which of both a layout means follows from its name alone.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, Self

from pydantic import AliasPath, Field, model_validator

from specdec.checkpoints.eagle import FACTS, LlamaLayer, LlamaLayout, speculators_keys
from specdec.checkpoints.folder import RawFiles
from specdec.checkpoints.foreign import ForeignConfig
from specdec.checkpoints.head import Count, HeadCheckpoint, TargetIdentity

_ENDS = ("embed_tokens.weight", "lm_head.weight")


class _BlockLayers(LlamaLayer):
    """Layers of Qwen3's form, all with full attention."""

    num_hidden_layers: Count
    layer_types: list[str] | None = None

    @model_validator(mode="after")
    def _attends_to_all(self) -> Self:
        if other := {*(self.layer_types or ())} - {"full_attention"}:
            raise ValueError(
                f"has layer_types {', '.join(sorted(other))} but all must be full_attention: "
                "public code disagrees on what a window of a block is; use a head without one"
            )
        return self


class _Blocks(LlamaLayout):
    """Facts that all layouts state, one way or another."""

    kind, dtype_key, more = "dflash", "dtype", ("qk_norm",)
    block_size: Count
    mask_token_id: int

    def found(
        self, files: RawFiles, layers: _BlockLayers, taps: list[int], **options: Any
    ) -> HeadCheckpoint:
        own = {name for name in _ENDS if name in files.tensors}
        options |= {
            "backbone": layers.backbone() | {"qk_norm": True},
            "taps": taps,
            "num_layers": layers.num_hidden_layers,
            **{"block_size": self.block_size, "mask_token_id": self.mask_token_id},
            **({"own_ends": True} if own else {}),
        }
        target = TargetIdentity(None, layers.hidden_size, layers.vocab_size)
        return HeadCheckpoint(self.kind, options, files.tensors, target=target)

    @classmethod
    def layers(cls, checkpoint: HeadCheckpoint, options: Any) -> dict[str, Any]:
        backbone = checkpoint.options["backbone"]
        rope = backbone["rope_parameters"]
        return {
            **{name: backbone[name] for name in FACTS},
            **{"model_type": "qwen3", "num_hidden_layers": options.num_layers},
            **{"rope_theta": rope["rope_theta"], "rope_parameters": rope},
            "layer_types": ["full_attention"] * options.num_layers,
            "tie_word_embeddings": False,
        }

    @classmethod
    def refuse(cls, options: Any, *names: str) -> None:
        for name in names:
            if value := getattr(options, name):
                said = str(value).lower() if value is True else value
                raise cls.cannot_hold(f"the option {name}={said}")


class _Markov(ForeignConfig):
    """Keys of the Markov and confidence heads of DSpark."""

    markov_rank: int = 0
    markov_head_type: Literal["vanilla", "gated"] = "vanilla"
    enable_confidence_head: bool = False
    confidence_head_with_markov: bool = False

    def markov(self) -> dict[str, Any]:
        options: dict[str, Any] = {"confidence": self.enable_confidence_head}
        if self.markov_rank:
            options |= {"markov": self.markov_head_type, "markov_rank": self.markov_rank}
            with_markov = self.enable_confidence_head and self.confidence_head_with_markov
            options["confidence_with_markov"] = with_markov
        return options

    @staticmethod
    def keys(options: Any) -> dict[str, Any]:
        return {
            "markov_rank": options.markov_rank if options.markov else 0,
            "markov_head_type": options.markov or "vanilla",
            "enable_confidence_head": options.confidence,
            "confidence_head_with_markov": options.confidence_with_markov,
        }


class ZLab(_Blocks, _BlockLayers):
    """DFlash as z-lab publishes it."""

    name = "z-lab"
    mask_token_id: int = Field(validation_alias=AliasPath("dflash_config", "mask_token_id"))
    target_layer_ids: list[int] | None = Field(
        None, validation_alias=AliasPath("dflash_config", "target_layer_ids")
    )
    num_target_layers: Count | None = None

    @staticmethod
    def matches(files: RawFiles) -> bool:
        return "dflash_config" in files.config

    def parse(self, files: RawFiles) -> HeadCheckpoint:
        layers = self.target_layer_ids
        if layers is None:
            if self.num_target_layers is None:
                raise ValueError(
                    f"{files.config_path!r} has neither dflash_config.target_layer_ids nor "
                    "num_target_layers; add the layers that the head reads"
                )
            layers = _spread(self.num_target_layers, self.num_hidden_layers)
        return self.found(files, self, [layer + 1 for layer in layers])

    @classmethod
    def config(cls, checkpoint: HeadCheckpoint, options: Any) -> dict[str, Any]:
        cls.refuse(options, "sample_from_anchor", "causal", "markov", "confidence", "own_ends")
        reads = {"target_layer_ids": [tap - 1 for tap in options.taps]}
        config = {
            "architectures": ["DFlashDraftModel"],
            "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
            **cls.layers(checkpoint, options),
            "block_size": options.block_size,
            "dflash_config": {"mask_token_id": options.mask_token_id, **reads},
        }
        if checkpoint.target and checkpoint.target.num_layers:
            config["num_target_layers"] = checkpoint.target.num_layers
        return config


def _spread(num_layers: int, num_taps: int) -> list[int]:
    """Layers that z-lab's heads read where their config names none; halves round to even."""
    if num_taps == 1:
        return [num_layers // 2]
    return [round(1 + i * (num_layers - 4) / (num_taps - 1)) for i in range(num_taps)]


class Assistant(_Blocks, _BlockLayers):
    """DFlash as transformers saves its own assistant models, which leave the vocabulary open."""

    name = "transformers-assistant"
    vocab_size: Count = 1
    target_layer_ids: list[int]

    @staticmethod
    def matches(files: RawFiles) -> bool:
        config = files.config
        return "block_size" in config and str(config.get("model_type")).endswith("_assistant")

    def parse(self, files: RawFiles) -> HeadCheckpoint:
        found = self.found(files, self, [layer + 1 for layer in self.target_layer_ids])
        del found.options["backbone"]["vocab_size"]
        return replace(found, target=TargetIdentity(None, self.hidden_size))

    @classmethod
    def naming(cls, checkpoint: HeadCheckpoint) -> Callable[[str], str]:
        theirs = {"fc": "encoder.fc", "hidden_norm": "encoder.output_norm_enc"}

        def name_of(ours: str) -> str:
            first, _, rest = ours.partition(".")
            return f"{theirs.get(first, first)}.{rest}"

        return name_of

    @classmethod
    def config(cls, checkpoint: HeadCheckpoint, options: Any) -> dict[str, Any]:
        cls.refuse(options, "sample_from_anchor", "causal", "markov", "confidence", "own_ends")
        return {
            **cls.layers(checkpoint, options),
            "architectures": ["MuseGlimmerAssistantModel"],
            "model_type": "muse_glimmer_assistant",
            **{"block_size": options.block_size, "mask_token_id": options.mask_token_id},
            "target_layer_ids": [tap - 1 for tap in options.taps],
        }


class DeepSpec(_Blocks, _BlockLayers, _Markov):
    """DSpark as DeepSpec saves it, with its target's embedding and projection."""

    name = "deepspec"
    target_layer_ids: list[int]

    @staticmethod
    def matches(files: RawFiles) -> bool:
        return "markov_rank" in files.config and "speculators_model_type" not in files.config

    def parse(self, files: RawFiles) -> HeadCheckpoint:
        taps = [layer + 1 for layer in self.target_layer_ids]
        return self.found(files, self, taps, sample_from_anchor=True, **self.markov())

    @classmethod
    def config(cls, checkpoint: HeadCheckpoint, options: Any) -> dict[str, Any]:
        cls.refuse(options, "causal")
        if not options.own_ends:
            raise cls.cannot_hold(
                "a head without an embedding and a projection of its own",
                "use the layout 'speculators-dflash'",
            )
        if not options.sample_from_anchor:
            raise cls.cannot_hold("the option sample_from_anchor=false")
        return {
            "architectures": ["Qwen3DSparkModel"],
            **cls.layers(checkpoint, options),
            **{"block_size": options.block_size, "mask_token_id": options.mask_token_id},
            "target_layer_ids": [tap - 1 for tap in options.taps],
            **cls.keys(options),
        }


class SpeculatorsBlocks(_Blocks, _Markov):
    """DFlash and DSpark as vllm-project/speculators writes them."""

    name = "speculators-dflash"
    speculators_model_type: Literal["dflash", "dspark"]
    # Without it vLLM takes false, and speculators' own DSpark true.
    sample_from_anchor: bool
    aux_hidden_state_layer_ids: list[int]
    draft_vocab_size: Count | None = None
    transformer_layer_config: _BlockLayers
    verifier: str | None = Field(
        None, validation_alias=AliasPath("speculators_config", "verifier", "name_or_path")
    )

    @staticmethod
    def matches(files: RawFiles) -> bool:
        return files.config.get("speculators_model_type") in ("dflash", "dspark")

    def parse(self, files: RawFiles) -> HeadCheckpoint:
        layers, taps = self.transformer_layer_config, self.aux_hidden_state_layer_ids
        if self.draft_vocab_size not in (None, layers.vocab_size):
            raise ValueError(
                f"{files.config_path!r} has draft_vocab_size {self.draft_vocab_size}, but block "
                f"heads draft all {layers.vocab_size} tokens of the target"
            )
        options = {"sample_from_anchor": self.sample_from_anchor, **self.markov()}
        found = self.found(files, layers, taps, **options)
        target = TargetIdentity(self.verifier, layers.hidden_size, layers.vocab_size)
        return replace(found, target=target)

    @classmethod
    def config(cls, checkpoint: HeadCheckpoint, options: Any) -> dict[str, Any]:
        cls.refuse(options, "causal", "own_ends")
        is_spark = bool(options.markov or options.confidence)
        algorithm = "dspark" if is_spark else "dflash"
        return {
            "architectures": ["DSparkDraftModel" if is_spark else "DFlashDraftModel"],
            **speculators_keys(cls.name, checkpoint.target, algorithm),
            "transformer_layer_config": cls.layers(checkpoint, options),
            **{"block_size": options.block_size, "mask_token_id": options.mask_token_id},
            "aux_hidden_state_layer_ids": options.taps,
            "draft_vocab_size": options.backbone.vocab_size,
            "sample_from_anchor": options.sample_from_anchor,
            # vLLM 0.32 takes false for causal blocks in layers of full attention too.
            "sliding_window_non_causal": True,
            **(cls.keys(options) if is_spark else {}),
            "tie_word_embeddings": False,
        }
