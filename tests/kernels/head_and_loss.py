"""What tests of the head and its loss share: inputs, the same loss from whole logits, ranks that are threads."""

import threading

import torch
from torch.nn import functional as F

from neox_hf.kernels import cross_entropy, linear_cross_entropy

TOKENS, HIDDEN, VOCABULARY = 37, 16, 29


def inputs(dtype=torch.float32, tokens=TOKENS, vocabulary=VOCABULARY, spread=4.0):
    torch.manual_seed(0)
    labels = torch.randint(0, vocabulary, (tokens,))
    labels[3:7] = -100
    return torch.randn(tokens, HIDDEN).to(dtype), (torch.randn(vocabulary, HIDDEN) * spread / 4).to(dtype), labels


def on_whole_logits(hidden, weight, labels):
    """The same sum by the loss op, whose mean is over the labels."""
    return cross_entropy((hidden @ weight.t())[None], None, shift_labels=labels[None], num_items_in_batch=1)


def with_gradients(function, hidden, weight, labels, upstream=1.0, promise=None, **options):
    """Loss and the two gradients. promise: what the op is told of `upstream` beforehand."""
    if promise is not None:
        options["upstream"] = promise
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = function(hidden, weight, labels, **options)
    (loss * upstream).backward()
    return loss.detach(), hidden.grad, weight.grad


def assert_all_close(found, wanted, tolerance):
    for name, a, b in zip(("loss", "gradient of hidden", "gradient of weight"), found, wanted, strict=True):
        worst = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)
        assert worst <= tolerance, f"{name}: {worst:.2e} of the largest element, over {tolerance:.0e}"


class SimulatedRanks:
    """Threads of one process as the ranks of a tensor group. One runs at a time: Triton's interpreter needs that."""

    def __init__(self, size):
        self.size, self.barrier, self.slots = size, threading.Barrier(size, timeout=60), [None] * size
        self.calls = [[] for _ in range(size)]
        self.turn = threading.Lock()

    def reducer(self, rank, name, combine):
        def reduce(tensor):
            self.calls[rank].append((name, tuple(tensor.shape)))
            self.slots[rank] = tensor.clone()
            self.meet()
            whole = combine(torch.stack(self.slots))
            self.meet()
            tensor.copy_(whole)

        return reduce

    def meet(self):
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()

    def run(self, function):
        results = [None] * self.size

        def work(rank):
            with self.turn:
                results[rank] = function(
                    rank,
                    self.reducer(rank, "max", lambda x: x.amax(0)),
                    self.reducer(rank, "sum", lambda x: x.sum(0)),
                )

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert None not in results, "a rank failed"
        return results


def over_ranks(ranks, hidden, weight, labels, share_rows, **options):
    """What each rank gets of a head padded to `share_rows` rows a rank. Padding holds large numbers, to be noticed."""
    padded = F.pad(weight, (0, 0, 0, ranks.size * share_rows - len(weight)), value=50.0)

    def one(rank, all_max, all_sum):
        first = rank * share_rows
        return with_gradients(
            linear_cross_entropy,
            hidden,
            padded[first : first + share_rows],
            labels,
            first_row=first,
            rows=max(0, min(share_rows, len(weight) - first)),
            all_max=all_max,
            all_sum=all_sum,
            **options,
        )

    return ranks.run(one)
