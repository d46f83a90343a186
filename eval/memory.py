"""Peak memory of a command and all its children, in total and without the pages of files.

    python eval/memory.py -- llmquant quantize MODEL --output OUT --quality fast

Pages of files (mapped weights) count into the total but can be dropped at any time; anonymous memory cannot. Linux
only: reads /proc every 50 ms and looks for children every second, so that shorter peaks may be missed. The last line of
stdout is one JSON object; in it
"anonymous_by_time" has the peaks of twenty equal parts of the time, which are alike where memory does not grow.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import psutil

PARTS = 20  # of the time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    command = parser.parse_args().command
    command = command[1:] if command[:1] == ["--"] else command
    if not command:
        parser.error("give a command after --")
    start = time.monotonic()
    process = subprocess.Popen(command)
    total = 0
    seen: list[int] = []
    family = [process.pid]
    while process.poll() is None:
        if len(seen) % 20 == 0:  # it looks at all processes there are
            family = _family(process.pid)
        sizes = [_memory(child) for child in family]
        total = max(total, sum(size[0] for size in sizes))
        seen.append(sum(size[1] for size in sizes))
        time.sleep(0.05)
    seconds = time.monotonic() - start
    anonymous = max(seen, default=0)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"peak {total / 2**30:.2f} GiB, anonymous {anonymous / 2**30:.2f} GiB, {seconds:.1f} s, "
        f"{used.ru_utime + used.ru_stime:.1f} s of CPU"
    )
    found = {"peak_bytes": total, "anonymous_bytes": anonymous, "seconds": round(seconds, 2)}
    found |= {"user_seconds": round(used.ru_utime, 2), "system_seconds": round(used.ru_stime, 2)}
    step = max(1, -(-len(seen) // PARTS))
    print(json.dumps(found | {"anonymous_by_time": [max(seen[i : i + step]) for i in range(0, len(seen), step)]}))
    sys.exit(process.returncode)


def _family(pid: int) -> list[int]:
    try:
        parent = psutil.Process(pid)
        return [pid, *(child.pid for child in parent.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def _memory(pid: int) -> tuple[int, int]:
    """(resident, anonymous) bytes of one process; zeros if it is gone."""
    try:
        with open(f"/proc/{pid}/status") as file:
            facts = dict(line.split(":", 1) for line in file)
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    return tuple(int(facts[key].split()[0]) * 1024 if key in facts else 0 for key in ("VmRSS", "RssAnon"))  # type: ignore[return-value]


if __name__ == "__main__":
    main()
