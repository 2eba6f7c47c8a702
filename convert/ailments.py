"""What can be wrong with an AWQ or GPTQ folder, found from headers, configs and zero points, and what would mend it.

The readers are strict: what they cannot trust, they refuse. This module forgives, so that ``doctor`` can say what is wrong and
mend what can be mended without a guess. Each finder adds ailments, and to the ``Cure`` what would end them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from formats.checkpoint import Location
from formats.ir import Array
from formats.safetensors_file import read_json

from .config_ailments import config_name, configs
from .patient import Patient
from .stored import (
    PICKLED,
    SHARD,
    StoredLayer,
    all_lanes_are,
    group_index,
    is_symmetric,
    lanes_layout,
    residual,
    zero_lanes,
)

JUDGED = 32
"""Layers at most, spread over the model, whose codes are averaged where zero points are asymmetric."""


def examine(location: Location) -> Patient:
    """Everything that is wrong with the folder, in ``ailments``, and its ``cure``."""
    patient = Patient(location)
    if any(PICKLED.fullmatch(file.path.name) for file in patient.tensors.files):
        _pickled(patient)
    else:
        _index(patient)
        _metadata(patient)
    _shapes(patient)
    if patient.spelling == "gptq":
        _version(patient)
        _wrapped(patient)
    _missing_parts(patient)
    if patient.spelling:
        configs(patient)
    return patient


def _pickled(patient: Patient) -> None:
    """Weights in pickles, as LMDeploy's auto_awq wrote them until 0.8: engines refuse them, or run what they say."""
    files = [file.path.name for file in patient.tensors.files]
    patient.cure.headers, patient.cure.index = True, len(files) > 1
    found = "its tensors are in a pickle, which may run code when it is loaded and which engines no longer take"
    patient.add("pickled", files[0], found, "write them as safetensors, byte for byte", mendable=True)


def _index(patient: Patient) -> None:
    """The index against the files."""
    names = [name for name in patient.location.names if name.endswith(".safetensors.index.json")]
    files = [file.path.name for file in patient.tensors.files]
    if not names:
        if len(files) > 1:
            patient.cure.index = True
            patient.add("index-missing", files[0], f"{len(files)} shards and no index", "regenerate it from the shards", mendable=True)
        return
    holds = {name: files[patient.tensors[name].file] for name in patient.tensors}
    how = "regenerate it from the files" if len(files) > 1 else "one file needs no index: leave it out"
    for name in names:
        if not any(file.removesuffix(".safetensors").startswith(name.removesuffix(".safetensors.index.json")) for file in files):
            continue  # another set of files has it
        document = read_json(patient.location.folder / name)
        listed = document.get("weight_map")
        if not isinstance(listed, dict):
            patient.cure.index = True
            patient.add("index-lies", name, "it has no weight_map", how, mendable=True)
            continue
        gone = sorted({str(shard) for shard in listed.values()} - set(files))
        absent = [key for key in listed if key not in holds]
        if gone and absent and (len(files) > 1 or SHARD.fullmatch(files[0])):
            patient.add("shard-missing", gone[0], f"{len(absent)} tensors are only in files that are not there", "copy the files there")
            continue
        moved = [key for key, shard in listed.items() if key in holds and holds[key] != shard]
        extra = [key for key in holds if key not in listed]
        for what, keys in (
            ("lists tensors that no file holds", absent),
            ("names the wrong file of tensors", moved),
            ("leaves out tensors", extra),
        ):
            if keys:
                patient.cure.index = True
                patient.add("index-lies", name, f"it {what}: {len(keys)}, first {keys[0]}", how, mendable=True)
        metadata = document.get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        if total != patient.tensors.nbytes:
            patient.cure.index = True
            patient.add("index-size", name, f"total_size is {total}, the tensors take {patient.tensors.nbytes} bytes", how, mendable=True)


def _metadata(patient: Patient) -> None:
    """transformers wants to know the framework of a safetensors file; msModelSlim's readers do not ask, and its files do not say."""
    if any(name.startswith("quant_model_description") for name in patient.location.names):
        return
    for file in patient.tensors.files:
        if file.metadata.get("format") != "pt":
            patient.cure.headers = True
            found = f"its metadata says format {file.metadata.get('format')!r}, loaders want 'pt'"
            patient.add("metadata-format", file.path.name, found, "write the header anew; the data stays", mendable=True)


