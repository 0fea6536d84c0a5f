"""What quantize.py promises: bounded errors, an exact layout, one error for what is damaged or refused."""

import json
import shutil
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file, save_file

from model import RewardModel, generate, load_folder, pack, save_folder, unpack, weight_of
from quantize import gptq, quantize
from test_model import make, random_ids
from tiny import dialogues, run, sft_arguments, tiny
from tokenizer import InputError, Tokenizer, encode_chat, read_tokens

torch.set_num_threads(1)
WEIGHTS = arrays(np.float32, (3, 24), elements=st.floats(-(2.0**99), 2.0**99, width=32)
                 | st.floats(-1, 1, width=32) | st.integers(0, 2**16).map(lambda n: -1 - n / 2**16)
                 | st.sampled_from([0.0, 2.0**-149, -(2.0**-128), 7.0, -8.0]))
BITS = pytest.mark.parametrize("bits", [4, 8])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """fp32/, a model with weights large enough for mistakes to show, int4/ and int8/ made of it, reward/."""
    folder, (_, tokenizer) = tmp_path_factory.mktemp("quantized"), load_folder(tiny() / "base")
    model = make(vocab_size=360, hidden_size=64, intermediate_size=192, num_hidden_layers=4)
    save_folder(folder / "fp32", model, tokenizer)
    reward = RewardModel(model.config)
    reward.model, reward.source = model.model, folder / "fp32"
    save_folder(folder / "reward", reward, tokenizer)
    for bits in (4, 8):
        out = folder / f"int{bits}"
        assert run("quantize", "--model", folder / "fp32", "--bits", bits, "--out", out) == 0
    return folder


@torch.no_grad()
def logits(model, ids=random_ids(2, 40, high=360)):
    out = model(ids)
    return getattr(out, "logits", out)


def dequantized(codes, scales):
    return (codes.double().unflatten(1, (scales.shape[1], -1)) * scales.double()[..., None]).flatten(1)


# ---- numbers


def test_every_int4_code_survives_in_every_place_of_a_word():
    codes = torch.tensor(list(product(range(-8, 8), repeat=2)), dtype=torch.int8).repeat(1, 4)  # (256, 8)
    packed = pack(codes, 4)
    assert torch.equal(unpack(packed, 4), codes) and packed.shape == (256, 1)
    words = [sum(int(code + 8) << 4 * place for place, code in enumerate(row)) for row in codes.numpy()]
    assert packed[:, 0].numpy().view(np.uint32).tolist() == words


@BITS
@given(codes=arrays(np.int8, (3, 40), elements=st.integers(-128, 127)))
def test_packing_is_that_of_compressed_tensors(bits, codes):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.from_numpy(codes) >> (8 - bits)
    assert torch.equal(pack(codes, bits), helpers.pack_to_int32(codes, bits))
    assert torch.equal(unpack(pack(codes, bits), bits), codes)


@BITS
@given(weight=WEIGHTS)
def test_no_error_is_above_half_its_groups_scale(bits, weight):
    weight = torch.from_numpy(weight)
    codes, scales = quantize(weight, bits, 8)
    assert scales.isfinite().all() and (scales > 0).all()
    error = (dequantized(codes, scales) - weight.double()).abs().unflatten(1, (-1, 8))
    assert (error <= scales.double()[..., None] * 0.500001).all()


@BITS
@given(weight=WEIGHTS)
def test_quantized_weights_quantize_to_themselves(bits, weight):
    codes, scales = quantize(torch.from_numpy(weight), bits, 8)
    once = dequantized(codes, scales).float()
    assert torch.equal(once.double(), dequantized(codes, scales))  # fp32 holds scale * code exactly
    again = quantize(once, bits, 8)
    assert torch.equal(again[0], codes) and torch.equal(dequantized(*again), once.double())


