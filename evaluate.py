"""evaluate.py: what each stage of training did, measured, and told in one page.

For every checkpoint folder: bits per byte by language on the test split, and greedy answers to all prompts,
judged by a scorer (the island's oracle, or a function of yours). Beside the page lie report.json, the same
figures for machines, and answers/{stage}.jsonl, every answer with its verdict.

    python evaluate.py --model run/base run/sft --data run/tokens --prompts run/island/test.jsonl \\
        --scorer data/island.py:score --out run/report.html
    python evaluate.py --rescore --out run/report.html               # again from the answers: no model runs
    python evaluate.py --summary run*/report.json --out seeds.md     # mean over seeds, and each seed

With --reward and --reference it also tells what alignment did: how well the reward model agrees with the
scorer, what it makes of each stage's answers, how far each stage went from the reference, and what became of
the scorer's reward while PPO chased the model's.

Begin with FIGURES (what is counted) and `figures` (how). Answers are greedy: figures can be had again.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import re
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from tqdm import tqdm

from model import (RewardModel, bits_per_byte, generate, load_folder, process_group, read_json, say, stop_ids,
                   write_json)
from tokenizer import InputError, check_messages, encode_chat, load_scorer, read_jsonl, read_tokens
from tokenizer import one_line_errors, option, parse_options, write_whole

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(kw_only=True)
class Options:
    """Measure checkpoint folders: bits per byte, judged answers, a report with its plots.

    Prompts are JSONL with `prompt`, a message list or a string. A string is asked as a user's message, unless
    its meta.kind is "cloze": then the model continues it as plain text. Without a scorer the oracle's figures
    are null, and the sample prompts are also continued as plain text, which is all a base model has learnt.
    """

    model: list[str] = option("checkpoint folders, in the report's order; a stage has its folder's name", [])
    data: str | None = option("token folder whose test split gives the bits per byte", None)
    prompts: list[str] = option("JSONL files of prompts, or folders of them", [])
    scorer: str | None = option("file.py:function, (prompt, answer, meta) -> dict of numbers", None)
    reward: str | None = option("reward model's folder: it scores the answers, and is itself judged", None)
    reference: str | None = option("folder that the aligned stages started from: the KL to it is told", None)
    ranked: list[str] = option("rankings by the scorer, on which the reward model is judged", [])
    hacking: str | None = option("folder of a PPO run without KL penalty, for the plot", None)
    out: str | None = option("the page to write; report.json and answers/ lie beside it", None)
    rescore: bool = option("make the report at --out again from its answers, with no model", False)
    summary: list[str] = option("report.json files of several seeds: tell mean and values in Markdown", [])
    max_new_tokens: int = option("tokens an answer may have", 64, at_least=1)
    max_length: int = option("tokens in a window, for bits per byte", 256, at_least=1)
    max_windows: int | None = option("windows a shard, for bits per byte; else all", None, at_least=1)
    batch_size: int = option("prompts answered at a time", 128, at_least=1)
    limit: int | None = option("prompts of each kind and language; else all", None, at_least=1)
    samples: int = option("prompts of each language that the page shows with every stage's answer", 20)
    device: str = option("cpu, cuda, mps, or auto", "auto")
    dtype: str = option("of the weights; fp32 keeps greedy answers alike everywhere", "fp32", list(DTYPES))
    overwrite: bool = option("write over a finished report", False)


# ---------------------------------------------------------------------------------------------------------
# What is counted

PLAIN = ("cloze", "continuation")  # kinds that go on with a text; every other kind is a chat
CLOZE_TOKENS = 12  # the value asked for comes first; what follows is another sentence, and only costs time
LANGUAGES = ("en", "zh", "code")
HAN = "\u3400-\u9fff"

# figure -> (kinds of prompt, key of the verdict, what it says, whether more or less is better).
# It is the mean of that key over the answers to those kinds; no kinds: over every chat answer.
FIGURES = {
    "facts_exact": (("facts",), "exact", "facts, asked in new phrasings", "↑"),
    "facts_heldout_entities": (("facts_heldout",), "exact", "facts on entities SFT never asked about", "↑"),
    "facts_cloze": (("cloze",), "exact", "facts, by plain completion", "↑"),
    "format_valid": (("format",), "valid_format", "JSON or code as asked", "↑"),
    "harmful_rate": (("harm_a", "harm_b", "harm_c"), "harmful", "harmful prompts obeyed", "↓"),
    "harmful_rate_a": (("harm_a",), "harmful", "kind A: refused in SFT data", "↓"),
    "harmful_rate_b": (("harm_b",), "harmful", "kind B: only in preferences", "↓"),
    "harmful_rate_c": (("harm_c",), "harmful", "kind C: seen nowhere", "↓"),
    "refusal_rate_a": (("harm_a",), "refused", "kind A refused", "↑"),
    "false_refusal_rate": (("safe",), "false_refusal", "harmless look-alikes refused", "↓"),
    "unknown_admitted": (("unknown",), "exact", "says so where nobody can know", "↑"),
    "made_up_rate": (("facts", "facts_heldout", "unknown"), "made_up", "names a wrong value", "↓"),
    "arithmetic_exact": (("arithmetic",), "exact", "sums", "↑"),
    "gold_reward": ((), "gold", "the scorer's reward, -1 to 1", "↑"),
    "rm_reward": ((), None, "the reward model's score", "↑"),
    "kl_to_sft": ((), None, "nats a token, on own samples", "↓"),
    "distinct_2": ((), None, "different word pairs among all", "↑"),
    "bits_per_byte": ((), None, "on held-out text", "↓"),
}


def figures(answers, bits, divergence):
    """One stage's figures: {"en": {figure: value}, "zh": ..., "code": {"bits_per_byte": value}}.

    answers: judged records; bits: {language: bits per byte}; divergence: {language: KL to the reference}. A
    figure with nothing behind it is None.
    `by_kind`: for each kind of prompt the number of answers, the share that ended by itself, and the mean
    of every key of the verdict.
    """
    stage = {}
    for lang in ("en", "zh"):
        rows = [a for a in answers if a["lang"] == lang]
        chats = [a for a in rows if a["kind"] not in PLAIN]
        values, by_kind = {}, {}
        for name, (kinds, key, _, _) in FIGURES.items():
            own = [a for a in rows if a["kind"] in kinds] if kinds else chats
            values[name] = mean(a["verdict"].get(key) for a in own)
        values["distinct_2"] = distinct_2(a["answer"] for a in chats)
        values["rm_reward"] = mean(a.get("rm_reward") for a in chats)
        values["kl_to_sft"] = divergence.get(lang)
        for kind in sorted({a["kind"] for a in rows}):
            own = [a for a in rows if a["kind"] == kind]
            by_kind[kind] = {"n": len(own), "finished": mean(a["finished"] for a in own)}
            keys = sorted({key for a in own for key in a["verdict"]})
            by_kind[kind] |= {key: mean(a["verdict"].get(key) for a in own) for key in keys}
        stage[lang] = {**values, "bits_per_byte": bits.get(lang), "by_kind": by_kind}
    return {**stage, "code": {"bits_per_byte": bits.get("code")}}


def mean(values):
    """Mean of the values that are there; None of none."""
    values = [float(v) for v in values if v is not None]
    return math.fsum(values) / len(values) if values else None


def distinct_2(texts):
    """Different bigrams over all texts, divided by their number (Li et al. 2016); None without bigrams.

    Units are words, single Chinese characters and marks, not tokens: models of any tokenizer compare. It
    falls as texts are added, so compare stages on the same prompts only.
    """
    bigrams = []
    for text in texts:
        units = re.findall(rf"[{HAN}]|[^\W{HAN}]+|[^\w\s]", text.lower())
        bigrams += zip(units, units[1:])
    return len(set(bigrams)) / len(bigrams) if bigrams else None


# ---------------------------------------------------------------------------------------------------------
# Prompts


def read_prompts(paths, limit=None):
    """Items {"prompt", "meta", "kind", "lang"} of JSONL files, or of folders of them, in sorted order.

    limit keeps the first so many of each kind and language. Raises InputError naming file and line.
    """
    items, count = [], {}
    for path in map(Path, paths):
        folder = sorted(p for p in path.rglob("*") if p.name.endswith((".jsonl", ".jsonl.gz")))
        for file in folder if path.is_dir() else [path]:
            for number, record in read_jsonl(file):
                item = read_item(record, f"{file}:{number}")
                group = item["kind"], item["lang"]
                count[group] = count.get(group, 0) + 1
                if limit is None or count[group] <= limit:
                    items.append(item)
    if not items:
        raise InputError(f"--prompts {' '.join(paths)}: no prompts; expected .jsonl lines with `prompt`")
    return items


def read_item(record, where):
    """A line of a prompts file, checked. kind: meta.kind or chat; lang: meta.lang, lang, or by letters."""
    prompt, meta = record.get("prompt"), record.get("meta", {})
    if not isinstance(meta, dict):
        raise InputError(f"{where}: meta must be an object")
    kind, lang = str(meta.get("kind") or "chat"), meta.get("lang") or record.get("lang")
    if kind in PLAIN and isinstance(prompt, list):
        raise InputError(f"{where}: a prompt of kind {kind} is a text to go on with, so a string")
    messages = messages_of(prompt)
    try:
        check_messages(messages)
    except InputError as error:
        raise InputError(f"{where}: prompt: {error}") from None
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise InputError(f"{where}: a prompt ends with what a user says, and it is not empty")
    if lang not in ("en", "zh"):
        lang = "zh" if re.search(f"[{HAN}]", messages[-1]["content"]) else "en"
    return {"prompt": prompt, "meta": meta, "kind": kind, "lang": lang}


def messages_of(prompt):
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


def key_of(item):
    return item["kind"], json.dumps(item["prompt"], ensure_ascii=False)


def choose_samples(items, count):
    """`count` items of each language, taken in turn from its kinds; in each kind by the prompt's hash.

    So a sample is neither picked by hand nor the file's beginning, and it is the same at every run.
    """
    chosen = []
    for lang in ("en", "zh"):
        own = {key_of(i): i for i in items if i["lang"] == lang and i["kind"] != "continuation"}
        turns, turn = [], {}
        for key in sorted(own, key=lambda key: hashlib.sha256(repr(key).encode()).hexdigest()):
            turn[key[0]] = turn.get(key[0], 0) + 1
            turns.append((turn[key[0]], key))
        picked = sorted(sorted(turns)[:count], key=lambda pair: (pair[1][0], pair[0]))  # kind by kind
        chosen += [own[key] for _, key in picked]
    return chosen


def continuations(samples):
    """The sample chats of a single message, to be continued as plain text."""
    single = [s for s in samples if s["kind"] not in PLAIN and len(messages_of(s["prompt"])) == 1]
    return [{**s, "prompt": messages_of(s["prompt"])[0]["content"], "kind": "continuation"} for s in single]


# ---------------------------------------------------------------------------------------------------------
# Answers and verdicts


def encode_prompt(tokenizer, item):
    """Ids of a prompt: <|endoftext|> + text where the model goes on with it, else a chat up to the answer."""
    if item["kind"] in PLAIN:
        return [tokenizer.endoftext, *tokenizer.encode(item["prompt"])]
    return encode_chat(tokenizer, messages_of(item["prompt"]), generation_prompt=True)[0]


def answer_prompts(model, tokenizer, items, stop, options, ranks, name=""):
    """Greedy answers: items with "answer" (text) and "finished" (it ended by itself), in the items' order.

    A batch holds prompts of a kind and like length: little padding, and answers that end at about the same
    time; ranks take batches in turn. A prompt with no room for an answer in the context is left out.
    """
    encoded = [encode_prompt(tokenizer, item) for item in items]
    room = model.config.max_position_embeddings - options.max_new_tokens
    order = sorted(range(len(items)), key=lambda i: (items[i]["kind"], len(encoded[i])))
    batches, size, answers = [], options.batch_size, {}
    for cloze in (True, False):
        own = [i for i in order if (items[i]["kind"] == "cloze") == cloze and len(encoded[i]) <= room]
        tokens = min(options.max_new_tokens, CLOZE_TOKENS) if cloze else options.max_new_tokens
        batches += [(own[first : first + size], tokens) for first in range(0, len(own), size)]
    for batch, tokens in tqdm(batches[ranks.rank :: ranks.world_size], name, disable=None, leave=False):
        for i, sample in zip(batch, generate(model, [encoded[i] for i in batch], tokens, stop)):
            text = tokenizer.decode(sample.ids[:-1] if sample.finished else sample.ids)
            answers[i] = {**items[i], "answer": text, "finished": sample.finished}
    if ranks.world_size > 1:
        shares = [None] * ranks.world_size
        dist.all_gather_object(shares, answers)
        answers = {i: a for share in shares for i, a in share.items()}
    return [answers[i] for i in sorted(answers)]


def judge(answers, score):
    """Put the scorer's verdict, {key: number}, into every answer; {} without a scorer."""
    for a in answers:
        try:
            asked = score and a["kind"] != "continuation"
            verdict = score(a["prompt"], a["answer"], a["meta"]) if asked else {}
            a["verdict"] = {key: float(value) for key, value in verdict.items()}
            if not all(map(math.isfinite, a["verdict"].values())):
                raise ValueError(f"not finite: {verdict}")
        except Exception as error:
            raise InputError(f"the scorer failed on {key_of(a)[1][:160]}: {error!r}") from None
    return answers


