"""Shows that whatever validators do costs no more than an epoch: real processes, that really end.

What they find, and how they end, is the reason of a SKIP; the agent, its image and the next epoch
are none the worse for it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from agentkit import looped, settled_fds, wait_for
from meshkit import Mesh

from handfast.agent.examiner import Asked, Examined, Examiner, Known
from handfast.agent.frames import make_image
from handfast.core.lattice import Epoch
from handfast.core.messages import Skipped
from handfast.store import objects
from handfast.store.image import TensorSpec, plan

ARGV = (sys.executable, "-m", "handfast.torch.examine")

VALIDATORS = '''
"""What users may come up with."""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import torch

from handfast.errors import FormatError

kept = []


def content(staged):
    return None


def silent(staged):
    return ""


def told(staged):
    at = f"{staged.generation}/{staged.step}"
    values = staged.tensors["model/w"].tolist()
    return f"{at} {values} {staged.objects['scheduler']} {staged.extra} {sorted(staged.apart)}"


def pid(staged):
    return str(os.getpid())


def value(staged):
    raise ValueError("too large")


def format(staged):
    raise FormatError("no such thing")


def key(staged):
    return staged.tensors["model/none"]


def deep(staged):
    return json.loads("3", parse_int=lambda digits: strict(digits + "x"))


def strict(digits):
    return int(digits)


def long(staged):
    return "x" * 100_000


def several(staged):
    return torch.tensor([1, 2])


def false(staged):
    return False


def zero(staged):
    return 0


def wild(staged):
    return "half of a \\ud800 pair"


def loud(staged):
    print("not on the examiner's socket")
    sys.stdout.flush()
    os.write(1, b"nor this\\n")


def hoarder(staged):
    kept.append(staged)
    kept.extend(staged.tensors.values())


def threaded(staged):
    threading.Thread(target=time.sleep, args=(3600,)).start()


def lost(staged):
    sys.path = ["/nowhere"]


def pathless(staged):
    sys.path = None


def clears(staged):
    for tensor in staged.tensors.values():
        tensor.set_(torch.zeros(2))
        staged.ends("model/w")
    staged.tensors.clear()
    staged.objects.clear()


def twofold(staged):
    if os.fork() == 0:
        return None  # it comes back where its parent does
    os.wait()
    return "said by the parent"


def twofold_in_c(staged):
    if ctypes.CDLL(None).fork() == 0:
        return None
    os.wait()
    return "said by the parent"


def orphans(staged):
    if os.fork() == 0:
        time.sleep(3600)
    os._exit(3)


def orphans_in_c(staged):
    if ctypes.CDLL(None).fork() == 0:
        time.sleep(3600)  # and holds the examiner's socket
    os._exit(3)


def greedy(staged):
    torch.empty(1 << 33, dtype=torch.uint8)


def hungry(staged):
    blocks = []
    while True:
        blocks.append(bytearray(64 << 20))  # not touched, so that no page of it is there


def exit(staged):
    os._exit(3)


def clean_exit(staged):
    sys.exit(4)


def killed(staged):
    os.kill(os.getpid(), signal.SIGKILL)


def writes(staged):
    staged.tensors["model/w"].fill_(7.0)


def hangs(staged):
    time.sleep(3600)


def with_helper(staged):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    time.sleep(3600)


def manners(staged):
    with open("/proc/self/oom_score_adj") as score:
        first = int(score.read())
    core, _ = resource.getrlimit(resource.RLIMIT_CORE)
    data, _ = resource.getrlimit(resource.RLIMIT_DATA)
    single = os.environ["OMP_NUM_THREADS"], os.environ["OPENBLAS_NUM_THREADS"]
    threads = torch.get_num_threads(), *single
    return f"{os.nice(0) >= 5} {first} {core} {data} {threads}"


def room(staged):
    data, _ = resource.getrlimit(resource.RLIMIT_DATA)
    with open("/proc/self/status") as status:
        (mapped,) = (line.split()[1] for line in status if line.startswith("VmData:"))
    return str(data - (int(mapped) << 10))


def keeper(staged):
    kept.append(bytearray(5 << 28))  # two of them are too much
'''

HUGE = """
import mmap

