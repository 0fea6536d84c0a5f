"""Byte-level BPE (Gage 1994; Sennrich et al. 2016; over bytes: Radford et al. 2019): train, encode, decode, chat.

    python tokenizer.py train  --input run/corpus/train --vocab-size 4096 --out run/tokenizer
    python tokenizer.py encode --tokenizer run/tokenizer --input run/corpus --out run/tokens

Text is cut into words by a regular expression; a word is the list of its UTF-8 bytes; training joins, again and
again, the two neighbouring tokens that are seen together most often. The vocabulary is: special tokens, the 256
bytes, and one token for each join (a "merge"). Encoding replays the merges in the order in which they were learned.

The naive half comes first: it is the specification. The fast half gives the same merges and the same ids.
"""

from __future__ import annotations

import argparse
import codecs
import collections
import dataclasses
import functools
import gzip
import hashlib
import heapq
import json
import multiprocessing
import os
import shutil
import sys
import time
import typing
import unicodedata
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex

# How Qwen2 cuts text: English contractions, letters with at most one sign before them, single digits, signs,
# line breaks, spaces. Chinese has no spaces, so there a word is a clause.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENDOFTEXT, IM_START, IM_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL_TOKENS = [ENDOFTEXT, IM_START, IM_END, PAD] + [f"<|reserved_{i}|>" for i in range(16)]


