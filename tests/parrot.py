"""A model that says what it is told to: what `generate` and the metrics see of a model."""

import torch
from torch import nn

from model import Config


class Parrot(nn.Module):
    """Says `script` (ids), whatever it is asked, then EOS for ever: what `generate` and the metrics see of a model."""

    def __init__(self, script, vocab_size, eos_id=2):
        super().__init__()
        self.script, self.eos_id, self.asked = script, eos_id, []
        self.config = Config(
            vocab_size=vocab_size, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
        )
        self.lm_head = nn.Linear(vocab_size, vocab_size, bias=False)
        nn.init.eye_(self.lm_head.weight)
        self.device = torch.device("cpu")

    def model(self, tokens, mask=None, cache=None):
        if cache is None:  # read, not asked: each row ends with the script
            hidden = torch.zeros(*tokens.shape, self.lm_head.in_features)
            for row, real in enumerate(mask.sum(1).tolist()):
                for k, word in enumerate(self.script):
                    hidden[row, real - len(self.script) - 1 + k, word] = 60.0
            return hidden
        cache.said = getattr(cache, "said", -1) + 1
        if cache.said == 0:
            self.asked += [t[m].tolist() for t, m in zip(tokens, mask)]
        word = self.script[cache.said] if cache.said < len(self.script) else self.eos_id
        hidden = torch.zeros(*tokens.shape, self.lm_head.in_features)
        hidden[:, -1, word] = 60.0
        return hidden


def parrot(tokenizer, text):
    return Parrot(tokenizer.encode(text), tokenizer.vocab_size)


def user(text):
    return [{"role": "user", "content": text}]
