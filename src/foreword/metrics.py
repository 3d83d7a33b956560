"""The metrics, each as the field's own script computes it, as functions of texts and of draws of outputs.

    suite        figures                              as computed by
    e2e          BLEU, NIST, METEOR, ROUGE_L, CIDEr   the E2E challenge's `measure_scores.py -p`
    webnlg       BLEU, METEOR, TER                    the WebNLG challenge 2017's scripts
    rouge        ROUGE-1, ROUGE-2, ROUGE-L            rouge-score: stemmed, F1
    chrf         chrF                                 sacrebleu
    bertscore    BERTScore                            bert-score: F1 of roberta-large

A figure has its script's scale: BLEU is 0 to 1 in `e2e` and 0 to 100 in `webnlg`, chrF 0 to 100, NIST without
a bound, CIDEr 0 to 10, the others 0 to 1. Of TER less is better. Packages come with the extra `eval`, but for
bert-score; METEOR, ROUGE_L and CIDEr need Java.

The WebNLG challenge takes the first three references, turns texts into lower-case ASCII and sets spaces
around every character that is no word character. Then BLEU is `multi-bleu.perl -lc`, METEOR is 1.5 with
`-l en -norm -r 3`, and TER is tercom 0.7.25: here sacrebleu without tokenization and smoothing, the same
METEOR, and sacrebleu's TER.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np

from foreword import coco, mteval
from foreword.coco import UnavailableError, require
from foreword.errors import DataError, SettingsError
from foreword.version import __version__

__all__ = ["SUITES", "Measure", "Texts", "chosen"]

BERT = "roberta-large"
"""bert-score's model for English."""


class Texts:
    """Outputs and their references, checked, and in the words of each suite.

    Args:
        references: for each output its references, at least one; their numbers may differ.
        hypotheses: the outputs.

    Raises:
        DataError: no outputs, another number of references than of outputs, or a blank reference.
    """

    def __init__(self, references: Sequence[Sequence[str]], hypotheses: Sequence[str]):
        if len(references) != len(hypotheses):
            raise DataError(
                f"there are references for {len(references)} outputs, but {len(hypotheses)} outputs: "
                "expected as many of one as of the other, in the same order"
            )
        if len(hypotheses) == 0:
            raise DataError("there are no outputs: expected one or more, each with its references")
        for number, group in enumerate(references, start=1):
            if isinstance(group, str):
                raise DataError(f"the references of output {number} are one text: expected a list of texts")
            if len(group) == 0 or not all(isinstance(text, str) and text.strip() for text in group):
                raise DataError(f"output {number} has no reference, or a blank one: expected one or more texts")
        for number, text in enumerate(hypotheses, start=1):
            if not isinstance(text, str):
                raise DataError(
                    f"output {number} is no text: expected one, which may be empty; got {type(text).__name__}"
                )
        self.references = [[_one_line(reference) for reference in group] for group in references]
        self.hypotheses = [_one_line(text) for text in hypotheses]

    @cached_property
    def mteval(self) -> tuple[list[list[list[str]]], list[list[str]]]:
        tokenize = require("sacrebleu.tokenizers.tokenizer_13a", "sacrebleu").Tokenizer13a()

        def words(text: str) -> list[str]:
            # As the script: lower case comes after the tokenization, and a blank text is one empty word.
            return [word.lower() for word in tokenize(text).split(" ")]

        return [[words(text) for text in group] for group in self.references], [*map(words, self.hypotheses)]

    @cached_property
    def coco(self) -> tuple[list[list[str]], list[str]]:
        flat = iter(coco.tokenize([text for group in self.references for text in group]))
        return [[next(flat) for _ in group] for group in self.references], coco.tokenize(self.hypotheses)

    @cached_property
    def webnlg(self) -> tuple[list[list[str]], list[str]]:
        to_ascii: Callable[[str], str] = require("unidecode", "Unidecode").unidecode

        def spaced(text: str) -> str:
            return " ".join(" ".join(re.split(r"(\W)", text)).split())

        # As the scripts: the order of steps differs, and "½" is "1/2" in a reference, "1 / 2" in an output.
        references = [[to_ascii(spaced(text).lower()) for text in group[:3]] for group in self.references]
        return references, [spaced(to_ascii(text).lower()) for text in self.hypotheses]

    @cached_property
    def webnlg_padded(self) -> tuple[list[list[str]], list[str]]:
        """With the empty references that BLEU and METEOR meet where an output has fewer than others."""
        references, hypotheses = self.webnlg
        most = max(map(len, references))
        return [group + [""] * (most - len(group)) for group in references], hypotheses


