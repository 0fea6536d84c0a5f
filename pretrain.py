"""pretrain.py: causal language modelling. A decoder learns to predict each next token of a corpus.

    python pretrain.py --tokenizer run/tokenizer --data run/tokens --out run/base
    python pretrain.py --model Qwen3-0.6B --data tokens --out run/more       # goes on from a model
    torchrun --nproc-per-node 8 pretrain.py ... --parallel fsdp              # on eight processes
    python pretrain.py --tokenizer run/tokenizer --plan --gpus 8 ...         # what a run would need

For each step: take the windows of the step, predict every token from those before it in its document
(teacher forcing: the true tokens are the context, whatever the model would have said), and step down the
gradient of the mean negative log-likelihood. Validation in bits per byte, which no tokenizer can flatter.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import resource
import sys
import time
import timeit
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from model import (DTYPES, CausalLM, Config, Experts, Metrics, Stepper, StopSignal, accumulate, autocast,
                   bits_per_byte, choose_compile, choose_dtype, export_best, fingerprint, finish_run,
                   generate, keep_best, learning_rate, load_folder, load_state, make_optimizer, open_run,
                   parallelize, pick_device, process_group, read_config, read_json, reshard, router_losses,
                   save_folder, save_state, say, spread, stopped_early, unsharded, whole, window_batch)
from tokenizer import InputError, Tokenizer, one_line_errors, option, parse_options, read_tokens


@dataclasses.dataclass(kw_only=True)
class Options:
    """Train a decoder on a folder of tokens, from nothing or from --model."""

    tokenizer: str = option("folder of the tokenizer; not given, it is the --model's", "")
    model: str = option("checkpoint folder to go on from; its shape is kept", "")
    data: str = option("folder of tokens, written by `tokenizer.py encode`", "")
    out: str = option("checkpoint folder to write", "")
    hidden_size: int = option("width of the residual stream", 256, at_least=1)
    num_hidden_layers: int = option("number of blocks", 4, at_least=1)
    num_attention_heads: int = option("query heads", 4, at_least=1)
    num_key_value_heads: int = option("key and value heads; fewer than query heads: shared", 4, at_least=1)
    intermediate_size: int = option("width inside the MLP", 704, at_least=1)
    num_experts: int = option("MLPs of a block, of which a token takes a few; 0: one for all", 0, at_least=0)
    num_experts_per_tok: int = option("experts that a token takes", 2, at_least=1)
    moe_intermediate_size: int = option("width inside an expert", 352, at_least=1)
    rope_theta: float | None = option("base of the rotary frequencies (10000, or the --model's; raised, it "
                                      "goes on with longer windows)", None, at_least=1)
    max_length: int = option("tokens in a window", 256, at_least=1)
    steps: int = option("optimizer steps", 1000, at_least=1)
    batch_size: int = option("windows a step, over all ranks", 16, at_least=1)
    micro_batch: int = option("windows a forward pass, on one rank; 0: its whole share", 0, at_least=0)
    optimizer: str = option("adamw, or muon for the matrices of blocks", "adamw", choices=("adamw", "muon"))
    lr: float = option("peak learning rate", 3e-3, at_least=0)
    schedule: str = option("how the learning rate falls after warmup", "cosine",
                           choices=("cosine", "linear", "wsd"))
    warmup: int = option("steps of linear warmup", 50, at_least=0)
    weight_decay: float = option("decay of matrices (norms have none)", 0.1, at_least=0)
    l1: float = option("weight of the sum of the matrices' absolute values in the loss", 0.0, at_least=0)
    l2: float = option("weight of half the sum of their squares in the loss", 0.0, at_least=0)
    dropout: float = option("share of what attention and MLP add that is dropped", 0.0, at_least=0)
    z_loss: float = option("weight of the squared log of the softmax's sum (often 1e-4)", 0.0, at_least=0)
    router_balance: float = option("weight of the experts' balancing loss", 0.01, at_least=0)
    router_z_loss: float = option("weight of the routers' z-loss", 0.001, at_least=0)
    clip: float = option("largest global norm of the gradient; 0 is off", 1.0, at_least=0)
    eval_every: int = option("steps between validations; the last step always has one", 250, at_least=1)
    eval_windows: int = option("validation windows of each source; 0 takes all", 32, at_least=0)
    patience: int = option("stop after this many validations without a new best, and keep the best; 0 is off",
                           0, at_least=0)
    sample_every: int = option("steps between samples of text; 0 is never", 0, at_least=0)
    save_every: int = option("steps between saved states", 250, at_least=1)
    state: str = option("states whole, or each rank's share apart", "whole", choices=("whole", "sharded"))
    seed: int = option("seed of the weights and of the order of windows", 1, at_least=0)
    dtype: str = option("precision of matrix products; auto probes what is faster here", "auto",
                        choices=("auto", "fp32", "bf16", "fp16"))
    compile: bool | None = option("use torch.compile; not given, it is used where it repays itself", None)
    device: str = option("auto, cpu, cuda or mps", "auto")
    parallel: str = option("ddp: a rank has all; fsdp: a share of the model", "ddp", choices=("ddp", "fsdp"))
    offload: bool = option("with fsdp: weights and optimizer wait in the CPU's memory", False)
    checkpointing: bool = option("compute blocks again in the backward pass instead of keeping them", False)
    peak_tflops: float = option("the device's peak in TFLOP/s, for MFU; 0 probes a product", 0.0, at_least=0)
    plan: bool = option("say what the run would need, and do not run it", False)
    gpus: int = option("with --plan: how many", 1, at_least=1)
    mfu: float = option("with --plan: share of the peak that is reached", 0.4, at_least=0.001)
    price: float = option("with --plan: of an hour of one GPU", 0.0, at_least=0)
    new_data: bool = option("with --resume: go on with data that has changed", False)
    resume: bool = option("go on where the run in --out stopped", False)
    overwrite: bool = option("start again, whatever is in --out", False)


# ---------------------------------------------------------------------------------------------------------
# Data: tokens -> windows -> batches


class Windows:
    """All training windows of a folder of tokens, in an endless order that is a pure function of the seed."""

    def __init__(self, shards, max_length, tokenizer, seed):
        self.shards, self.max_length, self.seed = shards, max_length, seed
        self.endoftext, self.bytes = tokenizer.endoftext, np.array(tokenizer.token_bytes())  # (V,)
        counts = [-(-len(shard.tokens) // max_length) for shard in shards]
        self.first = np.cumsum([0] + counts)  # the number of each shard's first window; the last is the total

    def __len__(self):
        return int(self.first[-1])

    @functools.lru_cache(1)
    def order(self, epoch):
        return np.random.default_rng([self.seed, epoch]).permutation(len(self))

    def rows(self, step, batch_size):
        """Numbers of the windows of a step: every epoch has every window once, in an order of its own."""
        places = (divmod(i, len(self)) for i in range(step * batch_size, (step + 1) * batch_size))
        return [int(self.order(epoch)[place]) for epoch, place in places]

    def batch(self, numbers):
        """ids, positions, documents, targets, bytes of their text: (B, T) each; numbers of shards (B,)."""
        parts = []
        for number in numbers:
            shard = int(np.searchsorted(self.first, number, side="right")) - 1
            window = number - int(self.first[shard])
            rows = window_batch(self.shards[shard].tokens, [window], self.max_length, self.endoftext)
            parts.append((*rows, self.bytes[rows[3]] * (rows[3] >= 0), np.array([shard])))
        return [torch.from_numpy(np.concatenate(part)) for part in zip(*parts)]


def step_batches(options, windows, step, ranks):
    """This rank's micro-batches of a step."""
    rows = ranks.rows(windows.rows(step, options.batch_size))
    size = options.micro_batch or len(rows)
    return [windows.batch(rows[i : i + size]) for i in range(0, len(rows), size)]


