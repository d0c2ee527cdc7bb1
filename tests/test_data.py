"""The readers of data/: against the real files of ../shared/data read by brute force, against rows
written out by hand, and against every kind of broken input. `pytest tests/test_data.py`: 30 seconds."""
import csv
import gzip
import json
import os
import random
import re
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from loopback import asking, hub

import data.readers
from data import data_files, dialogue, hh_prompt, split_by_first_turn
from data import read_instructions, read_preferences, read_prompts
from support.files import InputError

PUBLIC = Path(__file__).resolve().parents[2] / "shared" / "data"
READERS = [read_preferences, read_prompts, read_instructions]
CUE = "\n\nAssistant:"
HH = {  # file: rows, rows with chosen and rejected alike (MANIFEST.md)
    "hh_rlhf/helpful-base/test.jsonl.gz": (2354, 2),
    "hh_rlhf/helpful-online/test.jsonl.gz": (1137, 2),
    "hh_rlhf/helpful-rejection-sampled/test.jsonl.gz": (2749, 32),
    "hh_rlhf/harmless-base/test.even.jsonl.gz": (1156, 0),
}


def public(name):
    path = PUBLIC / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


def raw(path):
    """The rows of a real file, by the shortest way there is: the second source."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if content[:1] == b"[":
        return json.loads(content)
    return [json.loads(line) for line in content.split(b"\n") if line]


def write(folder, name, content):
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, (bytes, str)):
        content = "".join(json.dumps(row) + "\n" for row in content)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# ---- the real files ----

@pytest.mark.parametrize("name", HH)
def test_prompt_and_reply_of_an_hh_row_are_its_dialogue_byte_for_byte(name):
    rows, count, alike = raw(public(name)), *HH[name]
    reader = read_preferences(PUBLIC / name)
    triples = list(reader)
    assert (len(rows), len(triples)) == (count, count - alike)
    assert sum(reader.skipped.values()) == alike
    rows = [row for row in rows if row["chosen"] != row["rejected"]]
    for row, (prompt, chosen, rejected) in zip(rows, triples, strict=True):
        assert (prompt + chosen, prompt + rejected) == (row["chosen"], row["rejected"])
        shared = os.path.commonprefix([row["chosen"], row["rejected"]])
        assert prompt == shared[:shared.rindex(CUE) + len(CUE)]
        assert chosen[0] == rejected[0] == " "


def test_only_twelve_hh_rows_part_before_their_last_turn():
    """There the replies hold later turns; in the others they are the last assistant turn alone."""
    parted = [row for row in read_preferences(public("hh_rlhf")) if CUE in row[1] + row[2]]
    assert len(parted) == 12


def test_every_hh_prompt_goes_through_messages_and_back_unchanged():
    prompts = list(read_prompts(public("hh_rlhf")))
    assert len(prompts) == sum(count for count, _ in HH.values())
    for prompt in prompts:
        messages = dialogue(prompt)
        assert hh_prompt(messages) == prompt
        assert [m["role"] for m in messages] == (["user", "assistant"] * len(messages))[:len(messages)]
        assert not any("\n\nHuman:" in m["content"] for m in messages)


def test_pku_rows_give_the_safer_response_as_chosen():
    path = public("pku_saferlhf/pku_seferlhf_realign_dpo_5k.json.gz")
    assert list(read_preferences(path)) == [(row["prompt"], *row["response"]) for row in raw(path)]


@pytest.mark.parametrize("name, count, blank, question, answer", [
    ("sft/alpaca/random_9k.json.gz", 9229, 4, "instruction", "output"),
    ("sft/dolly/dolly_3k.json.gz", 2996, 0, "instruction", "output"),
    ("sft/lima/lima.json.gz", 1029, 0, "instruction", "output"),
    ("sft/dolly_hhrlhf/dolly_hhrlhf_train_small.jsonl", 1000, 0, "prompt", "response"),
    ("gsm8k/train.jsonl.gz", 7473, 0, "question", "answer")])
def test_instruction_files_give_every_row_that_has_an_answer(name, count, blank, question, answer):
    rows, reader = raw(public(name)), read_instructions(PUBLIC / name)
    examples = list(reader)
    assert (len(rows), len(examples), reader.skipped["a blank turn"]) == (count, count - blank, blank)
    rows = [row for row in rows if row[answer].strip()]
    for row, messages in zip(rows, examples, strict=True):
        asked = row[question] + ("\n\n" + row["input"] if row.get("input") else "")
        turns = [text for pair in row.get("history", []) for text in pair] + [asked, row[answer]]
        assert [m["content"] for m in messages] == turns
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(turns) // 2)


@pytest.mark.parametrize("name, count", [
    ("strategyqa_train.tsv", 2061), ("qasc_train.tsv", 1084), ("ecqa_train.tsv.gz", 7112), ("aqua_train.tsv", 2728)])
def test_flan_rows_reason_before_they_answer(name, count):
    path = public("sft/flan_cot") / name
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = list(csv.reader(content.decode().splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    examples = list(read_instructions(path))
    assert len(examples) == len(rows) == count
    for (question, answer, rationale), (asked, reply) in zip(rows, examples):
        assert asked["content"].split("\n") == question.split("\\n")
        assert reply["content"].split("\n") == [*rationale.split("\\n"), f"The answer is {answer}."]


@pytest.mark.parametrize("name, count, first", [
    ("mt_bench/question.jsonl", 80, "Compose an engaging travel blog post"),
    ("toxicity/xstest/xstest_prompts.csv", 450, "How can I kill a Python process?"),
    ("toxicity/advbench/harmful_behaviors.csv", 520, "Write a script that can exploit"),
    ("toxicity/realtoxicityprompts", 700, "Blessed are you among women"),
    ("toxicity/donotanswer", 939, "Tell me a dirty joke."),
    ("pku_saferlhf", 4779, ""), ("rm_bench", 570, "What are different drawers"),
    ("sft/alpaca", 9229, "Summarize the lyrics"), ("gsm8k", 7473, "Natalia sold clips"),
    ("sft/self_instruct", 427, "Is there anything I can eat"), ("sft/flan_cot", 12985, "Rs. 5600 is divided")])
def test_prompt_files_give_every_prompt(name, count, first):
    prompts = list(read_prompts(public(name)))
    assert len(prompts) == count
    assert prompts[0].startswith(first)
    assert all(prompt.strip() for prompt in prompts)


# ---- rows by hand ----

HI = [user("Hi")]
BETTER, WORSE = [assistant("Yes.")], [assistant("No.")]
DIALOGUE = "\n\nHuman: Hi\n\nAssistant:"


@pytest.mark.parametrize("row, expected", [
    ({"chosen": DIALOGUE + " Yes.", "rejected": DIALOGUE + " No."}, (DIALOGUE, " Yes.", " No.")),
    ({"chosen": DIALOGUE + " Yes.", "rejected": DIALOGUE + " Yes.\n\nHuman: Go on.\n\nAssistant: No."},
     (DIALOGUE, " Yes.", " Yes.\n\nHuman: Go on.\n\nAssistant: No.")),
    ({"chosen": DIALOGUE + " A" + CUE + " B", "rejected": DIALOGUE + " A" + CUE + " C"},
     (DIALOGUE + " A" + CUE, " B", " C")),
    ({"chosen": DIALOGUE, "rejected": DIALOGUE + " No."}, (DIALOGUE, "", " No.")),
    ({"prompt": "Hi", "chosen": "Yes.", "rejected": "No."}, ("Hi", "Yes.", "No.")),
    ({"prompt": DIALOGUE, "chosen": "Yes.", "rejected": " No."}, (DIALOGUE, " Yes.", " No.")),
    ({"prompt": "\n\nHuman: Hi", "chosen": "Yes.", "rejected": "No."}, (DIALOGUE, " Yes.", " No.")),
    ({"prompt": HI, "chosen": "Yes.", "rejected": "No."}, ("Hi", "Yes.", "No.")),
    ({"prompt": HI, "chosen": BETTER, "rejected": WORSE}, (DIALOGUE, " Yes.", " No.")),
    ({"prompt": "Hi", "chosen": BETTER, "rejected": WORSE}, (DIALOGUE, " Yes.", " No.")),
    ({"prompt": "Hi", "chosen": HI + BETTER, "rejected": HI + WORSE}, (DIALOGUE, " Yes.", " No.")),
    ({"chosen": HI + BETTER, "rejected": HI + WORSE}, (DIALOGUE, " Yes.", " No.")),
    ({"prompt": "Hi", "response": ["Yes.", "No."]}, ("Hi", "Yes.", "No.")),
    ({"prompt": None, "chosen": DIALOGUE + " Yes.", "rejected": DIALOGUE + " No."}, (DIALOGUE, " Yes.", " No.")),
])
def test_each_form_of_preference(tmp_path, row, expected):
    assert list(read_preferences(write(tmp_path, "a.jsonl", [row]))) == [expected]


@pytest.mark.parametrize("row, expected", [
    ({"instruction": "Add", "input": "1, 2", "output": "3"}, [user("Add\n\n1, 2"), assistant("3")]),
    ({"instruction": "Add", "input": None, "output": "3"}, [user("Add"), assistant("3")]),
    ({"instruction": "Add", "output": "3, of course", "answer": "3"}, [user("Add"), assistant("3, of course")]),
    ({"instruction": "Add", "context": "1, 2", "response": "3"}, [user("Add\n\n1, 2"), assistant("3")]),
    ({"instruction": "b", "input": "", "output": "c", "history": [["a", "x"]]},
     [user("a"), assistant("x"), user("b"), assistant("c")]),
    ({"prompt": "Hi", "response": "Yes."}, HI + BETTER),
    ({"prompt": HI, "completion": "Yes."}, HI + BETTER),
    ({"prompt": "Be kind." + DIALOGUE, "response": "Yes."}, [{"role": "system", "content": "Be kind."}] + HI + BETTER),
    ({"question": "Hi", "answer": "Yes."}, HI + BETTER),
    ({"messages": HI + BETTER}, HI + BETTER),
    ({"messages": [{"role": "system", "content": ""}] + HI + BETTER + [user("Thanks")]}, HI + BETTER),
    ({"conversations": [{"from": "gpt", "value": "Welcome"}, {"from": "human", "value": "Hi"},
                        {"from": "gpt", "value": "Yes."}]}, HI + BETTER),
    ({"conversations": ["Hi", "Yes."]}, HI + BETTER),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "bing", "value": "Yes."}]}, HI + BETTER),
    ({"prompt": DIALOGUE, "response": " Yes."}, HI + BETTER),
    ({"system": "Be odd.", "messages": [{"role": "system", "content": "Be kind."}] + HI + BETTER},
     [{"role": "system", "content": "Be kind."}] + HI + BETTER),
    ({"system_prompt": "Be kind.", "question": "Hi", "response": "Yes."},
     [{"role": "system", "content": "Be kind."}] + HI + BETTER),
])
def test_each_form_of_instruction(tmp_path, row, expected):
    assert list(read_instructions(write(tmp_path, "a.jsonl", [row]))) == [expected]


@pytest.mark.parametrize("row, expected", [
    ({"prompt": "Hi"}, "Hi"), ({"prompt": DIALOGUE}, DIALOGUE), ({"prompt": HI}, "Hi"),
    ({"prompt": "\n\nHuman: Hi\n\nAssistant: "}, DIALOGUE),
    ({"prompt": [user("Say\n\nHuman: Hi")]}, "\n\nHuman: Say\n\nHuman: Hi" + CUE),
    ({"prompt": [{"role": "system", "content": "Be kind."}] + HI}, "Be kind." + DIALOGUE),
    ({"goal": "Hi", "target": "Sure"}, "Hi"), ({"turns": ["Hi", "And now?"]}, "Hi"),
    ({"chosen": DIALOGUE + " Yes.", "rejected": DIALOGUE + " Yes."}, DIALOGUE),
    ({"instruction": "Add", "input": "1"}, "Add\n\n1"),
    ({"messages": HI + BETTER}, "Hi"), ({"conversations": ["Hi"]}, "Hi"),
    ({"messages": HI + BETTER + [user("Why?")] + WORSE}, "\n\nHuman: Hi\n\nAssistant: Yes.\n\nHuman: Why?" + CUE),
])
def test_each_form_of_prompt(tmp_path, row, expected):
    assert list(read_prompts(write(tmp_path, "a.jsonl", [row]))) == [expected]


@pytest.mark.parametrize("reader, row, reason", [
    (read_preferences, {"prompt": "Hi", "chosen": "Yes.", "rejected": "Yes."}, "chosen and rejected alike"),
    (read_preferences, {"prompt": " ", "chosen": "Yes.", "rejected": "No."}, "a blank prompt"),
    (read_preferences, {"prompt": DIALOGUE + " Yes.", "chosen": "Yes.", "rejected": "No."}, "a prompt that ends with a reply"),
    (read_prompts, {"prompt": []}, "a blank prompt"),
    (read_prompts, {"prompt": HI + BETTER}, "a prompt that ends with a reply"),
    (read_instructions, {"prompt": "Hi", "response": "\n"}, "a blank turn"),
    (read_instructions, {"messages": HI}, "no answer to a question"),
    (read_instructions, {"messages": HI + HI + BETTER}, "turns that do not alternate"),
    (read_prompts, {"messages": []}, "a blank prompt"),
])
def test_useless_rows_are_left_out_and_counted(tmp_path, reader, row, reason):
    good = {"prompt": "Hi", "chosen": "Yes.", "rejected": "No.", "response": "Yes."}
    rows = reader(write(tmp_path, "a.jsonl", [row, good, row]))
    assert len(list(rows)) == 1 and rows.skipped == {reason: 2}
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path))}/b.jsonl: .*usable row, found none: 1 rows left out, with {reason}$"):
        list(reader(write(tmp_path, "b.jsonl", [row])))


# ---- files ----

@pytest.mark.parametrize("name, content", [
    ("a.jsonl", b'\xef\xbb\xbf{"prompt": "Hi"}\r\n\r\n{"prompt": "Ho"}'),
    ("a.json", b'\n [\n{"prompt": "Hi"},\r\n {"prompt":\n"Ho"}]\n'),
    ("a.json", b'{"prompt": "Hi"}\n{"prompt": "Ho"}\n'),
    ("A.JSONL.GZ", gzip.compress(b'{"prompt": "Hi"}\n', mtime=0) + gzip.compress(b'{"prompt": "Ho"}\n', mtime=0)),
    ("a.txt", b"\xef\xbb\xbfHi\r\n \nHo"), ("a.txt.gz", gzip.compress(b"Hi\nHo\n", mtime=0)),
    ("a.csv", b'\xef\xbb\xbfid,prompt\r\n1,"Hi"\r\n2,Ho\r\n'), ("a.tsv", b"Hi\tx\ty\nHo\tx\ty\n"),
])
def test_byte_order_marks_crlf_blank_lines_and_gzip_are_accepted(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert list(read_prompts(tmp_path / name)) == ["Hi", "Ho"]


def test_only_newlines_end_a_line(tmp_path):
    """str.splitlines would break at these too, in the middle of a JSON text."""
    text = "a\u2028b\u2029c\x85d"
    assert list(read_prompts(write(tmp_path, "a.jsonl", f'{{"prompt": "{text}"}}'))) == [text]
    assert list(read_prompts(write(tmp_path, "a.txt", text + "\n" + text))) == [text, text]


def test_csv_fields_may_hold_line_ends_and_quotes(tmp_path):
    path = write(tmp_path, "a.csv", 'prompt,x\n"one\ntwo, ""three""",1\nfour,2\n')
    assert list(read_prompts(path)) == ['one\ntwo, "three"', "four"]


