"""Tensors on guarded memory: the page behind each may not be touched, so that a read past the end is a crash."""

from __future__ import annotations

import ctypes
import mmap

import torch

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Memory:
    """Hands out tensors whose last element is followed by a page without access; frees them all at the end."""

    def __init__(self):
        self.maps = []

    def empty(self, rows: int, columns: int, dtype: torch.dtype, gap: int = 0) -> torch.Tensor:
        """[rows, columns] with `gap` NaN elements between rows (none after the last)."""
        ld = columns + gap
        count = max(rows - 1, 0) * ld + (columns if rows else 0)
        size, page = count * dtype.itemsize, mmap.PAGESIZE
        total = (-(-size // page) + 1) * page
        base = _libc.mmap(None, total, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        assert base not in (None, ctypes.c_void_p(-1).value), "mmap failed"
        self.maps.append((base, total))
        assert _libc.mprotect(base + total - page, page, 0) == 0
        if count == 0:
            return torch.empty(rows, columns, dtype=dtype)
        buffer = (ctypes.c_char * size).from_address(base + total - page - size)
        flat = torch.frombuffer(buffer, dtype=dtype).fill_(float("nan") if dtype.is_floating_point else 255)
        return flat.as_strided((rows, columns), (ld, 1))

    def copy(self, values: torch.Tensor, dtype: torch.dtype, gap: int = 0) -> torch.Tensor:
        out = self.empty(*values.shape, dtype, gap)
        return out.copy_(values)

    def close(self):
        for base, total in self.maps:
            _libc.munmap(base, total)
