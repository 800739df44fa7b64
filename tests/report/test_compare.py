"""Runs that are not comparable are refused, each difference by name, and let pass by name."""

from copy import deepcopy

import made_runs
import pytest
from made_runs import changed, run

from specdec.report.compare import (
    MUST_AGREE,
    add_comparison,
    check_comparable,
    warn_of_differences,
)
from specdec.report.document import Section, render
from specdec.report.page import build_report
from specdec.report.tables import words

RESULTS = made_runs.bench()

# Field, the place of its value, another value, and the two values as the message gives them.
CHANGES = [
    ("target", ("target.weights", "c" * 64), RESULTS["target"]["weights"], "c" * 64),
    ("target", ("target.tokenizer", "c" * 64), RESULTS["target"]["tokenizer"], "c" * 64),
    ("prompts", ("prompts.3.fingerprint", "other"), "24 prompts", "24 prompts"),
    ("sampling", ("provenance.config.sampling.temperature", 1.0), "0.0", "1.0"),
    ("sampling", ("provenance.config.sampling.top_p", 0.9), "1.0", "0.9"),
    ("max_new_tokens", ("provenance.config.max_new_tokens", 99), "64", "99"),
    ("batch_size", ("provenance.config.batch_size", 8), "1", "8"),
    ("batch_size", ("provenance.config.prompts_per_call", 4), "0", "4"),
    ("rule", ("provenance.config.rule", "block"), "token", "block"),
    ("dtype", ("provenance.dtype", "bfloat16"), "float32", "bfloat16"),
    ("dtype", ("provenance.quantized", True), "False", "True"),
    ("device", ("provenance.device", "A GPU"), "cpu", "A GPU"),
    ("device", ("provenance.cpu", "Another"), "Intel", "Another"),
    ("device", ("provenance.cpu_count", 64), "2", "64"),
    ("threads", ("provenance.threads", 8), "2", "8"),
    ("processes", ("provenance.processes", 2), "1", "2"),
    ("compile_mode", ("provenance.compile_mode", "inductor"), "eager", "inductor"),
]


@pytest.mark.parametrize(
    ("field", "change", "ours", "theirs"), CHANGES, ids=[change[1][0] for change in CHANGES]
)
def test_difference_is_refused_with_both_values(field, change, ours, theirs):
    runs = [run(RESULTS), run(changed(*change), "b")]
    with pytest.raises(ValueError, match="not comparable") as caught:
        check_comparable(runs)
    message = str(caught.value)
    assert ours in message.split(" in 'a' and ")[0]
    assert theirs in message.split(" in 'a' and ")[1].split(" in 'b'")[0]
    assert f"Run both with the same {field}" in message
    (warning,) = check_comparable(runs, [field])
    assert f"because --allow {field} was given" in warning
    with pytest.raises(ValueError, match=f"--allow {field}"):
        check_comparable(runs, [name for name in MUST_AGREE if name != field][:1])


def test_every_field_has_a_refusal():
    assert {change[0] for change in CHANGES} | {"seed"} == set(MUST_AGREE)
    with pytest.raises(ValueError, match="'weather' but must be one of target, prompts"):
        check_comparable([run(RESULTS)], ["weather"])


def test_seed_matters_only_where_something_is_drawn():
    greedy = changed("provenance.config.seed", 7)
    assert check_comparable([run(RESULTS), run(greedy, "b")]) == []
    place = "provenance.config.sampling.temperature"
    drawn = [changed(place, 0.7, content) for content in (RESULTS, greedy)]
    with pytest.raises(ValueError, match="seed is '0' in 'a' and '7' in 'b'"):
        check_comparable([run(drawn[0]), run(drawn[1], "b")])


# The same change in both runs, one value each, and what the refusal says.
@pytest.mark.parametrize(
    ("place", "values", "message"),
    [
        ("provenance.config.target.quantization", ("4bit", "8bit"), "quantization is '4bit' in"),
        ("provenance.config.target.cache", ("none", "int8"), "cache is 'none' in"),
        ("target.facts", ({"rope": {"base": 1e4}}, {"rope": {"base": 5e5}}), "target.rope.base"),
        ("target.hidden_size", (160, 320), "hidden_size is '160' in 'a' and '320'"),
    ],
)
def test_target_without_hash_is_compared_by_its_facts(place, values, message):
    unknown = changed("target.weights", None)  # quantized weights have no hash
    runs = [run(changed(place, x, unknown), label) for x, label in zip(values, "ab", strict=True)]
    assert check_comparable([runs[0], runs[0]]) == []
    with pytest.raises(ValueError, match=message):
        check_comparable(runs)


def test_every_difference_of_every_run_is_told():
    third = changed("provenance.threads", 8, changed("provenance.config.rule", "block"))
    with pytest.raises(ValueError, match=r"rule is .* in 'c'; threads is .* in 'c'"):
        check_comparable([run(RESULTS), run(RESULTS, "b"), run(third, "c")])