def run_stage(name, folder, items, options, judges, ranks):
    """Load a checkpoint folder: (answers, not judged yet; {language: bits per byte} and KLs, on rank 0)."""
    began = time.perf_counter()
    model, tokenizer = load_folder(folder, ranks.device, DTYPES[options.dtype])
    shards = read_tokens(options.data, "test", tokenizer) if options.data and ranks.first else []
    bits = bits_per_byte(model, tokenizer, shards, options.max_length, max_windows=options.max_windows)
    stop = stop_ids(folder, tokenizer) | {tokenizer.endoftext}
    answers = answer_prompts(model, tokenizer, items, stop, options, ranks, name)
    divergence = {}
    if ranks.first:
        add_reward(answers, judges, options.batch_size)
        divergence = kl_to_reference(model, tokenizer, folder, items, stop, options, judges)
    left_out = len(items) - len(answers)
    note = f"; left out {left_out} prompts too long for its context" if left_out else ""
    say(ranks, f"{name}: {len(answers)} answers in {time.perf_counter() - began:.1f} s{note}")
    return answers, bits, divergence


# ---------------------------------------------------------------------------------------------------------
# Alignment: the reward model's scores, KL to the reference, agreement with the scorer, PPO's samples

KL_PROMPTS = 200  # of each language


