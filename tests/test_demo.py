"""demo.py: stages that are done are not run again, signals reach the command, and the whole chain holds together."""
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import demo
from plumbing import files
from tiny import ENVIRONMENT, ROOT, write_lines


@pytest.fixture(autouse=True)
def handlers():
    """run_stages installs its own."""
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    yield
    for number, handler in usual.items():
        signal.signal(number, handler)


def run(folder, *commands):
    """Python commands as stages of a demo in this folder; stage 1 leaves the file done1, and so on."""
    stages = [(f"Reason {i}.", f"-c {json.dumps(command)}", f"{{run}}/done{i}")
              for i, command in enumerate(commands, start=1)]
    demo.run_stages(stages, lambda args: dict(run=args.out_dir), SimpleNamespace(out_dir=folder))


def done(folder):
    return sorted(path.name for path in folder.glob("done*"))


def test_stages_run_in_order_and_once(tmp_path, capfd):
    log = tmp_path / "log"
    commands = [f"print('one', file=open('{log}', 'a'))", f"print('two', file=open('{log}', 'a'))"]
    run(tmp_path, *commands)
    assert log.read_text() == "one\ntwo\n" and done(tmp_path) == ["done1", "done2"]
    said = capfd.readouterr().out
    assert "[1/2] Reason 1.\n$ python -c" in said and "done before" not in said
    run(tmp_path, *commands)
    assert log.read_text() == "one\ntwo\n" and capfd.readouterr().out.count("done before") == 2
    (tmp_path / "done2").unlink()
    run(tmp_path, *commands)
    assert log.read_text() == "one\ntwo\ntwo\n"


def test_a_stage_that_fails_ends_the_demo_with_its_code(tmp_path, capfd):
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "pass", "raise SystemExit(7)", "pass")
    assert end.value.code == 7 and done(tmp_path) == ["done1"]
    assert "stage 2 failed" in capfd.readouterr().out


def test_after_ctrl_c_the_stage_is_not_done_although_its_command_has_saved_and_ended_well(tmp_path, capfd):
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "import os, signal; os.kill(os.getppid(), signal.SIGINT)", "pass")
    assert end.value.code == 130 and done(tmp_path) == []
    assert "the same command continues here" in capfd.readouterr().out


@pytest.mark.parametrize("command", [
    # The first listens to the SIGTERM that is passed on, the second only to the second Ctrl-C.
    "signal.signal(signal.SIGTERM, lambda *_: exit(0)); os.kill(os.getppid(), signal.SIGTERM)",
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); os.kill(os.getppid(), signal.SIGINT); time.sleep(1); "
    "os.kill(os.getppid(), signal.SIGINT)"])
def test_a_signal_is_passed_on_and_a_second_ctrl_c_ends_what_does_not_listen(tmp_path, capfd, command):
    with pytest.raises(SystemExit) as end:
        run(tmp_path, f"import os, signal, time; {command}; time.sleep(60); exit(9)", "pass")
    assert end.value.code == 130 and done(tmp_path) == []


@pytest.mark.parametrize("sent, arrives", [("SIGHUP", "SIGHUP"), ("SIGUSR1", "SIGTERM"), ("SIGTERM", "SIGTERM")])
def test_a_command_that_has_lost_its_terminal_is_told_so_and_others_get_sigterm(tmp_path, sent, arrives):
    with pytest.raises(SystemExit):
        run(tmp_path, f"import os, signal, time; note = lambda *_: open('{tmp_path}/note', 'w').close() or exit(0); "
            f"signal.signal(signal.{arrives}, note); os.kill(os.getppid(), signal.{sent}); time.sleep(5)")
    assert (tmp_path / "note").exists()


def test_a_ctrl_c_that_comes_twice_at_once_lets_the_command_save(tmp_path):
    with pytest.raises(SystemExit):
        run(tmp_path, "import os, signal, time; signal.signal(signal.SIGTERM, lambda *_: None); "
            "os.kill(os.getppid(), signal.SIGINT); time.sleep(0.05); os.kill(os.getppid(), signal.SIGINT); "
            f"time.sleep(0.3); open('{tmp_path}/saved', 'w')")
    assert (tmp_path / "saved").exists()


