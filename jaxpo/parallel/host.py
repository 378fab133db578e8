"""The host process: its settings, and the devices that it opens."""

import contextlib
import ctypes
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterator

import jax

# Numbers of glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Let the process keep the memory that it frees. Returns whether the C library accepted the settings.

    XLA's CPU client allocates the scratch memory of a program again at every call. glibc returns blocks of that size to
    the operating system, which has to clear every page again at the next call: a third of the CPU seconds of small
    training steps. Peak memory does not change. This does nothing on other systems than Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1))
    return mallopt is not None and all([mallopt(name, value) for name, value in settings])


EXTRAS = {"cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}  # platform -> what to install for it
# What libtpu writes to standard error where there is no chip, or another process looks at it.
ALARMS = re.compile(
    rb"^(Failed to find host bounds|WARNING: (All log messages|Logging) before|[EWI]\d{4} |=== Source Location|"
    rb"learning/|WARNING: could not determine TPU|platforms/|tfrc/|third_party/|Failed to get TPU metadata)"
)


def open_devices() -> list[jax.Device]:
    """The devices of jax, which this opens if it is the first to ask.

    Raises:
      ValueError: JAX_PLATFORMS asks for devices that are not there.
    """
    try:
        with quiet_libtpu():
            return jax.devices()
    except (RuntimeError, AssertionError, AttributeError) as error:
        asked = jax.config.jax_platforms or "(not set)"
        why = " ".join(str(error).split()).split(" (set JAX_PLATFORMS")[0][:200] or "jax has no plugin for it"
        install = [f"pip install -e '.[{EXTRAS[name]}]', " for name in asked.split(",") if name in EXTRAS]
        raise ValueError(
            f"JAX_PLATFORMS={asked}, but no such device can be used here ({why}): {''.join(install[:1])}set it to "
            "another, e.g. cpu, or unset it"
        ) from error


@contextlib.contextmanager
def quiet_libtpu() -> Iterator[None]:
    """Leave out of standard error what libtpu writes there although nothing is wrong; all else is shown afterwards."""
    if importlib.util.find_spec("libtpu") is None:
        yield
        return
    sys.stderr.flush()
    held = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(held, 2)
            os.close(held)
            file.seek(0)
            for line in file.readlines():
                if line.strip() and not ALARMS.match(line):
                    os.write(2, line)
