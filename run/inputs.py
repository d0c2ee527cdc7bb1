"""What the stages read: the options that name it, and files as the trainers take them. What is cut, left out
or held out is printed, with the option that changes it."""

import random
from dataclasses import dataclass

from data import dialogue, read_instructions, read_preferences, read_prompts, split_by_first_turn
from ppo import Prompt
from reward import encode_pair
from run.folder import ASKED
from sft import chat_example
from support.files import InputError
from support.options import option

PPO = ("plus", "coarse")
VALIDATION_PROMPTS = 16  # about as many prompts does the merge's sweep ask


@dataclass
class InputOptions:
    TITLE = "input"
    READ_BY = (*PPO, "fine")

    model: str = option("", "base model: a folder or a hub id", read_by=ASKED)
    sft_model: str = option("", "instruction model of the fine stage (default OUT/sft)", read_by=("fine",))
    reward_model: str = option("", "reward model (default OUT/reward)", read_by=(*PPO, "fine", "eval"))
    preferences: str = option(
        "", "preference pairs: a file, a folder or a hub id (HH, or prompt/chosen/rejected lines)", read_by=("reward",)
    )
    instructions: str = option(
        "", "instruction data of sft: a file, a folder or a hub id (Alpaca, ShareGPT ...)", read_by=("sft",)
    )
    prompts: str = option("", "prompts of PPO: a file, a folder or a hub id (Anthropic/hh-rlhf:harmless-base)")
    max_prompt: int = option(
        512, "tokens of a PPO prompt; longer ones are left out and counted", least=1, most=2**20, read_by=PPO
    )
    score: str = option(
        "", "module:function that scores instead of a reward model: texts -> a number each", read_by=PPO
    )
    second_score: str = option("", "module:function, logged as second_score and never trained on", read_by=PPO)


def read_pairs(run, tokenizer):
    """(pairs to train on, pairs to test on, the file of each of these) of --preferences; a pair is (chosen
    ids, rejected ids). No first human turn is on both sides."""
    options = run.options
    pairs, files = run.read_rows(read_preferences, "preferences")
    rows = [(*pair, file) for pair, file in zip(pairs, files)]
    parts = []
    for part in split_by_first_turn(rows, options.held_out, options.seed):
        encoded = []
        for prompt, chosen, rejected, file in part:
            pair = encode_pair(tokenizer, dialogue(prompt), chosen, rejected, options.max_length)
            if pair[0] != pair[1]:  # cutting makes some pairs alike
                encoded.append((pair, file))
        parts.append(encoded)
    train, test = parts
    if not train or not test:
        split = f"{len(train)} to train on and {len(test)} to test on"
        raise InputError(f"--preferences: {len(pairs)} pairs leave {split} (--held-out)")
    lengths = [1 + max(map(len, pair)) for pair, _ in train + test]  # with EOS
    note_cuts(lengths, options.max_length, len(pairs) - len(lengths))
    random.Random(options.seed).shuffle(test)  # files are read one after the other
    test_pairs, test_files = zip(*test[: options.test_pairs])
    return [pair for pair, _ in train], test_pairs, test_files


def read_examples(run, tokenizer):
    """[(ids, loss mask)] of the dialogues of --instructions."""
    options = run.options
    dialogues, _ = run.read_rows(read_instructions, "instructions")
    examples = [chat_example(tokenizer, messages, options.max_length) for messages in dialogues]
    examples = [(ids, mask) for ids, mask in examples if any(mask[1:])]  # the first token is never predicted
    if not examples:
        within = f"begins within {options.max_length} tokens"
        raise InputError(f"--instructions: no answer in {options.instructions} {within}")
    note_cuts([len(ids) for ids, _ in examples], options.max_length, len(dialogues) - len(examples))
    return examples


def note_cuts(lengths, max_length, dropped):
    cut = sum(length >= max_length for length in lengths)
    if cut or dropped:
        print(f"--max-length: {cut} of {len(lengths)} rows are cut at {max_length} tokens, {dropped} more left out")


def read_ppo_prompts(run, tokenizer):
    """`Prompt`s as the actor reads them, the stage's system prompt in front or in place of their own. The
    score function gets the messages as the data has them, since the reward model was trained on such."""
    options = run.options
    system = [{"role": "system", "content": options.system_prompt}] if options.system_prompt else []
    texts, _ = run.read_rows(read_prompts, "prompts")
    texts, validation = hold_out(texts, options)
    if validation:
        print(f"--prompts: {len(validation)} are held out, for the merge's sweep")
    prompts = []
    for text in texts:
        messages = dialogue(text)
        turns = [message for message in messages if message["role"] != "system"] if system else messages
        ids = tokenizer.encode_chat(system + turns)
        if len(ids) <= options.max_prompt:
            prompts.append(Prompt(ids, messages))
    if len(prompts) < len(texts):
        count = f"{len(texts) - len(prompts)} prompts of more than {options.max_prompt} tokens left out"
        print(f"{count}, {len(prompts)} remain (--max-prompt)")
    if not prompts:
        raise InputError(f"--prompts: none of {options.prompts} is within {options.max_prompt} tokens")
    return prompts


def hold_out(prompts, options):
    """(prompts to train on, prompts that the merge's sweep asks), split by first human turn, whatever the
    seed. The tiny world has a validation set of its own."""
    if options.preset == "tiny":
        return prompts, []
    train, validation = split_by_first_turn(prompts, min(0.1, VALIDATION_PROMPTS / len(prompts)), 0)
    return (train, validation) if train else (prompts, [])
