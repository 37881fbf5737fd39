"""Chat: memory that grows by the cache's formula alone, chunks that change nothing, seeds, conversations, and the
command."""

import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from longva import mini
from longva.mini.world import OBJECTS, draw_frame, needle_objects, scene_words, video_scenes, write_mini_video
from longva.model.chat import Chat, ChatError, TooLarge, next_token
from longva.model.checkpoint import save_original
from longva.model.modeling import LongVA, longva_7b, mini_config
from longva.model.open import open_model
from longva.model.prefill import KVLayer, LiveBytes, estimate, kv_cache, prefill, reserve, say_bytes
from longva.model.processing import LongVAProcessor
from longva.vision.video import VideoError, read_frames

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-c", "from longva.cli import app; app()"]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


@pytest.fixture(scope="module")
def pair():
    return mini.load("mini-longva")


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    "48 frames of which we know what they show."
    return write_mini_video(tmp_path_factory.mktemp("film") / "film.mp4", 48, seed=3, side=56)


def answers(seed=3, frames=48):
    "{object: colour and ground}, of the objects that a film shows once."
    words = [scene_words(scene) for scene in video_scenes(frames, seed)]
    return {thing: f"{colour} {ground}" for thing, colour, ground in words if [w[0] for w in words].count(thing) == 1}


# chunks


def small(layers=3, **more):
    torch.manual_seed(0)
    return LongVA(mini_config(64, 3, 4, eos_token_id=5, text={"num_hidden_layers": layers}, **more)).eval()


@pytest.mark.parametrize("chunk", [1, 5, 64, 1000])
def test_chunked_prefill_equals_one_pass(chunk):
    model = small().double()
    ids = torch.tensor([[7, *[4] * 24, 8, 9, *[3] * 8, 10, *[4] * 8, 11]])
    draw = torch.Generator().manual_seed(1)

    def pixels(n):
        return torch.randn(n, 3, 28, 28, generator=draw).double()

    batch = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels(2),
        image_layouts=torch.tensor([[2, 1]]),
        pixel_values_videos=pixels(8),
        video_frames=torch.tensor([6, 2]),
    )
    with torch.no_grad():
        once = model(**batch)
    logits, cache = prefill(model, batch, chunk=chunk, logits_to_keep=0, frames=4)
    assert (logits - once.logits).abs().max() < 1e-10
    for layer, other in zip(cache.layers, once.past_key_values.layers):
        assert (layer.keys - other.keys).abs().max() < 1e-10 and (layer.values - other.values).abs().max() < 1e-10
    rows = model.embed(**{k: v for k, v in batch.items() if k != "attention_mask"}).detach()
    assert (prefill(model, rows.repeat(2, 1, 1), chunk=chunk)[0] - once.logits[:, -1:]).abs().max() < 1e-10  # two rows


def test_the_shipped_miniature_in_float32(pair, film):
    model, processor = pair
    batch = processor(text="<video> find heart", videos=read_frames(film), return_tensors="pt")
    with torch.no_grad():
        once = model(**batch).logits
    for chunk in (16, 100):
        logits, _ = prefill(model, batch, chunk=chunk, logits_to_keep=0)
        assert (logits - once).abs().max() < 1e-5 * once.abs().max()


def test_bfloat16_and_a_device_map(pair, film, tmp_path):
    model, processor = pair
    model.save_pretrained(tmp_path)
    spread = LongVA.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map={"": "cpu"})
    chat = Chat(spread, processor, num_frames=None)
    said = {thing: "".join(chat.ask(f"find {thing}", videos=() if chat.turns else film)) for thing in answers()}
    assert chat.cache.layers[0].keys.dtype == torch.bfloat16
    assert sum(said[thing] == right for thing, right in answers().items()) > 0.7 * len(said)


def test_weights_on_the_disk_and_the_originals_format(pair, film, tmp_path):
    model, processor = pair
    thing, right = next(iter(answers().items()))
    parts = [
        "model.embed_tokens",
        "model.layers",
        "model.norm",
        "model.rotary_emb",
        "model.mm_projector",
        "model.vision_tower",
        "lm_head",
    ]
    away = LongVA.from_pretrained(
        mini.folder("mini-longva"),
        device_map={
            part: "disk" if part in ("model.layers", "model.mm_projector", "model.vision_tower") else "cpu"
            for part in parts
        },
        offload_folder=tmp_path / "away",
    )
    assert "".join(Chat(away, processor).ask(f"find {thing}", videos=film)) == right
    save_original(model, tmp_path / "original")
    processor.tokenizer.save_pretrained(tmp_path / "original")
    assert "".join(Chat(open_model(tmp_path / "original"), processor).ask(f"find {thing}", videos=film)) == right


