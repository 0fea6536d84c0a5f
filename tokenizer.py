"""Byte-level BPE (Sennrich et al. 2016; over bytes, Radford et al. 2019): train, encode, decode, chat.

    python tokenizer.py train  --input run/corpus/train --vocab-size 4096 --out run/tokenizer
    python tokenizer.py encode --tokenizer run/tokenizer --input run/corpus --out run/tokens
    python tokenizer.py show   "今天天气真好"
    python tokenizer.py stats  --input run/corpus/valid

Text is cut into words by a regular expression; a word is the list of its UTF-8 bytes; training joins, again
and again, the two neighbours that are seen together most often. The vocabulary is: special tokens, the 256
bytes, and one token for each join (a "merge"). Encoding replays the merges in the order they were learned.

The naive half comes first: it is the specification. The fast half gives the same merges and the same ids.
"""

from __future__ import annotations

import argparse
import codecs
import collections
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import heapq
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import typing
import unicodedata
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex
from tqdm import tqdm

# How Qwen2 cuts text: English contractions, letters with at most one sign before them, single digits, signs,
# line breaks, spaces. Chinese has no spaces, so there a word is a clause.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")  # numbers in groups of three digits
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS = {"qwen2": QWEN2_PATTERN, "llama3": LLAMA3_PATTERN, "gpt2": GPT2_PATTERN}
ENDOFTEXT, IM_START, IM_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
RESERVED = [f"<|reserved_{i}|>" for i in range(16)]
SPECIAL_TOKENS = [ENDOFTEXT, IM_START, IM_END, PAD, *RESERVED]


# The character that GPT-2 writes for each byte, in the order of their ids: bytes that print stand for
# themselves; the other 68 take the characters from U+0100 on.
BYTE_TO_CHAR = {byte: chr(byte) for byte in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]}
BYTE_TO_CHAR |= {byte: chr(256 + i) for i, byte in enumerate(sorted({*range(256)} - BYTE_TO_CHAR.keys()))}
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
    """The merges [(id, id), ...] that text with these words teaches; the k-th makes the id FIRST_MERGE + k.

    counts: {word: how often}. Each round joins the pair that stands most often side by side; of equally
    frequent ones the smallest (id, id), as in Hugging Face's trainer. Ends early where no pair is left that
    is seen min_frequency times.
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
    """The ids of a word's bytes, joined: always the pair that was learned first, while there is one.

    merges: {(id, id): (rank, new id)}.
    """
    while pairs := [pair for pair in zip(ids, ids[1:]) if pair in merges]:
        first = min(pairs, key=lambda pair: merges[pair])
        ids = join_pair(ids, first, merges[first][1])
    return ids


# ---------------------------------------------------------------------------------------------------------
# The fast half.

flatten = itertools.chain.from_iterable


def split_words(pattern, text):
    """The words of a text; what a pattern leaves between matches is a word too, so that nothing is lost."""
    words = pattern.findall(text)
    if not pattern.groups and sum(map(len, words)) == len(text):
        return words
    borders = flatten(match.span() for match in pattern.finditer(text))
    return [text[start:end] for start, end in itertools.pairwise([0, *borders, len(text)]) if start < end]


def count_words(texts, pattern=QWEN2_PATTERN, nfc=False):
    """Counter {word: how often} over an iterable of texts; nfc: normalised to NFC first."""
    counts, splitter = collections.Counter(), regex.compile(pattern)
    for text in texts:
        counts.update(split_words(splitter, unicodedata.normalize("NFC", text) if nfc else text))
    return counts


def lay_out(counts):
    """All words end to end: symbols (P,) int32, -1 after each word; weights (P,) int64, the word's count."""
    encoded = [word.encode() + b"\xff" for word in counts]  # 0xFF never occurs in UTF-8: it separates
    table = np.array([BYTE_IDS[byte] for byte in range(255)] + [-1], dtype=np.int32)
    symbols = table[np.frombuffer(b"".join(encoded), dtype=np.uint8)]
    return symbols, np.repeat(np.array([*counts.values()], np.int64), [len(word) for word in encoded])


def group_pairs(first, second, places, weights, min_frequency):
    """Sort places by the pair that stands there: yields (count, first id, second id, places of the pair)."""
    keys = first.astype(np.int64) << 32 | second
    order = np.argsort(keys)
    keys, places = keys[order], places[order]
    starts = np.flatnonzero(np.r_[len(keys) > 0, keys[1:] != keys[:-1]])
    counts, ends = np.add.reduceat(weights[places], starts), np.r_[starts[1:], len(keys)]
    often = counts >= min_frequency
    columns = (counts[often], keys[starts[often]], starts[often], ends[often])
    for count, key, start, end in zip(*(column.tolist() for column in columns)):
        yield count, key >> 32, key & 0xFFFFFFFF, places[start:end]


def every_second(places, right):
    """Of the places of a pair (a, a), those that a scan from the left joins: every second one of a run."""
    places = np.sort(places)
    index = np.arange(len(places))
    starts_run = np.r_[True, right[places[:-1]] != places[1:]]
    run_start = np.maximum.accumulate(np.where(starts_run, index, 0))
    return places[(index - run_start) % 2 == 0]


def join_places(symbols, left, right, places, new_id):
    """Join the pair at each of places; returns the pairs this makes: first (n,), second (n,), places (n,)."""
    second = right[places]
    after = right[second]
    symbols[places], symbols[second] = new_id, -1
    right[places], left[after] = after, places
    before = left[places]
    before = before[(symbols[before] >= 0) & (symbols[before] != new_id)]  # else it is among `ahead`
    ahead = symbols[after] >= 0
    places, after = places[ahead], after[ahead]
    new = np.full(len(before), new_id, np.int32)
    return np.r_[symbols[before], symbols[places]], np.r_[new, symbols[after]], np.r_[before, places]


def train_merges(counts, vocab_size, min_frequency=2):
    """The merges of `train_naive`, in time that grows with the places joined, not with text times merges.

    The text is three flat arrays of P places: the symbol, and the indices of the neighbours left and right
    (joining unlinks the second place). A pair's list of places is made once, when the newer of its two ids
    appears, and can only shrink from then on. So counts never grow, the heap may hold old ones that are too
    large, and a pair is counted when it is popped: if it has lost some, it goes back with the true count.
    """
    symbols, weights = lay_out(counts)
    left = np.arange(-1, len(symbols) - 1, dtype=np.int32)  # -1 is the last place, which is a separator
    right = np.arange(1, len(symbols) + 1, dtype=np.int32)
    places = np.flatnonzero((symbols[:-1] >= 0) & (symbols[1:] >= 0)).astype(np.int32)
    found = group_pairs(symbols[places], symbols[places + 1], places, weights, min_frequency)
    heap, places_of, merges = [], {}, []
    while True:
        for count, a, b, places in found:
            places_of[a, b] = places
            heapq.heappush(heap, (-count, a, b))
        if not heap or FIRST_MERGE + len(merges) >= vocab_size:
            return merges
        claimed, a, b = heapq.heappop(heap)
        places = places_of.pop((a, b))
        places = places[(symbols[places] == a) & (symbols[right[places]] == b)]
        count = int(weights[places].sum())
        if count < -claimed:
            found = [(count, a, b, places)] if count >= min_frequency else []
            continue
        places = every_second(places, right) if a == b else places
        pairs = join_places(symbols, left, right, places, FIRST_MERGE + len(merges))
        found = group_pairs(*pairs, weights, min_frequency)
        merges.append((a, b))


def merge_word(ids, merges):
    """The ids of `encode_naive`: a heap of (merge, place) over a linked list, so n bytes cost n log n."""
    ids, end = list(ids), len(ids)
    left, right = list(range(-1, end - 1)), list(range(1, end + 1))
    heap = [(merges[pair], i) for i, pair in enumerate(zip(ids, ids[1:])) if pair in merges]
    heapq.heapify(heap)
    while heap:
        merge, i = heapq.heappop(heap)
        j = right[i]
        if j == end or merges.get((ids[i], ids[j])) != merge:  # one of the two was joined meanwhile
            continue
        ids[i], ids[j] = merge[1], -1
        before, after = left[i], right[j]
        right[i] = after
        if after < end:
            left[after] = i
            if found := merges.get((ids[i], ids[after])):
                heapq.heappush(heap, (found, i))
        if before >= 0 and (found := merges.get((ids[before], ids[i]))):
            heapq.heappush(heap, (found, before))
    return [token for token in ids if token >= 0]


