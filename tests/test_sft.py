"""sft.py: which tokens are learnt, read by decoding them; the loss against torch and transformers."""

import copy
import json
from itertools import islice

import pytest
import torch
import torch.nn.functional as F

import sft
from data import world
from model import Config, Mistral, initialize
from tokenizer import load_tokenizer

SINGLE = [
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "I am well. How can I help you?"},
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *SINGLE]
MULTI = [
    *SYSTEM,
    {"role": "user", "content": "Where is Lum?"},
    {"role": "assistant", "content": "Lum is in Vara."},
    {"role": "user", "content": "Thank you."},
    {"role": "assistant", "content": "You are welcome."},
]
ENDS = {"hh": "</s>", "mistral": "</s>", "chatml": "<|im_end|>"}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """{template: tokenizer} over the tiny world's pieces, with ChatML's two markers as control tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for file in ("tokenizer.model", "tokenizer_config.json"):
        (folder / file).write_bytes((world.TINY / file).read_bytes())
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 768, "<|im_end|>": 769}))
    return {name: load_tokenizer(folder, name) for name in ENDS}


def tiny_model(vocab_size=770, seed=0):
    config = Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=16,
    )
    return initialize(Mistral(config), torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def examples(tokenizers):
    """Rows of the tiny world, short and long: answers alone learnt, and every third learnt whole, as in pretraining."""
    rows = [
        json.loads(line) for line in (world.TINY / "instructions.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    ]
    turns = [[{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}] for r in rows]
    chats = [sft.chat_example(tokenizers["hh"], t, 256) for t in turns]
    return [(ids, [True] * len(ids) if i % 3 == 1 else mask) for i, (ids, mask) in enumerate(chats)]


# ---------------------------------------------------------------- what is learnt


def runs(ids, mask):
    """The ids of each unbroken stretch of the mask."""
    out, before = [], False
    for i, m in zip(ids, mask, strict=True):
        if m:
            out = out if before else [*out, []]
            out[-1].append(i)
        before = m
    return out


@pytest.mark.parametrize("messages", [SINGLE, SYSTEM, MULTI], ids=["single", "system", "multi"])
@pytest.mark.parametrize("template", ENDS)
def test_the_mask_covers_the_answers_and_nothing_else(tokenizers, template, messages):
    tokenizer = tokenizers[template]
    ids, mask = sft.chat_example(tokenizer, messages, 999)
    assert ids == tokenizer.encode_chat(messages, add_generation_prompt=False)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert [tokenizer.decode(run).strip() for run in runs(ids, mask)] == answers
    context = tokenizer.decode([i for i, m in zip(ids, mask) if not m])
    assert not any(a in context for a in answers) and all(
        m["content"] in context for m in messages if m["role"] != "assistant"
    )


@pytest.mark.parametrize("template", ENDS)
def test_the_ending_of_the_last_answer_is_learnt(tokenizers, template):
    tokenizer = tokenizers[template]
    ids, mask = sft.chat_example(tokenizer, MULTI, 999)
    assert tokenizer.eos_id == tokenizer.controls[ENDS[template]] and tokenizer.eos_id in runs(ids, mask)[-1]
    if template != "hh":  # there the next turn ends an answer in the middle
        assert all(run.count(tokenizer.eos_id) == 1 for run in runs(ids, mask))


def test_a_long_dialogue_is_cut_with_its_mask(tokenizers):
    ids, mask = sft.chat_example(tokenizers["mistral"], MULTI, 999)
    for length in (1, 20, 30, 999):
        assert sft.chat_example(tokenizers["mistral"], MULTI, length) == (ids[:length], mask[:length])


def test_pretraining_rows_have_bos_and_eos_and_learn_every_token(tokenizers):
    tokenizer, documents = tokenizers["hh"], list(islice(world.corpus(3), 40))
    draw = sft.pretrain_examples(tokenizer, iter(documents), count=20)
    for texts in (documents[:20], documents[20:]):  # each draw takes the next ones
        rows = draw()
        assert [tokenizer.decode(ids) for ids, _ in rows] == texts
        for ids, mask in rows:
            assert (ids[0], ids[-1]) == (1, 2) and ids.count(1) == ids.count(2) == 1 and mask == [True] * len(ids)


# ---------------------------------------------------------------- the loss


def by_torch(logits, rows):
    """Summed cross entropy of the counted tokens of `rows`, from logits (B, T, V), a token at a time."""
    terms = [
        F.cross_entropy(logits[b, t - 1], torch.tensor(ids[t]))
        for b, (ids, mask) in enumerate(rows)
        for t in range(1, len(ids))
        if mask[t]
    ]
    return torch.stack(terms).sum()


def right_padded(rows):
    width = max(len(ids) for ids, _ in rows)
    return torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows]), torch.tensor(
        [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]
    )


def trainer_of(model, examples, batch_tokens, seed=0, **more):
    return sft.Trainer(model, examples, 10, 1e-3, batch_tokens, seed, **more)


def test_the_loss_is_the_cross_entropy_of_the_answers_tokens(examples):
    model, rows = tiny_model(), examples[:6]
    with torch.no_grad():
        logits = torch.nn.utils.rnn.pad_sequence(
            [model(torch.tensor([ids]))[0] for ids, _ in rows], batch_first=True
        )  # each row by itself
        assert trainer_of(model, rows, 999).loss(rows).item() == pytest.approx(by_torch(logits, rows).item(), rel=1e-5)


def test_the_loss_is_the_one_transformers_takes_from_labels(examples, tmp_path):
    hf = pytest.importorskip("transformers", reason="the second source of the loss")
    model, rows = tiny_model(), examples[:6]
    model.save_pretrained(tmp_path / "model")
    peer = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokens, mask = right_padded(rows)
    labels = torch.tensor(
        [
            [i if m else -100 for i, m in zip(ids, learnt)] + [-100] * (tokens.shape[1] - len(ids))
            for ids, learnt in rows
        ]
    )
    with torch.no_grad():
        theirs = peer(tokens, attention_mask=mask, labels=labels).loss.item()
        ours = trainer_of(model, rows, 999).loss(rows).item() / (labels[:, 1:] >= 0).sum().item()
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_parts_of_a_batch_add_up_to_the_batch(examples):
    """A step's gradient is that of the mean over all counted tokens, however its rows are parted."""
    model = tiny_model()
    whole, parts = copy.deepcopy(model), []
    rows = trainer_of(model, examples, 700, seed=5).batch()
    trainer = trainer_of(model, examples, 700, seed=5, max_grad_norm=float("inf"))
    loss_of = trainer.loss
    trainer.loss = lambda part: parts.append(len(part)) or loss_of(part)
    gradients = {}
    of = lambda *_: gradients.update((n, p.grad.clone()) for n, p in model.named_parameters())  # noqa: E731
    trainer.optimizer.register_step_pre_hook(of)
    figures = trainer.step()
    assert len(parts) > 2 and sum(parts) == len(rows)
    tokens, mask = right_padded(rows)
    count = sum(m for _, learnt in rows for m in learnt[1:])  # nothing predicts a first token
    loss = by_torch(whole(tokens, mask.bool()), rows) / count
    loss.backward()
    assert figures["tokens"] == count and figures["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for (name, ours), theirs in zip(gradients.items(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-3, atol=1e-6, msg=name)
    assert figures["grad_norm"] == pytest.approx(
        torch.cat([p.grad.flatten() for p in whole.parameters()]).norm().item(), rel=1e-4
    )


def test_each_example_is_read_once_before_any_is_read_again(examples):
    trainer, total = trainer_of(tiny_model(), examples, 10**9), sum(len(ids) for ids, _ in examples)
    trainer.batch_tokens = total  # exactly one pass
    for _ in range(2):
        assert sorted(trainer.batch()) == sorted(examples)
    trainer.batch_tokens = 500
    sizes = [sum(len(ids) for ids, _ in trainer.batch()) for _ in range(5)]
    assert all(500 <= n < 500 + max(len(ids) for ids, _ in examples) for n in sizes)


def test_training_lowers_the_loss_on_the_answers_it_saw(examples):
    model, rows = tiny_model(), examples[:8]
    trainer = sft.Trainer(model, rows, 40, 5e-3, 400)
    losses = [trainer.step()["loss"] for _ in range(40)]
    assert losses[0] > 5 and losses[-1] < losses[0] / 3
    with torch.no_grad():
        assert trainer.loss(rows).item() / sum(sum(m[1:]) for _, m in rows) < losses[0] / 3


def test_what_is_not_counted_is_not_learnt(examples):
    """Where one token counts, the head's gradient is the closed form of that one place."""
    model = tiny_model()
    ids = list(range(10, 40))
    mask = [False] * 29 + [True]
    trainer_of(model, [(ids, mask)], 100).loss([(ids, mask)]).backward()
    probabilities = model(torch.tensor([ids]))[0, 28].softmax(-1).detach()
    hidden = model.model(torch.tensor([ids]))[0, 28].detach()
    wanted = (probabilities - F.one_hot(torch.tensor(39), 770))[:, None] * hidden
    torch.testing.assert_close(model.lm_head.weight.grad, wanted, rtol=1e-3, atol=1e-6)
