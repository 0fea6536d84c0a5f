"""What reward.py promises: the papers' loss, read at the right token; transformers scores alike."""

import json
import math
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import reward
from model import Ranks, RewardModel, autocast, load_folder, newest_state, read_safetensors
from test_pretrain import assert_same_run, metrics
from tiny import ROOT, command_line, environment, launch, preferences, run, tiny, write_jsonl
from tokenizer import InputError, Tokenizer, encode_chat, record_ranking

torch.set_num_threads(1)
ONE = Ranks(0, 1, torch.device("cpu"))


def reward_arguments(folder, out, **options):
    settings = {"epochs": 1, "batch-size": 8, "warmup": 2, "eval-every": 4, "save-every": 3,
                "max-length": 64, "dtype": "fp32", "device": "cpu", "lr": 1e-3} | options
    flags = [x for name, value in settings.items() for x in (f"--{name}", value)]
    return ["--model", folder / "base", "--data", folder / "preferences.jsonl", "--out", out, *flags]


def options(tmp_path, **changes):
    return reward.Options(model=str(tiny() / "base"), data=[str(tiny() / "preferences.jsonl")],
                          out=str(tmp_path), max_length=64, **changes)


def rankings(tmp_path, count=7):
    tokenizer = Tokenizer.load(tiny() / "base")
    file = write_jsonl(tmp_path / "some.jsonl", preferences(count, "some"))
    counts = {"bad": 0, "too_long": 0, "no_pair": 0}
    return [r for _, r in reward.read_rankings([file], tokenizer, options(tmp_path), counts)], tokenizer


def a_model():
    causal, _ = load_folder(tiny() / "base")
    return reward.reward_model(causal, seed=1)


def fp32():
    return autocast(ONE.device, "fp32")


@given(ranks=st.lists(st.lists(st.integers(1, 3), min_size=2, max_size=5), min_size=1, max_size=4))
def test_the_loss_is_the_mean_over_each_prompts_untied_pairs(ranks):
    made = [reward.Ranking([np.array([1])] * len(r), r, {}) for r in ranks]
    scores = np.random.default_rng(0).normal(size=sum(map(len, ranks)))
    expected, first = 0.0, 0
    for r in ranks:
        own = scores[first : first + len(r)]
        k = range(len(r))
        losses = [-np.log(1 / (1 + np.exp(own[j] - own[i]))) for i in k for j in k if r[i] < r[j]]
        expected += np.mean(losses) if losses else 0.0
        first += len(r)
    loss = reward.reward_loss(torch.tensor(scores), *reward.pair_indices(made))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def tied():
    return reward.Ranking([np.array([1, 2]), np.array([1, 3])], [1, 1], {})


def test_a_step_without_a_pair_is_zero_and_not_nan():
    model = a_model()
    for batches in ([[]], [[tied()]]):
        figures, _ = reward.train_step(model, batches, 3, ONE, fp32, 1.0)
        assert figures == {"loss": 0.0, "accuracy": 0.0}
        assert all((p.grad == 0).all() for p in model.parameters())


def test_tied_answers_give_no_gradient_and_a_prompt_of_ties_does_not_weigh(tmp_path):
    scores = torch.randn(4, requires_grad=True)
    ranking = reward.Ranking([np.array([1])] * 4, [1, 1, 2, 2], {})
    better, worse, weight = reward.pair_indices([ranking])
    assert set(zip(better.tolist(), worse.tolist())) == {(0, 2), (0, 3), (1, 2), (1, 3)}
    assert weight.sum() == 1.0
    reward.reward_loss(scores, *reward.pair_indices([tied(), tied()])).backward()
    assert (scores.grad == 0).all()
    some, tokenizer = rankings(tmp_path)
    losses = [reward.train_step(a_model(), [batch], tokenizer.pad, ONE, fp32, 1.0)[0]["loss"]
              for batch in (some, [*some, tied()])]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_an_answer_sees_its_prompt_and_itself_and_is_scored_at_its_last_im_end(tmp_path):
    some, tokenizer = rankings(tmp_path)
    ids, positions, documents, row, column = reward.collate(some, tokenizer.pad)
    texts = [tokenizer.decode(ids[b, (documents[b] < 0) | (documents[b] == documents[b, t])].tolist())
             for b, t in zip(row, column)]
    assert texts[1] == ("<|im_start|>user\n鲤鱼睡在哪里？<|im_end|>\n"
                        "<|im_start|>assistant\n睡在树林里。<|im_end|>")
    assert texts == [tokenizer.decode(dialogue) for ranking in some for dialogue in ranking.ids]
    assert (ids[row, column] == tokenizer.im_end).all() and (ids[documents == 0] == tokenizer.pad).all()
    model, without = a_model(), ids.clone()
    without[row, column] = tokenizer.pad
    with torch.no_grad():
        scores, other = (reward.answer_scores(model, x, positions, documents, row, column)
                         for x in (ids, without))
    assert ((other - scores).abs() > 1e-4).all()


