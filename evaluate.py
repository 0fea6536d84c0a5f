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
the scorer's reward while PPO chased the model's. Beside the page is then rankings.jsonl, what it scored.

Begin with FIGURES (what is counted) and `figures` (how). Answers are greedy: figures can be had again.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import itertools
import json
import math
import re
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import (DTYPES, RewardModel, bits_per_byte, generate, load_folder, process_group, read_json, say,
                   stop_ids, write_json)
from tokenizer import (InputError, encode_answer, encode_chat, jsonl_files, load_scorer, messages_of,
                       one_line_errors, option, parse_options, prompt_messages, read_jsonl, read_tokens,
                       record_ranking, write_whole)


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
    ranked: list[str] = option("JSONL files of the scorer's own rankings, to judge the reward model by", [])
    hacking: str | None = option("folder of a PPO run without KL penalty, for the plots only", None)
    out: str | None = option("the page to write; report.json and answers/ lie beside it", None)
    rescore: bool = option("make the report at --out again from its answers, with no model", False)
    summary: list[str] = option("report.json files of several seeds: tell mean and values in Markdown", [])
    max_new_tokens: int = option("tokens an answer may have", 64, at_least=1)
    max_length: int = option("tokens in a window, for bits per byte", 256, at_least=1)
    max_windows: int | None = option("windows a shard, for bits per byte; else all", None, at_least=1)
    batch_size: int = option("prompts answered at a time", 128, at_least=1)
    limit: int | None = option("prompts of each kind and language; else all", None, at_least=1)
    samples: int = option("prompts of each language that the page shows, with all answers", 20, at_least=0)
    device: str = option("cpu, cuda, mps, or auto", "auto")
    dtype: str = option("of the weights; fp32 keeps greedy answers alike everywhere", "fp32", list(DTYPES))
    overwrite: bool = option("write over a finished report", False)


# ---- What is counted ---------------------------------------------------------------------------------------

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
    "kl_to_sft": ((), None, "KL to the SFT model, nats a token", "↓"),
    "distinct_2": ((), None, "different word pairs among all", "↑"),
    "bits_per_byte": ((), None, "on held-out text", "↓"),
}


def figures(answers, bits, divergence):
    """One stage's figures: {"en": {figure: value}, "zh": ..., "code": {"bits_per_byte": value}}.

    answers: judged records; bits: {language: bits per byte}; divergence: {language: KL to the reference}. A
    figure with nothing behind it is None. `by_kind`: for each kind of prompt the number of answers, the
    share that ended by itself, and the mean of every key of the verdict. `others`: the mean of each key over
    the chats of those kinds for which no figure counts it, as a scorer of your own has.
    """
    stage, counted = {}, {(kind, key) for kinds, key, _, _ in FIGURES.values() for kind in kinds}
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
        others = defaultdict(list)
        for a in chats:
            for key in [key for key in a["verdict"] if key != "gold" and (a["kind"], key) not in counted]:
                others[key].append(a["verdict"][key])
        values["others"] = {key: mean(found) for key, found in others.items()}
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
    units = (re.findall(rf"[{HAN}]|[^\W{HAN}]+|[^\w\s]", text.lower()) for text in texts)
    bigrams = [bigram for own in units for bigram in itertools.pairwise(own)]
    return len(set(bigrams)) / len(bigrams) if bigrams else None


# ---- Prompts -----------------------------------------------------------------------------------------------


def read_records(path, make):
    """make(record) for each line of a JSONL file; what is wrong with a record is told with file and line."""
    for number, record in read_jsonl(path):
        try:
            yield make(record)
        except KeyError as error:
            raise InputError(f"{path}:{number}: no {error}") from None
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None


def read_prompts(paths, limit=None):
    """Items {"prompt", "meta", "kind", "lang"} of JSONL files, or of folders of them, in sorted order.

    limit keeps the first so many of each kind and language. Raises InputError naming file and line.
    """
    items, count = [], Counter()
    for file in jsonl_files(paths):
        for item in read_records(file, prompt_item):
            count[item["kind"], item["lang"]] += 1
            if limit is None or count[item["kind"], item["lang"]] <= limit:
                items.append(item)
    if not items:
        raise InputError(f"--prompts {' '.join(paths)}: no prompts; expected .jsonl lines with `prompt`")
    return items


def prompt_item(record):
    """A line of a prompts file, checked. kind: meta.kind or chat; lang: meta.lang, lang, or by letters."""
    prompt_messages(record)
    prompt, meta = record["prompt"], record.get("meta", {})
    kind = str(meta.get("kind") or "chat")
    if kind in PLAIN and isinstance(prompt, list):
        raise InputError(f"a prompt of kind {kind} is a text to go on with, so a string")
    return {"prompt": prompt, "meta": meta, "kind": kind, "lang": lang_of(record)}


def lang_of(record):
    """en or zh: what a record says, else by the letters of its prompt's last message."""
    for lang in (record.get("meta", {}).get("lang"), record.get("lang")):
        if lang in ("en", "zh"):
            return lang
    return "zh" if re.search(f"[{HAN}]", messages_of(record["prompt"])[-1]["content"]) else "en"


def key_of(item):
    return item["kind"], json.dumps(item["prompt"], ensure_ascii=False)


def hash_of(item):
    """By which prompts are chosen: neither by hand nor from the file's beginning, and alike at every run."""
    return hashlib.sha256(repr(key_of(item)).encode()).hexdigest()


def choose_samples(items, count):
    """`count` items of each language, taken in turn from its kinds; in each kind by the prompt's hash."""
    chosen = []
    for lang in ("en", "zh"):
        own = {key_of(i): i for i in items if i["lang"] == lang and i["kind"] != "continuation"}
        kinds = defaultdict(list)
        for item in sorted(own.values(), key=hash_of):
            kinds[item["kind"]].append(item)
        turns = sorted((turn, kind) for kind, own in kinds.items() for turn in range(len(own)))[:count]
        chosen += [kinds[kind][turn] for kind, turn in sorted((kind, turn) for turn, kind in turns)]
    return chosen