def byte_alphabet():
    """GPT-2's printable character for each byte, {byte: character}, in the order of their ids.

    Bytes that print stand for themselves; the other 68 take the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_TO_CHAR = byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}
BYTE_IDS = {byte: len(SPECIAL_TOKENS) + i for i, byte in enumerate(BYTE_TO_CHAR)}
FIRST_MERGE = len(SPECIAL_TOKENS) + 256  # the id that the first merge makes

# ---------------------------------------------------------------------------------------------------------
# The specification: BPE as one would write it down. Nothing below may give other merges or other ids.


def join_pair(ids, pair, new_id):
    """[a, b, c, a, b], (a, b), n -> [n, c, n]: every place, from left to right, without overlaps."""
    joined, i = [], 0
    while i < len(ids):
        found = tuple(ids[i : i + 2]) == pair
        joined.append(new_id if found else ids[i])
        i += 2 if found else 1
    return joined


def train_naive(counts, vocab_size, min_frequency=2):
    """The merges [(id, id), ...] that text with these words learns; the k-th makes the id FIRST_MERGE + k.

    counts: {word: how often}. Each round joins the pair that stands most often side by side; of equally frequent
    ones the smallest (id, id), as in Hugging Face's trainer. Ends early where no pair is left min_frequency times.
    """
    words = [([BYTE_IDS[byte] for byte in word.encode()], count) for word, count in counts.items()]
    merges = []
    while FIRST_MERGE + len(merges) < vocab_size:
        pairs = collections.Counter()
        for ids, count in words:
            for pair in zip(ids, ids[1:]):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < min_frequency:
            break
        words = [(join_pair(ids, best, FIRST_MERGE + len(merges)), count) for ids, count in words]
        merges.append(best)
    return merges


def encode_naive(ids, merges):
    """The ids of a word's bytes, after joining: always the pair that was learned first, while there is one.

    merges: {(id, id): (rank, new id)}.
    """
    while pairs := [pair for pair in zip(ids, ids[1:]) if pair in merges]:
        first = min(pairs, key=lambda pair: merges[pair])
        ids = join_pair(ids, first, merges[first][1])
    return ids


# ---------------------------------------------------------------------------------------------------------
# The fast half.


def split_words(pattern, text):
    """The words of a text; what a pattern leaves between two matches is a word too, so that nothing is lost."""
    words = pattern.findall(text)
    if not pattern.groups and sum(map(len, words)) == len(text):
        return words
    words, end = [], 0
    for match in pattern.finditer(text):
        words += [text[end : match.start()], match.group()]
        end = match.end()
    return [word for word in [*words, text[end:]] if word]


def count_words(texts):
    """Counter {word: how often} over an iterable of texts."""
    counts, pattern = collections.Counter(), regex.compile(QWEN2_PATTERN)
    for text in texts:
        counts.update(split_words(pattern, text))
    return counts


def lay_out(counts):
    """All words end to end, each followed by a separator: symbols (P,) int32, -1 there, and weights (P,) int64.

    P places; a word is laid out once and weighs its count. 0xFF never occurs in UTF-8: it is the separator.
    """
    words = sorted(counts)  # so that the result does not depend on who counted what first
    encoded = [word.encode() + b"\xff" for word in words]
    table = np.array([BYTE_IDS[byte] for byte in range(255)] + [-1], dtype=np.int32)
    symbols = table[np.frombuffer(b"".join(encoded), dtype=np.uint8)]
    lengths = np.fromiter(map(len, encoded), np.int64, len(words))
    weights = np.repeat(np.fromiter((counts[word] for word in words), np.int64, len(words)), lengths)
    return symbols, weights


def group_pairs(first, second, places, weights):
    """Sort the places of many pairs by pair: yields (count, first id, second id, places of this pair)."""
    keys = first.astype(np.int64) << 32 | second
    order = np.argsort(keys)
    keys, places = keys[order], places[order]
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else np.zeros(0, np.int64)
    totals = np.add.reduceat(weights[places], starts) if len(keys) else starts
    ends = [*starts[1:].tolist(), len(keys)]
    for key, total, start, end in zip(keys[starts].tolist(), totals.tolist(), starts.tolist(), ends):
        yield total, key >> 32, key & 0xFFFFFFFF, places[start:end]


def every_second(places, right):
    """Of places where a pair (a, a) stands, those that a scan from the left joins: in a run, every second one."""
    places = np.sort(places)
    index = np.arange(len(places))
    starts_run = np.r_[True, right[places[:-1]] != places[1:]]
    run_start = np.maximum.accumulate(np.where(starts_run, index, 0))
    return places[(index - run_start) % 2 == 0]


def train_merges(counts, vocab_size, min_frequency=2):
    """The merges of `train_naive`, in time that grows with the places joined, not with text x merges.

    The text is three flat arrays: symbols, and the neighbours left and right of each place as indices (joining a
    pair unlinks its second place). Each pair has one list of places, made once, when the newer of its two ids
    appears: from then on it can only shrink. So a pair's count never grows, the heap may hold old, too large
    counts, and a pair is counted exactly only when it is popped: if it lost some, it goes back with the true count.
    """
    symbols, weights = lay_out(counts)
    left = np.arange(len(symbols), dtype=np.int32) - 1  # left[0] = -1 is the last place: a separator
    right = np.arange(len(symbols), dtype=np.int32) + 1
    heap, places_of, merges = [], {}, []

    def remember(first, second, places):
        for count, a, b, group in group_pairs(first, second, places, weights):
            if count >= min_frequency:
                places_of[a, b] = group
                heapq.heappush(heap, (-count, a, b))

    places = np.flatnonzero((symbols[:-1] >= 0) & (symbols[1:] >= 0)).astype(np.int32)
    remember(symbols[places], symbols[places + 1], places)
    while heap and FIRST_MERGE + len(merges) < vocab_size:
        claimed, a, b = heapq.heappop(heap)
        places = places_of.pop((a, b))
        places = places[(symbols[places] == a) & (symbols[right[places]] == b)]
        count = int(weights[places].sum())
        if count < -claimed:
            if count >= min_frequency:
                places_of[a, b] = places
                heapq.heappush(heap, (-count, a, b))
            continue
        if a == b:
            places = every_second(places, right)
        new_id = FIRST_MERGE + len(merges)
        merges.append((a, b))
        second = right[places]
        after = right[second]
        symbols[places], symbols[second] = new_id, -1
        right[places], left[after] = after, places
        before = left[places]
        behind = (symbols[before] >= 0) & (symbols[before] != new_id)  # (new, new) is counted from its left place
        ahead = symbols[after] >= 0
        before, places, after = before[behind], places[ahead], after[ahead]
        remember(
            np.concatenate([symbols[before], symbols[places]]),
            np.concatenate([np.full(len(before), new_id, np.int32), symbols[after]]),
            np.concatenate([before, places]),
        )
    return merges


def merge_word(ids, merges):
    """The ids of `encode_naive`: a heap of (rank, place) over a linked list, so n bytes cost n log n."""
    ids, end = list(ids), len(ids)
    left, right = list(range(-1, end - 1)), list(range(1, end + 1))
    heap = [(merges[pair], i) for i, pair in enumerate(zip(ids, ids[1:])) if pair in merges]
    heapq.heapify(heap)
    while heap:
        merge, i = heapq.heappop(heap)
        j = right[i]
        if j == end or merges.get((ids[i], ids[j])) != merge:  # one of the two has been joined meanwhile
            continue
        ids[i], ids[j] = merge[1], -1
        after = right[i] = right[j]
        if after < end:
            left[after] = i
            if (found := merges.get((ids[i], ids[after]))) is not None:
                heapq.heappush(heap, (found, i))
        before = left[i]
        if before >= 0 and (found := merges.get((ids[before], ids[i]))) is not None:
            heapq.heappush(heap, (found, before))
    return [token for token in ids if token >= 0]


# ---------------------------------------------------------------------------------------------------------
# The tokenizer: ids <-> text.

CACHE_WORDS = 500_000  # words whose ids are remembered; beyond that the memory starts afresh
FILES = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"]
FILES += ["chat_template.jinja", "tokenizer.json"]  # last: a folder with tokenizer.json is finished


class Tokenizer:
    """Byte-level BPE: ours, or any that `load` accepts.

    vocab_size: number of rows an embedding needs (largest id + 1). special_tokens: {text: id}; encode never gives
    them. endoftext, im_start, im_end, pad: ids, None where a foreign tokenizer has no such token. hash: sha256 of
    all that decides the ids.
    """

    def __init__(self, vocab, merges, special_tokens, added_tokens=(), pattern=QWEN2_PATTERN, nfc=False,
                 ignore_merges=False):  # fmt: skip
        """vocab {token in GPT-2's characters: id}; merges [(token, token)]; special and added tokens {text: id}.

        Added tokens that are not special (Qwen's <think>) are found in plain text, as in Hugging Face's library.
        """
        self.vocab, self.merges, self.pattern, self.nfc = dict(vocab), list(merges), pattern, nfc
        self.special_tokens, self.added_tokens = dict(special_tokens), dict(added_tokens)
        self.ignore_merges = ignore_merges
        self.files = {}  # the bytes of the files that it was loaded from, so that save gives them back unchanged
        self.bytes_of = {id: bytes(CHAR_TO_BYTE[char] for char in token) for token, id in self.vocab.items()
                         if token not in self.special_tokens and token not in self.added_tokens}  # fmt: skip
        self.byte_ids = [self.vocab[BYTE_TO_CHAR[byte]] for byte in range(256)]
        self.merge_of = {}
        for rank, (a, b) in enumerate(self.merges):
            self.merge_of[self.vocab[a], self.vocab[b]] = (rank, self.vocab[a + b])
        self.whole = {token: id for id, token in self.bytes_of.items()} if ignore_merges else {}
        self.bytes_of |= {id: text.encode() for text, id in (self.special_tokens | self.added_tokens).items()}
        self.vocab_size = max(self.bytes_of) + 1
        names = (ENDOFTEXT, IM_START, IM_END, PAD)
        self.endoftext, self.im_start, self.im_end, self.pad = map(self.special_tokens.get, names)
        self.splitter, self.cache = regex.compile(pattern), {}
        longest_first = sorted(self.added_tokens, key=len, reverse=True)
        self.finder = regex.compile(f"({'|'.join(map(regex.escape, longest_first))})") if longest_first else None
        decides = [self.vocab, self.merges, self.special_tokens, self.added_tokens, pattern, nfc, ignore_merges]
        canonical = json.dumps(decides, sort_keys=True, separators=(",", ":"))
        self.hash = hashlib.sha256(canonical.encode()).hexdigest()

    @classmethod
    def from_merges(cls, pairs):
        """Our tokenizer, from what training gives: [(id, id), ...]."""
        tokens = SPECIAL_TOKENS + list(BYTE_TO_CHAR.values())
        for a, b in pairs:
            tokens.append(tokens[a] + tokens[b])
        merges = [(tokens[a], tokens[b]) for a, b in pairs]
        special = {token: id for id, token in enumerate(SPECIAL_TOKENS)}
        return cls({token: id for id, token in enumerate(tokens)}, merges, special)

    def encode(self, text):
        """Ids of a text (list of int). Text that spells a special token stays text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise InputError(f"character {error.start} is half of a surrogate pair (U+{code:04X}), not text") from None
        ids = []
        for piece in self.finder.split(text) if self.finder else [text]:
            if piece in self.added_tokens:
                ids.append(self.added_tokens[piece])
            else:
                self._encode_plain(unicodedata.normalize("NFC", piece) if self.nfc else piece, ids)
        return ids

    def _encode_plain(self, text, ids):
        cache = self.cache
        for word in split_words(self.splitter, text):
            found = cache.get(word)
            if found is None:
                data = word.encode()
                if data in self.whole:
                    found = [self.whole[data]]
                else:
                    found = merge_word([self.byte_ids[byte] for byte in data], self.merge_of)
                if len(cache) >= CACHE_WORDS:
                    cache.clear()
                cache[word] = found
            ids += found

    def decode_bytes(self, ids, skip_special_tokens=False):
        """The bytes that ids stand for; special tokens give their names, or nothing."""
        hidden = set(self.special_tokens.values()) if skip_special_tokens else ()
        try:
            return b"".join([self.bytes_of[id] for id in map(int, ids) if id not in hidden])
        except KeyError as error:
            raise InputError(f"id {error} is not in this tokenizer's vocabulary of {self.vocab_size}") from None

    def decode(self, ids, skip_special_tokens=False):
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, skip_special_tokens).decode("utf-8", errors="replace")

    def token_bytes(self):
        """For each id, the bytes of text it stands for; 0 for special tokens and ids that no token has."""
        special = set(self.special_tokens.values())
        return [0 if id in special else len(self.bytes_of.get(id, b"")) for id in range(self.vocab_size)]

    @classmethod
    def load(cls, folder):
        """Read FOLDER/tokenizer.json, ours or a foreign byte-level BPE one; else InputError says what is unsupported."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{path}: not found; --tokenizer and --model take a folder that holds one")
        files = {name: (path.parent / name).read_bytes() for name in FILES if (path.parent / name).is_file()}
        try:
            tokenizer = cls(**parse_tokenizer_json(json.loads(files["tokenizer.json"])))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError, regex.error) as error:
            raise InputError(f"{path}: not a whole tokenizer.json ({type(error).__name__}: {error})") from None
        tokenizer.files = files
        return tokenizer

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json; a loaded tokenizer's files go out byte for byte."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        files = self.files or {"tokenizer_config.json": to_json(tokenizer_config()), "tokenizer.json": to_json(self.to_dict())}
        for name, data in files.items():
            write_whole(Path(folder) / name, data)

    def to_dict(self):
        """What goes into tokenizer.json (our own tokenizers only)."""
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                 "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                 "vocab": self.vocab, "merges": self.merges}  # fmt: skip
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": id, "content": text, **flags} for text, id in self.special_tokens.items()],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            "model": model,
        }


class StreamDecoder:
    """Decodes ids one at a time: text comes out as soon as its characters are whole, never half of one."""

    def __init__(self, tokenizer, skip_special_tokens=True):
        self.tokenizer, self.skip_special_tokens = tokenizer, skip_special_tokens
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, id):
        """The text that this id completes, "" where a character is still open."""
        return self.decoder.decode(self.tokenizer.decode_bytes([id], self.skip_special_tokens))

    def finish(self):
        """What is left at the end: "" or U+FFFD for a character that was never completed."""
        return self.decoder.decode(b"", final=True)


# ---------------------------------------------------------------------------------------------------------
# Chat: ChatML, encoded piece by piece.

CHAT_TEMPLATE = (
    "{%- if not messages %}{{ raise_exception('no messages') }}{% endif %}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' ~ message['role']) }}{% endif %}"
    "{{- '' if loop.first else '\\n' }}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)


def check_messages(messages):
    """Raise InputError unless messages is a list of {role: system | user | assistant, content: text}, not empty."""
    if not isinstance(messages, list):
        raise InputError(f"messages must be a list, found {type(messages).__name__}")
    if not messages:
        raise InputError("messages is an empty list")
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise InputError(f"message {i} must be an object with role and content, found {type(message).__name__}")
        for key in ("role", "content"):
            if key not in message:
                raise InputError(f"message {i} has no {key}")
            if not isinstance(message[key], str):
                raise InputError(f"message {i}: {key} must be text, found {type(message[key]).__name__}")
        if message["role"] not in ("system", "user", "assistant"):
            raise InputError(f"message {i}: unknown role {message['role']!r}; use system, user or assistant")


def encode_chat(tokenizer, messages, generation_prompt=False):
    """A dialogue in ChatML -> (ids, trained): two lists of one length.

    Headers, contents and the line breaks between messages are encoded apart, special tokens are placed as ids: so
    text that looks like a special token stays text. trained is True for what the assistant writes: its contents and
    the <|im_end|> after them. The dialogue ends at its last <|im_end|>, or with the head of an answer to come.
    """
    check_messages(messages)
    if tokenizer.im_start is None or tokenizer.im_end is None:
        raise InputError(f"this tokenizer has no {IM_START} and {IM_END}, which chats are made of")
    ids, trained = [], []
    for i, message in enumerate(messages):
        head = tokenizer.encode("\n") if i else []
        head += [tokenizer.im_start, *tokenizer.encode(message["role"] + "\n")]
        body = [*tokenizer.encode(message["content"]), tokenizer.im_end]
        ids += head + body
        trained += [False] * len(head) + [message["role"] == "assistant"] * len(body)
    if generation_prompt:
        prompt = [*tokenizer.encode("\n"), tokenizer.im_start, *tokenizer.encode("assistant\n")]
        ids += prompt
        trained += [False] * len(prompt)
    return ids, trained


# ---------------------------------------------------------------------------------------------------------
# Files: tokenizer.json (Hugging Face's format) and the folder of tokens.


def to_json(value):
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()


def write_whole(path, data):
    """Write a file under a temporary name and rename it: it is there whole, or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def tokenizer_config():
    """What goes into tokenizer_config.json beside our tokenizers."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": PAD,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
        "padding_side": "right",
        "chat_template": CHAT_TEMPLATE,
    }


GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's own


def parse_tokenizer_json(data):
    """The arguments of Tokenizer, from a parsed tokenizer.json; InputError names what is unsupported."""
    model = data["model"]
    if model.get("type", "BPE") != "BPE":
        raise InputError(f"unsupported model {model['type']!r}; only byte-level BPE is read")
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise InputError(f"unsupported: BPE with {key} {model[key]!r}")
    normalizer = data.get("normalizer")
    if normalizer and normalizer["type"] != "NFC":
        raise InputError(f"unsupported normalizer {normalizer['type']!r}; only NFC is read")
    special, added = {}, {}
    for token in data.get("added_tokens") or []:
        if not token["special"] and any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
            raise InputError(f"unsupported: added token {token['content']!r} with lstrip, rstrip or single_word")
        (special if token["special"] else added)[token["content"]] = token["id"]
    vocab = model["vocab"]
    check_vocabulary(vocab, special | added)
    merges = [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]
    if missing := next((m for m in merges if len(m) != 2 or {*m, "".join(m)} - vocab.keys()), None):
        raise InputError(f"merge {missing!r} names a token that the vocabulary has not")
    return {"vocab": vocab, "merges": merges, "special_tokens": special, "added_tokens": added,
            "pattern": read_pattern(data.get("pre_tokenizer")), "nfc": bool(normalizer),
            "ignore_merges": bool(model.get("ignore_merges"))}  # fmt: skip


def check_vocabulary(vocab, added):
    """Raise InputError unless tokens are spelled in GPT-2's characters, all 256 bytes are there, and ids are sound."""
    ids = {**vocab, **added}.values()
    if not all(type(id) is int and 0 <= id < 1 << 24 for id in ids):
        raise InputError("an id is not a whole number from 0 to 2**24")
    if len(set(ids)) != len(ids):
        raise InputError("two tokens have the same id")
    if missing := [char for char in CHAR_TO_BYTE if char not in vocab]:
        raise InputError(f"unsupported: not byte-level (the vocabulary lacks {len(missing)} of the 256 bytes)")
    if strange := next((t for t in vocab if t not in added and not CHAR_TO_BYTE.keys() >= set(t)), None):
        raise InputError(f"unsupported: not byte-level (token {strange!r} is not spelled in byte characters)")


def read_pattern(pre_tokenizer):
    """The split pattern of a pre_tokenizer: Split(Regex) then ByteLevel, or ByteLevel with GPT-2's own pattern."""
    parts = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {"type": None}]
    kinds = [part["type"] for part in parts]
    if kinds not in (["Split", "ByteLevel"], ["ByteLevel"]):
        raise InputError(f"unsupported pre_tokenizer {kinds}; only Split and ByteLevel, or ByteLevel, are read")
    if parts[-1].get("add_prefix_space"):
        raise InputError("unsupported: ByteLevel with add_prefix_space")
    own = parts[-1].get("use_regex", True)
    if own == (len(parts) == 2):
        raise InputError(f"unsupported: {' and '.join(kinds)} with use_regex {own}")
    if own:
        return GPT2_PATTERN
    split = parts[0]
    if "Regex" not in split["pattern"] or split["behavior"] != "Isolated" or split.get("invert"):
        raise InputError("unsupported: a Split that is not by Regex, or not Isolated")
    return split["pattern"]["Regex"]


