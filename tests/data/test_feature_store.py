"""Reading a store: any row, any process, and nothing damaged or of another target."""

import multiprocessing
import re
from dataclasses import replace

import pytest
import torch
from checkpoints import save_tokenizer
from tiny_features import make_store, random_rows
from tiny_models import tiny_llama, tiny_target

from specdec.data import features
from specdec.data.answers import read_rows
from specdec.data.feature_store import FeatureStore, TopLogits, logit_places
from specdec.targets.load import load_ends


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Files of a few rows."""
    monkeypatch.setattr(features, "_MIB", 20_000)


def equal(first, second):
    assert first.tokens.equal(second.tokens)
    assert first.places.equal(second.places)
    assert first.hidden.keys() == second.hidden.keys()
    assert all(first.hidden[tap].equal(second.hidden[tap]) for tap in first.hidden)
    for name in ("values", "ids", "rest"):
        assert getattr(first.logits, name).equal(getattr(second.logits, name))


def test_rows_come_back_as_they_were(tmp_path):
    store = make_store(tmp_path, tiny_target(), held_out=random_rows(2, seed=5))
    for split in store.index.splits:
        written = read_rows(tmp_path / "answers" / f"{split}.jsonl", 97)
        pairs = zip(store.rows(split), written, strict=True)
        assert all(stored == replace(row, id=stored.id) for stored, row in pairs)


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_any_row_can_be_read_at_any_time(tmp_path, dtype):
    store = make_store(tmp_path, tiny_target(), dtype=dtype)
    names = [row.id for row in store.rows("train")]
    in_order = {name: store.get(name) for name in names}
    fresh = FeatureStore.open(tmp_path / "store")
    for name in [*reversed(names), names[4], names[4]]:
        equal(fresh.get(name), in_order[name])


def test_cut_row_starts_the_whole_row(tmp_path):
    store = make_store(tmp_path, tiny_target())
    for row in store.rows("train"):
        whole, cut = store.get(row.id), store.get(row.id, taps=[1], max_len=11)
        assert cut.tokens.equal(whole.tokens[:11])
        assert list(cut.hidden) == [1]
        assert cut.hidden[1].equal(whole.hidden[1][:11])
        assert cut.places.tolist() == [place for place in whole.places.tolist() if place < 10]
        assert cut.logits.values.equal(whole.logits.values[: len(cut.places)])


def test_only_places_before_answer_tokens_have_logits(tmp_path):
    store = make_store(tmp_path, tiny_target())
    row = store.rows("train")[1]
    assert row.answers == ((3, 9), (9, 14))
    assert logit_places(row) == list(range(2, 13))
    assert logit_places(store.rows("train")[0]) == list(range(5))  # nothing predicts token 0
    assert len(store.get(row.id).logits.values) == 11


def _sum_of_rows(store, names, results):
    results.put([float(store.get(name).hidden[1].double().sum()) for name in names])


def test_several_processes_read_one_store_at_once(tmp_path):
    store = make_store(tmp_path, tiny_target())
    names = [row.id for row in store.rows("train")]
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    for opened in (store, FeatureStore.open(tmp_path / "store"), store):
        context.Process(target=_sum_of_rows, args=(opened, names, results)).start()
    found = [results.get() for _ in range(3)]
    _sum_of_rows(store, names, results)
    assert found == [results.get()] * 3


FILE, INDEX = "train-00001.safetensors", "features.json"


@pytest.mark.parametrize(
    ("name", "damaged", "message"),
    [
        (FILE, lambda whole: None, f"{FILE}' is missing"),
        (FILE, lambda whole: whole[:-1], f"{FILE}' is damaged"),
        (FILE, lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]), f"{FILE}' is damaged .its conte"),
        (FILE, lambda whole: b"\xff" * 8 + whole[8:], f"{FILE}' is damaged"),
        (INDEX, lambda whole: whole.replace(b"0 embeddings", b"from 0"), "tap_convention is "),
        (INDEX, lambda whole: whole.replace(b"features/1", b"features/0"), "schema is .* must be"),
        (INDEX, lambda whole: whole.replace(b'"layout"', b'"more"'), "key more does not"),
        (INDEX, lambda whole: re.sub(rb' "ends": .*\n', b"", whole), "ends is missing"),
        (INDEX, lambda whole: None, "no features.json"),
    ],
)
def test_damaged_store_is_refused(tmp_path, name, damaged, message):
    make_store(tmp_path, tiny_target())
    path = tmp_path / "store" / name
    content = damaged(path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)
    read = FeatureStore.verify if "conte" in message else lambda store: store.rows("train")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read(FeatureStore.open(path.parent))


def test_missing_taps_splits_and_rows_are_named(tmp_path):
    store = make_store(tmp_path, tiny_target(num_layers=4), taps="0,4")
    with pytest.raises(ValueError, match=r"holds the taps \[0, 4\] but not 2"):
        store.get("row 0", taps=[0, 2])
    with pytest.raises(ValueError, match="no split 'test', only train, held_out"):
        store.rows("test")
    with pytest.raises(KeyError, match="no row 'row 100'"):
        store.get("row 100")


def test_store_refuses_another_targets_weights(tmp_path):
    store = make_store(tmp_path, tiny_target())
    store.check_target(tiny_target())
    body = tiny_target()
    body.model.model.layers[0].mlp.down_proj.weight.data.neg_()
    with pytest.raises(ValueError, match="another target: its weights is"):
        store.check_target(body)
    with pytest.raises(ValueError, match="another target: its embedding or projection is"):
        store.check_target(tiny_target(seed=1))


def test_store_refuses_another_targets_ends_or_tokenizer(tmp_path):
    from specdec.targets.load import load_target

    for name, seed, first in (("mine", 0, 0), ("other", 1, 0), ("spoken", 0, 8)):
        tiny_llama(seed=seed).save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name, first=first)
    store = make_store(tmp_path, load_target(str(tmp_path / "mine"), device="cpu"))
    store.check_target(load_ends(str(tmp_path / "mine"), device="cpu"))
    store.check_target(load_ends(str(tmp_path / "mine"), device="cpu", dtype="bfloat16"))
    with pytest.raises(ValueError, match="its embedding or projection is"):
        store.check_target(load_ends(str(tmp_path / "other"), device="cpu"))
    with pytest.raises(ValueError, match="its tokenizer is"):
        store.check_target(load_ends(str(tmp_path / "spoken"), device="cpu"))


def test_kept_and_other_logits_have_exact_mass():
    logits = 4 * torch.randn(30, 97, generator=torch.Generator().manual_seed(0))
    logits[3] += 40 * torch.nn.functional.one_hot(torch.tensor(5), 97)  # the rest has 1e-18
    wanted = logits.double().softmax(-1)
    for top_k in (1, 8, 96):
        top = TopLogits.of(logits, top_k)
        again = top.dense(97, torch.float32)
        mine = again.double().softmax(-1)
        assert mine.gather(1, top.ids).sub(wanted.gather(1, top.ids)).abs().max() < 1e-6
        rest = wanted.scatter(1, top.ids, 0).sum(-1)
        assert (mine.scatter(1, top.ids, 0).sum(-1) / rest - 1).abs().max() < 1e-4
        assert again.gather(1, top.ids).equal(logits.gather(1, top.ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_survives_ties_and_rounding(dtype):
    logits = torch.randint(-3, 3, (200, 30), generator=torch.Generator().manual_seed(1)).to(dtype)
    logits = torch.cat([logits, torch.full((1, 30), 2.5, dtype=dtype)])
    for top_k in (1, 2, 5, 30):
        again = TopLogits.of(logits, top_k).dense(30, dtype)
        assert again.argmax(-1).equal(logits.argmax(-1))
