"""reward.py: the reward model. It learns from comparisons of answers how good an answer is: one number.

    python reward.py --model run/sft --data run/preferences.jsonl --out run/reward

The decoder of the fine-tuned model, with a head of one output instead of the vocabulary (Stiennon et al.
2020). The score is read at the dialogue's last token, its <|im_end|>: there the model has seen the whole
answer. Only differences between answers to one prompt are trained, so the zero of the scale means nothing.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from model import (Metrics, RewardModel, Stepper, StopSignal, accumulate, autocast, branches, choose_dtype,
                   export_best, fingerprint, finish_run, keep_best, learning_rate, load_folder, load_state,
                   make_optimizer, open_run, pad_rows, parallelize, process_group, reshard, save_folder,
                   save_state, say, stopped_early, unsharded)
from tokenizer import (InputError, encode_answer, held_out, jsonl_files, one_line_errors, option,
                       parse_options, read_jsonl, reasons, record_ranking, write_whole)


@dataclass(kw_only=True)
class Options:
    """Train a reward model on preferences: JSONL with `prompt` and either `chosen` and `rejected`, or
    `completions` and `ranks`.
    """

    model: str = option("checkpoint folder to start from")
    data: list[str] = option("JSONL files, or folders of them")
    out: str = option("checkpoint folder to write")
    valid: str = option("JSONL file to validate on; not given, 5 % of the prompts are held out by hash", "")
    max_length: int = option("tokens of prompt and answer; longer answers are left out, and counted",
                             256, at_least=1)
    epochs: int = option("passes over the data", 1, at_least=1)
    batch_size: int = option("prompts a step, over all ranks", 32, at_least=1)
    micro_batch: int = option("answers a forward pass, on one rank; 0 takes the rank's whole share at once",
                              0, at_least=0)
    lr: float = option("peak learning rate", 3e-4, at_least=0)
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
    seed: int = option("seed of the order of prompts and of the head", 1, at_least=0)
    dtype: str = option("precision of matrix products; auto probes what is faster here", "auto",
                        choices=("auto", "fp32", "bf16", "fp16"))
    device: str = option("auto, cpu, cuda or mps", "auto")
    parallel: str = option("ddp: a rank has all; fsdp: a share of the model", "ddp", choices=("ddp", "fsdp"))
    offload: bool = option("with fsdp: weights and optimizer wait in the CPU's memory", False)
    checkpointing: bool = option("compute blocks again in the backward pass instead of keeping them", False)
    resume: bool = option("go on where the run in --out stopped", False)
    overwrite: bool = option("start again, whatever is in --out", False)


@dataclass
class Ranking:
    """A prompt's answers: the ids of each whole dialogue (n,), its rank (1 is best), and what was read."""

    ids: list[np.ndarray]
    ranks: list[int]
    record: dict  # prompt, completions, meta


# ---------------------------------------------------------------------------------------------------------
# Data: JSONL -> rankings -> tensors


def read_rankings(files, tokenizer, options, counts):
    """All rankings as (held out?, Ranking). Counts what is bad, too long, or all tied."""
    rankings = []
    for file in files:
        for number, record in read_jsonl(file, counts if options.skip_bad else None):
            try:
                prompt, answers, ranks = record_ranking(record)
                encoded = [np.array(encode_answer(tokenizer, prompt, answer)[0]) for answer in answers]
            except InputError as error:
                if not options.skip_bad:
                    place = f"{file}:{number}"
                    raise InputError(f"{place}: {error} (--skip-bad goes on without such lines)") from None
                counts["bad"] += 1
                continue
            short = [i for i, ids in enumerate(encoded) if len(ids) <= options.max_length]
            counts["too_long"] += len(encoded) - len(short)
            if len({ranks[i] for i in short}) < 2:
                counts["no_pair"] += 1
                continue
            texts = [a[0]["content"] if len(a) == 1 else a for a in answers]
            kept = {"prompt": record["prompt"], "completions": [texts[i] for i in short],
                    "meta": record.get("meta", {})}
            ranking = Ranking([encoded[i] for i in short], [ranks[i] for i in short], kept)
            rankings.append((held_out(prompt), ranking))
    return rankings


