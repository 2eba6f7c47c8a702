"""Coverage-guided fuzzing (atheris) of everything that reads a stranger's bytes: ``python tests/fuzz/fuzz.py --seconds 300``.

Each target of ``targets.py`` runs in a process of its own, as many at once as there are CPUs. Nothing but Weighbridge's own errors
may come out, within 1 GB and 10 s an input. What was learned stays under ``$WEIGHBRIDGE_CACHE/fuzz`` (else ``~/.cache/weighbridge``);
an input that failed is put there too, and its path printed: give it a number in ``fixtures/attacks``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
NAMES = ("header", "documents", "weights", "patterns", "pickles", "mindspore")


def cache_folder() -> Path:
    own = os.environ.get("WEIGHBRIDGE_CACHE")
    base = Path(own).expanduser() if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weighbridge"
    return base / "fuzz"


def run_target(name: str, arguments: list[str]) -> None:
    """Fuzz one target in this process; does not return."""
    import atheris

    with atheris.instrument_imports(include=["formats", "convert"]):
        import targets
    from formats.errors import WeighbridgeError

    place = Path(os.environ.get("FUZZ_PLACE") or tempfile.mkdtemp(prefix="weighbridge-fuzz-")) / "source"

    def one(data: bytes) -> None:
        with contextlib.suppress(WeighbridgeError):
            targets.TARGETS[name](data, place)

    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


def fuzz(name: str, seconds: int) -> int:
    """Fuzz one target for so many seconds in a process of its own; 0 if nothing was found."""
    corpus, found = (cache_folder() / name / part for part in ("corpus", "found"))
    for folder in (corpus, found):
        folder.mkdir(parents=True, exist_ok=True)
    import targets

    for seed in targets.seeds(name):
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    limits = [f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=1024", "-max_len=16384", "-print_final_stats=1", "-verbosity=0"]
    command = [sys.executable, __file__, "--target", name, "--", *limits, f"-artifact_prefix={found}/", str(corpus)]
    begin = time.monotonic()
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="weighbridge-fuzz-", dir=memory) as place:
        environment = {**os.environ, "FUZZ_PLACE": place}
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=environment)
    lines = done.stderr.splitlines() + done.stdout.splitlines()
    runs = next((line.split()[-1] for line in lines if "number_of_executed_units" in line), "?")
    ran_out = time.monotonic() - begin < seconds / 2
    failed = done.returncode != 0 or ran_out
    sys.stdout.write(f"{name}: {runs} inputs in {time.monotonic() - begin:.0f} s, {'FAILED' if failed else 'nothing found'}\n")
    if failed:
        sys.stdout.write("\n".join(lines[-60:]) + "\n")
    sys.stdout.flush()
    return int(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=300, help="for all targets together, on every CPU")
    parser.add_argument("--target", choices=NAMES, help="only this one, in this process, with libFuzzer's own arguments after --")
    parser.add_argument("arguments", nargs="*")
    chosen = parser.parse_args()
    if chosen.target is not None:
        run_target(chosen.target, chosen.arguments)
    cpus = min(len(os.sched_getaffinity(0)), len(NAMES))
    each = chosen.seconds * cpus // len(NAMES)
    with ThreadPoolExecutor(cpus) as pool:
        return int(any(list(pool.map(lambda name: fuzz(name, each), NAMES))))


if __name__ == "__main__":
    sys.exit(main())
