"""evaluation/tasks.py: what the readers make of the public files, and the whole way from file to score against
lm-evaluation-harness, item by item. The files are in ../shared/data; tests that read them are skipped where it is
absent."""

import json
import zipfile

import harness
import pytest
from harness import DATA
from smollm2 import NoWheel, smollm2_folder

from data import world
from evaluation import tasks
from evaluation.answers import Speaker, solution_metrics, solutions
from evaluation.likelihoods import general_tasks
from model import Mistral
from tokenizer import load_tokenizer
from support.files import InputError

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the public files are not at {DATA}")


# ---------------------------------------------------------------- equal to lm-evaluation-harness


def compared(folder, tmp_path, wanted):
    """{task: (log-likelihoods compared, largest difference, items whose acc or acc_norm differs)}."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    theirs = harness.samples(folder, wanted, tmp_path)
    model, tokenizer = Mistral.from_pretrained(folder), load_tokenizer(folder)
    figures = {}
    for task, groups in theirs.items():
        if task == "gsm8k":
            continue
        items = tasks.load(task, DATA)
        names = {"mmlu": harness.SUBJECTS, "bbh": harness.BBH_TASKS}.get(task, (items[0]["group"],))  # aqua-rat first
        count, apart, differ = 0, 0.0, 0
        for name, samples in zip(names, groups, strict=True):
            ours = [item for item in items if item["group"] == name][: len(samples)]
            assert [s["arguments"] for s in samples] == [tasks.pairs(item) for item in ours]
            for row, sample in zip(general_tasks(Speaker(model, tokenizer), {task: ours})[task], samples, strict=True):
                sums = [ll for ll, _ in sample["filtered_resps"]]
                apart = max(apart, *(abs(a - b) for a, b in zip(row["loglikelihoods"], sums, strict=True)))
                count += len(sums)
                differ += any(row[m] != sample[m] for m in ("acc", "acc_norm") if m in sample)
                assert {"acc", "acc_norm"} & set(sample)
        figures[task] = (count, apart, differ)
    return figures


def report(figures):
    for task, (count, apart, differ) in figures.items():
        print(f"{task:12} {count:5} log-likelihoods, largest difference {apart:.1e}, disagreements {differ}")


@needs_data
def test_scores_are_the_harness_s_item_by_item(tmp_path):
    """On the tiny model, whose window of 512 and 1024 positions cut the five shots of MMLU off the left."""
    wanted = {
        "mmlu": 3,
        "bbh": 3,
        "arc_easy": 8,
        "hellaswag": 8,
        "piqa": 8,
        "openbookqa": 8,
        "boolq": 6,
        "truthfulqa": 3,
        "agieval": 3,
        "siqa": 8,
        "commonsenseqa": 8,
        "winograd": 8,
    }
    figures = compared(world.TINY / "base", tmp_path, wanted)
    report(figures)
    assert set(figures) == set(wanted)  # sums reach -1500 nats here
    assert all(apart < 2e-3 and differ == 0 for _, apart, differ in figures.values()), figures


@pytest.fixture(scope="module")
def smollm2():
    try:
        return smollm2_folder()
    except NoWheel as e:
        pytest.skip(str(e))


@needs_data
@pytest.mark.real
def test_scores_are_the_harness_s_item_by_item_on_real_weights(smollm2, tmp_path):
    wanted = {"mmlu": 5, "bbh": 4, "agieval": 8, "boolq": 10, "truthfulqa": 10, "winograd": 25}
    wanted |= dict.fromkeys(("arc_easy", "hellaswag", "piqa", "openbookqa", "siqa", "commonsenseqa"), 25)
    figures = compared(smollm2, tmp_path, wanted)
    report(figures)
    assert all(apart < 1e-3 and differ == 0 for _, apart, differ in figures.values()), figures


@needs_data
@pytest.mark.real
def test_gsm8k_is_the_harness_s_to_the_letter_on_real_weights(smollm2, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    (samples,) = harness.samples(smollm2, {"gsm8k": 2}, tmp_path)["gsm8k"]
    model, tokenizer = Mistral.from_pretrained(smollm2), load_tokenizer(smollm2)
    items = tasks.load("gsm8k", DATA, limit=2)
    texts = solutions(Speaker(model, tokenizer), items)
    said = {(s["doc_id"], s["filter"]): s for s in samples}
    values, _ = solution_metrics("gsm8k", items, texts)
    for i, item in enumerate(items):
        sample = said[i, "strict-match"]
        assert item["context"] == sample["arguments"][0][0] and texts[i] == sample["resps"][0][0]
        assert values["accuracy_gsm8k"][i] == sample["exact_match"]
        assert values["accuracy_gsm8k_flexible"][i] == said[i, "flexible-extract"]["exact_match"]


# ---------------------------------------------------------------- the files


SIZES = {  # items by MANIFEST.md, and what the notes of the table leave out
    "mmlu": 14042,
    "agieval": 254 + 306 + 651 + 230 + 510 + 269 + 206 + 206 + 220,
    "bbh": 6511 - 3 * 250 - 3,
    "arc_easy": 2376,
    "hellaswag": 10042,
    "piqa": 1838,
    "siqa": 1954,
    "openbookqa": 500,
    "commonsenseqa": 1221,
    "boolq": 3270,
    "truthfulqa": 817,
    "winograd": 273,
    "gsm8k": 7473 - 5,
}


@needs_data
@pytest.mark.parametrize("task", SIZES)
def test_every_item_of_a_public_file_is_read(task):
    items = tasks.load(task, DATA)
    assert len(items) == SIZES[task]
    for item in items[:: max(1, len(items) // 200)]:
        if "answer" not in item:
            pairs = tasks.pairs(item)
            assert len(set(pairs)) > 1 and 0 <= item["gold"] < len(pairs)
            assert all(continuation[0] == " " and continuation.strip() for _, continuation in pairs)


@needs_data
def test_gold_is_not_always_at_one_place():
    """But for TruthfulQA, whose first choice is the true one, as in the harness."""
    for task in SIZES.keys() - {"gsm8k"}:
        golds = [item["gold"] for item in tasks.load(task, DATA, limit=300)]
        share = max(map(golds.count, golds)) / len(golds)
        assert share == 1 if task == "truthfulqa" else share < 0.75, (task, share)


@needs_data
def test_prompts_that_the_files_spell_otherwise():
    """Written out by hand."""
    item = next(i for i in tasks.load("agieval", DATA) if i["group"] == "sat-math")
    value = r"Q: If $\frac{x-1}{3}=k$ and $k=3$, what is the value of $x ?$ Answer Choices: (A)2 (B)4 (C)9 (D)10"
    assert tasks.pairs(item)[item["gold"]] == (f"{value}\nA: Among A through D, the answer is", " (D)10")
    item = tasks.load("winograd", DATA, limit=1)[0]
    refused = "The city councilmen refused the demonstrators a permit because the"
    assert tasks.pairs(item) == [
        (f"{refused} {who}", " feared violence.") for who in ("city councilmen", "demonstrators")
    ]


# ---------------------------------------------------------------- limits, shots, files of one's own


def written(tmp_path, rows, name="mine.jsonl"):
    path = tmp_path / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


ROWS = [{"query": f"q{n}", "choices": [f"a{n}", f"b{n}"], "gold": n % 2} for n in range(5)]


def test_shots_are_the_first_items_and_are_not_asked(tmp_path):
    path = written(tmp_path, ROWS)
    assert [i["context"] for i in tasks.load("mine", path)] == ["q0", "q1", "q2", "q3", "q4"]
    items = tasks.load("mine", path, limit=2, shots=2)
    assert [i["context"] for i in items] == [f"q0 a0\n\nq1 b1\n\n{q}" for q in ("q2", "q3")]
    with pytest.raises(InputError, match="--shots: 6 given, mine has 5"):
        tasks.load("mine", path, shots=6)
    with pytest.raises(InputError, match="no items"):
        tasks.load("mine", path, shots=5)


def test_no_space_where_the_file_has_one(tmp_path):
    rows = [ROWS[0], ROWS[1] | {"choices": [" a", " b"]}, ROWS[2] | {"query": "q "}]
    pairs = [tasks.pairs(item)[0] for item in tasks.load("mine", written(tmp_path, rows))]
    assert pairs == [("q0", " a0"), ("q1", " a"), ("q ", "a2")]


def test_a_limit_takes_from_each_subject_in_turn():
    items = [{"group": g, "n": n} for g in "abc" for n in range(4 if g == "b" else 2)]
    names = lambda rows: "".join(f"{r['group']}{r['n']}" for r in rows)
    assert names(tasks.first(items, 5)) == "a0b0c0a1b1"
    assert names(tasks.first(items, 0)) == "a0b0c0a1b1c1b2b3"


def test_partial_evaluation_scores_one_continuation_after_each_context(tmp_path):
    """WinoGrande in llm-foundry's form, from a benchmarks folder, with a shot."""
    rows = [{"context_options": [f"{n} Ann", f"{n} Bob"], "continuation": "ran.", "gold": n % 2} for n in range(3)]
    (tmp_path / "winogrande").mkdir()
    written(tmp_path / "winogrande", rows, "winogrande.jsonl")
    items = tasks.load("winogrande", tmp_path, shots=1)
    assert tasks.pairs(items[0]) == [("0 Ann ran.\n\n1 Ann", " ran."), ("0 Ann ran.\n\n1 Bob", " ran.")]
    assert [i["gold"] for i in items] == [1, 0]


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        '["q"]',
        json.dumps({"query": "q"}),
        json.dumps(ROWS[0] | {"gold": 2}),
        json.dumps(ROWS[0] | {"gold": -1}),
        json.dumps(ROWS[0] | {"gold": "A"}),
        json.dumps(ROWS[0] | {"choices": ["a", " "]}),
        json.dumps(ROWS[0] | {"choices": "ab"}),
        json.dumps(ROWS[0] | {"query": 7}),
        json.dumps({"context_options": ["a", "b"], "gold": 0}),
        json.dumps(ROWS[0] | {"choices": ["a", 5]}),
        json.dumps(ROWS[0] | {"query": "\ud800"}),  # half of a character
        json.dumps(ROWS[0] | {"choices": ["a", "\udc00"]}),
    ],
)
def test_a_faulty_line_is_named(line, tmp_path):
    with pytest.raises(InputError, match=r"mine\.jsonl:2"):
        tasks.load("mine", written(tmp_path, [ROWS[0], line]))


