"""Networks in ONNX files as torch modules: weights that packages ship, with gradients to the pixels.

The operators are those that the shipped graphs use (text recognition and nudity, opsets 12 to 17), with ONNX's meaning:
https://onnx.ai/onnx/operators. An operator that is not here is refused when the file is loaded, not in the first batch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from difftune.types import UserError

_FLOATS = (torch.float32, torch.float64, torch.float16)
_DTYPES = {1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool, 10: torch.float16, 11: torch.float64}
"""ONNX's number of an element type -> torch's."""


def package_file(name: str, extra: str, package: str, path: str) -> Path:
    """Return a file that an optional package ships, without importing the package.

    Args:
        name: the reward, for messages.
        extra: the extra of difftune that installs the package and ``onnx``.
        package: the package's module.
        path: the file, below the package.

    Raises:
        UserError: the package or ``onnx`` is not installed, or the file is not there.
    """
    for module in (package, "onnx"):
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"reward {name!r} needs {module}: install the extra, pip install 'difftune[{extra}]'"
            )
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin).parent / path
    if not file.is_file():
        raise UserError(f"reward {name!r}: {package} has no {path}; install the version that constraints.txt pins")
    return file


class OnnxModule(nn.Module):
    """The graph of an ONNX file with one input and one output, run by torch's operators.

    Args:
        file: the ONNX file.
        logits: leave out a softmax at the end of the graph, for losses that need the logits.

    Attributes:
        metadata: the file's own words, e.g. a recogniser's characters.

    Raises:
        UserError: the graph uses an operator that is not among ours.
    """

    def __init__(self, file: Path, logits: bool = False) -> None:
        super().__init__()
        import onnx

        model = onnx.load(str(file))
        graph = model.graph
        self.metadata = {item.key: item.value for item in model.metadata_props}
        nodes = list(graph.node)
        if logits and nodes[-1].op_type == "Softmax":
            nodes.pop()
        unknown = sorted({node.op_type for node in nodes} - set(_OPERATORS) - {"Constant"})
        if unknown:
            raise UserError(f"{file.name} uses the ONNX operators {', '.join(unknown)}, which are not implemented")
        self._shapes: dict[str, Tensor] = {}
        self._names: dict[str, str] = {}
        for tensor in graph.initializer:
            self._hold(tensor.name, tensor)
        self._steps: list[tuple[str, Mapping[str, Any], list[str], str]] = []
        for node in nodes:
            attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
            if node.op_type == "Constant":
                self._hold(node.output[0], attributes["value"])
                continue
            if "value" in attributes:
                attributes["value"] = _tensor(attributes["value"])
            self._steps.append((node.op_type, attributes, list(node.input), node.output[0]))
        held = {tensor.name for tensor in graph.initializer}
        (self._input,) = [entry.name for entry in graph.input if entry.name not in held]
        self._output = self._steps[-1][3]

    def _hold(self, name: str, tensor: Any) -> None:
        """Keep a constant: floats move with the module, integers (shapes, axes) stay on the CPU."""
        value = _tensor(tensor)
        if value.dtype not in _FLOATS:
            self._shapes[name] = value
            return
        self._names[name] = f"constant_{len(self._names)}"
        self.register_buffer(self._names[name], value, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the graph's output for its input, with the shapes that the file says."""
        values: dict[str, Tensor | None] = {"": None, **self._shapes, self._input: pixels}
        values |= {name: self.get_buffer(buffer) for name, buffer in self._names.items()}
        for kind, attributes, inputs, output in self._steps:
            values[output] = _OPERATORS[kind](attributes, *(values[name] for name in inputs))
        result = values[self._output]
        assert result is not None
        return result


def _tensor(proto: Any) -> Tensor:
    import onnx

    return torch.from_numpy(onnx.numpy_helper.to_array(proto).copy())


def _padded(attributes: Mapping[str, Any], x: Tensor, value: float = 0.0) -> Tensor:
    """Pad the last dimensions as ``pads`` says: all beginnings, then all ends, in the dimensions' order."""
    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise NotImplementedError(f"auto_pad {attributes['auto_pad']!r}")
    pads = list(attributes.get("pads", ()))
    if not any(pads):
        return x
    half = len(pads) // 2
    pairs = [side for axis in reversed(range(half)) for side in (pads[axis], pads[half + axis])]
    return functional.pad(x, pairs, value=value)


