"""Runs anomalib's PatchCore on given feature maps. `peers` starts it with a Python that has anomalib; it is never imported.

Its arguments are the maps (.npz), where to write the results (.npz), the share of patches to keep, and the number of threads;
then, where the coreset is picked by somebody else, a file. If it does not exist, the vectors that are picked from are written
to it (.npy), and nothing else is done; if it does, it holds the numbers of those that were picked.
"""

import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.models.image.patchcore.torch_model import PatchcoreModel

INPUT, BATCH = 224, 16


class Given(torch.nn.Module):
    """Returns given maps in place of those of a backbone."""

    def __init__(self, maps: dict[str, Any], names: list[str]) -> None:
        super().__init__()
        self.maps, self.names, self.part = maps, names, slice(0, 0)

    def forward(self, _: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the maps of the images that `part` selects."""
        return {
            name: torch.from_numpy(self.maps[name][self.part].astype(np.float32)).permute(0, 3, 1, 2) for name in self.names
        }


def main() -> None:
    """Fit, score image by image, and save raw scores, which are not normalized."""
    given, taken, ratio, threads = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
    picked = Path(sys.argv[5]) if len(sys.argv) > 5 else None
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    with np.load(given) as arrays:
        parts = {kind: {k.split(" ", 1)[1]: arrays[k] for k in arrays if k.startswith(kind)} for kind in ("normal", "test")}
    names = list(parts["normal"])
    model = PatchcoreModel(layers=names, backbone="resnet18", pre_trained=False, num_neighbors=9)
    model.layers = names
    model.feature_extractor = Given(parts["normal"], names)
    model.train()
    count = len(parts["normal"][names[0]])
    start = time.perf_counter()
    with torch.no_grad():
        for first in range(0, count, BATCH):
            model.feature_extractor.part = slice(first, first + BATCH)
            model(torch.zeros(min(BATCH, count - first), 3, INPUT, INPUT))
        if picked is None:
            model.subsample_embedding(ratio)
        elif not picked.exists():
            np.save(picked, torch.vstack(model.embedding_store).numpy())
            return
        else:
            model.memory_bank = torch.vstack(model.embedding_store)[torch.from_numpy(np.load(picked))]
            model.embedding_store.clear()
    train_s = time.perf_counter() - start
    model.eval()
    model.feature_extractor = Given(parts["test"], names)
    scores, maps, latency = [], [], []
    with torch.no_grad():
        for place in range(len(parts["test"][names[0]])):
            model.feature_extractor.part = slice(place, place + 1)
            start = time.perf_counter()
            found = model(torch.zeros(1, 3, INPUT, INPUT))
            latency.append(time.perf_counter() - start)
            scores.append(found.pred_score.numpy().reshape(-1))
            maps.append(found.anomaly_map.numpy().reshape(1, INPUT, INPUT))
    np.savez(
        taken,
        score=np.concatenate(scores),
        maps=np.concatenate(maps),
        latency_s=np.array(latency),
        train_s=train_s,
        all_s=sum(latency),
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        memory_bytes=model.memory_bank.numel() * 4,
        version=version("anomalib"),
    )


if __name__ == "__main__":
    main()
