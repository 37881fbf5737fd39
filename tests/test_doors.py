"""One table of odd pictures and one of odd videos, through every door by which pictures and videos come in.

Each odd file shows the same as a plain one, so every door must give the same for both: upright, on white, in eight
bits, with square pixels. What a file shows is drawn here, pixel by pixel.
"""

import json
import resource
import socket
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from longva import mini
from longva.lmms.visuals import Splice, part_of, read_video, splice_frames
from longva.model.chat import Chat
from longva.needle.haystack import Haystack
from longva.needle.needles import Needle, load_needles
from longva.train.rows import Row
from longva.train.samples import Reading, read_row, row_length
from longva.vision.image import is_picture, open_image, upright_size
from longva.vision.unires import fit_frames
from longva.vision.video import iter_frames, read_frames, video_info
from longva.web.visit import read_film, read_picture
from longva.workbench.widgets import read_upload

W, H = 48, 32
CLOSE = 6  # of 255, on average over a picture: what JPEG and YUV cost


def scene(width=W, height=H):
    "Left half orange with a blue corner at the top, right half white: no two turns of it are the same."
    pixels = np.full((height, width, 3), 255, np.uint8)
    pixels[:, : width // 2] = (230, 120, 20)
    pixels[: height // 2, : width // 4] = (20, 40, 200)
    return pixels


def grey_scene(levels=256):
    "Left half a ramp of greys, right half white."
    ramp = np.full((H, W), levels - 1)
    ramp[:, : W // 2] = np.linspace(0, levels - 1, W // 2).astype(int)
    return ramp


def as_grey():
    return grey_scene().astype(np.uint8)[..., None].repeat(3, 2)


def turned(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def phone(path):
    "As a telephone held upright writes it: on its side, with a note."
    Image.fromarray(np.rot90(scene())).save(path, quality=100, subsampling=0, exif=turned(6))
    return scene()


def mirrored(path):
    Image.fromarray(scene()[:, ::-1]).save(path, exif=turned(2))
    return scene()


def cut_out(path):
    "White where nothing is to be seen, though black is hidden there."
    pixels = np.dstack([scene(), np.full((H, W), 255, np.uint8)])
    pixels[:, W // 2 :] = 0
    Image.fromarray(pixels).save(path)
    return scene()


def grey_cut_out(path):
    pixels = np.dstack([grey_scene(), np.full((H, W), 255)]).astype(np.uint8)
    pixels[:, W // 2 :] = 0
    Image.fromarray(pixels, "LA").save(path)
    return as_grey()


def palette_cut_out(path):
    "Mode PA: a palette, and how opaque each pixel is."
    picture = Image.fromarray(scene()).quantize(8).convert("PA")
    alpha = Image.fromarray(np.where(np.arange(W) < W // 2, 255, 0).astype(np.uint8)[None].repeat(H, 0))
    picture.putalpha(alpha)
    assert picture.mode == "PA"
    picture.save(path)
    return scene()


def palette_with_hole(path):
    "One colour of the palette, black, is declared transparent."
    index = np.zeros((H, W), np.uint8)
    index[:, : W // 2] = 1
    index[: H // 2, : W // 4] = 2
    picture = Image.fromarray(index, "P")
    picture.putpalette([0, 0, 0, 230, 120, 20, 20, 40, 200])
    picture.save(path, transparency=0)
    return scene()


def deep(path):
    Image.fromarray(grey_scene(65536).astype(np.uint16)).save(path)
    return as_grey()


def deep_big_endian(path):
    Image.fromarray(grey_scene(65536).astype(">u2")).save(path)
    return as_grey()


def deep_with_hole(path):
    "Sixteen bits of grey, and the level 7 is declared transparent."
    levels = grey_scene(65536)
    levels[:, W // 2 :] = 7
    Image.fromarray(levels.astype(np.uint16)).save(path, transparency=7)
    return as_grey()


def for_print(path):
    Image.fromarray(scene()).convert("CMYK").save(path, quality=100, subsampling=0)
    return scene()


def one_bit(path):
    bits = np.zeros((H, W), bool)
    bits[:, W // 2 :] = True
    Image.fromarray(bits).save(path)
    return np.where(bits, 255, 0).astype(np.uint8)[..., None].repeat(3, 2)


def thin(path):
    Image.fromarray(scene(3000, 4)).save(path)
    return scene(3000, 4)


def phone_pair(path):
    "An MPO: one photo with a preview behind it."
    small = Image.fromarray(scene()).resize((12, 8))
    Image.fromarray(scene()).save(path, "MPO", save_all=True, append_images=[small], quality=100, subsampling=0)
    return scene()


PICTURES = {
    "phone.jpg": phone,
    "mirrored.png": mirrored,
    "cut out.png": cut_out,
    "cut out.webp": cut_out,
    "grey cut out.png": grey_cut_out,
    "palette cut out.tif": palette_cut_out,
    "hole.png": palette_with_hole,
    "hole.gif": palette_with_hole,
    "deep.png": deep,
    "deep.tif": deep_big_endian,
    "deep hole.png": deep_with_hole,
    "print.jpg": for_print,
    "print.tif": for_print,
    "bits.png": one_bit,
    "bits.tif": one_bit,
    "thin.png": thin,
    "pair.jpg": phone_pair,
}


@pytest.fixture(scope="module")
def model_and_processor():
    return mini.load("mini-longva")


@pytest.fixture(scope="module")
def plain_film(tmp_path_factory):
    return write_mini_video(tmp_path_factory.mktemp("plain") / "plain.mov", [scene()] * 4)


def row_of(path, kind):
    "A training row that names one file."
    talk = [{"from": "human", "value": f"<{kind}> find star"}, {"from": "gpt", "value": "red dots"}]
    return Row(str(path.parent / "rows.jsonl"), 1, {"conversations": talk, kind: path.name})


def needle_folder(path, _):
    row = dict(image=path.name, question="find star", answer="red dots")
    (path.parent / "needles.json").write_text(json.dumps([row]))
    return load_needles(path.parent)[0].image


def single_needle(path, _):
    return Needle("x", Image.open(path), "find star", "red dots").image


def needle_upload(path, _):
    return read_picture(path, side=3000)


def explorer_upload(path, _):
    picture, size = read_upload(path.read_bytes())
    assert size == upright_size(path)
    return picture.resize(size)


def chat_turn(path, parts):
    return Chat(*parts).prepare("find star", images=[path]).images[0][0]


def processor_call(path, parts):
    return parts[1](text="<image> find star", images=path)["pixel_values"]


def processor_of_bytes(path, parts):
    return parts[1](text="<image> find star", images=path.read_bytes())["pixel_values"]


def lmms_document(path, parts):
    part = part_of(path)
    assert part["type"] == "image"
    return parts[1].image_processor(part["url"])["pixel_values"]


def training_row(path, parts):
    row = row_of(path, "image")
    reading = Reading(parts[1])
    sample = read_row(row, reading)
    assert len(sample["input_ids"]) == row_length(row, reading)  # counted by the header alone
    return sample["pixel_values"]


def video_box(path, _):
    assert video_info(path)[3:] == upright_size(path)
    return read_frames(path).array[0]


def folder_of_frames(path, _):
    folder = path.parent / "frames"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    (folder / path.with_suffix(".png" if path.suffix == ".gif" else path.suffix).name).write_bytes(path.read_bytes())
    return read_frames(folder).array[0]


PICTURE_DOORS = [
    needle_folder, single_needle, needle_upload, explorer_upload, chat_turn, processor_call, processor_of_bytes,
    lmms_document, training_row, video_box, folder_of_frames,
]


def close(got, want):
    "Do two pictures, or their normalised pixels, show the same?"
    got = np.asarray(got).astype(float)
    want = np.asarray(want).astype(float)
    assert got.shape == want.shape
    off = np.abs(got - want).mean()
    return off <= CLOSE if want.max() > 50 else off <= CLOSE / 68  # a standard deviation is about 68 of 255


@pytest.mark.parametrize("name", PICTURES)
def test_odd_pictures_look_the_same_through_every_door(name, tmp_path, model_and_processor, plain_film):
    want = PICTURES[name](tmp_path / name)
    Image.fromarray(want).save(tmp_path / "plain.png")
    assert close(open_image(tmp_path / name), want) and is_picture(tmp_path / name)
    for door in PICTURE_DOORS:
        got = door(tmp_path / name, model_and_processor)
        assert close(got, door(tmp_path / "plain.png", model_and_processor)), door.__name__
    spliced = splice_frames(Splice(str(plain_film), 4, str(tmp_path / name), 2), 28)[2]
    assert close(spliced, fit_frames(want[None], 28, "pad")[0])


# --- videos


def write_mini_video(path, frames, codec="png", pixels="rgb24", aspect=None):
    "Frames [H,W,3 or 4] in a file, without loss where the codec can."
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=5)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for frame in frames:
            kind = "rgba" if frame.shape[2] == 4 else "rgb24"
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), kind)
            out.mux(stream.encode(picture.reformat(format=pixels)))
        out.mux(stream.encode())
    return path


def hidden():
    "The scene with nothing in its white half, where black is hidden."
    pixels = np.dstack([scene(), np.full((H, W), 255, np.uint8)])
    pixels[:, W // 2 :] = 0
    return pixels


def alpha_png(path):
    write_mini_video(path, [hidden()] * 4, pixels="rgba")


def alpha_animation(path):
    write_mini_video(path, [hidden()] * 4, "qtrle", "argb")


def alpha_gif(path):
    frames = [Image.fromarray(hidden()) for _ in range(4)]
    for k, frame in enumerate(frames):
        frame.putpixel((0, H - 1), (k, 0, 0, 255))  # or Pillow takes them for one
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=200, disposal=2)


def on_its_side(path):
    "Packets with a display matrix, as a telephone writes them."
    source = write_mini_video(path.with_suffix(".side.mov"), [np.rot90(scene(), -1)] * 4)
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        copy = new.add_stream_from_template(old.streams.video[0])
        copy.set_display_rotation(90)
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = copy
                new.mux(packet)


def wide_pixels(path):
    write_mini_video(path, [scene()[:, ::2]] * 4, "libx264", "yuv444p", Fraction(2, 1))


def time_lapse(path):
    "JPEG frames that carry an EXIF block with a turn, which FFmpeg hands on as side data without a name in PyAV."
    phone(path.with_suffix(".jpg"))
    with av.open(str(path), "w") as out, av.open(str(path.with_suffix(".jpg"))) as source:
        stream = out.add_stream_from_template(source.streams.video[0])
        packet = next(p for p in source.demux(video=0) if p.size)
        for k in range(4):
            again = av.Packet(bytes(packet))
            again.stream = stream
            again.time_base = Fraction(1, 5)
            again.is_keyframe = True
            again.pts = again.dts = k
            again.duration = 1
            out.mux(again)


def sixteen_bits(path):
    write_mini_video(path, [scene()] * 4, "ffv1", "gbrp16le")


VIDEOS = {
    "alpha.mov": alpha_png,
    "alpha animation.mov": alpha_animation,
    "alpha.gif": alpha_gif,
    "side.mov": on_its_side,
    "wide.mkv": wide_pixels,
    "lapse.mov": time_lapse,
    "deep.mkv": sixteen_bits,
}


def whole(path, _):
    assert video_info(path)[3:] == (W, H)
    return read_frames(path).array


def in_parts(path, _):
    return np.concatenate([part.array for part in iter_frames(path, batch=3)])


def haystack(path, _):
    return Haystack(path, fit="pad").frames(4, 28).array


def film_box(path, _):
    return read_film(path, 28, side=56)[1]


def lmms_video(path, _):
    return read_video(part_of(path) | {"type": "video"}, 28, frames=4).array


def processor_video(path, parts):
    return parts[1](text="<video> find star", videos=str(path), num_frames=4)["pixel_values_videos"]


def chat_video(path, parts):
    (video,) = Chat(*parts).prepare("find star", videos=[path]).videos
    return np.concatenate(list(video.parts()))


def training_video(path, parts):
    row = row_of(path, "video")
    reading = Reading(parts[1], fps=5.0)
    sample = read_row(row, reading)
    assert len(sample["input_ids"]) == row_length(row, reading)
    return sample["pixel_values_videos"]


VIDEO_DOORS = [
    whole, in_parts, haystack, film_box, lmms_video, processor_video, chat_video, training_video,
]


@pytest.mark.parametrize("name", VIDEOS)
def test_odd_videos_look_the_same_through_every_door(name, tmp_path, model_and_processor, plain_film):
    VIDEOS[name](tmp_path / name)
    got = read_frames(tmp_path / name).array
    assert got.shape == (4, H, W, 3) and all(close(frame, scene()) for frame in got)
    assert not is_picture(tmp_path / name)
    for door in VIDEO_DOORS:
        got = door(tmp_path / name, model_and_processor)
        assert close(got, door(plain_film, model_and_processor)), door.__name__


# --- what no door opens

ADDRESSES = ["https://example.invalid/a.png", "http://127.0.0.1:9/a.png", "s3://bucket/a.png"]
OPENERS = {
    "open_image": lambda name, parts: open_image(name),
    "processor": lambda name, parts: parts[1](text="<image> find star", images=name),
    "image processor": lambda name, parts: parts[1].image_processor(name),
    "chat": lambda name, parts: Chat(*parts).prepare("find star", images=[name]),
    "row": lambda name, parts: read_row(Row("rows.jsonl", 1, row_of(Path("x"), "image").data | {"image": name}),
                                        Reading(parts[1])),
    "template": lambda name, parts: parts[1].apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "url": name}, {"type": "text", "text": "find star"}]}],
        tokenize=True, return_dict=True, add_generation_prompt=True),
}


@pytest.mark.parametrize("door", OPENERS)
def test_no_door_fetches_a_picture(door, model_and_processor, monkeypatch):
    def looked_up(*address, **more):
        raise AssertionError(f"looked up {address[0]}")

    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, looked_up)
    for address in ADDRESSES:
        with pytest.raises(ValueError, match="is an address, and nothing is fetched from the network"):
            OPENERS[door](address, model_and_processor)


def test_a_large_picture_is_refused_before_it_is_unpacked(tmp_path):
    "20 kB that unpack to half a gigabyte: 13000 x 13000 pixels of one bit."
    row = zlib.compress(b"\0" * (1 + 13000 // 8) * 13000, 9)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 13000, 13000, 1, 0, 0, 0, 0))
    path = tmp_path / "large.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", row) + chunk(b"IEND", b""))
    assert path.stat().st_size < 50_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for call in (open_image, needle_upload, folder_of_frames, video_box):
        with pytest.raises(ValueError, match="13000 x 13000 pixels, and at most 50 million") as error:
            call(path) if call is open_image else call(path, None)
        assert str(error.value).count(".") <= 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_programs_and_playlists_are_no_pictures(tmp_path):
    "Pillow would hand a PostScript file to Ghostscript, and takes an MPEG video for a picture."
    files = {
        "a.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "a.mpg": b"\0\0\1\xb3\1\0\x10\x13",
        "a.m3u8": b"#EXTM3U\n",
        "a.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data * 20)
        assert not is_picture(tmp_path / name)
        with pytest.raises(ValueError, match="cannot be read as an image"):
            open_image(tmp_path / name)
