"""Answers to dialogues: how a model is asked, and what can be counted in an answer without a judge.

respond(model, tokenizer, dialogues, 256)    ->  [(ids, ended)], sampled
quality(texts)                               ->  {metric: [a value a text]}
"""

import re
import zlib

from model import generate

# ---------------------------------------------------------------- asking


def respond(model, tokenizer, dialogues, max_new_tokens, *, eos=True, temperature=1.0, seed=0, batch=256):
    """Responses to message lists, or to plain texts that are continued: [(ids without the ending, ended)]. A response
    ends at EOS or at a stop string of the template, which is cut off; `eos=False` never lets it end."""
    stop = tokenizer.stop if eos else None
    prompts = [
        tokenizer.encode(d, bos=tokenizer.plain_bos) or [tokenizer.eos_id]
        if isinstance(d, str)
        else tokenizer.encode_chat(d)
        for d in dialogues
    ]
    ending = dict(eos_id=tokenizer.eos_id) if eos else dict(forbid=(tokenizer.eos_id,))
    out = []
    for i in range(0, len(prompts), batch):
        for ids in generate(
            model, prompts[i : i + batch], max_new_tokens, temperature, seed=seed + i, stop=stop, **ending
        ):
            ended = ids[-1] == tokenizer.eos_id or stop is not None and stop(ids)
            out.append((tokenizer.trim(ids[:-1] if ids[-1] == tokenizer.eos_id else ids) if eos else ids, ended))
    return out


# ---------------------------------------------------------------- depth, redundancy, segmentation


def redundancy(text):
    """Share of the words of `text` that stand in a sentence said before in it, word for word.

    >>> redundancy("It is red. So it is. It is red.")
    0.3333333333333333
    """
    said, words, repeated = set(), 0, 0
    for sentence in re.split(r"[.!?\n]+", text.lower()):
        n = len(sentence.split())
        words += n
        repeated += n if sentence.strip() in said else 0
        said.add(sentence.strip())
    return repeated / words if words else 0.0


def distinct(text, n):
    """Different n-grams of words by all n-grams (Li et al. 2016); 1.0 where there is none. The share of repeated
    n-grams is 1 less it.

    >>> distinct("a b a b a", 2)
    0.5
    """
    words = text.lower().split()
    grams = list(zip(*(words[i:] for i in range(n))))
    return len(set(grams)) / len(grams) if grams else 1.0


def compression(text):
    """Bytes of the text by its bytes under zlib: some 1.5 to 2.5 for prose of a paragraph, 10 and more for a loop.
    Grows with length, so compare answers of like lengths. 0.0 for an empty text."""
    data = text.encode()
    return len(data) / len(zlib.compress(data, 9)) if data else 0.0


def structure(text):
    """(paragraphs, sentences, words): paragraphs are parted by a blank line, a line of a list being one sentence;
    sentences end with . ! or ? before a space, or with their line."""
    paragraphs = [p for p in re.split(r"\n\s*\n", text) if p.strip()]
    sentences = [s for s in re.split(r"(?<=[.!?])\s+|\n+", text) if re.search(r"\w", s)]
    return len(paragraphs), len(sentences), len(text.split())


def quality(texts):
    """{metric: [a value a text]} of what needs no judge."""
    shapes = [structure(t) for t in texts]
    return {
        "redundancy": [redundancy(t) for t in texts],
        "distinct_2": [distinct(t, 2) for t in texts],
        "repeated_4": [1 - distinct(t, 4) for t in texts],
        "compression": [compression(t) for t in texts],
        "paragraphs": [p for p, _, _ in shapes],
        "sentences": [s for _, s, _ in shapes],
        "words_a_sentence": [w / s if s else 0.0 for _, s, w in shapes],
    }
