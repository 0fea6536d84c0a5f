"""dpo.py: direct preference optimisation. The model learns from pairs of answers which one is preferred.

    python dpo.py --model run/sft --data run/preferences.jsonl --out run/dpo

No reward model and no sampling: the reward is implied. It is beta times the log of how much likelier the
model makes an answer than the model it started from, the reference. The loss asks that the chosen answer's
reward be higher than the rejected one's. The reference never changes: its log-probabilities are computed
once, before the first step.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F

from model import (Metrics, Ranks, Stepper, StopSignal, accumulate, autocast, branches, choose_dtype,
                   export_best, fingerprint, finish_run, keep_best, learning_rate, load_folder, load_state,
                   make_optimizer, open_run, pad_rows, parallelize, process_group, reshard,
                   save_chat_folder, save_state, say, stopped_early, unsharded)
from tokenizer import (InputError, encode_answer, held_out, jsonl_files, name_of, one_line_errors, option,
                       parse_options, read_jsonl, reasons, record_ranking)


@dataclass(kw_only=True)
class Options:
    """Fine-tune a model on preferences: JSONL with `prompt` and either `chosen` and `rejected`, or
    `completions` and `ranks`.
    """

    model: str = option("checkpoint folder to start from; it is the reference too")
    data: list[str] = option("JSONL files, or folders of them")
    out: str = option("checkpoint folder to write")
    valid: str = option("JSONL file to validate on; not given, 5 % of the prompts are held out by hash", "")
    max_length: int = option("tokens of prompt and answer; longer answers are left out, and counted",
                             256, at_least=1)
    pairs_per_prompt: int = option("pairs that a ranking gives: a best answer, and one ranked lower",
                                   1, at_least=1)
    beta: float = option("how strongly the model is held to the reference", 0.1, at_least=0)
    sft_weight: float = option("weight of the chosen answer's negative log-likelihood a token",
                               0.2, at_least=0)
    epochs: int = option("passes over the data", 1, at_least=1)
    batch_size: int = option("pairs a step, over all ranks", 32, at_least=1)
    micro_batch: int = option("answers a forward pass, on one rank; 0 takes the rank's whole share at once",
                              0, at_least=0)
    lr: float = option("peak learning rate", 1e-4, at_least=0)
    schedule: str = option("how the learning rate falls after warmup", "cosine",
                           choices=("cosine", "linear", "wsd"))
    warmup: int = option("steps of linear warmup", 10, at_least=0)
    weight_decay: float = option("decay of matrices (norms have none)", 0.0, at_least=0)
    clip: float = option("largest global norm of the gradient; 0 is off", 1.0, at_least=0)
    skip_bad: bool = option("count malformed lines and go on, instead of stopping at the first", False)
    eval_every: int = option("steps between validations; the last step always has one", 50, at_least=1)
    patience: int = option("stop after this many validations without a new best, and keep the best; 0 is off",
                           0, at_least=0)
    save_every: int = option("steps between saved states", 50, at_least=1)
    seed: int = option("seed of the order of pairs and of their choice from rankings", 1, at_least=0)
    dtype: str = option("precision of matrix products; auto probes what is faster here", "auto",
                        choices=("auto", "fp32", "bf16", "fp16"))
    device: str = option("auto, cpu, cuda or mps", "auto")
    parallel: str = option("ddp: a rank has all; fsdp: a share of the model", "ddp", choices=("ddp", "fsdp"))
    offload: bool = option("with fsdp: weights and optimizer wait in the CPU's memory", False)
    checkpointing: bool = option("compute blocks again in the backward pass instead of keeping them", False)
    resume: bool = option("go on where the run in --out stopped", False)
    overwrite: bool = option("start again, whatever is in --out", False)


@dataclass
class Answer:
    """A prompt and one answer: their ids (n,), which of them are targets (n,), and whether it says a word."""

    ids: np.ndarray
    trained: np.ndarray
    spoken: bool


@dataclass
class Pair:
    chosen: Answer
    rejected: Answer


# ---------------------------------------------------------------------------------------------------------
# Data: JSONL -> rankings -> pairs -> tensors


def draw_pairs(answers, ranks, count, seed, name):
    """Pairs of a ranking, by seed and prompt only: a best answer, and `count` different ones ranked lower.

    All pairs have one chosen answer, so that the model is not pulled to several at once; ties make no pair.
    Nor does silence where it is the best: nobody would learn to say it.
    """
    random, best = Random(f"pairs {seed} {name}"), min(ranks, default=1)
    spoken = [a for a, rank in zip(answers, ranks) if rank == best and a.spoken]
    if not spoken:
        return []
    chosen = random.choice(spoken)
    lower = [a for a, rank in zip(answers, ranks) if rank > best]
    return [Pair(chosen, rejected) for rejected in random.sample(lower, min(count, len(lower)))]


def read_pairs(files, tokenizer, options, counts):
    """All pairs as (held out?, Pair). Counts what is bad, too long, or without a pair."""
    pairs = []
    for file in files:
        for number, record in read_jsonl(file, counts if options.skip_bad else None):
            try:
                prompt, answers, ranks = record_ranking(record)
                answers = [Answer(*map(np.array, encode_answer(tokenizer, prompt, answer)),
                                  spoken=bool(answer[-1]["content"].strip())) for answer in answers]
            except InputError as error:
                if not options.skip_bad:
                    place = f"{file}:{number}"
                    raise InputError(f"{place}: {error} (--skip-bad goes on without such lines)") from None
                counts["bad"] += 1
                continue
            short = [(a, rank) for a, rank in zip(answers, ranks) if len(a.ids) <= options.max_length]
            counts["too_long"] += len(answers) - len(short)
            kept, their_ranks = [a for a, _ in short], [rank for _, rank in short]
            drawn = draw_pairs(kept, their_ranks, options.pairs_per_prompt, options.seed, name_of(prompt))
            counts["no_pair"] += not drawn
            pairs += [(held_out(prompt), pair) for pair in drawn]
    return pairs


def split_pairs(options, tokenizer, counts):
    """(training, validation) pairs: --valid FILE, else the 5 % of the prompts with the smallest hashes."""
    pairs = read_pairs(jsonl_files(options.data), tokenizer, options, counts)
    if options.valid:
        valid = read_pairs(jsonl_files([options.valid]), tokenizer, options, counts)
        train, valid = [p for _, p in pairs], [p for _, p in valid]
    else:
        train, valid = [p for held, p in pairs if not held], [p for held, p in pairs if held]
    if not train:
        raise InputError(f"{' '.join(options.data)}: no pair left to train on ({reasons(counts)})")
    if options.valid and not valid:
        raise InputError(f"{options.valid}: no pair left to validate on")
    return train, valid or train[:1]


def collate(pairs, pad):
    """Pairs, one a row -> ids, positions, documents, targets (P, T). No pair (None) is a row of padding.

    A row is the prompt but for its last token, which both answers begin with, since what follows it differs:
    then document 1 with the chosen answer and document 2 with the rejected one, see `branches`. A target is a
    token's next one where that is trained, else -1.
    """
    rows = []
    for pair in pairs:
        if pair is None:
            rows.append(np.array([[pad], [0], [0], [-1]]))
            continue
        answers, head = (pair.chosen, pair.rejected), int(np.argmax(pair.chosen.trained)) - 1
        targets = [np.append(np.where(a.trained, a.ids, -1)[head + 1 :], -1) for a in answers]
        row = branches([a.ids for a in answers], head)
        rows.append([*row, np.concatenate([np.full(head, -1), *targets])])
    return pad_rows(rows, (pad, 0, 0, -1))


def epoch_steps(options, count, epoch):
    """The steps of an epoch, each a list of numbers of pairs, in the epoch's own order."""
    order = np.random.default_rng([options.seed, epoch]).permutation(count).tolist()
    return [order[i : i + options.batch_size] for i in range(0, count, options.batch_size)]


