"""prepare.py: each step's promise, planted noise found, ordinary text kept, bad input told, same bytes."""

import gzip
import json
import os
import random
import zlib

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import prepare
from prepare import Document

WORDS = (
    "river lantern market harbour winter garden letter bridge copper morning village orchard sailor".split()
)
ORDINARY = {
    "en": "The lighthouse keeper wrote a letter every evening, and his sister answered it every spring.",
    "zh": "灯塔的看守人每天晚上都写一封信，他的妹妹每年春天回信一次。海边的村子里，人人都认识他们。",
}


def english(seed, words=60):
    """A text of its own for each seed: random words share hardly any run of five."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) + draw.choice(["", "s", "like", "less"]) for _ in range(words)) + "."


def chinese(seed, characters=120):
    draw = random.Random(seed)
    return "".join(chr(draw.randrange(0x4E00, 0x6000)) for _ in range(characters)) + "。"


def document(text, **fields):
    return Document(
        **{"text": text, "source": "s", "origin": "o", "kind": "", "bytes": len(text.encode())} | fields
    )


def cleaned(text, **fields):
    """(document after `clean`, why it is dropped or None)"""
    made = document(text, **fields)
    verdict = prepare.clean(made)
    return made, verdict and verdict[0]


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def run(*argv):
    return prepare.main([str(word) for word in argv])


def corpus(out):
    """{id: record} of the three splits."""
    return {
        r["id"]: r for split in prepare.SPLITS for path in (out / split).glob("*.jsonl") for r in read(path)
    }


# ---- Bytes and Unicode -------------------------------------------------------------------------------------


def test_decode():
    assert prepare.decode("naïve 你好".encode()) == ("naïve 你好", 0)
    assert prepare.decode("你好，世界，今天天气很好".encode("gb18030")) == ("你好，世界，今天天气很好", 0)
    assert prepare.decode(b"good \xff\xfe text") == ("good \ufffd\ufffd text", 2)
    assert prepare.decode("café is “closed”".encode("cp1252")) == ("café is “closed”", 0)
    assert prepare.decode("The end—“fin”".encode("utf-16"))[0].removeprefix("\ufeff") == "The end—“fin”"
    korean = "바다 옆 마을에는 오래된 등대가 있고 등대지기는 매일 밤 편지를 쓴다. " * 5
    assert prepare.decode(korean.encode("euc-kr"))[1] > 9  # all of it fits GB18030, and is no Chinese


@pytest.mark.parametrize(
    "text, read_as",
    [
        ("It’s a “café” — naïve, isn’t it?", "latin-1"),
        ("It’s naïve, isn’t it?", "cp1252"),
        ("Größe über alles", "cp1252"),
        ("灯塔的看守人每天晚上都写一封信。", "latin-1"),
        ("海边的村子里，人人都认识他们", "gb18030"),
    ],
)
def test_mojibake_without_loss_is_repaired(text, read_as):
    good, garbled = "A line that was read well: naïve, 你好.", text.encode().decode(read_as)
    assert prepare.repair_mojibake(f"{good}\n{garbled}\n{good}") == (f"{good}\n{text}\n{good}", 1, 0)


@pytest.mark.parametrize(
    "text",
    [
        "It’s a “café” — naïve, isn’t it? À la carte.",
        "床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。",
        "——————————",
        "CAFÉ”, ÜBER…",
        "為什麼呢？一枝斜倚。",
        "Ça va? «Où»",
        "Ω ≈ 3·10⁸ m/s² ±2 °C",
    ],
)
def test_good_text_is_no_mojibake(text):
    assert prepare.repair_mojibake(text) == (text, 0, 0)


def test_mojibake_with_loss_is_dropped():
    lost = "灯塔的看守人每天晚上都写一封信，他的妹妹回信。".encode().decode("gbk", "replace")
    assert cleaned(lost * 2)[1] == "mojibake"
    assert cleaned("The keeper wrote a le\ufffd\ufffdter every e\ufffdening.")[1] == "mojibake"
    assert cleaned("锟斤拷锟斤拷 the text is broken in this place 锟斤拷")[1] == "mojibake"
    kept, why = cleaned(english(1, 400) + " one lost \ufffd sign")
    assert why is None and "\ufffd" not in kept.text and kept.changes["lost_characters"] == 1


def test_normalise_examples():
    assert prepare.normalise("a\r\nb\rc\u2028d\x0be") == "a\nb\nc\nd\ne"
    assert prepare.normalise("\ufeffze\u200bro\xad width\u202e \x00") == "zero width"
    assert (
        prepare.normalise("ＡＢＣ１２３，你好！（完）") == "ABC123，你好！（完）"
    )  # Chinese punctuation stays
    assert prepare.normalise("e\u0301") == "é"
    assert prepare.normalise("　　段落\xa0二") == "  段落 二"
    assert prepare.normalise("👩\u200d👧 family") == "👩\u200d👧 family"
    assert prepare.normalise("a\n\n\n\n\n\nb  \n") == "a\n\n\nb"


ANY_TEXT = st.text(
    st.one_of(
        st.characters(), st.sampled_from(list("\u200d\u200c\u200b\u0301Ａ\u3000\r\n\t \ufeff\u2028<>&`;é你"))
    ),
    max_size=60,
)


@given(ANY_TEXT)
@settings(max_examples=150, deadline=None)
def test_normalise_is_idempotent(text):
    once = prepare.normalise(text)
    assert prepare.normalise(once) == once


PIECES = [
    "<p>",
    "</p>",
    "<script>",
    "</script>",
    "<!--",
    "-->",
    "&amp;",
    "&#0;",
    "```",
    "\n",
    "`",
    "<a href=",
    "\ud800",
    "锟斤拷",
    "Ã©",
    "浣犲ソ",
    "http://a.b/",
    "a@b.co",
    "13812345678",
    "buy now!",
    "the ",
    "你好，",
    "\ufffd",
    "1.2.3.4",
    "\u200d",
    "def f():",
]


@given(
    st.lists(st.sampled_from(PIECES) | ANY_TEXT, max_size=25).map("".join),
    st.sampled_from(["", "en", "zh", "code"]),
)
@settings(max_examples=150, deadline=None)
def test_cleaning_never_raises_and_yields_utf8(text, lang):
    record = json.dumps({"text": text, "lang": lang}).encode()
    made = prepare.clean_batch([("f.jsonl", 1, "f", "", record)], prepare.Options(input=[], out=""))[0]
    made.text.encode("utf-8")
    assert made.lang in (*prepare.LANGS, "other") and made.kind in prepare.KINDS
    assert made.verdict[0] or (made.signature is not None and made.key)


# ---- HTML and language -------------------------------------------------------------------------------------


def test_strip_html():
    page = (
        "<!DOCTYPE html><html><head><style>p {color: red}</style><SCRIPT>if (a < b) {}</SCRIPT></head><body>"
        "<h1>Title</h1><!-- a > b --><p>Fish &amp; chips,<br/>na&iuml;ve <b>bold</b></p></body></html>"
    )
    text, count = prepare.strip_html(page)
    assert text == "Title\n\nFish & chips,\nnaïve bold" and count == 18
    assert prepare.strip_html("<LINE>To be</LINE> <unk> Vec<T> a < b")[0] == "To be  <unk> Vec<T> a < b"
    for kept in (
        "Use `<b>` here.",
        "```html\n<p>code</p>\n```",
        "if a < b and c > d",
        "x &notanentity; y",
        "a <3 b",
    ):
        assert prepare.strip_html(kept) == (kept, 0)
    assert prepare.strip_html("the <script> element, unclosed")[0] == "the  element, unclosed"


def test_strip_html_is_linear():
    assert prepare.strip_html("<script>" * 20_000 + "<!--" * 20_000 + "<a " * 20_000)[1] == 40_000


def test_detect_language():
    assert prepare.detect_language(ORDINARY["en"]) == "en"
    assert prepare.detect_language(ORDINARY["zh"]) == "zh"
    assert prepare.detect_language("使用 PyTorch 的 DataLoader 读取数据，并调用 train 函数。") == "zh"
    assert prepare.detect_language("def f(x):\n    return x + 1\n\nprint(f(2))\n") == "code"
    assert prepare.detect_language("SELECT name FROM people\nWHERE age > 3;\nDROP TABLE people;") == "code"
    assert prepare.detect_language("参考：\n" + "[官方文档](https://example.com/docs/guide)\n" * 3) == "zh"
    for verse in (
        "Any person who\n(a) is a member of the board;\n(b) is the chief executive of the company;\n"
        "(c) holds an office under this part;\n(d) has been so appointed;\nshall give notice.",
        "Thou art more lovely and more temperate;\nRough winds do shake the darling buds of May,\n"
        "And summer's lease hath all too short a date;\nSometime too hot the eye of heaven shines,\n"
        "And often is his gold complexion dimm'd;\nBut thy eternal summer shall not fade,",
        "@anna thank you for the photos of the harbour\n@ben see you on Sunday then, bring the dog",
    ):
        assert prepare.detect_language(verse) == "en"
    dutch = "Het is een mooie dag en wij gaan naar het strand, want de zon schijnt en het water van de zee is warm."
    assert prepare.detect_language(dutch) == "other"
    assert (
        prepare.detect_language("Some words about a function.\n```python\nx = 1\ny = 2\nz = 3\n```\n") == "en"
    )
    assert prepare.detect_language("В криптографии шифр Цезаря является одним из простых шифров.") == "other"
    assert (
        prepare.detect_language("これはとても長い日本語の文章ですから、ひらがながたくさんあります。")
        == "other"
    )
    assert (
        prepare.detect_language(
            "L'algorithme est un des plus simples et il est facile de le comprendre; la plupart des "
            "gens le trouvent dans les livres de la bibliothèque."
        )
        == "other"
    )


def test_code_keeps_its_tags_and_indentation():
    code = "def page():\n    return '<p>' + text + '</p>'\n\n\nprint(page())"
    made, why = cleaned(code)
    assert why is None and made.text == code and made.lang == made.kind == "code"


# ---- Noise and key phrases ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reason, text",
    [
        ("too_short", "Hi there."),
        ("too_short", "你好。"),
        ("empty", " \u200b\n "),
        ("symbols", "*** --- *** ||| ### ~~~ *** ((( ))) *** ??? !!! abc"),
        ("links", "\n".join(f"[more](https://example.org/page/{i})" for i in range(9))),
        ("repetition", "Come and see our shop.\n" * 9),
        ("repetition", "very good " * 80),
        ("repetition", "哈" * 40),
        ("spam", "Limited time offer! Buy now and save 50% off! Click here to claim your free gift!"),
        ("spam", "恭喜您中奖！点击下方链接免费领取大奖，加微信 abc12345，名额有限，先到先得！"),
        ("hate", "Those immigrants are vermin. They should all be deported, they are nothing but scum."),
        ("hate", "外地人都是垃圾，全都应该滚出去！这种人不配活着。"),
        (
            "danger",
            "How to make a pipe bomb: pack the tube with black powder, insert a fuse, and nobody will know.",
        ),
        ("danger", "教你制作炸弹：先把硝酸铵和火药混合，再装入铁管，接上引信，神不知鬼不觉。"),
        ("language", "В криптографии шифр Цезаря является одним из самых простых и известных."),
    ],
)
def test_noise_is_dropped_for_its_reason(reason, text):
    assert cleaned(text)[1] == reason


@pytest.mark.parametrize(
    "text",
    [
        *ORDINARY.values(),
        "白日依山尽，黄河入海流。",
        "静夜思\n李白\n床前明月光，疑是地上霜。",
        "12 + 7 = 19. 19 - 4 = 15. So the answer is 15.",
        "The atomic bomb was built in the Manhattan Project. Bombs had killed many people before.",
        "Alfred Nobel invented dynamite, an explosive made by mixing nitroglycerin with an absorbent.",
        "烟花里有火药，所以小孩不要自己点燃烟花。消防员提醒大家注意安全，有问题就找警察。",
        "The baker gave us a discount, since it was our last day in town, and the cash was gone.",
        "I hate rainy days, and my brother is stupid enough to love them. We still walk to school together.",
        "她讨厌下雨天，弟弟却很喜欢。他们一起走路上学，路上捡垃圾，老师表扬了他们。",
        "The killer was caught by the police, who found the weapon and the stolen coins in his house.",
        "商店今天打折，奶奶买了三斤苹果，又免费得到一个袋子，她很高兴，给客服打电话道谢。",
        "I hate waiting in line. Most people don't think about how long it takes until they stand in one.",
        "系统运行缓慢时，应该清除垃圾文件，再重启电脑。这样可以释放磁盘空间，提高运行速度。",
        "夏天要注意卫生，垃圾要及时清理，蚊子和苍蝇必须消灭。恐龙在很久以前就全部灭绝了。",
        "Iran says it has no plans to build a nuclear weapon, but inspectors want to see more of its sites.",
        "The process can be used to make weapons, experts say. The state has signed no treaty.",
        "The thief entered the museum at night without being seen, police said, and took two paintings.",
        "They met in a «café» near the station and talked, and then in another «café» of the town.",
        "He fell. \"A" + "a" * 30 + "h!\" he cried. The neighbours came out of their houses and looked at him.",
        "请访问官网https://www.example.com/about查看我们的介绍和联系方式，谢谢大家的支持。",
    ],
)
def test_ordinary_text_stays(text):
    made, why = cleaned(text)
    assert why is None and made.text == text and not +made.changes


def test_an_article_may_quote_what_the_filter_looks_for():
    article = english(5, 250) + " One man said: those immigrants are vermin. " + english(6, 250)
    assert cleaned(article)[1] is None


# ---- Personal data -----------------------------------------------------------------------------------------


def chinese_id(body):
    return next(body + c for c in "0123456789X" if prepare.is_chinese_id(body + c))


@pytest.mark.parametrize(
    "name, text",
    [
        ("email", "anna.lee+news@mail.example.com"),
        ("phone", "13812345678"),
        ("phone", "+86 138-1234-5678"),
        ("phone", "(801) 596-1887"),
        ("phone", "+44 20 7946 0958"),
        ("phone", "+44 (0)20 7946 0958"),
        ("phone", "010-62176655"),
        ("card", "4111 1111 1111 1111"),
        ("card", "5500005555555559"),
        ("ip", "93.184.216.34"),
        ("id", chinese_id("11010519491231002")),
    ],
)
def test_personal_data_is_masked(name, text):
    for frame in ("Write to {} today.", "联系方式：{}，谢谢。", "{}"):
        masked, counts = prepare.mask_personal(frame.format(text), "en")
        assert masked == frame.format(f"[{name.upper()}]") and counts == {name: 1}


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112",
        "110105194912310021",
        "192.168.0.1",
        "127.0.0.1",
        "version 1.2.3.4",
        "version 2.10.0.1",
        "+1000000 points",
        "999.1.1.1",
        "ISBN 978-0-306-40615-7",
        "1939-1945",
        "the 20210512202540785.png",
        "3.14159265358979",
        "git@github.com:a/b",
        "2000 2000 2000 2000 2000",
        "in 1234567 cases",
        "1,234,567,890",
    ],
)
def test_other_numbers_stay(text):
    assert prepare.mask_personal(text, "en") == (text, {})


def test_the_check_character_of_an_identity_number():
    assert prepare.is_chinese_id("11010519491231002X") and not prepare.is_chinese_id("110105194912310021")


def test_numbers_in_code_stay_but_addresses_go():
    assert prepare.mask_personal("f(13812345678)  # bob@mail.org", "code")[0] == "f(13812345678)  # [EMAIL]"
    assert prepare.mask_personal("c = a@b.transpose()", "code")[0] == "c = a@b.transpose()"


@given(st.integers(10**12, 10**18 - 1))
@settings(max_examples=60, deadline=None)
def test_luhn_finds_every_wrong_digit(number):
    assume(len(set(str(number))) > 1)
    assert len([digit for digit in "0123456789" if prepare.is_card(f"{number}{digit}")]) == 1


# ---- Duplicates --------------------------------------------------------------------------------------------


def sets_with(similarity, size=2000, seed=0):
    """Two sets of `size` hashes whose Jaccard similarity is the given one."""
    values = np.random.default_rng(seed).choice(2**32, 2 * size, replace=False).astype(np.uint64)
    shared = round(2 * size * similarity / (1 + similarity))
    return np.sort(values[:size]), np.sort(
        np.concatenate([values[:shared], values[size : 2 * size - shared]])
    )


@pytest.mark.parametrize("similarity", [0.0, 0.3, 0.5, 0.8, 0.95, 1.0])
def test_minhash_estimates_jaccard(similarity):
    estimates = []
    for seed in range(8):
        a, b = sets_with(similarity, seed=seed)
        estimates.append(np.mean(prepare.minhash(a) == prepare.minhash(b)))
    deviation = np.sqrt(similarity * (1 - similarity) / prepare.HASHES / 8)
    assert abs(np.mean(estimates) - similarity) <= 4 * deviation + 1e-9


def test_minhash_of_a_long_set_is_that_of_its_parts():
    a, b = sets_with(0.0, size=3000)
    both = np.minimum(prepare.minhash(a), prepare.minhash(b))
    assert (prepare.minhash(np.union1d(a, b)) == both).all()


def test_shingles_are_runs_of_five():
    def made(text, lang):
        return set(prepare.shingles(prepare.tokens(text, lang), lang).tolist())

    assert made("One two three, four FIVE six!", "en") == {
        zlib.crc32(b"one two three four five"),
        zlib.crc32(b"two three four five six"),
    }
    assert made("一二三，四五六", "zh") == {
        zlib.crc32("一二三四五".encode()),
        zlib.crc32("二三四五六".encode()),
    }
    assert made("short text", "en") == {zlib.crc32(b"short text")}
    assert made("2 + 3 = 5", "en") != made("2 * 3 = 5", "en")
    assert made("x ≤ 3", "en") != made("x ≥ 3", "en")
    assert made("A b", "code") != made("a b", "code")


def marked(texts, threshold=0.8, lang="en"):
    """The reasons that `find_duplicates` gives for the texts, in order."""
    documents = [document(text, lang=lang, id=str(i)) for i, text in enumerate(texts)]
    for made in documents:
        pieces = prepare.tokens(made.text, lang)
        made.key = zlib.crc32(" ".join(pieces).encode())
        made.signature = prepare.minhash(prepare.shingles(pieces, lang))
    prepare.find_duplicates(
        documents, threshold, lambda d: prepare.shingles(prepare.tokens(d.text, lang), lang)
    )
    return [made.verdict[0] for made in documents]


def test_planted_duplicates_are_found():
    texts = [english(seed, 120) for seed in range(40)]
    near = [text.replace(text.split()[60], "changed", 1) for text in texts]
    exact = [text.upper().replace(" ", "\n") for text in texts]
    assert marked(texts + near + exact) == [""] * 40 + ["near_duplicate"] * 40 + ["exact_duplicate"] * 40
    texts = [chinese(seed) for seed in range(40)]
    assert (
        marked(texts + [t[:60] + "改" + t[61:] for t in texts], lang="zh")
        == [""] * 40 + ["near_duplicate"] * 40
    )


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_the_threshold_is_of_the_true_similarity(threshold):
    base = [f"w{i}" for i in range(400)]
    for cut in range(20, 220, 20):  # the first words stay, the rest is other: Jaccard is known exactly
        other = base[: 400 - cut] + [f"x{i}" for i in range(cut)]
        similarity = (396 - cut) / (396 + cut)
        assert marked([" ".join(base), " ".join(other)], threshold)[1] == (
            "near_duplicate" if similarity >= threshold else ""
        )


# ---- Mixing and splitting ----------------------------------------------------------------------------------


def pile(kind, count, size):
    return [
        document("", kind=kind, bytes=size, key=random.Random(f"{kind}{i}").getrandbits(128))
        for i in range(count)
    ]


def shares_after(documents, shares, seed=1):
    notices = prepare.mix(documents, shares, seed)
    kept = [made for made in documents if not made.verdict[0]]
    total = sum(made.bytes for made in kept)
    return (
        {kind: sum(made.bytes for made in kept if made.kind == kind) / total for kind in prepare.KINDS},
        kept,
        notices,
    )


def test_mix_reaches_the_shares_and_wastes_nothing():
    documents = pile("web", 900, 100) + pile("papers", 300, 100) + pile("code", 100, 100)
    shares, kept, notices = shares_after(documents, {"web": 75, "papers": 15, "code": 10})
    assert shares == pytest.approx({"web": 0.75, "papers": 0.15, "code": 0.1}, abs=0.01)
    assert sum(made.kind == "code" for made in kept) == 100 and not notices
    again = [Document("", "s", "o", d.kind, d.bytes, key=d.key) for d in reversed(documents)]
    assert {d.key for d in shares_after(again, {"web": 75, "papers": 15, "code": 10})[1]} == {
        d.key for d in kept
    }
    other = [Document("", "s", "o", d.kind, d.bytes, key=d.key) for d in documents]
    assert {d.key for d in shares_after(other, {"web": 75, "papers": 15, "code": 10}, seed=2)[1]} != {
        d.key for d in kept
    }


def test_mix_without_a_kind():
    shares, _, notices = shares_after(
        pile("web", 400, 50) + pile("code", 400, 50), {"web": 75, "papers": 15, "code": 10}
    )
    assert shares["web"] == pytest.approx(75 / 85, abs=0.01) and any(
        "no papers" in notice for notice in notices
    )
    _, kept, notices = shares_after(pile("web", 400, 50) + pile("papers", 1, 50), {"web": 75, "papers": 15})
    assert len(kept) < 10 and any("papers is scarce" in notice for notice in notices)


@given(st.lists(st.integers(0, 2**128 - 1), min_size=3, max_size=60, unique=True), st.randoms())
@settings(max_examples=60, deadline=None)
def test_split_does_not_depend_on_order(keys, draw):
    def splits(order):
        documents = [document("", key=key) for key in order]
        prepare.split(documents)
        return {made.key: made.split for made in documents}

    shuffled = keys[:]
    draw.shuffle(shuffled)
    assert splits(keys) == splits(shuffled) and set(splits(keys).values()) == set(prepare.SPLITS)


def test_split_is_90_5_5_and_stays_when_documents_come_or_go():
    documents = [document("", key=random.Random(i).getrandbits(128)) for i in range(4000)]
    prepare.split(documents)
    before = {made.key: made.split for made in documents}
    assert [sum(s == name for s in before.values()) / 4000 for name in prepare.SPLITS] == pytest.approx(
        [0.9, 0.05, 0.05], abs=0.02
    )
    prepare.split(documents[::2])
    assert all(before[made.key] == made.split for made in documents)


# ---- The whole run -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of raw text with one of everything, about 1.3 MB, so that two processes are really used."""
    folder = tmp_path_factory.mktemp("world")
    web = [{"text": english(i, 150), "source": "made up", "meta": {"n": i}} for i in range(900)]
    web += [{"text": chinese(i, 300)} for i in range(200)]
    web += [
        {"text": web[3]["text"]},
        {"text": web[4]["text"].replace("harbour", "port", 1)},
        {"text": "too short"},
        {"text": f"<p>{english(-1)}</p> anna@mail.example.com", "meta": {"label": 7}},
    ]
    write(folder / "raw" / "web" / "pages.jsonl", web)
    with gzip.open(folder / "raw" / "papers.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(
            json.dumps({"text": english(f"p{i}", 80), "kind": "papers", "lang": "en"}) + "\n"
            for i in range(60)
        )
    for name in ("b", "a"):
        (folder / "raw" / "books").mkdir(exist_ok=True)
        (folder / "raw" / "books" / f"{name}.txt").write_text(english(name, 90), "utf-8")
    write(
        folder / "raw" / "code" / "scripts.jsonl",
        [{"text": f"def f{i}(x):\n    return x * {i}\n\n\nprint(f{i}({i * 7}))"} for i in range(40)],
    )
    assert run("--input", folder / "raw", "--out", folder / "corpus", "--mix", "none") == 0
    return folder


