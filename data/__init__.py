"""Data: readers of the public formats (`readers.py`), and a small synthetic world (`world.py`)."""

from data.readers import (  # noqa: F401
    dialogue,
    hh_prompt,
    dialogue_text,
    read_instructions,
    read_preferences,
    read_prompts,
    split_by_first_turn,
)
