"""What of `overhead.py` runs in Flower's environment: the same federations on Flower's simulation engine.

Nothing of fedsim is imported, for it is not installed there. Clients decode what they receive and encode what they
send, as any client of Flower does; data and model are kept by each actor from one client to the next, which a user of
Flower would have to arrange. The first round waits until all nodes are known: without that, Flower 1.41 trains a part
of the clients in it.

    python -m benchmarks.overhead_flower --clients 1000 --numel 2560 --rounds 8 --json FILE
    python -m benchmarks.overhead_flower --clients 50 --work DIR --rounds 3 --json FILE
"""

import argparse
import functools
import importlib.metadata
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict  # pyright: ignore[reportMissingImports]
from flwr.clientapp import ClientApp  # pyright: ignore[reportMissingImports]
from flwr.serverapp import ServerApp  # pyright: ignore[reportMissingImports]
from flwr.serverapp.strategy import FedAvg  # pyright: ignore[reportMissingImports]
from flwr.simulation import run_simulation  # pyright: ignore[reportMissingImports]


ACTORS = 2
POLL_SECONDS = 0.05
REPORTED = ("flwr", "ray", "torch", "transformers", "numpy")

client = ClientApp()


@client.train()
def train(message: Any, context: Any) -> Any:
    """One client's part of a round: nothing, or 20 steps."""
    folder, arrays = message.content["config"]["work"], message.content["arrays"]
    if folder:
        sent = trained(Path(folder), arrays, int(context.node_config["partition-id"]))
    else:
        sent = ArrayRecord(arrays.to_numpy_ndarrays())
    content = RecordDict({"arrays": sent, "metrics": MetricRecord({"num-examples": 1})})
    return Message(content=content, reply_to=message)


def trained(folder: Path, start: Any, id_: int) -> Any:
    """The weights after a client's local training: what `overhead_bare.train` does."""
    import torch  # here, as clients that do nothing need none
    from torch.nn import functional as F

    model, images, labels, about = workplace(folder)
    model.load_state_dict(start.to_torch_state_dict())
    lr, epochs, batch_size, weight_decay = (
        about["training"][n] for n in ("lr", "epochs", "batch_size", "weight_decay")
    )
    rows = slice(about["bounds"][id_], about["bounds"][id_ + 1])
    own_images, own_labels = torch.from_numpy(images[rows].copy()), torch.from_numpy(labels[rows].copy())
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    total = 0.0
    for _ in range(epochs):
        for index in torch.randperm(len(own_labels), generator=torch.Generator().manual_seed(id_)).split(batch_size):
            pixels = own_images[index].to(torch.float32).div(127.5).sub(1.0)
            loss = F.cross_entropy(model(pixel_values=pixels).logits, own_labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(index)
    return ArrayRecord(model.state_dict())


@functools.lru_cache(maxsize=1)
def workplace(folder: Path) -> tuple[Any, np.ndarray, np.ndarray, dict[str, Any]]:
    """The model to train, images, labels and settings; once an actor."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.set_num_threads(1)
    about = json.loads((folder / "work.json").read_text())
    images, labels = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "labels"))
    return ViTForImageClassification(ViTConfig.from_dict(about["config"])), images, labels, about


def server_of(options: argparse.Namespace, moments: list[float]) -> Any:
    """A server that notes when the first round began, as the end of round 0, and when each was done."""
    server = ServerApp()

    @server.main()
    def main(grid: Any, context: Any) -> None:
        while len(list(grid.get_node_ids())) < options.clients:
            time.sleep(POLL_SECONDS)
        strategy = FedAvg(
            fraction_evaluate=0.0,
            min_train_nodes=options.clients,
            min_available_nodes=options.clients,
            train_metrics_aggr_fn=lambda records, key: MetricRecord({"clients": len(records)}),
        )
        result = strategy.start(
            grid,
            start_of(options),
            num_rounds=options.rounds,
            train_config=ConfigRecord({"work": str(options.work.absolute()) if options.work else ""}),
            evaluate_fn=lambda round, arrays: moments.append(time.monotonic()),
        )
        answered = {round: int(metrics["clients"]) for round, metrics in result.train_metrics_clientapp.items()}
        if answered != dict.fromkeys(range(1, options.rounds + 1), options.clients):
            raise RuntimeError(f"round: clients that answered, of {options.clients}: {answered}")

    return server


def start_of(options: argparse.Namespace) -> Any:
    if options.work is None:
        return ArrayRecord([np.arange(options.numel, dtype=np.float32)])
    import torch

    weights = np.load(options.work / "start.npz")
    return ArrayRecord({name: torch.from_numpy(array) for name, array in weights.items()})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.overhead_flower", description=__doc__)
    parser.add_argument("--clients", type=int, required=True, metavar="N")
    parser.add_argument("--numel", type=int, default=2560, metavar="N", help="fp32 numbers sent each way")
    parser.add_argument("--rounds", type=int, required=True, metavar="N")
    parser.add_argument("--work", type=Path, metavar="DIR", help="real training: what overhead_bare has written")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    moments: list[float] = []
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    ray = {"init_args": {"address": "local", "num_cpus": ACTORS}}  # "local": never somebody else's
    run_simulation(server_of(options, moments), client, options.clients, backend_config=resources | ray)
    found = {"finished": moments, "versions": {name: importlib.metadata.version(name) for name in REPORTED}}
    options.json.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    from benchmarks import overhead_flower  # by its name: actors then import the client, not a copy sent with each call

    sys.exit(overhead_flower.main())
