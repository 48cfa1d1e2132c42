"""Runs a command and prints what it cost as JSON; imports next to nothing, so that little memory counts as the command's."""

import os
import sys
import time


def main() -> int:
    """Run the command in sys.argv; its output goes to stderr."""
    start = time.perf_counter()
    child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
    _, status, usage = os.wait4(child, 0)
    wall_s = time.perf_counter() - start
    cpu_s = usage.ru_utime + usage.ru_stime
    # Linux counts in kilobytes.
    print(f'{{"wall_s": {wall_s}, "cpu_s": {cpu_s}, "peak_bytes": {usage.ru_maxrss * 1024}}}', flush=True)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(abs(main()))
