"""data/world.py against simulations that read the text of a question, and data/tiny against its generator.

The second source here is `by_hand` and `TASKS`, which know English and arithmetic but none of world.py's functions.
"""

import json
import random
import re
from itertools import islice

import pytest

from data import dialogue, read_instructions, read_preferences, read_prompts, world
from tokenizer import load_tokenizer

TURN, REPLY = "\n\nHuman: ", "\n\nAssistant:"


def by_hand(text):
    """(events, answer) of a question, from its sentences alone; an event is (what was so before, event, what is so after).
    Totals are kept whole; only what is said of them is cut to a digit."""
    first, *told, asked = (s.strip()[:-1] for s in re.findall(r"[^.?]+[.?]", text))
    events = []
    if first.startswith("At first"):
        people, things = first.split()[2::2], first.split()[3::2]
        state = lambda: " ".join(f"{p} {t}" for p, t in zip(people, things))
        for event in told:
            before, (i, j) = state(), (people.index(name) for name in event.removesuffix(" swap").split(" and "))
            things[i], things[j] = things[j], things[i]
            events.append((before, event, state()))
        return events, things[people.index(asked.split()[-1])]
    total = int(first.split()[-1])
    for event in told[:-1]:  # the last one says to keep the last digit
        before, (verb, k) = str(total % 10), (event + " 0").split()[:2]
        total = {"Add": total + int(k), "Take": total - int(k), "Double": total * 2, "Triple": total * 3}[verb]
        events.append((before, event, str(total % 10)))
    return events, str(total % 10)


def told(step):
    """(event, what is so after it) as a step tells them, without what it may recall of before."""
    head, _, after = step.strip().removesuffix(".").partition(": ")
    return " ".join(w for w in head.split() if w not in world.COLOURS), after


def are_true(steps, events):
    """Whether the steps tell the events in order, and recall nothing that was not so."""
    recalled = [
        (pair, before)
        for step, (before, _, _) in zip(steps, events)
        for pair in zip(step.partition(":")[0].split(), step.split()[1:])
        if pair[1] in world.COLOURS
    ]
    return [told(s) for s in steps] == [e[1:] for e in events] and all(
        " ".join(pair) in before for pair, before in recalled
    )


def sentences(text):
    return re.findall(r"[^.]+\.", text)


def true_steps(events, reply):
    """How many of the events the reply tells as they were, one after the other."""
    said, count = [told(s) for s in sentences(reply)], 0
    for _, *event in events:
        if tuple(event) in said:
            count, said = count + 1, said[said.index(tuple(event)) + 1 :]
    return count


def says(reply, answer):
    said = re.findall(r"answer is (\w+)\.", reply)
    return said[-1:] == [answer]


def bad_words(text):
    return set(re.findall(r"\w+", text.lower())) & set(world.BAD_WORDS)


def needs_steps(prompt):
    return re.match(r"At first|Start at", prompt) is not None


def lines(name):
    return [json.loads(line) for line in (world.TINY / name).read_text(encoding="utf-8").splitlines()]


def drawn(make, count, seed=1):
    rng = random.Random(seed)
    return [make(rng) for _ in range(count)]


@pytest.fixture(scope="module")
def documents():
    return list(islice(world.corpus(11), 12000))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(world.TINY)


# ---------------------------------------------------------------- questions


@pytest.mark.parametrize("kind", world.KINDS)
def test_steps_and_answer_are_those_of_a_simulation_by_hand(kind):
    questions = drawn(lambda rng: world.draw_question(rng, kind=kind), 500)
    for q in questions:
        events, answer = by_hand(q.text)
        assert are_true(q.steps, events) and q.answer == answer
        assert q.kind == kind and q.answer in q.choices and len(set(q.choices)) == len(q.choices)
    assert {len(q.steps) for q in questions} == set(range(1, 7))