@dataclass
class Shard:
    """Tokens of one source and language: documents end to end, each beginning with <|endoftext|>.

    tokens: (T,) uint16 or uint32, mapped from the file; bytes: of the documents' text, in UTF-8;
    offsets: (documents,) where each document begins.
    """

    source: str
    lang: str
    tokens: np.ndarray
    documents: int
    bytes: int
    offsets: np.ndarray


def read_tokens(folder, split, tokenizer=None):
    """The shards of one split of a folder that `tokenizer.py encode` wrote; InputError unless it is whole.

    With a tokenizer, raises InputError where the folder was encoded by another one.
    """
    index = Path(folder) / "index.json"
    if not index.is_file():
        raise InputError(f"{index}: not found; write it with tokenizer.py encode")
    try:
        record = json.loads(index.read_bytes())
        if not record["finished"]:
            raise InputError(f"{index}: unfinished; run tokenizer.py encode again")
        if tokenizer is not None and record["tokenizer"] != tokenizer.hash:
            raise InputError(f"{index}: encoded by another tokenizer than the model's; run tokenizer.py encode again")
        dtype = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}[record["dtype"]]
        shards = [read_shard(Path(folder), entry, dtype) for entry in record["shards"] if entry["split"] == split]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{index}: not an index of tokens ({type(error).__name__}: {error})") from None
    if not shards:
        raise InputError(f"{index}: the split {split!r} is empty")
    return shards


