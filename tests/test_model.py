"""What model.py promises: transformers' numbers, causality, exact caching and packing, honest sampling."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import model as m
from pretrain import resize_embeddings
from tiny import run, tiny
from tokenizer import InputError, encode_chat

torch.set_num_threads(1)


def make(seed=0, **shape):
    config = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
                  max_position_embeddings=512) | shape
    model = m.CausalLM(m.Config(**config)).init_weights(seed)
    with torch.no_grad():  # larger than at the start of training, so that a mistake shows
        for p in model.parameters():
            p.mul_(6.0) if p.dim() == 2 else p.add_(
                torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) / 4)
    return model.eval()


def random_ids(*shape, seed=0, high=97):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


# ---- the folder, and transformers


@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": False},
                                   {"num_key_value_heads": 4, "rope_theta": 1e6}, {"head_dim": 16}],
                         ids=["gqa", "untied", "theta", "wide-heads"])
def test_logits_and_greedy_text_equal_transformers(tmp_path, shape):
    from transformers import AutoModelForCausalLM
    model, (_, tokenizer) = make(vocab_size=360, **shape), m.load_folder(tiny() / "base")
    m.save_folder(tmp_path, model, tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = random_ids(2, 300, high=360)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    ours = m.generate(model, ids[:1, :20].tolist(), 30, stop_ids=[])[0].ids
    text = theirs.generate(ids[:1, :20], max_new_tokens=30, do_sample=False, eos_token_id=None,
                           pad_token_id=0)
    assert ours == text[0, 20:].tolist()


def test_a_folder_saved_and_loaded_is_the_same_and_keeps_foreign_bytes(tmp_path):
    model, tokenizer = m.load_folder(tiny() / "base")
    config = json.loads((tiny() / "base" / "config.json").read_text()) | {"a_key_of_theirs": 1}
    source = tmp_path / "source"
    m.save_folder(source, model, tokenizer)
    (source / "config.json").write_text(json.dumps(config))
    again, tokenizer = m.load_folder(source)
    m.save_folder(tmp_path / "copy", again, tokenizer)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
                 "model.safetensors"):
        assert (source / name).read_bytes() == (tmp_path / "copy" / name).read_bytes(), name


def test_a_new_model_stops_at_the_ends_that_its_tokenizer_has():
    model, t = make(), m.Tokenizer.load(tiny() / "tokenizer")
    assert m.end_ids(t) == [t.im_end, t.endoftext]
    for t.im_end, t.document_end, ends in ((None, None, [t.endoftext]), (None, 7, [7, t.endoftext]),
                                           (7, 7, [7, t.endoftext])):
        assert m.end_ids(t) == ends and m.config_json(model.config, t)["eos_token_id"] == ends[0]


def test_a_sharded_folder_loads_alike(tmp_path):
    model, tokenizer = m.load_folder(tiny() / "base")
    m.save_folder(tmp_path, model, tokenizer, max_shard=30_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    for a, b in zip(model.parameters(), m.load_folder(tmp_path)[0].parameters()):
        assert torch.equal(a, b)


def damaged(folder, kind):
    path = folder / "model.safetensors"
    tensors = m.load_file(path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "missing tensor":
        m.save_file({k: v for k, v in tensors.items() if "layers.1.mlp.up" not in k}, path)
    elif kind == "one tensor too many":
        m.save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(3)}, path)
    elif kind == "wrong shape":
        m.save_file(tensors | {"model.norm.weight": torch.zeros(7)}, path)
    elif kind == "no weights":
        path.unlink()
    elif kind == "not finite":
        m.save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * math.nan}, path)
    elif kind == "whole numbers":
        m.save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].int()}, path)
    elif kind == "huge header":
        path.write_bytes((2**30).to_bytes(8, "little") + b"{" + b" " * 1000)
    elif kind in ("a lost shard", "a shard elsewhere"):
        m.save_file(tensors, path.with_name("one.safetensors"))
        path.unlink()
        names = dict.fromkeys(tensors, "one.safetensors") | {
            "model.norm.weight": "two.safetensors" if kind == "a lost shard" else "../one.safetensors"}
        path.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    else:
        config = json.loads((folder / "config.json").read_text())
        config |= {"architecture": {"architectures": ["GPT2LMHeadModel"]}, "no list": {"architectures": 5},
                   "rope": {"rope_scaling": {"rope_type": "yarn"}},
                   "sliding": {"use_sliding_window": True, "sliding_window": 0},
                   "size": {"hidden_size": -4}, "wide": {"hidden_size": 10**15},
                   "endless": {"num_hidden_layers": 10**12},
                   "endless windows": {"num_hidden_layers": 10**12, "use_sliding_window": True},
                   "rope text": {"original_max_position_embeddings": "long"},
                   "heads": {"num_attention_heads": 7}, "list of lists": {"architectures": [["Qwen3"]]},
                   "rope list": {"rope_scaling": {"rope_type": ["yarn"]}},
                   "layer list": {"use_sliding_window": True, "sliding_window": 4, "layer_types": [[1], [2]]},
                   "layer text": {"use_sliding_window": True, "sliding_window": 4,
                                  "max_window_layers": "2"}}[kind]
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["truncated", "missing tensor", "one tensor too many", "wrong shape",
                                  "no weights", "architecture", "no list", "rope", "sliding", "size",
                                  "wide", "endless", "endless windows", "rope text", "heads", "list of lists", "rope list", "layer list",
                                  "layer text", "not finite", "whole numbers", "huge header",
                                  "a lost shard", "a shard elsewhere"])
def test_a_damaged_or_unsupported_folder_is_one_error(tmp_path, kind):
    m.save_folder(tmp_path, *m.load_folder(tiny() / "base"))
    damaged(tmp_path, kind)
    with pytest.raises(InputError) as error:
        m.load_folder(tmp_path)
    assert str(tmp_path) in str(error.value)


# ---- attention


@settings(max_examples=10)
@given(t=st.integers(1, 30), seed=st.integers(0, 9))
def test_changing_a_token_changes_nothing_before_it(t, seed):
    model, ids = make(), random_ids(1, 31, seed=seed)
    other = ids.clone()
    other[0, t] = (other[0, t] + 1) % 97
    with torch.no_grad():
        a, b = model(ids), model(other)
    assert torch.equal(a[:, :t], b[:, :t]) and not torch.equal(a[:, t:], b[:, t:])


@settings(max_examples=10)
@given(lengths=st.lists(st.integers(1, 12), min_size=2, max_size=4))
def test_packed_documents_equal_separate_ones(lengths):
    model = make()
    pieces = [random_ids(1, n, seed=i) for i, n in enumerate(lengths)]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    with torch.no_grad():
        packed = model(torch.cat(pieces, 1), positions, documents)
        separate = torch.cat([model(piece) for piece in pieces], 1)
    torch.testing.assert_close(packed, separate, atol=1e-4, rtol=1e-4)


def test_targets_give_the_log_probabilities_of_the_logits():
    model, ids = make(), random_ids(2, 9)
    targets = random_ids(2, 9, seed=1)
    targets[0, 3] = -1
    expected = model(ids).double().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    expected[0, 3] = 0
    torch.testing.assert_close(model(ids, targets=targets).double(), expected, atol=1e-5, rtol=1e-5)


def test_rotary_angles_stay_exact_in_a_bf16_model():
    model = make(max_position_embeddings=4096).to(torch.bfloat16)
    cos, _ = m.rotary(torch.tensor([[3000, 3001]]), model.config)
    exact = np.cos(np.array([3000.0, 3001.0]))  # the first frequency is 1
    np.testing.assert_allclose(cos[0, 0, :, 0].numpy(), exact, atol=1e-3)
    assert cos.dtype == torch.float32


# ---- generation


def slow_greedy(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt):]


def test_cached_batched_generation_equals_one_prompt_at_a_time_without_a_cache():
    model = make()
    prompts = [random_ids(n, seed=n).tolist() for n in (3, 11, 1, 7)]
    with torch.no_grad():
        expected = [slow_greedy(model, p, 12) for p in prompts]
    assert [s.ids for s in m.generate(model, prompts, 12, stop_ids=[])] == expected


def test_generation_holds_no_weight_twice_and_reads_what_training_changes():
    model, prompts = make(attention_bias=True), random_ids(2, 5).tolist()
    m.generate(model, prompts, 2, stop_ids=[])
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == sum(p.nbytes for p in model.parameters())
    model(torch.tensor(prompts), targets=torch.tensor(prompts)).mean().backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(p.grad)
    again = make(attention_bias=True)
    again.load_state_dict(model.state_dict())
    assert m.generate(model, prompts, 8, stop_ids=[]) == m.generate(again, prompts, 8, stop_ids=[])


def test_a_row_stops_at_its_stop_id_and_leaves_the_others_as_they_were():
    model = make()
    prompts = [random_ids(n, seed=n).tolist() for n in (3, 11, 1, 7)]
    free = m.generate(model, prompts, 12, stop_ids=[])
    stop = free[0].ids[4]
    for sample, alone in zip(m.generate(model, prompts, 12, stop_ids=[stop]), free):
        end = alone.ids.index(stop) + 1 if stop in alone.ids else 12
        assert sample.ids == alone.ids[:end] and sample.finished == (stop in alone.ids)


def test_a_sampled_row_depends_on_its_number_and_not_on_its_neighbours():
    model = make()
    prompts = [random_ids(n, seed=n).tolist() for n in (3, 11, 1, 7)]
    together = m.generate(model, prompts, 10, [], temperature=1.0, seed=5)
    for row in range(4):
        alone = m.generate(model, [prompts[row]], 10, [], temperature=1.0, seed=5, rows=[row])[0]
        assert alone.ids == together[row].ids
    assert together[0].ids != m.generate(model, prompts, 10, [], temperature=1.0, seed=6)[0].ids


def test_several_answers_to_a_prompt_are_those_of_the_prompt_said_several_times():
    model, prompts = make(), [random_ids(n, seed=n).tolist() for n in (3, 11)]
    several = m.generate(model, prompts, 10, [], samples=3, temperature=1.0, seed=5)
    separate = m.generate(model, [p for p in prompts for _ in range(3)], 10, [], temperature=1.0, seed=5)
    assert [s.ids for s in several] == [s.ids for s in separate]
    assert len({tuple(s.ids) for s in several}) == 6


def test_a_prompt_in_pieces_gives_the_same_answer(monkeypatch):
    model, prompts = make(), [random_ids(n, seed=n).tolist() for n in (3, 21, 1, 7)]
    expected = m.generate(model, prompts, 10, [])
    monkeypatch.setattr(m, "PREFILL", 4)
    assert [s.ids for s in m.generate(model, prompts, 10, [])] == [s.ids for s in expected]


@settings(max_examples=10, deadline=None)
@given(cut=st.integers(1, 19), back=st.integers(0, 6))
def test_a_cached_beginning_gives_the_same_answer_also_after_going_back(cut, back):
    model, ids = make(), random_ids(20).tolist()
    expected = m.generate(model, [ids], 8, [])[0].ids
    cache = m.Cache(model.model, [0], "cpu", torch.float32)
    list(m.generate_tokens(model, [ids[:cut]], back + 1, set(), cache=cache))
    cache.length = cut
    assert m.generate(model, [ids], 8, [], cache=cache)[0].ids == expected


@settings(max_examples=10, deadline=None)
@given(P=st.integers(1, 9), lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4))
def test_a_prefix_of_read_tokens_is_as_good_as_having_read_them(P, lengths):
    """Logits, and the answers to padded prompts, are those after the prefix's own tokens."""
    plain, model = make(), make()
    before, prompts = random_ids(P).tolist(), [random_ids(n).tolist() for n in lengths]
    m.add_prefix(model, before)
    ids = torch.tensor([prompts[0]])
    whole = plain(torch.tensor([before + prompts[0]]))[:, P:]
    torch.testing.assert_close(model(ids), whole, atol=1e-5, rtol=1e-5)
    one = {"documents": ids * 0, "positions": torch.arange(ids.shape[1])[None]}
    torch.testing.assert_close(model(ids, **one), whole, atol=1e-5, rtol=1e-5)
    expected = [m.generate(plain, [before + prompt], 6, [])[0].ids for prompt in prompts]
    assert [answer.ids for answer in m.generate(model, prompts, 6, [])] == expected
    assert model.config.max_position_embeddings == plain.config.max_position_embeddings - P


