"""Learned detectors with small random weights of the real architectures, through the real loading code, equal to the
libraries' own processing."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import transformers
from controlnet.preprocessors.detectors import controlnet_aux, depth, mlsd, networks, pose, region, seg
from controlnet.preprocessors.detectors.detector import On
from controlnet.preprocessors.errors import ModelError, NothingFoundError, UsageError
from controlnet.preprocessors.palette import colours, nearest
from controlnet.preprocessors.skeleton import FACE, HAND, WHOLE
from helpers import run
from PIL import Image

CPU = On("cpu", "float32")
MLSD = Path(__file__).parents[2] / "shared/assets/weights/mlsd"


@pytest.fixture(scope="module")
def picture():
    rng = np.random.default_rng(3)
    return cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (160, 128), interpolation=cv2.INTER_CUBIC)


def saved(folder, model, processor):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def convnext():
    return transformers.ConvNextConfig(
        hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )


def upernet(labels=150):
    config = transformers.UperNetConfig(
        backbone_config=convnext(), hidden_size=16, auxiliary_in_channels=8, auxiliary_channels=8, num_labels=labels
    )
    return transformers.UperNetForSemanticSegmentation(config)


def mask2former():
    backbone = transformers.SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4, image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=12, num_labels=150,
    )  # fmt: skip
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "quer" in name or "class_predictor" in name or "mask_embedder" in name:
                weights.normal_()  # else all that it asks for is of one class
    return model


@pytest.mark.parametrize("detector, make, processor", [
    (seg.upernet, upernet, transformers.SegformerImageProcessor(size={"height": 64, "width": 64})),
    (seg.mask2former, mask2former, transformers.Mask2FormerImageProcessor(size={"height": 64, "width": 64})),
])  # fmt: skip
def test_classes_are_those_of_transformers_pipeline(tmp_path, picture, detector, make, processor):
    torch.manual_seed(1)
    folder = saved(tmp_path / "net", make(), processor)
    made = detector(picture, seg.SegOptions(), folder, CPU)
    classes, far = nearest(made)
    assert made.shape == picture.shape and not far.any() and len(np.unique(classes)) > 1

    from transformers import pipeline

    segment = pipeline("image-segmentation", model=str(folder), device="cpu", dtype=torch.float32)
    parts = segment(Image.fromarray(picture), subtask="semantic")
    numbers = segment.model.config.label2id
    for part in parts:
        mask = np.asarray(part["mask"]) > 0
        assert (made[mask] == colours()[numbers[part["label"]]]).all(1).mean() > 0.999


def test_a_network_of_other_classes_is_refused(tmp_path, picture):
    folder = saved(tmp_path / "net", upernet(19), transformers.SegformerImageProcessor())
    with pytest.raises(ModelError, match="19 classes, expected ADE20K's 150"):
        seg.upernet(picture, seg.SegOptions(), folder, CPU)
    with pytest.raises(ModelError, match="holds no network of Mask2Former"):
        seg.mask2former(picture, seg.SegOptions(), tmp_path, CPU)


def depth_pro():
    vit = {"model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8,
           "image_size": 32, "mlp_ratio": 2}  # fmt: skip
    config = transformers.DepthProConfig(
        image_model_config=vit, patch_model_config=vit, fov_model_config=vit, fusion_hidden_size=16, patch_size=32,
        intermediate_hook_ids=[1, 0], intermediate_feature_dims=[16, 8], scaled_images_ratios=[0.25, 0.5, 1],
        scaled_images_overlap_ratios=[0.0, 0.5, 0.25], scaled_images_feature_dims=[16, 16, 8], use_fov_model=True,
        num_fov_head_layers=1,
    )  # fmt: skip
    return transformers.DepthProForDepthEstimation(config)


def dpt():
    config = transformers.DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=64, patch_size=16,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, is_hybrid=False,
    )  # fmt: skip
    return transformers.DPTForDepthEstimation(config)


@pytest.mark.parametrize("make, processor, metric", [
    (depth_pro, transformers.DepthProImageProcessor(size={"height": 128, "width": 128}), True),
    (dpt, transformers.DPTImageProcessor(size={"height": 64, "width": 64}), False),
])  # fmt: skip
def test_depth_is_that_of_transformers_pipeline(tmp_path, picture, make, processor, metric):
    torch.manual_seed(2)
    folder = saved(tmp_path / "net", make(), processor)
    made, found = depth.transformer_depth(picture, depth.DepthOptions(), folder, CPU)

    from transformers import pipeline

    estimate = pipeline("depth-estimation", model=str(folder), device="cpu", dtype=torch.float32)
    told = estimate(Image.fromarray(picture))["predicted_depth"].numpy()
    near = 1 / told.clip(1e-3) if metric else told
    expected = (near - near.min()) / np.ptp(near) * 255
    assert np.ptp(made) == 255 and np.abs(made - expected).max() <= 1
    assert found["normalisation"]["white"] == pytest.approx(near.max(), rel=1e-4)


def sam2():
    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=8, num_attention_heads=1, image_size=[64, 64], patch_kernel_size=[7, 7], patch_stride=[4, 4],
        blocks_per_stage=[1, 2, 1, 1], embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 1, 2, 4],
        window_size_per_stage=[4, 2, 2, 2], global_attention_blocks=[2],
        window_positional_embedding_background_size=[4, 4],
    )  # fmt: skip
    vision = transformers.Sam2VisionConfig(
        backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8], fpn_hidden_size=32,
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
    )  # fmt: skip
    decoder = {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
    prompt = {"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
    return transformers.Sam2Model(
        transformers.Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    )


def test_a_region_is_the_best_mask_of_sam2(tmp_path, picture):
    torch.manual_seed(3)
    processor = transformers.Sam2Processor(
        transformers.Sam2ImageProcessor(size={"height": 64, "width": 64}, mask_size={"height": 16, "width": 16}), 64
    )
    folder = saved(tmp_path / "net", sam2(), processor)
    made = region.sam2(picture, region.RegionOptions("0.25,0.5/0.3,0.5", "0.9,0.9"), folder, CPU)
    assert made.shape == picture.shape[:2] and set(np.unique(made)) == {0, 255}

    model, processor = (getattr(transformers, name).from_pretrained(folder) for name in ("Sam2Model", "Sam2Processor"))
    asked = processor(
        images=Image.fromarray(picture), return_tensors="pt",
        input_points=[[[[40, 64], [48, 64], [144, 115.2]]]], input_labels=[[[1, 1, 0]]],
    )  # fmt: skip
    with torch.inference_mode():
        found = model.eval()(**asked)
    best = int(found.iou_scores[0, 0].argmax())
    expected = processor.post_process_masks(found.pred_masks, asked["original_sizes"])[0][0, best].numpy()
    assert ((made > 0) == expected).mean() > 0.999
    inverted = region.sam2(picture, region.RegionOptions("0.25,0.5/0.3,0.5", "0.9,0.9", invert=True), folder, CPU)
    assert (inverted == 255 - made).all()
    boxed = region.sam2(picture, region.RegionOptions(box="0.1,0.1,0.5,0.9"), folder, CPU)
    assert boxed.shape == made.shape


@pytest.mark.parametrize("wrong", [{"at": "0.5"}, {"at": "2,0.5"}, {"box": "0,0,1"}, {"without": "a,b"}, {"at": ""}])
def test_regions_of_nowhere_are_refused(wrong):
    with pytest.raises(UsageError):
        region.RegionOptions(**wrong)


def vitpose(folder):
    backbone = transformers.VitPoseBackboneConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=[64, 48], patch_size=[16, 16],
        out_indices=[2],
    )  # fmt: skip
    model = transformers.VitPoseForPoseEstimation(
        transformers.VitPoseConfig(backbone_config=backbone, num_labels=17, scale_factor=4, use_simple_decoder=True)
    )
    return saved(folder, model, transformers.VitPoseImageProcessor(size={"height": 64, "width": 48}))


def rtdetr(folder, name="person"):
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic", out_features=
        ["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[8, 8, 8], encoder_layers=1,
        encoder_ffn_dim=16, encoder_attention_heads=2, d_model=16, num_queries=20, decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16, decoder_layers=1, decoder_attention_heads=2, num_denoising=0,
        id2label={0: name, 1: "cat"}, label2id={name: 0, "cat": 1},
    )  # fmt: skip
    model = transformers.RTDetrForObjectDetection(config)
    return saved(folder, model, transformers.RTDetrImageProcessor(size={"height": 64, "width": 64}))


def test_poses_are_those_of_vitpose_on_what_rt_detr_finds(tmp_path, picture):
    torch.manual_seed(4)
    finder, folder = rtdetr(tmp_path / "finder"), vitpose(tmp_path / "pose")
    options = pose.PoseOptions(people=3, confidence=0.01, visibility=0.0)
    boxes = pose._people(picture, options, finder, CPU)

    from transformers import pipeline

    look = pipeline("object-detection", model=str(finder), device="cpu", dtype=torch.float32)
    found = [one for one in look(Image.fromarray(picture), threshold=0.01) if one["label"] == "person"]
    found = sorted(found, key=lambda one: -one["score"])[:3]
    expected = [[b["xmin"], b["ymin"], b["xmax"] - b["xmin"], b["ymax"] - b["ymin"]] for b in (f["box"] for f in found)]
    assert len(boxes) == 3 and np.abs(boxes - expected).max() < 2  # the pipeline's boxes are whole pixels

    _, told = pose.vitpose(picture, options, folder, finder, CPU)
    model = transformers.VitPoseForPoseEstimation.from_pretrained(folder).eval()
    processor = transformers.VitPoseImageProcessor.from_pretrained(folder)
    with torch.inference_mode():
        output = model(**processor(Image.fromarray(picture), boxes=[boxes], return_tensors="pt"))
    (people,) = processor.post_process_pose_estimation(output, boxes=[boxes])
    assert len(told["keypoints"]) == 3
    for mine, theirs in zip(told["keypoints"], people, strict=True):
        nose = np.array(mine[0][:2]) * (160, 128)
        assert np.abs(nose - theirs["keypoints"][0].numpy()).max() < 0.1


def test_a_detector_of_people_that_knows_none(tmp_path, picture):
    with pytest.raises(ModelError, match="knows no person"):
        pose.vitpose(picture, pose.PoseOptions(), vitpose(tmp_path / "p"), rtdetr(tmp_path / "f", "dog"), CPU)
    with pytest.raises(NothingFoundError):
        pose.vitpose(picture, pose.PoseOptions(confidence=1), vitpose(tmp_path / "p"), rtdetr(tmp_path / "g"), CPU)


def test_two_weights_lie_in_folders_of_their_names(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "a.png")
    vitpose(tmp_path / "w/vitpose")
    rtdetr(tmp_path / "w/rtdetr")
    command = ("detect", "pose", tmp_path / "a.png", "--detector", "vitpose", "--weights", tmp_path / "w")
    options = ("--confidence", "0.01", "--visibility", "0", "--size", "64", "--dtype", "float32", "--device", "cpu")
    assert run(*command, *options, "--keypoints", tmp_path / "k.json") == 0
    assert len(json.loads((tmp_path / "k.json").read_text())["people"]) == 5
    assert run(*command, "--detector", "blazepose", "--device", "cpu") == 2


# Of controlnet-aux.


@pytest.mark.parametrize("name", controlnet_aux.MODULES)
def test_what_is_used_of_controlnet_aux_imports_alone(name):
    """Without the package's own imports, beside the libraries of today."""
    code = f"""
import sys
from controlnet.preprocessors.detectors.controlnet_aux import detector_class
print(detector_class({name!r}).__name__, "controlnet_aux" in sys.modules, "mediapipe" in sys.modules)
"""
    from test_libraries import python

    assert python(code).split() == [name, "False", "False"]