def read_shard(folder, entry, dtype):
    path, offsets = folder / entry["file"], np.array(entry["offsets"], dtype=np.int64)
    size = path.stat().st_size if path.is_file() else -1
    if size != entry["tokens"] * dtype.itemsize:
        found = "is missing" if size < 0 else f"has {size} bytes instead of {entry['tokens'] * dtype.itemsize}"
        raise InputError(f"{path}: {found}; run tokenizer.py encode again")
    tokens = np.memmap(path, dtype=dtype, mode="r")
    return Shard(entry["source"], entry["lang"], tokens, entry["documents"], entry["bytes"], offsets)


class TokenWriter:
    """Writes a folder of tokens: one file for each split, source and language; then index.json, last."""

    def __init__(self, folder, tokenizer):
        self.folder, self.tokenizer, self.entries, self.open = Path(folder), tokenizer, {}, {}
        self.dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"

    def add(self, split, source, lang, tokens, size):
        """Append a document: its tokens with <|endoftext|> in front, size the bytes of its text."""
        name = f"{split}/{source}.{lang}-00000.bin"
        if name not in self.entries:
            (self.folder / split).mkdir(parents=True, exist_ok=True)
            self.entries[name] = {"split": split, "source": source, "lang": lang, "file": name, "tokens": 0,
                                  "documents": 0, "bytes": 0, "offsets": []}  # fmt: skip
            self.open[name] = open(self.folder / name, "wb")
        entry = self.entries[name]
        self.open[name].write(np.asarray(tokens, dtype=np.dtype(self.dtype).newbyteorder("<")).tobytes())
        entry["offsets"].append(entry["tokens"])
        entry["tokens"] += len(tokens)
        entry["documents"] += 1
        entry["bytes"] += size

    def finish(self):
        """Close the files and write index.json; returns what it holds."""
        for file in self.open.values():
            file.close()
        tokenizer = self.tokenizer
        index = {"tokenizer": tokenizer.hash, "vocab_size": tokenizer.vocab_size, "dtype": self.dtype,
                 "endoftext": tokenizer.endoftext, "shards": list(self.entries.values()), "finished": True}  # fmt: skip
        write_whole(self.folder / "index.json", (json.dumps(index) + "\n").encode())
        return index


