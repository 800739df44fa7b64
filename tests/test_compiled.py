"""Compiled code and captured graphs say what eager code says, for all sizes."""

from itertools import product

import pytest
import torch
from tiny_heads import save_tiny_head
from tiny_models import perturbed, tiny_llama
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from specdec import generate, load_drafter
from specdec.common import compile as compiling
from specdec.engine.judge import Judge
from specdec.sampling.sampler import Sampler, SamplingConfig
from specdec.targets.hf import HFTarget
from specdec.verify import Draft, get_rule

PROMPTS = [[5, 6, 7, 8, 5, 6, 7], [3] * 12, [11, 12, 13, 11, 12], [6]]
VOCAB_SIZE = 17  # so small that random heads are right at times
DRAFTERS = {
    "plain": None,
    "chain of a draft model": {"type": "draft_model", "num_draft_tokens": 4},
    "tree of a draft model": {"type": "draft_model", "width": 3, "max_nodes": 8},
    "chain of a head": {"type": "eagle3", "width": 1, "depth": 4, "max_nodes": 4},
    "tree of a head": {"type": "eagle3", "depth": 3, "width": 5, "max_nodes": 20},
    "tree of a head with a window": {"type": "eagle3", "depth": 2, "width": 9, "window": 6},
    "chain of a deep head": {"type": "eagle3", "path": "deep", "width": 1, "depth": 4},
    "tree of a deep head": {"type": "eagle3", "path": "deep", "depth": 3, "width": 5},
    "tree of one forward": {"type": "peagle", "depth": 3, "width": 5},
    "drawn tree of a head": {"type": "eagle3", "width": 9, "children": "with_replacement"},
    "static tree of heads": {"type": "medusa", "max_nodes": 40},
    "tree of blocks": {"type": "dflash", "width": 5, "max_nodes": 20, "window": 6},
    "drawn tree of blocks": {"type": "dflash", "width": 9, "children": "with_replacement"},
}


