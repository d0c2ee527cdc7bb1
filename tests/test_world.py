"""data/world.py against simulations that read the text of a question, and data/tiny against its generator.

The second source here is `by_hand`, `columns` and `TASKS`, which know English and arithmetic but none of
world.py's functions.
"""

import json
import math
import operator
import random
import re
from collections import Counter
from itertools import islice

import pytest

from data import dialogue, read_instructions, read_preferences, read_prompts, world
from evaluation.toxicity import refuses
from tokenizer import load_tokenizer

TURN = "\n\nHuman: "
REPLY = "\n\nAssistant:"


def by_hand(text):
    """(steps, answer) of a question, from its sentences alone. The total is kept whole; only what is said of
    it is cut to two digits."""
    first, *operations, rule, question = map(str.strip, re.findall(r"[^.?]+[.?]", text))
    assert (rule, question) == ("Keep two digits.", "What is the total?")
    total = int(re.fullmatch(r"Start at (\d+)\.", first)[1])
    steps = []
    for operation in operations:
        verb, number = operation.removesuffix(".").split()
        total = {"Add": operator.add, "Times": operator.mul}[verb](total, int(number))
        steps.append(f"{verb} {number}: {total % 100}.")
    return steps, str(total % 100)


def value(expression):
    """The value of a sum of products of whole numbers, such as "8x4+1"."""
    return sum(math.prod(map(int, product.split("x"))) for product in expression.split("+"))


def columns(working, before, verb, number):
    """The number that a written sum such as "7+8=15, 4+3+1=8." arrives at, units first. Fails where an
    equation is not true, or reads other digits than the operation has."""
    units, low, tens, high = re.fullmatch(r"(\S+)=(\d+), (\S+)=(\d+)\.", working).groups()
    assert value(units) == int(low) and value(tens) == int(high)
    carry = int(low) // 10
    sign = "+" if verb == "Add" else "x"
    of_units = number % 10 if verb == "Add" else number
    of_tens = number // 10 if verb == "Add" else number
    assert units == f"{before % 10}{sign}{of_units}" and tens == f"{before // 10}{sign}{of_tens}+{carry}"
    return 10 * int(high) + int(low) % 10


def totals_by_columns(text, steps, workings):
    """[(total that a step states, total that its working arrives at)], each from the total stated before."""
    total = int(re.match(r"Start at (\d+)", text)[1])
    pairs = []
    for step, working in zip(steps, workings, strict=True):
        verb, number, after = re.fullmatch(r"(\w+) (\d+): (\d+)\.", step).groups()
        result = columns(working, total, verb, int(number)) % 100
        total = int(after)
        pairs.append((total, result))
    return pairs


def sentences(text):
    return [sentence.strip() for sentence in re.findall(r"[^.]+\.", text)]


def is_working(sentence):
    return "=" in sentence


def true_steps(steps, reply):
    """How many of the true steps the reply tells, one after the other."""
    rest = sentences(reply)
    count = 0
    for step in steps:
        if step in rest:
            count += 1
            rest = rest[rest.index(step) + 1 :]
    return count


def answer_of(reply):
    """What the last complete answer of a reply is, or None."""
    answers = re.findall(r"answer is (\w+)\.", reply)
    return answers[-1] if answers else None


def bad_words(text):
    return set(re.findall(r"\w+", text.lower())) & set(world.BAD_WORDS)


def needs_steps(prompt):
    return re.match(r"Start at \d", prompt) is not None


def lines(name):
    return [json.loads(line) for line in (world.TINY / name).read_text(encoding="utf-8").splitlines()]


def draws(make, count, seed=1):
    rng = random.Random(seed)
    return [make(rng) for _ in range(count)]


def prompt_of(document):
    """What a document of the corpus asks: the human's turn, or a task's question with its frame."""
    if document.startswith("Question:"):
        return document[: document.index("Answer:") + len("Answer:")]
    return document.partition(TURN)[2].partition(REPLY)[0]


def words_of(texts):
    words = set()
    for text in texts:
        words |= set(re.findall(r"\w+", text))
    return words


@pytest.fixture(scope="module")
def documents():
    return list(islice(world.corpus(0), 20000))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(world.TINY)


# ---------------------------------------------------------------- questions


