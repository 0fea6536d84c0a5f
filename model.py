"""model.py: the decoder (Qwen2, Qwen3, Qwen3-MoE, Llama, Mistral), its folder, generation, LoRA, and what
every training run needs.

Read it in this order: Attention -> Block -> CausalLM (the model), Cache -> generate (using it),
LoraLinear (adapters), QuantizedLinear (INT4, INT8), load_folder / save_folder (a Hugging Face model folder),
then the last section.

    python model.py --model run/sft          # chat in the terminal

Letters: B batch, T tokens, H hidden_size, I intermediate_size, N attention heads, G key/value heads,
D head_dim, L layers, V vocabulary, E experts.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import math
import os
import pickle
import shutil
import signal
import sys
import time
import timeit
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import (CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy,
                                    fully_shard)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from kernels import linear_logprob, rms_norm
from tokenizer import (FILES, InputError, StreamDecoder, Tokenizer, encode_chat, one_line_errors, option,
                       parse_options, write_whole)

# ---------------------------------------------------------------------------------------------------------
# The decoder


@dataclass(kw_only=True)
class Config:
    """The shape of a decoder, in the words of a Hugging Face config.json."""

    model_type: str = "qwen3"  # a key of ARCHITECTURES
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 128
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # of queries, keys and values, and (not in Qwen2) of the output
    mlp_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": one of ROPES, and what it needs}
    windows: list[int | None] | None = None  # how many tokens, itself included, a token of each layer sees
    num_experts: int = 0
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 768
    norm_topk_prob: bool = False
    sparse_layers: tuple[int, ...] = ()  # those with experts


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019, eq. 4), by kernels.py."""

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def dynamic_theta(config: Config, length):
    """The base for a text of `length` tokens: raised beyond the trained context (by bloc97 and emozilla)."""
    stretch, D = config.rope_scaling["factor"], config.head_dim
    beyond = max(length, config.max_position_embeddings) / config.max_position_embeddings
    return config.rope_theta * (stretch * beyond - (stretch - 1)) ** (D / (D - 2))


def llama3_frequencies(config: Config, frequency):
    """Low frequencies divided by a factor, high ones kept, between them a mixture (Llama 3.1)."""
    rope = config.rope_scaling
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)  # in the trained context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # (D/2,)
    return (1 - kept) * frequency / rope["factor"] + kept * frequency


def yarn_frequencies(config: Config, frequency):
    """YaRN (Peng et al. 2023, section 3.2): as llama3's, with a ramp over dimensions instead of turns.

    And what cos and sin are multiplied with, so that attention is as sharp as before (eq. 22).
    """
    rope, D = config.rope_scaling, config.head_dim
    # The pairs that turn so often in the trained context.
    first, last = (D * math.log(rope["original_max_position_embeddings"] / (turns * 2 * math.pi))
                   / (2 * math.log(config.rope_theta))
                   for turns in (rope.get("beta_fast", 32), rope.get("beta_slow", 1)))
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, D - 1)
    pairs = torch.arange(D // 2, dtype=torch.float32, device=frequency.device)
    divided = ((pairs - first) / (last - first or 0.001)).clamp(0, 1)  # (D/2,)
    both, stretch = rope.get("mscale") and rope.get("mscale_all_dim"), math.log(max(rope["factor"], 1))
    over, under = (rope["mscale"], rope["mscale_all_dim"]) if both else (1.0, 0.0)
    scale = rope.get("attention_factor", (0.1 * over * stretch + 1.0) / (0.1 * under * stretch + 1.0))
    return divided * frequency / rope["factor"] + (1 - divided) * frequency, scale


def rotary(positions, config: Config):
    """Angles of rotary position embedding (Su et al. 2021, eq. 15): (B, T) -> cos, sin (B, 1, T, D/2).

    Made in fp32 in each forward, never stored: a stored table would be cast with the weights, and in bf16
    neighbouring positions beyond 256 share one angle.
    """
    kind = (config.rope_scaling or {}).get("rope_type")
    theta = dynamic_theta(config, int(positions.max()) + 1) if kind == "dynamic" else config.rope_theta
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency, scale = 1.0 / theta ** (pairs / config.head_dim), 1.0  # (D/2,)
    if kind == "linear":
        frequency = frequency / config.rope_scaling["factor"]
    if kind == "llama3":
        frequency = llama3_frequencies(config, frequency)
    if kind == "yarn":
        frequency, scale = yarn_frequencies(config, frequency)
    angles = positions[:, None, :, None].float() * frequency  # (B, 1, T, D/2)
    return angles.cos() * scale, angles.sin() * scale


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + D/2]) by its position's angle, in fp32. x: (B, heads, T, D)."""
    first, second = x.float().chunk(2, dim=-1)  # (B, heads, T, D/2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023); Qwen3 has an RMSNorm on queries and keys."""

    def __init__(self, config: Config):
        super().__init__()
        N, G = config.num_attention_heads, config.num_key_value_heads
        D, H = config.head_dim, config.hidden_size
        self.head_dim, self.grouped = D, N != G
        bias, normed = config.attention_bias, config.model_type.startswith("qwen3")
        self.q_proj = nn.Linear(H, N * D, bias=bias)
        self.k_proj = nn.Linear(H, G * D, bias=bias)
        self.v_proj = nn.Linear(H, G * D, bias=bias)
        self.o_proj = nn.Linear(N * D, H, bias=bias and config.model_type != "qwen2")
        self.q_norm = RMSNorm(D, config.rms_norm_eps) if normed else nn.Identity()
        self.k_norm = RMSNorm(D, config.rms_norm_eps) if normed else nn.Identity()

    def forward(self, x, cos, sin, mask, cache=None, layer=0):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, N, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, G, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, G, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, G, T so far, D)
        if self.grouped and mask is not None and T > 1 and q.is_cuda:  # no fused kernel there takes both
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))  # (B, N, T, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
                                           enable_gqa=q.shape[1] != k.shape[1])  # (B, N, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, H)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x) (Shazeer 2020, eq. 6)."""

    def __init__(self, config: Config, I):
        super().__init__()
        H, bias = config.hidden_size, config.mlp_bias
        self.gate_proj = nn.Linear(H, I, bias=bias)
        self.up_proj = nn.Linear(H, I, bias=bias)
        self.down_proj = nn.Linear(I, H, bias=bias)

    def forward(self, x):
        return self.gated(self.gate_proj(x), self.up_proj(x))

    def gated(self, gate, up):
        return self.down_proj(F.silu(gate) * up)


class Experts(nn.Module):
    """A mixture of experts: each token goes through the MLPs that a router finds best for it (Qwen3-MoE).

    No token is dropped, however many choose one expert. After a forward with gradients, `balance` and
    `router_z` hold what `router_losses` sums up, and `counts` (E,) how many tokens each expert had.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        experts = (MLP(config, config.moe_intermediate_size) for _ in range(config.num_experts))
        self.experts = nn.ModuleList(experts)
        self.chosen, self.normalised = config.num_experts_per_tok, config.norm_topk_prob

    def forward(self, x):
        tokens = x.flatten(0, -2)  # (B T, H)
        logits = self.gate(tokens).float()  # (B T, E)
        probabilities = logits.softmax(-1)
        weights, chosen = probabilities.topk(self.chosen)  # (B T, k)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        counts = F.one_hot(chosen, len(self.experts)).sum((0, 1))  # (E,)
        if torch.is_grad_enabled():
            self.counts, self.balance = counts, balancing_loss(counts, probabilities)
            self.router_z = logits.logsumexp(-1).square().mean()
        choice = chosen.flatten().argsort(stable=True)  # (B T k,), those of an expert together
        run = self.run_grouped if self.can_group(tokens) else self.run_each
        y = run(tokens[choice // self.chosen], counts)[choice.argsort()]  # (B T k, H), a token's together
        return (y.unflatten(0, weights.shape) * weights[..., None].to(y.dtype)).sum(1).view_as(x)

    def run_each(self, rows, counts):
        """rows (B T k, H) through the experts, the first `counts[0]` of them through the first, and so on."""
        parts = zip(self.experts, rows.split(counts.tolist()))
        return torch.cat([expert(part) for expert, part in parts])  # one of no rows has a gradient too: 0

    def run_grouped(self, rows, counts):
        """The same in three products for all experts, as GPUs like it."""
        rows, ends = rows.bfloat16(), counts.cumsum(0).int()
        gate, up, down = (torch.stack([getattr(expert, name).weight for expert in self.experts]).bfloat16().mT
                          for name in ("gate_proj", "up_proj", "down_proj"))  # (E, in, out)
        hidden = F.silu(F.grouped_mm(rows, gate, offs=ends)) * F.grouped_mm(rows, up, offs=ends)
        return F.grouped_mm(hidden, down, offs=ends)

    def can_group(self, x):
        """torch has the product in bf16, on rows of whole 16 bytes; LoRA and INT4 layers need their own."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        plain = all(type(layer) is nn.Linear for expert in self.experts for layer in expert.children())
        shape = self.experts[0].down_proj.weight.shape if plain else (1,)
        return dtype == torch.bfloat16 and all(size % 8 == 0 for size in shape)


def balancing_loss(counts, probabilities):
    """E sum_i f_i P_i (Fedus et al. 2021, eq. 4): an expert's share of choices, times its mean probability.

    counts (E,); probabilities (N, E). 1 where all experts have equal shares.
    """
    share = counts / counts.sum()
    return len(counts) * (share * probabilities.mean(0)).sum()


def router_losses(model):
    """(balancing loss, z-loss (Zoph et al. 2022, eq. 5)) of the last forward, means over its layers."""
    layers = [module for module in model.modules() if isinstance(module, Experts)]
    return [sum(getattr(layer, name) for layer in layers) / len(layers) for name in ("balance", "router_z")]