hold = mmap.mmap(-1, 3 << 30, mmap.MAP_PRIVATE)


def told(staged):
    return "told"
"""

BOMB = """
blocks = []
while True:
    blocks.append(bytearray(64 << 20))
"""

DUMB = """
import os, signal, socket, sys

from handfast.agent.frames import Call, Failure, Incoming, Push, Reply, encode

sock, incoming = socket.socket(fileno=int(sys.argv[-1])), Incoming()
how = sys.argv[1]
if how == "deaf":
    sys.exit(5)
while (arrived := incoming.receive(sock)) is not None:
    for message, fds in arrived:
        if how == "dies":
            sys.exit(6)
        if how == "signal":
            os.kill(os.getpid(), signal.SIGRTMIN + 3)
        sock.sendall({
            "other fields": encode(Reply(message.id, 0, {"verdict": "fine"})),
            "another id": encode(Reply(message.id + 1, 0, {"problem": ""})),
            "another's failure": encode(Failure(message.id - 1, "", "it is not known", {})),
            "no text": encode(Reply(message.id, 0, {"problem": None})),
            "failure": encode(Failure(message.id, "", "it is not known here", {})),
            "push": encode(Push("topic", {})),
            "call": encode(Call(1, "examine", 0, {})),
            "noise": b"\\0\\0\\0\\4noise",
            "length": b"\\xff\\xff\\xff\\xff",
        }[how])
"""

SPECS = [
    TensorSpec("model/w", "float32", (2,), (2,), (0,), (1,)),
    TensorSpec("model/mask", "float32", (), (), (), ()),
]


NAN = b"\0\0\xc0\x7f"


class Desk:
    """One image, and the questions about it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        for name, code in (("violations", VALIDATORS), ("huge", HUGE), ("bomb", BOMB)):
            (home / f"{name}.py").write_text(code)
        self.layout = plan(SPECS)
        self.at = {slot.spec.path: slot.start for slot in self.layout.slots}
        self.fd = make_image(self.layout.nbytes)
        os.pwrite(self.fd, self.layout.header, 0)
        self.extra: Any = 5

    def asked(self, *validators: str, step: int = 1, generation: int = 1, **changes: Any) -> Asked:
        """A question; validators without a module are those of this file."""
        names = tuple(v if v in ("finite", "loss") or ":" in v else f"violations:{v}"
                      for v in validators)  # fmt: skip
        path = (str(self.home), *(os.path.abspath(entry) for entry in sys.path))
        fields: dict[str, Any] = {"argv": ARGV, "path": path, "validators": names}
        fields |= {"known": Known(apart=("model/mask",)), "patience_s": 60.0} | changes
        held = objects.encode({"": {}, "scheduler": {"lr": 0.5}, "extra": self.extra})
        epoch, layout = Epoch(generation, step), self.layout
        return Asked(Examined(**fields), layout.slots, layout.nbytes, self.fd, held, epoch)

    def raised(self, text: str) -> str:
        """How the line of a validator is told that has some text: of the file's name the end."""
        lines = enumerate(VALIDATORS.splitlines(), 1)
        file = str(self.home / "violations.py")[-80:]
        return f" at {file}:{next(number for number, line in lines if text in line)}"

    def image(self) -> bytes:
        """The bytes of the image as they are now."""
        return os.pread(self.fd, self.layout.nbytes, 0)


def ask(examiner: Examiner, asked: Asked | None) -> str:
    """Ask, and wait for the answer."""
    return asyncio.run(examiner.examine(asked))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    found = Desk(tmp_path)
    yield found
    os.close(found.fd)


@pytest.fixture
def examiner() -> Iterator[Examiner]:
    found = Examiner()
    yield found
    found.close()


def pid_of(examiner: Examiner, desk: Desk, **options: Any) -> int:
    """The process that examines now."""
    return int(ask(examiner, desk.asked("pid", **options)).removeprefix("violations:pid: "))