# ---------------------------------------------------------------------------------------------------------
# Losses, and an optimizer


def next_token_loss(logprobs, tokens):
    """Negative log-likelihood in nats a token: -sum log p(x_t | x_<t) / tokens (Bengio et al. 2003, eq. 1).

    logprobs: (B, T), 0 where nothing is predicted; tokens: the trained ones of the whole step, over all ranks
    and micro-batches, so that the gradient is the same however the step is split. None trained gives 0.
    """
    return -logprobs.sum() / max(tokens, 1)


def z_loss(hidden, weight, targets, logprobs, tokens):
    """log^2 Z a token, Z the softmax's sum: keeps logits near 0 (Chowdhery et al. 2022, section 5).

    log Z is a target's logit less its log-probability: the vocabulary is not gone through again. hidden
    (B, T, H), weight (V, H), targets and logprobs (B, T).
    """
    logits = (hidden.float() * F.embedding(targets.clamp(min=0), weight).float()).sum(-1)  # (B, T)
    return ((logits - logprobs).square() * (targets >= 0)).sum() / max(tokens, 1)


def added_losses(model, options, logprobs, targets, tokens, parts):
    """{name: (weight, value)} of what options add to the loss; parts: micro-batches of the step, all ranks'.

    Those of routers are means over each micro-batch, so they alone depend on how a step is split.
    """
    model, found = getattr(model, "module", model), {}
    if options.z_loss:
        value = z_loss(model.model.last_hidden, model.lm_head.weight, targets, logprobs, tokens)
        found["z_loss"] = options.z_loss, value
    if model.config.sparse_layers:
        balance, z = router_losses(model)
        found |= {"router_balance": (options.router_balance, balance / parts),
                  "router_z_loss": (options.router_z_loss, z / parts)}
    return found


