"""How much memory a stage takes on one GPU, by arithmetic alone: `python c2f.py --stage coarse --estimate`.

    {phase: {part: bytes}}      what is live at the highest moment of each phase: `ppo`, `fit`

All rows have the greatest length that the options allow, and the device is a GPU, whatever is there.
`Network` counts what a model's passes hold, layer by layer as model.py computes; `ppo` and `fit` put the
phases of a stage together. tests/test_estimate.py compares both with the stages' own steps on a device that
follows every tensor."""

from collections import Counter
from dataclasses import dataclass, replace

from generation import COLUMNS, KEPT_SHARE, PREFILL_TOKENS
from model import Config
from reward import SCORE_TOKENS
from run.folder import target
from support.files import InputError
from support.options import check, flag
from training import LOGITS_BYTES, TRAINED
from weights import has_adapter, is_model, read_config

GIB = 2**30
CARDS = (24, 40, 80)  # GiB of a card
MOST = 512  # rows of a batch that are tried
RESERVE = 1.5  # GiB of it for CUDA itself, its libraries, and gaps between tensors that no other tensor fits in
ARCHITECTURES = {  # of the presets whose base is not bundled
    "mistral-7b": Config(),
    "smollm2-135m": Config(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True),
}
PARTS = (  # rows of the table, in this order
    "weights, one base", "weights, actor", "weights, reference", "weights, critic", "weights, reward model",
    "weights", "adapters", "fp32 copies of weights", "Adam's moments", "gradients", "keys and values", "prefill",
    "activations", "logits",
)  # fmt: skip
READ_LOGITS = 5  # fp32 tensors of a chunk: logits, logprobs, their exponentials, a clamped copy, the product
TRAINED_LOGITS = 4  # logits, their exponentials, and the gradients of both
SAMPLED_LOGITS = 5  # logits of the graph and shaped ones, probabilities, cumulative ones, a comparison


