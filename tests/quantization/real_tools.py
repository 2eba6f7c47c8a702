"""Runs a script of this folder with the interpreter of a real tool, which `make oracles` installs in an environment of its own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from interpreters import interpreter
from safetensors.torch import load_file, save_file


def ask(tool, script, folder, tensors, settings):
    """The tensors that ``script`` answers, given ``tensors`` and ``settings``, which is JSON. Skips where the tool is not installed; in
    CI that is a failure."""
    python = interpreter(tool)
    save_file(tensors, folder / "tensors.safetensors")
    (folder / "settings.json").write_text(json.dumps(settings), "utf-8")
    command = [python, str(Path(__file__).parent / script), "tensors.safetensors", "settings.json", "answer.safetensors"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"{script}: exit status {run.returncode}\n{run.stdout[-2000:]}\n{run.stderr[-6000:]}"
    return load_file(folder / "answer.safetensors")
