"""Check an msModelSlim W4A16 or W8A16 folder with msModelSlim's own code, on the CPU.

    python msmodelslim_check.py FOLDER OUT.safetensors

Run by the interpreter that has msModelSlim 26.1.0 (``nox -s msmodelslim`` builds it). It imports nothing of Weighbridge.

1. Its validator, QuantModelJsonDescription.check_description_match, by path, on each weight file. It refuses a file that others
   may write, a type that it does not know, and a tensor without a description; it looks at no number.
2. Its reader, FakeQuantizeCalibrator, which puts a dequantized weight in the place of each linear that the description does not
   call FLOAT. It knows only the unpacked form, of safe_tensor, so folders with a "version" (ascendV1) stop after step 1.

For every linear P that step 2 replaces it writes P.weight, float32 [out, in]: the law in the scales' own dtype, upcast; and, for
W4A16, P.packed, int8: the codes as the tool itself packs them when it saves as ascendV1. OUT holds one number ``checked``, of
tensors seen by step 1, in any case.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from msmodelslim.pytorch.llm_ptq.llm_ptq_tools.calibrator.calibrator_classes.fake_quantize import FakeLinearQuantizerOfW8A16OrW4A16
from msmodelslim.pytorch.llm_ptq.llm_ptq_tools.calibrator.calibrator_classes.fakequantize_calibrator import FakeQuantizeCalibrator
from msmodelslim.pytorch.llm_ptq.llm_ptq_tools.llm_ptq_utils import QuantModelJsonDescription
from msmodelslim.pytorch.llm_ptq.llm_ptq_tools.save.complex_quantifier import _w4a16_pack_int4
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

Tensors = dict[str, torch.Tensor]


def read_model(folder: Path, description: dict, tensors: Tensors) -> Tensors:
    """P.weight of every linear that the tool's reader replaces in the model of the folder's config.json."""
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    FakeQuantizeCalibrator(model, None, "cpu", description, tensors)
    return {
        f"{name}.weight": layer.deq_weight.contiguous()
        for name, layer in model.named_modules()
        if isinstance(layer, FakeLinearQuantizerOfW8A16OrW4A16)
    }


def main(folder: Path, out: Path) -> None:
    (description_path,) = folder.glob("quant_model_description*.json")
    description = json.loads(description_path.read_text("utf-8"))
    tensors: Tensors = {}
    for path in sorted(folder.glob("quant_model_weight*.safetensors")):
        QuantModelJsonDescription.check_description_match(
            quant_model_json_description_path=str(description_path), quant_model_safetensor_path=str(path)
        )
        tensors |= load_file(path)
    result = {"checked": torch.tensor(len(tensors))}
    if "version" not in description:
        weights = read_model(folder, description, tensors)
        result |= weights
        if description["model_quant_type"] == "W4A16":
            for name in weights:
                per_channel = tensors[f"{name}_scale"].shape[-1] == 1  # as the tool's saver asks
                result[f"{name.removesuffix('.weight')}.packed"] = _w4a16_pack_int4(tensors[name], per_channel).contiguous()
    save_file(result, out)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: msmodelslim_check.py FOLDER OUT.safetensors")
    with torch.no_grad():
        main(Path(sys.argv[1]), Path(sys.argv[2]))
