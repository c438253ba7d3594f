"""A real process that fills a store is killed with SIGKILL at random moments, at least 100 times."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from conftest import PARTS, make_rows
import stablekd_fast.cache.store as store_module
from stablekd_fast.cache.manifest import Manifest
from stablekd_fast.cache.store import RowStore

SAMPLES = 3000
wanted = Manifest(PARTS, SAMPLES, {{}})
store_module._SMALLEST_SHARD = 300 * wanted.row_bytes

def fill(folder, seed):
    with RowStore(folder, wanted, write=True) as store:
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(seed))
        for rows in order.split(20):
            store.put(rows, make_rows(rows))

started = time.perf_counter()
fill(Path({folder!r}) / "timing" / "x", 0)
seconds = time.perf_counter() - started

random.seed(0)
kills, partial, completed, number = 0, 0, 0, 0
while kills < 100 or partial < 50 or completed < 5:  # how many it takes depends on the machine
    folder, held = Path({folder!r}) / str(number) / "x", 0
    number += 1
    while held < SAMPLES:
        child = os.fork()
        if child == 0:
            fill(folder, kills)
            os._exit(0)
        time.sleep(random.uniform(0, seconds / 2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        with RowStore(folder, wanted, write=True) as store:
            present = store.present(torch.arange(SAMPLES)).nonzero().flatten()
            assert len(present) == len(store) == store.verify() >= held, (held, len(store))
            for found, expected in zip(store.gather(present), make_rows(present)):
                assert torch.equal(found, expected)
            partial += held < len(store) < SAMPLES
            held = len(store)
    completed += 1
    with RowStore(folder, wanted) as store:
        assert store.verify() == SAMPLES
    assert not list(folder.glob(".shard-*")), list(folder.iterdir())
print(json.dumps({{"kills": kills, "in the middle": partial, "completed": completed}}))
"""


def test_killed_at_random_moments_a_fill_keeps_whole_rows_and_completes(tmp_path):
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    counts = json.loads(process.stdout)
    assert counts["kills"] >= 100 and counts["in the middle"] >= 50 and counts["completed"] >= 5
