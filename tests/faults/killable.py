"""Merges in processes that can be killed at any moment: a warm process forks a new one for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SERVER = """
import json, os, signal, sys, time, torch, sd_mecha
from sd_mecha.storage import output_file

torch.set_num_threads(1)
sd_mecha.merge(sd_mecha.n_average({"w": torch.ones(2)}), threads=0)  # everything is imported

def slowed(call, before, after):
    def run(*args, **kwargs):
        time.sleep(before)
        try:
            return call(*args, **kwargs)
        finally:
            time.sleep(after)
    return run

def work(first, second, output, threads, resume):
    output_file._FLUSH_SIZE = 8_000
    os.pwrite = slowed(os.pwrite, 0.0005, 0)
    for name in ("fsync", "fdatasync", "replace", "ftruncate", "unlink", "posix_fallocate"):
        setattr(os, name, slowed(getattr(os, name), 0.001, 0.001))
    recipe = sd_mecha.n_average(sd_mecha.model(first), sd_mecha.model(second))
    sd_mecha.merge(recipe, output=output, threads=threads, resume=resume, tqdm=None, output_dtype=None)

for line in sys.stdin:
    *arguments, kill_after = json.loads(line)
    pid = os.fork()
    if not pid:
        sys.stdin.close()
        sd_mecha.set_log_level("CRITICAL")
        try:
            work(*arguments)
            os._exit(0)
        except sd_mecha.errors.OutputError as error:
            print(error, file=sys.stderr)
            os._exit(3)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(4)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)  # not waited for yet: it is still this process's, even if it has ended
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Killable:
    """Runs merges one after the other, each in a process of its own."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-c", SERVER]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def merge(
        self, first: Path, second: Path, output: Path, threads: int, resume: bool, kill_after: float | None = None
    ) -> int:
        """Average two models, and kill the process after some seconds.

        Returns:
            Its exit status; that of a killed one is negative.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        arguments = [str(first), str(second), str(output), threads, resume, kill_after]
        self._server.stdin.write(json.dumps(arguments) + "\n")
        self._server.stdin.flush()
        return os.waitstatus_to_exitcode(int(self._server.stdout.readline()))

    def close(self) -> None:
        self._server.communicate(timeout=60)
