"""The runs that the tour looks at: one step of PPO, written down whole, and mistakes made on purpose.

Each is a command of c2f.py that starts from the tiny base and the reward model of `make run`. It leaves its
metrics in runs/tour/NAME, and the recorded step is runs/tour/step/step.json."""

import contextlib
import time
from functools import partial
from pathlib import Path

import torch

import c2f
from evidence.stages import run_ppo
from ppo import (
    PPOTrainer, compute_gae, compute_rewards, place, response_hidden, response_ids, response_logprobs, shape_scores,
)  # fmt: skip
from support import processes
from support.files import write_json
from support.options import build_parser
from tokenizer import load_tokenizer
from training import logprobs_and_entropy

STEP = 8  # the step of Mistral-Plus that is recorded
DONE = "done.json"  # a run's folder has it when it is finished: the seconds that it took
SECOND = "--second-score evidence.stages:gold"  # the checker, who knows the truth
LAMBDAS = (0.0, 0.95, 1.0)
EPOCHS = (1, 4)  # after so many epochs over its batch is the ratio looked at


class Recorded(Exception):
    """The step is written down, and the run need not go on."""


class Recorder(PPOTrainer):
    """PPO that writes its step STEP down, and then goes over the same batch for three epochs more."""

    steps_done = 0

    def sample(self):
        self.prompts, self.batch = super().sample()
        return self.prompts, self.batch

    def raw_scores(self, prompts, responses):
        self.batch_scores = super().raw_scores(prompts, responses)
        return self.batch_scores

    def step(self):
        metrics, samples = super().step()
        self.steps_done += 1
        if self.steps_done == STEP:
            write_json(Path(self.options.out) / "step.json", self.describe(metrics))
            raise Recorded
        return metrics, samples

    def describe(self, metrics):
        """All that the pictures of stops 3 to 5 show, and what whitening without a mask would have made."""
        batch = self.batch
        mask = batch.response_mask
        scores = (self.batch_scores - self.score_mean) / self.score_scale
        shaped = shape_scores(scores, mask.sum(1), batch.truncated, metrics["length_limit"], self.options)
        with torch.no_grad():
            ref_logprobs = self.over(batch, partial(self.logprobs, self.reference))
        rewards, kl = compute_rewards(shaped, batch.logprobs, ref_logprobs, mask, metrics["kl_coefficient"])
        by_token = {"logprobs": batch.logprobs, "ref_logprobs": ref_logprobs, "kl": kl, "rewards": rewards}
        by_token |= {"values": batch.values, "whitened": batch.advantages}
        for lam in LAMBDAS:
            by_token[f"advantages_{lam}"], _ = compute_gae(rewards, batch.values, mask, 1.0, lam)
        advantages, _ = compute_gae(rewards, batch.values, mask, self.options.discount, self.options.gae_lambda)
        unmasked = (advantages - advantages.mean()) / advantages.std()  # padding counts: the mistake
        return {
            "metrics": metrics,
            "example": self.example({"raw_score": self.batch_scores, "score": scores, "shaped": shaped}, by_token),
            "padding": 1 - mask.float().mean().item(),
            "whitened": batch.advantages[mask].tolist(),
            "whitened_without_mask": unmasked[mask].tolist(),
            **self.ratios(),
        }

    def example(self, by_row, by_token):
        """One answer of the batch: ids, and what (B,) and (B, R) tensors say of it."""
        row = self.choose_row()
        response = self.batch.responses()[row]
        example = {"prompt": self.prompts[row].ids, "response": response}
        example |= {name: values[row].item() for name, values in by_row.items()}
        return example | {name: values[row, : len(response)].tolist() for name, values in by_token.items()}

    def choose_row(self):
        """The shortest answer of two sums or more, written out, that ended by itself."""
        tokenizer = load_tokenizer(self.options.model)
        lengths = {}
        for row, ids in enumerate(self.batch.responses()):
            if tokenizer.decode(ids).count("=") >= 3 and not self.batch.truncated[row]:
                lengths[row] = len(ids)
        return min(lengths, key=lengths.get)

    def ratios(self):
        """`ratios` {epochs: [rho of every token of the batch]} after so many epochs over it, and the
        `clip_fraction` of the last epoch."""
        ratios = {}
        for epoch in range(1, max(EPOCHS) + 1):
            if epoch > 1:
                metrics = self.update(self.batch)
            with torch.no_grad():
                logprobs = self.over(self.batch, partial(self.logprobs, self.actor))
            if epoch in EPOCHS:
                ratio = (logprobs - self.batch.logprobs).exp()
                ratios[str(epoch)] = ratio[self.batch.response_mask].tolist()
        return {"ratios": ratios, "clip_fraction": metrics["clip_fraction"]}


class MaskedInSamplingAlone(PPOTrainer):
    """The mistake: EOS is never sampled, and still has its share in all logprobs."""

    def logprobs(self, model, part):
        return response_logprobs(model, part, self.sampling.temperature)

    def logprobs_and_entropy(self, part):
        hidden = response_hidden(self.actor.model, part)
        pairs = logprobs_and_entropy(self.actor, hidden, response_ids(part), self.sampling.temperature)
        return torch.stack([place(x, part.response_mask) for x in pairs], -1)


class ForgedEndings(PPOTrainer):
    """The mistake: an answer that the limit cut is scored with an EOS behind it, as if it were finished."""

    def raw_scores(self, prompts, responses):
        eos = self.sampling.eos_ids[0]
        ended = [ids if ids[-1] == eos else [*ids, eos] for ids in responses]
        return super().raw_scores(prompts, ended)


SHORT = "--stage plus --steps 20 --length-limit 32 --concise 0"
ENDLESS = "--stage coarse --steps 20 --limit-growth fixed --length-limit 48 --kl-coefficient 0.5"
LONGER = "--stage plus --steps 40 --concise 0 --truncation-penalty 0"
RUNS = {  # {name: (options of c2f.py, the trainer)}
    "step": ("--stage plus", Recorder),
    "free": (f"{LONGER} --kl-coefficient 0", None),
    "priced": (f"{LONGER} --kl-coefficient 0.1", None),
    "masked": (ENDLESS, None),
    "masked_in_sampling": (ENDLESS, MaskedInSamplingAlone),
    "forged": (f"{SHORT} --truncation-penalty 0", ForgedEndings),
    "as_it_stands": (f"{SHORT} --truncation-penalty 0", None),
    "penalised": (f"{SHORT} --truncation-penalty 3", None),
}


def stage_of(name):
    return RUNS[name][0].split()[1]


def command(name):
    """What a reader types to do it again."""
    return f"python c2f.py {RUNS[name][0]} {SECOND} --reward-model runs/tiny/reward --out runs/mine/{name}"


def run_all(run, folder):
    """Trains what is not in `folder` yet, with the reward model of `run`."""
    for name, (options, trainer) in RUNS.items():
        if not (folder / name / DONE).exists():
            print(f"{name}: {options}")
            start = time.perf_counter()
            train(options, trainer, folder / name, run / "reward")
            write_json(folder / name / DONE, {"seconds": time.perf_counter() - start})


def train(command, trainer, folder, reward_model):
    """Trains as `c2f.py` with these options does, by a trainer of ours."""
    parser = build_parser(c2f.Options, "tour.py", "", "")
    common = ["--out", str(folder), "--reward-model", str(reward_model), "--overwrite"]
    arguments = vars(parser.parse_args([*command.split(), *SECOND.split(), *common]))
    options = c2f.resolve(arguments, arguments["stage"])
    processes.set_threads(options.threads)
    with contextlib.suppress(Recorded):
        run_ppo(options, trainer=trainer)
