"""PPO from preferences (Mistral-Plus) and Continuous Maximization of its length limit (Mistral-C2F).

    r_t  = -beta (log pi(a_t|s_t) - log pi_ref(a_t|s_t)) + [t = last] score         compute_rewards
    A_t  = sum_k (gamma lambda)^k (r_t+k + gamma V_t+k+1 - V_t+k),  R_t = A_t + V_t   compute_gae (1506.02438)
    L_pi = -min(rho A, clip(rho, 1-eps, 1+eps) A),  rho = exp(logp - old logp)         policy_loss (1707.06347)
    L_V  = 1/2 max((V - R)^2, (clip(V, V_old +- eps) - R)^2)                           value_loss
    l(t) = f_CM(R_t, V_phi): the limit grows where sigmoid(w.x + b) over recent        ContinuousMaximization
           rewards and value losses says "stable", and holds elsewhere                (2406.08657; form ours)

One step, numbered as in `PPOTrainer.step`: prompts -> rollout -> scores -> values and reference -> rewards
and advantages -> update -> the next limit. Scores come from any callable. The limit ends the episode and
nothing is bootstrapped past it: the cut response as a whole has been scored (PPO_DETAILS 6).
"""

import math
import resource
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from checkpoint import checksum, load_optimizer, optimizer_state
from generation import pad_left, pad_right
from model import generate
from training import descend, make_optimizer, token_logprobs
from weights import InputError


def option(default, help, **more):
    """A field of an options dataclass with its help text; `more`: choices, nargs, least and most (bounds)."""
    return field(default=default, metadata={"help": help, **more})


@dataclass
class PPOOptions:
    batch: int = option(64, "prompts, and so responses, a PPO step", least=1)
    epochs: int = option(1, "passes over each batch", least=1)
    minibatches: int = option(4, "optimizer steps an epoch", least=1)
    microbatch: int = option(64, "rows read at once; lower it where memory is short, the result is the same", least=1)
    lr: float = option(3e-4, "learning rate of the actor", least=0)
    critic_lr: float = option(5e-4, "learning rate of the critic", least=0)
    kl_coefficient: float = option(
        0.1, "beta, the price of a nat of KL from the reference, in deviations of the score", least=0
    )
    kl_target: float = option(0.0, "adapt beta until the KL of a response is this many nats; 0 keeps beta", least=0)
    clip: float = option(0.2, "PPO's clip range of the ratio", least=0)
    kl_stop: float = option(
        0.0,
        "approx_kl of a minibatch, in nats a token, after which the rest of the update is left out; 0: never",
        least=0,
    )
    value_clip: float = option(0.2, "clip range of the value around the old one", least=0)
    discount: float = option(1.0, "gamma of GAE (the merge's is --gamma)", least=0, most=1)
    gae_lambda: float = option(0.95, "lambda of GAE", least=0, most=1)
    temperature: float = option(1.0, "sampling temperature, and that of every logprob", least=0.01)
    max_grad_norm: float = option(1.0, "gradient norm above which gradients are scaled down", least=0)
    concise: float = option(0.0, "length term: deviations of score taken off a response as long as the limit", least=0)
    truncation_penalty: float = option(0.0, "deviations of score taken off a response that the limit cut", least=0)


# ---------------------------------------------------------------- masked arithmetic


def masked_mean(x, mask):
    """Mean of x over the True places of mask."""
    return (x * mask).sum() / mask.sum().clamp_min(1)


