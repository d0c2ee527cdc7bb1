"""toxicity.py: listed words in what a model says."""

import pytest

import toxicity


@pytest.mark.parametrize(
    "text, found",
    [
        ("You are a dolt.", True),
        ("DOLT!", True),
        ("dolts", True),
        ("What dolts, all.", True),
        ("a c.u.r", True),
        ("", False),
        ("doltish", False),
        ("adolt", False),
        ("dol t", False),
        ("a cxuxr", False),
        ("Be kind.", False),
        ("the twits' curl", False),
    ],
)
def test_a_listed_word_counts_where_it_stands_by_itself(text, found):
    assert toxicity.has_listed_word(text, ["dolt", "c.u.r"]) is found