Measure = Callable[[Texts, np.ndarray], tuple[np.ndarray, str]]
"""A metric: from N outputs and counts [R, N], how often each is in R sets of outputs, to R figures and a
signature.

Every figure is a function of statistics added over a set's outputs, so R sets cost one matrix product. What a
metric learns from all references (NIST's and CIDEr's weights) it learns once.
"""


def _bleu(texts: Texts, counts: np.ndarray) -> tuple[np.ndarray, str]:
    return mteval.bleu(*texts.mteval, counts), f"mteval-v13a|case:lc|tok:13a|order:4|smooth:none|{_own()}"


def _nist(texts: Texts, counts: np.ndarray) -> tuple[np.ndarray, str]:
    return mteval.nist(*texts.mteval, counts), f"mteval-v13a|case:lc|tok:13a|order:5|length:average|{_own()}"


def _meteor(texts: Texts, counts: np.ndarray) -> tuple[np.ndarray, str]:
    return coco.meteor(*texts.coco, counts), f"meteor-1.5|-l en -norm|{_ptb()}"


def _rouge_l(texts: Texts, counts: np.ndarray) -> tuple[np.ndarray, str]:
    return _means(coco.rouge_l(*texts.coco), counts), f"coco-rouge-l|beta:1.2|{_ptb()}"


def _cider(texts: Texts, counts: np.ndarray) -> tuple[np.ndarray, str]:
    return _means(coco.cider(*texts.coco), counts), f"cider-d|order:4|sigma:6|df:references|{_ptb()}"


def _webnlg_bleu(texts: Texts, counts: np.ndarray) -> tuple[np.ndarray, str]:
    library = require("sacrebleu", "sacrebleu")
    metric = library.BLEU(lowercase=True, tokenize="none", smooth_method="none", force=True)
    values, signature = _sacrebleu(metric, *texts.webnlg_padded, counts)
    return values, f"{signature}|{_webnlg()}"


def _webnlg_meteor(texts: Texts, counts: np.ndarray) -> tuple[np.ndarray, str]:
    values = coco.meteor(*texts.webnlg_padded, counts)
    return values, f"meteor-1.5|-l en -norm|pycocoevalcap:{version('pycocoevalcap')}|{_webnlg()}"


def _webnlg_ter(texts: Texts, counts: np.ndarray) -> tuple[np.ndarray, str]:
    values, signature = _sacrebleu(require("sacrebleu", "sacrebleu").TER(), *texts.webnlg, counts)
    return values / 100, f"{signature}|{_webnlg()}"


def _chrf(texts: Texts, counts: np.ndarray) -> tuple[np.ndarray, str]:
    return _sacrebleu(require("sacrebleu", "sacrebleu").CHRF(), texts.references, texts.hypotheses, counts)


def _rouge(kind: str) -> Measure:
    def measure(texts: Texts, counts: np.ndarray) -> tuple[np.ndarray, str]:
        scorer = require("rouge_score.rouge_scorer", "rouge-score").RougeScorer([kind], use_stemmer=True)
        scores = [
            scorer.score_multi(group, text)[kind].fmeasure
            for group, text in zip(texts.references, texts.hypotheses, strict=True)
        ]
        signature = f"{kind}|f1|stemmer:yes|references:best|rouge-score:{version('rouge-score')}"
        return _means(np.array(scores), counts), signature

    return measure


