# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of the control socket that follows jobs by their events."""
import json
import socket


class Refused(Exception):
    """The server has answered with an error."""


class Control:
    def __init__(self, path="control"):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(240)
        self.socket.connect(path)
        self.lines = self.socket.makefile()  # not for writing, too: that would forget what was read ahead
        self.events, self.number = [], 0
        assert "QMP" in self.read()
        self.ask("qmp_capabilities")

    def read(self):
        line = self.lines.readline()
        assert line, "the server has hung up"
        return json.loads(line)

    def ask(self, command, **arguments):
        """Its return value; a_b is the argument a-b."""
        self.number += 1
        arguments = {k.replace("_", "-"): v for k, v in arguments.items() if v is not None}
        request = {"execute": command, "arguments": arguments, "id": self.number}
        self.socket.sendall(json.dumps(request).encode() + b"\n")
        while (message := self.read()).get("id") != self.number:
            self.events.append(message)
        if "error" in message:
            raise Refused(message["error"]["desc"])
        return message["return"]

    def states(self, job):
        """All states of a job, each when it is told, until there is no job any more."""
        while True:
            event = self.events.pop(0) if self.events else self.read()
            if event["event"] == "JOB_STATUS_CHANGE" and event["data"]["id"] == job:
                yield event["data"]["status"]
                if event["data"]["status"] == "null":
                    return
            elif event["event"].startswith("BLOCK_JOB_") and event["data"].get("device") == job:
                yield event["data"]["error"] if "error" in event["data"] else event["event"]

    def chain(self, disk="d"):
        """[(file, format)] of a disk, the active image first."""
        top, = (b["inserted"]["file"] for b in self.ask("query-block") if b["device"] == disk)
        nodes = {n["file"]: n for n in self.ask("query-named-block-nodes")}
        out = []
        while top:
            out.append((top, nodes[top]["drv"]))
            top = nodes[top].get("backing_file")
        return out

    def close(self):
        self.lines.close()
        self.socket.close()
