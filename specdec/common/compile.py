"""Code compiled ahead of time by Inductor: one piece for all sizes, kept on the disk.

A forward of a small model is mostly dispatch. Pieces of it are exported and compiled to shared
libraries whose sizes are arguments, so that nothing is guarded and nothing is ever compiled again,
whatever rows join or leave.
"""

import hashlib
import os
import subprocess
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.func import functional_call

# Names of sizes that differ from call to call: rows, new tokens of a row, slots that they may see,
# slots that a row has, children of a node, and nodes of a draft.
ROWS, WIDTH, SEEN, CAPACITY = "rows", "width", "seen", "capacity"
CHILDREN, NODES = "children", "nodes"
# These have bounds that depend on other sizes, which export finds out by itself.
_BOUNDED = (SEEN, CAPACITY, CHILDREN, NODES)
_OPTIONS = {"cpp.dynamic_threads": True}
# Devices that capture graphs. Tests add the CPU, on which the same code runs without a capture.
GRAPH_DEVICES = ("cuda",)
# A compiled function of a list of tensors, which it empties. They must be contiguous and of the
# dtypes and devices that it was compiled for: nothing is checked.
Piece = Callable[[list[Tensor]], list[Tensor]]
_loaded: dict[str, Piece] = {}
_bound: dict[tuple[Any, ...], Piece] = {}
_COMPILING = Lock()
_seconds = 0.0
_num_compiled = 0


class CannotCompileError(RuntimeError):
    """A model or a machine that code cannot be compiled for; says why."""


def compile_mode(compile: bool | str, device: torch.device, cache: str | None = None) -> str:
    """Return what `compile` means on a device: "eager", "inductor" or "graphs".

    Raises:
        ValueError: no such mode, or one that the device does not have.
        CannotCompileError: one that does not read a quantized `cache`.
    """
    if compile not in (False, True, "graphs", "auto"):
        raise ValueError(f"compile is {compile!r} but must be False, True, 'graphs' or 'auto'")
    if compile == "graphs" and device.type not in GRAPH_DEVICES:
        raise ValueError(f"compile is 'graphs', which needs CUDA, but the device is {device}")
    if cache and compile in (True, "graphs"):
        raise CannotCompileError(
            f"compile is {compile!r}, but compiled code reads no {cache} cache; leave one of the "
            "two out, or give compile='auto'"
        )
    if compile == "auto":
        return "graphs" if not cache and device.type == "cuda" else "eager"
    return "graphs" if compile == "graphs" else "inductor" if compile else "eager"


def as_target(compile: bool | str | None, target: Any) -> bool | str:
    """Return a drafter's `compile`: None is the mode of its target."""
    if compile is not None:
        return compile
    mode = getattr(target, "compile_mode", "eager")
    return "graphs" if mode == "graphs" else mode == "inductor"


