"""The Knowledge Residue Merger of Mistral-C2F: the Fine Actor from the Coarse Actor and an instruction model.

    theta_fine = gamma * theta_coarse + (1 - gamma) * theta_SFT

in fp32 with one rounding to the stored dtype, as written and not as a lerp, so that gamma 1 and 0 give the
parents back bit for bit. Tensor by tensor from the two folders: never two whole models in memory.
"""

import torch

from weights import InputError, Weights, locate, save_folder

VOCABULARIES = ("tokenizer.model", "tokenizer.json", "tekken.json")
TOKENIZER_FILES = ("tokenizer*", "tekken.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def check_gamma(gamma):
    if not 0 <= gamma <= 1:
        raise InputError(f"--gamma, --gammas: {gamma} given, a share between 0 and 1 expected")


def check_partners(coarse, sft):
    """Refuses two folders that do not hold the same network over the same vocabulary."""
    only = sorted(set(coarse.names) ^ set(sft.names))
    if only:
        where = coarse if only[0] in coarse.names else sft
        raise InputError(f"merge: {only[0]} stands in {where.folder} alone")
    for name in coarse.names:
        if coarse.shape(name) != sft.shape(name):
            raise InputError(
                f"merge: {name} is {coarse.shape(name)} in {coarse.folder} and {sft.shape(name)} in {sft.folder}"
            )
    for key in ("vocab_size", "num_attention_heads", "num_key_value_heads", "rope_theta", "rms_norm_eps"):
        if coarse.config.get(key) != sft.config.get(key):
            raise InputError(
                f"merge: {key} is {coarse.config.get(key)} in {coarse.folder} and {sft.config.get(key)} in {sft.folder}"
            )
    for file in VOCABULARIES:
        paths = coarse.folder / file, sft.folder / file
        if all(p.exists() for p in paths) and paths[0].read_bytes() != paths[1].read_bytes():
            raise InputError(f"merge: {paths[0]} and {paths[1]} differ, so the same id means two things")


def merged(coarse, sft, gamma):
    """(name, tensor) of the merge of two `Weights`, in coarse's dtypes, one at a time."""
    for name in coarse.names:
        a, b = coarse.read(name), sft.read(name)
        if gamma in (0, 1):  # 1 * a + 0 * b would lose the sign of a zero, and all of an infinity
            yield name, a if gamma == 1 else b.to(a.dtype)
            continue
        yield name, (gamma * a.to(torch.float32) + (1 - gamma) * b.to(torch.float32)).to(a.dtype)


def merge_checkpoints(coarse, sft, out, gamma):
    """Writes the merge of the folders (or hub ids) `coarse` and `sft` to `out`, tokenizer files beside it.
    InputError where the two do not fit together or gamma is outside [0, 1]."""
    check_gamma(gamma)
    a, b = Weights(locate(coarse)), Weights(locate(sft))
    check_partners(a, b)
    files = {p.name: p for w in (a, b) for pattern in TOKENIZER_FILES for p in w.folder.glob(pattern)}  # sft's go first
    save_folder(out, a.config, merged(a, b, gamma), files.values())


def sweep(coarse, sft, gammas, evaluate_fn):
    """{gamma: evaluate_fn(gamma, tensors)} where tensors yields the merge's (name, tensor): nothing is kept on
    disk, and the same model object can be filled with one gamma after the other."""
    a, b = Weights(locate(coarse)), Weights(locate(sft))
    check_partners(a, b)
    for gamma in gammas:
        check_gamma(gamma)
    return {gamma: evaluate_fn(gamma, merged(a, b, gamma)) for gamma in gammas}
