"""ppo.py: reinforcement learning from human feedback. A model learns to answer as a reward model likes it.

    python ppo.py --model run/sft --reward run/reward --data prompts.jsonl --out run/ppo
    python ppo.py --model run/sft --rules data/island.py:score --data prompts.jsonl --out run/ppo

A step samples an answer to each of its prompts (a rollout), scores the answers, and trains on them a few
times, with the clipped objective of PPO (Schulman et al. 2017). Four models take part: the policy, which
learns; the reference, the model it started from, which it must not leave far (Ziegler et al. 2019, eq. 2);
the reward model; and the critic, which guesses the reward to come and learns too. Letters as in model.py, and
N answers of a rollout, A tokens of its longest answer.
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
import torch.nn as nn

from model import (Metrics, RewardModel, Stepper, StopSignal, accumulate, autocast, choose_dtype,
                   fingerprint, finish_run, generate, learning_rate, load_folder, load_state,
                   make_optimizer, open_run, pad_rows, parallelize, process_group, refuse_untrainable,
                   save_chat_folder, save_state, say, stop_ids)
from tokenizer import (InputError, encode_chat, held_out, jsonl_files, load_scorer, one_line_errors, option,
                       parse_options, prompt_messages, read_jsonl, reasons, write_whole)


@dataclass(kw_only=True)
class Options:
    """Train a model by PPO on its own answers to prompts, rewarded by a reward model, by rules, or both."""

    model: str = option("checkpoint folder to start from; also the reference of the KL penalty")
    data: list[str] = option("JSONL files with `prompt`, or folders of them")
    out: str = option("checkpoint folder to write")
    train_part: bool = option("leave out the prompts that reward.py and dpo.py hold out by hash", False)
    reward: str = option("reward model's folder: its score is the reward, and the critic starts from it", "")
    rules: str = option("file.py:function, a scorer that adds to the reward, or is it without --reward", "")
    key: str = option("which of the scorer's numbers counts", "gold")
    max_length: int = option("tokens in a prompt; longer ones are left out, and counted", 192, at_least=1)
    max_new_tokens: int = option("most tokens in an answer", 40, at_least=1)
    steps: int = option("rollouts to sample and train on", 50, at_least=1)
    batch_size: int = option("prompts a step, over all ranks", 64, at_least=1)
    minibatch: int = option("prompts an optimizer step, over all ranks", 32, at_least=1)
    inner_epochs: int = option("passes over each rollout", 2, at_least=1)
    micro_batch: int = option("rows a forward pass, on one rank; 0 takes the rank's whole share at once",
                              0, at_least=0)
    kl: float = option("price of a nat of log-probability away from the reference", 0.05, at_least=0)
    clip_range: float = option("how far from 1 a token's probability ratio still pays", 0.2, at_least=0)
    value_clip: float = option("how far a value may move from the one before the step", 0.2, at_least=0)
    gamma: float = option("discount of a reward a token later", 1.0, at_least=0)
    lam: float = option("GAE's lambda: 1 trusts rewards only, 0 the critic", 0.95, at_least=0)
    missing_end_penalty: float = option("taken off where an answer does not end with <|im_end|>",
                                        3.0, at_least=0)
    lr: float = option("peak learning rate of the policy", 5e-5, at_least=0)
    critic_lr: float = option("peak learning rate of the critic", 3e-4, at_least=0)
    critic_warmup: int = option("first steps, in which only the critic learns", 3, at_least=0)
    schedule: str = option("how the learning rates fall after warmup", "cosine",
                           choices=("cosine", "linear", "wsd"))
    warmup: int = option("steps of linear warmup", 0, at_least=0)
    weight_decay: float = option("decay of matrices (norms have none)", 0.0, at_least=0)
    clip: float = option("largest global norm of each model's gradient; 0 is off", 1.0, at_least=0)
    skip_bad: bool = option("count malformed lines and go on, instead of stopping at the first", False)
    save_every: int = option("steps between saved states", 10, at_least=1)
    seed: int = option("seed of the order of prompts and of the sampling", 1, at_least=0)
    dtype: str = option("precision of matrix products; auto probes what is faster here", "auto",
                        choices=("auto", "fp32", "bf16", "fp16"))
    device: str = option("auto, cpu, cuda or mps", "auto")
    resume: bool = option("go on where the run in --out stopped", False)
    overwrite: bool = option("start again, whatever is in --out", False)


@dataclass
class Prompt:
    """What is asked: the record's prompt and meta as they are in the file, and the ids before the answer."""

    prompt: str | list
    meta: dict
    ids: list[int]


