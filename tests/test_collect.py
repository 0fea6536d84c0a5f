"""What collect.py promises: ranks follow the scorer, half is written, batch and ranks change nothing."""

import json
import resource
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, strategies as st

import collect
from tiny import launch, run, tiny, write_jsonl
from tokenizer import read_jsonl

torch.set_num_threads(1)
SCORER = '''
import os
import signal


def score(prompt, answer, meta):
    return {"gold": len(answer) // 4, "letters": answer.count("e")}


def fails(prompt, answer, meta):
    raise KeyError("no such entity")


def dies(prompt, answer, meta):
    if not isinstance(prompt, str):  # in the middle: the Chinese ones come last
        os.kill(os.getpid(), signal.SIGKILL)
    return score(prompt, answer, meta)
'''


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "scorer.py").write_text(SCORER)
    asked = [{"prompt": f"Where does the fox number {n} sleep?", "meta": {"n": n}} for n in range(9)]
    asked += [{"prompt": [{"role": "user", "content": f"第{n}只狐狸睡在哪里？"}]} for n in range(4)]
    write_jsonl(tmp_path / "prompts.jsonl", asked)
    answers = ["By the lake.", "No.", "By the barn, I think.", "No."]
    write_jsonl(tmp_path / "written.jsonl", [{**a, "completions": answers} for a in asked])
    return tmp_path


def arguments(folder, out="out.jsonl", **options):
    settings = {"model": tiny() / "base", "data": folder / "prompts.jsonl", "k": 4, "max-new-tokens": 8,
                "written": folder / "written.jsonl", "scorer": f"{folder / 'scorer.py'}:score",
                "device": "cpu"} | options
    return [*(x for name, value in settings.items() for x in (f"--{name}", value)), "--out", folder / out]


def lines(path):
    return [record for _, record in read_jsonl(path)]


@given(scores=st.lists(st.integers(-3, 3), min_size=2, max_size=6))
def test_ranks_count_who_is_better_and_ties_stay_ties(scores):
    ranks = collect.ranks_of(scores)
    assert min(ranks) == 1
    for a, rank in zip(scores, ranks):
        for b, other in zip(scores, ranks):
            assert (a > b) == (rank < other) and (a == b) == (rank == other)


