#!/usr/bin/env python3
"""Record what msModelSlim's own ms_to_vllm.py writes for the fixtures.

    python scripts/record_ms_to_vllm.py PATH/example/ms_to_vllm.py \
        fixtures/ms_to_vllm/reference.json --pythonpath PATH --commit COMMIT

The script is run as it is, in a process of its own, over every fixture with
weight-only layers. It needs torch, safetensors and the msmodelslim package
(--python names an interpreter that has them, --pythonpath is put in front of
PYTHONPATH for it). This file needs numpy only, and nothing of this project:
it is the reference that the project's own writers are compared with.

For every (case, target, w_bit) the JSON holds

  verdict      "right", "crash", or "wrong: <why>". Every layer of the output
               is decoded with the format's own law and compared, bit for bit,
               with (weight - weight_offset) * weight_scale in float32. For
               GPTQ v1 two readings of a stored zero are tried, (lane + 1) with
               and without a mask; both must agree with the source.
  wrong_layers per wrong layer, the number of wrong weights of its total under
               each reading (or why it cannot be decoded)
  dropped      input tensors that left no trace in the output
  extra        output tensors that a model of this kind should not have
  tensors      in file order: [dtype, shape, SHA-256 of the raw bytes]
  exception    for a crash, its class and message
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "msmodelslim"

# case, float source, the right w_bit
CASES = [
    ("w4a16_g128_sym_bf16", "src_bf16", 4),
    ("w4a16_g128_asym_fp16", "src_fp16", 4),
    ("w4a16_awq_m3_g128_sym_bf16", "src_bf16", 4),
    ("w4a16_pc_sym_bf16", "src_bf16", 4),
    ("w4a16_gptq_pc_sym_fp16", "src_fp16", 4),
    ("w4a16_ascendv1_g128_sym_bf16", "src_bf16", 4),
    ("w4a16_ascendv1_pc_sym_bf16", "src_bf16", 4),
    ("w8a16_g128_sym_bf16", "src_bf16", 8),
    ("w8a16_pc_asym_fp16", "src_fp16", 8),
    ("v1_w8a16_pc", "src1l_bf16_tok", 8),
    ("w8a8_mix_cfg_fp16", "src_fp16", 8),
]
# Uses with the wrong --w_bit (4 is the script's default, awq its default target).
WRONG_USES = [
    ("w8a16_g128_sym_bf16", "awq", 4),
    ("w8a16_g128_sym_bf16", "gptq", 4),
    ("w8a16_pc_asym_fp16", "gptq", 4),
    ("v1_w8a16_pc", "gptq", 4),
    ("w4a16_g128_sym_bf16", "gptq", 8),
    ("w4a16_g128_asym_fp16", "gptq", 8),
]

WEIGHT_ONLY = ("W4A16", "W8A16")
DTYPES = {"I8": "<i1", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4", "BF16": "<u2"}
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # lane i of a word holds column order[i]


class Tensors:
    """A safetensors file: names in file order, raw bytes, float32 values."""

    def __init__(self, path):
        data = Path(path).read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        header.pop("__metadata__", None)
        self.entries = dict(sorted(header.items(), key=lambda kv: kv[1]["data_offsets"]))
        self.body = data[8 + size :]

    def __contains__(self, name):
        return name in self.entries

    def shape(self, name):
        return tuple(self.entries[name]["shape"])

    def raw(self, name):
        begin, end = self.entries[name]["data_offsets"]
        return self.body[begin:end]

    def array(self, name):
        """The values; bfloat16 widened to float32."""
        kind = self.entries[name]["dtype"]
        flat = np.frombuffer(self.raw(name), DTYPES[kind])
        if kind == "BF16":
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        return flat.reshape(self.shape(name))

    def record(self):
        return {name: [e["dtype"], e["shape"], hashlib.sha256(self.raw(name)).hexdigest()] for name, e in self.entries.items()}


def nibbles(packed, axis):
    """Signed 4-bit values, two per int8, low nibble first, along `axis`."""
    low = ((packed.astype(np.int16) & 0xF) ^ 8) - 8
    high = packed.astype(np.int16) >> 4
    shape = list(packed.shape)
    shape[axis] *= 2
    return np.stack([low, high], axis + 1).reshape(shape)


def source_parts(source, layer, shape):
    """(weight, offset, scale) of a layer as float32 [N, K], [N, G], [N, G]."""
    weight = source.array(layer + ".weight")
    if weight.shape == (shape[0] // 2, shape[1]):
        weight = nibbles(weight, 0)
    elif weight.shape == (shape[0], shape[1] // 2):
        weight = nibbles(weight, 1)
    if weight.shape != shape:
        raise ValueError(f"{layer}: weight {weight.shape} for a float weight {shape}")
    offset = source.array(layer + ".weight_offset").astype(np.float32)
    scale = source.array(layer + ".weight_scale").astype(np.float32)
    return weight.astype(np.float32), offset, scale


def expand(values, width):
    """[N, G] to [N, K]."""
    return np.repeat(values, width // values.shape[1], axis=1)


def lanes(words, bits, axis):
    """Unsigned fields of int32 words, lane 0 lowest, unfolded along `axis`."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    fields = (words.view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)
    shape = list(words.shape)
    shape[axis] *= shifts.size
    return np.moveaxis(fields, -1, axis + 1).reshape(shape).astype(np.int64)


