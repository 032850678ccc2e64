"""Near-duplicates by MinHash with banding (Broder 1997; Leskovec, Rajaraman and Ullman 2014, chapter 3)."""

import re
import zlib

import numpy as np

_TOKEN = re.compile(rb"\w+|[^\w\s]")


class NearDuplicates:
    """Says of each text whether one much like it came before.

    Two texts are alike if the estimated Jaccard similarity of their sets of `shingle` consecutive tokens is
    at least `threshold`. The estimate comes from 64 hashes, so at 0.8 its standard deviation is 0.05. A text
    that is no duplicate is remembered: 256 bytes, and an entry in each of 16 tables.
    """

    def __init__(self, threshold: float = 0.8, shingle: int = 5) -> None:
        self.threshold = threshold
        self.shingle = shingle
        random = np.random.default_rng(0)
        self._multipliers = random.integers(1, 2**63, (64, 1), dtype=np.uint64) * 2 + 1
        self._offsets = random.integers(0, 2**63, (64, 1), dtype=np.uint64)
        self._powers = np.array([pow(0x9E3779B97F4A7C15, k, 2**64) for k in range(shingle)], dtype=np.uint64)
        self._signatures: list[np.ndarray] = []
        self._tables: list[dict[bytes, list[int]]] = [{} for _ in range(16)]

    def seen(self, text: str) -> bool:
        """Whether an earlier text is much like this one; if none is, remember this one."""
        signature = self._signature(text)
        bands = [signature[start : start + 4].tobytes() for start in range(0, 64, 4)]
        candidates = {i for table, band in zip(self._tables, bands, strict=True) for i in table.get(band, ())}
        if any(np.mean(self._signatures[i] == signature) >= self.threshold for i in candidates):
            return True
        for table, band in zip(self._tables, bands, strict=True):
            table.setdefault(band, []).append(len(self._signatures))
        self._signatures.append(signature)
        return False

    def _signature(self, text: str) -> np.ndarray:
        """Return 64 minima, uint32, of multiply-shift hashes of the text's shingles."""
        tokens = [zlib.crc32(token) for token in _TOKEN.findall(text.encode(errors="replace"))] or [0]
        hashes = np.array(tokens, dtype=np.uint64)
        width = min(self.shingle, len(tokens))
        shingles = np.lib.stride_tricks.sliding_window_view(hashes, width) @ self._powers[:width]
        return ((shingles * self._multipliers + self._offsets) >> np.uint64(32)).min(1).astype(np.uint32)
