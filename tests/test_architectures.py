"""Open models' folders: each architecture and kind of RoPE gives transformers' numbers, saved as it was."""

import json

import pytest
import torch

import model as m
from test_tokenizer import LEGACY, LLAMA2_CHAT, TEXTS, byte_fallback_json
from tiny import run, tiny, write_jsonl
from tokenizer import InputError, encode_chat, messages_of

transformers = pytest.importorskip("transformers")

SHAPE = {"vocab_size": 360, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROPE = {"linear": {"factor": 4.0}, "dynamic": {"factor": 2.0},
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 64},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16}}
CASES = {
    "qwen2": ("Qwen2", {}),
    "qwen2, window in the last layer": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9,
                                                  "max_window_layers": 2}),
    "qwen3": ("Qwen3", {}),
    "qwen3, biases, untied": ("Qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
    "qwen3, a window in every other layer": ("Qwen3", {
        "use_sliding_window": True, "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "qwen3-moe": ("Qwen3Moe", EXPERTS | {"norm_topk_prob": True}),
    "qwen3-moe, some layers dense": ("Qwen3Moe", EXPERTS | {
        "mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 7}),
    "llama": ("Llama", {}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 11}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
} | {f"llama, {kind}": ("Llama", {"rope_parameters": {"rope_type": kind, "rope_theta": 5e4, **own}})
     for kind, own in ROPE.items()}
CASES["qwen2, yarn with mscale"] = ("Qwen2", {"rope_parameters": {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 8.0, "mscale": 1.2, "mscale_all_dim": .7,
    "truncate": False}})


def foreign(folder, name, changes, kind="ForCausalLM"):
    """A random model of transformers' own, saved by it with a tokenizer of ours."""
    own = {key: value for key, value in SHAPE.items() if name != "Qwen2" or key != "head_dim"}
    own |= {"tie_word_embeddings": name != "Llama"} | changes
    config = getattr(transformers, f"{name}Config")(**own)
    torch.manual_seed(0)
    model = getattr(transformers, name + kind)(config).eval()
    with torch.no_grad():  # larger than at the start of training, so that a mistake shows
        for p in model.parameters():
            p.mul_(6.0) if p.dim() > 1 else p.add_(torch.randn(p.shape) / 4)
    model.save_pretrained(folder)
    m.Tokenizer.load(tiny() / "base").save(folder)
    return model


def random_ids(*shape):
    return torch.randint(0, 360, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_text_equal_transformers(tmp_path, case):
    theirs, (ours, _) = foreign(tmp_path, *CASES[case]), m.load_folder(tmp_path)
    with torch.no_grad():
        for length in (3, 40, 200):  # shorter and longer than windows and the trained context
            ids = random_ids(2, length)
            torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    if "dynamic" not in case:  # cached, its text depends on when the base was raised, in both
        ids = random_ids(1, 20)
        text = theirs.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert m.generate(ours, ids.tolist(), 30, stop_ids=[])[0].ids == text[0, 20:].tolist()


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "llama, llama3", "mistral", "qwen3-moe"])
def test_bf16_logits_are_as_near_to_the_exact_ones_as_those_of_transformers(tmp_path, case):
    theirs, (ours, _) = foreign(tmp_path, *CASES[case]), m.load_folder(tmp_path, dtype=torch.bfloat16)
    ids = random_ids(2, 30)
    with torch.no_grad():
        exact, bf16 = theirs(ids).logits, theirs.bfloat16()(ids).logits
        rounding = (bf16.float() - exact).square().mean().sqrt()
        assert (ours(ids).float() - exact).square().mean().sqrt() < 1.5 * rounding


@pytest.mark.parametrize("case", ["qwen3", "llama, biases", "qwen3-moe", "mistral"])
def test_gradients_equal_transformers(tmp_path, case):
    theirs, (ours, _) = foreign(tmp_path, *CASES[case]), m.load_folder(tmp_path)
    ids = random_ids(2, 30)
    theirs(ids, labels=ids).loss.backward()
    (-ours(ids[:, :-1], targets=ids[:, 1:]).mean()).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if name in expected:  # transformers has one tensor for all experts of a layer
            torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", ["qwen2", "llama, biases", "qwen3-moe", "mistral"])
def test_a_lora_folder_is_the_same_to_peft(tmp_path, case):
    peft = pytest.importorskip("peft")
    theirs, (ours, _) = foreign(tmp_path / "base", *CASES[case]), m.load_folder(tmp_path / "base")
    m.add_lora(ours, r=3, alpha=6.0)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    (tmp_path / "lora").mkdir()
    m.save_adapter(tmp_path / "lora", ours, tmp_path / "base", 3, 6.0, token_ids=[])
    ids = random_ids(2, 20)
    with torch.no_grad():
        before = theirs(ids).logits
        expected = peft.PeftModel.from_pretrained(theirs, tmp_path / "lora")(ids).logits
        for adapted in (ours, m.load_folder(tmp_path / "lora")[0]):
            torch.testing.assert_close(adapted(ids), expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(before, expected, atol=.1)


@pytest.mark.parametrize("case", CASES)
def test_what_was_loaded_is_saved_as_it_was(tmp_path, case):
    foreign(tmp_path / "theirs", *CASES[case])
    model, tokenizer = m.load_folder(tmp_path / "theirs")
    m.save_folder(tmp_path / "ours", model, tokenizer)
    before, after = (m.read_weights(tmp_path / name) for name in ("theirs", "ours"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    configs = [(tmp_path / name / "config.json").read_bytes() for name in ("theirs", "ours")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("case", ["qwen2", "qwen3, biases, untied", "llama, biases"])
def test_a_quantized_folder_is_the_same_to_transformers(tmp_path, case):
    pytest.importorskip("compressed_tensors")
    foreign(tmp_path / "theirs", *CASES[case])
    assert run("quantize", "--model", tmp_path / "theirs", "--bits", 8, "--out", tmp_path / "int8") == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "int8", dtype=torch.float32).eval()
    ours, ids = m.load_folder(tmp_path / "int8")[0], random_ids(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_llama_learns_to_answer_in_its_own_chat_form(tmp_path):
    vocabulary = byte_fallback_json(TEXTS, **LEGACY)
    size = len(vocabulary["model"]["vocab"])
    foreign(tmp_path / "base", "Llama", {"vocab_size": size, "num_hidden_layers": 2})
    for path in m.FILES:
        (tmp_path / "base" / path).unlink(missing_ok=True)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "chat_template": LLAMA2_CHAT}
    m.write_json(tmp_path / "base" / "tokenizer.json", vocabulary)
    m.write_json(tmp_path / "base" / "tokenizer_config.json",
                 names | {"tokenizer_class": "PreTrainedTokenizerFast"})
    chats = [{"prompt": ask, "completion": answer} for ask, answer in (
        ("Where is the cat?", "By the lake."), ("猫在哪里？", "在湖边。"), ("</s> is what?", "A mere text."))]
    data = write_jsonl(tmp_path / "sft.jsonl", chats)
    assert run("sft", "--model", tmp_path / "base", "--data", data, "--valid", data,
               "--out", tmp_path / "sft", "--epochs", 60, "--batch-size", 1, "--lr", 1e-2,
               "--max-length", 64, "--no-compile", "--dtype", "fp32") == 0
    model, tokenizer = m.load_folder(tmp_path / "sft")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sft").eval()
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "sft")
    for chat in chats:
        ids, _ = encode_chat(tokenizer, messages_of(chat["prompt"]), generation_prompt=True)
        answer = m.generate(model, [ids], 40, m.stop_ids(tmp_path / "sft", tokenizer))[0]
        assert answer.finished and tokenizer.decode(answer.ids[:-1]).strip() == chat["completion"]
        text = theirs.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids):]
        assert reader.decode(text, skip_special_tokens=True).strip() == chat["completion"]


@pytest.mark.parametrize("change, word", [
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
    ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}, "mrope_section"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "low_freq_factor"),
    ({"partial_rotary_factor": .5}, "partial_rotary_factor"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"num_attention_heads": 3}, "heads"), ({"attention_bias": "yes"}, "attention_bias"),
    ({"intermediate_size": -4}, "intermediate_size"),
    ({"architectures": ["Gemma2ForCausalLM"]}, "Gemma2ForCausalLM")])
