"""Sampling: a prompt is computed once, its n rollouts share that cache, a finished row takes the next rollout.

    python sample.py --model runs/rpt/step_000090 --prompt "..." --n 4             # continue it
    python sample.py --model runs/rpt/step_000090 --prompt "..." --n 4 --think     # predict what follows

What `generate` promises to the trainer:
  - it samples softmax(logits / temperature), nothing else, and returns the log-prob of every token it drew;
  - one random number per token, hashed from (seed, index of the prompt, index of the sample, position): the
    other rows, their order and how many there are at a time change nothing;
  - the stop token is part of the rollout, because the policy is trained to emit it.

    prefill   [ prompt 1 ][ prompt 2 ] ...   packed, no padding    -> prompt cache: S slots (S, Hkv, P, K)
    decode    one token for every row        sees prompt and self  -> row cache: B rows (B, Hkv, R, K)
    refill    a rollout ends, its row takes the next one; a slot is free when all n of its prompt have ended
"""
import argparse
import codecs
import json
import math
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

import kernels
from plumbing.flags import speak_once
from data.prompt import TEMPLATES, build_prompt, stop_ids, template_ids
from data.tokenizer import Tokenizer
from kernels.attention import attention, make_layout
from kernels.decode import Rows, decode
from kernels.logprob import draw, sample
from kernels.linear import linear
from model import GPT
from reward import extract_prediction

PREFILL_TOKENS = 8192  # prompts are computed in packs of about this many; bounds the memory of a prefill
REFILL_SHARE = 1 / 16  # of the rows wait before they are refilled together: few prefills of many prompts
STOP_CHECKS = dict(cpu=1, cuda=16)  # tokens between two looks at who has finished: a GPU would wait for each


@dataclass
class Rollout:
    tokens: list = field(default_factory=list)      # generated ids, the stop token included
    logprobs: list = field(default_factory=list)    # log-prob of each, under softmax(logits / temperature)
    finished: bool = False                          # ended with a stop token, not by running out of room


