"""Write what fixtures/mindspore holds of texts, CRCs and what is no tensor, with MindSpore 2.7.1, on the CPU.

    python make_mindspore_goldens.py OUT

Run by the interpreter that ``nox -s mindspore`` builds; it imports nothing of Weighbridge, and no test runs it.

* ``texts_crc.ckpt``: a dictionary with a text between two parameters, ``append_dict`` of every type, ``crc_check``;
* ``texts_crc.expected.json``: name to [type, shape, value];
* ``ckpt_strategy_rank_0.ckpt``: a parallel strategy of one operator and one parameter.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor
from mindspore_files import strategy

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


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make_mindspore_goldens.py OUT")
    main(Path(sys.argv[1]))