@dataclass
class Answer:
    """One sampled answer: ids of its prompt and itself, the last `length`; rule: what the scorer gave it."""

    ids: list[int]
    length: int
    text: str
    finished: bool
    rule: float


@dataclass
class Models:
    """The four models (no reward model: None); those that learn with their Stepper, and wrapped in DDP."""

    policy: nn.Module
    reference: nn.Module
    critic: nn.Module
    reward: nn.Module | None
    policy_stepper: Stepper
    critic_stepper: Stepper
    parallel_policy: nn.Module
    parallel_critic: nn.Module


# ---------------------------------------------------------------------------------------------------------
# Data: JSONL -> prompts -> the prompts of a step


def read_prompts(files, tokenizer, options, counts):
    """All prompts that fit. Counts what is bad, held out, and too long."""
    prompts = []
    for file in files:
        for number, record in read_jsonl(file, counts if options.skip_bad else None):
            try:
                messages = prompt_messages(record)
                ids, _ = encode_chat(tokenizer, messages, generation_prompt=True)
            except InputError as error:
                if not options.skip_bad:
                    place = f"{file}:{number}"
                    raise InputError(f"{place}: {error} (--skip-bad goes on without such lines)") from None
                counts["bad"] += 1
                continue
            if options.train_part and held_out(messages):
                counts["held_out"] += 1
                continue
            if len(ids) > options.max_length:
                counts["too_long"] += 1
                continue
            prompts.append(Prompt(record["prompt"], record.get("meta", {}), ids))
    if not prompts:
        raise InputError(f"{' '.join(map(str, files))}: no prompt left to train on ({reasons(counts)})")
    return prompts


def step_prompts(options, prompts, step):
    """The prompts of a step: every epoch has every prompt once, in an order of its own."""
    chosen, orders = [], {}
    for i in range(step * options.batch_size, (step + 1) * options.batch_size):
        epoch, place = divmod(i, len(prompts))
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([options.seed, epoch]).permutation(len(prompts))
        chosen.append(prompts[orders[epoch][place]])
    return chosen


def minibatches(options, step, inner):
    """The rollout's rows in the order of an inner epoch, (batch_size / minibatch) lists of `minibatch`."""
    order = np.random.default_rng([options.seed, step, inner, 1]).permutation(options.batch_size)
    return order.reshape(-1, options.minibatch).tolist()


def micro_batches(options, ranks, minibatch):
    """This rank's rows of a minibatch, in lists of --micro-batch."""
    rows = ranks.rows(minibatch)
    size = options.micro_batch or len(rows)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def collate(answers, pad, width):
    """ids (B, T), targets (B, T), places (B, width), last (B,) of some answers, padded on the right.

    A target is the next token where that one is the answer's, else -1. places[b, a] is where the a-th token
    of answer b is predicted: the position before it, which has not seen it. last is each row's last token.
    """
    firsts = [len(a.ids) - a.length - 1 for a in answers]
    rows = [(a.ids, [-1] * first + a.ids[first + 1 :] + [-1]) for a, first in zip(answers, firsts)]
    ids, targets = pad_rows(rows, (pad, -1))
    places = np.full((len(answers), width), ids.shape[1] - 1)  # past an answer's end: where nothing is wanted
    for b, (answer, first) in enumerate(zip(answers, firsts)):
        places[b, : answer.length] = np.arange(first, first + answer.length)
    last = torch.tensor([len(a.ids) - 1 for a in answers])
    return ids, targets, torch.from_numpy(places), last


