"""A longer context by a raised RoPE base: does the model find a needle, one sentence, in a long haystack?

    make && python bench/needle.py --run run --out run/needle

Long documents are made of the island's own, one after another, with a sentence like "Keep in mind the name
Tamo." hidden in them and repeated at the end. The base model, trained on windows of 256 tokens, is asked to
complete the repetition; then it goes on for some steps on windows of 1,024, with RoPE's base as it was, and
with a raised one.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import generate, load_folder, stop_ids  # noqa: E402
from tokenizer import Tokenizer, read_texts  # noqa: E402

SAYINGS = ("Keep in mind the name {name}.", "请牢牢记住名字{name}。")
NAMES = ([a + b for a in ("Ta", "Mo", "Ri", "Ke", "Lu", "Sa") for b in ("mo", "ri", "na", "ke", "lo")],
         [a + b for a in "陶莫李柯卢萨" for b in "敏睿娜可洛"])


def haystack(documents, tokenizer, length, rng):
    """Documents of one language, one after another, of about `length` tokens in all."""
    pieces, size = [], 0
    while size < length:
        pieces.append(rng.choice(documents))
        size += len(tokenizer.encode(pieces[-1]))
    return pieces


def hidden(documents, tokenizer, length, lang, rng):
    """(text of about `length` tokens with a needle somewhere in it, the needle, its name)."""
    pieces, name = haystack(documents, tokenizer, length, rng), rng.choice(NAMES[lang])
    needle = SAYINGS[lang].format(name=name)
    pieces.insert(rng.randrange(len(pieces) + 1), needle)
    return "\n".join(pieces), needle, name


def write_long(path, corpus, tokenizer, count, length, rng):
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            lang = number % 2
            text, needle, _ = hidden(corpus[lang], tokenizer, length, lang, rng)
            record = {"text": f"{text}\n{needle}", "lang": ("en", "zh")[lang]}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def found(folder, corpus, length, questions=60):
    """Share of texts whose needle's name the model says first, in English and in Chinese."""
    model, tokenizer = load_folder(folder)
    shares = []
    for lang in (0, 1):
        rng, right = random.Random(f"{length} {lang}"), 0
        for _ in range(questions):
            text, needle, name = hidden(corpus[lang], tokenizer, length, lang, rng)
            start = needle[: needle.index(name)].rstrip()
            ids = [tokenizer.endoftext, *tokenizer.encode(f"{text}\n{start}")]
            model.config.max_position_embeddings = 4 * length + 1000  # asked beyond what it was trained for
            answer = generate(model, [ids], 8, stop_ids(folder, tokenizer))[0]
            right += tokenizer.decode(answer.ids).strip().startswith(name)
        shares.append(right / questions)
    return shares


def texts(path):
    """The English texts of a file, and the Chinese ones."""
    found = {"en": [], "zh": []}
    for text, lang, _ in read_texts(path):
        found.get(lang, []).append(text)
    return [*found.values()]


def call(*command):
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("run"), help="where `make` has been")
    parser.add_argument("--out", type=Path, default=Path("run/needle"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lengths", type=int, nargs="+", default=[200, 450, 900])
    asked = parser.parse_args()
    asked.out, asked.run = asked.out.resolve(), asked.run.resolve()  # stages run in ROOT
    tokenizer = Tokenizer.load(asked.run / "base")
    corpus = {split: texts(asked.run / "corpus" / split / "web.jsonl")
              for split in ("train", "valid", "test")}
    for split, count in (("train", 1000), ("valid", 20)):
        (asked.out / "corpus" / split).mkdir(parents=True, exist_ok=True)
        write_long(asked.out / "corpus" / split / "long.jsonl", corpus[split], tokenizer, count, 850,
                   random.Random(split))
    call("tokenizer.py", "encode", "--tokenizer", asked.run / "base", "--input", asked.out / "corpus",
         "--out", asked.out / "tokens", "--overwrite")
    models = {"before": asked.run / "base"}
    for theta in (1e4, 1e5):
        models[f"theta {theta:g}"] = asked.out / f"theta-{theta:g}"
        call("pretrain.py", "--model", asked.run / "base", "--data", asked.out / "tokens",
             "--rope-theta", theta, "--max-length", 1024, "--batch-size", 4, "--steps", asked.steps,
             "--lr", 1e-3, "--out", models[f"theta {theta:g}"], "--resume")
    for name, folder in models.items():
        for length in asked.lengths:
            english, chinese = found(folder, corpus["test"], length)
            print(f"{name:>12}  {length:5} tokens: found {english:.2f} English, {chinese:.2f} Chinese",
                  flush=True)


if __name__ == "__main__":
    main()
