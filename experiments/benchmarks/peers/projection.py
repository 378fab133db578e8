"""The vocabulary projection of other systems, timed: a line of JSON for `experiments.benchmarks.token_logprob --vs=`.

Run by it in the interpreter that has torch: ``python -m experiments.benchmarks.peers.projection trl --tokens=4096
--width=256 --vocab=32768 --repeats=5 --dtype=float32``. On a GPU, if torch sees one, else on the CPU.
"""

import argparse
import importlib.metadata
import json
import threading
import time
from collections.abc import Callable

from experiments.benchmarks.record import resident_mib

LIBRARIES = {"torch": "torch", "trl": "trl", "liger": "liger_kernel"}


def arrays(tokens: int, width: int, vocab: int, dtype: str, device: str) -> tuple:
    """hidden [N, D], weight [V, D] with gradients, targets [N], cotangents [2, N]; logits of standard deviation 1."""
    import torch

    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=device).to(getattr(torch, dtype)).requires_grad_()
    weight = (torch.randn(vocab, width, device=device) / width**0.5).to(getattr(torch, dtype)).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), device=device)
    return hidden, weight, targets, torch.randn(2, tokens, device=device)


def full(hidden, weight, targets, g):
    """torch's own operations on all logits: log-probs and entropies."""
    import torch

    logp = torch.log_softmax((hidden @ weight.T).float(), -1)
    entropy = -(logp.exp() * logp).sum(-1)
    chosen = logp.gather(-1, targets[:, None])[:, 0]
    torch.autograd.backward((chosen, entropy), (g[0], g[1]))


def trl(hidden, weight, targets, g):
    """TRL's chunked log-probs and entropies, with the chunk of its trainers."""
    import torch
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    out = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, CHUNK, None, 1.0, ("entropy",))
    torch.autograd.backward(out[:2], (g[0], g[1]))


def liger(hidden, weight, targets, g, rows: int = 16):
    """Liger's GRPO loss on chunks of a row, which makes its gradients in the same pass and gives no entropy."""
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=hidden.is_cuda)
    ids = targets.reshape(rows, -1)
    mask = torch.ones(ids.shape, device=ids.device)
    value, _ = loss(hidden.reshape(rows, -1, hidden.shape[1]), weight, ids, mask, g[0, :rows])
    value.backward()


FORMS = {"torch": full, "trl": trl, "liger": liger}


class PeakOfCpu:
    """Most resident MiB while it is open, beyond what was there before."""

    def __enter__(self) -> "PeakOfCpu":
        self.before = self.peak = resident_mib()
        self.done = threading.Event()
        self.sampler = threading.Thread(target=self._sample, daemon=True)
        self.sampler.start()
        return self

    def _sample(self) -> None:
        while not self.done.wait(0.001):
            self.peak = max(self.peak, resident_mib())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.sampler.join()

    @property
    def mib(self) -> float:
        return self.peak - self.before


def measure(run: Callable[[], None], leaves: tuple, repeats: int, cuda: bool) -> dict[str, float]:
    """Least wall and CPU-seconds of a call, and MiB beyond inputs and gradients."""
    import torch

    def once() -> tuple[float, float]:
        for leaf in leaves:
            leaf.grad = None
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - wall, time.process_time() - cpu

    own = sum(x.numel() * x.element_size() for x in leaves) / 2**20  # the gradients
    if cuda:
        once()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once()
        mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    else:
        with PeakOfCpu() as peak:  # the first call: later ones find its memory with the allocator
            once()
        mib = peak.mib - own
    times = [once() for _ in range(repeats)]
    return {"wall_s": min(t[0] for t in times), "cpu_s": min(t[1] for t in times), "temp_mib": max(mib, 0.0)}


def main() -> None:
    """Times one form and prints its record."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("form", choices=FORMS)
    for name in ("tokens", "width", "vocab", "repeats"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    given = parser.parse_args()
    import torch

    cuda = torch.cuda.is_available()
    args = arrays(given.tokens, given.width, given.vocab, given.dtype, "cuda" if cuda else "cpu")
    record = measure(lambda: FORMS[given.form](*args), args[:2], given.repeats, cuda)
    names = {"torch", LIBRARIES[given.form]}
    versions = {name: importlib.metadata.version(name.replace("_", "-")) for name in sorted(names)}
    print(json.dumps({**record, "device": torch.cuda.get_device_name() if cuda else "cpu", "versions": versions}))


if __name__ == "__main__":
    main()
