"""Sampling: a prompt is computed once, its n rollouts share that cache, finished rows are refilled.

    python sample.py --model DIR --prompt "..." --n 4             # continue it
    python sample.py --model DIR --prompt "..." --n 4 --think     # think, predict what follows

What `generate` promises to the trainer:
  - It samples softmax(logits / temperature), nothing else, and returns the log-prob of every token.
  - The random number of a token is a hash of (seed, prompt, number of the rollout, place in it), so
    it does not depend on which rows are decoded together, in which order or how many at a time.
  - The stop token is part of the rollout, because the policy is trained to emit it.

    prefill   [ prompt 1 ][ prompt 2 ] ...    packed, no padding       -> prompt cache, S slots
    decode    one token for every row         sees prompt and itself   -> row cache, B rows
    refill    when a rollout ends, its row takes the next one; when all n of a prompt have ended,
              its slot takes the next prompt

`Schedule` knows which rollout is in which row (plain Python), `Cache` holds keys and values.
"""
import codecs
import json
import math
import os
import sys
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial

from plumbing import memory, parallel  # before torch: how its threads wait
import torch

import kernels
from kernels.attention import attention
from kernels.decode import Rows, decode
from kernels.logprob import draw, sample as sample_tokens
from plumbing.batch import cut, flatten

PREFILL_TOKENS = 8192   # in one forward pass over prompts; bounds its memory
REFILL_SHARE = 1 / 16   # of the rows have to be idle before a refill, so that prefills are large
MAX_NEW_TOKENS = 256    # of the command line, unless it says otherwise
# How many tokens to decode before checking for finished rows; each check synchronises the GPU.
CHUNK = dict(cpu=1, cuda=16)
# A slot's tokens are a multiple of this: the caches of a step then fit where those of the last step
# were.
SLOT_STEP = dict(cpu=1, cuda=256)
# Once nothing waits and fewer rows than this share are busy, drop the idle ones. On a GPU each time
# takes a new graph; 0.5 needs half as many of them as 0.75, for nearly as many steps.
BUSY_SHARE = dict(cpu=0.75, cuda=0.5)
# How much of what is free the KV cache may take. The weights are there already, and the rest only
# has to hold the buffers of a prefill, or of drawing tokens: below a GB for a model of 1.5B, 2 GB
# for 32B (bench/memory.py).
KV_SHARE = 0.85
CPU_SHARE = 0.5         # of the machine's memory, at most, because that has other uses
CAPTURE_BYTES = 2e9     # more than what a decode step needs beside weights and cache


@dataclass
class Rollout:
    tokens: list[int] = field(default_factory=list)      # generated ids, the stop token included
    logprobs: list[float] = field(default_factory=list)  # of each, in softmax(logits / temperature)
    finished: bool = False                               # ended with a stop token, not cut off


@torch.no_grad()
def generate(model, prompts, n, max_new_tokens, temperature, stop_ids, seed, first_prompt=0,
             max_rows=256, kv_gb=None, on_tokens=None, truncate=None, is_end=None):
    """n rollouts for each of N prompts (lists of token ids) -> [[Rollout] * n for each prompt].

    temperature: 0 takes the most probable token, with its log-prob at temperature 1.
    seed: an int or a tuple of ints.
    first_prompt: index of prompts[0] in the whole batch, so that a rank that samples only a part
        draws what one process would have drawn.
    max_rows: rollouts decoded at a time; fewer where their KV cache would take more than kv_gb,
        10^9 bytes (default: what `kv_budget` says).
    on_tokens: called with [(prompt, number, token), ...] and how many rollouts have ended so far.
    truncate: from plumbing/truncate.py. Not for training: log-probs are then not the policy's.
    is_end: called with the ids of a rollout after each of its tokens; True ends it there, as a
        stop token would. For ends that are not a token of their own.
    ValueError for an empty prompt, one that leaves no room, or arguments out of range.
    """
    check_request(model, prompts, n, max_new_tokens, temperature, stop_ids)
    if not prompts:
        return []
    # The cache knows how many rows and slots fit into memory, the schedule fills them.
    cache = Cache(model, prompts, n, max_new_tokens, max_rows, kv_gb)
    schedule = Schedule(prompts, n, cache.B, cache.S, stop_ids, max_new_tokens, model.source,
                        is_end)
    # A rollout's randomness comes from its own key, whatever row it gets and when.
    keys = random_keys(range(first_prompt, first_prompt + len(prompts)), n, seed)        # (N, n)
    draw_tokens = partial(draw_next, model, temperature, truncate)
    try:
        decode_all(model, prompts, cache, schedule, keys, draw_tokens, on_tokens)
    finally:
        model.unpack_weights()
    return schedule.rollouts


