"""On a GPU (`make test-cuda`): kernels, graphs and waits that no other machine has.

The second source is the same weights in float64 on the CPU, read a row at a time: no cache, no padding, no graph and no
kernel of a GPU. The other tests compare that reading with transformers."""

import copy
import gc
import json
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from command_line import CLOCKS, clockless, content, main, words
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import generation
import ppo
from generation import Sampling, pad_left, pad_right, sample_responses
from length import LimitOptions, make_limit
from model import Config, Mistral, ScalarModel, adapted, attend, generate, initialize
from ppo import PPOOptions, PPOTrainer, Prompt, Roles
from reward import RewardTrainer
from run import estimate
from sft import SFTTrainer
from training import Optimizer, token_logprobs

pytestmark = pytest.mark.cuda
DEVICE = "cuda"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
VOCABULARY = 512
ENDS = list(range(0, VOCABULARY, 10))


def make_model(dtype=torch.float32, rank=0, layers=2, device=DEVICE, **changes):
    """A small random model, or with `rank` its twin with adapters that change what it says."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = initialize(Mistral(Config(**sizes, **(heads | changes))), torch.Generator().manual_seed(0)).to(dtype)
    return (with_adapters(model, rank) if rank else model).to(device).eval()


def with_adapters(model, rank, seed=1):
    generator = torch.Generator().manual_seed(seed)
    model = adapted(model, rank, 2 * rank, generator)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(p, 0.0, 0.02, generator=generator)
    return model


def make_prompts(*lengths):
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = make_prompts(5, 40, 1, 23, 12, 7, 31, 2)


@torch.no_grad()
def exact_logits(model, rows):
    """Logits (T, V), float64, of each row."""
    exact = copy.deepcopy(model).cpu().double()
    return [exact(torch.tensor([ids]))[0] for ids in rows]


def exact_logprobs(model, prompts, responses):
    """Logprobs (R, V), float64, from which the tokens of each response were drawn."""
    logits = exact_logits(model, [prompt + response for prompt, response in zip(prompts, responses)])
    return [rows[len(prompt) - 1 : -1].log_softmax(-1) for rows, prompt in zip(logits, prompts)]


def relative_error(x, exact):
    """|x - exact| / |exact|, norms over all elements."""
    return ((x.double().cpu() - exact).norm() / exact.norm()).item()


# Of logits and gradients of a model of two layers, which a bfloat16 holds with 8 bits. A key too many or too few makes
# an error of about 1.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.02}


# ---------------------------------------------------------------- attention

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}


def through(backend, work, *inputs):
    """What `work` gives through one kernel of attention alone; None where the GPU has none for its inputs."""
    with sdpa_kernel(BACKENDS[backend]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says why a kernel cannot be used
        try:
            return work(*inputs)
        except RuntimeError as error:
            assert "No available kernel" in str(error) or "No viable backend" in str(error)
            return None


@DTYPES
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_padding_on_either_side(backend, window, dtype):
    model = make_model(dtype, sliding_window=window)
    exact = torch.cat(exact_logits(model, PROMPTS))
    compared = 0
    for pad, is_masked in ((pad_right, False), (pad_left, True)):
        tokens, mask = pad(PROMPTS, DEVICE)
        logits = through(backend, model, tokens, mask if is_masked else None)
        if logits is not None:
            assert relative_error(logits[mask], exact) < ROUNDING[dtype]
            compared += 1
    if not compared:
        pytest.skip(f"no {backend} attention for this here")


def explicit_attention(q, k, v, mask):
    """softmax(q k^T / sqrt D) v by its definition, every query head with the keys of its group."""
    queries = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(queries, 1).mT / math.sqrt(q.shape[-1])
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v.repeat_interleave(queries, 1)


T = 70
DISTANCE = torch.arange(T)[:, None] - torch.arange(T)
CAUSAL = DISTANCE >= 0
WINDOW = 16
BAND = CAUSAL & (DISTANCE < WINDOW)
PADDING = (CAUSAL & (torch.arange(T) >= torch.tensor([[0], [13]]))[:, None, None]) | (DISTANCE == 0)  # (2, 1, T, T)
KINDS = {  # (what the product does, the keys that each query sees)
    "causal": (attend, CAUSAL),
    "padded": (lambda q, k, v: attend(q, k, v, PADDING.to(q.device)), PADDING),
    "window": (lambda q, k, v: attend(q, k, v, BAND.to(q.device)), BAND),
}


@DTYPES
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_attention(kind, groups, dtype):
    work, mask = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, T, 64), (2, groups, T, 64), (2, groups, T, 64))
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    weights = torch.randn(shapes[0], generator=generator)
    exact = [x.double().requires_grad_() for x in inputs]
    own = [x.to(DEVICE).requires_grad_() for x in inputs]
    output = work(*own)
    expected = explicit_attention(*exact, mask)
    (output.float() * weights.to(DEVICE)).sum().backward()
    (expected * weights).sum().backward()
    for x, y in zip((output, *(x.grad for x in own)), (expected, *(x.grad for x in exact))):
        assert x.isfinite().all() and relative_error(x.detach(), y.detach()) < ROUNDING[dtype]


@DTYPES
@pytest.mark.parametrize("case", ["training", "padding on the left", "decoding", "decoding in a window"])
def test_attention_is_one_kernel_and_not_cudnn_s(case, dtype):
    """The plain products of attention need memory for all scores, and cuDNN makes a plan for each shape."""
    model = make_model(dtype, sliding_window=16 if "window" in case else None)
    tokens, mask = pad_left(PROMPTS, DEVICE)
    with profile(activities=[ProfilerActivity.CPU]) as record:
        if case == "training":
            model(tokens).sum().backward()
        elif case == "padding on the left":
            model(tokens, mask)
        else:
            generate(model, PROMPTS, 3, temperature=0)
    names = {event.key for event in record.key_averages() if "attention" in event.key}
    assert any("flash" in name or "efficient" in name for name in names), names
    assert not any("cudnn" in name or "math" in name for name in names), names


# ---------------------------------------------------------------- decoding

MODELS = {
    "one key head a query head": {"num_key_value_heads": 4},
    "grouped heads": {},
    "four layers": {"layers": 4},
    "a window that wraps": {"sliding_window": 16},
    "adapters": {"rank": 4},
    "adapters, a window that wraps": {"rank": 4, "sliding_window": 16},
}


def assert_follows(model, prompts, responses, logprobs, dtype):
    """The logprobs that responses were drawn with are those of the whole sequences; over those of a uniform choice, so
    that their size is about 1."""
    expected = []
    for exact, response in zip(exact_logprobs(model, prompts, responses), responses):
        expected.append(exact.gather(1, torch.tensor(response)[:, None])[:, 0])
    uniform = -math.log(VOCABULARY)
    own = torch.cat([torch.tensor(row) for row in logprobs])
    assert relative_error(own - uniform, torch.cat(expected) - uniform) < ROUNDING[dtype]


@DTYPES
@pytest.mark.parametrize("name", MODELS)
def test_decoding_is_the_whole_sequence_computed_again(name, dtype, monkeypatch):
    """Any ids are drawn, so that a wrong logit anywhere shows. The prompts run in several parts."""
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 15 * len(PROMPTS))
    model = make_model(dtype, **MODELS[name])
    responses, logprobs = sample_responses(model, PROMPTS, 64, Sampling(), seed=3)
    assert {len(response) for response in responses} == {64}
    assert_follows(model, PROMPTS, responses, logprobs, dtype)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_ids(name):
    model = make_model(**MODELS[name])
    responses = generate(model, PROMPTS, 64, temperature=0)
    for response, exact in zip(responses, exact_logprobs(model, PROMPTS, responses)):
        assert response == exact.argmax(-1).tolist()


@DTYPES
def test_rows_that_end_leave_the_batch(dtype):
    """One id in ten ends a response, so that 64 rows are halved several times."""
    model = make_model(dtype)
    prompts = PROMPTS * 8
    responses, logprobs = sample_responses(model, prompts, 64, Sampling(eos_id=ENDS), seed=3)
    for response in responses:
        assert not set(response[:-1]) & set(ENDS)
        assert response[-1] in ENDS or len(response) == 64
    lengths = sorted(map(len, responses))
    assert lengths[32] <= 16 < 24 < lengths[-1]
    assert_follows(model, prompts, responses, logprobs, dtype)


@DTYPES
@pytest.mark.parametrize("rank", [0, 4])
def test_an_optimizer_step_between_two_calls(rank, dtype):
    """A graph that was recorded before a step decodes with the weights and the adapters after it."""
    model = make_model(dtype, rank)
    optimizer = Optimizer(model, 0.05 if rank else 0.01, 10)
    changes = []
    for _ in range(3):
        responses, logprobs = sample_responses(model, PROMPTS, 24, Sampling(), seed=3)
        assert_follows(model, PROMPTS, responses, logprobs, dtype)
        before = exact_logprobs(model, PROMPTS, responses)
        tokens, _ = pad_right(PROMPTS, DEVICE)
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        assert math.isfinite(optimizer.step())
        after = exact_logprobs(model, PROMPTS, responses)
        changes.append(relative_error(torch.cat(after), torch.cat(before)))
    assert min(changes) > 2 * ROUNDING[dtype]  # old weights would have shown


def test_every_token_but_the_first_is_a_replay(monkeypatch):
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(replay(graph)))
    generate(make_model(), PROMPTS, 40, temperature=0)
    assert len(replays) == 39


def count_waits(work):
    """How often the host waits for the GPU, by torch's own count."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(message.message) for message in messages)