def _conv(a: Mapping[str, Any], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    convolve: Any = {3: functional.conv1d, 4: functional.conv2d}[weight.ndim]
    rest = {"stride": a.get("strides", 1), "dilation": a.get("dilations", 1), "groups": a.get("group", 1)}
    return convolve(_padded(a, x), weight, bias, **rest)


def _max_pool(a: Mapping[str, Any], x: Tensor) -> Tensor:
    x = _padded(a, x, float("-inf"))
    return functional.max_pool2d(x, a["kernel_shape"], a.get("strides", 1), ceil_mode=bool(a.get("ceil_mode", 0)))


def _average_pool(a: Mapping[str, Any], x: Tensor) -> Tensor:
    if any(a.get("pads", ())) and not a.get("count_include_pad", 0):
        raise NotImplementedError("an average over a padded border that does not count the padding")
    return functional.avg_pool2d(_padded(a, x), a["kernel_shape"], a.get("strides", 1), ceil_mode=bool(a["ceil_mode"]))


def _batch_norm(a: Mapping[str, Any], x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return functional.batch_norm(x, mean, var, scale, bias, eps=a.get("epsilon", 1e-5))


def _reshape(a: Mapping[str, Any], x: Tensor, shape: Tensor) -> Tensor:
    copied = not a.get("allowzero")
    return x.reshape([x.shape[axis] if copied and not size else size for axis, size in enumerate(shape.tolist())])


def _slice(a: Mapping[str, Any], x: Tensor, starts: Tensor, ends: Tensor, *rest: Tensor | None) -> Tensor:
    axes, steps = (*rest, None, None)[:2]
    where = range(len(starts)) if axes is None else axes.tolist()
    strides = [1] * len(starts) if steps is None else steps.tolist()
    for axis, start, end, step in zip(where, starts.tolist(), ends.tolist(), strides, strict=True):
        # Torch's own slices take no negative step; Python's ranges mean what ONNX means by one.
        rows = range(x.shape[axis])[start:end:step]
        x = x.index_select(axis, torch.tensor(rows, dtype=torch.long, device=x.device))
    return x


def _pad(a: Mapping[str, Any], x: Tensor, pads: Tensor, value: Tensor | None = None) -> Tensor:
    mode = a.get("mode", b"constant")
    if mode == b"constant":
        return _padded({"pads": pads.tolist()}, x, 0.0 if value is None else float(value))
    first, last = pads.view(2, -1).tolist()
    if mode != b"edge" or any(first[:-2] + last[:-2]):
        raise NotImplementedError(f"padding of the mode {mode!r} by {pads.tolist()}")
    return functional.pad(x, (first[-1], last[-1], first[-2], last[-2]), mode="replicate")


def _divide(a: Mapping[str, Any], x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _axes(a: Mapping[str, Any], given: Tensor | None) -> list[int]:
    return given.tolist() if given is not None else list(a["axes"])


def _squeeze(a: Mapping[str, Any], x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze(tuple(_axes(a, axes)))


def _unsqueeze(a: Mapping[str, Any], x: Tensor, axes: Tensor | None = None) -> Tensor:
    for axis in sorted(_axes(a, axes)):
        x = x.unsqueeze(axis)
    return x


def _reduce_mean(a: Mapping[str, Any], x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.mean(_axes(a, axes), keepdim=bool(a.get("keepdims", 1)))


def _concat(a: Mapping[str, Any], *parts: Tensor) -> Tensor:
    return torch.cat(parts, a["axis"])


def _gather(a: Mapping[str, Any], x: Tensor, index: Tensor) -> Tensor:
    axis = a.get("axis", 0)
    return x.index_select(axis, index.flatten()).reshape(x.shape[:axis] + index.shape + x.shape[axis + 1 :])


def _constant_of_shape(a: Mapping[str, Any], shape: Tensor) -> Tensor:
    return a["value"].expand(shape.tolist())


def _hard_sigmoid(a: Mapping[str, Any], x: Tensor) -> Tensor:
    return (a.get("alpha", 0.2) * x + a.get("beta", 0.5)).clamp(0, 1)


_OPERATORS: dict[str, Callable[..., Tensor]] = {
    "Add": lambda a, x, y: x + y,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": lambda a, x: x.to(_DTYPES[a["to"]]),
    "Clip": lambda a, x, low=None, high=None: x.clamp(low, high),
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "Div": _divide,
    "Gather": _gather,
    "GlobalAveragePool": lambda a, x: x.mean((-2, -1), keepdim=True),
    "HardSigmoid": _hard_sigmoid,
    "Identity": lambda a, x: x,
    "MatMul": lambda a, x, y: x @ y,
    "MaxPool": _max_pool,
    "Mul": lambda a, x, y: x * y,
    "Pad": _pad,
    "Pow": lambda a, x, y: x.pow(y),
    "ReduceMean": _reduce_mean,
    "Relu": lambda a, x: x.relu(),
    "Reshape": _reshape,
    "Shape": lambda a, x: torch.tensor(x.shape),
    "Sigmoid": lambda a, x: x.sigmoid(),
    "Slice": _slice,
    "Softmax": lambda a, x: x.softmax(a.get("axis", -1)),
    "Sqrt": lambda a, x: x.sqrt(),
    "Squeeze": _squeeze,
    "Sub": lambda a, x, y: x - y,
    "Transpose": lambda a, x: x.permute(a["perm"]),
    "Unsqueeze": _unsqueeze,
}
