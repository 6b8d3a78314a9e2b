"""What an evaluation scores and divides by: windows, WikiText's conventions, LAMBADA's last words, counts and figures."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from paci_megatron.data import DataError, encoding
from paci_megatron.data.corpus import Document
from paci_megatron.evaluate import EvaluationError
from paci_megatron.evaluate.corpus import TextOptions, appends_eod, find_text, read_indexed, read_text
from paci_megatron.evaluate.lambada import last_words
from paci_megatron.evaluate.report import figures, table
from paci_megatron.evaluate.scoring import _report_of_logits, _report_of_losses
from paci_megatron.evaluate.text import arrange_rows, count_words, detokenize_wikitext
from paci_megatron.evaluate.windows import Window, ending_window, make_batch, sliding_windows

EOD = 0


class Letters:
    """A tokenizer with a token for each letter, and for a space with the letter after it, as GPT-2's has."""

    eod = EOD
    vocab_size = 2000

    def tokenize(self, text: str) -> list[int]:
        ids = []
        for before, letter in zip("x" + text, text, strict=False):
            if letter != " ":
                ids.append(ord(letter) + (1000 if before == " " else 0))
        return ids

    def detokenize(self, ids: list[int]) -> str:
        return "".join(f" {chr(i - 1000)}" if i > 1000 else chr(i) for i in ids)


@pytest.mark.parametrize("num_tokens", [2, 3, 8, 9, 10, 25, 64])
@pytest.mark.parametrize(("context", "stride"), [(1, 1), (8, 8), (8, 3), (8, 1), (8, 7), (100, 5)])
def test_every_token_but_the_first_is_scored_once_in_enough_context(num_tokens: int, context: int, stride: int) -> None:
    windows = list(sliding_windows(0, num_tokens, context, stride))
    scored: Counter[int] = Counter()
    for window in windows:
        assert window.length <= context
        for prediction in range(window.first_scored, window.length):
            target = window.begin + prediction + 1
            scored[target] += 1
            seen = target - window.begin
            assert seen >= min(target, context - stride + 1)
    assert scored == Counter(range(1, num_tokens))
    assert windows[0].num_scored == min(context, num_tokens - 1), "the first window scores all of its tokens"
    assert all(window.num_scored == stride for window in windows[1:-1])
    assert sum(window.num_scored for window in windows) == num_tokens - 1


def test_stride_one_reads_the_whole_context_for_each_token() -> None:
    windows = list(sliding_windows(3, num_tokens=12, context=4, stride=1))
    assert windows[0] == Window(3, 0, 4, 0)
    assert windows[1:] == [Window(3, end - 4, end, 3) for end in range(5, 12)]


def test_one_token_gives_no_window() -> None:
    assert not list(sliding_windows(0, 1, 8, 8))


def test_ending_window_scores_the_end_in_the_longest_context() -> None:
    assert ending_window(2, num_tokens=6, num_scored=2, context=16) == Window(2, 0, 5, 3)
    assert ending_window(2, num_tokens=30, num_scored=2, context=16) == Window(2, 13, 29, 14)


def test_batch_rows_predict_the_next_token_and_are_filled_with_zeros() -> None:
    streams: list[np.ndarray] = [np.arange(10, 20, dtype=np.uint16), np.arange(50, 53, dtype=np.int64)]
    windows = [Window(0, 2, 6, 1), Window(1, 0, 2, 0)]
    batch = make_batch(streams, windows, [1, 0], rows=3, length=5)
    assert batch.tokens.tolist() == [[50, 51, 0, 0, 0], [12, 13, 14, 15, 0], [0] * 5]
    assert batch.labels.tolist() == [[51, 52, 0, 0, 0], [13, 14, 15, 16, 0], [0] * 5]
    assert batch.scored.tolist() == [[True] * 2 + [False] * 3, [False, True, True, True, False], [False] * 5]
    assert batch.windows == [1, 0, -1]