class Block(nn.Module):
    """One layer: x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: Config, layer):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = Experts(config) if layer in config.sparse_layers else MLP(config, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask, cache=None, layer=0):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Token ids -> hidden states: embedding, L blocks, a last norm."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.windows = config, config.windows or [None] * config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.prefix = None  # what prefix tuning trains, see `Prefix`

    def forward(self, ids, positions=None, documents=None, cache=None):
        B, T = ids.shape
        if cache is None and self.prefix is not None:
            cache = Prefix(self)
            positions = None if positions is None else positions + cache.prefix
        if positions is None:
            positions = cache.positions(T) if cache else torch.arange(T, device=ids.device).expand(B, T)
        masks = {w: attention_mask(T, w, documents, cache, positions) for w in set(self.windows)}
        cos, sin = rotary(positions, self.config)
        x = self.embed_tokens(ids)  # (B, T, H)
        for i, (layer, window) in enumerate(zip(self.layers, self.windows)):
            x = layer(x, cos, sin, masks[window], cache, i)
        if cache is not None:
            cache.length += T
        return self.norm(x)


def attention_mask(T, window, documents, cache, positions):
    """(B or 1, 1, T, columns), true where a token may look: back, inside its window and document (B, T).

    All of a row see its documents below 0, too: a prompt, whose answers stand behind it, each with positions
    that go on from the prompt's. None where plain causal attention says it all: that has a faster path. A
    cache's prefix stands right before every text, and positions (B or 1, T) count from its start. A column of
    a cache's padding sees itself too: a row with nothing to look at would be NaN.
    """
    before, padded = (cache.prefix + cache.length, cache.padded) if cache else (0, False)
    window = window or before + T
    if documents is None and not padded and window >= before + T and (before == 0 or T == 1):
        return None
    key = torch.arange(before + T, device=positions.device)
    query = key[before:, None]
    near = key > query - window if documents is None else True
    seen = ((key <= query) & near)[None]  # (1, T, columns)
    if before and cache.prefix:
        seen = torch.where(key < cache.prefix, key > positions[:, :, None] - window, seen)
    if documents is not None:
        own = (documents[:, :, None] == documents[:, None, :]) | (documents[:, None, :] < 0)  # (B, T, T)
        if window < before + T:
            own = own & (positions[:, None, :] > positions[:, :, None] - window)
        seen = seen & F.pad(own, (before, 0), value=True)  # (B, T, columns)
    if padded:
        padding = (key >= cache.prefix) & (key < cache.prefix + cache.start[:, None, None])
        seen = seen & ~padding | (key == query)  # (B, T, columns)
    return seen[:, None]


class CausalLM(nn.Module):
    """Decoder and head. All that is differentiated goes through `forward`, so that DDP hooks see it."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.source = None  # the folder it was loaded from: its files are kept when it is saved again

    def tie_weights(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids, positions=None, documents=None, cache=None, targets=None):
        """ids (B, T) -> logits (B, T, V); with targets (B, T): their log-probabilities (B, T) in fp32, nats.

        positions (B, T) restart in each document; documents (B, T) number the documents packed in a row;
        targets < 0 are not wanted and give 0.
        """
        x = self.model(ids, positions, documents, cache)  # (B, T, H)
        if targets is None:
            return self.lm_head(x)
        return linear_logprob(x.flatten(0, 1), self.lm_head.weight, targets.flatten()).view(targets.shape)

    @torch.no_grad()
    def init_weights(self, seed):
        """N(0, 0.02), into the residual stream scaled by 1 / sqrt(2 L) (Radford et al. 2019, section 2.3)."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * self.config.num_hidden_layers) if residual else 0.02
                parameter.normal_(0.0, std, generator=generator)
            elif name.endswith(".bias"):
                parameter.zero_()
        return self


class RewardModel(nn.Module):
    """Decoder with a head of one number instead of the vocabulary: a reward model, or PPO's critic.

    transformers calls it ...ForSequenceClassification. The reward of a dialogue is the score at its last
    token; a critic's value is the score at each token.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.source = None

    def tie_weights(self):
        """Nothing to tie: the head is its own."""

    def forward(self, ids, positions=None, documents=None):
        """ids (B, T) -> scores (B, T), in fp32 under autocast too: in bf16 scores near 8 are .06 apart."""
        hidden = self.model(ids, positions, documents).float()  # (B, T, H)
        return (hidden * self.score.weight[0].float()).sum(-1)


# ---------------------------------------------------------------------------------------------------------
# Generation


class Cache:
    """Keys and values of the tokens so far, for prompts of different length, padded on the left.

    First come the columns of a trained prefix, `prefix` of them, where there is one. Column c after them, in
    row b, holds token c - start[b] of that row; columns before start[b] are padding. `length` columns are
    filled; to go back, make it smaller.
    """

    def __init__(self, decoder: Decoder, start, device, dtype):
        config = decoder.config
        empty = torch.empty(2, 1, config.num_key_value_heads, 0, config.head_dim)
        first = [empty] * config.num_hidden_layers if decoder.prefix is None else Prefix(decoder).layers
        self.layers = [x.to(device, dtype).expand(-1, len(start), -1, -1, -1)
                       for x in first]  # (2, B, G, columns, D) each
        self.prefix = first[0].shape[3]
        self.start = torch.as_tensor(start, device=device)  # (B,)
        self.padded = bool(self.start.any())
        self.length = 0

    def append(self, layer, k, v):
        end = self.prefix + self.length
        keys, values = self.layers[layer][:, :, :, : end + k.shape[2]]  # (B, G, T so far, D)
        keys[:, :, end:], values[:, :, end:] = k, v
        return keys, values

    def positions(self, T):
        columns = torch.arange(self.length, self.length + T, device=self.start.device)
        return self.prefix + (columns - self.start[:, None]).clamp(min=0)  # (B, T)

    def grow(self, columns):
        """Make room for so many in all."""
        more = self.prefix + columns - self.layers[0].shape[3]
        for layer, filled in enumerate(self.layers) if more > 0 else ():
            self.layers[layer] = F.pad(filled, (0, 0, 0, more))

    def keep(self, rows):
        """Keep these rows of the batch, in this order (one may come more than once)."""
        for layer, filled in enumerate(self.layers):  # one after another: little is held twice
            self.layers[layer] = filled[:, rows]
        self.start = self.start[rows]


def uniforms(seed, rows, token):
    """A number in (0, 1) a row, a pure function of (seed, row, token): splitmix64 (Steele et al. 2014).

    So that the text of a row depends neither on its neighbours nor on how rows are spread over ranks. Seed
    and token are mixed in one after the other: added together, seed 2 would be seed 1 one token later.
    """
    with np.errstate(over="ignore"):
        x = np.asarray(rows, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        for value in (seed % 2**63, token):
            x = x + np.uint64(value) + np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
    return torch.from_numpy(((x >> np.uint64(41)).astype(np.float32) + 0.5) / np.float32(2**23))  # (rows,)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen from the logits, in this order."""

    repetition_penalty: float = 1.0  # what is in the prompt or the answer is so much less likely (1 is off)
    presence_penalty: float = 0.0  # subtracted from the logits of what is in the answer
    temperature: float = 0.0  # 0 takes the likeliest
    top_k: int = 0  # keep the k likeliest (Fan et al. 2018); 0 is off
    top_p: float = 1.0  # keep the smallest set that holds p of the mass (Holtzman et al. 2020)
    min_p: float = 0.0  # keep what has at least min_p times the top probability (Nguyen et al. 2024)
    seed: int = 0


def penalised(logits, prompt, answer, how: Sampling):
    """Logits (B, V) after the penalties; prompt, answer (B, V): true for the tokens that are there."""
    lower = torch.where(logits > 0, logits / how.repetition_penalty, logits * how.repetition_penalty)
    logits = torch.where(prompt | answer, lower, logits)  # (Keskar et al. 2019, section 4.1)
    return logits - how.presence_penalty * answer


def filtered_logprobs(logits, how: Sampling):
    """Log-probabilities (B, V) of the distribution that is sampled; what is cut off has -inf."""
    logprobs = (logits.float() / how.temperature).log_softmax(-1)  # (B, V)
    if how.top_k > 0:
        kth = logprobs.topk(min(how.top_k, logprobs.shape[-1])).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < kth, -math.inf).log_softmax(-1)
    if how.top_p < 1.0:
        ordered, index = logprobs.sort(descending=True)
        mass_before = ordered.exp().cumsum(-1) - ordered.exp()
        beyond = mass_before >= max(how.top_p, 1e-9)  # the likeliest always stays
        cut = torch.zeros_like(beyond).scatter(-1, index, beyond)
        logprobs = logprobs.masked_fill(cut, -math.inf).log_softmax(-1)
    if how.min_p > 0.0:
        floor = logprobs.max(-1, keepdim=True).values + math.log(min(how.min_p, 1.0))
        logprobs = logprobs.masked_fill(logprobs < floor, -math.inf).log_softmax(-1)
    return logprobs


def sample(logits, uniform, how: Sampling):
    """Next ids (B,) and their log-probabilities (B,) under the very distribution they came from.

    Inverse CDF with one uniform (B,) a row; temperature 0 is greedy, with the model's own log-probability.
    """
    if how.temperature == 0.0:
        logprobs = logits.float().log_softmax(-1)
        ids = logits.argmax(-1)
    else:
        logprobs = filtered_logprobs(logits, how)
        cdf = logprobs.exp().cumsum(-1)  # (B, V)
        point = uniform.to(cdf.device)[:, None] * cdf[:, -1:]
        ids = torch.searchsorted(cdf, point, right=True)[:, 0].clamp(max=cdf.shape[-1] - 1)
        cut = logprobs.gather(-1, ids[:, None])[:, 0] == -math.inf
        ids = torch.where(cut, logprobs.argmax(-1), ids)  # where rounding led to a token that was cut
    return ids, logprobs.gather(-1, ids[:, None])[:, 0]


@dataclass
class Sample:
    """One answer: its ids, the log-probability of each (nats), and whether it ended by itself.

    The id that ended it is the last one; where a stop string did, the string is in the text.
    """

    ids: list[int]
    logprobs: list[float]
    finished: bool


class StopStrings:
    """`ends` for `generate`: an answer ends when its text holds one of some strings."""

    def __init__(self, tokenizer, strings):
        self.strings = strings
        self.decoders = collections.defaultdict(lambda: StreamDecoder(tokenizer))
        self.texts = collections.defaultdict(str)

    def __call__(self, row, token):
        self.texts[row] += self.decoders[row].feed(token)
        return any(string in self.texts[row] for string in self.strings)

    def cut(self, text):
        """The text before the first of the strings."""
        found = [text.find(string) for string in self.strings if string in text]
        return text[: min(found, default=len(text))]