def add_penalties(model, options, scale):
    """Add the gradients of l1 |w| and l2 w^2 / 2, over matrices: they need no forward pass."""
    for p in model.parameters() if options.l1 or options.l2 else ():
        if p.dim() == 2:
            p.grad.add_(options.l1 * p.detach().sign() + options.l2 * p.detach(), alpha=scale)


def orthogonalise(matrix):
    """About U V^T of matrix = U S V^T: all singular values near 1 (Jordan et al. 2024, Muon; Newton-Schulz).

    Five times x <- a x + b (x x^T) x + c (x x^T)^2 x, whose coefficients bring small values up fast and leave
    them between about 0.7 and 1.2.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalise(matrix.T).T
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.to(matrix.dtype)


class Muon(torch.optim.AdamW):
    """W <- W - lr (0.2 sqrt(max(rows, columns)) orthogonalise(momentum) + decay W), for matrices of blocks.

    With that factor an update has the size of AdamW's (Liu et al. 2025, eq. 4), which embeddings, head and
    norms have here, with the same learning rate and decay.
    """

    def __init__(self, model, lr, weight_decay, betas, momentum=0.95):
        matrices = [(".layers." in name, p) for name, p in model.named_parameters() if p.dim() == 2]
        groups = [{"params": [p for inside, p in matrices if inside], "momentum": momentum},
                  {"params": [p for inside, p in matrices if not inside]},
                  {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}]
        super().__init__(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self):
        inside = self.param_groups[0]
        lr, decay, momentum = (inside[key] for key in ("lr", "weight_decay", "momentum"))
        for p in inside["params"]:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffer = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            update = spread(orthogonalise(whole(p.grad.lerp(buffer, momentum))), p)  # Nesterov's
            p.mul_(1 - lr * decay).add_(update, alpha=-0.2 * math.sqrt(max(p.shape)) * lr)
            p.grad = None  # AdamW passes over it
        super().step()


# ---------------------------------------------------------------------------------------------------------
# The model: a new one, or one that is there


SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "intermediate_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size")


def shape(options, vocab_size):
    """Config of the asked shape; InputError where it does not work out."""
    heads, kv_heads, mixture = options.num_attention_heads, options.num_key_value_heads, options.num_experts
    if options.hidden_size % heads or options.hidden_size // heads % 2:
        raise InputError(f"--hidden-size {options.hidden_size} must be an even multiple of {heads} "
                         "attention heads")
    if heads % kv_heads:
        raise InputError(f"--num-attention-heads {heads} must be a multiple of "
                         f"--num-key-value-heads {kv_heads}")
    if 0 < mixture < options.num_experts_per_tok:
        raise InputError(f"--num-experts-per-tok {options.num_experts_per_tok} is more than there are: "
                         f"--num-experts {mixture}")
    return Config(
        **{name: getattr(options, name) for name in SHAPE}, model_type="qwen3_moe" if mixture else "qwen3",
        vocab_size=vocab_size, head_dim=options.hidden_size // heads, tie_word_embeddings=True,
        max_position_embeddings=options.max_length, rope_theta=options.rope_theta or 10000.0,
        norm_topk_prob=mixture > 0, sparse_layers=tuple(range(options.num_hidden_layers if mixture else 0)))


def start(options):
    """(model on the CPU, Tokenizer, changes): a new one, or --model's, whose config.json has the changes."""
    if not options.model:
        tokenizer = Tokenizer.load(options.tokenizer)
        return CausalLM(shape(options, tokenizer.vocab_size)).init_weights(options.seed), tokenizer, {}
    model, tokenizer = load_folder(options.model)
    changes = change_config(options, model.config, model.source)
    if options.tokenizer:
        known, tokenizer = tokenizer, Tokenizer.load(options.tokenizer)
        if known.bytes_of.items() - tokenizer.bytes_of.items():
            raise InputError(f"--tokenizer {options.tokenizer}: not the --model's with tokens added: its ids "
                             "stand for other text")
        resize_embeddings(model, known, tokenizer)
        changes["vocab_size"] = model.config.vocab_size
        tokenizer.unused_ids = frozenset(range(model.config.vocab_size)) - tokenizer.bytes_of.keys()
    return model, tokenizer, changes


