"""A run's folder when things go wrong around it: a second run, damaged files, power cuts, signals, other ranks."""
import fcntl
import itertools
import json
import os
import pickle
import pty
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.tokenizer import Tokenizer
from plumbing import checkpoint, files, moments, parallel
from plumbing.checkpoint import Run, catch_interrupts, checkpoint_to_resume, cut_log, save_checkpoint
from plumbing.optimizer import make_optimizer
from test_runs import KILL, command, contents, lines
from tiny import ENVIRONMENT, ROOT, base, corpus, run_here, tiny_model


def make_parts():
    """A tiny model with moments that are not zero, and what else a checkpoint needs."""
    tokenizer = Tokenizer.load("embedded")
    model = tiny_model(tokenizer.vocab_size)
    optimizer = make_optimizer(model, 1e-3, (0.9, 0.95))
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    optimizer.step()
    return model, tokenizer, optimizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of an RPT run with the checkpoints 3 and 6; only 6 has moments."""
    run = tmp_path_factory.mktemp("saved") / "run"
    run.mkdir()
    (run / "args.json").write_text('{"rollouts": 8}')
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {i}}}\n' for i in range(1, 7)))
    for step in (3, 6):
        save_checkpoint(str(run), step, *make_parts(), cursor=8 * step)
    return run


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def arguments(run, resume=True, **more):
    return SimpleNamespace(out_dir=str(run), resume=resume, rollouts=8, steps=9, save_every=3, keep=0, keep_every=0,
                           **more)


# ---- one run at a time -------------------------------------------------------------------------------------

def test_a_lock_names_who_has_it_and_goes_with_its_process(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", "import sys, time; from plumbing.files import lock, sign\n"
                               "held = lock(sys.argv[1]); sign(held); print(flush=True); time.sleep(60)",
                               tmp_path / "run"], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(ValueError, match=f"run is in use by pid {holder.pid} on {socket.gethostname()} since 20"):
        files.lock(tmp_path / "run")
    holder.kill()
    holder.wait()
    files.lock(tmp_path / "run").close()


def test_where_there_are_no_locks_a_run_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    files.lock(tmp_path / "run").close()
    assert "warning: " in capsys.readouterr().out


def test_a_second_run_in_a_folder_is_refused_in_one_line_that_names_the_first(corpus, base, tmp_path):
    line = command("train_ntp.py", corpus, base, tmp_path / "run", steps=10**6)
    first = subprocess.Popen([sys.executable, *line], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    while not (tmp_path / "run" / "latest").exists():
        assert first.poll() is None
        time.sleep(0.05)
    for more in ([], ["--resume"]):
        code, _, err = run_here(*line, *more)
        assert code == 2 and err.count("\n") == 1 and f"run is in use by pid {first.pid} on " in err
    first.kill()
    first.wait()
    step = len(lines(tmp_path / "run"))
    assert run_here(*line, "--resume", "--steps", step + 2)[0] == 0
    assert [record["step"] for record in lines(tmp_path / "run")] == list(range(1, step + 3))


def test_of_two_that_start_at_the_same_moment_one_trains(corpus, base, tmp_path):
    line = command("train_ntp.py", corpus, base, tmp_path / "run", steps=20)
    both = [subprocess.Popen([sys.executable, *line], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    assert sum(error.count("\n") for error in errors) == 1 and "run" in "".join(errors)
    assert [record["step"] for record in lines(tmp_path / "run")] == list(range(1, 21))


def test_a_run_that_was_overtaken_while_it_loaded_its_model_does_not_start(saved, tmp_path):
    """Nothing was there when the second one looked, and the first one is done when the second one locks."""
    slow = Run(arguments(tmp_path / "run"))
    shutil.copytree(saved, tmp_path / "run")
    with pytest.raises(ValueError, match="another process has trained here"):
        slow.claim()


# ---- which checkpoint --------------------------------------------------------------------------------------

@pytest.mark.parametrize("gone", ["", "latest", "latest metrics.jsonl", "latest step_000003 step_000006"])
def test_without_resume_a_folder_with_checkpoints_or_logs_is_refused(run, gone):
    for name in gone.split():
        shutil.rmtree(run / name) if name.startswith("step") else (run / name).unlink()
    with pytest.raises(ValueError, match="already holds a run; --resume continues it"):
        checkpoint_to_resume(arguments(run, resume=False))


def test_without_resume_a_folder_without_either_may_be_used(tmp_path):
    (tmp_path / "run" / "step_by_step").mkdir(parents=True)
    (tmp_path / "run" / "args.json").write_text("{}")   # a start that failed before its first step
    assert checkpoint_to_resume(arguments(tmp_path / "run", resume=False)) == (None, [])


@pytest.mark.parametrize("latest", [None, b"", b"step_000009", b"../..", b"\xff\xfe", b"step_000006 or so"])
def test_without_a_latest_that_names_a_checkpoint_the_newest_is_taken_and_named(run, latest):
    (run / "step_notes").mkdir()
    (run / "step_12").mkdir()
    (run / "latest").unlink()
    if latest is not None:
        (run / "latest").write_bytes(latest)
    folder, remarks = checkpoint_to_resume(arguments(run))
    assert folder == f"{run}/step_000006" and remarks == [f"{run}/latest names no checkpoint: taking {folder}"]


def overwrite(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def halve(name):
    return lambda folder: overwrite(name, (folder / name).read_bytes()[:(folder / name).stat().st_size // 2])(folder)


def delete(name):
    return lambda folder: files.delete(folder / name)


def become_a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("")


RANK_0 = "optimizer/rank_00000_0.safetensors"
JSON = ["config.json", "tokenizer.json", "trainer.json", "optimizer/index.json"]
DAMAGE = {f"{name} {how.__name__}": (name, how(name)) for how in (halve, delete)
          for name in JSON + ["model.safetensors", RANK_0]}
DAMAGE |= {f"{name} = {content[:20]}": (name, overwrite(name, content)) for name in JSON
           for content in (b"", b"[1]", b"null", b"\xff\xfe", b"[" * 200_000)}
DAMAGE |= {f"{name} = {content}": (name, overwrite(name, content)) for name, content in [
    ("model.safetensors", b""), (RANK_0, b""), (RANK_0, b"x" * 99), ("trainer.json", b'{"step": "6"}'),
    ("trainer.json", b'{"step": 5, "cursor": 1}'), ("trainer.json", b'{"step": 6, "cursor": "1"}'),
    ("trainer.json", b'{"step": 6, "cursor": -1}'), ("trainer.json", b"{}"),
    ("optimizer/index.json", b'{"norm.weight.exp_avg": 3}'),
    ("optimizer/index.json", b'{"norm.weight.exp_avg": {"shape": 32, "parts": [["a", 0, 32]]}}'),
    ("trainer.json", b'{"step": 6.0, "cursor": 48}'),
    *[("optimizer/index.json", b'{"norm.weight.exp_avg": {"shape": [32], "parts": [["a", 0, %s], ["b", %s, 32]]}}' % ends)
      for ends in [(b"16", b"17"), (b"16.0", b"16.0"), (b"null", b"null"), (b"40", b"40")]]]}
DAMAGE |= {"an empty folder": ("config.json", lambda folder: (shutil.rmtree(folder), folder.mkdir())),
           "a file": ("config.json", become_a_file),
           "no moments": ("optimizer/index.json", delete("optimizer")),
           "moments are a file": ("optimizer/index.json", lambda folder: become_a_file(folder / "optimizer"))}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_an_older_one_taken_only_if_it_is_complete(run, damage):
    name, harm = DAMAGE[damage]
    newest, older = run / "step_000006", run / "step_000003"
    shutil.copytree(newest / "optimizer", older / "optimizer")  # as a kill leaves it, just after the newest was saved
    harm(newest)
    place = str(newest) if name == "model.safetensors" else f"{newest}/{name}"
    folder, [remark] = checkpoint_to_resume(arguments(run))
    assert folder == str(older) and place in remark and "\n" not in remark and f": taking {older}" in remark

    shutil.rmtree(older / "optimizer")                         # as a finished save leaves it
    weights = newest if name.startswith(("trainer", "optimizer")) else older
    with pytest.raises(ValueError) as error:
        checkpoint_to_resume(arguments(run))
    assert place in str(error.value) and f"--init {weights} and another --out-dir" in str(error.value)


def test_an_older_checkpoint_is_not_resumed_without_its_moments_even_if_latest_asks_for_it(run):
    (run / "latest").write_text("step_000003")
    with pytest.raises(ValueError, match="step_000003/optimizer/index.json: no such file; only the newest"):
        checkpoint_to_resume(arguments(run))


def test_a_run_without_checkpoints_starts_again_and_says_so(run):
    for name in ("step_000003", "step_000006"):
        shutil.rmtree(run / name)
    with pytest.raises(ValueError, match="run/latest: there is no checkpoint beside it"):
        checkpoint_to_resume(arguments(run))
    (run / "latest").unlink()
    assert checkpoint_to_resume(arguments(run)) == (None, [f"{run} holds no checkpoint: starting at step 0"])


@pytest.mark.parametrize("content", [None, b"", b"[1]", b'{"rollo'])
def test_damaged_arguments_are_named_and_written_anew(run, capsys, content):
    (run / "args.json").unlink()
    if content is not None:
        (run / "args.json").write_bytes(content)
    checkpoint.open_folder(arguments(run), f"{run}/step_000006", [])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and f"{run}/args.json" in said[0] and said[0].endswith(": written anew")
    assert json.loads((run / "args.json").read_text())["rollouts"] == 8


@pytest.mark.parametrize("line", [b'{"step": 2, "rew', b"\0" * 30, b"[2]", b'{"step": "2"}', b'{"loss": 2}', b"\xff", b"",
                                  b"[" * 200_000])
def test_a_broken_line_inside_a_log_is_dropped_and_named(tmp_path, capsys, line):
    log, rest = tmp_path / "metrics.jsonl", b'{"step": 3}\n'
    log.write_bytes(b'{"step": 1}\n' + line + b"\n" + rest + b'{"step": 4}\n{"st')
    cut_log(str(log), 3)
    assert log.read_bytes() == b'{"step": 1}\n' + rest
    assert capsys.readouterr().out == f"{log}: dropped what is not JSON with a step: line 2\n"


@pytest.mark.parametrize("log, missing", [("", "1 to 6"), ('{"step": 1}\n{"step": 2}\n', "3 to 6"), (None, "1 to 6")])
def test_a_log_that_lacks_steps_of_the_checkpoint_is_named(run, capsys, log, missing):
    (run / "metrics.jsonl").unlink()
    if log is not None:
        (run / "metrics.jsonl").write_text(log)
    checkpoint.open_folder(arguments(run), f"{run}/step_000006", [])
    assert capsys.readouterr().out.endswith(f"{run}/metrics.jsonl: says nothing about steps {missing}\n")


def test_a_torn_last_line_is_named_only_if_its_step_will_not_come_again(tmp_path, capsys):
    log = tmp_path / "metrics.jsonl"
    for step, said in ((1, ""), (2, f"{log}: dropped what is not JSON with a step: line 2\n")):
        log.write_text('{"step": 1}\n{"step": 2, "x')
        cut_log(str(log), step)
        assert log.read_text() == '{"step": 1}\n' and capsys.readouterr().out == said


@pytest.mark.parametrize("written", ["{}/", "{}//", "{}/../run/"])
def test_a_folder_that_ends_with_a_slash_keeps_its_moments(corpus, base, tmp_path, written):
    line = command("train_ntp.py", corpus, base, written.format(tmp_path / "run"), steps=2, save_every=1)
    (tmp_path / "run").mkdir()
    assert run_here(*line)[0] == 0
    assert [path.parent.name for path in (tmp_path / "run").glob("*/optimizer")] == ["step_000002"]
    code, out, _ = run_here(*line, "--resume", "--steps", 3, "--keep", 1)
    assert code == 0 and out.startswith("resuming from ") and "2; changed: " in out, out
    assert [path.parent.name for path in (tmp_path / "run").glob("*/optimizer")] == ["step_000003"]
    assert [path.name for path in (tmp_path / "run").glob("step_*")] == ["step_000003"]


# ---- saving ------------------------------------------------------------------------------------------------

def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    synced, fsync, rename, replace, named = set(), os.fsync, os.rename, os.replace, []

    def note(handle):
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def check(move):
        def checked(old, new):
            assert all(os.stat(path).st_ino in synced for path in [old, *Path(old).rglob("*")]), old
            move(old, new)
            synced.discard(os.stat(os.path.dirname(new)).st_ino)  # its new entry is not safe yet
            named.append((os.path.basename(new), os.path.dirname(new)))
        return checked

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", check(rename))
    monkeypatch.setattr(os, "replace", check(replace))
    (tmp_path / "metrics.jsonl").write_text("")
    save_checkpoint(str(tmp_path), 1, *make_parts())
    assert [name for name, place in named if place == str(tmp_path)] == ["step_000001", "latest"]
    assert {os.stat(path).st_ino for path in (tmp_path, tmp_path / "metrics.jsonl")} <= synced


def test_keep_leaves_the_newest_and_every_mth_and_nothing_else_is_deleted(corpus, base, tmp_path):
    run = tmp_path / "run"
    others = ["step_notes", "step_2", "step_000001_copy"]
    for name in others:
        (run / name).mkdir(parents=True)
    line = command("train_ntp.py", corpus, base, run, steps=5, save_every=1, keep=2, keep_every=3)
    assert run_here(*line)[0] == 0
    assert {path.name for path in run.glob("step_*")} == {"step_000003", "step_000004", "step_000005", *others}
    assert run_here(*line, "--resume", "--keep", 1, "--keep-every", 0, "--steps", 6)[0] == 0
    assert {path.name for path in run.glob("step_*")} == {"step_000006", *others}


def test_keep_counts_no_checkpoint_that_is_newer_than_this_step(run):
    """They are left from before an older one was resumed, and may be damaged."""
    shutil.copytree(run / "step_000003", run / "step_000009")
    checkpoint.drop_checkpoints(str(run), 6, SimpleNamespace(keep=1, keep_every=0))
    assert {path.name for path in run.glob("step_*")} == {"step_000006", "step_000009"}


def test_a_link_that_is_not_kept_leaves_what_it_points_to(run, tmp_path):
    (run / "step_000003").rename(tmp_path / "elsewhere")
    (run / "step_000003").symlink_to(tmp_path / "elsewhere")
    checkpoint.drop_checkpoints(str(run), 6, SimpleNamespace(keep=1, keep_every=0))
    assert not (run / "step_000003").is_symlink() and (tmp_path / "elsewhere" / "config.json").exists()


def test_a_kill_while_a_checkpoint_is_dropped_leaves_a_run_that_resumes_to_the_same_bits(corpus, base, tmp_path):
    line = lambda name: command("train_ntp.py", corpus, base, tmp_path / name, save_every=2, keep=1)
    assert run_here(*line("whole"))[0] == 0
    trap = KILL + """