@dataclass
class Network:
    """A model's sizes, the precision it is in, and what of it is trained."""

    config: Config
    width: int  # bytes of a weight or an activation
    rank: int  # of the adapters that are trained; 0: the whole model is
    checkpointing: bool

    def __post_init__(self):
        config = self.config
        C = self.hidden = config.hidden_size
        I = self.inner = config.intermediate_size
        self.layers = config.num_hidden_layers
        self.queries = config.num_attention_heads * config.head_dim  # H D
        self.keys = config.num_key_value_heads * config.head_dim  # G D
        attention = [(self.queries, C), (self.keys, C), (self.keys, C), (C, self.queries)]
        matrices = [*attention, (I, C), (I, C), (C, I)]  # (outputs, inputs)
        block = sum(outputs * inputs for outputs, inputs in matrices) + 2 * C  # with its two norms
        embedding = config.vocab_size * C
        self.trunk = (embedding + self.layers * block + C) * self.width
        self.head = 0 if config.tie_word_embeddings else embedding * self.width
        self.largest = max(embedding, C * I)  # numbers of a weight
        self.adapter = self.rank * self.layers * sum(map(sum, matrices))  # numbers of all A and B
        self.casts = self.adapter * self.width if self.width < 4 else 0  # copies of them in the weights' precision

    def training_state(self, weights):
        """(what AdamW holds beside `weights` bytes of trained weights or beside adapters, gradients),
        bytes."""
        numbers = self.adapter or weights // self.width
        masters = 4 * numbers if self.width < 4 and not self.rank else 0  # adapters are fp32 themselves
        return Counter({"fp32 copies of weights": masters, "Adam's moments": 8 * numbers}), 4 * numbers

    def cache(self, batch, columns):
        """Keys and values of every layer, row, column and key head. A window bounds the columns."""
        columns = min(-(-columns // COLUMNS) * COLUMNS, self.config.sliding_window or columns + COLUMNS)
        return 2 * self.layers * batch * columns * self.keys * self.width

    def forward(self, tokens):
        """A pass without gradients: a block's input, its MLP's input, the norm of that, and three inner
        states (silu of the gate, up, their product); or its input, norm, and queries and keys while they turn
        in fp32."""
        mlp = 3 * (self.hidden + self.inner) * self.width
        turning = (self.queries + self.keys) * (self.width + 12) + 2 * self.hidden * self.width
        return tokens * max(mlp, turning)

    def prefill(self, batch, prompt):
        """The prompts' pass, some columns at a time, beside the last states of the columns before. Its last
        columns see all keys under a mask, for which a group's keys are copied for each of its query heads."""
        columns = min(prompt, max(1, PREFILL_TOKENS // batch))
        before = self.hidden * self.width * columns if columns < prompt else 0
        copies = self.queries if self.queries > self.keys else 0
        keys = 2 * (self.keys + copies) * prompt * self.width
        queries = (2 * self.hidden + 3 * self.queries + 2 * self.keys) * columns * self.width
        mask = (1 + self.width) * columns * prompt
        return batch * before + max(self.forward(batch * columns), batch * (keys + queries + mask))

    def fresh_gradient(self, passes):
        """A trained weight's gradient before it is added to that of earlier passes. In 16 bits there are also
        its fp32 copy and the sum of both."""
        copies = 0 if passes == 1 else 4
        if self.width < 4:
            copies = self.width + 2 * copies
        return copies * self.largest

    def training(self, tokens, gradients, logit_rows=0, passes=1):
        """{part: bytes} of `passes` passes of `tokens` tokens with gradients: at the backward pass of an MLP
        or of logits, or, where one pass makes all `gradients`, at its end.

        A block keeps its input, two norms, queries, keys, values and what attention gives, the MLP's input,
        and four inner states (gate, silu of it, up, product); with checkpointing its input alone until its
        turn comes. At its MLP's turn there are also the gradient of its output, and two of the inner size."""
        expanded = self.queries if self.width == 4 else self.keys  # no fused kernel has grouped heads in fp32
        block = (3 * self.hidden + 2 * self.queries + 2 * expanded + 4 * self.inner) * self.width * tokens
        block += self.casts // self.layers
        states = self.layers * self.hidden * self.width * tokens
        before_logits = states + 2 * self.hidden * self.width * tokens  # the last states, and their gradient
        if self.checkpointing:
            states += block
        else:
            states += self.layers * block
            before_logits += self.layers * block
        states += (self.hidden + 2 * self.inner) * self.width * tokens
        fresh = 0 if self.rank else self.fresh_gradient(passes)
        logits = TRAINED_LOGITS * logit_bytes(self, logit_rows)
        earlier = gradients if passes > 1 else 0
        moments = [
            Counter({"gradients": earlier, "activations": before_logits, "logits": logits}),
            Counter({"gradients": earlier, "activations": states + fresh}),
            Counter({"gradients": gradients, "activations": fresh}),
        ]
        return max(moments, key=total)


def logit_bytes(network, rows):
    """Of fp32 logits, which exist for a few rows at a time."""
    return min(LOGITS_BYTES, 4 * rows * network.config.vocab_size)


def total(parts):
    return sum(parts.values())


# ---------------------------------------------------------------- stages


def ppo(options, network, scorer, card):
    """plus and coarse, on a card of so many GiB: {phase: {part: bytes}}. scorer: the reward model's
    `Network`, the actor's own one where it stands on the same base, or None."""
    length = options.max_prompt + longest_response(options)
    batch = options.batch
    live, actor_gradients, critic_gradients = ppo_state(network, scorer)
    # The decoder, with adapters that are cast once, stays for the next rollout unless its cache is large.
    decoder = Counter({"adapters": network.casts, "keys and values": network.cache(batch, length)})
    after = live + decoder if decoder["keys and values"] <= card * GIB * KEPT_SHARE else live
    sampling = SAMPLED_LOGITS * 4 * batch * network.config.vocab_size
    rollout = Counter({"prefill": max(network.prefill(batch, options.max_prompt), sampling)})
    phases = {"rollout": live + decoder + rollout}
    if scorer:
        scored_rows = min(batch, max(1, SCORE_TOKENS // length))
        phases["scoring"] = after + Counter({"activations": scorer.forward(scored_rows * length)})
    rows = min(options.microbatch, batch)
    phases["reading"] = after + reading(network, rows * length, rows * longest_response(options))
    minibatch = -(-batch // options.minibatches)
    rows = min(options.microbatch, minibatch)
    passes = -(-minibatch // rows)
    logit_rows = rows * longest_response(options)
    phases["actor"] = after + network.training(rows * length, actor_gradients, logit_rows, passes)
    phases["critic"] = after + network.training(rows * length, critic_gradients, 0, passes)
    return phases


def ppo_state(network, scorer):
    """(parts that live through all phases, gradients of the actor, gradients of the critic), bytes. With
    adapters all roles stand on one base. Without, the critic and the reward model have a trunk each and no
    large head."""
    whole = network.trunk + network.head
    if network.rank:
        roles = 3 if scorer is network else 2
        live = Counter({"weights, one base": whole, "adapters": 4 * network.adapter * roles})
    else:
        live = Counter({"weights, actor": whole, "weights, reference": whole, "weights, critic": network.trunk})
    if scorer and (scorer is not network or not network.rank):
        live["weights, reward model"] = scorer.trunk
    actor, actor_gradients = network.training_state(whole)
    critic, critic_gradients = network.training_state(network.trunk)
    return live + actor + critic, actor_gradients, critic_gradients


def reading(network, tokens, logit_rows):
    """Logprobs and values of the responses before the update: a block's states, or logits with the last
    states."""
    states = Counter({"activations": network.forward(tokens)})
    last = network.hidden * network.width * (tokens + logit_rows) // 2
    logits = Counter({"activations": last, "logits": READ_LOGITS * logit_bytes(network, logit_rows)})
    return max(states, logits, key=total)


def limit_name(options):
    return "length_limit" if options.limit_growth == "fixed" else "limit_maximum"


def longest_response(options):
    """The largest length limit that the run can reach."""
    return getattr(options, limit_name(options))


def fit(options, network, stage):
    """reward, sft and pretrain: {phase: {part: bytes}}."""
    length = options.max_length
    weights = network.trunk if stage == "reward" else network.trunk + network.head
    state, gradients = network.training_state(weights)
    live = state + Counter({"weights": weights, "adapters": 4 * network.adapter})
    if stage == "reward":  # a quarter of the pairs at a time, chosen and rejected together
        rows = 2 * max(1, options.batch_pairs // 4)
        tested_rows = min(options.test_pairs, max(1, SCORE_TOKENS // length))
        return {
            "training": live + network.training(rows * length, gradients, passes=min(4, options.batch_pairs)),
            "testing": live + Counter({"activations": network.forward(tested_rows * length)}),
        }
    rows = max(1, options.batch_tokens // 4 // length)
    passes = -(-options.batch_tokens // (rows * length))
    return {"training": live + network.training(rows * length, gradients, rows * length, passes)}


# ---------------------------------------------------------------- what the options mean


def count(options, stage, card):
    """{phase: {part: bytes}} of a stage under `options` on a card of `card` GiB."""
    network = network_of(options, stage)
    if stage in ("plus", "coarse"):
        return ppo(options, network, scorer_of(options, network), card)
    return fit(options, network, stage)


def network_of(options, stage):
    if not options.model:
        config = ARCHITECTURES[options.preset]
    elif is_model(options.model):
        config = Config.from_dict(read_config(options.model))
    else:
        usual = "without --model it is the preset's own" if options.preset in ARCHITECTURES else "a folder is expected"
        raise InputError(f"--model: {options.model} is no folder with a config.json; {usual}")
    width = 4 if options.dtype == "float32" else 2
    rank = 0 if stage == "pretrain" else options.lora_rank
    return Network(config, width, rank, options.checkpointing)


def scorer_of(options, network):
    """The reward model's `Network`: that of its folder, or the actor's where it stands on the same base or
    has no folder yet. None for a function of the user's."""
    folder = options.reward_model or target(options.out, "reward")
    if options.score:
        return None
    if not is_model(folder) or has_adapter(folder) and network.rank:
        return network
    return replace(network, config=Config.from_dict(read_config(folder)))


def peak(options, stage, card):
    """(GiB at the highest moment, the phase of that moment)."""
    phases = count(options, stage, card)
    name = max(phases, key=lambda name: total(phases[name]))
    return total(phases[name]) / GIB, name


def fits(options, stage, card):
    return peak(options, stage, card)[0] <= card - RESERVE


def smallest_card(options, stage):
    """The first card that holds the stage, or None."""
    return next((card for card in CARDS if fits(options, stage, card)), None)


def savings(options, stage, card):
    """[(an option as typed, peak in GiB, its phase)] of changes that save 1% or more, one at a time."""
    names = {"sft": ("batch_tokens",), "pretrain": ("batch_tokens",), "reward": ("batch_pairs", "max_length")}
    least = {"batch": options.minibatches, "limit_maximum": options.length_limit, "max_length": 8}
    changes = {}
    for name in names.get(stage, ("batch", "microbatch", limit_name(options), "max_prompt")):
        half = getattr(options, name) // 2
        if half >= least.get(name, 1):
            changes[f"{flag(name)} {half}"] = replace(options, **{name: half})
    if stage != "pretrain":
        changes["--checkpointing"] = replace(options, checkpointing=True)
        changes["--lora-rank 16"] = replace(options, lora_rank=options.lora_rank or 16)
    changes["--dtype bfloat16"] = replace(options, dtype="bfloat16")
    before, _ = peak(options, stage, card)
    rows = [(text, *peak(change, stage, card)) for text, change in changes.items()]
    return [row for row in rows if row[1] < 0.99 * before]


def largest(options, stage, card):
    """(batch, microbatch) that fit a card: the largest batch with the microbatch as it is, or with half of it
    and so on where none fits; then the microbatch, doubled while it fits. None where nothing fits."""
    batches = range(max(MOST // options.minibatches, 1) * options.minibatches, 0, -options.minibatches)
    microbatch = options.microbatch
    while microbatch:
        for batch in batches:
            change = replace(options, batch=batch, microbatch=microbatch)
            if fits(change, stage, card):
                while 2 * change.microbatch <= batch:
                    doubled = replace(change, microbatch=2 * change.microbatch)
                    if not fits(doubled, stage, card):
                        break
                    change = doubled
                return batch, change.microbatch
        microbatch //= 2
    return None


# ---------------------------------------------------------------- what is printed


def estimate(by_stage):
    """The estimates of those stages of {stage: its options} that train, as texts."""
    stages = [stage for stage in by_stage if stage in TRAINED]
    if not stages:
        raise InputError(f"--estimate: {', '.join(by_stage)} has none; these do: {', '.join(TRAINED)}")
    for stage in stages:
        check(by_stage[stage])
    return [describe(by_stage[stage], stage) for stage in stages]


def describe(options, stage):
    """The estimate as text."""
    card = smallest_card(options, stage)
    gib, phase = peak(options, stage, card or CARDS[-1])
    fit = f"fits a card of {card} GB" if card else f"does not fit a card of {CARDS[-1]} GB"
    lines = [*head(options, stage), "", *table(count(options, stage, card or CARDS[-1])), ""]
    lines.append(f"peak {gib:.1f} GiB, {phase}; with {RESERVE} GiB for CUDA itself and fragmentation it {fit}")
    rows = savings(options, stage, card or CARDS[-1])
    if rows:
        lines += ["", f"{'what takes less':24}{'peak, GiB':>10}"]
        lines += [f"{change:24}{gib:10.1f}  {phase}" for change, gib, phase in rows]
    if stage in ("plus", "coarse"):
        lines += ["", "the largest batch at these lengths, and rows at once with it"]
        lines += [largest_line(options, stage, card) for card in CARDS]
    return "\n".join(lines)


def largest_line(options, stage, card):
    pair = largest(options, stage, card)
    if pair is None:
        return f"{card} GB    none"
    most = " (more were not tried)" if pair[0] > MOST - options.minibatches else ""
    return f"{card} GB    --batch {pair[0]} --microbatch {pair[1]}{most}"


def head(options, stage):
    """Lines that say what is estimated."""
    network = network_of(options, stage)
    millions = (network.trunk + network.head) / network.width / 1e6
    precision = "bf16" if network.width == 2 else "fp32"
    trained = f"adapters of rank {network.rank} on one frozen copy" if network.rank else "all of them trained"
    name = options.model or options.preset
    yield f"{stage}, {name}, one GPU: {millions:,.0f} million weights in {precision}, {trained}"
    if stage in ("plus", "coarse"):
        yield from ppo_head(options, network)
    elif stage == "reward":
        yield f"{options.batch_pairs} pairs a step (--batch-pairs), rows of {options.max_length} tokens (--max-length)"
    else:
        yield f"{options.batch_tokens} tokens a step (--batch-tokens), a quarter of them at once"
    if options.checkpointing:
        yield "activations are computed again in backward (--checkpointing)"


def ppo_head(options, network):
    limit = f"{longest_response(options)} tokens ({flag(limit_name(options))}"
    largest = "" if options.limit_growth == "fixed" else ", the largest that the limit may reach"
    yield f"{options.batch} prompts of {options.max_prompt} tokens (--max-prompt), responses of {limit}{largest})"
    scorer = scorer_of(options, network)
    if scorer is None:
        model = "the memory of the --score function is not counted"
    elif scorer is network and network.rank:
        model = "the reward model stands on the same copy"
    else:
        model = "the reward model has weights of its own"
    yield f"{options.microbatch} rows at once (--microbatch); {model}"


def table(phases):
    """Lines of a table, GiB: a part a row, a phase a column. What rounds to nothing everywhere has no row."""
    yield f"{'GiB':24}" + "".join(f"{name:>10}" for name in phases)
    for part in PARTS:
        values = [phase[part] / GIB for phase in phases.values()]
        if max(values) >= 0.005:
            yield f"{part:24}" + "".join(f"{value:10.2f}" if value else f"{'-':>10}" for value in values)
    yield f"{'together':24}" + "".join(f"{total(phase) / GIB:10.2f}" for phase in phases.values())