def test_a_missing_or_empty_file_is_named(tmp_path):
    with pytest.raises(InputError, match="missing.jsonl"):
        tasks.load("mine", tmp_path / "missing.jsonl")
    with pytest.raises(InputError, match="no items"):
        tasks.load("mine", written(tmp_path, []))
    with pytest.raises(InputError, match="--tasks: mmlu needs mmlu/"):
        tasks.load("mmlu", tmp_path)


FAULTY = {  # task: (file, bytes)
    "mmlu": ("mmlu/mmlu.zip", b"PK no zip"),
    "hellaswag": ("hellaswag/a.bz2", b"no bz2"),
    "bbh": ("bbh/bbh/navigate.json", b"{}"),
    "truthfulqa": ("truthfulqa/TruthfulQA.csv", b"a,b\n1,2\n"),
    "piqa": ("piqa/valid.jsonl", b'{"goal": "g", "sol1": "a", "sol2": "b"}\n'),
    "siqa": ("siqa/siqa.jsonl", json.dumps(ROWS[0]).encode()),
    "agieval": ("agieval/v1/a.jsonl", b'{"options": ["(A)a"], "label": "Z", "question": "q", "passage": null}\n'),
    "gsm8k": ("gsm8k/a.jsonl", b'{"question": "q", "answer": "7"}\n'),
}