def change_config(options, config, folder):
    """Refuse another shape than --model's, and windows beyond its context without a raised base.

    Returns {key: value} of FOLDER/config.json that the options change.
    """
    for name in SHAPE:
        asked, own = getattr(options, name), getattr(config, name)
        if asked not in (own, getattr(Options, name)):
            raise InputError(f"--{name.replace('_', '-')} {asked}: the --model has {own}, which is kept")
    if options.rope_theta and config.rope_scaling:
        raise InputError(f"--rope-theta: {options.model} has {config.rope_scaling['rope_type']} RoPE, which "
                         "stretches the context already")
    if options.max_length > config.max_position_embeddings and not options.rope_theta:
        raise InputError(f"--max-length {options.max_length} is beyond the --model's "
                         f"{config.max_position_embeddings}; a raised --rope-theta can make it longer")
    if not options.rope_theta:
        return {}
    rope = read_json(folder / "config.json").get("rope_parameters") or {"rope_type": "default"}
    changes = {"rope_theta": options.rope_theta,
               "max_position_embeddings": max(options.max_length, config.max_position_embeddings)}
    vars(config).update(changes)
    return changes | {"rope_parameters": rope | {"rope_theta": options.rope_theta}}


def resize_embeddings(model, known, tokenizer):
    """The added tokens' rows in embeddings and head are the mean of the old ones (Hewitt 2021).

    There may be rows for them already: Qwen's models have more rows than tokens.
    """
    old, added = sorted(known.bytes_of), sorted(tokenizer.bytes_of.keys() - known.bytes_of.keys())
    size = max(model.config.vocab_size, tokenizer.vocab_size)
    for layer in (model.model.embed_tokens, model.lm_head):
        weight = layer.weight.data
        weight = torch.cat([weight, weight.new_zeros(size - len(weight), weight.shape[1])])
        weight[added] = weight[old].mean(0)
        layer.weight = torch.nn.Parameter(weight)
    model.config.vocab_size = model.model.embed_tokens.num_embeddings = model.lm_head.out_features = size
    model.tie_weights()


