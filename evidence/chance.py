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


def correct(model, tokenizer, questions, beginning):
    """Share of `questions` that are answered right when the reply begins with `beginning(question)`."""
    begun = [beginning(q) for q in questions]
    prompts = [tokenizer.encode(world.dialogue(q.text, b), bos=True) for q, b in zip(questions, begun)]
    replies = generate(model, prompts, 128, temperature=0, eos_id=tokenizer.eos_id)
    texts = [f"{b} {tokenizer.decode(r)}" for b, r in zip(begun, replies)]
    return sum(world.check(q.steps, q.answer, t)[1] for q, t in zip(questions, texts)) / len(questions)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="data/tiny/base")
    parser.add_argument("--questions", type=int, default=100)
    o = parser.parse_args()
    model, tokenizer = Mistral.from_pretrained(o.model), load_tokenizer(o.model)
    print("kind    steps  at once  step by step  chance")
    for kind in world.KINDS:
        for n in range(1, 7):
            rng = random.Random(f"chance {kind} {n}")
            questions = [world.draw_question(rng, n, kind) for _ in range(o.questions)]
            at_once = correct(model, tokenizer, questions, lambda q: " The answer is")
            stepwise = correct(model, tokenizer, questions, lambda q: " " + q.steps[0].split()[0])
            print(f"{kind:7} {n:5}  {at_once:7.2f}  {stepwise:12.2f}  {1 / len(questions[0].choices):6.2f}")


if __name__ == "__main__":
    main()