def test_half_is_sampled_half_is_written_and_the_scorer_ranks(folder):
    assert run("collect", *arguments(folder)) == 0
    found, written = lines(folder / "out.jsonl"), {"By the lake.", "No.", "By the barn, I think."}
    assert [r["prompt"] for r in found] == [r["prompt"] for r in lines(folder / "prompts.jsonl")]
    for r in found:
        assert len(set(r["completions"])) == len(r["completions"]) == len(r["ranks"]) <= 4
        assert 1 <= len(written & set(r["completions"])) <= 2
        own = [(len(c) // 4, rank) for c, rank in zip(r["completions"], r["ranks"]) if c in written]
        assert all((a > b) == (i < j) for a, i in own for b, j in own)
    assert found[3]["meta"] == {"n": 3} and "meta" not in found[-1]
    about = json.loads((folder / "out.run.json").read_text())
    assert about["finished"] and about["counts"]["records"] == len(found)


def test_the_file_is_the_same_for_any_batch_and_any_number_of_ranks(folder):
    assert run("collect", *arguments(folder)) == 0
    assert run("collect", *arguments(folder, "small.jsonl", **{"batch-size": 3})) == 0
    result = launch("collect.py", *arguments(folder, "two.jsonl", **{"batch-size": 3}), processes=2)
    assert result.returncode == 0, result.stderr
    assert run("collect", *arguments(folder, "other.jsonl", seed=2)) == 0
    whole = (folder / "out.jsonl").read_bytes()
    assert whole == (folder / "small.jsonl").read_bytes() == (folder / "two.jsonl").read_bytes()
    assert whole != (folder / "other.jsonl").read_bytes()


def test_pairs_are_every_untied_pair_and_another_key_may_rank(folder):
    assert run("collect", *arguments(folder)) == 0
    assert run("collect", *arguments(folder, "pairs.jsonl"), "--pairs") == 0
    assert run("collect", *arguments(folder, "letters.jsonl", key="letters")) == 0
    ranked = [(r["prompt"], list(zip(r["completions"], r["ranks"]))) for r in lines(folder / "out.jsonl")]
    expected = [(prompt, a, b) for prompt, own in ranked for a, i in own for b, j in own if i < j]
    assert [(p["prompt"], p["chosen"], p["rejected"]) for p in lines(folder / "pairs.jsonl")] == expected
    for r in lines(folder / "letters.jsonl"):
        own = {c: rank for c, rank in zip(r["completions"], r["ranks"]) if c in ("By the lake.", "No.")}
        assert len(own) < 2 or own["By the lake."] < own["No."]


def test_an_answer_that_was_cut_off_is_chosen_over_no_whole_one():
    item, options = collect.Item("Hi", None, [], ["No."], ""), SimpleNamespace(key="gold", pairs=False)
    sampled, counts = [[("A long answer that", False), ("Yes.", True), ("Another that", False)]], Counter()
    score = lambda prompt, answer, meta: {"gold": len(answer)}  # noqa: E731
    [record] = collect.rank_answers([item], sampled, score, options, counts)
    assert record["ranks"] == [3, 1, 3, 2] and counts["cut"] == 2
    sampled[0] += [("Another that", True), ("No.", False)]  # the same words, once whole and once without their end
    [record] = collect.rank_answers([item], sampled, score, options, counts)
    assert record["ranks"] == [4, 2, 1, 3]


def test_silence_is_chosen_in_no_pair():
    item = collect.Item("Hi", None, [], [], "")
    pairs = collect.as_pairs(item, [" ", "No.", "Yes."], [1, 2, 3])
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("No.", "Yes.")]


def test_what_reward_and_dpo_hold_out_is_left_out_of_the_training_part(folder):
    write_jsonl(folder / "many.jsonl", [{"prompt": f"Where is house {n}?"} for n in range(80)])
    settings = {"data": folder / "many.jsonl", "k": 2, "max-new-tokens": 4}
    line = [a for a in arguments(folder, **settings)]
    at = line.index("--written")
    assert run("collect", *line[:at], *line[at + 2 :], "--train-part") == 0
    held_out = json.loads((folder / "out.run.json").read_text())["counts"]["held_out"]
    asked = {r["prompt"] for r in lines(folder / "many.jsonl")}
    kept = {r["prompt"] for r in lines(folder / "out.jsonl")}
    assert held_out == len(asked - kept) > 0


@pytest.mark.parametrize("changes, says", [
    ({"scorer": "FOLDER/scorer.py:fails"}, "the scorer failed"), ({"key": "silver"}, "silver"),
    ({"scorer": "FOLDER/scorer.py:absent"}, "scorer"), ({"scorer": "nothing"}, "file.py:function"),
    ({"data": "FOLDER/none"}, "not found"), ({"data": "FOLDER/bad.jsonl"}, "bad.jsonl:2"),
    ({"written": "FOLDER/prompts.jsonl"}, "prompts.jsonl:1")])
def test_a_mistake_is_told_in_one_line_and_leaves_no_file(folder, capsys, changes, says):
    write_jsonl(folder / "bad.jsonl", [{"prompt": "Hi"}, {"prompt": [{"role": "wizard", "content": "Hi"}]}])
    changes = {name: value.replace("FOLDER", str(folder)) for name, value in changes.items()}
    assert run("collect", *arguments(folder, **changes)) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert says in told[-1] and not (folder / "out.jsonl").exists()


def test_equal_answers_are_told_once_and_a_prompt_with_one_answer_is_left_out(folder):
    line = arguments(folder, temperature=0)
    at = line.index("--written")
    assert run("collect", *line[:at], *line[at + 2 :]) == 0  # greedy, nothing written: all four are equal
    counts = json.loads((folder / "out.run.json").read_text())["counts"]
    assert lines(folder / "out.jsonl") == [] and counts["one_answer"] == counts["prompts"] == 13
    assert run("collect", *arguments(folder, "both.jsonl", temperature=0)) == 0
    assert {len(r["completions"]) for r in lines(folder / "both.jsonl")} == {3}  # two sampled are equal


def test_a_killed_run_leaves_no_half_file_and_the_old_one_whole(folder):
    command = arguments(folder, scorer=f"{folder / 'scorer.py'}:dies")
    before = {path.name for path in folder.iterdir()}
    assert launch("collect.py", *command).returncode == -9
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == before
    assert run("collect", *arguments(folder)) == 0
    old = (folder / "out.jsonl").read_bytes(), (folder / "out.run.json").read_bytes()
    assert launch("collect.py", *command, "--overwrite").returncode == -9
    assert old == ((folder / "out.jsonl").read_bytes(), (folder / "out.run.json").read_bytes())


def test_a_full_disk_is_told_in_one_line_and_leaves_the_old_file_whole(folder):
    (folder / "out.jsonl").write_text("old\n")
    full = launch("collect.py", *arguments(folder), "--overwrite",
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)))
    assert full.returncode == 2 and "collect.py: File too large" in full.stderr, full.stderr
    assert "Traceback" not in full.stderr and (folder / "out.jsonl").read_text() == "old\n"


@pytest.mark.parametrize("flags", [[], ["--pairs"]], ids=["rankings", "pairs"])
def test_reward_and_dpo_read_what_is_written(folder, flags):
    assert run("collect", *arguments(folder), *flags) == 0
    for stage in ("reward", "dpo"):
        assert run(stage, "--model", tiny() / "base", "--data", folder / "out.jsonl", "--out", folder / stage,
                   "--max-length", 64, "--dtype", "fp32", "--device", "cpu") == 0
        left_out = json.loads((folder / stage / "run.json").read_text())["left_out"]
        assert left_out["bad"] == 0


def test_a_finished_file_is_not_overwritten_unasked(folder, capsys):
    assert run("collect", *arguments(folder)) == 0
    assert run("collect", *arguments(folder)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run("collect", *arguments(folder), "--overwrite") == 0
