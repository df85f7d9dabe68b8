"""Sampling: a prompt is computed once, its n rollouts share that cache, finished rows leave.

    python sample.py --model runs/rpt/step_000090 --prompt "..." --n 4             # continue it
    python sample.py --model runs/rpt/step_000090 --prompt "..." --n 4 --think     # predict what follows

What `generate` promises to the trainer:
  - it samples softmax(logits / temperature), nothing else, and returns the log-prob of every token it drew;
  - one random number per token, hashed from (seed, index of the prompt, index of the sample, position): the
    other rows, their order and how many there are at a time change nothing;
  - the stop token is part of the rollout, because the policy is trained to emit it.

    prefill   [ prompt 1 ][ prompt 2 ] ...     packed, no padding           -> prompt cache (N, Hkv, P, K)
    decode    one token for every live row     sees its prompt's cache and its own (B, Hkv, R, K)
"""
import argparse
import json
import math
import sys
from dataclasses import dataclass, field

import torch

from data import speak_once
from data.prompt import TEMPLATES, build_prompt, stop_ids, template_ids
from data.tokenizer import Tokenizer
from kernels.attention import attention, make_layout
from model import GPT
from reward import extract_prediction

PREFILL_TOKENS = 8192  # prompts are computed in packs of about this many; bounds the memory of a prefill


@dataclass
class Rollout:
    tokens: list = field(default_factory=list)      # generated ids, the stop token included
    logprobs: list = field(default_factory=list)    # log-prob of each, under softmax(logits / temperature)
    finished: bool = False                          # ended with a stop token, not by running out of room


@torch.no_grad()
def generate(model, prompts, n, max_new_tokens, temperature, stop_ids, seed,
             first_prompt=0, max_rows=256, progress=None):
    """n rollouts for each of N prompts (lists of token ids) -> [[Rollout] * n for each prompt].

    temperature: 0 takes the most probable token (log-probs are then those of temperature 1).
    seed: an int or a tuple of ints. first_prompt: index of prompts[0] in the whole batch, so that ranks that
    sample a part each draw what one process would have drawn. max_rows: rollouts decoded at a time (those of
    one prompt stay together). progress: called with the number of rollouts just done.
    ValueError for an empty prompt, one that leaves no room, or arguments out of range.
    """
    check_request(model, prompts, n, max_new_tokens, temperature, stop_ids)
    rollouts = [[Rollout() for _ in range(n)] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: less padding
    batch = max(1, max_rows // n)
    for start in range(0, len(order), batch):
        chosen = order[start:start + batch]
        names = torch.tensor([[first_prompt + i, s] for i in chosen for s in range(n)], device=model.device)
        keys = mix(names[:, 1] + mix(names[:, 0], *(seed if isinstance(seed, tuple) else (seed,))))  # (B,)
        rows = [rollout for i in chosen for rollout in rollouts[i]]
        chosen = [prompts[i] for i in chosen]
        decode(model, chosen, rows, n, max_new_tokens, temperature, list(stop_ids), keys)
        if progress:
            progress(len(rows))
    return rollouts


def decode(model, prompts, rollouts, n, max_new_tokens, temperature, stop_ids, keys):
    """Fill `rollouts`, n for each prompt in order. keys (B,): the random stream of each."""
    cache, logits = prefill(model, prompts, n, max_new_tokens)                           # logits (N, V)
    logits = logits.repeat_interleave(n, dim=0)                                          # (B, V)
    live = torch.ones(len(rollouts), dtype=torch.bool, device=model.device)
    stops = torch.tensor(stop_ids, dtype=torch.long, device=model.device)
    for position in range(max_new_tokens):
        if not logits.isfinite().all():
            bad = cache.slot[~logits.isfinite().all(dim=1)][0].item() // n
            raise ValueError(f"logits are NaN or infinite {position} tokens after the prompt "
                             f"{prompts[bad][:8]}...: the checkpoint is damaged or has diverged")
        tokens, logprobs = draw(logits, temperature, mix(keys[cache.slot] + position))   # (B,), (B,)
        done = torch.isin(tokens, stops)
        drawn = (cache.slot, tokens, logprobs, done)
        for slot, token, logp, end in zip(*(x[live].tolist() for x in drawn)):
            rollouts[slot].tokens.append(token)
            rollouts[slot].logprobs.append(logp)
            rollouts[slot].finished = end
        live &= ~done
        if not live.any() or position + 1 == max_new_tokens:
            return
        if live.sum() < 0.75 * len(live):  # until then finished rows go on unread: moving costs more
            cache.keep(live)
            tokens, live = tokens[live], live[live]
        positions = cache.prompt_lens[cache.slot // n] + position
        hidden = model.hidden(tokens, positions, cache.attend)                           # (B, D)
        cache.length += 1
        logits = (hidden @ model.head.to(hidden.dtype).T).float()                        # (B, V)


def prefill(model, prompts, n, room):
    """Compute N prompts once -> (Cache with room for n rollouts of each, logits (N, V) after each prompt)."""
    cache = Cache(model.config, [len(p) for p in prompts], n, room, model.compute_dtype, model.device)
    logits, start = [], 0
    while start < len(prompts):
        end = start + 1
        while end < len(prompts) and len(prompts[end]) * (end + 1 - start) <= PREFILL_TOKENS:
            end += 1
        layout = make_layout([(len(p), []) for p in prompts[start:end]], model.device)
        tokens = torch.tensor([t for p in prompts[start:end] for t in p], device=model.device)

        def attend(layer, q, k, v):
            cache.store_prompts(layer, k, v, layout, slice(start, end))
            return attention(q, k, v, layout)

        hidden = model.hidden(tokens, layout.positions, attend)[layout.last_rows]       # (N, D)
        logits.append((hidden @ model.head.to(hidden.dtype).T).float())
        start = end
    return cache, torch.cat(logits)


def draw(logits, temperature, random_bits):
    """logits (B, V), random_bits (B,) int64 -> one token and its log-prob for each row."""
    if temperature == 0:
        tokens = logits.argmax(dim=-1)
        return tokens, logits.log_softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)
    logprobs = (logits / temperature).log_softmax(dim=-1)
    cumulative = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)                 # (B, V), fp64: V is large
    uniform = (random_bits >> 11 & (1 << 53) - 1).double() / (1 << 53)                   # in [0, 1)
    tokens = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)


