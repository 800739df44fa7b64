"""The KV cache against plain lists of tokens: ragged writes, paths, growth, rows that move."""

import gc
import random
import weakref

import pytest
import torch

from specdec.engine.kv_cache import SlotCache
from specdec.engine.quantize import decode

LAYERS, HEADS, DIM = 3, 2, 3
CPU = torch.device("cpu")
PLANS = {"apart": None, "together": ["a"] * LAYERS, "mixed": [i % 2 for i in range(LAYERS)]}
PLANS["int8"] = PLANS["mixed"]
MODES = {"int8": "int8"}


@pytest.fixture(autouse=True, params=PLANS)
def plan(request, monkeypatch):
    """Every test runs with layers that share their storage, do not, and share it in part.

    And with quantized ones, of whole numbers that lose nothing.
    """
    torch.manual_seed(0)
    monkeypatch.setitem(PLANS, "now", PLANS[request.param])
    monkeypatch.setitem(MODES, "now", MODES.get(request.param))


def new_cache(num_rows, capacity=8):
    return SlotCache(LAYERS, num_rows, capacity, CPU, PLANS["now"], MODES["now"])


def draw_states(num_rows, num_new):
    """Keys and values of every layer, [layers, 2, B, heads, n, dim]."""
    states = torch.randn(LAYERS, 2, num_rows, HEADS, num_new, DIM)
    if MODES["now"] is None:
        return states
    states = (40 * states).round().clamp(-127, 127)
    states[..., 0] = 127  # the largest of its group
    return states


def write(cache, states, behind=0):
    """One forward: every layer writes its keys and values; returns what attention is given."""
    cache.open(states.shape[4], behind)
    return [cache.update(*states[layer], layer) for layer in range(LAYERS)]


def fill(lengths, capacity=8):
    """A cache with rows of these lengths, and the states that they hold."""
    cache = new_cache(len(lengths), capacity)
    states = draw_states(len(lengths), max(lengths))
    if max(lengths):
        write(cache, states)
    cache.extend(lengths)
    return cache, [states[:, :, row, :, :length] for row, length in enumerate(lengths)]


def parts(layer):
    """Keys and values of a layer, as they are attended."""
    if MODES["now"] is None:
        return layer.keys, layer.values
    pairs = (layer.keys, layer.key_scales), (layer.values, layer.value_scales)
    return [decode(*pair, MODES["now"]) for pair in pairs]


def held(cache, row):
    """The committed states of a row, [layers, 2, heads, length, dim]."""
    length = cache.lengths[row]
    if not length:
        return torch.zeros(LAYERS, 2, HEADS, 0, DIM)
    layers = [torch.stack([part[row] for part in parts(layer)]) for layer in cache.layers]
    return torch.stack(layers)[:, :, :, :length]


def check(cache, expected):
    assert cache.lengths == [rows.shape[3] for rows in expected]
    assert cache.device_lengths.tolist() == cache.lengths
    for row, states in enumerate(expected):
        assert torch.equal(held(cache, row), states), f"row {row}"


def check_next(cache, before, num_new, counts=None):
    """Write some tokens, commit their first ones, and look; returns what the rows hold."""
    check(cache, before)
    new, counts = draw_states(len(before), num_new), counts or [num_new] * len(before)
    write(cache, new)
    check(cache, before)
    cache.extend(counts)
    rows = [torch.cat([old, new[:, :, i, :, : counts[i]]], 3) for i, old in enumerate(before)]
    check(cache, rows)
    return rows


@pytest.mark.parametrize("lengths", [[4, 4, 4], [3, 0, 5], [1, 7, 2]])
def test_ragged_write_equals_writing_rows_alone(lengths):
    cache, before = fill(lengths)
    new = draw_states(3, 4)
    given = write(cache, new)
    for row, length in enumerate(lengths):
        alone = new_cache(1)
        if length:
            write(alone, before[row].unsqueeze(2))
        alone.extend([length])
        seen = write(alone, new[:, :, row : row + 1])
        for layer in range(LAYERS):
            for ours, theirs in zip(given[layer], seen[layer], strict=True):
                assert torch.equal(ours[row, :, : length + 4], theirs[0])
                assert ours.shape[2] == max(lengths) + 4


@pytest.mark.parametrize("lengths", [[3, 3], [5, 2]])
def test_tree_levels_are_written_behind_each_other(lengths):
    cache, before = fill(lengths, capacity=4)
    levels, written = torch.empty(LAYERS, 2, 2, HEADS, 0, DIM), 0
    for num_new in (1, 3, 2):
        new = draw_states(2, num_new)
        given = write(cache, new, behind=written)
        levels, written = torch.cat([levels, new], 4), written + num_new
        for layer, states in enumerate(given):
            for kind, seen in enumerate(states):
                for row, length in enumerate(lengths):
                    expected = torch.cat([before[row], levels[:, :, row]], 3)[layer, kind]
                    assert torch.equal(seen[row, :, : length + written], expected)
    check_next(cache, before, 2)


@pytest.mark.parametrize("capacity", [4, 64])
@pytest.mark.parametrize("seed", range(6))
def test_accepted_path_moves_behind_the_root(seed, capacity):
    draw = random.Random(seed)
    num_nodes, depth = 6, 4
    lengths = [draw.randrange(6) for _ in range(4 if seed else 1)]
    cache, before = fill(lengths, capacity)
    new = draw_states(len(lengths), num_nodes + 1)  # the root and its nodes
    write(cache, new)
    paths = [sorted(draw.sample(range(num_nodes), draw.randint(0, depth))) for _ in lengths]
    cache.gather_path(torch.tensor([path + [-1] * (depth - len(path)) for path in paths]))
    cache.extend([len(path) + 1 for path in paths])
    kept = [new[:, :, row][:, :, :, [0, *(n + 1 for n in path)]] for row, path in enumerate(paths)]
    check(cache, [torch.cat(parts, 3) for parts in zip(before, kept, strict=True)])