def _bertscore(texts: Texts, counts: np.ndarray) -> tuple[np.ndarray, str]:
    from huggingface_hub import try_to_load_from_cache

    try:
        import bert_score
    except ModuleNotFoundError:
        raise UnavailableError("this needs the package 'bert-score': pip install bert-score") from None
    if not isinstance(try_to_load_from_cache(BERT, "config.json"), str):
        raise UnavailableError(f"this needs the model {BERT}, which is not on this machine: hf download {BERT}")
    scores = np.zeros(len(texts.hypotheses))
    written = [i for i, text in enumerate(texts.hypotheses) if text]  # it cannot read a blank one, and gives it 0
    if written:
        _, _, f1 = bert_score.score(
            [texts.hypotheses[i] for i in written], [texts.references[i] for i in written], model_type=BERT
        )
        scores[written] = f1.numpy()
    packages = (f"{package}:{version(package)}" for package in ("bert-score", "transformers"))
    return _means(scores, counts), f"{BERT}|f1|references:best|idf:no|{'|'.join(packages)}"


SUITES: dict[str, dict[str, Measure]] = {
    "e2e": {"BLEU": _bleu, "NIST": _nist, "METEOR": _meteor, "ROUGE_L": _rouge_l, "CIDEr": _cider},
    "webnlg": {"BLEU": _webnlg_bleu, "METEOR": _webnlg_meteor, "TER": _webnlg_ter},
    "rouge": {"ROUGE-1": _rouge("rouge1"), "ROUGE-2": _rouge("rouge2"), "ROUGE-L": _rouge("rougeL")},
    "chrf": {"chrF": _chrf},
    "bertscore": {"BERTScore": _bertscore},
}
"""The metrics, by suite and by name."""


def chosen(metrics: str | Sequence[str]) -> dict[str, Measure]:
    """Metrics by the names of suites and figures, given as a list or with commas between them.

    `webnlg` is a whole suite, `webnlg.BLEU` one figure of it, and `TER` a figure of the first suite that has it.

    Raises:
        SettingsError: none, one that does not exist, or two of one name.
    """
    wishes = metrics.split(",") if isinstance(metrics, str) else metrics
    known = dict(SUITES)
    for suite, measures in SUITES.items():
        for name, measure in measures.items():
            known[f"{suite}.{name}"] = {name: measure}
            known.setdefault(name, {name: measure})
    found: dict[str, Measure] = {}
    for wish in map(str.strip, wishes):
        if wish not in known:
            raise SettingsError(f"there is no metric {wish!r}: expected some of {', '.join(known)}")
        for name, measure in known[wish].items():
            if found.setdefault(name, measure) is not measure:
                raise SettingsError(f"two of these metrics are named {name}: score one suite at a time")
    if not found:
        raise SettingsError(f"no metric was named: expected some of {', '.join(known)}")
    return found


def _means(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return counts @ scores / counts.sum(axis=1)


def _sacrebleu(
    metric: Any, references: Sequence[Sequence[str]], hypotheses: Sequence[str], counts: np.ndarray
) -> tuple[np.ndarray, str]:
    """By the two methods that sacrebleu's own significance tests are made of."""
    most = max(map(len, references))
    streams = [[group[i] if i < len(group) else None for group in references] for i in range(most)]
    rows = np.array(metric._extract_corpus_statistics(hypotheses, streams), dtype=float)
    values = np.array([metric._compute_score_from_stats(row).score for row in counts @ rows])
    return values, f"sacrebleu|{metric.get_signature()}"


def _one_line(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"a text has half a character at position {error.start}: expected Unicode text") from error
    return " ".join(text.splitlines()).strip()


def _own() -> str:
    return f"sacrebleu:{version('sacrebleu')}|foreword:{__version__}"


def _ptb() -> str:
    return f"tok:ptb-3.4.1, lc, no punctuation|pycocoevalcap:{version('pycocoevalcap')}"


def _webnlg() -> str:
    return rf"webnlg-2017: 3 references, ascii, lc, split at \W|Unidecode:{version('Unidecode')}"
