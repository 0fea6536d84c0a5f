"""What pretrain.py promises: exact loss, exact resume, one rank = many ranks, nothing lost when killed."""

import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import pretrain
from model import CausalLM, Ranks, autocast, load_folder, newest_state, read_json
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


def forget_the_last_state(out):
    """As if the run had been killed after the state before."""
    shutil.rmtree(newest_state(out))
    unfinish(out)


def options_of(out="", **options):
    return pretrain.parse_options(pretrain.Options, [str(a) for a in arguments_of(out, **options)])


def step_gradients(model, batches, **options):
    """train_step on one rank in fp32: (loss, tokens, sums)."""
    return pretrain.train_step(model, batches, ONE, lambda: autocast(ONE.device, "fp32"), 1.0,
                               options_of(**options), shards=2)


def arguments_of(out, **options):
    """pretrain_arguments; an option that is None stands alone."""
    return [a for a in pretrain_arguments(tiny(), out, **options) if a is not None]


def going_on(folder, **options):
    """Arguments that go on from FOLDER/model to FOLDER/out, with its own shape."""
    settings = {"model": folder / "model", "data": tiny() / "tokens", "out": folder / "out", "steps": 2,
                "max-length": 64, "batch-size": 4, "dtype": "fp32", "device": "cpu"} | options
    return ["--no-compile", *(x for name, value in settings.items() for x in (f"--{name}", value))]


def make_windows(seed=1):
    tokenizer = Tokenizer.load(tiny() / "tokenizer")
    return pretrain.Windows(read_tokens(tiny() / "tokens", "train", tokenizer), 64, tokenizer, seed)


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
    ids, positions, documents, targets, *_ = make_windows().batch([0, 1])
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
        loss, _, _ = step_gradients(model, batches)
        gradients.append((loss, model.model.layers[0].mlp.up_proj.weight.grad.clone()))
        model.zero_grad()
    for loss, gradient in gradients[1:]:
        assert loss == pytest.approx(gradients[0][0], rel=1e-6)
        torch.testing.assert_close(gradient, gradients[0][1], atol=1e-7, rtol=1e-4)


def test_a_batch_without_a_target_has_loss_zero_and_no_nan():
    model, _ = load_folder(tiny() / "base")
    batch = make_windows().batch([0])
    batch[3] = torch.full_like(batch[3], -1)
    loss, tokens, _ = step_gradients(model, [batch])
    assert loss == 0.0 and tokens == 0 and all(p.grad.isfinite().all() for p in model.parameters())


def test_it_learns_one_window_by_heart(tmp_path):
    model, _, _ = pretrain.start(options_of(tmp_path))
    optimizer, batch = torch.optim.AdamW(model.parameters(), lr=1e-2), make_windows().batch([1])
    for _ in range(120):
        optimizer.zero_grad()
        loss, _, _ = step_gradients(model, [batch])
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


@pytest.mark.parametrize("deaths", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_nothing_is_lost(tmp_path, deaths):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = {"steps": 80 * deaths, "save-every": 4, "eval-every": 200}
    assert run("pretrain", *pretrain_arguments(tiny(), whole, **arguments)) == 0
    rng = random.Random(0)
    for death in range(deaths):
        process = subprocess.Popen(
            command_line("pretrain.py", *pretrain_arguments(tiny(), killed, **arguments), "--resume"),
            cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
        known = newest_state(killed)
        while process.poll() is None and newest_state(killed) == known:
            time.sleep(0.005)
        if death % 2:  # while a state is being written, else somewhere between two
            while process.poll() is None and not list((killed / "state").glob("tmp-*")):
                time.sleep(0.0005)
        else:
            time.sleep(rng.uniform(0, 0.15))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed: make it longer"
    assert run("pretrain", *pretrain_arguments(tiny(), killed, **arguments), "--resume") == 0
    assert_same_run(whole, killed)


EVERYTHING = {"optimizer": "muon", "num-experts": 4, "dropout": 0.2, "z-loss": 1e-3, "l1": 1e-5, "l2": 1e-4,
              "micro-batch": 2, "checkpointing": None, "sample-every": 3}


@pytest.mark.parametrize("options", [EVERYTHING, {"state": "sharded"}], ids=["everything", "sharded"])
def test_resumed_with_every_option_is_bit_exact(tmp_path, options):
    options = {"steps": 6, "save-every": 3, "eval-every": 3} | options
    for out in ("whole", "parts"):
        assert run("pretrain", *arguments_of(tmp_path / out, **options)) == 0
    forget_the_last_state(tmp_path / "parts")
    assert run("pretrain", *arguments_of(tmp_path / "parts", **options), "--resume") == 0
    names = ("loss", "grad_norm", "bits_per_byte", "loss_by_source", "z_loss", "router_balance",
             "expert_tokens", "samples", "spike")
    assert metrics(tmp_path / "whole", *names) == metrics(tmp_path / "parts", *names)
    models = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("whole", "parts")]
    assert models[0] == models[1]


@pytest.mark.parametrize("state", ["whole", "sharded"])
def test_a_full_disk_leaves_the_last_state_whole(tmp_path, capsys, state):
    options = {"steps": 8, "save-every": 4, "state": state}
    for out in ("whole", "parts"):
        assert run("pretrain", *pretrain_arguments(tiny(), tmp_path / out, **options)) == 0
    forget_the_last_state(tmp_path / "parts")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, unlimited[1]))  # a state is larger
    try:
        assert run("pretrain", *pretrain_arguments(tiny(), tmp_path / "parts", **options), "--resume") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert "not written" in capsys.readouterr().err.splitlines()[-1]
    assert newest_state(tmp_path / "parts").name == "step-4"
    assert run("pretrain", *pretrain_arguments(tiny(), tmp_path / "parts", **options), "--resume") == 0
    assert metrics(tmp_path / "whole", "loss") == metrics(tmp_path / "parts", "loss")