def decode(output, layer, target, bits, shape):
    """{reading: float32 [N, K]}, or a sentence why there is nothing to decode."""
    names = [f"{layer}.{part}" for part in ("qweight", "qzeros", "scales")]
    if any(name not in output for name in names):
        return "not converted: int8 weights pass through"
    qweight, qzeros, scales = (output.array(name) for name in names)
    if target == "awq":
        codes, zeros = lanes(qweight, bits, 1), lanes(qzeros, bits, 1)
        back = np.argsort(AWQ_ORDER)
        codes = codes.reshape(codes.shape[0], -1, 8)[..., back].reshape(codes.shape)
        zeros = zeros.reshape(zeros.shape[0], -1, 8)[..., back].reshape(zeros.shape)
        readings = {"stored": zeros}
    else:
        codes, zeros = lanes(qweight, bits, 0), lanes(qzeros, bits, 1) + 1
        readings = {"masked": zeros & (2**bits - 1), "unmasked": zeros}
    if codes.shape != shape[::-1]:
        return f"qweight unpacks to [in, out] {list(codes.shape)}, the layer is {list(shape[::-1])}"
    if zeros.shape != scales.shape:
        return f"qzeros unpacks to {list(zeros.shape)}, scales are {list(scales.shape)}"
    scale = expand(scales.astype(np.float32).T, shape[1])
    return {reading: (codes.T - expand(z.T, shape[1])).astype(np.float32) * scale for reading, z in readings.items()}


def reason(source, layer, target, bits, shape, label):
    """Why a layer is wrong, from what its source holds."""
    if source.shape(layer + ".weight") != shape:
        return "packed source weight taken for one value per byte"
    if label != f"W{bits}A16":
        return f"{label} source clamped to {bits} bits"
    low = -(2 ** (bits - 1))
    if target == "gptq" and (source.array(layer + ".weight_offset") == low).any():
        return "zero point 0 minus one smeared over its word"
    return "unexplained"


def judge(case, description, source, output, float_model, target, bits):
    """The verdict on one output, with the facts behind it."""
    layers = {
        name[: -len(".weight")]: label
        for name, label in description.items()
        if name.endswith(".weight") and name[: -len("weight")] + "weight_scale" in source
    }
    wrong, whys = {}, []
    for layer, label in layers.items():
        shape = float_model.shape(layer + ".weight")
        decoded = decode(output, layer, target, bits, shape)
        if isinstance(decoded, str):
            wrong[layer] = decoded
            why = decoded if label not in WEIGHT_ONLY else None
        else:
            weight, offset, scale = source_parts(source, layer, shape)
            law = (weight - expand(offset, shape[1])) * expand(scale, shape[1])
            bad = {reading: int((values != law).sum()) for reading, values in decoded.items()}
            if not any(bad.values()):
                continue
            wrong[layer] = dict(bad, of=law.size)
            why = None
        whys.append(why or reason(source, layer, target, bits, shape, label))
    if not layers:
        raise ValueError(f"{case}: no layers to judge")
    verdict = "right"
    if wrong:
        counts = [f"{why} ({whys.count(why)} of {len(layers)} layers)" for why in dict.fromkeys(whys)]
        verdict = "wrong: " + "; ".join(counts)

    packed = {f"{layer}.{part}" for layer in layers for part in ("qweight", "qzeros", "scales")}
    expected = packed | set(float_model.entries) - {layer + ".weight" for layer in layers}
    trace = set(output.entries)
    for layer in layers:
        if layer + ".qweight" in output:
            trace |= {f"{layer}.{part}" for part in ("weight", "weight_scale", "weight_offset")}
    trace |= {name for name in source.entries if name.replace("module.weight", "weight") in output}
    return {
        "verdict": verdict,
        "layers": len(layers),
        "wrong_layers": wrong,
        "dropped": [name for name in source.entries if name not in trace],
        "extra": [name for name in output.entries if name not in expected],
    }