@pytest.mark.parametrize("window", [None, 7])
def test_answers_behind_one_prompt_are_scored_as_if_each_were_alone(tmp_path, window):
    some, tokenizer = rankings(tmp_path)
    some.append(reward.Ranking([np.array([5, 6, 7]), np.array([5, 6]), np.array([5, 6, 7, 8])], [1, 2, 3], {}))
    some.append(reward.Ranking([np.array([5, 6, 7]), np.array([6, 6])], [1, 2], {}))  # nothing in common
    model = a_model()
    model.model.windows = [window] * len(model.model.layers)
    with torch.no_grad():
        together = reward.answer_scores(model, *reward.collate(some, tokenizer.pad))
        alone = [model(torch.tensor(ids)[None])[0, -1] for ranking in some for ids in ranking.ids]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-5)


def test_padding_and_the_split_into_micro_batches_change_nothing(tmp_path):
    some, tokenizer = rankings(tmp_path)
    model, results = a_model(), []
    for size in (0, 4, 9):
        batches = reward.micro_batches(some, size)
        assert [r for b in batches for r in b] == some
        figures, tokens = reward.train_step(model, batches, tokenizer.pad, ONE, fp32, 1.0)
        results.append((figures["loss"], tokens, model.model.layers[0].mlp.up_proj.weight.grad.clone()))
        model.zero_grad()
    for loss, tokens, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6) and tokens == results[0][1]
        torch.testing.assert_close(gradient, results[0][2], atol=1e-6, rtol=1e-4)
    alone = [reward.score_all(model, [r], tokenizer.pad, ONE.device, fp32)[0] for r in some]
    together = reward.score_all(model, some, tokenizer.pad, ONE.device, fp32)
    for a, b in zip(alone, together):
        assert a == pytest.approx(b, abs=1e-5)


def test_all_answers_to_a_prompt_are_held_out_together(tmp_path):
    pairs = [{"prompt": f"Question {i % 40}?", "chosen": f"yes {i}", "rejected": "no"} for i in range(400)]
    file = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    counts = {"bad": 0, "too_long": 0, "no_pair": 0}
    chosen = options(tmp_path)
    chosen.data = [str(file)]
    train, valid = reward.split_rankings(chosen, Tokenizer.load(tiny() / "base"), counts)
    asked = [{r.record["prompt"] for r in part} for part in (train, valid)]
    assert not asked[0] & asked[1] and len(train) + len(valid) == 400


def test_calibration_error_is_zero_where_confidence_is_as_often_right():
    margin = math.log(3)  # sigmoid: .75
    assert reward.calibration_error(np.array([margin] * 3 + [-margin])) == pytest.approx(0.0, abs=1e-12)
    assert reward.calibration_error(np.array([margin] * 4)) == pytest.approx(0.25)


def test_equal_scores_are_well_calibrated_and_a_dialogue_may_repeat_its_prompt():
    assert reward.calibration_error(np.zeros(6)) == 0
    asked, said = ({"role": role, "content": "Hi"} for role in ("user", "assistant"))
    record = {"prompt": "Hi", "chosen": [asked, said], "rejected": "No."}
    assert record_ranking(record)[1][0] == [said]
    with pytest.raises(InputError, match="begins with the user's words"):
        record_ranking(record | {"rejected": [{**asked, "content": "Oh"}, said]})


def test_bad_records_are_told_with_file_and_line_or_counted(tmp_path, capsys):
    records = list(preferences(20, "good"))
    for bad in ({"prompt": "Hi"}, {"prompt": "Hi", "completions": ["a"], "ranks": [1]},
                {"prompt": "Hi", "completions": ["a", "b"], "ranks": [1]}, {"chosen": "a", "rejected": "b"},
                {"prompt": "Hi", "chosen": " ", "rejected": "b"},
                {"prompt": [{"role": "assistant", "content": "x"}], "chosen": "a", "rejected": "b"}):
        file = write_jsonl(tmp_path / "bad.jsonl", [*records[:3], bad, *records[3:]])
        arguments = reward_arguments(tiny(), tmp_path / "out", data=file)
        assert run("reward", *arguments) == 2
        assert "bad.jsonl:4" in capsys.readouterr().err
    assert run("reward", *arguments, "--skip-bad") == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["left_out"]["bad"] == 1


def test_what_teaches_nothing_is_counted_and_of_nothing_left_the_reason_is_told(tmp_path, capsys):
    asked = {"prompt": "Hi", "ranks": [1, 2]}
    good, tied = asked | {"completions": ["a", "b"]}, {"prompt": "Hi", "completions": ["a", "b"], "ranks": [1, 1]}
    file = write_jsonl(tmp_path / "some.jsonl", [good, tied, asked | {"completions": ["a", "by the lake " * 60]}])
    with file.open("a") as lines:
        lines.write('{"prompt": "H')
    assert run("reward", *reward_arguments(tiny(), tmp_path / "out", data=file), "--skip-bad") == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["left_out"] == {
        "bad": 1, "too_long": 1, "no_pair": 2}
    assert "none of them is held out" in capsys.readouterr().err
    assert (tmp_path / "out" / "valid.jsonl").read_text() == ""
    file = write_jsonl(tmp_path / "tied.jsonl", [tied])
    assert run("reward", *reward_arguments(tiny(), tmp_path / "none", data=file)) == 2
    assert "no ranking left to train on (no pair: 1)" in capsys.readouterr().err


