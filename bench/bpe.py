"""tokenizer.py beside tokenizers, rustbpe, tiktoken and minbpe: the same text, by turns, a new process each.

    python bench/bpe.py FOLDER [--megabytes 8] [--vocab-size 16384] [--rounds 3]     # .txt and .jsonl
    python bench/bpe.py FOLDER --scaling                    # how training grows with text and merges

A peer that is not installed is written as not measured. minbpe gets a part of the text, and of the merges,
since it takes so long: its speed is flattered. Memory is a process's peak.
On a machine that does other work beside, only the column of CPU seconds says anything.
"""

import argparse
import importlib.metadata
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tokenizer  # noqa: E402

MINBPE_TRAINS, MINBPE_MERGES, MINBPE_ENCODES = 20_000, 128, 50_000  # bytes, merges, bytes


def read(folder, most):
    """Texts of a folder, `most` bytes in all: of each file an equal share, or all that it has."""
    files, texts = tokenizer.text_files([folder]), []
    files.sort(key=lambda path: path.stat().st_size)
    for i, path in enumerate(files):
        share = most // (len(files) - i)
        for text, _, size in tokenizer.read_texts(path):
            if share <= 0:
                break
            texts.append(text)
            share, most = share - size, most - size
    return texts


def first(texts, most):
    """The beginning of the texts, cut to about so many bytes."""
    joined = "\n".join(texts).encode()[:most]
    return joined.decode("utf-8", "ignore")


def train_ours(texts, size, _):
    tokenizer.train_merges(tokenizer.count_words(texts), size)


def train_tokenizers(texts, size, _):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    theirs = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(tokenizer.QWEN2_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    theirs.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=tokenizer.SPECIAL_TOKENS, show_progress=False))


def train_rustbpe(texts, size, _):
    import rustbpe

    rustbpe.Tokenizer().train_from_iterator(iter(texts), size - 20, pattern=tokenizer.QWEN2_PATTERN)


def train_minbpe(texts, size, _):
    from minbpe import RegexTokenizer

    RegexTokenizer(tokenizer.QWEN2_PATTERN).train(first(texts, MINBPE_TRAINS), 256 + MINBPE_MERGES)


def encode_ours(texts, _, folder):
    ours = tokenizer.Tokenizer.load(folder)
    yield
    for i in range(0, len(texts), 200):
        ours.encode_batch(texts[i : i + 200])


def encode_ours_warm(texts, _, folder):
    ours = tokenizer.Tokenizer.load(folder)
    ours.encode_batch(texts)
    yield
    ours.encode_batch(texts)


def encode_ours_files(texts, _, folder):
    """`tokenizer.py encode` with two processes, the files read and written and all."""
    for source in range(4):
        path = folder / "corpus" / "train" / f"{source}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[source::4]))
    tokenizer.PARALLEL_BYTES = 0
    yield
    tokenizer.main(["encode", "--tokenizer", str(folder), "--input", str(folder / "corpus"), "--overwrite",
                    "--out", str(folder / "tokens")])


def encode_tokenizers(texts, _, folder):
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    yield
    theirs.encode_batch(texts)


def encode_tiktoken(texts, _, folder):
    import tiktoken

    ours = tokenizer.Tokenizer.load(folder)
    ranks = {data: id - 20 for id, data in ours.bytes_of.items() if id >= 20}
    theirs = tiktoken.Encoding("ours", pat_str=ours.pattern, mergeable_ranks=ranks, special_tokens={})
    yield
    for text in texts:
        theirs.encode_ordinary(text)


def encode_minbpe(texts, _, folder):
    from minbpe import RegexTokenizer

    ours = tokenizer.Tokenizer.load(folder)
    theirs = RegexTokenizer(ours.pattern)
    bytes_first = {id: byte for byte, id in enumerate(ours.byte_ids)}
    name = {id: bytes_first.get(id, id - 20) for id in ours.bytes_of}
    theirs.merges = {(name[a], name[b]): name[made] for (a, b), (_, made) in ours.merge_of.items()}
    yield
    theirs.encode_ordinary(first(texts, MINBPE_ENCODES))


JOBS = {"train ours": train_ours, "train tokenizers": train_tokenizers, "train rustbpe": train_rustbpe,
        "train minbpe": train_minbpe, "encode ours": encode_ours, "encode ours, warm": encode_ours_warm,
        "encode ours, files, 2 processes": encode_ours_files, "encode tokenizers, batch": encode_tokenizers,
        "encode tiktoken, 1 thread": encode_tiktoken, "encode minbpe": encode_minbpe}


