"""The product on a GPU that is not there (`pretended_gpu`): it obeys a GPU's rules, waits for it seldom, gives memory
back, and computes what a CPU computes."""

import copy
import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from command_line import clockless, content, kill_in_step, main, rows, run_killed
from pretended_gpu import DeviceError, pretended_gpu
from safetensors.torch import load_file
from torch.utils._pytree import tree_flatten

from generation import Sampling
from length import LimitOptions, make_limit
from model import Config, Mistral, ScalarModel, adapted, generate, initialize
from ppo import PPOOptions, PPOTrainer, Prompt, Roles
from training import Optimizer


@pytest.fixture
def gpu():
    with pretended_gpu() as gpu:
        yield gpu


@pytest.fixture
def no_collector():
    """What holds memory in a cycle keeps it: on a GPU memory runs out before Python's collector runs."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# ---------------------------------------------------------------- the device itself


def on_gpu(*shape, device="cuda"):
    return torch.ones(shape, device=device)


REFUSED = {
    "a CPU tensor beside one of a GPU": lambda: on_gpu(2) + torch.ones(2),
    "two GPUs": lambda: on_gpu(2) + on_gpu(2, device="cuda:1"),
    "a product with a CPU tensor": lambda: on_gpu(2, 2) @ torch.ones(2, 2),
    "a CPU number in cat": lambda: torch.cat((on_gpu(1), torch.tensor(1.0)[None])),
    "a CPU tensor indexed by one of a GPU": lambda: torch.ones(2)[torch.zeros(1, dtype=torch.long, device="cuda")],
    "a CPU tensor put into one of a GPU": lambda: on_gpu(2).index_put_((torch.tensor([0]),), torch.ones(1)),
    "a CPU tensor that takes one of a GPU": lambda: torch.ones(2).add_(on_gpu(2)),
    "a mask of a CPU": lambda: on_gpu(2).masked_fill(torch.tensor([True, False]), 0.0),
    "attention under a mask of a CPU": lambda: F.scaled_dot_product_attention(
        *[on_gpu(1, 1, 2, 4)] * 3, torch.ones(2, 2, dtype=torch.bool)
    ),
    "a CPU's generator": lambda: torch.rand(2, device="cuda", generator=torch.Generator()),
    "a GPU's generator on a CPU": lambda: torch.rand(2, generator=torch.Generator("cuda")),
    "a GPU that is not there": lambda: on_gpu(2, device="cuda:2"),
    "numpy": lambda: on_gpu(2).numpy(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_gpu_refuses(name, gpu):
    with pytest.raises((RuntimeError, TypeError)):
        REFUSED[name]()


WAITS = {  # (what is done to x (2, 2) on a GPU, how often the host waits for it)
    "arithmetic": (lambda x: (x * 2 + torch.tensor(1.0)).softmax(-1).cumsum(0).argmax(), 0),
    "a new tensor": (lambda x: torch.zeros(3, device="cuda") + x.new_ones(()), 0),
    "places on the GPU": (lambda x: x[torch.zeros(1, dtype=torch.long, device="cuda")], 0),
    "item": (lambda x: x.sum().item(), 1),
    "float": (lambda x: float(x[0, 0]), 1),
    "if": (lambda x: bool(x.all()), 1),
    "tolist": (lambda x: x.tolist(), 1),
    "cpu": (lambda x: x.cpu(), 1),
    "a list": (lambda x: torch.tensor([1.0], device="cuda") + x, 1),
    "a copy from the CPU": (lambda x: x.copy_(torch.ones(2, 2)), 1),
    "nonzero": (lambda x: x.nonzero(), 1),
    "a mask as an index": (lambda x: x[x > 0], 1),
    "places on the CPU": (lambda x: x[[0, 1]], 1),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_host_waits(name, gpu):
    action, expected = WAITS[name]
    x = on_gpu(2, 2)
    with gpu.phase() as phase:
        action(x)
    assert phase.syncs.total() == expected


def record(step):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def test_a_replay_repeats_the_kernels_and_no_python(gpu):
    x = torch.zeros(2, device="cuda")
    numbers = [1.0]

    def step():
        x.add_(numbers[0])
        numbers.append(0.0)
        return x * 10

    graph, result = record(step)
    assert x.tolist() == [0, 0] and all(map(math.isnan, result.tolist()))  # recording computes nothing
    numbers[0] = 5.0
    graph.replay()
    graph.replay()
    assert x.tolist() == [2, 2] and result.tolist() == [20, 20]  # the number of the recording is a constant
    assert len(numbers) == 2 and gpu.captures[0].kernels == {"add_": 1, "mul": 1}


IN_A_GRAPH = {
    "item": lambda x: x.sum().item(),
    "a copy from the CPU": lambda x: x.copy_(torch.ones(2)),
    "a list": lambda x: x + torch.tensor([1.0], device="cuda"),
    "a mask as an index": lambda x: x[x > 0],
    "places on the CPU": lambda x: x[[0]],
    "another GPU": lambda x: on_gpu(2, device="cuda:1") + 1,
}


@pytest.mark.parametrize("name", IN_A_GRAPH)
def test_a_graph_refuses(name, gpu):
    x = on_gpu(2)
    with pytest.raises(DeviceError):
        record(lambda: IN_A_GRAPH[name](x))


def test_a_replay_must_not_read_memory_that_was_freed(gpu):
    inputs = [on_gpu(2)]
    graph, _ = record(lambda: inputs[0] + 1)
    graph.replay()
    inputs.clear()
    with pytest.raises(DeviceError, match="freed"):
        graph.replay()


def test_live_bytes(gpu):
    before = gpu.live
    with gpu.phase() as phase:
        x = torch.zeros(1000, device="cuda", dtype=torch.bfloat16)  # 2,000 bytes, 2,048 of the allocator's
        view = x.view(10, 100)[2:]
        y = view * 2
        del x, y
    assert (phase.peak - before, phase.after - before) == (2048 + 2048, 2048)  # y has 1,600
    del view
    assert gpu.live == before


def test_memory_has_an_end():
    with pretended_gpu(memory_gib=2**-20) as gpu:  # 1,024 bytes
        x = on_gpu(128)
        assert torch.cuda.mem_get_info() == (512, 1024)
        with pytest.raises(torch.OutOfMemoryError):
            on_gpu(256)
        del x
        x = on_gpu(256)
        assert gpu.live == x.nbytes == 1024


def test_sizes_alone_have_the_same_bytes_and_kernels():
    phases = []
    for sizes_only in (False, True):
        with pretended_gpu(sizes_only=sizes_only) as gpu, gpu.phase() as phase:
            trainer = make_trainer("cuda", rank=2, eos_id=None)
            trainer.score_scale = 1.0  # sizes alone have no scores to measure
            trainer.step()
            del trainer
        phases.append(phase)
    real, sizes = phases
    for name in ("mm", "addmm", "embedding", "attention_forward", "attention_backward", "norm_backward"):
        assert real.kernels[name] == sizes.kernels[name] > 0
    assert real.peak - real.after == sizes.peak - sizes.after  # the forbidden ids stay on the device


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "groups, masked, causal", [(4, False, True), (2, False, True), (4, True, False), (2, True, False)]
)
def test_attention_is_torch_s(groups, masked, causal, dtype, gpu):
    torch.manual_seed(0)
    shapes = ((2, 4, 5, 8), (2, groups, 5, 8), (2, groups, 5, 8))
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    mask = (torch.rand(2, 1, 5, 5) > 0.5) | torch.eye(5, dtype=torch.bool)
    outputs = []
    for device in ("cpu", "cuda"):
        tensors = [torch.empty_like(x, device=device).copy_(x).requires_grad_() for x in inputs]
        own_mask = mask.to(device) if masked else None
        y = F.scaled_dot_product_attention(*tensors, own_mask, is_causal=causal, enable_gqa=groups != 4)
        (y.float() ** 2).sum().backward()
        outputs.append([y, *(x.grad for x in tensors)])
    for one, other in zip(*outputs):
        torch.testing.assert_close(one, other.cpu(), atol=2e-5 if dtype == torch.float32 else 0.06, rtol=0.02)


def test_rms_norm_is_torch_s(gpu):
    torch.manual_seed(0)
    outputs = []
    inputs = (torch.randn(3, 8), torch.randn(8))
    for device in ("cpu", "cuda"):
        x, weight = [torch.empty_like(x, device=device).copy_(x).requires_grad_() for x in inputs]
        y = F.rms_norm(x, (8,), weight, 1e-5)
        (y**3).sum().backward()
        outputs.append((y, x.grad, weight.grad))
    for one, other in zip(*outputs):
        torch.testing.assert_close(one, other.cpu(), atol=1e-5, rtol=1e-4)


def test_nothing_of_it_stays():
    names = [name for name in dir(torch.cuda) if not name.startswith("_")]
    before = {name: getattr(torch.cuda, name) for name in names}
    others = (torch.Generator, torch.autocast, torch.amp.autocast, torch._C._group_tensors_by_device_and_dtype)
    with pytest.raises(KeyError), pretended_gpu():
        assert torch.cuda.is_available()
        raise KeyError
    assert before == {name: getattr(torch.cuda, name) for name in names}
    now = (torch.Generator, torch.autocast, torch.amp.autocast, torch._C._group_tensors_by_device_and_dtype)
    assert now == others
    assert not torch.__future__.get_swap_module_params_on_conversion()


# ---------------------------------------------------------------- decoding

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
EOS = 5


def make_model(device, rank=0, dtype=torch.float32, **changes):
    """A small random model, or with `rank` its twin with adapters that change its text."""
    config = Config(**SIZES, **({"num_key_value_heads": 4} | changes))
    model = initialize(Mistral(config), torch.Generator().manual_seed(0)).to(dtype)
    if rank:
        model = adapted(model, rank, 4 * rank, torch.Generator().manual_seed(1))
        for name, p in model.named_parameters():
            if name.endswith(".B"):
                torch.nn.init.normal_(p, 0.0, 0.5, generator=torch.Generator().manual_seed(len(name)))
    return model.to(device).eval()


def make_prompts(*lengths):
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, SIZES["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


PROMPTS = make_prompts(4, 9, 6, 12, 5, 7, 8, 3)


def stop(ids):
    """Two ids in a row that are divisible by three."""
    return any(a % 3 == b % 3 == 0 for a, b in zip(ids[-16:], ids[-15:]))


MODELS = {
    "plain": {},
    "grouped heads": {"num_key_value_heads": 2},
    "window that wraps": {"sliding_window": 16, "num_key_value_heads": 2},
    "adapters": {"rank": 2},
    "tied": {"tie_word_embeddings": True},
}
SETTINGS = {
    "greedy": {"temperature": 0},
    "sampled": {"seed": 3},
    "one end": {"seed": 3, "eos_id": EOS},
    "several ends": {"seed": 3, "eos_id": [EOS, 6, 7, 8, 9, 10, 11]},
    "stop function": {"seed": 3, "eos_id": EOS, "stop": stop},
    "forbidden ids": {"seed": 3, "forbid": (EOS, 6)},
    "top_p, temperature": {"seed": 3, "top_p": 0.8, "temperature": 1.3, "eos_id": EOS},
}


def assert_same_text(settings, tokens=40, prompts=PROMPTS, **changes):
    expected = generate(make_model("cpu", **changes), prompts, tokens, **settings)
    assert generate(make_model("cuda", **changes), prompts, tokens, **settings) == expected


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_the_cpu_s(name, gpu):
    assert_same_text(SETTINGS["greedy"], **MODELS[name])
    assert gpu.captures and gpu.captures[0].replays


@pytest.mark.parametrize("name", SETTINGS)
def test_samples_are_the_cpu_s(name, gpu):
    """The first 8 ids at least: then rows that have ended leave the batch, on a GPU other ones, and what follows is
    drawn with other random numbers."""
    settings = SETTINGS[name]
    responses = {}
    for device in ("cpu", "cuda"):
        responses[device] = generate(make_model(device, num_key_value_heads=2), PROMPTS, 40, **settings)
    length = 8 if "eos_id" in settings else 40
    assert [ids[:length] for ids in responses["cuda"]] == [ids[:length] for ids in responses["cpu"]]
    sampling = Sampling(eos_id=settings.get("eos_id"))
    for ids in responses["cuda"]:
        assert not any(has_ended(ids[:n], sampling, settings) for n in range(1, len(ids)))
        assert len(ids) == 40 or has_ended(ids, sampling, settings)


def has_ended(ids, sampling, settings):
    return ids[-1] in sampling.eos_ids or ("stop" in settings and settings["stop"](ids))


@pytest.mark.parametrize("prompts", [[[7]], make_prompts(1, 1), make_prompts(9), make_prompts(40, 3)])
def test_prompts_of_any_length(prompts, gpu):
    assert_same_text(SETTINGS["greedy"], tokens=12, prompts=prompts, sliding_window=16)


def test_rows_that_end_leave_the_batch(gpu):
    """The batch is halved once or more, each size has its graph, and those that stay go on as they would have."""
    settings = {"temperature": 0, "eos_id": list(range(3, 10))}
    responses = generate(make_model("cuda"), PROMPTS, 64, **settings)
    assert responses == generate(make_model("cpu"), PROMPTS, 64, **settings)
    lengths = sorted(map(len, responses))
    assert lengths[3] <= 8 < lengths[-1] and len(gpu.captures) >= 2


def test_bf16_text(gpu):
    """Logits in fp32 out of bf16: text equal to the CPU's, which has no other kernels for it here."""
    assert_same_text(SETTINGS["greedy"], tokens=16, dtype=torch.bfloat16, num_key_value_heads=2)