def continuations(samples):
    """The sample chats of a single message, to be continued as plain text."""
    single = [s for s in samples if s["kind"] not in PLAIN and len(messages_of(s["prompt"])) == 1]
    return [{**s, "prompt": messages_of(s["prompt"])[0]["content"], "kind": "continuation"} for s in single]


# ---- Answers and verdicts ----------------------------------------------------------------------------------


def encode_prompt(tokenizer, item):
    """Ids of a prompt: <|endoftext|> + text where the model goes on with it, else a chat up to the answer."""
    if item["kind"] in PLAIN:
        return [tokenizer.endoftext, *tokenizer.encode(item["prompt"])]
    return encode_chat(tokenizer, messages_of(item["prompt"]), generation_prompt=True)[0]


def in_batches(rows, size, ranks, name, work):
    """All that work(batch) gives for batches of rows, in the rows' order; ranks take batches in turn."""
    found = {}
    firsts = range(ranks.rank * size, len(rows), ranks.world_size * size)
    for first in tqdm(firsts, name, disable=None, leave=False):
        found[first] = work(rows[first : first + size])
    parts = sorted(part for share in ranks.gather(found) for part in share.items())
    return [result for _, results in parts for result in results]


def answer_prompts(model, tokenizer, items, stop, options, ranks, name=""):
    """Greedy answers: items with "answer" (text) and "finished" (it ended by itself), in the items' order.

    A batch holds prompts of a kind and like length: little padding, and answers that end at about the same
    time. A prompt with no room for an answer in the context is left out.
    """
    encoded, answers = [encode_prompt(tokenizer, item) for item in items], {}
    room = model.config.max_position_embeddings - options.max_new_tokens
    fit = [i for i, ids in enumerate(encoded) if len(ids) <= room]
    fit.sort(key=lambda i: (items[i]["kind"], len(encoded[i])))
    for cloze in (True, False):
        own = [i for i in fit if (items[i]["kind"] == "cloze") == cloze]
        tokens = min(options.max_new_tokens, CLOZE_TOKENS) if cloze else options.max_new_tokens
        samples = in_batches(own, options.batch_size, ranks, name, lambda batch: generate(
            model, [encoded[i] for i in batch], tokens, stop))
        for i, sample in zip(own, samples):
            text = tokenizer.decode(sample.ids[:-1] if sample.finished else sample.ids)
            answers[i] = {**items[i], "answer": text, "finished": sample.finished}
    return [answers[i] for i in sorted(answers)]


def verdict_of(score, prompt, answer, meta):
    """The scorer's verdict, {key: number}; {} without a scorer. InputError where it fails."""
    try:
        verdict = score(prompt, answer, meta) if score else {}
        verdict = {str(key): float(value) for key, value in verdict.items()}
        if not all(map(math.isfinite, verdict.values())):
            raise ValueError(f"not finite: {verdict}")
    except (Exception, SystemExit) as error:
        asked = json.dumps(prompt, ensure_ascii=False)[:160]
        raise InputError(f"the scorer failed on {asked}: {error!r}") from None
    return verdict


def judged(a, score):
    """An answer with the scorer's verdict; {} where we had a chat continued. KeyError where it is none."""
    own = None if a["kind"] == "continuation" != a["meta"].get("kind") else score
    verdict = verdict_of(own, a["prompt"], a["answer"], a["meta"])
    return {**a, "lang": a["lang"], "finished": a["finished"], "verdict": verdict}


def test_shards(options, tokenizer, name):
    """The test split; none, which is told, where another tokenizer encoded it than the model's."""
    index = read_if_there(Path(options.data) / "index.json")
    if index.get("tokenizer", tokenizer.hash) == tokenizer.hash:
        return read_tokens(options.data, "test", tokenizer)
    print(f"{name}: no bits per byte, since {options.data} is encoded by another tokenizer", file=sys.stderr)
    return []


def run_stage(name, folder, items, options, reference, ranks):
    """Measure a folder: (answers, not judged yet; {language: bits per byte}, on rank 0; {language: KL})."""
    began = time.perf_counter()
    model, tokenizer = load_folder(folder, ranks.device, DTYPES[options.dtype])
    shards = test_shards(options, tokenizer, name) if options.data and ranks.first else []
    bits = bits_per_byte(model, tokenizer, shards, options.max_length, max_windows=options.max_windows)
    stop = stop_ids(folder, tokenizer) | {tokenizer.endoftext}
    answers = answer_prompts(model, tokenizer, items, stop, options, ranks, name)
    divergence = kl_to_reference(model, tokenizer, folder, items, stop, options, reference, ranks)
    left_out = len(items) - len(answers)
    note = f"; left out {left_out} prompts too long for its context" if left_out else ""
    say(ranks, f"{name}: {len(answers)} answers in {time.perf_counter() - began:.1f} s{note}")
    return answers, bits, divergence


# ---- Alignment: the reward model's scores, KL to the reference, agreement with the scorer, PPO's samples ---

KL_PROMPTS = 200  # of each language

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


