"""Layouts of Medusa heads: as FasterDecoding publishes them, and as vLLM serves them."""

import re
from collections.abc import Callable
from pathlib import Path
from statistics import mode
from typing import Any

from pydantic import AliasChoices, Field

from specdec.checkpoints.folder import RawFiles
from specdec.checkpoints.foreign import Layout
from specdec.checkpoints.head import Count, HeadCheckpoint, TargetIdentity, Tree
from specdec.registry import head_class

_BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)")
_PROJECTION = re.compile(r"(\d+)\.\d+\.weight")


class _MedusaLayout(Layout):
    kind = "medusa"

    @classmethod
    def config(cls, checkpoint: HeadCheckpoint, options: Any) -> dict[str, Any]:
        last = checkpoint.target.num_layers if checkpoint.target else None
        if last not in (None, options.tap):
            raise cls.cannot_hold(f"the tap {options.tap}: its heads read the last, {last}")
        return {}


class Medusa(_MedusaLayout):
    """`medusa_lm_head.safetensors` or `.pt` of FasterDecoding/Medusa, and a small `config.json`.

    Version 1 has a vocabulary projection for every head, version 2 has none.
    """

    name, weights = "medusa", "medusa_lm_head.safetensors"
    medusa_num_heads: Count | None = None
    medusa_num_layers: Count | None = None
    base_model_name_or_path: str | None = None
    medusa_choices: Tree | None = None

    @staticmethod
    def matches(files: RawFiles) -> bool:
        return Path(files.weights_path).name.startswith("medusa_lm_head.")

    def parse(self, files: RawFiles) -> HeadCheckpoint:
        tensors = files.tensors
        blocks = [found for name in tensors if (found := _BLOCK.fullmatch(name))]
        if not blocks:
            raise ValueError(
                f"{files.weights_path!r} has no tensor named as Medusa's '0.0.linear.weight'; its "
                f"first is {next(iter(tensors), 'none')}"
            )
        num_heads, num_layers = (1 + max(int(block[group]) for block in blocks) for group in (1, 2))
        for key, number in (("medusa_num_heads", num_heads), ("medusa_num_layers", num_layers)):
            said = getattr(self, key)
            # The configs published first count 2 heads where their files hold 5.
            is_known_mistake = (key, said, number) == ("medusa_num_heads", 2, 5)
            if said not in (None, number) and not is_known_mistake:
                raise ValueError(
                    f"{files.config_path!r} has {key} {said} but {files.weights_path!r} holds "
                    f"{number}; correct the config, or copy the tensors again"
                )
        # Nothing else tells the sizes, and it is the odd tensor out that is to be named.
        sizes: dict[str, Any] = {
            "hidden_size": mode(t.shape[-1] for t in tensors.values() if t.ndim)
        }
        projections = [tensor for name, tensor in tensors.items() if _PROJECTION.fullmatch(name)]
        if rows := [len(tensor) for tensor in projections if tensor.ndim]:
            sizes["vocab_size"] = mode(rows)
        counts = {"num_heads": num_heads, "num_layers": num_layers}
        options = {**counts, "own_vocab_head": bool(projections), **sizes}
        target = TargetIdentity(self.base_model_name_or_path, **sizes)
        return HeadCheckpoint(self.kind, options, tensors, self.medusa_choices, target)

    @classmethod
    def naming(cls, checkpoint: HeadCheckpoint) -> Callable[[str], str]:
        num_layers = head_class(cls.kind).given(checkpoint.options).num_layers
        return lambda name: re.sub(
            r"^vocab_heads\.(\d+)", rf"\1.{num_layers}", name.removeprefix("blocks.")
        )

    @classmethod
    def config(cls, checkpoint: HeadCheckpoint, options: Any) -> dict[str, Any]:
        if (options.draft_vocab_size or options.vocab_size) < options.vocab_size:
            raise cls.cannot_hold("a reduced vocabulary", "use the layout 'vllm-medusa'")
        return super().config(checkpoint, options) | {
            "medusa_num_heads": options.num_heads,
            "medusa_num_layers": options.num_layers,
            "base_model_name_or_path": checkpoint.target.name if checkpoint.target else None,
            **({} if options.own_vocab_head else {"version": "2"}),
            **({"medusa_choices": checkpoint.tree} if checkpoint.tree else {}),
        }


