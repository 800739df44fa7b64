"""Load a target, or its two ends alone, from a folder, the hub, or the package itself."""

from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from specdec.checkpoints.folder import CONFIG, own_mtp, unreadable
from specdec.common.arguments import checked, require_counts
from specdec.common.compile import CannotCompileError, compile_mode
from specdec.common.distribution import install
from specdec.common.files import first_line, read_json
from specdec.common.hub import find_checkpoint
from specdec.demo import demo_path
from specdec.engine.quantize import mode_of
from specdec.engine.scheduler import is_out_of_memory
from specdec.targets.hf import HFTarget, TargetEnds

QUANTIZATIONS = ("8bit", "4bit")
CACHE_MODES = ("FP16", "Q8", "Q6", "Q4")
ENGINES = {
    "exllamav2": "specdec.targets.exllamav2:ExLlamaV2Target",
    "exllamav3": "specdec.targets.exllamav3:ExLlamaV3Target",
}
_WEIGHTS = "model.safetensors"
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
    attn_implementation: str | None = None,
    compile: bool | str = False,
    cache: str | None = "none",
    engine: str | None = None,
    cache_mode: str | None = None,
    cache_tokens: int | None = None,
) -> Any:
    """Load any transformers causal LM, from safetensors only, or a folder into another engine.

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
        attn_implementation: attention of transformers that takes masks, "sdpa" or "eager"; None
            for the model's own choice. Another one that ignores our masks is refused.
        compile: True for code compiled by Inductor, which needs a C++ compiler and some ten seconds
            once for each kind of layer (kept in TORCHINDUCTOR_CACHE_DIR); "graphs" for CUDA graphs;
            "auto" for graphs on CUDA and nothing on a CPU; False for none.
        cache: "fp8", "int8", "int6" or "int4" for keys and values that are quantized as they are
            written, with a scale for every 32 channels of a token: 8.5, 8.5, 6.5 and 4.5 bits a
            value in half precision. Such a target is not compiled. "none": the model's dtype.
        engine: "exllamav2" or "exllamav3", with CUDA, for a folder that it reads, EXL2 or EXL3
            among others; chains only. None for transformers.
        cache_mode: "FP16", "Q8", "Q6" or "Q4": keys and values of such an engine. None: FP16.
        cache_tokens: tokens of all rows together that it caches. None: 32,768.

    Returns:
        An `HFTarget`, or the `Target` of the engine.

    Raises:
        FileNotFoundError: no such folder or hub id.
        RuntimeError: the engine cannot be imported or run here, or `compile` asks for what cannot
            be compiled here.
        ValueError: an option that cannot work here, or files that do not hold the model that their
            config describes: corrupt, or with missing, unexpected or misshapen tensors.
        MemoryError: the weights do not fit.
    """
    import transformers

    if engine or cache_mode or cache_tokens:
        own = (dtype, device, device_map, quantization, revision, trust_remote_code, compile)
        has_own = any((*own, attn_implementation, mode_of(cache)))
        return _load_engine(path, engine, cache_mode or "FP16", cache_tokens, has_own)
    where = check_path(path)
    chosen = find_device(device)
    compile_mode(compile, chosen, mode_of(cache))
    options: dict[str, Any] = {
        "dtype": find_dtype(dtype, chosen),
        "use_safetensors": True,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "output_loading_info": True,
        # They are refused below, by name and shape.
        "ignore_mismatched_sizes": True,
    }
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantization is not None:
        options["quantization_config"] = _quantization(quantization, chosen)
    if device_map is not None or quantization is not None:
        options["device_map"] = device_map or {"": str(chosen)}
    try:
        with LOADING:
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(where, **options)
        model, info = loaded
        _check_stored(where, revision, model, info)
        if "device_map" not in options:
            model = model.to(chosen)
        if chosen.type == "cpu":
            # bitsandbytes takes bfloat16 kernels that some CPUs have, whatever the compute dtype
            # says: they round scales, and cannot pack rows that are shorter than a block.
            for module in model.modules():
                if hasattr(module, "support_avx512bf16_for_cpu"):
                    module.support_avx512bf16_for_cpu = False
        target = HFTarget(model.eval(), compile=compile, cache=cache)
    except (IncompleteCheckpointError, CannotCompileError):
        raise
    except Exception as error:
        raise _explained(where, error, chosen) from error
    target.tokenizer = load_tokenizer(where, revision, trust_remote_code)
    return target