def decode_all(model, prompts, cache, schedule, keys, draw_tokens, on_tokens):
    """Decode until every rollout of the schedule has ended."""
    decode_step = None

    while not schedule.is_done():
        # Idle rows take the next rollouts. One may end with its first token, hence the loop.
        while schedule.wants_refill():
            started = refill(model, prompts, cache, schedule, keys, draw_tokens, on_tokens)
            if not started:  # every slot holds a prompt whose rollouts still run
                break
        if not schedule.busy_rows():
            continue

        # While rollouts wait, idle rows stay, because computing them for nothing costs less than
        # moving the caches of the others. Once nothing waits they are dropped.
        if schedule.wants_fewer_rows(BUSY_SHARE[model.device.type]):
            cache.keep(schedule.drop_idle_rows())
            cache.rows.place(schedule.slots())
            decode_step = None
        if decode_step is None:
            decode_step = make_step(model, cache, draw_tokens)

        # Decode a chunk. A row whose rollout ends inside it goes on, and `record` ignores the rest.
        drawn = [decode_step() for _ in range(CHUNK[model.device.type])]
        tokens = torch.stack([tokens for tokens, _ in drawn]).tolist()               # (chunk, B)
        logprobs = torch.stack([logprobs for _, logprobs in drawn]).tolist()
        for step_tokens, step_logprobs in zip(tokens, logprobs):
            schedule.record(range(cache.B), step_tokens, step_logprobs, on_tokens)


def refill(model, prompts, cache, schedule, keys, draw_tokens, on_tokens):
    """Start rollouts in idle rows, draw their first tokens -> the rows, none if no slot is free."""
    rows, placed = schedule.admit()
    cache.prefill(model, [prompts[i] for i in placed], list(placed.values()))
    if rows:
        # The first token needs no decoding: the last hidden state of the prompt predicts it.
        owners = [schedule.owner[row] for row in rows]
        row_keys = torch.stack([keys[prompt, number] for prompt, number in owners])
        hidden = cache.start(rows, row_keys, schedule.slots())
        tokens, logprobs = draw_tokens(hidden, mix(cache.keys[rows]))
        cache.tokens[rows] = tokens
        schedule.record(rows, tokens.tolist(), logprobs.tolist(), on_tokens)
    return rows


# ---- one token for every row ----

def step(model, cache, draw_tokens):
    """Decode one token for every row -> the next tokens (B,) and their log-probs (B,)."""
    rows = cache.rows
    rows.advance(cache.R)
    # Positions continue those of the prompt. What an idle row computes is never read.
    positions = rows.prompt_lens[rows.slot] + (rows.lengths - 1).clamp(min=0)
    hidden = model.hidden(cache.tokens, positions, cache.attend)                         # (B, D)
    # The rollout's key and the place in it make the random number.
    tokens, logprobs = draw_tokens(hidden, mix(cache.keys + rows.lengths))
    cache.tokens.copy_(tokens)
    return tokens, logprobs


def draw_next(model, temperature, truncate, hidden, bits):
    """hidden (B, D), random bits (B,) -> tokens (B,) and their log-probs (B,)."""
    if truncate is None and kernels.backend(hidden.device) != "torch":
        return sample_tokens(hidden, model.head, bits, temperature)
    logits = model.logits(hidden)                                                        # (B, V)
    if truncate is None:
        return draw(logits, temperature, bits)
    # Truncation needs the logits divided by the temperature.
    return draw(truncate(logits / (temperature or 1)), 1 if temperature else 0, bits)