def compiler() -> str | None:
    """Name the C++ compiler that Inductor calls, with its version; None if there is none."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        told = subprocess.run([get_cpp_compiler(), "--version"], capture_output=True, text=True)
    except Exception:  # Inductor has an error of its own for each way to have none
        return None
    return told.stdout.partition("\n")[0] or None


def compile_s() -> float:
    """Return the seconds that this process has spent on compiling and on loading what it had."""
    return _seconds


def num_compiled() -> int:
    """Return the number of pieces that this process has compiled or loaded."""
    return _num_compiled


def compile_piece(
    function: Callable[..., Any], inputs: Sequence[Tensor], sizes: Sequence[Sequence[str | None]]
) -> Piece:
    """Compile a function of tensors to a list of tensors, or load it from the disk.

    Args:
        function: all tensors that it reads are inputs; what it writes into, too.
        inputs: examples, contiguous; sizes that may differ must be at least 2 here.
        sizes: of each input, a name for each dimension that may differ, else None; equal names are
            equal sizes.

    Raises:
        CannotCompileError: the function cannot be exported or compiled.
    """
    global _seconds, _num_compiled
    started = time.perf_counter()
    named = {name for each in sizes for name in each if name}
    dims = {n: Dim.AUTO if n in _BOUNDED else Dim(n, min=1, max=2**20) for n in named}
    dynamic = tuple({i: dims[n] for i, n in enumerate(each) if n} for each in sizes)
    try:
        with _COMPILING, _quietly(), torch.inference_mode(False), torch.no_grad():
            # What was made in inference mode cannot be traced.
            example = tuple(t.clone() if t.is_inference() else t.detach() for t in inputs)
            exported = torch.export.export(
                _Function(function), example, dynamic_shapes={"inputs": dynamic}, strict=False
            )
            _refuse_fixed_sizes(exported, sizes)
            if exported.constants or any(True for _ in exported.parameters()):
                raise CannotCompileError("it reads tensors that are not its inputs")
            key = _key(exported, inputs)
            if key not in _loaded:
                path = _folder() / f"{key}.pt2"
                if not path.is_file():
                    _compile_to(exported, path)
                package = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
                _loaded[key] = package.loader.boxed_run
                _num_compiled += 1
    except CannotCompileError:
        raise
    except Exception as error:  # whatever export, Inductor or the compiler raise
        lines = str(error).strip().splitlines() or [""]
        raise CannotCompileError(f"{type(error).__name__}: {lines[0]:.200}") from error
    _seconds += time.perf_counter() - started
    return _loaded[key]


def compile_bound(
    name: str,
    modules: Sequence[nn.Module],
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    sizes: Sequence[Sequence[str | None]],
) -> Callable[..., list[Tensor]]:
    """Compile a function that also reads the weights of some modules, which stay where they are.

    Args:
        name: the same for functions that do the same with weights of the same shapes, which are
            exported once.
        modules: the modules.
        function: as in `compile_piece`, as are the other arguments.
        inputs: its own inputs alone.
        sizes: those of its own inputs.

    Returns:
        The function, of its own inputs alone, which need not be contiguous.
    """
    bound = _Function(function, *modules)
    names, weights = [*tensors_of(bound)], [*tensors_of(bound).values()]

    def run(*given: Tensor) -> Any:
        own, rest = given[: len(inputs)], given[len(inputs) :]
        return functional_call(bound, dict(zip(names, rest, strict=True)), own)

    whole = [*inputs, *weights]
    key = name, *((each.shape, each.dtype, each.device) for each in whole)
    if key not in _bound:
        _bound[key] = compile_piece(run, whole, [*sizes, *map(fixed, weights)])
    piece = _bound[key]
    return lambda *given: piece([*(tensor.contiguous() for tensor in given), *weights])


class Graphs:
    """Runs a function of tensors as CUDA graphs, one for each set of shapes, captured at first use.

    Its inputs are copied into buffers that stay in place; all graphs share one pool of memory.
    On a CPU the same is done without a capture: the function runs on the buffers.

    Args:
        function: waits for nothing on the host and allocates nothing that outlives it.
        device: its device.
        most: graphs that are kept; those used least recently go.

    Attributes:
        num_captured: graphs captured so far.
    """

    def __init__(
        self, function: Callable[..., list[Tensor]], device: torch.device, most: int = 64
    ) -> None:
        self._function, self._most, self._is_cuda = function, most, device.type == "cuda"
        self._pool = _graph_pool() if self._is_cuda else None
        self._kept: OrderedDict[Any, tuple[list[Tensor], list[Tensor], Any]] = OrderedDict()
        self.num_captured = 0

    def __call__(self, inputs: Sequence[Tensor], held: Sequence[Tensor] = ()) -> list[Tensor]:
        """Run the function.

        Args:
            inputs: tensors of any values, of shapes that come again.
            held: tensors that the function reads or writes where they are. A graph is never
                replayed for others than those that it was captured with.

        Returns:
            What the function does, as copies.
        """
        key = (
            tuple((t.shape, t.dtype) for t in inputs),
            tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in held),
        )
        if key not in self._kept:
            self._kept[key] = self._capture(inputs, held)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        buffers, outputs, graph = self._kept[key]
        for buffer, value in zip(buffers, inputs, strict=True):
            buffer.copy_(value)
        if graph is None:
            outputs = self._function(*buffers, *held)
        else:
            graph.replay()
        return [output.clone() for output in outputs]

    def _capture(self, inputs: Sequence[Tensor], held: Sequence[Tensor]) -> Any:
        self.num_captured += 1
        buffers = [value.clone() for value in inputs]
        if not self._is_cuda:
            return buffers, [], None
        # What libraries set up at their first call must not be captured.
        side = torch.cuda.Stream(buffers[0].device)
        side.wait_stream(torch.cuda.current_stream(buffers[0].device))
        with torch.cuda.stream(side):
            for _ in range(2):
                self._function(*buffers, *held)
        torch.cuda.current_stream(buffers[0].device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = self._function(*buffers, *held)
        return buffers, outputs, graph


@cache
def _graph_pool() -> Any:
    """Return the memory of all graphs: none runs beside another, and outputs are copied at once."""
    return torch.cuda.graph_pool_handle()


def bucket(size: int) -> int:
    """Round a number of rows or new tokens up, so that few graphs serve all: 1, 2, 3, 4, 6 ..."""
    step = 1 << max(0, size.bit_length() - 2)
    return -(-size // step) * step


def fixed(tensor: Tensor) -> list[str | None]:
    return [None] * tensor.ndim


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """List parameters and buffers, each once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