def test_a_second_demo_in_a_folder_is_refused(tmp_path):
    with files.lock(tmp_path / "run"):
        done = subprocess.run([sys.executable, "demo.py", "--out-dir", tmp_path / "run"], cwd=ROOT, env=ENVIRONMENT,
                              capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "run is in use by" in done.stderr
    assert os.listdir(tmp_path / "run") == ["lock"]


def test_ctrl_c_between_two_stages_is_not_lost(tmp_path, monkeypatch):
    touch = demo.Path.touch

    def touch_and_press(path):
        touch(path)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(demo.Path, "touch", touch_and_press)
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "pass", "pass")
    assert end.value.code == 130 and done(tmp_path) == ["done1"]


def test_ctrl_c_on_a_terminal_reaches_a_command_through_the_demo_alone(tmp_path):
    run(tmp_path, f"import os; print(os.getsid(0), os.getpid(), file=open('{tmp_path}/session', 'w'))")
    session, process = map(int, (tmp_path / "session").read_text().split())
    assert session == process != os.getsid(0)


def test_a_folder_may_have_blanks_and_quotes_in_its_name(tmp_path, capfd):
    folder = tmp_path / "it's a run"
    folder.mkdir()
    stages = [("Reason.", "-c \"import sys; open(sys.argv[1] + '/said', 'w').write(sys.argv[2])\" {run} {seed}",
               "{run}/said")]
    known = dict(run=str(folder), seed=7)
    demo.run_stages(stages, lambda args: known, SimpleNamespace())
    assert (folder / "said").read_text() == "7"
    printed = capfd.readouterr().out.split("$ ")[1].replace("\\\n", "").split("\n    ")[0]
    assert shlex.split(printed)[-2:] == [str(folder), "7"]


def test_what_is_printed_is_the_command_in_80_columns():
    words = ["python", "train.py", "--out-dir", "a b"] + [f"--flag-{i}={'x' * i}" for i in range(30)]
    text = demo.shell_lines(words)
    assert max(map(len, text.split("\n"))) <= 80 and text.startswith("$ python train.py --out-dir 'a b'")
    assert shlex.split(text.removeprefix("$ ").replace("\\\n", "")) == words


@pytest.mark.parametrize("cores, busy, threads", [(2, 0.1, 2), (2, 0.9, 1), (2, 2.0, 1), (8, 3.2, 4), (64, 0.0, 4),
                                                  (1, 0, 1)])
def test_busy_cores_are_left_alone(monkeypatch, cores, busy, threads):
    looks = iter([(5000, 9000), (5000 + 100 * (cores - busy), 9000 + 100 * cores)])
    monkeypatch.setattr(demo, "ticks", lambda: next(looks))
    monkeypatch.setattr(demo.time, "sleep", lambda _: None)
    monkeypatch.setattr(demo.os, "cpu_count", lambda: cores)
    assert demo.free_cores() == threads


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="Linux only")
def test_ticks_pass_at_most_as_fast_as_cores():
    before, begun = demo.ticks(), time.monotonic()
    time.sleep(0.5)
    after, seconds = demo.ticks(), time.monotonic() - begun
    hertz, cores = os.sysconf("SC_CLK_TCK"), os.cpu_count()
    assert 0.5 * hertz * cores * seconds < after[1] - before[1] < 1.5 * hertz * cores * seconds
    assert 0 <= after[0] - before[0] <= after[1] - before[1]


def test_a_run_keeps_its_number_of_threads(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "free_cores", lambda: 3)
    monkeypatch.setattr(demo.os, "environ", {})
    demo.choose_threads(tmp_path / "run")
    assert demo.os.environ == {"OMP_NUM_THREADS": "3"}
    monkeypatch.setattr(demo, "free_cores", lambda: 1)  # another program has started
    monkeypatch.setattr(demo.os, "environ", {})
    demo.choose_threads(tmp_path / "run")
    assert demo.os.environ == {"OMP_NUM_THREADS": "3"}
    monkeypatch.setattr(demo.os, "environ", {"OMP_NUM_THREADS": "2"})
    demo.choose_threads(tmp_path / "run")
    assert demo.os.environ == {"OMP_NUM_THREADS": "2"} and (tmp_path / "run/threads").read_text() == "2"


def test_stages_that_compute_get_the_device():
    args = SimpleNamespace(device="cuda")
    got = [bool(demo.options(stage.command, args)) for stage in demo.STAGES + demo.CONTROL]
    assert got == [False, True, True, True, True, True, False, True, True, True, False]
    assert demo.options(demo.STAGES[1].command, SimpleNamespace(device=None)) == []


