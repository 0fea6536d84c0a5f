"""Tokens a second of `generate` and of transformers' own, the same weights and greedy text, by turns; and the
memory that each takes for weights, cache and all else, in a process of its own.

    python bench/decode.py [4M 25M 125M]        # on the threads that torch takes
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import CausalLM, Config, generate, load_folder, save_folder  # noqa: E402
from pretrain import memory  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

SHAPES = {"4M": (3072, 256, 704, 4, 4), "25M": (8192, 512, 1408, 8, 8), "125M": (32768, 768, 2048, 12, 12)}
PROMPT, NEW, ROUNDS = 32, 128, 5


def write_model(size, folder):
    """A folder with random weights, for both."""
    V, H, I, L, N = SHAPES[size]
    config = Config(vocab_size=V, hidden_size=H, intermediate_size=I, num_hidden_layers=L, head_dim=H // N,
                    num_attention_heads=N, num_key_value_heads=N, tie_word_embeddings=True)
    save_folder(folder, CausalLM(config).init_weights(0), Tokenizer.from_merges([]))


def load_ours(folder):
    """prompts (B, T) -> the new ids of each."""
    model = load_folder(folder)[0].eval()
    return lambda ids: [answer.ids for answer in generate(model, ids.tolist(), NEW, [])]


def load_theirs(folder):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return lambda ids: model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None,
        pad_token_id=0)[:, PROMPT:].tolist()


LOAD = {"ours": load_ours, "transformers": load_theirs}


def prompts(size, B):
    return torch.randint(0, SHAPES[size][0], (B, PROMPT), generator=torch.Generator().manual_seed(0))


def seconds(function, *arguments):
    began = time.perf_counter()
    return function(*arguments), time.perf_counter() - began


def compare_speed(size, B, run):
    taken, texts = {name: [] for name in run}, {}
    for _ in range(ROUNDS + 1):  # the first warms up
        for name, function in run.items():
            texts[name], spent = seconds(function, prompts(size, B))
            taken[name].append(spent)
    same = sum(a == b for a, b in zip(texts["ours"], texts["transformers"]))
    rate = {name: B * NEW / statistics.median(spent[1:]) for name, spent in taken.items()}
    ratio = rate["ours"] / rate["transformers"]
    print(f"{size:>5} B {B:<3} ours {rate['ours']:8,.0f} tokens/s, "
          f"transformers {rate['transformers']:8,.0f}: {ratio:.2f} times; "
          f"{same} of {B} texts the same", flush=True)


def peak_memory(name, size, folder):
    """MB that loading and generating for 32 prompts add to a process that has imported all (Linux)."""
    import transformers  # noqa: F401
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    cpu = torch.device("cpu")
    before = memory(cpu)
    LOAD[name](folder)(prompts(size, 32))
    return (memory(cpu) - before) / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=[*SHAPES], metavar="size", help=", ".join(SHAPES))
    sizes = parser.parse_args().sizes
    if unknown := [size for size in sizes if size not in SHAPES]:
        parser.error(f"no size {unknown[0]}: {', '.join(SHAPES)}")
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_model(size, folder)
            run = {name: load(folder) for name, load in LOAD.items()}
            for B in (1, 32):
                compare_speed(size, B, run)
            with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                peak = {name: pool.apply(peak_memory, (name, size, folder)) for name in LOAD}
        print(f"{size:>5} B 32  peak memory: ours {peak['ours']:,.0f} MB, transformers "
              f"{peak['transformers']:,.0f}", flush=True)


if __name__ == "__main__":
    main()
