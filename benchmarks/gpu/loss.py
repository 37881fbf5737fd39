"""The chunked loss on one GPU: memory that does not grow with the logits, beside torch's full logits.

    python benchmarks/gpu/loss.py --json loss.json

Qwen2-7B's head: 3,584 numbers of a hidden state, 152,064 words, bfloat16; forward and backward. Extra memory is the
peak above inputs and gradients. In the file:

extra_gb_L                   extra memory of ours at L tokens, in GB full_logits_extra_gb         of F.cross_entropy
on all logits at the shortest length speed_vs_full                time of F.cross_entropy on all logits over ours,
at the shortest length loss_difference              of ours against float64 on a sample of tokens, relative
gradient_difference          of the hidden states, likewise
"""

import torch
import torch.nn.functional as F
from common import options, peak_bytes, report, seconds

from longva.context.loss import linear_cross_entropy, loss_kernel


def main():
    given = options(__doc__, lengths=[8192, 65536, 262144, 1048576], width=3584, words=152064, chunk=1024)
    device, dtype, D, V = (
        given.device,
        torch.bfloat16 if given.device.startswith("cuda") else torch.float32,
        given.width,
        given.words,
    )
    weight = (torch.randn(V, D, device=device, dtype=torch.float32) * D**-0.5).to(dtype).requires_grad_()

    def make(L):
        hidden = torch.randn(L, D, device=device, dtype=dtype).requires_grad_()
        return hidden, torch.randint(V, (L,), device=device)

    def ours(h, y):
        h.grad = weight.grad = None
        linear_cross_entropy(h, weight, y, chunk=given.chunk).backward()

    def full(h, y):
        h.grad = weight.grad = None
        F.cross_entropy((h @ weight.T).float(), y).backward()

    h, y = make(512)
    exact = h.detach().double().requires_grad_()
    right = F.cross_entropy(exact @ weight.detach().double().T, y)
    right.backward()
    loss = linear_cross_entropy(h, weight, y, chunk=given.chunk)
    loss.backward()
    figures = {
        "loss_difference": float(abs(loss.detach() - right.detach()) / right.detach()),
        "gradient_difference": float((h.grad.double() - exact.grad).norm() / exact.grad.norm()),
    }
    rows = []
    for L in given.lengths:
        h, y = make(L)
        h.grad = weight.grad = None
        extra = (
            peak_bytes(lambda: ours(h, y), device)[1]
            - h.numel() * h.element_size()
            - weight.numel() * weight.element_size()
        )
        took = seconds(lambda: ours(h, y), device, turns=3, warm=1)
        figures[f"extra_gb_{L}"] = extra / 1e9
        rows.append(
            (
                f"ours, {loss_kernel(h, weight, True, given.chunk)[0]}",
                L,
                f"{extra / 1e9:.2f}",
                f"{took:.3f}",
                f"{6 * L * D * V / took / 1e12:.0f}",
            )
        )
        if L == given.lengths[0]:
            h.grad = weight.grad = None
            more = (
                peak_bytes(lambda: full(h, y), device)[1]
                - h.numel() * h.element_size()
                - weight.numel() * weight.element_size()
            )
            slow = seconds(lambda: full(h, y), device, turns=3, warm=1)
            figures |= {"full_logits_extra_gb": more / 1e9, "speed_vs_full": slow / took}
            rows.append(("all logits", L, f"{more / 1e9:.2f}", f"{slow:.3f}", f"{6 * L * D * V / slow / 1e12:.0f}"))
    report(
        f"loss of {V} words, width {D}, chunks of {given.chunk}",
        ("", "tokens", "extra GB", "seconds", "TFLOPS"),
        rows,
        figures,
        given,
    )


if __name__ == "__main__":
    main()