def test_the_cache_takes_what_it_needs():
    cache = kv_cache(small(), room=100)
    layer, draw = cache.layers[0], torch.Generator().manual_seed(0)
    parts = [torch.randn(1, 2, n, 4, generator=draw) for n in (40, 60, 1, 1)]
    for part in parts[:2]:
        layer.update(part, part)
    assert layer.kept[0].shape[2] == 100
    for part in parts[2:]:
        layer.update(part, part)
    assert torch.equal(layer.keys, torch.cat(parts, 2)) and torch.equal(layer.values, layer.keys)
    assert isinstance(layer, KVLayer) and layer.kept[0].shape[2] < 400
    reserve(cache, 1000)
    layer.crop(-62)
    layer.update(parts[1], parts[1])
    assert torch.equal(layer.keys, torch.cat(parts[:2], 2))


# memory


def deep(frames):
    "A Chat with a wide cache and little else, and a film of noise."
    torch.manual_seed(0)
    config = mini_config(
        158,
        3,
        4,
        eos_token_id=5,
        text={
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "head_dim": 32,
            "hidden_size": 64,
            "intermediate_size": 64,
        },
        tower={"num_hidden_layers": 1},
    )
    video = np.broadcast_to(
        np.random.default_rng(0).integers(0, 256, (1, 28, 28, 3), dtype=np.uint8), (frames, 28, 28, 3)
    )
    return Chat(LongVA(config), mini.load("mini-longva")[1], chunk=128), video


EACH = 4 * 2 * 8 * 32 * 4  # layers, keys and values, heads, head dimension, float32


def test_memory_grows_by_the_cache_alone():
    "64 and 2000 frames, counted storage by storage; the estimate says so beforehand."
    peaks, lengths, guesses = [], [], []
    for frames in (64, 2000):
        chat, video = deep(frames)
        turn = chat.prepare("find heart", videos=video)
        guesses.append(chat.estimate(turn, 2))
        with LiveBytes(chat.model.parameters()) as live:
            list(chat.ask(turn, max_new_tokens=2))
        peaks.append(live.peak)
        lengths.append(turn.tokens)
    assert lengths == [4 * 64 + 2, 4 * 2000 + 2]
    formula = EACH * (lengths[1] - lengths[0])
    assert abs((peaks[1] - peaks[0]) / formula - 1) < 0.02, (peaks, formula)
    assert abs((guesses[1].total - guesses[0].total) / formula - 1) < 0.02
    assert abs(peaks[1] / (guesses[1].total - guesses[1].parts["weights"]) - 1) < 0.1