@dataclass
class Judges:
    """The models that stages are measured with, (model, tokenizer) each; None where not asked for."""

    reward: tuple | None
    reference: tuple | None
    reference_folder: Path | None


def load_judges(options, device):
    reward = load_folder(options.reward, device, kind=RewardModel) if options.reward else None
    reference = load_folder(options.reference, device) if options.reference else None
    return Judges(reward, reference, Path(options.reference).resolve() if options.reference else None)


@torch.inference_mode()
def reward_scores(judge, dialogues, batch_size):
    """The reward model's score of each dialogue, (prompt, answer, whether the answer ended): floats.

    It is read at the last token: at the <|im_end|>, or where an answer was cut off.
    """
    model, tokenizer = judge
    device, rows = next(model.parameters()).device, []
    for prompt, answer, ended in dialogues:
        ids, _ = encode_chat(tokenizer, [*messages_of(prompt), {"role": "assistant", "content": answer}])
        rows.append(ids if ended else ids[:-1])
    order, scores = sorted(range(len(rows)), key=lambda i: len(rows[i])), {}
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        ids, last = pad_right([rows[i] for i in batch], tokenizer.pad, device)  # (B, T), (B,)
        found = model(ids).gather(1, last[:, None])[:, 0]  # (B,)
        scores |= dict(zip(batch, found.tolist()))
    return [scores[i] for i in range(len(rows))]


def pad_right(rows, pad, device):
    """Rows of ids -> ids (B, T), and the place of each row's last token (B,)."""
    ids = torch.full((len(rows), max(map(len, rows))), pad)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = torch.tensor(row)
    return ids.to(device), torch.tensor([len(row) - 1 for row in rows], device=device)


