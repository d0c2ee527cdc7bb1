"""dialogues.py: how answers are taken from a model, and what is counted in them."""

import pytest
from parrot import parrot, user

import dialogues
from data import world
from tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(world.TINY)


# ---------------------------------------------------------------- responses


def test_a_response_ends_at_eos_or_at_the_limit(tokenizer):
    said = parrot(tokenizer, "I am well.")
    ids = tokenizer.encode("I am well.")
    assert dialogues.respond(said, tokenizer, [user("Hello!"), user("Where is Lum?")], 20) == [(ids, True)] * 2
    assert said.asked == [tokenizer.encode_chat(user(t)) for t in ("Hello!", "Where is Lum?")]
    assert dialogues.respond(said, tokenizer, [user("Hello!")], len(ids)) == [(ids, False)]
    assert dialogues.respond(said, tokenizer, [user("Hello!")], 2, batch=1) == [(ids[:2], False)]


def test_without_eos_a_response_runs_to_the_limit(tokenizer):
    ((ids, ended),) = dialogues.respond(parrot(tokenizer, "I am well."), tokenizer, [user("Hello!")], 30, eos=False)
    assert len(ids) == 30 and tokenizer.eos_id not in ids and not ended


def test_the_next_turn_of_the_human_ends_a_response(tokenizer):
    ((ids, ended),) = dialogues.respond(
        parrot(tokenizer, "I am well.\n\nHuman: And you?"), tokenizer, [user("Hello!")], 30
    )
    assert ended and "And" not in tokenizer.decode(ids)


def test_the_stop_string_is_no_part_of_the_response(tokenizer):
    ((ids, _),) = dialogues.respond(parrot(tokenizer, "I am well.\n\nHuman: And you?"), tokenizer, [user("Hello!")], 30)
    assert tokenizer.decode(ids) == "I am well."


# ---------------------------------------------------------------- text


@pytest.mark.parametrize(
    "text, share",
    [
        ("", 0.0),
        ("   ", 0.0),
        ("It is red.", 0.0),
        ("...", 0.0),
        ("It is red. It is red.", 1 / 2),
        ("It is red. So it is. It is red.", 1 / 3),
        ("Yes! Yes? yes", 2 / 3),  # endings and case do not make it another sentence
        ("A b c. A b. A b c.", 3 / 8),  # a part of a sentence is not the sentence
        ("Add 5: 2. Add 5: 7.", 0.0),
        ("So it is red.   So it is red.", 1 / 2),
        ("Stop.\nStop.\nGo", 1 / 3),
        ("It was\nIt was", 1 / 2),
        ("The answer is red. The answer is blue.", 0.0),
        ("An inn. An inn again.", 0.0),
    ],
)
def test_redundancy_is_the_share_of_words_in_sentences_already_said(text, share):
    assert dialogues.redundancy(text) == pytest.approx(share)
