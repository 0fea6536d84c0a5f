"""A training step of model.py beside those of nanoGPT, minimind and transformers' Qwen3, at the same shape.

    git clone https://github.com/karpathy/nanoGPT; git clone https://github.com/jingyaogong/minimind
    python bench/train.py --nanogpt nanoGPT --minimind minimind [--shape 20M] [--device cuda]
    python bench/train.py --grow     # how our step grows with T, H, L, V and B
    python bench/train.py --profile  # where the time of our step goes

Each runs in fp32 and bf16 autocast, eager and compiled, by turns in one process, without a document mask; all
have fused AdamW and clipping. (A CPU without bf16 units wants `--dtype fp32`.) Printed are best and median
tokens a second, our share of the rate that a large product reaches, and each one's memory, in a process of
its own. A peer that is not there is said not to be.
"""

import argparse
import importlib.util
import itertools
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import CausalLM, Config, autocast, make_optimizer  # noqa: E402
from pretrain import Options, flops_per_token, memory, peak_flops  # noqa: E402

# V, H, I, L, N, B, T
SHAPES = {"4M": (4096, 256, 704, 4, 4, 16, 256), "20M": (4096, 512, 1408, 6, 8, 16, 256),
          "124M": (50304, 768, 2048, 12, 12, 32, 1024), "350M": (50304, 1024, 2816, 24, 16, 16, 1024),
          "1B": (50304, 2048, 5632, 20, 16, 8, 1024)}
PEERS = ("ours", "nanoGPT", "minimind", "transformers")


