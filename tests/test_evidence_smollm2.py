"""evidence/smollm2.py: who may read which prompts, what a reply's figures are, how items become intervals."""

import json

import pytest
import torch

import c2f
from data import dialogue, read_preferences, world
from evidence import report, smollm2, stages
from evidence.claims import Line, reply_numbers
from evidence.jobs import Job, closure
from evidence.smollm2 import SMOLLM2
from reward import RewardModel
from support.options import build_parser
from tokenizer import load_tokenizer


def run_stage(stage, folder, *arguments):
    stages.main([stage, "--out", str(folder), *map(str, arguments)])


def jobs_of(tmp_path):
    """All jobs of two seeds."""
    lines = [Line(seed, model=str(world.TINY / "base"), data=str(tmp_path)) for seed in (1, 2)]
    return closure([roles["reply"] for line in lines for roles in SMOLLM2.jobs(line).values()])


def test_every_command_is_understood(tmp_path):
    """Each program gets every option that its job was given, and c2f.py finds no fault with them."""
    parser = build_parser(c2f.Options, "c2f.py", "", "")
    for job in jobs_of(tmp_path):
        program, *arguments = job.command(tmp_path)[1:]
        if program == "c2f.py":
            values = vars(parser.parse_args(arguments))
            c2f.resolve(values, job.stage)
        else:
            values = vars(stages.parse_options(arguments))
        for option, value in job.options:
            expected = value.output(tmp_path) if isinstance(value, Job) else value
            assert str(values[option]) == str(expected), (job.stage, option)


def test_measured_prompts_are_in_no_training(tmp_path):
    """The thirds are of one set, share no prompt, and only the first is replied to."""
    thirds = []
    for number in range(3):
        run_stage("part", tmp_path / str(number), "--preferences", world.TINY / "preferences", "--number", number)
        thirds.append(list(read_preferences(tmp_path / f"{number}/part.jsonl")))
    assert sorted(sum(thirds, [])) == sorted(read_preferences(world.TINY / "preferences"))
    prompts = [{prompt for prompt, _, _ in third} for third in thirds]
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    numbers = {}  # {(stage, seed): the third that it reads}
    for job in jobs_of(tmp_path):
        for name, value in job.options:
            if name in ("prompts", "preferences") and isinstance(value, Job):
                numbers.setdefault((job.stage, job.seed), set()).add(dict(value.options)["number"])
    assert numbers == {("reward", 1): {1}, ("reward", 2): {2}, ("plus", 1): {1}, ("plus", 2): {1}, ("reply", 1): {0}}


@pytest.fixture
def reply(tmp_path, monkeypatch):
    """What the tiny base replies, before two reward models, and of one general task."""
    monkeypatch.setattr(stages, "TASKS", ("winograd",))
    (tmp_path / "winograd").mkdir()
    item = {"context_options": ["The cat saw the dog, and the cat", "The cat saw the dog, and the dog"]}
    lines = [json.dumps(item | {"continuation": word, "gold": 0}) for word in ("ran.", "slept.", "ate.")]
    (tmp_path / "winograd/winograd_wsc.jsonl").write_text("\n".join(lines))
    tokenizer = load_tokenizer(world.TINY / "base")
    for seed in (1, 2):
        model = RewardModel.from_base(world.TINY / "base", seed=seed)
        model.save_pretrained(tmp_path / f"reward{seed}", tokenizer.files)
    words = f"--reward-model {tmp_path / 'reward1'} --second-model {tmp_path / 'reward2'} --limit 12 --smoke"
    words += f" --prompts {world.TINY / 'prompts.txt'} --benchmarks {tmp_path}"
    run_stage("reply", tmp_path, *words.split())
    return json.loads((tmp_path / "reply.json").read_text())


def test_replies_are_scored_by_both_models(reply, tmp_path):
    """Second source: the text of a reply that was cut, encoded anew and scored in fp32. The models are in bf16."""
    assert all(len(reply[name]) == 8 for name in ("reward", "second", "length", "ended_rate", "redundancy"))
    assert len(reply["general"]) == 3 and set(reply["general"]) <= {0, 1}
    assert set(reply_numbers(tmp_path / "reply.json")) == set(smollm2.COLUMNS), "no texts in the results"
    tokenizer = load_tokenizer(world.TINY / "base")
    count = 0
    for i, (prompt, text) in enumerate(reply["texts"]):
        ids = tokenizer.encode_chat(dialogue(prompt))
        row = ids + tokenizer.encode_chat([*dialogue(prompt), {"role": "assistant", "content": text}], False)[len(ids) :]
        row = row[: len(ids) + int(reply["length"][i])]
        if reply["length"][i] < 12:
            continue  # it ended, by EOS or by a stop string
        count += 1
        for name, folder in {"reward": "reward1", "second": "reward2"}.items():
            model = RewardModel.from_pretrained(tmp_path / folder)
            with torch.no_grad():
                expected = model.score(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool)).item()
            assert reply[name][i] == pytest.approx(expected, abs=0.05)
    assert count > 2 and reply["reward"] != reply["second"]


def test_items_take_the_place_of_seeds():
    """Scores in deviations of the base's; an arm is the mean of its seeds; what the claims compare, by hand."""
    base = {name: [1.0, 3.0, 5.0] for name in smollm2.COLUMNS}  # mean 3, deviation 2
    seeds = {}
    for seed, shift in {"1": 2.0, "2": 4.0}.items():
        plus = {name: [x + shift for x in values] for name, values in base.items()}
        seeds[seed] = {"base": base, "plus": plus, "gamma 0.7": base}
    data = smollm2.items_of(seeds)
    assert data["prompt 0"]["base"]["reward"] == -1 and data["question 2"]["base"]["general"] == 5
    assert data["prompt 2"]["plus, seed 1"]["second"] == 2 and data["prompt 2"]["plus"]["length"] == 8
    assert set(data["prompt 1"]) == {"base", "gamma 0.7", "plus", "plus, seed 1", "plus, seed 2"}
    rows = report.judge({"smollm2": SMOLLM2}, {"smollm2": {"seeds": seeds}})
    assert [row.verdict for row in rows] == ["holds", "holds", "holds", "fails"]
    assert [row.difference.mean for row in rows] == [1.5, 1.5, 3, -1.5] and rows[0].difference.n == 3
