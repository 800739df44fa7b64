"""Heads against recorded behaviour of official code on random weights.

SPECDEC_ORACLES names the folder of the recordings; without it there is nothing to compare with.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from specdec import load_target
from specdec.drafters.eagle3 import Eagle3Drafter
from specdec.drafters.heads import load_head
from specdec.drafters.mtp import MtpDrafter
from specdec.drafters.peagle import PeagleDrafter

ORACLES = Path(os.environ.get("SPECDEC_ORACLES", "/nowhere"))
pytestmark = pytest.mark.skipif(
    not ORACLES.is_dir(), reason="SPECDEC_ORACLES names no folder of recordings"
)


@pytest.mark.parametrize("name", ["postnorm", "qwen3"])
def test_eagle31_head_is_that_of_speculators(name):
    folder = ORACLES / "eagle31" / name
    known, recorded = (
        json.loads((folder / "cases.json").read_text()),
        load_file(folder / "recorded.safetensors"),
    )
    target = load_target(str(ORACLES / known["target"]))
    head, _ = load_head(Eagle3Drafter, target, str(folder), force=True)
    assert list(head.taps) == known["taps"]
    near = {"atol": known["tolerance"], "rtol": 0}
    for case in known["cases"]:
        given = {key: t for key, t in recorded.items() if key.startswith(f"{case['name']}.")}
        taps = given[f"{case['name']}.taps"].unsqueeze(0)
        hidden = dict(zip(head.taps, taps.chunk(len(head.taps), -1), strict=True))
        with torch.no_grad():
            features = head.fuse(hidden)
            torch.testing.assert_close(features[0], given[f"{case['name']}.fused"], **near)
            for start in case["starts"]:
                # Step k at this index pairs token index + 1 + k with the chain's own output.
                index, fed = start["index"], start["fed"]
                text = torch.tensor([case["tokens"][: index + 1] + fed])
                length = text.shape[1]
                padded = torch.nn.functional.pad(features[:, : index + 1], (0, 0, 0, length))
                outputs = head.rollout(text, padded[:, :length], len(fed))
                for step, states in enumerate(outputs):
                    key = f"{case['name']}.start{index}.forced"
                    logits = head.logits(states)[0, index]
                    torch.testing.assert_close(logits, given[f"{key}_logits"][step], **near)


def test_mtp_layer_is_that_of_speculators():
    folder = ORACLES / "mtp" / "recursive"
    known = json.loads((folder / "cases.json").read_text())
    recorded = load_file(folder / "recorded.safetensors")
    target = load_target(str(ORACLES / known["target"]))
    head, _ = load_head(MtpDrafter, target, str(folder), force=True)
    assert list(head.taps) == known["taps"]
    for case in known["cases"]:
        features = recorded[f"{case['name']}.hidden"].unsqueeze(0)
        text = torch.tensor([case["tokens"]])
        with torch.no_grad():
            steps = [head.logits(each) for each in head.rollout(text, features, known["steps"])]
        for start in case["starts"]:
            index = start["index"]
            assert case["tokens"][index + 2 : index + 4] == start["fed"]
            expected = recorded[f"{case['name']}.start{index}.cached_logits"]
            for step, logits in enumerate(steps):
                torch.testing.assert_close(
                    logits[0, index], expected[step], atol=known["tolerance"], rtol=0
                )


def test_peagle_head_is_that_of_speculators():
    folder = ORACLES / "peagle" / "plain"
    known = json.loads((folder / "cases.json").read_text())
    recorded = load_file(folder / "recorded.safetensors")
    target = load_target(str(ORACLES / known["target"]))
    head, _ = load_head(PeagleDrafter, target, str(folder), force=True)
    assert (list(head.taps), head.max_depth) == (known["taps"], known["depths"])
    for case in known["cases"]:
        text = torch.tensor([case["tokens"]])
        with torch.no_grad():
            states = target.model(input_ids=text, output_hidden_states=True).hidden_states
            features = head.fuse({tap: states[tap] for tap in head.taps})
            steps = [head.logits(each) for each in head.rollout(text, features, known["depths"])]
        for anchor in case["anchors"]:
            found = torch.stack([logits[0, anchor["index"]] for logits in steps])
            expected = recorded[f"{case['name']}.anchor{anchor['index']}.logits"]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
            assert head.token_map[found.argmax(-1)].tolist() == anchor["draft"]
