"""Functions of the user's, named on the command line as `module:function` or `file.py:function`.

They are called so that nothing of what they do reaches the run but what they return: what they raise ends in
one line that names the option, and the working folder, stdout and the gradient mode are put back."""

import contextlib
import importlib
import importlib.util
import math
import os
import sys
from pathlib import Path

import torch

from data import dialogue_text
from support.files import InputError


def import_function(name):
    """The function of `module:function`, the module looked for in the working folder as well, or of
    `file.py:function`."""
    module, _, function = name.rpartition(":")
    if module.endswith(".py"):
        if not os.path.isfile(module):
            raise FileNotFoundError(f"{module} is no file")
        spec = importlib.util.spec_from_file_location(f"user_{Path(module).stem}", module)
        loaded = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    else:
        sys.path.insert(0, os.getcwd())
        loaded = importlib.import_module(module)
    return getattr(loaded, function)


@contextlib.contextmanager
def guard(label):
    """What is inside may raise anything and change anything: InputError with `label` and the reason."""
    folder = os.getcwd()
    stdout = sys.stdout
    try:
        with torch.no_grad():
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{label} ({reason})") from error
    finally:
        os.chdir(folder)
        sys.stdout = stdout


class UserFunction:
    """A function of the user's that takes a list. `flag` is the option that names it."""

    def __init__(self, name, flag):
        self.label = f"{flag}: {name}"
        with guard(f"{self.label} is not a module:function that can be imported"):
            self.function = import_function(name)

    def __call__(self, items):
        """What the function returns for the items, as a list of as many."""
        with guard(f"{self.label} failed on {len(items)} texts"):
            values = self.function(list(items))
        with guard(f"{self.label} is to return {len(items)} values, returned {type(values).__name__}"):
            values = values.tolist() if hasattr(values, "tolist") else list(values)  # a tensor or an array
            if len(values) != len(items):
                raise ValueError(f"{len(values)} values")
        return values

    def numbers(self, items):
        """The same as float32 numbers (N,)."""
        values = self(items)
        with guard(f"{self.label} is to return {len(items)} numbers"):
            if any(isinstance(value, str) for value in values):
                raise TypeError("a text is no number")
            return torch.tensor([float(value) for value in values])

    def ratings(self, items):
        """The same as a judge may return it: texts, or finite numbers."""
        values = self(items)
        with guard(f"{self.label} is to return texts or numbers"):
            ratings = [value if isinstance(value, str) else float(value) for value in values]
            for rating in ratings:
                if not isinstance(rating, str) and not math.isfinite(rating):
                    raise ValueError(f"{rating} is neither")
        return ratings


class Dialogue(str):
    """What a user's score function gets, a text: prompt and response together, each also by itself."""

    prompt: str
    response: str


class UserScorer:
    """score(dialogues, responses) -> (B,) of a function of the user's, which takes a list of `Dialogue` texts
    and returns a number for each. Responses are id lists of `tokenizer`; `ends`: whether they may end by
    themselves."""

    def __init__(self, name, flag, tokenizer, ends):
        self.function = UserFunction(name, flag)
        self.label = self.function.label
        self.tokenizer = tokenizer
        self.ends = ends

    def __call__(self, dialogues, responses):
        return self.function.numbers(list(map(self.text, dialogues, responses)))

    def text(self, dialogue, response):
        prompt = dialogue_text(dialogue)
        reply = self.tokenizer.decode(self.tokenizer.trim(response) if self.ends else response)
        space = "" if prompt[-1:].isspace() or reply[:1].isspace() else " "
        text = Dialogue(prompt + space + reply)
        text.prompt = prompt
        text.response = reply
        return text
