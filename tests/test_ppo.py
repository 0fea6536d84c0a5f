"""What ppo.py promises: its sums are the papers', its ratios start at 1, ranks agree, resume is exact."""

import contextlib
import dataclasses
import json
import math
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import ppo
import reward
from model import (Ranks, RewardModel, autocast, choose_dtype, load_folder, newest_state, read_safetensors,
                   save_folder)
from test_pretrain import assert_same_run, metrics
from tiny import ROOT, command_line, environment, launch, run, tiny, write_jsonl
from tokenizer import InputError, Tokenizer

torch.set_num_threads(1)
ONE = Ranks(0, 1, torch.device("cpu"))
FLOATS = st.floats(-3, 3, width=32)


def reward_folder():
    """A reward model nobody trained: the base model's decoder and a seeded head."""
    folder = tiny() / "reward-of-ppo"
    if not folder.exists():
        base, tokenizer = load_folder(tiny() / "base")
        reward = RewardModel(base.config)
        reward.model, reward.source, reward.stored_dtype = base.model, base.source, base.stored_dtype
        torch.nn.init.normal_(reward.score.weight, std=0.2, generator=torch.Generator().manual_seed(1))
        save_folder(folder, reward, tokenizer)
    return folder


def ppo_arguments(out, **options):
    settings = {"model": tiny() / "base", "data": tiny() / "prompts.jsonl", "steps": 3, "batch-size": 8,
                "minibatch": 4, "max-length": 48, "max-new-tokens": 8, "critic-warmup": 0, "lr": 1e-3,
                "save-every": 2,
                "dtype": "fp32", "device": "cpu", "reward": reward_folder()} | options
    given = {name: value for name, value in settings.items() if value != ""}
    return ["--out", out, *(x for name, value in given.items() for x in (f"--{name}", value))]


def rules(tmp_path, body="answer.count('e') / 10"):
    path = tmp_path / "rules.py"
    path.write_text(f"def score(prompt, answer, meta):\n    return {{'gold': {body}}}\n")
    return f"{path}:score"


def options(**changes):
    return ppo.Options(model="", data=[], out="", **changes)


def answers_of(lengths, prompt=3, finished=True):
    """Answers of random ids, of these lengths, to prompts of different length."""
    rng = np.random.default_rng(0)
    return [ppo.Answer(rng.integers(30, 300, prompt + i + n).tolist(), n, "", finished, 0.0)
            for i, n in enumerate(lengths)]


def lines(out, name="samples.jsonl"):
    return [json.loads(line) for line in (out / name).read_text("utf-8").splitlines()]


@settings(max_examples=40)
@given(st.lists(st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=6), min_size=1, max_size=4),
       st.floats(0, 1), st.floats(0, 1))
def test_advantages_are_the_discounted_sum_of_deltas_up_to_the_answers_end(rows, gamma, lam):
    width = max(map(len, rows))
    rewards, values = (torch.tensor([[pair[i] for pair in row] + [0.0] * (width - len(row)) for row in rows],
                                    dtype=torch.float64) for i in (0, 1))
    found = ppo.generalized_advantages(rewards, values, gamma, lam)
    for b, row in enumerate(rows):
        value = [v for _, v in row] + [0.0]
        delta = [r + gamma * value[t + 1] - value[t] for t, (r, _) in enumerate(row)]
        for t in range(len(row)):  # Schulman et al. 2016, eq. 16, as it is written
            wanted = sum((gamma * lam) ** k * delta[t + k] for k in range(len(row) - t))
            assert found[b, t].item() == pytest.approx(wanted, abs=1e-9)
        assert not found[b, len(row) :].any()


def test_the_losses_are_the_papers():
    rng = np.random.default_rng(1)
    new, old, advantages, values, before, returns = rng.normal(0, 0.5, (6, 3, 5))
    mask = rng.random((3, 5)) < 0.7
    total, outside = np.zeros(2), False
    for i in np.argwhere(mask):
        i = tuple(i)
        ratio = math.exp(new[i] - old[i])
        total[0] -= min(ratio * advantages[i], min(max(ratio, 0.8), 1.2) * advantages[i])
        clipped = before[i] + min(max(values[i] - before[i], -0.3), 0.3)
        total[1] += 0.5 * max((values[i] - returns[i]) ** 2, (clipped - returns[i]) ** 2)
    new, old, advantages, values, before, returns = map(torch.tensor, (new, old, advantages, values, before,
                                                                       returns))
    mask, tokens = torch.tensor(mask), 11
    policy, ratio = ppo.policy_loss(new, old, advantages, mask, tokens, 0.2)
    critic = ppo.value_loss(values, before, returns, mask, tokens, 0.3)
    assert (policy.item(), critic.item()) == pytest.approx(tuple(total / tokens), rel=1e-12)
    assert ppo.policy_loss(new, old, advantages, mask & False, 0, 0.2)[0] == 0.0  # none trained: 0, not NaN