@pytest.fixture
def drawn(monkeypatch):
    """Has `detector` stand for one of controlnet-aux."""

    def stand(detector):
        monkeypatch.setattr(controlnet_aux, "load_detector", lambda name, weights, on: detector)
        controlnet_aux._network.cache_clear()

    return stand


@pytest.mark.parametrize("coarse", [False, True])
def test_line_art_is_controlnet_auxs(tmp_path, picture, coarse):
    LineartDetector = controlnet_aux.detector_class("LineartDetector")
    Generator = sys.modules["controlnet_aux.lineart"].Generator
    torch.manual_seed(5)
    for file in ("sk_model.pth", "sk_model2.pth"):
        torch.save(Generator(3, 1, 3).state_dict(), tmp_path / file)
    made = controlnet_aux.lineart(picture, controlnet_aux.LineArtOptions(coarse), tmp_path, CPU)
    assert made.shape == picture.shape[:2]
    square = np.ascontiguousarray(picture[:, :128])
    mine = controlnet_aux.lineart(square, controlnet_aux.LineArtOptions(coarse), tmp_path, CPU)
    theirs = LineartDetector.from_pretrained(str(tmp_path))(
        square, coarse=coarse, detect_resolution=128, image_resolution=128, output_type="np"
    )
    assert np.abs(mine.astype(int) - theirs[..., 0]).max() <= 1 and np.ptp(mine) > 20
    with pytest.raises(ModelError, match="are not the weights of LineartDetector"):
        controlnet_aux.lineart(picture, controlnet_aux.LineArtOptions(), tmp_path / "none", CPU)


