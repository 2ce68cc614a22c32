"""What it looks like when memory runs out, and how to clean up after it. Decides nothing, retries nothing."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import traceback
from types import TracebackType

import torch

_SAID = (
    "can't allocate memory",  # PyTorch's allocator on the CPU
    "cannot allocate memory",  # strerror(ENOMEM), through a library
    "out of memory",  # CUDA, where it is not PyTorch's own allocator that asks
    "not enough memory",
    "bad allocation",
    "could not create a primitive",  # oneDNN on the CPU, which never says why
    "could not execute a primitive",
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that the device, or the computer, has no memory left. PyTorch has a class for the former
    only; other libraries have words."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SAID)


class Catch:
    """`with Catch() as caught:` swallows a shortage of memory, and lets go of all that its traceback holds.

    Each frame of it keeps its tensors alive, and a stored exception each frame: what remains is the text.
    """

    said: str | None = None
    """what the error said, in one line; None if there was none"""
    counted = False
    """whether PyTorch's allocator counts it among its own (memory_stats: num_ooms)"""

    def __enter__(self) -> Catch:
        return self

    def __exit__(self, _: object, error: BaseException | None, trace: TracebackType | None) -> bool:
        if not is_out_of_memory(error):
            return False
        self.counted = isinstance(error, torch.OutOfMemoryError)
        self.said = " ".join(str(error).split())[:300] or type(error).__name__
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__
        return True


def clean_up(device: torch.device) -> None:
    """Give back what nobody uses any more: cycles, PyTorch's cache, the C library's free lists (malloc_trim(3))."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(AttributeError):  # musl has none
        ctypes.CDLL(None).malloc_trim(0)
