"""What pretrain.py promises: exact loss, exact resume, one rank = many ranks, nothing lost when killed."""

import json
import random
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pretrain
from model import Ranks, autocast, load_folder, newest_state
from tiny import ROOT, command_line, environment, launch, pretrain_arguments, run, tiny
from tokenizer import Tokenizer, read_tokens

torch.set_num_threads(1)
ONE = Ranks(0, 1, torch.device("cpu"))


def metrics(out, *names):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [[line.get(n) for n in names] for line in lines]


def assert_same_run(a, b):
    """Two runs agree to the last bit: weights, optimizer, and every metric but the times."""
    left, right = (load_file(newest_state(x) / "tensors.safetensors") for x in (a, b))
    assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
    names = ("step", "loss", "lr", "grad_norm", "tokens", "skipped", "bits_per_byte")
    assert metrics(a, *names) == metrics(b, *names)
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def unfinish(out):
    """As if the run had been killed before its last mark."""
    path = out / "run.json"
    path.write_text(path.read_text().replace('"finished": true', '"finished": false'))


def make_windows(seed=1):
    tokenizer = Tokenizer.load(tiny() / "tokenizer")
    return pretrain.Windows(read_tokens(tiny() / "tokens", "train", tokenizer), 64, tokenizer.endoftext, seed)


def test_every_epoch_has_every_window_once_in_an_order_of_its_own():
    windows = make_windows()
    n = len(windows)
    order = [w for step in range(2 * n) for w in windows.rows(step, 1)]
    assert (sorted(order[:n]) == sorted(order[n:]) == list(range(n))
            and order[:n] != order[n:] != sorted(order[n:]))
    assert windows.rows(3, 4) == make_windows().rows(3, 4) == order[12:16]
    assert make_windows(seed=2).rows(0, n) != order[:n]


def test_every_token_of_the_corpus_is_a_target_once_an_epoch():
    windows = make_windows()
    targets = windows.batch(range(len(windows)))[3]
    # 0: the closing <|endoftext|>
    tokens = np.concatenate([np.append(s.tokens[1:], 0) for s in windows.shards])
    assert sorted(targets[targets >= 0].tolist()) == sorted(tokens.tolist())


def test_the_loss_is_the_papers_in_float64():
    model, _ = load_folder(tiny() / "base", dtype=torch.float64)
    ids, positions, documents, targets = make_windows().batch([0, 1])
    loss = pretrain.next_token_loss(model(ids, positions, documents, targets=targets),
                                    (targets >= 0).sum().item())
    logits = model(ids, positions, documents).detach().numpy()  # (B, T, V)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = [-np.log(p[b, t, targets[b, t]]) for b in range(2) for t in range(64) if targets[b, t] >= 0]
    assert loss.item() == pytest.approx(np.mean(chosen), rel=1e-5)


def test_the_gradient_is_the_same_however_the_step_is_split():
    model, _ = load_folder(tiny() / "base")
    windows, gradients = make_windows(), []
    rows = [0, 1, 2, len(windows) - 1]  # the last window is short: a mean of means would differ
    for size in (4, 1, 3):
        batches = [windows.batch(rows[i : i + size]) for i in range(0, 4, size)]
        loss, _ = pretrain.train_step(model, batches, ONE, lambda: autocast(ONE.device, "fp32"), 1.0)
        gradients.append((loss, model.model.layers[0].mlp.up_proj.weight.grad.clone()))
        model.zero_grad()
    for loss, gradient in gradients[1:]:
        assert loss == pytest.approx(gradients[0][0], rel=1e-6)
        torch.testing.assert_close(gradient, gradients[0][1], atol=1e-7, rtol=1e-4)


def test_a_batch_without_a_target_has_loss_zero_and_no_nan():
    model, _ = load_folder(tiny() / "base")
    batch = make_windows().batch([0])
    batch[3] = torch.full_like(batch[3], -1)
    loss, tokens = pretrain.train_step(model, [batch], ONE, lambda: autocast(ONE.device, "fp32"), 1.0)
    assert loss == 0.0 and tokens == 0 and all(p.grad.isfinite().all() for p in model.parameters())


