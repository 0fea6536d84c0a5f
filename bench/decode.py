"""Tokens a second of `generate` and of transformers' own, the same weights and greedy text, by turns.

    python bench/decode.py [4M 25M 125M]        # on the threads that torch takes
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import CausalLM, Config, config_json, generate, write_json, write_safetensors  # noqa: E402

SHAPES = {"4M": (3072, 256, 704, 4, 4), "25M": (8192, 512, 1408, 8, 8), "125M": (32768, 768, 2048, 12, 12)}
PROMPT, NEW, ROUNDS = 32, 128, 5


class Ids:
    """As much of a tokenizer as config_json asks for."""

    im_end = pad = None


def models(size):
    """Ours and transformers', with the same random weights."""
    from transformers import AutoModelForCausalLM
    V, H, I, L, N = SHAPES[size]
    config = Config(vocab_size=V, hidden_size=H, intermediate_size=I, num_hidden_layers=L, head_dim=H // N,
                    num_attention_heads=N, num_key_value_heads=N, tie_word_embeddings=True)
    ours = CausalLM(config).init_weights(0).eval()
    with tempfile.TemporaryDirectory() as folder:
        write_json(f"{folder}/config.json", config_json(config, Ids))
        tensors = {name: t for name, t in ours.state_dict().items() if name != "lm_head.weight"}
        write_safetensors(f"{folder}/model.safetensors", tensors)
        return ours, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def seconds(function):
    began = time.perf_counter()
    return function(), time.perf_counter() - began


def main():
    for size in sys.argv[1:] or SHAPES:
        ours, theirs = models(size)
        for B in (1, 32):
            ids = torch.randint(0, SHAPES[size][0], (B, PROMPT), generator=torch.Generator().manual_seed(0))
            mask = torch.ones_like(ids)
            run = {"ours": lambda: [s.ids for s in generate(ours, ids.tolist(), NEW, [])],
                   "transformers": lambda: theirs.generate(
                       ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None,
                       pad_token_id=0)[:, PROMPT:].tolist()}
            taken, texts = {name: [] for name in run}, {}
            for _ in range(ROUNDS + 1):  # the first warms up
                for name, function in run.items():
                    texts[name], spent = seconds(function)
                    taken[name].append(spent)
            same = sum(a == b for a, b in zip(texts["ours"], texts["transformers"]))
            rate = {name: B * NEW / statistics.median(spent[1:]) for name, spent in taken.items()}
            print(f"{size:>5} B {B:<3} ours {rate['ours']:8,.0f} tokens/s, transformers "
                  f"{rate['transformers']:8,.0f}: {rate['ours'] / rate['transformers']:.2f} times; "
                  f"{same} of {B} texts the same", flush=True)


if __name__ == "__main__":
    main()