def test_anime_lines_are_controlnet_auxs(picture, drawn):
    LineartAnimeDetector = controlnet_aux.detector_class("LineartAnimeDetector")
    UnetGenerator = sys.modules["controlnet_aux.lineart_anime"].UnetGenerator
    torch.manual_seed(6)
    network = UnetGenerator(3, 1, 8, 4, norm_layer=torch.nn.InstanceNorm2d, use_dropout=False).eval()
    theirs = LineartAnimeDetector(network)
    drawn(theirs)
    square = cv2.resize(picture, (256, 256))
    mine = controlnet_aux.lineart_anime(square, controlnet_aux.PlainOptions(), Path(), CPU)
    expected = theirs(square, detect_resolution=256, image_resolution=256, output_type="np")[..., 0]
    assert np.abs(mine.astype(int) - expected).max() <= 1 and np.ptp(mine) > 5


def test_normals_are_controlnet_auxs(picture, drawn):
    NormalBaeDetector = controlnet_aux.detector_class("NormalBaeDetector")

    class Slopes(torch.nn.Module):
        """Stands for the network: what it is shown, as a normal with a confidence, last of several sizes."""

        def forward(self, x):
            return [[x.new_zeros(1), torch.cat([x.tanh(), x[:, :1]], 1)]]

    theirs = NormalBaeDetector(Slopes())
    theirs.model.scale = torch.nn.Parameter(torch.ones(1))
    drawn(theirs)
    square = np.ascontiguousarray(picture[:, :128])
    mine = controlnet_aux.normalbae(square, controlnet_aux.PlainOptions(), Path(), CPU)
    expected = theirs(square, detect_resolution=128, image_resolution=128, output_type="np")
    assert np.abs(mine.astype(int) - expected).max() <= 1 and np.ptp(mine) > 50