def test_reports_sum_what_is_scored() -> None:
    logits = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(3))
    labels = logits.argmax(dim=-1)
    labels[1, 2] = (labels[1, 2] + 1) % 7
    losses = -logits.log_softmax(dim=-1).gather(-1, labels[..., None]).squeeze(-1)
    scored = torch.tensor([[False, True, True, False], [False, False, True, True]])
    nll = [float(losses[row][scored[row]].sum()) for row in range(2)]
    assert _report_of_losses(scored, losses)[0].tolist() == pytest.approx(nll)
    report = _report_of_logits(labels, scored, logits)
    assert report[0].tolist() == pytest.approx(nll)
    assert report[1].tolist() == [1, 0], "the second row has a wrong token"
    labels[1, 2], labels[1, 0] = logits[1, 2].argmax(), (labels[1, 0] + 1) % 7
    assert _report_of_logits(labels, scored, logits)[1].tolist() == [1, 1], "a wrong token that is context does not count"


@pytest.mark.parametrize(
    ("tokenised", "written"),
    [
        ("a guest @-@ starring role", "a guest-starring role"),
        ("1 @,@ 500 @.@ 5 km", "1,500.5 km"),
        ("He came , saw ; won : yes ! no ? end .", "He came, saw; won: yes! no? end ."),
        ("the end . Then", "the end. Then"),
        ("the boys ' club", "the boys' club"),
        ("Herron 's play ( 2000 ) was [ not ] { seen }", "Herron's play (2000) was [not] {seen}"),
        ('called " The Bill " in', 'called "The Bill" in'),
        (" \n = Robert Boulter = \n \n = = Career = = \n", "\n= Robert Boulter =\n\n== Career ==\n"),
        ("= = = = Deep = = = =", "==== Deep ===="),
        ("20 ° N of", "20°N of"),
        ("<unk> stays", "<unk> stays"),
    ],
)
def test_wikitext_is_detokenized(tokenised: str, written: str) -> None:
    assert detokenize_wikitext(tokenised) == written


def test_words_by_spaces_count_line_ends() -> None:
    text = " \n = Title = \n \n Two words . \n"
    assert count_words(text, "whitespace") == 6
    assert count_words(text, "spaces") == 8


def test_rows_are_joined_with_a_blank_line_and_blank_ones_are_empty() -> None:
    assert arrange_rows(" \n = T = \n \n text", "blank-line") == "\n\n = T = \n\n\n\n\n text"
    assert arrange_rows(" \n = T = \n", "as-is") == " \n = T = \n"


def text_file(folder: Path, text: str, name: str = "a.txt") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_counts_are_those_of_the_original_text(tmp_path: Path) -> None:
    text = "an é @-@ x . "
    options = TextOptions((text_file(tmp_path, text),), detokenizer="wikitext")
    corpus = read_text(options, Letters(), 2000)
    assert Letters().detokenize(corpus.streams[0].tolist()) == "an é-x."
    assert (corpus.num_tokens, corpus.num_words, corpus.num_bytes) == (6, 5, len(text.encode()))


@pytest.mark.parametrize(("per_document", "lengths"), [(False, [8]), (True, [3, 5])])
def test_documents_end_with_eod_and_may_be_streams_of_their_own(
    tmp_path: Path, per_document: bool, lengths: list[int]
) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("ab", "", "cdef"))
    path = text_file(tmp_path, lines, "a.jsonl")
    corpus = read_text(TextOptions((path,), per_document=per_document), Letters(), 2000)
    assert [len(stream) for stream in corpus.streams] == lengths
    assert np.concatenate(corpus.streams).tolist() == [ord(c) or EOD for c in "ab\0cdef\0"]
    assert (corpus.num_documents, corpus.num_words, corpus.num_bytes) == (2, 2, 6)
    bare = read_text(TextOptions((path,), append_eod=False), Letters(), 2000)
    assert bare.streams[0].tolist() == [ord(c) for c in "abcdef"]


def test_one_text_file_has_no_eod_by_default(tmp_path: Path) -> None:
    one, two = (text_file(tmp_path, "ab\ncd", name) for name in ("a.txt", "b.txt"))
    assert not appends_eod(TextOptions((one,)))
    assert appends_eod(TextOptions((one,), append_eod=True))
    assert appends_eod(TextOptions((one, two)))
    assert appends_eod(TextOptions((one,), split_documents="line"))


def test_first_token_is_scored_after_eod(tmp_path: Path) -> None:
    corpus = read_text(TextOptions((text_file(tmp_path, "ab"),), score_first_token=True), Letters(), 2000)
    assert corpus.streams[0].tolist() == [EOD, ord("a"), ord("b")]
    assert corpus.num_tokens == 2