def load(folder, file):
    """A module of a peer's clone; None where no folder is given."""
    if not folder:
        return None
    spec = importlib.util.spec_from_file_location(file.replace("/", "."), Path(folder) / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config_of(shape):
    V, H, I, L, N, _, T = shape
    return Config(vocab_size=V, hidden_size=H, intermediate_size=I, num_hidden_layers=L, head_dim=H // N,
                  num_attention_heads=N, num_key_value_heads=N, tie_word_embeddings=True,
                  max_position_embeddings=T)


def make(peer, shape, options):
    """(model, function of (ids, targets) that gives the mean loss), or None where the peer is not there."""
    V, H, I, L, N, _, T = shape
    if peer == "ours":
        model = CausalLM(config_of(shape)).init_weights(0)
        return model, lambda ids, targets: -model(ids, targets=targets).mean()
    if peer == "nanoGPT":
        module = load(options.nanogpt, "model.py")
        if module:
            model = module.GPT(module.GPTConfig(block_size=T, vocab_size=V, n_layer=L, n_head=N, n_embd=H,
                                                dropout=0.0, bias=False))
            return model, lambda ids, targets: model(ids, targets)[1]
        return None
    if peer == "minimind":
        module = load(options.minimind, "model/model_minimind.py")
        if not module:
            return None
        model = module.MiniMindForCausalLM(module.MiniMindConfig(
            hidden_size=H, num_hidden_layers=L, vocab_size=V, num_attention_heads=N, num_key_value_heads=N,
            intermediate_size=I, max_position_embeddings=T))
    else:
        try:
            from transformers import Qwen3Config, Qwen3ForCausalLM
        except ImportError:
            return None
        model = Qwen3ForCausalLM(Qwen3Config(
            vocab_size=V, hidden_size=H, intermediate_size=I, num_hidden_layers=L, num_attention_heads=N,
            num_key_value_heads=N, head_dim=H // N, max_position_embeddings=T, tie_word_embeddings=True,
            use_cache=False, attn_implementation="sdpa"))
    return model, lambda ids, targets: F.cross_entropy(model(ids).logits.flatten(0, 1).float(),
                                                       targets.flatten())


def make_step(peer, shape, setting, options):
    """A function that makes one step of a model of its own; None where the peer is not there."""
    made = make(peer, shape, options)
    if made is None:
        return None
    (model, loss_of), (dtype, compiled) = made, setting
    device, (V, *_, B, T) = torch.device(options.device), shape
    model.to(device).train()
    optimizer = make_optimizer(model, 1e-3, 0.1, (0.9, 0.95))
    if compiled:
        model.compile()
    tokens = torch.randint(0, V, (B, T + 1), generator=torch.Generator().manual_seed(0)).to(device)

    def step():
        with autocast(device, dtype):
            loss = loss_of(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device

    return step


def seconds(step):
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def compare(shape, options):
    """Print every peer at every setting, then ours against the best of each."""
    steps, taken, tokens = {}, {}, shape[-2] * shape[-1]
    for peer in PEERS:
        for setting in itertools.product(options.dtype, (False, True)):  # (dtype, compiled)
            step = make_step(peer, shape, setting, options)
            if step is None:
                print(f"{peer}: not there, not measured")
                break
            step(), step()  # warms up, and compiles
            steps[peer, setting], taken[peer, setting] = step, []
    for _ in range(options.rounds):
        for key, step in steps.items():
            taken[key].append(seconds(step))
    best = {}
    for (peer, (dtype, compiled)), spent in taken.items():
        median = tokens / statistics.median(spent)
        how = "compiled" if compiled else "eager"
        best[peer] = max(best.get(peer, (0,)), (median, dtype, how))
        print(f"{peer:12} {dtype} {how:8}  best {tokens / min(spent):9,.0f}  median {median:9,.0f} tokens/s")
    for peer, (median, dtype, how) in best.items():
        rate = median * flops_per_token(config_of(shape), shape[-1])
        peak = peak_flops(Options(), torch.device(options.device), dtype)
        print(f"{peer:12} at its best ({dtype}, {how}): ours is {best['ours'][0] / median:.2f} times as fast")
        if peer == "ours":
            print(f"{peer:12} reaches {rate / peak:.0%} of a product's {peak / 1e9:,.0f} GFLOP/s")
    for peer, (_, dtype, how) in best.items():
        command = [sys.executable, __file__, "--memory-of", peer, dtype, how, "--shape", options.shape,
                   "--nanogpt", options.nanogpt, "--minimind", options.minimind, "--device", options.device]
        print(f"{peer:12} {subprocess.check_output(command, text=True).splitlines()[-1]}")


def memory_of(peer, dtype, how, shape, options):
    """What three steps take at most, over what Python and the libraries do."""
    device = torch.device(options.device)
    before, step = memory(device), make_step(peer, shape, (dtype, how == "compiled"), options)
    for _ in range(3):
        step()
    print(f"peak memory {(memory(device) - before) / 1e6:,.0f} MB ({dtype}, {how})")


def grow(shape, options):
    """Time of our step when one of its sizes is doubled."""
    names = "V H I L N B T".split()
    changes = {"as it is": {}, "V x 2": {"V": 2}, "H, I, N x 2": {"H": 2, "I": 2, "N": 2}, "L x 2": {"L": 2},
               "B x 2": {"B": 2}, "T x 2": {"T": 2}}
    steps, taken = {}, {}
    for name, change in changes.items():
        larger = tuple(size * change.get(letter, 1) for letter, size in zip(names, shape))
        steps[name], taken[name] = make_step("ours", larger, (options.dtype[-1], True), options), []
        steps[name](), steps[name]()
    for _ in range(options.rounds):
        for name, step in steps.items():
            taken[name].append(seconds(step))
    base = statistics.median(taken["as it is"])
    for name, spent in taken.items():
        median = statistics.median(spent)
        print(f"{name:12} {median * 1e3:8.1f} ms, {median / base:.2f} times")


def profile(shape, options):
    step = make_step("ours", shape, (options.dtype[-1], False), options)
    step(), step()
    with torch.profiler.profile() as found:
        step()
    by = "self_cuda_time_total" if options.device == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=50))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--nanogpt", default="")
    parser.add_argument("--minimind", default="")
    parser.add_argument("--shape", default="4M", choices=SHAPES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--grow", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--memory-of", nargs=3, metavar=("PEER", "DTYPE", "HOW"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    if options.memory_of:
        return memory_of(*options.memory_of, shape, options)
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads; "
          f"V, H, I, L, N, B, T = {shape}")
    (grow if options.grow else profile if options.profile else compare)(shape, options)


if __name__ == "__main__":
    main()