@pytest.mark.parametrize("rank, dtype", [(0, torch.float32), (2, torch.float32), (2, torch.bfloat16)])
def test_an_optimizer_step_between_two_calls(rank, dtype, gpu):
    """A graph that was recorded before a step decodes with the weights after it."""
    texts = {}
    for device in ("cpu", "cuda"):
        model = make_model(device, rank, dtype)
        if not rank:
            model.requires_grad_(True)
        optimizer = Optimizer(model, 0.05, 10)
        texts[device] = [generate(model, PROMPTS, 24, temperature=0)]
        for ids in PROMPTS[3:5]:
            tokens = torch.tensor([ids], device=device)
            F.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:]).backward()
            optimizer.step()
            texts[device].append(generate(model, PROMPTS, 24, temperature=0))
    assert len(gpu.captures) == 1
    assert texts["cuda"][2] == generate(copy.deepcopy(model), PROMPTS, 24, temperature=0) != texts["cuda"][0]
    if dtype == torch.float32:
        assert texts["cuda"] == texts["cpu"]


@pytest.mark.parametrize("name", SETTINGS)
def test_one_wait_in_eight_tokens(name, gpu):
    """Each halving of the batch may cost a few more."""
    model = make_model("cuda", rank=2)
    waits = {}
    for tokens in (16, 16 + 80):  # the first call records
        with gpu.phase() as phase:
            responses = generate(model, PROMPTS, tokens, **SETTINGS[name])
        waits[tokens] = phase.syncs.total()
    more_tokens = max(map(len, responses)) - 16
    assert waits[96] - waits[16] <= -(-more_tokens // 8) + 3 * (len(gpu.captures) - 1)


def test_kernels_of_adapters(gpu):
    """Two more a layer with an adapter: A x, and B of it added to W x."""
    for rank in (0, 2):
        generate(make_model("cuda", rank, torch.bfloat16), PROMPTS[:1], 4, temperature=0)
    plain, with_adapters = [capture.kernels.total() for capture in gpu.captures]
    assert with_adapters - plain <= 2 * 7 * SIZES["num_hidden_layers"]


def test_a_graph_is_recorded_on_the_model_s_own_device(gpu):
    expected = generate(make_model("cpu"), PROMPTS, 12, temperature=0)
    for device in ("cuda:0", "cuda:1"):
        assert generate(make_model(device), PROMPTS, 12, temperature=0) == expected
    assert [capture.place.index for capture in gpu.captures] == [0, 1]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_model_that_has_decoded_leaves_no_memory(rank, gpu, no_collector):
    before = gpu.live
    model = make_model("cuda", rank)
    generate(model, PROMPTS, 24, temperature=0)
    generate(model, PROMPTS[:3], 24, temperature=0)
    reference = weakref.ref(model)
    del model
    assert reference() is None and gpu.live == before


# ---------------------------------------------------------------- steps of every stage


def make_trainer(device, rank=0, score=None, eos_id=EOS, checkpointing=False, dtype=torch.float32):
    base = make_model(device, dtype=dtype, num_key_value_heads=2, sliding_window=16)
    if rank:
        generators = [torch.Generator(device).manual_seed(seed) for seed in (1, 2)]
        actor, critic = [adapted(base, rank, 2 * rank, generator) for generator in generators]
        roles = Roles(actor, base, ScalarModel.over(critic))
    else:
        roles = Roles(base, copy.deepcopy(base), ScalarModel.over(copy.deepcopy(base)))
    for model in (roles.actor, roles.critic):
        model.model.checkpointing = checkpointing
    options = PPOOptions(batch=8, minibatches=2, microbatch=2, steps=4)
    sampling = Sampling(eos_id=eos_id, forbid=() if eos_id else (EOS,))
    limiter = make_limit(LimitOptions(length_limit=12, limit_growth="fixed"))
    prompts = [Prompt(ids, ids) for ids in PROMPTS]
    return PPOTrainer(roles, prompts, score or lengths, limiter, sampling, options)


def lengths(dialogues, responses):
    return torch.tensor([float(len(ids)) for ids in responses])


SCORES = {
    "on the GPU": lambda dialogues, responses: lengths(dialogues, responses).cuda(),
    "with a gradient": lambda dialogues, responses: lengths(dialogues, responses).cuda().requires_grad_() * 2,
    "integers": lambda dialogues, responses: lengths(dialogues, responses).long().cuda(),
}


@pytest.mark.parametrize("name", SCORES)
def test_a_score_function_may_return_any_tensor(name, gpu):
    trainer = make_trainer("cuda", rank=2, score=SCORES[name])
    trainer.begin()
    metrics, _ = trainer.step()
    assert math.isfinite(metrics["reward"]) and not metrics["skipped_updates"]


def test_coarse_step_in_bf16(gpu):
    trainer = make_trainer("cuda", rank=2, eos_id=None, checkpointing=True, dtype=torch.bfloat16)
    metrics, _ = trainer.step()
    assert metrics["skipped_updates"] == 0 and metrics["response_length"] == 12


# ---------------------------------------------------------------- whole stages

PPO = "--score judge:length --batch 4 --minibatches 2 --microbatch 2 --length-limit 8"
STAGES = {
    "pretrain": "--batch-tokens 256",
    "sft": "--batch-tokens 256",
    "sft with adapters": "--batch-tokens 256 --lora-rank 2 --checkpointing",
    "reward": "--batch-pairs 4 --test-pairs 4",
    "reward with adapters": "--batch-pairs 4 --test-pairs 4 --lora-rank 2 --checkpointing",
    "plus": PPO,
    "plus with adapters": f"{PPO} --lora-rank 2 --checkpointing --kl-target 0.01 --epochs 2",
    "coarse": f"{PPO} --checkpointing",
    "coarse with adapters": f"{PPO} --lora-rank 2",
}
INPUT = {"sft": "--instructions", "reward": "--preferences", "plus": "--prompts", "coarse": "--prompts"}


def run(files, stage, out, device, options, *more):
    """The exit status of a stage on small files; three steps."""
    words = ["--steps", "3", "--threads", "1", *options.split()]
    for name in ("--model", INPUT[stage]) if stage in INPUT else ():
        words += [name, files[name]]
    result = main("--stage", stage, "--out", out, "--device", device, *words, *more)
    assert result.code == 0, result.err
    return result


def assert_near(folder, other):
    """The logs of two runs differ by the rounding of their figures."""
    values, form = tree_flatten(clockless(folder))
    other_values, other_form = tree_flatten(clockless(other))
    assert form == other_form and len(rows(folder)) >= 3
    for value, other_value in zip(values, other_values):
        if isinstance(value, float):
            other_value = pytest.approx(other_value, rel=5e-3, abs=2e-3)
        assert value == other_value


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_does_what_it_does_on_a_cpu(name, files, gpu, tmp_path):
    stage = name.split()[0]
    for device in ("cpu", "cuda"):
        run(files, stage, tmp_path / device, device, STAGES[name])
    assert_near(tmp_path / "cuda", tmp_path / "cpu")
    folder = "base" if stage == "pretrain" else stage
    weights = [load_file(tmp_path / device / folder / "model.safetensors") for device in ("cpu", "cuda")]
    for key, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][key], atol=2e-3, rtol=1e-2)


