"""Random heads as checkpoints, built by the drafters themselves."""

from functools import cache

import torch
from tiny_models import tiny_target

from specdec.checkpoints import HeadCheckpoint, identify_target
from specdec.drafters.heads import build_head

NUM_LAYERS = 8
ROPE = {"rope_type": "linear", "rope_theta": 500000.0, "factor": 2.0}
NORMED = {"norm_before_residual": True, "norm_before_fc": True}
SPARK = {"markov": "vanilla", "markov_rank": 4, "confidence": True, "sample_from_anchor": True}
NARROW = {"hidden_size": 16, "head_dim": 4}
MIXED = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 20}
# Every option away from its default in one of them.
HEADS = {
    "medusa": ("medusa", {"num_heads": 3, "num_layers": 2}),
    "medusa-shared": ("medusa", {"num_heads": 2, "own_vocab_head": False}),
    "medusa-reduced": ("medusa", {"num_heads": 2, "draft_vocab_size": 40}),
    "eagle": ("eagle", {"bias": False, "qkv_bias": True, "backbone": {"rope_parameters": ROPE}}),
    "eagle-biased": ("eagle", {}),
    "eagle3": ("eagle3", {"draft_vocab_size": 40, "taps": [1, 4, 6]}),
    "eagle3-whole": ("eagle3", {"own_embedding": True, "norm_output": True}),
    "eagle3-normed": ("eagle3", {**NORMED, "draft_vocab_size": 40}),
    "eagle3-narrow": ("eagle3", {"backbone": NARROW, "own_embedding": True}),
    "eagle3.1": ("eagle3", {"fc_norm": True, "norm_output": True, "draft_vocab_size": 40}),
    "eagle3.1-qwen3": ("eagle3", {"fc_norm": True, "backbone": {"qk_norm": True}}),
    "eagle3-deep": ("eagle3", {"num_layers": 3, "draft_vocab_size": 40}),
    "peagle": ("peagle", {"num_depths": 5, "mask_token_id": 7, "draft_vocab_size": 40}),
    "mtp": ("mtp", {"backbone": {"qk_norm": True}}),
    "dflash": ("dflash", {"taps": [1, 4, 6], "block_size": 5, "mask_token_id": 7}),
    "dspark": ("dflash", {**SPARK, "confidence_with_markov": True, "num_layers": 1}),
    "dspark-whole": ("dflash", {**SPARK, "own_ends": True, "markov": "gated"}),
    "mtp-modules": ("mtp", {"num_modules": 2}),
    "mixture": ("mixture_of_attentions", {}),
    "mixture-mean": ("mixture_of_attentions", {"layer_self_attention": False, "cross": MIXED}),
}
LAYOUTS_OF = {
    "medusa": ("specdec", "medusa", "vllm-medusa"),
    "medusa-shared": ("specdec", "medusa"),
    "medusa-reduced": ("specdec", "vllm-medusa"),
    "eagle": ("specdec", "eagle", "sglang-eagle"),
    "eagle-biased": ("specdec", "eagle", "sglang-eagle"),
    "eagle3": ("specdec", "eagle3", "speculators"),
    "eagle3-whole": ("specdec", "eagle3", "speculators"),
    "eagle3-normed": ("specdec", "speculators"),
    "eagle3-narrow": ("specdec", "eagle3", "speculators"),
    "eagle3.1": ("specdec", "speculators"),
    "eagle3.1-qwen3": ("specdec", "speculators"),
    "mtp": ("specdec", "speculators-mtp", "deepseek-mtp", "qwen-mtp"),
    "mtp-modules": ("specdec", "deepseek-mtp"),
    "dflash": ("specdec", "z-lab", "transformers-assistant", "speculators-dflash"),
    "dspark": ("specdec", "speculators-dflash"),
    "dspark-whole": ("specdec", "deepspec"),
    **dict.fromkeys(("mixture", "mixture-mean"), ("specdec",)),
    "eagle3-deep": ("specdec", "speculators"),
    "peagle": ("specdec", "speculators-peagle"),
}
PAIRS = [(name, layout) for name, layouts in LAYOUTS_OF.items() for layout in layouts]


@cache
def target():
    """A target on which the published taps are three layers, named as from the hub."""
    made = tiny_target(vocab_size=61, num_layers=NUM_LAYERS)
    made.model.config._name_or_path = "org/tiny"
    return made


@cache
def built_head(name):
    """One of `HEADS`, its draft vocabulary spread over the target's."""
    kind, options = HEADS[name]
    torch.manual_seed(0)
    head = build_head(kind, options, target())
    with torch.no_grad():
        for weight in head.parameters():
            weight.normal_()
        if "draft_vocab_size" in options:
            head.set_draft_vocab(torch.randperm(61)[:40].sort().values)
    return head, identify_target(target())


def random_head(name, dtype=torch.float32, tree=None, training=None):
    """The checkpoint of one of `HEADS`, with tensors of its own."""
    head, identity = built_head(name)
    tensors = {
        key: tensor.clone().to(dtype if tensor.is_floating_point() else tensor.dtype)
        for key, tensor in head.state_dict().items()
    }
    options = head.options.model_dump(exclude_none=True)
    return HeadCheckpoint(HEADS[name][0], options, tensors, tree, identity, training or {})


def same_tensors(ours, theirs):
    """Whether names, dtypes and all bits agree."""
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])
        for name in ours
    )
