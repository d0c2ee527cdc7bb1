"""One run in several processes, a GPU each (FSDP2), for weights too large for one:

    torchrun --nproc-per-node 4 c2f.py --stage coarse --preset mistral-7b --model DIR --prompts FILE ...

Every process runs the same algorithm, with the same seeds, on the same whole batch; only the trunk, where nearly all
weights and arithmetic are, shares the work out. Each layer's weights lie in N parts, and are gathered while it
computes. A process computes B/N rows of a batch, and all get the hidden states of all: losses, whitening, token counts,
sampling and the length limit are one process's. Gradients, with h_i the hidden states that process i computed:

    dL/dw = sum_i dL/dh_i dh_i/dw = 1/N sum_i (N dL/dh_i) dh_i/dw

`Gather` brings the N and a mean over the processes the rest: FSDP's of the layers, a hook's of what is whole and works
on a share (embedding, last norm, adapters). Heads are whole, see the whole batch, and have equal gradients everywhere,
which is why a mean is right for a tied embedding as well.

reward, sft, plus and coarse are shared; process 0 does the other stages alone while the others wait. It alone writes,
prints and calls functions of the user's. Folders and checkpoints are those of one process, so that a run goes on with
another number of them. A process that ends before the others ends them all. `enter` is the way in: it replaces a few
names of the other modules, none of which knows.
"""

import contextlib
import functools
import os
import sys
import threading
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.experimental import implicit_replication

import checkpoint
import cpu
import generation
import model
import run
from weights import InputError, whole

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
SHARED = ("reward", "sft", "plus", "coarse")
LONG = timedelta(days=365)  # a process that waits for another is told when that dies: see `watch`
control = mesh = None  # a group on the CPU for what is no arithmetic; the processes as FSDP wants them


# ---------------------------------------------------------------- the trunk's share of the work


