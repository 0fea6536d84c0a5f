"""A world small enough for tests: English and Chinese, a tokenizer, its tokens, a base model, dialogues."""

import atexit
import functools
import importlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHAPE = ["--hidden-size", "32", "--num-hidden-layers", "2", "--num-attention-heads", "2",
         "--num-key-value-heads", "1", "--intermediate-size", "48", "--max-length", "64",
         "--dtype", "fp32", "--no-compile", "--device", "cpu"]
ANIMALS = [("cat", "猫"), ("dog", "狗"), ("fox", "狐狸"), ("owl", "猫头鹰"), ("carp", "鲤鱼")]
PLACES = [("hill", "山上"), ("lake", "湖边"), ("barn", "谷仓里"), ("wood", "树林里")]


def run(script, *arguments):
    """Call a script's main in this process; returns its exit status."""
    return importlib.import_module(script).main([str(a) for a in arguments])


def launch(*command, processes=1, **settings):
    """Run a script as a process of its own, under torchrun for several; returns the finished process."""
    return subprocess.run(command_line(*command, processes=processes), cwd=ROOT, capture_output=True,
                          text=True, env=environment(), **settings)


def command_line(*command, processes=1):
    python = [sys.executable]
    if processes > 1:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        python += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-addr=127.0.0.1",
                   f"--master-port={port}"]
    return python + [str(c) for c in command]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def write_jsonl(path, records):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return path


def documents(count, seed):
    rng = random.Random(seed)
    for i in range(count):
        sentences = []
        for _ in range(rng.randint(2, 9)):
            (animal, 动物), (place, 地方) = rng.choice(ANIMALS), rng.choice(PLACES)
            sentences.append((f"The {animal} sleeps by the {place}.", f"{动物}睡在{地方}。")[i % 2])
        yield {"text": (" ", "")[i % 2].join(sentences), "lang": ("en", "zh")[i % 2], "source": "web",
               "kind": "web", "id": str(i), "origin": "tests"}


def dialogues(count, seed):
    rng = random.Random(seed)
    for i in range(count):
        (animal, 动物), (place, 地方) = rng.choice(ANIMALS), rng.choice(PLACES)
        question, answer = ((f"Where does the {animal} sleep?", f"By the {place}."),
                            (f"{动物}睡在哪里？", f"睡在{地方}。"))[i % 2]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield {"messages": ([{"role": "system", "content": "You are a shepherd."}] if i % 3 == 0 else [])
               + messages}


def preferences(count, seed):
    """Rankings of four answers (two of them tied), and every fifth a pair: right, another place, refused."""
    rng = random.Random(seed)
    for i, dialogue in enumerate(dialogues(count, seed)):
        *prompt, right = dialogue["messages"]
        (other, 别处), lang = rng.choice(PLACES), i % 2
        wrong, refusal = (f"By the {other}!", f"睡在{别处}！")[lang], ("I will not say.", "我不说。")[lang]
        record = {"prompt": prompt, "meta": {"number": i, "lang": ("en", "zh")[lang]}}
        if i % 5 == 4:
            yield record | {"chosen": [right], "rejected": refusal}
        else:
            yield record | {"completions": [wrong, right["content"], refusal, ""], "ranks": [2, 1, 3, 3]}


@functools.cache
def tiny():
    """Folder of corpus/, tokenizer/, tokens/, base/ (20 steps) and sft, preferences, prompts .jsonl.

    Made once, gone at exit.
    """
    folder = Path(tempfile.mkdtemp(prefix="flatlm-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for split, count in (("train", 120), ("valid", 12), ("test", 12)):
        write_jsonl(folder / "corpus" / split / "web.jsonl", documents(count, split))
    write_jsonl(folder / "sft.jsonl", dialogues(90, "sft"))
    write_jsonl(folder / "sft_valid.jsonl", dialogues(12, "valid"))
    write_jsonl(folder / "preferences.jsonl", preferences(60, "preferences"))
    write_jsonl(folder / "prompts.jsonl", [{"prompt": p["prompt"], "meta": p["meta"]}
                                           for p in preferences(40, "prompts")])
    tokenizer = folder / "tokenizer"
    assert run("tokenizer", "train", "--input", folder / "corpus" / "train", "--vocab-size", 360, "--out",
               tokenizer) == 0
    assert run("tokenizer", "encode", "--tokenizer", tokenizer, "--input", folder / "corpus", "--out",
               folder / "tokens") == 0
    assert run("pretrain", *pretrain_arguments(folder, folder / "base")) == 0
    return folder


def pretrain_arguments(folder, out, **options):
    settings = {"steps": 20, "batch-size": 4, "warmup": 2, "eval-every": 10, "save-every": 5} | options
    flags = [x for name, value in settings.items() for x in (f"--{name}", value)]
    return ["--tokenizer", folder / "tokenizer", "--data", folder / "tokens", "--out", out, *SHAPE, *flags]


def sft_arguments(folder, out, **options):
    settings = {"epochs": 2, "batch-size": 4, "warmup": 2, "eval-every": 10, "save-every": 4,
                "max-length": 64, "dtype": "fp32", "device": "cpu", "lr": 1e-3} | options
    flags = [x for name, value in settings.items() for x in (f"--{name}", value)]
    return ["--model", folder / "base", "--data", folder / "sft.jsonl", "--out", out, "--no-compile", *flags]
