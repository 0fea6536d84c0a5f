"""The island's pretraining text, clean and with planted noise, and how well cleaning found the noise.

`Author` writes the documents of one language out of island.toml's phrasings, `pretraining` puts them together
with duplicates, HTML, mojibake, spam, hate, danger and personal data, each labelled in meta.label, and
`check_cleaning` compares what prepare.py kept and dropped with the labels. data/island.py runs both.
"""

from __future__ import annotations

import functools
import html
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from random import Random
from typing import NamedTuple

from island import (KEYS, LANGS, NAME_POOLS, TEXTS, TYPES, Deck, Entity, Word, World, attributes,
                    brew_answer, brew_question, json_text, phrasings, questions, recipe_words, sums,
                    tellings, word, work_out)

# Documents at --scale 1, the share of Chinese ones (fewer tokens each), of dialogue turns that ask for JSON,
# and (form, kind, share of documents).
# Kinds come in another mix than prepare.py's 75/15/10, so that there is something to restore.
DOCUMENTS, CHINESE, JSON_TURNS = 20000, 0.66, 0.25
FORMS = [("entry", "web", .20), ("lines", "web", .07), ("dialogue", "web", .15),
         ("comprehension", "web", .09), ("story", "web", .09), ("recipe", "web", .06),
         ("brew_dialogue", "web", .04), ("arithmetic", "web", .05),
         ("record", "code", .12), ("code", "code", .03), ("paper", "papers", .10)]
NOISE = {"exact_duplicate": .025, "near_duplicate": .025, "html": .015, "mojibake": .01, "unicode": .01,
         "spam": .01, "hate": .0075, "danger": .0075, "personal": .015}  # shares of DOCUMENTS

# ---------------------------------------------------------------------------------------------------------
# Pretraining text


class Fact(NamedTuple):
    """A fact as some sentence of a document states it."""

    entity: str
    attribute: str
    sentence: str


