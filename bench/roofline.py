"""What a GPU could do: seconds of decoding, of a PPO step and of training, from closed forms.

    python bench/roofline.py                  # the table of bench/README.md
    python bench/roofline.py --gpu h100

A kernel takes its FLOPs over the GPU's matrix products, or its bytes over the GPU's memory:

    products     2 FLOPs a weight and token; in backward as many for the gradient of the inputs (and of the
                 weights, where they are trained). When decoding, each weight is read once a token
    attention    4 H D FLOPs a query and key; when decoding, the whole buffer of keys and values is read
    adapters     B (A x): little arithmetic, but every linear layer's inputs and outputs are read once more
    elementwise  norms, rotation, SwiGLU, sums
    kernels      when decoding, what is no product: a fixed time each

Assumed, as seen on an H100 elsewhere: products reach 640 of the data sheet's 989 TFLOP/s and a copy 3.0 of
its 3.35 TB/s (the same shares on other GPUs). Of the copy's bytes/s, weights and elementwise kernels reach
85%, attention 70%, adapters 55%; of the products' FLOP/s attention reaches 55%, in backward 47%. In a CUDA
graph a small kernel takes 2 us and every kernel leaves a gap of 0.3 us. All tensors are bf16, logits fp32.
Left out: a host slower than the GPU, and attention with too few rows to fill it, as at batch 1 over a long
context.
"""

import argparse
from dataclasses import dataclass

import common

DATA_SHEETS = {  # FLOP/s in bf16 without sparsity, bytes/s; the SXM cards, the A100 with 80 GB
    "h100": (989e12, 3.35e12),
    "h200": (989e12, 4.8e12),
    "a100": (312e12, 2.039e12),
    "4090": (165.2e12, 1.008e12),
}
STREAM = 0.85  # of the bytes/s of a copy
ATTENTION_READ = 0.7
ADAPTER = 0.55
ATTENTION = 0.55  # of the FLOP/s of products
ATTENTION_BACKWARD = 0.47
SMALL_KERNEL = 2.0e-6  # seconds
GAP = 0.3e-6
SMALL_KERNELS = 18  # in a layer, when decoding: norms, rotation, SwiGLU, sums, the cache's new column
ADAPTER_KERNELS = 14
OTHER_KERNELS = 34  # in a token: embedding, rotation's angles, sampling
LOGIT_PASSES = 12  # over the logits, forward and backward
BYTES = 2  # of a number in bf16


@dataclass
class GPU:
    nominal: float  # FLOP/s of the data sheet
    flops: float  # FLOP/s that large products reach
    bytes: float  # bytes/s of a copy, reads and writes

    @classmethod
    def by_data_sheet(cls, name):
        nominal, bandwidth = DATA_SHEETS[name]
        return cls(nominal, nominal * 640 / 989, bandwidth * 3.0 / 3.35)


def nominal_flops(gpu_name):
    """The data sheet's FLOP/s of a GPU by torch's name for it; 0.0 for one that is not in the list."""
    return next((flops for name, (flops, _) in DATA_SHEETS.items() if name in gpu_name.lower()), 0.0)


# ---------------------------------------------------------------- counts


def layer_shapes(config):
    """(inputs, outputs) of the seven linear layers of a block."""
    hidden = config.hidden_size
    wide = config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    return [*attention, (hidden, wide), (hidden, wide), (wide, hidden)]


def trunk_weights(config):
    return config.num_hidden_layers * sum(inputs * outputs for inputs, outputs in layer_shapes(config))


def all_weights(config):
    """Weights of all linear layers and the head: each is used once a token."""
    return trunk_weights(config) + config.vocab_size * config.hidden_size


def attention_flops(config, tokens, length):
    """Forward, causal: a query of a row of `length` tokens sees half of them."""
    heads = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 4 * heads * tokens * length / 2


def cache_bytes(config, batch, columns, size=BYTES):
    """Keys and values of `batch` rows, of as many columns as the window has at most."""
    columns = min(columns, config.sliding_window or columns)
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numbers * columns * batch * size


def decode_bytes(config, batch, columns, size=BYTES):
    """What a step of one token a row must read: every linear weight once, and the cache."""
    return all_weights(config) * size + cache_bytes(config, batch, columns, size)


def elementwise_bytes(config):
    """Of a token in a layer, forward: two norms, two sums, copies around attention, SwiGLU, and the rotation
    in fp32, whose steps move 52 bytes for each number of q and k."""
    rotated = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    return BYTES * (12 * config.hidden_size + 5 * config.intermediate_size + 26 * rotated)


def flops_per_token(config, rank):
    """What MFU counts: the gradient of the weights only where they are trained."""
    return (4 if rank else 6) * all_weights(config)


# ---------------------------------------------------------------- seconds


def adapter_seconds(config, gpu, tokens, inputs_moved, outputs_moved):
    """How often an adapter's kernels read or write the inputs and the outputs of each linear layer."""
    numbers = sum(inputs_moved * inputs + outputs_moved * outputs for inputs, outputs in layer_shapes(config))
    return tokens * config.num_hidden_layers * numbers * BYTES / (ADAPTER * gpu.bytes)


