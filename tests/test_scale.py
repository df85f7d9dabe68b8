"""Several ranks, and files and memory at size: the same update, readable checkpoints, no rank left behind."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from data.tokenizer import Tokenizer
from plumbing import hf, parallel
from kernels.attention import make_layout
from model import GPT
from plumbing.optimizer import make_optimizer, round_at_random
from test_runs import command, lines, read_moments
from tiny import ENVIRONMENT, ROOT, base, corpus, run_here, tiny_model

# Dynamic sampling from the second step on, a batch of five and small micro-batches: ranks never have equal work.
FLAGS = dict(steps=5, save_every=3, lr="1e-4", dynamic_sampling_from=1)


def launch(ranks, line):
    """A script under torchrun, started -> the process."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.Popen([*torchrun, *line], cwd=ROOT, env=ENVIRONMENT, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_save(process, run):
    while not (run / "latest").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)


def run_on(ranks, line):
    """-> exit code, stdout, stderr."""
    if ranks == 1:
        return run_here(*line)
    process = launch(ranks, line)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def children(pid):
    """Processes that this one has started, and theirs."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in found] + [p for child in found for p in children(child)]


def assert_same(one, other, base, rtol=1e-5):
    """Weights, moments and numbers of two runs are equal to 1e-6; tokens and words exactly."""
    a, b = (load_file(run / "step_000005" / "model.safetensors") for run in (one, other))
    start = load_file(f"{base}/model.safetensors")
    assert max((a[name] - start[name]).abs().max() for name in a) > 1e-4
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-6
    a, b = (read_moments(run / "step_000005") for run in (one, other))
    assert a.keys() == b.keys() and all((a[name] - b[name]).abs().max() < 1e-6 for name in a)
    for left, right in zip(lines(one), lines(other), strict=True):
        assert left.keys() == right.keys() and left.get("tokens") == right.get("tokens")
        close = {k: left[k] == right[k] or left[k] == pytest.approx(right[k], rel=rtol, abs=1e-6) for k in left}
        assert all(close.values()), (close, left, right)
    if (one / "samples.jsonl").exists():
        for left, right in zip(lines(one, "samples.jsonl"), lines(other, "samples.jsonl"), strict=True):
            # A reward may be a log-prob, which differs by rounding.
            assert left.pop("reward") == pytest.approx(right.pop("reward"), rel=rtol, abs=1e-5)
            assert left == right


@pytest.fixture(scope="module", params=[
    "train_rpt.py", pytest.param("train_ntp.py", marks=pytest.mark.slow)])
def runs(request, corpus, base, tmp_path_factory):
    """The same five steps on one and on two ranks."""
    folder, flags = tmp_path_factory.mktemp("ranks"), dict(FLAGS)
    if request.param == "train_ntp.py":
        flags.pop("dynamic_sampling_from")
    line = lambda name, **more: command(request.param, corpus, base, folder / name, **flags | more)
    for ranks in (1, 2):
        code, _, err = run_on(ranks, line(str(ranks)))
        assert code == 0, err
    return request.param, folder, line


@pytest.fixture(scope="module")
def stopped(runs):
    """The same on two ranks, stopped after three steps."""
    script, folder, line = runs
    if script == "train_rpt.py":  # in train_ntp.py the learning rate follows from --steps
        code, _, err = run_on(2, line("2 of 5", steps=3))
        assert code == 0, err
    return runs


def test_two_ranks_take_the_same_steps_as_one(runs, base):
    _, folder, _ = runs
    assert_same(folder / "1", folder / "2", base)


@pytest.mark.slow
def test_four_ranks_with_copies_resharding_and_checkpointed_activations_too(runs, base):
    script, folder, line = runs
    code, _, err = run_on(4, line("4", ranks_per_copy=2, reshard=True, checkpoint_activations=True))
    assert code == 0, err
    assert_same(folder / "1", folder / "4", base)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_steps_in_which_no_group_has_a_signal_leave_the_weights_alone(corpus, base, tmp_path, ranks):
    """A model that knows nothing boxes nothing; the ranks must still wait for each other equally often."""
    shutil.copytree(base, tmp_path / "blank")
    tiny_model(Tokenizer.load(base).vocab_size).save_pretrained(tmp_path / "blank")
    line = command("train_rpt.py", corpus, tmp_path / "blank", tmp_path / "run", steps=3, lr="0.1")
    code, _, err = run_on(ranks, line)
    assert code == 0, err
    for record in lines(tmp_path / "run"):
        assert (record["frac_zero_std"], record["grad_norm"], record["logp_gap"]) == (1, 0, None)
    before, after = (load_file(folder / "model.safetensors")
                     for folder in (tmp_path / "blank", tmp_path / "run" / "step_000003"))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_checkpoint_of_two_ranks_resumes_on_another_number(stopped, base, tmp_path, ranks):
    script, folder, line = stopped
    if script == "train_ntp.py":
        return  # checkpoint.py, the same for both
    shutil.copytree(folder / "2 of 5", folder / f"resumed {ranks}")
    code, out, err = run_on(ranks, line(f"resumed {ranks}", resume=True))
    assert code == 0 and "resuming from" in out, err
    assert_same(folder / "1", folder / f"resumed {ranks}", base)


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_in_seconds_and_leaves_nobody(corpus, base, tmp_path):
    line = command("train_rpt.py", corpus, base, tmp_path / "run", steps=10**6, save_every=2)
    process = launch(2, line)
    wait_for_save(process, tmp_path / "run")
    family = children(process.pid)
    rank_1 = [pid for pid in family if b"RANK=1\0" in open(f"/proc/{pid}/environ", "rb").read()]
    os.kill(rank_1[0], signal.SIGKILL)
    start = time.time()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "Signal 9 (SIGKILL)" in err and time.time() - start < 20
    assert not any(os.path.exists(f"/proc/{pid}") for pid in family)
    latest = (tmp_path / "run" / "latest").read_text()
    assert GPT.from_pretrained(tmp_path / "run" / latest)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM to torchrun", "Ctrl-C in the terminal"])
def test_a_signal_ends_the_step_on_all_ranks_and_saves_it(corpus, base, tmp_path, how):
    """Ctrl-C reaches torchrun and its ranks, and torchrun then sends them SIGTERM."""
    run = tmp_path / "run"
    process = launch(2, command("train_rpt.py", corpus, base, run, steps=10**6, save_every=2))
    wait_for_save(process, run)
    family = children(process.pid)
    process.terminate() if how == "SIGTERM to torchrun" else os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    last = len(lines(run))
    assert err.count("stopping after this step") == 1
    assert f"stopped after step {last} and saved" in out and (run / "latest").read_text() == f"step_{last:06d}"
    assert not list(run.glob("*.partial")) and not any(os.path.exists(f"/proc/{pid}") for pid in family)
    assert "[rank" not in err and "train_rpt.py: " not in err  # torchrun says what it got; no rank complains


@pytest.mark.slow
def test_an_error_of_all_ranks_is_said_once(corpus, base, tmp_path):
    line = command("train_rpt.py", corpus, base, tmp_path / "run", tokens_per_micro_batch=30)
    code, out, err = run_on(2, line)
    assert code != 0 and err.count("train_rpt.py: a prompt of") == 1
    assert "rollout of 12 tokens do not fit in --tokens-per-micro-batch 30" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_folder_that_cannot_be_written_is_one_line_and_no_hang(corpus, base, tmp_path, ranks):
    (tmp_path / "file").write_text("")
    line = command("train_rpt.py", corpus, base, tmp_path / "file" / "run")
    code, _, err = run_on(ranks, line)
    assert code != 0 and err.count("train_rpt.py: ") == 1 and "Not a directory" in err


def test_a_rank_that_cannot_write_still_takes_part_in_what_the_others_wait_for(tmp_path):
    gpt = tiny_model(500)
    (tmp_path / "file").touch()
    with patch.object(parallel, "whole", wraps=parallel.whole) as whole, pytest.raises(NotADirectoryError):
        gpt.save_pretrained(tmp_path / "file" / "checkpoint")
    assert whole.call_count == len(list(gpt.parameters()))


# ---- the start of a rank -----------------------------------------------------------------------------------

def start_on_a_gpu(monkeypatch):
    """As if there were one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(parallel, "device_of_rank", "cpu")
    assert parallel.start("cuda") == "cuda:0"


