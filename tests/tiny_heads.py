"""Random draft heads for tiny targets, as folders."""

import torch

from specdec.checkpoints import HeadCheckpoint, identify_target, write_head
from specdec.drafters.heads import build_head

OPTIONS = {
    "medusa": {"num_heads": 4},
    "eagle": {},
    "eagle3": {"taps": [0, 1, 2]},
}


def tiny_head(kind, target, seed=0, **options):
    """A random head whose guesses are neither flat nor certain, in eval mode."""
    torch.manual_seed(seed)
    head = build_head(kind, {**OPTIONS[kind], **options}, target)
    with torch.no_grad():
        for name, weight in head.named_parameters():
            if weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
            if name.startswith("lm_head"):
                weight.mul_(8)
    return head.eval()


def save_tiny_head(folder, kind, target, seed=0, **options):
    """The folder, as a path that `load_drafter` takes."""
    head = tiny_head(kind, target, seed, **options)
    tensors = {name: tensor.contiguous() for name, tensor in head.state_dict().items()}
    checkpoint = HeadCheckpoint(
        kind, {**OPTIONS[kind], **options}, tensors, target=identify_target(target)
    )
    write_head(checkpoint, folder)
    return str(folder)