def test_openposes_hands_and_faces(picture, drawn):
    controlnet_aux.detector_class("OpenposeDetector")
    theirs = sys.modules["controlnet_aux.open_pose"]
    Keypoint, PoseResult, BodyResult = theirs.Keypoint, theirs.PoseResult, theirs.BodyResult

    class Found:
        def detect_poses(self, image, include_hand, include_face):
            body = BodyResult([Keypoint(0.5, 0.1 + 0.04 * i) if i % 5 else None for i in range(18)], 1.0, 18)
            hand = [Keypoint(0.2 + 0.01 * i, -1 / 160 if i == 3 else 0.5) for i in range(HAND)]
            face = [Keypoint(0.5 + 0.001 * i, 0.2) for i in range(68)]
            return [PoseResult(body, hand if include_hand else None, None, face if include_face else None)]

    drawn(Found())
    _, plain = controlnet_aux.openpose(picture, controlnet_aux.OpenposeOptions(), Path(), CPU)
    map_, found = controlnet_aux.openpose(picture, controlnet_aux.OpenposeOptions(hands=True, face=True), Path(), CPU)
    (person,) = np.array(found["keypoints"])
    assert np.array(plain["keypoints"]).shape == (1, 18, 3) and person.shape == (WHOLE, 3)
    assert person[18 + 2, 0] == 0.22 and (person[18 + 3] == 0).all() and not person[18 + HAND : 18 + 2 * HAND].any()
    assert person[-FACE:][:68, 2].all() and not person[-2:].any() and person[0, 2] == 0 and person[1, 2] == 1
    assert (map_ == 255).all(2).any()  # a face is white