class OneToken:
    """The decoder for one new token a row, in fewer operations: each costs more than the numbers in it.

    Queries, keys and values are one product, so are gate and up, and queries and keys are rotated together.
    """

    def __init__(self, model):
        config, self.model, self.layers = model.config, model.model, []
        self.shape = N, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        for layer in self.model.layers:
            attention, mlp, norms = layer.self_attn, layer.mlp, None
            qkv = merged(attention.q_proj, attention.k_proj, attention.v_proj)
            gate_up = merged(mlp.gate_proj, mlp.up_proj) if isinstance(mlp, MLP) else None
            if isinstance(attention.q_norm, RMSNorm):  # weights in fp32, as queries and keys are rotated
                q, k = attention.q_norm.weight.expand(N, D), attention.k_norm.weight.expand(G, D)
                norms = torch.cat((q, k)).float()  # (N + G, D)
            self.layers.append((layer, qkv, norms, gate_up))

    def __call__(self, ids, cache):
        """ids (B,) -> hidden states (B, H); the token's keys and values go into the cache."""
        config, windows, (N, G, D) = self.model.config, self.model.windows, self.shape
        positions = cache.positions(1)  # (B, 1)
        masks = {w: attention_mask(1, w, None, cache, positions) for w in set(windows)}
        cos, sin = (x[:, :, 0] for x in rotary(positions, config))  # (B, 1, D/2)
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)  # (B, 1, D)
        x = self.model.embed_tokens(ids)  # (B, H)
        for i, (layer, qkv, norms, gate_up) in enumerate(self.layers):
            heads = qkv(layer.input_layernorm(x)).view(len(x), -1, D)
            qk, v = heads.split((N + G, G), 1)  # (B, N + G, D), (B, G, D)
            if norms is not None:
                qk = F.rms_norm(qk.float(), (D,), eps=config.rms_norm_eps) * norms
            qk = torch.addcmul(qk * cos, qk.roll(D // 2, -1), sin).to(x.dtype)  # as in `rotate`
            k, v = cache.append(i, qk[:, N:, None], v[:, :, None])  # (B, G, T so far, D)
            y = F.scaled_dot_product_attention(qk[:, :N, None], k, v, attn_mask=masks[windows[i]],
                                               enable_gqa=N != G)  # (B, N, 1, D)
            x = x + layer.self_attn.o_proj(y.view(len(x), -1))
            normed = layer.post_attention_layernorm(x)  # (B, H)
            x = x + (layer.mlp.gated(*gate_up(normed).chunk(2, -1)) if gate_up else layer.mlp(normed))
        cache.length += 1
        return self.model.norm(x)


def merged(*layers):
    """Linear layers of one input as one function: (..., in) -> (..., the outputs of all).

    Plain ones become one product: their weights are moved together, so nothing is held twice, and training
    goes on in them. Others (LoRA, INT4, FSDP) are called one by one.
    """
    if any(type(layer) is not nn.Linear or type(layer.weight.data) is not torch.Tensor for layer in layers):
        return lambda x: torch.cat([layer(x) for layer in layers], -1)
    weight, bias = (rows_of_one([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    return lambda x: F.linear(x, weight, bias)


@torch.inference_mode(False)  # what is moved must stay trainable
@torch.no_grad()
def rows_of_one(parts):
    """Parameters as one tensor, of which they become the rows; None where layers have no bias."""
    if parts[0] is None:
        return None
    rows = [len(part) for part in parts]
    if len({part.untyped_storage().data_ptr() for part in parts}) == 1:  # they are that already
        return parts[0].as_strided((sum(rows), *parts[0].shape[1:]), parts[0].stride())
    one = torch.cat(list(parts))
    for part, own in zip(parts, one.split(rows)):
        part.data = own
    return one


PREFILL = 512  # columns of a prompt that go through the model at once: longer ones would need much memory


@torch.inference_mode()
def generate_tokens(model, prompts, max_new_tokens, stop_ids, rows=None, samples=1, ends=None, cache=None,
                    **sampling):
    """Yield (row, id, log-probability, finished) for each new token of each answer, a step at a time.

    prompts: lists of ids, none empty; each has `samples` answers: row is prompt * samples + sample. rows:
    each row's number in the whole run (sampling depends on it; default 0, 1, 2, ...). ends: (row, id) ->
    whether the answer is done, beside stop_ids. cache: of the one prompt's beginning, not to be read again.
    sampling: see `Sampling`. Rows that finished leave the batch. InputError for a prompt beyond the context.
    """
    how, longest = Sampling(**sampling), max(map(len, prompts))
    cache = prepare_cache(model, prompts, max_new_tokens, cache)
    limit = min(max_new_tokens, model.config.max_position_embeddings - longest)
    live = list(range(len(prompts) * samples))  # which row each of the shrinking batch is
    rows = np.arange(len(live)) if rows is None else np.asarray(rows)
    penalties = how.repetition_penalty != 1.0 or how.presence_penalty
    if penalties:  # true for the tokens of each row's prompt, and of its answer (none yet): (2, B, V)
        shape = 2, len(live), model.config.vocab_size
        said = torch.zeros(shape, dtype=torch.bool, device=cache.start.device)
        for row in live:
            said[0, row, prompts[row // samples]] = True
    unread = [prompt[cache.length :] for prompt in prompts]
    hidden, one_token = prefill(model, unread, samples, cache), OneToken(model)  # (B, H)
    for step in range(limit):
        logits = model.lm_head(hidden)  # (B, V)
        if penalties:
            logits = penalised(logits, *said, how)
        uniform = uniforms(how.seed, rows[live], step) if how.temperature else None
        new, logprobs = sample(logits, uniform, how)
        tokens, values = new.tolist(), logprobs.tolist()
        done = [token in stop_ids or bool(ends and ends(row, token)) for row, token in zip(live, tokens)]
        yield from zip(live, tokens, values, done)
        stay = [i for i, over in enumerate(done) if not over]
        if not stay or step == limit - 1:
            return
        if penalties:
            said[1, range(len(live)), new] = True
        if len(stay) < len(live):
            live, keep = [live[i] for i in stay], torch.tensor(stay, device=cache.start.device)
            new, said = new[keep], said[:, keep] if penalties else None
            cache.keep(keep)
        hidden = one_token(new, cache)


def prefill(model, prompts, samples, cache):
    """Prompts go into the cache, each `samples` times -> hidden states (B, H) at their last tokens."""
    longest, device = max(map(len, prompts)), cache.start.device
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)  # (B, T)
    for columns in ids.split(PREFILL, 1):
        hidden = model.model(columns, cache=cache)[:, -1]
    if samples == 1:
        return hidden
    each = torch.arange(len(prompts), device=device).repeat_interleave(samples)
    cache.keep(each)
    return hidden[each]


def prepare_cache(model, prompts, max_new_tokens, cache):
    """A cache with room for prompts and answers, or the one that is given, with more room."""
    longest, limit = max(map(len, prompts)), model.config.max_position_embeddings
    if min(map(len, prompts)) == 0:
        raise InputError("a prompt has no tokens: start it with <|endoftext|>, or ask in chat form")
    if longest + 1 > limit:
        raise InputError(f"a prompt of {longest} tokens leaves no room in a context of {limit}")
    weight = next(model.parameters())
    cache = cache or Cache(model.model, [longest - len(p) for p in prompts], weight.device, weight.dtype)
    cache.grow(min(longest + max_new_tokens, limit))
    return cache


def generate(model, prompts, max_new_tokens, stop_ids, samples=1, **how):
    """Answers to prompts (lists of ids), as a list of Sample in the same order; see `generate_tokens`."""
    answers = [Sample([], [], False) for _ in range(len(prompts) * samples)]
    tokens = generate_tokens(model, prompts, max_new_tokens, set(stop_ids), samples=samples, **how)
    for row, token, logprob, finished in tokens:
        answers[row].ids.append(token)
        answers[row].logprobs.append(logprob)
        answers[row].finished = finished
    return answers


def window_batch(tokens, indices, max_length, endoftext):
    """Windows of a stream of documents, as numpy: ids, positions, documents, targets, each (B, T).

    Window w covers tokens w T to w T + T; each token's target is the next one, and that of the stream's last
    token is <|endoftext|>. Every document starts with <|endoftext|>: positions restart there, and `documents`
    numbers them. A document cut by a window goes on in the next, without its start. Past the end targets
    are -1.
    """
    T, offsets = max_length, np.arange(max_length + 1)
    rows = np.full((len(indices), T + 1), -1, np.int64)  # (B, T + 1)
    for row, w in zip(rows, indices):
        piece = np.append(tokens[w * T : w * T + T + 1], endoftext)[: T + 1]
        row[: len(piece)] = piece
    ids, targets = np.where(rows < 0, endoftext, rows)[:, :-1], rows[:, 1:]
    starts = ids == endoftext  # (B, T)
    since = np.maximum.accumulate(np.where(starts, offsets[:-1], 0), axis=1)
    return ids, offsets[:-1] - since, np.cumsum(starts, axis=1), np.ascontiguousarray(targets)


def branches(dialogues, head):
    """Dialogues that begin with the same `head` tokens, as one row -> ids, positions, documents (3, n).

    The head stands there once, as document -1, which all see; then what follows it in each dialogue, as
    documents 1, 2, ..., whose positions go on from the head's. Each is computed as if it were alone, without
    going through the prompt again.
    """
    parts = [dialogues[0][:head], *(ids[head:] for ids in dialogues)]
    positions = [np.arange(head), *(np.arange(head, len(ids)) for ids in dialogues)]
    documents = np.repeat([-1, *range(1, len(parts))], [len(part) for part in parts])
    return np.stack([np.concatenate(parts), np.concatenate(positions), documents])


def pad_rows(rows, filling):
    """Rows, k arrays (n,) each, of any length n -> k tensors (B, T), each with its filling on the right.

    T is a multiple of 16: fewer shapes.
    """
    T = -(-max(len(row[0]) for row in rows) // 16) * 16
    columns = [[np.pad(x, (0, T - len(x)), constant_values=fill) for x in column]
               for column, fill in zip(zip(*rows), filling)]
    return [torch.from_numpy(np.stack(column)) for column in columns]  # (B, T) each


@torch.inference_mode()
def bits_per_byte(model, tokenizer, shards, max_length=256, batch_size=16, max_windows=None):
    """{language: bits per byte of text} over windows of `max_length` tokens, the first `max_windows` a shard.

    The same windows wherever it is called from. A document's text counts, its closing <|endoftext|> does not;
    bytes are those of the very tokens that were predicted, so that a part of a shard is measured exactly too.
    """
    device = next(model.parameters()).device
    length = torch.tensor(tokenizer.token_bytes(), device=device)  # (V,): 0 for special tokens
    nats, size = {}, {}
    for shard in shards:
        count = min(-(-len(shard.tokens) // max_length), max_windows or sys.maxsize)
        for first in range(0, count, batch_size):
            indices = range(first, min(first + batch_size, count))
            batch = window_batch(shard.tokens, indices, max_length, tokenizer.endoftext)
            ids, positions, documents, targets = (torch.from_numpy(x).to(device) for x in batch)  # (B, T)
            weight = (length[targets.clamp(min=0)] * (targets >= 0)).cpu()
            logprobs = model(ids, positions, documents, targets=targets).cpu()  # (B, T); MPS has no float64
            nats[shard.lang] = nats.get(shard.lang, 0.0) - (logprobs.double() * (weight > 0)).sum().item()
            size[shard.lang] = size.get(shard.lang, 0) + weight.sum().item()
    return {lang: nats[lang] / math.log(2) / size[lang] for lang in sorted(nats) if size[lang]}


# ---------------------------------------------------------------------------------------------------------
# LoRA: W x + (alpha / r) B A x, with W frozen (Hu et al. 2021, eq. 3)


class LoraLinear(nn.Module):
    """A frozen linear layer with a trained low-rank addition; B starts at zero: nothing changes at first."""

    def __init__(self, base: nn.Linear, r, alpha, seed):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.scaling = alpha / r
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(base.in_features)
        lora_A = torch.empty(r, base.in_features).uniform_(-bound, bound, generator=generator)  # (r, in)
        self.lora_A = nn.Parameter(lora_A.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))  # (out, r)

    def forward(self, x):
        return self.base_layer(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(model, r, alpha, seed=0, targets=LORA_TARGETS):
    """Freeze a model and put a LoraLinear around each linear layer named in `targets`, in place.

    Not around those of experts: transformers holds them as one tensor, so PEFT could not read the adapter.
    """
    model.requires_grad_(False)
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)
              and ".experts." not in name and name.rpartition(".")[2] in targets]
    for number, (name, module) in enumerate(linear):
        model.set_submodule(name, LoraLinear(module, r, alpha, seed + number))
    return model


def train_rows_only(weight, rows):
    """Let some rows of a frozen matrix (new tokens of an embedding) train, and no others."""
    def only_these(gradient):  # on whatever device the model is by then
        kept = torch.zeros_like(gradient)
        kept[rows] = gradient[rows]
        return kept

    weight.requires_grad_(True)
    weight.register_hook(only_these)
    weight.rows_only = rows  # weight decay must leave the other rows alone


@torch.no_grad()
def merge_lora(model):
    """Fold every LoraLinear into a plain linear layer, in place."""
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLinear)]:
        weight = module.base_layer.weight
        weight += module.scaling * (module.lora_B @ module.lora_A).to(weight.dtype)
        model.set_submodule(name, module.base_layer)
    return model


class Prefix:
    """What prefix tuning trains: keys and values of each layer before every text (Li & Liang 2021, eq. 3).

    In a forward pass without a cache it takes a cache's place, and has a gradient. decoder.prefix is
    (P, 2 L G D), as PEFT saves it.
    """

    length, padded = 0, False

    def __init__(self, decoder: Decoder):
        config, self.prefix = decoder.config, len(decoder.prefix)
        shape = self.prefix, 1, config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim
        self.layers = decoder.prefix.view(shape).permute(2, 3, 1, 4, 0, 5)  # (L, 2, 1, G, P, D)

    def append(self, layer, k, v):
        parts = self.layers[layer].to(k.dtype).expand(-1, len(k), -1, -1, -1)  # (2, B, G, P, D)
        return tuple(torch.cat((part, own), 2) for part, own in zip(parts, (k, v)))  # (B, G, P + T, D) each

    def positions(self, T):
        return torch.arange(self.prefix, self.prefix + T, device=self.layers.device)[None]  # (1, T)


@torch.no_grad()
def add_prefix(model, ids):
    """Freeze a model and put a prefix before every text, at first as if it had read these ids (P,), in place.

    Activations of real words are what Li & Liang 2021, section 7.4, found best to start from.
    """
    model.requires_grad_(False)
    cache = prepare_cache(model, [ids], 0, None)
    prefill(model, [ids], 1, cache)
    layers = torch.stack(cache.layers)  # (L, 2, 1, G, P, D)
    set_prefix(model, layers.permute(4, 2, 0, 1, 3, 5).flatten(1))


def prefix_width(config: Config):
    """How many numbers a token of a prefix has: keys and values of all layers, 2 L G D."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def set_prefix(model, prefix):
    """prefix: (P, 2 L G D). It takes its place in the context; the decoder's own config is as before."""
    model.model.prefix = nn.Parameter(prefix.contiguous())
    room = model.config.max_position_embeddings - len(prefix)
    model.config = dataclasses.replace(model.config, max_position_embeddings=room)


# ---------------------------------------------------------------------------------------------------------
# Low-bit layers: W[o, i] = scale[o, i / group] * code[o, i], packed as compressed-tensors packs them

ROUTERS = "re:.*mlp.gate$"  # what compressed-tensors is told to ignore in a mixture of experts


def pack(codes, bits):
    """Codes (out, in) as int8 -> (out, in bits / 32) int32: code + 2^(bits - 1), the first one lowest."""
    if bits == 8:
        return (codes ^ -128).contiguous().view(torch.int32)  # + 128, in two's complement
    pairs = (codes + 8).to(torch.uint8).unflatten(1, (-1, 2))  # (out, in / 2, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).contiguous().view(torch.int32)  # bytes are little-endian


def unpack(packed, bits):
    """(out, in bits / 32) int32 -> codes (out, in) as int8. By bytes: 60 times faster than by shifts."""
    if bits == 8:
        return packed.view(torch.int8) ^ -128
    pairs = packed.view(torch.uint8)  # (out, in / 2)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1).to(torch.int8) - 8


def weight_of(codes, scales):
    """The weight (out, in), fp32, that codes (out, in) and scales (out, in / group) stand for."""
    return (codes.unflatten(1, (scales.shape[1], -1)) * scales.float()[..., None]).flatten(1)


class QuantizedLinear(nn.Module):
    """A linear layer that keeps its codes and scales, and makes the weight of them in each forward."""

    def __init__(self, linear, bits, group, scale_dtype):
        super().__init__()
        (out_features, in_features), device = linear.weight.shape, linear.weight.device
        codes = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.bits = bits
        self.register_buffer("weight_packed", pack(codes, bits))  # (out, in bits / 32)
        self.register_buffer("weight_shape", torch.tensor(codes.shape, device=device))
        scales = torch.ones(out_features, in_features // group, dtype=scale_dtype, device=device)
        self.register_buffer("weight_scale", scales)  # (out, in / group)
        self.bias = linear.bias  # a parameter (out,), or None

    def dequantized(self):
        """The weight (out, in), fp32."""
        return weight_of(unpack(self.weight_packed, self.bits), self.weight_scale)

    def forward(self, x):
        return F.linear(x, self.dequantized().to(x.dtype), self.bias)


def add_quantized(model, bits, group, where, tensors={}):
    """Put an empty QuantizedLinear for each linear layer of the blocks, in place; routers stay exact.

    group: weights of a row that share a scale; 0: the whole row does. tensors: {name: tensor} to be loaded,
    whose scales' dtype is kept. InputError, with `where` and the layer, if rows do not divide into groups, or
    a tensor says another shape.
    """
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)
              and ".layers." in name and not name.endswith("mlp.gate")]
    for name, module in linear:
        out_features, in_features = module.weight.shape
        size = group or in_features
        word = 32 // bits
        if in_features % size or size % word:
            words = f" (a word holds {word} of them: groups are multiples of that)" if size % word else ""
            raise InputError(f"{where}: {name}: a row of {in_features} weights does not divide into groups "
                             f"of {size}{words}")
        known, shape = tensors.get(f"{name}.weight_shape"), [out_features, in_features]
        if known is not None and known.tolist() != shape:
            raise InputError(f"{where}: {name}.weight_shape is {known.tolist()}, expected {shape}")
        dtype = getattr(tensors.get(f"{name}.weight_scale"), "dtype", None)
        dtype = dtype if dtype in (torch.float32, torch.float16) else torch.bfloat16
        model.set_submodule(name, QuantizedLinear(module, bits, size, dtype))
    return model


def quantization_config(bits, group, experts=False):
    """`quantization_config` of config.json, in compressed-tensors' words; group 0: a scale for each row."""
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, "actorder": None,
               "strategy": "group" if group else "channel", "group_size": group or None}
    packed = "pack-quantized"
    layers = {"targets": ["Linear"], "format": packed, "weights": weights, "input_activations": None,
              "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": packed,
            "quantization_status": "compressed", "ignore": ["lm_head", ROUTERS] if experts else ["lm_head"],
            "kv_cache_scheme": None, "sparsity_config": {}, "transform_config": {},
            "config_groups": {"group_0": layers}}


def read_quantization(path):
    """(bits, group) of a config.json, or None where weights are plain; InputError for any other layout."""
    found = read_json(path).get("quantization_config")
    if found is None:
        return None
    try:
        (layers,) = found["config_groups"].values()
        bits, group = layers["weights"]["num_bits"], layers["weights"].get("group_size") or 0
        ours = quantization_config(bits, group, experts=ROUTERS in (found.get("ignore") or []))
        pairs = [(found, ours), (layers, ours["config_groups"]["group_0"])]
        pairs.append((layers["weights"], pairs[1][1]["weights"]))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{path}: this quantization_config is not supported; INT4 and INT8 of "
                         "compressed-tensors are, with one group of layers") from None
    for section, wanted in pairs:
        for key in wanted.keys() - {"config_groups", "weights"}:
            if section.get(key, wanted[key]) not in (wanted[key], None):
                raise InputError(f"{path}: quantization_config's {key} = {section[key]!r} is not supported")
    if not isinstance(group, int) or group < 0:
        raise InputError(f"{path}: quantization_config's group_size = {group!r} is not supported")
    return bits, group


# ---------------------------------------------------------------------------------------------------------
# The folder: config.json, generation_config.json, tokenizer files, model.safetensors


def read_json(path):
    """A JSON object from a file; InputError where it is missing or is not one."""
    try:
        value = json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def write_json(path, value):
    write_whole(Path(path), (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


# What we load: `model_type` of config.json, and the name its `architectures` begin with.
ARCHITECTURES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe", "llama": "Llama",
                 "mistral": "Mistral"}
HEADS = {CausalLM: "ForCausalLM", RewardModel: "ForSequenceClassification"}

# What would change the numbers and is not in this file: the value that means "off"; any other is an error.
MUST_BE = {"hidden_act": "silu", "attention_dropout": 0.0, "pretraining_tp": 1, "partial_rotary_factor": 1.0}

# What transformers takes where config.json says nothing; head_dim is then hidden_size / num_attention_heads.
DEFAULTS = {"qwen2": {"num_key_value_heads": 32},
            "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
            "qwen3_moe": {"num_key_value_heads": 4, "num_experts": 128},
            "llama": {"max_position_embeddings": 2048},
            "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}}

# The kinds of RoPE, and the numbers each needs; what it may have beside.
ROPES = {"default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",),
         "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
ROPE_NUMBERS = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
                "attention_factor", "mscale", "mscale_all_dim", "original_max_position_embeddings")


def read_config(folder, kind):
    """config.json -> Config. Absent keys take the architecture's defaults; what is not here is an error."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: not a model folder (no config.json there)")
    raw = read_json(path)
    names = {name + HEADS[kind]: model_type for model_type, name in ARCHITECTURES.items()}
    found = raw.get("architectures")
    if found not in [[name] for name in names]:
        raise InputError(f"{path}: architectures {found} is not supported here; {', '.join(names)} are")
    for key, value in MUST_BE.items():
        if raw.get(key, value) not in (value, None):
            raise InputError(f"{path}: {key} = {raw[key]!r} is not supported")
    fields, model_type = dataclasses.fields(Config), names[found[0]]
    raw = DEFAULTS[model_type] | {key: value for key, value in raw.items()
                                  if value is not None or key == "sliding_window"}
    for field in fields:
        check_value(raw, field.name, field.type, path)
    if missing := [field.name for field in fields if field.default is dataclasses.MISSING
                   and field.name not in raw and field.name != "num_key_value_heads"]:
        raise InputError(f"{path}: {', '.join(missing)} missing")
    try:
        values = raw | read_rope(raw, path) | derived_values(raw, model_type, path)
    except (TypeError, ArithmeticError) as error:  # a list for a number, a step of 0, ...
        raise InputError(f"{path}: no sound config.json ({error})") from None
    return Config(**{field.name: values[field.name] for field in fields if field.name in values})


def check_value(raw, name, kind, path):
    """InputError where a value is there and not of its kind: a bool, a number above 0, a whole one."""
    sound = {"bool": lambda x: type(x) is bool, "int": lambda x: type(x) is int and x > 0,
             "float": lambda x: type(x) in (int, float) and 0 < x < math.inf}.get(kind)
    if sound and name in raw and not sound(raw[name]):
        raise InputError(f"{path}: {name} = {raw[name]!r} is not a valid {kind}")


def read_rope(raw, path):
    """rope_theta and rope_scaling of a config.json in either dialect; transformers 5 has rope_parameters."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{path}: rope_parameters = {rope!r} is not an object")
    rope = {key: value for key, value in rope.items()
            if value is not None and (key, value) != ("partial_rotary_factor", 1.0)}
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if kind not in ROPES:
        raise InputError(f"{path}: RoPE type {kind!r} is not supported")
    if unknown := [key for key in rope if key not in (*ROPE_NUMBERS, "truncate")]:
        raise InputError(f"{path}: RoPE's {unknown[0]} is not supported")
    if missing := [key for key in ROPES[kind] if key not in rope]:
        raise InputError(f"{path}: RoPE type {kind!r} needs {missing[0]}")
    for name in ROPE_NUMBERS:
        check_value(rope, name, "float", path)
    theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
    check_value(raw, "original_max_position_embeddings", "float", path)
    if kind in ("llama3", "yarn"):  # the context it was trained with
        known = raw.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        longest = raw.get("max_position_embeddings", Config.max_position_embeddings)
        rope["original_max_position_embeddings"] = known or longest
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else {"rope_type": kind, **rope}}


def derived_values(raw, model_type, path):
    """What each architecture says in its own words, or not at all: heads, biases, windows, experts."""
    layers, heads = raw["num_hidden_layers"], raw["num_attention_heads"]
    groups = raw.get("num_key_value_heads", heads)
    head_dim = raw.get("head_dim", raw["hidden_size"] // heads)
    if layers > 10_000:
        raise InputError(f"{path}: num_hidden_layers = {layers} is not supported")
    if heads % groups or head_dim % 2:
        raise InputError(f"{path}: {heads} attention heads cannot share {groups} keys and values, "
                         f"or head_dim {head_dim} is odd")
    values = {"model_type": model_type, "num_key_value_heads": groups, "head_dim": head_dim,
              "attention_bias": model_type == "qwen2" or raw.get("attention_bias", False),
              "mlp_bias": model_type == "llama" and raw.get("mlp_bias", False),
              "windows": None}
    window = raw.get("sliding_window", 4096)
    used = model_type == "mistral" or model_type != "llama" and raw.get("use_sliding_window")
    if used and window is not None:  # Qwen: in layers from max_window_layers on, or as layer_types lists
        check_value(raw, "sliding_window", "int", path)
        full = raw.get("max_window_layers", 28) if model_type in ("qwen2", "qwen3") else 0
        kinds = ["full_attention" if i < full else "sliding_attention" for i in range(layers)]
        listed = raw.get("layer_types", kinds)
        if (not isinstance(listed, list) or len(listed) != layers
                or set(listed) - {"full_attention", "sliding_attention"}):
            raise InputError(f"{path}: layer_types = {listed!r} is not supported")
        values["windows"] = [window if kind == "sliding_attention" else None for kind in listed]
    if model_type == "qwen3_moe":
        dense, step = raw.get("mlp_only_layers", []), raw.get("decoder_sparse_step", 1)
        sparse = tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)
        values |= {"num_experts": raw.get("num_local_experts", raw["num_experts"]), "sparse_layers": sparse}
        if raw.get("num_experts_per_tok", Config.num_experts_per_tok) > values["num_experts"]:
            raise InputError(f"{path}: num_experts_per_tok is more than the {values['num_experts']} experts")
    return values


def config_json(config: Config, tokenizer):
    """The config.json of a language model we create, in both dialects (rope_theta, rope_parameters, ...)."""
    theta, own = float(config.rope_theta), dataclasses.asdict(config)
    sparse = own.pop("sparse_layers")
    foreign = ["mlp_bias", "windows"]  # what Qwen3 does not have
    if config.model_type == "qwen3_moe":
        dense = [i for i in range(config.num_hidden_layers) if i not in sparse]
        own |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    else:
        foreign += ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"]
    return {
        "architectures": [ARCHITECTURES[config.model_type] + HEADS[CausalLM]],
        **{name: value for name, value in own.items() if name not in foreign},
        "rope_theta": theta, "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02,
        "use_sliding_window": False, "sliding_window": None, "max_window_layers": config.num_hidden_layers,
        "use_cache": True, "bos_token_id": None, "eos_token_id": end_ids(tokenizer)[0],
        "pad_token_id": tokenizer.pad, "dtype": "float32", "torch_dtype": "float32",
    }


def read_weights(folder):
    """{name: tensor} of model.safetensors, one file or sharded, memory-mapped. InputError if damaged."""
    index = Path(folder) / "model.safetensors.index.json"
    weight_map = read_json(index).get("weight_map") if index.exists() else {"": "model.safetensors"}
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) and Path(name).name == name
                                                   for name in weight_map.values()):
        raise InputError(f"{index}: expected an object `weight_map` of names of files beside it")
    weights = {}
    for name in sorted(set(weight_map.values())):
        weights |= read_safetensors(index.parent / name)
    return weights