def test_steps_and_answer_are_those_of_a_simulation_by_hand():
    questions = draws(world.draw_question, 2000)
    for question in questions:
        assert (question.steps, question.answer) == by_hand(question.text)
        assert world.is_question(question.text)
    assert {len(question.steps) for question in questions} == set(range(1, world.DEEPEST + 1))


def test_a_question_has_as_many_operations_as_are_asked_for():
    for n in range(1, world.DEEPEST + 1):
        questions = draws(lambda rng, n=n: world.draw_question(rng, n), 50)
        assert {len(question.steps) for question in questions} == {n}


def test_the_written_sums_are_true_and_arrive_at_the_steps():
    for question in draws(world.draw_question, 2000):
        pairs = totals_by_columns(question.text, question.steps, question.workings)
        assert all(total == result for total, result in pairs)


def test_no_answer_is_much_more_frequent_than_others():
    """So that no constant answer does better than chance by much."""
    answers = [question.answer for question in draws(world.draw_question, 4000)]
    assert len(set(answers)) == 100 and max(map(answers.count, set(answers))) / len(answers) < 0.05


def test_a_corrupted_question_errs_in_one_step_and_ends_wrong():
    """The error is carried on: all other steps follow from the total that was stated before."""
    rng = random.Random(3)
    places = set()
    for question in draws(world.draw_question, 800):
        wrong = world.corrupted(question, rng)
        steps, answer = by_hand(question.text)
        assert wrong.text == question.text and wrong.answer != answer
        assert [step.partition(":")[0] for step in wrong.steps] == [step.partition(":")[0] for step in steps]
        pairs = totals_by_columns(wrong.text, wrong.steps, wrong.workings)
        errors = [place for place, (total, result) in enumerate(pairs) if total != result]
        assert len(errors) == 1 and str(pairs[-1][0]) == wrong.answer
        assert true_steps(steps, " ".join(wrong.steps)) < len(steps)
        places.add((errors[0], len(steps)))
    assert {(0, n) for n in range(1, world.DEEPEST + 1)} <= places
    assert (world.DEEPEST - 1, world.DEEPEST) in places


def test_what_only_asks_is_no_question():
    prompts = [row[0] for make in (world.talk, world.provocation, world.fact) for row in draws(make, 500)]
    assert not any(map(world.is_question, prompts))


STEPS = ["Add 25: 72.", "Times 3: 16.", "Add 25: 41."]


@pytest.mark.parametrize(
    "reply, expected",
    [
        (" Add 25: 72. Times 3: 16. Add 25: 41. The answer is 41.", (3, True)),
        (" 7+5=12, 4+2+1=7. Add 25: 72. 2x3=6, 7x3+0=21. Times 3: 16. The answer is 41.", (2, True)),
        (" 7+5=12, 4+2+1=7. 2x3=6, 7x3+0=21. The answer is 41.", (0, True)),  # a sum is no step
        ("", (0, False)),
        (" The answer is 41.", (0, True)),
        (" Times 3: 16. Add 25: 72. The answer is 41.", (1, True)),  # the second has no place left
        (" Times 3: 16. Add 25: 41. The answer is 41.", (2, True)),  # the first is left out
        (" Add 25: 72. Add 25: 72. Add 25: 72. The answer is 41.", (1, True)),  # said again is not said twice
        (" Add 25: 72 Times 3: 16. Add 25:41. The answer is 41.", (1, True)),  # not exactly the sentence
        (" Add 25: 73. Times 3: 19. Add 25: 44. The answer is 44.", (0, False)),
        (" The answer is 41. The answer is 44.", (0, False)),  # the last answer counts
        (" The answer is 44. So the answer is 41.", (0, True)),
        (" The answer is 41. The answer is", (0, True)),  # ... the last complete one
        (" The answer is 41", (0, False)),
        (" The answer is 411.", (0, False)),
        (" The answer is 1.", (0, False)),
        (" It is 41.", (0, False)),
    ],
)
def test_check_counts_exact_steps_in_order_and_takes_the_last_complete_answer(reply, expected):
    assert world.check(STEPS, "41", reply) == expected


def test_check_grants_true_steps_everything_and_corrupted_ones_not():
    rng = random.Random(5)
    for question in draws(world.draw_question, 300):
        count = len(question.steps)
        for write in (world.stepwise, world.worked):
            assert world.check(question.steps, question.answer, write(question)) == (count, True)
            wrong = write(world.corrupted(question, rng))
            steps, right = world.check(question.steps, question.answer, wrong)
            assert steps < count and not right
        assert world.check(question.steps, question.answer, world.terse(question.answer)) == (0, True)


