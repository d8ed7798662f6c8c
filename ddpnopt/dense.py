"""What vanilla DDP's dense matrices take; importable without torch, for a planner that has to know.

Memory grows by p² + p·B·n + (B·n)² for a layer of p controls and n states (Table 4), the controls within what
the batch spans: o·min(ī, B).
"""

from __future__ import annotations

from collections.abc import Sequence


def controls_in_span(outputs: int, inputs: int, batch: int) -> int:
    """Return p, the controls of a layer within the span of its batch: o·min(ī, B)."""
    return outputs * min(inputs, batch)


def basis_numbers(inputs: int, batch: int) -> int:
    """Return the numbers of the span's basis, ī·B; 0 where the span may be everything, and has none."""
    return inputs * batch if inputs > batch else 0


def required_bytes(shapes: Sequence[tuple[int, ...]], batch: int, item: int) -> int:
    """Estimate what the matrices of one run take at their most.

    Args:
        shapes: (o, ī) of t = 0..T-1.
        batch: B.
        item: bytes of a number.
    """
    gains = [
        controls_in_span(o, i, batch) * (1 + (batch * i if t > 0 else 0)) + basis_numbers(i, batch)
        for t, (o, i) in enumerate(shapes)
    ]
    return (sum(gains) + max(working_numbers(shapes, batch))) * item


def working_numbers(shapes: Sequence[tuple[int, ...]], batch: int) -> list[int]:
    """Estimate the numbers of one run's matrices in each layer's turn: Q_uu, Q_uX, V_XX and their like.

    Args:
        shapes: (o, ī) of t = 0..T-1.
        batch: B.
    """
    found = []
    for t, (outputs, inputs) in enumerate(shapes):
        p = controls_in_span(outputs, inputs, batch)
        before, after = batch * inputs if t > 0 else 0, batch * outputs
        found.append(3 * p * p + 2 * p * after + 4 * p * before + 5 * after * after + 3 * before * before)
    return found


def too_large(shapes: Sequence[tuple[int, ...]], batch: int, need: int, limit: int) -> str:
    """Say what would have to change for one run's matrices to fit.

    Args:
        shapes: (o, ī) of t = 0..T-1.
        batch: B.
        need: bytes that they take.
        limit: bytes that they may take.
    """
    sizes = [controls_in_span(outputs, inputs, batch) for outputs, inputs in shapes]
    t = max(range(len(sizes)), key=sizes.__getitem__)
    spanned = " within the span of its inputs" if basis_numbers(shapes[t][1], batch) else ""
    return (
        f"at least {need}: one run's dense matrices take {need / 2**30:.3g} GiB, over the limit of "
        f"{limit / 2**30:.3g} GiB, for layer {t}'s {sizes[t]} controls{spanned} and batches of {batch}; "
        "make the layers narrower or the batch smaller, or raise the limit"
    )
