"""What the operations of a step program are made of: norms, formats, routers, what is kept."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """How a weight is quantised: ``bits`` a value, ``block`` values of a row to a scale.

    Without ``zero_points``, a value q stands for scale * (q - 2^(bits - 1)).
    """

    bits: int
    block: int
    scales: str
    zero_points: str | None = None


@dataclass(frozen=True)
class Norm:
    """An RMS norm with the weight ``offset + weight``; ``whole`` is whether over all heads."""

    weight: str
    eps: float
    offset: int = 0
    whole: bool | None = None


@dataclass(frozen=True)
class Slice:
    """Columns of a buffer, from ``offset`` on."""

    buffer: str
    offset: int = 0


@dataclass(frozen=True)
class SharedKeys:
    """``size`` columns of a buffer: they are added to the first ones of every head's key."""

    buffer: str
    offset: int
    size: int


@dataclass(frozen=True)
class Rotary:
    """Tables [positions, size / 2] by which the first ``size`` of each head are rotated."""

    cos: str
    sin: str
    size: int
    interleaved: bool


@dataclass(frozen=True)
class Groups:
    """Of ``count`` groups of experts the ``keep`` best, by the sum of their ``best`` scores."""

    count: int
    keep: int
    best: int


@dataclass(frozen=True)
class TokenMap:
    """What a token h multiplies sizes by: exp(clip(h @ matrix + bias)), clipped to ``limit``.

    ``matrix`` [hidden, experts] and ``bias`` [experts] are float32.
    """

    matrix: str
    bias: str
    limit: float


@dataclass(frozen=True)
class Keep:
    """Which of a token's candidates run, ranked by weight.

    ``top``: its first ``k``. ``pool``: the first of each token, and of all others of the call the
    (k - 1) * T with the largest weights. ``score``: the first, and those whose ``score`` reaches
    ``threshold``, which is the value of an input of the graph where there is a ``dial``; no more
    than floor(quota * T) of them besides the first ones.
    """

    kind: str
    k: int | None = None
    score: str | None = None
    sizes: str | None = None
    twice_overlap: float | None = None
    threshold: float | None = None
    dial: bool | None = None
    quota: float | None = None
    token_sizes: TokenMap | None = None


@dataclass(frozen=True)
class Router:
    """How a router gets its candidates' weights from its logits, all in float32.

    ``rounded_logits``: the logits are rounded to the activations' type before anything else.
    ``rounded``: so are the weights, before candidates are kept.
    """

    top_k: int
    score: str
    selection_bias: str | None = None
    groups: Groups | None = None
    renormalize: bool = False
    renormalize_eps: float = 0.0
    scale: float = 1.0
    rounded_logits: bool = True
    rounded: bool = True


@dataclass(frozen=True)
class ExpertFormats:
    """How the two weights of experts are quantised."""

    gate_up: Format | None
    down: Format | None


@dataclass(frozen=True)
class GateUp:
    """Two weights [I, H] where they are not one."""

    gate: str
    up: str


@dataclass(frozen=True)
class GateUpFormats:
    """How those two are quantised."""

    gate: Format | None
    up: Format | None


@dataclass(frozen=True)
class SharedFormats:
    """How the weights of a shared expert are quantised."""

    gate_up: Format | GateUpFormats | None
    down: Format | None


@dataclass(frozen=True)
class Shared:
    """An expert of every token, times the sigmoid of x @ gate^T [1, H] if it has such a gate.

    ``gate_up`` is one weight [2I, H], first all rows of the gate, or two.
    """

    gate_up: str | GateUp
    down: str
    intermediate: int
    gate: str | None = None
    format: SharedFormats | None = None
