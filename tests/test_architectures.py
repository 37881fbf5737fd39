"""What each causal language model of transformers does here: runs right, or is refused with a sentence.

The list data/architectures.json has an entry for each. `python tools/architectures.py --check` measures all of them
again; here a few of each kind are.
"""

import sys
from pathlib import Path

import pytest
import train_toy as toy
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
import architectures

SAMPLE = {
    "qwen2": "runs",
    "cohere": "its logits are scaled",
    "gemma3_text": "a window in some layers",
    "llama4_text": "chunks that live in the mask alone",
    "falcon": "keeps its own attention, and mixes documents",
    "mamba": "a state in each layer",
    "persimmon": "attention isn't told where documents begin",
    "camembert": "a head that is no formula of the hidden state",
}
WORDS = ("runs", "refused: ")


@pytest.fixture(scope="module")
def listed():
    return architectures.read_list()


def test_every_architecture_has_an_entry(listed):
    missing = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(listed))
    gone = sorted(set(listed) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    names = " ".join(missing)
    advice = "read what it prints, and mend what is WRONG or RAISES before the list is committed"
    assert not missing, f"new in transformers: run python tools/architectures.py {names}, {advice}"
    assert not gone, f"no longer in transformers, so take them from the list: {gone}"


def test_none_is_silently_wrong(listed):
    verdicts = 0
    for kind, entry in listed.items():
        if set(entry) == {"not built"}:
            continue
        assert set(entry) == set(architectures.WAYS), kind
        for way, cases in entry.items():
            assert set(cases) == set(architectures.CASES)
            for case, verdict in cases.items():
                assert verdict.startswith(WORDS), f"{kind}, {way}, {case}: {verdict}"
                verdicts += 1
    assert verdicts > 1000
    for kind in ("qwen2", "qwen3", "llama", "mistral", "mixtral", "phi", "cohere", "granite"):
        assert listed[kind]["one rank"] == dict.fromkeys(architectures.CASES, "runs"), kind


def test_some_of_each_kind_do_what_the_list_says(listed):
    toy.tell_server()
    found = architectures.measured(toy.context, list(SAMPLE))
    for kind, why in SAMPLE.items():
        assert architectures.entry(found[kind]) == listed[kind], f"{kind}: {why}"
