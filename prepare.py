"""Raw text -> a clean, deduplicated, mixed and split corpus.

Of each document: `decode` bytes, `repair_mojibake`, `normalise`, `strip_html`, `detect_language`, `noise` and
`keyword_verdict` say what to drop, `mask_personal`. Of all of them: `find_duplicates` (exact by hash, near by
MinHash and LSH), `mix` by kind, `split` by hash. dropped.jsonl holds every drop and its reason.
"""

from __future__ import annotations

import functools
import hashlib
import html.entities
import itertools
import json
import math
import os
import shutil
import sys
import time
import tomllib
import unicodedata
import zlib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import regex
from tqdm import tqdm

import tokenizer
from tokenizer import InputError, map_batches, one_line_errors, option, parse_options

KINDS, LANGS, SPLITS = ("web", "papers", "code"), ("en", "zh", "code"), ("train", "valid", "test")
WRITTEN = {*SPLITS, "dropped.jsonl", "report.json", "run.json", "cleaning.json", ".finished"}  # in --out
LISTS = Path(__file__).parent / "data" / "cleaning.toml"


@dataclass(kw_only=True)
class Options:
    """Clean raw text (.txt, .jsonl, .jsonl.gz, folders), remove duplicates, mix the kinds, split 90/5/5."""

    input: list[str] = option("files (.txt is one document, .jsonl has `text`) or folders, in sorted order")
    out: str = option("corpus folder to write: train/ valid/ test/ report.json dropped.jsonl")
    mix: list[str] = option("shares of the bytes, as web=75 papers=15 code=10; `none` keeps all", ["none"])
    near_duplicate: float = option("Jaccard similarity that makes two documents one; 1 turns it off", 0.8)
    seed: int = option("which documents of an over-represented kind stay", 1)
    processes: int = option("processes that clean; the result does not depend on it", 2)
    skip_bad: bool = option("count and report malformed lines instead of stopping at the first", False)
    overwrite: bool = option("replace a finished --out", False)


@functools.cache
def lists() -> dict:
    """The words and patterns that cleaning goes by, compiled from data/cleaning.toml."""
    try:
        read = tomllib.loads(LISTS.read_text(encoding="utf-8"))
        fill = functools.partial(regex.sub, r"\{([a-z]+_[a-z]+)\}", lambda match: read["names"][match[1]])
        join = lambda patterns: regex.sub(r"\n\s*", "", "|".join(map(fill, patterns)))  # noqa: E731
        compiled = {(reason, lang, part): regex.compile(join(read[reason][lang][part]))
                    for reason in read["points"] for lang in ("en", "zh") for part in ("phrases", "words")}
        flags = regex.X | regex.A | regex.I
        personal = {name: regex.compile(pattern, flags) for name, pattern in read["personal"].items()}
        words = {name: set(text.split()) for name, text in read["words"].items()}
        code_line = regex.compile(read["code"]["line"], regex.X | regex.M)
        return words | compiled | {"points": read["points"], "personal": personal, "code_line": code_line}
    except (OSError, LookupError, TypeError, AttributeError, ValueError, regex.error) as error:
        raise InputError(f"{LISTS}: not the lists that prepare.py needs ({error!r})") from None


# ---- Bytes, Unicode ----------------------------------------------------------------------------------------

HAN, COMMON_HAN = regex.compile(r"\p{Han}"), set("的一是不了在有人我他这")
WESTERN = regex.compile(rb"(?<![\x80-\xff])[\x85\x91-\x97\xa0\xab\xbb\xc0-\xff](?![\x80-\xff])")


def decode(data: bytes) -> tuple[str, int]:
    """Bytes -> (text, number of places that could not be read, each now U+FFFD). UTF-8; else UTF-16 where its
    mark says so; else GB18030 where all of it fits and is mostly Chinese; else Windows-1252 where all but
    ASCII is single letters, quotes and dashes; else UTF-8 with the bad bytes replaced."""
    try:
        return data.decode("utf-8"), 0
    except UnicodeDecodeError:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            text = data.decode("utf-16", "replace")
            return text, text.count("\ufffd")
        text = data.decode("gb18030", "replace")
        han = HAN.findall(text)
        common = len(han) < 50 or sum(c in COMMON_HAN for c in han) >= 0.02 * len(han)  # else it is Korean
        if "\ufffd" not in text and common and len(han) >= max(2, 0.5 * sum(c > "\x7f" for c in text)):
            return text, 0
        if len(WESTERN.sub(b"", data)) == len(data.decode("ascii", "ignore")):
            return data.decode("cp1252"), 0
        text = data.decode("utf-8", "replace")
        return text, text.count("\ufffd")


