"""Wrong command lines are refused in one sentence before torch is loaded, so at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from longva.mini.world import write_mini_video, write_needles

ROOT = Path(__file__).resolve().parents[1]

MISTAKES = [
    # words of the command line, exit code, a part of the sentence
    ("chat --video nothing.mp4 find", 1, "There is no file nothing.mp4 (--video)"),
    ("chat --video empty.mp4 find", 1, "empty.mp4 is empty"),
    ("chat --image nothing.png find", 1, "There is no file nothing.png (--image)"),
    ("chat --model mini-lonva find", 2, "There is no miniature called mini-lonva"),
    ("chat --model needles find", 2, "The folder needles holds no model"),
    ("chat --model qwen find", 2, "holds a qwen2_vl, and this command talks with a LongVA"),
    ("chat --frames 8 --fps 1 find", 2, "--frames and --fps exclude each other"),
    ("chat --fps 0 find", 2, "--fps must be a number above 0"),
    ("chat --temperature -1 find", 2, "--temperature must be a number from 0"),
    ("chat --top-p 2 find", 2, "--top-p must be above 0 and at most 1"),
    ("chat --frame-fit wide find", 2, "--frame-fit"),
    ("vniah --model mini-longva --haystack nothing.mp4", 1, "There is no file nothing.mp4"),
    ("vniah --model mini-longva --haystack film.mp4 --needles nothing", 1, "no needle folder nothing"),
    ("vniah --model mini-longva --haystack film.mp4 --frames 4,999", 1, "999 are wanted"),
    ("vniah --model mini-longva --haystack film.mp4 --frames 4 --depths 0,50,100", 2, "for 50 percent, write 0.5"),
    ("vniah --model mini-lonva --haystack film.mp4", 2, "There is no miniature called mini-lonva"),
    ("vniah --model mini-longva --haystack film.mp4 --rope-base 0.5", 2, "--rope-base must be above 1"),
    ("vniah --model mini-longva --haystack film.mp4 --variant vniah-d", 2, "needs --distractors"),
    ("vniah --model mini-longva --haystack film.mp4 --variant vniah-x", 2, "'vniah-x' is not one of"),
    ("niah --model mini-lonva", 2, "There is no model mini-lonva (--model)"),
    ("niah --model ./nothing", 2, "There is no model ./nothing (--model)"),
    ("niah --model mini-longva --haystack nothing", 1, "There is no haystack folder nothing"),
    ("niah --model mini-longva --lengths many", 2, "--lengths takes whole numbers"),
    ("niah --model mini-longva --depths 0,50", 2, "for 50 percent, write 0.5"),
    ("niah --model mini-longva --distractors=-1", 2, "--distractors must be whole numbers from 0"),
    ("niah --model mini-longva --numbers 0", 2, "--numbers"),
    ("compare nothing needles", 1, "nothing holds no trials.jsonl"),
    ("extend --preset minni", 2, "'minni' is not one of 'paper', 'mini'"),
    ("extend --preset paper", 2, "Say with --text on which text to train"),
    ("extend --preset paper --text ./nothing", 1, "There is no file ./nothing (--text)"),
    ("extend --preset mini --model ./nothing --text needles", 2, "There is no model ./nothing (--model)"),
    ("extend --preset mini --theta 0.5", 2, "--theta must be above 1"),
    ("extend --preset mini --length -5", 2, "--length"),
    ("align --preset minni --data rows.json", 2, "'minni' is not one of 'paper-1'"),
    ("align --preset mini-1 --model mini-longva --data missing", 1, "There is no file missing (--data)"),
    ("align --preset mini-1 --model mini-longva --data {rows,b}.json", 1, "There is no file b.json (--data)"),
    ("align --preset mini-1 --model mini-longva --data film.mp4", 2, "--data takes a .json, .jsonl or .yaml file"),
    ("align --preset mini-1 --model mini-longva --data rows.json --media no", 1, "There is no folder no (--media)"),
    ("align --preset mini-1 --data rows.json", 2, "--preset mini-1 starts from a model of your own"),
    ("align --preset paper-1 --data rows.json --model mini-longva --vision-tower a/b", 2, "exclude each other"),
    ("dpo --preset minni --data rows.json", 2, "'minni' is not one of 'paper', 'mini'"),
    ("dpo --preset mini --data missing", 1, "There is no file missing (--data)"),
    ("dpo --preset mini --data rows.json --model mini-lonva", 2, "There is no model mini-lonva (--model)"),
    ("dpo --preset mini --data rows.json --loss ppo", 2, "'ppo' is not one of 'sigmoid', 'hinge', 'ipo', 'kto_pair'"),
    ("dpo --preset mini --data rows.json --beta 0", 2, "--beta must be a number above 0"),
    ("dpo --preset mini --data rows.json --parts eyes", 2, "--parts takes any of tower,projector,language"),
    ("dpo --preset mini --data rows.json --fps 1 --frames 4", 2, "--frames and --fps exclude each other"),
    ("dpo --preset mini --data rows.json --steps 3 --epochs 1", 2, "--steps and --epochs exclude each other"),
    ("dpo --preset mini --data rows.json --lr 0", 2, "--lr must be a number above 0"),
    ("plan --model qwen9 --length 10", 2, "There is no model qwen9"),
    ("plan --model qwen2-7b --length -5", 2, "--length"),
    ("plan --model qwen2-7b --length 10 --checkpoints disk", 2, "--checkpoints"),
    ("plan --model qwen2-7b --length 10 --gpu-gib 0", 2, "--gpu-gib must be a number above 0"),
    ("plan --model qwen2-7b --length 10 --efficiency 40", 2, "--efficiency is a share"),
    ("mini train --out film.mp4", 1, "film.mp4 is a file, and the results need a folder"),
    ("demo --out film.mp4", 1, "film.mp4 is a file, and the results need a folder"),
    ("demo --workers 0", 2, "--workers"),
    ("paper figure9", 2, "There is no figure9 here: name one of Table 1"),
    ("lmms vniah --video no.mp4 --needles needles --frames 4 --out x", 1, "There is no file no.mp4 (--video)"),
    ("lmms vniah --video film.mp4 --needles no --frames 4 --out x", 1, "There is no folder no (--needles)"),
    ("lmms vniah --video film.mp4 --needles needles --frames 4 --depths 50 --out x", 2, "write 0.5"),
    ("lmms curve --pretrained mini-lonva --tasks a --frames 8 --out x", 2, "There is no model mini-lonva"),
    ("lmms curve --pretrained mini-longva --tasks a --frames 0 --out x", 2, "--frames must be whole numbers from 1"),
    ("chatt", 2, "No such command 'chatt'"),
]

# All lines in one process, where importing torch or transformers fails.
RUNNER = """
import json, sys
sys.modules["torch"] = sys.modules["transformers"] = None
from typer.testing import CliRunner
from longva.cli import app
for line in json.load(sys.stdin):
    done = CliRunner().invoke(app, line.split())
    error = None if isinstance(done.exception, (SystemExit, type(None))) else repr(done.exception)
    print(json.dumps([done.exit_code, done.stdout, done.stderr, error]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    place = tmp_path_factory.mktemp("mistakes")
    write_mini_video(place / "film.mp4", 16, seed=3, side=28)
    write_needles(place / "needles", 2, seed=3)
    (place / "empty.mp4").touch()
    (place / "rows.json").write_text("[]")
    (place / "qwen").mkdir()
    (place / "qwen" / "config.json").write_text('{"model_type": "qwen2_vl"}')
    before = sorted(place.rglob("*"))
    lines = json.dumps([line for line, _, _ in MISTAKES])
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], input=lines, capture_output=True, text=True, cwd=place, timeout=300,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    assert sorted(place.rglob("*")) == before, "a refused command wrote something"
    return dict(zip([line for line, _, _ in MISTAKES], map(json.loads, done.stdout.splitlines())))


@pytest.mark.parametrize("line, code, part", MISTAKES, ids=[line for line, _, _ in MISTAKES])
def test_refused_in_one_sentence_without_torch(answers, line, code, part):
    found, out, err, error = answers[line]
    last = err.strip().splitlines()[-1] if err.strip() else ""
    assert error is None and (found, out) == (code, "") and part in last, answers[line]
    assert last.endswith(".") or last.startswith("Error: "), last
