"""``weighbridge.json``: what was converted from what, what was lost, and the digests that prove it.

It names no time, no machine and no number of workers: the same conversion writes the same certificate.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Result

NAME = "weighbridge.json"


def version() -> str:
    """The installed distribution's version."""
    try:
        return metadata.version("weighbridge")
    except metadata.PackageNotFoundError:
        return "0+unknown"


def certificate(result: Result) -> dict[str, Any]:
    """The certificate's content: plan, losses with bounds, and per tensor the digests of both sides."""
    plan = result.plan
    source, target = result.source_fingerprint, result.target_fingerprint
    document: dict[str, Any] = {
        "certificate": 1,
        "weighbridge": version(),
        "plan": plan.id,
        "source": {
            "format": plan.source_name,
            "files": [{"name": file.name, "size": file.size, "header": file.digest} for file in plan.checkpoint.files],
        },
        "target": {"format": plan.target_name, "files": [{"name": part.name, "size": part.size} for part in plan.parts]},
        "options": plan.options,
        "moves": plan.move_counts(),
        "losses": [asdict(loss) for loss in result.losses],
        "not_carried": [item.tensor for item in plan.checkpoint.left_out]
        + [name for name in plan.checkpoint.attention if name not in plan.model.attention],
        "proved": source is not None,
    }
    if source is not None and target is not None:
        rounded = {comparison.name: comparison.bound for comparison in result.rounded}
        document["exact"] = result.exact
        document["fingerprint"] = {
            "source": {"total": source.digest, "weights": source.weights, "rest": source.rest},
            "target": {"total": target.digest, "weights": target.weights, "rest": target.rest},
        }
        document["tensors"] = {
            name: {"digest": digest, **({"source": source.tensors[name][1], "rounded": rounded[name]} if name in rounded else {})}
            for name, (_, digest) in sorted(target.tensors.items())
        }
    return document


def write_certificate(result: Result, folder: Path) -> None:
    """Write the certificate into ``folder``."""
    with (folder / NAME).open("w", encoding="utf-8") as file:
        json.dump(certificate(result), file, indent=1, ensure_ascii=False)
        file.write("\n")