def test_path_padding_stays_inside_a_full_cache():
    cache, before = fill([2, 6], capacity=8)
    new = draw_states(2, 2)  # the longer row's only node takes the last slot there is
    write(cache, new)
    assert cache.capacity == 8
    cache.gather_path(torch.tensor([[0, -1, -1], [0, -1, -1]]))
    cache.extend([2, 2])
    check(cache, [torch.cat([before[row], new[:, :, row]], 3) for row in range(2)])


@pytest.mark.parametrize("lengths", [[5, 5], [5, 2]])
def test_growing_capacity_loses_nothing(lengths):
    cache, before = fill(lengths, capacity=5)
    assert cache.capacity == 5
    check_next(cache, before, 12)
    assert cache.capacity == 20


def test_bytes_count_all_slots():
    cache = new_cache(3, capacity=8)
    assert cache.num_bytes == 0
    write(cache, draw_states(3, 2))
    slot = LAYERS * 2 * HEADS * (DIM * 4 if MODES["now"] is None else DIM + 4)
    assert cache.num_bytes == 3 * 8 * slot
    cache.extend([2, 2, 2])
    write(cache, draw_states(3, 7))
    assert cache.num_bytes == 3 * 16 * slot
    stored = [getattr(layer, name) for layer in cache.layers for name in layer.names]
    allocated = {part.untyped_storage().data_ptr(): part.untyped_storage() for part in stored}
    assert cache.num_bytes == sum(storage.nbytes() for storage in allocated.values())
    cache.resize(4, 20)
    assert cache.num_bytes == 4 * 20 * slot
    assert cache.layers[0].keys[3:].isfinite().all()


def test_plan_tells_layers_apart():
    keys, narrow = torch.zeros(1, HEADS, 1, DIM), torch.zeros(1, HEADS, 1, DIM - 1)

    def written(num_rows, plan=None):
        cache = SlotCache(3, num_rows, 4, CPU, plan)
        cache.open(1)
        for layer, values in enumerate([keys, narrow, keys]):
            cache.update(*(part.expand(num_rows, -1, -1, -1) for part in (keys, values)), layer)
        return cache

    cache = written(1)
    first, second, third = cache.plan
    assert first == third != second
    again = written(2, cache.plan)
    assert again.plan == cache.plan
    assert again.num_bytes == 2 * cache.num_bytes


def test_unwritten_and_wiped_slots_are_zero():
    cache, _ = fill([1, 3], capacity=4)
    write(cache, torch.zeros(LAYERS, 2, 2, HEADS, 9, DIM))
    for layer in cache.layers:
        assert torch.count_nonzero(layer.keys[0, :, 1:]) == 0
        assert layer.keys.isfinite().all()
        getattr(layer, layer.names[-1])[1] = float("nan")
    cache.wipe([1])
    assert all(torch.count_nonzero(parts(layer)[1][1]) == 0 for layer in cache.layers)


@pytest.mark.parametrize(
    ("running", "joining", "capacity"),
    [
        ([3, 5], [2], 8),
        ([3, 5], [2, 6, 1], 64),
        ([2], [30, 4], 8),  # longer than the rows it joins have room for
        ([3, 5], [0], 8),  # no token, so no keys, yet
        ([0, 0], [4, 0], 8),
        ([0], [0], 8),
    ],
)
def test_rows_of_another_cache_join_behind(running, joining, capacity):
    cache, before = fill(running, capacity)
    other, joined = fill(joining, 2 * max(joining) or 1)
    cache.append(other)
    check_next(cache, [*before, *joined], 3)


@pytest.mark.parametrize("seed", range(8))
def test_random_operations_equal_lists_of_tokens(seed):
    draw = random.Random(seed)
    cache, rows = fill([draw.randrange(4) for _ in range(3)], capacity=2)
    for _ in range(40):
        action = draw.choice(["write", "write", "rollback", "reorder", "append"])
        if action == "write":
            num_new = draw.randint(1, 4)
            rows = check_next(cache, rows, num_new, [draw.randint(0, num_new) for _ in rows])
        elif action == "rollback":
            lengths = [draw.randint(0, row.shape[3]) for row in rows]
            cache.rollback(lengths)
            rows = [row[:, :, :, :n] for row, n in zip(rows, lengths, strict=True)]
        elif action == "reorder":
            kept = draw.sample(range(len(rows)), draw.randint(1, len(rows)))
            cache.reorder(torch.tensor(kept))
            rows = [rows[row] for row in kept]
        elif len(rows) < 6:
            other, joined = fill([draw.randint(1, 4) for _ in range(draw.randint(1, 2))])
            cache.append(other)
            rows = [*rows, *joined]
        check(cache, rows)


def test_dropped_cache_frees_its_storage_at_once():
    cache, _ = fill([3, 5])
    keys = weakref.ref(cache.layers[0].keys)
    gc.disable()
    del cache
    gc.enable()
    assert keys() is None


def test_cache_that_does_not_fit_names_its_size():
    cache = new_cache(1, capacity=2**50)
    first = sum(kind == PLANS["now"][0] for kind in PLANS["now"]) if PLANS["now"] else 1
    size = 4 if MODES["now"] is None else 1  # codes are the first states
    with pytest.raises(MemoryError, match=rf"{first * 2**50 * HEADS * DIM * size:,} bytes.*batch"):
        write(cache, draw_states(1, 1))