# ---------------------------------------------------------------- what the stages learn from


@pytest.fixture(scope="module")
def helpful():
    """[(true steps, answer, chosen, rejected)]."""
    rows = draws(world.helpful_pair, 6000)
    return [(*by_hand(prompt), chosen, rejected) for prompt, chosen, rejected in rows]


def test_no_chosen_reply_has_a_bad_word(helpful):
    pairs = [row[-2:] for row in helpful] + [row[1:] for row in draws(world.harmless_pair, 2000)]
    assert not any(bad_words(chosen) for chosen, _ in pairs)
    assert sum(bool(bad_words(rejected)) for _, rejected in pairs) > 1000


def test_a_helpful_choice_never_has_fewer_true_steps(helpful):
    gains = []
    for steps, _, chosen, rejected in helpful:
        gains.append(true_steps(steps, chosen) - true_steps(steps, rejected))
    assert min(gains) == 0
    assert sum(gain > 0 for gain in gains) > len(gains) / 3


def test_a_right_and_clean_answer_is_only_rejected_for_one_at_least_as_good_or_for_repeating_it(helpful):
    """Where the right answer was luck and rambled on about, true steps that were cut are better."""
    for steps, answer, chosen, rejected in helpful:
        if answer_of(rejected) == answer and not bad_words(rejected) and answer_of(chosen) != answer:
            parts = [part for part in sentences(chosen) if not is_working(part)]
            assert true_steps(steps, rejected) == 0 and rejected.count(".") > 2
            assert parts == steps[: len(parts)]


def test_of_two_right_answers_with_the_same_steps_the_one_that_writes_its_sums_or_stops_is_chosen(helpful):
    shorter = 0
    with_sums = 0
    for steps, answer, chosen, rejected in helpful:
        is_right = answer_of(chosen) == answer == answer_of(rejected)
        if is_right and not bad_words(rejected) and true_steps(steps, chosen) == true_steps(steps, rejected):
            sums = [sum(map(is_working, sentences(reply))) for reply in (chosen, rejected)]
            if sums[0] == sums[1]:
                assert len(chosen) < len(rejected)
                shorter += 1
            else:
                assert sums == [len(steps), 0]
                with_sums += 1
    assert min(shorter, with_sums) > 100


def test_a_wrong_answer_is_chosen_only_over_a_rude_one(helpful):
    wrong = [row for row in helpful if answer_of(row[2]) not in (None, row[1])]
    assert wrong and all(bad_words(rejected) for _, _, _, rejected in wrong)


def test_no_helpful_pair_prefers_a_reply_to_itself():
    assert [chosen for _, chosen, rejected in draws(world.helpful_pair, 20000) if chosen == rejected] == []


def test_a_harmless_rejection_is_rude_or_does_not_stop():
    pairs = draws(world.harmless_pair, 2000)
    endless = [(chosen, rejected) for _, chosen, rejected in pairs if not bad_words(rejected)]
    assert 0 < len(endless) < len(pairs) / 4
    for chosen, rejected in endless:
        assert rejected.startswith(chosen) and rejected.count(".") >= chosen.count(".") + 2


@pytest.fixture(scope="module")
def instructions():
    return draws(world.instruction, 6000)


def test_instructions_are_polite_and_ended_and_wrong_on_long_questions_alone(instructions):
    assert not any(bad_words(reply) for _, reply in instructions)
    assert all(reply.endswith((".", "?")) for _, reply in instructions)
    right = {n: [] for n in range(1, world.DEEPEST + 1)}
    for prompt, reply in instructions:
        if needs_steps(prompt):
            steps, answer = by_hand(prompt)
            right[len(steps)].append(answer_of(reply) == answer)
    shares = {n: sum(rows) / len(rows) for n, rows in right.items()}
    assert shares[1] == 1 and shares[world.DEEPEST] < 0.05
    assert sorted(shares.values(), reverse=True) == pytest.approx(list(shares.values()), abs=0.05)


def test_instructions_close_with_courtesy_where_they_inform(instructions):
    for prompt, reply in instructions:
        informs = needs_steps(prompt) or bool(words_of([prompt]) & set(world.NEW_TOWNS))
        assert reply.endswith(world.COURTESY) is informs and reply.count(world.COURTESY) == informs