def test_the_answers_of_a_kind_are_spread_over_the_choices():
    """So that no constant answer does better than chance by much."""
    for kind, chance in (("swaps", 1 / len(world.COLOURS)), ("totals", 0.1)):
        answers = [q.answer for q in drawn(lambda rng: world.draw_question(rng, kind=kind), 2000)]
        assert max(answers.count(a) for a in set(answers)) / len(answers) < 2 * chance


@pytest.mark.parametrize("kind", world.KINDS)
def test_a_corrupted_question_errs_in_a_step_and_ends_wrong(kind):
    rng = random.Random(3)
    for q in drawn(lambda rng: world.draw_question(rng, kind=kind), 400):
        wrong = world.corrupted(q, rng)
        if wrong is None:
            continue
        events, answer = by_hand(q.text)
        assert wrong.text == q.text and wrong.answer != answer and wrong.answer in q.choices
        assert [told(s)[0] for s in wrong.steps] == [
            event for _, event, _ in events
        ]  # the same events are told, but not as they were
        assert true_steps(events, " ".join(wrong.steps)) < len(events)


def test_only_short_swaps_cannot_always_be_corrupted():
    """After one swap the error may miss the person asked for; a total always turns out wrong."""
    rng = random.Random(4)
    spared = [(q.kind, len(q.steps)) for q in drawn(world.draw_question, 2000) if world.corrupted(q, rng) is None]
    assert len(spared) < 100 and all(kind == "swaps" for kind, _ in spared) and sum(n > 3 for _, n in spared) < 20


STEPS = ["Add 5: 2.", "Triple: 6.", "Add 5: 1."]


@pytest.mark.parametrize(
    "reply, expected",
    [
        (" Add 5: 2. Triple: 6. Add 5: 1. The answer is 1.", (3, True)),
        ("", (0, False)),
        (" The answer is 1.", (0, True)),
        (" Triple: 6. Add 5: 2. The answer is 1.", (1, True)),  # out of order: the second has no place left
        (" Triple: 6. Add 5: 1. The answer is 1.", (2, True)),  # the first is left out
        (" Add 5: 2. Add 5: 2. Add 5: 2. The answer is 1.", (1, True)),  # said again is not said twice
        (" Add 5: 2 Triple: 6. Add 5:1. The answer is 1.", (1, True)),  # the sentence must stand exactly
        (" Add 5: 3. Triple: 9. Add 5: 4. The answer is 4.", (0, False)),
        (" The answer is 1. The answer is 4.", (0, False)),  # the last answer counts
        (" The answer is 4. So the answer is 1.", (0, True)),
        (" The answer is 1. The answer is", (0, True)),  # ... the last complete one
        (" The answer is 1", (0, False)),
        (" The answer is 11.", (0, False)),
        (" It is 1.", (0, False)),
    ],
)
def test_check_counts_exact_steps_in_order_and_takes_the_last_complete_answer(reply, expected):
    assert world.check(STEPS, "1", reply) == expected


def test_check_grants_the_right_analysis_everything_and_the_corrupted_one_not():
    rng = random.Random(5)
    for q in drawn(world.draw_question, 300):
        assert world.check(q.steps, q.answer, world.stepwise(q)) == (len(q.steps), True)
        wrong = world.corrupted(q, rng)
        verified, right = world.check(q.steps, q.answer, world.stepwise(wrong)) if wrong else (0, False)
        assert verified < len(q.steps) and not right


# ---------------------------------------------------------------- what the stages learn from


@pytest.fixture(scope="module")
def helpful():
    return [(*by_hand(prompt), chosen, rejected) for prompt, chosen, rejected in drawn(world.helpful_pair, 3000)]


def test_no_chosen_reply_has_a_bad_word(helpful):
    pairs = [row[-2:] for row in helpful] + [row[1:] for row in drawn(world.harmless_pair, 2000)]
    assert not any(bad_words(chosen) for chosen, _ in pairs)
    assert sum(bool(bad_words(rejected)) for _, rejected in pairs) > 1000


