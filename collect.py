"""collect.py: preferences. Answers sampled from a model, some written ones among them, ranked by a scorer.

    python collect.py --model run/sft --data prompts.jsonl --k 4 --scorer data/island.py:annotate \\
        --out run/preferences.jsonl                        # a line a prompt: completions and their ranks
    python collect.py ... --written written.jsonl          # half of the answers are drawn from written ones
    python collect.py ... --pairs                          # a line a pair: chosen and rejected

reward.py and dpo.py read either. The scorer stands for whoever judges: `(prompt, answer, meta) -> {name:
number}`, of which --key is the score; a larger score is a better rank, equal scores share one. What is
sampled depends on --seed, --k and the prompt's place among those that are answered, not on batches or ranks.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from tqdm import tqdm

from model import DTYPES, generate, load_folder, process_group, say, stop_ids, write_json
from tokenizer import (InputError, encode_chat, held_out, jsonl_files, load_scorer, name_of, one_line_errors,
                       option, parse_options, prompt_messages, read_jsonl, reasons, write_whole)


@dataclass(kw_only=True)
class Options:
    """Sample answers to prompts, mix in written ones, rank them all by a scorer."""

    model: str = option("checkpoint folder to sample from")
    data: list[str] = option("JSONL files with `prompt`, or folders of them")
    out: str = option("JSONL file to write; the same name ending in .run.json tells how it was made")
    scorer: str = option("file.py:function, (prompt, answer, meta) -> dict of numbers")
    key: str = option("which of the scorer's numbers ranks the answers", "gold")
    train_part: bool = option("leave out the prompts that reward.py and dpo.py hold out by hash", False)
    k: int = option("answers a prompt", 4, at_least=2)
    written: str = option("JSONL file with `prompt` and `completions`; half of the answers are from it", "")
    pairs: bool = option("write every pair of unequal answers, instead of a ranking a prompt", False)
    skip_bad: bool = option("count malformed lines and go on, instead of stopping at the first", False)
    limit: int | None = option("take only the first so many prompts", None, at_least=1)
    temperature: float = option("of the sampling; 0 always takes the likeliest token", 1.0, at_least=0)
    max_new_tokens: int = option("most tokens in an answer; it is cut there", 64, at_least=1)
    batch_size: int = option("answers sampled at a time, on one rank", 128, at_least=1)
    seed: int = option("seed of the sampling and of the choice among written answers", 1, at_least=0)
    dtype: str = option("of the weights; fp32 keeps samples alike for any batch", "fp32", list(DTYPES))
    device: str = option("auto, cpu, cuda or mps", "auto")
    overwrite: bool = option("replace a finished --out", False)


@dataclass
class Item:
    """A prompt as it was given, and as ids; the written answers drawn for it; where it stands."""

    prompt: str | list
    meta: dict | None
    ids: list[int]
    written: list[str]
    place: str


# ---------------------------------------------------------------------------------------------------------
# Data: JSONL -> prompts, each with the written answers drawn for it


def read_written(files):
    """{name of a prompt: its written answers, each once}."""
    written = {}
    for file in files:
        for number, record in read_jsonl(file):
            try:
                messages, answers = prompt_messages(record), record.get("completions")
                if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
                    raise InputError("`completions` must be a list of texts")
            except InputError as error:
                raise InputError(f"{file}:{number}: {error}") from None
            known = written.setdefault(name_of(messages), [])
            known += [a for a in dict.fromkeys(answers) if a not in known]
    return written


def read_items(options, tokenizer, room, counts):
    """The first --limit prompts as Items. One that leaves no room for an answer is left out and counted."""
    written = read_written(jsonl_files([options.written])) if options.written else {}
    items = []
    for file in jsonl_files(options.data):
        for number, record in read_jsonl(file, counts if options.skip_bad else None):
            if counts["prompts"] == options.limit:
                break
            place = f"{file}:{number}"
            try:
                messages = prompt_messages(record)
                ids, _ = encode_chat(tokenizer, messages, generation_prompt=True)
            except InputError as error:
                if not options.skip_bad:
                    raise InputError(f"{place}: {error} (--skip-bad goes on without such lines)") from None
                counts["bad"] += 1
                continue
            if options.train_part and held_out(messages):
                counts["held_out"] += 1
                continue
            counts["prompts"] += 1
            if len(ids) > room:
                counts["too_long"] += 1
                continue
            name = name_of(messages)
            drawn = draw_written(written.get(name, []), options.k, options.seed, name)
            items.append(Item(record["prompt"], record.get("meta"), ids, drawn, place))
    if not items:
        raise InputError(f"{' '.join(options.data)}: no prompt to answer ({reasons(counts)})")
    if written and not any(item.written for item in items):
        raise InputError(f"{options.written}: has no answer to any prompt of {' '.join(options.data)}")
    return items


def draw_written(answers, k, seed, name):
    """Half of k answers (odd k: the smaller half) from the written ones, by seed and prompt only."""
    return Random(f"written {seed} {name}").sample(answers, min(k // 2, len(answers)))


# ---------------------------------------------------------------------------------------------------------
# Sampling and ranking


def sample_answers(model, tokenizer, items, stop, options, ranks):
    """(text, whether it ended) of as many samples for each item as are missing to k, the same on all ranks.

    Answer j to item i is row i k + j of the sampling. A batch holds prompts of like length: little padding;
    ranks take batches in turn.
    """
    rows = [(i, j) for i, item in enumerate(items) for j in range(options.k - len(item.written))]
    rows.sort(key=lambda row: len(items[row[0]].ids))
    batches = [rows[i : i + options.batch_size] for i in range(0, len(rows), options.batch_size)]
    texts = {}
    for batch in tqdm(batches[ranks.rank :: ranks.world_size], "sampling", unit="batch", disable=None):
        prompts = [items[i].ids for i, _ in batch]
        samples = generate(model, prompts, options.max_new_tokens, stop, temperature=options.temperature,
                           seed=options.seed, rows=[i * options.k + j for i, j in batch])
        for row, sample in zip(batch, samples):
            text = tokenizer.decode(sample.ids[:-1] if sample.finished else sample.ids)
            texts[row] = text, sample.finished
    texts = {row: text for share in ranks.gather(texts) for row, text in share.items()}
    return [[texts[i, j] for j in range(options.k - len(item.written))] for i, item in enumerate(items)]


def score_answers(item, answers, score, key):
    """The scorer's number for each answer of an item; InputError where it fails or gives none."""
    scores = []
    for answer in answers:
        try:
            value = float(score(item.prompt, answer, item.meta or {})[key])
            if not math.isfinite(value):
                raise ValueError(f"{key} is {value}")
        except Exception as error:  # the scorer is the user's: whatever it raises is told in one line
            raise InputError(f"{item.place}: the scorer failed on {answer!r:.80}: {error!r}") from None
        scores.append(value)
    return scores