def masked_whiten(x, mask, shift_mean=True):
    """x with unit variance (Bessel's correction, as TRL) and zero mean under the mask; 0 outside it.
    `shift_mean=False` keeps the mean."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask) * mask.sum() / (mask.sum() - 1).clamp_min(1)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, white if shift_mean else white + mean, 0.0)


# ---------------------------------------------------------------- rollout


@dataclass
class Rollout:
    """A batch of responses. Rows hold the prompt with padding on its left and the response with padding on
    its right: column P is the first token of each response."""

    tokens: torch.Tensor  # (B, P+R)
    mask: torch.Tensor  # (B, P+R), True on real tokens of prompt and response
    response_mask: torch.Tensor  # (B, R), the ending EOS counts, padding does not
    truncated: torch.Tensor  # (B,), the limit ended the response
    logprobs: torch.Tensor | None = None  # (B, R) of the actor that wrote it, read by the training forward
    sampling_gap: float = 0.0  # largest difference between their probabilities and the sampler's own

    def read(self, logprobs, sampled):
        """Takes the logprobs that the ratio is taken against: those of the forward that trains, not the sampler's
        (B, R), for the two differ in bf16 (PPO_DETAILS 9, 10). Their difference is kept as a figure."""
        self.logprobs = logprobs
        self.sampling_gap = ((sampled.exp() - logprobs.exp()).abs() * self.response_mask).max().item()

    @property
    def prompt_columns(self):
        return self.tokens.shape[1] - self.response_mask.shape[1]

    def window(self, rows):
        """(tokens, mask, response_mask) of `rows` without the columns that are padding in all of them."""
        P, mask = self.prompt_columns, self.mask[rows]
        real = mask.any(0).nonzero()[:, 0]
        first, last = int(real[0]), int(real[-1]) + 1
        return self.tokens[rows, first:last], mask[:, first:last], self.response_mask[rows, : last - P]


def response_hidden(trunk, tokens, mask, response_mask):
    """Hidden states (N, C) that the N real response tokens were chosen in: position i predicts token i + 1, the
    slice [P-1:-1]. Rows are read flush left, so that attention needs no mask and no padding stands in front."""
    T, P = tokens.shape[1], tokens.shape[1] - response_mask.shape[1]
    start = mask.int().argmax(1)  # (B,), the first real column
    columns = (torch.arange(T, device=tokens.device) + start[:, None]).clamp_max(T - 1)
    hidden = trunk(tokens.gather(1, columns)[:, : int(mask.sum(1).max())])
    row, column = response_mask.nonzero(as_tuple=True)
    return hidden[row, P - 1 - start[row] + column]


def response_logprobs(model, tokens, mask, response_mask, temperature=1.0, forbid=()):
    """Logprobs (B, R) in fp32 of the response tokens, and their distributions' entropy (B, R). Logits are made at
    the real response positions alone."""
    hidden = response_hidden(model.model, tokens, mask, response_mask)
    ids = tokens[:, -response_mask.shape[1] :][response_mask]
    return tuple(place(x, response_mask) for x in token_logprobs(model, hidden, ids, temperature, forbid))


def place(x, mask):
    """Values (N,) of the N True places of a mask (B, R), in place: (B, R), 0 elsewhere."""
    return torch.zeros(mask.shape, device=x.device).masked_scatter(mask, x)


def in_chunks(read, rollout, size):
    """`read(tokens, mask, response_mask)` -> (b, <=R) over `size` rows at a time, of similar length: (B, R)."""
    if size >= len(rollout.tokens):
        return read(rollout.tokens, rollout.mask, rollout.response_mask)
    out = torch.zeros(rollout.response_mask.shape, device=rollout.tokens.device)
    for rows in rollout.mask.sum(1).argsort().split(size):
        values = read(*rollout.window(rows))
        out[rows, : values.shape[1]] = values
    return out


def sample_responses(actor, prompts, max_new_tokens, temperature=1.0, eos_id=None, forbid=(), stop=None, seed=None):
    """(Rollout without its logprobs, the sampler's own logprobs (B, R)): a response to each prompt (id lists), never
    greedy, from the full distribution but `forbid`.

    `eos_id` None lets every response run to the limit; then forbid the EOS id, or the text would hold it
    as an ordinary token. Nothing is added to a response that the limit cut.
    """
    how = dict(eos_id=eos_id, seed=seed, forbid=forbid, stop=stop, with_logprobs=True)
    responses, sampled = generate(actor, prompts, max_new_tokens, temperature, **how)
    device = actor.device
    prompt_tokens, prompt_mask = pad_left(prompts, device)
    response_tokens, response_mask = pad_right(responses, device)
    ends = set() if eos_id is None else {eos_id} if isinstance(eos_id, int) else set(eos_id)
    truncated = [not (r[-1] in ends or stop is not None and stop(r)) for r in responses]
    tokens, mask = torch.cat((prompt_tokens, response_tokens), 1), torch.cat((prompt_mask, response_mask), 1)
    batch = Rollout(tokens, mask, response_mask, torch.tensor(truncated, device=device))
    return batch, pad_right(sampled, device, value=0.0)[0]


def rollout(actor, prompts, max_new_tokens, temperature=1.0, forbid=(), microbatch=64, **how):
    """Samples a response to each prompt (see `sample_responses`) and reads its logprobs. Returns a Rollout."""
    batch, sampled = sample_responses(actor, prompts, max_new_tokens, temperature, forbid=forbid, **how)
    with torch.no_grad():
        read = lambda *rows: response_logprobs(actor, *rows, temperature, forbid)[0]  # noqa: E731
        batch.read(in_chunks(read, batch, microbatch), sampled)
    return batch


# ---------------------------------------------------------------- rewards and advantages


def shape_scores(scores, lengths, truncated, limit, concise=0.0, truncation_penalty=0.0):
    """Scores (B,) less the length term of Mistral-Plus, `concise` * length / limit, and a penalty where the
    limit cut the response. The paper rewards shorter responses without saying how; this is our form."""
    return scores - concise * lengths / limit - truncation_penalty * truncated


def compute_rewards(scores, logprobs, ref_logprobs, mask, kl_coefficient):
    """Rewards (B, R): -beta * k1 on every real token, the score on the last one. And k1 (B, R) itself, the
    estimate logp - ref logp: positive where the policy likes its token more than the reference does; its sum
    over a sampled response estimates KL(pi || ref) in nats, and can be negative for one response."""
    kl = (logprobs - ref_logprobs) * mask
    rewards = -kl_coefficient * kl
    last = (torch.arange(mask.shape[1], device=mask.device) * mask).amax(1)  # (B,)
    rewards[torch.arange(len(scores), device=mask.device), last] += scores.to(rewards.dtype)
    return rewards, kl


def compute_gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation over the True places of mask, all (B, R), which run without a gap.

    The value after the last real token is 0: the episode has ended. Returns (advantages, returns), neither
    whitened, 0 outside the mask, in the dtype given.
    Example: rewards 0 0 1, values .5 .5 .5, gamma = lam = 1: advantages .5 .5 .5, returns 1 1 1.
    """
    mask = mask.bool()
    rewards, values = rewards.where(mask, 0.0), values.where(mask, 0.0)
    deltas = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
    following, advantages = torch.zeros_like(rewards[:, 0]), []  # `following`: the advantage one token later
    for delta in reversed(deltas.unbind(1)):
        following = delta + gamma * lam * following
        advantages.append(following)
    advantages = torch.stack(advantages[::-1], 1) * mask
    return advantages, (advantages + values) * mask


# ---------------------------------------------------------------- losses


def policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """Clipped surrogate: (loss summed over real tokens, ratio (B, R), share of real tokens where it clips)."""
    ratio = (logprobs - old_logprobs).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return (torch.maximum(plain, clipped) * mask).sum(), ratio.detach(), masked_mean((clipped > plain).float(), mask)


def value_loss(values, old_values, returns, mask, clip):
    """Half the larger of the squared errors of the value and of the value kept near the old one, summed."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    return (0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2) * mask).sum()


# ---------------------------------------------------------------- controllers


class KLController:
    """beta, fixed, or moved by up to 2% a step towards a target KL a response (1909.08593, section 2.2)."""

    def __init__(self, coefficient, target=0.0):
        self.coefficient, self.target = coefficient, target

    def update(self, kl):
        if self.target and math.isfinite(kl):
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coefficient *= 1 + 0.1 * error

    def state_dict(self):
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state):
        self.coefficient = state["coefficient"]


class FixedLimit:
    """l(t) = l: one limit for the whole run."""

    p_extend = 0.0

    def __init__(self, limit):
        self.limit = limit

    def update(self, reward, value_loss):
        return self.limit

    def state_dict(self):
        return {"limit": self.limit}

    def load_state_dict(self, state):
        self.limit = state["limit"]


class SteppedLimit(FixedLimit):
    """The baseline that Continuous Maximization argues against: `amount` more tokens every `every` updates."""

    def __init__(self, initial, maximum, amount, every):
        self.limit, self.maximum = min(initial, maximum), maximum
        self.amount, self.every, self.updates = amount, every, 0

    def update(self, reward, value_loss):
        self.updates += 1
        if self.updates % self.every == 0:
            self.limit = min(self.limit + self.amount, self.maximum)
        return self.limit

    def state_dict(self):
        return {"limit": self.limit, "updates": self.updates}

    def load_state_dict(self, state):
        self.limit, self.updates = state["limit"], state["updates"]


CM_FEATURES = ("reward_trend", "reward_spread", "reward_change", "value_trend", "value_spread", "value_change")
CM_WEIGHTS = (-1.0, -3.0, -2.0, -0.5, -1.0, -0.5)
CM_BIAS = 3.0


class ContinuousMaximization:
    """l(t) = f_CM(R_t, V_phi): a logistic regression that says whether training is stable at this limit.

    The paper names the inputs (reward scores, critic value losses) and the form (logistic regression), not
    the function. Here x holds three features of the last `window` values of each of the two series, in units
    of a reference deviation (`reward_scale`, `value_scale`; never of the mean, which for a centred reward is
    near 0):
      trend    |change of the least-squares line over the window|: still learning, or falling
      spread   deviation of the values around that line: noise, slow swings
      change   mean |difference of neighbours|: oscillation (1.13 spreads for white noise, 2 for +-)
    p_extend = sigmoid(w.x + b). Over `threshold` the limit is multiplied by `factor` (at least one token more),
    up to `maximum`, and the window starts anew, so that the new limit is judged by its own values. Otherwise it
    holds. A window that is not full, or holds a value that is not finite, holds. It never shrinks.

    With the default weights a calm pair of series (spread 0.1) gives p = 0.9, rewards that alternate by half
    a deviation around their mean give p = 0.3. Pure: floats in, an int out.
    """

    def __init__(
        self,
        initial=64,
        maximum=1024,
        factor=1.25,
        window=8,
        threshold=0.5,
        reward_scale=1.0,
        value_scale=0.5,
        weights=CM_WEIGHTS,
        bias=CM_BIAS,
    ):
        self.limit, self.maximum, self.factor, self.window, self.threshold = (
            min(initial, maximum),
            maximum,
            factor,
            window,
            threshold,
        )
        self.reward_scale, self.value_scale, self.weights, self.bias = reward_scale, value_scale, tuple(weights), bias
        self.rewards, self.value_losses = [], []
        self.p_extend, self.features, self.extensions, self.holds = 0.0, (0.0,) * 6, 0, 0

    def update(self, reward: float, value_loss: float) -> int:
        """Takes the mean score and the critic's loss of an update; returns the limit of the next one."""
        self.rewards = [*self.rewards, float(reward)][-self.window :]
        self.value_losses = [*self.value_losses, float(value_loss)][-self.window :]
        self.p_extend = 0.0
        if len(self.rewards) < self.window:
            return self.limit
        self.features = self._series(self.rewards, self.reward_scale) + self._series(
            self.value_losses, self.value_scale
        )
        if all(map(math.isfinite, self.features)):
            logit = self.bias + sum(w * x for w, x in zip(self.weights, self.features))
            self.p_extend = 1 / (1 + math.exp(-max(logit, -60.0)))
        if self.p_extend <= self.threshold:
            self.holds += 1
        elif self.limit < self.maximum:
            self.limit = min(max(self.limit + 1, round(self.limit * self.factor)), self.maximum)
            self.extensions += 1
            self.rewards, self.value_losses = [], []
        return self.limit

    def _series(self, values, scale):
        n = len(values)
        mean, center = sum(values) / n, (n - 1) / 2
        slope = sum((i - center) * (v - mean) for i, v in enumerate(values)) / max(
            sum((i - center) ** 2 for i in range(n)), 1
        )
        residuals = [v - mean - slope * (i - center) for i, v in enumerate(values)]
        spread = math.sqrt(sum(r * r for r in residuals) / n)
        change = sum(abs(b - a) for a, b in zip(values, values[1:])) / max(n - 1, 1)
        return abs(slope) * (n - 1) / scale, spread / scale, change / scale

    STATE = ("limit", "rewards", "value_losses", "p_extend", "features", "extensions", "holds")

    def state_dict(self):
        """What changes while it runs, as JSON can hold it; the options are the constructor's."""
        return {name: list(v) if isinstance(v := getattr(self, name), (list, tuple)) else v for name in self.STATE}

    def load_state_dict(self, state):
        for name in self.STATE:
            setattr(self, name, state[name])


# ---------------------------------------------------------------- the trainer


@dataclass
class Prompt:
    ids: list  # what the actor reads, system prompt and template included
    context: object = None  # whatever the score function wants to know about it


class PPOTrainer:
    """Actor, critic, reference and a score function, on a list of `Prompt`s; `step()` is one PPO step.

    score_fn(contexts, responses) -> scores (B,), where a response is an id list. second_score, likewise, is
    logged and never trained on; describe(responses) -> a dict of further figures to log. `limit` is one of the
    controllers above. eos_id None with forbid=(EOS,) is the coarse stage: no ending, anywhere. `state`, of an
    interrupted run with the same arguments, is gone on from.
    """

    def __init__(
        self,
        actor,
        reference,
        critic,
        prompts,
        score_fn,
        limit,
        options,
        steps,
        *,
        eos_id=None,
        forbid=(),
        stop=None,
        second_score=None,
        describe=None,
        seed=0,
        state=None,
    ):
        self.actor, self.reference, self.critic = (
            actor.eval(),
            reference.eval().requires_grad_(False),
            critic.eval(),
        )  # no dropout exists, nor ever would be on
        self.prompts, self.score_fn, self.second_score, self.describe = prompts, score_fn, second_score, describe
        self.limit, self.options = limit, options
        self.sampling = dict(temperature=options.temperature, eos_id=eos_id, forbid=forbid, stop=stop)
        self.kl_controller = KLController(options.kl_coefficient, options.kl_target)
        self.generator = torch.Generator().manual_seed(seed)
        updates = steps * options.epochs * options.minibatches
        self.optimizers, self.schedules = zip(
            *(
                make_optimizer([m], lr, updates, betas=(0.9, 0.95), eps=1e-5)
                for m, lr in ((actor, options.lr), (critic, options.critic_lr))
            )
        )
        self.order, self.score_mean, self.score_scale, self.steps_done = [], 0.0, 1.0, 0
        if state is None:
            self.calibrate()
        else:
            self.load(state)

    PLAIN = ("order", "score_mean", "score_scale", "steps_done")

    def state(self):
        """Everything that changes while it trains, for a checkpoint: see checkpoint.py."""
        return {name: getattr(self, name) for name in self.PLAIN} | {
            "trained": [optimizer_state(*pair) for pair in zip(self.optimizers, self.schedules)],
            "data": checksum(p.ids for p in self.prompts),
            "generator": self.generator.get_state(),
            "limit": self.limit.state_dict(),
            "kl_controller": self.kl_controller.state_dict(),
        }

    def load(self, state):
        """Goes on from a `state`, with the same prompts and score function."""
        if checksum(p.ids for p in self.prompts) != state["data"]:
            raise ValueError("the prompts are others")
        for name in self.PLAIN:
            setattr(self, name, state[name])
        for optimizer, schedule, trained in zip(self.optimizers, self.schedules, state["trained"], strict=True):
            load_optimizer(optimizer, schedule, trained)
        self.generator.set_state(state["generator"])
        self.limit.load_state_dict(state["limit"])
        self.kl_controller.load_state_dict(state["kl_controller"])

    def draw(self, count):
        """The next `count` prompts of a shuffled order that starts again when it ends."""
        while len(self.order) < count:
            self.order += torch.randperm(len(self.prompts), generator=self.generator).tolist()
        taken, self.order = self.order[:count], self.order[count:]
        return [self.prompts[i] for i in taken]

    def sample(self, prompts):
        seed = int(torch.randint(2**62, (1,), generator=self.generator))
        return sample_responses(self.actor, [p.ids for p in prompts], self.limit.limit, seed=seed, **self.sampling)

    def responses(self, batch):
        return [
            row[m].tolist() for row, m in zip(batch.tokens[:, batch.prompt_columns :].cpu(), batch.response_mask.cpu())
        ]

    def score(self, function, prompts, responses):
        """Raw scores (B,), fp32, their shape checked: the function may be anybody's. One that is NaN or infinite
        makes every gradient so, and no update is made of its batch."""
        scores = torch.as_tensor(function([p.context for p in prompts], responses), dtype=torch.float32)
        if scores.shape != (len(prompts),):
            shape, wanted = tuple(scores.shape), (len(prompts),)
            raise InputError(f"the score function returned shape {shape}, numbers of shape {wanted} are expected")
        return scores

    def calibrate(self):
        """Mean and deviation of the score over reference responses, before any update (the actor is still the
        reference): scores are centred and in these units from then on (PPO_DETAILS 17). So a coefficient of
        the KL, and the limit's reference deviation, mean the same under any score function."""
        prompts = self.draw(max(64, self.options.batch))
        raw = [
            self.score(
                self.score_fn,
                prompts[i : i + self.options.batch],
                self.responses(self.sample(prompts[i : i + self.options.batch])[0]),
            )
            for i in range(0, len(prompts), self.options.batch)
        ]
        raw = torch.cat(raw)
        if not raw.isfinite().all():
            raise InputError(f"the score function gave {raw[~raw.isfinite()][0]}, finite numbers are expected")
        self.score_mean, deviation = raw.mean().item(), raw.std().item()
        # A score that does not vary here (a rule that nothing meets yet) has no unit of its own.
        self.score_scale = deviation if deviation > 1e-6 * max(1.0, abs(self.score_mean)) else 1.0

    def step(self):
        """One PPO step. Returns (metrics, samples): floats by the names of DESIGN.md; the first few responses
        as (context, response ids, score, KL)."""
        o, start = self.options, time.perf_counter()
        # 1-2  prompts, rollout
        prompts = self.draw(o.batch)
        limit = self.limit.limit
        batch, sampled = self.sample(prompts)
        generated = time.perf_counter() - start
        mask = batch.response_mask
        lengths = mask.sum(1).cpu()
        # 3  scores, centred on the reference's
        responses = self.responses(batch)
        scores = (self.score(self.score_fn, prompts, responses) - self.score_mean) / self.score_scale
        shaped = shape_scores(scores, lengths, batch.truncated.cpu(), limit, o.concise, o.truncation_penalty)
        # 4  actor and reference, on the same slice
        logprobs, graph = self.read(batch)
        batch.read(logprobs, sampled)
        with torch.no_grad():
            ref_logprobs = in_chunks(lambda *rows: self.read_logprobs(self.reference, *rows)[0], batch, o.microbatch)
        # 5  rewards, values, advantages
        rewards, kl = compute_rewards(
            shaped.to(mask.device), batch.logprobs, ref_logprobs, mask, self.kl_controller.coefficient
        )
        old_values, advantages, returns, learnt = self.judge(batch, rewards)
        # 6  update
        metrics = self.update(batch, masked_whiten(advantages, mask), returns, old_values, graph, learnt)
        # 7  the next limit and the next beta
        self.steps_done += 1
        response_kl, coefficient = kl.sum(1), self.kl_controller.coefficient
        self.kl_controller.update(response_kl.mean().item())
        self.limit.update(scores.mean().item(), metrics["value_loss"])
        seconds = time.perf_counter() - start
        metrics |= {
            "reward": scores.mean().item(),
            "reward_shaped": shaped.mean().item(),
            "kl": response_kl.mean().item(),
            "kl_per_token": masked_mean(kl, mask).item(),
            "kl_coefficient": coefficient,
            "response_length": lengths.float().mean().item(),
            "length_limit": limit,
            "p_extend": self.limit.p_extend,
            "truncation_rate": batch.truncated.float().mean().item(),
            "eos_rate": 1 - batch.truncated.float().mean().item(),
            "explained_variance": self.explained(old_values, returns, mask),
            "score_length_correlation": correlation(scores, lengths.float()),
            "sampling_gap": batch.sampling_gap,
            "samples_per_second": len(prompts) / seconds,
            "tokens_per_second": lengths.sum().item() / seconds,
            "generation_share": generated / seconds,
            "tokens": int(lengths.sum()),
            "peak_memory_gib": peak_memory_gib(mask.device),
        }
        if self.second_score is not None:
            metrics["second_score"] = self.score(self.second_score, prompts, responses).mean().item()
        if self.describe is not None:
            metrics |= self.describe(responses)
        return metrics, list(zip([p.context for p in prompts[:3]], responses, scores.tolist(), response_kl.tolist()))

    def read_logprobs(self, model, tokens, mask, response_mask):
        return response_logprobs(model, tokens, mask, response_mask, self.options.temperature, self.sampling["forbid"])

    def read_values(self, tokens, mask, response_mask):
        """Values (B, R) of the states that the response tokens were chosen in: the same slice as the logprobs."""
        hidden = response_hidden(self.critic.model, tokens, mask, response_mask)
        return place(self.critic.head(hidden)[:, 0].float(), response_mask)

    def read(self, batch):
        """Logprobs (B, R) before the update; and where one microbatch is the whole first update, (logprobs, entropy)
        with their graph: that update's forward pass is this one. Else None."""
        read = lambda *rows: self.read_logprobs(self.actor, *rows)  # noqa: E731
        if self.options.minibatches == 1 and len(batch.tokens) <= self.options.microbatch:
            graph = read(batch.tokens, batch.mask, batch.response_mask)
            return graph[0].detach(), graph
        with torch.no_grad():
            return in_chunks(lambda *rows: read(*rows)[0], batch, self.options.microbatch), None

    def judge(self, batch, rewards):
        """Values, advantages and returns (B, R) before the update; and where the whole batch is one minibatch, the
        figures of the critic's first update, which is made on the way: the returns of a row need no other row's
        values, so that each microbatch is read once for both. Else None."""
        o, mask, learnt = self.options, batch.response_mask, []
        values = torch.zeros(mask.shape, device=mask.device)
        with torch.set_grad_enabled(o.minibatches == 1):
            for rows in batch.mask.sum(1).argsort().split(o.microbatch):
                read = self.read_values(*batch.window(rows))
                R = read.shape[1]
                values[rows, :R] = read.detach()
                if o.minibatches == 1:
                    of_rows = rewards[rows, :R], values[rows, :R], mask[rows, :R]
                    returns = compute_gae(*of_rows, o.discount, o.gae_lambda)[1]
                    learnt.append(self.value_backward(read, *of_rows[1:], returns, mask.sum()))
        if learnt:
            learnt.append(self.optimize(1))
        return values, *compute_gae(rewards, values, mask, o.discount, o.gae_lambda), learnt or None

    def update(self, batch, advantages, returns, old_values, graph=None, learnt=None):
        """epochs x minibatches optimizer steps for each of actor and critic, or fewer by `kl_stop`; `graph` as
        `self.read`, `learnt` as `self.judge` gave it. Every loss is a sum over a microbatch divided by the number of
        real tokens in the whole minibatch (PPO_DETAILS 20)."""
        o, totals, ratio_first, done = self.options, {}, None, 0
        for rows in self.minibatches(batch):
            count = batch.response_mask[rows].sum()
            parts = [rows.sort().values] if graph else rows.split(o.microbatch)  # a graph is of the batch as it is
            parts = [self.policy_backward(batch, part, advantages, count, graph) for part in parts]
            if ratio_first is None:  # of the whole first minibatch, the ratio that is farthest from 1
                ratio_first = max((p["ratio"] for p in parts), key=lambda r: abs(r - 1))
            approx_kl = sum(p["approx_kl"] for p in parts)
            parts.append(self.optimize(0))  # whose gradients are gone before the critic's come
            parts += learnt or self.learn_values(batch, rows, returns, old_values, count)
            for name, figure in (item for part in parts for item in part.items()):
                totals[name] = totals.get(name, 0.0) + figure
            graph, learnt, done = None, None, done + 1
            if o.kl_stop and approx_kl > o.kl_stop:
                break
        del totals["ratio"]
        skipped = totals.pop("skipped_updates")
        means = {name: x / done for name, x in totals.items()}
        return means | {"ratio_first": ratio_first, "skipped_updates": skipped, "updates": done}

    def minibatches(self, batch):
        """The rows of each optimizer step: `epochs` passes in random order, each minibatch by length."""
        o = self.options
        for _ in range(o.epochs):
            for rows in torch.randperm(len(batch.tokens), generator=self.generator).tensor_split(o.minibatches):
                yield rows[batch.mask[rows.to(batch.mask.device)].sum(1).cpu().argsort()].to(batch.mask.device)

    def learn_values(self, batch, rows, returns, old_values, count):
        """One optimizer step of the critic on `rows`. Returns its figures, a dict a microbatch."""
        parts = []
        for part in rows.split(self.options.microbatch):
            window = batch.window(part)
            R = window[2].shape[1]
            values = self.read_values(*window)
            parts.append(self.value_backward(values, old_values[part, :R], window[2], returns[part, :R], count))
        return [*parts, self.optimize(1)]

    def optimize(self, i):
        """An optimizer step of the actor (0) or the critic (1). Returns the norm that its gradients had, and whether
        that was not finite, so that there was no step."""
        module, name = ((self.actor, "grad_norm"), (self.critic, "critic_grad_norm"))[i]
        norm = descend(module, self.optimizers[i], self.schedules[i], self.options.max_grad_norm)
        self.optimizers[i].zero_grad()
        module.zero_grad()
        return {name: norm, "skipped_updates": int(not math.isfinite(norm))}

    def policy_backward(self, batch, rows, advantages, count, graph=None):
        """Adds the actor's gradients of one microbatch; `graph`: its (logprobs, entropy), where they are at hand.
        Returns its share of the minibatch's means, and as "ratio" the one that is farthest from 1."""
        window = (batch.tokens, batch.mask, batch.response_mask) if graph else batch.window(rows)
        mask = window[2]
        old, advantages = (x[rows, : mask.shape[1]] for x in (batch.logprobs, advantages))
        logprobs, entropy = graph or self.read_logprobs(self.actor, *window)
        loss, ratio, clipped = policy_loss(logprobs, old, advantages, mask, self.options.clip)
        (loss / count).backward()
        share = mask.sum() / count
        log_ratio = (logprobs.detach() - old) * mask
        return {
            "policy_loss": (loss.detach() / count).item(),
            "clip_fraction": (clipped * share).item(),
            "entropy": (masked_mean(entropy, mask) * share).item(),
            "approx_kl": (masked_mean(ratio - 1 - log_ratio, mask) * share).item(),
            "ratio": ratio[mask][(ratio[mask] - 1).abs().argmax()].item(),
        }

    def value_backward(self, values, old_values, mask, returns, count):
        """Adds the critic's gradients of one microbatch, all (b, R). Returns its share of the minibatch's loss."""
        loss = value_loss(values, old_values, returns, mask, self.options.value_clip) / count
        loss.backward()
        return {"value_loss": loss.item()}

    def explained(self, values, returns, mask):
        """1 - Var(returns - values) / Var(returns) over real tokens: 1 perfect, 0 no better than the mean."""
        v, r = values[mask], returns[mask]
        return (1 - (r - v).var(correction=0) / r.var(correction=0).clamp_min(1e-8)).item()


def correlation(x, y):
    """Pearson's correlation of two vectors, 0 where either is constant."""
    x, y = x - x.mean(), y - y.mean()
    return (x @ y / (x.norm() * y.norm()).clamp_min(1e-8)).item()


def peak_memory_gib(device):
    """Peak memory of the device, or of this process where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
