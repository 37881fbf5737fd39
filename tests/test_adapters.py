"""Adapters of other models: exact against the models' own classes and processors, however a path is cut."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import BatchFeature, ProcessorMixin
from transformers.utils import is_torchvision_available
from transformers.video_utils import VideoMetadata
from typer.testing import CliRunner

from longva.cli import app
from longva.model.open import FAMILIES, PlainProcessor, open_both
from longva.needle.adapters import ADAPTERS, reader_for
from longva.needle.needles import Needle, save_needles
from longva.needle.sweep import judge
from longva.needle.trials import NeedleError, key, read_trials
from longva.needle.trie import Cost, atoms, decide_paths, join, measure
from longva.testing import byte_tokenizer, small_family
from longva.vision.video import write_video

ROOT = Path(__file__).resolve().parents[1]
FILM = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
NAMES = {
    "llava_onevision": "LlavaOnevision",
    "llava_next_video": "LlavaNextVideo",
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
}
RED = Needle("red", Image.new("RGB", (16, 16), "red"), "Which colour?", "red")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    model, processor = small_family(request.param, PlainProcessor)
    adapter = reader_for(model, processor, side=16)
    return (
        request.param,
        model,
        processor,
        adapter.with_tokens(adapter.encode(FILM), adapter.encode(np.asarray(RED.image)[None])),
        adapter.prompt(RED),
    )


def path(prompt, insert, frames=5):
    return (
        ("ids", tuple(prompt.before)),
        ("hay", 0, insert),
        ("needle", 0),
        ("hay", insert, frames),
        ("ids", tuple(prompt.after)),
    )


def test_a_path_may_be_cut_anywhere(family):
    *_, reader, prompt = family
    pieces = path(prompt, 2)
    total, end = measure(reader, pieces, reader.start)
    whole = reader.embed(pieces, reader.start)
    assert whole["inputs_embeds"].shape[1] == total
    singles = tuple(atoms(pieces))
    draw = random.Random(0)
    for _ in range(4):
        cuts = sorted({0, len(singles), *draw.sample(range(len(singles)), 5)})
        parts = []
        state = reader.start
        tokens = 0
        for a, b in zip(cuts, cuts[1:]):
            part = join(singles[a:b])
            parts.append(reader.embed(part, state))
            more, state = measure(reader, part, state)
            assert parts[-1]["inputs_embeds"].shape[1] == more
            tokens += more
        assert (tokens, state) == (total, end)
        assert torch.equal(torch.cat([p["inputs_embeds"] for p in parts], 1), whole["inputs_embeds"])
        if "position_ids" in whole:
            assert torch.equal(torch.cat([p["position_ids"] for p in parts], 2), whole["position_ids"])
        if "visual_pos_masks" in whole:
            mask = [
                p.get("visual_pos_masks", torch.zeros(1, p["inputs_embeds"].shape[1], dtype=torch.bool)) for p in parts
            ]
            assert torch.equal(torch.cat(mask, 1), whole["visual_pos_masks"])
            for k, deep in enumerate(whole["deepstack_visual_embeds"]):
                assert torch.equal(
                    torch.cat([p["deepstack_visual_embeds"][k] for p in parts if "visual_pos_masks" in p]), deep
                )


def test_the_walk_decides_as_each_trial_alone(family):
    *_, reader, prompt = family
    paths = [path(prompt, i, n) for n in (1, 3, 5) for i in range(0, n + 1, 2)] + [
        (("ids", tuple(prompt.before)), ("hay", 0, 3), ("ids", tuple(prompt.after)))
    ]
    answers = [prompt.answer] * len(paths)
    for generate in (False, True):
        spent = Cost()
        alone = {i: logits for i, logits, _ in decide_paths(reader, paths, answers, naive=True, generate=generate)}
        for i, logits, _ in decide_paths(reader, paths, answers, generate=generate, chunk=7, spent=spent):
            assert (logits - alone[i]).abs().max() < 1e-4
            assert judge(logits, answers[i])[:2] == judge(alone[i], answers[i])[:2]
    assert spent.longest == max(measure(reader, p, reader.start)[0] for p in paths) + len(prompt.answer) - 1


def test_each_habit_shows_in_the_logits(family):
    """Without it, the check against the model's own class would fail by far."""
    kind, _, _, reader, prompt = family

    def ask(r):
        return next(decide_paths(r, [path(prompt, 2)], [prompt.answer], naive=True))[1]

    right = ask(reader)
    embed = reader.embed
    spoil = {
        "llava_onevision": lambda given: dict(
            inputs_embeds=given["inputs_embeds"][
                :, [i for i in range(given["inputs_embeds"].shape[1]) if i != len(prompt.before) + 6 * 4]
            ]
        ),
        "llava_next_video": lambda given: dict(inputs_embeds=given["inputs_embeds"].flip(1)),
        "qwen2_vl": lambda given: given | dict(position_ids=None),
        "qwen2_5_vl": lambda given: (
            given | dict(position_ids=given["position_ids"] // torch.tensor([2, 1, 1])[:, None, None])
        ),
        "qwen3_vl": lambda given: {k: v for k, v in given.items() if k in ("inputs_embeds", "position_ids")},
    }[kind]
    other = reader.with_tokens(reader.haystack, reader.needles)
    other.embed = lambda pieces, state: spoil(embed(pieces, state))
    assert (ask(other) - right).abs().max() > 3e-3


class FilmByPictures:
    """Stand in for transformers' video processors, which need torchvision.

    The pixels of a video come from the same family's image processor, in the form that the model's processor takes.
    """

    merge_size = temporal_patch_size = 2
    model_input_names = ["pixel_values_videos"]

    def __init__(self, pictures, pairs: bool):
        self.pictures = pictures
        self.pairs = pairs

    image_mean, image_std = (
        property(lambda self, name=name: getattr(self.pictures, name)) for name in ("image_mean", "image_std")
    )

    def __call__(self, videos, video_metadata=None, **options):
        frames = [Image.fromarray(f.movedim(0, -1).numpy()) for f in videos[0]][
            :: 2 if self.pairs else 1
        ]  # a picture is a pair of equal frames
        pixels = torch.as_tensor(
            np.asarray(self.pictures(frames, do_resize=False, return_tensors="pt")["pixel_values"])
        )
        if not self.pairs:
            return BatchFeature(dict(pixel_values_videos=pixels[:, 0][None]))
        return BatchFeature(
            dict(
                pixel_values_videos=pixels,
                video_grid_thw=torch.tensor([[len(frames), 4, 4]]),
                video_metadata=video_metadata,
            )
        )


def film_processor(kind, pictures, monkeypatch):
    """Transformers' own where torchvision is installed, and else the one above."""
    if not is_torchvision_available():
        monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *given: None)
        return FilmByPictures(pictures, kind.startswith("qwen"))
    video = (
        dict(size=dict(shortest_edge=64, longest_edge=40960), patch_size=4)
        if kind.startswith("qwen")
        else dict(size=dict(height=16, width=16))
    )
    if kind == "llava_next_video":
        video = dict(size=dict(shortest_edge=16), crop_size=dict(height=16, width=16))
    return getattr(transformers, f"{NAMES[kind].replace('Qwen2_5_VL', 'Qwen2VL')}VideoProcessor")(**video)


