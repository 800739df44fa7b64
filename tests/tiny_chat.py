"""A tiny target that chats: a letter is a token, and answers end at different lengths."""

import json

from tiny_models import tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specdec.targets.hf import HFTarget

# Random models write any letter now and then; this one ends a turn.
END = 40
TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] + 'EOT' }}"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
).replace("EOT", chr(32 + END))


def letter_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Token i is the character 32 + i; the end of a turn is a special token."""
    inner = Tokenizer(models.WordLevel({chr(32 + i): i for i in range(97)}, unk_token="~"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="~", eos_token=chr(32 + END)
    )
    tokenizer.chat_template = template
    return tokenizer


def chatty_model():
    """A random model that ends a turn every dozen tokens or so."""
    import torch

    model = tiny_llama()
    with torch.no_grad():
        # The end of a turn is as likely as the likeliest of a few others.
        model.lm_head.weight.mul_(0.25)
        model.lm_head.weight[END] = model.lm_head.weight[1:9].amax(0)
    model.config.eos_token_id = END
    model.generation_config.eos_token_id = END
    return model


def chatty_target() -> HFTarget:
    return HFTarget(chatty_model(), letter_tokenizer())


def user(*texts):
    return tuple({"role": "user", "content": text} for text in texts)


def said(text):
    return {"role": "assistant", "content": text}


def spelled(tokens):
    return "".join(chr(32 + token) for token in tokens)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers_in(folder):
    """Texts of the files that `specdec regenerate` writes, but for its manifest."""
    names = ("train.jsonl", "held_out.jsonl", "failed.jsonl")
    return {name: (folder / name).read_text() for name in names}