@pytest.mark.parametrize("task", FAULTY)
def test_a_faulty_public_file_is_refused_by_name(task, tmp_path):
    name, content = FAULTY[task]
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name.rpartition("/")[2].replace("valid.jsonl", "valid-labels.lst")) as e:
        tasks.load(task, tmp_path)
    assert "\n" not in str(e.value)


# ---------------------------------------------------------------- GSM8K's two files


def problems(name, count):
    return [{"question": f"{name} {n}?", "answer": f"so\n#### {n}"} for n in range(count)]


def gsm8k_folder(tmp_path, **files):
    (tmp_path / "gsm8k").mkdir()
    for name, count in files.items():
        written(tmp_path / "gsm8k", problems(name, count), f"{name}.jsonl")
    return tmp_path


def test_an_answer_without_a_number_to_compare_with_is_refused(tmp_path):
    row = {"question": "How many?", "answer": "so\n####18"}
    written(tmp_path, [row], "mine.jsonl")
    with pytest.raises(InputError, match="mine.jsonl:1.*#### and a number"):
        tasks.load("gsm8k", tmp_path / "mine.jsonl", shots=0)


OFFICIAL = {"train": 9, "test": 7, "train_socratic": 9, "test_socratic": 7}


@pytest.mark.parametrize("source", ["", "gsm8k/test.jsonl"])
def test_train_gives_the_shots_and_all_of_test_is_asked(source, tmp_path, capsys):
    items = tasks.load("gsm8k", gsm8k_folder(tmp_path, **OFFICIAL) / source)
    shots = "".join(f"Question: train {n}?\nAnswer: so\n#### {n}\n\n" for n in range(5))
    assert [item["context"] for item in items] == [f"{shots}Question: test {n}?\nAnswer:" for n in range(7)]
    assert [item["index"] for item in items] == list(range(7))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name, source", [("train", ""), ("test", "gsm8k/test.jsonl"), ("mine", "gsm8k/mine.jsonl")])