import shutil
rmtree = shutil.rmtree
def torn(path, *rest, **more):
    if "step_000002.old" in str(path):
        os.unlink(f"{path}/config.json")
        die()
    rmtree(path, *rest, **more)
shutil.rmtree = torn
runpy.run_path(sys.argv[0], run_name="__main__")"""
    done = subprocess.run([sys.executable, "-c", trap, *line("killed")], cwd=ROOT, env=ENVIRONMENT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (tmp_path / "killed" / "step_000002.old.partial").exists()
    assert run_here(*line("killed"), "--resume")[0] == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "killed").glob("step_*")] == ["step_000006"]


# ---- moments -----------------------------------------------------------------------------------------------

class Code:
    """A pickle that runs a command when it is read."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("has_index", [False, True])
def test_moments_that_would_run_a_command_are_not_unpickled(corpus, base, tmp_path, has_index):
    line, witness = command("train_ntp.py", corpus, base, tmp_path / "run"), tmp_path / "witness"
    assert run_here(*line, "--steps", 3)[0] == 0
    folder = tmp_path / "run" / "step_000003" / "optimizer"
    for name in (".metadata", "__0_0.distcp"):
        (folder / name).write_bytes(pickle.dumps(Code(witness)))
    if not has_index:
        (folder / "index.json").unlink()
    code, _, err = run_here(*line, "--resume")
    assert not witness.exists() and code == (0 if has_index else 2)
    assert has_index or err.count("\n") == 1 and f"--init {folder.parent} and another --out-dir" in err
    os.system(pickle.loads(pickle.dumps(Code(witness))) or "true")
    assert witness.exists()  # it would have


