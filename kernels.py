"""The hot operations, each as a Triton kernel and as its plain PyTorch twin with the same signature.

The twin (`..._reference`) is the specification and runs anywhere; the kernel (`..._triton`) must equal it and
runs on a GPU; the function without a suffix picks one. Every sum is taken in a fixed order, so that a run
repeats bit for bit. Letters: N rows (tokens of a batch laid end to end), H hidden size, V vocabulary.
"""

import os

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # a * b + c rounded once; triton 3.9 warns where unset
try:
    import triton
    import triton.language as tl
except ImportError:  # macOS has none
    triton = None

# Logits held at once where some must be (256 MB in fp32): with more, rows or vocabulary are taken in parts.
MAX_LOGITS = 1 << 26
# Programs that fill a large GPU several times over.
PROGRAMS = 1024


def uses_triton(x):
    return triton is not None and x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


# ---------------------------------------------------------------------------------------------------------
# RMSNorm


def rms_norm(x, weight, eps=1e-6):
    """x (..., H) / sqrt(mean of squares + eps) * weight (H,) -> (..., H) in x's dtype.

    torch.compile merges the twin with its neighbours, which no kernel of ours could, so it gets the twin.
    """
    if uses_triton(x) and not torch.compiler.is_compiling():
        return rms_norm_triton(x, weight, eps)
    return rms_norm_reference(x, weight, eps)


def rms_norm_reference(x, weight, eps=1e-6):
    """RMSNorm (Zhang and Sennrich 2019, eq. 4) over the last dimension, in fp32 inside, rounded once.

    The weight is cast because PyTorch leaves its fused path when the dtypes differ.
    """
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def rms_norm_triton(x, weight, eps=1e-6):
    return RMSNorm.apply(x, weight, eps)