RSS = """
import re, sys
sys.path.insert(0, "tests")
from test_chat import deep
status = lambda name: 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
for frames in (64, 2000):
    chat, video = deep(frames)
    open("/proc/self/clear_refs", "w").write("5")  # the peak is now what is there
    before = status("VmRSS")
    list(chat.ask("find heart", videos=video, max_new_tokens=2))
    print(status("VmHWM") - before)
    del chat
"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux tells the peak of a part of a run"
)
def test_memory_as_the_system_counts_it():
    done = subprocess.run([sys.executable, "-c", RSS], env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if "clear_refs" in done.stderr:
        pytest.skip("this Linux does not let a process reset its own peak")
    many = int(done.stdout.split()[1])
    formula = EACH * 4 * 2000
    assert 0.9 < many / formula < 1.3, (done.stdout, formula, done.stderr)  # beside the cache, some megabytes of work


def test_the_estimate_of_the_7b_follows_from_its_configuration():
    made = estimate(longva_7b(), 144 * 3000, 3000, new_tokens=0)
    assert made.parts["KV cache"] == 28 * 2 * 4 * 128 * 2 * 144 * 3000 == 57_344 * 432_000
    with torch.device("meta"):
        params = sum(p.numel() for p in LongVA(longva_7b()).parameters())
    assert made.parts["weights"] == 2 * params and made.total < 80e9 and say_bytes(made.parts["KV cache"]) == "23.1 GiB"
    # forward operations of the language model by hand: two for each weight that multiplies, and the causal half of
    # the square
    layer = 3584 * 128 * (2 * 28 + 2 * 4) + 3 * 3584 * 18944
    assert made.flops["prefill"] == pytest.approx(
        2 * 28 * layer * 432_000 + 28 * 4 * 28 * 128 * 432_000**2 / 2, rel=1e-9
    )
    clip = 23 * (2 * (4 * 1024**2 + 2 * 1024 * 4096) * 577 + 4 * 577**2 * 1024) + 2 * 576 * (
        3 * 14**2 * 1024 + 1024 * 3584 + 3584**2
    )
    assert made.flops["tower"] == pytest.approx(3000 * clip, rel=1e-9)
    assert made.seconds["prefill"] == pytest.approx(made.flops["prefill"] / (989e12 * 0.4))
    assert estimate(longva_7b(), 1000, 0, 256, past=143_000).tokens == 144_000


def test_a_film_that_does_not_fit_is_refused_before_it_is_read():
    "The number of frames that is advised fits, and a few more do not."
    chat, video = deep(1500)
    turn = chat.prepare("find heart", videos=video)
    turn.videos[0].parts = lambda: 1 / 0
    with pytest.raises(TooLarge, match="take at most") as told:
        chat.check_room(turn, 2, 40 << 20)
    most = int(re.search(r"at most ([0-9,]+) frames", str(told.value))[1].replace(",", ""))
    beside = chat.estimate(turn, 2).parts
    assert 0 <= ((40 << 20) - beside["work"] - beside["logits"]) // (4 * EACH) - most <= 2
    chat.check_room(chat.prepare("find heart", videos=video[:most]), 2, 40 << 20)
    with pytest.raises(TooLarge):
        chat.check_room(chat.prepare("find heart", videos=video[: most + 3]), 2, 40 << 20)
    with pytest.raises(TooLarge, match="start a new conversation"):
        chat.check_room(turn, 2, 1000)


def test_a_rate_with_a_cap(pair, film):
    chat = Chat(*pair, fps=0.5, most_frames=64)
    assert chat.prepare("find heart", videos=film).frames == 24
    chat.most_frames = 10
    turn = chat.prepare("find heart", videos=film)
    assert np.array_equal(np.concatenate(list(turn.videos[0].parts())), read_frames(film, n=10).array)
    chat.fps, chat.most_frames = 30, 64
    assert chat.prepare("find heart", videos=film).frames == 48  # all that there are


def test_a_stop_before_the_first_piece(pair, film):
    chat, (thing, right) = Chat(*pair), next(iter(answers().items()))
    answer = chat.ask(f"find {thing}", videos=film)
    chat.stop()
    with pytest.raises(ChatError, match="Stopped"):
        list(answer)
    assert "".join(chat.ask(f"find {thing}", videos=film)) == right


# conversations


def test_one_film_four_questions_and_one_pass_of_the_tower(pair, film):
    model, processor = pair
    chat, seen, encode = Chat(model, processor), [], LongVA.encode_frames
    try:
        LongVA.encode_frames = lambda self, pixels, *args, **more: (
            seen.append(len(pixels)),
            encode(self, pixels, *args, **more),
        )[1]
        said = {
            thing: "".join(chat.ask(f"find {thing}", videos=() if chat.turns else film))
            for thing in list(answers())[:4]
        }
    finally:
        LongVA.encode_frames = encode
    assert sum(seen) == 48 and said == {thing: answers()[thing] for thing in said}
    ids = processor(text=chat.prompt, videos=read_frames(film), return_tensors="pt")["input_ids"]
    assert chat.tokens == ids.shape[1]


def test_a_chatml_template_with_text_between_images(tmp_path):
    """Another template, another tokenizer: ids are those of the processor, turn by turn, and generate() goes the
    same way."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    words = Tokenizer(
        models.BPE({w: i for i, w in enumerate([*special, *[chr(c) for c in range(32, 127)], "Ċ", "Ġ"])}, [])
    )
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>", extra_special_tokens=special)
    from tokenizers import decoders

    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(1)
    config = mini_config(
        len(tokenizer),
        tokenizer.convert_tokens_to_ids("<image>"),
        tokenizer.convert_tokens_to_ids("<video>"),
        eos_token_id=1,
    )
    model, processor = LongVA(config).eval(), LongVAProcessor.from_config(config, tokenizer)
    picture, frames = Image.new("RGB", (60, 30), "red"), np.random.default_rng(0).integers(
        0, 256, (5, 28, 28, 3), dtype=np.uint8
    )
    chat = Chat(model, processor, system="Be brief.")
    for text, images, videos in (("what?", [picture, picture], []), ("and this", [], [frames]), ("so?", [], [])):
        "".join(chat.ask(text, images, videos, max_new_tokens=6))
    given = chat.messages[:-1]
    batch = processor(
        text=processor.apply_chat_template(given, tokenize=False, add_generation_prompt=True),
        images=[picture] * 2,
        videos=[frames],
        return_tensors="pt",
    )
    assert chat.turns[-1].prompt.startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\n<image>\nwhat?<|im_end|>"
    )
    made = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=1)
    said = tokenizer.decode(made[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said == chat.messages[-1]["content"]


@pytest.mark.parametrize("how", [dict(temperature=20.0), dict(temperature=0.7, top_p=0.9), {}])
def test_one_seed_one_text(pair, film, how):
    model, processor = pair

    def text(seed):
        torch.rand(seed + 3)  # what others draw does not matter
        return "".join(
            Chat(model, processor, num_frames=8).ask("find heart", videos=film, seed=seed, max_new_tokens=8, **how)
        )

    assert text(4) == text(4)
    if how.get("temperature") == 20.0:
        assert len({text(seed) for seed in range(6)}) > 2


def test_top_p_against_transformers():
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    logits = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 3
    for temperature, top_p in ((0.5, 0.9), (1.3, 0.5), (1.0, 1.0)):
        kept = (
            TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits[None]))[0]
            if top_p < 1
            else logits / temperature
        )
        chances = torch.softmax(kept, -1)
        draw = torch.Generator().manual_seed(0)
        drawn = (
            torch.bincount(
                torch.tensor([next_token(logits, temperature, top_p, draw) for _ in range(3000)]), minlength=300
            )
            / 3000
        )
        assert not drawn[chances == 0].any() and (drawn - chances).abs().max() < 0.04


