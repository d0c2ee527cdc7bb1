"""The Knowledge Residue Merger of Mistral-C2F: the Fine Actor from the Coarse Actor and an instruction model.

    theta_fine = gamma * theta_coarse + (1 - gamma) * theta_SFT

in fp32 with one rounding to the stored dtype, as written and not as a lerp, so that gamma 1 and 0 give the
parents back bit for bit. Tensor by tensor from the two folders: never two whole models in memory. Parents
that were trained as adapters are read as base + adapter, before any rounding."""

from dataclasses import dataclass

from support.files import InputError
from support.options import option
from weights import open_parents, save_folder

TOKENIZER_FILES = ("tokenizer*", "tekken.json", "special_tokens_map.json", "added_tokens.json", "*.jinja")


@dataclass
class MergeOptions:
    TITLE = "the merge: fine"
    READ_BY = ("fine",)

    gamma: float = option(0.7, "share of the coarse actor in the merge")
    gammas: list = option(tuple(g / 10 for g in range(11)), "merges that fine tries on a validation set")

    def check(self):
        for gamma in (self.gamma, *self.gammas):
            check_gamma(gamma)


def check_gamma(gamma):
    if not 0 <= gamma <= 1:
        raise InputError(f"--gamma, --gammas: {gamma} given, a share between 0 and 1 expected")


def merged(coarse, sft, gamma):
    """(name, tensor) of the merge of two `Weights`, in coarse's dtypes, one at a time."""
    for name in coarse.names:
        dtype = coarse.dtype(name)
        if gamma == 1:  # 1 * a + 0 * b would lose the sign of a zero
            yield name, coarse.read(name)
        elif gamma == 0:
            yield name, sft.read(name).to(dtype)
        else:
            yield name, (gamma * coarse.exact(name) + (1 - gamma) * sft.exact(name)).to(dtype)


def merge_checkpoints(coarse, sft, out, gamma):
    """Writes the merge of the folders (or hub ids) `coarse` and `sft` to `out`, tokenizer files beside it.
    InputError where the two do not fit together or gamma is outside [0, 1]."""
    check_gamma(gamma)
    coarse, sft = open_parents(coarse, sft)
    save_folder(out, coarse.config, merged(coarse, sft, gamma), tokenizer_files(coarse, sft))


def tokenizer_files(coarse, sft):
    """Paths of the instruction model's tokenizer files, or of the coarse actor's where that has none."""
    for parent in (sft, coarse):
        files = [path for pattern in TOKENIZER_FILES for path in parent.folder.glob(pattern)]
        if files:
            return files
    return []


def sweep(coarse, sft, gammas, evaluate):
    """{gamma: evaluate(gamma, tensors)}, where tensors yields the merge's (name, tensor). Nothing is written,
    and one model in memory can be filled with one gamma after the other."""
    coarse, sft = open_parents(coarse, sft)
    return {gamma: evaluate(gamma, merged(coarse, sft, gamma)) for gamma in gammas}