@torch.no_grad()
def generate(model, prompts, n, max_new_tokens, temperature, stop_ids, seed, first_prompt=0,
             max_rows=256, kv_gb=None, progress=None, stats=None, on_token=None, truncate=None):
    """n rollouts for each of N prompts (lists of token ids) -> [[Rollout] * n for each prompt].

    temperature: 0 takes the most probable token (log-probs are then those of temperature 1).
    seed: an int or a tuple of ints. first_prompt: index of prompts[0] in the whole batch, so that ranks that
    sample a part each draw what one process would have drawn.
    max_rows: rollouts decoded at a time; fewer if the KV cache would pass kv_gb (default: half of the memory).
    progress: called with how many rollouts ended and tokens were drawn since its last call (`rollout_bar`).
    stats: a dict that gets occupancy (share of the decoded rows that were in use) and kv_bytes.
    on_token: called with (prompt, sample, token) for every token.
    truncate: tempered logits (B, V) -> logits with -inf where sampling shall not go (`truncation`). Not for
    training: log-probs are then not those of the policy.
    ValueError for an empty prompt, one that leaves no room, or arguments out of range.
    """
    check_request(model, prompts, n, max_new_tokens, temperature, stop_ids)
    rollouts = [[Rollout() for _ in range(n)] for _ in prompts]
    if not prompts:
        return rollouts
    model = model.cast()
    keys = random_keys(range(first_prompt, first_prompt + len(prompts)), n, seed)        # (N, n)
    cache = Cache(model, prompts, n, max_new_tokens, max_rows, kv_gb)
    stops, chunk, row_steps = set(stop_ids), STOP_CHECKS[model.device.type], 0

    def record(rows, tokens, logprobs):
        """Append one drawn token to the rollout of each of these rows; a row whose rollout ends is free."""
        done = drawn = 0
        for row, token, logprob in zip(rows, tokens, logprobs):
            if cache.owner[row] is None:
                continue
            i, s = cache.owner[row]
            rollout = rollouts[i][s]
            if not math.isfinite(logprob):
                raise ValueError(f"logits are NaN or infinite {len(rollout.tokens)} tokens after prompt {i} "
                                 f"({prompts[i][:8]}...): the checkpoint is damaged or has diverged")
            rollout.tokens.append(token)
            rollout.logprobs.append(logprob)
            rollout.finished = token in stops
            drawn += 1
            if on_token:
                on_token(i, s, token)
            if rollout.finished or len(rollout.tokens) == max_new_tokens:
                cache.release(row)
                done += 1
        if progress:
            progress(done, drawn)

    decode_step = None
    while cache.waiting or cache.live:
        while cache.waiting and cache.B - cache.live >= (cache.B * REFILL_SHARE if cache.live else 1):
            fresh = cache.admit(model, prompts, keys)
            if not fresh:  # every slot holds a prompt whose rollouts still run
                break
            hidden = cache.prompt_hidden[cache.rows.prompt[fresh]]
            tokens, logprobs = draw_next(model, hidden, mix(cache.keys[fresh]), temperature, truncate)
            cache.tokens[fresh] = tokens
            record(fresh, tokens.tolist(), logprobs.tolist())
        if not cache.live:
            continue
        if not cache.waiting and cache.live < 0.75 * cache.B:  # until then idle rows stay: moving costs more
            cache.keep_live()
            decode_step = None
        decode_step = decode_step or stepper(model, cache, temperature, truncate)
        drawn = [decode_step() for _ in range(chunk)]
        row_steps += chunk * cache.B
        for tokens, logprobs in zip(*(torch.stack(x).tolist() for x in zip(*drawn))):
            record(range(cache.B), tokens, logprobs)
    if stats is not None:
        tokens = sum(len(rollout.tokens) - 1 for group in rollouts for rollout in group)  # the first: prefill
        stats.update(occupancy=tokens / max(1, row_steps), kv_bytes=cache.bytes)
    return rollouts


@contextmanager
def rollout_bar(total, desc, disable=None):
    """A progress bar over rollouts, with tokens per second -> a function for `progress`. Terminals only."""
    with tqdm(total=total, desc=desc, unit="rollout", leave=False, disable=disable) as bar:
        start, tokens = time.perf_counter(), 0

        def progress(done, drawn):
            nonlocal tokens
            tokens += drawn
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):,.0f} tok/s", refresh=False)
            bar.update(done)

        yield progress


def step(model, cache, temperature, truncate):
    """Decode one token for every row -> the next tokens (B,) and their log-probs (B,)."""
    rows = cache.rows
    rows.lengths.add_(rows.busy).clamp_(max=cache.room)  # the clamp: a rollout that ended inside the chunk
    rows.longest = (rows.longest[0], min(rows.longest[1] + 1, cache.room))
    positions = rows.prompt_lens[rows.prompt] + (rows.lengths - 1).clamp(min=0)
    hidden = model.hidden(cache.tokens, positions, cache.attend)                         # (B, D)
    bits = mix(cache.keys + rows.lengths)
    tokens, logprobs = draw_next(model, hidden, bits, temperature, truncate)
    cache.tokens.copy_(tokens)
    return tokens, logprobs


def draw_next(model, hidden, bits, temperature, truncate):
    """hidden (B, D), bits (B,) -> tokens (B,), their log-probs (B,)."""
    if truncate is None:
        return sample(hidden, model.head, bits, temperature)
    logits = truncate(linear(hidden, model.head).float() / (temperature or 1))           # (B, V), tempered
    return draw(logits, 1 if temperature else 0, bits)


