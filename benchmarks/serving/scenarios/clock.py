"""A wall clock that a scenario moves: a small library in front of the C library's clock.

The clock of the machine stays as it is, and so does the monotonic clock of the process.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

# The offset is read for each look at the clock, so that a step takes effect at once.
SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static long offset(void) {
    char text[32] = {0};
    const char *path = getenv("SCENARIO_CLOCK");
    int file = path ? open(path, O_RDONLY) : -1;
    if (file < 0) return 0;
    if (read(file, text, sizeof text - 1) < 0) text[0] = 0;
    close(file);
    return atol(text);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*original)(clockid_t, struct timespec *);
    if (!original) original = dlsym(RTLD_NEXT, "clock_gettime");
    int status = original(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += offset();
    return status;
}
"""
VARIABLE = "SCENARIO_CLOCK"


class WallClock:
    """The wall clock of a process that is started with `environment`.

    Args:
        folder: A folder for the library and the offset.
    """

    def __init__(self, folder: Path) -> None:
        self._offset = folder / "offset"
        library = folder / "clock.so"
        source = folder / "clock.c"
        source.write_text(SOURCE)
        command = ["cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
        subprocess.run(command, check=True)
        self.step(0)
        self.environment = {"LD_PRELOAD": str(library), VARIABLE: str(self._offset)}

    @staticmethod
    def is_possible() -> bool:
        """Return True if there is a compiler for C."""
        return shutil.which("cc") is not None

    def step(self, seconds: int) -> None:
        """Set the offset of the wall clock."""
        # Replaced as a whole: the process may read it at any moment.
        new = self._offset.with_suffix(".new")
        new.write_text(str(seconds))
        new.replace(self._offset)
