"""Show that what the operator's pages give to type does here what they say of it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")

import yaml
from inventorykit import inventory, machine

from handfast.fleet.inventory.facts import Inventory, encode
from handfast.fleet.skew import read_fleet

ROOT = Path(__file__).parents[3]
OPERATE, INVENTORY = (
    (ROOT / "docs" / "fleet" / f"{name}.md").read_text() for name in ("operate", "inventory")
)
NAMES = ("gpu-001", "gpu-002", "gpu-003")
OLD, NEW = "570.86.15", "580.65.06"

HANDFAST = """#!/bin/sh
case "$1 $2" in
"fleet ask") shift 2; set -- fleet ask {here}/$NODE.sock "$@" ;;
"fleet inventory") set -- "$@" --root {here}/$NODE ;;
esac
exec {python} -m handfast "$@"
"""
SSH = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do [ "$1" = -o ] && shift; shift; done
NODE=$1; shift
[ "$NODE" = gone ] && { echo "ssh: connect to host gone: No route to host" >&2; exit 255; }
export NODE; exec sh -c "$*"
"""
SRUN = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do
    case "$1" in -N) nodes=$2; shift ;; -n) tasks=$2; shift ;; esac; shift
done
[ "$nodes" = "$tasks" ] || exit 1
for NODE in $(head -n "$nodes" {here}/all); do
    export NODE SLURMD_NODENAME=$NODE; "$@" || exit
