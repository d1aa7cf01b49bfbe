"""Speech models of several graphs: equal to transformers token for token, whole and compressed, on every runtime."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from reference import Eager, patched
from tiny_speech import BINS, END, FRAMES, NO_TIMES, POSITIONS, SOON, START, tiny_speech, tiny_speech_folder

import edgewise
from edgewise.errors import InputError
from edgewise.exporter.pipeline.speech import AudioEncoder, Decode, Prefill
from edgewise.runtime import Sampling

TARGETS = ["onnxruntime", "openvino"]
EVERY = [*TARGETS, "tensorrt", "coreml"]


def features(count: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, BINS, FRAMES, generator=torch.Generator().manual_seed(seed))


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    time = np.arange(int(16000 * seconds)) / 16000
    return (np.sin(2 * np.pi * (200 + 900 * rng.random() * time) * time) + 0.1 * rng.normal(size=len(time))).astype(
        np.float32
    )


def spoken(ids: Sequence[int]) -> list[int]:
    """What transformers gives back of a transcript: neither prompt nor end."""
    return list(ids[:-1]) if ids[-1] in (END, SOON) else list(ids)


def generated(model: Any, x: Any, **known: Any) -> list[int]:
    with torch.no_grad():
        return list(model.generate(x, **known)[0].tolist())


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_speech_folder(tmp_path_factory.mktemp("speech") / "english")


@pytest.fixture(scope="module")
def bundle(english: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return edgewise.export(str(english), tmp_path_factory.mktemp("speech") / "bundle", targets=EVERY).path


@pytest.fixture(scope="module")
def compressed(english: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("speech") / "compressed"
    return edgewise.export(str(english), out, targets=TARGETS, compress="tome@encoder.block[0:3]:keep=0.5").path


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_speech_folder(tmp_path_factory.mktemp("speech") / "many", multilingual=True)
    return edgewise.export(str(folder), folder.parent / "bundle", targets=["onnxruntime"]).path


def test_components_with_caches_are_the_whole_model() -> None:
    """Two recordings, with prompts of different lengths in one bucket, and slots that hold nothing of use."""
    model, x, room, bucket = tiny_speech(), features(2), 6, 4
    prompts, more = [[START], [START, 4, NO_TIMES]], [[9, 11, 2, 30], [60, 8, 8, 1]]
    with torch.no_grad():
        encoded = AudioEncoder(model)(x)
        cross = {f"cross_{kind}": [encoded[f"cross_{kind}_{i}"] for i in range(2)] for kind in ("key", "value")}
        ids = torch.tensor([[0] * (bucket - len(p)) + p for p in prompts])
        where = torch.tensor([[-1] * (bucket - len(p)) + list(range(len(p))) for p in prompts])
        made = Prefill(model)(ids, where, **cross)
        logits = [made["logits"]]
        past = {
            f"past_{kind}": [
                torch.nn.functional.pad(made[f"{kind}_{i}"], (0, 0, 0, room), value=50.0) for i in range(2)
            ]
            for kind in ("key", "value")
        }
        length = torch.tensor([len(p) for p in prompts])
        for step in range(4):
            token = torch.tensor([[row[step]] for row in more])
            made = Decode(model, bucket)(token, length[:, None] + step, length, torch.tensor([step]), **cross, **past)
            logits.append(made["logits"])
            for kind in ("key", "value"):
                for i in range(2):
                    past[f"past_{kind}"][i][:, :, bucket + step] = made[f"{kind}_{i}"][:, :, 0]
        for b, (prompt, row) in enumerate(zip(prompts, more, strict=True)):
            whole = model(input_features=x[b : b + 1], decoder_input_ids=torch.tensor([prompt + row])).logits[0]
            ours = torch.stack([one[b] for one in logits])
            assert (ours - whole[len(prompt) - 1 :]).abs().max() < 1e-4 * whole.abs().max()


@pytest.mark.parametrize("target", EVERY)
def test_transcripts_are_those_of_transformers(bundle: Path, english: Path, target: str) -> None:
    model = tiny_speech()
    seen = set()
    with edgewise.load(bundle, target) as speech:
        for seed in range(3):
            x = features(seed=seed)
            made = speech.generate(x.numpy())
            assert spoken(made.ids) == generated(model, x)
            assert made.stopped == ("eos" if END in made.ids else "length")
            seen.add(tuple(made.ids))
    assert len(seen) == 3 and max(map(len, seen)) > 8, "the transcripts say nothing"
    assert max(map(len, seen)) <= POSITIONS - 2


@pytest.mark.parametrize("target", TARGETS)
def test_of_a_waveform_and_of_a_file(bundle: Path, english: Path, target: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, WhisperFeatureExtractor

    soundfile = pytest.importorskip("soundfile")
    wave, tokenizer = sound(0.8), AutoTokenizer.from_pretrained(english)
    x = WhisperFeatureExtractor.from_pretrained(english)(wave, sampling_rate=16000, return_tensors="pt").input_features
    wanted = generated(tiny_speech(), x)
    soundfile.write(tmp_path / "sound.wav", np.stack([wave, wave], axis=1), 16000, subtype="FLOAT")
    with edgewise.load(bundle, target) as speech:
        for audio in (wave, str(tmp_path / "sound.wav")):
            pieces: list[str] = []
            made = speech.generate(audio, on_text=pieces.append)
            assert spoken(made.ids) == wanted
            words = [i for i in wanted if i < NO_TIMES]
            assert made.text == "".join(pieces) == tokenizer.decode(words, skip_special_tokens=True)
            assert {len(made.seconds[stage]) for stage in ("features", "audio_encoder", "prefill")} == {1}
            assert len(made.seconds["decode"]) == len(made.ids) - 1


def test_long_recordings_are_transcribed_in_parts(bundle: Path) -> None:
    from edgewise.runtime.audio import pieces

    wave = sound(2.4)
    wave[12000:14000] = 0
    with edgewise.load(bundle, "onnxruntime") as speech:
        given: list[str] = []
        whole = speech.generate(wave, on_text=given.append, max_new_tokens=6)
        parts = [speech.generate(part, max_new_tokens=6) for part in pieces(wave, 16000, 16000)]
        assert len(parts) >= 3 and whole.ids == [i for part in parts for i in part.ids]
        assert whole.text == " ".join(part.text for part in parts if part.text) == "".join(given)


def test_languages_and_tasks(many: Path) -> None:
    model, x = tiny_speech(multilingual=True), features(seed=7)
    with edgewise.load(many) as speech:
        for known in (
            *({}, {"language": "de"}, {"language": "german", "task": "translate"}, {"language": "<|fr|>"}),
            {"task": "translate"},
        ):
            assert spoken(speech.generate(x.numpy(), **known).ids) == generated(model, x, **known), known
        made = speech.generate(x.numpy(), language="en")
        assert made.stopped == "eos" and made.ids[-1] == SOON
        found = {tuple(speech.generate(x.numpy(), language=name).ids) for name in ("en", "de", "fr")}
        assert len(found) > 1, "the language makes no difference"
        with pytest.raises(InputError, match="language"):
            speech.generate(x.numpy(), language="dutch")
        with pytest.raises(InputError, match="translate"):
            speech.generate(x.numpy(), task="translat")


@pytest.mark.parametrize("target", TARGETS)
def test_compressed_equals_an_eager_model(compressed: Path, target: str) -> None:
    """Against the encoder's blocks written anew, with merging between them, and transformers' own decoder."""
    from transformers.modeling_outputs import BaseModelOutput

    model = tiny_speech()
    manifest = edgewise.Bundle.open(compressed).manifest
    sites = {site.name: site.tokens_out for site in manifest.component("audio_encoder").sites}
    about = manifest.pipeline
    assert list(sites.values()) == [42, 33, 25] and about is not None and about.media_tokens == 25
    assert [(s.role, s.tokens_before, s.tokens) for s in about.stages] == [(role, 50, 25) for role in about.order]
    assert all(0 < stage.flops < stage.flops_before for stage in about.stages)
    # Two layers' keys and values of 32 numbers for each of the encoder's tokens, and the decoder's own caches.
    own = [0, about.cache_bytes, about.cache_bytes]
    assert [s.cache_bytes for s in about.stages] == [2 * 2 * 32 * 4 * 25 + held for held in own]
    assert [s.cache_bytes_before for s in about.stages] == [2 * 2 * 32 * 4 * 50 + held for held in own]
    plan = {i: [("tome", sites[f"encoder.block[{i}]"])] for i in range(3)}
    with edgewise.load(compressed, target) as speech:
        for seed in range(2):
            x = features(seed=10 + seed)
            state = Eager(plan, 0, False)
            with torch.no_grad(), patched(model, "model.encoder.layers", state, "model.encoder.layer_norm"):
                hidden = model.get_encoder()(x).last_hidden_state
            assert hidden.shape[1] == 25
            wanted = generated(model, None, encoder_outputs=BaseModelOutput(last_hidden_state=hidden))
            assert spoken(speech.generate(x.numpy()).ids) == wanted


def test_what_the_bundle_says(bundle: Path) -> None:
    manifest = edgewise.Bundle.open(bundle).manifest
    about = manifest.pipeline
    assert about is not None and about.kind == "speech" and about.order == ("audio_encoder", "prefill", "decode")
    assert about.start_ids == (START, NO_TIMES) and about.eos_ids == (END,) and about.suppress_first_ids == (7, END)
    assert (about.prompt_tokens, about.new_tokens) == (2, POSITIONS - 2)
    assert {(layer.tokens, layer.slots, layer.bytes) for layer in about.caches} == {
        (2, POSITIONS, 2 * 32 * POSITIONS * 4)
    }
    assert [(s.tokens_before, s.flops_before, s.cache_bytes_before) for s in about.stages] == [
        (s.tokens, s.flops, s.cache_bytes) for s in about.stages
    ]
    assert manifest.notes == () and manifest.model.class_name == "WhisperForConditionalGeneration"
    assert [rung.passed for rung in manifest.verification if rung.name == "components, joined"] == [True]


def test_room_for_new_tokens_is_a_choice(tmp_path: Path) -> None:
    out = edgewise.export(
        tiny_speech(), tmp_path / "b", example={"input_features": features()}, targets=["onnxruntime"], new_tokens=5
    )
    with edgewise.load(out) as speech:
        made = speech.generate(features().numpy())
        assert made.ids == generated(tiny_speech(), features())[:5] and made.text == ""
        with pytest.raises(InputError, match="has room for 5 new tokens"):
            speech.generate(features().numpy(), max_new_tokens=6)
        drawn = [
            speech.generate(features().numpy(), sampling=Sampling(temperature=2.0, seed=s)).ids for s in (0, 0, 1, 2, 3)
        ]
        assert drawn[0] == drawn[1] and len({tuple(ids) for ids in drawn}) > 1


@pytest.mark.parametrize(
    ("known", "fault"),
    [
        ({"new_tokens": 39}, "positions for 38 new tokens"),
        ({"prompt_tokens": 1}, "begins with up to 2 tokens"),
        ({"example": {"input_features": features(2)}}, "one recording at a time"),
        ({"example": {"input_values": torch.zeros(1, 100)}}, "takes audio as input_features"),
    ],
)
def test_exports_that_make_no_sense(tmp_path: Path, known: dict[str, Any], fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        edgewise.export(tiny_speech(), tmp_path / "b", **{"example": {"input_features": features()}, **known})
    assert not (tmp_path / "b").exists()


def test_audio_that_makes_no_sense(bundle: Path) -> None:
    with edgewise.load(bundle, "onnxruntime") as speech:
        for audio, fault in (
            (np.zeros((2, 100), np.float32), r"give a waveform \(samples,\) at 16000 Hz"),
            (np.zeros(0, np.float32), "give a waveform"),
            (np.array([0.0, np.inf]), "not finite"),
            ("absent.wav", "does not exist"),
        ):
            with pytest.raises(InputError, match=fault):
                speech.generate(audio)
        with pytest.raises(InputError, match="one language and one task"):
            speech.generate(sound(0.1), language="en")


def test_from_the_command_line(bundle: Path, cli: Cli, tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "sound.wav", sound(0.5), 16000)
    with edgewise.load(bundle) as speech:
        wanted = speech.generate(tmp_path / "sound.wav")
    assert wanted.text
    said = cli("run", bundle, "--audio", tmp_path / "sound.wav")
    assert said.code == 0 and said.out == wanted.text + "\n", said
    assert "decode" in said.err and "ended by" in said.err
    document = cli("run", bundle, "--audio", tmp_path / "sound.wav", "--json").document
    assert document["text"] == wanted.text and document["ids"] == wanted.ids
    assert list(document["stages"]) == ["features", "audio_encoder", "prefill", "decode"]
    cli("run", bundle, "--audio", tmp_path / "none.wav").refused("none.wav does not exist")
    cli("run", bundle, "--audio", tmp_path / "sound.wav", "--prompt", "what?").refused("takes no --prompt")
    cli("run", bundle, "--task", "translate").refused("give --audio")


def test_a_device_needs_no_torch(bundle: Path) -> None:
    code = f"""
import sys
for name in ("torch", "transformers", "onnx", "yaml", "scipy", "librosa"):
    sys.modules[name] = None  # importing it is an error
import json, numpy as np, edgewise
with edgewise.load({str(bundle)!r}, "onnxruntime") as speech:
    print(json.dumps(speech.generate(np.sin(np.arange(9000) / 9).astype(np.float32)).ids))
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    with edgewise.load(bundle, "onnxruntime") as speech:
        assert json.loads(said.stdout) == speech.generate(np.sin(np.arange(9000) / 9).astype(np.float32)).ids