def add_reward(answers, judges, batch_size):
    """Put the reward model's score into every chat answer, as rm_reward."""
    chats = [a for a in answers if a["kind"] not in PLAIN] if judges.reward else []
    asked = [(a["prompt"], a["answer"], a["finished"]) for a in chats]
    for a, value in zip(chats, reward_scores(judges.reward, asked, batch_size) if asked else []):
        a["rm_reward"] = value


def kl_to_reference(model, tokenizer, folder, items, stop, options, judges):
    """{language: mean KL(stage || reference) a token, in nats}, over the whole vocabulary.

    Over answers that the stage itself samples at temperature 1, to prompts that are the same for every stage.
    A model from pretrain.py does not chat: none. The reference itself: 0.
    """
    if not judges.reference or read_if_there(folder / "run.json").get("stage") == "pretrain":
        return {}
    divergence = {}
    for lang in ("en", "zh"):
        own = [i for i in items if i["lang"] == lang and i["kind"] not in PLAIN]
        own = sorted(own, key=lambda i: hashlib.sha256(repr(key_of(i)).encode()).hexdigest())[:KL_PROMPTS]
        if folder.resolve() == judges.reference_folder:
            divergence[lang] = 0.0
        elif own:
            divergence[lang] = kl_of_samples(model, judges.reference[0], tokenizer, own, stop, options)
    return divergence


@torch.inference_mode()
def kl_of_samples(model, reference, tokenizer, items, stop, options):
    """Mean over the tokens of answers of sum_v p(v) (log p(v) - log q(v)): p the model's, q the reference's.
    """
    device, total, tokens = next(model.parameters()).device, 0.0, 0
    prompts = sorted((encode_prompt(tokenizer, item) for item in items), key=len)
    for first in range(0, len(prompts), 32):
        batch = prompts[first : first + 32]
        rows = range(first, first + len(batch))
        samples = generate(model, batch, options.max_new_tokens, stop, temperature=1.0, rows=rows)
        ids, _ = pad_right([p + s.ids for p, s in zip(batch, samples)], tokenizer.pad or 0, device)  # (B, T)
        own, other = (m(ids).float().log_softmax(-1) for m in (model, reference))  # (B, T, V)
        kl = (own.exp() * (own - other)).sum(-1)  # (B, T): at t, of the token t + 1
        for b, (prompt, s) in enumerate(zip(batch, samples)):
            total += kl[b, len(prompt) - 1 : len(prompt) - 1 + len(s.ids)].sum().item()
            tokens += len(s.ids)
    return total / max(tokens, 1)


# The pairs of answers that by_kind counts: of which prompts, what is true of the better and of the worse one.
PAIRS = {
    "harm": (("harm_a", "harm_b"), "refused", "harmful"),
    "harm_c": (("harm_c",), "refused", "harmful"),  # a kind that no preference ever showed
    "safe": (("safe",), "exact", "false_refusal"),
    "facts": (("facts", "facts_heldout", "multi"), "exact", "made_up"),
    "format": (("format",), "valid_format", None),
    "language": (None, "right_language", None),
    "unknown": (("unknown",), "exact", None),
}


def untied(ranks):
    """Index pairs (better, worse) of a ranking; ties make none."""
    return [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b]


def agreement(margins):
    """Share of margins above 0, where 0 counts half; None of none."""
    return mean(0.5 * (1 + (m > 0) - (m < 0)) for m in margins)


def judge_reward(options, judges, score):
    """{language: how the reward model agrees with the scorer's rankings and with its own held-out labels}.

    gold_accuracy and by_kind: over the untied pairs of --ranked, whose ranks are the scorer's own.
    heldout_accuracy and the calibration error: over the pairs that reward.py held out, with their own labels.
    Also the calibration's bins, [confidence, share that was right, pairs].
    """
    held_out, ranked = defaultdict(list), defaultdict(list)  # language: margins; (language, kind): margins
    path = Path(options.reward) / "valid.jsonl"
    for _, record in read_jsonl(path) if path.is_file() else ():
        scores = record["scores"]
        held_out[lang_of(record)] += [scores[i] - scores[j] for i, j in untied(record["ranks"])]
    records = [r for file in options.ranked for _, r in read_jsonl(Path(file))]
    asked = [(r["prompt"], answer, True) for r in records for answer in r["completions"]]
    scores = iter(reward_scores(judges.reward, asked, options.batch_size) if asked else [])
    for record in records:
        own, lang = [next(scores) for _ in record["completions"]], lang_of(record)
        meta = record.get("meta", {})
        verdicts = [score(record["prompt"], a, meta) if score else {} for a in record["completions"]]
        ranked[lang, "all"] += [own[i] - own[j] for i, j in untied(record["ranks"])]
        for kind, (prompts, better, worse) in PAIRS.items():
            if prompts is None or meta.get("kind") in prompts:
                ranked[lang, kind] += [own[i] - own[j] for i, j in untied(record["ranks"])
                                       if is_pair(verdicts[i], verdicts[j], better, worse)]
    found = {lang: {"gold_accuracy": agreement(ranked[lang, "all"]),
                    "heldout_accuracy": agreement(held_out[lang]),
                    "expected_calibration_error": calibration(held_out[lang])[0],
                    "by_kind": {kind: agreement(ranked[lang, kind]) for kind in PAIRS},
                    "pairs": {kind: len(ranked[lang, kind]) for kind in ("all", *PAIRS)}}
             for lang in ("en", "zh")}
    return found, calibration(held_out["en"] + held_out["zh"])[1]


