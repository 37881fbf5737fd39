"""The miniature's first step: extended on text for two minutes, it reads four times as far."""

from longva.mini import reader
from longva.mini import world as W
from longva.model.open import open_language
from longva.needle import niah
from longva.needle.book import TextTest, TextWording, sentence_stops
from longva.needle.trials import by_frames


def test_a_full_stop_that_also_ends_documents_ends_sentences():
    tokenizer = W.mini_tokenizer()
    assert tokenizer.eos_token == "." and list(sentence_stops(tokenizer).ends) == [W.DOT]


def test_extended_reads_what_unextended_does_not(tmp_path):
    book, right = reader.write_book(tmp_path / "book", seed=3), {}
    for name, folder in zip(("unextended", "extended"), reader.extend_reader(tmp_path / "runs", seed=1)):
        test = TextTest(book, 10, digits=reader.DIGITS, wording=TextWording(**reader.WORDING))
        trials = niah.run(open_language(folder), test, [128, 496], [0, 0.5, 1], tmp_path / name, progress=False)
        right[name] = {n: k / of for n, (k, of) in by_frames(trials).items()}
    assert min(right["extended"].values()) >= 0.95
    assert right["unextended"][496] <= 0.2