def test_a_token_pays_for_leaving_the_reference_and_the_last_one_gets_the_reward():
    logprobs = torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -1.0]])
    reference = torch.tensor([[-1.5, -1.0, 0.0], [-1.0, -1.0, -3.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    found = ppo.token_rewards(logprobs, reference, mask, torch.tensor([5.0, 7.0]), kl=0.1)
    torch.testing.assert_close(found, torch.tensor([[-0.05, 5.1, 0.0], [0.0, 0.0, 6.8]]))


def test_an_answer_without_its_end_is_fined():
    answers = [*answers_of([2]), *answers_of([2], finished=False)]
    answers[0].rule = 0.5
    assert ppo.answer_rewards(torch.tensor([1.0, 1.0]), answers, 3.0).tolist() == [1.5, -2.0]


def test_advantages_are_whitened_and_scores_normalised_over_the_whole_rollout():
    answers, setting = answers_of([1, 4, 2, 3]), options(kl=0.1)
    torch.manual_seed(0)
    mask = torch.arange(4) < torch.tensor([[1], [4], [2], [3]])
    rollout = {name: torch.randn(4, 4) * mask for name in ("logprobs", "reference", "values")}
    rollout |= {"scores": torch.tensor([1.0, 2.0, 3.0, 6.0]), "mask": mask}
    found = ppo.estimate(setting, {"score_mean": 3.0, "score_std": 2.0}, rollout, answers)
    assert found["rewards"].tolist() == [-1.0, -0.5, 0.0, 1.5]
    white = found["advantages"][mask]
    assert len(white) == 10 and white.mean().abs() < 1e-6
    assert (white**2).mean().item() == pytest.approx(1, abs=1e-5) and not found["advantages"][~mask].any()
    values = (rollout["values"][mask] - 3) / 2
    raw = (found["returns"][mask] - values).double().numpy()  # advantages before whitening
    np.testing.assert_allclose(white.numpy(), (raw - raw.mean()) / raw.std(), atol=1e-4)


def measured(answers, setting):
    policy, reference = (load_folder(tiny() / "base")[0] for _ in range(2))
    critic, reward = (load_folder(reward_folder(), kind=RewardModel)[0] for _ in range(2))
    models = ppo.Models(policy, reference, critic, reward, None, None, policy, critic)
    return ppo.measure(setting, ONE, models, answers, 0, 3, lambda: autocast(ONE.device, "fp32")), models


def test_the_reward_is_read_at_the_last_token_and_logprobs_where_each_token_is_predicted():
    answers = answers_of([1, 5, 3, 7])
    rollout, models = measured(answers, options(batch_size=4, minibatch=2))
    for n, answer in enumerate(answers):
        ids = torch.tensor([answer.ids])
        with torch.no_grad():
            scores = models.reward(ids)[0]
            logprobs = models.policy(ids)[0].log_softmax(-1)  # (T, V)
        wanted = [logprobs[t - 1, answer.ids[t]].item() for t in range(-answer.length, 0)]
        assert rollout["scores"][n].item() == pytest.approx(scores[-1].item(), abs=1e-5)
        assert rollout["logprobs"][n, : answer.length].tolist() == pytest.approx(wanted, abs=1e-5)
        assert not rollout["logprobs"][n, answer.length :].any()
    assert torch.equal(rollout["logprobs"], rollout["reference"])


def test_the_value_of_a_token_is_given_before_it_is_seen():
    setting, answers = options(batch_size=1, minibatch=1), answers_of([6])
    before = measured(answers, setting)[0]["values"][0]
    answers[0].ids[-3] += 1  # the answer's token 3 of 0 to 5
    after = measured(answers, setting)[0]["values"][0]
    assert torch.equal(before[:4], after[:4]) and (before[4:] != after[4:]).all()


def test_every_epoch_has_every_prompt_once_and_every_inner_epoch_every_row():
    setting = options(batch_size=4, minibatch=2, seed=3)
    order = [p for step in range(10) for p in ppo.step_prompts(setting, list(range(20)), step)]
    assert sorted(order[:20]) == sorted(order[20:]) == list(range(20)) and order[:20] != order[20:]
    epochs = [ppo.minibatches(setting, step, inner) for step in range(4) for inner in range(2)]
    assert all(sorted(sum(e, [])) == [0, 1, 2, 3] and len(e) == 2 for e in epochs)
    assert len(set(map(str, epochs))) > 4


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_first_ratio_is_exactly_one_and_the_first_kl_exactly_zero(tmp_path, dtype):
    assert run("ppo", *ppo_arguments(tmp_path / "out", dtype=dtype, **{"micro-batch": 2})) == 0
    found = metrics(tmp_path / "out", "ratio_first", "kl")
    assert [ratio for ratio, _ in found] == [1.0, 1.0, 1.0] and found[0][1] == 0.0
    assert all(kl != 0.0 for _, kl in found[1:])
    assert {line["kl"] for line in lines(tmp_path / "out") if line["step"] == 1} == {0.0}


def test_the_old_logprobs_come_from_the_very_batches_that_are_trained_first():
    setting, context = options(batch_size=8, minibatch=4, micro_batch=2), contextlib.nullcontext
    answers = answers_of([1, 20, 3, 7, 30, 2, 5, 9])
    policy, reference = (load_folder(tiny() / "base")[0] for _ in range(2))
    critic, rewarder = (load_folder(reward_folder(), kind=RewardModel)[0] for _ in range(2))
    models, seen = ppo.prepare_models(setting, ONE, "fp32", policy, reference, critic, rewarder), []
    policy.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    record = {"score_mean": 0.0, "score_std": 1.0}
    for step in (3, 4):
        seen.clear()
        rollout = ppo.measure(setting, ONE, models, answers, step, 3, context)
        rollout = ppo.estimate(setting, record, rollout, answers)
        figures = ppo.train_step(setting, ONE, models, answers, rollout, step, 3, context, record)
        assert len(seen) == 12 and all(map(torch.equal, seen[:4], seen[4:8]))
        assert figures["ratio_first"] == 1.0


def test_scores_are_normalised_by_those_of_the_first_rollout_all_along(tmp_path):
    assert run("ppo", *ppo_arguments(tmp_path / "out")) == 0
    first = np.array([s["rm_reward"] for s in lines(tmp_path / "out") if s["step"] == 1])
    for step, reward_mean, rm_reward, finished in metrics(tmp_path / "out", "step", "reward", "rm_reward",
                                                          "finished"):
        wanted = (rm_reward - first.mean()) / first.std() - 3 * (1 - finished)
        assert reward_mean == pytest.approx(wanted, abs=1e-4)


def test_while_the_critic_warms_up_the_policy_stays_as_it_was(tmp_path):
    assert run("ppo", *ppo_arguments(tmp_path / "out", **{"critic-warmup": 3})) == 0
    folders = tmp_path / "out", tiny() / "base", reward_folder()
    after, before, reward = (read_safetensors(f / "model.safetensors") for f in folders)
    assert all(torch.equal(after[name], before[name]) for name in before)
    state = read_safetensors(newest_state(tmp_path / "out") / "tensors.safetensors")
    assert not torch.equal(state["critic.score.weight.weight"], reward["score.weight"])
    assert metrics(tmp_path / "out", "loss", "ratio_first", "lr") == [[None, None, 0.0]] * 3


def test_two_ranks_and_small_micro_batches_equal_one(tmp_path):
    assert run("ppo", *ppo_arguments(tmp_path / "one")) == 0
    assert run("ppo", *ppo_arguments(tmp_path / "small", **{"micro-batch": 1})) == 0
    result = launch("ppo.py", *ppo_arguments(tmp_path / "two"), processes=2)
    assert result.returncode == 0, result.stderr
    names = ("loss", "value_loss", "reward", "rm_reward", "kl", "clip_fraction", "value_explained",
             "grad_norm", "critic_grad_norm", "answer_tokens", "finished", "tokens")
    texts, figures = zip(*[([(s["step"], s["answer"]) for s in lines(tmp_path / name)],
                            np.array(metrics(tmp_path / name, *names), float))
                           for name in ("one", "small", "two")])
    assert len(texts[0]) == 24 and texts[0] == texts[1] == texts[2]
    assert len({text for _, text in texts[0]}) > 12  # ranks and rows draw numbers of their own
    for other in figures[1:]:
        np.testing.assert_allclose(other, figures[0], atol=1e-4)


def test_stopped_and_resumed_is_bit_exact(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    setting = {"steps": 12, "critic-warmup": 1, "save-every": 1}
    assert run("ppo", *ppo_arguments(whole, **setting)) == 0
    process = subprocess.Popen(command_line("ppo.py", *ppo_arguments(parts, **setting)), cwd=ROOT,
                               env=environment(), stderr=subprocess.PIPE, text=True)
    while not newest_state(parts):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "--resume" in message, message
    with open(parts / "samples.jsonl", "ab") as file:  # as if killed within 猫, while a rollout was written
        file.write(b'{"step": 12, "answer": "killed"}\n' + '{"step": 13, "answer": "猫'.encode()[:-1])
    assert run("ppo", *ppo_arguments(parts, **setting), "--resume") == 0
    assert_same_run(whole, parts)
    assert (whole / "samples.jsonl").read_bytes() == (parts / "samples.jsonl").read_bytes()
    names = "kl", "reward", "rm_reward", "value_loss", "ratio_first", "critic_grad_norm", "value_explained"
    assert metrics(whole, *names) == metrics(parts, *names)


def test_rules_that_fail_are_told_by_all_ranks_once_they_have_met(tmp_path, capsys):
    """Or those whose own answers were fine would wait for the one that left."""
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Hi", "meta": {"n": 1}}, {"prompt": "Ahoy!"}])
    arguments = ppo_arguments(tmp_path / "out", data=prompts, reward="", rules=rules(tmp_path, "1 / len(meta)"),
                              **{"steps": 1, "batch-size": 2, "minibatch": 2, "critic-warmup": 0})
    assert run("ppo", *arguments) == 2
    assert "--rules" in capsys.readouterr().err.splitlines()[-1]
    result = launch("ppo.py", *arguments, "--overwrite", processes=2)
    own = [line for line in result.stderr.splitlines() if line.startswith("ppo.py: --rules")]
    assert result.returncode and own and "Connection closed" not in result.stderr


def test_rules_alone_are_learnt_and_a_price_on_kl_keeps_the_policy_near(tmp_path):
    setting = {"reward": "", "rules": rules(tmp_path), "steps": 30, "batch-size": 16, "minibatch": 8,
               "critic-warmup": 2, "missing-end-penalty": 0, "lr": 2e-3}
    assert run("ppo", *ppo_arguments(tmp_path / "free", kl=0, **setting)) == 0
    assert run("ppo", *ppo_arguments(tmp_path / "held", kl=1, **setting)) == 0
    free, held = (np.array(metrics(tmp_path / name, "reward", "kl"), float) for name in ("free", "held"))
    assert free[-5:, 0].mean() > 2 * free[:5, 0].mean() > 0
    assert held[-5:, 1].mean() < 0.5 * free[-5:, 1].mean()
    last = lines(tmp_path / "free")[-1]
    assert last["rule"] == last["answer"].count("e") / 10 and last["rm_reward"] is None and last["meta"]


def test_the_folder_answers_alike_in_transformers(tmp_path):
    from transformers import AutoModelForCausalLM
    assert run("ppo", *ppo_arguments(tmp_path / "out", steps=1)) == 0
    ours, tokenizer = load_folder(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([tokenizer.encode("The owl sleeps. 猫睡在湖边。")])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(ours(ids), load_folder(tiny() / "base")[0](ids), atol=1e-3)


def test_prompts_that_do_not_fit_or_make_no_sense_are_counted_or_named(tmp_path, capsys):
    tokenizer, counts = Tokenizer.load(tiny() / "tokenizer"), {"bad": 0, "held_out": 0, "too_long": 0}
    user = {"role": "user", "content": "Hi"}
    bad = [{"text": "Hi"}, {"prompt": []}, {"prompt": 5}, {"prompt": [{"role": "wizard", "content": "Hi"}]},
           {"prompt": [user, {"role": "assistant", "content": "Ahoy!"}]}, {"prompt": "Hi", "meta": 5}]
    file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Hi"}, {"prompt": "by the lake " * 60}, *bad])
    with file.open("a") as lines:
        lines.write('{"prompt": "H')
    options = ppo.Options(model="", data=[], out="", max_length=64, skip_bad=True)
    found = ppo.read_prompts([file], tokenizer, options, counts)
    assert counts == {"bad": len(bad) + 1, "held_out": 0, "too_long": 1}
    assert [p.prompt for p in found] == ["Hi"] and found[0].meta == {}
    with pytest.raises(InputError, match="p.jsonl:3"):
        ppo.read_prompts([file], tokenizer, dataclasses.replace(options, skip_bad=False), counts)
    assert run("ppo", *ppo_arguments(tmp_path / "out", data=file, steps=1), "--skip-bad") == 0
    assert "left out: 7 bad, 0 held out, 1 too long" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "run.json").read_text())["left_out"] == {
        "bad": 7, "held_out": 0, "too_long": 1}


def test_the_training_part_is_what_the_reward_model_trains_on(tmp_path):
    questions = [f"Where is house {n}?" for n in range(300)]
    pairs = [{"prompt": q, "chosen": "Here.", "rejected": "No."} for q in questions]
    pairs = write_jsonl(tmp_path / "p.jsonl", pairs)
    counts = {"bad": 0, "held_out": 0, "too_long": 0, "no_pair": 0}
    tokenizer = Tokenizer.load(tiny() / "tokenizer")
    options = ppo.Options(model="", data=[], out="", train_part=True)
    asked = {p.prompt for p in ppo.read_prompts([pairs], tokenizer, options, counts)}
    theirs = reward.Options(model="", data=[str(pairs)], out="")
    train, valid = reward.split_rankings(theirs, tokenizer, counts)
    assert asked == {r.record["prompt"] for r in train} and counts["held_out"] == len(valid) > 0


@pytest.mark.parametrize("changes, extra, expected", [
    ({}, ["--top-k", "5"], "--top-k: PPO samples at temperature 1"),
    ({}, ["--top-p=0.9"], "--top-p: PPO samples"),
    ({}, ["--min-p", "0.1"], "--min-p: PPO samples"),
    ({}, ["--temperature", "0.7"], "--temperature: PPO samples"),
    ({"reward": ""}, [], "--reward FOLDER"),
    ({"batch-size": 6}, [], "--batch-size 6 does not divide"),
    ({"max-length": 40000}, [], "context"),
    ({"rules": "RULES"}, [], "KeyError('word') at the answer"),
    ({"reward": tiny() / "base"}, [], "Qwen3ForSequenceClassification"),
])
def test_what_cannot_work_is_refused_in_one_line(tmp_path, capsys, changes, extra, expected):
    if "rules" in changes:
        changes = {"rules": rules(tmp_path, "meta['word']")}
    assert run("ppo", *ppo_arguments(tmp_path / "out", **changes), *extra) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("ppo.py: ") and expected in message


def test_the_probed_dtype_is_kept_for_when_the_run_is_resumed(tmp_path):
    (tmp_path / "out").mkdir()
    options, record = ppo.Options(model="", data=[], out=str(tmp_path / "out")), {"stage": "ppo"}
    chosen = choose_dtype(options, ONE, record)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["dtype"] == chosen


def test_a_quantized_model_is_refused_in_one_line(tmp_path, capsys):
    assert run("quantize", "--model", tiny() / "base", "--out", tmp_path / "int4", "--group", 16) == 0
    changes = {"model": tmp_path / "int4", "reward": "", "rules": rules(tmp_path)}
    assert run("ppo", *ppo_arguments(tmp_path / "out", **changes)) == 2
    assert "quantized" in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "out").exists()


def test_meta_may_hold_half_of_a_surrogate_pair(tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"prompt": "Hi", "meta": {"x": "\\ud83d"}}\n')
    assert run("ppo", *ppo_arguments(tmp_path / "out", data=tmp_path / "odd.jsonl", steps=1)) == 0
    assert '\\ud83d' in (tmp_path / "out" / "samples.jsonl").read_text()