def read_safetensors(path):
    """{name: tensor} of one file, memory-mapped; InputError where it is missing or damaged."""
    if not path.is_file():
        raise InputError(f"{path}: no such file (an unfinished run? go on with --resume)")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path}: damaged or not a safetensors file ({error})") from None


def own_tensors(model):
    """{name: tensor} of a model, but for a head that is the embeddings: files may have it or not."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else ()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def check_tensors(own, read, where):
    """InputError unless two {name: tensor}, a model's and a file's, have the same names, shapes and kinds."""
    for problem, names in (("missing", own.keys() - read.keys()), ("unexpected", read.keys() - own.keys())):
        if names:
            raise InputError(f"{where}: {len(names)} {problem} tensors, {sorted(names)[0]} among them")
    for name, tensor in own.items():
        found = read[name]
        if tensor.shape != found.shape:
            raise InputError(f"{where}: {name} is {tuple(found.shape)}, expected {tuple(tensor.shape)}")
        if tensor.dtype != found.dtype and not (tensor.is_floating_point() and found.is_floating_point()):
            raise InputError(f"{where}: {name} is {found.dtype}, expected {tensor.dtype}")


def copy_tensors(own, read, where):
    """Copy a file's tensors into a model's; InputError where they are not finite."""
    for name, tensor in own.items():
        tensor.copy_(read[name])
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{where}: {name} has numbers that are not finite")


def check_counts(config, weights, where):
    """InputError where config.json has another number of layers or experts: making them may never end."""
    experts = config.num_experts if config.sparse_layers else 0
    for what, before, expected in (("layers", "model.layers.", config.num_hidden_layers),
                                   ("experts", ".mlp.experts.", experts)):
        found = {name.partition(before)[2].partition(".")[0] for name in weights if before in name}
        if len(found) != expected:
            raise InputError(f"{where}: config.json says {expected} {what}, the weights have {len(found)}")


def load_folder(folder, device="cpu", dtype=torch.float32, kind=CausalLM):
    """A checkpoint folder -> (model, Tokenizer). An adapter's gives its base, with LoRA merged or the prefix.

    kind: CausalLM or RewardModel. A quantized folder stays packed, to be read and not trained. InputError for
    a folder that is missing, damaged, or of another kind.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if (folder / "adapter_config.json").exists() and kind is CausalLM:
        return load_adapter(folder, device, dtype)
    config, layout = read_config(folder, kind), read_quantization(folder / "config.json")
    if layout and kind is RewardModel:
        raise InputError(f"{folder}: a quantized reward model is not supported")
    weights = read_weights(folder)
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    check_counts(config, weights, folder)
    try:
        with torch.device("meta"):  # shapes without memory: what is loaded is allocated once, in its dtype
            model = kind(config).to(dtype)
            if layout:
                add_quantized(model, *layout, folder, weights)
    except RuntimeError as error:
        raise InputError(f"{folder}/config.json: no such model can be made ({error})") from None
    check_tensors(own_tensors(model), weights, folder)
    model.to_empty(device=device).tie_weights()
    copy_tensors(own_tensors(model), weights, folder)
    model.source = folder
    model.stored_dtype = weights["model.embed_tokens.weight"].dtype
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, the model "
                         f"{config.vocab_size}: it is another model's")
    tokenizer.unused_ids = frozenset(range(config.vocab_size)) - tokenizer.bytes_of.keys()
    return model, tokenizer