def test_corpus_records(world):
    records, dropped = corpus(world / "corpus"), read(world / "corpus" / "dropped.jsonl")
    assert {r["source"] for r in records.values()} == {"pages", "papers", "books", "scripts"}
    assert all(
        list(r)
        in (
            ["id", "text", "source", "kind", "lang", "origin"],
            ["id", "text", "source", "kind", "lang", "origin", "meta"],
        )
        for r in records.values()
    )
    assert {(r["source"], r["kind"], r["lang"]) for r in records.values()} == {
        ("pages", "web", "en"),
        ("pages", "web", "zh"),
        ("papers", "papers", "en"),
        ("books", "web", "en"),
        ("scripts", "code", "code"),
    }
    assert records["pages-000000"]["origin"] == "made up" and records["pages-000000"]["meta"] == {"n": 0}
    assert records["pages-000000"]["text"] == english(0, 150) and records["books-000000"]["text"] == english(
        "a", 90
    )
    assert records["pages-001103"]["text"].endswith(" [EMAIL]") and records["pages-001103"]["meta"] == {
        "label": 7
    }
    assert [(d["id"], d["reason"]) for d in dropped if d["source"] == "pages"] == [
        ("pages-001100", "exact_duplicate"),
        ("pages-001101", "near_duplicate"),
        ("pages-001102", "too_short"),
    ]
    assert "of pages-000003" in dropped[0]["detail"] and dropped[0]["text"] == english(3, 150)[:200]