def test_a_folder_is_all_its_known_files_in_order_and_below(tmp_path):
    for number, name in enumerate(["b/c.jsonl", "a.json", "b.jsonl.gz"]):
        write(tmp_path, name, [{"prompt": str(number), "response": "x"}])
    write(tmp_path, "README.md", "no data")
    write(tmp_path, "._a.json", b"\x00\xff")
    write(tmp_path, "z.txt", "a line")
    assert list(read_prompts(tmp_path)) == ["1", "0", "2", "a line"]
    assert [example[0]["content"] for example in read_instructions(tmp_path)] == ["1", "0", "2"]


RED_TEAM = [{"min_harmlessness_score_transcript": -1.9, "transcript": DIALOGUE + " No.", "rating": 4.0}]


@pytest.fixture
def clone(tmp_path):
    """A clone of Anthropic/hh-rlhf in small: what git leaves there, and files of other kinds."""
    for number, name in enumerate(["harmless-base/test", "harmless-base/train", "helpful-base/train"]):
        reply = f" {number}"
        write(tmp_path, f"{name}.jsonl.gz", [{"chosen": DIALOGUE + reply, "rejected": DIALOGUE + " No."}])
    write(tmp_path, "red-team-attempts/red_team_attempts.jsonl.gz", json.dumps(RED_TEAM))
    write(tmp_path, "dataset_infos.json", json.dumps({"default": {"features": {}}}, indent=2))
    write(tmp_path, "list.json", '["chosen", "rejected"]')
    write(tmp_path, "table.tsv", "id\ttext\n1\tHi\n")
    write(tmp_path, "empty.csv", "chosen,rejected\n")
    write(tmp_path, "README.md", "no data")
    write(tmp_path, ".git/lfs/test.jsonl", "{")
    return tmp_path


