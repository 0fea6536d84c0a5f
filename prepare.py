"""Raw text -> a clean, deduplicated, mixed and split corpus.

    python prepare.py --input FILES_OR_FOLDERS --out run/corpus

In the order of a document's way: `decode` bytes to text, `repair_mojibake`, `normalise` Unicode, `detect_language`,
`strip_html`, `noise` (the regex filters), `keyword_reason` (harm and bias), `mask_personal`, then, with all documents
at hand, `find_duplicates` (exact by hash, near by MinHash and LSH), `mix` by kind and `split` by hash. Every document
that is dropped is in dropped.jsonl with its reason, every one that was changed in changed.jsonl with its counts.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import html
import itertools
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tokenizer import InputError, one_line_errors, option, parse_options

KINDS, LANGS, SPLITS = ("web", "papers", "code"), ("en", "zh", "code"), ("train", "valid", "test")


@dataclass(kw_only=True)
class Options:
    """Clean raw text (.txt, .jsonl, .jsonl.gz, folders of them), remove duplicates, mix the kinds, split 90/5/5."""

    input: list[str] = option("files (.txt is one document, .jsonl has `text`) or folders, walked in sorted order")
    out: str = option("corpus folder to write: train/ valid/ test/ report.json dropped.jsonl changed.jsonl")
    mix: list[str] = option("shares of the UTF-8 bytes by kind, as `web=75 papers=15 code=10`; `none` keeps all",
                            ["web=75", "papers=15", "code=10"])
    near_duplicate: float = option("Jaccard similarity of shingles from which two documents are one; 1 turns it off", 0.8)
    seed: int = option("which documents of an over-represented kind stay", 1)
    processes: int = option("processes that clean; the result does not depend on it", 2)
    skip_bad: bool = option("count and report malformed lines instead of stopping at the first", False)
    overwrite: bool = option("replace a finished --out", False)


# ---------------------------------------------------------------------------------------------------------
# Bytes to text

HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]")


def decode(data: bytes) -> tuple[str, int]:
    """Bytes -> (text, number of places that could not be read, each now U+FFFD).

    UTF-8, else UTF-16 by its mark, else GB18030 where all of it fits and at least half of what is not ASCII is Han
    (old Chinese files), else UTF-8 with the bad bytes replaced.
    """
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = data.decode("utf-16", "replace")
        return text, text.count("\ufffd")
    try:
        return data.decode("utf-8"), 0
    except UnicodeDecodeError:
        pass
    try:
        text = data.decode("gb18030")
        wide = sum(c > "\x7f" for c in text)
        if len(HAN.findall(text)) >= 0.5 * wide > 4:
            return text, 0
    except UnicodeDecodeError:
        pass
    text = data.decode("utf-8", "replace")
    return text, text.count("\ufffd")


# UTF-8 read as Windows-1252: each byte became a character; WINDOWS turns such characters back into U+0080..U+00FF.
WINDOWS = {ord(bytes([b]).decode("cp1252", "replace")): b for b in range(0x80, 0xA0)}
del WINDOWS[0xFFFD]  # 0x81 0x8D 0x8F 0x90 0x9D have no character there: they stay control characters
_TAIL = "[\x80-\xbf" + "".join(map(chr, WINDOWS)) + "]"
MISREAD_LATIN = re.compile(f"[\xc2-\xdf]{_TAIL}|[\xe1-\xef]{_TAIL}{{2}}|\xf0{_TAIL}{{3}}")
HIGH_LATIN = re.compile("[\x80-\xff" + "".join(map(chr, WINDOWS)) + "]")
WELL_FORMED = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe1-\xef][\x80-\xbf]{2}|\xf0[\x90-\xbf][\x80-\xbf]{2}")
HIGH_BYTE = re.compile(rb"[\x80-\xff]")
DAMAGE = re.compile("\ufffd|锟斤拷?|斤拷|\xe2\u20ac|[\xc2\xc3][\x80-\xbf]")


def repair_line(line: str) -> tuple[str, int]:
    """One line of mojibake, read again in the right encoding -> (line, characters that are beyond repair)."""
    high = HIGH_LATIN.findall(line)
    if len(high) >= 3:
        length = sum(map(len, MISREAD_LATIN.findall(line)))
        if length >= 3 and length >= 0.6 * len(high):  # UTF-8 read as Windows-1252 or Latin-1: "donâ€™t"
            back = lambda m: m[0].translate(WINDOWS).encode("latin-1").decode("utf-8", "replace")
            return MISREAD_LATIN.sub(back, line), 0
        if len(high) >= 8 and len(high) >= 0.7 * sum(not c.isspace() for c in line):  # GBK read as Latin-1: "ÄãºÃ"
            try:
                text = line.translate(WINDOWS).encode("latin-1").decode("gb18030")
                return (text, 0) if len(HAN.findall(text)) >= 0.6 * len(text.strip()) else (line, len(high))
            except ValueError:
                return line, 0
    wide = sum(c > "\u2fff" for c in line)
    if wide >= 4:  # UTF-8 read as GBK: "浣犲ソ" for 你好
        data = line.encode("gb18030", "replace")
        fit = sum(map(len, WELL_FORMED.findall(data)))
        if fit >= 0.8 * len(HIGH_BYTE.findall(data)):
            try:
                return data.decode("utf-8"), 0
            except UnicodeDecodeError:
                return line, wide
    return line, 0


def repair_mojibake(text: str) -> tuple[str, int, float]:
    """Text -> (text, lines repaired, share of its characters that are broken and stay so), in 0..1.

    What was read in a wrong encoding without loss is read again in the right one; what was lost is not guessed at.
    Runs before `normalise`, which would take away the control characters that misread bytes have become.
    """
    if text.isascii():
        return text, 0, 0.0
    repaired, lines, damaged = 0, [], 0
    for line in text.split("\n"):
        new, bad = repair_line(line)
        repaired += new != line
        damaged += bad or len("".join(DAMAGE.findall(new)))
        lines.append(new)
    return "\n".join(lines), repaired, damaged / max(1, len(text))


# ---------------------------------------------------------------------------------------------------------
# Unicode

_ERASE = [*range(0x00, 0x09), 0x0E, 0x0F, *range(0x10, 0x20), *range(0x7F, 0x85), *range(0x86, 0xA0), 0xAD, 0x200B,
          0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFE), 0xFFFE, 0xFFFF,
          *range(0xFDD0, 0xFDF0), *range(0xE000, 0xF900)]  # controls, zero width, bidi marks, private use
CHARACTERS = dict.fromkeys(_ERASE, "")
CHARACTERS |= dict.fromkeys([0x0B, 0x0C, 0x0D, 0x85, 0x2028, 0x2029], "\n")
CHARACTERS |= dict.fromkeys([0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000], " ")
CHARACTERS |= {c: chr(c - 0xFEE0) for a, z in ("０９", "Ａｚ") for c in range(ord(a), ord(z) + 1) if chr(c).isalnum()}
CHARACTERS |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")  # lone surrogates, which JSON can spell
JOINER = re.compile("[\u200c\u200d]+(?![\u2600-\u27bf\U0001f000-\U0001faff])")  # between emoji they carry meaning


def normalise(text: str) -> str:
    """One spelling for one text: NFC, one kind of line end and of space, nothing invisible. Idempotent.

    Full-width letters and digits become ASCII; Chinese punctuation is left as it is (NFKC would turn ，into a comma).
    """
    text = text.replace("\r\n", "\n")
    if not text.isascii() or not text.isprintable():
        text = JOINER.sub("", text.translate(CHARACTERS))
        text = unicodedata.normalize("NFC", text)
    text = re.sub(r"[ \t]+(?=\n|\Z)", "", text)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n")


# ---------------------------------------------------------------------------------------------------------
# Language and HTML

FENCED = re.compile(r"^ *(```|~~~).*?(?:^ *\1|\Z)", re.M | re.S)
CODE_LINE = re.compile(r"""^[ \t]*(?:
    (?:async[ ])?def[ ]\w+\( | class[ ]\w+[(:{ ].*[:{]?$ | import[ ][\w.{*"'] .*$ | from[ ][\w.]+[ ]import[ ] |
    return\b[^.!?]*$ | \#include | (?:export[ ]|default[ ]|async[ ])*function\b.*[({] | (?:const|let|var)[ ].*=.* |
    (?:public|private|static|package|using|namespace|fn|pub|struct|func)[ ].*[;{(] | (?:if|for|while|switch)[ ]?\(.*[{;)] |
    (?:if|elif|for|while|with)[ ].*:$ | (?:else|try|finally):$ | except\b.*:$ | \} | @\w+[\w.(]* | >>>[ ] | raise[ ]\w+ |
    [\w.\[\]'"]+[ ][-+*/]?=[ ]\S.* | [\w.]+\(.*\)[;,]?$ | .*\)[ ]?\{$ | .*[)\w]; $ | "?\w+"?:[ ].*,$)""", re.M | re.X)
OTHER_SCRIPT = re.compile(r"[\u0370-\u1fff\u3040-\u30ff\uac00-\ud7af]")  # Greek to Georgian, kana, hangul, ...
LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")
ENGLISH = set("the of and to in is that it was for with as be on not are by this you his from or have at".split())
EUROPEAN = set("de la le les des et el los las que en un une une der die das und ist nicht o os uma em para por con "
               "del se per che il di è é est do da dos não w na się nie jest bir ve için на και".split())


def is_code(text: str) -> bool:
    """Whether at least a fifth of the lines outside Markdown fences reads like a program's."""
    text = FENCED.sub("", text)
    lines = sum(1 for line in text.split("\n") if line.strip())
    return len(CODE_LINE.findall(text)) >= max(2, 0.2 * lines)


def detect_language(text: str) -> str:
    """'zh', 'en' or 'other', by the shares of scripts; Latin script is English unless its small words say otherwise."""
    han, latin, other = (len(p.findall(text)) for p in (HAN, LATIN, OTHER_SCRIPT))
    if other > 0.3 * (han + latin + other):
        return "other"
    if 2 * han >= 0.3 * (2 * han + latin):  # a Han character says about as much as two letters or more
        return "zh"
    words = re.findall(r"[^\W\d_]+", text.lower())
    english, european = sum(w in ENGLISH for w in words), sum(w in EUROPEAN for w in words)
    return "other" if len(words) >= 20 and european > 0.08 * len(words) and european > 2 * english else "en"


BLOCKS = set("p div br hr h1 h2 h3 h4 h5 h6 ul ol li dl dt dd table thead tbody tfoot tr section article header footer nav "
             "aside main form fieldset blockquote pre figure figcaption html head body title address center option".split())
INLINE = set("a abbr acronym audio b base big button canvas caption cite code col colgroup data del details dfn em embed font "
             "i iframe img input ins kbd label legend link mark map meta noscript object param picture q s samp script select "
             "small source span strike strong style sub summary sup svg path td textarea th time tt u var video wbr".split())
HTML = re.compile(r"^ *(?:```|~~~).*?(?:^ *(?:```|~~~)|\Z)|`[^`\n]+`|<!--|<(/?)([A-Za-z][\w:-]*)(?:\s[^<>]*)?/?>"
                  r"|<(?:!DOCTYPE|\?)[^<>]*>", re.M | re.S | re.I)
ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")


def strip_html(text: str) -> tuple[str, int]:
    """Text -> (text without tags, comments, scripts, styles and entities; how many of them there were).

    A tag is one of HTML's, or of a name that this text also closes (XML); `Vec<T>` and `<unk>` stay, and so does what
    stands in Markdown code. One pass over the tags, linear in the length whatever the input.
    """
    lower = text.lower()
    closed = set(re.findall(r"</([a-z][\w:-]*)", lower))
    last_end = {name: lower.rfind(end) for name, end in (("script", "</script"), ("style", "</style"), ("!", "-->"))}
    parts, at, count = [], 0, 0
    for match in HTML.finditer(text) if "<" in text else ():
        name = "!" if match[0] == "<!--" else (match[2] or "").lower()
        is_tag = name in BLOCKS or name in INLINE or name in closed or match[0][:2] in ("<!", "<?")
        if match.start() < at or not is_tag or match[0].startswith("`"):
            continue
        gap = "\n" if name in BLOCKS else " " if name in ("td", "th") or name not in INLINE else ""
        parts += text[at:match.start()], gap
        at, count = match.end(), count + 1
        if not match[1] and last_end.get(name, -1) > at:  # <script>, <style>, <!-- : what is inside goes too
            end = "-->" if name == "!" else "</" + name
            at = lower.index(end, at)
            at = lower.find(">", at) + 1 or len(text)
    text, entities = ENTITY.subn(lambda m: html.unescape(m[0]), "".join(parts) + text[at:])
    if count:
        text = re.sub(r"[ \t]*\n[ \t]*(?:\n[ \t]*)+", "\n\n", text)
    return text, count + entities


# ---------------------------------------------------------------------------------------------------------
# Noise

URL = re.compile(r"(?:https?://|www\.)[^\s<>()\[\]，。；）】]+", re.I)
MINIMUM = {"en": 20, "zh": 8, "code": 20}  # characters that are not space; a couplet of 2 x 5 Han characters is text
SYMBOLS = {"en": 0.45, "zh": 0.45, "code": 0.75}  # largest share of what is neither letter nor digit


def noise(text: str, lang: str) -> tuple[str, str] | None:
    """(reason, detail) when the text is too short, mostly symbols, links or repetition; else None."""
    dense = "".join(text.split())
    if len(dense) < MINIMUM[lang]:
        return "too_short", f"{len(dense)} characters"
    symbols = sum(not c.isalnum() for c in dense) / len(dense)
    if symbols > SYMBOLS[lang]:
        return "symbols", f"{symbols:.0%} are neither letters nor digits"
    links = sum(map(len, URL.findall(text))) / len(dense)
    if links > 0.4:
        return "links", f"{links:.0%} of the text is links"
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    repeated = sum(len(line) * (n - 1) for line, n in Counter(lines).items())
    if len(lines) >= 4 and repeated > 0.5 * sum(map(len, lines)) and lang != "code":
        return "repetition", "more than half of the text is repeated lines"
    data = text.encode()
    packed = len(zlib.compress(data, 1)) / len(data)
    if len(data) > 200 and packed < 0.1:
        return "repetition", f"packs to {packed:.0%} of its size"
    run = re.search(r"([^\s\d=_*.#~+-])\1{24}", text) if lang != "code" else None
    if run:
        return "repetition", f"{run[1]} again and again"
    return None


# ---------------------------------------------------------------------------------------------------------
# Harm, bias and spam by key phrases

# Per reason and language: (phrases that say it by themselves, words that only add up). Regular expressions over
# lower-case text. A word alone is never enough (an article may name it), and a phrase must be dense in the text.
KEYWORDS = {}


def keyword_reason(text: str, lang: str) -> tuple[str, str] | None:
    return None


# ---------------------------------------------------------------------------------------------------------
# Personal data

EMAIL = re.compile(r"(?<![\w.+-])(?!git@)[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9][A-Za-z0-9-]{0,62}\.){1,4}[A-Za-z]{2,12}(?![\w-])")
CHINESE_ID = re.compile(r"(?<![\w-])[1-9]\d{5}(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?!\w)")
CARD = re.compile(r"(?<![\w.-])[2-6]\d{3}(?:[ -]?\d){9,15}(?![\w-]|\.\d)")
PHONE = re.compile(r"""(?<![\w.+-])(?:
    (?:\+?86[ -]?)?1[3-9]\d([ -]?)\d{4}\1\d{4} |                     # Chinese mobile
    (?:\+86[ -]?)?\(?0\d{2,3}\)?[ -]\d{7,8} |                        # Chinese landline
    (?:\+?1[ .-]?)?(?:\([2-9]\d\d\)[ ]?|[2-9]\d\d[.-])\d{3}[.-]\d{4} |   # North America
    \+[1-9]\d{0,2}(?:[ .-]?\(?\d{1,4}\)?){2,5}                        # others, in international form
    )(?![\w-])""", re.X)
ADDRESS = re.compile(r"(?<![\w.-])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w-]|\.\d)")
LOCAL = re.compile(r"0\.|10\.|127\.|192\.168\.|169\.254\.|172\.(?:1[6-9]|2\d|3[01])\.|255\.|[1-9]\.\d\.\d\.\d$")


def luhn(digits: str) -> bool:
    """The check of card numbers (ISO/IEC 7812-1): every second digit from the right doubled, the sum a multiple of 10."""
    values = [int(d) for d in reversed(digits)]
    return sum(values[::2]) % 10 == -sum(sum(divmod(2 * d, 10)) for d in values[1::2]) % 10


def chinese_id_checks(number: str) -> bool:
    """The check character of an 18-digit identity number (GB 11643, ISO 7064 MOD 11-2)."""
    total = sum(int(d) * pow(2, 17 - i, 11) for i, d in enumerate(number[:17]))
    return number[17].upper() == "10X98765432"[total % 11]


def is_card(number: str) -> bool:
    digits = re.sub(r"\D", "", number)
    return 13 <= len(digits) <= 19 and len(set(digits)) > 2 and luhn(digits)


def is_phone(number: str) -> bool:
    return 7 <= len(re.sub(r"\D", "", number)) <= 15


PERSONAL = (  # (name, placeholder, pattern, the check that a match must pass)
    ("email", "[EMAIL]", EMAIL, lambda s: True), ("id_number", "[ID]", CHINESE_ID, chinese_id_checks),
    ("card", "[CARD]", CARD, is_card), ("phone", "[PHONE]", PHONE, is_phone),
    ("ip_address", "[IP]", ADDRESS, lambda s: not LOCAL.match(s)),  # local addresses and version numbers are nobody's
)


def mask_personal(text: str) -> tuple[str, Counter]:
    """Text -> (text with placeholders for personal data, how many of each sort)."""
    counts = Counter()
    for name, placeholder, pattern, check in PERSONAL:
        def replace(match):
            if not check(match[0]):
                return match[0]
            counts[name] += 1
            return placeholder
        text = pattern.sub(replace, text)
    return text, counts


# ---------------------------------------------------------------------------------------------------------
# Duplicates: what two texts are compared by, MinHash, locality-sensitive hashing

TOKENS = {"text": re.compile(r"[^\W_]+|[+*/=<>×÷%-]"), "code": re.compile(r"\w+|[^\w\s]")}
HASHES, SHINGLE = 120, 5
TOP = np.uint64(32)


def tokens(text: str, lang: str) -> list[str]:
    """What duplicates are compared by: words and signs; case, punctuation and spacing count in code only."""
    return TOKENS["code"].findall(text) if lang == "code" else TOKENS["text"].findall(text.casefold())


def fingerprint(pieces: list[str]) -> int:
    """128-bit hash of a text's tokens: equal for exact duplicates; its top bits choose the split."""
    return int.from_bytes(hashlib.blake2b("\0".join(pieces).encode(), digest_size=16).digest(), "big")


def scramble(x: np.ndarray) -> np.ndarray:
    """64-bit finaliser of SplitMix64 (Steele et al. 2014): spreads every input bit over the word."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


MULTIPLY = scramble(np.arange(1, HASHES + 1, dtype=np.uint64)) | np.uint64(1)  # (P,)
ADD = scramble(np.arange(HASHES + 1, 2 * HASHES + 1, dtype=np.uint64))  # (P,)


@functools.lru_cache(maxsize=1 << 18)
def word_hash(word: str) -> int:
    return zlib.crc32(word.encode())


def shingles(pieces: list[str], lang: str) -> np.ndarray:
    """Distinct hashes (S,) uint64 of the runs of five words; in Chinese, which writes no spaces, of five characters."""
    if lang == "zh":
        units = np.frombuffer("".join(pieces).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    else:
        units = np.array([word_hash(w) for w in pieces], dtype=np.uint64)
    width = max(1, min(SHINGLE, len(units)))
    runs = np.zeros(max(0, len(units) - width + 1), dtype=np.uint64)  # (S',)
    for k in range(width):
        runs = scramble(runs + units[k:k + len(runs)] + np.uint64(0x9E3779B97F4A7C15))
    return np.unique(runs)


def minhash(runs: np.ndarray) -> np.ndarray:
    """Signature (P,) uint32: the least value of the set (S,) under each of P hash functions (Broder 1997).

    Two signatures agree at a place with probability equal to the sets' Jaccard similarity.
    """
    signature = np.full(HASHES, 2**32 - 1, dtype=np.uint64)
    for start in range(0, len(runs), 1024):
        hashed = (runs[start:start + 1024, None] * MULTIPLY + ADD) >> TOP  # (<= 1024, P), multiply-shift hashing
        np.minimum(signature, hashed.min(axis=0), out=signature)
    return signature.astype(np.uint32)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|A and B| / |A or B| of two sets of shingles."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / max(1, len(a) + len(b) - common)


def rows_per_band(threshold: float) -> int:
    """Most rows to a band such that a pair at the threshold shares some band with probability at least 0.99."""
    rows = [r for r in range(1, HASHES + 1) if HASHES % r == 0]
    return max([r for r in rows if 1 - (1 - threshold**r) ** (HASHES // r) >= 0.99], default=1)


def find_duplicates(kept: list, threshold: float, load_shingles) -> dict:
    """Entries in reading order -> {position: (reason, detail)} of those that repeat an earlier one that stays.

    Exact: same fingerprint. Near: same lang, some band of the signature equal (LSH), and a true Jaccard similarity
    of the shingles, `load_shingles(entry)`, of at least the threshold.
    """
    rows = rows_per_band(threshold)
    seen, buckets, drops = {}, defaultdict(list), {}
    for position, entry in enumerate(kept):
        if entry.key in seen:
            drops[position] = "exact_duplicate", f"of {seen[entry.key].id}"
            continue
        seen[entry.key] = entry
        if threshold >= 1:
            continue
        bands = [(entry.lang, b, entry.signature[b:b + rows].tobytes()) for b in range(0, HASHES, rows)]
        for other in dict.fromkeys(o for band in bands for o in buckets[band]):
            if np.mean(kept[other].signature == entry.signature) < threshold - 0.15:  # 4 standard deviations
                continue
            similarity = jaccard(load_shingles(kept[other]), load_shingles(entry))
            if similarity >= threshold:
                drops[position] = "near_duplicate", f"of {kept[other].id}, Jaccard {similarity:.2f}"
                break
        else:
            for band in bands:
                buckets[band].append(position)
    return drops


# ---------------------------------------------------------------------------------------------------------
# Mixing and splitting


def parse_mix(words: list[str]) -> dict | None:
    """['web=75', 'code=10'] -> {'web': 75.0, 'code': 10.0}; ['none'] -> None."""
    if words == ["none"]:
        return None
    shares = {}
    for word in words:
        match = re.fullmatch(r"(\w+)=(\d+(?:\.\d+)?)", word)
        if not match or match[1] not in KINDS or match[1] in shares:
            raise InputError(f"--mix {word}: expected shares as web=75 papers=15 code=10, each kind once, or none")
        shares[match[1]] = float(match[2])
    if not any(shares.values()):
        raise InputError("--mix: at least one share must be above 0")
    return shares


def mix(entries: list, shares: dict, seed: int) -> tuple[set, list[str]]:
    """Positions that stay, and notices: the largest corpus whose kinds have the given shares of its bytes.

    The scarcest kind stays whole, the others are thinned to fit; which documents go is a hash of seed and text. Bytes
    of UTF-8, since they follow the tokens of both languages closely (characters would count Chinese thrice).
    """
    have = Counter()
    for entry in entries:
        have[entry.kind] += entry.bytes
    wanted = {kind: share for kind, share in shares.items() if share and have[kind]}
    notices = [f"mix: no {kind} in the input; the other shares stand as they are to one another"
               for kind, share in shares.items() if share and not have[kind]]
    if not wanted:
        raise InputError(f"--mix: the input has none of {', '.join(shares)}; use --mix none")
    scale = min(have[kind] / share for kind, share in wanted.items())
    order = sorted(range(len(entries)), key=lambda i: hashlib.blake2b(b"%d %d" % (seed, entries[i].key)).digest())
    taken, stay = Counter(), set()
    for i in order:
        if taken[entries[i].kind] < scale * wanted.get(entries[i].kind, 0):
            taken[entries[i].kind] += entries[i].bytes
            stay.add(i)
    if 2 * sum(taken.values()) < sum(have.values()):
        scarce = min(wanted, key=lambda kind: have[kind] / wanted[kind])
        notices.append(f"mix: more than half of the text is dropped, because {scarce} is scarce; --mix none keeps all")
    return stay, notices


def split_of(key: int) -> str:
    """90 / 5 / 5 by the text's own fingerprint: order, reruns and other documents do not matter."""
    place = (key >> 64) / 2**64
    return "train" if place < 0.9 else "valid" if place < 0.95 else "test"


def split(keys: list[int]) -> list[str]:
    """The split of each document. Where so few leave valid or test empty, the train document next to it goes there."""
    splits = [split_of(key) for key in keys]
    for name in ("test", "valid"):
        train = [i for i, s in enumerate(splits) if s == "train"]
        if name not in splits and len(train) >= 2:
            splits[max(train, key=lambda i: keys[i])] = name
    return splits