def test_a_name_that_is_no_file_is_not_looked_for_elsewhere() -> None:
    with pytest.raises(DataError, match="--input wikitext: no such file"):
        read_text(TextOptions(("wikitext",)), Letters(), 2000)


@pytest.mark.parametrize("text", ["", "a"])
def test_nothing_to_score_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="nothing can be scored"):
        read_text(TextOptions((text_file(tmp_path, text),)), Letters(), 2000)


@pytest.mark.parametrize(
    ("option", "flag"),
    [
        ({"detokenizer": "ptb"}, "--detokenizer ptb"),
        ({"rows": "two"}, "--rows two"),
        ({"words": "w"}, "--count-words w"),
        ({"split_documents": "page"}, "--split-documents page"),
    ],
)
def test_unknown_text_options_are_refused(option: dict[str, Any], flag: str) -> None:
    with pytest.raises(DataError, match=f"{flag}: must be one of "):
        TextOptions(("a.txt",), **option).validate()


def write_indexed(folder: Path, name: str, documents: list[list[int]]) -> str:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = str(folder / name)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for ids in documents:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_counts_of_indexed_data_are_the_recorded_or_detokenized_ones_or_unknown(tmp_path: Path) -> None:
    documents = [[*Letters().tokenize(text), EOD] for text in ("ab cd", "e")]
    prefix = write_indexed(tmp_path, "d_valid_document", documents)

    def counts(**options: Any) -> tuple[int | None, int | None]:
        corpus = read_indexed([prefix], TextOptions((prefix,), **options), Letters())
        assert (corpus.num_tokens, corpus.num_documents) == (7, 2)
        assert [stream.tolist() for stream in corpus.streams] == [documents[0] + documents[1]]
        return corpus.num_words, corpus.num_bytes

    assert counts() == (None, None)
    assert counts(count_by_detokenizing=True) == (3, 6)
    recorded = {"num_tokens": 7, "num_words": 30, "num_bytes": 60}
    stats = tmp_path / "d_stats.json"
    stats.write_text(json.dumps({"splits": {"valid": recorded}}))
    assert counts() == (30, 60)
    stats.write_text(json.dumps({"splits": {"valid": {**recorded, "num_tokens": 8}}}))
    assert counts() == (None, None), "recorded of other data"
    stats.write_text("{}")
    assert counts() == (None, None)


def test_counts_of_a_lossy_tokenizer_are_unknown(tmp_path: Path) -> None:
    class Lossy(Letters):
        def detokenize(self, ids: list[int]) -> str:
            return super().detokenize(ids).upper()

    prefix = write_indexed(tmp_path, "x", [[*Letters().tokenize("ab cd"), EOD]])
    corpus = read_indexed([prefix], TextOptions((prefix,), count_by_detokenizing=True), Lossy())
    assert (corpus.num_words, corpus.num_bytes) == (None, None)


def documents(*texts: str) -> list[Document]:
    return [Document(text, f"line {number}", len(text)) for number, text in enumerate(texts, start=1)]


def test_last_words_are_the_tokens_that_the_text_before_lacks() -> None:
    examples = last_words(documents("the sky is blue\n", "say  né"), Letters(), 2000, context=100)
    for stream, window, word in zip(examples.streams, examples.windows, (" blue", " né"), strict=True):
        assert window.end == len(stream) - 1
        assert stream[window.begin + window.first_scored + 1 :].tolist() == Letters().tokenize(word)
    assert examples.num_bytes == len(" blue") + len("  né".encode())


def test_long_passages_keep_their_end() -> None:
    (window,) = last_words(documents("abcdefgh ij"), Letters(), 2000, context=4).windows
    assert window == Window(0, 5, 9, 2)


def test_a_token_that_ends_every_text_is_no_part_of_the_word() -> None:
    class Ending(Letters):
        def tokenize(self, text: str) -> list[int]:
            return [*super().tokenize(text), EOD]

    (plain,), (ended,) = (last_words(documents("ab cd"), made, 2000, 10).streams for made in (Letters(), Ending()))
    assert plain.tolist() == ended.tolist()