def add_hooks(options, model):
    """Dropout of what attention and MLP add to the residual stream, and the last hidden states for z-loss.

    Hooks, so that the decoder is the same file and the same numbers without them.
    """
    if options.dropout:  # (Srivastava et al. 2014)
        for block in model.model.layers:
            for part in (block.self_attn, block.mlp):
                part.register_forward_hook(
                    lambda module, inputs, y: F.dropout(y, options.dropout, torch.is_grad_enabled()))
    if options.z_loss:
        model.model.register_forward_hook(
            lambda module, inputs, y: setattr(module, "last_hidden", y if torch.is_grad_enabled() else None))


# ---------------------------------------------------------------------------------------------------------
# What a run costs


def count_parameters(config):
    """(all numbers of a model, those in the matrices that a token is multiplied with)."""
    with torch.device("meta"):
        model = CausalLM(config)
    blocks = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = len(config.sparse_layers) * (config.num_experts - config.num_experts_per_tok) * expert
    return sum(p.numel() for p in model.parameters()), blocks - idle + config.vocab_size * config.hidden_size


def flops_per_token(config, length):
    """Operations of training on a token: 6 a weight, and attention's (Chowdhery et al. 2022, appendix B)."""
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    return 6 * count_parameters(config)[1] + 12 * attention


def peak_flops(options, device, dtype):
    """Operations a second that --peak-tflops says, or that a product of large matrices reaches."""
    if options.peak_tflops:
        return options.peak_tflops * 1e12
    size = 8192 if device.type == "cuda" else 1024
    a = torch.rand(size, size, device=device).to(DTYPES[dtype])
    seconds = timeit.repeat(lambda: (a @ a)[0, 0].item(), number=1, repeat=4)  # .item() waits for it
    return 2 * size**3 / min(seconds)


