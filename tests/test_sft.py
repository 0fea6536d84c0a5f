"""What sft.py promises: only answers are trained, packing changes nothing, transformers and peft load it."""

import json
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file

import sft
from model import Ranks, autocast, end_ids, eos_ids, generate, load_folder, newest_state, stop_ids
from test_pretrain import assert_same_run, metrics
from tiny import ROOT, command_line, dialogues, environment, launch, run, sft_arguments, tiny, write_jsonl
from tokenizer import InputError, Tokenizer, encode_chat

torch.set_num_threads(1)
ONE = Ranks(0, 1, torch.device("cpu"))


def tokenizer():
    return Tokenizer.load(tiny() / "tokenizer")


def examples(count=12):
    pairs = [encode_chat(tokenizer(), d["messages"]) for d in dialogues(count, "examples")]
    return [sft.Example(np.array(ids), np.array(trained)) for ids, trained in pairs]


def fp32():
    return autocast(ONE.device, "fp32")


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A model that has seen chats, which a prefix wants."""
    folder = tmp_path_factory.mktemp("chats") / "sft"
    assert run("sft", *sft_arguments(tiny(), folder, epochs=1)) == 0
    return folder


def test_the_answer_and_its_end_are_trained_and_nothing_else():
    messages = [{"role": "system", "content": "You are a sailor."}, {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Ahoy!"}, {"role": "user", "content": "再见"},
                {"role": "assistant", "content": "一路顺风。"}]
    t = tokenizer()
    ids, trained = encode_chat(t, messages)
    _, _, _, targets = sft.collate([[sft.Example(np.array(ids), np.array(trained))]], 128)
    learned = targets[targets >= 0].tolist()
    assert t.decode(learned) == "Ahoy!<|im_end|>一路顺风。<|im_end|>"
    assert t.pad not in learned and t.pad not in (t.im_end, t.endoftext)


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_packing_keeps_every_example_once_and_no_row_overflows(lengths):
    rows = sft.pack(lengths, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 20 for row in rows)
    full = sum(lengths) / (20 * len(rows))
    assert full > 0.5 or len(rows) == 1  # best fit never leaves two rows half empty


def test_a_packed_row_gives_each_example_what_it_gets_alone():
    model, _ = load_folder(tiny() / "base")
    some = examples(3)
    ids, positions, documents, targets = sft.collate([some], 256)
    with torch.no_grad():
        packed = model(ids, positions, documents, targets=targets)
        alone = [model(*sft.collate([[e]], len(e.ids))[:3], targets=sft.collate([[e]], len(e.ids))[3])
                 for e in some]
    packed = packed[targets >= 0]
    alone = torch.cat([a[sft.collate([[e]], len(e.ids))[3] >= 0] for a, e in zip(alone, some)])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_the_gradient_is_the_same_however_the_step_is_split_over_rows_of_different_length():
    model, _ = load_folder(tiny() / "base")
    rows, gradients = [examples(5), examples(1), [], examples(2)], []
    for size in (4, 1, 3):
        batches = [sft.collate(rows[i : i + size], 256) for i in range(0, 4, size)]
        loss, _ = sft.train_step(model, batches, ONE, fp32, 1.0)
        gradients.append((loss, model.model.layers[0].mlp.up_proj.weight.grad.clone()))
        model.zero_grad()
    for loss, gradient in gradients[1:]:
        assert loss == pytest.approx(gradients[0][0], rel=1e-6)
        torch.testing.assert_close(gradient, gradients[0][1], atol=1e-7, rtol=1e-4)


def test_a_step_that_trains_nothing_is_zero_and_not_nan():
    model, _ = load_folder(tiny() / "base")
    loss, tokens = sft.train_step(model, [sft.collate([[], []], 64)], ONE, fp32, 1.0)
    assert loss == 0.0 and tokens == 0 and all(p.grad.isfinite().all() for p in model.parameters())


def test_a_record_is_messages_or_prompt_and_completion():
    expected = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy!"}]
    assert sft.record_messages({"messages": expected}) == expected
    assert sft.record_messages({"prompt": "Hi", "completion": "Ahoy!"}) == expected
    assert sft.record_messages({"prompt": expected[:1], "completion": expected[1:]}) == expected
    for bad in ({}, {"messages": expected[:1]}, {"prompt": "Hi", "completion": " "},
                {"prompt": 5, "completion": "Ahoy!"}):
        with pytest.raises(InputError):
            sft.record_messages(bad)


def test_too_long_dialogues_are_cut_and_counted_and_a_question_without_room_is_left_out(tmp_path):
    long_answer = {"prompt": "Hi", "completion": "by the lake " * 60}
    long_question = {"prompt": "by the lake " * 60, "completion": "Hi"}
    file = write_jsonl(tmp_path / "long.jsonl", [long_answer, long_question,
                                                 {"prompt": "Hi", "completion": "Ahoy!"}])
    counts = {"bad": 0, "cut": 0, "too_long": 0}
    found = sft.read_examples([file], tokenizer(), 64, False, counts)
    assert len(found) == 2 and counts == {"bad": 0, "cut": 1, "too_long": 1}


def test_chat_tokens_are_made_anew_in_chatml_only():
    options = sft.Options(model=tiny() / "base", data=[], out="")
    for start in (None, tokenizer().im_start):
        model, t = load_folder(tiny() / "base")
        t.im_start, before = start, model.model.embed_tokens.weight.detach().clone()
        rows = sft.prepare_model(options, t, model, examples())
        changed = (model.model.embed_tokens.weight != before).any(1).nonzero()[:, 0].tolist()
        assert rows == changed == ([] if start is None else [t.im_start, t.im_end])


def test_bad_lines_stop_the_run_with_file_and_line_or_are_counted(tmp_path, capsys):
    records = list(dialogues(20, "good"))
    records[6] = {"messages": [{"role": "wizard", "content": "Hi"},
                               {"role": "assistant", "content": "Ahoy!"}]}
    file = write_jsonl(tmp_path / "bad.jsonl", records)
    arguments = sft_arguments(tiny(), tmp_path / "out", data=file, epochs=1)
    assert run("sft", *arguments) == 2
    assert "bad.jsonl:7" in capsys.readouterr().err
    with file.open("a") as lines:
        lines.write('{"messages": [')
    assert run("sft", *arguments, "--skip-bad") == 0
    assert "2 bad" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "run.json").read_text())["left_out"]["bad"] == 2


def test_stopped_and_resumed_is_bit_exact(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"epochs": 4, "replay": tiny() / "tokens"}
    assert run("sft", *sft_arguments(tiny(), whole, **settings)) == 0
    process = subprocess.Popen(command_line("sft.py", *sft_arguments(tiny(), parts, **settings)), cwd=ROOT,
                               env=environment(), stderr=subprocess.PIPE, text=True)
    while not newest_state(parts):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "--resume" in message, message
    assert run("sft", *sft_arguments(tiny(), parts, **settings), "--resume") == 0
    assert_same_run(whole, parts)


def assert_two_ranks_equal_one(folder, settings, parallel):
    one, two = (sft_arguments(tiny(), folder / name, **settings) for name in ("one", "two"))
    assert run("sft", *one) == 0
    result = launch("sft.py", *two, "--parallel", parallel, processes=2)
    assert result.returncode == 0, result.stderr
    one, two = (metrics(folder / name, "loss", "valid_loss") for name in ("one", "two"))
    assert len(one) == len(two)
    for left, right in zip(one, two):
        for a, b in zip(left, right):
            assert (a is None and b is None) or b == pytest.approx(a, rel=1e-5)
    one, two = (load_file(folder / name / file) for name in ("one", "two")
                for file in ("model.safetensors", "adapter_model.safetensors") if (folder / name / file).exists())
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-5, rtol=1e-4)


def test_two_ranks_equal_one(tmp_path):
    assert_two_ranks_equal_one(tmp_path, {}, "ddp")


@pytest.mark.parametrize("settings", [
    {"patience": 9, "save-every": 5}, pytest.param({"lora": 2, "max-length": 48}, marks=pytest.mark.slow),
    pytest.param({"prefix": 4, "max-length": 48}, marks=pytest.mark.slow)], ids=["all", "lora", "prefix"])
def test_two_ranks_that_share_the_model_equal_one(chats, tmp_path, settings):
    model = {} if "patience" in settings else {"model": chats}
    assert_two_ranks_equal_one(tmp_path, settings | model, "fsdp")


def logits_of(model, ids):
    with torch.no_grad():
        out = model(ids)
    return getattr(out, "logits", out)


def test_a_base_model_that_ended_documents_alone_ends_answers_too(tmp_path):
    """Qwen's base models have <|endoftext|> alone for eos; whoever reads the folder must stop at <|im_end|>."""
    shutil.copytree(tiny() / "base", tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": 0, "top_k": 5}')
    arguments = sft_arguments(tiny(), tmp_path / "sft", epochs=1, model=tmp_path / "base")
    assert run("sft", *arguments[2:]) == 0
    t = Tokenizer.load(tmp_path / "sft")
    found = json.loads((tmp_path / "sft" / "generation_config.json").read_text())
    assert found == {"eos_token_id": [t.im_end, 0], "top_k": 5}
    assert stop_ids(tmp_path / "base", t) == stop_ids(tmp_path / "sft", t) == {0, t.im_end}


def test_the_folder_answers_alike_in_transformers(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    assert run("sft", *sft_arguments(tiny(), tmp_path / "sft", epochs=6, lr=3e-3)) == 0
    model, t = load_folder(tmp_path / "sft")
    theirs, their_tokenizer = (c.from_pretrained(tmp_path / "sft")
                               for c in (AutoModelForCausalLM, AutoTokenizer))
    messages = [{"role": "user", "content": "Where does the cat sleep?"}]
    ids, _ = encode_chat(t, messages, generation_prompt=True)
    rendered = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(rendered) == ids
    ids = torch.tensor([ids])
    torch.testing.assert_close(logits_of(model, ids), logits_of(theirs.eval(), ids), atol=1e-4, rtol=1e-4)


def test_a_lora_folder_gives_the_same_logits_here_in_peft_and_merged(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    settings = {"lora": 4, "lr": 3e-3, "epochs": 4}
    assert run("sft", *sft_arguments(tiny(), tmp_path / "lora", **settings)) == 0
    assert run("sft", *sft_arguments(tiny(), tmp_path / "merged", **settings), "--merge") == 0
    base = AutoModelForCausalLM.from_pretrained(tiny() / "base")
    ids = torch.tensor([[1, 30, 40, 2, 50, 60, 1, 2]])
    before = logits_of(base, ids).clone()
    theirs = logits_of(PeftModel.from_pretrained(base, tmp_path / "lora").eval(), ids)
    for folder in ("lora", "merged"):
        torch.testing.assert_close(logits_of(load_folder(tmp_path / folder)[0], ids), theirs, atol=1e-4,
                                   rtol=1e-4)
    assert not torch.allclose(theirs, before, atol=1e-2)
    losses = [x for x, in metrics(tmp_path / "lora", "loss") if x is not None]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("settings", [{"lora": 2}, {"prefix": 3, "max-length": 48}], ids=["lora", "prefix"])
def test_an_adapter_resumes_bit_exactly_and_leaves_the_base_alone(chats, tmp_path, settings):
    base = chats if "prefix" in settings else tiny() / "base"
    before = (base / "model.safetensors").read_bytes()
    whole, parts = (sft_arguments(tiny(), tmp_path / name, model=base, **settings)[2:] for name in "ab")
    assert run("sft", *whole) == 0
    process = subprocess.Popen(command_line("sft.py", *parts), cwd=ROOT, env=environment(),
                               stderr=subprocess.DEVNULL)
    while not newest_state(tmp_path / "b"):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert run("sft", *parts, "--resume") == 0
    a, b = ((tmp_path / x / "adapter_model.safetensors").read_bytes() for x in "ab")
    assert a == b and before == (base / "model.safetensors").read_bytes()


def test_a_prefix_gives_the_same_logits_here_and_in_peft(chats, tmp_path, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    weights = (chats / "model.safetensors").read_bytes()
    settings = {"prefix": 5, "max-length": 48, "lr": 3e-2, "epochs": 4}
    arguments = sft_arguments(tiny(), tmp_path / "prefix", model=chats, **settings)[2:]
    assert run("sft", *arguments) == 0 and weights == (chats / "model.safetensors").read_bytes()
    ids = torch.tensor([[1, 30, 40, 2, 50, 60, 1, 2]])
    base = AutoModelForCausalLM.from_pretrained(chats)
    before = logits_of(base, ids).clone()
    theirs = PeftModel.from_pretrained(base, tmp_path / "prefix").eval()
    model, _ = load_folder(tmp_path / "prefix")
    torch.testing.assert_close(logits_of(model, ids), logits_of(theirs, ids), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits_of(model, ids), before, atol=1e-2)
    text = ids
    for _ in range(9):
        text = torch.cat((text, logits_of(theirs, text)[:, -1:].argmax(-1)), 1)
    assert generate(model, ids.tolist(), 9, [])[0].ids == text[0, ids.shape[1]:].tolist()
    losses = [x for x, in metrics(tmp_path / "prefix", "loss") if x is not None]
    assert losses[-1] < losses[0]
    further = sft_arguments(tiny(), tmp_path / "more", model=tmp_path / "prefix", **{"max-length": 48})[2:]
    assert run("sft", *further) == 2 and "with a trained prefix" in capsys.readouterr().err  # it would be lost


def test_an_adapter_of_an_adapter_is_merged_or_refused_and_ends_answers(tmp_path, capsys):
    """PEFT would put the second in the first one's place; and a base model's eos ends documents alone."""
    assert run("sft", *sft_arguments(tiny(), tmp_path / "lora", lora=2)) == 0
    assert "1,920 trained parameters" in capsys.readouterr().err  # the adapter's, and two rows of 32
    line = ["quantize", "--model", tmp_path / "lora", "--group", 8, "--out", tmp_path / "int4"]
    assert run(*line) == 0 and end_ids(Tokenizer.load(tmp_path / "int4"))[0] in eos_ids(tmp_path / "int4")
    further = sft_arguments(tiny(), tmp_path / "more", model=tmp_path / "lora", lora=2)[2:]
    assert run("sft", *further) == 2 and "--merge" in capsys.readouterr().err
    assert run("sft", *further, "--merge") == 0


def test_a_refused_command_leaves_nothing_that_the_mended_one_trips_over(tmp_path, capsys):
    out = tmp_path / "out"
    assert run("sft", *sft_arguments(tiny(), out, **{"prefix": 2, "max-length": 48})) == 2
    assert "never seen a chat" in capsys.readouterr().err and run("sft", *sft_arguments(tiny(), out, lora=2)) == 0


def test_frozen_blocks_and_embeddings_stay_but_for_new_chat_tokens(tmp_path):
    assert run("sft", *sft_arguments(tiny(), tmp_path, freeze=1)) == 0
    (before, _), (after, t) = load_folder(tiny() / "base"), load_folder(tmp_path)
    changed = {name for (name, p), q in zip(before.named_parameters(), after.parameters()) if not p.equal(q)}
    blocks = {name.split(".")[2] for name in changed if ".layers." in name}
    assert blocks == {str(i) for i in range(1, before.config.num_hidden_layers)}
    assert "model.norm.weight" in changed
    rows = (before.lm_head.weight != after.lm_head.weight).any(1).nonzero()[:, 0].tolist()
    assert rows == [t.im_start, t.im_end]


def test_it_learns_when_to_stop(tmp_path):
    assert run("sft", *sft_arguments(tiny(), tmp_path, epochs=10, lr=3e-3)) == 0
    model, t = load_folder(tmp_path)
    ids, _ = encode_chat(t, [{"role": "user", "content": "狐狸睡在哪里？"}], generation_prompt=True)
    answer = generate(model, [ids], 30, stop_ids(tmp_path, t))[0]
    assert answer.finished and answer.ids[-1] == t.im_end and t.decode(answer.ids[:-1]).startswith("睡在")
