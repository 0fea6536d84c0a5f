"""quantize.py: a model in 4 or 8 bits. Linear layers become small integers with scales; all else is bf16.

    python quantize.py --model run/dpo --bits 4 --out run/int4      # about a fifth of the bytes of fp32
    python quantize.py --model run/dpo --bits 8 --out run/int8      # three tenths
    python quantize.py --model run/dpo --method gptq --calibration run/island/sft.jsonl --out run/gptq

Round to nearest: each weight becomes a code, the nearest multiple of its group's scale. GPTQ rounds a row
from left to right, and the weights not yet rounded make up for what those before have lost, so that the
layer's outputs on the calibration texts change little. The folder is in compressed-tensors' layout, which
transformers loads too; here every script that only reads a model takes it. Embeddings, the head and norms
stay numbers of 16 bits: they are few, or are much more easily hurt.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tqdm import tqdm

from model import (QuantizedLinear, add_quantized, end_at_answers, load_folder, pack, quantization_config,
                   read_json, refuse_untrainable, save_folder, weight_of, write_json)
from tokenizer import (InputError, as_answer, encode_chat, jsonl_files, one_line_errors, option,
                       parse_options, prompt_messages, read_jsonl, read_tokens)


@dataclass(kw_only=True)
class Options:
    """Quantize a model's linear layers to INT4 or INT8 (compressed-tensors' layout)."""

    model: str = option("checkpoint folder: a model, or a LoRA adapter, which is merged first")
    out: str = option("checkpoint folder to write")
    bits: int = option("bits of a weight's code", 4, choices=(4, 8))
    group: int | None = option("neighbouring weights of a row that share a scale; 0: the whole row; not "
                               "given, 32 for 4 bits and the whole row for 8", None, at_least=0)
    method: str = option("how codes are chosen: rtn rounds to nearest, gptq makes up for what rounding loses",
                         "rtn", choices=("rtn", "gptq"))
    calibration: str = option("for gptq: a folder of tokens, or JSONL: texts or chats", "")
    samples: int = option("for gptq: texts, or windows of tokens, to calibrate on", 256, at_least=1)
    max_length: int = option("for gptq: tokens of a text that are read", 256, at_least=2)
    seed: int = option("for gptq: seed of which texts", 1, at_least=0)
    overwrite: bool = option("replace a finished --out", False)


# ---------------------------------------------------------------------------------------------------------
# Codes and scales of one matrix


def scales_of(groups, bits):
    """(..., group) -> (...) bf16: the largest weight is on the largest code, or the lowest on the lowest."""
    scales = torch.maximum(groups.amax(-1) / (2 ** (bits - 1) - 1), groups.amin(-1) / -(2 ** (bits - 1)))
    scales = scales.clamp(min=torch.finfo(torch.float32).tiny)  # a group of zeros must not divide by zero
    return scales.to(torch.bfloat16)  # rounded before the codes are chosen: they make up for it


def codes_of(weight, scales, bits):
    """The nearest codes: weight and scales (of each weight, or broadcast) fp32 -> codes in fp32."""
    return (weight / scales).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def quantize(weight, bits, group):
    """Round to nearest, symmetric (Nagel et al. 2021, section 2.2.1), with a scale for each group of a row.

    weight: (out, in) fp32. Returns codes (out, in) int8 and scales (out, in / group) bf16. No error is above
    half a scale, and quantized weights quantize to themselves (with 8 bits a scale of bf16 is just fine
    enough for that, and scale * code is exact in fp32).
    """
    groups = weight.unflatten(1, (-1, group))  # (out, in / group, group)
    scales = scales_of(groups, bits)  # (out, in / group)
    codes = codes_of(groups, scales.float()[..., None], bits)
    return codes.flatten(1).to(torch.int8), scales


def gptq(weight, hessian, bits, group):
    """The same, with codes for which |(W - Q) X| is small (GPTQ; Frantar et al. 2022, algorithm 1).

    hessian (in, in) fp64: the sum of x x^T over the layer's inputs. A column is rounded, and what that loses
    is taken from the columns after it as the inverse Hessian says (eq. 2), those of its block at once, the
    rest when the block is done. A group's scale is chosen when its turn comes.
    """
    weight, columns = weight.double(), weight.shape[1]
    damping = 0.01 * hessian.diagonal().mean().clamp(min=1e-30)  # inputs may be fewer than columns
    hessian = hessian + damping * torch.eye(columns, dtype=hessian.dtype)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    codes, scales = torch.empty_like(weight), torch.empty(len(weight), columns // group, dtype=torch.bfloat16)
    block = 128 if group % 128 == 0 else group
    for first in range(0, columns, block):
        last, losses = first + block, torch.empty(len(weight), block, dtype=weight.dtype)
        for i in range(first, last):
            if i % group == 0:
                scale = scales[:, i // group] = scales_of(weight[:, i : i + group].float(), bits)
            codes[:, i] = codes_of(weight[:, i], scale.double(), bits)
            loss = losses[:, i - first] = (weight[:, i] - codes[:, i] * scale.double()) / inverse[i, i]
            weight[:, i:last] -= torch.outer(loss, inverse[i, i:last])
        weight[:, last:] -= losses @ inverse[first:last, last:]
    return codes.to(torch.int8), scales


# ---------------------------------------------------------------------------------------------------------
# Calibration: texts -> the inputs of every layer


def calibration_texts(options, tokenizer, length):
    """Lists of at most `length` ids, --samples of them, drawn by the seed: windows of tokens, or texts."""
    path, draw = Path(options.calibration), Random(options.seed)
    if (path / "index.json").exists():
        shards = read_tokens(path, "train", tokenizer)
        windows = [(shard.tokens, at) for shard in shards
                   for at in range(0, len(shard.tokens) - 1, length)]
        chosen = draw.sample(windows, min(options.samples, len(windows)))
        return [tokens[at : at + length].tolist() for tokens, at in chosen]
    records = [(f"{file}:{number}", record) for file in jsonl_files([path])
               for number, record in read_jsonl(file)]
    texts = []
    for place, record in draw.sample(records, min(options.samples, len(records))):
        try:
            texts.append(record_ids(record, tokenizer)[:length])
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
    if not texts:
        raise InputError(f"--calibration {path}: no text to calibrate on")
    return texts


def record_ids(record, tokenizer):
    """The ids of a record with `text`, `messages`, or `prompt` and `completion`."""
    if isinstance(record.get("text"), str):
        if tokenizer.endoftext is None:
            raise InputError("this tokenizer has no token that a text begins with: calibrate on chats")
        return [tokenizer.endoftext, *tokenizer.encode(record["text"])]
    if "messages" in record:
        return encode_chat(tokenizer, record["messages"])[0]
    if "completion" not in record:
        raise InputError("no `text`, no `messages`, no `prompt` and `completion`")
    prompt = prompt_messages(record)
    return encode_chat(tokenizer, prompt + as_answer(record["completion"], prompt))[0]


def block_inputs(model, texts):
    """What goes into the first block for each text, x (1, T, H), and what beside x into each block."""
    layers, inputs, others = model.model.layers, [], [[] for _ in model.model.layers]
    hooks = [layer.register_forward_pre_hook(lambda module, given, own=own: own.append(given[1:]))
             for layer, own in zip(layers, others)]
    hooks.append(layers[0].register_forward_pre_hook(lambda module, given: inputs.append(given[0])))
    for ids in texts:
        model.model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return inputs, others


def hessians_of(block, layers, inputs, others):
    """{layer: the sum of x x^T (in, in) over all inputs x that it has in this block}, fp64."""
    hessians = {name: torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64)
                for name, layer in layers.items()}

    def add(name, x):
        rows = x.flatten(0, -2).double()  # (tokens, in)
        hessians[name] += rows.T @ rows

    hooks = [layer.register_forward_pre_hook(lambda module, given, name=name: add(name, given[0]))
             for name, layer in layers.items()]
    for x, other in zip(inputs, others):
        block(x, *other)
    for hook in hooks:
        hook.remove()
    return hessians


def calibrated(model, layers, bits, group, texts):
    """Yield (layer, weight, codes, scales), each block calibrated behind those that are quantized already."""
    inputs, others = block_inputs(model, texts)
    for number, block in enumerate(tqdm(model.model.layers, "blocks", disable=None)):
        own = {name: layer for name, layer in layers.items() if name.startswith(f"model.layers.{number}.")}
        for name, hessian in hessians_of(block, own, inputs, others[number]).items():
            layer, size = own[name], group or own[name].in_features
            codes, scales = gptq(layer.weight, hessian, bits, size)
            yield name, layer.weight, codes, scales
            layer.weight = torch.nn.Parameter(weight_of(codes, scales))
        inputs = [block(x, *other) for x, other in zip(inputs, others[number])]


# ---------------------------------------------------------------------------------------------------------
# The model, and its folder


@torch.no_grad()
def quantize_model(model, bits, group, where, texts=None):
    """Quantize the linear layers of a model's blocks in place; {layer: |W - its quantized self| / |W|}.

    texts: lists of ids that GPTQ is calibrated on; none: round to nearest.
    """
    with torch.device("meta"):  # refuses groups that do not fit, before anything is done
        empty = add_quantized(type(model)(model.config), bits, group, where)
    names = [name for name, module in empty.named_modules() if isinstance(module, QuantizedLinear)]
    layers = {name: model.get_submodule(name) for name in names}
    nearest = ((name, layer.weight, *quantize(layer.weight.float(), bits, group or layer.in_features))
               for name, layer in layers.items())
    found, errors = {}, {}
    for name, weight, codes, scales in calibrated(model, layers, bits, group, texts) if texts else nearest:
        norm = weight.float().norm().item()
        errors[name] = (weight_of(codes, scales) - weight).norm().item() / norm if norm else 0.0
        found[name] = pack(codes, bits), scales
    add_quantized(model, bits, group, where)
    for name, (codes, scales) in found.items():
        layer = model.get_submodule(name)
        layer.weight_scale.copy_(scales)
        layer.weight_packed.copy_(codes)
    return errors


def write_folder(folder, model, tokenizer, bits, group):
    """A model folder whose config.json says how its layers are packed; what is not packed is bf16."""
    model.stored_dtype = torch.bfloat16
    layout = quantization_config(bits, group, experts=bool(model.config.sparse_layers))
    save_folder(folder, model, tokenizer,
                {"quantization_config": layout, "dtype": "bfloat16", "torch_dtype": "bfloat16"})


def weight_bytes(folder):
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def check_options(options):
    """Refuse an --out that is something else's, or finished, and GPTQ without a text."""
    if (options.method == "gptq") != bool(options.calibration):
        raise InputError("--method gptq and --calibration need each other")
    out = Path(options.out)
    if out.resolve() == Path(options.model).resolve():
        raise InputError(f"--out {out} is the --model; choose another --out")
    run = read_json(out / "run.json") if (out / "run.json").exists() else {}
    if out.exists() and run.get("stage") != "quantize" and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} exists and is no folder of quantize.py; choose another --out")
    if run and not options.overwrite:
        raise InputError(f"--out {out} is finished; choose another --out, or --overwrite it")