def step_batches(options, pairs, numbers, pad, ranks):
    """This rank's micro-batches of a step: (numbers of its pairs (P,), and what `collate` gives of them).

    Where the pairs do not divide over the ranks, the number -1 fills up: a pair that counts nothing. Pairs of
    like length stand together, which leaves little padding.
    """
    numbers = ranks.rows(numbers + [-1] * (-len(numbers) % ranks.world_size))
    numbers.sort(key=lambda i: len(pairs[i].chosen.ids) + len(pairs[i].rejected.ids) if i >= 0 else 0)
    size = max(1, options.micro_batch // 2) if options.micro_batch else len(numbers)
    parts = [numbers[i : i + size] for i in range(0, len(numbers), size)]
    return [(torch.tensor(part), *collate([pairs[i] if i >= 0 else None for i in part], pad))
            for part in parts]


# ---------------------------------------------------------------------------------------------------------
# Training


def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta):
    """-log sigmoid of the margin between two implied rewards (Rafailov et al. 2023, eq. 7).

    All four: (P,), log-probability of a whole answer, in nats. Returns losses and both rewards, (P,) each.
    """
    reward_chosen = beta * (chosen - reference_chosen)
    reward_rejected = beta * (rejected - reference_rejected)
    return -F.logsigmoid(reward_chosen - reward_rejected), reward_chosen, reward_rejected


