"""``python -m ds_lvxattn.plan``: machines that are not there, without torch."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

from ds_lvxattn.families import family, qwen_vl
from ds_lvxattn.families.flamingo.model import OpenFlamingoConfig
from ds_lvxattn.plan.__main__ import main, report
from ds_lvxattn.plan.cluster import model_sizes as model_sizes_of_models
from ds_lvxattn.plan.cluster import segments, work
from ds_lvxattn.plan.cluster.job import ClusterJob
from ds_lvxattn.plan.cluster.model_sizes import SHIPPED, ModelError, model_sizes
from ds_lvxattn.plan.cluster.step import layer_candidates, steps
from ds_lvxattn.plan.cluster.work import encoder_layer, encoder_portions
from ds_lvxattn.plan.profile import (
    ProfileError,
    load_profile,
    profile_from_json,
    profile_to_json,
    shipped_profiles,
    write_profile,
)
from ds_lvxattn.training import zero3
from tests.support.marks import slow_but
from tests.support.processes import finish

ARGUMENTS = ["--text", "2048", "--frames", "6246", "--gpus", "1024"]


def test_ten_million_visual_tokens_on_1024_gpus_without_torch() -> None:
    code = (
        "import sys, time\n"
        "from ds_lvxattn.plan.__main__ import main\n"
        f"main(['--model', 'Llama-3.2-11B-Vision', '--json', *{ARGUMENTS}])\n"
        "assert not {'torch', 'numpy', 'transformers', 'deepspeed'} & set(sys.modules), 'slow imports'\n"
        "print(time.process_time(), file=sys.stderr)"
    )
    done = finish([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert float(done.stderr.split()[-1]) < 2.0
    assert found["visual_tokens"] == 6246 * 1601 and found["choice"] == "lv_xattn"
    assert "obstacle" in found["strategies"]["ulysses"]
    lv, ring = found["strategies"]["lv_xattn"], found["strategies"]["ring"]
    assert lv["step_s"]["total"] < ring["step_s"]["total"] and lv["largest_frames"] >= 6246
    assert lv["step_s"]["total"] == pytest.approx(sum(v for k, v in lv["step_s"].items() if k != "total"))


@pytest.mark.parametrize("model", slow_but(SHIPPED, "Llama-3.2-11B-Vision", "mPLUG-Owl3-7B", "LLaVA-1.5-7B"))
def test_models_that_ship(model: str) -> None:
    """Published numbers of parameters, and a plan on every cluster that ships."""
    billions = {
        "Llama-3.2-11B-Vision": 10.7, "Llama-3.2-90B-Vision": 88.6, "OpenFlamingo-3B": 2.6, "OpenFlamingo-9B": 8.3,
        "mPLUG-Owl3-7B": 8.1, "NVLM-H-72B": 79.0, "LLaVA-1.5-7B": 7.1, "Qwen2.5-VL-7B": 8.3,
        "Qwen2-VL-7B": 8.3, "Qwen2-VL-72B": 73.4, "Qwen3-VL-8B": 8.8, "Qwen3-VL-32B": 33.4,
    }  # fmt: skip
    sizes = SHIPPED[model]
    assert sizes.parameters / 1e9 == pytest.approx(billions[model], rel=0.12)
    for cluster in shipped_profiles():
        found = report(ClusterJob(sizes, 512, 64, 8), load_profile(cluster))
        assert {"lv_xattn", "ring"} <= set(found["strategies"])
        assert found["choice"] in found["strategies"] or "nothing fits" in found["reason"]


def test_one_gpu_and_no_memory() -> None:
    profile = load_profile("h200")
    alone = report(ClusterJob(SHIPPED["Llama-3.2-11B-Vision"], 512, 8, 1), profile)
    assert alone["choice"] == "local" and alone["strategies"]["local"]["layer_received_bytes"] == 0
    crowded = report(ClusterJob(SHIPPED["Llama-3.2-90B-Vision"], 512, 8, 2), profile)
    assert crowded["choice"] is None and "nothing fits" in crowded["reason"]


def test_frames_that_fit_fit() -> None:
    profile = load_profile("h200")
    job = ClusterJob(SHIPPED["Llama-3.2-11B-Vision"], 512, 64, 4)
    most = report(job, profile)["strategies"]["lv_xattn"]["largest_frames"]
    for frames, fits in ((most, True), (most + 4, False)):
        found = report(ClusterJob(job.model, job.text, frames, job.gpus), profile)
        assert found["strategies"]["lv_xattn"]["fits"] is fits


def test_more_of_anything_takes_longer() -> None:
    profile = load_profile("h200-slow-link")
    for change in ({"text": 16384}, {"frames": 2048}):
        base = {"text": 512, "frames": 256}
        small, large = (ClusterJob(SHIPPED["Llama-3.2-11B-Vision"], gpus=8, **x) for x in (base, {**base, **change}))
        for name, (_, step) in steps(small, profile).items():
            larger = steps(large, profile)[name][1]
            assert step is not None and larger is not None and step.total < larger.total, (name, change)
    assert all(candidate.seconds > 0 for candidate in layer_candidates(small.cross(), profile))


def test_local_configs(tmp_path: Path) -> None:
    config = {
        "model_type": "mllama",
        "text_config": {
            "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256, "num_hidden_layers": 40,
            "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38], "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        "vision_config": {
            "image_size": 560, "patch_size": 14, "hidden_size": 1280, "intermediate_size": 5120,
            "num_hidden_layers": 32, "num_global_layers": 8, "max_num_tiles": 4,
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    local, shipped = model_sizes(str(tmp_path)), SHIPPED["Llama-3.2-11B-Vision"]
    assert {**vars(local), "name": "", "source": ""} == {**vars(shipped), "name": "", "source": ""}
    (tmp_path / "config.json").write_text(json.dumps({**vars(shipped), "frame_tokens": 7}))
    assert model_sizes(str(tmp_path / "config.json")).frame_tokens == 7


def test_visual_tokens_in_the_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All attention is self-attention over both; saved configs leave out what is Llama's default."""
    sizes = SHIPPED["LLaVA-1.5-7B"]
    job = ClusterJob(sizes, 1000, 100, 8)
    assert job.rows == (1000 + 100 * 576) // 8 and job.compared().shape.kv_lengths == (job.rows,) * 8
    profile = load_profile("h200")
    assert report(job, profile)["strategies"]["ulysses"]["step_s"]["cross-attention"] == 0
    vision = {"image_size": 336, "patch_size": 14, "num_hidden_layers": 24, "hidden_size": 1024}
    config = {"model_type": "llava", "text_config": {"vocab_size": 32064}, "vision_config": vision}
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "vision_config": {**vision, "intermediate_size": 4096}})
    )
    assert {**vars(model_sizes(str(tmp_path))), "name": "", "source": ""} == {**vars(sizes), "name": "", "source": ""}
    arguments = ["--model", "Qwen2.5-VL-7B", "--map", str(tmp_path / "map.png")]
    assert main([*arguments, *ARGUMENTS]) == 2
    assert "--map is of cross-attention" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "kind", "text", "vision"),
    [
        ("Qwen2-VL-7B", Qwen2VLConfig, (3584, 18944, 28, 28, 4, 152064), {"embed_dim": 1280}),
        ("Qwen2.5-VL-7B", Qwen2_5_VLConfig, (3584, 18944, 28, 28, 4, 152064), {"hidden_size": 1280}),
        ("Qwen3-VL-8B", Qwen3VLConfig, (4096, 12288, 36, 32, 8, 151936), {"out_hidden_size": 4096}),
    ],
)
def test_a_saved_config_has_the_sizes_that_ship(
    name: str, kind: Any, text: tuple[int, ...], vision: dict[str, int], tmp_path: Path
) -> None:
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "vocab_size")  # fmt: skip
    kind(text_config=dict(zip(keys, text, strict=True)), vision_config=vision).save_pretrained(tmp_path)
    found, ships = model_sizes(str(tmp_path)), SHIPPED[name]
    assert {**vars(found), "name": "", "source": ""} == {**vars(ships), "name": "", "source": ""}
    larger = ships.with_image_size(2 * 10 * ships.token_side)
    assert larger.frame_tokens == 400 and larger.vision_tokens == 1600


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "model_type is None"), ("{", "not valid JSON"), ('{"model_type": "mllama"}', "missing")],
)
def test_a_config_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        model_sizes(str(tmp_path))