def tiny_gemma():
    """A model with two types of layers, each with its own mask and rotary embedding."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        sliding_window=6,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    return Gemma3ForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def _graphs_on_a_cpu(monkeypatch):
    monkeypatch.setattr(compiling, "GRAPH_DEVICES", ("cuda", "cpu"))


@pytest.fixture(scope="module")
def targets():
    """The same weights eagerly and compiled."""
    return {mode: HFTarget(tiny_llama(VOCAB_SIZE), compile=mode) for mode in (False, True)}


@pytest.fixture(scope="module")
def drafts(tmp_path_factory, targets):
    folder = tmp_path_factory.mktemp("drafts")
    perturbed(targets[False].model, 0.1).save_pretrained(folder / "draft_model")
    top = targets[False].config.num_hidden_layers
    taps = {"taps": [0, top // 2, top]}
    for kind, options in (
        *(("medusa", {}), ("eagle3", taps), ("peagle", taps)),
        ("dflash", {"block_size": 4, "markov": "vanilla", "markov_rank": 4}),
    ):
        save_tiny_head(folder / kind, kind, targets[False], **options)
    save_tiny_head(folder / "deep", "eagle3", targets[False], num_layers=2, **taps)
    return folder


@pytest.fixture(scope="module")
def load(drafts):
    """Load a drafter once; its code is exported each time."""
    loaded = {}

    def load(options, target):
        key = (id(target), repr(options))
        if options and key not in loaded:
            given = {**options, "path": str(drafts / options.get("path", options["type"]))}
            loaded[key] = load_drafter(given, target)
        return loaded.get(key)

    return load


def decode(target, drafter, **settings):
    results = generate(target, drafter, PROMPTS, max_new_tokens=24, **settings)
    return [(each.tokens, [step.num_accepted for step in each.records]) for each in results]


# These take long to compile; SPECDEC_COMPILED=1 compiles them in the lossless suite.
GRAPHED_ONLY = {name for name in DRAFTERS if "block" in name or "deep" in name}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in DRAFTERS if name not in GRAPHED_ONLY])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_compiled_decoding_equals_eager_decoding(targets, load, name, batch_size):
    options = DRAFTERS[name]
    eager, compiled = (
        decode(targets[mode], load(options, targets[mode]), batch_size=batch_size)
        for mode in (False, True)
    )
    assert compiled == eager
    assert options is None or sum(sum(accepted) for _, accepted in eager) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chain of a draft model", "drawn tree of a head"])
def test_compiled_sampling_draws_the_same_tokens(targets, load, name):
    sampling = {"temperature": 1.0, "top_p": 0.9, "seed": 3}
    eager, compiled = (
        decode(target, load(DRAFTERS[name], target), sampling=sampling)
        for target in targets.values()
    )
    assert compiled == eager


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("is_sampled", [False, True])
def test_compiled_judge_gives_the_same_verdicts(temperature, is_sampled):
    vocab_size = 97  # no multiple of a vector's length
    generator = torch.Generator().manual_seed(0)
    judges = [Judge(get_rule("token"), is_compiled) for is_compiled in (False, True)]
    for batch_size, num_nodes in product((1, 2, 3), (1, 2, 7)):
        shape = batch_size, num_nodes + 1, vocab_size
        logits = 3 * torch.randn(shape, generator=generator)
        tokens = logits[:, :-1].argmax(-1)
        tokens[:, -1] = 0
        lengths = torch.randint(0, num_nodes + 1, (batch_size,), generator=generator)
        tokens = tokens.masked_fill(torch.arange(num_nodes) >= lengths[:, None], -1)
        probs = logits[:, :-1].softmax(-1) if is_sampled else None
        configs = [SamplingConfig(temperature=temperature, seed=s) for s in range(batch_size)]
        sampler = Sampler(configs, vocab_size, None, [[1]] * batch_size, ())
        draft, counters = Draft.chain(tokens, lengths, probs), torch.arange(batch_size) + 5
        (eager, told), (compiled, also_told) = (
            judge(sampler, logits, draft, counters) for judge in judges
        )
        assert also_told.tolist() == told.tolist()
        for name, value in vars(eager).items():
            assert torch.equal(getattr(compiled, name), value)


@pytest.mark.slow
def test_nothing_is_compiled_again_while_rows_come_and_go(targets, load):
    drafter = load(DRAFTERS["tree of a head"], targets[True])
    before = compiling.num_compiled()
    for batch_size in (1, 2, 3, 4):
        decode(targets[True], drafter, batch_size=batch_size)
    assert compiling.num_compiled() == before


@pytest.mark.slow
def test_layers_of_two_types_are_given_their_own_masks():
    model = tiny_gemma()
    eager, compiled = HFTarget(model), HFTarget(model, compile=True)
    assert len({tuple(given) for _, given in compiled._compiled._layers}) == 2
    draft = Draft.chain(torch.tensor([[3, 4, 5], [6, 7, 8]]))
    outputs = []
    for target in (eager, compiled):
        target.prefill([[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2]])
        outputs.append(target.score(torch.tensor([9, 8]), draft, taps=(0, 1, 3)))
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=1e-4, atol=1e-4)
    for tap, hidden in outputs[0].hidden.items():
        torch.testing.assert_close(outputs[1].hidden[tap], hidden, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", DRAFTERS.values(), ids=DRAFTERS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_graphed_decoding_equals_eager_decoding(targets, load, options, batch_size):
    graphed = HFTarget(targets[False].model, compile="graphs")
    eager = decode(targets[False], load(options, targets[False]), batch_size=batch_size)
    assert decode(graphed, load(options, graphed), batch_size=batch_size) == eager


def test_graphs_are_met_again_by_the_next_prompts(targets, load):
    graphed = HFTarget(targets[False].model, compile="graphs")
    drafter = load(DRAFTERS["tree of a head"], graphed)

    def num_captured():
        return sum(each.num_captured for each in graphed._graphed._graphs.values())

    for _ in range(2):
        decode(graphed, drafter, batch_size=2)
    before = num_captured()
    decode(graphed, drafter, batch_size=2)
    assert num_captured() == before


def test_graph_is_not_replayed_for_another_storage():
    graphs = compiling.Graphs(lambda new, held: [held.add_(new).sum()], torch.device("cpu"), most=2)
    one, other, new = torch.zeros(3), torch.zeros(3), torch.ones(3)
    for held in (one, one, other):
        graphs([new], [held])
    assert graphs.num_captured == 2
    assert one.tolist() == [2, 2, 2]
    assert other.tolist() == [1, 1, 1]


def test_graphs_used_least_recently_go():
    graphs = compiling.Graphs(lambda new: [new + 1], torch.device("cpu"), most=2)
    for size in (1, 2, 1, 3, 1, 2):
        assert graphs([torch.zeros(size)])[0].tolist() == [1] * size
    assert graphs.num_captured == 4  # that of 2 went for that of 3


REFUSALS = [
    ("sometimes", "compile is 'sometimes' but must be"),
    (2, "compile is 2 but must be"),
    ("graphs", "needs CUDA, but the device is cpu"),
]


@pytest.mark.parametrize(("compile", "message"), REFUSALS)
def test_mode_that_cannot_be_is_refused(monkeypatch, compile, message):
    monkeypatch.setattr(compiling, "GRAPH_DEVICES", ("cuda",))
    with pytest.raises(ValueError, match=message):
        HFTarget(tiny_llama(), compile=compile)


def test_machine_without_a_compiler_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "compiler", lambda: None)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiling, "_loaded", {})
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler here; install g\+\+.*compile=False"):
        HFTarget(tiny_llama(), compile=True)


def test_model_whose_layers_do_not_follow_is_refused():
    model = tiny_llama()
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 1, *args[1:]))
    with pytest.raises(RuntimeError, match="its layers do not simply follow each other"):
        HFTarget(model, compile=True)


@pytest.mark.gpu
@pytest.mark.parametrize("options", DRAFTERS.values(), ids=DRAFTERS)
def test_graphs_on_cuda_equal_eager_decoding(tmp_path, options):
    model = tiny_llama(VOCAB_SIZE).cuda()
    eager, graphed = HFTarget(model), HFTarget(model, compile="graphs")
    perturbed(model, 0.1).save_pretrained(tmp_path / "draft_model")
    for kind, own in (("medusa", {}), ("eagle3", {"taps": [0, 1, 2]}), ("dflash", {})):
        save_tiny_head(tmp_path / kind, kind, eager, **own)
    given = options and {**options, "path": str(tmp_path / options["type"])}
    for batch_size in (1, 3, 4):
        expected, replayed = (
            decode(target, given and load_drafter(given, target), batch_size=batch_size)
            for target in (eager, graphed)
        )
        assert replayed == expected


@pytest.mark.gpu
def test_replay_waits_for_nothing():
    weights = torch.randn(8, 8, device="cuda")
    graphs = compiling.Graphs(lambda new, held: [new @ held], weights.device)
    new = torch.ones(2, 8, device="cuda")
    graphs([new], [weights])
    torch.cuda.set_sync_debug_mode("error")
    try:
        (output,) = graphs([new], [weights])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(output, new @ weights)
