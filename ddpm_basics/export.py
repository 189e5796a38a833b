"""Weights for other tools: safetensors and ONNX, each one file with its facts in the metadata.

Weights that half precision holds exactly, as all of the bundled files are, are stored in it: half
the size, and the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from denoising_diffusion_pytorch import GaussianDiffusion
from safetensors.torch import save
from torch import Tensor

from ddpm_basics.console import import_extra
from ddpm_basics.files import write_atomically
from ddpm_basics.model import LabelledUnet
from ddpm_basics.weight_files import NETWORK_OUTPUT, Facts, config_of, read_checkpoint

WORTHWHILE = 1024  # numbers in a tensor of an ONNX file that is stored in half precision


def describe_weights(path: Path, facts: Facts) -> dict[str, str]:
    """Return the metadata of an exported file: what was found in `path`, word by word."""
    config = config_of(read_checkpoint(path))
    # The bundle's own fabrics have a version; about other pictures nobody here knows.
    licence = "MIT" if config.get("data_version") else "not stated: ask whoever trained the weights"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    source = {"file": path.name, "sha256": digest, "kind": facts.kind, "step": facts.step,
              "library": facts.version}  # fmt: skip
    return {
        "format": "pt",  # of the tensors in safetensors, as its readers ask
        "objective": facts.objective,
        "predicts": f"{NETWORK_OUTPUT[facts.objective]}, for x_t = alpha_t x_0 + sigma_t noise",
        "schedule": facts.schedule,
        "timesteps": str(facts.timesteps),
        "image_size": str(facts.image_size),
        "channels": str(facts.channels),
        "dim": str(facts.dim),
        "dim_mults": json.dumps(facts.dim_mults),
        "range": "images are -1 to 1",
        "clipping": "every guess of x_0 is clipped to -1 to 1",
        "labels": json.dumps(facts.labels),
        "assumed": json.dumps(facts.assumed),
        "licence": licence,
        "provenance": json.dumps(config | source, default=str),
    }


def halved(tensor: Tensor) -> Tensor:
    """Return a tensor, contiguous, in half precision if that holds all of it exactly."""
    half = tensor.detach().half()
    exact = bool((half.float() == tensor).all())
    return (half if exact and tensor.is_floating_point() else tensor.detach()).contiguous()


def write_safetensors(diffusion: GaussianDiffusion, path: Path, metadata: dict[str, str]) -> None:
    """Write weights and buffers under the library's names, and `label_table` beside them.

    An assumed process is left out: buffers would pass for what the file had said.
    """
    assumed = {"objective", "schedule", "timesteps"} & {*json.loads(metadata["assumed"])}
    known = (diffusion.model if assumed else diffusion).state_dict(prefix="model." * bool(assumed))
    if diffusion.label_names:
        known["label_table"] = diffusion.label_table
    tensors = {name: halved(tensor) for name, tensor in known.items()}
    with write_atomically(path) as temporary:
        temporary.write_bytes(save(tensors, metadata))


def write_onnx(diffusion: GaussianDiffusion, path: Path, metadata: dict[str, str]) -> None:
    """Write the network as one ONNX file.

    Inputs: x_t [batch, c, h, w] in fp32, t [batch] in int64 and, where there are labels, label
    [batch] in int64: their number in the metadata's list, -1 for none. Output: what the objective
    says, [batch, c, h, w]. Raises UserError where a package is missing.
    """
    onnx = import_extra("onnx", "onnx")
    import_extra("onnxscript", "onnxscript")  # the exporter wants it
    network, t = diffusion.model, torch.zeros(2, dtype=torch.long)
    inputs = {"x_t": torch.zeros(2, diffusion.channels, *diffusion.image_size), "t": t}
    if diffusion.label_names:
        # A tensor of its own: the exporter takes one that comes twice for a single input.
        inputs["label"], network = t.clone(), LabelledUnet(diffusion)
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            network.eval(), tuple(inputs.values()), input_names=[*inputs], output_names=["output"],
            dynamic_shapes=tuple({0: batch} for _ in inputs), dynamo=True, verbose=False,
        )  # fmt: skip
    model = program.model_proto
    strip(model.graph)
    store_halves(model.graph)
    onnx.helper.set_model_props(model, metadata)
    with write_atomically(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def strip(graph: Any) -> None:
    """Take out what the exporter notes for its own makers, paths on this machine among it."""
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    del graph.value_info[:]


def store_halves(graph: Any) -> None:
    """Store weights that half precision holds exactly in it; a Cast gives them back in fp32."""
    from onnx import helper, numpy_helper

    casts = []
    for weight in graph.initializer:
        numbers = numpy_helper.to_array(weight)
        if numbers.dtype == "float32" and numbers.size >= WORTHWHILE:
            half = numbers.astype("float16")
            if (half == numbers).all():
                name = weight.name
                weight.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
                casts.append(helper.make_node("Cast", [f"{name}.half"], [name], to=1))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


FORMATS = {"safetensors": write_safetensors, "onnx": write_onnx}
