"""What `gad_memory.py` should find, from the shapes alone: parameters, bytes, and the peak of each phase.

Weights, gradients and optimizer state are counted exactly. Activations are those that PyTorch keeps for the backward
pass of transformers' Qwen2 (attention fused, nothing recomputed), per position and layer, in elements:

| kept | weights train | adapters train |
|---|---|---|
| both norms: input, normalised input (for the weight's gradient), output | 6H | 4H |
| attention: q and output; k and v, not repeated to all heads | 2H + 2K | 2H + 2K |
| MLP: gate, its SiLU, up, their product | 4I | 4I |
| adapters' inner states | – | 7r |

The last norm keeps 2H where weights train. On top, a backward pass takes 4I in its first MLP and, before that, what the
output head needs: logits, a tile, the gradient of its weight. Gradients come as activations go, so the peak is at one
of its ends: all activations, or all gradients (and, for tied embeddings, the second contribution to theirs). A forward
pass without gradients takes 4I + 5H, and 2I more where adapters add to what the frozen map gives.

The first version of this file, written before anything was measured, took k and v as repeated to all heads, 3I in a
backward pass with the logits still there, and kept logits in scoring too. It was 1 to 5 % too high for the peaks of
updates and 2 to 9 % for that of scoring; what is held was exact.

Legend: ``N`` positions of a micro-batch, ``V`` vocabulary, ``H`` hidden size, ``K`` width of keys, ``I`` MLP width,
``r`` rank.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from gad_memory_sides import HEAD_BUDGET_MB, RANK, Mode, Precision, Size, dtype_of

from lightning_onpolicy.kernels.tiles import CPU_ELEMENTS

FLOOR = (
    34  # bytes per parameter: two players under mixed-precision Adam (16 each) and a bfloat16 reference (2)
)
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Held:
    """What is held beside activations.

    Args:
        parameters: Elements of all models, shared ones once.
        trained: Elements that train.
        weights: Bytes of all models.
        gradients: Bytes of gradients at an optimizer's step.
        state: Bytes of both optimizers' moments.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    state: int

    @property
    def total(self) -> int:
        """Bytes."""
        return self.weights + self.gradients + self.state


def key_width(size: Size) -> int:
    """Of a position's keys, and of its values."""
    return size.hidden // size.heads[0] * size.heads[1]


def linears(size: Size) -> list[tuple[int, int]]:
    """Inputs and outputs of a layer's seven linear maps."""
    H, K, I = size.hidden, key_width(size), size.inner  # noqa: E741
    return [(H, H), (H, K), (H, K), (H, H), (H, I), (H, I), (I, H)]


def model_parameters(size: Size) -> int:
    """Of a causal LM with tied embeddings, which has as many as its body."""
    H, K = size.hidden, key_width(size)
    layer = sum(i * o for i, o in linears(size)) + (H + 2 * K) + 2 * H  # biases of q, k, v; two norms
    return size.vocab * H + size.layers * layer + H


def adapter_parameters(size: Size) -> int:
    """Of one set of adapters on all linear maps."""
    return size.layers * RANK * sum(i + o for i, o in linears(size))


def trained_width(precision: Precision) -> int:
    """Bytes of an element that trains: float32, also of adapters over bfloat16, unless everything is cast."""
    return 2 if precision == "bf16-true" else 4


def held(size: Size, mode: Mode, precision: Precision) -> Held:
    """Parameters and bytes; the two players' gradients are never there together."""
    P, A, head = model_parameters(size), adapter_parameters(size), size.hidden + 1
    width = trained_width(precision)
    player = A if mode.adapters else P
    frozen = mode.bases * P * BYTES[dtype_of(mode, precision)]
    # Policy, reference and discriminator hold a set each; the scalar head is float32 whatever the precision.
    return Held(
        parameters=mode.bases * P + 3 * player + head,
        trained=2 * player + head,
        weights=frozen + 3 * player * width + 4 * head,
        gradients=player * width + 4 * head,
        state=2 * (2 * player * width + 4 * head),
    )


def activations(size: Size, mode: Mode, precision: Precision, rows: int) -> tuple[int, int]:
    """Bytes kept for the backward pass of so many rows in one piece, and what that takes on top in its first MLP."""
    N, H, K, I = rows * size.length, size.hidden, key_width(size), size.inner  # noqa: E741
    layer = 2 * H + 2 * K + 4 * I + (4 * H + 7 * RANK if mode.adapters else 6 * H)
    kept = size.layers * layer + (0 if mode.adapters else 2 * H)
    width = 4 if precision == "32-true" else 2
    return width * N * kept, width * N * 4 * I


def forward_pass(size: Size, mode: Mode, precision: Precision, rows: int) -> int:
    """Bytes of a forward pass of so many rows without gradients."""
    elements = (6 if mode.adapters else 4) * size.inner + 5 * size.hidden
    return (4 if precision == "32-true" else 2) * rows * size.length * elements


def peaks(size: Size, mode: Mode, precision: Precision) -> dict[str, int]:
    """Bytes at the peak of each phase, once both optimizers have their state."""
    has = held(size, mode, precision)
    width = trained_width(precision)
    table = 0 if mode.adapters else size.vocab * size.hidden * width  # a gradient of the embeddings
    P = model_parameters(size)
    player = (adapter_parameters(size) if mode.adapters else P) * width
    still = has.weights + has.state
    casts = 2 * P if precision == "bf16-mixed" and not mode.adapters else 0  # autocast's copies of weights
    beside = size.group + 1
    own = _rows(size, size.prompts * size.group, 1)
    judged = _rows(size, size.prompts * beside, beside)
    tokens = own * size.response
    logits = min(HEAD_BUDGET_MB * 2**20, 4 * tokens * size.vocab) + 4 * CPU_ELEMENTS
    kept, work = activations(size, mode, precision, own)
    policy = max(kept + max(work, logits) + casts + table, player + table)
    kept, work = activations(size, mode, precision, judged)
    discriminator = max(kept + work + casts, player)
    lent = (
        adapter_parameters(size) * width if mode.adapters else 0
    )  # the policy's own, while the reference's are in
    scoring = max(
        forward_pass(size, mode, precision, judged), lent + forward_pass(size, mode, precision, own)
    )
    return {
        "prepare": still + casts + scoring,
        "discriminator": still + discriminator,
        "update": still + policy,
    }


def _rows(size: Size, rows: int, together: int) -> int:
    """Rows of the largest micro-batch, groups of ``together`` not parted."""
    fit = max(1, size.positions // (size.length * together)) * together
    return min(rows, fit)


def prediction(size: Size, mode: Mode, precision: Precision) -> dict[str, float]:
    """As in the results: what is held, ``peak`` and its phases, bytes per parameter of the policy."""
    has, phases = held(size, mode, precision), peaks(size, mode, precision)
    peak = max(phases.values())
    return {
        **asdict(has),
        **{f"peak_{name}": value for name, value in phases.items()},
        "peak": peak,
        "held_per_parameter": has.total / model_parameters(size),
        "peak_per_parameter": peak / model_parameters(size),
    }
