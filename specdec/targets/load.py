"""Load a target from a folder, the hub, or the package itself."""

import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from specdec.checkpoints.folder import CONFIG
from specdec.common.files import read_json
from specdec.common.hub import find_checkpoint
from specdec.demo import demo_path
from specdec.engine.interfaces import Target, claimed
from specdec.engine.scheduler import is_out_of_memory
from specdec.sampling.config import checked
from specdec.targets.hf import HFTarget
from specdec.verify import Draft, match


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    kib = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * kib[0] if kib else None


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # KiB everywhere else


QUANTIZATIONS = ("8bit", "4bit")
# While transformers builds a model it patches torch for the whole process: one at a time.
LOADING = RLock()


@checked
def load_target(
    path: str,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    quantization: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> HFTarget:
    """Load any transformers causal LM, from safetensors only.

    Args:
        path: "demo" (the embedded model), a folder, or a hub id; `hub:owner/name` is always one.
        dtype: "float32", "bfloat16", "float16", "auto" or a torch dtype. None: float32 on a CPU,
            the checkpoint's own elsewhere.
        device: where to put it; None: CUDA if there is one, else the CPU.
        device_map: passed to transformers instead of `device`, to spread a model over devices.
        quantization: "8bit" or "4bit" through bitsandbytes; a checkpoint that is stored quantised
            needs none.
        revision: of a hub id.
        trust_remote_code: run Python code that the checkpoint brings. Off unless asked for.

    Raises:
        FileNotFoundError: no such folder or hub id.
        ValueError: an option that cannot work here, or files that do not hold the model that their
            config describes: corrupt, or with missing, unexpected or misshapen tensors.
        MemoryError: the weights do not fit.
    """
    import transformers

    where = check_path(path)
    chosen = find_device(device)
    options: dict[str, Any] = {
        "dtype": find_dtype(dtype, chosen),
        "use_safetensors": True,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "output_loading_info": True,
        # They are refused below, by name and shape.
        "ignore_mismatched_sizes": True,
    }
    if quantization is not None:
        options["quantization_config"] = _quantization(quantization, chosen)
    if device_map is not None or quantization is not None:
        options["device_map"] = device_map or {"": str(chosen)}
    loaded: Any
    try:
        with LOADING:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(where, **options)
        model, info = loaded
        _check_complete(where, info)
        _check_files(where, revision, model)
        if "device_map" not in options:
            model = model.to(chosen)
        if chosen.type == "cpu":
            _compute_in_float32(model)
        target = HFTarget(model.eval())
    except Exception as error:
        raise _explained(where, error, chosen) from error
    target.tokenizer = load_tokenizer(where, revision, trust_remote_code)
    return target


def check_path(path: str) -> str:
    """The folder of a checkpoint, or its id on the hub; "demo" is the embedded model.

    Raises:
        FileNotFoundError: it is neither.
    """
    if path == "demo":
        return str(demo_path("target"))
    where = find_checkpoint(path, "'demo', a folder with a checkpoint")
    if Path(where).is_dir() and not (Path(where) / "config.json").is_file():
        raise FileNotFoundError(f"{path!r} has no config.json; is it a transformers checkpoint?")
    return where


def find_device(device: str | torch.device | None) -> torch.device:
    """The device that is meant, if it is there."""
    try:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        chosen = torch.device(default if device is None else device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"device is {device!r} but must be cpu, cuda or cuda:N") from error
    if chosen.type == "meta":
        raise ValueError("device is 'meta', where nothing can be computed; use cpu, cuda or cuda:N")
    num_devices = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= num_devices:
        raise ValueError(
            f"device is {str(device)!r} but torch finds {num_devices} CUDA devices here; use cpu, "
            "or install a CUDA build of torch"
        )
    return chosen


def find_dtype(dtype: str | torch.dtype | None, device: torch.device) -> Any:
    """The dtype that is meant: a torch dtype, or "auto" for the checkpoint's own."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {dtype!r} but must be float32, bfloat16, float16 or auto")
    return found


def _quantization(name: str, device: torch.device) -> Any:
    if name not in QUANTIZATIONS:
        raise ValueError(f"quantization is {name!r} but must be one of {QUANTIZATIONS}, or None")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"quantization {name!r} needs bitsandbytes; install it with: "
            "pip install 'specdec[quant]'"
        ) from error
    from transformers import BitsAndBytesConfig

    if name == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.float32 if device.type == "cpu" else torch.bfloat16
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    )


def _compute_in_float32(model: Any) -> None:
    """Keep 4-bit layers off the bfloat16 kernels that some CPUs have.

    bitsandbytes takes them in eval mode whatever the compute dtype says, packs the weights anew for
    them, with rounded scales, and cannot pack rows that are shorter than a block.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _explained(path: str, error: Exception, device: torch.device) -> Exception:
    """What to raise in place of an error that came up while loading."""
    if isinstance(error, IncompleteCheckpointError):
        return error
    if is_out_of_memory(error):
        return _does_not_fit(path, device)
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "afetensor" in type(error).__name__ or "header" in text.lower():
        return ValueError(
            f"{path!r} holds a safetensors file that cannot be read ({text}); it is corrupt or "
            f"truncated, copy or download it again"
        )
    if isinstance(error, OSError):
        return FileNotFoundError(f"{path!r} could not be loaded: {text}")
    return ValueError(f"{path!r} could not be loaded: {text}")


def _does_not_fit(path: str, device: torch.device) -> Exception:
    """The error of too little memory, or of a config that asks for more than its files hold."""
    from transformers import AutoConfig, AutoModelForCausalLM

    stored = sum(file.stat().st_size for file in Path(path).expanduser().glob("*.safetensors"))
    asked, free = 0, free_bytes(device)
    # A hub id has no files here, and a model with code of its own is not built.
    with LOADING, suppress(ValueError, OSError), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
        asked = sum(weight.numel() for weight in model.parameters())
    if 0 < 8 * stored < asked:  # no format packs more than four weights into a byte
        return ValueError(
            f"{path!r} could not be loaded: its config.json asks for {asked:,} weights, but its "
            f"files hold only {stored:,} bytes; is a size in it wrong?"
        )
    message = f"no memory for the weights of {path!r} on {device}"
    if stored and free is not None:
        message += f": its files hold {stored:,} bytes, and {free:,} are free"
    return MemoryError(f"{message}; use a smaller dtype, quantization=4bit or another device")


class IncompleteCheckpointError(ValueError):
    """A checkpoint whose tensors are not those that its config asks for."""


def _check_complete(path: str, info: Any) -> None:
    for name, stored, wanted in sorted(info.get("mismatched_keys", ())):
        raise IncompleteCheckpointError(
            f"{path!r} does not fit its config: {name} has shape {tuple(stored)} but must have "
            f"{tuple(wanted)}; the checkpoint or its config.json is of another model"
        )
    for kind in ("missing", "unexpected"):
        names = sorted(str(name) for name in info.get(f"{kind}_keys", ()))
        if names:
            raise IncompleteCheckpointError(
                f"{path!r} does not fit its config: {kind} tensors ({len(names)}), "
                f"{names[0]} for one; the checkpoint is incomplete or of another model"
            )


def _check_files(path: str, revision: str | None, model: Any) -> None:
    """Refuse what transformers takes without a word: whole numbers as weights, damaged JSON."""
    from huggingface_hub import try_to_load_from_cache
    from safetensors import safe_open

    folder = Path(path)
    if not folder.is_dir():
        folder = Path(try_to_load_from_cache(path, CONFIG, revision=revision) or path).parent
    if (settings := folder / "generation_config.json").exists():
        read_json(settings)
    if getattr(model, "is_quantized", False):
        return
    weights = {name for name, weight in model.named_parameters() if weight.is_floating_point()}
    weights |= {name.removeprefix(f"{model.base_model_prefix}.") for name in weights}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in weights.intersection(stored.keys()):
                if (dtype := stored.get_slice(name).get_dtype())[0] in "IUB" and dtype != "BF16":
                    raise IncompleteCheckpointError(
                        f"{str(file)!r} holds {name} as {dtype}, but its config says nothing of a "
                        "quantisation; the file is damaged or config.json is of another model"
                    )


def load_tokenizer(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer of a checkpoint; None for a folder without one."""
    from transformers import AutoTokenizer

    if Path(path).is_dir() and not any(Path(path).glob("tokenizer*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise ValueError(
            f"the tokenizer of {path!r} could not be loaded ({str(error).splitlines()[0]}); copy "
            "or download its tokenizer files again"
        ) from error


# Long texts are scored in chunks, which bounds the memory of masks and activations.
CHUNK = 512


@dataclass(frozen=True, eq=False)
class Reading:
    """One text as a model sees it, L tokens of which the last P were looked at.

    Attributes:
        logits: [P, V]; each row predicts the token behind its own.
        hidden: tap -> [L, H].
    """

    logits: Tensor
    hidden: dict[int, Tensor]


@torch.inference_mode()
def read_text(
    target: Target, tokens: Sequence[int], first: int, taps: Sequence[int] = ()
) -> Reading:
    """Teacher-force a text. The batch that the model was decoding is forgotten.

    Args:
        target: a target, or a draft model's own.
        tokens: L ids, at most its context.
        first: logits are wanted from this token on, in [1, L).
        taps: hidden states to return.

    Raises:
        RuntimeError: a loop has rows on the target.
    """
    with claimed(target):
        return _read(target, tokens, first, taps)


def _read(target: Target, tokens: Sequence[int], first: int, taps: Sequence[int]) -> Reading:
    output = target.prefill([tokens[:first]], taps)
    logits, hidden = [], [output.hidden]
    for start in range(first, len(tokens), CHUNK):
        root, *rest = tokens[start : start + CHUNK]
        draft = Draft.chain(torch.tensor([rest], dtype=torch.long, device=target.device))
        output = target.score(torch.tensor([root], device=target.device), draft, taps)
        logits.append(output.logits[0])
        hidden.append(output.hidden)
        accepted = torch.tensor([[*rest, 0]], device=target.device)
        target.commit(match(accepted, draft), [len(rest)])
    states = {tap: torch.cat([part[tap][0] for part in hidden]) for tap in taps}
    return Reading(torch.cat(logits), states)