def pad_right(rows, device):
    """Rows of ids -> ids (B, T), padded behind, where causal attention of what is before does not look."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)


@torch.inference_mode()
def reward_scores(reward, asked, options, ranks):
    """The reward model's score of each (prompt, answer, whether it ended): floats, None beyond its context.

    It is read at the last token, as in PPO: <|im_end|>, or where an answer was cut off. Stages often answer
    alike, so equal dialogues are scored once.
    """
    model, tokenizer = reward
    rows = [tuple(encode_answer(tokenizer, messages_of(prompt), messages_of(answer, "assistant"))[0]
                  [: None if ended else -1]) for prompt, answer, ended in asked]
    fit = [row for row in dict.fromkeys(rows) if len(row) <= model.config.max_position_embeddings]

    def score(batch):
        last = torch.tensor([[len(row) - 1] for row in batch], device=ranks.device)  # (B, 1)
        return model(pad_right(batch, ranks.device)).gather(1, last)[:, 0].tolist()

    fit.sort(key=len)
    scores = dict(zip(fit, in_batches(fit, options.batch_size, ranks, "rewards", score)))
    return [scores.get(row) for row in rows]


def kl_to_reference(model, tokenizer, folder, items, stop, options, reference, ranks):
    """{language: mean KL(stage || reference) a token, in nats}, over the whole vocabulary.

    Over answers that the stage itself samples at temperature 1, to prompts that are the same for every stage,
    chosen by their hash. None for a model of pretrain.py, which does not chat, and for one of another
    tokenizer; 0 for the reference itself.
    """
    pretrained = read_if_there(folder / "run.json").get("stage") == "pretrain"
    if not reference or pretrained or tokenizer.hash != reference[1].hash:
        return {}
    if folder.resolve() == Path(options.reference).resolve():
        return dict.fromkeys(("en", "zh"), 0.0)
    divergence, room = {}, model.config.max_position_embeddings - options.max_new_tokens
    for lang in ("en", "zh"):
        own = sorted((i for i in items if i["lang"] == lang and i["kind"] not in PLAIN), key=hash_of)
        encoded = sorted((encode_prompt(tokenizer, item) for item in own[:KL_PROMPTS]), key=len)
        prompts = [ids for ids in encoded if len(ids) <= room]

        def kl(rows):
            asked = [prompts[row] for row in rows]
            samples = generate(model, asked, options.max_new_tokens, stop, temperature=1.0, rows=rows)
            return kl_of_tokens(model, reference[0], asked, [s.ids for s in samples])

        divergence[lang] = mean(in_batches(range(len(prompts)), 32, ranks, "KL", kl))
    return divergence


@torch.inference_mode()
def kl_of_tokens(model, reference, prompts, answers):
    """sum_v p(v) (log p(v) - log q(v)) at each token of all answers: p the model's, q the reference's."""
    device = next(model.parameters()).device
    ids = pad_right([p + a[:-1] for p, a in zip(prompts, answers)], device)  # (B, T)
    asking = torch.zeros(ids.shape, dtype=torch.bool, device=device)  # t: t + 1 is an answer's token
    for b, (prompt, answer) in enumerate(zip(prompts, answers)):
        asking[b, len(prompt) - 1 : len(prompt) - 1 + len(answer)] = True
    kl = []
    for own, other in zip(*(m.model(ids)[asking].split(256) for m in (model, reference))):  # (N, H) each
        p, q = (head(x).float().log_softmax(-1)  # (N, V)
                for head, x in ((model.lm_head, own), (reference.lm_head, other)))
        kl += (p.exp() * (p - q)).sum(-1).tolist()
    return kl


def ranking(record, scored=False):
    """A ranking or a pair, checked, with completions, ranks, meta and lang; `scored`: it has scores too."""
    prompt_messages(record)
    _, answers, ranks = record_ranking(record)
    scores = record.get("scores") if scored else ranks
    if not isinstance(scores, list) or len(scores) != len(ranks):
        raise InputError("expected a list `scores`, one for each of `completions`")
    texts = [a[0]["content"] if len(a) == 1 else a for a in answers]
    more = {"completions": texts, "ranks": ranks, "meta": record.get("meta", {}), "lang": lang_of(record)}
    return {**record, **more}


def score_rankings(options, reward, ranks):
    """What the reward model is judged by, with its scores: --ranked, and what reward.py held out.

    One with an answer beyond its context is left out. Returns (records, how many were left out).
    """
    records = [r for file in options.ranked for r in read_records(Path(file), ranking)]
    if options.ranked and not records:
        raise InputError(f"--ranked {' '.join(options.ranked)}: no ranking in it")
    asked = [(r["prompt"], answer, True) for r in records for answer in r["completions"]]
    scores = iter(reward_scores(reward, asked, options, ranks))
    scored = [{"from": "ranked", **r, "scores": [next(scores) for _ in r["completions"]]} for r in records]
    whole, path = [r for r in scored if None not in r["scores"]], Path(options.reward) / "valid.jsonl"
    held_out = read_records(path, lambda r: ranking(r, scored=True)) if path.is_file() else ()
    return whole + [{"from": "held out", **r} for r in held_out], len(scored) - len(whole)


def pairs_of(record, score):
    """A ranking's untied pairs: (r(better) - r(worse), its kinds by PAIRS, how much longer the better is)."""
    texts = [a if isinstance(a, str) else a[-1]["content"] for a in record["completions"]]
    meta, ranks, scores = record["meta"], record["ranks"], record["scores"]
    verdicts = [verdict_of(score, record["prompt"], text, meta) for text in texts]
    for i, j in itertools.permutations(range(len(ranks)), 2):
        if ranks[i] < ranks[j]:
            kinds = [name for name, (prompts, better, worse) in PAIRS.items()
                     if (prompts is None or meta.get("kind") in prompts)
                     and verdicts[i].get(better) == 1 and verdicts[j].get(better) == 0
                     and (worse is None or verdicts[j].get(worse) == 1)]
            yield scores[i] - scores[j], kinds, len(texts[i]) - len(texts[j])


def agreement(margins):
    """Share of margins above 0, where 0 counts half; None of none."""
    return mean(0.5 * (1 + (m > 0) - (m < 0)) for m in margins)


