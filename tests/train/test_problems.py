"""What the user can put right is one line on stderr that names the key, exit code 2, and nothing on disk."""

import math
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from distclip import MaxNorm
from distclip.cli import main
from distclip.train.parse import read_config
from support.programs import play, torchrun_environment
from support.ranks import LIMIT
from train.commands import CONFIGS, ROOT

QUICKSTART, CLASSIFIER, DIGITS = "quickstart.yaml", "classifier.yaml", "digits.yaml"

linux = pytest.mark.skipif(not Path("/proc/self").exists(), reason="of Linux: what not even root may write")

PROBLEMS = [
    (QUICKSTART, ["clip.max_nrom=1"], ["clip.max_nrom", "did you mean clip.max_norm?"]),
    (QUICKSTART, ["clips.max_norm=1"], ["clips", "did you mean clip?"]),
    (QUICKSTART, ["data.text_column=text"], ["data.text_column", "no such key"]),  # another task's
    (QUICKSTART, ["train.steps=many"], ["train.steps", "int or null", "'many'"]),
    (QUICKSTART, ["train.steps=1.5"], ["train.steps", "int or null", "1.5"]),
    (QUICKSTART, ["train.steps=0"], ["train.steps", "at least 1"]),
    (QUICKSTART, ["train.steps=null", "train.epochs='2'"], ["train.epochs", "int or null", "'2'"]),
    (QUICKSTART, ["seed=null"], ["seed", "must be int, not None"]),
    (QUICKSTART, ["optim.betas=[null, 1]"], ["optim.betas", "a list of float"]),
    (QUICKSTART, ["optim.weight_decay=.inf"], ["optim.weight_decay", "finite"]),
    (QUICKSTART, ["name={{class_path: os.system}}"], ["name", "must be str"]),
    (QUICKSTART, ["data.suffixes=.py"], ["data.suffixes", "a list of str"]),
    (QUICKSTART, ['name="a\\nb"'], ["name", "can be printed", "'a\\nb'"]),
    (QUICKSTART, ["name=" + "x" * 201], ["name", "at most 200 bytes"]),
    (QUICKSTART, ["clip.policy=autoclip", "clip.window=10_000_000"], ["clip.window", "at most 1e6"]),
    (QUICKSTART, ["model.width=1_000_000"], ["model.width", "between 1 and 65536"]),
    (QUICKSTART, ["run.dir=" + "x" * 300], ["run.dir", "File name too long"]),
    (QUICKSTART, ["data.path=" + "x" * 300], ["data.path", "File name too long"]),
    (QUICKSTART, ["train.epochs=2"], ["train.steps", "either steps or epochs"]),
    (QUICKSTART, ["train.batch_size=null"], ["train.batch_size", "is missing"]),
    (QUICKSTART, ["train=5"], ["train", "section"]),
    (QUICKSTART, ["seed.x=5"], ["seed.x", "not a section"]),
    (
        QUICKSTART,
        ["clip.policy=hard"],
        ["clip.policy", "must be one of adagc, ", "zclip", "none, not 'hard'"],
    ),
    (QUICKSTART, ["clip.policy=value"], ["clip.clip_value", "clip.policy=value needs it"]),
    (QUICKSTART, ["clip.max_norm=-1"], ["clip.max_norm", "must be above 0"]),
    (QUICKSTART, ["clip.max_norm=-inf"], ["clip.max_norm", "must be above 0"]),
    (QUICKSTART, ["clip.max_norm=.nan"], ["clip.max_norm", "must be above 0"]),
    (QUICKSTART, ["clip.window=5"], ["clip.window", "no such key", "max_norm", "nonfinite"]),
    (QUICKSTART, ["clip.policy=zclip", "clip.alpha=2"], ["clip.alpha", "2"]),
    (QUICKSTART, ["clip.chain=[1.0, {{policy: zclip, window: 3}}]"], ["clip.chain[1].window", "no such key"]),
    (
        QUICKSTART,
        ["clip.per_group={{a: {{patterns: heads.*, max_norm: 1}}}}"],
        ["clip.per_group.a.patterns", "no parameter matches 'heads.*'", "tokens.weight"],
    ),
    (
        QUICKSTART,
        ["clip.per_group={{a: {{patterns: head.*, max_norm: 1}}, b: {{patterns: '*', policy: none}}}}"],
        ["clip.per_group.b.patterns", "head.weight is in the group a already"],
    ),
    (
        QUICKSTART,
        ["clip.policy=skip_spikes", "clip.on=[reward]"],
        ["clip", "asks for the signal reward: the trainer has loss"],
    ),
    (
        QUICKSTART,
        ["clip.policy=skip_spikes", "clip.on=[loss]", "parallel.strategy=zero1", "optim.fused=false"],
        ["clip", "asks for the signal loss, which DeepSpeed does not pass"],
    ),
    (QUICKSTART, ["clip.verify_every=0"], ["clip.verify_every", "must be positive, not 0"]),
    (
        QUICKSTART,
        ["clip.verify_every=5", "parallel.strategy=zero1", "optim.fused=false"],
        ["clip.verify_every", "does not go with DeepSpeed: leave it out"],
    ),
    (QUICKSTART, ["clip.watch=norms"], ["clip.watch", "must be parameters, or a list of patterns", "'norms'"]),
    (QUICKSTART, ["clip.watch=[]"], ["clip.watch", "a list of patterns"]),
    (QUICKSTART, ["clip.watch=[5]"], ["clip.watch", "a list of str", "[5]"]),
    (QUICKSTART, ["clip.watch=[head.*, heads.*]"], ["clip.watch", "no parameter matches 'heads.*'", "tokens.weight"]),
    (QUICKSTART, ["optim.lr=0"], ["optim.lr", "must be a positive finite number"]),
    (QUICKSTART, ["optim.lr=inf"], ["optim.lr", "must be a positive finite number"]),
    (QUICKSTART, ["optim.betas=[0.9]"], ["optim.betas", "a list of float"]),
    (QUICKSTART, ["optim.name=sgd"], ["optim.fused", "no fused SGD"]),
    (QUICKSTART, ["model.heads=5"], ["model.heads", "must divide model.width=96"]),
    (QUICKSTART, ["task=chess"], ["task", "text, rows, digits"]),
    (QUICKSTART, ["name=a/b"], ["name", "'a/b'"]),
    (QUICKSTART, ["train.steps"], ["train.steps", "key=value"]),
    (QUICKSTART, ["--verbose"], ["--verbose", "key=value"]),
    (QUICKSTART, ["data.length=]"], ["data.length", "cannot read"]),
    (QUICKSTART, ["parallel.processes=1000"], ["parallel.processes", "1000 is more than"]),
    (QUICKSTART, ["parallel.processes=0"], ["parallel.processes", "at least 1"]),
    (QUICKSTART, ["parallel.device=cuda"], ["parallel.device", "2 processes need as many GPUs, this machine has none"]),
    ("gpu/fsdp2.yaml", [], ["parallel.device", "8 processes need as many GPUs, this machine has none", "cpu"]),
    (QUICKSTART, ["parallel.strategy=none"], ["parallel.strategy", "never meet"]),
    (QUICKSTART, ["parallel.processes=3"], ["train.batch_size", "32", "3 processes"]),
    (QUICKSTART, ["train.batch_size=100000"], ["train.batch_size", "training samples"]),
    (QUICKSTART, ["resume=true"], ["resume", "run.dir"]),
    (QUICKSTART, ["data.path={tmp}/nowhere"], ["data.path", "{tmp}/nowhere does not exist"]),
    (QUICKSTART, ["data.path={tmp}/empty"], ["data.path", "{tmp}/empty holds no text", ".py"]),
    (QUICKSTART, ["data.path={tmp}/binary.txt"], ["data.path", "{tmp}/binary.txt is no UTF-8 text"]),
    (QUICKSTART, ["data.path={tmp}/noise"], ["data.path", "{tmp}/noise/", ".txt is no UTF-8 text"]),
    (QUICKSTART, ["data.path={tmp}/short.txt"], ["data.path", "{tmp}/short.txt", "too little text"]),
    (QUICKSTART, ["run.dir={tmp}/short.txt/run"], ["run.dir", "cannot write to {tmp}/short.txt"]),
    pytest.param(QUICKSTART, ["run.dir=/proc/run"], ["run.dir", "cannot write to /proc: "], marks=linux),
    pytest.param(QUICKSTART, ["run.root=/proc/runs"], ["run.root", "cannot write to /proc: "], marks=linux),
    (QUICKSTART, ["run.dir={tmp}/used"], ["run.dir", "{tmp}/used is not empty", "resume=true"]),
    (CLASSIFIER, ["data.path={tmp}/rows.csv"], ["data.text_column", "no column 'text'", "comment_text, toxic"]),
    (
        CLASSIFIER,
        ["data.path={tmp}/rows.csv", "data.text_column=comment_text"],
        ["data.label_column", "no column 'label'"],
    ),
    (
        CLASSIFIER,
        ["data.path={tmp}/rows.csv", "data.text_column=comment_text", "data.label_column=toxic"],
        ["data.label_column", "{tmp}/rows.csv, line 3", "'maybe' is not 0 or 1"],
    ),
    (CLASSIFIER, ["data.path={tmp}/nothing.csv"], ["data.path", "{tmp}/nothing.csv is empty"]),
    (CLASSIFIER, ["data.path={tmp}/header.csv"], ["data.path", "{tmp}/header.csv has too few rows (0)"]),
    (CLASSIFIER, ["data.path={tmp}/twice.csv"], ["data.label_column", "{tmp}/twice.csv has several columns 'label'"]),
    (CLASSIFIER, ["data.path={tmp}/one.csv"], ["data.label_column", "all 16 rows to train on are labelled 0"]),
    (
        CLASSIFIER,
        ["data.path={tmp}/latin.csv"],
        ["data.encoding", "{tmp}/latin.csv, line 2: byte 0xe9 is not utf-8", "such as latin-1"],
    ),
    (CLASSIFIER, ["data.path={tmp}/one.csv", "data.encoding=utf-16"], ["data.encoding", "is not utf-16", "BOM"]),
    (CLASSIFIER, ["data.path={tmp}/one.csv", "data.encoding=klingon"], ["data.encoding", "'klingon'"]),
    (CLASSIFIER, ["data.path={tmp}/binary.txt"], ["data.path", "{tmp}/binary.txt, line 1: a NUL", "no CSV file"]),
    (CLASSIFIER, ["data.path=missing.csv"], ["data.path", "missing.csv (in {tmp}) is not a file"]),
    (QUICKSTART, ["data.path=missing"], ["data.path", "missing (in {tmp}) does not exist"]),
    (CLASSIFIER, ["data.path={tmp}/missing.csv"], ["data.path", "{tmp}/missing.csv is not a file"]),
    (CLASSIFIER, ["data.path=" + "x" * 300], ["data.path", "File name too long"]),
    (CLASSIFIER, ["data.path=null"], ["data.path", "is missing"]),
    (CLASSIFIER, ["model.dropout=1"], ["model.dropout", "[0, 1)"]),
    (DIGITS, ["data.pixels=5"], ["data.pixels", "must divide 64"]),
    (QUICKSTART, ["parallel.tensor=2", "parallel.processes=3"], ["parallel.processes", "3", "use a multiple of 2"]),
    (QUICKSTART, ["parallel.tensor=3"], ["parallel.tensor", "3 does not divide model.heads=4"]),
    (QUICKSTART, ["parallel.tensor=2", "model.experts=2"], ["parallel.tensor", "set model.experts=0"]),
    (QUICKSTART, ["parallel.tensor=0"], ["parallel.tensor", "at least 1"]),
    (QUICKSTART, ["parallel.tensor=2", "optim.name=sgd", "parallel.strategy=ddp"], ["optim.fused", "no fused SGD"]),
    (QUICKSTART, ["parallel.pipeline=4"], ["parallel.pipeline", "4 stages", "model.layers, not 3"]),
    (QUICKSTART, ["parallel.pipeline=2", "train.batch_size=33"], ["train.batch_size", "33", "use a multiple of 2"]),
    (QUICKSTART, ["parallel.pipeline=2", "parallel.microbatches=1"], ["parallel.microbatches", "at least 2 with 1f1b"]),
    (QUICKSTART, ["parallel.microbatches=2"], ["parallel.microbatches", "set parallel.pipeline"]),
    (QUICKSTART, ["parallel.replicate=3"], ["parallel.replicate", "3 does not divide the 2 data-parallel"]),
    (QUICKSTART, ["parallel.replicate=2", "parallel.strategy=ddp"], ["parallel.replicate", "needs", "fsdp2"]),
    (QUICKSTART, ["parallel.expert=2"], ["parallel.expert", "set model.experts"]),
    (QUICKSTART, ["parallel.expert=2", "model.experts=3"], ["parallel.expert", "does not divide model.experts=3"]),
    (QUICKSTART, ["parallel.expert=3", "model.experts=3"], ["parallel.expert", "3 does not divide the 2"]),
    (QUICKSTART, ["parallel.expert=2", "parallel.tensor=2"], ["parallel.expert", "parallel.tensor"]),
    (QUICKSTART, ["clip.fingerprint_every=0"], ["clip.fingerprint_every", "must be positive, not 0"]),
    (
        QUICKSTART,
        ["clip.fingerprint_every=5", "parallel.strategy=zero1", "optim.fused=false"],
        ["clip.fingerprint_every", "does not go with DeepSpeed"],
    ),
    (QUICKSTART, ["parallel.strategy=zero1", "parallel.tensor=2"], ["parallel.tensor", "does not go with zero1"]),
    (QUICKSTART, ["model.top_k=2"], ["model.top_k", "between 1 and 1"]),
    (CLASSIFIER, ["parallel.tensor=2"], ["parallel.tensor", "task=text", "task=rows"]),
    (DIGITS, ["parallel.pipeline=2"], ["parallel.pipeline", "task=text", "task=digits"]),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with things that are wrong."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "rows.csv").write_text("comment_text,toxic\nfine,0\nhm,maybe\n")
    (tmp_path / "nothing.csv").write_text("")
    (tmp_path / "header.csv").write_text("text,label\n")
    (tmp_path / "twice.csv").write_text("text,label,label\nfine,0,1\n")
    (tmp_path / "one.csv").write_text("text,label\n" + "fine,0\n" * 20)
    (tmp_path / "latin.csv").write_bytes("text,label\ncaf\xe9,0\n".encode("latin-1"))
    (tmp_path / "binary.txt").write_bytes(b"\x7fELF\0\0" + b"text,label" * 1000)
    (tmp_path / "noise").mkdir()
    for name in "ab":
        (tmp_path / "noise" / f"{name}.txt").write_bytes(Random(name).randbytes(4000).replace(b"\0", b"\xff"))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("")
    return tmp_path


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What `distclip train` says after it has refused, in one line and nowhere else."""
    assert main(["train", *words]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.endswith("\n")
    assert output.err.count("\n") == 1, output.err
    return output.err


@pytest.mark.parametrize(("config", "words", "parts"), PROBLEMS, ids=str)
def test_a_problem_is_one_line_that_names_the_key(config, words, parts, here, capsys):
    before = sorted(here.rglob("*"))
    words = [word.format(tmp=here) for word in words]
    key, *others = (part.format(tmp=here) for part in parts)
    message = complaint(capsys, str(CONFIGS / config), *words)
    assert message.startswith(f"distclip: {key}: ")
    for part in others:
        assert part in message
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("task: [", "not YAML"),
        ("task: \xff", "not YAML"),
        ("- task", "a mapping"),
        ("", "a mapping"),
        ("name: x", "task: must be one of"),
        ("task: digits", "name: is missing"),
        ("task: digits\nname: x", "train.batch_size: is missing"),
        ("task: rows\nname: x", "data.path: is missing"),
        ("task: digits\nname: 3\ntrain: {batch_size: 1, steps: 1}\noptim: {lr: 1}", "name: must be str, not 3"),
        ("task: &a [*a]", "line 1: aliases such as *a are not read"),
        ("task: digits\ntask: text", "line 2: task is given twice"),
        ("task: !!python/object/apply:os.system [exit]", "line 1: tags such as"),
        ("task: " + "[" * 30, "line 1: more than 20 levels deep"),
        ("task: 0x" + "f" * 20, "line 1: a number beyond 64 bits"),
        ("task: " + "9" * 5000, "line 1: no number: '999"),
        ("# " + "x" * 100_000, "more than the 100,000 bytes"),
        ('task: "\\0"', "line 1: a NUL character"),
        ('task: "\\ud800"', "line 1: half a character"),
    ],
)
def test_a_bad_file_is_one_line(text, part, here, capsys):
    (here / "bad.yaml").write_text(text, encoding="latin-1")
    assert part in complaint(capsys, str(here / "bad.yaml"))


def test_a_missing_file_is_one_line(here, capsys):
    assert "distclip: nowhere.yaml: there is no such config file" in complaint(capsys, "nowhere.yaml")


def test_a_folder_in_place_of_a_config_is_one_line(here, capsys):
    assert complaint(capsys, "empty").startswith("distclip: empty: is a folder: name a config in it, such as ")


def test_no_config_is_one_line_that_asks_for_nothing_else(capsys):
    with pytest.raises(SystemExit):
        main(["train"])
    assert capsys.readouterr().err == "distclip: the following arguments are required: CONFIG\n"


def test_no_command_is_one_line_that_names_them_all(capsys):
    with pytest.raises(SystemExit):
        main([])
    said = capsys.readouterr().err
    assert said == "distclip: no command: choose train, report, diff, bench, doctor or inspect; see distclip --help\n"


@linux
def test_a_full_disk_is_one_line(here, capsys, monkeypatch):
    """A file without a name can be made there, but holds nothing."""
    monkeypatch.setattr("distclip.train.folder.TemporaryFile", lambda dir: open("/dev/full", "wb"))  # noqa: SIM115
    assert "distclip: run.root: cannot write to " in (message := complaint(capsys, str(CONFIGS / DIGITS)))
    assert message.endswith(": No space left on device\n")


def test_a_resumed_run_must_stay_the_same(here, capsys):
    (here / "run").mkdir()
    old = (CONFIGS / DIGITS).read_text().replace("lr: 0.1", "lr: 0.2")
    (here / "run" / "config.yaml").write_text(old)
    message = complaint(capsys, str(CONFIGS / DIGITS), f"run.dir={here}/run", "resume=true")
    assert "optim.lr: cannot change in a resumed run: 0.1 here, 0.2 in" in message


def test_a_config_needs_no_seed(here):
    """A key outside of the sections had no default: all comparisons with None were a traceback."""
    text = (CONFIGS / DIGITS).read_text()
    (here / "config.yaml").write_text(text.replace("seed: 0\n", ""))
    assert read_config(here / "config.yaml") == read_config(CONFIGS / DIGITS)


def test_numbers_need_no_dot(here):
    assert read_config(CONFIGS / DIGITS, ["optim.lr=1e-3"]).optim.lr == 1e-3


def test_no_bound_is_spelled_as_in_python_too(here):
    """It was "must be float, not 'inf'", for YAML spells it .inf."""
    spelled = [read_config(CONFIGS / DIGITS, [f"clip.max_norm={text}"]).clip.policy for text in ("inf", ".inf")]
    assert spelled == [MaxNorm(math.inf)] * 2


CONTENTS = {
    "config.yaml": (
        "task: digits\nname: x",
        "{run}/config.yaml: not the config of a run that can go on: train.batch_size",
    ),
    "metrics.jsonl": ('{"step": 1}\n', "{run}/metrics.jsonl, line 1: is not the record of a step"),
    "summary.json": (None, "{run}/summary.json: is no file"),
    "checkpoints": ("", "{run}/checkpoints: is no folder"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_run_does_not_go_on_in_a_folder_that_is_not_its_own(name, here, capsys):
    content, part = CONTENTS[name]
    run = here / "run"
    run.mkdir()
    words = [str(CONFIGS / DIGITS), f"run.dir={run}", "resume=true"]
    if content is None:
        (run / name).mkdir()
    else:
        (run / name).write_text(content)
    assert part.format(run=run) in complaint(capsys, *words)


@pytest.mark.parametrize("name", [*CONTENTS, "metrics.tmp", "checkpoints/step-00000001"])
def test_a_run_does_not_follow_links_out_of_its_folder(name, here, capsys):
    link = here / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(here / "empty")
    message = complaint(capsys, str(CONFIGS / DIGITS), f"run.dir={here}/run", "resume=true")
    assert f"{link}: is a link" in message


@pytest.mark.parametrize("text", ["", "two", "-1", "9" * 30])
def test_a_launcher_that_is_none_is_one_line(text, here, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", text)
    assert f"WORLD_SIZE: a launcher puts a number there, not {text!r}" in complaint(capsys, str(CONFIGS / DIGITS))


@pytest.mark.parametrize("rank", ["2", "7"])
def test_a_rank_outside_of_its_world_speaks_for_itself(rank, here, capsys, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert f"RANK: {rank} is not one of WORLD_SIZE=2" in complaint(capsys, str(CONFIGS / DIGITS))


def test_each_machine_says_what_is_wrong_with_it_once(here, capsys, monkeypatch):
    """Where only the second lacked its GPUs or its data, rank 0 had nothing to say, and nobody said why it ended."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    said = {}
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank % 2))
        assert main(["train", str(CONFIGS / "gpu/fsdp2.yaml"), "parallel.processes=4"]) == 2
        said[rank] = capsys.readouterr().err
    assert said[0] == said[2]
    assert said[0].startswith("distclip: parallel.device: cuda: 2 processes need as many GPUs, this machine has none")
    assert said[1] == said[3] == ""


