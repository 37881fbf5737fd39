"""What a sweep says before it starts, against what it then does."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from longva import cli
from longva.context.plan import per_token
from longva.mini import load
from longva.mini.world import write_mini_video
from longva.model.open import PlainProcessor
from longva.model.prefill import LiveBytes
from longva.needle.forecast import forecast_walks
from longva.needle.haystack import Haystack
from longva.needle.needles import save_needles
from longva.needle.reader import Reader
from longva.needle.trials import read_trials
from longva.needle.trie import Cost, decide_paths, shares
from longva.needle.vniah import Reading, Spot, decide_asks, plan, run
from longva.study.variants import mini_scene
from longva.testing import small_family

sys.path.insert(0, str(Path(__file__).parent))
from needle_toy import film, needles, toy

GRID = [Spot(j, n, d) for n in (4, 8) for d in (0, 0.5, 1) for j in range(3)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A film, four needles with choices, look-alikes, and the command in this process."""
    write_mini_video(tmp_path / "film.mp4", 24, seed=5, side=28)
    _, hide, alike = mini_scene(24, 10, 5)
    save_needles(hide, tmp_path / "needles")
    save_needles(alike, tmp_path / "alike")
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(
        cli.app, ["vniah", "--haystack", "film.mp4", "--frames", "8,16", *map(str, words)]
    )


def number(pattern, text):
    return int(re.search(pattern, text)[1].replace(",", ""))


@pytest.fixture
def read(monkeypatch):
    """Tokens that the language model is really called with, in this process."""
    count = []
    embed = Reader.embed

    def counted(self, pieces, state=None):
        given = embed(self, pieces, state)
        count.append(given["inputs_embeds"].shape[1])
        return given

    monkeypatch.setattr(Reader, "embed", counted)
    return count


@pytest.mark.parametrize(
    "words",
    [
        ["--naive"],
        ["--kv", "host"],
        ["--generate"],
        ["--variant", "clock"],
        ["--variant", "choice"],
        ["--variant", "vniah-d", "--look-alikes", "alike", "--distance", "4", "--naive"],
    ],
    ids=" ".join,
)
def test_the_command_says_what_it_then_reads(here, read, words):
    done = here("--model", "mini-longva", *words, "--out", "out")
    assert done.exit_code == 0, done.output
    said = next(line for line in done.output.splitlines() if " trials: " in line)
    assert number(r"^([\d,]+) trials", said) == len(read_trials("out/trials.jsonl")) and number(
        r"([\d,]+) tokens,", said
    ) == sum(read), said
    assert (
        "operations" in said
        and "; memory " in said
        and "; time " in said
        and said.endswith("TFLOPS.")
        and "0 B" not in said
    )
    if "--naive" in words:
        assert (
            "keys and values" not in said
            and "nothing is kept from one trial to the next" in said
            and "one by one" not in said
        )
    if "host" in words:
        assert (
            "on the device, and" in said
            and "of the host's for the keys and values" in said
            and "copies from the host" in said
        )
    again = here("--model", "mini-longva", *words, "--out", "out")
    assert again.exit_code == 0 and " trials: " not in again.output  # nothing is left to do


def test_an_adaptive_run_stays_between_its_bounds(here, read):
    done = here("--model", "mini-short", "--half-width", "0.25", "--out", "out")
    assert done.exit_code == 0, done.output
    least, most = (
        next(line for line in done.output.splitlines() if line.startswith(word)) for word in ("At least", "At most")
    )
    trials, tokens = (
        [number(pattern, line) for line in (least, most)] for pattern in (r": ([\d,]+) trials", r"([\d,]+) tokens,")
    )
    assert trials == [6 * 5, 6 * 10] and trials[0] <= len(read_trials("out/trials.jsonl")) <= trials[1]
    assert tokens[0] <= sum(read) <= tokens[1]


def test_an_adaptive_run_sees_its_film_once(tmp_path, monkeypatch):
    model, processor = load("mini-short")
    hay, hide, _ = mini_scene(16, 10, 5)
    calls = []
    see = type(model).encode_frames
    monkeypatch.setattr(
        type(model), "encode_frames", lambda self, pixels: calls.append(len(pixels)) or see(self, pixels)
    )
    trials = run((model, processor), hay, hide, [16], [0, 1], tmp_path / "out", half_width=0.15, progress=False)
    assert len(trials) > 2 * 5 and sum(calls) == 16 + 10


def walk(model, processor, frames, spots):
    """A reader that has seen the toy's film and needles, and the paths and answers of some trials."""
    reader = Reader(model, processor)
    prompts = [reader.prompt(n) for n in needles()]
    reader = reader.with_tokens(reader.encode(film(frames).array), reader.encode_needles(needles()))
    return reader, [s.path(prompts[s.needle]) for s in spots], [prompts[s.needle].answer for s in spots]


def test_memory_on_device_and_host():
    model, processor = toy()
    reader, paths, answers = walk(
        model, processor, 100, [Spot(j, n, d) for n in (50, 100) for d in (0, 0.5) for j in (0, 1)]
    )
    tokens = reader.haystack, reader.needles
    for kv in ("device", "host"):
        told = forecast_walks(reader, [(paths, answers)], Reading(kv=kv), speed=1e9, link=1e9)
        with LiveBytes([*model.parameters(), *model.buffers(), *tokens]) as live:
            held = max(live.now for _ in decide_paths(reader, paths, answers, host=kv == "host"))
        assert held == pytest.approx(told.parts["KV cache"] + told.host, rel=0.03)
        assert told.host == (per_token(model.config, 4)["kv"] * told.cost.longest if kv == "host" else 0)
    naive = forecast_walks(reader, [(paths, answers)], Reading(naive=True, kv="host"), speed=1e9)
    assert told.steps["copies"] > 0 and naive.steps["copies"] == 0


