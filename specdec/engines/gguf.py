"""GGUF files by llama.cpp's own converter, with a tokenizer that was compared.

The converter is never a part of specdec: `scripts/engines.sh llamacpp` fetches it. It tells a
pre-tokenizer by the hash of a text, refuses a hash that it does not know, and says "successfully
exported" where the name is wrong. So the name is found here, and texts are compared.
"""

import os
import random
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from specdec.common.files import read_json

OUT_TYPES = {"auto": "auto", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}
NUM_TEXTS = 300
# llama.cpp's names of byte-level BPE, by what stands before it.
_NAMES = {("Digits", "ByteLevel"): "smollm", ("ByteLevel",): "gpt-2"}
# The converter, told the name if there is one, and without sentencepiece, which it imports before
# it looks if there is a model for it.
_CONVERT = """
import os, runpy, sys, types
script, name, *sys.argv[1:] = sys.argv[1:]
sys.argv[0], folder = script, script.rpartition("/")[0]
sys.path[:0] = [folder, folder + "/gguf-py"]
from conversion.base import TextModel
if name:
    TextModel.get_vocab_base_pre = lambda self, tokenizer: name
if not os.path.exists(sys.argv[1] + "/tokenizer.model"):
    sys.modules["sentencepiece"] = types.SimpleNamespace(SentencePieceProcessor=None)
runpy.run_path(script, run_name="__main__")
"""
_PIECES = (
    *("the", " answer", "Überraschung", " naïve", "don't", "WE'LL", "x=1;", "if(a>b){", "3333"),
    *(" 12.5", "1,000", "\n", "\n\n", "\t", "   ", " ", "...", "?!", "我想", "привет", "🚀", "é"),
)


def to_gguf(folder: Path, out_file: Path, target: Path | None = None, dtype: str = "auto") -> Path:
    """Convert a model's folder, or that of an EAGLE-3 head, which has its target's tokenizer.

    Raises:
        ValueError: no converter here, or the file tokenizes otherwise than the model.
        RuntimeError: the converter failed; says its own reason.
    """
    engines = Path(os.environ.get("SPECDEC_ENGINES_DIR", ".engines"))
    default = engines / "llamacpp/source/llama.cpp/convert_hf_to_gguf.py"
    script = Path(os.environ.get("SPECDEC_GGUF_CONVERTER", default)).resolve()
    if not script.is_file():
        fix = "bash scripts/engines.sh llamacpp, or name one by SPECDEC_GGUF_CONVERTER"
        raise ValueError(f"llama.cpp's converter is not at {str(script)!r}; {fix}")
    is_model = target is None or (folder / "tokenizer_config.json").exists()
    tokenizer = (folder if target is None or is_model else target) / "tokenizer.json"
    given = read_json(tokenizer).get("pre_tokenizer") or {}
    parts = tuple(each.get("type") for each in given.get("pretokenizers", [given]))
    command = [sys.executable, "-c", _CONVERT, str(script), _NAMES.get(parts, ""), str(folder)]
    command += ["--outfile", str(out_file), "--outtype", OUT_TYPES[dtype]]
    command += [] if is_model else ["--target-model-dir", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not out_file.exists():
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(f"{script.name} failed on {str(folder)!r}: {last}")
    if is_model:
        _compare_tokens(folder, out_file)
    return out_file


def _compare_tokens(folder: Path, file: Path) -> None:
    """Refuse a file that llama.cpp does not tokenize as the folder's tokenizer does."""
    import httpx

    from specdec.engines.launch import start
    from specdec.targets.load import load_tokenizer

    tokenizer: Any = load_tokenizer(str(folder), None, False)
    chance, pieces = random.Random(0), [*_PIECES, *tokenizer.all_special_tokens]
    texts = ["".join(chance.choices(pieces, k=20)) for _ in range(NUM_TEXTS)]
    ours = tokenizer(texts, add_special_tokens=False).input_ids
    command = ["llama-server", "--model", str(file), "--ctx-size", "256"]
    with (
        TemporaryDirectory() as logs,
        start(command, engine="llama.cpp", log=Path(logs) / "log") as url,
        httpx.Client(base_url=url.removesuffix("/v1")) as client,
    ):
        asked = [{"content": text, "add_special": False} for text in texts]
        theirs = [client.post("/tokenize", json=each).json()["tokens"] for each in asked]
    differing = [text for text, a, b in zip(texts, ours, theirs, strict=True) if a != b]
    if differing:
        raise ValueError(
            f"{file.name} tokenizes {len(differing)} of {NUM_TEXTS} texts otherwise than the "
            f"tokenizer of {str(folder)!r}, {differing[0]!r:.80} for one, so it would draft "
            "wrongly; take a newer converter, by SPECDEC_GGUF_CONVERTER"
        )
