"""PPO with a reward of your own, on the bundled tiny model, in some ten seconds on one core:

    pip install -e .
    python docs/own_reward.py

The reward here is the number of words, negative. It rises from about -10 to about -5, and the last line
shows how: the model answers at once, where the base writes steps down. A higher kl_coefficient keeps it
nearer to the base. `actor.save_pretrained(folder, tokenizer.files)` leaves a folder that transformers opens."""

from copy import deepcopy

import torch

from data import dialogue, read_prompts, world
from generation import Sampling
from length import FixedLimit
from model import Mistral, ScalarModel
from ppo import PPOOptions, PPOTrainer, Prompt, Roles
from tokenizer import load_tokenizer

BASE = world.TINY / "base"  # or any folder or hub id of a Mistral or Llama
tokenizer = load_tokenizer(BASE)


def reward(dialogues, responses):
    """A number for each response, a list of token ids. Its dialogue is there too, as a list of messages."""
    texts = [tokenizer.decode(ids) for ids in responses]
    return torch.tensor([-float(len(text.split())) for text in texts])


prompts = []
for text in read_prompts(world.TINY / "prompts.txt"):
    messages = dialogue(text)  # [{"role": "user", "content": ...}]
    prompts.append(Prompt(tokenizer.encode_chat(messages), messages))

actor = Mistral.from_pretrained(BASE)
reference = deepcopy(actor)  # stays as it is; KL is measured from it
critic = ScalarModel.over(deepcopy(actor))  # predicts the reward that is still to come
sampling = Sampling(eos_id=tokenizer.eos_id, stop=tokenizer.stop)  # where a response ends by itself
limit = FixedLimit(48)  # tokens of a response at most
options = PPOOptions(steps=6, batch=32, minibatches=2, lr=1e-3, critic_lr=1e-3, kl_coefficient=0.02)

trainer = PPOTrainer(Roles(actor, reference, critic), prompts, reward, limit, sampling, options)
for step in range(options.steps):
    metrics, samples = trainer.step()
    print(f"step {step + 1}: reward {metrics['raw_score']:.2f}, KL {metrics['kl']:.2f} nats")
print(tokenizer.decode(samples[0].response))
