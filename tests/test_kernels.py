"""Each twin against its formula; each kernel against its twin in float64, and compiled for two GPUs."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import linear_logprob, linear_logprob_reference, rms_norm, rms_norm_reference

needs_triton = pytest.mark.skipif(kernels.triton is None, reason="no triton on this platform")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
# Largest error allowed, relative to the largest value.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def norm_inputs(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*size, generator=generator).half().float() for size in (shape, shape[-1:])]


def head_inputs(rows, hidden_size, vocab_size, seed=0):
    """hidden, weight and targets, a third of which are not trained."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, hidden_size, generator=generator).half().float()
    weight = torch.randn(vocab_size, hidden_size, generator=generator).div(hidden_size**0.5).half().float()
    targets = torch.randint(0, vocab_size, (rows,), generator=generator)
    targets[1::3] = -1
    return hidden, weight, targets


def value_and_gradients(function, inputs, dtype, device="cpu"):
    """The output and the gradients of its sum weighted by fixed random numbers, in float64 on the CPU."""
    inputs = [x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in inputs]
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    out = function(*inputs)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out))
    return [x.detach().cpu().double() for x in (out, *(i.grad for i in inputs if i.requires_grad))]


def assert_equal_to_twin(kernel, twin, inputs, dtype, device="cpu"):
    found = value_and_gradients(kernel, inputs, dtype, device)
    wanted = value_and_gradients(twin, inputs, torch.float64)
    for name, x, y in zip(("value", "first gradient", "second gradient"), found, wanted):
        assert (x - y).abs().max() <= TOLERANCE[dtype] * max(1e-3, y.abs().max()), (name, dtype)


# ---------------------------------------------------------------------------------------------------------
# The twins


def test_rms_norm_is_the_formula():
    x, weight = (t.double().numpy() for t in norm_inputs(3, 5, 16))
    wanted = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight
    found = rms_norm(torch.tensor(x), torch.tensor(weight), 1e-5)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_keeps_the_dtype_of_x_and_the_fused_path(dtype, recwarn):
    x, weight = norm_inputs(4, 64)
    assert rms_norm(x.to(dtype), weight).dtype == dtype
    assert not [w for w in recwarn if "fused" in str(w.message)]


def test_linear_logprob_is_the_formula():
    hidden, weight, targets = head_inputs(10, 8, 50)
    logits = hidden.double().numpy() @ weight.double().numpy().T
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    wanted = np.where(targets < 0, 0.0, logprobs[np.arange(10), targets])
    found = linear_logprob(hidden, weight, targets)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)
    assert (found[targets < 0] == 0).all()


def test_linear_logprob_of_nothing_and_of_no_target():
    hidden, weight, targets = head_inputs(4, 8, 50)
    assert linear_logprob(hidden[:0], weight, targets[:0]).shape == (0,)
    hidden.requires_grad_()
    for ignored in (-1, -100):
        linear_logprob(hidden, weight, torch.full((4,), ignored)).sum().backward()
        assert not hidden.grad.any()


def test_linear_logprob_of_huge_logits_is_finite():
    weight = torch.eye(4)
    logprobs = linear_logprob(weight * 1e4, weight, torch.tensor([0, 1, 0, -1]))
    assert logprobs.tolist() == [0.0, 0.0, -1e4, 0.0]


@given(rows=st.integers(1, 40), vocab_size=st.integers(1, 60), few=st.integers(1, 300))
@settings(max_examples=30)
def test_chunks_of_rows_change_nothing(rows, vocab_size, few):
    inputs = head_inputs(rows, 8, vocab_size)
    whole = value_and_gradients(linear_logprob_reference, inputs, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "MAX_LOGITS", few)
        chunked = value_and_gradients(linear_logprob_reference, inputs, torch.float64)
    for x, y in zip(whole, chunked):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_chunks_bound_the_memory_kept_for_backward(monkeypatch):
    hidden, weight, targets = head_inputs(64, 8, 100)
    monkeypatch.setattr(kernels, "MAX_LOGITS", 800)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        linear_logprob_reference(hidden.requires_grad_(), weight.requires_grad_(), targets)
    assert max(kept, default=0) <= 800


def test_twins_under_bf16_autocast_are_near():
    hidden, weight, targets = head_inputs(64, 32, 200)
    wanted = linear_logprob_reference(hidden.double(), weight.double(), targets)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_logprob(rms_norm(hidden, torch.ones(32)), weight, targets)
        assert found.dtype == torch.float32
    normed = rms_norm_reference(hidden.double(), torch.ones(32).double())
    wanted = linear_logprob_reference(normed, weight.double(), targets)
    assert (found - wanted).abs().max() < 0.05