def test_a_rank_without_a_world_speaks_for_itself(here, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    complaint(capsys, str(CONFIGS / DIGITS), "seed=-1")


def test_the_launcher_has_the_last_word_on_the_number_of_ranks(here, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = complaint(capsys, str(CONFIGS / QUICKSTART), "parallel.processes=3")
    assert message.startswith("distclip: parallel.processes: asks for 3 but the launcher started 2")


def test_zero_without_deepspeed_is_one_line(here, capsys, monkeypatch):
    monkeypatch.setattr("distclip.train.ways.zero.find_spec", lambda name: None)
    message = complaint(capsys, str(CONFIGS / "zero2.yaml"))
    assert message == 'distclip: parallel.strategy: zero2 needs DeepSpeed: pip install "distclip[deepspeed]"\n'


WITHOUT_EXTRA = """
import sys
from distclip.cli import main
OPTIONAL = ("jsonargparse", "yaml", "rich", "sklearn")
for missing in OPTIONAL:
    for name in [n for n in sys.modules if n.partition(".")[0] in OPTIONAL or n.startswith("distclip.train")]:
        del sys.modules[name]
    sys.modules[missing] = None
    assert main(["train", "{config}"]) == 2
"""


def test_a_missing_package_is_one_line(tmp_path):
    """In a process of its own, for it forgets modules that other tests hold on to."""
    program = tmp_path / "program.py"
    program.write_text(WITHOUT_EXTRA.format(config=CONFIGS / DIGITS))
    codes, said = play(program, None, [str(ROOT)], LIMIT)
    packages = ["jsonargparse", "PyYAML", "rich", "scikit-learn"]
    assert (codes, said.splitlines()) == (
        [0],
        [f'distclip: training needs {package}: pip install "distclip[train]"' for package in packages],
    )


def test_the_package_itself_needs_no_extra():
    probe = "import sys, distclip.cli; print([m for m in sys.argv[1:] if m in sys.modules])"
    optional = ["distclip.train.start", "jsonargparse", "yaml", "rich", "sklearn"]
    command = [sys.executable, "-c", probe, *optional]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_under_torchrun_one_rank_speaks_for_all(here, capsys, monkeypatch):
    for rank in range(2):
        for name, value in torchrun_environment(rank, 2, 1).items():
            monkeypatch.setenv(name, value)
        assert main(["train", str(CONFIGS / QUICKSTART), "clip.max_norm=-1"]) == 2
    assert capsys.readouterr().err.count("clip.max_norm: must be above 0") == 1