def alive(pid: int) -> bool:
    """Whether a process is there, and is no zombie that waits for whoever started it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def test_nothing_is_started_where_nothing_is_asked(examiner: Examiner) -> None:
    """A run without validators has no process more than before."""
    assert ask(examiner, None) == ""
    assert examiner._child is None


def test_what_validators_do_short_of_dying(desk: Desk, examiner: Examiner) -> None:
    """One process hears it all, epoch after epoch, and is the same one at the end."""
    first = pid_of(examiner, desk)
    fds = settled_fds()

    def said(*validators: str, **options: Any) -> str:
        return ask(examiner, desk.asked(*validators, **options))

    assert said("content", "silent", "finite") == ""
    assert said("told", step=7) == ("violations:told: 1/7 [0.0, 0.0] {'lr': 0.5} 5 ['model/mask']")
    assert said("value") == f"violations:value{desk.raised('too large')}: too large"
    assert said("format") == f"violations:format{desk.raised('no such thing')}: no such thing"
    assert said("key") == f"violations:key{desk.raised('model/none')}: KeyError('model/none')"
    told = "invalid literal for int() with base 10: '3x'"
    place = desk.raised("int(digits)")  # the innermost of the package, and none of json's
    assert said("deep") == f"violations:deep{place}: {told}"
    assert said("silent", "value", "key").startswith("violations:value"), "the first one counts"
    assert said("gone") == (
        "violations:gone: validator 'violations:gone' can't be imported: "
        "AttributeError(\"module 'violations' has no attribute 'gone'\")"
    )
    assert said("nothing.of.this:kind").startswith("nothing.of.this:kind: validator")
    assert 100 < len(said("long")) <= 400
    assert said("wild") == "violations:wild: half of a ? pair"
    for odd, kind in (("several", "Tensor"), ("false", "bool"), ("zero", "int")):
        assert said(odd) == (
            f"violations:{odd}: a mistake of the validator: it returned a {kind}, where a str says "
            "what is wrong, and None that nothing is"
        )
    assert said("loud") == ""
    assert said("hoarder") == ""
    assert said("threaded") == ""
    assert said("lost", "pathless") == ""
    assert "wants more memory" in said("hungry")
    assert f"violations:greedy{desk.raised('1 << 33')}: RuntimeError" in said("greedy")
    os.pwrite(desk.fd, NAN, desk.at["model/mask"])
    assert said("finite") == ""
    os.pwrite(desk.fd, NAN, desk.at["model/w"])
    assert said("content", "finite") == (
        "finite: model/w: 1 NaN and 0 infinite of 2 values, the first at 0"
    )
    assert said("content", step=8) == ""
    assert pid_of(examiner, desk) == first
    assert settled_fds() == fds


def test_validators_that_end_their_process(desk: Desk, examiner: Examiner) -> None:
    """The epoch is skipped with the reason, nothing of its image has changed, and the next one has
    a process again."""
    before = desk.image()
    for validator, how in (
        ("exit", "their process ended with status 3"),
        ("clean_exit", "their process ended with status 4"),
        ("writes", "their process was ended by SIGSEGV"),
    ):
        assert ask(examiner, desk.asked(validator)) == f"the validators ended half-way: {how}"
        assert examiner._child is None
    assert desk.image() == before


@pytest.mark.parametrize("how", ["twofold", "twofold_in_c"])
def test_a_child_of_a_validator_answers_for_nobody(
    how: str, desk: Desk, examiner: Examiner
) -> None:
    """It comes back from the validator sooner than its parent does, and has nothing to say."""
    first = pid_of(examiner, desk)
    for step in (1, 2):
        said = ask(examiner, desk.asked(how, step=step))
        assert said == f"violations:{how}: said by the parent"
    assert ask(examiner, desk.asked("content")) == ""
    assert pid_of(examiner, desk) == first


@pytest.mark.parametrize("how", ["orphans", "orphans_in_c"])
def test_a_validator_that_dies_is_missed_at_once_whoever_holds_its_socket(
    how: str, desk: Desk, examiner: Examiner
) -> None:
    """A child that it leaves behind keeps nobody waiting for the end of an hour's patience."""
    for _ in range(2):
        said = ask(examiner, desk.asked(how, patience_s=3600.0))
        assert said == "the validators ended half-way: their process ended with status 3"