def test_it_learns_and_writes_what_it_held_out(tmp_path):
    out, valid = tmp_path / "out", write_jsonl(tmp_path / "held_out.jsonl", preferences(8, "valid"))
    assert run("reward", *reward_arguments(tiny(), out, valid=valid, epochs=6, lr=2e-3)) == 0
    accuracy = [x for x, in metrics(out, "accuracy") if x is not None]
    assert np.mean(accuracy[-4:]) > 0.8 > np.mean(accuracy[:2])
    lines = [json.loads(line) for line in (out / "valid.jsonl").read_text("utf-8").splitlines()]
    assert lines and all(len(r["scores"]) == len(r["ranks"]) == len(r["completions"]) for r in lines)
    model, tokenizer = load_folder(out, kind=RewardModel)
    for record in lines:
        ids = [encode_chat(tokenizer, record["prompt"] + [{"role": "assistant", "content": c}])[0]
               for c in record["completions"]]
        with torch.no_grad():
            found = [model(torch.tensor([i]))[0, -1].item() for i in ids]
        assert found == pytest.approx(record["scores"], abs=1e-4)


def test_transformers_gives_equal_scores(tmp_path):
    from transformers import AutoModelForSequenceClassification
    assert run("reward", *reward_arguments(tiny(), tmp_path / "reward")) == 0
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    model, tokenizer = load_folder(tmp_path / "reward", kind=RewardModel)
    some, _ = rankings(tmp_path)
    dialogues = [torch.tensor(ids) for ranking in some for ids in ranking.ids]
    ids = torch.nn.utils.rnn.pad_sequence(dialogues, batch_first=True, padding_value=tokenizer.pad)
    length = torch.tensor([len(dialogue) for dialogue in dialogues])
    mask = (torch.arange(ids.shape[1]) < length[:, None]).long()
    with torch.no_grad():
        own = reward.answer_scores(model, *reward.collate(some, tokenizer.pad))
        torch.testing.assert_close(theirs(ids, attention_mask=mask).logits[:, 0], own, atol=1e-4, rtol=1e-4)
        alone = torch.stack([theirs(dialogue[None]).logits[0, 0] for dialogue in dialogues])
    torch.testing.assert_close(alone, own, atol=1e-4, rtol=1e-4)


def test_a_reward_model_is_no_language_model(tmp_path, capsys):
    assert run("reward", *reward_arguments(tiny(), tmp_path / "reward")) == 0
    with pytest.raises(InputError, match="Qwen3ForSequenceClassification"):
        load_folder(tmp_path / "reward")
    with pytest.raises(InputError, match="Qwen3ForCausalLM"):
        load_folder(tiny() / "base", kind=RewardModel)


def test_stopped_and_resumed_is_bit_exact(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("reward", *reward_arguments(tiny(), whole, epochs=6)) == 0
    line = command_line("reward.py", *reward_arguments(tiny(), parts, epochs=6))
    process = subprocess.Popen(line, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    while not newest_state(parts):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "--resume" in message, message
    assert run("reward", *reward_arguments(tiny(), parts, epochs=6), "--resume") == 0
    assert_same_run(whole, parts)
    assert (whole / "valid.jsonl").read_bytes() == (parts / "valid.jsonl").read_bytes()


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks_equal_one(tmp_path, parallel):
    settings = {"micro-batch": 8, "epochs": 2, "batch-size": 7}  # a rank has 4 prompts, the other 3
    assert run("reward", *reward_arguments(tiny(), tmp_path / "one", **settings)) == 0
    arguments = reward_arguments(tiny(), tmp_path / "two", parallel=parallel, **settings)
    result = launch("reward.py", *arguments, processes=2)
    assert result.returncode == 0, result.stderr
    names = "loss", "accuracy", "tokens", "valid_loss"  # equal tokens: the ranks had different rows
    one, two = (metrics(tmp_path / name, *names) for name in ("one", "two"))
    assert len(one) == len(two)
    for left, right in zip(one, two):
        for a, b in zip(left, right):
            assert (a is None and b is None) or b == pytest.approx(a, rel=1e-5)
    weights = [read_safetensors(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=2e-4, rtol=1e-3)


def test_patience_stops_early_and_exports_the_best(tmp_path):
    settings = {"epochs": 40, "lr": 0.3, "eval-every": 2, "patience": 3}
    assert run("reward", *reward_arguments(tiny(), tmp_path, **settings)) == 0
    evaluations = [loss for loss, in metrics(tmp_path, "valid_loss") if loss is not None]
    assert len(evaluations) < 40 and min(evaluations) == evaluations[-4]
    best = read_safetensors(tmp_path / "state" / "best.safetensors")
    exported = read_safetensors(tmp_path / "model.safetensors")
    assert all(torch.equal(best[name], exported[name]) for name in best)
