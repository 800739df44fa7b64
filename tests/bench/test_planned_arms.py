"""A plan's choice beside given arms: nothing is measured under another's name, or not at all."""

from specdec.bench.arms import add_choice
from specdec.bench.config import ArmConfig


def row(name, **options):
    return {"name": name, "type": "ngram", "options": options}


def added(choice, *arms):
    """What becomes of a plan that knows two configurations and chose one."""
    content = {"choice": choice, "configurations": [choice, row("other")]}
    chosen = [ArmConfig(choice["name"], "ngram", dict(choice["options"]))]
    return add_choice(content, chosen, arms)


def test_a_choice_that_is_a_given_arm_is_measured_once():
    given = ArmConfig("five", "ngram", {"num_draft_tokens": 5})
    plan, arms = added(row("five", num_draft_tokens=5), given)
    assert arms == [given]
    assert plan["choice"]["name"] == "five"


def test_a_choice_of_another_name_comes_first():
    given = ArmConfig("five", "ngram", {"num_draft_tokens": 5})
    _, arms = added(row("three", num_draft_tokens=3), given)
    assert arms == [ArmConfig("three", "ngram", {"num_draft_tokens": 3}), given]


def test_a_choice_with_the_name_of_another_configuration_gets_one_of_its_own():
    choice = row("five", num_draft_tokens=5)
    for given in (
        ArmConfig("five", "ngram", {"num_draft_tokens": 4}),
        ArmConfig("five", "suffix", {"num_draft_tokens": 5}),
        ArmConfig("five", "ngram", {"num_draft_tokens": 5}, {1: 2}),
    ):
        plan, arms = added(choice, given)
        assert arms == [ArmConfig("five (planned)", "ngram", {"num_draft_tokens": 5}), given]
        assert plan["choice"] == {**choice, "name": "five (planned)"}
        assert [each["name"] for each in plan["configurations"]] == ["five (planned)", "other"]


def test_the_new_name_is_none_that_a_given_arm_has():
    given = [ArmConfig("five", "ngram"), ArmConfig("five (planned)", "ngram")]
    _, arms = added(row("five", num_draft_tokens=5), *given)
    assert [arm.name for arm in arms] == ["five (planned) (planned)", "five", "five (planned)"]


def test_a_configuration_that_was_not_chosen_does_not_pass_for_an_arm_of_its_name():
    given = ArmConfig("other", "ngram", {"min_ngram": 2})
    plan, arms = added(row("five"), given)
    assert [arm.name for arm in arms] == ["five", "other"]
    assert [each["name"] for each in plan["configurations"]] == ["five", "other (planned)"]


def test_where_plain_decoding_is_chosen_the_given_arms_stay_alone():
    plain = {"name": "plain", "type": "plain", "options": {}}
    given = [ArmConfig("five", "ngram")]
    plan, arms = add_choice({"choice": plain, "configurations": [row("five")]}, [], given)
    assert arms == given
    assert plan["choice"] == plain
