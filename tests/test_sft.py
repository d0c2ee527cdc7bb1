"""sft.py: which tokens are learnt, read by decoding them; the loss against torch and transformers."""

import copy
import json
from itertools import islice

import pytest
import torch
import torch.nn.functional as F

import sft
from data import world
from generation import pad_right
from model import Config, Mistral, initialize
from sft import SFTOptions, SFTTrainer
from tokenizer import load_tokenizer
from tokenizer.templates import MISTRAL_V3

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
PIECES = load_tokenizer(world.TINY).vocab_size
ENDS = {"hh": "</s>", "mistral": "</s>", "chatml": "<|im_end|>"}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """{template: tokenizer} over the tiny world's pieces, with ChatML's two markers as control tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for file in ("tokenizer.model", "tokenizer_config.json"):
        (folder / file).write_bytes((world.TINY / file).read_bytes())
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": PIECES, "<|im_end|>": PIECES + 1}))
    return {name: load_tokenizer(folder, name) for name in ENDS}


def tiny_model(seed=0):
    sizes = {"vocab_size": PIECES + 2, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = Config(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=16)
    return initialize(Mistral(config), torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def examples(tokenizers):
    """Rows of the tiny world, short and long. The answers count, and in every third row all tokens."""
    lines = (world.TINY / "instructions.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    examples = []
    for i, row in enumerate(map(json.loads, lines)):
        question = {"role": "user", "content": row["prompt"]}
        answer = {"role": "assistant", "content": row["response"]}
        ids, mask = sft.chat_example(tokenizers["hh"], [question, answer], 256)
        examples.append((ids, [True] * len(ids) if i % 3 == 1 else mask))
    return examples


# ---------------------------------------------------------------- which tokens count


def stretches(ids, mask):
    """The ids of each unbroken stretch of the mask."""
    rows = []
    before = False
    for i, counted in zip(ids, mask, strict=True):
        if counted and not before:
            rows.append([])
        if counted:
            rows[-1].append(i)
        before = counted
    return rows


@pytest.mark.parametrize("messages", [SINGLE, SYSTEM, MULTI], ids=["single", "system", "multi"])
@pytest.mark.parametrize("template", ENDS)
def test_the_mask_covers_the_answers_and_nothing_else(tokenizers, template, messages):
    tokenizer = tokenizers[template]
    ids, mask = sft.chat_example(tokenizer, messages, 999)
    assert ids == tokenizer.encode_chat(messages, add_generation_prompt=False)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    others = [message["content"] for message in messages if message["role"] != "assistant"]
    assert [tokenizer.decode(row).strip() for row in stretches(ids, mask)] == answers
    context = tokenizer.decode([i for i, counted in zip(ids, mask) if not counted])
    assert not any(text in context for text in answers)
    assert all(text in context for text in others)


def test_all_answers_count_where_the_system_text_stands_in_the_last_question(tokenizers):
    tokenizer = copy.copy(tokenizers["mistral"])
    tokenizer.template = MISTRAL_V3
    ids, mask = sft.chat_example(tokenizer, MULTI, 999)
    answers = [message["content"] for message in MULTI if message["role"] == "assistant"]
    assert [tokenizer.decode(row).strip() for row in stretches(ids, mask)] == answers


def test_an_answer_that_begins_with_a_blank_line_counts(tokenizers):
    messages = [*SYSTEM[:2], {"role": "assistant", "content": "\n\nI am well."}]
    ids, mask = sft.chat_example(tokenizers["chatml"], messages, 999)
    assert tokenizers["chatml"].decode(stretches(ids, mask)[-1]).strip() == "I am well."


@pytest.mark.parametrize("template", ENDS)
def test_the_ending_of_the_last_answer_is_learnt(tokenizers, template):
    tokenizer = tokenizers[template]
    rows = stretches(*sft.chat_example(tokenizer, MULTI, 999))
    assert tokenizer.eos_id == tokenizer.controls[ENDS[template]]
    assert tokenizer.eos_id in rows[-1]
    if template != "hh":  # there the next turn ends an answer in the middle
        assert all(row.count(tokenizer.eos_id) == 1 for row in rows)


def test_a_long_dialogue_is_cut_with_its_mask(tokenizers):
    ids, mask = sft.chat_example(tokenizers["mistral"], MULTI, 999)
    for length in (1, 20, 30, 999):
        assert sft.chat_example(tokenizers["mistral"], MULTI, length) == (ids[:length], mask[:length])


def test_pretraining_rows_have_bos_and_eos_and_learn_every_token(tokenizers):
    tokenizer = tokenizers["hh"]
    documents = list(islice(world.corpus(3), 40))
    examples = sft.document_examples(tokenizer, iter(documents), tokens=1000)
    total = sum(len(ids) for ids, _ in examples)
    assert 1000 <= total < 1000 + len(examples[-1][0])  # the last document is whole
    assert [tokenizer.decode(ids) for ids, _ in examples] == documents[: len(examples)]
    for ids, mask in examples:
        assert ids[0] == 1 and ids[-1] == 2
        assert ids.count(1) == ids.count(2) == 1
        assert mask == [True] * len(ids)


# ---------------------------------------------------------------- the loss


def trainer_of(model, examples, batch_tokens, **options):
    defaults = {"steps": 10, "train_lr": 1e-3}
    return SFTTrainer(model, examples, SFTOptions(batch_tokens=batch_tokens, **defaults | options))


def loss_by_torch(model, rows):
    """Mean cross entropy of the counted tokens, each row by itself, a token at a time. And their number."""
    terms = []
    for ids, mask in rows:
        logits = model(torch.tensor([ids]))[0]
        for t in range(1, len(ids)):  # nothing predicts a first token
            if mask[t]:
                terms.append(F.cross_entropy(logits[t - 1], torch.tensor(ids[t])))
    return torch.stack(terms).mean(), len(terms)


def rows_per_part(trainer):
    """A list that gets the rows of each part of the trainer's steps."""
    parts = []
    loss = trainer.loss

    def call(rows):
        parts.append(rows)
        return loss(rows)

    trainer.loss = call
    return parts


