"""What a slice of T costs, by four ways: the arithmetic that predicts it, and its measure on a machine.

    way                     products with T       each is
    ---                     ---------------       -------
    forward mode            L·D tangents          T·V, a forward pass of the frozen network; vectorised
    one output at a time    D' cotangents         Uᵀ·T, a backward pass
    outputs in chunks       D' cotangents         the same, K in one pass: what ``AttentionTensor.slice`` does
    one row                 1 cotangent           ``linearize`` and one backward pass: no slice, but an In+Out row

A product is the same work either way, since T·V and Uᵀ·T are one network and its transpose. So forward mode takes
L·D / D' times the work of the others, and what is left between the second and the third is how well a machine is
filled. Times are of some of a way's products, scaled to all; memory is that of the tensors that live at once.
"""

import os
import platform
import re
import subprocess
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .linearize import linearize
from .tensor import AttentionTensor


def _tangents(T: AttentionTensor, n: int) -> Tensor:
    V = torch.zeros(n, *T.input.shape, dtype=T.input.dtype, device=T.input.device)
    V.view(n, -1)[:, :n].fill_diagonal_(1)
    return torch.func.vmap(lambda v: torch.func.jvp(T.replay, (T.input,), (v,))[1][:, -1])(V)


def _cotangents(T: AttentionTensor, n: int) -> Tensor:
    U = torch.zeros(n, *T.output.shape, dtype=T.output.dtype, device=T.output.device)
    U[:, :, -1, :n] = torch.eye(n, dtype=U.dtype, device=U.device)[:, None]
    return U


# way: (the first n of its products with T, how many there are in all, how many are timed)
WAYS = {
    "forward mode": (_tangents, lambda T: T.input[0].numel(), 16),
    "one output at a time": (lambda T, n: [T.rmatvec(u) for u in _cotangents(T, n)], lambda T: T.output.shape[-1], 8),
    "outputs in chunks": (lambda T, n: T.rmatvec(_cotangents(T, n)), lambda T: T.output.shape[-1], 40),
}


def measure(model: nn.Module, input_ids: Tensor, name: str, repeat: int = 2) -> list[dict]:
    """Each way's cost at these tokens (1, L), on the model's own device, as rows of a table:

    ``model`` (its name), ``L``, ``D``, ``way``, ``seconds`` (of the whole slice; the shortest of ``repeat``),
    ``gigabytes`` (alive at once, the slice itself included), ``gigaflops`` (the way's products with T times the
    floating-point operations of one, counted, / 1e9). A row and the model's own forward pass come last.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, bos_token_id=1))
    >>> [row["way"] for row in measure(model, torch.tensor([[1, 2, 3]]), "a toy")]
    ['forward mode', 'one output at a time', 'outputs in chunks', 'one row', 'one forward pass']
    """
    T = linearize(model, input_ids, to="last_hidden_state")
    L, D = T.input.shape[1:]
    slice_gb = T.output.shape[-1] * T.input.numel() * T.input.element_size() / 1e9

    def row(way: str, run: Callable, gigaflops: float, n: int = 1, products: int = 1) -> dict:
        gigabytes = peak_gigabytes(run, T.input.device) + slice_gb * (1 - n / products)
        shortest = min(seconds(run, T.input.device) for _ in range(repeat)) * products / n
        return {"model": name, "L": L, "D": D, "way": way, "seconds": shortest, "gigabytes": gigabytes,
                "gigaflops": gigaflops}  # fmt: skip

    def forward() -> Tensor:
        with torch.no_grad():
            return model.base_model(input_ids, use_cache=False).last_hidden_state

    def linearize_and_pull() -> Tensor:
        return linearize(model, input_ids, to="last_hidden_state").rmatvec(T.output)

    product, rows = _gigaflops(lambda: T.rmatvec(T.output)), []
    for way, (run, count, some) in WAYS.items():
        products, n = count(T), min(some, count(T))
        rows.append(row(way, lambda run=run, n=n: run(T, n), products * product, n, products))
    rows.append(row("one row", linearize_and_pull, _gigaflops(forward) + product))
    rows.append(row("one forward pass", forward, _gigaflops(forward)))
    return rows


def _gigaflops(run: Callable) -> float:
    # by torch's plain attention, since the fused kernel of a CPU goes uncounted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def seconds(run: Callable, device: torch.device) -> float:
    """How long ``run()`` takes, the device waited for."""
    start = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


class _Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that are made meanwhile and live at once: the same number on every machine."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is not None and storage._cdata not in given and storage._cdata not in self.alive:
                key, size = storage._cdata, storage.nbytes()
                self.alive[key] = weakref.ref(storage, lambda _, key=key, size=size: self._freed(key, size))
                self.now += size
                self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key: int, size: int) -> None:
        self.now -= size
        del self.alive[key]


def peak_gigabytes(run: Callable, device: torch.device) -> float:
    """The most memory, GB, that the tensors made by ``run()`` take at once; on a GPU, as its allocator counts it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - start) / 1e9
    with _Alive() as counted:
        run()
    return counted.peak / 1e9


def cpu_name() -> str:
    """The CPU's model as the system tells it, such as "Apple M2"; where it does not, the architecture.

    >>> len(cpu_name()) > 0
    True
    """
    try:
        if platform.system() == "Darwin":
            asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            name = subprocess.run(asked, capture_output=True, text=True).stdout
        else:
            name = re.search(r"(?m)^model name\s*:(.*)|\Z", Path("/proc/cpuinfo").read_text())[1] or ""
    except OSError:
        name = ""
    return name.strip() or platform.processor() or platform.machine()


def machine(device: torch.device | str = "cpu") -> dict:
    """What a measure was taken on: the GPU's or CPU's model, the CPU's cores, torch's version, and the float32
    matrix-product rate (operations per second / 1e9) measured there and then."""
    device = torch.device(device)
    A, B = torch.randn(2, 2048, 2048, generator=torch.Generator().manual_seed(0)).to(device)
    shortest = min(seconds(lambda: [A @ B for _ in range(5)], device) for _ in range(3))
    cuda = device.type == "cuda"
    return {"device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
            "kind": device.type, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "torch": torch.__version__.split("+")[0],
            "gigaflops_per_second": 5 * 2 * 2048**3 / shortest / 1e9}  # fmt: skip


def dense_gigabytes(L: int, D: int, bytes: int = 4) -> dict[str, float]:
    """GB of T (L, D', L, D), of one slice (D', L, D) and of one row (L, D), where D' = D.

    >>> dense_gigabytes(1024, 768)["T"]
    2473.9
    """
    sizes = {"T": L * D * L * D, "slice": D * L * D, "row": L * D}
    return {key: float(f"{size * bytes / 1e9:.5g}") for key, size in sizes.items()}
