"""Write what fixtures/mindspore holds of texts, CRCs and what is no tensor, with MindSpore 2.7.1, on the CPU.

    python make_mindspore_goldens.py OUT [GOLDEN_STICK.ckpt]

Run by the interpreter that ``nox -s mindspore`` builds; it imports nothing of Weighbridge, and no test runs it.

* ``texts_crc.ckpt``: a dictionary with a text between two parameters, ``append_dict`` of every type, ``crc_check``;
* ``texts_crc.expected.json``: name to [type, shape, value];
* ``ckpt_strategy_rank_0.ckpt``: a parallel strategy of one operator and one parameter;
* ``ranks/rank_0`` to ``rank_3``, if a checkpoint of Golden Stick is given: its parts, two of each, by ``transform_checkpoint_by_rank`` and
  the strategy beside them, which splits as MindFormers' Llama does; only of block 0, so that they are small.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor
from mindspore.train.node_strategy_pb2 import ParallelStrategyMap
from mindspore_files import strategy

ROW_PARALLEL = ("attention.wo.", "feed_forward.w2.")
"""Cells whose inputs are split; of all others it is the outputs."""

APPENDED = {"epoch": 7, "step": -(2**62), "lr": 0.1, "done": True, "note": "量化 ✓ 𝄞", "empty": "", "after": 3}


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        "first": Parameter(Tensor(np.arange(6, dtype=np.float32).reshape(2, 3)), name="first"),
        "between": "a text, 文",
        "last": Parameter(Tensor(np.arange(4, dtype=np.int8)), name="last"),
    }
    ms.save_checkpoint(weights, str(out / "texts_crc.ckpt"), append_dict=APPENDED, crc_check=True)
    found = ms.load_checkpoint(str(out / "texts_crc.ckpt"), crc_check=True)
    expected = {
        name: ["text", [], value] if isinstance(value, str) else [str(value.dtype), list(value.shape), value.asnumpy().tolist()]
        for name, value in found.items()
    }
    (out / "texts_crc.expected.json").write_text(json.dumps(expected, ensure_ascii=False) + "\n", "utf-8")

    strategy({"file": str(out / "ckpt_strategy_rank_0.ckpt")})


def split_axis(name: str, dimensions: int, int4: bool) -> int | None:
    """The axis that MindFormers' Llama splits a parameter along."""
    if "norm" in name:
        return None
    if dimensions == 1:
        return None if any(cell in name for cell in ROW_PARALLEL) else 0
    outputs = 1 if int4 or not name.endswith("weight") else 0
    return 1 - outputs if any(cell in name for cell in ROW_PARALLEL) else outputs


def ranks(out: Path, whole: Path) -> None:
    """Split a checkpoint over four devices, an array of 2 copies by 2 parts."""
    out.mkdir(parents=True, exist_ok=True)
    found = {name: value for name, value in ms.load_checkpoint(str(whole)).items() if ".layers.1." not in name}
    ms.save_checkpoint([{"name": name, "data": value} for name, value in found.items()], str(out / "whole.ckpt"))
    layouts = ParallelStrategyMap(current_stage=0)
    for name, value in found.items():
        axis = split_axis(name, len(value.shape), "Int4" in str(value.dtype))
        if axis is None:
            continue
        layout = layouts.parallel_layout_item.add(param_name=name).parallel_layouts
        layout.dev_matrix.add(dim=[2, 2])
        layout.tensor_map.add(dim=[0 if number == axis else -1 for number in range(len(value.shape))])
        layout.param_split_shape.add()
        layout.indices_offset.add()
        layout.field, layout.opt_weight_shard_step, layout.opt_weight_shard_size = 0, 0, 0
    strategy_file = out / "ckpt_strategy_rank_0.ckpt"
    strategy_file.write_bytes(layouts.SerializeToString())
    for rank in range(4):
        (out / f"rank_{rank}").mkdir(exist_ok=True)
        part = out / f"rank_{rank}" / f"checkpoint_{rank}.ckpt"
        ms.transform_checkpoint_by_rank(rank, {0: str(out / "whole.ckpt")}, str(part), None, str(strategy_file))


if __name__ == "__main__":
    if len(sys.argv) not in {2, 3}:
        sys.exit("usage: make_mindspore_goldens.py OUT [GOLDEN_STICK.ckpt]")
    main(Path(sys.argv[1]))
    if len(sys.argv) == 3:
        ranks(Path(sys.argv[1]) / "ranks", Path(sys.argv[2]))