def test_the_whole_processors_of_transformers(family, monkeypatch):
    """Each model's own processor, with its chat, placeholders, stamps and times, agrees with the adapter."""
    kind, model, plain, reader, prompt = family
    made = film_processor(kind, plain.image_processor, monkeypatch)
    more = dict(
        llava_onevision=dict(num_image_tokens=16, vision_feature_select_strategy="full"),
        llava_next_video=dict(patch_size=4, vision_feature_select_strategy="default"),
    ).get(kind, {})
    processor = getattr(transformers, f"{NAMES[kind]}Processor")(
        image_processor=plain.image_processor,
        tokenizer=plain.tokenizer,
        video_processor=made,
        chat_template=plain.tokenizer.chat_template,
        **more,
    )
    frames = np.concatenate([FILM[:2], np.asarray(RED.image)[None], FILM[2:]])
    if kind.startswith("qwen"):
        frames = frames.repeat(2, 0)
        more = dict(do_resize=False)
    else:
        more = {}
    said = [dict(role="user", content=[dict(type="video"), dict(type="text", text=RED.question)])]
    text = processor.apply_chat_template(said, tokenize=False, add_generation_prompt=True) + RED.answer
    shown = VideoMetadata(total_num_frames=len(frames), fps=2.0, frames_indices=list(range(len(frames))))
    given = processor(
        text=[text],
        videos=[torch.tensor(frames).movedim(3, 1)],
        return_tensors="pt",
        do_sample_frames=False,
        video_metadata=[shown],
        **more,
    )
    with torch.no_grad():
        own = model(**given).logits[0, -len(prompt.answer) - 1 : -1]
    ((_, ours, _),) = decide_paths(reader, [path(prompt, 2)], [prompt.answer], naive=True)
    assert (own - ours).abs().max() < 1e-4
    again = reader_for(model, processor, side=16)
    assert again.prompt(RED) == prompt and torch.equal(again.encode(FILM), reader.haystack)


def test_frames_are_independent_and_the_plan_knows_the_layers(family):
    _, model, _, reader, _ = family
    assert (torch.cat([reader.encode(FILM[i : i + 1]) for i in range(5)]) - reader.haystack).abs().max() < 1e-5
    assert (reader.encode(FILM, chunk=2) - reader.haystack).abs().max() < 1e-5
    text = model.config.get_text_config()
    assert (reader.sizes.N, reader.sizes.D, reader.sizes.V) == (
        text.num_hidden_layers,
        text.hidden_size,
        text.vocab_size,
    )