# Mojibake: UTF-8 read as GBK, or as Windows-1252, whose characters outside Latin-1 BYTES turns back to bytes.
BYTES = {ord(c): b for b in range(0x80, 0xA0) if (c := bytes([b]).decode("cp1252", "replace")) != "\ufffd"}
HAN_BYTES, HIGH_BYTES = regex.compile(rb"[\xe2-\xef][\x80-\xbf]{2}"), regex.compile(rb"[\x80-\xff]")
DAMAGE = regex.compile("\ufffd|锟斤拷?|斤拷|\xe2\u20ac.?|[\xc2\xc3][\x80-\xbf]"
                       "|[\xe3-\xe9](?![\xa0\xab\xae\xb0\xb7\xbb](?![\x80-\xbf]))[\x80-\xbf]{1,2}")


def repair_mojibake(text: str) -> tuple[str, int, int]:
    """Text -> (text, lines repaired, characters that stay broken). A line that was misread without loss is
    read again in the right encoding; what was lost is not guessed at. Comes before `normalise`, which takes
    away the control characters that misread bytes have become."""
    lines, repaired, damaged = text.split("\n"), 0, 0
    for i, line in enumerate(lines):
        if (wide := sum(c > "\x7f" for c in line)) < 3:
            continue
        try:
            right = line.translate(BYTES).encode("latin-1").decode("utf-8")  # "donâ€™t"
        except UnicodeError:
            data, right = line.encode("gb18030", "replace"), ""
            if wide >= 4 and 3 * len(HAN_BYTES.findall(data)) >= 0.8 * len(HIGH_BYTES.findall(data)):
                right = data.decode("utf-8", "replace")  # "浣犲ソ" for 你好
        if right and "\ufffd" not in right:
            lines[i], repaired = right, repaired + 1
        else:
            damaged += wide if right else len("".join(DAMAGE.findall(line)))
    return "\n".join(lines), repaired, damaged


LINE_END = regex.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
SPACE = regex.compile(r"[\p{Zs}--[ ]]", regex.V1)
INVISIBLE = regex.compile(r"[\p{C}--[\p{Cs}\n\t\u200c\u200d]]", regex.V1)  # control, zero width, private use
JOINER = regex.compile("[\u200c\u200d]+(?![\u2600-\u27bf\U0001f000-\U0001faff])")  # before emoji it matters
HALF_WIDTH = {c + 0xFEE0: chr(c) for c in range(0x21, 0x7F) if chr(c).isalnum()}


def normalise(text: str) -> str:
    """One spelling for one text: NFC, one line end, one space, nothing invisible. Idempotent. Full-width
    letters and digits become ASCII; Chinese punctuation stays (NFKC would make ，a comma)."""
    text = LINE_END.sub("\n", text)
    if not (text.isascii() and text.replace("\n", "").isprintable()):
        text = JOINER.sub("", INVISIBLE.sub("", SPACE.sub(" ", text)))
        text = unicodedata.normalize("NFC", text.translate(HALF_WIDTH))
    text = regex.sub(r"(?<![ \t])[ \t]++(?=\n|\Z)", "", text)
    return regex.sub(r"\n{4,}", "\n\n\n", text).strip("\n")


# ---- Language and HTML -------------------------------------------------------------------------------------

FENCED = regex.compile(r"^ *```.*?(?:^ *```|\Z)", regex.M | regex.S)
LATIN, OTHER = regex.compile(r"\p{Latin}"), regex.compile(r"[\p{L}--\p{Han}--\p{Latin}]", regex.V1)


def detect_language(text: str) -> str:
    """'code' where a fifth of the lines outside Markdown fences read so; else 'zh', 'en', 'other' by script.
    Latin script is English unless its small words say otherwise."""
    text = URL.sub("", FENCED.sub("", text)) or text
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lists()["code_line"].findall(text)) >= max(2, 0.2 * len(lines)):
        return "code"
    han, latin, other = (len(pattern.findall(text)) for pattern in (HAN, LATIN, OTHER))
    if other > 0.3 * (han + latin + other):
        return "other"
    if 2 * han >= 0.3 * (2 * han + latin):  # a Han character says as much as two letters or more
        return "zh"
    words = regex.findall(r"\p{L}+", text.lower())
    english, foreign = (sum(word in lists()[known] for word in words) for known in ("english", "foreign"))
    return "other" if len(words) >= 20 and foreign > max(0.08 * len(words), 2 * english) else "en"