class Ranks:
    """As if this process were one rank after the other: tensors are whole, and `local` cuts them."""

    def __init__(self, monkeypatch, ranks, per_copy):
        self.monkeypatch, self.ranks, self.per_copy, self.said = monkeypatch, ranks, per_copy, {}
        monkeypatch.setattr(parallel, "local", lambda tensor: tensor[parallel.local_slice(tensor)])
        monkeypatch.setattr(parallel, "gather_lists", self.gather)

    def gather(self, items):
        """Rank 0 comes last, and only it needs what the others have said."""
        self.said[parallel.RANK] = items
        return [item for rank in sorted(self.said) for item in self.said[rank]]

    def __iter__(self):
        for rank in reversed(range(self.ranks)):
            self.monkeypatch.setattr(parallel, "RANK", rank)
            # A count of steps is not spread over the ranks.
            cut = lambda tensor: (rank % self.per_copy, self.per_copy) if tensor.numel() > 1 else (0, 1)
            self.monkeypatch.setattr(parallel, "part", cut)
            yield rank


def some_moments(seed, dtype):
    """A model with few and odd numbers of rows, and an optimizer with values in every moment."""
    model = torch.nn.ParameterList(torch.ones(shape) for shape in [(7, 3), (2, 5), (1, 4), (5,), (64, 2), (3, 1, 2)])
    optimizer = make_optimizer(model, 1e-3, (0.9, 0.95), bf16_moments=dtype == torch.bfloat16)
    torch.manual_seed(seed)
    for tensor in moments.moments(model, optimizer).values():
        tensor.copy_(torch.randn(tensor.shape))
    return model, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("file_bytes", [100, 10**9])
