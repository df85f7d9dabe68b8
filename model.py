"""GPT from scratch: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

One class covers the Llama and Mistral, Qwen2 (bias on q, k, v) and Qwen3 (RMSNorm on q and k)
families, with the parameter names of Hugging Face. plumbing/hf.py reads and writes their folders.

    model = GPT.from_pretrained("Qwen2.5-0.5B")        # a folder; GPT(config) starts at random
    logits = model(tokens)                             # (B, T) -> (B, T, V)
    model.save_pretrained("my-model")                  # loads again here and in transformers

Inside the model there is no batch dimension: T tokens, from one sequence or many. `hidden` takes
them with their positions and a function `attend`, which knows which token sees which. Training
passes `Layout.attend` (packed prompts and rollouts), sampling `Cache.attend_prompts` and
`Cache.attend` (sample.py); the layers do not know the difference.
"""
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

import kernels
from kernels.attention import make_layout
from kernels.linear import CAN_PACK, Packed, linear, product
from kernels.logprob import logprob
from kernels.pointwise import rms_norm, rotate, swiglu
from plumbing import hf, rope


@dataclass
class GPTConfig:
    vocab_size: int
    width: int                     # D
    n_layers: int
    n_heads: int                   # H, query heads
    n_kv_heads: int                # Hkv, key and value heads; H / Hkv query heads share one
    head_dim: int                  # K; Qwen3 has K != D / H
    ffn_width: int
    max_positions: int
    rope_theta: float = 10_000.0
    rope_scaling: tuple = ()       # (field, value) pairs of plumbing/rope.py; stretched contexts
    norm_eps: float = 1e-5
    tied_head: bool = True         # the output head is the embedding matrix
    family: str = "llama"          # llama | mistral | qwen2 | qwen3


def read_config(folder):
    """config.json of a Hugging Face folder -> GPTConfig; ValueError for what is not implemented."""
    return GPTConfig(**hf.read_config(folder))


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """Weights may be fp32 masters while activations are bf16: `linear` casts the weights."""
    joined = None   # weight and bias of this layer and those behind it that read the same x
    packed = None   # the same for a CPU, as `Packed`

    def forward(self, x, residual=None):
        if self.packed is None or not self.packed.fits(x):
            return linear(x, self.weight, self.bias, residual)
        return self.packed(x) if residual is None else self.packed(x).add_(residual)


def products(x, *layers):
    """What each of these Linear layers makes of x; a single product if they have been joined."""
    first = layers[0]
    if first.packed is not None and first.packed.fits(x):
        out = first.packed(x)
    elif first.joined is not None:
        out = linear(x, *first.joined)
    else:
        return [linear(x, layer.weight, layer.bias) for layer in layers]
    return out.split([layer.out_features for layer in layers], dim=1)


def join(*layers):
    """Put weights and biases of these layers in one piece, of which their own become views."""
    outs, joined = [layer.out_features for layer in layers], dict(weight=None, bias=None)
    for name in joined:
        parts = [getattr(layer, name) for layer in layers]
        if parts[0] is None:
            continue
        joined[name] = torch.cat(parts)
        for layer, part in zip(layers, joined[name].split(outs)):
            setattr(layer, name, nn.Parameter(part, requires_grad=False))
    layers[0].joined = joined["weight"], joined["bias"]