# ---------------------------------------------------------------------------------------------------------
# Rollouts: sample, measure, reward


def gather(ranks, share):
    """Every rank's list, joined in the order of ranks, on all ranks."""
    return [item for part in ranks.gather(share) for item in part]


def rule_score(options, scorer, prompt, text):
    """The scorer's number for an answer; InputError for a scorer that fails."""
    try:
        value = float(scorer(prompt.prompt, text, prompt.meta)[options.key])
    except Exception as error:  # whatever the user's function raises
        raise InputError(f"--rules {options.rules}: {error!r} at the answer {text!r:.60}") from None
    if not math.isfinite(value):
        raise InputError(f"--rules {options.rules}: {options.key} = {value} for the answer {text!r:.60}")
    return value


def sample_answers(options, ranks, policy, tokenizer, ends, prompts, step, scorer):
    """An answer to each of a step's prompts, all of them on all ranks; each rank samples its share.

    At temperature 1 from the whole distribution: the one whose log-probabilities training compares, up to
    the rounding of --dtype (sampling is in fp32).
    """
    numbers = range(step * options.batch_size, (step + 1) * options.batch_size)
    asked, answers = ranks.rows(prompts), []
    samples = generate(policy, [p.ids for p in asked], options.max_new_tokens, ends, temperature=1.0,
                       seed=options.seed, rows=ranks.rows(numbers))
    for prompt, sample in zip(asked, samples):
        text = tokenizer.decode(sample.ids[:-1] if sample.finished else sample.ids)
        try:
            rule = rule_score(options, scorer, prompt, text) if scorer else 0.0
        except InputError as error:  # told below, by all ranks: the others must not wait for this one
            rule = error
        finished = sample.ids[-1] == tokenizer.im_end  # <|endoftext|> is no end of an answer
        answers.append(Answer(prompt.ids + sample.ids, len(sample.ids), text, finished, rule))
    answers = gather(ranks, answers)
    for answer in answers:
        if isinstance(answer.rule, InputError):
            raise answer.rule
    return answers


@torch.no_grad()
def measure(options, ranks, models, answers, step, pad, context):
    """What all models say of a rollout before it changes them, as CPU tensors, 0 past an answer's end.

    logprobs (of the policy), reference, values: (N, A); scores: (N,); mask: (N, A). In the very batches that
    the first inner epoch trains: the same shapes give the same bits, so that the first ratio is 1 exactly.
    """
    width, found = max(a.length for a in answers), []
    for rows in (rows for minibatch in minibatches(options, step, 0)
                 for rows in micro_batches(options, ranks, minibatch)):
        ids, targets, places, last = (x.to(ranks.device)
                                      for x in collate([answers[i] for i in rows], pad, width))
        with context():
            per_token = [models.policy(ids, targets=targets), models.reference(ids, targets=targets),
                         models.critic(ids)]  # (B, T) each
            scores = models.reward(ids) if models.reward else torch.zeros(ids.shape)  # (B, T)
        scores = scores.cpu()[torch.arange(len(rows)), last.cpu()]  # (B,): at the last token, nowhere else
        found.append((rows, scores, *(x.gather(1, places).cpu() for x in per_token)))
    lengths = torch.tensor([a.length for a in answers])
    mask = torch.arange(width) < lengths[:, None]  # (N, A)
    rollout = {"scores": torch.zeros(len(answers)), "mask": mask}
    rollout |= {name: torch.zeros(mask.shape) for name in ("logprobs", "reference", "values")}
    for rows, *parts in gather(ranks, found):
        for name, part in zip(("scores", "logprobs", "reference", "values"), parts):
            rollout[name][rows] = part if name == "scores" else part * mask[rows]
    return rollout


def answer_rewards(scores, answers, missing_end_penalty):
    """What each answer earns at its end (N,): its normalised score and its rule's, less the penalty."""
    rules = torch.tensor([a.rule for a in answers])
    return scores + rules - missing_end_penalty * torch.tensor([float(not a.finished) for a in answers])