def test_a_saved_config_of_open_flamingo(tmp_path: Path) -> None:
    text, vision = LlamaConfig(hidden_size=2048, num_attention_heads=16, num_hidden_layers=24), CLIPVisionConfig()
    OpenFlamingoConfig(vision, text, cross_attn_every_n_layers=2).save_pretrained(tmp_path)
    found = model_sizes(str(tmp_path))
    assert (found.width, found.self_layers, found.cross_layers, found.features) == (2048, 24, 12, 768)
    assert (found.vision_layers, found.vision_tokens, found.mask) == (12, 50, "frame")
    assert (found.cross_heads, found.cross_head_dim, found.with_tiles(7).frame_tokens) == (8, 64, 448)
    # Queries and output, keys and values, and the two matrices of its feed-forward part.
    assert found.cross_parameters == pytest.approx(2 * 512 * (2048 + 768) + 8 * 2048**2, rel=1e-3)


def test_tiles_that_are_encoded_apart_cost_the_encoder_as_frames_do() -> None:
    model, profile = SHIPPED["OpenFlamingo-9B"], load_profile("h200")
    tiled = model.with_tiles(4)
    assert tiled.frame_tokens == 4 * model.frame_tokens
    assert encoder_portions(tiled, 64) == encoder_portions(model, 256) > 1
    assert encoder_layer(profile, tiled, 64) == encoder_layer(profile, model, 256)
    with pytest.raises(ModelError, match="--tiles is 14; a frame of OpenFlamingo-9B has 1 to 13 tiles"):
        model.with_tiles(14)


