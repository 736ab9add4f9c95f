"""Runs the program of a file under limits, and ends with a status of its own if it came to its end.

Arguments: the file; seconds of computing, bytes of memory and of a file; the status.
"""

import os
import resource
import signal
import sys

path, seconds, memory, size, passed = sys.argv[1], *map(int, sys.argv[2:])


def limit(what, most, kill=0):
    hard = resource.getrlimit(what)[1]
    least = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (least, min(least + kill, hard) if hard > 0 else least + kill))


def stop(*_):
    raise TimeoutError(f"{seconds} s of computing")


signal.signal(signal.SIGXCPU, stop)
limit(resource.RLIMIT_CPU, seconds, 1)
limit(resource.RLIMIT_FSIZE, size)
limit(resource.RLIMIT_CORE, 0)
limit(resource.RLIMIT_NPROC, 1)
if sys.platform != "darwin":  # which has no such limit
    limit(resource.RLIMIT_AS, memory)

with open(path, encoding="utf-8") as file:
    program = file.read()
sys.argv = [""]
sys.path = [folder for folder in sys.path if folder]
try:
    exec(compile(program, "program", "exec"), {})
except BaseException as error:  # one that exits before its tests has not passed them
    said = [type(error).__name__, *filter(None, [str(error)])]
    sys.stderr.write(": ".join(said)[:200])
    sys.stderr.flush()
    os._exit(1)
os._exit(passed)
