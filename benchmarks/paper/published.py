"""The paper's figures that stand beside ours (Li & Liang 2021, arXiv 2101.00190), as its tables print them.

Scales are the paper's: BLEU, METEOR and ROUGE are 0 to 100 there, ours 0 to 1 but for WebNLG's BLEU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Figures = Sequence[tuple[str, Mapping[str, float]]]


def _e2e(bleu: float, nist: float, meteor: float, rouge: float, cider: float) -> Mapping[str, float]:
    return {"BLEU": bleu, "NIST": nist, "METEOR": meteor, "ROUGE_L": rouge, "CIDEr": cider}


E2E: Figures = (
    ("GPT-2 medium, prefix (0.1%)", _e2e(69.7, 8.81, 46.1, 71.4, 2.49)),
    ("GPT-2 medium, fine-tuning", _e2e(68.2, 8.62, 46.2, 71.0, 2.47)),
    ("GPT-2 medium, top two layers", _e2e(68.1, 8.59, 46.0, 70.8, 2.41)),
    ("GPT-2 medium, adapters (3%)", _e2e(68.9, 8.71, 46.1, 71.3, 2.47)),
    ("GPT-2 medium, adapters (0.1%)", _e2e(66.3, 8.41, 45.0, 69.8, 2.40)),
)
"""Table 1, all 42,000 rows."""

LOW_DATA: Figures = (("GPT-2 medium, prefix minus fine-tuning, mean of 50, 100, 200 and 500 rows", {"BLEU": 2.9}),)
"""Section 6.3; the curves themselves are in figure 3, without numbers."""

WEBNLG: Figures = (
    ("GPT-2 medium, prefix (0.1%)", {"BLEU seen": 62.9, "BLEU unseen": 45.6, "BLEU all": 55.1}),
    ("GPT-2 medium, fine-tuning", {"BLEU seen": 64.2, "BLEU unseen": 27.7, "BLEU all": 46.5}),
    ("GPT-2 medium, top two layers", {"BLEU seen": 53.6, "BLEU unseen": 18.9, "BLEU all": 36.0}),
    ("GPT-2 medium, adapters (3%)", {"BLEU seen": 60.4, "BLEU unseen": 48.3, "BLEU all": 54.9}),
    ("GPT-2 medium, adapters (0.1%)", {"BLEU seen": 54.5, "BLEU unseen": 45.1, "BLEU all": 50.2}),
)
"""Table 1, all 18,000 rows of nine or ten seen categories."""

ABLATIONS: Figures = (
    ("prefix", _e2e(69.7, 8.81, 46.1, 71.4, 2.49)),
    ("embedding-only, 1", _e2e(48.1, 3.33, 32.1, 60.2, 1.10)),
    ("embedding-only, 10", _e2e(62.2, 6.70, 38.6, 66.4, 1.75)),
    ("embedding-only, 20", _e2e(61.9, 7.11, 39.3, 65.6, 1.85)),
    ("infix, 1", _e2e(67.9, 8.63, 45.8, 69.4, 2.42)),
    ("infix, 10", _e2e(67.2, 8.48, 45.8, 69.9, 2.40)),
    ("infix, 20", _e2e(66.7, 8.47, 45.8, 70.0, 2.42)),
)
"""Table 4, E2E on GPT-2 medium. Length and initialization are figures 4, 5 and 7, without numbers."""

XSUM: Figures = (
    ("BART large, fine-tuning", {"ROUGE-1": 45.14, "ROUGE-2": 22.27, "ROUGE-L": 37.25}),
    ("BART large, prefix (2%)", {"ROUGE-1": 43.80, "ROUGE-2": 20.93, "ROUGE-L": 36.05}),
    ("BART large, prefix (0.1%)", {"ROUGE-1": 42.92, "ROUGE-2": 20.03, "ROUGE-L": 35.05}),
)
"""Table 2, all 204,000 rows of XSUM."""