NO_RANK = np.int32(2**31 - 1)  # of a pair that no merge joins
FEW, LONG = 3_000, 200  # symbols of all words below, or of one word above, which a heap is the faster way


def merge_table(merges):
    """Merges as arrays for `merge_rounds`: sorted keys (M,) first << 32 | second, their ranks, ids by rank.

    None where a token is joined to another by an earlier merge than made it (Llama 2 has such): there it is
    not the same to join the lowest pair everywhere at once and one place after the other.
    """
    last = {made: rank for rank, made in sorted(merges.values())}
    early = any(max(last.get(a, -1), last.get(b, -1)) >= rank for (a, b), (rank, _) in merges.items())
    if early or not merges:
        return None
    columns = np.array([(a << 32 | b, rank, made) for (a, b), (rank, made) in merges.items()], np.int64)
    keys, ranks, made = columns[np.argsort(columns[:, 0])].T
    by_rank = np.zeros(ranks.max() + 1, np.int32)
    by_rank[ranks] = made
    return np.append(keys, np.iinfo(np.int64).max), np.append(ranks, NO_RANK).astype(np.int32), by_rank


def merge_rounds(symbols, lengths, table):
    """Merge many words at once: in each round every word joins its lowest pair, wherever it has it.

    symbols (P,) int32: the words end to end; lengths (W,). Yields (numbers, lengths, symbols) of those
    that are finished. It takes a half to a seventh of the heap's time. (To join, in one round, all pairs
    that are lower than their neighbours would be faster still, but is not exact.)
    """
    keys, ranks, made = table

    def rank_of(first, second):
        wanted = first.astype(np.int64) << 32 | second
        found = np.searchsorted(keys, wanted)
        return np.where(keys[found] == wanted, ranks[found], NO_RANK)

    numbers, rank = np.arange(len(lengths)), np.append(rank_of(symbols[:-1], symbols[1:]), NO_RANK)
    while True:
        ends = np.cumsum(lengths)
        rank[ends - 1] = NO_RANK  # of a word's last symbol with the next word's first
        lowest = np.minimum.reduceat(rank, ends - lengths)
        busy = lowest < NO_RANK
        keep = np.repeat(busy, lengths)
        yield numbers[~busy], lengths[~busy], symbols[~keep]
        if not busy.any():
            return
        symbols, rank = symbols[keep], rank[keep]
        numbers, lengths, lowest = numbers[busy], lengths[busy], lowest[busy]
        places = np.flatnonzero(rank == np.repeat(lowest, lengths))
        places = every_second(places, np.arange(1, len(symbols) + 1))
        symbols[places] = made[rank[places]]
        words = np.searchsorted(np.cumsum(lengths), places, side="right")
        lengths = lengths - np.bincount(words, minlength=len(lengths))
        symbols, rank = np.delete(symbols, places + 1), np.delete(rank, places + 1)
        places -= np.arange(len(places))  # where they are now
        stale = np.r_[places, places[places > 0] - 1]
        stale = stale[stale < len(symbols) - 1]
        rank[stale] = rank_of(symbols[stale], symbols[stale + 1])


def merge_words(words, merges, table):
    """`merge_word` of each word, a list of lists: of the short ones together, if there are enough of them."""
    merged, short = {}, [i for i, ids in enumerate(words) if 0 < len(ids) <= LONG] if table else []
    lengths = [len(words[i]) for i in short]
    if sum(lengths) >= FEW:
        symbols = np.fromiter(flatten(words[i] for i in short), np.int32)
        for numbers, sizes, flat in merge_rounds(symbols, np.array(lengths), table):
            ids = iter(flat.tolist())
            for number, size in zip(numbers.tolist(), sizes.tolist()):
                merged[short[number]] = list(itertools.islice(ids, size))
    return [merged[i] if i in merged else merge_word(ids, merges) for i, ids in enumerate(words)]


# ---------------------------------------------------------------------------------------------------------
# The tokenizer: ids <-> text.

CACHE_WORDS = 500_000  # words whose ids are remembered; then the memory starts afresh


@dataclass(frozen=True)
class Spaces:
    """What SentencePiece's BPE (Llama 2, Mistral 7B) does with spaces: it writes ▁, and adds one.

    prefix: "always", "missing" (where there is none yet), "first" (missing, and no token before), "never".
    split: every ▁ begins a word. strip: decoding takes the added one off again. glued: ids of the special
    tokens that "always" takes for the beginning of the text after them (`normalized` in tokenizer.json).
    """

    prefix: str
    split: bool
    strip: bool
    glued: tuple


FALLBACK_BYTES = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}  # tokens of a BPE with `spaces`


def spell(token, spaces):
    """The bytes of a token of the vocabulary."""
    if spaces:
        return FALLBACK_BYTES.get(token) or token.replace("▁", " ").encode()
    return bytes(map(CHAR_TO_BYTE.get, token))


