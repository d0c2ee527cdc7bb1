"""Does the tiny world's analysis matter? Correct answers of a model that is made to answer at once, and of one
that is made to begin with the first step, by kind of question and number of steps. Greedy.

    python evidence/chance.py --model data/tiny/base --questions 100
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import world
from model import Mistral, generate
from tokenizer import load_tokenizer


def share_right(model, tokenizer, questions, starts):
    """Share of `questions` that are answered rightly when the reply to each begins with the text in `starts`."""
    prompts = [tokenizer.encode(world.dialogue(q.text, start), bos=True) for q, start in zip(questions, starts)]
    replies = generate(model, prompts, 128, temperature=0, eos_id=tokenizer.eos_id)
    right = 0
    for question, start, ids in zip(questions, starts, replies):
        _, is_right = world.check(question.steps, question.answer, f"{start} {tokenizer.decode(ids)}")
        right += is_right
    return right / len(questions)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--model", default="data/tiny/base")
    parser.add_argument("--questions", type=int, default=100)
    options = parser.parse_args()
    model = Mistral.from_pretrained(options.model)
    tokenizer = load_tokenizer(options.model)
    print("kind    steps  at once  step by step  chance")
    for kind in world.KINDS:
        for n in range(1, 7):
            rng = random.Random(f"chance {kind} {n}")
            questions = [world.draw_question(rng, n, kind) for _ in range(options.questions)]
            at_once = share_right(model, tokenizer, questions, [" The answer is"] * len(questions))
            first_words = [" " + question.steps[0].split()[0] for question in questions]
            stepwise = share_right(model, tokenizer, questions, first_words)
            print(f"{kind:7} {n:5}  {at_once:7.2f}  {stepwise:12.2f}  {1 / len(questions[0].choices):6.2f}")


if __name__ == "__main__":
    main()