def make_step(model, cache, draw_tokens):
    """-> `step` without arguments; on a GPU a CUDA graph, except with the torch backend."""
    model.pack_weights(cache.B)
    eager = partial(step, model, cache, draw_tokens)
    # The torch backend slices by numbers on the host, which a graph would freeze.
    if model.device.type != "cuda" or kernels.backend(model.device) == "torch":
        return eager
    return GraphStep(eager, cache)


@lru_cache
def capture_stream():
    """Where all graphs are captured: torch demands a stream beside the usual one."""
    return torch.cuda.Stream()


class GraphStep:
    """`step` captured as a CUDA graph, which turns hundreds of launches into one."""

    def __init__(self, eager, cache):
        before = cache.rows.lengths.clone(), cache.tokens.clone()
        stream = capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Run once, so that nothing has to be compiled during the capture. The next step writes
            # over what this one caches.
            eager()
            # Not `with torch.cuda.graph(...)`, which always gives unused memory back to the driver,
            # to be asked for again by the update. But a capture can only take what the driver has.
            if torch.cuda.mem_get_info()[0] < CAPTURE_BYTES:
                torch.cuda.empty_cache()
            # "thread_local": what other threads do, such as NCCL's, does not end the capture.
            self.graph = torch.cuda.CUDAGraph()
            self.graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.tokens, self.logprobs = eager()
            finally:
                self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        # Undo the first run: the schedule has not seen it.
        cache.rows.lengths.copy_(before[0])
        cache.tokens.copy_(before[1])

    def __call__(self):
        self.graph.replay()
        # Copies, because the next replay writes to the same memory.
        return self.tokens.clone(), self.logprobs.clone()


# ---- which rollout is where ----

class Schedule:
    """Which rollout each row works on, and which slot holds each prompt. No tensors.

    A rollout is (prompt, number). B rows work on B rollouts at a time. A prompt takes a slot before
    its first rollout starts, and frees it when the last of its n rollouts has ended.
    """

    def __init__(self, prompts, n, B, S, stop_ids, max_new_tokens, source="this model",
                 is_end=None):
        # Sorted, so that prompts of similar length are computed together and padding is short.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        self.prompts = prompts
        self.source = source    # whose tokens these are, for an error
        self.stop_ids = set(stop_ids)
        self.is_end = is_end
        self.max_new_tokens = max_new_tokens
        self.rollouts = [[Rollout() for _ in range(n)] for _ in prompts]
        self.ended = 0
        # Rollouts that wait for a row, and for each row the rollout it works on, or None.
        self.waiting = deque((i, number) for i in order for number in range(n))
        self.owner = [None] * B
        # Prompts that wait for a slot, the slots of those that have one, and the free slots.
        self.unplaced = deque(order)
        self.slot_of = {}
        self.free_slots = list(range(S))
        # How many rollouts of each prompt have not ended yet.
        self.left = dict.fromkeys(order, n)

    def is_done(self):
        return not self.waiting and not self.busy_rows()

    def busy_rows(self):
        return len(self.owner) - self.owner.count(None)

    def wants_refill(self):
        """Are there enough idle rows to make a refill worth its prefill?"""
        idle = self.owner.count(None)
        return bool(self.waiting) and idle >= REFILL_SHARE * len(self.owner)

    def wants_fewer_rows(self, share):
        return not self.waiting and self.busy_rows() < share * len(self.owner)

    def admit(self):
        """Give idle rows the next rollouts -> these rows, {prompt: slot} to compute first."""
        rows, placed = [], {}
        for row in range(len(self.owner)):
            if self.owner[row] is not None:
                continue
            if self.waiting and self.waiting[0][0] not in self.slot_of:
                # Fill every free slot, because one prefill of many prompts is cheaper than many.
                while self.unplaced and self.free_slots:
                    placed[self.unplaced.popleft()] = self.free_slots.pop()
                self.slot_of |= placed
            if not self.waiting or self.waiting[0][0] not in self.slot_of:
                break
            self.owner[row] = self.waiting.popleft()
            rows.append(row)
        return rows, placed

    def record(self, rows, tokens, logprobs, on_tokens=None):
        """Append a token to the rollout of each of these rows; a row whose rollout ends is idle."""
        drawn = []
        for row, token, logprob in zip(rows, tokens, logprobs):
            # The row is idle, or its rollout has ended earlier in the chunk.
            if self.owner[row] is None:
                continue
            prompt, number = self.owner[row]
            rollout = self.rollouts[prompt][number]
            if not math.isfinite(logprob):
                raise ValueError(f"{self.source}: logits are not finite (NaN or infinite) "
                                 f"{len(rollout.tokens)} tokens after prompt {prompt} "
                                 f"({self.prompts[prompt][:8]}...): the weights are damaged or "
                                 "have diverged")
            rollout.tokens.append(token)
            rollout.logprobs.append(logprob)
            rollout.finished = (token in self.stop_ids
                                or bool(self.is_end and self.is_end(rollout.tokens)))
            if on_tokens:
                drawn.append((prompt, number, token))
            if rollout.finished or len(rollout.tokens) == self.max_new_tokens:
                self.owner[row] = None
                self.ended += 1
                # The last rollout of a prompt frees its slot.
                self.left[prompt] -= 1
                if not self.left[prompt]:
                    self.free_slots.append(self.slot_of.pop(prompt))
        if on_tokens:
            on_tokens(drawn, self.ended)

    def slots(self):
        """Slot of every row's prompt, -1 for an idle row."""
        return [-1 if owner is None else self.slot_of[owner[0]] for owner in self.owner]

    def drop_idle_rows(self):
        """-> the rows that stay."""
        kept = [row for row, owner in enumerate(self.owner) if owner is not None]
        self.owner = [self.owner[row] for row in kept]
        return kept


