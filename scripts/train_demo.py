"""Train the embedded demo pair: a tokenizer, a deep and narrow target, a two-layer draft model.

    python scripts/train_demo.py all --data-dir DATA --out runs/demo
    torchrun --nproc-per-node 2 scripts/train_demo.py target --data-dir DATA --out runs/demo

Stages: `tokenizer`, `target`, `draft` (distilled from the target), `export` (bf16 safetensors and
model cards), or `all`. Then the heads: `answers` writes the text that they are trained on, `specdec
train recipes/embedded/eagle3.yaml --out runs/heads/eagle3` and its like train them, and `heads`
puts them into the package. Each stage writes checkpoints and resumes from them when run again.
Works on a CPU, on a GPU, and on several processes under torchrun.
"""

import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, TextIO

import torch
import torch.nn.functional as F
import typer
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.progress import Progress, track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specdec import SamplingConfig, generate_baseline, load_target
from specdec.checkpoints import read_head, write_head
from specdec.demo import demo_path
from specdec.targets.hf import HFTarget

DataDir = Annotated[Path, typer.Option(help="folder with gsm8k/, sgd/ and taskmaster4/")]
OUT = Path("runs/demo")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|bos|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]
SHARED_SHAPE = {
    "hidden_size": 160,
    "intermediate_size": 448,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
}
SETTINGS = {"block_len": 512, "blocks_per_step": 16, "warmup_steps": 60, "seed": 1}
BLOCK_LEN, BLOCKS_PER_STEP, WARMUP_STEPS, SEED = SETTINGS.values()
MODELS = {
    "target": {"num_layers": 16, "passes": 1.8, "learning_rate": 5e-3},
    "draft": {"num_layers": 2, "passes": 1.2, "learning_rate": 4e-3},
}
HEADS = {
    "medusa": "Medusa heads",
    "eagle": "EAGLE-1 head",
    "eagle3": "EAGLE-3 head",
    "mtp": "MTP layer",
    "dflash": "DSpark block head",
}
# What heads that go on from others had before.
BEFORE = {
    "eagle": (
        " It goes on from a head with a bias of 5200 steps and 6,592,637 tokens, folded into "
        "the weights (`scripts/train_demo.py fold`)."
    ),
    "medusa": (
        " They go on from heads of 2600 steps and 3,298,781 tokens, whose projections were cut to "
        "the 768 tokens that answers use most (`scripts/train_demo.py cut`)."
    ),
}

Turns = list[tuple[str, str]]


def read_jsonl(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines)


def read_conversations(data_dir: Path) -> tuple[list[Turns], dict[str, list[Turns]]]:
    """Training conversations, and held-out ones by domain. Calculator marks of GSM8K stay in."""

    def maths(name: str) -> list[Turns]:
        rows = read_jsonl(data_dir / "gsm8k" / f"{name}.jsonl")
        return [[("user", row["question"]), ("assistant", row["answer"])] for row in rows]

    def dialogues(path: str) -> list[Turns]:
        return [[(r, t) for r, t in row["turns"]] for row in read_jsonl(data_dir / path)]

    coffee = dialogues("taskmaster4/dialogs.jsonl")
    train = maths("train") + dialogues("sgd/train.jsonl")
    train += [turns for i, turns in enumerate(coffee) if i % 10]
    held_out = {"gsm8k": maths("test"), "sgd": dialogues("sgd/dev.jsonl")}
    return train, held_out | {"taskmaster4": coffee[::10]}


