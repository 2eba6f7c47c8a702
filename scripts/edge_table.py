"""The edge table: what happens to every scheme on the way from every format to every format; docs/edges.md.

    python scripts/edge_table.py            prints the table
    python scripts/edge_table.py --write    writes docs/edges.md and the summary in README.md

The zoo is a set of tiny checkpoints, one per scheme, written here as msModelSlim would and carried from there into every format
that can hold them; act order, which msModelSlim has not, is written into a GPTQ folder. Behind it come the fixtures with quantized
inputs, KV cache and small floats, as the real tools wrote them. Each cell is what the plan of a real conversion says.
tests/test_edges.py runs every edge and fails where table and behaviour differ.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert import convert, plan
from convert.records import Plan
from formats import FORMATS
from formats.errors import RefusedError
from formats.ir import Array
from formats.safetensors_file import SafetensorsFile, lay_out

ROOT = Path(__file__).parent.parent
OUT, IN, INNER = 64, 256, 512
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": IN,
    "intermediate_size": INNER,
    "torch_dtype": "float16",
}
DIALECTS = {"msmodelslim:vllm-ascend", "msmodelslim:mindie"}
"""Read as what they are dialects of."""
QUIET = {"repack", "rebase-zero-point", "spell-zero-point", "spell-g_idx", "drop-zero-point", "dequantize"}
"""Moves that nearly every edge makes: not worth a word in a cell."""


@dataclass(frozen=True)
class Scheme:
    """A member of the zoo. group 0: per channel, -1: per tensor; lowest: some zero points are the smallest there is."""

    name: str
    bits: int
    group: int
    symmetric: bool = True
    lowest: bool = False
    scales: str = "F16"
    act_order: bool = False
    float_layer: bool = False


ZOO = (
    Scheme("W4 group 128, symmetric", 4, 128),
    Scheme("W4 group 128, asymmetric", 4, 128, False),
    Scheme("W4 group 128, asymmetric, with a zero point of 0", 4, 128, False, lowest=True),
    Scheme("W4 group 64, asymmetric", 4, 64, False),
    Scheme("W4 group 256, symmetric", 4, 256),
    Scheme("W4 per channel, symmetric", 4, 0),
    Scheme("W4 per tensor, symmetric", 4, -1),
    Scheme("W4 group 128, symmetric, float32 scales", 4, 128, scales="F32"),
    Scheme("W4 group 128, symmetric, down_proj in float", 4, 128, float_layer=True),
    Scheme("W4 group 128, symmetric, act order", 4, 128, act_order=True),
    Scheme("W8 group 128, symmetric", 8, 128),
    Scheme("W8 per channel, asymmetric", 8, 0, False),
)


@dataclass(frozen=True)
class Goldens:
    """What a real tool wrote: the folders of ``fixtures/<folder>``, by their names.

    unreadable   what is there and is no quantized model, as patterns; whole: models that a workspace can hold
    """

    name: str
    folder: str
    unreadable: tuple[str, ...] = ()
    whole: bool = False

    @property
    def places(self) -> dict[str, Path]:
        found = sorted((ROOT / "fixtures" / self.folder).iterdir())
        left = ("src_*", "edge_*", *self.unreadable)
        return {path.name: path for path in found if not any(fnmatch.fnmatchcase(path.name, one) for one in left)}


GOLDENS = (
    Goldens("As msModelSlim wrote it: quantized inputs and KV cache", "msmodelslim_w8", ("w8a8_numpy_fp16",)),
    Goldens("As llm-compressor wrote it: compressed-tensors", "compressed_tensors"),
    Goldens(
        "As LMDeploy wrote it: AWQ, smooth_quant, TurboMind", "lmdeploy", ("*.json", "kv_*", "statistics_*", "llama_mha", "qwen2_gqa"), True
    ),
    Goldens("As Golden Stick wrote it: MindSpore", "golden_stick", ("*.json", "ptq_c8_*", "*.npz", "toy_*", "llama_*")),
)
SECTIONS: tuple[Scheme | Goldens, ...] = (*ZOO, *GOLDENS)

LINEARS = {
    "model.layers.0.self_attn.q_proj": (OUT, IN),
    "model.layers.0.self_attn.k_proj": (OUT, IN),
    "model.layers.0.self_attn.v_proj": (OUT, IN),
    "model.layers.0.self_attn.o_proj": (OUT, IN),
    "model.layers.0.mlp.down_proj": (OUT, INNER),
}


def write_msmodelslim(folder: Path, scheme: Scheme) -> None:
    """A safe_tensor folder of the scheme, with random codes and scales that float16 holds exactly."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(scheme.bits * 1000 + scheme.group)
    kind, half = f"W{scheme.bits}A16", 1 << (scheme.bits - 1)
    arrays: dict[str, tuple[str, Array]] = {"model.norm.weight": ("F16", np.ones(IN, np.float16))}
    labels = {"model_quant_type": kind, "model.norm.weight": "FLOAT"}
    for name, (out, in_) in LINEARS.items():
        if scheme.float_layer and name.endswith("down_proj"):
            arrays[f"{name}.weight"] = ("F16", rng.standard_normal((out, in_)).astype(np.float16))
            labels[f"{name}.weight"] = "FLOAT"
            continue
        shape = (1,) if scheme.group == -1 else (out, in_ // scheme.group if scheme.group else 1)
        scales = rng.uniform(1e-3, 2e-2, shape).astype(np.float16 if scheme.scales == "F16" else np.float32)
        zeros = np.zeros(shape) if scheme.symmetric else rng.integers(1 - half, half, shape)
        if scheme.lowest:
            zeros.flat[0] = -half
        arrays[f"{name}.weight"] = ("I8", rng.integers(-half, half, (out, in_), dtype=np.int8))
        arrays[f"{name}.weight_scale"] = (scheme.scales, scales)
        arrays[f"{name}.weight_offset"] = (scheme.scales, zeros.astype(scales.dtype))
        labels |= {f"{name}.{part}": kind for part in ("weight", "weight_scale", "weight_offset")}
    (file,) = lay_out(
        [(name, dtype, array.shape) for name, (dtype, array) in arrays.items()],
        single_name=f"quant_model_weight_{kind.lower()}.safetensors",
    )
    data = b"".join(np.ascontiguousarray(arrays[name][1]).tobytes() for name in file.tensors)
    (folder / file.name).write_bytes(file.header + data)
    (folder / f"quant_model_description_{kind.lower()}.json").write_text(json.dumps(labels))
    (folder / "config.json").write_text(json.dumps(CONFIG))


def shuffle_groups(folder: Path) -> None:
    """Give a GPTQ folder act order: each input's group drawn anew, every group as large as before."""
    path = folder / "model.safetensors"
    file = SafetensorsFile(path)
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(7)
    for name, info in file.tensors.items():
        if name.endswith(".g_idx"):
            data[info.begin : info.end] = rng.permutation(file.array(name)).astype("<i4").tobytes()
    path.write_bytes(bytes(data))
    for config_name in ("config.json", "quantize_config.json"):
        config = json.loads((folder / config_name).read_text())
        config.get("quantization_config", config)["desc_act"] = True
        (folder / config_name).write_text(json.dumps(config))


def variants(whole: bool = False) -> list[str]:
    """Every variant that can be written, as ``format:variant``. whole: those too that hold nothing but whole models."""
    specs = [spec for spec in FORMATS if whole or spec.name != "turbomind"]
    return [f"{spec.name}:{variant.name}" for spec in specs for variant in spec.variants if variant.holds is not None]


def is_whole(section: Scheme | Goldens) -> bool:
    """Whether its checkpoints are whole models; the zoo's are a few linears."""
    return isinstance(section, Goldens) and section.whole


def sources(folder: Path, scheme: Scheme | Goldens) -> dict[str, Path]:
    """The scheme in every format that holds it, by variant; scales keep their dtype. Goldens by name."""
    if isinstance(scheme, Goldens):
        return scheme.places
    first = folder / "msmodelslim.safe_tensor"
    write_msmodelslim(first, scheme)
    if scheme.act_order:
        found = {}
        for variant in ("gptq:v1", "gptq:v2"):
            place = folder / variant.replace(":", ".")
            convert(first, place, variant, scale_dtype="keep")
            shuffle_groups(place)
            found[variant] = place
        return found
    found = {"msmodelslim:safe_tensor": first}
    for variant in variants():
        if variant in found or variant in DIALECTS or variant in {"dense:hf", "mindspore:float"}:
            continue
        place = folder / variant.replace(":", ".")
        try:
            result = convert(first, place, variant, scale_dtype="keep")
        except RefusedError:
            continue
        if not {"repeat-scales", "split-groups", "widen-codes"} & set(result.plan.move_counts()):
            found[variant] = place  # spelled with other groups or bits it would be another scheme
    return found


KEEP_WEIGHTS = {"quant-bias-rounded"}
"""Losses after which the law's weights are what they were."""


def outcome(decided: Plan) -> str:
    """A cell: "exact", "exact, by MOVE", "rounded: CODE" or "refused: CODE"."""
    if decided.refusals:
        return "refused: " + ", ".join(sorted({refusal.code for refusal in decided.refusals}))
    moves = sorted(set(decided.move_counts()) - QUIET)
    by = f", by {', '.join(moves)}" if moves else ""
    if decided.losses:
        return "rounded: " + ", ".join(sorted(loss.code for loss in decided.losses)) + by
    return f"exact{by}"


def edges(folder: Path) -> Iterator[tuple[Scheme | Goldens, str, str, Path, Plan]]:
    """(scheme, source variant, target variant, source folder, plan) of every edge."""
    for number, scheme in enumerate(SECTIONS):
        for source, place in sources(folder / str(number), scheme).items():
            for target in variants(is_whole(scheme)):
                yield scheme, source, target, place, plan(place, target)


def table(folder: Path) -> dict[str, dict[str, dict[str, str]]]:
    """{scheme: {source: {target: cell}}}."""
    cells: dict[str, dict[str, dict[str, str]]] = {}
    for scheme, source, target, _, decided in edges(folder):
        cells.setdefault(scheme.name, {}).setdefault(source, {})[target] = outcome(decided)
    return cells


def render(cells: dict[str, dict[str, dict[str, str]]]) -> str:
    """docs/edges.md."""
    lines = [
        "# From every format to every format",
        "",
        "Made by `scripts/edge_table.py`; `tests/test_edges.py` runs every edge. Rows are sources, columns targets. *exact*: every",
        "weight bit for bit, *by* a named move where groups or codes are spelled in another way. *rounded*: done by default, measured,",
        "refused by `--strict`. *refused*: by the code that `weighbridge plan` explains. A format that cannot hold a scheme as it is",
        "has no row for it. `vllm-ascend` and `mindie` are dialects that are read as what they are dialects of. The last four tables",
        "start from the fixtures of those names, so that each of the tools' schemes is there.",
        "TurboMind's workspaces hold whole models, and only LMDeploy's fixtures are some: they have columns there.",
        "`dense` and `mindspore:float` hold float16 here; with `--scale-dtype float32` they are exact.",
    ]
    for scheme, rows in cells.items():
        targets = list(next(iter(rows.values())))
        lines += ["", f"## {scheme}", "", "| from | " + " | ".join(targets) + " |", "|" + " --- |" * (len(targets) + 1)]
        lines += [f"| {source} | " + " | ".join(row[target] for target in targets) + " |" for source, row in rows.items()]
    return "\n".join(lines) + "\n"


def parse(text: str) -> dict[str, dict[str, dict[str, str]]]:
    """The inverse of ``render``."""
    cells: dict[str, dict[str, dict[str, str]]] = {}
    scheme, targets = "", []
    for line in text.splitlines():
        if line.startswith("## "):
            scheme = line[3:]
        elif line.startswith("| from"):
            targets = [cell.strip() for cell in line.strip("| ").split("|")][1:]
        elif line.startswith("| ") and not line.startswith("| ---") and scheme:
            source, *row = [cell.strip() for cell in line.strip("|").split("|")]
            cells.setdefault(scheme, {})[source] = dict(zip(targets, row, strict=True))
    return cells


def summary(cells: dict[str, dict[str, dict[str, str]]]) -> str:
    """README's table: per pair of formats, how many schemes (or fixtures) are exact, and what is refused by what."""
    targets = variants()
    origins = {origin: [rows[origin] for rows in cells.values() if origin in rows] for origin in targets}
    origins |= {goldens.folder: list(cells[goldens.name].values()) for goldens in GOLDENS}
    lines = ["| from \\ to | " + " | ".join(targets) + " |", "|" + " --- |" * (len(targets) + 1)]
    for origin, places in origins.items():
        if not places:
            continue
        row = []
        for target in targets:
            found = [one[target] for one in places]
            exact = sum(cell.startswith("exact") for cell in found)
            refused = sorted({code for cell in found if cell.startswith("refused") for code in cell.split(": ")[1].split(", ")})
            row.append(f"{exact} of {len(found)} exact" + (f"; refuses {', '.join(refused)}" if refused else ""))
        lines.append(f"| {origin} | " + " | ".join(row) + " |")
    return "\n".join(lines)


START, END = "<!-- edges: scripts/edge_table.py --write -->", "<!-- /edges -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cells = table(Path(folder))
    if not options.write:
        print(render(cells))
        return
    (ROOT / "docs" / "edges.md").write_text(render(cells), encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    made = re.sub(f"{re.escape(START)}.*?{re.escape(END)}", lambda match: f"{START}\n{summary(cells)}\n{END}", readme, flags=re.DOTALL)
    (ROOT / "README.md").write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