def test_moments_of_any_number_of_ranks_are_read_by_any_other(tmp_path, monkeypatch, dtype, file_bytes):
    monkeypatch.setattr(moments, "FILE_BYTES", file_bytes)
    model, optimizer = some_moments(1, dtype)
    expected = moments.moments(model, optimizer)
    layouts = [(1, 1), (2, 2), (3, 3), (4, 2), (4, 4), (6, 3)]  # ranks, and how many of them share a copy
    for ranks, per_copy in layouts:
        for _ in Ranks(monkeypatch, ranks, per_copy):
            moments.save_moments(f"{tmp_path}/{ranks} {per_copy}", model, optimizer)
        total = sum(path.stat().st_size for path in (tmp_path / f"{ranks} {per_copy}").glob("rank_*"))
        assert total < 1.01 * sum(t.nbytes for t in expected.values()) + 9000 * ranks  # no copy is written twice
    for saved, (ranks, per_copy) in itertools.product(layouts, layouts):
        other, empty = some_moments(2, dtype)
        found = moments.moments(other, empty)
        for _ in Ranks(monkeypatch, ranks, per_copy):
            moments.load_moments(f"{tmp_path}/{saved[0]} {saved[1]}", other, empty)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), (saved, ranks)


def test_a_rank_reads_its_rows_of_the_moments_and_no_others(tmp_path, monkeypatch):
    model, optimizer = some_moments(1, torch.float32)
    for _ in Ranks(monkeypatch, 3, 3):
        moments.save_moments(str(tmp_path), model, optimizer)
    read = {}

    @contextmanager
    def spy(path, open_tensors=moments.open_tensors):
        def get_slice(name):
            def values(_, where):
                tensor = file.get_slice(name)[where]
                read[parallel.RANK] = read.get(parallel.RANK, 0) + tensor.numel()
                return tensor
            whole = file.get_slice(name)
            return type("Slice", (), {"__getitem__": values, "get_shape": lambda _: whole.get_shape()})()
        with open_tensors(path) as file:
            yield SimpleNamespace(get_slice=get_slice)

    monkeypatch.setattr(moments, "open_tensors", spy)
    for rank in Ranks(monkeypatch, 2, 2):
        moments.load_moments(str(tmp_path), model, optimizer)
        mine = sum(parallel.local(tensor).numel() for tensor in moments.moments(model, optimizer).values())
        assert read[rank] == mine