SETTINGS = {
    "greedy": {"temperature": 0},
    "sampled": {"seed": 3},
    "nucleus": {"seed": 3, "top_p": 0.9, "temperature": 1.3},
    "forbidden ids": {"seed": 3, "forbid": (5, 6)},
    "an end that does not come": {"seed": 3, "forbid": (5,), "eos_id": 5},
    "a stop function": {"seed": 3, "stop": lambda ids: False},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_one_wait_in_eight_tokens(name):
    one = torch.ones(1, device=DEVICE)
    assert count_waits(one.item) == 1
    model = make_model(torch.bfloat16, rank=4)
    generate(model, PROMPTS, 96, **SETTINGS[name])  # records
    few = count_waits(lambda: generate(model, PROMPTS, 16, **SETTINGS[name]))
    many = count_waits(lambda: generate(model, PROMPTS, 96, **SETTINGS[name]))
    assert 0 < many - few <= (96 - 16) // 8


# ---------------------------------------------------------------- logprobs


def confident_model():
    """A bf16 model, hidden states (N, C) and ids (N,) that it gives a probability of about 0.99 in them."""
    model = make_model(torch.bfloat16)
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(VOCABULARY, (200,), generator=generator)
    weight = model.lm_head.weight.detach().cpu().float()
    hidden = 11.0 * weight[ids] + 0.5 * torch.randn(len(ids), weight.shape[1], generator=generator)
    return model, hidden.to(DEVICE, torch.bfloat16), ids.to(DEVICE)


def test_logprobs_in_bf16():
    """Exact products of bf16 numbers, added up in fp32: a logit is wrong by less than C roundings of the sum of its
    products' sizes; its rounding to bf16 would be 50 times as much."""
    model, hidden, ids = confident_model()
    weight = model.lm_head.weight.detach().double()
    exact = (hidden.double() @ weight.T).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    assert 0.9 < exact.exp().mean() < 0.999
    sizes = (hidden.double().abs() @ weight.abs().T).max()
    bound = 2 * weight.shape[1] * 2.0**-24 * sizes
    assert (token_logprobs(model, hidden, ids).double() - exact).abs().max() < bound < 0.01


def test_gradients_of_confident_tokens():
    model, hidden, ids = confident_model()
    weight = model.lm_head.weight
    token_logprobs(model, hidden.requires_grad_(), ids).sum().backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    (exact[0] @ exact[1].T).log_softmax(-1).gather(1, ids[:, None]).sum().backward()
    assert relative_error(hidden.grad, exact[0].grad.cpu()) < 0.01
    assert relative_error(weight.grad, exact[1].grad.cpu()) < 0.01


@DTYPES
def test_checkpointing_changes_no_gradient_of_adapters(dtype):
    model = make_model(dtype, rank=4)
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith((".A", ".B")))
    tokens, mask = pad_right(PROMPTS, DEVICE)
    gradients = []
    for model.model.checkpointing in (False, True):
        hidden = model.model(tokens)[:, :-1][mask[:, 1:]]
        token_logprobs(model, hidden, tokens[:, 1:][mask[:, 1:]]).sum().backward()
        gradients.append({name: p.grad.double().cpu() for name, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    for name, gradient in gradients[0].items():
        assert gradient.norm() > 0 and relative_error(gradients[1][name], gradient) < ROUNDING[dtype]


# ---------------------------------------------------------------- PPO


def make_trainer(device=DEVICE, dtype=torch.float32, rank=0, score=None):
    base = make_model(dtype, device="cpu", sliding_window=16)
    if rank:
        actor, critic = with_adapters(base, rank, 1), with_adapters(base, rank, 2)
    else:
        actor, critic = copy.deepcopy(base), copy.deepcopy(base)
    critic = ScalarModel.over(critic)
    torch.nn.init.normal_(critic.head.weight, 0.0, 0.05, generator=torch.Generator().manual_seed(5))
    roles = Roles(actor.to(device), base.to(device), critic.to(device))
    options = PPOOptions(batch=8, minibatches=2, microbatch=2, steps=4)
    limiter = make_limit(LimitOptions(length_limit=24, limit_growth="fixed"))
    prompts = [Prompt(ids, ids) for ids in PROMPTS]
    return PPOTrainer(roles, prompts, score or lengths, limiter, Sampling(eos_id=ENDS), options)


def lengths(dialogues, responses):
    return torch.tensor([float(len(ids)) for ids in responses])


SCORES = {
    "on the GPU": lambda dialogues, responses: lengths(dialogues, responses).to(DEVICE),
    "with a gradient": lambda dialogues, responses: lengths(dialogues, responses).to(DEVICE).requires_grad_() * 2,
    "half precision": lambda dialogues, responses: lengths(dialogues, responses).to(DEVICE, torch.bfloat16),
}


@pytest.mark.parametrize("name", SCORES)
def test_a_score_function_may_return_any_tensor(name):
    scores = []
    for score in (lengths, SCORES[name]):
        trainer = make_trainer(score=score)
        trainer.begin()
        metrics, samples = trainer.step()
        scores.append([sample.score for sample in samples])
        assert math.isfinite(metrics["reward"]) and not metrics["skipped_updates"]
    assert len(set(scores[0])) > 1 and scores[1] == pytest.approx(scores[0], rel=1e-5)


def draw_on_cpu(model, prompts, max_new_tokens, sampling, seed):
    """Responses of random ids in place of the model's own: a GPU and a CPU draw other random numbers."""
    generator = torch.Generator().manual_seed(seed)
    responses = []
    for _ in prompts:
        length = int(torch.randint(4, max_new_tokens, (1,), generator=generator))
        ids = torch.randint(VOCABULARY, (length,), generator=generator)
        responses.append([*ids.tolist(), ENDS[0]])
    return responses, [[-math.log(VOCABULARY)] * len(ids) for ids in responses]


def parameters(trainer):
    models = (trainer.actor, trainer.critic)
    return torch.cat([p.detach().double().cpu().flatten() for m in models for p in m.parameters() if p.requires_grad])


@pytest.mark.parametrize("rank", [0, 4])
def test_a_ppo_step_is_the_cpu_s(rank, monkeypatch):
    monkeypatch.setattr(ppo, "sample_responses", draw_on_cpu)
    metrics = []
    updates = []
    for device in ("cpu", DEVICE):
        trainer = make_trainer(device, rank=rank)
        before = parameters(trainer)
        for _ in range(2):
            metrics.append(trainer.step()[0])
        updates.append(parameters(trainer) - before)
    for expected, own in zip(metrics[:2], metrics[2:]):
        for name in expected.keys() - CLOCKS:
            assert own[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    assert relative_error(updates[1], updates[0]) < 1e-3


# ---------------------------------------------------------------- whole stages

STAGES = {
    "coarse": (PPOTrainer, "--minibatches 2 --microbatch 2 --dtype bfloat16"),
    "coarse with adapters": (PPOTrainer, "--minibatches 2 --dtype bfloat16 --lora-rank 4 --checkpointing"),
    "coarse in fp32": (PPOTrainer, "--minibatches 2 --microbatch 2"),
    "sft": (SFTTrainer, "--dtype bfloat16"),
    "reward": (RewardTrainer, "--dtype bfloat16"),
}


def crash_in_step(trainer, number, monkeypatch):
    """The trainer's step raises when it is asked for the `number`th time."""
    step = trainer.step
    calls = []

    def step_or_crash(self):
        calls.append(self)
        if len(calls) == number:
            raise RuntimeError("a crash")
        return step(self)

    monkeypatch.setattr(trainer, "step", step_or_crash)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_resumes_bit_for_bit(name, run_stage, tmp_path):
    """A run that crashed in its step 4 goes on from step 2."""
    stage = name.split()[0]
    trainer, options = STAGES[name]
    options = [*options.split(), "--device", DEVICE]
    whole, other = tmp_path / "whole", tmp_path / "other"
    result = run_stage(stage, whole, *options)
    assert result.code == 0, result.err
    with pytest.MonkeyPatch.context() as patch:
        crash_in_step(trainer, 4, patch)
        assert run_stage(stage, other, *options).code == 1
    result = run_stage(stage, other, *options, "--resume")
    assert result.code == 0, result.err
    assert clockless(whole) == clockless(other)
    assert content(whole / stage) == content(other / stage)


def test_the_command_line_takes_the_gpu(files, tmp_path):
    """Without --device and --dtype: the GPU, and bfloat16 for any preset but the tiny one."""
    options = ["--preset", "smollm2-135m", "--template", "hh", "--steps", "1", "--batch-tokens", "64", *words(files)]
    result = main("--stage", "sft", "--out", tmp_path / "run", *options)
    assert result.code == 0, result.err
    config = json.loads((tmp_path / "run/config.json").read_text())["sft"]
    assert (config["device"], config["dtype"]) == ("cuda", "bfloat16")


# ---------------------------------------------------------------- several GPUs, memory


@pytest.fixture
def last_gpu():
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("needs two GPUs")
    return f"cuda:{count - 1}"


def test_another_gpu_than_the_first(last_gpu):
    before = torch.cuda.memory_allocated(0)
    model = make_model(device=last_gpu)
    responses, logprobs = sample_responses(model, PROMPTS, 40, Sampling(), seed=3)
    assert_follows(model, PROMPTS, responses, logprobs, torch.float32)
    metrics, _ = make_trainer(last_gpu, rank=4).step()
    assert not metrics["skipped_updates"]
    assert torch.cuda.memory_allocated(0) == before


def test_a_model_leaves_no_memory():
    """Nor does what was recorded and trained with it. The first time, libraries take memory that they keep."""
    torch._C._cuda_clearCublasWorkspaces()
    allocated = []
    for _ in range(3):
        model = make_model(torch.bfloat16, rank=4)
        generate(model, PROMPTS * 8, 64, seed=3, eos_id=ENDS)
        trainer = make_trainer(dtype=torch.bfloat16, rank=4)
        trainer.step()
        del model, trainer
        gc.collect()
        allocated.append(torch.cuda.memory_allocated())
    assert max(allocated[1:]) - allocated[0] <= 2**20


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointing"])
def test_memory_of_a_step_is_as_estimated(checkpointing):
    """Two layers of Mistral 7B's size with adapters, 8 prompts and responses of 256 tokens. The second step, for the
    first one makes Adam's moments."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    config = Config(num_hidden_layers=2)
    with torch.device("meta"):
        base = Mistral(config).to(torch.bfloat16)
    generator = torch.Generator(DEVICE).manual_seed(0)
    base = initialize(base.to_empty(device=DEVICE), generator)
    actor = adapted(base, 16, 32, generator)
    critic = ScalarModel.over(adapted(base, 16, 32, generator))
    for model in (actor, critic):
        model.model.checkpointing = checkpointing
    options = PPOOptions(batch=8, minibatches=1, microbatch=8, steps=4)
    limit_options = LimitOptions(length_limit=256, limit_growth="fixed")
    prompts = [Prompt([i] * 256, [i]) for i in range(10, 18)]
    settings = (make_limit(limit_options), Sampling(forbid=(2,)), options)
    trainer = PPOTrainer(Roles(actor, base, critic), prompts, lengths, *settings)
    trainer.step()
    torch.cuda.reset_peak_memory_stats()
    trainer.step()
    peak = torch.cuda.max_memory_allocated() - before
    network = estimate.Network(config, 2, 16, checkpointing)
    card = torch.cuda.get_device_properties(0).total_memory / estimate.GIB
    all_options = SimpleNamespace(max_prompt=256, **vars(options), **vars(limit_options))
    phases = estimate.ppo(all_options, network, None, card)
    assert peak == pytest.approx(max(map(estimate.total, phases.values())), rel=0.1)