def test_saved_it_is_loaded_and_swept_by_the_command(family, tmp_path):
    kind, model, processor, reader, prompt = family
    for part in (model, processor):
        part.save_pretrained(tmp_path / "mine")
    again = reader_for(*open_both(tmp_path / "mine", FAMILIES), side=16)
    assert again.prompt(RED) == prompt and torch.equal(again.encode(FILM), reader.haystack)
    write_video(FILM, tmp_path / "film.mp4", fps=1.0)
    save_needles([RED], tmp_path / "needles")
    words = [
        "vniah",
        "--model",
        tmp_path / "mine",
        "--haystack",
        tmp_path / "film.mp4",
        "--frames",
        "2,4",
        "--depths",
        "0,1",
        "--out",
        tmp_path / "out",
    ]
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == 0, done.output
    assert (
        "4 trials: " in done.output
        and "one by one (" in done.output
        and "; memory " in done.output
        and "; time " in done.output
    )
    trials = read_trials(tmp_path / "out/trials.jsonl")
    assert sorted((t.frames, t.depth) for t in trials) == [(2, 0), (2, 1), (4, 0), (4, 1)] and {
        t.model for t in trials
    } == {"mine"}
    alone = CliRunner().invoke(app, [str(w) for w in [*words[:-1], tmp_path / "naive", "--naive"]])
    assert alone.exit_code == 0, alone.output
    for a, b in zip(*(sorted(found, key=key) for found in (read_trials(tmp_path / "naive/trials.jsonl"), trials))):
        assert (key(a), a.argmax_ids) == (key(b), b.argmax_ids) and abs(a.margin - b.margin) < 1e-4
    if kind != "qwen2_vl":
        return
    config = tmp_path / "mine/config.json"
    config.write_text(config.read_text().replace('"qwen2_vl"', '"blip"', 1))
    refused = CliRunner().invoke(app, [str(w) for w in words])
    assert (
        refused.exit_code == 2 and "holds a model of type blip, not longva or one of llava_onevision" in refused.output
    )


HUB = """
import sys, transformers
from pathlib import Path
from typer.testing import CliRunner
from longva.cli import app
go = lambda *words: CliRunner().invoke(app, list(words))
film = ["--haystack", "film.mp4", "--needles", "needles", "--frames", "4", "--depths", "0"]
done = go("vniah", "--model", "someone/mine", *film, "--out", "out")
print(done.exit_code, len(Path("out/trials.jsonl").read_text().splitlines()) if done.exit_code == 0 else done.output)
other = ["vniah", "--model", "someone/other", *film, "--out", "none"]
for words in (other, ["chat", "--model", "someone/mine", "find moon"]):
    done = go(*words)
    print(done.exit_code, done.stderr.strip().splitlines()[-1], Path("none").exists())
"""


def test_a_name_of_the_hub(tmp_path):
    """Two models as the hub's cache keeps them, without a network; and names that are not there."""
    for kind, name in (("qwen3_vl", "mine"),):
        snapshot = tmp_path / f"home/hub/models--someone--{name}/snapshots/{'0' * 40}"
        for part in small_family(kind, PlainProcessor):
            part.save_pretrained(snapshot)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs/main").write_text("0" * 40)
    write_video(FILM, tmp_path / "film.mp4", fps=1.0)
    save_needles([RED], tmp_path / "needles")
    env = os.environ | dict(
        HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", COLUMNS="200"
    )
    done = subprocess.run(
        [sys.executable, "-c", HUB], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[0] == "0 1", (done.stdout, done.stderr[-2000:])
    assert lines[1].startswith(
        "2 No model can be loaded from someone/other: it is no folder here, and the Hugging Face hub can't be reached"
    ) and lines[1].endswith("False")
    assert lines[2].startswith(
        "2 someone/mine is a qwen3_vl, and this command talks with a LongVA: longva vniah takes the other families."
    )


def test_a_tokenizer_that_begins_with_a_token_of_its_own(family):
    """As Llama's does; a template that writes the token itself doesn't get it twice."""
    _, model, processor, _, prompt = family
    tokenizer = byte_tokenizer("")
    tokenizer.chat_template = processor.tokenizer.chat_template
    tokenizer.add_special_tokens(dict(bos_token="<|im_end|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_end|> $A", special_tokens=[("<|im_end|>", tokenizer.bos_token_id)]
    )
    other = type(processor)(tokenizer, processor.image_processor, processor.video_token)
    found = reader_for(model, other, side=16).prompt(RED)
    assert (
        found.before == [tokenizer.bos_token_id, *prompt.before]
        and found.after == prompt.after
        and found.answer == prompt.answer
    )
    tokenizer.chat_template = "<|im_end|>" + tokenizer.chat_template
    assert reader_for(model, other, side=16).prompt(RED).before == found.before


def test_what_no_adapter_knows():
    model, processor = small_family("qwen2_vl", PlainProcessor)
    with pytest.raises(NeedleError, match="squares of 8 pixels or a multiple, and not of 20"):
        reader_for(model, processor, side=20)
    model.config.model_type = "blip"
    with pytest.raises(NeedleError, match="no adapter for a model of type blip: known are longva, llava_onevision"):
        reader_for(model, processor)
    assert set(ADAPTERS) == {"longva", *FAMILIES}
    model, processor = small_family("llava_onevision", PlainProcessor)
    with pytest.raises(NeedleError, match="squares of 16 pixels, and not of 32"):
        reader_for(model, processor, side=32)
