"""PPO from preferences (Mistral-Plus), under a length limit that may grow while it trains (Mistral-C2F,
`length.py`).

    r_t  = -beta (log pi(a_t|s_t) - log pi_ref(a_t|s_t)) + [t = last] score         compute_rewards
    A_t  = sum_k (gamma lambda)^k (r_t+k + gamma V_t+k+1 - V_t+k),  R_t = A_t + V_t   compute_gae (1506.02438)
    L_pi = -min(rho A, clip(rho, 1-eps, 1+eps) A),  rho = exp(logp - old logp)         policy_loss (1707.06347)
    L_V  = 1/2 max((V - R)^2, (clip(V, V_old +- eps) - R)^2)                           value_loss

`PPOTrainer.step` is one step, its parts numbered. Advantages are whitened, and losses are means over all real
tokens of a minibatch. Scores come from any callable. The length limit ends the episode, and nothing is
bootstrapped past it, because the score already judges the cut response. docs/DETAILS.md lists the details
that decide whether PPO works, each with its test.

Shapes: B responses, P prompt columns, R response columns, C hidden size. A step's tensors over response
tokens are (B, R) beside `response_mask`, which is True on real tokens, the ending EOS included. Where several
processes share a step, `total` sums over them; for one process it is the identity."""

import math
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from generation import pad_left, pad_right, sample_responses
from length import ContinuousMaximization  # noqa: F401  (part of this module's contract)
from support.figures import describe_speed, describe_step, masked_mean, masked_variance, mean, summarize
from support.files import InputError
from support.options import option
from support.processes import RANK, even, gathered, share, total
from support.progress import Progress
from support.state import Stateful
from training import Optimizer, Trainer, TrainingOptions, logprobs_and_entropy, token_logprobs


@dataclass
class PPOOptions(TrainingOptions):
    TITLE = "PPO: plus and coarse"
    READ_BY = ("plus", "coarse")

    batch: int = option(64, "prompts, and so responses, a PPO step", least=1, most=2**16)
    epochs: int = option(1, "passes over each batch", least=1)
    minibatches: int = option(4, "optimizer steps an epoch", least=1)
    microbatch: int = option(64, "rows at once; fewer take less memory for the same result", least=1)
    lr: float = option(3e-4, "learning rate of the actor", least=0)
    critic_lr: float = option(5e-4, "learning rate of the critic", least=0)
    kl_coefficient: float = option(
        0.1, "beta, the price of a nat of KL from the reference, in deviations of the score", least=0
    )
    kl_target: float = option(
        0.0, "nats of KL a response that beta is adapted to; 0 keeps beta", least=0, needs="kl_coefficient"
    )
    clip: float = option(0.2, "PPO's clip range of the ratio", least=0)
    value_clip: float = option(0.2, "clip range of the value around the old one", least=0)
    discount: float = option(1.0, "gamma of GAE (the merge's is --gamma)", least=0, most=1)
    gae_lambda: float = option(0.95, "lambda of GAE", least=0, most=1)
    temperature: float = option(
        1.0, "temperature of sampling and of all logprobs; eval and chat take 0 as well: the likeliest token",
        least=0, read_by=("plus", "coarse", "eval", "chat"),
    )  # fmt: skip
    concise: float = option(0.0, "deviations of score taken off a response as long as the limit", least=0, needs="eos")
    truncation_penalty: float = option(0.0, "deviations of score taken off a cut response", least=0, needs="eos")

    def check(self):
        if self.minibatches > self.batch:
            raise InputError(f"--minibatches: {self.minibatches} given for a batch of {self.batch}")


# ---------------------------------------------------------------- masked arithmetic


def masked_whiten(x, mask):
    """x with zero mean and unit variance (Bessel's correction, as in TRL) under the mask; 0 outside it."""
    count = total(mask.sum())
    variance = masked_variance(x, mask) * count / (count - 1).clamp_min(1)
    white = (x - masked_mean(x, mask)) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, white, 0.0)


# ---------------------------------------------------------------- rollout


@dataclass
class Prompt:
    ids: list  # what the actor reads, system prompt and template included
    dialogue: list  # the messages that the score function reads