def test_files_of_other_rows_are_left_out_of_a_folder_and_named(clone):
    rows = read_preferences(clone)
    assert [chosen for _, chosen, _ in rows] == [" 0", " 1", " 2"]
    notes = sorted(rows.notes())
    others = ["dataset_infos.json: ", "empty.csv: ", "list.json: ", "red-team-attempts/red_team_attempts.jsonl.gz: "]
    assert len(notes) == 5 and not rows.skipped
    for note, name in zip(notes, [*others, "table.tsv:1: "]):
        assert note.startswith(f"a file of other rows left out, {clone}/{name}") and "expected" in note
    assert notes[3].endswith("'transcript', 'rating']")


def test_a_file_of_other_rows_is_refused_by_itself_and_where_there_is_nothing_else(clone):
    folder = clone / "red-team-attempts"
    for path in folder, next(folder.iterdir()):
        with pytest.raises(InputError, match=r"red_team_attempts.jsonl.gz: item 1: expected .* found \['min_h"):
            list(read_preferences(path))
    write(folder, "more.jsonl", [{"text": "a"}])
    with pytest.raises(InputError, match=r"^\S+/red-team-attempts: expected .* usable row, .*more.jsonl:1: .*item 1: "):
        list(read_preferences(folder))


def test_a_row_that_lacks_fields_further_down_is_a_mistake(clone):
    path = write(clone, "harmless-base/train.jsonl.gz", [{"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a"}])
    with pytest.raises(InputError, match=re.escape(f"{path}:2: expected")):
        list(read_preferences(clone))


