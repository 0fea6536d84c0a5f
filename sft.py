"""sft.py: supervised fine-tuning. A base model learns to answer, from examples of dialogues.

    python sft.py --model run/base --data sft.jsonl --out run/sft               # all weights
    python sft.py --model run/base --data sft.jsonl --out run/lora --lora 16    # a low-rank adapter
    python sft.py --model run/sft --data more.jsonl --out run/prefix --prefix 16    # or a trained prefix

The loss is pretraining's, on the assistant's tokens only (and the <|im_end|> that ends its turn): the model
reads the question, it is not trained to ask it. Several examples are packed in a row; attention and positions
stay inside each, so that packing changes nothing but speed.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from model import (Metrics, Stepper, StopSignal, accumulate, add_lora, add_prefix, autocast,
                   choose_compile, choose_dtype, export_best, fingerprint, finish_run, keep_best,
                   learning_rate, load_folder, load_state, make_optimizer, merge_lora, open_run,
                   parallelize, prefix_width, process_group, read_json, reshard, save_adapter,
                   save_chat_folder, save_prefix, save_state, say, set_prefix, stopped_early,
                   train_rows_only, unsharded)
from tokenizer import (InputError, encode_chat, held_out, jsonl_files, messages_of, one_line_errors, option,
                       parse_options, read_jsonl, read_tokens, reasons)


@dataclass(kw_only=True)
class Options:
    """Fine-tune a model on dialogues: JSONL with `messages`, or with `prompt` and `completion`."""

    model: str = option("checkpoint folder to start from")
    data: list[str] = option("JSONL files, or folders of them")
    out: str = option("checkpoint folder to write")
    valid: str = option("JSONL file to validate on; not given, 5 % of the data are held out by hash", "")
    replay: str = option("folder of tokens to go on reading a little of, against forgetting", "")
    replay_share: float = option("share of the trained rows' tokens that is replay", 0.3, at_least=0)
    max_length: int = option("tokens in a row; longer dialogues are cut, and counted", 256, at_least=1)
    epochs: int = option("passes over the data", 2, at_least=1)
    batch_size: int = option("packed rows a step, over all ranks", 16, at_least=1)
    micro_batch: int = option("rows a forward pass, on one rank; 0 takes the rank's whole share at once",
                              0, at_least=0)
    lr: float = option("peak learning rate; LoRA wants about ten times that of full fine-tuning",
                       3e-4, at_least=0)
    schedule: str = option("how the learning rate falls after warmup", "cosine",
                           choices=("cosine", "linear", "wsd"))
    warmup: int = option("steps of linear warmup", 20, at_least=0)
    weight_decay: float = option("decay of matrices (norms have none)", 0.0, at_least=0)
    clip: float = option("largest global norm of the gradient; 0 is off", 1.0, at_least=0)
    lora: int = option("rank of a LoRA adapter; 0 trains all weights", 0, at_least=0)
    lora_alpha: float = option("strength of the adapter: its product is scaled by alpha / rank", 32.0)
    prefix: int = option("tokens of a trained prefix (keys and values) before every text; 0 is off", 0,
                         at_least=0)
    freeze: int = option("blocks, from the embeddings on, that stay as they are with them; 0 is off", 0,
                         at_least=0)
    merge: bool = option("write a LoRA adapter merged into a model folder", False)
    skip_bad: bool = option("count malformed lines and go on, instead of stopping at the first", False)
    eval_every: int = option("steps between validations; the last step always has one", 100, at_least=1)
    patience: int = option("stop after this many validations without a new best, and keep the best; 0 is off",
                           0, at_least=0)
    save_every: int = option("steps between saved states", 100, at_least=1)
    seed: int = option("seed of the order of examples and of the adapter", 1, at_least=0)
    dtype: str = option("precision of matrix products; auto probes what is faster here", "auto",
                        choices=("auto", "fp32", "bf16", "fp16"))
    compile: bool | None = option("use torch.compile; not given, it is used where it repays itself", None)
    device: str = option("auto, cpu, cuda or mps", "auto")
    parallel: str = option("ddp: a rank has all; fsdp: a share of the model", "ddp", choices=("ddp", "fsdp"))
    offload: bool = option("with fsdp: weights and optimizer wait in the CPU's memory", False)
    checkpointing: bool = option("compute blocks again in the backward pass instead of keeping them", False)
    resume: bool = option("go on where the run in --out stopped", False)
    overwrite: bool = option("start again, whatever is in --out", False)


@dataclass
class Example:
    """One dialogue or document: its ids (n,), and which of them are trained as targets (n,)."""

    ids: np.ndarray
    trained: np.ndarray


# ---------------------------------------------------------------------------------------------------------
# Data: JSONL -> examples -> packed rows -> tensors


def record_messages(record):
    """The message list of a record: `messages`, or `prompt` and `completion` (strings or message lists)."""
    if "messages" in record:
        messages = record["messages"]
    elif "prompt" in record and "completion" in record:
        sides = (("user", record["prompt"]), ("assistant", record["completion"]))
        for role, side in sides:
            if not isinstance(side, str | list):
                kind = type(side).__name__
                raise InputError(f"{role}'s side must be text or a list of messages, found {kind}")
        messages = [m for role, side in sides for m in messages_of(side, role)]
    else:
        raise InputError("neither `messages` nor `prompt` and `completion`")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        if messages[-1].get("role") != "assistant":
            raise InputError("the last message is not the assistant's: there is nothing to learn")
        if not str(messages[-1].get("content", "")).strip():
            raise InputError("the assistant's last message is empty")
    return messages


def read_examples(files, tokenizer, max_length, skip_bad, counts):
    """All dialogues as (held out?, Example). Counts what is bad, cut, or too long to keep."""
    examples = []
    for file in files:
        for number, record in read_jsonl(file, counts if skip_bad else None):
            try:
                messages = record_messages(record)
                ids, trained = encode_chat(tokenizer, messages)
            except InputError as error:
                if not skip_bad:
                    place = f"{file}:{number}"
                    raise InputError(f"{place}: {error} (--skip-bad goes on without such lines)") from None
                counts["bad"] += 1
                continue
            if not any(trained[1:max_length]):
                counts["too_long"] += 1  # the question alone fills the row
                continue
            counts["cut"] += len(ids) > max_length
            example = Example(np.array(ids[:max_length]), np.array(trained[:max_length]))
            examples.append((held_out(messages), example))
    return examples


def split_examples(options, tokenizer, counts):
    """(training, validation) examples: --valid FILE, else the 5 % of the data with the smallest hashes."""
    settings = tokenizer, options.max_length, options.skip_bad, counts
    examples = read_examples(jsonl_files(options.data), *settings)
    if options.valid:
        valid = read_examples(jsonl_files([options.valid]), *settings)
        train, valid = [e for _, e in examples], [e for _, e in valid]
    else:
        train, valid = [e for held, e in examples if not held], [e for held, e in examples if held]
    if not train:
        raise InputError(f"{' '.join(options.data)}: no example left to train on ({reasons(counts)})")
    if options.valid and not valid:
        raise InputError(f"{options.valid}: no example left to validate on")
    return train, valid or train[:1]


def replay_examples(options, tokenizer, shards, tokens, epoch):
    """About `tokens` tokens of pretraining documents, drawn anew each epoch; every token is trained."""
    places = np.concatenate([np.stack([np.full(s.documents, i), np.arange(s.documents)], 1)
                             for i, s in enumerate(shards)])  # (documents, 2): shard, number in it
    np.random.default_rng([options.seed, epoch, 1]).shuffle(places)
    borders, examples = [np.append(s.offsets, len(s.tokens)) for s in shards], []
    for shard, number in places:
        if tokens <= 0:
            break
        begin, end = borders[shard][number : number + 2]
        ids = np.append(shards[shard].tokens[begin:end].astype(np.int64),
                        tokenizer.endoftext)[: options.max_length]
        examples.append(Example(ids, np.ones(len(ids), bool)))
        tokens -= len(ids)
    return examples


def pack(lengths, max_length):
    """Best fit: each example goes to the open row with the least room that still takes it.

    lengths: in the epoch's order. Returns rows, each a list of indices into `lengths`, in the order they were
    begun; a pure function, so that all ranks pack alike (Dyckhoff 1990; Ding et al. 2024).
    """
    rows, by_room = [], [[] for _ in range(max_length + 1)]  # by_room[r]: open rows with r tokens of room
    for index, length in enumerate(lengths):
        room = next((r for r in range(length, max_length + 1) if by_room[r]), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, max_length
        else:
            row = by_room[room].pop()
        rows[row].append(index)
        by_room[room - length].append(row)
    return rows


def collate(rows, max_length):
    """Rows of examples -> ids, positions, documents, targets, each a tensor (B, T).

    An example's target at a token is its next token where that one is trained, else -1. Padding is right, a
    document of its own that trains nothing.
    """
    shape = (len(rows), max_length)
    ids, positions, documents = (np.zeros(shape, np.int64) for _ in range(3))
    targets = np.full(shape, -1, np.int64)
    for b, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row, 1):
            n = len(example.ids)
            ids[b, start : start + n] = example.ids
            positions[b, start : start + n] = np.arange(n)
            documents[b, start : start + n] = number
            targets[b, start : start + n - 1] = np.where(example.trained[1:], example.ids[1:], -1)
            start += n
    return [torch.from_numpy(x) for x in (ids, positions, documents, targets)]


def epoch_rows(options, tokenizer, train, shards, epoch):
    """All rows of an epoch (lists of Example), packed in its shuffled order; `shards` hold the replay."""
    examples = list(train)
    if shards:
        tokens = sum(len(e.ids) for e in train) * options.replay_share / (1 - options.replay_share)
        examples += replay_examples(options, tokenizer, shards, tokens, epoch)
    order = np.random.default_rng([options.seed, epoch]).permutation(len(examples))
    examples = [examples[i] for i in order]
    return [[examples[i] for i in row] for row in pack([len(e.ids) for e in examples], options.max_length)]


def step_batches(options, rows, ranks):
    """This rank's micro-batches of a step; a short last one is filled with empty rows: no loss."""
    rows = ranks.rows(rows + [[]] * (options.batch_size - len(rows)))
    size = options.micro_batch or len(rows)
    return [collate(rows[i : i + size], options.max_length) for i in range(0, len(rows), size)]


