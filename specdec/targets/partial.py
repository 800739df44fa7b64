"""The two ends of a target, its embedding and its vocabulary projection, without the middle.

Draft heads are built from these two alone; with stored features the rest of the target, nearly all
of its weights, need not be in memory while they are trained.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdec.common.files import read_json
from specdec.targets.hf import eos_token_ids, max_context_len
from specdec.targets.load import (
    LOADING,
    check_path,
    find_device,
    find_dtype,
    first_line,
    load_tokenizer,
)

_WEIGHTS = "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"


class EndsModel(nn.Module):
    """The members of a transformers causal LM that code which builds heads asks for.

    Args:
        config: config of the whole model.
        generation_config: generation config of the checkpoint; None where it has none.
        embedding: the input embedding.
        projection: the vocabulary projection.
        names: names in the whole model of the parameters here.
    """

    is_partial = True  # a hash of these weights is not the hash of the target's

    def __init__(
        self,
        config: Any,
        generation_config: Any,
        embedding: nn.Embedding,
        projection: nn.Linear,
        names: dict[str, str],
    ) -> None:
        super().__init__()
        self.config, self.generation_config, self.names = config, generation_config, names
        self.embedding, self.projection = embedding, projection

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of both ends."""
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of both ends."""
        return self.embedding.weight.device

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the module from token ids [...] to embeddings [..., H]."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Linear:
        """Return the module from hidden states [..., H], after the final norm, to [..., V]."""
        return self.projection


class TargetEnds:
    """A target that cannot run, for code that only builds heads for it.

    Its attributes mean what they mean in `HFTarget`.
    """

    def __init__(self, model: EndsModel, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.config = model.config.get_text_config()
        self.device = model.device
        self.vocab_size: int = model.projection.weight.shape[0]
        self.max_context_len = max_context_len(self.config)
        self.eos_token_ids = eos_token_ids(model)


def load_ends(
    path: str,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> TargetEnds:
    """Load the embedding and the vocabulary projection of a causal LM, and nothing else.

    Args:
        path: as in `load_target`; of a hub id only the files that hold the two are downloaded.
        dtype: as in `load_target`.
        device: as in `load_target`.
        revision: revision of a hub id.

    Raises:
        FileNotFoundError: no such folder or hub id, or no safetensors in it.
        ValueError: the checkpoint does not hold the two, or not of the shapes that its config
            asks for; or they do more than to look up and to multiply.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    where = check_path(path)
    chosen = find_device(device)
    try:
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{path!r} could not be loaded: {first_line(error)}") from error
    text_config = config.get_text_config()
    wanted = find_dtype(dtype, chosen)
    if wanted == "auto":
        wanted = text_config.dtype or torch.float32
    with LOADING, torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    embedding, projection = whole.get_input_embeddings(), whole.get_output_embeddings()
    _require_kind(where, "embedding", embedding, nn.Embedding)
    _require_kind(where, "vocabulary projection", projection, nn.Linear)
    places = {id(module): name for name, module in whole.named_modules()}
    stored = _StoredTensors(where, revision, whole.base_model_prefix)

    def read(module: Any, part: str) -> nn.Parameter:
        shape = getattr(module, part).shape
        return nn.Parameter(stored.read(f"{places[id(module)]}.{part}", shape).to(wanted))

    # The layers have no memory of their own: they are given the parameters, which may be shared.
    embedding.weight = read(embedding, "weight")
    is_tied = text_config.tie_word_embeddings
    projection.weight = embedding.weight if is_tied else read(projection, "weight")
    if projection.bias is not None:
        projection.bias = read(projection, "bias")
    names = {
        "embedding.weight": f"{places[id(embedding)]}.weight",
        "projection.weight": f"{places[id(projection)]}.weight",
    }
    generation_config = _generation_config(where, revision)
    model = EndsModel(config, generation_config, embedding, projection, names)
    model.to(chosen).eval().requires_grad_(False)
    return TargetEnds(model, load_tokenizer(where, revision, trust_remote_code=False))


def _require_kind(where: str, noun: str, module: Any, kind: type[nn.Module]) -> None:
    if type(module) is not kind:
        raise ValueError(
            f"the {noun} of {where!r} is a {type(module).__name__}, which does more than "
            f"nn.{kind.__name__}; train beside the whole target"
        )


class _StoredTensors:
    """Single tensors of a checkpoint, sharded or not."""

    def __init__(self, where: str, revision: str | None, prefix: str) -> None:
        self._where, self._revision, self._prefix = where, revision, prefix
        index = self._file(_INDEX)
        self._map: dict[str, str] = read_json(index)["weight_map"] if index else {}
        if not index and self._file(_WEIGHTS) is None:
            raise FileNotFoundError(
                f"{where!r} has neither {_WEIGHTS} nor {_INDEX}; only safetensors are read"
            )

    def read(self, name: str, shape: torch.Size) -> Tensor:
        """Read a tensor by its name in the model, with or without the prefix of the base model."""
        from safetensors import SafetensorError, safe_open

        names = (name, name.removeprefix(f"{self._prefix}."))
        file = next((self._map[each] for each in names if each in self._map), _WEIGHTS)
        path = self._file(file)
        if path is None:
            raise FileNotFoundError(f"{self._where!r} lacks {file}; copy or download it again")
        try:
            with safe_open(str(path), "pt") as opened:
                known = set(opened.keys())
                found = next((each for each in names if each in known), None)
                tensor = None if found is None else opened.get_tensor(found)
        except SafetensorError as error:
            raise ValueError(
                f"{str(path)!r} cannot be read ({first_line(error)}); it is corrupt or truncated, "
                "copy or download it again"
            ) from error
        if tensor is None or tensor.shape != shape or not tensor.is_floating_point():
            seen = "nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(
                f"{self._where!r} must hold {name} as floats of the shape {tuple(shape)} but holds "
                f"{seen}; the checkpoint is incomplete, quantized or of another model"
            )
        return tensor

    def _file(self, name: str) -> Path | None:
        """Return the path of a file, downloaded if it must be; None if there is none."""
        if Path(self._where).is_dir():
            path = Path(self._where) / name
            return path if path.exists() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return Path(hf_hub_download(self._where, name, revision=self._revision))
        except EntryNotFoundError:
            return None
        except OSError as error:
            raise FileNotFoundError(
                f"{self._where!r} is no folder here and {name} could not be had from the hub: "
                f"{first_line(error)}"
            ) from error


def _generation_config(where: str, revision: str | None) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(where, revision=revision or "main")
    except OSError:
        return None
