"""`ShardedSaves`: Lightning's sharded strategies on the CPU over gloo, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import asyncckpt
from tests.integrations.test_lightning import losses_of

pytestmark = pytest.mark.integration
ROOT = Path(asyncckpt.__file__).parents[1]


def run_script(folder, *, ranks=2, env=None, **options):
    """(whether it ended well, what it said)"""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *launch, "-m", "tests.integrations.sharded_script", str(folder), json.dumps(options)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | (env or {})
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    return ended.returncode == 0, (ended.stdout + ended.stderr)[-4000:]


def test_a_sharded_run_on_s3_killed_and_resumed_gives_the_same_losses(s3_server, s3_url, tmp_path):
    """Two ranks with FSDP2; rank 1 is killed when its files of step 6 are written, and nobody's are committed. And
    Lightning alone goes on from the folder that a run on a disk left."""
    ended, output = run_script(tmp_path / "whole", losses=str(tmp_path / "whole.txt"))
    assert ended, output
    killed = str(tmp_path / "killed.txt")
    ended, output = run_script(s3_url, env=s3_server.env, losses=killed, kill_in=6)
    assert not ended
    files = asyncckpt.storage.open_storage(s3_url, s3_server.storage_options).list_files()
    assert {path.split("/")[0] for path in files if "manifest" in path} == {"epoch=0-step=4.ckpt", "last.ckpt"}
    ended, output = run_script(s3_url, env=s3_server.env, losses=killed, resume=f"{s3_url}/last.ckpt")
    assert ended, output
    assert losses_of(killed) == losses_of(tmp_path / "whole.txt")
    assert len(losses_of(killed)) == 8

    last = str(tmp_path / "whole" / "last.ckpt")
    ended, output = run_script(
        tmp_path / "stock", losses=str(tmp_path / "stock.txt"), resume=last, stock=True, max_steps=10
    )
    assert ended, output
    assert list(losses_of(tmp_path / "stock.txt")) == ["8", "9"]