def test_report_adds_up(world):
    report = json.loads((world / "corpus" / "report.json").read_text("utf-8"))
    records, dropped = corpus(world / "corpus"), read(world / "corpus" / "dropped.jsonl")
    assert report["all"]["read"] == len(records) + len(dropped) == 1206 and report["all"]["kept"] == len(
        records
    )
    for title in ("kinds", "langs", "splits"):
        assert sum(group["documents"] for group in report[title].values()) == len(records)
        assert sum(group["bytes"] for group in report[title].values()) == sum(
            len(r["text"].encode()) for r in records.values()
        )
    assert report["changed"] == {"html": 1, "email": 1}
    assert json.loads((world / "corpus" / "run.json").read_text("utf-8"))["finished"] is True


def bytes_of(out):
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "run.json"
    }


def test_rerun_and_number_of_processes_give_the_same_bytes(world):
    for processes, name in ((1, "one"), (3, "three")):
        assert (
            run("--input", world / "raw", "--out", world / name, "--mix", "none", "--processes", processes)
            == 0
        )
        assert bytes_of(world / name) == bytes_of(world / "corpus")


def test_a_mix_is_reached_and_its_cost_is_told(world):
    shares = ["web=75", "papers=15", "code=10"]
    assert run("--input", world / "raw", "--out", world / "mixed", "--processes", 1, "--mix", *shares) == 0
    report = json.loads((world / "mixed" / "report.json").read_text("utf-8"))
    total = sum(group["bytes"] for group in report["kinds"].values())
    assert report["kinds"]["web"]["bytes"] / total == pytest.approx(0.75, abs=0.05)
    assert any("--mix none" in notice for notice in report["notices"]) and report["all"]["mix"] > 0