def _load_engine(
    path: str, engine: str | None, mode: str, num_tokens: int | None, has_own: bool
) -> Any:
    """Load a folder into another engine, which takes none of the options of transformers."""
    where = check_path(path)
    require_counts(2**30, cache_tokens=num_tokens)
    faults = {
        f"engine is {engine!r} but must be {' or '.join(ENGINES)}": engine not in ENGINES,
        f"cache_mode is {mode!r}, not in {CACHE_MODES}": mode not in CACHE_MODES,
        f"{engine} takes what the folder holds; CUDA_VISIBLE_DEVICES names its GPUs, and "
        "cache_mode its cache": has_own,
        f"{engine} reads folders, not {path!r}": not Path(where).is_dir(),
    }
    for message in filter(faults.get, faults):
        raise ValueError(message)
    return resolve_name(ENGINES[str(engine)])(where, mode, num_tokens or 2**15)


def check_path(path: str) -> str:
    """Return the folder of a checkpoint, or its id on the hub; "demo" is the embedded model."""
    if path == "demo":
        return str(demo_path("target"))
    where = find_checkpoint(path, "'demo', a folder with a checkpoint")
    if Path(where).is_dir() and not (Path(where) / CONFIG).is_file():
        raise FileNotFoundError(f"{path!r} has no config.json; is it a transformers checkpoint?")
    return where


def find_device(device: str | torch.device | None) -> torch.device:
    """Return a device that is here; None is CUDA if there is one, else the CPU."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(default if device is None else device)
        if chosen.type == "meta":
            raise ValueError("nothing can be computed there")
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"device is {device!r} but must be cpu, cuda or cuda:N") from error
    num_devices = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= num_devices:
        raise ValueError(
            f"device is {str(device)!r} but torch finds {num_devices} CUDA devices here; use cpu"
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
            f"the tokenizer of {path!r} could not be loaded, copy its files again: "
            f"{first_line(error)}"
        ) from error


def _quantization(name: str, device: torch.device) -> Any:
    if name not in QUANTIZATIONS:
        raise ValueError(f"quantization is {name!r} but must be one of {QUANTIZATIONS}, or None")
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"quantization {name!r} needs bitsandbytes; {install('quant')}")
    from transformers import BitsAndBytesConfig

    if name == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.float32 if device.type == "cpu" else torch.bfloat16
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    )


def _check_stored(path: str, revision: str | None, model: Any, info: Mapping[str, Any]) -> None:
    """Refuse files that do not fit their config; transformers takes integers and damaged JSON."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    faults = [
        f"{name} has shape {tuple(stored)} but must have {tuple(wanted)}"
        for name, stored, wanted in sorted(info.get("mismatched_keys", ()))
    ]
    own = own_mtp(info.get("unexpected_keys", ()), model.config.get_text_config().to_dict())
    for kind in ("missing", "unexpected"):
        if names := sorted({str(name) for name in info.get(f"{kind}_keys", ())} - {*own}):
            faults.append(f"{kind} tensors ({len(names)}), {names[0]} for one")
    if faults:
        raise IncompleteCheckpointError(
            f"{path!r} does not fit its config: {faults[0]}; one is incomplete or of another model"
        )
    folder = Path(cached_file(path, CONFIG, revision=revision) or path).parent
    if (settings := folder / "generation_config.json").exists():
        read_json(settings)
    if getattr(model, "is_quantized", False):
        return
    weights = {name for name, weight in model.named_parameters() if weight.is_floating_point()}
    weights |= {name.removeprefix(f"{model.base_model_prefix}.") for name in weights}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in weights.intersection(opened.keys()):
                dtype = opened.get_slice(name).get_dtype()
                if dtype == "BOOL" or dtype[0] in "IU":
                    raise IncompleteCheckpointError(
                        f"{str(file)!r} holds {name} as {dtype}, but its config says nothing of a "
                        "quantization; one of the two is damaged, copy both again"
                    )


def _explained(path: str, error: Exception, device: torch.device) -> Exception:
    """Return the error to raise in place of one that came up while loading."""
    if is_out_of_memory(error):
        return _does_not_fit(path, device)
    text = first_line(error)
    if "afetensor" in type(error).__name__ or "header" in text.lower():
        return unreadable(path, error)
    kind = FileNotFoundError if isinstance(error, OSError) else ValueError
    return kind(f"{path!r} could not be loaded: {text}")