# ---- keys and values ----

class Cache:
    """Keys and values of S prompts, and of B rows that continue them.

    prompt_k, prompt_v: for each layer (S, Hkv, P, K). row_k, row_v: for each layer (B, Hkv, R, K).
    """

    def __init__(self, model, prompts, n, max_new_tokens, max_rows, kv_gb):
        config, device = model.config, model.device
        dtype = kernels.cache_dtype(model.compute_dtype, device)
        Hkv, K = config.n_kv_heads, config.head_dim
        P = slot_size(max(map(len, prompts)), device.type)
        # The last token of a rollout is never fed back, so it needs no place.
        self.R = max(1, max_new_tokens - 1)
        token_bytes = 2 * config.n_layers * Hkv * K * dtype.itemsize
        self.B, self.S = cache_size(len(prompts), n, P, self.R, token_bytes, max_rows,
                                    kv_budget(kv_gb, device, model.packed_bytes()))
        self.prompt_k, self.prompt_v, self.row_k, self.row_v = [], [], [], []
        for _ in range(config.n_layers):
            for caches in (self.prompt_k, self.prompt_v):
                caches.append(torch.zeros(self.S, Hkv, P, K, dtype=dtype, device=device))
            for caches in (self.row_k, self.row_v):
                caches.append(torch.zeros(self.B, Hkv, self.R, K, dtype=dtype, device=device))
        # The last hidden state of each prompt, and the newest token and the random key of each row.
        self.prompt_hidden = torch.zeros(self.S, config.width, dtype=model.compute_dtype,
                                         device=device)
        self.tokens = torch.zeros(self.B, dtype=torch.long, device=device)
        self.keys = torch.zeros(self.B, dtype=torch.long, device=device)
        self.rows = Rows(self.B, self.S, config.n_heads // Hkv, device)

    def prefill(self, model, prompts, slots):
        """Compute packed prompts; keys, values and last hidden states go into these slots."""
        start = 0
        for run in cut(prompts, PREFILL_TOKENS, len):
            chosen = torch.tensor(slots[start:start + len(run)], device=model.device)
            start += len(run)
            tokens, layout = flatten([(prompt, []) for prompt in run], model.device)
            attend = partial(self.attend_prompts, layout, chosen)
            hidden = model.hidden(tokens, layout.positions, attend)                      # (T, D)
            self.prompt_hidden[chosen] = hidden[layout.last_rows]
            self.rows.prompt_lens[chosen] = layout.prompt_lens

    def attend_prompts(self, layout, slots, layer, q, k, v):
        """Packed attention over prompts that also stores their keys and values."""
        P = layout.prompts.shape[1]
        for x, caches in ((k, self.prompt_k), (v, self.prompt_v)):
            cache = caches[layer]
            cache[slots, :, :P] = x[layout.prompts].transpose(1, 2).to(cache.dtype)
        return attention(q, k, v, layout)

    def start(self, rows, keys, slots):
        """These rows begin new rollouts -> the last hidden states of their prompts, (rows, D)."""
        self.keys[rows] = keys.to(self.keys)
        self.rows.lengths[rows] = 0
        self.rows.place(slots)
        return self.prompt_hidden[self.rows.slot[rows]]

    def attend(self, layer, q, k, v):
        """Store k and v (B, Hkv, K) of a new token for each row; q (B, H, K) -> (B, H, K)."""
        return decode(q, k, v, self.prompt_k[layer], self.prompt_v[layer], self.row_k[layer],
                      self.row_v[layer], self.rows)

    def keep(self, rows):
        """Keep only these rows (a list); `rows.place` has to follow."""
        self.B, rows = len(rows), torch.tensor(rows, device=self.tokens.device)
        for caches in (self.row_k, self.row_v):
            for layer, cache in enumerate(caches):
                caches[layer] = cache[rows]
        self.tokens, self.keys = self.tokens[rows], self.keys[rows]
        self.rows = self.rows.keep(rows)


# ---- limits ----

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
            raise ValueError(f"prompt {i} has token ids from {min(prompt)} to {max(prompt)}, the "
                             f"vocabulary has {vocab}; do tokenizer and checkpoint belong "
                             "together?")
        if len(prompt) + max_new_tokens > positions:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; with {max_new_tokens} new ones "
                             f"that is more than the model's {positions} positions")