def memory(device):
    """The most bytes that this process has held: on the GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # Linux's: its getrusage counts the process that started this one too
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024  # it is in kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def activation_bytes(config, rows, length, dtype, checkpointing=False):
    """Bytes that a forward pass of (rows, length) keeps for the backward: counted in one without numbers.

    A mixture of experts counts as one MLP as wide as the experts that a token takes.
    """
    if config.sparse_layers:
        width = config.num_experts_per_tok * config.moe_intermediate_size
        config = dataclasses.replace(config, model_type="qwen3", sparse_layers=(), intermediate_size=width)
    config, inputs, kept = dataclasses.replace(config, rope_scaling=None), 0, {}
    if checkpointing:  # each block's input, and one block whole while it is computed again
        inputs = config.num_hidden_layers * rows * length * config.hidden_size * 4
        config = dataclasses.replace(config, num_hidden_layers=1, windows=None)
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.setdefault(x.untyped_storage()._cdata, x), lambda x: x)
    with FakeTensorMode(), hooks:
        model, ids = CausalLM(config), torch.zeros(rows, length, dtype=torch.long)
        with autocast(torch.device("cpu"), dtype):
            model(ids, documents=ids, targets=ids)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        return inputs + sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in own)


def plan(options):
    """Figures of a run that is not made, by name: numbers of things, bytes on a GPU, seconds.

    Each GPU takes its share of a step's windows. Weights, gradients and optimizer are in fp32; with fsdp each
    GPU has its share of them, and for a while the whole of one block and of the embeddings.
    """
    vocab_size = Tokenizer.load(options.tokenizer).vocab_size if options.tokenizer else 0
    config = read_config(options.model, CausalLM) if options.model else shape(options, vocab_size)
    if options.model:
        change_config(options, config, Path(options.model))
    config.vocab_size = max(config.vocab_size, vocab_size)
    dtype = "bf16" if options.dtype == "auto" else options.dtype
    parameters, multiplied = count_parameters(config)
    embeddings = config.vocab_size * config.hidden_size * (2 - config.tie_word_embeddings)
    moments = parameters + (embeddings if options.optimizer == "muon" else parameters)
    share = options.gpus if options.parallel == "fsdp" else 1  # GPUs that have the model together
    numbers = {"weights": parameters, "gradients": parameters, "optimizer": moments}
    held = {name: 0 if options.offload else 4 * count // share for name, count in numbers.items()}
    if share > 1:
        held["gathered"] = 4 * (embeddings + (parameters - embeddings) // config.num_hidden_layers)
    rows = options.batch_size // options.gpus
    rows = min(options.micro_batch or rows, rows)
    held["activations"] = activation_bytes(config, rows, options.max_length, dtype, options.checkpointing)
    tokens = options.steps * options.batch_size * options.max_length
    flops = tokens * flops_per_token(config, options.max_length)
    peak = peak_flops(options, pick_device(options.device), dtype)
    return {"parameters": parameters, "multiplied": multiplied, "tokens": tokens, "flops": flops,
            "memory": held, "peak": peak, "seconds": flops / (peak * options.mfu * options.gpus)}


def print_plan(options):
    found = plan(options)
    hours, gigabytes = found["seconds"] / 3600, {name: size / 1e9 for name, size in found["memory"].items()}
    print(f"parameters  {found['parameters']:,}; {found['multiplied']:,} are multiplied with each token")
    print(f"tokens      {found['tokens']:,}; 20 a parameter would be {20 * found['parameters']:,} "
          "(Hoffmann et al. 2022, table 3)")
    print(f"operations  {found['flops']:.3g}")
    print(f"GB a GPU    {sum(gigabytes.values()):.3g}: "
          + ", ".join(f"{name} {size:.3g}" for name, size in gigabytes.items()))
    print(f"hours       {hours:.3g} on {options.gpus} at {options.mfu:.0%} of "
          f"{found['peak'] / 1e12:.3g} TFLOP/s; cost {options.price * options.gpus * hours:.2f}")


# ---------------------------------------------------------------------------------------------------------
# Training


def by_shard(logprobs, targets, size, shard, shards):
    """(S, 4) for each shard of a batch: nats, tokens, nats of its text alone, and bytes of that text."""
    nats = -logprobs.detach().float()  # (B, T)
    rows = torch.stack([nats.sum(1), (targets >= 0).sum(1), (nats * (size > 0)).sum(1), size.sum(1)], 1)
    return torch.zeros(shards, 4, dtype=torch.float64).index_add_(0, shard.cpu(), rows.cpu().double())


def train_step(model, batches, ranks, context, scale, options, shards):
    """Gradients (times `scale`) of one step: (loss in nats a token, trained tokens, {name: tensor} of sums).

    All over all ranks. DDP and FSDP average gradients over ranks, so each rank's share is multiplied by their
    number. shards: how many there are.
    """
    tokens = int(ranks.sum(sum((batch[3] >= 0).sum().item() for batch in batches))[0])
    sums = {}
    for number, batch in enumerate(batches):
        ids, positions, documents, targets, size, shard = (x.to(ranks.device) for x in batch)  # (B, T)
        with accumulate(model, number, batches):
            with context():
                logprobs = model(ids, positions, documents, targets=targets)  # (B, T)
            loss = next_token_loss(logprobs, tokens)
            added = added_losses(model, options, logprobs, targets, tokens, len(batches) * ranks.world_size)
            with_added = sum((weight * value for weight, value in added.values()), loss)
            (with_added * ranks.world_size * scale).backward()
        found = {"loss": loss, "by_shard": by_shard(logprobs, targets, size, shard, shards)}
        found |= {name: value for name, (_, value) in added.items()}
        if counts := [module.counts for module in model.modules() if isinstance(module, Experts)]:
            found["expert_tokens"] = torch.stack(counts)  # (L, E)
        sums = {name: sums.get(name, 0) + value.detach().cpu().double() for name, value in found.items()}
    add_penalties(model, options, scale)
    sums = {name: torch.tensor(ranks.sum(*value.flatten().tolist()), dtype=torch.float64).view(value.shape)
            for name, value in sums.items()}
    return sums.pop("loss").item(), tokens, sums


def figures(sums, shards):
    """What the metrics say of a step's sums: loss by source and language, bits per byte, and all others."""
    losses = {f"{shard.source}.{shard.lang}": nats / tokens
              for shard, (nats, tokens, _, _) in zip(shards, sums["by_shard"].tolist()) if tokens}
    _, _, nats, size = sums["by_shard"].sum(0).tolist()
    others = {name: value.tolist() for name, value in sums.items() if name != "by_shard"}
    per_byte = nats / math.log(2) / size if size else None
    return {"train_bits_per_byte": per_byte, "loss_by_source": losses, **others}