def reward_figures(rankings, score):
    """({language: how well the reward model orders pairs of answers}, {language: its calibration's bins}).

    gold_accuracy and by_kind: the untied pairs of --ranked, whose ranks are the scorer's own.
    heldout_accuracy and expected_calibration_error: the pairs that reward.py held out, by their own labels,
    some of which may be wrong; heldout_length_accuracy is what preferring the longer text would reach there.
    """
    found, bins = {}, {}
    for lang in ("en", "zh"):
        own = [r for r in rankings if r["lang"] == lang]
        gold = [pair for r in own if r["from"] == "ranked" for pair in pairs_of(r, score)]
        held_out = [pair for r in own if r["from"] == "held out" for pair in pairs_of(r, None)]
        by_kind = {kind: [m for m, kinds, _ in gold if kind in kinds] for kind in PAIRS}
        error, bins[lang] = calibration([m for m, _, _ in held_out])
        pairs = {"gold": len(gold), "heldout": len(held_out)}
        found[lang] = {"gold_accuracy": agreement(m for m, _, _ in gold),
                       "heldout_accuracy": agreement(m for m, _, _ in held_out),
                       "heldout_length_accuracy": agreement(longer for _, _, longer in held_out),
                       "expected_calibration_error": error,
                       "by_kind": {kind: agreement(margins) for kind, margins in by_kind.items()},
                       "pairs": pairs | {kind: len(margins) for kind, margins in by_kind.items()}}
    return found, bins


def calibration(margins, bins=10):
    """(expected calibration error (Guo et al. 2017, eq. 3), [[confidence, share right, pairs] of each bin]).

    The answer of a pair that scores higher is taken for the better one, with confidence sigmoid(|margin|) in
    [0.5, 1], which is cut into bins of equal width.
    """
    placed = defaultdict(list)
    for margin in margins:
        confidence = 1 / (1 + math.exp(-min(abs(margin), 700)))
        placed[min(int((confidence - 0.5) * 2 * bins), bins - 1)].append((confidence, margin))
    table = [[mean(c for c, _ in own), agreement(m for _, m in own), len(own)]
             for _, own in sorted(placed.items())]
    error = math.fsum(abs(c - right) * n for c, right, n in table) / len(margins) if margins else None
    return error, table


def ppo_curves(report, score):
    """{run: [{step, rm_reward, gold, kl, distinct_2}]}: means over a PPO run's own samples, step by step."""

    def sample(s):
        gold = verdict_of(score, s["prompt"], s["answer"], s.get("meta") or {}).get("gold")
        return {"gold": gold, **{key: s[key] for key in ("step", "rm_reward", "kl", "answer")}}

    curves = {}
    for name, folder in runs_of(report).items():
        path, steps = Path(folder) / "samples.jsonl", defaultdict(list)
        for s in read_records(path, sample) if path.is_file() else ():  # else it is no PPO run
            steps[s["step"]].append(s)
        for step, own in sorted(steps.items()):
            means = {key: mean(s[key] for s in own) for key in ("rm_reward", "gold", "kl")}
            means["distinct_2"] = distinct_2(s["answer"] for s in own)
            curves.setdefault(name, []).append({"step": step, **means})
    return curves


# ---- Files -------------------------------------------------------------------------------------------------


def read_if_there(path):
    return read_json(path) if path.is_file() else {}


def seconds_of(folders, run):
    """{stage: wall seconds}, as each stage noted them in its folder, or beside its file."""
    files = {name: run / folder / "run.json" for name, folder in
             (("island", "island"), ("prepare", "corpus"), ("tokenizer", "tokenizer"), ("tokens", "tokens"))}
    files |= {name: folder / "run.json" for name, folder in folders.items()}
    files |= {"collect": run / "preferences.run.json", "reward": run / "reward/run.json"}
    noted = {stage: read_if_there(file).get("seconds") for stage, file in files.items()}
    return {stage: round(seconds, 1) for stage, seconds in noted.items() if seconds is not None}


# ---- The page: one function a section, each gives HTML, or nothing where there is nothing to tell ----------

COLORS = {"en": "C0", "zh": "C1", "whole": "C0", "INT8": "C1", "INT4": "C2"}  # of bars and dots
PLOTS = {
    "axes.prop_cycle": matplotlib.cycler(color=["#3b6ea5", "#d0743c", "#4f9a6b", "#8b6bb1", "#b8a13c"]),
    "figure.constrained_layout.use": True, "figure.constrained_layout.h_pad": 0.12, "svg.hashsalt": "flatlm",
    "axes.titlelocation": "left", "axes.titlesize": 10, "axes.titlecolor": "#24292f",
    "xaxis.labellocation": "right", "axes.labelsize": 8, "axes.labelcolor": "#6b7480",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#c5cad1",
    "xtick.labelsize": 8, "ytick.labelsize": 8, "xtick.color": "#6b7480", "ytick.color": "#6b7480",
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#eceef1", "grid.linewidth": 0.8,
    "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 8,
    "svg.fonttype": "none", "text.parse_math": False,  # names of any script, drawn by the browser
}
NOTES = {"valid_loss": "loss, held out", "kl": "KL to the SFT model, nats a token",
         "valid_accuracy": "pairs in the right order, held out", "reward": "reward", "lr": "learning rate"}
PACKED = {"facts_exact": "facts", "format_valid": "format", "harmful_rate_b": "harm B", "kl_to_sft": "KL"}
STYLE = """
body { margin: 0 auto; max-width: 1160px; padding: 40px 28px 80px; color: #24292f; font: 15px/1.55 system-ui,
  "Segoe UI", "Helvetica Neue", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif }
h1 { font-size: 30px; margin: 0 } h2 { font-size: 19px; margin: 48px 0 4px } img { max-width: 100% }
p, th, small, .tag { color: #6b7480 } p { margin: 2px 0 14px; max-width: 76ch } .tag { font-size: 12px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px }
th, td { padding: 5px 12px; text-align: right; border-bottom: 1px solid #e4e7eb; white-space: nowrap }
td:first-child, th:first-child { text-align: left; padding-left: 0 } td small, .ask .tag { margin: 0 8px }
tr + tr th { padding-top: 22px }
.wide { overflow-x: auto } .ask { background: #f7f8fa }
.card { border: 1px solid #e4e7eb; border-radius: 8px; margin: 14px 0; overflow: hidden }
.ask, .answer { padding: 10px 14px; white-space: pre-wrap; overflow-wrap: anywhere }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)) }
.answer { border-top: 3px solid #e4e7eb } .good { border-color: #3f8f5f } .bad { border-color: #c4513f }
"""