# ---------------------------------------------------------------------------------------------------------
# What every script needs: errors told in one line, options from a dataclass, JSON lines.


class InputError(Exception):
    """A mistake in what the user gave: told in one line (what, where, what to do), exit status 2."""


def one_line_errors(main):
    """Wrap a script's `main(argv)`: it returns the exit status, and bad input never shows a traceback."""

    @functools.wraps(main)
    def wrapped(argv=None) -> int:
        try:
            return main(argv) or 0
        except InputError as error:
            message, status = str(error), 2
        except OSError as error:
            message, status = f"{error.filename or ''}: {error.strerror or error}".removeprefix(": "), 2
        except SystemExit as stop:  # argparse's --help
            return stop.code or 0
        name = Path(sys.modules[main.__module__].__file__).name
        print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
        return status

    return wrapped


def option(help, default=dataclasses.MISSING, choices=None):
    """A field of an options dataclass: one sentence of help; required where there is no default."""
    metadata = {"help": help, "choices": choices}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see --help)")


def parse_options(options_class, argv=None, prog=None):
    """Command line -> an instance of a dataclass whose fields are made by `option`.

    `hidden_size: int` becomes --hidden-size; a bool becomes --flag / --no-flag; `bool | None` too, None when
    not given; list[str] takes several values. Raises InputError for anything it does not know.
    """
    summary = (options_class.__doc__ or "").strip()
    formatter = functools.partial(argparse.HelpFormatter, width=110, max_help_position=30)
    parser = OneLineParser(prog=prog, description=summary, allow_abbrev=False, formatter_class=formatter)
    types = typing.get_type_hints(options_class)
    for field in dataclasses.fields(options_class):
        flag = "--" + field.name.replace("_", "-")
        kind = types[field.name]
        inner = [t for t in typing.get_args(kind) if t is not type(None)]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        settings = {"help": field.metadata["help"].replace("%", "%%"), "required": required, "dest": field.name}
        if not required:
            is_list = field.default is dataclasses.MISSING
            settings["default"] = field.default_factory() if is_list else field.default
            settings["help"] += f" (default: {settings['default']})"
        if kind is bool or inner == [bool]:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **settings)
        elif typing.get_origin(kind) is list:
            parser.add_argument(flag, nargs="+", type=inner[0], **settings)
        else:
            value_type = inner[0] if inner else kind
            parser.add_argument(flag, type=value_type, choices=field.metadata["choices"], **settings)
    return options_class(**vars(parser.parse_args(argv)))