def spike(record, loss):
    """Whether a loss is 5 standard deviations above what was seen before; the averages are kept in `record`.

    Mean and variance are exponential averages over about 20 steps, from the 20th step on.
    """
    mean, variance, seen = record.get("losses", (0.0, 0.0, 0))
    high = not math.isfinite(loss) or seen >= 20 and loss - mean > 5 * math.sqrt(variance)
    if math.isfinite(loss):
        share, delta = max(0.05, 1 / (seen + 1)), loss - mean
        record["losses"] = mean + share * delta, (1 - share) * (variance + share * delta**2), seen + 1
    return high


def validate(model, tokenizer, shards, options, ranks, context):
    """{language: bits per byte} of the validation windows, all on every rank, and their mean over languages."""
    rows = options.micro_batch or options.batch_size // ranks.world_size
    with context(), torch.compiler.set_stance("force_eager"):
        bits = bits_per_byte(model, tokenizer, shards, options.max_length, rows, options.eval_windows or None)
    reshard(model)
    return bits, sum(bits.values()) / len(bits) if bits else math.nan  # no text to predict


def sample_texts(model, tokenizer, options, ranks, step):
    """Two texts of at most 64 tokens that the model writes by itself; none but on the first rank."""
    plain = unsharded(model, ranks)
    if not ranks.first:
        return []
    answers = generate(plain, [[tokenizer.endoftext]], min(64, options.max_length - 1),
                       {tokenizer.endoftext}, samples=2, temperature=0.8, seed=options.seed + step)
    return [tokenizer.decode(answer.ids, skip_special_tokens=True) for answer in answers]


def begin(options, ranks, tokenizer):
    """Open the run, with fingerprints of all that it reads: (run.json as a dict, the state's folder or None).

    sft.py makes chat tokens anew in a model of stage "pretrain", and must not where they may mean something.
    """
    files = [Path(options.data) / "index.json", *Path(options.data).glob("train/*.bin")]
    inputs, stage = {"data": fingerprint(files), "tokenizer": tokenizer.hash}, "pretrain"
    if options.model:
        inputs["model"] = fingerprint(Path(options.model).glob("*.safetensors"))
        before = Path(options.model) / "run.json"
        stage = read_json(before).get("stage") if before.exists() else ""
    return open_run(stage if stage == "pretrain" else "continue", options, ranks, inputs)


def distribute(options, ranks, model, dtype):
    """(the model over all ranks, to be trained; its Stepper). `model` itself is measured and saved."""
    add_hooks(options, model)
    parallel = parallelize(model, ranks, options.parallel, dtype, options.offload, options.checkpointing)
    make = Muon if options.optimizer == "muon" else make_optimizer
    stepper = Stepper(make(model, options.lr, options.weight_decay, betas=(0.9, 0.95)), dtype, options.clip)
    held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in stepper.parameters)
    say(ranks, f"{sum(p.numel() for p in stepper.parameters):,} parameters, {held:,} of them on a rank")
    return parallel, stepper