def page(report, answers):
    """The whole of report.html; answers: {stage: records}."""
    names = html.escape(" → ".join(report["stages"]))
    with matplotlib.rc_context(PLOTS):
        sections = [figures_section(report), reward_section(report), ppo_section(report),
                    packed_section(report), samples_section(report, answers), curves_section(report),
                    cleaning_section(report), cost_section(report)]
    return ('<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width"><title>flatlm: {names}</title><style>{STYLE}</style>\n'
            f"<h1>flatlm</h1><p>{names}</p>\n{''.join(sections)}</html>\n")


def section(title, text, body):
    return f"<h2>{title}</h2><p>{text}</p>{body}\n" if body else ""


def table(*groups):
    """HTML table of groups of rows of cells; a group's first row is a heading; figures are explained."""
    lines = []
    for i, row in (pair for rows in groups for pair in enumerate(rows)):
        cells = [html.escape(str(cell)) for cell in row]
        if row[0] in FIGURES:
            cells[0] += f" {FIGURES[row[0]][3]}<small>{FIGURES[row[0]][2]}</small>"
        lines.append("".join(f"<td>{cell}</td>" if i else f"<th>{cell}</th>" for cell in cells))
    return f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>{chr(10)}" for line in lines)}</table></div>'


def shown(name, value):
    """A figure as people read it: rates in percent, the others with their decimals; a dash for None."""
    if value is None:
        return "–"
    if name in ("bits_per_byte", "distinct_2", "kl_to_sft", "expected_calibration_error"):
        return f"{value:.3f}"
    return f"{value:+.2f}" if name in ("gold_reward", "rm_reward") else f"{100 * value:.1f} %"


def figure_rows(report, lang):
    """Lines of cells: a heading, then (figure, its value in each stage) where there is one."""
    stages = [stage[lang] for stage in report["stages"].values()]
    rows = [[name, *(shown(name, stage.get(name)) for stage in stages)] for name in FIGURES
            if any(stage.get(name) is not None for stage in stages)]
    for key in dict.fromkeys(key for stage in stages for key in stage.get("others", {})):
        values = [stage.get("others", {}).get(key) for stage in stages]
        rows.append([f"other kinds: {key}", *("–" if value is None else f"{value:.3g}" for value in values)])
    return [[lang, *report["stages"]], *rows] if rows else []


def reward_rows(report):
    """Lines of cells about the reward model: a heading, then (figure, in English, in Chinese, pairs)."""
    en, zh = (report.get("reward", {}).get(lang, {}) for lang in ("en", "zh"))
    if not en:
        return []
    rows = [["reward model", "en", "zh", "pairs en", "pairs zh"]]
    for name in [name for name in en if name not in ("by_kind", "pairs")]:
        pairs = [str(own["pairs"]["gold" if name == "gold_accuracy" else "heldout"]) for own in (en, zh)]
        rows.append([name, shown(name, en[name]), shown(name, zh[name]), *pairs])
    return rows + [[f"by kind: {kind}", *(shown(kind, own["by_kind"][kind]) for own in (en, zh)),
                    *(str(own["pairs"][kind]) for own in (en, zh))] for kind in en["by_kind"]]


def figures_section(report):
    text = "Greedy answers to test prompts, English (en) and Chinese (zh). Arrows say which way is better."
    return section("What each stage can do", text, table(*(figure_rows(report, lang) for lang in LANGUAGES)))


def draw(figure):
    """A matplotlib figure as an <img> that holds its SVG: no files beside the page, equal at every run."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    return f'<img alt="" src="data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}">'


def plot(axis, lines, mark="-"):
    """Curves into a panel; lines: {name: [(step, value)]}, long ones in means."""
    for name, points in lines.items():
        size = max(1, len(points) // 100)
        pieces = [points[i : i + size] for i in range(0, len(points), size)]
        steps, values = [piece[-1][0] for piece in pieces], [mean(v for _, v in piece) for piece in pieces]
        axis.plot(steps, values, mark, label=name, markersize=3, linewidth=1.3)
    if len(lines) > 1:
        axis.legend()


def bars(axis, groups, show):
    """Bars side by side, each with its number; groups: {name: [(label, value)]}; no bar for None."""
    ticks, x = {}, 0.0
    for name, own in groups.items():
        own = [bar for bar in own if bar[1] is not None]
        for place, (label, value) in enumerate(own):
            drawn = axis.bar(x + place, value, 0.9, color=COLORS[label])
            axis.bar_label(drawn, [show.format(value)], fontsize=7, color="#6b7480", padding=1)
            axis.annotate(label, (x + place, 0), (0, 3), textcoords="offset points", ha="center", fontsize=7,
                          color="white", rotation=90)
        ticks[x + (len(own) - 1) / 2] = name
        x += len(own) + 0.7
    axis.set_ylim(0, None if any(value for own in groups.values() for _, value in own) else 1)
    axis.set_xticks([*ticks], [*ticks.values()])
    axis.tick_params(axis="x", length=0)


def read_curves(folder):
    """{name: [(step, value)]} of a folder's metrics.jsonl; a step that was run twice counts once."""
    steps, curves, path = defaultdict(dict), defaultdict(list), Path(folder) / "metrics.jsonl"
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
            steps[int(record["step"])] |= record
        except (ValueError, TypeError, KeyError):  # a killed run leaves half a line
            continue
    for step, line in sorted(steps.items()):
        for name, value in {**line, **(line.get("bits_per_byte") or {})}.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                curves[name].append((step, value))
    return curves


def curves_section(report):
    """A row for each run that left metrics: its loss, and the two most telling of what else it noted."""
    curves = {name: own for name, folder in runs_of(report).items() if "loss" in (own := read_curves(folder))}
    if not curves:
        return ""
    figure = Figure((11, 2.5 * len(curves)))
    for row, (name, own) in enumerate(curves.items()):
        bits = {lang: own[lang] for lang in LANGUAGES if lang in own}
        panels = [(says, {key: own[key]}) for key, says in NOTES.items() if key in own]
        panels = [("bits per byte, held out", bits), *panels[-1:]] if bits else panels[:2]
        for column, (says, lines) in enumerate([("loss", {"loss": own["loss"]}), *panels], 1):
            few = len(next(iter(lines.values()))) < 50
            axis = figure.add_subplot(len(curves), 3, 3 * row + column, title=f"{name}: {says}")
            plot(axis, lines, "o-" if few else "-")
    return section("Training", "By step, from each folder's metrics.jsonl.", draw(figure))


