"""One arm of another package, run by the Python of .engines/peers, for measure.py to ask.

python peers.py "flashspec compiled" TARGET DRAFT 512

It first writes a line that says what it is. Then each line that it reads is a call, {"prompts":
[ids, ...], "max_new_tokens": n}, and each line that it writes the answer: the tokens of each
prompt, how many of them came with the first, the seconds from then on, and those of the whole call.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig

NUM_DRAFT_TOKENS, THREADS = 4, 2
Prompts = list[list[int]]
Decode = Callable[[Prompts, int], dict[str, Any]]


class Arms:
    """The arms, each by its name; a capacity is the longest prompt with its answer, in tokens."""

    def __init__(self, target: str, draft: str, capacity: int) -> None:
        self.paths, self.capacity = (target, draft), capacity
        self.target, self.draft = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            for path in self.paths
        )
        eos = self.target.generation_config.eos_token_id
        self.eos: list[int] = eos if isinstance(eos, list) else [eos]

    def arm(self, name: str) -> Decode:
        package, _, mode = name.partition(" ")
        return getattr(self, package)(mode)

    def flashspec(self, mode: str) -> Decode:
        """Draft with its drafter for models; its compiled path is for CUDA, so we ask for it."""
        from flashspec import BanditConfig, FlashSpecConfig, SamplingConfig, SpeculativeEngine
        from flashspec.engine import HuggingFaceDrafter, TargetModel
        from flashspec.engine.speculative import DRAFTER_PAD_WIDTHS

        place = torch.device("cpu")
        target = TargetModel(self.paths[0], place, torch.float32, model=self.target)
        drafter = HuggingFaceDrafter(self.paths[1], place, torch.float32, model=self.draft)
        is_composite = mode.startswith("composite")
        strategy = {"drafter_strategy": "auto"}
        if not is_composite:
            strategy = {"drafter_strategy": "bandit", "bandit": BanditConfig(n_arms=1)}
        config = FlashSpecConfig(
            device="cpu",
            dtype="float32",
            compile=False,
            eos_token_ids=tuple(self.eos),
            sampling=SamplingConfig(gamma=NUM_DRAFT_TOKENS, temperature=0.0),
            **strategy,
        )
        engine = SpeculativeEngine(config, [drafter], target)
        if mode.endswith(("static", "compiled")):
            is_compiled = mode.endswith("compiled")
            verified = 7 if is_composite else NUM_DRAFT_TOKENS + 1  # as its engine has it on CUDA
            room = self.capacity + max(DRAFTER_PAD_WIDTHS)
            target.use_static_cache(room, compile_forward=is_compiled, pad_widths=(verified,))
            drafter.use_static_cache(
                room, compile_forward=is_compiled, pad_widths=DRAFTER_PAD_WIDTHS
            )

        def decode(prompts: Prompts, max_new_tokens: int) -> dict[str, Any]:
            started = time.perf_counter()
            result = engine.generate(torch.tensor(prompts), max_new_tokens)
            wall_s = time.perf_counter() - started
            for owner in (target, drafter):
                if reason := getattr(owner._inc, "compile_fallback_reason", None):
                    raise RuntimeError(f"flashspec did not compile: {reason}")
            # The first step holds the prefill; its tokens are not counted either.
            first, *later = result.arm_steps
            return {
                "tokens": [[token for token in result.output_ids[0].tolist() if token >= 0]],
                "num_first": [first.emitted],
                "decode_s": sum(step.seconds for step in later),
                "wall_s": wall_s,
            }

        return decode

    def economize(self, mode: str) -> Decode:
        """Draft with its technique for draft models; its graphs are for CUDA."""
        import economize
        from economize.decoding import GreedySelector
        from economize.techniques.draft_model import DraftModelConfig

        model = economize.apply(self.target, DraftModelConfig(model=self.paths[1]))
        decoding = economize.DecodeConfig(cycle_length=NUM_DRAFT_TOKENS + 1)

        class Stamped(GreedySelector):
            """Notes when it is first asked, which is when the prompts have been read."""

            first_s = 0.0

            def select_many(self, logits: torch.Tensor) -> torch.Tensor:
                self.first_s = self.first_s or time.perf_counter()
                return super().select_many(logits)

        def decode(prompts: Prompts, max_new_tokens: int) -> dict[str, Any]:
            selector, started = Stamped(), time.perf_counter()
            rows = model.decode_batch(
                [torch.tensor(prompt) for prompt in prompts],
                max_new_tokens,
                decoding=decoding,
                selector=selector,
                stop=self.eos,
            )
            ended = time.perf_counter()
            return {
                "tokens": [[int(token) for token in row.tokens] for row in rows],
                "num_first": [1] * len(rows),
                "decode_s": ended - selector.first_s,
                "wall_s": ended - started,
            }

        return decode

    def transformers(self, mode: str) -> Decode:
        """Decode with `generate`: "dynamic", "static" (compiled) or "assisted"."""
        options: dict[str, Any] = {}
        if mode == "static":
            compiling = CompileConfig()
            compiling._compile_all_devices = True  # not on accelerators alone
            options = {"cache_implementation": "static", "compile_config": compiling}
        if mode == "assisted":
            self.draft.generation_config.update(
                num_assistant_tokens=NUM_DRAFT_TOKENS,
                num_assistant_tokens_schedule="constant",
                assistant_confidence_threshold=0.0,
            )
            options = {"assistant_model": self.draft}
        self.target.generation_config = GenerationConfig(eos_token_id=self.eos)

        def decode(prompts: Prompts, max_new_tokens: int) -> dict[str, Any]:
            (prompt,) = prompts
            reached: list[tuple[int, float]] = []  # new tokens, and when

            def stamp(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                """Stop nothing."""
                reached.append((ids.shape[1] - len(prompt), time.perf_counter()))
                return torch.zeros(len(ids), dtype=torch.bool)

            ids, started = torch.tensor([prompt]), time.perf_counter()
            output = self.target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                pad_token_id=self.eos[0],
                do_sample=False,
                stopping_criteria=[stamp],
                **options,
            )
            ended = time.perf_counter()
            return {
                "tokens": output[:, len(prompt) :].tolist(),
                "num_first": [reached[0][0]],
                "decode_s": reached[-1][1] - reached[0][1],
                "wall_s": ended - started,
            }

        return decode


def main() -> None:
    name, target, draft, capacity = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a package prints is no answer
    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    decode = Arms(target, draft, int(capacity)).arm(name)
    package = name.split()[0]
    about = {"package": package, "version": version(package), "torch": torch.__version__}
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        call = json.loads(line)
        print(json.dumps(decode(call["prompts"], call["max_new_tokens"])), file=answers, flush=True)


if __name__ == "__main__":
    main()
