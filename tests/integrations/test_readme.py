"""README's snippets for trainers run as they stand, and once more, as the same script is after an interruption."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_readme import ROOT, is_of_a_trainer, python_blocks

pytestmark = pytest.mark.integration
BLOCKS = {
    block.split("from asyncckpt.integrations.")[1].split()[0]: block
    for block in python_blocks()
    if is_of_a_trainer(block)
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_snippet_runs_in_an_empty_folder_and_again(name: str, tmp_path: Path):
    """The second run finds what the first has saved."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for _ in range(2):
        ended = subprocess.run(
            [sys.executable, "-c", BLOCKS[name]], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