# ---------------------------------------------------------------------------------------------------------
# Training


def sft_loss(logprobs, tokens):
    """Negative log-likelihood of the trained tokens, in nats a token, over all that the step trains.

    logprobs: (B, T), 0 where nothing is trained; tokens: their number over all ranks and micro-batches
    (averages of micro-batches would weigh short ones more). None trained gives 0, not NaN.
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
            loss = sft_loss(logprobs, tokens)
            (loss * ranks.world_size * scale).backward()
        total += loss.item()
    return ranks.sum(total)[0], tokens


@torch.inference_mode()
def validate(model, valid, options, ranks, context):
    """Mean loss in nats a trained token over the validation examples."""
    rows, total, tokens = pack([len(e.ids) for e in valid], options.max_length), 0.0, 0
    size = options.micro_batch or options.batch_size
    for first in range(0, len(rows), size):
        part = [[valid[i] for i in row] for row in rows[first : first + size]]
        ids, positions, documents, targets = (x.to(ranks.device) for x in collate(part, options.max_length))
        with context(), torch.compiler.set_stance("force_eager"):
            logprobs = model(ids, positions, documents, targets=targets)  # (B, T)
        total -= logprobs.cpu().double().sum().item()  # MPS has no float64
        tokens += (targets >= 0).sum().item()
    reshard(model)
    return total / max(tokens, 1)


def prepare_model(options, tokenizer, model, train):
    """What is trained, and chat tokens that mean something. Returns rows of new tokens, which train with it.

    A model straight from pretrain.py has never seen <|im_start|> and <|im_end|>: their rows start as that of
    <|endoftext|>, which it knows as the border between texts, and where the other rows are frozen these two
    are trained. A prefix starts as the beginning of the examples (`train`).
    """
    run = Path(options.model) / "run.json"
    pretrained = run.exists() and read_json(run).get("stage") == "pretrain"
    chatml = tokenizer.im_start is not None  # else its chats are made of tokens that documents may have
    new_rows = [tokenizer.im_start, tokenizer.im_end] if pretrained and chatml else []
    embedding = model.model.embed_tokens.weight
    with torch.no_grad():
        for row in new_rows:
            embedding[row] = embedding[tokenizer.endoftext]
    if new_rows and (options.prefix or options.parallel == "fsdp" and (options.lora or options.freeze)):
        raise InputError(f"{options.model} has never seen a chat: fine-tune it first, as --prefix does not "
                         "train its chat tokens, nor do --lora and --freeze with --parallel fsdp")
    if options.lora:
        add_lora(model, options.lora, options.lora_alpha, options.seed)
    if options.prefix:
        add_prefix(model, np.resize(np.concatenate([e.ids for e in train]), options.prefix).tolist())
    if options.freeze:
        for part in (model.model.embed_tokens, *model.model.layers[: options.freeze]):
            part.requires_grad_(False)
    if new_rows and (options.lora or options.freeze):
        train_rows_only(embedding, new_rows)
    return new_rows


def train(options, ranks):
    """The whole run; returns the exit status."""
    check_options(options, ranks)
    model, tokenizer = load_folder(options.model)
    longest = model.config.max_position_embeddings - options.prefix
    if options.max_length > longest:
        raise InputError(f"--max-length {options.max_length} is beyond the model's {longest}")
    if options.freeze >= model.config.num_hidden_layers:
        raise InputError(f"--freeze {options.freeze}: one of the model's {model.config.num_hidden_layers} "
                         "blocks must be left to train")
    counts = {"bad": 0, "cut": 0, "too_long": 0}
    train_set, valid_set = split_examples(options, tokenizer, counts)
    files = jsonl_files(options.data + ([options.valid] if options.valid else []))
    shards = read_tokens(options.replay, "train", tokenizer) if options.replay else []
    replay = [Path(options.replay) / "index.json"] if options.replay else []
    weights = Path(options.model).glob("*.safetensors")
    inputs = {"model": fingerprint(weights), "data": fingerprint(files + replay)}
    new_rows = prepare_model(options, tokenizer, model, train_set)
    run, state = open_run("sft", options, ranks, inputs)

    dtype = choose_dtype(options, ranks, run)
    parallel = parallelize(model, ranks, options.parallel, dtype, options.offload, options.checkpointing)
    optimizer = make_optimizer(model, options.lr, options.weight_decay, betas=(0.9, 0.95))
    stepper = Stepper(optimizer, dtype, options.clip)
    record = {"step": 0, "tokens": 0, "best": math.inf, "worse": 0, "seconds": 0.0}
    if state:
        record = load_state(state, {"model": (model, stepper)})
    epochs = [epoch_rows(options, tokenizer, train_set, shards, epoch) for epoch in range(options.epochs)]
    size = options.batch_size
    steps = [rows[i : i + size] for rows in epochs for i in range(0, len(rows), size)]
    trained = sum(len(getattr(p, "rows_only", p)) * p[0].numel()
                  for p in model.parameters() if p.requires_grad)
    say(ranks, f"{len(train_set):,} examples in {len(epochs[0]):,} rows, {len(valid_set):,} to validate on; "
               f"left out: {counts['bad']} bad, {counts['too_long']} too long; cut: {counts['cut']}; "
               f"{trained:,} trained parameters")
    if valid_set[0] is train_set[0]:
        say(ranks, "none of them is held out, so one is validated on that is trained on: see --valid")

    def context():
        return autocast(ranks.device, dtype)

    def gradients(step):
        return train_step(parallel, step_batches(options, steps[step], ranks), ranks, context, stepper.scale)

    done, earlier = record["step"], record["seconds"]
    choose_compile(options, ranks, run, model, lambda: gradients(0), len(steps) - done)
    metrics, signal, began = Metrics(options.out, ranks, done, len(steps)), StopSignal(), time.monotonic()
    early = stopped_early(options, ranks, record)
    for step in range(done, 0 if early else len(steps)):
        step_began = time.monotonic()
        lr = learning_rate(step, len(steps), options.lr, options.warmup, options.schedule)
        loss, tokens = gradients(step)
        norm = stepper.step(lr)
        now = time.monotonic()
        record |= {"step": step + 1, "tokens": record["tokens"] + tokens, "seconds": earlier + now - began}
        metrics.write(step + 1, loss=loss, lr=lr, grad_norm=norm, tokens=record["tokens"],
                      tokens_per_second=tokens / (now - step_began), seconds=record["seconds"],
                      skipped=stepper.skipped)
        last = step + 1 == len(steps)
        if last or (step + 1) % options.eval_every == 0:
            valid_loss = validate(model, valid_set, options, ranks, context)
            metrics.write(step + 1, valid_loss=valid_loss)
            keep_best(options, ranks, record, valid_loss, model)
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
    plain = unsharded(model, ranks, lambda plain: add_empty_adapter(options, plain))
    return finish_run(options, ranks, run | {"left_out": counts}, record,
                      lambda: export(options, plain, tokenizer, new_rows))


def add_empty_adapter(options, plain):
    """What `prepare_model` has added, without its numbers."""
    if options.lora:
        add_lora(plain, options.lora, options.lora_alpha)
    if options.prefix:
        set_prefix(plain, torch.empty(options.prefix, prefix_width(plain.config), device="meta"))


def export(options, model, tokenizer, new_rows):
    """A model folder, or with --prefix, or --lora and no --merge, an adapter folder in PEFT's layout."""
    if options.prefix:
        save_prefix(options.out, model, options.model)
    elif options.lora and not options.merge:
        save_adapter(options.out, model, options.model, options.lora, options.lora_alpha, new_rows)
    else:
        save_chat_folder(options.out, merge_lora(model), tokenizer)