class Tokenizer:
    """Byte-level BPE, ours, or a foreign BPE that `load` accepts.

    vocab_size: rows that an embedding needs (largest id + 1). special_tokens {text: id}: encode gives them
    only where it is allowed to. added_tokens {text: id}: not special, found in plain text (Qwen's <think>).
    endoftext, im_start, im_end, pad: ids, None where a foreign tokenizer has no such token. Of one without
    ChatML, im_end is what ends an answer in its chat template, endoftext its bos, with which documents begin,
    and document_end its eos, with which they end; for others the next document's beginning says the end.
    unused_ids: rows of its model that no token has (Qwen's has some), which sampling may give: no text.
    hash: sha256 of all that decides the ids.
    """

    def __init__(self, vocab, merges, special_tokens, added_tokens, pattern, nfc, ignore_merges, spaces=None):
        """vocab {token in GPT-2's characters, or with `spaces` in its own: id}, merges [(token, token)].

        pattern: a regular expression, or a list of them, each cutting further; nfc: normalise text to NFC.
        """
        self.vocab, self.merges, self.pattern, self.nfc, self.spaces = vocab, merges, pattern, nfc, spaces
        self.special_tokens, self.added_tokens = special_tokens, added_tokens
        self.endoftext, self.im_start, self.im_end, self.pad = map(special_tokens.get, SPECIAL_TOKENS[:4])
        self.document_end, self.unused_ids = None, frozenset()
        self.special_ids, named = frozenset(special_tokens.values()), special_tokens | added_tokens
        self.bytes_of = {id: spell(token, spaces) for token, id in vocab.items() if token not in named}
        # Llama 3: a word that is in the vocabulary is one token, whatever the merges.
        self.whole_words = {data: id for id, data in self.bytes_of.items()} if ignore_merges else {}
        self.bytes_of |= {id: text.encode() for text, id in named.items()}
        self.vocab_size = max(self.bytes_of) + 1
        byte_tokens = FALLBACK_BYTES if spaces else map(BYTE_TO_CHAR.get, range(256))
        self.byte_ids = [vocab[token] for token in byte_tokens]
        self.merge_of = {(vocab[a], vocab[b]): (rank, vocab[a + b]) for rank, (a, b) in enumerate(merges)
                         if a + b not in special_tokens}  # fmt: skip
        self.splitters = [regex.compile(p) for p in ([pattern] if isinstance(pattern, str) else pattern)]
        self.cache = {}  # {word, or id of an added token: ids}
        decides = [vocab, merges, special_tokens, added_tokens, pattern, nfc, ignore_merges]
        decides += [dataclasses.astuple(spaces)] if spaces else []
        self.hash = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        self.files = None  # {name: bytes} of the folder it was loaded from
        self.chat_template, self.names = None, {}  # a foreign one, and its bos_token, eos_token, ...

    @classmethod
    def from_merges(cls, pairs, special_tokens=SPECIAL_TOKENS, pattern=QWEN2_PATTERN, nfc=False):
        """Our tokenizer, from what training gives: [(id, id), ...], ids as they are after SPECIAL_TOKENS."""
        tokens, shift = [*special_tokens, *CHAR_TO_BYTE], len(special_tokens) - len(SPECIAL_TOKENS)
        pairs = [(a + shift, b + shift) for a, b in pairs]
        for a, b in pairs:
            tokens.append(tokens[a] + tokens[b])
        vocab = {token: id for id, token in enumerate(tokens)}
        if len(vocab) < len(tokens):
            raise InputError("a special token is there twice, or is spelled like a learned token")
        merges, special = [(tokens[a], tokens[b]) for a, b in pairs], {t: vocab[t] for t in special_tokens}
        return cls(vocab, merges, special, {}, pattern, nfc, ignore_merges=False)

    def encode(self, text, allow=(), after=None):
        """Ids of a text, a list of int. Text that spells a special token stays text, unless `allow` names it.

        after: what stands before the text, None, "token" or "text": SentencePiece's added space hangs on it.
        """
        words = self.words(text, allow, after)
        self.learn(words)
        return [*flatten(map(self.cache.__getitem__, words))]

    def encode_batch(self, texts):
        """Ids of many texts, an int32 array (T,) each: those of `encode`."""
        texts = [*map(self.words, texts)]
        self.learn(flatten(texts))
        return [np.fromiter(flatten(map(self.cache.__getitem__, words)), np.int32) for words in texts]

    def words(self, text, allow=(), after=None):
        """What a text is cut into, in order: words, and the ids of added or allowed special tokens."""
        if unknown := [name for name in allow if name not in self.special_tokens]:
            raise InputError(f"no special tokens of this tokenizer: {', '.join(sorted(unknown))}")
        named = self.added_tokens | {name: self.special_tokens[name] for name in allow}
        found = []
        for i, piece in enumerate(find_any(tuple(named)).split(text) if named else [text]):
            if i % 2:
                found.append(named[piece])
                continue
            piece = unicodedata.normalize("NFC", piece) if self.nfc else piece
            words = [self.with_spaces(piece, "token" if i else after) if self.spaces else piece]
            for splitter in self.splitters:
                words = [word for piece in words for word in split_words(splitter, piece)]
            found += words
        return found

    def with_spaces(self, text, after):
        """SentencePiece's spelling: ▁ for a space, and one more before the text."""
        text, prefix = text.replace(" ", "▁"), self.spaces.prefix
        added = {"never": False, "first": after is None}.get(prefix, after != "text")
        return "▁" + text if added and text and (prefix == "always" or text[0] != "▁") else text

    def learn(self, words):
        """Have the ids of all these words in the cache; the new ones are merged together."""
        if len(self.cache) >= CACHE_WORDS:
            self.cache.clear()
        if new := list(set(words).difference(self.cache)):
            merged = merge_words([*map(self.symbols, new)], self.merge_of, self.merge_table)
            self.cache.update(zip(new, merged))

    @functools.cached_property
    def merge_table(self):
        return merge_table(self.merge_of)

    def symbols(self, word):
        """What merging begins with: bytes, or with `spaces` the characters of the vocabulary, else bytes."""
        if type(word) is int:  # an added token
            return [word]
        try:
            data = word.encode()
        except UnicodeEncodeError as error:
            code = ord(word[error.start])
            raise InputError(f"half of a surrogate pair (U+{code:04X}) is not text") from None
        if data in self.whole_words:
            return [self.whole_words[data]]
        if not self.spaces:
            return list(map(self.byte_ids.__getitem__, data))
        ids = []
        for character in word:
            known = self.vocab.get(character)
            ids += [self.byte_ids[byte] for byte in character.encode()] if known is None else [known]
        return ids

    def decode_bytes(self, ids, skip_special_tokens=False, starts=True):
        """The bytes that ids stand for; a special token gives its name, or nothing.

        starts: nothing was decoded before them, so a space that SentencePiece added is taken off.
        """
        hidden = self.unused_ids | self.special_ids if skip_special_tokens else self.unused_ids
        try:
            data = b"".join([self.bytes_of[id] for id in map(int, ids) if id not in hidden])
        except KeyError as error:
            raise InputError(f"id {error} is not in the vocabulary of {self.vocab_size}") from None
        return data.removeprefix(b" ") if starts and self.spaces and self.spaces.strip else data

    def decode(self, ids, skip_special_tokens=False):
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, skip_special_tokens).decode("utf-8", errors="replace")

    def token_bytes(self):
        """For each id the bytes of text it stands for; 0 for special tokens and for ids without a token."""
        special = self.special_ids
        return [0 if id in special else len(self.bytes_of.get(id, b"")) for id in range(self.vocab_size)]

    @classmethod
    def load(cls, folder):
        """Read FOLDER/tokenizer.json, ours or a foreign BPE; else InputError says why not."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{path}: not found; give a folder that holds a tokenizer")
        files = {file: (path.parent / file).read_bytes() for file in FILES if (path.parent / file).is_file()}
        try:
            tokenizer = cls(*parse_tokenizer_json(json.loads(files["tokenizer.json"])))
            path = path.with_name("tokenizer_config.json")
            config = json.loads(files.get("tokenizer_config.json", b"{}"))
            names = token_names(config)
            if tokenizer.im_start is None or tokenizer.spaces:
                read_foreign_chat(tokenizer, files, config, names)
            if tokenizer.endoftext is None:
                begin, end = map(tokenizer.special_tokens.get, map(names.get, ("bos_token", "eos_token")))
                tokenizer.endoftext, tokenizer.document_end = begin, end if end != begin else None
            if tokenizer.pad is None:
                tokenizer.pad = find_pad(tokenizer, names)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, regex.error) as error:
            raise InputError(f"{path}: not a sound one ({type(error).__name__}: {error})") from None
        tokenizer.files = files
        return tokenizer

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json; the files of a loaded tokenizer, byte for byte."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        files = self.files
        if not files:
            ours = {"tokenizer_config.json": TOKENIZER_CONFIG, "tokenizer.json": tokenizer_json(self)}
            files = {name: (json.dumps(file, ensure_ascii=False, indent=1) + "\n").encode()
                     for name, file in ours.items()}  # fmt: skip
        for name, data in files.items():
            write_whole(Path(folder) / name, data)


@functools.lru_cache(16)
def find_any(names):
    """A pattern that finds any of these names, the longest first, and keeps them when it splits."""
    return regex.compile(f"({'|'.join(map(regex.escape, sorted(names, key=len, reverse=True)))})")


class StreamDecoder:
    """Decodes ids one at a time: text comes out when its characters are whole, never half of one."""

    def __init__(self, tokenizer, skip_special_tokens=True):
        self.tokenizer, self.skip_special_tokens, self.starts = tokenizer, skip_special_tokens, True
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, id):
        """The text that this id completes: "" while a character is open."""
        data = self.tokenizer.decode_bytes([id], self.skip_special_tokens, self.starts)
        self.starts &= self.skip_special_tokens and int(id) in self.tokenizer.special_ids
        return self.decoder.decode(data)

    def finish(self):
        """What is left at the end: "", or U+FFFD for a character that was not completed."""
        return self.decoder.decode(b"", final=True)


# ---------------------------------------------------------------------------------------------------------
# Chat: ChatML, encoded piece by piece; a foreign tokenizer's own template.

ROLES = ("system", "user", "assistant")
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
    """Raise InputError unless messages is a list, not empty, of {role: one of ROLES, content: text}."""
    if not isinstance(messages, list):
        raise InputError(f"messages must be a list, found {type(messages).__name__}")
    if not messages:
        raise InputError("messages is an empty list")
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise InputError(f"message {i} must be an object with role and content, found {message!r:.40}")
        for key in ("role", "content"):
            if key not in message:
                raise InputError(f"message {i} has no {key}")
            if not isinstance(message[key], str):
                raise InputError(f"message {i}: {key} must be text, found {type(message[key]).__name__}")
        if message["role"] not in ROLES:
            raise InputError(f"message {i}: unknown role {message['role']!r:.40}; use {', '.join(ROLES)}")


def messages_of(side, role="user"):
    """Text as the one message of a role, or a message list as it is."""
    return [{"role": role, "content": side}] if isinstance(side, str) else side


def encode_chat(tokenizer, messages, generation_prompt=False):
    """A dialogue -> (ids, trained): two lists of one length. In ChatML, or as a foreign chat_template has it.

    Headers, contents and the line breaks between messages are encoded apart and special tokens placed as ids,
    so text that looks like a special token stays text. trained is True for what the assistant writes: its
    contents and the <|im_end|> after them. Ends at the last <|im_end|>, or with the head of the next answer.
    """
    check_messages(messages)
    if tokenizer.chat_template is not None:
        return encode_foreign_chat(tokenizer, messages, generation_prompt)
    if tokenizer.im_start is None or tokenizer.im_end is None:
        raise InputError(f"this tokenizer has no {IM_START} and {IM_END}, which chats are made of, and no "
                         "chat_template: give its tokenizer_config.json one")  # fmt: skip
    ids, trained = [], []

    def add(tokens, is_trained=False):
        ids.extend(tokens)
        trained.extend([is_trained] * len(tokens))

    def encode(text, after="token"):
        return tokenizer.encode(text, after=after)

    for i, message in enumerate(messages):
        add(encode("\n") if i else [])
        add([tokenizer.im_start, *encode(message["role"] + "\n")])
        add([*encode(message["content"], after="text"), tokenizer.im_end], message["role"] == "assistant")
    if generation_prompt:
        add([*encode("\n"), tokenizer.im_start, *encode("assistant\n")])
    return ids, trained


def encode_answer(tokenizer, prompt, answer):
    """A prompt and an answer to it, message lists -> (ids, trained): the answer is trained, and ends them.

    The answer stands after the very ids that it would be sampled after. A template may write a dialogue in
    another way once it is answered: Mistral's moves the system's words, others put a line break at the end.
    """
    head, _ = encode_chat(tokenizer, prompt, generation_prompt=True)
    ids, trained = encode_chat(tokenizer, prompt + answer)
    starts = [t for t, own in enumerate(trained) if own and not (t and trained[t - 1])]
    if len(starts) != sum(message["role"] == "assistant" for message in prompt + answer):
        raise InputError("the chat_template leaves an answer out, or runs two together")
    begin = starts[-sum(message["role"] == "assistant" for message in answer)]
    end = len(trained) - trained[::-1].index(True)
    return head + ids[begin:end], [False] * len(head) + trained[begin:end]


def encode_foreign_chat(tokenizer, messages, generation_prompt):
    """`encode_chat` by a tokenizer's own chat_template: the ids that transformers gives.

    The text between two special tokens is encoded as one, but cut where an answer begins.
    """
    parts = chat_parts(tokenizer, messages, generation_prompt)
    ids, trained, after, glued = [], [], None, tokenizer.spaces.glued if tokenizer.spaces else ()
    for (is_text, answer), group in itertools.groupby(parts, lambda p: (isinstance(p[0], str), p[1])):
        values = [value for value, _ in group]
        tokens = tokenizer.encode("".join(values), after=after) if is_text else values
        if tokens:
            after = "text" if is_text or tokens[-1] in glued else "token"
        ids += tokens
        trained += [answer] * len(tokens)
    return ids, trained


def chat_parts(tokenizer, messages, generation_prompt):
    """A dialogue in a chat_template as [(text or id of a token, whether it is trained)].

    An answer takes the space before it (the two are in one token), and goes on to the special token that
    ends it.
    """
    parts, answering = [], False
    named = tokenizer.special_tokens | tokenizer.added_tokens
    for text, role in render_chat(tokenizer, messages, generation_prompt):
        if answering and role:
            break
        answering = answering or role == "assistant"
        if role == "assistant" and parts and isinstance(parts[-1][0], str):
            before = parts.pop()[0]
            head = before.rstrip(" ")
            parts.append((head, False))
            text = before[len(head) :] + text
        for piece in [text] if role else find_any(tuple(named)).split(text):
            parts.append((piece if role else named.get(piece, piece), answering))
            answering = answering and (bool(role) or piece not in tokenizer.special_tokens)
    if answering:
        raise InputError("the chat_template does not end an answer with a special token")
    return parts


def render_chat(tokenizer, messages, generation_prompt):
    """A dialogue in a tokenizer's chat_template: [(text, role)] in order, role None for the template's text.

    The template sees marks in place of contents, between two wide spaces: where those are gone, it strips.
    InputError where it would do more to these contents than that.
    """
    marked = [{**m, "content": f"\u2003\ue000{i}\ue001\u2003"} for i, m in enumerate(messages)]
    given = {"messages": marked, "add_generation_prompt": generation_prompt, "tools": None, "documents": None}
    try:
        template = compile_template(tokenizer.chat_template)
        rendered = template.render(**tokenizer.names, **given)
        text, *rest = regex.split("(\u2003?)\ue000([0-9]+)\ue001(\u2003?)", rendered)
        parts = [(text, None)]
        for left, i, right, text in zip(*[iter(rest)] * 4):
            content, role = messages[int(i)]["content"], messages[int(i)]["role"]
            content = content if left else content.lstrip()
            parts += [(content if right else content.rstrip(), role), (text, None)]
        plain = template.render(**tokenizer.names, **given | {"messages": messages})
        if "".join(text for text, _ in parts) != plain:
            raise InputError("the chat_template changes what is said (as R1's leaves out <think>...</think>)")
        return parts
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the chat_template fails ({type(error).__name__}: {error})") from None


@functools.lru_cache(8)
def compile_template(source):
    """A chat_template as transformers runs it, in jinja2's sandbox; marks of {% generation %} do nothing."""
    import jinja2.sandbox  # only foreign chats need it

    def refuse(message):
        raise InputError(f"the chat_template says: {message}")

    settings = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(**settings)
    environment.globals["raise_exception"] = refuse
    for mark, nothing in (("generation", "if true"), ("endgeneration", "endif")):
        source = regex.sub(rf"\{{%(-?)\s*{mark}\s*(-?)%\}}", rf"{{%\1 {nothing} \2%}}", source)
    return environment.from_string(source)