BARE = "(?:async|checked|controls|defer|disabled|hidden|multiple|open|required|reversed|selected)"
HTML = regex.compile(r"^ *```.*?(?:^ *```|\Z)|`[^`\n]+`|<!--|<(?:!doctype|\?)[^<>]*>"
                     rf"|<(/?)([a-z][\w:-]*)(?:\s[^<>=]*+=[^<>]*+|(?:\s+{BARE})*\s*/?)>",
                     regex.M | regex.S | regex.I)
ENTITIES = html.entities.html5
ENTITY = regex.compile(r"&(?:(#\d{1,7}|#x[0-9a-f]{1,6})|[a-z][a-z0-9]{1,30});", regex.I)


def strip_html(text: str) -> tuple[str, int]:
    """Text -> (text without tags, comments, scripts, styles, entities; how many of them there were). A tag is
    one of HTML's, or of a name that this text also closes (XML): `Vec<T>`, `<unk>` and `a<b and c>d` stay,
    and so does all that stands in Markdown code. One pass over the tags: linear, whatever the input."""
    blocks, inline = lists()["html_blocks"], lists()["html_inline"]
    names = blocks | inline | {"!", "td", "th"} | set(regex.findall(r"</([a-z][\w:-]*)", text.lower()))
    parts, at, count, unclosed = [], 0, 0, set()
    for match in HTML.finditer(text) if "<" in text else ():
        name = "!" if match[0][:2] in ("<!", "<?") else (match[2] or "").lower()
        if match.start() < at or name not in names:
            continue
        gap = "\n" if name in blocks else " " if match[1] and name not in inline else ""
        parts += text[at:match.start()], gap
        at, count = match.end(), count + 1
        end = "-->" if match[0] == "<!--" else {"script": "</script>", "style": "</style>"}.get(name, "")
        if end and not match[1] and end not in unclosed:  # what is inside goes too
            closing = regex.compile(end, regex.I).search(text, at)
            at = closing.end() if closing else at
            unclosed |= set() if closing else {end}
    text = regex.sub(r"\n{3,}", "\n\n", normalise("".join(parts) + text[at:])) if count else text
    plain = ENTITY.sub(lambda m: html.unescape(m[0]) if m[1] or m[0][1:] in ENTITIES else m[0], text)
    return plain, count + (plain != text)


# ---- What is no text: noise, spam, hate, danger ------------------------------------------------------------

URL = regex.compile(r"(?:https?://|www\.)[^\s<>()\[\]\p{Han}，。；：、！？“”（）【】]+", regex.I)
# By language: fewest characters (a couplet of 2 x 5 is Chinese text), most symbols, fewest characters a link
LIMITS = {"en": (20, 0.6, 60), "zh": (8, 0.6, 25), "code": (20, 0.75, 20)}
RUN = regex.compile(r"([^\W\d_])\1{24,}")


def noise(text: str, lang: str) -> tuple[str, str] | None:
    """(reason, detail) when the text is too short, or mostly symbols, links or repetition; else None."""
    dense, (shortest, most_symbols, apart) = "".join(text.split()), LIMITS[lang]
    if len(dense) < shortest:
        return "too_short", f"{len(dense)} characters"
    if (symbols := sum(not c.isalnum() for c in dense)) > most_symbols * len(dense):
        return "symbols", f"{symbols} of {len(dense)} characters are neither letters nor digits"
    links = URL.findall(text)
    linked = sum(map(len, links))
    if linked > 0.4 * len(dense) and len(dense) - linked < apart * len(links):
        return "links", f"{linked} of {len(dense)} characters are links"
    lines = [line.strip() for line in FENCED.sub("", text).split("\n") if line.strip()]
    repeated = sum(len(line) * (n - 1) for line, n in Counter(lines).items()) if len(lines) >= 4 else 0
    repeated = max(repeated, sum(len(match[0]) for match in RUN.finditer(text)))
    if lang != "code" and 2 * repeated > sum(map(len, lines)):
        return "repetition", "most of its lines, or one letter, again and again"
    size, packed = len(text.encode()), len(zlib.compress(text.encode(), 1))
    return ("repetition", f"packs to {packed} of {size} bytes") if size > max(200, 10 * packed) else None