def test_the_repetition_penalty_is_that_of_transformers(tmp_path):
    from transformers import AutoModelForCausalLM
    model, (_, tokenizer) = make(vocab_size=360), m.load_folder(tiny() / "base")
    m.save_folder(tmp_path, model, tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = random_ids(1, 20, high=360)
    text = theirs.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0,
                           repetition_penalty=1.3)
    assert m.generate(model, ids.tolist(), 40, [], repetition_penalty=1.3)[0].ids == text[0, 20:].tolist()


def test_what_was_said_is_less_likely_by_the_penalties():
    logits = torch.tensor([[2.0, 2.0, -2.0, 2.0]])
    prompt, answer = torch.tensor([[[True, False, True, False]], [[False, True, False, False]]])
    how = m.Sampling(repetition_penalty=2.0, presence_penalty=0.5)
    assert m.penalised(logits, prompt, answer, how).tolist() == [[1.0, 0.5, -4.0, 2.0]]
    far = m.generate(make(), [[5, 6]], 30, [], presence_penalty=1e4)[0].ids
    assert len(set(far)) == 30  # nothing of the answer comes again


def test_a_stop_string_ends_an_answer_and_is_in_its_text():
    model, tokenizer = m.load_folder(tiny() / "base")
    prompts = [tokenizer.encode(text) for text in ("The cat", "The owl lives")]
    free = [tokenizer.decode(s.ids) for s in m.generate(model, prompts, 30, [])]
    stop = free[0][4:7]
    ends = m.StopStrings(tokenizer, [stop])
    for sample, text in zip(m.generate(model, prompts, 30, [], ends=ends), free):
        found = tokenizer.decode(sample.ids)
        assert text.startswith(found) and sample.finished == (stop in text) == (stop in found)
        assert ends.cut(found) == text.split(stop)[0] if stop in text else found == text