@BITS
def test_a_group_of_zeros_and_one_with_an_outlier_have_a_scale(bits):
    weight = torch.zeros(2, 16)
    weight[1, 3], weight[1, 8], weight[1, 9] = 1e30, -1e30, 1e-3
    codes, scales = quantize(weight, bits, 8)
    assert scales.isfinite().all() and (scales > 0).all()
    outliers = dequantized(codes, scales).float()[1, [3, 8]]
    torch.testing.assert_close(outliers, weight[1, [3, 8]], rtol=0.01, atol=0)
    assert codes[1, [3, 8]].tolist() == [2 ** (bits - 1) - 1, -(2 ** (bits - 1))]  # all codes are used
    assert codes[0].tolist() == [0] * 16 and codes[1, 9] == 0


@BITS
@pytest.mark.parametrize("group", [8, 24])
def test_gptq_rounds_to_nearest_where_inputs_have_nothing_to_do_with_each_other(bits, group):
    weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(0))
    codes, scales = gptq(weight, 3 * torch.eye(48, dtype=torch.float64), bits, group)
    assert torch.equal(codes, quantize(weight, bits, group)[0])
    assert torch.equal(scales, quantize(weight, bits, group)[1])


@given(seed=st.integers(0, 2**32), bits=st.sampled_from([4, 8]), group=st.sampled_from([8, 128, 256]))
def test_gptq_loses_less_of_the_outputs_than_rounding_to_nearest(seed, bits, group):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 256, generator=generator)
    x = torch.randn(600, 32, generator=generator) @ torch.randn(32, 256, generator=generator)
    x = (x + 0.3 * torch.randn(600, 256, generator=generator)).double()  # (N, in), correlated
    lost = [((weight_of(*found) - weight).double() @ x.T).norm() for found in (
        gptq(weight, x.T @ x, bits, group), quantize(weight, bits, group))]
    assert lost[0] < 0.7 * lost[1]


# ---- the folder


def reference(folder):
    """The plain fp32 model that a quantized folder means, unpacked by numpy with shifts."""
    stored, plain = load_file(folder / "model.safetensors"), load_folder(folder.parent / "fp32")[0]
    for name, tensor in plain.state_dict().items():
        layer = name.removesuffix(".weight")
        if f"{layer}.weight_scale" in stored:
            bits = json.loads((folder / "run.json").read_text())["options"]["bits"]
            words = stored[f"{layer}.weight_packed"].numpy()[..., None] >> np.arange(0, 32, bits)
            codes = (words & 2**bits - 1).reshape(len(words), -1) - 2 ** (bits - 1)
            scales = stored[f"{layer}.weight_scale"].float().numpy()
            codes = codes.reshape(*scales.shape, -1) * scales[..., None]
            tensor.copy_(torch.from_numpy(codes.reshape(tensor.shape)))
        elif name in stored:
            tensor.copy_(stored[name])
    return plain


@BITS
def test_the_folder_means_its_codes_times_its_scales(world, bits):
    folder = world / f"int{bits}"
    ours = logits(load_folder(folder)[0])
    torch.testing.assert_close(ours, logits(reference(folder)), atol=1e-5, rtol=1e-5)
    away = (ours - logits(load_folder(world / "fp32")[0])).abs().max()
    assert away > 1e-2  # it was quantized


@pytest.mark.parametrize("options", ["--bits 4", "--bits 4 --group 16", "--bits 4 --group 0", "--bits 8",
                                     "--bits 8 --group 16"])
def test_transformers_gives_the_same_logits(world, tmp_path, options):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM
    assert run("quantize", "--model", world / "fp32", *options.split(), "--out", tmp_path / "out") == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    model, _ = load_folder(tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-4, rtol=1e-4)  # unpacked by now


def test_int4_is_less_than_three_tenths_of_fp32_and_run_json_tells_the_errors(world):
    size = {name: (world / name / "model.safetensors").stat().st_size for name in ("fp32", "int4", "int8")}
    assert size["int4"] <= 0.3 * size["fp32"] and size["int4"] < size["int8"] < 0.4 * size["fp32"]
    for name, most in (("int4", 0.13), ("int8", 0.015)):
        record = json.loads((world / name / "run.json").read_text())
        assert record["finished"] and record["bytes"] == {"before": size["fp32"], "after": size[name]}
        assert len(record["relative_error"]) == 28 and 0 < max(record["relative_error"].values()) < most