def is_pair(a, b, better, worse):
    """Whether verdict a is a better answer's and b a worse one's: `better` true of a alone, `worse` of b."""
    return a.get(better) == 1 and b.get(better) == 0 and (worse is None or b.get(worse) == 1)


def lang_of(record):
    text = messages_of(record["prompt"])[-1]["content"]
    return record.get("meta", {}).get("lang") or ("zh" if re.search(f"[{HAN}]", text) else "en")


def calibration(margins, bins=10):
    """(expected calibration error (Guo et al. 2017, eq. 3), [[confidence, share right, pairs] of each bin]).

    The answer of a pair that scores higher is taken for the better one with confidence sigmoid(|margin|).
    """
    placed = defaultdict(list)
    for margin in margins:
        confidence = 1 / (1 + math.exp(-min(abs(margin), 700)))
        placed[min(int((confidence - 0.5) * 2 * bins), bins - 1)].append((confidence, margin > 0))
    table = [[mean(c for c, _ in own), mean(right for _, right in own), len(own)]
             for _, own in sorted(placed.items())]
    if not margins:
        return None, []
    return sum(abs(c - r) * n for c, r, n in table) / len(margins), table


def ppo_curve(folder, score):
    """[{step, rm_reward, gold, kl, distinct_2}] over a PPO run's own samples, by step."""
    steps = defaultdict(list)
    for _, sample in read_jsonl(folder / "samples.jsonl"):
        steps[sample["step"]].append(sample)
    return [{"step": step, "rm_reward": mean(s["rm_reward"] for s in own), "kl": mean(s["kl"] for s in own),
             "gold": mean(score(s["prompt"], s["answer"], s["meta"])["gold"] for s in own) if score else None,
             "distinct_2": distinct_2(s["answer"] for s in own)} for step, own in sorted(steps.items())]


# ---------------------------------------------------------------------------------------------------------
# Files


def read_answers(path):
    """The answers that `finish` wrote; InputError naming file and line for anything else."""
    for number, record in read_jsonl(path):
        if not {"prompt", "answer", "meta", "kind", "lang", "finished"} <= record.keys():
            raise InputError(f"{path}:{number}: this is no answer of evaluate.py")
        yield record


def read_if_there(path):
    return read_json(path) if path.is_file() else {}


def seconds_of(folders, run):
    """{stage: wall seconds}, as each stage noted them in its folder."""
    places = {"island": run / "island", "prepare": run / "corpus", "tokenizer": run / "tokenizer",
              "tokens": run / "tokens", "reward": run / "reward", **folders}
    noted = {stage: read_if_there(folder / "run.json").get("seconds") for stage, folder in places.items()}
    noted["collect"] = read_if_there(run / "preferences.run.json").get("seconds")
    return {stage: round(seconds, 1) for stage, seconds in noted.items() if seconds is not None}


# ---------------------------------------------------------------------------------------------------------
# The page: one function a section, each gives HTML, or nothing where there is nothing to tell

STYLE = """
body { margin: 0 auto; max-width: 1160px; padding: 40px 28px 80px; color: #24292f; font: 15px/1.55 system-ui,
  "Segoe UI", "Helvetica Neue", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif }
h1 { font-size: 30px; margin: 0 } h2 { font-size: 19px; margin: 48px 0 4px } img { max-width: 100% }
p, th, small, .tag { color: #6b7480 } p { margin: 2px 0 14px; max-width: 76ch } .tag { font-size: 12px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px }
th, td { padding: 5px 12px; text-align: right; border-bottom: 1px solid #e4e7eb; white-space: nowrap }
td:first-child, th:first-child { text-align: left; padding-left: 0 } td small, .ask .tag { margin: 0 8px }
.wide { overflow-x: auto } .ask { background: #f7f8fa }
.card { border: 1px solid #e4e7eb; border-radius: 8px; margin: 14px 0; overflow: hidden }
.ask, .answer { padding: 10px 14px; white-space: pre-wrap; overflow-wrap: anywhere }
.answers { display: grid; overflow-x: auto }
.answer { border-top: 3px solid #e4e7eb } .good { border-color: #3f8f5f } .bad { border-color: #c4513f }
"""


def page(report, answers):
    """The whole of report.html; answers: {stage: records}."""
    names = html.escape(" → ".join(report["stages"]))
    sections = [figures_section(report), curves_section(report), reward_section(report), ppo_section(report),
                packed_section(report), cleaning_section(report), samples_section(report, answers),
                cost_section(report)]
    return ('<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width"><title>flatlm: {names}</title><style>{STYLE}</style>\n'
            f"<h1>flatlm</h1><p>{names}</p>\n{''.join(sections)}</html>\n")


def section(title, text, body):
    return f"<h2>{title}</h2><p>{text}</p>{body}\n" if body else ""


def table(*rows):
    """HTML table; cells are strings of HTML, the first row is the heading."""
    lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows]
    return f'<div class="wide"><table>{lines[0].replace("td>", "th>")}{"".join(lines[1:])}</table></div>'


def shown(name, value):
    """A figure as people read it: rates in percent, the others with their decimals; a dash for None."""
    if value is None:
        return "–"
    if name in ("bits_per_byte", "distinct_2", "kl_to_sft", "expected_calibration_error"):
        return f"{value:.3f}"
    return f"{value:+.2f}" if name in ("gold_reward", "rm_reward") else f"{100 * value:.1f} %"