def runs_of(report):
    """{name: folder} of all that was trained: the stages, the reward model, a run for the plots only."""
    settings, runs = report["settings"], dict(report["settings"]["models"])
    for folder in filter(None, (settings.get("reward"), settings.get("hacking"))):
        name = Path(folder).resolve().name
        if Path(runs.setdefault(name, folder)).resolve() != Path(folder).resolve():
            raise InputError(f"two folders of one name, {name}, and a stage is called by its folder's name")
    return runs


def reward_section(report):
    """The reward model's accuracy by kind of pair, and what its confidence is worth."""
    if not report.get("reward"):
        return ""
    figure, found = Figure((11, 3.1)), report["reward"]
    kinds = {kind: [(lang, found[lang]["by_kind"][kind]) for lang in ("en", "zh")] for kind in PAIRS}
    axis = figure.add_subplot(1, 3, (1, 2), title="Pairs in the right order, by kind")
    bars(axis, {kind: own for kind, own in kinds.items() if any(v is not None for _, v in own)}, "{:.0%}")
    axis.set_ylim(0, 1.05)
    axis.axhline(0.5, color="#6b7480", linewidth=1, linestyle=":")
    axis = figure.add_subplot(1, 3, 3, title="Share right, pairs held out", xlabel="confidence")
    axis.plot([0.5, 1], [0.5, 1], ":", color="#6b7480", linewidth=1)
    bins = {lang: own for lang, own in report["calibration"].items() if own}
    plot(axis, {lang: [(confidence, right) for confidence, right, _ in own] for lang, own in bins.items()})
    for lang, own in bins.items():  # a dot's area: how many pairs it stands for
        confidence, right, pairs = zip(*own)
        axis.scatter(confidence, right, [300 * n / sum(pairs) for n in pairs], COLORS[lang], alpha=0.6)
    text = ("Pairs of answers that it puts in the right order: on test prompts, by the scorer (gold), and on "
            "those that reward.py held out, by their own labels, some of which are wrong. Chance is a half; "
            "on the dotted diagonal its confidence is what it is worth.")
    return section("The reward model", text, draw(figure) + table(reward_rows(report)))


def ppo_section(report):
    """What became of the scorer's reward while PPO raised the reward model's; both against KL."""
    points = [point for curve in report.get("ppo", {}).values() for point in curve]
    told = (("rm_reward", "Proxy: the reward model's score"), ("gold", "Gold: the scorer's reward"))
    told = [(y, says) for y, says in told if any(point[y] is not None for point in points)]
    if not told:
        return ""
    figure = Figure((11, 6))
    for column, (y, says) in enumerate(told, 1):
        by_step = figure.add_subplot(2, 2, column, title=says, xlabel="step")
        by_kl = figure.add_subplot(2, 2, column + 2, title=f"{says}, against KL", xlabel=NOTES["kl"])
        for number, (name, curve) in enumerate(report["ppo"].items()):
            color, curve = f"C{number}", [c for c in curve if None not in (c[y], c["kl"])]
            steps, kl, values = ([c[key] for c in curve] for key in ("step", "kl", y))
            means = [mean(values[max(0, i - 3) : i + 4]) for i in range(len(values))]
            by_step.plot(steps, values, ".", color=color, alpha=0.35, markersize=4)
            by_step.plot(steps, means, label=name, color=color, linewidth=1.6)
            by_kl.scatter(kl, values, 14, color, label=name, linewidth=0, alpha=0.7)
        by_step.legend()
        by_kl.legend()
    text = ("A dot is the mean over one step's samples, a line the mean over seven steps. Proxy is what PPO "
            "is trained on, gold is what was meant: where the first rises and the second falls, the reward "
            "model is being exploited.")
    return section("PPO: proxy against gold", text, draw(figure))


def packed_section(report):
    """What low-bit weights cost: size and figures of each quantized stage beside its source."""
    families, stages, size = {}, report["stages"], report["bytes"]
    for name, folder in report["settings"]["models"].items():
        run = read_if_there(Path(folder) / "run.json")
        made = run.get("options", {}) if run.get("stage") == "quantize" else {}
        source = Path(made.get("model", "")).resolve().name
        if source in stages and "bits" in made:
            families.setdefault(source, [("whole", source)]).append((f"INT{made['bits']}", name))
    if not families:
        return ""
    figure = Figure((11, 2.8))
    for column, (title, show, value) in enumerate((
            ("Megabytes", "{:.1f}", lambda name: size[name] / 1e6),
            ("facts_exact, en", "{:.1%}", lambda name: stages[name]["en"]["facts_exact"]),
            ("facts_exact, zh", "{:.1%}", lambda name: stages[name]["zh"]["facts_exact"])), 1):
        groups = {source: [(label, value(name)) for label, name in own] for source, own in families.items()}
        if any(bar is not None for own in groups.values() for _, bar in own):
            bars(figure.add_subplot(1, 3, column, title=title), groups, show)
    rows = [["", "MB", "of whole", *(f"{says} {lang}" for says in PACKED.values() for lang in ("en", "zh"))]]
    for source, own in families.items():
        for label, name in own:
            cells = [shown(key, stages[name][lang][key]) for key in PACKED for lang in ("en", "zh")]
            share = f"{size[name] / max(size[source], 1):.3f}"
            rows.append([f"{name} ({label})", f"{size[name] / 1e6:.2f}", share, *cells])
    text = "Each model as it was trained, and after rounding its linear layers to 8 or 4 bits."
    return section("Low-bit weights", text, draw(figure) + table(rows))


