"""What dpo.py promises: eq. 7 on the answers' tokens, log 2 at first, no tied pair, exact resume."""

import math
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import dpo
from model import Ranks, autocast, load_folder, newest_state, read_safetensors
from test_pretrain import assert_same_run, metrics
from tiny import ROOT, command_line, environment, launch, preferences, run, tiny, write_jsonl
from tokenizer import Tokenizer, encode_answer

torch.set_num_threads(1)
ONE = Ranks(0, 1, torch.device("cpu"))
NATS = st.floats(-50, 0, width=32)


def dpo_arguments(out, **options):
    settings = {"epochs": 1, "batch-size": 8, "warmup": 2, "eval-every": 4, "save-every": 3, "max-length": 64,
                "dtype": "fp32", "device": "cpu", "lr": 1e-3} | options
    flags = [x for name, value in settings.items() for x in (f"--{name}", value)]
    return ["--model", tiny() / "base", "--data", tiny() / "preferences.jsonl", "--out", out, *flags]


def options(**changes):
    return dpo.Options(model="", data=[], out="", max_length=64, **changes)


def some_pairs(tmp_path, count=6, **changes):
    tokenizer, counts = Tokenizer.load(tiny() / "base"), {"bad": 0, "too_long": 0, "no_pair": 0}
    file = write_jsonl(tmp_path / "some.jsonl", preferences(count, "some"))
    return [p for _, p in dpo.read_pairs([file], tokenizer, options(**changes), counts)], tokenizer


def fp32():
    return autocast(ONE.device, "fp32")


@given(values=st.lists(st.tuples(NATS, NATS, NATS, NATS), min_size=1, max_size=6), beta=st.floats(0.01, 1))
def test_the_loss_is_equation_7(values, beta):
    loss, chosen, rejected = dpo.dpo_loss(*torch.tensor(values).T, beta)
    for (w, l, ref_w, ref_l), found in zip(values, loss.tolist()):
        margin = beta * ((w - ref_w) - (l - ref_l))
        assert found == pytest.approx(np.logaddexp(0.0, -margin), rel=1e-4, abs=1e-5)
    assert chosen.tolist() == pytest.approx([beta * (v[0] - v[2]) for v in values], abs=1e-4)


def test_a_batch_gives_the_papers_loss_in_float64(tmp_path):
    pairs, tokenizer = some_pairs(tmp_path)
    model, settings = load_folder(tiny() / "base", dtype=torch.float64)[0], options(beta=0.3, sft_weight=0.5)
    references = -30 * torch.rand(len(pairs) + 1, 2, dtype=torch.float64)
    [batch] = dpo.step_batches(settings, pairs, list(range(len(pairs))), tokenizer.pad, ONE)
    found, _ = dpo.batch_loss(model, batch, references, settings, ONE, fp32)
    expected = 0.0
    for pair, (ref_w, ref_l) in zip(pairs, references.tolist()):
        pi_w, pi_l = (answer_nats(model, answer) for answer in (pair.chosen, pair.rejected))
        margin = 0.3 * ((pi_w.sum() - ref_w) - (pi_l.sum() - ref_l))
        expected += np.log1p(np.exp(-margin)) - 0.5 * pi_w.mean()
    assert found.item() == pytest.approx(expected, rel=1e-9)


def answer_nats(model, answer):
    """Log-probability of each answer token, from the logits of the answer alone, unpadded."""
    with torch.no_grad():
        logits = model(torch.from_numpy(answer.ids)[None])[0].numpy()  # (T, V)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.array([logprobs[t - 1, answer.ids[t]] for t in np.flatnonzero(answer.trained)])


def test_the_answer_and_its_end_count_and_nothing_of_the_prompt(tmp_path):
    pairs, tokenizer = some_pairs(tmp_path)
    *_, documents, targets = dpo.collate(pairs, tokenizer.pad)
    said = [tokenizer.decode(row[(row >= 0) & (own == answer)].tolist())
            for row, own in zip(targets, documents) for answer in (1, 2)]
    assert len(set(said)) > 2 and (targets[documents < 1] == -1).all()
    assert all(text.endswith("<|im_end|>") and text.count("<|im_") == 1 for text in said)
    assert all("shepherd" not in text and "sleep?" not in text for text in said)
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy!"},
               {"role": "user", "content": "再见"}]
    ids, trained = encode_answer(tokenizer, earlier, [{"role": "assistant", "content": "一路顺风。"}])
    assert tokenizer.decode(np.array(ids)[trained]) == "一路顺风。<|im_end|>"


def test_a_ranking_gives_a_best_answer_and_lower_ones_and_never_a_tie():
    answers = [dpo.Answer(np.array([n, 9]), np.array([True, True]), True) for n in range(5)]
    for name in map(str, range(20)):
        pairs = dpo.draw_pairs(answers, [2, 1, 1, 3, 3], 9, 1, name)
        assert [int(p.chosen.ids[0]) in (1, 2) for p in pairs] == [True] * 3
        assert sorted(int(p.rejected.ids[0]) for p in pairs) == [0, 3, 4]
    assert dpo.draw_pairs(answers[:2], [1, 1], 9, 1, "tied") == []
    silence = dpo.Answer(np.array([8, 9]), np.array([True, True]), False)  # a space and <|im_end|>
    assert dpo.draw_pairs([silence, *answers[:2]], [1, 2, 3], 9, 1, "silence is no model") == []