def answer_logprobs(model, ids, positions, documents, targets, context):
    """log pi(answer | prompt), the sum over an answer's tokens: (P, T) each -> (2, P), in nats.

    Row 0 are the chosen answers, row 1 the rejected ones; what is not trained adds 0.
    """
    with context():
        logprobs = model(ids, positions, documents, targets=targets)  # (P, T)
    return torch.stack([(logprobs * (documents == answer)).sum(-1) for answer in (1, 2)])


def batch_loss(model, batch, references, options, ranks, context):
    """A micro-batch's loss, summed over its pairs, and what is reported: sums over its pairs as well, (6,).

    references: (pairs + 1, 2), the last row is that of -1. Loss of a pair: eq. 7 plus --sft-weight times the
    chosen answer's negative log-likelihood a token (Pang et al. 2024, eq. 1-2), against a chosen answer that
    gets less likely as long as the rejected one falls faster.
    """
    numbers, *rows = (x.to(ranks.device) for x in batch)  # (P,), and (P, T) each
    real = (numbers >= 0).float()  # (P,)
    chosen, rejected = answer_logprobs(model, *rows, context)  # (P,) each
    reference = references[numbers].T  # (2, P)
    preference, reward_chosen, reward_rejected = dpo_loss(chosen, rejected, *reference, options.beta)
    *_, documents, targets = rows
    length = ((targets >= 0) & (documents == 1)).sum(-1).clamp(min=1)  # (P,): tokens of the chosen answer
    nll = -chosen / length
    loss = preference + options.sft_weight * nll
    right = 0.5 * (1 + torch.sign(reward_chosen - reward_rejected))  # equal rewards are half right
    values = torch.stack([loss, preference, nll, reward_chosen, reward_rejected, right]) * real  # (6, P)
    return values[0].sum(), values.detach().sum(1)


NAMES = ("loss", "dpo_loss", "sft_loss", "reward_chosen", "reward_rejected", "accuracy")


def means(values, pairs):
    """{metric: its mean over pairs} from the sums that `batch_loss` gives."""
    named = {name: value / max(pairs, 1) for name, value in zip(NAMES, values)}
    return named | {"margin": named["reward_chosen"] - named["reward_rejected"]}


def train_step(model, batches, references, options, ranks, context, scale):
    """Gradients (times `scale`) of one step; returns ({metric: mean over its pairs}, tokens), over all ranks.

    A mean over the pairs of all ranks and micro-batches, whatever the split. DDP averages gradients over
    ranks, so each rank's share is multiplied by their number.
    """
    pairs, tokens = ranks.sum(sum((batch[0] >= 0).sum().item() for batch in batches),
                              sum((batch[-1] >= 0).sum().item() for batch in batches))
    totals = [0.0] * len(NAMES)
    for number, batch in enumerate(batches):
        with accumulate(model, number, batches):
            loss, values = batch_loss(model, batch, references, options, ranks, context)
            (loss / max(pairs, 1) * ranks.world_size * scale).backward()
        totals = [a + b for a, b in zip(totals, values.tolist())]
    return means(ranks.sum(*totals), pairs), int(tokens)


@torch.no_grad()
def reference_logprobs(model, steps, count, ranks, context):
    """Log-probabilities of `count` pairs' answers under the model as it is now: (count + 1, 2), last row 0.

    steps: this rank's micro-batches of an epoch. They are those that training begins with, not just the same
    pairs: in other shapes sums round otherwise, and the first loss would not be log 2 to the last bit.
    """
    references = torch.zeros(count + 1, 2)
    for batches in steps:
        for numbers, *rows in batches:
            sums = answer_logprobs(model, *(x.to(ranks.device) for x in rows), context)  # (2, P)
            references[numbers] = sums.T.float().cpu()
    reshard(model)
    references[-1] = 0.0
    gathered = ranks.sum(*references.flatten().tolist())  # each rank has its own rows, and 0 in the others
    return torch.tensor(gathered, dtype=torch.float32).view(-1, 2).to(ranks.device)


@torch.no_grad()
def validate(model, references, batches, options, ranks, context):
    """{metric: mean over the validation pairs}; every rank goes through all of them."""
    totals, pairs = [0.0] * len(NAMES), len(references) - 1
    for batch in batches:
        _, values = batch_loss(model, batch, references, options, ranks, context)
        totals = [a + b for a, b in zip(totals, values.tolist())]
    reshard(model)
    return means(totals, pairs)


