"""Shows that each command says what is so, to people and to scripts, and how it ends when it can't.

The run is a real one, saved by the Checkpointer, with every kind of tensor that a state may hold.
"""

from __future__ import annotations

import errno
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import deeds
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from trainers import HeldAgent, Job, end_agents, eventually

from handfast.agent.joining import node_label
from handfast.agent.process import meeting_place
from handfast.checkpoint import agents as ask_agents
from handfast.checkpoint import location
from handfast.checkpoint.reader import open_run
from handfast.cli import export as exporting
from handfast.cli.main import app
from handfast.core.lattice import Epoch
from handfast.errors import Damaged, FormatError, HandfastError, Refused
from handfast.store.files import Posix
from handfast.store.pins import pin
from handfast.testing.faults import FaultyFiles
from handfast.torch import Checkpointer, load

MAIN = [sys.executable, "-m", "handfast"]


class Tied(nn.Module):
    """Two names for one weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)


def odd_tensors() -> dict[str, Tensor]:
    """Tensors that other formats trip over."""
    return {
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        "bf16": torch.randn(4, 2).bfloat16(),
        "fp8": torch.randn(6).to(torch.float8_e4m3fn),
        "c64": torch.randn(2, 2, dtype=torch.complex64),
        "bool": torch.tensor([True, False]),
        "turned": torch.randn(3, 4).t(),
        "a/b": torch.arange(3),
        "u16": torch.tensor([1, 65535], dtype=torch.uint16),
    }


class Saved(NamedTuple):
    """A run, and what was saved last."""

    path: Path
    model: dict[str, Tensor]
    odd: dict[str, Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    """Three steps of a training of one process, ended."""
    path = tmp_path_factory.mktemp("cli") / "run"
    torch.manual_seed(0)
    model, odd = Tied(), odd_tensors()
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optimizer": optimizer, "odd": odd, "more": {"shape": [2, (3, 4)]}}
    with Checkpointer(path, state) as checkpointer:
        checkpointer.restore()
        for step in range(1, 4):
            model.head(model.norm(model.embed(torch.arange(4)))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            checkpointer.save(step, extra={"z": torch.tensor([1 + 2j], dtype=torch.complex128)})
    values = {name: value.clone() for name, value in model.state_dict().items()}
    yield Saved(path, values, odd)
    end_agents()


@pytest.fixture
def copy(saved: Saved, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(saved.path, tmp_path / "run"))


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def handfast(*args: object) -> Done:
    """Run a command in this process."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    return Done(result.exit_code, result.stdout, result.stderr)


def damage(run: Path, pattern: str, at: int = 4100) -> Path:
    """Flip a bit of the one file that matches."""
    (path,) = run.glob(f"domains/*/*/{pattern}")
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)
    return path


def same(one: Tensor, other: Tensor) -> bool:
    """To the last bit, NaN and all."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    views = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(*views)


# --- status -------------------------------------------------------------------------------------


def test_status_shows_the_run_at_a_glance(saved: Saved) -> None:
    """Line, proof, domains by epochs, and what the signs mean."""
    place = Path(meeting_place(f"{saved.path}\n{node_label()}"))
    eventually(lambda: not (place / "agent").exists())  # it ends once all is settled
    done = handfast("status", saved.path)
    assert done.code == 0, done
    assert "1/3, certified" in done.out
    assert "1/3, skew 0 steps" in done.out
    assert "none alive on this node" in done.out
    assert done.out.count("●") == 3 + 1
    assert "rank-00000-" in done.out
    assert done.err == ""


def test_status_for_scripts_is_one_json_value(saved: Saved) -> None:
    """Epochs by generation and step; verdicts and marks by name."""
    found = handfast("status", saved.path, "--json").json
    assert found["line"] == {"generation": 1, "step": 3}
    assert found["sound"] is True
    assert found["certified"] is True
    assert [row["verdict"] for row in found["epochs"]] == ["complete"] * 3
    (cell,) = found["epochs"][0]["cells"].values()
    assert cell["mark"] == "certified"
    assert found["domains"][0]["retained"][0] == {"generation": 1, "step": 1}


def test_status_names_what_is_lost(copy: Path) -> None:
    """A manifest that is gone is code 1, with the epoch and the file's fate."""
    next(copy.rglob("1-3.manifest")).unlink()
    done = handfast("status", copy)
    assert done.code == 1
    assert "epoch 1/3: its manifest is missing" in done.out
    assert "✗" in done.out
    assert "1/2, certified" in done.out