def test_no_product_is_summed_in_bf16(monkeypatch):
    products = torch.backends.cuda.matmul
    products.allow_bf16_reduced_precision_reduction = True   # torch's default
    start_on_a_gpu(monkeypatch)
    assert not products.allow_bf16_reduced_precision_reduction


@pytest.mark.parametrize("asked, cores, threads", [(None, 16, 4), (None, 2, 2), ("9", 9, 9)])
def test_a_gpu_needs_four_threads_unless_the_user_asks_for_more(monkeypatch, asked, cores, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    used = [cores]
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    start_on_a_gpu(monkeypatch)
    assert used[-1] == threads


# ---- loading and saving ------------------------------------------------------------------------------------

def test_weights_in_several_files_load_here_and_in_transformers(tmp_path):
    gpt = tiny_model(500)
    with patch.object(hf, "FILE_BYTES", 20_000):
        gpt.save_pretrained(tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in gpt.parameters())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "pt") as tensors:
            assert name in tensors.keys()
    sizes = sorted((tmp_path / file).stat().st_size for file in files)
    assert sizes[-2] < 21_000 and sizes[-1] > 4 * 500 * 32  # the embedding alone is larger than a file may be
    tokens = torch.randint(500, (2, 9))
    ours, theirs = GPT.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(ours(tokens), gpt(tokens))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", range(1, 10))