def print_report(errors, run):
    for name, error in errors.items():
        print(f"{name:<40} relative error {error:.4f}")
    before, after = run["bytes"]["before"], run["bytes"]["after"]
    print(f"{len(errors)} layers in INT{run['options']['bits']}; {before / 1e6:,.2f} MB before, "
          f"{after / 1e6:,.2f} MB after: {after / before:.3f} of it")


@one_line_errors
def main(argv=None):
    options, began = parse_options(Options, argv, "quantize.py"), time.perf_counter()
    check_options(options)
    refuse_untrainable(options.model)
    model, tokenizer = load_folder(options.model)
    group = options.group if options.group is not None else {4: 32, 8: 0}[options.bits]
    length = min(options.max_length, model.config.max_position_embeddings)
    texts = calibration_texts(options, tokenizer, length) if options.method == "gptq" else None
    errors = quantize_model(model, options.bits, group, options.model, texts)
    folder = Path(f"{options.out.rstrip('/')}.partial")
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left: never under the name of --out
    try:
        write_folder(folder, model, tokenizer, options.bits, group)
        if (Path(options.model) / "adapter_config.json").exists():  # which made a base model answer
            end_at_answers(folder, tokenizer)
        size = {"before": weight_bytes(model.source), "after": weight_bytes(folder)}
        run = {"stage": "quantize", "options": dataclasses.asdict(options), "bytes": size,
               "relative_error": errors, "seconds": time.perf_counter() - began, "finished": True}
        write_json(folder / "run.json", run)
        shutil.rmtree(options.out, ignore_errors=True)
        folder.rename(options.out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_report(errors, run)


if __name__ == "__main__":
    sys.exit(main())