def test_it_generates_with_a_cache_and_is_saved_elsewhere_as_it_is(world, tmp_path):
    model, tokenizer = load_folder(world / "int4")
    answer = generate(model, [[1, 30, 40]], 5, [])[0].ids
    for n in range(5):
        assert logits(model, torch.tensor([[1, 30, 40, *answer[:n]]]))[0, -1].argmax() == answer[n]
    save_folder(tmp_path / "copy", model, tokenizer)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (world / "int4" / name).read_bytes(), name


@pytest.mark.parametrize("calibration", ["tokens", "sft.jsonl"])
def test_gptq_is_nearer_to_the_model_on_texts_like_those_it_was_calibrated_on(world, tmp_path, calibration):
    t = Tokenizer.load(tiny() / "tokenizer")
    shards = read_tokens(tiny() / "tokens", "valid", t)
    texts = {"tokens": [shard.tokens[:64].astype(int).tolist() for shard in shards],
             "sft.jsonl": [encode_chat(t, d["messages"])[0][:64] for d in dialogues(8, "others")]}[calibration]
    settings = ["--calibration", tiny() / calibration, "--method", "gptq", "--samples", 40]
    assert run("quantize", "--model", world / "fp32", *settings, "--out", tmp_path / "out") == 0
    exact, nearest, ours = (load_folder(f)[0] for f in (world / "fp32", world / "int4", tmp_path / "out"))
    away = [sum((logits(model, torch.tensor([ids])) - logits(exact, torch.tensor([ids]))).norm() for ids in texts)
            for model in (nearest, ours)]
    assert away[1] < 0.9 * away[0]


def test_an_adapter_is_merged_first(tmp_path):
    assert run("sft", *sft_arguments(tiny(), tmp_path / "lora", epochs=1, lora=4, lr=3e-2)) == 0
    assert run("sft", *sft_arguments(tiny(), tmp_path / "merged", epochs=1, lora=4, lr=3e-2), "--merge") == 0
    for name in ("lora", "merged"):
        assert run("quantize", "--model", tmp_path / name, "--group", 16, "--out", tmp_path / f"{name}4") == 0
    lora, merged = (load_file(tmp_path / f"{name}4" / "model.safetensors") for name in ("lora", "merged"))
    assert lora.keys() == merged.keys() and all(torch.equal(lora[name], merged[name]) for name in lora)


# ---- what is refused

PACKED = "model.layers.1.mlp.up_proj.weight_packed"
TENSORS = {
    "missing": lambda t: t.pop(PACKED),
    "too many": lambda t: t.update({PACKED.replace("packed", "g_idx"): torch.zeros(64)}),
    "narrow": lambda t: t.update({PACKED: t[PACKED][:, :-1].contiguous()}),
    "other kind": lambda t: t.update({PACKED: t[PACKED].float()}),
    "few scales": lambda t: t.update({PACKED.replace("packed", "scale"): torch.ones(192, 1)}),
    "whole scales": lambda t: t.update({PACKED.replace("packed", "scale"): torch.ones(192, 2).int()}),
    "nan": lambda t: t[PACKED.replace("packed", "scale")].fill_(torch.nan),
    "turned": lambda t: t.update({PACKED.replace("packed", "shape"): torch.tensor([64, 192])}),
}


@pytest.mark.parametrize("damage", ["truncated", *TENSORS])
def test_a_damaged_packed_folder_is_one_error(world, tmp_path, damage):
    folder = shutil.copytree(world / "int4", tmp_path / "int4")
    path = folder / "model.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        tensors = load_file(path)
        TENSORS[damage](tensors)
        save_file(tensors, path)
    with pytest.raises(InputError, match=str(folder)):
        load_folder(folder)