def ranks_of(scores):
    """[.5, 1, 0, .5] -> [2, 1, 4, 2]: one more than the number of better ones, so equal scores tie."""
    return [1 + sum(other > score for other in scores) for score in scores]


def as_ranking(item, answers, ranks):
    meta = {} if item.meta is None else {"meta": item.meta}
    return [{"prompt": item.prompt, "completions": answers, "ranks": ranks, **meta}]


def as_pairs(item, answers, ranks):
    """Every pair of unequal answers. Silence is chosen in none: nobody would learn to say it."""
    meta = {} if item.meta is None else {"meta": item.meta}
    return [{"prompt": item.prompt, "chosen": better, "rejected": worse, **meta}
            for better, high in zip(answers, ranks) for worse, low in zip(answers, ranks)
            if high < low and better.strip()]


def rank_answers(items, sampled, score, options, counts):
    """The records to write, in the items' order; counts what is left out, and the mean scores by origin.

    An answer that --max-new-tokens cut off comes last whatever its score: to whoever reads the record it is
    a whole one, and if it were chosen a model would learn to stop there.
    """
    records, totals = [], {"sampled": [], "written": []}
    for item, samples in zip(items, sampled):
        texts = [text for text, _ in samples]
        whole = {text for text, ended in samples if ended} | set(item.written)
        answers = list(dict.fromkeys(texts + item.written))  # distinct, the sampled ones first
        scores = score_answers(item, answers, score, options.key)
        value = dict(zip(answers, scores))
        totals["sampled"] += [value[text] for text in texts]
        totals["written"] += [value[text] for text in item.written]
        counts["cut"] += sum(not ended for _, ended in samples)
        counts["duplicates"] += len(texts) + len(item.written) - len(answers)
        if len(answers) < 2:
            counts["one_answer"] += 1
            continue
        ranks = ranks_of([value[text] if text in whole else -math.inf for text in answers])
        counts["all_tied"] += max(ranks) == 1
        counts["silent"] += options.pairs and any(rank < max(ranks) and not answer.strip()
                                                  for answer, rank in zip(answers, ranks))
        records += (as_pairs if options.pairs else as_ranking)(item, answers, ranks)
    for origin, values in totals.items():
        counts[origin] = len(values)
        counts[f"{origin}_score"] = math.fsum(values) / len(values) if values else None
    counts["records"] = len(records)
    return records