def truncation(top_k=0, top_p=1.0, min_p=0.0):
    """-> a function for `truncate`, or None: keep the top_k most probable tokens; of these the fewest that
    have top_p of the probability; of these the ones with at least min_p times that of the best."""
    if not (top_k >= 0 and 0 < top_p <= 1 and 0 <= min_p <= 1):
        raise ValueError("top-k must be at least 0, top-p in (0, 1], min-p in [0, 1], "
                         f"got {top_k}, {top_p}, {min_p}")

    def truncate(logits):
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        if top_k:
            ordered[:, top_k:] = -torch.inf
        probs = ordered.softmax(dim=-1)
        ordered[probs.cumsum(dim=-1) - probs >= top_p] = -torch.inf  # what comes before a token has enough
        probs = ordered.softmax(dim=-1)
        ordered[probs < min_p * probs[:, :1]] = -torch.inf
        return torch.empty_like(logits).scatter_(1, order, ordered)

    return truncate if top_k or top_p < 1 or min_p else None


def stepper(model, cache, temperature, truncate):
    """-> a function without arguments that is `step`: on a GPU a CUDA graph, hundreds of launches as one."""
    eager, rows = lambda: step(model, cache, temperature, truncate), cache.rows
    if model.device.type != "cuda" or kernels.chosen(model.device) == "torch":  # torch needs sizes on the host
        return eager
    before = rows.lengths.clone(), cache.tokens.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles what is new; what it caches is written again
        eager()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, logprobs = eager()
    rows.lengths.copy_(before[0])
    cache.tokens.copy_(before[1])

    def replay():
        graph.replay()
        return tokens.clone(), logprobs.clone()  # the next replay writes to the same place

    return replay


def prefill(model, cache, prompts, slots):
    """Compute prompts (lists of ids) packed, and store their keys, values and last hidden states in slots."""
    start = 0
    while start < len(prompts):
        end = start + 1
        while end < len(prompts) and sum(map(len, prompts[start:end + 1])) <= PREFILL_TOKENS:
            end += 1
        layout = make_layout([(len(p), []) for p in prompts[start:end]], model.device)
        tokens = torch.tensor([t for p in prompts[start:end] for t in p], device=model.device)
        chosen = torch.tensor(slots[start:end], device=model.device)

        def attend(layer, q, k, v):
            width = layout.prompts.shape[1]
            cache.prompt_k[layer][chosen, :, :width] = k[layout.prompts].transpose(1, 2)
            cache.prompt_v[layer][chosen, :, :width] = v[layout.prompts].transpose(1, 2)
            return attention(q, k, v, layout)

        cache.prompt_hidden[chosen] = model.hidden(tokens, layout.positions, attend)[layout.last_rows]
        cache.rows.prompt_lens[chosen] = layout.prompt_lens
        start = end