def all_references(options, model, steps, train_set, valid_set, pad, ranks, context):
    """Reference log-probabilities of both sets, (pairs + 1, 2) each, and the validation's micro-batches."""
    epoch = steps[: -(-len(train_set) // options.batch_size)]
    batches = (step_batches(options, train_set, numbers, pad, ranks) for numbers in epoch)
    references = reference_logprobs(model, batches, len(train_set), ranks, context)
    alone, numbers, size = Ranks(0, 1, ranks.device), list(range(len(valid_set))), options.batch_size
    valid_batches = [batch for i in range(0, len(numbers), size)
                     for batch in step_batches(options, valid_set, numbers[i : i + size], pad, alone)]
    valid_references = reference_logprobs(model, [valid_batches], len(valid_set), alone, context)
    return references, valid_references, valid_batches


def train(options, ranks):
    """The whole run; returns the exit status."""
    check_options(options, ranks)
    model, tokenizer = load_folder(options.model)
    longest = model.config.max_position_embeddings
    if options.max_length > longest:
        raise InputError(f"--max-length {options.max_length} is beyond the model's {longest}")
    counts = {"bad": 0, "too_long": 0, "no_pair": 0}
    train_set, valid_set = split_pairs(options, tokenizer, counts)
    files = jsonl_files(options.data + ([options.valid] if options.valid else []))
    weights = Path(options.model).glob("*.safetensors")
    run, state = open_run("dpo", options, ranks, {"model": fingerprint(weights), "data": fingerprint(files)})

    dtype, pad = choose_dtype(options, ranks, run), tokenizer.pad or 0
    parallel = parallelize(model, ranks, options.parallel, dtype, options.offload, options.checkpointing)

    def context():
        return autocast(ranks.device, dtype)

    steps = [s for epoch in range(options.epochs) for s in epoch_steps(options, len(train_set), epoch)]
    say(ranks, f"{len(train_set):,} pairs, {len(valid_set):,} to validate on; left out: {counts['bad']} bad, "
               f"{counts['too_long']} answers too long, {counts['no_pair']} prompts without a pair")
    if valid_set[0] is train_set[0]:
        say(ranks, "none of them is held out, so one is validated on that is trained on: see --valid")
    references, *validation = all_references(options, model, steps, train_set, valid_set, pad, ranks, context)
    optimizer = make_optimizer(model, options.lr, options.weight_decay, betas=(0.9, 0.95))
    stepper = Stepper(optimizer, dtype, options.clip)
    record = {"step": 0, "tokens": 0, "best": math.inf, "worse": 0, "seconds": 0.0}
    if state:
        record = load_state(state, {"model": (model, stepper)})

    def gradients(step):
        batches = step_batches(options, train_set, steps[step], pad, ranks)
        return train_step(parallel, batches, references, options, ranks, context, stepper.scale)

    if ranks.world_size > 1:  # DDP lays out its buckets by the first backward pass, a resumed run's as well
        gradients(0)
        model.zero_grad(set_to_none=True)
    done, earlier = record["step"], record["seconds"]
    metrics, signal, began = Metrics(options.out, ranks, done, len(steps)), StopSignal(), time.monotonic()
    early = stopped_early(options, ranks, record)
    for step in range(done, 0 if early else len(steps)):
        step_began = time.monotonic()
        lr = learning_rate(step, len(steps), options.lr, options.warmup, options.schedule)
        figures, tokens = gradients(step)
        norm = stepper.step(lr)
        now = time.monotonic()
        record |= {"step": step + 1, "tokens": record["tokens"] + tokens, "seconds": earlier + now - began}
        metrics.write(step + 1, **figures, lr=lr, grad_norm=norm, tokens=record["tokens"],
                      tokens_per_second=tokens / (now - step_began), seconds=record["seconds"],
                      skipped=stepper.skipped)
        last = step + 1 == len(steps)
        if last or (step + 1) % options.eval_every == 0:
            found = validate(model, *validation, options, ranks, context)
            metrics.write(step + 1, **{f"valid_{name}": value for name, value in found.items()})
            keep_best(options, ranks, record, found["loss"], model)
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
    plain = unsharded(model, ranks)
    return finish_run(options, ranks, run | {"left_out": counts}, record,
                      lambda: save_chat_folder(options.out, plain, tokenizer))


def check_options(options, ranks):
    """Refuse what cannot work before anything is read or written."""
    if options.offload and (options.parallel == "ddp" or ranks.world_size == 1):
        raise InputError("--offload needs --parallel fsdp, and torchrun with two processes or more")
    if Path(options.model).resolve() == Path(options.out).resolve():
        raise InputError(f"--out {options.out} is the --model it starts from; choose another --out")


@one_line_errors
def main(argv=None):
    options = parse_options(Options, argv, "dpo.py")
    with process_group(options.device) as ranks:
        return train(options, ranks)


if __name__ == "__main__":
    sys.exit(main())
