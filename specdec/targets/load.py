"""Load a target from a folder, the hub, or the package itself."""

import resource
import sys
from contextlib import suppress
from pathlib import Path
from threading import RLock
from typing import Any

import torch

from specdec.checkpoints.folder import CONFIG
from specdec.common.arguments import checked
from specdec.common.files import read_json
from specdec.common.hub import find_checkpoint
from specdec.demo import demo_path
from specdec.engine.scheduler import is_out_of_memory
from specdec.targets.hf import HFTarget

QUANTIZATIONS = ("8bit", "4bit")
# While transformers builds a model it patches torch for the whole process: one at a time.
LOADING = RLock()


class IncompleteCheckpointError(ValueError):
    """A checkpoint whose tensors are not those that its config asks for."""


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
        device: device of the model; None: CUDA if there is one, else the CPU.
        device_map: passed to transformers instead of `device`, to spread a model over devices.
        quantization: "8bit" or "4bit" through bitsandbytes; a checkpoint that is stored quantized
            needs none.
        revision: revision of a hub id.
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
    except IncompleteCheckpointError:
        raise
    except Exception as error:
        raise _explained(where, error, chosen) from error
    target.tokenizer = load_tokenizer(where, revision, trust_remote_code)
    return target


def check_path(path: str) -> str:
    """Return the folder of a checkpoint, or its id on the hub; "demo" is the embedded model."""
    if path == "demo":
        return str(demo_path("target"))
    where = find_checkpoint(path, "'demo', a folder with a checkpoint")
    if Path(where).is_dir() and not (Path(where) / "config.json").is_file():
        raise FileNotFoundError(f"{path!r} has no config.json; is it a transformers checkpoint?")
    return where


def find_device(device: str | torch.device | None) -> torch.device:
    """Return a device that is here; None is CUDA if there is one, else the CPU."""
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
    """Return a floating dtype, or "auto" for the checkpoint's own."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {dtype!r} but must be float32, bfloat16, float16 or auto")
    return found


def load_tokenizer(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    """Load the tokenizer of a checkpoint; None for a folder without one."""
    from transformers import AutoTokenizer

    if Path(path).is_dir() and not any(Path(path).glob("tokenizer*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise ValueError(
            f"the tokenizer of {path!r} could not be loaded ({first_line(error)}); copy or "
            "download its tokenizer files again"
        ) from error


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
                        "quantization; the file is damaged or config.json is of another model"
                    )


def _explained(path: str, error: Exception, device: torch.device) -> Exception:
    """Return the error to raise in place of one that came up while loading."""
    if is_out_of_memory(error):
        return _does_not_fit(path, device)
    text = first_line(error)
    if "afetensor" in type(error).__name__ or "header" in text.lower():
        return ValueError(
            f"{path!r} holds a safetensors file that cannot be read ({text}); it is corrupt or "
            f"truncated, copy or download it again"
        )
    kind = FileNotFoundError if isinstance(error, OSError) else ValueError
    return kind(f"{path!r} could not be loaded: {text}")


def _does_not_fit(path: str, device: torch.device) -> Exception:
    """Return the error of too little memory, or of a config that asks for more than there is."""
    from transformers import AutoConfig, AutoModelForCausalLM

    stored = sum(file.stat().st_size for file in Path(path).expanduser().glob("*.safetensors"))
    asked, free = 0, _free_bytes(device)
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


def _free_bytes(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated; None where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    kib = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * kib[0] if kib else None


def peak_rss_bytes() -> int:
    """Return the largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # KiB everywhere else


def first_line(error: Exception) -> str:
    """Return the first line of a message, or the error's type if it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