def split_rankings(options, tokenizer, counts):
    """(training, validation) rankings: --valid FILE, else the 5 % of the prompts with the smallest hashes."""
    rankings = read_rankings(jsonl_files(options.data), tokenizer, options, counts)
    if options.valid:
        valid = read_rankings(jsonl_files([options.valid]), tokenizer, options, counts)
        train, valid = [r for _, r in rankings], [r for _, r in valid]
    else:
        train, valid = [r for held, r in rankings if not held], [r for held, r in rankings if held]
    if not train:
        raise InputError(f"{' '.join(options.data)}: no ranking left to train on ({reasons(counts)})")
    if options.valid and not valid:
        raise InputError(f"{options.valid}: no ranking left to validate on")
    return train, valid or train[:1]


def pair_indices(rankings):
    """All untied pairs of a batch's answers: better (P,), worse (P,), and each pair's weight (P,).

    The answers of all rankings are numbered through. A pair weighs 1 / the number of its prompt's pairs: a
    prompt counts once, however many answers it has.
    """
    better, worse, weight, first = [], [], [], 0
    for ranking in rankings:
        k = range(len(ranking.ranks))
        pairs = [(i, j) for i in k for j in k if ranking.ranks[i] < ranking.ranks[j]]
        better += [first + i for i, _ in pairs]
        worse += [first + j for _, j in pairs]
        weight += [1 / max(len(pairs), 1)] * len(pairs)
        first += len(k)
    return torch.tensor(better, dtype=torch.long), torch.tensor(worse, dtype=torch.long), torch.tensor(weight)


def shared_head(dialogues):
    """How many first tokens all of a prompt's dialogues have in common, fewer than any of them has."""
    n = min(map(len, dialogues)) - 1
    same = np.all([ids[:n] == dialogues[0][:n] for ids in dialogues], axis=0)  # (n,)
    return int(np.argmin(np.append(same, False)))


def collate(rankings, pad):
    """Rankings, one a row -> ids, positions, documents (B, T), and row and column of each answer's end (A,).

    A row holds what the dialogues begin with once, and behind it the rest of each: see `branches`.
    """
    heads = [shared_head(ranking.ids) for ranking in rankings]
    rows = [branches(ranking.ids, head) for ranking, head in zip(rankings, heads)]
    ends = [(b, head + end - 1) for b, (ranking, head) in enumerate(zip(rankings, heads))
            for end in np.cumsum([len(ids) - head for ids in ranking.ids])]
    padded = pad_rows(rows or [np.array([[pad], [0], [0]])], (pad, 0, 0))
    return [*padded, *torch.tensor(ends, dtype=torch.long).view(-1, 2).T]


def epoch_steps(options, count, epoch):
    """The steps of an epoch, each a list of numbers of rankings, in the epoch's own order."""
    order = np.random.default_rng([options.seed, epoch]).permutation(count).tolist()
    return [order[i : i + options.batch_size] for i in range(0, count, options.batch_size)]


def micro_batches(rankings, size):
    """Rankings cut into micro-batches of at most `size` answers (0: all at once); a prompt stays whole."""
    batches, rows = [[]], 0
    for ranking in rankings:
        if size and rows + len(ranking.ids) > size and batches[-1]:
            batches.append([])
            rows = 0
        batches[-1].append(ranking)
        rows += len(ranking.ids)
    return batches


def step_batches(options, rankings, numbers, ranks):
    """This rank's micro-batches of a step: every world_size-th prompt, so that shares differ by one at most.

    Each rank has as many micro-batches as any, or DDP would wait for ever: empty ones train nothing.
    """
    chosen = sorted((rankings[i] for i in numbers), key=lambda r: sum(map(len, r.ids)))  # little padding
    shares = [micro_batches(chosen[rank :: ranks.world_size], options.micro_batch)
              for rank in range(ranks.world_size)]
    own = shares[ranks.rank]
    return own + [[]] * (max(map(len, shares)) - len(own))


# ---------------------------------------------------------------------------------------------------------
# Training


def reward_loss(scores, better, worse, weight):
    """-log sigmoid(r_better - r_worse): the mean of a prompt's pairs, summed over prompts.

    Ouyang et al. 2022, eq. 1; the probability that one answer beats another is Bradley and Terry's (1952).
    scores (A,): one an answer. better, worse (P,): places in scores. weight (P,): 1 / pairs of the prompt. No
    pair gives 0.
    """
    return (-F.logsigmoid(scores[better] - scores[worse]) * weight).sum()