CONFIGS = [
    {"quant_method": "gptq"}, {"config_groups": {}}, {"config_groups": []}, {"config_groups": None},
    {"ignore": []}, {"kv_cache_scheme": {"num_bits": 8}}, {"format": "marlin-24"}, {"weights": 4},
    {"weights": {"num_bits": 3}}, {"weights": {"actorder": "group"}}, {"weights": {"symmetric": False}},
    {"weights": {"group_size": "32"}}, {"weights": {"group_size": -32}}, {"weights": {"group_size": 48}},
    {"weights": {"group_size": 4}}, {"weights": {"strategy": "block"}}, {"targets": ["Embedding"]},
    {"input_activations": {"num_bits": 8}}]


@pytest.mark.parametrize("change", CONFIGS, ids=str)
def test_another_layout_is_one_error(world, tmp_path, change):
    folder = shutil.copytree(world / "int4", tmp_path / "int4")
    config = json.loads((folder / "config.json").read_text())
    layout = config["quantization_config"]
    layers = layout["config_groups"]["group_0"]
    for key, value in change.items():
        if key in ("weights", "targets", "input_activations"):
            layers[key] = layers[key] | value if isinstance(value, dict) and layers[key] else value
        else:
            layout[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as error:
        load_folder(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("script, arguments, words", [
    ("quantize", "--model int4", "int4: is quantized already"),
    ("quantize", "--model reward", "reward/config.json: architectures"),
    ("quantize", "--model fp32 --group 48", "model.layers.0.self_attn.q_proj: groups of 48"),
    ("quantize", "--model fp32 --group 4", "model.layers.0.self_attn.q_proj: multiples of 8"),
    ("quantize", "--model nan", "nan: model.layers.2.mlp.gate_proj.weight finite"),
    ("quantize", "--model fp32 --bits 3", "--bits"),
    ("quantize", "--model fp32 --group -1", "--group"),
    ("quantize", "--model missing", "missing: no such folder"),
    ("quantize", "--model fp32 --method gptq", "--method gptq --calibration"),
    ("quantize", "--model fp32 --calibration {}/sft.jsonl", "--method gptq --calibration"),
    ("quantize", "--model fp32 --method gptq --calibration missing", "missing: not found"),
    ("quantize", "--model fp32 --method gptq --calibration fp32/config.json", "config.json:1"),
    ("quantize", "--model fp32 --method gptq --calibration {}/prompts.jsonl", "prompts.jsonl:"),
    ("quantize", "--model fp32 --out int8", "int8 finished --overwrite"),
    ("quantize", "--model fp32 --out reward --overwrite", "reward no folder of quantize.py"),
    ("quantize", "--model fp32 --out fp32 --overwrite", "fp32 --model"),
    ("sft", "--model int4 --data {}/sft.jsonl --max-length 64", "int4: is quantized already"),
])
def test_what_cannot_be_is_told_in_one_line(world, monkeypatch, capsys, script, arguments, words):
    monkeypatch.chdir(world)
    if "nan" in arguments and not (world / "nan").exists():
        model, tokenizer = load_folder(world / "fp32")
        with torch.no_grad():
            model.model.layers[2].mlp.gate_proj.weight[3, 3] = torch.inf
        save_folder("nan", model, tokenizer)
    before = sorted(world.rglob("*"))
    out = [] if "--out" in arguments else ["--out", "new"]
    assert run(script, *arguments.format(tiny()).split(), *out) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in words.split()), lines
    assert sorted(world.rglob("*")) == before  # nothing is written


def test_a_quantized_reward_model_is_refused(world, tmp_path):
    folder = shutil.copytree(world / "reward", tmp_path / "reward")
    layout = json.loads((world / "int4" / "config.json").read_text())["quantization_config"]
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": layout}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="a quantized reward model"):
        load_folder(folder, kind=RewardModel)


def test_a_finished_folder_is_replaced_when_asked(world, tmp_path):
    for bits in (8, 4):
        assert run("quantize", "--model", world / "fp32", "--bits", bits, "--out", tmp_path / "out",
                   "--overwrite") == 0
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (world / "int4" / name).read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