def load_adapter(folder, device, dtype):
    """A folder in PEFT's layout: a LoRA adapter, merged into its base, or a prefix, put before it.

    The base is named by a path relative to the folder.
    """
    path = folder / "adapter_config.json"
    settings = read_json(path)
    prefixed = settings.get("peft_type") == "PREFIX_TUNING"
    for key, value in (PREFIX_MUST_BE if prefixed else ADAPTER_MUST_BE).items():
        if settings.get(key, value) not in (value, None):
            raise InputError(f"{path}: {key} = {settings[key]!r} is not supported")
    kinds = {"r": int, "lora_alpha": (int, float), "target_modules": list} if not prefixed else {}
    for key, kind in ({"base_model_name_or_path": str} | kinds).items():
        value = settings.get(key)
        if not isinstance(value, kind) or key != "lora_alpha" and not value or key == "r" and value < 1:
            raise InputError(f"{path}: {key} = {settings.get(key)!r} is not supported")
    named = settings["base_model_name_or_path"]
    base = folder / named if (folder / named).exists() else Path(named)
    if not base.exists():
        raise InputError(f"{folder}: {named}, the model that it adapts, is not there")
    model, tokenizer = load_folder(base, device, dtype)
    tensors = read_safetensors(folder / "adapter_model.safetensors")
    if prefixed:
        return load_prefix(model, tensors, folder), tokenizer
    add_lora(model, settings["r"], settings["lora_alpha"], targets=settings["target_modules"])
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    rows = tensors.pop(TRAINED_ROWS, None)
    own = {f"{name}.weight": p.detach() for name, p in model.named_parameters() if "lora_" in name}
    check_tensors(own, tensors, folder)
    copy_tensors(own, tensors, folder)
    if rows is not None:
        if not rows.isfinite().all():
            raise InputError(f"{folder}: {TRAINED_ROWS} has numbers that are not finite")
        try:
            token_ids = settings["trainable_token_indices"]  # a list, or a list for each layer
            token_ids = token_ids["embed_tokens"] if isinstance(token_ids, dict) else token_ids
            model.model.embed_tokens.weight.detach()[token_ids] = rows.to(device, dtype)
        except (LookupError, TypeError, RuntimeError) as error:
            raise InputError(f"{path}: trainable_token_indices does not fit ({error})") from None
    return merge_lora(model), tokenizer


def load_prefix(model, tensors, folder):
    """Put a file's prefix before a model's texts."""
    config, weight = model.config, model.lm_head.weight
    found = tensors.get("prompt_embeddings", torch.empty(0))
    count = min(found.shape[:1].numel(), config.max_position_embeddings - 1)  # some of the context is left
    shape = count, prefix_width(config)
    own = {"prompt_embeddings": torch.empty(shape, device=weight.device, dtype=weight.dtype)}
    check_tensors(own, tensors, folder)
    copy_tensors(own, tensors, folder)
    set_prefix(model, own["prompt_embeddings"])
    return model


# As in MUST_BE: settings of PEFT's that would change the numbers, and are not in this file.
PREFIX_MUST_BE = {"prefix_projection": False, "num_transformer_submodules": 1}
ADAPTER_MUST_BE = {"peft_type": "LORA", "use_dora": False, "use_rslora": False, "bias": "none",
                   "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
                   "layers_to_transform": None, "fan_in_fan_out": False}

TRAINED_ROWS = "model.embed_tokens.token_adapter.trainable_tokens_delta"  # PEFT's name for trained token rows


def save_adapter(folder, model, base, r, alpha, token_ids):
    """Write a LoRA adapter in PEFT's layout; `token_ids` are embedding rows that were trained with it."""
    tensors = {"base_model.model." + name + ".weight": p.detach().cpu().contiguous()
               for name, p in model.named_parameters() if "lora_" in name}
    targets = sorted({name.split(".")[-3] for name in tensors})
    settings = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none",
                "fan_in_fan_out": False, "target_modules": targets}
    if token_ids:
        rows = model.model.embed_tokens.weight.detach()[token_ids].cpu().contiguous()
        tensors["base_model.model." + TRAINED_ROWS] = rows
        settings["trainable_token_indices"] = {"embed_tokens": token_ids}
    write_adapter(Path(folder), base, settings, tensors)