def test_a_run_that_fails_leaves_the_state_that_it_was_writing(tmp_path, capsys):
    """Shards are written while training goes on: here until three losses in a row are not finite."""
    options = {"steps": 8, "save-every": 2, "state": "sharded", "lr": "inf", "warmup": 0}
    assert run("pretrain", *pretrain_arguments(tiny(), tmp_path, **options)) == 2
    assert "three steps in a row" in capsys.readouterr().err
    assert newest_state(tmp_path).name == "step-2" and not list((tmp_path / "state").glob("tmp-*"))


def test_a_validation_without_text_has_no_figure_and_is_not_the_best():
    model, tokenizer = load_folder(tiny() / "base")
    context = lambda: autocast(ONE.device, "fp32")
    bits, mean = pretrain.validate(model, tokenizer, [], options_of(), ONE, context)
    assert bits == {} and np.isnan(mean)


def test_changed_data_is_refused_unless_it_is_said(tmp_path, capsys):
    shutil.copytree(tiny() / "tokens", tmp_path / "tokens")
    options = {"steps": 6, "data": tmp_path / "tokens"}
    assert run("pretrain", *pretrain_arguments(tiny(), tmp_path / "out", **options)) == 0
    file = tmp_path / "tokens" / "train" / "web.en-00000.bin"
    data = bytearray(file.read_bytes())
    data[2:4] = data[4:6]  # another token, in as many
    file.write_bytes(data)
    options["steps"] = 8
    assert run("pretrain", *pretrain_arguments(tiny(), tmp_path / "out", **options), "--resume") == 2
    assert "--new-data" in capsys.readouterr().err
    assert run("pretrain", *pretrain_arguments(tiny(), tmp_path / "out", **options), "--resume",
               "--new-data") == 0
    options = {"steps": 9, "data": shutil.move(tmp_path / "tokens", tmp_path / "elsewhere")}
    assert run("pretrain", *pretrain_arguments(tiny(), tmp_path / "out", **options), "--resume") == 2
    assert "--data" in capsys.readouterr().err
    assert run("pretrain", *pretrain_arguments(tiny(), tmp_path / "out", **options), "--resume",
               "--new-data") == 0
    options["steps"] = 10
    assert run("pretrain", *pretrain_arguments(tiny(), tmp_path / "out", **options), "--resume") == 0


def test_the_best_on_other_data_is_no_best_on_new_data(tmp_path):
    shutil.copytree(tiny() / "tokens", tmp_path / "tokens")
    options = {"steps": 4, "eval-every": 2, "patience": 9, "data": tmp_path / "tokens"}
    assert run("pretrain", *pretrain_arguments(tiny(), tmp_path / "out", **options)) == 0
    before = load_file(tmp_path / "out" / "state" / "best.safetensors")
    for file in (tmp_path / "tokens").glob("*/*.bin"):  # text that is harder: in no order
        tokens = np.fromfile(file, "<u2")
        np.random.default_rng(1).permutation(tokens).tofile(file)
    options["steps"] = 6
    assert run("pretrain", *pretrain_arguments(tiny(), tmp_path / "out", **options), "--resume", "--new-data") == 0
    losses = [loss for loss, in metrics(tmp_path / "out", "valid_loss") if loss is not None]
    after = load_file(tmp_path / "out" / "state" / "best.safetensors")
    assert losses[2] > min(losses[:2]) and any(not torch.equal(before[k], after[k]) for k in before)


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


