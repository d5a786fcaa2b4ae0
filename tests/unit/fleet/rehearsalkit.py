"""A small service to rehearse, and files of rehearsals of it; run as a script it is one node of it.

A node of one version greets its peers; what it does about a peer of another version is its manner:

- ``mild`` answers, whatever it is greeted with;
- ``silent`` never answers another version;
- ``brittle`` ends when it is greeted by another version;
- ``strict`` answers that it speaks its own version only;
- ``fresh`` is mild, and can't be started again in the version that it was.

A node that is told ``raise`` notes its version once all nodes run it, and one of a lower version
refuses such notes when it starts.
"""

import json
import os
import socket
import sys
import threading
from pathlib import Path

FILE = """\
rehearsal: greeters
versions:
  "1": {{manner: {manner}, notes: {notes}}}
  "2": {{manner: {manner}, notes: {notes}}}
nodes: [{nodes}]
run: ["{{python}}", -IS, {kit}, node, "{{version}}", "{{manner}}", "{{notes}}", "{{dir}}",
  "{{port}}"]
ready: [bash, -c, "exec 3<>/dev/tcp/127.0.0.1/{{port}}"]
probe: {{each: fleet, run: ["{{python}}", -IS, {kit}, probe]}}
stop-s: 5
ready-s: 20
probe-s: {probe_s}
"""


def service(directory, *, manner="mild", notes="plain", nodes="a, b", probe_s=20, more=""):
    """Write a rehearsal of the service; gives its path."""
    path = Path(directory) / "greeters.yaml"
    kit = json.dumps(__file__)
    text = FILE.format(manner=manner, notes=notes, nodes=nodes, probe_s=probe_s, kit=kit)
    path.write_text(text + more)
    return str(path)


def job(directory, text, versions="{'1': {}, '2': {}}", nodes="a, b"):
    """Write the rehearsal of a job; gives its path."""
    path = Path(directory) / "job.yaml"
    path.write_text(f"rehearsal: job\nversions: {versions}\nnodes: [{nodes}]\n{text}")
    return str(path)


def python(program):
    """A program as arguments in YAML; its braces are plain."""
    program = program.replace("{", "{{").replace("}", "}}")
    return json.dumps([sys.executable, "-IS", "-c", program])


def told():
    """What the rehearsal tells its processes."""
    return json.loads(os.environ["HANDFAST_REHEARSAL"])


def ask(port, line):
    """Send a line to a node, and wait for the one that it answers."""
    with socket.create_connection(("127.0.0.1", port)) as end:
        end.sendall(f"{line}\n".encode())
        return end.makefile().readline().strip()


def node(version, manner, notes, directory, port):
    """Be a node, until it is ended."""
    kept, before = Path(directory, "notes"), Path(directory, "before")
    if kept.exists() and kept.read_text() > version:
        print(f"these are notes of version {kept.read_text()}, and this is {version}")
        sys.exit(96)
    if manner == "fresh" and before.exists() and before.read_text() == version:
        sys.exit("nobody steps twice")
    before.write_text(version)
    listen(version, manner, kept if notes == "raise" else None, int(port))


def listen(version, manner, kept, port):
    """Answer who greets this node, and greet others for who checks it."""
    door = socket.create_server(("127.0.0.1", port))
    peers = [ports[0] for ports in told()["ports"].values() if ports[0] != port]

    def greet(other):
        if other != version and manner == "silent":
            threading.Event().wait()
        if other != version and manner == "brittle":
            print(f"greeted by {other}, which {version} has never heard of", flush=True)
            os._exit(1)
        if other != version and manner == "strict":
            return f"no: this is {version}, and it speaks to {version} only"
        return "hello"

    def answer(word, rest):
        if word == "check":
            answers = [ask(peer, f"greet {version}") for peer in peers]
            return next((each for each in answers if each != "hello"), "hello")
        if word == "note" and kept:
            kept.write_text(version)
        return greet(rest or version)

    def serve(end):
        with end:
            word, _, rest = end.makefile().readline().strip().partition(" ")
            if word:
                end.sendall(f"{answer(word, rest)}\n".encode())

    while True:
        end, _ = door.accept()
        threading.Thread(target=serve, args=(end,), daemon=True).start()


def probe():
    """Let each node greet all others."""
    fleet = told()
    for ports in fleet["ports"].values():
        heard = ask(ports[0], "check")
        if heard.startswith("no: "):
            print(heard[4:], file=sys.stderr)
            sys.exit(96)
        if heard != "hello":
            sys.exit("no answer")
    if len(set(fleet["versions"].values())) == 1:
        for ports in fleet["ports"].values():
            ask(ports[0], "note")


if __name__ == "__main__":
    {"node": node, "probe": probe}[sys.argv[1]](*sys.argv[2:])