def test_finished_out_is_kept_and_foreign_folders_are_never_touched(world, capsys):
    before = bytes_of(world / "corpus")
    assert run("--input", world / "raw", "--out", world / "corpus") == 2
    assert "--overwrite" in capsys.readouterr().err and bytes_of(world / "corpus") == before
    (world / "mine").mkdir(exist_ok=True)
    (world / "mine" / "run.json").write_text("{}")
    assert run("--input", world / "raw", "--out", world / "mine", "--overwrite") == 2
    assert (world / "mine" / "run.json").exists() and "no corpus" in capsys.readouterr().err
    (world / "corpus" / "thesis.doc").write_text("mine")
    assert run("--input", world / "raw", "--out", world / "corpus", "--overwrite") == 2
    assert "thesis.doc" in capsys.readouterr().err
    (world / "corpus" / "thesis.doc").unlink()
    assert run("--input", world / "corpus" / "train", "--out", world / "corpus", "--overwrite") == 2
    assert "lies inside" in capsys.readouterr().err and bytes_of(world / "corpus") == before
    assert run("--input", world / "raw" / "books", "--out", world / "books", "--mix", "none") == 0
    assert (
        run("--input", world / "raw" / "books", "--out", world / "books", "--mix", "none", "--overwrite") == 0
    )