def cpu_seconds():
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def memory():
    """The most MB that this process has held (on Linux, getrusage counts the one that started it, too)."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1e3


def run_job(options):
    """One measurement, in this process: prints {seconds, cpu_seconds, bytes, megabytes} as JSON."""
    texts, work = read(options.folder, int(options.megabytes * 1e6)), JOBS[options.job]
    size = sum(len(text.encode()) for text in texts)
    size = {train_minbpe: MINBPE_TRAINS, encode_minbpe: MINBPE_ENCODES}.get(work, size)
    result = work if options.job.startswith("train") else work(texts, options.vocab_size, options.vocabulary)
    if options.job.startswith("encode"):
        next(result)  # preparations
    start, used = time.perf_counter(), cpu_seconds()
    if options.job.startswith("encode"):
        next(result, None)
    else:
        work(texts, options.vocab_size, options.vocabulary)
    spent = time.perf_counter() - start
    used = cpu_seconds() - used
    print("\n" + json.dumps({"seconds": spent, "cpu_seconds": used, "bytes": size, "megabytes": memory()}))


def measure(job, arguments):
    """The last line of a new process that runs a job, or None where the peer is not installed."""
    command = [sys.executable, __file__, "--job", job, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if "ModuleNotFoundError" in done.stderr:
        return None
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def table(options, folder):
    arguments = [options.folder, "--megabytes", str(options.megabytes), "--vocabulary", str(folder),
                 "--vocab-size", str(options.vocab_size)]
    found = {job: [] for job in JOBS}
    for _ in range(options.rounds):
        for job in JOBS:
            found[job].append(measure(job, arguments))
            print(job, found[job][-1], file=sys.stderr)
    print("| | MB/s, best | median | to ours | MB a CPU second | MB of memory |\n|---|---|---|---|---|---|")
    for job, runs in found.items():
        if runs[0] is None:
            print(f"| {job} | not measured: not installed | | | | |")
            continue
        speed = [run["bytes"] / run["seconds"] / 1e6 for run in runs]
        ours = [run["bytes"] / run["seconds"] / 1e6 for run in found[job.split()[0] + " ours"]]
        ratio = statistics.median(a / b for a, b in zip(speed, ours))
        by_cpu = statistics.median(run["bytes"] / run["cpu_seconds"] / 1e6 for run in runs)
        print(f"| {job} | {max(speed):.3g} | {statistics.median(speed):.3g} | {ratio:.2g} | {by_cpu:.3g} "
              f"| {statistics.median(run['megabytes'] for run in runs):.0f} |")


def scaling(options):
    print("| MB of text | tokens | counting, s | merging, s |\n|---|---|---|---|")
    every = read(options.folder, 1 << 40)
    sizes = [(1, 32768), (3, 32768), (10, 32768), (30, 32768)] + [(10, 1 << power) for power in range(10, 17)]
    for megabytes, vocab_size in sizes:
        texts = read(options.folder, int(megabytes * 1e6)) if megabytes < 30 else every
        size = sum(len(text.encode()) for text in texts) / 1e6
        start = time.perf_counter()
        counts = tokenizer.count_words(texts)
        counted = time.perf_counter()
        merges = tokenizer.train_merges(counts, vocab_size)
        print(f"| {size:.1f} | {len(merges) + tokenizer.FIRST_MERGE:,} | {counted - start:.1f} "
              f"| {time.perf_counter() - counted:.1f} |", flush=True)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder")
    parser.add_argument("--megabytes", type=float, default=8)
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        return run_job(options)
    if options.scaling:
        return scaling(options)
    for name in ("tokenizers", "rustbpe", "tiktoken", "numpy", "regex"):
        try:
            print(name, importlib.metadata.version(name), end="; ")
        except importlib.metadata.PackageNotFoundError:
            pass
    print(f"{options.megabytes} MB of text, vocabulary {options.vocab_size}")
    with tempfile.TemporaryDirectory() as folder:
        counts = tokenizer.count_words(read(options.folder, int(options.megabytes * 1e6)))
        tokenizer.Tokenizer.from_merges(tokenizer.train_merges(counts, options.vocab_size)).save(folder)
        table(options, folder)


if __name__ == "__main__":
    main()
