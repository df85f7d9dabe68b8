"""The kernels of logprob.py: against fp64, against each other to the bit, and what they draw."""
import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from conftest import DEVICE
from interpreter import canaries, guarded, shuffled_grid
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import logprob as module
from kernels import tl, triton
from kernels.logprob import logprob, sample

FP32, BF16 = torch.float32, torch.bfloat16
EXACT = 2e-6 if kernels.INTERPRETED else 1e-5  # fp32: a GPU's exp and log are approximate


def random(seed):
    return torch.Generator().manual_seed(seed)


def case(N, D, V, dtype=FP32, scale=1.0):
    """hidden (N, D), weight (V, D), targets (N,) with first and last token; last row ignored."""
    hidden = torch.randn(N, D, generator=random(0)).to(DEVICE, dtype)
    weight = (torch.randn(V, D, generator=random(1)) * scale * D**-0.5).to(DEVICE, dtype)
    targets = torch.randint(V, (N,), generator=random(2))
    targets[0] = V - 1
    if N > 2:
        targets[1], targets[-1] = 0, -1
    return hidden.requires_grad_(), weight.requires_grad_(), targets.to(DEVICE)


def random_bits(N, seed=3):
    return torch.randint(-2**63, 2**63 - 1, (N,), generator=random(seed)).to(DEVICE)


def oracle(hidden, weight, targets, temperature):
    """log-probs and entropies in fp64, with the whole matrix of logits in sight."""
    logp = torch.log_softmax(hidden @ weight.T / temperature, dim=1)
    counts = (targets >= 0).double()
    return (logp.gather(1, targets.clamp(min=0)[:, None])[:, 0] * counts,
            -(logp.exp() * logp).sum(dim=1) * counts)


def loss(logprobs, entropy):
    rows = torch.linspace(-1, 2, len(logprobs), dtype=logprobs.dtype, device=logprobs.device)
    return (rows * logprobs).sum() + (rows.flip(0) * entropy).sum() / 3