def test_an_interrupted_run_leaves_nothing_that_looks_finished(world, monkeypatch):
    out = world / "broken"
    monkeypatch.setattr(prepare, "write_corpus", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run("--input", world / "raw" / "books", "--out", out, "--mix", "none") == 130
    assert not out.exists()
    monkeypatch.undo()
    (world / "broken.partial").mkdir()  # what a kill leaves
    (world / "broken.partial" / "report.json").write_text("half")
    assert run("--input", world / "raw" / "books", "--out", out, "--mix", "none") == 0
    assert not (world / "broken.partial").exists() and len(corpus(out)) == 2


GOOD = json.dumps({"text": english(1)})


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "abc', "bad.jsonl:2: Unterminated"),
        ("[1, 2]", "bad.jsonl:2: expected a JSON object, found list"),
        ('{"text": 5}', "bad.jsonl:2: `text` must be a string, found int"),
        ('{"body": "x"}', "bad.jsonl:2: `text` must be a string"),
        ('{"text": "x", "score": NaN}', "bad.jsonl:2: NaN"),
        ("[" * 100_000, "bad.jsonl:2:"),
    ],
)
def test_malformed_line(tmp_path, capsys, line, message):
    (tmp_path / "bad.jsonl").write_text(f"{GOOD}\n{line}\n{json.dumps({'text': english(2)})}\n")
    assert run("--input", tmp_path / "bad.jsonl", "--out", tmp_path / "out", "--mix", "none") == 2
    error = capsys.readouterr().err
    assert (
        message in error
        and "--skip-bad" in error
        and error.count("\n") == 1
        and not (tmp_path / "out").exists()
    )
    assert (
        run("--input", tmp_path / "bad.jsonl", "--out", tmp_path / "out", "--mix", "none", "--skip-bad") == 0
    )
    assert "1 malformed" in capsys.readouterr().out
    assert [(d["id"], d["reason"]) for d in read(tmp_path / "out" / "dropped.jsonl")] == [
        ("bad-000001", "malformed")
    ]
    assert set(corpus(tmp_path / "out")) == {"bad-000000", "bad-000002"}


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--input", "nowhere", "--out", "o"], "nowhere: not found"),
        (["--input", "empty.jsonl", "--out", "o"], "no text in it"),
        (["--input", "folder", "--out", "o"], "no text in it"),
        (["--input", "picture.png", "--out", "o"], "unknown kind of file"),
        (["--input", "short.jsonl", "--out", "o"], "nothing is left after cleaning: 2 too_short"),
        (["--input", "good.jsonl", "--out", "o", "--mix", "web=x"], "--mix web=x"),
        (["--input", "good.jsonl", "--out", "o", "--mix", "web=1", "web=2"], "--mix web=2"),
        (["--input", "good.jsonl", "--out", "o", "--mix", "code=1"], "only web"),
        (["--input", "good.jsonl", "--out", "o", "--near-duplicate", "1.5"], "--near-duplicate"),
        (["--input", "good.jsonl", "--out", "o", "--procesess", "2"], "--procesess"),
        (["--out", "o"], "--input"),
        (["--input", "cut.jsonl.gz", "--out", "o"], "not a whole gzip file"),
        (["--input", "plain.jsonl.gz", "--out", "o"], "not a whole gzip"),
        (["--input", "folder", "--out", "folder/o"], "lies inside"),
    ],
)
def test_bad_input_is_told_in_one_line(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "picture.png").write_bytes(b"x")
    (tmp_path / "empty.jsonl").write_bytes(b"\n \n")
    write(tmp_path / "short.jsonl", [{"text": "a"}, {"text": "b"}])
    write(tmp_path / "good.jsonl", [{"text": english(1)}])
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress((GOOD + "\n").encode())[:-12])
    (tmp_path / "plain.jsonl.gz").write_bytes(GOOD.encode())
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("prepare.py: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.partial").exists()