@pytest.mark.parametrize(
    ("text", "reason"), [("word", "line 1: one word"), ("", "line 1: one word"), ("a bcdef", "5 tokens")]
)
def test_passages_without_context_or_with_a_word_beyond_it_are_refused(text: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        last_words(documents(text), Letters(), 2000, context=4)


class Gaps(Letters):
    """Says that it has fewer ids than it gives, as tokenizers with holes in their vocabulary do."""

    vocab_size = 99


class Numbers(Letters):
    """Takes numbers alone, as Megatron's NullTokenizer does."""

    def tokenize(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (Gaps(), "a.jsonl:2: token id 1099 is outside the vocabulary of 99; use another tokenizer"),
        (Numbers(), "a.jsonl:1: cannot be tokenized: invalid literal for int"),
    ],
)
def test_what_cannot_be_tokenized_is_named(tmp_path: Path, tokenizer: Any, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a b"}\n{"text": "a c"}\n')
    options = TextOptions((str(tmp_path / "a.jsonl"),))
    if isinstance(tokenizer, Gaps):
        (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "a c"}\n')
    with pytest.raises(DataError, match=message):
        read_text(options, tokenizer, tokenizer.vocab_size)
    with pytest.raises(DataError, match=message.replace("1:", "[12]:")):
        encoding.Encoder(tokenizer, None)(list(find_text(options)))
    if isinstance(tokenizer, Numbers):
        with pytest.raises(DataError, match=message):
            last_words(find_text(options), tokenizer, tokenizer.vocab_size, 10)


def test_figures() -> None:
    assert figures(8 * math.log(2), num_tokens=4, num_words=2, num_bytes=16) == {
        "num_tokens": 4,
        "num_words": 2,
        "num_bytes": 16,
        "token_ppl": pytest.approx(4),
        "word_ppl": pytest.approx(16),
        "bits_per_byte": pytest.approx(0.5),
        "nll": 8 * math.log(2),
    }
    unknown = figures(1.0, num_tokens=4, num_words=None, num_bytes=None)
    assert unknown["word_ppl"] is None and unknown["bits_per_byte"] is None
    assert figures(1e5, num_tokens=4, num_words=2, num_bytes=16)["word_ppl"] is None, "beyond a float"
    with pytest.raises(EvaluationError, match="weights are not finite"):
        figures(math.nan, 1, 1, 1)


def test_table_has_a_dash_for_what_is_unknown() -> None:
    result = {**figures(1.0, 4, None, 16), "context": 8, "stride": None}
    lines = {line[:24].strip(): line[24:].strip() for line in table(result).splitlines()}
    assert lines["word perplexity"] == "-" and lines["bytes"] == "16" and lines["context / stride"] == "8 / -"


@pytest.mark.skipif("PACI_WIKITEXT" not in os.environ, reason="PACI_WIKITEXT names a folder with WikiText and GPT-2's BPE")
def test_wikitext_counts() -> None:
    """Of the tokenised test set with GPT-2's vocabulary. Joining the rows adds the 1,423 tokens that it adds to the raw one,
    from 286,221 to 287,644.
    """
    from paci_megatron.evaluate.evaluator import _build_tokenizer

    folder = Path(os.environ["PACI_WIKITEXT"])
    names = ("tokenizer_model", "special_tokens", "metadata_path", "chat_template")
    flags = ("tokenizer_hf_no_use_fast", "trust_remote_code", "tokenizer_hf_no_include_special_tokens")
    vocabulary = {"vocab_file": str(folder / "gpt2-bpe/vocab.json"), "merge_file": str(folder / "gpt2-bpe/merges.txt")}
    settings = {**dict.fromkeys(names), **dict.fromkeys(flags, False), **vocabulary}
    tokenizer = _build_tokenizer(argparse.Namespace(tokenizer_type="GPT2BPETokenizer", **settings))

    def counts(**options: Any) -> SimpleNamespace:
        corpus = read_text(TextOptions((str(folder / "wikitext-2/test.txt"),), **options), tokenizer, tokenizer.vocab_size)
        return SimpleNamespace(tokens=corpus.num_tokens, words=corpus.num_words, size=corpus.num_bytes)

    assert counts() == SimpleNamespace(tokens=295_877, words=241_211, size=1_256_449)
    assert counts(rows="blank-line").tokens == 295_877 + (287_644 - 286_221)
    assert counts(detokenizer="wikitext") == SimpleNamespace(tokens=278_365, words=245_566, size=1_256_449)