def test_status_fits_a_terminal_that_knows_ascii_only(saved: Saved) -> None:
    """An old console, or a log: other signs, no crash."""
    done = subprocess.run(
        [*MAIN, "status", str(saved.path)],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "# certified" in done.stdout
    assert done.stderr == ""


# --- verify -------------------------------------------------------------------------------------


def test_verify_of_a_sound_run_says_what_a_restore_would_take(saved: Saved) -> None:
    """By default of the line; of any step; of everything."""
    done = handfast("verify", saved.path)
    assert (done.code, done.err) == (0, "")
    assert "1/3: sound" in done.out
    assert "a restore would take 1/3" in done.out
    assert "1/2: sound" in handfast("verify", saved.path, "--step", 2).out
    assert "1/1, 1/2, 1/3: sound" in handfast("verify", saved.path, "--all").out.replace(
        "1/3, 1/2, 1/1", "1/1, 1/2, 1/3"
    )


def test_verify_of_a_damaged_run_ends_with_1_and_names_the_bytes(copy: Path) -> None:
    """File, chunk and offset, for people and for scripts."""
    path = damage(copy, "chunks/1-3.*")
    done = handfast("verify", copy)
    assert done.code == 1
    assert "corrupt" in done.out
    assert "a restore would take 1/2" in done.out
    found = handfast("verify", copy, "--json")
    assert found.code == 1
    (finding,) = found.json["findings"]
    assert (finding["path"], finding["chunk"], finding["offset"]) == (str(path), 0, 0)
    assert finding["verdict"] == "corrupt"
    assert (found.json["sound"], found.json["line"]["step"]) == (False, 2)
    assert handfast("verify", copy, "--step", "1/2").code == 0


@pytest.mark.parametrize("name", ["round.json", "round.lock"])
@pytest.mark.parametrize("what", ["empty", "directory"])
def test_verify_finds_what_would_refuse_a_start(name: str, what: str, copy: Path) -> None:
    """The record of launches, which no epoch needs: in one word by both, and how to mend it."""
    (copy / name).unlink()
    if what == "empty":
        (copy / name).touch()
    else:
        (copy / name).mkdir()
    sound = (name, what) == ("round.lock", "empty")  # as it should be
    for command in ("verify", "status"):
        done = handfast(command, copy, "--json")
        assert done.code == (0 if sound else 1)
        assert sound or "corrupt" in done.out
        assert sound or (name in done.out and "What to do: remove" in done.out)
    checkpointer = Checkpointer(copy, {"t": torch.zeros(1)})
    with pytest.raises(Refused) as caught:
        checkpointer.restore()
    assert caught.value.verdict == ("foreign" if sound else "corrupt")  # that is not what it saved
    assert sound or name in str(caught.value)
    checkpointer.close()


def test_long_work_shows_its_progress_on_a_terminal(saved: Saved) -> None:
    """And only there: a pipe gets the result and nothing else."""
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [*MAIN, "verify", str(saved.path)],
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        check=True,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        shown += part
    os.close(ours)
    assert "sound" in done.stdout
    assert b"verify" in shown


# --- how commands end ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["status", "verify", "inspect", "release"])
def test_no_run_is_could_not_look_and_says_what_to_do(command: str, tmp_path: Path) -> None:
    """Code 3 is no verdict on anybody's data."""
    done = handfast(command, tmp_path)
    assert (done.code, done.out) == (3, "")
    assert "holds no run" in done.err
    assert "What to do" in done.err
    assert handfast(command, tmp_path, "--json").json["exit_code"] == 3


def test_a_run_that_may_not_be_read_is_not_called_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's: "holds no run" sent people to look for another path."""

    def denied(path: str) -> list[str]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", denied)
        with pytest.raises(HandfastError, match=r"can't be read: Permission denied.*chmod u\+rx"):
            location._refuse(str(tmp_path))


@pytest.mark.parametrize(
    "args",
    [
        ("verify", "RUN", "--step", "newest"),
        ("verify", "RUN", "--step", "1" * 5000),
        ("export", "RUN", "OUT", "--to", "safetensors", "--step", "1/" + "1" * 5000),
        ("verify", "RUN", "--step", "1", "--all"),
        ("release", "RUN", "--keep-every", "2"),
        ("release", "RUN", "--keep-newest", "1", "--yes"),
        ("release", "RUN", "--unpin", "1-1-00.json"),
        ("export", "RUN", "OUT", "--to", "safetensors", "--only", "modle/**"),
        ("export", "RUN", "--to", "torch"),
        ("export", "RUN", "OUT"),
        ("export", "RUN", "OUT", "--to", "gguf"),
        ("export", "RUN", "OUT", "--to", "safetensors", "--component", "modle"),
        ("status",),
        ("tidy",),
    ],
    ids=lambda args: " ".join(args)[:60],
)
def test_wrong_usage_is_2(args: tuple[str, ...], saved: Saved, tmp_path: Path) -> None:
    """And nothing was done."""
    places = {"RUN": str(saved.path), "OUT": str(tmp_path / "out")}
    done = handfast(*(places.get(arg, arg) for arg in args))
    assert (done.code, done.out) == (2, "")
    assert done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_step_that_is_not_held_is_1_and_lists_those_that_are(saved: Saved, command: str) -> None:
    """A typo in a step is answered by the steps that there are."""
    done = handfast(command, saved.path, "--step", 9)
    assert done.code == 1
    assert "no domain holds step 9" in done.err
    assert "1/1, 1/2, 1/3" in done.err


def test_a_bug_of_ours_is_not_taken_for_damage(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python ends with 1 after a traceback, and 1 would condemn somebody's checkpoints."""
    monkeypatch.setattr(location, "read_domain", lambda *_: 1 / 0)
    done = handfast("status", saved.path)
    assert done.code == 3
    assert "ZeroDivisionError" in done.err


def test_paths_that_are_no_text_are_read_and_written(copy: Path) -> None:
    """A directory with a name of an old encoding: its bytes are spelled out where they are shown,
    and kept where they count.
    """
    run = copy.rename(copy.with_name(os.fsdecode(b"run\xff")))
    out = run.with_name(os.fsdecode(b"out\xff"))
    for args in (("status",), ("verify", "--all"), ("inspect",), ("release", "--keep-newest", 1)):
        for more in ((), ("--json",)):
            done = handfast(*args, run, *more)
            assert (done.code, done.err) == (0, ""), done
    for kind in ("safetensors", "torch"):
        done = handfast("export", run, out, "--to", kind, "--component", "model")
        assert done.code == 0
        assert "out\\udcff" in done.out
        out.unlink()
    next(run.rglob("1-3.manifest")).unlink()
    done = handfast("status", run)
    assert done.code == 1
    assert "run\\udcff: epoch 1/3: its manifest is missing" in done.out


def test_the_commands_need_no_framework(saved: Saved) -> None:
    """A machine without torch can look, verify, and export to safetensors."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from handfast.cli.main import app\n"
        "app(sys.argv[1:])"
    )
    for args in (["status"], ["verify", "--all"], ["inspect"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *args, str(saved.path)], capture_output=True, check=True
        )
        assert done.stderr == b""
    done = subprocess.run(
        [sys.executable, "-c", code, "export", str(saved.path), "out", "--to", "torch"],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 3
    assert b"--to torch needs torch" in done.stderr


def test_a_run_without_any_epoch_is_not_sound(tmp_path: Path) -> None:
    """`verify` after a path was mistyped: a script must not take "nothing" for "all is well"."""
    with Checkpointer(tmp_path / "run", {"model": nn.Linear(2, 2)}) as checkpointer:
        checkpointer.restore()
    done = handfast("verify", tmp_path / "run")
    assert done.code == 1
    assert "no epoch was saved here" in done.out
    done = handfast("verify", tmp_path / "run", "--json")
    assert (done.code, json.loads(done.out)["sound"]) == (1, False)


@pytest.mark.parametrize("command", ["status", "verify"])
def test_a_run_whose_domains_are_gone_is_missing(
    saved: Saved, tmp_path: Path, command: str
) -> None:
    """`rm -r RUN/domains/*` by mistake: a script must not take what is left for an idle run."""
    eventually(lambda: list(saved.path.glob("certificates/*.json")))
    shutil.copytree(saved.path / "certificates", tmp_path / "run" / "certificates")
    (tmp_path / "run" / "domains").mkdir()
    done = handfast(command, tmp_path / "run", "--json")
    said = json.loads(done.out)
    assert (done.code, said["verdict"]) == (1, "missing")
    assert "put the directories below domains/ back" in said["error"]


def test_a_run_of_which_no_epoch_is_left_says_so(
    launch: Callable[..., Job], tmp_path: Path
) -> None:
    """One rank's epochs are gone and the other's are there: that is not "nothing was saved"."""
    job = launch(2)
    job.all(deeds.resume, str(tmp_path / "run"))
    job.all(deeds.train, 1)
    job.all(deeds.close)
    shutil.rmtree(tmp_path / "run" / "domains" / "rank-00001" / "1")
    done = handfast("verify", tmp_path / "run")
    assert done.code == 1
    said = " ".join(done.out.split())
    assert "a restore would find nothing" in said
    assert "missing 1/1 rank-00001-" in said
    done = handfast("status", tmp_path / "run")
    assert done.code == 1
    assert "recovery line  none: a restore would refuse" in done.out


def test_a_reader_that_has_seen_enough_is_no_error(saved: Saved) -> None:
    """`handfast inspect RUN | head -1`: neither a message, nor a code that means damage."""
    read, write = os.pipe()
    os.close(read)
    for command in (["status"], ["inspect", "--json"]):
        argv = [*MAIN, *command, str(saved.path)]
        done = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, check=False)
        assert (done.returncode, done.stderr) == (141, b"")
    os.close(write)


@pytest.mark.parametrize("command", ["status", "verify"])
def test_what_may_not_be_entered_says_what_to_do(copy: Path, command: str) -> None:
    """As a user who may not: root may look anywhere."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    (chunks,) = copy.glob("domains/*/*/chunks")
    chunks.chmod(0o444)
    for parent in copy.parents:
        if parent.stat().st_mode & 0o001 == 0 and parent.is_relative_to("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o011)
    os.seteuid(65534)
    try:
        done = handfast(command, copy)
    finally:
        os.seteuid(0)
    assert done.code == 3
    assert f"{chunks}/1-" in done.err
    assert "What to do: make it readable for this user, and each directory above it" in done.err


def test_a_system_that_won_t_look_gives_a_reason_and_a_remedy(saved: Saved, copy: Path) -> None:
    """A link to itself in a file's place, and a name that no file system takes."""
    (identity,) = copy.glob("domains/*/domain.json")
    identity.unlink()
    identity.symlink_to(identity)
    done = handfast("status", copy)
    assert done.code == 3
    assert f"{identity}: can't be read" in done.err
    assert "What to do: the path's links lead in a circle" in done.err
    done = handfast("export", saved.path, "a" * 5000, "--to", "safetensors")
    assert done.code == 3
    assert "File name too long (ENAMETOOLONG). What to do: choose a shorter path" in done.err


@pytest.mark.parametrize("where", ["> /dev/full", ">&-"])
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["people", "scripts"])
@pytest.mark.parametrize("what", ["a run", "nothing"])
def test_an_answer_that_can_not_be_written_is_no_damage(
    saved: Saved, what: str, more: list[str], where: str
) -> None:
    """A full disk, or no output at all: one line says so, and scripts hear that nothing was told.

    An error for people goes elsewhere, and is told.
    """
    told = what == "nothing" and not more
    args = ["status", str(saved.path if what == "a run" else saved.path / "no"), *more]
    shell = ["sh", "-c", f'"$@" {where}', "sh"]
    done = subprocess.run([*shell, *MAIN, *args], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert "What to do: " in line
    assert ("the answer can't be written to the standard output" in line) is not told


def test_version_and_help() -> None:
    """What it is, and which."""
    assert handfast("--version").out.startswith("handfast ")
    shown = handfast("--help").out
    for name in ("status", "verify", "inspect", "export", "release", "Exit codes"):
        assert name in shown


# --- inspect ------------------------------------------------------------------------------------


def test_inspect_shows_tensors_and_objects_without_making_any(saved: Saved) -> None:
    """Stamp, shapes, ties, hyperparameters, environment and files, of a chosen step."""
    done = handfast("inspect", saved.path, "--step", 2)
    assert done.code == 0, done
    for text in (
        "epoch 1/2", "lineage main", "also model/head.weight", "optimizer/param_groups[0]/lr",
        "float8_e4m3fn", "torch 2", "1/chunks/1-2.safetensors", "more/shape",
    ):  # fmt: skip
        assert text in done.out, text
    (shard,) = handfast("inspect", saved.path, "--json").json["shards"]
    tensors = {t["path"]: (t["dtype"], t["shape"]) for t in shard["tensors"]}
    assert tensors["odd/turned"] == ("float32", [4, 3])
    assert tensors["odd/empty"] == ("float32", [0, 3])
    assert shard["stamp"]["step"] == 3


def test_inspect_says_where_a_lineage_began(copy: Path) -> None:
    """And why, of each fork on the way."""
    model = Tied()
    with Checkpointer(copy, {"model": model}) as checkpointer:
        checkpointer.restore(step=2, only=("model/**",), lineage="tune")
        checkpointer.save(3)
    (stamp,) = [shard.stamp for shard in open_run(copy).inspect().shards]
    done = handfast("inspect", copy)
    assert done.code == 0, done
    told = " ".join(done.out.split())
    assert "lineage tune" in told
    assert f"since tune main of run {stamp.run} at 1/2: restore(only=('model/**',))" in told


# --- export and load ----------------------------------------------------------------------------


def test_an_export_to_torch_is_the_state_to_the_last_bit(saved: Saved, tmp_path: Path) -> None:
    """Plain nested dicts, loadable with weights_only; every dtype; ties stay ties."""
    path = tmp_path / "out.pt"
    done = handfast("export", saved.path, path, "--to", "torch")
    assert done.code == 0, done
    tree = torch.load(path, weights_only=True)
    assert tree["model"].keys() == saved.model.keys()
    assert all(same(tree["model"][name], value) for name, value in saved.model.items())
    assert all(same(tree["odd"][name], value) for name, value in saved.odd.items())
    assert tree["extra"]["z"].dtype == torch.complex128
    one, two = tree["model"]["embed.weight"], tree["model"]["head.weight"]
    assert one.data_ptr() == two.data_ptr()
    assert "exp_avg" in tree["optimizer"]["state"]["embed.weight"]
    Tied().load_state_dict(tree["model"])


def test_an_export_to_safetensors_is_loadable_without_us(saved: Saved, tmp_path: Path) -> None:
    """By load_model, ties included; what it can't name is refused by name and nothing written."""
    from safetensors.torch import load_file, load_model

    done = handfast("export", saved.path, tmp_path / "all", "--to", "safetensors")
    assert done.code == 2
    assert "extra/z (complex128)" in done.err
    assert os.listdir(tmp_path) == []
    path = tmp_path / "model.safetensors"
    args = ("--component", "model", "--json")  # the format is what the file is called
    found = handfast("export", saved.path, path, *args).json
    assert (found["epoch"]["step"], found["tied"]) == (3, 1)
    model = Tied()
    load_model(model, path)
    assert all(same(model.state_dict()[name], value) for name, value in saved.model.items())
    odd = tmp_path / "odd.safetensors"
    handfast("export", saved.path, odd, "--to", "safetensors", "--component", "odd")
    found = load_file(odd)
    assert all(same(found[name.replace("/", "~1")], v) for name, v in saved.odd.items())


def test_an_export_to_torch_is_known_by_its_name(saved: Saved, tmp_path: Path) -> None:
    """A file that torch.load reads, weights_only."""
    path = tmp_path / "model.pt"
    assert handfast("export", saved.path, path, "--component", "model").code == 0
    assert torch.load(path).keys() == saved.model.keys()


def test_a_run_without_an_epoch_is_shown_as_empty(tmp_path: Path) -> None:
    """A first start that was only tried leaves one; nothing in it is complete."""
    with Checkpointer(tmp_path, {"model": torch.nn.Linear(1, 1)}) as ckpt:
        assert ckpt.restore(dry_run=True) == 0
    done = handfast("status", tmp_path)
    assert done.code == 0
    assert "nothing was saved yet" in done.out
    assert "empty" in done.out
    assert "complete" not in done.out


def test_an_export_over_a_file_is_refused(saved: Saved, tmp_path: Path) -> None:
    """Code 3, and the file is as it was."""
    path = tmp_path / "mine"
    path.write_text("precious")
    done = handfast("export", saved.path, path, "--to", "torch")
    assert done.code == 3
    assert "is there already" in done.err
    assert path.read_text() == "precious"


def test_an_export_that_finds_damage_ends_with_1(copy: Path, tmp_path: Path) -> None:
    """And leaves no file."""
    damage(copy, "chunks/1-3.*")
    done = handfast("export", copy, tmp_path / "out", "--to", "torch")
    assert done.code == 1
    assert "chunk 0 of epoch 1/3" in done.err
    assert os.listdir(tmp_path) == ["run"]


def test_a_step_that_is_a_string_is_refused(saved: Saved) -> None:
    """The commands take 1/2; in Python that is Epoch(1, 2)."""
    with pytest.raises(ValueError, match=r"step='1/2': give a step.*Epoch"):
        load(str(saved.path), step="1/2")


def test_weights_for_inference_need_neither_agent_nor_group(saved: Saved) -> None:
    """By the module's own keys; ties are one tensor; the newest whole epoch or any step."""
    model = Tied()
    loaded = load(saved.path)
    model.load_state_dict(loaded)
    assert all(same(model.state_dict()[name], value) for name, value in saved.model.items())
    assert loaded["head.weight"] is loaded["embed.weight"]
    assert not same(load(str(saved.path), step=1)["embed.weight"], loaded["embed.weight"])
    assert list(load([saved.path], only=("norm.*",))) == sorted(
        name for name in saved.model if name.startswith("norm.")
    )
    assert list(load(saved.path, only=("head.weight",))) == ["head.weight"]


def test_any_component_can_be_loaded_with_every_dtype(saved: Saved) -> None:
    """Keys of one level are the user's own, a slash in them too; the whole state goes by path."""
    odd = load(saved.path, "odd")
    assert odd.keys() == saved.odd.keys()
    assert all(same(odd[name], value) for name, value in saved.odd.items())
    everything = load(saved.path, "")
    assert {"model/embed.weight", "optimizer/state/embed.weight/exp_avg"} <= everything.keys()
    with pytest.raises(ValueError, match="no tensors of a component 'mdoel'; those of"):
        load(saved.path, "mdoel")


def test_a_damaged_epoch_is_not_loaded(copy: Path) -> None:
    """Not a tensor of it, even where the damage lies in another component's bytes."""
    damage(copy, "chunks/1-3.*", at=-1)
    with pytest.raises(Damaged, match="differs from its hash"):
        load(copy)
    assert load(copy, step=2)
    for path in copy.rglob("*.manifest"):
        path.unlink()
    with pytest.raises(Refused, match="no epoch is left"):
        load(copy)


def test_a_dtype_that_this_torch_lacks_is_named(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of a newer torch: which tensor, which dtype."""
    from handfast.torch import types

    without = {name: kind for name, kind in types.TORCH_DTYPES.items() if name != "float8_e4m3fn"}
    monkeypatch.setattr(sys.modules["handfast.torch.load"], "TORCH_DTYPES", without)
    with pytest.raises(FormatError, match=r"fp8: this torch .* has no dtype float8_e4m3fn"):
        load(saved.path, "odd")


# --- release ------------------------------------------------------------------------------------


def test_release_shows_first_and_acts_only_when_told_so_twice(copy: Path) -> None:
    """A dry run by default; --yes alone says why it is not enough."""
    done = handfast("release", copy, "--keep-newest", 1)
    assert done.code == 0
    assert "1/1  would go" in done.out
    assert "1/3  stays: it is the converged line" in done.out
    assert "add --yes --offline" in done.out
    half = handfast("release", copy, "--keep-newest", 1, "--yes")
    assert half.code == 2
    assert "supersedes an agent that is alive on another node" in half.err
    assert len(list(copy.rglob("*.manifest"))) == 3
    done = handfast("release", copy, "--keep-newest", 1, "--yes", "--offline")
    assert done.code == 0
    assert "1/1  released" in done.out
    assert [path.stem for path in copy.rglob("*.manifest")] == ["1-3"]
    assert handfast("verify", copy, "--all").code == 0


def test_release_of_one_step_for_scripts(copy: Path) -> None:
    """The plan in JSON, and whether it was done."""
    found = handfast("release", copy, "--step", 2, "--json").json
    assert found["done"] is False
    assert found["domains"][0]["gone"] == [{"generation": 1, "step": 2}]
    found = handfast("release", copy, "--step", 2, "--json", "--yes", "--offline").json
    assert found["done"] is True
    assert sorted(path.stem for path in copy.rglob("*.manifest")) == ["1-1", "1-3"]


def test_release_keeps_what_is_needed_when_the_line_is_damaged(copy: Path) -> None:
    """Code 1, and nothing went."""
    damage(copy, "chunks/1-3.*")
    done = handfast("release", copy, "--keep-newest", 1, "--yes", "--offline")
    assert done.code == 1
    assert "keep the older epochs" in done.err
    assert len(list(copy.rglob("*.manifest"))) == 3


def test_pins_are_listed_and_freed(copy: Path) -> None:
    """A reader that was killed leaves a pin; whoever frees it sees whose it was."""
    (name,) = os.listdir(copy / "domains")
    held = pin(Posix(), str(copy), name, Epoch(1, 1), "evaluation of [step 1]")
    listed = handfast("release", copy, "--pins")
    assert listed.code == 0
    assert f"process {os.getpid()} on {socket.gethostname()}" in listed.out
    assert "evaluation of [step 1]" in listed.out
    assert "stays: a reader has pinned it" in handfast("release", copy, "--keep-newest", 1).out
    assert handfast("release", copy, "--unpin", "dead", "--json", "--yes").json["freed"] == 0
    pin_name = os.path.basename(held.path)
    assert "would be freed" in handfast("release", copy, "--unpin", pin_name).out
    assert os.path.exists(held.path)
    found = handfast("release", copy, "--unpin", pin_name, "--yes", "--json").json
    assert found["freed"] == 1
    assert "no reader holds a pin" in handfast("release", copy, "--pins").out


MODEL = ("--component", "model")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_an_export_that_is_told_to_end_leaves_nothing(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """No half-written file and no pin, however it is told; and the code says how."""
    seen: list[int] = []

    def told() -> None:
        seen.append(len(list(copy.glob("domains/*/pins/*.json"))))
        seen.append(len(list(tmp_path.glob("out.*.tmp"))))
        os.kill(os.getpid(), number)

    busy = FaultyFiles(Posix(), 1, told, kinds=("pwrite",), path=str(tmp_path / "out"))
    monkeypatch.setattr(exporting, "open_run", partial(open_run, files=busy))
    ours = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    inherited = signal.signal(number, ours)  # a background job of a script ignores some
    try:
        done = handfast("export", copy, tmp_path / "out", "--to", "safetensors", *MODEL)
        before = signal.getsignal(number)
    finally:
        signal.signal(number, inherited)
    assert done.code == 128 + number
    assert seen == [1, 1]
    assert not list(copy.glob("domains/*/pins/*"))
    assert not list(tmp_path.glob("out*"))
    assert before is ours


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    """A command under nohup ends with its work, not with its terminal."""
    code = (
        "import os, signal\n"
        "from handfast.cli.console import answering\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with answering(False):\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    print('goes on')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "goes on\n"


# --- beside a live training ---------------------------------------------------------------------


def test_a_live_agent_is_seen_and_left_to_do_its_work(
    launch: Callable[..., Job], tmp_path: Path
) -> None:
    """Status, verify and export go on beside it; a release is refused, whatever one insists on."""
    path = tmp_path / "run"
    (one,) = launch()
    one.do(deeds.resume, str(path))
    one.do(deeds.train, 5)
    one.do(deeds.converged)
    shown = handfast("status", path)
    assert shown.code == 0, shown
    assert "on node0" in shown.out
    refused = handfast("release", path, "--keep-newest", 1, "--yes", "--offline")
    assert refused.code == 3
    assert "releases by itself" in refused.err
    assert handfast("verify", path).code == 0
    assert handfast("export", path, tmp_path / "out", "--to", "torch").code == 0
    one.do(deeds.train, 7)
    one.do(deeds.close)
    assert handfast("status", path, "--json").json["line"]["step"] == 7


def test_an_agent_of_the_original_is_none_of_a_copy_s(
    launch: Callable[..., Job], tmp_path: Path
) -> None:
    """A copy has the domains' names, too, and lies idle while the original trains: its status is
    its own, and it may be released. By a link to it, the original is the original.
    """
    path, copied = tmp_path / "run", tmp_path / "copy"
    (one,) = launch()
    one.do(deeds.resume, str(path))
    one.do(deeds.train, 2)
    one.do(deeds.close)
    eventually(lambda: handfast("status", path, "--json").json["agents"] == [])
    shutil.copytree(path, copied)
    (one,) = launch()
    one.do(deeds.resume, str(path))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "domains").symlink_to(path / "domains")
    for mine in (path, tmp_path / "linked"):
        assert [a["pid"] for a in handfast("status", mine, "--json").json["agents"]]
    shown = handfast("status", copied, "--json").json
    assert (shown["agents"], shown["phase"]) == ([], "converged")
    args = ("release", copied, "--keep-newest", 1, "--yes", "--offline")
    assert handfast(*args).code == 0
    assert handfast("release", path, *args[2:]).code == 3
    one.do(deeds.train, 3)
    one.do(deeds.close)


def test_an_agent_that_does_not_answer_counts_as_alive(
    copy: Path, tmp_path: Path, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped process, or a disk that hangs: a release would take its domain from it."""
    monkeypatch.setattr(ask_agents, "PATIENCE_S", 0.2)
    held = HeldAgent(tmp_path, str(copy), node_label())
    held.kill(signal.SIGSTOP)
    shown = handfast("status", copy)
    assert shown.code == 0
    assert "does not answer" in shown.out
    done = handfast("release", copy, "--keep-newest", 1, "--yes", "--offline")
    assert done.code == 3
    assert f"agent process {held.pid}" in done.err
    held.kill()
    assert "none alive" in handfast("status", copy).out


def test_a_place_of_agents_that_is_not_ours_is_said(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody can look for agents, a release can't know that there is none."""
    # A short path: where a socket's would be too long, agents meet in another place.
    with tempfile.TemporaryDirectory(prefix="hf") as place:
        monkeypatch.setenv("XDG_RUNTIME_DIR", place)
        shared = Path(place, "handfast")
        shared.mkdir()
        shared.chmod(0o755)
        assert "agents can't be looked for" in handfast("status", copy).out
        done = handfast("release", copy, "--keep-newest", 1, "--yes", "--offline")
        assert done.code == 3