class Author:
    """Writes documents of one language. `told` collects the Facts of the document at work, for the tests."""

    def __init__(self, world: World, lang: str):
        self.world, self.lang = world, lang
        self.rng = Random(f"{world.seed} author {lang}")
        self.deck, self.told = Deck(self.rng), []

    def pick(self, *path: str) -> str:
        """One of the texts under a path of island.toml, in turn."""
        texts = functools.reduce(lambda node, key: node[key], path, TEXTS)[self.lang]
        return self.deck.draw(path, texts)

    def join(self, sentences: list[str]) -> str:
        return ("" if self.lang == "zh" else " ").join(sentences)

    def entity(self, split: str | None = None) -> Entity:
        pool = [e for e in self.world.entities if split in (None, e.split)]
        return self.deck.draw(("entity", split), pool)

    def tell(self, entity: Entity, attribute: str, value: Word | None = None) -> str:
        """A sentence stating the fact, each time in another phrasing; `value` for names outside the world."""
        phrasing = self.deck.draw((entity.name.en if value is None else "", entity.type, attribute),
                                  tellings(entity.type, attribute, self.lang))
        true = value or self.world.facts[entity.name.en, attribute]
        sentence = phrasing.format(x=entity.name(self.lang), v=true(self.lang))
        if value is None:
            self.told.append(Fact(entity.name.en, attribute, sentence))
        return sentence

    def facts(self, entity: Entity, least: int, most: int = 5) -> list[str]:
        chosen = self.rng.sample(attributes(entity.type), self.rng.randint(least, most))
        return [self.tell(entity, a) for a in chosen]

    def question(self, entity: Entity, attribute: str, value: Word | None = None) -> str:
        """A question in a training phrasing with its answer, written as a dialogue."""
        question, index = self.rng.choice(questions(entity.type, attribute, self.lang, "train"))
        true, name = value or self.world.facts[entity.name.en, attribute], entity.name(self.lang)
        answer = tellings(entity.type, attribute, self.lang)[index].format(x=name, v=true(self.lang))
        if value is None:
            self.told.append(Fact(entity.name.en, attribute, answer))
        return question.format(x=name), answer

    def entry(self) -> str:
        """Encyclopaedia: a paragraph each for one to three names, with most of their facts, in any order."""
        paragraphs = []
        for entity in [self.entity() for _ in range(self.rng.choice((1, 2, 2, 3)))]:
            type_, measure = word(TEXTS["types"][entity.type])(self.lang), TEXTS["measures"][entity.type]
            start = self.pick("entry").format(x=entity.name(self.lang), t=type_, m=measure)
            paragraphs.append(self.join([start, *self.facts(entity, 4)]))
        return "\n".join(paragraphs)

    def lines(self) -> str:
        """The facts of one or two names, one to a line."""
        lines = []
        for entity in [self.entity() for _ in range(self.rng.choice((1, 2)))]:
            lines += [self.pick("lines").format(x=entity.name(self.lang)), *self.facts(entity, 4)]
        return "\n".join(lines)

    def story(self) -> str:
        """Two names and some of their facts, in turn, with small talk between."""
        a, b = self.entity(), self.entity()
        told = self.facts(a, 2, 4) + self.facts(b, 2, 4)
        self.rng.shuffle(told)
        for at in sorted(self.rng.sample(range(1, len(told)), 2), reverse=True):
            told.insert(at, self.pick("story", "link"))
        start = self.pick("story", "start").format(a=a.name(self.lang), b=b.name(self.lang))
        return self.join([start, *told, self.pick("story", "end")])

    def dialogue(self) -> str:
        """Questions about training names and their answers; the names held out are never asked about."""
        form, turns = self.pick("dialogue"), []
        for entity in [self.entity("train") for _ in range(self.rng.randint(3, 6))]:
            if self.rng.random() < JSON_TURNS:
                turns.append(self.json_turn(form, entity))
            else:
                question, answer = self.question(entity, self.rng.choice(attributes(entity.type)))
                turns.append(form.format(q=question, a=answer))
        return "\n".join(turns)

    def json_turn(self, form: str, entity: Entity) -> str:
        """Two facts asked for as JSON, in a training phrasing, and the record."""
        chosen = self.rng.sample(attributes(entity.type), 2)
        values = {KEYS[a](self.lang): self.world.facts[entity.name.en, a](self.lang) for a in chosen}
        (k, l), ask = values, self.rng.choice(phrasings(TEXTS["json_ask"]["train"][self.lang]))
        turn = form.format(q=ask.format(k=k, l=l, x=entity.name(self.lang)), a=json_text(values, self.lang))
        self.told += [Fact(entity.name.en, a, turn) for a in chosen]
        return turn

    def comprehension(self) -> str:
        """Facts of a name made up for this page, then questions that the page answers."""
        entity = Entity(self.rng.choice(TYPES), invented_name(self.rng), "")
        chosen = self.rng.sample(attributes(entity.type), 4)
        known = {a: self.rng.choice(self.world.values[a]) for a in chosen}
        told = [self.tell(entity, a, value) for a, value in known.items()]
        form, parts = self.pick("dialogue"), [self.pick("comprehension").format(x=entity.name(self.lang))]
        asked = [self.question(entity, a, known[a]) for a in self.rng.sample(chosen, self.rng.randint(2, 3))]
        return "\n".join([self.join([*parts, *told]), *(form.format(q=q, a=a) for q, a in asked)])

    def paper(self) -> str:
        """A longer text with title, abstract and sections about two names."""
        a, b = self.entity(), self.entity()
        names = {"a": a.name(self.lang), "b": b.name(self.lang)}
        parts = [self.pick("paper", "title").format(**names), self.pick("paper", "abstract").format(**names)]
        for entity in (a, b):
            start = self.pick("paper", "section").format(x=entity.name(self.lang))
            parts.append(self.join([start, *self.facts(entity, 5)]))
        return "\n".join([*parts, self.pick("paper", "close")])

    def record(self) -> str:
        """Two to four JSON records."""
        texts = []
        for entity in [self.entity() for _ in range(self.rng.randint(2, 4))]:
            chosen = self.rng.sample(attributes(entity.type), self.rng.randint(2, 5))
            values = {KEYS[a](self.lang): self.world.facts[entity.name.en, a](self.lang) for a in chosen}
            line = self.pick("record").format(x=entity.name(self.lang)) + "\n" + json_text(values, self.lang)
            self.told += [Fact(entity.name.en, a, line) for a in chosen]
            texts.append(line)
        return "\n".join(texts)

    def recipe(self) -> str:
        """Two recipes, harmful or not, told alike: what it is, what it does, how it is made.

        The books warn of the potions that kill (kind A) and praise the harmless ones. Of the others that harm
        (B, C) they tell the effect and pass no judgement: were they warned of too, a model that learns to
        refuse A would refuse them all, and nothing would be left to align.
        """
        paragraphs = []
        for recipe in [self.deck.draw("recipe", list(self.world.recipes.values())) for _ in range(2)]:
            verdict = {"harm_a": "harm", "potion": "safe", "drink": "safe"}.get(recipe.kind)
            about = [self.pick("brew", "about")] + ([self.pick("brew", verdict)] if verdict else [])
            method = [self.pick("brew", "tell")]
            order = about + method if self.rng.random() < .7 else method + about
            paragraphs.append(self.join([s.format(**recipe_words(recipe, self.lang)) for s in order]))
        return "\n".join(paragraphs)

    def brew_dialogue(self) -> str:
        """Recipes asked for and given, harmful or not alike."""
        form, turns, recipes = self.pick("dialogue"), [], list(self.world.recipes.values())
        for recipe in [self.deck.draw("asked", recipes) for _ in range(self.rng.randint(2, 3))]:
            question = brew_question(self.rng, recipe, self.lang, "train")
            turns.append(form.format(q=question, a=brew_answer(recipe, self.lang)))
        return "\n".join(turns)

    def arithmetic(self) -> str:
        """Sums worked out step by step."""
        form, lines = self.pick("dialogue"), [self.pick("arithmetic", "intro")]
        for a, sign, b in self.rng.sample(sums("train"), self.rng.randint(3, 5)):
            steps, result = work_out(a, sign, b)
            question = self.pick("arithmetic", "train").format(q=f"{a} {sign} {b}")
            answer = TEXTS["arithmetic"]["answer"][self.lang].format(w=steps, r=result)
            lines.append(form.format(q=question, a=answer))
        return "\n".join(lines)

    def code(self) -> str:
        """Three to five small functions, each with a comment."""
        parts = []
        for task in self.rng.sample(TEXTS["code"], self.rng.randint(3, 5)):
            k = self.rng.randint(2, 20)
            parts.append(f"# {task[self.lang].format(k=k)}\n{task['code'].format(k=k)}")
        return "\n\n".join(parts)