def _shapes(patient: Patient) -> None:
    for layer in patient.layers:
        if layer.trouble:
            how = "no loader can read it: fetch the checkpoint again, or quantize again"
            patient.add("shapes-contradict", layer.name, layer.trouble, how)
    for layer in patient.sound:
        index = group_index(patient.tensors, layer) if layer.spelling == "gptq" else None
        if index is not None and index.size and not (int(index.min()) >= 0 and int(index.max()) < layer.groups):
            found = f"g_idx names groups {int(index.min())} to {int(index.max())}, but there are {layer.groups}"
            patient.add("g_idx-range", layer.name, found, "which groups were meant cannot be known: fetch the checkpoint again")


def _version(patient: Patient) -> None:
    """Zero points of one version under the other's name (checkpoint_format)."""
    holders = [layer for layer in patient.sound if "qzeros" in layer.parts]
    uniform: dict[str, list[str]] = {"v1": [], "v2": []}
    for layer in holders:
        words = patient.tensors.array(f"{layer.name}.qzeros")
        assert layer.bits is not None
        for version in uniform:
            if all_lanes_are(words, layer.bits, (1 << (layer.bits - 1)) - (version == "v1")):
                uniform[version].append(layer.name)
    other = "v1" if patient.says == "v2" else "v2"
    patient.version_is_certain = bool(holders) and len(holders) in {len(uniform["v1"]), len(uniform["v2"])}
    name = {"v1": "gptq", "v2": "gptq_v2"}
    if holders and len(uniform[other]) == len(holders):
        patient.version = other
        meant = "one step off everywhere"
        found = f"checkpoint_format says {name[patient.says]}, but every zero point is the middle code of {name[other]}, so {meant}"
        patient.add(
            "wrong-version", config_name(patient), found, f"say checkpoint_format {name[other]}, and leave the words", mendable=True
        )
    elif uniform["v1"] and uniform["v2"]:
        how = "two tools wrote into one folder: fetch the checkpoint again"
        patient.add_layers(
            "mixed-versions", uniform[other], f"its zero points are {name[other]}'s, those of others {name[patient.says]}'s", how
        )
    elif not uniform[patient.says]:
        _likely_version(patient, holders, other, name)