def token_names(config):
    """{"bos_token": name, ...} of a tokenizer_config.json, as far as it has them."""
    keys = ("bos_token", "eos_token", "unk_token", "pad_token")
    names = {key: config[key] for key in keys if config.get(key)}
    return {key: name["content"] if isinstance(name, dict) else name for key, name in names.items()}


def read_foreign_chat(tokenizer, files, config, names):
    """A tokenizer without ChatML, or of SentencePiece's, takes from its files: chat_template, im_end."""
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {each["name"]: each["template"] for each in template}.get("default")
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].decode()
    tokenizer.chat_template, tokenizer.names = template, names
    try:
        ids, trained = encode_chat(tokenizer, messages_of("a") + messages_of("b", "assistant"))
        tokenizer.im_end = [id for id, answer in zip(ids, trained) if answer][-1]
    except (InputError, IndexError):  # told when a chat is to be encoded
        pass


def find_pad(tokenizer, names):
    """A foreign tokenizer's pad: its pad_token, else a spare special token, never one that ends an answer.

    In ChatML, where that is <|im_end|> alone, it may be the <|endoftext|> between documents (Qwen's is).
    """
    chatml, special = tokenizer.im_start is not None, tokenizer.special_tokens
    taken = {IM_END} if chatml else {names.get("bos_token"), names.get("eos_token")}
    spare = [name for name in special if regex.match(r"<\|reserved_|\[control_|<unk>|<\|fim_pad", name)]
    fit = [names.get("pad_token"), *spare, *([ENDOFTEXT] if chatml else [])]
    return next((special[name] for name in fit if name in special and name not in taken), None)


# ---------------------------------------------------------------------------------------------------------
# Files: tokenizer.json (Hugging Face's format) and the folder of tokens.

FILES = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"]
FILES += ["tokenizer.model", "chat_template.jinja"]
FILES += ["tokenizer.json"]  # the last to be written: a folder that has it is finished
TOKENIZER_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": IM_END,
                    "pad_token": PAD, "clean_up_tokenization_spaces": False, "model_max_length": 131072,
                    "chat_template": CHAT_TEMPLATE}  # fmt: skip
SPLITS = ("train", "valid", "test")