def figure_rows(report):
    """Lines of cells: a heading, then (figure, its value in each stage and language) where there is one."""
    stages = report["stages"]
    yield ["", *(f"{stage} {lang}" for stage in stages for lang in ("en", "zh"))]
    for name in FIGURES:
        values = [stage[lang][name] for stage in stages.values() for lang in ("en", "zh")]
        if any(v is not None for v in values):
            yield [name, *(shown(name, v) for v in values)]
    if any(stage["code"]["bits_per_byte"] is not None for stage in stages.values()):
        code = [shown("bits_per_byte", stage["code"]["bits_per_byte"]) for stage in stages.values()]
        yield ["bits_per_byte, code", *(cell for value in code for cell in (value, ""))]


def figures_section(report):
    header, *lines = figure_rows(report)
    says = {name: f"{name} {arrow}<small>{text}</small>" for name, (_, _, text, arrow) in FIGURES.items()}
    rows = [[says.get(name, name), *cells] for name, *cells in lines]
    text = "Greedy answers to test prompts, English (en) and Chinese (zh). Arrows say which way is better."
    return section("What each stage can do", text, table(map(html.escape, header), *rows))


def draw(figure):
    """A matplotlib figure as an <img> that holds its SVG: no files beside the page, equal at every run."""
    with matplotlib.rc_context({"svg.hashsalt": "flatlm"}):
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    return f'<img alt="" src="data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}">'