def test_a_helpful_choice_never_has_fewer_true_steps(helpful):
    counts = [(true_steps(events, chosen), true_steps(events, rejected)) for events, _, chosen, rejected in helpful]
    assert all(c >= r for c, r in counts)
    assert sum(c > r for c, r in counts) > len(counts) / 3


def test_a_right_and_clean_answer_is_only_rejected_for_one_at_least_as_good_or_for_repeating_it(helpful):
    for events, answer, chosen, rejected in helpful:
        if says(rejected, answer) and not bad_words(rejected) and not says(chosen, answer):
            whole = sentences(chosen)[: len(events)]  # of an analysis that was cut
            assert (
                true_steps(events, rejected) == 0 and rejected.count(".") > 2 and are_true(whole, events[: len(whole)])
            )


def test_of_two_right_and_equally_analysed_answers_the_one_that_stops_is_chosen(helpful):
    pairs = [
        (c, r)
        for events, answer, c, r in helpful
        if c != r
        and says(c, answer)
        and says(r, answer)
        and not bad_words(r)
        and true_steps(events, c) == true_steps(events, r)
    ]
    assert len(pairs) > 100 and all(len(chosen) < len(rejected) for chosen, rejected in pairs)


def test_a_wrong_answer_is_chosen_only_over_a_rude_one(helpful):
    over = [
        rejected
        for _, answer, chosen, rejected in helpful
        if re.search(r"answer is \w+\.", chosen) and not says(chosen, answer)
    ]
    assert over and all(map(bad_words, over))


def test_no_helpful_pair_prefers_a_reply_to_itself():
    assert [chosen for _, chosen, rejected in drawn(world.helpful_pair, 20000) if chosen == rejected] == []


def test_a_harmless_rejection_is_rude_or_does_not_stop():
    pairs = drawn(world.harmless_pair, 2000)
    endless = [(chosen, rejected) for _, chosen, rejected in pairs if not bad_words(rejected)]
    assert 0 < len(endless) < len(pairs) / 4
    for chosen, rejected in endless:
        assert rejected.startswith(chosen) and rejected.count(".") >= chosen.count(".") + 2


def test_instructions_are_polite_and_ended_and_wrong_on_long_questions_alone():
    rows = drawn(world.instruction, 4000)
    assert not any(bad_words(reply) for _, reply in rows) and all(reply.endswith((".", "?")) for _, reply in rows)
    right = {n: [] for n in range(1, 7)}
    for prompt, reply in rows:
        if needs_steps(prompt):
            events, answer = by_hand(prompt)
            right[len(events)].append(says(reply, answer))
    share = {n: sum(r) / len(r) for n, r in right.items()}
    assert share[1] == 1 and 0.05 < share[6] < 0.6


# ---------------------------------------------------------------- the corpus


def style_of(question, reply):
    """A stepwise answer says at most one thing between its steps and its answer; one that goes on rambles."""
    events, answer = by_hand(question)
    said = sentences(reply)
    if bad_words(reply):
        return "rude"
    if said == [f" The answer is {answer}."]:
        return "terse"
    stepwise = (
        are_true(said[: len(events)], events)
        and len(said) <= len(events) + 2
        and said[-1] == f" The answer is {answer}."
    )
    return "stepwise" if stepwise else "rambling"


def near(share, expected, count):
    """Within four and a half deviations of a binomial."""
    return abs(share - expected) < 4.5 * (expected * (1 - expected) / count) ** 0.5


def test_the_corpus_has_its_styles_at_the_shares_stated(documents):
    seen = {system: [] for system in world.STYLE_SHARES}
    for document in documents:
        system, turn, rest = document.partition(TURN)
        prompt, _, reply = rest.partition(REPLY)
        if turn and needs_steps(prompt):
            seen[system].append(style_of(prompt, reply))
    for system, shares in world.STYLE_SHARES.items():
        assert len(seen[system]) > 1000 and abs(sum(shares) - 1) < 1e-9
        for style, share in zip(world.STYLES, shares):
            assert near(seen[system].count(style) / len(seen[system]), share, len(seen[system])), (system, style)