@pytest.mark.slow
def test_twins_under_torch_compile():
    def loss(hidden, norm, weight, targets):
        return linear_logprob(rms_norm(hidden, norm), weight, targets)

    hidden, weight, targets = head_inputs(64, 32, 200)
    inputs = hidden, torch.ones(32), weight, targets
    compiled = torch.compile(loss, fullgraph=True)
    for x, y in zip(value_and_gradients(compiled, inputs, torch.float32),
                    value_and_gradients(loss, inputs, torch.float32)):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------
# The kernels. Interpreter and compiler want processes of their own: an interpreted kernel cannot be compiled.

NORM_SHAPES = [(3, 70, 64), (5, 256), (9, 700), (1, 33)]
HEAD_SHAPES = [(200, 100, 1000), (1, 16, 3), (130, 64, 129)]


def check_kernels(dtype, device="cpu"):
    """Every kernel at every shape; the few programs make each of them take several turns of its loops."""
    programs, logits = kernels.PROGRAMS, kernels.MAX_LOGITS
    for kernels.PROGRAMS, kernels.MAX_LOGITS in ((4, 200 * 256), (programs, logits)):
        for shape in NORM_SHAPES:
            inputs = norm_inputs(*shape)
            assert_equal_to_twin(kernels.rms_norm_triton, rms_norm_reference, inputs, dtype, device)
        for shape in HEAD_SHAPES:
            inputs = head_inputs(*shape)
            kernel, twin = kernels.linear_logprob_triton, linear_logprob_reference
            assert_equal_to_twin(kernel, twin, inputs, dtype, device)


def check_frozen_and_broken(device="cpu"):
    """A frozen weight gets no gradient; a NaN reaches its own row's log-probability and no other."""
    hidden, weight, targets = (x.to(device) for x in head_inputs(4, 16, 40))
    logprobs = kernels.linear_logprob_triton(hidden.requires_grad_(), weight, targets)
    logprobs.sum().backward()
    assert hidden.grad[0].any() and not hidden.grad[1].any() and weight.grad is None
    broken = hidden.detach().clone()
    broken[0, 3] = math.nan
    found = kernels.linear_logprob_triton(broken, weight, targets)
    assert found[0].isnan() and torch.equal(found[1:], logprobs[1:])


def compile_kernel(kernel, arch, dtypes, constants, **options):
    """Shared memory (bytes) of a kernel compiled for an architecture, specialised as a launch would."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else dtypes.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
               if signature[n].startswith("*") or n in ("hidden_size", "vocab_size")}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return kernels.triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).metadata.shared


def check_compiled(arch):
    """Each kernel compiles for half and single precision, within the 99 KB that every GPU since 2020 has."""
    fp32 = dict.fromkeys(("inverse_ptr", "parts_ptr", "target_logits_ptr", "logsumexp_ptr"), "*fp32")
    for name in ("bf16", "fp32"):
        pointer = f"*{name}"
        same = dict.fromkeys(("x_ptr", "y_ptr", "dx_ptr", "hidden_ptr", "weight_ptr", "dlogits_ptr"), pointer)
        blocks = kernels.logit_blocks(torch.float32 if name == "fp32" else torch.bfloat16)
        options = {key: blocks.pop(key) for key in ("num_warps", "num_stages")}
        head = same | fp32 | {"targets_ptr": "*i64", "grad_ptr": "*fp32"}
        used = [compile_kernel(kernel, arch, head, blocks, **options)
                for kernel in (kernels.logsumexp_kernel, kernels.dlogits_kernel)]
        for hidden_size in (64, 4096):
            block, rows, warps = kernels.norm_blocks(hidden_size)
            norm = same | fp32 | {"grad_ptr": pointer, "weight_ptr": "*fp32", "eps": "fp32"}
            used += [compile_kernel(kernel, arch, norm, {"ROWS": rows, "BLOCK": block}, num_warps=warps)
                     for kernel in (kernels.rms_norm_forward_kernel, kernels.rms_norm_backward_kernel)]
        assert max(used) <= 99 * 1024, (arch, name, used)


def in_a_process(call, **environment):
    """Run one of the checks above in a fresh Python."""
    tests = Path(__file__).resolve().parent
    environment["PYTHONPATH"] = f"{tests}{os.pathsep}{tests.parent}"
    done = subprocess.run([sys.executable, "-c", f"import torch; from test_kernels import *; {call}"],
                          env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_triton
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_kernels_equal_their_twins_under_the_interpreter(dtype):
    in_a_process(f"check_kernels(torch.{dtype})", TRITON_INTERPRET="1")


@needs_triton
def test_frozen_weights_and_nan_under_the_interpreter():
    in_a_process("check_frozen_and_broken()", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile_without_a_gpu(arch, tmp_path):
    in_a_process(f"check_compiled({arch})", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


@needs_triton
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_equal_their_twins_on_a_gpu(dtype):
    check_kernels(dtype, "cuda")
    check_frozen_and_broken("cuda")