def test_a_process_that_ended_between_two_questions_costs_no_epoch(
    desk: Desk, examiner: Examiner
) -> None:
    """Nobody was being looked at: another one takes its place."""
    first = pid_of(examiner, desk)
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: not alive(first), "its end")
    assert pid_of(examiner, desk) != first


def test_what_a_validator_does_to_its_tensors_blinds_nobody(desk: Desk, examiner: Examiner) -> None:
    """Each of the users' has its own, and those that are built in see none of theirs."""
    os.pwrite(desk.fd, NAN, desk.at["model/w"])
    assert ask(examiner, desk.asked("clears", "finite")).startswith("finite: model/w: 1 NaN")
    assert ask(examiner, desk.asked("clears", "told")).startswith("violations:told: 1/1 [nan, 0.0]")


def test_another_process_takes_over(desk: Desk, examiner: Examiner) -> None:
    """After one that has died and one that hung, with what its validators had started; and for
    another argv."""
    first = pid_of(examiner, desk)
    assert "SIGKILL" in ask(examiner, desk.asked("killed"))
    second = pid_of(examiner, desk)
    hung = ask(examiner, desk.asked("with_helper", patience_s=1.5))
    assert hung == "the validators took more than 1.5 s, and were ended"
    third = pid_of(examiner, desk)
    assert len({first, second, third}) == 3
    assert not alive(second)
    other = (ARGV[0], "-X", "utf8", *ARGV[1:])
    assert pid_of(examiner, desk, argv=other) != third
    assert not alive(third)


def test_a_start_of_the_job_reads_validators_anew(desk: Desk, examiner: Examiner) -> None:
    """The agent outlives the trainer that was stopped to mend its validators."""
    said = ask(examiner, desk.asked("value"))
    assert said == f"violations:value{desk.raised('too large')}: too large"
    mended = VALIDATORS.replace('raise ValueError("too large")', "return None")
    (desk.home / "violations.py").write_text(mended + "\n# another length\n")
    assert ask(examiner, desk.asked("value", step=2)) == said
    assert ask(examiner, desk.asked("value", step=2, generation=2)) == ""


INTERRUPTED = "the validators had no answer when the job started again, and were ended"


def test_a_start_of_the_job_interrupts_who_still_examines(desk: Desk, examiner: Examiner) -> None:
    """From the loop's thread, with what waits behind it and what comes late; with what validators
    had started; and the new job has its answer, once for all that are older."""

    async def main() -> list[str]:
        asking = [
            asyncio.ensure_future(examiner.examine(desk.asked(name, patience_s=3600.0)))
            for name in ("with_helper", "content")
        ]
        while examiner._child is None:
            await asyncio.sleep(0.01)
        helped = examiner._child.pid
        children = Path(f"/proc/{helped}/task/{helped}/children")
        while not children.read_text():
            await asyncio.sleep(0.01)
        helper = int(children.read_text())
        assert examiner.interrupt(2)
        assert examiner.interrupt(2)
        answers = list(await asyncio.gather(*asking))
        assert not alive(helped)
        while alive(helper):  # killed with it, and nobody's child here to wait for
            await asyncio.sleep(0.01)
        answers.append(await examiner.examine(desk.asked("content")))
        answers.append(await examiner.examine(desk.asked("value", generation=2)))
        return answers

    assert asyncio.run(main()) == [INTERRUPTED] * 3 + [
        f"violations:value{desk.raised('too large')}: too large"
    ]


def test_an_interrupt_leaves_its_own_generation_alone(desk: Desk, examiner: Examiner) -> None:
    """Nothing that is examined for the job that starts is ended, and nothing idle is mourned."""
    assert not examiner.interrupt(1)
    first = pid_of(examiner, desk)
    examiner.interrupt(1)
    assert pid_of(examiner, desk) == first
    examiner.interrupt(2)
    second = pid_of(examiner, desk, generation=2)
    assert second != first
    assert not alive(first)


