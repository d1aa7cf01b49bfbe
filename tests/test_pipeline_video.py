"""Vision-language models that answer about a video, and those that take pixels as patches. `benchmarks/vlm_families.py --video`
exports all families that take videos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from conftest import Cli
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from vlm_families import VIDEOS, hunyuan_vl, make, make_video, noise
from vlm_reference import VIDEO, greedy_of_several, save_llava

import edgewise
from edgewise.errors import InputError
from edgewise.exporter.capture import capture
from edgewise.exporter.pipeline import media
from edgewise.exporter.pipeline.patches import patched, with_grid
from edgewise.exporter.pipeline.seam import learn
from edgewise.exporter.pipeline.vision_language import VideoEncoder


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_have_their_places(name: str) -> None:
    """Where positions have rows, the first counts frames, and tokens that are left keep theirs."""
    model, example = make_video(name)
    pixels = example.pop("pixel_values_videos")
    assert media.VIDEO.placeholder(model) == VIDEO
    seam, rung = learn(media.VIDEO, model, pixels, example, 12, 0)
    assert rung.passed and seam.dense == (name == "llava-onevision")
    if seam.dense:
        return
    # Two pairs of frames of 4 x 4 tokens; the second are further on by as much as the model says.
    assert len(set(seam.offsets[0, :16])) == len(set(seam.offsets[0, 16:])) == 1 and seam.offsets[0, 0] < seam.offsets[0, 16]
    assert (seam.offsets[1:, :16] == seam.offsets[1:, 16:]).all()
    assert seam.grid == (2, 4, 4)
    encoder = VideoEncoder(model, example, torch.from_numpy(seam.offsets))
    captured, other = capture(encoder, (pixels,)).with_role(tokens="visual", grid=seam.grid), noise(*pixels.shape, seed=9)
    for method, more in (("divprune", {}), ("evs", {"frames": 2})):
        program = edgewise.compress(captured, f"{method}@projector.out:keep=21")
        with torch.no_grad():
            whole, made = encoder(other), program.module()(other)
        kept = edgewise.ops.apply(method, whole["visual"], keep=21, **more).kept[0]
        assert torch.equal(made["visual_position"][0], torch.from_numpy(seam.offsets)[:, kept])
        torch.testing.assert_close(made["visual"], whole["visual"][:, kept], rtol=1e-4, atol=1e-5)


def test_a_file_is_answered_as_the_model_does(cli: Cli, tmp_path: Path) -> None:
    """Frames at equal distances, with the constants of the processor for videos; a folder of frames and an array are the same."""
    folder, out, file, frames = (tmp_path / name for name in ("model", "b", "x.mkv", "frames"))
    folder.mkdir()
    frames.mkdir()
    model = save_llava(folder, make_video("llava-onevision")[0])
    shown = np.random.default_rng(0).integers(0, 255, (10, 40, 48, 3), dtype=np.uint8)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("ffv1", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 40, "bgr0"  # which loses nothing
        for i, one in enumerate(shown):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(one, format="rgb24")))
            Image.fromarray(one).save(frames / f"{i:02}.png")
        container.mux(stream.encode())
    asked = ["--input-shapes", "pixel_values_videos=1x4x3x32x32", "--prompt-tokens", 12, "--new-tokens", 32]
    assert cli("export", folder, *asked, "--target", "openvino", "-o", out).code == 0
    made = cli("run", out, "--video", file, "--prompt", "what is this", "--json", "--quiet").document["ids"]
    chosen = [Image.fromarray(shown[i]) for i in (1, 3, 6, 8)]  # the middles of four equal stretches
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(chosen, return_tensors="pt")["pixel_values"][None]
    # user VIDEO what is this answer
    assert made == greedy_of_several(model, pixels, [[2], [4, 5, 6, 3]], 65, 32, video=True) and len(set(made)) > 8
    ids = [2, VIDEO, 4, 5, 6, 3]
    with edgewise.load(out) as pipeline:
        assert all(pipeline.generate(input_ids=ids, video=one).ids == made for one in (frames, shown, list(shown), pixels.numpy()))
        for given, message in (
            ({}, "no video: .*--video FILE"),
            ({"image": frames / "00.png"}, "takes a video: give --video FILE"),
            ({"video": frames / "absent.mp4"}, "does not exist"),
            ({"video": pixels.numpy()[:, :3]}, "the video has shape"),
            ({"video": 5}, "the video is given as int: give a file, a folder"),
            ({"video": [frames / "00.png", 5]}, "the video is given as list of PosixPath, int"),
            ({"video": []}, "the video is given as list of nothing"),
            ({"video": [shown[0], shown[1][:8]]}, "differ in size"),
            ({"video": shown, "images": [shown[0]]}, "images or a video, and not both"),
        ):
            with pytest.raises(InputError, match=message):
                pipeline.generate(input_ids=ids, **given)
        with pytest.raises(InputError, match="no video placeholder"):
            pipeline.generate(input_ids=[1, 2], video=shown)
    cli("verify", out, "--data", "demo:vqa").refused("answers about videos", "leave --data out")
    wrong = cli("export", folder, *asked, "--images", 2, "--target", "openvino", "-o", tmp_path / "c")
    assert wrong.code == 2 and "one video in a prompt" in " ".join(wrong.err.split())


def test_patches_of_a_video() -> None:
    """As the processor of this family writes them: pairs of frames, groups of four patches one behind the other."""
    model, _ = make("qwen2-vl")
    x = noise(2, 4, 3, 16, 24)
    grid = with_grid(model, x, {}, "video_grid_thw")["video_grid_thw"]
    assert grid.tolist() == [[2, 4, 6]] * 2
    whole = x.reshape(2, 2, 2, 3, 2, 2, 4, 3, 2, 4).permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(-1, 3 * 2 * 16)
    assert torch.equal(patched(model, x), whole)
    assert patched(model, whole) is whole and with_grid(model, whole, {}, "video_grid_thw") == {}
    for shape in ((1, 3, 3, 16, 24), (1, 4, 3, 16, 20)):
        with pytest.raises(InputError, match="groups of patches of 8 x 8 pixels, and videos into 2 frames"):
            with_grid(model, noise(*shape), {}, "video_grid_thw")


@pytest.mark.parametrize("kind", [Qwen2VLImageProcessorPil, Glm4vImageProcessorPil, Glm46VImageProcessorPil])
def test_patches_of_an_image(kind: Any) -> None:
    """Processors whose order is taken for known write these patches; one with the same settings and another order is not taken."""
    model, _ = make("qwen2-vl")
    x = noise(1, 3, 16, 24)
    plain = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), False)
    made = kind(patch_size=4, temporal_patch_size=2, merge_size=2, **plain)(x[0].numpy(), return_tensors="pt")
    assert torch.equal(patched(model, x), made["pixel_values"])
    assert torch.equal(with_grid(model, x, {}, "image_grid_thw")["image_grid_thw"], made["image_grid_thw"])
    other, example = hunyuan_vl()
    for given in ({}, {"image_grid_thw": example["image_grid_thw"]}):
        with pytest.raises(InputError, match=r"HunYuanVL.*takes patches.*\[1, 3, 16, 24\].*patches with image_grid_thw"):
            with_grid(other, x, given, "image_grid_thw")
    assert patched(other, x) is x and with_grid(other, example["pixel_values"], given, "image_grid_thw") == given


@pytest.mark.parametrize(
    ("kind", "known"),
    [("qwen3_vl_moe", True), ("glm4v_moe", True), ("qwen2_5_omni_thinker", True), ("hunyuan_vl", False), ("glm_ocr", False)],
)
def test_types_that_share_the_processor_of_others(kind: str, known: bool) -> None:
    model, _ = make("qwen2-vl")
    x = noise(1, 3, 16, 24)
    expected = patched(model, x)
    model.config.model_type = kind
    found = patched(model, x)
    assert torch.equal(found, expected) if known else found is x


def test_image_files_of_a_model_that_takes_patches(cli: Cli, tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "b"
    folder.mkdir()
    model = save_llava(folder, make("qwen2.5-vl")[0])
    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 4096}}
    about = {"image_processor_type": "Qwen2VLImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.25] * 3, **sizes}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 48, 3), dtype=np.uint8)) for i in range(2)]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    asked = ["--images", 2, "--prompt-tokens", 12, "--new-tokens", 32, "--target", "openvino", "-o", out]
    wrong = cli("export", folder, *asked)
    assert wrong.code == 2 and "--input-shapes pixel_values" in " ".join(wrong.err.split())
    assert cli("export", folder, "--input-shapes", "pixel_values=2x3x32x48", *asked).code == 0
    given = ["--image", tmp_path / "0.png", "--image", tmp_path / "1.png", "--prompt", "w7 <image> is <image> this w9"]
    made = cli("run", out, *given, "--json", "--quiet").document["ids"]
    pixels = Qwen2VLImageProcessorPil(**about)(pictures, return_tensors="pt")
    texts = [[7], [5], [6, 9]]
    assert made == greedy_of_several(model, pixels.pop("pixel_values"), texts, 24, 32, **pixels) and len(set(made)) > 8