def answer_scores(model, ids, positions, documents, row, column):
    """Scores (A,) of answers, each read at its last token, of what `collate` gives."""
    return model(ids, positions, documents)[row, column]


def train_step(model, batches, pad, ranks, context, scale):
    """Gradients (times `scale`) of one step; returns ({metric: value}, tokens), over all ranks.

    A mean over the prompts of all ranks and micro-batches, whatever the split; one whose answers are all tied
    teaches nothing and does not count. DDP averages gradients over ranks, so each rank's share is multiplied
    by their number.
    """
    prompts = ranks.sum(sum(len(set(ranking.ranks)) > 1 for batch in batches for ranking in batch))[0]
    totals = [0.0, 0.0, 0]  # loss, pairs in the right order (by weight), tokens
    for number, batch in enumerate(batches):
        pairs = [x.to(ranks.device) for x in pair_indices(batch)]  # (P,) each
        ids, positions, documents, *ends = (x.to(ranks.device) for x in collate(batch, pad))
        with accumulate(model, number, batches):
            with context():
                scores = answer_scores(model, ids, positions, documents, *ends)  # (A,)
            loss = reward_loss(scores, *pairs) / max(prompts, 1)
            loss = loss + 0.0 * scores.sum()  # so that a batch without a pair has a gradient: zero
            (loss * ranks.world_size * scale).backward()
        totals[0] += loss.item()
        margins = scores[pairs[0]] - scores[pairs[1]]  # (P,)
        totals[1] += ((0.5 + 0.5 * torch.sign(margins)) * pairs[2]).sum().item()  # equal scores: half right
        totals[2] += int((documents != 0).sum())
    loss, right, tokens = ranks.sum(*totals)
    return {"loss": loss, "accuracy": right / max(prompts, 1)}, int(tokens)


@torch.no_grad()
def score_all(model, rankings, pad, device, context, size=128):
    """Scores of every answer of every ranking, about `size` at a time: a list of lists of floats."""
    scores = []
    for batch in micro_batches(rankings, size):
        with context():
            scores += answer_scores(model, *(x.to(device) for x in collate(batch, pad))).tolist()
    counts = np.cumsum([0] + [len(ranking.ids) for ranking in rankings])
    return [scores[a:b] for a, b in zip(counts, counts[1:])]


def calibration_error(margins, bins=10):
    """Expected calibration error (Guo et al. 2017, eq. 3) of sigmoid(r_a - r_b) as P(a is preferred to b).

    margins (P,): r_better - r_worse of each pair. The answer of a pair that scores higher is taken for the
    better one, with confidence sigmoid(|margin|) in [0.5, 1]; that is compared, bin by bin, with how often it
    was the better one, equal scores counting half.
    """
    confidence, right = 1 / (1 + np.exp(-np.abs(margins))), 0.5 + 0.5 * np.sign(margins)
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = [abs(confidence[place == b].sum() - right[place == b].sum()) for b in range(bins)]
    return float(sum(gaps) / len(margins))


def validate(model, rankings, pad, ranks, context, size):
    """({metric: value} over the validation rankings, the scores of their answers).

    Accuracies are means over pairs, the loss over prompts (as train_step's figures are). length_accuracy is
    that of a judge who prefers the longer answer: what a reward model has to beat.
    """
    scores = score_all(model, rankings, pad, ranks.device, context, size or 128)
    reshard(model)
    margins, longer, loss = [], [], 0.0
    for ranking, own in zip(rankings, scores):
        better, worse, weight = pair_indices([ranking])
        own, length = torch.tensor(own), torch.tensor([len(ids) for ids in ranking.ids])
        loss += reward_loss(own, better, worse, weight).item()
        margins += (own[better] - own[worse]).tolist()
        longer += (0.5 + 0.5 * torch.sign(length[better] - length[worse])).tolist()
    right = np.mean([0.5 + 0.5 * np.sign(m) for m in margins])  # equal scores are half right
    return {"valid_loss": loss / len(rankings), "valid_accuracy": float(right),
            "valid_length_accuracy": float(np.mean(longer)),
            "valid_ece": calibration_error(np.array(margins))}, scores


