"""The command itself: started alone and by torchrun, stopped by signals, gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distclip import __version__
from distclip.cli import main
from distclip.train import launch
from distclip.train.begun import has_begun, say_begun
from distclip.train.stop import STOP_SIGNALS
from support.listening import LOOPBACK, descendants, listening
from support.programs import play
from train.commands import CONFIGS, ROOT, TINY, metrics, numbers, start

LONG = [*TINY, "train.steps=100000", "train.log_every=1000"]


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks into /proc")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
PATIENCE = 200  # seconds: what takes 3 on a quiet machine has taken 60 on a busy one


@pytest.fixture
def run() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`start`, and no process is left behind: SIGTERM lets the command end its ranks, which SIGKILL would not."""
    processes = []

    def started(*words: str | Path, launcher: list[str] | None = None) -> subprocess.Popen[str]:
        processes.append(start(*words, launcher=launcher))
        return processes[-1]

    yield started
    for process in processes:
        process.terminate()
        process.communicate()


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, output, errors


def wait_for_steps(folder: Path, steps: int, process: subprocess.Popen[str]) -> set[str]:
    """Where the process, and all that it has started, have listened until then."""
    seen: set[str] = set()
    deadline = time.monotonic() + PATIENCE
    while not ((folder / "metrics.jsonl").exists() and len(metrics(folder)) >= steps):
        seen |= listening(descendants(process.pid))
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no step was taken"
        time.sleep(0.25)
    return seen


def play_here(folder: Path, program: str, ranks: int | None = None) -> tuple[list[int], str]:
    """`play` a program that is given as text."""
    (folder / "program.py").write_text(program)
    return play(folder / "program.py", ranks, [str(ROOT)], PATIENCE)


def under_torchrun(folder: Path, *words: str, before: str = "") -> tuple[list[int], str]:
    """The quickstart on two ranks: their exit codes and all that they print."""
    command = ["train", str(CONFIGS / "quickstart.yaml"), *words]
    main = f"{before}\nimport sys\nfrom distclip.cli import main\nsys.exit(main({command!r}))\n"
    return play_here(folder, main, ranks=2)


@linux
def test_the_command_stops_all_ranks_after_the_same_step_on_ctrl_c_and_goes_on_as_if_never_stopped(run, tmp_path: Path):
    folder, other = tmp_path / "run", tmp_path / "torchrun"
    words = [*TINY, "train.log_every=2", "clip.fingerprint_every=2"]
    process = run("train", CONFIGS / "quickstart.yaml", *words, "train.steps=100000", f"run.dir={folder}")
    seen = wait_for_steps(folder, 5, process)
    os.killpg(process.pid, signal.SIGINT)
    code, output, errors = finish(process)
    assert (code, errors) == (130, "")  # torch's launcher logged into the middle of the display
    assert set() < seen <= LOOPBACK, "Gloo listens somewhere, or this test sees nothing"
    steps = [record["step"] for record in metrics(folder)]
    assert steps == list(range(1, len(steps) + 1))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{steps[-1]:08d}"]
    assert json.loads((folder / "summary.json").read_text())["status"] == "stopped by SIGINT"
    assert f"report   {folder}/report.html" in "".join(output.split("\n"))
    assert (folder / "report.html").is_file()

    (line,) = (line for line in output.splitlines() if line.startswith("go on with: "))
    last = steps[-1] // 2 * 2 + 4
    command = f"{line.removeprefix('go on with: ')} train.steps={last}"
    pasted = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert (pasted.returncode, pasted.stderr) == (0, "")
    assert_finished(folder, pasted.stdout, steps[-1], last)

    codes, said = under_torchrun(tmp_path, *words, f"train.steps={last}", f"run.dir={other}")
    assert codes == [0, 0], said
    assert numbers(folder) == numbers(other)
    assert metrics(folder)[-1]["fingerprint"] == metrics(other)[-1]["fingerprint"]