def token_rewards(logprobs, reference, mask, rewards, kl):
    """The reward of each token (N, A): -kl log(policy / reference), and the answer's own at its last token.

    (Ziegler et al. 2019, eq. 2, spread over tokens.) logprobs, reference, mask: (N, A); rewards: (N,).
    """
    per_token = -kl * (logprobs - reference) * mask
    last = mask.sum(1) - 1  # (N,)
    per_token[torch.arange(len(mask)), last] += rewards
    return per_token


def generalized_advantages(rewards, values, gamma, lam):
    """GAE: A_t = delta_t + gamma lam A_(t+1), delta_t = r_t + gamma V_(t+1) - V_t.

    (Schulman et al. 2016, eq. 16, from the right.) rewards, values: (N, A), both 0 past an answer's end:
    nothing comes after it. Returns advantages (N, A).
    """
    advantages, after, next_value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = after = delta + gamma * lam * after
        next_value = values[:, t]
    return advantages


def whiten(x, mask):
    """x (N, A) with mean 0 and variance 1 over what the mask holds, and 0 elsewhere."""
    mean = x[mask].mean()
    variance = ((x[mask] - mean) ** 2).mean()
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def estimate(options, record, rollout, answers):
    """Add to a rollout what training needs: rewards (N,); values (normalised), advantages, returns (N, A).

    Scores are normalised by the first rollout's mean and standard deviation, which are those of the model
    that PPO starts from. The critic starts as a copy of the reward model, so its values are normalised alike.
    """
    mean, std, mask = record["score_mean"], record["score_std"], rollout["mask"]
    rewards = answer_rewards((rollout["scores"] - mean) / std, answers, options.missing_end_penalty)
    values = (rollout["values"] - mean) / std * mask
    per_token = token_rewards(rollout["logprobs"], rollout["reference"], mask, rewards, options.kl)
    advantages = generalized_advantages(per_token, values, options.gamma, options.lam)
    return rollout | {"rewards": rewards, "values": values, "returns": advantages + values,
                      "advantages": whiten(advantages, mask)}


# ---------------------------------------------------------------------------------------------------------
# Training


def policy_loss(logprobs, old, advantages, mask, tokens, clip_range):
    """-sum min(r A, clip(r, 1 - c, 1 + c) A) / tokens, r = policy / old policy (Schulman et al. 2017, eq. 7).

    logprobs, old, advantages, mask: (B, A); tokens: those of the whole minibatch over all ranks. Returns
    (loss, ratios (B, A)).
    """
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    return -(gain * mask).sum() / max(tokens, 1), ratio


def value_loss(values, old, returns, mask, tokens, value_clip):
    """Half the squared error of a value, or of it clipped to the old value's surroundings: the larger one.

    (Schulman et al.'s own code; Engstrom et al. 2020, section 3.) All (B, A); tokens as in `policy_loss`.
    """
    clipped = old + (values - old).clamp(-value_clip, value_clip)
    error = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (error * mask).sum() / max(tokens, 1)


def policy_gradients(options, ranks, models, batches, tokens, context):
    """Gradients (times the scale) of a minibatch; this rank's [loss, sum of ratios, tokens clipped].

    DDP averages gradients over ranks, so each rank's share is multiplied by their number.
    """
    figures = np.zeros(3)
    for number, (ids, targets, places, rollout) in enumerate(batches):
        with accumulate(models.parallel_policy, number, batches):
            with context():
                logprobs = models.parallel_policy(ids, targets=targets).gather(1, places)  # (B, A)
            mask = rollout["mask"]
            loss, ratio = policy_loss(logprobs, rollout["logprobs"], rollout["advantages"], mask, tokens,
                                      options.clip_range)
            (loss * ranks.world_size * models.policy_stepper.scale).backward()
        outside = (ratio.detach() - 1).abs() > options.clip_range
        figures += [loss.item(), ratio[mask].sum().item(), (outside & mask).sum().item()]
    return figures


