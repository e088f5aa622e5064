"""A GGUF file: written tensor by tensor from dense weights and a plan; read back and compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sa_models.errors import PostshareError
from sa_models.export.gguf.layout import BLOCKS, GgufLayout, GgufTensor
from sa_models.export.verify import CURE
from sa_models.heads import HeadLayout
from sa_models.weights.compact_folder import DenseReader, cast

INSTALL = "pip install 'postshare[gguf]'"
COMPARED = 1 << 24
"""Elements that are compared at a time."""
Progress = Callable[[int], None]


def _silent(size: int) -> None:
    pass


def require_gguf() -> None:
    """Raises PostshareError, with what installs it, where the package gguf is not there."""
    try:
        import gguf  # noqa: F401 - an optional extra
    except ImportError:
        raise PostshareError(f"writing GGUF needs the package gguf; {INSTALL}") from None


@dataclass(frozen=True)
class GgufForm:
    """A model's form in GGUF, known before any of its weights is read.

    Attributes:
        header: all keys but ``general.architecture``, with their values.
    """

    layout: GgufLayout
    header: Mapping[str, Any]

    @property
    def parameters(self) -> int:
        """Weights that are stored."""
        return sum(math.prod(tensor.shape) for tensor in self.layout.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, without padding."""
        return sum(tensor.nbytes for tensor in self.layout.tensors)

    def write(self, file: Path, source: DenseReader, progress: Progress = _silent) -> None:
        """Write a file. Holds one tensor at a time: in fp32, and as it is stored.

        Args:
            source: dense weights in which the plan is materialized.
            progress: called with the bytes of every tensor.

        Raises:
            PostshareError: f16 cannot hold a weight.
            OSError: the disk is full.
        """
        from gguf import GGMLQuantizationType, GGUFWriter

        writer = GGUFWriter(file, self.layout.architecture)
        add: dict[type, Callable[[str, Any], None]] = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        for key, value in self.header.items():
            add[type(value)](key, value)
        for tensor in self.layout.tensors:
            # Any type but bytes: of bytes the writer takes the shape for one of blocks.
            kind = GGMLQuantizationType[tensor.kind.upper()]
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float16), tensor.nbytes, raw_dtype=kind
            )
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in self.layout.tensors:
                writer.write_tensor_data(_encoded(tensor, _stored(tensor, source, self.layout)))
                progress(tensor.nbytes)
        finally:
            writer.close()

    def verify(self, file: Path, source: DenseReader, progress: Progress = _silent) -> None:
        """Read a file as others do, and compare it with the dense weights, head by head.

        What is not quantized has to be the very value, rounded once; what is, within a step of its
        block.

        Raises:
            PostshareError: names the key or the tensor that differs.
        """
        from gguf import GGUFReader
        from gguf.quants import dequantize

        try:
            reader = GGUFReader(file)
        except (ValueError, IndexError, KeyError) as error:
            reason = " ".join(str(error).split())[:120]
            raise PostshareError(f"{file} cannot be read back ({reason}); {CURE}") from None
        for key, value in self.header.items():
            field = reader.fields.get(key)
            read = None if field is None else field.contents()
            if read != (float(np.float32(value)) if isinstance(value, float) else value):
                raise PostshareError(f"{file}: {key} is not what was written; {CURE}")
        if [tensor.name for tensor in reader.tensors] != [t.name for t in self.layout.tensors]:
            raise PostshareError(f"{file} has other tensors than the plan says; {CURE}")
        for expected, found in zip(self.layout.tensors, reader.tensors, strict=True):
            kind, shape = found.tensor_type.name.lower(), tuple(map(int, found.shape[::-1]))
            if (kind, shape, found.n_bytes) != (expected.kind, expected.shape, expected.nbytes):
                raise PostshareError(f"{file}: {found.name} is {kind} {list(shape)}; {CURE}")
            wanted = _expected(expected, source, self.layout)
            step = self._rows_at_a_time(expected)
            for start in range(0, expected.shape[0], step):
                rows = dequantize(found.data[start : start + step], found.tensor_type)
                held = torch.from_numpy(np.array(rows, np.float32))
                held = _in_order(held, expected, self.layout)
                part = wanted[start : start + step].float()
                if not bool(((held - part).abs() <= _steps(part, kind)).all()):
                    raise PostshareError(f"{file}: {found.name} differs from the weights; {CURE}")
            progress(expected.nbytes)

    def _rows_at_a_time(self, tensor: GgufTensor) -> int:
        """Rows of a tensor that are compared at a time, in whole heads; of a vector all."""
        if len(tensor.shape) == 1:
            return tensor.shape[0]
        head = self.layout.heads.head_dim
        return head * max(1, COMPARED // (head * tensor.shape[1]))


def _stored(tensor: GgufTensor, source: DenseReader, layout: GgufLayout) -> torch.Tensor:
    """What a tensor of the file holds, before it is rounded."""
    if tensor.source is None:
        factors = layout.rope_factors()
        assert factors is not None
        return factors
    dense = source.read(tensor.source)
    selected = layout.rows(tensor.source)
    return dense if selected is None else dense.index_select(*selected)


def _encoded(tensor: GgufTensor, value: torch.Tensor) -> np.ndarray:
    """The values as they lie in the file."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if tensor.kind == "bf16":
        return value.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    if tensor.kind == "f16":
        return cast(value, torch.float16, tensor.source or tensor.name).contiguous().numpy()
    rows = value.float().contiguous().numpy()
    return quantize(rows, GGMLQuantizationType[tensor.kind.upper()])


def _expected(tensor: GgufTensor, source: DenseReader, layout: GgufLayout) -> torch.Tensor:
    """The values of the dense weight that a tensor has to hold, in the order that it has there."""
    if tensor.source is None:
        return _stored(tensor, source, layout)
    dense = source.read(tensor.source)
    where = HeadLayout.parse_name(tensor.source)
    if where is not None:
        layer, projection = where
        axis, width = layout.heads.axis(projection), layout.heads.width(projection)
        units = dense.split(width, dim=axis)
        dense = torch.cat([units[unit] for unit in layout.kept[layer]], dim=axis)
    rounded = {"f16": torch.float16, "bf16": torch.bfloat16}.get(tensor.kind, dense.dtype)
    return dense.to(rounded)


def _in_order(held: torch.Tensor, tensor: GgufTensor, layout: GgufLayout) -> torch.Tensor:
    """Rows of q and k as transformers has them: the first of all pairs, then the second."""
    where = HeadLayout.parse_name(tensor.source or "")
    if where is None or where[1] not in "qk":
        return held
    heads = held.split(layout.heads.head_dim)
    return torch.cat([torch.cat((head[0::2], head[1::2])) for head in heads])


def _steps(values: torch.Tensor, kind: str) -> torch.Tensor:
    """By how much a value may differ from what is held of it, (outputs, inputs): 0 where nothing is
    rounded here, a step of the block and the rounding of its scale elsewhere."""
    if kind not in ("q8_0", "q4_0", "q4_1"):
        return torch.zeros(())
    blocks = values.unflatten(-1, (-1, BLOCKS[kind][0]))  # type: ignore[index]
    least, most = blocks.aminmax(dim=-1, keepdim=True)
    largest = torch.maximum(least.abs(), most.abs())
    step = {"q8_0": largest / 127, "q4_0": largest / 8, "q4_1": (most - least) / 15}[kind]
    return (step + largest / 1024 + 1e-5).expand_as(blocks).flatten(-2)


__all__ = ["GgufForm", "require_gguf"]