def test_commit_repeats_and_order_of_prompts_may_differ():
    other = changed("provenance.git_commit", "2" * 40)
    other["provenance"]["config"]["repeats"] = 5
    other["prompts"] = other["prompts"][::-1]
    assert check_comparable([run(RESULTS), run(other, "b")]) == []


def test_runs_without_identity_are_compared_by_paths_and_sources():
    content = changed("target", None, changed("prompts", None))
    moved = changed("provenance.config.target.path", "elsewhere", content)
    moved["provenance"]["config"]["prompts"]["num"] = 4
    assert check_comparable([run(content), run(content)]) == []
    with pytest.raises(ValueError, match=r"target\.path is .*prompts\.num is '24' in 'a' and '4'"):
        check_comparable([run(content), run(moved, "b")])


def compared(*runs):
    section = Section(id="comparison", title="Comparison")
    add_comparison(section, runs)
    return section, {row["arm"]: row for row in section.tables[0].rows}


def test_ratios_are_of_total_times_in_any_order():
    other = deepcopy(RESULTS)
    arm = next(each for each in other["arms"] if each["name"] == "eagle3 tree")
    before = [figures["decode_s"] for figures in arm["per_prompt"]]
    for factor, figures in enumerate(arm["per_prompt"], start=1):
        figures["decode_s"] *= factor
    after = [figures["decode_s"] for figures in arm["per_prompt"]]
    for each in (*other["arms"], {"per_prompt": other["prompts"]}):
        each["per_prompt"].reverse()
    _, rows = compared(run(RESULTS), run(other, "b"))
    for key in ("decode_tokens_per_s", "speedup_vs_plain"):
        assert rows["eagle3 tree"][key] == pytest.approx(sum(before) / sum(after))
        assert rows["plain"][key] == pytest.approx(1.0)


def test_comparison_gives_ratio_with_interval():
    other = made_runs.faster(RESULTS, 2.0)
    other["arms"][3]["per_prompt"][0]["decode_s"] *= 3
    _, rows = compared(run(RESULTS), run(other, "b"))
    row = rows["eagle3 chain 4"]
    low, high = row["decode_tokens_per_s_ci"]
    assert low < row["decode_tokens_per_s"] < high <= 2.0 + 1e-9
    assert row["prompts"] == 24


def test_comparison_tells_what_it_cannot_pair():
    other = deepcopy(RESULTS)
    other["arms"] = [arm for arm in other["arms"] if arm["name"] != "eagle3 tree"]
    for prompt in other["prompts"]:
        prompt["fingerprint"] += "?"
    section, _ = compared(run(RESULTS), run(other, "b"))
    said = " ".join(section.missing)
    assert "Arms that only a has: eagle3 tree." in said
    assert "a and b share no prompt" in said


def test_compiled_run_beside_an_eager_one_is_alarming():
    compiled = changed("provenance.compile_mode", "inductor")
    report = build_report([run(RESULTS), run(compiled, "b")], ["compile_mode"])
    (table,) = report.sections[1].tables
    (alarm,) = table.alarms
    assert alarm.startswith("b is compiled (inductor), a is eager")
    texts = {
        n: render(n, report=report, definitions=words()["terms"])
        for n in ("index.html", "report.md")
    }
    assert f'<p class="alarm">{alarm}</p>' in texts["index.html"]
    assert "> **Warning:** b is compiled (inductor), a is eager" in texts["report.md"]
    section, _ = compared(run(compiled), run(compiled, "b"))
    assert section.tables[0].alarms == []


def test_page_begins_with_waiting_threads():
    report = build_report([run(changed("provenance.omp_wait_policy", "passive"))])
    assert any("OMP_WAIT_POLICY is passive" in warning for warning in report.warnings)


def test_settings_tell_options_of_arms():
    other = changed("provenance.config.arms.0.draft_length", {"1": 2})
    report = build_report([run(RESULTS), run(other, "b")])
    settings = next(section for section in report.sections if section.id == "runs").tables[0]
    row = next(row for row in settings.rows if row["name"] == f"arm {RESULTS['arms'][2]['name']}")
    assert "draft_length" not in row["a (bench)"]
    assert "draft_length {1: 2}" in row["b (bench)"]


@pytest.mark.parametrize("kind", ["analysis", "suite"])
def test_other_kinds_that_differ_bring_a_warning(kind):
    content = getattr(made_runs, kind)()
    other = changed("provenance.dtype", "bfloat16", content)
    assert warn_of_differences([run(content, "a", kind), run(content, "b", kind)]) == []
    runs = [run(content, "a", kind), run(other, "b", kind)]
    (said,) = warn_of_differences(runs)
    assert said.startswith("Do not compare a with b: dtype is float32 and bfloat16")
    assert said in build_report(runs).warnings


def test_different_suites_need_no_warning():
    other = changed("provenance.dtype", "bfloat16", made_runs.suite("multi-turn"))
    runs = [run(made_runs.suite(), "a", "suite"), run(other, "b", "suite")]
    assert warn_of_differences(runs) == []