def refuse_constant(name):
    raise ValueError(f"{name} is not JSON")


def read_jsonl(path):
    """Yield (line number, object) of a .jsonl or .jsonl.gz file; blank lines are passed over.

    Raises InputError naming file and line for what is not UTF-8, not JSON (NaN and Infinity are not), not an
    object, and for a .gz file that is damaged or cut off.
    """
    opener, number = gzip.open if str(path).endswith(".gz") else open, 0
    with opener(path, "rb") as file:
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                record = json.loads(line.decode("utf-8-sig"), parse_constant=refuse_constant)
                if not isinstance(record, dict):
                    raise InputError(f"{path}:{number}: expected a JSON object, found {type(record).__name__}")
                yield number, record
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not a line of JSON ({error}); mend or remove it") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{path}: a damaged .gz file after line {number} ({error})") from None


# ---------------------------------------------------------------------------------------------------------
# The command line.

BATCH_BYTES = 1 << 20  # text that goes to a process at once


@dataclass(kw_only=True)
class TrainOptions:
    """Learn a byte-level BPE vocabulary from text, as Hugging Face's trainer would."""

    input: list[str] = option("files or folders of .txt, .jsonl and .jsonl.gz (field `text`), in sorted order")
    vocab_size: int = option("tokens in all: 20 special ones, 256 bytes, and the merges", 4096)
    min_frequency: int = option("how often a pair must be seen to be merged", 2)
    out: str = option("folder for tokenizer.json and tokenizer_config.json")
    processes: int = option("processes that count words; 0 takes what the machine has", 0)
    overwrite: bool = option("replace a finished --out", False)