def test_another_user_may_read_the_moments_if_the_umask_says_so(tmp_path):
    before = os.umask(0o022)
    try:
        moments.save_moments(str(tmp_path), *some_moments(1, torch.float32))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


@pytest.mark.parametrize("harm, complaint", [
    (lambda rows: rows * float("nan"), "not finite"), (lambda rows: rows - float("inf"), "not finite"),
    (lambda rows: torch.cat([rows, rows]), "other rows"), (lambda rows: rows[0], "other rows")])
def test_moments_that_are_damaged_are_refused_by_name(run, harm, complaint):
    path, name = run / "step_000006" / RANK_0, "norm.weight.exp_avg"
    tensors = load_file(path)
    save_file(tensors | {name: harm(tensors[name])}, path)
    model, _, optimizer = make_parts()
    with pytest.raises(ValueError, match=f"{path}: {name} .*{complaint}"):
        moments.load_moments(str(path.parent), model, optimizer)


def test_moments_of_another_model_are_refused(tmp_path):
    moments.save_moments(str(tmp_path), *some_moments(1, torch.float32))
    other = torch.nn.ParameterList([torch.ones(7, 4)])
    with pytest.raises(ValueError, match=r"index.json: 0.step|index.json: 0.exp_avg of shape \[7, 4\] is not in it"):
        moments.load_moments(str(tmp_path), other, make_optimizer(other, 1e-3, (0.9, 0.95)))