def keyword_verdict(text: str, lang: str) -> tuple[str, str] | None:
    """('spam' | 'hate' | 'danger', detail) when key phrases are many and dense in the text; else None. A
    phrase gives 3 points each time, a word 1 point once: a text that only names things is let through, as
    news of a bomb does; spam may be told by words alone."""
    lower = text.lower()
    hundreds = max(0.4, len(lower) / (170 if lang == "zh" else 600))  # of words; at least 40
    for reason, least in lists()["points"].items() if lang != "code" else ():
        phrases, words = lists()[reason, lang, "phrases"], lists()[reason, lang, "words"]
        said = [match[0] for match in phrases.finditer(lower)]
        named = sorted(set(words.findall(phrases.sub("\n", lower))))  # what a phrase has said counts once
        points = 3 * len(said) + len(named)
        fewest = 4 if said else 6 if reason == "spam" else math.inf
        if points >= max(fewest, least * hundreds):
            return reason, f"{points} points in {100 * hundreds:.0f} words: {'; '.join((said + named)[:5])}"
    return None


# ---- Personal data -----------------------------------------------------------------------------------------


def is_card(number: str) -> bool:
    """Luhn's check of card numbers (ISO/IEC 7812-1): every second digit from the right doubled, ends in 0."""
    digits = [int(d) for d in reversed(number) if d.isdigit()]
    total = sum(digits[::2]) + sum(sum(divmod(2 * d, 10)) for d in digits[1::2])
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and total % 10 == 0


def is_chinese_id(number: str) -> bool:
    """The check character of an 18-digit identity number (GB 11643, ISO 7064 MOD 11-2)."""
    total = sum(int(digit) * pow(2, 17 - i, 11) for i, digit in enumerate(number[:17]))
    return number[17].upper() == "10X98765432"[total % 11]


def mask_personal(text: str, lang: str) -> tuple[str, Counter]:
    """Text -> (text with [EMAIL], [PHONE], ... in place of personal data, how many of each sort). In code
    only e-mail addresses are masked: long numbers there are seldom anybody's."""
    counts = Counter()
    for name, pattern in lists()["personal"].items():
        check = {"card": is_card, "id": is_chinese_id}.get(name, bool)
        if lang == "code" and name != "email":
            continue
        mask, before = f"[{name.upper()}]", text.count(f"[{name.upper()}]")
        text = pattern.sub(lambda match: mask if check(match[0]) else match[0], text)
        counts[name] = text.count(mask) - before
    return text, +counts


# ---- All documents together: duplicates, mixing, splitting ------------------------------------------------

TEXT_TOKEN, CODE_TOKEN = regex.compile(r"[^\W_]+|[+*/=<>×÷%^≤≥≠√-]"), regex.compile(r"\w+|[^\w\s]")
HASHES, SHINGLE = 120, 5
MULTIPLY, ADD = np.random.RandomState(1).randint(2**63, size=(2, HASHES), dtype=np.uint64) * 2 + 1  # (P,)


def tokens(text: str, lang: str) -> list[str]:
    """What texts are compared by: words and signs. Case and punctuation count in code only."""
    return CODE_TOKEN.findall(text) if lang == "code" else TEXT_TOKEN.findall(text.casefold())


def shingles(pieces: list[str], lang: str) -> np.ndarray:
    """Distinct hashes (S,) uint64 of runs of five words; in Chinese, of five characters."""
    units, space = ("".join(pieces), "") if lang == "zh" else (pieces, " ")
    runs = (space.join(units[i:i + SHINGLE]) for i in range(max(1, len(units) - SHINGLE + 1)))
    return np.array(sorted({zlib.crc32(run.encode()) for run in runs}), dtype=np.uint64)


def minhash(runs: np.ndarray) -> np.ndarray:
    """Signature (P,) uint32: the least value of the set (S,) under each of P hash functions (Broder 1997).
    Two signatures agree at a place with a probability equal to the sets' Jaccard similarity."""
    least = np.full(HASHES, 2**32 - 1, dtype=np.uint64)
    for start in range(0, len(runs), 1024):
        hashed = (runs[start:start + 1024, None] * MULTIPLY + ADD) >> np.uint64(32)  # (<= 1024, P)
        np.minimum(least, hashed.min(axis=0), out=least)
    return least.astype(np.uint32)