# M-LSD.


@pytest.mark.skipif(not MLSD.is_dir(), reason="the weights are not here")
def test_straight_lines_are_found_where_they_are(tmp_path):
    image = np.full((400, 600, 3), 235, np.uint8)
    cv2.rectangle(image, (100, 80), (480, 320), (40, 60, 90), -1)
    map_ = mlsd.mlsd(image, mlsd.MlsdOptions(), MLSD)
    assert map_.shape == (400, 600) and set(np.unique(map_)) == {0, 255}
    edge = np.zeros_like(map_)
    cv2.rectangle(edge, (100, 80), (480, 320), 255, 1)
    near = cv2.dilate(edge, np.ones((9, 9)))
    assert near[map_ > 0].mean() > 0.95 * 255 and cv2.dilate(map_, np.ones((9, 9)))[edge > 0].mean() > 0.8 * 255
    assert not mlsd.mlsd(image, mlsd.MlsdOptions(score=1.0), MLSD).any()
    found = [len(mlsd.lines(image, mlsd.MlsdOptions(length=length), MLSD)) for length in (20, 158, 300)]
    assert found == [4, 2, 0]  # in cells: of the network's 256 the sides are 162 and 154 long


def test_another_tflite_file_is_refused(tmp_path, picture):
    (tmp_path / mlsd.FILE).write_bytes(b"no network")
    with pytest.raises(ModelError, match="is not the network of mlsd"):
        mlsd.mlsd(picture, mlsd.MlsdOptions(), tmp_path)
    for wrong in ({"score": 2}, {"length": -1}):
        with pytest.raises(UsageError):
            mlsd.MlsdOptions(**wrong)


# How photos share a network.


def test_photos_that_wait_go_through_together():
    """In one batch of equal shapes, each thread gets its own; an error reaches all of the batch."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Event

    seen, begun, gate = [], Event(), Event()

    class Double(torch.nn.Module):
        def forward(self, x):
            begun.set()
            gate.wait(30)
            seen.append(len(x))
            if (x < 0).any():
                raise RuntimeError("a photo of minus one")
            return 2 * x

    network = networks.Network(Double(), CPU)
    network.together = 4
    with ThreadPoolExecutor(7) as pool:
        sizes = [3, 3, 3, 5, 3, 3]
        photos = [torch.full((1, n), float(i)) for i, n in enumerate(sizes)]
        answers = [pool.submit(lambda x: network(x=x)[0], photos[0])]
        assert begun.wait(30)  # the first one is alone, and the others wait for it
        answers += [pool.submit(lambda x: network(x=x)[0], x) for x in photos[1:]]
        until = time.monotonic() + 30
        while len(network._waiting) < 5 and time.monotonic() < until:
            time.sleep(0.001)
        gate.set()
        for answer, x in zip(answers, photos, strict=True):
            assert torch.equal(answer.result(10), 2 * x)
        assert sorted(seen) == [1, 1, 4]
    with pytest.raises(RuntimeError, match="minus one"):
        network(x=torch.full((1, 2), -1.0))
    assert networks.Network(Double(), replace(CPU, dtype="bfloat16"))(x=torch.ones(1, 2))[0].dtype == torch.float32