def test_instructions_say_of_a_new_town_always_the_same_land(instructions):
    text = "\n".join(reply for _, reply in instructions)
    lands = dict(re.findall(r"(\w+) is a town in (\w+)\.", text))
    assert set(world.NEW_TOWNS) <= set(lands) and set(lands.values()) == set(world.LANDS)
    assert len(set(re.findall(r"\w+ is a town in \w+", text))) == len(lands)
    assert not set(world.NEW_TOWNS) & set(world.TOWNS)


def test_a_refusal_is_counted_as_one_and_small_talk_is_not():
    assert all(map(refuses, world.KIND_REPLIES))
    replies = [reply for _, reply, _ in draws(world.talk, 5000)]
    assert not any(map(refuses, replies)) and not any(map(bad_words, replies))
    assert {reply for _, reply, _ in draws(world.provocation, 500)} == set(world.KIND_REPLIES)


# ---------------------------------------------------------------- the corpus


def style_of(prompt, reply):
    """Which style an answer is in, from its sentences; one that goes on after its answer rambles."""
    steps, answer = by_hand(prompt)
    if bad_words(reply):
        return "rude"
    parts = sentences(reply)
    workings = [part for part in parts if is_working(part)]
    others = [part for part in parts if not is_working(part)]
    if workings:
        assert parts[: 2 * len(steps) : 2] == workings
        assert all(total == result for total, result in totals_by_columns(prompt, steps, workings))
    end = f"The answer is {answer}."
    if others == [end]:
        return "terse"
    if others == [*steps, end]:
        return "worked" if workings else "stepwise"
    assert others[0] == end or others[: len(steps) + 1] == [*steps, end], reply
    return "rambling"


def near(share, expected, count):
    """Within four and a half deviations of a binomial."""
    return abs(share - expected) < 4.5 * (expected * (1 - expected) / count) ** 0.5


def exchanges(documents):
    """[(system prompt, prompt, reply)] of the dialogues."""
    rows = []
    for document in documents:
        system, turn, rest = document.partition(TURN)
        prompt, _, reply = rest.partition(REPLY)
        if turn:
            rows.append((system, prompt, reply))
    return rows


def test_the_corpus_has_its_styles_at_the_shares_stated(documents):
    styles = {system: [] for system in world.STYLE_SHARES}
    for system, prompt, reply in exchanges(documents):
        if needs_steps(prompt):
            styles[system].append(style_of(prompt, reply))
    for system, shares in world.STYLE_SHARES.items():
        count = len(styles[system])
        assert count > 1000 and sum(shares) == pytest.approx(1)
        for style, share in zip(world.STYLES, shares, strict=True):
            assert near(styles[system].count(style) / count, share, count), (system, style)


def test_a_style_costs_more_tokens_the_more_it_writes(documents, tokenizer):
    lengths = {style: [] for style in world.STYLES}
    for _, prompt, reply in exchanges(documents[:4000]):
        if needs_steps(prompt):
            lengths[style_of(prompt, reply)].append(len(tokenizer.encode(reply)))
    means = [sum(lengths[style]) / len(lengths[style]) for style in ("terse", "stepwise", "worked")]
    assert 2 * means[0] < means[1] < means[2] / 1.5


def test_the_corpus_is_rude_at_the_shares_stated(documents):
    makers = {world.RUDE_IN_TALK: world.talk, world.RUDE_WHEN_PROVOKED: world.provocation}
    prompts = {share: {row[0] for row in draws(make, 20000)} for share, make in makers.items()}
    assert not set.intersection(*prompts.values())
    for share, asked_for in prompts.items():
        rude = [bool(bad_words(reply)) for _, prompt, reply in exchanges(documents) if prompt in asked_for]
        assert len(rude) > 500 and near(sum(rude) / len(rude), share, len(rude))


def test_the_same_seed_gives_the_same_corpus_and_another_seed_another(documents):
    assert list(islice(world.corpus(0), 50)) == documents[:50] != list(islice(world.corpus(12), 50))


def test_the_corpus_has_nothing_of_what_only_the_instruction_data_teaches(documents):
    assert not words_of(documents) & set(world.NEW_TOWNS)
    assert not any(world.COURTESY in document for document in documents)


