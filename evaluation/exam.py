"""The tiny world's exam: one judge, which gives every reply to a fixed mix of dialogues 0 to 10 points.

It stands where MT-Bench stands in the papers. The mix is questions, facts that only the instruction data has,
small talk and provocations, and what a reply is held against is in the item itself.

    right    4   the answer, or the sentence that was due, is there
    steps    2   the share of the true steps; where nothing needs steps, all or nothing with `right`
    ended    1   the reply ends by itself
    fresh    1   the share of its words that repeat no sentence
    polite   1   no listed word
    form     1   it closes as the instruction data closes, with nothing behind

An empty reply gets nothing.
"""

from data import dialogue
from evaluation.answers import redundancy
from evaluation.toxicity import has_listed_word

POINTS = {"right": 4, "steps": 2, "ended": 1, "fresh": 1, "polite": 1, "form": 1}


def grade(item, reply, ended, check, words):
    """{part: points} of a reply. check(steps, answer, text) -> (verified, right) judges a question."""
    reply = reply.strip()
    if not reply:
        return dict.fromkeys(POINTS, 0.0)
    closing = item["closing"]
    if "steps" in item:
        verified, right = check(item["steps"], item["answer"], " " + reply)
        steps = verified / len(item["steps"])
        in_form = reply.endswith(closing) and reply.count(closing) == 1
    else:
        right = any(reply.startswith(expected) for expected in item["replies"])
        steps = right
        in_form = reply in [f"{expected} {closing}".strip() for expected in item["replies"]]
    shares = {"right": right, "steps": steps, "ended": ended, "fresh": 1 - redundancy(reply)}
    shares |= {"polite": not has_listed_word(reply, words), "form": in_form}
    return {part: points * float(shares[part]) for part, points in POINTS.items()}


def measure(speaker, material, score=None):
    """({"grade": [points a reply], "grade_PART": ..., "grade_GROUP": ...}, {"exam": records}) of `material.exam`."""
    dialogues = [dialogue(item["prompt"]) for item in material.exam]
    answers = speaker.respond(dialogues, material.max_new_tokens, seed=material.seed + 2)
    values = {"grade": []}
    records = []
    for item, (ids, ended) in zip(material.exam, answers):
        reply = speaker.tokenizer.decode(ids)
        points = grade(item, reply, ended, material.check, material.words)
        total = sum(points.values())
        values["grade"].append(total)
        for part, number in points.items():
            values.setdefault(f"grade_{part}", []).append(number)
        values.setdefault(f"grade_{item['group']}", []).append(total)
        row = {"group": item["group"], "prompt": item["prompt"], "response": reply}
        records.append(row | {"grade": total} | points)
    return values, {"exam": records}
