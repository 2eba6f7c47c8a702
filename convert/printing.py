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
        files = [[file.name, gigabytes(file.size), str(len(file.tensors))] for file in decided.parts]
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


def print_evaluation(result: Any) -> None:
    """Figures of the model and of what it is measured against."""
    schemes = ", ".join(f"{count} x {scheme}" for scheme, count in result.schemes.items()) or "float"
    echo(f"{result.folder}: {result.format}, {schemes}")
    what = {"text": f"windows of {result.length} tokens", "texts": "texts", "questions": "questions"}[result.data.kind]
    where = f"{result.data.name}: {len(result.data.samples)} {what}, {result.tokens} tokens, {result.positions} predictions"
    echo(f"{where}; {result.dtype} on {result.device}")
    model, reference, rows = result.model, result.reference, []
    figures = (("perplexity", "{:.4f}"), ("top1", "{:.4f}"), ("accuracy", "{}"))
    names = {"perplexity": "perplexity", "top1": "top-1 accuracy of the next token", "accuracy": "accuracy"}
    for name, text in figures:
        if getattr(model, name) is not None:
            rows.append([names[name], text.format(getattr(model, name)), text.format(getattr(reference, name)) if reference else ""])
    if reference is not None:
        if result.perplexity_change is not None:
            rows.append(["change of the perplexity", f"{100 * result.perplexity_change:+.2f} %", ""])
        rows.append(["mean KL divergence, nats", f"{result.kl:.4g}", ""])
        rows.append(["same likeliest token", f"{100 * result.agreement:.2f} %", ""])
        if result.same_answers is not None:
            rows.append(["same answer", f"{100 * result.same_answers:.2f} %", ""])
        rows.append(["hidden states apart, first and last layer", f"{result.measured.drift[0]:.4f}, {result.measured.drift[-1]:.4f}", ""])
    columns = ["figure", "model"] if reference is None else ["figure", "model", "reference"]
    print_table(f"Against {result.against}" if reference else "Figures", columns, [row[: len(columns)] for row in rows], right=(1, 2))
    for note in result.notes:
        echo(f"note: {note}")


def print_tasks(result: Any) -> None:
    """What lm-evaluation-harness says, beside the reference."""
    rows = []
    for task, figures in result.tasks.items():
        for name, value in figures.items():
            metric = name.partition(",")[0]
            if isinstance(value, float) and not metric.endswith("_stderr"):
                others = [] if result.reference is None else [result.reference[task]]
                said = [f"{one[name]:.4f}{_error(one.get(name.replace(metric, f'{metric}_stderr', 1)))}" for one in (figures, *others)]
                rows.append([task, metric, *said])
    columns = ["task", "figure", "model"] + ([] if result.reference is None else ["reference"])
    print_table(result.folder, columns, rows, right=(2, 3))
    for note in result.notes:
        echo(f"note: {note}")


def _error(value: Any) -> str:
    return f" +- {value:.4f}" if isinstance(value, float) else ""


def print_analysis(result: Any, top: int) -> None:
    """Linears, worst first."""
    rows = []
    for linear in result.linears[:top]:
        errors = [linear.weight_error, linear.output_error] if linear.kind != "FLOAT" else [None, None]
        values = [f"{value:.4f}" if value is not None else "" for value in errors]
        rows.append([linear.name, linear.kind, "" if linear.range_parm is None else f"{linear.range_parm:.2f}", *values])
    what = {"output": "error of the output", "range": "range_parm", "weight": "error of the weight"}[result.rank]
    title = f"{result.model}, {result.recipe.name}: linears by {what}, worst first"
    print_table(title, ["linear", "kind", "range_parm", "weight error", "output error"], rows, right=(2, 3, 4))
    left = len(result.linears) - top
    if left > 0:
        echo(f"... and {left} more (--top lists them)")
    for note in result.notes:
        echo(f"note: {note}")


def print_scores(result: Any, top: int) -> None:
    """The samples that quantization moves most and least, and what was written."""
    ranked = result.ranked
    shown = ranked if len(ranked) <= 2 * top else [*ranked[:top], None, *ranked[-top:]]
    asked = any(one.answer is not None for one in ranked)
    rows = []
    for one in shown:
        if one is None:
            rows.append(["..."])
            continue
        answer = "" if one.answer is None else f"{_word(one.float_answer)} -> {_word(one.quantized_answer)}{' !' if one.flips else ''}"
        marks = "chosen" if one.chosen else "repeats" if one.repeats else ""
        begin = "" if one.line is None else one.line[:40]
        said = [f"{one.file}{one.where}", str(one.tokens), f"{one.kl:.3g}", f"{one.last_kl:.3g}", "yes" if one.same_token else "no"]
        rows.append([*said, *([answer] if asked else []), marks, begin])
    columns = ["sample", "tokens", "KL, all", "KL, last", "same token", *(["answer"] if asked else []), "", "begins"]
    title = f"{result.model}, {result.quantized}: samples by {result.position} positions, most moved first"
    print_table(title.replace("last positions", "the last position"), columns, rows, right=(1, 2, 3))
    echo("mean: " + ", ".join(f"{file} {score:.3g}" for file, score in result.by_file.items()))
    if asked:
        questions = [one for one in ranked if one.answer is not None]
        right = [sum(getattr(one, who) == one.answer for one in questions) for who in ("float_answer", "quantized_answer")]
        flips = sum(bool(one.flips) for one in questions)
        echo(f"answers: {flips} of {len(questions)} flip; right {right[0]} in float, {right[1]} quantized")
    if result.out is not None:
        more = f" after {result.extended} lines of the calibration data" if result.extended else ""
        echo(f"{result.out}: {sum(one.chosen for one in ranked)} samples written{more}")
    for note in result.notes:
        echo(f"note: {note}")


def _word(answer: bool | None) -> str:
    return "yes" if answer else "no"


class TrialRows:
    """Prints each trial of ``tune`` as it ends."""

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._count = quiet, 0

    def told(self, trial: Any) -> None:
        """One more trial."""
        if self._quiet:
            return
        self._count += 1
        names = "" if not trial.floats else f"  ({', '.join(trial.floats[:3])}{', ...' if len(trial.floats) > 3 else ''})"
        echo(f"{self._count:3}  {trial.share:7.4f}  {trial.figures}  {trial.name}{names}")


def print_tuned(found: Any, out: str) -> None:
    """What was chosen, beside the float model."""
    echo(f"float: {found.reference}")
    echo(f"chosen: {found.best.name}, {found.best.share:.4f} of float ({found.best.figures}); {found.target:g} was wanted")
    for note in found.notes:
        echo(f"note: {note}")
    echo(f"{out}: the recipe, for `weighbridge quantize --recipe {out}`")
