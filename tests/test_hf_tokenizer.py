"""Folders that we save open in transformers' AutoTokenizer, mistral-common's files included, and give our ids."""

import json
import shutil
from pathlib import Path

import pytest
from test_tokenizer import BUNDLED, CHAT, make_dialogues, make_texts, mismatches

from data.world import TINY
from tokenizer import companions, load_tokenizer

transformers = pytest.importorskip("transformers", reason="the other reader is transformers")


@pytest.fixture(scope="module", params=["tiny", *BUNDLED])
def both(request, tmp_path_factory):
    """(ours, AutoTokenizer's of the folder that ours writes, that folder)."""
    source, folder = TINY, tmp_path_factory.mktemp(f"from-{request.param}")
    if request.param != "tiny":
        peer = pytest.importorskip("mistral_common", reason="mistral-common brings the official tokenizer files")
        bundled, name = BUNDLED[request.param]
        source = tmp_path_factory.mktemp(request.param)
        shutil.copy(Path(peer.__file__).parent / "data" / bundled, source / name)
    ours = load_tokenizer(source)
    write(companions(ours), folder)
    # The source's own files stay out: transformers prefers them, where it has the libraries that they need.
    for file in ours.files:
        if file.name != "tokenizer_config.json":
            (folder / file.name).unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    return ours, transformers.AutoTokenizer.from_pretrained(folder), folder


def write(files, folder):
    for file in files:
        if isinstance(file, tuple):
            (folder / file[0]).write_text(file[1], encoding="utf-8")
        else:
            shutil.copy(file, folder / file.name)


def clean(texts, tokenizer):
    """Without those that spell a control token or a byte, which transformers reads as such, and we do not."""
    return [t for t in texts if not any(name in t for name in [*tokenizer.controls, "<0x"])]


def test_ids_and_text(both):
    ours, theirs, _ = both
    texts = clean(make_texts(1500), ours)
    assert len(texts) > 1000
    assert mismatches(lambda t: ours.encode(t, bos=True), lambda t: theirs(t).input_ids, texts) == []
    runs = ["a" * 37, "=" * 1000, "ab" * 50 + " " * 9 + "\n" * 5, "1234567890" * 9, "aaa aaaa\n\n\n\naaaaa", "é́́́́" * 9]
    assert mismatches(lambda t: ours.encode(t, bos=True), lambda t: theirs(t).input_ids, runs) == []
    ids = [ours.encode(t) for t in texts]
    assert mismatches(ours.decode, lambda row: theirs.decode(row, skip_special_tokens=True), ids) == []


def test_special_ids(both):
    ours, theirs, _ = both
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert len(theirs) == ours.vocab_size


@pytest.mark.parametrize("prompt", [True, False], ids=["to answer", "whole"])
def test_chat(both, prompt):
    ours, theirs, _ = both
    dialogues = make_dialogues(150, ends=["user"] if prompt else ["assistant"])
    dialogues = [d for d in dialogues if clean(["".join(m["content"] for m in d)], ours)]
    assert len(dialogues) > 60
    dialogues.append([{"role": "system", "content": ""}, *CHAT[: 1 if prompt else 2]])

    def rendered(dialogue):
        return list(theirs.apply_chat_template(dialogue, add_generation_prompt=prompt, return_dict=False))

    assert mismatches(lambda d: ours.encode_chat(d, prompt), rendered, dialogues) == []


@pytest.mark.parametrize("template", ["hh", "chatml", "zephyr", "plain", "llama2", "mistral"])
def test_another_template_than_the_folders_is_written_with_it(template, tmp_path):
    ours = load_tokenizer(TINY, template)
    write(companions(ours), tmp_path)
    theirs, again = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    dialogues = [d for d in make_dialogues(100, ends=["user"]) if clean(["".join(m["content"] for m in d)], ours)]
    dialogues += [[{"role": "system", "content": ""}, *turns] for turns in (CHAT[:1], CHAT)]
    assert again.template.name == template
    assert mismatches(ours.encode_chat, again.encode_chat, dialogues) == []

    def rendered(dialogue):
        return list(theirs.apply_chat_template(dialogue, add_generation_prompt=True, return_dict=False))

    assert mismatches(ours.encode_chat, rendered, dialogues) == []


ADDED = {"eos_token": {"__type": "AddedToken", "content": "</s>", "special": True}}


@pytest.mark.parametrize("settings", [None, {}, {"bos_token": None, "pad_token": None}, ADDED])
@pytest.mark.parametrize("specials", [["<s>", "</s>", "<pad>"], ["<s>", "</s>"], ["</s>"]])
def test_a_lone_tokenizer_json_is_saved_with_bos_eos_and_pad(specials, settings, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    letters = {letter: i for i, letter in enumerate(" !Hiabc\n:Human")}
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    engine.add_special_tokens(specials)
    engine.save(str(tmp_path / "tokenizer.json"))
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    saved = tmp_path / "saved"
    saved.mkdir()
    ours = load_tokenizer(tmp_path, "hh")
    write(companions(ours), saved)
    (saved / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    theirs = transformers.AutoTokenizer.from_pretrained(saved)
    assert theirs.eos_token_id == ours.eos_id == engine.token_to_id("</s>")
    assert theirs.bos_token_id == ours.bos_id == engine.token_to_id("<s>")
    assert theirs.pad_token == next(name for name in ("<pad>", "<s>", "</s>") if name in specials)
    assert ours.pad_id == theirs.pad_token_id or specials == ["</s>"]  # ours is never EOS
    rows = theirs(["Hi!", "abcabc"], padding=True)
    assert [sum(mask) for mask in rows.attention_mask] == [3, 6]
    assert rows.input_ids == [ours.encode("Hi!") + [theirs.pad_token_id] * 3, ours.encode("abcabc")]
    again = load_tokenizer(saved)
    assert (again.bos_id, again.eos_id, again.end_ids) == (ours.bos_id, ours.eos_id, ours.end_ids)
    assert again.encode("Hi!") == ours.encode("Hi!")
    assert again.template == ours.template