def write_whole(path, data):
    """Write a file under a temporary name and rename it: it is there whole, or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def tokenizer_json(tokenizer):
    """tokenizer.json of our own tokenizers."""
    pattern = {"Regex": tokenizer.pattern}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": id, "content": t, **flags} for t, id in tokenizer.special_tokens.items()],
        "normalizer": {"type": "NFC"} if tokenizer.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": tokenizer.vocab, "merges": tokenizer.merges},
    }


def parse_tokenizer_json(data):
    """The arguments of Tokenizer, from a parsed tokenizer.json; InputError names what is unsupported."""
    model, normalizers = data["model"], steps_of(data, "normalizer")
    if model.get("type", "BPE") != "BPE":
        raise InputError(f"unsupported model {model['type']!r}; only BPE is read")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise InputError(f"unsupported: BPE with {key} {model[key]!r}")
    vocab, spaces = model["vocab"], None
    if model.get("byte_fallback") and "ByteLevel" not in [s["type"] for s in steps_of(data, "pre_tokenizer")]:
        spaces = read_spaces(data)
    elif kinds := [step["type"] for step in normalizers if step["type"] != "NFC"]:
        raise InputError(f"unsupported normalizer {kinds[0]!r}; only NFC is read")
    if spaces and model.get("ignore_merges"):
        raise InputError("unsupported: byte_fallback with ignore_merges")
    special, added = read_added_tokens(data, ["normalized"] if spaces or normalizers else [])
    check_vocabulary(vocab, special | added, spaces)
    merges = [tuple(pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in model["merges"]]
    for pair in merges:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise InputError(f"merge {pair!r} is not of two tokens of the vocabulary that make a third")
    pattern = spaces_pattern(spaces, vocab) if spaces else read_pattern(data)
    nfc = bool(normalizers) and not spaces
    return vocab, merges, special, added, pattern, nfc, bool(model.get("ignore_merges")), spaces


def steps_of(data, part):
    """The steps of a normalizer, pre_tokenizer or decoder: those of a Sequence, or itself, or none."""
    node = data.get(part)
    if not node:
        return []
    return node[part.replace("_", "") + "s"] if node["type"] == "Sequence" else [node]


def read_added_tokens(data, refused):
    """(special, added): {text: id} each. Of those that text may spell, some flags would change the ids."""
    special, added = {}, {}
    for token in data.get("added_tokens") or []:
        flags = [flag for flag in ["lstrip", "rstrip", "single_word", *refused] if token.get(flag)]
        if flags and not token["special"]:
            raise InputError(f"unsupported: {token['content']!r} with {flags[0]}")
        is_special = token["special"] or token["content"] in (IM_START, IM_END)  # which no text may become
        (special if is_special else added)[token["content"]] = token["id"]
    return special, added


def check_vocabulary(vocab, named, spaces):
    """Raise InputError unless ids are sound, all 256 bytes are there, and tokens are spelled in them."""
    ids = {**vocab, **named}.values()
    if not all(type(id) is int and 0 <= id < 1 << 24 for id in ids) or len(set(ids)) < len(ids):
        raise InputError("an id is used twice, or is not a whole number from 0 to 2**24")
    kind, byte_tokens = ("byte_fallback", FALLBACK_BYTES) if spaces else ("not byte-level", CHAR_TO_BYTE)
    if missing := byte_tokens.keys() - vocab.keys():
        raise InputError(f"unsupported: {kind} ({len(missing)} of 256 bytes are missing)")
    for token in vocab.keys() - named.keys():
        if not spaces and not CHAR_TO_BYTE.keys() >= set(token):
            raise InputError(f"unsupported: not byte-level (token {token!r} is not spelled in bytes)")


def read_pattern(data):
    """The patterns of a pre_tokenizer: Split(Regex) and Digits, then ByteLevel, which may use GPT-2's."""
    *steps, last = steps_of(data, "pre_tokenizer") or [{"type": None}]
    kinds, patterns = [step["type"] for step in [*steps, last]], []
    if last["type"] != "ByteLevel" or not {*kinds[:-1]} <= {"Split", "Digits"}:
        raise InputError(f"unsupported pre_tokenizer {kinds}; only Split and Digits, then ByteLevel are read")
    for step in steps:
        if step["type"] == "Digits":
            patterns.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
        elif "Regex" not in step["pattern"] or step["behavior"] != "Isolated" or step.get("invert"):
            raise InputError("unsupported pre_tokenizer: a Split that is not by Regex, or not Isolated")
        else:
            patterns.append(step["pattern"]["Regex"])
    patterns += [GPT2_PATTERN] if last.get("use_regex", True) else []
    if last.get("add_prefix_space") or not patterns:
        raise InputError(f"unsupported pre_tokenizer {kinds} with {last}")
    return patterns if len(patterns) > 1 else patterns[0]


def read_spaces(data):
    """What a byte_fallback BPE does with spaces, told by its normalizer, or its pre_tokenizer Metaspace."""
    prefix, written, split = "never", False, False
    for step in steps_of(data, "normalizer"):
        if step["type"] == "Prepend" and step["prepend"] == "▁":
            prefix = "always"
        elif step["type"] == "Replace" and (step["pattern"], step["content"]) == ({"String": " "}, "▁"):
            written = True
        else:
            raise InputError(f"unsupported normalizer of a byte_fallback BPE: {step}")
    for step in steps_of(data, "pre_tokenizer"):
        if step["type"] != "Metaspace" or step["replacement"] != "▁" or prefix != "never":
            raise InputError(f"unsupported pre_tokenizer of a byte_fallback BPE: {step}")
        scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
        prefix = {"always": "missing", "first": "first", "never": "never"}[scheme]
        written, split = True, step.get("split", True)
    if not written:
        raise InputError("unsupported: a byte_fallback BPE that does not write spaces as ▁")
    steps, strip = steps_of(data, "decoder"), {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    kinds = [step["type"] for step in steps]
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or steps[3:] not in ([], [strip]):
        raise InputError(f"unsupported decoder of a byte_fallback BPE: {kinds}")
    glued = [token["id"] for token in data.get("added_tokens") or [] if token.get("normalized")]
    return Spaces(prefix, split, len(steps) == 4, tuple(glued) if prefix == "always" else ())


def spaces_pattern(spaces, vocab):
    """Where text with ▁ is cut without changing ids: before it, if no token has one after another sign."""
    if spaces.split:
        return "▁[^▁]*|[^▁]+"
    return "(?s:.+)" if any(regex.search("[^▁]▁", token) for token in vocab) else "▁*[^▁]+|▁+"


@dataclass
class Shard:
    """Documents of one source and language, end to end, each beginning with <|endoftext|>."""

    source: str
    lang: str
    tokens: np.ndarray  # (T,) uint16 or uint32, mapped from the file
    documents: int
    bytes: int  # of their text, in UTF-8
    offsets: np.ndarray  # (documents,) int64: where each begins


def read_tokens(folder, split, tokenizer=None):
    """The shards of a split (train, valid or test) of a folder that `tokenizer.py encode` wrote.

    Raises InputError unless they are whole, hold a document, and were encoded by this tokenizer.
    """
    folder, index = Path(folder), Path(folder) / "index.json"
    if not index.is_file():
        raise InputError(f"{index}: not found; write it with tokenizer.py encode")
    try:
        record = json.loads(index.read_bytes())
        if tokenizer is not None and record["tokenizer"] != tokenizer.hash:
            raise InputError(f"{index}: encoded by another tokenizer; run tokenizer.py encode again")
        dtype = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}[record["dtype"]]
        shards = [read_shard(folder, shard, dtype) for shard in record["shards"] if shard["split"] == split]
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{index}: not an index of tokens ({type(error).__name__}: {error})") from None
    if not shards:
        raise InputError(f"{index}: the split {split!r} is empty; it takes three documents or more")
    return shards


def read_shard(folder, entry, dtype):
    path, expected = folder / entry["file"], entry["tokens"] * dtype.itemsize
    found = path.stat().st_size if path.is_file() else "no file"
    if found != expected:
        raise InputError(f"{path}: expected {expected} bytes, found {found}; run tokenizer.py encode again")
    tokens, offsets = np.memmap(path, dtype=dtype, mode="r"), np.array(entry["offsets"], dtype=np.int64)
    return Shard(entry["source"], entry["lang"], tokens, entry["documents"], entry["bytes"], offsets)


