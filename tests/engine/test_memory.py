"""Out of memory in a real process: one sentence that says where, how much, and what to try."""

import subprocess
import sys

SCRIPT = """
import resource, sys, torch
torch.set_num_threads(1)
from stablekd_fast.cli import main
main(["plan", "--teacher", "resnet20", "--student", "resnet20", "--image-size", "32", "--classes", "10"])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 450 * 2**20,) * 2)
sys.exit(main(["distill", "--method", "ce", "--student", "wrn_40_2", "--batch-size", "1024",
               "--precision", "fp32", "--out", sys.argv[1]]))
"""


def test_out_of_memory_names_stage_group_and_bytes(tmp_path):
    process = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / "run"], capture_output=True, text=True)
    assert process.returncode == 2, process.stderr
    error = process.stderr.splitlines()[-1]
    assert "Out of memory in stage 1, group 1: could not allocate" in error
    assert "bytes" in error and "--batch-size 512" in error
    assert not (tmp_path / "run" / "student.safetensors").exists()
