"""Soak: random plans on random checkpoints, killed now and then, each result read by plain code that shares nothing with ours.

    python scripts/soak.py --rounds 200          seeds from a random base, which is printed
    python scripts/soak.py --seed 7 --rounds 1   one of them again

A round makes a checkpoint in one of eleven source formats, draws a target and options, and runs the command line in a process of
its own; in some rounds it is killed on the way, up to three times, and the same command finishes. Then the folder is read by the
decoders of ``soaking``, which follow the tools' own packing code, and compared: codes, zero points, scales as NumPy rounds them, the
law's float32 values, what quantizes inputs and what an NPU derives from it, every other tensor byte for byte, what the configs say,
the certificate, and the fingerprints. A refusal must be one that the expectations of ``soaking`` name as well. No round may leave a
file behind, or use more anonymous memory than --max-memory over that of a bare interpreter. 143 seeds in a row have all pairs of
formats.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # whose plain reader and writer of safetensors the parts share

from soaking.children import bare_interpreter
from soaking.expected import PAIRS
from soaking.rounds import MIB, Round, Tally, sandbox
from soaking.verdict import WrongError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, help="seed of the first round; the others follow. Default: random, and printed")
    parser.add_argument("--keep", type=Path, help="keep every round's folder in there")
    options = parser.parse_args()
    base = int.from_bytes(os.urandom(3), "little") if options.seed is None else options.seed
    bare, tally, began = bare_interpreter(), Tally(), time.monotonic()
    print(f"seeds {base} to {base + options.rounds - 1}; a bare interpreter has {bare / MIB:.1f} MiB of anonymous memory", flush=True)
    for seed in range(base, base + options.rounds):
        start = time.monotonic()
        with sandbox(options.keep, seed) as box:
            one = Round(seed, box, bare, tally)
            try:
                result = one.run()
            except Exception as error:
                kind = "" if isinstance(error, WrongError) else f"{type(error).__name__}: "
                result = f"FAILED: {kind}{error}\n    python scripts/soak.py --seed {seed} --rounds 1"
                tally.failed.append(seed)
        tally.results[result.partition(":")[0]] += 1
        tally.share = max(tally.share, one.share)
        print(f"{seed}: {one.note}; peak {one.share:.0%} of the limit, {time.monotonic() - start:.1f} s: {result}", flush=True)
    minutes = (time.monotonic() - began) / 60
    print(
        f"{options.rounds} rounds in {minutes:.1f} min: {dict(tally.results)}; {len(tally.pairs)} of {len(PAIRS)} pairs of formats; "
        f"kills: {dict(tally.kills)}; highest peak {tally.share:.0%} of its limit, not counting {tally.compiled} runs that compiled kernels"
    )
    print(f"failed seeds: {tally.failed}" if tally.failed else f"nothing failed, nothing leaked; seeds from {base}")
    return 1 if tally.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