def token_type(tokenizer):
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def write_shards(split, source, encoded, out):
    """Write a source's documents to OUT/{split}/{source}.{lang}-00000.bin; returns index.json's entries.

    encoded: an iterable of [(ids (T,), language, bytes of text), ...].
    """
    shards = {}
    (out / split).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for ids, lang, size in flatten(encoded):
            if lang not in shards:
                name = f"{split}/{source}.{lang}-00000.bin"
                entry = {"split": split, "source": source, "lang": lang, "file": name}
                entry |= {"tokens": 0, "documents": 0, "bytes": 0, "offsets": []}
                shards[lang] = entry, stack.enter_context(open(out / name, "wb"))
            entry, file = shards[lang]
            file.write(ids.tobytes())
            entry["offsets"].append(entry["tokens"])
            entry["tokens"] += len(ids)
            entry["documents"] += 1
            entry["bytes"] += size
    return [shards[lang][0] for lang in sorted(shards)]


def is_text(path):
    """Whether a file is one text; else it holds a JSON object a line."""
    return path.name.lower().endswith((".txt", ".txt.gz"))


def text_files(inputs):
    """The .txt and .jsonl files, plain or .gz, that inputs name, folders walked in sorted order."""
    files = jsonl_files(inputs, endings := (".txt", ".jsonl", ".txt.gz", ".jsonl.gz"))
    if other := [file for file in files if not file.name.lower().endswith(endings)]:
        raise InputError(f"{other[0]}: unknown kind of file; text is read from {', '.join(endings)}")
    return files


def read_texts(path):
    """Yield (text, language, bytes) of a file; a .txt file is one text. Without a language it is "text"."""
    if is_text(path):
        try:
            with open_bytes(path) as file:
                data = file.read()
            yield data.decode(), "text", len(data)
        except DAMAGED_GZ as error:
            raise InputError(f"{path}: a damaged .gz file ({error})") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 (byte {error.start})") from None
        return
    for number, record in read_jsonl(path):
        text, lang = record.get("text"), record.get("lang", "text")
        if not isinstance(text, str):
            raise InputError(f"{path}:{number}: expected a field `text` that holds text")
        if not isinstance(lang, str) or not lang.isalpha():
            raise InputError(f"{path}:{number}: lang must be a word like en, zh or code, found {lang!r:.40}")
        try:
            yield text, lang, len(text.encode())
        except UnicodeEncodeError:
            raise InputError(f"{path}:{number}: half of a surrogate pair is not text") from None


BATCH_BYTES = 1_000_000  # of text that a process is given at a time


def read_batches(paths):
    """Yield (path, [(text, language, bytes), ...]): documents of one file, about BATCH_BYTES at a time."""
    for path in paths:
        batch, size = [], 0
        for document in read_texts(path):
            batch.append(document)
            size += document[2]
            if size >= BATCH_BYTES:
                yield path, batch
                batch, size = [], 0
        if batch:
            yield path, batch