def save_prefix(folder, model, base):
    """Write a prefix in PEFT's layout."""
    config, prefix = model.config, model.model.prefix.detach().cpu()
    width = config.num_key_value_heads * config.head_dim
    settings = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": len(prefix), "prefix_projection": False,
                "num_layers": config.num_hidden_layers, "num_attention_heads": config.num_key_value_heads,
                "token_dim": width, "encoder_hidden_size": width, "num_transformer_submodules": 1}
    write_adapter(Path(folder), base, settings, {"prompt_embeddings": prefix})


def write_adapter(folder, base, settings, tensors):
    where = os.path.relpath(Path(base).resolve(), folder.resolve())
    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": where, "inference_mode": True}
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter_config.json", settings | common)
    Tokenizer.load(base).save(folder)


def write_safetensors(path, tensors):
    """Write a safetensors file whole or not at all; InputError where it cannot be written."""
    temporary = Path(f"{path}.tmp")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk: what is there of it must not keep it full
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: not written ({error}); --resume goes on from the last state") from None
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_folder(folder, model, tokenizer, changes=None, max_shard=5 * 2**30):
    """Write a Hugging Face model folder. One that was loaded keeps its config, other files and dtype.

    changes: {key: value} of config.json that a run has changed. model.safetensors is renamed into place last;
    above `max_shard` bytes it is sharded with an index.
    """
    folder, changes = Path(folder), changes or {}
    folder.mkdir(parents=True, exist_ok=True)
    if model.source is None:
        write_json(folder / "config.json", config_json(model.config, tokenizer))
        write_json(folder / "generation_config.json",
                   {"eos_token_id": end_ids(tokenizer), "pad_token_id": tokenizer.pad, "do_sample": False})
    elif model.source.resolve() != folder.resolve():
        for file in sorted(model.source.iterdir()):
            if file.suffix in (".json", ".model", ".txt", ".jinja") and file.name not in NOT_COPIED:
                shutil.copyfile(file, folder / file.name)
    tokenizer.save(folder)
    if isinstance(model, RewardModel):  # num_labels 1, as transformers spells it
        name = ARCHITECTURES[model.config.model_type] + HEADS[RewardModel]
        changes = changes | {"architectures": [name], "id2label": {"0": "LABEL_0"},
                             "label2id": {"LABEL_0": 0}, "pad_token_id": tokenizer.pad}
    if changes:
        write_json(folder / "config.json", read_json(folder / "config.json") | changes)
    dtype = getattr(model, "stored_dtype", torch.float32)
    kept = dict(model.named_buffers())  # codes and scales of low-bit layers stay what they are
    tensors = {name: tensor.to("cpu", tensor.dtype if name in kept else dtype).contiguous()
               for name, tensor in own_tensors(model).items()}
    shards = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in (tensor, *shards[-1].values())) > max_shard:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        return write_safetensors(folder / "model.safetensors", tensors)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards):
        write_safetensors(folder / name, shard)
    weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
    size = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    write_json(folder / "model.safetensors.index.json", {"metadata": size, "weight_map": weight_map})


NOT_COPIED = ("run.json", "metrics.jsonl", "model.safetensors.index.json", "adapter_config.json", *FILES)


def eos_ids(folder):
    """eos_token_id (a number or a list) of generation_config.json, or else config.json, as a list."""
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        eos = read_json(path).get("eos_token_id") if path.exists() else None
        if eos is not None:
            return eos if isinstance(eos, list) else [eos]
    return []


def end_ids(tokenizer):
    """Ids that end an answer or a document, the answer's first; a foreign tokenizer may lack some."""
    ids = (tokenizer.im_end, tokenizer.document_end, tokenizer.endoftext)
    return [id for id in dict.fromkeys(ids) if id is not None]


def stop_ids(folder, tokenizer):
    """Ids that end an answer: the folder's, and what ends one in a chat, which a base model may lack."""
    return {*(eos_ids(folder) or end_ids(tokenizer)), tokenizer.im_end} - {None}


def end_at_answers(folder, tokenizer):
    """Have a folder's eos end answers too: a base model's, which it may be a copy of, ends documents."""
    eos, path = eos_ids(folder), Path(folder) / "generation_config.json"
    if tokenizer.im_end not in (None, *eos):
        other = read_json(path) if path.exists() else {}
        write_json(path, other | {"eos_token_id": [tokenizer.im_end, *eos]})


def save_chat_folder(folder, model, tokenizer):
    """`save_folder` of a model that answers."""
    save_folder(folder, model, tokenizer)
    end_at_answers(folder, tokenizer)


# ---------------------------------------------------------------------------------------------------------
# What every run needs: ranks, precision, schedule, optimizer, state, metrics, signals


@dataclass
class Ranks:
    """This process among all: torchrun sets the environment, a plain run is rank 0 of 1."""

    rank: int
    world_size: int
    device: torch.device
    pending: Future | None = None  # puts a state in place whose shards are being written

    @property
    def first(self):
        return self.rank == 0

    @functools.cached_property
    def writers(self):
        """A group for the threads that write states, whose messages must not meet training's."""
        return dist.new_group(backend="gloo") if self.world_size > 1 else None

    def wait(self):
        """Until the state that is being written is in place; InputError where it could not be."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()

    def sum(self, *values):
        """Each value added up over all ranks, in float64."""
        device = "cpu" if self.device.type == "mps" else self.device  # MPS has no float64
        total = torch.tensor(values, dtype=torch.float64, device=device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value):
        """Every rank's value, in the order of ranks, on all ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def rows(self, batch):
        """This rank's share of a step's rows: contiguous, equal."""
        share = len(batch) // self.world_size
        return batch[self.rank * share : (self.rank + 1) * share]


def pick_device(name="auto"):
    """auto: cuda, else mps, else cpu; or what is asked for, where it is there."""
    available = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        name = next(kind for kind, count in available.items() if count)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: not a device; one of {', '.join(available)}") from None
    if (device.index or 0) >= available.get(device.type, 0):
        raise InputError(f"--device {name}: not available on this machine")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # Triton and nccl use the current one
    return device


@contextlib.contextmanager
def process_group(device_name):
    """Ranks of this run; under torchrun a process group around it (nccl on GPUs, gloo on CPUs)."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(device_name)
    if world_size > 1 and device.type == "mps":
        raise InputError("--device mps is for one process; several need --device cpu")
    if world_size > 1 and device.type == "cuda":
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module|torch.distributed is disabled")  # meant so
    with contextlib.ExitStack() as at_end:  # in reverse, however the run ends
        for number in (signal.SIGINT, signal.SIGTERM):  # StopSignal's are for the run only
            at_end.callback(signal.signal, number, signal.getsignal(number))
        if world_size > 1:
            cuda = device.type == "cuda"
            # gloo beside nccl: with CPU offload gradients and states are added up and gathered on the CPU
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                    device_id=device if cuda else None)
            at_end.callback(dist.destroy_process_group)
            at_end.callback(gc.collect)  # what FSDP leaves in cycles holds groups, whose threads must end too
        ranks = Ranks(rank, world_size, device)
        at_end.callback(ranks.wait)
        yield ranks


def say(ranks, message):
    if ranks.first:
        print(message, file=sys.stderr, flush=True)


def parallelize(model, ranks, how="ddp", dtype="fp32", offload=False, checkpointing=False):
    """The model over all ranks, to be called instead of it; its parameters are changed in place by fsdp.

    ddp: every rank has everything, and gradients are averaged (Li et al. 2020). fsdp: a rank holds its share
    of weights, gradients and optimizer, always in fp32, and gathers a block when it is that block's turn, in
    `dtype` (FSDP2; Zhao et al. 2023; Rajbhandari et al. 2020, ZeRO stage 3). Make the optimizer afterwards.

    offload: shares wait in the CPU's memory, where the optimizer works too. checkpointing: a block keeps its
    input only, and is computed again in the backward pass (Chen et al. 2016).
    """
    if checkpointing:
        for block in model.model.layers:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if ranks.world_size == 1:
        return model.to(ranks.device)
    cuda = ranks.device.type == "cuda"
    if how == "ddp":
        ids = [ranks.device.index] if cuda else None
        return nn.parallel.DistributedDataParallel(model.to(ranks.device), device_ids=ids,
                                                   gradient_as_bucket_view=True)
    settings = {"mesh": dist.init_device_mesh(ranks.device.type, (ranks.world_size,)),
                "offload_policy": CPUOffloadPolicy(pin_memory=cuda) if offload else OffloadPolicy()}
    # Inputs are not cast: the residual stream stays in fp32, as it does under autocast.
    half = MixedPrecisionPolicy(DTYPES[dtype], torch.float32, cast_forward_inputs=False)
    for block in model.model.layers:
        fully_shard(block, mp_policy=half, **settings)
    return fully_shard(model, **settings)  # what is left: embeddings, last norm and head, one group in fp32


def whole(tensor):
    """All of a tensor that FSDP has spread over ranks (each of them must call it); any other itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread(tensor, like):
    """A whole tensor as `like` is: on its device, and this rank's share where `like` is spread."""
    if isinstance(like, DTensor) and not isinstance(tensor, DTensor):
        tensor = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor.to(like.device)


def reshard(model):
    """After a forward pass without a backward one: FSDP keeps what is outside of blocks gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()


def unsharded(model, ranks, adapt=lambda plain: None):
    """A model that FSDP has spread, whole on the first rank's CPU; one that is not spread itself.

    adapt: what had been added to the model, for a plain one of its config.
    """
    if not isinstance(model, FSDPModule):
        return model
    with torch.device("meta"):
        plain = type(model)(model.config)
    adapt(plain)
    plain.to_empty(device="cpu" if ranks.first else "meta").tie_weights()
    for name, p in model.named_parameters():
        tensor = whole(p.detach())  # one at a time: the other ranks let go of it
        if ranks.first:
            plain.get_parameter(name).data.copy_(tensor)
    plain.source, plain.stored_dtype = model.source, getattr(model, "stored_dtype", torch.float32)
    return plain


def probe_dtype(device):
    """The dtype that multiplies matrices fastest: bf16 pays only where the processor has units for it."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "mps":
        return "fp32"
    x = torch.randn(768, 768)
    fp32, bf16 = (min(timeit.repeat(lambda: a @ a, number=1, repeat=5)) for a in (x, x.bfloat16()))
    return "bf16" if bf16 * 1.3 < fp32 else "fp32"


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device, dtype):
    """Matrix products in bf16 or fp16, everything that adds up in fp32; nothing for fp32."""
    return contextlib.nullcontext() if dtype == "fp32" else torch.autocast(device.type, DTYPES[dtype])


def choose_dtype(options, ranks, run):
    """--dtype, or the probe's answer where it is auto; kept in run.json for when the run is resumed."""
    if "dtype" not in run:
        dtype = probe_dtype(ranks.device) if options.dtype == "auto" else options.dtype
        run["dtype"] = ranks.gather(dtype)[0]  # the first rank's, on all
        say(ranks, f"dtype {run['dtype']}")
        if ranks.first:
            write_json(Path(options.out) / "run.json", run)
    return run["dtype"]