def far(ours, theirs):
    """Relative distance in the norm; NaN is far."""
    return ((ours.double() - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("backend, N, D, V, temperature", [
    ("bitwise", 1, 8, 11, 1.0),        # one row, less than a tile in every direction
    ("fast", 65, 72, 2300, 2.0),       # more than BM = 64 rows, D no multiple of BK, 3 splits
    ("bitwise", 129, 64, 333, 0.7),    # more than BM = 128 rows, V no multiple of BN
])
def test_results_and_gradients_are_those_of_fp64(
        use_kernels, monkeypatch, dtype, backend, N, D, V, temperature):
    use_kernels(backend)
    monkeypatch.setattr(module, "CHUNK", 700)  # four chunks of 2,300, none a multiple of BN
    hidden, weight, targets = case(N, D, V, dtype, scale=3)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    ours = logprob(hidden, weight, targets, temperature)
    theirs = oracle(*exact, targets, temperature)
    for a, b in zip(ours, theirs):
        limit = 1e-4 if DEVICE == "cuda" and dtype == BF16 else 1e-5
        assert a.dtype == FP32 and (a - b).abs().max() < limit
    d_hidden, d_weight = torch.autograd.grad(loss(*ours), (hidden, weight))
    exact_hidden, exact_weight = torch.autograd.grad(loss(*theirs), exact)
    assert d_hidden.dtype == d_weight.dtype == dtype
    assert far(d_hidden, exact_hidden) < (EXACT if dtype == FP32 else 3e-3)
    assert far(d_weight, exact_weight) < (EXACT if dtype == FP32 else 4e-3)


def test_an_ignored_row_gives_zero_and_no_gradient(use_kernels):
    use_kernels("fast")
    hidden, weight, targets = case(5, 16, 40)
    targets[2] = -1
    counts = targets >= 0
    logprobs, entropy = logprob(hidden, weight, targets)
    assert (logprobs[~counts] == 0).all() and (entropy[~counts] == 0).all()
    assert (logprobs[counts] < 0).all() and (entropy[counts] > 0).all()
    d_hidden, d_weight = torch.autograd.grad(loss(logprobs, entropy), (hidden, weight))
    assert (d_hidden[~counts] == 0).all() and (d_hidden[counts] != 0).any(dim=1).all()
    alone = logprob(hidden[counts], weight, targets[counts])
    rows = torch.linspace(-1, 2, 5, device=DEVICE)
    weighed = (rows[counts] * alone[0]).sum() + (rows.flip(0)[counts] * alone[1]).sum() / 3
    torch.testing.assert_close(torch.autograd.grad(weighed, weight)[0], d_weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1])
def test_log_prob_alone_and_entropy_alone_have_their_own_gradients(use_kernels, which):
    use_kernels("bitwise")
    hidden, weight, targets = case(4, 16, 40)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    ours = torch.autograd.grad(logprob(hidden, weight, targets, 0.7)[which].sum(), (hidden, weight))
    theirs = torch.autograd.grad(oracle(*exact, targets, 0.7)[which].sum(), exact)
    assert all(far(a, b) < EXACT for a, b in zip(ours, theirs))


def test_a_frozen_weight_costs_no_product_and_no_gradient(use_kernels, monkeypatch):
    use_kernels("fast")
    hidden, weight, targets = case(4, 16, 40)
    products, real = [], module.product

    def note_shape(a, b):
        products.append(a.shape)
        return real(a, b)

    monkeypatch.setattr(module, "product", note_shape)
    logprob(hidden, weight.detach(), targets)[0].sum().backward()
    assert products == [(4, 40)]
    logprob(hidden.detach(), weight, targets)[0].sum().backward()
    assert products == [(4, 40), (40, 4)]
    total = logprob(hidden, weight, targets)[0].sum()
    d_hidden, d_weight = torch.autograd.grad(total, (hidden, weight))
    assert torch.equal(hidden.grad, d_hidden) and torch.equal(weight.grad, d_weight)


def test_the_gradient_of_an_fp32_master_is_never_rounded_to_bf16(use_kernels):
    use_kernels("bitwise")
    hidden, weight, targets = case(6, 24, 300, BF16)
    master = weight.detach().float().requires_grad_()
    ours = logprob(hidden, master, targets)
    assert all(torch.equal(a, b) for a, b in zip(ours, logprob(hidden, weight, targets)))
    loss(*ours).backward()
    loss(*logprob(hidden.detach(), weight, targets)).backward()
    assert master.grad.dtype == FP32
    assert not torch.equal(master.grad, master.grad.bfloat16().float())
    assert torch.equal(master.grad.bfloat16(), weight.grad)


def test_no_rows_give_no_results_and_zero_gradients(use_kernels):
    use_kernels("bitwise")
    hidden, weight, targets = case(3, 8, 11)
    logprobs, entropy = logprob(hidden[:0], weight, targets[:0])
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert sample(hidden[:0], weight, random_bits(0), 1.0)[0].shape == (0,)


@pytest.mark.parametrize("size", [120.0, 1e4])
def test_large_logits_overflow_nothing_and_cancel_nothing(use_kernels, size):
    use_kernels("fast")
    weight = torch.tensor([[size], [-size], [0.0], [size - 1]], device=DEVICE, requires_grad=True)
    hidden = torch.tensor([[1.0], [-1.0], [1.0]], device=DEVICE, requires_grad=True)
    targets = torch.tensor([0, 0, 2], device=DEVICE)
    logprobs, entropy = logprob(hidden, weight, targets)
    top, p = math.log(1 + math.exp(-1)), 1 / (1 + math.e)
    assert logprobs.tolist() == pytest.approx([-top, -2 * size, -size - top], rel=1e-6, abs=1e-6)
    assert entropy.tolist() == pytest.approx([top + p, 0, top + p], rel=1e-5)
    gradients = torch.autograd.grad(loss(logprobs, entropy), (hidden, weight))
    assert all(g.isfinite().all() for g in gradients)


def everything(hidden, weight, targets, bits):
    """Every kernel once -> log-probs, entropy, gradients, tokens and their log-probs."""
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    ours = logprob(hidden, weight, targets, 0.7)
    gradients = torch.autograd.grad(loss(*ours), (hidden, weight))
    return *ours, *gradients, *sample(hidden, weight, bits, 0.7)


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_kernels_read_and_write_inside_their_tensors(use_kernels, monkeypatch, dtype):
    use_kernels("bitwise")
    monkeypatch.setattr(module, "CHUNK", 700)
    hidden, weight, targets = case(67, 40, 1500, dtype)
    bits = random_bits(67)
    expected = everything(hidden, weight, targets, bits)
    with canaries(monkeypatch):
        ours = everything(guarded(hidden), guarded(weight), targets, bits)
    assert same_bits(ours, expected) and all(x.isfinite().all() for x in ours)


def test_two_runs_give_the_same_bits(use_kernels, monkeypatch):
    use_kernels("fast")
    monkeypatch.setattr(module, "CHUNK", 700)
    inputs = *case(129, 40, 1500, BF16), random_bits(129)
    assert same_bits(everything(*inputs), everything(*inputs))


@pytest.mark.skipif(not kernels.INTERPRETED, reason="a GPU orders its programs itself")
def test_the_order_of_the_programs_changes_no_bit(use_kernels, monkeypatch):
    use_kernels("fast")
    monkeypatch.setattr(module, "CHUNK", 700)
    inputs = *case(129, 40, 1500), random_bits(129)
    expected = everything(*inputs)
    with shuffled_grid(7):
        assert same_bits(everything(*inputs), expected)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_rows_beside_a_row_change_no_bit(use_kernels, dtype):
    use_kernels("bitwise")
    hidden, weight, targets = case(140, 72, 1500, dtype, scale=3)  # BM = 128; alone BM = 64
    bits = random_bits(140)
    together = *logprob(hidden, weight, targets, 0.7), *sample(hidden, weight, bits, 0.7)
    for rows in ([0], [137], [70, 3, 139]):
        h = hidden[rows]
        alone = *logprob(h, weight, targets[rows], 0.7), *sample(h, weight, bits[rows], 0.7)
        assert same_bits(alone, [x[rows] for x in together])


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_log_prob_of_a_drawn_token_is_the_trainers_to_the_bit(use_kernels, dtype, temperature):
    use_kernels("bitwise")
    # As many splits as a large vocabulary has, where there is a GPU to sum them in its own order.
    hidden, weight, _ = case(80, 72, 151_936 if DEVICE == "cuda" else 2300, dtype, scale=3)
    tokens, logprobs = sample(hidden, weight, random_bits(80), temperature)
    # Every row twice, among other rows.
    order = torch.randperm(160, generator=random(4)).to(DEVICE) % 80
    again, _ = logprob(hidden[order], weight, tokens[order], temperature or 1.0)
    assert torch.equal(again, logprobs[order])


def noise(bits, numbers):
    """Gumbel noise in fp64 from outputs of SplitMix64: bits (N,), numbers (n,) or (N, n) -> (N, n)."""
    numbers = np.asarray(numbers).astype(np.uint64) + np.uint64(1)
    z = bits.cpu().numpy().view(np.uint64)[:, None] + numbers * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    v = ((z ^ z >> np.uint64(31)) >> np.uint64(32)).astype(np.float64)
    return -np.log(-np.log1p(-(v + 0.5) / 2**32))


def draw_in_two(logits, bits):
    """What `sample` promises to draw: a tile of 128 tokens, then a token of it. (N or 1, V) -> (N,)"""
    V = logits.shape[1]
    tiles = [torch.from_numpy(logits[:, i:i + 128]).logsumexp(1) for i in range(0, V, 128)]
    scores = torch.stack(tiles, dim=1).numpy() + noise(bits, V + np.arange(len(tiles)))
    columns = scores.argmax(axis=1)[:, None] * 128 + np.arange(128)
    inside = np.minimum(columns, V - 1)
    x = np.take_along_axis(np.broadcast_to(logits, (len(bits), V)), inside, axis=1)
    scores = np.where(columns < V, x + noise(bits, columns), -np.inf)
    return np.take_along_axis(columns, scores.argmax(axis=1)[:, None], axis=1)[:, 0]


def test_a_token_is_drawn_from_a_drawn_tile_by_hashed_gumbel_noise(use_kernels):
    use_kernels("bitwise")
    hidden, weight, _ = case(200, 16, 2300, scale=3)
    bits = random_bits(200)
    tokens, logprobs = sample(hidden, weight, bits, 0.7)
    logits = (hidden.double() @ weight.double().T / 0.7).detach()
    assert tokens.tolist() == draw_in_two(logits.cpu().numpy(), bits).tolist()
    expected = logits.log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]
    assert (logprobs - expected).abs().max() < 1e-5