class VllmMedusa(_MedusaLayout):
    """Medusa heads as vLLM up to 0.32 serves them, `MedusaConfig`; later ones dropped Medusa."""

    name, engines = "vllm-medusa", ("vllm",)
    carried = ("token_map",)  # vLLM leaves it alone where the vocabulary is whole
    hidden_size: Count
    vocab_size: Count
    num_heads: Count = Field(validation_alias=AliasChoices("num_heads", "medusa_num_heads"))
    num_hidden_layers: Count = Field(
        validation_alias=AliasChoices("num_hidden_layers", "medusa_num_layers")
    )
    truncated_vocab_size: Count | None = None
    original_lm_head: bool = False
    medusa_fc_bias: bool = False

    @staticmethod
    def matches(files: RawFiles) -> bool:
        return files.config.get("model_type") == "medusa" or any(
            re.match(r"(medusa_heads\.)?blocks\.\d+\.layers\.", name) for name in files.tensors
        )

    def parse(self, files: RawFiles) -> HeadCheckpoint:
        tensors = {}
        for name, tensor in files.tensors.items():
            name = name.removeprefix("medusa_heads.")
            # vLLM takes the names of FasterDecoding for its own, too.
            name = re.sub(rf"^{_BLOCK.pattern}$", r"blocks.\1.layers.\2.\3", name)
            name = re.sub(rf"^{_PROJECTION.pattern}$", r"lm_heads.\1.weight", name)
            is_copy = self.original_lm_head and name in ("lm_head.weight", "lm_heads.0.weight")
            if not is_copy:
                tensors[name] = tensor
        if not self.medusa_fc_bias:  # zeros do what a block without a bias does
            blocks = {name: t for name, t in tensors.items() if name.startswith("blocks.")}
            if biases := sorted(name for name in blocks if name.endswith(".bias")):
                raise ValueError(
                    f"{files.weights_path!r} has the tensor {biases[0]}: set medusa_fc_bias to "
                    "true in config.json"
                )
            for name, weight in blocks.items():
                bias = name.removesuffix("weight") + "bias"
                tensors[bias] = weight.new_zeros(weight.shape[:1])
        options = self.model_dump(include={"hidden_size", "vocab_size", "num_heads"})
        options["num_layers"] = self.num_hidden_layers
        options["own_vocab_head"] = not self.original_lm_head
        if self.truncated_vocab_size not in (None, self.vocab_size):
            options["draft_vocab_size"] = self.truncated_vocab_size
        target = TargetIdentity(None, self.hidden_size, self.vocab_size)
        return HeadCheckpoint(self.kind, options, tensors, target=target)

    @classmethod
    def naming(cls, checkpoint: HeadCheckpoint) -> Callable[[str], str]:
        return lambda name: (
            re.sub(r"^blocks\.(\d+)\.(\d+)\.linear", r"blocks.\1.layers.\2", name)
            .replace("vocab_heads.", "lm_heads.")
            .replace("draft_ids", "token_map")
        )

    @classmethod
    def config(cls, checkpoint: HeadCheckpoint, options: Any) -> dict[str, Any]:
        if not options.own_vocab_head:
            what = "heads without projections (own_vocab_head=false), but copies of the target's"
            raise cls.cannot_hold(what, "use the layout 'medusa'")
        return super().config(checkpoint, options) | {
            **{"architectures": ["MedusaModel"], "model_type": "medusa"},
            **options.model_dump(include={"hidden_size", "vocab_size", "num_heads"}),
            "truncated_vocab_size": options.draft_vocab_size,
            "num_hidden_layers": options.num_layers,
            **{"original_lm_head": False, "medusa_fc_bias": True},
        }