@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}, {"temperature": 0.5}])
def test_sampling_frequencies_match_the_distribution_whose_logprob_is_returned(filters):
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    rows = 20_000
    how = m.Sampling(**{"temperature": 1.0} | filters)
    ids, logprobs = m.sample(logits.expand(rows, -1), m.uniforms(3, np.arange(rows), 0), how)
    p = m.filtered_logprobs(logits[None], how)[0].exp().double()
    torch.testing.assert_close(p.sum(), torch.tensor(1.0, dtype=torch.float64), atol=1e-5, rtol=0)
    counts = torch.bincount(ids, minlength=6).double()
    assert counts[p == 0].sum() == 0
    chi_square = (((counts - rows * p) ** 2)[p > 0] / (rows * p[p > 0])).sum()
    assert chi_square < 25  # 5 degrees of freedom: exceeded once in 7,000 fair draws
    torch.testing.assert_close(logprobs.double(), p[ids].log(), atol=1e-5, rtol=1e-5)


def test_filters_keep_what_their_definitions_say():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    how = lambda **f: m.Sampling(temperature=1.0, **f)
    kept = lambda **f: (m.filtered_logprobs(logits, how(**f)) > -math.inf)[0].tolist()
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_p=0.5) == [True, False, False, False] and kept(top_p=0.6) == [True, True, False, False]
    assert kept(min_p=0.25) == [True, True, True, False] and kept(min_p=2.0) == [True, False, False, False]


