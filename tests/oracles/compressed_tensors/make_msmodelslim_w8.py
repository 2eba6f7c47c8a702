"""Write fixtures/msmodelslim_w8: small checkpoints of msModelSlim 26.1.0's W8 family, by its Python API (V0), on the CPU.

    python make_msmodelslim_w8.py SOURCES OUT [CASE ...]

Run by the interpreter that has msModelSlim 26.1.0 (``nox -s msmodelslim`` builds it); it imports nothing of Weighbridge, and no test
runs it. SOURCES is fixtures/compressed_tensors, whose float models these are made from, in the dtype that the case's name ends in.
Each folder is as ``Calibrator.save`` left it, made writable again, plus ``golden_case.json``: the exact arguments. Calibration: four
samples of 32 ids, each passed alone. The .npy files are pickles, whose bytes (not tensors) differ from run to run.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from msmodelslim.pytorch.llm_ptq.anti_outlier import AntiOutlier, AntiOutlierConfig
from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import Calibrator, QuantConfig
from msmodelslim.pytorch.llm_ptq.llm_ptq_tools.save.writer import buffered_safetensor
from transformers import AutoModelForCausalLM

QWEN, LLAMA, LLAMA2 = "src_qwen2_bf16", "src_llama_fp16", "src_llama2l_fp16"
Case = dict[str, Any]


def case(source: str, quant: dict[str, Any] | None = None, *, anti: dict[str, Any] | None = None, **opt: Any) -> Case:
    base = {"dev_type": "cpu", "disable_names": [], "a_bit": 8, "w_bit": 8, "mm_tensor": False}
    return {"src": source, "anti": anti, "quant_config": base | (quant or {}), "opt": opt}


W4A8 = {"w_bit": 4, "is_dynamic": True, "is_lowbit": True, "open_outlier": False}

CASES: dict[str, Case] = {
    "w8a8_static_bf16": case(QWEN),
    "w8a8_static_tensor_fp16": case(LLAMA, {"mm_tensor": True}),
    "w8a8_static_ascendv1_fp16": case(LLAMA, save_type=["ascendV1"]),
    "w8a8_static_anti_m4_bf16": case(LLAMA, anti={"anti_method": "m4", "a_bit": 8, "w_bit": 8, "dev_type": "cpu"}),
    "w8a8_sharded_fp16": case(LLAMA2, part_file_size=1, shrink=8192),
    "w8a8_sharded_named_bf16": case(
        LLAMA2, part_file_size=1, shrink=8192, safetensors_name="mine.safetensors", json_name="words_of_mine.json"
    ),
    "w8a8_dynamic_bf16": case(LLAMA, {"is_dynamic": True}),
    "w8a8_pdmix_ascendv1_bf16": case(QWEN, {"pdmix": True}, save_type=["ascendV1"]),
    "w8a8s_sparse_fp16": case(LLAMA, {"w_bit": 4, "co_sparse": True, "fraction": 0.011}),
    "w8a8s_lowbit_bf16": case(QWEN, {"w_bit": 4, "is_lowbit": True, "do_smooth": False, "use_sigma": True}),
    "w4a8_dynamic_g32_bf16": case(LLAMA, W4A8 | {"group_size": 32}),
    "w4a8_dynamic_ascendv1_g128_bf16": case(QWEN, W4A8 | {"group_size": 128}, save_type=["ascendV1"]),
    "w8a8_c8_sym_bf16": case(QWEN, kv_sym=True),
    "w8a8_c8_asym_fp16": case(LLAMA, kv_sym=False),
    "w8a8_numpy_fp16": case(QWEN, save_type=["numpy"]),
    "w8a8_numpy_nobias_fp16": case(LLAMA, save_type=["numpy"]),
    "w8a8_mix_cfg_ascendv1_bf16": case(
        LLAMA,
        mix_cfg={"*.mlp.*": "w8a8_dynamic", "*.o_proj": "w8a16", "*.k_proj": "float", "*": "w8a8"},
        save_type=["ascendV1"],
    ),
}


def make_case(name: str, about: Case, sources: Path, out: Path) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if name.endswith("_bf16") else torch.float16
    model = AutoModelForCausalLM.from_pretrained(sources / about["src"], torch_dtype=dtype)
    model.config.torch_dtype = dtype  # by which the tool chooses how deq_scale is stored
    generator = torch.Generator().manual_seed(7)
    data = [[torch.randint(0, 128, (1, 32), generator=generator), torch.ones(1, 32, dtype=torch.long)] for _ in range(4)]
    opt = about["opt"]
    if about["anti"]:
        AntiOutlier(model, calib_data=data, cfg=AntiOutlierConfig(**about["anti"])).process()
    config = QuantConfig(**about["quant_config"])
    if "kv_sym" in opt:
        config = config.kv_quant(kv_sym=opt["kv_sym"])
    more = {"mix_cfg": opt["mix_cfg"]} if "mix_cfg" in opt else {}
    calibrator = Calibrator(model, config, calib_data=data, disable_level="L0", **more)
    calibrator.run()
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o750)
    gigabyte = buffered_safetensor.ONE_GB_FILE_BYTES
    buffered_safetensor.ONE_GB_FILE_BYTES = gigabyte // opt.get("shrink", 1)
    saving = {key: opt[key] for key in ("safetensors_name", "json_name", "part_file_size") if key in opt}
    calibrator.save(str(folder), save_type=opt.get("save_type", ["safe_tensor"]), **saving)
    buffered_safetensor.ONE_GB_FILE_BYTES = gigabyte
    for path in folder.iterdir():
        path.chmod(0o644)
    record = {"case": name, **about, "model_quant_type": str(config.model_quant_type), "msmodelslim": "26.1.0 (PyPI)"}
    (folder / "golden_case.json").write_text(json.dumps(record | {"torch": torch.__version__}, indent=1) + "\n")


def main(sources: Path, out: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names or CASES:
        make_case(name, CASES[name], sources, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("sources", type=Path, metavar="SOURCES")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("cases", nargs="*", metavar="CASE")
    arguments = parser.parse_args()
    main(arguments.sources, arguments.out, arguments.cases)
