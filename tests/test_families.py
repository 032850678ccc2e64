"""Every family of bench/FAMILIES.md, as a tiny random model, under all three attention implementations."""

from functools import lru_cache

import pytest
import transformers

from uncausal.bench import families
from uncausal.bench.families import CAUSAL_BY_NATURE, FAMILIES, IMPLEMENTATIONS, probe_family, tiny_model
from uncausal.encoder.conversion import NotBidirectionalError, assert_bidirectional, make_bidirectional
from uncausal.encoder.model import CAUSAL_ELSEWHERE

# Attention implementations that the library does not offer for a family.
MISSING = {
    "gemma2": {"sdpa"},  # soft capping
    "gpt_oss": {"sdpa"},  # attention sinks
    "falcon": {"uncausal"},
    "bloom": {"sdpa", "uncausal"},
    "gptj": {"sdpa", "uncausal"},
}


@lru_cache
def probed(model_type: str) -> families.Family:
    return probe_family(model_type, **FAMILIES[model_type])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_family_is_bidirectional(model_type):
    family = probed(model_type)
    missing = MISSING.get(model_type, set())
    expected = {name: "not in the library" if name in missing else "yes" for name in IMPLEMENTATIONS}
    if model_type == "bloom":
        expected["eager"] = "ALiBi is right under a causal mask alone: bidirectional=False"
    assert family.verdicts == expected
    assert family.disagreement < 1e-5


def test_thirty_families_are_verified():
    assert sum(probed(model_type).verified for model_type in FAMILIES) >= 30


@pytest.mark.parametrize("model_type", CAUSAL_BY_NATURE)
def test_causal_by_nature_is_refused(model_type):
    overrides, part = CAUSAL_BY_NATURE[model_type]
    model = make_bidirectional(tiny_model(model_type, "eager", **overrides))
    with pytest.raises(NotBidirectionalError, match="stays causal") as caught:
        assert_bidirectional(model)
    assert caught.value.layer == part


def test_config_switch_is_not_enough_for_every_family():
    """StableLM and Nemotron read only their layers' own flag under sdpa without padding."""
    needing = {model_type for model_type in FAMILIES if not probed(model_type).by_config}
    assert needing == set(CAUSAL_ELSEWHERE)


def test_page_is_what_the_probes_show():
    text = families.PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}" not in text:
        pytest.skip("bench/FAMILIES.md is of another version of transformers")
    assert text.endswith(families.table(probed(model_type) for model_type in FAMILIES) + "\n")
