"""Audio-language models end to end: how recording and text are joined is learned, and what a bundle generates is compared token for
token.

`benchmarks/audio_families.py` exports all families to both runtimes, plain and compressed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audio_families import BINS, FAMILIES, FRAMES, MARK, REAL, check, make
from conftest import Cli
from vlm_families import noise

import edgewise
from edgewise.errors import InputError, Refused
from edgewise.exporter.capture import capture
from edgewise.exporter.pipeline.media import AUDIO, AudioEncoder
from edgewise.exporter.pipeline.seam import learn


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> edgewise.Bundle:
    return check("qwen2-audio", "", tmp_path_factory.mktemp("audio") / "b", ("openvino", "onnxruntime"))


@pytest.fixture(scope="module")
def pipeline(plain: edgewise.Bundle) -> Iterator[Any]:
    with edgewise.load(plain, target="openvino") as loaded:
        yield loaded


def wave(seconds: float) -> np.ndarray:
    time = np.arange(int(16000 * seconds)) / 16000
    hiss = 0.1 * np.random.default_rng(0).normal(size=len(time))
    return (np.sin(2 * np.pi * (200 + 900 * time) * time) + hiss).astype(np.float32)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_encoder_and_the_seam_are_found(name: str) -> None:
    """With a mask of the recording's frames settled, the graph is static, and right for another recording."""
    model, example = make(name)
    features = example.pop("input_features")
    settled = AUDIO.settled(model, features, example)
    seam, rung = learn(AUDIO, model, features, settled, 12, 0)
    assert rung.passed and seam.rule == "causal" and seam.dense
    assert seam.advance == {"qwen2-audio": 20, "audioflamingo3": 20, "voxtral": 25, "glmasr": 10, "granite-speech": 50}[name]
    program = capture(AudioEncoder(model, settled), (features,))
    other = noise(*features.shape, seed=9)
    with torch.no_grad():
        wanted = AudioEncoder(model, settled)(other)["audio"]
        torch.testing.assert_close(program.module()(other)["audio"], wanted, rtol=1e-4, atol=1e-5)


def test_a_mask_is_given_where_the_model_wants_one() -> None:
    for name, mask in (("qwen2-audio", "feature_attention_mask"), ("granite-speech", None)):
        model, example = make(name)
        made = AUDIO.settled(model, example["input_features"], {})
        assert list(made) == ([mask] if mask else []) and all(bool(one.all()) for one in made.values())


def test_constants_are_given_where_the_layout_is_known() -> None:
    """Features of Granite are (1, frames, bins), which no other name of its configuration tells."""
    for name in FAMILIES:
        model, example = make(name)
        features = example.pop("input_features")
        constants = AUDIO.constants(model, features)
        assert constants.get("feature_size") == (None if name == "granite-speech" else BINS), name
        assert ("frames" in AUDIO.settings(model, features, example, constants)) == bool(constants)