@dataclass(kw_only=True)
class EncodeOptions:
    """Turn a corpus of prepare.py into a folder of tokens: a file for each split, source and language."""

    tokenizer: str = option("folder that holds tokenizer.json")
    input: str = option("folder with train/, valid/, test/ that hold {source}.jsonl")
    out: str = option("folder for the tokens and index.json")
    processes: int = option("processes that encode; 0 takes what the machine has", 0)
    overwrite: bool = option("replace a finished --out", False)


def text_files(inputs):
    """The .txt, .jsonl and .jsonl.gz files of files and folders; folders are walked in sorted order."""
    endings, files = (".txt", ".jsonl", ".jsonl.gz"), []
    for path in map(Path, inputs):
        if not path.exists():
            raise InputError(f"{path}: not found")
        found = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        if not path.is_dir() and not path.name.endswith(endings):
            raise InputError(f"{path}: unknown kind of file; text is read from {', '.join(endings)}")
        files += [p for p in found if p.name.endswith(endings)]
    if not files:
        raise InputError(f"{' '.join(map(str, inputs))}: no text in it ({', '.join(endings)})")
    return files


def read_texts(path):
    """Yield (text, language or None, bytes) of a file; a .txt file is one text."""
    if path.name.endswith(".txt"):
        data = path.read_bytes()
        try:
            yield data.decode(), None, len(data)
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 (byte {error.start})") from None
        return
    for number, record in read_jsonl(path):
        text, lang = record.get("text"), record.get("lang")
        if not isinstance(text, str):
            raise InputError(f"{path}:{number}: expected a field `text` that holds text")
        if lang is not None and not (isinstance(lang, str) and lang.isalpha()):
            raise InputError(f"{path}:{number}: lang must be a word like en, zh or code, found {lang!r}")
        try:
            yield text, lang, len(text.encode())
        except UnicodeEncodeError:
            raise InputError(f"{path}:{number}: half of a surrogate pair (\\ud800 to \\udfff), not text") from None