# ---- signals -----------------------------------------------------------------------------------------------

@pytest.fixture
def handlers():
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
    usual = {number: signal.getsignal(number) for number in numbers}
    yield numbers
    for number, handler in usual.items():
        signal.signal(number, handler)


def test_a_ctrl_c_that_comes_twice_at_once_is_one_and_a_later_one_ends_the_run(handlers, monkeypatch):
    codes, now = [], [100.0]
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    caught = catch_interrupts()
    for wait in (0, 0.01, 0.3):
        now[0] += wait
        os.kill(os.getpid(), signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        now[0] += 1
        os.kill(os.getpid(), number)
    assert codes == [] and set(caught) == set(handlers)
    os.kill(os.getpid(), signal.SIGINT)
    assert codes == [130]


def test_under_nohup_a_hangup_stays_ignored(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    caught = catch_interrupts()
    os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and not caught


def test_a_run_whose_terminal_is_gone_saves_its_step(corpus, base, tmp_path):
    """The kernel sends SIGHUP, and from then on printing is an error."""
    run = tmp_path / "run"
    ours, theirs = pty.openpty()
    line = command("train_rpt.py", corpus, base, run, steps=10**6, save_every=2)
    process = subprocess.Popen([sys.executable, *line], cwd=ROOT, env=ENVIRONMENT, stdin=theirs, stdout=theirs,
                               stderr=theirs, start_new_session=True,
                               preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(theirs)
    while not (run / "latest").exists():
        assert process.poll() is None
        os.read(ours, 4096)
    os.close(ours)
    assert process.wait(60) == 0
    assert (run / "latest").read_text() == f"step_{len(lines(run)):06d}"
