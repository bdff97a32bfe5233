"""Selectors and scorers as ONNX graphs of their own, several in one, fed with visual tokens, for tests."""

from __future__ import annotations

import onnxruntime
import torch
from torch import nn

from tokensieve.export.encoded import Encoded
from tokensieve.export.geometry import budget_inputs, geometry, num_kept

OWN = ("budget", "views", "quota")  # what each method has for itself; the other inputs are shared
FIXED = ("quota", "num_before")


class Selectors(nn.Module):
    """What enters the projector, and inputs of selectors, to `(features, kept)` of one selector after the other."""

    def __init__(self, selectors, projector, mlp=None):
        super().__init__()
        self.selectors, self.projector, self.mlp = nn.ModuleDict(selectors), projector, mlp
        self.inputs = ["rows", *(("salience", "keys") if any(each.records for each in selectors.values()) else ())]
        for name, selector in selectors.items():
            for need in selector.needs:
                if (own := f"{name}.{need}" if need in OWN else need) not in self.inputs:
                    self.inputs.append(own)

    def forward(self, *tensors):
        inputs = dict(zip(self.inputs, tensors, strict=True))
        rows = inputs["rows"]
        found = {name: inputs[name] for name in ("salience", "keys") if name in inputs}
        encoded = Encoded(features=self.projector(rows), rows=rows, project=self.projector, mlp=self.mlp, **found)
        outputs = []
        for name, selector in self.selectors.items():
            mine = {need: inputs[f"{name}.{need}" if need in OWN else need] for need in selector.needs}
            outputs += selector(encoded, mine)
        return tuple(outputs)


def export(module, inputs, path):
    """An onnxruntime session of a module with `inputs`, a list of names; the first axis of each is dynamic."""
    shapes = tuple({} if name.endswith(FIXED) else {0: torch.export.Dim.DYNAMIC} for name in module.inputs)
    program = torch.onnx.export(
        module.eval(),
        tuple(torch.from_numpy(inputs[name]) for name in module.inputs),
        dynamo=True,
        dynamic_shapes=(shapes,),
        input_names=[name.replace(".", "_").replace("-", "_") for name in module.inputs],
        opset_version=18,
        optimize=False,
        verbose=False,
    )
    program.save(str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(session, inputs):
    """All outputs; inputs that the graph does not have are left out."""
    inputs = {name.replace(".", "_").replace("-", "_"): array for name, array in inputs.items()}
    return session.run(None, {each.name: inputs[each.name] for each in session.get_inputs()})


def inputs_of(tokens, budgets, **more):
    """All that graphs may read of visual tokens; `budgets` is `{method: (keep, options)}`."""
    crop = tokens.crop.numpy()
    inputs = {"rows": tokens.projector.inputs.numpy(), **geometry(tokens.grids, crop), **more}
    for name, (keep, options) in budgets.items():
        method = name.split(" ")[0]
        own = budget_inputs(method, num_kept(method, keep, tokens.grids), tokens.grids, crop, options)
        inputs |= {f"{name}.{key}": value for key, value in own.items()}
    return inputs