def test_padding_and_the_split_into_micro_batches_change_nothing(tmp_path):
    pairs, tokenizer = some_pairs(tmp_path)
    model, results = load_folder(tiny() / "base")[0], []
    references = torch.randn(len(pairs) + 1, 2, generator=torch.Generator().manual_seed(1)) - 20
    for size in (0, 2, 8):
        chosen = options(micro_batch=size)
        batches = dpo.step_batches(chosen, pairs, list(range(len(pairs))), tokenizer.pad, ONE)
        figures, _ = dpo.train_step(model, batches, references, chosen, ONE, fp32, 1.0)
        results.append((figures["loss"], model.model.layers[0].mlp.up_proj.weight.grad.clone()))
        model.zero_grad()
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        torch.testing.assert_close(gradient, results[0][1], atol=1e-6, rtol=1e-3)


def test_ranks_share_the_pairs_of_a_step(tmp_path):
    pairs, tokenizer = some_pairs(tmp_path)
    shares = [[n for numbers, *_ in dpo.step_batches(options(), pairs, [4, 0, 2], tokenizer.pad,
                                                     Ranks(rank, 2, ONE.device)) for n in numbers.tolist()]
              for rank in (0, 1)]
    assert [{*share} for share in shares] == [{4, 0}, {2, -1}]


def test_a_step_without_a_pair_is_zero_and_not_nan():
    model = load_folder(tiny() / "base")[0]
    batch = (torch.tensor([-1]), *dpo.collate([None], 3))
    figures, tokens = dpo.train_step(model, [batch], torch.zeros(1, 2), options(), ONE, fp32, 1.0)
    assert figures["loss"] == 0.0 and tokens == 0 and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_first_loss_is_log_2_exactly(tmp_path, dtype):
    assert run("dpo", *dpo_arguments(tmp_path, dtype=dtype)) == 0
    first = metrics(tmp_path, "dpo_loss", "margin", "accuracy")[0]
    assert first == [pytest.approx(math.log(2), abs=1e-7), 0.0, 0.5]


def test_it_learns_what_is_preferred_and_transformers_loads_it(tmp_path):
    from transformers import AutoModelForCausalLM
    assert run("dpo", *dpo_arguments(tmp_path, epochs=6, lr=2e-3)) == 0
    accuracy = [x for x, in metrics(tmp_path, "accuracy") if x is not None]
    assert np.mean(accuracy[-4:]) > 0.85
    ids = torch.tensor([[1, 30, 40, 2, 50, 60, 1, 2]])
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
        torch.testing.assert_close(load_folder(tmp_path)[0](ids), theirs, atol=1e-4, rtol=1e-4)


def test_bad_records_are_told_with_file_and_line(tmp_path, capsys):
    records = list(preferences(20, "good"))
    for bad in ({"prompt": "Hi"}, {"prompt": "Hi", "completions": ["a", "b"], "ranks": [1, "2"]},
                {"prompt": "Hi", "chosen": "", "rejected": "b"},
                {"prompt": 5, "chosen": "a", "rejected": "b"}):
        file = write_jsonl(tmp_path / "bad.jsonl", [*records[:3], bad, *records[3:]])
        assert run("dpo", *dpo_arguments(tmp_path / "out", data=file)) == 2
        assert "bad.jsonl:4" in capsys.readouterr().err
    with file.open("a") as lines:
        lines.write('{"prompt": "H')
    assert run("dpo", *dpo_arguments(tmp_path / "out", data=file), "--skip-bad") == 0
    assert "left out: 2 bad" in capsys.readouterr().err


def test_stopped_and_resumed_is_bit_exact(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("dpo", *dpo_arguments(whole, epochs=6)) == 0
    process = subprocess.Popen(command_line("dpo.py", *dpo_arguments(parts, epochs=6)), cwd=ROOT,
                               env=environment(), stderr=subprocess.PIPE, text=True)
    while not newest_state(parts):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "--resume" in message, message
    assert run("dpo", *dpo_arguments(parts, epochs=6), "--resume") == 0
    assert_same_run(whole, parts)


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks_equal_one(tmp_path, parallel):
    settings = {"batch-size": 7}  # a rank has 4 pairs, the other 3
    assert run("dpo", *dpo_arguments(tmp_path / "one", **settings)) == 0
    result = launch("dpo.py", *dpo_arguments(tmp_path / "two", parallel=parallel, **settings), processes=2)
    assert result.returncode == 0, result.stderr
    one, two = (metrics(tmp_path / name, "loss", "margin", "valid_loss") for name in ("one", "two"))
    assert len(one) == len(two)
    for left, right in zip(one, two):
        for a, b in zip(left, right):
            assert (a is None and b is None) or b == pytest.approx(a, rel=1e-5, abs=1e-6)


def test_patience_stops_early_and_exports_the_best(tmp_path):
    settings = {"epochs": 40, "lr": 0.3, "eval-every": 2, "patience": 3}
    assert run("dpo", *dpo_arguments(tmp_path, **settings)) == 0
    evaluations = [loss for loss, in metrics(tmp_path, "valid_loss") if loss is not None]
    assert len(evaluations) < 40 and min(evaluations) == evaluations[-4]
    best = read_safetensors(tmp_path / "state" / "best.safetensors")
    exported = read_safetensors(tmp_path / "model.safetensors")
    assert all(torch.equal(best[name], exported[name]) for name in best)