def critic_gradients(options, ranks, models, batches, tokens, context, record):
    """Gradients (times the scale) of a minibatch; this rank's part of the loss."""
    total = 0.0
    for number, (ids, _, places, rollout) in enumerate(batches):
        with accumulate(models.parallel_critic, number, batches):
            with context():
                scores = models.parallel_critic(ids).gather(1, places)  # (B, A)
            values = (scores - record["score_mean"]) / record["score_std"]
            loss = value_loss(values, rollout["values"], rollout["returns"], rollout["mask"], tokens,
                              options.value_clip)
            (loss * ranks.world_size * models.critic_stepper.scale).backward()
        total += loss.item()
    return total


def train_step(options, ranks, models, answers, rollout, step, pad, context, record):
    """All inner epochs over a rollout; returns the step's metrics, over all ranks.

    While the critic warms up, the policy is left alone, and its metrics are null.
    """
    lr, critic_lr = learning_rates(options, step)
    warming, width = step < options.critic_warmup, rollout["mask"].shape[1]
    losses, clipped, first, norms, count = np.zeros(2), 0.0, None, np.zeros(2), 0
    wanted = ("mask", "logprobs", "values", "advantages", "returns")
    for minibatch in (m for inner in range(options.inner_epochs) for m in minibatches(options, step, inner)):
        tokens, batches = int(rollout["mask"][minibatch].sum()), []
        for rows in micro_batches(options, ranks, minibatch):
            ids, targets, places, _ = (x.to(ranks.device)
                                       for x in collate([answers[i] for i in rows], pad, width))
            batches.append((ids, targets, places, {k: rollout[k][rows].to(ranks.device) for k in wanted}))
        if not warming:
            loss, ratios, outside = policy_gradients(options, ranks, models, batches, tokens, context)
            first = ratios / tokens if first is None else first
            losses[0] += loss
            clipped += outside / tokens
            norms[0] += models.policy_stepper.step(lr)
        losses[1] += critic_gradients(options, ranks, models, batches, tokens, context, record)
        norms[1] += models.critic_stepper.step(critic_lr)
        count += 1
    loss, critic_loss, clipped, first = ranks.sum(*losses / count, clipped / count, first or 0.0)
    policy = {"loss": loss, "ratio_first": first, "clip_fraction": clipped, "grad_norm": norms[0] / count}
    return ({name: None if warming else value for name, value in policy.items()}
            | {"value_loss": critic_loss, "critic_grad_norm": norms[1] / count, "lr": lr})


def learning_rates(options, step):
    """(policy's, critic's): the policy's schedule begins when the critic has warmed up."""
    shape, start = (options.warmup, options.schedule), options.critic_warmup
    critic_lr = learning_rate(step, options.steps, options.critic_lr, *shape)
    if step < start:
        return 0.0, critic_lr
    return learning_rate(step - start, options.steps - start, options.lr, *shape), critic_lr


def rollout_metrics(rollout, answers, models):
    """Metrics of a rollout, before it is trained on."""
    mask = rollout["mask"]
    returns, values = rollout["returns"][mask], rollout["values"][mask]
    kl = (rollout["logprobs"] - rollout["reference"])[mask]  # its mean: KL(policy || reference), nats a token
    figures = {"reward": rollout["rewards"].mean().item(), "kl": kl.mean().item(),
               "value_explained": 1 - ((returns - values).var() / returns.var()).item(),
               "answer_tokens": mask.sum().item() / len(answers),
               "finished": sum(a.finished for a in answers) / len(answers)}
    return figures | ({"rm_reward": rollout["scores"].mean().item()} if models.reward else {})


def write_samples(file, step, prompts, answers, rollout, options):
    """A line for each answer of a rollout: what evaluate.py scores against the truth."""
    kl = ((rollout["logprobs"] - rollout["reference"]).sum(1) / rollout["mask"].sum(1)).tolist()  # (N,)
    for prompt, answer, score, nats in zip(prompts, answers, rollout["scores"].tolist(), kl):
        record = {"step": step, "prompt": prompt.prompt, "answer": answer.text, "meta": prompt.meta,
                  "rm_reward": score if options.reward and math.isfinite(score) else None,
                  "kl": nats if math.isfinite(nats) else None, "finished": answer.finished}
        record |= {"rule": answer.rule} if options.rules else {}
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()