def changed(bundle: edgewise.Bundle, preprocessing: dict[str, Any], **settings: Any) -> edgewise.Bundle:
    about = bundle.manifest.pipeline
    assert about is not None
    known = {k: v for k, v in {**about.settings, **settings}.items() if v is not None}
    update = {"preprocessing": preprocessing, "pipeline": about.model_copy(update={"settings": known})}
    return edgewise.Bundle(bundle.path, bundle.manifest.model_copy(update=update))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frames": None}, f"frames of the pipeline is None, and a number from 1 to {FRAMES}"),
        ({"frames": "80"}, "frames of the pipeline is '80'"),
        ({"frames": FRAMES + 1}, "frames of the pipeline is 101"),
        ({"processor_tokens": "x"}, "processor_tokens of the pipeline is 'x', and a number from 1 on"),
        ({"processor_tokens": 0}, "processor_tokens of the pipeline is 0"),
    ],
)
def test_wrong_settings_are_found_as_it_is_loaded(plain: edgewise.Bundle, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        edgewise.load(changed(plain, plain.manifest.preprocessing, **wrong), target="openvino")


def test_without_an_extractor_the_array_alone_is_taken(plain: edgewise.Bundle, pipeline: Any) -> None:
    features = noise(1, BINS, FRAMES).numpy()
    wanted = pipeline.generate(input_ids=[1, MARK, 2], audio=features, max_new_tokens=4).ids
    for known in ({}, {"feature_size": FRAMES}):
        with edgewise.load(changed(plain, known, frames=None), target="openvino") as loaded:
            assert loaded.generate(input_ids=[1, MARK, 2], audio=features, max_new_tokens=4).ids == wanted
            for given in (wave(0.2), "clip.wav", features.swapaxes(1, 2)):
                with pytest.raises(InputError, match=r"features \[1, 16, 100\].*give the array"):
                    loaded.generate(input_ids=[1, MARK, 2], audio=given)


def test_uncompressed_equals_the_model(plain: edgewise.Bundle) -> None:
    """What it generates was compared as the bundle was made; what it says of itself is here."""
    about = plain.manifest.pipeline
    assert about is not None and about.order == ("audio_encoder", "prefill", "decode")
    assert about.settings["frames"] == REAL and [stage.tokens for stage in about.stages] == [20, 20, 20]
    assert [info.name for info in plain.manifest.component("prefill").inputs][:2] == ["audio", "audio_position"]


@pytest.mark.parametrize("method", ["divprune", "visionzip"])
def test_compressed_as_research_code_does_it(tmp_path: Path, method: str) -> None:
    check("qwen2-audio", method, tmp_path / "b", ("openvino",))


def test_a_waveform_is_the_features_that_the_processor_makes(pipeline: Any) -> None:
    """A recording that is shorter than the bundle's is filled up with silence."""
    from transformers import WhisperFeatureExtractor

    known = {"feature_size": BINS, "chunk_length": 1, "sampling_rate": 16000, "hop_length": 160, "n_fft": 400}
    features = WhisperFeatureExtractor(**known)(wave(0.5), sampling_rate=16000, return_tensors="np").input_features
    made = pipeline.generate(input_ids=[1, MARK, 2], audio=wave(0.5), max_new_tokens=8)
    assert made.ids == pipeline.generate(input_ids=[1, MARK, 2], audio=features, max_new_tokens=8).ids
    assert list(made.seconds) == ["features", "audio_encoder", "prefill", "decode"]


def test_a_prompt_as_a_processor_writes_it(pipeline: Any) -> None:
    """With as many placeholders as the recording becomes tokens."""
    one, many = ([1, *[MARK] * count, 2] for count in (1, 20))
    made = [pipeline.generate(input_ids=ids, audio=wave(0.3), max_new_tokens=4).ids for ids in (one, many)]
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": [1, 2]}, "no recording placeholder: write token 99"),
        ({"input_ids": [1, MARK, 2, MARK, 3]}, "2 recording placeholders"),
        ({"input_ids": [1, MARK]}, "ends with its recording"),
        ({"input_ids": [MARK, *range(11)]}, "11 tokens besides the recording, and this bundle takes 10"),
        ({"audio": None}, "no recording: .*--audio FILE"),
        ({"audio": [wave(0.1)] * 2}, "give one recording"),
        ({"audio": 5}, "as a file or an array, and no int"),
        ({"audio": np.array(["x"])}, "no numbers"),
        ({"audio": wave(0.9)}, "has 0.9 seconds, and this bundle takes 0.8"),
        ({"audio": np.zeros((2, 100))}, r"give a waveform \(samples,\) at 16000 Hz"),
        ({"audio": np.array([0.0, np.nan])}, "not finite"),
        ({"audio": "absent.wav"}, "does not exist"),
        ({"audio": __file__}, "no audio that can be read"),
        ({"input_ids": None, "prompt": "what?"}, "no tokenizer"),
    ],
)
def test_wrong_prompts_and_media(pipeline: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipeline.generate(**{"input_ids": [1, MARK, 2], "audio": wave(0.2)} | given)


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"compress": "tome@encoder.block[1]:r=4"}, "divprune@projector.out:keep="),
        ({"example": {"input_ids": torch.ones(1, 4, dtype=torch.int64)}}, "takes a recording as input_features"),
        ({"example": {"input_features": noise(1, BINS, 60)}}, r"cannot encode input_features of shape \[1, 16, 60\]"),
        (
            {"example": {"input_features": noise(1, BINS, FRAMES), "feature_attention_mask": torch.ones(1, 101)}},
            r"up to \[1, 100\]",
        ),
        ({"example": {"input_features": noise(2, BINS, FRAMES)}}, r"has shape \[2, 16, 100\]: give one recording"),
    ],
)
def test_exports_that_make_no_sense(tmp_path: Path, known: dict[str, Any], message: str) -> None:
    model, example = make("qwen2-audio")
    with pytest.raises((InputError, Refused), match=message):
        edgewise.export(model, tmp_path / "b", **{"example": example, "prompt_tokens": 8, "new_tokens": 4, **known})
    assert not (tmp_path / "b").exists()