def test_a_failed_turn_leaves_no_trace(pair, film, tmp_path):
    model, processor = pair
    chat = Chat(model, processor)
    thing, right = next(iter(answers().items()))
    (tmp_path / "torn.mp4").write_bytes(Path(film).read_bytes()[:3000])
    for wrong in (
        dict(videos=tmp_path / "torn.mp4"),
        dict(videos=tmp_path / "none.mp4"),
        dict(images=tmp_path / "none.png"),
        dict(images=np.zeros((3, 3))),
    ):
        with pytest.raises((ChatError, VideoError)):
            chat.ask("find heart", **wrong)
    turn = chat.prepare(f"find {thing}", videos=film)
    turn.videos[0].parts = lambda: itertools.chain(
        read_frames(film, n=20).array[None], (1 / 0 for _ in range(1))
    )  # dies on the way
    with pytest.raises(ZeroDivisionError):
        list(chat.ask(turn))
    assert chat.tokens == 0 and chat.messages == []
    assert "".join(chat.ask(f"find {thing}", videos=film)) == right


def test_a_new_conversation_while_the_old_one_is_answered(pair, film):
    "Whatever the old answer still does, it does not touch the new conversation."
    model, processor = pair
    (first, _), (second, right), *_ = answers().items()
    fresh = list(Chat(model, processor).ask(f"find {second}", videos=film))
    for when in ("between pieces", "while it reads", "at the end"):
        chat = Chat(model, processor)
        turn = chat.prepare(f"find {first}", videos=film)
        old = chat.ask(turn, max_new_tokens=20)
        if when == "while it reads":
            parts = turn.videos[0].parts
            turn.videos[0].parts = lambda: ((chat.reset(), part)[1] for part in parts())
            with pytest.raises(ChatError, match="Stopped"):
                list(old)
        else:
            next(old)
            if when == "at the end":
                next(old)
            chat.reset()
        new = chat.ask(f"find {second}", videos=film)
        pieces = [next(new)]
        assert list(old) == []  # in the middle of the new answer
        assert pieces + list(new) == fresh and "".join(fresh) == right, when
        assert [m["role"] for m in chat.messages] == ["user", "assistant"] and len(chat.turns) == 1 and not chat.busy
        assert chat.tokens + len(chat.pending) == turn.tokens + len(processor.tokenizer(right)["input_ids"])


def test_threads_share_a_model(pair, film):
    "Two answers at once on one model: each is its own, and the model's attention is what it was."
    from concurrent.futures import ThreadPoolExecutor

    model, processor = pair

    def talk(thing):
        return "".join(Chat(model, processor, chunk=16).ask(f"find {thing}", videos=film))

    with ThreadPoolExecutor(4) as pool:
        said = dict(zip(answers(), pool.map(talk, list(answers())[:6])))
    assert (
        said == {thing: answers()[thing] for thing in said}
        and model.config.get_text_config()._attn_implementation == "sdpa"
    )


