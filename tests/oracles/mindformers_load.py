"""MindFormers 1.3.2 builds the network of a folder's YAML, Golden Stick 0.6.0 puts its cells in it, and MindSpore loads the weights.

    mindformers_load.py FOLDER

Prints JSON: {missing: the network's parameters that the file has not; unknown: the file's that the network has not; shapes, dtypes:
what differs; parameters: how many there are}. Graphs are not run: the kernels are the NPU's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mindspore
from mindspore import nn, ops

if not hasattr(nn.Cell, "cast"):  # MindSpore had it up to 2.4, for which this MindFormers was made
    nn.Cell.cast = lambda self, value, dtype: ops.cast(value, dtype)

from mindformers import MindFormerConfig
from mindformers.models import build_network

folder = Path(sys.argv[1])
mindspore.set_context(mode=0, device_target="CPU")
(yaml,), (weights,) = folder.glob("*.yaml"), folder.glob("rank_0/*.ckpt")
config = MindFormerConfig(str(yaml))
network = build_network(config.model)
stored = mindspore.load_checkpoint(str(weights))
missing, _ = mindspore.load_param_into_net(network, stored)
parameters = {parameter.name: parameter for parameter in network.get_parameters()}
both = [(parameters[name], value) for name, value in stored.items() if name in parameters]
found = {
    "missing": list(missing),
    "unknown": [name for name in stored if name not in parameters],
    "shapes": [ours.name for ours, theirs in both if ours.shape != theirs.shape],
    "dtypes": [ours.name for ours, theirs in both if ours.dtype != theirs.dtype],
    "parameters": len(parameters),
}
sys.stdout.write(f"found {json.dumps(found)}\n")
