"""Length distributions of packed batches: the shapes that real texts take, and the extremes."""

import torch


def lognormal(sequences: int, tokens: int, low: int, high: int) -> list[int]:
    """Quantiles of a log-normal distribution (sigma 0.8), clipped, shuffled, `tokens` in total."""
    points = (torch.arange(sequences, dtype=torch.float64) + 0.5) / sequences
    shape = torch.exp(0.8 * torch.special.ndtri(points))

    def scaled(scale: float) -> torch.Tensor:
        return (shape * scale).round().clamp(low, high).long()

    small, large = 1.0, float(high) * 8
    for _ in range(60):
        middle = (small + large) / 2
        small, large = (middle, large) if int(scaled(middle).sum()) <= tokens else (small, middle)
    lengths = scaled(small)
    missing = tokens - int(lengths.sum())
    free = (lengths < high).nonzero().flatten().flip(0)
    lengths[free[: max(missing, 0)]] += 1
    return lengths[torch.randperm(sequences, generator=torch.Generator().manual_seed(0))].tolist()


def constant(length: int, tokens: int) -> list[int]:
    return [length] * max(tokens // length, 1)


def uniform(low: int, high: int, tokens: int) -> list[int]:
    """Lengths from low to high in equal steps, shuffled."""
    count = max(2 * tokens // (low + high), 1)
    return _shuffled(torch.linspace(low, high, count).round().long())


def bimodal(short: int, long: int, tokens: int) -> list[int]:
    """Half of the tokens in short sequences, half in long ones, as queries beside documents."""
    return _shuffled(torch.tensor(constant(short, tokens // 2) + constant(long, tokens // 2)))


def _shuffled(lengths: torch.Tensor) -> list[int]:
    return lengths[torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))].tolist()


def batches(tokens: int, longest: int) -> dict[str, list[int]]:
    """Name the distributions at a number of tokens; their longest sequence is about `longest`."""
    return {
        "long-tailed": lognormal(max(tokens // 96, 2 * tokens // longest), tokens, min(16, longest), longest),
        "constant": constant(longest // 2, tokens),
        "uniform": uniform(min(8, longest), longest, tokens),
        "bimodal": bimodal(min(16, longest), longest, tokens),
        "short": uniform(min(12, longest), min(39, longest), tokens),
    }