def open_samples(out, step):
    """FOLDER/samples.jsonl, cut back to the state's step, to be written on."""
    path = Path(out) / "samples.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # a kill may halve the last, even
    kept = [line + b"\n" for line in lines if json.loads(line)["step"] <= step]  # within a character
    write_whole(path, b"".join(kept))
    # half of a surrogate pair, which only JSON can spell, stays spelled so: \udXXX
    return open(path, "a", encoding="utf-8", errors="backslashreplace")


def load_models(options, ranks):
    """Policy, reference, critic, reward model (or None), and the tokenizer.

    The critic starts from the reward model, else from the policy's decoder with a head of zeros, which
    guesses nothing yet.
    """
    refuse_untrainable(options.model)  # before the critic takes its weights
    policy, tokenizer = load_folder(options.model, ranks.device)
    reference, _ = load_folder(options.model, ranks.device)
    reward = None
    if options.reward:
        reward, theirs = load_folder(options.reward, ranks.device, kind=RewardModel)
        critic, _ = load_folder(options.reward, ranks.device, kind=RewardModel)
        if theirs.hash != tokenizer.hash:
            raise InputError(f"{options.reward}: its tokenizer is not that of {options.model}")
        reward.requires_grad_(False)
    else:
        critic = RewardModel(policy.config).to(ranks.device)
        critic.model.load_state_dict(policy.model.state_dict())
        nn.init.zeros_(critic.score.weight)
    room = min(m.config.max_position_embeddings for m in (policy, critic))
    if options.max_length + options.max_new_tokens > room:
        raise InputError(f"--max-length {options.max_length} and --max-new-tokens {options.max_new_tokens} "
                         f"are beyond the {room} tokens of a model's context")
    return policy, reference.requires_grad_(False), critic, reward, tokenizer


def prepare_models(options, ranks, dtype, policy, reference, critic, reward):
    """Optimizers and DDP around what learns.

    DDP lays out its buckets by the first backward pass: done here, a resumed run adds up in the same order.
    """
    steppers = [Stepper(make_optimizer(m, lr, options.weight_decay, betas=(0.9, 0.95)), dtype, options.clip)
                for m, lr in ((policy, options.lr), (critic, options.critic_lr))]
    parallel = [parallelize(m, ranks) for m in (policy, critic)]
    if ranks.world_size > 1:
        ids = torch.zeros(1, 16, dtype=torch.long, device=ranks.device)
        parallel[0](ids, targets=ids).sum().backward()
        parallel[1](ids).sum().backward()
        for model in (policy, critic):
            model.zero_grad(set_to_none=True)
    return Models(policy, reference, critic, reward, *steppers, *parallel)


def run_inputs(options, files):
    """Fingerprints of all that a run reads: resumed, it must be the same."""
    sources = {"model": Path(options.model).glob("*.safetensors"), "data": files,
               "reward": Path(options.reward).glob("*.safetensors") if options.reward else [],
               "rules": [options.rules.rpartition(":")[0]] if options.rules else []}
    return {name: fingerprint(paths) for name, paths in sources.items()}


