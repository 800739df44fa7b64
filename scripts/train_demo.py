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
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specdec import SamplingConfig, generate_baseline, load_target
from specdec.checkpoints import read_head, write_head
from specdec.demo import demo_path
from specdec.targets.hf import HFTarget

DataDir = Annotated[Path, typer.Option(help="folder with gsm8k/, sgd/ and taskmaster4/")]
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
NUM_LAYERS = {"target": 16, "draft": 2}


@dataclass
class Settings:
    """What a run needs to be repeated; written beside its checkpoints."""

    vocab_size: int = 3072
    block_len: int = 512
    blocks_per_step: int = 16
    passes: dict[str, float] = field(default_factory=lambda: {"target": 1.8, "draft": 1.2})
    learning_rate: float = 5e-3
    warmup_steps: int = 60
    seed: int = 1


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


def pack(
    conversations: list[Turns], tokenizer: PreTrainedTokenizerFast, block_len: int, seed: int
) -> torch.Tensor:
    """Shuffle, tokenize and cut into blocks [num_blocks, block_len]; one text in ten is plain."""
    order = random.Random(seed)
    shuffled = order.sample(conversations, len(conversations))
    texts = [render(turns, plain=order.random() < 0.1) for turns in shuffled]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    stream = torch.tensor([token for row in ids for token in row])
    return stream[: len(stream) // block_len * block_len].view(-1, block_len)


def build_model(kind: str, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        **SHARED_SHAPE,
        num_hidden_layers=NUM_LAYERS[kind],
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def start_from_target(draft: LlamaForCausalLM, target: LlamaForCausalLM) -> None:
    """Give the draft the target's embedding (and tied head), final norm, first and last layers."""
    draft.model.embed_tokens.load_state_dict(target.model.embed_tokens.state_dict())
    draft.model.norm.load_state_dict(target.model.norm.state_dict())
    for index, layer in enumerate(draft.model.layers):
        source = target.model.layers[0 if index == 0 else -1]
        layer.load_state_dict(source.state_dict())


def build_optimizers(model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embedding and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers" not in n]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [muon, adamw]


def language_model_loss(model: torch.nn.Module, ids: torch.Tensor, _: None) -> torch.Tensor:
    logits = model(input_ids=ids).logits[:, :-1]  # [B, L-1, V]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def distillation_loss(
    model: torch.nn.Module, ids: torch.Tensor, teacher: torch.nn.Module
) -> torch.Tensor:
    """Cross-entropy to the target's own distribution: what raises acceptance, token by token."""
    with torch.no_grad():
        target_probs = teacher(input_ids=ids).logits.softmax(-1)
    log_probs = model(input_ids=ids).logits.log_softmax(-1)
    return -(target_probs * log_probs).sum(-1).mean()


@torch.no_grad()
def validate(model: torch.nn.Module, blocks: dict[str, torch.Tensor]) -> dict[str, float]:
    """Mean cross-entropy in nats a token on held-out text, by domain."""
    return {k: float(language_model_loss(model, ids, None)) for k, ids in blocks.items()}


@torch.no_grad()
def agreement(
    draft: torch.nn.Module, target: torch.nn.Module, blocks: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Share of held-out positions where both argmax agree, by domain."""
    same = {}
    for name, ids in blocks.items():
        pair = [model(input_ids=ids).logits.argmax(-1) for model in (draft, target)]
        same[name] = float((pair[0] == pair[1]).float().mean())
    return same


def fit(
    kind: str,
    model: LlamaForCausalLM,
    teacher: LlamaForCausalLM | None,
    out: Path,
    data_dir: Path,
    settings: Settings,
) -> None:
    """Train one model with checkpoints; running it again resumes from the last one."""
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), step_scheduler_with_optimizer=False
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    train, held_out = read_conversations(data_dir)
    passes = settings.passes[kind]
    blocks = torch.cat(
        [pack(train, tokenizer, settings.block_len, p) for p in range(math.ceil(passes))]
    )
    num_steps = int(len(blocks) * passes / math.ceil(passes)) // settings.blocks_per_step
    optimizers = build_optimizers(model, settings.learning_rate)

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / settings.warmup_steps)
        return warm * max(0.02, 1 - step / num_steps)

    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, rate) for o in optimizers]
    model, *optimizers = accelerator.prepare(model, *optimizers)
    for scheduler in schedulers:
        accelerator.register_for_checkpointing(scheduler)
    state_dir, log_path = out / f"{kind}-state", out / f"{kind}-log.jsonl"
    step, seconds = 0, 0.0
    if (state_dir / "progress.json").exists():
        accelerator.load_state(str(state_dir))
        progress = json.loads((state_dir / "progress.json").read_text())
        step, seconds = progress["step"], progress["seconds"]
    loss_of = language_model_loss if teacher is None else distillation_loss
    if teacher is not None:
        teacher = teacher.to(accelerator.device).eval()
    share = settings.blocks_per_step // accelerator.num_processes

    def checkpoint() -> None:
        accelerator.save_state(str(state_dir))
        if accelerator.is_main_process:
            plain = accelerator.unwrap_model(model)
            plain.save_pretrained(out / kind)
            tokenizer.save_pretrained(out / kind)
            progress = {"step": step, "num_steps": num_steps, "seconds": seconds}
            progress["tokens"] = step * settings.blocks_per_step * settings.block_len
            progress["device"] = str(accelerator.device)
            progress["num_processes"] = accelerator.num_processes
            progress["settings"] = asdict(settings)
            (state_dir / "progress.json").write_text(json.dumps(progress, indent=1))

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not accelerator.is_main_process) as bar:
        task = bar.add_task(kind, total=num_steps, completed=step)
        last_saved = time.monotonic()
        while step < num_steps:
            started = time.monotonic()
            first = step * settings.blocks_per_step + accelerator.process_index * share
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
            if accelerator.is_main_process and step % 10 == 0:
                with log_path.open("a") as log:
                    row = {"step": step, "loss": loss.item(), "seconds": seconds}
                    log.write(json.dumps(row) + "\n")
            # The clock of process 0 decides, so that all processes save at the same step.
            late = torch.tensor(float(time.monotonic() - last_saved > 300))
            if accelerator.reduce(late.to(accelerator.device)).item() > 0:
                checkpoint()
                last_saved = time.monotonic()
        checkpoint()
    if accelerator.is_main_process:
        final = accelerator.unwrap_model(model).eval()
        samples = {k: pack(v[:300], tokenizer, 512, 0)[:24] for k, v in held_out.items()}
        samples = {k: v.to(accelerator.device) for k, v in samples.items()}
        summary = json.loads((state_dir / "progress.json").read_text())
        summary["validation_loss"] = validate(final, samples)
        if teacher is not None:
            summary["argmax_agreement"] = agreement(final, teacher, samples)
        (out / kind / "training.json").write_text(json.dumps(summary, indent=1))


@app.command()
def tokenizer(data_dir: DataDir, out: Path = Path("runs/demo")) -> None:
    train, _ = read_conversations(data_dir)
    texts = [text for turns in train for _, text in turns]
    out.mkdir(parents=True, exist_ok=True)
    train_tokenizer(texts, Settings().vocab_size).save_pretrained(out / "tokenizer")


@app.command()
def target(
    data_dir: DataDir,
    out: Path = Path("runs/demo"),
    passes: float = 1.8,
) -> None:
    settings = Settings()
    settings.passes["target"] = passes
    set_seed(settings.seed)
    tok = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    fit("target", build_model("target", tok), None, out, data_dir, settings)


@app.command()
def draft(
    data_dir: DataDir,
    out: Path = Path("runs/demo"),
    passes: float = 1.2,
) -> None:
    settings = Settings(learning_rate=4e-3)
    settings.passes["draft"] = passes
    set_seed(settings.seed)
    tok = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    teacher = LlamaForCausalLM.from_pretrained(out / "target", dtype=torch.float32)
    model = build_model("draft", tok)
    start_from_target(model, teacher)
    fit("draft", model, teacher, out, data_dir, settings)


def encode_turn(role: str, text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return tokenizer(f"<|{role}|>{text}<|end|>", add_special_tokens=False)["input_ids"]


def answer_dialogues(
    dialogues: list[Turns], target: HFTarget, seed: int, batch_size: int, max_len: int
) -> list[dict]:
    """Let the target answer every user turn, each after its own earlier answers.

    Rows hold `tokens` of the whole conversation and `answers`, the [start, end) spans that the
    target wrote, end mark included. Every other dialogue is sampled, the rest is greedy.
    """
    tokenizer = target.tokenizer
    opening = tokenizer.convert_tokens_to_ids(["<|assistant|>"])
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
            prompt = row["tokens"] + encode_turn("user", texts[turn], tokenizer) + opening
            if len(prompt) < max_len - 16:
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
    out: Path = Path("runs/demo"),
    num: Annotated[int, typer.Option(help="dialogues to answer; 0 for all")] = 0,
    batch_size: int = 64,
) -> None:
    """Let the target answer the training questions: what its draft heads are trained on."""
    target = load_target("demo")
    dialogues, _ = read_conversations(data_dir)
    dialogues = random.Random(Settings().seed).sample(dialogues, len(dialogues))
    dialogues = dialogues[: num or None]
    path, chunk_size = out / "answers.jsonl", 256
    out.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    done = len(lines) // chunk_size * chunk_size  # a killed run may have cut a chunk short
    path.write_text("".join(lines[:done]))
    with path.open("a") as file, Progress() as bar:
        task = bar.add_task("answering", total=len(dialogues), completed=done)
        for first in range(done, len(dialogues), chunk_size):
            chunk = dialogues[first : first + chunk_size]
            rows = answer_dialogues(chunk, target, first, batch_size, Settings().block_len)
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            bar.update(task, completed=first + len(chunk))


@app.command()
def sample(path: Path = Path("recipes/demo/sample.jsonl")) -> None:
    """Let the target answer the package's own prompts: rows to try the recipes on at once."""
    prompts = [json.loads(line) for line in demo_path("prompts.jsonl").read_text().splitlines()]
    dialogues = [[("user", prompt["messages"][0]["content"])] for prompt in prompts]
    rows = answer_dialogues(dialogues, load_target("demo"), 0, 40, Settings().block_len)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


DATA_CREDITS = """| data | licence | source |
| --- | --- | --- |
| GSM8K, train | MIT | OpenAI, grade-school-math |
| Schema-Guided Dialogue, train | CC BY-SA 4.0 | Google Research, dstc8-schema-guided-dialogue |
| Taskmaster-4, nine records of ten | CC BY 4.0 | Google Research, Taskmaster |
"""


def model_card(kind: str, summary: dict) -> str:
    """What the model is, how it was trained and whose data it saw."""
    losses = "".join(f"| {k} | {v:.3f} |\n" for k, v in summary["validation_loss"].items())
    agreed = summary.get("argmax_agreement", {})
    agreement_rows = "".join(f"| {k} | {v:.3f} |\n" for k, v in agreed.items())
    agreement_table = (
        f"\nArgmax equal to the target's on held-out text:\n\n| domain | share |\n| --- | --- |\n"
        f"{agreement_rows}"
        if agreed
        else ""
    )
    trained = "distilled from the demo target" if agreed else "trained"
    return (
        f"---\nlicense: cc-by-sa-4.0\nlanguage: en\n---\n# specdec demo {kind}\n\n"
        f"A Llama of {NUM_LAYERS[kind]} layers and width {SHARED_SHAPE['hidden_size']}, {trained} "
        f"by `scripts/train_demo.py` for tests and demonstrations of speculative decoding. It "
        f"writes fluent sentences of three narrow domains and knows nothing.\n\n"
        f"Tokens seen: {summary['tokens']:,}. Steps: {summary['step']}. Seconds: "
        f"{summary['seconds']:.0f} on {summary['device']} with {summary['num_processes']} "
        f"processes. Trained in float32, stored in bfloat16.\n\n"
        f"Held-out loss, nats a token:\n\n| domain | loss |\n| --- | --- |\n{losses}"
        f"{agreement_table}\n## Data and licences\n\n{DATA_CREDITS}\n"
        "The weights are shared under CC BY-SA 4.0, the strictest of these.\n"
    )


@app.command()
def export(out: Path = Path("runs/demo"), package: Path = Path("specdec/demo")) -> None:
    """Write bf16 safetensors, tokenizer and model card of both models into the package."""
    for kind in NUM_LAYERS:
        summary = json.loads((out / kind / "training.json").read_text())
        model = LlamaForCausalLM.from_pretrained(out / kind, dtype=torch.bfloat16)
        model.save_pretrained(package / kind)
        tok = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
        tok.save_pretrained(package / kind)
        (package / kind / "README.md").write_text(model_card(kind, summary))
        (package / kind / "training.json").write_text(json.dumps(summary, indent=1))


HEAD_NAMES = {"medusa": "Medusa heads", "eagle": "EAGLE-1 head", "eagle3": "EAGLE-3 head"}


def head_card(kind: str, results: dict) -> str:
    """What the head is, how it was trained and whose data it saw."""
    acceptance = "".join(
        f"| {depth} | {share:.3f} |\n"
        for depth, share in enumerate(results["offline_acceptance"], 1)
        if share is not None
    )
    where = results["provenance"]
    return (
        f"---\nlicense: cc-by-sa-4.0\nlanguage: en\n---\n# specdec demo {kind}\n\n"
        f"{HEAD_NAMES[kind]} for the demo target, trained by `specdec train "
        f"recipes/embedded/{kind}.yaml` on the target's own answers to the training questions "
        f"(`scripts/train_demo.py answers`).\n\n"
        f"Tokens seen: {results['tokens']:,}. Steps: {results['steps']}. Seconds: "
        f"{results['seconds']:.0f} on {where['device']} with {results['num_processes']} "
        f"process. Trained in float32, stored in bfloat16.\n\n"
        f"Offline acceptance on {results['validation_rows']} held-out dialogues: tau "
        f"{results['offline_tau']:.2f}, by depth, given that the depth above was accepted:\n\n"
        f"| depth | accepted |\n| --- | --- |\n{acceptance}"
        f"\n## Data and licences\n\n{DATA_CREDITS}\n"
        "The weights are shared under CC BY-SA 4.0, the strictest of these.\n"
    )


@app.command()
def heads(runs: Path = Path("runs/heads"), package: Path = Path("specdec/demo")) -> None:
    """Write the trained heads into the package, in bf16 and with their model cards."""
    for kind in HEAD_NAMES:
        results = json.loads((runs / kind / "results.json").read_text())
        head = read_head(runs / kind / "drafter")
        tensors = {
            name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
            for name, tensor in head.tensors.items()
        }
        write_head(replace(head, tensors=tensors), package / kind)
        (package / kind / "README.md").write_text(head_card(kind, results))
        (package / kind / "training.json").write_text(json.dumps(results, indent=1))


@app.command(name="all")
def everything(data_dir: DataDir, out: Path = Path("runs/demo")) -> None:
    """All stages, one after the other."""
    tokenizer(data_dir, out)
    target(data_dir, out)
    draft(data_dir, out)
    export(out)


if __name__ == "__main__":
    app()
