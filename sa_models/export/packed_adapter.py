"""An adapter in few bits: singular directions in mixed precision, bits by singular value.

The B A of a projection is a sum of directions u v^T, u and v each with the root of the singular
value s as its length. A direction may be left out, or stored in 2, 3, 4 or 8 bits a number
(Delta-CoMe, 2406.08903). Of the squared norm s^2 a direction then loses about the shares of
:data:`LOST`, those of uniform quantizers of normal numbers, twice, as u and v are quantized. The
sum of these losses over all projections is least, for a number of bits, where every next bit goes
to the direction in which it gains most: shares fall convexly, so that the greedy choice is best.

The file is safetensors: `codes` (packed bits), `bits` of each direction (uint8), `scales` (fp16,
[directions, 2]); the header's `modules` has (name, out_features, in_features, directions) each.
"""

from __future__ import annotations

import heapq
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from sa_models.calibration.input_moments import Where
from sa_models.errors import PostshareError
from sa_models.export.peft_adapter import Pairs, module_name
from sa_models.heads import HeadLayout
from sa_models.materialize.low_rank_residual import Pair
from sa_models.weights.safetensors_folder import save_tensors

PACKED_FILE = "adapter_packed.safetensors"
LOST = {0: 1.0, 2: 0.224, 3: 0.073, 4: 0.023, 8: 0.0002}
"""Share of a direction's squared norm that is lost, by bits: 1 - (1 - e)^2, e of one vector."""
_WIDTHS = sorted(LOST)
_HEADER = 200
"""Most bytes of the file's header beside the modules' entries."""


def pack(pairs: Pairs, folder: Path, budget: int) -> int:
    """Write residuals into an existing folder, in at most `budget` bytes.

    Returns:
        bytes of the file.
    Raises:
        PostshareError: not even one direction fits.
    """
    directions = {where: principal(pair) for where, pair in pairs.items()}
    names = sum(len(json.dumps(_entry(where, pair, 999))) + 10 for where, pair in pairs.items())
    chosen = allocate(directions, 8 * (budget - _HEADER - names))
    if not any(chosen.values()):
        raise PostshareError(
            f"{budget:,} bytes hold no direction of this adapter; give it {2 * _HEADER + names:,} "
            "or more"
        )
    codes, bits, scales, modules = [], [], [], []
    for where, widths in chosen.items():
        pair = directions[where]
        modules.append(_entry(where, pair, len(widths)))
        for index, (code, scale) in enumerate(quantized(pair, widths)):
            codes += code
            bits.append(widths[index])
            scales.append(scale)
    tensors = {
        "codes": torch.from_numpy(np.packbits(np.concatenate(codes))),
        "bits": torch.tensor(bits, dtype=torch.uint8),
        "scales": torch.tensor(scales, dtype=torch.float16),
    }
    save_tensors(tensors, folder / PACKED_FILE, metadata={"modules": json.dumps(modules)})
    return (folder / PACKED_FILE).stat().st_size


def unpack(folder: Path) -> dict[Where, Pair]:
    """The residuals of a packed adapter, fp32; all of one rank, filled up with zeros.

    Raises:
        PostshareError: it cannot be read.
    """
    try:
        with safe_open(folder / PACKED_FILE, framework="pt") as file:
            modules = json.loads(file.metadata()["modules"])
            stream = np.unpackbits(file.get_tensor("codes").numpy())
            widths, scales = file.get_tensor("bits").tolist(), file.get_tensor("scales").float()
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise PostshareError(
            f"{folder} holds no readable packed adapter ({reason}); pack it again"
        ) from None
    rank, pairs, at, first = max(entry[3] for entry in modules), {}, 0, 0
    for name, out, features, count in modules:
        a, b = torch.zeros(rank, features), torch.zeros(out, rank)
        for index in range(count):
            width, (u, v) = widths[first + index], scales[first + index]
            b[:, index] = u * _levels(stream[at : at + width * out], width)
            at += width * out
            a[index] = v * _levels(stream[at : at + width * features], width)
            at += width * features
        first += count
        where = HeadLayout.parse_name(f"{name}.weight")
        assert where is not None
        pairs[where] = Pair(a, b)
    return pairs