@dataclass
class Rollout:
    """A batch of responses, or some rows of one. A row holds the prompt with padding on its left and the
    response with padding on its right: column P is the first token of each response."""

    tokens: torch.Tensor  # (B, P+R)
    mask: torch.Tensor  # (B, P+R), True on real tokens of prompt and response
    response_mask: torch.Tensor  # (B, R), the ending EOS counts, padding does not
    truncated: torch.Tensor  # (B,), the limit ended the response
    sampled: torch.Tensor  # (B, R), logprobs by the sampler, not quite `logprobs` in bf16
    logprobs: torch.Tensor | None = None  # (B, R) under the actor before the update
    values: torch.Tensor | None = None  # (B, R) under the critic before the update
    advantages: torch.Tensor | None = None  # (B, R), whitened
    returns: torch.Tensor | None = None  # (B, R)

    @property
    def prompt_columns(self):
        return self.tokens.shape[1] - self.response_mask.shape[1]

    def rows(self, index):
        """The rows of `index`, without the columns that are padding in all of them."""
        mask = self.mask[index]
        real = mask.any(0).nonzero()[:, 0]
        first = int(real[0])
        end = int(real[-1]) + 1
        width = end - self.prompt_columns  # response columns that are left
        by_token = {}
        for name in ("response_mask", "sampled", "logprobs", "values", "advantages", "returns"):
            x = getattr(self, name)
            by_token[name] = None if x is None else x[index, :width]
        tokens = self.tokens[index, first:end]
        return Rollout(tokens, mask[:, first:end], truncated=self.truncated[index], **by_token)

    def by_length(self, size):
        """The rows in parts of `size`, similar lengths together: a list of (index, Rollout)."""
        parts = self.mask.sum(1).argsort().split(size)
        return [(index, self.rows(index)) for index in parts]

    def responses(self):
        """The ids of each response, a list of lists."""
        columns = self.tokens[:, self.prompt_columns :].cpu()
        return [ids[mask].tolist() for ids, mask in zip(columns, self.response_mask.cpu())]


def rollout(actor, prompts, max_new_tokens, sampling, seed=None):
    """A response to each prompt (id lists), sampled as `sampling` says.

    With `sampling.eos_id` None every response runs to the limit; put EOS in `forbid` then, or it is sampled
    as an ordinary token. Nothing is added to a response that the limit cut. Returns a Rollout."""
    with gathered(actor):
        responses, sampled = sample_responses(actor, prompts, max_new_tokens, sampling, seed)
    prompt_tokens, prompt_mask = pad_left(prompts, actor.device)
    response_tokens, response_mask = pad_right(responses, actor.device)
    truncated = []
    for ids in responses:
        stopped = sampling.stop is not None and sampling.stop(ids)
        truncated.append(ids[-1] not in sampling.eos_ids and not stopped)
    return Rollout(
        tokens=torch.cat((prompt_tokens, response_tokens), 1),
        mask=torch.cat((prompt_mask, response_mask), 1),
        response_mask=response_mask,
        truncated=torch.tensor(truncated, device=actor.device),
        sampled=pad_right(sampled, actor.device, value=0.0)[0],
    )


def response_hidden(trunk, batch):
    """Hidden states (N, C) that the N real response tokens were chosen in: position i predicts token i + 1,
    the slice [P-1:-1]. Rows are read flush left, so that attention needs no mask."""
    T = batch.tokens.shape[1]
    prompt_lengths = batch.mask[:, : batch.prompt_columns].sum(1)  # (B,)
    padding = batch.prompt_columns - prompt_lengths  # (B,), columns on the left
    columns = torch.arange(T, device=batch.tokens.device) + padding[:, None]
    flush = batch.tokens.gather(1, columns.clamp_max(T - 1))[:, : int(batch.mask.sum(1).max())]
    hidden = trunk(flush)
    row, column = batch.response_mask.nonzero(as_tuple=True)
    return hidden[row, prompt_lengths[row] + column - 1]


def response_ids(batch):
    """The N real response tokens (N,)."""
    return batch.tokens[:, batch.prompt_columns :][batch.response_mask]


def place(x, mask):
    """Scatters values (N,) to the N True places of a mask (B, R); 0 elsewhere."""
    return torch.zeros(mask.shape, device=x.device).masked_scatter(mask, x)


def response_logprobs(model, batch, temperature=1.0, forbid=()):
    """Logprobs (B, R), fp32, of the response tokens. Logits are made at their positions alone."""
    hidden = response_hidden(model.model, batch)
    return place(token_logprobs(model, hidden, response_ids(batch), temperature, forbid), batch.response_mask)