def _does_not_fit(path: str, device: torch.device) -> Exception:
    """Return the error of too little memory, or of a config that asks for more than there is."""
    from transformers import AutoConfig, AutoModelForCausalLM

    stored, asked, free = 0, 0, "fewer"
    # A hub id has no files here, and a model with code of its own is not built.
    with LOADING, suppress(ValueError, OSError), torch.device("meta"):
        stored = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
        asked = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).num_parameters()
    if 0 < 8 * stored < asked:  # no format packs more than four weights into a byte
        return ValueError(
            f"config.json of {path!r} asks for {asked:,} weights, but its files hold only "
            f"{stored:,} bytes; is a size in it wrong?"
        )
    with suppress(OSError, IndexError):  # not on other systems than Linux
        free = Path("/proc/meminfo").read_text().split("MemAvailable:")[1].splitlines()[0].strip()
    if device.type == "cuda":
        free = f"{torch.cuda.mem_get_info(device)[0]:,} bytes"
    return MemoryError(
        f"no memory for the weights of {path!r} on {device}: its files hold {stored:,} bytes, and "
        f"{free} are free; use a smaller dtype, quantization=4bit or another device"
    )


def load_ends(
    path: str,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> TargetEnds:
    """Load the embedding and the vocabulary projection of a causal LM, and nothing else.

    Draft heads are built from these two alone. Arguments are those of `load_target`; of a hub id
    only the files that hold the two are downloaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    where, chosen = check_path(path), find_device(device)
    try:
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{path!r} could not be loaded: {first_line(error)}") from error
    text_config, wanted = config.get_text_config(), find_dtype(dtype, chosen)
    if wanted == "auto":
        wanted = text_config.dtype or torch.float32
    with LOADING, torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=wanted)
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(
            where, revision=revision or "main"
        )
    embedding, projection = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    for noun, module, kind in (
        ("embedding", embedding, nn.Embedding),
        ("vocabulary projection", projection, nn.Linear),
    ):
        if type(module) is not kind:
            raise ValueError(
                f"the {noun} of {where!r} is a {type(module).__name__}, which does more than "
                f"nn.{kind.__name__}; train beside the whole target"
            )
    parts = [(embedding, "weight"), *((projection, n) for n, _ in projection.named_parameters())]
    if is_tied := text_config.tie_word_embeddings:
        parts.remove((projection, "weight"))
    for module, part in parts:
        name, shape = f"{names[id(module)]}.{part}", getattr(module, part).shape
        stored = _read_stored(where, revision, name, model.base_model_prefix, shape)
        setattr(module, part, nn.Parameter(stored.to(chosen, wanted)))
    if is_tied:
        projection.weight = embedding.weight
    tokenizer = load_tokenizer(where, revision, trust_remote_code=False)
    return TargetEnds(model.eval().requires_grad_(False), tokenizer)


def _read_stored(
    where: str, revision: str | None, name: str, prefix: str, shape: torch.Size
) -> Tensor:
    """Read one tensor of a checkpoint, with or without the prefix of the base model."""
    from safetensors import SafetensorError, safe_open
    from transformers.utils import cached_file

    def find(file: str) -> str | None:
        return cached_file(
            where, file, revision=revision, _raise_exceptions_for_missing_entries=False
        )

    index = find(f"{_WEIGHTS}.index.json")
    files = read_json(Path(index))["weight_map"] if index else {}
    names = (name, name.removeprefix(f"{prefix}."))
    file = next((files[each] for each in names if each in files), _WEIGHTS)
    path = find(file)
    if path is None:
        raise FileNotFoundError(
            f"{where!r} has no {file}; only safetensors are read, copy it again"
        )
    try:
        with safe_open(path, "pt") as opened:
            found = next((each for each in names if each in opened.keys()), None)  # noqa: SIM118
            tensor = None if found is None else opened.get_tensor(found)
    except SafetensorError as error:
        raise unreadable(path, error) from error
    if tensor is None or tensor.shape != shape or not tensor.is_floating_point():
        seen = "nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(
            f"{where!r} must hold {name} as floats of the shape {tuple(shape)} but holds {seen}; "
            "it is incomplete, quantized or of another model"
        )
    return tensor
