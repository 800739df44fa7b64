"""Prompts as chat templates write them, and what stands between an answer and the next one."""

import pytest
from tiny_chat import END, letter_tokenizer, said, spelled, user

from specdec.data.dialogue import Chat, load_chat

EOT = chr(32 + END)
LOOP = "{% for m in messages %}BODY{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
ASKED = [
    [{"role": "system", "content": "be kind"}, *user("one")],
    [*user("two", "three")],
]


def chat(body):
    return Chat(letter_tokenizer(LOOP.replace("BODY", body.replace("EOT", EOT))), (END,))


@pytest.mark.parametrize(
    ("body", "between"),
    [
        ("{{ m['role'][0] + ':' + m['content'] + 'EOT' }}", f"u:two{EOT}u:three{EOT}a:"),
        # A line break behind the end of the turn belongs to no answer.
        ("{{ m['role'][0] + ':' + m['content'] + 'EOT/' }}", f"/u:two{EOT}/u:three{EOT}/a:"),
        # Contents are trimmed, and thoughts taken out of earlier answers.
        (
            "{{ m['role'][0] + ':' + (m['content'] | trim).split('~')[-1] + 'EOT' }}",
            f"u:two{EOT}u:three{EOT}a:",
        ),
    ],
)
def test_the_next_turn_begins_behind_the_end_that_the_target_wrote(body, between):
    found = chat(body).follow_up(ASKED, END)
    assert spelled(found) == between
    assert chat(body).text([*ASKED[0], said("hi"), *ASKED[1]]).endswith(f"hi{EOT}{between}")


@pytest.mark.parametrize(
    ("body", "last"),
    [
        ("{{ m['role'][0] + ':' + m['content'] + '/' }}", END),  # no end of turn
        ("{% if m['role'] == 'user' %}{{ m['content'] + 'EOT' }}{% endif %}", END),  # no answers
        ("{{ m['content'] + 'EOT' }}", END + 1),
    ],
)
def test_template_that_does_not_go_on_behind_it_gives_nothing(body, last):
    assert chat(body).follow_up(ASKED, last) is None


def test_a_template_that_refuses_a_conversation_says_why():
    refusing = chat("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="the chat template refuses it: roles must alternate"):
        refusing.text(ASKED[0])


def test_the_end_of_a_turn_is_the_templates_or_else_the_tokenizers():
    assert chat("{{ m['content'] + 'EOT' }}").end_of_turn(ASKED[0]) == [END]
    assert chat("{{ m['content'] + '/' }}").end_of_turn(ASKED[0]) == [END]
    assert chat("{{ m['content'] }}").end_of_turn([]) == [END]


def test_a_chat_is_loaded_without_the_targets_weights(tmp_path):
    letter_tokenizer().save_pretrained(tmp_path)
    assert load_chat(str(tmp_path)).ends == {END}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert load_chat(str(tmp_path)).ends == {3, 4, END}
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_chat(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_chat(str(tmp_path / "empty"))