def test_one_file_alone_says_what_it_leaves_out(name, source, tmp_path, capsys):
    folder = gsm8k_folder(tmp_path, **{name: 8})
    items = tasks.load("gsm8k", folder / source)
    assert [item["index"] for item in items] == [5, 6, 7]  # places in the file
    assert all(f"{name} 4?" in item["context"] and item["context"].endswith("?\nAnswer:") for item in items)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("gsm8k: the first 5 items") and "--shots 0" in line
    assert len(tasks.load("gsm8k", folder / source, shots=0)) == 8 and capsys.readouterr().out == ""


# ---------------------------------------------------------------- MMLU's archive


def mmlu_zip(tmp_path, **edits):
    """An archive of one subject; `edits` replace the text of its dev or test file, None leaves it out."""
    rows = "".join(f"q{n},a,b,c,d,{letter}\n" for n, letter in enumerate("ABCDA"))
    (tmp_path / "mmlu").mkdir()
    path = tmp_path / "mmlu/mmlu.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for split, text in ({"dev": rows, "test": rows} | edits).items():
            if text is not None:
                archive.writestr(f"data/{split}/law_{split}.csv", text)
    return path


def test_an_archive_of_mmlu_is_read(tmp_path):
    mmlu_zip(tmp_path)
    items = tasks.load("mmlu", tmp_path)
    assert [item["gold"] for item in items] == [0, 1, 2, 3, 0] and [item["index"] for item in items] == list(range(5))


@pytest.mark.parametrize("edits, reason", [
    ({"test": "q,a,b,c,d,\n"}, r"data/test/law_test\.csv:1"),  # no letter
    ({"test": "q,a,b,c,d,A\nq,a,b,c,d,BC\n"}, r"law_test\.csv:2"),
    ({"test": "q,a,b,c,d,E\n"}, r"law_test\.csv:1"),
    ({"test": "q,a,b,c,A\n"}, r"law_test\.csv:1"),
    ({"test": "q\n"}, r"law_test\.csv:1"),
    ({"test": '"q,a,b,c,d,A\n'}, "MMLU|mmlu"),  # a quote that is not closed
    ({"test": b"\xff,a,b,c,d,A\n"}, "mmlu"),
    ({"dev": None}, "law_dev"),
    ({"dev": "q,a,b,c,d,A\n"}, "--shots: 5 given, law has 1"),
    ({"test": None}, "no items"),
])  # fmt: skip
def test_a_faulty_archive_of_mmlu_is_refused(edits, reason, tmp_path):
    mmlu_zip(tmp_path, **edits)
    with pytest.raises(InputError, match=reason) as error:
        tasks.load("mmlu", tmp_path)
    assert "\n" not in str(error.value)
