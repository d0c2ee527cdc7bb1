"""Data: readers of the public formats (`readers.py`), and a small synthetic world (`world.py`)."""

from data.readers import data_files, dialogue, dialogue_text, hh_prompt, split_by_first_turn  # noqa: F401
from data.readers import read_instructions, read_preferences, read_prompts  # noqa: F401
