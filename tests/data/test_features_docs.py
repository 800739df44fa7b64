"""The arithmetic in docs/features.md is that of the code."""

from inspect import signature
from pathlib import Path

import pytest

from specdec.cli.features import features
from specdec.data.feature_store import Counts, FeatureLayout, resolve_taps
from specdec.data.features import Choice

DOCS = (Path(__file__).parents[2] / "docs" / "features.md").read_text()
# Half of the tokens are answers.
HALF = Counts(tokens=10**8, places=5 * 10**7)


def line(taps, dtype, top_k):
    """A line of the table for a target of 8B: H 4096, V 128,256, L 32, bfloat16."""
    layout = FeatureLayout(resolve_taps(taps, 32), 4096, 128_256, 32, dtype, 128, top_k, "bfloat16")
    choice = Choice.of(layout, HALF)
    size = choice.num_bytes / 1e9
    shown = "-" if taps == "none" else dtype
    return f"| `{taps}` | {shown} | {top_k:,} | {choice.bytes_per_token:,.0f} | {size:,.0f} GB |"


@pytest.mark.parametrize(
    "choice",
    [
        ("eagle3,eagle", "float32", 64),
        ("eagle3,eagle", "bf16", 64),
        ("eagle3,eagle", "int8", 64),
        ("eagle3,eagle", "int8", 0),
        ("eagle3", "bf16", 64),
        ("eagle3", "int8", 64),
        ("eagle", "bf16", 64),
        ("eagle", "bf16", 0),
        ("eagle", "int8", 64),
        ("eagle", "int8", 0),
        ("none", "bf16", 64),
        ("none", "bf16", 128_256),
    ],
)
def test_the_table_for_an_8b_target_is_what_the_estimator_says(choice):
    assert line(*choice) in DOCS.splitlines()


def test_every_option_of_the_command_is_documented():
    names = set(signature(features).parameters) - {"answers", "device"}
    missing = [name for name in names if f"--{name.replace('_', '-')}" not in DOCS]
    assert not missing
