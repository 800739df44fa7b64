"""GGUF files by llama.cpp's own converter, with a tokenizer that was compared.

The converter is never a part of specdec: `scripts/engines.sh llamacpp` fetches it. It knows
pre-tokenizers by the hash of a text, refuses a hash that it does not know, and says "successfully
exported" where it took the wrong one. So a name is found here, and texts are compared.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from specdec.common.files import read_json

OUT_TYPES = {"auto": "auto", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}
NUM_TEXTS = 300
# Runs the converter in this process, with a name for a tokenizer that it does not know.
_CONVERT = """
import runpy, sys
script, pre = sys.argv[1:3]
sys.argv = [script, *sys.argv[3:]]
sys.path[:0] = [script.rpartition("/")[0], script.rpartition("/")[0] + "/gguf-py"]
from conversion.base import TextModel
known, pieces = TextModel.get_vocab_base_pre, TextModel._create_vocab_sentencepiece
def named(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        if not pre:
            raise
        return pre
def needed(self):  # sentencepiece is imported there before it is known whether it is needed
    if not (self.dir_model / "tokenizer.model").is_file():
        raise FileNotFoundError("tokenizer.model")
    return pieces(self)
TextModel.get_vocab_base_pre, TextModel._create_vocab_sentencepiece = named, needed
runpy.run_path(script, run_name="__main__")
"""
# Runs in llama.cpp's environment: texts on standard input, lists of ids on standard output.
_TOKENIZE = """
import json, sys, urllib.request
from xllamacpp import CommonParams, Server
params = CommonParams()
params.model.path, params.n_ctx, params.warmup, params.n_parallel = sys.argv[1], 256, False, 1
params.verbosity = -1
server = Server(params)
for text in json.load(sys.stdin):
    body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
    asked = urllib.request.Request(server.listening_address + "/tokenize", body)
    print(json.load(urllib.request.urlopen(asked))["tokens"])
"""
_PIECES = (
    *("the", " answer", "Überraschung", " naïve", "don't", "WE'LL", "x=1;", "if(a>b){", "3333"),
    *(" 12.5", "1,000", "\n", "\n\n", "\t", "   ", " ", "...", "?!", "我想", "привет", "🚀", "é"),
)


def engine_folder(name: str) -> Path:
    """The environment of an engine, which `scripts/engines.sh` makes."""
    folder = Path(os.environ.get("SPECDEC_ENGINES_DIR", ".engines")).resolve() / name
    if not (folder / "bin" / "python").exists():
        raise ValueError(f"{str(folder)!r} has no {name}; make it: bash scripts/engines.sh {name}")
    return folder


def to_gguf(folder: Path, out_file: Path, target: Path | None = None, dtype: str = "auto") -> Path:
    """Convert a model's folder, or an EAGLE-3 head's, which is given the folder of its target.

    Raises:
        ValueError: no converter here, or the file tokenizes otherwise than the folder.
        RuntimeError: the converter failed.
    """
    engine = engine_folder("llamacpp")
    given = os.environ.get("SPECDEC_GGUF_CONVERTER")
    script = Path(given or engine / "source/llama.cpp/convert_hf_to_gguf.py")
    if not script.is_file():
        raise ValueError(f"{str(script)!r} is no converter; bash scripts/engines.sh llamacpp")
    if dtype not in OUT_TYPES:
        raise ValueError(f"dtype is {dtype!r} but must be one of {', '.join(OUT_TYPES)}")
    models = target or folder
    command = [sys.executable, "-c", _CONVERT, str(script), _pre_tokenizer(models), str(folder)]
    command += ["--outfile", str(out_file), "--outtype", OUT_TYPES[dtype]]
    command += ["--target-model-dir", str(target)] if target else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not out_file.exists():
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(f"{script.name} failed on {str(folder)!r}: {last}")
    if target is None:
        _compare_tokens(folder, out_file, engine / "bin" / "python")
    return out_file


def _pre_tokenizer(folder: Path) -> str:
    """llama.cpp's name of byte-level BPE by what stands before it; empty for what is not known."""
    found = read_json(folder / "tokenizer.json").get("pre_tokenizer") or {}
    parts = [each["type"] for each in found.get("pretokenizers", [found]) if "type" in each]
    return {("Digits", "ByteLevel"): "smollm", ("ByteLevel",): "gpt-2"}.get(tuple(parts), "")


def _compare_tokens(folder: Path, file: Path, python: Path) -> None:
    """Refuse a file that does not tokenize as the folder's tokenizer does."""
    from specdec.targets.load import load_tokenizer

    tokenizer: Any = load_tokenizer(str(folder), None, False)
    chance, pieces = random.Random(0), [*_PIECES, *tokenizer.all_special_tokens]
    texts = ["".join(chance.choices(pieces, k=20)) for _ in range(NUM_TEXTS)]
    command = [str(python), "-c", _TOKENIZE, str(file)]
    done = subprocess.run(
        command, input=json.dumps(texts), capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(f"llama.cpp could not load {file.name}: {last}")
    theirs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    ours = tokenizer(texts, add_special_tokens=False).input_ids
    differing = [text for text, a, b in zip(texts, ours, theirs, strict=True) if a != b]
    if differing:
        raise ValueError(
            f"{file.name} tokenizes {len(differing)} of {NUM_TEXTS} texts otherwise than the "
            f"tokenizer of {str(folder)!r}, {differing[0]!r:.80} for one, so its drafts would be "
            "wrong; take a newer converter, by SPECDEC_GGUF_CONVERTER"
        )