def render(turns: Turns, *, plain: bool = False) -> str:
    """One conversation as training text; `plain` drops the roles, as raw prompts have none."""
    if plain:
        return "<|bos|>" + "\n".join(text for _, text in turns) + "<|end|>"
    return "<|bos|>" + "".join(f"<|{role}|>{text}<|end|>" for role, text in turns)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bpe.token_to_id("<|bos|>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def pack(conversations: list[Turns], tokenizer: PreTrainedTokenizerFast, seed: int) -> torch.Tensor:
    """Shuffle, tokenize and cut into blocks [num_blocks, BLOCK_LEN]; one text in ten is plain."""
    order = random.Random(seed)
    shuffled = order.sample(conversations, len(conversations))
    texts = [render(turns, plain=order.random() < 0.1) for turns in shuffled]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    stream = torch.tensor([token for row in ids for token in row])
    return stream[: len(stream) // BLOCK_LEN * BLOCK_LEN].view(-1, BLOCK_LEN)


def build_model(kind: str, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        **SHARED_SHAPE,
        num_hidden_layers=MODELS[kind]["num_layers"],
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def start_from_target(draft: LlamaForCausalLM, target: LlamaForCausalLM) -> None:
    """Give the draft the target's embedding (and tied head), final norm, first and last layers."""
    mine, its = draft.model, target.model
    pairs = [(mine.embed_tokens, its.embed_tokens), (mine.norm, its.norm)]
    pairs += [(layer, its.layers[0 if n == 0 else -1]) for n, layer in enumerate(mine.layers)]
    for module, source in pairs:
        module.load_state_dict(source.state_dict())


def build_optimizers(model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embedding and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers" not in n]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [muon, adamw]


def loss_of(
    model: torch.nn.Module, ids: torch.Tensor, teacher: torch.nn.Module | None = None
) -> torch.Tensor:
    """Cross-entropy to the text, or to a teacher's own distribution: what raises acceptance."""
    logits = model(input_ids=ids).logits
    if teacher is None:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    with torch.no_grad():
        target_probs = teacher(input_ids=ids).logits.softmax(-1)
    return -(target_probs * logits.log_softmax(-1)).sum(-1).mean()


@torch.no_grad()
def validate(
    model: torch.nn.Module, teacher: torch.nn.Module | None, blocks: dict[str, torch.Tensor]
) -> dict[str, dict[str, float]]:
    """By domain of held-out text: loss in nats a token, and the share where both argmax agree."""
    found = {"validation_loss": {k: float(loss_of(model, ids)) for k, ids in blocks.items()}}
    if teacher is not None:
        found["argmax_agreement"] = {}
        for name, ids in blocks.items():
            mine, its = (each(input_ids=ids).logits.argmax(-1) for each in (model, teacher))
            found["argmax_agreement"][name] = float((mine == its).float().mean())
    return found


def fit(kind: str, data_dir: Path, out: Path, passes: float) -> None:
    """Train one model with checkpoints; running it again resumes from the last one."""
    set_seed(SEED)
    recipe = {**MODELS[kind], "passes": passes}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    model, teacher = build_model(kind, tokenizer), None
    if kind == "draft":
        teacher = LlamaForCausalLM.from_pretrained(out / "target", dtype=torch.float32)
        start_from_target(model, teacher)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), step_scheduler_with_optimizer=False
    )
    train, held_out = read_conversations(data_dir)
    blocks = torch.cat([pack(train, tokenizer, number) for number in range(math.ceil(passes))])
    num_steps = int(len(blocks) * passes / math.ceil(passes)) // BLOCKS_PER_STEP
    optimizers = build_optimizers(model, recipe["learning_rate"])

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / WARMUP_STEPS) * max(0.02, 1 - step / num_steps)

    schedulers = [torch.optim.lr_scheduler.LambdaLR(each, rate) for each in optimizers]
    model, *optimizers = accelerator.prepare(model, *optimizers)
    accelerator.register_for_checkpointing(*schedulers)
    if teacher is not None:
        teacher = teacher.to(accelerator.device).eval()
    state_dir = out / f"{kind}-state"
    step, seconds = 0, 0.0
    if (state_dir / "progress.json").exists():
        accelerator.load_state(str(state_dir))
        progress = json.loads((state_dir / "progress.json").read_text())
        step, seconds = progress["step"], progress["seconds"]
    share, is_first = BLOCKS_PER_STEP // accelerator.num_processes, accelerator.is_main_process

    def checkpoint() -> dict:
        accelerator.save_state(str(state_dir))
        progress = {
            "step": step,
            "num_steps": num_steps,
            "seconds": seconds,
            "tokens": step * BLOCKS_PER_STEP * BLOCK_LEN,
            "device": str(accelerator.device),
            "num_processes": accelerator.num_processes,
            "settings": {**recipe, **SETTINGS},
        }
        if is_first:
            accelerator.unwrap_model(model).save_pretrained(out / kind)
            tokenizer.save_pretrained(out / kind)
            (state_dir / "progress.json").write_text(json.dumps(progress, indent=1))
        return progress

    with Progress(disable=not is_first) as bar:
        task = bar.add_task(kind, total=num_steps, completed=step)
        while step < num_steps:
            started = time.monotonic()
            first = step * BLOCKS_PER_STEP + accelerator.process_index * share
            ids = blocks[first : first + share].to(accelerator.device)
            loss = loss_of(model, ids, teacher)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            step += 1
            seconds += time.monotonic() - started
            bar.update(task, completed=step, description=f"{kind} loss {loss.item():.3f}")
            if step % 100 == 0:
                checkpoint()
        summary = checkpoint()
    if is_first:
        samples = {k: pack(v[:300], tokenizer, 0)[:24] for k, v in held_out.items()}
        samples = {k: v.to(accelerator.device) for k, v in samples.items()}
        summary |= validate(accelerator.unwrap_model(model).eval(), teacher, samples)
        (out / kind / "training.json").write_text(json.dumps(summary, indent=1))


@app.command()
def tokenizer(data_dir: DataDir, out: Path = OUT) -> None:
    train, _ = read_conversations(data_dir)
    texts = [text for turns in train for _, text in turns]
    out.mkdir(parents=True, exist_ok=True)
    train_tokenizer(texts, 3072).save_pretrained(out / "tokenizer")


@app.command()
def target(data_dir: DataDir, out: Path = OUT, passes: float = MODELS["target"]["passes"]) -> None:
    fit("target", data_dir, out, passes)


@app.command()
def draft(data_dir: DataDir, out: Path = OUT, passes: float = MODELS["draft"]["passes"]) -> None:
    fit("draft", data_dir, out, passes)


def answer_dialogues(
    dialogues: list[Turns], target: HFTarget, seed: int, batch_size: int
) -> list[dict]:
    """Let the target answer every user turn, each after its own earlier answers.

    Rows hold `tokens` of the whole conversation and `answers`, the [start, end) spans that the
    target wrote, end mark included. Every other dialogue is sampled, the rest is greedy.
    """
    tokenizer = target.tokenizer
    rows: list[dict] = [
        {"tokens": [tokenizer.bos_token_id], "answers": [], "temperature": 0.8 * (i // 3 % 2)}
        for i in range(len(dialogues))
    ]
    # Later turns cost most, because all before is read again: some dialogues stop early.
    questions = [
        [text for role, text in turns if role == "user"][: (3, 5, 8)[i % 3]]
        for i, turns in enumerate(dialogues)
    ]
    for turn in range(max(map(len, questions))):
        asked = []
        for row, texts in zip(rows, questions, strict=True):
            if turn >= len(texts) or (turn and row["tokens"][-1] not in target.eos_token_ids):
                continue
            text = f"<|user|>{texts[turn]}<|end|><|assistant|>"
            prompt = row["tokens"] + tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(prompt) < BLOCK_LEN - 16:
                row["tokens"] = prompt
                asked.append(row)
        if not asked:
            break
        sampling = [
            SamplingConfig(temperature=row["temperature"], seed=seed + 1000 * turn + i)
            for i, row in enumerate(asked)
        ]
        prompts = [row["tokens"] for row in asked]
        results = generate_baseline(
            target, prompts, sampling, max_new_tokens=160, batch_size=batch_size
        )
        for row, result in zip(asked, results, strict=True):
            start = len(row["tokens"])
            row["tokens"] = row["tokens"] + result.tokens
            row["answers"].append([start, len(row["tokens"])])
    return rows


@app.command()
def answers(
    data_dir: DataDir,
    out: Path = OUT,
    num: Annotated[int, typer.Option(help="dialogues to answer; 0 for all")] = 0,
    batch_size: int = 64,
) -> None:
    """Let the target answer the training questions: what its draft heads are trained on."""
    target = load_target("demo")
    dialogues, _ = read_conversations(data_dir)
    dialogues = random.Random(SEED).sample(dialogues, len(dialogues))[: num or None]
    path, chunk_size = out / "answers.jsonl", 256
    out.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    done = len(lines) // chunk_size * chunk_size  # a killed run may have cut a chunk short
    path.write_text("".join(lines[:done]))
    for first in track(range(done, len(dialogues), chunk_size), "answering"):
        chunk = dialogues[first : first + chunk_size]
        with path.open("a") as file:
            write_rows(file, answer_dialogues(chunk, target, first, batch_size))


@app.command()
def sample(path: Path = Path("recipes/demo/sample.jsonl")) -> None:
    """Let the target answer the package's own prompts: rows to try the recipes on at once."""
    prompts = read_jsonl(demo_path("prompts.jsonl"))
    dialogues = [[("user", prompt["messages"][0]["content"])] for prompt in prompts]
    with path.open("w") as file:
        write_rows(file, answer_dialogues(dialogues, load_target("demo"), 0, 40))


def write_rows(file: TextIO, rows: list[dict]) -> None:
    file.writelines(json.dumps(row) + "\n" for row in rows)


DATA_CREDITS = """| data | licence | source |
| --- | --- | --- |
| GSM8K, train | MIT | OpenAI, grade-school-math |
| Schema-Guided Dialogue, train | CC BY-SA 4.0 | Google Research, dstc8-schema-guided-dialogue |
| Taskmaster-4, nine records of ten | CC BY 4.0 | Google Research, Taskmaster |"""


def card(kind: str, about: str, facts: dict, tables: dict[str, tuple[str, str, dict]]) -> str:
    """What a model is, how it was trained, what was measured, and whose data it saw."""
    parts = [
        f"---\nlicense: cc-by-sa-4.0\nlanguage: en\n---\n# specdec demo {kind}",
        about,
        f"Tokens seen: {facts['tokens']:,}. Steps: {facts['steps']}. Seconds: "
        f"{facts['seconds']:.0f} on {facts['device']} with {facts['num_processes']} "
        f"process{'es' * (facts['num_processes'] > 1)}. Trained in float32, stored in bfloat16.",
    ]
    for title, (name, figure, values) in tables.items():
        rows = [f"| {k} | {v:.3f} |" for k, v in values.items() if v is not None]
        parts += [title, "\n".join([f"| {name} | {figure} |", "| --- | --- |", *rows])]
    end = "The weights are shared under CC BY-SA 4.0, the strictest of these."
    return "\n\n".join([*parts, "## Data and licences", DATA_CREDITS, end]) + "\n"


def model_card(kind: str, summary: dict) -> str:
    agreed = summary.get("argmax_agreement")
    trained = "distilled from the demo target" if agreed else "trained"
    about = (
        f"A Llama of {MODELS[kind]['num_layers']} layers and width {SHARED_SHAPE['hidden_size']}, "
        f"{trained} by `scripts/train_demo.py` for tests and demonstrations of speculative "
        "decoding. It writes fluent sentences of three narrow domains and knows nothing."
    )
    tables = {"Held-out loss, nats a token:": ("domain", "loss", summary["validation_loss"])}
    if agreed:
        tables["Argmax equal to the target's on held-out text:"] = ("domain", "share", agreed)
    return card(kind, about, {**summary, "steps": summary["step"]}, tables)


def head_card(kind: str, results: dict) -> str:
    about = (
        f"{HEADS[kind]} for the demo target, trained by `specdec train "
        f"recipes/embedded/{kind}.yaml` on the target's own answers to the training questions "
        "(`scripts/train_demo.py answers`)."
    )
    title = (
        f"Offline acceptance on {results['validation_rows']} held-out dialogues: tau "
        f"{results['offline_tau']:.2f}, by depth, given that the depth above was accepted:"
    )
    depths = dict(enumerate(results["offline_acceptance"], 1))
    if results["provenance"]["config"].get("drafter", {}).get("init"):
        about += BEFORE[kind]
    facts = {**results, "device": results["provenance"]["device"]}
    return card(kind, about, facts, {title: ("depth", "accepted", depths)})


@app.command()
def export(out: Path = OUT, package: Path = Path("specdec/demo")) -> None:
    """Write bf16 safetensors, tokenizer and model card of both models into the package."""
    for kind in MODELS:
        model = LlamaForCausalLM.from_pretrained(out / kind, dtype=torch.bfloat16)
        model.save_pretrained(package / kind)
        tok = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
        tok.save_pretrained(package / kind)
        describe(package / kind, json.loads((out / kind / "training.json").read_text()), model_card)


@app.command()
def fold(
    answers: Path = Path("runs/heads/answers.jsonl"), out: Path = Path("runs/heads/eagle-init")
) -> None:
    """Fold the bias of the packaged EAGLE-1 head into its weights; vLLM reads no bias.

    What comes nearest to 1 of all linear functions of a token and a feature stands for the bias.
    """
    target, head = load_target("demo", dtype="float32"), read_head(demo_path("eagle"))
    size = target.model.config.hidden_size * 2
    products, sums = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size).double()
    for row in islice(read_jsonl(answers), 160):
        tokens = torch.tensor([row["tokens"][:BLOCK_LEN]])
        with torch.no_grad():
            features = target.model(tokens, output_hidden_states=True).hidden_states[-1][0]
            embedded = target.model.get_input_embeddings()(tokens)[0]
        fused = torch.cat([embedded[1:], features[:-1]], -1).double()
        products += fused.T @ fused
        sums += fused.sum(0)
    tensors = {name: tensor.float() for name, tensor in head.tensors.items()}
    bias = tensors.pop("fc.bias").double()
    tensors["fc.weight"] += torch.outer(bias, torch.linalg.solve(products, sums)).float()
    write_head(replace(head, tensors=tensors, options={**head.options, "bias": False}), out)


@app.command()
def cut(
    answers: Path = Path("runs/heads/answers.jsonl"),
    out: Path = Path("runs/heads/medusa-init"),
    num_tokens: int = 768,
) -> None:
    """Keep the projections of the packaged Medusa heads to the tokens that answers use most."""
    head, counts = read_head(demo_path("medusa")), Counter[int]()
    for row in read_jsonl(answers):
        for start, end in row["answers"]:
            counts.update(row["tokens"][start:end])
    kept = torch.tensor(sorted(token for token, _ in counts.most_common(num_tokens)))
    tensors = {
        name: tensor.float()[kept] if name.startswith("vocab_heads.") else tensor.float()
        for name, tensor in head.tensors.items()
    }
    options = {**head.options, "draft_vocab_size": len(kept)}
    write_head(replace(head, tensors={**tensors, "draft_ids": kept}, options=options), out)


@app.command()
def heads(runs: Path = Path("runs/heads"), package: Path = Path("specdec/demo")) -> None:
    """Write the trained heads into the package, in bf16 and with their model cards."""
    for kind in HEADS:
        if not (runs / kind).exists():
            continue
        head = read_head(runs / kind / "drafter")
        tensors = {k: t.bfloat16() if t.is_floating_point() else t for k, t in head.tensors.items()}
        write_head(replace(head, tensors=tensors), package / kind)
        describe(package / kind, json.loads((runs / kind / "results.json").read_text()), head_card)


def describe(folder: Path, facts: dict, write_card: Callable[[str, dict], str]) -> None:
    (folder / "README.md").write_text(write_card(folder.name, facts))
    (folder / "training.json").write_text(json.dumps(facts, indent=1))


@app.command(name="all")
def everything(data_dir: DataDir, out: Path = OUT) -> None:
    """All stages, one after the other."""
    tokenizer(data_dir, out)
    target(data_dir, out)
    draft(data_dir, out)
    export(out)


if __name__ == "__main__":
    app()
