"""What the commands print for people: tables and sentences about results, which are also there as ``--json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .terminal import echo, gigabytes, print_table


def print_formats(rows: Sequence[Mapping[str, Any]]) -> None:
    """The formats and what each can hold."""
    table = []
    for row in rows:
        held = row.get("holds")
        holds_text = "read only for now" if not isinstance(held, dict) else _holds_text(held)
        table.append([str(row["format"]), holds_text, str(row["about"]), str(row["readers"] or row["tool"])])
    print_table("Formats", ["format", "holds", "about", "read by / written by"], table)


def _holds_text(held: dict[str, Any]) -> str:
    parts = [f"{'/'.join(str(bits) for bits in held['bits'])} bits", "per " + "/".join(held["strategies"])]
    if held["group_sizes"]:
        parts.append("groups " + "/".join(str(size) for size in held["group_sizes"]))
    if held["smallest_zero_point"]:
        parts.append(f"zero points from {held['smallest_zero_point']}")
    if held["act_order"]:
        parts.append("act order")
    if max(held["multiple_of"]) > 1:
        parts.append(f"[out, in] multiples of {held['multiple_of'][0]} x {held['multiple_of'][1]}")
    return ", ".join(parts)


def print_report(report: Any, layers: bool) -> None:
    """What ``inspect`` found; layers: every one of them too."""
    echo(f"{report.format}, {gigabytes(report.bytes)} in {len(report.files)} file(s)")
    rows = [
        [row.scheme, str(row.layers), f"{row.weights / 1e6:.2f} M", gigabytes(row.bytes), f"{row.bits_per_weight:.3f}", row.example]
        for row in report.schemes
    ]
    rows.append(["not quantized", str(report.plain_tensors), "", gigabytes(report.plain_bytes), "", ""])
    print_table("Schemes", ["scheme", "layers", "weights", "bytes", "bits per weight", "for example"], rows, right=(1, 2, 3, 4))
    if layers:
        for name, scheme in report.layers.items():
            echo(f"{name}  {scheme}")
    if report.float_linears:
        more = "" if len(report.float_linears) <= 3 else f" and {len(report.float_linears) - 3} more"
        echo(f"linears left in float: {', '.join(report.float_linears[:3])}{more}")
    for finding in report.findings[:20]:
        echo(f"[{finding.code}] {finding.where}: {finding.what}")
    if len(report.findings) > 20:
        echo(f"... and {len(report.findings) - 20} more findings (--json lists them)")


def print_plan(decided: Any, consumers: dict[str, list[str]]) -> None:
    """Steps, losses, refusals, files, notes, and which consumers would load the folder."""
    from .moves import MOVES
    from .records import LOSSES

    echo(f"{decided.source_name} -> {decided.target_name}: {len(decided.layers)} layers, {len(decided.plain)} other tensors")
    echo(f"reads {gigabytes(decided.source_bytes)}, peak memory at most {decided.peak_memory / 2**20:.0f} MiB over the interpreter")
    rows = [["exact", move, str(count), MOVES[move]] for move, count in decided.move_counts().items()]
    rows += [["loss", loss.code, str(loss.layers), f"{LOSSES[loss.code][1]}; error at most {loss.bound:.3g}"] for loss in decided.losses]
    print_table("Steps", ["kind", "step", "layers", "what it does"], rows, right=(2,))
    for refusal in decided.refusals[:20]:
        echo(f"refused: {refusal}", err=True)
    if len(decided.refusals) > 20:
        echo(f"refused: ... and {len(decided.refusals) - 20} more (--json lists them)", err=True)
    if decided.files:
        files = [[file.name, gigabytes(file.size), str(len(file.tensors))] for file in decided.files]
        print_table("Output files", ["file", "bytes", "tensors"], files, right=(1, 2))
    for note in decided.notes:
        echo(f"note: {note}")
    if consumers:
        echo(f"meets what these require: {', '.join(name for name, unmet in consumers.items() if not unmet) or 'none'}")
        unmet = [f"{name} ({', '.join(codes)})" for name, codes in consumers.items() if codes]
        echo(f"not of these: {', '.join(unmet)}; `weighbridge check` on the folder says why" if unmet else "")


def echo_result(result: Any) -> None:
    """What a conversion did, in a few lines."""
    decided = result.plan
    echo(f"{result.destination}: {decided.target_name}, {len(decided.layers)} quantized layers, {gigabytes(decided.target_bytes)}")
    for loss in result.losses:
        echo(f"  {loss.code}: {loss.layers} layers, relative error at most {loss.bound:.3g} ({loss.worst})")
    for note in (*decided.notes, *(f"missing: {item}" for item in result.missing)):
        echo(f"  note: {note}")
    if result.source_fingerprint is None:
        echo("  not proved (--no-proof)")
    elif result.exact:
        echo(f"  proved exact: every weight is bit for bit the source's; fingerprint {result.target_fingerprint.digest}")
    else:
        echo("  proved: codes and zero points equal, rounded within the bounds above, everything else bit for bit")
        echo(f"  fingerprint {result.target_fingerprint.digest} (source {result.source_fingerprint.digest})")


def print_verdict(verdict: Any, a: str, b: str) -> None:
    """Whether two checkpoints are the same, and where they are not."""
    if verdict.same and not verdict.rounded:
        echo(f"the same: {verdict.compared} tensors, bit for bit; fingerprint {verdict.left.digest}")
    elif verdict.same:
        echo(
            f"the same but for rounding: {verdict.compared} tensors, codes and zero points equal; {len(verdict.rounded)} tensors have "
            f"values rounded to the other side's dtype, relative difference at most {verdict.bound:.3g}"
        )
        echo(f"fingerprints {verdict.left.digest} and {verdict.right.digest}")
    else:
        count = len(verdict.different) + len(verdict.only_left) + len(verdict.only_right)
        echo(f"not the same: {count} of {verdict.compared + len(verdict.only_left) + len(verdict.only_right)} tensors differ")
        for comparison in verdict.different[:10]:
            echo(f"  {comparison.name}: {comparison.detail}")
        if len(verdict.different) > 10:
            echo(f"  ... and {len(verdict.different) - 10} more (--json lists them)")
        for names, where in ((verdict.only_left, a), (verdict.only_right, b)):
            for name in names[:5]:
                echo(f"  {name}: only in {where}")


def print_check(report: Any, tp: int) -> None:
    """Which requirements of a consumer are not met, and what to do."""
    ranks = f" on {tp} ranks" if tp > 1 else ""
    verdict = f"meets all {report.checked} requirements" if report.ok else f"{len(report.unmet)} requirements are not met"
    echo(f"{report.format} for {report.consumer} {report.version}{ranks}: {verdict}")
    rows = []
    for one in report.unmet:
        more = f" and {one.count - 1} more" if one.count > 1 else ""
        rows.append([one.code, f"{one.first}{more}: {one.found}", one.wanted, one.mend, one.source])
    if rows:
        print_table("Not met", ["code", "found", "wanted", "what to do", "source"], rows)


def print_ailments(found: Any, path: str) -> None:
    """What ``doctor`` found and mended."""
    for ailment in found.ailments:
        mark = "mended" if ailment in found.mended else "can be mended" if ailment.mendable else "not mended"
        echo(f"{mark}: {ailment}")
    where = found.destination or path
    if found.healthy:
        echo(f"{where} is healthy: {found.examined} layers, their configs, headers and index were examined")
    else:
        certain = sum(ailment.certainty == "certain" for ailment in found.remaining)
        echo(f"{where} has {certain} ailments for certain and {len(found.remaining) - certain} likely ones")
    if not found.examined:
        echo("note: no layers in GPTQ's or AWQ GEMM's layout were found, so only headers and the index were examined")


def print_serving(report: Any) -> None:
    """What the engine computed, against the reference."""
    where = f"{report.engine} {report.version} on {report.device}, {report.dtype}"
    kernels = f" ({', '.join(report.kernels)})" if report.kernels else ""
    echo(f"{report.folder}: {report.format or 'another format'}, {report.kind} quantized; {where}{kernels}")
    gate = report.gate
    table = [
        ["positions", f"{report.positions} of {report.prompts} prompts", ""],
        ["largest difference of a log-probability", f"{report.max_difference:.3g}", _below(gate and gate.difference)],
        ["... of the median position", f"{report.typical_difference:.3g}", _below(gate and gate.typical)],
        ["mean KL divergence, nats", f"{report.kl:.3g}", _below(gate and gate.kl)],
        ["same likeliest token", f"{report.top1} of {report.positions}", ""],
        ["greedy tokens equal", f"{report.greedy_equal} of {report.greedy_tokens}", "all, or a tie" if gate and gate.greedy else ""],
        ["prompts that part at a tie", str(report.ties), ""],
        ["deviation of the log-probabilities", f"{report.logit_std:.3g}", ""],
    ]
    print_table(f"Against {report.reference}, dequantized", ["figure", "found", "wanted"], table)
    echo(", ".join(f"{step} {seconds:.1f} s" for step, seconds in report.seconds.items()))
    for note in report.notes:
        echo(f"note: {note}")
    why = f": {'; '.join(report.failed)}" if report.failed else "" if gate else ": what is quantized here, in this dtype, has no gate"
    echo(f"{report.verdict}{why}")


def _below(limit: float | None) -> str:
    return "" if limit is None else f"less than {limit:g}"


def print_quantized(result: Any, blocks: Sequence[Any]) -> None:
    """Errors by decoder layer, and what was written."""
    rows = []
    observed = any(block.widest is not None for block in blocks)
    for block in blocks:
        worst, widest = block.worst, block.widest
        found = [] if not observed else ["", ""] if widest is None else [f"{widest.range_parm:.2f}", widest.leaf]
        rows.append([block.name, str(block.layers), f"{block.mean_error:.4f}", f"{worst.weight_error:.4f}", worst.leaf, *found])
    columns = ["decoder layer", "linears", "weight error", "worst", "of", *(["range_parm", "of"] if observed else [])]
    what = "relative error of the weights" + (", spread of the inputs" if observed else "")
    print_table(f"{result.recipe.name}: {what}", columns, rows, right=(1, 2, 3, 5))
    echo_result(result.written)
    for note in result.notes:
        echo(f"  note: {note}")
    echo("  " + ", ".join(f"{step} {seconds:.1f} s" for step, seconds in result.seconds.items()))