def cleaning_section(report):
    """What prepare.py dropped and why; where noise was planted, what it made of that."""
    corpus = Path(report["settings"]["run"]) / "corpus"
    cleaning, planted = read_if_there(corpus / "report.json"), read_if_there(corpus / "cleaning.json")
    columns = cleaning.get("all", {})  # read, kept, and every reason
    sources = {**cleaning.get("sources", {}), "all": columns}
    rows = [[name, *(own.get(key, "") for key in columns)] for name, own in sources.items()]
    body = columns and table([["source", *(key.replace("_", " ") for key in columns)], *rows])
    noise = [[label.replace("_", " "), row["documents"], row["dropped"], f"{100 * row['recall']:.1f} %"]
             for label, row in planted.get("labels", {}).items()]
    if body and noise:
        body += "<br>" + table([["planted", "documents", "dropped", "treated as it should be"], *noise])
    return section("Cleaning", "Documents read, kept, and dropped by reason.", body)


def samples_section(report, answers):
    """The same prompts answered by every stage, side by side; stages that answer alike share a cell."""
    answered = {stage: {key_of(a): a for a in records} for stage, records in answers.items()}
    items = [a for records in answers.values() for a in records]
    cards = []
    for sample in choose_samples(items, report["settings"]["samples"]):
        cells = {}  # (answer, whether it ended, which prompt): stages that gave it, and the record
        for item in (sample, *continuations([sample])):
            for stage, own in answered.items():
                if a := own.get(key_of(item)):
                    cells.setdefault((a["answer"], a["finished"], key_of(item)), ([], a))[0].append(stage)
        cells = [answer_cell(", ".join(stages), a) for stages, a in cells.values()]
        said = "".join(f'<div><span class="tag">{html.escape(sample["kind"])} · {m["role"]}</span>'
                       f'{html.escape(m["content"])}</div>' for m in messages_of(sample["prompt"]))
        cards.append(f'<div class="card" lang="{sample["lang"]}"><div class="ask">{said}</div>'
                     f'<div class="answers">{"".join(cells)}</div></div>\n')
    text = ("Chosen by a hash of the prompt, so by nobody; answers as they came out, equal ones once. Green "
            "and red: the scorer's reward is above or below zero.")
    return section("Dialogues", text, "".join(cards))


def answer_cell(stage, a):
    """An answer under its stage, what is true of it in the verdict, and the reward."""
    gold, plain = a["verdict"].get("gold", 0), a["kind"] in PLAIN
    notes = [key.replace("_", " ") for key, value in a["verdict"].items() if value == 1 and key != "gold"]
    notes += [f"reward {gold:+g}"] * ("gold" in a["verdict"]) + ["continued as text"] * plain
    notes += ["cut off"] * (not a["finished"] and not plain)
    mood = "good" if gold > 0 else "bad" if gold < 0 else ""
    tag = f'<strong>{html.escape(stage)}</strong>{html.escape("".join(f" · {note}" for note in notes))}'
    return f'<div class="answer {mood}"><div class="tag">{tag}</div>{html.escape(a["answer"])}</div>'


def cost_section(report):
    seconds, size = report["seconds"], report["bytes"]
    rows = [[name, f"{seconds[name]:,.1f}" if name in seconds else "–",
             f"{size[name] / 1e6:,.2f}" if name in size else "–"] for name in {**seconds, **size}]
    body = table([["stage", "seconds", "megabytes"], *rows, ["all", f"{sum(seconds.values()):,.1f}", ""]])
    return section("Time and size", "Wall seconds of each stage, and its weights on disk.", body)


# ---- Runs --------------------------------------------------------------------------------------------------


def finish(report, answers, measured, rankings, score, out):
    """Put the figures into the report; write all, the page last: its presence says that all is whole."""
    report["stages"] = {name: figures(answers[name], *measured[name]) for name in answers}
    report["reward"], report["calibration"] = reward_figures(rankings, score) if rankings else ({}, {})
    (out.parent / "answers").mkdir(parents=True, exist_ok=True)
    files = {f"answers/{stage}.jsonl": records for stage, records in answers.items()}
    files |= {"rankings.jsonl": rankings} if rankings else {}
    for old in [*(out.parent / "answers").glob("*.jsonl"), out.parent / "rankings.jsonl"]:
        if old.relative_to(out.parent).as_posix() not in files:
            old.unlink(missing_ok=True)  # of an earlier report
    for name, records in files.items():
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_whole(out.parent / name, lines.encode("utf-8", "replace"))  # meta is not checked
    write_json(out.parent / "report.json", report)
    write_whole(out, page(report, answers).encode())
    for rows in ([row for lang in LANGUAGES for row in figure_rows(report, lang)], reward_rows(report)):
        widths = [max(map(len, column)) for column in zip(*rows)]
        for name, *cells in rows:
            cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
            print(name.ljust(widths[0]), *cells, sep="  ")
    print(f"wrote {out}, {out.parent / 'report.json'} and {out.parent / 'answers'}/")


