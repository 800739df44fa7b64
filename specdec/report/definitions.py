"""What the words of a report mean, each in one line."""

# Term -> (name, meaning).
DEFINITIONS: dict[str, tuple[str, str]] = {
    "tau": (
        "tau",
        "accepted length, 1 + A / S: accepted draft tokens over verify steps, and the step's own "
        "token; 1 is no speculation",
    ),
    "accepted": (
        "accepted",
        "A / D: accepted over verified draft nodes; in a tree every node counts, so that wide "
        "trees have low shares",
    ),
    "depth": (
        "acceptance at depth i",
        "steps that accepted a token there over all steps; over all depths these sum to tau - 1",
    ),
    "conditional": (
        "conditional acceptance at depth i",
        "steps that accepted a token there over the steps that tested that depth",
    ),
    "alpha": (
        "alpha",
        "mean over positions of the sum over tokens of min(p, q): the chance that one token drawn "
        "from the drafter is kept; measured without sampling, and not A / D",
    ),
    "speed": (
        "tokens/s",
        "tokens after the first chunk over the seconds from first chunk to last, both summed over "
        "prompts, per row; prefill is left out",
    ),
    "speedup": (
        "speed / plain",
        "total seconds of plain decoding in the same loop over the arm's, for the same prompts, "
        "prefill left out; where the texts differ, total tokens over total seconds in both",
    ),
    "whole": ("with prefill / plain", "the same with the seconds of the prefill"),
    "mean_ratio": (
        "mean ratio",
        "mean over prompts of the ratio of decode speeds, which short, easy answers dominate",
    ),
    "hf": ("speed / HF", "the same against the generate method of transformers"),
    "efficiency": (
        "loop efficiency",
        "time in forwards of target and drafter over the wall time of decoding; 1 is a free loop",
    ),
    "interval": ("[low, high]", "95 % bootstrap interval over prompts"),
    "ece": (
        "ECE",
        "expected calibration error: the distance of confidence from acceptance, averaged over "
        "bins by their size",
    ),
    "differ": (
        "differ",
        "prompts whose greedy tokens are not those of a baseline; - when sampling",
    ),
    "p": ("p", "probability that the target gives to a token"),
    "q": ("q", "probability that the drafter gives to it"),
    "overlap": ("overlap", "sum over tokens of min(p, q) at one place; its mean is alpha"),
    "coverage": (
        "coverage",
        "share of places where the token that came is the drafter's first, second, ... guess",
    ),
    "entropy": ("entropy", "of the target's law of the next token at temperature 1, in nats"),
    "temperature": (
        "T",
        "temperature: logits are divided by it before the softmax; 0 is greedy, all probability "
        "on the best token",
    ),
    "top_k": ("top-k", "only the k most probable tokens may be drawn; 0 is off"),
    "top_p": (
        "top-p",
        "only the smallest set of tokens whose probability reaches p may be drawn; 1 is off",
    ),
    "min_p": (
        "min-p",
        "only tokens with at least this share of the best token's probability may be drawn",
    ),
    "rule_token": (
        "rule token",
        "each drafted token is kept with the chance min(1, p / q), the first refused one drawn "
        "again from what p has over q",
    ),
    "rule_block": (
        "rule block",
        "a chain is judged as a whole, which keeps at least as many tokens from the same "
        "distribution",
    ),
    "rule_traversal": (
        "rule traversal",
        "a tree is judged from its leaves upwards, also without changing the distribution",
    ),
    "rule_typical": (
        "rule typical",
        "tokens that the target finds likely enough are kept; this changes the distribution",
    ),
    "estimate": (
        "estimate",
        "computed from stated figures of hardware that was not measured; never a measurement",
    ),
}