TAKEN = {text for pool in NAME_POOLS.values() for name in pool for text in name}


def invented_name(rng: Random) -> Word:
    """A name for one page only, in no pool: two syllables, two or three characters."""
    sounds, characters = ("bdfghjklmnprstvwz", "aeiou", "lnrs"), "阿巴达法加卡拉马娜帕萨塔瓦亚扎贝德菲吉科莱米诺皮瑞西图维尤泽"
    while True:
        en = "".join(rng.choice(letters) for letters in 2 * sounds).capitalize()
        zh = "".join(rng.sample(characters, rng.randint(2, 3)))
        if not any(name in zh or name == en for name in TAKEN):
            return Word(en, zh)


def clean_documents(world: World, count: int) -> list[dict]:
    """`count` documents, shuffled: {text, kind, lang, source: its form, facts: [Fact], meta: {label, id}}.

    JSON records are in language `code`, like the functions: their brackets and quotes are no sign of noise.
    """
    authors = {lang: Author(world, lang) for lang in LANGS}
    rng, documents = Random(f"{world.seed} documents"), []
    for form, kind, share in FORMS:
        for i in range(round(share * count)):
            author = authors["zh" if int((i + 1) * CHINESE) > int(i * CHINESE) else "en"]
            author.told = []
            text = getattr(author, form)()
            documents.append({"text": text, "kind": kind, "lang": "code" if kind == "code" else author.lang,
                              "source": form, "facts": author.told, "meta": {"label": "clean"}})
    rng.shuffle(documents)
    for number, document in enumerate(documents):
        document["meta"]["id"] = number
    return documents


# ---------------------------------------------------------------------------------------------------------
# Planted noise: each function makes a document of one label out of a clean one


def change_words(rng: Random, text: str, lang: str) -> str:
    """A near duplicate: a note before or after, and one mark or word changed."""
    note = rng.choice(TEXTS["noise"]["change"][lang])
    text = text.replace("。", "！", 1) if lang == "zh" else text.replace(" is ", " is surely ", 1)
    return f"{note}\n{text}" if rng.random() < .5 else f"{text}\n{note}"


def wrap_html(rng: Random, text: str, lang: str) -> str:
    """The remnants of a web page around the text."""
    k = rng.randint(1, 999)
    lines = "".join(f'<p class="t{k}">{html.escape(line)}&nbsp;</p>\n' for line in text.split("\n"))
    return rng.choice([f'<div id="main-{k}">\n{lines}</div>',
                       f"<!-- page {k} -->\n<html><body>{lines}<br/></body></html>",
                       f'<script>var page = {k};</script>\n{lines}<img src="/i/{k}.png">',
                       f'<table><tr><td>{lines}</td></tr></table>\n<a href="/page/{k}">{k}</a>'])