def test_next_steps_name_this_run_and_not_what_is_done():
    usual = SimpleNamespace(out_dir="runs/demo", seed=0, control=False)
    assert "        python demo.py --control\n" in demo.ending(usual, 1.0)
    other = demo.ending(SimpleNamespace(out_dir="my runs/x", seed=3, control=False), 1.0)
    assert "        python demo.py --out-dir 'my runs/x' --seed 3 --control\n" in other
    assert "--model 'my runs/x/rpt/step_000200'" in other
    after = demo.ending(SimpleNamespace(out_dir="runs/demo", seed=0, control=True), 1.0)
    assert "demo.py" not in after and "control/results.json" in after
    for text in (demo.ending(usual, 1.0), after):
        assert max(map(len, text.split("\n"))) <= 80


def test_ctrl_c_while_torch_is_imported_ends_without_a_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("import time; print('importing', flush=True); time.sleep(60)")
    environment = ENVIRONMENT | dict(PYTHONPATH=str(tmp_path))
    for script in ("demo.py", "train_rpt.py"):
        process = subprocess.Popen([sys.executable, script], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == -signal.SIGINT and process.stderr.read() == ""


def dumped(tmp_path):
    """Thoughts of base and RPT about four problems; other modes and checkpoints stand between them."""
    contexts = [f"Mia computes {sum} from" for sum in ("1+2*3", "2*3*3", "4+1", "5*7+2+2+1")]
    lines = []
    for checkpoint, rewards, thoughts in (("base", [1, 0, 0, 1], ["1+2=3;", "2*3=6;", "", "5*7=5;"]),
                                          ("rpt", [1, 1, 1, 0], ["1+2=3;3*3=9;", "2*3=6;6*3=8;", "4+1=5;", "5*7=3;"])):
        for context, reward, thought in zip(contexts, rewards, thoughts):
            line = dict(checkpoint=checkpoint, mode="reasoning", context=context, response=thought, truth=" odd.",
                        reward=reward)
            lines += [line, line | dict(mode="forced", reward=1 - reward), line | dict(checkpoint="other")]
    path = write_lines(tmp_path / "thoughts.jsonl", *lines)
    return demo.read_thoughts(path, "base"), demo.read_thoughts(path, "rpt")


def test_accuracy_and_length_are_shown_by_steps_of_the_problem(tmp_path, capsys):
    demo.show_steps(*dumped(tmp_path))
    head, *rows = capsys.readouterr().out.strip("\n").split("\n")
    assert head.split()[-3:] == ["1", "2", "4"]
    assert [row.split()[-3:] for row in rows] == [
        ["0.0", "50.0", "100.0"], ["0.0", "1.0", "1.0"], ["100.0", "100.0", "0.0"], ["1.0", "2.0", "1.0"]]
    assert all(len(row) <= 80 for row in rows)


def test_the_thoughts_that_are_shown_are_the_first_that_rpt_mends_and_the_first_that_it_spoils(tmp_path, capsys):
    befores, afters = dumped(tmp_path)
    demo.show_thoughts(befores, afters)
    assert capsys.readouterr().out == (
        "\nPositions that the base gets wrong and RPT gets right: 2 of 4, the first:\n"
        "Mia computes 2*3*3 from\n    before 2*3=6;\n    after  2*3=6;6*3=8;\n    truth  ' odd.'\n"
        "\nPositions that the base gets right and RPT gets wrong: 1 of 4, the first:\n"
        "Mia computes 5*7+2+2+1 from\n    before 5*7=5;\n    after  5*7=3;\n    truth  ' odd.'\n")
    demo.show_thoughts(afters, afters)
    assert capsys.readouterr().out.count("0 of 4\n") == 2


@pytest.mark.slow
def test_the_chain_from_corpus_to_picture_and_control(tmp_path):
    """The demo with a base of 100 steps, one step of RPT and few positions; the second time all stages are done."""
    pytest.importorskip("matplotlib")
    text = (ROOT / "demo.py").read_text(encoding="utf-8")
    for usual, shorter in (("2400, 200", "100, 1"), ("--documents 1800", "--documents 60"),
                           ("--positions 500", "--positions 20")):
        assert usual in text
        text = text.replace(usual, shorter)
    command = [sys.executable, "-c", text, "--out-dir", str(tmp_path / "run"), "--control"]
    for turn in range(2):
        finished = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert finished.stdout.count("done before") == 11 * turn
    for name in ("rpt/curves.png", "rpt/results.json", "control/results.json", "control/table1.png"):
        assert (tmp_path / "run" / name).stat().st_size > 100
    results = json.loads((tmp_path / "run" / "control" / "results.json").read_text())
    assert {os.path.relpath(line["checkpoint"], tmp_path / "run").split("/")[0] for line in results} == {
        "base", "control", "mixed", "rpt"}