done
"""
KUBECTL = """#!/bin/sh
case "$1" in
rollout) ;;
get) while read -r node; do printf 'pod-%s\\t%s\\n' "$node" "$node"; done < {here}/all ;;
exec) NODE=${{2#pod-}}; export NODE; shift 3; exec "$@" ;;
label) shift; printf '%s\\n' "$@" > {here}/labelled ;;
esac
"""


def blocks(page: str, language: str, having: str = "") -> list[str]:
    """The blocks of a page in a language that have some text, in their order."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return [each for each in found if having in each]


def block(page: str, language: str, having: str) -> str:
    """The only such block."""
    (one,) = blocks(page, language, having)
    return one


class Desk:
    """An operator's directory, on a machine where all nodes are reached by these programs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "all").write_text("".join(f"{name}\n" for name in NAMES))
        (folder / "nodes").write_text("".join(f"{name}\n" for name in (*NAMES, "gone")))
        words = {"here": folder, "python": shlex.quote(sys.executable)}
        for name, text in {
            "handfast": HANDFAST.format(**words),
            "ssh": SSH,
            "srun": SRUN.replace("{here}", str(folder)),
            "kubectl": KUBECTL.format(**words),
        }.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)

    def start(self, text: str, **env: str) -> subprocess.Popen[str]:
        """Start a text of a page; /opt/handfast is here."""
        return subprocess.Popen(
            ["/bin/sh", "-c", text.replace("/opt/handfast/bin", f"{self.folder}/bin")],
            cwd=self.folder,
            env={
                "PATH": f"{self.folder}/bin:/usr/bin:/bin",
                "PYTHONPATH": os.pathsep.join(sys.path),
                "NODE": NAMES[0],
            }
            | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, text: str, **env: str) -> tuple[int, str]:
        """Run it to its end; its exit code, and all that it printed."""
        with self.start(text, **env) as started:
            out, _ = started.communicate(timeout=90)
        return started.returncode, out

    def write(self, directory: str, **nodes: Inventory) -> None:
        """Write inventories of nodes; a name's underscores are dashes."""
        (self.folder / directory).mkdir()
        for name, taken in nodes.items():
            path = self.folder / directory / f"{name.replace('_', '-')}.json"
            path.write_bytes(encode(taken))


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """A desk without nodes."""
    return Desk(tmp_path)


@pytest.fixture
def served(desk: Desk) -> Iterator[Desk]:
    """Three nodes with a service each; of the last one the firmware of the board differs."""
    with ExitStack() as running:
        for name in NAMES:
            machine("hgx", desk.folder / name)
        (desk.folder / NAMES[2] / "sys/class/dmi/id/bios_version").write_text("9.9\n")
        for name in NAMES:
            line = f"exec handfast fleet node --root {name} --at {name}.sock"
            service = running.enter_context(desk.start(line))
            running.callback(service.terminate)
            assert service.stdout is not None
            assert "answers at" in service.stdout.readline()
        yield desk


def counted(desk: Desk, directory: str) -> dict[str, str | None]:
    """What the nodes of a directory say of their driver."""
    fleet, _ = read_fleet(str(desk.folder / directory))
    return {name: taken.get("gpu.driver").value for name, taken in fleet.items()}


@pytest.mark.parametrize("having", ["xargs", "srun -N", "kubectl rollout"])
def test_each_way_from_nodes_to_a_directory_makes_a_file_a_node(having: str, served: Desk) -> None:
    """Which `skew` reads, and in which it finds the odd one."""
    code, told = served.run(block(INVENTORY, "sh", having), SLURM_NNODES="3")
    assert counted(served, "inventories") == dict.fromkeys(NAMES, NEW), told
    code, told = served.run("handfast fleet skew inventories")
    assert re.search(r"board\.bios .* 2 +gpu-001, gpu-002\n +9\.9 +1 +gpu-003\n", told)
    gone = having == "xargs"  # its file of nodes names one more
    assert (code, "not counted gone" in told) == (3 if gone else 0, gone)
    before = (served.folder / "inventories" / f"{NAMES[0]}.json").stat()
    assert served.run(block(INVENTORY, "sh", having), SLURM_NNODES="3")[0] != 0
    assert (served.folder / "inventories" / f"{NAMES[0]}.json").stat() == before


def test_what_a_hanging_jobs_nodes_say_is_asked_as_written(served: Desk) -> None:
    """Of its nodes the node's facts, of its ranks theirs; both are judged and compared."""
    script = block(OPERATE, "sh", "job-nodes")
    code, told = served.run(script, JOB="17", NODES="3")
    assert code == 0, told
    assert counted(served, "job-nodes") == dict.fromkeys(NAMES, NEW)
    assert "0 refused" in told
    assert "board.bios" in told
    script = block(OPERATE, "sh", "job-ranks").replace("--tier job", "--tier job --limit 60")
    code, told = served.run(script, NODES="3", NCCL_ALGO="Ring")
    assert code == 0, told
    assert "job: 3 nodes say the same" in told


def test_the_pods_of_the_inventory_are_asked_where_the_service_is() -> None:
    """By the directory and not the socket, on cordoned nodes, too; the loop asks by its label."""
    made: dict[str, Any] = yaml.safe_load(block(INVENTORY, "yaml", "DaemonSet"))
    spec = made["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    (volume,) = spec["volumes"]
    (mount,) = container["volumeMounts"]
    assert volume["hostPath"] == {"path": "/run/handfast", "type": "Directory"}
    assert mount == {"name": volume["name"], "mountPath": "/run/handfast", "readOnly": True}
    assert spec["tolerations"] == [{"operator": "Exists"}]
    labels = made["spec"]["template"]["metadata"]["labels"]
    assert made["spec"]["selector"]["matchLabels"] == labels
    loop = block(INVENTORY, "sh", "kubectl rollout")
    assert f"-l app={labels['app']} " in loop
    assert f"daemonset/{made['metadata']['name']} " in loop


def test_labels_are_those_of_the_node_that_is_labelled(desk: Desk) -> None:
    """And replace what was there."""
    machine("hgx", desk.folder / "gpu-17")
    code, told = desk.run(block(INVENTORY, "sh", "kubectl label"))
    assert code == 0, told
    words = (desk.folder / "labelled").read_text().splitlines()
    assert words[:3] == ["--overwrite", "node", "gpu-17"]
    assert f"handfast/gpu.driver={NEW}" in words[3:]
    assert all(re.fullmatch(r"handfast/[\w.-]+=[\w.-]*", word) for word in words[3:])


def test_the_first_day_is_as_the_page_tells(served: Desk) -> None:
    """`ask` shows the driver; without a service it says so. The rules that were copied are read."""
    asked = block(OPERATE, "sh", "systemctl enable").splitlines()[1]
    code, told = served.run(asked)
    assert (code, bool(re.search(rf"gpu\.driver +{NEW}", told))) == (0, True)
    code, told = served.run(asked, NODE="away")
    assert (code, "nobody answers" in told) == (3, True)
    served.run(block(INVENTORY, "sh", "srun -N"), SLURM_NNODES="3")
    site = str(served.folder / "etc")
    script = block(OPERATE, "sh", "start.yaml").replace("/etc/handfast", site)
    script = script.replace("/opt/handfast/bin/python", shlex.quote(sys.executable))
    code, told = served.run(script)
    assert (code, f"rules of {site}/rules.yaml: 0 refused" in told) == (0, True), told
    assert "nothing to judge" in told
    for line in ("handfast fleet skew inventories\n", "handfast fleet judge inventories\n"):
        assert line in blocks(OPERATE, "sh")
        assert served.run(line)[0] == 0


def test_what_skew_and_judge_are_said_to_answer_they_answer(desk: Desk) -> None:
    """Each row of the tables that has an exit code or a word of theirs."""
    torn = inventory(**{"gpu.driver": NEW, "fabric-manager.version": OLD})
    whole = inventory(**{"gpu.driver": NEW, "fabric-manager.version": NEW})
    blind = inventory(**{"gpu.driver": None, "fabric-manager.version": None})
    desk.write("inventories", a=torn, b=whole, c=blind)
    code, told = desk.run("handfast fleet skew inventories")
    assert (code, "unknown to some" in told, "nodes say the same" in told) == (0, True, True)
    code, told = desk.run("handfast fleet judge inventories")
    assert code == 1
    assert re.search(
        rf"^refuse.* a runs driver {NEW} with Fabric Manager {OLD};", told, re.MULTILINE
    )
    (desk.folder / "inventories" / "d.json").touch()
    code, told = desk.run("handfast fleet skew inventories")
    assert (code, "not counted d" in told) == (3, True)


def test_choose_finds_the_driver_that_has_a_fabric_manager(desk: Desk) -> None:
    """And not the newest; with only the old manager at hand it stays."""
    options = block(OPERATE, "yaml", "could:")
    (desk.folder / "options.yaml").write_text(options)
    line = block(OPERATE, "sh", "fleet choose")
    code, told = desk.run(line)
    assert code == 0
    assert re.findall(r"(\S+) +(\S+) +raised", told) == [(OLD, NEW), (OLD, NEW)]
    (desk.folder / "options.yaml").write_text(
        options.replace(f"fabric-manager.version: [{OLD}, {NEW}]", "fabric-manager.version: [1.0]")
    )
    assert desk.run(line)[0] == 1


def test_a_node_that_came_back_as_it_was_passes_admit_and_fails_the_target(desk: Desk) -> None:
    """So the page asks for both. A domain that was upgraded whole passes all three."""
    (desk.folder / "target.yaml").write_text(block(OPERATE, "yaml", "target:"))
    judge, shipped, skew = block(OPERATE, "sh", "target.yaml").splitlines()
    old = inventory(**{"gpu.driver": OLD, "fabric-manager.version": OLD})
    new = inventory(**{"gpu.driver": NEW, "fabric-manager.version": NEW})
    desk.write("after", gpu_001=new, gpu_002=old)
    code, told = desk.run(judge)
    assert (code, f"gpu-002 runs driver {OLD}; target.yaml needs at least" in told) == (1, True)
    assert desk.run(shipped)[0] == 0
    code, told = desk.run(skew)
    assert (code, "2 groups" in told) == (0, True)
    (desk.folder / "after" / "gpu-002.json").write_bytes(encode(new))
    assert [desk.run(line)[0] for line in (judge, shipped, skew)] == [0, 0, 0]
    assert "host: 2 nodes say the same" in desk.run(skew)[1]
    blind = inventory(**{"gpu.driver": None, "fabric-manager.version": None})
    (desk.folder / "after" / "gpu-002.json").write_bytes(encode(blind))
    assert desk.run(judge)[0] == 1


def test_admit_ends_as_its_table_says(served: Desk) -> None:
    """0 though it was not upgraded, 96 for what does not fit, 3 without a service."""
    line = block(OPERATE, "sh", "fleet admit").strip()
    here = line.replace("/run/handfast/node.sock", f"{NAMES[0]}.sock")
    code, told = served.run(here)  # no Fabric Manager can be asked below another root
    assert (code, "warn" in told, "unknown Fabric Manager" in told) == (0, True, True)
    (served.folder / "rules.yaml").write_text(
        block(OPERATE, "yaml", "target:").replace(NEW, "590.48.01")
    )
    code, told = served.run(f"{here} --rules rules.yaml")
    assert (code, f"runs driver {NEW}" in told) == (96, True)
    assert served.run(line.replace("/run/handfast/node.sock", "none.sock"))[0] == 3


SERVICE = """#!{python} -IS
import socket, sys
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as door:
    while True:
        end, _ = door.accept()
        with end:
            end.sendall(b"{version}\\n")
"""
ASK = """#!{python} -IS
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1])), 5) as end:
    heard = end.makefile().readline().strip()
client = sys.argv[2] if len(sys.argv) > 2 else heard
sys.exit(0 if client <= heard or {mild} else f"{{client}} hears {{heard}}")
"""


@pytest.mark.parametrize(("mild", "ends"), [(True, 0), (False, 1)])
def test_a_service_is_rehearsed_as_written(mild: bool, ends: int, desk: Desk) -> None:
    """One whose versions understand each other, and one whose newer does not take an older."""
    texts = {f"service-{n}": SERVICE.format(python=sys.executable, version=n) for n in (1, 2)}
    texts["ask"] = ASK.format(python=sys.executable, mild=mild)
    for name, text in texts.items():
        (desk.folder / name).write_text(text)
        (desk.folder / name).chmod(0o755)
    written = block(OPERATE, "yaml", "rehearsal:")
    (desk.folder / "service.yaml").write_text(f"{written}nodes: [a, b]\n")  # two are quicker
    code, told = desk.run(block(OPERATE, "sh", "fleet rehearse"))
    assert (code, "2 hears 1" in told) == (ends, not mild), told


def test_the_gates_lines_are_found_in_a_log(desk: Desk) -> None:
    """Each word of the table is one that the sources say."""
    log = "handfast gate: refused: group world runs ...\n" * 3 + "step 1\n"
    (desk.folder / "job.log").write_text(log)
    code, told = desk.run(block(OPERATE, "sh", "job.log"))
    assert (code, told.split()[:4]) == (0, ["3", "handfast", "gate:", "refused:"])
    fleet = ROOT / "src" / "handfast"
    said = "".join(path.read_text() for path in (fleet / "gate.py", fleet / "fleet/gate/round.py"))
    for words in (
        "refused",
        "would be refused",
        "did not come to the gate in time",
        "what this node runs is unknown",
        "nobody was judged",
        "could not be judged",
        "warning",
    ):
        assert f"`{words}" in OPERATE
        assert words in said


@pytest.mark.heavy
def test_handfast_is_installed_as_written(tmp_path: Path) -> None:
    """From a clone, and from wheels that were made of it; it needs a package index."""
    place = tmp_path / "opt"
    here, wheels = (block(OPERATE, "sh", having) for having in ("-m venv", "pip wheel"))
    for script in (here, wheels.replace("systemctl", ": systemctl")):
        text = script.replace("/opt/handfast", str(place)).replace("wheels", f"{tmp_path}/wheels")
        subprocess.run(["/bin/sh", "-ec", text], cwd=ROOT, check=True, timeout=300)
        told = subprocess.check_output(
            [place / "bin" / "handfast", "fleet", "inventory", "--tier", "host"], text=True
        )
        assert "kernel.release" in told