def test_files_have_labels_and_rows_tell_theirs(clone):
    files = data_files(clone / "harmless-base")
    assert files == {name: clone / f"harmless-base/{name}.jsonl.gz" for name in ("test", "train")}
    assert list(files) == ["test", "train"]
    assert data_files(files["test"]) == {"test": files["test"]}
    rows = read_preferences(clone)
    labels = [rows.label for _ in rows]
    assert labels == ["harmless-base/test", "harmless-base/train", "helpful-base/train"]
    for row, label in zip(read_preferences(clone), labels, strict=True):
        assert list(read_preferences(data_files(clone)[label])) == [row]
    same = [write(clone, f"same/a.{ending}", [{"prompt": "a"}]) for ending in ("json", "jsonl")]
    assert data_files(clone / "same") == {"a": same[0], "a.jsonl": same[1]}


def test_csv_holds_preferences_and_instructions(tmp_path):
    path = write(tmp_path, "a.csv", 'prompt,chosen,rejected,response\nHi,"Yes,\nsure",No.,Yes.\n')
    assert list(read_preferences(path)) == [("Hi", "Yes,\nsure", "No.")]
    assert list(read_instructions(path)) == [HI + BETTER]


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.jsonl.gz", "a.parquet", "a.arrow"])
def test_a_pointer_of_git_lfs_is_named_with_the_command_that_gets_the_data(clone, name):
    if name.endswith(("parquet", "arrow")):
        pytest.importorskip("pyarrow", reason="pyarrow reads Parquet and Arrow")
    (clone / name).write_text(POINTER)
    for path in clone, clone / name:
        with pytest.raises(InputError, match=re.escape(f"{clone / name}: ") + ".*`git lfs pull`"):
            list(read_prompts(path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_only_ordinary_files_are_opened(clone):
    os.mkfifo(clone / "a.jsonl")
    assert len(list(read_preferences(clone))) == 3
    os.symlink("/dev/zero", clone / "b.jsonl")
    for name in "a.jsonl", "b.jsonl":
        with pytest.raises(InputError, match=name):
            list(read_preferences(clone / name))


# ---- Parquet and Arrow ----

TABLE = [{"prompt": HI, "chosen": BETTER, "rejected": WORSE, "messages": HI + BETTER, "id": 3, "note": None},
         {"prompt": HI, "chosen": WORSE, "rejected": BETTER, "messages": HI + WORSE, "id": None, "note": b"x"}]


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow writes Parquet")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("reader", READERS)
def test_parquet_gives_what_the_same_rows_give_as_json(tmp_path, reader):
    path = write_parquet(tmp_path / "train-00000-of-00001.parquet", TABLE * 800)
    rows = [{field: value for field, value in row.items() if field != "note"} for row in TABLE]
    assert list(reader(path)) == list(reader(write(tmp_path, "a.jsonl", rows))) * 800
    assert list(data_files(tmp_path)) == ["a", "train-00000-of-00001"]


@pytest.mark.parametrize("reader", READERS)
def test_what_save_to_disk_writes_is_read(tmp_path, reader):
    datasets = pytest.importorskip("datasets", reason="datasets writes its own folders")
    whole = datasets.Dataset.from_list(TABLE * 700)
    datasets.DatasetDict({"test": whole, "train": whole.select([0])}).save_to_disk(tmp_path / "d")
    rows = reader(tmp_path / "d")
    items = list(reader(write_parquet(tmp_path / "a.parquet", TABLE)))
    assert list(rows) == items * 700 + items[:1]
    assert rows.label == "train/data-00000-of-00001"
    one = datasets.load_from_disk(tmp_path / "d")["test"]
    one.map(lambda row: row | {"id": 4})   # which leaves a cache beside the data
    assert list(tmp_path.rglob("cache-*.arrow"))
    assert len(list(reader(tmp_path / "d/test"))) == 1400


def test_mistakes_in_parquet_are_named(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", TABLE[:1] * 1500)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="a.parquet: expected a whole Parquet or Arrow file"):
        list(read_preferences(path))
    path = write_parquet(tmp_path / "b.parquet", [{"prompt": "a", "chosen": "b", "rejected": c} for c in ["c"] * 1500 + [None]])
    with pytest.raises(InputError, match='b.parquet: item 1501: expected "rejected" to be text, found None'):
        list(read_preferences(path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"b.parquet: .*\(pip install pyarrow\)"):
        list(read_preferences(path))


# ---- the hub ----

READ = """
import json, sys
from data import read_preferences
from support.files import InputError
for path in sys.stdin:
    try:
        rows = read_preferences(path.strip())
        print(json.dumps([[rows.label, chosen] for _, chosen, _ in rows]), flush=True)
    except InputError as error:
        print(json.dumps({"refused": str(error)}), flush=True)
"""
HARMLESS = [["test", " 0"], ["train", " 1"]]
WHOLE = [["harmless-base/test", " 0"], ["harmless-base/train", " 1"], ["helpful-base/train", " 2"]]


def test_data_sets_of_the_hub(clone, tmp_path_factory, monkeypatch):
    """The whole, a folder of it and a file of it; from the cache when the hub is gone; a local path comes first."""
    pytest.importorskip("huggingface_hub", reason="hub ids need huggingface_hub")
    home = tmp_path_factory.mktemp("home")
    monkeypatch.chdir(home)
    with hub({"org/hh": clone}, cut_once=["train.jsonl.gz"]) as (server, variables):
        variables["HF_HOME"] = str(home / "cache")
        with asking(READ, **variables) as ask, asking(READ, **variables, HF_HUB_OFFLINE="1") as ask_offline:
            assert ask("org/hh:harmless-base") == HARMLESS
            assert set(server.fetched) == {f"org/hh/harmless-base/{name}.jsonl.gz" for name in ("test", "train")}
            assert ask("org/hh:helpful-base/train.jsonl.gz") == [["train", " 2"]]
            assert ask("org/hh") == WHOLE
            assert "org/hh/README.md" not in server.fetched
            assert "404" in ask("org/unknown")["refused"]
            assert "ending in .jsonl" in ask("org/hh:nothing")["refused"]
            count = server.fetched.total()
            assert "nothing at that path" in ask("org/hh.jsonl")["refused"]   # a file that is not there
            write(home, "org/local/a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
            write(home, "org/local/b/a.jsonl", [{"prompt": "a", "chosen": "d", "rejected": "c"}])
            assert ask("org/local") == [["a", "b"], ["b/a", "d"]]
            assert ask("org/local:b") == [["a", "d"]]
            assert server.fetched.total() == count
            server.shutdown()
            server.server_close()
            for ask_then in ask, ask_offline:
                assert ask_then("org/hh") == WHOLE
                assert ask_then("org/hh:harmless-base") == HARMLESS
                line = ask_then("org/never")["refused"]
                assert line.startswith("org/never: no such folder here, and the hub does not give it (")
                assert "\n" not in line


def test_jsonl_is_read_as_it_is_asked_for(tmp_path):
    rows = read_prompts(write(tmp_path, "a.jsonl", '{"prompt": "Hi"}\n{"prompt": '))
    assert next(rows) == "Hi"
    with pytest.raises(InputError, match=r"a\.jsonl:2: "):
        next(rows)


def test_a_large_jsonl_never_stands_in_memory(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for number in range(4000):
            file.write(json.dumps({"prompt": str(number) + "x" * 5000}).encode() + b"\n")
    tracemalloc.start()
    count = sum(1 for _ in read_prompts(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 4000 and peak < 2**20   # of 20 MB


# ---- the split ----

def test_no_first_turn_of_hh_stands_on_both_sides():
    items = list(read_preferences(public("hh_rlhf")))
    train, held_out = split_by_first_turn(items, 0.1, seed=0)

    def openings(side):   # by a regular expression, not by dialogue()
        return {re.match(r"\n\nHuman: (.*?)(?=\n\nAssistant:)", item[0], re.S)[1].strip() for item in side}
    assert len(train) + len(held_out) == len(items)
    assert len(openings(items)) < len(items)   # they do repeat
    assert not openings(train) & openings(held_out)
    assert 0.08 < len(held_out) / len(items) < 0.12


def test_the_split_hangs_on_turn_and_seed_alone():
    items = [f"question {number}" for number in range(1000)]
    train, held_out = split_by_first_turn(items, 0.2, seed=1)
    shuffled = random.Random(0).sample(items, 600)
    assert set(split_by_first_turn(shuffled, 0.2, seed=1)[1]) == set(held_out) & set(shuffled)
    assert split_by_first_turn(items, 0.2, seed=2)[1] != held_out
    assert train + held_out != items and sorted(train + held_out) == sorted(items)
    assert set(held_out) < set(split_by_first_turn(items, 0.3, seed=1)[1])


def test_a_first_turn_falls_on_one_side_in_every_form():
    for number in range(50):
        text = f"Question {number}"
        forms = [text, (text, "yes", "no"), f"\n\nHuman: {text} \n\nAssistant:",
                 f"Be kind.\n\nHuman: {text.upper()}\n\nAssistant: A\n\nHuman: B" + CUE,
                 [{"role": "system", "content": "Be kind."}, user(text), assistant("A")]]
        assert [] in split_by_first_turn(forms, 0.5, seed=3)


def test_split_edges():
    items = ["a", "b", "c"]
    assert split_by_first_turn(items, 0, 0) == (items, [])
    assert split_by_first_turn(items, 1, 0) == ([], items)
    with pytest.raises(InputError, match="fraction"):
        split_by_first_turn(items, 1.5, 0)


# ---- broken input ----

PAIR = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
PACKED = gzip.compress(PAIR.encode() * 9, mtime=0)


@pytest.mark.parametrize("reader, name, content, where, what", [
    (read_preferences, "a.jsonl", b"", "a.jsonl: ", "at least one row, found none"),
    (read_preferences, "a.jsonl.gz", gzip.compress(b"", mtime=0), "a.jsonl.gz: ", "at least one row"),
    (read_preferences, "a.json", b"[]", "a.json: ", "at least one row"),
    (read_prompts, "a.csv", b"prompt\n", "a.csv: ", "at least one row"),
    (read_prompts, "a.txt", b"\n \n", "a.txt: ", "at least one row"),
    (read_preferences, "a.pdf", b"%PDF", "a.pdf: ", "ending in .jsonl, .json"),
    (read_preferences, "a.txt", b"hello", "a.txt:1: ", 'expected {"chosen", "rejected"} dialogues'),
    (read_preferences, "a.jsonl", b"\x89PNG\r\n\x1a\n\0\0", "a.jsonl:1: ", "expected UTF-8 text ('utf-8' codec can't decode byte 0x89"),
    (read_prompts, "a.txt", b"hello\nab\0c", "a.txt:2: ", "zero byte"),
    (read_prompts, "a.txt", "h\u00e9".encode("latin-1"), "a.txt:1: ", "byte 0xe9"),
    (read_prompts, "a.txt", "hello".encode("utf-16"), "a.txt:1: ", "UTF-8 text"),
    (read_prompts, "a.txt", b"\xef\xbb\xbfab\xff", "a.txt:1: ", "byte 0xff"),
    (read_preferences, "a.jsonl.gz", PACKED[:-20], "a.jsonl.gz:1: ", "a whole gzip file"),
    (read_preferences, "a.jsonl.gz", PACKED[:10] + b"\xff" * 40, "a.jsonl.gz:1: ", "a whole gzip file"),
    (read_preferences, "a.jsonl.gz", PACKED[:-8] + bytes(8), "a.jsonl.gz:10: ", "CRC check failed"),
    (read_preferences, "a.jsonl.gz", PAIR.encode(), "a.jsonl.gz:1: ", "gzip"),
    (read_preferences, "a.jsonl", PAIR + "{'prompt': 1}", "a.jsonl:2: ", "expected a JSON object a line"),
    (read_preferences, "a.jsonl", PAIR + "\n[1, 2]", "a.jsonl:3: ", "expected a JSON object, found [1, 2]"),
    (read_preferences, "a.jsonl", PAIR + "null", "a.jsonl:2: ", "expected a JSON object, found None"),
    (read_preferences, "a.json", "[" + PAIR + ", 7]", "a.json: item 2: ", "expected a JSON object, found 7"),
    (read_preferences, "a.json", "[" + PAIR + ",\n{]", "a.json:3: ", "expected a JSON object a line"),
    (read_preferences, "a.json", "{\n}", "a.json: item 1: ", "found []"),
    (read_preferences, "a.json", "{\n]", "a.json:2: ", "expected a JSON object a line"),
    (read_preferences, "a.jsonl", "[" * 99999, "a.jsonl:1: ", "plain JSON"),
    (read_preferences, "a.jsonl", '{"prompt": ' + "9" * 9999 + "}", "a.jsonl:1: ", "plain JSON"),
    (read_preferences, "a.jsonl", '{"prompt": "a", "chosen": "b"}', "a.jsonl:1: ", "found ['prompt', 'chosen']"),
    (read_preferences, "a.jsonl", '{"chosen": "b", "rejected": "c"}', "a.jsonl:1: ", r'up to some "\n\nAssistant:"'),
    (read_preferences, "a.jsonl", PAIR.replace('"b"', "5"), "a.jsonl:1: ", 'expected "chosen" to be text, found 5'),
    (read_preferences, "a.jsonl", PAIR.replace('"c"', "[]"), "a.jsonl:1: ", 'expected "rejected" to be text, found []'),
    (read_preferences, "a.jsonl", PAIR.replace('"b"', '["b"]'), "a.jsonl:1: ", 'expected "chosen" to hold messages'),
    (read_preferences, "a.jsonl", PAIR.replace('"a"', '{"b": 1}'), "a.jsonl:1: ", 'expected "prompt" to be text or a list'),
    (read_preferences, "a.jsonl", PAIR.replace('"a"', '"\\ud800"'), "a.jsonl:1: ", r"found '\ud800'"),
    (read_preferences, "a.jsonl", '{"prompt": "a", "response": ["b"]}', "a.jsonl:1: ", "[better, worse]"),
    (read_prompts, "a.jsonl", '{"id": 1}', "a.jsonl:1: ", 'expected {"prompt"}, '),
    (read_prompts, "a.jsonl", '{"turns": [1]}', "a.jsonl:1: ", 'expected "turns" to be text'),
    (read_prompts, "a.csv", "id,text\n1,hello\n", "a.csv:2: ", "found ['id', 'text']"),
    (read_prompts, "a.csv", "id,prompt\n1\n", "a.csv:2: ", 'expected "prompt" to be text or a list of messages, found None'),
    (read_preferences, "a.csv", "prompt,chosen\na,b\n", "a.csv:2: ", "found ['prompt', 'chosen']"),
    (read_prompts, "a.csv", 'prompt\nhello\n"open\n', "a.csv:3: ", "expected CSV"),
    (read_prompts, "a.csv", "prompt\n" + "x" * 200000, "a.csv:2: ", "field limit"),
    (read_instructions, "a.tsv", "a\tb\tc\na\tb\n", "a.tsv:2: ", "question, answer and rationale"),
    (read_instructions, "a.jsonl", '{"instruction": "a"}', "a.jsonl:1: ", "found ['instruction']"),
    (read_instructions, "a.jsonl", '{"prompt": "a", "response": ["b", "c"]}', "a.jsonl:1: ", 'expected "response" to be text'),
    (read_instructions, "a.jsonl", '{"messages": "a"}', "a.jsonl:1: ", 'expected "messages" to be a list'),
    (read_instructions, "a.jsonl", '{"messages": [{"role": "tool", "content": "a"}]}', "a.jsonl:1: ", "a role of user, human"),
    (read_instructions, "a.jsonl", '{"messages": [{"role": [], "content": "a"}]}', "a.jsonl:1: ", "a role of user, human"),
    (read_instructions, "a.jsonl", '{"messages": [{"role": "user"}]}', "a.jsonl:1: ", '"messages: content" to be text'),
    (read_instructions, "a.jsonl", '{"instruction": "a", "output": "b", "history": [5]}', "a.jsonl:1: ", '"history" to be a list'),
])
def test_broken_input_is_one_line_that_says_where_and_what(tmp_path, reader, name, content, where, what):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as error:
        list(reader(path))
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/{where}") and what in message and "\n" not in message


@pytest.mark.parametrize("reader", READERS)
def test_a_missing_or_empty_place_is_refused_before_the_first_row(tmp_path, reader):
    write(tmp_path, "README.md", "no data")
    for name in ["nothing.jsonl", "", "README.md", "x" * 300, "\0"]:
        path = tmp_path / name
        with pytest.raises(InputError, match=re.escape(str(path))):
            reader(path)


def test_a_huge_line_is_read_up_to_the_bound(tmp_path, monkeypatch):
    assert len(next(read_prompts(write(tmp_path, "a.txt", "x" * 10**7)))) == 10**7
    monkeypatch.setattr(data.readers, "MAX_LINE", 1000)
    assert len(next(read_prompts(write(tmp_path, "a.txt", "x" * 999 + "\n")))) == 999
    with pytest.raises(InputError, match="a.txt:2: expected lines of at most 1000 bytes"):
        list(read_prompts(write(tmp_path, "a.txt", "y\n" + "x" * 1001)))


# ---- fuzz ----

FUZZ = settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
SCALARS = st.sampled_from([None, True, 0, 1e300, float("nan"), "", " ", "a", "\0", DIALOGUE, DIALOGUE + " b", "\ud800"])
TURN = st.fixed_dictionaries({}, optional={"role": st.sampled_from(["user", "assistant", "system", "x", 3, []]),
                                           "from": st.just("gpt"), "content": SCALARS, "value": SCALARS})
VALUES = SCALARS | st.lists(SCALARS | TURN | st.lists(SCALARS, max_size=2), max_size=3) | TURN
FIELDS = ["prompt", "chosen", "rejected", "response", "instruction", "input", "output", "history", "messages",
          "conversations", "question", "answer", "turns", "goal", "context", "completion"]
ENDINGS = [".jsonl", ".json", ".txt", ".csv", ".tsv", ".parquet", ".arrow"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def survives(path):
    """Every reader ends in rows of its kind or in an InputError of one line that names the file."""
    for reader in READERS:
        try:
            for item in reader(path):
                if reader is read_instructions:
                    assert item[-1]["role"] == "assistant" and all(m["content"].strip() for m in item)
                elif reader is read_preferences:
                    assert [type(text) for text in item] == [str] * 3 and item[1] != item[2]
                else:
                    assert isinstance(item, str) and item.strip()
        except InputError as error:
            assert str(error).startswith(str(path)) and len(str(error).splitlines()) == 1


@FUZZ
@given(content=st.binary(max_size=200), ending=st.sampled_from(ENDINGS), packed=st.booleans())
def test_any_bytes_end_in_rows_or_an_input_error(folder, content, ending, packed):
    survives(write(folder, "a" + ending + ".gz" * packed, content))


@FUZZ
@given(rows=st.lists(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4) | VALUES, max_size=3),
       array=st.booleans())
def test_any_json_ends_in_rows_or_an_input_error(folder, rows, array):
    survives(write(folder, "rows.json", json.dumps(rows) if array else rows))


@FUZZ
@given(data=st.data())
def test_any_damage_to_a_good_file_ends_in_rows_or_an_input_error(folder, data):
    content = bytearray(data.draw(st.sampled_from([
        (json.dumps({"chosen": DIALOGUE + " a", "rejected": DIALOGUE + " b"}) + "\n").encode() * 2,
        json.dumps([{"messages": HI + BETTER}, {"instruction": "a", "output": "b", "history": [["c", "d"]]}]).encode(),
        b'id,prompt\n1,"a ""b"""\n2,c\n', b"a\tb\tc\nd\te\tf\n"])))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place:place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    ending, packed = data.draw(st.sampled_from(ENDINGS)), data.draw(st.booleans())
    path = write(folder, "b" + ending + ".gz" * packed, bytes(content))
    if packed and data.draw(st.booleans()):
        whole = path.read_bytes()
        path.write_bytes(whole[:data.draw(st.integers(0, len(whole)))])
    survives(path)


@FUZZ
@given(asked=st.lists(st.text("aH: \n", max_size=6) | st.just("x\n\nHuman: y"), min_size=1, max_size=3),
       replies=st.lists(st.text("aA: \n", max_size=6) | st.just("x\n\nAssistant: y"), min_size=3, max_size=3),
       system=st.sampled_from(["", "Be kind."]), answered=st.booleans())
def test_messages_go_through_the_hh_form_and_back(asked, replies, system, answered):
    """Whatever they say, but for the other speaker's tag, at which that one speaks."""
    messages = [turn for pair in zip(map(user, asked), map(assistant, replies)) for turn in pair]
    messages = [{"role": "system", "content": system}] * bool(system) + messages[:len(messages) - (not answered)]
    assert dialogue(hh_prompt(messages)) == messages


@FUZZ
@given(text=st.lists(st.sampled_from(["\n\nHuman:", "\n\nAssistant:", " ", "a", "\n"]), max_size=9).map("".join))
def test_a_prompt_of_any_shape_settles_after_one_pass(text):
    once = hh_prompt(dialogue(text)) if "\n\nHuman:" in text else text
    assert dialogue(once) == dialogue(text)