@pytest.mark.parametrize("processes, state, dtype, tolerance", [
    (2, "whole", "fp32", 1e-5),
    pytest.param(2, "sharded", "fp32", 1e-5, marks=pytest.mark.slow),
    pytest.param(4, "whole", "fp32", 1e-5, marks=pytest.mark.slow),
    pytest.param(2, "whole", "bf16", 5e-4, marks=pytest.mark.slow)])
def test_fsdp_shares_the_model_and_gives_one_ranks_losses(tmp_path, processes, state, dtype, tolerance):
    """And goes on with another number of ranks: many, one, many."""
    one, many = tmp_path / "one", tmp_path / "many"
    options = {"steps": 8, "save-every": 4, "eval-every": 4, "state": state, "dtype": dtype}
    for steps in (8, 12):
        options["steps"] = steps
        assert run("pretrain", *pretrain_arguments(tiny(), one, **options), "--resume") == 0
    options |= {"parallel": "fsdp", "steps": 8}
    result = launch("pretrain.py", *pretrain_arguments(tiny(), many, **options), processes=processes)
    assert result.returncode == 0, result.stderr
    whole = sum(tensor.numel() for tensor in load_file(many / "model.safetensors").values())
    held = int(result.stderr.partition(" of them on a rank")[0].split()[-1].replace(",", ""))
    assert whole / processes <= held < 1.05 * whole / processes
    forget_the_last_state(many)
    assert run("pretrain", *pretrain_arguments(tiny(), many, **options), "--resume") == 0
    options["steps"] = 12
    result = launch("pretrain.py", *pretrain_arguments(tiny(), many, **options), "--resume",
                    processes=processes)
    assert result.returncode == 0, result.stderr
    for name in ("loss", "grad_norm", "valid_loss"):
        (expected, found) = (dict(metrics(out, "step", name)) for out in (one, many))
        assert len(expected) == 12 and found == pytest.approx(expected, abs=4 * tolerance
                                                              if name == "grad_norm" else tolerance)


@pytest.mark.slow
def test_torchrun_starts_again_after_a_killed_worker(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = {"steps": 300, "save-every": 20, "eval-every": 300}
    arguments = [*pretrain_arguments(tiny(), killed, **options), "--resume"]
    assert launch("pretrain.py", *pretrain_arguments(tiny(), whole, **options), processes=2).returncode == 0
    command = command_line("pretrain.py", *arguments, processes=2)
    command.insert(command.index("torch.distributed.run") + 1, "--max-restarts=1")
    torchrun = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    while not newest_state(killed):
        time.sleep(0.01)
    workers = subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(torchrun.pid)], text=True)
    os.kill(int(workers.split()[-1]), signal.SIGKILL)
    assert torchrun.wait(timeout=300) == 0
    assert_same_run(whole, killed)


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


def test_one_step_of_a_loaded_model_without_a_rate_changes_nothing(tmp_path):
    shutil.copytree(tiny() / "base", tmp_path / "model")  # made somebody else's: no run.json, bf16
    (tmp_path / "model" / "run.json").unlink()
    weights = load_file(tmp_path / "model" / "model.safetensors")
    before = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(before, tmp_path / "model" / "model.safetensors")
    assert run("pretrain", *going_on(tmp_path, steps=1, lr=0)) == 0
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(after[k].dtype == torch.bfloat16 and torch.equal(after[k], before[k]) for k in before)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "model" / name).read_bytes(), name
    assert read_json(tmp_path / "out" / "run.json")["stage"] == "continue"


def test_a_raised_base_makes_room_for_longer_windows(tmp_path, capsys):
    shutil.copytree(tiny() / "base", tmp_path / "model")
    assert run("pretrain", *going_on(tmp_path, steps=1, **{"max-length": 96})) == 2
    assert "--rope-theta" in capsys.readouterr().err
    assert run("pretrain", *going_on(tmp_path, steps=1, **{"max-length": 96, "rope-theta": 50000})) == 0
    model, _ = load_folder(tmp_path / "out")
    raw = read_json(tmp_path / "out" / "config.json")
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == model.config.rope_theta == 50000.0
    assert model.config.max_position_embeddings == 96 and raw["hidden_size"] == 32


