"""Heads against recorded behaviour of official code on random weights.

SPECDEC_ORACLES names the folder of the recordings; without it there is nothing to compare with.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from specdec import SamplingConfig, generate, load_drafter, load_target
from specdec.drafters.dflash import DFlashDrafter
from specdec.drafters.eagle3 import Eagle3Drafter
from specdec.drafters.heads import build_head, load_head
from specdec.drafters.mixture_of_attentions import MixtureDrafter
from specdec.drafters.mtp import MtpDrafter
from specdec.drafters.peagle import PeagleDrafter
from specdec.drafters.tree_growth import TreeShape
from specdec.engine.interfaces import KEYS_VALUES, TargetOutput
from specdec.sampling.sampler import Sampler
from specdec.verify import Verdict, match

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


def recording(folder):
    """A case's facts and tensors, and the target that it was recorded with."""
    known = json.loads((folder / "cases.json").read_text())
    target = load_target(str(ORACLES / known["target"]))
    return known, load_file(folder / "recorded.safetensors"), target


def features_of(head, given):
    """Features [1, n, F] of taps [n, m * H] that stand side by side."""
    taps = given.unsqueeze(0).chunk(len(head.taps), -1)
    return head.fuse(dict(zip(head.taps, taps, strict=True)))


@pytest.mark.parametrize(
    "name", ["dflash/qwen3", "dflash/llama", "dspark/vanilla", "dspark/gated", "dspark/plain"]
)
def test_block_head_is_that_of_its_authors(name):
    folder = ORACLES / name
    known, recorded, target = recording(folder)
    head, _ = load_head(DFlashDrafter, target, str(folder), force=True)
    assert list(head.taps) == known["taps"]
    assert head.options.block_size == known["block_size"]
    near, first = {"atol": known["tolerance"], "rtol": 0}, head.first
    for case in known["cases"]:
        taps = []
        for number, each in enumerate(case["rounds"]):
            key = f"{case['name']}.round{number}"
            taps.append(recorded[f"{key}.taps"])
            text = torch.tensor([[*each["committed"], each["anchor"]]])
            with torch.no_grad():
                features = features_of(head, torch.cat(taps))
                if f"{key}.context" in recorded:
                    newest = features[0, each["cached_before"] :]
                    torch.testing.assert_close(newest, recorded[f"{key}.context"], **near)
                padded = torch.nn.functional.pad(features, (0, 0, 0, 1))
                last = torch.tensor([[features.shape[1] - 1]])
                (outputs,) = head.blocks(text, padded, last)[0]
                torch.testing.assert_close(outputs, recorded[f"{key}.hidden"][first:], **near)
                if "drawn" not in each:
                    logits = head.level_logits(outputs, torch.tensor(each["draft"]))
                    assert logits.argmax(-1).tolist() == each["draft"]
                    expected = recorded[f"{key}.logits"][first:]
                    torch.testing.assert_close(logits, expected, **near)
                    continue
                drawn = [each["anchor"], *each["drawn"][:-1]]
                for previous, logits, said in (
                    (drawn, "logits", "confidence"),
                    (each["teacher_previous"], "teacher_logits", "teacher_confidence"),
                ):
                    found = head.level_logits(outputs, torch.tensor(previous))
                    torch.testing.assert_close(found, recorded[f"{key}.{logits}"], **near)
                    if head.options.confidence:
                        found = head.confidences(outputs, torch.tensor(previous))
                        torch.testing.assert_close(found, recorded[f"{key}.{said}"], **near)


def test_block_head_decodes_as_its_authors_do():
    folder = ORACLES / "dflash" / "fitted"
    known, _, target = recording(folder)
    options = {"type": "dflash", "path": str(folder), "force": True, "width": 1}
    drafter = load_drafter(options, target)
    for case in known["cases"]:
        (result,) = generate(target, drafter, [case["prompt"]], max_new_tokens=case["new_tokens"])
        assert result.tokens == case["tokens"]
        accepted = [record.num_accepted for record in result.records]
        assert accepted[:-1] == case["accepted"][:-1]  # the last one is cut elsewhere


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