# ---------------------------------------------------------------------------------------------------------
# The run


def collect(options, ranks):
    """The whole run; returns the exit status."""
    began = time.monotonic()
    check_options(options)
    score = load_scorer(options.scorer)
    model, tokenizer = load_folder(options.model, ranks.device, DTYPES[options.dtype])
    room = model.config.max_position_embeddings - options.max_new_tokens
    counts = dict.fromkeys(("prompts", "bad", "held_out", "too_long", "cut", "one_answer", "duplicates",
                            "all_tied", "silent"), 0)
    items = read_items(options, tokenizer, room, counts)
    score_answers(items[0], ["Yes."], score, options.key)  # one that fails is told before the sampling
    stop = stop_ids(options.model, tokenizer) | {tokenizer.endoftext}
    sampling = time.monotonic()
    sampled = sample_answers(model, tokenizer, items, stop, options, ranks)
    rate = sum(map(len, sampled)) / (time.monotonic() - sampling)
    if ranks.first:
        records = rank_answers(items, sampled, score, options, counts)
        seconds = time.monotonic() - began
        write_records(options, records, counts, seconds)
        say(ranks, report(options, counts, seconds, rate))
    return 0


def write_records(options, records, counts, seconds):
    """The file, whole or not at all, then the .run.json that says it is finished."""
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    about = out.with_suffix(".run.json")
    about.unlink(missing_ok=True)
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    # half of a surrogate pair, which only JSON can spell, stays spelled so: \udXXX
    write_whole(out, b"".join(line.encode("utf-8", "backslashreplace") for line in lines))
    settings = {name: value for name, value in asdict(options).items() if name != "overwrite"}
    write_json(about, {"stage": "collect", "options": settings, "counts": counts, "seconds": seconds,
                       "finished": True})


def report(options, counts, seconds, rate):
    """What was written, what was left out, and how good the answers are, in a few lines."""
    def score(origin):
        value = counts[f"{origin}_score"]
        told = "" if value is None else f", mean {options.key} {value:+.3f}"
        return f"{counts[origin]:,} {origin}{told}"

    what = "pairs" if options.pairs else "rankings"
    return (f"{counts['records']:,} {what} of {counts['prompts']:,} prompts in {options.out}, "
            f"{seconds:.1f} s ({rate:.1f} answers/s)\n"
            f"answers: {score('sampled')}; {score('written')}; {counts['duplicates']:,} duplicates gone\n"
            f"cut off by --max-new-tokens, and ranked last: {counts['cut']:,}\n"
            f"left out: {counts['bad']:,} bad prompts, {counts['held_out']:,} held out, "
            f"{counts['too_long']:,} too long, {counts['one_answer']:,} with one answer only; all answers tie "
            f"in {counts['all_tied']:,}; {counts['silent']:,} lost pairs that preferred silence")


def check_options(options):
    """Refuse what cannot work before anything is read or written."""
    out = Path(options.out)
    if out.suffix == ".gz":
        raise InputError(f"--out {out}: it is written as plain text; leave out the .gz")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; name a file")
    if out.exists() and not options.overwrite:
        raise InputError(f"{out}: finished already; --overwrite replaces it")
    inputs = jsonl_files(options.data + ([options.written] if options.written else []))
    if out.resolve() in [file.resolve() for file in inputs]:
        raise InputError(f"--out {out} is one of the files it is made from; choose another --out")


@one_line_errors
def main(argv=None):
    options = parse_options(Options, argv, "collect.py")
    with process_group(options.device) as ranks:
        return collect(options, ranks)


if __name__ == "__main__":
    sys.exit(main())