def test_it_learns_one_window_by_heart(tmp_path):
    options = pretrain.parse_options(pretrain.Options, [str(a) for a in pretrain_arguments(tiny(), tmp_path)])
    torch.manual_seed(0)
    model = pretrain.build_model(options, Tokenizer.load(tiny() / "tokenizer"))
    optimizer, batch = torch.optim.AdamW(model.parameters(), lr=1e-2), make_windows().batch([1])
    for _ in range(120):
        optimizer.zero_grad()
        loss, _ = pretrain.train_step(model, [batch], ONE, lambda: autocast(ONE.device, "fp32"), 1.0)
        optimizer.step()
    assert loss < 0.1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_stopped_and_resumed_is_bit_exact(tmp_path, dtype):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("pretrain", *pretrain_arguments(tiny(), whole, dtype=dtype)) == 0
    process = subprocess.Popen(command_line("pretrain.py", *pretrain_arguments(tiny(), parts, dtype=dtype)),
                               cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    while not newest_state(parts):  # after the first state, in the middle of the run
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "--resume" in message, message
    assert not json.loads((parts / "run.json").read_text())["finished"]
    assert run("pretrain", *pretrain_arguments(tiny(), parts, dtype=dtype), "--resume") == 0
    assert_same_run(whole, parts)


def test_killed_at_five_random_moments_nothing_is_lost(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = {"steps": 400, "save-every": 4, "eval-every": 200}
    assert run("pretrain", *pretrain_arguments(tiny(), whole, **arguments)) == 0
    rng, deaths = random.Random(0), 0
    while deaths < 5:
        process = subprocess.Popen(
            command_line("pretrain.py", *pretrain_arguments(tiny(), killed, **arguments), "--resume"),
            cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
        known = newest_state(killed)
        while process.poll() is None and newest_state(killed) == known:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.15))  # somewhere between two states, or inside the writing of one
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed: make it longer"
        deaths += 1
    assert run("pretrain", *pretrain_arguments(tiny(), killed, **arguments), "--resume") == 0
    assert_same_run(whole, killed)


def test_two_ranks_equal_one_on_different_rows(tmp_path):
    assert run("pretrain", *pretrain_arguments(tiny(), tmp_path / "one")) == 0
    result = launch("pretrain.py", *pretrain_arguments(tiny(), tmp_path / "two"), processes=2)
    assert result.returncode == 0, result.stderr
    for (a, x), (b, y) in zip(metrics(tmp_path / "one", "loss", "grad_norm"),
                              metrics(tmp_path / "two", "loss", "grad_norm")):
        assert ((a is None and b is None)
                or (b == pytest.approx(a, rel=1e-5) and y == pytest.approx(x, rel=1e-4)))
    rows = make_windows().rows(0, 4)
    assert Ranks(0, 2, None).rows(rows) + Ranks(1, 2, None).rows(rows) == rows


@pytest.mark.slow
def test_three_ranks_resume_bit_exactly(tmp_path):
    """The order in which three numbers are added matters, and DDP's is that of its buckets."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"steps": 8, "batch-size": 6, "save-every": 4}
    for out in (whole, parts):
        result = launch("pretrain.py", *pretrain_arguments(tiny(), out, **options), processes=3)
        assert result.returncode == 0, result.stderr
    shutil.rmtree(parts / "state" / "step-8")
    unfinish(parts)
    result = launch("pretrain.py", *pretrain_arguments(tiny(), parts, **options), "--resume", processes=3)
    assert result.returncode == 0, result.stderr
    assert_same_run(whole, parts)


def test_micro_batches_and_steps_may_differ_only_where_they_may(tmp_path, capsys):
    assert run("pretrain", *pretrain_arguments(tiny(), tmp_path, steps=6)) == 0
    assert run("pretrain", *pretrain_arguments(tiny(), tmp_path, steps=6)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run("pretrain", *pretrain_arguments(tiny(), tmp_path, steps=8)) == 2
    assert "a finished run" in capsys.readouterr().err
    # More steps: goes on.
    assert run("pretrain", *pretrain_arguments(tiny(), tmp_path, steps=8), "--resume") == 0
    assert run("pretrain", *pretrain_arguments(tiny(), tmp_path, steps=9, lr=1e-4), "--resume") == 2
    assert "--lr" in capsys.readouterr().err
    assert run("pretrain", *pretrain_arguments(tiny(), tmp_path, steps=3), "--overwrite") == 0
    assert json.loads((tmp_path / "run.json").read_text())["step"] == 3


def test_overwriting_through_a_link_leaves_no_state_of_the_old_run(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "run.json").write_text(
        '{"stage": "", "options": {}, "inputs": {}, "finished": true, "seconds": 0}')
    (tmp_path / "elsewhere" / "state" / "step-900").mkdir(parents=True)
    (tmp_path / "elsewhere" / "state" / "step-900" / "state.json").write_text("{}")
    assert run("pretrain", *pretrain_arguments(tiny(), tmp_path / "out", steps=3), "--overwrite") == 0
    assert newest_state(tmp_path / "out").name == "step-3"


def test_patience_stops_early_and_exports_the_best(tmp_path):
    arguments = pretrain_arguments(tiny(), tmp_path,
                                   **{"steps": 400, "lr": 0.3, "eval-every": 2, "patience": 3})
    assert run("pretrain", *arguments) == 0
    evaluations = [v for step, v in metrics(tmp_path, "step", "valid_loss") if v is not None]
    assert len(evaluations) < 200 and min(evaluations) == evaluations[-4]
    best, exported = (load_file(tmp_path / "state" / "best.safetensors"),
                      load_file(tmp_path / "model.safetensors"))
    assert all(torch.equal(best[k], exported[k]) for k in best)
    before, lines = (tmp_path / "model.safetensors").read_bytes(), metrics(tmp_path, "step", "loss")
    (tmp_path / "model.safetensors").unlink()  # as if killed between its last state and its export
    unfinish(tmp_path)
    assert run("pretrain", *arguments, "--resume") == 0
    assert ((tmp_path / "model.safetensors").read_bytes() == before
            and metrics(tmp_path, "step", "loss") == lines)


def test_training_lowers_bits_per_byte_in_both_languages():
    first, last = [bits for bits, in metrics(tiny() / "base", "bits_per_byte") if bits]
    assert first.keys() == last.keys() == {"en", "zh"} and all(last[k] < first[k] for k in last)