def batches(documents, size_of):
    """Lists of documents of about BATCH_BYTES, or of 4,096 documents."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += size_of(document)
        if size >= BATCH_BYTES or len(batch) == 4096:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def in_processes(function, inputs, processes, prepare=None, arguments=()):
    """Yield (input, function(input)) in order, computed by several processes; few inputs wait at any time."""
    if processes == 1:
        if prepare:
            prepare(*arguments)
        for item in inputs:
            yield item, function(item)
        return
    context = multiprocessing.get_context("spawn")  # fork is not safe once torch has started its threads
    with context.Pool(processes, prepare, arguments) as pool:
        waiting = collections.deque()
        for item in inputs:
            waiting.append((item, pool.apply_async(function, (item,))))
            if len(waiting) > 2 * processes:
                first, result = waiting.popleft()
                yield first, result.get()
        for first, result in waiting:
            yield first, result.get()


def how_many_processes(asked, files):
    """As many as asked; 0: what the machine has, at most 8, and one where starting them costs more than it saves."""
    if asked:
        return asked
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, available) if sum(path.stat().st_size for path in files) > 4 * BATCH_BYTES else 1


class Progress:
    """One line that counts bytes: rewritten on a terminal; in a log, a new line every ten seconds."""

    def __init__(self, title, total):
        self.title, self.total, self.done = title, total, 0
        self.start = self.shown = time.perf_counter()
        self.terminal = sys.stderr.isatty()

    def add(self, size):
        self.done += size
        now = time.perf_counter()
        if now - self.shown < (0.2 if self.terminal else 10):
            return
        self.shown, rate = now, self.done / (now - self.start)
        left = max(0, self.total - self.done) / rate
        line = f"{self.title} {self.done / 1e6:.1f} of {self.total / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s, {left:.0f} s left"
        print(line, end="\033[K\r" if self.terminal else "\n", file=sys.stderr, flush=True)


def refuse_finished(marker, overwrite):
    if marker.exists() and not overwrite:
        raise InputError(f"{marker.parent}: finished already; --overwrite replaces it")


@one_line_errors
def train(argv=None):
    options = parse_options(TrainOptions, argv, "tokenizer.py train")
    refuse_finished(Path(options.out) / "tokenizer.json", options.overwrite)
    if not FIRST_MERGE <= options.vocab_size <= 1 << 24:
        raise InputError(f"--vocab-size {options.vocab_size}: give at least {FIRST_MERGE} (20 special tokens, 256 bytes)")
    if options.min_frequency < 1:
        raise InputError(f"--min-frequency {options.min_frequency}: give 1 or more")
    start = time.perf_counter()
    files = text_files(options.input)
    counts, samples, size = count_files(files, options.processes)
    if not counts:
        raise InputError(f"{' '.join(options.input)}: no text in it")
    print(f"{size / 1e6:.1f} MB of text, {counts.total():,} words, {len(counts):,} unique", flush=True)
    merges = train_merges(counts, options.vocab_size, options.min_frequency)
    tokenizer = Tokenizer.from_merges(merges)
    tokenizer.save(options.out)
    if tokenizer.vocab_size < options.vocab_size:
        print(f"no pair is left that is seen {options.min_frequency} times: the vocabulary ends early")
    print(f"vocabulary of {tokenizer.vocab_size:,} in {time.perf_counter() - start:.1f} s, in {options.out}")
    for lang, texts in sorted(samples.items()):
        tokens = sum(len(tokenizer.encode(text)) for text in texts)
        print(f"  {lang:8} {sum(len(text.encode()) for text in texts) / tokens:.2f} bytes per token (on a sample)")


SAMPLE_BYTES = 1 << 18


def count_files(files, processes):
    """Words of all files -> (Counter, {language: the first texts}, bytes of text)."""
    counts, samples, seen = collections.Counter(), {}, collections.Counter()
    progress = Progress("counting words", sum(path.stat().st_size for path in files))

    def texts():
        for path in files:
            for text, lang, size in read_texts(path):
                lang = lang or "text"
                if text and seen[lang] < SAMPLE_BYTES:
                    samples.setdefault(lang, []).append(text[:SAMPLE_BYTES])
                seen[lang] += size
                progress.add(size)
                yield text

    processes = how_many_processes(processes, files)
    for _, counted in in_processes(count_words, batches(texts(), len), processes):
        counts.update(counted)
    return counts, samples, seen.total()


WORKER = {}  # the tokenizer of a process that encodes


def start_worker(folder):
    WORKER["tokenizer"] = Tokenizer.load(folder)


def encode_batch(documents):
    """[(split, source, lang, text, size), ...] -> the ids of each text, as arrays."""
    return [np.array(WORKER["tokenizer"].encode(document[3]), dtype=np.uint32) for document in documents]


@one_line_errors
def encode(argv=None):
    options = parse_options(EncodeOptions, argv, "tokenizer.py encode")
    start, out = time.perf_counter(), Path(options.out)
    refuse_finished(out / "index.json", options.overwrite)
    tokenizer = Tokenizer.load(options.tokenizer)
    if tokenizer.endoftext is None:
        raise InputError(f"{options.tokenizer}: no {ENDOFTEXT} in this tokenizer, which begins each document")
    splits = [split for split in ("train", "valid", "test") if (Path(options.input) / split).is_dir()]
    if not splits:
        raise InputError(f"{options.input}: no train/, valid/ or test/ in it; give a folder that prepare.py wrote")
    files = {split: text_files([Path(options.input) / split]) for split in splits}
    everything = sum(files.values(), [])
    progress = Progress("encoding", sum(path.stat().st_size for path in everything))
    for old in [out / "index.json", *out.glob("*/*.bin")]:
        old.unlink(missing_ok=True)

    def documents():
        for split, paths in files.items():
            for path in paths:
                source = path.name.split(".jsonl")[0].removesuffix(".txt")
                for text, lang, size in read_texts(path):
                    progress.add(size)
                    yield split, source, lang or "text", text, size

    writer = TokenWriter(out, tokenizer)
    processes = how_many_processes(options.processes, everything)
    cut = batches(documents(), lambda document: document[4])
    for batch, encoded in in_processes(encode_batch, cut, processes, start_worker, (options.tokenizer,)):
        for (split, source, lang, _, size), ids in zip(batch, encoded):
            writer.add(split, source, lang, [tokenizer.endoftext, *ids], size)
    index = writer.finish()
    if not index["shards"]:
        raise InputError(f"{options.input}: no documents in it")
    print_summary(index)
    print(f"in {time.perf_counter() - start:.1f} s, in {options.out}")


def print_summary(index):
    """Tokens by split, and bytes of text per token (<|endoftext|> not counted) by language."""
    by_split, by_lang = collections.Counter(), collections.defaultdict(collections.Counter)
    for shard in index["shards"]:
        by_split[shard["split"]] += shard["tokens"]
        by_lang[shard["lang"]] += {key: shard[key] for key in ("tokens", "documents", "bytes")}
    print(", ".join(f"{split} {tokens:,} tokens" for split, tokens in by_split.items()))
    for lang, total in sorted(by_lang.items()):
        per_token = total["bytes"] / max(1, total["tokens"] - total["documents"])
        print(f"  {lang:8} {total['documents']:>8,} documents {total['tokens']:>12,} tokens {per_token:6.2f} bytes per token")


@one_line_errors
def main(argv=None):
    """`train` or `encode`; each has its own --help."""
    argv = sys.argv[1:] if argv is None else list(argv)
    commands = {"train": train, "encode": encode}
    if argv[:1] in (["-h"], ["--help"]):
        print(f"{__doc__}\n`tokenizer.py train --help` and `tokenizer.py encode --help` list the options.")
        return 0
    if not argv or argv[0] not in commands:
        raise InputError("say what to do: tokenizer.py train ... or tokenizer.py encode ... (see --help)")
    return commands[argv[0]](argv[1:])


if __name__ == "__main__":
    from tokenizer import main as imported_main  # worker processes and callers then share one set of classes

    sys.exit(imported_main())