def forward(config, gpu, tokens, length, rank=0):
    """Seconds of the trunk on `tokens` tokens in rows of `length`, with adapters if `rank` is not 0."""
    seconds = 2 * trunk_weights(config) * tokens / gpu.flops
    seconds += attention_flops(config, tokens, length) / (ATTENTION * gpu.flops)
    seconds += tokens * config.num_hidden_layers * elementwise_bytes(config) / (STREAM * gpu.bytes)
    return seconds + (adapter_seconds(config, gpu, tokens, 1, 2) if rank else 0.0)


def backward(config, gpu, tokens, length, rank=0):
    """Seconds of the trunk's backward pass; with adapters the weights themselves get no gradient."""
    seconds = (2 if rank else 4) * trunk_weights(config) * tokens / gpu.flops
    seconds += 2.5 * attention_flops(config, tokens, length) / (ATTENTION_BACKWARD * gpu.flops)
    seconds += 2 * tokens * config.num_hidden_layers * elementwise_bytes(config) / (STREAM * gpu.bytes)
    return seconds + (adapter_seconds(config, gpu, tokens, 3, 2) if rank else 0.0)


def logits(config, gpu, tokens, products):
    """Seconds of `products` products with the head, and of the passes over its fp32 logits."""
    seconds = 2 * products * config.vocab_size * config.hidden_size * tokens / gpu.flops
    return seconds + LOGIT_PASSES * tokens * config.vocab_size * 4 / (STREAM * gpu.bytes)


def decode_step(config, gpu, batch, tokens, rank=0):
    """Seconds of one token a row, over a buffer for `tokens` tokens: a multiple of 256 columns."""
    reading = all_weights(config) * BYTES / (STREAM * gpu.bytes)
    products = 2 * all_weights(config) * batch / gpu.flops
    cache = cache_bytes(config, batch, -(-tokens // 256) * 256) / (ATTENTION_READ * gpu.bytes)
    layers = config.num_hidden_layers
    small = layers * (SMALL_KERNELS + (ADAPTER_KERNELS if rank else 0)) + OTHER_KERNELS
    large = layers * 8 + 1
    return max(reading, products) + cache + small * SMALL_KERNEL + (small + large) * GAP


def decoding(config, gpu, batch, prompt, new):
    """(tokens/s, share of the bandwidth): the share of a step that it takes to read, at a copy's speed, what
    a step must read on average."""
    seconds = decode_step(config, gpu, batch, prompt + new)
    return batch / seconds, decode_bytes(config, batch, prompt + new // 2) / gpu.bytes / seconds


def ppo_step(config, gpu, batch, prompt, response, rank=16, checkpointing=True):
    """{phase: seconds} of a PPO step with one minibatch and a reward model of the policy's size. Prompts have
    half to all of `prompt` tokens; the rollout's prefill alone pads them."""
    length = 0.75 * prompt + response
    tokens = batch * length
    responses = batch * response
    base = forward(config, gpu, tokens, length)
    once = forward(config, gpu, tokens, length, rank)
    update = (2 if checkpointing else 1) * once + backward(config, gpu, tokens, length, rank)
    steps = (response - 1) * decode_step(config, gpu, batch, prompt + response, rank)
    return {
        "rollout": forward(config, gpu, batch * prompt, prompt, rank) + steps,
        "score": base,
        "logprobs and values": 2 * once + base + logits(config, gpu, responses, 2),
        "actor": update + logits(config, gpu, responses, 3),
        "critic": update,
    }


def training(config, gpu, rows, length, rank=16):
    """(tokens/s, MFU of the data sheet's FLOP/s) of next-token training without checkpointing."""
    tokens = rows * length
    seconds = forward(config, gpu, tokens, length, rank) + backward(config, gpu, tokens, length, rank)
    speed = tokens / (seconds + logits(config, gpu, tokens, 3 if rank else 4))
    return speed, speed * flops_per_token(config, rank) / gpu.nominal


# ---------------------------------------------------------------- the table


def lines(config, gpu):
    """[(work, goal, what the arithmetic says)] of the rows of a GPU session."""
    rows = []
    for batch in (1, 64):
        speed, share = decoding(config, gpu, batch, 320, 128)
        text = f"{speed:.0f} tok/s, {share:.0%} of bandwidth"
        rows.append((f"decode, batch {batch}, 320 + 128", "70% of bandwidth", text))
    for checkpointing in (True, False):
        samples = 64 / sum(ppo_step(config, gpu, 64, 256, 256, checkpointing=checkpointing).values())
        work = "PPO, 64 x (256 + 256), LoRA 16" + ", checkpointing" * checkpointing
        rows.append((work, "5 samples/s", f"{samples:.2f} samples/s"))
    speed, mfu = training(config, gpu, 4, 2048)
    rows.append(("train, 4 x 2048, LoRA 16", "45% MFU", f"{speed:.0f} tok/s, MFU {mfu:.0%}"))
    return rows


def table(names):
    config = common.shape_of(common.RANDOM_7B)
    columns = [lines(config, GPU.by_data_sheet(name)) for name in names]
    text = [f"| Mistral-7B, bf16 | goal on an H100 | {' | '.join(name.upper() for name in names)} |"]
    text.append("|---" * (len(names) + 2) + "|")
    for row in zip(*columns):
        cells = [*row[0][:2], *(figures for *_, figures in row)]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--gpu", nargs="+", default=list(DATA_SHEETS), choices=list(DATA_SHEETS))
    print(table(parser.parse_args(argv).gpu))


if __name__ == "__main__":
    main()
