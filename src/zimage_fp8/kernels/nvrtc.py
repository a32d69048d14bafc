"""CUDA C++ to machine code where it runs, by the C interface of NVRTC, which PyTorch requires.

What was compiled is kept in Triton's cache on disk (`TRITON_CACHE_DIR`), by the hash of everything
that went into it.
"""

import ctypes
import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch

_COMPILING = threading.Lock()


def compiled(name: str, source: str, headers: Mapping[str, str], options: Sequence[str]) -> bytes:
    """Machine code of `source`, which includes `headers`. Raises RuntimeError with the compiler's
    log, and where there is no compiler."""
    from triton.runtime.cache import get_cache_manager

    parts = [_version(), source, *headers.values(), *options]
    cache = get_cache_manager(hashlib.sha256("\n".join(parts).encode()).hexdigest())
    file = f"{name}.cubin"
    with _COMPILING:  # who wants what is being compiled in the background waits for it
        if found := cache.get_file(file):
            return Path(found).read_bytes()
        code = _compile(f"{name}.cu", source, headers, options)
        cache.put(code, file, binary=True)
        return code


@lru_cache
def find_library() -> ctypes.CDLL | None:
    """NVRTC as PyTorch's wheels bring it, of PyTorch's own major version first, or the system's."""
    major = (torch.version.cuda or "").partition(".")[0]
    spec = find_spec("nvidia")  # a namespace of many wheels
    folders = spec.submodule_search_locations if spec else None
    found = [path for folder in folders or () for path in Path(folder).glob("*/lib/libnvrtc.so.*")]
    found.sort(key=lambda path: (path.suffix == f".{major}", path.suffix), reverse=True)
    for name in (*map(str, found), f"libnvrtc.so.{major}"):
        with suppress(OSError):
            return ctypes.CDLL(name)
    return None


def _library() -> ctypes.CDLL:
    library = find_library()
    if library is None:
        raise RuntimeError("NVRTC is not installed: pip install nvidia-cuda-nvrtc")
    return library


@lru_cache
def _version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def _compile(name: str, source: str, headers: Mapping[str, str], options: Sequence[str]) -> bytes:
    library, program = _library(), ctypes.c_void_p()
    failed = library.nvrtcCreateProgram(
        ctypes.byref(program),
        source.encode(),
        name.encode(),
        len(headers),
        _strings(headers.values()),
        _strings(headers),
    )
    if failed:
        raise RuntimeError(f"NVRTC makes no program of {name}: error {failed}")
    try:
        if library.nvrtcCompileProgram(program, len(options), _strings(options)):
            log = _fetched(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
            raise RuntimeError(f"NVRTC cannot compile {name}: {log.decode(errors='replace')}")
        return _fetched(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _strings(values: Iterable[str]) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [value.encode() for value in values]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def _fetched(
    size_of: Callable[..., int], fetch: Callable[..., int], program: ctypes.c_void_p
) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    fetch(program, buffer)
    return buffer.raw
