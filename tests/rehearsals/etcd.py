"""Asks an etcd cluster for the rehearsal beside: over its JSON gateway, so that it needs no client.

``ready PORT``: the member is healthy, so it has a leader. ``probe FILE``: a value that is put by
each member is read by all, and so is whatever was put before, which FILE remembers.

etcd raises its cluster version by itself some seconds after the last member was upgraded. The probe
waits for that, as people who upgrade by hand do: what a downgrade comes to hangs on it.
"""

import base64
import http.client
import json
import os
import sys
import time
from pathlib import Path


def call(port, path, body=None):
    """Ask a member; gives what it answers."""
    member = http.client.HTTPConnection("127.0.0.1", port, timeout=15)
    member.request("GET" if body is None else "POST", path, body and json.dumps(body))
    answer = member.getresponse()
    text = answer.read().decode()
    if answer.status != 200:
        sys.exit(f"{path} of the member at {port}: {answer.status} {text.strip()}")
    return json.loads(text)


def coded(text):
    """Spell a key or a value as the gateway does."""
    return base64.b64encode(text.encode()).decode()


def settle(ports):
    """Wait until the cluster's version is no lower than that of all members."""
    while True:
        told = [call(port, "/version") for port in ports]
        lowest = min(each["etcdserver"].split(".")[:2] for each in told)
        if all(each["etcdcluster"].split(".")[:2] >= lowest for each in told):
            return
        time.sleep(0.1)


def probe(file):
    """Put by each, read by all."""
    ports = [ports[0] for ports in json.loads(os.environ["HANDFAST_REHEARSAL"])["ports"].values()]
    settle(ports)
    written = json.loads(file.read_text()) if file.exists() else {}
    for port in ports:
        key = f"key {len(written)}"
        written[key] = f"put by {port}"
        call(port, "/v3/kv/put", {"key": coded(key), "value": coded(written[key])})
    for port in ports:
        found = call(port, "/v3/kv/range", {"key": coded("key"), "range_end": coded("kez")})
        read = {each["key"]: each["value"] for each in found.get("kvs", [])}
        if read != {coded(key): coded(value) for key, value in written.items()}:
            sys.exit(
                f"the member at {port} has {len(read)} of {len(written)} keys, or other values"
            )
    file.write_text(json.dumps(written))


if __name__ == "__main__":
    if sys.argv[1] == "ready":
        sys.exit(call(int(sys.argv[2]), "/health")["health"] != "true")
    probe(Path(sys.argv[2]))
