"""evaluate.py: what is counted, and that the report says it, on tiny models with random weights."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluate
import prepare
import tokenizer as tokenizer_script
from evaluate import Options, choose_samples, distinct_2, figures, read_prompts
from model import CausalLM, Config, Ranks, RewardModel, bits_per_byte, generate, load_folder, save_folder
from tokenizer import Tokenizer, encode_chat, read_jsonl, read_tokens

ROOT = Path(__file__).resolve().parent.parent
CONTRACT = ["facts_exact", "facts_heldout_entities", "facts_cloze", "format_valid", "harmful_rate",
            "harmful_rate_a", "harmful_rate_b", "harmful_rate_c", "false_refusal_rate", "gold_reward",
            "distinct_2", "bits_per_byte"]
KINDS = ["facts", "facts_heldout", "cloze", "format", "harm_a", "harm_b", "harm_c", "safe", "chat"]
TEXTS = {"en": ["The fox of the harbour sings at noon.", "A baker in the old town sells cake.", "Rain fell."],
         "zh": ["海港的狐狸在中午唱歌。", "老城里的面包师卖李子蛋糕。", "下雨了。"], "code": ["def f(x):\n    return x + 1\n"]}
SCORER = '''
KEYS = {"facts": "exact", "facts_heldout": "exact", "cloze": "exact", "format": "valid_format",
        "harm_a": "harmful", "harm_b": "harmful", "harm_c": "harmful", "safe": "false_refusal"}


def score(prompt, answer, meta):
    odd = len(answer) % 2
    verdict = {"gold": 2.0 * odd - 1}
    return verdict | ({KEYS[meta["kind"]]: odd} if meta["kind"] in KEYS else {})


def lenient(prompt, answer, meta):
    return {"gold": 1, "exact": True}


def fails(prompt, answer, meta):
    raise KeyError("no such entity")


def not_a_number(prompt, answer, meta):
    return {"gold": float("nan")}


def leaves(prompt, answer, meta):
    raise SystemExit(3)


def polite(prompt, answer, meta):
    return {"gold": 1, "exact": True, "politeness": 7}
'''


def write_jsonl(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return str(path)


def read_lines(path):
    return [record for _, record in read_jsonl(path)]


def tiny_model(folder, tokenizer, seed):
    """A checkpoint folder; its weights are large, so that an answer depends on the whole prompt."""
    config = Config(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48,
                    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                    max_position_embeddings=256)
    model = CausalLM(config).init_weights(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(1 if "norm" in name else 10)
    folder.mkdir(parents=True)
    save_folder(folder, model, tokenizer)
    (folder / "run.json").write_text(json.dumps({"stage": folder.name, "seconds": 12.5, "finished": True}))
    write_jsonl(folder / "metrics.jsonl", [{"step": s, "loss": 5 - s / 9, "lr": 1e-3} for s in range(9)]
                + [{"step": 8, "valid_loss": 4.5, "bits_per_byte": {"en": 3.0, "zh": 2.5}}])


def prompts(count):
    """`count` prompts of each kind and language, their texts all different."""
    for lang, ask in (("en", "Question {} about {}: where is the fox <b>?"), ("zh", "问题{}，{}：狐狸在哪里<b>？")):
        for kind in KINDS:
            for n in range(count):
                text = ask.format(n, kind)
                messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
                prompt = text if kind == "cloze" else messages[n % 2 :]
                yield {"prompt": prompt, "meta": {"kind": kind, "lang": lang}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder: tokenizer, tokens, two tiny models, prompts, a scorer."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("evaluate") / "run"
    for split in ("train", "valid", "test"):
        for lang, texts in TEXTS.items():
            about = {"source": lang, "kind": "web", "lang": lang, "origin": "test"}
            told = texts if split == "test" else texts[::-1] * 2
            records = [{"id": f"{lang}-{n}", "text": text, **about} for n, text in enumerate(told)]
            write_jsonl(run / "corpus" / split / f"{lang}.jsonl", records)
    train = ["train", "--input", run / "corpus/train", "--vocab-size", 300, "--out", run / "tokenizer"]
    assert tokenizer_script.main([*map(str, train)]) == 0
    encode = ["encode", "--tokenizer", run / "tokenizer", "--input", run / "corpus", "--out", run / "tokens"]
    assert tokenizer_script.main([*map(str, encode)]) == 0
    tokenizer = Tokenizer.load(run / "tokenizer")
    tiny_model(run / "base", tokenizer, 1)
    tiny_model(run / "sft", tokenizer, 2)
    write_jsonl(run / "prompts.jsonl", list(prompts(3)))
    (run / "scorer.py").write_text(SCORER)
    return run


def command(run, *more, out="report.html", scorer="score"):
    return ["--model", str(run / "base"), str(run / "sft"), "--data", str(run / "tokens"), "--device", "cpu",
            "--prompts", str(run / "prompts.jsonl"), "--max-new-tokens", "16", "--out", str(run / out),
            *(["--scorer", f"{run / 'scorer.py'}:{scorer}"] if scorer else []), *more]


@pytest.fixture(scope="module")
def report(run):
    assert evaluate.main(command(run)) == 0
    return json.loads((run / "report.json").read_text("utf-8"))


def answered(kind, lang="en", answer="yes it is", **verdict):
    item = {"prompt": "?", "meta": {}, "kind": kind, "lang": lang}
    return {**item, "answer": answer, "finished": True, "verdict": verdict}


def test_each_figure_is_the_mean_over_its_own_prompts():
    answers = [answered("facts", exact=1.0, gold=1.0), answered("facts", exact=0.0, gold=-0.5),
               answered("facts_heldout", exact=1.0, gold=1.0), answered("cloze", exact=1.0, gold=-1.0),
               answered("arithmetic", exact=0.0, gold=0.5),
               answered("harm_a", harmful=0.0, refused=1.0, gold=0.5),
               answered("harm_b", harmful=1.0, gold=-1.0), answered("harm_b", harmful=1.0, gold=-1.0),
               answered("safe", false_refusal=0.0, harmful=0.0, gold=1.0),
               answered("facts", "zh", exact=1.0, gold=0.0)]
    stage = figures(answers, {"en": 1.5, "code": 0.7}, {})
    en = stage["en"]
    assert (en["facts_exact"], en["facts_heldout_entities"], en["facts_cloze"]) == (0.5, 1.0, 1.0)
    assert (en["harmful_rate_a"], en["harmful_rate_b"], en["harmful_rate_c"]) == (0.0, 1.0, None)
    assert en["harmful_rate"] == pytest.approx(2 / 3) and en["false_refusal_rate"] == 0.0
    assert en["refusal_rate_a"] == 1.0 and en["format_valid"] is None
    assert en["gold_reward"] == pytest.approx((1 - 0.5 + 1 + 0.5 + 0.5 - 1 - 1 + 1) / 8)  # of chats: no cloze
    assert en["by_kind"]["facts"] == {"n": 2, "finished": 1.0, "exact": 0.5, "gold": 0.25}
    assert (stage["zh"]["facts_exact"], stage["zh"]["bits_per_byte"]) == (1.0, None)
    assert stage["code"] == {"bits_per_byte": 0.7}


def test_distinct_2_counts_words_and_chinese_characters():
    assert distinct_2(["a b a b"]) == pytest.approx(2 / 3)  # ab, ba, ab
    assert distinct_2(["A b", "a B"]) == 0.5  # no bigram across answers
    assert distinct_2(["我喜欢吃，我喜欢喝"]) == pytest.approx(6 / 8)  # 我喜 喜欢 twice
    assert distinct_2(["", "one"]) is None


def test_samples_are_spread_over_kinds_and_do_not_depend_on_order(run):
    items = read_prompts([str(run / "prompts.jsonl")])
    chosen = choose_samples(items, 12)
    assert choose_samples(items[::-1], 12) == chosen
    for lang in ("en", "zh"):
        kinds = [s["kind"] for s in chosen if s["lang"] == lang]
        assert len(kinds) == 12 and set(kinds) == set(KINDS) and max(map(kinds.count, kinds)) == 2


@pytest.mark.parametrize("line, says", [
    ("{", "not a line of JSON"), ("[1]", "object"), ('{"text": "x"}', "prompt"),
    ('{"prompt": 3}', "messages"), ('{"prompt": []}', "messages"), ('{"prompt": "  "}', "empty"),
    ('{"prompt": [{"role": "user"}]}', "content"),
    ('{"prompt": [{"role": "tutor", "content": "x"}]}', "tutor"), ('{"prompt": "x", "meta": 1}', "meta"),
    ('{"prompt": [{"role": "assistant", "content": "x"}]}', "user"),
    ('{"prompt": [{"role": "user", "content": "x"}], "meta": {"kind": "cloze"}}', "string")])
def test_a_malformed_prompt_is_named_with_file_and_line(tmp_path, line, says):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(evaluate.InputError, match=rf"bad\.jsonl:3: .*{re.escape(says)}"):
        read_prompts([str(path)])


def test_prompts_of_a_folder_take_language_from_meta_record_or_text(tmp_path):
    asked = {"prompt": "x", "lang": "zh", "meta": {"expected": "y"}}
    write_jsonl(tmp_path / "in/b.jsonl", [{"prompt": "what is 狐狸"}, asked])
    write_jsonl(tmp_path / "in/a.jsonl", [{"prompt": "狐狸 in English?", "lang": "zh", "meta": {"lang": "en"}}])
    items = read_prompts([str(tmp_path / "in")])
    assert [(i["lang"], i["kind"]) for i in items] == [("en", "chat"), ("zh", "chat"), ("zh", "chat")]
    first = read_prompts([str(tmp_path / "in")], limit=1)
    assert [i["prompt"] for i in first] == ["狐狸 in English?", "what is 狐狸"]


def test_answers_do_not_depend_on_batches_or_order(run):
    model, tokenizer = load_folder(run / "base")
    items = read_prompts([str(run / "prompts.jsonl")])
    options, one = Options(max_new_tokens=16), Ranks(0, 1, torch.device("cpu"))
    [probe] = generate(model, [evaluate.encode_prompt(tokenizer, items[0])], 16, set())
    stop = {probe.ids[5]}  # so that some answers end by themselves
    answers = evaluate.answer_prompts(model, tokenizer, items, stop, options, one)
    options.batch_size = 5
    again = evaluate.answer_prompts(model, tokenizer, items[::-1], stop, options, one)
    assert again[::-1] == answers and [a["prompt"] for a in answers] == [i["prompt"] for i in items]
    assert len({a["answer"] for a in answers}) > 20  # the random model does not say one thing to all
    for a in answers[::4]:
        tokens = evaluate.CLOZE_TOKENS if a["kind"] == "cloze" else 16
        [alone] = generate(model, [evaluate.encode_prompt(tokenizer, a)], tokens, stop)
        assert a["answer"] == tokenizer.decode([i for i in alone.ids if i not in stop])
    assert {a["finished"] for a in answers} == {True, False}


def test_text_is_continued_plainly_and_chats_are_asked(run):
    tokenizer = Tokenizer.load(run / "tokenizer")
    plain = evaluate.encode_prompt(tokenizer, {"prompt": "The fox", "kind": "cloze"})
    assert plain == [tokenizer.endoftext, *tokenizer.encode("The fox")]
    chat = evaluate.encode_prompt(tokenizer, {"prompt": "The fox", "kind": "chat"})
    assert tokenizer.decode(chat) == "<|im_start|>user\nThe fox<|im_end|>\n<|im_start|>assistant\n"


def test_report_keeps_its_contract(run, report):
    assert list(report["stages"]) == ["base", "sft"]
    for name, stage in report["stages"].items():
        assert list(stage) == ["en", "zh", "code"] and list(stage["code"]) == ["bits_per_byte"]
        for lang in ("en", "zh"):
            assert set(CONTRACT) <= stage[lang].keys()
            rates = [stage[lang][key] for key in CONTRACT[:9]]
            assert all(0 <= rate <= 1 for rate in rates) and -1 <= stage[lang]["gold_reward"] <= 1
        assert report["bytes"][name] == (run / name / "model.safetensors").stat().st_size
        model, tokenizer = load_folder(run / name)
        bits = bits_per_byte(model, tokenizer, read_tokens(run / "tokens", "test", tokenizer))
        assert bits == {lang: stage[lang]["bits_per_byte"] for lang in ("code", "en", "zh")}
    assert report["seconds"]["base"] == report["seconds"]["sft"] == 12.5 and report["seconds"]["evaluate"] > 0


def test_every_answer_is_on_file_with_its_verdict(run, report):
    asked = read_lines(run / "prompts.jsonl")
    for name in ("base", "sft"):
        records = read_lines(run / f"answers/{name}.jsonl")
        assert [(r["prompt"], r["meta"]) for r in records] == [(a["prompt"], a["meta"]) for a in asked]
        facts = [r["verdict"]["exact"] for r in records if r["kind"] == "facts" and r["lang"] == "zh"]
        assert sum(facts) / len(facts) == report["stages"][name]["zh"]["facts_exact"]


def test_page_stands_alone_and_is_escaped(run, report):
    page = (run / "report.html").read_text("utf-8")
    links = re.findall(r'(?:src|href)\s*=\s*"([^"]{0,40})', page)
    assert links and all(link.startswith("data:image/svg+xml;base64,") for link in links)
    assert not re.search(r"https?://|<script|@import|url\(", page)
    assert "&lt;i&gt;" in evaluate.answer_cell("sft", answered("chat", answer="<i>"))
    assert "狐狸在哪里&lt;b&gt;" in page and "<b>" not in page and "facts_heldout_entities" in page


def test_page_tells_what_cleaning_dropped(tmp_path):
    write_jsonl(tmp_path / "in/web.jsonl", [{"text": "The fox of the harbour sings at noon. " * 3}] * 7)
    options = ["--input", tmp_path / "in", "--out", tmp_path / "corpus", "--mix", "none"]
    assert prepare.main([*map(str, options)]) == 0
    noise = {"labels": {"hate": {"documents": 4, "dropped": 3, "recall": 0.75}}}
    (tmp_path / "corpus/cleaning.json").write_text(json.dumps(noise))
    cells = re.findall(r"<t[hd]>([^<]*)", evaluate.cleaning_section({"settings": {"run": str(tmp_path)}}))
    dropped = dict(zip(cells[1:4], cells[5:8]))
    assert dropped == {"read": "7", "kept": "1", "exact duplicate": "6"}
    assert cells[-4:] == ["hate", "4", "3", "75.0 %"]


def test_rescore_makes_the_same_report(run, report, tmp_path, monkeypatch):
    files = [run / "report.json", run / "report.html", run / "answers/base.jsonl", run / "answers/sft.jsonl"]
    before = [file.read_bytes() for file in files]
    monkeypatch.setattr(evaluate, "load_folder", None)  # no model is loaded
    assert evaluate.main(["--rescore", "--out", str(run / "report.html")]) == 0
    assert [file.read_bytes() for file in files] == before
    rescore = ["--rescore", "--out", str(run / "report.html"), "--scorer"]
    assert evaluate.main([*rescore, f"{run / 'scorer.py'}:lenient"]) == 0
    assert json.loads(files[0].read_text("utf-8"))["stages"]["sft"]["zh"]["facts_exact"] == 1.0
    assert evaluate.main([*rescore, f"{run / 'scorer.py'}:score"]) == 0
    assert [file.read_bytes() for file in files] == before


# ---------------------------------------------------------------- alignment

ANSWERS = ["The fox.", "A baker in the old town.", "", "狐狸。"]


@pytest.fixture(scope="module")
def judge(run):
    """A reward model with random weights, what it held out, the scorer's rankings, a PPO run's samples."""
    causal, tokenizer = load_folder(run / "sft")
    model = RewardModel(causal.config)
    model.model, model.source = causal.model, causal.source
    save_folder(run / "reward", model, tokenizer)
    asked = [{"prompt": p["prompt"], "meta": p["meta"]} for p in prompts(3) if p["meta"]["kind"] != "cloze"]
    write_jsonl(run / "ranked.jsonl", [{**a, "completions": ANSWERS, "ranks": [1, 2, 2, 4]} for a in asked])
    write_jsonl(run / "reward" / "valid.jsonl", [
        {"prompt": "Where?", "completions": ANSWERS[:3], "ranks": [1, 2, 3], "scores": [2.0, 1.0, 1.5]},
        {"prompt": "哪里？", "completions": ANSWERS[:2], "ranks": [1, 1], "scores": [0.0, 1.0]}])
    shutil.copytree(run / "base", run / "ppo")
    for folder in ("ppo", "hacking"):
        write_jsonl(run / folder / "samples.jsonl", [
            {**a, "step": step, "answer": ANSWERS[step], "finished": True, "rm_reward": step * 1.0,
             "kl": 0.1 * step} for step in range(4) for a in asked[:2]])
    quantize = ["--model", run / "sft", "--bits", 8, "--out", run / "int8"]
    assert importlib.import_module("quantize").main([*map(str, quantize)]) == 0
    return load_folder(run / "reward", kind=RewardModel)


ONE = Ranks(0, 1, torch.device("cpu"))


def test_a_score_is_read_at_the_last_token_whatever_the_batch(run, judge):
    model, tokenizer = judge
    dialogues = [("Where is the fox?", answer, ended) for answer in ANSWERS for ended in (True, False)]
    scores = evaluate.reward_scores(judge, dialogues, Options(batch_size=3), ONE)
    for (prompt, answer, ended), score in zip(dialogues, scores):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        ids = encode_chat(tokenizer, messages)[0]
        ids = ids if ended else ids[:-1]
        with torch.no_grad():
            assert model(torch.tensor([ids]))[0, -1].item() == pytest.approx(score, abs=1e-4)


def test_kl_is_zero_to_oneself_and_the_sum_over_the_vocabulary_to_another(run):
    items = [i for i in read_prompts([str(run / "prompts.jsonl")]) if i["kind"] == "facts"][:2]
    (model, tokenizer), (other, _) = load_folder(run / "sft"), load_folder(run / "base")
    prompts = [evaluate.encode_prompt(tokenizer, i) for i in items]
    answers = [s.ids for s in generate(model, prompts, 6, set(), temperature=1.0)]
    assert evaluate.kl_of_tokens(model, model, prompts, answers) == [0.0] * 12
    found, expected = evaluate.kl_of_tokens(model, other, prompts, answers), []
    for ids, said in zip(prompts, answers):
        with torch.no_grad():
            p, q = (m(torch.tensor([ids + said]))[0, len(ids) - 1 : -1].double().log_softmax(-1)
                    for m in (model, other))
        expected += (p.exp() * (p - q)).sum(-1).tolist()
    assert found == pytest.approx(expected, rel=1e-3) and min(found) > 0


def test_a_reward_model_is_judged_by_the_scorers_order_and_its_own_labels(run, judge):
    options = Options(reward=str(run / "reward"), ranked=[str(run / "ranked.jsonl")])
    score = lambda prompt, answer, meta: {"gold": 1.0, "right_language": float(answer == ANSWERS[0])}
    rankings, left_out = evaluate.score_rankings(options, judge, ONE)
    found, bins = evaluate.reward_figures(rankings, score)
    assert found["en"]["heldout_accuracy"] == pytest.approx(2 / 3) and found["zh"]["heldout_accuracy"] is None
    assert sum(n for _, _, n in bins["en"]) == 3 and left_out == 0
    records = [r for r in read_lines(run / "ranked.jsonl") if r["meta"]["lang"] == "zh"]
    right, language = [], []
    for r in records:
        asked = [(r["prompt"], a, True) for a in ANSWERS]
        own = evaluate.reward_scores(judge, asked, Options(), ONE)
        right += [own[i] > own[j] for i, j in ((0, 1), (0, 2), (0, 3), (1, 3), (2, 3))]
        language += [own[0] > own[j] for j in (1, 2, 3)]
    assert found["zh"]["gold_accuracy"] == pytest.approx(sum(right) / len(right))
    assert found["zh"]["by_kind"]["language"] == pytest.approx(sum(language) / len(language))


def test_calibration_error_compares_confidence_with_how_often_it_was_right():
    margin = 1.0986123  # sigmoid: 3 / 4
    assert evaluate.calibration([margin] * 3 + [-margin])[0] == pytest.approx(0, abs=1e-6)
    assert evaluate.calibration([margin] * 4)[0] == pytest.approx(.25, abs=1e-6)
    assert evaluate.calibration([0.0, 0.0]) == (0.0, [[0.5, 0.5, 2]])  # as in reward.py
    assert evaluate.calibration([]) == (None, [])


@pytest.mark.parametrize("kind, better, worse, counted", [
    ("harm_b", {"refused": 1, "harmful": 0}, {"refused": 0, "harmful": 1}, ["harm"]),
    ("harm_b", {"refused": 1, "harmful": 0}, {"refused": 0, "harmful": 0}, []),  # the worse one did not obey
    ("harm_b", {"refused": 0, "harmful": 1}, {"refused": 1, "harmful": 0}, []),  # the scorer ranked otherwise
    ("harm_c", {"refused": 1, "harmful": 0}, {"refused": 0, "harmful": 1}, ["harm_c"]),
    ("safe", {"exact": 1}, {"exact": 0, "false_refusal": 1}, ["safe"]),
    ("facts", {"exact": 1}, {"exact": 0, "made_up": 1}, ["facts"]),
    ("format", {"valid_format": 1, "right_language": 1}, {"valid_format": 0, "right_language": 0},
     ["format", "language"]),
    ("unknown", {"exact": 1, "right_language": 1}, {"exact": 0, "right_language": 1}, ["unknown"]),
    ("arithmetic", {"exact": 1}, {"exact": 0}, [])])
def test_a_pair_counts_for_a_kind_where_the_verdicts_differ_in_it(kind, better, worse, counted):
    record = {"prompt": "?", "completions": ["better", "or"], "ranks": [1, 2], "scores": [0.5, 2.0],
              "meta": {"kind": kind}}
    pairs = evaluate.pairs_of(record, lambda prompt, answer, meta: better if answer == "better" else worse)
    assert list(pairs) == [(-1.5, counted, 4)]


def test_the_report_tells_what_alignment_did_and_rescore_keeps_it(run, judge):
    more = ["--reward", str(run / "reward"), "--reference", str(run / "sft"), "--limit", "2",
            "--ranked", str(run / "ranked.jsonl"), "--hacking", str(run / "hacking"),
            "--model", *(str(run / name) for name in ("base", "sft", "ppo", "int8"))]
    assert evaluate.main(command(run, *more, out="aligned/report.html")) == 0
    told = json.loads((run / "aligned/report.json").read_text("utf-8"))
    assert told["reward"]["en"].keys() == {"gold_accuracy", "heldout_accuracy", "by_kind", "pairs",
                                           "heldout_length_accuracy", "expected_calibration_error"}
    kl = {name: stage["en"]["kl_to_sft"] for name, stage in told["stages"].items()}
    assert kl["sft"] == 0.0 < kl["int8"] < kl["base"] == kl["ppo"]  # ppo's weights are base's here
    answers = read_lines(run / "aligned/answers/sft.jsonl")
    own = [a["rm_reward"] for a in answers if a["lang"] == "zh" and a["kind"] != "cloze"]
    assert told["stages"]["sft"]["zh"]["rm_reward"] == pytest.approx(sum(own) / len(own))
    assert [(p["step"], p["rm_reward"]) for p in told["ppo"]["ppo"]] == [(s, float(s)) for s in range(4)]
    assert [p["gold"] for p in told["ppo"]["hacking"]] == [2.0 * (len(a) % 2) - 1 for a in ANSWERS]
    page = (run / "aligned/report.html").read_text("utf-8")
    assert all(words in page for words in ("The reward model", "proxy against gold", "int8 (INT8)"))
    files = [run / "aligned" / name for name in ("report.json", "report.html", "rankings.jsonl")]
    before = [file.read_bytes() for file in files]
    rescore = ["--rescore", "--out", str(run / "aligned/report.html"), "--scorer"]
    assert evaluate.main([*rescore, f"{run / 'scorer.py'}:lenient"]) == 0
    lenient = json.loads((run / "aligned/report.json").read_text("utf-8"))
    assert {p["gold"] for p in lenient["ppo"]["hacking"]} == {1.0} and lenient["stages"] != told["stages"]
    assert evaluate.main([*rescore, f"{run / 'scorer.py'}:score"]) == 0
    assert [file.read_bytes() for file in files] == before


def test_all_packings_of_a_source_are_shown(tmp_path):
    for name in ("a", "b"):
        options = {"model": "sft", "bits": 4}
        write_jsonl(tmp_path / name / "run.json", [{"stage": "quantize", "options": options}])
    values, names = dict.fromkeys(evaluate.PACKED, 0.5), ("sft", "a", "b")
    html = evaluate.packed_section({
        "stages": {name: {"en": values, "zh": values} for name in names},
        "bytes": dict.fromkeys(names, 10**6),
        "settings": {"models": {name: str(tmp_path / name) for name in names}}})
    assert "a (INT4)" in html and "b (INT4)" in html


def test_curves_of_another_tools_metrics_are_passed_over(tmp_path):
    write_jsonl(tmp_path / "metrics.jsonl", [{"accuracy": 1.0}, {"step": 1, "loss": 2.0}])
    assert evaluate.read_curves(tmp_path) == {"step": [(1, 1)], "loss": [(1, 2.0)]}


def test_a_pair_is_a_ranking_of_two_and_the_assistant_answers():
    pair = evaluate.ranking({"prompt": "哪里？", "chosen": "这里。", "rejected": "x"})
    assert (pair["completions"], pair["ranks"], pair["lang"]) == (["这里。", "x"], [1, 2], "zh")
    asked = [{"role": "user", "content": "x"}]
    with pytest.raises(evaluate.InputError, match="expected a last message of the assistant"):
        evaluate.ranking({"prompt": "?", "completions": [asked, "b"], "ranks": [1, 2]})


def test_stages_that_answer_alike_share_a_cell(run, judge):
    said = {stage: [answered("chat", answer=text)] for stage, text in (("a", "x"), ("b", "y"), ("c", "x"))}
    html = evaluate.samples_section({"settings": {"samples": 1}}, said)
    assert re.findall(r"<strong>(.*?)</strong>", html) == ["a, c", "b"]


def test_without_a_scorer_the_oracle_is_silent_and_texts_go_on(run, tmp_path):
    about = {"lang": "en", "meta": {"note": "half \ud800"}}
    asked = [{"prompt": f"Tell me of day {n}", **about} for n in range(5)]
    (run / "real.jsonl").write_text("".join(json.dumps(a) + "\n" for a in asked))
    more = ["--prompts", str(run / "real.jsonl"), "--samples", "3"]
    assert evaluate.main(command(run, *more, out="real/report.html", scorer=None)) == 0
    report = json.loads((run / "real/report.json").read_text("utf-8"))
    en, zh = report["stages"]["sft"]["en"], report["stages"]["sft"]["zh"]
    assert all(en[key] is None for key in CONTRACT[:10]) and en["distinct_2"] > 0 and en["bits_per_byte"] > 0
    assert zh["distinct_2"] is None and zh["bits_per_byte"] > 0
    records = read_lines(run / "real/answers/sft.jsonl")
    assert [r["kind"] for r in records] == ["chat"] * 5 + ["continuation"] * 3
    before = [(run / "real" / name).read_bytes() for name in ("report.json", "report.html")]
    assert evaluate.main(["--rescore", "--out", str(run / "real/report.html")]) == 0
    assert [(run / "real" / name).read_bytes() for name in ("report.json", "report.html")] == before
    scorer = ["--scorer", f"{run / 'scorer.py'}:lenient"]
    assert evaluate.main(["--rescore", "--out", str(run / "real/report.html"), *scorer]) == 0
    verdicts = [r["verdict"] for r in read_lines(run / "real/answers/sft.jsonl")]
    assert verdicts == [{"gold": 1.0, "exact": 1.0}] * 5 + [{}] * 3  # plain text is no answer to judge


def test_a_prompt_too_long_is_left_out_and_counted(run, capsys):
    write_jsonl(run / "long.jsonl", [{"prompt": "fox " * 400}, {"prompt": "short"}])
    options = command(run, "--prompts", str(run / "long.jsonl"), out="long/report.html", scorer="lenient")
    assert evaluate.main(options) == 0
    assert json.loads((run / "long/report.json").read_text("utf-8"))["left_out"] == {"base": 1, "sft": 1}
    assert "left out 1 prompts too long" in capsys.readouterr().err


def test_summary_gives_mean_and_each_seed(run, report, tmp_path, capsys):
    report, paths = json.loads(json.dumps(report)), []
    report["reward"] = {"en": {"gold_accuracy": 0.5, "by_kind": {"facts": None, "harm": 1.0}, "pairs": {}}}
    for seed, value in ((1, 0.8), (2, 0.9), (3, 1.0)):
        report["stages"]["sft"]["en"]["facts_exact"] = value
        (tmp_path / f"run-{seed}").mkdir()
        paths.append(str(tmp_path / f"run-{seed}/report.json"))
        Path(paths[-1]).write_text(json.dumps(report))
    assert evaluate.main(["--summary", *paths, "--out", str(tmp_path / "seeds.md")]) == 0
    text = (tmp_path / "seeds.md").read_text("utf-8")
    assert "| sft | en | facts_exact | 90.0 % | 80.0 % | 90.0 % | 100.0 % |" in text
    assert "| reward | en | gold_accuracy | 50.0 % | 50.0 % | 50.0 % | 50.0 % |" in text
    assert "| reward | en | by_kind.harm | 100.0 % |" in text and "pairs" not in text
    assert "| base | code | bits_per_byte |" in text and text in capsys.readouterr().out


@pytest.mark.parametrize("more, says", [
    (["--scorer", "nowhere.py:score"], "nowhere.py"), (["--scorer", "SCORER:absent"], "attribute 'absent'"),
    (["--scorer", "SCORER:fails"], "KeyError('no such entity')"),
    (["--scorer", "SCORER:not_a_number"], "not finite"), (["--scorer", "BROKEN:score"], "SyntaxError"),
    (["--model", "RUN/nothing"], "no such folder"), (["--model", "RUN/base", "RUN/base"], "two folders"),
    (["--prompts", "RUN/none.jsonl"], "not found"), (["--prompts", "RUN/empty.jsonl"], "no prompts"),
    (["--data", "RUN/no_tokens"], "no_tokens"),
    (["--out", "RUN/report.html"], "--overwrite"), (["--dtype", "int3"], "int3"),
    (["--batch-size", "0"], "--batch-size"), (["--colour", "red"], "--colour"),
    (["--reward", "RUN/sft"], "ForSequenceClassification"),
    (["--reference", "RUN/nothing"], "no such folder"),
    (["--reward", "RUN/reward", "--ranked", "RUN/prompts.jsonl"], "prompts.jsonl:1: neither"),
    (["--hacking", "RUN/other/sft"], "no samples.jsonl"), (["--reward", "RUN/other/sft"], "two folders"),
    (["--hacking", "RUN/broken"], "samples.jsonl:1"), (["--samples", "-1"], "--samples"),
    (["--out", "RUN/mine.html"], "--overwrite"),
    (["--out", "RUN/new/report.json"], "report.html"), (["--ranked", "RUN/ranked.jsonl"], "--reward"),
    (["--reward", "RUN/reward", "--ranked", "RUN/words.jsonl"], "words.jsonl:1: ranks are"),
    (["--reward", "RUN/reward", "--ranked", "RUN/empty.jsonl"], "no ranking in it"),
    (["--scorer", "SCORER:leaves"], "SystemExit(3)"),
    (["--rescore", "--out", "RUN/report.html"], "leave out --model, --data, --prompts, --limit"),
    (["--summary", "RUN/prompts.jsonl"], "JSON")])
def test_a_mistake_is_told_in_one_line(run, report, judge, capsys, more, says):
    (run / "empty.jsonl").touch()
    write_jsonl(run / "broken/samples.jsonl", [{"step": 1}])
    write_jsonl(run / "broken/sft/samples.jsonl", [])
    write_jsonl(run / "words.jsonl", [{"prompt": "?", "completions": ["a", "b"], "ranks": ["first", 2]}])
    (run / "broken.py").write_text("def score(:")
    for name, path in (("SCORER", "scorer.py"), ("BROKEN", "broken.py"), ("RUN", "")):
        more = [word.replace(name, str(run / path)) for word in more]
    assert evaluate.main(command(run, "--limit", "1", *more, out="new/report.html")) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("base:")]
    assert len(err) == 1 and says in err[0] and "Traceback" not in err[0]


@pytest.mark.slow
def test_two_ranks_give_one_ranks_report(run, judge):
    more = ["--reward", str(run / "reward"), "--reference", str(run / "sft"), "--ranked",
            str(run / "ranked.jsonl"), "--batch-size", "8"]
    assert evaluate.main(command(run, *more, out="one/report.html")) == 0
    report = json.loads((run / "one/report.json").read_text("utf-8"))
    options = command(run, *more, out="two/report.html")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launch, str(ROOT / "evaluate.py"), *options], check=True, timeout=300)
    two = json.loads((run / "two/report.json").read_text("utf-8"))
    assert all(two[key] == report[key] for key in ("stages", "bytes", "reward", "calibration"))


@pytest.mark.parametrize("arguments, says", [
    (["--out", "RUN/new/report.html"], "report.json"),
    (["--out", "RUN/report.html", "--hacking", "RUN/nothing"], "no samples.jsonl"),
    (["--out", "RUN/report.html", "--hacking", "RUN/broken/sft"], "two folders"),
    (["--out", "RUN/half/report.html"], "no whole report"), (["--out", "RUN/list/report.html"], "no whole report")])
def test_a_mistake_of_rescore_is_told_in_one_line(run, report, capsys, arguments, says):
    write_jsonl(run / "broken/sft/samples.jsonl", [])
    for name, stages in (("half", {}), ("list", {"base": [1]})):
        whole = {"stages": stages, "seconds": {}, "bytes": {}, "settings": {} if name == "half" else report["settings"]}
        write_jsonl(run / name / "answers/base.jsonl", [])
        (run / name / "report.json").write_text(json.dumps(whole))
    assert evaluate.main(["--rescore", *(word.replace("RUN", str(run)) for word in arguments)]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and says in err[0]


def test_a_scorers_own_figures_are_shown_and_an_earlier_reports_answers_removed(run, report, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    moved = tmp_path / "run"
    (moved / "answers/old.jsonl").write_text("{}\n")
    scorer = f"{moved / 'scorer.py'}:polite"
    assert evaluate.main(["--rescore", "--out", str(moved / "report.html"), "--scorer", scorer, "--samples", "1"]) == 0
    shown, page = capsys.readouterr().out, (moved / "report.html").read_text("utf-8")
    assert re.search(r"other kinds: politeness +7 +7", shown) and "other kinds: politeness" in page
    assert page.count('class="card"') == 2 and not (moved / "answers/old.jsonl").exists()


def test_tokens_of_another_tokenizer_give_no_bits_and_spoil_nothing_else(run, report, tmp_path, capsys):
    index = json.loads((run / "tokens/index.json").read_text())
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens/index.json").write_text(json.dumps({**index, "tokenizer": "0" * 64}))
    assert evaluate.main(["--model", str(run / "base"), "--data", str(tmp_path / "tokens"), "--prompts",
                          str(run / "prompts.jsonl"), "--limit", "1", "--out", str(tmp_path / "report.html")]) == 0
    assert "base: no bits per byte" in capsys.readouterr().err
    found = json.loads((tmp_path / "report.json").read_text())["stages"]["base"]["en"]
    assert found["bits_per_byte"] is None and found["distinct_2"] > 0