def test_wrong_arguments_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    for model, cluster, text, message in (
        ("Llama-9", "h200", "10", "Llama-3.2-11B-Vision"),
        ("OpenFlamingo-3B", "h900", "10", "h200-slow-link"),
        ("OpenFlamingo-3B", "h200", "0", "at least 1"),
    ):
        arguments = ["--model", model, "--cluster", cluster, "--text", text, "--frames", "1", "--gpus", "2"]
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_pictures_that_cannot_be_drawn_are_told_ahead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--model", "Llama-3.2-11B-Vision", "--text", "10", "--frames", "4", "--gpus", "2"]
    for option, file, message in (("--plot", "x.bad", ".png, .svg, .pdf"), ("--map", "none/x.png", "does not exist")):
        assert main([*sizes, option, str(tmp_path / file)]) == 2
        told = capsys.readouterr()
        assert option in told.err and message in told.err and not told.out


@pytest.mark.slow
def test_tables_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    pictures = [tmp_path / "scaling.png", tmp_path / "map.png"]
    began = time.process_time()
    assert main(["--model", "OpenFlamingo-9B", "--text", "512", "--frames", "64", "--gpus", "8",
                 "--plot", str(pictures[0]), "--map", str(pictures[1])]) == 0  # fmt: skip
    assert time.process_time() - began < 60
    printed = capsys.readouterr().out
    assert "lv_xattn" in printed and "choice" in printed
    assert all(picture.stat().st_size > 10_000 for picture in pictures)


@pytest.mark.parametrize("name", shipped_profiles())
def test_profiles_survive_writing_and_say_where_they_come_from(name: str, tmp_path: Path) -> None:
    profile = load_profile(name)
    assert len(profile.source) > 40
    write_profile(profile, tmp_path / "again.json")
    assert profile_to_json(load_profile(tmp_path / "again.json")) == profile_to_json(profile)


def test_a_broken_profile_is_told() -> None:
    data = profile_to_json(load_profile("h200"))
    with pytest.raises(ProfileError, match="'format' is 0"):
        profile_from_json({**data, "format": 0})
    del data["matmul_tflop_per_s"]
    with pytest.raises(ProfileError, match="matmul_tflop_per_s"):
        profile_from_json(data)


def test_what_it_knows_of_runs_is_so_in_runs() -> None:
    """Without torch it cannot import these; a step is predicted by the same numbers."""
    assert segments.ENCODER_SHARE == zero3.ENCODER_SHARE
    assert work.TOKENS_AT_ONCE == family.TOKENS_AT_ONCE
    assert model_sizes_of_models.SIDE == qwen_vl.SIDE