def check_options(options, ranks):
    """Refuse what cannot work before anything is read or written."""
    if options.batch_size % ranks.world_size:
        raise InputError(f"--batch-size {options.batch_size} does not divide over "
                         f"{ranks.world_size} processes")
    if options.offload and (options.parallel == "ddp" or ranks.world_size == 1):
        raise InputError("--offload needs --parallel fsdp, and torchrun with two processes or more")
    if options.replay_share >= 1:
        raise InputError(f"--replay-share {options.replay_share} must be below 1")
    if options.merge and not options.lora:
        raise InputError("--merge needs --lora: without an adapter there is nothing to merge")
    if options.lora and not options.merge and (Path(options.model) / "adapter_config.json").exists():
        raise InputError(f"{options.model} is an adapter; PEFT reads no adapter of one: add --merge")
    if (options.lora > 0) + (options.prefix > 0) + (options.freeze > 0) > 1:
        raise InputError("--lora, --prefix and --freeze each say what is trained: choose one")
    if Path(options.model).resolve() == Path(options.out).resolve():
        raise InputError(f"--out {options.out} is the --model it starts from; choose another --out")


@one_line_errors
def main(argv=None):
    options = parse_options(Options, argv, "sft.py")
    with process_group(options.device) as ranks:
        return train(options, ranks)


if __name__ == "__main__":
    sys.exit(main())
