"""NF4 and FP4 weights in blocks: how bitsandbytes stores them (QLoRA: Dettmers et al. 2023, section 3), in plain PyTorch.

Quantise: absmax = max |w| of a block of the flattened weight; code = how many midpoints of the code book lie strictly below
w / absmax; a byte holds two codes, the first in its high half. Dequantise: codebook[code] · absmax in float32, rounded once.
Double quantisation: absmax - mean is stored in blocks of 256 as 8-bit codes of a dynamic map.

bitsandbytes rounds differently on its two devices: a block of zeros is code 7 (0) on the CPU and code 0 (-1, of a scale of 0)
on CUDA; CUDA's FP4 midpoints are rounded decimals; its CPU finds 8-bit codes in a table of 65,536 entries. Each device here
does as bitsandbytes does there.
"""

from __future__ import annotations

import functools

import torch

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_HALF = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # sign, then three bits
FP4 = tuple(v / 12 for v in _FP4_HALF) + tuple(-v / 12 for v in _FP4_HALF)
_FP4_ORDER = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)  # codes by value; 8 is -0, after 0
_FP4_CUDA = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)  # midpoints of |w|
_FP4_CUDA_CODES = (0, 1, 6, 7, 4, 5, 2, 3)
NESTED_BLOCK = 256


CPU = torch.device("cpu")  # named wherever something is made that is kept, for the default device may be another now


@functools.cache
def codebook(quant_type: str, device: torch.device = CPU) -> torch.Tensor:
    """float32 [16]"""
    return torch.tensor(NF4 if quant_type == "nf4" else FP4, dtype=torch.float32, device=device)


@functools.cache
def dynamic_map(device: torch.device = CPU) -> torch.Tensor:
    """float32 [256], ascending: sign, a decimal exponent in unary, and a linear fraction (Dettmers 2015)"""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device=CPU)
        means = ((edges[:-1] + edges[1:]) / 2.0) * 10.0 ** (i - 6)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def quantize(w: torch.Tensor, quant_type: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """w, any shape -> bytes uint8 [(n + 1) // 2], absmax float32 [blocks]"""
    flat = w.detach().reshape(-1).float()
    n, whole = flat.numel(), flat.numel() // blocksize * blocksize
    blocks = flat[:whole].view(-1, blocksize)
    absmax = blocks.abs().amax(1) if whole else flat.new_empty(0)
    cuda = w.is_cuda
    scaled = (blocks * (1.0 / (absmax if cuda else absmax.clamp(min=1e-38)))[:, None]).view(-1)
    if whole < n:
        last = flat[whole:].abs().amax()
        last = last if cuda else last.clamp(min=1e-38)
        tail = flat[whole:] * (1.0 / last) if cuda else flat[whole:] / last
        absmax, scaled = torch.cat([absmax, last[None]]), torch.cat([scaled, tail])
    scaled = scaled.clamp(-1, 1)
    if n % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    codes = _codes_cuda(scaled, quant_type) if cuda else _codes(scaled, quant_type)
    return codes[::2] << 4 | codes[1::2], absmax


def _codes(scaled, quant_type):
    book = codebook(quant_type)
    order = torch.tensor(range(16) if quant_type == "nf4" else _FP4_ORDER, device=CPU)
    book, order = book[order].to(scaled.device), order.to(scaled.device, torch.uint8)
    return order[torch.bucketize(scaled, (book[:-1] + book[1:]) / 2)]


def _codes_cuda(scaled, quant_type):
    if quant_type == "nf4":
        return torch.where(scaled.isnan(), 0, _codes(scaled, "nf4"))
    edges = torch.tensor(_FP4_CUDA, dtype=torch.float32, device=scaled.device)
    codes = torch.tensor(_FP4_CUDA_CODES, dtype=torch.uint8, device=scaled.device)
    magnitude = torch.bucketize(scaled.abs(), edges)
    found = codes[magnitude] + torch.where(scaled < 0, 8, 0).to(torch.uint8)
    return torch.where(scaled.isnan(), 0, found)


def quantize_absmax(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """absmax float32 [blocks] -> codes uint8 [blocks], nested absmax float32 [blocks / 256], offset float32 []"""
    offset = absmax.mean()
    centred = absmax - offset
    n = centred.numel()
    blocks = torch.nn.functional.pad(centred, (0, -n % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / nested)[:, None]).view(-1)[:n]
    book = dynamic_map(absmax.device)
    if absmax.is_cuda:
        codes = torch.bucketize(scaled, (book[:-1] + book[1:]) / 2).to(torch.uint8)
    else:
        index = ((scaled + 1) * 0.5 * 65535 + 0.5).clamp(0, 65535).nan_to_num(0).long()
        codes = _table()[index]
    return torch.where(scaled.isnan(), 0, codes), nested, offset


@functools.cache
def _table() -> torch.Tensor:
    """uint8 [65536]: the code nearest to each of so many steps from -1 to 1"""
    book = dynamic_map()
    steps = (-1 + 2 * torch.arange(65536, dtype=torch.float64, device=CPU) / 65535).float()
    right = torch.bucketize(steps, book).clamp(0, 255)
    left = (right - 1).clamp(min=0)
    nearer = (right == 0) | ((book[right] - steps).abs() < (steps - book[left]).abs())
    return torch.where(nearer, right, left).to(torch.uint8)


def dequantize_absmax(codes: torch.Tensor, nested: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """-> absmax float32 [blocks]"""
    scale = nested.repeat_interleave(NESTED_BLOCK)[: codes.numel()]
    return dynamic_map(codes.device)[codes.long()] * scale + offset


def dequantize(packed, absmax, shape, quant_type, blocksize, dtype) -> torch.Tensor:
    """bytes uint8 [(n + 1) // 2], absmax float32 [blocks] -> [shape] of dtype"""
    n = shape[0] * shape[1]
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:n]
    values = codebook(quant_type, packed.device)[codes.long()]
    scale = absmax.repeat_interleave(blocksize)[:n]
    return (values * scale).to(dtype).view(shape)


def dense(weight, dtype) -> torch.Tensor:
    """[N, K] of `dtype` of a Weight4bit"""
    native = weight.untile()
    absmax = native.scales
    if native.nested:
        absmax = dequantize_absmax(native.scales, native.nested_absmax, native.offset)
    return dequantize(native.data, absmax, weight.shape, weight.quant_type, weight.blocksize, dtype)