def test_what_would_change_the_numbers_is_named(tmp_path, change, word):
    foreign(tmp_path, "Llama", {})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=word):
        m.load_folder(tmp_path)


# ---- experts


def experts():
    config = m.Config(**SHAPE | EXPERTS, model_type="qwen3_moe", sparse_layers=(0, 2))
    return m.CausalLM(config).init_weights(0)


def test_the_balancing_loss_equals_transformers_and_is_one_where_all_is_even(tmp_path):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    probabilities = logits.softmax(-1)
    counts = torch.nn.functional.one_hot(probabilities.topk(2).indices, 5).sum((0, 1))
    expected = load_balancing_loss_func((logits,), 5, 2) / 2  # theirs counts every choice, so that even is k
    torch.testing.assert_close(m.balancing_loss(counts, probabilities), expected)
    even = m.balancing_loss(torch.full((5,), 8), torch.full((40, 5), .2))
    torch.testing.assert_close(even, torch.tensor(1.0))


def test_no_token_is_dropped_and_an_idle_expert_has_a_gradient():
    model, ids = experts(), random_ids(2, 30)
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight.zero_()[:, 0] = torch.arange(5.)  # to 3 and 4, or to 0 and 1
    model(ids, targets=ids).mean().backward()
    for layer in (0, 2):
        assert model.model.layers[layer].mlp.counts.sum() == ids.numel() * 2
    assert model.model.layers[0].mlp.counts[2] == 0
    assert all(p.grad is not None for p in model.parameters())
    balance, z = m.router_losses(model)
    assert balance > 1 and z > 0


def test_grouped_products_are_those_of_each_expert():
    layer = experts().model.layers[0].mlp.bfloat16()
    rows, counts = torch.randn(24, 32).bfloat16(), torch.tensor([10, 0, 4, 9, 1])
    results = []
    for run in (layer.run_each, layer.run_grouped):
        layer.zero_grad()
        y = run(rows, counts)
        y.float().square().sum().backward()
        results.append([y, *(p.grad for p in layer.experts.parameters())])
    for each, grouped in zip(*results):
        torch.testing.assert_close(grouped, each, atol=1e-2, rtol=2e-2)


def test_experts_are_saved_as_transformers_reads_them(tmp_path):
    model, (_, tokenizer) = experts(), m.load_folder(tiny() / "base")
    m.save_folder(tmp_path, model, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        ids = random_ids(2, 30)
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