@pytest.mark.parametrize("parts", range(1, 5))
def test_rows_are_cut_as_fsdp_cuts_them(monkeypatch, rows, parts):
    weight, chunks = torch.arange(rows), torch.arange(rows).chunk(parts)
    for index in range(parts):
        monkeypatch.setattr(parallel, "part", lambda parameter: (index, parts))
        expected = chunks[index] if index < len(chunks) else weight[:0]
        assert torch.equal(weight[parallel.local_slice(weight)], expected)


def test_a_rank_reads_no_more_than_its_rows(tmp_path):
    """Two ranks, one after the other, without a process group: DTensors stand in with what model.py asks of them."""
    gpt, read = tiny_model(501), []
    gpt.save_pretrained(tmp_path)
    for rank in range(2):
        rows = lambda weight: slice(min(weight.shape[0], rank * -(-weight.shape[0] // 2)),
                                    min(weight.shape[0], (rank + 1) * -(-weight.shape[0] // 2)))
        with patch.object(parallel, "local_slice", rows), \
                patch.object(parallel, "local", lambda weight: weight[rows(weight)]):
            part = GPT.from_pretrained(tmp_path)
        for (name, weight), whole in zip(part.named_parameters(), gpt.parameters()):
            assert torch.equal(weight[rows(weight)], whole[rows(whole)]), name
        read.append(sum(weight[rows(weight)].numel() for weight in part.parameters()))
    assert sum(read) == sum(weight.numel() for weight in gpt.parameters()) and abs(read[0] - read[1]) < 50


@pytest.mark.parametrize("damage", ["delete", "cut"])
def test_a_damaged_optimizer_is_one_line_on_resume(corpus, base, tmp_path, damage):
    line = command("train_rpt.py", corpus, base, tmp_path / "run")
    assert run_here(*line, "--steps", "3")[0] == 0
    shard, = (tmp_path / "run" / "step_000003" / "optimizer").glob("*.safetensors")
    if damage == "delete":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:1000])
    code, _, err = run_here(*line, "--resume")
    assert code == 2 and err.count("\n") == 1 and str(shard) in err and "--init" in err
    assert ("damaged or incomplete" in err) == (damage == "cut")


MOMENTS = """
import sys, torch
from plumbing import moments, parallel
from plumbing.optimizer import make_optimizer
from tiny import tiny_model
parallel.start("cpu")
new, per_copy, *olds = sys.argv[1:]
for bf16 in (False, True):
    model = tiny_model(65)
    parallel.shard(model, ranks_per_copy=int(per_copy))
    optimizer = make_optimizer(model, 1e-2, (0.9, 0.999), bf16_moments=bf16)
    named = moments.moments(model, optimizer)
    def values(number, tensor):  # of the whole tensor, the same on every number of ranks
        return torch.arange(tensor.numel()).view(tensor.shape).mul(0.01).add(number).to(tensor.dtype)[
            parallel.local_slice(tensor)]
    for old in olds:
        for tensor in named.values():
            parallel.local(tensor).zero_()
        moments.load_moments(f"{old}-{bf16}", model, optimizer)
        for number, tensor in enumerate(named.values()):
            assert torch.equal(parallel.local(tensor), values(number, tensor)), (old, number)
    for number, tensor in enumerate(named.values()):
        parallel.local(tensor).copy_(values(number, tensor))
    parallel.together(moments.save_moments, f"{new}-{bf16}", model, optimizer)
parallel.print0("read", len(olds))
"""


@pytest.mark.slow
def test_moments_move_between_1_2_and_4_ranks_and_copies(tmp_path):
    """On real process groups: 65 rows on 2 and 4 ranks, fp32 and bf16, counts of steps."""
    (tmp_path / "moments.py").write_text(MOMENTS)
    olds = []
    with patch.dict(ENVIRONMENT, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"):
        for turn, (ranks, per_copy) in enumerate([(4, 2), (1, 0), (2, 0), (4, 0), (1, 0)]):
            new = f"{tmp_path}/{turn}"
            process = launch(ranks, [str(tmp_path / "moments.py"), new, str(per_copy), *olds])
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0 and f"read {len(olds)}" in out, err
            olds.append(new)


COPIES = """
import hashlib, torch
from plumbing import parallel
from kernels.attention import make_layout
from plumbing.optimizer import make_optimizer
from tiny import tiny_model
parallel.start("cpu")
model = tiny_model(64)
parallel.shard(model, ranks_per_copy=2)
optimizer = make_optimizer(model, 1e-2, (0.9, 0.999), 0.01, bf16_moments=True)
for step in range(3):
    optimizer.zero_grad()
    logprobs = model.logprobs(torch.arange(9), make_layout([(4, [5])]))
    logprobs.sum().backward()
    optimizer.step()
digest = hashlib.sha256()
for weight in model.parameters():
    digest.update(parallel.local(weight).detach().numpy().tobytes())
    digest.update(parallel.local(optimizer.state[weight]["exp_avg"]).float().numpy().tobytes())
parallel.print0(*parallel.gather_lists([digest.hexdigest()]))
"""


@pytest.mark.slow
def test_copies_of_the_weights_stay_the_same_with_randomly_rounded_moments(tmp_path):
    """Ranks 0 and 2 hold the same rows, and 1 and 3: nothing would ever bring them together again."""
    (tmp_path / "copies.py").write_text(COPIES)
    with patch.dict(ENVIRONMENT, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"):
        code, out, err = run_on(4, [str(tmp_path / "copies.py")])
    assert code == 0, err
    parts = out.split()
    assert parts[0] == parts[2] != parts[1] == parts[3]


# ---- memory ------------------------------------------------------------------------------------------------

def test_checkpointed_activations_change_no_bit_and_keep_less(tiny_gpt):
    layout, tokens = make_layout([(9, [5, 3]), (4, [7])]), torch.randint(40, (28,))
    found = []
    for again in (False, True):
        tiny_gpt.checkpoint_activations, kept = again, set()
        tiny_gpt.zero_grad()
        hook = lambda x: kept.add((x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())) or x
        with torch.autograd.graph.saved_tensors_hooks(hook, lambda x: x):
            logprobs = tiny_gpt.logprobs(tokens, layout)
        logprobs.sum().backward()
        found.append((torch.cat([p.grad.flatten() for p in tiny_gpt.parameters()]), sum(size for _, size in kept)))
    assert torch.equal(found[0][0], found[1][0]) and found[1][1] < 0.5 * found[0][1]


def test_random_rounding_is_right_on_average_and_rounding_to_nearest_is_not():
    generator = torch.Generator().manual_seed(0)
    x = torch.full((200_000,), 1 + 0.3 * 2**-7)  # three tenths of the way between two bf16 numbers
    rounded = round_at_random(x, generator).float()
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert rounded.mean().item() == pytest.approx(x[0].item(), abs=5 * 2**-7 * math.sqrt(0.21 / 200_000))
    assert x.bfloat16().float().mean() == 1
    exact = torch.tensor([0.0, -1.5, 2.0**-100, -(2.0**100)])
    assert torch.equal(round_at_random(exact, generator).float(), exact)


def test_bf16_moments_follow_adamw_where_rounded_ones_would_freeze():
    """The gradient halves: the second moment has to fall 0.1 % a step, a quarter of a bf16 step."""
    def run(kind):
        weight = torch.nn.Linear(1, 4096, bias=False)
        torch.nn.init.ones_(weight.weight)
        if kind == "torch":
            optimizer = torch.optim.AdamW(weight.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01)
        else:
            optimizer = make_optimizer(weight, 1e-3, (0.9, 0.999), 0.01, bf16_moments=kind == "bf16")
        for step in range(600):
            weight.weight.grad = torch.full((4096, 1), 1.0 if step < 200 else 0.5)
            optimizer.step()
        return weight.weight.detach().mean().item(), optimizer.state[weight.weight]

    (exact, theirs), (ours, _), (small, state) = run("torch"), run("fp32"), run("bf16")
    assert ours == pytest.approx(exact, abs=1e-6)
    assert state["exp_avg_sq"].dtype == state["exp_avg"].dtype == torch.bfloat16
    assert state["exp_avg_sq"].float().mean().item() == pytest.approx(theirs["exp_avg_sq"][0].item(), rel=0.01)
    assert 1 - small == pytest.approx(1 - exact, rel=0.01)


def test_with_bf16_moments_a_frozen_weight_changes_no_bit_of_the_others():
    """Random bits are a function of (step, parameter, part), whatever the other parameters do."""
    def run(frozen):
        weights = torch.nn.ParameterList(torch.ones(500) for _ in range(3))
        optimizer = make_optimizer(weights, 1e-2, (0.9, 0.999), bf16_moments=True)
        for step in range(4):
            for i, weight in enumerate(weights):
                weight.grad = None if i in frozen else torch.linspace(0.1, 1 + step, 500)
            optimizer.step()
        return [[weight.detach(), optimizer.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg_sq"]]
                for weight in weights]

    everything = run(frozen=[])
    for frozen in ([0], [1], [0, 2]):
        for i, (ours, theirs) in enumerate(zip(run(frozen), everything)):
            if i in frozen:
                assert ours[0].eq(1).all() and ours[1].eq(0).all()
            else:
                assert all(map(torch.equal, ours, theirs))


def test_bf16_moments_resume_to_the_same_bits(corpus, base, tmp_path):
    whole, halves = (command("train_rpt.py", corpus, base, tmp_path / name, bf16_moments=True)
                     for name in ("whole", "halves"))
    for line in (whole, [*halves, "--steps", "3"], [*halves, "--resume"]):
        assert run_here(*line)[0] == 0
    a, b = (load_file(tmp_path / name / "step_000006" / "model.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    a, b = (read_moments(tmp_path / name / "step_000006") for name in ("whole", "halves"))
    assert all(torch.equal(a[name], b[name]) for name in a) and a["norm.weight.exp_avg"].dtype == torch.bfloat16