def test_a_token_that_was_cut_is_never_drawn():
    logits = torch.tensor([[2.0, 1.0, 0.0, -9.0]])
    # 1 is the sum's very end, as rounding may give.
    ids, logprobs = m.sample(logits, torch.ones(1), m.Sampling(temperature=1.0, top_k=2))
    assert ids.item() in (0, 1) and logprobs.isfinite().all()


def test_a_row_of_the_model_that_no_token_has_is_no_text(tmp_path):
    model, tokenizer = m.load_folder(tiny() / "base")
    size = model.config.vocab_size
    resize_embeddings(model, tokenizer, SimpleNamespace(bytes_of=tokenizer.bytes_of, vocab_size=size + 2))
    m.save_folder(tmp_path, model, tokenizer, {"vocab_size": size + 2})
    _, tokenizer = m.load_folder(tmp_path)
    assert tokenizer.decode([*tokenizer.encode("Hi"), size, size + 1]) == "Hi"
    with pytest.raises(InputError, match="not in the vocabulary"):
        tokenizer.decode([size + 2])


def test_uniforms_are_uniform_and_a_pure_function():
    u = m.uniforms(7, np.arange(100_000), 3)
    assert 0 < u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.005
    assert torch.equal(u[100:200], m.uniforms(7, np.arange(100, 200), 3))
    assert (abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.02
            and abs(np.corrcoef(u, m.uniforms(7, np.arange(100_000), 4))[0, 1]) < 0.02)
    # The next seed is not this one, a token later.
    assert abs(np.corrcoef(m.uniforms(8, np.arange(100_000), 3), m.uniforms(7, np.arange(100_000), 4))[0, 1]) < 0.02


