"""Training speed of model.py on this machine: precision and torch.compile, interleaved in one process.

    python bench/step.py  # tokens per second, best and median of the rounds, with versions and settings
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import CausalLM, Config, autocast, make_optimizer

B, T, V, ROUNDS = 16, 256, 4096, 7
SHAPE = dict(vocab_size=V, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=4, head_dim=64, tie_word_embeddings=True)


def make_step(dtype, compiled, batch):
    """A function that makes one step of a model of its own: forward, backward, clip, AdamW."""
    model = CausalLM(Config(**SHAPE)).init_weights(0)
    optimizer = make_optimizer(model, 1e-3, 0.1, (0.9, 0.95))
    if compiled:
        model.compile()
    ids, positions, documents, targets = batch

    def step():
        with autocast(torch.device("cpu"), dtype):
            logprobs = model(ids, positions, documents, targets=targets)
        (-logprobs.sum() / targets.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    ids, targets = torch.randint(20, V, (B, T)), torch.randint(20, V, (B, T))
    positions = (torch.arange(T) % 90).expand(B, T).contiguous()  # packed documents of 90 tokens
    documents = (torch.arange(T) // 90).expand(B, T).contiguous()
    settings = [(dtype, compiled) for dtype in ("fp32", "bf16") for compiled in (False, True)]
    steps = {setting: make_step(*setting, (ids, positions, documents, targets)) for setting in settings}
    seconds = {setting: [] for setting in settings}
    for step in steps.values():  # warm up, and compile
        step()
        step()
    for _ in range(ROUNDS):
        for setting, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[setting].append(time.perf_counter() - began)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {B} x {T}, {SHAPE}")
    for (dtype, compiled), times in seconds.items():
        best, median = B * T / min(times), B * T / statistics.median(times)
        print(f"{dtype} {'compiled' if compiled else 'eager':9} best {best:7,.0f}  "
              f"median {median:7,.0f} tokens/s")


if __name__ == "__main__":
    main()
