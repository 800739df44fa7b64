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

from specdec.train.config import load_train_config
from specdec.train.data import load_materials
from specdec.train.run import make_trainee
from specdec.train.trainer import Trainer, training_arguments

HERE = Path(__file__).parent
WARM_UP, STEPS = 5, 40


class Timed:
    """A source that adds up the time it takes."""

    def __init__(self, source: Any) -> None:
        self.source, self.seconds = source, 0.0

    def batch(self, rows: Any, pack_len: int | None = None) -> Any:
        started = time.perf_counter()
        batch = self.source.batch(rows, pack_len)
        self.seconds += time.perf_counter() - started
        return batch


def measure(data: Path, threads: int) -> dict[str, Any]:
    overrides = [f"data.path={data}", f"training.max_steps={WARM_UP + STEPS}"]
    overrides += [f"threads={threads}", "training.save_strategy='no'", "data.num_validation=null"]
    config = load_train_config(str(HERE / "generic-eagle3.yaml"), overrides)
    torch.set_num_threads(threads)
    times: list[tuple[float, float, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(config, Path(folder))
        materials = load_materials(config, arguments.device)
        materials.split.validation.clear()
        trainee, _ = make_trainee(config, materials)
        source = Timed(materials.source(trainee.taps, trainee.dtype))

        def note(done: int, total: int, text: str) -> None:
            tokens = sum(len(row.tokens) for row in trainer.plan.rows(done - 1))
            times.append((time.perf_counter(), source.seconds, tokens))

        trainer = Trainer(config, trainee, source, materials.split, arguments, {}, note)
        trainer.run()
    first, last = times[WARM_UP - 1], times[-1]
    seconds, in_source = (last[i] - first[i] for i in range(2))
    tokens = sum(each[2] for each in times[WARM_UP:])
    return {
        "tokens_per_s": tokens / seconds,
        "share_of_source": in_source / seconds,
        "steps": STEPS,
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
