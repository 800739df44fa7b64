"""Hold the exllama adapters and their fakes against the real packages, without CUDA.

`python exllama_contract.py SITE ENGINE`: a process of its own, because the compiled extensions are
replaced by stubs. Nothing is computed: the adapter loads the embedded target with the engine's own
classes, and its forward is checked against the engine's own signatures.
"""

import importlib.util
import inspect
import sys
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from pathlib import Path
from unittest import mock

import pytest
import torch

from specdec import Draft, load_target
from specdec.demo import demo_path
from specdec.targets.exllama import _import
from specdec.targets.load import CACHE_MODES, load_ends

FOLDER, PROMPTS = demo_path("target"), [[5, 6, 7], [8, 9, 10, 11]]
TAPS, TEXT = (0, 3, 16), "Once upon a time"


def stub(name: str) -> None:
    module = mock.MagicMock()
    module.__spec__ = ModuleSpec(name, object(), origin="stub" + EXTENSION_SUFFIXES[0])
    sys.modules[name] = module


def fake(engine: str):
    folder = Path(__file__).parents[1] / "fake_engines"
    sys.path.append(str(folder))
    spec = importlib.util.spec_from_file_location(f"fake_{engine}", folder / f"{engine}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_signature(real, imitation) -> None:
    """Every parameter that a fake names is the real one's, with its default."""
    theirs = inspect.signature(real).parameters
    for name, parameter in inspect.signature(imitation).parameters.items():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            assert name in theirs, f"{real.__qualname__} has no {name}"
            assert theirs[name].default == parameter.default, f"{real.__qualname__}({name})"


def decode(target) -> list[torch.Tensor]:
    """Prefill, join, score: whatever the forward is given must fit its signature."""
    outputs = [
        target.prefill(PROMPTS[:1], TAPS),
        target.prefill(PROMPTS[1:], TAPS, join=True),
        target.score(torch.tensor([1, 2]), Draft.chain(torch.tensor([[3, 4], [5, -1]])), TAPS),
    ]
    assert [tuple(o.logits.shape) for o in outputs] == [(1, 1, 3072), (1, 1, 3072), (2, 3, 3072)]
    assert target.lengths == [3, 4]
    return [output.hidden[TAPS[-1]] for output in outputs]


def check_v2(exllamav2) -> None:
    copy = fake("exllamav2")
    real_params = exllamav2.attn.ExLlamaV2Attention.PagedParams
    for real, imitation in (
        (exllamav2.ExLlamaV2Config, copy.ExLlamaV2Config),
        (exllamav2.ExLlamaV2, copy.ExLlamaV2),
        (exllamav2.ExLlamaV2.load_autosplit, copy.ExLlamaV2.load_autosplit),
        (exllamav2.ExLlamaV2.forward_chunk, copy.ExLlamaV2.forward_chunk),
        (exllamav2.ExLlamaV2Cache, copy.ExLlamaV2Cache),
        (exllamav2.ExLlamaV2Cache_Q8, copy.ExLlamaV2Cache_Q8),
        (real_params, copy.PagedParams),
    ):
        check_signature(real, imitation)

    def load(model, cache):
        assert not any(cache.key_states), "a lazy cache has nothing allocated"
        assert model.config.max_output_len is None
        for module in model.modules:
            module.set_device_idx(-1)

    def forward(model, ids, cache, last_id_only, attn_params, extract_state_indices):
        assert isinstance(attn_params, real_params)
        assert (attn_params.page_size, attn_params.cache_seqlens.tolist()) in (
            (256, [0]),
            (256, [3, 4]),
        )
        width = 1 if last_id_only else ids.shape[1]
        states = {index: torch.ones(*ids.shape, 160) for index in extract_state_indices}
        assert set(states) == {1, 7, 33}
        return {"logits": torch.zeros(len(ids), width, 3072 + 32), "states": states}

    norm = exllamav2.rmsnorm.ExLlamaV2RMSNorm
    assert not exllamav2.attn.has_flash_attn_with_paged
    exllamav2.attn.has_flash_attn_with_paged = True
    with (
        mock.patch.object(exllamav2.ExLlamaV2, "load_autosplit", autospec=True, side_effect=load),
        mock.patch.object(exllamav2.ExLlamaV2, "forward_chunk", autospec=True, side_effect=forward),
        mock.patch.object(norm, "forward", autospec=True, side_effect=lambda self, x: 2 * x),
    ):
        for mode in CACHE_MODES:
            target = load_target(str(FOLDER), engine="exllamav2", cache_mode=mode)
            assert type(target._cache).__name__.endswith("Cache" if mode == "FP16" else mode)
            assert target._cache.max_seq_len == target.cache_tokens == 2**15
            hidden = decode(target)
        assert all((states == 2).all() for states in hidden), "the last tap is normed"
    kinds = [type(module).__name__ for module in target._model.modules]
    assert kinds[:4] == [f"ExLlamaV2{n}" for n in ("Embedding", "Attention", "MLP", "Attention")]
    assert kinds[target._taps[-1] :] == ["ExLlamaV2RMSNorm", "ExLlamaV2Linear"]
    own = exllamav2.ExLlamaV2Tokenizer(target._model.config).encode(TEXT)
    check_target(target, own)


def check_v3(exllamav3) -> None:
    copy = fake("exllamav3")
    assert exllamav3.constants.PAGE_SIZE == 256
    real = exllamav3.model.Model
    for theirs, imitation in (
        (exllamav3.Config.from_directory, copy.Config.from_directory),
        (exllamav3.Cache, copy.Cache),
        (real.from_config, copy.Model.from_config),
        (real.load_gen, copy.Model.load),
        (real.forward, copy.Model.forward),
        (real.get_recurrent_layers, copy.Model.get_recurrent_layers),
    ):
        check_signature(theirs, imitation)
    load = real.load

    def forward(model, ids, params):
        given = model.prepare_inputs(ids, params)
        assert torch.equal(given, ids)
        assert torch.equal(params["positions"], params["cache_seqlens"])
        assert params["export_state_norm_keys"] == {"model.norm"}
        assert params["export_state_layers"] == {2}
        params["export_states"] = [torch.ones(*ids.shape, 160)] * 2
        return torch.zeros(len(ids), params["last_tokens_only"] or ids.shape[1], 3072 + 32)

    with (
        mock.patch.object(real, "load", lambda model: load(model, device="cpu")),
        mock.patch.object(real, "forward", autospec=True, side_effect=forward),
    ):
        for mode in CACHE_MODES[::3]:  # all but one are the same class
            target = load_target(str(FOLDER), engine="exllamav3", cache_mode=mode)
            layer = next(iter(target._cache.layers.values()))
            assert getattr(layer, "k_bits", "FP16") == (mode if mode == "FP16" else int(mode[1:]))
            assert layer.max_num_tokens == target.cache_tokens == 2**15
            decode(target)
    modules = target._model.modules
    norm = modules[target._model.logit_layer_idx - 1]
    assert (type(norm).__name__, norm.key, len(modules)) == ("RMSNorm", "model.norm", 19)
    embedded = modules[0].forward(torch.tensor(PROMPTS[:1]), {})
    assert embedded.shape == (1, 3, 160)  # its values are read by a stub
    own = exllamav3.Tokenizer.from_config(target._model.config).encode(TEXT)
    check_target(target, own)


def check_target(target, own_ids) -> None:
    assert own_ids[0].tolist() == target.tokenizer.encode(TEXT, add_special_tokens=False)
    assert target.eos_token_ids == load_ends("demo").eos_token_ids
    assert target.max_context_len == 2048 - 64
    assert target.device == torch.device("cpu")


if __name__ == "__main__":
    site, engine = sys.argv[1:]
    sys.path.append(site)
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError, match=f"engine {engine} cannot be imported: CUDA_HOME"):
        load_target(str(FOLDER), engine=engine)
    for name in [name for name in sys.modules if name.split(".")[0] == engine]:
        del sys.modules[name]
    for name in ("exllamav2_ext", "exllamav3_ext", "triton", "triton.language"):
        stub(name)
    package = _import(engine)
    assert torch.get_num_threads() == 2, "the engine's import changed torch's threads"
    {"exllamav2": check_v2, "exllamav3": check_v3}[engine](package)