def test_a_temperature_just_above_zero_takes_the_likeliest():
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert next_token(logits, 1e-38, 1.0, torch.Generator().manual_seed(0)) == 1


def test_time_stamps_are_the_processors(pair, film):
    model, processor = pair
    stamped = LongVAProcessor(processor.image_processor, processor.tokenizer, processor.chat_template, time_stamps=True)
    with pytest.raises(ChatError, match="time of each frame"):
        Chat(model, stamped).prepare("find heart", videos=np.zeros((2, 28, 28, 3), np.uint8))
    turn = Chat(model, stamped, num_frames=5).prepare("find heart", videos=film)
    assert (
        turn.ids.tolist()
        == stamped(text="<video> find heart", videos=read_frames(film, n=5), return_tensors="pt")["input_ids"][
            0
        ].tolist()
    )


# the command


def longva(*words, **more):
    return subprocess.run(
        [*COMMAND, "chat", *map(str, words)], env=ENV, capture_output=True, text=True, timeout=300, **more
    )


def test_the_command_answers_and_says_before_what_it_takes(film, tmp_path):
    picture, unseen = tmp_path / "sheet.png", needle_objects(3)
    Image.fromarray(
        np.concatenate(
            [
                draw_frame(scene, 28)
                for scene in [(OBJECTS[unseen[0]], "red", "checks"), (OBJECTS[unseen[1]], "blue", "rows")]
            ],
            1,
        )
    ).save(picture)
    things = list(answers())[:2]
    done = longva(
        "--video",
        film,
        "--image",
        picture,
        input="".join(f"find {thing}\n" for thing in (OBJECTS[unseen[1]], "dragon", *things)),
    )
    assert done.returncode == 0 and done.stdout.splitlines() == [
        "blue rows",
        *(answers()[thing] for thing in things),
    ], done
    lines = done.stderr.splitlines()
    here, there = (line for line in lines[:2])
    assert here.startswith(f"mini-longva on this CPU: {48 * 4 + 2 * 4 + 2} tokens, KV cache ") and there.startswith(
        f"LongVA-7B on one H100: {48 * 144 + 2 * 144 + 2:,} tokens, KV cache "
    )
    assert all("assumed: 40% of" in line and "in all" in line for line in (here, there))
    assert "'dragon'" in lines[2] and "find OBJECT" in lines[2]


def test_ctrl_c_keeps_what_was_said(tmp_path):
    "A model that never ends its answer, and a user who does."
    _, processor = mini.load("mini-longva")
    for seed in range(20):
        torch.manual_seed(seed)
        model = LongVA(mini_config(158, 3, 4, eos_token_id=5, pad_token_id=0)).eval()
        pieces = list(Chat(model, processor).ask("find heart", max_new_tokens=60))
        if len(pieces) == 60:
            break  # it repeats itself
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    command = [*COMMAND, "chat", "--model", str(tmp_path), "--max-new-tokens", "1000000", "find heart"]

    def listen():
        return signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever runs the tests in the background has it ignored

    running = subprocess.Popen(
        command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen
    )
    first = running.stdout.read(12)
    running.send_signal(signal.SIGINT)
    rest, errors = running.communicate(timeout=120)
    assert (
        running.returncode == 130
        and rest.endswith("\n")
        and errors.splitlines()[-1] == "Stopped."
        and "Traceback" not in errors
    )
    assert "".join(pieces).startswith(first)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="there are no pseudo-terminals here")
def test_a_terminal_asks_and_asks_again(film):
    master, slave = os.openpty()
    running = subprocess.Popen(
        [*COMMAND, "chat", "--video", film],
        env=ENV,
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(slave)
    (first, right), (other, wrong) = list(answers().items())[:2]
    os.write(master, f"find {first}\n".encode())
    assert running.stdout.readline() == f"{right}\n"
    os.write(master, f"find {other}\n\n".encode())  # the empty line ends it
    rest, errors = running.communicate(timeout=120)
    os.close(master)
    assert (
        running.returncode == 0
        and rest == f"{wrong}\n"
        and errors.startswith("Ask; ")
        and errors.count("> ") == 3
        and errors.count("LongVA-7B on one H100") == 2
    )
