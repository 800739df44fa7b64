"""The tiny models of the lossless suite, which other tests use too."""

from specdec.lossless.models import perturbed, tiny_llama, tiny_target

__all__ = ["perturbed", "tiny_llama", "tiny_target"]