def test_workers_read_their_beginnings_each_for_itself():
    model, processor = toy()
    reader, paths, answers = walk(model, processor, 8, GRID)
    told = forecast_walks(reader, [(paths, answers)], Reading(workers=2), speed=1e9)
    spent = Cost()
    for part in shares(reader, paths, answers, 2):
        assert list(decide_paths(reader, [paths[i] for i in part], [answers[i] for i in part], spent=spent))
    assert (
        told.cost.tokens == spent.tokens
        and told.cost.flops == pytest.approx(spent.flops)
        and "in each of 2 processes" in str(told)
    )
    assert told.cost.tokens > forecast_walks(reader, [(paths, answers)], speed=1e9).cost.tokens


@pytest.mark.parametrize("words", [["--naive"], ["--kv", "host"]], ids=" ".join)
def test_other_families_are_told_all_of_it(here, words, tmp_path, read):
    for part in small_family("qwen2_vl", PlainProcessor):
        part.save_pretrained(tmp_path / "mine")
    done = here("--model", "mine", *words, "--out", "out")
    assert done.exit_code == 0, done.output
    said = next(line for line in done.output.splitlines() if " trials: " in line)
    assert (
        "operations" in said
        and "; memory " in said
        and "; time " in said
        and "0 B" not in said
        and (("host's" in said) == ("host" in words))
    )
    assert number(r"([\d,]+) tokens,", said) == sum(read)


def test_choices(here, tmp_path):
    """A model that sees the picture is right, one that doesn't guesses; vniah doesn't look at choices."""
    for variant, low, high in (("choice", 0.9, 1), ("blind", 0, 0.6)):
        done = here("--model", "mini-longva", "--variant", variant, "--depths", "0", "--out", variant)
        trials = read_trials(f"{variant}/trials.jsonl")
        assert (
            done.exit_code == 0
            and "an accuracy of 0.25." in done.output
            and all(len(t.choices) == 4 and t.answer_ids in t.choices and t.argmax_ids in t.choices for t in trials)
        )
        assert low <= sum(t.correct for t in trials) / len(trials) <= high and all(
            t.correct == (t.argmax_ids == t.answer_ids) == (t.margin > 0) for t in trials
        )
    assert here("--model", "mini-longva", "--depths", "0", "--out", "plain").exit_code == 0 and all(
        t.choices == [] for t in read_trials("plain/trials.jsonl")
    )
    rows = json.loads((tmp_path / "needles/needles.json").read_text())
    for change, words in (
        (dict(answer="mauve rows"), "the answer mauve rows is not among its choices"),
        (dict(choices=[rows[0]["answer"]] * 2), "hold one twice"),
    ):
        (tmp_path / "needles/needles.json").write_text(json.dumps([rows[0] | change, *rows[1:]]))
        done = here("--model", "mini-longva", "--out", "wrong")
        assert (
            done.exit_code == 1
            and done.stdout == ""
            and words in done.stderr
            and done.stderr.count("\n") == 1
            and not (tmp_path / "wrong").exists()
        )
    (tmp_path / "needles/needles.json").write_text(
        json.dumps([{k: v for k, v in row.items() if k != "choices"} for row in rows])
    )
    done = here("--model", "mini-longva", "--variant", "choice", "--out", "none")
    assert done.exit_code == 1 and "has no answers to choose from" in done.stderr and not (tmp_path / "none").exists()


def test_generated_needles_without_their_frames():
    """576 needles, four choices each, and a model that isn't shown the picture: a quarter is right by luck."""
    import torch
    from PIL import Image

    from longva.model.modeling import LongVA, mini_config
    from longva.model.processing import LongVAProcessor
    from longva.needle.generate import generate
    from longva.needle.trials import wilson
    from longva.needle.variants import Blind
    from longva.testing import FAMILY_TOKENS as SPECIAL
    from longva.testing import byte_tokenizer

    tokenizer = byte_tokenizer("<video>")
    config = mini_config(
        len(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids(SPECIAL[-2]),
        video_token_id=tokenizer.convert_tokens_to_ids(SPECIAL[-1]),
        text={"num_hidden_layers": 1},
    )
    torch.manual_seed(0)
    model = LongVA(config).eval()
    processor = LongVAProcessor.from_config(config, tokenizer)
    with torch.no_grad():
        for p in model.model.layers.parameters():
            p.mul_(8 if p.ndim == 2 else 1)
    drawn = [replace(n, image=Image.new("RGB", (8, 8))) for n in generate(576, seed=3, side=8)]
    reader = Reader(model, processor)
    _, asks = plan(reader, Haystack(film(4)), drawn, [4], [0], Blind())
    reader = reader.with_tokens(reader.encode(film(4).array))
    said = [correct for _, (_, correct, _), _ in decide_asks(reader, list(asks.values()), Blind())]
    low, high = wilson(sum(said), len(said))
    assert len(said) == 576 and low < 0.25 < high, (sum(said), low, high)
