"""Random draft heads for tiny targets, with options that fit them."""

from specdec.lossless import models

OPTIONS = {
    "medusa": {"num_heads": 4},
    "eagle": {},
    "eagle3": {"taps": [0, 1, 2]},
    "mixture_of_attentions": {},
    "mtp": {},
    "dflash": {"taps": [0, 1, 2], "block_size": 6},
    "peagle": {"taps": [0, 1, 2]},
}


def tiny_head(kind, target, seed=0, **options):
    return models.tiny_head(kind, target, seed, **{**OPTIONS[kind], **options})


def save_tiny_head(folder, kind, target, seed=0, **options):
    return models.save_tiny_head(folder, kind, target, seed, **{**OPTIONS[kind], **options})