@pytest.mark.parametrize("rows", [360, 384])  # Qwen's models have rows to spare
def test_added_tokens_start_at_the_mean_and_leave_the_others_alone(tmp_path, rows):
    shutil.copytree(tiny() / "base", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.embed_tokens.weight"] = torch.nn.functional.pad(
        weights["model.embed_tokens.weight"], (0, 0, 0, rows - 360), value=7.0)
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    config = read_json(tmp_path / "model" / "config.json") | {"vocab_size": rows}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    shutil.copytree(tiny() / "tokenizer", tmp_path / "longer")
    shutil.copytree(tiny() / "tokens", tmp_path / "tokens")
    own = read_json(tmp_path / "longer" / "tokenizer.json")
    own["added_tokens"].append(own["added_tokens"][0] | {"id": 360, "content": "<|new|>"})
    (tmp_path / "longer" / "tokenizer.json").write_text(json.dumps(own))
    index = read_json(tmp_path / "tokens" / "index.json")
    index["tokenizer"] = Tokenizer.load(tmp_path / "longer").hash
    (tmp_path / "tokens" / "index.json").write_text(json.dumps(index))
    assert run("pretrain", *going_on(tmp_path, steps=1, lr=0, tokenizer=tmp_path / "longer",
                                     data=tmp_path / "tokens")) == 0
    (before, _), (after, tokenizer) = load_folder(tmp_path / "model"), load_folder(tmp_path / "out")
    ids = torch.tensor([[0, 40, 50]])
    torch.testing.assert_close(after(ids)[..., :360], before(ids)[..., :360])
    torch.testing.assert_close(after.lm_head.weight[360], before.lm_head.weight[:360].mean(0))
    assert tokenizer.vocab_size == 361 and after.config.vocab_size == max(rows, 361)


@given(rows=st.integers(1, 24), columns=st.integers(1, 24), seed=st.integers(0, 99))
def test_orthogonalise_brings_every_singular_value_near_one(rows, columns, seed):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    x = pretrain.orthogonalise(matrix)
    found = (left.T @ x @ right.T).diagonal()  # the singular vectors stay
    assert torch.all((0.6 < found) & (found < 1.3)) or values.min() < 0.02 * values.norm()


def test_muon_learns_and_its_matrices_have_no_second_moment(tmp_path):
    assert run("pretrain", *pretrain_arguments(tiny(), tmp_path, optimizer="muon")) == 0
    losses = [loss for loss, in metrics(tmp_path, "loss") if loss]
    state = load_file(newest_state(tmp_path) / "tensors.safetensors")
    assert losses[-1] < losses[0] - 0.5
    assert {"model.model.layers.0.mlp.up_proj.weight.momentum_buffer",
            "model.model.embed_tokens.weight.exp_avg_sq"} < state.keys()
    assert not [name for name in state if "_proj.weight.exp_avg" in name]


def test_z_loss_is_the_squared_log_of_the_softmaxs_sum():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
    targets = torch.tensor([[1, 2, -1, 4, 5], [6, 7, 8, 9, 10]])
    logits = hidden @ weight.T
    logprobs = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
    expected = np.log(np.exp(logits.numpy()).sum(-1))[targets.numpy() >= 0] ** 2
    found = pretrain.z_loss(hidden, weight, targets, logprobs, tokens=9)
    assert found.item() == pytest.approx(expected.mean(), rel=1e-5)


def test_penalties_add_their_gradients_to_matrices_only():
    model, _ = load_folder(tiny() / "base")
    batch, gradients = make_windows().batch([0, 1]), []
    for options in ({}, {"l1": 0.5, "l2": 0.25}):
        step_gradients(model, [batch], **options)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
    for name, p in model.named_parameters():
        added = 0.5 * p.sign() + 0.25 * p if p.dim() == 2 else torch.zeros_like(p)
        torch.testing.assert_close(gradients[1][name] - gradients[0][name], added, atol=1e-5, rtol=1e-5)


def test_dropout_is_for_training_only():
    model, _ = load_folder(tiny() / "base")
    ids = make_windows().batch([0])[0]
    before = model(ids)
    pretrain.add_hooks(options_of(dropout=0.5), model)
    assert not torch.equal(model(ids), before)
    with torch.no_grad():
        assert torch.equal(model(ids), before)