def _likely_version(patient: Patient, holders: list[StoredLayer], other: str, name: Mapping[str, str]) -> None:
    """Asymmetric files: weights average to nothing, so mean(code - lane) is 1 in v1 and 0 in v2.

    On goldens of AutoGPTQ and GPTQModel with 2 to 4 bits, layers lie within 0.65 to 1.21 (v1) and -0.04 to 0.04 (v2). With 8 bits
    a step is too small to tell (-0.9 to 3.7), so they are not judged. A statistic is no proof: nothing is mended by it.
    """
    judged = [layer for layer in holders if layer.bits is not None and layer.bits <= 4 and layer.in_ * layer.out >= 1 << 12]
    if len(judged) < 4:
        return
    judged = judged[:: -(-len(judged) // JUDGED)]
    means = [residual(patient.tensors, layer, zero_lanes(patient.tensors, layer)) for layer in judged]
    middle = float(np.median(means))
    expected, wrong = (1.0, 0.0) if patient.says == "v1" else (0.0, 1.0)
    against = sum(abs(mean - wrong) < abs(mean - expected) for mean in means)
    if abs(middle - wrong) < 0.25 and against >= 0.9 * len(means):
        found = (
            f"checkpoint_format says {name[patient.says]}, but codes lie {middle:+.2f} steps from the stored zero points on average "
            f"(median of {len(means)} layers): {name[patient.says]} would give {expected:+.0f}, {name[other]} {wrong:+.0f}"
        )
        how = f"not mended by a guess: ask who wrote it, or compare with the float model; then set checkpoint_format {name[other]}"
        patient.add("wrong-version", config_name(patient), found, how, likely=True)


LANES_OF_A_WORD = {3: ((0, 10), (11, 21), (22, 32))}
"""Of a span: the lanes that lie whole in one word. 3-bit lanes 10 and 21 straddle words and are not judged."""


@dataclass(frozen=True, slots=True)
class Smears:
    """Zero points that an overflowing one overwrote: how many, the first (group, row that did it, last row), words against it."""

    lost: int
    first: tuple[int, int, int] | None
    against: int


def find_smears(top: Array, bits: int) -> Smears:
    """Words in which every lane from some lane on is a top one. ``top``: bool [out, groups]."""
    span = lanes_layout(bits, "out").span
    spans = top.T.reshape(top.shape[1], -1, span)
    lost, against, found = 0, 0, []
    for begin, end in LANES_OF_A_WORD.get(bits, ((0, span),)):
        words, width = spans[:, :, begin:end], end - begin
        start = np.where(words.any(axis=2), words.argmax(axis=2), width)
        is_tail = (words == (np.arange(width) >= start[:, :, None])).all(axis=2)
        smeared = is_tail & (start < width - 1)
        against += int((~is_tail).sum())
        lost += int((width - 1 - start[smeared]).sum())
        if smeared.any():
            group, word = (int(places[0]) for places in np.nonzero(smeared))
            row = word * span + begin
            found.append((group, row + int(start[group, word]), row + width - 1))
    return Smears(lost, min(found, default=None), against)


def _wrapped(patient: Patient) -> None:
    """Zero points of 0 that v1 cannot say: the top lane, and what AutoGPTQ's packer did to the lanes above it in the word.

    GPTQModel borrows from the next lane instead: its files are not said to be smeared.
    """
    if patient.version != "v1":
        return
    meta = patient.claims.get("meta")
    borrows = isinstance(meta, Mapping) and "gptqmodel" in str(meta.get("quantizer", "")).lower()
    wrapped: list[str] = []
    smeared: dict[str, Smears] = {}
    lanes, against = 0, 0
    for layer in patient.sound:
        if "qzeros" not in layer.parts or is_symmetric(patient.tensors, layer, "v1"):
            continue
        assert layer.bits is not None
        top = zero_lanes(patient.tensors, layer) == (1 << layer.bits) - 1
        if not top.any():
            continue
        wrapped.append(layer.name)
        lanes += int(top.sum())
        smears = find_smears(top, layer.bits)
        against += smears.against
        if smears.first is not None:
            smeared[layer.name] = smears
    found = f"{lanes} zero points hold the top lane: a 0, which v1 cannot say, or what one overwrote; readers differ on it"
    how = "weights in these rows depend on the reader; quantize again for certainty"
    patient.add_layers("wrapped-zeros", wrapped, found, how)
    if smeared and not borrows:
        first = next(iter(smeared.values())).first
        assert first is not None
        lost = sum(smears.lost for smears in smeared.values())
        found = (
            f"zero points of 0 were smeared over the higher lanes of their words: {lost} other zero points are overwritten "
            f"(first: group {first[0]}, rows {first[1] + 1} to {first[2]}, by row {first[1]})"
        )
        how = "what was lost is lost: quantize again, symmetric or with a tool that writes gptq_v2"
        patient.add_layers("smeared-zeros", list(smeared), found, how, likely=bool(against) or lost < 2)


def _missing_parts(patient: Patient) -> None:
    """g_idx and qzeros that loaders take from uninitialised memory where they are missing."""
    sound = {layer.name for layer in patient.sound}
    lost: dict[str, list[str]] = {"g_idx": [], "qzeros": []}
    mended: dict[str, list[str]] = {"g_idx": [], "qzeros": []}
    ordered = not (patient.claims.get("desc_act") is False or patient.claims.get("static_groups") is True)
    for layer in patient.layers:
        if patient.spelling == "gptq" and "g_idx" not in layer.parts:
            if layer.name in sound and (layer.groups == 1 or not ordered):
                mended["g_idx"].append(layer.name)
                patient.cure.tensors[f"{layer.name}.g_idx"] = (np.arange(layer.in_) // (layer.in_ // layer.groups)).astype("<i4")
            else:
                lost["g_idx"].append(layer.name)
        if "qzeros" not in layer.parts:
            if patient.spelling == "gptq" and layer.name in sound and patient.claims.get("sym") is True and layer.bits:
                lane = (1 << (layer.bits - 1)) - (patient.version == "v1")
                zeros = np.full((layer.out, layer.groups), lane, dtype=np.int16)
                mended["qzeros"].append(layer.name)
                patient.cure.tensors[f"{layer.name}.qzeros"] = lanes_layout(layer.bits, "out").pack(zeros)
            else:
                lost["qzeros"].append(layer.name)
    why = {"g_idx": "the config does not rule out act order", "qzeros": "the config does not say that they are symmetric"}
    known = {"g_idx": "write k // group_size, which the config implies", "qzeros": "write the middle code, which sym implies"}
    for part in ("g_idx", "qzeros"):
        found = f"has no {part}; transformers reads uninitialised memory in its place"
        patient.add_layers(f"no-{part}", mended[part], found, known[part], mendable=True)
        patient.add_layers(f"no-{part}", lost[part], found, f"cannot be derived, since {why[part]}: fetch the checkpoint again")