def reward_model(causal, seed):
    """A language model's decoder under a new head, N(0, 1 / (H + 1)) (Stiennon et al. 2020)."""
    with torch.device("meta"):  # its decoder is the other's
        model = RewardModel(causal.config)
    model.model, model.source, model.stored_dtype = causal.model, causal.source, causal.stored_dtype
    generator, std = torch.Generator().manual_seed(seed), 1 / math.sqrt(causal.config.hidden_size + 1)
    head = torch.empty(model.score.weight.shape).normal_(0.0, std, generator=generator)  # (1, H)
    model.score.weight = torch.nn.Parameter(head.to(causal.lm_head.weight.device))
    return model


def export(options, model, tokenizer, valid_set, scores):
    """The model folder, and valid.jsonl: how it scored the answers that were held out."""
    save_folder(options.out, model, tokenizer)
    lines = [{**r.record, "ranks": r.ranks, "scores": own} for r, own in zip(valid_set, scores)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_whole(Path(options.out) / "valid.jsonl", text.encode("utf-8", "replace"))  # meta is not checked


def train(options, ranks):
    """The whole run; returns the exit status."""
    check_options(options, ranks)
    causal, tokenizer = load_folder(options.model)
    if options.max_length > causal.config.max_position_embeddings:
        raise InputError(f"--max-length {options.max_length} is beyond the model's "
                         f"{causal.config.max_position_embeddings}")
    if tokenizer.pad is None:
        raise InputError(f"{options.model}: its tokenizer has no padding token, which batches need")
    counts, pad = {"bad": 0, "too_long": 0, "no_pair": 0}, tokenizer.pad
    train_set, valid_set = split_rankings(options, tokenizer, counts)
    files = jsonl_files(options.data + ([options.valid] if options.valid else []))
    weights = Path(options.model).glob("*.safetensors")
    run, state = open_run("reward", options, ranks,
                          {"model": fingerprint(weights), "data": fingerprint(files)})

    model, dtype = reward_model(causal, options.seed), choose_dtype(options, ranks, run)
    del causal  # its own head may be large
    parallel = parallelize(model, ranks, options.parallel, dtype, options.offload, options.checkpointing)
    optimizer = make_optimizer(model, options.lr, options.weight_decay, betas=(0.9, 0.95))
    stepper = Stepper(optimizer, dtype, options.clip)
    record = {"step": 0, "tokens": 0, "best": math.inf, "worse": 0, "seconds": 0.0}
    if state:
        record = load_state(state, {"model": (model, stepper)})
    steps = [s for epoch in range(options.epochs) for s in epoch_steps(options, len(train_set), epoch)]
    say(ranks, f"{len(train_set):,} prompts, {len(valid_set):,} to validate on; left out: "
               f"{counts['bad']} bad, {counts['too_long']} answers too long, {counts['no_pair']} prompts "
               "without a pair")
    held = valid_set[0] is not train_set[0]
    if not held:
        say(ranks, "none of them is held out, so one is validated on that is trained on: see --valid")

    def context():
        return autocast(ranks.device, dtype)

    def gradients(step):
        batches = step_batches(options, train_set, steps[step], ranks)
        return train_step(parallel, batches, pad, ranks, context, stepper.scale)

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
            found, _ = validate(model, valid_set, pad, ranks, context, options.micro_batch)
            metrics.write(step + 1, **found)
            keep_best(options, ranks, record, found["valid_loss"], model)
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
    _, scores = validate(model, valid_set, pad, ranks, context, options.micro_batch)
    judged = valid_set if held else []  # what was trained on would look too good
    plain = unsharded(model, ranks)
    return finish_run(options, ranks, run | {"left_out": counts}, record,
                      lambda: export(options, plain, tokenizer, judged, scores))


def check_options(options, ranks):
    """Refuse what cannot work before anything is read or written."""
    if options.offload and (options.parallel == "ddp" or ranks.world_size == 1):
        raise InputError("--offload needs --parallel fsdp, and torchrun with two processes or more")
    if Path(options.model).resolve() == Path(options.out).resolve():
        raise InputError(f"--out {options.out} is the --model it starts from; choose another --out")


@one_line_errors
def main(argv=None):
    options = parse_options(Options, argv, "reward.py")
    with process_group(options.device) as ranks:
        return train(options, ranks)


if __name__ == "__main__":
    sys.exit(main())