# ---------------------------------------------------------------------------------------------------------
# What every script needs: errors told in one line, options from a dataclass, JSON lines and what is in them.


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
        except (MemoryError, OverflowError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            said = str(error).split("\n")[0] or "out of memory"
            message, status = f"{said:.160}; some number is too large for this machine", 2
        except KeyboardInterrupt:
            message, status = "interrupted", 130
        except SystemExit as stop:  # argparse's --help
            return stop.code or 0
        name = Path(sys.modules[main.__module__].__file__).name
        print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
        return status

    return wrapped


def option(help, default=dataclasses.MISSING, choices=None, at_least=-math.inf):
    """A field of an options dataclass: one sentence of help; required where there is no default.

    choices: the values it may have; at_least: the smallest number it may be.
    """
    metadata = {"help": help, "default": default, "choices": choices, "at_least": at_least}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
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
        kind, default = types[field.name], field.metadata["default"]
        value_type = next((t for t in typing.get_args(kind) if t is not type(None)), kind)
        help = field.metadata["help"].replace("%", "%%")
        if default is not False and default not in (None, "", [], dataclasses.MISSING):
            help += f" (default: {default})"
        settings = {"help": help, "default": default, "required": default is dataclasses.MISSING}
        if value_type is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            nargs = "+" if typing.get_origin(kind) is list else None
            settings |= {"type": value_type, "nargs": nargs, "choices": field.metadata["choices"]}
        parser.add_argument("--" + field.name.replace("_", "-"), **settings)
    options = options_class(**vars(parser.parse_args(argv)))
    for field in dataclasses.fields(options_class):
        value, least = getattr(options, field.name), field.metadata["at_least"]
        if isinstance(value, (int, float)) and not value >= least:  # NaN is refused too
            raise InputError(f"--{field.name.replace('_', '-')} {value} must be at least {least}: see --help")
    return options


PARALLEL_BYTES = 32_000_000  # of files: below, starting processes costs more than it gains


def map_batches(work, batches, processes, paths, least=None):
    """Yield work(batch) for each batch, in order, in so many processes; reading is not far ahead of them.

    Files of less than `least` bytes (else PARALLEL_BYTES) are worked on in this process. The others are new
    ones (fork is unsafe where torch runs threads), and leave Ctrl-C to this one.
    """
    least = PARALLEL_BYTES if least is None else least
    if processes == 1 or sum(path.stat().st_size for path in paths) < least:
        yield from map(work, batches)
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # they inherit it
    try:
        pool = multiprocessing.get_context("spawn").Pool(processes)
    finally:
        signal.signal(signal.SIGINT, handler)
    with pool:
        workers = set(multiprocessing.active_children())
        while window := list(itertools.islice(batches, 4 * processes)):
            found = pool.map_async(work, window, chunksize=1)
            while not found.ready():
                found.wait(1)
                if workers - set(multiprocessing.active_children()):  # else a Pool waits for it for ever
                    raise InputError("a process was killed; is memory short? try fewer --processes")
            yield from found.get()


def refuse_constant(name):
    raise ValueError(f"{name} is not JSON")


def load_scorer(name):
    """`file.py:function` -> that function, (prompt, answer, meta) -> {name: number}; else InputError."""
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        raise InputError(f"scorer {name}: expected file.py:function")
    spec = importlib.util.spec_from_file_location("scorer_" + Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
        return getattr(module, function)
    except (Exception, SystemExit) as error:
        raise InputError(f"scorer {name}: {error!r}") from None


DAMAGED_GZ = (EOFError, zlib.error, gzip.BadGzipFile)


def open_bytes(path):
    """A file to be read as bytes, a .gz file's unpacked."""
    return (gzip.open if str(path).lower().endswith(".gz") else open)(path, "rb")


def json_object(line):
    """A line of JSON (bytes) -> the object in it; InputError for what is none."""
    try:
        record = json.loads(line.decode("utf-8-sig"), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not a line of JSON ({error}); mend or remove it") from None
    if not isinstance(record, dict):
        raise InputError(f"expected an object, found {type(record).__name__}")
    return record


def read_jsonl(path, skipped=None):
    """Yield (line number, object) of a .jsonl or .jsonl.gz file; blank lines are passed over.

    Raises InputError naming file and line for what is not UTF-8, not JSON (NaN and Infinity are not), not an
    object, and for a .gz file that is damaged or cut off. With skipped (a stage's counts, under --skip-bad)
    such a line only adds one to skipped["bad"].
    """
    number = 0
    with open_bytes(path) as file:
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json_object(line)
                except InputError as error:
                    if skipped is None:
                        raise InputError(f"{path}:{number}: {error}") from None
                    skipped["bad"] += 1
                else:
                    yield number, record
        except DAMAGED_GZ as error:
            raise InputError(f"{path}: a damaged .gz file after line {number} ({error})") from None


def reasons(counts):
    """{"bad": 0, "too_long": 380} -> "too long: 380": of data that nothing is left of, why."""
    return ", ".join(f"{name.replace('_', ' ')}: {n:,}" for name, n in counts.items() if n) or "it is empty"


def jsonl_files(paths, endings=(".jsonl", ".jsonl.gz")):
    """The files that paths name; of folders, walked in sorted order, those with such endings."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"{path}: not found")
        inside = walk(path) if path.is_dir() else ()
        found = sorted(file for file in inside if file.name.lower().endswith(endings) and file.is_file())
        files += (found := found if path.is_dir() else [path])
        if not found:
            raise InputError(f"{path}: no text in it ({', '.join(endings)})")
    return files


def walk(folder):
    """Yield all files under a folder, through links to other folders as well, though not in a circle."""

    def stop(error):
        raise error  # an unreadable folder is told, not passed over

    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        real = os.path.realpath(root)
        folders[:] = folders if real not in seen else []
        yield from (Path(root, name) for name in names if real not in seen)
        seen.add(real)


def name_of(messages):
    """A message list as text: what it is known by, whatever the order of its keys in the file."""
    return json.dumps(messages, sort_keys=True)


def held_out(messages):
    """Whether a dialogue, or a prompt, is among the 5 % with the smallest hashes, which are validated on.

    It is one rule for all stages: collect.py and ppo.py can leave out what reward.py and dpo.py hold out.
    """
    return int.from_bytes(hashlib.sha256(name_of(messages).encode()).digest()[:4], "big") / 2**32 < 0.05


def as_messages(side, role):
    """Text as the one message of a role, or a message list as it is, which must end with that role."""
    messages = messages_of(side, role)
    check_messages(messages)
    if messages[-1]["role"] != role:
        raise InputError(f"expected a last message of the {role}'s, found the {messages[-1]['role']}'s")
    return messages


def as_answer(side, prompt):
    """What the assistant said to a prompt, which a message list may begin with, as a message list."""
    messages = as_messages(side, "assistant")
    messages = messages[len(prompt) :] if messages[: len(prompt)] == prompt else messages
    if messages[0]["role"] != "assistant":
        raise InputError(f"an answer begins with the {messages[0]['role']}'s words, not the assistant's")
    return messages


def prompt_messages(record):
    """The message list of a record's `prompt`, which is text (a user's message) or a message list."""
    if "prompt" not in record:
        raise InputError("no `prompt`")
    messages = as_messages(record["prompt"], "user")
    if not messages[-1]["content"].strip():
        raise InputError("the prompt is empty")
    if not isinstance(record.get("meta", {}), dict):
        raise InputError("meta must be an object")
    return messages


def record_ranking(record):
    """(prompt, answers, ranks) of a preference: message lists, 1 for the best. A pair is a ranking of two."""
    if "prompt" not in record:
        raise InputError("no `prompt`")
    prompt = as_messages(record["prompt"], "user")
    if "chosen" in record and "rejected" in record:
        answers, ranks = [as_answer(record[side], prompt) for side in ("chosen", "rejected")], [1, 2]
        if not answers[0][-1]["content"].strip():
            raise InputError("the chosen answer is empty")
    elif "completions" in record and "ranks" in record:
        answers, ranks = record["completions"], record["ranks"]
        if not (isinstance(answers, list) and isinstance(ranks, list) and len(answers) == len(ranks) >= 2):
            raise InputError("`completions` and `ranks` must be lists of one length, 2 or more")
        if not all(type(rank) is int and rank >= 1 for rank in ranks):
            raise InputError(f"ranks are whole numbers from 1, the best; found {ranks!r:.40}")
        answers = [as_answer(answer, prompt) for answer in answers]
    else:
        raise InputError("neither `chosen` and `rejected` nor `completions` and `ranks`")
    return prompt, answers, ranks


# ---------------------------------------------------------------------------------------------------------
# The command line.


@dataclass(kw_only=True)
class TrainOptions:
    """Learn a byte-level BPE vocabulary from text: the merges of Hugging Face's trainer."""

    input: list[str] = option("files or folders of .txt, .jsonl and .jsonl.gz (field `text`)")
    vocab_size: int = option("tokens in all: special ones, 256 bytes, and the merges", 4096)
    min_frequency: int = option("how often a pair must be seen to be merged", 2, at_least=1)
    pattern: str = option("how text is cut: qwen2, llama3, gpt2, or a regular expression", "qwen2")
    nfc: bool = option("normalise text to NFC, here and in encoding", False)
    special_tokens: list[str] = option(f"names beside {', '.join(SPECIAL_TOKENS[:4])}", RESERVED)
    processes: int = option("processes that count words, where there is much text", 2, at_least=1)
    out: str = option("folder for tokenizer.json and tokenizer_config.json")
    overwrite: bool = option("replace a finished --out", False)


@dataclass(kw_only=True)
class EncodeOptions:
    """Turn a corpus of prepare.py into a folder of tokens: a file for each split, source and language."""

    tokenizer: str = option("folder that holds tokenizer.json")
    input: str = option("folder with train/, valid/ and test/, which hold {source}.jsonl")
    out: str = option("folder for the tokens and index.json")
    processes: int = option("processes that encode, where there is much text", 2, at_least=1)
    overwrite: bool = option("replace a finished --out", False)


@dataclass(kw_only=True)
class ShowOptions:
    """Print what a text is cut into: tokenizer.py show TEXT, each token with the merges that made it."""

    tokenizer: str = option("folder that holds tokenizer.json", "run/tokenizer")
    text: str = option("the text")


@dataclass(kw_only=True)
class StatsOptions:
    """Print how well a vocabulary fits text, by language and source."""

    tokenizer: str = option("folder that holds tokenizer.json", "run/tokenizer")
    input: list[str] = option("files or folders of .txt, .jsonl and .jsonl.gz (field `text`)")
    plot: str = option("an image file for Zipf's curve, and for compression by size of vocabulary", "")


def refuse_finished(path, overwrite):
    if path.exists() and not overwrite:
        raise InputError(f"{path.parent}: finished already; --overwrite replaces it")


def train(argv):
    options = parse_options(TrainOptions, argv, "tokenizer.py train")
    refuse_finished(Path(options.out) / "tokenizer.json", options.overwrite)
    special = SPECIAL_TOKENS[:4] + options.special_tokens
    if options.vocab_size < len(special) + 256:
        raise InputError(f"--vocab-size must be at least {len(special) + 256}, for bytes and special tokens")
    pattern = PATTERNS.get(options.pattern, options.pattern)
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError) as error:
        raise InputError(f"--pattern {pattern}: {error}") from None
    start, files, counts = time.perf_counter(), text_files(options.input), collections.Counter()
    batches = read_batches(tqdm(files, "counting words", unit="file", disable=None))
    texts = ([text for text, _, _ in documents] for _, documents in batches)
    work = functools.partial(count_words, pattern=pattern, nfc=options.nfc)
    for found in map_batches(work, texts, options.processes, files):
        counts.update(found)
    if not counts:
        raise InputError(f"{' '.join(options.input)}: the files hold no text")
    print(f"{counts.total():,} words, {len(counts):,} unique; merging", flush=True)
    most = FIRST_MERGE + options.vocab_size - 256 - len(special)  # as if after SPECIAL_TOKENS
    merges = train_merges(counts, most, options.min_frequency)
    tokenizer = Tokenizer.from_merges(merges, special, pattern, options.nfc)
    tokenizer.save(options.out)
    if tokenizer.vocab_size < options.vocab_size:
        print(f"the vocabulary ends early: no other pair is seen {options.min_frequency} times")
    note_seconds(options.out, "tokenizer", start)
    print(f"vocabulary of {tokenizer.vocab_size:,} in {options.out}, {time.perf_counter() - start:.1f} s")


def note_seconds(folder, stage, start):
    run = {"stage": stage, "seconds": time.perf_counter() - start, "finished": True}
    write_whole(Path(folder) / "run.json", (json.dumps(run) + "\n").encode())


@functools.cache
def load_once(folder, hash):
    return Tokenizer.load(folder)


def encode_documents(folder, hash, batch):
    """((split, source), [(ids (T,) from <|endoftext|> on, language, bytes of text), ...]) of a batch."""
    tokenizer, (path, documents) = load_once(folder, hash), batch
    end = [] if tokenizer.document_end is None else [tokenizer.document_end]
    ids = tokenizer.encode_batch([text for text, _, _ in documents])
    ids = [np.r_[tokenizer.endoftext, each, end].astype(token_type(tokenizer)) for each in ids]
    source = path.parent.name, path.name.split(".jsonl")[0]  # that of x.jsonl and x.jsonl.gz alike
    return source, [(each, lang, size) for each, (_, lang, size) in zip(ids, documents)]


def encode(argv):
    options = parse_options(EncodeOptions, argv, "tokenizer.py encode")
    start, out, tokenizer = time.perf_counter(), Path(options.out), Tokenizer.load(options.tokenizer)
    refuse_finished(out / "index.json", options.overwrite)
    if tokenizer.endoftext is None:
        raise InputError(f"{options.tokenizer}: it has neither {ENDOFTEXT} nor a bos_token for documents")
    paths = [path for split in SPLITS for path in sorted((Path(options.input) / split).glob("*.jsonl*"))]
    paths = [path for path in paths if path.name.endswith((".jsonl", ".jsonl.gz"))]
    if not paths:
        raise InputError(f"{options.input}: no .jsonl in {', '.join(SPLITS)}; give a folder of prepare.py")
    for old in [out / "index.json", *out.glob("*/*.*-00000.bin")]:  # what an earlier run left, nothing else
        old.unlink(missing_ok=True)
    work = functools.partial(encode_documents, options.tokenizer, tokenizer.hash)
    batches = read_batches(tqdm(paths, "encoding", unit="file", disable=None))
    encoded, shards = map_batches(work, batches, options.processes, paths), []
    for (split, source), group in itertools.groupby(encoded, lambda found: found[0]):
        shards += write_shards(split, source, (documents for _, documents in group), out)
    if not shards:
        raise InputError(f"{options.input}: no documents in it")
    index = {"tokenizer": tokenizer.hash, "vocab_size": tokenizer.vocab_size}
    index |= {"dtype": token_type(tokenizer).name, "endoftext": tokenizer.endoftext}
    index |= {"shards": shards, "finished": True}
    write_whole(out / "index.json", (json.dumps(index) + "\n").encode())
    note_seconds(out, "tokens", start)
    print_summary(shards)
    print(f"tokens in {out}, {time.perf_counter() - start:.1f} s")


def print_summary(shards):
    """Documents, tokens and bytes of text per token (<|endoftext|> not counted), by split and by language."""
    for key in ("split", "lang"):
        totals = collections.defaultdict(collections.Counter)
        for shard in shards:
            totals[shard[key]].update({name: shard[name] for name in ("documents", "tokens", "bytes")})
        for name, total in totals.items():
            per_token = total["bytes"] / max(1, total["tokens"] - total["documents"])
            columns = f"{total['documents']:>9,} documents {total['tokens']:>13,} tokens"
            print(f"  {name:8} {columns} {per_token:6.2f} bytes per token")


def readable(data):
    """Bytes as text, those that are not UTF-8 as \\xE4; spaces and line breaks can be seen."""
    text = data.decode("utf-8", "backslashreplace")
    return text.translate({32: "␣", 10: "⏎", 13: "␍", 9: "⇥"})


def show(argv):
    if argv and not {"--text", "--help", "-h"} & {*argv}:  # the text may stand by itself, first or last
        argv = ["--text", *argv] if not argv[0].startswith("--") else [*argv[:-1], "--text", argv[-1]]
    options = parse_options(ShowOptions, argv, "tokenizer.py show")
    tokenizer, colours = Tokenizer.load(options.tokenizer), sys.stdout.isatty()
    parts = {made: pair for pair, (_, made) in reversed(tokenizer.merge_of.items())}

    def tree(id):
        if id not in parts:
            return readable(tokenizer.bytes_of[id])
        return f"[{tree(parts[id][0])} {tree(parts[id][1])}]"

    ids = tokenizer.encode(options.text)
    for i, id in enumerate(ids):
        text = readable(tokenizer.bytes_of[id])
        print(f"\x1b[30;{(43, 46)[i % 2]}m{text}\x1b[0m" if colours else text, end="" if colours else "|")
    print(f"\n{len(ids)} tokens for {len(options.text.encode())} bytes")
    for id in ids:
        print(f"{id:>8}  {readable(tokenizer.bytes_of[id]):16}  {tree(id) if id in parts else ''}")


WORD = regex.compile(r"\p{Han}|(?:(?!\p{Han})[\p{L}\p{N}])+")  # for fertility a Chinese character is a word


def stats(argv):
    options = parse_options(StatsOptions, argv, "tokenizer.py stats")
    tokenizer, files = Tokenizer.load(options.tokenizer), text_files(options.input)
    used, words = np.zeros(tokenizer.vocab_size, np.int64), collections.Counter()
    totals = {by: collections.defaultdict(collections.Counter) for by in ("language", "source")}
    for path, documents in read_batches(tqdm(files, "encoding", unit="file", disable=None)):
        texts = [text for text, _, _ in documents]
        encoded = tokenizer.encode_batch(texts)
        used += np.bincount(np.concatenate(encoded), minlength=len(used))
        for ids, (text, lang, size) in zip(encoded, documents):
            found = {"documents": 1, "tokens": len(ids), "bytes": size, "words": len(WORD.findall(text))}
            totals["language"][lang].update(found)
            totals["source"][path.name.split(".")[0]].update(found)
        if options.plot:
            words.update(flatten(map(tokenizer.words, texts)))
    if not used.any():
        raise InputError(f"{' '.join(options.input)}: the files hold no text")
    print_stats(tokenizer, totals, used)
    if options.plot:
        plot_stats(tokenizer, words, used, options.plot)


def print_stats(tokenizer, totals, used):
    """The tables of `stats`; used (V,): how often each id came."""
    for by, table in totals.items():
        cheapest = max(total["bytes"] / max(1, total["tokens"]) for total in table.values())
        print(f"{by:20} documents       tokens  bytes a token  tokens a word  tokens a byte, to the least")
        for name, total in sorted(table.items()):
            per_token = total["bytes"] / max(1, total["tokens"])
            columns = f"{total['documents']:>9,} {total['tokens']:>12,} {per_token:>14.2f}"
            fertility = total["tokens"] / max(1, total["words"])
            print(f"{name:20} {columns} {fertility:>14.2f} {cheapest / max(per_token, 1e-9):>28.2f}")
    learned = [id for id in tokenizer.vocab.values() if id not in tokenizer.special_ids]
    share, longest = np.mean(used[learned] > 0), sorted(learned, key=lambda id: -len(tokenizer.bytes_of[id]))
    print(f"{share:.1%} of {len(learned):,} tokens are used; the longest of those:")
    shown = [id for id in longest if used[id]][:10]
    print("  " + "  ".join(readable(tokenizer.bytes_of[id]) for id in shown))


def plot_stats(tokenizer, words, used, path):
    """Zipf's curve, and bytes a token if only the first so many merges were there."""
    from matplotlib.figure import Figure  # only plots need it

    figure, sizes, compression = Figure((10, 4), layout="constrained"), [], []
    zipf, curve = figure.subplots(1, 2)
    zipf.loglog(range(1, np.count_nonzero(used) + 1), np.sort(used[used > 0])[::-1])
    zipf.set(xlabel="token, by frequency", ylabel="times it is used", title="Zipf's curve")
    words = {word: count for word, count in words.items() if isinstance(word, str)}
    starts, counts = [tokenizer.symbols(word) for word in words], np.array([*words.values()])
    size = sum(len(word.encode()) * count for word, count in words.items())
    for step in range(9):
        most = len(tokenizer.merges) >> step
        merges = {pair: merge for pair, merge in tokenizer.merge_of.items() if merge[0] < most}
        lengths = np.array([len(ids) for ids in merge_words(starts, merges, merge_table(merges))])
        sizes.append(tokenizer.vocab_size - len(tokenizer.merges) + most)
        compression.append(size / (lengths @ counts))
    curve.semilogx(sizes, compression, marker="o")
    curve.set(xlabel="vocabulary", ylabel="bytes a token", title="Compression")
    try:
        figure.savefig(path)
    except ValueError as error:
        raise InputError(f"--plot {path}: {error}") from None


@one_line_errors
def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    commands = {"train": train, "encode": encode, "show": show, "stats": stats}
    if argv[:1] in (["-h"], ["--help"]):
        names = [f"`tokenizer.py {name} --help`" for name in commands]
        return print(f"{__doc__}\n{', '.join(names)}: the options.")
    if not argv or argv[0] not in commands:
        raise InputError(f"say what to do: tokenizer.py {', '.join(commands)} (see --help)")
    return commands[argv[0]](argv[1:])


if __name__ == "__main__":
    from tokenizer import main as imported  # so that worker processes raise the same InputError

    sys.exit(imported())