COMPILE_SECONDS, COMPILE_SAVES = 30, 0.3  # what it costs on a slow machine; the share of eager time it saves


def choose_compile(options, ranks, run, model, one_step, steps):
    """Compile the model in place where --compile says so, or where it repays itself.

    `one_step` is timed in eager mode for that; kept in run.json, so that a resumed run goes on the same way.
    A mixture of experts does not: its routing cuts it into many graphs, which take minutes to compile.
    """
    use = run.get("compile", options.compile)
    if use is None or ranks.world_size > 1:
        one_step()  # warms up; DDP lays out its buckets by it: a resumed run must add up in the same order
    if "compile" not in run:
        if use is None:
            began = time.monotonic()
            one_step()
            saved = (time.monotonic() - began) * steps * COMPILE_SAVES
            use = saved > COMPILE_SECONDS and ranks.device.type != "mps" and not model.config.sparse_layers
        use = ranks.gather(use)[0]  # clocks differ
        run["compile"] = use and all(ranks.gather(compiler_works(ranks.device)))
        say(ranks, f"torch.compile {'on' if run['compile'] else 'off'}")
        if ranks.first:
            write_json(Path(options.out) / "run.json", run)
    model.zero_grad(set_to_none=True)
    if run["compile"]:
        for part in model.model.layers if isinstance(model, FSDPModule) else [model]:  # gathered by block
            part.compile()


def compiler_works(device):
    """Whether torch.compile runs here; a line says why not (no C++ compiler, no triton)."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
        return True
    except Exception as error:  # whatever it is, eager runs
        name = type(error).__name__
        print(f"torch.compile does not work here, going on without it: {name}", file=sys.stderr)
        return False


def accumulate(model, number, batches):
    """Around a micro-batch's passes: DDP waits for the last one before it adds gradients up over ranks."""
    last = number == len(batches) - 1
    return contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()


def learning_rate(step, steps, peak, warmup, schedule):
    """Learning rate of a step (from 0): linear warmup, then cosine to a tenth, linear to 0, or WSD.

    WSD (Hu et al. 2024, MiniCPM, eq. 1): constant, then linear to 0 over the last fifth.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)  # 0 to 1
    if schedule == "cosine":
        return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
    if schedule == "linear":
        return peak * (1 - progress)
    return peak * min(1.0, (1 - progress) / 0.2)


def make_optimizer(model, lr, weight_decay, betas):
    """Fused AdamW (Loshchilov & Hutter 2019), decay on matrices only, over what requires a gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() >= 2 and not hasattr(p, "rows_only")]
    others = [p for p in trained if p.dim() < 2 or hasattr(p, "rows_only")]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)


class Stepper:
    """Unscale, clip, check, step: what happens between the backward pass and the next step, and is saved.

    A gradient that is not finite skips the step; fp16 halves its loss scale then, and doubles it after 1,000
    good steps. Three skips in a row at scale 1 (or down to it) stop the run.
    """

    def __init__(self, optimizer, dtype, clip):
        self.optimizer, self.clip = optimizer, clip
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.scale = 2.0**16 if dtype == "fp16" else 1.0
        self.growing = dtype == "fp16"
        self.good, self.bad, self.skipped = 0, 0, 0

    def step(self, lr):
        """Apply the gradients; returns their global norm (before clipping)."""
        for p in self.parameters:
            if p.grad is not None and self.scale != 1.0:
                p.grad /= self.scale
        norm = whole(nn.utils.clip_grad_norm_(self.parameters, self.clip or math.inf)).item()
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.good, self.bad = self.good + 1, 0
            if self.growing and self.good % 1000 == 0:
                self.scale *= 2
        else:
            self.skipped += 1
            self.bad += self.scale == 1.0
            self.scale = max(1.0, self.scale / 2)
        self.optimizer.zero_grad(set_to_none=True)
        if self.bad == 3:
            raise InputError("loss or gradient was not finite three steps in a row: the last good state is "
                             "kept; lower --lr or use --dtype fp32")
        return norm

    def state(self):
        return {"scale": self.scale, "good": self.good, "bad": self.bad, "skipped": self.skipped}

    def load_state(self, state):
        self.scale, self.good = state["scale"], state["good"]
        self.bad, self.skipped = state["bad"], state["skipped"]


def fingerprint(paths):
    """A short hash of files by name, size, first and last MB: whether a run's inputs are the same."""
    digest = hashlib.sha256()
    for path in sorted(map(Path, paths)):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with open(path, "rb") as file:
            digest.update(file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read(2**20))
    return digest.hexdigest()[:16]


REFITTED = ("micro_batch", "checkpointing", "offload", "save_every", "peak_tflops")  # for fewer GPUs, say


def open_run(stage, options, ranks, inputs):
    """Begin, resume or refuse a run in options.out. Returns (run.json as a dict, the state's folder or None).

    run.json keeps the options and a fingerprint of the inputs; a resumed run must have the same (its --steps
    or --epochs may grow, what changes the result by rounding at most may differ, and with --new-data the data
    too). Raises InputError for an --out that is unfinished, finished, or another run's.
    """
    out = Path(options.out)
    settings = {k: v for k, v in dataclasses.asdict(options).items()
                if k not in ("resume", "overwrite", "new_data")}
    fresh = {"stage": stage, "options": settings, "inputs": inputs, "finished": False, "seconds": 0.0}
    if options.resume and options.overwrite:
        raise InputError("--resume goes on and --overwrite starts again: choose one")
    refuse_untrainable(options.model)
    old = read_json(out / "run.json") if (out / "run.json").exists() else None
    empty = not out.exists() or out.is_dir() and all(p.match("run.json.*.tmp") for p in out.iterdir())
    if old is None and not empty:
        raise InputError(f"{out}: is there and is not a run's folder; choose another --out")
    if old is not None and not fresh.keys() <= old.keys():
        raise InputError(f"{out / 'run.json'}: not written by this script; choose another --out")
    going_on = old is not None and not options.overwrite
    state = newest_state(out) if going_on else None
    if len(set(map(str, ranks.gather((old, state))))) > 1:  # nor is it changed before all have looked at it
        raise InputError(f"{out}: the processes see different states there; they must share one file system")
    if going_on:
        before = old["options"]
        grown = [k for k in ("steps", "epochs") if k in settings and settings[k] > before.get(k, math.inf)]
        free = [*grown, *REFITTED, *["data"] * getattr(options, "new_data", False)]
        changed = [k for k in settings if settings[k] != before.get(k) and k not in free]
        if old["finished"] and not (grown and options.resume):
            raise InputError(f"{out}: a finished run; choose another --out, or --overwrite it")
        if old["finished"] and state is None:
            raise InputError(f"{out}: a finished run without its state/, which going on needs; "
                             f"--model {out} with another --out trains it further")
        if not options.resume:
            raise InputError(f"{out}: an unfinished run; go on with --resume, or start again with "
                             "--overwrite")
        if changed or old["stage"] != stage:
            what = f"--{changed[0].replace('_', '-')}" if changed else "the stage"
            raise InputError(f"{out}: {what} is not what the run began with; --resume needs the same options")
        other = [what for what in inputs if inputs[what] != old["inputs"].get(what)]
        may_be_new = hasattr(options, "new_data") and other == ["data"]
        if other and not (may_be_new and options.new_data):
            hint = " (or --new-data)" if may_be_new else ""
            raise InputError(f"{out}: the {other[0]} it began with has changed; start again with "
                             f"--overwrite{hint}")
        fresh = old | {"options": settings, "inputs": inputs, "finished": False}
    if ranks.first:
        if old and options.overwrite:
            clear_run(out, old)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "run.json", fresh)
    ranks.sum(0)
    return fresh, state


def refuse_untrainable(folder):
    """A model that would lose what it is by training on: quantized, or with a prefix before it."""
    config, adapter = Path(folder) / "config.json", Path(folder) / "adapter_config.json"
    if folder and adapter.exists() and read_json(adapter).get("peft_type") == "PREFIX_TUNING":
        raise InputError(f"{folder}: a model with a trained prefix is neither trained further nor quantized")
    if folder and config.exists() and read_quantization(config):  # an adapter's folder has no config
        raise InputError(f"{folder}: is quantized already; start from the model that it was made from")


def clear_run(out, run):
    """Remove all but run.json: if killed meanwhile, an unfinished run is left, which may be overwritten."""
    write_json(out / "run.json", run | {"finished": False})
    for path in (out / "state").glob("*/state.json"):
        path.unlink()  # before their tensors: a state without it is none
    for path in out.iterdir():
        if path.name != "run.json":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def newest_state(out):
    """The newest state/step-N of a run, or None. A state is renamed into place when it is whole."""
    states = [p for p in (Path(out) / "state").glob("step-*") if (p / "state.json").exists()]
    return max(states, key=lambda p: int(p.name.removeprefix("step-")), default=None)


STATE_PARTS = ("weight", "exp_avg", "exp_avg_sq", "momentum_buffer")


def state_tensors(models):
    """Yield (key, tensor) of all that is trained and of its optimizer's state, alike on all ranks."""
    for name, (module, stepper) in models.items():
        for key, p in module.named_parameters():
            if p.requires_grad:
                parts = {"weight": p.detach(), **stepper.optimizer.state.get(p, {})}
                yield from ((f"{name}.{key}.{part}", parts[part]) for part in STATE_PARTS if part in parts)


def save_state(out, record, ranks, models, sharded=False):
    """Write state/step-N: fp32 weights and the optimizer's moments as safetensors, `record` as state.json.

    models: {name: (module, its Stepper)}. Keys are `{name}.{parameter}.{weight|exp_avg|...}`; what is frozen
    is not saved. Written under a temporary name, synced, renamed once; the newest two stay. sharded: each
    rank writes its share, where the whole is too large for one, while training goes on; `ranks.wait()` waits
    until the state is in place, as the next one does, and the run's end.
    """
    ranks.wait()
    step, folder = record["step"], Path(out) / "state"
    temporary, final = folder / f"tmp-{step}", folder / f"step-{step}"
    record = record | {"steppers": {name: stepper.state() for name, (_, stepper) in models.items()}}
    if ranks.first:
        for unfinished in folder.glob("tmp-*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        temporary.mkdir(parents=True)

    def finish():
        if ranks.first:
            write_json(temporary / "state.json", record)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            states = sorted(folder.glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))
            for old in states[:-2]:
                shutil.rmtree(old, ignore_errors=True)

    if sharded:
        written = write_shards(temporary / "shards", dict(state_tensors(models)), ranks)
        ranks.pending = ThreadPoolExecutor(1).submit(lambda: (written(), finish()))
        return
    gathered = ((key, whole(tensor)) for key, tensor in state_tensors(models))
    tensors = {key: tensor.cpu() for key, tensor in gathered if ranks.first}
    if ranks.first:
        write_safetensors(temporary / "tensors.safetensors", tensors)
    finish()