@triton.jit
def store_noise(BITS, OUT, start, BN: tl.constexpr):
    rows = tl.arange(0, 64)
    numbers = start + tl.arange(0, BN)
    noise = module_gumbel(tl.load(BITS + rows)[:, None], numbers[None, :])
    tl.store(OUT + rows[:, None] * BN + tl.arange(0, BN)[None, :], noise)


module_gumbel = module.gumbel


def unmix(z):
    """The state that SplitMix64 turns into z."""
    mask = 2**64 - 1
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        whole = z
        for _ in range(64 // shift + 1):
            z = whole ^ z >> shift
        z = z * pow(factor, -1, 2**64) & mask
    return z


def test_the_largest_noise_is_neither_capped_at_16_nor_on_a_coarse_grid():
    wanted = [0, 1, 2, 3, 10, 100, 1000, 54321, 2**24 - 1, 2**24, 2**24 + 3, 2**31, 2**32 - 1]
    wanted += [n * 2**32 // 51 for n in range(51)]
    start = 256
    states = [(unmix(n << 32) - (start + 1) * 0x9E3779B97F4A7C15) % 2**64 for n in wanted]
    bits = torch.from_numpy(np.array(states, dtype=np.uint64).view(np.int64)).to(DEVICE)
    noise = torch.empty(64, 16, device=DEVICE)
    store_noise[1,](bits, noise, start, BN=16)
    exact = [-math.log(-math.log1p(-(n + 0.5) / 2**32)) for n in wanted]  # -log(0.5 / 2**32) = 22.9
    exact[12] = -math.log(-math.log(2**-24))                             # 1 - v ends there
    limit = 2e-5 if kernels.INTERPRETED else 1e-4
    assert noise[:, 0].tolist() == pytest.approx(exact, rel=0, abs=limit)
    assert noise.isfinite().all()


def chi_square(tokens, p):
    expected = p * len(tokens)
    return ((torch.bincount(tokens, minlength=len(p)) - expected) ** 2 / expected).sum().item()


def test_plain_torch_draws_tokens_as_often_as_softmax_says(use_kernels):
    use_kernels("torch")
    hidden, weight, _ = case(1, 8, 24)
    tokens, logprobs = sample(hidden.detach().expand(20_000, 8), weight, random_bits(20_000), 0.8)
    p = (weight.double() @ hidden[0].double() / 0.8).softmax(dim=0).detach()
    assert p.min() * 20_000 > 5, "too few for a chi-square"
    # 23 degrees of freedom: 1 in 2,000 sound samplers is above 52.
    assert chi_square(tokens, p) < 52
    assert (logprobs - p.log()[tokens]).abs().max() < 1e-5


@pytest.mark.slow
def test_a_million_tokens_drawn_in_two_levels_are_distributed_like_softmax(use_kernels):
    """The definition, which the kernels follow token by token; on a GPU also the kernels."""
    use_kernels("fast")
    hidden = torch.ones(1, 16, device=DEVICE)
    # From 3 % to 5e-6 in three tiles, the last of them short; a token of a tail is drawn 5 times.
    weight = torch.linspace(-2.0, -10.6, 300)[torch.randperm(300, generator=random(5))]
    weight = (weight[:, None] / 16).expand(-1, 16).contiguous().to(DEVICE)
    logits = (hidden.double() @ weight.double().T).cpu().numpy()
    p = torch.from_numpy(logits[0]).softmax(dim=0)
    assert p.max() > 0.02 and 4e-6 < p.min() < 6e-6
    drawn = []
    for first in range(0, 1_000_000, 50_000):
        bits = torch.arange(first, first + 50_000)  # poor seeds: the hash has to make them good
        drawn.append(torch.from_numpy(draw_in_two(logits, bits)))
        if not kernels.INTERPRETED:
            tokens, _ = sample(hidden.expand(50_000, 16), weight, bits.to(DEVICE), 1.0)
            assert (tokens.cpu() == drawn[-1]).double().mean() > 0.999
    tokens = torch.cat(drawn)
    # 299 degrees of freedom: 1 in 2,000 sound samplers is above 384 or below 225.
    assert 225 < chi_square(tokens, p) < 384
    # The tail alone: the 100 rarest tokens, together and one by one.
    rare = p.argsort()[:100]
    counts, expected = torch.bincount(tokens, minlength=300)[rare], p[rare] * 1e6
    assert abs(counts.sum() - expected.sum()) < 3.5 * expected.sum() ** 0.5
    assert 58 < ((counts - expected) ** 2 / expected).sum() < 160
    # Neighbouring seeds draw independent tiles: 9 pairs, 8 degrees of freedom.
    tiles = torch.stack([p[i:i + 128].sum() for i in (0, 128, 256)])
    pairs = tokens[:-1] // 128 * 3 + tokens[1:] // 128
    assert chi_square(pairs, (tiles[:, None] * tiles).flatten()) < 28


@pytest.mark.slow
def test_equal_logits_are_drawn_alike_from_every_split_and_tile(use_kernels):
    use_kernels("bitwise")
    weight = torch.zeros(2304, 8, device=DEVICE)  # uniform: 4/9, 4/9 and 1/9 of the draws
    bits = torch.arange(900, device=DEVICE)
    tokens, logprobs = sample(torch.ones(900, 8, device=DEVICE), weight, bits, 1.0)
    assert chi_square(tokens // 1024, torch.tensor([4 / 9, 4 / 9, 1 / 9], device=DEVICE)) < 15
    assert chi_square(tokens % 128 // 16, torch.full((8,), 1 / 8, device=DEVICE)) < 26
    assert (logprobs + math.log(2304)).abs().max() < 1e-5


def test_greedy_takes_the_most_probable_and_the_first_of_equals(use_kernels):
    use_kernels("fast")
    hidden, weight, _ = case(7, 16, 2300)
    expected = (hidden.double() @ weight.double().T).argmax(dim=1)
    assert torch.equal(sample(hidden, weight, random_bits(7), 0)[0], expected)
    weight = torch.zeros(2300, 16, device=DEVICE)
    weight[[1200, 1300, 2200]] = 1.0  # equals in one tile, in one split and in two
    tokens, _ = sample(torch.ones(2, 16, device=DEVICE), weight, random_bits(2), 0)
    assert tokens.tolist() == [1200, 1200]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on NaN
@pytest.mark.parametrize("backend", ["torch", "bitwise"])
@pytest.mark.parametrize("temperature", [0.7, 0])
def test_a_damaged_row_shows_in_its_own_log_prob_only(use_kernels, backend, temperature):
    use_kernels(backend)
    hidden, weight, targets = case(6, 16, 1500)
    damaged = hidden.detach().clone()
    damaged[2, 5], damaged[4, 0] = torch.nan, torch.inf
    others, bits = [0, 1, 3, 5], random_bits(6)
    tokens, logprobs = sample(damaged, weight, bits, temperature)
    is_damaged = [False, False, True, False, True, False]
    assert logprobs.isnan().tolist() == is_damaged
    assert (0 <= tokens).all() and (tokens < 1500).all()
    sound = sample(hidden, weight, bits, temperature)
    assert torch.equal(tokens[others], sound[0][others])
    assert torch.equal(logprobs[others], sound[1][others])
    assert logprob(damaged, weight, targets)[0].isnan().tolist() == is_damaged


class LiveBytes(TorchDispatchMode):
    """After every operation: the storages alive, {key: bytes}."""

    def __init__(self):
        super().__init__()
        self.storages, self.history = {}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {key: (ref, size) for key, (ref, size) in self.storages.items()
                         if not ref.expired()}
        self.history.append({key: size for key, (_, size) in self.storages.items()})
        return out

    def peak(self, *without):
        keys = {x.untyped_storage()._cdata for x in without}
        return max(sum(size for key, size in now.items() if key not in keys)
                   for now in self.history)


def empty_product(a, b):
    return torch.empty(a.shape[0], b.shape[1], dtype=FP32, device=a.device)


@pytest.mark.parametrize("weight_dtype", [BF16, FP32])
def test_10_GB_of_logits_need_less_than_1_GB(use_kernels, monkeypatch, weight_dtype):
    use_kernels("bitwise")
    launches = []

    class Launch:  # tensors on "meta" have shapes and no data: nothing can run
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append(grid)

    for name in ("logprob_scan_kernel", "logprob_combine_kernel", "dlogits_kernel"):
        monkeypatch.setattr(module, name, Launch())
    monkeypatch.setattr(kernels, "COMPILE_ONLY", True)
    # On a GPU the library adds up in fp32 without copies of its operands.
    monkeypatch.setattr(module, "product", empty_product)
    hidden = torch.empty(16384, 1536, dtype=BF16, device="meta", requires_grad=True)
    weight = torch.empty(151936, 1536, dtype=weight_dtype, device="meta", requires_grad=True)
    targets = torch.empty(16384, dtype=torch.int64, device="meta")
    with LiveBytes() as live:
        gradients = torch.autograd.grad(loss(*logprob(hidden, weight, targets)), (hidden, weight))
    assert len(launches) == 2 + 19  # 19 chunks of 8,192
    assert gradients[1].dtype == weight_dtype
    workspace = live.peak(hidden, weight, targets, *gradients)
    print(f"workspace with {weight_dtype} weights: {workspace:,} bytes")
    assert 268_000_000 < workspace < 1_000_000_000


@pytest.mark.parametrize("V", [1, 5, 130, 1026])
def test_a_last_tile_with_few_tokens_gives_none_of_them_more_than_its_share(use_kernels, V):
    use_kernels("bitwise")
    hidden, weight, _ = case(60, 16, V)
    weight = weight.detach()
    weight[-5:] *= 3                                       # the short tile is drawn often
    bits = random_bits(60)
    logits = (hidden.double() @ weight.double().T / 0.7).detach().cpu().numpy()
    assert sample(hidden, weight, bits, 0.7)[0].tolist() == draw_in_two(logits, bits).tolist()


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_splits_that_do_not_exist_are_not_drawn(use_kernels, shift):
    use_kernels("bitwise")
    # A last channel shifts all logits; 3 splits are padded to 4.
    hidden, weight = (torch.randn(n, 17, generator=random(n)).to(DEVICE) for n in (9, 2300))
    hidden[:, 16], weight[:, 16], bits = 1, shift, random_bits(9)
    tokens, logprobs = sample(hidden, weight, bits, 1.0)
    logits = (hidden.double() @ weight.double().T).cpu()
    expected = logits.log_softmax(dim=1).gather(1, tokens.cpu()[:, None])[:, 0]
    assert (logprobs.cpu() - expected).abs().max() < 1e-3 and logprobs.max() < 0
    # Logits of 1000 are rounded to 6e-5, which may change a draw.
    same = tokens.cpu() == torch.from_numpy(draw_in_two(logits.numpy(), bits))
    assert same.double().mean() > 0.8
    greedy, _ = sample(hidden, weight, bits, 0)
    assert (logits.gather(1, greedy.cpu()[:, None])[:, 0] > logits.amax(dim=1) - 1e-3).all()


def test_drawing_a_token_needs_four_numbers_for_each_split_of_the_vocabulary(monkeypatch):
    for name in ("sample_scan_kernel", "sample_token_kernel"):
        monkeypatch.setattr(module, name, {(256,): no_launch, (2, 149): no_launch})
    hidden, weight = (torch.empty(n, 1536, dtype=BF16, device="meta") for n in (256, 151_936))
    bits = torch.empty(256, dtype=torch.int64, device="meta")
    with LiveBytes() as live:
        kept = module.launch_sample("fast", hidden, weight, bits, 0.8)
    assert live.peak(*kept) == 256 * 4 * 4 * 149           # as bench/memory.py counts


def no_launch(*args, **kwargs):
    pass