class Cache:
    """Keys and values of S prompts and of B rows that continue them, and which rollout each row works on.

    prompt_k, prompt_v: per layer (S, Hkv, P, K). row_k, row_v: per layer (B, Hkv, R, K).
    """

    def __init__(self, model, prompts, n, max_new_tokens, max_rows, kv_gb):
        config, dtype, device = model.config, model.compute_dtype, model.device
        Hkv, K, layers = config.n_kv_heads, config.head_dim, range(config.n_layers)
        P, R = max(map(len, prompts)), max(1, max_new_tokens - 1)  # the last token is never read
        token_bytes = 2 * config.n_layers * Hkv * K * dtype.itemsize
        self.B, S = cache_size(len(prompts), n, P, R, token_bytes, max_rows, kv_budget(kv_gb, device))
        self.bytes, self.room = (S * P + self.B * R) * token_bytes, R
        zeros = lambda N, T: [torch.zeros(N, Hkv, T, K, dtype=dtype, device=device) for _ in layers]
        self.prompt_k, self.prompt_v = zeros(S, P), zeros(S, P)
        self.row_k, self.row_v = zeros(self.B, R), zeros(self.B, R)
        self.prompt_hidden = torch.zeros(S, config.width, dtype=dtype, device=device)
        self.tokens, self.keys = torch.zeros(2, self.B, dtype=torch.long, device=device)
        self.rows = Rows(self.B, S, config.n_heads // Hkv, device)
        self.index = torch.arange(self.B, device=device)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # like lengths together
        self.waiting = [(i, s) for i in reversed(order) for s in reversed(range(n))]    # the next one is last
        self.owner = [None] * self.B                         # (prompt, sample) that a row works on
        self.line = order[::-1]                              # prompts to be computed, the next one last
        self.slot_of, self.free, self.left = {}, list(range(S)), dict.fromkeys(order, n)
        self.live = 0

    def admit(self, model, prompts, keys):
        """Give idle rows the next rollouts -> the rows that start one; none if no slot is free for a prompt."""
        idle, fresh = [row for row in range(self.B) if self.owner[row] is None], []
        while idle and self.waiting:
            i, s = self.waiting[-1]
            if i not in self.slot_of:
                new = {self.line.pop(): self.free.pop() for _ in range(min(len(self.line), len(self.free)))}
                if not new:
                    break
                prefill(model, self, [prompts[j] for j in new], list(new.values()))
                self.slot_of.update(new)
            self.waiting.pop()
            fresh.append(idle.pop(0))
            self.owner[fresh[-1]] = (i, s)
        self.live += len(fresh)
        if fresh:
            self.keys[fresh] = torch.stack([keys[self.owner[row]] for row in fresh]).to(self.keys)
            self.rows.lengths[fresh] = 0
            self.place()
        return fresh

    def release(self, row):
        """The rollout of this row has ended; the slot of its prompt is free after the last one."""
        i, _ = self.owner[row]
        self.owner[row], self.live = None, self.live - 1
        self.left[i] -= 1
        if not self.left[i]:
            self.free.append(self.slot_of.pop(i))

    def keep_live(self):
        """Forget the idle rows."""
        live = [row for row in range(self.B) if self.owner[row]]
        self.owner, self.B = [self.owner[row] for row in live], len(live)
        for cache in (self.row_k, self.row_v):
            for layer, rows in enumerate(cache):
                cache[layer] = rows[live]
        self.tokens, self.keys = self.tokens[live], self.keys[live]
        self.rows = self.rows.keep(live)
        self.place()

    def place(self):
        """Tell the device which prompt each row continues."""
        self.rows.place([self.slot_of[owner[0]] if owner else -1 for owner in self.owner])

    def attend(self, layer, q, k, v):
        """One new token for each row: q (B, H, K), k and v (B, Hkv, K) -> (B, H, K). Stores k and v."""
        rows, last = self.index[:self.B], self.rows.lengths - 1
        self.row_k[layer][rows, :, last], self.row_v[layer][rows, :, last] = k, v
        caches = (cache[layer] for cache in (self.prompt_k, self.prompt_v, self.row_k, self.row_v))
        return decode(q, *caches, self.rows)


def random_keys(prompts, n, seed):
    """Indices of N prompts -> (N, n) int64: the random stream of each rollout."""
    prompts = mix(torch.tensor(prompts), *(seed if isinstance(seed, tuple) else (seed,)))
    return mix(torch.arange(n) + prompts[:, None])


def mix(key, *more):
    """SplitMix64 hash of an int64 tensor (and ints): random bits without a generator whose state to save."""
    for extra in (0, *more):
        key = key * 31 + extra - 7046029254386353131
        for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
            key = (key ^ (key >> shift & (1 << 64 - shift) - 1)) * factor             # the mask: no sign bits
    return key


def cache_size(N, n, P, R, token_bytes, max_rows, budget):
    """-> B rows of R tokens and S slots of P, for n rollouts of N prompts: what `budget` bytes can hold."""
    for B in range(min(max_rows, N * n), 0, -1):
        S = min(N, B, math.ceil(B / n * (2 + math.log(n))))  # slots wait for the slowest of n, and one ahead
        if (S * P + B * R) * token_bytes <= budget:
            return B, S
    raise ValueError(f"the KV cache of a single rollout takes {(P + R) * token_bytes / 1e9:.3g} GB (a prompt of "
                     f"{P} and {R} new tokens, {token_bytes:,} bytes each); "
                     f"there is room for {budget / 1e9:.3g} GB")


def kv_budget(kv_gb, device):
    """Bytes that the KV cache may take: as asked, or half of the memory (on a GPU: of what is free)."""
    if kv_gb is not None:
        return kv_gb * 1e9
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # of the last update
        return (torch.cuda.mem_get_info(device)[0] + kept) / 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 if hasattr(os, "sysconf") else 4e9


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


def printer(tokenizer):
    """-> a function for `on_token` that writes one rollout as it comes, characters when they are whole."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return lambda _i, _s, token: print(decoder.decode(tokenizer.decode_bytes([token])), end="", flush=True)


if __name__ == "__main__":
    sys.excepthook = speak_once
    parser = argparse.ArgumentParser(description="Continue a text, or think and predict what follows it.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="checkpoint folder with its tokenizer")
    add("--prompt", default=None, help="the text; without it --prompt-file is read")
    add("--prompt-file", default="-", help="UTF-8, taken as it stands; - is stdin")
    add("--think", action="store_true", help="ask for a thought and a \\boxed{prediction}")
    add("--template", default="v0", choices=TEMPLATES, help="how --think asks")
    add("--n", type=int, default=1, help="rollouts; a single one is written as it comes")
    add("--max-new-tokens", type=int, default=256, help="length of a rollout")
    add("--temperature", type=float, default=0.8, help="0 is greedy")
    add("--top-k", type=int, default=0, help="only the K most probable tokens; 0: all")
    add("--top-p", type=float, default=1.0, help="only the fewest tokens that have this much probability")
    add("--min-p", type=float, default=0.0, help="only tokens with this share of the best one's probability")
    add("--seed", type=int, default=0, help="same seed, same rollouts")
    add("--kv-gb", type=float, default=None, help="memory for keys and values; default: half of what is there")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--json", action="store_true", help="one JSON object for each rollout")
    args = parser.parse_args()

    truncate = truncation(args.top_k, args.top_p, args.min_p)
    tokenizer = Tokenizer.load(args.model)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = GPT.from_pretrained(args.model, dtype, args.device)
    text = args.prompt
    if text is None:
        if args.prompt_file == "-" and sys.stdin.isatty():
            print("Type the text to continue, then Ctrl-D on a line of its own:", file=sys.stderr)
        with open(0 if args.prompt_file == "-" else args.prompt_file, encoding="utf-8", newline="") as file:
            text = file.read()
    prompt = tokenizer.encode(text)
    if args.think:
        before, after = template_ids(tokenizer, args.template)
        prompt = build_prompt(prompt, before, after, model.config.max_positions - args.max_new_tokens)
    streams = args.n == 1 and not args.json
    with rollout_bar(args.n, "rollouts", disable=True if streams else None) as progress:
        [rollouts] = generate(model, [prompt], args.n, args.max_new_tokens, args.temperature,
                              stop_ids(tokenizer), args.seed, kv_gb=args.kv_gb, progress=progress,
                              on_token=printer(tokenizer) if streams else None, truncate=truncate)
    for i, rollout in enumerate(rollouts, start=1):
        response = tokenizer.decode_bytes(rollout.tokens)
        box, response = extract_prediction(response), response.decode("utf-8", "replace")
        if args.json:
            box = box if box is None else box.decode("utf-8", "replace")
            print(json.dumps(dict(text=response, box=box, **vars(rollout)), ensure_ascii=False))
        else:
            end = "finished" if rollout.finished else "cut off"
            print("" if streams else response)
            print(f"--- rollout {i} of {args.n}: {len(rollout.tokens)} tokens, {end}, box {box}")
