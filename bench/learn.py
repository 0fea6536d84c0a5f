"""Bits per byte against tokens read: model.py's decoder beside nanoGPT's GPT, on one corpus, in one process.

    git clone https://github.com/karpathy/nanoGPT
    python bench/learn.py --nanogpt nanoGPT --tokenizer run-data/tokenizer --data run-data/tokens
    python bench/learn.py ... --lr 3e-3 1e-3 --seeds 1 --steps 250    # which learning rate suits each

About equal parameters (printed), the same windows in the same order, AdamW, warmup and cosine for both. Ours
sees documents apart, nanoGPT's sees whole windows, each as it is meant to; both are judged on the same
held-out windows. With several --lr each model's best is taken, by the mean over languages at the end.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from train import config_of, make as make_peer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import CausalLM, Stepper, autocast, bits_per_byte, learning_rate, make_optimizer  # noqa: E402
from pretrain import Windows, next_token_loss  # noqa: E402
from tokenizer import Tokenizer, read_tokens  # noqa: E402

H, I, L, N = 256, 704, 4, 4  # hidden size, width of our MLP (nanoGPT's has 4 H), layers, heads
MODELS = ("ours", "nanoGPT")


class NanoGPT(nn.Module):
    """nanoGPT's model, called as ours is: log-probabilities of the targets (B, T), 0 where there is none."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def forward(self, ids, positions, documents, targets):
        logits, _ = self.gpt(ids, targets)  # (B, T, V); all of them only where targets are given
        return -F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=-1, reduction="none")


def make(name, vocab_size, seed, options):
    shape = vocab_size, H, I, L, N, options.batch_size, options.max_length
    if name == "ours":
        return CausalLM(config_of(shape)).init_weights(seed)
    torch.manual_seed(seed)
    return NanoGPT(make_peer(name, shape, options)[0])


def learn(name, lr, seed, tokenizer, shards, options):
    """[(tokens read, {language: bits per byte})] of one run."""
    model, device = make(name, tokenizer.vocab_size, seed, options), torch.device(options.device)
    model.to(device)
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, lr {lr}, seed {seed}")
    stepper = Stepper(make_optimizer(model, lr, 0.1, (0.9, 0.95)), options.dtype, 1.0)
    windows, curve, read = Windows(shards["train"], options.max_length, tokenizer, seed), [], 0
    if options.compile:
        model.compile()
    for step in range(options.steps):
        batch = windows.batch(windows.rows(step, options.batch_size))
        ids, positions, documents, targets = (x.to(device) for x in batch[:4])  # (B, T)
        tokens = (targets >= 0).sum().item()
        with autocast(device, options.dtype):
            logprobs = model(ids, positions, documents, targets=targets)  # (B, T)
        next_token_loss(logprobs, tokens).backward()
        stepper.step(learning_rate(step, options.steps, lr, 50, "cosine"))
        read += tokens
        if (step + 1) % options.eval_every == 0 or step + 1 == options.steps:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                bits = bits_per_byte(model, tokenizer, shards["valid"], options.max_length,
                                     max_windows=options.eval_windows)
            curve.append((read, bits))
            print(told(f"{name} {read:10,} tokens", bits), flush=True)
    return curve


def told(what, bits):
    return "  ".join([what, *(f"{lang} {value:.4f}" for lang, value in bits.items())])


def last(curve):
    return statistics.mean(curve[-1][1].values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--nanogpt", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--eval-windows", type=int, default=32, help="of each source")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    tokenizer = Tokenizer.load(options.tokenizer)
    shards = {split: read_tokens(options.data, split, tokenizer) for split in ("train", "valid")}
    curves = {}
    for seed in options.seeds:
        for lr in options.lr:
            for name in MODELS:
                curves[name, lr, seed] = learn(name, lr, seed, tokenizer, shards, options)
    for name in MODELS:
        lr = min(options.lr, key=lambda lr: statistics.mean(last(curves[name, lr, s]) for s in options.seeds))
        print(f"{name}, lr {lr}, mean of seeds {options.seeds}:")
        for rows in zip(*(curves[name, lr, seed] for seed in options.seeds)):
            means = {lang: statistics.mean(bits[lang] for _, bits in rows) for lang in rows[0][1]}
            print(told(f"  {rows[0][0]:10,} tokens", means))


if __name__ == "__main__":
    main()