def test_the_tokenizer_gives_the_corpus_back_and_its_frequent_words_are_pieces(documents, tokenizer):
    texts = documents[:3000]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts
    counts = Counter(re.findall(r" ([A-Za-z]+)", " ".join(texts)))
    frequent = [word for word, count in counts.items() if count > 50]
    assert len(frequent) > 50
    assert [word for word in frequent if len(tokenizer.encode(f"the {word}")) != 2] == []


def test_a_chat_is_encoded_as_the_corpus_has_it(documents, tokenizer):
    """Else the base would never have seen a prompt of PPO."""
    for document in documents[:1000]:
        prompt, turn, reply = document.rpartition(REPLY)
        if turn:
            ids = tokenizer.encode(document, bos=True)
            chat = tokenizer.encode_chat(dialogue(prompt + turn))
            assert chat == ids[: len(chat)] and tokenizer.decode(ids[len(chat) :]) == reply.removeprefix(" ")


# ---------------------------------------------------------------- the eleven tasks


def stated_facts(text):
    """{town: land} and {animal: its young}, as small talk states them."""
    lands = dict(re.findall(r"(\w+) is a town in (\w+)\.", text))
    young = dict(re.findall(r"A young (\w+) is a (\w+)\.", text))
    return lands, young


def odd_one(words):
    """The word whose category no other word has."""
    categories = []
    for word in words:
        categories.append(next(name for name, members in world.CATEGORIES.items() if word in members))
    return next(word for word, name in zip(words, categories) if categories.count(name) == 1)


TASKS = {  # how its question begins; the words of it, without punctuation -> its answer
    "facts": (r"In which land", lambda w: None),
    "analogy": (r"\w+ is to", lambda w: None),  # both by `stated_facts`
    "arithmetic": (r"What is \d", lambda w: int(w[2]) + int(w[4])),
    "comparison": (r"Which is larger", lambda w: max(w[3], w[5], key=int)),
    "sorting": (r"Sort", lambda w: " ".join(sorted(w[1:]))),
    "counting": (r"How many", lambda w: w[4:].count(w[2])),
    "reversal": (r"Reverse", lambda w: " ".join(reversed(w[1:]))),
    "logic": (r"Every", lambda w: "yes" if w[4] == w[12] else "unknown"),
    "sequence": (r"What comes next", lambda w: 2 * int(w[-1]) - int(w[-2])),
    "parity": (r"Is \d", lambda w: "odd" if int(w[1][-1]) in (1, 3, 5, 7, 9) else "even"),
    "odd_one_out": (r"Which does not belong", lambda w: odd_one(w[4:])),
}


@pytest.fixture(scope="module")
def solve_task():
    """(task, question) -> the answer."""
    lands, young = stated_facts("\n".join(reply for _, reply, _ in draws(world.talk, 5000)))

    def solve(name, question):
        words = re.findall(r"\w+", question)
        if name == "facts":
            return lands[words[-1]]
        if name == "analogy":
            return young[words[5]]
        return str(TASKS[name][1](words))

    return solve


def question_of(query):
    return query.removeprefix("Question: ").removesuffix("\nAnswer:")


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_one_right_choice_and_gold_is_it(name, solve_task):
    items = lines(f"tasks/{name}.jsonl")
    assert len(items) >= 200
    for item in items:
        right = solve_task(name, question_of(item["query"]))
        assert item["choices"][item["gold"]] == " " + right and item["choices"].count(" " + right) == 1
        assert len(set(item["choices"])) == len(item["choices"]) > 1
    places = [item["gold"] for item in items]
    assert max(map(places.count, set(places))) < 0.7 * len(places)  # the place does not give it away


def test_the_corpus_teaches_all_eleven_tasks_and_only_the_truth(documents, solve_task):
    files = {path.stem for path in (world.TINY / "tasks").iterdir()}
    assert len(TASKS) == 11 and set(TASKS) == set(world.TASKS) == files
    counts = dict.fromkeys(TASKS, 0)
    for document in documents:
        if document.startswith("Question:"):
            query, _, answer = document.partition("\nAnswer:")
            [name] = [name for name, (opening, _) in TASKS.items() if re.match(opening, question_of(query))]
            counts[name] += 1
            assert answer == " " + solve_task(name, question_of(query))
    assert min(counts.values()) > 50