@looped
async def test_an_epoch_that_hangs_is_a_skip_once_the_job_starts_again(
    desk: Desk, tmp_path: Path
) -> None:
    """Voted on before the freeze, with the reason; and the next generation converges."""
    mesh = Mesh(str(tmp_path / "run"), 1)
    await mesh.open(0)
    await mesh.restore(1)
    held = mesh.image(1)
    hung = desk.asked("hangs", patience_s=3600.0).what
    held.plan = msgspec.structs.replace(held.plan, examined=hung)
    assert await mesh.hosts[0].stage(Epoch(1, 1), held, b"objects") is None
    await mesh.begin(2, drain_s=0.2)
    (vote,) = [record for record in mesh.journaled(0) if isinstance(record, Skipped)]
    assert vote.epoch == Epoch(1, 1)
    assert INTERRUPTED in vote.reason
    await mesh.accept(0, 2)
    await mesh.save(Epoch(2, 2))
    await mesh.converged(Epoch(2, 2))
    assert INTERRUPTED in mesh.shown[0].outcomes[0].problem
    await mesh.close()


@pytest.mark.parametrize("pause", [0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.5])
def test_an_interrupt_at_any_moment_of_a_start(pause: float, desk: Desk) -> None:
    """Before, while and after the process is started: it ends, and nothing is left of it."""
    examiner, fds = Examiner(), settled_fds()

    async def main() -> str:
        hung = desk.asked("hangs", patience_s=3600.0)
        asking = asyncio.ensure_future(examiner.examine(hung))
        await asyncio.sleep(pause)
        examiner.interrupt(2)
        return await asking

    assert asyncio.run(main()) == INTERRUPTED
    assert examiner._child is None
    examiner.close()
    assert settled_fds() <= fds


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (("/no/such/python",), "No such file or directory: '/no/such/python'"),
        (("/",), "Permission denied: '/'"),
        (("a\0b",), "embedded null byte"),
    ],
)
def test_an_argv_that_cant_be_started(
    argv: tuple[str, ...], why: str, desk: Desk, examiner: Examiner
) -> None:
    """Each epoch is skipped, and says why, until it can be."""
    for _ in range(2):
        assert ask(examiner, desk.asked("content", argv=argv)).endswith(why)
    assert examiner._child is None


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("deaf", "their process ended with status 5"),
        ("dies", "their process ended with status 6"),
        ("signal", f"their process was ended by signal {signal.SIGRTMIN + 3}"),
        ("failure", "it is not known here"),
        ("push", "an examiner that says Push"),
        ("call", "an examiner that says Call"),
        ("other fields", "an examiner that says Reply"),
        ("no text", "an examiner that says Reply"),
        ("another id", "an examiner that says Reply"),
        ("another's failure", "an examiner that says Failure"),
        ("noise", "a frame that can't be read"),
        ("length", "a frame of 4294967295 bytes"),
    ],
)
def test_a_process_that_speaks_otherwise_is_no_trouble(
    how: str, why: str, desk: Desk, examiner: Examiner
) -> None:
    """Whatever another release, or another program, says: an error here would end the domain."""
    asked = desk.asked("content", argv=(sys.executable, "-c", DUMB, how))
    fds = settled_fds()
    for _ in range(2):
        assert why in ask(examiner, asked)
    examiner.close()
    assert settled_fds() <= fds