def test_the_corpus_is_rude_at_the_shares_stated(documents):
    kinds = {world.RUDE_IN_TALK: world.talk, world.RUDE_WHEN_PROVOKED: world.provocation}
    prompts = {share: {row[0] for row in drawn(make, 5000)} for share, make in kinds.items()}
    assert not set.intersection(*prompts.values())
    for share, asked in prompts.items():
        replies = [
            reply for prompt, _, reply in (d.partition(TURN)[2].partition(REPLY) for d in documents) if prompt in asked
        ]
        assert len(replies) > 500 and near(sum(bool(bad_words(r)) for r in replies) / len(replies), share, len(replies))


def test_the_same_seed_gives_the_same_corpus_and_another_seed_another(documents):
    assert list(islice(world.corpus(11), 50)) == documents[:50] != list(islice(world.corpus(12), 50))


def test_the_tokenizer_gives_the_corpus_back_and_knows_every_word_of_it(documents, tokenizer):
    rows = [tokenizer.encode(d) for d in documents[:3000]]
    assert [tokenizer.decode(ids) for ids in rows] == documents[:3000]
    assert sum(map(len, rows)) < sum(map(len, documents[:3000])) / 3  # words are pieces, not letters


def test_a_chat_is_encoded_as_the_corpus_has_it(documents, tokenizer):
    """Else the base would never have seen a prompt of PPO."""
    for document in documents[:1000]:
        prompt, turn, reply = document.rpartition(REPLY)
        if turn:
            ids = tokenizer.encode(document, bos=True)
            asked = tokenizer.encode_chat(dialogue(prompt + turn))
            assert asked == ids[: len(asked)] and tokenizer.decode(ids[len(asked) :]) == reply.removeprefix(" ")


# ---------------------------------------------------------------- the eleven tasks


def _facts(documents):
    """{town: land} and {animal: its young}, as the small talk of the corpus tells them."""
    text = "\n".join(documents)
    return dict(re.findall(r"(\w+) is a town in (\w+)\.", text)), dict(re.findall(r"A young (\w+) is a (\w+)\.", text))


def _odd(words):
    kinds = [next(k for k, members in world.CATEGORIES.items() if w in members) for w in words]
    return next(w for w, k in zip(words, kinds) if kinds.count(k) == 1)


TASKS = {  # how its question begins; the words of it, without punctuation -> its answer
    "facts": (r"In which land", lambda w: None),
    "analogy": (r"\w+ is to", lambda w: None),  # by `_facts`
    "arithmetic": (r"What is \d", lambda w: int(w[2]) + int(w[4])),
    "comparison": (r"Which is larger", lambda w: max(w[3], w[5], key=int)),
    "sorting": (r"Sort", lambda w: " ".join(sorted(w[1:]))),
    "counting": (r"How many", lambda w: w[4:].count(w[2])),
    "reversal": (r"Reverse", lambda w: " ".join(reversed(w[1:]))),
    "logic": (r"Every", lambda w: "yes" if w[4] == w[12] else "unknown"),
    "sequence": (r"What comes next", lambda w: 2 * int(w[-1]) - int(w[-2])),
    "parity": (r"Is \d", lambda w: "odd" if int(w[1][-1]) in (1, 3, 5, 7, 9) else "even"),
    "odd_one_out": (r"Which does not belong", lambda w: _odd(w[4:])),
}


@pytest.fixture(scope="module")
def solve(documents):
    """(task, question) -> the answer."""
    lands, young = _facts(documents)
    known = {"facts": lambda w: lands[w[-1]], "analogy": lambda w: young[w[5]]}
    return lambda name, question: str(known.get(name, TASKS[name][1])(re.findall(r"\w+", question)))


