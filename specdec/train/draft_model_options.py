"""How a draft model is trained: as a whole, or through a low-rank adapter."""

from dataclasses import dataclass, fields
from typing import Any, Self

from specdec.demo import demo_path

METHODS = ("full", "lora", "qlora")
EXPORTS = ("merged", "adapter")


@dataclass(frozen=True)
class DraftModelOptions:
    """Options under `drafter.options` of a draft model.

    Attributes:
        path: the model to start from: "demo", a folder or a hub id.
        method: "full" trains all weights; "lora" a low-rank adapter on the model as it is; "qlora"
            the same on a base in 4-bit NF4, through bitsandbytes.
        rank: of the adapter.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: of the adapter's input.
        targets: modules that are adapted: "all-linear", or the ends of their names.
        gradient_checkpointing: compute activations again in the backward pass: less memory, about
            a third more time.
        export: "merged" writes a plain model that every engine reads; a 4-bit base is dequantised
            first, because merging into four bits rounds much of the adapter away. "adapter" writes
            the adapter alone.
        dtype: of the base; None: float32 on a CPU and for "full", else the checkpoint's own.
    """

    path: str = "demo"
    method: str = "qlora"
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"
    gradient_checkpointing: bool = False
    export: str = "merged"
    dtype: str | None = None

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Self:
        """Check and take options.

        Raises:
            ValueError: an option that does not exist or is out of its range.
        """
        known = [field.name for field in fields(cls)]
        unknown = next((name for name in given if name not in known), None)
        if unknown is not None:
            raise ValueError(
                f"config drafter.options.{unknown} is no option of a draft model; known: "
                f"{', '.join(known)}"
            )
        options = cls(**given)
        for name, choices in (("method", METHODS), ("export", EXPORTS)):
            value = getattr(options, name)
            if value not in choices:
                raise ValueError(
                    f"config drafter.options.{name} is {value!r} but must be one of "
                    f"{', '.join(choices)}"
                )
        for name in ("rank", "alpha"):
            value = getattr(options, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"config drafter.options.{name} is {value!r} but must be at least 1"
                )
        if not 0 <= options.dropout < 1:
            raise ValueError(
                f"config drafter.options.dropout is {options.dropout} but must be in [0, 1)"
            )
        if options.method == "full" and options.export == "adapter":
            raise ValueError(
                "config drafter.options.export is 'adapter', but method 'full' makes none; use "
                "export=merged"
            )
        if options.method == "full" and options.dtype is None:
            # Small steps are lost in half precision; autocast computes in it where asked.
            return cls(**{**given, "dtype": "float32"})
        return options

    @property
    def model_path(self) -> str:
        """Where the model to start from lies; "demo" is the embedded draft model."""
        return str(demo_path("draft")) if self.path == "demo" else self.path

    @property
    def keeps_adapter(self) -> bool:
        """Whether the adapter is written alone."""
        return self.export == "adapter"

    def prepared(self, model: Any) -> Any:
        """The model with what is to be trained, in train mode.

        Args:
            model: a transformers causal LM, loaded as `method` asks.

        Raises:
            ValueError: peft is not installed, or cannot adapt this model.
        """
        if self.method == "full":
            model.requires_grad_(True)
            if self.gradient_checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            return model.train()
        try:
            from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
        except ImportError as error:
            raise ValueError(
                f"drafter.options.method {self.method!r} needs peft; install it with: "
                "pip install 'specdec[train]'"
            ) from error
        if self.method == "qlora":
            model = prepare_model_for_kbit_training(
                model, self.gradient_checkpointing, {"use_reentrant": False}
            )
        elif self.gradient_checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.targets,
            task_type="CAUSAL_LM",
        )
        try:
            return get_peft_model(model, config).train()
        except ValueError as error:
            raise ValueError(f"config drafter.options.targets {self.targets!r}: {error}") from error
