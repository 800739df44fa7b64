"""Runs that are not comparable are refused, each difference by name, and let pass by name."""

import copy
from pathlib import Path

import made_runs
import pytest

from specdec.report.comparable import FIELDS, check_comparable, comparison, not_alike
from specdec.report.document import build_document
from specdec.report.runs import Run

RESULTS = made_runs.bench()


def run(results, label="a"):
    return Run("bench", label, Path(label), results)


def changed(*path_and_value):
    *path, last, value = path_and_value
    results = copy.deepcopy(RESULTS)
    place = results
    for key in path:
        place = place[key]
    place[last] = value
    return results


CONFIG = ("provenance", "config")
# Field, where it stands, another value, and the two values as the message gives them.
CHANGES = [
    ("schema", ("schema", "specdec-bench-1"), "specdec-bench-3", "specdec-bench-1"),
    ("target", ("target", "weights", "c" * 64), "a" * 64, "c" * 64),
    ("target", ("target", "tokenizer", "c" * 64), "b" * 64, "c" * 64),
    ("prompts", ("prompts", 3, "fingerprint", "other"), "9 prompts", "9 prompts"),
    ("sampling", (*CONFIG, "sampling", "temperature", 1.0), "0.0", "1.0"),
    ("sampling", (*CONFIG, "sampling", "top_p", 0.9), "1.0", "0.9"),
    ("max_new_tokens", (*CONFIG, "max_new_tokens", 99), "25", "99"),
    ("batch_size", (*CONFIG, "batch_size", 8), "1", "8"),
    ("batch_size", (*CONFIG, "prompts_per_call", 4), "0", "4"),
    ("rule", (*CONFIG, "rule", "block"), "token", "block"),
    ("dtype", ("provenance", "dtype", "bfloat16"), "float32", "bfloat16"),
    ("dtype", ("provenance", "quantized", True), "False", "True"),
    ("device", ("provenance", "device", "A GPU"), "cpu", "A GPU"),
    ("device", ("provenance", "cpu", "Another"), "A processor", "Another"),
    ("device", ("provenance", "cpu_count", 64), "2", "64"),
    ("threads", ("provenance", "threads", 2), "1", "2"),
    ("processes", ("provenance", "processes", 2), "1", "2"),
]


@pytest.mark.parametrize(
    ("field", "change", "ours", "theirs"), CHANGES, ids=[f"{c[0]}: {c[1][-2]}" for c in CHANGES]
)
def test_a_difference_is_refused_with_both_values_and_passes_when_it_is_named(
    field, change, ours, theirs
):
    runs = [run(RESULTS), run(changed(*change), "b")]
    with pytest.raises(ValueError) as caught:
        check_comparable(runs)
    message = str(caught.value)
    assert "not comparable" in message
    assert f"{ours}" in message.split(" in 'a' and ")[0]
    assert f"{theirs}" in message.split(" in 'a' and ")[1].split(" in 'b'")[0]
    assert FIELDS[field][1] in message
    assert f"--allow {field}" in message
    allowed = check_comparable(runs, [field])
    assert [each.field for each in allowed["b"]] == [field]
    other = next(name for name in FIELDS if name != field)
    with pytest.raises(ValueError, match=f"--allow {field}"):
        check_comparable(runs, [other])


def test_every_field_that_can_be_allowed_is_refused_in_a_test():
    assert {change[0] for change in CHANGES} | {"seed"} == set(FIELDS)


def test_the_seed_matters_only_where_something_is_drawn():
    greedy = changed(*CONFIG, "seed", 7)
    assert check_comparable([run(RESULTS), run(greedy, "b")]) == {}
    sampled = [copy.deepcopy(RESULTS), copy.deepcopy(greedy)]
    for each in sampled:
        each["provenance"]["config"]["sampling"]["temperature"] = 0.7
    with pytest.raises(ValueError, match="seed is '0' in 'a' and '7' in 'b'"):
        check_comparable([run(sampled[0]), run(sampled[1], "b")])


def test_targets_that_were_quantised_otherwise_are_refused():
    both = [changed("provenance", "quantized", True) for _ in range(2)]
    for each, bits in zip(both, ("4bit", "8bit"), strict=True):
        each["target"]["weights"] = None  # of quantised weights there is no hash
        each["provenance"]["config"]["target"]["quantization"] = bits
    with pytest.raises(ValueError, match=r"quantization is '4bit' in 'a' and '8bit' in 'b'"):
        check_comparable([run(both[0]), run(both[1], "b")])


def test_targets_of_another_configuration_are_refused():
    both = [copy.deepcopy(RESULTS) for _ in range(2)]
    for each, theta in zip(both, (1e4, 5e5), strict=True):
        each["target"]["facts"] = {"rope_parameters": {"rope_theta": theta}}
    with pytest.raises(
        ValueError, match=r"target\.rope_theta is '10000\.0' in 'a' and '500000\.0'"
    ):
        check_comparable([run(both[0]), run(both[1], "b")])


def test_every_run_is_compared_with_the_first_and_every_difference_is_told():
    third = changed(*CONFIG, "rule", "block")
    third["provenance"]["threads"] = 8
    with pytest.raises(ValueError, match=r"rule is .* in 'c'; threads is .* in 'c'"):
        check_comparable([run(RESULTS), run(copy.deepcopy(RESULTS), "b"), run(third, "c")])