class _Function(nn.Module):
    """A function as a module, which owns the modules that it reads."""

    def __init__(self, function: Callable[..., Any], *modules: nn.Module) -> None:
        super().__init__()
        self._function, self._modules_read = function, nn.ModuleList(modules)

    def forward(self, *inputs: Tensor) -> Any:
        return self._function(*inputs)


def _refuse_fixed_sizes(exported: Any, sizes: Sequence[Sequence[str | None]]) -> None:
    found = [node for node in exported.graph.nodes if node.op == "placeholder"]
    for node, names in zip(found, sizes, strict=True):
        for size, name in zip(node.meta["val"].shape, names, strict=True):
            if name and isinstance(size, int):
                raise CannotCompileError(f"it works for one size of {name} only, {size}")


def _folder() -> Path:
    """Return where Inductor keeps its own code: TORCHINDUCTOR_CACHE_DIR, or a folder of the user's.

    Compiled code is run as it is, so nobody else may be able to write there.
    """
    from torch._inductor.runtime.runtime_utils import cache_dir

    folder = Path(cache_dir()) / "specdec"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        raise CannotCompileError(f"{folder} is another user's; set TORCHINDUCTOR_CACHE_DIR")
    return folder


def _key(exported: Any, inputs: Sequence[Tensor]) -> str:
    """Hash all that the compiled code depends on."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    device = inputs[0].device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    shapes = [(tuple(t.shape), str(t.dtype), str(t.device)) for t in inputs]
    code = exported.graph_module.code + repr(exported.range_constraints)
    machine = (torch.__version__, compiler(), str(pick_vec_isa()), gpu, _OPTIONS)
    return hashlib.sha256(repr((code, shapes, machine)).encode()).hexdigest()[:32]


def _compile_to(exported: Any, path: Path) -> None:
    if compiler() is None:
        raise CannotCompileError("there is no C++ compiler here; install g++, or set CXX")
    fresh = path.with_name(f"{path.stem}-{os.getpid()}.pt2")
    torch._inductor.aoti_compile_and_package(
        exported, package_path=str(fresh), inductor_configs=dict(_OPTIONS)
    )
    fresh.replace(path)


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
