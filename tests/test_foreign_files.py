"""Files of others that stand where a log or a lock belongs, and data files and templates that never end."""

import json
import re

import pytest
from PIL import Image

from longva.files import FolderError
from longva.mini import folder as miniature
from longva.model.open import OpenError, open_processor
from longva.model.original import CheckpointError
from longva.model.processing import LongVAProcessor
from longva.needle.needles import load_needles
from longva.needle.trials import NeedleError, TrialLog
from longva.train.ranks import Ranks
from longva.train.recipe import Recipe, TrainError
from longva.train.reference import append_lines, read_reference
from longva.train.rows import DataError, open_data
from longva.train.run import Identity, Log, Run

LETTER = b"Dear Ada, this is all I have written so far"
FOREIGN = [LETTER, LETTER + b"\n", b"7", b'{"accuracy": 1}', b'{"accuracy": 1}\n', b"\x00" * 40]
SENTENCE = re.compile(r"[^\n]+\.")


def open_trials(path):
    TrialLog(path).close()


def open_metrics(path):
    Log(path.parent, Recipe(steps=3), Ranks(), done=0)


def open_reference(path):
    with append_lines(path):
        pass


LOGS = {"trials.jsonl": open_trials, "metrics.jsonl": open_metrics, "rank-0.jsonl": open_reference}


@pytest.mark.parametrize("content", FOREIGN, ids=range(len(FOREIGN)))
@pytest.mark.parametrize("name", LOGS)
def test_a_log_leaves_a_file_that_is_none_as_it_is(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((FolderError, NeedleError, TrainError)) as error:
        LOGS[name](tmp_path / name)
    assert SENTENCE.fullmatch(str(error.value)) and name in str(error.value)
    assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize("name", LOGS)
def test_a_log_does_not_reach_through_a_link(tmp_path, name):
    (tmp_path / "run").mkdir()
    for content in (LETTER, b""):
        (tmp_path / "letter.txt").write_bytes(content)
        link = tmp_path / "run" / name
        link.unlink(missing_ok=True)
        link.symlink_to("../letter.txt")
        if name == "metrics.jsonl" and not content:
            open_metrics(link)  # a new file takes the link's place
            assert not link.is_symlink()
        else:
            with pytest.raises(FolderError, match=name):
                LOGS[name](link)
        assert (tmp_path / "letter.txt").read_bytes() == content


@pytest.mark.parametrize(
    "name, begun",
    [
        ("trials.jsonl", b'{"model": "mini'),
        ("trials.jsonl", b"{"),
        ("metrics.jsonl", b'{"step": 1, "lo'),
        ("rank-0.jsonl", b'{"pair": 0'),
        ("rank-0.jsonl", b'{"pair": 0}\n\x00\x00'),
    ],
)
def test_half_a_line_of_a_log_is_cut_off_as_ever(tmp_path, name, begun):
    (tmp_path / name).write_bytes(begun)
    LOGS[name](tmp_path / name)
    assert (tmp_path / name).read_bytes() == begun[: begun.rfind(b"\n") + 1]


def test_a_reference_with_lines_of_something_else_is_refused(tmp_path):
    for line in ("{}", "[1]", "hm"):
        (tmp_path / "rank-0.jsonl").write_text(line + "\n")
        with pytest.raises(TrainError, match="rank-0.jsonl holds a line that is not of this program"):
            read_reference(tmp_path)


def test_a_lock_makes_and_changes_nothing_through_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "letter.txt").write_bytes(LETTER)
    for target in ("letter.txt", "nothing.txt"):
        (tmp_path / "run" / ".lock").unlink(missing_ok=True)
        (tmp_path / "run" / ".lock").symlink_to(tmp_path / target)
        with pytest.raises(FolderError, match=".lock is a link"), Run(
            tmp_path / "run", Recipe(steps=1), Ranks(), Identity()
        ):
            pass
    assert (tmp_path / "letter.txt").read_bytes() == LETTER and not (tmp_path / "nothing.txt").exists()


def test_mixtures_that_name_themselves(tmp_path):
    def mixture(name, *parts):
        lines = [f"- {{json_path: {part}}}" for part in parts]
        (tmp_path / name).write_text("\n".join(["datasets:", *lines]))

    (tmp_path / "a.json").write_text('[{"x": 1}]')
    mixture("self.yaml", "a.json", "self.yaml")
    mixture("one.yaml", "two.yaml")
    mixture("two.yaml", "one.yaml")
    (tmp_path / "link.yaml").symlink_to("self.yaml")
    mixture("twice.yaml", "inner.yaml", "inner.yaml")
    mixture("inner.yaml", "a.json")
    assert len(open_data(tmp_path / "twice.yaml")) == 2
    for name in ("self.yaml", "one.yaml", "link.yaml"):
        with pytest.raises(DataError, match=r"The mixture [^\n]* names itself, [^\n]*\.$"):
            open_data(tmp_path / name)
    (tmp_path / "deep.yaml").write_text("datasets: " + "[" * 20_000)
    with pytest.raises(DataError, match="must be YAML"):
        open_data(tmp_path / "deep.yaml")


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ESCAPE = "{{ messages.__class__.__base__.__subclasses__() }}"


@pytest.mark.parametrize(
    "template, words",
    [
        (ENDLESS, "does not end"),
        ("{% if messages|length > 2 %}" + ENDLESS + "{% endif %}", "does not end"),
        ("{% if messages[0].content is not string %}" + ENDLESS + "{% endif %}", "does not end"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", "does not end"),
        (ESCAPE, "more than words"),
    ],
    ids=range(5),
)
def test_a_template_that_does_not_end_is_one_sentence(tmp_path, template, words):
    for file in miniature("mini-short").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match=words) as error:
        LongVAProcessor.from_pretrained(tmp_path)
    assert SENTENCE.fullmatch(str(error.value))
    with pytest.raises((OpenError, CheckpointError), match=words):
        open_processor(tmp_path)


def test_a_template_that_only_some_conversations_fit_is_taken(tmp_path):
    for file in miniature("mini-short").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    picky = "{{ raise_exception('no') }}"
    (tmp_path / "chat_template.jinja").write_text(picky)
    assert LongVAProcessor.from_pretrained(tmp_path).chat_template == picky
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "longva"


def test_a_needle_folder_shows_only_what_lies_in_it(tmp_path):
    Image.new("RGB", (28, 28), "red").save(tmp_path / "outside.png")
    folder = tmp_path / "needles"
    folder.mkdir()
    for name in ("../outside.png", str(tmp_path / "outside.png"), "x/../../outside.png"):
        entry = dict(name="x", image=name, question="which ?", answer="red")
        (folder / "needles.json").write_text(json.dumps([entry]))
        with pytest.raises(NeedleError, match="leads out of it"):
            load_needles(folder)