def principal(pair: Pair) -> Pair:
    """The same B A by singular directions, largest first, u and v of one length; float64."""
    q, r = torch.linalg.qr(pair.b.double())
    p, t = torch.linalg.qr(pair.a.double().T)
    u, s, v = torch.linalg.svd(r @ t.T)
    root = s.sqrt()
    return Pair((root[:, None] * v) @ p.T, (q @ u) * root)


def allocate(directions: Pairs, bits: int) -> dict[Where, list[int]]:
    """Bits a number of each direction, by projection, until `bits` are used; none are left out."""
    chosen: dict[Where, list[int]] = {where: [] for where in directions}
    heap: list[tuple[float, int, Where, int, int, int]] = []

    def offer(where: Where, index: int, step: int) -> None:
        pair = directions[where]
        if index >= len(pair.a) or step >= len(_WIDTHS):
            return
        here, more = _WIDTHS[step - 1], _WIDTHS[step]
        norm = float(pair.a[index].norm() * pair.b[:, index].norm()) ** 2
        cost = (more - here) * (pair.a.shape[1] + pair.b.shape[0])
        cost += 40 if step == 1 else 0  # a width and two scales
        gain = norm * (LOST[here] - LOST[more]) / cost
        heapq.heappush(heap, (-gain, len(heap), where, index, step, cost))

    for where in directions:
        offer(where, 0, 1)
    while heap:
        gain, _, where, index, step, cost = heapq.heappop(heap)
        if gain == 0 or cost > bits:
            continue
        bits -= cost
        if step == 1:
            chosen[where].append(_WIDTHS[1])
            offer(where, index + 1, 1)
        else:
            chosen[where][index] = _WIDTHS[step]
        offer(where, index, step + 1)
    return chosen


def quantized(pair: Pair, widths: list[int]) -> list[tuple[list[np.ndarray], tuple[float, float]]]:
    """For each direction the bits of u and v, and their scales.

    v is taken anew for the u that is stored, and for what the directions before have missed.
    """
    stored_a: list[torch.Tensor] = []
    stored_b: list[torch.Tensor] = []
    found = []
    for index, width in enumerate(widths):
        u, code_u, scale_u = _quantize(pair.b[:, index], width)
        v = (u @ pair.b) @ pair.a
        if stored_a:
            v = v - (u @ torch.stack(stored_b, 1)) @ torch.stack(stored_a)
        v, code_v, scale_v = _quantize(v / (u @ u), width)
        stored_a.append(v)
        stored_b.append(u)
        found.append(([code_u, code_v], (scale_u, scale_v)))
    return found


def _quantize(x: torch.Tensor, width: int) -> tuple[torch.Tensor, np.ndarray, float]:
    """Values, bits and fp16 scale of the uniform quantizer with the least squared error."""
    largest = 2**width - 1
    best: tuple[float, float] = (float("inf"), 0.0)
    for share in torch.linspace(0.25, 1, 31).tolist():
        scale = float((2 * share * x.abs().max() / largest).half())
        scale = max(scale, 2.0**-24)  # the smallest that fp16 has
        levels = (x / scale + largest / 2).round().clamp(0, largest)
        error = float((scale * (levels - largest / 2) - x).square().sum())
        best = min(best, (error, scale))
    scale = best[1]
    levels = (x / scale + largest / 2).round().clamp(0, largest)
    bits = np.unpackbits(levels.to(torch.uint8).numpy()[:, None], axis=1)[:, 8 - width :]
    return scale * (levels - largest / 2), bits.reshape(-1), scale


def _levels(bits: np.ndarray, width: int) -> torch.Tensor:
    """What :func:`_quantize` has put into bits, without the scale."""
    rows = np.zeros((len(bits) // width, 8), dtype=np.uint8)
    rows[:, 8 - width :] = bits.reshape(-1, width)
    return torch.from_numpy(np.packbits(rows, axis=1)[:, 0]).float() - (2**width - 1) / 2


def _entry(where: Where, pair: Pair, count: int) -> list[str | int]:
    return [module_name(where), pair.b.shape[0], pair.a.shape[1], count]