def train(options, ranks):
    """The whole run; returns the exit status."""
    check_options(options, ranks)
    scorer = load_scorer(options.rules) if options.rules else None
    counts, files = {"bad": 0, "held_out": 0, "too_long": 0}, jsonl_files(options.data)
    *loaded, tokenizer = load_models(options, ranks)
    prompts = read_prompts(files, tokenizer, options, counts)
    ends = stop_ids(options.model, tokenizer) | {tokenizer.endoftext}
    run, state = open_run("ppo", options, ranks, run_inputs(options, files))
    dtype, pad = choose_dtype(options, ranks, run), tokenizer.pad or 0
    models = prepare_models(options, ranks, dtype, *loaded)
    learning = {"policy": (models.policy, models.policy_stepper),
                "critic": (models.critic, models.critic_stepper)}
    record = {"step": 0, "tokens": 0, "seconds": 0.0, "score_mean": 0.0, "score_std": 1.0}
    if state:
        record = load_state(state, learning)
    say(ranks, f"{len(prompts):,} prompts; left out: {counts['bad']} bad, {counts['held_out']} held "
               f"out, {counts['too_long']} too long")
    if options.critic_warmup >= options.steps:
        say(ranks, f"--critic-warmup {options.critic_warmup} leaves the policy none of {options.steps} steps")

    def context():
        return autocast(ranks.device, dtype)

    done, earlier = record["step"], record["seconds"]
    metrics, signal, began = Metrics(options.out, ranks, done, options.steps), StopSignal(), time.monotonic()
    samples = open_samples(options.out, done) if ranks.first else None
    for step in range(done, options.steps):
        step_began = time.monotonic()
        asked = step_prompts(options, prompts, step)
        answers = sample_answers(options, ranks, models.policy, tokenizer, ends, asked, step, scorer)
        rollout = measure(options, ranks, models, answers, step, pad, context)
        if step == 0 and models.reward:
            std = rollout["scores"].std(correction=0).item()
            record |= {"score_mean": rollout["scores"].mean().item(), "score_std": std if std > 1e-6 else 1.0}
        rollout = estimate(options, record, rollout, answers)
        figures = train_step(options, ranks, models, answers, rollout, step, pad, context, record)
        now, tokens = time.monotonic(), sum(a.length for a in answers)
        record |= {"step": step + 1, "tokens": record["tokens"] + tokens, "seconds": earlier + now - began}
        if ranks.first:
            write_samples(samples, step + 1, asked, answers, rollout, options)
        metrics.write(step + 1, **rollout_metrics(rollout, answers, models), **figures,
                      tokens=record["tokens"], tokens_per_second=tokens / (now - step_began),
                      seconds=record["seconds"],
                      skipped=models.policy_stepper.skipped + models.critic_stepper.skipped)
        last, stop = step + 1 == options.steps, signal.agreed(ranks)
        if last or stop or (step + 1) % options.save_every == 0:
            save_state(options.out, record, ranks, learning)
        if stop and not last:
            metrics.close()
            say(ranks, f"stopped after step {step + 1}; go on with the same command and --resume")
            return 130
    metrics.close()
    return finish_run(options, ranks, run | {"left_out": counts}, record,
                      lambda: save_chat_folder(options.out, models.policy, tokenizer))


def check_options(options, ranks):
    """Refuse what cannot work before anything is read or written."""
    if not options.reward and not options.rules:
        raise InputError("nothing rewards the answers: give --reward FOLDER, --rules file.py:function, "
                         "or both")
    if options.batch_size % options.minibatch:
        raise InputError(f"--batch-size {options.batch_size} does not divide into minibatches of "
                         f"{options.minibatch}")
    if options.minibatch % ranks.world_size:
        raise InputError(f"--minibatch {options.minibatch} does not divide over {ranks.world_size} processes")
    for name in ("model", "reward"):
        folder = getattr(options, name)
        if folder and Path(folder).resolve() == Path(options.out).resolve():
            raise InputError(f"--out {options.out} is the --{name} it starts from; choose another --out")


def refuse_other_sampling(argv):
    """Answers come from the policy's own distribution, or its ratios would compare two different ones."""
    for flag in (word.partition("=")[0] for word in argv):
        if flag in ("--temperature", "--top-k", "--top-p", "--min-p"):
            raise InputError(f"{flag}: PPO samples at temperature 1 from the whole distribution; otherwise "
                             "the old log-probabilities would be of another one than the samples")


@one_line_errors
def main(argv=None):
    refuse_other_sampling(sys.argv[1:] if argv is None else argv)
    options = parse_options(Options, argv, "ppo.py")
    with process_group(options.device) as ranks:
        return train(options, ranks)


if __name__ == "__main__":
    sys.exit(main())