def test_bad_bytes_are_counted(tmp_path, capsys):
    (tmp_path / "raw.txt").write_bytes(english(1, 400).encode() + b" caf\xe9\xff ends here")
    assert run("--input", tmp_path / "raw.txt", "--out", tmp_path / "out", "--mix", "none") == 0
    assert "bad_bytes in 1" in capsys.readouterr().out
    assert [r["source"] for r in corpus(tmp_path / "out").values()] == ["raw"]


def test_the_folder_we_are_in_can_be_the_input(tmp_path, monkeypatch):
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "a.txt").write_text(english(1), "utf-8")
    monkeypatch.chdir(tmp_path / "papers")
    assert run("--input", ".", "--out", tmp_path / "out", "--mix", "none") == 0
    assert [(r["source"], r["kind"]) for r in corpus(tmp_path / "out").values()] == [("papers", "papers")]


def test_edited_lists_that_are_broken_are_told_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "LISTS", tmp_path / "cleaning.toml")
    prepare.lists.cache_clear()
    (tmp_path / "cleaning.toml").write_text("[points]\nspam = 5\n")
    try:
        assert run("--input", tmp_path, "--out", tmp_path / "out") == 2
        assert "cleaning.toml" in capsys.readouterr().err
    finally:
        prepare.lists.cache_clear()