def response_values(critic, batch):
    """Values (B, R), fp32, of the states that the response tokens were chosen in: the same slice as the
    logprobs."""
    hidden = response_hidden(critic.model, batch)
    return place(critic.values(hidden), batch.response_mask)


# ---------------------------------------------------------------- rewards and advantages


def shape_scores(scores, lengths, truncated, limit, options):
    """Scores (B,) less the length term of Mistral-Plus, `concise` * length / limit, and a penalty where the
    limit cut the response. The paper rewards shorter responses without saying how; this is our form."""
    return scores - options.concise * lengths / limit - options.truncation_penalty * truncated


def compute_rewards(scores, logprobs, ref_logprobs, mask, kl_coefficient):
    """Rewards (B, R): -beta * k1 on every real token, the score on the last one. And k1 (B, R) itself, the
    estimate logp - ref logp: positive where the policy likes its token more than the reference does. Its sum
    over a sampled response estimates KL(pi || ref) in nats, and can be negative for one response."""
    kl = (logprobs - ref_logprobs) * mask
    rewards = -kl_coefficient * kl
    last = (torch.arange(mask.shape[1], device=mask.device) * mask).amax(1)  # (B,)
    rewards[torch.arange(len(scores), device=mask.device), last] += scores.to(rewards.dtype)
    return rewards, kl


def compute_gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation over the True places of mask, all (B, R), which stand without a gap.

    The value after the last real token is 0: the episode has ended. Returns (advantages, returns), neither
    whitened, 0 outside the mask, in the dtype given. Example: rewards 0 0 1, values .5 .5 .5, gamma = lam =
    1: advantages .5 .5 .5, returns 1 1 1."""
    mask = mask.bool()
    rewards = rewards.where(mask, 0.0)
    values = values.where(mask, 0.0)
    deltas = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
    advantage = torch.zeros_like(rewards[:, 0])
    advantages = []
    for delta in reversed(deltas.unbind(1)):
        advantage = delta + gamma * lam * advantage
        advantages.append(advantage)
    advantages = torch.stack(advantages[::-1], 1) * mask
    return advantages, (advantages + values) * mask


# ---------------------------------------------------------------- losses


def policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """Clipped surrogate: (loss summed over real tokens, ratio (B, R), number of real tokens where it
    clips)."""
    ratio = (logprobs - old_logprobs).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = (torch.maximum(plain, clipped) * mask).sum()
    return loss, ratio.detach(), ((clipped > plain) * mask).sum()


def value_loss(values, old_values, returns, mask, clip):
    """Half the larger of the squared errors of the value and of the value kept near the old one, summed."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    return (0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2) * mask).sum()


# ---------------------------------------------------------------- the trainer


class KLController(Stateful):
    """beta, fixed, or moved by up to 2% a step towards a target KL a response (1909.08593, section 2.2)."""

    CHANGES = ("value",)

    def __init__(self, value, target=0.0):
        self.value = value
        self.target = target

    def update(self, kl):
        if self.target and math.isfinite(kl):
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + 0.1 * error


@dataclass
class Roles:
    """Three models with one vocabulary: `actor` and `reference` are language models, `critic` is a scalar
    model."""

    actor: torch.nn.Module
    reference: torch.nn.Module
    critic: torch.nn.Module


def refuse(roles, sampling, options):
    """Raises InputError for what trains nothing sensible."""
    if not options.temperature:
        raise InputError("--temperature: 0 given; PPO learns from samples, above 0 expected")
    if sampling.top_p != 1:
        raise InputError(f"Sampling: top_p {sampling.top_p} given; PPO learns from samples of all tokens, 1 expected")
    if roles.actor is roles.reference:
        raise InputError("Roles: actor and reference are one model; give the reference a copy of it")
    if not sampling.eos_ids and not sampling.stop and not sampling.forbid:
        raise InputError("Sampling: no way to end; give eos_id, or forbid=(EOS,) so that none is sampled")


@dataclass
class Sample:
    """A response of a step, as a person or a second score function wants to see it."""

    dialogue: list  # messages
    response: list  # ids
    score: float  # centred
    kl: float  # nats


