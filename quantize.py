"""quantize.py: a model in 4 or 8 bits. Linear layers become small integers with scales; all else is bf16.

    python quantize.py --model run/dpo --bits 4 --out run/int4      # about a fifth of the bytes of fp32
    python quantize.py --model run/dpo --bits 8 --out run/int8      # about a quarter

Round to nearest: each weight becomes a code, the nearest multiple of its group's scale. The folder is in
compressed-tensors' layout, which transformers loads too; here every script that only reads a model takes it.
Embeddings, the head and norms stay numbers of 16 bits: they are few, or are much more easily hurt.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from model import (QuantizedLinear, add_quantized, load_folder, pack_int4, quantization_config, read_json,
                   refuse_untrainable, save_folder, write_json)
from tokenizer import InputError, one_line_errors, option, parse_options


@dataclass(kw_only=True)
class Options:
    """Quantize a model's linear layers to INT4 or INT8 (compressed-tensors' layout)."""

    model: str = option("checkpoint folder: a model, or a LoRA adapter, which is merged first")
    out: str = option("checkpoint folder to write")
    bits: int = option("bits of a weight's code", 4, choices=(4, 8))
    group: int | None = option("neighbouring weights of a row that share a scale; 0: the whole row; not "
                               "given, 32 for 4 bits and the whole row for 8", None, at_least=0)
    method: str = option("how codes are chosen; rtn rounds to nearest", "rtn", choices=("rtn",))
    overwrite: bool = option("replace a finished --out", False)


def quantize(weight, bits, group):
    """Round to nearest, symmetric (Nagel et al. 2021, section 2.2.1), with a scale for each group of a row.

    weight: (out, in) fp32. Returns codes (out, in) int8 and scales (out, in / group) bf16. A group's scale
    puts its largest weight on the largest code, or its lowest on the lowest: no error is above half a scale,
    and quantized weights quantize to themselves (with 8 bits a scale of bf16 is just fine enough for that,
    and scale * code is exact in fp32).
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    groups = weight.unflatten(1, (-1, group))  # (out, in / group, group)
    scales = torch.maximum(groups.amax(-1) / high, groups.amin(-1) / low)  # (out, in / group)
    scales = scales.clamp(min=torch.finfo(torch.float32).tiny)  # a group of zeros must not divide by zero
    scales = scales.to(torch.bfloat16)  # rounded before the codes are chosen: they make up for it
    codes = (groups / scales.float()[..., None]).round().clamp(low, high)
    return codes.flatten(1).to(torch.int8), scales


@torch.no_grad()
def quantize_model(model, bits, group, where):
    """Quantize the linear layers of a model's blocks in place; {layer: |W - its quantized self| / |W|}."""
    weights = {name: module.weight for name, module in model.named_modules()
               if isinstance(module, torch.nn.Linear)}
    errors = {}
    add_quantized(model, bits, group, where)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            weight = weights[name].float()  # (out, in)
            codes, scales = quantize(weight, bits, group or weight.shape[1])
            layer.weight_scale.copy_(scales)
            if bits == 4:
                layer.weight_packed.copy_(pack_int4(codes))
            else:
                layer.weight.copy_(codes)
            norm = weight.norm().item()
            errors[name] = (layer.dequantized() - weight).norm().item() / norm if norm else 0.0
    return errors


def write_folder(folder, model, tokenizer, bits, group):
    """A model folder whose config.json says how its layers are packed; what is not packed is bf16."""
    model.stored_dtype = torch.bfloat16
    layout = quantization_config(bits, group, experts=bool(model.config.sparse_layers))
    save_folder(folder, model, tokenizer,
                {"quantization_config": layout, "dtype": "bfloat16", "torch_dtype": "bfloat16"})


def weight_bytes(folder):
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def check_out(options):
    """Refuse an --out that is something else's, or finished."""
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
    check_out(options)
    refuse_untrainable(options.model)
    model, tokenizer = load_folder(options.model)
    group = options.group if options.group is not None else {4: 32, 8: 0}[options.bits]
    errors = quantize_model(model, options.bits, group, options.model)
    folder = Path(f"{options.out.rstrip('/')}.partial")
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left: never under the name of --out
    try:
        write_folder(folder, model, tokenizer, options.bits, group)
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