def mix(key, *more):
    """SplitMix64 hash of an int64 tensor (and ints): random bits without a generator whose state to save."""
    for extra in (0, *more):
        key = key * 31 + extra - 7046029254386353131
        for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
            key = (key ^ (key >> shift & (1 << 64 - shift) - 1)) * factor             # the mask: no sign bits
    return key


class Cache:
    """Keys and values of N prompts, each stored once, and of B rows that continue them, at first B = N * n.

    prompt_k, prompt_v: per layer (N, Hkv, P, K), padded on the right.
    row_k, row_v: per layer (B, Hkv, room, K).
    """

    def __init__(self, config, prompt_lens, n, room, dtype, device):
        N, P = len(prompt_lens), max(prompt_lens)
        Hkv, K, layers = config.n_kv_heads, config.head_dim, range(config.n_layers)
        empty = lambda B, T: [torch.zeros(B, Hkv, T, K, dtype=dtype, device=device) for _ in layers]
        self.prompt_k, self.prompt_v = empty(N, P), empty(N, P)
        self.row_k, self.row_v = empty(N * n, room), empty(N * n, room)
        self.prompt_lens = torch.tensor(prompt_lens, device=device)
        self.padding = torch.arange(P, device=device) >= self.prompt_lens[:, None]      # (N, P)
        self.slot = torch.arange(N * n, device=device)                         # (B,) which of N * n rollouts
        self.n, self.length = n, 0                                             # tokens cached in each row

    def store_prompts(self, layer, k, v, layout, chosen):
        """k, v (T, Hkv, K) of packed prompts -> their places in the cache."""
        width = layout.prompts.shape[1]
        self.prompt_k[layer][chosen, :, :width] = k[layout.prompts].transpose(1, 2)
        self.prompt_v[layer][chosen, :, :width] = v[layout.prompts].transpose(1, 2)

    def keep(self, live):
        """Forget the rows where live (B,) is False."""
        self.slot = self.slot[live]
        for cache in (self.row_k, self.row_v):
            for layer, rows in enumerate(cache):
                cache[layer] = rows[live]

    def attend(self, layer, q, k, v):
        """One new token for each row: q (B, H, K), k and v (B, Hkv, K) -> (B, H, K). Stores k and v."""
        self.row_k[layer][:, :, self.length], self.row_v[layer][:, :, self.length] = k, v
        (B, H, K), Hkv, end = q.shape, k.shape[1], self.length + 1
        q = q * K ** -0.5
        scores = self.of_prompts(q, self.prompt_k[layer].transpose(2, 3))                # (B, H, P)
        scores = scores.masked_fill(self.padding[self.slot // self.n][:, None], -torch.inf)
        own = q.view(B, Hkv, H // Hkv, K) @ self.row_k[layer][:, :, :end].transpose(2, 3)
        scores = torch.cat([scores, own.view(B, H, end)], dim=-1)                        # (B, H, P + end)
        weights = scores.float().softmax(dim=-1).to(q.dtype)
        prompt_weights, own_weights = weights.split([scores.shape[-1] - end, end], dim=-1)
        out = own_weights.view(B, Hkv, H // Hkv, end) @ self.row_v[layer][:, :, :end]  # (B, Hkv, H / Hkv, K)
        return self.of_prompts(prompt_weights, self.prompt_v[layer]) + out.view(B, H, K)

    def of_prompts(self, x, y):
        """x (B, H, i), y (N, Hkv, i, j) -> (B, H, j): each row times its prompt's matrix, unrepeated."""
        (_, H, i), (N, Hkv, _, j), n = x.shape, y.shape, self.n
        grid = x.new_zeros(N * n, H, i)
        grid[self.slot] = x
        grid = grid.view(N, n, Hkv, H // Hkv, i).transpose(1, 2).reshape(N, Hkv, n * H // Hkv, i)
        out = (grid @ y).view(N, Hkv, n, H // Hkv, j).transpose(1, 2).reshape(N * n, H, j)
        return out[self.slot]


def check_request(model, prompts, n, max_new_tokens, temperature, stop_ids):
    """One clear ValueError for a request that cannot be met."""
    if n < 1 or max_new_tokens < 1:
        raise ValueError(f"n and max_new_tokens must be at least 1, got {n} and {max_new_tokens}")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be 0 (greedy) or above, got {temperature}")
    vocab, positions = model.config.vocab_size, model.config.max_positions
    for stop in stop_ids:
        if not 0 <= stop < vocab:
            raise ValueError(f"stop id {stop} is not in the vocabulary of {vocab}")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; a rollout needs at least one token to continue")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise ValueError(f"prompt {i} has token ids from {min(prompt)} to {max(prompt)}, the vocabulary "
                             f"has {vocab}; do tokenizer and checkpoint belong together?")
        if len(prompt) + max_new_tokens > positions:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; with {max_new_tokens} new ones that is "
                             f"more than the model's {positions} positions")


if __name__ == "__main__":
    sys.excepthook = speak_once
    parser = argparse.ArgumentParser(description="Continue a text, or think and predict what follows it.")
    parser.add_argument("--model", required=True, help="checkpoint folder with its tokenizer")
    parser.add_argument("--prompt", help="the text; without it --prompt-file is read")
    parser.add_argument("--prompt-file", default="-", help="UTF-8, taken as it stands; default - is stdin")
    parser.add_argument("--think", action="store_true", help="ask for a thought and a \\boxed{prediction}")
    parser.add_argument("--template", default="v0", choices=TEMPLATES, help="how --think asks (default v0)")
    parser.add_argument("--n", type=int, default=1, help="rollouts (default 1)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="length of a rollout (default 256)")
    parser.add_argument("--temperature", type=float, default=0.8, help="default 0.8; 0 is greedy")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same rollouts (default 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        choices=["cpu", "cuda"])
    parser.add_argument("--json", action="store_true", help="one JSON object for each rollout")
    args = parser.parse_args()

    tokenizer = Tokenizer.load(args.model)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = GPT.from_pretrained(args.model, dtype, args.device)
    text = args.prompt
    if text is None:
        with open(0 if args.prompt_file == "-" else args.prompt_file, encoding="utf-8", newline="") as file:
            text = file.read()
    prompt = tokenizer.encode(text)
    if args.think:
        before, after = template_ids(tokenizer, args.template)
        prompt = build_prompt(prompt, before, after, model.config.max_positions - args.max_new_tokens)
    [rollouts] = generate(model, [prompt], args.n, args.max_new_tokens, args.temperature,
                          stop_ids(tokenizer), args.seed)
    for i, rollout in enumerate(rollouts, start=1):
        response = tokenizer.decode_bytes(rollout.tokens)
        box, response = extract_prediction(response), response.decode("utf-8", "replace")
        if args.json:
            box = box if box is None else box.decode("utf-8", "replace")
            print(json.dumps(dict(text=response, box=box, **vars(rollout)), ensure_ascii=False))
        else:
            end = "finished" if rollout.finished else "cut off"
            print(f"--- rollout {i} of {args.n}: {len(rollout.tokens)} tokens, {end}, box {box}\n{response}")
