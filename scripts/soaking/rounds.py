"""One round: draw, convert, kill and go on, compare; and the tally of all of them."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .checking import check_result
from .children import Ended, Sandbox, run
from .drawing import draw_model
from .expected import PAIR_STEP, PAIRS, TARGETS, TORCH, Task
from .sources import write_model
from .verdict import insist

MIB = 1 << 20


@dataclass
class Tally:
    """What the rounds of a run came to."""

    results: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    compiled: int = 0
    share: float = 0.0
    pairs: set[tuple[str, str]] = field(default_factory=set)
    failed: list[int] = field(default_factory=list)


@dataclass
class Round:
    """One round; ``rng`` decides everything but when exactly a kill hits."""

    seed: int
    box: Sandbox
    bare: int
    tally: Tally
    share: float = 0.0
    note: str = ""

    def run(self) -> str:
        rng = np.random.default_rng(self.seed)
        source, target = PAIRS[self.seed * PAIR_STEP % len(PAIRS)]
        wanted_kills = int(rng.integers(1, 4)) if rng.random() < 0.45 else 0
        size = str(rng.choice(["small", "medium", "large"], p=[0.05, 0.15, 0.8] if wanted_kills else [0.45, 0.3, 0.25]))
        task = self._draw(rng, source, target, size)
        size_of = write_model(task.model, self.box.source, rng)
        proof, kernels = rng.random() > 0.15, str(rng.choice(["numba", "numba", "numpy", ""]))
        shard = int(size_of / rng.uniform(0.8, 12)) + 1 if rng.random() < 0.4 else None
        options = ["--json", *([] if proof else ["--no-proof"]), *([] if shard is None else ["--max-shard-size", str(shard)])]
        options += [] if rng.random() < 0.15 else ["--jobs", str(rng.integers(1, 5))]
        for flag, value in (("--scale-dtype", task.scale_dtype), ("--serve-dtype", task.serve_dtype)):
            options += [] if value is None else [flag, value]
        for code in task.allow:
            options += ["--allow", code]
        command = ["convert", str(self.box.source), str(self.box.result), "--to", target, *options]
        limit = int(rng.integers(96, 513)) if rng.random() < 0.5 else self._least(command) + int(rng.integers(0, 3))
        over = rng.random() < 0.15 and self._older(rng)
        command += ["--max-memory", f"{limit}MiB", *(["--overwrite"] if over else [])]
        scheme = task.model.layers[0]
        shown = [word for word in command[3:] if word not in {"--json", "--to"}]
        self.note = (
            f"{source} -> {' '.join(shown)} {kernels or 'auto'}; {len(task.model.layers)} layers, {task.model.codes / 1e6:.1f} M of "
            f"{scheme.bits} bits, groups of {scheme.group}"
        )
        self.tally.pairs.add((source, target))
        refusals = task.refusals()
        older = (self.box.result / "weighbridge.json").read_bytes() if over else b""
        ended, had_work = self._until_done(rng, command, kernels, 0 if refusals else wanted_kills, limit, over)
        self.note += f"; {ended.seconds:.1f} s"
        if ended.code == 3:
            self._check_refused(ended, refusals, older)
            insist(self.share <= 1, "used more memory than it may")
            return "refused"
        insist(ended.code == 0, "exit", ended.code, ended.report.get("error", ""), ended.stderr[-2000:])
        insist(refusals <= {"overflow?"}, "done, though it cannot be held:", *refusals)
        insist(ended.report["resumed"] == had_work, "resumed is", ended.report["resumed"], "but the journal held work:", had_work)
        exact = check_result(task, self.box.result, shard)
        dropped = any(layer.input_scale is not None and not task.inputs(layer) for layer in task.model.layers)
        self._check_certificate(proof, exact, kernels, dropped)
        insist(not self.box.leaked("out"), "left behind:", *self.box.leaked("out"))
        insist(self.share <= 1, "used more memory than it may, and is right otherwise")
        return "exact" if exact else "rounded"

    def _draw(self, rng: np.random.Generator, source: str, target: str, size: str) -> Task:
        """A model and options for the pair; most of the time such that the target holds them."""
        any_will_do = rng.random() < 0.2
        for _ in range(40):
            scale = str(rng.choice(["keep", *TORCH])) if rng.random() < 0.45 else None
            serve = str(rng.choice(["float16", "bfloat16"])) if target.startswith("msmodelslim") and rng.random() < 0.3 else None
            allow = ("scale-subnormal",) * (rng.random() < 0.3)
            if source == "msmodelslim:w8a8" or source == "compressed-tensors:int":
                allow += ("activations-dropped",) * (rng.random() < 0.7) + ("deq-scale-differs",) * (rng.random() < 0.4)
            task = Task(draw_model(rng, source, size), target, scale, serve, allow)
            if any_will_do or not task.refusals():
                break
        return task

    def _least(self, command: list[str]) -> int:
        """The least --max-memory that is accepted, in MiB: the refusal of less says it."""
        ended = run(self.box, [*command, "--max-memory", "1MiB"])
        found = re.search(r"needs (\d+)MiB", ended.report.get("error", ""))
        insist(ended.code == 2 and found, "1 MiB is not refused as it should be:", ended.code, ended.report, ended.stderr)
        insist(not self.box.leaked(), "left behind after a usage error:", *self.box.leaked())
        assert found is not None
        return int(found[1])

    def _older(self, rng: np.random.Generator) -> bool:
        """Try to put an older result where the new one will go."""
        target = str(rng.choice(list(TARGETS)))
        folders = [str(self.box.source), str(self.box.result)]
        allow = [word for code in ("scale-subnormal", "activations-dropped") for word in ("--allow", code)]
        ended = run(self.box, ["convert", *folders, "--to", target, "--json", *allow])
        insist(ended.code in {0, 3}, "older result: exit", ended.code, ended.report, ended.stderr)
        return ended.code == 0

    def _until_done(
        self, rng: np.random.Generator, command: list[str], kernels: str, kills: int, limit: int, over: bool
    ) -> tuple[Ended, bool]:
        """Run, kill and run again; how the last run ended, and whether it had something to go on with."""
        had_work = False
        for left in range(kills, -1, -1):
            ended = run(self.box, command, kernels, self._killer(rng, left) if left else lambda seconds: False)
            self._check_memory(ended, limit)
            if not ended.killed:
                return ended, had_work
            place = self.box.progress()
            had_work = self.box.holds_work() and (self.box.hidden / "model").is_dir()
            insist(not over or self.box.result.is_dir() or place >= 1, "killed, and the older result is gone")
            if self.box.result.exists() and not over:
                self.tally.kills["after the end"] += 1
                cleaned = run(self.box, ["clean", str(self.box.place), "--json"])
                insist(cleaned.code == 0 and not self.box.leaked("out"), "clean left", *self.box.leaked("out"))
                shutil.rmtree(self.box.result)
                had_work = False
            else:
                self.tally.kills["before any work" if not had_work else "between tiles" if place < 0.99 else "after the last tile"] += 1
            self.note += f"; killed at {min(place, 1):.0%}"
        raise AssertionError("the last run is never killed")

    def _killer(self, rng: np.random.Generator, left: int) -> Callable[[float], bool]:
        """Kills early at a random time, at the very end, or once a part of what is to be written is; ``left`` kills share that."""
        kind, part = rng.random(), rng.random()
        if kind < 0.1:
            return lambda seconds: seconds > part * 0.8
        if kind < 0.2:
            return lambda seconds: self.box.progress() > 1.5 or (self.box.hidden / "model" / "config.json").exists()
        begun = self.box.progress()
        threshold = begun + (1 - begun) * part / left if begun <= 1 else part
        return lambda seconds: self.box.holds_work() and self.box.progress() >= threshold

    def _check_memory(self, ended: Ended, limit: int) -> None:
        if ended.compiled:
            self.tally.compiled += 1
            return
        self.share = max(self.share, (ended.peak - self.bare) / (limit * MIB))

    def _check_refused(self, ended: Ended, expected: set[str], older: bytes) -> None:
        insist(expected, "refused, though it can be held:", ended.report.get("error"))
        found = re.findall(r"\[([a-z-]+)\]", ended.report["error"])
        insist(found[:1] == [] or found[0] in expected, "refused for", *found, "not for", *expected)
        insist(found or "overflow?" in expected, "refused without a code:", ended.report["error"])
        insist(not self.box.leaked("out" if older else ""), "a refusal left", *self.box.leaked("out" if older else ""))
        insist(not older or (self.box.result / "weighbridge.json").read_bytes() == older, "a refusal changed the older result")
        self.note += f"; {ended.report['error'][:90]}"

    def _check_certificate(self, proof: bool, exact: bool, kernels: str, dropped: bool) -> None:
        """The certificate says what was found here, and its digests are those that the commands find.

        dropped: static scales of inputs were left out, which are in the source's fingerprint, and in neither of the certificate's
        """
        said = json.loads((self.box.result / "weighbridge.json").read_text())
        insist(said["proved"] == proof, "proved is", said["proved"])
        digests = []
        for path in (self.box.source, self.box.result):
            ended = run(self.box, ["fingerprint", str(path), "--json"], kernels)
            insist(ended.code == 0, "fingerprint: exit", ended.code, ended.report, ended.stderr)
            digests.append(ended.report["fingerprint"])
        insist((digests[0] == digests[1]) == (exact and not dropped), "exact is", exact, "and the fingerprints", *digests)
        if proof:
            certified = [said["fingerprint"][side]["total"] for side in ("source", "target")]
            insist(certified[dropped:] == digests[dropped:], "the certificate says", *certified, "and the folders", *digests)
            insist(not dropped or (certified[0] == certified[1]) == exact, "exact is", exact, "and the certificate says", *certified)
            insist(said["exact"] == exact, "the certificate says exact:", said["exact"])


@contextmanager
def sandbox(keep: Path | None, seed: int) -> Iterator[Sandbox]:
    if keep is not None:
        (keep / str(seed)).mkdir(parents=True)
        yield Sandbox(keep / str(seed))
        return
    with tempfile.TemporaryDirectory(prefix="weighbridge-soak-") as folder:
        yield Sandbox(Path(folder))