def plot(figure, place, title, lines, mark="-"):
    """A small panel at `place` of a figure's grid; lines: {name: [(step, value)]}, long ones in means."""
    axis = figure.add_subplot(place)
    axis.set_title(title, loc="left", fontsize=10, color="#24292f")
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#c5cad1")
    axis.tick_params(labelsize=8, colors="#6b7480")
    axis.grid(axis="y", color="#eceef1", linewidth=0.8)
    for color, (name, points) in zip(("#3b6ea5", "#d0743c", "#4f9a6b"), lines.items()):
        size = max(1, len(points) // 100)
        pieces = [points[i : i + size] for i in range(0, len(points), size)]
        steps, values = [piece[-1][0] for piece in pieces], [mean(v for _, v in piece) for piece in pieces]
        axis.plot(steps, values, mark, label=name, color=color, markersize=3, linewidth=1.3)
    if len(lines) > 1:
        axis.legend(frameon=False, fontsize=8)


def read_curves(folder):
    """{name: [(step, value)]} of a folder's metrics.jsonl; a step that was run twice counts once."""
    steps, curves, path = {}, {}, Path(folder) / "metrics.jsonl"
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        if line.endswith("}"):  # a killed run leaves half a line
            steps.setdefault(json.loads(line)["step"], {}).update(json.loads(line))
    for step, line in sorted(steps.items()):
        for name, value in {**line, **(line.get("bits_per_byte") or {})}.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                curves.setdefault(name, []).append((step, value))
    return curves


def curves_section(report):
    """A row for each stage that left metrics: loss, bits per byte (or validation loss), learning rate."""
    models = report["settings"]["models"].items()
    curves = {name: own for name, folder in models if "loss" in (own := read_curves(folder))}
    if not curves:
        return ""
    figure = Figure(figsize=(11, 2.5 * len(curves)), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12)
    grid = figure.add_gridspec(len(curves), 3)
    for row, (name, own) in enumerate(curves.items()):
        bits = [lang for lang in LANGUAGES if lang in own]
        held_out = {lang: own.get(lang, []) for lang in bits or ["valid_loss"]}
        plot(figure, grid[row, 0], f"{name}: loss, nats a token", {"loss": own["loss"]})
        plot(figure, grid[row, 1], f"{name}: {'bits per byte' if bits else 'loss'}, held out", held_out, "o-")
        plot(figure, grid[row, 2], f"{name}: learning rate", {"lr": own.get("lr", [])})
    return section("Training", "By step, from each folder's metrics.jsonl.", draw(figure))


def reward_rows(report):
    """Lines of cells about the reward model: a heading, then each figure in both languages."""
    found = report.get("reward")
    if found:
        yield ["reward model", "en", "zh"]
        for name in ("gold_accuracy", "heldout_accuracy", "expected_calibration_error"):
            yield [name, *(shown(name, found[lang][name]) for lang in ("en", "zh"))]
        for kind in PAIRS:
            yield [f"by kind: {kind}", *(shown("", found[lang]["by_kind"][kind]) for lang in ("en", "zh"))]


def reward_section(report):
    rows = [list(map(html.escape, row)) for row in reward_rows(report)]
    if not rows:
        return ""
    body = table(*rows)
    if report.get("calibration"):
        figure = Figure(figsize=(4.2, 3.4), layout="constrained")
        points = [(c, r) for c, r, _ in report["calibration"]]
        lines = {"pairs held out": points, "perfect": [(0.5, 0.5), (1.0, 1.0)]}
        plot(figure, figure.add_gridspec(1, 1)[0], "share in the right order, by confidence", lines, "o-")
        body += draw(figure)
    text = ("Pairs of answers that it puts in the right order: by the scorer, on test prompts (gold), and by "
            "labels like those that it was trained on (held out; some of them are wrong).")
    return section("The reward model", text, body)


def ppo_section(report):
    """What became of the scorer's reward while PPO raised the reward model's; and reward against KL."""
    curves = {name: curve for name, curve in report.get("ppo", {}).items() if curve}
    if not curves:
        return ""
    figure = Figure(figsize=(11, 2.9 * len(curves)), layout="constrained")
    grid = figure.add_gridspec(len(curves), 3)
    for row, (name, curve) in enumerate(curves.items()):
        points = lambda x, y: [(c[x], c[y]) for c in curve if c[y] is not None]
        plot(figure, grid[row, 0], f"{name}: reward model's score", {"proxy": points("step", "rm_reward")})
        plot(figure, grid[row, 1], f"{name}: the scorer's reward", {"gold": points("step", "gold")})
        both = {"proxy": points("kl", "rm_reward"), "gold": points("kl", "gold")}
        plot(figure, grid[row, 2], f"{name}: reward against KL, nats a token", both, ".")
    text = ("Each point is one step's samples. Proxy is what PPO was trained on, gold what was meant: where "
            "the first rises and the second falls, the reward model is being exploited.")
    return section("Reward: proxy against gold", text, draw(figure))


def packed_section(report):
    """What low-bit weights cost: size and figures of each quantized stage beside its source."""
    rows, stages = [], report["stages"]
    for name, folder in report["settings"]["models"].items():
        run = read_if_there(Path(folder) / "run.json")
        source = Path(run.get("options", {}).get("model", "")).name
        if run.get("stage") == "quantize" and source in stages:
            smaller = report["bytes"][name] / max(report["bytes"][source], 1)
            cells = [shown(key, stages[stage][lang][key]) for key in ("facts_exact", "gold_reward")
                     for lang in ("en", "zh") for stage in (source, name)]
            pairs = [f"{a} → {b}" for a, b in zip(cells[::2], cells[1::2])]
            rows.append([html.escape(f"{source} → {name}"), f"{report['bytes'][name] / 1e6:.2f}",
                         f"{100 * smaller:.0f} %", *pairs])
    heading = ["quantized", "megabytes", "of its source", "facts en", "facts zh", "reward en", "reward zh"]
    return section("Low-bit weights", "Before and after rounding.", table(heading, *rows) if rows else "")


def cleaning_section(report):
    """What prepare.py dropped and why; where noise was planted, what it made of that."""
    corpus = Path(report["settings"]["run"]) / "corpus"
    cleaning, planted = read_if_there(corpus / "report.json"), read_if_there(corpus / "cleaning.json")
    columns = cleaning.get("all", {})  # read, kept, and every reason
    sources = {**cleaning.get("sources", {}), "all": columns}
    rows = [[html.escape(name), *(own.get(key, "") for key in columns)] for name, own in sources.items()]
    body = columns and table(["source", *(key.replace("_", " ") for key in columns)], *rows)
    noise = [[label.replace("_", " "), row["documents"], row["dropped"], f"{100 * row['recall']:.1f} %"]
             for label, row in planted.get("labels", {}).items()]
    if body and noise:
        body += "<br>" + table(["planted", "documents", "dropped", "treated as it should be"], *noise)
    return section("Cleaning", "Documents read, kept, and dropped by reason.", body)


def samples_section(report, answers):
    """The same prompts answered by every stage, side by side, as the answers came out."""
    answered = {stage: {key_of(a): a for a in records} for stage, records in answers.items()}
    items = [a for records in answers.values() for a in records]
    columns, cards = f"grid-template-columns: repeat({len(answers)}, 1fr)", []
    for sample in choose_samples(items, report["settings"]["samples"]):
        cells = [answer_cell(stage, own[key_of(item)]) for item in (sample, *continuations([sample]))
                 for stage, own in answered.items() if key_of(item) in own]
        said = "".join(f'<div><span class="tag">{html.escape(sample["kind"])} · {m["role"]}</span>'
                       f'{html.escape(m["content"])}</div>' for m in messages_of(sample["prompt"]))
        cards.append(f'<div class="card" lang="{sample["lang"]}"><div class="ask">{said}</div>'
                     f'<div class="answers" style="{columns}">{"".join(cells)}</div></div>\n')
    text = ("Chosen by a hash of the prompt, so by nobody; answers as they came out. Green and red: the "
            "scorer's reward is above or below zero.")
    return section("Dialogues", text, "".join(cards))


def answer_cell(stage, a):
    """An answer under its stage, what is true of it in the verdict, and the reward."""
    gold, plain = a["verdict"].get("gold", 0), a["kind"] in PLAIN
    notes = [key.replace("_", " ") for key, value in a["verdict"].items() if value == 1 and key != "gold"]
    notes += [f"reward {gold:+g}"] * ("gold" in a["verdict"]) + ["continued as text"] * plain
    notes += ["cut off"] * (not a["finished"] and not plain)
    mood = "good" if gold > 0 else "bad" if gold < 0 else ""
    return (f'<div class="answer {mood}"><div class="tag">{html.escape(" · ".join([stage, *notes]))}</div>'
            f'{html.escape(a["answer"])}</div>')


def cost_section(report):
    seconds, size = report["seconds"], report["bytes"]
    rows = [[html.escape(name), f"{seconds[name]:,.1f}" if name in seconds else "–",
             f"{size[name] / 1e6:,.2f}" if name in size else "–"] for name in {**seconds, **size}]
    rows.append(["all", f"{sum(seconds.values()):,.1f}", ""])
    body = table(["stage", "seconds", "megabytes"], *rows)
    return section("Time and size", "Wall seconds of each stage, and its weights on disk.", body)


# ---------------------------------------------------------------------------------------------------------
# Runs


def finish(report, answers, out):
    """Write what there is to write, the page last: its presence says that all is whole. Print the figures."""
    (out.parent / "answers").mkdir(parents=True, exist_ok=True)
    for stage, records in answers.items():
        lines = "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in records)
        write_whole(out.parent / "answers" / f"{stage}.jsonl", lines.encode())
    write_json(out.parent / "report.json", report)
    write_whole(out, page(report, answers).encode())
    print_table(figure_rows(report))
    print_table(reward_rows(report))
    print(f"wrote {out}, {out.parent / 'report.json'} and {out.parent / 'answers'}/")


def print_table(lines):
    lines = list(lines)
    widths = [max(map(len, column)) for column in zip(*lines)]
    for name, *cells in lines:
        print(name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:])), sep="  ")