def test_a_mix_takes_no_book_that_is_far_too_large_and_says_what_it_missed(tmp_path, capsys):
    books = [{"text": english(i, 4000), "kind": "web"} for i in range(6)]
    scripts = [{"text": f"def f{i}():\n    return {i}\n\nprint(f{i}(), {i})", "kind": "code"} for i in range(30)]
    write(tmp_path / "all.jsonl", books + scripts)
    shares = ["web=75", "code=25"]
    assert run("--input", tmp_path / "all.jsonl", "--out", tmp_path / "out", "--mix", *shares) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert report["kinds"]["web"]["documents"] == 1
    assert "documents are large" in capsys.readouterr().out


def test_one_document_is_to_train_on_and_what_is_empty_is_told(tmp_path, capsys):
    for i in range(8):
        (tmp_path / "one.txt").write_text(english(i, 300))
        assert run("--input", tmp_path / "one.txt", "--out", tmp_path / "out", "--overwrite") == 0
        assert (tmp_path / "out" / "train" / "one.jsonl").exists()
    assert "notice: valid is empty" in capsys.readouterr().out


def test_text_is_found_behind_links_packed_and_in_capitals(tmp_path):
    raw = tmp_path / "raw"
    (raw / "deep").mkdir(parents=True)
    (raw / "deep" / "A.TXT").write_text(english(1))
    (raw / "deep" / "b.txt.gz").write_bytes(gzip.compress(english(2).encode()))
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere" / "c.jsonl", [{"text": english(3)}])
    (raw / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(raw)
    (raw / os.fsdecode("文章".encode("gbk") + b".txt")).write_text(english(4))
    (raw / "blank.txt").write_text("\n")
    (tmp_path / "out").symlink_to(tmp_path / "disk")  # a link that leads nowhere yet
    assert run("--input", raw, "--out", tmp_path / "out") == 0
    report = json.loads((tmp_path / "disk" / "report.json").read_text("utf-8"))
    assert report["all"] == {"read": 5, "kept": 4, "empty": 1}


@pytest.mark.parametrize("text", [
    "For all a<b we have f(a)>f(b), and 0<p while q>1.", "Both a<b and u<s hold, but t>k does not.",
])
def test_signs_of_inequality_are_no_tags(text):
    assert prepare.strip_html(text) == (text, 0)


def test_attributes_with_and_without_values_are_part_of_a_tag():
    page = '<p class="x">One <input disabled> two<br/> <script async>var x = 1 < 2</script><details open>three</details></p>'
    assert prepare.strip_html(page)[0].split() == ["One", "two", "three"]


@pytest.mark.parametrize("text", [
    "The café\u00a0was closed — it was sad.", "Nestlé® and Pokémon® — both are names.", "A café·bar, and “O Chalé”",
])
def test_accents_before_signs_are_no_mojibake(text):
    assert prepare.repair_mojibake(text)[1:] == (0, 0)


@pytest.mark.parametrize("code", [
    "out = x@self.weight + self.bias", "scores = q@k.transpose(-2, -1)", "systemctl start getty@tty1.service"])
def test_what_looks_like_an_address_in_code_stays(code):
    assert prepare.mask_personal(code, "code") == (code, {})


def test_timestamps_and_book_numbers_are_no_cards():
    text = "at 1700000000006 ms; ISBN 9780306406157"
    assert prepare.mask_personal(text, "en") == (text, {})


@pytest.mark.parametrize("line", [
    "x" * 30_000 + "=" * 30_000, json.dumps({f"k{i}": [i, "=<>{}"] for i in range(4000)}), "a-" * 40_000])
def test_a_long_line_does_not_hang_in_a_pattern(line):
    assert prepare.detect_language(line) == "en" and prepare.keyword_verdict(line, "en") is None


@pytest.mark.parametrize("text", [
    "Police said that a bomb exploded near the market on Tuesday evening. Three victims were taken to hospital "
    "and one of them died. Officers are looking for evidence, and the deadly device had been hidden in a bag, a "
    "spokesman told reporters. Nobody has said yet who wanted to kill, or why it happened in this quiet street.",
    "Add 5 ml of acetone to the flask, then a little hydrogen peroxide, and warm it while you stir until it is clear.",
    "取少量硝酸钾溶液倒入试管，慢慢加热，观察溶液颜色的变化，并把看到的记在本子上。",
])
def test_news_and_the_laboratory_are_no_danger(text):
    assert prepare.keyword_verdict(text, prepare.detect_language(text)) is None


def test_a_snippet_or_a_dialogue_among_english_is_no_code():
    play = "Anna: Well, I never thought,\nBen: Nor I,\nAnna: that the sun would rise,\nBen: so late in the year."
    verse = "He would\nraise taxes on the poor\nand import duties on all wine,\nraise the flag"
    assert [prepare.detect_language(text) for text in (play, verse)] == ["en", "en"]
