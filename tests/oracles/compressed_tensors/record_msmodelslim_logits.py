"""Record what msModelSlim's own simulation of its W8A8 models says, in fixtures/msmodelslim_w8_logits.safetensors.

    python record_msmodelslim_logits.py FIXTURES

Run by the interpreter that has msModelSlim 26.1.0 (``nox -s msmodelslim`` builds it); it imports nothing of Weighbridge, and no test
runs it. Each of RECORDED is made again by ``make_msmodelslim_w8.py``, and its weight file must be the fixture's, byte for byte. Then the
calibrated model, whose linears round weights and inputs and multiply in float, is run in float32 on the ids that are recorded too. Its
weights are put as the file says, int8 * weight_scale: rounding the float weights anew, in float32 instead of the model's dtype,
would give other codes.

Dynamic models are not among them: the tool simulates their inputs asymmetrically, with an offset for each token, which no engine does
(measured: exactly so, (max - min) / 255).
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from make_msmodelslim_w8 import CASES, make_case
from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import Calibrator
from safetensors.torch import load_file, save_file

RECORDED = ("w8a8_static_bf16", "w8a8_static_ascendv1_fp16", "w8a8_static_tensor_fp16")
IDS = torch.arange(48).mul(37).add(5).remainder(128)


def main(fixtures: Path) -> None:
    torch.set_num_threads(1)
    found, save = {"input_ids": IDS}, Calibrator.save

    def save_and_run(calibrator: Any, folder: str, **options: Any) -> None:
        save(calibrator, folder, **options)
        (weights,) = Path(folder).glob("*.safetensors")
        stored, model = load_file(weights), copy.deepcopy(calibrator.model).float()
        for name, module in model.named_modules():
            if f"{name}.weight_scale" in stored:
                module.weight.data = stored[f"{name}.weight"].float() * stored[f"{name}.weight_scale"].float()
        with torch.no_grad():
            found[Path(folder).name] = model(IDS[None]).logits[0]

    Calibrator.save = save_and_run
    with tempfile.TemporaryDirectory() as folder:
        for case in RECORDED:
            make_case(case, CASES[case], fixtures / "compressed_tensors", Path(folder))
            for path in (Path(folder) / case).glob("*.safetensors"):
                assert path.read_bytes() == (fixtures / "msmodelslim_w8" / case / path.name).read_bytes(), path
    save_file(found, fixtures / "msmodelslim_w8_logits.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