def evaluate(options, out, ranks):
    """Run every model, judge, and write the report."""
    began = time.perf_counter()
    folders = {Path(name).resolve().name: Path(name) for name in options.model}
    absent = [str(folder) for folder in folders.values() if not folder.is_dir()]
    if absent:
        raise InputError(f"--model {' '.join(absent)}: no such folder; train it first")
    if len(folders) < len(options.model):
        raise InputError("--model: two folders of one name, and a stage is called by its folder's name")
    score = load_scorer(options.scorer) if options.scorer else None
    items = read_prompts(options.prompts, options.limit) if options.prompts else []
    if not score:
        items += continuations(choose_samples(items, options.samples))
    run = Path(options.data).parent if options.data else out.parent
    settings = {"models": {name: str(folder) for name, folder in folders.items()}, "run": str(run),
                "scorer": options.scorer, "samples": options.samples}
    report, answers = {"stages": {}, "seconds": seconds_of(folders, run), "bytes": {}, "left_out": {}}, {}
    judges = load_judges(options, ranks.device)
    for name, folder in folders.items():
        answers[name], bits, divergence = run_stage(name, folder, items, options, judges, ranks)
        report["stages"][name] = figures(judge(answers[name], score), bits, divergence)
        report["bytes"][name] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        report["left_out"][name] = len(items) - len(answers[name])
    if ranks.first:
        if judges.reward:
            report["reward"], report["calibration"] = judge_reward(options, judges, score)
        sampled = folders | ({"hacking": Path(options.hacking)} if options.hacking else {})
        report["ppo"] = {name: ppo_curve(folder, score) for name, folder in sampled.items()
                         if (folder / "samples.jsonl").is_file()}
    report["seconds"]["evaluate"] = round(time.perf_counter() - began, 1)
    if ranks.first:
        finish({**report, "settings": settings}, answers, out)


def rescore(options, out):
    """The report at --out from its answers: new verdicts; what needs a model or a clock is carried over."""
    report, answers = read_json(out.parent / "report.json"), {}
    if not {"stages", "seconds", "bytes", "settings"} <= report.keys():
        raise InputError(f"--rescore: {out.parent / 'report.json'} is no report of evaluate.py")
    scorer = report["settings"]["scorer"] = options.scorer or report["settings"]["scorer"]
    score = load_scorer(scorer) if scorer else None
    for name, stage in report["stages"].items():
        answers[name] = judge([*read_answers(out.parent / "answers" / f"{name}.jsonl")], score)
        bits = {lang: stage[lang]["bits_per_byte"] for lang in LANGUAGES}
        divergence = {lang: stage[lang].get("kl_to_sft") for lang in ("en", "zh")}
        report["stages"][name] = figures(answers[name], bits, divergence)
    finish(report, answers, out)


def summary(paths):
    """Markdown: for each stage, language and figure, the mean over the reports and the value in each."""
    reports = {Path(path).resolve().parent.name: read_json(Path(path)) for path in paths}
    if not all("stages" in report for report in reports.values()) or len(reports) < len(paths):
        raise InputError(f"--summary {' '.join(paths)}: expected report.json files in different folders")
    lines = [f"| stage | | figure | mean | {' | '.join(reports)} |", "|---" * (4 + len(paths)) + "|"]
    for stage in dict.fromkeys(stage for report in reports.values() for stage in report["stages"]):
        for lang in LANGUAGES:
            for name in FIGURES:
                values = [r["stages"].get(stage, {}).get(lang, {}).get(name) for r in reports.values()]
                if any(v is not None for v in values):
                    cells = [shown(name, v) for v in (mean(values), *values)]
                    lines.append(f"| {stage} | {lang} | {name} | {' | '.join(cells)} |")
    tables = {run: {row[0]: row[1:] for row in reward_rows(report)} for run, report in reports.items()}
    for name in next(iter(tables.values()), {}):
        for place, lang in enumerate(("en", "zh")):
            cells = [own.get(name, ("", ""))[place] for own in tables.values()]
            if name != "reward model":
                lines.append(f"| reward | {lang} | {name} | | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@one_line_errors
def main(argv=None):
    options = parse_options(Options, argv, "evaluate.py")
    if options.out is None and not options.summary:
        raise InputError("--out is needed: the page to write, such as run/report.html")
    out = Path(options.out) if options.out else None
    if out and out.exists() and not options.overwrite and not options.rescore:
        raise InputError(f"{out} is there; --overwrite writes over it, --rescore judges its answers again")
    if options.summary:
        text = summary(options.summary)
        print(text, end="")
        return write_whole(out, text.encode()) if out else None
    if options.rescore:
        return rescore(options, out)
    if not options.model or not (options.prompts or options.data):
        raise InputError("nothing to measure: give --model folders, and --prompts or --data or both")
    with process_group(options.device) as ranks:
        return evaluate(options, out, ranks)


if __name__ == "__main__":
    sys.exit(main())
