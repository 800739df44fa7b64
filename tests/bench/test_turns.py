"""Second turns follow the target's own first answers."""

import pytest

from specdec import generate_baseline, load_target
from specdec.bench.prompts import load_prompts
from specdec.bench.workloads import unfold_turns
from specdec.common.messages import BenchPrompt
from specdec.demo import demo_path

try:
    demo_path("target")
except FileNotFoundError:
    pytest.skip("the demo models are not there", allow_module_level=True)


def user(text):
    return {"role": "user", "content": text}


def test_each_follow_up_is_asked_after_the_target_s_own_answer():
    target = load_target("demo")
    first = BenchPrompt("a", "coffee", (user("One latte please."),), follow_ups=("Yes.", "Thanks."))
    plain = BenchPrompt("b", "coffee", (user("A mocha."),))
    unfolded = unfold_turns([first, plain], target, max_new_tokens=12)
    assert [prompt.id for prompt in unfolded] == ["a", "a-turn2", "a-turn3", "b"]
    answers = [
        generate_baseline(target, [list(prompt.messages)], max_new_tokens=12)[0].text
        for prompt in unfolded[:2]
    ]
    assert list(unfolded[2].messages) == [
        user("One latte please."),
        {"role": "assistant", "content": answers[0]},
        user("Yes."),
        {"role": "assistant", "content": answers[1]},
        user("Thanks."),
    ]
    assert not any(prompt.follow_ups for prompt in unfolded)


def test_mt_bench_brings_its_second_turns(tmp_path):
    folder = tmp_path / "mt_bench"
    folder.mkdir()
    (folder / "question.jsonl").write_text(
        '{"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]}\n'
    )
    (prompt,) = load_prompts("mt_bench", 5, data_dir=str(tmp_path))
    assert prompt.messages == (user("Write."),)
    assert prompt.follow_ups == ("Rewrite.",)
    assert prompt.domain == "writing"