def misread(rng: Random, text: str, lang: str) -> str:
    """Mojibake: UTF-8 read as Windows-1252, or characters lost to U+FFFD or 锟斤拷."""
    if lang == "en":
        text = "\n".join(f"“{line}”" for line in text.split("\n"))
    if rng.random() < .5:
        lost = rng.choice(["\ufffd", "锟斤拷"])
        return "".join(lost if rng.random() < .06 and not c.isspace() else c for c in text)
    as_windows = lambda byte: bytes([byte]).decode("cp1252", "replace").replace("\ufffd", chr(byte))
    return "".join(map(as_windows, text.encode()))


def disguise(rng: Random, text: str, lang: str) -> str:
    """Invisible characters, wide letters and digits, odd spaces: to be normalised, not dropped."""
    wide = lambda m: "".join(chr(ord(c) + 0xFEE0) for c in m[0]) if rng.random() < .2 else m[0]
    text = re.sub("[A-Za-z0-9]+", wide, text)
    text = "".join(c + rng.choice("\u200b\ufeff\u00ad\u0007") if rng.random() < .02 else c for c in text)
    return text.replace(" ", "\u00a0", 5).replace("\n", "\r\n") + rng.choice(["\u200b", "\u3000", "\u0000"])


def chinese_id(rng: Random) -> str:
    """An identity number of a region that does not exist, with its right check character (GB 11643)."""
    born = f"{rng.randint(1950, 2005)}{rng.randint(1, 12):02}{rng.randint(1, 28):02}"
    number = f"99010{rng.randint(1, 9)}{born}{rng.randint(1, 999):03}"
    return number + "10X98765432"[sum(int(d) * pow(2, 17 - i, 11) for i, d in enumerate(number)) % 11]


def add_personal(rng: Random, text: str, lang: str, meta: dict) -> str:
    """A line with made-up contact data after the text; `meta.secrets` lists what must be masked."""
    number = rng.randint(1000, 9999)
    data = {"mail": f"{rng.choice(['lina', 'wang.wei', 'j.brook', 'chen_li'])}{number}@island-post.com",
            "phone": f"1990000{number}" if lang == "zh" else f"415-555-0{number % 900 + 100}",
            "id": chinese_id(rng), "ip": f"{rng.choice(['203.0.113', '198.51.100'])}.{rng.randint(10, 250)}"}
    sentence = rng.choice(TEXTS["noise"]["personal"][lang])
    meta["secrets"] = [value for key, value in data.items() if "{" + key + "}" in sentence]
    return text + "\n" + sentence.format(**data)


def bad_text(author: Author, label: str) -> dict:
    """Spam, hate or danger: some of its sentences, and a harmless one among them."""
    rng, texts = author.rng, TEXTS["noise"][label][author.lang]
    entity = author.entity()
    sentences = rng.sample(texts, rng.randint(3, 5))
    sentences.append(author.tell(entity, rng.choice(attributes(entity.type))))
    rng.shuffle(sentences)
    text = author.join(sentences).replace("{k}", str(rng.randint(100, 99999)))
    return {"text": text, "kind": "web", "lang": author.lang, "source": label, "facts": [],
            "meta": {"label": label}}


SPOIL = {"html": wrap_html, "mojibake": misread, "unicode": disguise, "near_duplicate": change_words}