def train(options, ranks):
    """The whole run; returns the exit status."""
    model, tokenizer, changes = start(options)
    train_shards, valid_shards = (read_tokens(options.data, x, tokenizer) for x in ("train", "valid"))
    windows = Windows(train_shards, options.max_length, tokenizer, options.seed)
    run, state = begin(options, ranks, tokenizer)
    dtype = choose_dtype(options, ranks, run)
    parallel, stepper = distribute(options, ranks, model, dtype)
    record = {"step": 0, "tokens": 0, "best": math.inf, "worse": 0, "seconds": 0.0}
    if state:
        record |= load_state(state, {"model": (model, stepper)})
    data = run["inputs"]["data"]
    if record.setdefault("data", data) != data:  # another text: its losses do not compare
        record |= {"data": data, "best": math.inf, "worse": 0, "losses": (0.0, 0.0, 0)}
    say(ranks, f"{len(windows):,} windows, {options.steps * options.batch_size / len(windows):.1f} epochs, "
               f"{ranks.world_size} x {ranks.device}")
    context = functools.partial(autocast, ranks.device, dtype)

    def gradients(step):
        seeds = np.random.SeedSequence([options.seed, step, ranks.rank])  # dropout hangs on nothing else
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        batches = step_batches(options, windows, step, ranks)
        return train_step(parallel, batches, ranks, context, stepper.scale, options, len(train_shards))

    done, earlier = record["step"], record["seconds"]
    choose_compile(options, ranks, run, model, lambda: gradients(done), options.steps - done)
    peak = peak_flops(options, ranks.device, dtype) * ranks.world_size
    peak /= flops_per_token(model.config, options.max_length)  # tokens a second, could it be reached
    metrics, signal, began = Metrics(options.out, ranks, done, options.steps), StopSignal(), time.monotonic()
    early = stopped_early(options, ranks, record)
    for step in range(done, 0 if early else options.steps):
        step_began = time.monotonic()
        lr = learning_rate(step, options.steps, options.lr, options.warmup, options.schedule)
        loss, tokens, sums = gradients(step)
        norm = stepper.step(lr)
        now = time.monotonic()
        speed = tokens / (now - step_began)
        record |= {"step": step + 1, "tokens": record["tokens"] + tokens, "seconds": earlier + now - began}
        metrics.write(step + 1, loss=loss, lr=lr, grad_norm=norm, tokens=record["tokens"],
                      tokens_per_second=speed, mfu=speed / peak, memory_gb=memory(ranks.device) / 1e9,
                      seconds=record["seconds"], skipped=stepper.skipped, spike=spike(record, loss),
                      **figures(sums, train_shards))
        last = step + 1 == options.steps
        if last or (step + 1) % options.eval_every == 0:
            bits, mean = validate(model, tokenizer, valid_shards, options, ranks, context)
            metrics.write(step + 1, valid_loss=mean, bits_per_byte=bits)
            keep_best(options, ranks, record, mean, model)
            last = last or 0 < options.patience <= record["worse"]
        if options.sample_every and (step + 1) % options.sample_every == 0:
            metrics.write(step + 1, samples=sample_texts(model, tokenizer, options, ranks, step))
        stop = signal.agreed(ranks)
        if last or stop or (step + 1) % options.save_every == 0:
            save_state(options.out, record, ranks, {"model": (model, stepper)}, options.state == "sharded")
        if last:
            break
        if stop:
            metrics.close()
            ranks.wait()
            say(ranks, f"stopped after step {step + 1}; go on with the same command and --resume")
            return 130
    metrics.close()
    export_best(options, ranks, model)
    plain = unsharded(model, ranks)
    return finish_run(options, ranks, run, record,
                      lambda: save_folder(options.out, plain, tokenizer, changes))


def check_options(options, ranks):
    """Refuse what cannot work before anything is read or written."""
    if not options.tokenizer and not options.model:
        raise InputError("--tokenizer is missing, or --model to go on from (see --help)")
    for name in () if options.plan else ("data", "out"):
        if not getattr(options, name):
            raise InputError(f"--{name} is missing (see --help)")
    processes = options.gpus if options.plan else ranks.world_size
    if options.batch_size % processes:
        raise InputError(f"--batch-size {options.batch_size} does not divide over {processes} processes")
    if options.dropout >= 1:
        raise InputError(f"--dropout {options.dropout} must be below 1")
    if options.offload and (options.parallel == "ddp" or processes == 1):
        raise InputError("--offload needs --parallel fsdp, and torchrun with two processes or more")
    if options.model and options.out and Path(options.model).resolve() == Path(options.out).resolve():
        raise InputError(f"--out {options.out} is the --model it starts from; choose another --out")


@one_line_errors
def main(argv=None):
    options = parse_options(Options, argv, "pretrain.py")
    with process_group(options.device) as ranks:
        check_options(options, ranks)
        return print_plan(options) if options.plan else train(options, ranks)


if __name__ == "__main__":
    sys.exit(main())