@torch.inference_mode()
def test_mtp_modules_are_those_of_transformers():
    folder = ORACLES / "mtp" / "depths"
    known = json.loads((folder / "cases.json").read_text())
    recorded = load_file(folder / "recorded.safetensors")
    target = load_target(str(ORACLES / known["target"]))
    drafter = MtpDrafter.load(target, str(folder), width=1, force=True)
    head, near = drafter.head, {"atol": known["tolerance"], "rtol": 0}
    assert list(head.taps) == known["taps"]
    assert head.max_depth == drafter.draft_shape.depth == known["steps"]
    said, project = [], head.logits
    head.logits = lambda states: said.append(project(states)) or said[-1]
    tap = head.taps[0]
    for case in known["cases"]:
        for number, now in enumerate(case["rounds"]):
            key = f"{case['name']}.round{number}"
            text = [*now["committed"], now["root"]]
            taps = recorded[f"{key}.taps"].unsqueeze(0)
            sampler = Sampler([SamplingConfig()], target.vocab_size, None, [text], ())
            if number == 0:
                drafter.begin([text], TargetOutput(torch.empty(0), {tap: taps}), sampler)
                states = taps
            else:  # what the round before accepted
                kept = case["rounds"][number - 1]["accepted"]
                new = text[-kept - 1 :]
                path = torch.arange(len(now["committed"]))[None, :kept]
                refused = torch.zeros(1, known["steps"], dtype=torch.bool)
                verdict = Verdict(torch.tensor([new]), torch.tensor([kept]), path, refused)
                drafter.observe(verdict, [new], {tap: taps})
                states = torch.cat([states, taps], 1)
            said.clear()
            draft = drafter.propose(torch.tensor(text[-1:]), [known["steps"]], sampler)
            assert draft.tokens[0].tolist() == now["draft"]
            found = torch.cat(said, 1)[0]
            torch.testing.assert_close(found, recorded[f"{key}.plain_logits"], **near)
            torch.testing.assert_close(found, recorded[f"{key}.logits"], **near)
            # The whole text at once, as in training.
            tokens = torch.tensor([text + now["draft"][:-1]])
            padded = torch.nn.functional.pad(states, (0, 0, 0, known["steps"]))
            for step, outputs in enumerate(head.rollout(tokens, padded, known["steps"])):
                logits = project(outputs[0, len(now["committed"]) - 1])
                torch.testing.assert_close(logits, recorded[f"{key}.plain_logits"][step], **near)


def chosen(draft, wanted):
    """The target's token after the root and every node, so that the first of `wanted` are kept."""
    parents, tokens = draft.explicit_parents()[0].tolist(), draft.tokens[0].tolist()
    nodes, after, place = [*zip(parents, tokens, strict=True)], [-1] * (len(tokens) + 1), -1
    for token in wanted:
        after[place + 1] = token
        place = nodes.index((place, token)) if (place, token) in nodes else place
    return torch.tensor([after])


@pytest.mark.parametrize("name", ["chain", "tree"])
def test_mixture_of_attentions_drafts_as_published(name):
    folder = ORACLES / "moa" / name
    known = json.loads((folder / "cases.json").read_text())
    recorded = load_file(folder / "recorded.safetensors")
    target = load_target(str(ORACLES / known["target"]))
    sizes = known["model_config"]

    def backbone(part):
        names = ("num_key_value_heads", "intermediate_size")
        return {each: sizes[f"{part}_{each}"] for each in names}

    options = {
        "backbone": backbone("self_attention"),
        "cross": backbone("cross_attention"),
        "layers": backbone("layer_self_attention"),
    }
    head = build_head("mixture_of_attentions", options, target).eval()
    head.load_state_dict(load_file(ORACLES / "moa" / "chain" / "model.safetensors"))
    heard, layer = [], head.cross_attention
    shape = TreeShape(known["depth"] - 1, known["breadth"], known["total_tokens"])
    drafter = MixtureDrafter(head, target.vocab_size, shape)
    near = {"atol": known["tolerance"] / 2, "rtol": 0}
    layer.register_forward_hook(lambda module, given, output: heard.append((given[1], output)))
    for case in known["cases"]:
        for index, step in enumerate(case["rounds"]):
            committed, root, key = step["committed"], step["root"], f"{case['name']}.round{index}"
            texts = [[*committed, root]]
            sampler = Sampler([SamplingConfig()], target.vocab_size, None, texts, ())
            with torch.inference_mode():
                if index == 0:
                    output = target.prefill([committed], drafter.taps)
                    drafter.begin(texts, output, sampler)
                    if (kv := recorded.get(f"{key}.kv")) is not None:
                        read = output.hidden[KEYS_VALUES][0].view_as(kv)
                        torch.testing.assert_close(read, kv, **near)
                heard.clear()
                draft = drafter.propose(torch.tensor([root]), [shape.max_nodes], sampler)
                assert draft.tokens[0].tolist() == step["drafts"]
                assert draft.explicit_parents()[0].tolist() == step["parents"]
                new = step["new_context"]
                streams = heard[0][0][0, -new:]
                torch.testing.assert_close(streams, recorded[f"{key}.stream"], **near)
                assert len(heard) == len(step["steps"])
                for number, (_, states) in enumerate(heard):
                    states = states[0] if number else states[0, -1:]
                    torch.testing.assert_close(
                        states, recorded[f"{key}.step{number}.states"], **near
                    )
                    torch.testing.assert_close(
                        head.logits(states), recorded[f"{key}.step{number}.logits"], **near
                    )
                if index + 1 == len(case["rounds"]):
                    break
                output = target.score(torch.tensor([root]), draft, drafter.taps)
                wanted = [*step["accepted"], case["rounds"][index + 1]["root"]]
                verdict = match(chosen(draft, wanted), draft)
                target.commit(verdict, [len(wanted) - 1])
                drafter.observe(verdict, [wanted], output.hidden)


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