def test_the_losses_of_the_sources_add_up_to_the_loss():
    model, _ = load_folder(tiny() / "base")
    windows = make_windows()
    batches = [windows.batch([0, 1]), windows.batch([len(windows) - 1])]
    loss, tokens, sums = step_gradients(model, batches)
    nats, counted, text, size = sums["by_shard"].T
    assert nats.sum().item() / tokens == pytest.approx(loss, rel=1e-6) and counted.sum() == tokens
    assert (counted > 0).all() and (text < nats).all() and (size > counted).all()
    assert pretrain.figures(sums, windows.shards)["loss_by_source"].keys() == {"web.en", "web.zh"}


def test_a_jump_of_the_loss_is_flagged_and_its_noise_is_not():
    rng, record = random.Random(0), {}
    losses = [5 * 0.99**i + rng.gauss(0, 0.05) for i in range(300)]
    losses[200] += 2
    losses[250] = float("nan")
    flagged = []
    for i, loss in enumerate(losses):
        flagged += [i] * pretrain.spike(record, loss)
        record = json.loads(json.dumps(record))  # as if stopped and resumed
    assert flagged == [200, 250]


def test_the_plan_counts_what_a_step_holds():
    options = options_of(plan=None)
    planned = pretrain.plan(options)
    model, _, _ = pretrain.start(options)
    batch = make_windows().batch(range(4))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        kept = model(*batch[:3], targets=batch[3])
    events = measured.profiler.kineto_results.events()
    held = sum(event.nbytes() for event in events if event.name() == "[memory]")
    assert kept is not None and planned["memory"]["activations"] == pytest.approx(held, rel=0.02)
    step_gradients(model, [batch])
    optimizer = pretrain.make_optimizer(model, 0.1, 0.1, (0.9, 0.95))
    optimizer.step()
    sizes = {"weights": list(model.parameters()), "gradients": [p.grad for p in model.parameters()],
             "optimizer": [x for state in optimizer.state.values() for x in state.values() if x.dim()]}
    for part, tensors in sizes.items():
        assert planned["memory"][part] == sum(x.nbytes for x in tensors)
    shared = pretrain.plan(dataclasses.replace(options, parallel="fsdp", gpus=2))["memory"]
    assert shared["optimizer"] == planned["memory"]["optimizer"] // 2


def test_the_planned_operations_are_those_of_the_products():
    model = CausalLM(pretrain.shape(options_of(), 360))
    ids = torch.zeros(2, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # others are not counted
        model(ids, targets=ids).sum().backward()
    assert pretrain.flops_per_token(model.config, 64) * ids.numel() == counter.get_total_flops()


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
    # Fewer processes want smaller micro-batches.
    assert run("pretrain", *pretrain_arguments(tiny(), tmp_path, **{"steps": 4, "micro-batch": 2}), "--resume") == 0
    (tmp_path / "metrics.jsonl").write_bytes(b"\0\0\n")
    assert run("pretrain", *pretrain_arguments(tiny(), tmp_path, **{"steps": 5, "micro-batch": 2}), "--resume") == 2
    assert "metrics.jsonl: there are lines" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "state")  # a finished run that cannot go on is not begun anew
    assert run("pretrain", *pretrain_arguments(tiny(), tmp_path, **{"steps": 6, "micro-batch": 2}), "--resume") == 2


def test_overwriting_through_a_link_leaves_no_state_of_the_old_run(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "run.json").write_text(
        '{"stage": "", "options": {}, "inputs": {}, "finished": true, "seconds": 0}')
    (tmp_path / "elsewhere" / "state" / "step-900").mkdir(parents=True)
    (tmp_path / "elsewhere" / "state" / "step-900" / "state.json").write_text("{}")
    assert run("pretrain", *pretrain_arguments(tiny(), tmp_path / "out", steps=3), "--overwrite") == 0
    assert newest_state(tmp_path / "out").name == "step-3"


def test_patience_stops_early_and_exports_the_best(tmp_path, capsys):
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
    assert "makes no more" in capsys.readouterr().err


def test_training_lowers_bits_per_byte_in_both_languages():
    first, last = [bits for bits, in metrics(tiny() / "base", "bits_per_byte") if bits]
    assert first.keys() == last.keys() == {"en", "zh"} and all(last[k] < first[k] for k in last)