def test_a_reward_model_scores_over_the_same_base(files, gpu, tmp_path):
    adapters = "--lora-rank 2 --batch-pairs 4 --test-pairs 4"
    run(files, "reward", tmp_path / "r", "cuda", adapters)
    options = PPO.removeprefix("--score judge:length ") + " --lora-rank 2"
    for device in ("cpu", "cuda"):
        run(files, "plus", tmp_path / device, device, options, "--reward-model", tmp_path / "r/reward")
    assert_near(tmp_path / "cuda", tmp_path / "cpu")


def test_a_killed_stage_resumes_bit_for_bit(files, gpu, tmp_path):
    options = f"{STAGES['coarse with adapters']} --save-every 2"
    whole, other = tmp_path / "whole", tmp_path / "other"
    run(files, "coarse", whole, "cuda", options)
    assert run_killed(lambda: kill_in_step(3), lambda: run(files, "coarse", other, "cuda", options))
    run(files, "coarse", other, "cuda", options, "--resume")
    assert content(whole / "coarse") == content(other / "coarse") and clockless(whole) == clockless(other)


def test_what_only_looks_at_models(files, gpu, tmp_path, monkeypatch, no_collector):
    """fine, eval and chat; eval never holds two models."""
    folder = tmp_path / "run"
    run(files, "sft", folder, "cuda", STAGES["sft"])
    run(files, "coarse", folder, "cuda", STAGES["coarse"])
    models = weakref.WeakSet()
    load = Mistral.from_pretrained

    def load_one(*args, **settings):
        assert not models
        model = load(*args, **settings)
        models.add(model)
        return model

    monkeypatch.setattr(Mistral, "from_pretrained", load_one)
    words = ("--out", folder, "--device", "cuda", "--threads", "1", "--max-new-tokens", "8")
    parents = [f"{name}={folder / name}" for name in ("sft", "coarse")]
    assert main("--stage", "fine", *words, "--gammas", "0,0.5").code == 0
    result = main("--stage", "eval", *words, "--preset", "tiny", "--limit", "4", "--models", *parents)
    assert result.code == 0, result.err
    result = main("--stage", "chat", *words, "--model", folder / "fine", stdin="Hello\nAnd now?\n")
    assert result.code == 0 and result.out.count("model:") == 2
    assert not models