def load_state(folder, models):
    """Put a state's tensors back into {name: (module, its Stepper)}; returns its state.json.

    Any number of ranks, and either way of spreading them, reads any other's. InputError for a state that is
    damaged: to remove its folder goes back to the one before.
    """
    record, shards = read_json(folder / "state.json"), folder / "shards"
    tensors = (read_shards(shards, models) if shards.is_dir()
               else read_safetensors(folder / "tensors.safetensors"))
    try:
        steppers = record.pop("steppers")
        for name, (module, stepper) in models.items():
            stepper.load_state(steppers[name])
            for key, p in module.named_parameters():
                if p.requires_grad:
                    found = {part: spread(tensors[f"{name}.{key}.{part}"], p) for part in STATE_PARTS
                             if f"{name}.{key}.{part}" in tensors}
                    p.detach().copy_(found.pop("weight"))
                    if found:
                        count = torch.tensor(float(stepper.good), device=p.device)
                        stepper.optimizer.state[p] = {"step": count, **found}
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder}: not a state of this run ({type(error).__name__}: {error})") from None
    return record


def write_shards(folder, tensors, ranks):
    """Copy this rank's share and begin to write it; returns a function that waits until all ranks have.

    (torch.distributed.checkpoint.)
    """
    ranks.sum(0)  # the folder is there, for all
    future = dcp.async_save(tensors, checkpoint_id=folder, process_group=ranks.writers,
                            no_dist=ranks.world_size == 1)

    def finish():
        try:
            future.result()
        except dcp.CheckpointException as error:
            problem = next(iter(error.failures.values()))[0]
            raise InputError(f"{folder}: not written ({problem}); --resume goes on from the last "
                             "state") from None

    return finish


def read_shards(folder, models):
    """{key: tensor} of a state's shards, on each rank its share. Trusted ones: their index is unpickled."""
    tensors = {}
    try:
        saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        for name, (module, _) in models.items():
            for key, p in module.named_parameters():
                keys = [f"{name}.{key}.{part}" for part in STATE_PARTS]
                tensors |= {key: torch.empty_like(p.detach()) for key in keys if key in saved}
        dcp.load(tensors, checkpoint_id=folder, no_dist=not dist.is_initialized())
    except (dcp.CheckpointException, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise InputError(f"{folder}: damaged, or another run's ({type(error).__name__})") from None
    return tensors


def stopped_early(options, ranks, record):
    """Whether --patience had stopped the run: it was killed before its end, or is to go on for more steps."""
    if early := 0 < options.patience <= record["worse"]:
        say(ranks, f"--patience stopped it after step {record['step']}; it makes no more")
    return early


def keep_best(options, ranks, record, loss, model):
    """After a validation: count those without a new best; with --patience, keep the weights of the best."""
    loss = ranks.gather(loss)[0]  # all ranks must stop at the same step
    better = loss < record["best"]  # NaN is not
    record |= {"best": loss, "worse": 0} if better else {"worse": record["worse"] + 1}
    if not better or not options.patience:
        return
    named = ((name, whole(p.detach())) for name, p in model.named_parameters() if p.requires_grad)
    trained = {name: tensor.cpu().contiguous() for name, tensor in named if ranks.first}
    if ranks.first:
        (Path(options.out) / "state").mkdir(parents=True, exist_ok=True)
        write_safetensors(Path(options.out) / "state" / "best.safetensors", trained)


@torch.no_grad()
def export_best(options, ranks, model):
    """With --patience the best validation's weights are put back before the export, else the last stay."""
    path = Path(options.out) / "state" / "best.safetensors"
    ranks.sum(0)  # it is written, for all
    if options.patience and path.exists():  # it is not where every validation was NaN
        best = read_safetensors(path)
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(spread(best[name], p))


def finish_run(options, ranks, run, record, export):
    """Export the model, then mark run.json finished, last of all; returns exit status 0."""
    ranks.wait()
    if ranks.first:
        export()
        end = {"step": record["step"], "seconds": record["seconds"], "finished": True}
        write_json(Path(options.out) / "run.json", run | end)
    ranks.sum(0)  # nobody takes the process group down while others use it
    return 0


class Metrics:
    """FOLDER/metrics.jsonl, one JSON object a step, and what one sees: a bar on a terminal, else lines."""

    def __init__(self, out, ranks, step, steps):
        self.path, self.ranks, self.steps, self.spoken = Path(out) / "metrics.jsonl", ranks, steps, 0.0
        if not ranks.first:
            return
        lines = self.path.read_text("utf-8").split("\n")[:-1] if self.path.exists() else []  # whole ones
        try:
            kept = [line + "\n" for line in lines if json.loads(line)["step"] <= step]  # up to the state
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{self.path}: there are lines in it that are no run's; remove them") from None
        write_whole(self.path, "".join(kept).encode())
        self.file = open(self.path, "a", encoding="utf-8", buffering=1)
        self.bar = tqdm(total=steps, initial=step, disable=not sys.stderr.isatty(), unit="step")

    def write(self, step, **values):
        if not self.ranks.first:
            return
        self.file.write(json.dumps({"step": step, **finite(values)}) + "\n")
        long = (list, dict) if "loss" in values else list  # a step's line has room for numbers alone
        text = "  ".join(f"{name} {short(value)}" for name, value in values.items()
                         if value is not None and value is not False and not isinstance(value, long))
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(text[:70])
        speak = time.monotonic() - self.spoken > 10 or "loss" not in values or step == self.steps
        if self.bar.disable and speak and text:
            print(f"step {step}/{self.steps}  {text}", file=sys.stderr, flush=True)
            self.spoken = time.monotonic()

    def close(self):
        if self.ranks.first:
            self.bar.close()
            self.file.close()


def finite(value):
    """A number, or a dict of them, with None for what is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {name: finite(number) for name, number in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def short(value):
    """A number, or a dict of them, as one reads it: four digits."""
    if isinstance(value, dict):
        return " ".join(f"{name} {short(number)}" for name, number in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class StopSignal:
    """Ctrl-C and SIGTERM finish the step, agreed over all ranks; a second Ctrl-C stops at once."""

    def __init__(self):
        self.raised = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, frame):
        if self.raised and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.raised = True

    def agreed(self, ranks):
        return ranks.sum(self.raised)[0] > 0


# ---------------------------------------------------------------------------------------------------------
# Chat in the terminal


@dataclass(kw_only=True)
class Options:
    """Chat with a model in the terminal. /help tells what can be typed there."""

    model: str = option("checkpoint folder: a model, or an adapter")
    temperature: float = option("0 always takes the likeliest token", 0.0, at_least=0)
    top_k: int = option("sample among the k likeliest tokens; 0 is off", 0, at_least=0)
    top_p: float = option("sample among the likeliest tokens that hold this share of the probability", 1.0,
                          at_least=0)
    min_p: float = option("sample among tokens with at least this share of the likeliest one's probability",
                          0.0, at_least=0)
    repetition_penalty: float = option("make what was said so much less likely; 1 is off", 1.0, at_least=1)
    presence_penalty: float = option("subtract this from the logits of what the answer has", 0.0)
    max_new_tokens: int = option("most tokens in an answer", 256, at_least=1)
    stop: list[str] = option("texts that end an answer, beside the model's own end", [])
    system: str = option("a system message that opens the dialogue", "")
    seed: int = option("seed of the sampling", 0)
    device: str = option("auto, cpu, cuda or mps", "auto")


HELP = """/reset           forget the dialogue
/system TEXT     forget it, and open with this system message (none: without one)
/temperature X   0 always takes the likeliest token
/quit            leave; Ctrl-D too. Ctrl-C ends an answer, or clears what you have typed
\"\"\"              before and after a message of several lines"""


class Chat:
    """A dialogue, and the keys and values of what the model has read of it."""

    def __init__(self, options, model, tokenizer):
        self.options, self.model, self.tokenizer = options, model, tokenizer
        self.stop, self.turn = stop_ids(options.model, tokenizer), 0
        self.restart(options.system)

    def restart(self, system):
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages, self.cache, self.read = list(self.opening), None, []

    def prompt_ids(self):
        """Ids of the dialogue up to the answer. Where an answer of a quarter of the context would have no
        room, the oldest turns are forgotten, but for the opening."""
        while True:
            ids, _ = encode_chat(self.tokenizer, self.messages, generation_prompt=True)
            room = 0.75 * self.model.config.max_position_embeddings
            if len(ids) <= room or len(self.messages) <= len(self.opening) + 2:
                return ids
            del self.messages[len(self.opening) : len(self.opening) + 2]

    def answer(self):
        """Yield the answer to the dialogue in pieces. What was read before is not read again."""
        options, ids = self.options, self.prompt_ids()
        if self.cache:
            same = (i for i, (a, b) in enumerate(zip(ids, self.read)) if a != b)
            self.cache.length = min(next(same, len(self.read)), len(ids) - 1)
        else:
            self.cache = prepare_cache(self.model, [ids], options.max_new_tokens, None)
        self.read, decoder = ids[: self.cache.length], StreamDecoder(self.tokenizer)
        ends = StopStrings(self.tokenizer, options.stop) if options.stop else None
        how = {field.name: getattr(options, field.name) for field in dataclasses.fields(Sampling)}
        tokens = generate_tokens(self.model, [list(ids)], options.max_new_tokens, self.stop, [self.turn],
                                 ends=ends, cache=self.cache, **how)
        text, whole, told, held = "", "", 0, max(map(len, options.stop), default=1) - 1
        for _, token, _, _ in tokens:
            ids.append(token)
            self.read = ids[: self.cache.length]
            text += "" if token in self.stop else decoder.feed(token)
            whole = ends.cut(text) if ends else text
            ready = max(told, len(whole) - held)  # what comes after may be the beginning of a stop text
            yield whole[told:ready]
            told = ready
        yield whole[told:]

    def say(self, text):
        """Answer a message: print it as it comes, and remember both. Ctrl-C ends the answer only."""
        before, said = list(self.messages), ""
        self.messages.append({"role": "user", "content": text})
        try:
            for piece in self.answer():
                said += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
        except InputError as error:  # too long a question: the dialogue goes on without it
            print(error, file=sys.stderr)
            self.messages = before
            return
        print()
        self.messages.append({"role": "assistant", "content": said})
        self.turn += 1

    def command(self, line):
        """Obey a line that begins with a slash; False when it says to leave."""
        name, _, rest = line.partition(" ")
        if name == "/reset":
            self.restart(self.opening[0]["content"] if self.opening else "")
        elif name == "/system":
            self.restart(rest.strip())
        elif name == "/temperature" and rest.strip().replace(".", "", 1).isdecimal():
            self.options.temperature = float(rest)
        elif name != "/quit":
            print(HELP)
        return name != "/quit"


def read_message():
    """What is typed, and whether it is a command; several lines stand between three quotation marks.

    EOFError at the end of input.
    """
    line = input("> ").strip()
    if not line.startswith('"""'):
        return line, line.startswith("/")
    lines = [line[3:]]
    while not lines[-1].rstrip().endswith('"""'):
        lines.append(input("  "))
    return "\n".join(lines).strip()[:-3].strip(), False


@one_line_errors
def main(argv=None):
    options = parse_options(Options, argv, "model.py")
    with contextlib.suppress(AttributeError):  # what is not UTF-8 is told by the tokenizer
        sys.stdin.reconfigure(errors="surrogateescape")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history at the prompt, where the system has it
    chat = Chat(options, *load_folder(options.model, pick_device(options.device)))
    while True:
        try:
            line, command = read_message()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return 0
        if command:
            if not chat.command(line):
                return 0
        elif line:
            chat.say(line)


if __name__ == "__main__":
    sys.exit(main())