@torch.no_grad()
def test_the_loss_is_the_one_transformers_takes_from_labels(examples, tmp_path):
    hf = pytest.importorskip("transformers", reason="the second source of the loss")
    model = tiny_model()
    rows = examples[:6]
    model.save_pretrained(tmp_path)
    peer = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens, mask = pad_right([ids for ids, _ in rows])
    counted, _ = pad_right([row_mask for _, row_mask in rows], value=False)
    labels = tokens.masked_fill(~counted, -100)
    expected = peer(tokens, attention_mask=mask.long(), labels=labels).loss.item()
    loss = trainer_of(model, rows, 999).loss(rows).item()
    assert loss / counted[:, 1:].sum().item() == pytest.approx(expected, rel=1e-5)


def test_a_step_is_that_of_the_mean_over_all_counted_tokens_however_its_rows_are_parted(examples):
    model = tiny_model()
    reference = copy.deepcopy(model)
    trainer = trainer_of(model, examples, 700, seed=5, max_grad_norm=1e9)
    parts = rows_per_part(trainer)
    gradients = {}
    step = trainer.optimizer.step

    def note_and_step():
        gradients.update((name, p.grad.clone()) for name, p in model.named_parameters())
        return step()

    trainer.optimizer.step = note_and_step
    figures = trainer.step()
    assert len(parts) > 2
    loss, count = loss_by_torch(reference, sum(parts, []))
    loss.backward()
    assert figures["tokens"] == count
    assert figures["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, p in reference.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-6, msg=name)
    norm = torch.cat([p.grad.flatten() for p in reference.parameters()]).norm().item()
    assert figures["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_each_example_is_read_once_before_any_is_read_again(examples):
    rows = examples[:20]
    trainer = trainer_of(tiny_model(), rows, sum(len(ids) for ids, _ in rows))  # exactly one pass
    parts = rows_per_part(trainer)
    for _ in range(2):
        trainer.step()
        assert sorted(sum(parts, [])) == sorted(rows)
        parts.clear()
    trainer.options.batch_tokens = 500
    for _ in range(3):
        trainer.step()
        assert 500 <= sum(len(ids) for ids, _ in sum(parts, [])) < 500 + max(len(ids) for ids, _ in rows)
        parts.clear()


def test_training_lowers_the_loss_on_the_answers_it_saw(examples):
    model = tiny_model()
    rows = examples[:8]
    trainer = trainer_of(model, rows, 400, steps=40, train_lr=5e-3)
    losses = [trainer.step()["loss"] for _ in range(40)]
    assert losses[0] > 5
    assert losses[-1] < losses[0] / 3
    with torch.no_grad():
        assert loss_by_torch(model, rows)[0].item() < losses[0] / 3


def test_training_goes_on_bit_for_bit_from_its_state(examples):
    first = trainer_of(tiny_model(), examples, 300)
    first.step()
    second = trainer_of(tiny_model(seed=9), examples, 300)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [second.step(), second.step()] == [first.step(), first.step()]


def test_what_is_not_counted_is_not_learnt():
    """Where one token counts, the head's gradient is the closed form of that one place."""
    model = tiny_model()
    ids = list(range(10, 40))
    example = (ids, [False] * 29 + [True])
    trainer_of(model, [example], 100).loss([example]).backward()
    with torch.no_grad():
        probabilities = model(torch.tensor([ids]))[0, 28].softmax(-1)
        hidden = model.model(torch.tensor([ids]))[0, 28]
    expected = (probabilities - F.one_hot(torch.tensor(39), PIECES + 2))[:, None] * hidden
    torch.testing.assert_close(model.lm_head.weight.grad, expected, rtol=1e-3, atol=1e-6)