@lru_cache(maxsize=4)
def rope_table(max_positions, K, theta, scaling, device):
    """cos and sin of every angle, (max_positions, 1, K / 2) each, fp32.

    Computed once, because a vectorised cosine may round differently at the end of a tensor, and a
    position must have the same values in every batch.
    """
    frequencies, factor = rope.frequencies(K, theta, dict(scaling), device)
    angles = torch.arange(max_positions, device=device)[:, None, None].float() * frequencies
    return angles.cos() * factor, angles.sin() * factor


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, K = config.width, config.head_dim
        H, Hkv = config.n_heads, config.n_kv_heads
        bias = config.family == "qwen2"
        self.head_dim = K
        self.q_proj = Linear(D, H * K, bias=bias)
        self.k_proj = Linear(D, Hkv * K, bias=bias)
        self.v_proj = Linear(D, Hkv * K, bias=bias)
        self.o_proj = Linear(H * K, D, bias=False)
        has_norm = config.family == "qwen3"
        self.q_norm = RMSNorm(K, config.norm_eps) if has_norm else nn.Identity()
        self.k_norm = RMSNorm(K, config.norm_eps) if has_norm else nn.Identity()

    def forward(self, x, rope, attend, residual):
        q, k, v = products(x, self.q_proj, self.k_proj, self.v_proj)
        q = q.unflatten(-1, (-1, self.head_dim))                             # (T, H, K)
        k = k.unflatten(-1, (-1, self.head_dim))                             # (T, Hkv, K)
        v = v.unflatten(-1, (-1, self.head_dim))                             # (T, Hkv, K)
        q, k = rotate(self.q_norm(q), self.k_norm(k), *rope)
        return self.o_proj(attend(q, k, v).flatten(1), residual)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.width, config.ffn_width, bias=False)
        self.up_proj = Linear(config.width, config.ffn_width, bias=False)
        self.down_proj = Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x, residual):
        gate, up = products(x, self.gate_proj, self.up_proj)
        return self.down_proj(swiglu(gate, up), residual)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, attend):
        # Both parts add what they find to x: their last product does it on its way to memory.
        x = self.self_attn(self.input_layernorm(x), rope, attend, residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class GPT(nn.Module):
    def __init__(self, config, compute_dtype=torch.float32):
        """compute_dtype: of activations and matrix products; weights keep their own dtype."""
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.source = "this model"            # or the folder that it was loaded from
        self.checkpoint_activations = False   # True: the backward pass recomputes each block
        self.packed_head = None               # as Linear.packed
        self.files = {}                       # {name: bytes}, what a folder says beside its weights
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        if not config.tied_head:
            self.lm_head = Linear(config.width, config.vocab_size, bias=False)
        self.initialise()

    def initialise(self):
        """GPT-2's initialisation: weights that write to the residual stream start smaller."""
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / (2 * self.config.n_layers) ** 0.5 if writes else 0.02
                nn.init.normal_(weight, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    @property
    def head(self):
        """(V, D) weights of the output head."""
        return self.embed_tokens.weight if self.config.tied_head else self.lm_head.weight

    @property
    def device(self):
        return self.embed_tokens.weight.device

    def by_input(self):
        """Lists of Linear layers that read the same x."""
        for block in self.layers:
            attention, mlp = block.self_attn, block.mlp
            yield [attention.q_proj, attention.k_proj, attention.v_proj]
            yield [attention.o_proj]
            yield [mlp.gate_proj, mlp.up_proj]
            yield [mlp.down_proj]

    @torch.no_grad()
    def join_weights(self):
        """For sampling on a GPU: one product for q, k and v, one for gate and up. -> self

        A decode step waits for launches as much as for memory. On a CPU see `pack_weights`.
        """
        if kernels.backend(self.device) != "torch":
            for layers in self.by_input():
                if len(layers) > 1:
                    join(*layers)
        return self

    @torch.no_grad()
    def pack_weights(self, rows):
        """For sampling on a CPU: the same, and weights in the order in which they are multiplied.

        rows: of a decode step. These are copies, so `unpack_weights` has to come before an update.
        """
        dtype = self.compute_dtype
        if self.packs():
            for layers in self.by_input():
                layers[0].packed = Packed([layer.weight.to(dtype) for layer in layers],
                                          [layer.bias for layer in layers], rows)
            self.packed_head = Packed([self.head.to(dtype)], [None], rows, is_head=True)

    def packs(self):
        on_cpu = self.device.type == "cpu" and kernels.backend(self.device) == "torch"
        return on_cpu and CAN_PACK.get(self.compute_dtype, False)

    def packed_bytes(self):
        """How much memory `pack_weights` will take. The head is fp32 in any case."""
        if not self.packs():
            return 0
        layers = sum(weight.numel() for weight in self.layers.parameters())
        return self.compute_dtype.itemsize * layers + 4 * self.head.numel()

    def unpack_weights(self):
        self.packed_head = None
        for layers in self.by_input():
            layers[0].packed = None

    def hidden(self, tokens, positions, attend):
        """tokens (T,), positions (T,) -> hidden states (T, D) after the last norm.

        attend(layer, q (T, H, K), k (T, Hkv, K), v (T, Hkv, K)) -> (T, H, K)
        """
        config = self.config
        x = self.embed_tokens(tokens).to(self.compute_dtype)
        cos, sin = rope_table(config.max_positions, config.head_dim, config.rope_theta,
                              config.rope_scaling, x.device)
        rope = cos[positions], sin[positions]                                # (T, 1, K / 2)
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        for layer, block in enumerate(self.layers):
            attend_here = partial(attend, layer)
            if recompute:
                x = checkpoint(block, x, rope, attend_here, use_reentrant=False,
                               preserve_rng_state=False)
            else:
                x = block(x, rope, attend_here)
        return self.norm(x)

    def logprobs(self, tokens, layout, temperature=1.0):
        """Packed tokens (T,) -> log-probs of the S rollout tokens, (S,) fp32."""
        hidden = self.hidden(tokens, layout.positions, layout.attend)        # (T, D)
        targets = tokens[layout.rollout_rows]                                # (S,)
        logprobs, _ = logprob(hidden[layout.predict_rows], self.head, targets, temperature,
                              with_entropy=False)
        return logprobs

    def forward(self, tokens):
        """tokens (B, T) -> logits (B, T, V), fp32."""
        B, T = tokens.shape
        if T > self.config.max_positions:
            raise ValueError(f"{T} tokens, but the model has {self.config.max_positions} positions")
        layout = make_layout([(T, [])] * B, tokens.device)
        hidden = self.hidden(tokens.flatten(), layout.positions, layout.attend)
        return self.logits(hidden).view(B, T, -1)

    def logits(self, hidden):
        """hidden (N, D) -> (N, V), fp32."""
        if self.packed_head is not None and self.packed_head.fits(hidden):
            return self.packed_head(hidden)
        if hidden.device.type == "cpu" and kernels.backend(hidden.device) == "torch":
            return product(hidden, self.head.T)
        return linear(hidden, self.head).float()

    def finite(self, values):
        """-> values, which follow from logits; ValueError if one is NaN or infinite."""
        if not values.isfinite().all():
            raise ValueError(f"{self.source}: logits are not finite (NaN or infinite): the weights "
                             "are damaged or have diverged")
        return values

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu", compute_dtype=None,
                        shard=None):
        """Load a Hugging Face folder, with weights stored as `dtype`.

        compute_dtype: as in __init__; default: dtype. shard: called with the model before it has
        memory (parallel.shard), so that each rank reads no more than its part. ValueError names the
        file and the field or tensor that is missing, damaged or not implemented here.
        """
        with torch.device("meta"):
            model = cls(read_config(folder), compute_dtype or dtype).to(dtype)
        if shard:
            shard(model)
        model.source = str(folder)
        model.to_empty(device=device)
        hf.load_weights(model, folder)
        model.files = hf.read_files(folder)
        return model

    def save_pretrained(self, folder):
        """Write weights with Hugging Face names, and what the model's folder said beside them.

        All ranks call this.
        """
        hf.save_folder(self, folder)