def slot_size(longest_prompt, device_type):
    return math.ceil(longest_prompt / SLOT_STEP[device_type]) * SLOT_STEP[device_type]


def cache_size(N, n, P, R, token_bytes, max_rows, budget):
    """-> B and S: as many rows of R tokens, and slots of P tokens, as fit into `budget` bytes."""
    for B in range(min(max_rows, N * n), 0, -1):
        # B / n slots would do if rollouts were equally long. But a slot is held until the slowest
        # of n ends, after about 1 + log n mean lengths; B / n more allow to compute prompts ahead.
        S = min(N, B, math.ceil(B / n * (2 + math.log(n))))
        if (S * P + B * R) * token_bytes <= budget:
            return B, S
    raise ValueError(f"the KV cache of a single rollout takes {(P + R) * token_bytes / 1e9:.3g} GB "
                     f"(a prompt of {P} and {R} new tokens, {token_bytes:,} bytes each); "
                     f"there is room for {budget / 1e9:.3g} GB")


def kv_budget(kv_gb, device, packed=0):
    """Bytes for the KV cache: as asked, or a share of the memory that is free.

    packed: bytes that packed weights will take.
    """
    if kv_gb is not None:
        return kv_gb * 1e9
    if device.type == "cuda":
        # What the last update has freed is free too, although torch's allocator still holds it.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return KV_SHARE * (torch.cuda.mem_get_info(device)[0] + kept)
    # Ranks of one machine share its memory.
    free, total = (size / parallel.LOCAL_WORLD for size in memory.available())
    return min(KV_SHARE * max(0, free - packed), CPU_SHARE * total)


# ---- random numbers ----

def random_keys(prompts, n, seed):
    """Indices of N prompts -> (N, n) int64: the random stream of each rollout."""
    # One hash for each prompt, and from it one for each of its rollouts.
    prompts = mix(torch.tensor(prompts), *(seed if isinstance(seed, tuple) else (seed,)))
    return mix(torch.arange(n) + prompts[:, None])


def mix(key, *more):
    """SplitMix64 hash of an int64 tensor (and ints): random bits without a state to save."""
    for extra in (0, *more):
        key = key * 31 + extra - 7046029254386353131
        for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
            # The mask clears the copies of the sign that >> shifts into a signed integer.
            key = (key ^ (key >> shift & (1 << 64 - shift) - 1)) * factor
    return key