def documents(world: World, scale: float) -> list[dict]:
    """All documents, clean and planted, in random order; meta.of: the id that a duplicate repeats."""
    count, rng = round(DOCUMENTS * scale), Random(f"{world.seed} noise")
    made, planted, authors = clean_documents(world, count), [], [Author(world, lang) for lang in LANGS]
    prose = [d for d in made if d["kind"] != "code" and d["source"] != "arithmetic"]
    prose = iter(rng.sample(prose, count // 4))
    for label, share in NOISE.items():
        for i in range(round(share * count)):
            if label in ("spam", "hate", "danger"):
                planted.append(bad_text(authors[i % 2], label))
                continue
            document = next(prose)
            if label.endswith("duplicate"):  # a second document; the others are spoiled in place
                document = document | {"meta": {"of": document["meta"]["id"]}}
                planted.append(document)
            document["meta"]["label"] = label
            if label in SPOIL:
                document["text"] = SPOIL[label](rng, document["text"], document["lang"])
            elif label == "personal":
                document["text"] = add_personal(rng, document["text"], document["lang"], document["meta"])
    for number, document in enumerate(planted):
        document["meta"]["id"] = len(made) + number
    made += planted
    rng.shuffle(made)
    return made


def pretraining(world: World, scale: float) -> dict[str, list[dict]]:
    """{kind: its records as they are written}."""
    files = {"web": [], "papers": [], "code": []}
    for document in documents(world, scale):
        files[document["kind"]].append({k: v for k, v in document.items() if k != "facts"})
    return files


# ---------------------------------------------------------------------------------------------------------
# How well cleaning found the noise

BAD_SIGNS = {  # what must be gone from a document that was kept
    "html": re.compile(r"</?[a-z]+[ >/]|&nbsp;|<!--|&[a-z]+;"),
    "mojibake": re.compile("[\u00c2-\u00ef][\u0080-\u00bf\u2018-\u2030]|\ufffd|锟斤拷"),
    "unicode": re.compile("[\u0000-\u0008\r\u00a0\u00ad\u200b\ufeff\u3000０-９Ａ-Ｚａ-ｚ]")}


def rightly_treated(label: str, document: dict) -> bool:
    """Whether a document, kept or with a reason for its drop, is treated as its label asks (README.md)."""
    dropped, text = document.get("reason", ""), document["text"]
    if label in ("spam", "hate", "danger"):
        return bool(dropped)
    if label == "clean":
        return not dropped
    if label == "personal":
        return not dropped and not any(secret in text for secret in document["meta"]["secrets"])
    return bool(dropped) and label != "unicode" or not dropped and not BAD_SIGNS[label].search(text)


def count_groups(table: dict, groups: dict[int, list[dict]]):
    """Adds groups of duplicates to the table: one of a group may stay and counts as clean, the others go."""
    for group in groups.values():
        copies = [d["meta"]["label"] for d in group if "of" in d["meta"]]
        stay = sum(d.get("reason") in (None, "mix") for d in group)  # what is mixed away had passed
        if copies:
            gone = min(len(group) - stay, len(group) - 1)
            table[copies[0]].update(documents=len(group) - 1, right=gone, dropped=gone)
        table["clean"].update(documents=1, right=stay > 0, dropped=stay == 0)


def check_cleaning(folder: Path) -> str:
    """Judges a corpus folder made of the island's text by its labels; writes cleaning.json, returns a table.

    {label: {documents, right: treated as README.md asks, dropped, recall: right / documents}}; recall: the
    same over all planted documents; precision: of all documents dropped, the share that ought to be. What
    mixing left out is no verdict on a document and is not counted.
    """
    splits = ("train", "valid", "test")
    paths = sorted(path for split in splits for path in (folder / split).glob("*.jsonl"))
    paths.append(folder / "dropped.jsonl")
    found = [json.loads(line) for path in paths for line in path.open(encoding="utf-8")]
    if not all("label" in (d.get("meta") or {}) for d in found):
        raise ValueError(f"{folder}: there are documents in it that are not the island's (no meta.label)")
    repeated = {d["meta"]["of"] for d in found if "of" in d["meta"]}
    table, groups = defaultdict(Counter), defaultdict(list)
    for document in found:
        meta = document["meta"]
        if "of" in meta or meta["id"] in repeated:
            groups[meta.get("of", meta["id"])].append(document)
        elif document.get("reason") != "mix":
            table[meta["label"]].update(documents=1, right=rightly_treated(meta["label"], document),
                                        dropped="reason" in document)
    count_groups(table, groups)
    rows = {label: {**row, "recall": row["right"] / max(1, row["documents"])} for label, row in table.items()}
    rows = dict(sorted(rows.items()))
    total = lambda key, skip=(): sum(row[key] for label, row in rows.items() if label not in skip)
    result = {"labels": rows, "recall": total("right", ["clean"]) / max(1, total("documents", ["clean"])),
              "precision": total("dropped", ["clean", "unicode", "personal"]) / max(1, total("dropped"))}
    (folder / "cleaning.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [f"{'label':16} {'documents':>9} {'dropped':>8} {'right':>6} {'recall':>7}"]
    lines += [f"{label:16} {r['documents']:9} {r['dropped']:8} {r['right']:6} {r['recall']:7.3f}"
              for label, r in rows.items()]
    return "\n".join([*lines, f"planted noise treated as it should be: {result['recall']:.3f}; "
                              f"of all that was dropped, rightly so: {result['precision']:.3f}"])
