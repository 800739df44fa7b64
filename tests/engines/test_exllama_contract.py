"""The real exllama packages have what adapters and fakes use; and, on a GPU, they work."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from specdec import Draft, generate, load_target
from specdec.demo import demo_path

ROOT = Path(__file__).parents[2]
SITE = Path(os.environ.get("SPECDEC_ENGINES_DIR", ROOT / ".engines")) / "exllama" / "site"
ENGINES = ("exllamav2", "exllamav3")
PROMPTS = [[5, 6, 7, 8], [9] * 300, [11, 12]]


@pytest.mark.slow
@pytest.mark.exllama
@pytest.mark.parametrize("engine", ENGINES)
def test_adapter_fits_the_real_package(engine):
    if not (SITE / engine).is_dir():
        pytest.skip(f"no {SITE / engine}: bash scripts/engines.sh exllama")
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("exllama_contract.py"), SITE, engine],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.exllama
@pytest.mark.parametrize("engine", ENGINES)
def test_engine_on_a_gpu_follows_hugging_face(engine):
    if find_spec(engine) is None:
        pytest.skip(f"{engine} is not installed")
    ours = load_target(str(demo_path("target")), engine=engine)
    theirs = load_target("demo", dtype="float32", device="cuda")
    outputs = []
    for target in (ours, theirs):
        target.prefill(PROMPTS[:2])
        target.prefill(PROMPTS[2:], join=True)
        root = torch.tensor([3, 4, 5], device=target.device)
        draft = Draft.chain(torch.tensor([[6, 7], [8, 9], [10, 11]], device=target.device))
        outputs.append(target.score(root, draft, (0, 8, 16)))
    pairs = [(outputs[0].logits, outputs[1].logits)]
    pairs += [(outputs[0].hidden[tap], states) for tap, states in outputs[1].hidden.items()]
    for own, other in pairs:
        own, other = own.float().to(other.device), other.float()
        assert (own - other).square().mean().sqrt() < 0.05 * other.std()
    drafted = generate(ours, {"type": "draft_model", "path": "demo"}, PROMPTS, max_new_tokens=64)
    plain = generate(ours, None, PROMPTS, max_new_tokens=64)
    # Forwards of another width round otherwise, so that a tie of float16 may end the agreement.
    same = [a.tokens[:16] == b.tokens[:16] for a, b in zip(drafted, plain, strict=True)]
    assert sum(same) >= 2
    assert sum(result.stats.num_accepted for result in drafted) > 0
