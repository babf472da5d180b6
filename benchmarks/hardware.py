"""What a benchmark ran on, for the first line of what it prints."""

import os
import platform


def hardware() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name} ({platform.machine()}), {os.cpu_count()} cores, 1 thread used"
