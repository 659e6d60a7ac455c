# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Locks of folders that another process has. Run as a script with a lock file, it takes the lock, says whether it has it,
and keeps it until its standard input ends.
"""

import subprocess
import sys
from contextlib import contextmanager

import filelock


@contextmanager
def another_process_tries(path):
    """Starts a process that wants the lock `path`; gives whether it has it."""
    command = [sys.executable, __file__, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        yield {"locked\n": True, "refused\n": False}[other.stdout.readline()]


def main(path):
    lock = filelock.FileLock(path, timeout=0)  # gone with its last reference
    try:
        lock.acquire()
    except filelock.Timeout:
        print("refused", flush=True)
    else:
        print("locked", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1])
