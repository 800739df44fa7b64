"""Layouts of MTP layers: one as speculators writes it, and those that targets ship with them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import AliasPath, Field

from specdec.checkpoints.eagle import (
    LlamaLayer,
    LlamaLayout,
    llama_config,
    qk_norm,
    speculators_keys,
)
from specdec.checkpoints.folder import RawFiles
from specdec.checkpoints.head import Count, HeadCheckpoint, TargetIdentity


class SpeculatorsMtp(LlamaLayout):
    """One MTP layer as vllm-project/speculators writes it, `MTPSpeculatorConfig`."""

    name, kind, dtype_key, more = "speculators-mtp", "mtp", "dtype", ("qk_norm",)
    speculators_model_type: Literal["mtp"]
    num_nextn_predict_layers: Literal[1] = 1
    verifier: str | None = Field(
        None, validation_alias=AliasPath("speculators_config", "verifier", "name_or_path")
    )
    transformer_layer_config: LlamaLayer

    @staticmethod
    def matches(files: RawFiles) -> bool:
        return files.config.get("speculators_model_type") == "mtp"

    def parse(self, files: RawFiles) -> HeadCheckpoint:
        layer = self.transformer_layer_config
        options = {"backbone": layer.backbone() | qk_norm(files)}
        target = TargetIdentity(self.verifier, layer.hidden_size, layer.vocab_size)
        return HeadCheckpoint(self.kind, options, files.tensors, target=target)

    @classmethod
    def config(cls, checkpoint: HeadCheckpoint, options: Any) -> dict[str, Any]:
        if options.num_modules > 1:
            raise cls.cannot_hold("several modules", "use the layout 'deepseek-mtp'")
        return {
            "architectures": ["MTPDraftModel"],
            "auto_map": {"": "config.MTPSpeculatorConfig"},
            **speculators_keys(cls.name, checkpoint.target, "mtp"),
            "num_nextn_predict_layers": 1,
            "transformer_layer_config": llama_config(checkpoint.options["backbone"]),
            "tie_word_embeddings": False,
        }


class DeepSeekMtp(LlamaLayout, LlamaLayer):
    """MTP modules as DeepSeek-V3 and GLM-4.5 ship them: the layers behind a target's last."""

    name, kind, more = "deepseek-mtp", "mtp", ("qk_norm",)
    parts: ClassVar[dict[str, str]] = {
        **{"token_layernorm": "enorm", "hidden_layernorm": "hnorm", "input_proj": "eh_proj"},
        "final_layernorm": "shared_head.norm",
    }
    unheld: ClassVar[dict[str, str]] = {
        "kv_a_proj": "latent attention (MLA)",
        ".experts.": "a mixture of experts",
    }
    num_hidden_layers: Count
    num_nextn_predict_layers: Count = 1
    model_type: str = ""

    @staticmethod
    def matches(files: RawFiles) -> bool:
        return bool(files.config.get("num_nextn_predict_layers")) and any(
            name.startswith("model.layers.") for name in files.tensors
        )

    def parse(self, files: RawFiles) -> HeadCheckpoint:
        for part, what in self.unheld.items():
            if any(part in name for name in files.tensors):
                raise ValueError(
                    f"{files.weights_path!r} has an MTP layer with {what}, which no drafter here "
                    "computes; train one (recipes/mtp.yaml), or serve the target's in an engine"
                )
        options: dict[str, Any] = {"backbone": self.backbone() | qk_norm(files)}
        if self.num_nextn_predict_layers > 1:
            options["num_modules"] = self.num_nextn_predict_layers
        # They come with copies of both ends of the target.
        ends = ("embed_tokens.weight", "shared_head.head.weight")
        tensors = {name: t for name, t in files.tensors.items() if not name.endswith(ends)}
        sizes = self.hidden_size, self.vocab_size, self.num_hidden_layers
        return HeadCheckpoint(self.kind, options, tensors, target=TargetIdentity(None, *sizes))

    @classmethod
    def naming(cls, checkpoint: HeadCheckpoint) -> Callable[[str], str]:
        first = checkpoint.target.num_layers if checkpoint.target else None
        if not first:
            raise cls.cannot_hold("a head that does not know how many layers its target has")

        def name_of(ours: str) -> str:
            _, module, part, *rest = ours.split(".")
            return ".".join([cls.place(first + int(module), part), *rest])

        return name_of

    @classmethod
    def place(cls, layer: int, part: str) -> str:
        """Name a part of the layer of the target's whole checkpoint."""
        return f"model.layers.{layer}.{cls.parts.get(part, part)}"

    @classmethod
    def config(cls, checkpoint: HeadCheckpoint, options: Any) -> dict[str, Any]:
        sizes = {"num_hidden_layers": checkpoint.target and checkpoint.target.num_layers}
        sizes["num_nextn_predict_layers"] = options.num_modules
        return llama_config(checkpoint.options["backbone"]) | sizes


class QwenMtp(DeepSeekMtp):
    """An MTP layer as Qwen3-Next and Qwen3.5 ship it, whose norms scale by 1 + w."""

    name = "qwen-mtp"
    parts: ClassVar[dict[str, str]] = {
        **{"token_layernorm": "pre_fc_norm_embedding", "hidden_layernorm": "pre_fc_norm_hidden"},
        **{"input_proj": "fc", "final_layernorm": "norm"},
    }
    num_nextn_predict_layers: Literal[1] = 1

    @staticmethod
    def matches(files: RawFiles) -> bool:
        return any(name.startswith("mtp.") for name in files.tensors)

    def parse(self, files: RawFiles) -> HeadCheckpoint:
        found = super().parse(files)
        if not self.model_type.startswith(("qwen3_next", "qwen3_5")):
            return found
        scaled = {n: t.float() + 1 if t.ndim == 1 else t for n, t in found.tensors.items()}
        return replace(found, tensors=scaled)

    @classmethod
    def place(cls, layer: int, part: str) -> str:
        return f"mtp.{cls.parts.get(part, f'layers.0.{part}')}"

    @classmethod
    def config(cls, checkpoint: HeadCheckpoint, options: Any) -> dict[str, Any]:
        if options.num_modules > 1:
            raise cls.cannot_hold("several modules", "use the layout 'deepseek-mtp'")
        return super().config(checkpoint, options)