def evaluate(options, out, ranks):
    """Run every model, judge, and write the report."""
    began = time.perf_counter()
    folders = {Path(name).resolve().name: Path(name) for name in options.model}
    for folder in folders.values():
        if not folder.is_dir():
            raise InputError(f"--model {folder}: no such folder; train it first")
    if len(folders) < len(options.model):
        raise InputError("--model: two folders of one name, and a stage is called by its folder's name")
    score = load_scorer(options.scorer) if options.scorer else None
    items = read_prompts(options.prompts, options.limit) if options.prompts else []
    if not score:
        items += continuations(choose_samples(items, options.samples))
    run = Path(options.data).parent if options.data else out.parent
    settings = {"models": {name: str(folder) for name, folder in folders.items()}, "run": str(run)}
    settings |= {key: getattr(options, key) for key in ("scorer", "samples", "reward", "hacking")}
    report = {"stages": {}, "seconds": seconds_of(folders, run), "bytes": {}, "left_out": {}, "ppo": {},
              "reward": {}, "calibration": {}, "settings": settings}
    report["ppo"] = ppo_curves(report, score)
    dtype, answers, measured = DTYPES[options.dtype], {}, {}
    reward = load_folder(options.reward, ranks.device, dtype, RewardModel) if options.reward else None
    reference = load_folder(options.reference, ranks.device, dtype) if options.reference else None
    rankings, left_out = score_rankings(options, reward, ranks) if reward else ([], 0)
    for name, folder in folders.items():
        found, *measured[name] = run_stage(name, folder, items, options, reference, ranks)
        answers[name] = [judged(a, score) for a in found]
        report["bytes"][name] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        report["left_out"][name] = len(items) - len(found)
    if reward:
        chats = [a for records in answers.values() for a in records if a["kind"] not in PLAIN]
        asked = [(a["prompt"], a["answer"], a["finished"]) for a in chats]
        for a, value in zip(chats, reward_scores(reward, asked, options, ranks)):
            a["rm_reward"] = value
    if ranks.first:
        report["left_out"] |= {"rankings": left_out} if left_out else {}
        report["seconds"]["evaluate"] = round(time.perf_counter() - began, 1)
        finish(report, answers, measured, rankings, score, out)


def rescore(options, out):
    """The report at --out from its answers: new verdicts; what needs a model or a clock is carried over."""
    report, answers, measured = read_json(out.parent / "report.json"), {}, {}
    if not {"stages", "seconds", "bytes", "settings"} <= report.keys():
        raise InputError(f"--rescore: {out.parent / 'report.json'} is no report of evaluate.py")
    settings = report["settings"]
    settings |= {key: value for key in ("scorer", "hacking") if (value := getattr(options, key))}
    if options.samples != Options.samples:
        settings["samples"] = options.samples
    for name, folder in settings["models"].items():
        if not Path(folder).is_dir():
            print(f"{name}: no folder {folder} from here, so its training is left out", file=sys.stderr)
    score = load_scorer(settings["scorer"]) if settings["scorer"] else None
    for name, stage in report["stages"].items():
        path = out.parent / "answers" / f"{name}.jsonl"
        answers[name] = [*read_records(path, lambda a: judged(a, score))]
        measured[name] = ({lang: stage[lang]["bits_per_byte"] for lang in LANGUAGES},
                          {lang: stage[lang].get("kl_to_sft") for lang in ("en", "zh")})
    path = out.parent / "rankings.jsonl"
    rankings = [*read_records(path, lambda r: ranking(r, scored=True))] if report.get("reward") else []
    report["ppo"] = report.get("ppo", {}) | ppo_curves(report, score)
    finish(report, answers, measured, rankings, score, out)


def summary(paths):
    """Markdown: for each stage, language and figure, the mean over the reports and the value in each."""
    folders = [Path(path).resolve().parent for path in paths]
    alike = len({folder.name for folder in folders}) < len(folders)
    names = [str(folder) if alike else folder.name for folder in folders]
    reports = {name: read_json(Path(path)) for name, path in zip(names, paths)}
    stages = [report.get("stages") for report in reports.values()]
    whole = all(isinstance(own, dict) and all(isinstance(s, dict) for s in own.values()) for own in stages)
    if not whole or len(reports) < len(paths):
        raise InputError(f"--summary {' '.join(paths)}: expected report.json files in different folders")
    lines = [f"| stage | | figure | mean | {' | '.join(reports)} |", "|---" * (4 + len(paths)) + "|"]
    for stage in dict.fromkeys(stage for report in reports.values() for stage in report["stages"]):
        for lang in LANGUAGES:
            for name in FIGURES:
                values = [r["stages"].get(stage, {}).get(lang, {}).get(name) for r in reports.values()]
                if any(v is not None for v in values):
                    cells = [shown(name, v) for v in (mean(values), *values)]
                    lines.append(f"| {stage} | {lang} | {name} | {' | '.join(cells)} |")
    for lang in ("en", "zh"):
        found = [r.get("reward", {}).get(lang, {}) for r in reports.values()]
        found = [own | {f"by_kind.{kind}": v for kind, v in own.get("by_kind", {}).items()} for own in found]
        for name in dict.fromkeys(name for own in found for name in own if name not in ("by_kind", "pairs")):
            values = [own.get(name) for own in found]
            cells = [shown(name, v) for v in (mean(values), *values)]
            lines.append(f"| reward | {lang} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@one_line_errors
def main(argv=None):
    options = parse_options(Options, argv, "evaluate.py")
    if not options.summary and not (options.out or "").endswith(".html"):
        raise InputError(f"--out {options.out or ''}: expected the page to write, such as run/report.html")
    out = Path(options.out) if options.out else None
    if out and out.exists() and not options.overwrite and not options.rescore:
        raise InputError(f"{out} is there; --overwrite writes over it, --rescore judges its answers again")
    if options.summary:
        text = summary(options.summary)
        print(text, end="")
        return write_whole(out, text.encode()) if out else None
    if options.hacking and not Path(options.hacking, "samples.jsonl").is_file():
        raise InputError(f"--hacking {options.hacking}: no samples.jsonl; it is to be a folder of ppo.py's")
    if options.rescore:
        needless = ("model", "data", "prompts", "reward", "reference", "ranked", "limit", "max_windows")
        if given := [f"--{name.replace('_', '-')}" for name in needless if getattr(options, name)]:
            raise InputError(f"--rescore runs no model: leave out {', '.join(given)}")
        try:
            return rescore(options, out)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{out.parent}: no whole report of evaluate.py to rescore ({error!r})") from None
    if (out.parent / "report.json").exists() and not options.overwrite:
        raise InputError(f"{out.parent} holds another page's report.json; --overwrite writes over it")
    if not options.model or not (options.prompts or options.data):
        raise InputError("nothing to measure: give --model folders, and --prompts or --data or both")
    if options.ranked and not options.reward:
        raise InputError("--ranked is what a reward model is judged by: give --reward too")
    with process_group(options.device) as ranks:
        return evaluate(options, out, ranks)


if __name__ == "__main__":
    sys.exit(main())
