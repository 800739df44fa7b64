"""Tokens a second of EAGLE-3's training loop, and the share of it that the target takes.

    python experiments/03-domain/throughput.py --out experiments/03-domain/throughput.json

The same steps are timed with the target beside the head and from a feature store, and the bytes a
token of several stores are listed.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator

from specdec.train.checkpoint import RunFolder
from specdec.train.config import load_train_config
from specdec.train.data import load_materials, padded
from specdec.train.run import make_trainee
from specdec.train.trainer import Trainer

HERE = Path(__file__).parent
WARM_UP, STEPS = 5, 40


class Timed:
    """A source that adds up the time it takes."""

    def __init__(self, source: Any) -> None:
        self.source, self.seconds = source, 0.0

    def batch(self, rows: Any, lay: Any = padded) -> Any:
        started = time.perf_counter()
        batch = self.source.batch(rows, lay)
        self.seconds += time.perf_counter() - started
        return batch


def measure(data: Path, threads: int) -> dict[str, Any]:
    overrides = [f"data.path={data}", f"max_steps={WARM_UP + STEPS}", f"threads={threads}"]
    config = load_train_config(str(HERE / "generic-eagle3.yaml"), overrides)
    config.save_every = config.eval_every = 0
    config.data.num_validation = None
    torch.set_num_threads(threads)
    materials = load_materials(config, torch.device("cpu"))
    materials.split.validation.clear()
    trainee, _ = make_trainee(config, materials.target, materials.identity, materials.split)
    source = Timed(materials.source(trainee))
    times: list[tuple[float, float, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder), {})
        run.prepare()
        trainer = Trainer(config, trainee, source, materials.split, run, Accelerator(cpu=True))

        def note(done: int, total: int, text: str) -> None:
            times.append((time.perf_counter(), source.seconds, trainer.progress.tokens))

        trainer.run(note)
    # The last step writes a checkpoint before it is told of, and is left out.
    first, last = times[WARM_UP - 1], times[-2]
    seconds, in_source, tokens = (last[i] - first[i] for i in range(3))
    return {
        "tokens_per_s": tokens / seconds,
        "share_of_source": in_source / seconds,
        "steps": STEPS - 1,
        "threads": threads,
        "where": materials.where,
    }


def main(
    out: Annotated[Path, typer.Option()],
    answers: Path = Path("runs/domain/a-gsm8k-2000"),
    store: Path = Path("runs/domain/f-gsm8k-2000"),
    threads: int = 2,
) -> None:
    results = {"online": measure(answers, threads), "stored": measure(store, threads)}
    out.write_text(json.dumps(results, indent=1) + "\n")
    for name, each in results.items():
        print(name, f"{each['tokens_per_s']:.0f} tokens/s, source {each['share_of_source']:.3f}")


if __name__ == "__main__":
    typer.run(main)
