"""The folders that stages leave, opened by the programs that people use: transformers (tokenizer, pipeline,
classifier), lm-evaluation-harness, mergekit."""

import shutil

import pytest
import torch

import c2f
from data import read_preferences, world
from evaluation.likelihoods import loglikelihoods
from merge import merge_checkpoints
from model import Mistral, generate
from reward import RewardModel
from run.folder import Run
from tokenizer import companions, load_tokenizer
from weights import Weights

BASE = world.TINY / "base"
CHAT = [
    {"role": "user", "content": "Start at 2. Times 3. Add 17. Keep two digits. What is the total?"},
    {"role": "assistant", "content": "It is 23."},
    {"role": "user", "content": "Ann gave me a hat. What is Ann?"},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    few = "--steps 2 --batch-pairs 4 --batch-tokens 512 --test-pairs 4 --threads 1".split()
    for stage in "sft", "reward":
        assert c2f.main(["--stage", stage, "--out", str(out), *few]) == 0
    return out


@pytest.fixture(scope="module")
def sft(run):
    return Mistral.from_pretrained(run / "sft"), load_tokenizer(run / "sft")


def test_auto_tokenizer(run, sft):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(run / "sft")
    ours = sft[1]
    for text in (CHAT[0]["content"], "\n\nHuman: Hi.\n\nAssistant: It is 23.", "", "naïve 42\n\n"):
        assert theirs(text).input_ids == ours.encode(text, bos=True)
    ids = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert list(ids) == ours.encode_chat(CHAT)


def test_pipeline(run, sft):
    transformers = pytest.importorskip("transformers")
    model, tokenizer = sft
    pipe = transformers.pipeline("text-generation", model=str(run / "sft"), dtype=torch.float32)
    answer = pipe(CHAT, do_sample=False, max_new_tokens=24)[0]["generated_text"][-1]["content"]
    ids = generate(model, [tokenizer.encode_chat(CHAT)], 24, temperature=0, eos_id=tokenizer.eos_id)[0]
    assert answer == tokenizer.decode(ids)
    assert len(ids) > 4


def test_lm_eval(run, sft):
    HFLM = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed").HFLM
    from lm_eval.api.instance import Instance

    pairs = [(f"Question: what follows {n}?\nAnswer:", f" It is {n + 1}.") for n in range(12)]
    pairs.append(("\n\nHuman: Hi.", " x"))
    harness = HFLM(pretrained=str(run / "sft"), device="cpu", dtype="float32", batch_size=4)
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    expected = [value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    torch.testing.assert_close(loglikelihoods(*sft, pairs), torch.tensor(expected), rtol=0, atol=1e-4)


def test_lm_eval_and_a_batching_pipeline_open_a_folder_that_came_with_tokenizer_json_alone(tmp_path):
    transformers = pytest.importorskip("transformers")
    HFLM = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed").HFLM
    from lm_eval.api.instance import Instance

    source, saved = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(BASE / name, source)
    model, tokenizer = Mistral.from_pretrained(source), load_tokenizer(source)
    model.save_pretrained(saved, companions(tokenizer))
    pairs = [("", "It is 23."), ("Question: what is 2?\nAnswer:", " It is 3."), ("Hi.", " So")]
    harness = HFLM(pretrained=str(saved), device="cpu", dtype="float32", batch_size=3)
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    expected = [value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    torch.testing.assert_close(loglikelihoods(model, tokenizer, pairs), torch.tensor(expected), rtol=0, atol=1e-4)
    pipe = transformers.pipeline("text-generation", model=str(saved), dtype=torch.float32, batch_size=2)
    chats = [CHAT[:1], CHAT]
    answers = pipe(chats, do_sample=False, max_new_tokens=12)
    ids = generate(model, list(map(tokenizer.encode_chat, chats)), 12, temperature=0, eos_id=tokenizer.end_ids)
    assert [answer[0]["generated_text"][-1]["content"] for answer in answers] == list(map(tokenizer.decode, ids))


def test_mergekit_reads_both_and_merges_to_the_same(run, tmp_path):
    way = "pip install --no-deps mergekit, and immutables scipy"
    pytest.importorskip("mergekit", reason=f"not installed; its pins exclude ours: {way}")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    merge_checkpoints(run / "sft", BASE, tmp_path / "ours", 0.7)
    parts = [
        {"model": str(run / "sft"), "parameters": {"weight": 0.7}},
        {"model": str(BASE), "parameters": {"weight": 0.3}},
    ]
    config = {"merge_method": "linear", "models": parts, "dtype": "float32", "parameters": {"normalize": False}}
    run_merge(MergeConfiguration.model_validate(config), str(tmp_path / "theirs"), MergeOptions(quiet=True))
    ours, theirs = Weights(tmp_path / "ours"), Weights(tmp_path / "theirs")
    assert len(ours.names) > 30 and set(ours.names) == set(theirs.names)
    for name in ours.names:
        torch.testing.assert_close(theirs.read(name), ours.read(name), rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_reward_folder_classifies_text(run):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(run / "reward", dtype=torch.float32).eval()
    text = transformers.AutoTokenizer.from_pretrained(run / "reward")
    ours = RewardModel.from_pretrained(run / "reward")
    dialogues = [p + c for p, c, _ in list(read_preferences(world.TINY / "preferences"))[:12]]
    expected = torch.cat([theirs(**text(d, return_tensors="pt")).logits[:, 0] for d in dialogues])
    tokenizer = load_tokenizer(run / "reward")
    scores = ours.score_rows([tokenizer.encode(d, bos=True) for d in dialogues])
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)
    assert scores.std() > 1e-2


def test_a_folder_of_mistrals_own_form_leaves_as_hugging_face_form(tmp_path):
    """A SentencePiece model alone beside the weights, as Mistral distributes it."""
    transformers = pytest.importorskip("transformers")
    peer = pytest.importorskip("mistral_common")
    source = tmp_path / "in"
    shutil.copytree(BASE, source, ignore=lambda *_: ["tokenizer.json", "chat_template.jinja", "tokenizer_config.json"])
    (source / "tokenizer.model").unlink()
    shutil.copy(f"{peer.__path__[0]}/data/tokenizer.model.v1", source / "tokenizer.model.v1")
    run = Run(c2f.resolve({"out": str(tmp_path / "run"), "stage": "sft"}, "sft"), "sft")
    run.save(Mistral.from_pretrained(source), load_tokenizer(source))
    saved = tmp_path / "run" / "sft"
    theirs = transformers.AutoTokenizer.from_pretrained(saved)
    turns = [CHAT[0], {"role": "assistant", "content": "It is 23."}, CHAT[2]]
    ids = list(theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
    assert ids == load_tokenizer(source).encode_chat(turns) == load_tokenizer(saved).encode_chat(turns)
    assert len({p.stat().st_mode for p in saved.iterdir()}) == 1  # whoever may read one may read all