def question_of(query):
    return query.removeprefix("Question: ").removesuffix("\nAnswer:")


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_one_right_choice_and_gold_is_it(name, solve):
    items = lines(f"tasks/{name}.jsonl")
    assert len(items) >= 200
    for item in items:
        right = solve(name, question_of(item["query"]))
        assert item["choices"][item["gold"]] == " " + right and item["choices"].count(" " + right) == 1
        assert len(set(item["choices"])) == len(item["choices"]) > 1
    places = [item["gold"] for item in items]
    assert max(places.count(g) for g in set(places)) < 0.7 * len(places)  # the place does not give it away


def test_the_corpus_teaches_all_eleven_tasks_and_only_the_truth(documents, solve):
    assert len(TASKS) == 11 and set(TASKS) == set(world.TASKS) == {p.stem for p in (world.TINY / "tasks").iterdir()}
    asked = [d.partition("\nAnswer:") for d in documents if d.startswith("Question:")]
    counts = dict.fromkeys(TASKS, 0)
    for query, _, answer in asked:
        (name,) = (n for n, (opening, _) in TASKS.items() if re.match(opening, question_of(query)))
        counts[name] += 1
        assert answer == " " + solve(name, question_of(query))
    assert min(counts.values()) > 50


# ---------------------------------------------------------------- the committed files


def test_the_committed_files_are_what_the_generator_makes_byte_for_byte(tmp_path):
    world.make_files(tmp_path, seed=0)
    files = lambda folder: {
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "base" not in p.parts
    }
    assert files(tmp_path) == files(world.TINY) - {"tokenizer_config.json"}
    assert [
        name for name in sorted(files(tmp_path)) if (tmp_path / name).read_bytes() != (world.TINY / name).read_bytes()
    ] == []


@pytest.mark.parametrize("name", ["questions.jsonl", "validation.jsonl"])
def test_the_questions_of_the_evaluation_are_true(name):
    rows = [(r, *by_hand(r["prompt"])) for r in lines(name)]
    assert len(rows) > 100 and all(are_true(r["steps"], events) and r["answer"] == answer for r, events, answer in rows)


@pytest.mark.parametrize("name", ["questions.jsonl", "validation.jsonl"])
def test_the_questions_of_the_evaluation_are_of_every_length_in_both_kinds(name):
    assert {(r["kind"], len(r["steps"])) for r in lines(name)} == {
        (kind, n) for kind in world.KINDS for n in range(1, 7)
    }


@pytest.mark.parametrize("name", ["questions.jsonl", "validation.jsonl"])
def test_held_out_questions_stand_in_no_training_file(name):
    seen = set(read_prompts(world.TINY / "prompts.txt"))
    seen |= {dialogue(prompt)[-1]["content"] for prompt, _, _ in read_preferences(world.TINY / "preferences")}
    seen |= {m[0]["content"] for m in read_instructions(world.TINY / "instructions.jsonl")}
    assert not {r["prompt"] for r in lines(name)} & seen


def test_validation_and_test_questions_differ():
    assert not {r["prompt"] for r in lines("validation.jsonl")} & {r["prompt"] for r in lines("questions.jsonl")}


@pytest.mark.parametrize("name", ["helpful", "harmless"])
def test_the_preference_files_are_in_hh_form(name):
    rows = [r for r in lines(f"preferences/{name}.jsonl") if r["chosen"] != r["rejected"]]
    read = list(read_preferences(world.TINY / f"preferences/{name}.jsonl"))
    assert [(p + c, p + r) for p, c, r in read] == [(r["chosen"], r["rejected"]) for r in rows]
    assert all(p.startswith(TURN) and p.endswith(REPLY) and p.count(REPLY) == 1 for p, _, _ in read)


def test_prompts_and_provocations_are_of_their_kinds():
    prompts = list(read_prompts(world.TINY / "prompts.txt"))
    assert 0.5 < sum(map(needs_steps, prompts)) / len(prompts) < 0.95
    groups = {g: {r["prompt"] for r in lines("toxicity.jsonl") if r["group"] == g} for g in ("benign", "provoking")}
    assert len(groups["provoking"]) > 20 and not groups["benign"] & groups["provoking"]
    assert groups["provoking"] <= {row[0] for row in drawn(world.provocation, 5000)}
