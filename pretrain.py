"""pretrain.py: causal language modelling. A decoder learns to predict each next token of a corpus.

    python pretrain.py --tokenizer run/tokenizer --data run/tokens --out run/base
    torchrun --nproc-per-node 2 pretrain.py ...           # the same, on two processes

For each step: take the windows of the step, predict every token from those before it in its document
(teacher forcing: the true tokens are the context, whatever the model would have said), and step down the
gradient of the mean negative log-likelihood. Validation in bits per byte, which no tokenizer can flatter.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from model import (CausalLM, Config, Metrics, Stepper, StopSignal, accumulate, autocast, bits_per_byte,
                   choose_compile, choose_dtype, export_best, fingerprint, finish_run, keep_best,
                   learning_rate, load_state, make_optimizer, open_run, process_group, save_folder,
                   save_state, say, window_batch, wrap_ddp)
from tokenizer import InputError, Tokenizer, one_line_errors, option, parse_options, read_tokens


@dataclass(kw_only=True)
class Options:
    """Train a decoder from nothing on a folder of tokens."""

    tokenizer: str = option("folder of the tokenizer")
    data: str = option("folder of tokens, written by `tokenizer.py encode`")
    out: str = option("checkpoint folder to write")
    hidden_size: int = option("width of the residual stream", 256, at_least=1)
    num_hidden_layers: int = option("number of blocks", 4, at_least=1)
    num_attention_heads: int = option("query heads", 4, at_least=1)
    num_key_value_heads: int = option(
        "key and value heads; fewer than query heads is grouped-query attention", 4, at_least=1)
    intermediate_size: int = option("width inside the MLP", 704, at_least=1)
    rope_theta: float = option("base of the rotary frequencies", 10000.0, at_least=1)
    max_length: int = option("tokens in a window", 256, at_least=1)
    steps: int = option("optimizer steps", 1000, at_least=1)
    batch_size: int = option("windows a step, over all ranks", 16, at_least=1)
    micro_batch: int = option("windows a forward pass, on one rank; 0 takes the rank's whole share at once",
                              0, at_least=0)
    lr: float = option("peak learning rate", 3e-3, at_least=0)
    schedule: str = option("how the learning rate falls after warmup", "cosine",
                           choices=("cosine", "linear", "wsd"))
    warmup: int = option("steps of linear warmup", 50, at_least=0)
    weight_decay: float = option("decay of matrices (norms have none)", 0.1, at_least=0)
    clip: float = option("largest global norm of the gradient; 0 is off", 1.0, at_least=0)
    eval_every: int = option("steps between validations; the last step always has one", 250, at_least=1)
    eval_windows: int = option("validation windows of each source; 0 takes all", 32, at_least=0)
    patience: int = option("stop after this many validations without a new best, and keep the best; 0 is off",
                           0, at_least=0)
    save_every: int = option("steps between saved states", 250, at_least=1)
    seed: int = option("seed of the weights and of the order of windows", 1, at_least=0)
    dtype: str = option("precision of matrix products; auto probes what is faster here", "auto",
                        choices=("auto", "fp32", "bf16", "fp16"))
    compile: bool | None = option("use torch.compile; not given, it is used where it repays itself", None)
    device: str = option("auto, cpu, cuda or mps", "auto")
    resume: bool = option("go on where the run in --out stopped", False)
    overwrite: bool = option("start again, whatever is in --out", False)


class Windows:
    """All training windows of a folder of tokens, in an endless order that is a pure function of the seed."""

    def __init__(self, shards, max_length, endoftext, seed):
        self.shards, self.max_length, self.endoftext, self.seed = shards, max_length, endoftext, seed
        counts = [-(-len(shard.tokens) // max_length) for shard in shards]
        self.first = np.cumsum([0] + counts)  # the number of each shard's first window; the last is the total
        self.order = {}

    def __len__(self):
        return int(self.first[-1])

    def rows(self, step, batch_size):
        """Numbers of the windows of a step: every epoch has every window once, in an order of its own."""
        numbers = []
        for i in range(step * batch_size, (step + 1) * batch_size):
            epoch, place = divmod(i, len(self))
            if epoch not in self.order:
                self.order = {epoch: np.random.default_rng([self.seed, epoch]).permutation(len(self))}
            numbers.append(int(self.order[epoch][place]))
        return numbers

    def batch(self, numbers):
        """ids, positions, documents, targets of windows, each a tensor (B, T)."""
        parts = []
        for number in numbers:
            shard = int(np.searchsorted(self.first, number, side="right")) - 1
            window = number - int(self.first[shard])
            parts.append(window_batch(self.shards[shard].tokens, [window], self.max_length, self.endoftext))
        return [torch.from_numpy(np.concatenate(part)) for part in zip(*parts)]


def micro_batches(rows, micro_batch):
    size = micro_batch or len(rows)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def next_token_loss(logprobs, tokens):
    """Negative log-likelihood in nats a token: -sum log p(x_t | x_<t) / tokens (Bengio et al. 2003, eq. 1).

    logprobs: (B, T), 0 where nothing is predicted; tokens: the trained ones of the whole step, over all ranks
    and micro-batches, so that the gradient is the same however the step is split. None trained gives 0.
    """
    return -logprobs.sum() / max(tokens, 1)


def train_step(model, batches, ranks, context, scale):
    """Gradients (times `scale`) of one step; returns (loss in nats a token, trained tokens), over all ranks.

    DDP averages gradients over ranks, so each rank's share is multiplied by their number.
    """
    tokens = int(ranks.sum(sum((batch[3] >= 0).sum().item() for batch in batches))[0])
    total = 0.0
    for number, batch in enumerate(batches):
        ids, positions, documents, targets = (x.to(ranks.device) for x in batch)  # (B, T) each
        with accumulate(model, number, batches):
            with context():
                logprobs = model(ids, positions, documents, targets=targets)  # (B, T)
            loss = next_token_loss(logprobs, tokens)
            (loss * ranks.world_size * scale).backward()
        total += loss.item()
    return ranks.sum(total)[0], tokens


def validate(model, tokenizer, shards, options, context):
    """{language: bits per byte} of the validation windows, and their mean over languages."""
    with context(), torch.compiler.set_stance("force_eager"):
        bits = bits_per_byte(model, tokenizer, shards, options.max_length, options.batch_size,
                             options.eval_windows or None)
    return bits, sum(bits.values()) / len(bits)


def build_model(options, tokenizer):
    """A decoder of the asked shape with seeded weights; InputError where the shape does not work out."""
    heads, kv_heads = options.num_attention_heads, options.num_key_value_heads
    if options.hidden_size % heads or options.hidden_size // heads % 2:
        raise InputError(f"--hidden-size {options.hidden_size} must be an even multiple of {heads} "
                         "attention heads")
    if heads % kv_heads:
        raise InputError(f"--num-attention-heads {heads} must be a multiple of "
                         f"--num-key-value-heads {kv_heads}")
    config = Config(
        vocab_size=tokenizer.vocab_size, hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size, num_hidden_layers=options.num_hidden_layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=options.hidden_size // heads, max_position_embeddings=options.max_length,
        rope_theta=options.rope_theta, tie_word_embeddings=True)
    return CausalLM(config).init_weights(options.seed)


def train(options, ranks):
    """The whole run; returns the exit status."""
    tokenizer = Tokenizer.load(options.tokenizer)
    shards = {split: read_tokens(options.data, split, tokenizer) for split in ("train", "valid")}
    check_batch(options, ranks)
    inputs = {"data": fingerprint([Path(options.data) / "index.json"]), "tokenizer": tokenizer.hash}
    run, state = open_run("pretrain", options, ranks, inputs)

    model = build_model(options, tokenizer).to(ranks.device)
    windows = Windows(shards["train"], options.max_length, tokenizer.endoftext, options.seed)
    dtype = choose_dtype(options, ranks, run)
    optimizer = make_optimizer(model, options.lr, options.weight_decay, betas=(0.9, 0.95))
    stepper = Stepper(optimizer, dtype, options.clip)
    record = {"step": 0, "tokens": 0, "best": math.inf, "worse": 0, "seconds": 0.0}
    if state:
        record = load_state(state, {"model": (model, stepper)})
    parameters = sum(p.numel() for p in model.parameters())
    epochs = options.steps * options.batch_size / len(windows)
    say(ranks, f"{parameters:,} parameters, {len(windows):,} windows, {epochs:.1f} epochs, "
               f"{ranks.world_size} x {ranks.device}")

    parallel = wrap_ddp(model, ranks)

    def context():
        return autocast(ranks.device, dtype)

    def gradients(step):
        rows = ranks.rows(windows.rows(step, options.batch_size))
        batches = [windows.batch(part) for part in micro_batches(rows, options.micro_batch)]
        return train_step(parallel, batches, ranks, context, stepper.scale)

    done, earlier = record["step"], record["seconds"]
    choose_compile(options, ranks, run, model, lambda: gradients(done), options.steps - done)
    metrics, signal, began = Metrics(options.out, ranks, done, options.steps), StopSignal(), time.monotonic()
    early = 0 < options.patience <= record["worse"]  # it had stopped early, and was killed before its end
    for step in range(done, 0 if early else options.steps):
        step_began = time.monotonic()
        lr = learning_rate(step, options.steps, options.lr, options.warmup, options.schedule)
        loss, tokens = gradients(step)
        norm = stepper.step(lr)
        now = time.monotonic()
        record |= {"step": step + 1, "tokens": record["tokens"] + tokens, "seconds": earlier + now - began}
        metrics.write(step + 1, loss=loss, lr=lr, grad_norm=norm, tokens=record["tokens"],
                      tokens_per_second=tokens / (now - step_began), seconds=record["seconds"],
                      skipped=stepper.skipped)
        last = step + 1 == options.steps
        if last or (step + 1) % options.eval_every == 0:
            bits, mean = validate(model, tokenizer, shards["valid"], options, context)
            metrics.write(step + 1, valid_loss=mean, bits_per_byte=bits)
            keep_best(options, ranks, record, mean, model)
            last = last or 0 < options.patience <= record["worse"]
        stop = signal.agreed(ranks)
        if last or stop or (step + 1) % options.save_every == 0:
            save_state(options.out, record, ranks, {"model": (model, stepper)})
        if last:
            break
        if stop:
            metrics.close()
            say(ranks, f"stopped after step {step + 1}; go on with the same command and --resume")
            return 130
    metrics.close()
    export_best(options, ranks, model)
    return finish_run(options, ranks, run, record, lambda: save_folder(options.out, model, tokenizer))


def check_batch(options, ranks):
    """The step's rows must divide over ranks."""
    if options.batch_size % ranks.world_size:
        raise InputError(f"--batch-size {options.batch_size} does not divide over "
                         f"{ranks.world_size} processes")


@one_line_errors
def main(argv=None):
    options = parse_options(Options, argv, "pretrain.py")
    with process_group(options.device) as ranks:
        return train(options, ranks)


if __name__ == "__main__":
    sys.exit(main())