class RMSNorm(torch.autograd.Function):
    """Forward keeps x and 1 / rms; backward gets the weight's gradient as partial sums, one a program."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        rows = x.contiguous().view(-1, x.shape[-1])  # (N, H)
        y, inverse = torch.empty_like(rows), torch.empty(len(rows), dtype=torch.float32, device=x.device)
        block, rows_at_once, warps = norm_blocks(rows.shape[1])
        rms_norm_forward_kernel[(triton.cdiv(len(rows), rows_at_once),)](
            rows, weight, y, inverse, *rows.shape, eps, ROWS=rows_at_once, BLOCK=block, num_warps=warps)
        ctx.save_for_backward(rows, weight, inverse)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, weight, inverse = ctx.saved_tensors
        block, rows_at_once, warps = norm_blocks(rows.shape[1])
        programs = min(PROGRAMS, triton.cdiv(len(rows), rows_at_once))
        dx = torch.empty_like(rows)
        parts = torch.empty(programs, rows.shape[1], dtype=torch.float32, device=rows.device)
        rms_norm_backward_kernel[(programs,)](
            grad.contiguous(), rows, weight, inverse, dx, parts, *rows.shape,
            ROWS=rows_at_once, BLOCK=block, num_warps=warps)
        return dx.view(grad.shape), parts.sum(0).to(weight.dtype), None


def norm_blocks(hidden_size):
    """Columns, rows and warps of a program: a whole row always, and several short ones (heads of QK-norm)."""
    block = triton.next_power_of_2(hidden_size)
    return block, max(1, 2048 // block), min(16, max(4, block // 512))


if triton is not None:

    @triton.jit
    def rms_norm_forward_kernel(x_ptr, weight_ptr, y_ptr, inverse_ptr, n_rows, hidden_size, eps,
                                ROWS: tl.constexpr, BLOCK: tl.constexpr):
        """Program i: rows i * ROWS ... of x and y (N, H), and of inverse (N,), 1 / rms."""
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        columns = tl.arange(0, BLOCK)
        inside = (rows < n_rows)[:, None] & (columns < hidden_size)[None, :]
        offsets = rows.to(tl.int64)[:, None] * hidden_size + columns[None, :]
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)  # (ROWS, BLOCK)
        weight = tl.load(weight_ptr + columns, mask=columns < hidden_size, other=0.0)
        weight = weight.to(x_ptr.dtype.element_ty).to(tl.float32)  # as the twin rounds it
        inverse = 1.0 / tl.sqrt(tl.sum(x * x, 1) / hidden_size + eps)  # (ROWS,)
        tl.store(inverse_ptr + rows, inverse, mask=rows < n_rows)
        y = x * inverse[:, None] * weight[None, :]
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def rms_norm_backward_kernel(grad_ptr, x_ptr, weight_ptr, inverse_ptr, dx_ptr, parts_ptr,
                                 n_rows, hidden_size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        """With n = x / rms and g = grad * weight: dx = (g - n * mean(g * n)) / rms, dweight = sum(grad * n).

        Program i: every PROGRAMS-th group of ROWS rows, and row i of parts, its share of dweight.
        """
        columns = tl.arange(0, BLOCK)
        weight = tl.load(weight_ptr + columns, mask=columns < hidden_size, other=0.0)
        weight = weight.to(x_ptr.dtype.element_ty).to(tl.float32)
        dweight = tl.zeros((BLOCK,), tl.float32)
        for first in range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
            rows = first + tl.arange(0, ROWS)
            inside = (rows < n_rows)[:, None] & (columns < hidden_size)[None, :]
            offsets = rows.to(tl.int64)[:, None] * hidden_size + columns[None, :]
            grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            inverse = tl.load(inverse_ptr + rows, mask=rows < n_rows, other=0.0)
            normed = x * inverse[:, None]
            scaled = grad * weight[None, :]
            dx = (scaled - normed * (tl.sum(scaled * normed, 1) / hidden_size)[:, None]) * inverse[:, None]
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            dweight += tl.sum(grad * normed, 0)
        tl.store(parts_ptr + tl.program_id(0) * hidden_size + columns, dweight, mask=columns < hidden_size)


# ---------------------------------------------------------------------------------------------------------
# The loss head: linear layer and log-probability of the target in one, never the whole logits


def linear_logprob(hidden, weight, targets):
    """log softmax(hidden @ weight.T)[targets], in nats: what every loss of a language model is made of.

    hidden (N, H), weight (V, H), targets (N,) -> (N,) fp32. A target < 0 gives 0 and no gradient.
    """
    if not uses_triton(hidden):
        return linear_logprob_reference(hidden, weight, targets)
    if torch.is_autocast_enabled("cuda"):  # as autocast does to a linear layer
        hidden = hidden.to(torch.get_autocast_dtype("cuda"))
    return linear_logprob_triton(hidden, weight.to(hidden.dtype), targets)


def linear_logprob_reference(hidden, weight, targets):
    """Few logits whole, which is fastest; many by rows, computed again in the backward pass."""
    rows = max(1, MAX_LOGITS // weight.shape[0])
    if len(hidden) <= rows:
        return rows_logprob(hidden, weight, targets)
    chunks = zip(hidden.split(rows), targets.split(rows))
    return torch.cat([checkpoint(rows_logprob, h, weight, t, use_reentrant=False, preserve_rng_state=False)
                      for h, t in chunks])


def rows_logprob(hidden, weight, targets):
    logits = F.linear(hidden, weight)  # (N, V)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return -F.cross_entropy(logits, targets.clamp(min=-1), reduction="none", ignore_index=-1)


@torch.compiler.disable  # the last step of a forward pass: a compiled graph that ends here loses nothing
def linear_logprob_triton(hidden, weight, targets):
    return LinearLogprob.apply(hidden, weight, targets)


class LinearLogprob(torch.autograd.Function):
    """Forward keeps the logsumexp of each row; backward makes the logits' gradient again, part by part."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        hidden, weight = hidden.contiguous(), weight.contiguous()
        (n_rows, _), vocab_size = hidden.shape, len(weight)
        blocks = logit_blocks(hidden.dtype)
        row_blocks, tiles = triton.cdiv(n_rows, blocks["BLOCK_N"]), triton.cdiv(vocab_size, blocks["BLOCK_V"])
        share = triton.cdiv(tiles, triton.cdiv(PROGRAMS, max(1, row_blocks)))  # tiles of a program
        splits = triton.cdiv(tiles, share)
        parts = torch.empty(splits, n_rows, dtype=torch.float32, device=hidden.device)
        target_logits = torch.zeros(n_rows, dtype=torch.float32, device=hidden.device)
        logsumexp_kernel[(row_blocks, splits)](
            hidden, weight, targets, parts, target_logits, *hidden.shape, vocab_size,
            share * blocks["BLOCK_V"], **blocks)
        logsumexp = parts.logsumexp(0)  # (N,)
        ctx.save_for_backward(hidden, weight, targets, logsumexp)
        return (target_logits - logsumexp).masked_fill(targets < 0, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """The two products with the logits' gradient are plain ones, which cuBLAS does best."""
        hidden, weight, targets, logsumexp = ctx.saved_tensors
        blocks = logit_blocks(hidden.dtype)
        dhidden = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        dweight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        width = blocks["BLOCK_V"] * max(1, MAX_LOGITS // (blocks["BLOCK_V"] * max(1, len(hidden))))
        for first in range(0, len(weight), width):
            part = weight[first : first + width]
            dlogits = torch.empty(len(hidden), len(part), dtype=hidden.dtype, device=hidden.device)
            grid = triton.cdiv(len(hidden), blocks["BLOCK_N"]), triton.cdiv(len(part), blocks["BLOCK_V"])
            dlogits_kernel[grid](hidden, part, targets, logsumexp, grad.contiguous(), dlogits,
                                 *hidden.shape, len(part), first, **blocks)
            if dhidden is not None:
                dhidden += dlogits @ part
            if dweight is not None:
                torch.mm(dlogits.T, hidden, out=dweight[first : first + width])
        return None if dhidden is None else dhidden.to(hidden.dtype), dweight, None


def logit_blocks(dtype):
    """Tile sizes: at most 99 KB of shared memory, so that small GPUs take them too."""
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return {"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_H": 32 if dtype == torch.float32 else 64,
            "PRECISION": precision, "num_warps": 8, "num_stages": 3}


if triton is not None:

    @triton.jit
    def logits_tile(hidden_ptr, weight_ptr, rows, columns, n_rows, vocab_size, hidden_size,
                    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
                    PRECISION: tl.constexpr):
        """hidden[rows] @ weight[columns].T in fp32, (BLOCK_N, BLOCK_V); -inf beyond the vocabulary."""
        logits = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for start in range(0, hidden_size, BLOCK_H):
            inner = start + tl.arange(0, BLOCK_H)
            hidden = tl.load(hidden_ptr + rows.to(tl.int64)[:, None] * hidden_size + inner[None, :],
                             mask=(rows < n_rows)[:, None] & (inner < hidden_size)[None, :], other=0.0)
            weight = tl.load(weight_ptr + columns.to(tl.int64)[None, :] * hidden_size + inner[:, None],
                             mask=(columns < vocab_size)[None, :] & (inner < hidden_size)[:, None], other=0.0)
            logits = tl.dot(hidden, weight, logits, input_precision=PRECISION)
        return tl.where((columns < vocab_size)[None, :], logits, float("-inf"))

    @triton.jit
    def logsumexp_kernel(hidden_ptr, weight_ptr, targets_ptr, parts_ptr, target_logits_ptr,
                         n_rows, hidden_size, vocab_size, share, BLOCK_N: tl.constexpr,
                         BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr):
        """Program (i, j): rows of block i, the j-th `share` of the vocabulary, with an online logsumexp.

        (Milakov and Gimelshein 2018, algorithm 3.) parts (splits, N) gets the logsumexp over the share; the
        one program that meets a row's target writes its logit to target_logits (N,).
        """
        rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        targets = tl.load(targets_ptr + rows, mask=rows < n_rows, other=-1)
        largest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_N,), tl.float32)  # sum of exp(logit - largest)
        first = tl.program_id(1) * share
        for start in range(first, min(first + share, vocab_size), BLOCK_V):
            columns = start + tl.arange(0, BLOCK_V)
            logits = logits_tile(hidden_ptr, weight_ptr, rows, columns, n_rows, vocab_size, hidden_size,
                                 BLOCK_N, BLOCK_V, BLOCK_H, PRECISION)
            larger = tl.maximum(largest, tl.max(logits, 1))
            total = total * tl.exp(largest - larger) + tl.sum(tl.exp(logits - larger[:, None]), 1)
            largest = larger
            hit = targets[:, None] == columns[None, :]
            found = (targets >= start) & (targets < start + BLOCK_V)
            tl.store(target_logits_ptr + rows, tl.sum(tl.where(hit, logits, 0.0), 1), mask=found)
        tl.store(parts_ptr + tl.program_id(1) * n_rows + rows, largest + tl.log(total), mask=rows < n_rows)

    @triton.jit
    def dlogits_kernel(hidden_ptr, weight_ptr, targets_ptr, logsumexp_ptr, grad_ptr, dlogits_ptr,
                       n_rows, hidden_size, vocab_size, first, BLOCK_N: tl.constexpr,
                       BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr):
        """Program (i, j): tile of dlogits (N, V) = grad * (one-hot(target) - softmax), 0 where target < 0.

        weight is a part of the vocabulary, `vocab_size` long, whose first id is `first`.
        """
        rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
        logits = logits_tile(hidden_ptr, weight_ptr, rows, columns, n_rows, vocab_size, hidden_size,
                             BLOCK_N, BLOCK_V, BLOCK_H, PRECISION)
        targets = tl.load(targets_ptr + rows, mask=rows < n_rows, other=-1)
        logsumexp = tl.load(logsumexp_ptr + rows, mask=rows < n_rows, other=0.0)
        grad = tl.load(grad_ptr + rows, mask=rows < n_rows, other=0.0)
        hit = targets[:, None] == (first + columns)[None, :]
        dlogits = grad[:, None] * (tl.where(hit, 1.0, 0.0) - tl.exp(logits - logsumexp[:, None]))
        dlogits = tl.where((targets >= 0)[:, None], dlogits, 0.0)
        tl.store(dlogits_ptr + rows.to(tl.int64)[:, None] * vocab_size + columns[None, :],
                 dlogits.to(dlogits_ptr.dtype.element_ty),
                 mask=(rows < n_rows)[:, None] & (columns < vocab_size)[None, :])
