"""Reading threads that the system refuses: an error that says so, no thread left behind, and a process that goes on."""

import os
import shutil
import subprocess
import sys

import pytest

COMPILER = os.environ.get("CXX", "c++")

REFUSE = r"""
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>

static int left = -1;

// The call after `calls` more is refused as the system refuses one; -1: none.
extern "C" void refuse_thread_after(int calls) { left = calls; }

extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* how, void* (*body)(void*), void* with) {
    using Create = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
    static const Create create = reinterpret_cast<Create>(dlsym(RTLD_NEXT, "pthread_create"));
    if (left >= 0 && left-- == 0) return EAGAIN;
    return create(thread, how, body, with);
}
"""

SCRIPT = """
import ctypes, sys
from pathlib import Path
import torch
from stablekd_fast.cache.codecs import RowFormat
from stablekd_fast.cache.columns import Column
from stablekd_fast.cache.manifest import Manifest
from stablekd_fast.cache.memory_rows import MemoryRows
from stablekd_fast.cache.shard import Part
from stablekd_fast.cache.store import READING_THREADS, RowStore
from stablekd_fast.cache.writer import RowWriter
from stablekd_fast.errors import CacheError

refuse = ctypes.CDLL(None).refuse_thread_after
count = lambda: len(list(Path("/proc/self/task").iterdir()))
files = lambda: len(list(Path("/proc/self/fd").iterdir()))
wanted = Manifest((Part("codes", torch.int8, (3,)),), 5, {})
folder, rows = Path(sys.argv[1]), torch.arange(5)
values = torch.arange(15, dtype=torch.int8).view(5, 3)
with RowStore(folder, wanted, write=True) as store:
    store.put(rows, [values])
del store
threads, opened = count(), files()
for place in range(READING_THREADS):
    refuse(place)
    try:
        RowStore(folder, wanted)
        raise SystemExit(f"thread {place + 1} was not refused")
    except CacheError as error:
        start = f"The system refused thread {place + 1} of the {READING_THREADS} that read rows (Resource temporarily"
        assert str(error).startswith(start) and "ulimit -u" in str(error), error
    assert (count(), files()) == (threads, opened), (place, count(), files())
refuse(READING_THREADS)
with RowStore(folder, wanted) as store:
    assert count() == threads + READING_THREADS
    assert torch.equal(store.gather(rows)[0], values)
writer = RowWriter(torch.device("cpu"))
form = RowFormat("fp32", (3,))
column = Column("one", form, MemoryRows(form.parts, 5, torch.device("cpu")))
refuse(0)
try:
    writer.put(rows, [(column, [values.float()])])
    raise SystemExit("the thread that stores rows was not refused")
except CacheError as error:
    assert str(error).startswith("The system refused the thread that stores rows (can't start new thread)"), error
writer.close()
print("all refused")
"""


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="what refuses threads needs a C++ compiler")
def test_any_reading_thread_may_be_refused(tmp_path):
    """A library that is loaded before all others refuses the first thread, then the second, and so on."""
    source, library = tmp_path / "refuse.cpp", tmp_path / "refuse.so"
    source.write_text(REFUSE)
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    preloaded = " ".join(filter(None, [str(library), os.environ.get("LD_PRELOAD")]))
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "store"],
        env={**os.environ, "LD_PRELOAD": preloaded},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (found.returncode, found.stdout.strip()) == (0, "all refused"), found.stderr
