"""Data sources: what each kind gives, what is odd about it, and what is refused."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import Cli
from PIL import Image

from edgewise import demos
from edgewise.calibration.data import Port, open_source
from edgewise.calibration.media import load_image
from edgewise.calibration.metric import accuracy, class_scores
from edgewise.calibration.samples import Samples, calibration_and_held_out, spread, survey
from edgewise.errors import InputError
from edgewise.runtime.video import read_frames

PIXELS = {"pixel_values": Port((1, 3, 16, 16), "float32")}
WAVES = {"input_values": Port((1, 800), "float32")}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 16, "width": 16}, "resample": 2,
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.4] * 3, "image_std": [0.3] * 3,
}  # fmt: skip


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (20, 24)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return path


def every(src: object, ports: dict[str, Port] = PIXELS, **known: object) -> Samples:
    source = open_source(src, ports, PROCESSOR, **known)  # type: ignore[arg-type]
    return survey(source, ports, range(len(source)))


def test_a_folder_goes_through_the_models_own_processor(tmp_path: Path) -> None:
    from transformers import ViTImageProcessorPil

    paths = [picture(tmp_path / f"{name}.png", i) for i, name in enumerate("cab")]
    (tmp_path / "notes.txt").write_text("no picture")
    samples = every(tmp_path)
    own = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.4] * 3, image_std=[0.3] * 3)
    for feed, path in zip(samples, sorted(paths), strict=True):
        wanted = own(Image.open(path), return_tensors="np")["pixel_values"]
        assert np.array_equal(feed["pixel_values"], wanted)
    assert samples.labels is None and "1 other files" in samples.notes[0]


@pytest.mark.parametrize(
    ("kind", "constants"),
    [
        ("ViTImageProcessor", {"size": {"height": 16, "width": 16}, "resample": 3}),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}, "resample": 3}),
    ],
)
def test_the_processor_and_its_constants_agree(tmp_path: Path, kind: str, constants: dict[str, object]) -> None:
    """Where transformers is not installed, the constants alone have to give nearly the same pixels."""
    path = picture(tmp_path / "a.png", size=(33, 47))
    processor = {**PROCESSOR, **constants, "do_center_crop": "crop_size" in constants}
    arrays = []
    for name in (kind, "unknown"):
        source = open_source(tmp_path, PIXELS, {**processor, "image_processor_type": name})
        arrays.append(source.read(0).inputs["pixel_values"])
    assert path.is_file() and np.abs(arrays[0] - arrays[1]).max() < 0.02


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    for i, name in enumerate(("dog", "cat", "cat", "bird")):
        picture(tmp_path / name / f"{i}.png", i)
    assert every(tmp_path, classes={0: "cat", 1: "dog", 2: "bird"}).labels.tolist() == [2, 0, 0, 1]  # type: ignore[union-attr]
    assert "3 folders" in every(tmp_path, classes={0: "cat", 1: "dog", 2: "bird"}).notes[0]
    for classes, words in (({}, "comes with no names"), ({0: "a", 1: "b"}, "first ones are a, b")):
        unmapped = open_source(tmp_path, PIXELS, PROCESSOR, classes)
        assert not unmapped.labelled and words in unmapped.unlabelled and "by its numbers" in unmapped.unlabelled
    with pytest.raises(InputError, match=r"unknown class .* 'bird'"):
        open_source(tmp_path, PIXELS, PROCESSOR, {0: "cat", 1: "dog"})


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_manifest(tmp_path: Path, suffix: str) -> None:
    rows = [{"file": f"pics/{i}.png", "label": i % 2, "text": f"a picture, {i}"} for i in range(4)]
    for i in range(4):
        picture(tmp_path / f"pics/{i}.png", i)
    if suffix == ".jsonl":
        text = "\n".join(map(json.dumps, rows)) + "\n\n"
    else:
        mark = "," if suffix == ".csv" else "\t"
        quote = '"' if suffix == ".csv" else ""
        text = mark.join(rows[0]) + "\n" + "\n".join(mark.join(f"{quote}{v}{quote}" for v in row.values()) for row in rows)
    (tmp_path / f"m{suffix}").write_text(text)
    samples = every(tmp_path / f"m{suffix}")
    assert samples.labels.tolist() == [0, 1, 0, 1] and samples.texts[3] == "a picture, 3"  # type: ignore[union-attr, index]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("m.csv", "", "lists no samples"),
        ("m.csv", "picture,label\na.png,1\n", "no column 'file'"),
        ("m.csv", "file,label\na.png,1,2\n", "line 2: it has 3 columns, and the first line 2"),
        ("m.csv", "file,label\na.png,-1\n", "the label '-1' is no class number"),
        ("m.csv", "file,label\na.png,1_0\n", "unknown class at"),
        ("m.csv", "file,label,label\na.png,1,1\n", "the column 'label' more than once"),
        ("m.csv", "file, label\na.png,1\n./a.png,\n", "line 3: there is no label, and other lines have one"),
        ("m.csv", "file,label\na.png,1\n./a.png,0\n", "has the labels 1 and 0"),
        ("m.csv", "file,label\na.png,ct\n", "unknown class at .* did you mean 'cat'"),
        ("m.jsonl", '{"file": "a.png", "label": 1.5}\n', "the label 1.5 is no class number"),
        ("m.jsonl", '{"file": \n', "line 1 is not JSON"),
        ("m.jsonl", "[1]\n", "no JSON object"),
        ("m.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("m.jsonl", '{"file": "a.png", "label": 1e400}\n', "unknown class"),
        ("m.jsonl", '{"file": "a.png", "label": 99999999999999999999}\n', "is no class number of 0 to"),
        ("a" * 300 + ".csv", None, "cannot read .*too long"),
        ("a" * 300 + ".npz", None, "cannot read .*too long"),
        ("m.txt", "a.png", "data is read from folders"),
    ],
)
def test_manifests_that_are_refused(tmp_path: Path, name: str, text: str | None, words: str) -> None:
    picture(tmp_path / "a.png")
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words):
        open_source(tmp_path / name, PIXELS, PROCESSOR, {0: "cat", 1: "dog"})


def test_labels_that_no_class_has_and_names_that_no_file_has(tmp_path: Path) -> None:
    pixels = np.zeros((2, 3, 8, 8), np.float32)
    for labels in ([-1, 0], [2**40, 0]):
        with pytest.raises(InputError, match="no class number"):
            every({"pixels": pixels, "labels": np.array(labels)}, {"pixels": Port((1, 3, 8, 8), "float32")})
    (tmp_path / "m.csv").write_text("file,text\n" + "a" * 5000 + ".png,one\n")
    with pytest.raises(InputError, match="none of 1 samples can be used: cannot read"):
        every(tmp_path / "m.csv")


def test_text_of_several_lines(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    for name, text in [("m.csv", 'file,text\na.png,"one\ntwo\u2028three"\n'),
                       ("m.jsonl", '{"file": "a.png", "text": "one\\ntwo\u2028three"}\n')]:
        (tmp_path / name).write_text(text, "utf-8")
        assert every(tmp_path / name).texts == ("one\ntwo\u2028three",)


def test_bad_files_are_counted_and_named(tmp_path: Path) -> None:
    for i in range(10):
        picture(tmp_path / f"{i}.png", i)
    (tmp_path / "3.png").write_bytes(b"no picture")
    samples = every(tmp_path)
    assert samples.count == 9 and 3 not in samples.indices
    (note,) = samples.notes
    assert "1 of 10 samples were left out" in note and "3.png" in note
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"5 of 10 samples cannot be used, more than 20%: .*0\.png.*and 2 more"):
        every(tmp_path)


def test_one_sample_and_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no image files"):
        open_source(tmp_path, PIXELS, PROCESSOR)
    picture(tmp_path / "a.png")
    made, _ = calibration_and_held_out(open_source(tmp_path, PIXELS, PROCESSOR), PIXELS, 128)
    assert made.count == 1 and "statistics of 1 samples are rough" in made.notes[-1]
    with pytest.raises(InputError, match="one sample, and an accuracy needs others"):
        calibration_and_held_out(open_source(tmp_path, PIXELS, PROCESSOR), PIXELS, 128, 10)


def test_recordings_are_resampled(tmp_path: Path) -> None:
    for i, rate in enumerate((8000, 8000, 16000)):
        wave = np.sin(np.arange(rate // 10) * 2 * np.pi * 440 / rate) * 0.5
        soundfile.write(tmp_path / f"{i}.wav", wave, rate)
    source = open_source(tmp_path, WAVES, {"sampling_rate": 8000})
    samples = survey(source, WAVES, range(3))
    assert samples.notes == (f"{tmp_path}: 1 of 3 samples were resampled from 16000 to 8000 Hz",)
    a, b = (source.read(i).inputs["input_values"] for i in (0, 2))
    assert np.abs(a - b)[100:-100].max() < 0.02


def test_videos(tmp_path: Path) -> None:
    """A video file, and a folder of its frames."""
    import av

    ports = {"pixel_values": Port((1, 4, 3, 16, 16), "float32")}
    frames = [np.full((32, 32, 3), 60 * i, np.uint8) for i in range(4)]
    with av.open(str(tmp_path / "b.mkv"), "w") as file:
        stream = file.add_stream("ffv1", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv444p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    (tmp_path / "a").mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "a" / f"{i}.png")
    a, b = (feed["pixel_values"] for feed in every(tmp_path, ports))
    assert a.shape == (1, 4, 3, 16, 16) and np.abs(a - b).max() < 0.1
    assert np.all(np.diff(a.mean((0, 2, 3, 4))) > 0.5)


def test_arrays(tmp_path: Path) -> None:
    arrays = {"pixel_values": np.zeros((5, 3, 16, 16), np.float32), "labels": np.arange(5)}
    np.savez(tmp_path / "d.npz", texts=np.array(list("abcde")), **arrays)
    samples = every(tmp_path / "d.npz")
    assert samples.labels.tolist() == list(range(5)) and samples.texts == tuple("abcde")  # type: ignore[union-attr]
    arrays["pixel_values"][2, 0, 0, 0] = np.nan
    assert "left out: sample 2 of the data: pixel_values holds NaN" in every(arrays).notes[0]
    for change, words in (
        ({"labels": np.arange(4)}, "different numbers of samples"),
        ({"labels": np.zeros(5)}, "whole numbers"),
        ({"pixel_values": np.zeros((5, 3, 8, 8), np.float32)}, r"takes \(3, 16, 16\)"),
        ({"pixel_values": np.zeros((5, 3, 16, 16), complex)}, "is complex128"),
        ({"pixel_values": np.zeros((0, 3, 16, 16)), "labels": np.zeros(0, int)}, "has no samples"),
    ):
        with pytest.raises(InputError, match=words):
            open_source({**arrays, **change}, PIXELS)


def test_iterables() -> None:
    one = np.ones((3, 16, 16), np.float32)
    assert every(one * i for i in range(3)).count == 3
    pairs = every([({"pixel_values": one[None]}, 1), ({"pixel_values": one}, 0)])
    assert pairs.labels.tolist() == [1, 0]  # type: ignore[union-attr]
    with pytest.raises(InputError, match="none of 1 samples can be used: item 0 of the data: pixel_values has shape"):
        every([one[:1]])
    for src, words in (([], "no samples"), (3, "int is no data"), ([(one, 1, 2)], "is a tuple")):
        with pytest.raises(InputError, match=words):
            open_source(src, PIXELS)


def test_a_demo() -> None:
    ports = {"pixel_values": Port((1, 1, 56, 56), "float32")}
    source = open_source("demo:digits", ports)
    made, held_out = calibration_and_held_out(source, ports, 100, 50)
    assert made.count == 100 and held_out is not None and held_out.count == 50
    assert not set(made.indices) & set(held_out.indices)
    assert held_out.labels.tolist() == demos.split("digits").labels[list(held_out.indices)].tolist()  # type: ignore[union-attr]
    with pytest.raises(InputError, match="did you mean 'digits'"):
        open_source("demo:digit", ports)


def test_the_digest_is_of_the_data() -> None:
    arrays = {"pixel_values": np.random.default_rng(0).random((4, 3, 16, 16)).astype(np.float32)}
    assert every(arrays).digest == every(dict(arrays)).digest
    other = arrays["pixel_values"].copy()
    other[3, 2, 1, 0] += 1e-6
    assert every({"pixel_values": other}).digest != every(arrays).digest
    assert every({**arrays, "labels": np.zeros(4, int)}).digest != every(arrays).digest


def test_spread_and_batches() -> None:
    assert spread(10, 4) == [0, 3, 6, 9] and spread(3, 9) == [0, 1, 2] and spread(7, 1) == [0]
    ports = {"x": Port((4, 1), "float32")}
    source = open_source({"x": np.arange(6, dtype=np.float32)[:, None]}, ports)
    samples = survey(source, ports, range(6))
    assert len(samples) == 2 and [feed["x"][:, 0].tolist() for feed in samples] == [[0, 1, 2, 3], [4, 5, 5, 5]]


def test_memory_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    peaks = []
    for count in (10, 40):
        for i in range(count):
            picture(tmp_path / str(count) / f"{i}.png", i)
        ports = {"pixel_values": Port((1, 3, 128, 128), "float32")}
        source = open_source(tmp_path / str(count), ports, {})
        source.read(0)  # what is loaded once
        tracemalloc.start()
        for _ in survey(source, ports, range(count)):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_images_of_every_mode_are_what_the_processor_gets(tmp_path: Path) -> None:
    """Grey of 16 bits keeps its range, all that shines through is white, and what EXIF turns is turned."""
    plain = {**PROCESSOR, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    half = np.zeros((16, 16, 3), np.uint8)
    half[:8] = 255
    turned = Image.fromarray(half)
    exif = turned.getexif()
    exif[0x0112] = 3  # upside down
    grey = np.full((16, 16), 20000, np.uint16)
    clear = Image.new("P", (16, 16))
    clear.putpalette([0, 0, 0, 255, 0, 0])
    images = {
        "grey.png": (Image.fromarray(grey), {}, 20000 / 65535),
        "grey.tif": (Image.fromarray(grey), {}, 20000 / 65535),
        "la.png": (Image.new("LA", (16, 16), (0, 0)), {}, 1),
        "rgba.png": (Image.new("RGBA", (16, 16), (0, 0, 0, 0)), {}, 1),
        "palette.png": (clear, {"transparency": 0}, 1),
        "cmyk.jpg": (Image.new("CMYK", (16, 16), (0, 0, 0, 255)), {}, 0),
        "turned.png": (turned, {"exif": exif}, None),
    }
    for name, (image, known, wanted) in images.items():
        image.save(tmp_path / name, **known)
        pixels = load_image(tmp_path / name, (3, 16, 16), plain).array
        if wanted is None:
            assert pixels[:, :8].max() < 0.01 and pixels[:, 8:].min() > 0.99
        else:
            assert np.abs(pixels - wanted).max() < 0.01, name
    for kind in (np.float32, np.int32):
        Image.fromarray(np.full((16, 16), 1, kind)).save(tmp_path / "wide.tif")
        with pytest.raises(InputError, match=r"wide\.tif holds .* does not say which is white"):
            load_image(tmp_path / "wide.tif", (3, 16, 16), plain)


@pytest.mark.parametrize("name", ["CLIPImageProcessor", "unknown"])
def test_images_that_processors_cannot_take_are_named(tmp_path: Path, name: str) -> None:
    """Of a line of pixels, centre crops would make gigabytes first."""
    for i in range(2):
        picture(tmp_path / f"{i}.png", size=(20, 20))
    picture(tmp_path / "long.png", size=(40000, 1))
    crop = {"size": {"shortest_edge": 224}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}
    processor = {**PROCESSOR, "image_processor_type": name, **crop}
    with pytest.raises(InputError, match=r"1 of 3 samples cannot be used.*long.png: an image of 1 x 40000 pixels becomes 224 x"):
        source = open_source(tmp_path, PIXELS, processor)
        survey(source, PIXELS, range(3))


def test_what_a_processor_refuses_is_an_input_error(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png: ViTImageProcessor cannot make pixels of it: "):
        open_source(tmp_path, PIXELS, {**PROCESSOR, "image_mean": [0.5, 0.5]}).read(0)


@pytest.mark.parametrize("mask", [False, True])
def test_short_waveforms_are_normalised_as_by_the_extractor(tmp_path: Path, mask: bool) -> None:
    from transformers import Wav2Vec2FeatureExtractor

    wave = np.sin(np.arange(500) / 9) * 0.3 + 0.1
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="FLOAT")
    constants = {"do_normalize": True, "sampling_rate": 16000, "padding_value": 0.0, "return_attention_mask": mask}
    own = Wav2Vec2FeatureExtractor(**constants)
    wanted = own(wave.astype(np.float32), sampling_rate=16000, padding="max_length", max_length=800, return_tensors="np")
    found = open_source(tmp_path, WAVES, constants).read(0).inputs["input_values"]
    assert np.abs(found - wanted["input_values"][0]).max() < 1e-5


def test_frames_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for i in range(1, 13):
        Image.new("RGB", (8, 8), (i * 20, 0, 0)).save(tmp_path / f"frame{i}.png")
    assert [frame.getpixel((0, 0))[0] // 20 for frame in read_frames(tmp_path, 12)] == list(range(1, 13))  # type: ignore[index]


def test_accuracy_is_of_class_scores_and_of_labels_that_are_classes() -> None:
    def run(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"output": np.eye(3, dtype=np.float32)[feed["x"][:, 0].astype(int)]}

    ports = {"x": Port((2, 1), "float32")}
    x = np.array([[0], [1], [2]], np.float32)
    for label, right in ((2, 1.0), (1, 2 / 3)):
        assert accuracy(run, every({"x": x, "labels": np.array([0, 1, label])}, ports)) == right
    for label in (3,):
        with pytest.raises(InputError, match=rf"sample 2 of the data has the label {label}, and the model has classes 0 to 2"):
            accuracy(run, every({"x": x, "labels": np.array([0, 1, label])}, ports))
    both = {"hidden": ((2, 9, 8), "float32"), "pooler_output": ((2, 8), "float32")}
    with pytest.raises(InputError, match=r"pooler_output holds features, and no scores"):
        class_scores(both, 2)
    assert class_scores({**both, "output": ((2, 3), "float32")}, 2) == "output"
    assert class_scores({**both, "output": ((2, 3), "float32"), "logits": ((2, 3), "float32")}, 2) == "logits"


def test_a_file_that_is_listed_twice_is_taken_once(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", 1)
    (tmp_path / "m.csv").write_text("file,label\na.png,1\nb.png,0\n./a.png,1\n")
    source = open_source(tmp_path / "m.csv", PIXELS, PROCESSOR)
    made, held_out = calibration_and_held_out(source, PIXELS, 2, 2)
    assert len(source) == 2 and held_out is not None and not set(made.indices) & set(held_out.indices)
    assert "1 samples are of files that were there before" in made.notes[0]


def test_images_beside_folders_of_classes_are_refused(tmp_path: Path) -> None:
    for name in ("a.png", "cat/b.png"):
        picture(tmp_path / name)
    with pytest.raises(InputError, match=r"image files \(a\.png, \.\.\.\) and folders of them by class \(cat"):
        open_source(tmp_path, PIXELS, PROCESSOR, {0: "cat"})


def test_items_as_torch_gives_them() -> None:
    import torch

    one = torch.ones(3, 16, 16, dtype=torch.bfloat16)
    samples = every([[one, torch.tensor(1)], [one, np.array(0)], (one, 2)])
    assert samples.labels.tolist() == [1, 0, 2]  # type: ignore[union-attr]
    assert samples.source.read(0).inputs["pixel_values"].max() == 1
    small = {"x": Port((1, 1), "float32")}
    many = [np.zeros(1, np.float32)] * 1100
    assert len(open_source(many, small)) == 1100
    cut = open_source(iter(many), small)
    assert len(cut) == 1024 and "only the first 1024 items" in cut.notes[0]

    def broken() -> Iterator[np.ndarray]:
        yield many[0]
        raise OSError("no disk")

    with pytest.raises(InputError, match="gone through: OSError: no disk"):
        open_source(broken(), small)


def test_folders_are_classes_by_the_names_of_the_model(cli: Cli, tmp_path: Path) -> None:
    """In another order than the model's; names that it does not know are not guessed at, and what was done is in the JSON."""
    torch = pytest.importorskip("torch")
    import transformers

    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        id2label={0: "zebra", 1: "ant"},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.ViTForImageClassification(config).eval()
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    for i in range(6):
        picture = Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8))
        with torch.no_grad():
            label = int(model(torch.tensor(np.array(processor(picture)["pixel_values"]))).logits.argmax())
        (tmp_path / "data" / config.id2label[label]).mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "data" / config.id2label[label] / f"{i}.png")
    assert cli("export", tmp_path / "model", "-o", tmp_path / "b", "--target", "onnxruntime").code == 0
    said = json.loads(cli("verify", tmp_path / "b", "--data", tmp_path / "data", "--json").out)
    assert said["accuracy"][0]["top1"] == 1 and "classes by their names in the model" in said["notes"][0]
    for i, folder in enumerate((tmp_path / "data").iterdir()):
        folder.rename(tmp_path / "data" / f"n0{i}x")
    said = cli("verify", tmp_path / "b", "--data", tmp_path / "data")
    said.refused("not known to the model by name (its first ones are zebra, ant)")