def test_what_may_differ_passes():
    other = changed("provenance", "git_commit", "2" * 40)
    other["provenance"]["config"]["repeats"] = 5
    other["prompts"] = other["prompts"][::-1]
    assert check_comparable([run(RESULTS), run(other, "b")]) == {}


def test_a_quantised_target_without_a_hash_is_compared_by_name_and_size():
    ours, theirs = changed("target", "weights", None), changed("target", "weights", None)
    assert check_comparable([run(ours), run(theirs, "b")]) == {}
    theirs["target"]["hidden_size"] = 320
    with pytest.raises(ValueError, match="hidden_size is '160' in 'a' and '320'"):
        check_comparable([run(ours), run(theirs, "b")])


def test_old_runs_are_compared_by_where_target_and_prompts_came_from():
    old = changed("schema", "specdec-bench-1")
    del old["target"], old["prompts"]
    other = copy.deepcopy(old)
    assert check_comparable([run(old), run(other, "b")]) == {}
    other["provenance"]["config"]["target"]["path"] = "elsewhere"
    other["provenance"]["config"]["prompts"]["num"] = 4
    with pytest.raises(ValueError, match=r"target\.path is .*prompts\.num is '9' in 'a' and '4'"):
        check_comparable([run(old), run(other, "b")])


def test_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match="'weather' but must be one of schema, target"):
        check_comparable([run(RESULTS)], ["weather"])


def test_ratios_are_of_total_times_of_the_prompts_in_whatever_order_they_stand():
    first, other = run(RESULTS), run(copy.deepcopy(RESULTS), "b")
    arm = next(a for a in other.data["arms"] if a["name"] == "eagle3 tree")
    before = [figures["decode_s"] for figures in arm["per_prompt"]]
    for factor, figures in enumerate(arm["per_prompt"], start=1):
        figures["decode_s"] *= factor
    after = [figures["decode_s"] for figures in arm["per_prompt"]]
    for each in other.data["arms"]:
        each["per_prompt"].reverse()
    other.data["prompts"].reverse()
    rows = {row["arm"]: row for row in comparison([first, other], {}).tables[1].rows}
    for key in ("decode_tokens_per_s", "speedup_vs_plain"):
        assert rows["eagle3 tree"][key] == pytest.approx(sum(before) / sum(after))
        assert rows["plain"][key] == pytest.approx(1.0)


def test_a_comparison_gives_the_ratio_with_an_interval_over_prompts():
    faster = run(made_runs.bench(speed=2.0), "b")
    section = comparison([run(RESULTS), faster], {})
    rows = {row["arm"]: row for row in section.tables[1].rows}
    assert rows["plain"]["decode_tokens_per_s"] == pytest.approx(1.0)
    row = rows["eagle3 chain"]
    low, high = row["decode_tokens_per_s_ci"]
    assert low < row["decode_tokens_per_s"] < high
    assert row["decode_tokens_per_s"] == pytest.approx(2.0, rel=0.03)
    assert row["prompts"] == 9


def test_a_comparison_tells_what_it_cannot_pair():
    other = copy.deepcopy(RESULTS)
    other["arms"] = [arm for arm in other["arms"] if arm["name"] != "eagle3 tree"]
    for prompt in other["prompts"]:
        prompt["fingerprint"] += "?"
    runs = [run(RESULTS), run(other, "b")]
    section = comparison(runs, check_comparable(runs, ["prompts"]))
    said = " ".join(section.missing)
    assert "Arms that only a has: eagle3 tree." in said
    assert "a and b share none" in said
    assert any(row["note"] == "allowed: --allow prompts" for row in section.tables[0].rows)


def test_an_arm_that_was_limited_otherwise_is_told():
    other = copy.deepcopy(RESULTS)
    other["provenance"]["config"]["arms"][0]["draft_length"] = {1: 2}
    runs = [run(RESULTS), run(other, "b")]
    rows = comparison(runs, check_comparable(runs)).tables[0].rows
    told = next(row for row in rows if row["key"] == "arm eagle3 chain")
    assert told["other"] == f"{told['first']} draft_length {{1: 2}}"


@pytest.mark.parametrize("kind", ["analysis", "suite"])
def test_runs_of_another_kind_that_are_not_alike_come_with_a_warning(kind):
    content = getattr(made_runs, kind)(RESULTS)
    other = copy.deepcopy(content)
    runs = [Run(kind, label, Path(label), each) for label, each in (("a", content), ("b", other))]
    assert not_alike(runs) == []
    other["provenance"]["dtype"] = "bfloat16"
    (said,) = not_alike(runs)
    assert said.startswith("Do not compare a with b: dtype is float32 and bfloat16")
    assert said in build_document(runs).warnings


def test_two_suites_that_ask_different_questions_need_no_warning():
    content = made_runs.suite(RESULTS)
    other = copy.deepcopy(content) | {"suite": "multi_turn"}
    other["provenance"]["dtype"] = "bfloat16"
    assert not_alike([Run("suite", n, Path(n), c) for n, c in (("a", content), ("b", other))]) == []
