"""Functions of the user's, named on the command line as `module:function`."""

import importlib
import os
import sys

import torch

from data import dialogue_text
from support.files import InputError


def import_function(name, flag):
    """The function of `module:function`, the module looked for in the working folder as well."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # it may be anything that the module does
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{flag}: {name} is not a module:function that can be imported ({reason})") from error


class Dialogue(str):
    """What a user's score function gets, a text: prompt and response together, each also by itself."""

    prompt: str
    response: str


class UserScorer:
    """score(dialogues, responses) -> (B,) of a function of the user's, which takes a list of `Dialogue` texts
    and returns a number for each. Responses are id lists of `tokenizer`; `ends`: whether they may end by
    themselves."""

    def __init__(self, name, flag, tokenizer, ends):
        self.label = f"{flag}: {name}"
        self.function = import_function(name, flag)
        self.tokenizer = tokenizer
        self.ends = ends

    def __call__(self, dialogues, responses):
        texts = list(map(self.text, dialogues, responses))
        try:
            scores = torch.as_tensor(self.function(texts), dtype=torch.float32)
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{self.label} failed on {len(texts)} texts ({reason})") from error
        if scores.shape != (len(texts),):
            raise InputError(f"{self.label} is to return {len(texts)} numbers, got shape {tuple(scores.shape)}")
        return scores.detach().cpu()

    def text(self, dialogue, response):
        prompt = dialogue_text(dialogue)
        reply = self.tokenizer.decode(self.tokenizer.trim(response) if self.ends else response)
        space = " " if prompt.endswith(":") and not reply.startswith(" ") else ""
        text = Dialogue(prompt + space + reply)
        text.prompt = prompt
        text.response = reply
        return text