class PPOTrainer(Trainer):
    """PPO on a list of `Prompt`s: `step()` as often as `options.steps` says.

    score(dialogues, responses) -> (B,), where a response is an id list. `limiter` is one of the controllers
    of length.py. `sampling` with eos_id None and forbid=(EOS,) is the coarse stage: no ending, anywhere."""

    CHANGES = (
        *Trainer.CHANGES, "actor_optimizer", "critic_optimizer", "limiter", "beta", "score_mean", "score_scale"
    )  # fmt: skip

    def __init__(self, roles, prompts, score, limiter, sampling, options):
        options.check()
        refuse(roles, sampling, options)
        super().__init__(prompts, options.seed)
        self.actor = roles.actor.eval()
        self.reference = roles.reference.eval().requires_grad_(False)
        self.critic = roles.critic.eval()
        self.score = score
        self.limiter = limiter
        self.sampling = replace(sampling, temperature=options.temperature)
        self.options = options
        self.beta = KLController(options.kl_coefficient, options.kl_target)
        self.score_mean = 0.0
        self.score_scale = None  # `begin` measures both
        self.updates_a_step = 2 * options.epochs * options.minibatches  # actor and critic
        updates = options.steps * options.epochs * options.minibatches
        max_norm = options.max_grad_norm
        self.actor_optimizer = Optimizer(self.actor, options.lr, updates, max_norm, eps=1e-5)
        self.critic_optimizer = Optimizer(self.critic, options.critic_lr, updates, max_norm, eps=1e-5)

    def begin(self):
        """Measures the mean and deviation of the score over reference responses, before any update, while the
        actor is still the reference. All later scores are standardized with them, so that the KL's coefficient
        and the limit's scale mean the same under any score function."""
        parts = []
        rounds = math.ceil(64 / self.options.batch)
        with Progress(rounds, "calibration of the score") as progress:
            for _ in range(rounds):
                prompts, batch = self.sample()
                parts.append(self.raw_scores(prompts, batch.responses()))
                progress.update(1)
        scores = torch.cat(parts).cpu().double()
        if not scores.isfinite().all():
            name = getattr(self.score, "label", "the score function")
            raise InputError(f"{name} gave a number that is not finite (NaN or infinite)")
        count = total(len(scores))
        self.score_mean = total(scores.sum().item()) / count
        variance = total(((scores - self.score_mean) ** 2).sum().item()) / max(1, count - 1)
        # A score that does not vary here (a rule that nothing meets yet) has no unit of its own.
        varies = variance**0.5 > 1e-6 * abs(self.score_mean)
        self.score_scale = variance**0.5 if varies else 1.0

    def sample(self):
        """(prompts, Rollout): this process's share of the next batch, at most `limiter.limit` tokens a
        response."""
        prompts = share(self.draw(even(self.options.batch, self.options.minibatches)))
        seed = int(torch.randint(2**62, (1,), generator=self.generator)) + RANK
        return prompts, rollout(self.actor, [p.ids for p in prompts], self.limiter.limit, self.sampling, seed)

    @torch.no_grad()
    def raw_scores(self, prompts, responses):
        """Scores (B,) as the score function gives them, in fp32 on the actor's device."""
        scores = self.score([prompt.dialogue for prompt in prompts], responses)
        return torch.as_tensor(scores, dtype=torch.float32, device=self.actor.device).detach()

    def step(self):
        """One PPO step. Returns (metrics, samples): floats by name, and a `Sample` of each response."""
        if self.score_scale is None:
            self.begin()
        options = self.options
        start = time.perf_counter()
        # 1  prompts x, responses y ~ pi(. | x), at most l(t-1) tokens
        limit = self.limiter.limit
        prompts, batch = self.sample()
        mask = batch.response_mask
        generation_seconds = time.perf_counter() - start
        # 2  s = score(x, y), standardized by the reference's mean and deviation; then the length term
        responses = batch.responses()
        raw_scores = self.raw_scores(prompts, responses)  # (B,)
        scores = (raw_scores - self.score_mean) / self.score_scale
        shaped = shape_scores(scores, mask.sum(1), batch.truncated, limit, options)
        # 3  log pi, log pi_ref and V of every response token, before the update
        with torch.no_grad():
            batch.logprobs, entropy = self.over(batch, self.logprobs_and_entropy).unbind(-1)  # (B, R) each
            ref_logprobs = self.over(batch, partial(self.logprobs, self.reference))
            batch.values = self.over(batch, partial(response_values, self.critic))
        # 4  r_t = -beta (log pi - log pi_ref) + [t = last] s;  A_t by GAE;  R_t = A_t + V_t
        beta = self.beta.value
        rewards, kl = compute_rewards(shaped, batch.logprobs, ref_logprobs, mask, beta)
        discounts = (options.discount, options.gae_lambda)
        advantages, batch.returns = compute_gae(rewards, batch.values, mask, *discounts)
        batch.advantages = masked_whiten(advantages, mask)
        # 5  epochs x minibatches of clipped updates
        metrics = self.update(batch)
        # 6  the next beta; the next limit l(t) = f_CM(R_t, V_phi): the mean score, the critic's loss
        self.beta.update(mean(kl.sum(1)))
        if metrics["skipped_updates"] < self.updates_a_step:
            self.limiter.update(mean(scores), metrics["value_loss"])
        _, outcomes = compute_gae(rewards, batch.values, mask, options.discount, 1.0)  # free of the critic
        metrics |= describe_step(batch, outcomes, scores, shaped, kl, entropy)
        metrics |= {"raw_score": mean(raw_scores), "score_mean": self.score_mean}
        metrics["score_scale"] = self.score_scale
        metrics |= {"kl_coefficient": beta, "length_limit": limit, "p_extend": self.limiter.p_extend}
        metrics |= describe_speed(metrics, time.perf_counter() - start, generation_seconds, mask.device)
        dialogues = [prompt.dialogue for prompt in prompts]
        samples = zip(dialogues, responses, scores.tolist(), kl.sum(1).tolist())
        return metrics, [Sample(*sample) for sample in samples]

    def over(self, batch, read):
        """`read(part)` (b, <=R, ...) of a microbatch at a time, put together: (B, R, ...)."""
        output = None
        for index, part in batch.by_length(self.options.microbatch):
            values = read(part)
            if output is None:
                output = values.new_zeros(*batch.response_mask.shape, *values.shape[2:])
            output[index, : values.shape[1]] = values
        return output

    def logprobs_and_entropy(self, part):
        """Both of the actor's, (b, R, 2), without gradients."""
        hidden = response_hidden(self.actor.model, part)
        settings = (self.sampling.temperature, self.sampling.forbid)
        pairs = logprobs_and_entropy(self.actor, hidden, response_ids(part), *settings)
        return torch.stack([place(x, part.response_mask) for x in pairs], -1)

    def logprobs(self, model, part):
        return response_logprobs(model, part, self.sampling.temperature, self.sampling.forbid)

    def update(self, batch):
        """epochs x minibatches optimizer steps of actor and critic. Returns their figures."""
        history = []
        for _ in range(self.options.epochs):
            order = torch.randperm(len(batch.tokens), generator=self.generator).to(batch.tokens.device)
            for index in order.tensor_split(self.options.minibatches):
                history.append(self.update_minibatch(batch.rows(index)))
        return summarize(history)

    def update_minibatch(self, batch):
        """One optimizer step of the actor and one of the critic. A loss is a sum over a microbatch, divided
        by the number of real tokens in the whole minibatch. Returns figures, means over these tokens."""
        options = self.options
        count = total(batch.response_mask.sum())
        parts = [part for _, part in batch.by_length(options.microbatch)]
        sums = defaultdict(float)
        ratios = []
        for part in parts:
            mask = part.response_mask
            logprobs = self.logprobs(self.actor, part)
            loss, ratio, clipped = policy_loss(logprobs, part.logprobs, part.advantages, mask, options.clip)
            (loss / count).backward()
            log_ratio = (logprobs.detach() - part.logprobs) * mask
            sums["policy_loss"] += loss.detach()
            sums["clip_fraction"] += clipped
            sums["approx_kl"] += ((ratio - 1 - log_ratio) * mask).sum()  # k3
            ratios.append(ratio[mask])
        grad_norm = self.actor_optimizer.step()  # frees the actor's gradients before the critic makes its own
        for part in parts:
            values = response_values(self.critic, part)
            loss = value_loss(values, part.values, part.returns, part.response_mask, options.value_clip)
            (loss / count).backward()
            sums["value_loss"] += loss.detach()
        critic_grad_norm = self.critic_optimizer.step()
        ratios = torch.cat(ratios)
        farthest = ratios[(ratios - 1).abs().argmax()].item()
        figures = {name: (total(x) / count).item() for name, x in sums.items()}
        return figures | {"ratio": farthest, "grad_norm": grad_norm, "critic_grad_norm": critic_grad_norm}