class Share:
    """Which process computes which row of a batch. All have `count` places; one that is left over computes row 0.

    5 rows, 2 processes: places (process, place) 00 01 02 10 11; 12 is left over. Of these keep rows 0 1 4: 00 01 10.
    """

    cache = None

    def __init__(self, rows, device):
        self.count, self.device = -(-rows // WORLD), device
        self.settle([divmod(row, self.count) for row in range(rows)])

    def settle(self, places):
        """Takes the (process, place) of every row."""
        at = {place: row for row, (process, place) in enumerate(places) if process == RANK}
        order = [process * self.count + place for process, place in places]
        self.places, self.gap = places, order != list(range(WORLD * self.count))
        self.mine = torch.tensor([at.get(place, 0) for place in range(self.count)], device=self.device)
        self.order = torch.tensor(order, device=self.device)

    def own(self, x):
        """x (B, ...) -> (count, ...), the rows of this process."""
        return x[self.mine]

    def all(self, own):
        """own (count, ...) of each process -> (B, ...)."""
        gathered = Gather.apply(own)
        return gathered.index_select(0, self.order) if self.gap else gathered


class SharedCache(Share):
    """A cache of this process's rows of a batch, of which rows are dropped as of a whole one."""

    def __init__(self, config, batch, columns, device, dtype, static):
        self.batch, self.device = batch, device
        self.cache = generation.Cache(config, -(-batch // WORLD), columns, device, dtype)
        self.reset()

    def reset(self):
        super().__init__(self.batch, self.device)
        self.cache.reset()
        self.rows, self.stays = self.batch, None

    def keep(self, rows):
        """A process with fewer of the rows than another goes on with its place 0 as well, so that all keep step."""
        kept = [self.places[row] for row in rows.tolist()]
        of_each = [[place for process, place in kept if process == i] for i in range(WORLD)]
        self.rows, self.count = len(kept), max(map(len, of_each))
        self.settle([(process, of_each[process].index(place)) for process, place in kept])
        mine = of_each[RANK] + [0] * (self.count - len(of_each[RANK]))
        self.cache.keep(torch.tensor(mine, device=self.device))


class Gather(torch.autograd.Function):
    """(count, ...) of each process -> (N count, ...), the same everywhere."""

    @staticmethod
    def forward(ctx, own):
        out = own.new_empty(WORLD * len(own), *own.shape[1:])
        dist.all_gather(list(out.chunk(WORLD)), own.contiguous())
        return out

    @staticmethod
    def backward(ctx, gradient):
        return gradient.chunk(WORLD)[RANK] * WORLD


class SharedTrunk(model.Trunk):
    """A trunk whose layers are spread over the processes. While it decodes it has them whole, if there is room."""

    decoding = None  # the trunk that has its layers whole

    def __init__(self, config):
        super().__init__(config)
        how = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
        for layer in self.layers:
            layer.self_attn.join = layer.mlp.join = lambda: None  # the matrix would be a whole copy
            fully_shard(layer, **how)
        self.hooked = set()
        fully_shard(self, **how, ignored_params={self.embed_tokens.weight, self.norm.weight})

    def forward(self, tokens, mask=None, cache=None):
        """As a whole trunk's."""
        share = cache or Share(len(tokens), tokens.device)
        if cache and cache.stays is None:
            cache.stays = self.fits()
        self.gather(bool(cache) and cache.stays)
        self.average()
        masked = None if mask is None else share.own(mask)
        return share.all(super().forward(share.own(tokens), masked, share.cache))

    def fits(self):
        """Whether every process has room for all layers."""
        if self.norm.weight.device.type == "cpu" or SharedTrunk.decoding is self:
            return True
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        needed = sum(p.nbytes for p in self.layers.parameters())
        return not most(int(needed > (torch.cuda.mem_get_info()[0] + unused) / 2))

    def gather(self, stays):
        """Whether the layers stay whole after this forward pass; those of a trunk that has decoded are dropped."""
        before = SharedTrunk.decoding
        if before and (before is not self or not stays):
            before.set_reshard_after_forward(True)
            for layer in before.layers:
                layer.reshard()
        if stays and before is not self:
            self.set_reshard_after_forward(False)
        SharedTrunk.decoding = self if stays else None

    def average(self):
        """Sees to the gradients of what is whole and works on a share of the rows."""
        adapter = self.on[0]
        for p in (self.embed_tokens.weight, self.norm.weight, *(adapter.parameters() if adapter else ())):
            if p.requires_grad and p not in self.hooked:
                p.register_hook(mean)
                self.hooked.add(p)


def mean(gradient):
    total = gradient.to(torch.float32, copy=True)
    dist.all_reduce(total)
    return (total / WORLD).to(gradient.dtype)


def sample(*args, draw=generation.sample):
    """Process 0's draw, so that no rounding can lead two processes to different texts."""
    ids, logprobs = draw(*args)
    ids = ids.contiguous()
    dist.broadcast(ids, 0)
    return ids, logprobs


# ---------------------------------------------------------------- one run folder


class SharedRun(run.Run):
    """A run whose folder process 0 alone writes; the others wait, or hand over their parts of what it writes."""

    def start(self):
        self.wait()  # by now all have seen what the folder held before
        self.first(super().start)
        self.wait()

    def log(self, name, row):
        self.first(super().log, name, row)

    def agreed(self, number):
        return most(number) if self.shared else number

    def save_checkpoint(self, trainer):
        self.first(super().save_checkpoint, trainer)
        if RANK:
            checkpoint.pack(trainer.state(), Nowhere())
        self.wait()

    def save(self, trained, tokenizer):
        self.first(super().save, trained, tokenizer)
        if RANK:
            trained.save_pretrained(self.target)
        self.wait()

    @property
    def shared(self):
        return self.stage in SHARED

    def wait(self):
        if self.shared:
            dist.barrier(control)

    def first(self, act, *args):
        if RANK == 0:
            act(*args)


class Nowhere(dict):
    """Takes tensors and keeps none."""

    def __setitem__(self, name, tensor):
        pass


def hand_over(folder, config, tensors, files=()):
    """What the others do while process 0 is in `weights.save_folder`."""
    for _, tensor in tensors:
        whole(tensor)


def most(number):
    """The largest of the processes' numbers."""
    number = torch.tensor(number)
    dist.all_reduce(number, dist.ReduceOp.MAX, group=control)
    return int(number)


# ---------------------------------------------------------------- beginning and end


def enter(recipe):
    """Makes this process one of several at the work of `recipe`, the module c2f."""
    error = os.dup(2)
    if RANK:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        recipe.Parser.exit = leave
        run.Lock.take = lambda *_: None
        model.save_folder = hand_over
    recipe.Run = SharedRun
    recipe.DO = {stage: functools.partial(in_turn, recipe, work) for stage, work in recipe.DO.items()}
    recipe.run_stages = functools.partial(together, recipe, recipe.run_stages, error)


def leave(self, status=0, message=None):
    """Process 0 says what is wrong with the options, and its end is everybody's."""
    time.sleep(60 if status else 0)
    sys.exit(status)


def in_turn(recipe, work, stage):
    """A stage of all processes, or of process 0 alone."""
    decoder = generation.Decoder
    if not stage.shared:
        dist.barrier(control)
        if RANK == 0:
            work(stage)
        dist.barrier(control)
        return
    with (
        implicit_replication(),  # beside the parts of a weight, any other tensor is the same everywhere
        replaced(model, Trunk=SharedTrunk),
        replaced(decoder, CACHE=SharedCache, RECORDS=()),
        replaced(generation, sample=sample),
        replaced(cpu, MOST=0),  # packed, the layers would be whole
        replaced(recipe, imported=functools.partial(imported, recipe.imported)),
    ):
        work(stage)


@contextlib.contextmanager
def replaced(owner, **new):
    before = {name: getattr(owner, name) for name in new}
    try:
        for name, value in new.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def imported(really, name, flag):
    """A function of the user's: process 0 has it, and calls it for all."""
    function = really(name, flag) if RANK == 0 else None

    def call(texts):
        scores = [torch.as_tensor(function(texts), dtype=torch.float32).cpu() if RANK == 0 else None]
        dist.broadcast_object_list(scores, 0, group=control)
        return scores[0]

    return call


def together(recipe, work, error, given, *args):
    """`work`, with one line for all where it fails, said by the process that failed first."""
    store, watched = join(given)
    say = functools.partial(say_once, store, error)
    watcher = threading.Thread(target=watch, args=(watched, say), daemon=True)
    watcher.start()
    try:
        work(given, *args)
        dist.barrier(control)
    except (Exception, KeyboardInterrupt) as e:
        time.sleep(1)  # it may be the echo of another's end, which is then said first
        status, line = recipe.explain(e)
        say(traceback.format_exc() if given.get("debug") and not isinstance(e, run.Stopped) else line)
        goodbye(watched, 1)
        end(status)
    goodbye(watched, 0)
    watcher.join()
    dist.destroy_process_group()


def join(given):
    """Makes the process groups. Returns (store, the group of `watch`)."""
    global control, mesh
    device, local = given.get("device") or "cuda", int(os.environ["LOCAL_RANK"])
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device: {device} given; under torchrun it is cpu, or cuda for a GPU a process")
    if device == "cuda" and torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise InputError(f"torchrun --nproc-per-node: {torch.cuda.device_count()} GPUs are there, one a process")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = "cpu", "gloo"
    store, *_ = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD)
    control, watched = (dist.new_group(backend="gloo", timeout=LONG) for _ in range(2))
    mesh = init_device_mesh(device, (WORLD,))
    return store, watched


def watch(group, say):
    """Waits, in a thread, for the goodbye of the next process in the ring. Where it dies without, says so and ends this
    one; torchrun ends the rest."""
    other, word = (RANK + 1) % WORLD, torch.zeros(1)
    try:
        dist.recv(word, other, group=group)
    except RuntimeError:
        say(f"process {other} of {WORLD} died (killed, or out of memory); the same command with --resume goes on from "
            "the last checkpoint")  # fmt: skip
        end(1)
    if word:
        time.sleep(10)  # a failure that was said; time to end by oneself
        end(1)


def end(status):
    """Without tidying up, in which the others would have to take part."""
    sys.stdout.flush()
    os._exit(status)


def goodbye(group, failed):
    with contextlib.suppress(RuntimeError):
        dist.send(torch.full((1,), float(failed)), (RANK - 1) % WORLD, group=group)


def say_once(store, error, line):
    """Writes the line where no process has yet written one; returns when it is written."""
    with contextlib.suppress(RuntimeError):  # torchrun, which has the store, is gone
        if store.add("said", 1) == 1:
            os.write(error, f"c2f.py: {line}\n".encode())
            store.set("written", "")
        else:
            store.wait(["written"], timedelta(seconds=5))