def test_memory_is_beside_what_imports_have_mapped(desk: Desk, examiner: Examiner) -> None:
    """Libraries map some for each processor of a node, and a module of a user's what it likes: that
    refuses nothing, and what comes on top is bounded as ever."""
    hold = (
        "import mmap, runpy; hold = mmap.mmap(-1, 3 << 30, mmap.MAP_PRIVATE); "
        "runpy.run_module('handfast.torch.examine', run_name='__main__')"
    )
    for argv, first in (((ARGV[0], "-c", hold), "finite"), (ARGV, "huge:told")):
        ask(examiner, desk.asked(first, argv=argv))
        assert ask(examiner, desk.asked("finite", argv=argv)) == ""
        said = ask(examiner, desk.asked("room", argv=argv)).removeprefix("violations:room: ")
        assert (3 << 29) < int(said) <= (2 << 30) + (1 << 28)
        assert "wants more memory" in ask(examiner, desk.asked("hungry", argv=argv))


def test_memory_that_is_kept_is_not_given_anew(desk: Desk, examiner: Examiner) -> None:
    """Neither from epoch to epoch, nor while a module is imported."""
    said = [ask(examiner, desk.asked("keeper", step=step)) for step in (1, 2)]
    assert said[0] == ""
    assert "wants more memory" in said[1]
    (desk.home / "violations.py").unlink()
    said = [ask(examiner, desk.asked("bomb:told", generation=2)) for _ in range(2)]
    assert said == ["bomb:told: validator 'bomb:told' can't be imported: MemoryError()"] * 2


def test_less_memory_than_wished_for_is_made_do_with(desk: Desk, examiner: Examiner) -> None:
    """Where the agent was started under `ulimit -d`, validators have that, and not nothing."""
    start = (
        "import resource, runpy; resource.setrlimit(resource.RLIMIT_DATA, (3 << 29, 3 << 29)); "
        "runpy.run_module('handfast.torch.examine', run_name='__main__')"
    )
    said = ask(examiner, desk.asked("manners", argv=(sys.executable, "-c", start)))
    assert said == f"violations:manners: True 1000 0 {3 << 29} (1, '1', '1')"


# --- whose end is whose -------------------------------------------------------------------------

AGENT = """
import asyncio, pathlib, sys, threading, time

sys.path[:0] = [sys.argv[1]]
from test_examiner import Desk, Examiner, ask

desk, examiner = Desk(pathlib.Path(sys.argv[2])), Examiner()
if sys.argv[3] == "idle":
    ask(examiner, desk.asked("content"))
else:
    threading.Thread(target=ask, args=(examiner, desk.asked("hangs")), daemon=True).start()
while examiner._child is None:
    time.sleep(0.001)
if sys.argv[3] == "busy":
    time.sleep(0.1)
    stack = pathlib.Path(f"/proc/{examiner._child.pid}/oom_score_adj")
    while stack.read_text().strip() != "1000":
        time.sleep(0.01)
    time.sleep(0.5)
print(examiner._child.pid, flush=True)
time.sleep(3600)
"""


@pytest.mark.parametrize("when", ["idle", "busy", "at its start"])
def test_it_ends_with_its_agent(when: str, tmp_path: Path) -> None:
    """An agent that is killed leaves no validator behind: idle, at work, or still importing torch
    with a question ahead of it."""
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", AGENT, here, str(tmp_path), when]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        pid = int(agent.stdout.readline())
        assert alive(pid)
        agent.kill()
    wait_for(lambda: not alive(pid), "the end of the examiner")


def test_closing_ends_it(desk: Desk) -> None:
    """And reaps it: no zombie, no descriptor."""
    fds = settled_fds()
    examiner = Examiner()
    pid = pid_of(examiner, desk)
    examiner.close()
    assert not Path(f"/proc/{pid}").exists()
    assert settled_fds() <= fds
    examiner.close()


def test_the_loop_goes_on_meanwhile(desk: Desk, examiner: Examiner) -> None:
    """Validators take their time; heartbeats and messages of the agent don't wait for them."""

    async def main() -> tuple[str, int]:
        asking = asyncio.ensure_future(examiner.examine(desk.asked("hangs", patience_s=1.0)))
        turns = 0
        began = time.monotonic()
        while not asking.done() and time.monotonic() - began < 30:
            turns += 1
            await asyncio.sleep(0.01)
        return await asking, turns

    said, turns = asyncio.run(main())
    assert said == "the validators took more than 1 s, and were ended"
    assert turns > 10