def find_duplicates(documents: list, threshold: float, load_shingles):
    """Marks, in reading order, the documents that repeat an earlier one that stays. Exact: the same key.
    Near: of one language, some band of the signature equal (LSH, Indyk and Motwani 1998), and a true Jaccard
    similarity of the shingles, `load_shingles(document)`, at or above the threshold."""
    fits = [r for r in range(1, 61) if HASHES % r == 0 and 1 - (1 - threshold**r) ** (HASHES // r) >= 0.99]
    rows, first, buckets = max(fits, default=1), {}, defaultdict(list)  # rows to a band: 99 % meet
    stay, table = [], np.empty((len(documents), HASHES if threshold < 1 else 0), np.uint32)  # their signatures
    for document in documents:
        if first.setdefault(document.key, document) is not document:
            document.verdict = "exact_duplicate", f"of {first[document.key].id}"
            continue
        if document.signature is None:
            continue
        bands = [hash((document.lang, at, document.signature[at:at + rows].tobytes()))
                 for at in range(0, HASHES, rows)]
        met = np.array(sorted({place for band in bands for place in buckets[band]}), dtype=np.int64)
        alike = np.mean(table[met] == document.signature, axis=1)  # below: 4 standard deviations
        for other in (stay[place] for place in met[alike >= threshold - 0.15]):
            a, b = load_shingles(other), load_shingles(document)
            common = len(np.intersect1d(a, b, assume_unique=True))
            if (similarity := common / (len(a) + len(b) - common)) >= threshold:
                document.verdict = "near_duplicate", f"of {other.id}, Jaccard {similarity:.2f}"
                break
        else:
            for band in bands:
                buckets[band].append(len(stay))
            table[len(stay)], document.signature = document.signature, None
            stay.append(document)


def parse_mix(words: list[str]) -> dict:
    """['web=75', 'code=10'] -> {'web': 75.0, 'code': 10.0}; ['none'] -> {}."""
    shares = {}
    for word in words if words != ["none"] else ():
        match = regex.fullmatch(r"(\w+)=(\d+(?:\.\d+)?)", word)
        if not match or match[1] not in KINDS or match[1] in shares:
            raise InputError(f"--mix {word}: expected shares as web=75 papers=15 code=10, or none")
        shares[match[1]] = float(match[2])
    return shares


def mix(documents: list, shares: dict, seed: int) -> list[str]:
    """Marks what is over-represented; returns notices. The kinds get these shares of the UTF-8 bytes (they
    follow the tokens of both languages: a Chinese character says as much as three letters). The scarcest kind
    stays whole, the others are thinned; which documents go is a hash of seed and text."""
    have, taken = Counter(), Counter()
    for document in documents:
        have[document.kind] += document.bytes
    there = sum(share for kind, share in shares.items() if have[kind])
    wanted = {kind: share / there for kind, share in shares.items() if share and have[kind]}
    if not wanted:
        raise InputError(f"--mix: the input has only {', '.join(have)}; --mix none keeps all")
    scarce = min(wanted, key=lambda kind: have[kind] / wanted[kind])
    limits = {kind: have[scarce] * share / wanted[scarce] for kind, share in wanted.items()}
    for document in sorted(documents, key=lambda d: hashlib.blake2b(b"%d %d" % (seed, d.key)).digest()):
        limit, size = limits.get(document.kind, 0), taken[document.kind]
        if size < limit and (not size or size + document.bytes <= 1.05 * limit):  # a book may be far too much
            taken[document.kind] += document.bytes
        else:
            document.verdict = "mix", f"{document.kind} is over-represented"
    notices = [f"mix: no {kind} in the input" for kind in shares if shares[kind] and kind not in wanted]
    found = {kind: taken[kind] / taken.total() for kind in wanted}
    notices += [f"mix: {kind} is {found[kind]:.0%} of the text, not {wanted[kind]:.0%}: documents are large"
                for kind in wanted if abs(found[kind] - wanted[kind]) > 0.05]
    if 2 * taken.total() < have.total():
        notices.append(f"mix: over half of the text goes, because {scarce} is scarce; --mix none keeps all")
    return notices


def split(documents: list):
    """90 / 5 / 5 by each text's own hash: order, reruns and the other documents do not matter. Only where so
    few leave valid or test empty, the train document with the nearest hash goes there; one alone is train."""
    for document in documents:
        place = (document.key >> 64) / 2**64
        document.split = "train" if place < 0.9 else "valid" if place < 0.95 else "test"
    if all(document.split != "train" for document in documents):
        documents[0].split = "train"
    for name in ("valid", "test"):
        train = [document for document in documents if document.split == "train"]
        if len(train) >= 2 and all(document.split != name for document in documents):
            max(train, key=lambda document: document.key).split = name


# ---- A document's way --------------------------------------------------------------------------------------


@dataclass(eq=False)
class Document:
    """A document on its way; `verdict` is (reason, detail) once it is dropped, ('', '') while it stays."""

    text: str
    source: str
    origin: str
    kind: str
    bytes: int
    lang: str = ""
    meta: object = None
    id: str = ""
    verdict: tuple[str, str] = ("", "")
    changes: Counter = field(default_factory=Counter)
    key: int = 0  # 128-bit hash of the tokens
    signature: np.ndarray | None = None
    split: str = ""
    start: int = 0  # where the cleaned text is on disk

    def line(self, more: dict) -> bytes:
        """A line of JSON that names the document; `meta` is passed on unread."""
        names = {"source": self.source, "kind": self.kind, "lang": self.lang, "origin": self.origin}
        record = {"id": self.id} | more | names | ({} if self.meta is None else {"meta": self.meta})
        return json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def parse(number: int, data: bytes, document: Document):
    """A line of JSON (or a whole file: number 0) into `document`; raises ValueError saying what is wrong."""
    document.text, bad = decode(data)
    document.changes["bad_bytes"] = bad
    if not number:
        return
    record = json.loads(document.text.strip(), parse_constant=tokenizer.refuse_constant)
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    if not isinstance(record.get("text"), str):
        raise ValueError(f"`text` must be a string, found {type(record.get('text')).__name__}")
    document.text, document.meta = record["text"], record.get("meta")
    document.origin = str(record.get("source") or document.origin)
    document.kind = record["kind"] if record.get("kind") in KINDS else document.kind
    document.lang = record["lang"] if record.get("lang") in LANGS else ""


def clean(document: Document) -> tuple[str, str] | None:
    """All that one document decides: fills in its text, lang, kind and changes; returns why it is dropped."""
    text, repaired, damaged = repair_mojibake(document.text)
    text = normalise(text)
    stripped, tags = strip_html(text)
    lang = document.lang or detect_language(stripped)
    text, lost = regex.subn("[\ufffd\ud800-\udfff]", "", text if lang == "code" else stripped)
    document.text, personal = mask_personal(normalise(text), lang)
    document.lang, document.kind = lang, document.kind or ("code" if lang == "code" else "web")
    document.changes.update(personal, mojibake=repaired, lost_characters=lost, html=tags * (lang != "code"))
    if not text.strip():
        return "empty", "no visible character"
    if damaged >= max(2, 0.005 * len(text)):
        return "mojibake", f"{damaged} of {len(text)} characters are broken"
    if lang == "other":
        return "language", "neither English nor Chinese nor code"
    return noise(text, lang) or keyword_verdict(text, lang)


def clean_batch(batch: list, options: Options) -> list[Document]:
    """What a process does: [(path, line number or 0, source, kind, bytes)] -> documents with signatures."""
    documents = []
    for path, number, source, kind, data in batch:
        name = readable(Path(path).name)
        document = Document(text="", source=source, origin=name, kind=kind, bytes=len(data))
        try:
            parse(number, data, document)
        except (ValueError, RecursionError) as error:
            document.verdict = "malformed", f"{path}:{number}: {error}"
        else:
            document.verdict = clean(document) or ("", "")
        document.changes = +document.changes
        if not document.verdict[0]:
            pieces = tokens(document.text, document.lang)
            digest = hashlib.blake2b("\0".join(pieces).encode(), digest_size=16).digest()
            document.key = int.from_bytes(digest, "big")
            if options.near_duplicate < 1:
                document.signature = minhash(shingles(pieces, document.lang))
        documents.append(document)
    return documents


# ---- The run -----------------------------------------------------------------------------------------------


def find_files(inputs: list[str], out: Path) -> list[tuple[Path, str, str]]:
    """[(file, source, kind)] in sorted order. Source is the file's stem; of a .txt in a folder, where each
    file is a document, the folder's name. Kind is the nearest of their names that is web, papers or code."""
    files = []
    for path in map(Path, inputs):
        if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise InputError(f"--out {out} lies inside --input {path}, so the next run would read it")
        if path.resolve().is_relative_to(out.resolve()):
            raise InputError(f"--input {path} lies inside --out {out}, which is written anew")
        for file in tokenizer.text_files([path]):
            top = Path(os.path.abspath(path)).name  # of . and .. too
            folders = (top, *file.parent.relative_to(path).parts) if path.is_dir() else file.parent.parts[-1:]
            stem = regex.sub(r"(?i)\.(txt|jsonl)(\.gz)?$", "", file.name)
            kind = next((part for part in (stem, *reversed(folders)) if part in KINDS), "")
            source = folders[-1] if path.is_dir() and tokenizer.is_text(file) else stem
            files.append((file, readable(source), kind))
    return files


def readable(name: str) -> str:
    """A file's name that can be written: of one in GBK, what is not UTF-8 is a question mark."""
    return name.encode("utf-8", "replace").decode()


def read_batches(files: list, progress, size: int = 1 << 19):
    """Yield lists of (path, line number or 0 of a whole file, source, kind, bytes), of about `size` bytes."""
    batch, held = [], 0
    for path, source, kind in files:
        try:
            with tokenizer.open_bytes(path) as file:
                for number, data in [(0, file.read())] if tokenizer.is_text(path) else enumerate(file, 1):
                    held += len(data)
                    progress.update(len(data))
                    if data.strip() or not number:
                        batch.append((str(path), number, source, kind, data.removeprefix(b"\xef\xbb\xbf")))
                    if held >= size:
                        yield batch
                        batch, held = [], 0
        except tokenizer.DAMAGED_GZ as error:
            raise InputError(f"{path}: not a whole gzip file ({error})") from None
    yield batch


def cleaned_documents(files: list, options: Options):
    """Yield every document after `clean_batch`, in reading order whatever the number of processes."""
    paths, work = [path for path, _, _ in files], functools.partial(clean_batch, options=options)
    total = sum(path.stat().st_size for path in paths)
    with tqdm(total=total, unit="B", unit_scale=True, desc="clean", disable=None) as progress:
        least = 1_000_000  # of bytes: less is cleaned before a process has started
        cleaned = map_batches(work, read_batches(files, progress), options.processes, paths, least)
        yield from itertools.chain.from_iterable(cleaned)


def prepare(options: Options, folder: Path) -> dict:
    """Read, clean, compare, mix, split and write into `folder`; returns the report. The texts wait in a file;
    memory holds the documents' names and signatures, about 4 KB each."""
    shares, files = parse_mix(options.mix), find_files(options.input, Path(options.out))
    documents, numbers = [], Counter()
    with open(folder / "cleaned.tmp", "w+b") as cleaned:
        def load(document):
            cleaned.seek(document.start)
            return cleaned.read(document.bytes).decode()

        for document in cleaned_documents(files, options):
            if document.verdict[0] == "malformed" and not options.skip_bad:
                raise InputError(f"{document.verdict[1]}; mend it, or pass over such lines with --skip-bad")
            document.id = f"{document.source}-{numbers[document.source]:06d}"
            numbers[document.source] += 1
            document.start = cleaned.tell()
            document.bytes, document.text = cleaned.write(document.text.encode("utf-8", "replace")), ""
            documents.append(document)
        if not documents:
            raise InputError(f"--input {' '.join(options.input)}: there is no text in it")
        load_shingles = functools.lru_cache(maxsize=4096)(lambda d: shingles(tokens(load(d), d.lang), d.lang))
        kept = [document for document in documents if not document.verdict[0]]
        find_duplicates(kept, options.near_duplicate, load_shingles)
        kept = [document for document in kept if not document.verdict[0]]
        notices = mix(kept, shares, options.seed) if shares and kept else []
        kept = [document for document in kept if not document.verdict[0]]
        if not kept:
            reasons = Counter(document.verdict[0] for document in documents).most_common()
            raise InputError(f"nothing is left after cleaning: {', '.join(f'{n} {r}' for r, n in reasons)}")
        split(kept)
        write_corpus(folder, documents, load)
    (folder / "cleaned.tmp").unlink()
    return make_report(documents, kept, notices)


def write_corpus(folder: Path, documents: list[Document], load):
    """FOLDER/{train,valid,test}/{source}.jsonl and FOLDER/dropped.jsonl, each in reading order."""
    files = defaultdict(list, {"dropped.jsonl": []})
    for document in documents:
        name = "dropped.jsonl" if document.verdict[0] else f"{document.split}/{document.source}.jsonl"
        files[name].append(document)
    for name, group in files.items():
        with open(folder / name, "wb") as file:
            for document in group:
                reason, detail = document.verdict
                more = {"reason": reason, "detail": detail, "text": load(document)[:200]}
                file.write(document.line(more if reason else {"text": load(document)}))


def make_report(documents: list[Document], kept: list[Document], notices: list[str]) -> dict:
    """Documents by source and by what became of them; documents and UTF-8 bytes by kind, lang and split."""
    sources = defaultdict(Counter)
    for document in documents:
        sources[document.source].update(("read", document.verdict[0] or "kept"))
    report = {"all": sum(sources.values(), Counter()), "sources": sources, "notices": notices,
              "changed": Counter(name for document in documents for name in document.changes),
              "kinds": defaultdict(Counter), "langs": defaultdict(Counter), "splits": defaultdict(Counter)}
    for document in kept:
        for title in ("kinds", "langs", "splits"):
            report[title][getattr(document, title[:-1])].update(documents=1, bytes=document.bytes)
    return report


def print_report(report: dict):
    """The report as tables: what was dropped and why, by source; what was changed; what there is now."""
    print(f"{'source':>30} {'read':>7} {'kept':>7}  dropped, by reason")
    for source, counts in [*report["sources"].items(), ("all", report["all"])]:
        dropped = ", ".join(f"{n} {why}" for why, n in counts.most_common() if why not in ("read", "kept"))
        print(f"{source:>30} {counts['read']:7} {counts['kept']:7}  {dropped}")
    print("changed:", ", ".join(f"{name} in {n}" for name, n in report["changed"].most_common()) or "nothing")
    total = sum(counts["bytes"] for counts in report["splits"].values())
    for title in ("kinds", "langs", "splits"):
        print(f"{title}:", ", ".join(f"{name} {n['documents']} documents, {n['bytes'] / 1e6:.2f} MB"
                                     f" ({n['bytes'] / total:.0%})" for name, n in report[title].items()))
    for name in SPLITS:
        if name not in report["splits"]:
            print(f"notice: {name} is empty: it takes three documents or more (a .txt file is one)")
    for notice in report["notices"]:
        print(f"notice: {notice}")


@one_line_errors
def main(argv=None):
    options, began = parse_options(Options, argv, "prepare.py"), time.perf_counter()
    if not 0 < options.near_duplicate <= 1 or options.processes < 1:
        raise InputError("--near-duplicate must be above 0 and at most 1, --processes at least 1")
    lists()
    out = Path(options.out).resolve()  # a link's target is replaced, not the link
    folder = out.with_name(f"{out.name}.partial")
    there = {path.name for path in out.iterdir()} if out.is_dir() else {out.name} if out.exists() else set()
    if os.path.ismount(out):
        raise InputError(f"--out {out} is a mount point, which cannot be replaced; choose a folder in it")
    if foreign := sorted(there - WRITTEN if "dropped.jsonl" in there else there):
        raise InputError(f"--out {out} exists and is no corpus of prepare.py alone (there is {foreign[0]}); "
                         "choose another folder")
    if "run.json" in there and not options.overwrite:
        raise InputError(f"--out {out} is finished; choose another folder, or replace it with --overwrite")
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left: never under the name of --out
    for name in SPLITS:
        (folder / name).mkdir(parents=True)
    try:
        report = prepare(options, folder)
        run = {"stage": "prepare", "options": asdict(options), "seconds": time.perf_counter() - began}
        for name, values in (("report", report), ("run", run | {"finished": True})):
            text = json.dumps(values, ensure_ascii=False, indent=1)
            (folder / f"{name}.json").write_bytes(text.encode("utf-8", "replace"))
        shutil.rmtree(out, ignore_errors=True)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_report(report)


if __name__ == "__main__":
    sys.exit(main())