def test_numbers_are_names_only_where_all_are(tmp_path: Path) -> None:
    """Stars from 1 to 5 are the classes 0 to 4."""
    stars = {i: str(i + 1) for i in range(5)}
    for folder, first in (("indices", 0), ("names", 1)):
        for i in range(first, first + 3):
            picture(tmp_path / folder / str(i) / "a.png", i)
        assert every(tmp_path / folder, classes=stars).labels.tolist() == [0, 1, 2]  # type: ignore[union-attr]
        rows = "".join(f"{folder}/{i}/a.png,{i}\n" for i in range(first, first + 3))
        (tmp_path / f"{folder}.csv").write_text("file,label\n" + rows)
        assert every(tmp_path / f"{folder}.csv", classes=stars).labels.tolist() == [0, 1, 2]  # type: ignore[union-attr]
    twice = {0: "cat", 1: "crane", 2: "crane"}
    for name in ("cat", "2"):
        picture(tmp_path / "birds" / name / "a.png")
    assert every(tmp_path / "birds", classes=twice).labels.tolist() == [2, 0]  # type: ignore[union-attr]
    picture(tmp_path / "birds" / "crane" / "a.png")
    with pytest.raises(InputError, match="several classes named 'crane': give the number"):
        open_source(tmp_path / "birds", PIXELS, PROCESSOR, twice)


def test_files_that_cannot_be_and_texts_of_one_file(tmp_path: Path) -> None:
    for i in range(6):
        picture(tmp_path / f"{i}.png", i)
    (tmp_path / "loop.png").symlink_to("loop.png")
    lines = [json.dumps({"file": name, "label": 1}) for name in ("0.png", "1.png", "2.png", "3.png", "4.png", "5.png", "loop.png")]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    assert "1 of 7 samples were left out" in (said := " ".join(every(tmp_path / "m.jsonl").notes)) and "loop.png" in said
    (tmp_path / "z.jsonl").write_text(json.dumps({"file": "\0.png"}))
    with pytest.raises(InputError, match="none of 1 samples can be used"):
        every(tmp_path / "z.jsonl")
    (tmp_path / "q.csv").write_text("file,text,question,answer\n0.png,a caption,what?,red\n1.png,,what?,blue\n")
    assert every(tmp_path / "q.csv").texts == ("red", "blue")
    (tmp_path / "t.csv").write_text("file,question,answer\n0.png,what?,red\n0.png,what?,blue\n")
    with pytest.raises(InputError, match=r"0\.png has the texts 'red' and 'blue'"):
        open_source(tmp_path / "t.csv", PIXELS, PROCESSOR)