def test_the_command_line_answers_as_the_model_does(cli: Cli, tmp_path: Path) -> None:
    """From a Hugging Face folder as a processor writes it: its tokenizer, template and constants go into the bundle."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2AudioProcessor, WhisperFeatureExtractor

    soundfile = pytest.importorskip("soundfile")
    words = ["<unk>", "user", "answer", "what", "is", "this", *(f"w{i}" for i in range(6, MARK)), "<|AUDIO|>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", additional_special_tokens=["<|AUDIO|>"])
    chat = (
        "{% for m in messages %}user {% for part in m['content'] %}"
        "{% if part['type'] == 'audio' %}<|AUDIO|> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} answer"
    )
    extractor = WhisperFeatureExtractor(feature_size=BINS, chunk_length=1, sampling_rate=16000, hop_length=160, n_fft=400)
    processor = Qwen2AudioProcessor(extractor, fast, chat_template=chat)
    folder, out, clip = tmp_path / "model", tmp_path / "b", tmp_path / "clip.wav"
    model, _ = make("qwen2-audio")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    soundfile.write(clip, wave(0.8), 16000, subtype="FLOAT")
    shapes = f"input_features=1x{BINS}x{FRAMES},feature_attention_mask=1x{REAL}"
    sizes = ["--input-shapes", shapes, "--prompt-tokens", 12, "--new-tokens", 8]
    assert cli("export", folder, "--target", "openvino", *sizes, "-o", out).code == 0
    said = cli("run", out, "--audio", clip, "--prompt", "what is this", "--json", "--quiet").document
    inputs = processor(text="user " + "<|AUDIO|> what is this answer", audio=[wave(0.8)], sampling_rate=16000, return_tensors="pt")
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        made = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    assert (inputs["input_ids"] == MARK).sum() == 20 and said["ids"] == made
    assert said["text"] == fast.decode(made) and list(said["stages"]) == ["features", "audio_encoder", "prefill", "decode"]
    table = tmp_path / "asked.tsv"
    table.write_text(f"file\tquestion\tanswer\nclip.wav\twhat is this\t{said['text']}\nclip.wav\tis this\tno\n", "utf-8")
    (score,) = cli("verify", out, "--data", table, "--json", "--quiet").document["exact_match"]
    assert (score["samples"], score["correct"]) == (2, 1)
    cli("verify", out, "--data", "demo:vqa").refused("asks about images, and this model about recordings")
    cli("run", out, "--audio", clip, "--prompt", "<|AUDIO|> is <|AUDIO|> what").refused("write one")
    cli("run", out, "--image", clip, "--prompt", "is").refused("takes no --image")
    cli("run", out, "--prompt", "is").refused("--audio FILE")