# ---- command line ----

class Printer:
    """For `on_tokens`: prints a single rollout as it comes, each character once it is whole."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, drawn, ended):
        raw = self.tokenizer.decode_bytes([token for _, _, token in drawn])
        print(self.decoder.decode(raw), end="", flush=True)


def parse_args():
    parser = flags.Parser("Continue a text, or think and predict what follows it.")
    add = parser.add_argument
    add("--model", required=True, help="checkpoint folder with its tokenizer")
    add("--prompt", help="the text; without it --prompt-file is read")
    add("--prompt-file", default="-", help="UTF-8, taken as it stands; - is stdin")
    add("--think", action="store_true", help="ask for a thought and a \\boxed{prediction}")
    add("--template", default="v0", help="how --think asks: a name in data/prompt.py")
    add("--n", type=int, default=1, help="rollouts; a single one is written as it comes")
    flags.add_length_flag(add, MAX_NEW_TOKENS)
    flags.add_sampling_flags(add)
    add("--json", action="store_true", help="one JSON object for each rollout")
    add("--seed", type=int, default=0, help="same seed, same rollouts")
    flags.add_device_flag(add)
    return parser.parse_args()


def read_prompt(args):
    """The text of --prompt, of --prompt-file, or from stdin, as it stands."""
    if args.prompt is not None:
        # Like a file it is UTF-8, also where the locale would have its bytes read as another text.
        with suppress(UnicodeError):
            return os.fsencode(args.prompt).decode("utf-8")
        return args.prompt
    if args.prompt_file == "-" and sys.stdin.isatty():
        print("Type the text to continue, then Ctrl-D on a line of its own:", file=sys.stderr)
    source = 0 if args.prompt_file == "-" else args.prompt_file
    with open(source, encoding="utf-8", newline="") as file:
        return file.read()


if __name__ == "__main__":
    from data.prompt import build_prompt, stop_ids, template_ids
    from data.tokenizer import Tokenizer
    from model import GPT
    from plumbing import flags
    from plumbing.log import RolloutBar
    from plumbing.truncate import truncation
    from reward import extract_prediction

    sys.excepthook = flags.speak_once
    args = parse_args()
    truncate = truncation(args.top_k, args.top_p, args.min_p)
    tokenizer = Tokenizer.load(args.model, for_model=True)
    model = GPT.from_pretrained(args.model, flags.compute_dtype(args), args.device)
    model.join_weights()
    args.max_new_tokens = flags.new_tokens(args.max_new_tokens, MAX_NEW_TOKENS,
                                           model.config.max_positions)
    prompt = tokenizer.encode(read_prompt(args))
    if args.think:
        longest = model.config.max_positions - args.max_new_tokens
        prompt = build_prompt(prompt, *template_ids(tokenizer, args.template), longest)
    else:
        prompt = tokenizer.bos + prompt
    # A single rollout is printed as it comes, several run under a progress bar.
    streamed = args.n == 1 and not args.json
    with RolloutBar(args.n, "rollouts", disable=True if streamed else None) as bar:
        [rollouts] = generate(
            model, [prompt], args.n, args.max_new_tokens, args.temperature, stop_ids(tokenizer),
            args.seed, max_rows=args.max_rows, kv_gb=args.kv_gb,
            on_tokens=Printer(tokenizer) if streamed else bar, truncate=truncate)
    for i, rollout in enumerate(rollouts, start=1):
        raw = tokenizer.decode_bytes(rollout.tokens)
        text, box = raw.decode("utf-8", "replace"), extract_prediction(raw)
        box = None if box is None else box.decode("utf-8", "replace")
        if args.json:
            # The escapes of JSON, and not those of the stream, where it cannot print everything.
            is_utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
            record = dict(text=text, box=box, **vars(rollout))
            print(json.dumps(record, ensure_ascii=not is_utf8))
        else:
            end = "finished" if rollout.finished else "cut off"
            print("" if streamed else text)
            print(f"--- rollout {i} of {args.n}: {len(rollout.tokens)} tokens, {end}, box {box!r}")