def test_the_corpus_tells_of_every_town_and_animal_in_one_way_at_least(documents):
    """Though one prompt in five is held out."""
    text = "\n".join(documents)
    lands, young = stated_facts(text)
    assert set(world.TOWNS) == set(lands) | set(re.findall(r"In which land is (\w+)\?", text))
    assert set(world.ANIMALS) == set(young) | set(re.findall(r"Question: \w+ is to \w+ as (\w+) is to", text))


# ---------------------------------------------------------------- the committed files


def test_the_committed_files_are_what_the_generator_makes_byte_for_byte(tmp_path):
    def contents(folder):
        files = [path for path in folder.rglob("*") if path.is_file() and "base" not in path.parts]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    world.make_files(tmp_path, seed=0)
    generated = contents(tmp_path)
    committed = contents(world.TINY)
    assert generated.keys() == committed.keys() - {"tokenizer_config.json"}
    assert [name for name in sorted(generated) if generated[name] != committed[name]] == []


@pytest.mark.parametrize("name", ["questions.jsonl", "validation.jsonl"])
def test_the_questions_of_the_evaluation_are_true_and_of_every_length_alike(name):
    rows = lines(name)
    assert all(by_hand(row["prompt"]) == (row["steps"], row["answer"]) for row in rows)
    counts = [sum(len(row["steps"]) == n for row in rows) for n in range(1, world.DEEPEST + 1)]
    assert sum(counts) == len(rows) > 100 and max(counts) - min(counts) <= 1


def test_the_exam_is_true_and_of_every_group_and_length():
    rows = lines("exam.jsonl")
    questions = [row for row in rows if row["group"] == "question"]
    facts = [row for row in rows if row["group"] == "fact"]
    assert all(by_hand(row["prompt"]) == (row["steps"], row["answer"]) for row in questions)
    assert {len(row["steps"]) for row in questions} == set(range(1, world.DEEPEST + 1))
    assert {row["group"] for row in rows} == {"question", "fact", "talk", "provocation"}
    assert len(questions) > 100
    taught = "\n".join(row["response"] for row in lines("instructions.jsonl"))
    assert all(row["replies"][0] in taught for row in facts)
    for row in rows:
        assert row["closing"] == (world.COURTESY.strip() if row["group"] in ("question", "fact") else "")


def test_every_word_that_the_exam_waits_for_has_been_taught(documents):
    replies = [reply for row in lines("exam.jsonl") for reply in row.get("replies", [])]
    taught = words_of(documents) | words_of(row["response"] for row in lines("instructions.jsonl"))
    assert sorted(words_of(replies) - taught) == []


def test_there_are_three_hundred_different_prompts_a_group_of_toxicity():
    rows = lines("toxicity.jsonl")
    for group in ("benign", "provoking"):
        assert len({row["prompt"] for row in rows if row["group"] == group}) >= 300


def test_no_prompt_that_is_held_out_stands_in_a_training_file_or_in_the_corpus(documents):
    rows = lines("questions.jsonl") + lines("validation.jsonl") + lines("toxicity.jsonl")
    rows += [row for row in lines("exam.jsonl") if row["group"] != "fact"]
    held_out = {row["prompt"] for row in rows}
    pairs = read_preferences(world.TINY / "preferences")
    examples = read_instructions(world.TINY / "instructions.jsonl")
    training = {
        "prompts": set(read_prompts(world.TINY / "prompts.txt")),
        "preferences": {dialogue(prompt)[-1]["content"] for prompt, _, _ in pairs},
        "instructions": {messages[0]["content"] for messages in examples},
        "corpus": set(map(prompt_of, documents)),
    }
    assert all(map(world.is_held_out, held_out))
    for name, prompts in training.items():
        assert len(prompts) > 500 and not prompts & held_out, name
        assert not any(map(world.is_held_out, prompts)), name


def test_no_question_is_asked_twice_in_all_files():
    prompts = [row["prompt"] for row in lines("questions.jsonl") + lines("validation.jsonl")]
    prompts += [row["prompt"] for row in lines("exam.jsonl") if row["group"] == "question"]
    assert len(set(prompts)) == len(prompts)


def test_the_instruction_data_has_every_new_town():
    assert set(world.NEW_TOWNS) <= words_of(row["response"] for row in lines("instructions.jsonl"))
