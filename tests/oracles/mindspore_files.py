"""Save and load checkpoints with the real MindSpore, on the CPU.

    python mindspore_files.py JOBS.json

Run by the interpreter that has MindSpore 2.7.1 (``nox -s mindspore`` builds it). It imports nothing of Weighbridge. JOBS is a list of

* ``{"do": "save", "file", "tensors", "slice_kib", "options"}``: ``save_checkpoint`` of tensors [name, type, shape, bytes in
  hexadecimal, times], type being the name of a ``mindspore.dtype`` and times how often the bytes are repeated; slice_kib: the module's
  SLICE_SIZE, if it is to be another. Of ``options``, ``enc_key`` is hexadecimal, and the others are passed on (``crc_check``,
  ``async_save``, ``append_dict``, ``format`` ...);
* ``{"do": "load", "file", "options"}``: ``load_checkpoint``; ``dec_key`` is hexadecimal;
* ``{"do": "strategy", "file"}``: a parallel strategy of one operator and one parameter, by MindSpore's own message classes.
* ``{"do": "merge", "folder", "out", "file"}``: ``transform_checkpoints`` of the ranks in a folder, by its strategy file, into one
  checkpoint in ``out``, which is loaded; and of every parameter of the whole checkpoint in ``file`` that ``merge_sliced_parameter`` of the
  loaded ranks gives something else, its name.

It prints one line of JSON: of each job what went wrong, in words, or null; of a load and a merge [name, type, shape, SHA-256 of the
bytes]s, of a text [name, "text", [], text]. A merge that differs is what went wrong.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

os.environ["GLOG_v"] = "4"  # noqa: SIM112
import mindspore as ms
from mindspore import Parameter
from mindspore._c_expression import TensorPy
from mindspore.train import serialization
from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

SLICE = serialization.SLICE_SIZE


def parameter(name: str, type: str, shape: list[int], content: str, times: int) -> Parameter:
    made = TensorPy.convert_bytes_to_tensor(bytes.fromhex(content) * times, tuple(shape), getattr(ms, type))
    return Parameter(made, name=name)


def save(job: dict[str, Any]) -> None:
    options = dict(job["options"])
    if "enc_key" in options:
        options["enc_key"] = bytes.fromhex(options["enc_key"])
    serialization.SLICE_SIZE = job.get("slice_kib", SLICE)
    try:
        ms.save_checkpoint([{"name": tensor[0], "data": parameter(*tensor)} for tensor in job["tensors"]], job["file"], **options)
        serialization._wait_async_thread_save_ckpt()
    finally:
        serialization.SLICE_SIZE = SLICE


def load(job: dict[str, Any]) -> list[list[Any]]:
    options = dict(job["options"])
    if "dec_key" in options:
        options["dec_key"] = bytes.fromhex(options["dec_key"])
    found: list[list[Any]] = []
    for name, value in ms.load_checkpoint(job["file"], **options).items():
        if isinstance(value, str):
            found.append([name, "text", [], value])
        else:
            found.append([name, str(value.dtype), list(value.shape), hashlib.sha256(value.get_bytes()).hexdigest()])
    return found


def strategy(job: dict[str, Any]) -> None:
    found = ParallelStrategyMap(current_stage=0)
    item = found.parallel_strategy_item.add(node_name="MatMul-op0")
    item.parallel_strategys.stage = 0
    item.parallel_strategys.parallel_strategy.add(dim=[1, 2])
    layout = found.parallel_layout_item.add(param_name="weight").parallel_layouts
    layout.dev_matrix.add(dim=[2])
    layout.tensor_map.add(dim=[0, -1])
    layout.field, layout.opt_weight_shard_step, layout.opt_weight_shard_size = 0, 0, 0
    Path(job["file"]).write_bytes(found.SerializeToString())


def merge(job: dict[str, Any]) -> list[list[Any]]:
    folder = Path(job["folder"])
    strategy_file = str(folder / "strategy" / "ckpt_strategy_rank_0.ckpt")
    ms.transform_checkpoints(str(folder), job["out"], "merged_", strategy_file, None)
    said = ms.build_searched_strategy(strategy_file)
    ranks = [ms.load_checkpoint(str(path)) for path in sorted(folder.glob("rank_*/*.ckpt"))]
    for name, value in ms.load_checkpoint(job["file"]).items():
        if "Int4" in str(value.dtype) or value.dtype == ms.bfloat16:  # of which it makes no arrays
            continue
        found = ms.parallel.checkpoint_transform.merge_sliced_parameter([rank[name] for rank in ranks], said)
        split = -1 if len(value.shape) == 0 else max(said[name].tensor_map[0].dim, default=-1)
        whole = ranks[0][name] if split < 0 else found
        if whole.asnumpy().tobytes() != value.asnumpy().tobytes():
            raise ValueError(f"{name} is merged to {whole.shape}, and is {value.shape}, or their data differ")
    return load({"file": str(next(Path(job["out"]).glob("rank_0/*.ckpt"))), "options": {}})


DO = {"save": save, "load": load, "strategy": strategy, "merge": merge}


def main(jobs: Path) -> list[Any]:
    answers: list[Any] = []
    for job in json.loads(jobs.read_text("utf-8")):
        try:
            answers.append(DO[job["do"]](job))
        except Exception as error:
            answers.append(f"{type(error).__name__}: {error}")
    return answers


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: mindspore_files.py JOBS.json")
    logging.disable(logging.CRITICAL)
    with contextlib.redirect_stdout(sys.stderr):
        result = main(Path(sys.argv[1]))
    sys.stdout.write(json.dumps(result) + "\n")