def run_case(options, case, float_name, target, bits, workdir):
    folder = FIXTURES / case
    (model,) = folder.glob("quant_model_weight*.safetensors")
    (json_path,) = folder.glob("quant_model_description*.json")
    result = Path(workdir) / "res.safetensors"
    result.unlink(missing_ok=True)
    environment = dict(os.environ)
    if options.pythonpath:
        inherited = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [options.pythonpath, inherited]))
    done = subprocess.run(
        [options.python, options.script, "--model", model, "--json", json_path,
         "--save_path", result, "--w_bit", str(bits), "--target_tool", target],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    entry = {"case": case, "target": target, "w_bit": bits}
    if done.returncode:
        lines = list(re.finditer(r"^([\w.]*(?:Error|Exception)): (.*)$", done.stderr, re.M))
        if not lines or lines[-1][1] in ("ImportError", "ModuleNotFoundError"):
            sys.exit(f"{case}: the script did not get to work:\n{done.stderr}")
        entry.update(verdict="crash", exception=lines[-1][1], message=lines[-1][2])
        return entry
    output = Tensors(result)
    description = json.loads(json_path.read_text(encoding="utf-8"))
    float_model = Tensors(FIXTURES / float_name / "model.safetensors")
    entry.update(judge(case, description, Tensors(model), output, float_model, target, bits))
    entry["tensors"] = output.record()
    return entry


def dump(document):
    """JSON with one line per tensor."""
    head = json.dumps(document["script"], indent=2).replace("\n", "\n  ")
    runs = []
    for run in document["runs"]:
        fields = [f'   "{key}": {json.dumps(value)}' for key, value in run.items() if key != "tensors"]
        if "tensors" in run:
            rows = [f"    {json.dumps(name)}: {json.dumps(facts, separators=(',', ':'))}" for name, facts in run["tensors"].items()]
            fields.append('   "tensors": {\n' + ",\n".join(rows) + "\n   }")
        runs.append("  {\n" + ",\n".join(fields) + "\n  }")
    return '{\n  "script": ' + head + ',\n  "runs": [\n' + ",\n".join(runs) + "\n  ]\n}\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script", help="the real ms_to_vllm.py")
    parser.add_argument("out", help="the JSON to write")
    parser.add_argument("--pythonpath", help="folder with the msmodelslim package, for the script")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has torch")
    parser.add_argument("--commit", help="commit of Ascend/msmodelslim, to be noted in the JSON")
    options = parser.parse_args()

    ask = "import json, numpy, safetensors, torch\nprint(json.dumps({m.__name__: m.__version__ for m in (torch, numpy, safetensors)}))"
    versions = json.loads(subprocess.check_output([options.python, "-c", ask]))
    script = {
        "repository": "Ascend/msmodelslim",
        "commit": options.commit,
        "path": "example/ms_to_vllm.py",
        "sha256": hashlib.sha256(Path(options.script).read_bytes()).hexdigest(),
        **versions,
    }
    floats = {case: name for case, name, _ in CASES}
    uses = [(case, target, bits) for case, _, bits in CASES for target in ("awq", "gptq")]
    runs = []
    with tempfile.TemporaryDirectory() as workdir:
        for case, target, bits in uses + WRONG_USES:
            runs.append(run_case(options, case, floats[case], target, bits, workdir))
            print(f"{case} {target} {bits}: {runs[-1]['verdict']}", flush=True)
    Path(options.out).write_text(dump({"script": script, "runs": runs}), encoding="utf-8")


if __name__ == "__main__":
    main()