# ---- windows and bits per byte


def test_windows_cover_every_token_once_with_the_next_one_as_target():
    tokens = np.array([0, 5, 6, 0, 7, 0, 8, 9, 10, 11])
    ids, positions, documents, targets = m.window_batch(tokens, [0, 1, 2], 4, endoftext=0)
    assert ids.tolist() == [[0, 5, 6, 0], [7, 0, 8, 9], [10, 11, 0, 0]]
    assert targets.tolist() == [[5, 6, 0, 7], [0, 8, 9, 10], [11, 0, -1, -1]]
    assert positions.tolist()[:2] == [[0, 1, 2, 0], [0, 0, 1, 2]] and positions.tolist()[2][:2] == [0, 1]
    assert documents.tolist()[:2] == [[1, 1, 1, 2], [0, 1, 1, 1]]


def test_bits_per_byte_equals_its_definition_in_float64():
    from tokenizer import read_tokens
    model, tokenizer = m.load_folder(tiny() / "base")
    shards = read_tokens(tiny() / "tokens", "valid", tokenizer)
    bits = m.bits_per_byte(model, tokenizer, shards, max_length=64, batch_size=3)
    for shard in shards:
        nats, stream = 0.0, np.append(shard.tokens, tokenizer.endoftext).astype(np.int64)
        for first in range(0, len(shard.tokens), 64):
            window = stream[first : first + 65]
            ids, positions, documents, _ = m.window_batch(shard.tokens, [first // 64], 64,
                                                          tokenizer.endoftext)
            with torch.no_grad():
                logprobs = model(
                    *map(torch.from_numpy, (ids, positions, documents)))[0].double().log_softmax(-1)
            nats -= sum(logprobs[i, t].item() for i, t in enumerate(window[1:]) if t != tokenizer.endoftext)
        assert abs(bits[shard.lang] - nats / math.log(2) / shard.bytes) < 1e-5


# ---- LoRA


def test_an_adapter_changes_nothing_at_first_and_merges_exactly():
    model, ids = make(), random_ids(2, 8)
    with torch.no_grad():
        before = model(ids)
        m.add_lora(model, r=3, alpha=6.0)
        assert torch.equal(model(ids), before)
        linear = {n for n, x in model.named_modules() if isinstance(x, m.LoraLinear)}
        assert len(linear) == 2 * 7  # all linear layers of both blocks, square or not
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
        adapted = model(ids)
        torch.testing.assert_close(m.merge_lora(model)(ids), adapted, atol=1e-3, rtol=1e-4)
    assert not torch.allclose(adapted, before) and not any("lora" in n for n, _ in model.named_parameters())


@pytest.mark.parametrize("change, says", [
    (lambda tensors, settings: tensors[next(iter(tensors))].fill_(math.nan), "not finite"),
    (lambda tensors, settings: settings.update(base_model_name_or_path=""), "base_model_name_or_path"),
    (lambda tensors, settings: settings.update(trainable_token_indices=[10**6]), "trainable_token_indices"),
    (lambda tensors, settings: settings.pop("trainable_token_indices"), "trainable_token_indices")])
def test_a_damaged_adapter_is_one_error(tmp_path, change, says):
    model, tokenizer = m.load_folder(tiny() / "base")
    m.save_folder(tmp_path / "base", model, tokenizer)
    (tmp_path / "lora").mkdir()
    m.save_adapter(tmp_path / "lora", m.add_lora(model, 2, 4.0), tmp_path / "base", 2, 4.0, [tokenizer.im_end])
    m.load_folder(tmp_path / "lora")
    tensors = {name: tensor.clone() for name, tensor in
               m.read_safetensors(tmp_path / "lora" / "adapter_model.safetensors").items()}
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    change(tensors, settings)
    m.write_safetensors(tmp_path / "lora" / "adapter_model.safetensors", tensors)
    m.write_json(tmp_path / "lora" / "adapter_config.json", settings)
    with pytest.raises(InputError, match=says):
        m.load_folder(tmp_path / "lora")


# ---- what every run needs


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_learning_rate_warms_up_to_its_peak_and_falls(schedule):
    rates = [m.learning_rate(s, 100, 1.0, 10, schedule) for s in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(rates) == 1.0 and rates[-1] <= 0.11 and all(a >= b for a, b in zip(rates[10:], rates[11:]))


def test_a_gradient_that_is_not_finite_skips_the_step_and_three_stop_the_run():
    p = torch.nn.Parameter(torch.ones(2, 2))
    stepper = m.Stepper(torch.optim.AdamW([p], lr=0.1), "fp32", clip=1.0)
    for bad in (True, True, False, True, True):
        before = p.detach().clone()
        p.grad = torch.full((2, 2), math.nan if bad else 1.0)
        stepper.step(0.1)
        assert torch.equal(p, before) == bad
    assert stepper.skipped == 4
    p.grad = torch.full((2, 2), math.inf)
    with pytest.raises(InputError):
        stepper.step(0.1)


def test_clipping_limits_the_global_norm_and_zero_is_off():
    for clip, expected in ((1.0, 1.0), (0.0, 5.0)):
        p, q = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
        stepper = m.Stepper(torch.optim.SGD([p, q], lr=1.0), "fp32", clip)
        p.grad, q.grad = torch.tensor([3.0]), torch.tensor([4.0])
        assert stepper.step(1.0) == pytest.approx(5.0)
        assert math.hypot(p.item(), q.item()) == pytest.approx(expected, rel=1e-4)


def test_fp16_halves_its_loss_scale_on_overflow_and_goes_on():
    p = torch.nn.Parameter(torch.ones(1))
    stepper = m.Stepper(torch.optim.AdamW([p], lr=0.1), "fp16", clip=1.0)
    for _ in range(5):
        p.grad = torch.tensor([math.inf])
        stepper.step(0.1)
    assert stepper.scale == 2.0**11 and stepper.skipped == 5


def test_weight_decay_is_on_matrices_only():
    optimizer = m.make_optimizer(make(), 1e-3, 0.1, (0.9, 0.95))
    for group in optimizer.param_groups:
        assert all((p.dim() >= 2) == (group["weight_decay"] > 0) for p in group["params"])


def test_metrics_keep_what_the_state_knows_and_have_no_nan(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'
                                            '{"step": 3, "a": {}')
    metrics = m.Metrics(tmp_path, m.Ranks(0, 1, torch.device("cpu")), step=1, steps=9)
    metrics.write(2, loss=0.5, grad_norm=math.inf)
    metrics.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 1, "loss": 2.0}', '{"step": 2, "loss": 0.5, "grad_norm": null}']


def test_an_unknown_device_is_one_error():
    for name in ("tpu", "cuda:99" if not torch.cuda.is_available() else "nonsense"):
        with pytest.raises(InputError):
            m.pick_device(name)


def chat(monkeypatch, lines, *flags):
    """The dialogue after each message that is typed; an exception among the lines is raised instead."""
    def type_in(_):
        line = next(typed)
        if isinstance(line, type):
            raise line
        return line

    def say(self, text):
        plain(self, text)
        dialogues.append(list(self.messages))

    typed, dialogues, plain = iter([*lines, EOFError]), [], m.Chat.say
    with monkeypatch.context() as patch:
        patch.setattr("builtins.input", type_in)
        patch.setattr(m.Chat, "say", say)
        assert run("model", "--model", tiny() / "base", "--max-new-tokens", 8, *flags) == 0
    return dialogues


def test_chat_answers_remembers_and_obeys(monkeypatch, capsys):
    ask = "Where does the cat sleep?"
    first, _, again = chat(monkeypatch, [ask, "猫睡在哪里？", "/reset", ask])
    assert first == again and first[1]["content"]
    assert chat(monkeypatch, ['"""Where does', 'the cat sleep?"""', "/quit", "not read"]) == chat(
        monkeypatch, ["Where does\nthe cat sleep?"])
    opened = chat(monkeypatch, [KeyboardInterrupt, "/system Be brief.", ask])
    assert opened == chat(monkeypatch, [ask], "--system", "Be brief.")
    assert opened[0][0] == {"role": "system", "content": "Be brief."}
    hot, cold = chat(monkeypatch, ["/temperature 30", ask, "/temperature 0", "/reset", ask])
    assert hot != cold == first
    assert chat(monkeypatch, ["/temperature hot", "/what"]) == []
    assert capsys.readouterr().out.count("/temperature X") == 2


def test_chat_reads_only_what_it_has_not_read_and_answers_alike(monkeypatch):
    options = m.Options(model=str(tiny() / "base"), max_new_tokens=9)
    kept, fresh = (m.Chat(options, *m.load_folder(tiny() / "base")) for _ in range(2))
    kept.model.config.max_position_embeddings = fresh.model.config.max_position_embeddings = 512
    read = []
    forward = kept.model.model.forward
    monkeypatch.setattr(kept.model.model, "forward",
                        lambda ids, **other: read.append(ids.shape[1]) or forward(ids, **other))
    for text in ("Where does the cat sleep?", "猫睡在哪里？", "And the owl?"):
        fresh.cache = None
        for talk in (kept, fresh):
            talk.say(text)
        assert kept.messages == fresh.messages
    whole = len(encode_chat(kept.tokenizer, kept.messages)[0])
    assert sum(read) < whole + 20  # read anew, the turns would add up to about twice that


def test_a_stop_text_is_neither_shown_nor_remembered():
    talk = m.Chat(m.Options(model=str(tiny() / "base"), max_new_tokens=30), *m.load_folder(tiny() / "base"))
    talk.say("The cat")
    free = talk.messages[-1]["content"]
    for stop in (free[4:7], free[2:9], "not in it"):
        talk.restart("")
        talk.options.stop = [stop]
        talk.say("The cat")
        assert talk.messages[-1]["content"] == free.split(stop)[0]


def test_a_question_too_long_is_told_and_the_dialogue_is_kept(capsys):
    talk = m.Chat(m.Options(model=str(tiny() / "base"), max_new_tokens=9), *m.load_folder(tiny() / "base"))
    talk.say("The cat")
    before = list(talk.messages)
    talk.say("cat and owl " * 200)
    assert talk.messages == before and "leaves no room" in capsys.readouterr().err


def test_what_is_quoted_is_no_command(monkeypatch):
    typed = iter(["/quit", '"""/quit"""', '"""', "/quit", '"""'])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert [m.read_message() for _ in range(3)] == [("/quit", True), ("/quit", False), ("/quit", False)]


def test_a_prefix_stands_right_before_every_text_whatever_the_window():
    """Packed, and in a batch beside a longer prompt, as alone."""
    model = make(windows=(6, None), num_hidden_layers=2)
    m.add_prefix(model, random_ids(1, 4)[0].tolist())
    first, second = random_ids(2, 9)
    with torch.no_grad():
        row, documents = torch.cat((first, second))[None], torch.arange(2).repeat_interleave(9)[None]
        together = model(row, torch.arange(9).repeat(2)[None], documents)[0, 9:]
        torch.testing.assert_close(together, model(second[None])[0], atol=1e-5, rtol=1e-5)
    prompts = [first.tolist(), second.tolist() + first.tolist()]
    assert [s.ids for s in m.generate(model, prompts, 8, [])] == [
        m.generate(model, [p], 8, [])[0].ids for p in prompts]


def test_rows_that_train_alone_do_so_wherever_the_model_has_gone():
    weight = torch.nn.Parameter(torch.ones(5, 3))
    m.train_rows_only(weight, [1, 4])
    (weight * 2).sum().backward()
    assert weight.grad[:, 0].tolist() == [0, 2, 0, 0, 2]
    (hook,) = weight._backward_hooks.values()  # as after .to("cuda"), where the gradient is then
    assert hook(torch.ones(5, 3, device="meta")).device.type == "meta"


def test_ctrl_c_ends_an_answer_and_the_chat_goes_on(monkeypatch, capsys):
    talk = m.Chat(m.Options(model=str(tiny() / "base"), max_new_tokens=9), *m.load_folder(tiny() / "base"))

    def interrupted():
        yield "The"
        raise KeyboardInterrupt

    monkeypatch.setattr(talk, "answer", interrupted)
    talk.say("Where does the cat sleep?")
    assert talk.messages[-1] == {"role": "assistant", "content": "The"}