def assert_finished(folder: Path, output: str, first: int, last: int) -> None:
    """The run went on after step ``first`` and took step ``last``."""
    records = metrics(folder)
    assert [record["step"] for record in records] == list(range(1, last + 1))
    assert [record["step"] for record in records if "fingerprint" in record] == list(range(2, last + 1, 2))
    assert "fingerprint/head.weight" in records[3]
    names = ["checkpoints", "config.yaml", "metrics.jsonl", "report.html", "summary.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert "2 (fsdp2) on cpu, collectives by gloo" in output
    lines = [int(line.split()[1].partition("/")[0]) for line in output.splitlines() if line.startswith("step ")]
    assert lines == [step for step in range(first + 1, last + 1) if step % 2 == 0 or step == first + 1]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert f"{summary['held_out_loss']:.4f}" in output
    assert f"{summary['entropy']:.4f}" in output


ENDING = """
import atexit, sys
import distclip.__main__ as entry

class Held:
    def __del__(self):
        print("finalized")

def main():
    print("worked")
    return 7

held, entry.main = Held(), main
atexit.register(print, "at exit")
sys.exit(entry.run())
"""


def test_a_rank_ends_before_the_interpreter_does():
    """In whose end a thread of Gloo that still holds the last barrier is a SIGABRT."""
    done = subprocess.run(
        [sys.executable, "-c", ENDING], env=ENVIRONMENT | {"RANK": "0"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "worked\nat exit\n", "")


HEAD = """
import os, sys, threading

def read():
    with os.fdopen(reader) as lines:
        for _ in range(4):
            lines.readline()

if os.environ["RANK"] == "0":
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(writer)
    sys.stdout = open(1, "w", closefd=False)
    threading.Thread(target=read, daemon=True).start()
"""


def test_a_reader_that_has_seen_enough_ends_training_quietly_with_a_checkpoint(tmp_path: Path):
    """As `| head -4`."""
    folder = tmp_path / "run"
    words = [*TINY, "train.steps=100000", "train.log_every=1", f"run.dir={folder}"]
    assert under_torchrun(tmp_path, *words, before=HEAD) == ([129, 129], "")
    steps = len(metrics(folder))
    assert 0 < steps < 100000
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{steps:08d}"]


UNREAD = """
import os, sys
from distclip.cli import main
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 1)
sys.stdout = open(1, "w", closefd=False)
sys.exit(main(["bench", "--list"]))
"""


def test_what_nobody_reads_is_no_error(tmp_path: Path):
    assert play_here(tmp_path, UNREAD) == ([141], "")


def test_without_a_standard_output_nothing_is_printed():
    command = f"{sys.executable} -m distclip bench --list >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (0, "")


def blocked(pid: int) -> int:
    """The mask of signals that wait, of a process that has just begun."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigBlk"))


@linux
@pytest.mark.parametrize(
    "directly",
    [
        pytest.param(False, id="SIGTERM to the command", marks=pytest.mark.thorough),
        pytest.param(True, id="Ctrl-C to its ranks"),
    ],
)
def test_a_signal_waits_for_ranks_that_are_still_starting(directly, run, tmp_path: Path):
    folder = tmp_path / "run"
    process = run("train", CONFIGS / "quickstart.yaml", *LONG, f"run.dir={folder}")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    waiting = sum(1 << (number - 1) for number in STOP_SIGNALS)  # just those: before it is a rank, all signals wait
    while len(ranks := children.read_text().split()) < 2 or any(blocked(int(rank)) != waiting for rank in ranks):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    for pid in map(int, ranks) if directly else [process.pid]:
        os.killpg(pid, signal.SIGINT if directly else signal.SIGTERM)
    code, _, errors = finish(process)
    aborted = directly and "killed by SIGABRT" in errors  # Gloo's threads, at a rank's very end
    assert code == (130 if directly else 143) or aborted, errors
    assert "Traceback" not in errors
    steps = len(metrics(folder))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{steps:08d}"]
    assert steps == 1 or not directly  # the launcher looks 10 times a second whether they train


SLOW = """
import os, signal, sys, time

def save(*_):
    open(f"saved-{rank}", "w").close()
    sys.exit(143)

rank = os.environ["RANK"]
open(f"starting-{rank}", "w").close()
while not os.path.exists("go"):  # a signal would be the end of it
    time.sleep(0.01)
signal.signal(signal.SIGTERM, save)
meeting = os.path.dirname(os.environ["DISTCLIP_MEETING_POINT"].removeprefix("file://"))
open(f"{meeting}/begun-{os.getpid()}", "w").close()  # say_begun, without importing torch
while True:
    time.sleep(0.01)
"""
LAUNCHER = f"""
import os, signal, sys, threading, time
from pathlib import Path
from distclip.train import launch

def stop():
    while len(list(Path().glob("starting-*"))) < 2:
        time.sleep(0.01)
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
    Path("go").touch()

threading.Thread(target=stop, daemon=True).start()
launch.RANK = {SLOW!r}
sys.exit(launch.launch(2, [], restarts=0))
"""


@linux
def test_no_rank_is_killed_because_it_starts_slowly(tmp_path: Path):
    """The launcher passed a signal on at once, and killed 30 s later what had not saved: at load 40, all ranks."""
    assert play_here(tmp_path, LAUNCHER) == ([143], "")
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_a_rank_that_has_begun_is_known_by_its_process(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("DISTCLIP_MEETING_POINT", f"file://{tmp_path}/ranks")
    assert not has_begun(os.getpid(), tmp_path)
    say_begun()
    assert has_begun(os.getpid(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"begun-{os.getpid()}"]


STUBBORN = (
    "import signal, sys, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(60) # rank"
)
WILLING = (
    "import signal, sys, time; signal.signal(15, lambda *_: (time.sleep(1), sys.exit(3)));"
    "print('ready', flush=True); time.sleep(60) # rank"
)


@linux
@pytest.mark.parametrize(("rank", "patience", "code"), [(WILLING, 1000.0, 3), (STUBBORN, 0.5, -9)])
def test_ranks_that_the_launcher_does_not_know_of_yet_get_the_signal_too(rank, patience, code, monkeypatch):
    """It forgot those that it was starting when the signal came: they trained on, and the command never ended."""
    monkeypatch.setattr(launch, "RANK", rank)
    monkeypatch.setattr(launch, "SHUTDOWN", patience)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    ranks = [subprocess.Popen([sys.executable, "-c", rank], stdout=subprocess.PIPE) for _ in range(2)]
    for process in ranks:
        process.stdout.readline()
    launch.end_forgotten(signal.SIGTERM)
    for process in ranks:
        process.communicate(timeout=PATIENCE)
    assert [process.returncode for process in ranks] == [code] * 2
    assert other.poll() is None, "it is no rank"
    other.kill()
    other.wait()


KILLED = """
import os, sys
from distclip.train import launch
terminal, writer = os.openpty()
os.dup2(writer, 1)
launch.RANK = "import os; print('\\033[?25l', flush=True); os.kill(os.getpid(), 9)"
code = launch.launch(1, [], restarts=0)
os.close(1), os.close(writer)
try:
    while shown := os.read(terminal, 1000):  # may be less than was written: the kernel passes it on in its own time
        os.write(2, shown)
except OSError:  # the end, as Linux says it
    pass
sys.exit(code)
"""


@linux
def test_a_rank_that_is_killed_leaves_a_whole_terminal_and_one_line(tmp_path: Path):
    """Torch's launcher logged it too, and the cursor stayed hidden."""
    codes, said = play_here(tmp_path, KILLED)
    line, _, shown = said.partition("\n")
    assert (codes, line) == ([1], "distclip: rank 0 failed, killed by SIGKILL")
    assert shown.startswith("\033[?25l")
    assert shown.endswith("\033[?25h")


def test_a_failure_in_training_is_exit_code_1_and_one_line(tmp_path: Path):
    words = [*TINY, "optim.lr=1e30", "clip.nonfinite=raise", "train.steps=9", f"run.dir={tmp_path / 'run'}"]
    codes, said = under_torchrun(tmp_path, *words)
    assert 1 in codes, said  # the other is stopped, or was as fast
    assert said.count("distclip: training failed: ") == 1
    assert "Traceback" not in said


def test_version_and_help_need_no_config(capsys: pytest.CaptureFixture[str]):
    for words in (["--version"], ["--help"], ["train", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith(f"distclip {__version__}\n")
    for part in ("distclip train configs/quickstart.yaml", "torchrun --nproc-per-node 2", "exit codes", "143"):
        assert part in output
    assert max(map(len, output.splitlines())) <= 110
